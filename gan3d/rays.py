"""Which rays: pixels to rays, the limits between which they are sampled, and GRAF's patches of pixels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gan3d.cameras import Camera, Number

PixelGrid = Literal["centre", "corner", "integer"]


@dataclass(frozen=True)
class Rays:
    """origins + t·directions, near ≤ t ≤ far. Directions are unit vectors, so t is a distance. far ≤ near: a miss."""

    origins: Float[Tensor, "*b n 3"]
    directions: Float[Tensor, "*b n 3"]
    near: Float[Tensor, "*b n"]
    far: Float[Tensor, "*b n"]

    def select(self, index: Tensor) -> "Rays":
        """Rays `index [*b m]` along n."""
        wide = index[..., None].expand(*index.shape, 3)
        return Rays(self.origins.gather(-2, wide), self.directions.gather(-2, wide),
                    self.near.gather(-1, index), self.far.gather(-1, index))

    def slice(self, start: int, stop: int) -> "Rays":
        return Rays(self.origins[..., start:stop, :], self.directions[..., start:stop, :],
                    self.near[..., start:stop], self.far[..., start:stop])


@dataclass(frozen=True)
class Bounds:
    """What the data fixes about space. Lengths are in scene units.

    Args:
        near, far: distances along the ray between which the scene lies.
        planar: near and far are planes across the optical axis (GRAF) instead of distances along each ray.
        aabb: [min corner, max corner]; rays are then limited to the box as well, and rays that miss it cost nothing.
        reference_radius: near and far hold for a camera at this distance from the origin; a nearer camera moves both
            by the difference, so that the sampled slab stays fixed in the world (GRAF with a range of radii).
        background: rgb in [0, 1] behind the scene; None leaves it to the model (black where nothing is).
    """

    near: Number
    far: Number
    planar: bool = False
    aabb: Sequence[Sequence[Number]] | None = None
    reference_radius: Number | None = None
    background: Sequence[Number] | None = None

    def __post_init__(self):
        if not 0 <= self.near < self.far:
            raise ValueError(f"bounds need 0 <= near < far, got near={self.near}, far={self.far}")
        if self.aabb is not None and not all(lo < hi for lo, hi in zip(*self.aabb, strict=True)):
            raise ValueError(f"bounds.aabb must be [min corner, max corner], got {self.aabb}")

    def limit(self, origins: Float[Tensor, "*b n 3"], directions: Float[Tensor, "*b n 3"],
              forward: Float[Tensor, "*b 3"]) -> Rays:
        """Rays with near and far. `forward` is the optical axis, used where the bounds are planar."""
        ones = torch.ones_like(origins[..., 0])
        near, far = self.near * ones, self.far * ones
        if self.reference_radius is not None:
            shift = self.reference_radius - origins.norm(dim=-1)
            near, far = near - shift, far - shift
        if self.planar:
            slant = 1 / (directions * forward[..., None, :]).sum(-1)
            near, far = near * slant, far * slant
        if self.aabb is not None:
            enter, leave = intersect_aabb(origins, directions, origins.new_tensor(self.aabb))
            near, far = torch.maximum(near, enter), torch.minimum(far, leave)
        return Rays(origins, directions, near, far)


def intersect_aabb(
    origins: Float[Tensor, "*b n 3"], directions: Float[Tensor, "*b n 3"], aabb: Float[Tensor, "2 3"]
) -> tuple[Float[Tensor, "*b n"], Float[Tensor, "*b n"]]:
    """Where each ray enters and leaves the box (slab test). leave ≤ enter: a miss; enter may lie behind the origin."""
    safe = torch.where(directions.abs() < 1e-9, torch.full_like(directions, 1e-9), directions)  # no 0·inf
    to_low, to_high = (aabb[0] - origins) / safe, (aabb[1] - origins) / safe
    return torch.minimum(to_low, to_high).amax(-1), torch.maximum(to_low, to_high).amin(-1)


def image_coordinates(index: Tensor, size: int, grid: PixelGrid) -> Tensor:
    """Image coordinate in [0, 1] of pixel `index` (continuous) in a row of `size` pixels.

    centre: (i + ½)/W, the house's default; corner: i/(W−1), outermost pixels on the image's edge (π-GAN);
    integer: i/W (NeRF, GRAF).
    """
    if grid == "centre":
        return (index + 0.5) / size
    if grid == "corner":
        return index / max(size - 1, 1)
    if grid == "integer":
        return index / size
    raise ValueError(f"pixel grid must be 'centre', 'corner' or 'integer', got {grid!r}")


def full_grid(height: int, width: int, device=None) -> Float[Tensor, "n 2"]:
    """Indices (column, row) of all pixels, row by row."""
    rows, columns = torch.meshgrid(torch.arange(height, device=device, dtype=torch.float32),
                                   torch.arange(width, device=device, dtype=torch.float32), indexing="ij")
    return torch.stack([columns, rows], dim=-1).reshape(-1, 2)


def camera_rays(
    camera: Camera, pixels: Float[Tensor, "#*b n 2"], bounds: Bounds, size: tuple[int, int], grid: PixelGrid = "centre"
) -> Rays:
    """Rays through `pixels` (continuous column and row indices) of an image of `size` (height, width)."""
    height, width = size
    x = image_coordinates(pixels[..., 0], width, grid)
    y = image_coordinates(pixels[..., 1], height, grid)
    fx, fy = camera.intrinsics[..., 0, 0, None], camera.intrinsics[..., 1, 1, None]
    skew, cx, cy = (camera.intrinsics[..., i, j, None] for i, j in ((0, 1), (0, 2), (1, 2)))
    down = (y - cy) / fy
    right = (x - cx - skew * down) / fx
    local = torch.stack([right, down.expand_as(right), torch.ones_like(right)], dim=-1)
    rotation = camera.camera_to_world[..., :3, :3]
    with torch.autocast(local.device.type, enabled=False):  # half a pixel is beyond bfloat16
        directions = torch.nn.functional.normalize(local @ rotation.transpose(-1, -2), dim=-1)
    origins = camera.position[..., None, :].expand_as(directions)
    return bounds.limit(origins, directions, rotation[..., :, 2])


class Patch(NamedTuple):
    """A K×K grid of pixels stretched over part of the image, in units of its half-width (GRAF, sec. 3.2)."""

    scale: Tensor  # [b], 1 covers the image
    offset: Tensor  # [b 2], x and y of the centre
    size: int

    def grid(self) -> Float[Tensor, "b k k 2"]:
        """Coordinates (x, y) in [−1, 1], where ±1 are the centres of the outermost pixels."""
        line = torch.linspace(-1, 1, self.size, device=self.scale.device)
        rows, columns = torch.meshgrid(line, line, indexing="ij")
        return torch.stack([columns, rows], dim=-1) * self.scale[:, None, None, None] + self.offset[:, None, None, :]

    def pixels(self, height: int, width: int) -> Float[Tensor, "b n 2"]:
        """Continuous pixel indices of the grid, row by row."""
        grid = (self.grid().flatten(1, 2) + 1) / 2
        return grid * grid.new_tensor([width - 1, height - 1])

    def crop(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c k k"]:
        """The same grid of pixels out of photographs, bilinear, without antialiasing (as GRAF samples both sides)."""
        return torch.nn.functional.grid_sample(images, self.grid(), mode="bilinear", align_corners=True)


@dataclass(frozen=True)
class PatchSampler:
    """GRAF's patches: scale ~ U(lowest(step), 1), offset anywhere that keeps the patch inside the image.

    lowest(step) = min(0.9, max(min_scale, exp(−3·annealing·⌊step/interval⌋))): large views first, details
    later (sec. 3.2). The authors' interval is 1000 steps.
    """

    size: int
    min_scale: Number
    annealing: Number
    interval: int = 1000

    def lowest(self, step: int) -> Number:
        return min(0.9, max(self.min_scale, math.exp(-3 * self.annealing * (step // self.interval))))

    def sample(self, n: int, step: int, device=None) -> Patch:
        lowest = self.lowest(step)
        scale = lowest + (1 - lowest) * torch.rand(n, device=device)
        offset = (1 - scale)[:, None] * (2 * torch.rand(n, 2, device=device) - 1)
        return Patch(scale, offset, self.size)


def picture_rays(
    camera: Camera, resolution: int, patch: Patch | None, bounds: Bounds, grid: PixelGrid = "centre"
) -> Rays:
    """Rays through all pixels of pictures of side `resolution`, row by row, or through the patch's pixels of them."""
    size = (resolution, resolution)
    pixels = full_grid(*size, device=camera.position.device) if patch is None else patch.pixels(*size)
    return camera_rays(camera, pixels, bounds, size, grid)
