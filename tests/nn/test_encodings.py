import math

import pytest
import torch

from gan3d.nn.encodings import encoding_width, positional_encoding


@pytest.mark.smoke
def test_encoding_is_the_point_then_sine_and_cosine_of_each_octave():
    x = torch.tensor([[0.3, -1.2, 0.7]], dtype=torch.float64)
    expected = [0.3, -1.2, 0.7]
    for octave in range(3):
        expected += [math.sin(2**octave * c) for c in (0.3, -1.2, 0.7)]
        expected += [math.cos(2**octave * c) for c in (0.3, -1.2, 0.7)]
    torch.testing.assert_close(positional_encoding(x, 3), torch.tensor([expected], dtype=torch.float64))


@pytest.mark.parametrize("octaves, width", [(10, 63), (4, 27), (0, 3)])  # NeRF's two widths, and no encoding at all
def test_encoding_width_is_what_the_encoding_has(octaves, width):
    assert encoding_width(octaves) == width
    assert positional_encoding(torch.zeros(2, 5, 3), octaves).shape == (2, 5, width)


def test_encoding_can_be_differentiated_twice():
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: positional_encoding(x, 3), x)
    assert torch.autograd.gradgradcheck(lambda x: positional_encoding(x, 3), x)
