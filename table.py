"""python table.py: published figures beside measured ones. table=cost: what a frame of every method costs."""

import json
from pathlib import Path

from gan3d import launch


def table(cfg):
    from rich.console import Console

    from metrics import tables

    console = Console() if Console().is_terminal else Console(width=200)
    if cfg.table == "fid":
        published = tables.read_published(launch.CONFIGS / "published" / "fid.yaml")
        measured = tables.find_measured(Path(cfg.runs), cfg.metric)
        made, numbers = tables.fid_table(published, measured), tables.fid_numbers(published, measured)
    elif cfg.table == "cost":
        models = sorted(path.stem for path in (launch.CONFIGS / "model").glob("*.yaml"))
        overrides = [f"data={cfg.cost.data}", f"scale={cfg.cost.scale}"]
        device = launch.device(cfg.device) if cfg.measure else None
        with console.status("counting") as status:
            costs = []
            for model in models:
                status.update(f"counting {model}")
                costs.append(tables.frame_cost(model, overrides, cfg.cost.resolution, device, cfg.frames))
        made, numbers = tables.cost_table(costs), tables.cost_numbers(costs)  # type: ignore[assignment]
    else:
        raise ValueError(f"table={cfg.table}: no such table. Choices: fid, cost.")
    console.print(made)
    if cfg.json:
        Path(cfg.json).write_text(json.dumps(numbers, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        console.print(f"written to {cfg.json}")


if __name__ == "__main__":
    launch.main(table, "table")
