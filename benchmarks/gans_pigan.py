"""How fast pi-GAN is here: `python benchmarks/gans_pigan.py [--threads 1] [--repeats 3] [--json]`.

The paper's networks on CelebA's camera at 32², 12 coarse and 12 fine samples. "train" is a discriminator step (real
pictures, R1, fakes without gradients) and a generator step, two pictures each; "frame" one picture without gradients;
"field" the SIREN alone, forward and backward, at the coarse samples of two pictures. Each case runs in a process of its
own: processor seconds of the fastest repeat, floating-point operations as counted while it ran, its share of the speed
of a matrix product of the SIREN's shape in the same process, and the peak of the process's memory.
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
CASES = ("train", "frame", "field")
BATCH, RESOLUTION = 2, 32


def fastest(run: Callable[[], object], repeats: int) -> float:
    """Processor seconds (all threads together) of the fastest of `repeats` runs, after one to warm up."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return min(seconds)


def sgemm_rate(rows: int = 1024, width: int = 256, times: int = 50) -> float:
    """Floating-point operations per processor second of the product that a block of points takes in each layer."""
    import torch

    x, weight, out = torch.randn(rows, width), torch.randn(width, width), torch.empty(rows, width)

    def run():
        for _ in range(times):
            torch.mm(x, weight, out=out)

    return times * 2 * rows * width**2 / fastest(run, 5)


def executed_flops(run: Callable[[], object]) -> int:
    """Operations of the matrix products and convolutions in `run()`, gradients included."""
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


def generator_and_poses():
    from gan3d.gans.pigan import PiGAN
    from gan3d.poses import Gaussian, Spherical
    from gan3d.rays import Bounds

    generator = PiGAN(
        bounds=Bounds(near=0.88, far=1.12), z_dim=256, width=256, depth=8, mapping_width=256, mapping_depth=3,
        point_scale=2 / 0.24, samples_per_ray=12, fine_samples=12, density_noise=1.0, density_noise_steps=5000,
        pixel_grid="corner")
    return generator, Spherical(1.0, Gaussian(90, 17.19), Gaussian(90, 8.88), 12.0, up="y")


def train() -> Callable[[], None]:
    """One iteration as the released code does it: D with R1 and the pose head, then G on fresh latents."""
    import torch
    from torch.nn.functional import mse_loss
    from torch.nn.utils import clip_grad_norm_

    from gan3d.losses import R1, discriminator_loss, generator_loss
    from gan3d.nn.discriminators import ProgressiveDiscriminator

    generator, poses = generator_and_poses()
    discriminator = ProgressiveDiscriminator(channels=[32, 64, 128, 256, 400, 400, 400, 400], coord=True,
                                             down="stride", latent_dim=256, pose=True)
    optimizer_g, optimizer_d = (torch.optim.Adam(net.parameters(), 1e-4, betas=(0.0, 0.9), fused=True)
                                for net in (generator, discriminator))
    penalty = R1(0.1)

    def fake():
        camera = poses.sample(BATCH)
        ws = generator.mapping(torch.randn(BATCH, generator.z_dim))
        return generator.synthesis(ws, camera, RESOLUTION).rgb, poses.angles(camera)

    def run():
        discriminator.requires_grad_(True)
        optimizer_d.zero_grad()
        with torch.no_grad():
            images, angles = fake()
        real = torch.rand_like(images).mul(2).sub(1).requires_grad_()
        on_real, on_fake = discriminator(real, fade=0.5), discriminator(images, fade=0.5)
        loss = discriminator_loss(on_real.logit, on_fake.logit) + 15 * mse_loss(on_fake.pose, angles)
        (loss + penalty(real, on_real.logit)).backward()
        clip_grad_norm_(discriminator.parameters(), 10)
        optimizer_d.step()
        discriminator.requires_grad_(False)
        optimizer_g.zero_grad()
        images, angles = fake()
        verdict = discriminator(images, fade=0.5)
        (generator_loss(verdict.logit).mean() + 15 * mse_loss(verdict.pose, angles)).backward()
        clip_grad_norm_(generator.parameters(), 10)
        optimizer_g.step()

    return run


def frame() -> Callable[[], None]:
    import torch

    generator, poses = generator_and_poses()
    generator.eval()
    camera = poses.sample(1)

    @torch.no_grad()
    def run():
        generator.synthesis(generator.mapping(torch.randn(1, generator.z_dim)), camera, RESOLUTION)

    return run


def field() -> Callable[[], None]:
    import torch

    generator, _ = generator_and_poses()
    ws = generator.mapping(torch.randn(BATCH, generator.z_dim)).detach().requires_grad_()
    points = 0.24 * torch.rand(BATCH, RESOLUTION**2, 12, 3) - 0.12
    directions = torch.nn.functional.normalize(torch.randn(BATCH, RESOLUTION**2, 1, 3), dim=-1)

    def run():
        raw_density, rgb = generator.field(ws)(points, directions)
        (raw_density.mean() + rgb.mean()).backward()

    return run


def measure(case: str, threads: int, repeats: int) -> dict[str, float | str]:
    """One case in this process."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    run = {"train": train, "frame": frame, "field": field}[case]()
    flops = executed_flops(run)
    seconds = fastest(run, repeats)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rate = sgemm_rate()
    return {"case": f"pigan/{case}", "threads": threads, "cpu_seconds": seconds, "flops": flops, "sgemm_flops": rate,
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
