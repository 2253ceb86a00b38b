"""The multiresolution hash grid, level by level."""

from collections.abc import Sequence

import torch
from torch import Tensor

FARTHEST = 2.0**30  # cells are taken at most so far from zero


def hash_grid(points: Tensor, table: Tensor, scales: Sequence[float], resolutions: Sequence[int],
              offsets: Sequence[int]) -> Tensor:
    sizes = [end - begin for begin, end in zip(offsets[:-1], offsets[1:], strict=True)]
    levels = zip(table.split(sizes), scales, resolutions, strict=True)  # the derivative of `split` is one copy
    return torch.cat([_level(points, *level) for level in levels], -1)


def rows_and_weights(points: Tensor, rows: int, scale: float, resolution: int) -> tuple[Tensor, Tensor]:
    """Of the eight corners of each point's cell in a level: the row in its table, and the trilinear weight; [8 n]."""
    position = points.T.contiguous() * scale + 0.5  # [3 n]
    whole = position.detach().floor()
    upper = position - whole
    whole = torch.where(whole > -FARTHEST, whole, -FARTHEST).clamp(max=FARTHEST)  # NaN: the first, too
    cell = torch.stack([whole.long(), whole.long() + 1])  # [2 3 n]
    side = torch.stack([1 - upper, upper])
    x, y, z = cell.unbind(1)
    if resolution**3 <= rows:
        row = (x + (y[:, None] * resolution + z[:, None, None] * resolution**2) & 0xFFFFFFFF) % rows
    else:  # rows are a power of two
        row = (x ^ (y[:, None] * 2654435761 ^ z[:, None, None] * 805459861)) & (rows - 1)
    weight = side[:, 0] * (side[:, None, 1] * side[:, None, None, 2])
    return row.flatten(0, 2), weight.flatten(0, 2)


def _level(points: Tensor, table: Tensor, scale: float, resolution: int) -> Tensor:
    row, weight = rows_and_weights(points, len(table), scale, resolution)
    corners = [w[:, None] * table.index_select(0, r) for r, w in zip(row, weight, strict=True)]
    return sum(corners[1:], corners[0])
