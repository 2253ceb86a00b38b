"""Sparse voxel grids: trilinear interpolation, its fusion with spherical harmonics, and what rays see."""

import inspect
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gan3d import ops
from gan3d.ops.cells import Voxels, cell_index, cell_position
from gan3d.ops.reference import sparse_grid as reference
from gan3d.ops.sh import sh
from gan3d.ops.sparse_grid import sparse_sample, sparse_sample_sh, visibility

compiled = pytest.mark.skipif(ops.backend() == "reference", reason="no compiled ops: no C++ compiler")
CUBES = (8, 12, 20)  # 2·3·5 cubes of 4³
MORTON = (16, 16, 16)  # one cube


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def voxels_of(mask: Tensor) -> Voxels:
    """The voxels where a bool [x, y, z] is true."""
    resolution = (mask.shape[0], mask.shape[1], mask.shape[2])
    exists = torch.zeros(mask.numel(), dtype=torch.bool)
    exists[cell_index(mask.nonzero(), resolution)] = True
    bits = exists.reshape(-1, 64).long()
    rank = torch.cat([torch.zeros(1, dtype=torch.long), bits.sum(1).cumsum(0)])
    return Voxels((bits << torch.arange(64)).sum(1), rank.int(), resolution)


def positions_of(voxels: Voxels) -> Tensor:
    """Position of each row's voxel."""
    bits = (voxels.words[:, None] >> torch.arange(64)) & 1
    return cell_position(bits.flatten().nonzero()[:, 0], voxels.resolution)


def some_voxels(resolution: tuple[int, int, int], share: float = 0.6) -> Voxels:
    return voxels_of(torch.rand(resolution, generator=generator(1)) < share)


def table(voxels: Voxels, channels: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(int(voxels.rank[-1]), channels, generator=generator(2), dtype=dtype)


def points(n: int, resolution: tuple[int, int, int], dtype: torch.dtype = torch.float64) -> Tensor:
    """Around the grid and a little beyond."""
    return (torch.rand(n, 3, generator=generator(n), dtype=dtype) * 1.2 - 0.1) * torch.tensor(resolution, dtype=dtype)


def as_arguments(voxels: Voxels) -> tuple[Tensor, Tensor, list[int]]:
    return voxels.words, voxels.rank, list(voxels.resolution)


def rays_and_basis(n: int, rays: int, k: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    basis = torch.randn(rays, k, generator=generator(3), dtype=dtype)
    return basis, torch.randint(rays, (n,), generator=generator(4), dtype=torch.int32)


@pytest.mark.parametrize("resolution", [CUBES, MORTON])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_sampling_is_trilinear_in_the_dense_grid_of_zeros_and_values(resolution: tuple, share: float) -> None:
    voxels = some_voxels(resolution, share)
    values = table(voxels, 5)
    dense = torch.zeros(*resolution, 5, dtype=torch.float64)
    dense[positions_of(voxels).unbind(1)] = values
    p = points(200, resolution)
    size = torch.tensor(resolution)
    where = 2 * p / (size - 1) - 1  # grid_sample takes z, y, x
    expected = torch.nn.functional.grid_sample(dense.permute(3, 0, 1, 2)[None], where.flip(-1)[None, None, None],
                                               padding_mode="border", align_corners=True)[0, :, 0, 0].T
    torch.testing.assert_close(sparse_sample(voxels, values, p), expected, atol=1e-12, rtol=0)


def test_voxels_are_found_at_integers_and_missing_ones_are_zero() -> None:
    voxels = some_voxels(CUBES)
    values = table(voxels, 3)
    everywhere = torch.cartesian_prod(*(torch.arange(side) for side in CUBES))
    dense = torch.zeros(*CUBES, 3, dtype=torch.float64)
    dense[positions_of(voxels).unbind(1)] = values
    assert torch.equal(sparse_sample(voxels, values, everywhere.double()), dense.reshape(-1, 3))


def test_points_beyond_the_outermost_voxels_are_clamped_and_do_not_move_the_result() -> None:
    voxels = some_voxels(MORTON, 1.0)
    values = table(voxels, 2)
    beyond = torch.tensor([[-3.0, 4.5, 5.25], [4.5, 99.0, 5.25], [4.5, 5.25, 15.5]], dtype=torch.float64)
    inside = beyond.clamp(0, 15)
    assert torch.equal(sparse_sample(voxels, values, beyond), sparse_sample(voxels, values, inside))
    beyond.requires_grad_(True)
    sparse_sample(voxels, values, beyond).sum().backward()
    assert beyond.grad is not None and torch.equal(beyond.grad == 0, torch.eye(3).bool())


@pytest.mark.parametrize("channels", [1, 3, 23])  # one of each piece: 16 + 4 + 2 + 1
@pytest.mark.parametrize("n", [0, 1, 37])
@pytest.mark.parametrize("resolution", [CUBES, MORTON])
def test_sampling_and_its_gradients_are_the_references(channels: int, n: int, resolution: tuple) -> None:
    voxels = some_voxels(resolution)
    grad = torch.randn(n, channels, generator=generator(5), dtype=torch.float64)
    found = []
    for function in (lambda *a: sparse_sample(voxels, *a),
                     lambda *a: reference.sparse_sample(*as_arguments(voxels), *a)):
        leaves = [table(voxels, channels).requires_grad_(True), points(n, resolution).requires_grad_(True)]
        out = function(*leaves)
        found.append([out, *torch.autograd.grad(out, leaves, grad)])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)  # sums of tens of terms in another order


@pytest.mark.parametrize("k", [1, 4, 9, 16])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_harmonics_and_their_gradients_are_the_references(k: int, shared: bool, dtype: torch.dtype) -> None:
    voxels, n = some_voxels(CUBES), 77
    basis, ray = rays_and_basis(n, 13 if shared else n, k, dtype)
    index = ray if shared else None
    grads = [torch.randn(*shape, generator=generator(6), dtype=dtype) for shape in ((n,), (n, 3))]
    grads[0][::3], grads[1][::3] = 0, 0  # points without a gradient are left out
    found = []
    for function in (lambda *a: sparse_sample_sh(voxels, *a, index),
                     lambda *a: reference.sparse_sample_sh(*as_arguments(voxels), *a, index)):
        inputs = table(voxels, 1 + 3 * k, dtype), points(n, CUBES, dtype), basis.clone()
        leaves = [x.requires_grad_(True) for x in inputs]
        out = function(*leaves)
        found.append([*out, *torch.autograd.grad(out, leaves, grads)])
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5  # some hundred terms of size 1, each rounded
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance)


def test_fused_harmonics_are_sampling_then_a_dot_product() -> None:
    voxels = some_voxels(MORTON)
    values, p = table(voxels, 28), points(60, MORTON).reshape(5, 12, 3)
    directions = torch.nn.functional.normalize(torch.randn(5, 3, generator=generator(8), dtype=torch.float64), dim=-1)
    basis = sh(directions, 2)
    density, rgb = sparse_sample_sh(voxels, values, p, basis, torch.arange(5, dtype=torch.int32).repeat_interleave(12))
    channels = sparse_sample(voxels, values, p)
    torch.testing.assert_close(density, channels[..., 0], atol=1e-13, rtol=0)
    expected = torch.einsum("rnck,rk->rnc", channels[..., 1:].unflatten(-1, (3, 9)), basis)
    torch.testing.assert_close(rgb, expected, atol=1e-12, rtol=0)


def test_first_and_second_derivatives() -> None:
    voxels = voxels_of(torch.rand(4, 4, 4, generator=generator(9)) < 0.5)
    values, p = table(voxels, 4).requires_grad_(True), points(3, (4, 4, 4)).requires_grad_(True)
    basis, ray = rays_and_basis(3, 2, 1)
    basis.requires_grad_(True)
    torch.autograd.gradcheck(lambda v, x: sparse_sample(voxels, v, x), (values, p))
    torch.autograd.gradgradcheck(lambda v, x: sparse_sample(voxels, v, x), (values, p))
    own = torch.randn(3, 1, dtype=torch.float64, generator=generator()).requires_grad_(True)
    for index, rows in ((ray, basis), (None, own)):
        torch.autograd.gradcheck(lambda *a, i=index: sparse_sample_sh(voxels, *a, i), (values, p, rows))
        torch.autograd.gradgradcheck(lambda *a, i=index: sparse_sample_sh(voxels, *a, i), (values, p, rows))


def test_gradients_can_be_asked_for_one_at_a_time() -> None:
    voxels = some_voxels(MORTON)
    basis, ray = rays_and_basis(50, 5, 4)
    leaves = [table(voxels, 13), points(50, MORTON), basis]

    def gradients(which: list[int]) -> list[Tensor]:
        inputs = [x.clone().requires_grad_(i in which) for i, x in enumerate(leaves)]
        density, rgb = sparse_sample_sh(voxels, inputs[0], inputs[1], inputs[2], ray)
        return list(torch.autograd.grad(density.sum() + rgb.sum(), [inputs[i] for i in which]))

    for i, together in enumerate(gradients([0, 1, 2])):
        assert torch.equal(gradients([i])[0], together)


@compiled
def test_results_have_the_same_bits_for_any_number_of_threads() -> None:
    voxels, n = some_voxels((64, 32, 32)), 5000  # 16 blocks of 4096 cells: rows of many owners
    values, p = table(voxels, 28, torch.float32).requires_grad_(True), points(n, (64, 32, 32), torch.float32)
    p.requires_grad_(True)
    basis, ray = rays_and_basis(n, 100, 9, torch.float32)
    basis.requires_grad_(True)
    density = values.detach()[:, 0].contiguous()
    rays = torch.randn(3000, 3, generator=generator(10)) * 3
    aim = 0.5 * torch.randn(3000, 3, generator=generator(11)) - rays

    def everything() -> list[Tensor]:
        out = sparse_sample_sh(voxels, values, p, basis, ray)
        plain = sparse_sample(voxels, values, p)
        seen = visibility(voxels, density, rays, aim, torch.tensor([[-1.0, -1, -1], [1, 1, 1]]))
        return [*out, plain, seen, *torch.autograd.grad(out, (values, p, basis), [o.detach().sin() for o in out]),
                *torch.autograd.grad(plain, (values, p), plain.detach().cos())]

    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            runs.append(everything())
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def test_a_grid_without_voxels_is_zero_everywhere() -> None:
    voxels = voxels_of(torch.zeros(MORTON, dtype=torch.bool))
    values, p = torch.zeros(0, 4).requires_grad_(True), points(9, MORTON, torch.float32).requires_grad_(True)
    out = sparse_sample(voxels, values, p)
    density, rgb = sparse_sample_sh(voxels, values, p, torch.ones(9, 1))
    assert not out.any() and not density.any() and not rgb.any()
    (out.sum() + density.sum() + rgb.sum()).backward()
    assert p.grad is not None and not p.grad.any() and values.grad is not None and values.grad.shape == (0, 4)
    assert visibility(voxels, torch.zeros(0), torch.zeros(2, 3), torch.ones(2, 3), unit_box().float()).shape == (0,)


def test_any_layout_and_half_precision_are_taken() -> None:
    voxels = some_voxels(MORTON)
    values, p = table(voxels, 8).T.contiguous().T, points(30, MORTON).reshape(2, 15, 3).transpose(0, 1)
    plain = sparse_sample(voxels, values.contiguous(), p.contiguous())
    assert torch.equal(sparse_sample(voxels, values, p), plain) and plain.shape == (15, 2, 8)
    low = sparse_sample(voxels, values.half(), p.float())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), plain, atol=1e-2, rtol=0)  # halves of up to 4 have steps of 2e-3


# ---- visibility ----


def unit_box() -> Tensor:
    return torch.tensor([[-1.0, -1, -1], [1, 1, 1]], dtype=torch.float64)


def rays_towards(n: int, box: Tensor) -> tuple[Tensor, Tensor]:
    """From around the box and, every fourth, within it; directions of any length."""
    origins = torch.nn.functional.normalize(torch.randn(n, 3, generator=generator(12), dtype=torch.float64), dim=-1) * 3
    origins[::4] *= 0.2
    aim = torch.randn(n, 3, generator=generator(13), dtype=torch.float64) * 0.6 - origins
    size = (box[1] - box[0]) / 2
    return origins * size + box.mean(0), aim * size


@pytest.mark.parametrize("scale", [1.0, 2.5])  # of the box: the length of a step in scene units matters
@pytest.mark.parametrize("length", [1.0, 7.0])  # of the direction does not
def test_a_slab_hides_the_one_behind_it(scale: float, length: float) -> None:
    mask = torch.zeros(16, 8, 8, dtype=torch.bool)
    mask[3:7], mask[10:14] = True, True
    voxels = voxels_of(mask)
    front = positions_of(voxels)[:, 0] < 8
    raw = torch.where(front, 40.0, 5.0).double()
    # Along x through the middle: a sample every half voxel, from the face at −0.5. Of the sample positions, 2.5 has
    # half of the slab's density, 3 to 6 all of it, 6.5 half of it.
    box = torch.tensor([[-1.0, -0.5, -0.5], [1, 0.5, 0.5]], dtype=torch.float64) * scale
    direction = torch.tensor([[length, 0, 0]], dtype=torch.float64)
    seen = visibility(voxels, raw, torch.tensor([[-9.0, 0.01, 0.01]], dtype=torch.float64) * scale, direction, box)
    step = 0.5 * 2 * scale / 16
    x = torch.tensor([20.0] + [40] * 7 + [20] + [2.5] + [5] * 7 + [2.5], dtype=torch.float64) * step
    weight = torch.exp(-(x.cumsum(0) - x)) * (1 - torch.exp(-x))
    expected = torch.zeros_like(raw)
    position = positions_of(voxels)
    beside = ((position[:, 1:] >= 3) & (position[:, 1:] <= 4)).all(1)
    for i, w in enumerate(weight):
        lower = math.floor(2.5 + 0.5 * i if i < 9 else 9.5 + 0.5 * (i - 9))
        around = beside & ((position[:, 0] == lower) | (position[:, 0] == lower + 1))
        expected[around] = expected[around].clamp(min=float(w))
    torch.testing.assert_close(seen, expected, atol=1e-12, rtol=0)
    first = math.exp(-20 * step) * (1 - math.exp(-40 * step))
    torch.testing.assert_close(float(seen[front].max()), max(first, 1 - math.exp(-20 * step)), atol=1e-12, rtol=0)
    assert float(seen[~front].max()) < math.exp(-300 * step)  # what the front slab lets through


def test_a_ray_ends_after_the_sample_that_takes_its_transmittance_below_the_threshold() -> None:
    voxels = voxels_of(torch.ones(MORTON, dtype=torch.bool))
    raw = torch.full((4096,), 8 * math.log(2.0), dtype=torch.float64)  # a voxel of 1/8 halves the light
    origin, along = torch.tensor([[[-5.0, 0.01, 0.01]], [[1.0, 0, 0]]], dtype=torch.float64)
    depth = positions_of(voxels)[:, 0]
    # Samples at −0.5, 0, 0.5, …: after i of them 2^(−i/2) is left. The fifth, at 1.5, passes 0.2: the last voxels are 1
    # and 2. The first sample that voxel 2 takes part in is the fourth, at 1 (though its share there is 0).
    seen = visibility(voxels, raw, origin, along, unit_box(), stop=0.2)
    assert int(depth[seen > 0].max()) == 2
    torch.testing.assert_close(float(seen[depth == 2].max()), 0.5**1.5 * (1 - 0.5**0.5), atol=1e-12, rtol=0)
    assert int(depth[visibility(voxels, raw, origin, along, unit_box()) > 0].max()) == 15


@pytest.mark.parametrize("resolution", [CUBES, (32, 32, 32), (64, 32, 32)])
@pytest.mark.parametrize("kind", ["clusters", "dust", "full"])
@pytest.mark.parametrize("stop", [0.0, 0.3])
def test_visibility_is_the_references_which_skips_nothing(resolution: tuple, kind: str, stop: float) -> None:
    if kind == "clusters":  # whole empty cubes of every size between them
        coarse = torch.rand([side // 4 for side in resolution], generator=generator(14)) < 0.1
        mask = coarse.repeat_interleave(4, 0).repeat_interleave(4, 1).repeat_interleave(4, 2)
    else:
        mask = torch.rand(resolution, generator=generator(15)) < (0.002 if kind == "dust" else 2)
    voxels = voxels_of(mask)
    raw = 30 * torch.randn(int(voxels.rank[-1]), generator=generator(16), dtype=torch.float64)
    box = torch.tensor([[-1.0, 0, 2], [1, 3, 4]], dtype=torch.float64)
    origins, directions = rays_towards(300, box)
    seen = visibility(voxels, raw, origins, directions, box, 0.5, stop)
    expected = reference.visibility(*as_arguments(voxels), raw, origins, directions, box, 0.5, stop)
    assert float((expected > 0).double().mean()) > 0.05
    torch.testing.assert_close(seen, expected, atol=1e-11, rtol=0)  # sample positions differ by roundings


def test_rays_along_axes_are_seen_and_rays_beside_the_box_or_without_direction_see_nothing() -> None:
    voxels = voxels_of(torch.ones(MORTON, dtype=torch.bool))
    raw = torch.full((4096,), 3.0, dtype=torch.float64)

    def seen(origin: list[float], direction: list[float]) -> Tensor:
        return visibility(voxels, raw, torch.tensor([origin], dtype=torch.float64),
                          torch.tensor([direction], dtype=torch.float64), unit_box())

    for axis in range(3):
        for sign in (1.0, -1.0):
            origin, direction = [0.01, 0.01, 0.01], [0.0, 0.0, 0.0]
            origin[axis], direction[axis] = -4 * sign, sign
            assert int((seen(origin, direction) > 0).sum()) == 16 * 4  # the four voxels around the ray, at each depth
    for origin, direction in (([-4.0, 1.2, 0.0], [1.0, 0, 0]), ([-4.0, 0, 0], [-1.0, 0, 0]), ([0.0, 0, 0], [0.0, 0, 0]),
                              ([-4.0, 0, 0], [math.nan, 0, 0])):
        assert not seen(origin, direction).any()
    nobody = torch.zeros(0, 3, dtype=torch.float64)
    assert not visibility(voxels, raw, nobody, nobody, unit_box()).any()


# ---- as ops ----


@compiled
def test_are_well_behaved_ops() -> None:
    voxels, n = some_voxels(MORTON), 7
    at = as_arguments(voxels)
    values, p = table(voxels, 13), points(n, MORTON)
    basis, ray = rays_and_basis(n, 3, 4)
    leaves = [x.clone().requires_grad_(True) for x in (values, p, basis)]
    grad, grad_rgb = torch.randn(n, 13, dtype=torch.float64), torch.randn(n, 3, dtype=torch.float64)
    torch.library.opcheck(torch.ops.gan3d.sparse_sample, (*at, *leaves[:2]))
    torch.library.opcheck(torch.ops.gan3d.sparse_sample_backward, (grad, *at, values, p, [True, False]))
    torch.library.opcheck(torch.ops.gan3d.sparse_sample_sh, (*at, *leaves, ray))
    torch.library.opcheck(torch.ops.gan3d.sparse_sample_sh_backward,
                          (grad[:, 0].contiguous(), grad_rgb, *at, values, p, basis, ray, [True, True, True]))
    torch.library.opcheck(torch.ops.gan3d.visibility, (*at, values[:, 0].contiguous(), p, p - 8, unit_box(), 0.5, 0.1))


@compiled
def test_work_is_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    voxels = some_voxels(MORTON)
    basis, ray = rays_and_basis(10, 3, 9)
    with FlopCounterMode(display=False) as counter:
        values = table(voxels, 28).requires_grad_(True)
        sparse_sample_sh(voxels, values, points(10, MORTON), basis, ray)[1].sum().backward()
    assert counter.get_total_flops() == 2 * 10 * (16 * 28 + 6 * 9)


@compiled
def test_can_be_traced_whole() -> None:
    voxels = some_voxels(MORTON)
    values, p = table(voxels, 13).requires_grad_(True), points(10, MORTON)
    basis, ray = rays_and_basis(10, 3, 4)

    sample, sample_sh = inspect.unwrap(sparse_sample), inspect.unwrap(sparse_sample_sh)  # type checks cannot be traced

    def both(values: Tensor, p: Tensor, basis: Tensor, ray: Tensor) -> Tensor:
        density, rgb = sample_sh(voxels, values, p, basis, ray)
        return (density[:, None] * rgb).sum() + sample(voxels, values, p).sum()

    found = []
    for function in (both, torch.compile(both, fullgraph=True, backend="aot_eager")):
        out = function(values, p, basis, ray)
        found.append([out, *torch.autograd.grad(out, values)])
    for eager, traced in zip(*found, strict=True):
        torch.testing.assert_close(eager, traced, atol=1e-12, rtol=0)


@pytest.mark.parametrize("call, error, match", [
    (lambda v, t, p: sparse_sample(v, t.long(), p), TypeError, "(?i)float"),
    (lambda v, t, p: sparse_sample_sh(v, t, p, torch.zeros(5, 3)), ValueError, "terms"),
    (lambda v, t, p: sparse_sample_sh(v, t, p, torch.zeros(4, 1)), ValueError, "points"),
    (lambda v, t, p: visibility(v, t[:, 0], p, p, unit_box().float(), step=0.0), ValueError, "step"),
])
def test_bad_arguments_are_refused(call: Callable, error: type[Exception], match: str) -> None:
    voxels = some_voxels(MORTON)
    with pytest.raises(error, match=match):
        call(voxels, table(voxels, 4, torch.float32), points(5, MORTON, torch.float32))


@compiled
@pytest.mark.parametrize("index", [[0, 1, 3], [0, -1, 2]])
def test_a_ray_that_does_not_exist_is_refused(index: list[int]) -> None:
    voxels = some_voxels(MORTON)
    with pytest.raises(IndexError, match="ray_index must be 0 to 2"):
        sparse_sample_sh(voxels, table(voxels, 4), points(3, MORTON), torch.zeros(3, 1, dtype=torch.float64),
                         torch.tensor(index, dtype=torch.int32))


@compiled
def test_the_ops_themselves_name_what_is_wrong() -> None:
    voxels = some_voxels(MORTON)
    words, rank, resolution = as_arguments(voxels)
    values, p = table(voxels, 4), points(5, MORTON)
    op, sh_op = torch.ops.gan3d.sparse_sample, torch.ops.gan3d.sparse_sample_sh
    with pytest.raises((ValueError, RuntimeError), match="coordinates must be contiguous"):
        op(words, rank, resolution, values, p.T.contiguous().T)
    with pytest.raises((TypeError, RuntimeError), match="coordinates must be Double"):
        op(words, rank, resolution, values, p.float())
    with pytest.raises((ValueError, RuntimeError), match="rank must have shape"):
        op(words, rank[1:], resolution, values, p)
    with pytest.raises((ValueError, RuntimeError), match="multiples of 4"):
        op(words, rank, [16, 16, 18], values, p)
    with pytest.raises((ValueError, RuntimeError), match="values must have a row"):
        op(words, rank, resolution, values[1:].contiguous(), p)
    with pytest.raises((ValueError, RuntimeError), match="density must have a row"):
        torch.ops.gan3d.visibility(words, rank, resolution, values[1:, 0].contiguous(), p, p, unit_box(), 0.5, 0.0)
    with pytest.raises((ValueError, RuntimeError), match="values must have shape"):
        sh_op(words, rank, resolution, values, p, torch.zeros(5, 9, dtype=torch.float64), None)
    with pytest.raises((TypeError, RuntimeError), match="ray_index must be Int"):
        sh_op(words, rank, resolution, values, p, p[:, :1].contiguous(), torch.zeros(5, dtype=torch.long))
