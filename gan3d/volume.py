"""From densities along a ray to its colour: dense volume rendering. NeRF (Mildenhall et al., 2020), eq. 3."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gan3d.cameras import Number


@dataclass(frozen=True)
class Rendering:
    """What a ray saw. depth is Σ weight·t, not divided by the opacity: a ray that meets nothing has depth 0."""

    features: Float[Tensor, "*b n c"]
    depth: Float[Tensor, "*b n"]
    opacity: Float[Tensor, "*b n"]


def composite(density: Float[Tensor, "*b s"], delta: Float[Tensor, "*b s"]) -> Float[Tensor, "*b s"]:
    """Weight of each sample in its ray's colour: transmittance × alpha. NeRF (2020), eq. 3.

    Args:
        density: ≥ 0, per scene unit; samples ordered near to far.
        delta: ≥ 0, scene units. A last delta of 1e10 closes the ray (inf would give nan where density is 0).
    Returns: weights in [0, 1], summing to the ray's opacity.
    Raises: ValueError if the shapes differ.
    """
    if density.shape != delta.shape:
        raise ValueError(f"density {tuple(density.shape)} and delta {tuple(delta.shape)} must have the same shape")
    thickness = density * delta
    before = torch.cat([torch.zeros_like(thickness[..., :1]), thickness[..., :-1].cumsum(-1)], dim=-1)
    return torch.exp(-before) * -torch.expm1(-thickness)


def accumulate(
    weights: Float[Tensor, "*b n s"],
    features: Float[Tensor, "*b n s c"],
    t: Float[Tensor, "*b n s"],
    background: Sequence[Number] | Tensor | None = None,
) -> Rendering:
    """The weighted sums along each ray; what light is left takes the colour of `background` (None: black)."""
    opacity = weights.sum(-1)
    colour = torch.matmul(weights[..., None, :], features)[..., 0, :]
    if background is not None:
        behind = background if isinstance(background, Tensor) else colour.new_tensor(background)
        colour = colour + (1 - opacity)[..., None] * behind
    return Rendering(colour, (weights * t).sum(-1), opacity)
