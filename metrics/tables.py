"""Tables: what others published, what was measured here, what a frame costs. Nobody's empty cell is filled in.

Published and measured numbers never share a column, nor do measured numbers of different metrics, protocols, data or
devices. Imports no torch; counting a cost does.
"""

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Group
from rich.table import Table

from metrics.results import Result, device_name, read_results

MARKS = {"authors": "", "secondary": "†", "unverified": "?"}  # of a published figure's status


class Measured(NamedTuple):
    """A run's latest value of one metric under one protocol."""

    run: str
    result: Result


@dataclasses.dataclass(frozen=True)
class FrameCost:
    """H×W × K × L of one method, counted, and seconds per frame where measured. `problem`: why there is neither."""

    model: str
    setting: str
    device: str | None = None
    rays: int | None = None
    samples_per_ray: float | None = None
    flops_per_sample: float | None = None
    flops_fixed: float | None = None
    flops: float | None = None
    seconds: float | None = None
    problem: str | None = None


def read_published(path: Path) -> dict[str, Any]:
    """{"columns": {key: heading}, "methods": [{model, name, figures: [{column, value, status, source}]}]}.

    Raises: ValueError if a figure has a column or a status that is not listed.
    """
    from omegaconf import OmegaConf

    published: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(path))  # type: ignore[assignment]
    for method in published["methods"]:
        for figure in method["figures"]:
            if figure["column"] not in published["columns"] or figure["status"] not in MARKS:
                raise ValueError(f"{path}: {method['name']} has a figure of unknown column or status: {figure}")
    return published


def find_measured(runs: Path, metric: str | None = None) -> list[Measured]:
    """Of every metrics.json below `runs`: per metric, protocol, data, model and seed the result of the latest step."""
    measured = []
    for path in sorted(runs.rglob("metrics.json")):
        try:
            results = read_results(path)
        except ValueError as error:
            warnings.warn(f"left out: {error}", stacklevel=2)
            continue
        latest: dict[tuple, Result] = {}
        for result in results:
            key = (result.metric, result.protocol, result.data, result.model, result.seed)
            if metric in (None, result.metric) and (key not in latest or result.step >= latest[key].step):
                latest[key] = result
        measured += [Measured(str(path.parent.relative_to(runs)), result) for result in latest.values()]
    return measured


def fid_table(published: dict[str, Any], measured: Sequence[Measured]) -> Group:
    """One row a method: its published figures, then one column for each kind of measurement."""
    kinds = list(dict.fromkeys(_kind(m.result) for m in measured))
    table = Table(title="FID, published — and distances measured here", title_justify="left", show_lines=True)
    table.add_column("method")
    for heading in published["columns"].values():
        table.add_column(f"FID, published\n{heading}", justify="right")
    for kind in kinds:
        table.add_column(_heading([m.result for m in measured if _kind(m.result) == kind]), justify="right",
                         overflow="fold")
    names = {method["model"]: method["name"] for method in published["methods"]}
    figures = {method["model"]: method["figures"] for method in published["methods"]}
    for model in [*names, *dict.fromkeys(m.result.model for m in measured if m.result.model not in names)]:
        cells = [" / ".join(f"{f['value']:g}{MARKS[f['status']]}" for f in figures.get(model, ()) if f["column"] == c)
                 for c in published["columns"]]
        cells += ["\n".join(f"{m.result.value:.4g} ({m.result.seconds / 60:.1f} min)" for m in measured
                            if m.result.model == model and _kind(m.result) == kind) for kind in kinds]
        table.add_row(names.get(model, model), *cells)
    notes = ["† secondary: another paper's or a user's table.   ? unverified.   Sources: configs/published/fid.yaml"]
    if not measured:
        notes.append("No measured results were found. `python train.py` makes some.")
    return Group(table, *notes)


def fid_numbers(published: dict[str, Any], measured: Sequence[Measured]) -> dict[str, Any]:
    return {"published": published, "measured": [{"run": m.run, **dataclasses.asdict(m.result)} for m in measured]}


def _kind(result: Result) -> tuple[str, str, str, str]:
    """What must agree for two values to stand in one column."""
    return result.metric, result.protocol, result.data, result.device


def _heading(results: Sequence[Result]) -> str:
    metric, protocol, data, device = _kind(results[0])
    minutes = sorted({f"{seconds / 60:.1f}" for seconds in (r.seconds for r in results)}, key=float)
    span = minutes[0] if len(minutes) == 1 else f"{minutes[0]}–{minutes[-1]}"
    return f"{metric}, measured\n{data}, {span} min of training\n{device}\n{protocol}"


def frame_cost(model: str, overrides: Sequence[str], resolution: int | None, device: Any, frames: int) -> FrameCost:
    """Build the method's generator from its config and count a frame; time it too if a device is given.

    A method that cannot be built or counted becomes a row that says why.
    """
    from hydra import compose
    from hydra.utils import instantiate

    setting = ", ".join(overrides)
    try:
        cfg = compose("train", [f"model={model}", *overrides])
        resolution = resolution or cfg.data.resolution
        setting = f"{setting}, {resolution}²"
        generator = instantiate(cfg.model.generator, _convert_="all").eval()
        cost = generator.cost(resolution)
        seconds = None
        if device is not None:
            poses = instantiate(cfg.model.poses, _convert_="all")
            seconds = _seconds_per_frame(generator.to(device), poses, resolution, device, frames)
    except Exception as error:  # one method must not cost the others their rows
        return FrameCost(model, setting, problem=f"{type(error).__name__}: {error}".splitlines()[0])
    return FrameCost(model, setting, None if device is None else device_name(), cost.rays, cost.samples_per_ray,
                     cost.flops_per_sample, cost.flops_fixed, cost.flops, seconds)


def _seconds_per_frame(generator: Any, poses: Any, resolution: int, device: Any, frames: int) -> float:
    """Median time from latent to picture, nothing kept between frames."""
    import torch

    from metrics.speed import time_frames

    rng = torch.Generator().manual_seed(0)
    z = torch.randn(frames + 1, generator.z_dim, generator=rng).to(device)
    cameras = poses.sample(frames + 1, rng).to(device)

    @torch.no_grad()
    def render(i: int) -> None:
        camera = cameras[i : i + 1]
        generator.synthesis(generator.mapping(z[i : i + 1], camera), camera, resolution)

    return time_frames(render, frames=frames, warm_up=1).median


def cost_table(costs: Sequence[FrameCost]) -> Table:
    settings = " | ".join(dict.fromkeys(cost.setting for cost in costs))
    device = next((cost.device for cost in costs if cost.device), None)
    table = Table(title=f"A frame costs H×W × K × L + what is paid per picture, counted ({settings})",
                  title_justify="left")
    for heading in ("method", "H×W\nrays", "K\nsamples/ray", "L\nMFLOP/sample", "per picture\nGFLOP", "total\nGFLOP"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    if device:
        table.add_column(f"measured\nms/frame\n{device}", justify="right")
    for cost in costs:
        if cost.problem:
            table.add_row(cost.model, *[""] * 4, cost.problem)
            continue
        row = [f"{cost.rays:,}", f"{cost.samples_per_ray:.4g}", f"{cost.flops_per_sample / 1e6:.4g}",
               f"{cost.flops_fixed / 1e9:.4g}", f"{cost.flops / 1e9:.4g}"]
        table.add_row(cost.model, *row, *([f"{cost.seconds * 1e3:.0f}"] if cost.seconds is not None else []))
    return table


def cost_numbers(costs: Sequence[FrameCost]) -> dict[str, Any]:
    return {"costs": [dataclasses.asdict(cost) for cost in costs]}
