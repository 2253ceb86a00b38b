"""StyleNeRF: A Style-based 3D-Aware Generator for High-resolution Image Synthesis (Gu et al., ICLR 2022). 2110.08985

z → mapping → ws → styled radiance field, and a background outside the unit sphere → rgb and features at 32², by volume
rendering → blocks of 1×1 convolutions that double the side → picture. Training grows from 32²; the "NeRF path" ties
upsampled pixels to pixels that are rendered directly. Follows the released code where it tells more than the paper.

Departures: the background's latents are the last numbers of z and the last row of ws, so an identity keeps its
background (the release draws one for every picture). Before a background the last sample of a ray never has a weight,
and is not asked for. While the picture grows, the NeRF path is faded like the picture, which the release intends but
prevents by an addition in place; the discriminator's step does without that path. Sums are taken before linear layers.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from gan3d.cameras import CONDITION_DIM, Camera, Number, condition, flip_axes
from gan3d.cost import Cost, count_flops
from gan3d.gans import Images
from gan3d.nn.convolution import upsample
from gan3d.nn.discriminators import Verdict
from gan3d.nn.encodings import positional_encoding
from gan3d.nn.styled_mlp import StyledWeights, styled_mlp
from gan3d.nn.stylegan2 import (
    GAIN,
    EqualizedConv,
    FullyConnected,
    Mapping,
    StyleGAN2Discriminator,
    ToRGB,
    activate,
    channels_at,
)
from gan3d.ramps import Growth
from gan3d.rays import Bounds, Patch, Rays, camera_rays, full_grid
from gan3d.rendering import Field, points_along, render_chunks, render_hits
from gan3d.sampling import merge, sample_pdf, spread
from gan3d.volume import Rendering, composite

UNTRAINED_SAMPLES = 20  # per pass, of a released generator whose alpha is −1: it was never trained
RAYS_PER_CHUNK = 1 << 12  # per image, where no gradients are wanted


def encode(x: Float[Tensor, "*b d"], octaves: int) -> Float[Tensor, "*b e"]:
    """sin πx, cos πx, sin 2πx, cos 2πx, …: the encoding of NeRF's paper, with π and without x itself."""
    return positional_encoding(x * math.pi, octaves)[..., x.shape[-1] :]


class StyledConv(nn.Module):
    """A modulated and demodulated 1×1 convolution, as a matrix per image. StyleGAN2 (2020), eq. 1–3.

    With `decay`, the input is divided by the running root mean square of all inputs so far (as in alias-free GANs).
    """

    def __init__(self, inputs: int, outputs: int, *, w_dim: int, decay: Number | None = None):
        super().__init__()
        self.decay = decay
        self.affine = FullyConnected(w_dim, inputs, bias_init=1)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 1, 1))
        self.bias = nn.Parameter(torch.zeros(outputs))
        if decay is not None:
            self.register_buffer("w_avg", torch.ones([]))  # mean square of the input; the name is the release's

    def matrix(self, w: Float[Tensor, "b d"], x: Tensor | None = None) -> Float[Tensor, "b o i"]:
        """x: what the convolution is about to see; in training the running mean follows it first."""
        styled = self.weight[:, :, 0, 0] * self.affine(w)[:, None]
        scale = (styled.square().sum(-1, keepdim=True) + 1e-8).rsqrt()
        if self.decay is not None and x is not None:
            if self.training:
                seen = x.detach().to(self.w_avg.dtype)
                self.w_avg.lerp_(torch.linalg.vector_norm(seen).square() / x.numel(), 1 - self.decay)
            scale = scale * self.w_avg.rsqrt()
        return styled * scale


class Foreground(nn.Module):
    """The radiance field: points → raw density, rgb and features, styled by a w for each layer. Sec. 3.2, supplement.

    rgb is a linear function of the features, these one of the last hidden layer: `heads` is both in one matrix, and is
    applied to what a ray has gathered of the hidden layer instead of to every sample.
    """

    def __init__(self, *, w_dim: int, width: int, depth: int, octaves: int, features: int):
        super().__init__()
        self.octaves = octaves
        self.fc_in = StyledConv(6 * octaves, width, w_dim=w_dim)
        self.blocks = nn.ModuleList(StyledConv(width, width, w_dim=w_dim) for _ in range(depth - 1))
        self.sigma_out = ToRGB(width, 1, w_dim=w_dim)
        self.feat_out = ToRGB(width, features, w_dim=w_dim)
        self.to_rgb = EqualizedConv(features, 3, 1, activation="linear")
        self.num_ws = depth + 2

    def bind(self, ws: Float[Tensor, "b l d"]) -> "Styled":
        """The matrices of these images. Leaky ReLU commutes with its gain, so that is multiplied in."""
        *trunk_ws, density_w, feature_w = ws.unbind(1)
        layers = [self.fc_in, *self.blocks]
        trunk = tuple(GAIN * layer.matrix(w) for layer, w in zip(layers, trunk_ws, strict=True))
        weights = StyledWeights(trunk, tuple(GAIN * layer.bias for layer in layers),
                                styled_head(self.sigma_out, density_w), self.sigma_out.bias)
        features = styled_head(self.feat_out, feature_w)
        rgb, rgb_bias = self.to_rgb.weight[:, :, 0, 0] * self.to_rgb.weight_gain, self.to_rgb.bias
        return Styled(weights, torch.cat([rgb @ features, features], 1),
                      torch.cat([rgb @ self.feat_out.bias + rgb_bias, self.feat_out.bias]))

    def forward(self, points: Float[Tensor, "b n s 3"], styled: "Styled") -> tuple[Tensor, Tensor]:
        """Raw density `[b n s]` and the last hidden layer `[b n s c]`."""
        flat = points.flatten(1, 2).to(styled.heads.dtype)
        density, hidden = styled_mlp(flat, styled.weights, lambda x: encode(x, self.octaves))
        return density.view(points.shape[:-1]), hidden.view(*points.shape[:-1], hidden.shape[-1])


def styled_head(head: ToRGB, w: Float[Tensor, "b d"]) -> Float[Tensor, "b o i"]:
    """A modulated 1×1 convolution without demodulation, as a matrix per image."""
    return head.weight[:, :, 0, 0] * (head.affine(w) / math.sqrt(head.weight.shape[1]))[:, None]


class Styled(NamedTuple):
    """The foreground of these images."""

    weights: StyledWeights
    heads: Tensor  # [b 3+f c]: hidden → rgb in [−1, 1], features
    head_bias: Tensor  # [3+f]


class Background(nn.Module):
    """A field of directions and inverse distances outside the unit sphere. NeRF++ (2020), sec. 4; without styles.

    Args:
        z_dim: latents, seen beside the encoded point.
        samples: per ray, evenly in inverse distance from `start` to 0; the last one closes the ray.
    """

    def __init__(self, *, z_dim: int, width: int, depth: int, octaves: int, features: int, samples: int, start: Number):
        super().__init__()
        self.z_dim, self.octaves, self.samples, self.start = z_dim, octaves, samples, start
        self.fc_in = nn.Linear(8 * octaves + z_dim, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        self.sigma_out = nn.Linear(width, 1)
        self.feat_out = nn.Linear(width, features)
        self.to_rgb = EqualizedConv(features, 3, 1, activation="linear")

    def heads(self) -> tuple[Float[Tensor, "f c"], Float[Tensor, " f"]]:
        rgb = self.to_rgb.weight[:, :, 0, 0] * self.to_rgb.weight_gain
        return (torch.cat([rgb @ self.feat_out.weight, self.feat_out.weight]),
                torch.cat([rgb @ self.feat_out.bias + self.to_rgb.bias, self.feat_out.bias]))

    def forward(self, z: Float[Tensor, "b z"], rays: Rays, density_noise: Number
                ) -> tuple[Float[Tensor, "b n s"], Float[Tensor, "b n s c"]]:
        """The weights of the samples, which add up to 1, and their last hidden layer."""
        zero = torch.zeros_like(rays.near)
        depths = spread(Rays(rays.origins, rays.directions, zero - self.start, zero), self.samples,
                        "strata" if self.training else "none")
        seen = encode(outside_points(rays, -depths).to(z.dtype), self.octaves)
        of_point, of_latent = self.fc_in.weight.split([seen.shape[-1], self.z_dim], dim=1)
        shift = (z @ of_latent.T + self.fc_in.bias)[:, None, None]
        hidden = F.relu(seen @ of_point.T + shift)
        for layer in self.blocks:
            hidden = F.relu(layer(hidden))
        raw_density = self.sigma_out(hidden[..., :-1, :])[..., 0]
        weights = composite(noisy(raw_density, density_noise).relu(), depths.diff().to(z.dtype))
        return torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1), hidden


def noisy(raw_density: Tensor, std: Number) -> Tensor:
    """With noise the first, empty fields become visible, and so have a gradient."""
    return raw_density + std * torch.randn_like(raw_density) if std > 0 else raw_density


def outside_points(rays: Rays, inverse: Float[Tensor, "b n s"]) -> Float[Tensor, "b n s 4"]:
    """(direction from the origin, inverse distance to it) of the ray's points that far outside. NeRF++ (2020), fig. 8.

    With m the ray's point nearest to the origin, its point at distance 1/i is m + √(1/i² − |m|²)·d; this is i times it.
    """
    along = (rays.origins * rays.directions).sum(-1, keepdim=True)
    nearest = rays.origins - along * rays.directions
    forward = (1 - (inverse * nearest.norm(dim=-1, keepdim=True)).square()).clamp(min=0).sqrt()
    points = inverse[..., None] * nearest[..., None, :] + forward[..., None] * rays.directions[..., None, :]
    return torch.cat([points, inverse[..., None]], dim=-1)


class UpsamplingConv(StyledConv):
    """A styled 1×1 convolution, then twice the size: nearest neighbours and what an adapter adds to them. Sec. 3.3.

    Args:
        mode: "nn_cat": the adapter sees each pixel beside the mean of its two nearest neighbours of the other pixels;
            "pixelshuffle": it works before the enlargement and writes all four pixels.
        blur: a low-pass filter follows.
    """

    def __init__(self, inputs: int, outputs: int, *, w_dim: int, decay: Number, mode: str,
                 blur: bool):
        super().__init__(inputs, outputs, w_dim=w_dim, decay=decay)
        if mode not in ("nn_cat", "pixelshuffle"):
            raise ValueError(f"upsampling must be 'nn_cat' or 'pixelshuffle', got {mode!r}")
        self.mode, self.blur = mode, blur
        seen, written = (2 * outputs, outputs) if mode == "nn_cat" else (outputs, 4 * outputs)
        self.adapter = nn.Sequential(EqualizedConv(seen, outputs // 4, 1),
                                     EqualizedConv(outputs // 4, written, 1, activation="linear"))

    def forward(self, x: Float[Tensor, "b h w i"], w: Float[Tensor, "b d"], up: bool) -> Float[Tensor, "b r s o"]:
        matrix = self.matrix(w, x)
        if not up:
            return per_pixel(x, GAIN * matrix, GAIN * self.bias)
        y = per_pixel(x, matrix, None)
        return self.beside_neighbours(y) if self.mode == "nn_cat" else self.shuffled(y)

    def beside_neighbours(self, y: Float[Tensor, "b h w o"]) -> Float[Tensor, "b 2*h 2*w o"]:
        """The adapter's layers are linear but for the activation between them, so each is applied where pixels are few:
        the first before the enlargement, the filter before the second. A further hidden channel, constantly 1,
        carries the second bias through the filter, which is not constant at the edge.
        """
        first, second = self.adapter
        weight, bias = first.weight[:, :, 0, 0] * first.weight_gain, first.bias * first.bias_gain
        own, others = F.pad(weight, (0, 0, 0, 1)).chunk(2, dim=1)
        seen = F.linear(y, torch.cat([own, others / 2]), torch.cat([bias, bias.new_ones(1), 0 * bias, 0 * bias[:1]]))
        here, there = seen.chunk(2, dim=-1)
        beside = F.pad(there, (0, 0, 1, 1, 1, 1))
        vertical = torch.stack([beside[:, :-2, 1:-1], beside[:, 2:, 1:-1]], 2) + here[:, :, None]
        horizontal = torch.stack([beside[:, 1:-1, :-2], beside[:, 1:-1, 2:]], 3)
        hidden = vertical[:, :, :, :, None] + horizontal[:, :, None]  # [b h 2 w 2 c]
        hidden = activate(hidden.flatten(3, 4).flatten(1, 2), "lrelu", None)
        if self.blur:
            hidden = blurred(hidden)
        spread_out = torch.cat([second.weight[:, :, 0, 0] * second.weight_gain, second.bias[:, None]], 1) * GAIN
        large = enlarged(y, self.blur, GAIN) + GAIN * self.bias
        flat = torch.baddbmm(large.flatten(1, 2), hidden.flatten(1, 2), spread_out.T.expand(len(y), -1, -1))
        return flat.view_as(large)

    def shuffled(self, y: Float[Tensor, "b h w o"]) -> Float[Tensor, "b 2*h 2*w o"]:
        first, second = self.adapter
        hidden = activate(F.linear(y, first.weight[:, :, 0, 0] * first.weight_gain, first.bias * first.bias_gain),
                          "lrelu", None)
        # channel 4c + 2i + j goes to channel c of the pixel in row i, column j
        weight = second.weight.view(-1, 4, second.weight.shape[1]).transpose(0, 1).flatten(0, 1) * second.weight_gain
        added = F.linear(hidden, weight, second.bias.view(-1, 4).T.flatten()).unflatten(-1, (2, 2, -1))
        large = (y[:, :, :, None, None] + added).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return GAIN * ((blurred(large) if self.blur else large) + self.bias)


def per_pixel(x: Float[Tensor, "b h w i"], matrix: Float[Tensor, "b o i"], bias: Float[Tensor, " o"] | None
              ) -> Float[Tensor, "b h w o"]:
    rows = x.flatten(1, 2)
    y = torch.bmm(rows, matrix.mT) if bias is None else torch.baddbmm(bias, rows, matrix.mT)
    return y.unflatten(1, x.shape[1:3])


def _taps(x: Tensor, taps: list[int], gain: float) -> Float[Tensor, "c 1 k k"]:
    line = torch.tensor(taps, device=x.device, dtype=x.dtype) / 8
    return (gain * line[:, None] * line).expand(x.shape[-1], 1, -1, -1)


def blurred(x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
    """The filter [1, 3, 3, 1]² / 64, zeros outside, shifted half a pixel down and right as in the release."""
    weight = _taps(x, [1, 3, 3, 1, 0], 1.0)
    return F.conv2d(x.permute(0, 3, 1, 2), weight, None, 1, 2, groups=x.shape[-1]).permute(0, 2, 3, 1)


def enlarged(x: Float[Tensor, "b h w c"], blur: bool, gain: float) -> Float[Tensor, "b 2*h 2*w c"]:
    """Nearest neighbours at twice the size; with `blur`, filtered in the same pass."""
    if not blur:
        return (gain * x).repeat_interleave(2, 1).repeat_interleave(2, 2)
    weight = _taps(x, [0, 1, 4, 6, 4, 1], gain)  # [1, 1] with [1, 3, 3, 1]
    return F.conv_transpose2d(x.permute(0, 3, 1, 2), weight, None, 2, 2, groups=x.shape[-1]).permute(0, 2, 3, 1)


class Block(nn.Module):
    """All layers of one resolution; the image so far is enlarged and added to. Every layer looks at single pixels."""

    def __init__(self, inputs: int, outputs: int, *, w_dim: int, decay: Number,
                 mode: str, blur: bool, clamp: Number | None):
        super().__init__()
        self.clamp = clamp
        self.conv0 = UpsamplingConv(inputs, outputs, w_dim=w_dim, decay=decay, mode=mode, blur=blur)
        self.conv1 = StyledConv(outputs, outputs, w_dim=w_dim, decay=decay)
        self.torgb = ToRGB(outputs, 3, w_dim=w_dim, clamp=clamp)

    def forward(self, x: Float[Tensor, "b h w i"], image: Float[Tensor, "b 3 h w"], ws: Float[Tensor, "b 3 d"],
                up: bool) -> tuple[Float[Tensor, "b r s o"], Float[Tensor, "b 3 r s"]]:
        """`up` false: the same layers without the enlargement, its adapter and its filter (the NeRF path)."""
        first, second, last = ws.unbind(1)
        x = activate(self.conv0(x, first, up), "lrelu", self.clamp)
        matrix = GAIN * self.conv1.matrix(second, x)
        x = activate(per_pixel(x, matrix, GAIN * self.conv1.bias), "lrelu", self.clamp)
        rgb = self.torgb(x.permute(0, 3, 1, 2), last)
        with torch.autocast(x.device.type, enabled=False):  # the picture itself is kept exact
            return x, rgb.to(image.dtype) + (upsample(image) if up else image)


class Identity(NamedTuple):
    """One object and its background, ready to be seen from anywhere."""

    styled: Styled
    ws: Tensor  # [b l d], of the upsampler
    z_background: Tensor  # [b z]


class Sampled(NamedTuple):
    """Where rays were asked, in the order of asking: coarse, then fine samples."""

    t: Tensor  # [b n s], in units of the directions
    weights: Tensor  # [b n s]
    hidden: tuple[Tensor, ...]  # [b n · c], together s


class StyleNeRF(nn.Module):
    """The generator.

    Args:
        bounds: planar for the paper's cameras. Behind the foreground lies `background`, else `bounds.background`; with
            neither, the last sample closes the ray.
        growth: `model.resolution`: the side of the picture, or how it grows from `render_resolution` on.
        render_resolution: side of the volume-rendered image.
        z_dim: of the foreground. A background takes its latents from further numbers of z.
        width, depth, octaves: of the foreground's field.
        features: channels that are rendered beside rgb.
        background: a `Background`, or None.
        samples_per_ray, fine_samples: coarse and importance samples; both are composited.
        density_noise: standard deviation of what is added to the raw density in training.
        channel_base, channel_max: of the upsampler, see `gan3d.nn.stylegan2.channels_at`.
        upsampling, blur: see `UpsamplingConv`.
        magnitude_decay: of the running mean square of each upsampling layer's input.
        path_weight, path_samples, path_full: of the NeRF path: its weight (0: none), pixels a side (0: none), and
            whether all samples of a ray go through the upsampler, or only what is composited of them.
    """

    alpha: Tensor

    def __init__(
        self,
        *,
        bounds: Bounds,
        growth: int | Growth,
        render_resolution: int,
        z_dim: int,
        w_dim: int,
        mapping_depth: int,
        width: int,
        depth: int,
        octaves: int,
        features: int,
        background: Background | None,
        samples_per_ray: int,
        fine_samples: int,
        density_noise: Number,
        channel_base: int,
        channel_max: int,
        upsampling: str,
        blur: bool,
        magnitude_decay: Number,
        clamp: Number | None,
        path_weight: Number,
        path_samples: int,
        path_full: bool,
    ):
        super().__init__()
        first, last = (growth.first, growth.last) if isinstance(growth, Growth) else (render_resolution, growth)
        doublings = max(0, (last // render_resolution).bit_length() - 1)
        if first != render_resolution or last not in (render_resolution << doublings, last * (doublings == 0)):
            raise ValueError(f"pictures of {last}² growing from {first}² do not double from render_resolution "
                             f"{render_resolution}: let model.resolution start there and end at a power of 2 times it")
        self.bounds, self.growth, self.render_resolution, self.last = bounds, growth, render_resolution, last
        self.samples_per_ray, self.fine_samples, self.density_noise = samples_per_ray, fine_samples, density_noise
        self.path_weight, self.path_samples, self.path_full = path_weight, path_samples, path_full
        self.latents = [z_dim, background.z_dim if background is not None else 0]
        self.z_dim = sum(self.latents)
        alpha = growth.alpha(0) if isinstance(growth, Growth) else 1.0
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self.foreground = Foreground(w_dim=w_dim, width=width, depth=depth, octaves=octaves, features=features)
        self.background = background
        self.sides = [render_resolution << k for k in range(1, doublings + 1)]
        widths = [features, *(channels_at(side, channel_base, channel_max) for side in self.sides)]
        self.blocks = nn.ModuleDict({
            f"b{side}": Block(inputs, outputs, w_dim=w_dim, decay=magnitude_decay, mode=upsampling, blur=blur,
                              clamp=clamp)
            for side, inputs, outputs in zip(self.sides, widths, widths[1:], strict=False)})
        num_ws = self.foreground.num_ws + 2 * len(self.sides) + bool(self.sides)
        self.mapper = Mapping(z_dim=z_dim, c_dim=0, w_dim=w_dim, num_ws=num_ws, depth=mapping_depth, w_decay=0.995)
        behind = None if bounds.background is None else 2 * torch.tensor(bounds.background, dtype=torch.float32) - 1
        self.register_buffer("colour", behind, persistent=False)

    # Latents

    def mapping(self, z: Float[Tensor, "b z"], camera_condition: Camera | None = None, truncation_psi: Number = 1.0
                ) -> Float[Tensor, "b l d"]:
        """With a background, the last row is its latents, then zeros; truncation shrinks them (the paper's demos)."""
        of_object, of_background = z.split(self.latents, dim=1)
        ws = self.mapper(of_object, None, truncation_psi)
        if self.background is None:
            return ws
        row = F.pad(of_background * truncation_psi, (0, ws.shape[-1] - of_background.shape[-1]))
        return torch.cat([ws, row[:, None].to(ws)], dim=1)

    def prepare(self, ws: Float[Tensor, "b l d"]) -> Identity:
        """The matrices of the foreground's field. In training the background's latents are beyond path length."""
        ws = ws.to(self.foreground.to_rgb.weight.dtype)  # from whatever autocast made of them
        z_background = ws[:, -1, : self.latents[1]]
        used = self.foreground.num_ws
        with torch.autocast(ws.device.type, enabled=False):
            styled = self.foreground.bind(ws[:, :used])
        return Identity(styled, ws[:, used : self.mapper.num_ws],
                        z_background.detach() if self.training else z_background)

    def field(self, ws: Tensor | Identity) -> Field:
        """The foreground alone: raw density (its ReLU is the density); rgb in [0, 1], then the features."""
        ready = ws if isinstance(ws, Identity) else self.prepare(ws)

        def ask(points: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
            raw_density, hidden = self.foreground(points, ready.styled)
            shown = self._shown(ready, hidden.flatten(1, 2)).unflatten(1, hidden.shape[1:3])
            return raw_density, torch.cat([(shown[..., :3] + 1) / 2, shown[..., 3:]], -1)

        return ask

    # Pictures

    @property
    def side(self) -> int:
        """Of the picture at the present alpha."""
        level = self._level()
        return self.render_resolution if level == 0 else self.sides[level - 1]

    def _level(self) -> int:
        """How many blocks are in use."""
        return blocks_in_use(float(self.alpha), len(self.sides))

    def synthesis(self, ws: Tensor | Identity, camera: Camera, resolution: int, patch: Patch | None = None) -> Images:
        """Pictures of side `resolution`: rendered alone up to `render_resolution`, upsampled to its doubles.

        What is larger than training has come to is enlarged. Raises: ValueError for a patch or another side.
        """
        if patch is not None:
            raise ValueError("StyleNeRF draws whole pictures: set model.patch=null")
        if resolution > self.render_resolution and resolution not in self.sides:
            raise ValueError(f"this StyleNeRF draws pictures of side {self.sides} or up to {self.render_resolution}, "
                             f"not {resolution}")
        ready = ws if isinstance(ws, Identity) else self.prepare(ws)
        side = min(resolution, self.render_resolution)
        with torch.autocast(ready.ws.device.type, enabled=False):
            pixels = full_grid(side, side, device=ready.ws.device)
            shown, seen = self._render(ready, self._rays(camera, pixels, side))
        shown = shown.unflatten(1, (side, side))
        raw = shown[..., :3].permute(0, 3, 1, 2)
        rgb = self._upsample(ready, shown[..., 3:], raw, min(resolution, self.side), up=True)
        if rgb.shape[-1] < resolution:
            rgb = F.interpolate(rgb, size=(resolution, resolution), mode="bilinear", align_corners=False)
        return Images(rgb, raw, seen.depth.unflatten(-1, (side, side)), seen.opacity.unflatten(-1, (side, side)))

    def _rays(self, camera: Camera, pixels: Float[Tensor, "*b n 2"], side: int) -> Rays:
        """Rays whose directions are not normalised, but reach the plane at distance 1; near and far in their units.

        The encoding multiplies a point's rounding by 1600, so the points are computed as in the release, step by step:
        the same weights then give the same picture in float32, but for samples that the coarse pass just misplaces.
        """
        unit = camera_rays(camera, pixels, self.bounds, (side, side))
        line = torch.linspace(1 / side - 1, 1 - 1 / side, side, device=pixels.device, dtype=unit.near.dtype)
        x, y = line[pixels[..., 0].long()], -line[pixels[..., 1].long()]
        local = torch.stack([x, y, -torch.ones_like(x), torch.ones_like(x)], -2)
        k = camera.intrinsics
        lens = torch.eye(4, device=k.device, dtype=k.dtype).repeat(len(k), 1, 1)
        lens[:, 0, 0], lens[:, 1, 1] = 1 / (2 * k[:, 0, 0]), 1 / (2 * k[:, 1, 1])
        lens[:, 0, 2], lens[:, 1, 2] = (k[:, 0, 2] - 0.5) / k[:, 0, 0], (0.5 - k[:, 1, 2]) / k[:, 1, 1]
        lens[:, 0] += (k[:, 0, 1] / k[:, 0, 0])[:, None] * lens[:, 1]  # skew
        seen = (flip_axes(camera.camera_to_world) @ lens) @ local.expand(len(k), -1, -1)
        directions = seen[:, :3].mT - camera.position[:, None]
        if self.bounds.planar:
            near, far = (torch.full_like(unit.near, limit) for limit in (self.bounds.near, self.bounds.far))
        else:
            length = directions.norm(dim=-1)
            near, far = unit.near / length, unit.far / length
        return Rays(unit.origins, directions, near, far)

    def _render(self, ready: Identity, rays: Rays) -> tuple[Float[Tensor, "b n f"], Rendering]:
        """What rays see: rgb in [−1, 1] and features; and what they gathered of the foreground's hidden layer."""
        def render(part: Rays) -> Rendering:
            found = self._sample(ready, part)
            parts = found.weights.split([h.shape[-2] for h in found.hidden], dim=-1)
            hidden = sum(torch.matmul(w[..., None, :], h)[..., 0, :] for w, h in zip(parts, found.hidden, strict=True))
            depth = (found.weights * found.t).sum(-1) * part.directions.norm(dim=-1)
            return Rendering(hidden, depth, found.weights.sum(-1))  # type: ignore

        def render_all(part: Rays) -> Rendering:
            return render(part) if torch.is_grad_enabled() else render_chunks(render, part, RAYS_PER_CHUNK)

        seen = render_all(rays) if self.bounds.aabb is None else render_hits(render_all, rays, None)
        shown = torch.baddbmm(seen.opacity[..., None] * ready.styled.head_bias, seen.features, ready.styled.heads.mT)
        behind = self._behind(ready, rays)
        return shown if behind is None else shown + (1 - seen.opacity)[..., None] * behind, seen

    def _sample(self, ready: Identity, rays: Rays) -> Sampled:
        """Coarse samples evenly, fine ones where these found something; then the weights of all."""
        s, fine_samples = self.samples_per_ray, self.fine_samples
        if self.alpha == -1:
            s, fine_samples = UNTRAINED_SAMPLES, UNTRAINED_SAMPLES * (fine_samples > 0)
        noise = self.density_noise if self.training else 0.0
        zero = torch.zeros_like(rays.near)
        steps = spread(Rays(rays.origins, rays.directions, zero, zero + 1), s, "strata" if self.training else "none")
        t, length = between(rays, steps), rays.directions.norm(dim=-1, keepdim=True)
        closes = self.background is None and self.colour is None
        coarse = t if closes else t[..., :-1]  # the last sample ends an interval; it has no density of its own
        raw_density, hidden = self.foreground(points_along(rays, coarse), ready.styled)
        density = noisy(raw_density[..., : s - 1], noise).relu()
        with torch.no_grad():
            weights = composite(density, (t.diff() * length).to(density.dtype))
            edges = (steps[..., 1:] + steps[..., :-1]) / 2
            u = torch.linspace(0, 1, fine_samples, device=t.device, dtype=t.dtype).expand(*t.shape[:-1], -1)
            u = torch.rand_like(u) if self.training else u
            fine = between(rays, sample_pdf(edges, weights[..., 1:].to(t.dtype), u))
        more_raw_density, more_hidden = self.foreground(points_along(rays, fine), ready.styled)
        density = torch.cat([density, noisy(more_raw_density, noise).relu()], -1)
        merged, order = merge(t[..., :-1], fine)
        lengths = torch.cat([merged, t[..., -1:]], -1).diff() * length
        weights = composite(density.gather(-1, order), lengths.to(density.dtype))
        weights = torch.zeros_like(weights).scatter(-1, order, weights)
        if closes:
            first, second = weights.split([s - 1, fine_samples], dim=-1)
            weights = torch.cat([first, 1 - weights.sum(-1, keepdim=True), second], -1)
        return Sampled(torch.cat([coarse, fine], -1).to(density.dtype), weights, (hidden, more_hidden))

    def _shown(self, ready: Identity, hidden: Float[Tensor, "b n c"]) -> Float[Tensor, "b n f"]:
        return torch.baddbmm(ready.styled.head_bias, hidden, ready.styled.heads.mT)

    def _behind(self, ready: Identity, rays: Rays) -> Tensor | None:
        """rgb and features of the background `[b n f]`, or of a colour behind everything `[f]`."""
        if self.background is not None:
            weights, hidden = self._outside(ready, rays)
            return F.linear(torch.matmul(weights[..., None, :], hidden)[..., 0, :], *self.background.heads())
        return None if self.colour is None else F.pad(self.colour, (0, len(ready.styled.head_bias) - 3))

    def _outside(self, ready: Identity, rays: Rays) -> tuple[Tensor, Tensor]:
        assert self.background is not None
        unit = Rays(rays.origins, F.normalize(rays.directions, dim=-1), rays.near, rays.far)
        return self.background(ready.z_background, unit, self.density_noise if self.training else 0.0)

    def _upsample(self, ready: Identity, x: Float[Tensor, "b h w f"], image: Float[Tensor, "b 3 h w"], side: int,
                  up: bool) -> Float[Tensor, "b 3 r s"]:
        """The blocks up to `side`. The last of a growing picture is blended in over the one before, enlarged."""
        before = image
        used = [s for s in self.sides if s <= side]
        for k, s in enumerate(used):
            before = image
            x, image = self.blocks[f"b{s}"](x, image, ready.ws[:, 2 * k : 2 * k + 3], up)
        alpha = float(self.alpha)
        if not used or not 0 < alpha < 1 or side != self.side:
            return image
        if up:
            before = F.interpolate(before, scale_factor=2, mode="bilinear", align_corners=False)
        return before.lerp(image, math.modf(alpha * len(self.sides))[0])

    # Training

    def regularizers(self, ready: Identity, camera: Camera, images: Images, step: int) -> dict[str, Tensor]:
        """The NeRF path: some pixels of the picture, rendered directly and taken through the same 1×1 layers. Eq. 8."""
        side = images.rgb.shape[-1]
        if not (self.path_weight and self.path_samples) or side <= self.render_resolution:
            return {}
        pixels = lattice(len(images.rgb), side, self.path_samples, images.rgb.device)
        with torch.autocast(ready.ws.device.type, enabled=False):
            rays = self._rays(camera, pixels, side)
            if self.path_full:
                shown, weights = self._every_sample(ready, rays)
            else:
                shown, weights = self._render(ready, rays)[0][:, :, None], None
        direct = self._upsample(ready, shown[..., 3:], shown[..., :3].permute(0, 3, 1, 2), side, up=False)
        if weights is None:
            direct = direct[..., 0]
        else:
            direct = (direct * weights[:, None]).sum(-1)
            if self.background is None and self.colour is not None:
                direct = direct + (1 - weights.sum(-1))[:, None] * self.colour[:, None]
        index = (pixels[..., 0] + side * pixels[..., 1]).long()
        drawn = images.rgb.flatten(2).gather(2, index[:, None].expand(-1, 3, -1))
        return {"reg_path": self.path_weight * (drawn - direct).square().sum(1).mean()}

    def _every_sample(self, ready: Identity, rays: Rays) -> tuple[Float[Tensor, "b n s f"], Float[Tensor, "b n s"]]:
        """rgb and features of all samples, of foreground and background, and their weights."""
        found = self._sample(ready, rays)
        hidden = torch.cat(found.hidden, -2)
        shown = self._shown(ready, hidden.flatten(1, 2)).unflatten(1, hidden.shape[1:3])
        if self.background is None:
            return shown, found.weights
        weights, hidden = self._outside(ready, rays)
        behind = F.linear(hidden, *self.background.heads())
        light = 1 - found.weights.sum(-1, keepdim=True)
        return torch.cat([shown, behind], 2), torch.cat([found.weights, light * weights], 2)

    def before_step(self, step: int) -> None:
        if isinstance(self.growth, Growth):
            self.alpha.fill_(self.growth.alpha(step))

    def cost(self, resolution: int) -> Cost:
        """Per sample: the mean over foreground (coarse and fine) and background samples of a ray. Fixed: all else.

        Rays that miss `bounds.aabb` are counted here, although they cost nothing.
        """
        some = self.foreground.to_rgb.weight
        side = min(resolution, self.render_resolution)
        ws = some.new_zeros(1, self.mapper.num_ws + (self.background is not None), self.mapper.w_avg.shape[0])
        ready = self.prepare(ws)
        closes = self.background is None and self.colour is None
        samples = self.samples_per_ray - (not closes) + self.fine_samples
        each = count_flops(lambda: self.foreground(some.new_zeros(1, 64, 1, 3), ready.styled)) / 64
        flops = samples * each
        if self.background is not None:
            axis = some.new_tensor([[[1.0, 0.0, 0.0]]]).expand(1, 64, 3)
            rays = Rays(axis, axis, some.new_zeros(1, 64), some.new_ones(1, 64))
            flops += count_flops(lambda: self._behind(ready, rays)) / 64
            samples += self.background.samples
        width = ready.styled.heads.shape[1] - 3
        fixed = count_flops(lambda: self.mapping(some.new_zeros(1, self.z_dim))) + count_flops(lambda: self.prepare(ws))
        fixed += count_flops(lambda: self._shown(ready, some.new_zeros(1, side**2, ready.styled.heads.shape[2])))
        fixed += count_flops(lambda: self._upsample(ready, some.new_zeros(1, side, side, width),
                                                    some.new_zeros(1, 3, side, side), resolution, up=True))
        return Cost(side**2, float(samples), flops / samples, float(fixed))


def between(rays: Rays, steps: Float[Tensor, "b n s"]) -> Float[Tensor, "b n s"]:
    """Places on the rays, from near at 0 to far at 1."""
    return rays.near[..., None] * (1 - steps) + rays.far[..., None] * steps


def lattice(b: int, side: int, samples: int, device: torch.device) -> Float[Tensor, "b n 2"]:
    """samples² pixels (column, row) of a picture, evenly spaced, displaced at random, differently in each image."""
    step = side // samples
    offset = torch.randint(step, (b, 1, 2), device=device)
    return full_grid(samples, samples, device=device) * step + offset


class StyleNeRFDiscriminator(StyleGAN2Discriminator):
    """Starts at the resolution of the picture it is given. Of the release, whose two peculiarities it keeps: below the
    full resolution the picture comes in twice at the first block, and a new resolution is not faded in.

    With `camera_conditioning` it is told the camera (not in the paper; for data whose cameras are known).
    """

    def __init__(self, *, resolution: int, channel_base: int, channel_max: int, group: int, clamp: Number | None,
                 camera_conditioning: bool = False, mapping_depth: int = 8):
        super().__init__(resolution=resolution, image_channels=3, c_dim=CONDITION_DIM if camera_conditioning else 0,
                         channel_base=channel_base, channel_max=channel_max, architecture="skip", group=group,
                         mapping_depth=mapping_depth, clamp=clamp)
        self.needs_camera = camera_conditioning

    def forward(self, images: Float[Tensor, "b 3 r r"], fade: float = 1.0, camera: Camera | None = None,
                raw: Tensor | None = None) -> Verdict:
        """Raises: ValueError for another side than a power of 2 up to `resolution`, or without a camera if told one."""
        side = images.shape[-1]
        if side not in self.resolutions:
            raise ValueError(f"this discriminator sees pictures of side {self.resolutions[::-1]}, not {side}")
        if self.c_dim and camera is None:
            raise ValueError("camera_conditioning needs the camera of every photograph, and this data set has none: "
                             "give it a dataset.json, or set model.discriminator.camera_conditioning=false")
        rest = images.contiguous(memory_format=torch.channels_last)
        x = None if side == self.resolutions[0] else getattr(self, f"b{side}").fromrgb(rest)
        for r in self.resolutions[self.resolutions.index(side) :]:
            x, rest = getattr(self, f"b{r}")(x, rest)
        label = None if camera is None or not self.c_dim else self.mapping(None, condition(camera).to(images))
        return Verdict(self.b4(x, rest, label))


def blocks_in_use(alpha: float, n: int) -> int:
    return n if alpha in (-1, 1) else 0 if alpha == 0 else min(int(alpha * n) + 1, n)
