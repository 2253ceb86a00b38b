"""Collections of images for GANs: a folder or a zip in, uint8 pictures of one resolution out, with cameras where known.

Reads plain folders and zips, EG3D's dataset.json, Blender's transforms.json and GRAF's CARLA poses (see `labels`).
"""

import hashlib
import mmap
import os
import warnings
import zipfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from datasets.decoding import Unreadable, decode
from datasets.files import Files, Folder, Zip
from datasets.labels import SUFFIXES, read_labels
from datasets.sources import command
from gan3d.cameras import Camera

CACHE_BYTES = 2**30  # decoded pictures are kept in memory if the whole set fits
VERIFY_IMAGES, VERIFY_BYTES = 5000, 2**28  # sets up to this size are decoded, hence checked, when they are opened


class ImageBatch(NamedTuple):
    """Pictures as they cross the data loader. camera is None where the set has no poses."""

    images: Tensor  # uint8 [b 3 h w]
    camera: Camera | None


class DatasetMissing(FileNotFoundError):
    """There are no pictures where the configuration looks. Its text says what would help."""


def missing(name: str, root: Path, problem: str) -> DatasetMissing:
    return DatasetMissing(
        f"data set {name!r}: {problem}\n"
        f"  looked in:  {root}\n"
        f"  expected:   a folder (searched through) or a .zip of {', '.join(s[1:] for s in SUFFIXES)} images;\n"
        f"              cameras, if any, in dataset.json (EG3D) or transforms.json (Blender) (docs/data.md)\n"
        f"  to make it: {command(name, root)}\n"
        f"              (python prepare.py --help tells where each set comes from)\n"
        f"  elsewhere?  data.root=/path/to/images    no data at hand?  data=cars renders its own"
    )


def open_files(name: str, root: Path) -> Files:
    """The folder or zip at `root` (or at `root`.zip). Raises DatasetMissing."""
    if not root.exists() and root.with_name(root.name + ".zip").is_file():
        root = root.with_name(root.name + ".zip")
    if root.is_dir():
        return Folder(root)
    if not root.exists():
        raise missing(name, root, "there is nothing at its root")
    try:
        return Zip(root)
    except (zipfile.BadZipFile, OSError) as error:
        raise missing(name, root, f"its root is neither a folder nor a sound zip ({error})") from error


class ImageCollection:
    """Pictures by index, uint8 `[3 h w]`; `cameras` has one entry for each, or is None.

    Args:
        root: a folder, searched through, or a zip.
        resolution: side of the square pictures.
        name: of the data set, for messages and records.
        crop: side of the centred square cut out before resizing, in pixels of the file; None: the shorter side.
        background: rgb in [0, 1] shown where a file is transparent.
        limit: only the first so many pictures, in order of their names.

    Small sets are decoded when opened, and files that cannot be are left out. In large sets a damaged file turns up
    when it is asked for: the next readable one then stands in for it (`load` says which). Both are counted in
    `skipped` and told once.
    Raises: DatasetMissing if there is no picture; ValueError if a label file is damaged.
    """

    def __init__(
        self,
        *,
        root: str | os.PathLike,
        resolution: int,
        name: str,
        crop: int | None = None,
        background: Sequence[float | int] | None = (1.0, 1.0, 1.0),
        limit: int | None = None,
    ):
        if resolution < 1:
            raise ValueError(f"resolution must be positive, got {resolution}")
        self.name, self.resolution, self.crop = name, resolution, crop
        self.background = tuple(float(channel) for channel in background or (1, 1, 1))
        self._files = open_files(name, Path(root).expanduser().absolute())
        self.root = self._files.root
        labelled = read_labels(self._files, crop)
        if not labelled.images:
            found = f"holds {len(self._files.sizes)} files, but" if self._files.sizes else "is empty:"
            raise missing(name, self.root, f"its root {found} no picture of the set "
                          f"({'; '.join(f'{n} {why}' for why, n in labelled.skipped.items()) or 'no image files'})")
        self.skipped: Counter[str] = Counter(labelled.skipped)
        self.names = labelled.images[:limit]
        self.cameras: Camera | None = None if labelled.camera is None else labelled.camera[:limit]  # type: ignore
        self._broken: set[int] = set()
        self._allocate()
        small = len(self) <= VERIFY_IMAGES and sum(self._files.sizes[n] for n in self.names) <= VERIFY_BYTES
        self._tell(self._drop_damaged() if small else [])
        self.fingerprint = self._fingerprint()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> UInt8[Tensor, "3 h w"]:
        return self.load(index)[1]

    def load(self, index: int) -> tuple[int, UInt8[Tensor, "3 h w"]]:
        """(which picture is shown, the picture): `index` itself, or the next readable one if that file is damaged."""
        index = range(len(self))[index]
        for shown in (*range(index, len(self)), *range(index)):
            if shown in self._broken:
                continue
            try:
                return shown, torch.from_numpy(self._picture(shown))
            except Unreadable as error:
                self._broken.add(shown)
                self.skipped["damaged files"] += 1
                if len(self._broken) == 1:
                    warnings.warn(f"data set {self.name!r}: {self.names[shown]} cannot be read ({error}); the next one "
                                  "stands in for it. Further damaged files are counted, not told.", stacklevel=2)
        raise missing(self.name, self.root, f"none of its {len(self)} images can be read")

    def camera(self, indices: Int[Tensor, " b"]) -> Camera | None:
        """The cameras of these pictures, as a batch; None if the set is unposed."""
        return None if self.cameras is None else self.cameras[indices]  # type: ignore[return-value]

    def _picture(self, index: int) -> np.ndarray:
        if self._cache is not None and self._cached[index]:
            return self._cache[index].copy()
        try:
            data = self._files.read(self.names[index])
        except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:  # the last two: zip flavours
            raise Unreadable(str(error)) from error
        picture = decode(data, resolution=self.resolution, crop=self.crop, background=self.background)
        if self._cache is not None:
            self._cache[index] = picture
            self._cached[index] = True
        return picture

    def _allocate(self) -> None:
        """Room for the decoded pictures, in anonymous shared memory: forked loader workers fill it together."""
        shape = (len(self.names), 3, self.resolution, self.resolution)
        self._cache = self._cached = None
        if np.prod(shape, dtype=np.int64) <= CACHE_BYTES:
            self._cache = np.frombuffer(mmap.mmap(-1, int(np.prod(shape))), np.uint8).reshape(shape)
            self._cached = np.frombuffer(mmap.mmap(-1, len(self.names)), np.bool_)

    def _drop_damaged(self) -> list[str]:
        """Decode everything; the names of those that cannot be, which leave the set."""

        def sound(index: int) -> bool:
            try:
                self._picture(index)
            except Unreadable:
                return False
            return True

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            good = list(pool.map(sound, range(len(self))))
        if all(good):
            return []
        if not any(good):
            raise missing(self.name, self.root, f"none of its {len(self)} images can be read")
        damaged = [name for name, fine in zip(self.names, good, strict=True) if not fine]
        keep, pictures = np.flatnonzero(good), self._cache
        self.skipped["damaged files"] = len(damaged)
        self.names = [self.names[index] for index in keep]
        self.cameras = self.camera(torch.from_numpy(keep))
        self._allocate()
        if pictures is not None and self._cache is not None:
            self._cache[:], self._cached[:] = pictures[keep], True
        return damaged

    def _tell(self, damaged: list[str]) -> None:
        if self.skipped:
            why = "; ".join(f"{count} {reason}" for reason, count in self.skipped.items())
            names = f" (damaged: {', '.join(damaged[:5])}{', …' if len(damaged) > 5 else ''})" if damaged else ""
            warnings.warn(f"data set {self.name!r}: {len(self)} pictures used, left out: {why}{names}", stacklevel=3)

    def _fingerprint(self) -> str:
        """Twelve hex digits of names, sizes, cameras and preprocessing; the pictures themselves are not read."""
        digest = hashlib.sha256(f"{self.resolution} {self.crop} {self.background} lanczos 1\n".encode())
        for name in self.names:
            digest.update(f"{name} {self._files.sizes[name]}\n".encode())
        if self.cameras is not None:
            digest.update(self.cameras.camera_to_world.numpy().tobytes() + self.cameras.intrinsics.numpy().tobytes())
        return digest.hexdigest()[:12]

    def __getstate__(self):
        """Without the cache: a spawned worker starts with its own."""
        return {**self.__dict__, "_cache": None, "_cached": None}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._allocate()
