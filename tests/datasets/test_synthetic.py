"""The embedded cars: geometry, determinism, cache, interruption."""

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
from datasets.synthetic import EmbeddedCars
from gan3d.cameras import intrinsics_from_fov
from gan3d.poses import Spherical

CONFIG = OmegaConf.load(Path(synthetic.__file__).parent.parent / "configs" / "data" / "cars.yaml")


def cars(cache, **changes):
    return EmbeddedCars(**{"resolution": 32, "images": 6, "seed": 0, "cache": cache, **changes})


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


def test_the_configuration_states_the_prior_that_rendered(rendered):
    from hydra.utils import instantiate

    resolved = OmegaConf.create({"data": CONFIG})
    prior = instantiate(resolved.data.poses, _convert_="all")
    assert isinstance(prior, Spherical) and str(prior) == str(synthetic.POSES)
    assert list(prior.target) == list(synthetic.POSES.target) and prior.fov_degrees == synthetic.POSES.fov_degrees


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
