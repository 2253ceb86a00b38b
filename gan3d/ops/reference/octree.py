"""Octrees in PlenOctree's form: level by level, and all rays together from leaf to leaf."""

import math

import torch
from torch import Tensor

LEVELS = 20  # of nodes that are entered; places are integers in units of 2^−20 of the root
SIDE = 1 << LEVELS
_AT_ONCE = 1 << 16  # rays in one piece: temporaries of a few megabytes


def build_octree(positions: Tensor, depth: int) -> Tensor:
    """`child` of the tree; a level's nodes are the distinct prefixes of the positions' digits 4x + 2y + z."""
    if len(positions) and (positions.amin() < 0 or positions.amax() >= 1 << depth):
        raise ValueError(f"build_octree: positions must lie in [0, {1 << depth})")
    code = torch.zeros_like(positions[:, 0], dtype=torch.int64)
    for bit in reversed(range(1, depth)):  # the last digit is a cell of the deepest node, not a node
        digits = (positions >> bit) & 1
        code = code * 8 + digits[:, 0] * 4 + digits[:, 1] * 2 + digits[:, 2]
    levels = [torch.unique(code)]
    for _ in range(depth - 1):
        levels.append(torch.unique_consecutive(levels[-1] >> 3))
    levels.reverse()
    if len(positions) == 0:
        levels = [code.new_zeros(1)]
    child = torch.zeros(sum(map(len, levels)), 8, dtype=torch.int32, device=positions.device)
    first = 0
    for above, here in zip(levels, levels[1:], strict=False):
        parent = first + torch.searchsorted(above, here >> 3)
        first += len(above)
        node = first + torch.arange(len(here), device=here.device)
        child[parent, here & 7] = (node - parent).int()
    return child.view(-1, 2, 2, 2)


def octree_query(child: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """The leaf at each point, and the edge of its cell."""
    steps, size = child.reshape(-1), len(child)
    leaf = torch.full_like(points[:, 0], -1, dtype=torch.int32)
    side = torch.zeros_like(points[:, 0])
    row = ((points >= 0) & (points < 1)).all(-1).nonzero()[:, 0]
    place = (points[row] * SIDE).int()
    node = torch.zeros_like(row)
    for level in range(LEVELS):
        digits = (place >> (LEVELS - 1 - level)) & 1
        cell = node * 8 + (digits[:, 0] * 4 + digits[:, 1] * 2 + digits[:, 2])
        below = node + steps[cell]
        inner = (below != node) & (below >= 0) & (below < size) if level < LEVELS - 1 else below < 0
        leaf[row[~inner]] = cell[~inner].int()
        side[row[~inner]] = 0.5 ** (level + 1)
        row, place, node = row[inner], place[inner], below[inner]
        if len(row) == 0:
            break
    return leaf, side


def octree_traverse(child: Tensor, rays_o: Tensor, rays_d: Tensor, aabb: Tensor, occupied: Tensor | None, near: float,
                    far: float, max_leaves: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of each ray: offsets; of each piece: ray, leaf, t and delta."""
    pieces = []
    for first in range(0, len(rays_o), _AT_ONCE):
        some = slice(first, first + _AT_ONCE)
        ray, *rest = _traverse(child, rays_o[some], rays_d[some], aabb, occupied, near, far, max_leaves)
        pieces.append((ray + first, *rest))
    empty = rays_o.new_zeros(0)
    ray, leaf, start, end = (torch.cat(parts) for parts in zip(*pieces, strict=True)) if pieces else (
        empty.long(), empty.int(), empty, empty)
    offsets = torch.zeros(len(rays_o) + 1, dtype=torch.int32, device=rays_o.device)
    torch.cumsum(torch.bincount(ray, minlength=len(rays_o)), 0, out=offsets[1:])
    return offsets, ray.int(), leaf, (start + end) * 0.5, end - start


def _traverse(child: Tensor, rays_o: Tensor, rays_d: Tensor, aabb: Tensor, occupied: Tensor | None, near: float,
              far: float, max_leaves: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every ray goes one leaf ahead at a time. Axes lead: [3, rays]."""
    low, unit = aabb[0, :, None], ((aabb[1] - aabb[0]) / SIDE)[:, None]
    origin, inverse = rays_o.T.contiguous(), (1 / (rays_d.T + 0.0)).contiguous()  # + 0: −0 counts as forward
    enter = torch.where(inverse < 0, _plane(SIDE, low, unit, origin, inverse), _plane(0, low, unit, origin, inverse))
    leave = torch.where(inverse < 0, _plane(0, low, unit, origin, inverse), _plane(SIDE, low, unit, origin, inverse))
    t = enter.nan_to_num(-math.inf, math.inf, -math.inf).amax(0).clamp(min=near)  # NaN: the ray lies in the face
    last = leave.nan_to_num(math.inf, math.inf, -math.inf).amin(0).clamp(max=far)
    valid = rays_o.isfinite().all(-1) & rays_d.isfinite().all(-1) & aabb.isfinite().all() & (unit > 0).all()
    valid = valid & unit.isfinite().all() & last.isfinite()
    ray = (valid & (t < last)).nonzero()[:, 0]
    t, last, origin, inverse = t[ray], last[ray], origin[:, ray], inverse[:, ray]
    count = torch.zeros_like(ray)
    found = []
    while len(ray):
        leaf, end = _leaf(child, t, last, low, unit, origin, inverse)
        report = (t < last) & (count < max_leaves)  # others are at their end
        if occupied is not None:
            report &= occupied[leaf] != 0
        found.append((ray, leaf, t, end, report))
        t, count = end, count + report
        going = ((t < last) & (count < max_leaves)).nonzero()[:, 0]
        if len(going) < 0.9 * len(ray):  # drop those at their end, once it pays
            ray, count, t, last = ray[going], count[going], t[going], last[going]
            origin, inverse = origin.index_select(1, going), inverse.index_select(1, going)
        elif len(going) == 0:
            break
    if not found:
        return ray, ray.int(), t, t
    ray, leaf, start, end, report = (torch.cat(part) for part in zip(*found, strict=True))
    kept = report.nonzero()[:, 0]
    order = kept[torch.argsort(ray[kept], stable=True)]  # the pieces were steps, not rays
    return ray[order], leaf[order].int(), start[order], end[order]


def _plane(k: Tensor | int, low: Tensor, unit: Tensor, origin: Tensor, inverse: Tensor) -> Tensor:
    """Where along the ray the planes k are crossed; NaN if the ray lies in one."""
    return (low + k * unit - origin) * inverse


def _leaf(child: Tensor, t: Tensor, last: Tensor, low: Tensor, unit: Tensor, origin: Tensor,
          inverse: Tensor) -> tuple[Tensor, Tensor]:
    """The leaf of each ray at t, and where the ray leaves it."""
    steps, size = child.reshape(-1), len(child)
    backward = inverse < 0
    corner, end, node = torch.zeros_like(origin), last, torch.zeros_like(t, dtype=torch.int64)
    leaf, open_ = node, torch.ones_like(t, dtype=torch.bool)
    for level in range(LEVELS):
        half = SIDE >> (level + 1)
        middle = _plane(corner + half, low, unit, origin, inverse)
        passed = ~(t < middle)
        upper = passed ^ backward
        exits = torch.minimum(end, torch.where(passed, math.inf, middle).amin(0))
        x, y, z = upper
        cell = node * 8 + (x * 4 + y * 2 + z)
        leaf, end = (cell, exits) if level == 0 else (torch.where(open_, cell, leaf), torch.where(open_, exits, end))
        below = node + steps.take(cell)
        open_ = open_ & (below != node) & (below >= 0) & (below < size)
        if level == LEVELS - 1 or not open_.any():
            break
        corner = corner + upper * half
        node = torch.where(open_, below, 0)
    return leaf, end
