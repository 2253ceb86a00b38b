"""The compiled ops against plain PyTorch and against torch.compile of it: same inputs, same run, medians of repeats.

    python benchmarks/ops.py                      # all; about 8 minutes on two cores
    python benchmarks/ops.py --only composite     # ops whose name contains this
    python benchmarks/ops.py --compile            # torch.compile of the reference too (some minutes more)
    python benchmarks/ops.py --json FILE          # {"rows": [{"op", "shape", "direction", "native_ms", …}, …]}

`share` is the time the machine's limit would take over the time taken: copy bandwidth or sgemm speed, whichever the op
needs longer, both measured in this run with the same number of threads. Above 100 %: the op stayed in caches that the
copy was too large for, or gathered rows that were counted once a request.
"""

import argparse
import importlib
import json
import os
import pkgutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import benchmarks.cases
from benchmarks.cases import Case
from gan3d import ops


def median_ms(run: Callable[[], object], budget: float, least: int = 3) -> float:
    """Median of repeats within about `budget` seconds, at least `least`, after a warm-up of half as long.

    On a virtual machine the first calls that use much memory wait for the host to hand it over: ten calls of composite
    took 105 ms each, all later ones 26.
    """
    end = time.perf_counter() + budget / 2
    run()
    while time.perf_counter() < end:
        run()
    times: list[float] = []
    end = time.perf_counter() + budget
    while len(times) < least or (time.perf_counter() < end and len(times) < 200):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes read and written per second by a large copy."""
    a = torch.rand(1 << 25)
    b = torch.empty_like(a)
    return 2 * a.numel() * 4 / (median_ms(lambda: b.copy_(a), 1.0) / 1e3)


def sgemm_speed() -> float:
    a, b = torch.rand(2048, 2048), torch.rand(2048, 2048)
    return 2 * 2048**3 / (median_ms(lambda: a @ b, 1.0) / 1e3)


def directions(function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: tuple) -> dict[str, Callable[[], object]]:
    """What is timed: forward without gradients; backward alone; both, from inputs to gradients."""
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]

    def forward() -> object:
        with torch.no_grad():
            return function(*inputs)

    if not leaves:
        return {"forward": forward}

    def outputs() -> list[Tensor]:
        out = function(*inputs)
        return [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]

    kept = outputs()
    grads = [torch.randn(o.shape, generator=torch.Generator().manual_seed(i)) for i, o in enumerate(kept)]
    return {
        "forward": forward,
        "backward": lambda: torch.autograd.grad(kept, leaves, grads, retain_graph=True),
        "forward+backward": lambda: torch.autograd.grad(outputs(), leaves, grads),
    }


def measure(case: Case, compiled: bool, budget: float, limits: tuple[float, float]) -> list[dict]:
    inputs = case.inputs()
    codes = {"native": case.native, "reference": case.reference} | case.rivals
    times: dict[str, dict[str, float]] = {}
    for name, code in codes.items():
        times[name] = {d: median_ms(run, budget) for d, run in directions(code, inputs).items()}
    if compiled:
        torch._functorch.config.donated_buffer = False  # the backward pass is timed alone, so its graph is kept
        torch.compiler.reset()
        try:
            code = torch.compile(case.reference)
            times["compiled"] = {d: median_ms(run, budget) for d, run in directions(code, inputs).items()}
        except Exception as problem:  # a rival that cannot run is no reason to lose the other rows
            print(f"torch.compile of {case.op}'s reference fails: {str(problem).splitlines()[0][:120]}")
    work = {"forward": (case.bytes_forward, case.flops_forward), "backward": (case.bytes_backward, case.flops_backward)}
    work["forward+backward"] = tuple(a + b for a, b in zip(*work.values(), strict=True))  # type: ignore[assignment]
    rows = []
    for direction, native_ms in times["native"].items():
        moved, flops = work[direction]
        limit_ms = 1e3 * max(moved / limits[0], flops / limits[1])
        row = {"op": case.op, "shape": case.shape, "direction": direction, "native_ms": native_ms,
               "reference_ms": times["reference"][direction], "ratio": times["reference"][direction] / native_ms,
               "share_of_limit": limit_ms / native_ms, "bytes": moved, "flops": flops}
        for name in times:
            if name not in ("native", "reference"):
                row[f"{name}_ms"] = times[name][direction]
        if case.goal is not None and direction == list(times["native"])[-1]:
            row["goal"] = case.goal
        rows.append(row)
    return rows


def table(rows: list[dict]) -> Table:
    view = Table("op", "shape", "direction", *(["native ms", "reference ms", "ratio", "goal", "MB", "share", "others"]),
                 title=f"compiled ops on {torch.get_num_threads()} thread(s)")
    for row in rows:
        others = "  ".join(f"{k[:-3]} {v:.3g} ms" for k, v in row.items()
                           if k.endswith("_ms") and k not in ("native_ms", "reference_ms"))
        view.add_row(row["op"], row["shape"], row["direction"], f"{row['native_ms']:.3g}", f"{row['reference_ms']:.3g}",
                     f"{row['ratio']:.1f}×", f"{row['goal']:g}×" if "goal" in row else "", f"{row['bytes'] / 1e6:.0f}",
                     f"{row['share_of_limit']:.0%}", others)
    return view


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="ops whose name contains this")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile of the reference too")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds for each median")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    console = Console(width=None if sys.stdout.isatty() else 160)
    if ops.backend() == "reference":
        raise SystemExit("the compiled ops are not available; GAN3D_OPS=native says why")
    cases: list[Case] = []
    for module in sorted(m.name for m in pkgutil.iter_modules(benchmarks.cases.__path__)):
        cases += importlib.import_module(f"benchmarks.cases.{module}").cases()
    cases = [case for case in cases if args.only in case.op]
    if not cases:
        raise SystemExit(f"no op's name contains {args.only!r}")
    limits = copy_bandwidth(), sgemm_speed()
    console.print(f"limits of this machine: copy {limits[0] / 1e9:.1f} GB/s, sgemm {limits[1] / 1e9:.0f} GFLOP/s")
    rows = []
    for i, case in enumerate(cases):
        console.print(f"[{i + 1}/{len(cases)}] {case.op} {case.shape}", highlight=False)
        rows += measure(case, args.compile, args.budget, limits)
        if args.json:
            args.json.write_text(json.dumps({"rows": rows, "copy_bytes_per_s": limits[0], "sgemm_flops": limits[1],
                                             "threads": args.threads, "torch": torch.__version__}, indent=1))
    console.print(table(rows))


if __name__ == "__main__":
    main()
