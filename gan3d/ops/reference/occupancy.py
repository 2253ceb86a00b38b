"""Occupancy bit fields: packing, asking, and the moving maximum they are made of."""

import torch
from torch import Tensor

from gan3d.ops.cells import Resolution, cell_index, check_resolution

_GATHER = 0x0102040810204080  # moves the lowest bits of eight bytes into the highest byte


def pack_bits(values: Tensor, threshold: Tensor) -> Tensor:
    eight = (values > threshold).view(torch.int64)  # a bool is a byte
    return ((eight * _GATHER >> 56) & 255).to(torch.uint8).view(torch.int64)


def unpack_bits(words: Tensor) -> Tensor:
    return ((words[..., None] >> torch.arange(64, device=words.device)) & 1).bool().flatten(-2)


def places(points: Tensor, aabb: Tensor, resolution: Resolution) -> Tensor:
    """Cells of level 0 counted from the box's centre, int64 `[n 3]`: (place >> l) + side/2 is the cell of level l."""
    centre = (aabb[0] + aabb[1]) * 0.5
    scale = aabb.new_tensor(resolution) / (aabb[1] - aabb[0])
    place = ((points - centre) * scale).floor().clamp(-(2**30), 2**30)
    return torch.where(place.isnan(), 2**30, place).long()


def occupied(points: Tensor, words: Tensor, aabb: Tensor, resolution: Resolution,
             lowest: Tensor | int = 0) -> Tensor:
    """Whether the cell of each point is occupied, in the finest level from `lowest` on that contains it."""
    side = torch.tensor(check_resolution(resolution), device=points.device)
    place = places(points, aabb, resolution)
    out = torch.zeros_like(place[..., 0], dtype=torch.bool)
    free = (aabb[0] < aabb[1]).all() & torch.ones_like(out)
    for level, bits in enumerate(words):
        cell = (place >> level) + side // 2
        here = ((cell >= 0) & (cell < side)).all(-1) & free & (level >= torch.as_tensor(lowest, device=points.device))
        index = cell_index(cell[here], resolution)
        out[here] = ((bits[index >> 6] >> (index & 63)) & 1).bool()
        free = free & ~here
    return out


def update_occupancy(values: Tensor, index: Tensor, fresh: Tensor, decay: float, everywhere: bool) -> Tensor:
    decayed = torch.where(values < 0, values, values * decay)
    out = decayed if everywhere else values.index_copy(0, index, decayed[index])
    seen = torch.where(out[index] < 0, out[index], fresh)
    return out.scatter_reduce(0, index, seen, "amax")
