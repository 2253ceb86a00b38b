"""How far a run is: a bar in a terminal, a line now and then in a log file. Counted in our own steps."""

import math
import sys
import time
from collections import deque
from typing import Any

import pytorch_lightning as pl

from gan3d.cameras import Number


class Pace:
    """Steps and images per second of training, over about the last `window` seconds of it."""

    def __init__(self, window: Number = 30.0):
        self.window = window
        self._marks: deque[tuple[float, int, int]] = deque()

    def update(self, seconds: Number, step: int, images: int) -> None:
        self._marks.append((seconds, step, images))
        while len(self._marks) > 2 and self._marks[1][0] < seconds - self.window:
            self._marks.popleft()

    def _rate(self, column: int) -> float:
        if len(self._marks) < 2 or self._marks[-1][0] <= self._marks[0][0]:
            return math.nan
        return (self._marks[-1][column] - self._marks[0][column]) / (self._marks[-1][0] - self._marks[0][0])

    @property
    def steps_per_second(self) -> float:
        """nan until two updates have been seen."""
        return self._rate(1)

    @property
    def images_per_second(self) -> float:
        return self._rate(2)


def fraction_done(module: Any) -> float:
    """Of the steps or of the minutes, whichever is nearer to its end; 0 where neither is limited."""
    steps = module.step / module.total_steps if module.total_steps else 0.0
    minutes = module.seconds / (60 * module.budget_minutes) if module.budget_minutes else 0.0
    return min(1.0, max(steps, minutes))


def seconds_left(module: Any, steps_per_second: Number) -> float:
    """Until the steps or the minutes run out, whichever is first; inf where neither is limited or the pace unknown."""
    left = math.inf
    if module.total_steps and steps_per_second > 0:
        left = (module.total_steps - module.step) / steps_per_second
    if module.budget_minutes:
        left = min(left, 60 * module.budget_minutes - module.seconds)
    return max(0.0, left)


def clock(seconds: Number) -> str:
    """3:07, 2:03:07, 4d 02h; "?" where unknown."""
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d {hours % 24:02d}h"
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def status(module: Any, pace: Pace, metrics: dict[str, Any]) -> str:
    """One line: step 1200/5000  24%  38.4 kimg  152 img/s  loss_g 0.71  loss_d 1.38  fid 43.2  left 3:20

    Args:
        metrics: the losses under their `train/…` names; anything else is shown last, in its order.
    """
    parts = [f"step {module.step}" + (f"/{module.total_steps}" if module.total_steps else "")]
    if module.total_steps or module.budget_minutes:
        parts.append(f"{fraction_done(module):.0%}")
    parts.append(f"{module.images_seen / 1000:.1f} kimg")
    if math.isfinite(pace.images_per_second):
        parts.append(f"{pace.images_per_second:.3g} img/s")
    for name, value in metrics.items():
        parts.append(f"{name.rsplit('/')[-1]} {float(value):.3g}")
    if module.total_steps or module.budget_minutes:
        parts.append(f"left {clock(seconds_left(module, pace.steps_per_second))}")
    return "  ".join(parts)


class Progress(pl.Callback):
    """Shows `status`: as a bar in a terminal, elsewhere as a line now and then; and once at the end.

    Args:
        evaluation: the callback that measures; its `history` holds the metric shown beside the losses.
        every_seconds: between two lines, where `stream` is no terminal.
        stream: a text file; None: standard error.
    """

    def __init__(self, evaluation: Any = None, *, every_seconds: Number = 15.0, stream: Any = None):
        self.evaluation, self.every_seconds, self.stream = evaluation, every_seconds, stream
        self.pace = Pace()
        self._bar: Any = None
        self._shown = 0.0

    def on_train_start(self, trainer, pl_module: Any) -> None:
        self.pace.update(pl_module.seconds, pl_module.step, pl_module.images_seen)
        self._shown = time.monotonic()
        stream = self.stream or sys.stderr
        if trainer.is_global_zero and stream.isatty():
            self._open_bar(stream)

    def _open_bar(self, stream: Any) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar
        from rich.table import Column

        self._bar = Bar(TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis")),
                        BarColumn(bar_width=None, table_column=Column(ratio=1)), auto_refresh=False, expand=True,
                        console=Console(file=stream))
        self._bar.add_task("starting", total=1.0)
        self._bar.start()

    def on_train_batch_end(self, trainer, pl_module: Any, outputs, batch, batch_idx) -> None:
        self.pace.update(pl_module.seconds, pl_module.step, pl_module.images_seen)
        # the losses are read, and a GPU thereby waited for, only when they are shown
        if time.monotonic() - self._shown >= (0.5 if self._bar else self.every_seconds):
            self._show(trainer, pl_module)

    def on_train_end(self, trainer, pl_module: Any) -> None:
        self._show(trainer, pl_module)
        self._close()

    def on_exception(self, trainer, pl_module: Any, exception) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = None

    def _show(self, trainer, module: Any) -> None:
        if not trainer.is_global_zero:
            return
        self._shown = time.monotonic()
        line = status(module, self.pace, self._metrics(trainer))
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], description=line, completed=fraction_done(module), refresh=True)
        else:
            print(line, file=self.stream or sys.stderr, flush=True)

    def _metrics(self, trainer) -> dict[str, Any]:
        """The two losses, and the first metric of the latest evaluation."""
        shown = {name: trainer.callback_metrics[name] for name in ("train/loss_g", "train/loss_d")
                 if name in trainer.callback_metrics}
        history = self.evaluation.history if self.evaluation is not None else []
        if history:
            _, name, value = next(row for row in history if row[0] == history[-1][0])
            shown[name] = value
        return shown
