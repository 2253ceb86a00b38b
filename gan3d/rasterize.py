"""Triangles to pixels: the nearest triangle of a mesh in every pixel of a pinhole camera, in plain PyTorch.

A pixel is where its ray meets the mesh. A ray d from the camera meets the triangle of corners a, b, c (relative to the
camera) inside where d·(b×c), d·(c×a) and d·(a×b) have the sign of a·(b×c); their shares of the sum are the barycentric
coordinates, in space, not in the picture. Nothing is divided by a depth, so triangles may reach behind the camera.
Olano and Greer, Triangle scan conversion using 2D homogeneous coordinates (1997).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gan3d.cameras import Camera
from gan3d.rays import Bounds, PixelGrid, camera_rays, full_grid, image_coordinates

PAIRS_PER_CALL = 1 << 20  # of a triangle and a pixel, tried at once: about 200 MB
NO_HIT = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Hits:
    """What each pixel sees of a mesh. Where it sees nothing: triangle −1, the rest 0."""

    triangle: Int[Tensor, "h w"]
    barycentrics: Float[Tensor, "h w 3"]  # of the triangle's corners, in their order; float64
    t: Float[Tensor, "h w"]  # distance from the camera, scene units; float64

    def interpolate(self, faces: Int[Tensor, "f 3"], values: Float[Tensor, "v c"]) -> Float[Tensor, "h w c"]:
        """Values at the vertices, linear over each triangle in space."""
        corners = values[faces[self.triangle.clamp_min(0)]]
        return (self.barycentrics[..., None].to(values) * corners).sum(-2)


def rasterize(
    vertices: Float[Tensor, "v 3"], faces: Int[Tensor, "f 3"], camera: Camera, size: tuple[int, int], bounds: Bounds,
    pixel_grid: PixelGrid = "centre", front_only: bool = False,
) -> Hits:
    """The nearest triangle of each pixel, between near and far of its ray.

    A ray through an edge that two triangles share meets exactly one of them, through a corner exactly one of the fan.
    Of triangles at one distance (in float32) the first counts. Computed in float64; memory does not grow with the
    number or the size of triangles beyond PAIRS_PER_CALL and a few numbers a triangle. Not differentiable.

    Args:
        camera: one, without a batch axis.
        size: height, width of the picture.
        front_only: triangles whose corners appear clockwise are not seen.
    """
    camera = Camera(camera.camera_to_world.double(), camera.intrinsics.double())
    rays = camera_rays(camera, full_grid(*size, device=vertices.device), bounds, size, pixel_grid)
    corners = (vertices.double() - camera.position)[faces]
    edges, volume = _edges(corners)
    window = _windows(corners, camera, size, pixel_grid)
    facing = volume != 0 if not front_only else volume < 0
    shown = (facing & (window[:, 2:] > 0).all(-1)).nonzero()[:, 0]
    edges, volume, window = edges[shown] * volume[shown, None, None].sign(), volume[shown].abs(), window[shown]
    owns, counts = _positive(edges), window[:, 2] * window[:, 3]
    ends, nearest = counts.cumsum(0), torch.full((len(rays.near),), NO_HIT, device=vertices.device)
    for start in range(0, int(counts.sum()), PAIRS_PER_CALL):
        pair = torch.arange(start, min(start + PAIRS_PER_CALL, int(ends[-1])), device=vertices.device)
        row = torch.searchsorted(ends, pair, right=True)
        top, left, _, width = window[row].unbind(-1)
        place = pair - (ends - counts)[row]
        pixel = (top + place // width) * size[1] + left + place % width
        inside = (edges[row] * rays.directions[pixel, None]).sum(-1)
        t = volume[row] / inside.sum(-1)
        met = ((inside > 0) | ((inside == 0) & owns[row])).all(-1) & (rays.near[pixel] <= t) & (t <= rays.far[pixel])
        # positive floats are ordered as their bits are: distance first, then the triangle's number
        key = t[met].float().view(torch.int32).long() << 32 | shown[row[met]]
        nearest.scatter_reduce_(0, pixel[met], key, "amin")
    return _hits(nearest, corners, rays.directions, size)


def _edges(corners: Float[Tensor, "f 3 3"]) -> tuple[Float[Tensor, "f 3 3"], Float[Tensor, " f"]]:
    """Normals of the planes through the camera and the side opposite each corner, and a·(b×c): negative for triangles
    that appear counter-clockwise.

    Written out, so that no product and sum are fused: a×b is then exactly −(b×a), and the triangles on both sides of an
    edge agree on which side of it a ray passes.
    """
    first, second = corners[:, [1, 2, 0]], corners[:, [2, 0, 1]]
    ahead, behind = [1, 2, 0], [2, 0, 1]
    left, right = first[..., ahead] * second[..., behind], first[..., behind] * second[..., ahead]
    edges = left - right
    return edges, (corners[:, 0] * edges[:, 0]).sum(-1)


def _positive(edges: Float[Tensor, "f 3 3"]) -> Bool[Tensor, "f 3"]:
    """Which sides keep the rays that run exactly along them: of two opposite planes one, the same for all sides, as if
    every ray were moved a little to x, and less to y, and less to z."""
    x, y, z = edges.unbind(-1)
    return torch.where(x != 0, x > 0, torch.where(y != 0, y > 0, z > 0))


def _windows(
    corners: Float[Tensor, "f 3 3"], camera: Camera, size: tuple[int, int], pixel_grid: PixelGrid
) -> Int[Tensor, "f 4"]:
    """Top, left, height and width, in pixels, of a rectangle around each triangle; the whole picture for those that
    reach behind the camera, height 0 for those that lie there."""
    image = corners @ camera.camera_to_world[:3, :3] @ camera.intrinsics.T
    depth = image[..., 2]
    ahead = depth > 0
    limits = []
    for axis, pixels in ((1, size[0]), (0, size[1])):
        first, second = (image_coordinates(torch.tensor(float(i)), pixels, pixel_grid).double() for i in (0, 1))
        index = (image[..., axis] / depth - first) / (second - first)
        low, high = (index.amin(-1) - 1e-3).ceil(), (index.amax(-1) + 1e-3).floor()
        low, high = torch.where(ahead.all(-1), low, 0.0), torch.where(ahead.all(-1), high, pixels - 1.0)
        limits.append((low.clamp(0, pixels).long(), high.clamp(-1, pixels - 1).long()))
    (top, bottom), (left, right) = limits
    height, width = (bottom - top + 1).clamp_min(0), (right - left + 1).clamp_min(0)
    return torch.stack([top, left, height * ahead.any(-1), width], -1)


def _hits(nearest: Tensor, corners: Tensor, directions: Tensor, size: tuple[int, int]) -> Hits:
    met = nearest != NO_HIT
    triangle = torch.where(met, nearest & 0xFFFFFFFF, -1)
    edges, volume = _edges(corners[triangle[met]])
    shares = (edges * directions[met, None]).sum(-1)
    barycentrics, t = directions.new_zeros(len(met), 3), directions.new_zeros(len(met))
    barycentrics[met] = shares / shares.sum(-1, keepdim=True)
    t[met] = volume / shares.sum(-1)
    return Hits(triangle.unflatten(0, size), barycentrics.unflatten(0, size), t.unflatten(0, size))
