"""The cameras that come with pictures, from the five layouts in use; all leave here with OpenCV axes.

dataset.json (EG3D): 25 numbers a picture. transforms.json (Blender, instant-ngp): OpenGL axes. VoxGRAF's json: a field
of view and OpenGL poses. rgb/, pose/ and intrinsics.txt (SRN): one OpenCV pose a picture. `*_extrinsics.npy` (GRAF's
CARLA): one OpenGL pose a picture.
"""

import io
import json
import math
import posixpath
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from datasets.decoding import Unreadable, centre_square, image_size
from datasets.files import Files, shallowest
from gan3d.cameras import Camera, flip_axes, intrinsics_from_fov

CARLA_FOV = 30.0  # GRAF, configs/carla.yaml
EXTRINSICS = "_extrinsics.npy"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Labelled(NamedTuple):
    """Which pictures belong to the set, in order; their cameras, if any; why others were left out."""

    images: list[str]
    camera: Camera | None
    skipped: Counter[str]


def read_labels(files: Files, crop: int | None) -> Labelled:
    """The set's pictures and cameras as its layout says; without a layout, every picture and no camera.

    Several label files in as many folders are read together, each for its folder.
    A posed set has pictures of one size: where they are not square, the intrinsics follow the centre crop.
    Raises: ValueError naming the file, if a label file is damaged.
    """
    images = sorted(name for name in files.sizes if name.lower().endswith(SUFFIXES))
    for filename, parse in (("dataset.json", _dataset_json), ("transforms.json", _transforms_json),
                            ("transforms_train.json", _transforms_json)):
        paths = shallowest(files, filename)
        if paths:
            parts = [parse(files, path) for path in paths]
            frames = {name: frame for part in parts if part is not None for name, frame in part.items()}
            source = paths[0] if len(paths) == 1 else f"{len(paths)} files {filename}"
            return _match(files, images, frames, source, crop) if frames else Labelled(images, None, Counter())
    for look, source in ((_srn, "pose/*.txt"), (_carla, f"*{EXTRINSICS}")):
        found = look(files, images)
        if found is not None:
            return _match(files, images, found, source, crop)
    return Labelled(images, None, Counter())


Frames = dict[str, tuple[np.ndarray, np.ndarray]]  # picture → camera_to_world (OpenCV axes), intrinsics


def _match(files: Files, images: list[str], frames: Frames, source: str, crop: int | None) -> Labelled:
    kept = [name for name in images if name in frames]
    skipped = Counter({f"not listed in {source}": len(images) - len(kept),
                       f"listed in {source} but absent": len(frames) - len(kept)})
    if not kept:
        return Labelled([], None, +skipped)
    poses = torch.from_numpy(np.stack([frames[name][0] for name in kept])).float()
    intrinsics = torch.from_numpy(np.stack([frames[name][1] for name in kept])).float()
    return Labelled(kept, Camera(poses, cropped(intrinsics, *first_size(files, kept), crop)), +skipped)


def first_size(files: Files, names: list[str]) -> tuple[int, int]:
    """(width, height) of the first of these pictures that can be read."""
    for name in names:
        try:
            return image_size(files.read(name))
        except (Unreadable, OSError):
            continue
    return 1, 1  # nothing can be read, which the collection will say


def cropped(intrinsics: torch.Tensor, width: int, height: int, crop: int | None) -> torch.Tensor:
    """Normalised intrinsics of the centred square that `decoding.decode` cuts out."""
    left, top, side = centre_square(width, height, crop)
    if side == width == height:
        return intrinsics
    scale = torch.tensor([[width / side], [height / side], [1.0]])
    shift = torch.zeros(3, 3)
    shift[0, 2], shift[1, 2] = left / side, top / side
    return intrinsics * scale - shift


def _object(text: bytes, where: Path) -> dict:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where} must hold an object, not {type(content).__name__}")
    return content


def _dataset_json(files: Files, path: str) -> Frames | None:
    frames = parse_dataset_json(files.read(path), files.root / path)
    folder = posixpath.dirname(path)
    return frames and {posixpath.normpath(posixpath.join(folder, name)): frame for name, frame in frames.items()}


def parse_dataset_json(text: bytes, where: Path) -> Frames | None:
    """EG3D's: {"labels": [[file, 25 numbers], …]}, 4×4 camera-to-world (OpenCV) then 3×3 normalised intrinsics.

    `where` is named in errors. None if it holds class numbers, or nothing.
    """
    content = _object(text, where)
    if "poses" in content and "fov" in content:
        return _voxgraf_json(content)
    if "labels" not in content:
        raise ValueError(f"{where} has no 'labels'; expected {{\"labels\": [[file, [25 numbers]], …]}}")
    labels = content["labels"]
    pairs = [pair for pair in (labels.items() if isinstance(labels, dict) else labels or []) if pair is not None]
    if not any(isinstance(label, list) for _, label in pairs):
        return None  # pictures without cameras
    frames: Frames = {}
    for name, label in pairs:
        values = np.asarray(label, dtype=np.float64)
        if values.shape != (25,) or not np.isfinite(values).all():
            raise ValueError(f"{where}: the label of {name} must be 25 finite numbers, got {np.size(label)}")
        frames[name.replace("\\", "/")] = values[:16].reshape(4, 4), values[16:].reshape(3, 3)
    return frames


def _voxgraf_json(content: dict) -> Frames:
    intrinsics = intrinsics_from_fov(float(content["fov"])).double().numpy()
    return {name: (_opencv(np.asarray(pose)), intrinsics) for name, pose in content["poses"]}


def _opencv(pose: np.ndarray) -> np.ndarray:
    full = np.eye(4)
    full[: pose.shape[0], :4] = pose[:, :4]
    return flip_axes(torch.from_numpy(full)).numpy()


def _transforms_json(files: Files, path: str) -> Frames:
    """Blender's and instant-ngp's: frames with OpenGL poses; one camera_angle_x, or fl_x, fl_y, cx, cy with w, h."""
    content = _object(files.read(path), files.root / path)
    folder = posixpath.dirname(path)
    frames: Frames = {}
    try:
        for frame in content["frames"]:
            name = posixpath.normpath(posixpath.join(folder, frame["file_path"]))
            name = next((name + end for end in ("", *SUFFIXES) if name + end in files.sizes), name)
            intrinsics = _pinhole(files, name, {**content, **frame})
            frames[name] = _opencv(np.asarray(frame["transform_matrix"], dtype=np.float64)), intrinsics
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{files.root / path} is no transforms.json: {type(error).__name__} {error}") from error
    return frames


def _pinhole(files: Files, name: str, camera: dict) -> np.ndarray:
    width, height = camera.get("w"), camera.get("h")
    if not (width and height):
        width, height = first_size(files, [name] if name in files.sizes else [])
    focal = camera["fl_x"] / width if "fl_x" in camera else 0.5 / math.tan(camera["camera_angle_x"] / 2)
    focal_y = camera["fl_y"] / height if "fl_y" in camera else focal * width / height
    centre = camera.get("cx", width / 2) / width, camera.get("cy", height / 2) / height
    return np.array([[focal, 0, centre[0]], [0, focal_y, centre[1]], [0, 0, 1]])


def _srn(files: Files, images: list[str]) -> Frames | None:
    """SRN's ShapeNet cars and chairs: OBJECT/rgb/000000.png, OBJECT/pose/000000.txt, OBJECT/intrinsics.txt.

    A pose is a 4×4 camera-to-world with OpenCV axes; the intrinsics are "focal cx cy 0" in pixels of the size (height,
    width) that stands in the fourth line, whatever the pictures' size is. None if there are no such poses.
    """
    frames: Frames = {}
    lenses: dict[str, np.ndarray] = {}
    for name in images:
        folder, file = posixpath.split(name)
        root = folder.removesuffix("rgb")
        pose, lens = f"{root}pose/{posixpath.splitext(file)[0]}.txt", f"{root}intrinsics.txt"
        if posixpath.basename(folder) != "rgb" or pose not in files.sizes or lens not in files.sizes:
            continue
        if root not in lenses:
            lenses[root] = _srn_intrinsics(files, lens)
        values = np.array(files.read(pose).split(), dtype=np.float64)
        if values.shape != (16,) or not np.isfinite(values).all():
            raise ValueError(f"{files.root / pose} must hold 16 finite numbers, a 4x4 camera-to-world")
        frames[name] = values.reshape(4, 4), lenses[root]
    return frames or None


def _srn_intrinsics(files: Files, path: str) -> np.ndarray:
    lines = files.read(path).decode().splitlines()
    try:
        focal, x, y = (float(number) for number in lines[0].split()[:3])
        height, width = (float(number) for number in lines[3].split())
    except (IndexError, ValueError) as error:
        raise ValueError(f"{files.root / path} is none of SRN's: expected focal, cx and cy in its first line, height "
                         "and width in its fourth") from error
    if not (0.25 < x / width < 0.75 and 0.25 < y / height < 0.75):
        raise ValueError(f"{files.root / path}: the centre ({x:g}, {y:g}) does not lie near the middle of {width:g} x "
                         f"{height:g} pixels; its two sizes disagree")
    return np.array([[focal / width, 0, x / width], [0, focal / height, y / height], [0, 0, 1]])


def _carla(files: Files, images: list[str]) -> Frames | None:
    """GRAF's: NAME_extrinsics.npy beside or below NAME.png, OpenGL axes, z up, at radius 10.

    Brought to the unit sphere with y up, as π-GAN and its successors use it: x, y, z become y, z, x.
    None if there are no poses, or if their cameras do not look at the origin.
    """
    poses = {posixpath.basename(name)[: -len(EXTRINSICS)]: name for name in files.sizes if name.endswith(EXTRINSICS)}
    if not poses:
        return None
    stems = {posixpath.splitext(posixpath.basename(name))[0]: name for name in images}
    matched = [stem for stem in stems if stem in poses]
    if not matched:
        return None
    world = np.stack([np.load(io.BytesIO(files.read(poses[stem]))).astype(np.float64)[:3, :4] for stem in matched])
    radius = np.linalg.norm(world[:, :, 3], axis=-1)
    backward = (world[:, :, 2] * world[:, :, 3]).sum(-1) / radius.clip(1e-9)
    if backward.min() < 0.99:
        return None
    world[:, :, 3] /= np.median(radius)
    intrinsics = intrinsics_from_fov(CARLA_FOV).double().numpy()
    return {stems[stem]: (_opencv(pose[[1, 2, 0]]), intrinsics) for stem, pose in zip(matched, world, strict=True)}
