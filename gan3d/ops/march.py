"""Marching rays through an occupancy bit field: where along each ray the field is worth asking."""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gan3d.ops import extension
from gan3d.ops.cells import Resolution
from gan3d.ops.occupancy import check_words
from gan3d.ops.reference.march import march as reference_march
from gan3d.ops.reference.march import ray_aabb as reference_ray_aabb

_JITTERS = ("none", "ray", "sample")


class Samples(NamedTuple):
    """Samples of all rays, ray after ray, near to far: those of ray i are offsets[i] … offsets[i + 1] − 1."""

    offsets: Int[Tensor, " n+1"]  # int32
    ray_index: Int[Tensor, " s"]  # int32
    t: Float[Tensor, " s"]  # distance along the ray
    delta: Float[Tensor, " s"]  # the length the sample stands for


def ray_aabb(rays_o: Float[Tensor, "*b 3"], rays_d: Float[Tensor, "*b 3"], boxes: Float[Tensor, "m 2 3"],
             near: float = 0.0, far: float = math.inf) -> tuple[Float[Tensor, "*b m"], Float[Tensor, "*b m"]]:
    """Where each ray enters and leaves each box (slab test), kept to [near, far].

    A miss has both equal to the `near` given; so has a ray that only touches, as there is nothing to march (and a box
    of no thickness, unless the ray lies in it). far ≤ near is a miss, as in `Rays`. A ray parallel to a face is inside
    the slab if its origin is, faces included. t is a distance if directions have unit length.
    """
    o = extension.as_float(rays_o.detach()).reshape(-1, 3).contiguous()
    d, box = rays_d.detach().to(o.dtype).reshape(-1, 3).contiguous(), boxes.detach().to(o.dtype).contiguous()
    code = torch.ops.gan3d.ray_aabb if extension.native(o) else reference_ray_aabb
    enter, leave = code(o, d, box, near, far)
    shape = (*rays_o.shape[:-1], boxes.shape[0])
    return enter.reshape(shape), leave.reshape(shape)


def march(rays_o: Float[Tensor, "n 3"], rays_d: Float[Tensor, "n 3"], near: Float[Tensor, " n"],
          far: Float[Tensor, " n"], words: Int[Tensor, "*l w"] | None, aabb: Float[Tensor, "2 3"] | None,
          resolution: Resolution | None, step: float, cone: float = 0.0, max_step: float = math.inf,
          max_samples: int = 1024, jitter: Literal["none", "ray", "sample"] = "none", seed: int = 0) -> Samples:
    """The points of each ray's lattice before `far` whose cells are occupied. Instant-NGP (2022), supp. sec. C and E.

    Interval k of a ray begins at s_k, s_0 = near, and its sample is at t_k = s_k + u·delta_k, delta_k = s_{k+1} − s_k.
    cone = 0: t_k = near + (k + u)·step, a product and a sum. cone > 0: s_{k+1} = s_k + clamp(cone·s_k, step, max_step).
    The lattice is the ray's own and has at most 2^24 intervals: the bits decide which points are returned,
    never where they are. Not differentiable. On every device the same bits.

    Args:
        rays_d: unit length (not checked), so that t, near, far and step are distances.
        near, far: far ≤ near, NaN, or a near that is not finite: no samples. far may be inf: marching ends at the
            coarsest level's box.
        words, aabb, resolution: the bit field (see `occupancy`). A point asks the finest level that contains it, or a
            coarser one if its interval is longer than the shortest side of that level's cells. None: all is occupied
            between near and far.
        max_samples: of a ray; the nearest ones are kept.
        jitter: u is ½ ("none"), a random number of the ray ("ray"), or one of each interval ("sample"). Random numbers
            are those of (seed, row of the ray, k), whatever else is marched.
        seed: 0 ≤ seed < 2^63.
    Raises: ValueError for a step, cone, max_step, max_samples, jitter, seed or words that make no sense.
    """
    if not (step > 0 and cone >= 0 and max_step >= step):
        raise ValueError(f"march: needs step > 0, cone >= 0 and max_step >= step, got {step}, {cone} and {max_step}")
    if max_samples < 1:
        raise ValueError(f"march: max_samples must be positive, got {max_samples}")
    if jitter not in _JITTERS:
        raise ValueError(f"march: jitter must be one of {', '.join(_JITTERS)}, got {jitter!r}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"march: seed must lie in [0, 2^63), got {seed}")
    o = extension.as_float(rays_o.detach()).contiguous()
    d, near, far = (x.detach().to(o.dtype).contiguous() for x in (rays_d, near, far))
    if words is None:
        aabb, resolution = None, (4, 4, 4)
    elif aabb is None or resolution is None:
        raise ValueError("march: words need aabb and resolution")
    else:
        words, aabb = check_words(words, resolution), aabb.detach().to(o.dtype).contiguous()
    code = torch.ops.gan3d.march if extension.native(o) else reference_march
    return Samples(*code(o, d, near, far, words, aabb, resolution, step, cone, max_step, max_samples,
                         _JITTERS.index(jitter), seed))


@extension.after_loading
def _register() -> None:
    @torch.library.register_fake("gan3d::ray_aabb")
    def _(rays_o: Tensor, rays_d: Tensor, boxes: Tensor, near: float, far: float) -> tuple[Tensor, Tensor]:
        shape = (rays_o.shape[0], boxes.shape[0])
        return rays_o.new_empty(shape), rays_o.new_empty(shape)

    @torch.library.register_fake("gan3d::march")
    def _(rays_o: Tensor, rays_d: Tensor, near: Tensor, far: Tensor, words: Tensor | None, aabb: Tensor | None,
          resolution: list[int], step: float, cone: float, max_step: float, max_samples: int, jitter: int,
          seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        count = torch.library.get_ctx().new_dynamic_size()
        return (rays_o.new_empty(rays_o.shape[0] + 1, dtype=torch.int32), rays_o.new_empty(count, dtype=torch.int32),
                rays_o.new_empty(count), rays_o.new_empty(count))

    @register_flop_formula(torch.ops.gan3d.ray_aabb)
    def _(rays_o: tuple, rays_d: tuple, boxes: tuple, near: float, far: float, *, out_shape: tuple, **_: object) -> int:
        return rays_o[0] * boxes[0] * 12  # six subtractions and six divisions

    @register_flop_formula(torch.ops.gan3d.march)
    def _(rays_o: tuple, *_: object, out_shape: tuple, **__: object) -> int:
        return out_shape[1][0] * 12  # t, the point and its place, for the samples alone
