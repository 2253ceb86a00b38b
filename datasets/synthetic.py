"""The embedded data set: cars rendered from CC0 meshes on first use, with exact cameras and depth, at any resolution.

Stands in for CARLA as GRAF uses it: one object on white, cameras uniform over the upper hemisphere, field of view 30°.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from datasets import raycast
from datasets.images import ImageCollection
from gan3d.cameras import Camera
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
)


class EmbeddedCars(ImageCollection):
    """Low-poly cars with random paint on white. World: z up, the car 1 long along x, wheels on z = 0.

    Rendered once into a folder below `cache` (PNG with alpha, dataset.json, depth), which any other tool can read;
    later runs read it back. Picture i depends on (seed, i) alone: not on the count, nor on how many processes render.

    Args:
        cache: where rendered sets are kept.
        images: how many.
        held_out: render the five cars that the training set never shows.
    """

    def __init__(self, *, resolution: int, images: int, seed: int, cache: str | os.PathLike, held_out: bool = False):
        if images < 1:
            raise ValueError(f"images must be positive, got {images}")
        kind = "held-out" if held_out else "train"
        folder = Path(cache).expanduser().absolute() / f"{kind}-{resolution}px-{images}-seed{seed}-v{VERSION}"
        if not (folder / "dataset.json").exists():
            with _one_at_a_time(folder.parent):
                if not (folder / "dataset.json").exists():  # unless another process was faster
                    _render_set(folder, resolution, images, seed, held_out)
        super().__init__(root=folder, resolution=resolution, name="cars", background=(1.0, 1.0, 1.0))

    def depth(self, index: int) -> Float[Tensor, "h w"]:
        """Distance along the ray through each pixel's centre, scene units, to ± 2.5e-5; 0 where there is no car."""
        depth = np.load(self.root / "depth.npy", mmap_mode="r")
        return torch.from_numpy(depth[index].astype(np.float32)) * raycast.DEPTH_UNIT


def camera_of(random: np.random.Generator) -> Camera:
    """One camera of the prior `POSES` (also in configs/data/cars.yaml), as a batch of one."""
    u = torch.from_numpy(random.random(2)).float()
    return POSES.camera(POSES.azimuth.quantile(u[:1]), POSES.polar.quantile(u[1:]), torch.full((1,), POSES.radius))


def _plan(images: int, seed: int, held_out: bool) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """For each picture: model, camera_to_world, intrinsics."""
    models = sorted(path.stem for path in (MESHES / "glb").glob("*.glb") if (path.stem in HELD_OUT) == held_out)
    plan = []
    for index in range(images):
        random = np.random.default_rng([seed, index, held_out])
        model = models[random.integers(len(models))]
        camera = camera_of(random)
        plan.append((model, camera.camera_to_world[0].double().numpy(), camera.intrinsics[0].double().numpy()))
    return plan


def _render_set(folder: Path, resolution: int, images: int, seed: int, held_out: bool) -> None:
    """Render into a folder of another name, and give it its own when it is complete. The caller holds the lock."""
    for leftover in folder.parent.glob(".rendering-*"):
        shutil.rmtree(leftover)
    shutil.rmtree(folder, ignore_errors=True)
    making = Path(tempfile.mkdtemp(prefix=".rendering-", dir=folder.parent))
    try:
        (making / "images").mkdir()
        plan = _plan(images, seed, held_out)
        tasks = [raycast.Task(MESHES / "glb" / f"{model}.glb", pose, intrinsics, resolution, (seed, index, held_out))
                 for index, (model, pose, intrinsics) in enumerate(plan)]
        depth = np.zeros((images, resolution, resolution), np.uint16)
        title = f"rendering {images} cars at {resolution}x{resolution} (once, into {folder.parent})"
        with closing(_shots(tasks)) as shots:  # type: ignore[type-var]
            for index, shot in enumerate(tqdm(shots, desc=title, total=images, unit="image", mininterval=1)):
                (making / "images" / f"{index:06d}.png").write_bytes(shot.png)
                depth[index] = shot.depth
        np.save(making / "depth.npy", depth)
        labels = [[f"images/{index:06d}.png", [*pose.ravel().tolist(), *intrinsics.ravel().tolist()]]
                  for index, (_, pose, intrinsics) in enumerate(plan)]
        (making / "dataset.json").write_text(json.dumps({"labels": labels, "models": [model for model, _, _ in plan]}))
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
