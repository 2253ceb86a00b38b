"""Convolutions whose second derivatives are cheap, and StyleGAN2's fixed low-pass filter.

Pictures are kept channels-last: on a CPU a transposed convolution is then four times faster and the filter as fast as a
copy; on a GPU tensor cores want them so, too.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from gan3d.cameras import Number
from gan3d.ops import conv3x3


class Layout(NamedTuple):
    """What a convolution's adjoints must know besides two of its three tensors."""

    x: torch.Size
    weight: torch.Size
    stride: int
    padding: int

    @property
    def same(self) -> bool:
        """Whether `conv3x3` does it."""
        return (*self.weight[2:], self.stride, self.padding) == (3, 3, 1, 1)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """conv2d whose second derivatives are convolutions again; R1 needs them every step.

    With g the gradient of the output, ⟨g, w ∗ x⟩ is linear in each of x, w and g; `ByInput` and `ByWeight` are its
    derivatives, and theirs are again such products. PyTorch's double backward instead convolves with kernels as large
    as the picture, several times slower. The derivative by the weight has a node of its own, whose value is the bias:
    a Python function computes all its derivatives or none, and R1's first pass wants the input's alone.
    """
    layout = Layout(x.shape, weight.shape, stride, padding)
    if not torch.is_grad_enabled():
        return _forward(x, weight, layout, bias)
    if torch.is_autocast_enabled(x.device.type):  # its casts must be seen by autograd, so not inside a function
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if bias is None:
        bias = weight.new_zeros(layout.weight[0])
    y = OfInput.apply(x, (weight,), layout)
    return y + OfWeight.apply(weight, bias, (x,), layout, y.shape)


class OfInput(torch.autograd.Function):
    """w ∗ x, a function of x alone; w is hidden in a tuple, so that the graph has no edge to it from here."""

    @staticmethod
    def forward(ctx, x, hidden, layout):
        ctx.save_for_backward(*hidden)
        ctx.layout = layout
        return _forward(x, hidden[0], layout)

    @staticmethod
    def backward(ctx, g):
        return ByInput.apply(g, *ctx.saved_tensors, ctx.layout), None, None


class OfWeight(torch.autograd.Function):
    """The bias, spread over the output, with w ∗ x's derivative by w; x is hidden in a tuple."""

    @staticmethod
    def forward(ctx, weight, bias, hidden, layout, shape):
        ctx.save_for_backward(*hidden)
        ctx.layout = layout
        return bias[:, None, None].expand(shape)

    @staticmethod
    def backward(ctx, g):
        by_weight = ByWeight.apply(g, *ctx.saved_tensors, ctx.layout) if ctx.needs_input_grad[0] else None
        return by_weight, g.sum((0, 2, 3)), None, None, None


class ByInput(torch.autograd.Function):
    """∂⟨g, w ∗ x⟩/∂x, a function of g and w."""

    @staticmethod
    def forward(ctx, g, weight, layout):
        ctx.save_for_backward(g, weight)
        ctx.layout = layout
        if layout.same:
            return conv3x3(g, weight, transposed=True)
        return _adjoint(g, weight.new_empty(layout.x), weight, layout, (True, False, False))[0]

    @staticmethod
    def backward(ctx, x):
        g, weight = ctx.saved_tensors
        by_g = convolve(x, weight, None, *ctx.layout[2:]) if ctx.needs_input_grad[0] else None
        by_weight = ByWeight.apply(g, x, ctx.layout) if ctx.needs_input_grad[1] else None
        return by_g, by_weight, None


class ByWeight(torch.autograd.Function):
    """∂⟨g, w ∗ x⟩/∂w, a function of g and x."""

    @staticmethod
    def forward(ctx, g, x, layout):
        ctx.save_for_backward(g, x)
        ctx.layout = layout
        return _adjoint(g, x, x.new_empty(layout.weight), layout, (False, True, False))[1]

    @staticmethod
    def backward(ctx, weight):
        g, x = ctx.saved_tensors
        by_g = convolve(x, weight, None, *ctx.layout[2:]) if ctx.needs_input_grad[0] else None
        by_x = ByInput.apply(g, weight, ctx.layout) if ctx.needs_input_grad[1] else None
        return by_g, by_x, None


def _forward(x: Tensor, weight: Tensor, layout: Layout, bias: Tensor | None = None) -> Tensor:
    if not layout.same:
        return F.conv2d(x, weight, bias, layout.stride, layout.padding)
    y = conv3x3(x, weight)
    return y if bias is None else y + bias.to(y.dtype)[:, None, None]


def _adjoint(g: Tensor, x: Tensor, weight: Tensor, layout: Layout, wanted: tuple[bool, bool, bool]):
    """Of x or weight only the shape is looked at where the other's derivative is wanted."""
    return torch.ops.aten.convolution_backward(
        g, x, weight, None, [layout.stride] * 2, [layout.padding] * 2, [1, 1], False, [0, 0], 1, list(wanted))


class Conv2d(nn.Conv2d):
    """nn.Conv2d by `convolve`: the same numbers, quick second derivatives."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        return convolve(x, self.weight, self.bias, self.stride[0], self.padding[0])


TAPS = (1.0, 3.0, 3.0, 1.0)  # StyleGAN2's low-pass filter along each axis, before it is divided by its sum


def _filter(x: Tensor, gain: float) -> Tensor:
    taps = torch.tensor(TAPS, device=x.device, dtype=x.dtype) / sum(TAPS)
    return (gain * taps[:, None] * taps).expand(x.shape[1], 1, 4, 4)


def smooth(x: Float[Tensor, "b c h w"], padding: int, gain: float = 1.0, stride: int = 1) -> Float[Tensor, "b c i j"]:
    """The filter [1, 3, 3, 1]² / 64, zeros outside, every `stride`-th result. StyleGAN2 (2020), FIR filtering."""
    return F.conv2d(x, _filter(x, gain), None, stride, padding, groups=x.shape[1])


def downsample(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c i j"]:
    """Filtered, then every second pixel."""
    return smooth(x, padding=1, stride=2)


def upsample(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c i j"]:
    """Zeros inserted, then filtered: bilinear interpolation but for the zeros beyond the edge."""
    return F.conv_transpose2d(x, _filter(x, 4.0), None, 2, 1, groups=x.shape[1])


def downsampling_convolution(x: Tensor, weight: Float[Tensor, "o c k k"]) -> Float[Tensor, "b o i j"]:
    """StyleGAN2's convolution to half the size (k = 3 or 1): the filter, then the convolution of every second pixel."""
    if weight.shape[-1] == 1:
        return convolve(downsample(x), weight, None, 1, 0)
    return convolve(smooth(x, padding=2), weight, None, 2, 0)


def resize(x: Float[Tensor, "b c _ _"], side: int) -> Float[Tensor, "b c {side} {side}"]:
    """Square pictures of another side, bilinear, filtered as they shrink; untouched if they have it."""
    if x.shape[-1] == side:
        return x
    return F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False, antialias=True)


def gaussian_blur(x: Float[Tensor, "b c h w"], sigma: Number) -> Float[Tensor, "b c h w"]:
    """x blurred by 2^(−(distance/sigma)²) in both directions, cut at 3 sigma; zeros outside. StyleGAN3's trainer.

    sigma is in pixels; below a third of one there is nothing to blur.
    """
    half = int(3 * sigma)
    if half == 0:
        return x
    distance = torch.arange(-half, half + 1, device=x.device, dtype=x.dtype)
    taps = torch.exp2(-(distance / sigma).square())
    taps = (taps / taps.sum()).expand(x.shape[1], 1, 2 * half + 1)
    x = F.conv2d(x, taps[..., None], padding=(half, 0), groups=x.shape[1])
    return F.conv2d(x, taps[..., None, :], padding=(0, half), groups=x.shape[1])
