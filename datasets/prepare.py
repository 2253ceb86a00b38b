"""Published image sets, downloaded or given, into the project's layout: pictures, and dataset.json where posed."""

import io
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from datasets.decoding import Unreadable, centre_square, rgb
from datasets.download import DownloadFailed, digest, download, published_checksum
from datasets.files import Files
from datasets.images import ImageCollection, open_files
from datasets.labels import first_size, read_labels
from datasets.sources import SOURCES

CAT_BORDER = (128, 128, 128)  # what shows beyond the photograph's edge once it is turned
CAT_SMALLEST = 64  # crops with a shorter side are left out


class Entry(NamedTuple):
    """A file to write: its name, its bytes, and its 25-number label if it has one."""

    name: str
    data: bytes
    label: list[float] | None = None


class Skipped(Exception):
    """This picture is left out; the text says why."""


def prepare(
    name: str, *, out: Path, sources: list[Path], resolution: int | None = None, crop: int | None = None,
    subset: str | None = None, limit: int | None = None, downloads: Path, checksum: str | None = None,
) -> str:
    """Make the set `name` in `out` (a folder, or a stored zip if it ends in .zip). Returns a sentence on what was made.

    Args:
        sources: what the user has; empty: download it into `downloads` first.
        resolution: None: that of `sources.SOURCES`, which may say to keep the files as they are.
        checksum: of the one file to download, if the user knows it; see `download.download`.
    Raises: FileExistsError if `out` holds something; DatasetMissing, DownloadFailed with the manual route.
    """
    known = SOURCES[name]
    out = out.expanduser().absolute()
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not empty: delete it, or choose another with out=…")
    for source in sources:
        if not source.exists():
            raise FileNotFoundError(f"source {source.absolute()} does not exist.\n  For {name}: {known.by_hand}")
    sources = sources or fetch(name, downloads, checksum)
    resolution, subset = resolution or known.resolution, subset or known.subset
    with _unpacked(sources, subset, out.parent) as root:
        entries = _entries(name, root, resolution, crop, limit)
        count, skipped = write(entries, out)
    left_out = "".join(f"; left out: {number} {why}" for why, number in skipped.items())
    size = "as they are" if resolution is None else f"at {resolution}x{resolution}"
    return f"{count} pictures {size} in {out}{left_out}"


def fetch(name: str, downloads: Path, checksum: str | None = None) -> list[Path]:
    """Download the set's archives, or explain how to do it by hand."""
    known = SOURCES[name]
    by_hand = f"By hand ({known.page}):\n  {known.by_hand}"
    if not known.urls:
        raise DownloadFailed(f"{name} needs source=…: it cannot be fetched without a browser or an account.\n{by_hand}")
    paths = []
    for url in known.urls:
        target = downloads.expanduser().absolute() / Path(urlsplit(url).path).name
        try:
            download(url, target, checksum=checksum if len(known.urls) == 1 and checksum else published_checksum(url))
        except DownloadFailed as error:
            raise DownloadFailed(f"{error}\n{by_hand}") from error
        if not zipfile.is_zipfile(target):
            target.unlink()
            raise DownloadFailed(f"{url}\n  did not send a zip file (a page asking for consent, perhaps).\n{by_hand}")
        print(f"{target.name}: sha256 {digest(target)}")
        paths.append(target)
    return paths


@contextmanager
def _unpacked(sources: list[Path], subset: str | None, scratch_parent: Path) -> Iterator[Path]:
    """One folder or zip with the sources' files: the source itself where possible, else a scratch folder."""
    sources = [path.expanduser().absolute() for path in sources]
    if len(sources) == 1 and sources[0].is_dir():
        inner = sorted(path for path in sources[0].rglob(subset)) if subset else []
        zips = sorted(sources[0].glob("*.zip"))
        if inner or not zips or any(path.is_dir() for path in sources[0].iterdir()):
            yield inner[0] if inner else sources[0]
            return
        sources = zips
    elif len(sources) == 1 and not subset:
        yield sources[0]
        return
    scratch_parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=scratch_parent))
    try:
        for path in sources:
            if path.is_dir():
                shutil.copytree(path, scratch / path.name)
            else:
                _unzip(path, scratch / path.stem, subset)
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _unzip(path: Path, folder: Path, subset: str | None) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            inside = [name for name in archive.namelist() if subset is None or f"/{subset}/" in f"/{name}"]
            for name in tqdm(inside or archive.namelist(), desc=f"unpacking {path.name}", mininterval=1):
                archive.extract(name, folder)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is damaged or no zip file ({error})") from error


def _entries(name: str, root: Path, resolution: int | None, crop: int | None, limit: int | None) -> list[Callable]:
    """For every picture of the set, in order, a function that makes its entry, or raises Skipped."""
    files = open_files(name, root)
    arrays = sorted(path for path in files.sizes if path.endswith(".npy") and not path.endswith("_extrinsics.npy"))
    cats = sorted(path for path in files.sizes if path.endswith(".cat") and path[:-4] in files.sizes)
    if name == "cats" and cats:
        make = [lambda path=path: cat_face(files, path[:-4], resolution or 128) for path in cats]
    elif arrays and not any(path.lower().endswith((".png", ".jpg")) for path in files.sizes):
        make = [lambda path=path: array_picture(files, path, resolution, crop) for path in arrays]
    elif resolution is None and crop is None:
        return _as_they_are(name, root, files)[:limit]
    else:
        if resolution is None:
            raise ValueError("crop=… needs resolution=…, the side of the pictures to write")
        pictures = ImageCollection(root=root, name=name, resolution=resolution, crop=crop, limit=limit)
        make = [lambda index=index: _picture(pictures, index) for index in range(len(pictures))]
    return make[:limit]


def _as_they_are(name: str, root: Path, files: Files) -> list[Callable]:
    labelled = read_labels(files, None)
    if not labelled.images:
        ImageCollection(root=root, name=name, resolution=1)  # raises, with its reasons
    labels = [None] * len(labelled.images) if labelled.camera is None else _labels(labelled.camera)
    width, height = first_size(files, labelled.images)
    if labelled.camera is not None and width != height:
        raise ValueError("pictures with cameras that are not square need resolution=…: they are cropped, and the "
                         "intrinsics with them")
    return [lambda path=path, label=label: Entry(path, files.read(path), label)
            for path, label in zip(labelled.images, labels, strict=True)]


def _labels(camera) -> list[list[float]]:
    pairs = zip(camera.camera_to_world.flatten(-2).tolist(), camera.intrinsics.flatten(-2).tolist(), strict=True)
    return [pose + intrinsics for pose, intrinsics in pairs]


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG", compress_level=3)
    return file.getvalue()


def _picture(pictures: ImageCollection, index: int) -> Entry:
    shown, image = pictures.load(index)
    if shown != index:
        raise Skipped("damaged files")
    camera = pictures.camera(torch.tensor([index]))
    name = os.path.splitext(pictures.names[index])[0] + ".png"
    return Entry(name, _png(Image.fromarray(image.permute(1, 2, 0).numpy())), camera and _labels(camera)[0])


def array_picture(files: Files, path: str, resolution: int | None, crop: int | None) -> Entry:
    """CelebA-HQ as GRAF keeps it: `[1 3 h w]` in .npy, uint8, or float in [0, 1]."""
    try:
        values = np.load(io.BytesIO(files.read(path))).squeeze()
    except ValueError as error:
        raise Skipped("damaged files") from error
    if values.ndim != 3 or values.shape[0] != 3:
        raise Skipped("arrays that are no [3 h w] picture")
    if values.dtype != np.uint8:
        values = np.round(values.clip(0, 1) * 255).astype(np.uint8)
    picture = Image.fromarray(np.ascontiguousarray(values.transpose(1, 2, 0)))
    left, top, side = centre_square(*picture.size, crop)
    picture = picture.crop((left, top, left + side, top + side))
    if resolution is not None:
        picture = picture.resize((resolution, resolution), Image.Resampling.LANCZOS)
    return Entry(path[: -len(".npy")] + ".png", _png(picture))


def cat_face(files: Files, path: str, resolution: int) -> Entry:
    """GRAF's crop of the CAT photographs (its data/preprocess_cats.py, after Hovland): turned until the eyes are level,
    as wide as the ears' outer feet are apart, the middle of the eyes at (0.5, 0.4); cut where the photograph ends."""
    try:
        points = np.array(files.read(path + ".cat").split()[1:19], dtype=np.float64).reshape(9, 2)
        with Image.open(io.BytesIO(files.read(path))) as image:
            photograph = rgb(image, (1, 1, 1))
    except Exception as error:  # a damaged picture or landmark file, in any of the ways that decoders know
        raise Skipped("damaged files") from error
    left_eye, right_eye, mouth = points[:3]
    if left_eye[0] > right_eye[0] and left_eye[1] < right_eye[1] and mouth[0] > right_eye[0]:
        left_eye, right_eye = right_eye, left_eye  # an upside-down cat: its eyes are labelled the other way round
    middle = (left_eye + right_eye) / 2
    across = right_eye - left_eye
    angle = np.arctan2(across[1], across[0])
    degrees = float(np.degrees(angle))
    straight = photograph.rotate(degrees, Image.Resampling.BICUBIC, center=tuple(middle), fillcolor=CAT_BORDER)
    turned_x = ((points - middle) @ np.array([np.cos(angle), np.sin(angle)])) + middle[0]
    width = abs(turned_x[8] - turned_x[3])
    left, top = middle[0] - width / 2, middle[1] - 0.4 * width
    box = (max(left, 0), max(top, 0), min(left + width, photograph.width), min(top + width, photograph.height))
    if min(box[2] - box[0], box[3] - box[1]) < CAT_SMALLEST:
        raise Skipped(f"faces under {CAT_SMALLEST} pixels")
    face = straight.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box)
    return Entry(os.path.splitext(path)[0] + ".png", _png(face))


def write(entries: list[Callable[[], Entry]], out: Path) -> tuple[int, dict[str, int]]:
    """Make and write every entry, on all cores, under another name until all is there. (written, why → left out)."""
    out.parent.mkdir(parents=True, exist_ok=True)
    making = out.with_name(f".making-{out.name}")
    shutil.rmtree(making, ignore_errors=True)
    making.unlink(missing_ok=True)
    labels: list = []
    skipped: dict[str, int] = {}
    written = 0
    with _Folder(making) if out.suffix != ".zip" else _StoredZip(making) as put:
        for entry in tqdm(_made(entries), total=len(entries), desc=f"writing {out.name}", unit="image", mininterval=1):
            if isinstance(entry, Skipped):
                skipped[str(entry)] = skipped.get(str(entry), 0) + 1
                continue
            put(entry.name, entry.data)
            written += 1
            if entry.label is not None:
                labels.append([entry.name, entry.label])
        if labels:
            put("dataset.json", json.dumps({"labels": labels}).encode())
    if not written:
        shutil.rmtree(making) if making.is_dir() else making.unlink()
        why = ", ".join(f"{number} {reason}" for reason, number in skipped.items())
        raise ValueError(f"no picture could be made ({why or 'none found'})")
    if out.is_dir():
        out.rmdir()  # known to be empty
    making.replace(out)
    return written, skipped


def _made(entries: Iterable[Callable[[], Entry]]) -> Iterator[Entry | Skipped]:
    def attempt(make: Callable[[], Entry]) -> Entry | Skipped:
        try:
            return make()
        except Skipped as why:
            return why
        except (OSError, Unreadable, zipfile.BadZipFile):
            return Skipped("damaged files")

    waiting = iter(entries)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while block := list(islice(waiting, 256)):  # bounded memory: no more than a block is held encoded
            yield from pool.map(attempt, block)


@contextmanager
def _Folder(path: Path) -> Iterator[Callable[[str, bytes], object]]:
    def put(name: str, data: bytes) -> None:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)

    path.mkdir()
    yield put


@contextmanager
def _StoredZip(path: Path) -> Iterator[Callable[[str, bytes], object]]:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        yield archive.writestr
