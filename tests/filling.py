"""Reproducible weights without a random generator, of the reference numbers: a hash of name and index."""

import numpy as np
import torch
from torch import Tensor, nn

KEPT = ("resample_filter", "up_filter", "down_filter", "alpha", "radius", "poses", "check_empty_neighbors.weight",
        "magnitude_ema", "w_avg", "dataset_label_std", "steps")


def noise(count: int, key: int) -> np.ndarray:
    """`count` numbers in ±√3 with variance 1, a function of (index, key)."""
    i = np.arange(1, count + 1, dtype=np.uint64)
    h = (i * 2654435761 + key * 97531) % 2**32
    h ^= h >> np.uint64(15)
    h = h * 2246822519 % 2**32
    h ^= h >> np.uint64(13)
    return (2 * h.astype(np.float64) / 2**32 - 1) * 3**0.5


def inputs(shape: list[int], key: int) -> Tensor:
    return torch.from_numpy(noise(int(np.prod(shape)), key)).float().reshape(shape)


@torch.no_grad()
def fill(module: nn.Module) -> None:
    """Every parameter and buffer but those in KEPT becomes a function of its name and shape."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if name.endswith(KEPT) or not tensor.is_floating_point():
            continue
        *parents, leaf = name.split(".")
        parent = parents[-1] if parents else ""
        value = noise(tensor.numel(), sum(name.encode()))
        if leaf == "noise_strength":
            value = 0.1 * value
        elif leaf == "bias":
            value = 0.2 * value + (parent == "affine")
        elif "mapping" in name and parent.startswith("fc") and parent[2:].isdigit():
            value = 100 * value
        tensor.copy_(torch.from_numpy(value).reshape(tensor.shape))
