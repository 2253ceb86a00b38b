import pytest
import torch
from ball import Ball, ball_poses
from hydra.utils import instantiate
from test_methods import composed
from tiny import COMMON, SIDE, TINY

from gan3d import pictures, views
from gan3d.cameras import Camera
from gan3d.poses import Gaussian, Spherical
from gan3d.rays import camera_rays, full_grid


@pytest.mark.parametrize("given, expected", [
    ("0-3", [0, 1, 2, 3]), ("7", [7]), (5, [5]), ("0-2+7", [0, 1, 2, 7]), ([3, 1], [3, 1]), ("1, 4-5", [1, 4, 5]),
])
def test_seeds_are_read(given, expected):
    assert views.parse_seeds(given) == expected


@pytest.mark.parametrize("given", ["a-b", "", "3-1", "-4"])
def test_seeds_that_mean_nothing_are_refused(given):
    with pytest.raises(ValueError, match="seeds"):
        views.parse_seeds(given)


@pytest.mark.smoke
def test_a_seed_is_the_same_latent_whatever_is_drawn_beside_it():
    ball = Ball()
    assert torch.equal(views.draw_latents(ball, [4, 5])[1], views.draw_latents(ball, [5])[0])
    assert not torch.equal(*views.draw_latents(ball, [4, 5]))


@pytest.mark.smoke
def test_looking_leaves_the_random_state_and_gradients_alone():
    ball, poses = Ball(), ball_poses()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    z = views.draw_latents(ball, range(2))
    views.samples(ball, poses, z, 8)
    list(views.orbit(ball, z, poses.path(3), 8))
    list(views.interpolate(ball, z, 3, poses.path(1), 8))
    views.probe_density(ball, z, poses.sample(2, torch.Generator()), ball.bounds)
    assert torch.equal(torch.get_rng_state(), before)
    assert ball.calls and not any(grad for _, grad in ball.calls)


def test_the_random_state_is_put_back_between_two_frames():
    ball, poses = Ball(), ball_poses()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    film = views.orbit(ball, views.draw_latents(ball, [0]), poses.path(3), 8)
    drawn = []
    for _ in film:
        drawn.append(torch.rand(()))
        assert torch.is_grad_enabled()
    assert torch.equal(torch.stack(drawn), expected)


def test_pictures_are_asked_for_a_few_at_a_time():
    ball, poses = Ball(), ball_poses()
    camera = poses.sample(5, torch.Generator().manual_seed(0))
    ws = views.draw_latents(ball, range(5))
    whole = views.photograph(ball, ws, camera, 16, pixels_per_call=10**6)
    parts = views.photograph(ball, ws, camera, 16, pixels_per_call=2 * 16**2)
    assert [n for n, _ in ball.calls] == [5, 2, 2, 1]
    assert torch.allclose(whole.rgb, parts.rgb, atol=1e-6) and torch.allclose(whole.depth, parts.depth, atol=1e-6)


def test_one_camera_serves_all_objects_and_one_object_all_cameras():
    ball, poses = Ball(), ball_poses()
    ws, cameras = views.draw_latents(ball, range(3)), poses.path(3)
    assert views.photograph(ball, ws, cameras[:1], 4).rgb.shape == (3, 3, 4, 4)
    assert views.photograph(ball, ws[:1], cameras, 4).rgb.shape == (3, 3, 4, 4)


def test_truncation_to_zero_makes_all_objects_one():
    ball = Ball()
    ws = views.map_latents(ball, views.draw_latents(ball, range(2)), truncation_psi=0.0)
    assert torch.equal(ws, torch.zeros(2, 3))


def test_orbit_frames_show_objects_side_by_side_above_their_depth():
    ball, poses = Ball(), ball_poses()
    ws = torch.tensor([[9.0, -9.0, -9.0], [-9.0, -9.0, 9.0]])  # a red ball and a blue one, on white
    film = list(views.orbit(ball, ws, poses.path(5), 16))
    assert len(film) == 5 and film[0].shape == (2 * 18 + 2, 2 * 18 + 2, 3)
    red, blue = film[2][10, 10], film[2][10, 28]
    assert red[0] > 240 and red[2] < 20 and blue[2] > 240 and blue[0] < 20
    depth = film[2][20:36, 2:18]
    assert (depth[0, 0] == pictures.NEUTRAL).all()  # the corner is empty
    assert depth[8, 8].float().mean() > depth[8, 3].float().mean()  # the ball's front is nearer than its side
    assert next(iter(views.orbit(ball, ws, poses.path(5), 16, depth=False))).shape == (20, 38, 3)


def test_depth_colours_mean_the_same_in_every_frame():
    ball = Ball()
    near, far = ball_poses().path(1), ball_poses().path(1)
    far.camera_to_world[:, :3, 3] *= 1.2  # the camera steps back in the last frame
    cameras = type(near)(torch.cat([near.camera_to_world, far.camera_to_world]), near.intrinsics.expand(2, -1, -1))
    first, last = views.orbit(ball, torch.zeros(1, 3), cameras, 16)
    assert first[20 + 8, 10].float().mean() > last[20 + 8, 10].float().mean() + 10


def test_spherical_interpolation_closes_and_keeps_the_length():
    keys = torch.nn.functional.normalize(torch.randn(3, 64, generator=torch.Generator().manual_seed(0)), dim=-1) * 8
    walk = views.interpolate_latents(keys, 12)
    assert torch.allclose(walk[[0, 4, 8]], keys, atol=1e-5)
    assert torch.allclose(walk.norm(dim=-1), torch.full((12,), 8.0), atol=1e-4)
    steps = (walk.roll(-1, 0) - walk).norm(dim=-1)
    assert torch.allclose(steps[:4], steps[:1].expand(4), atol=1e-4)  # even between two keys


def test_interpolation_of_equal_or_single_keys_stands_still():
    key = torch.tensor([[1.0, 2.0, 3.0]])
    assert torch.allclose(views.interpolate_latents(key, 5), key.expand(5, 3))
    assert torch.allclose(views.interpolate_latents(key.expand(2, 3), 5), key.expand(5, 3))


def test_spline_through_two_keys_goes_to_and_fro():
    keys = torch.tensor([[0.0, 0.0], [2.0, 4.0]])
    walk = views.interpolate_latents(keys, 4, spherical=False)
    assert torch.allclose(walk, torch.tensor([[0.0, 0.0], [1.0, 2.0], [2.0, 4.0], [1.0, 2.0]]), atol=1e-6)
    assert torch.allclose(views.interpolate_latents(keys[1:], 3, spherical=False), keys[1:].expand(3, 2))


def test_spline_through_points_of_a_circle_is_almost_the_circle():
    angle = 2 * torch.pi * torch.arange(8) / 8
    walk = views.interpolate_latents(torch.stack([angle.cos(), angle.sin()], -1), 800, spherical=False)
    # a cubic spline errs by 5/384·h⁴ = 0.005 for h = 2π/8; a straight chord would come within cos(π/8) = 0.92
    assert (walk.norm(dim=-1) - 1).abs().max() < 0.005
    steps = walk.roll(-1, 0) - walk
    assert (steps.roll(-1, 0) - steps).norm(dim=-1).max() < 1.1 * (2 * torch.pi / 800) ** 2  # no kink, nor at the end


@pytest.mark.parametrize("space", ["z", "w"])
def test_interpolation_passes_through_its_keys(space):
    ball, poses = Ball(), ball_poses()
    z = views.draw_latents(ball, [0, 1])
    film = list(views.interpolate(ball, z, 4, poses.path(1), 8, space=space))
    keys = pictures.to_uint8(views.photograph(ball, z, poses.path(1), 8).rgb)
    assert torch.equal(film[0], keys[0].permute(1, 2, 0)) and torch.equal(film[2], keys[1].permute(1, 2, 0))


class Listening(Ball):
    """Remembers what the mapping network was shown."""

    def mapping(self, z, camera_condition=None, truncation_psi=1.0):
        self.shown = [*getattr(self, "shown", []), camera_condition.camera_to_world]
        return super().mapping(z, camera_condition, truncation_psi)


@pytest.mark.parametrize("space", ["z", "w"])
def test_the_mapping_sees_one_camera_while_the_view_moves(space):
    ball, poses = Listening(), ball_poses()
    condition = poses.path(7)[3:4]
    list(views.interpolate(ball, torch.eye(3), 6, poses.path(6), 4, space=space, camera_condition=condition))
    views.samples(ball, poses, torch.eye(3), 4, camera_condition=condition)
    assert len(ball.shown) == 2 and all(torch.equal(seen, condition.camera_to_world.expand(len(seen), -1, -1))
                                        for seen in ball.shown)


def test_the_frontal_camera_is_the_middle_of_the_prior():
    poses = Spherical(radius=1.0, azimuth=Gaussian(90, 17), polar=Gaussian(80, 9), fov_degrees=12, up="y")
    polar, azimuth = torch.rad2deg(poses.angles(views.frontal(poses)))[0].tolist()
    # the nearest of 1000 draws; the mean direction lies somewhat below, where less of the swing is lost to cosines
    assert abs(azimuth - 90) < 3 and abs(polar - 80) < 3


def test_where_cameras_stand_all_around_the_path_begins_with_the_frontal_one():
    assert torch.equal(views.frontal(ball_poses()).camera_to_world, ball_poses().path(1).camera_to_world)


def test_turns_come_back_to_where_they_began():
    cameras = views.turns(ball_poses(), 30, 10)
    azimuth = torch.rad2deg(ball_poses().angles(cameras)[:, 1])
    steps = (azimuth.roll(-1) - azimuth) % 360
    assert torch.allclose(steps, torch.full((30,), 36.0), atol=1e-3)  # three even turns, the last step closes
    assert len(views.turns(ball_poses(), 4, 100).camera_to_world) == 4


def test_mixing_takes_early_styles_from_the_row_and_late_ones_from_the_column():
    coarse, fine = torch.tensor([[1.0], [2.0]]).expand(2, 5)[..., None], torch.full((3, 5, 1), 9.0)
    mixed = views.mix(coarse, fine, 2)
    assert mixed.shape == (2, 3, 5, 1)
    assert mixed[1, 2, :, 0].tolist() == [2, 2, 9, 9, 9] and mixed[0, 0, :, 0].tolist() == [1, 1, 9, 9, 9]
    assert torch.equal(views.mix(coarse, fine), mixed)  # half of five is two


@pytest.mark.parametrize("ws, layer, words", [
    (torch.zeros(2, 6), None, "none to exchange"), (torch.zeros(2, 1, 6), None, "none to exchange"),
    (torch.zeros(2, 4, 6), 0, "between 1 and 3"), (torch.zeros(2, 4, 6), 4, "between 1 and 3"),
])
def test_what_cannot_be_mixed_is_said(ws, layer, words):
    with pytest.raises(ValueError, match=words):
        views.mix(ws, ws, layer)


def test_truncation_has_a_row_an_object_and_a_column_a_psi():
    ball, camera = Ball(), ball_poses().path(1)
    z = torch.tensor([[9.0, -9.0, -9.0], [-9.0, -9.0, 9.0]])
    seen = views.truncation(ball, z, [1.0, 0.0], camera, 8)
    assert seen.shape == (2, 2, 3, 8, 8)
    centre = seen[..., 4, 4]
    assert centre[0, 0, 0] > 0.9 and centre[1, 0, 2] > 0.9  # red, blue
    assert centre[:, 1].abs().max() < 0.1  # psi 0: the mean, grey


@pytest.fixture
def counted_eg3d():
    """A tiny EG3D whose backbone counts its calls."""
    config = composed("model=eg3d", *COMMON, *TINY["eg3d"])
    torch.manual_seed(0)
    generator = instantiate(config["model"]["generator"], _convert_="all").eval()
    calls = []
    generator.backbone.synthesis.register_forward_hook(lambda *_: calls.append(1))
    return generator, instantiate(config["model"]["poses"], _convert_="all"), calls


def test_a_turning_object_asks_the_backbone_once(counted_eg3d):
    generator, poses, calls = counted_eg3d
    ws = views.map_latents(generator, views.draw_latents(generator, [0, 1]), views.frontal(poses))
    assert len(list(views.orbit(generator, ws, poses.path(5), SIDE))) == 5
    assert len(calls) == 2


def test_a_turning_mixing_table_asks_the_backbone_once_an_object(counted_eg3d):
    generator, poses, calls = counted_eg3d
    ws = views.map_latents(generator, views.draw_latents(generator, range(4)), views.frontal(poses))
    film = list(views.mixing(generator, ws[:1], ws[1:], None, poses.path(3), SIDE))
    assert len(calls) == 1 + 3 + 3
    pad, cell = 2, SIDE + 2
    table = film[0][pad:, pad:].unflatten(0, (2, cell)).unflatten(2, (4, cell)).movedim(2, 1)[:, :, :SIDE, :SIDE]
    assert len(film) == 3 and (table[0, 0] == 255).all()
    alone = pictures.to_uint8(views.photograph(generator, ws, poses.path(3)[:1], SIDE).rgb).permute(0, 2, 3, 1)
    for place, source in (((1, 0), 0), ((0, 1), 1), ((0, 3), 3)):
        # a picture alone or in a batch: the last bit of float32 may differ, and truncation shows it
        assert (table[place].int() - alone[source].int()).abs().max() <= 1
    assert (table[1, 1].int() - table[1, 0].int()).abs().max() > 1  # its fine styles are another's


def test_normals_of_a_ball_point_away_from_its_centre():
    ball, poses = Ball(samples_per_ray=256), ball_poses()
    cameras = poses.path(2)
    seen = views.photograph(ball, torch.zeros(2, 3), cameras, 64)
    normals = views.normals(seen, cameras)
    ahead = Camera(torch.eye(4).expand(2, 4, 4), cameras.intrinsics)
    rays = camera_rays(ahead, full_grid(64, 64), ball.bounds, (64, 64))
    along = rays.directions[..., 2] * 2.0  # the centre is 2 ahead; quadratic for the first hit of a sphere of 0.5
    root = along**2 - (2.0**2 - 0.5**2)
    inner = root > 0.08  # away from the outline, where one pixel spans much depth
    points = rays.directions * (along - root.clamp_min(0).sqrt())[..., None]
    exact = torch.nn.functional.normalize(points - torch.tensor([0.0, 0.0, 2.0]), dim=-1)
    cosine = (normals.flatten(1, 2) * exact).sum(-1)[inner]
    assert len(cosine) > 500 and cosine.min() > 0.95  # depth comes in steps of 1/128, pixels are 0.02 wide


def test_probed_density_is_that_of_the_field():
    ball, poses = Ball(), ball_poses()
    cameras = poses.sample(4, torch.Generator().manual_seed(0))
    values = views.probe_density(ball, torch.zeros(4, 3), cameras, ball.bounds, points=4000)
    assert len(values) == 4000
    assert values.max() <= 200 * 0.5 and values.max() > 60  # 200·(radius − distance from the centre)
    assert values.min() < -100  # most of the space is empty
    again = views.probe_density(ball, torch.zeros(4, 3), cameras, ball.bounds, points=4000)
    assert torch.equal(values, again)
