"""EG3D: Efficient Geometry-aware 3D GANs (Chan et al., CVPR 2022). arXiv 2112.07945

z, camera → mapping → ws → StyleGAN2 → three feature planes → field → volume rendering at 64–128 px → super-resolution.
Follows the released code where it tells more than the paper. Departures: pictures outside training are deterministic;
the planes lie along xy, xz and zy (`plane_axes: mended`; released weights need `released`, whose third plane repeats
the second); the points of the density's regulariser fill the box, whatever its size.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from gan3d import ops
from gan3d.cameras import CONDITION_DIM, Camera, Number, condition
from gan3d.cost import Cost, count_flops
from gan3d.gans import Images
from gan3d.nn.convolution import resize
from gan3d.nn.discriminators import Verdict
from gan3d.nn.stylegan2 import FullyConnected, Mapping, Noise, StyleGAN2Discriminator, Synthesis, SynthesisBlock
from gan3d.ramps import Ramp
from gan3d.rays import Bounds, Patch, Rays, camera_rays, full_grid
from gan3d.rendering import Field, query, render_chunks, render_hits
from gan3d.sampling import even_quantiles, merge, sample_pdf
from gan3d.volume import Rendering

AXES = {"mended": ops.XY_XZ_ZY, "released": ops.XY_XZ_ZX}
RAYS_PER_CHUNK = 1 << 12  # per image, where no gradients are wanted


class Planes(NamedTuple):
    """One identity, ready to be seen from anywhere: the backbone is not asked again."""

    ws: Tensor  # [b l d]
    planes: Tensor  # [b 3 c h w]


class Decoder(nn.Module):
    """The mean of the planes' features → raw density and colour features in about (0, 1). Sec. 3.2.

    Two layers with softplus between; colours are sigmoids widened by 0.001, as in mip-NeRF.
    """

    def __init__(self, inputs: int, width: int, outputs: int, lr_multiplier: Number = 1):
        super().__init__()
        self.widths = (inputs, width, 1 + outputs)
        first = FullyConnected(inputs, width, lr_multiplier=lr_multiplier)
        self.net = nn.Sequential(first, nn.Softplus(), FullyConnected(width, 1 + outputs, lr_multiplier=lr_multiplier))

    def forward(self, x: Float[Tensor, "*b i"]) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b c"]]:
        layers = (self.net[0], self.net[2])
        parts = [p for layer in layers for p in (layer.weight * layer.weight_gain, layer.bias * layer.bias_gain)]
        parameters = torch.cat([part.flatten() for part in parts])
        y = ops.tiny_mlp(x, parameters, self.widths, bias=True, activation="softplus")  # what self.net computes
        return y[..., 0], torch.sigmoid(y[..., 1:]) * 1.002 - 0.001


class SuperResolution(nn.Module):
    """A feature image → the picture: two StyleGAN2 blocks that carry its first three channels along. Sec. 3.4.

    Args:
        input_resolution: what comes in is resized to it.
        channels: feature maps of the two blocks.
        first_up: both blocks double the size (the release's 8X models); otherwise the second alone.
        clamp: of the convolutions (256: the release, also where it computes in float32).
        noise: "random" is random in training only, "const" otherwise.
    """

    def __init__(self, *, input_channels: int, input_resolution: int, w_dim: int, channels: tuple[int, int] | list[int],
                 first_up: bool, clamp: Number | None, noise: Noise = "none"):
        super().__init__()
        self.input_resolution, self.first_up, self.noise = input_resolution, first_up, noise
        first = input_resolution * (2 if first_up else 1)
        self.resolution = 2 * first
        common = {"w_dim": w_dim, "image_channels": 3, "clamp": clamp}
        self.block0 = SynthesisBlock(input_channels, channels[0], resolution=first, up=first_up, **common)
        self.block1 = SynthesisBlock(channels[0], channels[1], resolution=self.resolution, **common)

    def forward(self, features: Float[Tensor, "b c h w"], ws: Float[Tensor, "b l d"]
                ) -> tuple[Float[Tensor, "b 3 r r"], Float[Tensor, "b 3 q q"]]:
        """The picture, and what it was after the first block. Every layer gets the last w."""
        features = resize(features, self.input_resolution)
        w = ws[:, -1:].expand(-1, 3, -1)
        noise: Noise = "const" if self.noise == "random" and not self.training else self.noise
        x, first = self.block0(features, features[:, :3], w, noise)
        return self.block1(x, first, w, noise)[1], first


class EG3D(nn.Module):
    """The generator.

    Args:
        bounds: near and far along each ray. `background` (white for ShapeNet) shines through where little is dense.
        box: side of the cube that the planes cover; outside it all features are zero.
        plane_resolution, plane_channels: of each of the three planes.
        channel_base, channel_max: of the backbone, see `gan3d.nn.stylegan2`.
        plane_axes: "mended", or "released" for the released weights.
        decoder_width: hidden units of the decoder.
        samples_per_ray, fine_samples: coarse and importance samples; both are composited.
        render_resolution: side of the volume-rendered image that goes into the super-resolution; rounded as it ramps.
        superresolution: a `SuperResolution`, or None: the rendered image is the picture (of any side).
        raw_with_torgb: as released, the raw image includes the rgb of the super-resolution's first block where that
            block works in place: nothing is resized before it, nor doubled in it. The released weights were trained so.
        camera_conditioning: the mapping network sees a camera; otherwise zeros in its place.
        condition_scale: what that camera is multiplied by.
        swap: in training, the probability that the mapping sees another camera of the batch than the one rendered.
            Sec. 3.5.
        density_weight, density_every, density_points, density_distance: the density is asked to be alike at points so
            far apart (standard deviation, in units of half the box), every so many steps. Released code.
        truncation_cutoff: truncation moves so many ws, all if None.
        clamp: of the backbone's convolutions (256 where the release computes some of them in half precision).
        decoder_lr_multiplier: of the decoder's learning rate.
    """

    def __init__(
        self,
        *,
        bounds: Bounds,
        box: Number,
        z_dim: int,
        w_dim: int,
        mapping_depth: int,
        plane_resolution: int,
        plane_channels: int,
        channel_base: int,
        channel_max: int,
        decoder_width: int,
        samples_per_ray: int,
        fine_samples: int,
        render_resolution: Ramp,
        superresolution: SuperResolution | None,
        camera_conditioning: bool,
        swap: Ramp,
        density_weight: Number,
        density_every: int,
        density_points: int,
        density_distance: Number,
        plane_axes: str = "mended",
        truncation_cutoff: int | None = None,
        raw_with_torgb: bool = False,
        condition_scale: Number = 1,
        clamp: Number | None = None,
        decoder_lr_multiplier: Number = 1,
    ):
        super().__init__()
        if plane_axes not in AXES:
            raise ValueError(f"plane_axes must be one of {list(AXES)}, got {plane_axes!r}")
        self.bounds, self.box, self.z_dim, self.axes = bounds, box, z_dim, AXES[plane_axes]
        self.samples_per_ray, self.fine_samples = samples_per_ray, fine_samples
        self.camera_conditioning, self.condition_scale = camera_conditioning, condition_scale
        self.truncation_cutoff, self.raw_with_torgb = truncation_cutoff, raw_with_torgb
        self.swap_schedule, self.resolution_schedule = swap, render_resolution
        self.register_buffer("progress", torch.zeros((), dtype=torch.long))  # steps trained: what the schedules hang on
        self.density_weight, self.density_every = density_weight, density_every
        self.density_points, self.density_distance = density_points, density_distance
        self.backbone = nn.Module()  # the release's names: backbone.mapping, backbone.synthesis
        self.backbone.synthesis = Synthesis(w_dim=w_dim, resolution=plane_resolution, image_channels=3 * plane_channels,
                                            channel_base=channel_base, channel_max=channel_max, clamp=clamp)
        self.backbone.mapping = Mapping(z_dim=z_dim, c_dim=CONDITION_DIM, w_dim=w_dim, depth=mapping_depth,
                                        num_ws=self.backbone.synthesis.num_ws)
        features = 3 if superresolution is None else superresolution.block0.conv0.weight.shape[1]
        self.decoder = Decoder(plane_channels, decoder_width, features, decoder_lr_multiplier)
        self.superresolution = superresolution

    def mapping(self, z: Float[Tensor, "b z"], camera_condition: Camera | None = None, truncation_psi: Number = 1.0
                ) -> Float[Tensor, "b l w"]:
        """Without a camera, or where the model is not conditioned on it, zeros take its place."""
        if camera_condition is None or not self.camera_conditioning:
            c = z.new_zeros(len(z), CONDITION_DIM)
        else:
            c = (condition(camera_condition) * self.condition_scale).to(z).expand(len(z), -1)
            if self.training:
                swapped = torch.rand(len(z), 1, device=z.device) < self.swap_schedule(int(self.progress))
                c = torch.where(swapped, c.roll(1, 0), c)
        return self.backbone.mapping(z, c, truncation_psi, self.truncation_cutoff)

    def prepare(self, ws: Float[Tensor, "b l w"]) -> Planes:
        """The planes of these identities: `synthesis` and `field` take them instead of ws, for any camera."""
        planes = self.backbone.synthesis(ws, "random" if self.training else "const")
        return Planes(ws, planes.unflatten(1, (3, -1)).float())

    def field(self, ws: Tensor | Planes) -> Field:
        """raw density (softplus of it, minus 1, is the density) and colour features, the first three about rgb."""
        planes = (ws if isinstance(ws, Planes) else self.prepare(ws)).planes

        def ask(points: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
            place = points.flatten(1, -2) * (2 / self.box)
            features = ops.triplane_sample(planes, place, self.axes, scale=1 / 3)
            return self.decoder(features.unflatten(1, points.shape[1:-1]))

        return ask

    def synthesis(self, ws: Tensor | Planes, camera: Camera, resolution: int, patch: Patch | None = None) -> Images:
        """Pictures of side `resolution`. Raises: ValueError for a patch, or a side other than the upsampler's."""
        if patch is not None:
            raise ValueError("EG3D draws whole pictures: set model.patch=null")
        if self.superresolution is not None and resolution != self.superresolution.resolution:
            raise ValueError(f"this EG3D draws {self.superresolution.resolution}² pictures, not {resolution}²")
        ready = ws if isinstance(ws, Planes) else self.prepare(ws)
        side = resolution if self.superresolution is None else self.render_resolution
        rays = camera_rays(camera, full_grid(side, side, device=ready.planes.device), self.bounds, (side, side))
        field = self.field(ready)

        def render(part: Rays) -> Rendering:
            return self.render(field, part)

        def render_all(part: Rays) -> Rendering:
            return render(part) if torch.is_grad_enabled() else render_chunks(render, part, RAYS_PER_CHUNK)

        hits_only = self.bounds.aabb is not None
        with torch.autocast(ready.planes.device.type, enabled=False):  # distances need float32
            seen = render_hits(render_all, rays, self._background(ready.planes)) if hits_only else render_all(rays)
        features = 2 * seen.features.mT.unflatten(-1, (side, side)) - 1
        rgb = raw = features[:, :3]
        upsampler = self.superresolution
        if upsampler is not None:
            rgb, first = upsampler(features, ready.ws)
            in_place = side == upsampler.input_resolution and not upsampler.first_up
            raw = first if self.raw_with_torgb and in_place else raw
        return Images(rgb, raw, seen.depth.unflatten(-1, (side, side)), seen.opacity.unflatten(-1, (side, side)))

    def render(self, field: Field, rays: Rays) -> Rendering:
        """Coarse samples, importance samples where they found something, all composited together (supplement)."""
        s = self.samples_per_ray
        steps = torch.linspace(0, 1, s, device=rays.near.device, dtype=rays.near.dtype)
        t = rays.near[..., None] + (rays.far - rays.near)[..., None] * steps
        jitter = torch.rand_like(t) if self.training else torch.full_like(t, 0.5)
        t = t + jitter * ((rays.far - rays.near)[..., None] / (s - 1))  # one-sided, so the last may pass `far`
        raw_density, features = query(field, rays, t)
        if not self.fine_samples:
            order = torch.arange(s, device=t.device).expand(t.shape)
            return self._composite(t, order, raw_density, [features])
        with torch.no_grad():
            fine = self._importance(t, interval_weights(raw_density, t))
        more_density, more_features = query(field, rays, fine)
        t, order = merge(t, fine)
        raw_density = torch.cat([raw_density, more_density], -1)
        return self._composite(t, order, raw_density, [features, more_features])

    def _importance(self, t: Float[Tensor, "b n s"], weights: Float[Tensor, "b n s-1"]) -> Float[Tensor, "b n m"]:
        """Distances drawn from the coarse weights, blurred as in mip-NeRF.

        As released, the weight of the interval (t_j, t_{j+1}) is spread over the midpoints around t_j: half an interval
        towards the camera.
        """
        blurred = F.avg_pool1d(F.max_pool1d(weights, 2, 1, padding=1), 2, 1) + 0.01
        middle = (t[..., 1:] + t[..., :-1]) / 2
        shape = (*t.shape[:-1], self.fine_samples)
        u = torch.rand(shape, device=t.device, dtype=t.dtype) if self.training else even_quantiles(
            t.shape[:-1], self.fine_samples, t)
        return sample_pdf(middle[..., :-1], blurred[..., 1:-1], u)

    def _composite(self, t: Tensor, order: Tensor, raw_density: Tensor, features: list[Tensor]) -> Rendering:
        """Features stay where they were computed: the weights are brought into their order instead."""
        weights = interval_weights(raw_density.gather(-1, order), t)
        opacity = weights.sum(-1)
        depth = (weights * (t[..., 1:] + t[..., :-1])).sum(-1) / 2
        shared = F.pad(weights, (0, 1)) + F.pad(weights, (1, 0))  # an interval has the mean colour of its two ends
        shared = torch.zeros_like(shared).scatter(-1, order, shared / 2)
        parts = shared.split([f.shape[-2] for f in features], dim=-1)
        colour = sum(torch.matmul(w[..., None, :], f)[..., 0, :] for w, f in zip(parts, features, strict=True))
        behind = self._background(colour)
        if behind is not None:
            colour = colour + (1 - opacity)[..., None] * behind
        return Rendering(colour, depth, opacity)

    def _background(self, like: Tensor) -> Tensor | None:
        """rgb, and its mean in the channels beyond (the release: white in all of them)."""
        if self.bounds.background is None:
            return None
        rgb = like.new_tensor(self.bounds.background)
        rest = self.decoder.net[2].weight.shape[0] - 1 - len(rgb)
        return torch.cat([rgb, rgb.mean().expand(rest)])

    def regularizers(self, ready: Planes, camera: Camera, images: Images, step: int) -> dict[str, Tensor]:
        """The density must be alike at neighbouring points (of the planes just drawn; the release draws others)."""
        if not self.density_weight or step % self.density_every:
            return {}
        near = 2 * torch.rand(len(ready.ws), self.density_points, 1, 3, device=ready.ws.device) - 1
        points = torch.cat([near, near + self.density_distance * torch.randn_like(near)], 1) * (self.box / 2)
        raw_density, _ = self.field(ready)(points, points)
        first, second = raw_density.chunk(2, dim=1)
        return {"reg_density": self.density_weight * self.density_every * (first - second).abs().mean()}

    def before_step(self, step: int) -> None:
        self.progress.fill_(step)

    @property
    def render_resolution(self) -> int:
        return round(self.resolution_schedule(int(self.progress)))

    def cost(self, resolution: int) -> Cost:
        """Per sample: the decoder (the planes are read, not multiplied). Fixed: mapping, backbone, super-resolution."""
        weight = self.decoder.net[0].weight
        ws = weight.new_zeros(1, self.backbone.mapping.num_ws, self.backbone.mapping.embed.weight.shape[0])
        side = resolution if self.superresolution is None else self.render_resolution
        fixed = count_flops(lambda: self.mapping(weight.new_zeros(1, self.z_dim)))
        fixed += count_flops(lambda: self.prepare(ws))
        upsampler = self.superresolution
        if upsampler is not None:
            channels = upsampler.block0.conv0.weight.shape[1]
            fixed += count_flops(lambda: upsampler(weight.new_zeros(1, channels, side, side), ws))
        flops = count_flops(lambda: self.decoder(weight.new_zeros(64, weight.shape[1]))) / 64
        return Cost(side**2, float(self.samples_per_ray + self.fine_samples), flops, float(fixed))


def interval_weights(raw_density: Float[Tensor, "*b s"], t: Float[Tensor, "*b s"]) -> Float[Tensor, "*b s-1"]:
    """Weight of each interval between samples, its raw density the mean of the two; mip-NeRF's activation.

    What lies before the first sample and behind the last adds nothing. The shift by −1 makes a new field thin.
    """
    density = F.softplus((raw_density[..., 1:] + raw_density[..., :-1]) / 2 - 1)
    thickness = density * (t[..., 1:] - t[..., :-1])
    before = thickness.cumsum(-1) - thickness
    return torch.exp(-before) * -torch.expm1(-thickness)


class DualDiscriminator(StyleGAN2Discriminator):
    """Sees the picture and, enlarged beside it, the image before the super-resolution; and the camera. Sec. 3.4, 3.5.

    So the two must agree, and views must fit their cameras. With `dual` false: the picture and the camera.
    """

    needs_camera = True  # of photographs, too: data without cameras stops before any work

    def __init__(self, *, resolution: int, channel_base: int, channel_max: int, mapping_depth: int, group: int,
                 dual: bool = True, clamp: Number | None = None):
        super().__init__(resolution=resolution, image_channels=6 if dual else 3, c_dim=CONDITION_DIM, group=group,
                         channel_base=channel_base, channel_max=channel_max, mapping_depth=mapping_depth, clamp=clamp)
        self.dual = dual

    def forward(self, images: Float[Tensor, "b 3 r r"], fade: float = 1.0, camera: Camera | None = None,
                raw: Float[Tensor, "b 3 h w"] | None = None) -> Verdict:
        """Raises: ValueError without a camera, or without a raw image where two are judged."""
        if camera is None:
            raise ValueError("EG3D's discriminator must know the camera of every photograph, and this data set has "
                             "none: give it a dataset.json, or choose a model that needs no poses (graf, pigan)")
        if self.dual:
            if raw is None:
                raise ValueError("dual discrimination needs raw images: set model.dual=true")
            images = torch.cat([images, resize(raw, images.shape[-1])], dim=1)
        return Verdict(super().forward(images, condition(camera).to(images)))
