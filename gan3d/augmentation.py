"""Adaptive discriminator augmentation (ADA; Karras et al., NeurIPS 2020, arXiv 2006.06676): GANs from few pictures.

Whatever the discriminator sees, photographs and fakes, is moved and recoloured at random, each way with probability p.
Up to p of about 0.8 the generator still learns the pictures as they were (sec. 2.2). p follows how far the
discriminator overfits. Geometry and colours are the release's pipe "bgc". Departures: flips and quarter turns copy
pixels (the release resamples them with a lopsided filter, a tenth of a pixel off); pictures are reflected a few pixels
farther, as far as resampling reads; p has an upper limit.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from gan3d.cameras import Number
from gan3d.nn.convolution import resize

# Daubechies' least asymmetric wavelet of 12 taps, "sym6" (App. B). Its squares add up to 1: what is doubled and then
# halved is what it was.
TAPS = (0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466,
        0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578,
        0.0017677118642428036, -0.007800708325034148)
REACH = 3.5  # pixels read on either side of a sample: half of the taps, half a pixel apart, and its neighbour
RIM = 5  # what is halved needs so many more samples on every side


class Augment(nn.Module):
    """Pictures → pictures, augmented with probability p. App. B; a strength of 0 or false leaves a transform out.

    Args:
        p: of each transform; what it starts from, or stays at if target is None.
        p_max: p does not pass it (VoxGRAF: the target).
        target: p rises while the mean sign of the discriminator's logits of photographs is above it, else it falls.
            Sec. 3.1: 0.6.
        speed_kimg: thousand photographs in which p moves by 1.
        every: steps between two moves.
        flip, rotate90: left and right swapped; turned by 0, 90, 180 or 270 degrees.
        shift: by whole pixels, at most so many picture sides in x and y.
        scale, stretch: size, and width against height; standard deviation of log2.
        rotate: at most so many degrees, before and after the stretch.
        fractional_shift: standard deviation in x and y, picture sides.
        brightness: standard deviation of what is added (black to white is 2).
        contrast: standard deviation of log2 of the factor on all colours.
        luma_flip: light and dark swapped, hue and saturation kept.
        hue: at most so many degrees around the grey axis.
        saturation: standard deviation of log2 of the factor on the distance from the grey axis.
    """

    p: Tensor
    signs: Tensor
    seen: Tensor

    def __init__(self, *, p: Number, p_max: Number, target: Number | None, speed_kimg: Number, every: int, flip: bool,
                 rotate90: bool, shift: Number, scale: Number, stretch: Number, rotate: Number,
                 fractional_shift: Number, brightness: Number, contrast: Number, luma_flip: bool, hue: Number,
                 saturation: Number):
        super().__init__()
        if not 0 <= p <= p_max <= 1:
            raise ValueError(f"augment: probabilities need 0 ≤ p ≤ p_max ≤ 1, got p={p}, p_max={p_max}")
        if speed_kimg <= 0 or every < 1:
            raise ValueError(f"augment: speed_kimg and every must be positive, got {speed_kimg} and {every}")
        self.p_max, self.target, self.speed_kimg, self.every = p_max, target, speed_kimg, every
        self.flip, self.rotate90, self.shift, self.scale = flip, rotate90, shift, scale
        self.stretch, self.rotate, self.fractional_shift = stretch, rotate, fractional_shift
        self.brightness, self.contrast, self.luma_flip = brightness, contrast, luma_flip
        self.hue, self.saturation = hue, saturation
        self.register_buffer("p", torch.tensor(float(p)))
        self.register_buffer("signs", torch.zeros(()))  # sum over the photographs seen since p last moved
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def observe(self, logit_real: Float[Tensor, " b"], step: int) -> None:
        """Follow the discriminator; once a step, with the logits of the photographs of all processes."""
        if self.target is None:
            return
        self.signs += logit_real.sign().sum()
        self.seen += len(logit_real)
        if (step + 1) % self.every == 0:
            direction = torch.sign(self.signs / self.seen - self.target)
            self.p.add_(direction * self.seen / (1000 * self.speed_kimg)).clamp_(0, self.p_max)
            self.signs.zero_()
            self.seen.zero_()

    def forward(self, images: Float[Tensor, "b c r r"]) -> Float[Tensor, "b c r r"]:
        """Channels are rgb, or rgb several times, moved and recoloured alike. At p = 0 pictures come back untouched.

        Raises: ValueError for other channels, for pictures that are not square or have fewer than 8 pixels a side.
        """
        p = float(self.p)
        if p == 0:
            return images
        b, c, height, side = images.shape
        if c % 3 or height != side or side < 8:
            raise ValueError("augmentation takes square rgb pictures of at least 8² pixels, got "
                             f"{c} channels of {height}×{side}: set model.augment=null for others")
        with torch.autocast(images.device.type, enabled=False):  # bfloat16 places a pixel no better than its neighbour
            images = images.to(torch.promote_types(images.dtype, torch.float32))
            images = turn(images, *self.draw_turns(b, p))
            images = warp(images, *self.draw_warp(b, side, p))
            return recolour(images, *self.draw_colours(b, p))

    def pair(self, images: Float[Tensor, "b 3 r r"], raw: Float[Tensor, "b 3 s s"] | None
             ) -> tuple[Float[Tensor, "b 3 r r"], Float[Tensor, "b 3 s s"] | None]:
        """The picture and its raw image of another size, both changed alike (EG3D's released code)."""
        if raw is None or float(self.p) == 0:
            return self(images), raw
        both = self(torch.cat([images, resize(raw, images.shape[-1])], dim=1))
        return both[:, :3], resize(both[:, 3:], raw.shape[-1])

    # What is drawn is drawn on the CPU, whatever the device: it is tiny, and its sizes are needed here.

    def draw_turns(self, b: int, p: float) -> tuple[Int[Tensor, " b"], Int[Tensor, " b"]]:
        """Mirrored or not (1, 0), then quarter turns."""
        flips = sometimes(torch.randint(2 if self.flip else 1, (b,)), p)
        return flips, sometimes(torch.randint(4 if self.rotate90 else 1, (b,)), p)

    def draw_warp(self, b: int, side: int, p: float) -> tuple[Float[Tensor, "b 2 2"], Float[Tensor, "b 2"]]:
        """What `warp` takes: the transforms undone, the last one first."""
        p_rotate = 1 - math.sqrt(1 - p)  # so that at least one of the two rotations has probability p
        whole = (sometimes(uniform(b, 2), p) * (self.shift * side)).round()
        scale = torch.exp2(sometimes(torch.randn(b), p) * self.scale)
        first = rotation(sometimes(uniform(b), p_rotate) * self.rotate)
        stretch = torch.exp2(sometimes(torch.randn(b), p) * self.stretch)
        second = rotation(sometimes(uniform(b), p_rotate) * self.rotate)
        fraction = sometimes(torch.randn(b, 2), p) * (self.fractional_shift * side)
        shrink = torch.stack([1 / (scale * stretch), stretch / scale], dim=-1)  # [b 2]
        linear = first @ (shrink[..., None] * second)
        return linear, -(linear @ fraction[..., None])[..., 0] - whole

    def draw_colours(self, b: int, p: float) -> tuple[Float[Tensor, "b 3 3"], Float[Tensor, " b"]]:
        """What `recolour` takes. Luma, the part along the grey axis, and chroma, the rest, are changed apart."""
        brightness = sometimes(torch.randn(b), p) * self.brightness
        contrast = torch.exp2(sometimes(torch.randn(b), p) * self.contrast)
        sign = 1 - 2 * sometimes(torch.randint(2 if self.luma_flip else 1, (b,)), p)
        hue = sometimes(uniform(b), p) * math.radians(self.hue)
        saturation = torch.exp2(sometimes(torch.randn(b), p) * self.saturation)
        return colours(contrast * sign, contrast * saturation, hue), contrast * sign * brightness


def uniform(*shape: int) -> Tensor:
    return 2 * torch.rand(shape) - 1


def sometimes(values: Tensor, p: float) -> Tensor:
    """Each picture's values `[b …]` with probability p, else 0."""
    coins = torch.rand(len(values), *[1] * (values.ndim - 1))
    return torch.where(coins < p, values, 0)


def rotation(degrees: Float[Tensor, " b"]) -> Float[Tensor, "b 2 2"]:
    """From x (right) towards y (down)."""
    angle = degrees.deg2rad()
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))


def colours(luma: Float[Tensor, " b"], chroma: Float[Tensor, " b"], hue: Float[Tensor, " b"]
            ) -> Float[Tensor, "b 3 3"]:
    """The matrix that scales the part of rgb along the grey axis and the rest, and rotates about it (radians)."""
    grey = torch.full((3, 3), 1 / 3)
    across = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)  # the axis × rgb
    luma, along, sideways = (x[:, None, None] for x in (luma, chroma * hue.cos(), chroma * hue.sin()))
    return luma * grey + along * (torch.eye(3) - grey) + sideways * across


def turn(images: Float[Tensor, "b c r r"], flips: Int[Tensor, " b"], quarters: Int[Tensor, " b"]
         ) -> Float[Tensor, "b c r r"]:
    """Mirrored where flips is 1, then so many quarter turns anticlockwise; pixels are copied."""
    if not (flips.any() or quarters.any()):
        return images
    mirrored = [image.flip(-1) if flip else image for image, flip in zip(images, flips.tolist(), strict=True)]
    return torch.stack([image.rot90(k, (1, 2)) for image, k in zip(mirrored, quarters.tolist(), strict=True)])


def warp(images: Float[Tensor, "b c r r"], linear: Float[Tensor, "b 2 2"], offset: Float[Tensor, "b 2"]
         ) -> Float[Tensor, "b c r r"]:
    """What is seen at v comes from linear·v + offset (pixels to the right and down from the centre). App. B.

    Doubled by a wavelet's low-pass filter, sampled bilinearly, halved by the filter's adjoint. So what a shrunk picture
    cannot show is filtered out, and whole pixels move without loss. Beside a picture lies its reflection, as far as a
    picture's side, and zeros from there on.
    """
    if (linear == torch.eye(2)).all() and not offset.any():
        return images
    side = images.shape[-1]
    corners = (side + RIM) / 2 * torch.tensor([[1.0, 1, -1, -1], [1, -1, 1, -1]])  # of what is sampled
    farthest = float((linear @ corners + offset[..., None]).abs().max())
    margin = min(max(math.ceil(farthest + REACH - (side - 1) / 2), 0), side - 1)
    # Doubling keeps a pixel's index, doubled, and so puts v at 2v − ½ from the new centre; grids count half pictures.
    place = torch.cat([linear * (side + RIM), (linear.sum(-1) / 2 + 2 * offset - 0.5)[..., None]], dim=-1)
    size = [len(images), 1, 2 * (side + RIM), 2 * (side + RIM)]
    grid = F.affine_grid((place / (side + 2 * margin)).to(images), size, align_corners=False)

    def move(x: Tensor) -> Tensor:
        x = double(F.pad(x, [margin] * 4, mode="reflect"), RIM)
        return halve(F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False), 0)

    def adjoint(g: Tensor) -> Tensor:
        g = double(g, 0)
        doubled = g.new_empty(*g.shape[:2], *[2 * (side + 2 * margin)] * 2)  # only its shape is looked at
        g = torch.ops.aten.grid_sampler_2d_backward(g, doubled, grid, 0, 0, False, [True, False])[0]
        return torch.ops.aten.reflection_pad2d_backward(halve(g, RIM), g.new_empty(images.shape), [margin] * 4)

    return Linear.apply(images, move, adjoint)


def double(x: Float[Tensor, "b c n n"], crop: int) -> Float[Tensor, "b c m m"]:
    """Zeros inserted after each pixel, then the low-pass filter; 2n + 10 − 2 crop pixels a side."""
    taps = x.new_tensor(TAPS).expand(x.shape[1], 1, 1, -1)
    x = x.contiguous(memory_format=torch.channels_last)
    x = F.conv_transpose2d(x, taps, None, (1, 2), (0, crop), groups=len(taps))
    return F.conv_transpose2d(x, taps.mT, None, (2, 1), (crop, 0), groups=len(taps))


def halve(x: Float[Tensor, "b c n n"], pad: int) -> Float[Tensor, "b c m m"]:
    """The adjoint of `double`: filtered the other way round, then every second pixel; zeros outside."""
    taps = x.new_tensor(TAPS).expand(x.shape[1], 1, 1, -1)
    x = x.contiguous(memory_format=torch.channels_last)
    x = F.conv2d(x, taps, None, (1, 2), (0, pad), groups=len(taps))
    return F.conv2d(x, taps.mT, None, (2, 1), (pad, 0), groups=len(taps))


class Linear(torch.autograd.Function):
    """A linear map, given with its adjoint: either is the other's derivative, as often as is asked.

    PyTorch's own second derivatives are slow (convolutions by fixed weights) or were long missing (grid_sample).
    """

    @staticmethod
    def forward(ctx, x, apply, adjoint):
        ctx.maps = adjoint, apply
        with torch.autocast(x.device.type, enabled=False):  # the caller's is on again where gradients are computed
            return apply(x)

    @staticmethod
    def backward(ctx, g):
        return Linear.apply(g, *ctx.maps), None, None


def recolour(images: Float[Tensor, "b c h w"], matrix: Float[Tensor, "b 3 3"], offset: Float[Tensor, " b"]
             ) -> Float[Tensor, "b c h w"]:
    """rgb → matrix·rgb + offset, for each three channels."""
    matrix, offset = matrix.to(images), offset.to(images)

    def by(factor: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: (factor[:, None] @ x.unflatten(1, (-1, 3)).flatten(3)).reshape(x.shape)

    return Linear.apply(images, by(matrix), by(matrix.mT)) + offset[:, None, None, None]
