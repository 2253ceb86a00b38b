"""Progressive discriminators against reference numbers of the released pi-GAN."""

import math

import pytest
import torch

from gan3d.nn.convolution import convolve
from gan3d.nn.discriminators import CoordConv, ProgressiveDiscriminator
from gan3d.official.pigan import official_discriminator

FACES = [32, 64, 128, 256, 400, 400, 400, 400]  # at 256, 128, … 2
CARS = [16, *FACES]
VARIANTS = {  # released class → ours, tensors, logits at fade 0.3 and 1
    "celeba": (dict(channels=FACES, coord=True, down="stride", latent_dim=256, pose=True), 13_291_075,
               [(-0.0221876, -0.0416067), (-0.0644855, -0.0894665)]),
    "carla": (dict(channels=CARS, coord=True, down="pool", latent_dim=256, pose=True), 12_825_523,
              [(0.0094299, 0.0097877), (-0.0153856, -0.0172758)]),
    "cats": (dict(channels=FACES, coord=False, down="stride", latent_dim=0, pose=False), 12_805_489 - 1200,
             [(-0.0213785, -0.0439128), (-0.0691112, -0.1133383)]),
}


def pattern(n: int, j: int) -> torch.Tensor:
    """A reproducible fill: 2·frac(43758.5453·sin(12.9898·i + 78.233·j)) − 1."""
    wave = 43758.5453 * torch.sin(12.9898 * torch.arange(n, dtype=torch.float64) + 78.233 * j)
    return 2 * (wave - wave.floor()) - 1


def released_weights(variant: str, discriminator) -> dict[str, torch.Tensor]:
    """The released discriminator's tensors in their order, filled by the pattern."""
    state, shapes = discriminator.state_dict(), {}
    conv = "" if variant == "cats" else ".conv"
    for i in range(len(discriminator.blocks)):
        for theirs, mine in ((f"network.0{conv}", "first"), (f"network.2{conv}", "second"), ("proj", "skip")):
            for kind in ("weight", "bias"):
                if f"blocks.{i}.{mine}.{kind}" in state:
                    shapes[f"layers.{i}.{theirs}.{kind}"] = state[f"blocks.{i}.{mine}.{kind}"].shape
    for i in range(len(discriminator.adapters)):
        for kind in ("weight", "bias"):
            shapes[f"fromRGB.{i}.model.0.{kind}"] = state[f"adapters.{i}.{kind}"].shape
    shapes |= {f"final_layer.{kind}": state[f"final.{kind}"].shape for kind in ("weight", "bias")}
    if variant == "cats":
        shapes |= {"pose_layer.weight": (400, 2), "pose_layer.bias": (400,)}
    return {
        name: pattern(math.prod(shape), j).view(*shape)
        * (0.05 if name.endswith("bias") else 1.5 / (math.prod(shape) / shape[0]) ** 0.5)
        for j, (name, shape) in enumerate(shapes.items())
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_verdicts_are_the_released_ones(variant):
    arguments, parameters, expected = VARIANTS[variant]
    discriminator = ProgressiveDiscriminator(**arguments)
    assert sum(p.numel() for p in discriminator.parameters()) == parameters
    discriminator.load_state_dict(official_discriminator(released_weights(variant, discriminator)))
    images = pattern(2 * 3 * 64 * 64, 101).view(2, 3, 64, 64)
    for dtype, tolerance in ((torch.float32, 3e-6), (torch.float64, 1e-7)):  # sums of thousands; seven digits given
        discriminator, images = discriminator.to(dtype), images.to(dtype)
        if dtype == torch.float64:  # the float32 copy was rounded: load again
            discriminator.load_state_dict(official_discriminator(released_weights(variant, discriminator)))
            images = pattern(2 * 3 * 64 * 64, 101).view(2, 3, 64, 64)
        with torch.no_grad():
            verdicts = [discriminator(images, fade) for fade in (0.3, 1.0)]
        for verdict, logits in zip(verdicts, expected, strict=True):
            assert torch.allclose(verdict.logit.double(), torch.tensor(logits).double(), atol=tolerance)
    if variant == "celeba":
        pose = torch.tensor([(0.0038219, -0.0098574), (-0.0572287, 0.0030513)]).double()
        assert torch.allclose(verdicts[1].pose, pose, atol=1e-7)
        assert verdicts[1].latent.shape == (2, 256)
    if variant == "cats":
        assert verdicts[1].pose is None and verdicts[1].latent is None


def tiny(down="stride", coord=True):
    torch.manual_seed(0)
    return ProgressiveDiscriminator(channels=[4, 6, 6, 8], coord=coord, down=down, latent_dim=3, pose=True)


@pytest.mark.smoke
def test_coordinates_vary_down_the_rows_first():
    conv = CoordConv(1, 1, coord=True)
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[0, 1, 1, 1], conv.weight[0, 2, 1, 1] = 10, 1
        conv.bias.zero_()
        out = conv(torch.zeros(1, 1, 3, 2))[0, 0]
    assert torch.equal(out, torch.tensor([[-11.0, -9.0], [-1.0, 1.0], [9.0, 11.0]]))


@pytest.mark.smoke
@pytest.mark.parametrize("down", ["stride", "pool"])
def test_r1_gradients_reach_every_used_parameter(down):
    discriminator = tiny(down)
    images = torch.randn(3, 3, 16, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(discriminator(images, 0.5).logit.sum(), images, create_graph=True)
    gradient.square().sum().backward()
    for name, parameter in discriminator.named_parameters():
        used = name.endswith("weight") and name not in ("adapters.2.weight", "adapters.3.weight")
        assert not used or parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("down", ["stride", "pool"])
@pytest.mark.parametrize("coord", [True, False])
def test_r1_passes_gradgradcheck(down, coord):
    torch.manual_seed(0)
    discriminator = ProgressiveDiscriminator(channels=[2, 3, 3], coord=coord, down=down, latent_dim=0, pose=False)
    discriminator.double()
    images = torch.randn(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: discriminator(x, 0.4).logit, images)


@pytest.mark.parametrize("stride, size", [(1, 5), (2, 6)])
def test_convolution_and_its_derivatives_are_pytorch_s(stride, size):
    torch.manual_seed(0)
    shapes = [(2, 3, size, size), (4, 3, 3, 3), (4,)]
    arguments = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    functions = [lambda *a: convolve(*a, stride, 1), lambda *a: torch.nn.functional.conv2d(*a, stride, 1)]
    results = []
    for function in functions:
        y = function(*arguments)
        first = torch.autograd.grad(y.sin().sum(), arguments, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), arguments)
        results.append([y, *first, *second])
    for mine, theirs in zip(*results, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-10)
    assert torch.autograd.gradgradcheck(functions[0], arguments)


def test_convolution_without_gradients_to_weights_gives_the_input_its_own():
    torch.manual_seed(0)
    discriminator = tiny().requires_grad_(False)
    images = torch.randn(2, 3, 16, 16, requires_grad=True)
    (found,) = torch.autograd.grad(discriminator(images, 0.5).logit.sum(), images)
    (expected,) = torch.autograd.grad(discriminator.requires_grad_(True)(images, 0.5).logit.sum(), images)
    assert torch.equal(found, expected) and found.abs().sum() > 0


def test_autocast_judges_in_half_precision_and_still_trains():
    discriminator = tiny()
    images = torch.randn(2, 3, 16, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logit = discriminator(images).logit
    assert logit.dtype == torch.bfloat16
    assert torch.allclose(logit.float(), discriminator(images).logit, atol=0.05)  # bfloat16 has 8 bits
    (gradient,) = torch.autograd.grad(logit.sum(), images, create_graph=True)
    gradient.square().sum().backward()
    assert gradient.dtype == torch.float32 and discriminator.blocks[0].first.weight.grad.abs().sum() > 0


def test_fade_leads_from_the_smaller_resolution_to_the_larger():
    discriminator = tiny()
    images = torch.randn(2, 3, 16, 16)
    at_zero = discriminator(images, 0.0).logit
    assert torch.allclose(at_zero, discriminator(images[..., ::2, ::2], 1.0).logit, atol=1e-6)
    middle, one = discriminator(images, 0.5).logit, discriminator(images).logit
    assert not torch.allclose(middle, one) and not torch.allclose(middle, at_zero)


def test_smallest_resolution_has_nothing_to_fade_from():
    discriminator = tiny()
    images = torch.randn(2, 3, 4, 4)
    assert torch.equal(discriminator(images, 0.0).logit, discriminator(images, 1.0).logit)


def test_foreign_sizes_and_tables_are_refused():
    with pytest.raises(ValueError, match="12×12"):
        tiny()(torch.zeros(1, 3, 12, 12))
    with pytest.raises(ValueError, match="16×8"):
        tiny()(torch.zeros(1, 3, 16, 8))
    with pytest.raises(ValueError, match="channels"):
        ProgressiveDiscriminator(channels=[4], coord=True, down="pool", latent_dim=0, pose=False)
    with pytest.raises((ValueError, TypeError), match="down"):
        ProgressiveDiscriminator(channels=[4, 4], coord=True, down="max", latent_dim=0, pose=False)  # type: ignore[arg-type]


def test_foreign_tensors_are_refused():
    with pytest.raises(KeyError):
        official_discriminator({"mapping.weight": torch.zeros(1)})
