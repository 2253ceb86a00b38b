"""GRAM: manifolds, crossings and compositing against closed forms, plain equations and the released code."""

import copy
import math
import sys
import types

import pytest
import torch
from filling import inputs as inp
from filling import noise

from gan3d.cameras import Camera, flip_axes, intrinsics_from_fov, look_at, mirror, sphere_point
from gan3d.checkpoints import load_official
from gan3d.gans import gram
from gan3d.gans.gram import GRAM, Crossings, ManifoldPredictor, first_falls
from gan3d.nn import parallel
from gan3d.nn.discriminators import ProgressiveDiscriminator
from gan3d.official.gram import OFFICIAL_ORDER
from gan3d.poses import Gaussian, Spherical
from gan3d.rays import Bounds, Patch, Rays

POSES = Spherical(1.0, Gaussian(90, 17.2), Gaussian(90, 8.9), 12.0, up="y")
WHITE = [1.0, 1.0, 1.0]


def tiny(seed: int = 0, predictor: dict | None = None, **changes) -> GRAM:
    torch.manual_seed(seed)
    shape = dict(width=16, depth=3, scale=2 / 0.24, center=[0, 0, -1.5], radius=0) | (predictor or {})
    numbers = dict(bounds=Bounds(0.88, 1.12), z_dim=8, width=12, depth=4, point_scale=2 / 0.24, mapping_width=16,
                   mapping_depth=2, predictor=shape, num_manifolds=6, first_level=23, last_level=8, plane=-0.12,
                   search_samples=24, delta_alpha=0.04, delta_final=1e10, pixel_grid="corner")
    return GRAM(**(numbers | changes))  # type: ignore[arg-type]


def shells(seed: int = 0, **changes) -> GRAM:
    """CARLA's arrangement: spheres around the origin, no plane, white behind."""
    numbers = dict(bounds=Bounds(0.7, 1.3, background=WHITE), predictor={"center": [0, 0, 0]}, first_level=30,
                   last_level=5, plane=None, delta_alpha=0.3, delta_final=0.3, point_scale=1.0)
    return tiny(seed, **(numbers | changes))  # type: ignore[arg-type]


def inputs(n: int = 2, seed: int = 1) -> tuple[torch.Tensor, Camera]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 8, generator=generator), POSES.sample(n, generator)


def picture(generator: GRAM, resolution: int = 6, psi: float = 1.0, **how):
    z, camera = inputs()
    with torch.no_grad():
        return generator.synthesis(generator.mapping(z, truncation_psi=psi), camera, resolution, **how)


def frontal(fov: float = 12.0) -> Camera:
    return Camera(look_at(torch.tensor([[0.0, 0.0, 1.0]]), torch.zeros(3), up="y"), intrinsics_from_fov(fov)[None])


# ---- the released code's numbers


def filled(name: str, shape: torch.Size) -> torch.Tensor:
    """A released tensor as a function of its name, divided by √inputs."""
    value = torch.from_numpy(noise(shape.numel(), sum(name.encode()))).reshape(shape)
    return (0.2 * value if name.endswith("bias") else value / math.prod(shape[1:]) ** 0.5).float()


def released(generator: GRAM) -> dict[str, torch.Tensor]:
    """The reference model's state dict, under the authors' names and in their order."""
    from gan3d.official.gram import official_ema

    ours = official_ema([torch.tensor(float(i)) for i in range(62)])  # our name → its place there
    shapes = {OFFICIAL_ORDER[int(place)]: generator.state_dict()[name].shape for name, place in ours.items()}
    state = {name: filled(name, shapes[name]) for name in OFFICIAL_ORDER}
    for name, tensor in state.items():
        if "sample_network" in name and name.endswith("bias"):
            tensor.zero_()
        elif name.endswith("sample_network.output_layer.weight"):
            tensor.fill_(10 * (math.pi / 16) ** 0.5)
        elif ".rf_network.network." in name and name.endswith("weight"):
            tensor.mul_(0.4 if ".network.0." in name else 0.04)
    return state


REFERENCE = dict(z_dim=16, width=32, depth=8, mapping_width=256, mapping_depth=3, num_manifolds=8, search_samples=32)


def reference_model(kind: str, tmp_path) -> GRAM:
    make, changes = (tiny, dict(first_level=6, last_level=1.5)) if kind == "faces" else (
        shells, dict(first_level=9, last_level=1, delta_alpha=0.02, delta_final=0.02))
    generator = make(**REFERENCE, **changes).eval()  # type: ignore[arg-type]
    torch.save(released(generator), tmp_path / "generator.pth")
    generator.load_state_dict(load_official(tmp_path, "gram")["generator"])
    return generator


def reference_camera(fov: float) -> Camera:
    eye = sphere_point(torch.tensor([math.pi / 2 + 0.2]), torch.tensor([math.pi / 2 - 0.1]), 1.0, up="y")
    return Camera(look_at(eye, torch.zeros(3), up="y"), intrinsics_from_fov(fov)[None])


def assert_numbers(found: torch.Tensor, mean: float, std: float | None, at: dict[int, float]):
    """To the five digits that are stated."""
    assert float(found.mean()) == pytest.approx(mean, abs=1e-5)
    if std is not None:
        assert float(found.std(correction=0)) == pytest.approx(std, abs=1e-5)
    for place, value in at.items():
        assert float(found.flatten()[place]) == pytest.approx(value, abs=2e-5), place


@pytest.mark.smoke
def test_pictures_are_the_released_ones(tmp_path):
    generator = reference_model("faces", tmp_path)
    assert sum(p.numel() for p in generator.parameters()) == 294_189
    camera = reference_camera(12)
    with torch.no_grad():
        ws = generator.mapping(inp([1, 16], 1))
        images = generator.synthesis(ws, camera, 6).rgb
        less = generator.synthesis(0.7 * ws, camera, 6).rgb  # truncated towards averages of 0
    assert float(ws[0, 0]) == pytest.approx(0.59865, abs=1e-5)
    assert float(ws[0, ws.shape[1] // 2]) == pytest.approx(-0.33129, abs=1e-5)
    assert_numbers(images, 0.16386, 0.60187, {0: -0.24041, 36: 0.78893, 54: 0.89354, -1: -0.64699})
    assert_numbers(less, 0.10159, None, {0: -0.33907, -1: -0.40160})


def test_pictures_of_shells_are_the_released_ones(tmp_path):
    generator = reference_model("carla", tmp_path)
    camera = reference_camera(30)
    with torch.no_grad():
        images = generator.synthesis(generator.mapping(inp([1, 16], 1)), camera, 6).rgb
        s = generator.manifolds(along_rays(generator.rays(camera, 6), 32))
    assert_numbers(images, 0.98312, None, {0: 0.94560, -1: 0.95151})
    assert float(s.min()) == pytest.approx(1.15618, abs=1e-4) and float(s.max()) == pytest.approx(27.60540, abs=1e-4)
    assert float(generator.crossings(camera, 6).valid.float().mean()) == pytest.approx(0.52083, abs=1e-5)


def along_rays(rays: Rays, samples: int) -> torch.Tensor:
    t = torch.linspace(0, 1, samples) * (rays.far - rays.near)[..., None] + rays.near[..., None]
    return rays.origins[..., None, :] + t[..., None] * rays.directions[..., None, :]


def test_rays_and_crossings_are_the_released_ones(tmp_path):
    generator = reference_model("faces", tmp_path)
    camera = reference_camera(12)
    rays = generator.rays(camera, 6)
    assert torch.allclose(rays.origins[0, 0], torch.tensor([-0.19768, 0.09983, 0.97517]), atol=1e-5)
    assert torch.allclose(rays.directions[0, 0], torch.tensor([0.0957, 0.00469, -0.9954]), atol=1e-5)
    with torch.no_grad():
        s = generator.manifolds(along_rays(rays, 32))
        seen = generator.crossings(camera, 6)
    assert float(s.min()) == pytest.approx(1.58960, abs=1e-4) and float(s.max()) == pytest.approx(19.47214, abs=1e-4)
    place = seen.surface.long().argsort(-1)  # back into the order of the levels; the plane is last
    points, valid = seen.points.gather(-2, place[..., None].expand(-1, -1, -1, 3)), seen.valid.gather(-1, place)
    assert float(valid[..., :-1].float().mean()) == pytest.approx(0.26587, abs=1e-5)
    assert_numbers(points[..., :-1, :], -0.03075, 0.08407, {0: -0.10065, -1: -0.07063})
    assert valid[..., -1].all() and torch.allclose(points[..., -1, 2], torch.tensor(-0.12), atol=1e-6)


def test_discriminator_is_the_released_one(tmp_path):
    critic = ProgressiveDiscriminator(channels=[256, 400, 400, 400, 400], coord=True, down="pool", latent_dim=0,
                                      pose=True, entries=1)
    branches = {"first": "network.0.conv", "second": "network.2.conv", "skip": "proj"}
    state = {}
    for name, tensor in critic.state_dict().items():
        part, *path, kind = name.split(".")
        theirs = {"adapters": "fromRGB.model.0", "final": "final_layer"}.get(part) or (
            f"layers.{path[0]}.{branches[path[1]]}")
        state[f"{theirs}.{kind}"] = filled(f"{theirs}.{kind}", tensor.shape)
    assert sum(t.numel() for t in state.values()) == 11_171_027
    torch.save(state, tmp_path / "discriminator.pth")
    torch.save(released(tiny(**REFERENCE)), tmp_path / "generator.pth")  # type: ignore[arg-type]
    critic.load_state_dict(load_official(tmp_path, "gram")["discriminator"])
    with torch.no_grad():
        verdict = critic(inp([2, 3, 32, 32], 1))
    assert torch.allclose(verdict.logit, torch.tensor([0.14902, 0.1232]), atol=1e-5)
    assert torch.allclose(verdict.pose, torch.tensor([[0.35451, 0.09437], [0.38065, 0.08976]]), atol=1e-5)
    with pytest.raises(ValueError, match=r"squares of \[32\]"):
        critic(torch.zeros(1, 3, 16, 16))


def test_the_nameless_average_is_read_in_the_order_of_the_parameters(tmp_path, monkeypatch):
    module = types.ModuleType("torch_ema")

    class Average:
        def __init__(self, parameters):
            self.decay, self.num_updates, self.shadow_params = 0.999, 7, parameters

    Average.__module__, Average.__qualname__ = "torch_ema", "Average"
    monkeypatch.setattr(module, "Average", Average, raising=False)
    monkeypatch.setitem(sys.modules, "torch_ema", module)
    state = released(tiny(**REFERENCE))  # type: ignore[arg-type]
    torch.save(state, tmp_path / "generator.pth")
    torch.save(Average(list(state.values())), tmp_path / "ema.pth")
    monkeypatch.delitem(sys.modules, "torch_ema")
    ours = load_official(tmp_path, "gram")
    assert all(torch.equal(tensor, ours["generator_ema"][name]) for name, tensor in ours["generator"].items())
    tiny(**REFERENCE).load_state_dict(ours["generator_ema"])  # type: ignore[arg-type]


@pytest.mark.parametrize("width, count", [(128, 1_950_621), (64, 1_925_597), (256, 2_049_821)])
def test_sizes_are_the_published_ones(width, count):
    generator = tiny(predictor={"width": width}, z_dim=256, width=256, depth=8, mapping_width=256, mapping_depth=3)
    assert sum(p.numel() for p in generator.parameters()) == count
    critic = ProgressiveDiscriminator(channels=[32, 64, 128, 256, 400, 400, 400, 400], coord=True, down="pool",
                                      latent_dim=0, pose=True, entries=1)
    assert sum(p.numel() for p in critic.parameters()) == 12_391_827


def test_pose_angles_are_the_released_pitch_and_yaw():
    """origin = (sin φ cos θ, cos φ, sin φ sin θ); a flipped picture has the yaw π − θ."""
    pitch, yaw = torch.tensor([1.3, 1.7]), torch.tensor([1.2, 2.0])
    eye = torch.stack([pitch.sin() * yaw.cos(), pitch.cos(), pitch.sin() * yaw.sin()], -1)
    camera = Camera(look_at(eye, torch.zeros(3), up="y"), intrinsics_from_fov(12).expand(2, 3, 3))
    assert torch.allclose(POSES.angles(camera), torch.stack([pitch, yaw], -1), atol=1e-6)
    assert torch.allclose(POSES.angles(mirror(camera)), torch.stack([pitch, math.pi - yaw], -1), atol=1e-6)


# ---- manifolds and crossings


@pytest.mark.smoke
def test_manifolds_are_nearly_spheres_at_first():
    torch.manual_seed(0)
    predictor = ManifoldPredictor(width=256, depth=3, scale=2 / 0.24, center=[0, 0, -1.5], radius=0)
    points = 0.12 * torch.randn(500, 3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ratio = predictor(points) / (points * (2 / 0.24) - torch.tensor([0, 0, -1.5])).norm(dim=-1)
    assert 7 < ratio.min() and ratio.max() < 14 and 9 < ratio.mean() < 11.5  # a random network: some 10 % around 10


def with_s(generator: GRAM, s, monkeypatch) -> GRAM:
    """The generator with manifolds in closed form."""
    monkeypatch.setattr(generator.manifolds, "along", lambda points, hit: s(points))
    return generator


def sphere_entry(rays: Rays, radius: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Distance to the near side of spheres around the origin, and whether the ray meets them between near and far."""
    along = -(rays.origins * rays.directions).sum(-1, keepdim=True)
    across = rays.origins.square().sum(-1, keepdim=True) - along.square()
    t = along - (radius**2 - across).clamp(min=0).sqrt()
    return t, (across < radius**2) & (t > rays.near[..., None]) & (t < rays.far[..., None])


@pytest.mark.parametrize("samples", [64, 256])
def test_crossings_of_spheres_are_their_near_sides(monkeypatch, samples):
    """s = 10·|8.33 x|: linear interpolation errs by at most h²/8·max|s''| / |s'|; near a tangent both bounds fail."""
    generator = shells(search_samples=samples, num_manifolds=9)
    with_s(generator, lambda points: 10 * (points * 2 / 0.24).norm(dim=-1), monkeypatch)
    _, camera = inputs()
    camera = Camera(camera.camera_to_world, intrinsics_from_fov(30).expand(2, 3, 3))
    rays, seen = generator.rays(camera, 12), generator.crossings(camera, 12)
    radius = generator.levels * 0.24 / 20
    exact, meets = sphere_entry(rays, radius)
    place = seen.surface.long().argsort(-1)
    t, valid = seen.t.gather(-1, place), seen.valid.gather(-1, place)
    h = 0.6 / (samples - 1)
    closest = (rays.origins - (rays.origins * rays.directions).sum(-1, keepdim=True) * rays.directions).norm(dim=-1)
    clear = (closest[..., None] < radius - h) | (closest[..., None] > radius)  # a chord shorter than h may be missed
    inside = (exact - rays.near[..., None]).abs() > 1e-5
    assert (valid == meets)[clear & inside].all() and valid.float().mean() > 0.3
    slope = (1 - (closest[..., None] / radius).square()).clamp(min=0).sqrt()  # |cos| between ray and normal
    good = valid & (slope > 0.5)
    bound = h**2 / 8 / (0.75 * radius) / 0.4 + 2e-6  # s''/s' of a distance to the centre is at most 1/radius
    assert ((t - exact).abs() <= bound)[good].all()
    assert (seen.t.diff(dim=-1) >= 0).all()


def test_crossings_of_planes_are_exact(monkeypatch):
    """s linear in space: so is the interpolation."""
    generator = with_s(tiny(), lambda points: 15 + 80 * points[..., 2], monkeypatch)
    _, camera = inputs()
    rays, seen = generator.rays(camera, 5), generator.crossings(camera, 5)
    world_z = torch.cat([(generator.levels - 15) / 80, torch.tensor([-0.12])])
    place = seen.surface.long().argsort(-1)
    expected = (world_z - rays.origins[..., 2:]) / rays.directions[..., 2:]
    assert seen.valid.gather(-1, place).float().mean() > 0.95
    good = seen.valid.gather(-1, place)
    assert torch.allclose(seen.t.gather(-1, place)[good], expected[good], atol=2e-6)
    assert torch.allclose(seen.points, rays.origins[..., None, :] + seen.t[..., None] * rays.directions[..., None, :])


def test_only_the_first_fall_through_a_level_counts():
    s = torch.tensor([[[5.0, 3, 6, 1, 4, 0]], [[1.0, 2, 3, 2, 2, 5]], [[1.0, 2, 3, 4, 5, 6]], [[4.0, 4, 2, 2, 2, 2]]])
    index, found = first_falls(s, torch.tensor([4.0, 2.0]))
    assert index[:, 0].tolist() == [[0, 2], [4, 2], [4, 4], [0, 1]]
    assert found[:, 0].tolist() == [[True, True], [False, True], [False, False], [True, True]]


@pytest.mark.parametrize("threads", [1, 3])
def test_the_search_in_blocks_finds_what_a_loop_finds(monkeypatch, threads):
    monkeypatch.setattr(gram, "RAYS_PER_BLOCK", 3)
    monkeypatch.setattr(parallel, "THREADS", threads)
    s = torch.randint(0, 7, (2, 8, 11), generator=torch.Generator().manual_seed(0)).float()
    levels = torch.tensor([5.0, 3.5, 1.0])
    index, found = first_falls(s, levels)
    for at in torch.cartesian_prod(torch.arange(2), torch.arange(8), torch.arange(3)).tolist():
        values, level = s[at[0], at[1]].tolist(), float(levels[at[2]])
        falls = [i for i in range(10) if values[i] >= level >= values[i + 1]]
        assert bool(found[tuple(at)]) == bool(falls) and int(index[tuple(at)]) == (falls[0] if falls else 9)


def test_where_s_hardly_changes_the_crossing_is_the_far_end(monkeypatch):
    generator = shells(num_manifolds=2, first_level=1.01, last_level=0.5, search_samples=3)
    with_s(generator, lambda points: torch.tensor([1.02, 1.0, 0.0]).expand(points.shape[:-1]), monkeypatch)
    seen = generator.crossings(frontal(), 2)
    assert torch.allclose(seen.t, torch.tensor([1.0, 1.15]))  # 1.02 → 1.00 is flat: its end; then half-way to 1.3
    assert seen.valid.all()


def test_crossings_agree_with_much_finer_marching():
    coarse, fine = (shells(search_samples=n, predictor={"center": [0, 0, 0], "width": 128}) for n in (64, 1024))
    camera = Camera(inputs()[1].camera_to_world, intrinsics_from_fov(30).expand(2, 3, 3))
    with torch.no_grad():
        a, b = (generator.crossings(camera, 16) for generator in (coarse, fine))
    place = [seen.surface.long().argsort(-1) for seen in (a, b)]
    both = a.valid.gather(-1, place[0]) & b.valid.gather(-1, place[1])
    assert (a.valid != b.valid).float().mean() < 0.02 and both.float().mean() > 0.4
    error = (a.t.gather(-1, place[0]) - b.t.gather(-1, place[1])).abs()[both]
    assert error.median() < 2e-4 and error.quantile(0.99) < 2e-3  # the spacing is 0.0095; kinks of the ReLUs remain


@pytest.mark.smoke
@pytest.mark.parametrize("rows, threads", [(1, 1), (7, 3), (1000, 1)])
def test_the_predictor_in_blocks_is_the_predictor(monkeypatch, rows, threads):
    monkeypatch.setattr(gram, "block_rows", lambda width, like: rows)
    monkeypatch.setattr(parallel, "THREADS", threads)
    predictor = tiny().manifolds.double()
    points = 0.1 * torch.randn(2, 5, 4, 3, dtype=torch.float64)
    hit = torch.tensor([[True] * 5, [True, False, True, False, False]])
    found, expected = predictor.along(points, hit), predictor(points) * hit[..., None]
    assert torch.allclose(found, expected, atol=1e-12)  # float64: the same sums in another order
    weight = torch.randn_like(found) * (torch.rand_like(found) < 0.5) * hit[..., None]
    ours, plain = (torch.autograd.grad((value * weight).sum(), predictor.parameters()) for value in (found, expected))
    for a, b in zip(ours, plain, strict=True):
        assert torch.allclose(a, b, atol=1e-11)


def test_the_predictor_in_blocks_has_second_derivatives():
    predictor = tiny().manifolds.double()
    points, hit = 0.1 * torch.randn(1, 3, 4, 3, dtype=torch.float64), torch.ones(1, 3, dtype=torch.bool)
    second = []
    for s in (predictor.along(points, hit), predictor(points)):
        first = torch.autograd.grad(s.square().sum(), predictor.output.weight, create_graph=True)[0]
        second.append(torch.autograd.grad(first.square().sum(), list(predictor.layers[0].parameters())[:1])[0])
    assert torch.allclose(second[0], second[1], atol=1e-8) and second[0].abs().max() > 0


# ---- pictures


def plain_picture(generator: GRAM, ws, camera, resolution: int):
    """As the equations read: s everywhere with gradients, one loop over levels, one over manifolds."""
    rays = generator.rays(camera, resolution)
    t = torch.linspace(0, 1, generator.search_samples).to(rays.near) * (rays.far - rays.near)[..., None]
    t = t + rays.near[..., None]
    points = rays.origins[..., None, :] + t[..., None] * rays.directions[..., None, :]
    s = generator.manifolds(points)
    found = []
    for level in generator.levels:
        falls = (s[..., :-1] >= level) & (s[..., 1:] <= level)
        valid, i = falls.any(-1), falls.to(torch.int64).argmax(-1)
        a, b, ta, tb = (x.gather(-1, j[..., None])[..., 0] for x in (s, t) for j in (i, i + 1))
        found.append((torch.where(a - b > 0.05, ((a - level) * tb + (level - b) * ta) / (a - b), tb), valid))
    t, valid = (torch.stack(parts, -1) for parts in zip(*found, strict=True))
    t = torch.where(valid, t, rays.far[..., None])
    closes = torch.zeros_like(valid)
    if generator.plane is not None:
        behind = (generator.plane - rays.origins[..., 2:]) / rays.directions[..., 2:]
        t, closes = torch.cat([t, behind], -1), torch.cat([closes, torch.ones_like(closes[..., :1])], -1)
        valid = torch.cat([valid, torch.ones_like(valid[..., :1])], -1)
    order = t.argsort(dim=-1, stable=True)
    t, valid, closes = (x.gather(-1, order) for x in (t, valid, closes))
    points = rays.origins[..., None, :] + t[..., None] * rays.directions[..., None, :]
    density, rgb = plain_field(generator, ws, points, rays.directions[..., None, :])
    light, colour, depth = torch.ones_like(t[..., 0]), torch.zeros_like(rgb[..., 0, :]), torch.zeros_like(t[..., 0])
    for k in range(t.shape[-1]):
        last = k == t.shape[-1] - 1
        delta = torch.where(closes[..., k] | last, generator.delta_final, generator.delta_alpha)
        alpha = (1 - torch.exp(-delta * density[..., k])) * valid[..., k]
        colour, depth = colour + (light * alpha)[..., None] * rgb[..., k, :], depth + light * alpha * t[..., k]
        light = light * (1 - alpha)
    if generator.background is not None:
        colour = colour + light[..., None]
    return 2 * colour.mT.unflatten(-1, (resolution, resolution)) - 1, depth, 1 - light


def plain_field(generator: GRAM, ws, points, directions):
    """The radiance field layer by layer: FiLM, heads summed, direction seen by the last colour."""
    net = generator.radiance
    raw, phase = ws.unflatten(-1, (2, net.depth + 1, -1)).unbind(1)

    def sine(k, layer, x):
        return torch.sin((15 * raw[:, k] + 30)[:, None, None] * layer(x) + phase[:, k, None, None])

    x, density, colour = points * net.point_scale, 0, 0
    for k, layer in enumerate(net.layers):
        x = sine(k, layer, x)
        if k:
            density = density + net.density_heads[k - 1](x)[..., 0]
        if 0 < k < net.depth - 1:
            colour = colour + net.colour_heads[k - 1](x)
    x = sine(net.depth, net.colour_layer, torch.cat([directions.expand_as(points), x], -1))
    rgb = torch.sigmoid(colour + net.colour_heads[-1](x)) * 1.002 - 0.001
    return torch.nn.functional.softplus(generator.density_gain * density), rgb


@pytest.mark.smoke
@pytest.mark.parametrize("make", [tiny, shells])
def test_pictures_and_all_gradients_are_those_of_the_plain_equations(make):
    generator = make(density_gain=20.0).double()
    z, camera = inputs()
    camera = Camera(camera.camera_to_world.double(), intrinsics_from_fov(30 if make is shells else 12).double())
    camera = Camera(camera.camera_to_world, camera.intrinsics.expand(2, 3, 3))
    weight = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    gradients = []
    ws = generator.mapping(z.double())
    images = generator.synthesis(ws, camera, 6)
    plain, depth, opacity = plain_picture(generator, ws, camera, 6)
    assert torch.allclose(images.rgb, plain, atol=1e-9)  # float64; frequencies and gain magnify rounding
    assert torch.allclose(images.depth.flatten(1), depth, atol=1e-9)
    assert torch.allclose(images.opacity.flatten(1), opacity, atol=1e-9)
    for rgb in (images.rgb, plain):
        gradients.append(torch.autograd.grad((rgb * weight).sum(), generator.parameters(), retain_graph=True))
    for (name, _), a, b in zip(generator.named_parameters(), *gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-7 * float(b.abs().max())) and b.abs().max() > 0, name


def test_opacity_does_not_depend_on_the_distance_between_manifolds():
    generator = shells(num_manifolds=3, delta_alpha=0.5, delta_final=2.0)
    raw, rgb = torch.full((1, 1, 3), 0.3), torch.tensor([[[[1.0, 0, 0], [0, 1, 0], [0, 0, 1]]]])
    density, pictures = math.log1p(math.exp(0.3)), []
    for t in ([[[0.9, 0.95, 1.2]]], [[[0.8, 1.0, 1.01]]]):
        seen = Crossings(torch.zeros(1, 1, 3, 3), torch.tensor(t), torch.tensor([[[True, False, True]]]),
                         torch.tensor([[[0, 2, 1]]]))
        pictures.append(generator.composite(seen, raw, rgb))
    first = 1 - math.exp(-0.5 * density)
    last = math.exp(-0.5 * density) * (1 - math.exp(-2 * density))
    rest = 1 - first - last  # white shows through; what is not valid is nothing
    expected = torch.tensor([[[first + rest, rest, last + rest]]])
    assert torch.allclose(pictures[0].features, expected, atol=1e-6)
    assert torch.equal(pictures[0].features, pictures[1].features)


def test_nothing_shines_through_the_plane():
    images = picture(tiny().eval())
    assert torch.allclose(images.opacity, torch.ones_like(images.opacity), atol=1e-6)
    z, camera = inputs()
    seen = tiny().crossings(camera, 6)
    assert (seen.surface == 5).sum() == 2 * 36 and seen.valid[seen.surface == 5].all()


def test_rays_that_miss_the_box_meet_nothing_and_are_not_searched(monkeypatch):
    box = Bounds(0.5, 1.5, aabb=[[-0.05] * 3, [0.05] * 3], background=WHITE)
    generator = shells(bounds=box, first_level=6, last_level=1).eval()
    searched, plain = [], gram.relu_network

    def watched(x, weights):
        searched.append(len(x))
        return plain(x, weights)

    monkeypatch.setattr(gram, "relu_network", watched)
    images, rays = picture(generator, 8), generator.rays(inputs()[1], 8)
    hit = rays.far > rays.near
    assert sum(searched) == 24 * int(hit.sum()) and 0 < hit.sum() < hit.numel()
    missed = ~hit.unflatten(-1, (8, 8))
    assert (images.opacity[missed] == 0).all() and (images.depth[missed] == 0).all()
    assert torch.equal(images.rgb.permute(0, 2, 3, 1)[missed], torch.ones(int(missed.sum()), 3))
    assert images.opacity.max() > 0.1


def test_last_back_leaves_no_light_over():
    plain, closed = picture(shells().eval()), picture(shells(last_back=True).eval())
    assert plain.opacity.max() < 0.99
    assert torch.allclose(closed.opacity, torch.ones_like(closed.opacity), atol=1e-5)


def test_pictures_are_never_random():
    generator = tiny().train()
    assert torch.equal(picture(generator).rgb, picture(generator).rgb)


def test_first_picture_is_not_blank():
    assert picture(tiny().eval()).rgb.std() > 0.01


def test_a_patch_shows_the_pixels_of_the_whole_picture():
    generator = tiny().eval()
    whole = picture(generator, 9)
    part = picture(generator, 9, patch=Patch(torch.full((2,), 0.5), torch.zeros(2, 2), 5))  # the middle 5×5 of 9×9
    assert torch.allclose(part.rgb, whole.rgb[:, :, 2:7, 2:7], atol=1e-4)  # frequencies magnify float32 rounding


def test_truncation_moves_ws_towards_their_mean():
    generator = tiny()
    z, _ = inputs()
    ws, half, none = (generator.mapping(z, truncation_psi=psi) for psi in (1.0, 0.5, 0.0))
    assert torch.allclose(half, (ws + none) / 2, atol=1e-6) and torch.allclose(none[0], none[1], atol=1e-6)
    assert torch.allclose(none[0], generator.mapping(torch.randn(20_000, 8)).mean(0), atol=0.02)  # 1/√10,000 of them


def test_locked_view_makes_colour_a_property_of_the_place():
    points = 0.1 * torch.randn(1, 4, 3, 3)
    ways = [torch.nn.functional.normalize(torch.randn(1, 4, 1, 3), dim=-1) for _ in range(2)]
    for locked in (True, False):
        generator = tiny(lock_view_dependence=locked)
        colours = [generator.field(generator.mapping(inputs(1)[0]))(points, way)[1] for way in ways]
        assert torch.equal(*colours) == locked


# ---- views that are known


@pytest.fixture
def searches(monkeypatch):
    """How many images each search was for."""
    seen, search = [], GRAM.search

    def counted(self, rays):
        seen.append(len(rays.near))
        return search(self, rays)

    monkeypatch.setattr(GRAM, "search", counted)
    return seen


def twice(camera: Camera) -> Camera:
    return Camera(camera.camera_to_world[[0, 1, 0]], camera.intrinsics[[0, 1, 0]])


def test_objects_in_one_view_share_its_search(searches):
    generator, (z, camera) = tiny().eval(), inputs(3)
    ws = generator.mapping(z).detach()
    alone = [generator.synthesis(ws[i:i + 1], twice(camera)[i:i + 1], 6).rgb for i in range(3)]
    with torch.no_grad():
        searches.clear()
        first = generator.synthesis(ws, twice(camera), 6)
        again = generator.synthesis(ws.flip(0), twice(camera), 6)
    assert searches == [2]
    assert torch.equal(first.rgb, torch.cat(alone)) and torch.equal(again.rgb[2], first.rgb[0])
    with torch.no_grad():
        generator.crossings(camera, 7)
        generator.crossings(mirror(camera), 6)
    assert searches == [2, 3, 3]


def test_training_shares_within_a_batch_and_remembers_nothing(searches):
    generator, (z, camera) = tiny().train(), inputs(3)
    for _ in range(2):
        generator.synthesis(generator.mapping(z), twice(camera), 6).rgb.sum().backward()
    with torch.no_grad():
        generator.crossings(camera, 6)
    assert searches == [2, 2, 3] and not generator.still.known
    generator.eval()
    generator.crossings(camera, 6)  # gradients are wanted
    assert not generator.still.known


@pytest.mark.parametrize("change", ["step", "data", "load", "double"])
def test_changed_manifolds_are_searched_again(searches, change):
    generator, (_, camera) = tiny().eval(), inputs(1)
    with torch.no_grad():
        before = generator.crossings(camera, 6)
        if change == "step":
            generator.manifolds.output.bias.add_(1)
        elif change == "data":
            generator.manifolds.output.bias.data = generator.manifolds.output.bias.data + 1
        elif change == "load":
            generator.load_state_dict(tiny(seed=3).state_dict())
        else:
            generator.double()
            camera = Camera(*(value.double() for value in camera))
        after = generator.crossings(camera, 6)
    assert searches == [1, 1] and not torch.equal(before.t, after.t)
    assert after.t.dtype == (torch.float64 if change == "double" else torch.float32)


def test_what_is_remembered_keeps_to_its_budget(searches, monkeypatch):
    generator, (_, camera) = tiny().eval(), inputs(3)
    each = 36 * 6 * (4 + 1 + 2)  # rays × manifolds × bytes
    monkeypatch.setattr(gram, "REMEMBERED_BYTES", 2 * each)
    with torch.no_grad():
        generator.crossings(camera, 6)
        assert len(generator.still.known) == 2
        generator.crossings(Camera(camera.camera_to_world[1:], camera.intrinsics[1:]), 6)
        assert searches == [3]
        generator.crossings(Camera(camera.camera_to_world[:1], camera.intrinsics[:1]), 6)
    assert searches == [3, 1]


def test_copies_and_state_dicts_carry_everything():
    generator, twin = tiny(), tiny(seed=5)
    twin.load_state_dict(generator.state_dict())
    assert torch.equal(picture(copy.deepcopy(generator).eval()).rgb, picture(twin.eval()).rgb)


# ---- the rest of the protocol


def test_cost_counts_the_published_network():
    generator = tiny(predictor={"width": 128}, z_dim=256, width=256, depth=8, mapping_width=256, mapping_depth=3,
                     num_manifolds=24, search_samples=64)
    cost = generator.cost(256)
    assert (cost.rays, cost.samples_per_ray) == (65536, 24)
    field, predictor = 533_000, 33_000
    assert cost.flops_per_sample / 2 == pytest.approx(field + predictor * 64 / 24, rel=0.02)
    assert cost.flops_fixed == 2 * (3 * 256**2 + 256 * 4608)


def test_impossible_numbers_are_refused():
    with pytest.raises(ValueError, match="must descend"):
        tiny(first_level=8, last_level=23)
    with pytest.raises(ValueError, match="at least one manifold"):
        tiny(num_manifolds=1)
    with pytest.raises(ValueError, match="search_samples"):
        tiny(search_samples=1)
    with pytest.raises(ValueError, match=r"bounds\.aabb"):
        tiny(bounds=Bounds(0.8, 1.2, aabb=[[-1.0] * 3, [1.0] * 3]))


def test_regularizers_are_none():
    generator, (z, camera) = tiny(), inputs()
    ws = generator.mapping(z)
    assert generator.regularizers(ws, camera, generator.synthesis(ws, camera, 8), 0) == {}


def test_rays_start_at_the_released_corners():
    rays = tiny().rays(Camera(flip_axes(torch.eye(4))[None], intrinsics_from_fov(12.0)[None]), 6)
    assert torch.allclose(rays.directions[0, 0], torch.tensor([-0.10396, 0.10396, -0.98913]), atol=1e-5)
