"""Samples along rays: spacing, jitter, inverse transform sampling."""

import pytest
import torch

from gan3d.rays import Rays
from gan3d.sampling import LAST_DELTA, deltas, even_quantiles, merge, sample_pdf, spread


def rays(n=6, dtype=torch.float64):
    near = torch.linspace(0.5, 2.0, n, dtype=dtype)
    origins, forward = torch.zeros(n, 3, dtype=dtype), torch.tensor([0.0, 0.0, 1.0], dtype=dtype)
    return Rays(origins, forward.expand(n, 3), near, near + torch.linspace(1, 3, n, dtype=dtype))


def test_even_samples_run_from_near_to_far():
    t = spread(rays(), 5)
    assert torch.equal(t[:, 0], rays().near) and torch.equal(t[:, -1], rays().far)
    torch.testing.assert_close(t.diff(dim=-1), ((rays().far - rays().near) / 4)[:, None].expand(-1, 4))


def test_strata_are_bounded_by_the_midpoints_and_filled_evenly():
    torch.manual_seed(0)
    ones = torch.ones(4000).double()
    t = spread(Rays(torch.zeros(4000, 3).double(), torch.ones(4000, 3).double(), ones, 2 * ones), 5, "strata")
    edges = torch.tensor([1, 1.125, 1.375, 1.625, 1.875, 2]).double()
    assert (t >= edges[:-1]).all() and (t <= edges[1:]).all()
    width = edges.diff()
    torch.testing.assert_close(t.mean(0), (edges[1:] + edges[:-1]) / 2, atol=0.006, rtol=0)  # 5 σ
    torch.testing.assert_close(t.var(0), width**2 / 12, rtol=0.1, atol=0)


def test_offset_jitter_moves_each_sample_by_up_to_half_a_spacing():
    torch.manual_seed(0)
    t, even = spread(rays(3000), 5, "offset"), spread(rays(3000), 5)
    moved = (t - even) / even.diff(dim=-1)[:, :1]
    assert moved.min() >= -0.5 and moved.max() <= 0.5
    assert moved.std().item() == pytest.approx(12**-0.5, rel=0.05) and moved[:, 0].min() < -0.45  # the ends as well
    assert (t.diff(dim=-1) >= 0).all()


def test_one_sample_stands_at_near_and_an_unknown_jitter_is_refused():
    assert torch.equal(spread(rays(), 1, "strata")[:, 0], rays().near)
    with pytest.raises((ValueError, TypeError), match="jitter"):
        spread(rays(), 4, "blue noise")


def test_deltas_are_distances_to_the_next_sample_and_the_last_closes_the_ray():
    t = torch.tensor([[0.9, 1.0, 1.08]]).double()
    torch.testing.assert_close(deltas(t), torch.tensor([[0.1, 0.08, LAST_DELTA]]).double())
    torch.testing.assert_close(deltas(t, 0.5), torch.tensor([[0.1, 0.08, 0.5]]).double())


@pytest.mark.smoke
def test_sample_pdf_matches_the_reference():
    """The authors' inverse CDF in π-GAN: five even quantiles, both ends included."""
    edges, weights = torch.tensor([[0.9, 0.95, 1.0, 1.05]]).double(), torch.tensor([[0.1, 0.7, 0.2]]).double()
    u = torch.linspace(0, 1, 5).double()[None]
    expected = torch.tensor([[0.9, 0.9607140, 0.9785714, 0.9964288, 1.05]]).double()
    torch.testing.assert_close(sample_pdf(edges, weights, u), expected, atol=1e-7, rtol=0)  # printed to 7 digits


def test_sample_pdf_of_even_weights_is_a_straight_line():
    edges, u = torch.linspace(2, 4, 9).double(), torch.rand(50).double()
    torch.testing.assert_close(sample_pdf(edges, torch.full((8,), 0.125).double(), u), 2 + 2 * u)


def test_sample_pdf_draws_from_each_bin_in_proportion():
    edges = torch.tensor([0.0, 1.0, 3.0, 4.0]).double()
    weights = torch.tensor([0.2, 0.5, 0.3]).double()
    drawn = sample_pdf(edges, weights, torch.rand(40_000, generator=torch.Generator().manual_seed(0)).double())
    share = torch.histogram(drawn, edges).hist / 40_000
    torch.testing.assert_close(share, weights, atol=0.0125, rtol=0)  # 5 σ
    assert drawn.min() >= 0 and drawn.max() <= 4


def test_sample_pdf_without_weight_falls_back_to_even_and_stays_inside():
    edges = torch.tensor([[1.0, 1.5, 2.0]])
    drawn = sample_pdf(edges, torch.zeros(1, 2), torch.tensor([[0.0, 0.25, 0.5, 0.75, 1.0]]))
    torch.testing.assert_close(drawn, torch.tensor([[1.0, 1.25, 1.5, 1.75, 2.0]]), atol=1e-5, rtol=0)


def test_sample_pdf_gives_no_gradient_to_the_weights():
    weights = torch.rand(3, 4, requires_grad=True)
    assert not sample_pdf(torch.linspace(0, 1, 5).expand(3, 5), weights, torch.rand(3, 6)).requires_grad


def test_sample_pdf_refuses_edges_that_do_not_fit_the_weights():
    with pytest.raises(ValueError, match="3 weights need 4 edges, got 3"):
        sample_pdf(torch.linspace(0, 1, 3), torch.ones(3), torch.rand(2))


def test_even_quantiles_are_the_middles_of_equal_parts():
    u = even_quantiles((2, 3), 4, torch.zeros(1).double())
    assert u.shape == (2, 3, 4) and u.dtype == torch.float64
    assert u[1, 2].tolist() == [0.125, 0.375, 0.625, 0.875]


def test_merge_orders_both_sets_and_says_where_each_stood():
    first, second = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[2.0, 0.5]])
    t, order = merge(first, second)
    assert t.tolist() == [[0.5, 1.0, 2.0, 2.0, 3.0]]
    assert order.tolist() == [[4, 0, 1, 3, 2]]  # equal distances: the first set's first
    assert torch.equal(torch.cat([first, second], -1).gather(-1, order), t)
