"""Pictures of a generator: samples, orbits, interpolations, normals.

All is drawn without gradients, a few pictures at a time, and leaves PyTorch's global random state as it found it, so
that looking at a model never changes its training.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from gan3d import pictures
from gan3d.cameras import Camera, Number
from gan3d.gans import Images
from gan3d.poses import PosePrior
from gan3d.rays import Bounds, camera_rays, full_grid
from gan3d.rendering import depth_normals


def parse_seeds(seeds: str | int | Sequence[int]) -> list[int]:
    """ "0-3" → [0, 1, 2, 3]; "0-2+7" → [0, 1, 2, 7]; numbers and lists of numbers as they are."""
    if isinstance(seeds, int):
        return [seeds]
    if not isinstance(seeds, str):
        return [int(seed) for seed in seeds]
    chosen: list[int] = []
    for part in re.split(r"[+,\s]+", seeds.strip()):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if found is None:
            raise ValueError(f"seeds must look like 7, 0-15, 0-3+8 or [0,3,8], got {seeds!r}")
        chosen += range(int(found[1]), int(found[2] or found[1]) + 1)
    if not chosen:
        raise ValueError(f"seeds {seeds!r} are none at all")
    return chosen


def draw_latents(generator: Any, seeds: Sequence[int]) -> Float[Tensor, "n z"]:
    """One z ~ N(0, 1) a seed: a seed is always the same object, whatever is drawn beside it."""
    each = [torch.randn(1, generator.z_dim, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.cat(each).to(_device(generator))


def _device(generator: Any) -> torch.device:
    return next(generator.parameters()).device


@contextmanager
def _looking(generator: Any) -> Iterator[torch.device]:
    """No gradients, and the global random state put back: some generators draw numbers even in eval mode.

    Their state starts from a fixed seed, so the same view is the same picture. (Not inference_mode: what a generator
    may cache in there, like its mean latent, would be unusable in training.)
    """
    device = _device(generator)
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield device


def map_latents(
    generator: Any, z: Float[Tensor, "b z"], camera_condition: Camera | None = None, truncation_psi: Number = 1.0
) -> Tensor:
    """ws of z. One camera serves all latents."""
    with _looking(generator) as device:
        if camera_condition is not None:
            camera_condition = _repeat(camera_condition, len(z)).to(device)
        return generator.mapping(z.to(device), camera_condition, truncation_psi)


def _repeat(camera: Camera, n: int) -> Camera:
    return camera if len(camera.camera_to_world) == n else Camera(*(value.expand(n, -1, -1) for value in camera))


def prepare(generator: Any, ws: Tensor) -> list[Any]:
    """Each object ready to be seen from any camera (`Generator.prepare`), for `photograph`."""
    with _looking(generator) as device:
        return [generator.prepare(w[None].to(device)) for w in ws]


def photograph(generator: Any, ws: Tensor | list[Any], cameras: Camera, resolution: int, pixels_per_call: int = 4096
               ) -> Images:
    """Pictures, on the CPU, of object i through camera i. One camera, or one object, serves all of the other.

    Args:
        ws: of the objects, or what `prepare` made of them: then a view costs its rendering alone.
        pixels_per_call: how many pixels are asked of the generator at once, at least one picture; memory is
            proportional to it.
    """
    n = max(len(ws), len(cameras.camera_to_world))
    cameras = _repeat(cameras, n)
    if isinstance(ws, Tensor):
        ws = ws if len(ws) == n else ws.expand(n, *ws.shape[1:])
        batch = max(1, pixels_per_call // resolution**2)
    else:
        ws, batch = ws if len(ws) == n else ws * n, 1
    parts = []
    for start in range(0, n, batch):
        with _looking(generator) as device:
            part = ws[start:start + batch].to(device) if isinstance(ws, Tensor) else ws[start]
            seen = generator.synthesis(part, cameras[start:start + batch].to(device), resolution)  # type: ignore
        parts.append([value.float().cpu() for value in (seen.rgb, seen.raw, seen.depth, seen.opacity)])
    return Images(*(torch.cat(values) for values in zip(*parts, strict=True)))


def samples(
    generator: Any, poses: PosePrior, z: Float[Tensor, "b z"], resolution: int, *, truncation_psi: Number = 1.0,
    camera_seed: int = 0
) -> tuple[Images, Camera]:
    """Objects z through cameras drawn from the prior, and these cameras."""
    cameras = poses.sample(len(z), torch.Generator().manual_seed(camera_seed))
    return photograph(generator, map_latents(generator, z, cameras, truncation_psi), cameras, resolution), cameras


def orbit(
    generator: Any, ws: Tensor, cameras: Camera, resolution: int, *, depth: bool = True
) -> Iterator[UInt8[Tensor, "h w 3"]]:
    """Frames: the objects ws side by side, all through camera i; below them their depth, in colours that mean the
    same in every frame."""
    frames = len(cameras.camera_to_world)
    ready = prepare(generator, ws)
    if not depth:
        for i in range(frames):
            seen = photograph(generator, ready, cameras[i:i + 1], resolution)
            yield pictures.grid(pictures.to_uint8(seen.rgb), len(ws))
        return
    probes = {i: photograph(generator, ready, cameras[i:i + 1], resolution) for i in range(0, frames, -(-frames // 4))}
    limits = pictures.depth_range(torch.cat([seen.depth for seen in probes.values()]),
                                  torch.cat([seen.opacity for seen in probes.values()]))
    for i in range(frames):
        seen = probes.pop(i) if i in probes else photograph(generator, ready, cameras[i:i + 1], resolution)
        colours = pictures.colour_depth(seen.depth, seen.opacity, limits)
        rgb = pictures.to_uint8(seen.rgb)
        yield pictures.grid(torch.cat([rgb, pictures.fit(colours, rgb.shape[-2])]), len(ws))


def interpolate_latents(
    keys: Float[Tensor, "k z"], frames: int, spherical: bool = True
) -> Float[Tensor, "frames z"]:
    """A closed walk over the keys, equal time between each two.

    Args:
        spherical: along great circles, which keeps Gaussian latents as long as Gaussian latents are; else straight.
    """
    place = torch.arange(frames, device=keys.device) / frames * len(keys)
    index = place.long().clamp(max=len(keys) - 1)
    t = (place - index)[:, None]
    start, end = keys[index], keys[(index + 1) % len(keys)]
    if not spherical:
        return torch.lerp(start, end, t)
    cosine = torch.nn.functional.cosine_similarity(start, end, dim=-1)[:, None].clamp(-1, 1)
    angle = torch.acos(cosine)
    sine = torch.sin(angle)
    walk = (torch.sin((1 - t) * angle) * start + torch.sin(t * angle) * end) / sine.clamp_min(1e-6)
    return torch.where(sine < 1e-3, torch.lerp(start, end, t), walk)  # (almost) parallel: straight is as good


def interpolate(
    generator: Any, z_keys: Float[Tensor, "k z"], frames: int, cameras: Camera, resolution: int, *,
    space: Literal["z", "w"] = "z", truncation_psi: Number = 1.0
) -> Iterator[UInt8[Tensor, "h w 3"]]:
    """Frames of one object turning into the next, through all keys and back to the first.

    Args:
        cameras: one for all frames, or one a frame.
        space: "z" along great circles between latents, "w" straight between mapped latents.
    """
    if space == "z":
        z = interpolate_latents(z_keys, frames)
        ws = torch.cat([map_latents(generator, part, cameras[:1], truncation_psi) for part in z.split(64)])
    else:
        keys = map_latents(generator, z_keys, cameras[:1], truncation_psi)
        ws = interpolate_latents(keys.flatten(1), frames, spherical=False).unflatten(1, keys.shape[1:])
    cameras = _repeat(cameras, frames)
    for i in range(frames):
        seen = photograph(generator, ws[i:i + 1], cameras[i:i + 1], resolution)
        yield pictures.grid(pictures.to_uint8(seen.rgb), 1, pad=0)


def normals(images: Images, cameras: Camera) -> Float[Tensor, "b hr wr 3"]:
    """Unit normals of the surface in the depth picture, in each camera's axes (towards the camera: z < 0).

    They mean something where the opacity is near 1; across outlines they point sideways.
    """
    b, height, width = images.depth.shape
    eye = torch.eye(4).expand(b, 4, 4)  # rays in the camera's own axes
    rays = camera_rays(Camera(eye, cameras.intrinsics.cpu()), full_grid(height, width), Bounds(0.0, 1.0),
                       (height, width))
    distance = pictures.surface_depth(images.depth, images.opacity)
    points = rays.directions.unflatten(1, (height, width)) * distance[..., None]
    return depth_normals(points)


def probe_density(
    generator: Any, ws: Tensor, cameras: Camera, bounds: Bounds, *, points: int = 4096, seed: int = 0
) -> Float[Tensor, " n"]:
    """raw_density at random places inside the bounds, seen from the cameras (object i through camera i); about
    `points` in all."""
    rng = torch.Generator().manual_seed(seed)
    b = len(ws)
    rays_each, along = max(1, points // (8 * b)), 8
    pixels = torch.rand(b, rays_each, 2, generator=rng)
    rays = camera_rays(cameras, pixels - 0.5, bounds, (1, 1))  # an image of one pixel: its centre is index 0
    t = rays.near[..., None] + (rays.far - rays.near)[..., None] * torch.rand(b, rays_each, along, generator=rng)
    places = rays.origins[..., None, :] + rays.directions[..., None, :] * t[..., None]
    with _looking(generator) as device:
        raw_density, _ = generator.field(ws.to(device))(places.to(device), rays.directions[..., None, :].to(device))
    return raw_density[(rays.far > rays.near).to(device)].float().flatten().cpu()
