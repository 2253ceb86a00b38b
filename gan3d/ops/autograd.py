"""Derivatives of the compiled ops: the first one compiled too, the second one through the reference.

An op `f` comes with `f_backward`, compiled, whose arguments are the gradients of f's outputs followed by f's own
arguments. The derivative of `f_backward` is that of the reference's vector-Jacobian product, so R1, path length and
normals (create_graph=True) are right; the op alone would yield silent zeros.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def differentiable(name: str, reference: Callable[..., Any], wanted: Sequence[int],
                   selective: bool = False) -> None:
    """Registers the derivatives of `gan3d::<name>`, which returns a tensor or a tuple of tensors.

    Args:
        name: of the op; `gan3d::<name>_backward(grad of each output…, arguments…)` returns the gradients of the
            `wanted` arguments in their order (an empty tensor for one that was None).
        reference: the same function of the same arguments in plain PyTorch.
        wanted: positions of the differentiable arguments.
        selective: the backward op takes one more, last argument `bool[] needed`, one for each wanted argument, and may
            return an empty tensor where it is false: nobody pays for the gradient of points that are constants.
    """
    forward, backward = getattr(torch.ops.gan3d, name).default, getattr(torch.ops.gan3d, name + "_backward").default
    results = len(forward._schema.returns)
    count = len(forward._schema.arguments)

    def remember(ctx: Any, inputs: tuple) -> None:
        ctx.is_tensor = [isinstance(x, Tensor) for x in inputs]
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.save_for_backward(*[x for x in inputs if isinstance(x, Tensor)])

    def remembered(ctx: Any) -> list:
        saved = iter(ctx.saved_tensors)
        return [next(saved) if tensor else other for tensor, other in zip(ctx.is_tensor, ctx.others, strict=True)]

    def setup(ctx: Any, inputs: tuple, output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.shapes = [(x.shape, x.dtype, x.device) for x in outputs]
        remember(ctx, inputs)

    def pull(ctx: Any, *grads: Tensor | None) -> tuple:
        inputs = remembered(ctx)
        given = [torch.zeros(shape, dtype=dtype, device=device) if g is None else g.contiguous()
                 for g, (shape, dtype, device) in zip(grads, ctx.shapes, strict=True)]
        extra = ([bool(ctx.needs_input_grad[p]) for p in wanted],) if selective else ()
        found = backward(*given, *inputs, *extra)
        found = found if isinstance(found, (tuple, list)) else (found,)
        out: list[Tensor | None] = [None] * count
        for position, gradient in zip(wanted, found, strict=True):
            if inputs[position] is not None and ctx.needs_input_grad[position]:
                out[position] = gradient
        return tuple(out)

    def setup_twice(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.needed = inputs[-1] if selective else [True] * len(wanted)
        remember(ctx, inputs)

    def pull_twice(ctx: Any, *grads: Tensor | None) -> tuple:
        saved = remembered(ctx)
        given, inputs = saved[:results], saved[results:results + count]
        with torch.enable_grad():
            moved = list(inputs)
            for position in wanted:
                if inputs[position] is not None:
                    moved[position] = inputs[position].detach().requires_grad_(True)
            leaves = [x.detach().requires_grad_(True) for x in given]
            again = _vector_jacobian(reference, leaves, moved, wanted)
        sources = leaves + [moved[p] for p in wanted if inputs[p] is not None]
        pairs = [(a, g) for a, g, needed in zip(again, grads, ctx.needed, strict=True)
                 if needed and a is not None and g is not None and a.requires_grad]
        out: list[Tensor | None] = [None] * (results + count + selective)
        if not pairs:
            return tuple(out)
        found = list(torch.autograd.grad([a for a, _ in pairs], sources, [g for _, g in pairs], allow_unused=True))
        for i in range(results):
            out[i] = found.pop(0)
        for position in wanted:
            if inputs[position] is not None:
                out[results + position] = found.pop(0)
        return tuple(out)

    torch.library.register_autograd(f"gan3d::{name}", pull, setup_context=setup)
    torch.library.register_autograd(f"gan3d::{name}_backward", pull_twice, setup_context=setup_twice)


def _vector_jacobian(reference: Callable[..., Any], grads: Sequence[Tensor], inputs: Sequence[Any],
                     wanted: Sequence[int]) -> list[Tensor | None]:
    """Gradients of Σ grads·reference(inputs) in the wanted inputs, themselves differentiable."""
    outputs = reference(*inputs)
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
    asked = [p for p in wanted if inputs[p] is not None]
    found: list[Tensor | None] = [None] * len(asked)
    if pairs:
        found = list(torch.autograd.grad([o for o, _ in pairs], [inputs[p] for p in asked], [g for _, g in pairs],
                                         create_graph=True, allow_unused=True))
    gradients = iter(found)
    return [next(gradients) if inputs[p] is not None else None for p in wanted]


def shaped_like(inputs: Sequence[Tensor | None], needed: Sequence[bool]) -> tuple[Tensor, ...]:
    """What a selective backward op returns, in shape: for its fake. The first input is not None."""
    return tuple(torch.empty_like(x) if x is not None and wanted else inputs[0].new_empty(0)  # type: ignore[union-attr]
                 for x, wanted in zip(inputs, needed, strict=True))
