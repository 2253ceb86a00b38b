"""EG3D's backbone at full width: 512, 256 and 128 channels at 64², 128² and 256²."""

import torch

from benchmarks.cases import Case
from gan3d.ops.conv3x3 import conv3x3, upconv3x3
from gan3d.ops.reference.conv3x3 import conv3x3 as direct
from gan3d.ops.reference.conv3x3 import upconv3x3 as direct_up


def case(op: str, c: int, o: int, side: int, scale: int, goal: float) -> Case:
    """Operations are those of the direct sum; inputs, weight and outputs once."""

    def inputs() -> tuple:
        random = torch.Generator().manual_seed(0)
        x, weight = torch.randn(1, c, side, side, generator=random), torch.randn(o, c, 3, 3, generator=random)
        both = tuple(t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
        return both if scale == 2 else (*both, False)

    moved = 4.0 * (side**2 * (c + scale**2 * o) + 9 * c * o)
    return Case(op, f"{c} → {o} channels, {side}²" + (f" → {2 * side}²" if scale == 2 else ""),
                conv3x3 if scale == 1 else upconv3x3, direct if scale == 1 else direct_up, inputs, moved,
                flops_forward=18.0 * side**2 * c * o, goal=goal)


def cases() -> list[Case]:
    same = [(512, 64, 1.5), (256, 128, 1.5), (128, 256, 1.5), (512, 32, 1.5), (512, 16, 1.2)]
    up = [(512, 256, 64, 1.4), (256, 128, 128, 1.5), (512, 512, 32, 1.5), (512, 512, 16, 5), (512, 512, 8, 5),
          (512, 512, 4, 5)]
    return [case("conv3x3", c, c, side, 1, goal) for c, side, goal in same] + \
        [case("upconv3x3", c, o, side, 2, goal) for c, o, side, goal in up]
