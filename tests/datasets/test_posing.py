"""prepare gives cameras to pictures that bring none: through its function, and back in through ImageCollection."""

import json
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from test_prepare import make, read, verb

from datasets.cameras import Framing, from_angles, label_of, mirrored
from datasets.posing import Views

FACE = Framing(2.7, 13.374)


def label(yaw, pitch=0.0, roll=0.0):
    return label_of(from_angles(yaw, pitch, roll, framing=FACE))


def picture(red, size=(16, 16)):
    """All of this red, the left half green as well: so that a mirrored copy is told."""
    image = np.full((size[1], size[0], 3), (red, 0, 0), np.uint8)
    image[:, : size[0] // 2, 1] = 200
    return Image.fromarray(image)


@pytest.fixture
def faces(tmp_path):
    for index in range(3):
        (tmp_path / "faces" / "00000").mkdir(parents=True, exist_ok=True)
        picture(50 + 50 * index).save(tmp_path / "faces" / "00000" / f"{index:05d}.png")
    return tmp_path / "faces"


@pytest.fixture
def published(tmp_path):
    labels = [[f"00000/img{index:08d}.png", label(10 * index, 5, 2)] for index in (0, 2, 7)]
    (tmp_path / "eg3d.json").write_text(json.dumps({"labels": labels}))
    return tmp_path / "eg3d.json"


def colours(pictures):
    return [int(pictures[index][0].max()) for index in range(len(pictures))]


@pytest.mark.smoke
@pytest.mark.parametrize("out", ["out", "out.zip"])
def test_published_cameras_meet_their_pictures(tmp_path, faces, published, out):
    said = make("ffhq", tmp_path, faces, out=tmp_path / out, resolution=8, views=Views(cameras=published))
    assert "2 pictures at 8x8" in said
    assert "2 matched (2 by number); 1 pictures without a camera left out; 1 cameras without a picture" in said
    made = read(tmp_path / out, 8)
    assert colours(made) == [50, 150]
    assert torch.allclose(made.cameras.camera_to_world[1], from_angles(20, 5, 2, framing=FACE).camera_to_world)
    assert json.loads(made._files.read("dataset.json"))["labels"][1] == ["00000/00002.png", label(20, 5, 2)]


def test_ffhq_s_own_crops_are_told_from_those_of_eg3d(tmp_path, faces, published):
    said = make("ffhq", tmp_path, faces, resolution=8, views=Views(cameras=published))
    assert "note: EG3D's cameras of FFHQ" in said and "These pictures are 16x16" in said
    for index in range(3):
        picture(99, (512, 512)).save(faces / "00000" / f"{index:05d}.png")
    views = Views(cameras=published)
    assert "note" not in make("ffhq", tmp_path, faces, resolution=8, out=tmp_path / "eg3d", views=views)
    assert "note" not in make("folder", tmp_path, faces, resolution=8, out=tmp_path / "other", views=views)


def test_limit_counts_pictures_that_have_a_camera(tmp_path, faces, published):
    make("ffhq", tmp_path, faces, resolution=8, limit=2, views=Views(cameras=published))
    assert colours(read(tmp_path / "out", 8)) == [50, 150]


def test_published_cameras_follow_a_crop_and_angles_are_those_of_the_picture_as_written(tmp_path, published):
    (tmp_path / "wide").mkdir()
    picture(50, (16, 8)).save(tmp_path / "wide" / "00000.png")
    make("folder", tmp_path, tmp_path / "wide", resolution=4, views=Views(cameras=published))
    lens = read(tmp_path / "out", 4).cameras.intrinsics[0]
    expected = label(0)[16] * torch.tensor([[2, 0, 0], [0, 1, 0], [0, 0, 0]]) + torch.tensor(
        [[0, 0, 0.5], [0, 0, 0.5], [0, 0, 1]])  # half the width is left
    assert torch.allclose(lens, expected)
    (tmp_path / "pose.csv").write_text("name,yaw,pitch,roll\n0,0,5,2\n")
    views = Views(cameras=tmp_path / "pose.csv", radius=1.5, fov_degrees=90)
    make("folder", tmp_path, tmp_path / "wide", resolution=4, out=tmp_path / "angles", views=views)
    cameras = read(tmp_path / "angles", 4).cameras
    assert torch.allclose(cameras.intrinsics[0, 0, 0], torch.tensor(0.5))
    assert torch.allclose(cameras.position.norm(), torch.tensor(1.5))
    with pytest.raises(ValueError, match="not square need resolution"):
        make("folder", tmp_path, tmp_path / "wide", out=tmp_path / "raw", views=views)


def test_mirrored_copies_show_the_mirrored_picture_from_the_mirrored_camera(tmp_path, faces, published):
    said = make("ffhq", tmp_path, faces, resolution=8, views=Views(cameras=published, mirror=True))
    assert "4 pictures" in said
    made = read(tmp_path / "out", 8)
    names = ["00000/00000.png", "00000/00000_mirror.png", "00000/00002.png", "00000/00002_mirror.png"]
    assert made.names == names
    assert torch.equal(made[3], made[2].flip(-1)) and not torch.equal(made[3], made[2])
    assert dict(json.loads(made._files.read("dataset.json"))["labels"])[names[3]] == mirrored(label(20, 5, 2))
    with pytest.raises(ValueError, match="already holds mirrored copies"):
        make("folder", tmp_path, tmp_path / "out", out=tmp_path / "again", views=Views(mirror=True))


def test_mirroring_needs_no_cameras_and_keeps_what_a_set_has(tmp_path, faces):
    make("folder", tmp_path, faces, views=Views(mirror=True))
    made = read(tmp_path / "out", 16)
    assert len(made) == 6 and made.cameras is None
    picture(1).save(faces / "posed.png")
    (faces / "dataset.json").write_text(json.dumps({"labels": [["posed.png", label(30)]]}))
    make("folder", tmp_path, faces, out=tmp_path / "posed", views=Views(mirror=True))
    posed = json.loads((tmp_path / "posed" / "dataset.json").read_text())["labels"]
    assert [name for name, _ in posed] == ["posed.png", "posed_mirror.png"]
    assert posed[1][1] == pytest.approx(label(-30), abs=1e-6)


def test_pictures_that_no_label_fits_stop_with_both_kinds_of_names(tmp_path, faces):
    (tmp_path / "pose.csv").write_text("name,yaw,pitch,roll\nsomebody,0,0,0\n")
    with pytest.raises(ValueError, match="none of the 3 pictures has a camera.*00000/00000.png.*somebody"):
        make("ffhq", tmp_path, faces, views=Views(cameras=tmp_path / "pose.csv"))
    assert not (tmp_path / "out").exists()


def install(monkeypatch, function):
    module = types.ModuleType("my_poses")
    module.estimate = function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_poses", module)
    return Views(poses="my_poses:estimate", mirror=True)


def test_an_estimator_sees_every_picture_and_may_leave_some_out(tmp_path, faces, monkeypatch):
    views = install(monkeypatch, lambda seen: None if seen[0, 0, 0] == 100 else (int(seen[4, 2, 0]) / 10, 0, 0))
    said = make("folder", tmp_path, faces, resolution=8, views=views)
    assert "4 pictures" in said and "1 pictures whose pose was not found" in said
    labels = dict(json.loads((tmp_path / "out" / "dataset.json").read_text())["labels"])
    assert labels["00000/00002.png"] == label(15) and labels["00000/00000.png"] == label(5)
    assert labels["00000/00002_mirror.png"] == pytest.approx(label(-15), abs=1e-6)


def test_an_estimator_s_weights_are_handed_over_and_its_failure_leaves_nothing(tmp_path, faces, monkeypatch):
    def estimate(seen, weights):
        raise FileNotFoundError(f"no {weights}")

    views = install(monkeypatch, estimate)._replace(weights=tmp_path / "net.pth")
    with pytest.raises(ValueError, match="my_poses:estimate: no .*net.pth"):
        make("folder", tmp_path, faces, resolution=8, views=views)
    assert not (tmp_path / "out").exists()
    both, none = Views(cameras=faces, poses="x:y"), Views(weights=faces)
    for views, message in ((both, "choose one"), (none, "of an estimator")):
        with pytest.raises(ValueError, match=message):
            make("folder", tmp_path, faces, views=views)


def shapenet(folder, size=512):
    for car in ("1a2b", "3c4d"):
        for part in ("rgb", "pose"):
            (folder / car / part).mkdir(parents=True)
        (folder / car / "intrinsics.txt").write_text(f"525.0 256.0 256.0 0.\n0. 0. 0.\n1.\n{size} {size}\n")
        for view in range(2):
            picture(view + 1).convert("RGBA").save(folder / car / "rgb" / f"{view:06d}.png")
            pose = from_angles(20 * view, 10, 0, framing=Framing(1.3, 52)).camera_to_world
            (folder / car / "pose" / f"{view:06d}.txt").write_text(" ".join(map(str, pose.flatten().tolist())))


@pytest.mark.smoke
def test_srn_s_cars_are_read_as_they_ship_and_prepared_into_one_set(tmp_path):
    shapenet(tmp_path / "cars_train")
    with zipfile.ZipFile(tmp_path / "cars_train.zip", "w") as archive:
        for path in sorted((tmp_path / "cars_train").rglob("*.*")):
            archive.write(path, path.relative_to(tmp_path))
    make("shapenet_cars", tmp_path, tmp_path / "cars_train.zip", out=tmp_path / "cars.zip")
    shipped, zipped, made = (read(tmp_path / name, 16) for name in ("cars_train", "cars_train.zip", "cars.zip"))
    for cars in (shipped, zipped, made):
        assert len(cars) == 4 and colours(cars) == [1, 2, 1, 2]
        expected = from_angles(20, 10, 0, framing=Framing(1.3, 52)).camera_to_world
        assert torch.allclose(cars.cameras.camera_to_world[3], expected)
        lens = torch.tensor([[525 / 512, 0, 0.5], [0, 525 / 512, 0.5], [0, 0, 1]])
        assert torch.allclose(cars.cameras.intrinsics[0], lens)
    assert made.names[0].endswith("1a2b/rgb/000000.png")


def test_srn_s_damaged_files_are_named(tmp_path):
    shapenet(tmp_path / "sizes", size=128)
    with pytest.raises(ValueError, match="intrinsics.txt: the centre .* its two sizes disagree"):
        read(tmp_path / "sizes", 16)
    shapenet(tmp_path / "cars")
    (tmp_path / "cars" / "1a2b" / "pose" / "000001.txt").write_text("1 2 3")
    with pytest.raises(ValueError, match="000001.txt must hold 16 finite numbers"):
        read(tmp_path / "cars", 16)
    (tmp_path / "cars" / "1a2b" / "intrinsics.txt").write_text("131.25")
    with pytest.raises(ValueError, match="intrinsics.txt is none of SRN's"):
        read(tmp_path / "cars", 16)


def test_the_verb_takes_cameras_and_its_mistakes_read_as_text(tmp_path, faces):
    (tmp_path / "pose.csv").write_text("id,yaw,pitch,roll\n00001,10,0,0\n")
    done = verb("ffhq", f"source={faces}", "resolution=8", "cameras=pose.csv", "radius=1", "fov=20", "mirror=true",
                "out=made.zip", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    cameras = read(tmp_path / "made.zip", 8).cameras
    assert torch.allclose(cameras.position.norm(dim=-1), torch.ones(2)) and cameras.intrinsics[0, 0, 0] > 2.8
    for wrong, message in (("mirror=yes", "mirror= must be true or false"), ("radius=-1", "radius= needs a positive")):
        done = verb("ffhq", f"source={faces}", "cameras=pose.csv", wrong, "out=other", cwd=tmp_path)
        assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr
