"""The embedded data sets: cars rendered from CC0 meshes on first use, with exact cameras and depth, at any resolution.

`EmbeddedCars` stands in for CARLA as GRAF uses it: one object on white, cameras uniform over the upper hemisphere,
field of view 30°. `ParkedCars` stands in for CLEVR as GIRAFFE uses it: several objects, seen by its camera.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from datasets import raycast
from datasets.images import ImageCollection
from gan3d.poses import Spherical, Uniform, UniformArea

try:
    import fcntl
except ImportError:  # Windows: simultaneous first runs may then both render; the renaming keeps that harmless
    fcntl = None  # type: ignore[assignment]

VERSION = 1  # of the pictures: raised whenever the same arguments would give others
MESHES = Path(__file__).parent / "cars"
HELD_OUT = ("kenney-suv", "kenney-van", "qbasic-racecar", "qreal-normalcar2", "qreal-sportscar2")
POSES = Spherical(
    radius=2.35, azimuth=Uniform(0, 360), polar=UniformArea(10, 88), fov_degrees=30, up="z", target=(0, 0, 0.18)
)  # also in configs/data/cars.yaml
PARKING_POSES = Spherical(radius=2.732, azimuth=Uniform(0, 0), polar=Uniform(60, 70), fov_degrees=44, up="z")
PARKING_RADIUS = 0.7  # of the middles of cars; 1 with the cars themselves: what PARKING_POSES see whole
PARKING_SPACES = 5  # more hardly fit
PARKED_LENGTH = 0.5
CAR_REACH = 0.56  # of a car around its middle, in its lengths; that of the meshes is 0.55 at most


class RenderedSet(ImageCollection):
    """A set that is rendered on first use into a folder below `cache` (PNG with alpha, dataset.json, depth), which any
    other tool can read; later runs read it back.

    Args:
        folder: its name says all that the pictures depend on.
        task: picture i as a function of i alone: neither of the count, nor of how many processes render.
        models: what dataset.json says of a picture's models.
        depth_unit: depth is kept in 16 bits, as multiples of this.
    """

    def __init__(self, *, name: str, cache: str | os.PathLike, folder: str, resolution: int, images: int,
                 task: Callable[[int], raycast.Task], models: Callable[[raycast.Task], Any], depth_unit: float):
        if images < 1:
            raise ValueError(f"images must be positive, got {images}")
        root = Path(cache).expanduser().absolute() / folder
        if not (root / "dataset.json").exists():
            with _one_at_a_time(root.parent):
                if not (root / "dataset.json").exists():  # unless another process was faster
                    _render_set(root, [task(index) for index in range(images)], models, depth_unit)
        self.depth_unit = depth_unit
        super().__init__(root=root, resolution=resolution, name=name, background=(1.0, 1.0, 1.0))

    def depth(self, index: int) -> Float[Tensor, "h w"]:
        """Distance along the ray through each pixel's centre, to ± half a depth_unit; 0 where there is no car."""
        depth = np.load(self.root / "depth.npy", mmap_mode="r")
        return torch.from_numpy(depth[index].astype(np.float32)) * self.depth_unit


class EmbeddedCars(RenderedSet):
    """One low-poly car with random paint on white. World: z up, the car 1 long along x, wheels on z = 0.

    Args:
        cache: where rendered sets are kept.
        images: how many.
        held_out: render the five cars that the training set never shows.
    """

    def __init__(self, *, resolution: int, images: int, seed: int, cache: str | os.PathLike, held_out: bool = False):
        meshes = _meshes(held_out)

        def task(index: int) -> raycast.Task:
            random = np.random.default_rng([seed, index, held_out])
            mesh = meshes[random.integers(len(meshes))]
            return _task(POSES, random, (raycast.Parked(mesh),), resolution, (seed, index, held_out))

        folder = f"{_kind(held_out)}-{resolution}px-{images}-seed{seed}-v{VERSION}"
        super().__init__(name="cars", cache=cache, folder=folder, resolution=resolution, images=images, task=task,
                         models=lambda task: task.cars[0].mesh.stem, depth_unit=5e-5)


class ParkedCars(RenderedSet):
    """Several of these cars, each half a unit long, anywhere on a round place of white ground, turned anyhow.

    What CLEVR is to GIRAFFE: all cameras stand on one side, the objects turn, and their number varies. No two cars
    touch, and all are in the picture. dataset.json lists the models of each picture under "models".

    Args:
        cars: fewest and most cars of a picture; all numbers between are equally likely. At most 5.
    """

    def __init__(self, *, resolution: int, images: int, seed: int, cache: str | os.PathLike, cars: Sequence[int],
                 held_out: bool = False):
        fewest, most = cars
        if not 1 <= fewest <= most <= PARKING_SPACES:
            raise ValueError(f"cars must be [fewest, most] with 1 <= fewest <= most <= {PARKING_SPACES}, got {cars}")
        meshes = _meshes(held_out)

        def task(index: int) -> raycast.Task:
            random = np.random.default_rng([seed, index, held_out, 2])  # 2: not the numbers of the single cars
            places = _places(random, int(random.integers(fewest, most + 1)))
            parked = tuple(raycast.Parked(meshes[random.integers(len(meshes))], (x, y), random.uniform(0, 2 * np.pi),
                                          PARKED_LENGTH) for x, y in places.tolist())
            return _task(PARKING_POSES, random, parked, resolution, (seed, index, held_out, 2))

        folder = f"parked-{_kind(held_out)}-{resolution}px-{images}-{fewest}to{most}-seed{seed}-v{VERSION}"
        super().__init__(name="parking", cache=cache, folder=folder, resolution=resolution, images=images, task=task,
                         models=lambda task: [car.mesh.stem for car in task.cars], depth_unit=1e-4)


def _kind(held_out: bool) -> str:
    return "held-out" if held_out else "train"


def _meshes(held_out: bool) -> list[Path]:
    return sorted(path for path in (MESHES / "glb").glob("*.glb") if (path.stem in HELD_OUT) == held_out)


def _places(random: np.random.Generator, count: int) -> Float[np.ndarray, "n 2"]:
    """Middles of cars, uniform on the round place, given that no two cars touch, however they are turned."""
    while True:  # of five cars one try in 1,000 succeeds
        u = random.random((256, count, 2))
        radius, angle = PARKING_RADIUS * np.sqrt(u[..., 0]), 2 * np.pi * u[..., 1]
        places = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)
        apart = np.linalg.norm(places[:, :, None] - places[:, None], axis=-1) + 9 * np.eye(count)
        free = np.flatnonzero((apart > 2 * PARKED_LENGTH * CAR_REACH).all((1, 2)))
        if len(free):
            return places[free[0]]


def _task(poses: Spherical, random: np.random.Generator, cars: tuple[raycast.Parked, ...], resolution: int,
          seed: tuple[int, ...]) -> raycast.Task:
    """These cars before a camera drawn from the poses."""
    u = torch.from_numpy(random.random(2)).float()
    camera = poses.camera(poses.azimuth.quantile(u[:1]), poses.polar.quantile(u[1:]), torch.full((1,), poses.radius))
    return raycast.Task(cars, camera.camera_to_world[0].double().numpy(), camera.intrinsics[0].double().numpy(),
                        resolution, seed)


def _render_set(folder: Path, tasks: list[raycast.Task], models: Callable[[raycast.Task], Any], depth_unit: float
                ) -> None:
    """Render into a folder of another name, and give it its own when it is complete. The caller holds the lock."""
    for leftover in folder.parent.glob(".rendering-*"):
        shutil.rmtree(leftover)
    shutil.rmtree(folder, ignore_errors=True)
    making = Path(tempfile.mkdtemp(prefix=".rendering-", dir=folder.parent))
    images, side = len(tasks), tasks[0].side
    try:
        (making / "images").mkdir()
        depth = np.zeros((images, side, side), np.uint16)
        title = f"rendering {images} pictures of cars at {side}x{side} (once, into {folder.parent})"
        with closing(_shots(tasks)) as shots:  # type: ignore[type-var]
            for index, shot in enumerate(tqdm(shots, desc=title, total=images, unit="image", mininterval=1)):
                (making / "images" / f"{index:06d}.png").write_bytes(shot.png)
                depth[index] = np.round(shot.depth / depth_unit)
        np.save(making / "depth.npy", depth)
        cameras = [[*task.camera_to_world.ravel().tolist(), *task.intrinsics.ravel().tolist()] for task in tasks]
        told = {"labels": [[f"images/{index:06d}.png", camera] for index, camera in enumerate(cameras)],
                "models": [models(task) for task in tasks]}
        (making / "dataset.json").write_text(json.dumps(told))
        making.chmod(0o755)
        making.replace(folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _shots(tasks: list[raycast.Task]) -> Iterator[raycast.Shot]:
    """The pictures in order, from one process per core; from this one if they are few, or if processes cannot run."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count, done = min(cores, len(tasks) // 64), 0
    workers = [_worker(tasks[start::count]) for start in range(count)] if count > 1 else []
    try:
        while workers and done < len(tasks):
            yield pickle.load(workers[done % count].stdout)
            done += 1
    except (EOFError, pickle.UnpicklingError):
        warnings.warn("worker processes could not run; rendering goes on in this one", stacklevel=2)
    finally:
        for worker in workers:
            worker.kill()
            worker.stdout.close()
            worker.wait()
    yield from map(raycast.take, tasks[done:])


def _worker(tasks: list[raycast.Task]) -> subprocess.Popen:
    """A fresh interpreter at work on the tasks: unlike a multiprocessing child, it never runs the caller's script."""
    single = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    worker = subprocess.Popen(
        [sys.executable, "-c", "from datasets.raycast import serve; serve()"], cwd=MESHES.parent.parent,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **single})
    try:
        pickle.dump(tasks, worker.stdin)
        worker.stdin.close()
    except OSError:  # it died at once, which reading from it will show
        pass
    return worker


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Let one process at a time render into `folder`. The lock goes with its process, however that ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
