"""Which samples: points along rays. t is a distance along the ray; delta is the length that a sample stands for."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gan3d.cameras import Number
from gan3d.rays import Rays

LAST_DELTA = 1e10  # closes the ray: whatever is dense at the last sample hides what lies behind (NeRF)


def spread(rays: Rays, samples: int, jitter: Literal["none", "strata", "offset"] = "none") -> Float[Tensor, "*b n s"]:
    """`samples` distances per ray from near to far, both included.

    Jitter "strata": uniform in bins bounded by the midpoints, half as wide at the two ends (NeRF, GRAF);
    "offset": each moved by U(−½, ½) of the spacing, so the ends may leave [near, far] (π-GAN).
    """
    steps = torch.linspace(0, 1, samples, device=rays.near.device, dtype=rays.near.dtype)
    near, far = rays.near[..., None], rays.far[..., None]
    t = near + (far - near) * steps
    if jitter == "none" or samples == 1:
        return t
    u = torch.rand_like(t)
    if jitter == "strata":
        middle = (t[..., 1:] + t[..., :-1]) / 2
        low = torch.cat([t[..., :1], middle], dim=-1)
        high = torch.cat([middle, t[..., -1:]], dim=-1)
        return low + (high - low) * u
    if jitter == "offset":
        return t + (u - 0.5) * (far - near) / (samples - 1)
    raise ValueError(f"jitter must be 'none', 'strata' or 'offset', got {jitter!r}")


def deltas(t: Float[Tensor, "*b s"], last: Number = LAST_DELTA) -> Float[Tensor, "*b s"]:
    """Distance from each sample to the next; `last` for the final one, 1e10 to close the ray."""
    return torch.cat([t[..., 1:] - t[..., :-1], torch.full_like(t[..., :1], last)], dim=-1)


def sample_pdf(
    edges: Float[Tensor, "*b e"],
    weights: Float[Tensor, "*b s"],
    u: Float[Tensor, "*b m"],
    eps: float = 1e-5,
) -> Float[Tensor, "*b m"]:
    """Points distributed as `weights`, piecewise constant over bins `edges`: NeRF's inverse CDF (sec. 5.2).

    Args:
        edges: limits of the bins, ascending; one more than there are weights.
        u: quantiles in [0, 1): `torch.rand` while training, even ones for a reproducible picture.
        eps: added to every weight, so that no bin is impossible.
    No gradient flows to the weights. Raises: ValueError if the numbers of edges and weights do not fit.
    """
    if edges.shape[-1] != weights.shape[-1] + 1:
        raise ValueError(f"{weights.shape[-1]} weights need {weights.shape[-1] + 1} edges, got {edges.shape[-1]}")
    weights = weights.detach() + eps
    pdf = weights / weights.sum(-1, keepdim=True)
    cdf = torch.cat([torch.zeros_like(pdf[..., :1]), pdf.cumsum(-1)], dim=-1)
    above = torch.searchsorted(cdf, u.contiguous(), right=True).clamp(1, edges.shape[-1] - 1)
    below = above - 1
    cdf_below, cdf_above = cdf.gather(-1, below), cdf.gather(-1, above)
    edge_below, edge_above = edges.gather(-1, below), edges.gather(-1, above)
    width = cdf_above - cdf_below
    fraction = (u - cdf_below) / torch.where(width < eps, torch.ones_like(width), width)
    return edge_below + fraction * (edge_above - edge_below)


def even_quantiles(shape: tuple[int, ...], samples: int, like: Tensor) -> Float[Tensor, "*b m"]:
    """Quantiles (i + ½)/m for `sample_pdf`: the same picture every time."""
    u = (torch.arange(samples, device=like.device, dtype=like.dtype) + 0.5) / samples
    return u.expand(*shape, samples)


def merge(
    first: Float[Tensor, "*b s"], second: Float[Tensor, "*b m"]
) -> tuple[Float[Tensor, "*b k"], Int[Tensor, "*b k"]]:
    """Both sets of distances in order, and for each where it stood in `cat([first, second], -1)`."""
    return torch.cat([first, second], dim=-1).sort(dim=-1, stable=True)
