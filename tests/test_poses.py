"""Pose priors: the papers' reference poses, and the statistics of the laws."""

import math

import pytest
import torch

from gan3d.cameras import Camera, flip_axes, intrinsics_from_fov, look_at
from gan3d.poses import FromData, Gaussian, Spherical, Uniform, UniformArea

GRAF = {"radius": 10.0, "azimuth": Uniform(0, 360), "polar": UniformArea(0, 85), "fov_degrees": 30.0, "up": "z"}
PIGAN = {"radius": 1.0, "azimuth": Gaussian(90, 17.2), "polar": Gaussian(90, 8.9), "fov_degrees": 12.0, "up": "y"}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.smoke
def test_graf_pose_matches_the_reference():
    """u = 0.1, v = 0.4, r = 10 in the authors' code; their camera axes are OpenGL's."""
    azimuth, polar = torch.tensor([2 * math.pi * 0.1]), torch.arccos(torch.tensor([1 - 2 * 0.4]))
    pose = flip_axes(Spherical(**GRAF).camera(azimuth, polar, torch.tensor([10.0])).camera_to_world)[0]
    expected = torch.tensor([[-0.58778525, -0.1618034, 0.79267153, 7.92671532],
                             [0.80901699, -0.11755705, 0.57590958, 5.75909579], [0.0, 0.9797959, 0.2, 2.0]])
    torch.testing.assert_close(pose[:3], expected, atol=2e-6, rtol=1e-6)  # float32


def test_pigan_pose_matches_the_reference():
    """pitch 1.3, yaw 1.2 in the authors' code."""
    pose = flip_axes(Spherical(**PIGAN).camera(torch.tensor([1.2]), torch.tensor([1.3]), torch.ones(1)).camera_to_world)
    expected = torch.tensor([[0.9320391, -0.0969303, 0.3491528, 0.3491528], [0.0, 0.9635582, 0.2674988, 0.2674988],
                             [-0.3623577, -0.2493194, 0.8980739, 0.8980739]])
    torch.testing.assert_close(pose[0, :3], expected, atol=1e-6, rtol=0)


def test_the_frontal_pigan_camera_looks_along_minus_z():
    pose = Spherical(**PIGAN).camera(*torch.full((2, 1), math.pi / 2), torch.ones(1)).camera_to_world[0]
    expected = torch.eye(4)
    expected[2, 3] = 1  # stands at +z; in OpenGL's axes it is not turned at all
    torch.testing.assert_close(flip_axes(pose), expected, atol=1e-6, rtol=0)


def test_grafs_uniform_v_is_a_polar_law_by_area():
    """CARLA: v up to 0.456422 is 85 degrees; celebA starts at v = 0.328990, which is 70 degrees."""
    law = UniformArea(0, 85)
    v = torch.tensor([0.0, 0.1, 0.4, 0.456422])
    torch.testing.assert_close(law.quantile(v / 0.456422), torch.arccos(1 - 2 * v), atol=1e-4, rtol=0)
    assert math.degrees(math.acos(1 - 2 * 0.328990)) == pytest.approx(70, abs=1e-3)


def test_area_law_is_uniform_on_the_sphere():
    camera = Spherical(**{**GRAF, "polar": UniformArea(0, 180), "radius": 1.0}).sample(40_000, seeded())
    position = camera.position
    # mean 0, covariance 1/3, and each coordinate uniform in [-1, 1] (Archimedes); 5 σ of the mean
    assert position.mean(0).abs().max() < 5 * math.sqrt(1 / 3 / 40_000)
    torch.testing.assert_close(position.T @ position / 40_000, torch.eye(3) / 3, atol=0.01, rtol=0)
    for height in (-0.5, 0.0, 0.5):
        assert (position[:, 2] < height).float().mean().item() == pytest.approx((height + 1) / 2, abs=0.0125)  # 5 σ


def test_polar_limits_hold():
    prior = Spherical(**{**GRAF, "polar": UniformArea(70, 85)})
    polar = prior.angles(prior.sample(2000, seeded()))[:, 0]
    assert math.radians(70) - 1e-3 <= polar.min() and polar.max() <= math.radians(85) + 1e-3
    expected = (math.cos(math.radians(70)) + math.cos(math.radians(85))) / 2
    assert polar.cos().mean().item() == pytest.approx(expected, abs=0.01)


def test_gaussian_law_has_its_mean_and_standard_deviation():
    law = Gaussian(90, 17.2)
    angle = torch.rad2deg(law.quantile(torch.rand(40_000, generator=seeded()).double()))
    assert angle.mean().item() == pytest.approx(90, abs=5 * 17.2 / 200)  # 5 σ of the mean of 40,000
    assert angle.std().item() == pytest.approx(17.2, rel=0.02)
    assert torch.isfinite(law.quantile(torch.tensor([0.0, 1.0]))).all()


def test_cameras_look_at_the_target_from_radii_in_the_range():
    prior = Spherical(radius=(9.5, 10.5), azimuth=Uniform(0, 90), polar=UniformArea(70, 85), fov_degrees=10.0,
                      target=(1.0, 2.0, 3.0))
    camera = prior.sample(500, seeded())
    ray = torch.tensor([1.0, 2.0, 3.0]) - camera.position
    radius = ray.norm(dim=-1)
    assert 9.5 - 1e-4 <= radius.min() < 9.6 and 10.4 < radius.max() <= 10.5 + 1e-4
    torch.testing.assert_close(camera.camera_to_world[:, :3, 2], ray / radius[:, None], atol=1e-5, rtol=0)
    torch.testing.assert_close(camera.intrinsics[7], intrinsics_from_fov(10.0))


def test_sampling_follows_the_generator():
    prior = Spherical(**GRAF)
    first, again, other = (prior.sample(4, seeded(seed)).camera_to_world for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.allclose(first, other)


@pytest.mark.parametrize("settings", [GRAF, PIGAN], ids=["graf", "pigan"])
def test_angles_give_back_what_made_the_camera(settings):
    prior = Spherical(**settings)
    azimuth, polar = torch.tensor([0.3, 1.2, 2.0]), torch.tensor([0.4, 1.3, 1.6])
    angles = prior.angles(prior.camera(azimuth, polar, torch.ones(3)))
    torch.testing.assert_close(angles, torch.stack([polar, azimuth], -1), atol=1e-5, rtol=0)  # float32 arccos


def test_a_camera_above_the_pole_is_finite_and_a_rotation():
    rotation = Spherical(**GRAF).camera(torch.zeros(2), torch.tensor([0.0, math.pi]), torch.ones(2)).camera_to_world
    rotation = rotation[:, :3, :3]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).expand(2, 3, 3), atol=1e-6, rtol=0)


def test_paths_go_around_a_full_prior_and_swing_over_a_narrow_one():
    around = Spherical(**GRAF).path(36)
    azimuth = torch.rad2deg(Spherical(**GRAF).angles(around)[:, 1]) % 360
    torch.testing.assert_close(azimuth.sort().values, torch.arange(36) * 10.0, atol=1e-2, rtol=0)
    assert around.position[:, 2].std() < 1e-5
    swing = Spherical(**PIGAN).angles(Spherical(**PIGAN).path(40))
    spread = torch.rad2deg(swing[:, 1]) - 90
    assert spread.max().item() == pytest.approx(2 * 17.2, rel=0.02)  # quantile 0.977
    assert spread.min().item() == pytest.approx(-2 * 17.2, rel=0.02)
    position = Spherical(**PIGAN).path(40).position
    step = position.diff(dim=0, append=position[:1]).norm(dim=-1)
    assert step.max() < 0.15  # closed: the last frame is next to the first


def test_an_orbit_of_its_own_goes_where_the_prior_does_not():
    """Cameras before which objects turn (GIRAFFE) stand at one azimuth; the path shows the object from its sides."""
    fixed = {**GRAF, "azimuth": Uniform(0, 0)}
    around, swing = Spherical(**fixed, orbit=Uniform(0, 360)), Spherical(**fixed, orbit=Uniform(-35, 35))
    torch.testing.assert_close(around.path(36).camera_to_world, Spherical(**GRAF).path(36).camera_to_world)
    azimuth = torch.rad2deg(swing.angles(swing.path(40))[:, 1])
    assert azimuth.max().item() == pytest.approx(35 * 0.954, abs=0.01)  # quantile 0.977
    assert azimuth.min().item() == pytest.approx(-35 * 0.954, abs=0.01)
    still = Spherical(**fixed).sample(9, seeded())
    for prior in (around, swing):
        assert torch.equal(prior.sample(9, seeded()).camera_to_world, still.camera_to_world)
    assert Spherical(**fixed).path(5).position[:, 1].abs().max() < 1e-5


def test_an_unknown_up_is_refused_and_the_prior_names_itself():
    with pytest.raises(ValueError, match="up must be"):
        Spherical(**{**GRAF, "up": "x"})
    assert str(Spherical(**GRAF)) == "azimuth uniform(0, 360) polar uniformarea(0, 85) r 10"


def observed(azimuth, up="z"):
    eye = torch.stack([azimuth.cos(), azimuth.sin(), torch.full_like(azimuth, 0.2)], -1) * 2
    return Camera(look_at(eye, torch.zeros(3), up), intrinsics_from_fov(20.0).repeat(len(eye), 1, 1))


def test_poses_from_data_are_the_datas_own():
    prior = FromData(up="z")
    with pytest.raises(RuntimeError, match="observe"):
        prior.sample(1)
    with pytest.raises(ValueError, match="needs a data set with cameras"):
        prior.observe(None)
    cameras = observed(torch.linspace(0, 1, 7))
    prior.observe(cameras)
    drawn = prior.sample(200, seeded()).camera_to_world
    matches = (drawn[:, None] == cameras.camera_to_world[None]).flatten(2).all(-1)
    assert (matches.sum(1) == 1).all() and matches.any(0).all()  # each is one of the data's, and all of them come


@pytest.mark.parametrize("centre", [0.5, math.pi], ids=["plain", "across ±π"])
def test_the_path_of_a_narrow_data_set_swings_about_its_middle(centre):
    azimuth = centre + torch.linspace(-0.3, 0.3, 101)
    prior = FromData(up="z")
    prior.observe(observed(azimuth))
    path = prior.path(40)
    turn = torch.atan2(path.position[:, 1], path.position[:, 0]) - centre
    turn = torch.atan2(turn.sin(), turn.cos())
    assert turn.max().item() == pytest.approx(2 * azimuth.std().item(), rel=0.02)
    assert turn.min().item() == pytest.approx(-2 * azimuth.std().item(), rel=0.02)


def test_the_path_of_a_data_set_all_around_goes_all_around():
    prior = FromData(up="z")
    prior.observe(observed(torch.arange(60) / 60 * 2 * math.pi))
    position = prior.path(36).position
    assert position[:, :2].mean(0).abs().max() < 1e-3
    torch.testing.assert_close(position.norm(dim=-1), prior.cameras.position.norm(dim=-1).median().expand(36))
