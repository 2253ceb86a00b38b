"""A rendered picture against the photograph of the same view: PSNR and SSIM. Pictures in [0, 1]."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def psnr(prediction: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """Peak signal-to-noise ratio in dB, per picture and then averaged, as the NeRF papers have it.

    Pooling the squared error over pictures first gives another, lower number. The prediction is clamped to [0, 1].
    A picture without any error counts as infinite.
    """
    error = (prediction.clamp(0, 1) - target).square().mean((1, 2, 3))
    return (-10 * error.log10()).mean()


def ssim(prediction: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """Structural similarity (Wang et al., 2004), per picture and then averaged; JaxNeRF's form.

    Gaussian window of 11×11 with σ 1.5, only where it lies inside the picture; k₁ 0.01, k₂ 0.03, range 1; variances are
    kept ≥ 0 and the covariance within their geometric mean. The prediction is clamped to [0, 1].

    Raises: ValueError if a side is shorter than 11 pixels.
    """
    if min(target.shape[-2:]) < 11:
        raise ValueError(f"SSIM's window is 11×11, the picture {tuple(target.shape[-2:])}")
    a, b = prediction.clamp(0, 1), target
    mean_a, mean_b = _window(a), _window(b)
    variance_a = (_window(a * a) - mean_a**2).clamp(min=0)
    variance_b = (_window(b * b) - mean_b**2).clamp(min=0)
    covariance = _window(a * b) - mean_a * mean_b
    covariance = covariance.sign() * torch.minimum((variance_a * variance_b).sqrt(), covariance.abs())
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2))
    return similarity.mean((1, 2, 3)).mean()


def _window(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c p q"]:
    """Means under the Gaussian window, which is a row times a column."""
    offset = torch.arange(11, dtype=x.dtype, device=x.device) - 5
    weights = (-0.5 * (offset / 1.5) ** 2).exp()
    weights = (weights / weights.sum()).expand(x.shape[1], 1, 1, 11)
    return F.conv2d(F.conv2d(x, weights, groups=x.shape[1]), weights.mT, groups=x.shape[1])
