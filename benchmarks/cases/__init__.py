"""What `benchmarks/ops.py` measures: one module a family of ops, each with `cases() -> list[Case]`."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One op at one shape. Both callables take the same inputs; those that require gradients are differentiated.

    The work is what the op cannot avoid: `bytes_forward` and `bytes_backward` each input read and each output written
    once (for gathers: every row asked for, once per request if the table is larger than the last-level cache slice the
    core can hold, see the comment in the case); `flops_*` multiply-adds as two. The limit is the larger of bytes ÷ copy
    bandwidth and flops ÷ sgemm speed, both measured in the same run.
    """

    op: str
    shape: str
    native: Callable[..., Tensor | tuple[Tensor, ...]]
    reference: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: Callable[[], tuple]
    bytes_forward: float
    bytes_backward: float = 0.0
    flops_forward: float = 0.0
    flops_backward: float = 0.0
    rivals: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]] = field(default_factory=dict)  # other honest codes
    goal: float | None = None  # the ratio to reach, forward and backward together
