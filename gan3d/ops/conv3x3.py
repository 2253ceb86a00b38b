"""StyleGAN2's 3×3 convolutions on a CPU, in float32 and channels-last, with fewer multiplications than direct sums.

After Winograd: Lavin and Gray (2016), sec. 4. PyTorch's convolutions serve everything else (cuDNN on a GPU), and where
the picture is so small that transforming the weight would take longest. Results have the same bits for any number of
threads. FLOP counts are those of the direct sums, so shares of a machine's matrix product may exceed 100 %.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from gan3d.ops import extension
from gan3d.ops.reference.conv3x3 import by_weight, smooth
from gan3d.ops.reference.conv3x3 import conv3x3 as reference_conv3x3
from gan3d.ops.reference.conv3x3 import upconv3x3 as reference_upconv3x3

CHANNELS = 64  # the compiled ops take multiples of this
LEAST_TILES = 16  # of 2×2 outputs: with fewer, a convolution is faster by its direct sum, however many the channels


def conv3x3(x: Float[Tensor, "b c h w"], weight: Float[Tensor, "o d 3 3"],
            transposed: bool = False) -> Float[Tensor, "b e h w"]:
    """The convolution with stride 1 and zeros outside: F.conv2d(x, weight, padding=1).

    By F(2×2, 3×3): 16 multiplications for 2×2 outputs instead of 36. Half the error of oneDNN's direct sum at 512
    channels. Derivatives of any order by x are such convolutions; those by the weight are PyTorch's.

    Args:
        transposed: the adjoint: x has o channels, the result d. Of an output's gradient it makes the input's.
    Raises: ValueError for other shapes; TypeError if the types differ.
    """
    x, weight = _checked("conv3x3", x, weight, 0 if transposed else 1)
    tiles = x.shape[0] * ((x.shape[2] + 1) // 2) * ((x.shape[3] + 1) // 2)
    if tiles >= LEAST_TILES and _compiled(x, weight):
        return torch.ops.gan3d.conv3x3(_last(x), _last(weight), transposed)
    return reference_conv3x3(x, weight, transposed)


def upconv3x3(x: Float[Tensor, "b c h w"], weight: Float[Tensor, "o c 3 3"]) -> Float[Tensor, "b o 2*h 2*w"]:
    """StyleGAN2's convolution to twice the size: transposed, with stride 2, then the filter [1, 3, 3, 1]² / 16.

    The weight is not flipped: as an upsampling followed by a convolution it is a true convolution, not a correlation.
    25 multiplications for 2×2 inputs instead of 36, and the filter while the rows are in the cache.
    Raises: as `conv3x3`.
    """
    x, weight = _checked("upconv3x3", x, weight, 1)
    if _compiled(x, weight):
        return torch.ops.gan3d.upconv3x3(_last(x), _last(weight))
    return reference_upconv3x3(x, weight)


def _checked(name: str, x: Tensor, weight: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    if weight.ndim != 4 or weight.shape[2:] != (3, 3):
        raise ValueError(f"{name}: weight must be [o, c, 3, 3], got {tuple(weight.shape)}")
    if x.ndim != 4 or x.shape[1] != weight.shape[axis]:
        raise ValueError(f"{name}: weight {tuple(weight.shape)} takes [b, {weight.shape[axis]}, h, w], "
                         f"got x {tuple(x.shape)}")
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        return x.to(dtype), weight.to(dtype)
    if x.dtype != weight.dtype:
        raise TypeError(f"{name}: x is {x.dtype}, weight is {weight.dtype}")
    return x, weight


def _compiled(x: Tensor, weight: Tensor) -> bool:
    return bool(x.device.type in ("cpu", "meta") and x.dtype == torch.float32 and extension.native(x)
                and weight.shape[0] % CHANNELS == 0 and weight.shape[1] % CHANNELS == 0)


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@extension.after_loading
def _register() -> None:
    @torch.library.register_fake("gan3d::conv3x3")
    def _(x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
        return _last(x.new_empty(x.shape[0], weight.shape[1 if transposed else 0], *x.shape[2:]))

    @torch.library.register_fake("gan3d::upconv3x3")
    def _(x: Tensor, weight: Tensor) -> Tensor:
        return _last(x.new_empty(x.shape[0], weight.shape[0], 2 * x.shape[2], 2 * x.shape[3]))

    @register_flop_formula(torch.ops.gan3d.conv3x3)
    def _(x: tuple, weight: tuple, *_: object, **__: object) -> int:
        return 18 * x[0] * x[2] * x[3] * weight[0] * weight[1]

    @register_flop_formula(torch.ops.gan3d.upconv3x3)
    def _(x: tuple, weight: tuple, **_: object) -> int:
        b, c, h, w = x
        return b * h * w * weight[0] * (18 * c + 4 * 32)  # 9 taps an input, 16 of the filter an output

    def remember(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.transposed = inputs[2:] == (True,)

    def pull(ctx: Any, grad: Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        out, into = (x, grad) if ctx.transposed else (grad, x)  # the adjoint swaps what goes in and what comes out
        return (conv3x3(grad, weight, not ctx.transposed) if ctx.needs_input_grad[0] else None,
                by_weight(out, into, 1, 1) if ctx.needs_input_grad[1] else None, None)

    def pull_up(ctx: Any, grad: Tensor) -> tuple:  # the adjoint of an upsampling is a convolution with stride 2
        x, weight = ctx.saved_tensors
        grad = smooth(grad, padding=2)
        return (F.conv2d(grad, weight.transpose(0, 1), stride=2) if ctx.needs_input_grad[0] else None,
                by_weight(x, grad, 2, 0).transpose(0, 1) if ctx.needs_input_grad[1] else None)

    torch.library.register_autograd("gan3d::conv3x3", pull, setup_context=remember)
    torch.library.register_autograd("gan3d::upconv3x3", pull_up, setup_context=remember)
