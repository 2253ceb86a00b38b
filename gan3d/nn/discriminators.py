"""Discriminators that grow with the picture: residual CoordConv blocks. pi-GAN (Chan et al., 2021), supplement.

image ─ 1×1 adapter of its resolution ─ residual blocks, each halving the resolution ─ 2×2 map ─ logit, latent, pose

One class covers the released variants: CelebA's (coord, stride, latent and pose heads), Cats' (no coord, stride) and
CARLA's, GOF's and GRAM's (coord, pool, heads).
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from gan3d.cameras import Camera
from gan3d.nn.convolution import Conv2d


class Verdict(NamedTuple):
    """What a discriminator says: the logit, and where the paper has such heads its guess of latent and pose."""

    logit: Tensor  # [b]
    latent: Tensor | None = None  # [b z_dim]
    pose: Tensor | None = None  # [b 2], polar and azimuth in radians


class CoordConv(Conv2d):
    """A convolution that also sees where it is: two more input channels, −1 to 1 down the rows and along the columns.

    Liu et al., 2018. The weight's last two input channels belong to them. Without `coord`: an ordinary convolution.
    """

    def __init__(self, inputs: int, outputs: int, *, coord: bool, stride: int = 1):
        super().__init__(inputs + 2 * coord, outputs, 3, stride=stride, padding=1)
        self.coord = coord

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        if not self.coord:
            return super().forward(x)
        rows, columns = (torch.linspace(-1, 1, size, device=x.device, dtype=x.dtype) for size in x.shape[-2:])
        place = torch.stack(torch.meshgrid(rows, columns, indexing="ij")).expand(len(x), -1, -1, -1)
        return super().forward(torch.cat([x, place], dim=1))


class ResidualBlock(nn.Module):
    """(two 3×3 convolutions + skip) / √2 at half the resolution.

    down "stride": the second convolution has stride 2 and the skip is always a 1×1 convolution with stride 2;
    "pool": both are averaged over 2×2, and the skip has a convolution only where the number of channels changes.
    """

    def __init__(self, inputs: int, outputs: int, *, coord: bool, down: Literal["stride", "pool"]):
        super().__init__()
        stride = 2 if down == "stride" else 1
        self.pool = down == "pool"
        self.first = CoordConv(inputs, outputs, coord=coord)
        self.second = CoordConv(outputs, outputs, coord=coord, stride=stride)
        needed = down == "stride" or inputs != outputs
        self.skip = Conv2d(inputs, outputs, 1, stride=stride) if needed else nn.Identity()
        if down == "stride":  # the released code initialises these, and leaves the pooled blocks at PyTorch's default
            for conv in (self.first, self.second):
                nn.init.kaiming_normal_(conv.weight, a=0.2)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        y = F.leaky_relu(self.second(F.leaky_relu(self.first(x), 0.2)), 0.2)
        if self.pool:
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        return (y + self.skip(x)) / math.sqrt(2)


class ProgressiveDiscriminator(nn.Module):
    """Judges square images at any of its resolutions; `fade` blends a new resolution in.

    Args:
        channels: at the largest resolution, at half of it, and so on down to 2; five numbers begin at 32.
        coord: convolutions see their position (CoordConv).
        down: how a block halves the resolution, see `ResidualBlock`.
        latent_dim: width of the head that guesses the latent; 0 for none.
        pose: whether a head guesses the camera's angles (polar, azimuth; radians).
        entries: at how many of the resolutions, the largest first, pictures may enter; None: at all.
    """

    def __init__(self, *, channels: Sequence[int], coord: bool, down: Literal["stride", "pool"], latent_dim: int,
                 pose: bool, entries: int | None = None):
        super().__init__()
        self.resolutions = [2**k for k in range(len(channels), 0, -1)]
        if len(channels) < 2:
            raise ValueError(f"channels must name at least those at resolutions 4 and 2, got {channels}")
        if down not in ("stride", "pool"):
            raise ValueError(f"down must be 'stride' or 'pool', got {down!r}")
        self.latent_dim, self.pose = latent_dim, pose
        self.adapters = nn.ModuleList(Conv2d(3, width, 1) for width in channels[:entries])
        self.blocks = nn.ModuleList(
            ResidualBlock(a, b, coord=coord, down=down) for a, b in zip(channels[:-1], channels[1:], strict=True)
        )
        self.final = Conv2d(channels[-1], 1 + latent_dim + 2 * pose, 2)

    def forward(self, images: Float[Tensor, "b 3 h w"], fade: float = 1.0, camera: Camera | None = None,
                raw: Tensor | None = None) -> Verdict:
        """images in [−1, 1]. fade 1: they enter at their own resolution; 0: as the next smaller one would have.

        The camera is not looked at: pi-GAN's discriminators see pictures alone.
        """
        height, width = images.shape[-2:]
        entries = self.resolutions[:-1][:len(self.adapters)]
        if height != width or height not in entries:
            raise ValueError(f"images are {height}×{width}; it takes squares of {entries}")
        start = self.resolutions.index(height)
        x = self.blocks[start](self._adapt(start, images))
        if fade < 1 and start + 1 < min(len(self.blocks), len(self.adapters)):  # else there is nothing to blend into
            x = fade * x + (1 - fade) * self._adapt(start + 1, images[..., ::2, ::2])  # nearest
        for block in self.blocks[start + 1:]:
            x = block(x)
        logit, latent, pose = self.final(x)[:, :, 0, 0].split([1, self.latent_dim, 2 * self.pose], dim=1)
        return Verdict(logit[:, 0], latent if self.latent_dim else None, pose if self.pose else None)

    def _adapt(self, level: int, images: Tensor) -> Tensor:
        return F.leaky_relu(self.adapters[level](images), 0.2)
