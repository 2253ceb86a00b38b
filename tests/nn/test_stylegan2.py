"""StyleGAN2's parts against reference numbers of NVIDIA's modules (CPU, float32), closed forms and gradients."""

import pytest
import torch
from filling import fill, inputs
from torch import nn

from gan3d.nn.convolution import downsample, smooth, upsample
from gan3d.nn.stylegan2 import Mapping, StyleGAN2Discriminator, Synthesis, channels_at, minibatch_deviation, resolutions


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.synthesis = Synthesis(w_dim=16, resolution=16, image_channels=3, channel_base=256, channel_max=24)
        self.mapping = Mapping(z_dim=16, c_dim=5, w_dim=16, num_ws=self.synthesis.num_ws, depth=2)


@pytest.fixture
def generator() -> Generator:
    generator = Generator().eval()
    fill(generator)
    return generator


Z, C = inputs([4, 16], 1), inputs([4, 5], 2)


def seen(x: torch.Tensor) -> list[float]:
    flat, n = x.flatten(), x.numel()
    return [x.mean().item(), x.std(correction=0).item(), x.abs().max().item(),
            *(flat[i].item() for i in (0, n // 3, n // 2, n - 1))]


@pytest.mark.parametrize("psi, expected", [
    (1.0, [0.41637, 0.89634, 4.01091, 1.49393, -0.13597, 0.63282, -0.00453]),
    (0.5, [0.20819, 0.44817, 2.00546, 0.74697, -0.06799, 0.31641, -0.00226]),
])
def test_mapping_gives_the_reference_numbers(generator: Generator, psi: float, expected: list[float]) -> None:
    assert seen(generator.mapping(Z, C, psi)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("noise, expected", [
    ("const", [0.07628, 0.91590, 2.86150, -0.95844, -0.01442, 0.09666, -0.00288]),
    ("none", [0.08166, 0.85762, 2.57039, -0.62896, -0.11798, 0.18677, 0.22869]),
])
def test_synthesis_gives_the_reference_numbers(generator: Generator, noise: str, expected: list[float]) -> None:
    image = generator.synthesis(generator.mapping(Z, C), noise)
    assert seen(image) == pytest.approx(expected, abs=1e-4)


def test_one_picture_is_the_picture_it_is_in_a_batch(generator: Generator) -> None:
    ws = generator.mapping(Z, C)
    alone = torch.cat([generator.synthesis(w[None], "const") for w in ws])
    torch.testing.assert_close(alone, generator.synthesis(ws, "const"), atol=1e-5, rtol=0)  # sums in another order


@pytest.mark.parametrize("architecture, c_dim, expected", [
    ("resnet", 5, [0.170873, -0.214585, -0.237087, 0.887716]),
    ("skip", 0, [0.706209, 1.309130, 1.048556, 0.609261]),
])
def test_discriminator_gives_the_reference_numbers(generator: Generator, architecture: str, c_dim: int,
                                                   expected: list[float]) -> None:
    discriminator = StyleGAN2Discriminator(resolution=16, image_channels=3, c_dim=c_dim, channel_base=256,
                                           channel_max=24, architecture=architecture, mapping_depth=2, group=2)
    fill(discriminator)
    logit = discriminator(generator.synthesis(generator.mapping(Z, C), "const"), C)
    assert logit.tolist() == pytest.approx(expected, abs=1e-4)


def test_filters_give_the_reference_numbers() -> None:
    x = inputs([1, 1, 4, 4], 1)
    up = upsample(x)
    assert [up.mean().item(), up.std(correction=0).item(), *up.flatten()[[0, 21, 32, 63]].tolist()] == pytest.approx(
        [0.22670, 0.60849, -0.60276, 0.53179, 0.15723, -0.66451], abs=1e-4)
    assert downsample(x).flatten().tolist() == pytest.approx([0.08664, 0.11391, 0.36098, 0.40038], abs=1e-4)
    filtered = smooth(torch.nn.functional.pad(x, (2, 1, 2, 1)), padding=0)
    assert filtered.flatten()[[0, 5, 8, 15]].tolist() == pytest.approx([-0.09788, 0.08664, 0.07966, 0.40038], abs=1e-4)


@pytest.mark.parametrize("resolution, base, generator, discriminator", [
    (128, 16384, 24_525_213, 23_882_369), (256, 32768, 30_034_338, 28_864_129), (512, 16384, 24_860_935, 24_030_753)])
def test_sizes_are_the_releases(resolution: int, base: int, generator: int, discriminator: int) -> None:
    with torch.device("meta"):
        synthesis = Synthesis(w_dim=512, resolution=resolution, image_channels=3, channel_base=base, channel_max=512)
        mapping = Mapping(z_dim=512, c_dim=0, w_dim=512, num_ws=synthesis.num_ws, depth=8)
        judge = StyleGAN2Discriminator(resolution=resolution, image_channels=3, c_dim=0, channel_base=base,
                                       channel_max=512)
    assert sum(p.numel() for m in (synthesis, mapping) for p in m.parameters()) == generator
    assert sum(p.numel() for p in judge.parameters()) == discriminator


def test_the_mean_of_w_follows_only_training_without_gradients() -> None:
    mapping = Mapping(z_dim=4, c_dim=0, w_dim=4, num_ws=2, depth=1, w_decay=0.9)
    mapping(torch.randn(8, 4))
    assert mapping.w_avg.abs().max() == 0
    with torch.no_grad():
        w = mapping(torch.randn(8, 4))[:, 0]
    torch.testing.assert_close(mapping.w_avg, 0.1 * w.mean(0))


@pytest.mark.parametrize("architecture", ["resnet", "skip"])
def test_second_derivatives_of_the_discriminator(architecture: str) -> None:
    torch.manual_seed(0)
    discriminator = StyleGAN2Discriminator(resolution=8, image_channels=1, c_dim=2, channel_base=16, channel_max=3,
                                           architecture=architecture, mapping_depth=1, group=2).double()
    image = torch.randn(2, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    c = torch.randn(2, 2, dtype=torch.float64)
    torch.autograd.gradgradcheck(lambda x: discriminator(x, c), image)


def test_minibatch_deviation_of_equal_pictures_is_nothing_and_takes_any_batch() -> None:
    x = torch.ones(3, 2, 4, 4)
    assert torch.equal(minibatch_deviation(x, 4)[:, :2], x)
    assert minibatch_deviation(x, 4)[:, 2].abs().max() < 1e-3  # √1e-8
    apart = torch.tensor([0.0, 1.0, 2.0, 1.0])[:, None, None, None].expand(4, 2, 4, 4)
    spread = minibatch_deviation(apart, 2)[:, 2, 0, 0]  # groups {0, 2} and {1, 1}
    assert spread.tolist() == pytest.approx([1.0, 0.0, 1.0, 0.0], abs=2e-4)


def test_sides_that_are_no_powers_of_two_are_refused() -> None:
    assert resolutions(32) == [4, 8, 16, 32] and channels_at(128, 16384, 512) == 128
    with pytest.raises(ValueError, match="power of two"):
        resolutions(48)
