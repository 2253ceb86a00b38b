"""FiLM-conditioned SIREN and its mapping network. pi-GAN (Chan et al., 2021), sec. 3.2 and supplement; GOF, GRAM.

ws ─ frequencies, phases ─ folded into one affine map per image and layer ─ sine_stack ─ raw density, colour

A FiLM layer sin(f ⊙ (W x + b) + p) equals sin((f ⊙ W) x + (f ⊙ b + p)): the modulation costs one small product per
image instead of two large ones per point, and what remains is a plain sine network whose weights differ by image.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from gan3d.cameras import Number
from gan3d.nn.parallel import share_out

FREQUENCY_SCALE, FREQUENCY_SHIFT = 15.0, 30.0  # frequency = 15·raw + 30 (released code; supp. of pi-GAN)
INIT_FREQUENCY = 25.0  # released code; SIREN itself has 30
CPU_BLOCK_BYTES = 768 << 10  # of a layer's activations: they stay in a core's cache; fewer starve the matrix product
DEVICE_BLOCK_BYTES = 1 << 28


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

    def mean(self, n: int, generator: torch.Generator) -> Float[Tensor, "1 o"]:
        """Mean output over `n` latents. The last layer is affine, so it is applied once, to the mean of its inputs.

        The latents are drawn on the generator's device: a CPU generator gives the same mean everywhere.
        """
        first = self.layers[0].weight
        z = torch.randn(n, first.shape[1], generator=generator, device=generator.device).to(first)
        return self.layers[-1](self.hidden(z).mean(0, keepdim=True))


class FiLMSiren(nn.Module):
    """Points and directions → raw density and colour, modulated by ws. pi-GAN, sec. 3.2, fig. 3.

    Args:
        width, depth: of the body, `depth` sine layers; one more sees the direction and gives the colour.
        point_scale: positions are multiplied by it first (2/0.24 where the scene is a slab 0.24 wide).
    """

    def __init__(self, *, width: int, depth: int, point_scale: Number):
        super().__init__()
        self.width, self.depth, self.point_scale = width, depth, point_scale
        self.layers = nn.ModuleList(nn.Linear(3 if k == 0 else width, width) for k in range(depth))
        self.density_head = nn.Linear(width, 1)
        self.colour_layer = nn.Linear(3 + width, width)  # direction first
        self.colour_head = nn.Linear(width, 3)
        nn.init.uniform_(self.layers[0].weight, -1 / 3, 1 / 3)
        for layer in (*self.layers[1:], self.density_head, self.colour_layer, self.colour_head):
            bound = (6 / layer.in_features) ** 0.5 / INIT_FREQUENCY
            nn.init.uniform_(layer.weight, -bound, bound)

    @property
    def num_modulations(self) -> int:
        """Length of ws: a raw frequency and a phase for every unit of every sine layer."""
        return 2 * (self.depth + 1) * self.width

    def forward(
        self, points: Float[Tensor, "b n s 3"], directions: Float[Tensor, "b n 1 3"], ws: Float[Tensor, "b m"]
    ) -> tuple[Float[Tensor, "b n s"], Float[Tensor, "b n s 3"]]:
        """raw density (any sign) and colour in (0, 1). ws: all raw frequencies, then all phases, layer by layer.

        Always in the precision of the weights, whatever autocast says: the sines' arguments reach tens of radians.
        """
        with torch.autocast(points.device.type, enabled=False):
            raw, phase = ws.to(self.density_head.weight).unflatten(-1, (2, self.depth + 1, self.width)).unbind(1)
            frequency = FREQUENCY_SCALE * raw + FREQUENCY_SHIFT  # [b l w]
            weight = torch.stack([layer.weight for layer in self.layers[1:]] + [self.colour_layer.weight[:, 3:]])
            bias = torch.stack([layer.bias for layer in (*self.layers, self.colour_layer)])
            bias = frequency * bias + phase
            first = frequency[:, 0, :, None] * (self.layers[0].weight * self.point_scale)
            turned = directions[:, :, 0] @ (frequency[:, -1, :, None] * self.colour_layer.weight[:, :3]).mT  # [b n w]
            heads = [F.pad(self.density_head.weight, (0, 0, 0, 3)), F.pad(self.colour_head.weight, (0, 0, 1, 0))]
            out = sine_stack(points, first, frequency[:, 1:, :, None] * weight, bias[:, :-1], turned + bias[:, -1:],
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
) -> Float[Tensor, "b n s c"]:
    """Σ over h of heads[h] · (output of sine layer read[h]), for a sine network whose weights differ by image.

    Layer 0 is sin(first x + bias[0]), layer k sin(hidden[k−1] x + bias[k]); the last, layer l, takes its bias per ray
    (n rays with s points each), which is where a viewing direction enters. `read` is ascending.

    Points that need no gradient take a path in blocks that fit the cache and keep one tensor per layer; others, and
    second derivatives, take `sine_stack_reference`.
    """
    if torch.is_grad_enabled() and points.requires_grad:
        return sine_stack_reference(points, first, hidden, bias, ray_bias, heads, read)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (first, hidden, bias, ray_bias, heads)):
        return SineStack.apply(points, first, hidden, bias, ray_bias, heads, read)
    return _forward(points, first, hidden, bias, ray_bias, heads, read, keep=None)


def sine_stack_reference(points, first, hidden, bias, ray_bias, heads, read) -> Tensor:
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
    return out


def _blocks(points: Tensor, width: int) -> list[tuple[int, int, int]]:
    """(image, first ray, end ray) of pieces whose activations stay in a core's cache; whole rays."""
    b, n, s, _ = points.shape
    rows = (CPU_BLOCK_BYTES if points.device.type == "cpu" else DEVICE_BLOCK_BYTES) // (points.element_size() * width)
    step = max(1, rows // s)
    return [(i, start, min(start + step, n)) for i in range(b) for start in range(0, n, step)]


def _forward(points, first, hidden, bias, ray_bias, heads, read, keep: list[Tensor] | None) -> Tensor:
    """The reference's value, block by block. `keep` collects the sines' arguments `[l+1 points w]` of every block."""
    b, n, s, _ = points.shape
    last, width = hidden.shape[1], hidden.shape[2]
    out = points.new_zeros(b, n, s, heads.shape[1])

    def run(blocks: Sequence[tuple[int, int, int]]) -> list[Tensor]:
        largest = max(((stop - start) * s for _, start, stop in blocks), default=0)
        activation, scratch = points.new_empty(2, largest, width)
        kept = []
        for i, start, stop in blocks:
            m = (stop - start) * s
            x, block_out = points[i, start:stop].reshape(m, 3), out[i, start:stop].view(m, -1)
            arguments = points.new_empty(last + 1, m, width) if keep is not None else None
            for k in range(last + 1):
                u = scratch[:m] if arguments is None else arguments[k]
                torch.mm(x, (first[i] if k == 0 else hidden[i, k - 1]).t(), out=u)
                if k == last:
                    u.view(stop - start, s, width).add_(ray_bias[i, start:stop, None])
                else:
                    u.add_(bias[i, k])
                x = torch.sin(u, out=activation[:m])
                if k in read:
                    torch.addmm(block_out, x, heads[read.index(k)].t(), out=block_out)
            if arguments is not None:
                kept.append(arguments)
        return kept

    shares = share_out(run, _blocks(points, width), points.device)
    if keep is not None:
        keep += [arguments for share in shares for arguments in share]
    return out


class SineStack(torch.autograd.Function):
    """`sine_stack` with gradients to all but the points. Keeps the sines' arguments, recomputes sine and cosine."""

    @staticmethod
    def forward(ctx, points, first, hidden, bias, ray_bias, heads, read):
        keep: list[Tensor] = []
        out = _forward(points, first, hidden, bias, ray_bias, heads, read, keep)
        ctx.read = read
        ctx.save_for_backward(points, first, hidden, bias, ray_bias, heads, *keep)
        return out

    @staticmethod
    def backward(ctx, grad):
        points, first, hidden, bias, ray_bias, heads, *keep = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: the blocks below could not be differentiated again
            pull = torch.func.vjp(
                lambda first, hidden, bias, ray_bias, heads: sine_stack_reference(
                    points, first, hidden, bias, ray_bias, heads, ctx.read),
                first, hidden, bias, ray_bias, heads)[1]
            return None, *pull(grad), None
        return None, *_backward(grad, points, first, hidden, ray_bias, heads, ctx.read, keep), None


def _backward(grad, points, first, hidden, ray_bias, heads, read, keep: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of first, hidden, bias, ray_bias and heads, block by block, from the top layer down."""
    s, last, width = points.shape[2], hidden.shape[1], hidden.shape[2]
    d_ray_bias = torch.zeros_like(ray_bias)

    def run(blocks: Sequence[tuple[tuple[int, int, int], Tensor]]) -> tuple[Tensor, ...]:
        d_first, d_hidden, d_heads = map(torch.zeros_like, (first, hidden, heads))
        d_bias = hidden.new_zeros(hidden.shape[:3])
        activation, slope, scratch = points.new_empty(3, max((u.shape[1] for _, u in blocks), default=0), width)
        for (i, start, stop), arguments in blocks:
            m = arguments.shape[1]
            g = grad[i, start:stop].reshape(m, -1)
            h, du, dh = activation[:m], slope[:m], scratch[:m].zero_()
            torch.sin(arguments[last], out=h)
            for k in range(last, -1, -1):
                if k in read:
                    head = read.index(k)
                    torch.addmm(d_heads[head], g.t(), h, out=d_heads[head])
                    torch.addmm(dh, g, heads[head], out=dh)
                torch.cos(arguments[k], out=du).mul_(dh)
                if k == last:
                    torch.sum(du.view(stop - start, s, width), 1, out=d_ray_bias[i, start:stop])
                else:
                    d_bias[i, k] += du.sum(0)
                if k == 0:
                    torch.addmm(d_first[i], du.t(), points[i, start:stop].reshape(m, 3), out=d_first[i])
                else:
                    torch.sin(arguments[k - 1], out=h)
                    torch.addmm(d_hidden[i, k - 1], du.t(), h, out=d_hidden[i, k - 1])
                    torch.mm(du, hidden[i, k - 1], out=dh)
        return d_first, d_hidden, d_bias, d_heads

    blocks = list(zip(_blocks(points, width), keep, strict=True))
    total, *others = share_out(run, blocks, points.device)
    for other in others:
        for mine, theirs in zip(total, other, strict=True):
            mine += theirs
    d_first, d_hidden, d_bias, d_heads = total
    return d_first, d_hidden, d_bias, d_ray_bias, d_heads


def official_siren(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of pi-GAN's and GOF's released generators → under ours (`mapping_network.`, `siren.`).

    Every name is used once; a missing or foreign one raises KeyError.
    """
    ours = {}
    for name, tensor in tensors.items():
        part, _, rest = name.removeprefix("siren.").partition(".")
        *_, kind = rest.split(".")
        if part == "mapping_network":  # mapping_network.network.6.weight: every second entry is an activation
            ours[f"mapping_network.layers.{int(rest.split('.')[1]) // 2}.{kind}"] = tensor
        elif part == "network":
            ours[f"siren.layers.{rest.split('.')[0]}.{kind}"] = tensor
        else:
            mine = {"final_layer": "density_head", "color_layer_sine": "colour_layer",
                    "color_layer_linear": "colour_head"}[part]
            ours[f"siren.{mine}.{kind}"] = tensor
    return ours


OFFICIAL_ORDER = [  # of the 30 tensors of a released EMA file: the order of the generator's parameters
    f"siren.{part}.{kind}"
    for part in [f"network.{k}.layer" for k in range(8)]
    + ["final_layer", "color_layer_sine.layer", "color_layer_linear.0"]
    + [f"mapping_network.network.{k}" for k in (0, 2, 4, 6)]
    for kind in ("weight", "bias")
]
