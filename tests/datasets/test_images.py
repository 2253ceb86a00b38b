"""What a collection makes of good, odd, damaged and missing files."""

import io
import json
import pickle
import time
import warnings
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import images
from datasets.images import DatasetMissing, ImageCollection


def colour_file(path, colour=(200, 100, 50), size=(16, 16), mode="RGB", **options):
    Image.new(mode, size, colour).save(path, **options)


def collection(root, **changes):
    return ImageCollection(**{"root": root, "resolution": 8, "name": "toy", **changes})


def noise(side, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("name", "mode", "colour", "expected"),
    [
        ("rgb.png", "RGB", (200, 100, 50), (200, 100, 50)),
        ("grey.png", "L", 77, (77, 77, 77)),
        ("cmyk.jpg", "CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("deep.png", "I;16", 257 * 100, (100, 100, 100)),  # 16 bits are scaled, not clipped to white
        ("clear.png", "RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("half.png", "RGBA", (0, 0, 0, 128), (127, 127, 127)),
        ("grey_alpha.png", "LA", (50, 255), (50, 50, 50)),
        ("bits.png", "1", 1, (255, 255, 255)),
        ("photo.webp", "RGB", (200, 100, 50), (200, 100, 50)),
        ("plain.bmp", "RGB", (1, 2, 3), (1, 2, 3)),
        ("UPPER.JPEG", "RGB", (128, 128, 128), (128, 128, 128)),
    ],
)
def test_every_mode_becomes_the_right_rgb(tmp_path, name, mode, colour, expected):
    colour_file(tmp_path / name, colour, mode=mode)
    (image,) = [collection(tmp_path)[0]]
    assert image.dtype == torch.uint8 and image.shape == (3, 8, 8)
    difference = (image.int() - torch.tensor(expected)[:, None, None]).abs().max()
    assert difference <= 3  # the lossy formats may move a level or two


def test_palette_with_a_transparent_entry_shows_the_background(tmp_path):
    image = Image.new("P", (16, 16), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.paste(1, (8, 0, 16, 16))
    image.save(tmp_path / "palette.png", transparency=0)
    seen = collection(tmp_path, resolution=16, background=(0, 0, 1))[0]
    assert seen[:, 0, 0].tolist() == [0, 0, 255] and seen[:, 0, -1].tolist() == [0, 255, 0]


def test_pictures_are_upright_as_exif_says(tmp_path):
    image = Image.new("RGB", (16, 16), "black")
    image.paste((255, 255, 255), (0, 0, 16, 8))
    exif = image.getexif()
    exif[0x0112] = 3  # turned by 180°
    image.save(tmp_path / "photo.png", exif=exif)
    assert collection(tmp_path, resolution=16)[0][0, -1, 0] == 255


def test_damaged_files_are_left_out_counted_and_told_once(tmp_path):
    for index in range(3):
        colour_file(tmp_path / f"good{index}.png", (index, index, index))
    whole = io.BytesIO()
    Image.fromarray(noise(64)).save(whole, format="JPEG")
    (tmp_path / "truncated.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    whole = io.BytesIO()
    Image.fromarray(noise(64)).save(whole, format="PNG")
    (tmp_path / "cut.png").write_bytes(whole.getvalue()[:2000])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("this is no picture")
    (tmp_path / "notes.txt").write_text("not even named like one")
    with pytest.warns(UserWarning, match=r"3 pictures used, left out: 4 damaged files .*truncated\.jpg") as told:
        pictures = collection(tmp_path)
    assert len(told) == 1 and len(pictures) == 3 and pictures.skipped["damaged files"] == 4
    assert [int(pictures[i][0, 0, 0]) for i in range(3)] == [0, 1, 2]


def test_large_sets_replace_a_damaged_file_by_the_next_readable_one(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "VERIFY_IMAGES", 0)
    for index in (0, 2, 3):
        colour_file(tmp_path / f"{index}.png", (index, index, index))
    for index in (1, 4):
        (tmp_path / f"{index}.png").touch()
    pictures = collection(tmp_path)
    assert len(pictures) == 5
    with pytest.warns(UserWarning, match="1.png cannot be read"):
        shown = [pictures.load(i) for i in range(5)]
    assert [index for index, _ in shown] == [0, 2, 2, 3, 0]
    assert [int(image[0, 0, 0]) for _, image in shown] == [0, 2, 2, 3, 0]
    assert pictures.skipped["damaged files"] == 2


def test_centre_crop_and_resize_keep_the_middle_and_antialias(tmp_path):
    stripes = np.zeros((40, 80, 3), np.uint8)
    stripes[:, 20:60] = np.where(np.arange(40) % 2, 255, 0)[None, :, None]  # the centre square: stripes one pixel wide
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    small = collection(tmp_path, resolution=10)[0].float()
    assert small[:, :, 2:-2].sub(127.5).abs().max() < 12  # nearest-neighbour sampling would give 0 or 255


def test_crop_takes_that_many_pixels_of_the_file(tmp_path):
    image = Image.new("RGB", (178, 218), "black")
    image.paste((255, 255, 255), (35, 55, 143, 163))  # GRAF's centre square of CelebA, side 108
    image.save(tmp_path / "face.png")
    assert collection(tmp_path, crop=108)[0].min() == 255
    assert collection(tmp_path, crop=110, resolution=110)[0].min() == 0


def zip_of(folder, path):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
    return path


def test_a_zip_gives_the_same_pictures_as_its_folder(tmp_path):
    folder = tmp_path / "set"
    (folder / "deep" / "er").mkdir(parents=True)
    for index, name in enumerate(("b.png", "deep/a.png", "deep/er/c.png")):
        Image.fromarray(noise(16, index)).save(folder / name)
    (folder / ".hidden.png").touch()
    archive = zip_of(folder, tmp_path / "set.zip")
    one, other = collection(folder), collection(archive)
    assert len(one) == len(other) == 3
    assert all(torch.equal(one[i], other[i]) for i in range(3))
    assert one.fingerprint == other.fingerprint


def test_a_zip_with_a_bad_member_loses_only_that_one(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for index in range(3):
        Image.fromarray(noise(16, index)).save(folder / f"{index}.png")
    archive = zip_of(folder, tmp_path / "set.zip")
    data = bytearray(archive.read_bytes())
    spot = data.find((folder / "1.png").read_bytes()[40:60])
    data[spot] ^= 255
    archive.write_bytes(bytes(data))
    with pytest.warns(UserWarning, match="1 damaged files"):
        assert len(collection(archive)) == 2


def test_a_root_without_its_zip_suffix_is_found(tmp_path):
    (tmp_path / "set").mkdir()
    colour_file(tmp_path / "set" / "a.png")
    zip_of(tmp_path / "set", tmp_path / "other.zip")
    assert len(collection(tmp_path / "other")) == 1


def make_nothing(path):
    pass


def make_empty(path):
    path.mkdir()


def make_other_files(path):
    path.mkdir()
    (path / "readme.txt").write_text("hello")


def make_all_damaged(path):
    path.mkdir()
    (path / "a.png").touch()


def make_no_zip(path):
    path.write_text("not a zip")


@pytest.mark.smoke
@pytest.mark.parametrize("make", [make_nothing, make_empty, make_other_files, make_all_damaged, make_no_zip])
def test_missing_data_says_where_what_and_how_within_a_second(tmp_path, monkeypatch, make):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "ffhq")
    start = time.monotonic()
    with pytest.raises(DatasetMissing) as caught:
        collection("ffhq", name="ffhq")
    assert time.monotonic() - start < 1
    text = str(caught.value)
    assert str(tmp_path / "ffhq") in text and "python prepare.py ffhq" in text and "dataset.json" in text
    assert isinstance(caught.value, FileNotFoundError)


def test_fingerprint_follows_files_and_preprocessing_but_not_the_place(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.fromarray(noise(16)).save(tmp_path / folder / "x.png")
    here = collection(tmp_path / "a").fingerprint
    assert here == collection(tmp_path / "b").fingerprint
    assert here != collection(tmp_path / "a", resolution=4).fingerprint
    assert here != collection(tmp_path / "a", crop=10).fingerprint
    assert here != collection(tmp_path / "a", background=(0, 0, 0)).fingerprint
    Image.fromarray(noise(16, 1)).save(tmp_path / "b" / "y.png")
    assert here != collection(tmp_path / "b").fingerprint


def test_limit_takes_the_first_by_name(tmp_path):
    for index in range(5):
        colour_file(tmp_path / f"{index}.png", (index, 0, 0))
    pictures = collection(tmp_path, limit=2)
    assert [int(pictures[i][0, 0, 0]) for i in range(len(pictures))] == [0, 1]
    with pytest.raises(IndexError):
        pictures[2]
    assert int(pictures[-1][0, 0, 0]) == 1


def test_cached_pictures_are_not_changed_through_what_is_handed_out(tmp_path):
    colour_file(tmp_path / "a.png", (9, 9, 9))
    pictures = collection(tmp_path)
    pictures[0].fill_(0)
    assert pictures[0].min() == 9


def test_a_set_too_large_for_the_cache_is_decoded_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "CACHE_BYTES", 100)
    colour_file(tmp_path / "a.png", (1, 1, 1))
    pictures = collection(tmp_path)
    assert pictures[0].max() == 1
    colour_file(tmp_path / "a.png", (5, 5, 5))
    assert pictures[0].max() == 5


def test_a_collection_survives_pickling(tmp_path):
    colour_file(tmp_path / "a.png", (7, 7, 7))
    archive = zip_of(tmp_path, tmp_path.parent / "pickled.zip")
    for root in (tmp_path, archive):
        assert pickle.loads(pickle.dumps(collection(root)))[0].max() == 7


def test_sound_sets_warn_of_nothing(tmp_path):
    colour_file(tmp_path / "a.png")
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": None}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert collection(tmp_path).cameras is None
