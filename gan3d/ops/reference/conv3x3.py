"""StyleGAN2's 3×3 convolutions in plain PyTorch: the direct sums."""

import torch
from torch import Tensor
from torch.nn import functional as F


def conv3x3(x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    if not transposed:
        return F.conv2d(x, weight, padding=1)
    y = x.new_empty(x.shape[0], weight.shape[1], *x.shape[2:])
    return _adjoint(x, y, weight, 1, 1, (True, False, False))[0]  # conv_transpose2d, but without oneDNN's slow start


def upconv3x3(x: Tensor, weight: Tensor) -> Tensor:
    return smooth(F.conv_transpose2d(x, weight.transpose(0, 1), stride=2), padding=1)


def smooth(x: Tensor, padding: int) -> Tensor:
    """[1, 3, 3, 1]² / 16, zeros outside."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], device=x.device, dtype=x.dtype) / 4
    return F.conv2d(x, (taps[:, None] * taps).expand(x.shape[1], 1, 4, 4), padding=padding, groups=x.shape[1])


def by_weight(grad: Tensor, x: Tensor, stride: int, padding: int) -> Tensor:
    """∂⟨grad, conv2d(x, weight, None, stride, padding)⟩/∂weight for a 3×3 weight; differentiable itself."""
    weight = x.new_empty(grad.shape[1], x.shape[1], 3, 3)
    return _adjoint(grad, x, weight, stride, padding, (False, True, False))[1]


def _adjoint(grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, wanted: tuple[bool, bool, bool]):
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, list(wanted))
