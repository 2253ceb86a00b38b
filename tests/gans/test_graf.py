"""Reference numbers were computed with the authors' released code; the fill rule makes its weights reproducible."""

import math
from copy import deepcopy

import pytest
import torch
from torch import Tensor

from gan3d.cameras import Camera, intrinsics_from_fov, look_at, sphere_point
from gan3d.checkpoints import load_official
from gan3d.gans.graf import GRAF, PatchDiscriminator
from gan3d.official.graf import official_discriminator, official_generator
from gan3d.rays import Bounds, PatchSampler, camera_rays, full_grid
from gan3d.rendering import density_normals
from gan3d.volume import composite

PAPER = {"z_shape_dim": 128, "z_appearance_dim": 128, "width": 256, "depth": 8, "skip": 4, "position_octaves": 10,
         "direction_octaves": 4, "samples_per_ray": 64, "density_noise": 1.0, "density_noise_steps": 5000,
         "pixel_grid": "integer"}
TINY = PAPER | {"z_shape_dim": 6, "z_appearance_dim": 4, "width": 16, "depth": 4, "skip": 1, "position_octaves": 3,
                "direction_octaves": 2, "samples_per_ray": 8}
CARLA = {"near": 7.5, "far": 12.5, "planar": True}
WHITE = (1.0, 1.0, 1.0)
BOX = [[-0.5, -0.5, -0.5], [0.5, 0.5, 0.5]]


def hashed(n: int, j: int) -> Tensor:
    x = 43758.5453 * torch.sin(12.9898 * torch.arange(n, dtype=torch.float64) + 78.233 * j)
    return 2 * (x - x.floor()) - 1


def fill(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The fill rule, in the authors' order of parameters: weights of unit variance gain, small biases."""
    filled = {}
    for j, (key, tensor) in enumerate(tensors.items()):
        scale = 0.05 if tensor.ndim == 1 else math.sqrt(6 / (tensor.numel() / len(tensor)))
        filled[key] = (hashed(tensor.numel(), j) * scale).reshape(tensor.shape)
    return filled


def official_state(directions: bool = True) -> dict[str, Tensor]:
    shapes = {}
    for i in range(8):
        shapes[f"pts_linears.{i}"] = (256, {0: 191, 5: 447}.get(i, 256))
    shapes |= {"views_linears.0": (128, 411 if directions else 384), "feature_linear": (256, 256),
               "alpha_linear": (1, 256), "rgb_linear": (3, 128)}
    tensors = {}
    for name, shape in shapes.items():
        tensors |= {f"{name}.weight": torch.empty(shape), f"{name}.bias": torch.empty(shape[0])}
    return tensors


def reference_generator(**changes) -> GRAF:
    graf = GRAF(bounds=changes.pop("bounds", Bounds(**CARLA, background=WHITE)), **PAPER | changes).double().eval()
    graf.load_state_dict(official_generator(fill(official_state())))
    return graf


def carla_camera() -> Camera:
    """u = 0.1, v = 0.4 at radius 10, 30° wide."""
    azimuth, polar = torch.tensor([2 * math.pi * 0.1]).double(), torch.tensor([1 - 2 * 0.4]).double().acos()
    eye = sphere_point(azimuth, polar, 10.0)
    return Camera(look_at(eye, torch.zeros(1, 3).double()), intrinsics_from_fov(30.0)[None].double())


def tiny(**changes) -> GRAF:
    torch.manual_seed(0)
    return GRAF(bounds=changes.pop("bounds", Bounds(**CARLA, background=WHITE)), **TINY | changes)


def front_cameras(images: int) -> Camera:
    eye = sphere_point(torch.linspace(0.3, 1.5, images), torch.full((images,), 1.2), 10.0)
    return Camera(look_at(eye, torch.zeros(images, 3)), intrinsics_from_fov(30.0).repeat(images, 1, 1))


@pytest.mark.smoke
def test_field_gives_the_reference_values():
    graf = reference_generator()
    points = torch.tensor([[0.3, -1.2, 0.7], [1.0, 0.5, -0.25]], dtype=torch.float64)[None, None]
    directions = torch.tensor([0.6, 0.0, -0.8], dtype=torch.float64)[None, None, None]
    density, rgb = graf.field(hashed(256, 100)[None])(points, directions)
    expected = torch.tensor([[-1.3678967, 0.9617316, 1.2391116], [-1.0968667, 1.1592121, 1.0413843]]).double()
    # The reference ran in float32; an encoding of 2⁹·x loses some 1e-4 of it there.
    torch.testing.assert_close(rgb[0, 0].logit(), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(density[0, 0], torch.tensor([-0.1953699, -0.8391002]).double(), atol=1e-4, rtol=0)


def test_camera_and_rays_are_the_reference_ones():
    camera = carla_camera()
    opengl = [[-0.58778525, -0.1618034, 0.79267153], [0.80901699, -0.11755705, 0.57590958], [0, 0.9797959, 0.2]]
    expected = torch.tensor(opengl).double() * torch.tensor([1.0, -1.0, -1.0])
    torch.testing.assert_close(camera.position[0], torch.tensor([7.92671532, 5.75909579, 2.0]).double(), atol=1e-6,
                               rtol=0)
    torch.testing.assert_close(camera.camera_to_world[0, :3, :3], expected, atol=1e-6, rtol=0)
    bounds = Bounds(**CARLA)
    rays = camera_rays(camera, full_grid(4, 4).double(), bounds, (4, 4), "integer")
    reference = torch.tensor([[-0.678530, -0.824184, 0.0625355], [-0.814349, -0.591659, -0.0687322]]).double()
    unit = torch.nn.functional.normalize(reference, dim=-1)
    torch.testing.assert_close(rays.directions[0, [0, 6]], unit, atol=1e-6, rtol=0)
    # The authors' ray is not normalised: its length is what a distance along the axis grows to along the ray.
    torch.testing.assert_close(rays.near[0, [0, 6]], 7.5 * reference.norm(dim=-1), atol=1e-4, rtol=0)
    torch.testing.assert_close(rays.far[0, [0, 6]], 12.5 * reference.norm(dim=-1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("background, pixel_6", [
    (WHITE, (0.46819, 0.90846, 0.92477)), (None, (0.13591, 0.57619, 0.59249))])
def test_rendering_gives_the_reference_pixels(background, pixel_6):
    graf = reference_generator(bounds=Bounds(**CARLA, background=background), samples_per_ray=8)
    with torch.no_grad():
        graf.radiance.density.bias.fill_(1.0)
        images = graf.synthesis(hashed(256, 100)[None], carla_camera(), 4)
    rgb = ((images.rgb + 1) / 2).flatten(2)[0].T
    # float32 reference, whose encoding amplifies rounding
    torch.testing.assert_close(rgb[0], torch.tensor([0.22593, 0.88611, 0.94042]).double(), atol=2e-3, rtol=0)
    torch.testing.assert_close(rgb[6], torch.tensor(pixel_6).double(), atol=2e-3, rtol=0)
    assert images.opacity.flatten()[0] == pytest.approx(1, abs=1e-6)
    assert images.opacity.flatten()[6] == pytest.approx(0.66772, abs=2e-3)


@pytest.mark.smoke
def test_a_checkpoint_file_of_the_authors_gives_the_reference_pixels(tmp_path):
    """Through the file, and in single precision as a user renders it; the average is taken, not the last step's."""
    average = {key: tensor.float() for key, tensor in fill(official_state()).items()}
    average["alpha_linear.bias"].fill_(1.0)
    last_step = {key: torch.randn_like(tensor) for key, tensor in average.items()}
    torch.save({"it": 5, "generator": last_step, "generator_test": average}, tmp_path / "carla_128.pt")
    state = load_official(tmp_path / "carla_128.pt", "graf")["generator_ema"]
    graf = GRAF(bounds=Bounds(**CARLA, background=WHITE), **PAPER | {"samples_per_ray": 8}).eval()
    graf.load_state_dict(state)
    z, camera = hashed(256, 100)[None].float(), Camera(*(part.float() for part in carla_camera()))
    with torch.no_grad():
        rgb = graf.synthesis(z, camera, 4).rgb
        truth = graf.double().synthesis(z.double(), camera, 4).rgb
    found = ((rgb + 1) / 2).flatten(2)[0].T
    torch.testing.assert_close(found[0], torch.tensor([0.22593, 0.88611, 0.94042]), atol=2e-3, rtol=0)  # as above
    torch.testing.assert_close(found[6], torch.tensor([0.46819, 0.90846, 0.92477]), atol=2e-3, rtol=0)
    # Measured: 8e-6, and 4e-5 with the rays in float32, whose rounding the encoding multiplies by 2⁹.
    torch.testing.assert_close(rgb.double(), truth, atol=2.5e-5, rtol=0)


def test_compositing_gives_the_reference_weights():
    length = torch.tensor([0.0, 0.1, -1.0]).double().norm()
    delta = torch.tensor([0.1, 0.08, 1e10]).double() * length
    weights = composite(torch.tensor([1.5, -2.0, 4.0]).double().relu(), delta)
    torch.testing.assert_close(weights, torch.tensor([0.1399357, 0.0, 0.8600643]).double(), atol=1e-7, rtol=0)


@pytest.mark.smoke
@pytest.mark.parametrize("size, expected", [(32, (0.921581, 0.674741)), (64, (-0.423340, -0.456351))])
def test_discriminator_gives_the_reference_logits(size, expected):
    discriminator = PatchDiscriminator(patch_size=size, channels=64, flip=False).double()
    official = fill({f"main.{n}.weight_orig": conv.weight for n, conv in zip(
        {32: (0, 3, 6, 9), 64: (0, 2, 5, 8, 11)}[size], [*discriminator.convs, discriminator.verdict], strict=True)})
    for key, weight in list(official.items()):
        for name, n in (("u", len(weight)), ("v", weight[0].numel())):
            official[key.replace("orig", name)] = torch.full((n,), n**-0.5).double()
    discriminator.load_state_dict(official_discriminator(official))
    logit = discriminator(hashed(2 * 3 * size**2, 101).reshape(2, 3, size, size)).logit
    torch.testing.assert_close(logit, torch.tensor(expected).double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size, parameters", [(32, 2_635_776), (64, 2_763_776), (128, 2_795_008)])
def test_discriminator_has_the_published_number_of_parameters(size, parameters):
    discriminator = PatchDiscriminator(patch_size=size, channels=64, flip=False)
    assert sum(p.numel() for p in discriminator.parameters()) == parameters


@pytest.mark.parametrize("octaves, parameters", [(4, 677_764), (None, 674_308)])
def test_generator_takes_every_official_tensor_and_no_other(octaves, parameters):
    graf = GRAF(bounds=Bounds(**CARLA), **PAPER | {"direction_octaves": octaves})
    assert sum(p.numel() for p in graf.parameters()) == parameters
    graf.load_state_dict(official_generator(official_state(octaves is not None)))  # strict
    with pytest.raises(KeyError, match="pts_linear"):
        official_generator({"pts_linear.0.weight": torch.zeros(1)})


def test_discriminator_normalises_its_weights_and_can_be_copied_after_use():
    discriminator = PatchDiscriminator(patch_size=16, channels=2, flip=False)
    with torch.no_grad():
        for _ in range(200):
            discriminator(torch.zeros(1, 3, 16, 16))
    conv = discriminator.convs[0]
    matrix = conv.weight.detach().flatten(1)
    largest = torch.linalg.matrix_norm(matrix, ord=2)
    assert (conv.u @ matrix @ conv.v).item() == pytest.approx(largest.item(), rel=1e-3)  # power iteration converges
    discriminator(torch.zeros(1, 3, 16, 16))
    deepcopy(discriminator)
    discriminator.eval()
    before = conv.u.clone()
    discriminator(torch.zeros(1, 3, 16, 16))
    assert torch.equal(conv.u, before)


def test_r1_differentiates_through_the_discriminator_twice():
    discriminator = PatchDiscriminator(patch_size=16, channels=2, flip=False).double().eval()
    images = torch.randn(1, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    weight = discriminator.convs[0].weight

    def penalty() -> Tensor:
        (gradient,) = torch.autograd.grad(discriminator(images).logit.sum(), images, create_graph=True)
        return gradient.square().sum()

    (analytic,) = torch.autograd.grad(penalty(), weight)
    with torch.no_grad():
        weight[0, 0, 0, 0] += 1e-6
    up = penalty().item()
    with torch.no_grad():
        weight[0, 0, 0, 0] -= 2e-6
    assert analytic[0, 0, 0, 0].item() == pytest.approx((up - penalty().item()) / 2e-6, rel=1e-3)


def test_discriminator_survives_a_second_forward_before_backward():
    discriminator = PatchDiscriminator(patch_size=16, channels=2, flip=False)
    first = discriminator(torch.randn(2, 3, 16, 16)).logit
    second = discriminator(torch.randn(2, 3, 16, 16)).logit
    (first - second).sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in discriminator.parameters())


def test_flipping_happens_to_half_of_the_images_in_training_only():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(patch_size=16, channels=2, flip=True)
    images = torch.randn(1, 3, 16, 16).repeat(64, 1, 1, 1)
    flipped = (discriminator(images).logit - discriminator.eval()(images).logit).abs() > 1e-4
    assert 16 < flipped.sum() < 48  # 4 standard deviations around 32
    assert discriminator(images).logit.std() < 1e-5


def test_patch_of_scale_one_is_the_whole_picture():
    graf = tiny().eval()
    patch = PatchSampler(8, 0.25, 0.0025).sample(2, 0)._replace(scale=torch.ones(2), offset=torch.zeros(2, 2))
    z, camera = torch.randn(2, 10), front_cameras(2)
    whole, part = graf.synthesis(z, camera, 8), graf.synthesis(z, camera, 8, patch)
    torch.testing.assert_close(whole.rgb, part.rgb, atol=1e-5, rtol=0)
    assert whole.depth.shape == whole.opacity.shape == (2, 8, 8)


def test_synthesis_is_random_in_training_only():
    graf, z, camera = tiny(), torch.randn(1, 10), front_cameras(1)
    assert not torch.equal(graf.synthesis(z, camera, 4).rgb, graf.synthesis(z, camera, 4).rgb)
    graf.eval()
    assert torch.equal(graf.synthesis(z, camera, 4).rgb, graf.synthesis(z, camera, 4).rgb)


def test_every_parameter_learns_from_a_picture():
    graf = tiny()
    graf.synthesis(torch.randn(2, 10), front_cameras(2), 6).rgb.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in graf.parameters())


def test_density_noise_falls_to_its_last_value_and_stays():
    graf = tiny()
    for step, std in ((0, 1.0), (2500, 0.5), (4999, 2e-4), (5000, 2e-4), (90_000, 2e-4)):
        graf.before_step(step)
        assert graf.noise_std == pytest.approx(std)


def test_shape_code_moves_density_and_appearance_code_only_colour():
    field = {}
    graf, points, direction = tiny(), torch.randn(1, 4, 8, 3), torch.tensor([0.0, 0.0, 1.0]).expand(1, 4, 1, 3)
    z = torch.randn(1, 10)
    for name, change in (("same", []), ("shape", [0]), ("appearance", [9])):
        moved = z.clone()
        moved[:, change] += 1
        field[name] = graf.field(moved)(points, direction)
    torch.testing.assert_close(field["appearance"][0], field["same"][0])
    assert (field["shape"][0] - field["same"][0]).abs().max() > 1e-3
    assert (field["appearance"][1] - field["same"][1]).abs().max() > 1e-4


def test_folded_field_is_the_network_with_its_concatenations():
    graf, z = tiny(), torch.randn(2, 10)
    points, directions = torch.randn(2, 3, 5, 3), torch.nn.functional.normalize(torch.randn(2, 3, 1, 3), dim=-1)
    net = graf.radiance

    def encode(x: Tensor, octaves: int) -> Tensor:
        return torch.cat([x] + [f(2**k * x) for k in range(octaves) for f in (torch.sin, torch.cos)], dim=-1)

    def over_samples(latent: Tensor) -> Tensor:
        return latent[:, None, None].expand(-1, 3, 5, -1)

    seen = hidden = torch.cat([encode(points, 3), over_samples(z[:, :6])], dim=-1)
    for index, layer in enumerate(net.trunk):
        hidden = torch.relu(layer(torch.cat([seen, hidden], -1) if index == 2 else hidden))
    lit = [net.feature(hidden), encode(directions, 2).expand(-1, -1, 5, -1), over_samples(z[:, 6:])]
    rgb = torch.sigmoid(net.colour(torch.relu(net.view(torch.cat(lit, -1)))))
    density = net.density(hidden)[..., 0]
    ours = graf.field(z)(points, directions)
    torch.testing.assert_close(ours, (density, rgb), atol=2e-6, rtol=1e-5)  # float32, another order of sums


def test_truncation_draws_towards_the_mean_latent():
    graf, z = tiny(), torch.randn(3, 10)
    assert torch.equal(graf.mapping(z), z)
    assert torch.equal(graf.mapping(z, truncation_psi=0.0), torch.zeros_like(z))


def test_rays_that_miss_the_box_show_the_background_and_those_that_leave_it_pass_through():
    graf = tiny(bounds=Bounds(**CARLA, background=(0.25, 0.5, 1.0), aabb=BOX)).eval()
    with torch.no_grad():
        graf.radiance.density.bias.fill_(0.5)
        images = graf.synthesis(torch.randn(2, 10), front_cameras(2), 16)
    assert torch.equal(images.opacity[:, 0, 0], torch.zeros(2))
    torch.testing.assert_close(images.rgb[0, :, 0, 0], torch.tensor([-0.5, 0.0, 1.0]))
    centre = images.opacity[:, 8, 8]
    assert (centre > 0.1).all() and (centre < 0.95).all()  # thin fog of half a density over one unit


def test_picture_in_chunks_is_the_picture_at_once(monkeypatch):
    graf, z, camera = tiny().eval(), torch.randn(2, 10), front_cameras(2)
    at_once = graf.synthesis(z, camera, 6)
    monkeypatch.setattr("gan3d.gans.graf.POINTS_PER_CHUNK", 2 * 8 * 7)
    with torch.no_grad():
        chunked = graf.synthesis(z, camera, 6)
    torch.testing.assert_close(chunked.rgb, at_once.rgb)


def test_autocast_leaves_geometry_and_spectral_norm_in_full_precision():
    graf, discriminator = tiny().eval(), PatchDiscriminator(patch_size=16, channels=2, flip=False)
    z, camera, twin = torch.randn(1, 10), front_cameras(1), deepcopy(discriminator)
    plain = graf.synthesis(z, camera, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(graf.synthesis(z, camera, 16).rgb, plain.rgb)
        discriminator(plain.rgb)
    twin(plain.rgb)
    torch.testing.assert_close(discriminator.convs[1].u, twin.convs[1].u)


def test_normals_point_against_the_density_gradient():
    graf = tiny().double()
    field = graf.field(torch.randn(1, 10, dtype=torch.float64))
    points = torch.randn(1, 1, 3, 3, dtype=torch.float64)
    normals = density_normals(field, points)
    ahead, behind = (field(points + s * 1e-5 * normals, torch.ones(1, 1, 1, 3).double())[0] for s in (1, -1))
    assert (ahead < behind).all()
    torch.testing.assert_close(normals.norm(dim=-1), torch.ones(1, 1, 3, dtype=torch.float64))


def test_cost_counts_the_folded_network():
    cost = GRAF(bounds=Bounds(**CARLA), **PAPER).cost(32)
    products = 63 * 256 + 7 * 256**2 + 63 * 256 + 256 * 129 + 3 * 128  # layers, skip, heads; two flops each
    per_ray = 27 * 128
    assert cost.flops_per_sample == pytest.approx(2 * (products + per_ray / 64))
    assert cost.rays == 1024 and cost.samples_per_ray == 64
    assert cost.flops_fixed > 0
