"""Coarse parallelism on CPUs: one large piece of work a thread, instead of PyTorch's thousands of small ones a step.

PyTorch splits every operation among its threads and waits for the slowest. On two cores, with anything else running,
that wait is a scheduler's time slice thousands of times a step: a training step was measured 20 to 80 times slower
beside one busy process. Here a thread takes a share of the points through the whole network and meets the others once.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

Piece = TypeVar("Piece")
Result = TypeVar("Result")

BLOCK_BYTES = {"cpu": 2**20, "cuda": 2**25}  # of one layer's activations: two such blocks fill a core's 2 MB of cache
THREADS = torch.get_num_threads()  # OMP_NUM_THREADS, or the cores there are
_pool: ThreadPoolExecutor | None = None


def per_device(table: Mapping[str, int], like: Tensor) -> int:
    """The entry for the device of `like`: "cpu", or "cuda" for all others."""
    return table["cpu" if like.device.type == "cpu" else "cuda"]


def block_rows(width: int, like: Tensor) -> int:
    """How many points of so many channels, of the type and on the device of `like`, make a block."""
    return max(1, per_device(BLOCK_BYTES, like) // (like.element_size() * width))


def size_of(block: Tensor | slice) -> int:
    """Points in a block of `all_blocks` or `active_blocks`."""
    return block.stop - block.start if isinstance(block, slice) else len(block)


def all_blocks(images: int, points: int, rows: int) -> list[tuple[int, slice]]:
    """(image, its points) for blocks of `rows` points."""
    return [(i, slice(k, min(k + rows, points))) for i in range(images) for k in range(0, points, rows)]


def active_blocks(active: Bool[Tensor, "b p"], rows: int) -> list[tuple[int, Int[Tensor, " r"]]]:
    """(image, indices of its active points) for blocks of `rows` points."""
    return [(image, block) for image, hit in enumerate(active) for block in hit.nonzero()[:, 0].split(rows)]


def add_up(shares: Sequence[list]) -> list:
    """The sums over all shares' tensors, place by place, in the first share's; None stays None."""
    total, *others = shares
    for other in others:
        for mine, theirs in zip(total, other, strict=True):
            if mine is not None:
                mine += theirs
    return total


def share_out(run: Callable[[Sequence[Piece]], Result], pieces: Sequence[Piece], device: torch.device) -> list[Result]:
    """run(share) for equal, consecutive shares of `pieces`: one a thread on a CPU, all in one elsewhere.

    The results come in the order of the shares, so sums over them are reproducible. `run` sees no gradients. Under a
    dispatch mode, which belongs to its thread (counting operations, for instance), everything stays in this one.
    """
    count = min(THREADS, len(pieces)) if device.type == "cpu" and _get_current_dispatch_mode() is None else 1
    if count <= 1:
        return [run(pieces)]
    cuts = [len(pieces) * i // count for i in range(count + 1)]
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(THREADS, "gan3d", initializer=torch.set_num_threads, initargs=(1,))

    def alone(share: Sequence[Piece]) -> Result:
        with torch.no_grad():
            return run(share)

    return list(_pool.map(alone, [pieces[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]))
