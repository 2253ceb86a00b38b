"""The NeRF MLP: ReLU layers, the input again at a skip, a density head, a colour branch that also sees its ray.

`radiance_mlp_plain` reads as the equations do: it is reference, fallback and second derivative. `radiance_mlp` computes
the same in blocks of points that stay in the processor's cache and remembers no activation: the backward pass computes
them again, block by block, but only for points whose gradient is not zero. Under a ReLU density those are the parts of
space that hold something, so less is recomputed than memory traffic is saved; memory does not grow with the network.
`packed_features` is the same network at points of which every image has its own number, without its last layer.

Source of the layout: NeRF (Mildenhall et al., ECCV 2020), fig. 7.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gan3d.nn.parallel import add_up, block_rows, share_out

Encode = Callable[[Tensor], Tensor]


class RadianceWeights(NamedTuple):
    """The MLP as it is evaluated: whatever is constant over an image (latents) or a ray already sits in a bias.

    trunk: `[c i]`, then `[c c]` for each further layer. biases: `[b c]` for each layer.
    skip: `[c i]`, the input's share of layer `skip_to`; None where the input is not fed again.
    density `[1 c]`, branch `[k c]` and colour `[3 k]` are the heads; the branch's bias is given per ray. Without a
    colour the branch, after its ReLU, is the result.
    """

    trunk: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    skip: Tensor | None
    skip_to: int
    density: Tensor
    density_bias: Tensor
    branch: Tensor
    colour: Tensor | None = None
    colour_bias: Tensor | None = None


class Packing(NamedTuple):
    """Whose a point is. counts: the points of each image, image after image. ray: for each point its row of the ray
    biases `[p]`; or how many consecutive points share one."""

    counts: Sequence[int]
    ray: Tensor | int

    def rays(self, rows: Tensor) -> Tensor:
        return rows // self.ray if isinstance(self.ray, int) else self.ray[rows]

    def blocks(self, size: int) -> list[tuple[int, slice]]:
        """(image, rows) for blocks of at most `size` points."""
        return [(image, slice(row, min(row + size, stop))) for image, (start, stop) in enumerate(self._ends())
                for row in range(start, stop, size)]

    def active_blocks(self, active: Tensor, size: int) -> list[tuple[int, Tensor]]:
        """(image, indices of its active points) for blocks of at most `size` points."""
        return [(image, rows) for image, (start, stop) in enumerate(self._ends())
                for rows in (active[start:stop].nonzero()[:, 0] + start).split(size) if len(rows)]

    def _ends(self):
        return pairwise(accumulate(self.counts, initial=0))


def radiance_mlp_plain(
    inputs: Float[Tensor, "b p i"], ray_bias: Float[Tensor, "b n k"], weights: RadianceWeights
) -> tuple[Float[Tensor, "b p"], Float[Tensor, "b p 3"]]:
    """Raw density and raw colour of p points on n rays (p/n consecutive points each), as the equations read."""
    images, count, _ = inputs.shape
    packing = Packing([count] * images, count // ray_bias.shape[1])
    density, colour = _plain(inputs.flatten(0, 1), ray_bias.flatten(0, 1), None, packing, weights)
    return density.view(images, count), colour.view(images, count, -1)


def _plain(inputs: Float[Tensor, "p i"], ray_bias: Float[Tensor, "r k"], noise: Float[Tensor, " p"] | None,
           packing: Packing, weights: RadianceWeights) -> tuple[Tensor, Tensor]:
    counts, rows = torch.tensor(packing.counts, device=inputs.device), torch.arange(len(inputs), device=inputs.device)
    hidden = inputs
    for layer, (weight, bias) in enumerate(zip(weights.trunk, weights.biases, strict=True)):
        before = hidden @ weight.T + bias.repeat_interleave(counts, dim=0)
        if layer == weights.skip_to and weights.skip is not None:
            before = before + inputs @ weights.skip.T
        hidden = torch.relu(before)
    density = (hidden @ weights.density.T + weights.density_bias)[:, 0]
    features = torch.relu(hidden @ weights.branch.T + ray_bias.index_select(0, packing.rays(rows)))
    if weights.colour is not None:
        features = features @ weights.colour.T + weights.colour_bias
    if noise is not None:
        density = density + noise
        features = features * (density > 0)[:, None]
    return density, features


def radiance_mlp(
    points: Float[Tensor, "b p d"], ray_bias: Float[Tensor, "b n k"], weights: RadianceWeights, encode: Encode
) -> tuple[Float[Tensor, "b p"], Float[Tensor, "b p 3"]]:
    """`radiance_mlp_plain` of encode(points), fast and in bounded memory.

    Gradients go to the weights, biases and ray biases. Where the points need one as well (normals, pose refinement) the
    plain version runs; where the gradient itself is to be differentiated (create_graph) the plain version is
    differentiated. Autocast does not lower the precision.

    Args:
        encode: `[n d]` to `[n i]`, without parameters; it is asked block by block.
    """
    if points.requires_grad and torch.is_grad_enabled():
        return radiance_mlp_plain(encode(points), ray_bias, weights)
    images, count, _ = points.shape
    packing = Packing([count] * images, count // ray_bias.shape[1])
    density, colour = _apply(points.flatten(0, 1), ray_bias.flatten(0, 1), None, packing, weights, encode)
    return density.view(images, count), colour.view(images, count, -1)


def packed_features(
    points: Float[Tensor, "p d"], ray_bias: Float[Tensor, "r k"], noise: Float[Tensor, " p"], packing: Packing,
    weights: RadianceWeights, encode: Encode
) -> tuple[Float[Tensor, " p"], Float[Tensor, "p c"]]:
    """Raw density with its noise, and the features of the points that a ReLU lets through; the others' are zero.

    Points whose density is zero weigh nothing in a picture, so their branch is not computed; `weights` without a colour
    leave its last, linear layer to the sums along the rays. All else as in `radiance_mlp`.
    """
    if points.requires_grad and torch.is_grad_enabled():
        return _plain(encode(points), ray_bias, noise, packing, weights)
    return _apply(points, ray_bias, noise, packing, weights, encode)


def _apply(points, ray_bias, noise, packing: Packing, weights: RadianceWeights, encode: Encode):
    flat = [None if w is None else w.to(points.dtype) for w in _flatten(weights)]
    return _RadianceMLP.apply(points, ray_bias.to(points.dtype), noise, packing, encode, len(weights.trunk),
                              weights.skip_to, *flat)


class _RadianceMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, points, ray_bias, noise, packing, encode, layers, skip_to, *flat):
        ctx.save_for_backward(points, ray_bias, noise, *flat)
        ctx.packing, ctx.encode, ctx.layers, ctx.skip_to = packing, encode, layers, skip_to
        weights = _unflatten(flat, layers, skip_to)
        width, channels = len(weights.trunk[0]), len(weights.branch if weights.colour is None else weights.colour)
        size = block_rows(width, points)
        density = points.new_empty(len(points), 1)
        features = (points.new_empty if noise is None else points.new_zeros)(len(points), channels)

        def run(blocks: Sequence[tuple[int, slice]]) -> None:
            scratch = points.new_empty(2, min(size, len(points)), width)
            for image, block in blocks:
                turns = [scratch[layer % 2, : block.stop - block.start] for layer in range(layers)]
                hidden = _trunk(encode(points[block]), image, weights, out=turns)
                torch.addmm(weights.density_bias, hidden, weights.density.T, out=density[block])
                rows = torch.arange(block.start, block.stop, device=points.device)
                if noise is not None:
                    seen = density[block, 0].add_(noise[block]).gt(0).nonzero()[:, 0]
                    hidden, rows = hidden.index_select(0, seen), rows.index_select(0, seen)
                branch = _branch(hidden, ray_bias, packing.rays(rows), weights)
                features[rows] = branch if weights.colour is None else torch.addmm(  # out: autocast leaves it alone
                    weights.colour_bias, branch, weights.colour.T, out=branch.new_empty(len(rows), channels))

        share_out(run, packing.blocks(size), points.device)
        return density[:, 0], features

    @staticmethod
    def backward(ctx, grad_density, grad_features):
        points, ray_bias, noise, *flat = ctx.saved_tensors
        weights = _unflatten(flat, ctx.layers, ctx.skip_to)
        if torch.is_grad_enabled():  # create_graph: the gradient is to be differentiated
            return _plain_gradients(ctx, points, ray_bias, noise, weights, grad_density, grad_features)

        def run(blocks: Sequence[tuple[int, Tensor]]) -> list[Tensor | None]:
            """Gradients of the ray biases and of `flat`, as far as these blocks contribute."""
            grads = _unflatten([None if w is None else torch.zeros_like(w) for w in flat], ctx.layers, ctx.skip_to)
            grad_ray = torch.zeros_like(ray_bias)
            for image, rows in blocks:
                ray, inputs = ctx.packing.rays(rows), ctx.encode(points.index_select(0, rows))
                hidden = inputs.new_empty(ctx.layers, len(rows), weights.density.shape[1]).unbind()
                _trunk(inputs, image, weights, out=hidden)
                branch = _branch(hidden[-1], ray_bias, ray, weights)
                pulls = grad_density[rows, None], grad_features.index_select(0, rows)
                grad_branch, grad_hidden = _pull_heads(*pulls, hidden[-1], branch, weights, grads)
                grad_ray.index_add_(0, ray, grad_branch)
                _pull_trunk(grad_hidden, inputs, hidden, image, weights, grads)
            return [grad_ray, *_flatten(grads)]

        active = (grad_density != 0) | grad_features.any(-1)
        blocks = ctx.packing.active_blocks(active, block_rows(weights.density.shape[1], points))
        grad_rays, *grads = add_up(share_out(run, blocks, points.device))
        return None, grad_rays, None, None, None, None, None, *grads


def _flatten(weights: RadianceWeights) -> tuple[Tensor | None, ...]:
    return (*weights.trunk, *weights.biases, weights.skip, weights.density, weights.density_bias, weights.branch,
            weights.colour, weights.colour_bias)


def _unflatten(flat: Sequence[Tensor | None], layers: int, skip_to: int) -> RadianceWeights:
    skip, *heads = flat[2 * layers :]
    return RadianceWeights(tuple(flat[:layers]), tuple(flat[layers : 2 * layers]), skip, skip_to, *heads)


def _trunk(inputs: Float[Tensor, "p i"], image: int, weights: RadianceWeights, out: Sequence[Tensor]) -> Tensor:
    """The hidden layers at one image's points, each written to its tensor of `out` (two may take turns); the last."""
    hidden = inputs
    for layer, (weight, bias) in enumerate(zip(weights.trunk, weights.biases, strict=True)):
        torch.addmm(bias[image], hidden, weight.T, out=out[layer])
        if layer == weights.skip_to and weights.skip is not None:
            add_product(out[layer], inputs, weights.skip.T)
        hidden = out[layer].relu_()
    return hidden


def _branch(hidden: Float[Tensor, "p c"], ray_bias: Float[Tensor, "r k"], ray: Int[Tensor, " p"],
            weights: RadianceWeights) -> Float[Tensor, "p k"]:
    return add_product(ray_bias.index_select(0, ray), hidden, weights.branch.T).relu_()


def _pull_heads(grad_density, grad_features, hidden, branch, weights: RadianceWeights, grads: RadianceWeights):
    """Adds the heads' gradients to `grads`; returns those before the branch's ReLU and of the last hidden layer."""
    grad_branch = grad_features
    if weights.colour is not None:
        add_product(grads.colour, grad_features.T, branch)  # type: ignore[arg-type]
        grads.colour_bias.add_(grad_features.sum(0))  # type: ignore[union-attr]
        grad_branch = grad_features @ weights.colour
    grad_branch = _through_relu(grad_branch, branch)
    add_product(grads.branch, grad_branch.T, hidden)
    add_product(grads.density, grad_density.T, hidden)
    grads.density_bias.add_(grad_density.sum(0))
    return grad_branch, add_product(grad_density @ weights.density, grad_branch, weights.branch)


def _pull_trunk(grad, inputs, hidden, image: int, weights: RadianceWeights, grads: RadianceWeights) -> None:
    """Adds the hidden layers' gradients to `grads`, last layer first; the inputs get none."""
    for layer in reversed(range(len(hidden))):
        grad = _through_relu(grad, hidden[layer])
        grads.biases[layer][image].add_(grad.sum(0))
        add_product(grads.trunk[layer], grad.T, hidden[layer - 1] if layer else inputs)
        if layer == weights.skip_to and weights.skip is not None:
            add_product(grads.skip, grad.T, inputs)
        if layer:
            grad = grad @ weights.trunk[layer]


def add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total += left @ right; written so that `count_flops` sees it, which overlooks addmm_."""
    return torch.addmm(total, left, right, out=total)


def _through_relu(grad: Tensor, output: Tensor) -> Tensor:
    """The gradient before a ReLU, in place of `grad`; where the ReLU's output is positive, so was its input."""
    return torch.ops.aten.threshold_backward.grad_input(grad, output, 0, grad_input=grad)


def _plain_gradients(ctx, points, ray_bias, noise, weights: RadianceWeights, grad_density, grad_features):
    """The gradients as a function of everything, differentiable in turn: those of the plain version."""
    arguments = (points, ray_bias, noise, None, None, None, None, *_flatten(weights))
    wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
    outputs = _plain(ctx.encode(points), ray_bias, noise, ctx.packing, weights)
    found = torch.autograd.grad(outputs, [arguments[i] for i in wanted], (grad_density, grad_features),
                                create_graph=True, allow_unused=True)
    result = [None] * len(arguments)
    for i, gradient in zip(wanted, found, strict=True):
        result[i] = gradient
    return tuple(result)
