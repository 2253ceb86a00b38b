"""The ray caster against shapes whose picture is known in closed form."""

import math

import numpy as np
import pytest
import torch
import trimesh

from datasets import raycast, synthetic
from gan3d.cameras import intrinsics_from_fov, look_at


def camera(eye, fov=30.0):
    pose = look_at(torch.tensor(eye, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    return pose.numpy(), intrinsics_from_fov(fov).double().numpy()


@pytest.fixture(scope="module")
def ball_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("mesh") / "ball.glb"
    mesh = trimesh.creation.icosphere(subdivisions=5, radius=0.4)
    mesh.visual = trimesh.visual.TextureVisuals(
        material=trimesh.visual.material.PBRMaterial(name="body", baseColorFactor=[255, 255, 255, 255]))
    mesh.export(path)
    return path


def balls(path, *spots, grey=0.5):
    """Balls of radius 0.4 · length around the given places, all in one paint."""
    parked = [raycast.Parked(path, *spot) for spot in spots or [()]]
    return raycast.assemble(parked, [np.broadcast_to(grey, 3)] * len(parked))


@pytest.mark.smoke
def test_depth_of_a_ball_is_the_distance_along_the_ray(ball_file):
    pose, lens = camera([1.5, -1.0, 0.8])
    _, depth = raycast.photograph(balls(ball_file), pose, lens, 48, np.random.default_rng(0))
    origin, directions = pose[:3, 3], raycast.pixel_rays(pose, lens, 48)
    along = -(directions @ origin)
    behind = along**2 - (origin @ origin - 0.4**2)
    expected = np.where(behind > 0, along - np.sqrt(behind.clip(0)), 0).reshape(48, 48)
    inner = behind.reshape(48, 48) > 0.01  # away from the rim, where the facets' outline matters
    assert inner.sum() > 300
    assert np.abs(depth - expected)[inner].max() < 2e-3  # the sagitta of the facets
    assert ((depth > 0) == (expected > 0)).mean() > 0.99


def test_a_pixel_half_covered_is_half_transparent_and_keeps_its_colour(ball_file):
    pose, lens = camera([0.0, -2.0, 0.0])
    rgba, _ = raycast.photograph(balls(ball_file, grey=[0.8, 0.1, 0.1]), pose, lens, 64, np.random.default_rng(0))
    alpha = rgba[..., 3]
    assert set(np.unique(alpha)) <= {0, 64, 128, 191, 255} and ((alpha > 0) & (alpha < 255)).any()
    assert rgba[alpha == 0].max() == 0
    rim = rgba[(alpha > 0) & (alpha < 255)].astype(int)
    assert (rim[:, 0] > rim[:, 1]).all()  # straight alpha: red paint stays red at the edge


def test_the_sun_lights_the_side_that_faces_it(ball_file):
    behind = raycast.SUN * -2
    towards, away = (raycast.photograph(balls(ball_file), *camera(list(eye)), 32,
                                        np.random.default_rng(0))[0][16, 16, :3].mean() for eye in (-behind, behind))
    assert towards > 1.5 * away


def test_a_ball_below_a_roof_is_in_shadow_and_occluded():
    ground, roof = trimesh.creation.box([2, 2, 0.1]), trimesh.creation.box([2, 2, 0.1])
    roof.apply_translation([0, 0, 0.3])
    triangles = np.concatenate([ground.triangles, roof.triangles])
    flat = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    normals = np.repeat(flat / np.linalg.norm(flat, axis=-1, keepdims=True), 3, axis=0).reshape(-1, 3, 3)
    count = len(triangles)
    car = raycast.car_of(triangles, normals, np.ones((count, 3)), np.full(count, 2))
    up, down = np.array([[0.0, 0, 1]]), np.array([[0.0, 0, -1]])
    face, distance = raycast.cast(car, np.array([[0.0, 0, 0.2], [0, 0, 2.0]]), np.concatenate([down, down]))
    assert np.allclose(distance, [0.15, 1.65])
    points = np.array([[0.0, 0, 0.05], [0, 0, 0.35]])
    shaded = raycast.shade(car, face, points, np.concatenate([down, down]), np.random.default_rng(0))
    assert (shaded[1] > 2.5 * shaded[0]).all()
    assert car.meet(points + [0, 0, 1e-3], np.concatenate([up, up]), 0.1).tolist() == [-1, -1]  # nothing within reach


def test_a_scene_of_balls_has_the_depth_of_the_nearest_one(ball_file):
    """Two places, lengths and turns; every ray against both spheres in closed form."""
    spots = [((0.5, -0.1), 0.7, 0.5), ((-0.4, 0.3), 3.0, 1.0)]
    pose, lens = camera([2.0, -0.4, 0.9], 50.0)
    _, depth = raycast.photograph(balls(ball_file, *spots), pose, lens, 48, np.random.default_rng(0))
    origin, directions = pose[:3, 3], raycast.pixel_rays(pose, lens, 48)
    expected, safe = np.full(48 * 48, np.inf), np.ones(48 * 48, bool)
    for (x, y), _, length in spots:
        away = np.array([x, y, 0.0]) - origin
        along = directions @ away
        behind = along**2 - (away @ away - (0.4 * length) ** 2)
        expected = np.minimum(expected, np.where(behind > 0, along - np.sqrt(behind.clip(0)), np.inf))
        safe &= np.abs(behind) > 0.02  # away from the rims, where the facets' outline matters
    expected[np.isinf(expected)] = 0
    assert (expected[safe] > 0).sum() > 150
    assert np.abs(depth.ravel() - expected)[safe].max() < 2e-3  # the sagitta of the facets


def test_a_turned_car_is_the_car_seen_by_a_turned_camera():
    """Shape and paint; light stays where it is, so depths are compared, not colours."""
    mesh, yaw = synthetic.MESHES / "glb" / "kenney-van.glb", 0.8
    turn = np.eye(4)
    turn[:2, :2] = [[math.cos(yaw), -math.sin(yaw)], [math.sin(yaw), math.cos(yaw)]]  # from +x towards +y
    pose, lens = camera([2.0, -0.7, 1.0])
    depths = [raycast.photograph(raycast.assemble([raycast.Parked(mesh, yaw=angle)], [np.ones(3)]), seen, lens, 48,
                                 np.random.default_rng(0))[1] for angle, seen in ((0.0, pose), (yaw, turn @ pose))]
    same = np.abs(depths[0] - depths[1]) < 1e-5
    assert (depths[0] > 0).sum() > 200 and same.mean() > 0.995  # Embree decides edges in float32


def test_each_car_of_a_scene_wears_its_own_paint(ball_file):
    parked = [raycast.Parked(ball_file, (0.0, -0.5)), raycast.Parked(ball_file, (0.0, 0.5))]
    scene = raycast.assemble(parked, [np.array([0.8, 0.05, 0.05]), np.array([0.05, 0.05, 0.8])])
    rgba, _ = raycast.photograph(scene, *camera([2.5, 0.0, 0.3], 50.0), 32, np.random.default_rng(0))
    left, right = rgba[16, 10], rgba[16, 21]  # from +x, +y is on the right
    assert left[3] == right[3] == 255 and left[0] > 2 * left[2] and right[2] > 2 * right[0]


def test_paint_is_a_colour_and_follows_the_generator():
    colours = np.array([raycast.paint(np.random.default_rng(seed)) for seed in range(200)])
    assert (colours >= 0).all() and (colours <= 1).all()
    assert np.array_equal(colours[7], raycast.paint(np.random.default_rng(7)))
    spread = colours.max(1) - colours.min(1)
    assert 0.2 < (spread < 0.1).mean() < 0.6  # two in five are grey
    assert math.isclose(colours[spread > 0.1].mean(0).std(), 0, abs_tol=0.1)  # no hue is preferred
