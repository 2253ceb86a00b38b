"""A generator whose every picture is known: a solid ball around the origin, one colour from z. For tests of viewers."""

import torch
from torch import nn

from gan3d.cost import Cost
from gan3d.gans import Images
from gan3d.poses import Spherical, Uniform
from gan3d.rays import Bounds, camera_rays, full_grid
from gan3d.rendering import query
from gan3d.sampling import deltas, spread
from gan3d.volume import accumulate, composite


class Ball(nn.Module):
    """radius in scene units; draws random numbers when it renders, which a viewer must not let out."""

    z_dim = 3

    def __init__(self, radius: float = 0.5, samples_per_ray: int = 32):
        super().__init__()
        self.radius, self.samples_per_ray = nn.Parameter(torch.tensor(radius)), samples_per_ray
        self.bounds = Bounds(1.0, 3.0)
        self.calls = []

    def mapping(self, z, camera_condition=None, truncation_psi=1.0):
        return truncation_psi * z

    def prepare(self, ws):
        return ws

    def field(self, ws):
        def ask(points, directions):
            raw_density = 200 * (self.radius - points.norm(dim=-1))
            colour = torch.sigmoid(ws)[:, None, None, :].expand(*points.shape)
            return raw_density, colour

        return ask

    def synthesis(self, ws, camera, resolution, patch=None):
        self.calls.append((len(ws), torch.is_grad_enabled()))
        torch.rand(7)
        rays = camera_rays(camera, full_grid(resolution, resolution), self.bounds, (resolution, resolution))
        t = spread(rays, self.samples_per_ray)
        raw_density, colour = query(self.field(ws), rays, t)
        seen = accumulate(composite(raw_density.relu(), deltas(t)), colour, t, (1.0, 1.0, 1.0))
        side = (resolution, resolution)
        rgb = 2 * seen.features.transpose(1, 2).unflatten(-1, side) - 1
        return Images(rgb, rgb, seen.depth.unflatten(-1, side), seen.opacity.unflatten(-1, side))

    def regularizers(self, ready, camera, images, step):
        return {}

    def before_step(self, step):
        pass

    def cost(self, resolution):
        return Cost(resolution**2, self.samples_per_ray, 10)


def ball_poses() -> Spherical:
    return Spherical(radius=2.0, azimuth=Uniform(0, 360), polar=Uniform(60, 90), fov_degrees=40)
