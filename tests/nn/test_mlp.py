import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gan3d.nn import mlp, parallel
from gan3d.nn.encodings import positional_encoding
from gan3d.nn.mlp import Packing, RadianceWeights, packed_features, radiance_mlp, radiance_mlp_plain


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


def packed(w, scenes=(7, 0, 4), rays=3):
    """Points of three images, of which one has none, each point on a ray of its own choice."""
    generator = torch.Generator().manual_seed(3)
    count = sum(scenes)
    owner = torch.arange(len(scenes)).repeat_interleave(torch.tensor(scenes))
    packing = Packing(scenes, owner * rays + torch.randint(0, rays, (count,), generator=generator))
    x, noise, ray_bias = (torch.randn(*shape, generator=generator, dtype=torch.float64)
                          for shape in ((count, 3), (count,), (len(scenes) * rays, len(w.branch))))
    return x, ray_bias.requires_grad_(), noise, packing, owner


@pytest.mark.smoke
def test_packed_features_are_those_of_each_point_alone_where_something_is():
    w = weights(images=3, branch=3)._replace(colour=None, colour_bias=None)
    x, ray_bias, noise, packing, owner = packed(w)
    density, features = packed_features(x, ray_bias, noise, packing, w, encode)
    whole = w._replace(colour=torch.eye(3).double(), colour_bias=torch.zeros(3).double())
    for k in range(len(x)):
        mine = whole._replace(biases=tuple(bias[owner[k]][None] for bias in w.biases))
        alone, branch = plain(x[None, k : k + 1], ray_bias[packing.ray[k]][None, None], mine)
        torch.testing.assert_close(density[k], alone[0, 0] + noise[k])
        torch.testing.assert_close(features[k], branch[0, 0] * (density[k] > 0))
    assert 0 < (density > 0).sum() < len(x)


def test_gradients_of_packed_features_are_the_plain_ones():
    w = weights(images=3)._replace(colour=None, colour_bias=None)
    x, ray_bias, noise, packing, _ = packed(w)
    found = []
    for points in (x, x.clone().requires_grad_()):  # the second goes the plain way
        density, features = packed_features(points, ray_bias, noise, packing, w, encode)
        loss = (density.relu()[:, None] * features).sin().sum()
        found.append((density, features, *torch.autograd.grad(loss, [ray_bias, *leaves(w)], create_graph=True)))
    torch.testing.assert_close(*found)
    again = [torch.autograd.grad(values[2].square().sum(), w.trunk) for values in found]
    torch.testing.assert_close(*again)


def test_features_are_computed_only_where_something_is():
    w = weights(images=3)._replace(colour=None, colour_bias=None)
    x, ray_bias, noise, packing, _ = packed(w)

    def flops(noise):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            packed_features(x, ray_bias, noise, packing, w, encode)
        return counter.get_total_flops()

    assert flops(noise + 1e9) - flops(noise - 1e9) == 2 * len(x) * 6 * 4  # the branch
    nothing = Packing((0, 0, 0), torch.zeros(0, dtype=torch.long))
    density, features = packed_features(x[:0], ray_bias, noise[:0], nothing, w, encode)
    assert density.shape == (0,) and features.shape == (0, 4)
    assert all(gradient.abs().sum() == 0 for gradient in torch.autograd.grad(features.sum(), [ray_bias, *w.trunk]))
