"""Rays: the papers' reference numbers, limits by planes and boxes, GRAF's patches."""

import math

import pytest
import torch

from gan3d.cameras import Camera, flip_axes, intrinsics_from_fov, look_at
from gan3d.rays import Bounds, Patch, PatchSampler, camera_rays, full_grid, image_coordinates, intersect_aabb
from gan3d.rendering import points_along

BOX = torch.tensor([[-1.0, -2.0, -3.0], [1.0, 2.0, 3.0]])


def intersect(origin, direction):
    near, far = intersect_aabb(torch.tensor([origin]), torch.tensor([direction]), BOX)
    return near.item(), far.item()


@pytest.mark.smoke
def test_graf_rays_match_the_reference():
    """The authors' rays reach the plane z = 1: their t is depth along the axis, ours distance along the ray."""
    eye = torch.tensor([7.92671532, 5.75909579, 2.0])  # u = 0.1, v = 0.4, r = 10
    camera = Camera(look_at(eye, torch.zeros(3), "z"), intrinsics_from_fov(30.0))
    bounds = Bounds(near=7.5, far=12.5, planar=True)
    rays = camera_rays(camera, full_grid(4, 4), bounds, (4, 4), grid="integer")
    assert 4 * camera.intrinsics[0, 0].item() == pytest.approx(7.4641016, abs=1e-6)
    for index, expected in ((0, (-0.678530, -0.824184, 0.0625355)), (4 + 2, (-0.814349, -0.591659, -0.0687322))):
        expected = torch.tensor(expected)
        assert rays.near[index].item() == pytest.approx(7.5 * expected.norm().item(), rel=1e-5)
        assert rays.far[index].item() == pytest.approx(12.5 * expected.norm().item(), rel=1e-5)
        torch.testing.assert_close(rays.directions[index], expected / expected.norm(), atol=2e-6, rtol=0)  # 6 digits


def test_pigan_rays_match_the_reference():
    """Corner pixels lie on the frustum's edge; the authors' camera axes are OpenGL's."""
    camera = Camera(flip_axes(torch.eye(4)), intrinsics_from_fov(12.0))
    rays = camera_rays(camera, full_grid(4, 4), Bounds(near=0.88, far=1.12), (4, 4), grid="corner")
    expected = torch.tensor([[-0.1039621, 0.1039621, -0.9891328], [-0.0348217, 0.1044651, -0.9939188]])
    torch.testing.assert_close(rays.directions[:2], expected, atol=2e-7, rtol=0)
    assert torch.equal(rays.near, torch.full((16,), 0.88)) and torch.equal(rays.far, torch.full((16,), 1.12))


def test_pixel_grids_place_the_first_and_last_pixel_as_they_say():
    ends = torch.tensor([0.0, 7.0])
    assert image_coordinates(ends, 8, "centre").tolist() == [0.5 / 8, 7.5 / 8]
    assert image_coordinates(ends, 8, "corner").tolist() == [0.0, 1.0]
    assert image_coordinates(ends, 8, "integer").tolist() == [0.0, 7 / 8]
    assert image_coordinates(torch.zeros(1), 1, "corner").item() == 0.0


def test_rays_pass_through_the_points_that_project_to_their_pixels():
    generator = torch.Generator().manual_seed(0)
    eyes = torch.randn(3, 3, generator=generator).double() * 2
    intrinsics = torch.tensor([[1.3, 0.2, 0.45], [0.0, 1.7, 0.6], [0.0, 0.0, 1.0]]).double().repeat(3, 1, 1)
    camera = Camera(look_at(eyes, torch.zeros(3).double()), intrinsics)
    pixels = full_grid(5, 7).double().expand(3, -1, -1)
    rays = camera_rays(camera, pixels, Bounds(near=0.0, far=1.0), (5, 7))
    torch.testing.assert_close(rays.directions.norm(dim=-1), torch.ones(3, 35).double())
    points = rays.origins + 2.5 * rays.directions
    rotation = camera.camera_to_world[:, :3, :3]
    local = (points - camera.position[:, None]) @ rotation  # world to camera: the transpose, from the right
    image = local @ intrinsics.mT
    projected = image[..., :2] / image[..., 2:]
    expected = (pixels + 0.5) / torch.tensor([7.0, 5.0]).double()
    torch.testing.assert_close(projected, expected)


def test_one_camera_and_a_batch_of_cameras_agree():
    camera = Camera(look_at(torch.eye(3) * 3, torch.zeros(3)), intrinsics_from_fov(40.0).repeat(3, 1, 1))
    pixels, bounds = full_grid(3, 2), Bounds(near=1.0, far=5.0, planar=True, aabb=[[-1, -1, -1], [1, 1, 1]])
    batch = camera_rays(camera, pixels.expand(3, -1, -1), bounds, (3, 2))
    single = camera_rays(camera[1], pixels, bounds, (3, 2))
    for name in ("origins", "directions", "near", "far"):
        torch.testing.assert_close(getattr(batch, name)[1], getattr(single, name))


def test_planar_bounds_are_planes_and_round_bounds_are_spheres():
    eye = torch.tensor([0.0, 0.0, 5.0])
    camera = Camera(look_at(eye, torch.zeros(3), "y"), intrinsics_from_fov(60.0))
    for planar in (True, False):
        rays = camera_rays(camera, full_grid(8, 8), Bounds(near=4.0, far=6.0, planar=planar), (8, 8))
        for t, distance in ((rays.near, 4.0), (rays.far, 6.0)):
            points = points_along(rays, t[:, None])[:, 0]
            measured = eye[2] - points[:, 2] if planar else (points - eye).norm(dim=-1)
            torch.testing.assert_close(measured, torch.full((64,), distance))


def test_a_reference_radius_keeps_the_slab_where_it_is():
    """GRAF: near and far move by r_max − ‖o‖, so the slab about the origin stays fixed as the camera comes nearer."""
    bounds = Bounds(near=7.5, far=12.5, reference_radius=10.5)
    for radius in (9.5, 10.0, 10.5):
        forward = torch.tensor([0.0, 0.0, -1.0])
        rays = bounds.limit(torch.tensor([[0.0, 0.0, radius]]), forward[None], forward)
        assert radius - rays.near.item() == pytest.approx(3.0) and radius - rays.far.item() == pytest.approx(-2.0)


@pytest.mark.parametrize("settings", [{"near": 2.0, "far": 1.0}, {"near": -1.0, "far": 1.0}, {"near": 1.0, "far": 1.0},
                                      {"near": 0.0, "far": 1.0, "aabb": [[0, 0, 0], [1, -1, 1]]}])
def test_impossible_bounds_are_refused(settings):
    with pytest.raises(ValueError, match="bounds"):
        Bounds(**settings)


# ---- boxes


def test_a_ray_through_the_box_enters_and_leaves_at_its_faces():
    assert intersect((-5.0, 0.0, 0.0), (1.0, 0.0, 0.0)) == pytest.approx((4.0, 6.0))
    assert intersect((0.0, 0.0, 10.0), (0.0, 0.0, -1.0)) == pytest.approx((7.0, 13.0))
    diagonal = 1 / math.sqrt(3)
    near, far = intersect((-2.0, -2.0, -2.0), (diagonal, diagonal, diagonal))
    assert (near * diagonal, far * diagonal) == pytest.approx((1.0, 3.0))


@pytest.mark.parametrize("sign", [0.0, -0.0])
def test_axis_parallel_rays_hit_only_between_the_faces(sign):
    for y, hits in ((0.0, True), (1.999, True), (2.001, False), (-2.001, False), (-1.999, True)):
        near, far = intersect((-5.0, y, 0.0), (1.0, sign, sign))
        assert (far > near) == hits
        if hits:
            assert (near, far) == pytest.approx((4.0, 6.0))


def test_from_inside_the_box_the_ray_enters_behind_its_origin():
    near, far = intersect((0.5, 0.0, 0.0), (1.0, 0.0, 0.0))
    assert (near, far) == pytest.approx((-1.5, 0.5))
    limited = Bounds(near=0.0, far=9.0, aabb=BOX.tolist()).limit(
        torch.tensor([[0.5, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([1.0, 0.0, 0.0]))
    assert (limited.near.item(), limited.far.item()) == pytest.approx((0.0, 0.5))


def test_from_a_face_the_box_is_seen_inwards_and_not_outwards():
    for axis, extent in enumerate((1.0, 2.0, 3.0)):
        for side in (-1.0, 1.0):
            origin, inward = [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]
            origin[axis], inward[axis] = side * extent, -side
            near, far = intersect(tuple(origin), tuple(inward))
            assert (near, far) == pytest.approx((0.0, 2 * extent))
            near, far = intersect(tuple(origin), tuple(-d for d in inward))
            assert max(near, 0.0) >= far  # leaves where it stands: nothing is left of it in front


def test_a_ray_pointing_away_leaves_behind_its_origin():
    near, far = intersect((5.0, 0.0, 0.0), (1.0, 0.0, 0.0))
    assert far < 0 and near < far
    rays = Bounds(near=0.0, far=9.0, aabb=BOX.tolist()).limit(
        torch.tensor([[5.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([1.0, 0.0, 0.0]))
    assert rays.far.item() <= rays.near.item()


def test_random_rays_hit_the_box_exactly_when_some_point_of_them_is_inside():
    generator = torch.Generator().manual_seed(0)
    origins = torch.randn(400, 3, generator=generator).double() * 3
    directions = torch.nn.functional.normalize(torch.randn(400, 3, generator=generator).double(), dim=-1)
    near, far = intersect_aabb(origins, directions, BOX.double())
    t = torch.linspace(-20, 20, 8001).double()
    points = origins[:, None] + t[:, None] * directions[:, None]
    inside = ((points > BOX[0]) & (points < BOX[1])).all(-1)
    seen = inside.any(-1)
    graze = (far - near).abs() < 0.006  # shorter than the march's step
    assert torch.equal((far > near)[~graze], seen[~graze]) and 50 < seen.sum() < 350
    expected = torch.where(inside, t, torch.inf).amin(-1)[seen], torch.where(inside, t, -torch.inf).amax(-1)[seen]
    torch.testing.assert_close(near[seen], expected[0], atol=0.005, rtol=0)
    torch.testing.assert_close(far[seen], expected[1], atol=0.005, rtol=0)


def test_select_and_slice_pick_the_same_rays_as_indexing():
    camera = Camera(look_at(torch.eye(3)[:2] * 3, torch.zeros(3)), intrinsics_from_fov(40.0).repeat(2, 1, 1))
    rays = camera_rays(camera, full_grid(3, 3).expand(2, -1, -1), Bounds(near=1, far=5, planar=True), (3, 3))
    index = torch.tensor([[4, 0, 8], [1, 1, 2]])
    picked, part = rays.select(index), rays.slice(2, 7)
    for name in ("origins", "directions", "near", "far"):
        whole = getattr(rays, name)
        assert torch.equal(getattr(picked, name), torch.stack([whole[i, index[i]] for i in range(2)]))
        assert torch.equal(getattr(part, name), whole[:, 2:7])


# ---- patches


@pytest.mark.smoke
def test_a_scale_one_patch_of_the_image_size_is_the_image():
    patch = Patch(torch.ones(2), torch.zeros(2, 2), 32)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(patch.pixels(32, 32), full_grid(32, 32).expand(2, -1, -1), atol=1e-5, rtol=0)
    torch.testing.assert_close(patch.crop(images), images, atol=1e-5, rtol=0)  # as the authors' grid: error 3e-6


def test_rays_and_crop_of_a_patch_fall_on_the_same_places():
    sampler = PatchSampler(size=8, min_scale=0.25, annealing=0.0025)
    torch.manual_seed(0)
    patch = sampler.sample(4, 200_000)
    rows, columns = torch.meshgrid(torch.arange(20.0), torch.arange(30.0), indexing="ij")
    images = torch.stack([columns, rows]).expand(4, -1, -1, -1)  # an image whose colour is the pixel's index
    cropped = patch.crop(images).flatten(2).mT
    torch.testing.assert_close(cropped, patch.pixels(20, 30), atol=1e-4, rtol=0)


def test_patches_stay_inside_the_image_at_every_scale():
    sampler = PatchSampler(size=4, min_scale=0.25, annealing=0.0025)
    torch.manual_seed(0)
    for step in (0, 100_000, 300_000):
        patch = sampler.sample(2000, step)
        lowest = sampler.lowest(step)
        assert lowest <= patch.scale.min() < lowest + 0.02 and 0.98 < patch.scale.max() <= 1
        assert patch.grid().abs().max() <= 1 + 1e-6
        centred = patch.offset / (1 - patch.scale)[:, None]  # uniform in [-1, 1]
        assert centred.mean().abs() < 0.05 and centred.var().item() == pytest.approx(1 / 3, rel=0.05)  # 5 σ


@pytest.mark.smoke
def test_the_patch_schedule_has_the_papers_values():
    sampler = PatchSampler(size=32, min_scale=0.25, annealing=0.0025)
    assert sampler.lowest(0) == sampler.lowest(14_999) == 0.9
    for step, expected in ((50_000, 0.687), (100_000, 0.472), (150_000, 0.325), (185_000, 0.25), (500_000, 0.25)):
        assert sampler.lowest(step) == pytest.approx(expected, abs=5e-4)
    assert sampler.lowest(50_999) == sampler.lowest(50_000)  # in steps of a thousand
    assert PatchSampler(size=32, min_scale=0.125, annealing=0.0019).lowest(400_000) == 0.125
