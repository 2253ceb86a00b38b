"""Exponential moving averages of the generator, ours because optimisers with two networks confuse ready-made ones."""

import copy

import torch
from torch import nn

from gan3d.cameras import Number


class EMA(nn.Module):
    """`average` follows a network: average ← β·average + (1−β)·network, buffers copied.

    With `warmup`, β is min(decay, (1+n)/(10+n)) after n updates (π-GAN's code), so that early averages are not stale.
    With `ramp`, the half-life is at most ramp·n updates (StyleGAN2's trainer: 0.05).
    """

    updates: torch.Tensor

    def __init__(self, network: nn.Module, decay: Number, warmup: bool = False, ramp: Number | None = None):
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"ema decay must lie in [0, 1), got {decay}")
        self.decay, self.warmup, self.ramp = decay, warmup, ramp
        self.average = copy.deepcopy(network).eval().requires_grad_(False)
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        self.updates += 1
        n = int(self.updates)
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay
        if self.ramp is not None:
            decay = min(decay, 0.5 ** (1 / (self.ramp * n)))
        averages = list(self.average.parameters())
        torch._foreach_lerp_(averages, [p.detach() for p in network.parameters()], 1 - decay)
        for mine, theirs in zip(self.average.buffers(), network.buffers(), strict=True):
            mine.copy_(theirs)

    def train(self, mode: bool = True) -> "EMA":
        return super().train(False)  # an average is only ever looked at
