"""StyleGAN3's layers where nothing is resampled for good: pictures keep their size, and the leaky ReLU does not alias.

Karras et al., "Alias-Free Generative Adversarial Networks" (NeurIPS 2021), arXiv 2106.12423. Critically sampled layers
filter at half the sampling rate, so their size does not matter: the same weights serve pictures of any side.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from gan3d.cameras import Number
from gan3d.nn.stylegan2 import GAIN, FullyConnected, activate

TAPS = 12  # six at the lower of the two sampling rates


def lowpass() -> Float[Tensor, " taps"]:
    """Half a band: the sinc cut to 12 taps (a Kaiser window of no transition band is flat), of sum 1."""
    taps = torch.sinc((torch.arange(TAPS) - (TAPS - 1) / 2) / 2)
    return taps / taps.sum()


def filtered_leaky_relu(x: Float[Tensor, "b c h w"], clamp: Number | None) -> Float[Tensor, "b c i j"]:
    """Leaky ReLU at twice the resolution, with a low-pass filter before and behind. Sec. 3.2, appendix C.

    The filters end inside the picture: a picture of side n + 2 becomes one of side n.
    """
    c = x.shape[1]
    taps = lowpass().to(x).expand(c, 1, 1, TAPS)
    x = F.conv_transpose2d(x, 2 * taps, stride=(1, 2), padding=(0, 2), groups=c)
    x = F.conv_transpose2d(x, 2 * taps.mT, stride=(2, 1), padding=(2, 0), groups=c)
    x = activate(x * GAIN, "lrelu", clamp)
    return F.conv2d(F.conv2d(x, taps, stride=(1, 2), groups=c), taps.mT, stride=(2, 1), groups=c)


class Layer(nn.Module):
    """A modulated convolution, then `filtered_leaky_relu`; or, as `last`, a linear 1×1 convolution to colours.

    The input is divided by the root of its mean square, which follows the pictures of the discriminator's step (where
    there are no gradients) by `decay`. Weights and styles are not normalised before they are demodulated: it cancels.
    """

    magnitude_ema: Tensor

    def __init__(self, inputs: int, outputs: int, *, w_dim: int, last: bool, clamp: Number | None = 256,
                 decay: Number = 0.999):
        super().__init__()
        self.last, self.clamp, self.decay = last, clamp, decay
        kernel = 1 if last else 3
        self.affine = FullyConnected(w_dim, inputs, bias_init=1)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.register_buffer("magnitude_ema", torch.ones([]))

    def forward(self, x: Float[Tensor, "b i h w"], w: Float[Tensor, "b d"]) -> Float[Tensor, "b o h w"]:
        if self.training and not torch.is_grad_enabled():
            self.magnitude_ema.lerp_(x.to(self.magnitude_ema.dtype).square().mean(), 1 - self.decay)
        style, gain = self.affine(w), self.magnitude_ema.rsqrt()
        bias = self.bias[:, None, None]
        if self.last:
            y = F.conv2d(x * (style * (gain / math.sqrt(x.shape[1])))[..., None, None], self.weight) + bias
            return activate(y, "linear", self.clamp)
        demodulation = (style.square() @ self.weight.square().sum((2, 3)).T + 1e-8).rsqrt()
        y = F.conv2d(x * (style * gain)[..., None, None], self.weight, padding=2)  # two more: the filters need them
        return filtered_leaky_relu(torch.addcmul(bias, y, demodulation[..., None, None]), self.clamp)


class Refinement(nn.Module):
    """Layers from picture to picture, all with one w. VoxGRAF (2022), sec. 3.2."""

    def __init__(self, *, w_dim: int, width: int, depth: int):
        super().__init__()
        widths = [3, *[width] * (depth - 1), 3]
        self.layers = nn.ModuleList(Layer(a, b, w_dim=w_dim, last=i == depth - 1)
                                    for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)))

    def forward(self, x: Float[Tensor, "b 3 h w"], w: Float[Tensor, "b d"]) -> Float[Tensor, "b 3 h w"]:
        for layer in self.layers:
            x = layer(x, w)
        return x
