"""StyleNeRF against reference numbers of the released modules (CPU, float32), its sizes, its algebra, gradients."""

import math

import pytest
import torch
from filling import fill, inputs
from torch import nn
from torch.nn import functional as F

from gan3d.cameras import Camera
from gan3d.gans import stylenerf
from gan3d.gans.stylenerf import (
    Background,
    StyleNeRF,
    StyleNeRFDiscriminator,
    blurred,
    encode,
    enlarged,
    lattice,
    outside_points,
)
from gan3d.losses import PathLength
from gan3d.official.stylenerf import official_discriminator, official_generator
from gan3d.poses import Spherical, Uniform
from gan3d.ramps import Growth
from gan3d.rays import Bounds, camera_rays, full_grid
from gan3d.sampling import sample_pdf
from gan3d.volume import composite

FACES, CARS = Bounds(0.88, 1.12, planar=True), Bounds(0.8, 1.2, planar=True)
# Rounding moves a point by 3e-8, the encoding's highest octave by 1600 times that, and a fine sample may sit on a steep
# edge: the reference implementation itself is known to two units of the fourth digit.
TOLERANCE = 2e-4


def generator(**changes) -> StyleNeRF:
    """The model of the reference numbers."""
    features = changes.get("features", 16)
    numbers = dict(
        bounds=FACES, growth=Growth(8, 32, 0, 10), render_resolution=8, z_dim=32, w_dim=32, mapping_depth=2, width=128,
        depth=8, octaves=10, features=16, samples_per_ray=14, fine_samples=14, density_noise=1.0, channel_base=32768,
        channel_max=32, upsampling="nn_cat", blur=True, magnitude_decay=0.999, clamp=256, path_weight=2.0,
        path_samples=4, path_full=True,
        background=Background(z_dim=32, width=64, depth=4, octaves=10, features=features, samples=4, start=0.5))
    return StyleNeRF(**(numbers | changes))


def small(**changes) -> StyleNeRF:
    background = Background(z_dim=3, width=8, depth=2, octaves=2, features=8, samples=3, start=0.5)
    return generator(**(dict(z_dim=8, w_dim=8, width=8, depth=3, octaves=2, features=8, samples_per_ray=5,
                             fine_samples=4, channel_max=8, background=background) | changes))


def filled(**changes) -> StyleNeRF:
    """Filled under the release's names; the background's linear layers by the rule without equalised rates."""
    model = generator(**changes).eval()
    release = nn.Module()
    release.mapping, release.synthesis = model.mapper, nn.Module()
    release.synthesis.fg_nerf, release.synthesis.bg_nerf = model.foreground, model.background
    for name, block in model.blocks.items():
        setattr(release.synthesis, name, block)
    fill(release)
    for layer in model.background.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data /= math.sqrt(layer.in_features)
    return model


def camera(yaw: float = -0.3 + 0.3 * 0.6, polar: float = math.pi / 2 - 0.155 + 0.7 * 0.31, fov: float = 12,
           n: int = 2) -> Camera:
    """The release's camera_mode [.3, .7, .5], unless told otherwise."""
    sphere = Spherical(1.0, Uniform(0, 1), Uniform(0, 1), fov, "z")
    return sphere.camera(torch.full([n], yaw), torch.full([n], polar), torch.ones(n))


def latents() -> torch.Tensor:
    return torch.cat([inputs([2, 32], 1), inputs([2, 32], 3)], dim=1)


def seen(x: torch.Tensor) -> list[float]:
    flat, n = x.flatten(), x.numel()
    return [x.mean().item(), x.std(correction=0).item(), *(flat[i].item() for i in (0, n // 3, n // 2, n - 1))]


@pytest.fixture(scope="module")
def faces() -> StyleNeRF:
    return filled()


# The released numbers


@pytest.mark.parametrize("alpha, side, numbers", [
    (-1, 32, [0.14428, 1.27448, 0.31355, 0.19067, 0.67002, 0.84888]),
    (0, 8, [0.18616, 0.32132, 0.34128, 0.33424, 0.50144, 0.60838]),
    (0.75, 32, [0.12148, 0.84481, 0.22751, 0.31444, 0.39460, 0.72312]),
    (1, 32, [0.13986, 1.27738, 0.32650, 0.17210, 0.67043, 0.84887])])
def test_the_picture_has_the_reference_numbers_at_every_alpha(faces, alpha, side, numbers) -> None:
    faces.alpha.fill_(alpha)
    with torch.no_grad():
        ws = faces.mapping(latents())
        images = faces.synthesis(ws, camera(), faces.side)
    assert ws[:, :-1].mean().item() == pytest.approx(0.35289, abs=1e-5)
    assert ws[:, :-1].std(correction=0).item() == pytest.approx(0.80582, abs=1e-5)
    assert images.rgb.shape == (2, 3, side, side)
    assert seen(images.rgb) == pytest.approx(numbers, abs=TOLERANCE)


def test_the_picture_of_the_cars_has_the_reference_numbers() -> None:
    model = filled(bounds=CARS, upsampling="pixelshuffle", samples_per_ray=16, fine_samples=16, growth=32)
    yaw = -math.pi + 0.3 * 2 * math.pi
    with torch.no_grad():
        images = model.synthesis(model.mapping(latents()), camera(yaw, fov=16), 32)
    assert seen(images.rgb) == pytest.approx([0.41659, 1.09778, 0.25329, -0.00287, 0.63650, 1.17754], abs=TOLERANCE)


def test_the_discriminator_has_the_reference_numbers_at_every_side() -> None:
    judge = StyleNeRFDiscriminator(resolution=32, channel_base=1024, channel_max=16, group=2, clamp=256)
    fill(judge)
    expected = {8: [0.241645, 0.973944], 16: [0.466294, 0.517608], 32: [0.470966, 0.484788]}
    for side, logits in expected.items():
        assert judge(inputs([2, 3, side, side], 1)).logit.tolist() == pytest.approx(logits, abs=1e-5)  # seven layers


def test_cameras_rays_and_the_outside_are_the_releases() -> None:
    pose = camera().camera_to_world[0]
    right, down, forward, eye = pose[:3].T
    assert right.tolist() == pytest.approx([0.11971, 0.99281, 0], abs=1e-5)
    assert (-down).tolist() == pytest.approx([0.06151, -0.00742, 0.99808], abs=1e-5)  # the release's y points up
    assert eye.tolist() == pytest.approx([0.9909, -0.11948, -0.06196], abs=1e-5)
    assert (-forward).tolist() == pytest.approx(eye.tolist(), abs=1e-6)
    rays = camera_rays(camera(), full_grid(8, 8), FACES, (8, 8))
    unnormalised = rays.directions[0, 0] * (rays.near[0, 0] / 0.88)
    assert unnormalised.tolist() == pytest.approx([-0.99625, 0.0275, 0.15375], abs=1e-5)
    outside = outside_points(rays, torch.tensor([0.5, 0.25, 0.0]).expand(2, 64, 3))[0, 0]
    assert outside.flatten().tolist() == pytest.approx(
        [-0.98027, -0.01901, 0.19676, 0.5, -0.98461, 0.00414, 0.17469, 0.25, -0.98793, 0.02727, 0.15247, 0], abs=1e-5)


def test_encoding_and_weights_are_the_releases() -> None:
    assert encode(torch.tensor([[0.1, 0.2, 0.3]]), 2).flatten().tolist() == pytest.approx(
        [0.30902, 0.58779, 0.80902, 0.95106, 0.80902, 0.58779, 0.58779, 0.95106, 0.95106, 0.80902, 0.30902, -0.30902],
        abs=1e-5)
    lengths = torch.tensor([0.88, 0.96, 1.04, 1.12]).diff() * math.sqrt(0.05**2 + 0.02**2 + 1)
    weights = composite(torch.tensor([0.0, 5.0, 20.0]), lengths)  # the last sample, 3, does not matter
    assert weights.tolist() == pytest.approx([0, 0.33007, 0.53499], abs=1e-5)
    assert 1 - weights.sum().item() == pytest.approx(0.13494, abs=1e-5)


@pytest.mark.parametrize("side, judge_base, parameters, judge_parameters", [
    (256, 16384, 5_264_749, 23_052_353), (512, 32768, 5_411_840, 27_774_017), (1024, 32768, 5_481_547, 27_801_889)])
def test_sizes_are_the_releases(side: int, judge_base: int, parameters: int, judge_parameters: int) -> None:
    background = Background(z_dim=32, width=64, depth=4, octaves=10, features=256, samples=4, start=0.5)
    large = dict(growth=side, render_resolution=32, z_dim=512, w_dim=512, mapping_depth=8, features=256,
                 channel_max=1024, background=background)
    model = generator(**large)
    judge = StyleNeRFDiscriminator(resolution=side, channel_base=judge_base, channel_max=512, group=8, clamp=256)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for p in judge.parameters()) == judge_parameters
    assert sum(p.numel() for p in model.foreground.parameters()) == 779_072
    assert sum(p.numel() for p in model.background.parameters()) == 37_188
    if side == 256:
        assert sum(p.numel() for p in generator(**large | {"upsampling": "pixelshuffle"}).parameters()) == 5_439_469


def test_official_names_are_ours() -> None:
    ours = {"mapping.fc0.weight": "mapper.fc0.weight", "synthesis.alpha": "alpha",
            "synthesis.fg_nerf.fc_in.bias": "foreground.fc_in.bias",
            "synthesis.bg_nerf.to_rgb.bias": "background.to_rgb.bias",
            "synthesis.b64.conv0.w_avg": "blocks.b64.conv0.w_avg"}
    release = {name: torch.tensor(float(i)) for i, name in enumerate(ours)}
    found = official_generator(release | {"synthesis.b64.conv0.adapter.1.resample_filter": torch.ones(4, 4)})
    assert found == {mine: release[theirs] for theirs, mine in ours.items()}
    judge = {"alpha": torch.ones(()), "b4.out.bias": torch.zeros(()), "b8.resample_filter": torch.ones(4, 4)}
    assert list(official_discriminator(judge)) == ["b4.out.bias"]


# The algebra of what is summed before it is multiplied


def plain_field(model: StyleNeRF, ws: torch.Tensor, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Density and (rgb, features) of one image's points, layer by layer as the paper has them."""
    fg = model.foreground
    x = encode(points, fg.octaves)
    for layer, w in zip([fg.fc_in, *fg.blocks], ws, strict=False):
        style = F.linear(w, layer.affine.weight / math.sqrt(len(w)), layer.affine.bias)
        weight = layer.weight[:, :, 0, 0] * style
        weight = weight / (weight.square().sum(1, keepdim=True) + 1e-8).sqrt()
        x = F.leaky_relu(x @ weight.T + layer.bias, 0.2) * math.sqrt(2)
    outputs = []
    for head, w in ((fg.sigma_out, ws[len(fg.blocks) + 1]), (fg.feat_out, ws[len(fg.blocks) + 2])):
        style = F.linear(w, head.affine.weight / math.sqrt(len(w)), head.affine.bias)
        outputs.append(x @ (head.weight[:, :, 0, 0] * style / math.sqrt(x.shape[-1])).T + head.bias)
    rgb = F.conv2d(outputs[1].T[None, :, None], fg.to_rgb.weight / math.sqrt(outputs[1].shape[1]), fg.to_rgb.bias)
    return outputs[0][:, 0], torch.cat([rgb[0, :, 0].T, outputs[1]], 1)


def randomised(model: nn.Module) -> nn.Module:
    """Biases that are zero at first would hide their mistakes."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    for name, buffer in model.named_buffers():
        if name.endswith(("conv0.w_avg", "conv1.w_avg")):
            buffer.fill_(1.7)
    return model


@pytest.mark.parametrize("background", [True, False])
def test_a_ray_is_the_weighted_sum_of_its_samples(background: bool) -> None:
    torch.manual_seed(0)
    model = randomised(small(**({} if background else {"background": None}))).double().eval()
    seen = Camera(*(part.double() for part in camera(n=1)))
    u, _, v = torch.linalg.svd(seen.camera_to_world[:, :3, :3])
    seen.camera_to_world[:, :3, :3] = u @ v  # a rotation to float64's precision
    rays = model._rays(seen, full_grid(3, 3), 3)
    usual = camera_rays(seen, full_grid(3, 3).double(), model.bounds, (3, 3))  # the same rays, of unit length
    length = rays.directions.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(rays.directions, usual.directions * length)
    torch.testing.assert_close(rays.near[..., None] * length, usual.near[..., None])
    torch.testing.assert_close(rays.far[..., None] * length, usual.far[..., None])
    ws = model.mapping(torch.randn(1, model.z_dim).double())
    ready = model.prepare(ws)
    shown, rendering = model._render(ready, rays)
    for n in range(9):
        o, d, near, far = usual.origins[0, n], usual.directions[0, n], usual.near[0, n], usual.far[0, n]
        t = torch.linspace(0, 1, 5).double() * (far - near) + near

        def weigh(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            density, shown = plain_field(model, ws[0], o + t[:, None] * d)  # noqa: B023
            alpha = 1 - torch.exp(-density.relu() * F.pad(t.diff(), (0, 1)))
            alpha[-1] = 0 if background else 1
            arrives = torch.cat([torch.ones(1).double(), (1 - alpha).cumprod(0)])[:-1]
            return alpha * arrives, shown

        weights, _ = weigh(t)
        fine = sample_pdf((t[1:] + t[:-1]) / 2, weights[1:-1], torch.linspace(0, 1, 4).double())
        t = torch.cat([t, fine]).sort().values
        weights, each = weigh(t)
        expected = weights @ each
        if background:
            outside, hidden = model.background(ready.z_background, usual, 0.0)
            expected += (1 - weights.sum()) * F.linear(outside[0, n] @ hidden[0, n], *model.background.heads())
        torch.testing.assert_close(shown[0, n], expected)  # float64: the same sums in another order
        torch.testing.assert_close(rendering.depth[0, n], weights @ t)


@pytest.mark.parametrize("mode", ["nn_cat", "pixelshuffle"])
@pytest.mark.parametrize("blur", [True, False])
def test_upsampling_is_nearest_neighbours_with_an_adapter_then_the_filter(mode: str, blur: bool) -> None:
    torch.manual_seed(0)
    layer = randomised(stylenerf.UpsamplingConv(6, 8, w_dim=4, decay=0.999, mode=mode, blur=blur)).double().eval()
    x, w = torch.randn(2, 5, 5, 6).double(), torch.randn(2, 4).double()
    y = torch.einsum("bhwi,boi->bohw", x, layer.matrix(w))
    near = F.interpolate(y, scale_factor=2)
    if mode == "nn_cat":
        pad = F.pad(y, (1, 1, 1, 1))
        left, right, up, down = pad[..., 1:-1, :-2], pad[..., 1:-1, 2:], pad[..., :-2, 1:-1], pad[..., 2:, 1:-1]
        four = torch.stack([left + up, up + right, left + down, right + down], 2) / 2
        large = near + layer.adapter(torch.cat([near, F.pixel_shuffle(four.flatten(1, 2), 2)], 1))
    else:
        large = near + F.pixel_shuffle(layer.adapter(y), 2)
    if blur:
        taps = torch.tensor([1, 3, 3, 1]).double() / 8
        kernel = (taps[:, None] * taps).expand(8, 1, 4, 4)
        large = F.conv2d(F.pad(large, (2, 1, 2, 1)), kernel, groups=8)
    expected = math.sqrt(2) * (large + layer.bias[:, None, None])
    torch.testing.assert_close(layer(x, w, True), expected.permute(0, 2, 3, 1))  # float64: another order of sums
    plain = math.sqrt(2) * (y + layer.bias[:, None, None])
    torch.testing.assert_close(layer(x, w, False), plain.permute(0, 2, 3, 1))


def test_enlarging_and_blurring_in_one_pass_is_both_in_turn() -> None:
    x = torch.randn(2, 4, 5, 3)
    torch.testing.assert_close(enlarged(x, True, 2.0), 2 * blurred(enlarged(x, False, 1.0)))


# Growing, and what is around it


def test_pictures_grow_with_alpha_and_larger_ones_are_enlarged() -> None:
    model = small(growth=Growth(8, 32, 10, 20)).eval()
    ws = model.mapping(torch.randn(2, 11))
    with torch.no_grad():
        for step, side in ((0, 8), (10, 8), (11, 16), (14, 16), (15, 32), (20, 32), (99, 32)):
            model.before_step(step)
            assert model.side == model.growth(step) == side
        model.before_step(12)  # alpha 0.2: the first block at 0.4
        half = model.synthesis(ws, camera(), 16)
        model.before_step(99)
        new = model.synthesis(ws, camera(), 16).rgb
        old = F.interpolate(half.raw, scale_factor=2, mode="bilinear")
        torch.testing.assert_close(half.rgb, 0.6 * old + 0.4 * new)
        model.before_step(0)
        images = model.synthesis(ws, camera(), 32)
    torch.testing.assert_close(images.rgb, F.interpolate(images.raw, scale_factor=4, mode="bilinear"))
    assert model.synthesis(ws, camera(), 6).rgb.shape[-1] == 6


def test_an_identity_has_one_background_and_truncation_shrinks_it() -> None:
    model = small().eval()
    z = torch.randn(1, 11)
    ws = model.mapping(z)
    assert torch.equal(ws[0, -1], F.pad(z[0, 8:], (0, 5)))
    assert torch.equal(model.mapping(z, truncation_psi=0.7)[0, -1], F.pad(0.7 * z[0, 8:], (0, 5)))
    first, again = (model.synthesis(model.prepare(ws), camera(n=1), 8).rgb for _ in range(2))
    assert torch.equal(first, again)
    z[0, 8:] += 1
    assert not torch.equal(model.synthesis(model.mapping(z), camera(n=1), 8).rgb, first)


def test_an_empty_field_shows_the_colour_behind_it_where_rays_miss_the_box_too() -> None:
    box = [[-0.05, -0.05, -0.05], [0.05, 0.05, 0.05]]
    model = small(bounds=Bounds(0.8, 1.2, aabb=box, background=[1.0, 1.0, 1.0]), background=None).eval()
    model.foreground.sigma_out.bias.data.fill_(-100)
    with torch.no_grad():
        images = model.synthesis(model.mapping(torch.randn(2, 8)), camera(), 8)
    assert torch.equal(images.raw, torch.ones_like(images.raw)) and not images.opacity.any()
    model.foreground.sigma_out.bias.data.fill_(1000)
    with torch.no_grad():
        images = model.synthesis(model.mapping(torch.randn(2, 8)), camera(), 8)
    corner, centre = images.opacity[:, 0, 0], images.opacity[:, 4, 4]
    assert not corner.any() and (centre > 0.99).all()  # the box fills half of the picture
    assert ((images.depth[:, 4, 4] - 0.95).abs() < 0.02).all()  # its front


# Training


@pytest.mark.parametrize("full", [True, False])
def test_the_nerf_path_is_zero_where_the_upsampler_is_the_identity_of_pixels(full: bool) -> None:
    """With a picture that was itself drawn pixel by pixel along the path, there is nothing to punish."""
    torch.manual_seed(0)
    model = randomised(small(growth=16, path_full=full)).eval()
    with torch.no_grad():
        ready = model.prepare(model.mapping(torch.randn(2, 11)))
        images = model.synthesis(ready, camera(), 16)
        rays = model._rays(camera(), full_grid(16, 16), 16)
        if full:
            shown, weights = model._every_sample(ready, rays)
        else:
            shown, weights = model._render(ready, rays)[0][:, :, None], torch.ones(2, 256, 1)
        direct = model._upsample(ready, shown[..., 3:], shown[..., :3].permute(0, 3, 1, 2), 16, up=False)
        direct = (direct * weights[:, None]).sum(-1).unflatten(-1, (16, 16))
        same = stylenerf.Images(direct, images.raw, images.depth, images.opacity)
        assert model.regularizers(ready, camera(), same, 0)["reg_path"].item() == pytest.approx(0, abs=1e-8)
        off = stylenerf.Images(direct + 0.5, images.raw, images.depth, images.opacity)
        loss = model.regularizers(ready, camera(), off, 0)["reg_path"].item()
    assert loss == pytest.approx(2.0 * 3 * 0.25, rel=1e-4)  # weight · channels · difference²


def test_the_lattice_is_even_and_inside() -> None:
    pixels = lattice(50, 32, 8, torch.device("cpu")).view(50, 8, 8, 2)
    assert pixels.min() == 0 and pixels.max() == 31
    assert (pixels[:, :, :, 0].diff(dim=2) == 4).all() and (pixels[..., 1].diff(dim=1) == 4).all()
    assert len(pixels[:, 0, 0].unique(dim=0)) > 8  # of 16 displacements


@pytest.mark.parametrize("mode", ["nn_cat", "pixelshuffle"])
def test_every_parameter_learns_from_picture_path_and_path_length(mode: str) -> None:
    torch.manual_seed(0)
    model = small(growth=16, upsampling=mode).train()
    ws = model.mapping(torch.randn(2, 11))
    ready = model.prepare(ws)
    images = model.synthesis(ready, camera(), 16)
    regularizers = model.regularizers(ready, camera(), images, 0)
    (images.rgb.square().mean() + regularizers["reg_path"]).backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
    assert not idle
    model.zero_grad()
    ws = model.mapping(torch.randn(2, 11))
    PathLength(weight=2, every=4)(model.synthesis(ws, camera(), 16).rgb, ws).backward()
    idle = [n for n, p in model.named_parameters() if n.startswith(("foreground", "blocks")) and n.endswith("weight")
            and not (p.grad is not None and p.grad.isfinite().all() and p.grad.any())]
    assert not idle


def test_second_derivatives_by_ws_are_those_of_differences() -> None:
    """In float64, without noise: the gradient of ‖∂picture/∂ws‖² along a direction, against a central difference."""
    torch.manual_seed(1)
    model = randomised(small(growth=16, samples_per_ray=4, fine_samples=2)).double().eval()
    ws = model.mapping(torch.randn(1, 11).double()).detach()
    direction = torch.randn_like(ws)
    noise = torch.randn(1, 3, 16, 16).double()

    def length(at: torch.Tensor, create: bool) -> torch.Tensor:
        rgb = model.synthesis(at, camera(n=1), 16).rgb
        return torch.autograd.grad((rgb * noise).sum(), at, create_graph=create)[0].square().sum()

    at = ws.clone().requires_grad_()
    analytic = (torch.autograd.grad(length(at, True), at)[0] * direction).sum()
    h = 1e-6
    plus, minus = (length((ws + s * h * direction).requires_grad_(), False) for s in (1, -1))
    assert analytic.item() == pytest.approx(((plus - minus) / (2 * h)).item(), rel=1e-3)


def test_running_magnitudes_follow_the_input_in_training_alone() -> None:
    layer = stylenerf.StyledConv(4, 4, w_dim=4, decay=0.9)
    x, w = 3 * torch.ones(1, 5, 5, 4), torch.randn(1, 4)
    layer.eval().matrix(w, x)
    assert layer.w_avg.item() == 1
    layer.train().matrix(w, x)
    assert layer.w_avg.item() == pytest.approx(0.9 + 0.1 * 9)


def test_cost_counts_both_fields_per_sample_and_the_rest_once() -> None:
    cost = small().eval().cost(32)
    assert (cost.rays, cost.samples_per_ray) == (64, 4 + 4 + 3)
    foreground = 2 * (12 * 8 + 2 * 8 * 8 + 8)
    assert cost.flops_per_sample > 8 / 11 * foreground
    assert cost.flops_fixed > small().eval().cost(8).flops_fixed > 0


def test_what_cannot_be_drawn_is_refused() -> None:
    model = small()
    with pytest.raises(ValueError, match="not 24"):
        model.synthesis(model.mapping(torch.randn(2, 11)), camera(), 24)
    with pytest.raises(ValueError, match="do not double"):
        small(growth=Growth(16, 32, 0, 10))
    with pytest.raises(ValueError, match="nn_cat"):
        small(upsampling="bicubic")
    judge = StyleNeRFDiscriminator(resolution=16, channel_base=64, channel_max=8, group=2, clamp=None,
                                   camera_conditioning=True, mapping_depth=2)
    assert judge(torch.randn(2, 3, 16, 16), camera=camera()).logit.shape == (2,)
    with pytest.raises(ValueError, match="camera_conditioning"):
        judge(torch.randn(2, 3, 16, 16))
    with pytest.raises(ValueError, match="not 12"):
        judge(torch.randn(2, 3, 12, 12), camera=camera())
