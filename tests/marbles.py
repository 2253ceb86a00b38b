"""A compositional generator whose every picture is known: marbles on a plane, one colour each. For tests of editing."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn

from gan3d.gans import Images
from gan3d.poses import Spherical, Uniform
from gan3d.rays import Bounds

OBJECTS = 2


@dataclass(frozen=True)
class MarbleImages(Images):
    object_opacity: torch.Tensor


@dataclass(frozen=True)
class Marble:
    shape: torch.Tensor
    appearance: torch.Tensor
    scale: torch.Tensor
    translation: torch.Tensor
    rotation: torch.Tensor
    presence: torch.Tensor
    background_shape: torch.Tensor
    background_appearance: torch.Tensor
    background_rotation: torch.Tensor


class Marbles(nn.Module):
    """Spheres of radius scale · (1 + shape/10), of colour tanh(appearance); nearer ones hide what is behind."""

    z_dim = OBJECTS * 8 + 5

    def __init__(self, scale: float = 0.12, present: tuple[int, ...] = (1, 1)):
        super().__init__()
        self.scale, self.present = nn.Parameter(torch.tensor(scale)), present
        self.bounds = Bounds(1.0, 4.0)
        self.layout = SimpleNamespace(rotation=[-40, 80], translation=[[-0.5, -0.5, 0], [0.5, 0.5, 0]])

    def mapping(self, z, camera_condition=None, truncation_psi=1.0):
        return truncation_psi * z

    def scene(self, ws):
        objects, background = ws.split([OBJECTS * 8, 5], dim=-1)
        shape, appearance, place, turn, _ = objects.unflatten(-1, (OBJECTS, 8)).split([1, 3, 2, 1, 1], dim=-1)
        u = torch.special.ndtr(torch.cat([place, turn], dim=-1))
        ground = torch.stack([u[..., 0] - 0.5, u[..., 1] - 0.5, torch.zeros_like(u[..., 0])], dim=-1)
        rotation = torch.deg2rad(-40 + 120 * u[..., 2])
        presence = ws.new_tensor(self.present).expand(len(ws), -1)
        return Marble(shape, appearance, self.scale.expand(*shape.shape[:-1], 3), ground, rotation, presence,
                      background[:, :1], background[:, 1:4], background[:, 4])

    def prepare(self, ws):
        return self.scene(ws)

    def synthesis(self, ws, camera, resolution, patch=None):
        scene = self.scene(ws) if isinstance(ws, torch.Tensor) else ws
        local = (scene.translation - camera.position[:, None]) @ camera.camera_to_world[:, :3, :3]
        place = local @ camera.intrinsics.mT  # [b n 3]
        rows, columns = torch.meshgrid(*[(torch.arange(resolution) + 0.5) / resolution] * 2, indexing="ij")
        rgb = torch.tanh(scene.background_appearance)[..., None, None].expand(-1, -1, resolution, resolution)
        clear = torch.ones(len(rgb), resolution, resolution)
        for number in torch.argsort(place[..., 2], dim=1, descending=True).T.reshape(-1, len(rgb)):
            of = torch.arange(len(rgb)), number
            x, y, depth = place[of].unbind(-1)
            radius = scene.scale[of][:, 0] * (1 + scene.shape[of][:, 0] / 10) * camera.intrinsics[:, 0, 0] / depth
            away = torch.stack([columns - (x / depth)[:, None, None], rows - (y / depth)[:, None, None]]).norm(dim=0)
            cover = (away < radius[:, None, None]).float() * scene.presence[of][:, None, None]
            colour = torch.tanh(scene.appearance[of])[..., None, None]
            rgb = cover[:, None] * colour + (1 - cover[:, None]) * rgb
            clear = clear * (1 - cover)
        return MarbleImages(rgb, rgb, 2 * torch.ones_like(clear), torch.ones_like(clear), 1 - clear)


def marble_poses() -> Spherical:
    return Spherical(radius=2.5, azimuth=Uniform(0, 0), polar=Uniform(40, 60), fov_degrees=40)
