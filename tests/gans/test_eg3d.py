"""EG3D against reference numbers of the released modules (CPU, float32), sizes of the released models, gradients."""

import math

import pytest
import torch
from filling import fill, inputs

from gan3d.cameras import Camera, look_at
from gan3d.gans.eg3d import EG3D, DualDiscriminator, SuperResolution, condition, interval_weights
from gan3d.official.eg3d import official_generator
from gan3d.ramps import Ramp
from gan3d.rays import Bounds
from gan3d.sampling import even_quantiles


def generator(**changes) -> EG3D:
    numbers = dict(bounds=Bounds(2.25, 3.3), box=1, z_dim=512, w_dim=512, mapping_depth=2, plane_resolution=256,
                   plane_channels=32, channel_base=512, channel_max=8, decoder_width=64, samples_per_ray=6,
                   fine_samples=6, render_resolution=Ramp(8, 8, 0), camera_conditioning=True, swap=Ramp(0, 0, 0),
                   density_weight=0.25, density_every=4, density_points=10, density_distance=0.008,
                   plane_axes="released")
    upsampler = SuperResolution(input_channels=32, input_resolution=64, w_dim=512, channels=(128, 64), first_up=False,
                                clamp=256)
    return EG3D(**({**numbers, "superresolution": upsampler} | changes))


def small(**changes) -> EG3D:
    return generator(**(dict(z_dim=8, w_dim=8, plane_resolution=8, plane_channels=2, channel_base=16, channel_max=4,
                             decoder_width=4, superresolution=None, plane_axes="mended") | changes))


@pytest.fixture(scope="module")
def camera() -> Camera:
    """Yaw π/2 + 0.4, pitch π/2 − 0.2 of the released sampler, at 2.7 from the origin, looking at (0, 0, 0.2)."""
    azimuth, height = math.pi / 2 + 0.4, math.acos(1 - 2 * (math.pi / 2 - 0.2) / math.pi)
    eye = 2.7 * torch.tensor([math.sin(height) * math.cos(math.pi - azimuth), math.cos(height),
                              math.sin(height) * math.sin(math.pi - azimuth)])
    pose = look_at(eye, torch.tensor([0.0, 0.0, 0.2]), "y")
    focal = torch.tensor([[4.2647, 0, 0.5], [0, 4.2647, 0.5], [0, 0, 1]])
    return Camera(pose.expand(2, 4, 4), focal.expand(2, 3, 3))


def seen(x: torch.Tensor) -> list[float]:
    flat, n = x.flatten(), x.numel()
    return [x.mean().item(), x.std(correction=0).item(), *(flat[i].item() for i in (0, n // 3, n // 2, n - 1))]


@pytest.fixture(scope="module")
def shown(camera: Camera):
    model = generator().eval()
    fill(model)
    with torch.no_grad():
        ws = model.mapping(inputs([2, 512], 1), camera)
        ready = model.prepare(ws)
        return model, ready, model.synthesis(ready, camera, 128)


def test_the_picture_has_the_reference_numbers(shown) -> None:
    _, ready, images = shown
    assert ready.ws.mean().item() == pytest.approx(0.52, abs=1e-4)
    assert seen(ready.planes) == pytest.approx([-0.07964, 1.30887, -0.63232, 0.85012, -0.37095, 0.38507], abs=1e-4)
    assert seen(images.rgb) == pytest.approx([-0.15580, 1.51379, -0.29470, 0.68235, -0.28694, 1.62915], abs=1e-4)
    assert seen(images.raw) == pytest.approx([-0.73764, 0.08622, -0.70926, -0.83352, -0.74401, -0.84553], abs=1e-4)
    depth = seen(images.depth / images.opacity)
    assert [depth[0], depth[1], depth[2], depth[5]] == pytest.approx([2.84107, 0.02397, 2.80087, 2.86034], abs=1e-4)


def test_the_field_has_the_reference_numbers(shown) -> None:
    model, ready, _ = shown
    points = torch.tensor([[0, 0, 0], [0.1, 0.2, 0.3], [-0.4, 0.45, 0.2], [0.6, 0, 0]]).expand(2, 4, 3)[:, :, None]
    with torch.no_grad():
        raw_density, features = model.field(ready)(points, points)
    assert [raw_density.mean().item(), raw_density[0, 0, 0].item(), raw_density[1, 3, 0].item()] == pytest.approx(
        [-0.14678, 0.07250, -0.42901], abs=1e-4)
    assert features.mean().item() == pytest.approx(0.55017, abs=1e-4)


def test_weights_and_importance_samples_are_the_releases() -> None:
    t = torch.linspace(2.25, 3.3, 6)[None, None]
    weights = interval_weights(torch.tensor([[[-2.0, 0, 3, 8, 1, -1]]]), t)
    assert weights.flatten().tolist() == pytest.approx([0.0263, 0.18013, 0.48584, 0.16109, 0.00934], abs=1e-5)
    fine = small(fine_samples=4).eval()._importance(t, weights)
    assert fine.flatten().tolist() == pytest.approx([2.44472, 2.60592, 2.73005, 2.89272], abs=1e-5)
    assert even_quantiles((1,), 4, t).tolist() == [[0.125, 0.375, 0.625, 0.875]]


@pytest.mark.parametrize("input_resolution, channels, first_up, parameters", [
    (128, (256, 128), True, 30_662_136), (128, (128, 64), False, 29_587_512), (64, (128, 64), False, 29_587_512)])
def test_sizes_are_the_releases(input_resolution: int, channels: tuple, first_up: bool, parameters: int) -> None:
    with torch.device("meta"):
        model = generator(channel_base=32768, channel_max=512, superresolution=SuperResolution(
            input_channels=32, input_resolution=input_resolution, w_dim=512, channels=channels, first_up=first_up,
            clamp=256))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_a_prepared_identity_is_seen_from_anywhere_without_its_backbone(camera: Camera) -> None:
    model = small().eval()
    ws = model.mapping(torch.randn(2, 8), camera)
    ready = model.prepare(ws)
    whole = model.synthesis(ws, camera, 8)
    model.backbone.synthesis = None  # type: ignore[assignment]
    assert torch.equal(model.synthesis(ready, camera, 8).rgb, whole.rgb)


def test_a_constant_field_is_a_slab_and_shows_its_colour(camera: Camera) -> None:
    model = small(bounds=Bounds(2.25, 3.3, background=[1.0, 1.0, 1.0])).eval()
    for parameter in model.decoder.parameters():
        torch.nn.init.zeros_(parameter)
    images = model.synthesis(model.mapping(torch.randn(2, 8), camera), camera, 8)
    length = 3.3 - 2.25  # fine samples lie between the first and the last coarse one
    opaque = 1 - math.exp(-math.log1p(math.exp(-1)) * length)
    torch.testing.assert_close(images.opacity, torch.full_like(images.opacity, opaque), atol=1e-5, rtol=0)
    colour = 2 * (opaque * 0.5 + (1 - opaque)) - 1  # sigmoid(0)·1.002 − 0.001 = 0.5 before white
    torch.testing.assert_close(images.rgb, torch.full_like(images.rgb, colour), atol=1e-5, rtol=0)


def test_every_parameter_learns_and_the_camera_may_be_swapped(camera: Camera) -> None:
    torch.manual_seed(0)
    model = small(swap=Ramp(1.0, 0.5, 10)).train()
    ws = model.mapping(torch.randn(2, 8), camera)
    ready = model.prepare(ws)
    images = model.synthesis(ready, camera, 8)
    assert model.regularizers(ready, camera, images, 1) == {}
    loss = images.rgb.square().mean() + sum(model.regularizers(ready, camera, images, 4).values())
    loss.backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not idle


def test_cost_counts_the_decoder_per_sample_and_the_rest_once() -> None:
    cost = small().eval().cost(8)
    assert (cost.rays, cost.samples_per_ray, cost.flops_per_sample) == (64, 12, 2 * (2 * 4 + 4 * 4))
    with_upsampler = generator().eval().cost(128)
    assert with_upsampler.rays == 64 and with_upsampler.flops_fixed > 1e9


def test_rendering_resolution_follows_its_ramp() -> None:
    model = small(render_resolution=Ramp(8, 16, 100))
    model.before_step(56)
    assert model.render_resolution == 12  # rounded from 12.48
    model.before_step(1000)
    assert model.render_resolution == 16


def test_the_dual_discriminator_has_the_reference_numbers(shown, camera: Camera) -> None:
    judge = DualDiscriminator(resolution=128, channel_base=1024, channel_max=16, mapping_depth=2, group=2, clamp=256)
    fill(judge)
    _, _, images = shown
    verdict = judge(images.rgb, camera=camera, raw=images.raw)
    assert verdict.logit.tolist() == pytest.approx([-0.45275, 0.00210], abs=1e-4)
    with pytest.raises(ValueError, match="camera of every photograph"):
        judge(images.rgb, raw=images.raw)
    with pytest.raises(ValueError, match="model.dual=true"):
        judge(images.rgb, camera=camera)


def test_conditions_are_the_releases_twenty_five_numbers(camera: Camera) -> None:
    c = condition(camera)
    assert c.shape == (2, 25) and c[0, 3].item() == pytest.approx(1.0429, abs=1e-4)
    assert c[0, 16:].tolist() == pytest.approx([4.2647, 0, 0.5, 0, 4.2647, 0.5, 0, 0, 1])


def test_what_cannot_be_drawn_is_refused(camera: Camera) -> None:
    with pytest.raises(ValueError, match="128² pictures, not 64²"):
        generator().synthesis(torch.zeros(2, 14, 512), camera, 64)
    with pytest.raises(ValueError, match="plane_axes"):
        small(plane_axes="xyz")
    filters = {"b4.resample_filter": torch.ones(1), "dataset_label_std": torch.ones(1)}
    assert list(official_generator(filters)) == ["progress"]  # ours alone: the steps trained
