"""Cameras for pictures that come without: where a turned head appears, which label belongs to which picture."""

import json
import math
import sys
import types
import zipfile

import numpy as np
import pytest
import torch

from datasets import cameras
from datasets.cameras import Framing, camera_of, from_angles, label_of, match, read
from datasets.sources import Source
from gan3d.cameras import mirror

FACE = Framing(radius=2.7, fov_degrees=13.374)
NOSE, CROWN = (0.0, 0.0, 0.1), (0.0, 0.1, 0.0)  # of a head at the origin that looks to +z


def seen(camera, point):
    """Where a point of the world appears, in picture sides from the centre: to the right, and up."""
    inside = torch.linalg.inv(camera.camera_to_world.double()) @ torch.tensor([*point, 1.0], dtype=torch.float64)
    x, y, _ = camera.intrinsics.double() @ (inside[:3] / inside[2])
    return float(x - 0.5), float(0.5 - y)


def label(index, intrinsics=None):
    """A label like no other's."""
    made = from_angles(index, -2 * index, 0.5 * index, framing=FACE)
    return label_of(made if intrinsics is None else made._replace(intrinsics=intrinsics))


def test_a_frontal_head_is_seen_from_plus_z_upright():
    camera = from_angles(0, 0, 0, framing=FACE)
    assert torch.allclose(camera.position, torch.tensor([0, 0, 2.7]), atol=1e-6)
    assert seen(camera, (0, 0, 0)) == pytest.approx((0, 0), abs=1e-7)
    right, up = seen(camera, CROWN)
    assert right == pytest.approx(0, abs=1e-6) and up == pytest.approx(4.2647 * 0.1 / 2.7, abs=1e-5)


@pytest.mark.smoke
@pytest.mark.parametrize("turn", [5, 40, 80])
def test_the_nose_points_where_the_angles_say(turn):
    # On a sphere around the head the nose appears at focal · 0.1 · sin(turn) / (2.7 − 0.1 · cos(turn)) from the centre.
    far = 4.26465 * 0.1 * math.sin(math.radians(turn)) / (2.7 - 0.1 * math.cos(math.radians(turn)))
    for angles, expected in (((turn, 0, 0), (far, 0)), ((-turn, 0, 0), (-far, 0)),
                             ((0, turn, 0), (0, far)), ((0, -turn, 0), (0, -far))):
        assert seen(from_angles(*angles, framing=FACE), NOSE) == pytest.approx(expected, abs=2e-5)  # focal: 4 decimals


@pytest.mark.parametrize("turn", [-30, 10, 60])
def test_a_positive_roll_tilts_the_head_clockwise(turn):
    right, up = seen(from_angles(0, 0, turn, framing=FACE), CROWN)
    assert math.degrees(math.atan2(right, up)) == pytest.approx(turn, abs=1e-4)


def test_cameras_look_at_the_head_from_the_radius_whatever_the_angles():
    for yaw, pitch, roll in torch.empty(50, 3).uniform_(-85, 85, generator=torch.Generator().manual_seed(0)).tolist():
        pose = from_angles(yaw, pitch, roll, framing=FACE).camera_to_world.double()
        assert torch.allclose(pose[:3, :3].T @ pose[:3, :3], torch.eye(3).double(), atol=1e-6)
        assert torch.linalg.det(pose[:3, :3]) > 0
        assert torch.allclose(pose[:3, 3], -2.7 * pose[:3, 2], atol=1e-5)  # float32 at 2.7


def test_a_mirrored_picture_has_yaw_and_roll_negated():
    for angles in ((20, 10, 5), (-70, 3, -8)):
        turned = label_of(from_angles(-angles[0], angles[1], -angles[2], framing=FACE))
        assert cameras.mirrored(label_of(from_angles(*angles, framing=FACE))) == pytest.approx(turned, abs=1e-6)


def test_the_standard_framing_is_that_of_eg3d():
    known = Source("", "", "")
    lens = from_angles(0, 0, 0, framing=Framing(known.radius, known.fov_degrees)).intrinsics
    assert known.radius == 2.7 and float(lens[0, 0]) == pytest.approx(4.2647, abs=1e-4)


def test_pictures_find_their_labels_by_path_then_by_file_name_then_by_number():
    labels = {name: label(i) for i, name in enumerate(
        ["a/1.png", "b/1.png", "x/flickr_cat_000008.png", "00012/img00012345.png", "00012/img00012345_mirror.png"])}
    names = ["a/1.jpg", "cat/flickr_cat_000008.jpg", "12345.png", "12345_mirror.png", "c/1.png", "other.png"]
    found, rules = match(names, labels)
    assert found == {"a/1.jpg": "a/1.png", "cat/flickr_cat_000008.jpg": "x/flickr_cat_000008.png",
                     "12345.png": "00012/img00012345.png", "12345_mirror.png": "00012/img00012345_mirror.png"}
    assert "c/1.png" not in found  # a/1 has its picture, but b/1 may be another's
    assert rules == {"path": 1, "file name": 1, "number": 2}


def test_a_name_that_fits_twice_fits_nothing():
    assert match(["c/1.png"], {"a/1.png": label(1), "b/1.png": label(2)}) == ({}, {})
    assert match(["c/1.png", "d/1.png"], {"a/1.png": label(1)}) == ({}, {})
    assert match(["1.png", "01.png"], {"img00000001.png": label(1)}) == ({}, {})
    assert match(["flickr_cat_8.png"], {"pixabay_cat_8.png": label(1)}) == ({}, {})  # not merely digits


def test_places_in_a_mirrored_set_are_not_taken_for_ids():
    labels = {}
    for place in range(0, 8, 2):
        labels[f"00000/img{place:08d}.png"] = label(place)
        labels[f"00000/img{place + 1:08d}.png"] = cameras.mirrored(label(place))
    assert len(match(list(labels), labels)[0]) == 8  # their own pictures
    with pytest.raises(ValueError, match="numbered by place"):
        match(["00000.png", "00003.png"], labels)
    ids = {name: label(i) for i, name in enumerate(labels)}
    assert match(["00003.png"], ids)[0] == {"00003.png": "00000/img00000003.png"}


def test_published_cameras_come_from_the_file_or_what_holds_it(tmp_path):
    text = json.dumps({"labels": [["00000/a.png", label(3)]]})
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "dataset.json").write_text(text)
    (tmp_path / "my_cameras.json").write_text(text)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("deep/dataset.json", text)
    for source in ("set", "set.zip", "my_cameras.json", "set/dataset.json"):
        given = read(tmp_path / source, FACE)
        assert given.published and list(given.labels) == ["00000/a.png"]
        assert given.labels["00000/a.png"] == label(3)


def test_cameras_that_cannot_be_had_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="cameras=.*nowhere.json does not exist"):
        read(tmp_path / "nowhere.json", FACE)
    with pytest.raises(ValueError, match="holds 0 files dataset.json"):
        read(tmp_path, FACE)
    (tmp_path / "classes.json").write_text('{"labels": [["a.png", 3]]}')
    with pytest.raises(ValueError, match="classes.json holds no cameras"):
        read(tmp_path / "classes.json", FACE)


def test_a_table_of_angles_gives_cameras_and_leaves_blanks_out(tmp_path):
    table = tmp_path / "pose.csv"
    table.write_text("\ufeffid, Yaw,pitch,roll,age\n00001,10,-20,3,30\n00002,,,,\n00003,-10.5,0,0,\n")
    given = read(table, FACE)
    assert not given.published and list(given.labels) == ["00001", "00003"]
    assert given.labels["00001"] == label_of(from_angles(10, -20, 3, framing=FACE))
    wide = read(table, Framing(1, 90)).labels["00001"]
    assert wide[16] == pytest.approx(0.5) and np.linalg.norm(wide[3:12:4]) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("text", "message"), [
    ("", "needs a column name or id"), ("id,yaw,pitch\n1,2,3\n", "yaw, pitch, roll"),
    ("yaw,pitch,roll\n1,2,3\n", "name or id"),
    ("id,yaw,pitch,roll\n1,2,x,3\n", "line 2: could not convert"), ("id,yaw,pitch,roll\n1,,,\n", "no row with all"),
])
def test_a_table_that_cannot_be_used_is_named(tmp_path, text, message):
    (tmp_path / "pose.csv").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path / "pose.csv", FACE)
    assert "pose.csv" in str(caught.value)


def test_labels_follow_the_crop_of_their_pictures():
    lens = torch.tensor([[2.0, 0, 0.5], [0, 4.0, 0.5], [0, 0, 1]])
    made = camera_of(cameras.follow_crop(label(1, lens), 20, 10, None)).intrinsics
    assert torch.allclose(made, torch.tensor([[4.0, 0, 0.5], [0, 4, 0.5], [0, 0, 1]]).double())  # half as wide
    assert cameras.follow_crop(label(1), 10, 10, None) == pytest.approx(label(1))


@pytest.fixture
def plug_in(monkeypatch):
    def install(function):
        module = types.ModuleType("my_poses")
        module.estimate = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "my_poses", module)
        return cameras.estimator("my_poses:estimate", None, FACE)

    return install


def test_an_estimator_may_answer_with_angles_a_matrix_or_nothing(plug_in):
    picture = np.zeros((4, 4, 3), np.uint8)
    assert plug_in(lambda _: (10, 20, 30))(picture) == label_of(from_angles(10, 20, 30, framing=FACE))
    pose = mirror(from_angles(10, 20, 30, framing=FACE)).camera_to_world
    assert plug_in(lambda _: pose.numpy())(picture)[:16] == pytest.approx(pose.flatten().tolist())
    assert plug_in(lambda _: None)(picture) is None


@pytest.mark.parametrize("answer", [(1, 2), np.eye(3), (1, math.nan, 2)])
def test_an_estimator_s_other_answers_are_refused_by_name(plug_in, answer):
    with pytest.raises(ValueError, match="poses=my_poses:estimate must return three angles"):
        plug_in(lambda _: answer)(np.zeros((4, 4, 3), np.uint8))


def test_an_estimator_that_lacks_its_files_says_so(plug_in):
    def estimate(_):
        raise FileNotFoundError("no weights")

    with pytest.raises(ValueError, match="poses=my_poses:estimate: no weights"):
        plug_in(estimate)(np.zeros((4, 4, 3), np.uint8))


def test_an_estimator_that_cannot_be_imported_is_named():
    for name in ("no_such_module:f", "datasets.head_pose:no_such", "datasets.head_pose", ":f"):
        with pytest.raises(ValueError, match=f"poses={name}: .*Expected package.module:function"):
            cameras.estimator(name, None, FACE)
