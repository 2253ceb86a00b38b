"""Convolutions of sparse voxels: the dense ones, restricted; their maps, derivatives, batches, threads."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from gan3d import ops
from gan3d.ops import extension
from gan3d.ops.cells import Resolution, Voxels
from gan3d.ops.reference import sparse_conv as reference
from gan3d.ops.sparse_conv import (
    KernelMap,
    join_maps,
    kernel_map,
    sparse_conv3d,
    sparse_upsample,
    upsample_support,
    upsampling_map,
)
from gan3d.ops.voxels import gather_voxels, mask_of, neighbours, scatter_voxels, upsample, voxels_from_mask

compiled = pytest.mark.skipif(ops.backend() == "reference", reason="no compiled ops: no C++ compiler")
# one block; one cube; many cubes, of 4³, 8³ and 16³; no voxel, a few, all
GRIDS: list[Resolution] = [(4, 4, 4), (16, 16, 16), (12, 4, 20), (8, 24, 16), (48, 16, 32)]
SHARES = [0.0, 0.02, 0.4, 1.0]
# one vector and a part, panels of one, two and three vectors, groups of 8 inputs with and without a rest
CHANNELS = [(1, 1), (3, 5), (32, 32), (31, 62), (62, 31), (9, 100)]


def normal(*size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def whole(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(-8, 9, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def some(resolution: Resolution, share: float = 0.3, seed: int = 0) -> Voxels:
    return voxels_from_mask(torch.rand(*resolution, generator=torch.Generator().manual_seed(seed)) < share)


def ball(side: int) -> Voxels:
    axis = torch.arange(side) - side / 2 + 0.5
    radius = (axis[:, None, None]**2 + axis[:, None]**2 + axis**2).sqrt()
    return voxels_from_mask((radius - side / 3).abs() < 1.2)


def patterns(kind: str, resolution: Resolution, share: float) -> tuple[Voxels, Voxels]:
    """Inputs and outputs; "anywhere": fine voxels that need not lie near coarse ones."""
    voxels = some(resolution, share)
    if kind == "same":
        return voxels, voxels
    x, y, z = resolution
    return voxels, {"support": upsample_support, "children": lambda v: upsample(v).voxels,
                    "anywhere": lambda v: some((2 * x, 2 * y, 2 * z), 0.3, seed=1)}[kind](voxels)


def map_of(source: Voxels, target: Voxels) -> KernelMap:
    return kernel_map(source) if source.resolution == target.resolution else upsampling_map(source, target)


def dense(values: Tensor, weight: Tensor, source: Voxels, target: Voxels) -> Tensor:
    grid = scatter_voxels(values, source).permute(3, 0, 1, 2)[None]
    if source.resolution == target.resolution:
        y = F.conv3d(grid, weight, padding=1)
    else:
        y = F.conv_transpose3d(grid, weight.transpose(0, 1), stride=2)[..., :-1, :-1, :-1]
    return gather_voxels(y[0].permute(1, 2, 3, 0), target)


KINDS = ["same", "support", "children", "anywhere"]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("resolution", GRIDS)
@pytest.mark.parametrize("kind", KINDS)
def test_is_the_dense_convolution_where_voxels_exist(kind: str, resolution: Resolution, share: float) -> None:
    """Whole numbers whose sums stay below 2^24: not a bit may differ, in values and in both gradients."""
    source, target = patterns(kind, resolution, share)
    kernel = map_of(source, target)
    values, weight = whole(kernel.rows_in, 3).requires_grad_(), whole(5, 3, 3, 3, 3, seed=1).requires_grad_()
    result, expected = sparse_conv3d(values, weight, kernel), dense(values, weight, source, target)
    assert torch.equal(result, expected)
    grad = whole(*result.shape, seed=2) / 4
    found, right = (torch.autograd.grad(y, (values, weight), grad) for y in (result, expected))
    assert torch.equal(found[0], right[0]) and torch.equal(found[1], right[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("c, o", CHANNELS)
@pytest.mark.parametrize("kind", ["same", "support"])
def test_any_number_of_channels(kind: str, c: int, o: int, dtype: torch.dtype) -> None:
    source = ball(16)
    target = source if kind == "same" else upsample_support(source)
    kernel = map_of(source, target)
    values, weight = normal(kernel.rows_in, c).to(dtype).requires_grad_(), normal(o, c, 3, 3, 3, seed=1).to(dtype)
    weight = weight.requires_grad_()
    result, expected = sparse_conv3d(values, weight, kernel), dense(values.double(), weight.double(), source, target)
    assert result.dtype == dtype and result.is_contiguous()
    grad = normal(*result.shape, seed=2)
    found = (result, *torch.autograd.grad(result, (values, weight), grad.to(dtype)))
    right = (expected, *torch.autograd.grad(expected, (values, weight), grad))
    for a, b in zip(found, right, strict=True):
        # root mean squares: 8 last places at most are lost in sums of up to 2,700 numbers
        error, size = (x.detach().square().mean().sqrt() for x in (a.double() - b, b))
        assert error <= 16 * torch.finfo(dtype).eps * size


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("resolution", GRIDS)
def test_pairs_of_a_grid_are_its_neighbours(resolution: Resolution, share: float) -> None:
    voxels = some(resolution, share)
    kernel, table = kernel_map(voxels), neighbours(voxels)
    assert kernel.pairs.dtype == torch.int32 and kernel.start.dtype == torch.int64 and kernel.start.shape == (28,)
    assert kernel.back is None and kernel.rows_in == kernel.rows_out == len(table)
    for tap in range(27):
        source, target = kernel.pairs[kernel.start[tap]:kernel.start[tap + 1]].T
        assert torch.equal(target.long(), (table[:, tap] >= 0).nonzero()[:, 0])
        assert torch.equal(source, table[target.long(), tap])
    pairs, start = reference.neighbour_pairs(table)
    assert torch.equal(pairs, kernel.pairs) and torch.equal(start, kernel.start)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("resolution", GRIDS)
def test_pairs_of_two_grids_and_their_reverse(resolution: Resolution, share: float) -> None:
    coarse, fine = patterns("anywhere", resolution, share)
    kernel = upsampling_map(coarse, fine)
    assert (kernel.rows_in, kernel.rows_out) == (int(coarse.rank[-1]), int(fine.rank[-1]))
    assert kernel.back is not None
    for tap in range(27):
        run = slice(int(kernel.start[tap]), int(kernel.start[tap + 1]))
        forth, back = kernel.pairs[run], kernel.back[run].flip(1)
        assert (forth[:, 1].diff() > 0).all() and (back[:, 0].diff() > 0).all()
        assert torch.equal(forth, back[back[:, 1].argsort()])
        step = torch.tensor([tap // 9, tap // 3 % 3, tap % 3])
        at = 2 * ops.positions_of(coarse)[back[:, 0].long()] + step
        assert torch.equal(ops.row_of(fine, at), back[:, 1])
        assert len(back) == (ops.row_of(fine, 2 * ops.positions_of(coarse) + step) >= 0).sum()
    plain = reference.upsampling_pairs(coarse.words, coarse.rank, resolution, fine.words, fine.rank)
    for a, b in zip((kernel.pairs, kernel.back, kernel.start), plain, strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("resolution", GRIDS)
def test_support_is_where_interpolation_is_positive(resolution: Resolution, share: float) -> None:
    voxels = some(resolution, share)
    mask = mask_of(voxels).float()[None, None]
    up = F.interpolate(mask, scale_factor=2, mode="trilinear", align_corners=False)[0, 0]
    support, expected = upsample_support(voxels), voxels_from_mask(up > 0)
    assert torch.equal(support.words, expected.words) and torch.equal(support.rank, expected.rank)


def zero_inserted(values: Tensor, coarse: Voxels) -> Tensor:
    """VoxGRAF's: a zero before each value along each axis, then [1, 2, 1]³ / 8, in every channel by itself."""
    grid = scatter_voxels(values, coarse).permute(3, 0, 1, 2)
    wide = grid.new_zeros(grid.shape[0], *(2 * s for s in grid.shape[1:]))
    wide[:, 1::2, 1::2, 1::2] = grid
    line = torch.tensor([1.0, 2.0, 1.0], dtype=values.dtype)
    taps = line[:, None, None] * line[:, None] * line / 8
    return F.conv3d(wide[None], taps.expand(len(grid), 1, 3, 3, 3), padding=1, groups=len(grid))[0].permute(1, 2, 3, 0)


@pytest.mark.parametrize("kind", ["support", "anywhere"])
@pytest.mark.parametrize("resolution", GRIDS)
def test_the_skip_image_is_upsampled_by_inserted_zeros(resolution: Resolution, kind: str) -> None:
    coarse, fine = patterns(kind, resolution, 0.3)
    values = whole(int(coarse.rank[-1]), 4).requires_grad_()
    result = sparse_upsample(values, upsampling_map(coarse, fine))
    expected = gather_voxels(zero_inserted(values, coarse), fine)
    assert torch.equal(result, expected)  # whole numbers and eighths
    grad = whole(*result.shape, seed=1)
    assert torch.equal(*(torch.autograd.grad(y, values, grad)[0] for y in (result, expected)))


@pytest.mark.parametrize("kind", ["same", "anywhere"])
def test_first_and_second_derivatives(kind: str) -> None:
    kernel = map_of(*patterns(kind, (4, 4, 4), 0.2))
    values, weight = normal(kernel.rows_in, 2).requires_grad_(), normal(3, 2, 3, 3, 3, seed=1).requires_grad_()
    torch.autograd.gradcheck(lambda x, w: sparse_conv3d(x, w, kernel), (values, weight), fast_mode=True)
    torch.autograd.gradgradcheck(lambda x, w: sparse_conv3d(x, w, kernel).square(), (values, weight), fast_mode=True)


@pytest.mark.parametrize("kind", ["same", "support"])
def test_derivatives_up_to_the_third_match_the_reference(kind: str) -> None:
    kernel = map_of(*patterns(kind, (8, 8, 4), 0.3))
    values, weight = normal(kernel.rows_in, 3).requires_grad_(), normal(27, 3, 4, seed=1).requires_grad_()

    def derivatives(code: Callable[..., Tensor]) -> list[Tensor]:
        y = code(values, weight, kernel.pairs, kernel.start, kernel.back, kernel.rows_out)
        found = [y]
        for _ in range(3):
            found += torch.autograd.grad(found[-1].sin().sum(), (weight, values), create_graph=True)
        return found

    code = torch.ops.gan3d.conv_rows if ops.backend() != "reference" else reference.conv_rows
    for a, b in zip(derivatives(code), derivatives(reference.conv_rows), strict=True):
        largest = float(b.detach().abs().max())
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * largest)  # chains of float64 roundings


def test_derivative_by_one_argument_alone() -> None:
    kernel = kernel_map(some((8, 8, 8)))
    values, weight = normal(kernel.rows_in, 3), normal(4, 3, 3, 3, 3, seed=1)
    both = sparse_conv3d(values.requires_grad_(), weight.requires_grad_(), kernel)
    expected = torch.autograd.grad(both, (values, weight), torch.ones_like(both))
    a = sparse_conv3d(values, weight.detach(), kernel)
    b = sparse_conv3d(values.detach(), weight, kernel)
    assert torch.equal(torch.autograd.grad(a, values, torch.ones_like(a))[0], expected[0])
    assert torch.equal(torch.autograd.grad(b, weight, torch.ones_like(b))[0], expected[1])
    assert not sparse_conv3d(values.detach(), weight.detach(), kernel).requires_grad


@pytest.mark.parametrize("kind", ["same", "support"])
def test_a_batch_is_one_convolution(kind: str) -> None:
    """Grids of several patterns, one without voxels, one map: the same bits, weights' gradients summed."""
    grids = [patterns(kind, (16, 8, 12), 0.3), patterns(kind, (8, 8, 8), 0.0), (ball(16), ball(16))]
    grids[2] = grids[2] if kind == "same" else (ball(16), upsample_support(ball(16)))
    kernels = [map_of(*pair) for pair in grids]
    joined = join_maps(kernels)
    tables = [normal(k.rows_in, 3, seed=i, dtype=torch.float32) for i, k in enumerate(kernels)]
    together, weight = torch.cat(tables).requires_grad_(), normal(5, 3, 3, 3, 3, dtype=torch.float32).requires_grad_()
    result = sparse_conv3d(together, weight, joined)
    separate = torch.cat([sparse_conv3d(t, weight, k) for t, k in zip(tables, kernels, strict=True)])
    if ops.backend() == "reference":
        torch.testing.assert_close(result, separate)
    else:
        assert torch.equal(result, separate)
    grad = normal(*result.shape, seed=1, dtype=torch.float32)
    pulled = torch.autograd.grad(result, (together, weight), grad)
    plain = [t.double().requires_grad_() for t in (together.detach(), weight.detach())]
    parts, rows = plain[0].split([k.rows_in for k in kernels]), [k.rows_out for k in kernels]
    exact = torch.cat([dense(p, plain[1], *pair) for p, pair in zip(parts, grids, strict=True)])
    assert len(exact) == sum(rows) == joined.rows_out
    for a, b in zip(pulled, torch.autograd.grad(exact, plain, grad.double()), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-5 * float(b.abs().max()))  # float32 roundings
    one = join_maps(kernels[:1])
    assert torch.equal(one.pairs, kernels[0].pairs) and torch.equal(one.start, kernels[0].start)


@compiled
@pytest.mark.parametrize("kind", ["same", "support"])
def test_bits_do_not_depend_on_threads(kind: str) -> None:
    source = ball(32)
    kernel = map_of(source, source if kind == "same" else upsample_support(source))
    values = normal(kernel.rows_in, 33, dtype=torch.float32).requires_grad_()
    weight = normal(40, 33, 3, 3, 3, dtype=torch.float32).requires_grad_()
    grad = normal(kernel.rows_out, 40, dtype=torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 1):
            torch.set_num_threads(n)
            again = map_of(source, source if kind == "same" else upsample_support(source))
            y = sparse_conv3d(values, weight, again)
            results.append((again.pairs, y, *torch.autograd.grad(y, (values, weight), grad)))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert torch.equal(a, b)


def test_layout_and_half_precision() -> None:
    kernel = kernel_map(some((8, 8, 8)))
    values, weight = normal(kernel.rows_in, 6, dtype=torch.float32), normal(4, 3, 3, 3, 3, dtype=torch.float32)
    apart, turned = values[:, ::2], weight.permute(0, 1, 4, 3, 2)
    result = sparse_conv3d(apart, turned, kernel)
    assert torch.equal(result, sparse_conv3d(apart.contiguous(), turned.contiguous(), kernel))
    low = sparse_conv3d(apart.half(), weight.bfloat16(), kernel)
    assert torch.equal(low, sparse_conv3d(apart.half().float(), weight.bfloat16().float(), kernel))


def test_no_channels_and_no_rows() -> None:
    kernel = kernel_map(some((8, 8, 8)))
    for c, o in ((0, 3), (3, 0)):
        values, weight = normal(kernel.rows_in, c).requires_grad_(), normal(o, c, 3, 3, 3).requires_grad_()
        y = sparse_conv3d(values, weight, kernel)
        assert torch.equal(y, torch.zeros(kernel.rows_out, o, dtype=torch.float64))
        for leaf, grad in zip((values, weight), torch.autograd.grad(y, (values, weight), y), strict=True):
            assert torch.equal(grad, torch.zeros_like(leaf))
    one = kernel_map(voxels_from_mask(F.pad(torch.ones(1, 1, 1, dtype=torch.bool), (3, 4, 3, 4, 3, 4))))
    values, weight = normal(1, 3), normal(5, 3, 3, 3, 3)
    torch.testing.assert_close(sparse_conv3d(values, weight, one), values @ weight[..., 1, 1, 1].T)


@compiled
@pytest.mark.parametrize("kind", ["same", "anywhere"])
def test_ops_are_well_behaved(kind: str) -> None:
    source, target = patterns(kind, (8, 4, 4), 0.3)
    kernel = map_of(source, target)
    values, weight = normal(kernel.rows_in, 3).requires_grad_(), normal(27, 3, 4, seed=1).requires_grad_()
    where = (kernel.pairs, kernel.start, kernel.back)
    torch.library.opcheck(torch.ops.gan3d.conv_rows, (values, weight, *where, kernel.rows_out))
    grad = normal(kernel.rows_out, 4, seed=2).requires_grad_()
    torch.library.opcheck(torch.ops.gan3d.conv_rows_weight, (values, grad, *where))
    # results whose size depends on data: traced with symbols, which that one test does not do
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.gan3d.neighbour_pairs, (neighbours(source),), test_utils=checks)
    if kind != "same":
        torch.library.opcheck(torch.ops.gan3d.upsampling_pairs, (*source, *target[:2]), test_utils=checks)


GRAPH = """
import torch
from gan3d.ops.sparse_conv import kernel_map, sparse_conv3d, sparse_upsample, upsample_support, upsampling_map
from gan3d.ops.voxels import voxels_from_mask

coarse = voxels_from_mask(torch.rand(8, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.3)
fine = upsample_support(coarse)
up, same = upsampling_map(coarse, fine), kernel_map(fine)

def block(x, weight):
    return sparse_conv3d(sparse_conv3d(x, weight, up).relu(), weight, same) + sparse_upsample(x, up)

random = torch.Generator().manual_seed(0)
x, weight = (torch.randn(*shape, generator=random).requires_grad_() for shape in ((up.rows_in, 4), (4, 4, 3, 3, 3)))
compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
grads = (torch.autograd.grad(f(x, weight).square().sum(), (x, weight)) for f in (block, compiled))
for a, b in zip(*grads, strict=True):
    assert torch.equal(a, b)
"""


@compiled
def test_compiles_as_one_graph() -> None:
    # By itself: the tracer does not follow the checks of shapes that these tests switch on.
    done = subprocess.run([sys.executable, "-c", GRAPH], cwd=extension.CSRC.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@compiled
def test_flops_are_two_a_pair_and_channels() -> None:
    kernel = kernel_map(some((8, 8, 8)))
    values, weight = normal(kernel.rows_in, 3).requires_grad_(), normal(5, 3, 3, 3, 3).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        sparse_conv3d(values, weight, kernel).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * len(kernel.pairs) * 3 * 5


def test_bad_arguments_are_refused() -> None:
    kernel = kernel_map(some((8, 8, 8)))
    values, weight = normal(kernel.rows_in, 3), normal(5, 3, 3, 3, 3)
    # TypeError: where jaxtyping checks first
    with pytest.raises((ValueError, TypeError), match="weight"):
        sparse_conv3d(values, weight[:, :2], kernel)
    with pytest.raises((ValueError, TypeError), match="weight"):
        sparse_conv3d(values, weight[..., :2], kernel)
    with pytest.raises(ValueError, match="rows, the map takes"):
        sparse_conv3d(values[1:], weight, kernel)
    with pytest.raises(TypeError, match="float32"):
        sparse_conv3d(values, weight.float(), kernel)
    with pytest.raises(TypeError, match="(?i)float"):
        sparse_conv3d(values.long(), weight, kernel)
    with pytest.raises(ValueError, match="must be twice"):
        upsampling_map(some((8, 8, 8)), some((16, 16, 8)))
    with pytest.raises(ValueError, match="one kind"):
        join_maps([])
    with pytest.raises(ValueError, match="one kind"):
        join_maps([kernel, upsampling_map(some((4, 4, 4)), some((8, 8, 8)))])


@compiled
def test_the_op_itself_names_what_is_wrong() -> None:
    kernel = kernel_map(some((8, 8, 8)))
    values, weight, grad = normal(kernel.rows_in, 3), normal(27, 3, 5), normal(kernel.rows_out, 5)
    conv, by_weight = torch.ops.gan3d.conv_rows, torch.ops.gan3d.conv_rows_weight
    pairs, start, rows = kernel.pairs, kernel.start, kernel.rows_out
    errors = (ValueError, RuntimeError, IndexError, TypeError)
    with pytest.raises(errors, match="values must be contiguous"):
        conv(values.T.contiguous().T, weight, pairs, start, None, rows)
    with pytest.raises(errors, match="weight must have shape"):
        conv(values, weight[1:], pairs, start, None, rows)
    with pytest.raises(errors, match="weight must be"):
        conv(values, weight.float(), pairs, start, None, rows)
    with pytest.raises(errors, match="pairs must have shape"):
        conv(values, weight, pairs.flatten(), start, None, rows)
    with pytest.raises(errors, match="start must increase"):
        conv(values, weight, pairs[1:], start, None, rows)
    with pytest.raises(errors, match="start must increase"):
        conv(values, weight, pairs, start.flip(0), None, rows)
    with pytest.raises(errors, match="grad must be"):
        by_weight(values, grad.float(), pairs, start, None)
    for change in ((0, 0, -1), (5, 0, rows), (0, 1, -1), (len(pairs) - 1, 1, rows), (3, 1, int(pairs[2, 1]))):
        wrong = pairs.clone()
        wrong[change[0], change[1]] = change[2]  # a source outside, a target outside, or the same target twice
        with pytest.raises(errors, match="pairs must have sources"):
            conv(values, weight, wrong, start, None, rows)
        with pytest.raises(errors, match="pairs must have sources"):
            by_weight(values, grad, wrong, start, None)
    with pytest.raises(errors, match="neighbours must be"):
        torch.ops.gan3d.neighbour_pairs(neighbours(some((4, 4, 4))).long())
    with pytest.raises(errors, match="fine_words|words must have shape"):
        grid = some((8, 8, 8))
        torch.ops.gan3d.upsampling_pairs(*grid, *grid[:2])
