"""GOF: opacities, surfaces, intervals and losses against numbers of the released code, and the generator's promises."""

import copy
import math
import sys
import types

import pytest
import torch
from torch.nn import functional as F

from gan3d import meshes
from gan3d.cameras import Camera, flip_axes, intrinsics_from_fov, look_at
from gan3d.checkpoints import load_official
from gan3d.gans import Images
from gan3d.gans.gof import (
    GOF,
    SurfaceImages,
    convexity,
    find_surface,
    limited_interval,
    opacity_prior,
    secant,
    weighted_variance,
    weights_of,
)
from gan3d.nn.discriminators import ProgressiveDiscriminator
from gan3d.official.gof import official_ema, official_generator
from gan3d.official.pigan import OFFICIAL_ORDER
from gan3d.poses import Gaussian, Spherical
from gan3d.ramps import Exponential
from gan3d.rays import Bounds, Patch, Rays, camera_rays, full_grid
from gan3d.rendering import points_along
from gan3d.sampling import spread
from gan3d.training.ema import EMA
from gan3d.volume import accumulate

POSES = Spherical(1.0, Gaussian(90, 17.2), Gaussian(90, 8.9), 12.0, up="y")
FACES = Bounds(0.88, 1.12)


def tiny(seed: int = 0, **changes) -> GOF:
    torch.manual_seed(seed)
    numbers = dict(bounds=FACES, z_dim=8, width=16, depth=3, mapping_width=16, mapping_depth=2, point_scale=2 / 0.24,
                   coarse_samples=6, surface_samples=4, fine_samples=3, secant_steps=4,
                   interval=Exponential(0.12, 0.02, -1e-3), surface_from_step=0,
                   opacity_weight=Exponential(0.1, 1.0, 1e-3), normal_weight=0.05, normal_offset=0.01,
                   pixel_grid="corner")
    generator = GOF(**(numbers | changes))  # type: ignore[arg-type]
    with torch.no_grad():
        generator.siren.density_head.weight.mul_(30)  # at init all opacities are ½; these pictures have surfaces
    return generator


def inputs(n: int = 2, seed: int = 1) -> tuple[torch.Tensor, Camera]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 8, generator=generator), POSES.sample(n, generator)


def picture(generator: GOF, resolution: int = 6, psi: float = 1.0, **how) -> Images:
    z, camera = inputs()
    with torch.no_grad():
        return generator.synthesis(generator.mapping(z, truncation_psi=psi), camera, resolution, **how)


def head_on() -> Camera:
    """At (0, 0, 1), looking at the origin, y up."""
    return Camera(look_at(torch.tensor([[0.0, 0.0, 1.0]]), torch.zeros(3), "y"), intrinsics_from_fov(12.0)[None])


def sphere(radius: float = 0.06, steepness: float = 40.0, centre=(0.0, 0.0, 0.0)):
    def ask(points, directions):
        distance = (points - points.new_tensor(centre)).norm(dim=-1)
        return steepness * (radius - distance), (directions + 0 * points + 1) / 2

    return ask


def seen_by(generator: GOF, field, camera: Camera | None = None, resolution: int = 5):
    rays = camera_rays(camera or head_on(), full_grid(resolution, resolution), generator.bounds,
                       (resolution, resolution), "corner")
    return rays, *generator.sample(field, rays)


# Opacities


def test_composite_is_the_released_one():
    t, logits = torch.tensor([[0.9, 1.0, 1.08]]).double(), torch.tensor([[1.5, -2.0, 4.0]]).double()
    rgb = torch.tensor([[[0.2, 0.4, 0.6], [0.8, 0.1, 0.3], [0.5, 0.5, 0.5]]]).double()
    weights = weights_of(logits)
    assert torch.allclose(weights, torch.tensor([[0.8175745, 0.0217457, 0.1577898]]).double(), atol=1e-7)
    seen = accumulate(weights, rgb, t)
    assert torch.allclose(seen.features, torch.tensor([[0.2598063, 0.4080993, 0.5759633]]).double(), atol=1e-7)
    depth = seen.depth / (seen.opacity + 1e-5)
    assert torch.allclose(depth, torch.tensor([0.9306560]).double(), atol=1e-7)
    variance = (weights * (t - depth) ** 2).sum(-1) / (seen.opacity + 1e-5) * 3 / 2
    assert torch.allclose(variance, torch.tensor([0.0066073]).double(), atol=1e-7)
    closed = weights_of(logits, last_back=True)
    assert torch.allclose(closed[:, 2], torch.tensor([0.1606799]).double(), atol=1e-7)
    colour = accumulate(closed, rgb, t).features
    assert torch.allclose(colour, torch.tensor([[0.2612514, 0.4095443, 0.5774083]]).double(), atol=1e-7)


def test_an_opacity_is_the_sigmoid_of_its_logit_however_large():
    logits = torch.tensor([[-200.0, -20.0, 0.0, 20.0, 200.0]])
    weights = weights_of(logits)
    assert torch.allclose(weights[0, :3], torch.tensor([0.0, 2.0611537e-9, 0.5]))
    assert torch.isfinite(weights).all() and torch.allclose(weights.sum(), torch.tensor(1.0))


# Surfaces


@pytest.mark.parametrize("steps", [4, 8])
def test_surface_is_the_released_one(steps):
    rays = camera_rays(head_on(), full_grid(5, 5), FACES, (5, 5), "corner")
    t = spread(rays, 9)
    logits, _ = sphere()(points_along(rays, t), rays.directions[..., None, :])
    depth, hit = find_surface(sphere(), rays, t, logits, steps)
    plus = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
    assert torch.equal(hit.view(5, 5), plus)
    assert torch.allclose(depth.view(5, 5)[2, 2], torch.tensor(0.94), atol=1e-6)
    assert torch.allclose(depth.view(5, 5)[1:4:2, 2], torch.tensor(0.969538), atol=1e-6)  # six digits are given


def test_intervals_are_the_released_ones():
    generator = tiny(coarse_samples=9, surface_samples=9, fine_samples=0, interval=Exponential(0.03, 0.03, -1.0)).eval()
    _, t, _, _ = seen_by(generator, sphere())
    assert torch.allclose(t.view(5, 5, 9)[2, 2], torch.linspace(0.91, 0.97, 9), atol=1e-6)
    assert torch.allclose(t.view(5, 5, 9)[0, 0], torch.linspace(0.88, 1.12, 9), atol=1e-6)
    middle = torch.tensor([[0.94]])
    low, high = limited_interval(middle, 0.88, 1.12, 0.2, whole=torch.zeros(1, 1, dtype=torch.bool), shorten=False)
    assert torch.allclose(torch.cat([low, high]), torch.tensor([[0.72], [1.12]]))


def test_the_release_samples_cats_between_the_faces_near_and_far():
    cats = dict(bounds=Bounds(0.8, 1.2), coarse_samples=9, fine_samples=0, interval=Exponential(0.2, 0.2, -1.0))
    for compat, expected in ((False, (0.8, 1.2)), (True, (0.72, 1.12))):
        _, t, _, hit = seen_by(tiny(release_compat=compat, **cats).eval(), sphere())
        ends = t[..., 0, [0, -1]] if not hit.any() else t[hit][:, [0, -1]]
        assert torch.allclose(ends, torch.tensor(expected).expand_as(ends), atol=1e-6)


def test_intervals_stay_between_near_and_far_and_keep_their_length():
    middle = torch.tensor([0.85, 0.9, 1.0, 1.15, 1.0])
    whole = torch.tensor([False, False, False, False, True])
    low, high = limited_interval(middle, 0.8, 1.2, 0.08, whole=whole, shorten=True)
    assert torch.allclose(low, torch.tensor([0.8, 0.82, 0.92, 1.04, 0.8]))
    assert torch.allclose(high, torch.tensor([0.96, 0.98, 1.08, 1.2, 1.2]))
    near, far = torch.full((5,), 0.9), torch.full((5,), 1.0)  # a ray through the corner of a box
    low, high = limited_interval(middle, near, far, 0.08, whole=whole, shorten=True)
    assert torch.allclose(low, near) and torch.allclose(high, far)


def test_a_ray_hits_where_it_first_goes_from_outside_to_inside():
    rays = Rays(torch.zeros(1, 5, 3), torch.tensor([0.0, 0.0, 1.0]).expand(1, 5, 3), torch.zeros(1, 5),
                torch.full((1, 5), 4.0))
    t = spread(rays, 5)
    logits = torch.tensor([[[-1.0, 1, -1, 1, -1], [1, -1, -1, 1, 1], [-1, -1, -1, -1, -1], [-1, -1, 0, 1, 1],
                            [-3, -1, -1, -1, 1]]])
    depth, hit = find_surface(sphere(), rays, t, logits, steps=0)
    assert hit.tolist() == [[True, False, False, True, True]]  # whoever starts inside has missed the way in
    assert torch.allclose(depth, torch.tensor([[0.5, 4.0, 4.0, 2.0, 3.5]]))


def test_secant_steps_converge_and_stay_between_the_samples_that_enclose_the_surface():
    def curved(points, directions):
        return torch.expm1(10 * (points[..., 2] - 0.613)), points

    rays = Rays(torch.zeros(1, 1, 3), torch.tensor([[[0.0, 0.0, 1.0]]]), torch.zeros(1, 1), torch.ones(1, 1))
    t = torch.tensor([[[0.5, 0.7]]])
    errors = []
    for steps in (0, 4, 12):
        depth, _ = find_surface(curved, rays, t, curved(points_along(rays, t), rays.directions)[0], steps)
        assert 0.5 <= float(depth) <= 0.7
        errors.append(abs(float(depth) - 0.613))
    assert errors[0] > 0.01 and errors[1] < errors[0] and errors[2] < 1e-3  # one end stays: it converges linearly
    low, high = torch.tensor([0.88]), torch.tensor([0.91])
    assert secant(low, high, torch.tensor([-1e-38]), torch.tensor([3e38])).item() == pytest.approx(0.88)
    assert secant(low, high, torch.tensor([-3e38]), torch.tensor([0.0])).item() == pytest.approx(0.91)


def test_rays_of_each_image_are_refined_by_themselves():
    """Images with fewer hits are filled up with rays that miss; nothing of those shows."""
    generator = tiny(coarse_samples=9).eval()
    cameras = POSES.sample(3, torch.Generator().manual_seed(0))
    fields = [sphere(radius) for radius in (0.09, 0.02, -1.0)]

    def together(points, directions):
        parts = [field(points[i:i + 1], directions[i:i + 1]) for i, field in enumerate(fields)]
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    _, t, surface, hit = seen_by(generator, together, cameras, 7)
    assert len(set(hit.sum(-1).tolist())) == 3 and not hit[2].any()
    for i, field in enumerate(fields):
        _, t_alone, surface_alone, hit_alone = seen_by(generator, field, cameras[i:i + 1], 7)
        assert torch.equal(hit[i], hit_alone[0])
        assert torch.allclose(surface[i], surface_alone[0]) and torch.allclose(t[i], t_alone[0], atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_surface_samples_lie_around_the_surface_and_fine_ones_where_the_coarse_weight_is(training):
    generator = tiny(coarse_samples=12, surface_samples=8, fine_samples=0).train(training)
    generator.before_step(10_000)
    _, t, surface, hit = seen_by(generator, sphere(0.08, 4000.0), resolution=9)
    spacing = 0.04 / 7 if training else 0.0  # jitter moves each by up to half of it
    assert hit.any() and ((t - surface[..., None]).abs()[hit] < 0.02 + spacing / 2 + 1e-6).all()
    assert (t.diff(dim=-1) >= 0).all()
    fine = tiny(coarse_samples=12, surface_samples=2, fine_samples=40).train(training)
    fine.before_step(10_000)
    _, t, surface, hit = seen_by(fine, sphere(0.08, 4000.0), resolution=9)
    # the first opaque coarse sample is up to a spacing behind the surface, its bin half a spacing wide to each side
    near = (t - surface[..., None]).abs()[hit] < 1.5 * 0.24 / 11 + 1e-6
    assert near.float().mean() > 0.95 and (t.diff(dim=-1) >= 0).all()


def test_the_interval_shrinks_with_the_step_and_averages_follow():
    bfm = Exponential(0.12, 0.02, -3e-5)
    assert bfm(0) == 0.12 and bfm(20_000) == pytest.approx(0.12 * math.exp(-0.6)) and bfm(10**9) == 0.02
    assert bfm(59_725) > 0.02 == bfm(59_726)  # ln 6 / 3e-5
    weight = Exponential(0.1, 1.0, 4e-5)
    assert weight(10_000) == pytest.approx(0.1 * math.exp(0.4)) and weight(57_565) == 1.0 > weight(57_564)
    generator = tiny()
    average = EMA(generator, 0.9)
    generator.before_step(1000)
    average.update(generator)
    average.average.load_state_dict(generator.state_dict())
    assert torch.equal(picture(average.average).depth, picture(generator.eval()).depth)
    before = picture(generator)
    generator.before_step(5000)
    assert not torch.equal(picture(generator).depth, before.depth)


# Rendering


def plain_picture(generator: GOF, ws, camera, resolution: int, t):
    """The picture by the equations, from samples at given distances."""
    rays = camera_rays(camera, full_grid(resolution, resolution), generator.bounds, (resolution, resolution), "corner")
    logits, rgb = generator.field(ws)(points_along(rays, t), rays.directions[..., None, :])
    opacity = logits.sigmoid()
    arriving = torch.cumprod(torch.cat([torch.ones_like(opacity[..., :1]), 1 - opacity], -1), -1)[..., :-1]
    weights = opacity * arriving
    return (weights[..., None] * rgb).sum(-2), weights.sum(-1), (weights * t).sum(-1)


@pytest.mark.smoke
@pytest.mark.parametrize("surface_from_step", [0, 10])
def test_a_picture_is_the_rendering_equation_over_its_samples(surface_from_step):
    generator = tiny(surface_from_step=surface_from_step).eval()
    z, camera = inputs()
    ws = generator.mapping(z).detach()
    rays, t, _, hit = seen_by(generator, generator.field(ws), camera, 4)
    assert t.shape == (2, 16, 7 if surface_from_step == 0 else 9)
    assert bool(hit.any()) == (surface_from_step == 0)
    with torch.no_grad():
        images = generator.synthesis(ws, camera, 4)
        colour, opacity, depth = plain_picture(generator, ws, camera, 4, t)
    expected = 2 * colour.view(2, 4, 4, 3).permute(0, 3, 1, 2) - 1
    assert torch.allclose(images.rgb, expected, atol=1e-5)  # float32; arguments of sines reach tens of radians
    assert torch.allclose(images.opacity, opacity.view(2, 4, 4), atol=1e-5)
    assert torch.allclose(images.depth, depth.view(2, 4, 4), atol=1e-5)
    generator.before_step(10)
    assert seen_by(generator, generator.field(ws), camera, 4)[1].shape == (2, 16, 7)


def test_before_the_surface_the_coarse_samples_are_jittered_and_shown():
    generator = tiny(surface_from_step=10, fine_samples=0).train()
    field = generator.field(generator.mapping(inputs()[0]).detach())
    once, again = (seen_by(generator, field, inputs()[1])[1] for _ in range(2))
    regular = torch.linspace(0.88, 1.12, 6)
    assert not torch.equal(once, again) and ((once - regular).abs() <= 0.024 + 1e-6).all()
    assert torch.allclose(seen_by(generator.eval(), field, inputs()[1])[1], regular.expand(2, 25, 6))


@pytest.mark.smoke
def test_every_parameter_gets_a_gradient_in_training():
    generator = tiny().train()
    z, camera = inputs()
    ws = generator.mapping(z)
    images = generator.synthesis(ws, camera, 6)
    assert images.rgb.shape == (2, 3, 6, 6) and images.depth.shape == (2, 6, 6)
    images.rgb.square().mean().backward()
    for name, parameter in generator.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_gradients_flow_through_the_samples_that_are_shown_alone():
    generator = tiny().train()
    z, camera = inputs()
    field, asked = generator.field(generator.mapping(z)), []

    def watched(points, directions):
        logits, rgb = field(points, directions)
        assert not points.requires_grad
        asked.append((logits.shape[-1], torch.is_grad_enabled(), logits.requires_grad))
        return logits, rgb

    rays = camera_rays(camera, full_grid(5, 5), generator.bounds, (5, 5), "corner")
    _, trace = generator.trace(watched, rays)
    assert trace.hit.any() and not trace.surface.requires_grad
    assert asked == [(6, False, False)] + 4 * [(1, False, False)] + [(7, True, True)]  # coarse, secant, shown


def test_pictures_are_random_only_in_training():
    generator = tiny().eval()
    assert torch.equal(picture(generator).rgb, picture(generator).rgb)
    assert type(picture(generator)) is Images  # what viewers take apart
    assert not torch.equal(picture(generator.train()).rgb, picture(generator).rgb)


def test_truncation_moves_ws_towards_their_mean():
    generator = tiny()
    z, _ = inputs()
    ws, half, none = (generator.mapping(z, truncation_psi=psi) for psi in (1.0, 0.5, 0.0))
    assert torch.allclose(none[0], none[1], atol=1e-6) and torch.allclose(half, (ws + none) / 2, atol=1e-6)


def test_chunks_do_not_change_a_picture(monkeypatch):
    whole = picture(tiny().eval())
    monkeypatch.setattr("gan3d.gans.gof.RAYS_PER_CHUNK", 7)
    parts = picture(tiny().eval())
    assert torch.allclose(whole.rgb, parts.rgb, atol=1e-5) and torch.allclose(whole.depth, parts.depth, atol=1e-5)


def test_a_patch_shows_the_pixels_of_the_whole_picture():
    generator = tiny().eval()
    whole = picture(generator, 9)
    part = picture(generator, 9, patch=Patch(torch.full((2,), 0.5), torch.zeros(2, 2), 5))  # the middle 5×5 of 9×9
    assert torch.allclose(part.rgb, whole.rgb[:, :, 2:7, 2:7], atol=2e-4)  # the steep logits magnify float32 rounding


@pytest.mark.parametrize("training", [True, False])
def test_rays_that_miss_the_box_show_the_background(training):
    box = Bounds(0.5, 1.5, aabb=[[-0.05] * 3, [0.05] * 3], background=[1.0, 1.0, 1.0])
    generator = tiny(bounds=box).train(training)
    z, camera = inputs()
    images = generator.synthesis(generator.mapping(z), camera, 8)
    missed = images.opacity == 0
    assert 0 < missed.sum() < missed.numel() and (images.depth[missed] == 0).all()
    assert torch.allclose(images.rgb.permute(0, 2, 3, 1)[missed], torch.ones(3))
    seen = images.depth[~missed] / images.opacity[~missed]
    assert (seen > 0.9).all() and (seen < 1.1).all()  # the box's half diagonal is 0.087, jitter at most 0.005
    assert isinstance(images, SurfaceImages) == training
    if training:
        assert images.trace.hit.shape[-1] == int((~missed).sum((1, 2)).max())


def test_last_back_leaves_no_light_over():
    assert picture(tiny().eval()).opacity.min() < 0.95
    closed = picture(tiny(last_back=True).eval())
    assert torch.allclose(closed.opacity, torch.ones_like(closed.opacity), atol=1e-5)


# Losses


def regularized(generator: GOF, field, resolution: int = 16) -> tuple[SurfaceImages, dict[str, torch.Tensor]]:
    generator.field = lambda ws: field  # type: ignore[method-assign]
    ws = torch.zeros(1, 1)
    images = generator.train().synthesis(ws, head_on(), resolution)
    return images, generator.regularizers(ws, head_on(), images, 1000)


def test_the_prior_favours_opacities_of_0_and_1():
    assert opacity_prior(torch.tensor([0.0, 1.0, 1.0])).item() == pytest.approx(0, abs=1e-6)
    assert opacity_prior(torch.full((4,), 0.5)).item() == pytest.approx(1.1856, abs=1e-4)
    assert opacity_prior(torch.tensor([0.3])).item() == pytest.approx(math.log(0.4) + math.log(0.8) + 2.20727, abs=1e-5)


def test_the_prior_looks_at_opacities_and_in_the_release_at_red():
    def field(points, directions):
        return torch.full(points.shape[:-1], 1.2), 0.25 + 0 * points

    for compat, judged in ((False, 1.2), (True, 0.25)):
        _, losses = regularized(tiny(release_compat=compat), field)
        expected = 0.1 * math.e * opacity_prior(torch.tensor(judged).sigmoid())  # weight 0.1·e^(10⁻³·1000)
        assert set(losses) == {"reg_opacity"} and losses["reg_opacity"].item() == pytest.approx(float(expected))


def test_smoothness_of_a_sphere_is_the_turn_of_its_normals():
    _, losses = regularized(tiny(coarse_samples=9, normal_weight=2.0), sphere(), 48)
    # a random step h has a part √(2/3) h across; over the radius ρ it turns the normal by that over ρ; three components
    assert losses["reg_normals"].item() == pytest.approx(2 * (2 / 3) * (0.01 / 0.06) ** 2 / 3, rel=0.1)
    flat, losses = regularized(tiny(), lambda points, directions: (-30 * points[..., 2], points))
    assert flat.trace.hit.all() and losses["reg_normals"].item() < 1e-12


def test_the_release_compares_the_normals_x_with_their_y():
    images, losses = regularized(tiny(coarse_samples=9, normal_weight=1.0, normal_offset=1e-6, release_compat=True),
                                 sphere(centre=(0.02, 0.0, 0.0)))
    surface, hit = images.trace.surface, images.trace.hit
    normals = F.normalize(surface - torch.tensor([0.02, 0.0, 0.0]), dim=-1)[hit]
    expected = (normals[:, 0] - normals[:, 1]).square().mean()
    assert losses["reg_normals"].item() == pytest.approx(float(expected), rel=1e-3)


def test_smoothness_trains_the_field_through_second_derivatives():
    torch.set_default_dtype(torch.float64)
    try:
        generator = tiny(normal_weight=1.0).train()
        z, camera = inputs()
        z, camera = z.double(), Camera(*(value.double() for value in camera))

        def loss():
            torch.manual_seed(0)
            ws = generator.mapping(z)
            return generator.regularizers(ws, camera, images, 0)["reg_normals"]

        images = generator.synthesis(generator.mapping(z), camera, 4)
        weight = generator.siren.layers[1].weight
        (found,) = torch.autograd.grad(loss(), weight)
        change = torch.randn_like(weight)
        with torch.no_grad():
            weight += 1e-6 * change
            above = float(loss())
            weight -= 2e-6 * change
            below = float(loss())
        assert (found * change).sum().item() == pytest.approx((above - below) / 2e-6, rel=1e-5)
    finally:
        torch.set_default_dtype(torch.float32)


def test_without_a_hit_or_a_weight_there_is_no_smoothness():
    for generator, field in ((tiny(), sphere(-1.0)), (tiny(), sphere(9.0)), (tiny(normal_weight=0), sphere())):
        assert set(regularized(generator, field)[1]) == {"reg_opacity"}
    z, camera = inputs()
    generator = tiny().eval()
    ws = generator.mapping(z)
    assert generator.regularizers(ws, camera, generator.synthesis(ws, camera, 8), 0) == {}


# What is measured


def test_convexity_tells_a_bump_from_a_hollow():
    rays = camera_rays(head_on(), full_grid(16, 16), FACES, (16, 16))
    bump, hollow = ((1 - sign * (0.08 - points_along(rays, torch.ones(1, 256, 1)).norm(dim=-1) ** 2)).view(1, 16, 16)
                    for sign in (1, -1))
    assert convexity(bump) > 0.001 and torch.allclose(convexity(hollow), -convexity(bump), atol=1e-6)
    assert convexity(torch.full((2, 8, 8), 0.9)).abs().max() < 1e-6
    images = regularized(tiny(coarse_samples=9), sphere(0.3, 400.0, (0, 0, -0.3)), 12)[0]
    assert images.scalars["convexity"] > 0.001


def test_weighted_variance_is_that_of_a_soft_surface():
    generator = tiny()
    box = torch.linspace(0.88, 1.12, 36)

    def slab(steepness, shift=0.0):
        generator.field = lambda ws: lambda points, directions: (-steepness * points[..., 2] - shift, points)
        narrow = Camera(head_on().camera_to_world, intrinsics_from_fov(0.1)[None])
        return weighted_variance(generator, torch.zeros(1, 1), narrow, 3)

    logits = 100.0 * (box - 1)
    logits[box <= 1 - 0.06] = -math.inf  # well before the surface, interval.first / 2
    weights = weights_of(logits[None])[0]
    mean = (weights * box).sum()
    assert slab(100.0).item() == pytest.approx(1e4 * ((weights * (box - mean) ** 2).sum() * 36 / 35).item(), rel=1e-3)
    assert slab(1e5).item() < 1e-2 < slab(100.0).item() < slab(60.0).item()
    assert slab(1.0, 9.0).isnan().all()  # no ray is opaque


def test_the_surface_of_a_mesh_is_at_occupancy_one_half():
    generator = tiny().eval()
    ws = generator.mapping(inputs()[0])[:1]
    assert meshes.surface_level(generator, ws, POSES.path(2), 8) == 0
    assert 0 < meshes.depth_spread(generator, ws, POSES.path(2), 8) < 0.12


# Weights


def test_cost_counts_all_samples_of_the_published_network():
    generator = tiny(width=256, depth=8, z_dim=256, mapping_width=256, mapping_depth=3, coarse_samples=9,
                     surface_samples=9, fine_samples=6)
    cost = generator.cost(64)
    assert (cost.rays, cost.samples_per_ray) == (4096, 9 + 4 + 15)
    published = 2 * (3 * 256 + 7 * 256**2 + 256 + 259 * 256 + 256 * 3)
    assert 0.99 < cost.flops_per_sample / published < 1.01  # the direction is per ray, the heads are padded
    assert cost.flops_fixed == 2 * (3 * 256**2 + 256 * 4608)
    assert sum(p.numel() for p in generator.parameters()) == 1_910_788


def test_copies_and_state_dicts_carry_everything():
    generator, twin = tiny(), tiny(seed=5)
    twin.load_state_dict(generator.state_dict())
    assert torch.equal(picture(copy.deepcopy(generator).eval()).rgb, picture(twin.eval()).rgb)


@pytest.fixture
def released(tmp_path, monkeypatch):
    """A folder as the authors' code leaves it: state dicts, and a pickled average without names."""
    module = types.ModuleType("torch_ema.ema")

    class Average:  # is called ExponentialMovingAverage
        def __init__(self, parameters):
            self.decay, self.num_updates, self.collected_params = 0.999, 3, []
            self.shadow_params = [p.clone() for p in parameters]

    Average.__module__, Average.__qualname__ = "torch_ema.ema", "ExponentialMovingAverage"
    module.ExponentialMovingAverage = Average  # type: ignore[attr-defined]
    generator = tiny(depth=8, mapping_depth=3)
    names = dict(zip(official_ema([torch.zeros(1)] * 30), OFFICIAL_ORDER, strict=True))
    state = {names[mine]: tensor for mine, tensor in generator.state_dict().items()}
    state = {name: state[name] for name in OFFICIAL_ORDER}
    critic = {"layers.0.network.0.conv.weight": torch.randn(5, 6, 3, 3), "layers.0.network.0.conv.bias": torch.randn(5),
              "layers.0.network.2.conv.weight": torch.randn(5, 7, 3, 3), "layers.0.network.2.conv.bias": torch.randn(5),
              "layers.0.proj.weight": torch.randn(5, 4, 1, 1), "layers.0.proj.bias": torch.randn(5),
              "fromRGB.0.model.0.weight": torch.randn(4, 3, 1, 1), "fromRGB.0.model.0.bias": torch.randn(4),
              "fromRGB.1.model.0.weight": torch.randn(5, 3, 1, 1), "fromRGB.1.model.0.bias": torch.randn(5),
              "final_layer.weight": torch.randn(259, 5, 2, 2), "final_layer.bias": torch.randn(259),
              "freq_phase_layer.weight": torch.randn(8, 5, 2, 2), "freq_phase_layer.bias": torch.randn(8)}
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch_ema", types.ModuleType("torch_ema"))
        patch.setitem(sys.modules, "torch_ema.ema", module)
        torch.save(state, tmp_path / "generator.pth")
        torch.save(critic, tmp_path / "discriminator.pth")
        torch.save(Average([2 * tensor for tensor in state.values()]), tmp_path / "ema.pth")
    (tmp_path / "options.txt").write_text("{}")
    return tmp_path, generator


def test_released_folders_load(released):
    folder, generator = released
    ours = load_official(folder, "gof")
    assert set(ours) == {"generator", "generator_ema", "discriminator"}
    twin = tiny(seed=5, depth=8, mapping_depth=3)
    twin.load_state_dict(ours["generator"])
    assert torch.equal(picture(twin.eval()).rgb, picture(generator.eval()).rgb)
    assert all(torch.equal(ours["generator_ema"][name], 2 * tensor) for name, tensor in ours["generator"].items())
    critic = ProgressiveDiscriminator(channels=[4, 5], coord=True, down="pool", latent_dim=256, pose=True)
    critic.load_state_dict(ours["discriminator"])  # without the head that the release carries and never uses
    assert set(load_official(folder / "ema.pth", "gof")) == {"generator_ema"}
    with pytest.raises(ValueError):
        official_ema(list(ours["generator"].values())[:-1])
    with pytest.raises(KeyError):
        official_generator({"siren.spatial_embeddings": torch.zeros(1)})


def test_too_few_samples_are_refused():
    for numbers in ({"coarse_samples": 2}, {"surface_samples": 1}):
        with pytest.raises(ValueError, match="coarse_samples must be 3 or more"):
            tiny(**numbers)


def test_rays_are_the_released_ones():
    """They stand under pi-GAN's convention: OpenGL's camera, pixels from edge to edge."""
    camera = Camera(flip_axes(torch.eye(4)), intrinsics_from_fov(12.0))
    rays = camera_rays(camera, full_grid(4, 4), FACES, (4, 4), "corner")
    assert torch.allclose(rays.directions[0], torch.tensor([-0.1039621, 0.1039621, -0.9891328]), atol=1e-6)
