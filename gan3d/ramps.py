"""What changes evenly while a model trains."""

from typing import NamedTuple

from gan3d.cameras import Number


class Ramp(NamedTuple):
    """From `first` at step 0 linearly to `last` after `steps` steps, and `last` from then on."""

    first: Number
    last: Number
    steps: int

    def __call__(self, step: int) -> Number:
        return self.last if step >= self.steps else self.first + (self.last - self.first) * (step / self.steps)
