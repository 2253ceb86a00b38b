"""Radiance manifolds (GRAM, Deng et al., CVPR 2022) as textured meshes, which any viewer draws in real time.

Surfaces belong to the class and are found once (`find_surfaces`); an identity is one RGBA texture for each (`paint`).
A surface is a chart: seen from the centre of the manifolds it is star-shaped, and its point in a direction is where a
ray from outside falls through the level. Chart coordinates are longitude and polar angle, within the part that cameras
see; alpha is 1 − exp(−delta·density). A background plane is two triangles, and opaque.

Level sets of one field cannot overtake each other: a ray that starts outside meets the levels in descending order. So
one order, far to near, serves every camera, and blending each layer over those before it is the network's compositing.
A mesh shows one colour to all sides: that of `view_directions`. `picture` is the network seen in the same way.
"""

import io
import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from gan3d.cameras import Camera, flip_axes, sphere_angles, sphere_point
from gan3d.meshes import POINTS_PER_CALL, ask, seen_by_any
from gan3d.pictures import replacing
from gan3d.rasterize import rasterize
from gan3d.rays import Bounds, PixelGrid, camera_rays, full_grid
from gan3d.views import looking

COARSE = 32  # cells of the chart from pole to pole, when looking for what cameras see
STEPS = 64  # places along a chart's ray, as many as the network asks along a camera's
WIDER = 1.2  # are the pictures in which a surface is looked for, so that cameras between those given see all of it
BISECTIONS = 16  # of the interval between two of them
UP = {"y": [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1],  # our world to glTF's, whose y is up; column by column
      "z": [1, 0, 0, 0, 0, 0, -1, 0, 0, 1, 0, 0, 0, 0, 0, 1]}


@dataclass(frozen=True)
class Surface:
    """A chart of r × c points, rows downwards and columns to the right as seen from outside.

    drawn: the cells between four points that exist, of which wider cameras see at least one.
    extent: height and width of the chart, scene units, about.
    delta: the length that alpha stands for.
    """

    points: Float[Tensor, "r c 3"]
    drawn: Bool[Tensor, "cell_rows cell_columns"]
    extent: tuple[float, float]
    delta: float
    opaque: bool = False


@dataclass(frozen=True)
class Layer:
    """A surface with its texture, as the file holds it. Triangles are counter-clockwise as seen from outside."""

    vertices: Float[Tensor, "v 3"]
    faces: Int[Tensor, "f 3"]
    uv: Float[Tensor, "v 2"]  # to the right and down; (0, 0) is the outer corner of the first texel
    rgba: UInt8[Tensor, "h w 4"]  # display values, not multiplied by alpha
    opaque: bool


def centre(generator: Any) -> Float[Tensor, " 3"]:
    """Around which the manifolds are star-shaped, at the beginning of training even spheres."""
    return generator.manifolds.center / generator.manifolds.scale


def view_directions(generator: Any, points: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 3"]:
    """From where a mesh's colours are seen: straight ahead, as the authors lock it, where there is a background plane;
    else along the chart's ray."""
    if generator.plane is not None:
        return points.new_tensor([0.0, 0.0, -1.0]).expand_as(points)
    return F.normalize(centre(generator) - points, dim=-1)


def find_surfaces(generator: Any, cameras: Camera, cells: int, up: str) -> list[Surface]:
    """The surfaces of a class, far to near, as far as at least one camera sees them.

    Args:
        cameras: some hundred from the prior.
        cells: along the longer side of each chart.
        up: "y" or "z", the axis of the charts' poles.
    Raises: ValueError if no manifold is seen.
    """
    with looking(generator) as device:
        cameras, levels, middle = _wider(cameras.to(device)), generator.levels, centre(generator)
        front = sphere_angles((cameras.position - middle).mean(0), up)[0]
        polar = torch.linspace(0, math.pi, COARSE + 1, device=device)
        longitude = torch.linspace(-math.pi, math.pi, 2 * COARSE + 1, device=device)  # the seam lies behind
        directions = _directions(polar, longitude, front, up)
        reach = _reach(generator, cameras)
        radii = torch.linspace(reach, 0, STEPS + 1, device=device)
        points = middle + directions[..., None, :] * radii[:, None]
        looked_at = seen_by_any(points.flatten(0, -2), cameras, generator.bounds).view(points.shape[:-1])
        looked_at = looked_at[..., :-1] | looked_at[..., 1:]
        radius, exists = _fall(generator, directions, levels, radii, looked_at)
        seen = looked_at.gather(-1, ((1 - radius / reach) * STEPS).long().clamp(0, STEPS - 1)) & exists
        surfaces = [] if generator.plane is None else [_plane(generator, cameras)]
        for i in reversed(range(len(levels))):
            if not seen[..., i].any():
                continue
            top, bottom = _window(seen[..., i].any(1), polar)
            left, right = _window(seen[..., i].any(0), longitude)
            equator = min(max(math.pi / 2, top), bottom)  # of the rows the longest
            extent = bottom - top, (right - left) * math.sin(equator)
            rows, columns = (max(1, math.ceil(cells * side / max(extent))) for side in extent)
            known = radius[..., i][seen[..., i]]
            radii = torch.linspace(float(known.max()) + reach / STEPS, max(float(known.min()) - reach / STEPS, 0),
                                   STEPS + 1, device=device)
            directions = _directions(torch.linspace(top, bottom, rows + 1, device=device),
                                     torch.linspace(left, right, columns + 1, device=device), front, up)
            fine, found = _fall(generator, directions, levels[i:i + 1], radii)
            points, size = middle + directions * fine, float(known.mean())
            near = seen_by_any(points.flatten(0, 1), cameras, generator.bounds).view(points.shape[:2])
            drawn = _of_cells(found[..., 0]).all(-1) & _of_cells(near).any(-1)
            surfaces.append(Surface(points, drawn, (extent[0] * size, extent[1] * size), generator.delta_alpha))
    if len(surfaces) == (generator.plane is not None):
        raise ValueError(f"no camera sees any of the {len(levels)} manifolds: their levels, {float(levels[0]):.4g} to "
                         f"{float(levels[-1]):.4g}, are not met within the bounds")
    return surfaces


def _wider(cameras: Camera) -> Camera:
    """The same cameras with shorter focal lengths, hence larger pictures of the same middle."""
    focal = cameras.intrinsics.new_tensor([[1 / WIDER, 1 / WIDER, 1], [1, 1 / WIDER, 1], [1, 1, 1]])
    return Camera(cameras.camera_to_world, cameras.intrinsics * focal)


def _directions(polar: Tensor, longitude: Tensor, front: Tensor, up: str) -> Float[Tensor, "r c 3"]:
    """Longitude grows to the right as seen from outside: around z the azimuth does so, too, around y it falls."""
    azimuth = front + longitude if up == "z" else front - longitude
    azimuth, polar = torch.broadcast_tensors(azimuth, polar[:, None])
    return sphere_point(azimuth, polar, up=up)


def _reach(generator: Any, cameras: Camera) -> float:
    """Distance from the centre to the farthest place that the network looks at."""
    if generator.bounds.aabb is not None:
        places = torch.cartesian_prod(*cameras.position.new_tensor(generator.bounds.aabb).T)
    else:
        rays = camera_rays(cameras, full_grid(2, 2, cameras.position.device), generator.bounds, (2, 2), "corner")
        places = torch.cat([rays.origins + rays.directions * t[..., None] for t in (rays.near, rays.far)])
    return float((places - centre(generator)).norm(dim=-1).max())


def _fall(generator: Any, directions: Float[Tensor, "r c 3"], levels: Float[Tensor, " l"], radii: Float[Tensor, " s"],
          preferred: Bool[Tensor, "r c intervals"] | None = None
          ) -> tuple[Float[Tensor, "r c l"], Bool[Tensor, "r c l"]]:
    """Distances from the centre at which rays from outside first fall through each level, and whether they do.

    Args:
        radii: where to look, descending.
        preferred: intervals between these; a fall in one of them comes before all others.
    """
    def ask(radius: Tensor) -> Tensor:  # [r c k] → [r c k]
        points = centre(generator) + directions[..., None, :] * radius[..., None]
        return torch.cat([generator.manifolds(part) for part in points.view(-1, 3).split(POINTS_PER_CALL)]
                         ).view(points.shape[:-1])

    s = ask(radii.expand(*directions.shape[:-1], -1))[..., None]
    falls = ((s[..., :-1, :] >= levels) & (levels >= s[..., 1:, :])).to(torch.uint8)
    if preferred is not None:
        falls = falls * (1 + preferred[..., None].to(torch.uint8))
    first = falls.argmax(-2)
    outer, inner = radii[first], radii[first + 1]
    for _ in range(BISECTIONS):
        middle = (outer + inner) / 2
        above = ask(middle) >= levels
        outer, inner = torch.where(above, middle, outer), torch.where(above, inner, middle)
    return (outer + inner) / 2, falls.amax(-2) > 0


def _window(seen: Bool[Tensor, " n"], places: Float[Tensor, " n"]) -> tuple[float, float]:
    """From one place before the first that is seen to one behind the last."""
    index = seen.nonzero()[:, 0]
    return float(places[max(int(index[0]) - 1, 0)]), float(places[min(int(index[-1]) + 1, len(places) - 1)])


def _of_cells(points: Tensor) -> Tensor:
    """The values at the four corners of each cell."""
    return torch.stack([points[:-1, :-1], points[:-1, 1:], points[1:, :-1], points[1:, 1:]], -1)


def _plane(generator: Any, cameras: Camera) -> Surface:
    """The rectangle of the background plane that the pictures show. It looks towards +z."""
    rays = camera_rays(cameras, full_grid(2, 2, cameras.position.device), generator.bounds, (2, 2), "corner")
    t = (generator.plane - rays.origins[..., 2]) / rays.directions[..., 2]
    places = (rays.origins + rays.directions * t[..., None])[t > 0][:, :2]
    (left, bottom), (right, top) = places.amin(0), places.amax(0)
    x, y = torch.stack([left, right]).expand(2, 2), torch.stack([top, bottom])[:, None].expand(2, 2)
    points = torch.stack([x, y, torch.full_like(x, generator.plane)], -1)
    drawn = torch.ones(1, 1, dtype=torch.bool, device=x.device)
    return Surface(points, drawn, (float(top - bottom), float(right - left)), generator.delta_final, opaque=True)


def paint(generator: Any, ready: Any, surfaces: Sequence[Surface], texels: int) -> list[Layer]:
    """One identity's textures. Texels are equally large, about, on all surfaces; what is not drawn stays transparent.

    Args:
        ready: one object, as `views.prepare` gives it.
        texels: along the longest side of the widest surface.
    """
    from tqdm import tqdm

    texel = max(max(surface.extent) for surface in surfaces) / texels
    layers = []
    for surface in tqdm(surfaces, "textures", leave=False, disable=None):
        height, width = (max(2, round(side / texel)) for side in surface.extent)
        chart = surface.points.movedim(-1, 0)[None]
        points = F.interpolate(chart, (height, width), mode="bilinear", align_corners=True)[0].movedim(0, -1)
        used = _used(surface.drawn, height, width).cpu()
        rgba = torch.zeros(height, width, 4)
        places = points.cpu()[used]
        parts = [ask(generator, ready, p[:, None], view_directions(generator, p.to(surface.points)).cpu())
                 for p in places.split(POINTS_PER_CALL)]
        density = F.softplus(torch.cat([raw_density[:, 0] for raw_density, _ in parts]))
        rgb = torch.cat([features[:, 0, :3] for _, features in parts])
        rgba[used] = torch.cat([rgb, -torch.expm1(-surface.delta * density)[:, None]], -1)
        layers.append(Layer(*_triangles(surface, height, width), (rgba.clamp(0, 1) * 255).round().to(torch.uint8),
                            surface.opaque))
    return layers


def _used(drawn: Bool[Tensor, "r c"], height: int, width: int) -> Bool[Tensor, "h w"]:
    """The texels between which something is drawn: a texture's corner texels lie on its chart's corner points."""
    row = (torch.arange(height, device=drawn.device) * drawn.shape[0] // (height - 1)).clamp(max=drawn.shape[0] - 1)
    column = (torch.arange(width, device=drawn.device) * drawn.shape[1] // (width - 1)).clamp(max=drawn.shape[1] - 1)
    return F.max_pool2d(drawn[row][:, column][None].float(), 3, 1, 1)[0] > 0


def _triangles(surface: Surface, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Vertices, faces and texture coordinates, on the CPU, without the vertices of cells that are not drawn."""
    rows, columns = surface.points.shape[:2]
    i, j = surface.drawn.cpu().nonzero().unbind(-1)
    corner = i * columns + j
    below, right = corner + columns, corner + 1
    faces = torch.cat([torch.stack([corner, below, right], -1), torch.stack([right, below, below + 1], -1)], -1)
    used, index = torch.unique(faces.view(-1, 3), return_inverse=True)
    place = torch.stack([used % columns / (columns - 1), used // columns / (rows - 1)], -1)
    size = torch.tensor([width, height])
    return surface.points.flatten(0, 1).cpu()[used], index, (place * (size - 1) + 0.5) / size


def render(layers: Sequence[Layer], camera: Camera, resolution: int, bounds: Bounds, pixel_grid: PixelGrid
           ) -> Float[Tensor, "3 h w"]:
    """What a viewer shows, in [−1, 1]: opaque layers first, then the others over them, far to near.

    Args:
        camera: one, without a batch axis.
        bounds: no surface is seen outside them, as in the network; a background plane always is.
    """
    size = (resolution, resolution)
    picture = torch.tensor(bounds.background or (0, 0, 0), dtype=torch.float32).expand(*size, 3)
    wall = torch.full(size, torch.inf, dtype=torch.float64)
    for layer in sorted(layers, key=lambda layer: not layer.opaque):
        limits = Bounds(0.0, 1e9) if layer.opaque else bounds
        hits = rasterize(layer.vertices, layer.faces, camera, size, limits, pixel_grid, front_only=True)
        shown = (hits.triangle >= 0) & (hits.t < wall)
        uv = hits.interpolate(layer.faces, layer.uv)
        texture = layer.rgba.movedim(-1, 0)[None].float() / 255
        rgba = F.grid_sample(texture, 2 * uv[None] - 1, "bilinear", "border", False)[0].movedim(0, -1)
        alpha = shown if layer.opaque else shown * rgba[..., 3]
        picture = torch.lerp(picture, rgba[..., :3], alpha[..., None].float())
        if layer.opaque:
            wall = torch.where(shown, hits.t, wall)
    return 2 * picture.movedim(-1, 0) - 1


def picture(generator: Any, ready: Any, camera: Camera, resolution: int) -> Float[Tensor, "3 h w"]:
    """The network's own picture through one camera, in [−1, 1], its colours seen from `view_directions`; on the CPU."""
    with looking(generator) as device:
        seen = generator.crossings(camera[None].to(device), resolution)
        points = seen.points.flatten(1, 2)
        raw_density, rgb = generator.field(ready)(points[:, :, None], view_directions(generator, points)[:, :, None])
        shape = seen.points.shape[1:3]
        rendering = generator.composite(seen, raw_density[..., 0].unflatten(1, shape), rgb[:, :, 0].unflatten(1, shape))
    return (2 * rendering.features[0].mT.unflatten(-1, (resolution, resolution)) - 1).cpu()


def fidelity(generator: Any, ready: Any, layers: Sequence[Layer], cameras: Camera, resolution: int) -> list[float]:
    """PSNR, in dB, of the meshes against the network, from each camera.

    Two pictures 46 dB apart differ by less than 0.1 dB in what they are compared with at 30 dB, if their difference has
    nothing to do with it. Outlines end it sooner: a pixel is on one side or the other.
    """
    each = [Camera(*one) for one in zip(*cameras, strict=True)]
    return [psnr(render(layers, camera, resolution, generator.bounds, generator.pixel_grid),
                 picture(generator, ready, camera, resolution)) for camera in each]


def psnr(image: Float[Tensor, "*b"], reference: Float[Tensor, "*b"]) -> float:
    """Of pictures in [−1, 1], in dB; inf if they are equal."""
    error = float(((image - reference) / 2).square().mean())
    return -10 * math.log10(error) if error else math.inf


def write_glb(path: str | Path, layers: Sequence[Layer], camera: Camera, bounds: Bounds, up: str) -> Path:
    """A glTF 2.0 binary: a primitive and a PNG for each layer, far to near, unlit and blended; and one camera.

    Textures hold the pictures' own values. glTF calls them sRGB, and viewers that blend what they display (as three.js
    does) show the network's picture; some that blend in linear light (as Blender does) look a little lighter.

    Args:
        camera: one, without a batch axis: where the viewer starts. Its principal point is taken to be the middle.
    """
    from PIL import Image

    chunks: list[bytes] = []
    views: list[dict] = []

    def add(data: bytes, **kind: int) -> int:
        views.append({"buffer": 0, "byteOffset": sum(map(len, chunks)), "byteLength": len(data), **kind})
        chunks.append(data + bytes(-len(data) % 4))
        return len(views) - 1

    accessors: list[dict] = []
    images: list[dict] = []
    materials: list[dict] = []
    primitives: list[dict] = []
    for i, layer in enumerate(layers):
        for values, kind, target in ((layer.vertices, "VEC3", 34962), (layer.uv, "VEC2", 34962),
                                     (layer.faces.flatten(), "SCALAR", 34963)):
            floats = values.is_floating_point()
            view = add(values.numpy().astype("<f4" if floats else "<u4").tobytes(), target=target)
            accessors.append({"bufferView": view, "componentType": 5126 if floats else 5125, "count": len(values),
                              "type": kind})
        accessors[-3] |= {"min": layer.vertices.amin(0).tolist(), "max": layer.vertices.amax(0).tolist()}
        file = io.BytesIO()
        Image.fromarray(layer.rgba.numpy(), "RGBA").save(file, format="PNG")
        images.append({"bufferView": add(file.getvalue()), "mimeType": "image/png"})
        materials.append({"alphaMode": "OPAQUE" if layer.opaque else "BLEND", "extensions": {"KHR_materials_unlit": {}},
                          "pbrMetallicRoughness": {"baseColorTexture": {"index": i}, "metallicFactor": 0}})
        primitives.append({"attributes": {"POSITION": 3 * i, "TEXCOORD_0": 3 * i + 1}, "indices": 3 * i + 2,
                           "material": i})
    fx, fy = float(camera.intrinsics[0, 0]), float(camera.intrinsics[1, 1])
    perspective = {"yfov": 2 * math.atan(0.5 / fy), "aspectRatio": fy / fx, "znear": bounds.near / 10 or 1e-3,
                   "zfar": 10 * bounds.far}
    document = {
        "asset": {"version": "2.0", "generator": "gan3d"}, "extensionsUsed": ["KHR_materials_unlit"],
        "scene": 0, "scenes": [{"nodes": [0]}],
        "nodes": [{"name": "world", "matrix": UP[up], "children": [1, 2]}, {"name": "manifolds", "mesh": 0},
                  {"name": "camera", "camera": 0, "matrix": flip_axes(camera.camera_to_world).mT.flatten().tolist()}],
        "cameras": [{"type": "perspective", "perspective": perspective}],
        "meshes": [{"name": "manifolds", "primitives": primitives}], "materials": materials,
        "textures": [{"source": i, "sampler": 0} for i in range(len(layers))], "images": images,
        "samplers": [{"magFilter": 9729, "minFilter": 9729, "wrapS": 33071, "wrapT": 33071}],  # linear, clamped
        "accessors": accessors, "bufferViews": views, "buffers": [{"byteLength": sum(map(len, chunks))}],
    }
    text = json.dumps(document, separators=(",", ":")).encode()
    text, data = text + b" " * (-len(text) % 4), b"".join(chunks)
    with replacing(path) as part:
        part.write_bytes(struct.pack("<4sIII4s", b"glTF", 2, 28 + len(text) + len(data), len(text), b"JSON") + text
                         + struct.pack("<I4s", len(data), b"BIN\0") + data)
    return Path(path)


def read_glb(path: str | Path) -> list[Layer]:
    """The layers of a file of `write_glb`.

    Raises: ValueError if it is not a glTF 2.0 binary.
    """
    from PIL import Image

    file = Path(path).read_bytes()
    magic, version = struct.unpack_from("<4sI", file)
    if (magic, version) != (b"glTF", 2):
        raise ValueError(f"{path} is not a glTF 2.0 binary (.glb): it begins with {file[:8]!r}")
    (length,) = struct.unpack_from("<I", file, 12)
    document, data = json.loads(file[20:20 + length]), memoryview(file)[28 + length:]

    def view(index: int) -> memoryview:
        place = document["bufferViews"][index]
        return data[place["byteOffset"]:place["byteOffset"] + place["byteLength"]]

    def values(index: int) -> Tensor:
        accessor = document["accessors"][index]
        array = np.frombuffer(view(accessor["bufferView"]), {5126: "<f4", 5125: "<u4"}[accessor["componentType"]])
        columns = {"VEC3": 3, "VEC2": 2, "SCALAR": 3}[accessor["type"]]
        return torch.from_numpy(array.reshape(-1, columns).astype(np.float32 if array.dtype.kind == "f" else np.int64))

    layers = []
    for primitive in document["meshes"][0]["primitives"]:
        material = document["materials"][primitive["material"]]
        texture = document["textures"][material["pbrMetallicRoughness"]["baseColorTexture"]["index"]]
        png = view(document["images"][texture["source"]]["bufferView"])
        rgba = torch.from_numpy(np.array(Image.open(io.BytesIO(png)).convert("RGBA")))
        names = primitive["attributes"]
        layers.append(Layer(values(names["POSITION"]), values(primitive["indices"]), values(names["TEXCOORD_0"]), rgba,
                            material["alphaMode"] == "OPAQUE"))
    return layers
