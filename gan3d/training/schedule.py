"""A schedule is data: {step: value}. The value of the largest step not above the present one holds."""

import bisect
from collections.abc import Mapping
from typing import Any


class Steps:
    """Piecewise constant in the generator's step. `Steps(5e-4)` is constant; `Steps({0: 32, 10_000: 64})` is not."""

    def __init__(self, values: Any):
        table = dict(values) if isinstance(values, Mapping) else {0: values}
        self.starts = sorted(int(step) for step in table)
        if not self.starts or self.starts[0] != 0:
            raise ValueError(f"a schedule must say what holds at step 0, got {values}")
        self.values = [{int(step): value for step, value in table.items()}[start] for start in self.starts]

    def _stage(self, step: int) -> int:
        return bisect.bisect_right(self.starts, step) - 1

    def __call__(self, step: int) -> Any:
        return self.values[self._stage(step)]

    def stage_start(self, step: int) -> int:
        return self.starts[self._stage(step)]
