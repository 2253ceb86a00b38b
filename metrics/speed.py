"""Speed and size, measured the same way for every method: warmed up, synchronised, the median of single frames."""

import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class FrameTime:
    """Seconds per frame. The spread is that of single frames, so a busy machine shows."""

    median: float
    fastest: float
    slowest: float
    frames: int

    @property
    def frames_per_second(self) -> float:
        return 1 / self.median


def time_frames(render: Callable[[int], object], *, frames: int, warm_up: int = 3) -> FrameTime:
    """Call `render(0)`, `render(1)` …; the first `warm_up` calls are not counted.

    Args:
        render: draws frame i of a trajectory. A GPU is waited for before the clock is read.
        frames: how many are counted, at least 1; 20 for a number to publish.
    """
    seconds = []
    for i in range(warm_up + frames):
        _wait()
        started = time.perf_counter()
        render(i)
        _wait()
        seconds.append(time.perf_counter() - started)
    counted = seconds[warm_up:]
    return FrameTime(statistics.median(counted), min(counted), max(counted), frames)


def size_on_disk(path: str | Path) -> int:
    """Bytes of a file, or of all files in a folder.

    Raises: FileNotFoundError if there is neither.
    """
    path = Path(path)
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size


def peak_memory() -> int:
    """Bytes of main memory that this process has held at most, since it began."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kilobytes


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
