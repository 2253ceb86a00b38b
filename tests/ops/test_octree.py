"""Octrees: built, queried and traversed, against closed forms, a walk over the tree in Python, and the reference."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gan3d import ops
from gan3d.ops.octree import Octree, Segments, build_octree, octree_query, octree_traverse, refine_octree
from gan3d.ops.reference import octree as reference

compiled = pytest.mark.skipif(ops.backend() == "reference", reason="no compiled ops: no C++ compiler")
ROOT = Path(__file__).resolve().parents[2]
DTYPES = [torch.float32, torch.float64]
BOX = [[-1.0, -0.5, -2.0], [1.0, 1.5, 1.0]]  # not a cube, not about the origin
UNIT = [[0.0] * 3, [1.0] * 3]


def positions(n: int, depth: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 1 << depth, (n, 3), generator=torch.Generator().manual_seed(seed))


def full(depth: int) -> Octree:
    side = torch.arange(1 << depth)
    return build_octree(torch.cartesian_prod(side, side, side), depth)


def leaves(tree: Octree) -> dict[int, tuple[list[float], float]]:
    """Low corner and edge in the unit cube of every leaf, by a walk from the root."""
    child, found = tree.child.reshape(-1, 8).tolist(), {}
    todo = [(0, (0.0, 0.0, 0.0), 1.0)]
    while todo:
        node, corner, size = todo.pop()
        for cell in range(8):
            low = [c + size / 2 * ((cell >> (2 - axis)) & 1) for axis, c in enumerate(corner)]
            if child[node][cell]:
                todo.append((node + child[node][cell], tuple(low), size / 2))
            else:
                found[8 * node + cell] = (low, size / 2)
    return found


def boxes(tree: Octree, box: Tensor) -> tuple[Tensor, Tensor]:
    """Low and high corner in the world of every row of the tables; NaN where a row is no leaf."""
    low, high = torch.full((2, 8 * len(tree.child), 3), math.nan, dtype=torch.float64)
    for leaf, (corner, size) in leaves(tree).items():
        low[leaf] = torch.tensor(corner, dtype=torch.float64)
        high[leaf] = low[leaf] + size
    box = box.double()
    return box[0] + low * (box[1] - box[0]), box[0] + high * (box[1] - box[0])


def rays(n: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Origins in and around BOX, many directions towards it, some along one axis or two."""
    random = torch.Generator().manual_seed(seed)
    o = 2 * torch.randn(n, 3, generator=random, dtype=torch.float64)
    d = torch.randn(n, 3, generator=random, dtype=torch.float64)
    d[::2] -= 2 * o[::2]
    o[1::5] *= 0.2
    d[2::7, 0] = 0
    d[3::11, 1:] = 0
    d[4::11, 2] = -0.0
    d[(d == 0).all(-1), 1] = 1.0
    return o.to(dtype), torch.nn.functional.normalize(d, dim=-1).to(dtype)


def chord(o: Tensor, d: Tensor, box: Tensor, near: float = 0.0, far: float = math.inf) -> Tensor:
    """The slab test in float64, for rays that are not in a face."""
    o, d, box = o.double(), d.double(), box.double()
    a, b = (box[0] - o) / d, (box[1] - o) / d
    first, last = torch.minimum(a, b).amax(-1).clamp(min=near), torch.maximum(a, b).amin(-1).clamp(max=far)
    return torch.where(first < last, last - first, 0.0)


def total(segments: Segments, n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.float64).index_add(0, segments.ray_index.long(), segments.delta.double())


def same(a: Segments, b: Segments) -> bool:
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


# building


@pytest.mark.parametrize("n, depth", [(1, 1), (1, 6), (50, 4), (300, 7), (2000, 3)])
def test_every_position_is_a_leaf_of_the_deepest_level_and_no_node_is_idle(n: int, depth: int) -> None:
    p = positions(n, depth)
    tree = build_octree(p, depth)
    leaf, side = octree_query(tree, (p.double() + 0.5) / (1 << depth))
    assert (side == 0.5**depth).all()
    assert len(leaf.unique()) == len(p.unique(dim=0))
    needed = set()
    for x, y, z in p.tolist():
        needed |= {(level, x >> (depth - level), y >> (depth - level), z >> (depth - level)) for level in range(depth)}
    assert len(tree.child) == len(needed)


@pytest.mark.parametrize("n, depth", [(0, 5), (1, 5), (300, 7)])
def test_offsets_lead_to_every_node_once_in_breadth_first_order(n: int, depth: int) -> None:
    child = build_octree(positions(n, depth), depth).child
    assert child.dtype == torch.int32
    offsets = child.reshape(-1)
    rows = offsets.nonzero()[:, 0]
    # from parents in their order to the nodes 1, 2, 3, …
    assert torch.equal(rows // 8 + offsets[rows], torch.arange(1, len(child)))


def test_building_is_refining_the_root_by_all_positions() -> None:
    depth, p = 6, positions(200, 6)
    tree = Octree(torch.zeros(1, 2, 2, 2, dtype=torch.int32))
    for _ in range(depth - 1):
        tree = refine_octree(tree, octree_query(tree, (p.double() + 0.5) / (1 << depth))[0])
    assert torch.equal(tree.child, build_octree(p, depth).child)


def test_cells_are_in_the_order_x_y_z() -> None:
    tree = build_octree(torch.tensor([[2, 1, 0]]), 2)  # x in the upper half, y and z in the lower
    assert tree.child.nonzero().tolist() == [[0, 1, 0, 0]] and tree.child[0, 1, 0, 0] == 1
    assert octree_query(tree, torch.tensor([0.6, 0.3, 0.1]))[0] == 8 * 1 + 2  # x = 0, y = 1, z = 0 in node 1


@pytest.mark.parametrize("n, depth", [(0, 4), (1, 1), (37, 2), (5000, 8), (999, 20)])
def test_building_matches_the_reference(n: int, depth: int) -> None:
    p = positions(n, depth)
    expected = reference.build_octree(p, depth)
    assert torch.equal(build_octree(p, depth).child, expected)
    assert torch.equal(build_octree(p.int(), depth).child, expected)
    assert torch.equal(build_octree(torch.cat([p, p.flip(0)]), depth).child, expected)  # order, repeats: no matter
    assert torch.equal(build_octree(p.T.contiguous().T, depth).child, expected)


@pytest.mark.parametrize("bad", [-1, 8])
def test_positions_outside_are_refused(bad: int) -> None:
    p = positions(20, 3)
    p[11, 1] = bad
    for dtype in (torch.int32, torch.int64):
        with pytest.raises(ValueError, match="positions must lie in"):
            build_octree(p.to(dtype), 3)
    with pytest.raises(ValueError, match="positions must lie in"):
        reference.build_octree(p, 3)
    with pytest.raises(ValueError, match="depth must be 1 to 20"):
        build_octree(p, 21)
    with pytest.raises((TypeError, RuntimeError), match="int32 or int64"):
        build_octree(p.short(), 3)


def test_only_leaves_can_be_refined() -> None:
    tree = build_octree(torch.tensor([[2, 1, 0]]), 2)
    inner = int(tree.child.reshape(-1).nonzero()[0])
    for leaf in (inner, -1, 16):
        with pytest.raises(ValueError, match="leaf must name leaves"):
            refine_octree(tree, torch.tensor([0, leaf]))
    assert torch.equal(refine_octree(tree, torch.zeros(0, dtype=torch.int32)).child, tree.child)


# queries


@pytest.mark.parametrize("dtype", DTYPES)
def test_points_lie_in_the_leaf_that_is_found(dtype: torch.dtype) -> None:
    tree = build_octree(positions(100, 6), 6)
    points = torch.rand(7, 43, 3, generator=torch.Generator().manual_seed(0), dtype=dtype)
    points[0, :9] = (points[0, :9] * 8).floor() / 8  # on faces, edges and corners
    leaf, side = octree_query(tree, points)
    low, high = boxes(tree, torch.tensor(UNIT))
    assert leaf.shape == (7, 43) and side.dtype == dtype and leaf.dtype == torch.int32
    assert ((low[leaf.long()] <= points) & (points < high[leaf.long()])).all()
    assert torch.equal(side.double(), (high - low)[leaf.long()][..., 0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 7, 333])
def test_queries_match_the_reference(dtype: torch.dtype, n: int) -> None:
    tree = build_octree(positions(500, 9), 9)
    points = 1.2 * torch.rand(n, 3, generator=torch.Generator().manual_seed(n), dtype=dtype) - 0.1
    points[1::9, 0] = math.nan
    points[2::9, 1] = 1.0
    points[3::9, 2] = 1.0 - torch.finfo(dtype).eps
    points[4::9, 0] = -0.0
    points[5::9] = points[5::9].clamp(0, 0.9).mul(16).floor().div(16)
    leaf, side = octree_query(tree, points)
    expected = reference.octree_query(tree.child, points)
    assert torch.equal(leaf, expected[0]) and torch.equal(side, expected[1])
    outside = ~((points >= 0) & (points < 1)).all(-1)
    assert torch.equal(leaf == -1, outside) and torch.equal(side == 0, outside)


# traversal


# tolerance: some sixty pieces, whose ends are off by a few roundings of t < 10
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("near, far", [(0.0, math.inf), (0.7, 2.5)])
def test_deltas_add_up_to_the_chord(dtype: torch.dtype, tolerance: float, near: float, far: float) -> None:
    tree, box = build_octree(positions(300, 6), 6), torch.tensor(BOX, dtype=dtype)
    o, d = rays(500, dtype)
    segments = octree_traverse(tree, o, d, box, near, far)
    expected = chord(o, d, box, near, far)
    assert (expected > 0).sum() > 150 and (expected == 0).sum() > 50
    torch.testing.assert_close(total(segments, 500), expected, atol=tolerance, rtol=0)
    assert (segments.delta > 0).all()
    counted = torch.arange(500, dtype=torch.int32).repeat_interleave(segments.offsets.diff())
    assert torch.equal(segments.ray_index, counted)


def test_constant_density_lets_through_exp_of_density_times_chord() -> None:
    tree, box = build_octree(positions(300, 6), 6), torch.tensor(BOX, dtype=torch.float64)
    o, d = rays(300)
    density = torch.full((8 * len(tree.child),), 0.8, dtype=torch.float64)
    s = octree_traverse(tree, o, d, box)
    for i, length in enumerate(chord(o, d, box).tolist()):
        row = slice(int(s.offsets[i]), int(s.offsets[i + 1]))
        passed = (1 - (1 - torch.exp(-density[s.leaf[row].long()] * s.delta[row]))).cumprod(0)
        # some 60 factors, each off by an ulp
        assert abs((float(passed[-1]) if len(passed) else 1.0) - math.exp(-0.8 * length)) < 1e-13


# tolerance: roundings of the point o + t·d, |o| < 10
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_segments_are_the_parts_of_the_ray_inside_their_leaves(dtype: torch.dtype, tolerance: float) -> None:
    tree, box = build_octree(positions(300, 6, seed=1), 6), torch.tensor(BOX, dtype=dtype)
    o, d = rays(400, dtype, seed=1)
    s = octree_traverse(tree, o, d, box)
    low, high = (x[s.leaf.long()] for x in boxes(tree, box))
    at = o.double()[s.ray_index.long()] + s.t.double()[:, None] * d.double()[s.ray_index.long()]
    assert ((low - tolerance <= at) & (at <= high + tolerance)).all()  # NaN, no leaf, would fail too
    half = s.delta.double() / 2
    start, end = s.t.double() - half, s.t.double() + half
    follows = s.ray_index[1:] == s.ray_index[:-1]
    torch.testing.assert_close(start[1:][follows], end[:-1][follows], atol=tolerance, rtol=0)
    # no ray meets a leaf twice: cells are convex
    assert len(torch.stack([s.ray_index, s.leaf]).unique(dim=1)[0]) == len(s.leaf)


def test_a_full_tree_is_a_uniform_grid() -> None:
    depth, n = 3, 200
    tree, box = full(depth), torch.tensor(BOX, dtype=torch.float64)
    o, d = rays(n)
    s = octree_traverse(tree, o, d, box)
    index = {tuple(round(c * 8) for c in low): leaf for leaf, (low, _) in leaves(tree).items()}
    assert len(index) == 512
    planes = box[0] + torch.linspace(0, 1, 9, dtype=torch.float64)[:, None] * (box[1] - box[0])
    for i in range(n):
        cuts = ((planes - o[i]) / d[i]).reshape(-1)
        cuts = torch.cat([cuts[cuts.isfinite() & (cuts > 0)], cuts.new_zeros(1)]).sort().values
        cuts = cuts[torch.cat([cuts.new_ones(1), cuts.diff()]) > 1e-12]  # planes met at once
        middle, delta = (cuts[1:] + cuts[:-1]) / 2, cuts.diff()
        cell = ((o[i] + middle[:, None] * d[i] - box[0]) / (box[1] - box[0]) * 8).floor().long()
        inside = ((cell >= 0) & (cell < 8)).all(-1)
        row = slice(int(s.offsets[i]), int(s.offsets[i + 1]))
        assert s.leaf[row].tolist() == [index[tuple(c)] for c in cell[inside].tolist()]
        torch.testing.assert_close(s.t[row], middle[inside], atol=1e-12, rtol=0)
        torch.testing.assert_close(s.delta[row], delta[inside], atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("axis", range(3))
def test_rays_in_faces_and_edges_cross_each_layer_once(dtype: torch.dtype, sign: float, axis: int) -> None:
    tree, n = full(3), 9 * 9
    o, d = torch.zeros(2, n, 3, dtype=dtype)
    grid = torch.cartesian_prod(torch.arange(9), torch.arange(9)).to(dtype) / 8  # every edge of every cell
    others = [a for a in range(3) if a != axis]
    o[:, others] = grid
    o[:, axis], d[:, axis] = (-0.5 if sign > 0 else 1.5), sign
    d[::2, others] = -0.0
    s = octree_traverse(tree, o, d, torch.tensor(UNIT, dtype=dtype))
    assert (s.offsets.diff() == 8).all()
    assert (s.delta == 0.125).all()  # exact: all numbers are dyadic
    expected = 0.5 + torch.arange(8, dtype=dtype) / 8 + 1 / 16
    assert torch.equal(s.t.view(n, 8), expected.expand(n, 8))
    # the leaf above an inner face, the last one at the outer face
    low = boxes(tree, torch.tensor(UNIT))[0][s.leaf.long()].view(n, 8, 3)
    assert torch.equal(low[:, :, others], grid.double().clamp(max=7 / 8)[:, None].expand(n, 8, 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_diagonal_through_corners_crosses_only_the_cells_on_it(dtype: torch.dtype) -> None:
    o, d = torch.tensor([[-1.0] * 3, [2.0] * 3], dtype=dtype), torch.tensor([[1.0] * 3, [-1.0] * 3], dtype=dtype)
    s = octree_traverse(full(4), o, d / math.sqrt(3), torch.tensor(UNIT, dtype=dtype))
    assert (s.offsets.diff() == 16).all()  # three planes are crossed at once, to the bit
    assert torch.equal(s.leaf[:16], s.leaf[16:].flip(0))


def test_what_misses_or_cannot_be_marched_has_no_segments() -> None:
    tree, box = full(2), torch.tensor(UNIT, dtype=torch.float64)
    o = torch.tensor([[0.5, 0.5, 2.0], [0.5, 0.5, 2.0], [1.5, 0.5, -1.0], [0.5, 0.5, 0.5], [math.nan, 0.5, 0.5],
                      [0.5, math.inf, 0.5], [0.5, 0.5, 0.5], [0.0, -1.0, -1.0], [0.5, 0.5, 1.0]], dtype=torch.float64)
    d = torch.tensor([[0, 0, 1.0], [1.0, 0, 0], [0, 0, 1.0], [0, 0, 0], [1.0, 0, 0],
                      [0, -1.0, 0], [math.nan, 0, 1.0], [-1.0, 1.0, 1.0], [0, 0, 1.0]], dtype=torch.float64)
    assert octree_traverse(tree, o, d, box).offsets.tolist() == [0] * 10
    inside = (torch.tensor([[0.5, 0.5, 0.3]], dtype=torch.float64), torch.tensor([[0, 0, 1.0]], dtype=torch.float64))
    assert octree_traverse(tree, *inside, box).delta.tolist() == pytest.approx([0.2, 0.25, 0.25], abs=1e-15)
    for wrong in ([[0.0] * 3, [1.0, 1.0, 0.0]], [[1.0] * 3, [0.0] * 3], [[math.nan] * 3, [1.0] * 3],
                  [[0.0] * 3, [math.inf] * 3]):
        assert len(octree_traverse(tree, *inside, torch.tensor(wrong, dtype=torch.float64)).leaf) == 0
    assert len(octree_traverse(tree, *inside, box, near=0.4, far=0.4).leaf) == 0


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8])
@pytest.mark.parametrize("n", [5, 90])  # one by one; in lanes
def test_unoccupied_leaves_are_crossed_in_silence_and_the_nearest_are_kept(kind: torch.dtype, n: int) -> None:
    tree, box = build_octree(positions(300, 5), 5), torch.tensor(BOX, dtype=torch.float64)
    o, d = rays(n)
    flags = torch.rand(8 * len(tree.child), generator=torch.Generator().manual_seed(2)) < 0.3
    everything = octree_traverse(tree, o, d, box)
    some = octree_traverse(tree, o, d, box, occupied=(flags * 3).to(kind))
    keep = flags[everything.leaf.long()]
    assert 0 < len(some.leaf) < len(everything.leaf)
    for a, b in zip(some[1:], everything[1:], strict=True):
        assert torch.equal(a, b[keep])
    few = octree_traverse(tree, o, d, box, occupied=flags, max_leaves=3)
    rank = torch.arange(len(some.leaf)) - some.offsets[some.ray_index.long()]
    assert (rank > 3).any()
    for a, b in zip(few[1:], some[1:], strict=True):
        assert torch.equal(a, b[rank < 3])
    assert torch.equal(few.offsets.diff(), some.offsets.diff().clamp(max=3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 13, 333, 1100])
def test_traversal_matches_the_reference_bit_for_bit(dtype: torch.dtype, n: int) -> None:
    tree, box = build_octree(positions(400, 7), 7), torch.tensor(BOX, dtype=dtype)
    o, d = rays(n, dtype, seed=n)
    d[5::13, 0] = torch.finfo(dtype).tiny / 8  # 1 ÷ d overflows
    o[6::13] = box[0]  # in a corner
    o[7::13, 1], d[7::13, 1] = box[1, 1], 0.0  # in a face
    d[8::26] = math.nan
    o[9::26] = math.inf
    flags = torch.rand(8 * len(tree.child), generator=torch.Generator().manual_seed(3)) < 0.5
    for occupied, near, far, most in ((None, 0.0, math.inf, 4096), (flags, 0.3, 2.0, 4096), (flags, 0.0, math.inf, 7)):
        bytes_ = None if occupied is None else occupied.view(torch.uint8)
        found = octree_traverse(tree, o, d, box, near, far, occupied, most)
        assert same(found, Segments(*reference.octree_traverse(tree.child, o, d, box, bytes_, near, far, most)))
        assert found.t.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_traversal_far_from_the_origin_neither_sticks_nor_skips(dtype: torch.dtype) -> None:
    # 2^20 cells along an axis, seen from so far away that most planes fall on one t in float32
    centre = torch.tensor([[1 << 19, 1 << 19, 1 << 19]])
    tree, n = build_octree(centre, 20), 40
    box = torch.tensor([[-1.0] * 3, [1.0] * 3], dtype=dtype)
    random = torch.Generator().manual_seed(0)
    d = torch.nn.functional.normalize(torch.randn(n, 3, generator=random, dtype=torch.float64), dim=-1).to(dtype)
    o = -1000 * d
    s = octree_traverse(tree, o, d, box)
    assert same(s, Segments(*reference.octree_traverse(tree.child, o, d, box, None, 0.0, math.inf, 4096)))
    assert (s.delta > 0).all()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(total(s, n), chord(o, d, box), atol=2000 * 16 * eps, rtol=0)  # roundings of t ≈ 1000


def test_rays_with_many_leaves_are_whole() -> None:
    # the diagonal of 128³ cells crosses 382 of them, more than the room that lanes begin with
    o = torch.tensor([[-0.5, -0.51, -0.52]], dtype=torch.float64).repeat(50, 1)
    d = torch.nn.functional.normalize(torch.tensor([[1.0, 1.003, 1.007]], dtype=torch.float64), dim=-1).repeat(50, 1)
    tree, box = full(7), torch.tensor(UNIT, dtype=torch.float64)
    s = octree_traverse(tree, o, d, box)
    assert (s.offsets.diff() > 300).all()
    torch.testing.assert_close(total(s, 50), chord(o, d, box), atol=1e-12, rtol=0)
    assert same(s, Segments(*reference.octree_traverse(tree.child, o, d, box, None, 0.0, math.inf, 4096)))


def test_offsets_that_lead_nowhere_count_as_leaves() -> None:
    child = torch.zeros(3, 2, 2, 2, dtype=torch.int32)
    child[0, 0, 0, 0], child[0, 1, 1, 1], child[0, 1, 0, 0], child[1, 0, 0, 0] = 1, 7, -5, 2**31 - 1
    child[0, 0, 1, 1], child[2, 0, 0, 0] = 2, -2  # a circle: the root inside itself, 20 levels deep
    o, d = rays(60, torch.float32)
    box = torch.tensor(BOX)
    s = octree_traverse(Octree(child), o, d, box, max_leaves=50)
    assert same(s, Segments(*reference.octree_traverse(child, o, d, box, None, 0.0, math.inf, 50)))
    points = torch.rand(100, 3, generator=torch.Generator().manual_seed(0))
    points[:30] *= 0.5
    points[30:40] = torch.tensor([0.0, 2 / 3, 2 / 3])  # round and round: the binary digits of 2/3 alternate
    leaf, side = octree_query(Octree(child), points)
    expected = reference.octree_query(child, points)
    assert torch.equal(leaf, expected[0]) and torch.equal(side, expected[1])
    assert side[30] == 2.0**-20


def test_values_looked_up_by_leaf_are_differentiable() -> None:
    tree, box = build_octree(positions(30, 3), 3), torch.tensor(BOX, dtype=torch.float64)
    o, d = rays(20)
    density = torch.ones(len(tree.child), 2, 2, 2, 1, dtype=torch.float64, requires_grad=True)
    s = octree_traverse(tree, o.requires_grad_(True), d, box)
    assert not s.t.requires_grad and not s.delta.requires_grad
    depth = (density.view(-1, 1)[s.leaf.long(), 0] * s.delta).sum()
    depth.backward()
    expected = torch.zeros(8 * len(tree.child), dtype=torch.float64).index_add(0, s.leaf.long(), s.delta)
    torch.testing.assert_close(density.grad.view(-1), expected, atol=1e-14, rtol=0)


# as ops


@compiled
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    p, (o, d) = positions(3000, 7), rays(5000, torch.float32)
    box, points = torch.tensor(BOX), torch.rand(5000, 3, generator=torch.Generator().manual_seed(0))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            tree = build_octree(p, 7)
            results.append((tree.child, *octree_query(tree, points), *octree_traverse(tree, o, d, box)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@compiled
def test_octree_ops_are_well_behaved() -> None:
    child, (o, d) = build_octree(positions(20, 4), 4).child, rays(20)
    torch.library.opcheck(torch.ops.gan3d.build_octree, (positions(20, 4), 4))
    torch.library.opcheck(torch.ops.gan3d.octree_query, (child, torch.rand(9, 3)))
    for flags in (None, torch.ones(child.numel(), dtype=torch.uint8)):
        torch.library.opcheck(torch.ops.gan3d.octree_traverse,
                              (child, o, d, torch.tensor(BOX, dtype=torch.float64), flags, 0.0, 9.0, 100))


GRAPH = """
import torch
from gan3d.ops.octree import build_octree, octree_query, octree_traverse

random = torch.Generator().manual_seed(0)
o, box = torch.zeros(20, 3), torch.tensor([[-1.0] * 3, [1.0] * 3])
d = torch.nn.functional.normalize(torch.randn(20, 3, generator=random), dim=-1)
positions = torch.randint(0, 16, (30, 3), generator=random)

def depth(positions, o, d):
    tree = build_octree(positions, 4)
    segments = octree_traverse(tree, o, d, box)
    leaf, side = octree_query(tree, d * 0.5 + 0.5)
    return torch.zeros(20).index_add(0, segments.ray_index, segments.t * segments.delta) + leaf + side

torch._dynamo.config.capture_dynamic_output_shape_ops = True
compiled = torch.compile(depth, fullgraph=True, backend="aot_eager")
assert torch.equal(compiled(positions, o, d), depth(positions, o, d))
"""


@compiled
def test_octree_functions_compile_as_one_graph() -> None:
    # by itself: the tracer does not follow the checks of shapes that these tests switch on
    done = subprocess.run([sys.executable, "-c", GRAPH], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_arguments_are_made_contiguous_and_wide_enough() -> None:
    tree, box = build_octree(positions(50, 5), 5), torch.tensor(BOX)
    o, d = rays(80, torch.float32)
    expected = octree_traverse(tree, o[::2].clone(), d[::2].clone(), box)
    turned = Octree(tree.child.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0))
    assert same(octree_traverse(turned, o[::2], d[::2], box.T.contiguous().T), expected)
    half = octree_traverse(tree, o.half(), d.half(), box.half())
    assert same(half, octree_traverse(tree, o.half().float(), d.half().float(), box))
    points = torch.rand(3, 40, generator=torch.Generator().manual_seed(0)).T
    assert all(torch.equal(a, b) for a, b in zip(octree_query(tree, points), octree_query(tree, points.contiguous()),
                                                 strict=True))
    assert octree_query(tree, points.half())[1].dtype == torch.float32
    assert octree_query(tree, torch.zeros(0, 4, 3))[0].shape == (0, 4)


def test_senseless_arguments_are_refused() -> None:
    tree, box, (o, d) = full(1), torch.tensor(BOX), rays(4, torch.float32)
    for options, complaint in (({"near": math.inf}, "near must be finite"), ({"far": math.nan}, "far a number"),
                               ({"max_leaves": 0}, "max_leaves must be positive"),
                               ({"occupied": torch.ones(7, dtype=torch.bool)}, "occupied must have 8 entries")):
        with pytest.raises(ValueError, match=complaint):
            octree_traverse(tree, o, d, box, **options)
    with pytest.raises(TypeError, match="child must be int32"):
        octree_traverse(Octree(tree.child.long()), o, d, box)
    for shape in ((0, 2, 2, 2), (1, 2, 2, 3), (8,)):
        with pytest.raises(ValueError, match="child must have shape"):
            octree_query(Octree(torch.zeros(shape, dtype=torch.int32)), o)
    with pytest.raises(TypeError, match="(?i)float"):
        octree_query(tree, torch.zeros(2, 3, dtype=torch.int64))


@compiled
def test_the_octree_ops_name_what_is_wrong() -> None:
    child, box, (o, d) = full(1).child, torch.tensor(BOX), rays(4, torch.float32)
    flags = torch.ones(8, dtype=torch.uint8)

    def call(*changed: tuple[int, object]) -> None:
        arguments: list = [child, o, d, box, flags, 0.0, 9.0, 99]
        for position, value in changed:
            arguments[position] = value
        torch.ops.gan3d.octree_traverse(*arguments)

    call()
    turned = child.permute(0, 3, 2, 1)
    for position, value, complaint in (
            (0, child.long(), "child must be Int"), (0, turned, "child must be contiguous"),
            (0, child[:0], "child must have 1 to"), (1, o.T.contiguous().T, "rays_o must be contiguous"),
            (1, o.half(), "rays_o must be float32 or float64"), (2, d[:2], "rays_d must have shape"),
            (2, d.double(), "rays_d must be Float"), (3, box[:1], "aabb must have shape"),
            (4, flags[:7], "occupied must have shape"), (4, flags.bool(), "occupied must be Byte"),
            (5, math.nan, "near must be finite"), (7, 0, "max_leaves must be positive")):
        with pytest.raises((ValueError, TypeError, RuntimeError), match=complaint):
            call((position, value))
    with pytest.raises((ValueError, RuntimeError), match="points must have shape"):
        torch.ops.gan3d.octree_query(child, torch.zeros(4, 2))
    with pytest.raises((TypeError, RuntimeError), match="positions must be int32 or int64"):
        torch.ops.gan3d.build_octree(torch.zeros(4, 3), 3)
    with pytest.raises((ValueError, RuntimeError), match="positions must be contiguous"):
        torch.ops.gan3d.build_octree(torch.zeros(3, 4, dtype=torch.int64).T, 3)
