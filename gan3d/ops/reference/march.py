"""Ray marching: every lattice point of every ray, then a filter."""

import math

import torch
from torch import Tensor

from gan3d.ops.cells import Resolution
from gan3d.ops.reference.occupancy import occupied

LATTICE_END = 1 << 24  # intervals; counts stay exact in float32
_AT_ONCE = 1 << 18  # lattice points in one piece: temporaries stay in the cache


def ray_aabb(rays_o: Tensor, rays_d: Tensor, boxes: Tensor, near: float, far: float) -> tuple[Tensor, Tensor]:
    o, d = rays_o[:, None], rays_d[:, None]
    low, high = boxes.unbind(1)
    a, b = (low - o) / d, (high - o) / d
    parallel = d == 0
    inside = (low <= o) & (o <= high)
    first = torch.where(parallel, -math.inf, torch.minimum(a, b)).amax(-1).clamp(min=near)
    last = torch.where(parallel, torch.where(inside, math.inf, -math.inf), torch.maximum(a, b)).amin(-1).clamp(max=far)
    hit = first < last
    return torch.where(hit, first, near), torch.where(hit, last, near)


def random_bits(seed: int, a: Tensor, b: Tensor) -> Tensor:
    """32 random bits of (seed, a, b), int64: Philox2x32-10 with both halves of a 64-bit key mixed in."""
    keys = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for turn in range(10):
        low, high = 0xD256D193 * (a & 0xFFFF), 0xD256D193 * (a >> 16)  # the product of 32 bits each, in two parts
        upper = (high + (low >> 16)) >> 16
        a, b = upper ^ keys[0] ^ b, (low + (high << 16)) & 0xFFFFFFFF
        keys[0] = (keys[0] + 0x9E3779B9) & 0xFFFFFFFF
        if turn == 4:
            keys[0] ^= keys[1]
    return a


def random_unit(seed: int, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return (random_bits(seed, a, b) >> 8).to(dtype) * 2.0**-24


def march(rays_o: Tensor, rays_d: Tensor, near: Tensor, far: Tensor, words: Tensor | None, aabb: Tensor | None,
          resolution: Resolution, step: float, cone: float, max_step: float, max_samples: int, jitter: int,
          seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each ray: offsets; of each sample: ray, t and delta."""
    dtype = rays_o.dtype
    step, cone, max_step = torch.tensor([step, cone, max_step], dtype=dtype).tolist()
    lattice = _growing if cone > 0 else _even
    pieces = []
    ones = torch.ones_like(near, dtype=torch.bool)
    alive = (near < far) & near.isfinite() & (ones if words is None else (rays_o + rays_d).isfinite().all(-1))
    stop = far if words is None or aabb is None else torch.minimum(far, _leave(rays_o, rays_d, aabb, len(words)))
    finest = 0.0 if aabb is None else (aabb.new_tensor(resolution) / (aabb[1] - aabb[0])).amax()
    for ray, k, start, width, delta in lattice(near, stop, alive, step, cone, max_step, max_samples, words is None):
        if jitter == 0:
            u: Tensor | float = 0.5
        else:
            u = random_unit(seed, ray, k if jitter == 2 else torch.zeros_like(k), dtype)
        t = near[ray] + (k.to(dtype) + u) * step if cone == 0 else start + u * delta
        keep = t < far[ray]
        if words is not None and aabb is not None:
            size = width * finest
            lowest = sum((size > 2**level).long() for level in range(len(words) - 1))
            keep &= occupied(rays_o[ray] + t[:, None] * rays_d[ray], words, aabb, resolution, lowest)
        pieces.append((ray[keep], t[keep], delta[keep]))
    ray, t, delta = (torch.cat(parts) for parts in zip(*pieces, strict=True)) if pieces else (
        near.new_zeros(0, dtype=torch.int64), near.new_zeros(0), near.new_zeros(0))
    if cone > 0:
        order = torch.argsort(ray, stable=True)  # the pieces were steps, not rays
        ray, t, delta = ray[order], t[order], delta[order]
    counts = torch.bincount(ray, minlength=len(near))
    before = counts.cumsum(0) - counts
    keep = torch.arange(len(ray), device=ray.device) - before[ray] < max_samples
    offsets = torch.cat([counts.new_zeros(1), counts.clamp(max=max_samples).cumsum(0)])
    return offsets.int(), ray[keep].int(), t[keep], delta[keep]


def _leave(rays_o: Tensor, rays_d: Tensor, aabb: Tensor, levels: int) -> Tensor:
    """A distance behind which no point of the ray is in the outermost box, whatever was rounded; float64."""
    eps = torch.finfo(rays_o.dtype).eps
    o, d, box = rays_o.double(), rays_d.double(), aabb.double()
    centre = (box[0] + box[1]) / 2
    reach = (box[1] - centre) * 2 ** (levels - 1)
    reach = reach + 32 * eps * (o.abs() + centre.abs() + reach)
    t = torch.where(d == 0, math.inf, (centre - o) / d + reach / d.abs())
    return (t + 16 * eps * t.abs()).amin(-1)


def _even(near: Tensor, stop: Tensor, alive: Tensor, step: float, cone: float, max_step: float, max_samples: int,
          capped: bool):
    """Lattice points k = 0, 1, … of equal intervals up to `stop`, in pieces of whole rays."""
    eps = torch.finfo(near.dtype).eps
    length = (stop.double() - near.double()) / step
    last = length + 2 + 16 * eps * (near.double().abs() / step + length.abs())
    count = torch.where(alive, last.clamp(0, max_samples if capped else LATTICE_END), 0).ceil().long()
    total = count.cumsum(0)
    begin, done = 0, 0
    while begin < len(near) and done < int(total[-1]):
        end = max(begin + 1, int(torch.searchsorted(total, done + _AT_ONCE, right=True)))
        rays = torch.arange(begin, end, device=near.device)
        ray = rays.repeat_interleave(count[begin:end])
        k = torch.arange(len(ray), device=near.device) - (total - count)[ray] + done
        width = near.new_full((len(ray),), step)
        yield ray, k, near[ray], width, width
        begin, done = end, int(total[end - 1])


def _growing(near: Tensor, stop: Tensor, alive: Tensor, step: float, cone: float, max_step: float, max_samples: int,
             capped: bool):
    """One interval of every ray still inside at a time: s ← s + clamp(cone·s, step, max_step)."""
    ray, start, end = alive.nonzero()[:, 0], near[alive], stop[alive]
    for k in range(max_samples if capped else LATTICE_END):
        inside = start < end
        if not inside.all():
            ray, start, end = ray[inside], start[inside], end[inside]
        if len(ray) == 0:
            return
        width = (start * cone).clamp(min=step).clamp(max=max_step)
        following = start + width
        yield ray, torch.full_like(ray, k), start, width, following - start
        start = following
