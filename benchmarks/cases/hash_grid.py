from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import Case
from gan3d.ops.hash_grid import HashGridLevels, hash_grid, hash_grid_levels
from gan3d.ops.reference.hash_grid import hash_grid as reference

N, LEVELS, FEATURES = 1 << 18, 16, 2
ROWS = N * LEVELS * 8  # asked for, once each: uniform points are the worst case, no row is still at hand


def cases() -> list[Case]:
    """Instant-NGP's sizes at uniform points: training, with small and with large tables, and the large one's limit.

    Forward: points in, features out, 8 rows read a level. Backward of the table: points and gradients in, 8 rows read
    and written a level, and all of the table written with zeros, 49 MB of it where a level has 2^19 rows.

    The last case is the forward pass alone, beside sums of as many 8-byte rows at random from a table of 4 MB and of
    64 MB (`embedding_bag`, bags of 8). A level of 2^19 rows is 4 MB, all levels are 49 MB: their time over `native ms`
    is the share of random access. It was 2.1–2.5 of the small, 5.3–6 of the large table on one Sapphire Rapids core;
    above one, since corners that differ in x alone are neighbours in the table seven times in eight (4.5 cache lines
    serve 8 rows), the first five levels are small, and rows are asked for 16 points ahead.
    """
    return [training(15), training(19), forward(19)]


def training(log2: int) -> Case:
    levels = hash_grid_levels(LEVELS, 16, 1.38191, log2)
    table, points, out = levels.offsets[-1] * FEATURES * 4, N * 3 * 4, N * LEVELS * FEATURES * 4
    rows, flops = ROWS * FEATURES * 4, N * LEVELS * (30 + 16 * FEATURES)

    def inputs() -> tuple:
        p, t = random_inputs(levels)
        return p, t.requires_grad_(True), levels

    return Case("hash_grid", f"2^18 points, 16 levels of 2 in 2^{log2} rows", hash_grid, plain, inputs,
                rows + points + out, 2 * rows + points + out + table, flops, flops, goal=4)


def forward(log2: int) -> Case:
    levels = hash_grid_levels(LEVELS, 16, 1.38191, log2)
    return Case("hash_grid", f"forward alone, 2^{log2} rows", hash_grid, plain,
                lambda: (*random_inputs(levels), levels), (ROWS + N * LEVELS) * FEATURES * 4 + N * 3 * 4,
                flops_forward=N * LEVELS * (30 + 16 * FEATURES),
                rivals={"rows_of_4MB": random_rows(1 << 19), "rows_of_64MB": random_rows(1 << 23)})


def plain(points: Tensor, table: Tensor, levels: HashGridLevels) -> Tensor:
    return reference(points, table, *levels)


def random_inputs(levels: HashGridLevels) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    return torch.rand(N, 3, generator=random), torch.rand(levels.offsets[-1], FEATURES, generator=random) - 0.5


def random_rows(rows: int) -> Callable[..., Tensor]:
    """Reads as many rows as the grid's forward pass, each anywhere, and adds them up by eights."""
    kept: list[Tensor] = []  # made on first use, in the warm-up

    def run(*_: object) -> Tensor:
        if not kept:
            random = torch.Generator().manual_seed(0)
            kept.append(torch.randint(rows, (ROWS // 8, 8), generator=random, dtype=torch.int32))
            kept.append(torch.rand(rows, FEATURES, generator=random))
        return torch.nn.functional.embedding_bag(kept[0], kept[1], mode="sum")

    return run
