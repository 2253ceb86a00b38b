"""VoxGRAF: Fast 3D-Aware Image Synthesis with Sparse Voxel Grids (Schwarz et al., NeurIPS 2022). arXiv 2206.07695

z, camera → mappings → ws → 3D StyleGAN2 → voxels, pruned as they get finer → rays through them at the picture's full
resolution → over a background that a small StyleGAN2 paints → three layers that refine the picture.

No network is asked along the rays: a sample is a look-up of eight voxels, and empty space is skipped. The paper grows
grid and picture in stages, each a new network that begins with the last one's weights; here one network has all blocks,
uses as many as the stage's sides need, and the unused ones wait. What is pruned depends on who looks: in training the
camera of the picture decides, so that `prepare` leaves ws as they are; otherwise the union of `views`, cameras that
training has lately used, and a grid serves all views of an identity.

Departures: the refinement's weights go on from stage to stage, where the release starts new ones. Lengths that the
release states for one scale of the world (density, variance of depth) are in units of half the cube's side.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

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
from gan3d.nn.stylegan2 import Mapping as MappingNetwork
from gan3d.nn.stylegan2 import StyleGAN2Discriminator, SynthesisBlock, channels_at, resolutions
from gan3d.nn.stylegan2_3d import Synthesis3d
from gan3d.nn.stylegan3 import Refinement
from gan3d.ops import Pruned, Voxels
from gan3d.ramps import Ramp
from gan3d.rays import Bounds, Patch, Rays, camera_rays, full_grid
from gan3d.rendering import Field, render_chunks
from gan3d.volume import Rendering

POSE_DIM = 12  # numbers of a pose as networks are told of it: the first three rows of camera_to_world
SH0 = 0.28209479177387814  # the constant spherical harmonic, by which colours are multiplied
FEWEST, MOST = 10, 0.7  # pruning leaves at least so many voxels, and at most this share of all; released code
DARK = 1e-7  # samples that less light reaches are not seen; released code
EVERY = 1 << 30  # larger than any picture
FAR = 1e6  # beyond anything: the cube alone limits the rays
MARGIN = 4  # voxels around the grid in which rays are marched: samples on its faces lie safely inside
RAYS_PER_CHUNK = 1 << 14  # per image, where no gradients are wanted
T = TypeVar("T")


class Grid(NamedTuple):
    """Identities ready to be seen: an entry of each list for every one."""

    ws: Tensor  # [b l d]
    voxels: list[Voxels]
    values: list[Tensor]  # [rows 4]: raw rgb; raw density, per scene unit
    words: list[Tensor]  # bits of the cells where the density may be positive, MARGIN voxels added to each side
    backgrounds: dict[int, Tensor]  # [b 3 side side] in [−1, 1]; empty: there is none


@dataclass(frozen=True)
class VoxelImages(Images):
    """Pictures to be trained on."""

    variance: Tensor  # [b h w], of the depth under the weights, in units of half the cube's side, squared
    grid: Grid

    @property
    def scalars(self) -> dict[str, Tensor]:
        """The shares of a picture that are covered, and of the voxels that are left."""
        left = sum(len(values) for values in self.grid.values) / len(self.grid.values)
        return {"coverage": self.opacity.mean().detach(),
                "voxels": self.opacity.new_tensor(left / math.prod(self.grid.voxels[0].resolution))}


class Background(nn.Module):
    """A StyleGAN2 without noise; all its resolutions are pictures. Sec. 3.2."""

    def __init__(self, *, w_dim: int, resolution: int, channel_base: int, channel_max: int, channel_min: int,
                 clamp: Number | None):
        super().__init__()
        self.resolutions = resolutions(resolution)
        before = 0
        for r in self.resolutions:
            width = channels_at(r, channel_base, channel_max, channel_min)
            setattr(self, f"b{r}", SynthesisBlock(before, width, w_dim=w_dim, resolution=r, image_channels=3,
                                                  clamp=clamp, noise=False))
            before = width
        self.num_ws = 2 * len(self.resolutions)

    def forward(self, ws: Float[Tensor, "b l d"], side: int) -> dict[int, Tensor]:
        """The pictures of sides up to the first that is at least `side`, or all."""
        pictures: dict[int, Tensor] = {}
        x = image = None
        for i, r in enumerate(self.resolutions):
            block, first = getattr(self, f"b{r}"), max(2 * i - 1, 0)
            x, image = block(x, image, ws[:, first:first + block.num_conv + 1], "none")
            pictures[r] = image.float()
            if r >= side:
                break
        return pictures


class VoxGRAF(nn.Module):
    """The generator.

    Args:
        bounds: its `background` is behind the voxels; white where it has none, as released. Near, far and box do not
            count: rays are limited by the cube alone.
        radius, centre: half the side, and the middle, of the cube that the voxels fill, in scene units.
        z_dim, w_dim, mapping_depth: of both mappings, of foreground and background; they share z.
        grid_resolution: the grid's side, or a schedule {step: side} by which it grows.
        dense_resolution, channel_base, channel_max, channel_min: see `gan3d.nn.stylegan2_3d`.
        clamp: of all convolutions (256: the release, also where it computes in float32).
        density_gain: a raw density of 1 takes so much light over half the cube's side, as an exponent (the release: 30
            a scene unit).
        density_noise: standard deviation of the noise that training adds to raw densities.
        background: a `Background`, or None.
        refinement: a `Refinement`, or None.
        swap: in training, the probability that the mapping sees another camera of the batch than the one rendered.
        views: how many cameras are kept to prune by. Before there are any, all count as seen.
        regularize_from: the losses below begin at this step. All are means over pictures.
        coverage_weight, least_foreground, least_background: the foreground's share of a picture, and the rest, should
            not be smaller.
        depth_variance_weight: by the step, {step: weight}, of the variance of depth under the weights, summed over a
            picture's covered pixels; where it is below the square of 3 half voxels there is no gradient.
        sparsity_weight, sparsity_scale: of Σ log(1 + scale·density²) over the voxels, as in Plenoxels; the density per
            half the cube's side.
        total_variation_weight: of the mean over voxels of the density's gradient (raw, a voxel).
    """

    views: Tensor
    progress: Tensor
    cube: Tensor

    def __init__(
        self,
        *,
        bounds: Bounds,
        radius: Number,
        centre: tuple[Number, Number, Number] | list[Number],
        z_dim: int,
        w_dim: int,
        mapping_depth: int,
        grid_resolution: int | Mapping[int, int],
        dense_resolution: int,
        channel_base: int,
        channel_max: int,
        channel_min: int,
        density_gain: Number,
        density_noise: Ramp,
        background: Background | None,
        refinement: Refinement | None,
        swap: Ramp,
        views: int,
        regularize_from: int,
        coverage_weight: Number,
        least_foreground: Number,
        least_background: Number,
        depth_variance_weight: Number | Mapping[int, Number],
        sparsity_weight: Number,
        sparsity_scale: Number,
        total_variation_weight: Number,
        clamp: Number | None = None,
    ):
        super().__init__()
        corners = [[c - radius for c in centre], [c + radius for c in centre]]
        self.bounds = Bounds(near=0, far=FAR, aabb=corners, background=bounds.background)
        self.radius, self.z_dim = radius, z_dim
        self.grid_schedule, self.density_noise, self.swap_schedule = grid_resolution, density_noise, swap
        self.density_gain = density_gain / radius  # per scene unit
        self.regularize_from, self.coverage_weight = regularize_from, coverage_weight
        self.least_foreground, self.least_background = least_foreground, least_background
        self.depth_variance_weight, self.total_variation_weight = depth_variance_weight, total_variation_weight
        self.sparsity_weight, self.sparsity_scale = sparsity_weight, sparsity_scale
        sides = grid_resolution.values() if isinstance(grid_resolution, Mapping) else [grid_resolution]
        self.foreground = Synthesis3d(
            w_dim=w_dim, resolution=max(sides), dense_resolution=dense_resolution, channels=4, clamp=clamp,
            channel_base=channel_base, channel_max=channel_max, channel_min=channel_min)
        self.background, self.refinement = background, refinement
        common = {"z_dim": z_dim, "w_dim": w_dim, "depth": mapping_depth}
        self.mappings = nn.ModuleDict({"fg": MappingNetwork(c_dim=POSE_DIM, num_ws=self.foreground.num_ws, **common)})
        if background is not None:
            self.mappings["bg"] = MappingNetwork(c_dim=0, num_ws=background.num_ws, **common)
        self.register_buffer("views", torch.zeros(views, CONDITION_DIM))  # rows of zeros: not seen yet
        self.register_buffer("progress", torch.zeros((), dtype=torch.long))  # steps trained: what schedules hang on
        self.register_buffer("cube", torch.tensor(corners, dtype=torch.float32), persistent=False)
        behind = [1.0, 1.0, 1.0] if bounds.background is None else list(bounds.background)
        self.register_buffer("behind", torch.tensor(behind, dtype=torch.float32), persistent=False)

    def mapping(self, z: Float[Tensor, "b z"], camera_condition: Camera | None = None, truncation_psi: Number = 1.0
                ) -> Float[Tensor, "b l w"]:
        """ws of the foreground, then of the background. Without a camera, zeros take its place."""
        c = z.new_zeros(len(z), POSE_DIM)
        if camera_condition is not None:
            c = pose_of(camera_condition).to(z).expand(len(z), -1)
        if self.training:
            swapped = torch.rand(len(z), 1, device=z.device) < self.swap_schedule(int(self.progress))
            c = torch.where(swapped, c.roll(1, 0), c)
        return torch.cat([network(z, c, truncation_psi) for network in self.mappings.values()], dim=1)

    @property
    def grid_resolution(self) -> int:
        return at(self.grid_schedule, int(self.progress))

    # The voxels

    def prepare(self, ws: Float[Tensor, "b l w"]) -> Float[Tensor, "b l w"] | Grid:
        """The voxels of these identities, for any camera; while training ws itself, since the camera prunes."""
        if self.training:
            return ws
        return self.grid(ws, [self.lately_used()] * len(ws), side=EVERY)

    def lately_used(self) -> Camera:
        """The cameras in `views`, as many as there are by now."""
        known = self.views[self.views.any(dim=1)]
        return Camera(known[:, :16].unflatten(1, (4, 4)), known[:, 16:].unflatten(1, (3, 3)))

    def grid(self, ws: Float[Tensor, "b l w"], cameras: list[Camera], *, side: int, prune_last: bool = False
             ) -> Grid:
        """The voxels that identity i shows to any of `cameras[i]`, and the backgrounds up to a side of at least `side`.

        prune_last: also prune after the last block, as the release does outside training. Nothing grows from it any
            more, so this saves memory alone, and costs light where more than 70% of all voxels would stay.
        """
        count = self.foreground.num_ws

        def prune(i: int, voxels: Voxels, density: Tensor) -> Pruned:
            return self.prune(voxels, density.detach(), cameras[i])

        pattern, joined = self.foreground(ws[:, :count], self.grid_resolution, prune, prune_last)
        density = joined[:, 3]
        if self.training:
            density = density + torch.randn_like(density) * self.density_noise(int(self.progress))
        joined = torch.cat([joined[:, :3], density[:, None] * self.density_gain], dim=1)
        values = list(joined.split(pattern.rows))
        words = [occupied_words(*pair) for pair in zip(pattern.grids, values, strict=True)]
        behind = {} if self.background is None else self.background(ws[:, count:], side)
        return Grid(ws, pattern.grids, values, words, behind)

    @torch.no_grad()
    def prune(self, voxels: Voxels, density: Float[Tensor, " rows"], cameras: Camera) -> Pruned:
        """Keeps what is dense and seen, with the voxels around: sec. 3.1. A picture for this is as wide as the grid.

        Densities are the raw ones, as released: they hide less than those that are shown, so more is kept.
        """
        side = voxels.resolution[0]
        seen = density > 0
        if len(cameras.camera_to_world):
            rays = camera_rays(cameras, full_grid(side, side, device=density.device), self.bounds, (side, side))
            words = occupied_words(voxels, density[:, None])
            each = zip(rays.origins, rays.directions, rays.near, rays.far, strict=True)
            seen &= sum(self.light(voxels, density, words, Rays(*camera)) for camera in each) > 0
        score = density * seen
        kept = ops.prune(voxels, score, torch.finfo(score.dtype).tiny, dilate=1)
        most = round(MOST * side**3)
        if FEWEST < len(kept.new_to_old) <= most:
            return kept
        few = len(kept.new_to_old) <= FEWEST
        if not few:  # only what would be kept competes
            score = score.masked_fill(kept.old_to_new < 0, -torch.inf)
        best = torch.zeros_like(score).index_fill(0, score.topk(FEWEST if few else most, sorted=False).indices, 1)
        return ops.prune(voxels, best, 0.5)

    def light(self, voxels: Voxels, density: Float[Tensor, " rows"], words: Tensor, rays: Rays
              ) -> Float[Tensor, " rows"]:
        """What the rays' samples take out of their light, each shared among the eight voxels around it."""
        samples, points = self.walk(voxels, words, rays)
        with torch.enable_grad():
            table = density[:, None].detach().requires_grad_()
            raw = self.look_up(voxels, table, points)
            weights = ops.composite_packed(raw[:, 0].detach().relu(), samples.delta, raw.detach(), samples.t,
                                           samples.offsets, threshold=DARK).weights
            return torch.autograd.grad(raw[:, 0], table, weights)[0][:, 0]

    def field(self, ws: Tensor | Grid) -> Field:
        """Raw density (its positive part is the density) and colour; nothing outside the cube."""
        grid = ws if isinstance(ws, Grid) else self.grid(ws, [self.lately_used()] * len(ws), side=0)

        def ask(points: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
            inside = ((points >= self.cube[0]) & (points <= self.cube[1])).all(-1)
            raw = torch.stack([self.look_up(voxels, values, place) for voxels, values, place in
                               zip(grid.voxels, grid.values, points, strict=True)])
            return raw[..., 3] * inside, (SH0 * raw[..., :3] + 0.5).clamp(0, 1)

        return ask

    def look_up(self, voxels: Voxels, values: Float[Tensor, "rows c"], points: Float[Tensor, "*b 3"]
                ) -> Float[Tensor, "*b c"]:
        place = ops.voxel_coordinates(points, self.cube, voxels.resolution, align_corners=False)
        return ops.sparse_sample(voxels, values, place)

    # The pictures

    def synthesis(self, ws: Tensor | Grid, camera: Camera, resolution: int, patch: Patch | None = None) -> Images:
        """Pictures of side `resolution`; `raw` is not refined. Raises: ValueError for a patch.

        Backgrounds have sides of powers of two; for other pictures the next larger one is made smaller.
        """
        if patch is not None:
            raise ValueError("VoxGRAF draws whole pictures: set model.patch=null")
        if isinstance(ws, Grid):
            ready = ws
        elif self.training:
            self.remember(camera)
            own = [Camera(*(values[i:i + 1] for values in camera)) for i in range(len(ws))]
            ready = self.grid(ws, own, side=resolution)
        else:
            ready = self.grid(ws, [self.lately_used()] * len(ws), side=resolution)
        with torch.autocast(ready.ws.device.type, enabled=False):  # distances need float32
            seen = self.render(ready, camera, resolution)
        rgb, variance = seen.features.mT.unflatten(-1, (resolution, resolution)).split([3, 1], dim=1)
        depth, opacity = (x.unflatten(-1, (resolution, resolution)) for x in (seen.depth, seen.opacity))
        raw = 2 * over(rgb, opacity, ready.backgrounds) - 1
        rgb = raw
        if self.refinement is not None:
            rgb = self.refinement(raw, ready.ws[:, self.foreground.num_ws - 1]).float()
        if self.training:
            return VoxelImages(rgb, raw, depth, opacity, variance[:, 0] / self.radius**2, ready)
        return Images(rgb, raw, depth, opacity)

    def remember(self, camera: Camera) -> None:
        """The latest cameras come first."""
        latest = condition(camera).detach().to(self.views)
        self.views.copy_(torch.cat([latest, self.views])[: len(self.views)])

    def render(self, grid: Grid, camera: Camera, resolution: int) -> Rendering:
        """Features: rgb in [0, 1], and the variance of depth in scene units, squared."""
        pixels = full_grid(resolution, resolution, device=self.cube.device)
        rays = camera_rays(camera, pixels, self.bounds, (resolution, resolution))
        parts = []
        for i, (voxels, values, words) in enumerate(zip(grid.voxels, grid.values, grid.words, strict=True)):
            def march(part: Rays, voxels=voxels, values=values, words=words) -> Rendering:
                return self.march(voxels, values, words, part)

            one = Rays(rays.origins[i], rays.directions[i], rays.near[i], rays.far[i])
            parts.append(march(one) if torch.is_grad_enabled() else render_chunks(march, one, RAYS_PER_CHUNK))
        return Rendering(*(torch.stack(x) for x in zip(*((p.features, p.depth, p.opacity) for p in parts),
                                                       strict=True)))

    def walk(self, voxels: Voxels, words: Tensor, rays: Rays) -> tuple[ops.Samples, Float[Tensor, "s 3"]]:
        """Places every half voxel from where a ray enters the cube, but for those around which nothing is dense."""
        side = voxels.resolution[0]
        step = self.radius / side
        margin = 2 * step * MARGIN * self.cube.new_tensor([[-1.0], [1.0]])
        samples = ops.march(rays.origins, rays.directions, rays.near.clamp(min=0) - step / 2, rays.far, words,
                            self.cube + margin, (side + 2 * MARGIN,) * 3, step, max_samples=8 * side)
        ray = samples.ray_index.long()
        return samples, rays.origins[ray] + samples.t[:, None] * rays.directions[ray]

    def march(self, voxels: Voxels, values: Float[Tensor, "rows 4"], words: Tensor, rays: Rays) -> Rendering:
        """Raw values are interpolated, then activated ("post-activation", sec. 3.1), then composited."""
        samples, points = self.walk(voxels, words, rays)
        seen = self.composite(voxels, values, samples, points)
        ray, opacity = samples.ray_index.long(), seen.opacity.clamp(min=1e-10)
        apart = (samples.t - (seen.depth / opacity)[ray]).square()
        variance = torch.zeros_like(opacity).index_add(0, ray, seen.weights * apart) / opacity
        return Rendering(torch.cat([seen.features, variance[:, None]], 1), seen.depth, seen.opacity)

    def composite(self, voxels: Voxels, values: Float[Tensor, "rows 4"], samples: ops.Samples, points: Tensor
                  ) -> ops.Composite:
        raw = self.look_up(voxels, values, points)
        return ops.composite_packed(raw[:, 3].relu(), samples.delta, (SH0 * raw[:, :3] + 0.5).relu(), samples.t,
                                    samples.offsets, self.behind, threshold=DARK)

    # Losses and schedules

    def regularizers(self, ready: Tensor, camera: Camera, images: Images, step: int) -> dict[str, Tensor]:
        """Coverage and thin surfaces (sec. 3.3), sparse and smooth densities."""
        if step < self.regularize_from or not isinstance(images, VoxelImages):
            return {}
        grid, losses = images.grid, {}
        side, b = grid.voxels[0].resolution[0], len(grid.voxels)
        if self.coverage_weight:
            covered = images.opacity.mean((1, 2))
            missing = (self.least_foreground - covered).relu() + (self.least_background - (1 - covered)).relu()
            losses["reg_coverage"] = self.coverage_weight * missing.mean()
        if weight := at(self.depth_variance_weight, step):
            thick = images.variance.clamp(min=(3 / side) ** 2) * images.opacity.detach()
            losses["reg_depth_variance"] = weight * thick.sum((1, 2)).mean()
        if self.sparsity_weight:
            density = torch.cat(grid.values)[:, 3].relu() * self.radius
            cost = torch.log1p(self.sparsity_scale * density.square()).sum() / b
            losses["reg_sparsity"] = self.sparsity_weight * cost
        if self.total_variation_weight:
            each = [total_variation(v, x[:, 3] / self.density_gain)
                    for v, x in zip(grid.voxels, grid.values, strict=True)]
            losses["reg_total_variation"] = self.total_variation_weight * torch.stack(each).mean()
        return losses

    def before_step(self, step: int) -> None:
        self.progress.fill_(step)

    @torch.no_grad()
    def cost(self, resolution: int) -> Cost:
        """Per sample: eight voxels, and its share of the ray. Fixed: mappings, voxels, background, refinement.

        Samples are counted through the latest of `views`; before there is one, they are all of the cube's diameter.
        """
        if self.training:  # mappings would take these latents into their means
            return copy.deepcopy(self).eval().cost(resolution)
        z, cameras = self.cube.new_zeros(1, self.z_dim), self.lately_used()

        def make() -> Grid:
            return self.grid(self.mapping(z), [cameras], side=resolution)

        grid, n = make(), 64
        samples = 2.0 * self.grid_resolution
        if len(cameras.camera_to_world):
            latest, pixels = Camera(*(v[:1] for v in cameras)), full_grid(resolution, resolution, device=z.device)
            rays = camera_rays(latest, pixels, self.bounds, (resolution, resolution))
            taken, _ = self.walk(grid.voxels[0], grid.words[0],
                                 Rays(rays.origins[0], rays.directions[0], rays.near[0], rays.far[0]))
            samples = len(taken.t) / resolution**2
        ends, index = torch.tensor([0, n], dtype=torch.int32), torch.zeros(n, dtype=torch.int32)
        some = ops.Samples(ends.to(z.device), index.to(z.device), z.new_zeros(n), z.new_ones(n))
        flops = count_flops(lambda: self.composite(grid.voxels[0], grid.values[0], some, z.new_zeros(n, 3))) / n
        fixed = count_flops(make)
        if (refine := self.refinement) is not None:
            picture = z.new_zeros(1, 3, resolution, resolution)
            fixed += count_flops(lambda: refine(picture, grid.ws[:, self.foreground.num_ws - 1]))
        return Cost(resolution**2, samples, flops, float(fixed))


def at(schedule: T | Mapping[int, T], step: int) -> T:
    """What a schedule {step: value}, or a value, says of this step."""
    if not isinstance(schedule, Mapping):
        return schedule
    return schedule[max(start for start in schedule if start <= step)]


def pose_of(camera: Camera) -> Float[Tensor, "b 12"]:
    return camera.camera_to_world[..., :3, :].flatten(-2)


@torch.no_grad()
def occupied_words(voxels: Voxels, values: Float[Tensor, "rows c"]) -> Tensor:
    """Cells in which an interpolation may find a positive density (the last channel), for `ops.march`."""
    density = ops.scatter_voxels(values[:, -1:], voxels)[..., 0]
    return ops.prune_dense(F.pad(density, (MARGIN,) * 6), torch.finfo(density.dtype).tiny, dilate=1).words


def over(rgb: Float[Tensor, "b 3 h h"], opacity: Float[Tensor, "b h h"], backgrounds: dict[int, Tensor]
         ) -> Float[Tensor, "b 3 h h"]:
    """The foreground in front of the background, in [0, 1]. As released the foreground, which is before white already,
    is multiplied by its opacity: edges are lighter than they should be."""
    if not backgrounds:
        return rgb
    side = rgb.shape[-1]
    enough = [r for r in backgrounds if r >= side] or [max(backgrounds)]
    behind = resize(backgrounds[min(enough)], side) / 2 + 0.5
    return opacity[:, None] * rgb + (1 - opacity)[:, None] * behind


def total_variation(voxels: Voxels, density: Float[Tensor, " rows"]) -> Float[Tensor, ""]:
    """Mean over voxels of the length of the difference to the next along x, y and z; missing ones are 0. Plenoxels."""
    after = ops.neighbours(voxels)[:, [22, 16, 14]].long()
    other = torch.where(after >= 0, density[after.clamp(min=0)], 0.0)
    return ((other - density[:, None]).square().sum(-1) + 1e-9).sqrt().mean()


class VoxGRAFDiscriminator(StyleGAN2Discriminator):
    """StyleGAN2's with skips, which is told the camera. A picture of a lower side enters at the block of its size.

    So a stage begins with the last one's weights and one new block, as the release's next network does.
    """

    needs_camera = True  # of photographs, too: data without cameras stops before any work

    def __init__(self, *, resolution: int, channel_base: int, channel_max: int, mapping_depth: int, group: int,
                 clamp: Number | None = None):
        super().__init__(resolution=resolution, image_channels=3, c_dim=POSE_DIM, architecture="skip", group=group,
                         channel_base=channel_base, channel_max=channel_max, mapping_depth=mapping_depth, clamp=clamp)

    def forward(self, images: Float[Tensor, "b 3 r r"], fade: float = 1.0, camera: Camera | None = None,
                raw: Tensor | None = None) -> Verdict:
        """Raises: ValueError without a camera, or for a side that is no power of 2 from 8 to `resolution`."""
        if camera is None:
            raise ValueError("VoxGRAF's discriminator must know the camera of every photograph, and this data set has "
                             "none: give it a dataset.json, or choose a model that needs no poses (graf, pigan)")
        if images.shape[-1] not in self.resolutions:
            raise ValueError(f"the discriminator sees pictures of sides {self.resolutions}, not {images.shape[-1]}")
        x: Tensor | None = None
        rest: Tensor | None = images.contiguous(memory_format=torch.channels_last)
        for r in self.resolutions[self.resolutions.index(images.shape[-1]):]:
            x, rest = getattr(self, f"b{r}")(x, rest)
        return Verdict(self.b4(x, rest, self.mapping(None, pose_of(camera).to(images))))
