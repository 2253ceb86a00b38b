"""FiLM-conditioned SIREN and its mapping network. pi-GAN (Chan et al., 2021), sec. 3.2 and supplement; GOF, GRAM.

ws ─ frequencies, phases ─ folded into one affine map per image and layer ─ sine_stack ─ raw density, colour

A FiLM layer sin(f ⊙ (W x + b) + p) equals sin((f ⊙ W) x + (f ⊙ b + p)): the modulation costs one small product per
image instead of two large ones per point, and what remains is a plain sine network whose weights differ by image.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from gan3d.cameras import Number
from gan3d.nn.mlp import add_product
from gan3d.nn.parallel import active_blocks, add_up, all_blocks, block_rows, per_device, share_out, size_of

FREQUENCY_SCALE, FREQUENCY_SHIFT = 15.0, 30.0  # frequency = 15·raw + 30 (released code; supp. of pi-GAN)
INIT_FREQUENCY = 25.0  # released code; SIREN itself has 30
LATENTS_IN_MEAN = 10_000  # released codes of pi-GAN, GOF and GRAM
KEPT_BYTES = {"cpu": 1 << 30, "cuda": 1 << 33}  # of activations that one call remembers for its gradient


class MappingNetwork(nn.Module):
    """z → `outputs` numbers: raw frequencies and phases. pi-GAN, supplement. As StyleGAN's, without its norms."""

    def __init__(self, *, z_dim: int, mapping_width: int, mapping_depth: int, outputs: int):
        super().__init__()
        sizes = [z_dim] + [mapping_width] * mapping_depth + [outputs]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True))
        for layer in self.layers:
            nn.init.kaiming_normal_(layer.weight, a=0.2)
        with torch.no_grad():
            self.layers[-1].weight.mul_(0.25)

    def hidden(self, z: Float[Tensor, "b z"]) -> Float[Tensor, "b w"]:
        x: Tensor = z
        for layer in self.layers[:-1]:
            x = F.leaky_relu(layer(x), 0.2)
        return x

    def forward(self, z: Float[Tensor, "b z"]) -> Float[Tensor, "b o"]:
        return self.layers[-1](self.hidden(z))

    def truncated(self, z: Float[Tensor, "b z"], psi: Number) -> Float[Tensor, "b o"]:
        """The output moved towards its mean, which is not remembered, so it is never stale. psi 1: not moved."""
        out = self(z)
        if psi == 1:
            return out
        mean = self.mean(LATENTS_IN_MEAN, torch.Generator().manual_seed(0))
        return mean + psi * (out - mean)

    def mean(self, n: int, generator: torch.Generator) -> Float[Tensor, "1 o"]:
        """Mean output over `n` latents. The last layer is affine, so it is applied once, to the mean of its inputs.

        The latents are drawn on the generator's device: a CPU generator gives the same mean everywhere.
        """
        first = self.layers[0].weight
        z = torch.randn(n, first.shape[1], generator=generator, device=generator.device).to(first)
        return self.layers[-1](self.hidden(z).mean(0, keepdim=True))


def film_layers(width: int, depth: int) -> tuple[nn.ModuleList, nn.Linear]:
    """The sine layers of a body, and the one behind them that also sees the direction, as the released codes start."""
    layers = nn.ModuleList(nn.Linear(3 if k == 0 else width, width) for k in range(depth))
    colour_layer = nn.Linear(3 + width, width)  # direction first
    nn.init.uniform_(layers[0].weight, -1 / 3, 1 / 3)
    init_linear((*layers[1:], colour_layer))
    return layers, colour_layer


def init_linear(layers: Iterable[nn.Linear]) -> None:
    """Initial weights of layers before and behind sines."""
    for layer in layers:
        bound = (6 / layer.in_features) ** 0.5 / INIT_FREQUENCY
        nn.init.uniform_(layer.weight, -bound, bound)


def num_modulations(width: int, depth: int) -> int:
    """Length of ws: a raw frequency and a phase for every unit of every sine layer."""
    return 2 * (depth + 1) * width


def fold(
    layers: nn.ModuleList, colour_layer: nn.Linear, point_scale: Number,
    directions: Float[Tensor, "b n 1 3"], ws: Float[Tensor, "b m"],
) -> tuple[Float[Tensor, "b w 3"], Float[Tensor, "b l w w"], Float[Tensor, "b l w"], Float[Tensor, "b n w"]]:
    """The sine network of each image: `first`, `hidden`, `bias` and `ray_bias` of `sine_stack`.

    ws: all raw frequencies, then all phases, layer by layer, the colour layer's last.
    """
    raw, phase = ws.to(colour_layer.weight).unflatten(-1, (2, len(layers) + 1, -1)).unbind(1)
    frequency = FREQUENCY_SCALE * raw + FREQUENCY_SHIFT  # [b l w]
    weight = torch.stack([layer.weight for layer in layers[1:]] + [colour_layer.weight[:, 3:]])
    bias = frequency * torch.stack([layer.bias for layer in (*layers, colour_layer)]) + phase
    first = frequency[:, 0, :, None] * (layers[0].weight * point_scale)
    turned = directions[:, :, 0] @ (frequency[:, -1, :, None] * colour_layer.weight[:, :3]).mT  # [b n w]
    return first, frequency[:, 1:, :, None] * weight, bias[:, :-1], turned + bias[:, -1:]


class FiLMSiren(nn.Module):
    """Points and directions → raw density and colour, modulated by ws. pi-GAN, sec. 3.2, fig. 3.

    Args:
        width, depth: of the body, `depth` sine layers; one more sees the direction and gives the colour.
        point_scale: positions are multiplied by it first (2/0.24 where the scene is a slab 0.24 wide).
    """

    def __init__(self, *, width: int, depth: int, point_scale: Number):
        super().__init__()
        self.depth, self.point_scale = depth, point_scale
        self.num_modulations = num_modulations(width, depth)
        self.layers, self.colour_layer = film_layers(width, depth)
        self.density_head, self.colour_head = nn.Linear(width, 1), nn.Linear(width, 3)
        init_linear((self.density_head, self.colour_head))

    def forward(
        self, points: Float[Tensor, "b n s 3"], directions: Float[Tensor, "b n 1 3"], ws: Float[Tensor, "b m"]
    ) -> tuple[Float[Tensor, "b n s"], Float[Tensor, "b n s 3"]]:
        """raw density (any sign) and colour in (0, 1). ws: all raw frequencies, then all phases, layer by layer.

        Always in the precision of the weights, whatever autocast says: the sines' arguments reach tens of radians.
        """
        with torch.autocast(points.device.type, enabled=False):
            heads = [F.pad(self.density_head.weight, (0, 0, 0, 3)), F.pad(self.colour_head.weight, (0, 0, 1, 0))]
            out = sine_stack(points, *fold(self.layers, self.colour_layer, self.point_scale, directions, ws),
                             torch.stack(heads), (self.depth - 1, self.depth))
            out = out + torch.cat([self.density_head.bias, self.colour_head.bias])
            return out[..., 0], torch.sigmoid(out[..., 1:])


def sine_stack(
    points: Float[Tensor, "b n s 3"],
    first: Float[Tensor, "b w 3"],
    hidden: Float[Tensor, "b l w w"],
    bias: Float[Tensor, "b l w"],
    ray_bias: Float[Tensor, "b n w"],
    heads: Float[Tensor, "h c w"],
    read: tuple[int, ...],
    active: Bool[Tensor, "b n s"] | None = None,
) -> Float[Tensor, "b n s c"]:
    """Σ over h of heads[h] · (output of sine layer read[h]), for a sine network whose weights differ by image.

    Layer 0 is sin(first x + bias[0]), layer k sin(hidden[k−1] x + bias[k]); the last, layer l, takes its bias per ray
    (n rays with s points each), which is where a viewing direction enters. `read` is ascending. Points that are not
    `active` cost nothing and give 0.

    Works in blocks that stay in the cache. For the gradient it remembers one tensor a layer, up to `KEPT_BYTES`, and
    computes again what did not fit. Second derivatives are those of `sine_stack_reference`.
    """
    given = (points, first, hidden, bias, ray_bias, heads)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    return SineStack.apply(*given, read, active, per_device(KEPT_BYTES, points) if wanted else 0)


def sine_stack_reference(points, first, hidden, bias, ray_bias, heads, read, active=None) -> Tensor:
    """`sine_stack` as its equation reads, differentiable any number of times."""
    b, n, s, _ = points.shape
    last, out = hidden.shape[1], points.new_zeros(b, n, s, heads.shape[1])
    x = points
    for k in range(last + 1):
        weight = first if k == 0 else hidden[:, k - 1]
        shift = ray_bias[:, :, None] if k == last else bias[:, k, None, None]
        x = torch.sin(torch.bmm(x.flatten(1, 2), weight.mT).unflatten(1, (n, s)) + shift)
        if k in read:
            out = out + x @ heads[read.index(k)].mT
    return out if active is None else torch.where(active[..., None], out, 0)


class Stack(NamedTuple):
    """The arguments of `sine_stack` with the points of an image in one row, and how a block of them is computed."""

    points: Tensor  # [b p 3]
    first: Tensor
    hidden: Tensor
    bias: Tensor
    ray_bias: Tensor
    heads: Tensor
    read: tuple[int, ...]

    def blocks(self, active: Tensor | None) -> list[tuple[int, Tensor | slice]]:
        images, count, _ = self.points.shape
        rows = block_rows(self.hidden.shape[-1], self.points)
        if active is None:
            return [*all_blocks(images, count, rows)]
        return [*active_blocks(active.flatten(1), rows)]

    def rays(self) -> Tensor:
        """Of each point, its ray."""
        count = self.points.shape[1]
        return torch.arange(count, device=self.points.device) // max(count // max(self.ray_bias.shape[1], 1), 1)

    def arguments(self, image: int, k: int, x: Tensor, ray: Tensor, out: Tensor) -> Tensor:
        """What layer k takes the sine of."""
        if k == self.hidden.shape[1]:
            torch.index_select(self.ray_bias[image], 0, ray, out=out)
            return add_product(out, x, self.hidden[image, k - 1].T)
        return torch.addmm(self.bias[image, k], x, (self.hidden[image, k - 1] if k else self.first[image]).T, out=out)


class SineStack(torch.autograd.Function):
    """`sine_stack` with gradients to everything, the points included."""

    @staticmethod
    def forward(ctx, points, first, hidden, bias, ray_bias, heads, read, active, budget):
        stack = Stack(points.flatten(1, 2), first, hidden, bias, ray_bias, heads, read)
        blocks, layers, width = stack.blocks(active), hidden.shape[1] + 1, hidden.shape[2]
        out, ray = points.new_zeros(*stack.points.shape[:2], heads.shape[1]), stack.rays()
        total = sum(size_of(index) for _, index in blocks) * layers * width * points.element_size()
        share = min(1.0, budget / max(total, 1))
        kept = [int((j + 1) * share) > int(j * share) for j in range(len(blocks))]  # evenly, for all threads alike

        def run(pieces: Sequence[tuple[tuple[int, Tensor | slice], bool]]) -> list[Tensor | None]:
            largest = max((size_of(index) for (_, index), _ in pieces), default=0)
            activation, scratch = points.new_empty(2, largest, width)
            kept = []
            for (image, index), keep in pieces:
                m, x, r = size_of(index), stack.points[image, index], ray[index]
                arguments = points.new_empty(layers, m, width) if keep else None
                block_out = points.new_zeros(m, heads.shape[1])
                for k in range(layers):
                    u = stack.arguments(image, k, x, r, scratch[:m] if arguments is None else arguments[k])
                    x = torch.sin(u, out=activation[:m])
                    if k in read:
                        add_product(block_out, x, heads[read.index(k)].T)
                out[image, index] = block_out
                kept.append(arguments)
            return kept

        remembered = [u for share in share_out(run, list(zip(blocks, kept, strict=True)), points.device) for u in share]
        ctx.read, ctx.active, ctx.kept = read, active, kept
        ctx.save_for_backward(points, first, hidden, bias, ray_bias, heads, *(u for u in remembered if u is not None))
        return out.unflatten(1, points.shape[1:3])

    @staticmethod
    def backward(ctx, grad):
        points, first, hidden, bias, ray_bias, heads, *remembered = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: the blocks below could not be differentiated again
            pull = torch.func.vjp(
                partial(sine_stack_reference, read=ctx.read, active=ctx.active),
                points, first, hidden, bias, ray_bias, heads)[1]
            return *pull(grad), None, None, None
        stack = Stack(points.flatten(1, 2), first, hidden, bias, ray_bias, heads, ctx.read)
        rest = iter(remembered)
        pieces = [(block, next(rest) if kept else None)
                  for block, kept in zip(stack.blocks(ctx.active), ctx.kept, strict=True)]
        grad_points = torch.zeros_like(stack.points) if ctx.needs_input_grad[0] else None
        run = partial(_pull, stack, grad.flatten(1, 2), grad_points)
        d_first, d_hidden, d_bias, d_ray_bias, d_heads = add_up(share_out(run, pieces, points.device))
        if grad_points is not None:
            grad_points = grad_points.view_as(points)
        return grad_points, d_first, d_hidden, d_bias, d_ray_bias, d_heads, None, None, None


def _pull(stack: Stack, grad, grad_points, pieces: Sequence[tuple[tuple[int, Tensor | slice], Tensor | None]]) -> list:
    """Gradients of first, hidden, bias, ray_bias and heads, block by block, from the top layer down."""
    points, first, hidden, bias, ray_bias, heads, read = stack
    last, width, rays = hidden.shape[1], hidden.shape[2], stack.rays()
    d_first, d_hidden, d_bias, d_ray_bias, d_heads = map(torch.zeros_like, (first, hidden, bias, ray_bias, heads))
    largest = max((size_of(index) for (_, index), _ in pieces), default=0)
    activation, slope, scratch = points.new_empty(3, largest, width)
    again = points.new_empty(last + 1, largest, width) if any(u is None for _, u in pieces) else None
    for (image, index), arguments in pieces:
        m, ray, g = size_of(index), rays[index], grad[image, index]
        h, du, dh = activation[:m], slope[:m], scratch[:m].zero_()
        if arguments is None:
            assert again is not None
            arguments, x = again[:, :m], points[image, index]
            for k in range(last + 1):
                x = torch.sin(stack.arguments(image, k, x, ray, arguments[k]), out=h)
        else:
            torch.sin(arguments[last], out=h)
        for k in range(last, -1, -1):
            if k in read:
                head = read.index(k)
                add_product(d_heads[head], g.T, h)
                add_product(dh, g, heads[head])
            torch.cos(arguments[k], out=du).mul_(dh)
            if k == last:
                d_ray_bias[image].index_add_(0, ray, du)
            else:
                d_bias[image, k] += du.sum(0)
            if k == 0:
                add_product(d_first[image], du.T, points[image, index])
                if grad_points is not None:
                    grad_points[image, index] = du @ first[image]
            else:
                torch.sin(arguments[k - 1], out=h)
                add_product(d_hidden[image, k - 1], du.T, h)
                torch.mm(du, hidden[image, k - 1], out=dh)
    return [d_first, d_hidden, d_bias, d_ray_bias, d_heads]
