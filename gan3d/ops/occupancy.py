"""Occupancy: one bit for each cell of a box that says whether anything may be there, and where the bits come from.

`words` are int64 `[levels, cells / 64]` in the order of `cells`; level l covers the box scaled by 2^l about its centre
with the same number of cells, and is asked for points no finer level contains. No op here has a derivative.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gan3d.ops import extension
from gan3d.ops.cells import Resolution, check_resolution
from gan3d.ops.reference import occupancy as reference


def pack_bits(values: Float[Tensor, "*l cells"], threshold: float | Float[Tensor, ""]) -> Int[Tensor, "*l w"]:
    """Bits of values > threshold, w = cells / 64 words. A 0-dim tensor as threshold is never read on the host.

    Raises: ValueError unless cells is a multiple of 64.
    """
    if values.shape[-1] % 64:
        raise ValueError(f"pack_bits: the number of cells must be a multiple of 64, got {values.shape[-1]}")
    flat = extension.as_float(values.detach()).reshape(-1).contiguous()
    limit = torch.as_tensor(threshold, dtype=flat.dtype, device=flat.device).detach()
    out = torch.ops.gan3d.pack_bits(flat, limit) if extension.native(flat) else reference.pack_bits(flat, limit)
    return out.reshape(*values.shape[:-1], values.shape[-1] // 64)


def unpack_bits(words: Int[Tensor, "*l w"]) -> Bool[Tensor, "*l cells"]:
    """The inverse of `pack_bits`: cells = 64·w. Plain PyTorch, for looking at and for tests."""
    return reference.unpack_bits(words)


def occupied(points: Float[Tensor, "*b 3"], words: Int[Tensor, "*l w"], aabb: Float[Tensor, "2 3"],
             resolution: Resolution) -> Bool[Tensor, "*b"]:
    """Whether each point's cell is occupied, in the finest level that contains it; False outside the coarsest.

    A level contains its low faces, not its high ones. NaN points and a box without volume: False.
    Raises: ValueError for words that do not fit the resolution.
    """
    flat = extension.as_float(points.detach()).reshape(-1, 3).contiguous()
    words, box = check_words(words, resolution), aabb.detach().to(flat.dtype).contiguous()
    code = torch.ops.gan3d.occupied if extension.native(flat) else reference.occupied
    return code(flat, words, box, resolution).reshape(points.shape[:-1])


def update_occupancy(values: Float[Tensor, "*l cells"], index: Int[Tensor, " k"], new: Float[Tensor, " k"],
                     decay: float = 0.95, everywhere: bool = True) -> Float[Tensor, "*l cells"]:
    """The moving maximum: max(decay·old, new) in the cells `index`; a new tensor. Instant-NGP (2022), supp. sec. C.

    Args:
        values: what occupancy is judged by (density, or density times step); −1, or any negative number, is a cell that
            no camera sees, and stays.
        index: of cells, in all levels together: level·cells + cell. A cell named twice takes the larger of its new
            values, whatever their order, and decays once.
        new: ≥ 0.
        everywhere: all cells decay (Instant-NGP); False: those in `index` only.
    Raises: IndexError (on CUDA devices an assertion) for an index outside.
    """
    flat = extension.as_float(values.detach()).reshape(-1).contiguous()
    index, fresh = index.detach().long().contiguous(), new.detach().to(flat.dtype).contiguous()
    code = torch.ops.gan3d.update_occupancy if extension.native(flat) else reference.update_occupancy
    return code(flat, index, fresh, decay, everywhere).reshape(values.shape)


def occupancy_threshold(values: Float[Tensor, "*l cells"], most: float = 0.01) -> Float[Tensor, ""]:
    """What a cell's value must exceed: min(most, mean over the first level), unseen cells counting as 0.

    Where nothing was ever found this is 0, and `pack_bits` calls every cell empty. A 0-dim tensor, for `pack_bits`.
    """
    first = extension.as_float(values.detach())
    first = first if first.dim() == 1 else first.flatten(0, -2)[:1]
    return first.clamp(min=0).sum().div(max(first.numel(), 1)).clamp(max=most)


def check_words(words: Int[Tensor, "*l w"], resolution: Resolution) -> Int[Tensor, "l w"]:
    """Words `[levels, cells / 64]`, contiguous. Raises ValueError where they do not fit the resolution."""
    x, y, z = check_resolution(resolution)
    if words.shape[-1] * 64 != x * y * z:
        raise ValueError(f"words of {words.shape[-1] * 64} cells do not fit resolution {tuple(resolution)}")
    words = words.reshape(-1, words.shape[-1]).contiguous()
    if not 1 <= len(words) <= 16:
        raise ValueError(f"there must be 1 to 16 levels of words, got {len(words)}")
    return words


@extension.after_loading
def _register() -> None:
    @torch.library.register_fake("gan3d::pack_bits")
    def _(values: Tensor, threshold: Tensor) -> Tensor:
        return values.new_empty(values.shape[0] // 64, dtype=torch.int64)

    @torch.library.register_fake("gan3d::occupied")
    def _(points: Tensor, words: Tensor, aabb: Tensor, resolution: list[int]) -> Tensor:
        return points.new_empty(points.shape[0], dtype=torch.bool)

    @torch.library.register_fake("gan3d::update_occupancy")
    def _(values: Tensor, index: Tensor, fresh: Tensor, decay: float, everywhere: bool) -> Tensor:
        return torch.empty_like(values)

    @register_flop_formula(torch.ops.gan3d.pack_bits)
    def _(values: tuple, threshold: tuple, *, out_shape: tuple, **_: object) -> int:
        return values[0]

    @register_flop_formula(torch.ops.gan3d.occupied)
    def _(points: tuple, words: tuple, *_: object, out_shape: tuple, **__: object) -> int:
        return points[0] * 6

    @register_flop_formula(torch.ops.gan3d.update_occupancy)
    def _(values: tuple, index: tuple, fresh: tuple, decay: float, everywhere: bool, *, out_shape: tuple,
          **_: object) -> int:
        return (values[0] if everywhere else index[0]) + index[0]
