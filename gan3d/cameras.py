"""Pinhole cameras. Axes are OpenCV's (x right, y down, z forward); every other convention ends in `datasets/`."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Number = int | float  # what a config may say where a float is meant
CONDITION_DIM = 25  # numbers of `condition`
AXES = {"x": (1.0, 0.0, 0.0), "y": (0.0, 1.0, 0.0), "z": (0.0, 0.0, 1.0)}


class Camera(NamedTuple):
    """Where a picture is taken from. A NamedTuple, so that it collates and moves between devices.

    camera_to_world: `[*b 4 4]`, rotation columns right, down, forward; the last column is the camera's position.
    intrinsics: `[*b 3 3]`, normalised: fx and cx in image widths, fy and cy in image heights.
    """

    camera_to_world: Tensor
    intrinsics: Tensor

    @property
    def position(self) -> Tensor:
        return self.camera_to_world[..., :3, 3]

    def to(self, device: torch.device | str) -> "Camera":
        return Camera(self.camera_to_world.to(device), self.intrinsics.to(device))

    def __getitem__(self, item):  # camera[3:5] picks cameras of a batch, not members of the tuple
        return Camera(self.camera_to_world[item], self.intrinsics[item])


def condition(camera: Camera) -> Float[Tensor, "b 25"]:
    """A camera as networks are told of it: camera_to_world, then intrinsics, row by row. EG3D (2022), supplement."""
    return torch.cat([camera.camera_to_world.flatten(-2), camera.intrinsics.flatten(-2)], dim=-1)


def intrinsics_from_fov(fov_degrees: Number, aspect: Number = 1.0) -> Float[Tensor, "3 3"]:
    """Normalised intrinsics of a centred camera. `fov_degrees` is horizontal; `aspect` is width / height."""
    if not 0 < fov_degrees < 180:
        raise ValueError(f"fov_degrees must lie between 0 and 180, got {fov_degrees}")
    focal = 0.5 / math.tan(math.radians(fov_degrees) / 2)
    return torch.tensor([[focal, 0.0, 0.5], [0.0, focal * aspect, 0.5], [0.0, 0.0, 1.0]])


def look_at(eye: Float[Tensor, "*b 3"], target: Float[Tensor, "*#b 3"], up: str | Sequence[Number] = "z"):
    """camera_to_world `[*b 4 4]` of a camera at `eye` that sees `target` in its centre, `up` pointing up in the image.

    Straight above or below the target `up` says nothing about the roll; the camera's right is then a fixed axis.
    """
    world_up = eye.new_tensor(AXES[up] if isinstance(up, str) else up).expand_as(eye)
    forward = torch.nn.functional.normalize(target - eye, dim=-1)
    right = torch.linalg.cross(forward, world_up, dim=-1)
    axis = torch.where(forward[..., :1].abs() > 0.9, eye.new_tensor(AXES["y"]), eye.new_tensor(AXES["x"]))
    fallback = axis - (axis * forward).sum(-1, keepdim=True) * forward  # across the view, whatever `up` is
    right = torch.where(right.norm(dim=-1, keepdim=True) < 1e-6, fallback, right)
    right = torch.nn.functional.normalize(right, dim=-1)
    down = torch.linalg.cross(forward, right, dim=-1)
    camera_to_world = torch.eye(4, dtype=eye.dtype, device=eye.device).repeat(*eye.shape[:-1], 1, 1)
    camera_to_world[..., :3, :] = torch.stack([right, down, forward, eye], dim=-1)
    return camera_to_world


def sphere_point(
    azimuth: Float[Tensor, "*b"], polar: Float[Tensor, "*b"], radius: Float[Tensor, "*b"] | Number = 1.0, up: str = "z"
) -> Float[Tensor, "*b 3"]:
    """The point at `azimuth` (radians, from +x towards the other horizontal axis) and `polar` (radians, from `up`)."""
    across, height = torch.sin(polar), torch.cos(polar)
    x, other = across * torch.cos(azimuth), across * torch.sin(azimuth)
    point = torch.stack([x, other, height] if up == "z" else [x, height, other], dim=-1)
    return point * (radius[..., None] if isinstance(radius, Tensor) else radius)


def sphere_angles(point: Float[Tensor, "*b 3"], up: str = "z") -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"]]:
    """(azimuth, polar) of a point, in radians: the inverse of `sphere_point`. Azimuth lies in (−π, π]."""
    x, y, z = torch.nn.functional.normalize(point, dim=-1).unbind(-1)
    other, height = (y, z) if up == "z" else (z, y)
    return torch.atan2(other, x), torch.acos(height.clamp(-1, 1))


def flip_axes(camera_to_world: Float[Tensor, "*b 4 4"]) -> Float[Tensor, "*b 4 4"]:
    """OpenGL or Blender axes (x right, y up, z backward) to OpenCV's, or back: columns 1 and 2 are negated."""
    return camera_to_world * camera_to_world.new_tensor([1.0, -1.0, -1.0, 1.0])


def mirror(camera: Camera) -> Camera:
    """The camera that took the horizontally flipped picture of a world mirrored in its x = 0 plane."""
    sign = camera.camera_to_world.new_tensor(
        [[1.0, -1.0, -1.0, -1.0], [-1.0, 1.0, 1.0, 1.0], [-1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]
    )
    intrinsics = camera.intrinsics.clone()
    intrinsics[..., 0, 1] = -intrinsics[..., 0, 1]
    intrinsics[..., 0, 2] = 1 - intrinsics[..., 0, 2]
    return Camera(camera.camera_to_world * sign, intrinsics)
