"""An object as a solid: its density on a grid, the surface around it, and the files other programs read.

All is in the world's own axes and units. Only what the cameras of the prior can see was ever trained, so the grid knows
nothing else: see `density_grid`.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from gan3d.cameras import Camera, Number
from gan3d.pictures import replacing, surface_depth
from gan3d.rays import Bounds, Rays, camera_rays, full_grid
from gan3d.views import looking, photograph

POINTS_PER_CALL = 1 << 17  # asked of a field at once: some hundred MB in the widest network


@dataclass(frozen=True)
class Grid:
    """raw_density `[i, j, k]` at the place origin + voxel·(i, j, k): the centres of cubic voxels.

    `unseen`: the share of voxels that no camera sees; they hold the lowest density of the others.
    """

    raw_density: Float[Tensor, "x y z"]
    origin: Float[Tensor, " 3"]
    voxel: float  # side, scene units
    unseen: float = 0.0


@dataclass(frozen=True)
class Mesh:
    """Triangles, counter-clockwise as seen from outside. Normals are unit vectors and point outwards; rgb in [0, 1]."""

    vertices: Float[Tensor, "v 3"]
    faces: Int[Tensor, "f 3"]
    normals: Float[Tensor, "v 3"]
    rgb: Float[Tensor, "v 3"] | None = None


def sampled_box(generator: Any, cameras: Camera) -> Float[Tensor, "2 3"]:
    """The corners (min, max) between which a generator's object lies.

    `bounds.aabb` where the data gives one; else the cube that the planes cover (EG3D's `box`); else the cube around the
    ball that cameras on a sphere all see between near and far: around the mean middle of their axes, as far to each
    side as half of far − near. Of a cube only what cameras see is kept, to 1/64 of its side: voxels are dear.
    """
    bounds: Bounds = generator.bounds
    if bounds.aabb is not None:
        return torch.tensor(bounds.aabb, dtype=torch.float32)
    if (side := getattr(generator, "box", None)) is not None:
        middle, half = torch.zeros(3), side / 2
    else:
        forward = cameras.camera_to_world[:, :3, 2]
        axes = bounds.limit(cameras.position[:, None], forward[:, None], forward)
        middle = (cameras.position + forward * (axes.near + axes.far) / 2).mean(0)
        half = float((axes.far - axes.near).mean()) / 2
    line = (torch.arange(64) + 0.5) / 32 - 1
    places = middle + half * torch.cartesian_prod(line, line, line)
    if not (seen := seen_by_any(places, cameras, bounds)).any():
        raise ValueError(f"no camera sees the cube of side {2 * half:.4g} around {middle.tolist()}, where the object "
                         f"should be: choose mesh_box yourself")
    return torch.stack([places[seen].amin(0), places[seen].amax(0)]) + half / 64 * torch.tensor([[-1.0], [1.0]])


def seen_by_any(points: Float[Tensor, "n 3"], cameras: Camera, bounds: Bounds) -> Bool[Tensor, " n"]:
    """Whether a point lies in the picture of at least one camera, within the bounds of its rays."""
    unseen = torch.arange(len(points), device=points.device)
    for pose, intrinsics in zip(cameras.camera_to_world, cameras.intrinsics, strict=True):
        offset = points[unseen] - pose[:3, 3]
        t = offset.norm(dim=-1)
        rays = bounds.limit(pose[:3, 3].expand_as(offset), F.normalize(offset, dim=-1), pose[:3, 2])
        image = offset @ pose[:3, :3] @ intrinsics.T
        place = image[:, :2] / image[:, 2:]
        inside = (image[:, 2] > 0) & (place > 0).all(-1) & (place < 1).all(-1) & (rays.near <= t) & (t <= rays.far)
        unseen = unseen[~inside]
    seen = torch.ones(len(points), dtype=torch.bool, device=points.device)
    seen[unseen] = False
    return seen


def density_grid(generator: Any, ready: Any, box: Float[Tensor, "2 3"], resolution: int, cameras: Camera) -> Grid:
    """The raw density of one object throughout a box.

    Where no camera sees a voxel the field was never trained and holds anything; such voxels get the lowest density of
    those that are seen. Memory: the grid on the CPU, and POINTS_PER_CALL points on the generator's device.

    Args:
        ready: one object, as `views.prepare` gives it.
        resolution: voxels along the longest side of the box.
        cameras: some tens from the prior.
    Raises: ValueError if nothing of the box is seen, or it has no inside.
    """
    from tqdm import tqdm

    if resolution < 2:
        raise ValueError(f"mesh_resolution must be at least 2 voxels, got {resolution}")
    side = box[1] - box[0]
    if not (side > 0).all():
        raise ValueError(f"mesh_box must be [min corner, max corner], got {box.tolist()}")
    voxel = float(side.max()) / resolution
    shape = [max(2, math.ceil(length / voxel - 1e-3)) for length in side.tolist()]
    origin = (box[0] + box[1]) / 2 - voxel * (torch.tensor(shape) - 1) / 2
    density, seen = torch.empty(shape), torch.empty(shape, dtype=torch.bool)
    lines, depth = shape[0] * shape[1], shape[2]  # lines along z are the rays that the field is asked for
    step = max(1, POINTS_PER_CALL // depth)
    with looking(generator) as device:
        field, cameras, origin_there = generator.field(ready), cameras.to(device), origin.to(device)
        upwards = torch.tensor([0.0, 0.0, 1.0], device=device)
        for start in tqdm(range(0, lines, step), "density", leave=False, disable=None):
            line = torch.arange(start, min(start + step, lines), device=device)
            index = torch.stack(torch.broadcast_tensors(line[:, None] // shape[1], line[:, None] % shape[1],
                                                        torch.arange(depth, device=device)), -1)
            points = origin_there + voxel * index
            raw_density, _ = field(points[None], upwards.expand(1, len(line), 1, 3))
            part = slice(start, start + len(line))
            density.view(lines, depth)[part] = raw_density[0].float().cpu()
            visible = seen_by_any(points.flatten(0, 1), cameras, generator.bounds)
            seen.view(lines, depth)[part] = visible.view(-1, depth).cpu()
    if not seen.any():
        raise ValueError(f"no camera sees anything of the box {box.tolist()}: choose another mesh_box")
    density[~seen] = density[seen].min()
    return Grid(density, origin, voxel, 1 - float(seen.float().mean()))


def ask(
    generator: Any, ready: Any, points: Float[Tensor, "n s 3"], directions: Float[Tensor, "n 3"]
) -> tuple[Float[Tensor, "n s"], Float[Tensor, "n s c"]]:
    """raw_density and features of one object at s points along each of n directions; on the CPU, all at once."""
    with looking(generator) as device:
        there = points[None].to(device), directions[None, :, None].to(device)
        raw_density, features = generator.field(ready)(*there)
    return raw_density[0].float().cpu(), features[0].float().cpu()


def surface_level(generator: Any, ready: Any, cameras: Camera, resolution: int) -> float:
    """The raw density at which the surface lies that the pictures show: half of what their rays end in.

    Rays end at their mean depth; the median over all opaque pixels of `cameras` counts. Half of it, because a ray comes
    to rest inside the wall, where the density is no longer rising; the surface is on the way there. Rays that end in
    the last tenth of their way show the background, which has hardly any density: a closing sample stops them.

    A generator whose raw density has a level of its own (an occupancy's logit: 0) says so by `surface_level`.

    Raises: ValueError if no pixel is opaque, or the rays end in raw densities below 0, where nothing is solid.
    """
    if (level := getattr(generator, "surface_level", None)) is not None:
        return level
    seen = photograph(generator, [ready], cameras, resolution)
    size = (seen.depth.shape[-2], seen.depth.shape[-1])
    rays = camera_rays(cameras.to("cpu"), full_grid(*size), generator.bounds, size)
    depth = surface_depth(seen.depth, seen.opacity).flatten(1)
    solid = (seen.opacity > 0.5).flatten(1) & (depth < torch.lerp(rays.near, rays.far, 0.9))
    if not solid.any():
        raise ValueError(f"the object has no surface: before their background its pictures are nowhere half opaque (at "
                         f"most {float(seen.opacity.max()):.2f}). Train longer, or choose mesh_level yourself.")
    ends = rays.origins + rays.directions * depth[..., None]
    chunks = zip(ends[solid].split(POINTS_PER_CALL), rays.directions[solid].split(POINTS_PER_CALL), strict=True)
    raw_density = torch.cat([ask(generator, ready, end[:, None], along)[0] for end, along in chunks])
    level = float(raw_density.median()) / 2
    if level <= 0:
        raise ValueError(f"the object has no surface: rays end in a raw density of {2 * level:.3g}, which is mist. "
                         f"Train longer, or choose mesh_level yourself.")
    return level


def extract(grid: Grid, level: Number) -> Mesh:
    """The surface of raw density `level`: marching cubes (Lewiner et al., 2003), closed where the object meets the
    grid's edge.

    Raises: ValueError if the grid's densities are all above or all below. Needs scikit-image.
    """
    from skimage.measure import marching_cubes

    low, high = float(grid.raw_density.min()), float(grid.raw_density.max())
    if not low < level < high:
        raise ValueError(f"no surface at mesh_level {level:.4g}: the raw densities of this object go from {low:.4g} to "
                         f"{high:.4g}")
    padded = F.pad(grid.raw_density[None], (1,) * 6, value=low)[0]
    vertices, faces, normals, _ = marching_cubes(padded.numpy(), level)
    places = grid.origin + grid.voxel * (torch.from_numpy(vertices.copy()) - 1)
    # it counts axes from z to x; with ours the same triangles are the other way round
    outwards = torch.from_numpy(faces[:, ::-1].astype(np.int64))
    return Mesh(places, outwards, F.normalize(torch.from_numpy(normals.copy()), dim=-1))


def vertex_colours(generator: Any, ready: Any, mesh: Mesh, level: Number, reach: Number) -> Float[Tensor, "v 3"]:
    """rgb in [0, 1] of each vertex of the surface of raw density `level`, as a picture from straight above has it.

    That is the colour where such a ray comes to rest: at the first of 16 places down to `reach` (scene units) below the
    vertex where the raw density is twice `level` (see `surface_level`), or the densest of them.

    The first three features of a field are rgb in [0, 1], as a volume-rendered picture shows them. A generator whose
    features are something else says what by a method `colour(ready, features [1 n c]) -> rgb [1 n 3]`.
    """
    below = torch.linspace(0, reach, 16)[:, None]
    step, colours = POINTS_PER_CALL // len(below), []
    for vertices, normals in zip(mesh.vertices.split(step), mesh.normals.split(step), strict=True):
        places = vertices[:, None] - normals[:, None] * below
        raw_density, features = ask(generator, ready, places, -normals)
        solid = raw_density >= 2 * level
        rest = torch.where(solid.any(-1), solid.int().argmax(-1), raw_density.argmax(-1))
        features = features.take_along_dim(rest[:, None, None], 1)[:, 0]
        if hasattr(generator, "colour"):
            with looking(generator) as device:
                features = generator.colour(ready, features[None].to(device))[0].float().cpu()
        colours.append(features[:, :3].clamp(0, 1))
    return torch.cat(colours)


def roughness(mesh: Mesh) -> float:
    """How rough the surface is: the mean angle between the normals of faces that share an edge, in degrees, where each
    edge counts by its length. 0 for a plane; of a smooth surface it falls with the side of the voxels, so objects are
    compared on equal grids.

    Raises: ValueError if no two faces share an edge.
    """
    vertices = mesh.vertices.double()
    a, b, c = vertices[mesh.faces].unbind(1)
    normals = torch.linalg.cross(b - a, c - a)
    edges = mesh.faces[:, [0, 1, 1, 2, 2, 0]].view(-1, 2).sort(-1).values
    face = torch.arange(len(mesh.faces)).repeat_interleave(3)
    order = (edges[:, 0] * len(vertices) + edges[:, 1]).argsort()
    edges, face = edges[order], face[order]
    shared = (edges[1:] == edges[:-1]).all(-1)  # neighbours in this order: an edge has at most two faces
    one, other = normals[face[:-1][shared]], normals[face[1:][shared]]
    angles = torch.atan2(torch.linalg.cross(one, other).norm(dim=-1), (one * other).sum(-1))
    start, end = vertices[edges[1:][shared]].unbind(1)
    lengths = (end - start).norm(dim=-1)
    if not lengths.any():
        raise ValueError(f"no two of the mesh's {len(mesh.faces)} faces share an edge: it has no roughness")
    return math.degrees(float((angles * lengths).sum() / lengths.sum()))


def depth_spread(generator: Any, ready: Any, cameras: Camera, resolution: int) -> float:
    """How thick the surface is that rays see: the standard deviation of depth under a ray's weights, in scene units;
    mean over the rays of `cameras` that are more than half opaque.

    It is the generator's own `render(field, rays)` that chooses and weighs the samples: the field that it is handed has
    1, distance and squared distance for its colours.

    Raises: ValueError if no ray is half opaque, or the generator has no such method.
    """
    if not hasattr(generator, "render"):
        raise ValueError(f"{type(generator).__name__} has no render(field, rays), through which its depth is looked at")
    size, spreads = (resolution, resolution), []
    with looking(generator) as device:
        field, behind = generator.field(ready), getattr(generator, "background", None)
        for camera in (cameras[i:i + 1].to(device) for i in range(len(cameras.camera_to_world))):  # type: ignore
            rays = camera_rays(camera, full_grid(*size, device=device), generator.bounds, size)
            rays = Rays(rays.origins, rays.directions, rays.near, torch.maximum(rays.near, rays.far))
            middle = (rays.near + rays.far).mean() / 2  # squares of small numbers lose nothing to rounding

            def moments(points, directions, eye=camera.position[:, None, None], middle=middle):
                distance = (points - eye).norm(dim=-1, keepdim=True) - middle
                return field(points, directions)[0], distance ** torch.arange(3, device=device)

            seen = generator.render(moments, rays)
            sums = seen.features if behind is None else seen.features - (1 - seen.opacity)[..., None] * behind
            opacity, first, second = sums[seen.opacity > 0.5].double().unbind(-1)
            spreads.append((second / opacity - (first / opacity) ** 2).clamp(min=0).sqrt())
    spread = torch.cat(spreads)
    if not len(spread):
        raise ValueError("no ray of these cameras is half opaque: there is no surface to measure")
    return float(spread.mean())


def write_ply(path: str | Path, mesh: Mesh) -> Path:
    """A PLY file, binary and little-endian, with normals and, if the mesh has them, 8-bit colours."""
    import trimesh

    rgb = None if mesh.rgb is None else (mesh.rgb * 255).round().to(torch.uint8).numpy()
    solid = trimesh.Trimesh(mesh.vertices.numpy(), mesh.faces.numpy(), vertex_normals=mesh.normals.numpy(),
                            vertex_colors=rgb, process=False)
    with replacing(path) as part:
        solid.export(part, file_type="ply", vertex_normal=True)
    return Path(path)


def write_mrc(path: str | Path, grid: Grid) -> Path:
    """An MRC2014 volume (ccpem.ac.uk/mrc-format), float32, x fastest: for ChimeraX and other viewers of volumes."""
    values = grid.raw_density.numpy().transpose(2, 1, 0).astype("<f4")  # [z y x]
    whole, real = np.zeros(256, "<i4"), np.zeros(256, "<f4")  # the header's 256 words, as one kind and as the other
    whole[0:3] = whole[7:10] = grid.raw_density.shape  # size of the file's array, and of the cell
    whole[3] = 2  # mode: float32
    real[10:13] = np.array(grid.raw_density.shape) * grid.voxel
    real[13:16] = 90.0
    whole[16:19] = 1, 2, 3  # x along columns, y along rows, z along sections
    real[19:22] = values.min(), values.max(), values.mean()
    whole[22] = 1  # a volume
    whole[27] = 20140  # version of the format
    real[49:52] = grid.origin.numpy()
    whole[52] = int.from_bytes(b"MAP ", "little")
    whole[53] = 0x4444  # little-endian
    real[54] = values.std()
    header = whole | real.view("<i4")  # every word is zero in one of them
    with replacing(path) as part:
        part.write_bytes(header.tobytes() + values.tobytes())
    return Path(path)
