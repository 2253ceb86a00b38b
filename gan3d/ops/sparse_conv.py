"""Convolutions on existing voxels only: a map says once which rows meet at which tap, then rows are gathered,
multiplied and summed.

A `KernelMap` belongs to a pattern, or to two of them, and serves every layer on it, forward and backward. The ops are
linear in values and in weights and each one's derivative is another one's value, so derivatives of every order are
compiled; sums have one order for any number of threads and whatever else is in the batch.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gan3d.ops import extension
from gan3d.ops.cells import Voxels, check_resolution
from gan3d.ops.reference import sparse_conv as reference
from gan3d.ops.voxels import _grid, mask_of, neighbours, prune_dense, upsample

Size = int | torch.SymInt
TAPS = 27  # tap 9x + 3y + z of a weight [… 3 3 3] is the one at (x, y, z)


class KernelMap(NamedTuple):
    """Which input row, times a tap's weight, is added to which output row.

    pairs: int32 `[n, 2]`, input and output row, tap after tap, within a tap by increasing output row.
    start: int64 `[28]`, always on the CPU; the pairs of tap t are `pairs[start[t]:start[t + 1]]`.
    back: int32 `[n, 2]`, the same as output and input row, within a tap by increasing input row. None if the map is its
        own opposite: those of tap t are then the pairs of tap 26 − t.
    """

    pairs: Int[Tensor, "n 2"]
    start: Int[Tensor, " taps+1"]
    back: Int[Tensor, "n 2"] | None
    rows_in: int
    rows_out: int


def kernel_map(voxels: Voxels) -> KernelMap:
    """The map of a 3³ convolution with stride 1 and padding 1 whose outputs are the existing voxels.

    Takes 8 bytes a pair of neighbours: up to 216 bytes a voxel, 140 to 190 along a surface.
    """
    around = neighbours(voxels)
    code = torch.ops.gan3d.neighbour_pairs if extension.native(around) else reference.neighbour_pairs
    pairs, start = code(around)
    return KernelMap(pairs, start, None, around.shape[0], around.shape[0])


def upsampling_map(coarse: Voxels, fine: Voxels) -> KernelMap:
    """The map of a transposed 3³ convolution with stride 2: tap t of voxel q reaches the fine voxel 2q + t.

    `fine` may be any pattern of twice the resolution. It has 2N voxels along an axis where F.conv_transpose3d without
    padding makes 2N + 1: the last one is cropped, as in VoxGRAF (2022).
    Raises: ValueError if fine's resolution is not twice coarse's.
    """
    words, rank, resolution = _grid(coarse)
    fine_words, fine_rank, doubled = _grid(fine)
    if doubled != check_resolution((2 * resolution[0], 2 * resolution[1], 2 * resolution[2])):
        raise ValueError(f"upsampling_map: fine has resolution {doubled}, it must be twice {resolution}")
    code = torch.ops.gan3d.upsampling_pairs if extension.native(words) else reference.upsampling_pairs
    pairs, back, start = code(words, rank, resolution, fine_words, fine_rank)
    return KernelMap(pairs, start, back, int(rank[-1]), int(fine_rank[-1]))


def join_maps(maps: Sequence[KernelMap]) -> KernelMap:
    """One map for several grids whose tables are concatenated in the same order: a batch is one convolution.

    Raises: ValueError for no maps, or maps of different kinds.
    """
    if len({(m.back is None, len(m.start)) for m in maps}) != 1:
        raise ValueError(f"join_maps: needs maps of one kind, got {len(maps)}")
    starts = torch.stack([m.start for m in maps])
    shifts = [(sum(m.rows_in for m in maps[:i]), sum(m.rows_out for m in maps[:i])) for i in range(len(maps))]

    def joined(tables: list[Tensor], turned: bool) -> Tensor:
        device = tables[0].device
        moved = [t + torch.tensor(s[::-1] if turned else s, dtype=torch.int32, device=device)
                 for t, s in zip(tables, shifts, strict=True)]
        return torch.cat([t[a:b] for tap in range(starts.shape[1] - 1)
                          for t, a, b in zip(moved, *starts[:, tap:tap + 2].T.tolist(), strict=True)])

    back = [m.back for m in maps if m.back is not None]
    return KernelMap(joined([m.pairs for m in maps], False), starts.sum(0), joined(back, True) if back else None,
                     sum(m.rows_in for m in maps), sum(m.rows_out for m in maps))


def sparse_conv3d(values: Float[Tensor, "rows_in c"], weight: Float[Tensor, "o c 3 3 3"],
                  kernel: KernelMap) -> Float[Tensor, "rows_out o"]:
    """A 3³ convolution of existing voxels, missing ones are 0. VoxGRAF (2022), sec. 3.1.

    With a `kernel_map`: F.conv3d(dense, weight, padding=1) at existing voxels. With an `upsampling_map`:
    F.conv_transpose3d(dense, weight.transpose(0, 1), stride=2) at the fine ones. Axes are x, y, z in the grid as in the
    weight. On CUDA devices a product and a sum a tap, on the CPU one pass over blocks that stay in the cache.
    Raises: ValueError if the shapes do not fit the map; TypeError if the types differ.
    """
    values, weight = extension.as_float(values), extension.as_float(weight)
    if weight.ndim != 5 or weight.shape[2:] != (3, 3, 3) or values.ndim != 2 or values.shape[1] != weight.shape[1]:
        raise ValueError(f"sparse_conv3d: values {tuple(values.shape)} and weight {tuple(weight.shape)} must be "
                         "[rows, c] and [o, c, 3, 3, 3]")
    return _convolve(values, weight.flatten(2).permute(2, 1, 0), kernel)


def sparse_upsample(values: Float[Tensor, "rows_in c"], kernel: KernelMap) -> Float[Tensor, "rows_out c"]:
    """Each value to the 3³ voxels around (2x + 1, 2y + 1, 2z + 1), weighted [1, 2, 1]³ / 8, by an `upsampling_map`.

    Half a voxel off trilinear interpolation of cell centres: VoxGRAF's way to double its skip images, as its code has
    it. Meant for few channels: it is a convolution whose weight is diagonal.
    """
    values = extension.as_float(values)
    line = torch.tensor([0.5, 1.0, 0.5], dtype=values.dtype, device=values.device)
    cube = (line[:, None, None] * line[:, None] * line).reshape(TAPS, 1, 1)
    return _convolve(values, cube * torch.eye(values.shape[1], dtype=values.dtype, device=values.device), kernel)


def upsample_support(voxels: Voxels) -> Voxels:
    """The voxels of twice the resolution where trilinear interpolation (align_corners False) of existing ones is above
    0: all children and the voxels around them.
    """
    return prune_dense(mask_of(upsample(voxels).voxels).float(), 0.5, dilate=1)


def _convolve(values: Tensor, weight: Tensor, kernel: KernelMap) -> Tensor:
    if values.shape[0] != kernel.rows_in:
        raise ValueError(f"sparse_conv3d: values has {values.shape[0]} rows, the map takes {kernel.rows_in}")
    if values.dtype != weight.dtype:
        raise TypeError(f"sparse_conv3d: values is {values.dtype}, weight is {weight.dtype}")
    code = torch.ops.gan3d.conv_rows if extension.native(values) else reference.conv_rows
    return code(values.contiguous(), weight.contiguous(), kernel.pairs, kernel.start, kernel.back, kernel.rows_out)


@extension.after_loading
def _register() -> None:
    ops = torch.ops.gan3d

    @torch.library.register_fake("gan3d::neighbour_pairs")
    def _(neighbours: Tensor) -> tuple[Tensor, Tensor]:
        pairs = neighbours.new_empty(torch.library.get_ctx().new_dynamic_size(), 2)
        return pairs, torch.empty(neighbours.shape[1] + 1, dtype=torch.int64, device="cpu")

    @torch.library.register_fake("gan3d::upsampling_pairs")
    def _(words: Tensor, rank: Tensor, resolution: list[int], fine_words: Tensor,
          fine_rank: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pairs = rank.new_empty(torch.library.get_ctx().new_dynamic_size(), 2)
        return pairs, torch.empty_like(pairs), torch.empty(TAPS + 1, dtype=torch.int64, device="cpu")

    @torch.library.register_fake("gan3d::conv_rows")
    def _(values: Tensor, weight: Tensor, pairs: Tensor, start: Tensor, back: Tensor | None, rows: Size) -> Tensor:
        return values.new_empty(rows, weight.shape[2])

    @torch.library.register_fake("gan3d::conv_rows_weight")
    def _(values: Tensor, grad: Tensor, pairs: Tensor, start: Tensor, back: Tensor | None) -> Tensor:
        return values.new_empty(start.shape[0] - 1, values.shape[1], grad.shape[1])

    @register_flop_formula([ops.neighbour_pairs, ops.upsampling_pairs])
    def _(*_: object, **__: object) -> int:
        return 0  # integers

    @register_flop_formula([ops.conv_rows, ops.conv_rows_weight])
    def _(values: tuple, other: tuple, pairs: tuple, *_: object, **__: object) -> int:
        return 2 * pairs[0] * values[1] * other[-1]

    def transposed(grad: Tensor, weight: Tensor, rows: Size, pairs: Tensor, start: Tensor,
                   back: Tensor | None) -> Tensor:
        turned = weight.transpose(1, 2)
        if back is None:
            return ops.conv_rows(grad, turned.flip(0).contiguous(), pairs, start, None, rows)
        return ops.conv_rows(grad, turned.contiguous(), back, start, pairs, rows)

    def keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:5])  # None may be among them

    def pull(ctx: Any, grad: Tensor) -> tuple:
        values, weight, *where = ctx.saved_tensors
        grad = grad.contiguous()
        return (transposed(grad, weight, values.shape[0], *where) if ctx.needs_input_grad[0] else None,
                ops.conv_rows_weight(values, grad, *where) if ctx.needs_input_grad[1] else None,
                None, None, None, None)

    def pull_weight(ctx: Any, grad: Tensor) -> tuple:
        values, moved, *where = ctx.saved_tensors
        grad = grad.contiguous()
        return (transposed(moved, grad, values.shape[0], *where) if ctx.needs_input_grad[0] else None,
                ops.conv_rows(values, grad, *where, moved.shape[0]) if ctx.needs_input_grad[1] else None,
                None, None, None)

    torch.library.register_autograd("gan3d::conv_rows", pull, setup_context=keep)
    torch.library.register_autograd("gan3d::conv_rows_weight", pull_weight, setup_context=keep)
