"""Measuring a generator while it trains: before the first step, every so often, and at the end."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from gan3d import pictures
from gan3d.poses import PosePrior


def sampler(generator: nn.Module, poses: PosePrior, resolution: int, truncation_psi: float = 1.0):
    """generate(n, rng) → uint8 `[n 3 h w]`: random latents and cameras, 8-bit as every FID protocol has it."""
    device = next(generator.parameters()).device

    @torch.no_grad()
    def generate(n: int, rng: torch.Generator) -> torch.Tensor:
        z = torch.randn(n, generator.z_dim, generator=rng).to(device)  # type: ignore[arg-type]
        camera = poses.sample(n, rng).to(device)
        ws = generator.mapping(z, camera, truncation_psi)  # type: ignore[operator]
        rgb = generator.synthesis(ws, camera, resolution).rgb  # type: ignore[operator]
        return pictures.to_uint8(rgb).cpu()

    return generate


class Evaluation(pl.Callback):
    """Calls `metric(generate, data, poses, seed)` on the averaged generator and hands the results to `record`.

    Args:
        metric: what is measured, e.g. `metrics.fid.DistributionMetric`.
        data: the real images.
        record: takes (measurements, step, training seconds); writes them to the run's record on disk.
        every_steps: between two evaluations; None: only before the first step and at the end.
        seed: of latents and cameras, so that two evaluations differ by the weights alone.
    """

    def __init__(self, *, metric: Callable[..., Sequence[Any]], data: Any,
                 record: Callable[[Sequence[Any], int, float], None], every_steps: int | None, seed: int = 0):
        self.metric, self.data, self.record, self.every_steps, self.seed = metric, data, record, every_steps, seed
        self.history: list[tuple[int, str, float]] = []

    def state_dict(self) -> dict:
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict) -> None:
        self.history = [tuple(row) for row in state_dict["history"]]

    def on_train_start(self, trainer, module) -> None:
        if module.step == 0:
            self.measure(trainer, module)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if self.every_steps and module.step % self.every_steps == 0 and not trainer.should_stop:
            self.measure(trainer, module)

    def on_train_end(self, trainer, module) -> None:
        if not self.history or self.history[-1][0] != module.step:
            self.measure(trainer, module)

    def measure(self, trainer: pl.Trainer, module: Any) -> None:
        started = time.perf_counter()
        generate = sampler(module.generator_ema, module.poses, self.data.resolution)
        measurements = self.metric(generate, self.data, str(module.poses), self.seed)
        self.history += [(module.step, m.metric, float(m.value)) for m in measurements]
        if trainer.is_global_zero:
            self.record(measurements, module.step, module.seconds)
            for logger in trainer.loggers:
                logger.log_metrics({f"eval/{m.metric}": float(m.value) for m in measurements}, step=module.step)
            values = ", ".join(f"{m.metric} {m.value:.2f}" for m in measurements)
            print(f"step {module.step}: {values} ({time.perf_counter() - started:.0f} s)", flush=True)
