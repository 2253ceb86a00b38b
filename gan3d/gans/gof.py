"""GOF: Generative Occupancy Fields for 3D Surface-Aware Image Synthesis (Xu et al., NeurIPS 2021). arXiv 2111.00969

z → mapping → ws → FiLM-SIREN, read as an occupancy logit → where each ray enters the object → samples around that place
→ volume rendering. The interval around the surface shrinks while training: a radiance field becomes a surface.

The network is pi-GAN's. Departures from the released code, whose own ways `release_compat` brings back where they
change the training: intervals are limited to near and far of the rays (there 0.88 and 1.12 whatever the data), and the
two losses are those that the paper describes (there the opacity prior looks at the red channel, and the normals' x are
compared with their y). Pictures outside training are not random. `surface_from_step`, `logit_gain` and `logit_bias`
are ours.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from gan3d.cameras import Camera, Number
from gan3d.cost import Cost, count_flops
from gan3d.gans import Images, as_pictures
from gan3d.nn.siren import FiLMSiren, MappingNetwork
from gan3d.ramps import Exponential
from gan3d.rays import Bounds, Patch, PixelGrid, Rays, camera_rays, full_grid, picture_rays
from gan3d.rendering import Field, density_normals, points_along, query, render_chunks, render_hits
from gan3d.sampling import even_quantiles, merge, sample_pdf, spread
from gan3d.volume import Rendering, accumulate, composite

RAYS_PER_CHUNK = 1 << 14  # per image, where no gradients are wanted: bounds memory, costs no time
RELEASED_RANGE = (0.88, 1.12)  # to which the released code limits every interval


class Trace(NamedTuple):
    """What the losses look at, of n rays: all of a picture, or those that meet the data's box."""

    judged: Tensor  # [b n s], the numbers whose sigmoids the opacity prior makes 0 or 1
    surface: Tensor  # [b n 3], where a ray enters the object
    hit: Tensor  # [b n], whether it does


@dataclass(frozen=True)
class SurfaceImages(Images):
    """Pictures to be trained on."""

    trace: Trace

    @property
    def scalars(self) -> dict[str, Tensor]:
        """What a run should watch: see `convexity`."""
        return {"convexity": convexity(self.depth / (self.opacity + 1e-5)).mean().detach()}


class GOF(nn.Module):
    """The generator. Numbers without a unit are GOF's, sec. 3 and supplement.

    Args:
        bounds: near and far along each ray; an `aabb` skips rays that miss it.
        width, depth, mapping_width, mapping_depth, point_scale: see `gan3d.gans.pigan`.
        coarse_samples: where each ray is asked first, without gradients; they find the surface and are not shown.
        surface_samples, fine_samples: what is shown, with gradients: spread over the interval around the surface, and
            drawn from the coarse samples' weights.
        secant_steps: refinements of the surface between two coarse samples.
        interval: half its length, in scene units, by the step.
        surface_from_step: before it the coarse samples, jittered, stand in for those around the surface: plain
            volume rendering of opacities. 0 in the paper, whose first interval is as long as the rays.
        opacity_weight: of the prior that makes opacities 0 or 1, by the step.
        normal_weight, normal_offset: weight of the normals' smoothness, and the distance (scene units) over which it is
            taken.
        logit_gain, logit_bias: the logit is gain·(the network's + bias). 1 and 0: GOF, which starts with occupancies of
            about ½ everywhere. Small networks on short runs need shapes to begin with, and space that is nearly empty:
            before a white background they else paint the walls of the box.
        last_back: light that passes all samples takes the last one's colour.
        release_compat: see the top of this file.
    """

    surface_level = 0.0  # the logit of occupancy ½
    step: Tensor

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
        coarse_samples: int,
        surface_samples: int,
        fine_samples: int,
        secant_steps: int,
        interval: Exponential,
        surface_from_step: int,
        opacity_weight: Exponential,
        normal_weight: Number,
        normal_offset: Number,
        pixel_grid: PixelGrid,
        logit_gain: Number = 1.0,
        logit_bias: Number = 0.0,
        last_back: bool = False,
        release_compat: bool = False,
    ):
        super().__init__()
        if coarse_samples < 3 or surface_samples < 2:
            raise ValueError(f"coarse_samples must be 3 or more, so that fine ones lie between, and surface_samples "
                             f"2 or more, both ends of an interval; got {coarse_samples} and {surface_samples}")
        self.bounds, self.z_dim, self.pixel_grid = bounds, z_dim, pixel_grid
        self.coarse_samples, self.surface_samples, self.fine_samples = coarse_samples, surface_samples, fine_samples
        self.secant_steps, self.interval, self.surface_from_step = secant_steps, interval, surface_from_step
        self.opacity_weight, self.normal_weight, self.normal_offset = opacity_weight, normal_weight, normal_offset
        self.logit_gain, self.logit_bias = logit_gain, logit_bias
        self.last_back, self.release_compat = last_back, release_compat
        background = None if bounds.background is None else torch.tensor(bounds.background, dtype=torch.float32)
        self.register_buffer("background", background, persistent=False)
        self.register_buffer("step", torch.zeros((), dtype=torch.long), persistent=False)  # averages copy buffers
        self.siren = FiLMSiren(width=width, depth=depth, point_scale=point_scale)
        self.mapping_network = MappingNetwork(z_dim=z_dim, mapping_width=mapping_width, mapping_depth=mapping_depth,
                                              outputs=self.siren.num_modulations)

    def mapping(
        self, z: Float[Tensor, "b z"], camera_condition: Camera | None = None, truncation_psi: Number = 1.0
    ) -> Float[Tensor, "b m"]:
        """All raw frequencies, then all phases. The camera is not looked at; z is a standard normal, not normalised."""
        return self.mapping_network.truncated(z, truncation_psi)

    def field(self, ws: Float[Tensor, "b m"]) -> Field:
        """The occupancy's logit (its sigmoid is the opacity of a sample, whatever its length) and colour in (0, 1)."""

        def ask(points: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
            logit, rgb = self.siren(points, directions, ws)
            return self.logit_gain * (logit + self.logit_bias), rgb

        return ask

    def prepare(self, ws: Tensor) -> Tensor:
        """Nothing is shared between views: ws."""
        return ws

    def synthesis(
        self, ws: Float[Tensor, "b m"], camera: Camera, resolution: int, patch: Patch | None = None
    ) -> Images:
        """Pictures of side `resolution`, or the patch's pixels of such pictures."""
        rays = picture_rays(camera, resolution, patch, self.bounds, self.pixel_grid)
        field, traces = self.field(ws), []

        def render(part: Rays) -> Rendering:
            seen, trace = self.trace(field, part)
            traces.append(trace)
            return seen

        if not torch.is_grad_enabled():
            render = partial(render_chunks, partial(self.render, field), chunk=RAYS_PER_CHUNK)
        seen = render(rays) if self.bounds.aabb is None else render_hits(render, rays, self.background)
        rgb, depth, opacity = as_pictures(seen, resolution if patch is None else patch.size)
        if self.training and traces:
            return SurfaceImages(rgb, rgb, depth, opacity, *traces)
        return Images(rgb, rgb, depth, opacity)

    def render(self, field: Field, rays: Rays) -> Rendering:
        return self.trace(field, rays)[0]

    def trace(self, field: Field, rays: Rays) -> tuple[Rendering, Trace]:
        """The rays' colours (sec. 3.3), and what the losses look at. Gradients reach the field through the samples that
        are shown, not through where they lie."""
        t, surface, hit = self.sample(field, rays)
        logits, rgb = query(field, rays, t)
        weights = weights_of(logits, self.last_back)
        weights = weights * (rays.far > rays.near)[..., None]  # a ray that misses the box has no length
        places = points_along(rays, surface[..., None])[..., 0, :]
        trace = Trace(rgb[..., 0] if self.release_compat else logits, places, hit)
        return accumulate(weights, rgb, t, self.background), trace

    @torch.no_grad()
    def sample(
        self, field: Field, rays: Rays
    ) -> tuple[Float[Tensor, "*b n s"], Float[Tensor, "*b n"], Bool[Tensor, "*b n"]]:
        """Distances of the samples to show, in order; the distance of the surface, and whether the ray meets it."""
        around_surface = int(self.step) >= self.surface_from_step
        t = spread(rays, self.coarse_samples, "offset" if self.training and not around_surface else "none")
        logits, _ = query(field, rays, t)
        surface, hit = rays.far, torch.zeros_like(rays.far, dtype=torch.bool)
        shown = t
        if around_surface:
            surface, hit = find_surface(field, rays, t, logits, self.secant_steps)
            near, far = RELEASED_RANGE if self.release_compat else (rays.near, rays.far)
            half = self.interval(int(self.step))
            low, high = limited_interval(surface, near, far, half, whole=~hit, shorten=not self.release_compat)
            shown = spread(Rays(rays.origins, rays.directions, low, high), self.surface_samples,
                           "offset" if self.training else "none")
        if self.fine_samples:
            shape = (*t.shape[:-1], self.fine_samples)
            u = torch.rand(shape, device=t.device, dtype=t.dtype) if self.training else even_quantiles(
                t.shape[:-1], self.fine_samples, t)
            middles = (t[..., 1:] + t[..., :-1]) / 2
            shown, _ = merge(shown, sample_pdf(middles, weights_of(logits)[..., 1:-1] + 1e-5, u))
        return shown, surface, hit

    def regularizers(
        self, ready: Tensor, camera: Camera, images: Images, step: int
    ) -> dict[str, Tensor]:
        """The opacity prior and the normals' smoothness (sec. 3.4)."""
        if not isinstance(images, SurfaceImages):
            return {}
        judged, surface, hit = images.trace
        losses = {"reg_opacity": self.opacity_weight(step) * opacity_prior(judged.sigmoid())}
        index = rays_that_hit(hit)
        if self.normal_weight and index.shape[-1]:
            points = surface.take_along_dim(index[..., None], -2)
            aside = points + self.normal_offset * F.normalize(torch.randn_like(points), dim=-1)
            normals = density_normals(self.field(ready), torch.stack([points, aside], -2), create_graph=True)
            one, other = normals.unbind(-1)[:2] if self.release_compat else normals.unbind(-2)
            valid = hit.gather(-1, index)
            losses["reg_normals"] = self.normal_weight * F.mse_loss(one[valid], other[valid])
        return losses

    def before_step(self, step: int) -> None:
        """The step says how long the interval is."""
        self.step.fill_(step)

    def cost(self, resolution: int) -> Cost:
        """Per ray the coarse samples, the secant's (which only rays that hit pay) and those shown; where gradients are
        wanted only the last are paid three times."""
        weight = self.siren.density_head.weight
        n, s = 4, self.coarse_samples  # the direction's product is paid per ray: count it shared by the coarse samples
        ws, z = weight.new_zeros(1, self.siren.num_modulations), weight.new_zeros(1, self.z_dim)
        ask, points = self.field(ws), weight.new_zeros(1, n, s, 3)
        flops = count_flops(lambda: ask(points, points[:, :, :1])) / (n * s)
        samples = self.coarse_samples + self.secant_steps + self.surface_samples + self.fine_samples
        return Cost(resolution**2, float(samples), flops, float(count_flops(lambda: self.mapping(z))))


def weights_of(logits: Float[Tensor, "*b s"], last_back: bool = False) -> Float[Tensor, "*b s"]:
    """Weight of each sample whose opacity is sigmoid(logit): sec. 3.2. As a density over a length of 1 it is softplus,
    since 1 − exp(−softplus(x)) = sigmoid(x)."""
    weights = composite(F.softplus(logits), torch.ones_like(logits))
    if last_back:
        weights = torch.cat([weights[..., :-1], weights[..., -1:] + 1 - weights.sum(-1, keepdim=True)], -1)
    return weights


def rays_that_hit(hit: Bool[Tensor, "b n"]) -> Int[Tensor, "b m"]:
    """The rays that hit come first; images that have fewer than the fullest are filled up with others."""
    return hit.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., : int(hit.sum(-1).max())]


def find_surface(
    field: Field, rays: Rays, t: Float[Tensor, "b n s"], logits: Float[Tensor, "b n s"], steps: int
) -> tuple[Float[Tensor, "b n"], Bool[Tensor, "b n"]]:
    """Where each ray first goes from outside (logit < 0) to inside, and whether it does; sec. 3.3.

    Between the two samples that enclose it the secant method takes `steps` steps, on rays that hit only. A ray whose
    first sample is inside does not hit: nobody knows where it entered. Its distance is far, as that of a miss.
    """
    inside = logits >= 0
    hit = inside.any(-1) & ~inside[..., 0]
    index = rays_that_hit(hit)
    if index.shape[-1] == 0:
        return rays.far, hit
    rays_hit = rays.select(index)
    behind = inside.to(torch.int8).argmax(-1).clamp(min=1).gather(-1, index)
    ends = torch.stack([behind - 1, behind], -1)
    low, high = t.take_along_dim(index[..., None], -2).gather(-1, ends).unbind(-1)
    below, above = logits.take_along_dim(index[..., None], -2).gather(-1, ends).unbind(-1)
    root = secant(low, high, below, above)
    for _ in range(steps):
        value = query(field, rays_hit, root[..., None])[0][..., 0]
        outside = value < 0
        low, high = torch.where(outside, root, low), torch.where(outside, high, root)
        below, above = torch.where(outside, value, below), torch.where(outside, above, value)
        root = secant(low, high, below, above)
    root = torch.where(hit.gather(-1, index), root, rays_hit.far)
    return rays.far.scatter(-1, index, root), hit


def secant(low: Tensor, high: Tensor, below: Tensor, above: Tensor) -> Tensor:
    """Where the straight line from (low, below < 0) to (high, above ≥ 0) is 0; rounding cannot lead out."""
    return torch.lerp(low, high, (below / (below - above)).clamp(0, 1))


def limited_interval(
    middle: Float[Tensor, "*b n"], near: Tensor | Number, far: Tensor | Number, half: Number, *,
    whole: Bool[Tensor, "*b n"], shorten: bool
) -> tuple[Float[Tensor, "*b n"], Float[Tensor, "*b n"]]:
    """middle ± half, moved as a block into [near, far]; all of [near, far] on the rays `whole`.

    Longer than [near, far] it is cut, or without `shorten` sticks out before near, as the released code has it.
    """
    near, far, length = (torch.as_tensor(x, device=middle.device).to(middle).expand_as(middle)
                         for x in (near, far, half))
    if shorten:
        length = torch.minimum(length, (far - near) / 2)
    middle = torch.minimum(torch.maximum(middle, near + length), far - length)
    return torch.where(whole, near, middle - length), torch.where(whole, far, middle + length)


def opacity_prior(opacity: Float[Tensor, "*b"]) -> Float[Tensor, ""]:
    """0 where all opacities are 0 or 1, 1.19 where they are ½. Sec. 3.4, after Neural Volumes (2019)."""
    return (torch.log(0.1 + opacity) + torch.log(1.1 - opacity)).mean() - math.log(0.1 * 1.1)


def convexity(depth: Float[Tensor, "b h w"]) -> Float[Tensor, " b"]:
    """How much nearer the middle of a picture is than its border, in scene units.

    Some runs find hollow faces, seen from inside (below 0): a mask looks the same from the front. They stay so, hence a
    run that is negative after some 2,000 steps is best started again with another seed, as the authors do.
    """
    h, w = depth.shape[-2:]
    middle = depth[:, h // 4 : h - h // 4, w // 4 : w - w // 4]
    border = (depth.sum((1, 2)) - middle.sum((1, 2))) / (h * w - middle[0].numel())
    return border - middle.mean((1, 2))


@torch.no_grad()
def weighted_variance(
    generator: GOF, ws: Float[Tensor, "b m"], camera: Camera, resolution: int, samples: int = 36
) -> Float[Tensor, " b"]:
    """How thin the surface is: mean over opaque rays of the variance of depth under the weights, times 10⁴; lower is
    thinner. The authors' score: 36 even samples, those well before the surface counted as empty, opacity above 0.99;
    mean over 1,000 objects at truncation 0.7. Not a number where no ray is opaque.
    """
    size = (resolution, resolution)
    rays = camera_rays(camera, full_grid(*size, device=ws.device), generator.bounds, size, generator.pixel_grid)
    t = spread(rays, samples)
    field = generator.field(ws)
    logits, _ = query(field, rays, t)
    surface, hit = find_surface(field, rays, t, logits, generator.secant_steps)
    surface = torch.where(hit, surface, (rays.near + rays.far) / 2)
    before = t <= (surface - generator.interval.first / 2)[..., None]
    weights = weights_of(logits.masked_fill(before, -torch.inf))
    opacity = weights.sum(-1)
    depth = (weights * t).sum(-1) / (opacity + 1e-5)
    variance = (weights * (t - depth[..., None]) ** 2).sum(-1) / (opacity + 1e-5) * samples / (samples - 1)
    opaque = (opacity > 0.99).to(variance)
    return 1e4 * (variance * opaque).sum(-1) / opaque.sum(-1)
