"""The structure of sparse grids: bits, rows, neighbours, pruning and upsampling, and the values that move with them."""

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gan3d import ops
from gan3d.ops.cells import Resolution, Voxels, cell_position
from gan3d.ops.reference import voxels as reference
from gan3d.ops.voxels import (
    Pruned,
    compact,
    gather_voxels,
    mask_of,
    neighbours,
    positions_of,
    prune,
    prune_dense,
    rank_words,
    row_of,
    scatter_voxels,
    upsample,
    upsample_values,
    voxels_from_mask,
    voxels_from_positions,
)

compiled = pytest.mark.skipif(ops.backend() == "reference", reason="no compiled ops: no C++ compiler")
ROOT = Path(__file__).resolve().parents[2]
DTYPES = [torch.float32, torch.float64]
# one block; one cube; many cubes, of 4³, 8³ and 16³
GRIDS: list[Resolution] = [(4, 4, 4), (16, 16, 16), (12, 4, 20), (8, 24, 16), (48, 16, 32)]
SHARES = [0.0, 0.02, 0.4, 1.0]


def uniform(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(*size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def normal(*size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def some(resolution: Resolution, share: float = 0.3, seed: int = 0) -> Voxels:
    return voxels_from_mask(uniform(*resolution, seed=seed) < share)


def same(a: Voxels, b: Voxels) -> bool:
    return torch.equal(a.words, b.words) and torch.equal(a.rank, b.rank) and a.resolution == b.resolution


def rows(voxels: Voxels) -> int:
    return int(voxels.rank[-1])


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("resolution", GRIDS)
def test_bits_are_the_mask_in_the_order_of_cells(resolution: Resolution, share: float) -> None:
    mask = uniform(*resolution) < share
    voxels = voxels_from_mask(mask)
    places = cell_position(torch.arange(math.prod(resolution)), resolution)
    exists = mask[tuple(places.T)]
    assert voxels.words.dtype == torch.int64 and voxels.rank.dtype == torch.int32
    assert torch.equal(((voxels.words[:, None] >> torch.arange(64)) & 1).bool().flatten(), exists)
    before = torch.cat([torch.zeros(1, dtype=torch.int64), exists.long().cumsum(0)])[::64]
    assert torch.equal(voxels.rank.long(), before)
    assert torch.equal(rank_words(voxels.words), voxels.rank)
    assert torch.equal(mask_of(voxels), mask)
    assert torch.equal(positions_of(voxels).long(), places[exists]) and positions_of(voxels).dtype == torch.int32
    assert same(voxels, Voxels(*reference.voxels_from_mask(mask), resolution))
    assert torch.equal(reference.voxel_mask(voxels.words, resolution), mask)
    assert torch.equal(reference.voxel_positions(*voxels), positions_of(voxels))


def test_a_transposed_mask_is_read_as_it_is_indexed() -> None:
    mask = uniform(8, 12, 16) < 0.3
    assert torch.equal(mask_of(voxels_from_mask(mask.permute(2, 0, 1))), mask.permute(2, 0, 1))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16], ids=str)
@pytest.mark.parametrize("resolution", GRIDS)
def test_positions_make_the_grid_in_any_order_and_number(resolution: Resolution, dtype: torch.dtype) -> None:
    voxels = some(resolution)
    positions = positions_of(voxels)
    shuffled = positions[torch.randperm(len(positions), generator=torch.Generator().manual_seed(0))]
    again = torch.cat([shuffled, positions[::3], positions[:1].expand(5, -1)]).to(dtype)
    assert same(voxels_from_positions(again, resolution), voxels)
    assert same(voxels_from_positions(again[:0], resolution), some(resolution, 0.0))
    words, rank = reference.voxels_from_positions(again, resolution)
    assert same(Voxels(words, rank, resolution), voxels)


@pytest.mark.parametrize("at", [(-1, 0, 0), (0, 12, 0), (0, 0, 2**32), (0, 0, -(2**32) + 1)])
def test_positions_outside_are_refused(at: tuple[int, int, int]) -> None:
    with pytest.raises(IndexError, match="outside the grid"):
        voxels_from_positions(torch.tensor([[1, 2, 3], at]), (8, 12, 16))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("resolution", GRIDS)
def test_row_of_a_position(resolution: Resolution, share: float, dtype: torch.dtype) -> None:
    voxels = some(resolution, share)
    positions = positions_of(voxels).to(dtype)
    assert torch.equal(row_of(voxels, positions), torch.arange(len(positions), dtype=torch.int32))
    anywhere = (uniform(20, 30, 3) * 60 - 6).floor().to(dtype)  # a cell in two is outside
    found, mask = row_of(voxels, anywhere), mask_of(voxels)
    expected = torch.tensor([all(0 <= a < s for a, s in zip(p, resolution, strict=True)) and bool(mask[tuple(p)])
                             for p in anywhere.reshape(-1, 3).tolist()]).reshape(20, 30)
    assert torch.equal(found >= 0, expected) and (found[~expected] == -1).all()
    assert torch.equal(positions[found[expected].long()], anywhere[expected])
    assert torch.equal(row_of(voxels, anywhere[:, ::2]), found[:, ::2])
    assert torch.equal(reference.voxel_rows(voxels.words, voxels.rank, anywhere.reshape(-1, 3), resolution),
                       found.flatten())
    assert row_of(voxels, anywhere[:0]).shape == (0, 30) and row_of(voxels, anywhere[0, 0]).shape == ()


def test_a_position_is_not_cut_to_32_bits() -> None:
    everything = some((4, 4, 4), 1.0)
    assert row_of(everything, torch.tensor([[2**32, 0, 0], [0, 0, -(2**32)], [0, 2**62, 0]])).tolist() == [-1] * 3


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("resolution", GRIDS)
def test_neighbours_are_the_rows_around(resolution: Resolution, share: float) -> None:
    voxels = some(resolution, share)
    found, own = neighbours(voxels), torch.arange(rows(voxels))
    steps = torch.cartesian_prod(*[torch.arange(-1, 2)] * 3)
    assert found.dtype == torch.int32
    assert torch.equal(found, row_of(voxels, positions_of(voxels).long()[:, None] + steps))
    assert torch.equal(found[:, 13].long(), own)
    for k in range(27):  # the neighbour's opposite neighbour is oneself
        has = found[:, k] >= 0
        assert torch.equal(found[found[has, k].long(), 26 - k].long(), own[has])
    assert torch.equal(reference.voxel_neighbours(*voxels), found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [0, 1, 3, 4, 32, 37])
@pytest.mark.parametrize("resolution, share", [((16, 16, 16), 0.3), ((8, 24, 16), 1.0), ((12, 4, 20), 0.0)])
def test_values_move_between_grid_and_table(resolution: Resolution, share: float, channels: int,
                                            dtype: torch.dtype) -> None:
    voxels, dense = some(resolution, share), normal(*resolution, channels, dtype=dtype)
    positions = tuple(positions_of(voxels).long().T)
    table = gather_voxels(dense, voxels)
    assert torch.equal(table, dense[positions])
    assert torch.equal(reference.gather_voxels(dense, voxels.words, voxels.rank), table)
    for fill in (0.0, -2.5):
        back = scatter_voxels(table, voxels, fill)
        assert torch.equal(back, torch.where(mask_of(voxels)[..., None], dense, fill))
        assert torch.equal(reference.scatter_voxels(table, *voxels, fill), back)


@pytest.mark.parametrize("code", ["gather", "scatter", "compact", "upsample"])
def test_first_and_second_derivatives(code: str) -> None:
    voxels = some((8, 4, 4))
    n = rows(voxels)
    pruned = prune(voxels, uniform(n, seed=2), 0.5)
    call: Callable[[Tensor], Tensor] = {
        "gather": lambda x: gather_voxels(x * x, voxels), "scatter": lambda x: scatter_voxels(x * x, voxels, 1.5),
        "compact": lambda x: compact(x * x, pruned), "upsample": lambda x: upsample_values(x * x)}[code]
    x = normal(*((8, 4, 4) if code == "gather" else (n,)), 2).requires_grad_(True)
    torch.autograd.gradcheck(call, x)
    torch.autograd.gradgradcheck(call, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 5, 32])
@pytest.mark.parametrize("side", [12, 64])  # a gradient of 64³ is large enough to come in pages of its own
def test_gradients_match_the_reference(side: int, channels: int, dtype: torch.dtype) -> None:
    voxels = some((side, side, side), 0.7)
    score = uniform(rows(voxels), seed=1)
    pruned = prune(voxels, score, 0.8)
    old = reference.prune_voxels(voxels.words, voxels.rank, score, 0.8, 0, voxels.resolution)[2]
    values = normal(rows(voxels), channels, dtype=dtype).requires_grad_(True)
    grid = normal(side, side, side, channels, dtype=dtype).requires_grad_(True)
    pairs = [(values, compact(values, pruned), reference.compact_rows(values, old)),
             (values, scatter_voxels(values, voxels), reference.scatter_voxels(values, *voxels, 0.0)),
             (grid, gather_voxels(grid, voxels), reference.gather_voxels(grid, *voxels[:2]))]
    for x, native, plain in pairs:
        weight = normal(*native.shape, seed=3, dtype=dtype)
        assert torch.equal(native, plain)
        a, b = torch.autograd.grad(native, x, weight)[0], torch.autograd.grad(plain, x, weight)[0]
        assert torch.equal(a, b) and a.is_contiguous()
        assert torch.equal(a.mul_(2), 2 * b)  # it is memory like any other
    few = values[:1000]
    native, plain = upsample_values(few), reference.upsample_rows(few)
    assert torch.equal(native, plain)
    weight = normal(*native.shape, seed=3, dtype=dtype)
    a, b = torch.autograd.grad(native, values, weight)[0], torch.autograd.grad(plain, values, weight)[0]
    torch.testing.assert_close(a, b, rtol=0, atol=64 * torch.finfo(dtype).eps)  # eight terms of at most 5, reordered


def test_constants_ask_for_no_gradient() -> None:
    voxels, values = some((8, 8, 8)), normal(8, 8, 8, 2)
    assert not gather_voxels(values, voxels).requires_grad
    half = gather_voxels(values.half(), voxels)
    assert half.dtype == torch.float32 and torch.equal(half, gather_voxels(values.half().float(), voxels))
    assert torch.equal(gather_voxels(values.flip(0)[..., ::2], voxels), gather_voxels(values.flip(0), voxels)[:, ::2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dilate", [0, 1, 2, 5])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("resolution", GRIDS)
def test_prune_keeps_what_scores_and_what_is_near(resolution: Resolution, share: float, dilate: int,
                                                  dtype: torch.dtype) -> None:
    voxels = some(resolution, share)
    score = uniform(rows(voxels), seed=1, dtype=dtype)
    pruned = prune(voxels, score, 0.96, dilate)
    # independently: the largest score of a cube of 2·dilate + 1 cells around
    dense = scatter_voxels(score[:, None], voxels, -1.0)[None, ..., 0].float()
    near = torch.nn.functional.max_pool3d(dense, 2 * dilate + 1, 1, dilate)[0]
    limit = torch.tensor(0.96, dtype=dtype).float()
    expected = voxels_from_mask((near >= limit) & mask_of(voxels))
    assert same(pruned.voxels, expected)
    assert_maps(voxels, pruned)
    plain = reference.prune_voxels(voxels.words, voxels.rank, score, 0.96, dilate, resolution)
    for a, b in zip((*pruned.voxels[:2], *pruned[1:]), plain, strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype


def assert_maps(voxels: Voxels, pruned: Pruned) -> None:
    before, after = positions_of(voxels), positions_of(pruned.voxels)
    assert pruned.new_to_old.dtype == pruned.old_to_new.dtype == torch.int32
    assert torch.equal(before[pruned.new_to_old.long()], after)
    assert torch.equal(row_of(pruned.voxels, before), pruned.old_to_new)
    assert (pruned.new_to_old.diff() > 0).all()


@pytest.mark.parametrize("dilate", [0, 1, 3])
@pytest.mark.parametrize("resolution", GRIDS)
def test_a_dense_grid_is_pruned_like_a_full_one(resolution: Resolution, dilate: int) -> None:
    full, score = some(resolution, 1.0), uniform(*resolution)
    voxels = prune_dense(score, 0.97, dilate)
    table = gather_voxels(score[..., None], full)[:, 0]
    assert same(voxels, prune(full, table, 0.97, dilate).voxels)
    assert same(voxels, Voxels(*reference.voxels_from_scores(score, 0.97, dilate), resolution))
    assert same(voxels, prune_dense(score.double(), float(torch.tensor(0.97)), dilate))
    assert same(voxels, prune_dense(score.permute(2, 1, 0).contiguous().permute(2, 1, 0), 0.97, dilate))


def test_the_threshold_itself_is_kept_and_nan_is_not() -> None:
    voxels = some((4, 4, 4), 1.0)
    score = torch.zeros(64)
    score[:5] = torch.tensor([0.1, math.nan, math.inf, -math.inf, 0.2])
    assert prune(voxels, score, 0.1).new_to_old.tolist() == [0, 2, 4]  # 0.1 in float32, not in float64
    assert prune(voxels, score, torch.finfo(torch.float32).tiny).new_to_old.tolist() == [0, 2, 4]
    assert prune(voxels, score, math.nan).new_to_old.shape == (0,)
    assert len(prune(voxels, score, -math.inf).new_to_old) == 63


def test_dilation_of_one_voxel_is_a_cube_and_ends_at_the_border() -> None:
    full = some((20, 16, 12), 1.0)
    for at, dilate in [((9, 8, 7), 2), ((0, 15, 4), 3), ((19, 0, 11), 1), ((9, 8, 7), 40)]:
        score = torch.zeros(rows(full))
        score[row_of(full, torch.tensor(at)).long()] = 1
        kept = positions_of(prune(full, score, 0.5, dilate).voxels)
        side = [min(a + dilate, s - 1) - max(a - dilate, 0) + 1 for a, s in zip(at, full.resolution, strict=True)]
        assert len(kept) == math.prod(side) and ((kept - torch.tensor(at)).abs() <= dilate).all()


def test_dilation_crosses_gaps_but_adds_no_voxel() -> None:
    voxels = voxels_from_positions(torch.tensor([[1, 1, 1], [3, 1, 1], [5, 1, 1]]), (8, 8, 8))
    score = torch.zeros(3)
    score[0] = 1  # the first in the order of cells is (1, 1, 1)
    assert positions_of(prune(voxels, score, 0.5, 1).voxels).tolist() == [[1, 1, 1]]
    assert positions_of(prune(voxels, score, 0.5, 2).voxels).tolist() == [[1, 1, 1], [3, 1, 1]]


def test_compact_of_scattered_rows_is_what_was_kept() -> None:
    voxels = some((16, 8, 8))
    values, pruned = normal(rows(voxels), 3), prune(voxels, uniform(rows(voxels), seed=1), 0.5)
    assert torch.equal(compact(values, pruned), values[pruned.old_to_new >= 0])
    nothing = prune(voxels, uniform(rows(voxels), seed=1), 2.0)
    assert compact(values, nothing).shape == (0, 3) and (nothing.old_to_new == -1).all()
    leaf = values.clone().requires_grad_(True)
    assert torch.equal(torch.autograd.grad(compact(leaf, nothing).sum(), leaf)[0], torch.zeros_like(values))
    assert torch.equal(compact(values[:, ::2], pruned), compact(values, pruned)[:, ::2])


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("resolution", GRIDS)
def test_children_are_the_eight_rows_after_each_other(resolution: Resolution, share: float) -> None:
    voxels = some(resolution, share)
    fine, parent = upsample(voxels)
    x, y, z = resolution
    assert fine.resolution == (2 * x, 2 * y, 2 * z)
    mask = mask_of(voxels).repeat_interleave(2, 0).repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert same(fine, voxels_from_mask(mask))
    assert torch.equal(parent, torch.arange(rows(voxels), dtype=torch.int32).repeat_interleave(8))
    octants = torch.tensor([[k & 1, k >> 1 & 1, k >> 2] for k in range(8)], dtype=torch.int32)
    children = (2 * positions_of(voxels)[:, None] + octants).flatten(0, 1)
    assert torch.equal(positions_of(fine), children)
    for a, b in zip((fine.words, fine.rank, parent), reference.upsample_voxels(*voxels), strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype


@pytest.mark.parametrize("resolution", GRIDS)
def test_pruning_after_upsampling_keeps_every_surviving_value(resolution: Resolution) -> None:
    voxels = some(resolution, 0.4)
    values = normal(rows(voxels), 3)
    up = upsample(voxels)
    score = uniform(rows(up.voxels), seed=4)
    pruned = prune(up.voxels, score, 0.6)
    left = compact(upsample_values(values), pruned)
    parents = row_of(voxels, positions_of(pruned.voxels) // 2)
    assert torch.equal(left, values[parents.long()]) and torch.equal(parents, up.parent[pruned.new_to_old.long()])
    # and the other way round: children of what is kept are what is kept of the children
    first = prune(voxels, score[::8], 0.6)
    fine = prune(up.voxels, score[::8].repeat_interleave(8), 0.6)
    assert same(upsample(first.voxels).voxels, fine.voxels)
    assert torch.equal(upsample_values(compact(values, first)), compact(upsample_values(values), fine))


def test_what_cannot_be_doubled_is_refused() -> None:
    wide = some((1028, 4, 4))
    with pytest.raises(ValueError, match="from 4 to 2048"):
        upsample(wide)
    # 1024³ alone has cubes at the cap, whose doubled grid would be in another order; never touched, so never there
    cells = Voxels(torch.empty(2**24, dtype=torch.int64), torch.empty(2**24 + 1, dtype=torch.int32), (1024, 1024, 1024))
    with pytest.raises(ValueError, match="fewer than 2"):
        upsample(cells)


def all_results() -> list[Tensor]:
    mask = uniform(96, 64, 64) < 0.3
    voxels = voxels_from_mask(mask)
    score, n = uniform(rows(voxels), seed=1), rows(voxels)
    positions = positions_of(voxels)
    values, dense = normal(n, 6).requires_grad_(True), normal(96, 64, 64, 2).requires_grad_(True)
    pruned = prune(voxels, score, 0.9, 1)
    moved = [compact(values, pruned), gather_voxels(dense, voxels), scatter_voxels(values, voxels, 1.0),
             upsample_values(values)]
    grads = torch.autograd.grad([m.square().sum() for m in moved], [values, dense])
    return [*voxels[:2], positions, mask_of(voxels), row_of(voxels, positions), *pruned.voxels[:2], *pruned[1:],
            prune_dense(normal(96, 64, 64), 2.0, 2).words, *upsample(voxels).voxels[:2], neighbours(voxels),
            voxels_from_positions(positions.flip(0), (96, 64, 64)).words, *moved, *grads]


@compiled
def test_results_do_not_depend_on_threads() -> None:
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            found.append(all_results())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) and torch.equal(b, c) for a, b, c in zip(*found, strict=True))


@compiled
def test_ops_are_well_behaved() -> None:
    r, (words, rank, resolution) = torch.ops.gan3d, some((8, 4, 12))
    n = int(rank[-1])
    values, dense = normal(n, 3).requires_grad_(True), normal(8, 4, 12, 3).requires_grad_(True)
    index = torch.arange(0, n, 2, dtype=torch.int32)
    calls: list[tuple] = [
        (r.voxels_from_mask, uniform(*resolution) < 0.5), (r.voxels_from_scores, uniform(*resolution), 0.5, 1),
        (r.voxels_from_positions, torch.tensor([[1, 2, 3]]), resolution), (r.rank_words, words),
        (r.voxel_mask, words, resolution), (r.voxel_positions, words, rank, resolution),
        (r.voxel_rows, words, rank, torch.tensor([[1, 2, 3], [-1, 0, 0]]), resolution),
        (r.gather_voxels, dense, words, rank, None), (r.gather_voxels, dense, words, rank, n),
        (r.scatter_voxels, values, words, rank, resolution, 1.0),
        (r.prune_voxels, words, rank, uniform(n), 0.5, 1, resolution), (r.compact_rows, values, index),
        (r.spread_rows, normal(len(index), 3).requires_grad_(True), index, n),
        (r.upsample_voxels, words, rank, resolution), (r.upsample_rows, values),
        (r.pool_rows, normal(16, 3).requires_grad_(True)), (r.voxel_neighbours, words, rank, resolution)]
    for op, *arguments in calls:
        torch.library.opcheck(op, tuple(arguments))


@compiled
def test_flops_are_counted() -> None:
    voxels, values = some((8, 8, 8)), normal(16, 3).requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        upsample_values(values).sum().backward()
        prune(voxels, uniform(rows(voxels)), 0.5)
        neighbours(voxels)
    assert counter.get_total_flops() == 16 * 3 * 7 + rows(voxels)


GRAPH = """
import torch
from gan3d.ops.voxels import *
from gan3d.ops.voxels import Voxels

def shrink(mask, score, values):
    voxels = voxels_from_mask(mask)
    pruned = prune(voxels, score, 0.5, 1)
    left = compact(values, pruned)
    up = upsample(pruned.voxels)
    dense = scatter_voxels(values, voxels, 1.0)
    return (left.square().sum() + gather_voxels(dense.square(), pruned.voxels).sum() + upsample_values(left).sum(),
            pruned.old_to_new, up.voxels.words, neighbours(pruned.voxels).sum(), row_of(voxels, positions_of(voxels)))

compiled = torch.compile(shrink, fullgraph=True, backend="aot_eager")
for seed in range(3):
    random = torch.Generator().manual_seed(seed)
    mask = torch.rand(8, 8, 12, generator=random) < 0.4
    n = int(mask.sum())
    score, values = torch.rand(n, generator=random) - 0.4, torch.randn(n, 3, generator=random).requires_grad_(True)
    a, b = compiled(mask, score, values), shrink(mask, score, values)
    assert len(a) == 5 and all(torch.equal(x, y) for x, y in zip(a, b))
    assert torch.equal(torch.autograd.grad(a[0], values)[0], torch.autograd.grad(b[0], values)[0])
"""


@compiled
def test_everything_compiles_as_one_graph() -> None:
    # by itself: the tracer does not follow the checks of shapes that these tests switch on
    done = subprocess.run([sys.executable, "-c", GRAPH], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_arguments_that_make_no_sense_are_refused() -> None:
    voxels = some((8, 8, 8))
    n = rows(voxels)
    with pytest.raises(ValueError, match="multiples of 4"):
        voxels_from_mask(torch.ones(8, 6, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="multiples of 4"):
        prune_dense(torch.ones(8, 8, 2), 0.5)
    with pytest.raises(ValueError, match="do not fit resolution"):
        positions_of(Voxels(voxels.words, voxels.rank, (8, 8, 4)))
    with pytest.raises(ValueError, match="do not fit resolution"):
        neighbours(Voxels(voxels.words, voxels.rank[:-1], (8, 8, 8)))
    with pytest.raises(ValueError, match="dilate must be"):
        prune(voxels, torch.zeros(n), 0.5, -1)
    with pytest.raises(ValueError, match="score"):
        prune(voxels, torch.zeros(n + 1), 0.5)
    with pytest.raises(ValueError, match="cells, the grid"):
        gather_voxels(torch.zeros(8, 8, 4, 2), voxels)
    with pytest.raises(ValueError, match="rows, what was pruned"):
        compact(torch.zeros(n + 1, 2), prune(voxels, torch.zeros(n), 0.5))
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        scatter_voxels(torch.zeros(n + 1, 2), voxels)


@compiled
def test_the_ops_name_what_is_wrong() -> None:
    r, (words, rank, resolution) = torch.ops.gan3d, some((8, 8, 8))
    n = int(rank[-1])
    index = torch.tensor([0, 3, 5], dtype=torch.int32)
    wrong = rank.clone()
    wrong[3] += 1
    cases: list[tuple] = [
        ("voxels_from_mask: mask must be", r.voxels_from_mask, torch.ones(8, 8, 8)),
        ("mask must be contiguous", r.voxels_from_mask, torch.ones(8, 8, 16, dtype=torch.bool)[..., ::2]),
        ("positions must be int32 or int64", r.voxels_from_positions, torch.ones(2, 3), resolution),
        ("positions must have shape", r.voxel_rows, words, rank, torch.ones(2, 4, dtype=torch.int64), resolution),
        ("words must have shape", r.voxel_mask, words[1:], resolution),
        ("words must be", r.rank_words, words.int()),
        ("rank must have shape", r.voxel_positions, words, rank[1:], resolution),
        ("rank is not that of words", r.voxel_positions, words, wrong, resolution),
        ("rank is not that of words", r.prune_voxels, words, wrong, torch.ones(n), 0.5, 0, resolution),
        ("rank is not that of words", r.scatter_voxels, torch.ones(n, 2), words, wrong, resolution, 0.0),
        ("rank is not that of words", r.voxel_neighbours, words, rank + 1, resolution),
        ("score must have shape", r.prune_voxels, words, rank, torch.ones(n + 1), 0.5, 0, resolution),
        ("score must be float32 or float64", r.prune_voxels, words, rank, torch.ones(n).half(), 0.5, 0, resolution),
        ("dilate must be", r.prune_voxels, words, rank, torch.ones(n), 0.5, -1, resolution),
        ("dense must have shape", r.gather_voxels, torch.ones(8, 8, 8), words, rank, None),
        ("rows is", r.gather_voxels, torch.ones(8, 8, 8, 1), words, rank, n + 1),
        ("values must have shape", r.scatter_voxels, torch.ones(n + 1, 2), words, rank, resolution, 0.0),
        ("new_to_old must increase", r.compact_rows, torch.ones(5, 2), index),
        ("new_to_old must increase", r.compact_rows, torch.ones(9, 2), index.flip(0)),
        ("new_to_old must increase", r.spread_rows, torch.ones(3, 2), index - 1, 9),
        ("new_to_old must increase", r.spread_rows, torch.ones(3, 2), index * 0 + 2, 9),
        ("values must have shape", r.spread_rows, torch.ones(4, 2), index, 9),
        ("entries for", r.spread_rows, torch.ones(3, 2), index, 2),
        ("multiple of 8", r.pool_rows, torch.ones(9, 2)),
        ("from 4 to 2048", r.upsample_voxels, torch.zeros(257, dtype=torch.int64), rank, (1028, 4, 4)),
        ("2\\^31 cells", r.rank_words, torch.empty(2**25, dtype=torch.int64)),
    ]
    for message, op, *arguments in cases:
        with pytest.raises((ValueError, TypeError, IndexError, RuntimeError), match=message):
            op(*arguments)
