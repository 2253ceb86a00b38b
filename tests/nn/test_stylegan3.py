"""StyleGAN3's critically sampled layers: the filter's numbers, and properties that filters and demodulation have."""

import pytest
import torch

from gan3d.nn.stylegan3 import Layer, Refinement, filtered_leaky_relu, lowpass


def test_the_filter_is_the_released_one():
    half = torch.tensor([0.038117, 0.046588, -0.059898, -0.083858, 0.139763, 0.419288])  # six digits are given
    assert torch.allclose(lowpass(), torch.cat([half, half.flip(0)]), atol=1e-6)


def zero_inserted(x: torch.Tensor, clamp: float | None) -> torch.Tensor:
    """What `filtered_leaky_relu` is, step by step: zeros, padding, a 2D filter, the activation, every second pixel."""
    b, c, h, w = x.shape
    up = x.new_zeros(b, c, 2 * h, 2 * w)
    up[:, :, ::2, ::2] = x
    taps = lowpass().double()
    square = (taps[:, None] * taps).expand(c, 1, 12, 12)
    y = torch.nn.functional.conv2d(torch.nn.functional.pad(up, (9, 8, 9, 8)), 4 * square, groups=c)
    y = torch.nn.functional.leaky_relu(y, 0.2) * 2**0.5
    return torch.nn.functional.conv2d(y if clamp is None else y.clamp(-clamp, clamp), square, groups=c)[..., ::2, ::2]


@pytest.mark.parametrize("shape, clamp", [((2, 3, 10, 10), None), ((1, 2, 7, 9), 0.5)])
def test_filtered_leaky_relu_is_its_definition(shape, clamp):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = filtered_leaky_relu(x, clamp)
    assert y.shape == (*shape[:2], shape[2] - 2, shape[3] - 2)
    torch.testing.assert_close(y, zero_inserted(x, clamp), atol=1e-7, rtol=0)  # the filter is made in float32


def test_a_layer_keeps_the_picture_in_its_place():
    """The mean of what a bright pixel leaves behind lies on it: up- and downsampling shift nothing."""
    layer = Layer(1, 1, w_dim=2, last=False, clamp=None)
    with torch.no_grad():
        layer.weight.zero_()[0, 0, 1, 1] = 1
        picture = torch.zeros(1, 1, 33, 33)
        picture[..., 16, 16] = 1
        y = layer(picture, torch.zeros(1, 2))[0, 0]
    torch.testing.assert_close(y, y.flip(0), atol=1e-6, rtol=0)
    torch.testing.assert_close(y, y.T, atol=1e-6, rtol=0)
    assert y[16, 16] == y.max()


def test_styles_and_weights_have_no_scale_of_their_own():
    """Demodulation undoes it: why the release's normalisations are not needed."""
    torch.manual_seed(0)
    layer, w = Layer(3, 4, w_dim=5, last=False).double().eval(), torch.randn(2, 5).double()
    x = torch.randn(2, 3, 8, 8).double()
    with torch.no_grad():
        before = layer(x, w)
        for parameter, factor in ((layer.weight, 3.0), (layer.affine.weight, 7.0), (layer.affine.bias, 7.0)):
            parameter.mul_(factor)
        torch.testing.assert_close(layer(x, w), before, atol=1e-8, rtol=1e-8)  # the 1e-8 in it aside


def test_the_magnitude_follows_pictures_of_training_without_gradients():
    layer, picture = Layer(1, 1, w_dim=2, last=True, decay=0.75), torch.full((1, 1, 4, 4), 3.0)
    layer(picture, torch.zeros(1, 2))
    assert layer.magnitude_ema == 1
    with torch.no_grad():
        layer(picture, torch.zeros(1, 2))
        assert layer.magnitude_ema == 3  # ¾·1 + ¼·9
        layer.eval()(picture, torch.zeros(1, 2))
    assert layer.magnitude_ema == 3


@pytest.mark.parametrize("depth", [1, 3])
def test_a_refinement_takes_pictures_of_any_side(depth):
    torch.manual_seed(0)
    network = Refinement(w_dim=4, width=6, depth=depth)
    x = torch.randn(2, 3, 9, 12, requires_grad=True)
    y = network(x, torch.randn(2, 4))
    assert y.shape == x.shape
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in [x, *network.parameters()])
