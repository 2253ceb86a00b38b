"""What is minimised: the non-saturating adversarial loss, R1, and GRAF's and π-GAN's variants of both as numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gan3d.cameras import Number


def generator_loss(logit_fake: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Non-saturating loss of the generator, per image: softplus(−D(fake)). Goodfellow et al. (2014), sec. 3."""
    return F.softplus(-logit_fake)


def discriminator_loss(logit_real: Float[Tensor, " b"], logit_fake: Float[Tensor, " b"]) -> Float[Tensor, ""]:
    """softplus(D(fake)) + softplus(−D(real)), batch means: binary cross entropy with logits, in one line."""
    return F.softplus(logit_fake).mean() + F.softplus(-logit_real).mean()


@dataclass(frozen=True)
class R1:
    """Gradient penalty on real images. Mescheder et al. (2018), eq. 9: weight · E‖∂D/∂x‖².

    Args:
        weight: the whole factor (a paper's γ/2 where it writes γ/2).
        reduction: "per_image" sums a picture's squared gradients; "per_pixel" divides them by its pixels, which is
            what GRAF's code does by laying pixels out as rows: 1/1024 of the penalty for a 32² patch.
        every: lazy regularisation; computed every so many steps, and multiplied by as many.
    """

    weight: Number
    reduction: Literal["per_image", "per_pixel"] = "per_image"
    every: int = 1

    def due(self, step: int) -> bool:
        return self.weight > 0 and step % self.every == 0

    def __call__(self, images: Sequence[Float[Tensor, "b c _ _"]], logit: Float[Tensor, " b"]) -> Float[Tensor, ""]:
        """The sum over all `images` the discriminator looks at; they must require gradients and have made `logit`."""
        gradients = torch.autograd.grad(logit.sum(), list(images), create_graph=True)
        penalty = logit.new_zeros(())
        for gradient in gradients:
            pixels = gradient.shape[-1] * gradient.shape[-2] if self.reduction == "per_pixel" else 1
            penalty = penalty + gradient.square().sum((1, 2, 3)).mean() / pixels
        return self.weight * self.every * penalty


class PathLength(nn.Module):
    """A step of a given length in w should change the picture by a fixed amount. StyleGAN2 (2020), sec. 3.2, eq. 4.

    Args:
        weight: of the penalty.
        every: lazy regularisation; computed every so many steps, and multiplied by as many.
        decay: how fast `mean`, the length aimed at, follows the lengths found.
        shrink: the batch is so many times smaller (its second derivatives take memory).
    """

    mean: Tensor

    def __init__(self, *, weight: Number, every: int, decay: Number = 0.01, shrink: int = 2):
        super().__init__()
        self.weight, self.every, self.decay, self.shrink = weight, every, decay, shrink
        self.register_buffer("mean", torch.zeros(()))

    def due(self, step: int) -> bool:
        return self.weight > 0 and step % self.every == 0

    def share(self, batch: int) -> int:
        return max(1, batch // self.shrink)

    def forward(self, images: Float[Tensor, "b c h w"], ws: Float[Tensor, "b l d"]) -> Float[Tensor, ""]:
        """Moves `mean`, then the penalty. ws made the images and require gradients."""
        noise = torch.randn_like(images) / math.sqrt(images.shape[-1] * images.shape[-2])
        (gradient,) = torch.autograd.grad((images * noise).sum(), ws, create_graph=True)
        lengths = gradient.square().sum(-1).mean(-1).sqrt()
        mean = self.mean.lerp(lengths.mean(), self.decay)
        self.mean.copy_(mean.detach())
        return self.weight * self.every * (lengths - mean).square().mean()


@dataclass(frozen=True)
class TopK:
    """Keep the best-judged fakes of a batch in the generator's loss (Sinha et al., 2020; π-GAN's code).

    The kept share is max(decay^(step / interval), floor).
    """

    interval: int
    floor: Number
    decay: Number = 0.99

    def kept(self, batch: int, step: int) -> int:
        share = max(self.decay ** (step / self.interval), self.floor)
        return max(1, min(batch, math.ceil(batch * share)))
