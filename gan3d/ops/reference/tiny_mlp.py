"""Small fully connected networks: one, or each point its own."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {"none": lambda h: h, "relu": torch.relu, "softplus": F.softplus}


def parameter_count(widths: Sequence[int], bias: bool) -> int:
    """Length of a network's vector: Σ out · in, plus Σ out with biases."""
    return sum(o * (i + bias) for i, o in zip(widths[:-1], widths[1:], strict=True))


def layers(parameters: Tensor, widths: Sequence[int], bias: bool) -> list[tuple[Tensor, Tensor | None]]:
    sizes = [size for i, o in zip(widths[:-1], widths[1:], strict=True) for size in (o * i, o * bias)]
    parts = parameters.split(sizes, dim=-1)
    weights = [w.unflatten(-1, (o, i)) for w, i, o in zip(parts[::2], widths[:-1], widths[1:], strict=True)]
    return [(w, b if bias else None) for w, b in zip(weights, parts[1::2], strict=True)]


def tiny_mlp(x: Tensor, parameters: Tensor, widths: Sequence[int], bias: bool, activation: str) -> Tensor:
    """[n i], [p] → [n o]."""
    stack = layers(parameters, widths, bias)
    for weight, b in stack[:-1]:
        x = ACTIVATIONS[activation](F.linear(x, weight, b))
    return F.linear(x, *stack[-1])


def every_network(x: Tensor, parameters: Tensor, widths: Sequence[int], bias: bool, activation: str) -> Tensor:
    """[g m i], [g p] → [g m o]: network j for the m points x[j]."""
    for layer, (weight, b) in enumerate(layers(parameters, widths, bias)):
        if layer:
            x = ACTIVATIONS[activation](x)
        weight = weight.mT
        x = torch.bmm(x, weight) if b is None else torch.baddbmm(b[:, None], x, weight)
    return x


def tiny_mlp_gathered(x: Tensor, parameters: Tensor, offsets: Tensor, widths: Sequence[int], bias: bool,
                      activation: str) -> Tensor:
    """As the equation reads: every point with the weights of its network, 4 · p bytes a point."""
    network = torch.repeat_interleave(offsets.diff())
    outputs = every_network(x[:len(network), None], parameters.index_select(0, network), widths, bias, activation)
    return F.pad(outputs[:, 0], (0, 0, 0, len(x) - len(network)))


def tiny_mlp_batch(x: Tensor, parameters: Tensor, offsets: Tensor, widths: Sequence[int], bias: bool, activation: str,
                   most: int = 64) -> Tensor:
    """[n i], [g p], [g+1] → [n o]: the points of a network in groups of at most `most`, all groups at once.

    A group takes its own copy of the weights: one crowded network does not decide how far the others are padded.
    """
    counts = offsets.diff()
    groups = (counts + most - 1) // most
    network = torch.repeat_interleave(groups)  # of each group
    if len(network) == 0:
        return (x[:, :1] * 0 + parameters.sum() * 0).expand(-1, widths[-1])
    rank = torch.arange(len(network), device=x.device) - (groups.cumsum(0) - groups)[network]
    share = (counts[network] + groups[network] - 1) // groups[network]  # points of a group (the last: fewer)
    begin = offsets[network] + rank * share
    end = torch.minimum(begin + share, offsets[network + 1])
    point = begin[:, None] + torch.arange(int(share.max()), device=x.device)  # [groups m]
    there = point < end[:, None]
    padded = F.embedding(point.clamp(max=len(x) - 1), x)  # its derivative adds rows without sorting them
    outputs = every_network(padded, parameters.index_select(0, network), widths, bias, activation)
    return x.new_zeros(len(x), widths[-1]).index_put((point[there],), outputs[there])


def op(x: Tensor, parameters: Tensor, offsets: Tensor | None, widths: Sequence[int], bias: bool,
       activation: int) -> Tensor:
    """Under the signature of the compiled op."""
    name = list(ACTIVATIONS)[activation]
    if offsets is None:
        return tiny_mlp(x, parameters[0], widths, bias, name)
    return tiny_mlp_batch(x, parameters, offsets, widths, bias, name)


def sort_by_cell(cell: Tensor, count: int) -> tuple[Tensor, Tensor]:
    key = torch.where((cell >= 0) & (cell < count), cell, count)
    ordered, order = key.sort(stable=True)
    return order, torch.searchsorted(ordered, torch.arange(count + 1, dtype=cell.dtype, device=cell.device))
