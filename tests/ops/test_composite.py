"""Volume rendering: closed forms, the reference's values and derivatives, ragged rays, early termination."""

import inspect
import math

import pytest
import torch

from gan3d import ops
from gan3d.ops import composite, composite_packed, reference

compiled = pytest.mark.skipif(ops.backend() == "reference", reason="no compiled ops: no C++ compiler")


def rays(n: int, s: int, c: int, dtype=torch.float64, seed: int = 0, background: bool = True) -> tuple:
    rng = torch.Generator().manual_seed(seed)
    density = torch.rand(n, s, generator=rng, dtype=dtype) * 6
    density[::3] = 0  # whole rays through nothing
    delta = torch.rand(n, s, generator=rng, dtype=dtype) / max(s, 1)
    features = torch.randn(n, s, c, generator=rng, dtype=dtype)
    t = torch.rand(n, s, generator=rng, dtype=dtype).sort(-1).values
    return density, delta, features, t, torch.rand(n, c, generator=rng, dtype=dtype) if background else None


def packed(counts: list[int], c: int, dtype=torch.float64, seed: int = 0) -> tuple:
    rng = torch.Generator().manual_seed(seed)
    n = sum(counts)
    offsets = torch.tensor([0, *counts]).cumsum(0)
    return (torch.rand(n, generator=rng, dtype=dtype) * 6, torch.rand(n, generator=rng, dtype=dtype) / 4,
            torch.randn(n, c, generator=rng, dtype=dtype), torch.rand(n, generator=rng, dtype=dtype), offsets,
            torch.rand(len(counts), c, generator=rng, dtype=dtype))


def test_a_constant_slab_is_one_minus_exp() -> None:
    density, delta = torch.full((1, 100), 3.0, dtype=torch.float64), torch.full((1, 100), 0.01, dtype=torch.float64)
    colour = torch.tensor([0.2, 0.7, 1.0], dtype=torch.float64)
    seen = composite(density, delta, colour.expand(1, 100, 3), torch.zeros_like(density), torch.ones(3))
    opaque = 1 - math.exp(-3.0)
    torch.testing.assert_close(seen.opacity, torch.tensor([opaque], dtype=torch.float64), atol=1e-14, rtol=0)
    torch.testing.assert_close(seen.features[0], opaque * colour + 1 - opaque, atol=1e-14, rtol=0)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.float64, 1e-13)])  # s roundings of 1
@pytest.mark.parametrize("threshold", [0.0, 0.3])
@pytest.mark.parametrize("n, s, c", [(0, 5, 3), (7, 1, 3), (7, 130, 4), (3, 64, 13), (5, 9, 33), (2, 0, 3), (4, 3, 1)])
def test_dense_rays_match_the_reference(n, s, c, threshold, dtype, tolerance) -> None:
    args = rays(n, s, c, dtype)
    for mine, theirs in zip(composite(*args, threshold), reference.composite(*args, threshold), strict=True):
        torch.testing.assert_close(mine, theirs, atol=tolerance * 10, rtol=tolerance)


@pytest.mark.parametrize("threshold", [0.0, 0.3])
@pytest.mark.parametrize("counts", [[0, 2, 2, 2, 2], [0], [], [1, 1, 1], [70, 0, 0, 129, 3, 0]])
@pytest.mark.parametrize("c", [3, 20])
def test_ragged_rays_and_their_gradients_match_the_reference(counts, c, threshold) -> None:
    args = packed(counts, c)
    leaves = [x.requires_grad_(True) for x in args if x.is_floating_point()]
    results = []
    for function in (composite_packed, reference.composite_packed):
        out = function(*args, threshold)
        weights = [torch.randn(o.shape, generator=torch.Generator().manual_seed(5), dtype=o.dtype) for o in out]
        results.append([*out, *torch.autograd.grad(list(out), leaves, weights)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)


def test_transmittance_of_the_textbook_example() -> None:
    alpha = torch.tensor([[0.4, 0.3, 0.8, 0.8, 0.5]], dtype=torch.float64)
    ones = torch.ones_like(alpha)
    seen = composite(-torch.log1p(-alpha), ones, ones[..., None], ones)
    left = torch.tensor([[1, 0.6, 0.42, 0.084, 0.0168]], dtype=torch.float64)
    torch.testing.assert_close(seen.weights, left * alpha, atol=1e-15, rtol=1e-14)


def test_equal_rays_are_the_same_dense_and_ragged() -> None:
    density, delta, features, t, background = rays(6, 17, 4)
    offsets = torch.arange(7) * 17
    flat = composite_packed(density.flatten(), delta.flatten(), features.flatten(0, 1), t.flatten(), offsets,
                            background)
    for a, b in zip(composite(density, delta, features, t, background), flat, strict=True):
        assert torch.equal(a.flatten(), b.flatten())


@pytest.mark.parametrize("threshold", [0.0, 0.4])
def test_first_and_second_derivatives(threshold: float) -> None:
    density, delta, features, t, background = rays(3, 4, 2)
    inputs = [x.requires_grad_(True) for x in (density + 0.1, delta + 0.1, features, t, background)]
    torch.autograd.gradcheck(lambda *a: tuple(composite(*a, threshold)), inputs)
    torch.autograd.gradgradcheck(lambda *a: tuple(composite(*a, threshold)), inputs)
    args = packed([0, 2, 3], 2)
    inputs = [x.requires_grad_(True) for x in args if x.is_floating_point()]

    def ragged(density, delta, features, t, background):
        return tuple(composite_packed(density, delta, features, t, args[4], background, threshold))

    torch.autograd.gradcheck(ragged, inputs)
    torch.autograd.gradgradcheck(ragged, inputs)


def test_early_termination_changes_pictures_by_no_more_than_its_threshold() -> None:
    density, delta, features, t, background = rays(50, 200, 3, torch.float32)
    density = density * 100
    whole = composite(density, delta, features.clamp(0, 1), t, background)
    cut = composite(density, delta, features.clamp(0, 1), t, background, 1e-4)
    assert 0 < (whole.features - cut.features).abs().max() < 2e-4
    assert (cut.weights == 0).sum() > (whole.weights == 0).sum()


def test_weights_add_up_to_the_opacity_and_a_closed_ray_is_opaque() -> None:
    density, delta, features, t, _ = rays(9, 33, 3, torch.float32)
    seen = composite(density, delta, features, t)
    torch.testing.assert_close(seen.weights.sum(-1), seen.opacity, atol=1e-6, rtol=0)
    delta[:, -1] = 1e10
    closed = composite(density, delta, features, t)
    assert closed.opacity[1] == pytest.approx(1, abs=1e-6) and closed.opacity[0] == 0  # density 0 · 1e10 is nothing
    assert all(x.isfinite().all() for x in closed)


def test_small_opacities_are_accurate() -> None:
    density = torch.tensor([[1e-7, 1e-3, 0.3]])
    alpha = composite(density.T, torch.ones(3, 1), torch.ones(3, 1, 1), torch.ones(3, 1)).opacity
    torch.testing.assert_close(alpha.double(), -torch.expm1(-density[0].double()), atol=0, rtol=3e-7)  # 2 ulp


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    args = packed([i % 70 for i in range(3000)], 4, torch.float32)
    leaves = [x.requires_grad_(True) for x in args if x.is_floating_point()]
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        out = composite_packed(*args)
        results.append([*out, *torch.autograd.grad([o.square().sum() for o in out], leaves)])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_ten_million_samples() -> None:
    n = 10_000_000
    ones = torch.ones(n)
    seen = composite_packed(ones, ones, ones[:, None], ones, torch.arange(0, n + 1, 100))
    torch.testing.assert_close(seen.opacity, torch.ones(n // 100), atol=1e-6, rtol=0)


@compiled
def test_are_well_behaved_ops() -> None:
    args = [x.requires_grad_(True) for x in rays(3, 4, 2)]
    torch.library.opcheck(torch.ops.gan3d.composite, (*args, 0.1))
    flat = [x.requires_grad_(x.is_floating_point()) for x in packed([0, 2, 3], 2)]
    torch.library.opcheck(torch.ops.gan3d.composite_packed, (*flat, 0.0))
    torch.library.opcheck(torch.ops.gan3d.composite_packed, (*flat[:5], None, 0.0))


def test_bad_arguments_are_refused() -> None:
    density, delta, features, t, background = rays(3, 4, 2)
    unchecked = inspect.unwrap(composite)  # by the shapes' types, which only tests look at
    with pytest.raises(ValueError, match="must have the same shape"):
        unchecked(density, delta, features, t[:2], background)
    with pytest.raises(ValueError, match="background must be"):
        composite(density, delta, features, t, background[:2])
    transposed = composite(density.T.contiguous().T, delta, features, t, background)  # laid out otherwise: no matter
    assert torch.equal(transposed.weights, composite(density, delta, features, t, background).weights)


@compiled
def test_the_ops_themselves_name_what_is_wrong() -> None:
    density, delta, features, t, background = rays(3, 4, 2)
    op = torch.ops.gan3d.composite
    with pytest.raises((ValueError, RuntimeError), match="composite: delta must have shape"):
        op(density, delta[:, :3].contiguous(), features, t, background, 0.0)
    with pytest.raises((TypeError, RuntimeError), match="composite: t must be"):
        op(density, delta, features, t.float(), background, 0.0)
    with pytest.raises((ValueError, RuntimeError), match="composite: density must be contiguous"):
        op(density.T.contiguous().T, delta, features, t, background, 0.0)
    flat = packed([2, 3], 2)
    with pytest.raises((ValueError, RuntimeError), match="offsets must rise from 0"):
        composite_packed(*flat[:4], torch.tensor([0, 4, 3]), flat[5])
