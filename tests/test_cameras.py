"""Cameras: axes, look_at, angles, mirror images."""

import math

import pytest
import torch

from gan3d.cameras import AXES, Camera, flip_axes, intrinsics_from_fov, look_at, mirror, sphere_angles, sphere_point
from gan3d.rays import Bounds, camera_rays, full_grid

BOUNDS = Bounds(near=0.0, far=10.0)


def random_eyes(n, seed=0):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed)).double()


def random_camera(n=5):
    eyes = random_eyes(n)
    intrinsics = intrinsics_from_fov(40.0).double().repeat(n, 1, 1)
    intrinsics[:, 0, 2], intrinsics[:, 1, 2], intrinsics[:, 0, 1] = 0.4, 0.55, 0.1
    return Camera(look_at(eyes, random_eyes(n, seed=1) / 10, "z"), intrinsics)


@pytest.mark.smoke
@pytest.mark.parametrize("up", ["x", "y", "z", (1.0, 2.0, -0.5)])
def test_look_at_is_a_rotation_that_puts_the_target_in_the_centre_and_up_upwards(up):
    eyes, target = random_eyes(20), torch.tensor([0.1, -0.2, 0.3]).double()
    pose = look_at(eyes, target, up)
    rotation = pose[:, :3, :3]
    identity = torch.eye(3).double().expand(20, 3, 3)
    torch.testing.assert_close(rotation.mT @ rotation, identity, atol=1e-12, rtol=0)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(20).double())
    torch.testing.assert_close(rotation[:, :, 2], torch.nn.functional.normalize(target - eyes, dim=-1))
    world_up = torch.tensor(AXES[up] if isinstance(up, str) else up).double()
    assert (rotation[:, :, 1] @ world_up <= 0).all()  # the image's down
    torch.testing.assert_close(rotation[:, :, 0] @ world_up, torch.zeros(20).double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("up", ["x", "y", "z", (1.0, 1.0, 1.0)])
@pytest.mark.parametrize("side", [1.0, -1.0])
def test_look_at_at_the_pole_is_still_a_rotation(up, side):
    axis = AXES[up] if isinstance(up, str) else up
    pose = look_at(side * torch.tensor(axis), torch.zeros(3), up)
    rotation = pose[:3, :3]
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(3), atol=1e-6, rtol=0)  # float32
    assert torch.linalg.det(rotation) > 0.99


def test_look_at_takes_any_leading_axes():
    eyes = random_eyes(6).reshape(2, 3, 3)
    target = torch.zeros(3).double()
    torch.testing.assert_close(look_at(eyes, target)[1, 2], look_at(eyes[1, 2], target))


@pytest.mark.parametrize("up", ["y", "z"])
def test_sphere_angles_invert_sphere_point(up):
    generator = torch.Generator().manual_seed(0)
    azimuth = (torch.rand(50, generator=generator).double() * 2 - 1) * 3.1
    polar = torch.rand(50, generator=generator).double() * 3 + 0.05
    point = sphere_point(azimuth, polar, torch.full((50,), 2.5).double(), up)
    torch.testing.assert_close(point.norm(dim=-1), torch.full((50,), 2.5).double())
    back = sphere_angles(point, up)
    torch.testing.assert_close(back[0], azimuth)
    torch.testing.assert_close(back[1], polar)


def test_sphere_point_starts_at_x_and_rises_to_up():
    zero, quarter = torch.tensor(0.0), torch.tensor(math.pi / 2)
    for up, height, other in (("z", 2, 1), ("y", 1, 2)):
        torch.testing.assert_close(sphere_point(zero, quarter, 3.0, up), torch.tensor([3.0, 0, 0]), atol=1e-6, rtol=0)
        assert sphere_point(zero, zero, 3.0, up)[height] == 3.0
        torch.testing.assert_close(sphere_point(quarter, quarter, 1.0, up)[other], torch.tensor(1.0))


def test_focal_length_puts_the_image_edge_at_half_the_field_of_view():
    intrinsics = intrinsics_from_fov(90.0, aspect=2.0)
    assert intrinsics[0, 0].item() == pytest.approx(0.5) and intrinsics[1, 1].item() == pytest.approx(1.0)
    assert intrinsics[0, 2] == 0.5 and intrinsics[1, 2] == 0.5
    for wrong in (0.0, 180.0, -10.0):
        with pytest.raises(ValueError, match="fov_degrees"):
            intrinsics_from_fov(wrong)


def test_flip_axes_negates_up_and_backward_and_is_an_involution():
    pose = random_camera().camera_to_world
    flipped = flip_axes(pose)
    torch.testing.assert_close(flipped[:, :, 1:3], -pose[:, :, 1:3])
    assert torch.equal(flipped[:, :, 0], pose[:, :, 0]) and torch.equal(flipped[:, :, 3], pose[:, :, 3])
    assert torch.equal(flip_axes(flipped), pose)


def test_mirror_is_an_involution():
    camera = random_camera()
    twice = mirror(mirror(camera))
    assert torch.equal(twice.camera_to_world, camera.camera_to_world)
    torch.testing.assert_close(twice.intrinsics, camera.intrinsics)
    assert torch.linalg.det(mirror(camera).camera_to_world[:, :3, :3]).min() > 0.99


@pytest.mark.smoke
def test_the_mirrored_camera_sees_the_flipped_picture_of_the_mirrored_world():
    camera, size = random_camera(), (4, 6)
    pixels = full_grid(*size).double().expand(5, -1, -1)

    def world(points, side):
        return torch.sin(points @ torch.tensor([3.0 * side, 5.0, 7.0]).double())

    def picture(camera, side):
        rays = camera_rays(camera, pixels, BOUNDS, size)
        return world(rays.origins + 2 * rays.directions, side).reshape(5, *size)

    torch.testing.assert_close(picture(mirror(camera), -1), picture(camera, 1).flip(-1))


def test_camera_indexing_picks_from_the_batch():
    camera = random_camera()
    assert camera[1:3].camera_to_world.shape == (2, 4, 4) and camera[1:3].intrinsics.shape == (2, 3, 3)
    assert torch.equal(camera[4].position, camera.camera_to_world[4, :3, 3])
    assert isinstance(camera.to("cpu"), Camera)
