"""The structure of sparse voxel grids: bits, ranks, rows, pruning and upsampling, by whole-tensor operations."""

import torch
from torch import Tensor

from gan3d.ops.cells import Resolution, cell_index, check_resolution, cube_shift

_GATHER = 0x0102040810204080  # moves the lowest bits of eight bytes into the highest byte


def to_cells(dense: Tensor, resolution: Resolution) -> Tensor:
    """`[X Y Z …]` in raster order to `[cells …]`: a permutation of the binary digits of x, y and z below the cubes."""
    shape, order, tail = _digits(resolution), _cell_order(resolution), dense.shape[3:]
    digits = dense.reshape(*shape, *tail)
    return digits.permute(*order, *range(len(order), digits.dim())).reshape(-1, *tail)


def from_cells(values: Tensor, resolution: Resolution) -> Tensor:
    """The inverse of `to_cells`."""
    shape, order, tail = _digits(resolution), _cell_order(resolution), values.shape[1:]
    digits = values.reshape(*(shape[i] for i in order), *tail)
    back = sorted(range(len(order)), key=order.__getitem__)
    return digits.permute(*back, *range(len(order), digits.dim())).reshape(*resolution, *tail)


def _digits(resolution: Resolution) -> list[int]:
    shift = cube_shift(resolution)
    return [size for side in resolution for size in (side >> shift, *[2] * shift)]


def _cell_order(resolution: Resolution) -> list[int]:
    n = cube_shift(resolution) + 1
    return [0, n, 2 * n] + [axis * n + digit for digit in range(1, n) for axis in (2, 1, 0)]


def pack(exists: Tensor) -> Tensor:
    """Bool `[64·w]` to words."""
    eight = exists.view(torch.int64)  # a bool is a byte
    return ((eight * _GATHER >> 56) & 255).to(torch.uint8).view(torch.int64)


def unpack(words: Tensor) -> Tensor:
    """Words to bool `[64·w]`."""
    bits = 1 << torch.arange(8, device=words.device, dtype=torch.uint8)
    return (words.view(torch.uint8)[:, None] & bits).bool().reshape(-1)


def _popcount(words: Tensor) -> Tensor:
    words = words - ((words >> 1) & 0x5555555555555555)
    words = (words & 0x3333333333333333) + ((words >> 2) & 0x3333333333333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (words * 0x0101010101010101 >> 56) & 127


def rank_words(words: Tensor) -> Tensor:
    rank = torch.zeros(len(words) + 1, dtype=torch.int32, device=words.device)
    torch.cumsum(_popcount(words), 0, dtype=torch.int32, out=rank[1:])
    return rank


def voxels_from_mask(mask: Tensor) -> tuple[Tensor, Tensor]:
    x, y, z = check_resolution((mask.shape[0], mask.shape[1], mask.shape[2]))
    words = pack(to_cells(mask, (x, y, z)))
    return words, rank_words(words)


def voxels_from_scores(score: Tensor, threshold: float, dilate: int) -> tuple[Tensor, Tensor]:
    return voxels_from_mask(_dilate(score >= threshold, dilate))


def voxels_from_positions(positions: Tensor, resolution: Resolution) -> tuple[Tensor, Tensor]:
    if not _inside(positions, resolution).all():
        raise IndexError(f"voxels_from_positions: a position lies outside the grid of {list(resolution)} cells")
    x, y, z = resolution
    exists = torch.zeros(x * y * z, dtype=torch.bool, device=positions.device)
    exists[cell_index(positions, resolution)] = True
    words = pack(exists)
    return words, rank_words(words)


def voxel_mask(words: Tensor, resolution: Resolution) -> Tensor:
    return from_cells(unpack(words), resolution)


def voxel_positions(words: Tensor, rank: Tensor, resolution: Resolution) -> Tensor:
    axes = [torch.arange(side, dtype=torch.int32, device=words.device) for side in resolution]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    return to_cells(grid, resolution)[unpack(words)]


def voxel_rows(words: Tensor, rank: Tensor, positions: Tensor, resolution: Resolution) -> Tensor:
    inside = _inside(positions, resolution)
    cell = cell_index(torch.where(inside[:, None], positions, 0), resolution)
    word, bit = words[cell >> 6], 1 << (cell & 63)
    row = rank[cell >> 6] + _popcount(word & (bit - 1)).int()
    return torch.where(inside & (word & bit != 0), row, -1)


def _inside(positions: Tensor, resolution: Resolution) -> Tensor:
    return ((positions >= 0) & (positions < positions.new_tensor(resolution))).all(-1)


def _raster(words: Tensor, resolution: Resolution) -> Tensor:
    """Where each voxel lies in a dense grid, int64 `[rows]`."""
    x, y, z = resolution
    places = torch.arange(x * y * z, device=words.device).reshape(resolution)
    return to_cells(places, resolution)[unpack(words)]


def gather_voxels(dense: Tensor, words: Tensor, rank: Tensor, rows: int | None = None) -> Tensor:
    resolution = (dense.shape[0], dense.shape[1], dense.shape[2])
    return dense.flatten(0, 2).index_select(0, _raster(words, resolution))


def scatter_voxels(values: Tensor, words: Tensor, rank: Tensor, resolution: Resolution, fill: float) -> Tensor:
    x, y, z = resolution
    dense = values.new_full((x * y * z, values.shape[1]), fill)
    return dense.index_copy(0, _raster(words, resolution), values).reshape(x, y, z, -1)


def prune_voxels(words: Tensor, rank: Tensor, score: Tensor, threshold: float, dilate: int,
                 resolution: Resolution) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if len(score) != int(rank[-1]):
        raise ValueError(f"prune_voxels: score has {len(score)} entries for {int(rank[-1])} voxels")
    exists, keep = unpack(words), score >= threshold
    kept = exists.masked_scatter(exists, keep)
    if dilate > 0:
        kept = to_cells(_dilate(from_cells(kept, resolution), dilate), resolution) & exists
        keep = kept[exists]
    new_to_old = keep.nonzero()[:, 0].int()
    old_to_new = torch.full_like(keep, -1, dtype=torch.int32)
    old_to_new[new_to_old] = torch.arange(len(new_to_old), dtype=torch.int32, device=words.device)
    new_words = pack(kept)
    return new_words, rank_words(new_words), new_to_old, old_to_new


def _dilate(mask: Tensor, steps: int) -> Tensor:
    """The 26-neighbourhood `steps` times, axis after axis. By shifted ORs: max_pool3d takes many times as long."""
    for axis in range(3):
        for _ in range(steps):
            wide, inner = mask.clone(), mask.shape[axis] - 1
            wide.narrow(axis, 1, inner).logical_or_(mask.narrow(axis, 0, inner))
            wide.narrow(axis, 0, inner).logical_or_(mask.narrow(axis, 1, inner))
            mask = wide
    return mask


def compact_rows(values: Tensor, new_to_old: Tensor) -> Tensor:
    return values.index_select(0, new_to_old)


def spread_rows(values: Tensor, new_to_old: Tensor, rows: int) -> Tensor:
    return values.new_zeros(rows, values.shape[1]).index_copy(0, new_to_old.long(), values)


def upsample_voxels(words: Tensor, rank: Tensor, resolution: Resolution) -> tuple[Tensor, Tensor, Tensor]:
    fine = pack(unpack(words)[:, None].expand(-1, 8).reshape(-1))
    parent = torch.arange(8 * int(rank[-1]), dtype=torch.int32, device=words.device) >> 3
    return fine, rank_words(fine), parent


def upsample_rows(values: Tensor) -> Tensor:
    return values[:, None].expand(-1, 8, -1).reshape(-1, values.shape[1])


def pool_rows(values: Tensor) -> Tensor:
    return values.unflatten(0, (-1, 8)).sum(1)


def voxel_neighbours(words: Tensor, rank: Tensor, resolution: Resolution) -> Tensor:
    exists = unpack(words)
    rows = torch.full((len(exists),), -1, dtype=torch.int32, device=words.device)
    count = int(rank[-1])
    rows[exists] = torch.arange(count, dtype=torch.int32, device=words.device)
    padded = torch.nn.functional.pad(from_cells(rows, resolution), (1, 1, 1, 1, 1, 1), value=-1)
    _, y, z = padded.shape
    places = torch.arange(padded.numel(), device=words.device).reshape(padded.shape)[1:-1, 1:-1, 1:-1]
    centre, table = to_cells(places, resolution)[exists], padded.reshape(-1)
    out = table.new_empty(count, 27)
    for i in range(27):
        out[:, i] = table[centre + ((i // 9 - 1) * y + i // 3 % 3 - 1) * z + i % 3 - 1]
    return out
