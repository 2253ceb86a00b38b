import torch

from benchmarks.cases import Case
from gan3d.ops import composite, composite_packed, reference


def cases() -> list[Case]:
    return [dense(65_536, 64, 4, goal=2.5), dense(16_384, 64, 32, goal=None), ragged(65_536, 128, 4, goal=5)]


def work(n: int, rays: int, c: int) -> dict[str, float]:
    """Density, delta, t and features are read and weights written; backwards they are read again with the gradient of
    the weights, and those of density and features are written: delta and t are constants of training."""
    return {"bytes_forward": 4 * (n * (4 + c) + rays * (2 * c + 2)), "flops_forward": n * (2 * c + 20),
            "bytes_backward": 4 * (n * (5 + 2 * c) + rays * (2 * c + 2)), "flops_backward": n * (4 * c + 30)}


def dense(rays: int, s: int, c: int, goal: float | None) -> Case:
    def inputs() -> tuple:
        rng = torch.Generator().manual_seed(0)
        density = (torch.rand(rays, s, generator=rng) * 2).requires_grad_(True)
        features = torch.rand(rays, s, c, generator=rng).requires_grad_(True)
        t = torch.linspace(2, 6, s).expand(rays, s).contiguous()
        return density, torch.full((rays, s), 4 / s), features, t, torch.ones(rays, c), 0.0

    return Case("composite", f"{rays:,} rays × {s} samples × {c} channels", composite, reference.composite, inputs,
                goal=goal, **work(rays * s, rays, c))


def ragged(rays: int, most: int, c: int, goal: float) -> Case:
    rng = torch.Generator().manual_seed(0)
    counts = torch.randint(0, most + 1, (rays,), generator=rng)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    n = int(offsets[-1])

    def inputs() -> tuple:
        density = (torch.rand(n, generator=rng) * 2).requires_grad_(True)
        features = torch.rand(n, c, generator=rng).requires_grad_(True)
        t = torch.rand(n, generator=rng)
        return density, torch.full((n,), 1 / 32), features, t, offsets, torch.ones(rays, c), 0.0

    return Case("composite_packed", f"{n:,} samples on {rays:,} rays × {c} channels", composite_packed,
                reference.composite_packed, inputs, goal=goal, **work(n, rays, c))
