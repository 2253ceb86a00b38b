"""pi-GAN: Periodic Implicit Generative Adversarial Networks (Chan et al., CVPR 2021). arXiv 2012.00926

z → mapping → ws (a frequency and a phase for every sine) → FiLM-SIREN along coarse + fine samples → volume rendering.
Follows the released code where it tells more than the paper. Departures, all of them switches that are off as the paper
has it: pictures outside training are deterministic (`jitter_at_inference` brings the release's noise back), and density
may be scaled and shifted (`density_gain`, `density_bias`). Rays limited by a box end at the box: see `PiGAN.render`.
"""

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gan3d.cameras import Camera, Number
from gan3d.cost import Cost, count_flops
from gan3d.gans import Images, as_pictures
from gan3d.nn.siren import FiLMSiren, MappingNetwork
from gan3d.ramps import Ramp
from gan3d.rays import Bounds, Patch, PixelGrid, Rays, picture_rays
from gan3d.rendering import Field, query, render_chunks, render_hits
from gan3d.sampling import LAST_DELTA, deltas, even_quantiles, merge, sample_pdf, spread
from gan3d.volume import Rendering, accumulate, composite

RAYS_PER_CHUNK = 1 << 14  # per image, where no gradients are wanted: bounds memory, costs no time


class PiGAN(nn.Module):
    """The generator. Numbers without a unit are pi-GAN's, sec. 3 and supplement.

    Args:
        bounds: near and far along each ray; `background` white for CARLA; an `aabb` skips rays that miss it.
        width, depth: of the SIREN; mapping_width, mapping_depth: of the mapping network, without its output layer.
        point_scale: positions are multiplied by it (2/0.24 for faces and cats, 1 for CARLA).
        samples_per_ray, fine_samples: coarse and fine; all are composited, with gradients through both. 0 fine: none.
        density_noise, density_noise_steps: standard deviation of the noise on raw density in training; falls linearly
            to 0 over so many steps.
        pixel_grid: where in its pixel a ray starts; "corner" is pi-GAN's.
        density_gain, density_bias: raw density becomes gain·(raw + bias). 1 and 0: pi-GAN. At init the scene is all but
            empty; small networks on short runs need a visible start (about 20 and 0.3).
        last_back: light that passes all samples takes the last one's colour (the release evaluates faces and cats so).
        jitter_at_inference: random samples outside training too, as the release renders.
        lock_view_dependence: the colour layer always sees the direction (0, 0, −1).
    """

    def __init__(
        self,
        *,
        bounds: Bounds,
        z_dim: int,
        width: int,
        depth: int,
        mapping_width: int,
        mapping_depth: int,
        point_scale: Number,
        samples_per_ray: int,
        fine_samples: int,
        density_noise: Number,
        density_noise_steps: int,
        pixel_grid: PixelGrid,
        density_gain: Number = 1.0,
        density_bias: Number = 0.0,
        last_back: bool = False,
        jitter_at_inference: bool = False,
        lock_view_dependence: bool = False,
    ):
        super().__init__()
        self.bounds, self.z_dim, self.pixel_grid = bounds, z_dim, pixel_grid
        self.samples_per_ray, self.fine_samples = samples_per_ray, fine_samples
        self.density_noise, self.density_noise_steps, self.noise_std = density_noise, density_noise_steps, density_noise
        self.density_gain, self.density_bias = density_gain, density_bias
        self.last_back, self.jitter_at_inference = last_back, jitter_at_inference
        self.lock_view_dependence = lock_view_dependence
        background = None if bounds.background is None else torch.tensor(bounds.background, dtype=torch.float32)
        self.register_buffer("background", background, persistent=False)
        self.siren = FiLMSiren(width=width, depth=depth, point_scale=point_scale)
        self.mapping_network = MappingNetwork(z_dim=z_dim, mapping_width=mapping_width, mapping_depth=mapping_depth,
                                              outputs=self.siren.num_modulations)

    def mapping(
        self, z: Float[Tensor, "b z"], camera_condition: Camera | None = None, truncation_psi: Number = 1.0
    ) -> Float[Tensor, "b m"]:
        """All raw frequencies, then all phases. The camera is not looked at; z is a standard normal, not normalised."""
        return self.mapping_network.truncated(z, truncation_psi)

    def field(self, ws: Float[Tensor, "b m"]) -> Field:
        """raw density (ReLU gives the density) and colour in (0, 1)."""

        def ask(points: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
            if self.lock_view_dependence:
                directions = torch.zeros_like(directions)
                directions[..., 2] = -1
            raw_density, rgb = self.siren(points, directions, ws)
            return self.density_gain * (raw_density + self.density_bias), rgb

        return ask

    def prepare(self, ws: Tensor) -> Tensor:
        """Nothing is shared between views: ws."""
        return ws

    def synthesis(
        self, ws: Float[Tensor, "b m"], camera: Camera, resolution: int, patch: Patch | None = None
    ) -> Images:
        """Pictures of side `resolution`, or the patch's pixels of such pictures."""
        rays = picture_rays(camera, resolution, patch, self.bounds, self.pixel_grid)
        render = partial(self.render, self.field(ws))
        if not torch.is_grad_enabled():
            render = partial(render_chunks, render, chunk=RAYS_PER_CHUNK)
        seen = render(rays) if self.bounds.aabb is None else render_hits(render, rays, self.background)
        rgb, depth, opacity = as_pictures(seen, resolution if patch is None else patch.size)
        return Images(rgb, rgb, depth, opacity)

    def render(self, field: Field, rays: Rays) -> Rendering:
        """Coarse samples, then fine ones where the coarse found something, all composited together (sec. 3.3).

        The last sample stands for a length of 1e10 and so closes the ray; where the bounds have a box, for what is left
        of the box: behind it there is nothing.
        """
        random = self.training or self.jitter_at_inference
        t = spread(rays, self.samples_per_ray, jitter="offset" if random else "none")
        raw_density, rgb = query(field, rays, t)
        if self.fine_samples:
            fine = self._fine_t(rays, t, raw_density, random)
            more_density, more_rgb = query(field, rays, fine)
            t, order = merge(t, fine)
            raw_density = torch.cat([raw_density, more_density], -1).gather(-1, order)
            rgb = torch.cat([rgb, more_rgb], -2).gather(-2, order[..., None].expand(*order.shape, 3))
        weights = self._weights(rays, t, raw_density)
        if self.last_back:
            passed = 1 - weights.sum(-1, keepdim=True)
            weights = torch.cat([weights[..., :-1], weights[..., -1:] + passed], -1)
        return accumulate(weights, rgb, t, self.background)

    def _fine_t(self, rays: Rays, t: Tensor, raw_density: Tensor, random: bool) -> Tensor:
        """Distances drawn from the coarse weights, the two outermost left out, between the samples' midpoints."""
        with torch.no_grad():
            weights = self._weights(rays, t, raw_density)[..., 1:-1] + 1e-5
            shape = (*t.shape[:-1], self.fine_samples)
            u = torch.rand(shape, device=t.device, dtype=t.dtype) if random else even_quantiles(
                t.shape[:-1], self.fine_samples, t)
            return sample_pdf((t[..., 1:] + t[..., :-1]) / 2, weights, u)

    def _weights(self, rays: Rays, t: Tensor, raw_density: Tensor) -> Tensor:
        if self.training and self.noise_std > 0:  # drawn afresh for the coarse weights and for the composite
            raw_density = raw_density + self.noise_std * torch.randn_like(raw_density)
        delta = deltas(t, LAST_DELTA)
        if self.bounds.aabb is not None:
            delta = torch.cat([delta[..., :-1], (rays.far[..., None] - t[..., -1:]).clamp(min=0)], -1)
        return composite(torch.relu(raw_density), delta)

    def regularizers(self, ready: Tensor, camera: Camera, images: Images, step: int) -> dict[str, Tensor]:
        """None; the pose term belongs to the discriminator's heads."""
        return {}

    def before_step(self, step: int) -> None:
        """Noise on the density: from `density_noise` at step 0 linearly to none."""
        self.noise_std = Ramp(self.density_noise, 0.0, self.density_noise_steps)(step)

    def cost(self, resolution: int) -> Cost:
        weight = self.siren.density_head.weight
        n, s = 4, self.samples_per_ray  # the direction's product is paid per ray: count it shared by the coarse samples
        ws, z = weight.new_zeros(1, self.siren.num_modulations), weight.new_zeros(1, self.z_dim)
        ask, points = self.field(ws), weight.new_zeros(1, n, s, 3)
        flops = count_flops(lambda: ask(points, points[:, :, :1])) / (n * s)
        return Cost(resolution**2, float(s + self.fine_samples), flops, float(count_flops(lambda: self.mapping(z))))
