"""Cameras for pictures that come without: published labels, head angles in a table, or an estimator of poses.

A label is EG3D's: 25 numbers, the 4×4 camera-to-world (OpenCV axes) and the 3×3 normalised intrinsics, row by row.
"""

import csv
import importlib
import io
import os
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from numpy import ndarray as Array

from datasets.files import shallowest
from datasets.images import open_files
from datasets.labels import cropped, parse_dataset_json
from gan3d.cameras import Camera, Number, intrinsics_from_fov, look_at, mirror, sphere_point

Label = list[float]
ANGLES = ("yaw", "pitch", "roll")
NAMES = ("name", "id", "file", "filename", "image")  # what a table may call its column of pictures


class Framing(NamedTuple):
    """How a camera that is given by angles stands: `radius` scene units from the head's centre, which it looks at."""

    radius: Number
    fov_degrees: Number  # horizontal, of the square picture


def from_angles(yaw: Number, pitch: Number, roll: Number, *, framing: Framing) -> Camera:
    """The camera that sees a head, which looks to +z with y up, turned by these angles (degrees).

    yaw > 0: the face looks to the right of the picture; pitch > 0: up; roll > 0: tilted clockwise, as the viewer sees
    it. The head is turned by yaw first, then by pitch, then by roll.
    """
    azimuth, polar, tilt = (torch.deg2rad(torch.tensor(float(angle))) for angle in (90 + yaw, 90 + pitch, roll))
    eye = sphere_point(azimuth, polar, framing.radius, "y")
    pose = look_at(eye, torch.zeros(3), "y")
    right, down = pose[:3, 0].clone(), pose[:3, 1].clone()
    pose[:3, 0] = torch.cos(tilt) * right - torch.sin(tilt) * down
    pose[:3, 1] = torch.cos(tilt) * down + torch.sin(tilt) * right
    return Camera(pose, intrinsics_from_fov(framing.fov_degrees))


def label_of(camera: Camera) -> Label:
    return [*camera.camera_to_world.flatten().tolist(), *camera.intrinsics.flatten().tolist()]


def camera_of(label: Sequence[float]) -> Camera:
    values = torch.tensor(label, dtype=torch.float64)
    return Camera(values[:16].view(4, 4), values[16:].view(3, 3))


def mirrored(label: Sequence[float]) -> Label:
    return label_of(mirror(camera_of(label)))


# Labels and angles from files


class Given(NamedTuple):
    """Labels by the names that a file gives to its pictures.

    published: the cameras are those of the pictures as they lie; a crop changes them. Otherwise they are made for the
    pictures as written.
    """

    labels: dict[str, Label]
    published: bool


def read(path: Path, framing: Framing) -> Given:
    """Cameras from a .csv of angles, or from EG3D's dataset.json: the file, or the folder or zip that holds it.

    Raises: FileNotFoundError, ValueError naming the file.
    """
    path = path.expanduser().absolute()
    if not path.exists():
        raise FileNotFoundError(f"cameras={path} does not exist: give a dataset.json, a folder or zip with one, or a "
                                f".csv with the columns name, {', '.join(ANGLES)}")
    if path.suffix == ".csv":
        return Given(read_angles(path, framing), published=False)
    if path.is_file() and path.suffix == ".json":
        text, where = path.read_bytes(), path
    else:
        files = open_files("cameras", path)
        found = shallowest(files, "dataset.json")
        if len(found) != 1:
            raise ValueError(f"cameras={path} holds {len(found)} files dataset.json: name the one that is meant")
        text, where = files.read(found[0]), path / found[0]
    frames = parse_dataset_json(text, where)
    if frames is None:
        raise ValueError(f"{where} holds no cameras, only class numbers or nothing")
    return Given({name: [*pose.flatten().tolist(), *lens.flatten().tolist()] for name, (pose, lens) in frames.items()},
                 published=True)


def read_angles(path: Path, framing: Framing) -> dict[str, Label]:
    """A table of names or ids and yaw, pitch, roll in degrees (see `from_angles`); rows with blanks are left out."""
    rows = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig")))
    columns = [column.strip().lower() for column in rows.fieldnames or ()]
    naming = next((name for name in NAMES if name in columns), None)
    missing = [angle for angle in ANGLES if angle not in columns]
    if naming is None or missing:
        raise ValueError(f"{path} needs a column {' or '.join(NAMES[:2])} and columns {', '.join(ANGLES)} (degrees); "
                         f"it has {', '.join(columns) or 'none'}")
    rows.fieldnames = columns
    labels: dict[str, Label] = {}
    for number, row in enumerate(rows, start=2):
        values = [(row[angle] or "").strip() for angle in ANGLES]
        if not all(values):
            continue
        try:
            yaw, pitch, roll = (float(value) for value in values)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        labels[row[naming].strip()] = label_of(from_angles(yaw, pitch, roll, framing=framing))
    if not labels:
        raise ValueError(f"{path} has no row with all of {', '.join(ANGLES)}")
    return labels


# Which label belongs to which picture


def _stem(name: str) -> str:
    return posixpath.basename(_path(name))


def _path(name: str) -> str:
    return os.path.splitext(posixpath.normpath(name.replace("\\", "/")))[0]


def _number(name: str) -> str | None:
    """img00012345 and 12345 are one picture, if the numbers are ids."""
    found = re.fullmatch(r"(?:img)?0*(\d+)(_mirror)?", _stem(name))
    return found and found[1] + (found[2] or "")


def match(names: Sequence[str], labels: Mapping[str, Label]) -> tuple[dict[str, str], dict[str, int]]:
    """(picture → label, how many by which rule): by path, then by file name, then by number; suffixes do not matter.

    A rule that would fit two pictures to one label, or two labels to one picture, does not count for them.
    Raises: ValueError if numbers would have to match and those of the labels are no ids (see `_positions`).
    """
    found: dict[str, str] = {}
    counts: dict[str, int] = {}
    for rule, key in (("path", _path), ("file name", _stem), ("number", _number)):
        pictures, given, used = _unique(names, key), _unique(labels, key), set(found.values())
        fits = {picture: given[k] for k, picture in pictures.items()
                if picture not in found and k in given and given[k] not in used}
        if fits and rule == "number" and _positions(labels):
            raise ValueError(
                "the labels are numbered by place in a set that holds every picture and its mirrored copy (img00000001 "
                "mirrors img00000000), not by the pictures' ids, so they fit only the pictures of that set itself: use "
                "it as it is (data.root=…), or labels that keep the pictures' names")
        found |= fits
        counts |= {rule: len(fits)} if fits else {}
    return found, counts


def _unique(names: Iterable[str], key: Callable[[str], str | None]) -> dict[str, str]:
    keys = {name: key(name) for name in names}
    times = Counter(keys.values())
    return {k: name for name, k in keys.items() if k is not None and times[k] == 1}


def _positions(labels: Mapping[str, Label]) -> bool:
    """Whether imgN are places in a sorted set with mirrored copies (EG3D's dataset tool): each odd one mirrors the even
    one before it. A frontal face is its own mirror image, so several pairs must agree."""
    numbered = sorted(name for name in labels if re.fullmatch(r"img\d+", _stem(name)))[:64]
    pairs = list(zip(numbered[::2], numbered[1::2], strict=False))
    return len(pairs) >= 2 and all(np.allclose(mirrored(labels[a]), labels[b], atol=1e-5) for a, b in pairs)


def follow_crop(label: Label, width: int, height: int, crop: int | None) -> Label:
    """The label of the centred square that is cut out of a picture of this size."""
    camera = camera_of(label)
    return label_of(Camera(camera.camera_to_world, cropped(camera.intrinsics, width, height, crop)))


# Estimators

def estimator(name: str, weights: Path | None, framing: Framing) -> Callable[[UInt8[Array, "h w 3"]], Label | None]:
    """A picture's label, or None, by the function package.module:function.

    It takes the picture, uint8 rgb `[h w 3]` (and `weights`, if given, by that name), and returns (yaw, pitch, roll) in
    degrees as `from_angles` takes them, or a 4×4 camera-to-world with OpenCV axes, or None where it sees nothing.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"poses={name}: {error}. Expected package.module:function, importable from here (the "
                         "project's folder, or PYTHONPATH)") from error
    extra = {} if weights is None else {"weights": weights}

    def label(picture: UInt8[Array, "h w 3"]) -> Label | None:
        try:
            return label_from_pose(found(picture, **extra), framing, name)
        except OSError as error:  # of the estimator's files: must not pass for a damaged picture
            raise ValueError(f"poses={name}: {error}") from error

    return label


def label_from_pose(pose: Any, framing: Framing, name: str) -> Label | None:
    if pose is None:
        return None
    values = np.asarray(pose, dtype=np.float64)
    if values.shape not in ((3,), (4, 4)) or not np.isfinite(values).all():
        raise ValueError(f"poses={name} must return three angles in degrees, a 4x4 camera-to-world or None, all "
                         f"finite; it returned {pose!r}")
    if values.shape == (3,):
        return label_of(from_angles(*values, framing=framing))
    return label_of(Camera(torch.from_numpy(values).float(), intrinsics_from_fov(framing.fov_degrees)))
