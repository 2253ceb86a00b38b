"""Published image sets, downloaded or given, into the project's layout: pictures, and dataset.json where posed."""

import io
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from datasets import cameras
from datasets.cameras import Framing, Label, label_of
from datasets.decoding import centre_square, rgb
from datasets.download import DownloadFailed, digest, download, published_checksum
from datasets.files import Files
from datasets.images import ImageCollection, open_files
from datasets.labels import SUFFIXES, first_size, read_labels
from datasets.posing import Views, must_be_square, with_labels, with_mirrored, with_poses
from datasets.sources import SOURCES
from datasets.writing import Entry, Job, Skipped, png, write

CAT_BORDER = (128, 128, 128)  # what shows beyond the photograph's edge once it is turned
CAT_SMALLEST = 64  # crops with a shorter side are left out


def prepare(
    name: str, *, out: Path, sources: list[Path], resolution: int | None = None, crop: int | None = None,
    subset: str | None = None, limit: int | None = None, downloads: Path, checksum: str | None = None,
    views: Views = Views(),  # noqa: B008 (a tuple, which nobody can change)
) -> str:
    """Make the set `name` in `out` (a folder, or a stored zip if it ends in .zip). Returns a sentence on what was made.

    Args:
        sources: what the user has; empty: download it into `downloads` first.
        resolution, crop: None: those of `sources.SOURCES`, which may say to keep the files as they are.
        checksum: of the one file to download, if the user knows it; see `download.download`.
        views: cameras, for pictures that bring none.
    Raises: FileExistsError if `out` holds something; DatasetMissing, DownloadFailed with the manual route.
    """
    known = SOURCES[name]
    out = out.expanduser().absolute()
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not empty: delete it, or choose another with out=…")
    for source in sources:
        if not source.exists():
            raise FileNotFoundError(f"source {source.absolute()} does not exist.\n  For {name}: {known.by_hand}")
    views.check()
    framing = Framing(views.radius or known.radius, views.fov_degrees or known.fov_degrees)
    given = cameras.read(views.cameras, framing) if views.cameras else None  # before any download or unpacking
    estimate = cameras.estimator(views.poses, views.weights, framing) if views.poses else None
    sources = sources or fetch(name, downloads, checksum)
    resolution, crop, subset = resolution or known.resolution, crop or known.crop, subset or known.subset
    with _unpacked(sources, subset, out.parent) as root:
        jobs = _jobs(name, root, resolution, crop, None if given else limit)
        told = []
        if given is not None:
            size = _picture_size(name, root)
            if resolution is None:
                must_be_square(*size)
            jobs, matched = with_labels(jobs, given, size, crop)
            told = [matched, *_about_ffhq(*size)] if name == "ffhq" and given.published else [matched]
        if estimate is not None:
            jobs = with_poses(jobs, estimate)
        jobs = jobs[:limit]
        count, skipped = write(with_mirrored(jobs) if views.mirror else jobs, out)
    left_out = "".join(f"; left out: {number} {why}" for why, number in skipped.items())
    form = "as they are" if resolution is None else f"at {resolution}x{resolution}"
    return "\n".join([f"{count} pictures {form} in {out}{left_out}", *told])


def _picture_size(name: str, root: Path) -> tuple[int, int]:
    files = open_files(name, root)
    return first_size(files, sorted(path for path in files.sizes if path.lower().endswith(SUFFIXES)))


def _about_ffhq(width: int, height: int) -> list[str]:
    """What the user must know whose pictures are not the ones that EG3D's cameras were made for."""
    return [] if (width, height) == (512, 512) else [
        "note: EG3D's cameras of FFHQ belong to the 512x512 crops that its own preprocessing makes from the original\n"
        f"photographs. These pictures are {width}x{height}: if they are FFHQ's own crops, the cameras fit only roughly "
        "(docs/data.md)"]


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


def _jobs(name: str, root: Path, resolution: int | None, crop: int | None, limit: int | None) -> list[Job]:
    """A job for every picture of the set, in order."""
    files = open_files(name, root)
    arrays = sorted(path for path in files.sizes if path.endswith(".npy") and not path.endswith("_extrinsics.npy"))
    cats = sorted(path for path in files.sizes if path.endswith(".cat") and path[:-4] in files.sizes)
    if name == "cats" and cats:
        jobs = [Job(_as_png(path[:-4]), partial(cat_face, files, path[:-4], resolution or 128)) for path in cats]
    elif arrays and not any(path.lower().endswith((".png", ".jpg")) for path in files.sizes):
        jobs = [Job(_as_png(path), partial(array_picture, files, path, resolution, crop)) for path in arrays]
    elif resolution is None and crop is None:
        jobs = _as_they_are(name, root, files)
    else:
        if resolution is None:
            raise ValueError("crop=… needs resolution=…, the side of the pictures to write")
        pictures = ImageCollection(root=root, name=name, resolution=resolution, crop=crop, limit=limit)
        jobs = [Job(_as_png(path), partial(_picture, pictures, index)) for index, path in enumerate(pictures.names)]
    return jobs[:limit]


def _as_png(path: str) -> str:
    return os.path.splitext(path)[0] + ".png"


def _as_they_are(name: str, root: Path, files: Files) -> list[Job]:
    labelled = read_labels(files, None)
    if not labelled.images:
        ImageCollection(root=root, name=name, resolution=1)  # raises, with its reasons
    camera = labelled.camera
    labels = [None if camera is None else label_of(camera[index]) for index in range(len(labelled.images))]
    if camera is not None:
        must_be_square(*first_size(files, labelled.images))
    return [Job(path, partial(_file, files, path, label))
            for path, label in zip(labelled.images, labels, strict=True)]


def _file(files: Files, path: str, label: Label | None) -> list[Entry]:
    return [Entry(path, files.read(path), label)]


def _picture(pictures: ImageCollection, index: int) -> list[Entry]:
    shown, image = pictures.load(index)
    if shown != index:
        raise Skipped("damaged files")
    camera = pictures.camera(torch.tensor([index]))
    data = png(Image.fromarray(image.permute(1, 2, 0).numpy()))
    return [Entry(_as_png(pictures.names[index]), data, None if camera is None else label_of(camera))]


def array_picture(files: Files, path: str, resolution: int | None, crop: int | None) -> list[Entry]:
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
    return [Entry(_as_png(path), png(picture))]


def cat_face(files: Files, path: str, resolution: int) -> list[Entry]:
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
    return [Entry(_as_png(path), png(face))]
