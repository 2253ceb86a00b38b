"""GRAF: Generative Radiance Fields for 3D-Aware Image Synthesis (Schwarz et al., NeurIPS 2020). arXiv 2007.02442

z = (shape, appearance) and a camera → a K×K patch of rays → conditional radiance field → volume rendering → patch
discriminator. No mapping network, no upsampler; whole pictures are rendered only to be looked at.

Departures from the paper: where `bounds.aabb` limits the rays, the last sample stands for one sample spacing instead
of 1e10, since a box that fits the object would otherwise turn any density at its exit into a wall; rays then pass
through to the background. Transmittance is exp(−Σ density·delta) without the released code's 1e-10. Where released code
and paper disagree: the released code (encoding without π, skip and widths); `official_generator` takes its weights.
"""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from gan3d.cameras import Camera, Number
from gan3d.cost import Cost, count_flops
from gan3d.gans import Images, Verdict, as_pictures
from gan3d.nn.convolution import convolve
from gan3d.nn.encodings import encoding_width, positional_encoding
from gan3d.nn.mlp import RadianceWeights, radiance_mlp
from gan3d.rays import Bounds, Patch, PixelGrid, Rays, camera_rays, full_grid
from gan3d.rendering import Field, query, render_chunks, render_hits
from gan3d.sampling import deltas, spread
from gan3d.volume import Rendering, accumulate, composite

POINTS_PER_CHUNK = 2**17  # of a picture rendered without gradients: some 100 MB


class GRAFField(nn.Module):
    """The conditional radiance field g(γ(x), γ(d), z_shape, z_appearance) → density, colour (sec. 3.2, fig. 3).

    The parameters are laid out as in the paper; `bind` folds the latents into biases, the direction into a bias per ray
    and the feature layer, which has no activation, into the view layer behind it. Same function, a fifth less work.

    Args:
        skip: hidden layer after which the input is prepended to the activations; None: nowhere.
        direction_octaves: None for a colour that does not depend on the direction (the paper's birds).
    """

    def __init__(self, *, z_shape_dim: int, z_appearance_dim: int, width: int, depth: int, skip: int | None,
                 position_octaves: int, direction_octaves: int | None):
        super().__init__()
        if skip is not None and not 0 <= skip < depth - 1:
            raise ValueError(f"skip must be a layer before the last, 0 to {depth - 2}, got {skip}")
        self.position_octaves, self.direction_octaves = position_octaves, direction_octaves
        self.z_dims = [z_shape_dim, z_appearance_dim]
        self.skip_to = -1 if skip is None else skip + 1
        seen = encoding_width(position_octaves) + z_shape_dim
        lit = z_appearance_dim + (0 if direction_octaves is None else encoding_width(direction_octaves))
        self.trunk = nn.ModuleList([nn.Linear(seen, width)])
        self.trunk.extend(nn.Linear(width + seen * (layer == self.skip_to), width) for layer in range(1, depth))
        self.density = nn.Linear(width, 1)
        self.feature = nn.Linear(width, width)
        self.view = nn.Linear(width + lit, width // 2)
        self.colour = nn.Linear(width // 2, 3)

    def bind(self, z: Float[Tensor, "b z"]) -> Field:
        """The field of these latents: points `[b n s 3]`, directions `[b n 1 3]` → raw density, rgb in [0, 1]."""
        shape, appearance = z.split(self.z_dims, dim=-1)
        weights = self._fold(shape)
        parts = [len(self.feature.weight), self.view.in_features - appearance.shape[-1]]
        of_feature, of_direction, of_appearance = self.view.weight.tensor_split(parts, dim=1)
        image_bias = self.view.bias + of_feature @ self.feature.bias + appearance @ of_appearance.T
        encode = partial(positional_encoding, octaves=self.position_octaves)

        def field(points: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
            points, directions = points.to(image_bias.dtype), directions.to(image_bias.dtype)
            images, rays, samples, _ = points.shape
            ray_bias = image_bias[:, None].expand(-1, rays, -1)
            if self.direction_octaves is not None:
                seen = positional_encoding(directions[..., 0, :], self.direction_octaves)
                ray_bias = ray_bias + seen @ of_direction.T
            density, colour = radiance_mlp(points.flatten(1, 2), ray_bias, weights, encode)
            return density.view(images, rays, samples), colour.sigmoid().view(images, rays, samples, 3)

        return field

    def _fold(self, shape: Float[Tensor, "b z"]) -> RadianceWeights:
        """All that depends on the latents and not on the point, worked out once per image."""
        encoded = self.trunk[0].in_features - shape.shape[-1]
        trunk, biases, skip = [], [], None
        for index, layer in enumerate(self.trunk):
            weight, bias = layer.weight, layer.bias.expand(len(shape), -1)
            if index in (0, self.skip_to):
                cuts = [int(encoded), int(encoded) + shape.shape[-1]]
                of_points, of_shape, of_hidden = weight.tensor_split(cuts, dim=1)
                bias = bias + shape @ of_shape.T
                weight, skip = (of_points, None) if index == 0 else (of_hidden, of_points)
            trunk.append(weight)
            biases.append(bias)
        branch = self.view.weight[:, : len(self.feature.weight)] @ self.feature.weight
        return RadianceWeights(tuple(trunk), tuple(biases), skip, self.skip_to, self.density.weight, self.density.bias,
                               branch, self.colour.weight, self.colour.bias)


class SpectralConv2d(nn.Conv2d):
    """A convolution divided by its largest singular value. Spectral normalisation (Miyato et al., 2018), algorithm 1.

    One power iteration per forward pass in training, v before u, as PyTorch's original hook does it (the newer one goes
    the other way round): `weight_orig`, `weight_u` and `weight_v` of such checkpoints are our `weight`, `u` and `v`.
    A plain module can be copied after use, which a hooked one cannot.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, padding: int):
        super().__init__(in_channels, out_channels, 4, stride, padding, bias=False)
        self.register_buffer("u", F.normalize(torch.randn(out_channels), dim=0))
        self.register_buffer("v", F.normalize(torch.randn(in_channels * 16), dim=0))

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d hh ww"]:
        with torch.autocast(images.device.type, enabled=False):
            weight = self.weight / self._largest_singular_value(self.weight.flatten(1))
        return convolve(images, weight, None, self.stride[0], self.padding[0])  # type: ignore[arg-type]

    def _largest_singular_value(self, matrix: Float[Tensor, "d e"]) -> Float[Tensor, ""]:
        if self.training:
            with torch.no_grad():
                self.v.copy_(F.normalize(matrix.T @ self.u, dim=0, eps=1e-12))
                self.u.copy_(F.normalize(matrix @ self.v, dim=0, eps=1e-12))
        return self.u.clone() @ (matrix @ self.v.clone())  # cloned: the next forward overwrites what backward needs


class PatchDiscriminator(nn.Module):
    """Looks at K×K patches of any scale, and is not told the scale (sec. 3.3; supp. sec. 2).

    Convolutions that halve the side down to 4, then one over all that is left. Instance normalisation after each but
    the last — and but the first, where the patch is larger than 32.

    Args:
        patch_size: K, a power of two from 16 on. channels: width at a side of 32 (the released code's ndf: 64).
        flip: mirror each image with probability ½ in training, real or fake (the paper's birds).
    """

    def __init__(self, *, patch_size: int, channels: int, flip: bool):
        super().__init__()
        if patch_size < 16 or patch_size & (patch_size - 1):
            raise ValueError(f"patch_size must be a power of two from 16 on, got {patch_size}")
        self.patch_size, self.flip = patch_size, flip
        halvings = patch_size.bit_length() - 3
        widths = [3, *(max(1, channels * 64 // patch_size) * 2**level for level in range(halvings))]
        self.convs = nn.ModuleList(SpectralConv2d(i, o, stride=2, padding=1)
                                   for i, o in zip(widths, widths[1:], strict=False))
        self.verdict = SpectralConv2d(widths[-1], 1, stride=1, padding=0)

    def forward(self, images: Float[Tensor, "b 3 h w"], fade: float = 1.0, camera: Camera | None = None,
                raw: Tensor | None = None) -> Verdict:
        if images.shape[-2:] != (self.patch_size, self.patch_size):
            raise ValueError(f"expected patches of {self.patch_size}×{self.patch_size}, got {tuple(images.shape)}")
        if self.flip and self.training:
            mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
            images = torch.where(mirrored, images.flip(-1), images)
        hidden = images
        for level, conv in enumerate(self.convs):
            hidden = conv(hidden)
            if level > 0 or self.patch_size <= 32:
                hidden = F.instance_norm(hidden)
            hidden = F.leaky_relu(hidden, 0.2)
        return Verdict(self.verdict(hidden).flatten())


class GRAF(nn.Module):
    """The generator (sec. 3.2).

    Args:
        bounds: with planar near and far for the paper's cameras; see `gan3d.rays.Bounds`.
        z_shape_dim, z_appearance_dim: the two parts of z, in this order.
        width, depth, skip, position_octaves, direction_octaves: see `GRAFField`.
        samples_per_ray: both ends included; jittered within their strata in training only.
        density_noise: standard deviation of what is added to the raw density at step 0. It falls linearly over
            `density_noise_steps` steps and stays at its last value; training only. It makes the first, empty fields
            visible, hence gives them a gradient: do not cut it short.
        pixel_grid: "integer", pixel i at i/W, in the paper's cameras.
    """

    def __init__(self, *, bounds: Bounds, z_shape_dim: int, z_appearance_dim: int, width: int, depth: int,
                 skip: int | None, position_octaves: int, direction_octaves: int | None, samples_per_ray: int,
                 density_noise: Number, density_noise_steps: int, pixel_grid: PixelGrid):
        super().__init__()
        self.bounds, self.pixel_grid, self.samples_per_ray = bounds, pixel_grid, samples_per_ray
        self.z_dim = z_shape_dim + z_appearance_dim
        self.density_noise, self.density_noise_steps = density_noise, density_noise_steps
        self.noise_std = density_noise
        self.radiance = GRAFField(
            z_shape_dim=z_shape_dim, z_appearance_dim=z_appearance_dim, width=width, depth=depth, skip=skip,
            position_octaves=position_octaves, direction_octaves=direction_octaves)
        background = None if bounds.background is None else torch.tensor(bounds.background, dtype=torch.float32)
        self.register_buffer("background", background, persistent=False)

    def mapping(self, z: Float[Tensor, "b z"], camera_condition: Camera | None = None,
                truncation_psi: float = 1.0) -> Float[Tensor, "b z"]:
        """GRAF has no mapping network: ws is z itself, drawn towards the origin by `truncation_psi`."""
        return z * truncation_psi

    def field(self, ws: Float[Tensor, "b z"]) -> Field:
        return self.radiance.bind(ws)

    def prepare(self, ws: Tensor) -> Tensor:
        """Nothing is shared between views: ws."""
        return ws

    def synthesis(self, ws: Float[Tensor, "b z"], camera: Camera, resolution: int,
                  patch: Patch | None = None) -> Images:
        """Pictures of side `resolution`, or the patch's pixels of such pictures. Not in lower precision (autocast)."""
        side = resolution if patch is None else patch.size
        with torch.autocast(ws.device.type, enabled=False):
            size = (resolution, resolution)
            pixels = full_grid(*size, ws.device) if patch is None else patch.pixels(*size)
            rays = self._rays(camera, pixels, size)
            render: Callable[[Rays], Rendering] = partial(self._render, self.field(ws))
            if not torch.is_grad_enabled():
                chunk = max(1, POINTS_PER_CHUNK // (self.samples_per_ray * len(ws)))
                render = partial(render_chunks, render, chunk=chunk)
            seen = render(rays) if self.bounds.aabb is None else render_hits(render, rays, self.background)
        rgb, depth, opacity = as_pictures(seen, side)
        return Images(rgb, rgb, depth, opacity)

    def _rays(self, camera: Camera, pixels: Float[Tensor, "*b n 2"], size: tuple[int, int]) -> Rays:
        """The rays in float64 (float32 on Apple's GPUs, which lack it); the field rounds the points along them.

        Ten units from the camera every float32 operation misplaces a point by up to 5e-7, and the encoding takes 2⁹
        times that: nearly all that a picture loses to rounding it would lose here, where float64 costs nothing.
        """
        exact = torch.float32 if pixels.device.type == "mps" else torch.float64
        camera = Camera(*(part.to(exact) for part in camera))
        return camera_rays(camera, pixels.to(exact), self.bounds, size, self.pixel_grid)

    def _render(self, field: Field, rays: Rays) -> Rendering:
        t = spread(rays, self.samples_per_ray, "strata" if self.training else "none")
        raw_density, rgb = query(field, rays, t)
        if self.training and self.noise_std > 0:
            raw_density = raw_density + self.noise_std * torch.randn_like(raw_density)
        weights = composite(raw_density.relu(), self._deltas(rays, t).to(rgb.dtype))
        return accumulate(weights, rgb, t.to(rgb.dtype), self.background)

    def _deltas(self, rays: Rays, t: Float[Tensor, "b n s"]) -> Float[Tensor, "b n s"]:
        """Without a box the last sample closes the ray, as published; at a box's exit it is as long as the others."""
        delta = deltas(t)
        if self.bounds.aabb is None:
            return delta
        spacing = (rays.far - rays.near) / max(self.samples_per_ray - 1, 1)
        return torch.cat([delta[..., :-1], spacing[..., None]], dim=-1)

    def regularizers(self, ready: Tensor, camera: Camera, images: Images, step: int) -> dict[str, Tensor]:
        return {}

    def before_step(self, step: int) -> None:
        """The density noise of this step: σ·(1 − step/steps), then for good the last value before zero."""
        remaining = max(1 - step / self.density_noise_steps, 1 / self.density_noise_steps)
        self.noise_std = self.density_noise * remaining

    def cost(self, resolution: int) -> Cost:
        """Rays that miss `bounds.aabb` are counted here, although they cost nothing."""
        some = next(self.parameters())
        z, points = some.new_zeros(1, self.z_dim), some.new_zeros(1, 1, self.samples_per_ray, 3)
        fixed = count_flops(lambda: self.field(z))
        bound = self.field(z)
        sampled = count_flops(lambda: bound(points, points[:, :, :1]))
        return Cost(resolution**2, float(self.samples_per_ray), sampled / self.samples_per_ray, float(fixed))
