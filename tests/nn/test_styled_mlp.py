"""The styled network in blocks against its equations: values, gradients, second derivatives, memory of nothing."""

import pytest
import torch

from gan3d.nn import styled_mlp as module
from gan3d.nn.styled_mlp import StyledWeights, styled_mlp, styled_mlp_plain


def encode(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, torch.sin(3 * x)], -1)


def network(images: int = 2, width: int = 5, layers: int = 3) -> StyledWeights:
    torch.manual_seed(0)
    sizes = [6, *[width] * layers]

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    return StyledWeights(tuple(leaf(images, o, i) for i, o in zip(sizes, sizes[1:], strict=False)),
                         tuple(leaf(o) for o in sizes[1:]), leaf(images, 1, width), leaf(1))


def points(images: int = 2, count: int = 23) -> torch.Tensor:
    return torch.randn(images, count, 3, dtype=torch.float64)


@pytest.fixture(params=[8, 1000], ids=["many blocks", "one block"], autouse=True)
def block(request, monkeypatch) -> None:
    monkeypatch.setattr(module, "block_rows", lambda width, like: request.param)


def test_values_and_gradients_are_those_of_the_equations() -> None:
    weights, x = network(), points()
    flat = [*weights.trunk, *weights.biases, weights.density, weights.density_bias]
    fast, plain = styled_mlp(x, weights, encode), styled_mlp_plain(encode(x), weights)
    pulls = torch.randn_like(plain[0]), torch.randn_like(plain[1])
    pulls[0][:, ::2], pulls[1][:, ::2] = 0, 0  # points without a gradient are not computed again
    for mine, theirs in zip(fast, plain, strict=True):
        torch.testing.assert_close(mine, theirs)
    found, expected = (torch.autograd.grad(outputs, flat, pulls) for outputs in (fast, plain))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_second_derivatives_and_those_by_points_pass() -> None:
    weights, x = network(width=3, layers=2), points(count=4)
    flat = (*weights.trunk, *weights.biases, weights.density, weights.density_bias)

    def run(*flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return styled_mlp(x, StyledWeights(flat[:2], flat[2:4], *flat[4:]), encode)

    assert torch.autograd.gradgradcheck(run, flat)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(styled_mlp(x, weights, encode)[0].sum(), x)
    (expected,) = torch.autograd.grad(styled_mlp_plain(encode(x), weights)[0].sum(), x)
    torch.testing.assert_close(gradient, expected)


def test_no_points_have_no_gradient() -> None:
    weights, x = network(), points()
    density, hidden = styled_mlp(x, weights, encode)
    (0 * density.sum() + 0 * hidden.sum()).backward()
    assert weights.trunk[0].grad is not None and not weights.trunk[0].grad.any()
