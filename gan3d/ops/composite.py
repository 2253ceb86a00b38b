"""From samples to what a ray sees: weights, features, depth and opacity, for rays of equal and of unequal length."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gan3d.ops import extension
from gan3d.ops.autograd import differentiable, shaped_like
from gan3d.ops.reference.composite import composite as reference_composite
from gan3d.ops.reference.composite import composite_packed as reference_composite_packed


class Composite(NamedTuple):
    """What rays saw. depth is Σ weight·t, not divided by the opacity: a ray that meets nothing has depth 0."""

    features: Float[Tensor, "*b c"]
    depth: Float[Tensor, "*b"]
    opacity: Float[Tensor, "*b"]
    weights: Float[Tensor, "*s"]  # of each sample, in the shape of density


def composite(density: Float[Tensor, "*b s"], delta: Float[Tensor, "*b s"], features: Float[Tensor, "*b s c"],
              t: Float[Tensor, "*b s"], background: Float[Tensor, "*behind"] | None = None,
              threshold: float = 0.0) -> Composite:
    """What each ray sees of its samples, near to far, and of the background behind them. NeRF (2020), eq. 3.

    A sample lets e^−x of the light through, x = density·delta. Its weight is the light that arrives, e^−(Σx before it),
    times 1 − e^−x; features are Σ weight·features + e^−Σx·background, opacity is Σ weight. Differentiable in all five
    tensors, twice; weights may be used in a loss like the other outputs. On every device sums have a fixed order.
    Args:
        density: ≥ 0 (not checked), per scene unit.
        delta: ≥ 0, scene units. A last delta of 1e10 closes the ray (inf would give nan where density is 0).
        t: distances along the ray.
        background: [c], one for all rays, or [*b c]; None: black.
        threshold: in [0, 1]. A sample that less light than this reaches has weight 0 and gradient 0; the background
            takes the light behind the last other one. 1e-4 is invisible; 0 processes every sample.
    Raises: ValueError if shapes do not fit or threshold is outside [0, 1]; TypeError if dtypes differ.
    """
    rays, samples, channels = density.shape[:-1], density.shape[-1], features.shape[-1]
    *inputs, behind = _floats("composite", density, delta, features, t, background, threshold)
    _check("composite", "background", background, (channels,), (*rays, channels))
    n = math.prod(rays)
    density, delta, features, t = (x.reshape(n, *x.shape[len(rays):]).contiguous() for x in inputs)
    if behind is not None:
        behind = (behind if behind.dim() == 1 else behind.reshape(n, channels)).contiguous()
    code = torch.ops.gan3d.composite if extension.native(density) else reference_composite
    out = code(density, delta, features, t, behind, threshold)
    return Composite(out[0].reshape(*rays, channels), out[1].reshape(rays), out[2].reshape(rays),
                     out[3].reshape(*rays, samples))


def composite_packed(density: Float[Tensor, " n"], delta: Float[Tensor, " n"], features: Float[Tensor, "n c"],
                     t: Float[Tensor, " n"], offsets: Int[Tensor, " offsets"],
                     background: Float[Tensor, "*behind"] | None = None, threshold: float = 0.0) -> Composite:
    """`composite` for rays of unequal length: the samples of ray i are offsets[i] … offsets[i + 1] − 1, near to far.

    A ray without samples sees the background; its depth and opacity are 0. Differentiable in all float tensors, twice.
    Args:
        offsets: int32 or int64, ascending from 0 to n (checked on the CPU only: a GPU would have to wait).
        background: [c], one for all rays, or [r c]; None: black.
    Returns: features [r c], depth [r], opacity [r], weights [n].
    Raises: ValueError if shapes or offsets do not fit or threshold is outside [0, 1]; TypeError for other dtypes.
    """
    if offsets.dim() != 1 or len(offsets) == 0:
        raise ValueError(f"composite_packed: offsets must have shape [rays + 1], got {tuple(offsets.shape)}")
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"composite_packed: offsets must be int32 or int64, got {offsets.dtype}")
    channels = features.shape[-1]
    *inputs, behind = _floats("composite_packed", density, delta, features, t, background, threshold)
    _check("composite_packed", "background", background, (channels,), (len(offsets) - 1, channels))
    density, delta, features, t = (x.contiguous() for x in inputs)
    code = torch.ops.gan3d.composite_packed if extension.native(density) else reference_composite_packed
    return Composite(*code(density, delta, features, t, offsets.contiguous(),
                           behind if behind is None else behind.contiguous(), threshold))


def _floats(op: str, density: Tensor, delta: Tensor, features: Tensor, t: Tensor, background: Tensor | None,
            threshold: float) -> list:
    """All but the threshold, in float32 or float64."""
    if not 0 <= threshold <= 1:
        raise ValueError(f"{op}: threshold must lie in [0, 1], got {threshold}")
    _check(op, "delta", delta, tuple(density.shape))
    _check(op, "t", t, tuple(density.shape))
    _check(op, "features", features, (*density.shape, features.shape[-1]))
    inputs = [x if x is None else extension.as_float(x) for x in (density, delta, features, t, background)]
    dtypes = {x.dtype for x in inputs if x is not None}
    if len(dtypes) > 1:
        raise TypeError(f"{op}: density, delta, features, t and background must have one dtype, got "
                        f"{', '.join(sorted(map(str, dtypes)))}")
    return inputs


def _check(op: str, name: str, x: Tensor | None, *shapes: tuple[int, ...]) -> None:
    if x is not None and tuple(x.shape) not in shapes:
        expected = " or ".join(str(list(s)) for s in shapes)
        raise ValueError(f"{op}: {name} must have shape {expected}, got {list(x.shape)}")


# A thickness, two exponentials of 15 operations, a weight, and the sums of weights and of weight·t.
SAMPLE_FLOPS = 35
# Once more, then a weight's gradient (4), the sum of those behind (2), and the gradients of thickness and its factors.
SAMPLE_FLOPS_BACKWARD = 46


@extension.after_loading
def _register() -> None:
    def shapes(rays: int | torch.SymInt, density: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (density.new_empty(rays, features.shape[-1]), density.new_empty(rays), density.new_empty(rays),
                torch.empty_like(density))

    @torch.library.register_fake("gan3d::composite")
    def _(density: Tensor, delta: Tensor, features: Tensor, t: Tensor, background: Tensor | None,
          threshold: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return shapes(density.shape[0], density, features)

    @torch.library.register_fake("gan3d::composite_packed")
    def _(density: Tensor, delta: Tensor, features: Tensor, t: Tensor, offsets: Tensor, background: Tensor | None,
          threshold: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return shapes(offsets.shape[0] - 1, density, features)

    @torch.library.register_fake("gan3d::composite_backward")
    def _(grad_features: Tensor, grad_depth: Tensor, grad_opacity: Tensor, grad_weights: Tensor, density: Tensor,
          delta: Tensor, features: Tensor, t: Tensor, background: Tensor | None, threshold: float,
          needed: Sequence[bool]) -> tuple[Tensor, ...]:
        return shaped_like([density, delta, features, t, background], needed)

    @torch.library.register_fake("gan3d::composite_packed_backward")
    def _(grad_features: Tensor, grad_depth: Tensor, grad_opacity: Tensor, grad_weights: Tensor, density: Tensor,
          delta: Tensor, features: Tensor, t: Tensor, offsets: Tensor, background: Tensor | None, threshold: float,
          needed: Sequence[bool]) -> tuple[Tensor, ...]:
        return shaped_like([density, delta, features, t, background], needed)

    @register_flop_formula([torch.ops.gan3d.composite, torch.ops.gan3d.composite_packed])
    def _(density: tuple, delta: tuple, features: tuple, *args: object, out_shape: tuple, **_: object) -> int:
        return math.prod(density) * (SAMPLE_FLOPS + 2 * features[-1])

    @register_flop_formula([torch.ops.gan3d.composite_backward, torch.ops.gan3d.composite_packed_backward])
    def _(grad_features: tuple, grad_depth: tuple, grad_opacity: tuple, grad_weights: tuple, *args: object,
          out_shape: tuple, **_: object) -> int:
        return math.prod(grad_weights) * (SAMPLE_FLOPS_BACKWARD + 3 * grad_features[-1])

    differentiable("composite", reference_composite, wanted=[0, 1, 2, 3, 4], selective=True)
    differentiable("composite_packed", reference_composite_packed, wanted=[0, 1, 2, 3, 5], selective=True)
