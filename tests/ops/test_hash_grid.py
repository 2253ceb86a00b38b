"""The hash grid: tiny-cuda-nn's rules on known rows, grid_sample on a dense level, the reference everywhere else."""

import inspect
from collections.abc import Iterator

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gan3d import ops
from gan3d.ops.hash_grid import HashGridLevels, hash_grid, hash_grid_levels
from gan3d.ops.reference.hash_grid import hash_grid as reference
from gan3d.ops.reference.hash_grid import rows_and_weights

compiled = pytest.mark.skipif(ops.backend() == "reference", reason="no compiled ops: no C++ compiler")
SMALL = hash_grid_levels(4, 4, 1.6, 9)  # 4³, 7³ rounded up to 344, then 11³ and 17³ hashed into 512
TINY = hash_grid_levels(3, 2, 1.9, 4)  # 2³ rows, then 16 and 16


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_table(levels: HashGridLevels, features: int) -> torch.Tensor:
    return random(levels.offsets[-1], features, seed=1) - 0.5


def away_from_faces(n: int, levels: HashGridLevels) -> torch.Tensor:
    """Points at least 1e-3 of a cell from the faces of their cells: finite differences of 1e-6 do not cross them."""
    points = random(100 * n, 3)
    fractions = torch.stack([(points * s + 0.5) % 1 for s in levels.scales])
    inside = ((fractions > 1e-3) & (fractions < 1 - 1e-3)).all(-1).all(0)
    return points[inside][:n]


@pytest.mark.parametrize("levels, base, growth, rows, first_hashed", [
    (16, 16, 1.38191, 6_098_120, 5),  # the paper's, up to 2048
    (8, 16, 2.0, 2_920_448, 3),  # instant-ngp's base.json
    (16, 16, 64 ** (1 / 15), 5_710_032, 6),  # ngp_pl, up to 1024
    (16, 16, 256 ** (1 / 15), 6_299_960, 5),  # nerfacc, up to 4096
])
def test_known_configurations_have_their_number_of_rows(levels: int, base: int, growth: float, rows: int,
                                                        first_hashed: int) -> None:
    made = hash_grid_levels(levels, base, growth, 19)
    assert made.offsets[-1] == rows
    sizes = [b - a for a, b in zip(made.offsets[:-1], made.offsets[1:], strict=True)]
    assert [r**3 > size for r, size in zip(made.resolutions, sizes, strict=True)].index(True) == first_hashed
    assert sizes[first_hashed:] == [2**19] * (levels - first_hashed)


def test_resolutions_are_those_of_the_paper() -> None:
    known = (16, 23, 31, 43, 59, 81, 112, 154, 213, 295, 407, 562, 777, 1073)
    assert hash_grid_levels(16, 16, 1.38191, 19).resolutions == (*known, 1482, 2048)
    exact = (2048 / 16) ** (1 / 15)  # whose 15th power is 128 but for rounding: 2048, not 2049
    assert hash_grid_levels(16, 16, exact, 19).resolutions == (*known, 1483, 2048)


def test_levels_are_refused_that_cannot_be() -> None:
    for bad in ((0, 16, 2.0, 19), (4, 0, 2.0, 19), (4, 16, 0.5, 19), (4, 16, 2.0, 2), (4, 16, 2.0, 29),
                (30, 16, 2.0, 19)):
        with pytest.raises(ValueError, match="hash_grid_levels"):
            hash_grid_levels(*bad)


@pytest.mark.parametrize("corner", [(1, 1, 1), (3, 200, 7), (250, 1, 99), (0, 0, 255)])
def test_hashed_corner_is_in_the_row_of_its_hash(corner: tuple[int, int, int]) -> None:
    levels = hash_grid_levels(1, 257, 1.0, 19)  # 256 cells in a unit of length: positions and fractions are exact
    numbers = torch.arange(2**19, dtype=torch.float32)[:, None]
    x, y, z = corner
    expected = (x ^ (y * 2654435761) % 2**32 ^ (z * 805459861) % 2**32) % 2**19
    at_corner = (torch.tensor([corner]) - 0.5) / 256
    assert hash_grid(at_corner, numbers, levels).item() == expected


@pytest.mark.parametrize("level", [0, 1])
def test_dense_level_is_grid_sample_of_its_table(level: int) -> None:
    levels = hash_grid_levels(2, 16, 1.38191, 19)
    table = make_table(levels, 3)
    r, s = levels.resolutions[level], levels.scales[level]
    points = random(500, 3) * min(1.0, (r - 1.5) / s)  # the last half cell of an integer scale wraps
    volume = table[levels.offsets[level]:][:r**3].reshape(1, r, r, r, 3).permute(0, 4, 1, 2, 3)
    where = 2 * (points * s + 0.5) / (r - 1) - 1
    expected = torch.nn.functional.grid_sample(volume, where[None, :, None, None], align_corners=True)
    found = hash_grid(points, table, levels)[:, 3 * level:3 * level + 3]
    # a few roundings of positions of size 22
    torch.testing.assert_close(found, expected[0, :, :, 0, 0].T, atol=1e-13, rtol=0)


@pytest.mark.parametrize("features", [1, 2, 3, 4, 8, 13])
@pytest.mark.parametrize("n", [0, 1, 16, 47, 700])
def test_values_and_gradients_match_the_reference(n: int, features: int) -> None:
    points, table = random(n, 3), make_table(SMALL, features)
    seeds = random(n, 4 * features, seed=2) - 0.5
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-5)):  # sums of at most a few hundred terms
        found, expected = [], []
        for function, results in ((hash_grid, found), (lambda p, t, v: reference(p, t, *v), expected)):
            p, t = points.to(dtype).requires_grad_(True), table.to(dtype).requires_grad_(True)
            out = function(p, t, SMALL)
            results += [out.detach(), *torch.autograd.grad(out, [p, t], seeds.to(dtype))]
        scales = (1, SMALL.scales[-1] * features, 1)  # the slope of a weight is as large as its level's scale
        for a, b, scale in zip(found, expected, scales, strict=True):
            torch.testing.assert_close(a, b, atol=tolerance * scale, rtol=0)


@pytest.mark.parametrize("features", [1, 2, 3])
def test_first_and_second_derivatives(features: int) -> None:
    points, table = away_from_faces(3, TINY).requires_grad_(True), make_table(TINY, features).requires_grad_(True)
    torch.autograd.gradcheck(lambda p, t: hash_grid(p, t, TINY), (points, table))
    torch.autograd.gradgradcheck(lambda p, t: hash_grid(p, t, TINY), (points, table))


def test_derivatives_of_one_argument_alone() -> None:
    points, table = away_from_faces(4, TINY), make_table(TINY, 2)
    torch.autograd.gradcheck(lambda t: hash_grid(points, t, TINY), table.clone().requires_grad_(True))
    torch.autograd.gradcheck(lambda p: hash_grid(p, table, TINY), points.clone().requires_grad_(True))
    torch.autograd.gradgradcheck(lambda p: hash_grid(p, table, TINY), points.clone().requires_grad_(True))


def test_what_meets_in_a_row_adds_up_exactly() -> None:
    levels = hash_grid_levels(1, 65, 1.0, 3)  # 64 cells in a unit of length, 8 rows for all
    points = torch.randint(0, 256, (40, 3), generator=torch.Generator().manual_seed(0)) / 256  # quarters of cells
    table = torch.zeros(8, 2, requires_grad=True)
    grad = torch.randint(-9, 9, (40, 2), generator=torch.Generator().manual_seed(1)).float()
    found, = torch.autograd.grad(hash_grid(points, table, levels), table, grad)
    row, weight = rows_and_weights(points, 8, *levels.scales, *levels.resolutions)
    one_hot = torch.nn.functional.one_hot(row, 8).float()  # [8 n rows]
    expected = torch.einsum("cn,cnr,nf->rf", weight, one_hot, grad)
    assert torch.equal(found, expected)  # multiples of 1/64, small enough for float32 to hold them
    together = torch.cat([points, points])
    twice, = torch.autograd.grad(hash_grid(together, table, levels), table, torch.cat([grad, grad]))
    assert torch.equal(twice, 2 * found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_outside_the_cube_wrap_and_are_safe(dtype: torch.dtype) -> None:
    inf = float("inf")
    special = torch.tensor([1.0, 0.0, -0.0, 1.7, -0.3, -40.0, 1e9, -1e9, 1e30, -1e30, inf, -inf, float("nan")])
    points = torch.cartesian_prod(special, special, special).to(dtype)
    table = make_table(SMALL, 2).to(dtype).requires_grad_(True)
    out = hash_grid(points, table, SMALL)
    expected = reference(points, table, *SMALL)
    # the same rows; where a fraction survives, the same weights
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0, equal_nan=True)
    is_finite = points.isfinite().all(1)
    assert out[~is_finite].isnan().all() and out[is_finite].isfinite().all()
    finite = points[is_finite]
    seeds = torch.ones(len(finite), 8, dtype=dtype)
    found, = torch.autograd.grad(hash_grid(finite, table, SMALL), table, seeds)
    wanted, = torch.autograd.grad(reference(finite, table, *SMALL), table, seeds)
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=0)  # float32 sums of a thousand terms near 1
    poisoned, = torch.autograd.grad(hash_grid(points, table, SMALL).sum(), table)
    assert poisoned.isnan().any() and poisoned.shape == table.shape


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_bits_do_not_depend_on_the_number_of_threads(threads: None) -> None:
    levels = hash_grid_levels(3, 16, 1.9, 12)
    points, table = random(20_001, 3).float().requires_grad_(True), make_table(levels, 3).float().requires_grad_(True)
    seeds = random(20_001, 9, seed=2).float()
    runs = []
    for count in (1, 2, 1, 3, 7):  # 7: more than there are levels
        torch.set_num_threads(count)
        out = hash_grid(points, table, levels)
        runs.append((out, *torch.autograd.grad(out, [points, table], seeds)))
    for run in runs[1:]:
        for a, b in zip(runs[0], run, strict=True):
            assert torch.equal(a, b)


def test_leading_axes_layout_and_half_precision_do_not_matter() -> None:
    points, table = random(3, 5, 7), make_table(SMALL, 6)
    plain = hash_grid(points[..., 2:5].reshape(-1, 3).contiguous(), table[:, ::3].contiguous(), SMALL)
    assert torch.equal(hash_grid(points[..., 2:5], table[:, ::3], SMALL), plain.reshape(3, 5, 8))
    assert torch.equal(hash_grid(points[0, 0, 2:5], table[:, ::3], SMALL), plain[0])
    half = hash_grid(points[0, :, :3].half(), table.half(), SMALL)
    assert half.dtype == torch.float32
    assert torch.equal(half, hash_grid(points[0, :, :3].half().float(), table.half().float(), SMALL))


def test_bad_arguments_are_refused() -> None:
    points, table = random(2, 3), make_table(SMALL, 2)
    with pytest.raises(ValueError, match="table must have"):
        hash_grid(points, table[1:], SMALL)
    with pytest.raises(TypeError, match="table is torch.float32"):
        hash_grid(points, table.float(), SMALL)
    with pytest.raises(TypeError, match="(?i)float"):
        hash_grid(torch.zeros(2, 3, dtype=torch.int64), table, SMALL)


@compiled
def test_the_op_itself_names_what_is_wrong() -> None:
    op, points, table = torch.ops.gan3d.hash_grid, random(4, 3), make_table(SMALL, 2)
    scales, resolutions, offsets = SMALL
    for bad, message in [
        ((random(3, 4).T, table, *SMALL), "points must be contiguous"),
        ((points, make_table(SMALL, 4)[:, ::2], *SMALL), "table must be contiguous"),
        ((random(4, 4), table, *SMALL), "points must have shape"),
        ((points, table[:, 0].contiguous(), *SMALL), "table must have shape"),
        ((points, table, scales[1:], resolutions, offsets), "one entry a level"),
        ((points, table, scales, resolutions, offsets[1:]), "one entry a level"),
        ((points, table[1:], *SMALL), "offsets must go"),
        ((points, table, scales, resolutions, (0, 500, 400, *offsets[3:])), "offsets must grow"),
        ((points, table, scales, (0, *resolutions[1:]), offsets), "resolutions must be"),
        ((points, table, scales, (9, *resolutions[1:]), (0, 63, *offsets[2:])), "power of two"),
        ((points, table[:, :0].contiguous(), *SMALL), "at least one feature"),
    ]:
        with pytest.raises((ValueError, RuntimeError), match=message):
            op(*bad)
    with pytest.raises((TypeError, RuntimeError), match="table must be"):
        op(points, table.float(), *SMALL)
    with pytest.raises((ValueError, RuntimeError), match="grad must have shape"):
        torch.ops.gan3d.hash_grid_backward(random(4, 7), points, table, *SMALL, [True, True])


@compiled
def test_gradients_nobody_needs_are_not_computed() -> None:
    op, grad, points, table = torch.ops.gan3d.hash_grid_backward, random(9, 8), random(9, 3), make_table(SMALL, 2)
    for_points, for_table = op(grad, points, table, *SMALL, [True, True])
    for needed in ([True, False], [False, True], [False, False]):
        a, b = op(grad, points, table, *SMALL, needed)
        assert torch.equal(a, for_points) if needed[0] else a.numel() == 0
        assert torch.equal(b, for_table) if needed[1] else b.numel() == 0


@compiled
def test_is_a_well_behaved_op() -> None:
    points, table = away_from_faces(5, TINY).requires_grad_(True), make_table(TINY, 2).requires_grad_(True)
    levels, grad = [list(x) for x in TINY], random(5, 6).requires_grad_(True)
    torch.library.opcheck(torch.ops.gan3d.hash_grid, (points, table, *levels))
    torch.library.opcheck(torch.ops.gan3d.hash_grid_backward, (grad, points, table, *levels, [True, True]))
    torch.library.opcheck(torch.ops.gan3d.hash_grid_backward, (grad, points.detach(), table, *levels, [False, True]))


@compiled
def test_operations_are_counted() -> None:
    points, table = random(10, 3), make_table(SMALL, 2).requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        hash_grid(points, table, SMALL).sum().backward()
    assert counter.get_total_flops() == 2 * 10 * 4 * (30 + 16 * 2)  # there and back, without the gradient of points


@compiled
def test_compiles_in_one_graph() -> None:
    points, table = random(33, 3), make_table(SMALL, 2).requires_grad_(True)
    function = inspect.unwrap(hash_grid)  # the tracer does not follow the checks of shapes that tests switch on

    def loss(p: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return function(p, t, SMALL).square().sum()

    found, = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(points, table), table)
    expected, = torch.autograd.grad(loss(points, table), table)
    torch.testing.assert_close(found, expected, atol=1e-13, rtol=0)
