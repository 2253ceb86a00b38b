"""Ops in a row, as a renderer uses them: what is skipped must not be seen."""

import pytest
import torch

from gan3d import ops
from gan3d.ops.cells import cell_position

BOX = torch.tensor([[-1.0, -1, -1], [1, 1, 1]])
SIDE = 32


@pytest.fixture(scope="module")
def rays() -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    origins = 3 * torch.nn.functional.normalize(torch.randn(400, 3, generator=rng), dim=-1)
    towards = 0.8 * torch.rand(400, 3, generator=rng) - 0.4
    return origins, torch.nn.functional.normalize(towards - origins, dim=-1)


def field(points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A ball of radius ½ with a sharp edge; its colour is its place."""
    return 40 * (points.norm(dim=-1) < 0.5).float(), points.abs()


def render(rays: tuple, words: torch.Tensor | None, threshold: float, jitter: str = "ray") -> ops.Composite:
    origins, directions = rays
    near, far = ops.ray_aabb(origins, directions, BOX[None])
    samples = ops.march(origins, directions, near[:, 0], far[:, 0], words, BOX, (SIDE,) * 3, 0.01, jitter=jitter,
                        seed=3)
    ray = samples.ray_index.long()
    density, colour = field(origins[ray] + samples.t[:, None] * directions[ray])
    return ops.composite_packed(density, samples.delta, colour, samples.t, samples.offsets, torch.ones(3), threshold)


def occupancy() -> torch.Tensor:
    """Cells that the ball can touch: its distance from a centre is at most half a cell's diagonal."""
    centres = (cell_position(torch.arange(SIDE**3), (SIDE,) * 3) + 0.5) * (2 / SIDE) - 1
    return ops.pack_bits((centres.norm(dim=-1) < 0.5 + 3**0.5 / SIDE).float()[None], 0.5)


@pytest.mark.parametrize("jitter", ["none", "ray", "sample"])
def test_skipping_empty_space_changes_no_pixel(rays, jitter: str) -> None:
    everything = render(rays, None, 0.0, jitter)
    skipping = render(rays, occupancy(), 0.0, jitter)
    assert len(skipping.weights) < 0.4 * len(everything.weights)
    torch.testing.assert_close(skipping.features, everything.features, atol=2e-6, rtol=0)  # the sums' order in float32
    torch.testing.assert_close(skipping.depth, everything.depth, atol=2e-5, rtol=0)


def test_stopping_early_changes_pixels_by_no_more_than_its_threshold(rays) -> None:
    whole, cut = render(rays, occupancy(), 0.0), render(rays, occupancy(), 1e-3)
    difference = (whole.features - cut.features).abs().max()
    assert 0 < difference < 1e-3
    assert (cut.weights > 0).sum() < 0.8 * (whole.weights > 0).sum()


def test_a_compiled_renderer_and_the_reference_see_the_same(rays, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = render(rays, occupancy(), 1e-3)
    monkeypatch.setattr(ops.extension, "_backend", "reference")
    plain = render(rays, occupancy(), 1e-3)
    assert len(plain.weights) == len(compiled.weights)  # the same samples, to the last one
    torch.testing.assert_close(compiled.features, plain.features, atol=2e-6, rtol=0)


def test_pruning_then_refining_keeps_what_survives(rays) -> None:
    """The life of a sparse grid: seen by cameras, pruned, refined; a surviving voxel's children have its value."""
    words = occupancy()[0]
    voxels = ops.Voxels(words, ops.rank_words(words), (SIDE,) * 3)
    density = torch.full((int(voxels.rank[-1]),), 50.0)
    seen = ops.visibility(voxels, density, *rays, BOX)
    pruned = ops.prune(voxels, seen, 0.01)
    assert 0 < len(pruned.new_to_old) < len(density)
    assert (seen[pruned.new_to_old.long()] >= 0.01).all() and (seen[pruned.old_to_new < 0] < 0.01).all()
    values = torch.randn(len(density), 4, generator=torch.Generator().manual_seed(0))
    kept = ops.compact(values, pruned)
    fine = ops.upsample(pruned.voxels)
    parents = ops.positions_of(fine.voxels) // 2
    rows = ops.row_of(voxels, parents)
    assert torch.equal(ops.upsample_values(kept), values[rows.long()])


def test_voxels_seen_through_marched_samples_learn_only_where_there_is_light(rays) -> None:
    """Sparse voxels with spherical harmonics, marched and composited: gradients reach voxels in front and no others."""
    words = occupancy()[0]  # one bit field marches and says which voxels exist
    voxels = ops.Voxels(words, ops.rank_words(words), (SIDE,) * 3)
    values = torch.zeros(int(voxels.rank[-1]), 13)
    values[:, 0] = 200  # opaque: a ray of light stops within a cell or two
    values.requires_grad_(True)
    origins, directions = rays
    near, far = ops.ray_aabb(origins, directions, BOX[None])
    samples = ops.march(origins, directions, near[:, 0], far[:, 0], occupancy(), BOX, (SIDE,) * 3, 0.01)
    ray = samples.ray_index.long()
    points = origins[ray] + samples.t[:, None] * directions[ray]
    where = ops.voxel_coordinates(points, BOX, (SIDE,) * 3, align_corners=False)
    density, rgb = ops.sparse_sample_sh(voxels, values, where, ops.sh(directions, 1), samples.ray_index)
    seen = ops.composite_packed(density.relu(), samples.delta, rgb + 0.5, samples.t, samples.offsets)
    (gradient,) = torch.autograd.grad(seen.features.sum(), values)
    centres = (ops.positions_of(voxels) + 0.5) * (2 / SIDE) - 1
    learnt = gradient[:, 1:].abs().sum(1) > 1e-6
    assert learnt.any() and centres[learnt].norm(dim=-1).min() > 0.5 - 4 * 2 / SIDE  # the shell
    assert (seen.opacity > 0.99).float().mean() > 0.3  # the rays that do not just graze it
