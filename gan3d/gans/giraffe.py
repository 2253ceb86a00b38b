"""GIRAFFE: Representing Scenes as Compositional Generative Neural Feature Fields (Niemeyer & Geiger, CVPR 2021).
arXiv 2011.12100

z → Scene (objects in their boxes, a background) and a camera → 16×16 rays → feature fields, of the objects inside their
boxes only → sum of densities, mean of features → volume rendering to 16×16 features → 2D upsampler → picture.

Follows the released code where it tells more than the paper. Departures, none of which changes the distribution of
pictures: z also decides the layout (the release draws it inside the generator), so a seed is a whole scene; background
rotation is drawn per image, not per batch; pictures outside training are deterministic (`noise_at_inference` brings the
release's evaluation back); images are in [−1, 1]. Transmittance is exp(−Σ density·delta) without the release's 1e-10.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from gan3d.cameras import Camera, Number
from gan3d.cost import Cost, count_flops
from gan3d.gans import Images, Verdict
from gan3d.nn.convolution import Conv2d
from gan3d.nn.encodings import encoding_width, positional_encoding
from gan3d.nn.mlp import Packing, RadianceWeights, packed_features
from gan3d.rays import Bounds, Patch, PixelGrid, Rays, camera_rays, full_grid
from gan3d.rendering import Field, points_along
from gan3d.sampling import LAST_DELTA, deltas, spread
from gan3d.volume import composite

BOX_MARGIN = 1.1  # released code: an object's density ends at 1.1 times its box
LEAST_CHANNELS = 32  # of the upsampler; released code


@dataclass(frozen=True)
class GiraffeImages(Images):
    """raw is the first RGB map of the upsampler, at 16×16. object_opacity is what the objects alone hide: the paper's
    alpha maps, in which the last sample does not close its ray."""

    object_opacity: Float[Tensor, "b hr wr"]


@dataclass(frozen=True)
class Scene:
    """All that is in a picture. To edit it use `dataclasses.replace`; any number n of objects can be shown together.

    scale, translation: half the box's sides and its centre, in scene units, z up. rotation: radians about +z, counter-
    clockwise from above (the release turns the points instead: its angles are ours negated). presence: 1, or 0 for an
    object that is not there; it multiplies the density. The background is turned about the origin.
    """

    shape: Float[Tensor, "b n zs"]
    appearance: Float[Tensor, "b n za"]
    scale: Float[Tensor, "b n 3"]
    translation: Float[Tensor, "b n 3"]
    rotation: Float[Tensor, "b n"]
    presence: Float[Tensor, "b n"]
    background_shape: Float[Tensor, "b zb"]
    background_appearance: Float[Tensor, "b zb"]
    background_rotation: Float[Tensor, " b"]


@dataclass(frozen=True)
class Layout:
    """The laws by which a training scene is arranged: numbers in [0, 1] → boxes.

    Args:
        objects: how many there are at most.
        scale: smallest and largest half sides; one number decides all three.
        translation: lowest and highest corner of where centres may be; uniform.
        rotation, background_rotation: range in degrees; uniform.
        counts: {objects: probability}, if not always all are there; which ones is drawn as well.
        apart: least distance between centres. Each object has `candidates` places and takes the first that is far
            enough from those before it; if none is, the farthest.
    """

    objects: int
    scale: Sequence[Sequence[Number]]
    translation: Sequence[Sequence[Number]]
    rotation: Sequence[Number]
    background_rotation: Sequence[Number]
    counts: Mapping[int, Number] | None = None
    apart: Number = 0.0
    candidates: int = 1

    def __post_init__(self):
        if self.counts is not None and not all(0 <= n <= self.objects for n in self.counts):
            raise ValueError(f"layout.counts speaks of {sorted(self.counts)} objects; there are at most {self.objects}")

    @property
    def splits(self) -> list[int]:
        """Numbers needed for scale, translation, rotation, who is there, how many are there, background rotation."""
        n = self.objects
        return [n, 3 * n * self.candidates, n, n, 1, 1]

    def arrange(self, u: Float[Tensor, "b m"]) -> dict[str, Tensor]:
        """The fields of a `Scene` that are no latents."""
        scale, place, rotation, order, count, background = u.split(self.splits, dim=-1)
        presence = torch.ones_like(scale)
        if self.counts is not None:
            chances = u.new_tensor(list(self.counts.values())).cumsum(0)
            drawn = torch.searchsorted(chances[:-1] / chances[-1], count.contiguous())
            many = torch.tensor(list(self.counts), device=u.device)[drawn]
            presence = (order.argsort(-1).argsort(-1) < many).to(u.dtype)
        return {"scale": between(self.scale, scale[..., None]),
                "translation": self.place(between(self.translation, place.unflatten(-1, (self.objects, -1, 3)))),
                "rotation": torch.deg2rad(between(self.rotation, rotation)), "presence": presence,
                "background_rotation": torch.deg2rad(between(self.background_rotation, background[:, 0]))}

    def place(self, tried: Float[Tensor, "b n k 3"]) -> Float[Tensor, "b n 3"]:
        """Of each object's k candidates one, so that the objects keep apart."""
        placed = tried[:, :1, 0]
        for mine in tried[:, 1:].unbind(1):
            distance = torch.cdist(mine, placed).amin(-1)
            free = distance >= self.apart
            choice = torch.where(free.any(-1), free.int().argmax(-1), distance.argmax(-1))
            placed = torch.cat([placed, mine.take_along_dim(choice[:, None, None], 1)], dim=1)
        return placed


def between(limits: Sequence[Number] | Sequence[Sequence[Number]], u: Tensor) -> Tensor:
    low, high = u.new_tensor(limits)
    return low + (high - low) * u


def rotation_z(angle: Float[Tensor, "*b"]) -> Float[Tensor, "*b 3 3"]:
    """Turns vectors counter-clockwise about +z."""
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one], dim=-1).unflatten(-1, (3, 3))


class FeatureField(nn.Module):
    """(γ(x), γ(d), z_shape, z_appearance) → density, feature (sec. 3.1, supplement). Objects share one, with latents
    each; the background has a smaller one.

    `ask` computes less than the equations say, to the same result: latents, directions and the skip's two linear layers
    are multiplied into weights and biases, and the last layer, being linear, is left for `features` of the sums along
    the rays.

    Args:
        width, depth: of the hidden layers. skip: the one after whose ReLU a linear function of encoded position and
            shape is added; None: nowhere.
        features: channels of the result.
        extent: positions and directions are divided by it before they are encoded: sin 2ᵏπx, cos 2ᵏπx.
    """

    def __init__(self, *, z_dim: int, width: int, depth: int, skip: int | None, position_octaves: int,
                 direction_octaves: int, features: int, extent: Number):
        super().__init__()
        if skip is not None and not 0 < skip < depth - 1:
            raise ValueError(f"skip must be a hidden layer but the first and the last, 1 to {depth - 2}; got {skip}")
        seen, lit = encoding_width(position_octaves) - 3, encoding_width(direction_octaves) - 3
        self.skip, self.width = skip, width
        self.encode = partial(encode, octaves=position_octaves, extent=extent)
        self.encode_direction = partial(encode, octaves=direction_octaves, extent=extent)
        self.position, self.shape = nn.Linear(seen, width), nn.Linear(z_dim, width)
        self.trunk = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        if skip is not None:
            self.position_skip, self.shape_skip = nn.Linear(seen, width), nn.Linear(z_dim, width)
        self.density = nn.Linear(width, 1)
        self.view, self.direction = nn.Linear(width, width), nn.Linear(lit, width)
        self.appearance, self.feature = nn.Linear(z_dim, width), nn.Linear(width, features)

    def ask(self, shape: Float[Tensor, "m z"], appearance: Float[Tensor, "m z"], points: Float[Tensor, "p 3"],
            directions: Float[Tensor, "m n 3"], packing: Packing, noise: Float[Tensor, " p"]
            ) -> tuple[Float[Tensor, " p"], Float[Tensor, "p w"]]:
        """Raw density with its noise, and what `features` takes. packing: of the points among m fields of n rays."""
        of_image = self.view.bias + self.appearance(appearance)
        bias = of_image[:, None] + self.direction(self.encode_direction(directions))
        return packed_features(points, bias.flatten(0, 1), noise, packing, self.fold(shape), self.encode)

    def fold(self, shape: Float[Tensor, "m z"]) -> RadianceWeights:
        """Everything that does not depend on the point, once for each of m fields."""
        weights = [self.position.weight, *(layer.weight for layer in self.trunk)]
        biases = [self.position.bias + self.shape(shape), *(layer.bias.expand(len(shape), -1) for layer in self.trunk)]
        skip, skip_to = None, -1
        if self.skip is not None:  # W(h + Px + Sz + b) = Wh + (WP)x + W(Sz + b)
            skip_to = self.skip + 1
            skip = weights[skip_to] @ self.position_skip.weight
            biases[skip_to] = biases[skip_to] + (self.shape_skip(shape) + self.position_skip.bias) @ weights[skip_to].T
        return RadianceWeights(tuple(weights), tuple(biases), skip, skip_to, self.density.weight, self.density.bias,
                               self.view.weight)

    def features(self, hidden: Float[Tensor, "*b w"], share: Float[Tensor, "*b"]) -> Float[Tensor, "*b c"]:
        """Σ weight·feature, of Σ weight·hidden and Σ weight."""
        return F.linear(hidden, self.feature.weight) + share[..., None] * self.feature.bias


def encode(x: Float[Tensor, "*b 3"], octaves: int, extent: Number) -> Float[Tensor, "*b e"]:
    """sin 2ᵏπx/extent, cos 2ᵏπx/extent for k < octaves, without x itself."""
    return positional_encoding(math.pi / extent * x, octaves)[..., 3:]


class Answers(NamedTuple):
    """What the fields say at the samples of `[b n s]`: the objects at some of them, the background everywhere."""

    place: Int[Tensor, " p"]  # which of the b·n·s samples; one that lies in two boxes comes twice
    density: Float[Tensor, " p"]
    hidden: Float[Tensor, "p w"]
    background: Float[Tensor, "b n s"]
    background_hidden: Float[Tensor, "b n s v"]

    def of_objects(self) -> Float[Tensor, "b n s"]:
        return torch.zeros_like(self.background).flatten().index_add(0, self.place, self.density).view_as(
            self.background)


class NeuralRenderer(nn.Module):
    """16×16 features → RGB logits (sec. 3.3, fig. 4). Features are doubled by nearest neighbours, each time before a
    3×3 convolution that halves the channels; RGB maps are added up from one size to the next.

    Args:
        features: channels that come in. size, resolution: side that comes in, and that goes out.
    """

    def __init__(self, *, features: int, size: int, resolution: int):
        super().__init__()
        blocks = (resolution // size).bit_length() - 1
        if blocks < 1 or resolution != size << blocks:
            raise ValueError(f"resolution must be render_resolution ({size}) times 2, 4, 8 …, got {resolution}")
        widths = [features, *(max(features >> block, LEAST_CHANNELS) for block in range(1, blocks + 1))]
        self.layers = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in zip(widths, widths[1:], strict=False))
        self.to_rgb = nn.ModuleList(nn.Conv2d(width, 3, 3, padding=1) for width in widths)

    def forward(self, features: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b 3 r r"], Float[Tensor, "b 3 h w"]]:
        """The picture, and its beginning at the size of the features; both before the sigmoid."""
        rgb = raw = self.to_rgb[0](features)
        for layer, to_rgb in zip(self.layers, self.to_rgb[1:], strict=True):  # type: ignore[arg-type]
            features = F.leaky_relu(convolve_doubled(features, layer.weight, layer.bias), 0.2)
            rgb = double(rgb) + to_rgb(features)
        return rgb, raw

    def flat(self, features: Float[Tensor, "*b c"]) -> Float[Tensor, "*b 3"]:
        """RGB logits where the same features fill the surroundings: every convolution becomes a matrix."""
        def matrix(conv, x):
            return F.linear(x, conv.weight.sum((2, 3)), conv.bias)

        rgb = matrix(self.to_rgb[0], features)
        for layer, to_rgb in zip(self.layers, self.to_rgb[1:], strict=True):  # type: ignore[arg-type]
            features = F.leaky_relu(matrix(layer, features), 0.2)
            rgb = rgb + matrix(to_rgb, features)
        return rgb


def convolve_doubled(x: Float[Tensor, "b c h w"], weight: Float[Tensor, "d c 3 3"], bias: Float[Tensor, " d"]
                     ) -> Float[Tensor, "b d hh ww"]:
    """A 3×3 convolution of x at twice its size by nearest neighbours.

    Four equal pixels meet the sums of their weights: a transposed 4×4 convolution, 16 products a pixel of x, not 36.
    """
    wide = F.pad(weight.flip(2, 3).transpose(0, 1), (1, 1, 1, 1))
    taps = wide[..., :-1, :] + wide[..., 1:, :]
    return F.conv_transpose2d(x, taps[..., :-1] + taps[..., 1:], bias, stride=2, padding=1)


def double(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c hh ww"]:
    """Twice the size: bilinear, then [1, 2, 1]/4 along both axes with the edges mirrored."""
    x = F.pad(F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False), (1, 1, 1, 1), mode="reflect")
    x = (x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]) / 4
    return (x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]) / 4


class DCDiscriminator(nn.Module):
    """4×4 convolutions of stride 2, each doubling the channels, down to a side of 4. Neither bias nor normalisation.

    Pictures in [−1, 1] are brought to the [0, 1] of the release. R1 differentiates by the former: its weight is 4 times
    the release's 10.

    Args:
        channels: at the side of 4.
    """

    def __init__(self, *, resolution: int, channels: int):
        super().__init__()
        if resolution < 8 or resolution & (resolution - 1):
            raise ValueError(f"resolution must be a power of two from 8 on, got {resolution}")
        self.resolution, halvings = resolution, resolution.bit_length() - 3
        widths = [3, *(max(1, channels >> level) for level in reversed(range(halvings)))]
        self.blocks = nn.ModuleList(Conv2d(i, o, 4, 2, 1, bias=False) for i, o in zip(widths, widths[1:], strict=False))
        self.verdict = Conv2d(channels, 1, 4, bias=False)

    def forward(self, images: Float[Tensor, "b 3 h w"], fade: float = 1.0, camera: Camera | None = None,
                raw: Tensor | None = None) -> Verdict:
        if images.shape[-2:] != (self.resolution, self.resolution):
            raise ValueError(f"expected pictures of side {self.resolution}, got {tuple(images.shape)}")
        hidden = (images + 1) / 2
        for conv in self.blocks:
            hidden = F.leaky_relu(conv(hidden), 0.2)
        return Verdict(self.verdict(hidden).flatten())


class GIRAFFE(nn.Module):
    """The generator (sec. 3).

    Args:
        bounds: near and far of the samples; planar for the release's cameras.
        layout: how training scenes are arranged.
        objects, background: the numbers of their `FeatureField`s, but for z_dim and features.
        z_dim_objects, z_dim_background: of shape, and of appearance.
        features: channels of what is volume rendered. resolution: side of the pictures; render_resolution: of the
            features.
        samples_per_ray: both ends included; jittered within their strata in training.
        density_noise: standard deviation of what training adds to raw densities, from beginning to end.
        noise_at_inference: noise and jitter outside training too, as the release computes its FID.
        pixel_grid: "corner" in the release.
    """

    def __init__(self, *, bounds: Bounds, layout: Layout, objects: Mapping, background: Mapping, z_dim_objects: int,
                 z_dim_background: int, features: int, resolution: int, render_resolution: int, samples_per_ray: int,
                 density_noise: Number, pixel_grid: PixelGrid, noise_at_inference: bool = False):
        super().__init__()
        self.bounds, self.layout, self.pixel_grid = bounds, layout, pixel_grid
        self.resolution, self.render_resolution, self.samples_per_ray = resolution, render_resolution, samples_per_ray
        self.density_noise, self.noise_at_inference = density_noise, noise_at_inference
        n = layout.objects
        self.z_dims = [n * z_dim_objects] * 2 + [z_dim_background] * 2 + [sum(layout.splits)]
        self.z_dim = sum(self.z_dims)
        self.objects = FeatureField(z_dim=z_dim_objects, features=features, **objects)
        self.background = FeatureField(z_dim=z_dim_background, features=features, **background)
        self.renderer = NeuralRenderer(features=features, size=render_resolution, resolution=resolution)

    def mapping(self, z: Float[Tensor, "b z"], camera_condition: Camera | None = None,
                truncation_psi: float = 1.0) -> Float[Tensor, "b z"]:
        """No network: latents are drawn towards the origin by `truncation_psi` (the authors' videos: 0.65), the layout
        stays as it is."""
        latents, layout = z.split([sum(self.z_dims[:-1]), self.z_dims[-1]], dim=-1)
        return torch.cat([truncation_psi * latents, layout], dim=-1)

    def scene(self, ws: Float[Tensor, "b z"]) -> Scene:
        """All in standard normals; the layout's become uniform, then follow its laws."""
        shape, appearance, background_shape, background_appearance, layout = ws.split(self.z_dims, dim=-1)
        each = (self.layout.objects, -1)
        return Scene(shape=shape.unflatten(-1, each), appearance=appearance.unflatten(-1, each),
                     background_shape=background_shape, background_appearance=background_appearance,
                     **self.layout.arrange(torch.special.ndtr(layout)))

    def prepare(self, ws: Float[Tensor, "b z"]) -> Scene:
        return self.scene(ws)

    def field(self, ws: Tensor | Scene) -> Field:
        """Objects and background together: summed density, which is never negative, and mean feature (sec. 3.2)."""
        scene = ws if isinstance(ws, Scene) else self.scene(ws)

        def ask(points: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
            found = self.ask(scene, points, directions[..., 0, :], random=False)
            density = found.of_objects() + found.background
            share = 1 / torch.where(density > 0, density, 1)
            of_objects = share.flatten()[found.place] * found.density
            features = self.background.features(
                (share * found.background)[..., None] * found.background_hidden, share * found.background)
            objects = self.objects.features(of_objects[:, None] * found.hidden, of_objects)
            return density, features.flatten(0, 2).index_add(0, found.place, objects).view_as(features)

        return ask

    def ask(self, scene: Scene, points: Float[Tensor, "b n s 3"], directions: Float[Tensor, "b n 3"], random: bool
            ) -> Answers:
        """The background everywhere, each object at the points within its box."""
        (b, n, s, _), dtype = points.shape, self.objects.density.weight.dtype
        points, directions = points.flatten(1, 2), directions.to(points)

        def noise(count: int) -> Tensor:
            zeros = torch.zeros(count, dtype=dtype, device=points.device)
            return self.density_noise * torch.randn_like(zeros) if random else zeros

        into = rotation_z(-scene.rotation.to(points)) / scene.scale.to(points)[..., None]  # [b k 3 3], world → box
        local = points[:, None] @ into.mT - (into @ scene.translation.to(points)[..., None]).mT  # [b k p 3]
        inside: Bool[Tensor, "b k p"] = (local.abs() <= BOX_MARGIN).all(-1) & (scene.presence != 0)[..., None]
        image, which, point = inside.nonzero(as_tuple=True)
        towards = F.normalize(directions[:, None] @ into.mT, dim=-1)
        packing = Packing(inside.sum(-1).flatten().tolist(), (image * inside.shape[1] + which) * n + point // s)
        density, hidden = self.objects.ask(
            scene.shape.flatten(0, 1), scene.appearance.flatten(0, 1), local[inside].to(dtype),
            towards.flatten(0, 1).to(dtype), packing, noise(len(point)))

        turn = rotation_z(-scene.background_rotation.to(points)).mT
        behind, behind_hidden = self.background.ask(
            scene.background_shape, scene.background_appearance, (points @ turn).flatten(0, 1).to(dtype),
            (directions @ turn).to(dtype), Packing([n * s] * b, s), noise(b * n * s))
        return Answers(image * (n * s) + point, density.relu() * scene.presence[image, which], hidden,
                       behind.relu().view(b, n, s), behind_hidden.view(b, n, s, -1))

    def synthesis(self, ws: Tensor | Scene, camera: Camera, resolution: int, patch: Patch | None = None
                  ) -> GiraffeImages:
        """Pictures of the one side that the upsampler has. Raises: ValueError for another one, or for a patch."""
        if patch is not None:
            raise ValueError("GIRAFFE draws whole pictures: set model.patch=null")
        if resolution != self.resolution:
            raise ValueError(f"this GIRAFFE draws pictures of side {self.resolution}, not {resolution}")
        scene, side = ws if isinstance(ws, Scene) else self.scene(ws), self.render_resolution
        with torch.autocast(scene.shape.device.type, enabled=False):
            features, depth, opacity, object_opacity = self.render(scene, self.rays(camera))
        square = (side, side)
        rgb, raw = self.renderer(features.mT.unflatten(-1, square))
        rgb, raw = (2 * image.float().sigmoid() - 1 for image in (rgb, raw))
        return GiraffeImages(rgb, raw, *(x.unflatten(-1, square) for x in (depth, opacity, object_opacity)))

    def rays(self, camera: Camera) -> Rays:
        """In float64 where there is such (Apple's GPUs have not): the encoding magnifies rounding 2⁹π/scale times."""
        exact = torch.float32 if camera.position.device.type == "mps" else torch.float64
        size = (self.render_resolution, self.render_resolution)
        return camera_rays(Camera(*(part.to(exact) for part in camera)),
                           full_grid(*size, camera.position.device).to(exact), self.bounds, size, self.pixel_grid)

    def render(self, scene: Scene, rays: Rays) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features `[b n c]`, depth, opacity and opacity of the objects alone `[b n]`."""
        random = self.training or self.noise_at_inference
        t = spread(rays, self.samples_per_ray, "strata" if random else "none")
        found = self.ask(scene, points_along(rays, t), rays.directions, random)
        t = t.to(found.density.dtype)
        of_objects = found.of_objects()
        density = of_objects + found.background
        weights = composite(density, deltas(t, LAST_DELTA))
        share = weights / torch.where(density > 0, density, 1)  # of a sample's feature, per unit of its field's density
        behind = share * found.background
        features = self.background.features((behind[..., None, :] @ found.background_hidden)[..., 0, :],
                                            behind.sum(-1))
        front = share.flatten()[found.place] * found.density
        ray = found.place // self.samples_per_ray
        sums = features.new_zeros(features.shape[0] * features.shape[1], self.objects.width).index_add(
            0, ray, front[:, None] * found.hidden)
        shares = sums.new_zeros(len(sums)).index_add(0, ray, front)
        features = features + self.objects.features(sums, shares).view_as(features)
        alone = composite(of_objects, deltas(t, 0.0)).sum(-1)
        return features, (weights * t).sum(-1), weights.sum(-1), alone

    def colour(self, ready: Tensor | Scene, features: Float[Tensor, "b n c"]) -> Float[Tensor, "b n 3"]:
        """rgb in [0, 1] of features: what the upsampler makes of a wall of them."""
        return self.renderer.flat(features).sigmoid()

    def regularizers(self, ready: Scene, camera: Camera, images: Images, step: int) -> dict[str, Tensor]:
        return {}

    def before_step(self, step: int) -> None:
        """Nothing is scheduled; the density noise stays."""

    def cost(self, resolution: int) -> Cost:
        """Samples per ray are those asked of a network: all of the background, and of each object what lies in a box
        of mean size on a ray through its middle. It is an upper limit: rays miss boxes, and features, counted
        everywhere, are computed only where something is."""
        rays, zeros = self.render_resolution**2, self.objects.density.weight.new_zeros
        box = 2 * BOX_MARGIN * torch.tensor(self.layout.scale).mean().item()
        share = min(1.0, box / (self.bounds.far - self.bounds.near))
        samples = {self.background: float(self.samples_per_ray),
                   self.objects: self.samples_per_ray * share * self.layout.objects}

        def ask(field: FeatureField, points: int) -> None:
            z, ray = zeros(1, field.shape.in_features), torch.arange(points, device=zeros(0).device) % rays
            field.ask(z, z, zeros(points, 3), zeros(1, rays, 3), Packing([points], ray), zeros(points) + 1e9)

        def once() -> None:
            for field in samples:
                ask(field, 0)
                field.features(zeros(rays, field.width), zeros(rays))
            self.renderer(zeros(1, self.objects.feature.out_features, *[self.render_resolution] * 2))

        fixed, total = count_flops(once), sum(samples.values())
        each = sum(count * (count_flops(partial(ask, field, 64)) - count_flops(partial(ask, field, 0))) / 64
                   for field, count in samples.items()) / total
        return Cost(rays, total, each, float(fixed))
