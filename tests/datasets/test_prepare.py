"""Published layouts, made small here, through the verb's functions and back in through ImageCollection."""

import functools
import http.server
import json
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import prepare as preparing
from datasets.download import DownloadFailed
from datasets.images import DatasetMissing, ImageCollection
from datasets.prepare import prepare
from datasets.sources import SOURCES, Source, command
from gan3d.cameras import flip_axes, look_at, sphere_point

ROOT = Path(__file__).parents[2]


def make(name, tmp_path, *sources, **changes):
    options = {"out": tmp_path / "out", "sources": list(sources), "downloads": tmp_path / "downloads", **changes}
    return prepare(name, **options)


def read(path, resolution, **changes):
    return ImageCollection(root=path, resolution=resolution, name="toy", **changes)


def gradient(side, red=0):
    image = np.zeros((side, side, 3), np.uint8)
    image[..., 0], image[..., 1] = red, np.linspace(0, 255, side).astype(np.uint8)
    return Image.fromarray(image)


@pytest.fixture
def faces(tmp_path):
    folder = tmp_path / "images1024x1024"
    for index in range(4):
        (folder / f"{index // 2:05d}").mkdir(parents=True, exist_ok=True)
        gradient(32, index * 10).save(folder / f"{index // 2:05d}" / f"{index:05d}.png")
    return folder


@pytest.mark.smoke
@pytest.mark.parametrize("out", ["out", "out.zip"])
def test_ffhq_is_resized_into_a_folder_or_a_stored_zip(tmp_path, faces, out):
    said = make("ffhq", tmp_path, faces, out=tmp_path / out, resolution=8)
    assert "4 pictures at 8x8" in said
    made, direct = read(tmp_path / out, 8), read(faces, 8)
    assert made.names == direct.names and all(torch.equal(made[i], direct[i]) for i in range(4))
    if out.endswith("zip"):
        with zipfile.ZipFile(tmp_path / out) as archive:
            assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
    assert {path.name for path in tmp_path.iterdir()} == {"images1024x1024", out}  # nothing left over


def test_afhq_takes_the_training_cats_of_the_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "afhq_v2.zip", "w") as archive:
        for kind in ("train/cat", "train/dog", "test/cat"):
            gradient(16).save(tmp_path / "x.png")
            archive.write(tmp_path / "x.png", f"afhq/{kind}/a.png")
    make("afhq", tmp_path, tmp_path / "afhq_v2.zip", resolution=8)
    assert [name.rpartition("afhq/")[2] for name in read(tmp_path / "out", 8).names] == ["train/cat/a.png"]
    with zipfile.ZipFile(tmp_path / "afhq_v2.zip") as archive:
        archive.extractall(tmp_path / "unpacked")
    make("afhq", tmp_path, tmp_path / "unpacked", resolution=8, out=tmp_path / "dogs", subset="train/dog")
    assert read(tmp_path / "dogs", 8).names == ["a.png"]


def test_carla_images_and_poses_become_one_posed_set_with_the_files_untouched(tmp_path):
    world = look_at(sphere_point(torch.linspace(0, 4, 3), torch.linspace(0.3, 1.2, 3), 10.0), torch.zeros(3))
    carla, extrinsics = tmp_path / "carla.zip", tmp_path / "poses.zip"
    with zipfile.ZipFile(carla, "w") as pictures, zipfile.ZipFile(extrinsics, "w") as poses:
        for index in range(3):
            gradient(16, index).save(tmp_path / "x.png")
            pictures.write(tmp_path / "x.png", f"images/{index:06d}.png")
            np.save(tmp_path / "x.npy", flip_axes(world[index]).numpy())
            poses.write(tmp_path / "x.npy", f"poses/{index:06d}_extrinsics.npy")
    original = zipfile.ZipFile(tmp_path / "carla.zip").read("images/000002.png")
    said = make("carla", tmp_path, carla, extrinsics)
    assert "as they are" in said
    made = read(tmp_path / "out", 16)
    assert torch.allclose(made.cameras.position, world[:, [1, 2, 0], 3] / 10, atol=1e-5)
    assert (tmp_path / "out" / made.names[2]).read_bytes() == original


def test_posed_pictures_keep_their_cameras_when_resized(tmp_path):
    (tmp_path / "set").mkdir()
    gradient(16).save(tmp_path / "set" / "a.png")
    label = [float(v) for v in range(25)]
    (tmp_path / "set" / "dataset.json").write_text(json.dumps({"labels": [["a.png", label]]}))
    make("folder", tmp_path, tmp_path / "set", resolution=4)
    assert json.loads((tmp_path / "out" / "dataset.json").read_text()) == {"labels": [["a.png", label]]}


def test_posed_pictures_that_are_not_square_must_be_resized(tmp_path):
    (tmp_path / "set").mkdir()
    Image.new("RGB", (20, 10)).save(tmp_path / "set" / "a.png")
    frame = {"file_path": "a.png", "transform_matrix": np.eye(4).tolist()}
    (tmp_path / "set" / "transforms.json").write_text(json.dumps({"camera_angle_x": 1.0, "frames": [frame]}))
    with pytest.raises(ValueError, match="not square need resolution"):
        make("folder", tmp_path, tmp_path / "set")
    make("folder", tmp_path, tmp_path / "set", resolution=8)
    direct, made = read(tmp_path / "set", 8), read(tmp_path / "out", 8)
    assert torch.equal(made.cameras.intrinsics, direct.cameras.intrinsics)
    assert made.cameras.intrinsics[0, 0, 0] == pytest.approx(2 * 0.5 / np.tan(0.5), rel=1e-6)  # half the width is left


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_celeba_hq_arrays_of_graf_are_cropped_and_resized(tmp_path, dtype):
    (tmp_path / "hq").mkdir()
    values = np.zeros((1, 3, 32, 32), dtype)
    values[:, :, 6:26, 6:26] = 200 if dtype == "uint8" else 200 / 255
    np.save(tmp_path / "hq" / "imgHQ00000.npy", values)
    (tmp_path / "hq" / "imgHQ00001.npy").write_bytes(b"broken")
    said = make("celeba", tmp_path, tmp_path / "hq", crop=20, resolution=10)
    assert "1 pictures" in said and "left out: 1 damaged files" in said
    assert read(tmp_path / "out", 10)[0].unique().tolist() == [200]


def draw_cat(folder, name, angle, middle=(150, 120), across=80):
    """A photograph with a dot at either eye, the face turned by `angle` degrees; its nine landmarks beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    turn = np.array([[np.cos(np.radians(angle)), np.sin(np.radians(angle))],
                     [-np.sin(np.radians(angle)), np.cos(np.radians(angle))]])
    level = np.array([[-20, 0], [20, 0], [0, 30], [-40, -20], [-35, -45], [-25, -30], [25, -30], [35, -45],
                      [across / 2, -20]])
    level[3, 0] = -across / 2
    points = level @ turn + middle
    image = np.full((260, 300, 3), 90, np.uint8)
    for x, y in points[:2]:
        image[round(y) - 3 : round(y) + 4, round(x) - 3 : round(x) + 4] = 255
    Image.fromarray(image).save(folder / f"{name}.jpg", quality=95)
    numbers = " ".join(f"{round(v)}" for v in points.ravel())
    (folder / f"{name}.jpg.cat").write_text(f"9 {numbers} ")


@pytest.mark.parametrize("angle", [0, 25, -40])
def test_cats_are_turned_level_and_cut_by_their_ears(tmp_path, angle):
    draw_cat(tmp_path / "cats" / "CAT_00", "a", angle)
    make("cats", tmp_path, tmp_path / "cats")
    face = read(tmp_path / "out", 128)[0][0].float()
    rows, columns = torch.where(face > 180)
    left, right = columns < 64, columns >= 64
    eyes = [(rows[side].float().mean().item(), columns[side].float().mean().item()) for side in (left, right)]
    for (row, column), expected in zip(eyes, (32, 96), strict=True):  # 64 ∓ 20/80 of 128
        assert abs(row - 0.4 * 128) < 3 and abs(column - expected) < 3  # landmarks are whole pixels, 1.6 in the crop


def test_small_and_damaged_cats_are_left_out_and_counted(tmp_path):
    draw_cat(tmp_path / "cats" / "CAT_00", "a", 0)
    draw_cat(tmp_path / "cats" / "CAT_01", "small", 0, across=60)
    draw_cat(tmp_path / "cats" / "CAT_02", "broken", 0)
    (tmp_path / "cats" / "CAT_02" / "broken.jpg").write_bytes(b"")
    said = make("cats", tmp_path, tmp_path / "cats", resolution=64)
    assert "1 pictures" in said and "1 faces under 64 pixels" in said and "1 damaged files" in said


def test_an_existing_set_is_never_overwritten(tmp_path, faces):
    make("ffhq", tmp_path, faces, resolution=8)
    before = (tmp_path / "out" / "00000" / "00000.png").read_bytes()
    with pytest.raises(FileExistsError, match="not empty"):
        make("ffhq", tmp_path, faces, resolution=4)
    assert (tmp_path / "out" / "00000" / "00000.png").read_bytes() == before


def test_an_interrupted_conversion_leaves_no_set_and_starts_afresh(tmp_path, faces, monkeypatch):
    calls = []

    def interrupted(pictures, index, original=preparing._picture):
        calls.append(index)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(pictures, index)

    monkeypatch.setattr(preparing, "_picture", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make("ffhq", tmp_path, faces, resolution=8)
    assert not (tmp_path / "out").exists()
    assert "4 pictures" in make("ffhq", tmp_path, faces, resolution=8)
    assert not (tmp_path / ".making-out").exists()


def test_what_needs_a_browser_says_what_to_fetch_by_hand(tmp_path):
    for name in ("ffhq", "celeba"):
        with pytest.raises(DownloadFailed) as caught:
            make(name, tmp_path)
        assert SOURCES[name].page in str(caught.value) and "source=" in str(caught.value)


def test_a_source_that_is_not_there_or_holds_nothing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        make("ffhq", tmp_path, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetMissing, match="is empty"):
        make("carla", tmp_path, tmp_path / "empty")
    (tmp_path / "bad.zip").write_text("no zip")
    with pytest.raises(ValueError, match="damaged or no zip"):
        make("carla", tmp_path, tmp_path / "bad.zip", tmp_path / "bad.zip")


@pytest.fixture
def site(tmp_path):
    """A server for the files in tmp_path/site; gives its address."""
    (tmp_path / "site").mkdir()
    handler = functools.partial(Quiet, directory=str(tmp_path / "site"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_a_set_with_addresses_is_downloaded_and_converted(tmp_path, site, monkeypatch):
    gradient(16).save(tmp_path / "x.png")
    with zipfile.ZipFile(tmp_path / "site" / "toy.zip", "w") as archive:
        archive.write(tmp_path / "x.png", "deep/x.png")
    (tmp_path / "site" / "page.zip").write_text("<html>please consent</html>")
    known = {"title": "toy", "page": "https://example.org/toy", "by_hand": "fetch it, then source=toy.zip"}
    monkeypatch.setitem(SOURCES, "toy", Source(**known, urls=(f"{site}/toy.zip?dl=1",), resolution=8))
    assert "1 pictures at 8x8" in make("toy", tmp_path)
    assert (tmp_path / "downloads" / "toy.zip").exists()
    for path, message in (("gone.zip", "404"), ("page.zip", "did not send a zip")):
        monkeypatch.setitem(SOURCES, "toy", Source(**known, urls=(f"{site}/{path}",)))
        with pytest.raises(DownloadFailed, match=message) as caught:
            make("toy", tmp_path, out=tmp_path / "other")
        assert "then source=toy.zip" in str(caught.value)
    monkeypatch.setitem(SOURCES, "toy", Source(**known, urls=(f"{site}/toy.zip",)))
    with pytest.raises(DownloadFailed, match="not 00"):
        make("toy", tmp_path, out=tmp_path / "other", checksum="sha256:00")


def verb(*arguments, cwd):
    return subprocess.run([sys.executable, ROOT / "prepare.py", *arguments], cwd=cwd, capture_output=True, text=True)


def test_the_verb_converts_and_its_mistakes_read_as_text(tmp_path, faces):
    done = verb("ffhq", f"source={faces}", "resolution=8", cwd=tmp_path)
    assert done.returncode == 0 and "4 pictures at 8x8" in done.stdout
    assert len(read(tmp_path / "data" / "ffhq", 8)) == 4
    again = verb("ffhq", f"source={faces}", cwd=tmp_path)
    assert again.returncode == 1 and "not empty" in again.stderr and "Traceback" not in again.stderr


def test_help_is_instant_and_knows_every_set(tmp_path):
    code = ("import runpy, sys; sys.argv = ['prepare.py', '--help']\n"
            f"try: runpy.run_path({str(ROOT / 'prepare.py')!r}, run_name='__main__')\n"
            "except SystemExit: sys.exit(3 if {'torch', 'numpy'} & set(sys.modules) else 0)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout and known.page in done.stdout for name, known in SOURCES.items())
    wrong = verb("ffhq", "sorce=x", cwd=tmp_path)
    assert wrong.returncode == 2 and "did you mean source=?" in wrong.stderr


def test_commands_in_messages_name_a_set_that_prepare_knows():
    for path in (ROOT / "configs" / "data").glob("*.yaml"):
        assert command(path.stem, "out").split()[2] in SOURCES
