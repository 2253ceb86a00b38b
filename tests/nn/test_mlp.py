import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gan3d.nn import mlp, parallel
from gan3d.nn.encodings import positional_encoding
from gan3d.nn.mlp import RadianceWeights, radiance_mlp, radiance_mlp_plain


def encode(x):
    return positional_encoding(x, 1)


def fast(points, ray_bias, w):
    return radiance_mlp(points, ray_bias, w, encode)


def plain(points, ray_bias, w):
    return radiance_mlp_plain(encode(points), ray_bias, w)


def weights(images=2, inputs=9, width=6, depth=4, branch=4, skip_to=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).div(max(1, shape[-1]) ** 0.5).requires_grad_()

    return RadianceWeights(
        trunk=tuple(leaf(width, inputs if layer == 0 else width) for layer in range(depth)),
        biases=tuple(leaf(images, width) for _ in range(depth)),
        skip=None if skip_to < 0 else leaf(width, inputs), skip_to=skip_to,
        density=leaf(1, width), density_bias=leaf(1), branch=leaf(branch, width), colour=leaf(3, branch),
        colour_bias=leaf(3))


def points(images=2, rays=3, samples=5, branch=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(images, rays * samples, 3, generator=generator, dtype=dtype),
            torch.randn(images, rays, branch, generator=generator, dtype=dtype).requires_grad_())


def leaves(w: RadianceWeights):
    return [t for t in mlp._flatten(w) if t is not None]


def gradients(function, x, ray_bias, w, seen):
    """Of a loss that looks at the points marked in `seen [b p]` only, as a ReLU density does."""
    density, colour = function(x, ray_bias, w)
    loss = (density.sin() * seen).sum() + (colour.square() * seen[..., None]).sum()
    return torch.autograd.grad(loss, [ray_bias, *leaves(w)])


@pytest.fixture(autouse=True, params=[1, 3])
def small_blocks(monkeypatch, request):
    """Blocks of four points, which do not divide the points; on one thread and on three."""
    monkeypatch.setitem(parallel.BLOCK_BYTES, "cpu", 4 * 6 * 8)
    monkeypatch.setattr(parallel, "THREADS", request.param)


@pytest.mark.smoke
@pytest.mark.parametrize("skip_to", [2, -1])
def test_fast_mlp_gives_the_plain_values_and_gradients(skip_to):
    x, ray_bias = points()
    w = weights(skip_to=skip_to)
    torch.testing.assert_close(fast(x, ray_bias, w), plain(x, ray_bias, w))
    for share in (1.0, 0.3, 0.0):  # every point active, few, none
        seen = (torch.rand(2, 15, generator=torch.Generator().manual_seed(2)) < share).double()
        torch.testing.assert_close(gradients(fast, x, ray_bias, w, seen), gradients(plain, x, ray_bias, w, seen))


def test_fast_mlp_gives_the_plain_values_without_gradients():
    x, ray_bias = points()
    with torch.no_grad():
        w = weights()
        torch.testing.assert_close(fast(x, ray_bias, w), plain(x, ray_bias, w))


def test_fast_mlp_passes_gradcheck_and_gradgradcheck():
    x, ray_bias = points(rays=2, samples=3)
    w = weights()

    def run(ray_bias, *flat):
        return fast(x, ray_bias, mlp._unflatten(flat, 4, 2))

    assert torch.autograd.gradcheck(run, (ray_bias, *mlp._flatten(w)))
    assert torch.autograd.gradgradcheck(run, (ray_bias, *mlp._flatten(w)))


def test_gradient_for_the_points_can_be_differentiated_again():
    x, ray_bias = points(rays=2, samples=3)
    x.requires_grad_()
    w = weights()

    def second_order(function):
        density, _ = function(x, ray_bias, w)
        (normal,) = torch.autograd.grad(density.sum(), x, create_graph=True)
        return torch.autograd.grad(normal.square().sum(), w.trunk)

    for a, b in zip(second_order(fast), second_order(plain), strict=True):
        torch.testing.assert_close(a, b)
        assert a.abs().sum() > 0


def test_memory_between_forward_and_backward_does_not_grow_with_the_network():
    x, ray_bias = points(samples=50)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        w = weights(depth=12)
        fast(x, ray_bias, w)
    assert sum(t.numel() for t in kept) <= x.numel() + ray_bias.numel() + sum(t.numel() for t in leaves(w))


def test_backward_asks_only_for_points_with_a_gradient():
    x, ray_bias = points(rays=30)
    w = weights()

    def flops(share):
        seen = torch.zeros(2, 150, dtype=torch.float64)
        seen[:, : int(150 * share)] = 1
        density, colour = fast(x, ray_bias, w)
        loss = (density * seen).sum() + (colour * seen[..., None]).sum()
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        return counter.get_total_flops()

    assert flops(0.0) == 0
    assert flops(0.2) == pytest.approx(0.2 * flops(1.0), rel=0.01)


def test_autocast_changes_nothing():
    x, ray_bias = points(dtype=torch.float32)
    w = weights(dtype=torch.float32)
    full = fast(x, ray_bias, w)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = w._replace(branch=w.branch @ torch.eye(6))  # as a product under autocast is: bfloat16
        assert half.branch.dtype == torch.bfloat16
        density, colour = fast(x, ray_bias, half)
    torch.testing.assert_close(density, full[0])
    torch.testing.assert_close(colour, full[1], atol=0.05, rtol=0)  # one matrix was rounded to bfloat16
    (density.sum() + colour.sum()).backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves(w))
