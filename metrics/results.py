"""The record on disk: every measured number with the protocol, data, seed, code and device that it depends on.

    metrics.json = {"results": [{"metric": …, "value": …, and the other fields of Result}, …]}

Imports no torch: the tables are read without it.
"""

import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Measurement(NamedTuple):
    """A number and how it came about; never one without the other."""

    metric: str  # "fid", "kid", "fd_efficientnet_lite0", "psnr" …
    value: float
    protocol: str  # two numbers may be compared if their protocols are equal


@dataclasses.dataclass(frozen=True)
class Result:
    """One measurement of one model. `step`: generator updates so far; `seconds`: spent in training until then."""

    metric: str
    value: float
    step: int
    seconds: float
    protocol: str
    model: str
    data: str
    seed: int
    code: str
    device: str


class Recorder:
    """Writes a run's measurements to its `metrics.json`. Called with (measurements, step, seconds of training).

    A number measured again (same metric, protocol, model, data, seed, step) replaces the older one.

    Args:
        path: the file; it and its folder need not exist.
        since_step: where training goes on. What an earlier, killed process measured after this step belongs to weights
            that no longer exist; it is taken out, with a message, at the first writing. None: nothing is taken out.
    """

    def __init__(self, path: str | Path, *, model: str, data: str, seed: int, since_step: int | None = None):
        self.path, self.model, self.data, self.seed, self.since_step = Path(path), model, data, seed, since_step

    def __call__(self, measurements: Sequence[Measurement], step: int, seconds: float) -> None:
        code, device = code_version(), device_name()
        new = [Result(m.metric, float(m.value), int(step), round(float(seconds), 3), m.protocol, self.model, self.data,
                      self.seed, code, device) for m in measurements]
        old = _read_or_move_aside(self.path)
        if self.since_step is not None:
            kept = [r for r in old if r.step <= self.since_step]
            if len(kept) < len(old):
                print(f"{self.path}: training goes on from step {self.since_step}; {len(old) - len(kept)} results of "
                      "later steps were measured on weights that are gone, and leave the record", file=sys.stderr)
            old, self.since_step = kept, None
        replaced = {_identity(r) for r in new}
        _write(self.path, [r for r in old if _identity(r) not in replaced] + new)


def append_results(path: str | Path, results: Iterable[Result]) -> None:
    """Add results to the file, atomically: a reader or a crash sees the old file or the new one, never half of one."""
    _write(Path(path), _read_or_move_aside(Path(path)) + list(results))


def read_results(path: str | Path) -> list[Result]:
    """The results in a file; none if it does not exist.

    Raises: ValueError naming the file if it is not such a record.
    """
    path = Path(path)
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["results"]
        names = [field.name for field in dataclasses.fields(Result)]
        return [Result(**{name: row[name] for name in names}) for row in rows]  # keys of later versions are left alone
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no record of results: {type(error).__name__}: {error}") from error


def code_version() -> str:
    """`git describe` of this project's checkout, "-dirty" with uncommitted changes; outside git the package version."""
    if (ROOT / ".git").exists():
        command = ["git", "-C", str(ROOT), "describe", "--always", "--tags", "--dirty", "--abbrev=12"]
        try:
            found = subprocess.run(command, capture_output=True, text=True, timeout=20)
            if found.returncode == 0 and found.stdout.strip():
                return found.stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            pass
    import gan3d

    return f"gan3d {getattr(gan3d, '__version__', 'unknown')}"


def device_name() -> str:
    """The GPU in use, or the processor and the threads torch may use on it: "AMD EPYC 7B12, 2 threads"."""
    torch: Any = sys.modules.get("torch")  # who has measured something has imported it; the tables have not
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads() if torch is not None else os.cpu_count()
    return f"{_processor()}, {threads} {'thread' if threads == 1 else 'threads'}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine() or "unknown processor"


def _identity(result: Result) -> tuple:
    return result.metric, result.protocol, result.model, result.data, result.seed, result.step


def _read_or_move_aside(path: Path) -> list[Result]:
    """What is recorded so far. A damaged file is kept under another name: measured numbers are not thrown away."""
    try:
        return read_results(path)
    except ValueError as error:
        aside = next(p for i in range(10_000) if not (p := path.with_name(f"{path.name}.damaged-{i}")).exists())
        os.replace(path, aside)
        warnings.warn(f"{error}. It is kept as {aside}; a new record begins.", stacklevel=3)
        return []


def _write(path: Path, results: Iterable[Result]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"results": [dataclasses.asdict(r) for r in results]}, indent=1, ensure_ascii=False) + "\n"
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private; a record is not
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
