"""The ray caster against shapes whose picture is known in closed form."""

import math

import numpy as np
import pytest
import torch
import trimesh

from datasets import raycast
from gan3d.cameras import intrinsics_from_fov, look_at


def camera(eye, fov=30.0):
    pose = look_at(torch.tensor(eye, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    return pose.numpy(), intrinsics_from_fov(fov).double().numpy()


@pytest.fixture(scope="module")
def ball(tmp_path_factory):
    path = tmp_path_factory.mktemp("mesh") / "ball.glb"
    mesh = trimesh.creation.icosphere(subdivisions=5, radius=0.4)
    mesh.visual = trimesh.visual.TextureVisuals(
        material=trimesh.visual.material.PBRMaterial(name="body", baseColorFactor=[255, 255, 255, 255]))
    mesh.export(path)
    return raycast.load_car(path)


@pytest.mark.smoke
def test_depth_of_a_ball_is_the_distance_along_the_ray(ball):
    pose, lens = camera([1.5, -1.0, 0.8])
    _, depth = raycast.photograph(ball, np.array([0.5, 0.2, 0.2]), pose, lens, 48, np.random.default_rng(0))
    origin, directions = pose[:3, 3], raycast.pixel_rays(pose, lens, 48)
    along = -(directions @ origin)
    behind = along**2 - (origin @ origin - 0.4**2)
    expected = np.where(behind > 0, along - np.sqrt(behind.clip(0)), 0).reshape(48, 48)
    inner = behind.reshape(48, 48) > 0.01  # away from the rim, where the facets' outline matters
    assert inner.sum() > 300
    assert np.abs(depth - expected)[inner].max() < 2e-3  # the sagitta of the facets
    assert ((depth > 0) == (expected > 0)).mean() > 0.99


def test_a_pixel_half_covered_is_half_transparent_and_keeps_its_colour(ball):
    pose, lens = camera([0.0, -2.0, 0.0])
    rgba, _ = raycast.photograph(ball, np.array([0.8, 0.1, 0.1]), pose, lens, 64, np.random.default_rng(0))
    alpha = rgba[..., 3]
    assert set(np.unique(alpha)) <= {0, 64, 128, 191, 255} and ((alpha > 0) & (alpha < 255)).any()
    assert rgba[alpha == 0].max() == 0
    rim = rgba[(alpha > 0) & (alpha < 255)].astype(int)
    assert (rim[:, 0] > rim[:, 1]).all()  # straight alpha: red paint stays red at the edge


def test_the_sun_lights_the_side_that_faces_it(ball):
    behind = raycast.SUN * -2
    towards, away = (raycast.photograph(ball, np.array([0.5, 0.5, 0.5]), *camera(list(eye)), 32,
                                        np.random.default_rng(0))[0][16, 16, :3].mean() for eye in (-behind, behind))
    assert towards > 1.5 * away


def test_a_ball_below_a_roof_is_in_shadow_and_occluded():
    ground, roof = trimesh.creation.box([2, 2, 0.1]), trimesh.creation.box([2, 2, 0.1])
    roof.apply_translation([0, 0, 0.3])
    triangles = np.concatenate([ground.triangles, roof.triangles])
    scene = raycast.EmbreeScene()
    raycast.TriangleMesh(scene, triangles.astype(np.float32))
    flat = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    normals = np.repeat(flat / np.linalg.norm(flat, axis=-1, keepdims=True), 3, axis=0).reshape(-1, 3, 3)
    count = len(triangles)
    car = raycast.Car(triangles, flat, normals, np.ones((count, 3)), np.full(count, 2), scene)
    up, down = np.array([[0.0, 0, 1]]), np.array([[0.0, 0, -1]])
    face, distance = raycast.cast(car, np.array([[0.0, 0, 0.2], [0, 0, 2.0]]), np.concatenate([down, down]))
    assert np.allclose(distance, [0.15, 1.65])
    points = np.array([[0.0, 0, 0.05], [0, 0, 0.35]])
    shaded = raycast.shade(car, np.ones(3), face, points, np.concatenate([down, down]), np.random.default_rng(0))
    assert (shaded[1] > 2.5 * shaded[0]).all()
    assert car.meet(points + [0, 0, 1e-3], np.concatenate([up, up]), 0.1).tolist() == [-1, -1]  # nothing within reach


def test_paint_is_a_colour_and_follows_the_generator():
    colours = np.array([raycast.paint(np.random.default_rng(seed)) for seed in range(200)])
    assert (colours >= 0).all() and (colours <= 1).all()
    assert np.array_equal(colours[7], raycast.paint(np.random.default_rng(7)))
    spread = colours.max(1) - colours.min(1)
    assert 0.2 < (spread < 0.1).mean() < 0.6  # two in five are grey
    assert math.isclose(colours[spread > 0.1].mean(0).std(), 0, abs_tol=0.1)  # no hue is preferred
