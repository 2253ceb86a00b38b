"""The structure of sparse voxel grids: which voxels exist, in which row their values lie, what pruning and upsampling
do to both.

A grid is `Voxels` (see `cells`); values are tables `[rows, c]`, a row an existing voxel, in the order of cells. Bits,
positions and maps have no derivative; what moves values has one, of every order, as each mover is another's transpose.
On CUDA devices whatever makes a table reads its number of rows on the host. A grid's `rank` must be that of its `words`
(`rank_words` makes it): on the CPU this is checked wherever rows are written, on CUDA devices it is not.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gan3d.ops import extension
from gan3d.ops.cells import Resolution, Voxels, check_resolution
from gan3d.ops.reference import voxels as reference

Size = int | torch.SymInt


class Pruned(NamedTuple):
    """What is left of a grid, and where its rows were and are."""

    voxels: Voxels
    new_to_old: Int[Tensor, " m"]  # int32, increasing
    old_to_new: Int[Tensor, " rows"]  # int32; −1: gone


class Upsampled(NamedTuple):
    """A grid of twice the resolution, every voxel divided into eight: those of row r are the rows 8r … 8r + 7."""

    voxels: Voxels
    parent: Int[Tensor, " rows8"]  # int32


def voxels_from_mask(mask: Bool[Tensor, "x y z"]) -> Voxels:
    """The voxels where the mask is True.

    Raises: ValueError for sides that are no multiples of 4 from 4 to 2048.
    """
    resolution = check_resolution((mask.shape[0], mask.shape[1], mask.shape[2]))
    code = torch.ops.gan3d.voxels_from_mask if extension.native(mask) else reference.voxels_from_mask
    words, rank = code(mask.contiguous())
    return Voxels(words, rank, resolution)


def voxels_from_positions(positions: Int[Tensor, "n 3"], resolution: Resolution) -> Voxels:
    """The voxels at integer positions (x, y, z), in any order, each as often as one likes.

    Raises: IndexError (on CUDA devices an assertion) for a position outside the grid.
    """
    resolution, at = check_resolution(resolution), _positions(positions)
    code = torch.ops.gan3d.voxels_from_positions if extension.native(at) else reference.voxels_from_positions
    words, rank = code(at, resolution)
    return Voxels(words, rank, resolution)


def mask_of(voxels: Voxels) -> Bool[Tensor, "x y z"]:
    """The inverse of `voxels_from_mask`."""
    words, _, resolution = _grid(voxels)
    code = torch.ops.gan3d.voxel_mask if extension.native(words) else reference.voxel_mask
    return code(words, resolution)


def positions_of(voxels: Voxels) -> Int[Tensor, "rows 3"]:
    """Position (x, y, z) of each row's voxel, int32."""
    words, rank, resolution = _grid(voxels)
    code = torch.ops.gan3d.voxel_positions if extension.native(words) else reference.voxel_positions
    return code(words, rank, resolution)


def rank_words(words: Int[Tensor, " w"]) -> Int[Tensor, " w+1"]:
    """Bits set before each word, int32; the last entry is their number."""
    words = words.contiguous()
    return torch.ops.gan3d.rank_words(words) if extension.native(words) else reference.rank_words(words)


def row_of(voxels: Voxels, positions: Int[Tensor, "*b 3"]) -> Int[Tensor, "*b"]:
    """The row of the voxel at each integer position, int32; −1 where there is none, or outside the grid."""
    words, rank, resolution = _grid(voxels)
    flat = _positions(positions).reshape(-1, 3)
    code = torch.ops.gan3d.voxel_rows if extension.native(words) else reference.voxel_rows
    return code(words, rank, flat, resolution).reshape(positions.shape[:-1])


def gather_voxels(dense: Float[Tensor, "x y z c"], voxels: Voxels) -> Float[Tensor, "rows c"]:
    """The values of existing voxels, out of a dense grid into a table. Differentiable: gradients are scattered.

    Raises: ValueError if the grids differ.
    """
    words, rank, resolution = _grid(voxels)
    if tuple(dense.shape[:3]) != resolution:
        raise ValueError(f"gather_voxels: dense has {tuple(dense.shape[:3])} cells, the grid {resolution}")
    dense = extension.as_float(dense).contiguous()
    code = torch.ops.gan3d.gather_voxels if extension.native(dense) else reference.gather_voxels
    return code(dense, words, rank, None)


def scatter_voxels(values: Float[Tensor, "rows c"], voxels: Voxels, fill: float = 0.0) -> Float[Tensor, "x y z c"]:
    """A table's values as a dense grid, `fill` where no voxel exists. Differentiable: gradients are gathered."""
    words, rank, resolution = _grid(voxels)
    values = extension.as_float(values).contiguous()
    code = torch.ops.gan3d.scatter_voxels if extension.native(values) else reference.scatter_voxels
    return code(values, words, rank, resolution, fill)


def prune(voxels: Voxels, score: Float[Tensor, " rows"], threshold: float, dilate: int = 0) -> Pruned:
    """Keeps voxels whose score is ≥ threshold, and existing ones near them, as Plenoxels (2022) and VoxGRAF (2022) do.

    Not differentiable.

    Args:
        threshold: compared in the score's precision. NaN scores are below it. For "> 0", as in VoxGRAF, take
            `torch.finfo(…).tiny`, the smallest normal number.
        dilate: existing voxels at most so many steps from a kept one stay too; a step is to one of the 26 cells around,
            whether or not a voxel exists there. Plenoxels: 2, VoxGRAF: 1.
    Raises: ValueError for a dilate below 0.
    """
    words, rank, resolution = _grid(voxels)
    _check_dilate(dilate)
    score = extension.as_float(score.detach()).contiguous()
    code = torch.ops.gan3d.prune_voxels if extension.native(score) else reference.prune_voxels
    new_words, new_rank, new_to_old, old_to_new = code(words, rank, score, threshold, dilate, resolution)
    return Pruned(Voxels(new_words, new_rank, resolution), new_to_old, old_to_new)


def prune_dense(score: Float[Tensor, "x y z"], threshold: float, dilate: int = 0) -> Voxels:
    """`prune` of a dense grid, in which every voxel exists. `gather_voxels` makes the table of what is left."""
    resolution = check_resolution((score.shape[0], score.shape[1], score.shape[2]))
    _check_dilate(dilate)
    score = extension.as_float(score.detach()).contiguous()
    code = torch.ops.gan3d.voxels_from_scores if extension.native(score) else reference.voxels_from_scores
    words, rank = code(score, threshold, dilate)
    return Voxels(words, rank, resolution)


def compact(values: Float[Tensor, "rows c"], pruned: Pruned) -> Float[Tensor, "m c"]:
    """The rows that pruning has left. Differentiable: rows that are gone get gradient 0.

    The gradient's storage is not the allocator's own where it is large (see csrc/voxels.cpp): it cannot be resized.
    """
    values, rows = extension.as_float(values).contiguous(), pruned.old_to_new.shape[0]
    if values.shape[0] != rows:
        raise ValueError(f"compact: values has {values.shape[0]} rows, what was pruned had {rows}")
    code = torch.ops.gan3d.compact_rows if extension.native(values) else reference.compact_rows
    return code(values, pruned.new_to_old.contiguous())


def upsample(voxels: Voxels) -> Upsampled:
    """Every voxel divided into 2³, in a grid of twice the resolution.

    The side of the Morton cubes doubles with the grid (only a grid of 1024³ has reached the cap on it, and that one
    cannot be doubled), so that the children of cell i are the cells 8i … 8i + 7, and rows follow.
    Raises: ValueError where the doubled sides exceed 2048, or the doubled grid 2^31 cells.
    """
    words, rank, (x, y, z) = _grid(voxels)
    doubled = check_resolution((2 * x, 2 * y, 2 * z))
    code = torch.ops.gan3d.upsample_voxels if extension.native(words) else reference.upsample_voxels
    fine, fine_rank, parent = code(words, rank, (x, y, z))
    return Upsampled(Voxels(fine, fine_rank, doubled), parent)


def upsample_values(values: Float[Tensor, "rows c"]) -> Float[Tensor, "rows8 c"]:
    """Each row eight times, for the children of its voxel. Differentiable: gradients of eight children are summed."""
    values = extension.as_float(values).contiguous()
    return torch.ops.gan3d.upsample_rows(values) if extension.native(values) else reference.upsample_rows(values)


def neighbours(voxels: Voxels) -> Int[Tensor, "rows 27"]:
    """Rows of the 3³ voxels around each voxel, int32, −1 where there is none.

    Column 9(dx + 1) + 3(dy + 1) + dz + 1 is the neighbour at (dx, dy, dz); column 13 is the voxel itself, and columns k
    and 26 − k are each other's opposite.
    """
    words, rank, resolution = _grid(voxels)
    code = torch.ops.gan3d.voxel_neighbours if extension.native(words) else reference.voxel_neighbours
    return code(words, rank, resolution)


def _grid(voxels: Voxels) -> Voxels:
    """Contiguous. Raises ValueError where words or rank do not fit the resolution."""
    x, y, z = resolution = check_resolution(voxels.resolution)
    words, rank = voxels.words, voxels.rank
    if words.shape != (x * y * z // 64,) or rank.shape != (words.shape[0] + 1,):
        raise ValueError(f"words {tuple(words.shape)} and rank {tuple(rank.shape)} do not fit resolution {resolution}")
    return Voxels(words.contiguous(), rank.contiguous(), resolution)


def _positions(positions: Tensor) -> Tensor:
    if positions.dtype not in (torch.int32, torch.int64):
        positions = positions.int()
    return positions.contiguous()


def _check_dilate(dilate: int) -> None:
    if not 0 <= dilate <= 2048:
        raise ValueError(f"prune: dilate must be 0 to 2048, got {dilate}")


@extension.after_loading
def _register() -> None:
    _register_fakes()
    _register_derivatives()
    ops = torch.ops.gan3d
    structure = [ops.voxels_from_mask, ops.voxels_from_positions, ops.rank_words, ops.voxel_mask, ops.voxel_positions,
                 ops.voxel_rows, ops.upsample_voxels, ops.voxel_neighbours]
    movers = [ops.gather_voxels, ops.scatter_voxels, ops.compact_rows, ops.spread_rows, ops.upsample_rows]

    @register_flop_formula([*structure, *movers])
    def _(*_: object, **__: object) -> int:
        return 0  # integers and copies

    @register_flop_formula(ops.voxels_from_scores)
    def _(score: tuple, *_: object, **__: object) -> int:
        return score[0] * score[1] * score[2]  # comparisons

    @register_flop_formula(ops.prune_voxels)
    def _(words: tuple, rank: tuple, score: tuple, *_: object, **__: object) -> int:
        return score[0]

    @register_flop_formula(ops.pool_rows)
    def _(values: tuple, *, out_shape: tuple, **_: object) -> int:
        return 7 * out_shape[0] * out_shape[1]


def _register_fakes() -> None:
    def grid(like: Tensor, cells: Size) -> tuple[Tensor, Tensor]:
        return like.new_empty(cells // 64, dtype=torch.int64), like.new_empty(cells // 64 + 1, dtype=torch.int32)

    def unknown() -> Size:
        return torch.library.get_ctx().new_dynamic_size()

    @torch.library.register_fake("gan3d::voxels_from_mask")
    def _(mask: Tensor) -> tuple[Tensor, Tensor]:
        return grid(mask, mask.shape[0] * mask.shape[1] * mask.shape[2])

    @torch.library.register_fake("gan3d::voxels_from_scores")
    def _(score: Tensor, threshold: float, dilate: int) -> tuple[Tensor, Tensor]:
        return grid(score, score.shape[0] * score.shape[1] * score.shape[2])

    @torch.library.register_fake("gan3d::voxels_from_positions")
    def _(positions: Tensor, resolution: list[int]) -> tuple[Tensor, Tensor]:
        return grid(positions, resolution[0] * resolution[1] * resolution[2])

    @torch.library.register_fake("gan3d::rank_words")
    def _(words: Tensor) -> Tensor:
        return words.new_empty(words.shape[0] + 1, dtype=torch.int32)

    @torch.library.register_fake("gan3d::voxel_mask")
    def _(words: Tensor, resolution: list[int]) -> Tensor:
        return words.new_empty(resolution, dtype=torch.bool)

    @torch.library.register_fake("gan3d::voxel_positions")
    def _(words: Tensor, rank: Tensor, resolution: list[int]) -> Tensor:
        return rank.new_empty(unknown(), 3)

    @torch.library.register_fake("gan3d::voxel_rows")
    def _(words: Tensor, rank: Tensor, positions: Tensor, resolution: list[int]) -> Tensor:
        return rank.new_empty(positions.shape[0])

    @torch.library.register_fake("gan3d::gather_voxels")
    def _(dense: Tensor, words: Tensor, rank: Tensor, rows: Size | None) -> Tensor:
        return dense.new_empty(unknown() if rows is None else rows, dense.shape[3])

    @torch.library.register_fake("gan3d::scatter_voxels")
    def _(values: Tensor, words: Tensor, rank: Tensor, resolution: list[int], fill: float) -> Tensor:
        return values.new_empty(*resolution, values.shape[1])

    @torch.library.register_fake("gan3d::prune_voxels")
    def _(words: Tensor, rank: Tensor, score: Tensor, threshold: float, dilate: int,
          resolution: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        left = rank.new_empty(unknown())
        return torch.empty_like(words), torch.empty_like(rank), left, rank.new_empty(score.shape[0])

    @torch.library.register_fake("gan3d::compact_rows")
    def _(values: Tensor, new_to_old: Tensor) -> Tensor:
        return values.new_empty(new_to_old.shape[0], values.shape[1])

    @torch.library.register_fake("gan3d::spread_rows")
    def _(values: Tensor, new_to_old: Tensor, rows: Size) -> Tensor:
        return values.new_empty(rows, values.shape[1])

    @torch.library.register_fake("gan3d::upsample_voxels")
    def _(words: Tensor, rank: Tensor, resolution: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        return (*grid(words, 512 * words.shape[0]), rank.new_empty(8 * unknown()))

    @torch.library.register_fake("gan3d::upsample_rows")
    def _(values: Tensor) -> Tensor:
        return values.new_empty(8 * values.shape[0], values.shape[1])

    @torch.library.register_fake("gan3d::pool_rows")
    def _(values: Tensor) -> Tensor:
        return values.new_empty(values.shape[0] // 8, values.shape[1])

    @torch.library.register_fake("gan3d::voxel_neighbours")
    def _(words: Tensor, rank: Tensor, resolution: list[int]) -> Tensor:
        return rank.new_empty(unknown(), 27)


def _register_derivatives() -> None:
    """Every mover is linear and its transpose another one: none keeps values, all have derivatives of every order."""
    ops = torch.ops.gan3d

    def keep_index(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:3] if len(inputs) > 3 else inputs[1:2])
        ctx.shape = inputs[0].shape

    def pull_gather(ctx: Any, grad: Tensor) -> tuple:
        return ops.scatter_voxels(grad.contiguous(), *ctx.saved_tensors, ctx.shape[:3], 0.0), None, None, None

    def pull_scatter(ctx: Any, grad: Tensor) -> tuple:
        return ops.gather_voxels(grad.contiguous(), *ctx.saved_tensors, ctx.shape[0]), None, None, None, None

    def pull_compact(ctx: Any, grad: Tensor) -> tuple:
        return ops.spread_rows(grad.contiguous(), *ctx.saved_tensors, ctx.shape[0]), None

    def pull_spread(ctx: Any, grad: Tensor) -> tuple:
        return ops.compact_rows(grad.contiguous(), *ctx.saved_tensors), None, None

    for name, pull in (("gather_voxels", pull_gather), ("scatter_voxels", pull_scatter),
                       ("compact_rows", pull_compact), ("spread_rows", pull_spread)):
        torch.library.register_autograd(f"gan3d::{name}", pull, setup_context=keep_index)
    torch.library.register_autograd("gan3d::upsample_rows", lambda ctx, grad: ops.pool_rows(grad.contiguous()))
    torch.library.register_autograd("gan3d::pool_rows", lambda ctx, grad: ops.upsample_rows(grad.contiguous()))
