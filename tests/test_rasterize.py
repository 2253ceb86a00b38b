import math

import pytest
import torch

from gan3d import rasterize as module
from gan3d.cameras import Camera, intrinsics_from_fov, look_at
from gan3d.rasterize import rasterize
from gan3d.rays import Bounds, camera_rays, full_grid

EVERYWHERE = Bounds(0.0, 100.0)


def camera(eye=(0.0, 0.0, -2.0), fov: float = 90.0) -> Camera:
    return Camera(look_at(torch.tensor(eye), torch.zeros(3), "y"), intrinsics_from_fov(fov))


def shell(rows: int, columns: int, radius: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """A sphere of rows × columns cells, counter-clockwise from outside."""
    polar, azimuth = torch.meshgrid(torch.linspace(0, math.pi, rows + 1), torch.linspace(0, 2 * math.pi, columns + 1),
                                    indexing="ij")
    azimuth = torch.where(azimuth > 6.2831, 0.0, azimuth)  # the seam's two sides are the same points
    across = torch.where((polar == 0) | (polar > 3.1415), 0.0, torch.sin(polar))
    points = radius * torch.stack([across * torch.cos(azimuth), torch.cos(polar), -across * torch.sin(azimuth)], -1)
    a = (torch.arange(rows)[:, None] * (columns + 1) + torch.arange(columns)).flatten()
    below, right = a + columns + 1, a + 1
    return points.flatten(0, 1), torch.cat([torch.stack([a, below, right], -1),
                                            torch.stack([right, below, below + 1], -1)])


SQUARE = torch.tensor([[-1.0, -1.0, 0.0], [1.0, -1.0, 0.0], [1.0, 1.0, 0.0], [-1.0, 1.0, 0.0]])
SQUARE_FACES = torch.tensor([[0, 1, 2], [0, 2, 3]])


@pytest.mark.smoke
@pytest.mark.parametrize("grid", ["centre", "corner", "integer"])
def test_a_square_fills_its_pixels_exactly(grid):
    # 2 away, fov 90°: the picture is 4 wide there, and the square covers image coordinates ¼ to ¾. Of 32 pixels those
    # at (i + ½)/32 and i/31 are 8 … 23; of those at i/32, 8 and 24 lie on its sides, and one of the two belongs to it
    hits = rasterize(SQUARE, SQUARE_FACES, camera(), (32, 32), EVERYWHERE, grid)
    seen = hits.triangle >= 0
    rows, columns = seen.any(1).nonzero()[:, 0].tolist(), seen.any(0).nonzero()[:, 0].tolist()
    assert int(seen.sum()) == 16 * 16 and len(rows) == len(columns) == 16
    if grid != "integer":
        assert rows == columns == list(range(8, 24))
    rays = camera_rays(camera(), full_grid(32, 32), EVERYWHERE, (32, 32), grid)
    distance = (2 / rays.directions[:, 2]).unflatten(0, (32, 32))
    places = rays.origins.unflatten(0, (32, 32)) + rays.directions.unflatten(0, (32, 32)) * distance[..., None]
    assert torch.allclose(hits.interpolate(SQUARE_FACES, SQUARE)[seen], places[seen], atol=1e-6)  # float32 rays
    assert torch.allclose(hits.t[seen].float(), distance[seen], atol=1e-6)
    assert torch.allclose(hits.barycentrics[seen].sum(-1), torch.ones(256, dtype=torch.float64))
    assert (hits.barycentrics[~seen] == 0).all() and (hits.t[~seen] == 0).all()


def test_the_nearer_of_two_triangles_hides_the_other():
    near = torch.tensor([[-9.0, -9.0, 0.0], [0.0, -9.0, 0.0], [0.0, 9.0, 0.0], [-9.0, 9.0, 0.0]])
    far = torch.tensor([[-9.0, -9.0, 1.0], [9.0, -9.0, 1.0], [9.0, 9.0, 1.0], [-9.0, 9.0, 1.0]])
    vertices, faces = torch.cat([far, near]), torch.cat([SQUARE_FACES, SQUARE_FACES + 4])
    hits = rasterize(vertices, faces, camera(), (16, 16), EVERYWHERE)
    left, right = hits.triangle[:, :8] >= 2, hits.triangle[:, 8:] >= 2  # which side x < 0 is on is the camera's affair
    assert left.all() != right.all() and left.any() != right.any()
    beyond = rasterize(vertices, faces, camera(), (16, 16), Bounds(3.5, 100.0))  # the near one is at most √12 away
    assert (beyond.triangle >= 0).float().mean() < 1 and (beyond.triangle < 2).all()
    assert (rasterize(vertices, faces, camera(), (16, 16), Bounds(0.0, 1.9)).triangle == -1).all()


def test_of_equal_triangles_the_first_is_seen():
    twice = torch.cat([SQUARE_FACES, SQUARE_FACES])
    assert torch.equal(rasterize(SQUARE, twice, camera(), (32, 32), EVERYWHERE).triangle,
                       rasterize(SQUARE, SQUARE_FACES, camera(), (32, 32), EVERYWHERE).triangle)


def test_every_ray_through_a_side_or_a_corner_meets_one_triangle():
    # a fan of eight triangles around the centre of the picture, sides along rows, columns and diagonals of pixels
    ring = torch.tensor([[1, 0], [1, 1], [0, 1], [-1, 1], [-1, 0], [-1, -1], [0, -1], [1, -1]]).float()
    vertices = torch.cat([torch.zeros(1, 3), torch.cat([ring, torch.zeros(8, 1)], -1)])
    claimed = torch.zeros(33, 33)
    for i in range(8):
        for face in ([0, 1 + i, 1 + (i + 1) % 8], [1 + (i + 1) % 8, 1 + i, 0]):  # either way round
            claimed += rasterize(vertices, torch.tensor([face]), camera(), (33, 33), EVERYWHERE, "corner").triangle >= 0
    assert (claimed[9:24, 9:24] == 2).all()  # x = ±1 are rows and columns 8 and 24: i/32·4 − 2
    assert claimed[:8].sum() == claimed[25:].sum() == 0


def test_a_sphere_is_a_disc_without_holes_at_the_right_distance():
    side, distance = 96, 3.0
    at = camera((0.3, 1.2, -math.sqrt(distance**2 - 0.3**2 - 1.2**2)), 60.0)
    vertices, faces = shell(64, 128)
    front = rasterize(vertices, faces, at, (side, side), EVERYWHERE, front_only=True)
    rays = camera_rays(at, full_grid(side, side), EVERYWHERE, (side, side))
    along = -(rays.origins * rays.directions).sum(-1)
    height = (rays.origins + along[:, None] * rays.directions).norm(dim=-1).unflatten(0, (side, side))
    seen = front.triangle >= 0
    sagitta = (2 * math.pi / 128) ** 2 / 4  # cells of 2π/128 both ways lie at most so far below the sphere
    assert seen[height < 1 - sagitta].all() and not seen[height > 1].any()
    exact = along.unflatten(0, (side, side)) - (1 - height**2).clamp_min(0).sqrt()
    middle = height < 0.8  # where a ray is at most 53° off the normal: sagitta/0.6 along it
    assert (front.t[middle] - exact[middle]).min() > -1e-6 and (front.t[middle] - exact[middle]).max() < sagitta / 0.6
    whole = rasterize(vertices, faces, at, (side, side), EVERYWHERE)
    inner = height < 1 - sagitta
    assert torch.equal(whole.triangle[inner], front.triangle[inner])  # a closed surface shows its outside only


def test_front_only_sees_the_inside_of_a_sphere_turned_inside_out():
    vertices, faces = shell(16, 32)
    back = rasterize(vertices, faces.flip(-1), camera((0.0, 0.0, -3.0), 40.0), (32, 32), EVERYWHERE, front_only=True)
    t = back.t[back.triangle >= 0]  # the far half, from the outline √8 away to the middle 4 away; cells lie within
    assert t.min() > 8**0.5 - 0.05 and 3.95 < t.max() < 4


def test_the_ground_reaches_from_behind_the_camera_to_the_horizon():
    ground = torch.tensor([[-1e4, -1.0, -1e4], [1e4, -1.0, -1e4], [1e4, -1.0, 1e4], [-1e4, -1.0, 1e4]])
    hits = rasterize(ground, SQUARE_FACES, camera(), (32, 32), Bounds(0.0, 1e6))
    assert (hits.triangle[:16] == -1).all() and (hits.triangle[16:] >= 0).all()
    rays = camera_rays(camera(), full_grid(32, 32), EVERYWHERE, (32, 32))
    exact = (-1 / rays.directions[:, 1]).unflatten(0, (32, 32))[16:]
    assert torch.allclose(hits.t[16:].float(), exact, rtol=1e-5)
    behind = ground * torch.tensor([1.0, 1.0, 0.0]) + torch.tensor([0.0, 0.0, -5.0])
    assert (rasterize(behind, SQUARE_FACES, camera(), (8, 8), EVERYWHERE).triangle == -1).all()


def brute_force(vertices, faces, rays):
    """Möller and Trumbore's test of every ray with every triangle."""
    a, b, c = vertices.double()[faces].unbind(1)
    d, o = rays.directions.double()[:, None], rays.origins.double()[:, None]
    p = torch.linalg.cross(d, (c - a)[None].expand(len(d), -1, -1))
    determinant = ((b - a) * p).sum(-1)
    u = ((o - a) * p).sum(-1) / determinant
    q = torch.linalg.cross(o - a, (b - a)[None].expand(len(d), -1, -1))
    v, t = (d * q).sum(-1) / determinant, ((c - a) * q).sum(-1) / determinant
    t = torch.where((u >= 0) & (v >= 0) & (u + v <= 1) & (t > 0), t, torch.inf)
    nearest = t.min(-1)
    return torch.where(nearest.values.isfinite(), nearest.indices, -1), nearest.values


@pytest.mark.parametrize("pairs", [1 << 20, 37])
def test_a_heap_of_triangles_looks_as_every_ray_with_every_triangle(monkeypatch, pairs):
    monkeypatch.setattr(module, "PAIRS_PER_CALL", pairs)  # 37: chunks end in the middle of triangles
    random = torch.Generator().manual_seed(0)
    centres = 4 * torch.rand(60, 1, 3, generator=random) - 2  # around the camera, too
    vertices = (centres + torch.randn(60, 3, 3, generator=random)).flatten(0, 1)
    faces = torch.arange(180).view(60, 3)
    at = camera((0.1, 0.2, -1.0))
    hits = rasterize(vertices, faces, at, (24, 16), EVERYWHERE)
    double = Camera(at.camera_to_world.double(), at.intrinsics.double())
    triangle, t = brute_force(vertices, faces, camera_rays(double, full_grid(24, 16), EVERYWHERE, (24, 16)))
    assert torch.equal(hits.triangle.flatten(), triangle)
    assert torch.allclose(hits.t.flatten()[triangle >= 0], t[triangle >= 0], rtol=1e-9)


def test_an_empty_mesh_is_not_seen():
    hits = rasterize(SQUARE, SQUARE_FACES[:0], camera(), (4, 5), EVERYWHERE)
    assert hits.triangle.shape == (4, 5) and (hits.triangle == -1).all()
