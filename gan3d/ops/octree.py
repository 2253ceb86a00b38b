"""Sparse voxel octrees in PlenOctree's form: built, asked for the leaf at a point, crossed by rays leaf after leaf.

Values live outside the tree, in tables `data [nodes·8, c]` whose row 8·node + 4x + 2y + z belongs to cell (x, y, z) of
a node: `data[segments.leaf]` is a differentiable look-up, and `data.view(nodes, 2, 2, 2, c)` what `tree.npz` holds.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gan3d.ops import extension
from gan3d.ops.reference import octree as reference


class Octree(NamedTuple):
    """Which cells of the unit cube are cut in eight. Node 0 is the root; a tree without values.

    child: int32; how many nodes ahead the child of each cell lies, 0 for a leaf. svox's and volrend's `child`.
    """

    child: Int[Tensor, "nodes 2 2 2"]


class Segments(NamedTuple):
    """What rays cross, ray after ray, near to far: that of ray i are rows offsets[i] … offsets[i + 1] − 1."""

    offsets: Int[Tensor, " n+1"]  # int32
    ray_index: Int[Tensor, " s"]  # int32
    leaf: Int[Tensor, " s"]  # int32: row of the tables
    t: Float[Tensor, " s"]  # distance to the middle of the segment
    delta: Float[Tensor, " s"]  # its length


def build_octree(positions: Int[Tensor, "n 3"], depth: int) -> Octree:
    """The smallest tree in which every position is a leaf of the deepest level. PlenOctrees (2021), sec. 4.

    Nodes are numbered level by level, within a level in the order of their parents' cells: as refining the root
    `depth` − 1 times by all positions numbers them. Positions may repeat; none gives a root of 8 leaves.

    Args:
        positions: int32 or int64 in [0, 2^depth).
        depth: levels of nodes, 1 to 20; the smallest leaves have edge 2^−depth. (svox counts from 0: its 8 is our 9.)
    Raises: ValueError for another depth or a position outside.
    """
    if not 1 <= depth <= reference.LEVELS:
        raise ValueError(f"build_octree: depth must be 1 to {reference.LEVELS}, got {depth}")
    if positions.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"build_octree: positions must be int32 or int64, got {positions.dtype}")
    if extension.native(positions) and positions.device.type != "cuda":  # there, PyTorch's sort is the kernel to use
        return Octree(torch.ops.gan3d.build_octree(positions.contiguous(), depth))
    return Octree(reference.build_octree(positions, depth))


def refine_octree(octree: Octree, leaf: Int[Tensor, " k"]) -> Octree:
    """Cuts these leaves in eight. New nodes follow the old ones, in the order of the leaves; rows keep their numbers.

    Raises: ValueError for a row that is no leaf.
    """
    nodes, leaf = len(octree.child), torch.unique(leaf.long())
    child = octree.child.reshape(-1).clone()
    if len(leaf) and (leaf[0] < 0 or leaf[-1] >= 8 * nodes or child[leaf].any()):
        raise ValueError("refine_octree: leaf must name leaves")
    child[leaf] = (torch.arange(nodes, nodes + len(leaf), device=leaf.device) - leaf // 8).int()
    return Octree(torch.cat([child, child.new_zeros(8 * len(leaf))]).view(-1, 2, 2, 2))


def octree_query(octree: Octree, points: Float[Tensor, "*b 3"]) -> tuple[Int[Tensor, "*b"], Float[Tensor, "*b"]]:
    """The leaf at each point of the unit cube (int32) and the edge of its cell; −1 and 0 outside [0, 1)³ and for NaN.

    A point on a face belongs to the cell above it. Not differentiable.
    """
    flat = extension.as_float(points.detach()).reshape(-1, 3)
    child = _child(octree)
    code = torch.ops.gan3d.octree_query if extension.native(flat) else reference.octree_query
    leaf, side = code(child, flat.contiguous())
    return leaf.reshape(points.shape[:-1]), side.reshape(points.shape[:-1])


def octree_traverse(octree: Octree, rays_o: Float[Tensor, "n 3"], rays_d: Float[Tensor, "n 3"],
                    aabb: Float[Tensor, "2 3"], near: float = 0.0, far: float = math.inf,
                    occupied: Bool[Tensor, " m"] | UInt8[Tensor, " m"] | None = None,
                    max_leaves: int = 4096) -> Segments:
    """The leaves each ray crosses and its length in them; one step a leaf, however large. PlenOctrees (2021), sec. 4.

    Exact: the segments of a ray cut its way through the box into pieces without gap or overlap, each of positive
    length, so that the deltas add up to the chord but for rounding. svox and volrend add 1e-5 … 1e-3 of the box to each
    step not to stick to a face, which lengthens every delta by that and passes over thinner corners. Not
    differentiable; on every device the same bits.

    Args:
        rays_d: unit length (not checked), so that t, delta, near and far are distances.
        aabb: min and max corner of the root, in the rays' coordinates; its sides may differ. A ray in one of its faces
            is inside; one in a face between leaves crosses those above it. A box without volume has no segments.
        near, far: what lies outside is cut off. near must be finite.
        occupied: of length nodes·8, the leaves to report; the others are crossed in silence. None: all.
        max_leaves: reported of a ray; the nearest ones are kept. A tree of depth d has at most 3·2^d − 2 on a line.
    Raises: ValueError for an occupied of another length, a near that is not finite or no positive max_leaves.
    """
    if not (math.isfinite(near) and far == far):
        raise ValueError(f"octree_traverse: near must be finite and far a number, got {near} and {far}")
    if max_leaves < 1:
        raise ValueError(f"octree_traverse: max_leaves must be positive, got {max_leaves}")
    child = _child(octree)
    o = extension.as_float(rays_o.detach()).contiguous()
    d, box = (x.detach().to(o.dtype).contiguous() for x in (rays_d, aabb))
    flags = None
    if occupied is not None:
        if len(occupied) != 8 * len(child):
            raise ValueError(f"octree_traverse: occupied must have {8 * len(child)} entries, got {len(occupied)}")
        flags = occupied.contiguous().view(torch.uint8)
    code = torch.ops.gan3d.octree_traverse if extension.native(o) else reference.octree_traverse
    return Segments(*code(child, o, d, box, flags, near, far, max_leaves))


def _child(octree: Octree) -> Tensor:
    child = octree.child
    if child.dtype != torch.int32:
        raise TypeError(f"octree: child must be int32, got {child.dtype}")
    if child.dim() != 4 or child.shape[1:] != (2, 2, 2) or len(child) == 0:
        raise ValueError(f"octree: child must have shape [nodes, 2, 2, 2] and a root, got {tuple(child.shape)}")
    return child.contiguous()


@extension.after_loading
def _register() -> None:
    @torch.library.register_fake("gan3d::build_octree")
    def _(positions: Tensor, depth: int) -> Tensor:
        nodes = torch.library.get_ctx().new_dynamic_size(min=1)
        return positions.new_empty((nodes, 2, 2, 2), dtype=torch.int32)

    @torch.library.register_fake("gan3d::octree_query")
    def _(child: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        return child.new_empty(points.shape[0]), points.new_empty(points.shape[0])

    @torch.library.register_fake("gan3d::octree_traverse")
    def _(child: Tensor, rays_o: Tensor, rays_d: Tensor, aabb: Tensor, occupied: Tensor | None, near: float,
          far: float, max_leaves: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        count = torch.library.get_ctx().new_dynamic_size()
        whole, real = child.new_empty(count), rays_o.new_empty(count)
        return child.new_empty(rays_o.shape[0] + 1), whole, torch.empty_like(whole), real, torch.empty_like(real)

    @register_flop_formula(torch.ops.gan3d.build_octree)
    def _(positions: tuple, depth: int, *, out_shape: tuple, **_: object) -> int:
        return 0  # integers

    @register_flop_formula(torch.ops.gan3d.octree_query)
    def _(child: tuple, points: tuple, *, out_shape: tuple, **_: object) -> int:
        return points[0] * 3  # to units; the rest is integers

    @register_flop_formula(torch.ops.gan3d.octree_traverse)
    def _(*_: object, out_shape: tuple, **__: object) -> int:
        return out_shape[1][0] * 15  # three planes and t, for what is reported; the way through the tree not counted
