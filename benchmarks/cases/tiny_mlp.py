"""KiloNeRF's students (the layers the position goes through), Instant-NGP's density head, EG3D's decoder."""

import torch
from torch import Tensor

from benchmarks.cases import Case
from gan3d.ops.reference.tiny_mlp import every_network, tiny_mlp_gathered
from gan3d.ops.reference.tiny_mlp import sort_by_cell as reference_sort
from gan3d.ops.reference.tiny_mlp import tiny_mlp as reference_mlp
from gan3d.ops.reference.tiny_mlp import tiny_mlp_batch as reference_batch
from gan3d.ops.tiny_mlp import parameter_count, sort_by_cell, tiny_mlp, tiny_mlp_batch

N, NETWORKS = 1 << 18, 4096


def networks(widths: tuple[int, ...], bias: bool, count: int, random: torch.Generator) -> Tensor:
    return (torch.randn(count, parameter_count(widths, bias), generator=random) * 0.2).requires_grad_(True)


def padded(x: Tensor, parameters: Tensor, offsets: Tensor, widths: tuple[int, ...], bias: bool,
           activation: str) -> Tensor:
    """[g, most points of a network, i] through bmm: the best where networks have equally many points."""
    counts = offsets.diff()
    place = torch.arange(int(counts.max()))
    there = place < counts[:, None]
    rows = (offsets[:-1, None] + place)[there]
    full = x.new_zeros(*there.shape, x.shape[1]).index_put((there.nonzero()[:, 0], there.nonzero()[:, 1]), x[rows])
    return every_network(full, parameters, widths, bias, activation)[there]


def one_by_one(x: Tensor, parameters: Tensor, offsets: Tensor, widths: tuple[int, ...], bias: bool,
               activation: str) -> Tensor:
    parts = x.split(offsets.diff().tolist())
    return torch.cat([reference_mlp(part, p, widths, bias, activation)
                      for part, p in zip(parts, parameters.unbind(), strict=True)])


def work(widths: tuple[int, ...], parameters: int) -> dict[str, float]:
    """Forward: inputs, parameters, outputs. Backward: inputs, parameters, gradient of outputs in, two gradients out;
    each product twice, and those before the last once more, as hidden values are computed again.
    """
    each = [i * o for i, o in zip(widths[:-1], widths[1:], strict=True)]
    i, o = widths[0], widths[-1]
    return {"bytes_forward": 4.0 * (N * (i + o) + parameters),
            "bytes_backward": 4.0 * (N * (2 * i + o) + 2 * parameters),
            "flops_forward": 2.0 * N * sum(each), "flops_backward": 2.0 * N * (2 * sum(each) + sum(each[:-1]))}


def batch_case(shape: str, even: bool, goal: float | None) -> Case:
    widths, bias = (63, 32, 32, 33), True

    def inputs() -> tuple:
        random = torch.Generator().manual_seed(0)
        x = torch.randn(N, widths[0], generator=random).requires_grad_(True)
        cells = torch.randint(NETWORKS, (N,), generator=random) if not even else torch.arange(N) % NETWORKS
        return x, networks(widths, bias, NETWORKS, random), sort_by_cell(cells, NETWORKS)[1], widths, bias, "relu"

    return Case("tiny_mlp_batch", shape, tiny_mlp_batch, tiny_mlp_gathered, inputs,
                **work(widths, NETWORKS * parameter_count(widths, bias)),
                rivals={"grouped": reference_batch, "padded": padded, "one by one": one_by_one}, goal=goal)


def single_case(shape: str, widths: tuple[int, ...], bias: bool, activation: str) -> Case:
    def inputs() -> tuple:
        random = torch.Generator().manual_seed(0)
        x = torch.randn(N, widths[0], generator=random).requires_grad_(True)
        return x, networks(widths, bias, 1, random).detach()[0].requires_grad_(True), widths, bias, activation

    return Case("tiny_mlp", shape, tiny_mlp, reference_mlp, inputs,
                **work(widths, parameter_count(widths, bias)), goal=1.5)


def sort_case() -> Case:
    def inputs() -> tuple:
        return torch.randint(-1, NETWORKS, (N,), generator=torch.Generator().manual_seed(0)), NETWORKS

    return Case("sort_by_cell", "2^18 points, 4,096 cells", sort_by_cell, reference_sort, inputs, N * 16.0)


def cases() -> list[Case]:
    return [
        batch_case("KiloNeRF 63-32-32-33, 2^18 points over 4,096 networks at random", False, 10),
        batch_case("the same, 64 points each", True, None),
        single_case("Instant-NGP 32-64-16, relu, 2^18 points", (32, 64, 16), False, "relu"),
        single_case("EG3D 32-64-33, bias, softplus, 2^18 points", (32, 64, 33), True, "softplus"),
        sort_case(),
    ]
