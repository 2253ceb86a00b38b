"""Writing a set: its pictures, and dataset.json where they have cameras, into a folder or a stored zip."""

import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

from datasets.cameras import Label
from datasets.decoding import Unreadable


class Entry(NamedTuple):
    """A picture to write: its file's name and bytes, and its label if it has a camera."""

    name: str
    data: bytes
    label: Label | None = None


class Job(NamedTuple):
    """A picture still to be made: the name of its file, and what makes its entries or raises Skipped."""

    name: str
    make: Callable[[], list[Entry]]


class Skipped(Exception):
    """This picture is left out; the text says why."""


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG", compress_level=3)
    return file.getvalue()


def write(jobs: list[Job], out: Path) -> tuple[int, dict[str, int]]:
    """Make and write every entry, on all cores, under another name until all is there. (written, why → left out)."""
    out.parent.mkdir(parents=True, exist_ok=True)
    making = out.with_name(f".making-{out.name}")
    shutil.rmtree(making, ignore_errors=True)
    making.unlink(missing_ok=True)
    labels: list = []
    skipped: dict[str, int] = {}
    written = 0
    with _Folder(making) if out.suffix != ".zip" else _StoredZip(making) as put:
        for made in tqdm(_made(jobs), total=len(jobs), desc=f"writing {out.name}", unit="image", mininterval=1):
            if isinstance(made, Skipped):
                skipped[str(made)] = skipped.get(str(made), 0) + 1
                continue
            for entry in made:
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


def _made(jobs: list[Job]) -> Iterator[list[Entry] | Skipped]:
    def attempt(job: Job) -> list[Entry] | Skipped:
        try:
            return job.make()
        except Skipped as why:
            return why
        except (OSError, Unreadable, zipfile.BadZipFile):
            return Skipped("damaged files")

    waiting = iter(jobs)
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
