"""What a GAN looks like while it trains: the same objects from the same cameras, again and again.

Pictures go to the run's folder and to every logger that shows pictures. They are drawn from the averaged generator by
the first process, without touching the random state of training, and may take no more than a given share of the time.
"""

import math
import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from gan3d import pictures, views
from gan3d.cameras import Number
from gan3d.training.loggers import log_histogram, log_picture, log_video
from gan3d.training.progress import Pace

try:
    import resource
except ImportError:  # Windows has none
    resource = None  # type: ignore[assignment]


class Dashboard(pl.Callback):
    """Sample and depth grids, histograms, speed and memory while training; an orbit at the end.

    Writes `samples/step_XXXXXX.png` and `depth/step_XXXXXX.png`, the latest also as `samples.png` and `depth.png`, and
    `orbit.mp4`. Logs `image/samples`, `image/depth`, `video/orbit`, `hist/…` and `perf/…`, all at our own step.

    Args:
        folder: the run's.
        every_minutes, every_steps: draw when either has passed since the last time; None: not by this measure.
        samples: objects in the grid.
        orbit_latents, orbit_frames, fps: objects side by side in the final orbit, its frames (0: none) and their rate.
        orbit_seconds: it gets fewer frames where it would take longer than this to draw.
        max_share: of the time that pictures may take; slow ones are drawn less often than asked for. 1: never mind.
        seed: of latents and cameras.
    """

    def __init__(
        self,
        *,
        folder: str | Path,
        every_minutes: Number | None = 10.0,
        every_steps: int | None = None,
        samples: int = 16,
        orbit_latents: int = 4,
        orbit_frames: int = 72,
        orbit_seconds: Number = 60.0,
        fps: Number = 24.0,
        max_share: Number = 0.1,
        seed: int = 0,
    ):
        if not 0 < max_share <= 1:
            raise ValueError(f"max_share must lie in (0, 1], got {max_share}")
        self.folder, self.every_minutes, self.every_steps = Path(folder), every_minutes, every_steps
        self.samples, self.orbit_latents, self.orbit_frames = samples, orbit_latents, orbit_frames
        self.orbit_seconds, self.fps, self.max_share, self.seed = orbit_seconds, fps, max_share, seed
        self.pace = Pace()
        self._drawn_step = -1
        self._drawn_at = self._took = 0.0

    def on_train_start(self, trainer, module: Any) -> None:
        self.pace.update(module.seconds, module.step, module.images_seen)
        self._drawn_at, self._drawn_step = time.monotonic(), module.step
        if trainer.is_global_zero and module.step == 0:
            self.draw(trainer, module)

    def on_train_batch_end(self, trainer, module: Any, outputs, batch, batch_idx) -> None:
        self.pace.update(module.seconds, module.step, module.images_seen)
        # Lightning takes the step of a log line from a logged "step"; its own count would stand in otherwise
        module.log_dict({"step": float(module.step), "perf/images_per_second": self.pace.images_per_second,
                         "perf/peak_memory_mb": peak_memory_mb(module.device)})
        if trainer.is_global_zero and self._due(module.step):
            self.draw(trainer, module)

    def _due(self, step: int) -> bool:
        passed = time.monotonic() - self._drawn_at
        due = self.every_minutes is not None and passed >= 60 * self.every_minutes
        due = due or (self.every_steps is not None and step - self._drawn_step >= self.every_steps)
        return due and passed >= self._took * (1 / self.max_share - 1)

    def on_train_end(self, trainer, module: Any) -> None:
        if not trainer.is_global_zero:
            return
        if self._drawn_step != module.step or not (self.folder / "samples.png").exists():
            self.draw(trainer, module)
        if self.orbit_frames:
            self.draw_orbit(trainer, module)

    def draw(self, trainer: pl.Trainer, module: Any) -> None:
        """The grids and histograms of now."""
        started = time.monotonic()
        generator, step = module.generator_ema, module.step
        z = views.draw_latents(generator, range(self.seed, self.seed + self.samples))
        seen, cameras = views.samples(generator, module.poses, z, module.resolution_now(), camera_seed=self.seed)
        self._write(trainer, "samples", pictures.grid(pictures.to_uint8(seen.rgb)), step)
        self._write(trainer, "depth", pictures.grid(pictures.colour_depth(seen.depth, seen.opacity)), step)
        histograms = {f"hist/{name}": values for name, values in module.last.items()}
        if (bounds := getattr(generator, "bounds", None)) is not None:
            ws = views.map_latents(generator, z, cameras)
            histograms["hist/raw_density"] = views.probe_density(generator, ws, cameras, bounds, seed=self.seed)
        for logger in trainer.loggers:
            for name, values in histograms.items():
                log_histogram(logger, name, values, step)
        self._drawn_at, self._drawn_step = time.monotonic(), step
        self._took = self._drawn_at - started

    def _write(self, trainer: pl.Trainer, name: str, picture: Tensor, step: int) -> None:
        pictures.write_png(self.folder / name / f"step_{step:06d}.png", picture)
        pictures.write_png(self.folder / f"{name}.png", picture, minimum_side=512)
        for logger in trainer.loggers:
            log_picture(logger, f"image/{name}", picture, step)

    def draw_orbit(self, trainer: pl.Trainer, module: Any) -> None:
        """`orbit.mp4`: several objects turning, depth below; the first frame shows how many there is time for."""
        generator, path = module.generator_ema, self.folder / "orbit.mp4"
        z = views.draw_latents(generator, range(self.seed, self.seed + self.orbit_latents))
        cameras = module.poses.path(self.orbit_frames)
        ws = views.map_latents(generator, z, views.frontal(module.poses))
        started = time.monotonic()
        views.photograph(generator, ws, cameras[:1], module.resolution_now())
        affordable = int(self.orbit_seconds / (time.monotonic() - started))
        if affordable < self.orbit_frames:
            cameras = module.poses.path(max(8, affordable))
        frames = views.orbit(generator, ws, cameras, module.resolution_now())
        fps = self.fps * len(cameras.camera_to_world) / self.orbit_frames  # a turn lasts as long with fewer frames
        try:
            pictures.write_video(path, frames, fps)
        except OSError as error:  # no encoder, no space: not worth the run's end
            print(f"no orbit: {error}", flush=True)
            return
        for logger in trainer.loggers:
            log_video(logger, "video/orbit", path, module.step)


def peak_memory_mb(device: torch.device) -> float:
    """Most memory ever in use: of the GPU the module is on, else of this process; in 2²⁰ bytes. nan where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB here
