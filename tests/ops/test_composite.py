"""Compositing: closed forms, the reference's values and derivatives, early termination, rays of any length."""

import importlib
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gan3d import ops, volume
from gan3d.ops.composite import Composite, composite, composite_packed

reference = importlib.import_module("gan3d.ops.reference.composite")
native = pytest.mark.skipif(ops.backend() == "reference", reason="no compiled ops: no C++ compiler")
CHANNELS = [0, 1, 2, 3, 4, 5, 13, 32, 33]


def samples(*shape: int, channels: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """density, delta, features and t; about one optical thickness in eight samples."""
    random = torch.Generator().manual_seed(seed)
    density, delta, t = (torch.rand(shape, generator=random, dtype=torch.float64) for _ in range(3))
    features = torch.randn(*shape, channels, generator=random, dtype=torch.float64)
    return tuple(x.to(dtype) for x in (2 * density, delta / 4, features, t))


def backgrounds(rays: int, channels: int, dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
    random = torch.Generator().manual_seed(9)
    each = torch.rand(rays, channels, generator=random, dtype=torch.float64).to(dtype)
    return [None, torch.full((channels,), 0.7, dtype=dtype), each]


def ragged(lengths: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def exact(values: float | list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float64)


LENGTHS = [0, 3, 0, 17, 1, 64, 0, 0, 31, 2, 0]


def gradients(code: Callable, inputs: list, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of a random sum of them in every float tensor."""
    inputs = [x.detach().clone().requires_grad_(True) if isinstance(x, Tensor) and x.is_floating_point() else x
              for x in inputs]
    outputs = list(code(*inputs))
    random = torch.Generator().manual_seed(seed)
    given = [torch.randn(o.shape, generator=random, dtype=torch.float64).to(o.dtype) for o in outputs]
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    return outputs, list(torch.autograd.grad(outputs, leaves, given))


def assert_equal(a: tuple[list[Tensor], list[Tensor]], b: tuple[list[Tensor], list[Tensor]], tolerance: float) -> None:
    for ours, theirs in zip(a[0] + a[1], b[0] + b[1], strict=True):
        scale = max(1.0, float(theirs.detach().abs().max()) if theirs.numel() else 1.0)
        torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=0, atol=tolerance * scale)


def test_constant_slab_is_one_minus_exp() -> None:
    density, delta = 0.8 * ones(3, 50), 0.1 * ones(3, 50)
    t = torch.arange(50, dtype=torch.float64).expand(3, 50)
    colour, behind = exact([0.2, 0.5, 0.9]), exact([1.0, 0.0, 0.5])
    seen = composite(density, delta, colour.expand(3, 50, 3), t, behind)
    opacity = 1 - math.exp(-0.8 * 5)
    torch.testing.assert_close(seen.opacity, opacity * ones(3))
    torch.testing.assert_close(seen.features, (opacity * colour + (1 - opacity) * behind).expand(3, 3))
    step = math.exp(-0.08)
    expected = sum(i * step**i * (1 - step) for i in range(50))
    torch.testing.assert_close(seen.depth, expected * ones(3))


def test_rays_of_known_alphas_have_known_weights() -> None:
    alpha = exact([0.4, 0.3, 0.8, 0.8, 0.5, 0.5, 0.0, 1.0])
    arriving = exact([1, 0.6, 1, 0.2, 1, 0.5, 1, 1])
    density = -torch.log1p(-alpha.clamp(max=1 - 1e-16))
    offsets = ragged([0, 2, 2, 2, 2], torch.int32)
    seen = composite_packed(density, ones(8), ones(8, 1), ones(8), offsets)
    torch.testing.assert_close(seen.weights, arriving * alpha, rtol=0, atol=1e-15)  # 1 − 10^−16 is 1 − 1.1·10^−16
    torch.testing.assert_close(seen.opacity, exact([0, 0.58, 0.96, 0.75, 1.0]), rtol=0, atol=1e-15)
    assert torch.equal(seen.depth, seen.opacity)


def test_one_ray_of_known_alphas_has_known_light() -> None:
    alpha = exact([0.0, 0.3, 0.8, 0.8, 0.5])
    arriving = exact([1, 1, 0.7, 0.14, 0.028])
    density = -torch.log1p(-alpha)
    seen = composite(density, ones(5), ones(5, 1), 0 * ones(5))
    torch.testing.assert_close(seen.weights, arriving * alpha, rtol=0, atol=1e-15)
    torch.testing.assert_close(seen.opacity, exact(1 - 0.014), rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_the_composite_of_volume(dtype: torch.dtype) -> None:
    density, delta, features, t = samples(4, 9, 21, channels=5, dtype=dtype)
    delta[..., -1] = 1e10
    density[0, 0] = 0
    weights = volume.composite(density, delta)
    expected = volume.accumulate(weights, features, t, torch.full((5,), 0.3, dtype=dtype))
    seen = composite(density, delta, features, t, torch.full((5,), 0.3, dtype=dtype))
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14  # a few roundings of sums of about 1
    for ours, theirs in ((seen.weights, weights), (seen.features, expected.features), (seen.depth, expected.depth),
                         (seen.opacity, expected.opacity)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
    assert bool((seen.weights[0, 0] == 0).all())  # density 0 · delta 1e10


def test_thin_samples_keep_their_digits() -> None:
    x = torch.cat([torch.logspace(-30, 1.6, 20000, dtype=torch.float64), torch.linspace(0.3, 1.1, 20000).double()])
    alpha = composite(x.float()[:, None], torch.ones(len(x), 1), torch.ones(len(x), 1, 1), torch.ones(len(x), 1))
    right = -torch.expm1(-x.float().double())
    error = (alpha.weights[:, 0].double() - right).abs() / right
    assert float(error.max()) < 2 * 2.0**-23  # two units in the last place


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_matches_the_reference(channels: int, threshold: float) -> None:
    for rays, s in ((37, 19), (3, 1), (130, 65), (0, 5), (4, 0)):
        for background in backgrounds(rays, channels):
            inputs = [*samples(rays, s, channels=channels), background, threshold]
            expected = gradients(reference.composite, inputs)
            assert_equal(gradients(composite, inputs), expected, 1e-13)  # sums of tens of terms in another order
            low = [x.float() if isinstance(x, Tensor) else x for x in inputs]
            assert_equal(gradients(composite, low), gradients(reference.composite, low), 5e-6)  # the same in float32


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("threshold", [0.0, 0.3])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_packed_matches_the_reference(channels: int, threshold: float, index: torch.dtype) -> None:
    for lengths in (LENGTHS, [0, 0], [], [5], [1] * 1500, [900, 200, 0, 4096, 7, 4097, 3]):
        if len(lengths) > 20 and channels not in (0, 3, 13):
            continue
        offsets = ragged(lengths, index)
        for background in backgrounds(len(lengths), channels):
            inputs = [*samples(sum(lengths), channels=channels), offsets, background, threshold]
            expected = gradients(reference.composite_packed, inputs)
            # the reference sums thicknesses over all rays: 10^3 of them, to 10^−16
            assert_equal(gradients(composite_packed, inputs), expected, 2e-12)


def test_dense_rays_are_packed_rays_of_equal_length() -> None:
    for threshold in (0.0, 0.2):
        density, delta, features, t = samples(23, 40, channels=4, dtype=torch.float32)
        dense = gradients(composite, [density, delta, features, t, None, threshold])
        flat = [density.flatten(), delta.flatten(), features.flatten(0, 1), t.flatten()]
        packed = gradients(composite_packed, [*flat, ragged([40] * 23), None, threshold])
        for a, b in zip(dense[0] + dense[1], packed[0] + packed[1], strict=True):
            assert torch.equal(a.flatten(), b.flatten()) or ops.backend() == "reference"


@native
def test_long_rays_are_taken_like_short_ones() -> None:
    """Beyond 4096 samples a ray goes another way through the code."""
    density, delta, features, t = samples(1, 5000, channels=5)
    density = density / 300
    for threshold in (0.0, 0.1):
        for background in backgrounds(1, 5):
            inputs = [density, delta, features, t, background, threshold]
            assert_equal(gradients(composite, inputs), gradients(reference.composite, inputs), 1e-12)
    needed = [True, False, True, False, True]
    behind = ones(5)
    grads = [ones(1, 5), ones(1), ones(1), torch.ones_like(density)]
    some = torch.ops.gan3d.composite_backward(*grads, density, delta, features, t, behind, 0.0, needed)
    every = torch.ops.gan3d.composite_backward(*grads, density, delta, features, t, behind, 0.0, [True] * 5)
    for a, b, wanted in zip(some, every, needed, strict=True):
        assert torch.equal(a, b) if wanted else a.numel() == 0


def test_a_ray_without_samples_shows_the_background() -> None:
    density, delta, features, t = samples(5, channels=3)
    behind = exact([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9]])
    seen = composite_packed(density, delta, features, t, ragged([0, 5, 0]), behind)
    assert torch.equal(seen.features[[0, 2]], behind[[0, 2]])
    assert torch.equal(seen.depth[[0, 2]], 0 * ones(2))
    assert torch.equal(seen.opacity[[0, 2]], 0 * ones(2))
    dark = composite_packed(density, delta, features, t, ragged([0, 5, 0]))
    assert torch.equal(dark.features[[0, 2]], 0 * ones(2, 3))


def test_rays_through_nothing_show_the_background() -> None:
    seen = composite(torch.zeros(2, 8), torch.full((2, 8), 1e10), torch.randn(2, 8, 3), torch.ones(2, 8), torch.ones(3))
    assert torch.equal(seen.features, torch.ones(2, 3))
    assert torch.equal(seen.weights, torch.zeros(2, 8)) and torch.equal(seen.opacity, torch.zeros(2))


def test_weights_and_what_is_left_make_one() -> None:
    density, delta, features, t = samples(500, 48, channels=1, dtype=torch.float32)
    seen = composite(density, delta, torch.ones_like(features), t, torch.ones(1))
    torch.testing.assert_close(seen.weights.sum(-1), seen.opacity, rtol=0, atol=1e-6)  # sums in another order
    torch.testing.assert_close(seen.features[:, 0], torch.ones(500), rtol=0, atol=1e-6)


def test_early_termination_includes_the_crossing_sample_and_nothing_after() -> None:
    alpha = exact([0.5, 0.5, 0.9, 0.5, 0.5])  # light: 1, .5, .25, .025, …
    density = -torch.log1p(-alpha)
    features = torch.arange(1.0, 6.0).double()[:, None]
    inputs = [density, ones(5), features, ones(5), ones(1), 0.1]
    (colour, depth, opacity, weights), grads = gradients(composite, inputs)
    torch.testing.assert_close(weights, exact([0.5, 0.25, 0.225, 0, 0]), rtol=0, atol=1e-15)
    torch.testing.assert_close(opacity, exact(0.975), rtol=0, atol=1e-15)
    torch.testing.assert_close(colour, exact([0.5 + 0.5 + 0.675 + 0.025]), rtol=0, atol=1e-15)
    for gradient in grads[:4]:
        assert bool((gradient[3:] == 0).all()) and bool((gradient[:3] != 0).all())


def test_invisible_threshold_changes_no_picture() -> None:
    density, delta, features, t = samples(300, 128, channels=3, dtype=torch.float32)
    features = features.sigmoid()
    all_of_it = composite(density, delta, features, t, torch.ones(3))
    most = composite(density, delta, features, t, torch.ones(3), 1e-4)
    assert bool((most.weights == 0).any())
    assert float((all_of_it.features - most.features).abs().max()) < 2e-4


@pytest.mark.parametrize("threshold", [0.0, 0.5])
@pytest.mark.parametrize("background", range(3))
def test_first_and_second_derivatives(threshold: float, background: int) -> None:
    behind = backgrounds(3, 2)[background]
    dense = [x.requires_grad_(True) for x in samples(3, 7, channels=2)]
    ragged_rays = [x.detach().flatten(0, 1)[:9].requires_grad_(True) for x in dense]
    offsets = ragged([4, 0, 5])
    more = [] if behind is None else [behind.requires_grad_(True)]

    def of_dense(*x: Tensor) -> Composite:
        return composite(*x[:4], x[4] if more else None, threshold)

    def of_packed(*x: Tensor) -> Composite:
        return composite_packed(*x[:4], offsets, x[4] if more else None, threshold)

    for code, inputs in ((of_dense, dense), (of_packed, ragged_rays)):
        torch.autograd.gradcheck(code, (*inputs, *more))
        torch.autograd.gradgradcheck(code, (*inputs, *more))


@pytest.mark.parametrize("which", range(5))
def test_gradients_of_some_inputs_are_those_of_all(which: int) -> None:
    inputs = [*samples(70, 19, channels=4), torch.rand(4).double()]
    every = gradients(composite, inputs)[1][which]
    inputs[which].requires_grad_(True)
    outputs = composite(*inputs)
    random = torch.Generator().manual_seed(0)
    given = [torch.randn(o.shape, generator=random, dtype=torch.float64) for o in outputs]
    pairs = [(o, g) for o, g in zip(outputs, given, strict=True) if o.requires_grad]
    (found,) = torch.autograd.grad([o for o, _ in pairs], inputs[which], [g for _, g in pairs])
    assert torch.equal(found, every)


@native
def test_are_well_behaved_ops() -> None:
    grads = [torch.randn(s).double() for s in ((4, 3), (4,), (4,), (4, 6))]
    dense = [*(x.requires_grad_(True) for x in samples(4, 6, channels=3)), torch.rand(3).double(), 0.1]
    torch.library.opcheck(torch.ops.gan3d.composite, tuple(dense))
    torch.library.opcheck(torch.ops.gan3d.composite_backward, (*grads, *dense, [True, False, True, False, True]))
    packed = [x.detach().flatten(0, 1).requires_grad_(True) for x in dense[:4]]
    rest = [ragged([6, 0, 11, 7]), None, 0.0]
    torch.library.opcheck(torch.ops.gan3d.composite_packed, (*packed, *rest))
    grads[3] = grads[3].flatten()
    torch.library.opcheck(torch.ops.gan3d.composite_packed_backward, (*grads, *packed, *rest, [True] * 5))


GRAPH = """
import torch
from gan3d.ops.composite import composite, composite_packed

random = torch.Generator().manual_seed(0)
density, delta, t = (torch.rand(6, 9, generator=random).requires_grad_(True) for _ in range(3))
features, behind = torch.rand(6, 9, 3, generator=random), torch.ones(3)
offsets = torch.tensor([0, 20, 20, 54])

def loss(density, delta, t, features, behind, offsets):
    dense = composite(density, delta, features, t, behind, 0.1)
    packed = composite_packed(density.flatten(), delta.flatten(), features.flatten(0, 1), t.flatten(), offsets)
    return sum(x.square().sum() for x in (*dense, *packed))

inputs = density, delta, t, features, behind, offsets
compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
found, expected = (torch.autograd.grad(code(*inputs), inputs[:3]) for code in (compiled, loss))
assert all(torch.equal(a, b) for a, b in zip(found, expected))
"""


@native
def test_compile_as_one_graph() -> None:
    # by itself: the tracer does not follow the checks of shapes that these tests switch on
    done = subprocess.run([sys.executable, "-c", GRAPH], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@native
def test_flops_are_counted() -> None:
    density, delta, features, t = samples(5, 7, channels=4)
    with FlopCounterMode(display=False) as counter:
        composite(density.requires_grad_(True), delta, features, t).features.sum().backward()
    assert counter.get_total_flops() == 35 * (35 + 2 * 4) + 35 * (46 + 3 * 4)


@native
def test_nothing_but_the_inputs_is_kept_for_the_gradient() -> None:
    inputs = [*samples(5, 7, channels=4), torch.rand(4, dtype=torch.float64).requires_grad_(True)]
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        composite(*inputs)
    assert kept and set(kept) <= {x.data_ptr() for x in inputs}


def test_any_leading_axes_and_strides() -> None:
    density, delta, features, t = samples(2, 3, 11, channels=4)
    behind = torch.rand(2, 3, 4).double()
    expected = composite(density, delta, features, t, behind)
    assert expected.features.shape == (2, 3, 4) and expected.weights.shape == (2, 3, 11)
    strided = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in (density, delta, features, t)]
    for a, b in zip(composite(*strided, behind), expected, strict=True):
        assert torch.equal(a, b)
    alone = composite(density[1, 2], delta[1, 2], features[1, 2], t[1, 2], behind[1, 2])
    for a, b in zip(alone, expected, strict=True):
        assert torch.equal(a, b[1, 2]) or ops.backend() == "reference"


def test_half_precision_is_computed_in_single() -> None:
    density, delta, features, t = samples(5, 9, channels=3, dtype=torch.float32)
    half = features.half()
    seen = composite(density, delta, half, t)
    assert seen.features.dtype == torch.float32
    assert torch.equal(seen.features, composite(density, delta, half.float(), t).features)


@native
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    lengths = torch.randint(129, (700,), generator=torch.Generator().manual_seed(3)).tolist()
    inputs = [*samples(sum(lengths), channels=5, dtype=torch.float32), ragged(lengths), torch.ones(5), 1e-3]
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            found.append(gradients(composite_packed, inputs))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0][0] + found[0][1], other[0] + other[1], strict=True))


@native
@pytest.mark.parametrize("lengths", [[10**7], [100] * 100_000])
def test_ten_million_samples(lengths: list[int]) -> None:
    n = sum(lengths)
    density = torch.full((n,), 1.0, requires_grad=True)
    delta = torch.full((n,), 3.0 / lengths[0])
    seen = composite_packed(density, delta, torch.ones(n, 1), torch.ones(n), ragged(lengths), torch.zeros(1))
    opacity = 1 - math.exp(-3)
    # float32: each thickness has an error of 2^−24 relative, the same for all of a ray
    for found in (seen.opacity, seen.features[:, 0], seen.depth):
        torch.testing.assert_close(found, torch.full((len(lengths),), opacity), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(seen.opacity.sum(), density)
    # every sample's gradient is delta·(what is left); its sum over a ray is 3·e^−3
    torch.testing.assert_close(gradient.double().sum() / len(lengths), exact(3 * math.exp(-3)),
                               rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient[[0, n // 2, -1]], delta[0].expand(3) * math.exp(-3), rtol=1e-4, atol=0)


def test_an_opaque_ray_leaves_the_next_its_digits() -> None:
    """Sums over all rays would lose the small thicknesses beside the 1e10 that closes a ray."""
    density = exact([1.0, 1.0, 0.25, 0.5])
    delta = exact([1.0, 1e10, 1e-3, 1e-3])
    for code in (composite_packed, lambda *x: Composite(*reference.composite_packed(*x, None, 0.0))):
        seen = code(density, delta, ones(4, 1), ones(4), ragged([2, 2]))
        torch.testing.assert_close(seen.opacity[1], -torch.expm1(-exact(0.75e-3)), rtol=1e-10, atol=0)


def test_nan_is_not_hidden() -> None:
    density, delta, features, t = samples(2, 40, channels=3, dtype=torch.float32)
    density[0, 5] = math.nan
    for threshold in (0.0, 0.1):
        seen = composite(density, delta, features, t, None, threshold)
        assert bool(seen.features[0].isnan().all()) and bool(seen.features[1].isfinite().all())


def test_bad_arguments_are_refused() -> None:
    density, delta, features, t = samples(4, 6, channels=3)
    with pytest.raises(ValueError, match="threshold"):
        composite(density, delta, features, t, None, -0.1)
    with pytest.raises(ValueError, match="threshold"):
        composite(density, delta, features, t, None, 1.1)
    with pytest.raises(ValueError, match="background must have shape"):
        composite(density, delta, features, t, ones(2))
    with pytest.raises(TypeError, match="one dtype"):
        composite(density, delta, features.float(), t)
    flat = density.flatten(), delta.flatten(), features.flatten(0, 1), t.flatten()
    with pytest.raises(ValueError, match="background must have shape"):
        composite_packed(*flat, ragged([20, 4]), ones(3, 3))
    with pytest.raises(TypeError, match="int32 or int64"):
        composite_packed(*flat, ragged([20, 4], torch.int16))
    with pytest.raises(ValueError, match="offsets"):
        composite_packed(*flat, torch.empty(0, dtype=torch.int64))


@native
@pytest.mark.parametrize("offsets", [[0, 30], [1, 24], [0, 20], [0, 20, 10, 24], [0, -5, 24]])
def test_offsets_that_do_not_fit_are_refused(offsets: list[int]) -> None:
    density, delta, features, t = samples(24, channels=3)
    for index in (torch.int32, torch.int64):
        with pytest.raises(ValueError, match="offsets must ascend from 0 to the number of samples"):
            composite_packed(density, delta, features, t, torch.tensor(offsets, dtype=index))


@native
def test_the_ops_themselves_name_what_is_wrong() -> None:
    density, delta, features, t = samples(6, 6, channels=3)
    op = torch.ops.gan3d.composite
    with pytest.raises(ValueError, match="composite: delta must be contiguous"):
        op(density, delta.T, features, t, None, 0.0)
    with pytest.raises(ValueError, match="composite: features must have shape"):
        op(density, delta, features[:, :5].contiguous(), t, None, 0.0)
    with pytest.raises(TypeError, match="composite: t must be"):
        op(density, delta, features, t.float(), None, 0.0)
    with pytest.raises(TypeError, match="composite: density must be float32 or float64"):
        op(density.long(), delta, features, t, None, 0.0)
    with pytest.raises(ValueError, match="composite: threshold"):
        op(density, delta, features, t, None, 2.0)
    with pytest.raises(TypeError, match="composite_packed: offsets must be int32 or int64"):
        torch.ops.gan3d.composite_packed(density[0], delta[0], features[0], t[0], torch.tensor([0.0, 6.0]), None, 0.0)
