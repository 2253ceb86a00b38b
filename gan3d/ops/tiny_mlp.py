"""Small fully connected networks in one pass: Instant-NGP's heads, EG3D's decoder, KiloNeRF's thousands of students.

A network is one flat vector: layer after layer, weight `[out in]` row by row, then bias `[out]`. A module holds it as
one parameter and reads and initialises it through the views of `layers`. The compiled op keeps the hidden values of a
block of points in the fastest cache, forward and, computed again, backward: memory is inputs, outputs and their
gradients (CUDA: and the hidden values of 2^16 points, backward). On the CPU every result has the same bits for any
number of threads. On CUDA the gradient of the parameters adds atomically, in no fixed order.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gan3d.ops import extension
from gan3d.ops.autograd import differentiable, shaped_like
from gan3d.ops.reference.tiny_mlp import ACTIVATIONS, op
from gan3d.ops.reference.tiny_mlp import layers as reference_layers
from gan3d.ops.reference.tiny_mlp import parameter_count as parameter_count
from gan3d.ops.reference.tiny_mlp import sort_by_cell as reference_sort
from gan3d.ops.reference.tiny_mlp import tiny_mlp as reference_mlp
from gan3d.ops.reference.tiny_mlp import tiny_mlp_batch as reference_batch

MAX_LAYERS, MAX_INPUT, MAX_WIDTH = 8, 128, 64


def layers(parameters: Float[Tensor, "*b p"], widths: tuple[int, ...],
           bias: bool) -> list[tuple[Float[Tensor, "*b o i"], Float[Tensor, "*b o"] | None]]:
    """Weight and bias of each layer (None without biases), views of `parameters` (not copies).

    Raises: ValueError if the last axis is not parameter_count(widths, bias) long.
    """
    if parameters.shape[-1] != parameter_count(widths, bias):
        raise ValueError(f"layers: widths {tuple(widths)} take {parameter_count(widths, bias)} parameters, "
                         f"got {parameters.shape[-1]}")
    return reference_layers(parameters, widths, bias)


def tiny_mlp(x: Float[Tensor, "*b i"], parameters: Float[Tensor, " p"], widths: tuple[int, ...], bias: bool,
             activation: str) -> Float[Tensor, "*b o"]:
    """h ← activation(W h + b) for every layer but the last, which is linear. Instant-NGP (2022), sec. 4; EG3D (2022).

    Args:
        parameters: the layout of `layers`.
        widths: input, hidden …, output: at most 8 layers, 128 inputs, 64 wide after that.
        activation: "relu", "softplus" (log(1 + e^h), h itself above 20) or "none".
    Raises: ValueError for widths, shapes or a name beyond these; TypeError unless floating-point of one type.
    """
    _check("tiny_mlp", x, parameters, widths, bias, activation)
    flat, p = extension.as_float(x).reshape(-1, widths[0]), extension.as_float(parameters)
    if extension.native(flat):
        code = list(ACTIVATIONS).index(activation)
        out = torch.ops.gan3d.tiny_mlp(flat.contiguous(), p.contiguous()[None], None, list(widths), bias, code)
    else:
        out = reference_mlp(flat, p, widths, bias, activation)
    return out.reshape(*x.shape[:-1], widths[-1])


def tiny_mlp_batch(x: Float[Tensor, "n i"], parameters: Float[Tensor, "g p"], offsets: Int[Tensor, " g+1"],
                   widths: tuple[int, ...], bias: bool, activation: str) -> Float[Tensor, "n o"]:
    """Rows offsets[j] … offsets[j+1]−1 through network j. KiloNeRF (2021), sec. 3.1 and 3.3.

    Args:
        x: sorted by network, see `sort_by_cell`.
        offsets: int32 or int64, from 0, not decreasing (on the GPU not checked); a network may have no rows. Rows past
            offsets[g] belong to no network: output and gradient are 0.
        widths, activation: of all networks, as in `tiny_mlp`.
    Raises: as `tiny_mlp`.
    """
    _check("tiny_mlp_batch", x, parameters, widths, bias, activation)
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"tiny_mlp_batch: offsets must be int32 or int64, got {offsets.dtype}")
    if offsets.shape != (parameters.shape[0] + 1,):
        raise ValueError(f"tiny_mlp_batch: {parameters.shape[0]} networks need {parameters.shape[0] + 1} offsets, "
                         f"got {tuple(offsets.shape)}")
    x, p, offsets = extension.as_float(x), extension.as_float(parameters), offsets.long()
    if extension.native(x):
        code = list(ACTIVATIONS).index(activation)
        return torch.ops.gan3d.tiny_mlp(x.contiguous(), p.contiguous(), offsets.contiguous(), list(widths), bias, code)
    return reference_batch(x, p, offsets, widths, bias, activation)


def sort_by_cell(cell: Int[Tensor, " n"], count: int) -> tuple[Int[Tensor, " n"], Int[Tensor, " m"]]:
    """The order that brings points together by cell, stable, and where each cell's begin.

    `x[order]` is what `tiny_mlp_batch` takes; `out.new_empty(out.shape).index_copy(0, order, out)` brings results back.

    Args:
        cell: int32 or int64; anything outside 0 … count−1 (−1, say) means no cell and is sorted last.
    Returns: order int64, a permutation of all points; offsets int64 [count+1]: the points of cell j are
        order[offsets[j]:offsets[j+1]], those of no cell order[offsets[count]:].
    Raises: TypeError for another type; ValueError for a negative count.
    """
    if cell.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"sort_by_cell: cell must be int32 or int64, got {cell.dtype}")
    if count < 0:
        raise ValueError(f"sort_by_cell: count must be 0 or more, got {count}")
    if extension.native(cell):
        return torch.ops.gan3d.sort_by_cell(cell.contiguous(), count)
    return reference_sort(cell, count)


def _check(name: str, x: Tensor, parameters: Tensor, widths: tuple[int, ...], bias: bool, activation: str) -> None:
    if not (2 <= len(widths) <= MAX_LAYERS + 1 and min(widths) >= 1 and widths[0] <= MAX_INPUT and
            max(widths[1:]) <= MAX_WIDTH):
        raise ValueError(f"{name}: widths {tuple(widths)}: 1 to {MAX_LAYERS} layers, at most {MAX_INPUT} inputs, "
                         f"at most {MAX_WIDTH} wide after that")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{name}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if x.shape[-1] != widths[0]:
        raise ValueError(f"{name}: x has {x.shape[-1]} features, widths {tuple(widths)} take {widths[0]}")
    if parameters.shape[-1] != parameter_count(widths, bias):
        raise ValueError(f"{name}: widths {tuple(widths)} take {parameter_count(widths, bias)} parameters, "
                         f"got {parameters.shape[-1]}")
    if x.dtype != parameters.dtype:
        raise TypeError(f"{name}: x is {x.dtype}, parameters are {parameters.dtype}")


@extension.after_loading
def _register() -> None:
    @torch.library.register_fake("gan3d::tiny_mlp")
    def _(x: Tensor, parameters: Tensor, offsets: Tensor | None, widths: list[int], bias: bool,
          activation: int) -> Tensor:
        return x.new_empty(x.shape[0], widths[-1])

    @torch.library.register_fake("gan3d::tiny_mlp_backward")
    def _(grad: Tensor, x: Tensor, parameters: Tensor, offsets: Tensor | None, widths: list[int], bias: bool,
          activation: int, needed: list[bool]) -> tuple[Tensor, ...]:
        return shaped_like([x, parameters], needed)

    @torch.library.register_fake("gan3d::sort_by_cell")
    def _(cell: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return cell.new_empty(cell.shape, dtype=torch.int64), cell.new_empty(count + 1, dtype=torch.int64)

    @register_flop_formula(torch.ops.gan3d.tiny_mlp)
    def _(x: tuple, parameters: tuple, offsets: tuple | None, widths: list[int], *_: object, **__: object) -> int:
        return 2 * x[0] * sum(_products(widths))

    @register_flop_formula(torch.ops.gan3d.tiny_mlp_backward)
    def _(grad: tuple, x: tuple, parameters: tuple, offsets: tuple | None, widths: list[int], bias: bool,
          activation: int, needed: list[bool], **_: object) -> int:
        each = _products(widths)
        hidden = sum(each[:-1])  # computed again
        return 2 * x[0] * (hidden + sum(each[0 if needed[0] else 1:]) + (sum(each) if needed[1] else 0))

    differentiable("tiny_mlp", op, wanted=[0, 1], selective=True)


def _products(widths: list[int]) -> list[int]:
    return [i * o for i, o in zip(widths[:-1], widths[1:], strict=True)]
