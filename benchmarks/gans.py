"""How fast the GANs are here: `python benchmarks/gans.py [--threads 1] [--models graf,pigan] [--json FILE]`.

Every model is built from its paper configuration. "train" is one iteration as `train.py` runs it (discriminator with
R1, generator on fresh latents, averages), with all regularisers that come every so many steps, and "between" one
without them; "frame" is one picture of the averaged generator, no gradients.
Each case runs in a process of its own: processor seconds of the fastest repeat (all threads together), floating-point
operations counted while it ran, its share of the speed of a large matrix product in the same process, peak memory.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CASES = ("train", "between", "frame")
EG3D = ["model=eg3d", "data=ffhq", "data.resolution=128", "model.poses=${data.poses}", "model.blur=null",
        "model.generator.render_resolution={first: 32, last: 32}", "model.discriminator.group=2",
        "model.generator.superresolution={input_resolution: 64, channels: [128, 64], first_up: false}"]
SETTINGS = {  # the sizes at which the authors' codes were measured
    "graf": (64, 2, ["model=graf", "data=carla", "data.resolution=64"]),
    "pigan": (32, 2, ["model=pigan", "data=celeba", "data.resolution=32", "model.resolution=32", "model.splits=1"]),
    "gof": (32, 2, ["model=gof", "data=celeba", "data.resolution=32", "model.resolution=32", "model.splits=1"]),
    "giraffe": (64, 8, ["model=giraffe", "data=cats", "data.resolution=64"]),
    "gram": (64, 1, ["model=gram", "data=ffhq", "data.resolution=64", "model.splits=1",
                     "model.discriminator.channels=[128,256,400,400,400,400]"]),
    "gram-32": (32, 1, ["model=gram", "data=ffhq", "data.resolution=32", "model.splits=1",
                        "model.discriminator.channels=[256,400,400,400,400]"]),
    "eg3d-narrow": (128, 2, [*EG3D, "model.generator.channel_base=8192", "model.discriminator.channel_base=8192"]),
    "eg3d": (128, 1, EG3D),
    "stylenerf": (64, 1, ["model=stylenerf", "data=ffhq", "data.resolution=64", "model.resolution=64",
                          "model.discriminator.group=1"]),
}
LAZY = {"eg3d-narrow", "eg3d", "stylenerf"}  # have regularisers that are not due in every step


def fastest(run: Callable[[], object], repeats: int) -> float:
    """Processor seconds of the fastest of `repeats` runs, after one to warm up."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return min(seconds)


def sgemm_rate(size: int = 2048) -> float:
    """Floating-point operations per processor second of one square matrix product."""
    import torch

    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / fastest(lambda: torch.mm(a, b), 5)


def executed_flops(run: Callable[[], object]) -> int:
    """Operations of the matrix products and convolutions in `run()`, gradients included.

    PyTorch's FlopCounterMode tracks modules with hooks that R1's gradient of a gradient does not pass; its formulas do.
    """
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    class Counter(TorchDispatchMode):
        flops = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func._overloadpacket in flop_registry:
                self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
            return result

    with Counter() as counter:
        run()
    return counter.flops


def build(model: str) -> Any:
    """The GANModule of a paper configuration."""
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        _, batch, overrides = SETTINGS[model]
        cfg = compose("train", ["scale=paper", f"model.batch_size={batch}", *overrides])
    return instantiate(cfg.model, _convert_="all")


def train(model: str, repeats: int, step: int = 0) -> dict[str, float]:
    """One iteration, always that of the same step: 0, when every regulariser is due, or another."""
    import pytorch_lightning as pl
    import torch

    from datasets.images import ImageBatch
    from gan3d import launch

    launch.quiet()
    resolution, batch, _ = SETTINGS[model]
    poses = build(model).poses

    class Photographs:
        def __iter__(self):
            while True:
                pictures = torch.randint(0, 256, (batch, 3, resolution, resolution), dtype=torch.uint8)
                yield ImageBatch(pictures, poses.sample(batch))

        def __len__(self):
            return 2**31

    class Clock(pl.Callback):
        def on_train_batch_start(self, trainer, module, *_):
            module.step = step
            self.start = time.process_time()

        def on_train_batch_end(self, trainer, *_):
            self.seconds.append(time.process_time() - self.start)
            trainer.should_stop = len(self.seconds) == self.steps

    def fit(steps: int) -> Clock:
        clock, module = Clock(), build(model)
        clock.seconds, clock.steps = [], steps
        pl.Trainer(accelerator="cpu", devices=1, max_epochs=-1, logger=False, enable_checkpointing=False,
                   enable_progress_bar=False, enable_model_summary=False, callbacks=[clock]).fit(module, Photographs())
        return clock

    return {"cpu_seconds": min(fit(repeats + 1).seconds[1:]), "flops": executed_flops(lambda: fit(1))}


def frame(model: str, repeats: int) -> dict[str, float]:
    import torch

    module = build(model)
    generator, camera = module.generator_ema, module.poses.sample(1)
    generator.before_step(module.total_steps)

    @torch.no_grad()
    def run():
        generator.synthesis(generator.mapping(torch.randn(1, generator.z_dim), camera), camera, SETTINGS[model][0])

    return {"cpu_seconds": fastest(run, repeats), "flops": executed_flops(run)}


def measure(model: str, case: str, threads: int, repeats: int) -> dict[str, float | str]:
    """One case in this process."""
    import torch

    from gan3d.nn import parallel

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    parallel.THREADS = threads
    if case == "frame":
        measured = frame(model, repeats)
    else:
        measured = train(model, repeats, step=int(case == "between"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rate = sgemm_rate()
    return {"model": model, "case": case, "threads": threads, **measured, "sgemm_flops": rate,
            "share_of_sgemm": measured["flops"] / measured["cpu_seconds"] / rate, "peak_bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--models", default=",".join(SETTINGS))
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    parser.add_argument("--case", nargs=2, metavar=("MODEL", "CASE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(*arguments.case, arguments.threads, arguments.repeats)))
        return
    rows = []
    for model in arguments.models.split(","):
        for case in CASES if model in LAZY else ("train", "frame"):
            # in a process of its own, so that its peak memory is its own
            options = ["--threads", str(arguments.threads), "--repeats", str(arguments.repeats), "--case", model, case]
            done = subprocess.run([sys.executable, __file__, *options], stdout=subprocess.PIPE, text=True, check=True)
            rows.append(row := json.loads(done.stdout.splitlines()[-1]))
            print(f"{model:11} {case:7} {row['cpu_seconds']:7.2f} s {row['flops'] / 1e9:7.0f} GFLOP "
                  f"{row['share_of_sgemm']:5.0%} of sgemm ({row['sgemm_flops'] / 1e9:.0f} GFLOP/s) "
                  f"{row['peak_bytes'] / 1e9:6.2f} GB", flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"rows": rows}, indent=1))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
