"""The cameras that come with pictures, from the four layouts in use; all leave here with OpenCV axes.

dataset.json (EG3D): 25 numbers a picture. transforms.json (Blender, instant-ngp): OpenGL axes. VoxGRAF's json: a field
of view and OpenGL poses. `*_extrinsics.npy` (GRAF's CARLA): one OpenGL pose a picture.
"""

import io
import json
import math
import posixpath
from collections import Counter
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

    A posed set has pictures of one size: where they are not square, the intrinsics follow the centre crop.
    Raises: ValueError naming the file, if a label file is damaged.
    """
    images = sorted(name for name in files.sizes if name.lower().endswith(SUFFIXES))
    for filename, parse in (("dataset.json", _dataset_json), ("transforms.json", _transforms_json),
                            ("transforms_train.json", _transforms_json)):
        path = shallowest(files, filename)
        if path is not None:
            frames = parse(files, path)
            return Labelled(images, None, Counter()) if frames is None else _match(files, images, frames, path, crop)
    frames = _carla(files, images)
    if frames is not None:
        return _match(files, images, frames, f"*{EXTRINSICS}", crop)
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
    return Labelled(kept, Camera(poses, _cropped(intrinsics, *first_size(files, kept), crop)), +skipped)


def first_size(files: Files, names: list[str]) -> tuple[int, int]:
    """(width, height) of the first of these pictures that can be read."""
    for name in names:
        try:
            return image_size(files.read(name))
        except (Unreadable, OSError):
            continue
    return 1, 1  # nothing can be read, which the collection will say


def _cropped(intrinsics: torch.Tensor, width: int, height: int, crop: int | None) -> torch.Tensor:
    """Normalised intrinsics of the centred square that `decoding.decode` cuts out."""
    left, top, side = centre_square(width, height, crop)
    if side == width == height:
        return intrinsics
    scale = torch.tensor([[width / side], [height / side], [1.0]])
    shift = torch.zeros(3, 3)
    shift[0, 2], shift[1, 2] = left / side, top / side
    return intrinsics * scale - shift


def _json(files: Files, path: str) -> dict:
    try:
        content = json.loads(files.read(path))
    except ValueError as error:
        raise ValueError(f"{files.root / path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{files.root / path} must hold an object, not {type(content).__name__}")
    return content


def _dataset_json(files: Files, path: str) -> Frames | None:
    """EG3D's: {"labels": [[file, 25 numbers], …]}, 4×4 camera-to-world (OpenCV) then 3×3 normalised intrinsics."""
    content = _json(files, path)
    if "poses" in content and "fov" in content:
        return _voxgraf_json(files, path, content)
    if "labels" not in content:
        raise ValueError(f"{files.root / path} has no 'labels'; expected {{\"labels\": [[file, [25 numbers]], …]}}")
    labels = content["labels"]
    if not labels or not any(isinstance(label, list) for _, label in labels):
        return None  # null, or class numbers: pictures without cameras
    folder = posixpath.dirname(path)
    frames: Frames = {}
    for name, label in labels:
        values = np.asarray(label, dtype=np.float64)
        if values.shape != (25,) or not np.isfinite(values).all():
            raise ValueError(f"{files.root / path}: the label of {name} must be 25 finite numbers, got {len(label)}")
        frames[posixpath.join(folder, name)] = values[:16].reshape(4, 4), values[16:].reshape(3, 3)
    return frames


def _voxgraf_json(files: Files, path: str, content: dict) -> Frames:
    intrinsics = intrinsics_from_fov(float(content["fov"])).double().numpy()
    folder = posixpath.dirname(path)
    return {posixpath.join(folder, name): (_opencv(np.asarray(pose)), intrinsics) for name, pose in content["poses"]}


def _opencv(pose: np.ndarray) -> np.ndarray:
    full = np.eye(4)
    full[: pose.shape[0], :4] = pose[:, :4]
    return flip_axes(torch.from_numpy(full)).numpy()


def _transforms_json(files: Files, path: str) -> Frames:
    """Blender's and instant-ngp's: frames with OpenGL poses; one camera_angle_x, or fl_x, fl_y, cx, cy with w, h."""
    content = _json(files, path)
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
