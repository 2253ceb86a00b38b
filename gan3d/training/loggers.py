"""Where numbers and pictures go: our own metrics.jsonl, W&B, TensorBoard. None of them may stop or question a run."""

import json
import math
import netrc
import os
import secrets
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from jaxtyping import UInt8
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from gan3d import pictures
from gan3d.cameras import Number


def build_loggers(config: Mapping[str, Any], run_folder: str | Path) -> list[Logger]:
    """The loggers under `config["logger"]` ({name: {_target_: …, …}}, see `configs/logger/`), each called with
    `folder=run_folder` and told the whole config. One that cannot start (see `wandb_logger`) is left out.
    """
    import hydra

    Path(run_folder).mkdir(parents=True, exist_ok=True)
    made = [hydra.utils.instantiate(entry, folder=str(run_folder), _convert_="all")
            for entry in (config.get("logger") or {}).values() if entry is not None]
    loggers = [logger for logger in made if logger is not None]
    for logger in loggers:
        logger.log_hyperparams(dict(config))
    return loggers


class MetricsFile(Logger):
    """Every scalar, one JSON line a log event, appended to `metrics.jsonl`; at the end also as a table `metrics.csv`.

    A line holds `step`, `time` (seconds since 1970) and the scalars; nan and infinity become null. A line that a
    killed run left half-written is cut off when the run goes on.
    """

    def __init__(self, folder: str | Path):
        super().__init__()
        self.folder = Path(folder)
        self.path = self.folder / "metrics.jsonl"
        self._opened = False

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.folder)

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The run's config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        if not self._opened:
            self.folder.mkdir(parents=True, exist_ok=True)
            _cut_half_line(self.path)
            self._opened = True
        line = {"step": step, "time": round(time.time(), 3)}
        line |= {name: value if math.isfinite(value := float(metric)) else None for name, metric in metrics.items()}
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self.path.exists():
            write_csv(self.folder / "metrics.csv", read_metrics(self.path))


def _cut_half_line(path: Path) -> None:
    if not path.exists():
        return
    with open(path, "r+b") as file:
        whole = file.read()
        file.truncate(whole.rfind(b"\n") + 1)


def read_metrics(path: str | Path) -> list[dict[str, Number | None]]:
    """The lines of a metrics.jsonl, one dict a step, in order of steps. A half-written last line is ignored.

    Steps that a resumed run did again count as the later run has them.
    """
    steps: dict[int, dict] = {}
    for text in Path(path).read_text().split("\n")[:-1]:
        line = json.loads(text)
        steps.setdefault(line["step"], {}).update(line)
    return [steps[step] for step in sorted(steps, key=lambda step: -1 if step is None else step)]


def write_csv(path: str | Path, lines: list[dict[str, Number | None]]) -> None:
    """One row a step, a column for every name that occurs; empty where a step did not log it."""
    names = list(dict.fromkeys(name for line in lines for name in line))
    rows = [names] + [["" if line.get(name) is None else repr(line[name]) for name in names] for line in lines]
    part = Path(path).with_name(f".{Path(path).name}.part")
    part.write_text("".join(",".join(row) + "\n" for row in rows))
    os.replace(part, path)


def wandb_logger(*, folder: str | Path, project: str, mode: str | None = None) -> WandbLogger | None:
    """Weights & Biases that never asks: online where someone is logged in, otherwise offline in `folder`/wandb.

    Args:
        mode: "online", "offline", "disabled"; None: WANDB_MODE, else as above.
    Returns: None, after a message, where W&B cannot start, and on all processes but the first.
    """
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        return None
    wanted = mode or os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline")
    for attempt in dict.fromkeys((wanted, "offline")):
        try:
            return _start_wandb(Path(folder).resolve(), project, attempt)
        except Exception as error:  # whatever goes wrong in there, the run goes on without it
            print(f"W&B did not start {attempt}: {error}", flush=True)
    print("The run goes on without W&B; metrics.jsonl has every number.", flush=True)
    return None


def _logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    places = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    for place in (Path(p).expanduser() for p in places if p):
        try:
            return netrc.netrc(place).authenticators(host) is not None
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _start_wandb(folder: Path, project: str, mode: str) -> WandbLogger:
    import wandb

    kept = folder / "wandb_id.txt"
    run_id = kept.read_text().strip() if kept.exists() else secrets.token_hex(4)
    settings = wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True, init_timeout=30)
    run = wandb.init(project=project, name=folder.name, id=run_id, dir=str(folder), mode=mode, settings=settings,
                     resume="allow" if mode == "online" else None, reinit="finish_previous")
    kept.write_text(run_id + "\n")
    run.define_metric("trainer/global_step")  # Lightning's name for the step it logs beside every metric
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    if mode == "online":
        print(f"W&B: {run.url}", flush=True)
    elif mode == "offline":
        print(f"W&B: offline. To upload: wandb sync {Path(run.dir).parent}", flush=True)
    return WandbLogger(project=project, save_dir=str(folder), experiment=run)


def tensorboard_logger(*, folder: str | Path) -> TensorBoardLogger:
    """TensorBoard event files in `folder`/tensorboard."""
    return TensorBoardLogger(save_dir=str(folder), name="", version="tensorboard", default_hp_metric=False)


def log_picture(logger: Logger, name: str, picture: UInt8[Tensor, "h w 3"], step: int) -> None:
    """To W&B and TensorBoard; the others show no pictures."""
    if isinstance(logger, WandbLogger):
        import wandb

        logger.log_metrics({name: wandb.Image(picture.numpy())}, step)  # type: ignore[dict-item]  # uint8: of floats it would make black
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, picture.numpy(), step, dataformats="HWC")


def log_histogram(logger: Logger, name: str, values: Tensor, step: int) -> None:
    """Of all finite values, to W&B and TensorBoard."""
    values = values.detach().float().flatten().cpu()
    finite = values[values.isfinite()].numpy()
    if not len(finite):
        return
    if isinstance(logger, WandbLogger):
        import wandb

        logger.log_metrics({name: wandb.Histogram(finite)}, step)  # type: ignore[dict-item]
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.add_histogram(name, finite, step)


def log_video(logger: Logger, name: str, path: str | Path, step: int) -> None:
    """An MP4 on disk to W&B as it is, and to TensorBoard as an animated GIF among the images (it plays no MP4)."""
    if isinstance(logger, WandbLogger):
        import wandb

        logger.log_metrics({name: wandb.Video(str(path), format="mp4")}, step)  # type: ignore[dict-item]
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment._get_file_writer().add_summary(_gif_summary(name, Path(path)), step)


def _gif_summary(name: str, path: Path):
    """What TensorBoard's add_video makes, which however needs moviepy."""
    import imageio.v3 as iio
    import torch
    from tensorboard.compat.proto.summary_pb2 import Summary

    fps = iio.immeta(path, plugin="pyav")["fps"]
    frames = torch.from_numpy(iio.imread(path, plugin="pyav"))
    with tempfile.TemporaryDirectory() as folder:
        encoded = pictures.write_gif(Path(folder) / "video.gif", frames, fps).read_bytes()
    height, width = frames.shape[1:3]
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encoded)
    return Summary(value=[Summary.Value(tag=name, image=image)])
