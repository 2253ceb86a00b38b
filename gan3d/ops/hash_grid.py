"""The multiresolution hash grid of Instant-NGP: learned features at any point of the unit cube."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gan3d.ops import extension
from gan3d.ops.autograd import differentiable, shaped_like
from gan3d.ops.reference.hash_grid import hash_grid as reference_hash_grid


class HashGridLevels(NamedTuple):
    """Where the levels of a hash grid lie in space and in their common table."""

    scales: tuple[float, ...]  # cells in a unit of length; float32 values
    resolutions: tuple[int, ...]  # corners along an axis
    offsets: tuple[int, ...]  # the first row of each level, and the number of all rows


def hash_grid_levels(levels: int, base_resolution: int, growth: float, log2_table_size: int) -> HashGridLevels:
    """Levels of base_resolution·growth^l corners with at most 2^log2_table_size rows. Instant-NGP (2022), sec. 3.

    Rules and rounding are tiny-cuda-nn's: a level has s = base_resolution·growth^l − 1 cells in a unit of length, in
    float32; ⌈s⌉ + 1 corners along an axis; a row for each corner, rounded up to a multiple of 8, if the table is large
    enough for all of them. Otherwise corners share rows by their hash.
    Args:
        growth: at least 1; exp(ln(finest / base_resolution) / (levels − 1)) for a finest resolution.
        log2_table_size: 3 to 28.
    Raises: ValueError for other values, or a level finer than 2^30.
    """
    if levels < 1 or base_resolution < 1 or growth < 1 or not 3 <= log2_table_size <= 28:
        raise ValueError(f"hash_grid_levels: levels {levels}, base_resolution {base_resolution} and growth {growth} "
                         f"must be at least 1, log2_table_size {log2_table_size} 3 to 28")
    if math.log2(base_resolution) + (levels - 1) * math.log2(growth) >= 30:
        raise ValueError(f"hash_grid_levels: level {levels - 1} would be finer than 2^30")
    # Rounded to float32 before the ceiling: a growth that should end at exactly 2048 must not end at 2049.
    scales = [float(np.float32(base_resolution * growth**level - 1)) for level in range(levels)]
    resolutions = [math.ceil(scale) + 1 for scale in scales]
    offsets = [0]
    for resolution in resolutions:
        offsets.append(offsets[-1] + min((resolution**3 + 7) // 8 * 8, 2**log2_table_size))
    return HashGridLevels(tuple(scales), tuple(resolutions), tuple(offsets))


def hash_grid(points: Float[Tensor, "*b 3"], table: Float[Tensor, "rows f"],
              levels: HashGridLevels) -> Float[Tensor, "*b lf"]:
    """Features at points, interpolated between the eight nearest corners of every level. Instant-NGP (2022), sec. 3.

    A corner (x, y, z) reads row x + r·(y + r·z) of its level if all r³ have one, otherwise row
    (x xor y·2654435761 xor z·805459861) modulo the rows, in 32 bits. Corners lie half a cell aside (tiny-cuda-nn):
    a point's cell in a level is ⌊point·scale + ½⌋.

    Differentiable in points and table, twice. The gradient of the table is as large as the table and costs as much as
    writing it, however few the points; on a CPU it is the same for any number of threads, on a GPU its sums have no
    fixed order. The gradient of points costs nothing if nobody asks for it.
    Args:
        points: in [0, 1]. Others are not clamped: corners beyond the grid, and those on its far faces, wrap to rows of
            other corners of their level. NaN and infinity yield NaN.
        table: the levels' rows one after the other, `levels.offsets[-1]` of them.
    Returns: level by level, the f features of a level side by side.
    Raises: ValueError if the table does not have the rows of `levels`; TypeError if points and table differ in dtype.
    """
    if table.shape[0] != levels.offsets[-1]:
        raise ValueError(f"hash_grid: table must have {levels.offsets[-1]} rows, got {table.shape[0]}")
    flat, rows = extension.as_float(points).reshape(-1, 3), extension.as_float(table)
    if flat.dtype != rows.dtype:
        raise TypeError(f"hash_grid: points are {flat.dtype}, table is {rows.dtype}")
    if extension.native(flat):
        out = torch.ops.gan3d.hash_grid(flat.contiguous(), rows.contiguous(), *levels)
    else:
        out = reference_hash_grid(flat, rows, *levels)
    return out.reshape(*points.shape[:-1], out.shape[-1])


@extension.after_loading
def _register() -> None:
    @torch.library.register_fake("gan3d::hash_grid")
    def _(points: Tensor, table: Tensor, scales: Sequence[float], resolutions: Sequence[int],
          offsets: Sequence[int]) -> Tensor:
        return points.new_empty(points.shape[0], len(scales) * table.shape[1])

    @torch.library.register_fake("gan3d::hash_grid_backward")
    def _(grad: Tensor, points: Tensor, table: Tensor, scales: Sequence[float], resolutions: Sequence[int],
          offsets: Sequence[int], needed: Sequence[bool]) -> tuple[Tensor, ...]:
        return shaped_like([points, table], needed)

    # a cell and its eight weights take about 30 operations; a feature, a product and a sum at each corner
    @register_flop_formula(torch.ops.gan3d.hash_grid)
    def _(points: tuple, table: tuple, scales: Sequence[float], *args: object, out_shape: tuple, **_: object) -> int:
        return points[0] * len(scales) * (30 + 16 * table[1])

    @register_flop_formula(torch.ops.gan3d.hash_grid_backward)
    def _(grad: tuple, points: tuple, table: tuple, scales: Sequence[float], resolutions: Sequence[int],
          offsets: Sequence[int], needed: Sequence[bool], *, out_shape: tuple, **_: object) -> int:
        # points: three derivatives of seven differences and sums each, times the gradient
        return points[0] * len(scales) * (needed[0] * (30 + 57 * table[1]) + needed[1] * (30 + 16 * table[1]))

    differentiable("hash_grid", reference_hash_grid, wanted=[0, 1], selective=True)
