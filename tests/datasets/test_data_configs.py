"""configs/data: every file has the same keys and builds what it names."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from datasets.images import DatasetMissing, ImageCollection
from datasets.sources import EMBEDDED
from gan3d.poses import FromData, Spherical, Uniform, UniformArea
from gan3d.rays import Bounds

FILES = sorted((Path(__file__).parents[2] / "configs" / "data").glob("*.yaml"))
KEYS = {"name", "root", "resolution", "flip", "up", "dataset", "poses", "bounds"}


def load(path, **changes):
    return OmegaConf.merge({"data": OmegaConf.load(path)}, {"data": changes}).data


def test_the_sets_of_the_papers_are_there():
    assert {path.stem for path in FILES} == {
        "afhq", "bfm", "carla", "cars", "cats", "celeba", "celebahq", "chairs", "churches", "clevr2", "clevr2345",
        "compcars", "ffhq", "folder", "parking", "shapenet_cars"}


@pytest.mark.smoke
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_data_config_builds_poses_bounds_and_collection(path, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    config = load(path, root=str(tmp_path), resolution=16)
    assert set(config) == KEYS and config.name == path.stem
    if path.stem in EMBEDDED:
        config.dataset.images = 2
    pictures = instantiate(config.dataset, _convert_="all")
    assert pictures[0].shape == (3, 16, 16) and pictures.name == path.stem
    bounds, poses = (instantiate(config[key], _convert_="all") for key in ("bounds", "poses"))
    assert isinstance(bounds, Bounds)
    if isinstance(poses, FromData):  # radius 1.3, as SRN rendered
        poses.observe(Spherical(1.3, Uniform(0, 360), UniformArea(0, 90), 50, config.up).sample(64))
    camera = poses.sample(64, torch.Generator().manual_seed(0))
    target = torch.tensor(poses.target)
    distance = (camera.position - target).norm(dim=-1)
    assert (distance > bounds.near).all() and (distance < bounds.far).all()  # the target lies between near and far
    toward = ((target - camera.position) * camera.camera_to_world[:, :3, 2]).sum(-1)
    assert torch.allclose(toward, distance, atol=1e-4)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_root_lies_in_data_under_the_name_of_the_set(path):
    raw = OmegaConf.load(path)
    assert OmegaConf.is_missing(raw, "root") if path.stem == "folder" else raw.root == f"data/{path.stem}"


@pytest.mark.parametrize("path", [path for path in FILES if path.stem not in (*EMBEDDED, "folder")],
                         ids=lambda path: path.stem)
def test_a_set_that_is_not_there_names_the_command_that_makes_it(path, tmp_path):
    """The command of the message is that of the file's header."""
    config = load(path, root=str(tmp_path / "nowhere"))
    arguments = {key: value for key, value in config.dataset.items() if key != "_target_"}
    with pytest.raises(DatasetMissing, match=f"python prepare.py {path.stem} ") as caught:
        ImageCollection(**arguments)
    header = path.read_text().split("\nname:")[0]
    assert f"python prepare.py {path.stem}" in header
    assert ("source=WHAT_YOU_DOWNLOADED" in str(caught.value)) == (f"prepare.py {path.stem} source=" in header)


@pytest.mark.parametrize("name", ["chairs", "churches", "clevr2", "clevr2345", "compcars"])
def test_objects_are_seen_by_the_camera_of_giraffe(name):
    """Its distance; all around where objects turn; polar angles from its shares v of the sphere: cos = 1 − 2v."""
    config = load(next(path for path in FILES if path.stem == name), root="x")
    poses = instantiate(config.poses, _convert_="all")
    cameras = poses.sample(4000, torch.Generator().manual_seed(0))
    low, high = {"chairs": (0.05, 0.5), "churches": (0.5, 0.5), "compcars": (0.41667, 0.5)}.get(name, (1 / 3, 1 / 3))
    share = (1 - cameras.position[:, 2] / 2.732) / 2
    assert share.min() == pytest.approx(low, abs=1e-3) and share.max() == pytest.approx(high, abs=1e-3)
    around = torch.rad2deg(torch.atan2(cameras.position[:, 1], cameras.position[:, 0]))
    assert around.abs().max() < 1e-4 if name.startswith("clevr") else around.abs().min() < 1 < 179 < around.abs().max()


@pytest.mark.parametrize("name", ["ffhq", "afhq", "celeba", "celebahq", "bfm", "cats", "folder"])
def test_faces_are_seen_from_the_front_and_may_be_flipped(name):
    config = load(next(path for path in FILES if path.stem == name), root="x")
    poses = instantiate(config.poses, _convert_="all")
    mean = poses.sample(4000, torch.Generator().manual_seed(0)).position.mean(0)
    assert mean[2] > 0.9 and mean[:2].abs().max() < 0.03  # on +z; the standard error of the mean is below 0.006
    assert config.flip
