"""Jobs of `prepare` whose pictures get cameras: from labels, from an estimator, and in mirrored copies."""

import io
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from datasets import cameras
from datasets.cameras import Label
from datasets.decoding import rgb
from datasets.writing import Entry, Job, Skipped, png


class Views(NamedTuple):
    """Where the cameras of pictures come from that bring none.

    cameras: a file of labels or angles; see `cameras.read`.
    poses, weights: an estimator; see `cameras.estimator`.
    radius, fov_degrees: of cameras made from angles; None: those of `sources.SOURCES`.
    mirror: also write every picture and its camera mirrored, as NAME_mirror.png.
    """

    cameras: Path | None = None
    poses: str | None = None
    weights: Path | None = None
    radius: float | None = None
    fov_degrees: float | None = None
    mirror: bool = False

    def check(self) -> None:
        if self.cameras and self.poses:
            raise ValueError("cameras=… and poses=… both say where the cameras come from: choose one")
        if self.weights and not self.poses:
            raise ValueError("weights=… are those of an estimator: say which with poses=package.module:function")


def must_be_square(width: int, height: int) -> None:
    if width != height:
        raise ValueError("pictures with cameras that are not square need resolution=…: they are cropped, and the "
                         "intrinsics with them")


def with_labels(jobs: list[Job], given: cameras.Given, size: tuple[int, int], crop: int | None
                ) -> tuple[list[Job], str]:
    """The jobs whose pictures have a label, with it; and a sentence on how many have one.

    Args:
        size: (width, height) of the pictures as they lie, which published labels belong to.
        crop: side of the centred square that the jobs cut out.
    """
    found, rules = cameras.match([job.name for job in jobs], given.labels)
    if not found:
        raise ValueError(f"none of the {len(jobs)} pictures has a camera: they are called {jobs[0].name} …, "
                         f"the cameras {next(iter(given.labels))} …")
    kept = []
    for job in jobs:
        if job.name in found:
            label = given.labels[found[job.name]]
            label = cameras.follow_crop(label, *size, crop) if given.published else label
            kept.append(Job(job.name, partial(_labelled, job, label)))
    how = ", ".join(f"{count} by {rule}" for rule, count in rules.items())
    return kept, (f"cameras: {len(found)} matched ({how}); {len(jobs) - len(found)} pictures without a camera left "
                  f"out; {len(given.labels) - len(found)} cameras without a picture")


def _labelled(job: Job, label: Label) -> list[Entry]:
    return [entry._replace(label=label) for entry in job.make()]


def with_poses(jobs: list[Job], estimate: Callable[[np.ndarray], Label | None]) -> list[Job]:
    """The jobs with the cameras that the estimator sees in the pictures as they are written."""
    return [Job(job.name, partial(_seen, job, estimate)) for job in jobs]


def _seen(job: Job, estimate: Callable[[np.ndarray], Label | None]) -> list[Entry]:
    entries = []
    for entry in job.make():
        picture = rgb(_image(entry), (1, 1, 1))
        must_be_square(*picture.size)
        label = estimate(np.asarray(picture))
        if label is None:
            raise Skipped("pictures whose pose was not found")
        entries.append(entry._replace(label=label))
    return entries


def with_mirrored(jobs: list[Job]) -> list[Job]:
    """Jobs that also make the mirrored copy of their picture, with the mirrored camera; NAME_mirror.png, as EG3D's."""
    already = next((job.name for job in jobs if os.path.splitext(job.name)[0].endswith("_mirror")), None)
    if already:
        raise ValueError(f"mirror=true, but the set already holds mirrored copies ({already})")
    return [Job(job.name, partial(_both, job)) for job in jobs]


def _both(job: Job) -> list[Entry]:
    return [turned for entry in job.make() for turned in (entry, _mirrored(entry))]


def _mirrored(entry: Entry) -> Entry:
    label = None if entry.label is None else cameras.mirrored(entry.label)
    return Entry(f"{os.path.splitext(entry.name)[0]}_mirror.png", png(ImageOps.mirror(_image(entry))), label)


def _image(entry: Entry) -> Image.Image:
    with Image.open(io.BytesIO(entry.data)) as image:
        return ImageOps.exif_transpose(image)
