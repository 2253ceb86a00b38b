"""Spherical harmonics: colours of Plenoxels and PlenOctrees, the direction encoding of Instant-NGP."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gan3d.ops import extension, reference
from gan3d.ops.autograd import differentiable


def sh(directions: Float[Tensor, "*b 3"], degree: int) -> Float[Tensor, "*b k"]:
    """Real spherical harmonics Y_lm, k = (degree + 1)² terms in the order l² + l + m. PlenOctrees (2021), sec. 4.

    Args:
        directions: unit length (not checked). The derivative treats x, y and z as free: the basis is their polynomial.
        degree: 0 to 4.
    Raises: ValueError for another degree.
    """
    if not 0 <= degree <= 4:
        raise ValueError(f"sh: degree must be 0 to 4, got {degree}")
    flat = extension.as_float(directions).reshape(-1, 3)
    out = torch.ops.gan3d.sh(flat.contiguous(), degree) if extension.native(flat) else reference.sh(flat, degree)
    return out.reshape(*directions.shape[:-1], out.shape[-1])


@extension.after_loading
def _register() -> None:
    @torch.library.register_fake("gan3d::sh")
    def _(directions: Tensor, degree: int) -> Tensor:
        return directions.new_empty(directions.shape[0], (degree + 1) ** 2)

    @torch.library.register_fake("gan3d::sh_backward")
    def _(grad: Tensor, directions: Tensor, degree: int) -> Tensor:
        return torch.empty_like(directions)

    @register_flop_formula(torch.ops.gan3d.sh)
    def _(directions: tuple, degree: int, *, out_shape: tuple, **_: object) -> int:
        return directions[0] * 3 * (degree + 1) ** 2  # about three operations a term

    differentiable("sh", reference.sh, wanted=[0])
