"""GRAM: Generative Radiance Manifolds (Deng et al., CVPR 2022). arXiv 2112.08867

A small MLP s(x), the same for all objects of a class, has level sets: the manifolds. A ray meets each of them once.

z → mapping → ws (a frequency and a phase for every sine) ──┐
camera → rays → where they meet the manifolds (crossings) → FiLM-SIREN there, and nowhere else → alpha compositing

Follows the released code. Departures, both off as the paper has it: raw density may be multiplied (`density_gain`), and
rays that miss the data's box meet nothing. Depth is Σ weight·t, as everywhere here, not divided by the opacity.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from gan3d.cameras import Camera, Number, condition
from gan3d.cost import Cost, count_flops
from gan3d.gans import Images, as_pictures
from gan3d.nn.parallel import active_blocks, add_up, all_blocks, block_rows, share_out
from gan3d.nn.siren import MappingNetwork, film_layers, fold, init_linear, num_modulations, sine_stack
from gan3d.rays import Bounds, Patch, PixelGrid, Rays, picture_rays
from gan3d.rendering import Field, points_along
from gan3d.sampling import spread
from gan3d.volume import Rendering, accumulate, composite

STEEP = 0.05  # released code: where s changes by less within an interval, the crossing is its far end
WIDER = 0.001  # colours are sigmoids stretched by so much at both ends, so that 0 and 1 can be reached (released code)
REMEMBERED_BYTES = 1 << 28  # of crossings of cameras seen before
RAYS_PER_BLOCK = 256  # of the search for intervals: its comparisons stay in the cache


class ManifoldPredictor(nn.Module):
    """s(x), whose level sets are the manifolds. Sec. 3.2. At first s ≈ 10·|scale·x − center| − radius: spheres.

    Args:
        width, depth: of the ReLU MLP, `depth` hidden layers.
        scale, center: it sees scale·x − center; scale is a number, or one for each axis (then ellipsoids).
        radius: of the sphere s = 0 at the start, times 10.
    """

    scale: Tensor
    center: Tensor

    def __init__(self, *, width: int, depth: int, scale: Number | Sequence[Number], center: Sequence[Number],
                 radius: Number):
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32), persistent=False)
        self.register_buffer("center", torch.tensor(center, dtype=torch.float32), persistent=False)
        self.layers = nn.ModuleList(nn.Linear(3 if k == 0 else width, width) for k in range(depth))
        self.output = nn.Linear(width, 1)
        for weight, bias in (layer.parameters() for layer in self.layers):
            nn.init.normal_(weight, 0, (2 / width) ** 0.5)
            nn.init.zeros_(bias)
        nn.init.constant_(self.output.weight, 10 * (torch.pi / width) ** 0.5)
        nn.init.constant_(self.output.bias, -radius)

    def forward(self, points: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b"]:
        """s anywhere, as its equation reads; in the precision of the weights."""
        with torch.autocast(points.device.type, enabled=False):
            return relu_network(points.reshape(-1, 3), self.weights()).view(points.shape[:-1])

    def along(self, points: Float[Tensor, "b n s 3"], hit: Bool[Tensor, "b n"]) -> Float[Tensor, "b n s"]:
        """The same on rays that `hit`, and 0 on others: fast, in bounded memory, without gradients to the points."""
        with torch.autocast(points.device.type, enabled=False):
            active = None if hit.all() else hit.repeat_interleave(points.shape[2], 1)
            return Blockwise.apply(points.flatten(1, 2), active, *self.weights()).view(points.shape[:-1])

    def weights(self) -> list[Tensor]:
        """Weight and bias of each layer; scale and center are folded into the first."""
        first, *others = self.layers
        bias = first.bias - first.weight @ self.center
        return [self.scale * first.weight, bias, *(p for layer in (*others, self.output) for p in layer.parameters())]


def relu_network(x: Float[Tensor, "p 3"], weights: Sequence[Tensor]) -> Float[Tensor, " p"]:
    *hidden, last = zip(weights[::2], weights[1::2], strict=True)
    for weight, bias in hidden:
        x = torch.addmm(bias, x, weight.T).relu_()
    return torch.addmm(last[1], x, last[0].T)[:, 0]


class Blockwise(torch.autograd.Function):
    """`relu_network` in blocks that stay in the cache, remembering nothing.

    The backward pass computes again those points whose gradient is not zero: the ends of the intervals in which a ray
    meets a manifold. So the search costs no gradient, yet the gradient is that of all samples.
    """

    @staticmethod
    def forward(ctx, points, active, *weights):
        ctx.save_for_backward(points, *weights)
        ctx.rows = block_rows(weights[0].shape[0], points)
        s = points.new_zeros(points.shape[:2])

        def run(blocks: Sequence[tuple[int, Tensor | slice]]) -> None:
            for image, index in blocks:
                s[image, index] = relu_network(points[image, index], weights)

        images, count, _ = points.shape
        blocks = [*(all_blocks(images, count, ctx.rows) if active is None else active_blocks(active, ctx.rows))]
        share_out(run, blocks, points.device)
        return s

    @staticmethod
    def backward(ctx, grad):
        points, *weights = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: the gradient is to be differentiated
            s = relu_network(points.flatten(0, 1), weights)
            return None, None, *torch.autograd.grad(s, weights, grad.flatten(), create_graph=True)

        def run(blocks: Sequence[tuple[int, Tensor]]) -> list[Tensor | None]:
            total: list[Tensor | None] = [torch.zeros_like(w) for w in weights]
            for image, index in blocks:
                leaves = [w.detach().requires_grad_() for w in weights]
                with torch.enable_grad():
                    s = relu_network(points[image, index], leaves)
                add_up([total, list(torch.autograd.grad(s, leaves, grad[image, index]))])
            return total

        return None, None, *add_up(share_out(run, active_blocks(grad != 0, ctx.rows), points.device))


@torch.no_grad()
def first_falls(
    s: Float[Tensor, "b n s"], levels: Float[Tensor, " l"]
) -> tuple[Int[Tensor, "b n l"], Bool[Tensor, "b n l"]]:
    """The first interval [i, i+1], from the camera, in which s falls through each level; and whether there is one.

    Where there is none, the interval is the last. Rays that enter a manifold count, those that leave it do not.
    """
    rays, samples = s.flatten(0, 1), s.shape[-1]
    index = torch.empty(len(rays), len(levels), dtype=torch.int64, device=s.device)
    found = torch.empty(len(rays), len(levels), dtype=torch.bool, device=s.device)
    place = torch.arange(samples - 1, 0, -1, device=s.device, dtype=torch.int16)[:, None, None]  # the first is largest

    def run(blocks: Sequence[tuple[int, slice]]) -> None:
        for _, part in blocks:
            block = rays[part].T.contiguous()  # [s r]
            falls = (block[:-1, None] >= levels[:, None]) & (block[1:, None] <= levels[:, None])  # [s-1 l r]
            first = (falls * place).amax(0).T
            found[part] = first > 0
            index[part] = (samples - 1 - first).clamp(max=samples - 2)

    rows = RAYS_PER_BLOCK if s.device.type == "cpu" else 64 * RAYS_PER_BLOCK
    share_out(run, all_blocks(1, len(rays), rows), s.device)
    return index.view(*s.shape[:-1], -1), found.view(*s.shape[:-1], -1)


class Found(NamedTuple):
    """Crossings without the rays: what does not change while the camera is still."""

    t: Tensor  # [b n k]
    valid: Tensor  # [b n k]
    surface: Tensor  # [b n k]


@dataclass(frozen=True)
class Crossings:
    """Where each ray meets each manifold, near to far. What is not `valid` lies at the ray's far end and is nothing."""

    points: Float[Tensor, "b n k 3"]
    t: Float[Tensor, "b n k"]
    valid: Bool[Tensor, "b n k"]
    surface: Int[Tensor, "b n k"]  # which manifold: 0 has the highest level; a background plane is the last


class StillCameras:
    """What was found for cameras seen before, for as long as the predictor's numbers are the same.

    It compares the numbers themselves: whoever changes them, by whatever means, is noticed.
    """

    def __init__(self) -> None:
        self.numbers: list[Tensor] = []
        self.known: dict[tuple, Found] = {}

    def of(self, predictor: nn.Module) -> dict[tuple, Found]:
        numbers = [p.detach() for p in predictor.parameters()]
        same = len(numbers) == len(self.numbers) and all(
            a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)
            for a, b in zip(numbers, self.numbers, strict=True))
        if not same:
            self.numbers, self.known = [p.clone() for p in numbers], {}
        return self.known

    def shrink(self) -> None:
        """Forget the oldest, down to `REMEMBERED_BYTES`."""
        sizes = {view: sum(value.nbytes for value in found) for view, found in self.known.items()}
        excess = sum(sizes.values()) - REMEMBERED_BYTES
        for view, size in sizes.items():
            if excess <= 0:
                return
            del self.known[view]
            excess -= size


class RadianceField(nn.Module):
    """Points and directions → raw density and colour, modulated by ws. Sec. 3.3.

    π-GAN's SIREN, but each sine layer behind the first has heads of its own, and their outputs are summed: density of
    the layers 1 … depth−1, colour of the same, where the layer that sees the direction stands in for the last.
    """

    def __init__(self, *, width: int, depth: int, point_scale: Number):
        super().__init__()
        self.depth, self.point_scale = depth, point_scale
        self.num_modulations = num_modulations(width, depth)
        self.layers, self.colour_layer = film_layers(width, depth)
        self.density_heads = nn.ModuleList(nn.Linear(width, 1) for _ in range(depth - 1))
        self.colour_heads = nn.ModuleList(nn.Linear(width, 3) for _ in range(depth - 1))
        init_linear((*self.density_heads, *self.colour_heads))

    def forward(
        self, points: Float[Tensor, "b n s 3"], directions: Float[Tensor, "b n 1 3"], ws: Float[Tensor, "b m"],
        active: Bool[Tensor, "b n s"] | None = None,
    ) -> tuple[Float[Tensor, "b n s"], Float[Tensor, "b n s 3"]]:
        """raw density (softplus gives the density) and colour. Points that are not `active` cost nothing.

        Always in the precision of the weights, whatever autocast says: the sines' arguments reach tens of radians.
        """
        with torch.autocast(points.device.type, enabled=False):
            (density, d_bias), (colour, c_bias) = stacked(self.density_heads), stacked(self.colour_heads)
            density = torch.cat([density, torch.zeros_like(density[:1])])  # none of the layer that sees the direction,
            colour = torch.cat([colour[:-1], torch.zeros_like(colour[:1]), colour[-1:]])  # which gives the last colour
            heads = torch.cat([density, colour], 1)  # [depth 4 w]
            out = sine_stack(points, *fold(self.layers, self.colour_layer, self.point_scale, directions, ws), heads,
                             tuple(range(1, self.depth + 1)), active) + torch.cat([d_bias, c_bias])
            return out[..., 0], torch.sigmoid(out[..., 1:]) * (1 + 2 * WIDER) - WIDER


def stacked(heads: nn.ModuleList) -> tuple[Float[Tensor, "h c w"], Float[Tensor, " c"]]:
    """The weights of heads whose outputs are summed, and their summed bias."""
    weights, biases = zip(*(head.parameters() for head in heads), strict=True)
    return torch.stack(weights), torch.stack(biases).sum(0)


class GRAM(nn.Module):
    """The generator. Numbers without a unit are GRAM's, sec. 4 and released configs.

    Args:
        bounds: near and far of the search along each ray; `background` white for CARLA; rays that miss an `aabb` are
            not searched.
        width, depth, point_scale: of the radiance field; positions are multiplied by point_scale first.
        mapping_width, mapping_depth: of the mapping network, without its output layer.
        predictor: arguments of `ManifoldPredictor`.
        num_manifolds: samples per ray; with a `plane`, that is one of them.
        first_level, last_level: of s, highest (nearest the camera) and lowest; the others evenly between.
        plane: world z of a plane behind all, which every ray ends in; None: none, for views from all around.
        search_samples: where s is asked along each ray to find the crossings, evenly from near to far.
        delta_alpha: length of ray that every crossing stands for: its opacity is 1 − e^(−density·delta).
        delta_final: the same for the last crossing and the plane; 1e10 closes the ray, without a plane: delta_alpha.
        pixel_grid: where in its pixel a ray starts; "corner" is GRAM's.
        density_gain: raw density is multiplied by it. 1: GRAM; small networks on short runs need more.
        last_back: light that passes all samples takes the last one's colour.
        lock_view_dependence: the colour layer always sees the direction (0, 0, −1).
    """

    background: Tensor | None
    levels: Tensor

    def __init__(
        self,
        *,
        bounds: Bounds,
        z_dim: int,
        width: int,
        depth: int,
        point_scale: Number,
        mapping_width: int,
        mapping_depth: int,
        predictor: Mapping,
        num_manifolds: int,
        first_level: Number,
        last_level: Number,
        plane: Number | None,
        search_samples: int,
        delta_alpha: Number,
        delta_final: Number,
        pixel_grid: PixelGrid,
        density_gain: Number = 1.0,
        last_back: bool = False,
        lock_view_dependence: bool = False,
    ):
        super().__init__()
        surfaces = num_manifolds - (plane is not None)
        if surfaces < 1 or first_level <= last_level:
            raise ValueError(f"levels must descend over at least one manifold: first_level={first_level}, last_level="
                             f"{last_level}, num_manifolds={num_manifolds}, of which the plane, if any, is one")
        if search_samples < 2:
            raise ValueError(f"search_samples must be at least 2, the ends of one interval; got {search_samples}")
        if plane is not None and bounds.aabb is not None:
            raise ValueError("a plane behind all ends every ray, a box (bounds.aabb) skips those that miss it: set "
                             "model.generator.plane or data.bounds.aabb to null")
        self.bounds, self.z_dim, self.pixel_grid = bounds, z_dim, pixel_grid
        self.num_manifolds, self.plane, self.search_samples = num_manifolds, plane, search_samples
        self.delta_alpha, self.delta_final, self.density_gain = delta_alpha, delta_final, density_gain
        self.last_back, self.lock_view_dependence = last_back, lock_view_dependence
        background = None if bounds.background is None else torch.tensor(bounds.background, dtype=torch.float32)
        self.register_buffer("background", background, persistent=False)
        self.register_buffer("levels", torch.linspace(first_level, last_level, surfaces), persistent=False)
        self.manifolds = ManifoldPredictor(**predictor)
        self.radiance = RadianceField(width=width, depth=depth, point_scale=point_scale)
        self.mapping_network = MappingNetwork(z_dim=z_dim, mapping_width=mapping_width, mapping_depth=mapping_depth,
                                              outputs=self.radiance.num_modulations)
        self.still = StillCameras()

    def mapping(
        self, z: Float[Tensor, "b z"], camera_condition: Camera | None = None, truncation_psi: Number = 1.0
    ) -> Float[Tensor, "b m"]:
        """All raw frequencies, then all phases. The camera is not looked at; z is a standard normal, not normalised."""
        return self.mapping_network.truncated(z, truncation_psi)

    def field(self, ws: Float[Tensor, "b m"]) -> Field:
        """raw density (softplus gives the density) and colour in [0, 1], anywhere, on and off the manifolds."""

        def ask(points: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
            return self._ask(ws, points, directions)

        return ask

    def _ask(self, ws: Tensor, points: Tensor, directions: Tensor, active: Tensor | None = None):
        if self.lock_view_dependence:
            directions = torch.zeros_like(directions)
            directions[..., 2] = -1
        raw_density, rgb = self.radiance(points, directions, ws, active)
        return self.density_gain * raw_density, rgb

    def prepare(self, ws: Tensor) -> Tensor:
        """Nothing of an identity is shared between views: ws. (What identities share in a view: `crossings`.)"""
        return ws

    def synthesis(
        self, ws: Float[Tensor, "b m"], camera: Camera, resolution: int, patch: Patch | None = None
    ) -> Images:
        """Pictures of side `resolution`, or the patch's pixels of such pictures."""
        rays = self.rays(camera, resolution, patch)
        seen = self._crossings(rays, camera, resolution, patch)
        raw_density, rgb = self._ask(ws, seen.points, rays.directions[..., None, :], seen.valid)
        rendering = self.composite(seen, raw_density, rgb)
        image, depth, opacity = as_pictures(rendering, resolution if patch is None else patch.size)
        return Images(image, image, depth, opacity)

    def rays(self, camera: Camera, resolution: int, patch: Patch | None = None) -> Rays:
        return picture_rays(camera, resolution, patch, self.bounds, self.pixel_grid)

    def crossings(self, camera: Camera, resolution: int, patch: Patch | None = None) -> Crossings:
        """Where the pixels' rays meet the manifolds. Sec. 3.2. Gradients reach the predictor through points and t.

        Manifolds belong to the class, not to the object: pictures through one camera share the search, and outside
        training it is remembered, so that further objects in a view that is known cost no search.
        """
        return self._crossings(self.rays(camera, resolution, patch), camera, resolution, patch)

    def _crossings(self, rays: Rays, camera: Camera, resolution: int, patch: Patch | None) -> Crossings:
        found = self.search(rays) if patch is not None else self._shared(
            rays, [(resolution, *view) for view in condition(camera).tolist()])
        return Crossings(points_along(rays, found.t), *found)

    def _shared(self, rays: Rays, views: list[tuple]) -> Found:
        """`search`, once for each of the views that differ."""
        remember = not (self.training or torch.is_grad_enabled())
        known = self.still.of(self.manifolds) if remember else {}
        new = [i for i, view in enumerate(views) if view not in known and view not in views[:i]]
        if new:
            found = self.search(Rays(rays.origins[new], rays.directions[new], rays.near[new], rays.far[new]))
            if len(new) == len(views) and not remember:
                return found
            for i, *one in zip(new, *found, strict=True):
                known[views[i]] = Found(*one)
        found = Found(*(torch.stack(parts) for parts in zip(*(known[view] for view in views), strict=True)))
        if remember:
            self.still.shrink()
        return found

    def search(self, rays: Rays) -> Found:
        """Each ray's first way into each manifold: s at even distances, then linear between two of them."""
        hit = rays.far > rays.near
        t = spread(rays, self.search_samples)
        s = self.manifolds.along(points_along(rays, t), hit)
        near, valid = first_falls(s.detach(), self.levels)
        (t_near, t_far), (s_near, s_far) = ((x.gather(-1, near), x.gather(-1, near + 1)) for x in (t, s))
        valid &= hit[..., None]
        fall = s_near - s_far
        steep = valid & (fall > STEEP)
        share = (s_near - self.levels) / torch.where(steep, fall, 1)
        t = torch.where(steep, t_near + share * (t_far - t_near), t_far)
        if self.plane is not None:
            behind = (self.plane - rays.origins[..., 2:]) / rays.directions[..., 2:]
            t, valid = torch.cat([t, behind], -1), F.pad(valid, (0, 1), value=True)
        order = t.detach().argsort(dim=-1, stable=True)
        return Found(t.gather(-1, order), valid.gather(-1, order), order.to(torch.int16))

    def composite(self, seen: Crossings, raw_density: Float[Tensor, "b n k"], rgb: Float[Tensor, "b n k 3"]
                  ) -> Rendering:
        """Alpha compositing: a manifold's opacity does not depend on the distance to the next. Sec. 3.3, eq. 4."""
        closes = seen.surface == self.num_manifolds - 1
        closes[..., -1] = True
        delta = torch.where(closes, self.delta_final, self.delta_alpha).to(raw_density)
        weights = composite(F.softplus(raw_density) * seen.valid, delta)
        if self.last_back:
            passed = 1 - weights.sum(-1, keepdim=True)
            weights = torch.cat([weights[..., :-1], weights[..., -1:] + passed], -1)
        return accumulate(weights, rgb, seen.t.detach(), self.background)

    def regularizers(self, ready: Tensor, camera: Camera, images: Images, step: int) -> dict[str, Tensor]:
        """None; the pose term belongs to the discriminator's heads."""
        return {}

    def before_step(self, step: int) -> None:
        """Nothing here changes with time."""

    def cost(self, resolution: int) -> Cost:
        """A sample is a manifold's crossing; its cost includes its share of the search along the ray."""
        weight, n, k = self.manifolds.output.weight, 4, self.num_manifolds
        ws, z = weight.new_zeros(1, self.radiance.num_modulations), weight.new_zeros(1, self.z_dim)
        points = weight.new_zeros(1, n, k, 3)
        ask, search = self.field(ws), weight.new_zeros(n * self.search_samples, 3)
        flops = count_flops(lambda: ask(points, points[:, :, :1])) + count_flops(lambda: self.manifolds(search))
        return Cost(resolution**2, float(k), flops / (n * k), float(count_flops(lambda: self.mapping(z))))
