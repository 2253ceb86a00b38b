"""GIRAFFE against numbers of the released code and against its own equations; what may and may not change a scene."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gan3d.cameras import Camera, intrinsics_from_fov, look_at, sphere_point
from gan3d.checkpoints import load_official
from gan3d.gans.giraffe import GIRAFFE, DCDiscriminator, FeatureField, Layout, NeuralRenderer, Scene, double, encode
from gan3d.losses import R1
from gan3d.nn.mlp import Packing
from gan3d.official.giraffe import official_discriminator, official_generator
from gan3d.rays import Bounds, Patch
from gan3d.rendering import points_along
from gan3d.sampling import spread

FACE = Layout(objects=1, scale=[[0.21] * 3] * 2, translation=[[0, 0, 0]] * 2, rotation=[145, 215],
              background_rotation=[0, 0])
SMALL = {"position_octaves": 2, "direction_octaves": 1}


def released(resolution: int, features: int) -> GIRAFFE:
    octaves = {"position_octaves": 10, "direction_octaves": 4}
    return GIRAFFE(
        bounds=Bounds(0.5, 6, planar=True), layout=FACE,
        objects={"width": 128, "depth": 8, "skip": 4, "extent": 2} | octaves,
        background={"width": 64, "depth": 4, "skip": None, "extent": 12} | octaves, z_dim_objects=256,
        z_dim_background=128, features=features, resolution=resolution, render_resolution=16, samples_per_ray=64,
        density_noise=1, pixel_grid="corner").eval()


def tiny(seed: int = 0, **changes) -> GIRAFFE:
    torch.manual_seed(seed)
    numbers = dict(
        bounds=Bounds(0.5, 6, planar=True), layout=FACE,
        objects={"width": 8, "depth": 4, "skip": 2, "extent": 2} | SMALL,
        background={"width": 6, "depth": 2, "skip": None, "extent": 12} | SMALL, z_dim_objects=5, z_dim_background=4,
        features=7, resolution=8, render_resolution=4, samples_per_ray=40, density_noise=1, pixel_grid="corner")
    return GIRAFFE(**(numbers | changes)).eval()  # type: ignore[arg-type]


def camera(n: int = 1, fov: float = 10, azimuth: float = 0.0, dtype=torch.float32) -> Camera:
    """At the middle of the released faces' range of v, 0.4167 to 0.5."""
    polar = torch.tensor(math.acos(1 - 2 * 0.45835), dtype=torch.float64).expand(n)
    eye = sphere_point(torch.full((n,), azimuth, dtype=torch.float64), polar, 2.732)
    pose = look_at(eye, torch.zeros(3, dtype=torch.float64))
    return Camera(pose.to(dtype), intrinsics_from_fov(fov).to(dtype).expand(n, 3, 3))


def objects(n: int, b: int = 1, seed: int = 1, dtype=torch.float32, spread_out: float = 0.1) -> Scene:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    return Scene(normal(b, n, 5), normal(b, n, 5), 0.15 + 0.05 * torch.rand(b, n, 3, generator=g).to(dtype),
                 spread_out * normal(b, n, 3), normal(b, n), torch.ones(b, n, dtype=dtype), normal(b, 4), normal(b, 4),
                 normal(b))


def select(scene: Scene, index: list[int]) -> Scene:
    return dataclasses.replace(scene, **{name: getattr(scene, name)[:, index] for name in (
        "shape", "appearance", "scale", "translation", "rotation", "presence")})


def visible(generator: GIRAFFE, background: float | None = None) -> GIRAFFE:
    """With densities that can be seen. background: its constant density."""
    with torch.no_grad():
        generator.objects.density.weight.mul_(30)
        generator.background.density.weight.mul_(3 if background is None else 0)
        generator.background.density.bias.fill_(0.1 if background is None else background)
    return generator


# The released code's reference numbers. Every tensor is filled with numbers that depend on its place alone.


def fill(count: int, j: int) -> Tensor:
    x = 43758.5453 * np.sin(12.9898 * np.arange(count, dtype=np.float64) + 78.233 * j)
    return torch.from_numpy(2 * (x - np.floor(x)) - 1)


def filled(shapes: list[tuple[str, tuple[int, ...]]]) -> dict[str, Tensor]:
    def size(shape):
        return 0.05 if len(shape) == 1 else math.sqrt(6 / math.prod(shape[1:]))

    return {name: fill(math.prod(shape), j).view(shape) * size(shape) for j, (name, shape) in enumerate(shapes)}


def with_biases(weights: list[tuple[str, tuple[int, ...]]]) -> list[tuple[str, tuple[int, ...]]]:
    return [entry for name, shape in weights for entry in ((f"{name}.weight", shape), (f"{name}.bias", shape[:1]))]


def field_shapes(width: int, z: int, blocks: int, skip: bool, features: int):
    skips = [("fc_z_skips.0", (width, z)), ("fc_p_skips.0", (width, 60))] if skip else []
    return with_biases(
        [("fc_in", (width, 60)), ("fc_z", (width, z)), *((f"blocks.{i}", (width, width)) for i in range(blocks)),
         *skips, ("sigma_out", (1, width)), ("fc_z_view", (width, z)), ("feat_view", (width, width)),
         ("fc_view", (width, 24)), ("feat_out", (features, width))])


def renderer_shapes(widths: list[int]):
    layers = [(f"conv_layers.{i}", (o, c, 3, 3)) for i, (c, o) in enumerate(zip(widths, widths[1:], strict=False))]
    return with_biases(layers + [(f"conv_rgb.{i}", (3, c, 3, 3)) for i, c in enumerate(widths)])


def official_tensors(features: int, widths: list[int]) -> dict[str, Tensor]:
    """The state dict of a released generator, in its order."""
    parts = {"decoder": field_shapes(128, 256, 7, True, features),
             "background_generator": field_shapes(64, 128, 3, False, features),
             "neural_renderer": renderer_shapes(widths)}
    tensors = {f"{part}.{name}": value for part, shapes in parts.items() for name, value in filled(shapes).items()}
    return tensors | {"neural_renderer.upsample_rgb.1.f": torch.tensor([1.0, 2.0, 1.0])}


def official_judge(widths: list[int]) -> dict[str, Tensor]:
    blocks = [(f"blocks.{i}.weight", (o, c, 4, 4)) for i, (c, o) in enumerate(zip(widths, widths[1:], strict=False))]
    return filled([*blocks, ("conv_out.weight", (1, widths[-1], 4, 4))])


@pytest.fixture(scope="module")
def face() -> GIRAFFE:
    """The released 64² generator of faces."""
    generator = released(64, 128)
    generator.load_state_dict(official_generator(official_tensors(128, [128, 64, 32])))
    return generator


def test_encoding_is_the_released_one():
    found = encode(torch.tensor([0.3, -0.2, 0.7]), 10, 2)
    expected = [0.4539905, -0.3090170, 0.8910065, 0.8910065, 0.9510565, 0.4539905, 0.8090170, -0.5877853, 0.8090170]
    torch.testing.assert_close(found[:9], torch.tensor(expected), atol=1e-6, rtol=0)  # float32
    assert found.shape == (60,)


def test_rays_are_the_released_ones(face):
    assert torch.allclose(camera().position, torch.tensor([2.7225051, 0, 0.2275756]), atol=1e-6)
    rays, forward = face.rays(camera()), camera().camera_to_world[0, :3, 2].double()
    until_plane = rays.directions[0] / (rays.directions[0] @ forward)[:, None]  # the release's go to depth 1
    expected = [[-1.0038123, -0.0874887, 0.0038846], [-1.0028406, -0.0874887, -0.0077400],
                [-1.0038123, -0.0758235, 0.0038846]]
    theirs = until_plane[[0, 16, 1]]  # which run down the columns
    torch.testing.assert_close(theirs, torch.tensor(expected).double(), atol=2e-6, rtol=0)  # a camera in float32


def test_field_is_the_released_one():
    tensors = {f"decoder.{name}": value for name, value in filled(field_shapes(128, 256, 7, True, 128)).items()}
    field = FeatureField(z_dim=256, width=128, depth=8, skip=4, position_octaves=10, direction_octaves=4, features=128,
                         extent=2).double()
    field.load_state_dict({name.removeprefix("objects."): v for name, v in official_generator(tensors).items()})
    points = torch.tensor([[0.3, -0.2, 0.7], [-0.9, 0.5, -0.25]]).double()
    rays = F.normalize(torch.tensor([[0.6, 0, -0.8], [1, 2, 2]]).double(), dim=-1)
    noise = points.new_tensor([0.0, 1.0])  # the second density is negative: noise makes it seen
    density, hidden = field.ask(fill(256, 100)[None], fill(256, 101)[None], points, rays[None], Packing([2], 1), noise)
    torch.testing.assert_close(density, points.new_tensor([0.657695, -0.793699 + 1]), atol=1e-6, rtol=0)
    feature = field.features(hidden, torch.ones_like(density))
    expected = [[-3.073080, 0.554076, -1.230480], [-4.166971, 0.813949, -0.737129]]
    torch.testing.assert_close(feature[:, :3], points.new_tensor(expected), atol=1e-6, rtol=0)  # float64


@pytest.mark.smoke
def test_picture_is_the_released_one(face):
    """Given in float32, of weights so large that the encoding's rounding shows: 1e-3."""
    r = 0.40278 + 0.25 * (0.59722 - 0.40278)
    latents = [fill(256, 100)[None, None], fill(256, 101)[None, None], fill(128, 102)[None], fill(128, 103)[None]]
    shape, appearance, behind_shape, behind_appearance = (latent.float() for latent in latents)
    scene = Scene(shape, appearance, torch.full((1, 1, 3), 0.21), torch.zeros(1, 1, 3),
                  torch.full((1, 1), -2 * math.pi * r), torch.ones(1, 1), behind_shape, behind_appearance,
                  torch.zeros(1))
    with torch.no_grad():
        features = face.render(scene, face.rays(camera()))[0].mT.unflatten(-1, (16, 16))[0]
        images = face.synthesis(scene, camera(), 64)
    rgb, alpha = (images.rgb[0] + 1) / 2, images.object_opacity[0]
    for found, expected in (
            (features[:3, 0, 0], [2.28581, 2.15464, 0.22762]), (features[:3, 8, 5], [1.75416, 1.12856, -0.49929]),
            (rgb[:, 0, 0], [0.47226, 0.13263, 0.92735]), (rgb[:, 20, 41], [0.73304, 0.00547, 0.99336]),
            (torch.stack([rgb.mean(), alpha.mean(), alpha[8, 5]]), [0.53389, 0.16492, 0.12636])):
        torch.testing.assert_close(found, torch.tensor(expected), atol=1e-3, rtol=0)


def test_renderer_is_the_released_one(face):
    features = fill(2 * 128 * 256, 104).float().view(2, 128, 16, 16)
    with torch.no_grad():
        rgb = face.renderer(features)[0].sigmoid()
    assert torch.allclose(rgb[0, :, 0, 0], torch.tensor([0.37430, 0.44267, 0.64478]), atol=1e-4)  # five digits given
    assert torch.allclose(rgb[1, :, 30, 17], torch.tensor([0.46772, 0.75404, 0.14547]), atol=1e-4)


def test_rgb_is_doubled_as_released():
    found = double(torch.arange(9.0).view(1, 1, 3, 3))[0, 0]
    assert torch.equal(found[0], torch.tensor([0.5, 0.6875, 1.125, 1.625, 2.0625, 2.25]))
    assert torch.equal(found[1, :2], torch.tensor([1.0625, 1.25]))


def test_discriminator_is_the_released_one():
    judge = DCDiscriminator(resolution=64, channels=512)
    judge.load_state_dict(official_discriminator(official_judge([3, 64, 128, 256, 512])))
    images = fill(2 * 3 * 64**2, 101).float().view(2, 3, 64, 64)  # the release is given (x + 1)/2 of it
    with torch.no_grad():
        assert torch.allclose(judge(images).logit, torch.tensor([-0.060745, -0.248442]), atol=1e-5)  # float32


@pytest.mark.parametrize(("resolution", "features", "widths", "judge", "count", "judge_count"), [
    (64, 128, [128, 64, 32], [3, 64, 128, 256, 512], 411_595, 2_763_776),
    (256, 256, [256, 128, 64, 32, 32], [3, 16, 32, 64, 128, 256, 512], 748_497, 2_802_432)])
def test_released_checkpoints_load(resolution, features, widths, judge, count, judge_count, tmp_path):
    """torch.save of {model: all networks in one state dict, optimizer: …}, as the authors write it."""
    generator = official_tensors(features, widths)
    networks = {"discriminator": official_judge(judge), "generator": generator,
                "generator_test": {name: value / 2 for name, value in generator.items()}}
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": {f"{part}.{name}": value.float() for part, tensors in networks.items()
                          for name, value in tensors.items()},
                "optimizer": {"state": {}, "param_groups": [{"lr": 5e-4, "params": [0]}]}, "epoch_it": 3, "it": 70,
                "loss_val_best": 31.5}, path)
    weights = load_official(path, "giraffe")
    ours, discriminator = released(resolution, features), DCDiscriminator(resolution=resolution, channels=512)
    for part in ("generator", "generator_ema"):
        ours.load_state_dict(weights[part])
    assert torch.equal(ours.objects.position.weight, generator["decoder.fc_in.weight"].float() / 2)
    discriminator.load_state_dict(weights["discriminator"])
    assert sum(p.numel() for p in ours.parameters()) == count
    assert sum(p.numel() for p in discriminator.parameters()) == judge_count
    with pytest.raises(KeyError, match="no parameter of a GIRAFFE generator"):
        official_generator({"decoder.siren.weight": torch.zeros(1)})


# The equations, without anything folded, packed or left out.


def plain_field(field: FeatureField, shape, appearance, points, directions):
    """Feature and raw density at points `[p 3]` in box coordinates, layer by layer."""
    encoded = field.encode(points)
    hidden = torch.relu(field.position(encoded) + field.shape(shape))
    for layer, linear in enumerate(field.trunk, start=1):
        hidden = torch.relu(linear(hidden))
        if layer == field.skip:
            hidden = hidden + field.shape_skip(shape) + field.position_skip(encoded)
    lit = field.view(hidden) + field.appearance(appearance) + field.direction(field.encode_direction(directions))
    return field.feature(torch.relu(lit)), field.density(hidden)[:, 0]


def turned(vectors: Tensor, angle: Tensor) -> Tensor:
    x, y, z = vectors.unbind(-1)
    return torch.stack([angle.cos() * x - angle.sin() * y, angle.sin() * x + angle.cos() * y, z], -1)


def plain_render(generator: GIRAFFE, scene: Scene, camera: Camera):
    """Features and opacity `[b n …]`, one image and object after the other, every network at every sample."""
    rays = generator.rays(camera)
    t = spread(rays, generator.samples_per_ray)
    places, found = points_along(rays, t), []
    for image in range(len(t)):
        points = places[image].flatten(0, 1)
        directions = rays.directions[image].repeat_interleave(t.shape[-1], 0)
        turn = -scene.background_rotation[image]
        feature, raw = plain_field(generator.background, scene.background_shape[image],
                                   scene.background_appearance[image], turned(points, turn), turned(directions, turn))
        density, weighted = raw.relu(), raw.relu()[:, None] * feature
        for i in range(scene.shape.shape[1]):
            turn, scale = -scene.rotation[image, i], scene.scale[image, i]
            local = turned(points - scene.translation[image, i], turn) / scale
            towards = F.normalize(turned(directions, turn) / scale, dim=-1)
            feature, raw = plain_field(generator.objects, scene.shape[image, i], scene.appearance[image, i], local,
                                       towards)
            mine = raw.relu() * (local.abs() <= 1.1).all(-1) * scene.presence[image, i]
            density, weighted = density + mine, weighted + mine[:, None] * feature
        mean = (weighted / torch.where(density == 0, 1e-4, density)[:, None]).view(*t.shape[1:], -1)
        delta = torch.cat([t[image].diff(dim=-1), torch.full_like(t[image][:, :1], 1e10)], -1)
        alpha = 1 - torch.exp(-density.view(t.shape[1:]) * delta)
        left = torch.cumprod(torch.cat([torch.ones_like(alpha[:, :1]), 1 - alpha], -1), -1)[:, :-1]
        found.append((((alpha * left)[..., None] * mean).sum(-2), (alpha * left).sum(-1)))
    return tuple(torch.stack(values) for values in zip(*found, strict=True))


@pytest.mark.smoke
def test_rendering_is_the_equations_and_so_are_its_gradients():
    generator = visible(tiny().double())
    scene = dataclasses.replace(objects(3, b=2, dtype=torch.float64),
                                presence=torch.tensor([[1.0, 1, 0], [1, 0.3, 1]]).double())
    view = camera(2, fov=20, dtype=torch.float64)
    losses = []
    features, _, opacity, _ = generator.render(scene, generator.rays(view))
    for features_, opacity_ in ((features, opacity), plain_render(generator, scene, view)):
        parameters = [*generator.objects.parameters(), *generator.background.parameters()]
        loss = features_.sin().sum() + (opacity_ * torch.arange(16)).sum()
        losses.append((features_, opacity_, *torch.autograd.grad(loss, parameters)))
    torch.testing.assert_close(losses[0], losses[1], atol=1e-9, rtol=1e-9)  # float64
    assert all(gradient.abs().sum() > 0 for gradient in losses[0])
    alone = generator.render(scene, generator.rays(view))[3]
    assert alone.max() > 0.05 and (opacity > alone + 0.05).all()  # both are in the picture


def test_field_is_what_the_samples_of_a_picture_are():
    """Composited by hand, its answers along the rays make the picture's features."""
    generator, scene = visible(tiny().double()), objects(2, b=2, dtype=torch.float64)
    view = camera(2, dtype=torch.float64)
    rays = generator.rays(view)
    t = spread(rays, generator.samples_per_ray)
    with torch.no_grad():
        density, features = generator.field(scene)(points_along(rays, t), rays.directions[..., None, :])
        passed = torch.cat([torch.zeros_like(t[..., :1]), (density[..., :-1] * t.diff(dim=-1)).cumsum(-1)], -1)
        weights = torch.exp(-passed) - torch.cat([torch.exp(-passed[..., 1:]), torch.zeros_like(t[..., :1])], -1)
        weights = torch.where(density > 0, weights, 0)
        expected = generator.render(scene, rays)[0]
    torch.testing.assert_close((weights[..., None] * features).sum(-2), expected, atol=1e-9, rtol=1e-9)  # float64
    assert (density >= 0).all() and (density > 0).any()


def test_a_box_of_constant_density_hides_what_a_slab_hides():
    """A ray through its middle has so many samples inside, each standing for a spacing."""
    generator = tiny(samples_per_ray=400, render_resolution=5, resolution=10)  # its middle pixel looks at the middle
    with torch.no_grad():
        generator.objects.density.weight.zero_()
        generator.objects.density.bias.fill_(3.0)
    scene = dataclasses.replace(objects(1), translation=torch.zeros(1, 1, 3), rotation=torch.zeros(1, 1))
    level = Camera(look_at(torch.tensor([[2.732, 0, 0]]), torch.zeros(3)), intrinsics_from_fov(10)[None])
    with torch.no_grad():
        seen = generator.synthesis(scene, level, 10).object_opacity[0, 2, 2]
    length = 2 * 1.1 * scene.scale[0, 0, 0]
    spacing = 5.5 / 399
    assert abs(math.log(1 - seen) / -3.0 - length) <= spacing


def test_doubled_convolution_is_a_convolution_of_nearest_neighbours():
    renderer = NeuralRenderer(features=64, size=4, resolution=16).double()
    x = torch.randn(2, 64, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = renderer(x)[0]
    rgb = renderer.to_rgb[0](x)
    for layer, to_rgb in zip(renderer.layers, renderer.to_rgb[1:], strict=True):
        x = F.leaky_relu(layer(F.interpolate(x, scale_factor=2, mode="nearest")), 0.2)
        rgb = double(rgb) + to_rgb(x)
    torch.testing.assert_close(found, rgb)


def test_colour_is_that_of_a_wall_of_the_features():
    generator = tiny(resolution=32, render_resolution=8).double()
    feature = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wall = generator.renderer(feature[None, :, None, None].expand(1, 7, 8, 8))[0].sigmoid()
    torch.testing.assert_close(generator.colour(objects(1), feature[None, None])[0, 0], wall[0, :, 16, 16])


# Scenes.


def pictures(generator: GIRAFFE, scene: Scene, **how):
    with torch.no_grad():
        return generator.synthesis(scene, camera(len(scene.shape), **how), generator.resolution)


@pytest.mark.smoke
def test_any_number_of_objects_is_shown_in_any_order():
    generator, scene = visible(tiny()), objects(3, b=2)
    there, other_order = pictures(generator, scene), pictures(generator, select(scene, [2, 0, 1]))
    torch.testing.assert_close(there.rgb, other_order.rgb, atol=1e-5, rtol=0)  # sums of three in float32
    assert not torch.allclose(there.rgb, pictures(generator, select(scene, [0, 1])).rgb, atol=1e-3)


def test_an_absent_object_is_as_good_as_none_and_a_far_one_changes_nothing():
    generator, scene = visible(tiny()), objects(2)
    one = pictures(generator, select(scene, [0]))
    absent = dataclasses.replace(scene, presence=torch.tensor([[1.0, 0.0]]))
    close = {"atol": 1e-6, "rtol": 0}  # products of other shapes, in float32
    torch.testing.assert_close(pictures(generator, absent).rgb, one.rgb, **close)
    away = scene.translation.clone()
    away[:, 1] = torch.tensor([0.0, 5.0, 0.0])
    torch.testing.assert_close(pictures(generator, dataclasses.replace(scene, translation=away)).rgb, one.rgb, **close)
    nobody = pictures(generator, select(scene, []))
    assert nobody.object_opacity.abs().max() == 0 and one.object_opacity.max() > 0.05


def test_objects_alone_move_as_the_camera_would():
    generator, scene = visible(tiny().double(), background=-1.0), objects(2, dtype=torch.float64)
    view = camera(dtype=torch.float64)
    step = torch.tensor([0.05, 0.1, -0.04], dtype=torch.float64)
    pose = view.camera_to_world.clone()
    pose[:, :3, 3] -= step
    there = pictures(generator, dataclasses.replace(scene, translation=scene.translation + step), dtype=torch.float64)
    with torch.no_grad():
        moved = generator.synthesis(scene, Camera(pose, view.intrinsics), 8)
    torch.testing.assert_close(there.rgb, moved.rgb, atol=1e-9, rtol=0)  # float64
    still = pictures(generator, scene, dtype=torch.float64)
    assert (there.rgb - still.rgb).abs().max() > 1e-4 and still.object_opacity.max() > 0.05


def test_a_scene_that_turns_is_a_camera_that_goes_the_other_way():
    """Counter-clockwise from above; the background turns about the origin, and so does an object that stands there."""
    generator = visible(tiny().double())
    scene = dataclasses.replace(objects(1, dtype=torch.float64), translation=torch.zeros(1, 1, 3).double())
    turn = dataclasses.replace(scene, rotation=scene.rotation + 0.4,
                               background_rotation=scene.background_rotation + 0.4)
    around = pictures(generator, scene, azimuth=-0.4, dtype=torch.float64)
    torch.testing.assert_close(pictures(generator, turn, dtype=torch.float64).rgb, around.rgb, atol=1e-9, rtol=0)
    only = dataclasses.replace(turn, background_rotation=scene.background_rotation)
    assert (pictures(generator, only, dtype=torch.float64).rgb - around.rgb).abs().max() > 1e-4


def test_places_of_objects_have_gradients():
    """Finite differences do not move a sample over the wall of a box here."""
    generator, scene = visible(tiny().double()), objects(1, dtype=torch.float64)
    rays = generator.rays(camera(dtype=torch.float64))

    def loss(translation):
        return generator.render(dataclasses.replace(scene, translation=translation), rays)[0].sin().sum()

    place = scene.translation.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(place), place)
    for axis in range(3):
        step = torch.zeros_like(place)
        step[..., axis] = 1e-7
        with torch.no_grad():
            expected = (loss(place + step) - loss(place - step)) / 2e-7
        assert found[0, 0, axis].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)


# What z decides.


def test_layout_follows_its_laws():
    layout = Layout(objects=2, scale=[[0.2, 0.16, 0.16], [0.25, 0.2, 0.2]], rotation=[145, 215],
                    translation=[[-0.22, -0.12, 0], [0.22, 0.12, 0]], background_rotation=[-90, 0])
    generator = tiny(layout=layout)
    z = torch.randn(4000, generator.z_dim, generator=torch.Generator().manual_seed(0))
    scene = generator.scene(generator.mapping(z))
    assert scene.shape.shape == (4000, 2, 5) and scene.background_shape.shape == (4000, 4)
    u = (scene.scale - torch.tensor([0.2, 0.16, 0.16])) / torch.tensor([0.05, 0.04, 0.04])
    torch.testing.assert_close(u, u[..., :1].expand_as(u), atol=1e-5, rtol=0)  # one number decides the three
    uniform = {"scale": u[..., 0], "x": (scene.translation[..., 0] + 0.22) / 0.44,
               "y": (scene.translation[..., 1] + 0.12) / 0.24, "rotation": (scene.rotation.rad2deg() - 145) / 70,
               "background": (scene.background_rotation.rad2deg() + 90) / 90}
    for name, values in uniform.items():
        ranks = values.flatten().sort().values
        gap = (ranks - (torch.arange(len(ranks)) + 0.5) / len(ranks)).abs().max()
        assert gap < 1.95 / math.sqrt(len(ranks)), name  # Kolmogorov-Smirnov at 1 in 1000
    assert (scene.translation[..., 2] == 0).all() and (scene.presence == 1).all()
    assert torch.corrcoef(torch.stack([value.reshape(4000, -1)[:, 0] for value in uniform.values()])).sub(
        torch.eye(5)).abs().max() < 0.08  # 5 σ of independent ones


def test_as_many_objects_are_there_as_the_counts_say():
    generator = tiny(layout=dataclasses.replace(FACE, objects=5, counts={2: 1, 4: 3}))
    z = torch.randn(4000, generator.z_dim, generator=torch.Generator().manual_seed(0))
    presence = generator.scene(z).presence
    there = presence.sum(-1)
    assert set(there.tolist()) == {2.0, 4.0}
    assert (there == 4).float().mean().item() == pytest.approx(0.75, abs=0.035)  # 5 σ
    torch.testing.assert_close(presence.mean(0), torch.full((5,), 3.5 / 5), atol=0.04, rtol=0)  # any of them, 5 σ
    with pytest.raises(ValueError, match="at most 1"):
        dataclasses.replace(FACE, counts={2: 1})


def test_objects_keep_apart():
    clevr = dataclasses.replace(FACE, objects=5, translation=[[-0.71, -0.71, 0.2], [0.71, 0.71, 0.2]], apart=0.39,
                                candidates=8)
    generator = tiny(layout=clevr)
    z = torch.randn(500, generator.z_dim, generator=torch.Generator().manual_seed(0))
    place = generator.scene(z).translation
    nearest = (torch.cdist(place, place) + torch.eye(5)).amin((-1, -2))
    assert (nearest >= 0.39).float().mean() > 0.9  # where all candidates are taken, the farthest has to do
    assert place[..., :2].abs().max() <= 0.71 and (place[..., 2] == 0.2).all()
    careless = tiny(layout=dataclasses.replace(clevr, apart=0, candidates=1))
    place = careless.scene(z[:, :careless.z_dim]).translation
    assert ((torch.cdist(place, place) + torch.eye(5)).amin((-1, -2)) >= 0.39).float().mean() < 0.4


def test_truncation_draws_latents_to_the_origin_and_leaves_the_layout():
    generator = tiny(layout=dataclasses.replace(FACE, translation=[[-1, -1, -1], [1, 1, 1]]))
    z = torch.randn(2, generator.z_dim, generator=torch.Generator().manual_seed(0))
    whole, half = (generator.scene(generator.mapping(z, truncation_psi=psi)) for psi in (1.0, 0.5))
    for name in ("shape", "appearance", "background_shape", "background_appearance"):
        torch.testing.assert_close(getattr(half, name), getattr(whole, name) / 2)
    for name in ("translation", "rotation", "scale", "presence", "background_rotation"):
        assert torch.equal(getattr(half, name), getattr(whole, name))


# The generator's promises.


def test_pictures_are_random_only_in_training_or_on_request():
    scene = objects(1)
    for generator, random in ((tiny(), False), (tiny().train(), True), (tiny(noise_at_inference=True), True)):
        first, second = (pictures(generator, scene) for _ in range(2))
        assert torch.equal(first.rgb, second.rgb) != random


def test_noise_makes_something_in_a_box_and_nothing_outside():
    generator = tiny(density_noise=1e3, render_resolution=8, resolution=16).train()
    scene = dataclasses.replace(objects(1), translation=torch.zeros(1, 1, 3), scale=torch.full((1, 1, 3), 0.2))
    seen = pictures(generator, scene, fov=30).object_opacity[0]
    rays = generator.rays(camera(fov=30))
    middle = -(rays.origins * rays.directions).sum(-1, keepdim=True) * rays.directions + rays.origins  # nearest to 0
    missed = (middle.norm(dim=-1) > 0.2 * 1.1 * 3**0.5).view(8, 8)
    met = (middle.norm(dim=-1) < 0.15).view(8, 8)  # two or three samples in the box, each dense half of the times
    assert 0 < missed.sum() < 64 and met.any()
    assert (seen[missed] == 0).all() and seen[met].max() > 0.99


def test_a_picture_has_all_its_parts():
    generator = visible(tiny())
    z = torch.randn(2, generator.z_dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ws = generator.mapping(z)
        images = generator.synthesis(ws, camera(2), 8)
        again = generator.synthesis(generator.prepare(ws), camera(2), 8)
    assert torch.equal(images.rgb, again.rgb) and images.rgb.shape == (2, 3, 8, 8)
    assert images.raw.shape == (2, 3, 4, 4) and images.rgb.abs().max() <= 1 and images.raw.abs().max() <= 1
    for part in (images.depth, images.opacity, images.object_opacity):
        assert part.shape == (2, 4, 4)
    assert (images.object_opacity <= images.opacity + 1e-6).all()
    with pytest.raises(ValueError, match="side 8, not 16"):
        generator.synthesis(ws, camera(2), 16)
    with pytest.raises(ValueError, match="whole pictures"):
        generator.synthesis(ws, camera(2), 8, Patch(torch.ones(2), torch.zeros(2, 2), 4))


@pytest.mark.smoke
def test_every_parameter_gets_a_gradient_in_training():
    generator = tiny().train()
    z = torch.randn(4, generator.z_dim, generator=torch.Generator().manual_seed(0))
    generator.synthesis(generator.mapping(z), camera(4), 8).rgb.square().mean().backward()
    for name, parameter in generator.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_cost_counts_the_objects_inside_their_boxes():
    cost = released(64, 128).cost(64)
    share = 2 * 1.1 * 0.21 / 5.5
    assert cost.rays == 256 and cost.samples_per_ray == pytest.approx(64 * (1 + share), rel=1e-6)
    of_object = 2 * (2 * 60 * 128 + 7 * 128**2 + 128 + 128**2)
    of_background = 2 * (60 * 64 + 3 * 64**2 + 64 + 64**2)
    assert cost.flops_per_sample * (1 + share) == pytest.approx(of_background + share * of_object, rel=1e-6)
    renderer = 2 * (16 * 256 * 128 * 64 + 16 * 1024 * 64 * 32 + 27 * (256 * 128 + 1024 * 64 + 4096 * 32))
    assert renderer < cost.flops_fixed < 1.25 * renderer + 2 * 256 * 128 * (128 + 64)
    assert cost.flops < 0.3 * 2 * 3.2e9  # all networks at all samples: 3.2 GMAC


def test_penalty_of_forty_is_the_releases_ten():
    judge = DCDiscriminator(resolution=8, channels=4).double()
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    images = (2 * images - 1).requires_grad_()
    ours = R1(weight=40)([images], judge(images).logit)
    positive = ((images.detach() + 1) / 2).requires_grad_()
    hidden = positive
    for conv in judge.blocks:
        hidden = F.leaky_relu(conv(hidden), 0.2)
    theirs = R1(weight=10)([positive], judge.verdict(hidden).flatten())
    torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match="pictures of side 8"):
        judge(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("make", [
    lambda: NeuralRenderer(features=8, size=16, resolution=16),
    lambda: NeuralRenderer(features=8, size=16, resolution=48), lambda: DCDiscriminator(resolution=12, channels=8),
    lambda: tiny(objects={"width": 8, "depth": 4, "skip": 3, "extent": 2} | SMALL)])
def test_impossible_numbers_are_refused(make):
    with pytest.raises(ValueError, match="must be"):
        make()
