"""Rendering: rays that miss, chunks, normals: each shortcut must equal the long way."""

import math

import pytest
import torch

from gan3d.cameras import Camera, intrinsics_from_fov, look_at, mirror
from gan3d.rays import Bounds, Rays, camera_rays, full_grid
from gan3d.rendering import density_normals, depth_normals, points_along, query, render_chunks, render_hits
from gan3d.sampling import deltas, spread
from gan3d.volume import Rendering, accumulate, composite

WHITE = torch.ones(3)
BOX = [[-0.5, -0.5, -0.5], [0.5, 0.5, 0.5]]


def lopsided_ball(points, directions):
    """A soft ball off the centre, coloured by place and by view."""
    offset = points - points.new_tensor([0.15, -0.05, 0.1])
    colour = torch.sigmoid(4 * points + directions)
    return 20 * (0.3 - offset.norm(dim=-1)), colour


def fog(points, directions):
    """Dense everywhere, outside the box as well: a ray that misses must not see it."""
    return 3 + points[..., 0], torch.sigmoid(4 * points + directions)


def renderer(field, samples=24, background=WHITE):
    def render(rays: Rays) -> Rendering:
        t = spread(rays, samples)
        raw_density, colour = query(field, rays, t)
        return accumulate(composite(raw_density.relu(), deltas(t, 0.0)), colour, t, background)

    return render


def views(*eyes, size=12, aabb=BOX, fov=50.0):
    eye = torch.tensor(eyes)
    camera = Camera(look_at(eye, torch.zeros(3), "y"), intrinsics_from_fov(fov).repeat(len(eyes), 1, 1))
    pixels = full_grid(size, size).expand(len(eyes), -1, -1)
    return camera_rays(camera, pixels, Bounds(near=0.2, far=6.0, aabb=aabb), (size, size))


def same(first, second, **tolerance):
    for name in ("features", "depth", "opacity"):
        torch.testing.assert_close(getattr(first, name), getattr(second, name), **tolerance)


def with_misses_closed(rays):
    return Rays(rays.origins, rays.directions, rays.near, torch.maximum(rays.near, rays.far))


def test_query_hands_the_field_points_on_the_ray_and_one_direction_per_ray():
    rays = views((0.0, 0.0, 2.0))
    t = spread(rays, 5)
    seen = {}

    def field(points, directions):
        seen.update(points=points, directions=directions)
        return points[..., 0], points

    query(field, rays, t)
    assert seen["directions"].shape == (1, 144, 1, 3) and seen["points"].shape == (1, 144, 5, 3)
    torch.testing.assert_close(seen["points"][0, 7, 3], rays.origins[0, 7] + t[0, 7, 3] * rays.directions[0, 7])


@pytest.mark.smoke
@pytest.mark.parametrize("field", [lopsided_ball, fog])
@pytest.mark.parametrize("eyes", [((0.0, 0.0, 2.0),), ((0.0, 0.0, 2.0), (0.5, 1.5, 2.5), (3.0, 0.2, -2.0))])
def test_rendering_only_the_hits_equals_rendering_all_rays(eyes, field):
    rays = views(*eyes)
    hits = (rays.far > rays.near).sum(-1)
    assert (hits > 0).all() and (hits < 144).all()
    asked = []
    render = renderer(field)
    seen = render_hits(lambda rays: asked.append(rays.near.shape[-1]) or render(rays), rays, WHITE)
    assert asked == [int(hits.max())]
    same(seen, render(with_misses_closed(rays)))
    missed = rays.far <= rays.near
    assert (seen.opacity[missed] == 0).all() and (seen.features[missed] == 1).all()


def test_a_full_image_beside_one_with_misses_is_rendered_right():
    """One image of the batch fills its frame with the box, so that every ray is asked, the other's misses as well."""
    rays = views((0.0, 0.0, 0.6), (0.0, 0.0, 3.0), fov=60.0)
    hit = rays.far > rays.near
    assert hit[0].all() and not hit[1].all()
    seen = render_hits(renderer(fog), rays, WHITE)
    same(seen, renderer(fog)(with_misses_closed(rays)))
    assert (seen.opacity[~hit] == 0).all() and (seen.features[~hit] == 1).all() and (seen.opacity <= 1).all()


def test_an_image_without_hits_shows_the_background():
    eye = torch.tensor([[0.0, 0.0, 3.0]])
    away = Camera(look_at(eye, torch.tensor([[0.0, 0.0, 9.0]]), "y"), intrinsics_from_fov(30.0)[None])
    rays = camera_rays(away, full_grid(4, 4)[None], Bounds(near=0.1, far=9.0, aabb=BOX), (4, 4))
    for background, shade in ((WHITE, 1.0), (None, 0.0)):
        seen = render_hits(renderer(lopsided_ball, background=background), rays, background)
        assert (seen.features == shade).all() and (seen.opacity == 0).all() and (seen.depth == 0).all()


def test_hits_can_be_rendered_in_another_precision():
    rays = views((0.0, 0.0, 2.0))

    def half(rays):
        seen = renderer(lopsided_ball)(rays)
        return Rendering(seen.features.bfloat16(), seen.depth.bfloat16(), seen.opacity.bfloat16())

    assert render_hits(half, rays, WHITE).depth.dtype == torch.bfloat16


class Ball(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.radius = torch.nn.Parameter(torch.tensor(0.3))
        self.tint = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, points, directions):
        return 20 * (self.radius - points.norm(dim=-1)), torch.sigmoid(self.tint * points + directions)


def loss_and_gradients(ball, seen):
    loss = (seen.features.square().sum() + seen.depth.sum() + seen.opacity.square().sum())
    return loss, torch.autograd.grad(loss, list(ball.parameters()))


@pytest.mark.smoke
@pytest.mark.parametrize("chunk", [1, 50, 143, 144, 1000, None])
def test_chunks_equal_the_whole_with_gradients(chunk):
    rays, ball = with_misses_closed(views((0.0, 0.0, 2.0), (1.0, 1.0, 2.0))), Ball()
    whole = renderer(ball)(rays)
    parts = render_chunks(renderer(ball), rays, chunk)
    same(parts, whole)
    (loss, expected), (loss_parts, got) = loss_and_gradients(ball, whole), loss_and_gradients(ball, parts)
    torch.testing.assert_close(loss_parts, loss)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)  # sums in another order, float32
    with torch.no_grad():
        same(render_chunks(renderer(ball), rays, chunk), whole)


def test_chunks_are_recomputed_with_the_same_random_numbers():
    rays, ball = with_misses_closed(views((0.0, 0.0, 2.0))), Ball()
    drawn = []

    def render(rays):
        t = spread(rays, 8, "strata")
        drawn.append(t.sum().item())
        raw_density, colour = query(ball, rays, t)
        return accumulate(composite(raw_density.relu(), deltas(t, 0.0)), colour, t)

    torch.manual_seed(0)
    loss_and_gradients(ball, render_chunks(render, rays, 72))
    assert len(drawn) == 4 and sorted(drawn[:2]) == sorted(drawn[2:]) and drawn[0] != drawn[1]


def test_mirror_camera_of_the_mirrored_world_gives_the_flipped_picture():
    camera = Camera(look_at(torch.tensor([[0.6, 0.4, 1.8]]), torch.zeros(3), "y"), intrinsics_from_fov(50.0)[None])
    flip = torch.tensor([-1.0, 1.0, 1.0])
    bounds = Bounds(near=0.2, far=6.0)

    def picture(camera, field):
        rays = camera_rays(camera, full_grid(12, 12)[None], bounds, (12, 12))
        return renderer(field, samples=64)(rays).features.reshape(12, 12, 3)

    mirrored = picture(mirror(camera), lambda points, directions: lopsided_ball(points * flip, directions * flip))
    plain = picture(camera, lopsided_ball)
    torch.testing.assert_close(mirrored, plain.flip(1), atol=1e-4, rtol=0)  # float32 sums
    assert (plain - plain.flip(1)).abs().max() > 0.1  # the picture itself is not symmetric


def test_density_normals_of_a_sphere_point_outwards():
    points = torch.nn.functional.normalize(torch.randn(2, 5, 4, 3, generator=torch.Generator().manual_seed(0)), dim=-1)

    def sphere(points, directions):
        assert directions.shape == (2, 5, 1, 3)
        return 5 - 3 * points.square().sum(-1), points

    torch.testing.assert_close(density_normals(sphere, points), points, atol=1e-6, rtol=0)
    with torch.no_grad():  # as pictures are made
        torch.testing.assert_close(density_normals(sphere, 0.3 * points), points, atol=1e-6, rtol=0)


def test_density_normals_are_zero_where_the_density_is_flat():
    assert (density_normals(lambda points, directions: (0 * points.sum(-1), points), torch.rand(1, 2, 3, 3)) == 0).all()


def test_depth_normals_of_a_tilted_plane_face_the_camera():
    slope = 0.4
    columns, rows = torch.meshgrid(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 6), indexing="xy")
    points = torch.stack([columns, rows, 3 + slope * columns], dim=-1)  # camera at the origin, looking along +z
    expected = torch.tensor([slope, 0.0, -1.0]) / math.hypot(slope, 1)
    torch.testing.assert_close(depth_normals(points), expected.expand(6, 8, 3), atol=1e-5, rtol=0)


def test_points_along_walk_from_the_origin_in_the_direction():
    rays = Rays(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.0, 0.0, -1.0]]), torch.zeros(1), torch.ones(1))
    assert points_along(rays, torch.tensor([[0.0, 2.0]]))[0].tolist() == [[1, 2, 3], [1, 2, 1]]
