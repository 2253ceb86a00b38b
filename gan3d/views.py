"""Pictures of a generator: samples, orbits, interpolations, style mixing, truncation, normals.

All is drawn without gradients, a few pictures at a time, and leaves PyTorch's global random state as it found it, so
that looking at a model never changes its training.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from gan3d import pictures
from gan3d.cameras import AXES, Camera, Number, look_at
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
def looking(generator: Any) -> Iterator[torch.device]:
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
    with looking(generator) as device:
        if camera_condition is not None:
            camera_condition = _repeat(camera_condition, len(z)).to(device)
        return generator.mapping(z.to(device), camera_condition, truncation_psi)


def _repeat(camera: Camera, n: int) -> Camera:
    return camera if len(camera.camera_to_world) == n else Camera(*(value.expand(n, -1, -1) for value in camera))


def join(*cameras: Camera) -> Camera:
    """Batches of cameras, one after the other."""
    return Camera(torch.cat([c.camera_to_world for c in cameras]), torch.cat([c.intrinsics for c in cameras]))


def prepare(generator: Any, ws: Tensor) -> list[Any]:
    """Each object ready to be seen from any camera (`Generator.prepare`), for `photograph`."""
    with looking(generator) as device:
        return [generator.prepare(w[None].to(device)) for w in ws]


def photograph(generator: Any, ws: Tensor | list[Any], cameras: Camera, resolution: int, pixels_per_call: int = 4096
               ) -> Images:
    """Pictures, on the CPU, of object i through camera i. One camera, or one object, serves all of the other. What a
    method's Images hold beyond the usual comes along.

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
        with looking(generator) as device:
            part = ws[start:start + batch].to(device) if isinstance(ws, Tensor) else ws[start]
            seen = generator.synthesis(part, cameras[start:start + batch].to(device), resolution)  # type: ignore
        parts.append([getattr(seen, field.name).float().cpu() for field in dataclasses.fields(seen)])
    return type(seen)(*(torch.cat(values) for values in zip(*parts, strict=True)))


def frontal(poses: PosePrior) -> Camera:
    """One camera for all: the middle of the prior. Among 1000 of its cameras, the one that looks along their mean.

    Where they stand all around there is no middle, and the first camera of the prior's path serves. A mapping network
    that sees a camera is shown this one, so that an object stays itself while it turns.
    """
    cameras = poses.sample(1000, torch.Generator().manual_seed(0))
    forward = cameras.camera_to_world[:, :3, 2]
    mean = forward.mean(0)  # as long as 1 if all look the same way, ½ if from everywhere above, 0 from everywhere
    if mean.norm() < 0.7:
        return poses.path(1)
    middle = int((forward @ mean).argmax())
    return cameras[middle:middle + 1]  # type: ignore


def circle(poses: PosePrior, frames: int) -> Camera:
    """The middle camera of the prior on its way around the whole scene, whatever sides the prior knows."""
    camera, target, up = frontal(poses), torch.tensor(poses.target), torch.tensor(AXES[poses.up])  # type: ignore
    position = camera.position[0] - target
    height = (position @ up) * up
    across, ahead = position - height, torch.linalg.cross(up, position)
    angle = 2 * math.pi * torch.arange(frames)[:, None] / frames
    eyes = target + height + angle.cos() * across + angle.sin() * ahead
    return Camera(look_at(eyes, target, poses.up), camera.intrinsics.expand(frames, -1, -1))  # type: ignore


def turns(poses: PosePrior, frames: int, frames_per_turn: int) -> Camera:
    """One camera a frame: the prior's path, once in about `frames_per_turn` frames, so often that it closes."""
    often = max(1, round(frames / frames_per_turn))
    return poses.path(frames)[torch.arange(frames) * often % frames]  # type: ignore


def samples(
    generator: Any, poses: PosePrior, z: Float[Tensor, "b z"], resolution: int, *, truncation_psi: Number = 1.0,
    camera_seed: int = 0, camera_condition: Camera | None = None
) -> tuple[Images, Camera]:
    """Objects z through cameras drawn from the prior, and these cameras.

    Args:
        camera_condition: what the mapping network sees; None: each object its own camera, as in training.
    """
    cameras = poses.sample(len(z), torch.Generator().manual_seed(camera_seed))
    ws = map_latents(generator, z, camera_condition or cameras, truncation_psi)
    return photograph(generator, ws, cameras, resolution), cameras


def orbit(
    generator: Any, ws: Tensor, cameras: Camera, resolution: int, *, depth: bool = True
) -> Iterator[UInt8[Tensor, "h w 3"]]:
    """Frames: the objects ws side by side, all through camera i; below them their depth, in colours that mean the
    same in every frame. Each object is made ready once."""
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


def mix(coarse: Tensor, fine: Tensor, layer: int | None = None) -> Float[Tensor, "r c l d"]:
    """Style mixing (StyleGAN, 2019, sec. 3.1): the ws of every coarse source up to `layer`, of every fine one after it.

    Args:
        coarse, fine: ws `[r l d]` and `[c l d]`.
        layer: how many of the l styles are coarse; None: half of them.
    Raises: ValueError where a generator has no ws a layer, or for a layer that leaves nothing to mix.
    """
    if coarse.ndim != 3 or coarse.shape[1] < 2:
        raise ValueError(f"mixing needs a style for each layer, ws [objects, layers, numbers]; this generator's ws are "
                         f"{tuple(coarse.shape)}: it has none to exchange")
    styles = coarse.shape[1]
    layer = styles // 2 if layer is None else layer
    if not 0 < layer < styles:
        raise ValueError(f"mixing_layer must lie between 1 and {styles - 1} (of {styles} styles), got {layer}")
    r, c = len(coarse), len(fine)
    return torch.cat([coarse[:, None, :layer].expand(-1, c, -1, -1), fine[None, :, layer:].expand(r, -1, -1, -1)], 2)


def mixing(
    generator: Any, coarse: Tensor, fine: Tensor, layer: int | None, cameras: Camera, resolution: int
) -> Iterator[UInt8[Tensor, "h w 3"]]:
    """Frames, one a camera: a table of `mix`, beside each row its coarse source, above each column its fine one.

    Each object is made ready once.
    """
    rows = torch.cat([coarse[:, None], mix(coarse, fine, layer)], 1).flatten(0, 1)
    objects = prepare(generator, torch.cat([fine, rows]))
    for i in range(len(cameras.camera_to_world)):
        shown = pictures.to_uint8(photograph(generator, objects, cameras[i:i + 1], resolution).rgb)
        corner = torch.full_like(shown[:1], 255)
        yield pictures.grid(torch.cat([corner, shown]), 1 + len(fine))


def truncation(
    generator: Any, z: Float[Tensor, "b z"], psis: Sequence[Number], camera: Camera, resolution: int
) -> Float[Tensor, "b p 3 h w"]:
    """Every object at every truncation, all through one camera, which the mapping network sees too."""
    ws = torch.stack([map_latents(generator, z, camera, psi) for psi in psis], 1)
    return photograph(generator, ws.flatten(0, 1), camera, resolution).rgb.unflatten(0, ws.shape[:2])


def interpolate_latents(
    keys: Float[Tensor, "k z"], frames: int, spherical: bool = True
) -> Float[Tensor, "frames z"]:
    """A closed walk over the keys, equal time between each two.

    Args:
        spherical: along great circles, which keeps Gaussian latents as long as Gaussian latents are; else along the
            periodic cubic spline through the keys, which passes them without a kink.
    """
    place = torch.arange(frames, device=keys.device) / frames * len(keys)
    if not spherical:
        from scipy.interpolate import CubicSpline

        closed = torch.cat([keys, keys[:1]]).double().cpu().numpy()
        spline = CubicSpline(range(len(closed)), closed, bc_type="periodic")
        return torch.from_numpy(spline(place.cpu().numpy())).to(keys)
    index = place.long().clamp(max=len(keys) - 1)
    t = (place - index)[:, None]
    start, end = keys[index], keys[(index + 1) % len(keys)]
    cosine = torch.nn.functional.cosine_similarity(start, end, dim=-1)[:, None].clamp(-1, 1)
    angle = torch.acos(cosine)
    sine = torch.sin(angle)
    walk = (torch.sin((1 - t) * angle) * start + torch.sin(t * angle) * end) / sine.clamp_min(1e-6)
    return torch.where(sine < 1e-3, torch.lerp(start, end, t), walk)  # (almost) parallel: straight is as good


def interpolate(
    generator: Any, z_keys: Float[Tensor, "k z"], frames: int, cameras: Camera, resolution: int, *,
    space: Literal["z", "w"] = "z", truncation_psi: Number = 1.0, camera_condition: Camera | None = None
) -> Iterator[UInt8[Tensor, "h w 3"]]:
    """Frames of one object turning into the next, through all keys and back to the first.

    Args:
        cameras: one for all frames, or one a frame.
        space: "z" along great circles between latents, "w" along a spline through mapped latents.
        camera_condition: what the mapping network sees in all frames; None: the first of the cameras.
    """
    seen_by_mapping = camera_condition or cameras[:1]
    if space == "z":
        z = interpolate_latents(z_keys, frames)
        ws = torch.cat([map_latents(generator, part, seen_by_mapping, truncation_psi) for part in z.split(64)])
    else:
        keys = map_latents(generator, z_keys, seen_by_mapping, truncation_psi)
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
    with looking(generator) as device:
        raw_density, _ = generator.field(ws.to(device))(places.to(device), rays.directions[..., None, :].to(device))
    return raw_density[(rays.far > rays.near).to(device)].float().flatten().cpu()
