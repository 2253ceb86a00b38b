"""How fast GRAF is here: `python benchmarks/gans_graf.py [--threads 1] [--repeats 3] [--json]`.

The paper's network on its CARLA camera. A training iteration is a discriminator step (real patch, R1, fake without
gradients) and a generator step, two patches of 32² rays with 64 samples; a frame is 64² pixels. Each case runs in a
process of its own: processor seconds of the fastest repeat, floating-point operations as counted while it ran, its
share of the speed of a large matrix product in the same process, and the peak of the process's memory.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CASES = ("train", "frame")


def sgemm_rate(size: int = 2048, repeats: int = 3) -> float:
    """Floating-point operations per processor second of one square matrix product."""
    import torch

    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / fastest(lambda: torch.mm(a, b), repeats)


def fastest(run: Callable[[], object], repeats: int) -> float:
    """Processor seconds (all threads together) of the fastest of `repeats` runs, after one to warm up."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return min(seconds)


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


def models():
    from gan3d.gans.graf import GRAF, PatchDiscriminator
    from gan3d.rays import Bounds

    generator = GRAF(
        bounds=Bounds(near=7.5, far=12.5, planar=True, background=(1.0, 1.0, 1.0)), z_shape_dim=128,
        z_appearance_dim=128, width=256, depth=8, skip=4, position_octaves=10, direction_octaves=4, samples_per_ray=64,
        density_noise=1.0, density_noise_steps=5000, pixel_grid="integer")
    return generator, PatchDiscriminator(patch_size=32, channels=64, flip=False)


def training_iteration(batch: int = 2) -> Callable[[], None]:
    import torch

    from gan3d.losses import R1, discriminator_loss, generator_loss
    from gan3d.poses import Spherical, Uniform, UniformArea
    from gan3d.rays import PatchSampler

    generator, discriminator = models()
    poses, patches = Spherical(10.0, Uniform(0, 360), UniformArea(0, 85), 30.0), PatchSampler(32, 0.25, 0.0025)
    optimizers = [torch.optim.RMSprop(net.parameters(), lr=1e-4, alpha=0.99) for net in (generator, discriminator)]
    penalty = R1(10.0, "per_pixel")

    def fake():
        z = torch.randn(batch, generator.z_dim)
        return generator.synthesis(generator.mapping(z), poses.sample(batch), 64, patches.sample(batch, 0)).rgb

    def run():
        discriminator.requires_grad_(True).zero_grad()
        real = torch.rand(batch, 3, 32, 32).mul(2).sub(1).requires_grad_()
        with torch.no_grad():
            images = fake()
        logit = discriminator(real).logit
        (discriminator_loss(logit, discriminator(images).logit) + penalty(real, logit)).backward()
        optimizers[1].step()
        discriminator.requires_grad_(False)
        generator.zero_grad()
        generator_loss(discriminator(fake()).logit).mean().backward()
        optimizers[0].step()

    return run


def frame(resolution: int = 64) -> Callable[[], None]:
    import torch

    from gan3d.poses import Spherical, Uniform, UniformArea

    generator = models()[0].eval()
    camera = Spherical(10.0, Uniform(0, 360), UniformArea(0, 85), 30.0).sample(1)

    @torch.no_grad()
    def run():
        generator.synthesis(generator.mapping(torch.randn(1, generator.z_dim)), camera, resolution)

    return run


def measure(case: str, threads: int, repeats: int) -> dict[str, float | str]:
    """One case in this process."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    run = {"train": training_iteration, "frame": frame}[case]()
    flops = executed_flops(run)
    seconds = fastest(run, repeats)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rate = sgemm_rate()
    return {"case": f"graf/{case}", "threads": threads, "cpu_seconds": seconds, "flops": flops, "sgemm_flops": rate,
            "share_of_sgemm": flops / seconds / rate, "peak_bytes": peak}


def measure_apart(case: str, threads: int, repeats: int) -> dict[str, float | str]:
    """One case in a process of its own, so that its peak memory is its own."""
    command = [sys.executable, __file__, "--case", case, "--threads", str(threads), "--repeats", str(repeats)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(arguments.case, arguments.threads, arguments.repeats)))
        return
    for case in CASES:
        result = measure_apart(case, arguments.threads, arguments.repeats)
        print(json.dumps(result) if arguments.json else
              "{case:12} {cpu_seconds:6.2f} s  {gflop:6.0f} GFLOP  {share_of_sgemm:4.0%} of sgemm  {gb:5.2f} GB".format(
                  **result, gflop=result["flops"] / 1e9, gb=result["peak_bytes"] / 1e9))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
