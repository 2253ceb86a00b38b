"""Volume rendering as its sums read. NeRF (2020), eq. 3."""

import torch
from torch import Tensor


def composite(density: Tensor, delta: Tensor, features: Tensor, t: Tensor, background: Tensor | None, threshold: float
              ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rays of equally many samples: density, delta, t `[n s]`, features `[n s c]`, background `[n c]`."""
    thickness = density * delta
    before = torch.cat([torch.zeros_like(thickness[:, :1]), thickness[:, :-1].cumsum(-1)], dim=-1)
    if threshold > 0:  # samples that find too little light are not there
        thickness = torch.where(torch.exp(-before.detach()) >= threshold, thickness, 0)
    weights = torch.exp(-before) * -torch.expm1(-thickness)
    feature = torch.matmul(weights[:, None], features)[:, 0]
    if background is not None:
        feature = feature + torch.exp(-thickness.sum(-1))[:, None] * background
    return feature, (weights * t).sum(-1), weights.sum(-1), weights


def composite_packed(density: Tensor, delta: Tensor, features: Tensor, t: Tensor, offsets: Tensor,
                     background: Tensor | None, threshold: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rays of any number of samples, one after the other: density, delta, t `[n]`, features `[n c]`."""
    rays = len(offsets) - 1
    ray = torch.repeat_interleave(torch.arange(rays, device=density.device), offsets.diff(), output_size=len(density))
    thickness = density * delta

    def before_in_ray(x: Tensor) -> Tensor:  # one long sum in float64: in float32 its differences would be noise
        total = torch.cat([x.new_zeros(1, dtype=torch.float64), x.double().cumsum(0)])
        return (total[:-1] - total[offsets[:-1]][ray]).to(x.dtype)

    def over_ray(x: Tensor) -> Tensor:
        return x.new_zeros(rays, *x.shape[1:]).index_add(0, ray, x)

    before = before_in_ray(thickness)
    if threshold > 0:
        thickness = torch.where(torch.exp(-before.detach()) >= threshold, thickness, 0)
    weights = torch.exp(-before) * -torch.expm1(-thickness)
    feature = over_ray(weights[:, None] * features)
    if background is not None:
        feature = feature + torch.exp(-over_ray(thickness))[:, None] * background
    return feature, over_ray(weights * t), over_ray(weights), weights
