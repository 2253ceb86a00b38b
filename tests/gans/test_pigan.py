"""pi-GAN: rays, samples, compositing against numbers of the released code, and the generator's promises."""

import copy
import math

import pytest
import torch

from gan3d.cameras import Camera, flip_axes, intrinsics_from_fov, look_at, sphere_point
from gan3d.gans.pigan import PiGAN
from gan3d.official.pigan import OFFICIAL_ORDER, official_ema, official_generator
from gan3d.poses import Gaussian, Spherical
from gan3d.rays import Bounds, Patch, Rays, camera_rays, full_grid
from gan3d.sampling import LAST_DELTA, deltas, sample_pdf
from gan3d.volume import accumulate, composite

POSES = Spherical(1.0, Gaussian(90, 17.2), Gaussian(90, 8.9), 12.0, up="y")


def tiny(seed: int = 0, bounds: Bounds | None = None, **changes) -> PiGAN:
    torch.manual_seed(seed)
    numbers = dict(bounds=bounds or Bounds(0.88, 1.12), z_dim=8, width=16, depth=3, mapping_width=16, mapping_depth=2,
                   point_scale=2 / 0.24, samples_per_ray=5, fine_samples=4, density_noise=1.0, density_noise_steps=5000,
                   pixel_grid="corner", density_gain=20.0, density_bias=0.3)
    return PiGAN(**(numbers | changes))  # type: ignore[arg-type]


def inputs(n: int = 2, seed: int = 1) -> tuple[torch.Tensor, Camera]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 8, generator=generator), POSES.sample(n, generator)


def picture(generator: PiGAN, resolution: int = 6, psi: float = 1.0, **how):
    z, camera = inputs()
    with torch.no_grad():
        return generator.synthesis(generator.mapping(z, truncation_psi=psi), camera, resolution, **how)


def test_rays_are_the_released_ones():
    upright = flip_axes(torch.eye(4))  # x right, y up, looking along −z
    camera = Camera(upright, intrinsics_from_fov(12.0))
    rays = camera_rays(camera, full_grid(4, 4), Bounds(0.88, 1.12), (4, 4), "corner")
    assert torch.allclose(rays.directions[0], torch.tensor([-0.1039621, 0.1039621, -0.9891328]), atol=1e-6)
    assert torch.allclose(rays.directions[1], torch.tensor([-0.0348217, 0.1044651, -0.9939188]), atol=1e-6)
    assert torch.equal(rays.near, torch.full((16,), 0.88))


def test_camera_is_the_released_one():
    eye = sphere_point(torch.tensor(1.2).double(), torch.tensor(1.3).double(), 1.0, up="y")
    found = flip_axes(look_at(eye, torch.zeros(3).double(), up="y"))[:3]
    expected = [[0.9320391, -0.0969303, 0.3491528, 0.3491528], [0, 0.9635582, 0.2674988, 0.2674988],
                [-0.3623577, -0.2493194, 0.8980739, 0.8980739]]
    assert torch.allclose(found, torch.tensor(expected).double(), atol=1e-7)


def test_composite_is_the_released_one():
    t = torch.tensor([[0.9, 1.0, 1.08]]).double()
    raw = torch.tensor([[1.5, -2.0, 4.0]]).double()
    rgb = torch.tensor([[[0.2, 0.4, 0.6], [0.8, 0.1, 0.3], [0.5, 0.5, 0.5]]]).double()
    weights = composite(raw.relu(), deltas(t, LAST_DELTA))
    seen = accumulate(weights, rgb, t)
    assert torch.allclose(weights, torch.tensor([[0.1392920, 0, 0.8607080]]).double(), atol=1e-7)
    assert torch.allclose(seen.features, torch.tensor([[0.4582124, 0.4860708, 0.5139292]]).double(), atol=1e-7)
    assert torch.allclose(seen.depth, torch.tensor([1.0549274]).double(), atol=1e-7)


def test_inverse_cdf_is_the_released_one():
    edges, weights = torch.tensor([[0.9, 0.95, 1.0, 1.05]]).double(), torch.tensor([[0.1, 0.7, 0.2]]).double()
    found = sample_pdf(edges, weights, torch.linspace(0, 1, 5)[None].double())
    assert torch.allclose(found, torch.tensor([[0.9, 0.9607140, 0.9785714, 0.9964288, 1.05]]).double(), atol=1e-6)


def test_fine_samples_gather_where_the_coarse_weight_is():
    generator = tiny(samples_per_ray=12, fine_samples=200, density_gain=1.0, density_bias=0.0).train()
    generator.before_step(5000)
    rays = Rays(torch.zeros(1, 1, 3), torch.ones(1, 1, 3), torch.tensor([[0.88]]), torch.tensor([[1.12]]))
    t = torch.linspace(0.88, 1.12, 12)[None, None]
    raw = torch.where((t - 1.0).abs() < 0.02, 1e4, -1.0)  # two opaque samples, at 0.989 and 1.011
    fine = generator._fine_t(rays, t, raw, random=True)
    inside = (fine > 0.978) & (fine < 1.0)  # the bin of the first opaque sample, between the midpoints around it
    assert inside.float().mean() > 0.97  # 1e-5 of weight goes to each of the other bins


def plain_picture(generator: PiGAN, ws, camera, resolution: int, t):
    """The picture by the equations: one ray's samples at given distances, all in one sum."""
    rays = camera_rays(camera, full_grid(resolution, resolution), generator.bounds, (resolution, resolution), "corner")
    points = rays.origins[..., None, :] + t[..., None] * rays.directions[..., None, :]
    raw, rgb = generator.field(ws)(points, rays.directions[..., None, :])
    delta = torch.cat([t.diff(dim=-1), torch.full_like(t[..., :1], 1e10)], -1)
    alpha = 1 - torch.exp(-raw.relu() * delta)
    seen = torch.cumprod(torch.cat([torch.ones_like(alpha[..., :1]), 1 - alpha], -1), -1)[..., :-1]
    return ((alpha * seen)[..., None] * rgb).sum(-2), (alpha * seen).sum(-1)


@pytest.mark.smoke
def test_without_fine_samples_a_picture_is_the_rendering_equation():
    generator = tiny(fine_samples=0).eval()
    z, camera = inputs()
    with torch.no_grad():
        ws = generator.mapping(z)
        images = generator.synthesis(ws, camera, 4)
        colour, opacity = plain_picture(generator, ws, camera, 4, torch.linspace(0.88, 1.12, 5).expand(2, 16, 5))
    expected = 2 * colour.view(2, 4, 4, 3).permute(0, 3, 1, 2) - 1
    assert torch.allclose(images.rgb, expected, atol=1e-5)
    assert torch.allclose(images.opacity, opacity.view(2, 4, 4), atol=1e-5)


@pytest.mark.smoke
def test_every_parameter_gets_a_gradient_in_training():
    generator = tiny().train()
    z, camera = inputs()
    images = generator.synthesis(generator.mapping(z), camera, 6)
    assert images.rgb.shape == (2, 3, 6, 6) and images.depth.shape == (2, 6, 6)
    images.rgb.square().mean().backward()
    for name, parameter in generator.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_gradients_flow_through_coarse_and_fine_samples():
    generator = tiny().train()
    z, camera = inputs()
    asked = []
    field = generator.field(generator.mapping(z))

    def watched(points, directions):
        raw, rgb = field(points, directions)
        rgb.retain_grad()
        asked.append(rgb)
        return raw, rgb

    rays = camera_rays(camera, full_grid(3, 3), generator.bounds, (3, 3), "corner")
    generator.render(watched, rays).features.sum().backward()
    assert [rgb.shape[2] for rgb in asked] == [5, 4]
    assert all(rgb.grad.abs().sum() > 0 for rgb in asked)


def test_pictures_are_random_only_in_training():
    generator = tiny().eval()
    assert torch.equal(picture(generator).rgb, picture(generator).rgb)
    assert not torch.equal(picture(generator.train()).rgb, picture(generator).rgb)
    noisy = tiny(jitter_at_inference=True).eval()
    assert not torch.equal(picture(noisy).rgb, picture(noisy).rgb)


def test_first_picture_is_not_blank():
    assert picture(tiny().eval()).rgb.std() > 0.02
    assert (picture(tiny().eval()).opacity > 0.1).float().mean() > 0.5


def test_density_noise_falls_to_nothing_and_is_absent_from_evaluation():
    generator = tiny()
    for step, expected in ((0, 1.0), (2500, 0.5), (5000, 0.0), (9000, 0.0)):
        generator.before_step(step)
        assert math.isclose(generator.noise_std, expected)
    generator.before_step(0)
    rays = Rays(torch.zeros(1, 1, 3), torch.ones(1, 1, 3), torch.zeros(1, 1), torch.ones(1, 1))
    t, raw = torch.linspace(0, 1, 5)[None, None], torch.ones(1, 1, 5)
    assert torch.equal(generator.eval()._weights(rays, t, raw), generator._weights(rays, t, raw))
    assert not torch.equal(generator.train()._weights(rays, t, raw), generator._weights(rays, t, raw))


def test_truncation_moves_ws_towards_their_mean():
    generator = tiny()
    z, _ = inputs()
    mean = generator.mapping_network.mean(10_000, torch.Generator().manual_seed(0))
    ws, half, none = (generator.mapping(z, truncation_psi=psi) for psi in (1.0, 0.5, 0.0))
    assert torch.allclose(half, (ws + mean) / 2, atol=1e-6)
    assert torch.allclose(none, mean.expand_as(ws), atol=1e-6)
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    assert all(torch.equal(value, before[name]) for name, value in generator.state_dict().items())


def test_chunks_do_not_change_a_picture(monkeypatch):
    whole = picture(tiny().eval())
    monkeypatch.setattr("gan3d.gans.pigan.RAYS_PER_CHUNK", 7)
    parts = picture(tiny().eval())
    assert torch.allclose(whole.rgb, parts.rgb, atol=1e-5) and torch.allclose(whole.depth, parts.depth, atol=1e-5)


def test_a_patch_shows_the_pixels_of_the_whole_picture():
    generator = tiny().eval()
    whole = picture(generator, 9)
    patch = Patch(torch.full((2,), 0.5), torch.zeros(2, 2), 5)  # the middle 5×5 of 9×9
    part = picture(generator, 9, patch=patch)
    assert torch.allclose(part.rgb, whole.rgb[:, :, 2:7, 2:7], atol=2e-4)  # gain × frequency magnify float32 rounding


def test_a_box_that_holds_the_slab_skips_rays_and_ends_them_at_its_walls():
    box = Bounds(0.5, 1.5, aabb=[[-0.05] * 3, [0.05] * 3], background=[1.0, 1.0, 1.0])
    images = picture(tiny(bounds=box).eval(), 8)
    missed = images.opacity == 0
    assert 0 < missed.sum() < missed.numel()
    assert torch.allclose(images.rgb.permute(0, 2, 3, 1)[missed], torch.ones(3))
    assert (images.depth[missed] == 0).all()
    seen = images.depth[~missed] / images.opacity[~missed]
    assert (seen > 0.85).all() and (seen < 1.15).all()  # the box's half diagonal is 0.087
    assert images.opacity.max() < 0.9  # a density of about 6 over at most 0.17: nothing closes the ray


def test_last_back_leaves_no_light_over():
    bounds = Bounds(0.88, 1.12, aabb=[[-0.5] * 3, [0.5] * 3])
    plain, closed = picture(tiny(bounds=bounds).eval()), picture(tiny(bounds=bounds, last_back=True).eval())
    assert plain.opacity.max() < 0.99
    assert torch.allclose(closed.opacity, torch.ones_like(closed.opacity), atol=1e-5)


def test_background_shows_where_nothing_is():
    empty = dict(density_gain=1.0, density_bias=-100.0)
    white = picture(tiny(bounds=Bounds(0.88, 1.12, background=[1.0, 1.0, 1.0]), **empty).eval())
    assert torch.equal(white.rgb, torch.ones_like(white.rgb))
    black = picture(tiny(**empty).eval())
    assert torch.equal(black.rgb, -torch.ones_like(black.rgb))


def test_locked_view_makes_colour_a_property_of_the_place():
    torch.manual_seed(2)
    points = 0.1 * torch.randn(1, 4, 3, 3)
    ways = [torch.nn.functional.normalize(torch.randn(1, 4, 1, 3), dim=-1) for _ in range(2)]
    for locked in (True, False):
        generator = tiny(lock_view_dependence=locked)
        colours = [generator.field(generator.mapping(inputs(1)[0]))(points, way)[1] for way in ways]
        assert torch.equal(*colours) == locked


def test_cost_counts_the_published_network():
    generator = tiny(width=256, depth=8, z_dim=256, mapping_width=256, mapping_depth=3, samples_per_ray=12,
                     fine_samples=12)
    cost = generator.cost(64)
    assert (cost.rays, cost.samples_per_ray) == (4096, 24)
    published = 2 * (3 * 256 + 7 * 256**2 + 256 + 259 * 256 + 256 * 3)
    assert 0.99 < cost.flops_per_sample / published < 1.01  # the direction is per ray, the heads are padded
    assert cost.flops_fixed == 2 * (3 * 256**2 + 256 * 4608)
    assert sum(p.numel() for p in generator.parameters()) == 1_910_788


def test_copies_and_state_dicts_carry_everything():
    generator = tiny()
    twin = tiny(seed=5)
    twin.load_state_dict(generator.state_dict())
    assert torch.equal(picture(copy.deepcopy(generator).eval()).rgb, picture(twin.eval()).rgb)


def test_official_names_and_nameless_averages_load():
    generator = tiny(depth=8, mapping_depth=3)
    own = generator.state_dict()
    names = dict(zip(official_ema([torch.zeros(1)] * 30), OFFICIAL_ORDER, strict=True))
    assert set(names) == set(own)
    released = {names[mine]: tensor for mine, tensor in own.items()}
    twin = tiny(seed=5, depth=8, mapping_depth=3)
    twin.load_state_dict(official_generator(released))
    assert torch.equal(twin.state_dict()["siren.colour_layer.weight"], own["siren.colour_layer.weight"])
    twin.load_state_dict(official_ema([released[name] for name in OFFICIAL_ORDER]))
    with pytest.raises(ValueError):
        official_ema([released[name] for name in OFFICIAL_ORDER[:-1]])
    with pytest.raises(KeyError):
        official_generator({"siren.spatial_embeddings": torch.zeros(1)})


def test_regularizers_are_none():
    generator = tiny()
    z, camera = inputs()
    ws = generator.mapping(z)
    assert generator.regularizers(ws, camera, generator.synthesis(ws, camera, 8), 0) == {}
