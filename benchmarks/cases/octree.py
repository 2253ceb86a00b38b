import math

import torch
from torch import Tensor

from benchmarks.cases import Case
from gan3d.ops.octree import Octree, build_octree, octree_query, octree_traverse
from gan3d.ops.reference import octree as reference

DEPTH = 7
KEPT = 1 << 17
RAYS = 1 << 16


def shell() -> Tensor:
    """Cells of 128³ in a shell, 2 % of the box thick: what is kept of a trained scene. Some name the same cell."""
    random = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(KEPT, 3, generator=random), dim=-1)
    radius = 0.30 + 0.02 * torch.rand(KEPT, 1, generator=random)
    return ((directions * radius + 0.5) * (1 << DEPTH)).long()


def rays() -> tuple[Tensor, Tensor, Tensor]:
    """From 64 cameras around the box [−1, 1]³ towards its middle, as a training batch has them."""
    random = torch.Generator().manual_seed(1)
    eyes = 2.5 * torch.nn.functional.normalize(torch.randn(64, 3, generator=random), dim=-1)
    o = eyes.repeat_interleave(RAYS // 64, 0)
    d = torch.nn.functional.normalize(0.5 * torch.randn(RAYS, 3, generator=random) - o, dim=-1)
    return o, d, torch.tensor([[-1.0] * 3, [1.0] * 3])


def traverse(child: Tensor, o: Tensor, d: Tensor, box: Tensor, flags: Tensor | None) -> tuple[Tensor, ...]:
    return octree_traverse(Octree(child), o, d, box, occupied=flags)


def reference_traverse(child: Tensor, o: Tensor, d: Tensor, box: Tensor, flags: Tensor | None) -> tuple[Tensor, ...]:
    return reference.octree_traverse(child, o, d, box, flags, 0.0, math.inf, 4096)


def cases() -> list[Case]:
    tree, n = build_octree(shell(), DEPTH), 1 << 18
    child, points = tree.child, torch.rand(n, 3, generator=torch.Generator().manual_seed(2))
    flags = torch.zeros(child.numel(), dtype=torch.uint8)
    flags[octree_query(tree, (shell() + 0.5) / (1 << DEPTH))[0].long()] = 1
    found = [
        # three int64 a position in, the table out
        Case("build_octree", "2^17 positions in a shell, depth 7", lambda p: (build_octree(p, DEPTH).child,),
             lambda p: (reference.build_octree(p, DEPTH),), lambda: (shell(),), KEPT * 24 + child.numel() * 4),
        # three numbers in and two out a point; the table (it stays in the cache) once
        Case("octree_query", "2^18 points, shell of depth 7", lambda c, p: octree_query(Octree(c), p),
             reference.octree_query, lambda: (child, points), n * 20 + child.numel() * 4),
    ]
    for name, reported in (("all leaves", None), ("the shell's leaves", flags)):
        crossed = len(octree_traverse(tree, *rays()).leaf)
        pieces = len(octree_traverse(tree, *rays(), occupied=reported).leaf)
        # six numbers in and an offset out a ray, four out a piece; the table once. Work: three planes for each leaf
        # crossed, reported or not, and the middle and length of what is
        found.append(Case("octree_traverse", f"2^16 rays, shell of depth 7, {name}", traverse, reference_traverse,
                          lambda reported=reported: (child, *rays(), reported),
                          4 * (7 * RAYS + 4 * pieces + child.numel()), 0.0, 12 * crossed + 3 * pieces, goal=20))
    return found
