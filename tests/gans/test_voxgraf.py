"""VoxGRAF against numbers of the released code (CPU, float32), an independent renderer, and what generators promise.

The networks are filled by the names that the release gives their parameters, and come in through our loader.
"""

import dataclasses
import math

import pytest
import torch
from filling import fill, inputs
from test_official_pickles import Persistent, snapshot, wrapped
from torch import nn
from torch.nn import functional as F

from gan3d import ops
from gan3d.cameras import Camera, condition, intrinsics_from_fov, look_at, sphere_point
from gan3d.checkpoints import read_official
from gan3d.gans.voxgraf import (
    Background,
    Grid,
    VoxelImages,
    VoxGRAF,
    VoxGRAFDiscriminator,
    at,
    occupied_words,
    over,
    pose_of,
    total_variation,
)
from gan3d.nn.stylegan3 import Refinement
from gan3d.official.voxgraf import official_channels, official_generator, official_views
from gan3d.ramps import Ramp
from gan3d.rays import Bounds, Patch, Rays, camera_rays, full_grid
from gan3d.rebuild import CheckpointError

NEVER, NAMES = Ramp(0, 0, 0), {"foreground": "synthesis.generator_fg", "background": "synthesis.generator_bg",
                               "refinement": "synthesis.r16", "mappings": "mapping"}


def tiny(seed: int = 0, **changes) -> VoxGRAF:
    torch.manual_seed(seed)
    background = Background(w_dim=16, resolution=16, channel_base=64, channel_max=8, channel_min=4, clamp=256)
    numbers = dict(bounds=Bounds(0, 20), radius=1.2, centre=[0, 0, 0], z_dim=16, w_dim=16, mapping_depth=2,
                   grid_resolution=16, dense_resolution=16, channel_base=64, channel_max=16, channel_min=8, clamp=256,
                   density_gain=36, density_noise=NEVER, background=background, swap=NEVER, views=4,
                   refinement=Refinement(w_dim=16, width=8, depth=3), regularize_from=0, coverage_weight=0,
                   least_foreground=0.4, least_background=0.1, depth_variance_weight=0, sparsity_weight=0,
                   sparsity_scale=2.88, total_variation_weight=0)
    return VoxGRAF(**(numbers | changes))  # type: ignore[arg-type]


def bare(**changes) -> VoxGRAF:
    return tiny(**{"background": None, "refinement": None, **changes})


class Theirs(nn.Module):
    """Our parts under the release's names, with a buffer and a parameter that we do not keep."""

    def __init__(self, model: VoxGRAF):
        super().__init__()
        self.mapping, self.synthesis = model.mappings, nn.Module()
        for ours, name in (("foreground", "generator_fg"), ("background", "generator_bg"), ("refinement", "r16")):
            if getattr(model, ours) is not None:
                setattr(self.synthesis, name, getattr(model, ours))
        if model.background is not None:
            self.synthesis.generator_bg.b4.conv1.noise_strength = nn.Parameter(torch.zeros([]))
        self.synthesis.register_buffer("resample_filter", torch.ones(4, 4))


def filled(**changes) -> VoxGRAF:
    theirs = Theirs(tiny(1, **changes))
    fill(theirs)
    model = tiny(**changes).eval()
    model.load_state_dict({**official_generator(theirs.state_dict()), "views": torch.zeros(4, 25)})
    return model


def on_sphere(azimuth: list[float], polar: list[float], radius: float = 9.0, fov: float = 12.6) -> Camera:
    """Angles in degrees."""
    eye = sphere_point(torch.tensor(azimuth).deg2rad(), torch.tensor(polar).deg2rad(), radius)
    return Camera(look_at(eye, torch.zeros(3)), intrinsics_from_fov(fov).expand(len(azimuth), 3, 3))


def one(camera: Camera, i: int) -> Camera:
    return Camera(*(values[i:i + 1] for values in camera))


POSE = on_sphere([190], [85])


# The release's numbers


def test_cameras_and_rays_are_the_released_ones():
    expected = [[0.17365, -0.08583, 0.98106, -8.82954], [-0.98481, -0.01513, 0.17299, -1.55689],
                [0, -0.99619, -0.08716, 0.7844]]
    assert torch.allclose(pose_of(POSE), torch.tensor(expected).reshape(1, 12), atol=1e-5)  # five digits are given
    rays = camera_rays(POSE, full_grid(4, 4), Bounds(0, 20), (4, 4)).directions[0]
    assert torch.allclose(rays[0], torch.tensor([0.96718, 0.25405, -0.00464]), atol=1e-5)
    assert torch.allclose(rays[15], torch.tensor([0.98162, 0.08958, -0.16849]), atol=1e-5)


def dense_grid(raw_rgb: torch.Tensor, density: torch.Tensor) -> Grid:
    """Of one identity, from `[x y z c]`."""
    everything = ops.voxels_from_mask(torch.ones(density.shape[:3], dtype=torch.bool))
    values = ops.gather_voxels(torch.cat([raw_rgb, density], -1), everything)
    return Grid(torch.zeros(1, 6, 16), [everything], [values], [occupied_words(everything, values)], {})


def test_the_renderer_gives_the_released_numbers():
    model = bare().eval()
    grid = dense_grid(inputs([64, 3], 6).view(4, 4, 4, 3), 3 * inputs([64, 1], 5).view(4, 4, 4, 1))
    seen = model.render(grid, POSE, 3)
    depth = seen.depth / seen.opacity
    shown = torch.cat([seen.features[0, :, :3], seen.opacity[0, :, None], depth[0, :, None],
                       seen.features[0, :, 3:]], 1)
    assert torch.allclose(shown[4], torch.tensor([0.69772, 0.63933, 0.70859, 0.71871, 8.9425, 0.07293]), atol=1e-4)
    assert torch.allclose(shown[0], torch.tensor([0.55557, 0.66444, 0.71274, 0.91446, 8.45846, 0.58885]), atol=1e-4)


@pytest.mark.parametrize("dense, rows, density, colour, pixels, statistics", [
    (16, 4096, -16.87866, -0.38261, {0: -0.36984, -1: 1.31718}, {"mean": 0.22730, "std": 0.72249, "alpha": 0.29328,
                                                                 "depth": 5.05143}),
    (8, 2037, -7.85144, -0.23317, {0: -0.30336, 256: 0.23667, 384: 1.05244, -1: 1.42452},
     {"mean": 0.23609, "std": 0.64052, "alpha": 0.38169, "variance": 0.01951}),
])
def test_a_picture_is_the_released_one(dense, rows, density, colour, pixels, statistics):
    """At 8 pruned for the camera, sparse from there on. 1e-4: five digits are given."""
    model = filled(dense_resolution=dense)
    assert sum(p.numel() for p in model.parameters()) == 24_321 - 10  # without the strengths of noise never used
    with torch.no_grad():
        grid = model.grid(model.mapping(inputs([1, 16], 1), POSE), [POSE], side=16)
        images, seen = model.synthesis(grid, POSE, 16), model.render(grid, POSE, 16)
    table, flat = grid.values[0], images.rgb.flatten()
    assert len(table) == rows
    assert [table[:, 3].mean().item(), table[:, :3].mean().item()] == pytest.approx([density, colour], abs=1e-4)
    assert {i: flat[i].item() for i in pixels} == pytest.approx(pixels, abs=1e-4)
    found = {"mean": flat.mean(), "std": flat.std(correction=0), "alpha": images.opacity.mean(),
             "depth": (images.depth / images.opacity.clamp(min=1e-10)).mean(), "variance": seen.features[..., 3].mean()}
    assert {k: found[k].item() for k in statistics} == pytest.approx(statistics, abs=1e-4)


def test_a_foreground_alone_is_the_released_one():
    model = filled(dense_resolution=8, background=None, refinement=None)
    assert sum(p.numel() for p in model.parameters()) == 19_273 - 5
    with torch.no_grad():
        grid = model.grid(model.mapping(inputs([1, 16], 1), POSE), [POSE], side=16)
        assert model.synthesis(grid, POSE, 16).rgb.mean().item() == pytest.approx(0.56408, abs=1e-4)


@pytest.mark.parametrize("grid, side, faces, parameters, judge", [
    (128, 256, True, 28_174_480 - 11 - 13, 28_457_088), (128, 128, False, 27_799_896 - 11, 28_013_824),
    (32, 32, True, 27_703_683 - 7 - 7, 21_520_896)])
def test_sizes_are_the_released_ones_without_noise(grid, side, faces, parameters, judge):
    with torch.device("meta"):
        background = Background(w_dim=64, resolution=side, channel_base=2048, channel_max=64, channel_min=16, clamp=256)
        model = tiny(z_dim=64, w_dim=64, grid_resolution=grid, dense_resolution=32, channel_base=4000, channel_max=512,
                     channel_min=16, background=background if faces else None,
                     refinement=Refinement(w_dim=64, width=16, depth=3) if faces else None)
        discriminator = VoxGRAFDiscriminator(resolution=side, channel_base=32768, channel_max=512, mapping_depth=2,
                                             group=4)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for p in discriminator.parameters()) == judge


# Rendering


def slow_render(raw: torch.Tensor, rays: Rays, radius: float) -> list[torch.Tensor]:
    """A fixed number of steps, F.grid_sample, sums: rgb before white, opacity, depth, variance; one picture's rays."""
    side = raw.shape[0]
    step = radius / side
    t = rays.near[:, None] + step * torch.arange(4 * side)
    points = rays.origins[:, None] + t[..., None] * rays.directions[:, None]
    place = ((points / radius + 1) / 2 * side - 0.5).clamp(0, side - 1) / (side - 1) * 2 - 1
    found = F.grid_sample(raw.permute(3, 2, 1, 0)[None], place[None, None], align_corners=True)[0, :, 0]
    density, rgb = found[3].relu() * (t <= rays.far[:, None]), (0.28209479 * found[:3] + 0.5).relu()
    arriving = torch.exp(-F.pad(density * step, (1, 0)).cumsum(-1))
    weights = arriving[:, :-1] - arriving[:, 1:]
    opacity = weights.sum(-1)
    depth = (weights * t).sum(-1)
    mean = depth / opacity.clamp(min=1e-10)
    variance = (weights * (t - mean[:, None]).square()).sum(-1) / opacity.clamp(min=1e-10)
    return [(weights * rgb).sum(-1).T + (1 - opacity)[:, None], opacity, depth, variance]


def test_rendering_is_the_slow_one_in_values_and_gradients():
    """Skipping empty space changes nothing. 1e-4 of numbers around 1 to 10: float32 sums of dozens of samples."""
    model = bare(radius=1.0).eval()
    rng = torch.Generator().manual_seed(0)
    raw = torch.randn(8, 8, 8, 4, generator=rng)
    raw[..., 3] = 4 * raw[..., 3] - 3  # mostly empty
    raw.requires_grad_()
    camera = on_sphere([40], [60], radius=6, fov=40)
    rays = camera_rays(camera, full_grid(6, 6), model.bounds, (6, 6))
    hit = rays.far[0] > rays.near[0]
    assert hit.any() and not hit.all()
    flat = Rays(rays.origins[0, hit], rays.directions[0, hit], rays.near[0, hit], rays.far[0, hit])
    seen = model.render(dense_grid(raw[..., :3], raw[..., 3:]), camera, 6)
    mine = [x[0, hit] for x in (seen.features[..., :3], seen.opacity, seen.depth, seen.features[..., 3])]
    theirs = slow_render(raw, flat, 1.0)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    gradients = [torch.autograd.grad(sum((x * k).sum() for k, x in enumerate(each, 1)), raw)[0]
                 for each in (mine, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-3)
    assert gradients[0].abs().max() > 1
    assert (seen.features[0, ~hit] == torch.tensor([1.0, 1, 1, 0])).all() and not seen.opacity[0, ~hit].any()


def test_a_slab_takes_as_much_light_as_its_thickness_says():
    """A density of 1 per half cube, seen straight on: 1 − e^−2, but for half a step."""
    model = bare(radius=0.5, density_gain=1).eval()
    grid = dense_grid(torch.zeros(16, 16, 16, 3), torch.full((16, 16, 16, 1), model.density_gain))
    seen = model.render(grid, on_sphere([0], [90], radius=5, fov=2), 4)
    assert torch.allclose(seen.opacity, torch.tensor(-math.expm1(-2)), atol=0.01)
    uniform = torch.linspace(0, 1, 10_001)
    weights = torch.exp(-2 * uniform)
    mean = (weights * uniform).sum() / weights.sum()
    variance = (weights * (uniform - mean).square()).sum() / weights.sum()
    assert torch.allclose(seen.features[..., 3], variance, atol=0.005)
    assert torch.allclose(seen.depth / seen.opacity, 4.5 + mean, atol=0.02)


def test_the_cube_may_stand_anywhere():
    """Cube and camera moved by as much: the same picture. Rays in float32, some units from the origin."""
    shift = torch.tensor([0.5, -2.0, 1.0])
    pose = POSE.camera_to_world.clone()
    pose[:, :3, 3] += shift
    pictures = []
    for centre, camera in (([0, 0, 0], POSE), (shift.tolist(), Camera(pose, POSE.intrinsics))):
        model = bare(seed=3, centre=centre).eval()
        with torch.no_grad():
            pictures.append(model.synthesis(model.mapping(inputs([1, 16], 1)), camera, 8).rgb)
    torch.testing.assert_close(*pictures, atol=1e-3, rtol=0)


def test_edges_are_lighter_as_released():
    """The foreground comes before white already, and is multiplied by its opacity once more."""
    rgb, behind = torch.full((1, 3, 8, 8), 0.75), {8: torch.full((1, 3, 8, 8), -1.0)}
    assert torch.equal(over(rgb, torch.full((1, 8, 8), 0.5), behind), torch.full((1, 3, 8, 8), 0.375))
    assert torch.equal(over(rgb, torch.zeros(1, 8, 8), {}), rgb)


def test_backgrounds_fit_pictures_of_any_side():
    model = tiny().eval()
    with torch.no_grad():
        grid = model.prepare(model.mapping(inputs([2, 16], 1)))
        assert sorted(grid.backgrounds) == [4, 8, 16]
        for side in (6, 8, 24):
            assert over(torch.zeros(2, 3, side, side), torch.zeros(2, side, side), grid.backgrounds).shape[-1] == side
        small = model.background(grid.ws[:, model.foreground.num_ws:], 5)
    assert sorted(small) == [4, 8] and torch.equal(small[8], grid.backgrounds[8])


# Pruning


def test_pruning_takes_nothing_that_its_camera_sees():
    """A picture as wide as the grid is made of what is kept. 1e-5: light below 1e-7 is given up, and sums round."""
    model = filled(background=None, refinement=None)
    with torch.no_grad():
        ws = model.mapping(inputs([1, 16], 1), POSE)
        whole, part = (model.grid(ws, [POSE], prune_last=last, side=16) for last in (False, True))
        assert len(part.values[0]) < 0.7 * len(whole.values[0])
        torch.testing.assert_close(model.synthesis(part, POSE, 16).rgb, model.synthesis(whole, POSE, 16).rgb,
                                   atol=1e-5, rtol=0)


def kept(model: VoxGRAF, density: torch.Tensor, camera: Camera) -> set[int]:
    """Places in raster order."""
    everything = ops.voxels_from_mask(torch.ones(density.shape, dtype=torch.bool))
    table = ops.gather_voxels(density[..., None], everything)[:, 0]
    return set(ops.mask_of(model.prune(everything, table, camera).voxels).flatten().nonzero()[:, 0].tolist())


def nobody() -> Camera:
    return Camera(torch.zeros(0, 4, 4), torch.zeros(0, 3, 3))


def test_what_is_dense_and_seen_stays_with_its_neighbours():
    model, density = bare(), torch.full((16, 16, 16), -1.0)
    density[4:6] = 1000.0  # a wall across x
    density[12] = 1.0  # hidden by the wall from the first camera
    cameras, place = on_sphere([180, 0], [90, 90]), torch.arange(16**3).view(16, 16, 16)
    first, second = (kept(model, density, one(cameras, i)) for i in (0, 1))
    assert first >= set(place[3:6, 2:14, 2:14].flatten().tolist())  # a picture does not show the cube's edges
    assert not first & set(place[11:].flatten().tolist())
    assert second >= set(place[11:14, 2:14, 2:14].flatten().tolist())
    assert not (first | second) & set(place[7:11].flatten().tolist())
    assert kept(model, density, cameras) == first | second
    assert kept(model, density, nobody()) >= first | second  # nobody looks: all counts as seen


def test_pruning_leaves_ten_voxels_at_least_and_seventy_percent_at_most():
    model, rng = bare(), torch.Generator().manual_seed(0)
    empty = -torch.rand(8, 8, 8, generator=rng) - 0.1
    assert len(kept(model, empty, POSE)) == 10
    full = torch.rand(8, 8, 8, generator=rng) + 0.1
    left = kept(model, full, nobody())
    assert left == set(full.flatten().topk(round(0.7 * 512)).indices.tolist())


def test_training_remembers_its_latest_cameras_and_evaluation_prunes_by_them():
    model = bare(views=3, dense_resolution=8).train()
    cameras = on_sphere([10, 20], [80, 90])
    for _ in range(2):
        model.synthesis(model.mapping(inputs([2, 16], 1), cameras), cameras, 4)
    expected = condition(cameras)
    assert torch.equal(model.views, torch.cat([expected, expected[:1]]))
    lately = model.eval().lately_used()
    assert torch.equal(lately.camera_to_world[:2], cameras.camera_to_world)
    with torch.no_grad():
        ws = model.mapping(inputs([1, 16], 1))
        grid, expected_grid = model.prepare(ws), model.grid(ws, [lately], side=16)
        unpruned = model.grid(ws, [nobody()], side=16)
    assert torch.equal(grid.values[0], expected_grid.values[0])
    assert len(grid.values[0]) != len(unpruned.values[0])


# Promises of a generator


def test_voxels_are_made_once_for_all_views(monkeypatch):
    model = tiny(dense_resolution=8).eval()
    with torch.no_grad():
        ws = model.mapping(inputs([2, 16], 1), on_sphere([170, 190], [80, 85]))
        grid = model.prepare(ws)
        cameras = on_sphere([150, 200], [70, 95])
        whole = model.synthesis(ws, cameras, 12)
        for part in (model.foreground, model.background, model.mappings):
            monkeypatch.setattr(part, "forward", None)
        again = model.synthesis(grid, cameras, 12)
    assert torch.equal(whole.rgb, again.rgb) and type(whole) is not VoxelImages


def test_training_prunes_for_the_camera_that_is_rendered():
    model, cameras = bare(dense_resolution=8).train(), on_sphere([170, 190], [80, 85])
    ws = model.mapping(inputs([2, 16], 1), cameras)
    assert model.prepare(ws) is ws
    images = model.synthesis(model.prepare(ws), cameras, 8)
    assert isinstance(images, VoxelImages) and set(images.scalars) == {"coverage", "voxels"}
    grid = model.grid(ws, [one(cameras, i) for i in range(2)], side=8)
    assert all(torch.equal(a, b) for a, b in zip(images.grid.values, grid.values, strict=True))


def test_the_mapping_sees_its_own_camera_or_another_of_the_batch():
    model, cameras, z = tiny(swap=Ramp(1, 0, 10)), on_sphere([170, 190, 20], [80, 85, 60]), inputs([3, 16], 1)
    other = Camera(*(values.roll(1, 0) for values in cameras))
    own = model.eval().mapping(z, cameras)
    model.train().before_step(10)
    assert torch.equal(model.mapping(z, cameras), own)
    model.before_step(0)
    swapped = model.mapping(z, cameras)
    assert torch.equal(swapped, model.eval().mapping(z, other)) and not torch.equal(swapped, own)
    count = model.foreground.num_ws
    assert torch.equal(swapped[:, count:], own[:, count:])  # backgrounds know no camera


def test_truncation_moves_both_latents_towards_their_means():
    model = tiny().eval()
    for network in model.mappings.values():
        nn.init.normal_(network.w_avg)
    z = inputs([2, 16], 1)
    means = torch.cat([n.w_avg.expand(n.num_ws, -1) for n in model.mappings.values()])
    torch.testing.assert_close(model.mapping(z, POSE, 0.3), means.lerp(model.mapping(z, POSE), 0.3))


def test_the_field_is_the_voxels():
    model = bare(centre=[0, 1, 0]).eval()
    with torch.no_grad():
        grid = model.prepare(model.mapping(inputs([2, 16], 1)))
        places = ops.positions_of(grid.voxels[1])[:5]
        points = (places + 0.5) / 16 * 2.4 - 1.2 + torch.tensor([0, 1, 0])
        density, rgb = model.field(grid)(points.expand(2, 1, 5, 3), torch.zeros(2, 1, 1, 3))
        outside, _ = model.field(grid)(torch.full((2, 1, 1, 3), 2.5), torch.zeros(2, 1, 1, 3))
    torch.testing.assert_close(density[1, 0], grid.values[1][:5, 3], atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(rgb[1, 0], (0.28209479 * grid.values[1][:5, :3] + 0.5).clamp(0, 1), atol=1e-4, rtol=0)
    assert not outside.any()


def test_a_stage_uses_the_blocks_of_its_sides_and_no_others():
    model = tiny(grid_resolution={0: 8, 5: 16}, dense_resolution=4).train()
    for step, side, idle in ((4, 8, {"b16"}), (5, 16, set())):
        model.before_step(step)
        model.zero_grad()
        images = model.synthesis(model.mapping(inputs([2, 16], 1), on_sphere([170, 190], [80, 85])),
                                 on_sphere([170, 190], [80, 85]), side)
        assert images.grid.voxels[0].resolution == (side,) * 3
        images.rgb.square().mean().backward()
        for network in (model.foreground, model.background):
            unused = {name.split(".")[0] for name, p in network.named_parameters() if p.grad is None}
            assert unused == idle
    assert "progress" in model.state_dict() and [at({0: 1, 5: 2}, s) for s in (0, 4, 5, 9)] == [1, 1, 2, 2]


def test_the_discriminator_of_a_lower_stage_is_the_lower_part():
    torch.manual_seed(0)
    numbers = {"channel_base": 64, "channel_max": 8, "mapping_depth": 2, "group": 2}
    large, small = (VoxGRAFDiscriminator(resolution=side, **numbers) for side in (16, 8))
    small.load_state_dict({name: p for name, p in large.state_dict().items() if not name.startswith("b16.")})
    picture, camera = torch.randn(2, 3, 8, 8), on_sphere([170, 190], [80, 85])
    assert torch.equal(large(picture, camera=camera).logit, small(picture, camera=camera).logit)
    turned = Camera(*(values.flip(0) for values in camera))
    assert not torch.allclose(large(picture, camera=turned).logit, large(picture, camera=camera).logit)
    with pytest.raises(ValueError, match="camera"):
        large(picture)
    with pytest.raises(ValueError, match="sides"):
        large(torch.randn(2, 3, 12, 12), camera=camera)


def test_patches_are_refused():
    with pytest.raises(ValueError, match="patch"):
        tiny().synthesis(torch.zeros(1, 12, 16), POSE, 16, Patch(torch.ones(1), torch.zeros(1, 2), 4))


@pytest.mark.parametrize("seen", [False, True])
def test_cost_counts_the_samples_of_a_camera_seen_or_all_in_the_cube(seen):
    model = bare().eval()
    nn.init.constant_(model.foreground.b16.torgb.bias, -200)  # nothing is dense: no sample is taken
    if seen:
        model.views[:1] = condition(POSE)
    cost = model.cost(8)
    assert cost.rays == 64 and cost.flops_per_sample > 100 and cost.flops_fixed > 1e5
    assert cost.samples_per_ray == (0 if seen else 32)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert tiny().cost(16).flops_fixed > model.cost(8).flops_fixed == cost.flops_fixed
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# Losses


def some_images(**changes) -> VoxelImages:
    opacity = torch.tensor([0.2, 0.95]).view(2, 1, 1).expand(2, 4, 4)
    density = torch.tensor([[-1.0], [0.5], [2.0], [1.0]])
    voxels = ops.voxels_from_mask(torch.zeros(4, 4, 4, dtype=torch.bool).index_fill(2, torch.tensor([1]), True)
                                  & (torch.arange(64).view(4, 4, 4) < 16))
    grid = Grid(torch.zeros(2, 1, 1), [voxels] * 2, [F.pad(density, (3, 0))] * 2, [voxels.words] * 2, {})
    picture = torch.zeros(2, 3, 4, 4)
    images = VoxelImages(picture, picture, opacity, opacity, torch.full((2, 4, 4), 0.7), grid)
    return dataclasses.replace(images, **changes)


def losses(images: VoxelImages, step: int = 0, **changes) -> dict[str, float]:
    found = bare(**changes).train().regularizers(torch.zeros(2, 1, 1), POSE, images, step)
    return {name: value.item() for name, value in found.items()}


def test_coverage_asks_for_some_foreground_and_some_background():
    """0.4 − 0.2 of the first picture, 0.1 − 0.05 of the second, in the mean."""
    assert losses(some_images(), coverage_weight=3) == {"reg_coverage": pytest.approx(3 * (0.2 + 0.05) / 2)}


def test_depths_may_vary_over_three_half_voxels():
    """16 pixels; the grid has 4³ voxels, whose half is a quarter of half the cube's side. Opacity is not pulled."""
    opacity = some_images().opacity.clone().requires_grad_()
    variance = torch.tensor([0.7, 0.3]).view(2, 1, 1).repeat(1, 4, 4).requires_grad_()
    images = some_images(opacity=opacity, variance=variance)
    expected = 16 * (0.7 * 0.2 + (3 / 4) ** 2 * 0.95) / 2
    model = bare(depth_variance_weight={0: 0, 5: 2}).train()
    assert model.regularizers(torch.zeros(2, 1, 1), POSE, images, 4) == {}
    loss = model.regularizers(torch.zeros(2, 1, 1), POSE, images, 5)["reg_depth_variance"]
    assert loss.item() == pytest.approx(2 * expected)
    loss.backward()
    assert opacity.grad is None and variance.grad[0].min() > 0 and not variance.grad[1].any()


def test_densities_are_few_and_even():
    """Cauchy's loss of densities per half cube (1.2 units), and differences of raw ones, missing voxels being 0."""
    positive = [0.5, 2.0, 1.0]
    expected = sum(math.log1p(2 * d**2) for d in positive)  # 2.88 / 1.2² a unit
    found = losses(some_images(), sparsity_weight=2, sparsity_scale=2 / 1.2**2, total_variation_weight=5)
    assert found["reg_sparsity"] == pytest.approx(2 * expected)
    gain = 36 / 1.2
    row = torch.tensor([-1.0, 0.5, 2.0, 1.0]) / gain  # along y, alone along x and z
    after = torch.cat([row[1:], torch.zeros(1)])
    length = ((after - row).square() + 2 * row.square() + 1e-9).sqrt().mean()
    assert found["reg_total_variation"] == pytest.approx(5 * length.item(), rel=1e-5)


def test_total_variation_of_a_ramp_is_its_slope():
    everything = ops.voxels_from_mask(torch.ones(8, 8, 8, dtype=torch.bool))
    x = ops.positions_of(everything).float()
    each = torch.where((x[:, 0] < 7) & (x[:, 1] < 7) & (x[:, 2] < 7), 1.0, 0.0)
    ramp = x @ torch.tensor([1.0, 2.0, 2.0])
    inner = total_variation(everything, ramp)
    assert inner > each.mean() * 3  # 3 inside, more at the far faces, behind which there is nothing


def test_losses_begin_at_their_step_and_end_with_training():
    changes = {"coverage_weight": 1, "regularize_from": 7}
    assert losses(some_images(), 6, **changes) == {} and "reg_coverage" in losses(some_images(), 7, **changes)
    model = tiny(coverage_weight=1).eval()
    with torch.no_grad():
        images = model.synthesis(model.mapping(inputs([1, 16], 1)), POSE, 8)
    assert model.regularizers(torch.zeros(1, 1, 1), POSE, images, 7) == {}


def test_density_noise_fades_and_is_training_s_alone():
    model, ws = bare(density_noise=Ramp(1, 0, 10)), torch.zeros(1, 6, 16)

    def densities() -> torch.Tensor:
        with torch.no_grad():
            return model.grid(ws, [nobody()], side=8).values[0][:, 3] / model.density_gain

    model.eval()
    clean = densities()
    model.train()
    assert (densities() - clean).std().item() == pytest.approx(1, abs=0.05)  # of 4096 numbers: ±0.011
    model.before_step(5)
    assert (densities() - clean).std().item() == pytest.approx(0.5, abs=0.03)
    model.before_step(10)
    assert torch.equal(densities(), clean)


# The authors' files


def test_cameras_come_out_of_the_released_list():
    poses = torch.eye(4).repeat(31, 1, 1)
    poses[:, 0, 3] = torch.arange(31.0)
    faces = official_views({"synthesis.pose_sampler.poses": poses, "synthesis.generator_bg.b4.const": poses})
    cars = official_views({"synthesis.pose_sampler.poses": poses})
    assert torch.equal(faces[:, 3], torch.arange(0, 31, 2.0))
    assert torch.equal(faces[0, 16:], intrinsics_from_fov(12.6).flatten())
    assert torch.equal(cars[0, 16:], intrinsics_from_fov(30).flatten())
    assert not official_views({}).any()


def test_foreign_tensors_are_refused():
    with pytest.raises(ValueError, match="no part"):
        official_generator({"synthesis.superresolution.weight": torch.zeros(1)})


def test_widths_are_understood_as_numbers_divided_by_resolutions():
    released = {4: 512, 8: 500, 16: 250, 32: 125, 64: 62, 128: 31}
    assert official_channels(released) == {"channel_base": 4000, "channel_max": 512, "channel_min": 31}
    behind = {4: 64, 8: 64, 16: 64, 32: 64, 64: 32, 128: 16, 256: 16}
    assert official_channels(behind) == {"channel_base": 2048, "channel_max": 64, "channel_min": 16}
    with pytest.raises(CheckpointError, match="feature maps"):
        official_channels({4: 16, 8: 4, 16: 9})


def pickled_model(their, model: VoxGRAF, **renderer) -> Persistent:
    """Our parts in the wrapping of the release's classes."""
    theirs = Theirs(model)
    options = their.plain()
    options.__dict__.update(step_size=0.5, near_clip=0.0, background_brightness=1, sigma_thresh=1e-8)
    empty = {"_parameters": {}, "_buffers": {}, "_modules": {}}
    parts = {"renderer": Persistent(their, "Renderer", {
        **empty, "grid_radius": torch.full((3,), model.radius), "grid_center": torch.zeros(3), "fov": 12.6,
        "basis_dim": 1, "opt": options, **renderer})}
    for name, module in theirs.synthesis.named_children():
        own = {"grid_resolution": 16, "dense_resolution": 8} if name == "generator_fg" else {}
        parts[name] = wrapped(their, module, **own)
        for r in (4, 8, 16) if name == "generator_fg" else ():
            block = parts[name].state["_modules"][f"b{r}"].state["_modules"]
            for layer in block.values():
                layer.state["conv_clamp"] = 256
            if r >= 8:  # a part that is pickled without a state
                block["pruning"] = Persistent(their, "PruningLayer", {**empty, "_modules": {"_pruning": their.plain()}})
    for i, layer in enumerate(parts["r16"].state["_modules"]["layers"].state["_modules"].values()):
        layer.state |= {"conv_clamp": 256, "is_critically_sampled": i >= 0}
    synthesis = Persistent(their, "SynthesisNetwork", {**empty, "_modules": parts, "img_resolution": 16,
                                                       "use_bg": True, "sigma_mpl": 30})
    return Persistent(their, "Generator", {**empty, "z_dim": 16, "_modules": {
        "synthesis": synthesis, "mapping": wrapped(their, theirs.mapping)}})


def test_a_released_file_states_its_numbers(tmp_path):
    """Persistent classes keep their settings; the model they describe takes the weights."""
    model = tiny(dense_resolution=8)
    path = snapshot(tmp_path / "ffhq16.pkl", lambda their: {"G_ema": pickled_model(their, model)})
    strange = snapshot(tmp_path / "strange.pkl", lambda their: {"G_ema": pickled_model(their, model, basis_dim=4)})
    official = read_official(path, "voxgraf")
    numbers = official.numbers["model"]["generator"]
    assert numbers["density_gain"] == pytest.approx(36) and numbers["radius"] == 1.2 and numbers["clamp"] == 256
    assert {k: numbers[k] for k in ("channel_base", "channel_max", "channel_min", "grid_resolution", "w_dim")} == {
        "channel_base": 64, "channel_max": 16, "channel_min": 8, "grid_resolution": 16, "w_dim": 16}
    assert numbers["refinement"]["width"] == 8 and numbers["background"]["channel_max"] == 8
    assert official.numbers["data"]["poses"]["fov_degrees"] == 12.6
    other = tiny(5, dense_resolution=8, views=16)
    other.load_state_dict(official.weights["generator_ema"])
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    with pytest.raises(CheckpointError, match="basis_dim"):
        read_official(strange, "voxgraf")
