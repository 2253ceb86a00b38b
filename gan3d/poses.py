"""Pose priors: distributions of cameras, from which a GAN draws the views that its discriminator never sees.

A prior offers `sample(n, generator) -> Camera`, `path(frames) -> Camera` (the orbit that shows this data best),
`angles(camera) -> [b 2]` (polar, azimuth in radians; what a pose head predicts) and `observe(cameras)`, by which the
data set hands over the poses of its photographs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from gan3d.cameras import Camera, Number, intrinsics_from_fov, look_at, sphere_angles, sphere_point


@runtime_checkable
class PosePrior(Protocol):
    def sample(self, n: int, generator: torch.Generator | None = None) -> Camera: ...
    def path(self, frames: int) -> Camera: ...
    def angles(self, camera: Camera) -> Tensor: ...
    def observe(self, cameras: Camera | None) -> None: ...


@dataclass(frozen=True)
class Uniform:
    """An angle between `low` and `high` degrees, all equally likely."""

    low: Number
    high: Number

    def quantile(self, u: Tensor) -> Tensor:
        return torch.deg2rad(self.low + (self.high - self.low) * u)


@dataclass(frozen=True)
class UniformArea:
    """A polar angle between `low` and `high` degrees, equally likely per area of the sphere: uniform in its cosine."""

    low: Number
    high: Number

    def quantile(self, u: Tensor) -> Tensor:
        top, bottom = math.cos(math.radians(self.low)), math.cos(math.radians(self.high))
        return torch.acos((top + (bottom - top) * u).clamp(-1, 1))


@dataclass(frozen=True)
class Gaussian:
    """An angle of the given `mean` and standard deviation `std`, in degrees."""

    mean: Number
    std: Number

    def quantile(self, u: Tensor) -> Tensor:
        return torch.deg2rad(self.mean + self.std * torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)))


@dataclass
class Spherical:
    """Cameras on a sphere (or shell) around `target`, looking at it.

    Args:
        radius: distance from the target in scene units; two numbers for a uniform range.
        azimuth, polar: laws of the two angles (`Uniform`, `UniformArea`, `Gaussian`); see `cameras.sphere_point`.
        fov_degrees: horizontal field of view.
        up: "z" or "y", the axis that points up in this world.
        orbit: azimuths that `path` covers, where the prior's own do not show the object from its sides: a model whose
            objects turn before a fixed camera (GIRAFFE). None: the prior's own.
    """

    radius: Number | Sequence[Number]
    azimuth: Uniform | Gaussian
    polar: Uniform | UniformArea | Gaussian
    fov_degrees: Number
    up: str = "z"
    target: Sequence[Number] = field(default=(0.0, 0.0, 0.0))
    orbit: Uniform | None = None

    def __post_init__(self):
        if self.up not in ("y", "z"):
            raise ValueError(f"up must be 'y' or 'z', got {self.up!r}")

    def camera(self, azimuth: Float[Tensor, " b"], polar: Float[Tensor, " b"], radius: Float[Tensor, " b"]) -> Camera:
        target = torch.tensor(self.target, dtype=torch.float32)
        eye = target + sphere_point(azimuth, polar.clamp(1e-5, math.pi - 1e-5), radius, self.up)
        pose = look_at(eye, target, self.up)
        return Camera(pose, intrinsics_from_fov(self.fov_degrees).repeat(len(eye), 1, 1))

    def sample(self, n: int, generator: torch.Generator | None = None) -> Camera:
        u = torch.rand(3, n, generator=generator)
        low, high = self.radius_range
        return self.camera(self.azimuth.quantile(u[0]), self.polar.quantile(u[1]), low + (high - low) * u[2])

    def path(self, frames: int) -> Camera:
        """A closed orbit: the whole circle where the azimuth covers it, otherwise a swing to ±2 σ (or the ends)."""
        phase = torch.arange(frames) / frames
        law = self.orbit or self.azimuth
        full = isinstance(law, Uniform) and law.high - law.low >= 359
        swing = phase if full else 0.5 + 0.477 * torch.sin(2 * math.pi * phase)  # quantile 0.977 is 2 σ
        polar = self.polar.quantile(torch.full_like(phase, 0.7 if full else 0.5))
        if not full:
            polar = self.polar.quantile(0.5 + 0.3 * torch.cos(2 * math.pi * phase))
        radius = torch.full_like(phase, sum(self.radius_range) / 2)
        return self.camera(law.quantile(swing), polar, radius)

    def angles(self, camera: Camera) -> Float[Tensor, "b 2"]:
        target = camera.position.new_tensor(self.target)
        azimuth, polar = sphere_angles(camera.position - target, self.up)
        return torch.stack([polar, azimuth], dim=-1)

    def observe(self, cameras: Camera | None) -> None:
        """The prior is given in numbers; the data's poses do not change it."""

    @property
    def radius_range(self) -> tuple[Number, Number]:
        return (self.radius[0], self.radius[1]) if isinstance(self.radius, Sequence) else (self.radius, self.radius)

    def __str__(self) -> str:
        laws = [f"{type(law).__name__.lower()}({', '.join(f'{v:g}' for v in vars(law).values())})"
                for law in (self.azimuth, self.polar)]
        return f"azimuth {laws[0]} polar {laws[1]} r {'-'.join(f'{r:g}' for r in sorted(set(self.radius_range)))}"


class FromData:
    """The poses of the data set itself, drawn with replacement. `up` and `target` serve orbits and angles only."""

    def __init__(self, *, up: str = "y", target: Sequence[Number] = (0.0, 0.0, 0.0)):
        self.up, self.target = up, tuple(target)
        self.cameras: Camera | None = None

    def observe(self, cameras: Camera | None) -> None:
        if cameras is None:
            raise ValueError("poses=FromData needs a data set with cameras (dataset.json, transforms.json); this one "
                             "has none. Choose a prior in numbers, for instance gan3d.poses.Spherical.")
        self.cameras = cameras

    def _observed(self) -> Camera:
        if self.cameras is None:
            raise RuntimeError("FromData has no cameras yet: call observe(data.cameras) first")
        return self.cameras

    def sample(self, n: int, generator: torch.Generator | None = None) -> Camera:
        cameras = self._observed()
        return cameras[torch.randint(len(cameras.camera_to_world), (n,), generator=generator)]  # type: ignore

    def path(self, frames: int) -> Camera:
        cameras = self._observed()
        target = torch.tensor(self.target)
        azimuth, polar = sphere_angles(cameras.position - target, self.up)
        radius = (cameras.position - target).norm(dim=-1).median()
        mean = torch.atan2(azimuth.sin().mean(), azimuth.cos().mean())  # angles near ±π belong together
        spread = azimuth - mean
        spread = torch.atan2(spread.sin(), spread.cos())
        phase = 2 * math.pi * torch.arange(frames) / frames
        turn = phase if spread.std() > 1.2 else 2 * spread.std() * torch.sin(phase)  # 1.2 rad: as good as all around
        centre = mean + spread.median() if spread.std() <= 1.2 else torch.zeros(())
        eye = target + sphere_point(centre + turn, polar.median().expand(frames), radius.expand(frames), self.up)
        return Camera(look_at(eye, target, self.up), cameras.intrinsics[:1].expand(frames, -1, -1))

    def angles(self, camera: Camera) -> Float[Tensor, "b 2"]:
        azimuth, polar = sphere_angles(camera.position - camera.position.new_tensor(self.target), self.up)
        return torch.stack([polar, azimuth], dim=-1)

    def __str__(self) -> str:
        return "poses of the data"
