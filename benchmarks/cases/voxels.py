from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import Case
from gan3d.ops.cells import Voxels
from gan3d.ops.reference import voxels as reference
from gan3d.ops.voxels import (
    compact,
    neighbours,
    positions_of,
    prune,
    rank_words,
    upsample,
    upsample_values,
    voxels_from_mask,
)

SIDE, CHANNELS = 128, 32
RESOLUTION = (SIDE, SIDE, SIDE)
CELLS = SIDE**3


def surface() -> Tensor:
    """How near each cell of a dense grid is to a wavy closed surface, as a trained scene's density is."""
    x, y, z = torch.meshgrid(*[(torch.arange(SIDE) + 0.5) / (SIDE / 2) - 1] * 3, indexing="ij")
    distance = (x * x + y * y + z * z).sqrt() - 0.62 - 0.08 * torch.sin(5 * x) * torch.sin(4 * y + 1) * torch.cos(6 * z)
    return -distance.abs()


def shell(share: float) -> Voxels:
    score = surface()
    return voxels_from_mask(score >= score.flatten().kthvalue(int(CELLS * (1 - share))).values)


def table(rows: int) -> Tensor:
    return torch.randn(rows, CHANNELS, generator=torch.Generator().manual_seed(0)).requires_grad_(True)


def prune_inputs(score: Callable[[], Tensor], dilate: int) -> tuple:
    """Every cell exists; 10 % have a score above the limit."""
    full, values = voxels_from_mask(torch.ones(RESOLUTION, dtype=torch.bool)), score()
    limit = float(values.kthvalue(CELLS * 9 // 10).values)
    return full.words, full.rank, values, table(CELLS), limit, dilate


def anywhere() -> Tensor:
    return torch.rand(CELLS, generator=torch.Generator().manual_seed(1))


def along_a_surface() -> Tensor:
    return reference.to_cells(surface(), RESOLUTION)


def native_prune(words: Tensor, rank: Tensor, score: Tensor, values: Tensor, limit: float,
                 dilate: int) -> tuple[Tensor, ...]:
    pruned = prune(Voxels(words, rank, RESOLUTION), score, limit, dilate)
    return pruned.voxels.words, pruned.voxels.rank, *pruned[1:], compact(values, pruned)


def reference_prune(words: Tensor, rank: Tensor, score: Tensor, values: Tensor, limit: float,
                    dilate: int) -> tuple[Tensor, ...]:
    out = reference.prune_voxels(words, rank, score, limit, dilate, RESOLUTION)
    return *out, reference.compact_rows(values, out[2])


def selection_alone(words: Tensor, rank: Tensor, score: Tensor, values: Tensor, limit: float, dilate: int) -> Tensor:
    """What one writes without a sparse grid: no bits, no ranks, no map back; and no dilation."""
    return values.index_select(0, (score >= limit).nonzero()[:, 0])


def cases() -> list[Case]:
    found = []
    for score, dilate in ((anywhere, 0), (along_a_surface, 0), (along_a_surface, 1)):
        kept = len(native_prune(*prune_inputs(score, dilate))[2])
        # forward: a score in and a row's new number out for each old row; a number and the values in and out for each
        # kept one (bits and ranks are a hundredth of that). Backward: kept values in, all rows out. Rows kept anywhere
        # touch every page of the gradient; along a surface some pages are never touched, and their zeros cost nothing
        # until somebody reads them: the share of the limit may exceed one
        forward, backward = CELLS * 8 + kept * (4 + 2 * 4 * CHANNELS), (kept + CELLS) * 4 * CHANNELS
        name = f"128³ × {CHANNELS}, {kept / CELLS:.0%} {score.__name__.replace('_', ' ')}, dilate {dilate}"
        found.append(Case("prune+compact", name, native_prune, reference_prune,
                          lambda score=score, dilate=dilate: prune_inputs(score, dilate), forward, backward, goal=5,
                          rivals={"index_select of what is kept alone": selection_alone} if dilate == 0 else {}))
    thin = shell(0.1)
    rows, words = int(thin.rank[-1]), len(thin.words)
    structure = words * 12
    found.append(Case("neighbours", "128³, 10 % along a surface", lambda *v: neighbours(Voxels(*v)),
                      reference.voxel_neighbours, lambda: tuple(thin), structure + rows * 27 * 4))
    found.append(Case("upsample", "128³, 10 % along a surface", lambda *v: _flat(upsample(Voxels(*v))),
                      reference.upsample_voxels, lambda: tuple(thin), 9 * structure + rows * 8 * 4))
    found.append(Case("upsample_values", f"2^18 × {CHANNELS}", upsample_values, reference.upsample_rows,
                      lambda: (table(1 << 18),), 9 * (4 * CHANNELS << 18), 9 * (4 * CHANNELS << 18)))
    found.append(Case("rank_words", "512³", rank_words, reference.rank_words,
                      lambda: (torch.arange(1 << 21) * 0x9E3779B97F4A7C1,), 12 << 21))
    found.append(Case("voxels_from_mask", "128³", lambda m: voxels_from_mask(m)[:2], reference.voxels_from_mask,
                      lambda: (surface() > -0.1,), CELLS + structure))
    found.append(Case("positions_of", "128³, 10 % along a surface", lambda *v: positions_of(Voxels(*v)),
                      reference.voxel_positions, lambda: tuple(thin), structure + rows * 12))
    return found


def _flat(up: tuple) -> tuple[Tensor, ...]:
    return up[0].words, up[0].rank, up[1]
