"""Asking a field along rays: the Field protocol, rays that miss, chunks in bounded memory, normals."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gan3d.rays import Rays
from gan3d.volume import Rendering


@runtime_checkable
class Field(Protocol):
    """Density and features anywhere in space. Latents are bound when the field is made; a field knows no cameras.

    points `[*b n s 3]`, directions `[*b n 1 3]` (unit; one per ray) → raw_density `[*b n s]`, features `[*b n s c]`.
    `raw_density` is before the activation that gives density ≥ 0, since noise is added to it while training. The first
    three features are rgb in [0, 1]; a generator whose features are something else has a `colour(ready, features)`.
    """

    def __call__(self, points: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]: ...


def points_along(rays: Rays, t: Float[Tensor, "*b n s"]) -> Float[Tensor, "*b n s 3"]:
    return rays.origins[..., None, :] + rays.directions[..., None, :] * t[..., None]


def query(field: Field, rays: Rays, t: Float[Tensor, "*b n s"]) -> tuple[Tensor, Tensor]:
    """The field at distances t: raw_density `[*b n s]`, features `[*b n s c]`."""
    return field(points_along(rays, t), rays.directions[..., None, :])


def render_hits(
    render: Callable[[Rays], Rendering], rays: Rays, background: Tensor | None
) -> Rendering:
    """`render` only the rays that meet the bounds; the others show `background [c]` (None: zeros) at opacity 0.

    Images of a batch keep equal numbers of rays: as many as the fullest one has hits. Nothing is lost: the rays that
    fill up the others have near = far, hence no weight (if `render` closes no ray by a last delta of 1e10).
    """
    hit = rays.far > rays.near
    most = int(hit.sum(-1).max())
    n = hit.shape[-1]
    rays = Rays(rays.origins, rays.directions, rays.near, torch.maximum(rays.near, rays.far))
    if most == n:
        return render(rays)
    most = max(most, 1)
    index = hit.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :most]
    seen = render(rays.select(index))
    channels = seen.features.shape[-1]
    empty = seen.features.new_zeros(channels) if background is None else background.to(seen.features)
    wide = index[..., None].expand(*index.shape, channels)
    features = empty.expand(*hit.shape, channels).scatter(-2, wide, seen.features)
    zeros = seen.depth.new_zeros(hit.shape)
    return Rendering(features, zeros.scatter(-1, index, seen.depth), zeros.scatter(-1, index, seen.opacity))


def render_chunks(render: Callable[[Rays], Rendering], rays: Rays, chunk: int | None) -> Rendering:
    """`render` in chunks of at most `chunk` rays an image, so that memory no longer grows with the picture.

    With gradients on, each chunk is recomputed in the backward pass instead of being remembered. None: all at once.
    """
    n = rays.near.shape[-1]
    if chunk is None or n <= chunk:
        return render(rays)

    def run(part: Rays) -> Rendering:
        if not torch.is_grad_enabled():
            return render(part)
        return checkpoint(render, part, use_reentrant=False)  # type: ignore[return-value]

    parts = [run(rays.slice(start, min(start + chunk, n))) for start in range(0, n, chunk)]
    return Rendering(torch.cat([p.features for p in parts], -2), torch.cat([p.depth for p in parts], -1),
                     torch.cat([p.opacity for p in parts], -1))


def density_normals(
    field: Field, points: Float[Tensor, "*b n s 3"], create_graph: bool = False
) -> Float[Tensor, "*b n s 3"]:
    """Unit normals −∇density/‖∇density‖ at points, by automatic differentiation; zero where the density is flat.

    create_graph: what the field is made of can be trained through them.
    """
    with torch.enable_grad():
        points = points.detach().requires_grad_(True)
        forward = torch.zeros_like(points[..., :1, :])
        forward[..., 2] = 1
        raw_density, _ = field(points, forward)
        (gradient,) = torch.autograd.grad(raw_density.sum(), points, create_graph=create_graph)
    return -torch.nn.functional.normalize(gradient, dim=-1)


def depth_normals(points: Float[Tensor, "*b h w 3"]) -> Float[Tensor, "*b h w 3"]:
    """Unit normals, towards the camera, of the surface through the pixels' points (central differences)."""
    down = torch.gradient(points, dim=-3)[0]
    right = torch.gradient(points, dim=-2)[0]
    return torch.nn.functional.normalize(torch.linalg.cross(down, right, dim=-1), dim=-1)
