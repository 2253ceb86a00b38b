"""Cells of a regular grid, their order in memory, and the bit field that says which of them exist.

Cells lie in cubes of the largest power-of-two side that divides X, Y and Z, in raster order (z fastest); within a cube
in Morton order, x lowest. A 128³ grid is one cube: pure Morton order. 160³ is 5³ cubes of 32³. Sides are multiples of
4, so that 64 consecutive cells are a block of 4³ voxels and one 64-bit word.
"""

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

Resolution = tuple[int, int, int]  # X, Y, Z


class Voxels(NamedTuple):
    """Which voxels of a grid exist. Values live in tables `[rows, c]`: a row an existing voxel, in the order of cells.

    words: int64 `[cells / 64]`; bit i of word w says whether cell 64·w + i exists.
    rank: int32 `[cells / 64 + 1]`; existing voxels before each word, the last entry is their number.
    """

    words: Int[Tensor, " w"]
    rank: Int[Tensor, " v"]
    resolution: Resolution


def check_resolution(resolution: Resolution) -> Resolution:
    """Raises ValueError unless the sides are positive multiples of 4, at most 2048, with fewer than 2^31 cells."""
    x, y, z = resolution
    if min(resolution) < 4 or max(resolution) > 2048 or any(side % 4 for side in resolution) or x * y * z >= 2**31:
        raise ValueError(f"resolution {tuple(resolution)}: sides must be multiples of 4 from 4 to 2048, and there "
                         "must be fewer than 2^31 cells")
    return x, y, z


def cube_shift(resolution: Resolution) -> int:
    """log2 of the side of the Morton cubes (at most 10)."""
    sides = resolution[0] | resolution[1] | resolution[2]
    return min((sides & -sides).bit_length() - 1, 10)


def cell_index(position: Int[Tensor, "*b 3"], resolution: Resolution) -> Int[Tensor, "*b"]:
    """Where the cell at integer position (x, y, z) lies in memory, int64."""
    shift = cube_shift(check_resolution(resolution))
    position = position.long()
    cube, low = position >> shift, position & ((1 << shift) - 1)
    _, y, z = resolution
    index = (cube[..., 0] * (y >> shift) + cube[..., 1]) * (z >> shift) + cube[..., 2]
    for bit in reversed(range(shift)):
        digits = (low >> bit) & 1
        index = index * 8 + digits[..., 0] + 2 * digits[..., 1] + 4 * digits[..., 2]
    return index


def cell_position(index: Int[Tensor, "*b"], resolution: Resolution) -> Int[Tensor, "*b 3"]:
    """The inverse of `cell_index`: integer position (x, y, z), int64."""
    shift = cube_shift(check_resolution(resolution))
    index = index.long()
    _, y, z = (side >> shift for side in resolution)
    cube = index >> (3 * shift)
    position = torch.stack([cube // (y * z), cube // z % y, cube % z], dim=-1)
    for bit in reversed(range(shift)):
        octant = (index >> (3 * bit)) & 7
        position = position * 2 + torch.stack([octant & 1, (octant >> 1) & 1, octant >> 2], dim=-1)
    return position
