"""StyleGAN2: what its generator and discriminator are made of (Karras et al., CVPR 2020). arXiv 1912.04958

z, c → mapping → ws → modulated convolutions from 4² up, an image summed up on the way; and the discriminator that takes
it down again. Names of parameters are those of NVIDIA's PyTorch code, so that its checkpoints fit: only the constant
`resample_filter`s are not kept. Where its two releases differ (2020 ADA, 2021), arguments say which.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from gan3d.cameras import Number
from gan3d.nn.convolution import convolve, downsample, downsampling_convolution, upsample
from gan3d.ops import conv3x3, upconv3x3

SLOPE, GAIN = 0.2, math.sqrt(2)  # leaky ReLU, and what keeps the variance after it
Noise = Literal["random", "const", "none"]
Activation = Literal["linear", "lrelu"]


def channels_at(resolution: int, base: int, most: int, least: int = 1) -> int:
    """Feature maps at a resolution: base / resolution, within bounds."""
    return max(min(base // resolution, most), least)


def resolutions(last: int) -> list[int]:
    """4, 8, … last. Raises ValueError unless last is a power of two ≥ 4."""
    if last < 4 or last & (last - 1):
        raise ValueError(f"resolution {last}: StyleGAN2 doubles from 4, so it must be a power of two from 4 up")
    return [2**i for i in range(2, last.bit_length())]


def normalize(x: Float[Tensor, "b c"]) -> Float[Tensor, "b c"]:
    """To a second moment of 1 over the channels."""
    return x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()


def activate(x: Tensor, activation: Activation, clamp: Number | None) -> Tensor:
    """Leaky ReLU of what was scaled by GAIN before (the two commute), in place; then the clamp."""
    if activation == "lrelu":
        x = F.leaky_relu_(x, SLOPE)
    return x if clamp is None else x.clamp(-clamp, clamp)


class FullyConnected(nn.Module):
    """A layer with equalised learning rate: weight ~ N(0, 1/lr_multiplier²), times lr_multiplier/√inputs when used."""

    def __init__(self, inputs: int, outputs: int, *, activation: Activation = "linear", lr_multiplier: Number = 1.0,
                 bias_init: Number = 0.0):
        super().__init__()
        self.activation: Activation = activation
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / lr_multiplier)
        self.bias = nn.Parameter(torch.full([outputs], float(bias_init)))
        gain = GAIN if activation == "lrelu" else 1.0
        self.weight_gain, self.bias_gain = gain * lr_multiplier / math.sqrt(inputs), gain * lr_multiplier

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        return activate(F.linear(x, self.weight * self.weight_gain, self.bias * self.bias_gain), self.activation, None)


class Mapping(nn.Module):
    """z and a label → ws, a w for each layer of the synthesis. Also the discriminator's embedding of a label (z_dim 0).

    Args:
        z_dim, c_dim: of latent and label; 0: there is none.
        num_ws: how many copies of w; None: a single one, without its axis, and no mean to truncate towards.
        w_decay: of the running mean of w: 0.995 in the 2020 release, 0.998 in 2021's.
    """

    def __init__(self, *, z_dim: int, c_dim: int, w_dim: int, num_ws: int | None, depth: int,
                 lr_multiplier: Number = 0.01, w_decay: Number = 0.998):
        super().__init__()
        self.z_dim, self.c_dim, self.num_ws, self.depth, self.w_decay = z_dim, c_dim, num_ws, depth, w_decay
        if c_dim:
            self.embed = FullyConnected(c_dim, w_dim)
        inputs = z_dim + (w_dim if c_dim else 0)
        for i in range(depth):
            setattr(self, f"fc{i}", FullyConnected(inputs if i == 0 else w_dim, w_dim, activation="lrelu",
                                                   lr_multiplier=lr_multiplier))
        if num_ws is not None:
            self.register_buffer("w_avg", torch.zeros(w_dim))

    def forward(self, z: Tensor | None, c: Tensor | None = None, truncation_psi: Number = 1.0,
                truncation_cutoff: int | None = None) -> Tensor:
        """ws `[b num_ws w_dim]`, or `[b w_dim]` without num_ws; truncated in its first `truncation_cutoff` (None: all).

        In training mode the mean of w follows the batches that come without gradients: those of the discriminator's
        step, as in the 2021 release.
        """
        parts = [normalize(z)] if self.z_dim and z is not None else []
        if self.c_dim and c is not None:
            parts.append(normalize(self.embed(c)))
        x = torch.cat(parts, dim=1)
        for i in range(self.depth):
            x = getattr(self, f"fc{i}")(x)
        if self.num_ws is None:
            return x
        if self.training and not torch.is_grad_enabled():
            self.w_avg.lerp_(x.mean(0), 1 - self.w_decay)
        ws = x[:, None].expand(-1, self.num_ws, -1)
        if truncation_psi == 1:
            return ws
        cut = self.num_ws if truncation_cutoff is None else truncation_cutoff
        return torch.cat([self.w_avg.lerp(ws[:, :cut], truncation_psi), ws[:, cut:]], dim=1)


class SynthesisLayer(nn.Module):
    """Modulated convolution, noise, leaky ReLU. Eq. 1–3: the style scales input channels, demodulation the outputs."""

    def __init__(self, inputs: int, outputs: int, *, w_dim: int, resolution: int, up: bool = False,
                 clamp: Number | None = None, noise: bool = True):
        super().__init__()
        self.up, self.clamp, self.resolution = up, clamp, resolution
        self.affine = FullyConnected(w_dim, inputs, bias_init=1)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3).to(memory_format=torch.channels_last))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.noise = noise
        if noise:
            self.register_buffer("noise_const", torch.randn(resolution, resolution))
            self.noise_strength = nn.Parameter(torch.zeros([]))

    def forward(self, x: Float[Tensor, "b i h w"], w: Float[Tensor, "b d"], noise: Noise) -> Float[Tensor, "b o r r"]:
        style = self.affine(w)
        scale = GAIN * (style.square() @ self.weight.square().sum((2, 3)).T + 1e-8).rsqrt()  # [b o]
        bias = GAIN * self.bias[:, None, None]
        if len(x) == 1:  # modulating the weight is cheaper than modulating two feature maps
            weight = self.weight * (style[0, :, None, None] * scale[0, :, None, None, None])
            y = self.convolve(x, weight).add_(bias)  # in place: new memory takes longer than the sum
        else:
            y = self.convolve(x * style[:, :, None, None], self.weight)
            y = torch.addcmul(bias, y, scale[:, :, None, None])
        return activate(self.add_noise(y, noise), "lrelu", self.clamp)

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        return upconv3x3(x, weight) if self.up else conv3x3(x, weight)

    def add_noise(self, y: Tensor, noise: Noise) -> Tensor:
        if not self.noise or noise == "none":
            return y
        grain = self.noise_const if noise == "const" else torch.randn(len(y), 1, *y.shape[-2:], device=y.device)
        return y.add_(grain * (GAIN * self.noise_strength))


class ToRGB(nn.Module):
    """Features → image channels: a modulated 1×1 convolution without demodulation."""

    def __init__(self, inputs: int, channels: int, *, w_dim: int, clamp: Number | None = None):
        super().__init__()
        self.clamp = clamp
        self.affine = FullyConnected(w_dim, inputs, bias_init=1)
        self.weight = nn.Parameter(torch.randn(channels, inputs, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Float[Tensor, "b i h w"], w: Float[Tensor, "b d"]) -> Float[Tensor, "b c h w"]:
        style = self.affine(w) * (1 / math.sqrt(x.shape[1]))
        weight = self.weight[:, :, 0, 0] * style[:, None]  # [b c i]
        # channels-last pixels are rows: one matrix product an image, in its own layout
        y = torch.baddbmm(self.bias, x.permute(0, 2, 3, 1).flatten(1, 2), weight.mT)
        return activate(y.unflatten(1, x.shape[-2:]).permute(0, 3, 1, 2), "linear", self.clamp)


class SynthesisBlock(nn.Module):
    """All layers of one resolution; the image so far is upsampled and added to ("skip" architecture)."""

    def __init__(self, inputs: int, outputs: int, *, w_dim: int, resolution: int, image_channels: int,
                 up: bool = True, clamp: Number | None = None, noise: bool = True):
        super().__init__()
        self.up = up
        if inputs == 0:
            self.const = nn.Parameter(torch.randn(outputs, resolution, resolution))
        else:
            self.conv0 = SynthesisLayer(inputs, outputs, w_dim=w_dim, resolution=resolution, up=up, clamp=clamp,
                                        noise=noise)
        self.conv1 = SynthesisLayer(outputs, outputs, w_dim=w_dim, resolution=resolution, clamp=clamp, noise=noise)
        self.torgb = ToRGB(outputs, image_channels, w_dim=w_dim, clamp=clamp)
        self.num_conv = 1 if inputs == 0 else 2

    def forward(self, x: Tensor | None, image: Tensor | None, ws: Float[Tensor, "b l d"], noise: Noise
                ) -> tuple[Tensor, Tensor]:
        """ws: of conv0 (where there is one), conv1 and torgb, in this order."""
        w = list(ws.unbind(1))
        if x is None:
            x = self.const.expand(len(ws), -1, -1, -1).contiguous(memory_format=torch.channels_last)
        else:
            x = self.conv0(x, w.pop(0), noise)
        x = self.conv1(x, w.pop(0), noise)
        rgb = self.torgb(x, w.pop(0))
        if image is None:
            return x, rgb
        return x, upsample(image).add_(rgb) if self.up else image + rgb


class Synthesis(nn.Module):
    """ws → image, 4² to `resolution`²."""

    def __init__(self, *, w_dim: int, resolution: int, image_channels: int, channel_base: int, channel_max: int,
                 clamp: Number | None = None):
        super().__init__()
        self.resolutions = resolutions(resolution)
        before = 0
        for r in self.resolutions:
            width = channels_at(r, channel_base, channel_max)
            setattr(self, f"b{r}", SynthesisBlock(before, width, w_dim=w_dim, resolution=r, clamp=clamp,
                                                  image_channels=image_channels))
            before = width
        self.num_ws = 2 * len(self.resolutions)

    def forward(self, ws: Float[Tensor, "b l d"], noise: Noise) -> Float[Tensor, "b c r r"]:
        x = image = None
        first = 0
        for r in self.resolutions:
            block = getattr(self, f"b{r}")
            x, image = block(x, image, ws[:, first:first + block.num_conv + 1], noise)
            first += block.num_conv  # torgb shares its w with the next block's first layer
        return image  # type: ignore[return-value]


class EqualizedConv(nn.Module):
    """A convolution of the discriminator: equalised learning rate, leaky ReLU, perhaps to half the size."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, bias: bool = True, down: bool = False,
                 activation: Activation = "lrelu", clamp: Number | None = None, gain: Number = 1.0):
        super().__init__()
        self.down, self.activation = down, activation
        self.clamp = None if clamp is None else clamp * gain
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel).to(memory_format=torch.channels_last))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.bias_gain = gain * (GAIN if activation == "lrelu" else 1.0)
        self.weight_gain = self.bias_gain / math.sqrt(inputs * kernel**2)

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o r s"]:
        weight = self.weight * self.weight_gain
        y = downsampling_convolution(x, weight) if self.down else convolve(x, weight, None, 1, weight.shape[-1] // 2)
        if self.bias is not None:
            y = y + (self.bias * self.bias_gain)[:, None, None]
        return activate(y, self.activation, self.clamp)


class DiscriminatorBlock(nn.Module):
    """To half the resolution. "resnet": with a residual path; "skip": the image comes in again at every resolution."""

    def __init__(self, inputs: int, middle: int, outputs: int, *, image_channels: int,
                 architecture: Literal["resnet", "skip"], clamp: Number | None):
        super().__init__()
        self.architecture = architecture
        if inputs == 0 or architecture == "skip":
            self.fromrgb = EqualizedConv(image_channels, middle, 1, clamp=clamp)
        residual = architecture == "resnet"
        gain = math.sqrt(0.5) if residual else 1.0
        self.conv0 = EqualizedConv(middle, middle, 3, clamp=clamp)
        self.conv1 = EqualizedConv(middle, outputs, 3, down=True, clamp=clamp, gain=gain)
        if residual:
            self.skip = EqualizedConv(middle, outputs, 1, bias=False, down=True, activation="linear", gain=gain)

    def forward(self, x: Tensor | None, image: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if image is not None:
            rgb = self.fromrgb(image)
            x = rgb if x is None else x + rgb
            image = downsample(image) if self.architecture == "skip" else None
        y = self.conv1(self.conv0(x))
        return (self.skip(x) + y if self.architecture == "resnet" else y), image


def minibatch_deviation(x: Float[Tensor, "b c h w"], group: int) -> Float[Tensor, "b c+1 h w"]:
    """One more channel: how much the pictures of a group differ. Progressive GAN (2018), sec. 3.

    The group is the largest divisor of the batch that is at most `group`; its members lie batch/group apart.
    """
    b = len(x)
    size = max(d for d in range(1, min(group, b) + 1) if b % d == 0)
    grouped = x.reshape(size, b // size, *x.shape[1:])
    spread = (grouped.var(0, correction=0) + 1e-8).sqrt().mean((1, 2, 3))  # [b/size]
    return torch.cat([x, spread.repeat(size)[:, None, None, None].expand(-1, 1, *x.shape[2:])], dim=1)


class Epilogue(nn.Module):
    """4² → a number, or the label's inner product with as many numbers (projection discriminator)."""

    def __init__(self, channels: int, *, cmap_dim: int, image_channels: int | None, group: int, clamp: Number | None):
        super().__init__()
        self.cmap_dim, self.group = cmap_dim, group
        if image_channels is not None:
            self.fromrgb = EqualizedConv(image_channels, channels, 1, clamp=clamp)
        self.conv = EqualizedConv(channels + 1, channels, 3, clamp=clamp)
        self.fc = FullyConnected(16 * channels, channels, activation="lrelu")
        self.out = FullyConnected(channels, max(cmap_dim, 1))

    def forward(self, x: Tensor, image: Tensor | None, cmap: Tensor | None) -> Float[Tensor, " b"]:
        if image is not None:
            x = x + self.fromrgb(image)
        x = self.conv(minibatch_deviation(x, self.group))
        out = self.out(self.fc(x.flatten(1)))  # flatten reads channel by channel, whatever the memory format
        if cmap is None:
            return out[:, 0]
        return (out * cmap).sum(1) * (1 / math.sqrt(self.cmap_dim))


class StyleGAN2Discriminator(nn.Module):
    """Image and label → logit. With c_dim 0: unconditional.

    Args:
        channel_base, channel_max: feature maps at a resolution: base / resolution, at most max.
        mapping_depth: layers that embed the label (8 in EG3D, 2 in VoxGRAF).
        group: of the minibatch standard deviation.
        clamp: of the convolutions' outputs (256 where the releases run in half precision).
    """

    def __init__(self, *, resolution: int, image_channels: int, c_dim: int, channel_base: int, channel_max: int,
                 architecture: Literal["resnet", "skip"] = "resnet", mapping_depth: int = 8, group: int = 4,
                 clamp: Number | None = None):
        super().__init__()
        self.resolutions = resolutions(resolution)[:0:-1]
        self.c_dim = c_dim
        widths = {r: channels_at(r, channel_base, channel_max) for r in [*self.resolutions, 4]}
        for r in self.resolutions:
            inputs = 0 if r == resolution else widths[r]
            setattr(self, f"b{r}", DiscriminatorBlock(inputs, widths[r], widths[r // 2], image_channels=image_channels,
                                                      architecture=architecture, clamp=clamp))
        cmap_dim = widths[4] if c_dim else 0
        if c_dim:
            self.mapping = Mapping(z_dim=0, c_dim=c_dim, w_dim=cmap_dim, num_ws=None, depth=mapping_depth)
        self.b4 = Epilogue(widths[4], cmap_dim=cmap_dim, group=group, clamp=clamp,
                           image_channels=image_channels if architecture == "skip" else None)

    def forward(self, image: Float[Tensor, "b c r r"], c: Float[Tensor, "b k"] | None = None) -> Float[Tensor, " b"]:
        x: Tensor | None = None
        rest: Tensor | None = image.contiguous(memory_format=torch.channels_last)
        for r in self.resolutions:
            x, rest = getattr(self, f"b{r}")(x, rest)
        return self.b4(x, rest, self.mapping(None, c) if self.c_dim else None)
