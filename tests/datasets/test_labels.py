"""Cameras from every layout: conventions by closed forms and round trips."""

import json
import math
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.images import ImageCollection
from gan3d.cameras import flip_axes, intrinsics_from_fov, look_at, sphere_point


def poses(count, up="z", radius=1.0):
    azimuth, polar = torch.linspace(0.1, 5, count), torch.linspace(0.4, 1.4, count)
    eye = sphere_point(azimuth, polar, radius, up)
    return look_at(eye, torch.zeros(3), up)


def pictures(folder, count, size=(8, 8)):
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.new("RGB", size, (index, 0, 0)).save(folder / f"{index:03d}.png")


def collection(root, **changes):
    return ImageCollection(**{"root": root, "resolution": 8, "name": "toy", **changes})


def label(pose, intrinsics):
    return [*pose.flatten().tolist(), *intrinsics.flatten().tolist()]


@pytest.mark.smoke
def test_eg3d_labels_come_back_as_written_and_follow_their_file(tmp_path):
    pictures(tmp_path / "00000", 3)
    world, lens = poses(3), intrinsics_from_fov(18.0)
    order = [2, 0, 1]  # as listed, not as sorted
    labels = [[f"00000/{i:03d}.png", label(world[i], lens)] for i in order]
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    cameras = collection(tmp_path).cameras
    assert torch.equal(cameras.camera_to_world, world) and torch.equal(cameras.intrinsics[1], lens)
    assert cameras.camera_to_world.dtype == torch.float32


def test_pictures_without_label_and_labels_without_picture_are_left_out(tmp_path):
    pictures(tmp_path, 3)
    entry = label(poses(1)[0], intrinsics_from_fov(18.0))
    labels = [["000.png", entry], ["002.png", entry], ["gone.png", entry]]
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    with pytest.warns(UserWarning, match="1 not listed in dataset.json; 1 listed in dataset.json but absent"):
        kept = collection(tmp_path)
    assert [int(kept[i][0, 0, 0]) for i in range(len(kept))] == [0, 2] and len(kept.cameras.position) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{not json", "dataset.json is damaged"),
        ("[]", "must hold an object"),
        ("{}", "no 'labels'"),
        ('{"labels": [["000.png", [1, 2, 3]]]}', "000.png must be 25 finite numbers"),
        (json.dumps({"labels": [["000.png", [math.nan] * 25]]}), "25 finite numbers"),
    ],
)
def test_a_damaged_dataset_json_is_named(tmp_path, text, message):
    pictures(tmp_path, 1)
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        collection(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_class_numbers_are_no_cameras(tmp_path):
    pictures(tmp_path, 1)
    (tmp_path / "dataset.json").write_text('{"labels": [["000.png", 7]]}')
    assert collection(tmp_path).cameras is None


def test_names_of_nested_folders_come_in_every_writing(tmp_path):
    pictures(tmp_path / "a" / "b", 3)
    world, lens = poses(3), intrinsics_from_fov(18.0)
    labels = {name: label(world[i], lens) for i, name in enumerate(["./a/b/000.png", "a\\b\\001.png", "a/b/002.png"])}
    for content in (labels, [*labels.items(), None]):  # EG3D's tool writes null for a picture without a label
        (tmp_path / "dataset.json").write_text(json.dumps({"labels": content}))
        assert torch.equal(collection(tmp_path).cameras.camera_to_world, world)


def test_label_files_in_several_folders_are_read_together(tmp_path):
    world, lens = poses(4), intrinsics_from_fov(18.0)
    for part in range(2):
        pictures(tmp_path / str(part), 2)
        labels = [[f"{i:03d}.png", label(world[2 * part + i], lens)] for i in range(2)]
        (tmp_path / str(part) / "dataset.json").write_text(json.dumps({"labels": labels}))
    assert torch.equal(collection(tmp_path).cameras.camera_to_world, world)
    (tmp_path / "1" / "dataset.json").write_text('{"labels": [["000.png", 3]]}')  # class numbers, hence no cameras
    with pytest.warns(UserWarning, match="2 not listed in 2 files dataset.json"):
        assert len(collection(tmp_path)) == 2


def test_an_uncompressed_zip_of_eg3d_keeps_its_cameras(tmp_path):
    pictures(tmp_path / "00000", 3)
    world = poses(3)
    labels = [[f"00000/{i:03d}.png", label(world[i], intrinsics_from_fov(18.0))] for i in range(3)]
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_STORED) as archive:
        for i in range(3):
            archive.write(tmp_path / "00000" / f"{i:03d}.png", f"00000/{i:03d}.png")
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    assert torch.equal(collection(tmp_path / "set.zip").cameras.camera_to_world, world)


def test_blender_transforms_are_opengl_and_their_names_need_no_suffix(tmp_path):
    pictures(tmp_path / "train", 2)
    world = poses(2, radius=4.0)
    angle = 0.6911112
    frames = [{"file_path": f"./train/{i:03d}", "transform_matrix": flip_axes(world[i]).tolist()} for i in range(2)]
    (tmp_path / "transforms.json").write_text(json.dumps({"camera_angle_x": angle, "frames": frames}))
    cameras = collection(tmp_path).cameras
    assert torch.allclose(cameras.camera_to_world, world, atol=1e-6)
    forward = cameras.camera_to_world[:, :3, 2]
    assert torch.allclose(forward, -cameras.position / 4, atol=1e-6)  # OpenCV: the third column looks at the origin
    assert torch.allclose(cameras.intrinsics[0], intrinsics_from_fov(math.degrees(angle)), atol=1e-6)


def test_pixel_intrinsics_are_normalised_and_follow_the_centre_crop(tmp_path):
    pictures(tmp_path, 1, size=(20, 10))
    frame = {"file_path": "000.png", "transform_matrix": np.eye(4).tolist()}
    content = {"fl_x": 30, "fl_y": 30, "cx": 9, "cy": 6, "w": 20, "h": 10, "frames": [frame]}
    (tmp_path / "transforms.json").write_text(json.dumps(content))
    lens = collection(tmp_path).cameras.intrinsics[0]
    expected = torch.tensor([[3.0, 0, 0.4], [0, 3.0, 0.6], [0, 0, 1]])  # the square is columns 5 to 15
    assert torch.allclose(lens, expected, atol=1e-6)


def test_a_transforms_json_without_frames_is_named(tmp_path):
    pictures(tmp_path, 1)
    (tmp_path / "transforms.json").write_text("{}")
    with pytest.raises(ValueError, match="transforms.json is no transforms.json: KeyError 'frames'"):
        collection(tmp_path)


@pytest.mark.parametrize("rows", [3, 4])
def test_carla_poses_of_graf_come_to_the_unit_sphere_with_y_up(tmp_path, rows):
    pictures(tmp_path / "images", 3)
    (tmp_path / "poses").mkdir()
    world = poses(3, up="z", radius=10.0)
    for index in range(3):
        np.save(tmp_path / "poses" / f"{index:03d}_extrinsics.npy", flip_axes(world[index]).numpy()[:rows])
    cameras = collection(tmp_path).cameras
    position = cameras.position
    assert torch.allclose(position, world[:, [1, 2, 0], 3] / 10, atol=1e-6)  # x, y, z became y, z, x: height is now y
    assert torch.allclose(cameras.camera_to_world, look_at(position, torch.zeros(3), "y"), atol=1e-5)
    assert torch.allclose(cameras.intrinsics[0], intrinsics_from_fov(30.0))


def test_carla_poses_that_do_not_look_at_the_origin_are_not_believed(tmp_path):
    pictures(tmp_path, 1)
    np.save(tmp_path / "000_extrinsics.npy", poses(1, radius=10.0)[0].numpy())  # OpenCV axes: looks away
    assert collection(tmp_path).cameras is None


def test_voxgraf_json_is_opengl_with_a_field_of_view(tmp_path):
    pictures(tmp_path, 2)
    world = poses(2, radius=10.0)
    listed = [[f"{i:03d}.png", flip_axes(world[i]).tolist()] for i in range(2)]
    (tmp_path / "dataset.json").write_text(json.dumps({"fov": 30, "labels": None, "poses": listed}))
    cameras = collection(tmp_path).cameras
    assert torch.allclose(cameras.camera_to_world, world, atol=1e-5)
    assert torch.allclose(cameras.intrinsics[0], intrinsics_from_fov(30.0))


def test_damaged_pictures_take_their_cameras_with_them(tmp_path):
    pictures(tmp_path, 3)
    (tmp_path / "001.png").write_bytes(b"")
    world = poses(3)
    labels = [[f"{i:03d}.png", label(world[i], intrinsics_from_fov(18.0))] for i in range(3)]
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    with pytest.warns(UserWarning, match="1 damaged"):
        kept = collection(tmp_path)
    assert torch.equal(kept.cameras.camera_to_world, world[[0, 2]])
