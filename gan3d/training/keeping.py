"""Checkpoints that survive `kill -9`: written beside the old one, then renamed over it."""

import os
import time
from pathlib import Path

import pytorch_lightning as pl


class Keep(pl.Callback):
    """Writes `last.ckpt` every so many steps or minutes and at the end; copies it to `step_XXXXXX.ckpt` at milestones.

    Args:
        folder: where checkpoints go.
        every_minutes: of training between two writes of `last.ckpt`.
        every_steps: likewise in steps (None: by the clock only).
        milestones: keep one for ever every so many steps (None: none).
    """

    def __init__(self, *, folder: str | Path, every_minutes: float, every_steps: int | None = None,
                 milestones: int | None = None):
        self.folder, self.every_minutes = Path(folder), every_minutes
        self.every_steps, self.milestones = every_steps, milestones
        self._written = time.monotonic()

    def on_train_start(self, trainer, module) -> None:
        self._written = time.monotonic()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        late = time.monotonic() - self._written >= 60 * self.every_minutes
        late = trainer.strategy.broadcast(late) if trainer.world_size > 1 else late
        if late or (self.every_steps and module.step % self.every_steps == 0):
            self.write(trainer, "last.ckpt")
        if self.milestones and module.step % self.milestones == 0:
            self.write(trainer, f"step_{module.step:07d}.ckpt")

    def on_train_end(self, trainer, module) -> None:
        self.write(trainer, "last.ckpt")

    def write(self, trainer: pl.Trainer, name: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f".{name}.part"
        trainer.save_checkpoint(part)
        if trainer.is_global_zero:
            os.replace(part, self.folder / name)
        self._written = time.monotonic()
