"""Pictures of car meshes by ray casting on the CPU: sun with shadow, sky, ambient occlusion, paint that reflects.

NumPy and Embree only, no torch: worker processes start in half a second. World: z up, cars stand on z = 0; a mesh is
1 long along x. Colours are linear until the last step.
"""

import io
import math
import os
import pickle
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import trimesh
from embreex.mesh_construction import TriangleMesh
from embreex.rtcore_scene import EmbreeScene
from jaxtyping import Float, Int
from numpy import ndarray as Array
from PIL import Image

SUN = np.array([0.42, -0.34, 0.84]) / np.linalg.norm([0.42, -0.34, 0.84])
SUN_COLOUR = np.array([1.55, 1.47, 1.33])
SKY_COLOUR = np.array([0.78, 0.87, 1.0])
HORIZON_COLOUR, ZENITH_COLOUR = np.array([0.95, 0.97, 1.0]), np.array([0.50, 0.66, 0.92])
GROUND_COLOUR = np.array([0.52, 0.50, 0.48])  # light that a pale ground throws back
OCCLUSION_RAYS, OCCLUSION_REACH = 3, 0.35
GOLDEN_ANGLE = math.pi * (3 - math.sqrt(5))  # neighbouring rings point in different directions
SUBPIXELS = 2  # a pixel is the mean of 2×2 rays
OFFSET = 1e-4  # secondary rays start this far from the surface


@dataclass(frozen=True)
class Car:
    """A mesh ready to be shaded, of one car or of several. Materials: 0 paint, 1 glass or rubber, 2 the rest."""

    triangles: Float[Array, "f 3 3"]
    flat: Float[Array, "f 3"]  # across each face, twice its area long
    normals: Float[Array, "f 3 3"]  # smooth, per corner, as the modeller gave them
    colours: Float[Array, "f 3"]
    materials: Int[Array, " f"]
    scene: EmbreeScene

    def meet(self, origins: Array, directions: Array, reach: float = math.inf) -> Int[Array, " n"]:
        """First face along each ray, −1 for none within `reach`."""
        reaches = np.full(len(origins), min(reach, 1e9), np.float32)
        origins, directions = (np.ascontiguousarray(rays, np.float32) for rays in (origins, directions))
        return np.asarray(self.scene.run(origins, directions, reaches))


@cache
def load_car(path: Path) -> Car:
    """A GLB file (y up, materials `body`, `darkN`, `partN`) in our axes: (x, y, z) becomes (x, −z, y)."""
    parts = list(trimesh.load_scene(path, process=False).geometry.values())
    turn = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]])  # rows: where x, y and z go
    triangles = np.concatenate([part.triangles for part in parts]) @ turn
    normals = np.concatenate([part.vertex_normals[part.faces] for part in parts]) @ turn
    names = [part.visual.material.name for part in parts]
    factors = [part.visual.material.baseColorFactor for part in parts]
    colours = [np.ones(3) if factor is None else np.asarray(factor[:3]) / 255 for factor in factors]
    kinds = [0 if name == "body" else 1 if name.startswith("dark") else 2 for name in names]
    sizes = [len(part.faces) for part in parts]
    return car_of(triangles, normals, np.repeat(colours, sizes, axis=0), np.repeat(kinds, sizes))


def car_of(triangles: Array, normals: Array, colours: Array, materials: Array) -> Car:
    scene = EmbreeScene()
    TriangleMesh(scene, triangles.astype(np.float32))
    flat = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    return Car(triangles, flat, normals, colours, materials, scene)


class Parked(NamedTuple):
    """A car of the scene: the middle of its place on the ground, its length, and how far its nose is turned from +x
    towards +y, in radians."""

    mesh: Path
    place: tuple[float, float] = (0.0, 0.0)
    yaw: float = 0.0
    length: float = 1.0


def assemble(parked: Sequence[Parked], paints: Sequence[Float[Array, "3"]]) -> Car:
    """All cars of a scene in one mesh, each in its paint: they hide and shade one another."""
    parts = []
    for spot, colour in zip(parked, paints, strict=True):
        car = load_car(spot.mesh)
        cosine, sine = math.cos(spot.yaw), math.sin(spot.yaw)
        turn = np.array([[cosine, sine, 0.0], [-sine, cosine, 0.0], [0.0, 0.0, 1.0]])  # rows: where x, y and z go
        painted = np.where((car.materials == 0)[:, None], colour, car.colours)
        triangles = spot.length * (car.triangles @ turn) + [*spot.place, 0.0]
        parts.append((triangles, car.normals @ turn, painted, car.materials))
    return car_of(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def paint(random: np.random.Generator) -> Float[Array, "3"]:
    """A car's colour, linear rgb: white to black for two in five, otherwise any hue."""
    if random.random() < 0.4:
        grey = math.exp(random.uniform(math.log(0.02), math.log(0.85)))
        return np.clip(grey * random.uniform(0.94, 1.06, 3), 0, 1)
    hue, saturation, value = random.random(), random.uniform(0.7, 0.97), random.uniform(0.25, 0.8)
    wheel = np.clip(np.abs((hue * 6 + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1, 0, 1)
    return value * (1 - saturation * (1 - wheel))


def pixel_rays(
    camera_to_world: Float[Array, "4 4"], intrinsics: Float[Array, "3 3"], side: int
) -> Float[Array, "n 3"]:
    """Unit directions through the pixel centres of a square picture, row by row."""
    centres = (np.arange(side) + 0.5) / side
    v, u = np.meshgrid(centres, centres, indexing="ij")
    x = (u - intrinsics[0, 2]) / intrinsics[0, 0]
    y = (v - intrinsics[1, 2]) / intrinsics[1, 1]
    directions = np.stack([x, y, np.ones_like(x)], -1).reshape(-1, 3) @ camera_to_world[:3, :3].T
    return directions / np.linalg.norm(directions, axis=-1, keepdims=True)


def cast(
    car: Car, origins: Float[Array, "n 3"], directions: Float[Array, "n 3"]
) -> tuple[Int[Array, " n"], Float[Array, " n"]]:
    """First face along each ray (−1: none) and the distance to it (0 where none), from the face's plane in float64."""
    face = car.meet(origins, directions)
    hit = np.flatnonzero(face >= 0)
    normal = car.flat[face[hit]]
    slope = (normal * directions[hit]).sum(-1)
    height = (normal * (car.triangles[face[hit], 0] - origins[hit])).sum(-1)
    distance = np.zeros(len(face))
    distance[hit] = height / np.where(slope == 0, np.inf, slope)
    face[hit[slope == 0]] = -1
    return face, distance


def _normals(car: Car, face: Array, points: Array, directions: Array) -> tuple[Array, Array]:
    """Geometric and interpolated unit normals at points on faces, both turned towards the viewer."""
    a, b, c = np.moveaxis(car.triangles[face], 1, 0)
    flat = car.flat[face]
    area = (flat * flat).sum(-1).clip(1e-20)
    weight_b = (np.cross(points - a, c - a) * flat).sum(-1) / area
    weight_c = (np.cross(b - a, points - a) * flat).sum(-1) / area
    weights = np.stack([1 - weight_b - weight_c, weight_b, weight_c], -1)
    smooth = (weights[..., None] * car.normals[face]).sum(1)
    flat = flat * (np.where((flat * directions).sum(-1) > 0, -1.0, 1.0) / np.sqrt(area))[:, None]
    smooth *= np.where((smooth * flat).sum(-1) < 0, -1.0, 1.0)[:, None]
    return flat, smooth / np.linalg.norm(smooth, axis=-1, keepdims=True).clip(1e-9)


def _occlusion(car: Car, starts: Array, normals: Array, random: np.random.Generator) -> Array:
    """Share of the sky, cosine weighted, that other parts of the car leave free. One ray per ring of equal share."""
    helper = np.where(np.abs(normals[:, :1]) > 0.7, [0.0, 1.0, 0.0], [1.0, 0.0, 0.0])
    across = np.cross(normals, helper)
    across /= np.linalg.norm(across, axis=-1, keepdims=True)
    along = np.cross(normals, across)
    ring = np.arange(OCCLUSION_RAYS)[:, None]
    squared = (ring + random.random((OCCLUSION_RAYS, len(starts)))) / OCCLUSION_RAYS
    angle = 2 * math.pi * random.random(len(starts)) + GOLDEN_ANGLE * ring
    radius = np.sqrt(squared)
    directions = ((radius * np.cos(angle))[..., None] * across + (radius * np.sin(angle))[..., None] * along
                  + np.sqrt(1 - squared)[..., None] * normals)
    origins = np.broadcast_to(starts, directions.shape).reshape(-1, 3)
    return (car.meet(origins, directions.reshape(-1, 3), OCCLUSION_REACH) < 0).reshape(OCCLUSION_RAYS, -1).mean(0)


def _sky(directions: Array) -> Array:
    """What a mirror in that direction would show: horizon to zenith above, the pale ground below."""
    up = directions[:, 2:]
    above = HORIZON_COLOUR + (ZENITH_COLOUR - HORIZON_COLOUR) * up.clip(0, 1) ** 0.5
    return np.where(up > 0, above, GROUND_COLOUR)


def shade(
    car: Car, face: Int[Array, " n"], points: Float[Array, "n 3"], directions: Float[Array, "n 3"],
    random: np.random.Generator,
) -> Float[Array, "n 3"]:
    """Linear colour of points on faces seen along `directions`."""
    flat, normal = _normals(car, face, points, directions)
    starts = points + OFFSET * flat
    sun_side = (normal @ SUN).clip(0) * (flat @ SUN > 0)
    lit = np.zeros(len(points))
    facing = np.flatnonzero(sun_side)
    lit[facing] = car.meet(starts[facing], np.broadcast_to(SUN, (len(facing), 3))) < 0
    free = _occlusion(car, starts, flat, random)[:, None]
    height = (normal[:, 2:] + 1) / 2
    ambient = (GROUND_COLOUR + (SKY_COLOUR - GROUND_COLOUR) * height) * (0.3 + 0.7 * free)
    material = car.materials[face]
    diffuse = car.colours[face] * (0.62 * ambient + 0.62 * SUN_COLOUR * (lit * sun_side)[:, None])
    toward = -directions
    half = SUN + toward
    half /= np.linalg.norm(half, axis=-1, keepdims=True).clip(1e-9)
    gloss, strength = np.array([60.0, 120.0, 20.0])[material], np.array([0.55, 0.5, 0.08])[material]
    highlight = strength * lit * (normal * half).sum(-1).clip(0) ** gloss
    cosine = (normal * toward).sum(-1).clip(0, 1)
    fresnel = np.array([0.04, 0.05, 0.02])[material] + np.array([0.5, 0.6, 0.1])[material] * (1 - cosine) ** 5
    mirrored = directions + 2 * cosine[:, None] * normal
    return diffuse * (1 - fresnel)[:, None] + fresnel[:, None] * _sky(mirrored) * free + highlight[:, None] * SUN_COLOUR


def photograph(
    car: Car, camera_to_world: Float[Array, "4 4"], intrinsics: Float[Array, "3 3"], side: int,
    random: np.random.Generator,
) -> tuple[Array, Float[Array, "h w"]]:
    """The picture, uint8 rgba `[h w 4]` (sRGB, straight alpha), and the distance along each pixel's ray (0: no car)."""
    fine = SUBPIXELS * side
    directions = pixel_rays(camera_to_world, intrinsics, fine)
    middle = pixel_rays(camera_to_world, intrinsics, side)
    both = np.concatenate([directions, middle])
    origins = np.broadcast_to(camera_to_world[:3, 3], both.shape)
    face, distance = cast(car, origins, both)
    depth = distance[fine * fine:].reshape(side, side)
    face, distance = face[: fine * fine], distance[: fine * fine]
    seen = np.flatnonzero(face >= 0)
    points = camera_to_world[:3, 3] + directions[seen] * distance[seen, None]
    light = np.zeros((fine * fine, 4))
    light[seen, :3] = shade(car, face[seen], points, directions[seen], random).clip(0, 1)
    light[seen, 3] = 1
    light = light.reshape(side, SUBPIXELS, side, SUBPIXELS, 4).mean((1, 3))
    colour, alpha = light[..., :3] / light[..., 3:].clip(1e-6), light[..., 3:]
    srgb = np.where(colour <= 0.0031308, 12.92 * colour, 1.055 * colour.clip(0.0031308) ** (1 / 2.4) - 0.055)
    return np.round(np.concatenate([srgb, alpha], -1).clip(0, 1) * 255).astype(np.uint8), depth


class Task(NamedTuple):
    """One picture to take: everything it depends on."""

    cars: tuple[Parked, ...]
    camera_to_world: np.ndarray
    intrinsics: np.ndarray
    side: int
    seed: tuple[int, ...]  # of the paints and of the occlusion rays


class Shot(NamedTuple):
    png: bytes
    depth: np.ndarray  # [h w], distance along each pixel's ray, 0 where there is no car


def take(task: Task) -> Shot:
    """The picture of a task, encoded. A function of its argument alone, so that any process may run it."""
    random = np.random.default_rng([*task.seed, 1])
    scene = assemble(task.cars, [paint(random) for _ in task.cars])
    rgba, depth = photograph(scene, task.camera_to_world, task.intrinsics, task.side, random)
    file = io.BytesIO()
    Image.fromarray(rgba).save(file, format="PNG")
    return Shot(file.getvalue(), depth)


def serve() -> None:
    """What a worker process does: read a list of tasks from standard input, write their shots to standard output.

    If the process that asked is gone, writing fails and so ends this one. Ctrl-C is that process's business.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for task in pickle.load(sys.stdin.buffer):
            pickle.dump(take(task), sys.stdout.buffer)
            sys.stdout.buffer.flush()
    except BrokenPipeError:
        os._exit(1)  # without the traceback that an ordinary exit would print when it flushes
