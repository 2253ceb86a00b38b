"""Trilinear interpolation in a sparse voxel grid, through a dense table of its rows."""

import torch
from torch import Tensor

from gan3d.ops.cells import cell_index


def link_table(words: Tensor, rank: Tensor, resolution: list[int]) -> Tensor:
    """Row of every voxel, −1 where there is none: int32 [X·Y·Z], in raster order (z fastest)."""
    bits = (words[:, None] >> torch.arange(64, device=words.device)) & 1
    rows = rank[:-1, None] + bits.cumsum(1, dtype=torch.int32) - 1
    rows = torch.where(bits == 1, rows, -1).flatten()
    x, y, z = (torch.arange(side, device=words.device) for side in resolution)
    size = (resolution[0], resolution[1], resolution[2])

    def part(axis: int, along: Tensor) -> Tensor:  # the axes have bits of their own in a cell's index: it is a sum
        position = along.new_zeros(len(along), 3)
        position[:, axis] = along
        return cell_index(position, size)

    cells = part(0, x)[:, None, None] + part(1, y)[:, None] + part(2, z)
    return rows[cells.flatten()]


def sparse_sample(words: Tensor, rank: Tensor, resolution: list[int], values: Tensor, coordinates: Tensor) -> Tensor:
    return sample_links(link_table(words, rank, resolution), resolution, values, coordinates)


def sample_links(links: Tensor, resolution: list[int], values: Tensor, coordinates: Tensor) -> Tensor:
    """The sum over the eight corners, `links` being a `link_table`."""
    if values.shape[0] == 0:
        return values.sum() + coordinates.sum() * 0 + values.new_zeros(len(coordinates), values.shape[1])
    sides = torch.tensor(list(resolution), device=values.device)
    inside = _clamp(coordinates, sides)
    lower = inside.detach().long().minimum(sides - 2)
    upper = inside - lower
    share = (1 - upper, upper)
    base = (lower[:, 0] * resolution[1] + lower[:, 1]) * resolution[2] + lower[:, 2]
    out = values.new_zeros(len(coordinates), values.shape[1])
    for i in range(2):
        for j in range(2):
            for k in range(2):
                row = links[base + ((i * resolution[1] + j) * resolution[2] + k)]
                weight = share[i][:, 0] * share[j][:, 1] * share[k][:, 2] * (row >= 0)
                out = out + weight[:, None] * values.index_select(0, row.clamp(min=0))
    return out


def _clamp(coordinates: Tensor, sides: Tensor) -> Tensor:
    most = (sides - 1).to(coordinates.dtype)
    return coordinates.clamp(torch.zeros_like(most), most)


def sparse_sample_sh(words: Tensor, rank: Tensor, resolution: list[int], values: Tensor, coordinates: Tensor,
                     basis: Tensor, ray_index: Tensor | None) -> tuple[Tensor, Tensor]:
    return sample_links_sh(link_table(words, rank, resolution), resolution, values, coordinates, basis, ray_index)


def sample_links_sh(links: Tensor, resolution: list[int], values: Tensor, coordinates: Tensor, basis: Tensor,
                    ray_index: Tensor | None) -> tuple[Tensor, Tensor]:
    channels = sample_links(links, resolution, values, coordinates)
    of_point = basis if ray_index is None else basis.index_select(0, ray_index)
    coefficients = channels[:, 1:].reshape(len(channels), 3, basis.shape[1])
    return channels[:, 0], (coefficients * of_point[:, None]).sum(-1)


def visibility(words: Tensor, rank: Tensor, resolution: list[int], density: Tensor, rays_o: Tensor, rays_d: Tensor,
               aabb: Tensor, step: float, stop: float) -> Tensor:
    sides = torch.tensor(list(resolution), device=density.device)
    scale = sides / (aabb[1] - aabb[0])
    origins, directions = (rays_o - aabb[0]) * scale - 0.5, rays_d * scale
    norm = directions.norm(dim=-1)
    directions = directions / norm[:, None]
    length = rays_d.norm(dim=-1) / norm * step  # of a step, in scene units
    still = directions == 0
    faces = torch.stack([(-0.5 - origins) / directions, (sides - 0.5 - origins) / directions])
    outside = still & ((origins < -0.5) | (origins > sides - 0.5))
    near = torch.where(still, 0.0, faces.amin(0)).amax(-1).clamp(min=0)
    far = torch.where(outside, -1.0, torch.where(still, torch.inf, faces.amax(0))).amin(-1)
    out = torch.zeros_like(density)
    hit = near <= far
    if not hit.any() or density.numel() == 0:
        return out
    origins, directions, length, near, far = (a[hit] for a in (origins, directions, length, near, far))
    count = ((far - near) / step).long() + 1
    index = torch.arange(int(count.max()), device=density.device)
    t = near[:, None] + index * step
    points = origins[:, None] + t[..., None] * directions[:, None]
    links = link_table(words, rank, resolution)
    raw = sample_links(links, resolution, density[:, None], points.reshape(-1, 3)).reshape(t.shape)
    thickness = torch.where(index < count[:, None], raw.relu() * length[:, None], 0.0)
    after = torch.exp(-thickness.cumsum(-1))
    before = torch.cat([torch.ones_like(after[:, :1]), after[:, :-1]], 1)
    weight = torch.where(before >= stop, before * -torch.expm1(-thickness), 0.0)
    lower = _clamp(points, sides).long().minimum(sides - 2)
    for i in range(2):
        for j in range(2):
            for k in range(2):
                x, y, z = (lower + torch.tensor([i, j, k], device=density.device)).unbind(-1)
                row = links[(x * resolution[1] + y) * resolution[2] + z]
                there = row >= 0
                out = out.scatter_reduce(0, row[there].long(), weight[there], "amax")
    return out
