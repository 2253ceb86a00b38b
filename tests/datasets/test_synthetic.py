"""The embedded sets: geometry, determinism, cache, interruption."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from datasets import raycast, synthetic
from datasets.synthetic import EmbeddedCars, ParkedCars
from gan3d.cameras import intrinsics_from_fov
from gan3d.poses import Spherical

CONFIG, PARKING = (OmegaConf.load(Path(synthetic.__file__).parent.parent / "configs" / "data" / f"{name}.yaml")
                   for name in ("cars", "parking"))


def cars(cache, **changes):
    return EmbeddedCars(**{"resolution": 32, "images": 6, "seed": 0, "cache": cache, **changes})


def parking(cache, **changes):
    return ParkedCars(**{"resolution": 32, "images": 6, "seed": 0, "cache": cache, "cars": [2, 5], **changes})


@pytest.fixture(scope="module")
def parked(tmp_path_factory):
    return parking(tmp_path_factory.mktemp("parking"), images=40)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    return cars(tmp_path_factory.mktemp("cars"), images=24)


@pytest.mark.smoke
def test_cars_stand_on_white_before_their_cameras(rendered):
    assert len(rendered) == 24 and rendered[0].shape == (3, 32, 32) and rendered.name == "cars"
    position = rendered.cameras.position - torch.tensor([0, 0, 0.18])
    assert torch.allclose(position.norm(dim=-1), torch.full((24,), 2.35), atol=1e-5)
    elevation = torch.rad2deg(torch.asin(position[:, 2] / 2.35))
    assert elevation.min() >= 2 and elevation.max() <= 80
    assert torch.allclose(rendered.cameras.intrinsics[5], intrinsics_from_fov(30.0))
    for index in range(24):
        image, depth = rendered[index], rendered.depth(index)
        assert (image[:, 0] == 255).all() and (image[:, :, 0] == 255).all()  # nothing touches the border
        assert 0.03 < (depth > 0).float().mean() < 0.5
        seen = depth > 0
        assert image.amin(0)[seen].float().mean() < image.amin(0)[~seen].float().mean() - 50


def test_depth_points_lie_in_the_bounds_of_the_configuration(rendered):
    low, high = torch.tensor(OmegaConf.to_container(CONFIG.bounds.aabb))
    near, far = CONFIG.bounds.near, CONFIG.bounds.far
    for index in range(24):
        camera, depth = rendered.cameras[index], rendered.depth(index).flatten()
        directions = raycast.pixel_rays(camera.camera_to_world.numpy(), camera.intrinsics.numpy(), 32)
        points = camera.position + torch.from_numpy(directions).float() * depth[:, None]
        points = points[depth > 0]
        assert (points > low).all() and (points < high).all()
        assert depth[depth > 0].min() > near and depth.max() < far
        assert points[:, 2].min() < 0.12  # wheels, or the lowest part in sight, near the ground


def test_all_meshes_lie_in_the_bounds_of_the_configuration():
    low, high = np.array(OmegaConf.to_container(CONFIG.bounds.aabb))
    meshes = sorted((synthetic.MESHES / "glb").glob("*.glb"))
    assert len(meshes) == 25
    target = np.array(CONFIG.poses.target)
    for mesh in meshes:
        corners = raycast.load_car(mesh).triangles.reshape(-1, 3)
        assert (corners > low).all() and (corners < high).all()
        reach = np.linalg.norm(corners - target, axis=-1).max()
        assert CONFIG.bounds.near < CONFIG.poses.radius - reach and CONFIG.poses.radius + reach < CONFIG.bounds.far


@pytest.mark.parametrize("config, poses", [(CONFIG, synthetic.POSES), (PARKING, synthetic.PARKING_POSES)],
                         ids=["cars", "parking"])
def test_the_configuration_states_the_prior_that_rendered(config, poses):
    from hydra.utils import instantiate

    resolved = OmegaConf.create({"data": config})
    prior = instantiate(resolved.data.poses, _convert_="all")
    assert isinstance(prior, Spherical) and str(prior) == str(poses) and prior.up == poses.up
    assert list(prior.target) == list(poses.target) and prior.fov_degrees == poses.fov_degrees


def test_pictures_are_those_of_their_version(rendered):
    """Digests of the first eight pictures and of everything written about them, taken when version 1 was fixed. Other
    bytes, on purpose or not, ask for another VERSION: runs compare by it."""
    assert synthetic.VERSION == 1
    pictures = b"".join(rendered[index].numpy().tobytes() for index in range(8))
    assert hashlib.sha256(pictures).hexdigest().startswith("408ec06d2a24aa53")
    depth = np.load(rendered.root / "depth.npy")[:8]
    assert hashlib.sha256(depth.tobytes()).hexdigest().startswith("6b7b2c936e7e6990")
    told = json.loads((rendered.root / "dataset.json").read_text())
    assert told["models"][:4] == ["qreal-sportscar", "qbasic-taxi", "qreal-taxi", "qbasic-taxi"]


def test_a_picture_depends_on_seed_and_index_alone(rendered, tmp_path):
    fewer = cars(tmp_path)
    assert all(torch.equal(fewer[i], rendered[i]) for i in range(6))
    assert torch.equal(fewer.cameras.camera_to_world, rendered.cameras.camera_to_world[:6])
    assert not torch.equal(cars(tmp_path, seed=1)[0], fewer[0])


def test_processes_render_what_one_process_renders(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    many = cars(tmp_path / "many", images=128, resolution=8)  # 128: two workers of 64
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    one = cars(tmp_path / "one", images=128, resolution=8)
    assert all(torch.equal(one[i], many[i]) for i in range(128))
    assert one.fingerprint == many.fingerprint


def test_workers_that_cannot_run_are_done_without(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.warns(UserWarning, match="rendering goes on in this one"):
        assert len(cars(tmp_path, images=128, resolution=4)) == 128


def test_a_second_use_reads_the_cache(tmp_path, monkeypatch):
    first = cars(tmp_path)
    monkeypatch.setattr(raycast, "take", None)
    again = cars(tmp_path)
    assert again.fingerprint == first.fingerprint and torch.equal(again[3], first[3])
    assert torch.equal(again.depth(3), first.depth(3))


def test_an_interrupted_rendering_leaves_nothing_and_starts_afresh(tmp_path, monkeypatch):
    take, calls = raycast.take, []

    def interrupted(task):
        calls.append(task)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return take(task)

    monkeypatch.setattr(raycast, "take", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cars(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    monkeypatch.setattr(raycast, "take", take)
    (tmp_path / ".rendering-left-by-a-kill" / "images").mkdir(parents=True)
    assert len(cars(tmp_path)) == 6
    assert not list(tmp_path.glob(".rendering-*"))


def test_held_out_cars_are_other_models(tmp_path, rendered):
    held_out = cars(tmp_path, held_out=True, images=10)
    models = {kind.root.name: set(json.loads((kind.root / "dataset.json").read_text())["models"])
              for kind in (rendered, held_out)}
    train, test = models.values()
    assert test <= set(synthetic.HELD_OUT) and not train & test


def test_another_resolution_shows_the_same_cars(tmp_path, rendered):
    large = cars(tmp_path, images=3, resolution=64)
    for index in range(3):
        shrunk = torch.nn.functional.avg_pool2d(large[index][None].float(), 2)[0]
        assert (shrunk - rendered[index].float()).abs().mean() < 6  # grey levels; the sampling differs


def test_the_ray_caster_needs_no_torch():
    code = "import sys, datasets.raycast; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(synthetic.__file__).parent.parent).returncode == 0


def tasks(monkeypatch, cache, images, **changes):
    """The plan of such a set, undrawn."""
    made = []
    monkeypatch.setattr(synthetic, "_render_set", lambda root, plan, models, unit: made.extend(plan))
    with pytest.raises(FileNotFoundError):
        parking(cache, images=images, **changes)
    return made


@pytest.mark.smoke
def test_two_to_five_cars_stand_on_white_and_all_are_listed(parked):
    told = json.loads((parked.root / "dataset.json").read_text())
    counts = [len(models) for models in told["models"]]
    assert parked.name == "parking" and set(counts) == {2, 3, 4, 5}
    assert not {model for models in told["models"] for model in models} & set(synthetic.HELD_OUT)
    position = parked.cameras.position
    assert torch.allclose(position.norm(dim=-1), torch.full((40,), 2.732), atol=1e-5)
    assert (position[:, 1].abs() < 1e-6).all() and (position[:, 0] > 0).all()  # all on +x
    polar = torch.rad2deg(torch.acos(position[:, 2] / 2.732))
    assert polar.min() >= 60 and polar.max() <= 70
    shown = torch.tensor([float((parked.depth(index) > 0).float().mean()) for index in range(40)])
    few, many = (shown[[n in which for n in counts]].mean() for which in ((2,), (5,)))
    assert 1.5 < many / few < 3.5  # 5/2, but for what hides and stands far away
    for index in range(40):
        image, seen = parked[index], parked.depth(index) > 0
        border = torch.cat([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], 1)
        assert (border == 255).all()  # all cars are in the picture
        assert image.amin(0)[seen].float().mean() < image.amin(0)[~seen].float().mean() - 50


def test_parked_cars_lie_in_the_bounds_of_the_configuration(parked):
    low, high = torch.tensor(OmegaConf.to_container(PARKING.bounds.aabb))
    for index in range(40):
        camera, depth = parked.cameras[index], parked.depth(index).flatten()
        directions = raycast.pixel_rays(camera.camera_to_world.numpy(), camera.intrinsics.numpy(), 32)
        points = (camera.position + torch.from_numpy(directions).float() * depth[:, None])[depth > 0]
        assert (points > low).all() and (points < high).all()
        assert depth[depth > 0].min() > PARKING.bounds.near and depth.max() < PARKING.bounds.far


def test_no_two_parked_cars_touch_and_every_turn_and_place_occurs(monkeypatch, tmp_path):
    """Their outlines, point by point, for 60 full places."""
    plan = tasks(monkeypatch, tmp_path, 60, cars=[5, 5])
    gaps = []
    for task in plan:
        outlines = []
        for car in task.cars:
            corners = raycast.assemble([car], [np.ones(3)]).triangles.reshape(-1, 3)[:, :2]
            assert np.linalg.norm(corners, axis=-1).max() < 1  # the round place that the cameras see
            outlines.append(corners)
        for i, one in enumerate(outlines):
            for j, other in enumerate(outlines[:i]):
                axis = np.subtract(task.cars[j].place, task.cars[i].place)
                axis /= np.linalg.norm(axis)
                gaps.append((other @ axis).min() - (one @ axis).max())  # a line between them
    assert len(gaps) == 600 and min(gaps) > 0
    yaws, places = (np.array([getattr(car, key) for task in plan for car in task.cars]) for key in ("yaw", "place"))
    assert np.histogram(yaws, 6, (0, 2 * np.pi))[0].min() > 25  # of 300: 50 expected, standard deviation 6.5
    assert np.abs(places.mean(0)).max() < 0.1 and places.std(0).min() > 0.3  # standard error of the mean: 0.02


def test_a_parking_depends_on_seed_and_index_alone(parked, tmp_path):
    fewer = parking(tmp_path)
    assert all(torch.equal(fewer[i], parked[i]) for i in range(6))
    assert torch.equal(fewer.cameras.camera_to_world, parked.cameras.camera_to_world[:6])
    assert not torch.equal(parking(tmp_path, seed=1)[0], fewer[0])
    assert parking(tmp_path, cars=[1, 1]).root != fewer.root


def test_impossible_numbers_of_cars_are_refused(tmp_path):
    for cars_ in ([0, 2], [3, 2], [2, 9]):
        with pytest.raises(ValueError, match=r"cars must be \[fewest, most\]"):
            parking(tmp_path, cars=cars_)
