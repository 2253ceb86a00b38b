"""Voxel grids and feature planes: linear fields, F.grid_sample, the reference, and what an op must not do."""

import inspect
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gan3d import ops
from gan3d.ops.grids import XY_XZ_ZX, XY_XZ_ZY, Padding, grid_sample_3d, triplane_sample, voxel_coordinates
from gan3d.ops.reference import grids as reference

compiled = pytest.mark.skipif(ops.backend() == "reference", reason="no compiled ops: no C++ compiler")
PADDINGS: tuple[Padding, Padding] = ("border", "zeros")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def coordinates(b: int, n: int, sides: tuple[int, ...], seed: int = 1) -> Tensor:
    """Everywhere within the grid and up to two voxels beyond it."""
    unit = torch.rand(b, n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return unit * (torch.tensor(sides, dtype=torch.float64) + 3) - 2


def torch_grid_sample(grid: Tensor, where: Tensor, padding: str) -> Tensor:
    sides = torch.tensor(grid.shape[1:4], dtype=grid.dtype)
    unit = ((2 * where + 1) / sides - 1).flip(-1)[:, None, None]
    return F.grid_sample(grid.permute(0, 4, 1, 2, 3), unit, padding_mode=padding, align_corners=False)[:, :, 0, 0].mT


def torch_planes(planes: Tensor, points: Tensor, axes: tuple, scale: float) -> Tensor:
    parts = [F.grid_sample(planes[:, i], points[:, None, :, list(pair)], align_corners=False)
             for i, pair in enumerate(axes)]
    return scale * sum(parts)[:, :, 0].mT


def upstream(*shape: int) -> Tensor:
    """Gradients of an output, the same numbers in float32 and float64."""
    return random(*shape, seed=9, dtype=torch.float32).double()


def value_and_gradients(f: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_(True) for x in inputs]
    out = f(*leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, upstream(*out.shape).to(out.dtype)))


def assert_same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], atol: float) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=atol * max(1.0, float(b.abs().max()) if b.numel() else 0), rtol=0)


@pytest.mark.parametrize("padding", PADDINGS)
def test_linear_fields_and_voxel_centres_are_reproduced(padding: Padding) -> None:
    sides = (4, 7, 5)
    centres = torch.stack(torch.meshgrid(*(torch.arange(s, dtype=torch.float64) for s in sides), indexing="ij"), -1)
    slopes = random(3, 2)
    grid = (centres @ slopes + 0.25)[None]
    where = torch.rand(1, 100, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    where = where * (torch.tensor(sides) - 1)
    value, _, slope = value_and_gradients(lambda g, w: grid_sample_3d(g, w, padding), grid, where)
    torch.testing.assert_close(value, where @ slopes + 0.25, atol=1e-14 * 20, rtol=0)  # values up to 20
    expected = upstream(*value.shape) @ slopes.T
    torch.testing.assert_close(slope, expected, atol=1e-12, rtol=0)
    voxels = random(1, *sides, 3)
    assert torch.equal(grid_sample_3d(voxels, centres.reshape(1, -1, 3), padding), voxels.reshape(1, -1, 3))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 12, 13, 28, 32, 37])
@pytest.mark.parametrize("sides", [(5, 7, 9), (1, 6, 3), (4, 1, 2), (3, 5, 1), (1, 1, 1)])
@pytest.mark.parametrize("padding", PADDINGS)
def test_grid_matches_grid_sample_and_the_reference(channels: int, sides: tuple, padding: Padding) -> None:
    grid, where = random(2, *sides, channels), coordinates(2, 71, sides)
    got = value_and_gradients(lambda g, w: grid_sample_3d(g, w, padding), grid, where)
    # F.grid_sample goes through coordinates in [−1, 1], which costs a few roundings.
    assert_same(got, value_and_gradients(lambda g, w: torch_grid_sample(g, w, padding), grid, where), 1e-12)
    zeros = padding == "zeros"
    assert_same(got, value_and_gradients(lambda g, w: reference.grid_sample_3d(g, w, zeros), grid, where), 1e-13)
    low = value_and_gradients(lambda g, w: grid_sample_3d(g, w, padding), grid.float(), where.float())
    # The weights inherit the rounding of coordinates below 16, half of 2^−20; sums of up to 70 points.
    same = value_and_gradients(lambda g, w: reference.grid_sample_3d(g, w, zeros), grid.float().double(),
                               where.float().double())
    assert_same(low, tuple(x.float() for x in same), 2e-6)


@pytest.mark.parametrize("padding", PADDINGS)
def test_many_points_in_a_large_grid(padding: Padding) -> None:
    sides = (33, 40, 21)  # more than one block of points, many columns, shared between threads
    grid, where = random(2, *sides, 13), coordinates(2, 3001, sides)
    zeros = padding == "zeros"
    expected = value_and_gradients(lambda g, w: reference.grid_sample_3d(g, w, zeros), grid, where)
    for threads in (1, 2, 5):
        with with_threads(threads):
            assert_same(value_and_gradients(lambda g, w: grid_sample_3d(g, w, padding), grid, where), expected, 1e-13)


@pytest.mark.parametrize("padding", PADDINGS)
def test_on_the_ends_values_and_slopes_are_those_of_grid_sample(padding: Padding) -> None:
    side = 8  # a power of two: the way through [−1, 1] is exact
    grid = random(1, side, side, side, 3)
    edge = torch.tensor([-1.0, -0.5, 0.0, 0.5, 3.0, 6.5, 7.0, 7.5, 8.0, -40.0, 50.0], dtype=torch.float64)
    where = torch.stack(torch.meshgrid(edge, edge, edge, indexing="ij"), -1).reshape(1, -1, 3)
    got = value_and_gradients(lambda g, w: grid_sample_3d(g, w, padding), grid, where)
    assert_same(got, value_and_gradients(lambda g, w: torch_grid_sample(g, w, padding), grid, where), 1e-12)
    zeros = padding == "zeros"
    assert_same(got, value_and_gradients(lambda g, w: reference.grid_sample_3d(g, w, zeros), grid, where), 1e-13)


@pytest.mark.parametrize("align_corners", [True, False])
def test_voxel_coordinates_are_those_of_grid_sample(align_corners: bool) -> None:
    aabb = torch.tensor([[-1.0, -2.0, 0.5], [3.0, 1.0, 0.75]], dtype=torch.float64)
    sides = (4, 9, 6)
    grid = random(1, *sides, 2)
    unit = 2 * torch.rand(1, 50, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64) - 1
    points = aabb[0] + (unit + 1) / 2 * (aabb[1] - aabb[0])
    got = grid_sample_3d(grid, voxel_coordinates(points, aabb, sides, align_corners))
    expected = F.grid_sample(grid.permute(0, 4, 1, 2, 3), unit.flip(-1)[:, None, None], padding_mode="border",
                             align_corners=align_corners)[:, :, 0, 0].mT
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)  # roundings of the way through scene units
    ends = voxel_coordinates(aabb, aabb, sides, align_corners)
    last = torch.tensor(sides) - 1.0
    overhang = 0.0 if align_corners else 0.5
    torch.testing.assert_close(ends, torch.stack([torch.zeros(3) - overhang, last + overhang]).double(), atol=0, rtol=0)


def rule(shape: tuple[int, ...], k: int) -> Tensor:
    """A table of numbers anyone can remake: a hash of the position, mean 0 and variance 1."""
    i = torch.arange(1, math.prod(shape) + 1, dtype=torch.int64)
    h = (i * 2654435761 + k * 97531) % 2**32
    h = (h ^ (h >> 15)) * 2246822519 % 2**32
    h = h ^ (h >> 13)
    return ((2 * h.double() / 2**32 - 1) * math.sqrt(3)).reshape(shape)


@pytest.mark.parametrize("axes, expected", [
    (XY_XZ_ZX, [[-.05178, -.43174], [-.43549, -.11301], [-.1764, .21861], [.00768, -.00476]]),
    (XY_XZ_ZY, [[-.05178, -.43174], [-.5165, -.06981], [-.5362, -.06978], [.08432, -.26354]]),
])
def test_planes_give_the_values_of_eg3d(axes: tuple, expected: list) -> None:
    """Values of the official renderer, box_warp 1; printed to five digits."""
    points = torch.tensor([[[0, 0, 0], [.1, .2, .3], [-.4, .45, .2], [.6, 0, 0]]], dtype=torch.float64)
    got = triplane_sample(rule((1, 3, 2, 4, 4), 7), 2 * points, axes, 1 / 3)
    torch.testing.assert_close(got, torch.tensor([expected], dtype=torch.float64), atol=6e-6, rtol=0)


def make_planes(b: int, c: int, h: int, w: int, dtype: torch.dtype = torch.float64) -> Tensor:
    image = random(b, 3 * c, h, w, dtype=dtype).to(memory_format=torch.channels_last)
    return image.unflatten(1, (3, c))


@pytest.mark.parametrize("channels", [1, 3, 4, 13, 32, 37])
@pytest.mark.parametrize("h, w", [(5, 9), (1, 4), (6, 1), (1, 1)])
def test_planes_match_grid_sample_and_the_reference(channels: int, h: int, w: int) -> None:
    planes, points = make_planes(2, channels, h, w), 2.6 * torch.rand(
        2, 83, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1.3
    flat = [i for pair in XY_XZ_ZY for i in pair]
    got = value_and_gradients(lambda v, p: triplane_sample(v, p, XY_XZ_ZY, 0.7), planes, points)
    assert_same(got, value_and_gradients(lambda v, p: torch_planes(v, p, XY_XZ_ZY, 0.7), planes, points), 1e-13)
    again = value_and_gradients(lambda v, p: reference.triplane_sample(v, p, flat, 0.7), planes, points)
    assert_same(got, again, 1e-13)
    low = value_and_gradients(lambda v, p: triplane_sample(v, p, XY_XZ_ZY, 0.7), planes.float(), points.float())
    same = value_and_gradients(lambda v, p: reference.triplane_sample(v, p, flat, 0.7), planes.float().double(),
                               points.float().double())
    # Pixel coordinates below 10 are rounded to half of 2^−20; sums of up to 80 points.
    assert_same(low, tuple(x.float() for x in same), 4e-6)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "slice of channels_last", "expanded"])
def test_planes_of_any_layout(layout: str) -> None:
    planes, points = make_planes(2, 8, 6, 7), 2 * torch.rand(2, 700, 3, dtype=torch.float64) - 1
    expected = value_and_gradients(lambda v, p: torch_planes(v, p, XY_XZ_ZX, 1.0), planes, points)
    if layout == "contiguous":
        leaf = planes.contiguous().requires_grad_(True)
        given = leaf
    elif layout == "channels_last":
        leaf = planes.clone(memory_format=torch.preserve_format).requires_grad_(True)
        given = leaf
    elif layout == "expanded":
        leaf = planes[:1].clone().requires_grad_(True)
        given = leaf.expand(2, -1, -1, -1, -1)
        same = planes[:1].expand(2, -1, -1, -1, -1)
        expected = value_and_gradients(lambda v, p: torch_planes(v, p, XY_XZ_ZX, 1.0), same, points)
        expected = (expected[0], expected[1].sum(0, keepdim=True), expected[2])
    else:
        image = F.pad(planes.flatten(1, 2), (0, 0, 0, 0, 5, 3)).contiguous(memory_format=torch.channels_last)
        leaf = image.requires_grad_(True)
        given = leaf[:, 5:-3].unflatten(1, (3, 8))
        expected = (expected[0], F.pad(expected[1].flatten(1, 2), (0, 0, 0, 0, 5, 3)), expected[2])
    where = points.clone().requires_grad_(True)
    out = triplane_sample(given, where, XY_XZ_ZX)
    got = torch.autograd.grad(out, [leaf, where], upstream(*out.shape))
    assert_same((out, *got), expected, 1e-13)


@compiled
def test_planes_in_channels_last_memory_are_not_copied_and_nor_is_their_gradient() -> None:
    image = random(1, 96, 16, 16, dtype=torch.float32).to(memory_format=torch.channels_last).requires_grad_(True)
    points, g = 2 * torch.rand(1, 40, 3) - 1, random(1, 40, 32, dtype=torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out = triplane_sample(image.unflatten(1, (3, 32)), points)
        gradient, = torch.autograd.grad(out, image, g)
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    names = {event.name for event in profile.events()}
    assert "gan3d::triplane_sample_backward" in names and not names & {"aten::copy_", "aten::clone", "aten::contiguous"}


class with_threads:
    def __init__(self, threads: int) -> None:
        self.threads = threads

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(self.threads)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.before)


@compiled
@pytest.mark.parametrize("padding", PADDINGS)
def test_the_same_bits_with_any_number_of_threads(padding: Padding) -> None:
    grid, where = random(2, 9, 17, 5, 13, dtype=torch.float32), coordinates(2, 5000, (9, 17, 5)).float()
    planes, points = make_planes(2, 12, 19, 23, torch.float32), where / 6 - 0.7
    found = []
    for threads in (1, 2, 3, 1, 4):
        with with_threads(threads):
            found.append((*value_and_gradients(lambda g, w: grid_sample_3d(g, w, padding), grid, where),
                          *value_and_gradients(lambda v, p: triplane_sample(v, p), planes, points)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("padding", PADDINGS)
def test_first_and_second_derivatives_of_the_grid(padding: Padding) -> None:
    grid = random(1, 3, 2, 4, 2).requires_grad_(True)
    where = torch.tensor([[[0.3, 0.6, 1.7], [1.4, -0.5, 2.8], [2.6, 0.2, 3.4]]], dtype=torch.float64)
    where = where.requires_grad_(True)
    torch.autograd.gradcheck(lambda g, w: grid_sample_3d(g, w, padding), (grid, where))
    torch.autograd.gradgradcheck(lambda g, w: grid_sample_3d(g, w, padding), (grid, where))


def test_first_and_second_derivatives_of_the_planes() -> None:
    planes = make_planes(1, 2, 3, 4).requires_grad_(True)
    points = torch.tensor([[[0.1, -0.4, 0.55], [0.9, -0.95, 0.3]]], dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda v, p: triplane_sample(v, p, XY_XZ_ZY, 0.5), (planes, points))
    torch.autograd.gradgradcheck(lambda v, p: triplane_sample(v, p, XY_XZ_ZY, 0.5), (planes, points))


@compiled
def test_only_what_is_needed_is_computed() -> None:
    grid, where = random(1, 3, 4, 5, 2), coordinates(1, 7, (3, 4, 5))
    planes, points = make_planes(1, 2, 3, 4), where / 5
    g, axes = random(1, 7, 2), [0, 1, 0, 2, 2, 1]
    for needed in ([True, False], [False, True], [False, False]):
        for found in (torch.ops.gan3d.grid_sample_3d_backward(g, grid, where, False, needed),
                      torch.ops.gan3d.triplane_sample_backward(g, planes, points, axes, 1.0, needed)):
            assert [x.numel() > 0 for x in found] == needed
    for padding in PADDINGS:
        both = value_and_gradients(lambda a, b, padding=padding: grid_sample_3d(a, b, padding), grid, where)
        alone = value_and_gradients(lambda a, padding=padding: grid_sample_3d(a, where, padding), grid)
        other = value_and_gradients(lambda b, padding=padding: grid_sample_3d(grid, b, padding), where)
        assert torch.equal(both[1], alone[1]) and torch.equal(both[2], other[1])
    both = value_and_gradients(lambda a, b: triplane_sample(a, b), planes, points)
    assert torch.equal(both[1], value_and_gradients(lambda a: triplane_sample(a, points), planes)[1])
    assert torch.equal(both[2], value_and_gradients(lambda b: triplane_sample(planes, b), points)[1])


@compiled
def test_are_well_behaved_ops() -> None:
    grid, where = random(2, 3, 4, 2, 3), coordinates(2, 5, (3, 4, 2))
    planes, points, axes = make_planes(2, 3, 3, 4), where / 4, [0, 1, 0, 2, 2, 0]
    leaves = [x.detach().requires_grad_(True) for x in (grid, where, planes, points)]
    torch.library.opcheck(torch.ops.gan3d.grid_sample_3d, (leaves[0], leaves[1], True))
    torch.library.opcheck(torch.ops.gan3d.triplane_sample, (leaves[2], leaves[3], axes, 0.5))
    g = random(2, 5, 3)
    for needed in ([True, True], [True, False], [False, True]):
        torch.library.opcheck(torch.ops.gan3d.grid_sample_3d_backward, (g, grid, where, False, needed))
        torch.library.opcheck(torch.ops.gan3d.triplane_sample_backward, (g, planes, points, axes, 0.5, needed))


@compiled
def test_compiled_functions_compute_the_same() -> None:
    grid, where, planes = random(1, 3, 4, 2, 3), coordinates(1, 5, (3, 4, 2)), make_planes(1, 3, 3, 4)

    sample, tri = inspect.unwrap(grid_sample_3d), inspect.unwrap(triplane_sample)  # without the tests' type checks

    def both(grid: Tensor, where: Tensor, planes: Tensor) -> Tensor:
        return sample(grid, where, "zeros") + tri(planes, where / 4)

    expected = value_and_gradients(both, grid, where, planes)
    found = value_and_gradients(torch.compile(both, fullgraph=True, backend="aot_eager"), grid, where, planes)
    assert_same(found, expected, 0)


@compiled
def test_flops_are_counted() -> None:
    grid, where = random(1, 3, 3, 3, 5).requires_grad_(True), coordinates(1, 7, (3, 3, 3))
    with FlopCounterMode(display=False) as counter:
        grid_sample_3d(grid, where).sum().backward()
        triplane_sample(make_planes(1, 4, 3, 3), where)
    assert counter.get_total_flops() == 2 * (2 * 8 * 5 * 7) + 2 * 12 * 4 * 7


@pytest.mark.parametrize("b, n, c", [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_nothing_gives_nothing(b: int, n: int, c: int) -> None:
    grid, where = random(b, 3, 4, 5, c), coordinates(b, n, (3, 4, 5))
    planes = make_planes(b, c, 3, 4)
    for out, a, w in (value_and_gradients(lambda x, y: grid_sample_3d(x, y), grid, where),
                      value_and_gradients(lambda x, y: triplane_sample(x, y), planes, where)):
        assert out.shape == (b, n, c) and w.shape == where.shape and a.shape in (grid.shape, planes.shape)
        assert not a.any() and not w.any()


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("channels", [1, 3, 13])
def test_no_coordinate_reads_or_writes_elsewhere(padding: Padding, channels: int) -> None:
    nan, inf = math.nan, math.inf
    bad = torch.tensor([nan, inf, -inf, 1e30, -1e30, 2.0**31, -(2.0**31), 1.0], dtype=torch.float32)
    where = torch.stack(torch.meshgrid(bad, bad, bad, indexing="ij"), -1).reshape(1, -1, 3)
    grid = random(1, 3, 4, 5, channels, dtype=torch.float32)
    value, grad_grid, _ = value_and_gradients(lambda g, w: grid_sample_3d(g, w, padding), grid, where)
    is_nan = where.isnan().any(-1)
    assert bool(value[is_nan].isnan().all() if padding == "border" else (value[is_nan] == 0).all())
    assert bool(value[~is_nan].isfinite().all())
    if padding == "zeros":
        assert bool(grad_grid.isfinite().all())
    planes = make_planes(1, channels, 3, 4, torch.float32)
    value, grad_planes, grad_points = value_and_gradients(lambda v, p: triplane_sample(v, p), planes, where)
    assert all(bool(x.isfinite().all()) for x in (value, grad_planes, grad_points))


def test_leading_axes_strides_and_half_precision() -> None:
    grid, where = random(2, 3, 3, 4, 5, 6), coordinates(6, 7, (3, 4, 5)).reshape(2, 3, 7, 3)
    expected = grid_sample_3d(grid.flatten(0, 1), where.flatten(0, 1)).reshape(2, 3, 7, 6)
    assert torch.equal(grid_sample_3d(grid, where), expected)
    assert torch.equal(grid_sample_3d(grid[0, 0], where[0, 0]), expected[0, 0])
    strided = grid.permute(5, 0, 1, 2, 3, 4).contiguous().permute(1, 2, 3, 4, 5, 0)
    assert torch.equal(grid_sample_3d(strided, where.flip(-1).contiguous().flip(-1)), expected)
    half = grid_sample_3d(grid.bfloat16(), where.float())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, grid_sample_3d(grid.bfloat16().float(), where.float()), atol=0, rtol=0)


def test_bad_arguments_are_refused() -> None:
    grid, where, planes = random(1, 2, 2, 2, 3), random(1, 4, 3), make_planes(1, 2, 3, 3)
    with pytest.raises(Exception, match="padding"):  # the type check of the tests may come first
        grid_sample_3d(grid, where, "reflection")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sides of at least 1"):
        grid_sample_3d(grid[:, :0], where)
    with pytest.raises(TypeError, match="(?i)float"):
        grid_sample_3d(grid.long().float().to(torch.complex64).real.to(torch.float8_e5m2), where)
    with pytest.raises(ValueError, match="axes must be three pairs"):
        triplane_sample(planes, where, ((0, 1), (0, 2), (2, 3)))
    with pytest.raises(ValueError, match="must have pixels"):
        triplane_sample(planes[..., :0], where)


@compiled
def test_the_ops_themselves_name_what_is_wrong() -> None:
    grid, where, planes = random(1, 2, 2, 2, 3), random(1, 4, 3), make_planes(1, 2, 3, 3)
    sample, tri = torch.ops.gan3d.grid_sample_3d, torch.ops.gan3d.triplane_sample
    refused = (ValueError, TypeError, RuntimeError)
    for wrong, message in (((grid.transpose(1, 4), where, False), "grid must be contiguous"),
                           ((grid, where.expand(2, 4, 3), False), "coordinates must have shape"),
                           ((grid, where.float(), False), "coordinates must be"),
                           ((grid.half(), where.half(), False), "grid must be float32 or float64"),
                           ((grid[:, :, :0], where, False), "sides of at least 1")):
        with pytest.raises(refused, match=message):
            sample(*wrong)
    for wrong, message in (((planes.contiguous(), where, [0, 1, 0, 2, 2, 1], 1.0), "planes must be contiguous"),
                           ((planes, where[..., :2].contiguous(), [0, 1, 0, 2, 2, 1], 1.0), "points must have shape"),
                           ((planes, where, [0, 1, 0, 2, 2], 1.0), "axes must be 6 numbers"),
                           ((planes, where, [0, 1, 0, 2, 2, 3], 1.0), "axes must be 0, 1 or 2"),
                           ((planes[:, :2], where, [0, 1, 0, 2, 2, 1], 1.0), "planes must have shape")):
        with pytest.raises(refused, match=message):
            tri(*wrong)
    with pytest.raises(refused, match="grad must have shape"):
        torch.ops.gan3d.grid_sample_3d_backward(random(1, 4, 2), grid, where, False, [True, True])
