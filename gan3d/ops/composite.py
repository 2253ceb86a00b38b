"""Volume rendering in one pass: weights, features of any width, depth, opacity and background; ragged rays as well."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gan3d.cameras import Number
from gan3d.ops import extension, reference
from gan3d.ops.autograd import differentiable


class Composite(NamedTuple):
    """What rays saw, and how much each sample had to do with it."""

    features: Tensor  # [*b c], the background blended in
    depth: Tensor  # [*b], Σ weight·t: 0 where nothing is
    opacity: Tensor  # [*b], Σ weight
    weights: Tensor  # one a sample


def composite(
    density: Float[Tensor, "*b s"],
    delta: Float[Tensor, "*b s"],
    features: Float[Tensor, "*b s c"],
    t: Float[Tensor, "*b s"],
    background: Tensor | None = None,
    threshold: Number = 0.0,
) -> Composite:
    """Volume rendering of rays with equally many samples. NeRF (2020), eq. 3; derivatives by all but the threshold.

    Args:
        density: ≥ 0, per scene unit; samples ordered near to far.
        delta: ≥ 0, scene units. A last delta of 1e10 closes the ray.
        t: distance of each sample along its ray.
        background: `[c]` or `[*b c]`: what the remaining light shows. None: nothing is added.
        threshold: a ray ends before the first sample that is reached by less light than this; later samples have no
            weight and no gradient, and what is left shines on the background. 0: never.
    Raises: ValueError if shapes do not fit; TypeError for tensors that are not floating-point.
    """
    density, delta, features, t = (extension.as_float(x) for x in (density, delta, features, t))
    if not density.shape == delta.shape == t.shape == features.shape[:-1]:
        raise ValueError(f"composite: density {tuple(density.shape)}, delta {tuple(delta.shape)}, t {tuple(t.shape)} "
                         f"and features {tuple(features.shape)} without its last axis must have the same shape")
    *shape, s = density.shape
    n, c = math.prod(shape), features.shape[-1]
    args = (density.reshape(n, s), delta.reshape(n, s), features.reshape(n, s, c), t.reshape(n, s))
    out = _call("composite", args, (), _spread(background, (*shape, c), density), threshold)
    return Composite(out[0].reshape(*shape, c), out[1].reshape(shape), out[2].reshape(shape), out[3].reshape(*shape, s))


def composite_packed(
    density: Float[Tensor, " n"],
    delta: Float[Tensor, " n"],
    features: Float[Tensor, "n c"],
    t: Float[Tensor, " n"],
    offsets: Int[Tensor, " o"],
    background: Tensor | None = None,
    threshold: Number = 0.0,
) -> Composite:
    """`composite` of rays that have any number of samples, also none: ray r owns samples offsets[r] to offsets[r + 1].

    Args:
        offsets: rising from 0 to n. On the CPU this is checked; on a GPU it is not, which would mean waiting for it.
        background: `[c]` or `[r c]`. A ray without samples shows it, at depth and opacity 0.
        density, delta, features, t, threshold: as for `composite`.
    Returns: features `[r c]`, depth and opacity `[r]`, weights `[n]`. Raises: as `composite`.
    """
    density, delta, features, t = (extension.as_float(x) for x in (density, delta, features, t))
    if not density.shape == delta.shape == t.shape == features.shape[:-1]:
        raise ValueError(f"composite_packed: density {tuple(density.shape)}, delta {tuple(delta.shape)}, t "
                         f"{tuple(t.shape)} and features {tuple(features.shape)} must have the same number of samples")
    if len(offsets) == 0:
        raise ValueError("composite_packed: offsets must have one entry more than there are rays, got none")
    background = _spread(background, (len(offsets) - 1, features.shape[-1]), density)
    samples = density, delta, features, t
    return Composite(*_call("composite_packed", samples, (offsets.long(),), background, threshold))


def _spread(background: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
    """One row of the background a ray. Raises: ValueError if it fits neither the rays nor all of them."""
    if background is None:
        return None
    if tuple(background.shape) not in ((shape[-1],), shape):
        raise ValueError(f"composite: background must be {(shape[-1],)} or {shape}, got {tuple(background.shape)}")
    return background.to(like).expand(shape).reshape(math.prod(shape[:-1]), shape[-1])


def _call(name: str, samples: tuple, offsets: tuple, background: Tensor | None, threshold: Number) -> tuple:
    if not extension.native(samples[0]):
        return getattr(reference, name)(*samples, *offsets, background, float(threshold))
    tidy = [x.contiguous() for x in (*samples, *offsets)]
    behind = None if background is None else background.contiguous()
    return getattr(torch.ops.gan3d, name)(*tidy, behind, float(threshold))


@extension.after_loading
def _register() -> None:
    @torch.library.register_fake("gan3d::composite")
    def _(density: Tensor, delta: Tensor, features: Tensor, t: Tensor, background: Tensor | None, threshold: float
          ) -> tuple:
        rays = density.shape[0]
        return (density.new_empty(rays, features.shape[-1]), density.new_empty(rays), density.new_empty(rays),
                torch.empty_like(density))

    @torch.library.register_fake("gan3d::composite_packed")
    def _(density: Tensor, delta: Tensor, features: Tensor, t: Tensor, offsets: Tensor, background: Tensor | None,
          threshold: float) -> tuple:
        rays = offsets.shape[0] - 1
        return (density.new_empty(rays, features.shape[-1]), density.new_empty(rays), density.new_empty(rays),
                torch.empty_like(density))

    def gradients(*args: object) -> tuple:
        density, delta, features, t, *_, background, _, needed = args[4:]  # type: ignore[misc]
        inputs = (density, delta, features, t, background)
        return tuple(torch.empty_like(x) if wanted and isinstance(x, Tensor) else density.new_empty(0)
                     for x, wanted in zip(inputs, needed, strict=True))

    def flops(density: tuple, delta: tuple, features: tuple, *_: object, out_shape: tuple, **__: object) -> int:
        samples = features[0] if len(features) == 2 else features[0] * features[1]
        return samples * (2 * features[-1] + 20)  # about 16 for the exponential, 4 for transmittance and depth

    for name, wanted in (("composite", [0, 1, 2, 3, 4]), ("composite_packed", [0, 1, 2, 3, 5])):
        torch.library.register_fake(f"gan3d::{name}_backward", gradients)
        register_flop_formula(getattr(torch.ops.gan3d, name))(flops)
        differentiable(name, getattr(reference, name), wanted=wanted, selective=True)
