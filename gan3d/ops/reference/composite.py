"""Emission and absorption along rays: dense ones by sums along an axis, ragged ones by sums over the whole list."""

import torch
from torch import Tensor
from torch.nn import functional as F

# Of the light, e^−128 is nothing in either precision. Thicknesses beyond are cut where they are summed over all rays:
# the 1e10 that closes one ray would leave no digits for the next.
OPAQUE = 128.0


def composite(density: Tensor, delta: Tensor, features: Tensor, t: Tensor, background: Tensor | None,
              threshold: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    thickness = density * delta
    before = torch.cat([torch.zeros_like(thickness[..., :1]), thickness[..., :-1].cumsum(-1)], dim=-1)
    arriving = torch.exp(-before)
    weights = arriving * -torch.expm1(-thickness)
    if threshold > 0:
        dropped = arriving.detach() < threshold
        weights, thickness = weights.masked_fill(dropped, 0), thickness.masked_fill(dropped, 0)
    colour = torch.matmul(weights[..., None, :], features)[..., 0, :]
    if background is not None:
        colour = colour + torch.exp(-thickness.sum(-1))[..., None] * background
    return colour, (weights * t).sum(-1), weights.sum(-1), weights


def composite_packed(density: Tensor, delta: Tensor, features: Tensor, t: Tensor, offsets: Tensor,
                     background: Tensor | None, threshold: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rays = len(offsets) - 1
    ray = torch.repeat_interleave(torch.arange(rays, device=offsets.device), offsets.diff(), output_size=len(density))
    thickness = density * delta
    total = _running_sum(thickness)
    arriving = torch.exp(-(total[:-1] - total[offsets[:-1]][ray]).to(density.dtype))
    weights = arriving * -torch.expm1(-thickness)
    if threshold > 0:
        dropped = arriving.detach() < threshold
        weights, total = weights.masked_fill(dropped, 0), _running_sum(thickness.masked_fill(dropped, 0))

    def sums(x: Tensor) -> Tensor:
        return x.new_zeros(rays, *x.shape[1:]).index_add(0, ray, x)

    colour = sums(weights[:, None] * features)
    if background is not None:
        left = torch.exp(-(total[offsets[1:]] - total[offsets[:-1]]).to(density.dtype))
        colour = colour + left[:, None] * background
    return colour, sums(weights * t), sums(weights), weights


def _running_sum(thickness: Tensor) -> Tensor:
    """Of all samples before each, and of all; in double precision, as it runs over all rays."""
    return F.pad(thickness.clamp(max=OPAQUE).cumsum(0, dtype=torch.float64), (1, 0))
