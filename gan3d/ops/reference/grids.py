"""Linear interpolation of voxel grids and feature planes: gather the corners of each point, weigh, sum."""

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor


def _axis(x: Tensor, side: int, zeros: bool) -> list[tuple[Tensor, Tensor]]:
    """The two cells around each coordinate and their weights; cell i has its centre at coordinate i."""
    if zeros:
        inside = (x >= -1) & (x < side)
    else:
        x = torch.where((x <= 0) | (x >= side - 1), x.detach().clamp(0, side - 1), x)  # no slope at the ends and beyond
        inside = ~x.isnan()
    lo = torch.where(inside, x, 0).detach().floor()
    part = x - lo
    pairs = []
    for cell, weight in ((lo, 1 - part), (lo + 1, part)):
        if zeros:
            weight = torch.where(inside & (cell >= 0) & (cell < side), weight, 0)
        pairs.append((cell.clamp(0, side - 1).long(), weight))
    return pairs


def _weighted_rows(rows: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Σ weight·rows[index] over the last axis. One gather: its derivative fills, and adds to, one dense gradient."""
    gathered = rows.index_select(0, index.flatten()).reshape(*index.shape, rows.shape[-1])
    return (weight[..., None, :] @ gathered)[..., 0, :]


def voxel_rows(shape: Sequence[int], coordinates: Tensor, zeros: bool) -> tuple[Tensor, Tensor]:
    """The eight voxels around each point, as rows of a grid `[b x y z c]`, and their weights: both [b n 8]."""
    b, x, y, z, _ = shape
    first = torch.arange(b, device=coordinates.device)[:, None]
    axes = [_axis(p, side, zeros) for p, side in zip(coordinates.unbind(-1), (x, y, z), strict=True)]
    corners = list(product(*axes))
    index = [((first * x + i) * y + j) * z + k for (i, _), (j, _), (k, _) in corners]
    weight = [wx * wy * wz for (_, wx), (_, wy), (_, wz) in corners]
    return torch.stack(index, dim=-1), torch.stack(weight, dim=-1)


def grid_sample_3d(grid: Tensor, coordinates: Tensor, zeros: bool) -> Tensor:
    b, x, y, z, c = grid.shape
    return _weighted_rows(grid.reshape(b * x * y * z, c), *voxel_rows(grid.shape, coordinates, zeros))


def triplane_sample(planes: Tensor, points: Tensor, axes: Sequence[int], scale: float) -> Tensor:
    b, p, c, h, w = planes.shape
    first = torch.arange(b, device=planes.device)[:, None]
    rows = planes.permute(0, 3, 4, 1, 2).reshape(b * h * w * p, c)  # a view of channels_last memory
    features = rows.new_zeros(*points.shape[:2], c)
    for plane in range(p):
        u, v = points[..., axes[2 * plane]], points[..., axes[2 * plane + 1]]
        across = _axis(((u + 1) * w - 1) / 2, w, True)
        down = _axis(((v + 1) * h - 1) / 2, h, True)
        corners = list(product(across, down))
        index = [((first * h + j) * w + i) * p + plane for (i, _), (j, _) in corners]
        weight = [wu * wv for (_, wu), (_, wv) in corners]
        features = features + _weighted_rows(rows, torch.stack(index, dim=-1), torch.stack(weight, dim=-1))
    return scale * features
