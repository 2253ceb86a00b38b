"""Compositing: closed forms, the papers' reference numbers, gradients."""

import math

import pytest
import torch

from gan3d.cameras import Camera, intrinsics_from_fov, look_at
from gan3d.rays import Bounds, camera_rays, full_grid
from gan3d.rendering import points_along
from gan3d.sampling import deltas, spread
from gan3d.volume import accumulate, composite


@pytest.mark.smoke
@pytest.mark.parametrize("cut", ["even", "random"])
def test_composite_of_constant_slab_is_one_minus_exp(cut):
    """However the slab is cut, its opacity is 1 − exp(−σL): exact, not a limit."""
    for sigma, length, samples in ((0.3, 2.0, 7), (5.0, 1.0, 64), (1e-9, 1.0, 3), (200.0, 3.0, 16)):
        delta = torch.ones(samples).double() if cut == "even" else torch.rand(samples).double() + 0.01
        delta = delta / delta.sum() * length
        weights = composite(torch.full_like(delta, sigma), delta)
        assert weights.sum().item() == pytest.approx(-math.expm1(-sigma * length), rel=1e-12)
        arrival = torch.exp(-sigma * (delta.cumsum(0) - delta))
        torch.testing.assert_close(weights, arrival * -torch.expm1(-sigma * delta), rtol=1e-10, atol=0)


def test_expected_depth_of_a_fog_converges_to_its_integral():
    """∫ t σ e^(−σt) dt over [0, L] = (1 − e^(−σL)(1 + σL))/σ; the midpoint rule converges with the square of delta."""
    sigma, length = 1.7, 2.0
    exact = (1 - math.exp(-sigma * length) * (1 + sigma * length)) / sigma
    errors = []
    for samples in (64, 128):
        delta = torch.full((1, samples), length / samples).double()
        t = delta.cumsum(-1) - delta / 2
        weights = composite(torch.full_like(delta, sigma), delta)
        errors.append(abs(accumulate(weights, t[..., None], t).depth.item() - exact))
    assert errors[0] < 1e-3 and errors[0] / errors[1] == pytest.approx(4, rel=0.05)


def test_graf_weights_match_the_reference():
    """σ = 1.5, −2, 4 at z = 0.9, 1.0, 1.08 along (0, 0.1, −1) in the authors' code."""
    t = torch.tensor([0.9, 1.0, 1.08]).double() * math.hypot(0.1, 1)
    weights = composite(torch.tensor([1.5, -2.0, 4.0]).double().relu(), deltas(t))
    torch.testing.assert_close(weights, torch.tensor([0.1399357, 0, 0.8600643]).double(), atol=1e-7, rtol=0)


def test_pigan_composite_matches_the_reference():
    t = torch.tensor([[0.9, 1.0, 1.08]]).double()
    sigma = torch.tensor([[1.5, -2.0, 4.0]]).double()
    rgb = torch.tensor([[[0.2, 0.4, 0.6], [0.8, 0.1, 0.3], [0.5, 0.5, 0.5]]]).double()
    weights = composite(sigma.relu(), deltas(t))
    seen = accumulate(weights, rgb, t)
    torch.testing.assert_close(weights, torch.tensor([[0.1392920, 0, 0.8607080]]).double(), atol=1e-7, rtol=0)
    expected = torch.tensor([[0.4582124, 0.4860708, 0.5139292]]).double()
    torch.testing.assert_close(seen.features, expected, atol=1e-7, rtol=0)
    assert seen.depth.item() == pytest.approx(1.0549274, abs=1e-7) and seen.opacity.item() == pytest.approx(1)
    soft = composite(torch.nn.functional.softplus(sigma), deltas(t))
    torch.testing.assert_close(soft, torch.tensor([[0.1564544, 0.0085222, 0.8350234]]).double(), atol=1e-7, rtol=0)


def test_weights_are_a_share_of_the_light_for_any_density():
    density = torch.rand(100, 32, generator=torch.Generator().manual_seed(0)).double() * 100
    weights = composite(density, torch.full_like(density, 0.02))
    assert (weights >= 0).all() and (weights.sum(-1) <= 1 + 1e-12).all()
    torch.testing.assert_close(weights.sum(-1), -torch.expm1(-density.sum(-1) * 0.02))


def test_a_closed_ray_is_opaque_only_where_its_last_sample_has_density():
    density = torch.tensor([[0.0, 0.0, 1e-3], [0.0, 0.0, 0.0]])
    weights = composite(density, deltas(torch.tensor([[1.0, 2.0, 3.0]]).expand(2, 3)))
    assert weights[0].tolist() == [0.0, 0.0, 1.0] and weights[1].tolist() == [0.0, 0.0, 0.0]
    assert torch.isfinite(composite(torch.full((3,), 1e30), torch.full((3,), 1e10))).all()


def test_an_opaque_sample_hides_all_behind_it():
    weights = composite(torch.tensor([0.0, 1e6, 5.0, 5.0]).double(), torch.ones(4).double())
    torch.testing.assert_close(weights, torch.tensor([0.0, 1.0, 0.0, 0.0]).double())


def test_shapes_that_differ_are_refused():
    with pytest.raises((ValueError, TypeError)):
        composite(torch.ones(2, 3), torch.ones(2, 4))


def test_the_background_shows_through_by_what_is_not_opaque():
    weights, features = torch.tensor([[0.25, 0.25], [0.0, 0.0]]), torch.ones(2, 2, 3) * torch.tensor([1.0, 0.0, 0.5])
    t = torch.tensor([[1.0, 3.0], [1.0, 3.0]])
    for background in ([0.0, 1.0, 1.0], torch.tensor([0.0, 1.0, 1.0])):
        seen = accumulate(weights, features, t, background)
        assert seen.features.tolist() == [[0.5, 0.5, 0.75], [0.0, 1.0, 1.0]]
        assert seen.opacity.tolist() == [0.5, 0.0] and seen.depth.tolist() == [1.0, 0.0]
    assert accumulate(weights, features, t).features[1].tolist() == [0.0, 0.0, 0.0]


def test_gradients_of_compositing_are_right_to_second_order():
    generator = torch.Generator().manual_seed(0)
    density = torch.rand(2, 3, 5, generator=generator).double().requires_grad_()
    delta = (torch.rand(2, 3, 5, generator=generator).double() + 0.1).requires_grad_()
    features = torch.rand(2, 3, 5, 4, generator=generator).double().requires_grad_()
    t = delta.detach().cumsum(-1)

    def render(density, delta, features):
        seen = accumulate(composite(density, delta), features, t, [0.1, 0.2, 0.3, 0.4])
        return seen.features, seen.depth, seen.opacity

    assert torch.autograd.gradcheck(render, (density, delta, features))
    assert torch.autograd.gradgradcheck(render, (density, delta, features))


def test_gradients_survive_the_closing_delta():
    density = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 3.0]]).double().requires_grad_()
    composite(density, deltas(torch.tensor([[1.0, 1.1, 1.2]]).double().expand(2, 3))).square().sum().backward()
    assert torch.isfinite(density.grad).all() and density.grad[0, 1] != 0


@pytest.mark.smoke
def test_a_sphere_shows_its_silhouette_and_the_light_lost_along_its_chords():
    """A ball of constant density: opacity 1 − exp(−σ·chord); none where the ray passes the centre by more than r."""
    radius, sigma = 0.5, 3.0
    camera = Camera(look_at(torch.tensor([0.0, 0.0, 2.0]), torch.zeros(3), "y"), intrinsics_from_fov(40.0))
    rays = camera_rays(camera, full_grid(32, 32), Bounds(near=1.2, far=2.8), (32, 32))
    t = spread(rays, 800)
    delta = deltas(t, 0.0)
    inside = points_along(rays, t + delta / 2).norm(dim=-1) < radius
    seen = accumulate(composite(sigma * inside.float(), delta), torch.ones(*t.shape, 1), t + delta / 2)
    passing = torch.linalg.cross(rays.origins, rays.directions, dim=-1).norm(dim=-1)
    chord = 2 * (radius**2 - passing**2).clamp(min=0).sqrt()
    # each end of a chord is met to within one step of 0.002, so the opacity to within σ·2·0.002
    torch.testing.assert_close(seen.opacity, 1 - torch.exp(-sigma * chord), atol=2 * sigma * 0.002, rtol=0)
    clear = (passing - radius).abs() > 1e-3
    assert torch.equal((seen.opacity > 0)[clear], (passing < radius)[clear])
    centre = seen.opacity.reshape(32, 32)[15:17, 15:17]
    torch.testing.assert_close(centre, torch.full((2, 2), 1 - math.exp(-sigma * 2 * radius)), atol=0.012, rtol=0)
