"""Small networks: a loop over layers and networks is the oracle; values, derivatives, and the order of sums."""

import bisect
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gan3d.ops import extension
from gan3d.ops.reference.tiny_mlp import sort_by_cell as reference_sort
from gan3d.ops.reference.tiny_mlp import tiny_mlp_batch as reference_batch
from gan3d.ops.reference.tiny_mlp import tiny_mlp_gathered
from gan3d.ops.tiny_mlp import layers, parameter_count, sort_by_cell, tiny_mlp, tiny_mlp_batch

compiled = pytest.mark.skipif(extension.backend() == "reference", reason="no compiled ops: no C++ compiler")
KILONERF, NGP, EG3D = ((63, 32, 32, 33), True, "relu"), ((32, 64, 16), False, "relu"), ((32, 64, 33), True, "softplus")
# Narrower than a vector of lanes, just beyond one, as wide as can be, a single layer, all of the layers there may be.
ODD = [((3, 5, 1), True, "softplus"), ((17, 19, 35, 50), True, "none"), ((128, 64, 64), False, "softplus"),
       ((20, 18), True, "relu"), ((2, 3, 4, 5, 6, 7, 8, 9, 10), True, "relu")]
Network = tuple[tuple[int, ...], bool, str]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def vector(widths: tuple[int, ...], bias: bool, *count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (random(*count, parameter_count(widths, bias), seed=1) * 0.3).to(dtype).requires_grad_(True)


def oracle(x: Tensor, p: Tensor, widths: tuple[int, ...], bias: bool, activation: str) -> Tensor:
    at = 0
    for layer, (i, o) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        if layer:
            x = {"relu": F.relu, "softplus": F.softplus, "none": lambda h: h}[activation](x)
        x = x @ p[at:at + o * i].view(o, i).T
        at += o * i
        if bias:
            x = x + p[at:at + o]
            at += o
    return x


def batch_oracle(x: Tensor, p: Tensor, offsets: Tensor, *network) -> Tensor:  # type: ignore[no-untyped-def]
    bounds = offsets.tolist()
    parts = [oracle(x[a:b], p[j], *network) for j, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False))]
    return torch.cat([*parts, x.new_zeros(len(x) - bounds[-1], network[0][-1])])


def compare(got: Tensor, x: Tensor, p: Tensor, expected: Tensor, wide_x: Tensor, wide_p: Tensor) -> None:
    """Values and gradients against those of the float64 oracle."""
    grad = random(*got.shape, seed=2)
    ours = (got, *torch.autograd.grad(got, (x, p), grad.to(got.dtype)))
    theirs = (expected, *torch.autograd.grad(expected, (wide_x, wide_p), grad))
    for a, b in zip(ours, theirs, strict=True):
        scale = max(1.0, float(b.detach().abs().max())) if b.numel() else 1.0
        # Sums of up to 5000 terms in any order: some dozens of roundings, of 6e-8 or 1e-16 of the largest number.
        torch.testing.assert_close(a.double(), b, rtol=0, atol=scale * (4e-6 if a.dtype == torch.float32 else 1e-13))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("network", [KILONERF, NGP, EG3D, *ODD])
def test_matches_layer_by_layer(network: Network, dtype: torch.dtype) -> None:
    for n in (0, 1, 15, 16, 33, 64, 79, 5000):  # around vectors and blocks; 5000: two pieces
        x, p = random(n, network[0][0], dtype=dtype).requires_grad_(), vector(*network[:2], dtype=dtype)
        wide_x, wide_p = x.detach().double().requires_grad_(), p.detach().double().requires_grad_()
        compare(tiny_mlp(x, p, *network), x, p, oracle(wide_x, wide_p, *network), wide_x, wide_p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("network", [KILONERF, *ODD])
def test_batch_matches_network_by_network(network: Network, dtype: torch.dtype) -> None:
    # Empty networks at both ends and between, one point, a crowd of two pieces, 37 rows of no network.
    offsets = torch.tensor([0, 0, 1, 66, 66, 66, 5166, 5200, 5200])
    x, p = random(5237, network[0][0], dtype=dtype).requires_grad_(), vector(*network[:2], 8, dtype=dtype)
    wide_x, wide_p = x.detach().double().requires_grad_(), p.detach().double().requires_grad_()
    expected = batch_oracle(wide_x, wide_p, offsets, *network)
    compare(tiny_mlp_batch(x, p, offsets, *network), x, p, expected, wide_x, wide_p)
    out = tiny_mlp_batch(x, p, offsets.int(), *network)
    assert (out[5200:] == 0).all()
    grad_x, grad_p = torch.autograd.grad(out.sum(), (x, p))
    assert (grad_x[5200:] == 0).all() and (grad_p[[0, 3, 4, 7]] == 0).all() and grad_p[[1, 2, 5, 6]].any(-1).all()


@pytest.mark.parametrize("function", [reference_batch, tiny_mlp_gathered])
def test_the_reference_itself_matches_network_by_network(function) -> None:  # type: ignore[no-untyped-def]
    offsets, (widths, bias, activation) = torch.tensor([0, 0, 1, 66, 66, 300, 300]), EG3D
    x, p = random(321, 32).requires_grad_(), vector(widths, bias, 6)
    compare(function(x, p, offsets, widths, bias, activation), x, p, batch_oracle(x, p, offsets, *EG3D), x, p)
    none = torch.zeros(7, dtype=torch.int64)
    compare(function(x, p, none, widths, bias, activation), x, p, batch_oracle(x, p, none, *EG3D), x, p)


def test_no_networks_and_no_rows() -> None:
    for g, n in ((0, 0), (3, 0), (0, 4), (3, 4)):
        x, p = random(n, 32).requires_grad_(), vector((32, 64, 33), True, g)
        out = tiny_mlp_batch(x, p, torch.zeros(g + 1, dtype=torch.int64), *EG3D)
        out.sum().backward()
        assert out.shape == (n, 33) and not out.any() and not x.grad.any() and not p.grad.any()


@pytest.mark.parametrize("activation", ["relu", "softplus", "none"])
@pytest.mark.parametrize("bias", [True, False])
def test_first_and_second_derivatives(activation: str, bias: bool) -> None:
    widths, offsets = (3, 5, 4, 2), torch.tensor([0, 2, 2, 5])
    x, p = random(6, 3).requires_grad_(), (random(3, parameter_count(widths, bias), seed=4) * 0.7).requires_grad_()
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        check(lambda x, p: tiny_mlp(x, p, widths, bias, activation), (x, p[0].detach().requires_grad_()))
        check(lambda x, p: tiny_mlp_batch(x, p, offsets, widths, bias, activation), (x, p))


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_a_gradient_that_nobody_wants_changes_nothing_in_the_other(wanted: tuple[bool, bool]) -> None:
    x, p = random(100, 32), vector(*EG3D[:2]).detach()
    both = torch.autograd.grad(tiny_mlp(x.requires_grad_(), p.requires_grad_(), *EG3D).sum(), (x, p))
    leaves = [t.detach().requires_grad_(w) for t, w in zip((x, p), wanted, strict=True)]
    tiny_mlp(leaves[0], leaves[1], *EG3D).sum().backward()
    for leaf, expected, w in zip(leaves, both, wanted, strict=True):
        assert leaf.grad is None if not w else torch.equal(leaf.grad, expected)


def test_softplus_is_precise_to_a_few_units_in_the_last_place() -> None:
    x = torch.cat([torch.linspace(-86, 100, 200_001), torch.tensor([0.0, -0.0, 20.0, 1e-30, -1e-30, 3e38, -3e38])])
    x = x[:, None].requires_grad_()
    y = tiny_mlp(x, torch.ones(2), (1, 1, 1), False, "softplus")
    (slope,) = torch.autograd.grad(y.sum(), x)
    wide = x.detach().double()
    # e^−|x| (1.5 units), log(1 + t) (1) and their sum (0.5); the slope adds its own exponential to the error of y.
    for got, exact in ((y.detach(), torch.logaddexp(wide, torch.zeros_like(wide))), (slope, torch.sigmoid(wide))):
        error = (got.double() - exact).abs() / exact.clamp(min=1e-37)
        assert float(error.max()) < (4 if got is not slope else 6) * 2.0**-23
        assert float(error.mean()) < 0.5 * 2.0**-23


def test_softplus_is_the_identity_above_twenty_and_not_a_number_stays_one() -> None:
    x = torch.tensor([[20.5], [float("nan")], [float("inf")]], dtype=torch.float64, requires_grad=True)
    for activation in ("softplus", "relu"):
        y = tiny_mlp(x.detach(), torch.ones(2, dtype=torch.float64), (1, 1, 1), False, activation)
        assert y[0] == 20.5 and y[1].isnan() and y[2].isinf()
        low = tiny_mlp(x.detach().float(), torch.ones(2), (1, 1, 1), False, activation)
        assert low[0] == 20.5 and low[1].isnan() and low[2].isinf()


@compiled
def test_same_bits_for_any_number_of_threads() -> None:
    offsets = torch.tensor([0, 100, 9000, 9001, 20_000])
    x = random(20_000, 63, dtype=torch.float32).requires_grad_()
    p = vector((63, 32, 32, 33), True, 4, dtype=torch.float32)
    cells = (random(50_000) * 20).int()
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            out = tiny_mlp_batch(x, p, offsets, *KILONERF)
            one = tiny_mlp(x, p[0], *KILONERF)
            grads = torch.autograd.grad(out.square().sum() + one.sum(), (x, p))
            runs.append((out, one, *grads, *sort_by_cell(cells, 30)))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@compiled
def test_a_points_output_does_not_depend_on_its_neighbours() -> None:
    x, p = random(200, 63, dtype=torch.float32), vector((63, 32, 32, 33), True, dtype=torch.float32)
    full = tiny_mlp(x, p, *KILONERF)
    assert all(torch.equal(tiny_mlp(x[a:b], p, *KILONERF), full[a:b]) for a, b in ((0, 1), (3, 20), (17, 150)))


def test_layers_are_views() -> None:
    p = torch.zeros(2, parameter_count((3, 4, 1), True))
    (w0, b0), (w1, b1) = layers(p, (3, 4, 1), True)
    assert w0.shape == (2, 4, 3) and b0.shape == (2, 4) and w1.shape == (2, 1, 4) and b1.shape == (2, 1)
    w0[1, 2, 1], b1[1, 0] = 5.0, 7.0
    assert p[1, 7] == 5 and p[1, 20] == 7 and p.count_nonzero() == 2
    assert [b for _, b in layers(torch.zeros(16), (3, 4, 1), False)] == [None, None]


def test_sort_by_cell_is_a_stable_sort() -> None:
    for n, count in ((0, 0), (0, 4), (5, 0), (1, 1), (1000, 7), (20_000, 300)):
        for dtype in (torch.int32, torch.int64):
            cell = torch.randint(-2, count + 2, (n,), generator=torch.Generator().manual_seed(n), dtype=dtype)
            order, offsets = sort_by_cell(cell, count)
            key = [c if 0 <= c < count else count for c in cell.tolist()]
            assert order.tolist() == sorted(range(n), key=key.__getitem__)  # Python's sort is stable
            assert offsets.tolist() == [bisect.bisect_left(sorted(key), j) for j in range(count + 1)]
            assert all(torch.equal(a, b) for a, b in zip((order, offsets), reference_sort(cell, count), strict=True))


def test_any_leading_axes_strides_and_half_precision() -> None:
    x, p = random(4, 32, 3, 5), vector(*EG3D[:2])
    moved = x.permute(3, 0, 2, 1)
    out = tiny_mlp(moved, p, *EG3D)
    torch.testing.assert_close(out, oracle(moved, p, *EG3D), rtol=0, atol=1e-13)  # roundings of float64
    half = tiny_mlp(moved.half(), p.half(), *EG3D)
    assert half.dtype == torch.float32 and torch.equal(half, tiny_mlp(moved.half().float(), p.half().float(), *EG3D))
    strided = random(66, 64)[:, ::2]
    offsets = torch.tensor([0, 1, 30, 1, 66, 1])[::2]
    many = random(parameter_count((32, 64, 33), True), 2).T
    torch.testing.assert_close(tiny_mlp_batch(strided, many, torch.tensor([0, 30, 66]), *EG3D),
                               batch_oracle(strided, many, torch.tensor([0, 30, 66]), *EG3D), rtol=0, atol=1e-11)
    assert torch.equal(tiny_mlp_batch(strided, many, offsets, *EG3D),
                       tiny_mlp_batch(strided.contiguous(), many.contiguous(), offsets.contiguous(), *EG3D))


def test_bad_arguments_are_refused() -> None:
    x, p = random(4, 32), vector(*EG3D[:2]).detach()
    for message, call in {
        "features": lambda: tiny_mlp(x[:, :31], p, *EG3D),
        "parameters, got": lambda: tiny_mlp(x, p[:-1], *EG3D),
        "activation must be": lambda: tiny_mlp(x, p, (32, 64, 33), True, "sine"),
        "at most 128 inputs": lambda: tiny_mlp(x, p, (32, 65, 33), True, "relu"),
        "1 to 8 layers": lambda: tiny_mlp(x, p, (32,), True, "relu"),
        "offsets": lambda: tiny_mlp_batch(x, p.expand(2, -1), torch.zeros(2, dtype=torch.int64), *EG3D),
        "take 4257 parameters": lambda: layers(p[1:], (32, 64, 33), True),
        "count must be": lambda: sort_by_cell(torch.zeros(3, dtype=torch.int64), -1),
    }.items():
        with pytest.raises((ValueError, TypeError), match=message):  # TypeError: where jaxtyping checks first
            call()
    for message, call in {
        "x is torch.float64": lambda: tiny_mlp(x, p.float(), *EG3D),
        "(?i)float": lambda: tiny_mlp(x.long(), p.long(), *EG3D),
        "int32 or int64": lambda: sort_by_cell(torch.zeros(3, dtype=torch.int16), 2),
    }.items():
        with pytest.raises(TypeError, match=message):
            call()


@compiled
def test_offsets_that_decrease_or_exceed_the_rows_are_refused() -> None:
    x, p = random(4, 32), vector(*EG3D[:2], 2).detach()
    for offsets in ([1, 2, 4], [0, 3, 2], [0, 2, 5]):
        with pytest.raises(ValueError, match="offsets must"):
            tiny_mlp_batch(x, p, torch.tensor(offsets), *EG3D)


@compiled
def test_the_op_itself_names_what_is_wrong() -> None:
    op, x, p = torch.ops.gan3d.tiny_mlp, random(4, 32), vector(*EG3D[:2], 1).detach()
    for message, call in {
        "x must be contiguous": lambda: op(random(32, 4).T, p, None, [32, 64, 33], True, 1),
        "parameters must have shape": lambda: op(x, p[:, 1:].contiguous(), None, [32, 64, 33], True, 1),
        "parameters must be": lambda: op(x, p.float(), None, [32, 64, 33], True, 1),
        "offsets must have shape": lambda: op(x, p, torch.zeros(3, dtype=torch.int64), [32, 64, 33], True, 1),
        "widths must be": lambda: op(x, p, None, [32, 65, 33], True, 1),
        "activation must be": lambda: op(x, p, None, [32, 64, 33], True, 3),
        "cell must be": lambda: torch.ops.gan3d.sort_by_cell(x[0], 3),
    }.items():
        with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
            call()


@compiled
def test_are_well_behaved_ops() -> None:
    x, p, offsets = random(9, 5).requires_grad_(), vector((5, 4, 3), True, 2), torch.tensor([0, 4, 8])
    arguments = (offsets, [5, 4, 3], True, 2)
    torch.library.opcheck(torch.ops.gan3d.tiny_mlp, (x, p, *arguments))
    torch.library.opcheck(torch.ops.gan3d.tiny_mlp, (x, p[:1].detach().requires_grad_(), None, [5, 4, 3], True, 1))
    torch.library.opcheck(torch.ops.gan3d.tiny_mlp_backward,
                          (random(9, 3), x.detach(), p.detach(), *arguments, [True, True]))
    torch.library.opcheck(torch.ops.gan3d.sort_by_cell, (torch.tensor([2, 0, -1, 2]), 3))


@compiled
def test_flops_are_counted() -> None:
    x, p = random(10, 32).requires_grad_(), vector(*EG3D[:2])
    first, second = 32 * 64, 64 * 33
    with FlopCounterMode(display=False) as counter:
        out = tiny_mlp(x, p, *EG3D)
    assert counter.get_total_flops() == 2 * 10 * (first + second)
    with FlopCounterMode(display=False) as counter:  # the first layer again, then each product twice
        out.sum().backward()
    assert counter.get_total_flops() == 2 * 10 * (first + 2 * (first + second))
    out = tiny_mlp(x.detach(), p, *EG3D)
    with FlopCounterMode(display=False) as counter:  # without the gradient of x
        out.sum().backward()
    assert counter.get_total_flops() == 2 * 10 * (first + first + 2 * second)


GRAPH = """
import torch
from gan3d.ops.tiny_mlp import sort_by_cell, tiny_mlp, tiny_mlp_batch

def pipeline(x, p, cell):
    order, offsets = sort_by_cell(cell, 2)
    many = tiny_mlp_batch(x[order], p, offsets, (5, 8, 3), True, "softplus")
    return many + tiny_mlp(x, p[0], (5, 8, 3), True, "relu")

random = torch.Generator().manual_seed(0)
x, p = (torch.randn(*shape, generator=random).requires_grad_() for shape in ((40, 5), (2, 75)))
cell = torch.arange(40) % 3 - 1
expected = torch.autograd.grad(pipeline(x, p, cell).square().sum(), (x, p))
compiled = torch.compile(pipeline, fullgraph=True, backend="aot_eager")
for a, b in zip(torch.autograd.grad(compiled(x, p, cell).square().sum(), (x, p)), expected, strict=True):
    torch.testing.assert_close(a, b)  # gradients are added in another order
"""


@compiled
def test_compiles_as_one_graph() -> None:
    # By itself: the tracer does not follow the checks of shapes that these tests switch on.
    done = subprocess.run([sys.executable, "-c", GRAPH], cwd=extension.CSRC.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
