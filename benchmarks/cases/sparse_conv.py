"""VoxGRAF's convolutions of sparse voxels against PyTorch's dense ones.

    python -m benchmarks.cases.sparse_conv        # time and memory by share of existing voxels, on one thread
"""

import ctypes
import gc
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases import Case
from gan3d.ops.cells import Voxels
from gan3d.ops.reference import sparse_conv as reference
from gan3d.ops.sparse_conv import (
    KernelMap,
    kernel_map,
    sparse_conv3d,
    sparse_upsample,
    upsample_support,
    upsampling_map,
)
from gan3d.ops.voxels import neighbours, scatter_voxels, voxels_from_mask


def grid(side: int) -> Tensor:
    return torch.stack(torch.meshgrid(*[(torch.arange(side) + 0.5) / (side / 2) - 1] * 3, indexing="ij"))


def surface(side: int) -> Tensor:
    """How near a cell is to a wavy closed surface."""
    x, y, z = grid(side)
    distance = (x * x + y * y + z * z).sqrt() - 0.62 - 0.08 * torch.sin(5 * x) * torch.sin(4 * y + 1) * torch.cos(6 * z)
    return -distance.abs()


def blobs(side: int) -> Tensor:
    """How deep a cell lies in the nearest of 40 balls of random sizes."""
    random = torch.Generator().manual_seed(0)
    centres, sizes = 1.8 * torch.rand(40, 3, generator=random) - 0.9, 0.1 + 0.2 * torch.rand(40, generator=random)
    depth = torch.full((side,) * 3, -torch.inf)
    for centre, size in zip(centres, sizes, strict=True):
        depth = torch.maximum(depth, size - (grid(side) - centre[:, None, None, None]).norm(dim=0))
    return depth


def anywhere(side: int) -> Tensor:
    return torch.rand(side, side, side, generator=torch.Generator().manual_seed(0))


def largest(score: Tensor, share: float) -> Voxels:
    n = score.numel()
    return voxels_from_mask(score >= score.flatten().kthvalue(max(1, n - round(n * share) + 1)).values)


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).requires_grad_(True)


def dense_conv3d(values: Tensor, weight: Tensor, kernel: KernelMap, voxels: Voxels) -> Tensor:
    """Channels last: a quarter faster here than x, y, z last."""
    return F.conv3d(scatter_voxels(values, voxels).permute(3, 0, 1, 2)[None], weight, padding=1)[0].permute(1, 2, 3, 0)


def dense_upconv3d(values: Tensor, weight: Tensor, kernel: KernelMap, voxels: Voxels) -> Tensor:
    x = scatter_voxels(values, voxels).permute(3, 0, 1, 2)[None]
    y = F.conv_transpose3d(x, weight.transpose(0, 1), stride=2)
    return y[0, :, :-1, :-1, :-1].permute(1, 2, 3, 0)


def tap_by_tap(values: Tensor, weight: Tensor, kernel: KernelMap, voxels: Voxels) -> Tensor:
    return reference.conv_rows(values, weight.flatten(2).permute(2, 1, 0), *kernel[:3], kernel.rows_out)


def sparse(values: Tensor, weight: Tensor, kernel: KernelMap, voxels: Voxels) -> Tensor:
    return sparse_conv3d(values, weight, kernel)


def case(side: int, c: int, o: int, share: float, up: bool, goal: float) -> Case:
    voxels = largest(surface(side), share)
    kernel = upsampling_map(voxels, upsample_support(voxels)) if up else kernel_map(voxels)

    def inputs() -> tuple:
        return normal(kernel.rows_in, c), normal(o, c, 3, 3, 3, seed=1), kernel, voxels

    # values in, values out and the pairs, once; backward: twice both ways, values and their gradients
    pairs, moved = len(kernel.pairs), 4 * (kernel.rows_in * c + kernel.rows_out * o + 27 * c * o)
    name = f"{c} → {o} channels, {side}³" + (f" → {2 * side}³" if up else "") + f", {share:.0%} along a surface"
    return Case("sparse_upconv3d" if up else "sparse_conv3d", name, sparse, dense_upconv3d if up else dense_conv3d,
                inputs, moved + 8 * pairs, 2 * (moved + 8 * pairs), 2 * pairs * c * o, 4 * pairs * c * o,
                rivals={"tap by tap": tap_by_tap}, goal=goal)


def cases() -> list[Case]:
    found = [case(64, 32, 32, 0.1, False, 4), case(64, 62, 62, 0.1, False, 4), case(32, 125, 62, 0.3, True, 2)]
    thin = largest(surface(64), 0.1)
    fine = upsample_support(thin)
    around, up = neighbours(thin), upsampling_map(thin, fine)
    rows = [thin.words, thin.rank, thin.resolution, fine.words, fine.rank]

    def skip(values: Tensor) -> Tensor:
        return sparse_upsample(values, up)

    def plain_skip(values: Tensor) -> Tensor:
        line = torch.tensor([0.5, 1.0, 0.5])
        cube = (line[:, None, None] * line[:, None] * line).reshape(27, 1, 1)
        return reference.conv_rows(values, cube * torch.eye(4), *up[:3], up.rows_out)

    made = 4 * around.numel() + 8 * len(kernel_map(thin).pairs)
    found.append(Case("neighbour_pairs", "64³, 10 % along a surface", torch.ops.gan3d.neighbour_pairs,
                      reference.neighbour_pairs, lambda: (around,), made))
    found.append(Case("upsampling_pairs", "64³ → 128³, 10 % along a surface", torch.ops.gan3d.upsampling_pairs,
                      reference.upsampling_pairs, lambda: tuple(rows), 16 * len(up.pairs) + 12 * 9 * len(thin.words)))
    both = 16 * (up.rows_in + up.rows_out) + 8 * len(up.pairs)
    found.append(Case("sparse_upsample", "4 channels, 64³ → 128³, 10 % along a surface", skip, plain_skip,
                      lambda: (normal(up.rows_in, 4),), both, both, 8 * len(up.pairs), 8 * len(up.pairs)))
    return found


def peak_mb(make: Callable[[], Callable[[], object]]) -> float:
    """The most memory that making inputs and running takes at a time, beyond what is taken before."""
    def status(key: str) -> float:
        with open("/proc/self/status") as lines:
            return next(float(line.split()[1]) for line in lines if line.startswith(key)) / 1024

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")  # the peak starts anew
    run = make()
    run()
    return status("VmHWM") - before


def curve(side: int = 64, channels: int = 32, budget: float = 1.0) -> Table:
    """Forward and backward, from inputs to gradients; the dense convolution gets dense inputs, without a scatter."""
    from benchmarks.ops import median_ms

    def dense() -> Callable[[], object]:
        x, grad = (normal(1, channels, side, side, side, seed=s).detach().to(memory_format=torch.channels_last_3d)
                   for s in (0, 2))
        weight = normal(channels, channels, 3, 3, 3, seed=1)
        x.requires_grad_(True)
        return lambda: torch.autograd.grad(F.conv3d(x, weight, padding=1), (x, weight), grad)

    def existing(voxels: Voxels) -> Callable[[], object]:
        kernel = kernel_map(voxels)
        x, weight = normal(kernel.rows_in, channels), normal(channels, channels, 3, 3, 3, seed=1)
        grad = normal(kernel.rows_out, channels, seed=2).detach()
        return lambda: torch.autograd.grad(sparse_conv3d(x, weight, kernel), (x, weight), grad)

    view = Table("pattern", "exist", "taps", "dense ms", "sparse ms", "ratio", "map ms", "dense MB", "sparse MB",
                 "memory", title=f"{side}³, {channels} → {channels} channels, forward and backward, "
                                 f"{torch.get_num_threads()} thread(s)")
    for pattern in (surface, blobs, anywhere):
        for share in (1.0, 0.5, 0.3, 0.1, 0.03, 0.01):
            voxels = largest(pattern(side), share)
            taps = len(kernel_map(voxels).pairs) / int(voxels.rank[-1])
            memory = peak_mb(dense), peak_mb(lambda voxels=voxels: existing(voxels))  # type: ignore[misc]
            times = median_ms(dense(), budget), median_ms(existing(voxels), budget)
            building = median_ms(lambda voxels=voxels: kernel_map(voxels), budget / 4)  # type: ignore[misc]
            view.add_row(pattern.__name__, f"{share:.0%}", f"{taps:.1f}", f"{times[0]:.0f}", f"{times[1]:.1f}",
                         f"{times[0] / times[1]:.1f}×", f"{building:.1f}", f"{memory[0]:.0f}", f"{memory[1]:.0f}",
                         f"{memory[1] / memory[0]:.0%}")
    return view


if __name__ == "__main__":
    torch.set_num_threads(1)
    Console(width=120).print(curve())
