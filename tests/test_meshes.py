import math
import struct

import numpy as np
import pytest
import torch
import trimesh
from ball import Ball, ball_poses

from gan3d import meshes, views
from gan3d.cameras import Camera, intrinsics_from_fov, look_at
from gan3d.poses import Gaussian, Spherical, Uniform
from gan3d.rays import Bounds
from gan3d.rendering import query
from gan3d.sampling import deltas, spread
from gan3d.volume import accumulate, composite

CUBE = torch.tensor([[-0.8, -0.8, -0.8], [0.8, 0.8, 0.8]])
COLOUR = torch.tensor([[2.0, 0.0, -2.0]])  # the ball's, before its sigmoid


class Slope(Ball):
    """raw density x + 10 y + 100 z: it says where it was asked."""

    def field(self, ws):
        def ask(points, directions):
            return points @ points.new_tensor([1.0, 10.0, 100.0]), (directions + 0 * points + 1) / 2

        return ask


def cameras(n: int = 32) -> Camera:
    return ball_poses().sample(n, torch.Generator().manual_seed(0))


def ready(generator: Ball):
    return views.prepare(generator, COLOUR)[0]


def ball_mesh(resolution: int = 32) -> tuple[Ball, meshes.Grid, meshes.Mesh]:
    ball = Ball()
    grid = meshes.density_grid(ball, ready(ball), CUBE, resolution, cameras())
    return ball, grid, meshes.extract(grid, 0.0)


def solid(mesh: meshes.Mesh) -> trimesh.Trimesh:
    return trimesh.Trimesh(mesh.vertices.numpy(), mesh.faces.numpy(), process=False)


@pytest.mark.smoke
def test_the_mesh_of_a_ball_is_a_sphere():
    _, grid, mesh = ball_mesh()
    assert grid.voxel == pytest.approx(0.05)
    distance = mesh.vertices.norm(dim=-1)
    # along an edge the distance to the centre bends by at most h²/(8 r), a tenth of half a voxel
    assert (distance - 0.5).abs().max() < grid.voxel**2 / (8 * 0.45)
    outwards = (mesh.normals * mesh.vertices).sum(-1) / distance
    assert outwards.min() > 0.99 and torch.allclose(mesh.normals.norm(dim=-1), torch.ones(len(distance)), atol=1e-5)


def test_the_mesh_of_a_ball_is_closed_and_faces_outwards():
    sphere = solid(ball_mesh()[2])
    assert sphere.is_watertight and sphere.is_winding_consistent and sphere.euler_number == 2
    exact = 4 / 3 * math.pi * 0.5**3
    assert 0.98 * exact < sphere.volume < exact  # inscribed, hence smaller; negative if it faced inwards


def test_an_object_that_leaves_the_box_is_closed_at_its_edge():
    ball = Ball()
    half = torch.tensor([[-0.8, -0.8, 0.0], [0.8, 0.8, 0.8]])
    grid = meshes.density_grid(ball, ready(ball), half, 32, cameras())
    mesh = solid(meshes.extract(grid, 0.0))
    assert grid.raw_density.shape == (32, 32, 16)
    assert mesh.is_watertight and mesh.euler_number == 2
    assert mesh.volume == pytest.approx(2 / 3 * math.pi * 0.5**3, rel=0.06)  # the lid is up to half a voxel off


def test_voxels_are_asked_at_their_centres(monkeypatch):
    slope, box = Slope(), torch.tensor([[-0.1, -0.2, -0.05], [0.1, 0.2, 0.05]])
    grid = meshes.density_grid(slope, ready(slope), box, 8, cameras())
    assert grid.raw_density.shape == (4, 8, 2) and grid.voxel == pytest.approx(0.05)
    assert torch.allclose(grid.origin, box[0] + 0.025)
    index = torch.stack(torch.meshgrid(*(torch.arange(n) for n in (4, 8, 2)), indexing="ij"), -1)
    exact = (grid.origin + grid.voxel * index) @ torch.tensor([1.0, 10.0, 100.0])
    assert torch.allclose(grid.raw_density, exact, atol=1e-5)  # float32 of numbers up to 5
    monkeypatch.setattr(meshes, "POINTS_PER_CALL", 5)  # two lines at a time
    assert torch.equal(meshes.density_grid(slope, ready(slope), box, 8, cameras()).raw_density, grid.raw_density)


def test_a_point_is_seen_in_the_picture_between_near_and_far():
    pose = look_at(torch.tensor([[0.0, 0.0, -2.0]]), torch.zeros(3), "y")
    camera = Camera(pose, intrinsics_from_fov(90)[None])  # sees |x|, |y| up to the distance
    points = torch.tensor([[0.0, 0.0, 0.0], [1.9, 0.0, 0.0], [2.1, 0.0, 0.0], [0.0, -2.1, 0.0], [0.0, 0.0, -1.1],
                           [0.0, 0.0, -0.9], [0.0, 0.0, 1.1], [0.0, 0.0, -3.5]])
    expected = [True, True, False, False, False, True, False, False]
    assert meshes.seen_by_any(points, camera, Bounds(1.0, 3.0)).tolist() == expected
    planar = meshes.seen_by_any(torch.tensor([[1.9, 1.9, 0.5]]), camera, Bounds(1.0, 3.0, planar=True))
    assert planar.tolist() == [True]  # 3.7 along its ray, 2.5 along the axis
    boxed = Bounds(1.0, 3.0, aabb=[[-0.5, -0.5, -0.5], [0.5, 0.5, 0.5]])
    assert meshes.seen_by_any(points[:2], camera, boxed).tolist() == [True, False]
    other = look_at(torch.tensor([[2.0, 0.0, 0.0]]), torch.zeros(3), "y")
    both = views.join(camera, Camera(other, camera.intrinsics))
    assert meshes.seen_by_any(points[3:7], both, Bounds(1.0, 3.0)).tolist() == [False, True, True, True]


def test_the_box_is_no_larger_than_what_cameras_see():
    ahead = Camera(look_at(torch.tensor([[0.0, 0.0, -2.0]]), torch.zeros(3), "y"), intrinsics_from_fov(40)[None])
    ball = Ball()
    ball.box = 1.8
    step = 1.8 / 64
    ball.bounds = Bounds(1.0, 2.0)
    (left, top, near), (right, bottom, far) = meshes.sampled_box(ball, ahead).tolist()
    assert near == pytest.approx(-0.9, abs=step) and far == pytest.approx(0.0, abs=step)  # 2 ahead of the camera
    # widest where the edge of the picture, 20° off the axis, is 2 away
    assert [-left, right, -top, bottom] == pytest.approx([2 * math.sin(math.radians(20))] * 4, abs=step)
    away = look_at(torch.tensor([[0.0, 0.0, -2.0]]), torch.tensor([0.0, 0.0, -3.0]), "y")
    with pytest.raises(ValueError, match="choose mesh_box"):
        meshes.sampled_box(ball, Camera(away, ahead.intrinsics))


def test_what_no_camera_sees_counts_as_empty():
    class Full(Ball):
        def field(self, ws):
            return lambda points, directions: (points[..., 2] + 5, torch.zeros_like(points))  # dense everywhere

    full = Full()
    narrow = Spherical(radius=2.0, azimuth=Uniform(0, 360), polar=Uniform(60, 90), fov_degrees=20)
    around = narrow.sample(32, torch.Generator().manual_seed(0))
    grid = meshes.density_grid(full, ready(full), CUBE, 16, around)
    assert grid.raw_density[0, 0, 0] == grid.raw_density.min() and grid.raw_density[8, 8, 8] > 5
    index = torch.stack(torch.meshgrid(*[torch.arange(16)] * 3, indexing="ij"), -1).flatten(0, 2)
    seen = meshes.seen_by_any(grid.origin + grid.voxel * index, around, full.bounds)
    assert grid.unseen == pytest.approx(1 - seen.float().mean()) and 0.1 < grid.unseen < 1
    mesh = solid(meshes.extract(grid, float(grid.raw_density.min()) + 1e-3))
    assert mesh.is_watertight and np.linalg.norm(mesh.vertices, axis=1).min() > 2 * math.sin(math.radians(10)) - 0.2
    with pytest.raises(ValueError, match="no camera sees"):
        meshes.density_grid(full, ready(full), CUBE + 10, 4, around)
    with pytest.raises(ValueError, match="min corner, max corner"):
        meshes.density_grid(full, ready(full), CUBE.flip(0), 4, around)


def test_the_box_is_the_bounds_or_the_planes_or_the_ball_that_cameras_see():
    ball = Ball()
    away = Spherical(radius=2.0, azimuth=Uniform(0, 360), polar=Gaussian(60, 10), fov_degrees=40, target=(1.0, 0, 0.5))
    seen = away.sample(16, torch.Generator().manual_seed(0))
    exact = torch.tensor([1.0, 0.0, 0.5]) + torch.tensor([[-1.0], [1.0]])  # near 1, far 3
    wide = Camera(seen.camera_to_world, intrinsics_from_fov(100).expand(16, -1, -1))  # its corners, too
    assert torch.allclose(meshes.sampled_box(ball, wide), exact, atol=1e-5)
    ball.box = 1.5
    around = ball_poses().sample(16, torch.Generator().manual_seed(0))  # beyond ±0.75 behind the middle
    assert torch.allclose(meshes.sampled_box(ball, around), torch.tensor([[-0.75] * 3, [0.75] * 3]))
    ball.bounds = Bounds(1.0, 3.0, aabb=[[-1, -2, -3], [1, 2, 4]])
    assert meshes.sampled_box(ball, seen).tolist() == [[-1, -2, -3], [1, 2, 4]]


def test_the_level_is_half_of_where_rays_end():
    ball = Ball(samples_per_ray=2048)
    path = ball_poses().path(2)
    narrow = Camera(path.camera_to_world, intrinsics_from_fov(1.0).expand(2, -1, -1))  # all rays through the centre
    # density 200 x at depth x: transmittance exp(−100 x²), mean depth √π/20, where the density is 10 √π
    level = meshes.surface_level(ball, ready(ball), narrow, 4)
    assert level == pytest.approx(5 * math.sqrt(math.pi), rel=0.02)  # samples are 0.001 apart, 1 % of that depth


def test_a_generator_states_its_own_level():
    ball = Ball()
    ball.surface_level = 3.5
    assert meshes.surface_level(ball, ready(ball), cameras(2), 4) == 3.5


def folded(degrees: float) -> meshes.Mesh:
    """Two squares, each of two triangles, that share a side and meet at such an angle."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    vertices = torch.tensor([[0.0, 0, 0], [0, 1, 0], [1, 0, 0], [1, 1, 0], [1 + c, 0, s], [1 + c, 1, s]])
    faces = torch.tensor([[0, 2, 1], [2, 3, 1], [2, 4, 3], [4, 5, 3]])
    return meshes.Mesh(vertices, faces, torch.zeros(6, 3))


@pytest.mark.parametrize("degrees", [0.0, 30.0, 150.0])
def test_roughness_is_the_mean_angle_between_faces_by_the_length_of_their_edge(degrees):
    # the fold is 1 long, the squares' two diagonals are flat
    assert meshes.roughness(folded(degrees)) == pytest.approx(degrees / (1 + 2 * math.sqrt(2)), abs=1e-4)


def test_roughness_of_a_sphere_falls_with_the_voxels_and_rises_with_noise():
    coarse, fine = ball_mesh(16)[2], ball_mesh(32)[2]
    assert meshes.roughness(fine) == pytest.approx(meshes.roughness(coarse) / 2, rel=0.1)
    rng = torch.Generator().manual_seed(0)
    moved = fine.vertices + 0.01 * torch.randn(fine.vertices.shape, generator=rng)
    noisy = meshes.Mesh(moved, fine.faces, fine.normals)
    assert meshes.roughness(noisy) > 5 * meshes.roughness(fine)
    turned = meshes.Mesh(fine.vertices, fine.faces.roll(1, -1).flip(0), fine.normals)
    assert meshes.roughness(turned) == pytest.approx(meshes.roughness(fine))
    mirrored = trimesh.Trimesh(fine.vertices.numpy(), fine.faces.numpy(), process=False)  # an independent measure
    lengths = np.linalg.norm(np.diff(fine.vertices.numpy()[mirrored.face_adjacency_edges], axis=1)[:, 0], axis=-1)
    expected = np.degrees(np.average(mirrored.face_adjacency_angles, weights=lengths))
    assert meshes.roughness(fine) == pytest.approx(expected, rel=1e-3)


def test_a_mesh_of_one_face_has_no_roughness():
    with pytest.raises(ValueError, match="no two of the mesh's 1 faces"):
        meshes.roughness(meshes.Mesh(torch.eye(3), torch.tensor([[0, 1, 2]]), torch.eye(3)))


class Seen(Ball):
    """A ball that says how it is rendered, before a coloured background."""

    background = torch.tensor([0.2, 0.5, 0.9])

    def render(self, field, rays):
        t = spread(rays, self.samples_per_ray)
        raw_density, features = query(field, rays, t)
        return accumulate(composite(raw_density.relu(), deltas(t)), features, t, self.background)


def test_depth_spread_is_the_standard_deviation_along_opaque_rays():
    path = ball_poses().path(2)
    narrow = Camera(path.camera_to_world, intrinsics_from_fov(1.0).expand(2, -1, -1))
    ball = Seen(samples_per_ray=2048)
    # density 200 x at depth x: transmittance exp(−100 x²), of variance (1 − π/4)/100
    exact = math.sqrt((1 - math.pi / 4) / 100)
    assert meshes.depth_spread(ball, ready(ball), narrow, 4) == pytest.approx(exact, rel=0.02)  # samples 0.001 apart
    with pytest.raises(ValueError, match="no ray of these cameras"):
        ghost = Seen(radius=-1.0)
        meshes.depth_spread(ghost, ready(ghost), narrow, 4)
    with pytest.raises(ValueError, match="Ball has no render"):
        meshes.depth_spread(Ball(), ready(ball), narrow, 4)


def test_what_closes_a_ray_before_the_background_is_no_surface():
    class Misty(Ball):
        def field(self, ws):
            def ask(points, directions):
                raw_density, colour = super(Misty, self).field(ws)(points, directions)
                return raw_density.clamp_min(1e-3), colour

            return ask

    misty, path = Misty(samples_per_ray=256), ball_poses().path(2)  # most pixels miss the ball and end at the far side
    assert misty.synthesis(ready(misty), path[:1], 16).opacity.min() > 0.99
    assert meshes.surface_level(misty, ready(misty), path, 32) > 1


def test_an_object_without_a_surface_is_refused():
    with pytest.raises(ValueError, match="nowhere half opaque"):
        meshes.surface_level(Ball(radius=-1.0), ready(Ball()), cameras(2), 4)
    _, grid, _ = ball_mesh(8)
    low, high = float(grid.raw_density.min()), float(grid.raw_density.max())
    for level in (low - 1, high + 1):
        with pytest.raises(ValueError, match=f"from {low:.4g} to {high:.4g}"):
            meshes.extract(grid, level)


def test_vertices_have_the_colour_of_the_field():
    ball, _, mesh = ball_mesh(8)
    rgb = meshes.vertex_colours(ball, ready(ball), mesh, 0.0, 0.1)
    assert torch.allclose(rgb, torch.sigmoid(COLOUR).expand_as(rgb))
    ball.colour = lambda ws, features: 1 - features  # a method whose features are not colours says what is
    assert torch.allclose(meshes.vertex_colours(ball, ready(ball), mesh, 0.0, 0.1), 1 - rgb)


def test_vertices_are_looked_at_from_above():
    mesh = ball_mesh(8)[2]
    assert torch.allclose(meshes.vertex_colours(Slope(), ready(Slope()), mesh, 0.0, 0.1), (1 - mesh.normals) / 2,
                          atol=1e-6)


def test_the_colour_is_that_of_the_place_where_a_ray_comes_to_rest():
    class Rings(Ball):
        def field(self, ws):
            return lambda points, directions: (super(Rings, self).field(ws)(points, directions)[0],
                                               points.norm(dim=-1, keepdim=True).expand(points.shape))

    rings, (_, grid, _) = Rings(), ball_mesh(48)
    mesh = meshes.extract(grid, 6.0)  # at radius 0.47; density 12 lies at 0.44
    rgb = meshes.vertex_colours(rings, ready(rings), mesh, 6.0, 0.06)
    # places are 0.004 apart, vertices up to 0.0003 off, and the first place that is dense enough lies at most one below
    assert rgb.max() <= 0.4401 and rgb.min() > 0.44 - 0.004 - 0.0003
    rgb = meshes.vertex_colours(rings, ready(rings), mesh, 6.0, 0.015)  # does not come so far: the densest place
    assert torch.allclose(rgb, torch.tensor(0.455), atol=1e-3)


def test_a_ply_holds_places_normals_and_colours(tmp_path):
    vertices = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    normals, rgb = torch.tensor([[0.0, 0.0, 1.0]]).expand(3, 3), torch.tensor([[1.0, 0.5, 0.0]]).expand(3, 3)
    path = meshes.write_ply(tmp_path / "a.ply", meshes.Mesh(vertices, torch.tensor([[0, 1, 2]]), normals, rgb))
    header, body = path.read_bytes().split(b"end_header\n")
    lines = header.decode().splitlines()
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    assert "element vertex 3" in lines and "element face 1" in lines
    fields = [line.split()[2] for line in lines if line.startswith("property") and "list" not in line]
    assert fields[:9] == ["x", "y", "z", "nx", "ny", "nz", "red", "green", "blue"]
    record = np.dtype([("place", "<f4", 3), ("normal", "<f4", 3), ("rgb", "u1", 3), ("rest", "u1", len(fields) - 9)])
    read = np.frombuffer(body, record, 3)
    assert np.array_equal(read["place"], vertices) and np.array_equal(read["normal"], normals)
    assert read["rgb"].tolist() == [[255, 128, 0]] * 3
    assert struct.unpack("<B3i", body[3 * record.itemsize:]) == (3, 0, 1, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["a.ply"]


def test_an_mrc_holds_the_grid_where_it_lies(tmp_path):
    values = torch.arange(24.0).reshape(2, 3, 4)
    path = meshes.write_mrc(tmp_path / "a.mrc", meshes.Grid(values, torch.tensor([-1.0, 0.5, 2.0]), 0.25))
    file = path.read_bytes()
    assert len(file) == 1024 + 24 * 4

    def word(number, kind, count=3):  # the standard counts words of 4 bytes from 1
        return struct.unpack(f"<{count}{kind}", file[4 * number - 4:4 * number - 4 + 4 * count])

    assert word(1, "i", 4) == (2, 3, 4, 2) and word(8, "i") == (2, 3, 4)  # columns, rows, sections, mode; the cell
    assert word(11, "f") == (0.5, 0.75, 1.0) and word(14, "f") == (90, 90, 90) and word(17, "i") == (1, 2, 3)
    assert word(20, "f") == (0, 23, 11.5) and word(23, "i", 2) == (1, 0) and word(50, "f") == (-1.0, 0.5, 2.0)
    assert file[208:216] == b"MAP \x44\x44\x00\x00" and word(55, "f", 1)[0] == pytest.approx(values.std(correction=0))
    assert word(28, "i", 1) == (20140,)
    read = np.frombuffer(file, "<f4", offset=1024).reshape(4, 3, 2)
    assert np.array_equal(read.transpose(2, 1, 0), values)
