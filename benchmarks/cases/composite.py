import torch
from torch import Tensor

from benchmarks.cases import Case
from gan3d.ops.composite import composite, composite_packed
from gan3d.ops.reference.composite import composite as reference_composite
from gan3d.ops.reference.composite import composite_packed as reference_composite_packed

RAYS = 1 << 16


def samples(*shape: int, channels: int) -> tuple[Tensor, ...]:
    """Densities of which most are small and a few opaque, as along the rays of a trained field."""
    random = torch.Generator().manual_seed(0)
    density = torch.rand(shape, generator=random).pow(4).mul_(40)
    delta = torch.rand(shape, generator=random).mul_(0.06)
    features = torch.randn(*shape, channels, generator=random)
    t = torch.rand(shape, generator=random)
    return density.requires_grad_(True), delta, features.requires_grad_(True), t


def dense(channels: int) -> tuple:
    return *samples(RAYS, 64, channels=channels), torch.ones(channels), 0.0


def packed(channels: int) -> tuple:
    counts = torch.randint(129, (RAYS,), generator=torch.Generator().manual_seed(1))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
    return *samples(int(offsets[-1]), channels=channels), offsets, torch.ones(channels), 0.0


def segment_reduce(density: Tensor, delta: Tensor, features: Tensor, t: Tensor, offsets: Tensor, background: Tensor,
                   threshold: float) -> tuple[Tensor, ...]:
    """torch's own sums over segments: faster than index_add, but differentiable only once."""
    ends = offsets.long()
    thickness = density * delta
    total = torch.nn.functional.pad(thickness.cumsum(0, dtype=torch.float64), (1, 0))
    base = torch.repeat_interleave(total[ends[:-1]], ends.diff(), output_size=len(density))
    weights = torch.exp(-(total[:-1] - base).float()) * -torch.expm1(-thickness)

    def sums(x: Tensor) -> Tensor:
        return torch.segment_reduce(x, "sum", offsets=ends, axis=0, initial=0.0)

    left = torch.exp(-(total[ends[1:]] - total[ends[:-1]]).float())
    return sums(weights[:, None] * features) + left[:, None] * background, sums(weights * t), sums(weights), weights


def cases() -> list[Case]:
    found = []
    for name, native, reference, inputs, shape, channels, goal in (
        ("composite", composite, reference_composite, dense, "2^16 × 64 samples", 4, 2.5),
        ("composite", composite, reference_composite, dense, "2^16 × 64 samples", 32, None),
        ("composite_packed", composite_packed, reference_composite_packed, packed, "2^16 rays of 0–128 samples", 4, 5),
    ):
        n, c = RAYS * 64, channels
        # A sample in: density, delta, t and features; out: its weight. Of a ray: features, depth, opacity.
        # Back: the inputs again and the gradient of the weight in; the gradients of density and features out.
        forward, backward = 4 * (n * (4 + c) + RAYS * (c + 2)), 4 * (n * (5 + 2 * c) + RAYS * (c + 2))
        rivals = {"segment_reduce": segment_reduce} if name == "composite_packed" else {}
        # two exponentials of 15 operations and a few more; features times weights, and twice that back
        found.append(Case(name, f"{shape}, {c} channels", native, reference, lambda i=inputs, c=c: i(c), forward,
                          backward, n * (35 + 2 * c), n * (46 + 3 * c), rivals=rivals, goal=goal))
    return found
