"""What changes evenly while a model trains."""

import math
from typing import NamedTuple

from gan3d.cameras import Number


class Ramp(NamedTuple):
    """From `first` at step 0 linearly to `last` after `steps` steps, and `last` from then on."""

    first: Number
    last: Number
    steps: int

    def __call__(self, step: int) -> Number:
        return self.last if step >= self.steps else self.first + (self.last - self.first) * (step / self.steps)


class Exponential(NamedTuple):
    """From `first` at step 0 by the factor e^rate a step to `last`, and `last` from then on.

    first and last are positive, and the rate leads from one to the other; or they are equal.
    """

    first: Number
    last: Number
    rate: float

    def __call__(self, step: int) -> Number:
        done = self.first == self.last or step >= math.log(self.last / self.first) / self.rate
        return self.last if done else self.first * math.exp(self.rate * step)


class Growth(NamedTuple):
    """Progressive growing: the picture's side doubles from `first` to `last` between the steps `begin` and `end`.

    StyleNeRF's schedule: alpha rises evenly from 0 to 1; with n doublings, the k-th comes in while alpha goes from
    (k − 1)/n to k/n. Before `begin` the side is `first`.
    """

    first: int
    last: int
    begin: int
    end: int

    def alpha(self, step: int) -> float:
        return 1.0 if step >= self.end else max(0.0, (step - self.begin) / (self.end - self.begin))

    @property
    def doublings(self) -> int:
        return (self.last // self.first).bit_length() - 1

    def __call__(self, step: int) -> int:
        """The side of the pictures of this step."""
        alpha = self.alpha(step)
        return self.first if alpha == 0 else self.first << min(int(alpha * self.doublings) + 1, self.doublings)
