"""The ledger: a frame costs H×W × K × L, and every paper makes one of the three smaller. Counted, never typed in."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from gan3d import ops


@dataclass(frozen=True)
class Cost:
    """One frame. flops count a multiply-add as two; `flops_fixed` is paid per image (mapping, backbone, upsampler)."""

    rays: int
    samples_per_ray: float
    flops_per_sample: float
    flops_fixed: float = 0.0

    @property
    def flops(self) -> float:
        return self.rays * self.samples_per_ray * self.flops_per_sample + self.flops_fixed


def count_flops(run: Callable[[], object]) -> int:
    """Floating-point operations of matrix products, convolutions and our own ops in `run()`, without gradients."""
    ops.backend()  # loads the ops: a counter knows the formulas of those that are there when it is made
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
