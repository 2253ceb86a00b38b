"""Convolutions of sparse voxels, tap by tap: rows that have a neighbour there, times the tap's weight."""

import torch
from torch import Tensor

from gan3d.ops.cells import Resolution
from gan3d.ops.reference.voxels import scatter_voxels, voxel_positions


def neighbour_pairs(neighbours: Tensor) -> tuple[Tensor, Tensor]:
    columns = neighbours.T.contiguous()
    exists = columns >= 0
    target = exists.nonzero()[:, 1].int()  # tap after tap, increasing within each
    start = torch.zeros(len(columns) + 1, dtype=torch.int64)
    start[1:] = exists.sum(1).cumsum(0)
    return torch.stack([columns[exists], target], dim=1), start


def upsampling_pairs(words: Tensor, rank: Tensor, resolution: Resolution, fine_words: Tensor,
                     fine_rank: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, y, z = doubled = (2 * resolution[0], 2 * resolution[1], 2 * resolution[2])
    rows = torch.arange(int(fine_rank[-1]), dtype=torch.int32, device=words.device)
    grid = torch.full((x + 1, y + 1, z + 1), -1, dtype=torch.int32, device=words.device)  # one more: cropped
    grid[:x, :y, :z] = scatter_voxels(rows[:, None], fine_words, fine_rank, doubled, -1.0)[..., 0]
    steps = torch.cartesian_prod(*[torch.arange(3, device=words.device)] * 3)
    at = 2 * voxel_positions(words, rank, resolution)[:, None] + steps  # [rows 27 3]
    of_coarse = grid.flatten()[(at[..., 0] * (y + 1) + at[..., 1]) * (z + 1) + at[..., 2]]
    coarse, tap = (of_coarse >= 0).nonzero().unbind(1)
    of_fine = torch.full((len(rows), 27), -1, dtype=torch.int32, device=words.device)
    of_fine[of_coarse[coarse, tap].long(), tap] = coarse.int()
    back, start = neighbour_pairs(of_coarse)
    return neighbour_pairs(of_fine)[0], back, start


def conv_rows(values: Tensor, weight: Tensor, pairs: Tensor, start: Tensor, back: Tensor | None,
                rows: int) -> Tensor:
    out = values.new_zeros(rows, weight.shape[2])
    source, target = pairs.unbind(1)
    for tap, (begin, end) in enumerate(zip(start.tolist(), start.tolist()[1:], strict=False)):
        out = out.index_add(0, target[begin:end], values.index_select(0, source[begin:end]) @ weight[tap])
    return out


def conv_rows_weight(values: Tensor, grad: Tensor, pairs: Tensor, start: Tensor, back: Tensor | None) -> Tensor:
    source, target = pairs.unbind(1)
    return torch.stack([values.index_select(0, source[begin:end]).T @ grad.index_select(0, target[begin:end])
                        for begin, end in zip(start.tolist(), start.tolist()[1:], strict=False)])
