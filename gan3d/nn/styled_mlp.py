"""A fully connected network whose weights differ by image: leaky ReLU layers under styles that are already folded in.

A modulated 1×1 convolution (StyleGAN2) of points is a matrix product with one matrix per image. `styled_mlp_plain`
reads as the equations do: it is reference, fallback and second derivative. `styled_mlp` computes the same in blocks of
points that stay in the processor's cache and remembers no activation: the backward pass computes them again, but only
for points whose gradient is not zero. Where a ReLU makes the density, that is about every second point.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from gan3d.nn.mlp import Encode, add_product
from gan3d.nn.parallel import active_blocks, add_up, all_blocks, block_rows, share_out

SLOPE = 0.2


class StyledWeights(NamedTuple):
    """The network of each image.

    trunk: `[b c i]`, then `[b c c]` for each further layer. biases: `[c]` for each layer.
    density `[b 1 c]` with its bias `[1]` is the head.
    """

    trunk: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    density: Tensor
    density_bias: Tensor


def styled_mlp_plain(inputs: Float[Tensor, "b p i"], weights: StyledWeights
                     ) -> tuple[Float[Tensor, "b p"], Float[Tensor, "b p c"]]:
    """Raw density and last hidden layer at p points, as the equations read."""
    hidden = inputs
    for weight, bias in zip(weights.trunk, weights.biases, strict=True):
        hidden = F.leaky_relu_(torch.baddbmm(bias, hidden, weight.mT), SLOPE)
    return torch.baddbmm(weights.density_bias, hidden, weights.density.mT)[..., 0], hidden


def styled_mlp(points: Float[Tensor, "b p d"], weights: StyledWeights, encode: Encode
               ) -> tuple[Float[Tensor, "b p"], Float[Tensor, "b p c"]]:
    """`styled_mlp_plain` of encode(points), fast and in bounded memory.

    Gradients go to the weights. Where the points need one as well (normals, pose refinement) the plain version runs;
    where the gradient itself is to be differentiated (path length) the plain version is differentiated.

    Args:
        encode: `[p d]` to `[p i]`, without parameters; it is asked block by block.
    """
    if points.requires_grad and torch.is_grad_enabled():
        return styled_mlp_plain(encode(points), weights)
    return _StyledMLP.apply(points, encode, len(weights.trunk), *_flatten(weights))


class _StyledMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, points, encode, layers, *flat):
        ctx.save_for_backward(points, *flat)
        ctx.encode, ctx.layers = encode, layers
        weights = _unflatten(flat, layers)
        images, count, _ = points.shape
        width = weights.density.shape[-1]
        block = block_rows(width, points)
        density, hidden = points.new_empty(images, count, 1), points.new_empty(images, count, width)

        def run(blocks: Sequence[tuple[int, slice]]) -> None:
            scratch = points.new_empty(2, min(block, count), width)
            for image, rows in blocks:
                turns = [scratch[layer % 2, : rows.stop - rows.start] for layer in range(layers - 1)]
                last = _trunk(encode(points[image, rows]), image, weights, [*turns, hidden[image, rows]])
                torch.addmm(weights.density_bias, last, weights.density[image].T, out=density[image, rows])

        share_out(run, all_blocks(images, count, block), points.device)
        return density[..., 0], hidden

    @staticmethod
    def backward(ctx, grad_density, grad_hidden):
        points, *flat = ctx.saved_tensors
        weights = _unflatten(flat, ctx.layers)
        if torch.is_grad_enabled():  # create_graph: the gradient is to be differentiated
            return _plain_gradients(ctx, points, weights, grad_density, grad_hidden)

        def run(blocks: Sequence[tuple[int, Tensor]]) -> list[Tensor]:
            grads = _unflatten([torch.zeros_like(w) for w in flat], ctx.layers)
            for image, rows in blocks:
                inputs = ctx.encode(points[image].index_select(0, rows))
                hidden = inputs.new_empty(ctx.layers, len(rows), weights.density.shape[-1]).unbind()
                _trunk(inputs, image, weights, hidden)
                pull = grad_density[image].index_select(0, rows)[:, None]
                add_product(grads.density[image], pull.T, hidden[-1])
                grads.density_bias.add_(pull.sum(0))
                grad = add_product(grad_hidden[image].index_select(0, rows), pull, weights.density[image])
                _pull_trunk(grad, inputs, hidden, image, weights, grads)
            return list(_flatten(grads))

        active = (grad_density != 0) | (grad_hidden != 0).any(-1)
        blocks = active_blocks(active, block_rows(weights.density.shape[-1], points))
        return None, None, None, *add_up(share_out(run, blocks, points.device))


def _flatten(weights: StyledWeights) -> tuple[Tensor, ...]:
    return (*weights.trunk, *weights.biases, weights.density, weights.density_bias)


def _unflatten(flat: Sequence[Tensor], layers: int) -> StyledWeights:
    return StyledWeights(tuple(flat[:layers]), tuple(flat[layers : 2 * layers]), *flat[2 * layers :])


def _trunk(inputs: Float[Tensor, "p i"], image: int, weights: StyledWeights, out: Sequence[Tensor]) -> Tensor:
    """The hidden layers at one image's points, each written to its tensor of `out` (two may take turns); the last."""
    hidden = inputs
    for weight, bias, place in zip(weights.trunk, weights.biases, out, strict=True):
        torch.addmm(bias, hidden, weight[image].T, out=place)
        hidden = F.leaky_relu_(place, SLOPE)
    return hidden


def _pull_trunk(grad, inputs, hidden, image: int, weights: StyledWeights, grads: StyledWeights) -> None:
    """Adds the hidden layers' gradients to `grads`, last layer first; the inputs get none."""
    for layer in reversed(range(len(hidden))):
        grad = torch.ops.aten.leaky_relu_backward.grad_input(grad, hidden[layer], SLOPE, True, grad_input=grad)
        grads.biases[layer].add_(grad.sum(0))
        add_product(grads.trunk[layer][image], grad.T, hidden[layer - 1] if layer else inputs)
        if layer:
            grad = grad @ weights.trunk[layer][image]


def _plain_gradients(ctx, points, weights: StyledWeights, grad_density, grad_hidden):
    """The gradients as a function of everything, differentiable in turn: those of `styled_mlp_plain`."""
    arguments = (points, None, None, *_flatten(weights))
    wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
    outputs = styled_mlp_plain(ctx.encode(points), weights)
    found = torch.autograd.grad(outputs, [arguments[i] for i in wanted], (grad_density, grad_hidden),
                                create_graph=True, allow_unused=True)
    result: list[Tensor | None] = [None] * len(arguments)
    for i, gradient in zip(wanted, found, strict=True):
        result[i] = gradient
    return tuple(result)
