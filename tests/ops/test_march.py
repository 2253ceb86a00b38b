"""Marching: closed forms, the reference to the bit, and skipping that changes nothing."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gan3d import ops
from gan3d.ops.march import Samples, march, ray_aabb
from gan3d.ops.occupancy import occupied
from gan3d.ops.reference.march import march as reference_march
from gan3d.ops.reference.march import random_bits
from gan3d.ops.reference.march import ray_aabb as reference_ray_aabb
from gan3d.rays import intersect_aabb

compiled = pytest.mark.skipif(ops.backend() == "reference", reason="no compiled ops: no C++ compiler")
ROOT = Path(__file__).resolve().parents[2]
DTYPES = [torch.float32, torch.float64]
JITTERS = ("none", "ray", "sample")
BOX = [[-1.0, -0.5, -2.0], [1.0, 1.5, 1.0]]  # not a cube, not about the origin


def rays(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Origins in and around the box, directions anywhere; among them some that are awkward."""
    random = torch.Generator().manual_seed(seed)
    o = 1.5 * torch.randn(n, 3, generator=random, dtype=torch.float64)
    d = torch.randn(n, 3, generator=random, dtype=torch.float64)
    d[::3] = -o[::3] + 0.7 * torch.randn(len(o[::3]), 3, generator=random, dtype=torch.float64)  # towards the box
    d[1::10, 0] = 0
    d[2::10, 1:] = 0  # along an axis
    d[3::10, 2] = 1e-7
    o[3::10, 2] = 1.0  # along a face of the box, nearly
    o[4::10] = torch.tensor(BOX[0], dtype=torch.float64)  # at a corner
    d[5::10] = -d[5::10].abs()
    return o.to(dtype), torch.nn.functional.normalize(d, dim=-1).to(dtype)


def bits(levels: int, resolution: tuple[int, int, int], kind: str, seed: int = 0) -> torch.Tensor:
    """Words of full cells, of cells full at random (one in 20), or of cells in clumps with large gaps."""
    cells = math.prod(resolution)
    random = torch.Generator().manual_seed(seed)
    if kind == "full":
        full = torch.ones(levels, cells, dtype=torch.bool)
    elif kind == "random":
        full = torch.rand(levels, cells, generator=random) < 0.05
    else:
        clump = min(512, cells // 4)
        full = (torch.rand(levels, cells // clump + 1, generator=random) < 0.15).repeat_interleave(clump, 1)[:, :cells]
        full = full & (torch.rand(levels, cells, generator=random) < 0.7)
    weights = torch.ones((), dtype=torch.int64) << torch.arange(64)
    return (full.reshape(levels, -1, 64) * weights).sum(-1)


def same(a: tuple, b: tuple) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


CASES = {  # levels, resolution, kind, step, cone, max_step
    "one level": (1, (32, 32, 32), "clumps", 0.02, 0.0, math.inf),
    "no cube": (1, (12, 24, 20), "clumps", 0.021, 0.0, math.inf),
    "long steps": (1, (16, 16, 16), "clumps", 0.3, 0.0, math.inf),
    "no gaps": (1, (16, 8, 24), "random", 0.03, 0.0, math.inf),
    "cascade": (4, (16, 16, 16), "clumps", 0.05, 0.0, math.inf),
    "cascade of odd halves": (3, (12, 20, 4), "clumps", 0.04, 0.0, math.inf),
    "cascade, long steps": (4, (16, 16, 16), "random", 0.4, 0.0, math.inf),
    "cone": (3, (16, 16, 16), "clumps", 0.02, 1 / 64, 0.5),
    "cone, one level": (1, (16, 16, 16), "random", 0.02, 1 / 64, 0.05),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_march_matches_the_reference_to_the_bit(case: str, dtype: torch.dtype) -> None:
    levels, resolution, kind, *lattice = CASES[case]
    o, d = rays(331, dtype)
    words, box = bits(levels, resolution, kind), torch.tensor(BOX, dtype=dtype)
    near, far = torch.linspace(-0.5, 1, 331, dtype=dtype), torch.linspace(1, 30, 331, dtype=dtype)
    for jitter in range(3):
        found = march(o, d, near, far, words, box, resolution, *lattice, 200, JITTERS[jitter], 5)
        expected = reference_march(o, d, near, far, words, box, resolution, *lattice, 200, jitter, 5)
        assert same(found, expected)
    assert 50 < len(found.t) < 331 * 200  # the case has samples, and gaps or ends


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("levels", [1, 2])
def test_a_few_rays_march_as_among_many(levels: int, dtype: torch.dtype) -> None:
    # few rays skip word by word, many through a coarser grid made first; 64³ cells lie between for 4 and 400 rays
    o, d = rays(400, dtype)
    words, box = bits(levels, (64, 64, 64), "clumps"), torch.tensor(BOX, dtype=dtype)
    near, far = torch.zeros(400, dtype=dtype), torch.full((400,), math.inf, dtype=dtype)
    for jitter in JITTERS:
        many = march(o, d, near, far, words, box, (64, 64, 64), 0.01, jitter=jitter, seed=3)
        few = march(o[:4], d[:4], near[:4], far[:4], words, box, (64, 64, 64), 0.01, jitter=jitter, seed=3)
        end = int(many.offsets[4])
        assert end > 0
        assert same(few, (many.offsets[:5], *(x[:end] for x in many[1:])))


@pytest.mark.parametrize("cone", [0.0, 0.01])
@pytest.mark.parametrize("jitter", JITTERS)
def test_skipping_keeps_the_occupied_points_of_the_uniform_march(jitter: str, cone: float) -> None:
    o, d = rays(97)
    box, resolution = torch.tensor(BOX), (24, 16, 20)
    words = bits(3, resolution, "clumps")
    near, far = torch.full((97,), 0.1), torch.full((97,), 12.0)
    # steps no longer than the shortest cell: every point asks the finest level that contains it
    free = march(o, d, near, far, None, None, None, 0.04, cone, 0.08, 10_000, jitter, 1)
    found = march(o, d, near, far, words, box, resolution, 0.04, cone, 0.08, 10_000, jitter, 1)
    ray = free.ray_index.long()
    kept = occupied(o[ray] + free.t[:, None] * d[ray], words, box, resolution)
    assert 0.01 < kept.float().mean() < 0.5
    assert same(found[1:], (free.ray_index[kept], free.t[kept], free.delta[kept]))
    assert torch.equal(found.offsets[1:] - found.offsets[:-1], torch.bincount(ray[kept], minlength=97).int())


def test_march_through_full_cells_is_the_uniform_march_inside_the_box() -> None:
    o, d = rays(200)
    box = torch.tensor(BOX)
    near, far = (x[:, 0] for x in ray_aabb(o, d, box[None]))
    near, far = near + 1e-4, far - 1e-4  # no point so near a face that rounding decides
    full = march(o, d, near, far, bits(1, (16, 16, 16), "full"), box, (16, 16, 16), 0.013, max_samples=10_000)
    free = march(o, d, near, far, None, None, None, 0.013, max_samples=10_000)
    # a ray within 1e-6 of a face may round either way along its whole length
    grazing = ((o - box[0]).abs().amin(-1) < 1e-6) | ((o - box[1]).abs().amin(-1) < 1e-6)
    keep = [~grazing[s.ray_index.long()] for s in (full, free)]
    assert len(free.t) > 5000
    assert same([x[keep[0]] for x in full[1:]], [x[keep[1]] for x in free[1:]])


def test_uniform_lattice_is_product_and_sum() -> None:
    o, d = torch.zeros(3, 3), torch.tensor([[0.0, 0.0, 1.0]]).repeat(3, 1)
    near, far = torch.tensor([0.0, 0.5, 2.0]), torch.tensor([1.0, 1.2, 2.0])
    samples = march(o, d, near, far, None, None, None, 0.3)
    assert samples.offsets.tolist() == [0, 3, 5, 5]  # ½, 1½ and 2½ steps fit 1.0; ½ and 1½ fit 0.7; nothing fits 0
    assert samples.ray_index.tolist() == [0, 0, 0, 1, 1]
    torch.testing.assert_close(samples.t, torch.tensor([0.15, 0.45, 0.75, 0.65, 0.95]))  # default: some roundings
    assert (samples.delta == 0.3).all()


def test_growing_intervals_join_without_gaps() -> None:
    o, d = torch.zeros(1, 3, dtype=torch.float64), torch.tensor([[1.0, 0, 0]], dtype=torch.float64)
    near, far = torch.tensor([0.2], dtype=torch.float64), torch.tensor([60.0], dtype=torch.float64)
    _, _, t, delta = march(o, d, near, far, None, None, None, 0.1, 0.1, 2.0)
    start, end = t - delta / 2, t + delta / 2
    assert start[0] == pytest.approx(0.2, abs=1e-12)
    torch.testing.assert_close(start[1:], end[:-1], atol=1e-12, rtol=0)  # sums of numbers up to 60, in float64
    torch.testing.assert_close(delta, (0.1 * start).clamp(0.1, 2.0), atol=1e-12, rtol=0)


def test_the_nearest_samples_are_kept() -> None:
    o, d = rays(150)
    box, words = torch.tensor(BOX), bits(2, (16, 16, 16), "random")
    near, far = torch.zeros(150), torch.full((150,), 20.0)
    for cone in (0.0, 0.01):
        every = march(o, d, near, far, words, box, (16, 16, 16), 0.02, cone)
        some = march(o, d, near, far, words, box, (16, 16, 16), 0.02, cone, max_samples=7)
        counts = every.offsets.diff()
        assert torch.equal(some.offsets.diff(), counts.clamp(max=7)) and counts.max() > 7
        rank = torch.arange(len(every.t)) - every.offsets[every.ray_index.long()]
        assert same(some[1:], [x[rank < 7] for x in every[1:]])


def test_rays_that_cannot_have_samples_have_none() -> None:
    inf, nan = math.inf, math.nan
    limits = torch.tensor([[1, 1], [2, 1], [nan, 1], [0, nan], [inf, inf], [-inf, 1], [0, -inf], [0, 1.0]])
    o, d = torch.zeros(8, 3), torch.tensor([[0.0, 1.0, 0.0]]).repeat(8, 1)
    box, words = torch.tensor([[-1.0] * 3, [1.0] * 3]), bits(1, (4, 4, 4), "full")
    for grid in ((words, box, (4, 4, 4)), (None, None, None)):
        for cone in (0.0, 0.1):
            assert march(o, d, *limits.T, *grid, 0.25, cone).offsets.tolist() == [0] * 8 + [4]
    o[7, 0] = nan
    assert march(o, d, *limits.T, words, box, (4, 4, 4), 0.25).offsets[-1] == 0
    flat = torch.tensor([[-1.0, -1, 0], [1, 1, 0]])
    assert march(o.zero_(), d, *limits.T, words, flat, (4, 4, 4), 0.25).offsets[-1] == 0


def test_march_without_an_end_stops_at_the_outermost_box() -> None:
    o, d = rays(64)
    box, words = torch.tensor(BOX), bits(3, (8, 8, 8), "full")
    samples = march(o, d, torch.zeros(64), torch.full((64,), math.inf), words, box, (8, 8, 8), 0.05, max_samples=10**6)
    ray = samples.ray_index.long()
    points = o[ray] + samples.t[:, None] * d[ray]
    centre, half = (box[0] + box[1]) / 2, (box[1] - box[0]) / 2 * 4
    assert len(points) > 1000 and ((points - centre).abs() <= half + 1e-5).all()  # a few roundings of 8


def test_without_rays_there_are_no_samples() -> None:
    none, box = torch.zeros(0, 3), torch.tensor(BOX)
    for grid in ((bits(1, (4, 4, 4), "full"), box, (4, 4, 4)), (None, None, None)):
        for cone in (0.0, 0.1):
            samples = march(none, none, none[:, 0], none[:, 0], *grid, 0.1, cone)
            assert samples.offsets.tolist() == [0] and len(samples.t) == 0
            assert [x.dtype for x in samples] == [torch.int32, torch.int32, torch.float32, torch.float32]


@pytest.mark.parametrize("cone", [0.0, 0.02])
def test_results_do_not_depend_on_threads(cone: float) -> None:
    o, d = rays(3000)
    near, far = torch.zeros(3000), torch.full((3000,), 9.0)
    grid = bits(1, (16, 16, 16), "clumps"), torch.tensor(BOX), (16, 16, 16)
    before = torch.get_num_threads()
    found: list[Samples] = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            found.append(march(o, d, near, far, *grid, 0.05, cone, jitter="sample"))
    finally:
        torch.set_num_threads(before)
    assert same(found[0], found[1]) and same(found[1], found[2])


def test_jitter_is_uniform_reproducible_and_the_rays_own() -> None:
    n, steps = 400, 64
    o, d = torch.zeros(n, 3), torch.tensor([[1.0, 0, 0]]).repeat(n, 1)

    def offsets(jitter: str, seed: int, count: int = n) -> torch.Tensor:
        limits = torch.zeros(count), torch.full((count,), float(steps))
        return march(o[:count], d[:count], *limits, None, None, None, 1.0, jitter=jitter, seed=seed).t.frac()

    each = offsets("sample", 0)
    assert len(each) == n * steps and torch.equal(each, offsets("sample", 0))
    assert not torch.equal(each, offsets("sample", 1)) and not torch.equal(each, offsets("sample", 1 << 40))
    assert torch.equal(each[: 10 * steps], offsets("sample", 0, 10))
    # mean and variance of 25,600 uniform numbers, within 5 standard deviations of theirs
    assert abs(each.mean() - 0.5) < 5 * math.sqrt(1 / 12 / len(each))
    assert abs(each.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / len(each))
    rows = each.reshape(n, steps)
    # neighbours along the ray and across rays are uncorrelated: 5 standard deviations of 1/√25,600
    for a, b in ((rows[:, 1:], rows[:, :-1]), (rows[1:], rows[:-1])):
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 5 / 160
    per_ray = offsets("ray", 0).reshape(n, steps)
    assert (per_ray - per_ray[:, :1]).abs().max() < 1e-5  # rounding of numbers up to 64
    assert len(per_ray[:, 0].unique()) > n - 3 and abs(per_ray[:, 0].mean() - 0.5) < 5 * math.sqrt(1 / 12 / n)


def philox(seed: int, a: int, b: int) -> int:
    """The generator in whole numbers of Python."""
    keys = [seed & 0xFFFFFFFF, seed >> 32]
    for turn in range(10):
        product = 0xD256D193 * a
        a, b = (product >> 32) ^ keys[0] ^ b, product & 0xFFFFFFFF
        keys[0] = (keys[0] + 0x9E3779B9) & 0xFFFFFFFF
        if turn == 4:
            keys[0] ^= keys[1]
    return a


PINNED = [3135431489, 863637395]


def test_random_numbers_are_the_same_in_every_language() -> None:
    seeds = (0, 1, 0x0123456789ABCDEF, 2**63 - 1)
    a, b = torch.tensor([0, 1, 7, 2**31, 2**32 - 1]), torch.tensor([0, 3, 2**32 - 1, 12345, 2**31])
    for seed in seeds:
        expected = [philox(seed, i, j) for i, j in zip(a.tolist(), b.tolist(), strict=True)]
        assert random_bits(seed, a, b).tolist() == expected
        o, d = torch.zeros(3, 3, dtype=torch.float64), torch.ones(3, 3, dtype=torch.float64)
        near, far = torch.zeros(3, dtype=torch.float64), torch.full((3,), 4.0, dtype=torch.float64)
        t = march(o, d, near, far, None, None, None, 1.0, jitter="sample", seed=seed).t  # exact: k + a multiple of 2⁻²⁴
        assert t.tolist() == [k + (philox(seed, ray, k) >> 8) / 2**24 for ray in range(3) for k in range(4)]
    # what files and runs of earlier versions were made with
    pinned = [random_bits(0x0123456789ABCDEF, torch.tensor(i), torch.tensor(j)).item() for i, j in ((0, 0), (7, 12345))]
    assert pinned == PINNED





# ray_aabb


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ray_aabb_matches_the_reference_and_the_suites_slab_test(dtype: torch.dtype) -> None:
    o, d = rays(500, dtype)
    random = torch.Generator().manual_seed(4)
    boxes = (2 * torch.randn(7, 2, 3, generator=random, dtype=torch.float64)).sort(dim=1).values.to(dtype)
    boxes[0] = torch.tensor(BOX, dtype=dtype)
    near, far = ray_aabb(o, d, boxes, 0.2, 3.0)
    assert same((near, far), reference_ray_aabb(o, d, boxes, 0.2, 3.0))
    assert not near.isnan().any() and not far.isnan().any() and (near >= 0.2).all() and (far <= 3).all()
    plain = (d.abs() > 1e-6).all(-1)  # the other replaces zeros by 1e-9
    for j, box in enumerate(boxes):
        enter, leave = intersect_aabb(o[plain], d[plain], box)
        enter, leave = enter.clamp(min=0.2), leave.clamp(max=3.0)
        hit = leave > enter
        assert torch.equal(far[plain, j] > near[plain, j], hit)
        assert torch.equal(near[plain, j][hit], enter[hit]) and torch.equal(far[plain, j][hit], leave[hit])
    middle = (near + far)[..., None] / 2
    points = o[:, None] + middle * d[:, None]
    inside = ((points >= boxes[:, 0] - 1e-5) & (points <= boxes[:, 1] + 1e-5)).all(-1)  # a few roundings of 10
    assert inside[far > near].all() and (far > near).float().mean() > 0.05


def test_ray_aabb_of_awkward_rays() -> None:
    box = torch.tensor([[[0.0, 0, 0], [1, 2, 3]]])
    o, d, expected = zip(
        ([0.5, 1, 1], [1, 0, 0], (0, 0.5)),  # from inside
        ([-1, 1, 1], [1, 0, 0], (1, 2)),  # along an axis
        ([-1, 1, 1], [-1, 0, 0], (0, 0)),  # the box is behind
        ([-1, 2.5, 1], [1, 0, 0], (0, 0)),  # past it
        ([-1, 2, 1], [1, 0, 0], (1, 2)),  # in the plane of a face
        ([0, 1, 1], [1, 0, 0], (0, 1)),  # from a face into the box
        ([0, 1, 1], [-1, 0, 0], (0, 0)),  # from a face out of it
        ([0, 1, 1], [0, 0, 1], (0, 2)),  # from a face along it
        ([-1, -1, 0], [1, -1, 0], (0, 0)),  # away
        ([-1, 1, 0], [math.sqrt(0.5), -math.sqrt(0.5), 0], (0, 0)),  # touches an edge
        ([0.5, 1, 1], [-0.0, 0, -1], (0, 1)),  # a negative zero
        strict=True,
    )
    near, far = ray_aabb(torch.tensor(o), torch.tensor(d, dtype=torch.float32), box)
    torch.testing.assert_close(torch.cat([near, far], 1), torch.tensor(expected, dtype=torch.float32))  # some roundings
    sheet = torch.tensor([[[0.0, 0, 1], [1, 2, 1]]])  # no thickness
    o, d = torch.tensor([[0.5, 1, 0], [-1, 1, 1.0]]), torch.tensor([[0.0, 0, 1], [1, 0, 0]])
    near, far = ray_aabb(o, d, sheet, 0.25)
    assert near.tolist() == [[0.25], [1]] and far.tolist() == [[0.25], [2]]


def test_ray_aabb_takes_any_leading_axes() -> None:
    o, d = rays(12)
    boxes = torch.tensor([BOX, BOX])
    near, far = ray_aabb(o.reshape(3, 4, 3), d.reshape(3, 4, 3), boxes)
    assert near.shape == far.shape == (3, 4, 2)
    assert same((near.reshape(12, 2), far.reshape(12, 2)), ray_aabb(o, d, boxes))
    assert ray_aabb(o[:0], d[:0], boxes)[0].shape == (0, 2) and ray_aabb(o, d, boxes[:0])[1].shape == (12, 0)


# as ops


@compiled
def test_marching_ops_are_well_behaved() -> None:
    o, d = rays(20)
    near, far, box = torch.zeros(20), torch.full((20,), 5.0), torch.tensor(BOX)
    torch.library.opcheck(torch.ops.gan3d.ray_aabb, (o, d, box[None], 0.0, 9.0))
    for words, aabb in ((bits(2, (8, 8, 8), "random"), box), (None, None)):
        torch.library.opcheck(torch.ops.gan3d.march,
                              (o, d, near, far, words, aabb, (8, 8, 8), 0.1, 0.0, 1.0, 100, 1, 7))


GRAPH = """
import torch
from gan3d.ops.march import march
from gan3d.ops.occupancy import occupancy_threshold, pack_bits, update_occupancy

random = torch.Generator().manual_seed(0)
o, box = torch.zeros(20, 3), torch.tensor([[-1.0] * 3, [1.0] * 3])
d = torch.nn.functional.normalize(torch.randn(20, 3, generator=random), dim=-1)
values, new = torch.rand(2, 1, 512, generator=random)

def depth(values, new, seed):
    values = update_occupancy(values, torch.arange(100), new[0, :100])
    words = pack_bits(values, occupancy_threshold(values, 0.7))
    samples = march(o, d, torch.zeros(20), torch.ones(20), words, box, (8, 8, 8), 0.1, jitter="ray", seed=seed)
    return torch.zeros(20).index_add(0, samples.ray_index, samples.t * samples.delta)

torch._dynamo.config.capture_dynamic_output_shape_ops = True
compiled = torch.compile(depth, fullgraph=True, backend="aot_eager")
results = set()
for seed in range(12):  # the graph may be made again only eight times: a seed must be no constant of it
    assert torch.equal(compiled(values, new, seed), depth(values, new, seed))
    results.add(float(depth(values, new, seed).sum()))
assert len(results) == 12 and min(results) > 0
"""


@compiled
def test_update_and_march_compile_as_one_graph() -> None:
    # by itself: the tracer does not follow the checks of shapes that these tests switch on
    done = subprocess.run([sys.executable, "-c", GRAPH], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_arguments_are_made_contiguous_and_wide_enough() -> None:
    o, d = rays(40)
    near, far, box = torch.zeros(40), torch.full((40,), 5.0), torch.tensor(BOX)
    words = bits(1, (8, 8, 8), "random")
    expected = march(o[::2].clone(), d[::2].clone(), near[::2], far[::2], words, box, (8, 8, 8), 0.1)
    assert same(march(o[::2], d[::2], near[::2], far[::2], words[0], box.T.contiguous().T, (8, 8, 8), 0.1), expected)
    half = march(o.half(), d.half(), near.half(), far.half(), words, box.half(), (8, 8, 8), 0.1)
    assert half.t.dtype == torch.float32 and same(half, march(o.half().float(), d.half().float(), near, far, words, box,
                                                              (8, 8, 8), 0.1))


def test_bad_arguments_are_refused() -> None:
    o, d = rays(2)
    near, far, box, words = torch.zeros(2), torch.ones(2), torch.tensor(BOX), bits(1, (4, 4, 4), "full")

    def call(**changed: object) -> None:
        march(**{"rays_o": o, "rays_d": d, "near": near, "far": far, "words": words, "aabb": box,
                 "resolution": (4, 4, 4), "step": 0.1} | changed)

    call()
    for changed, complaint in (({"step": 0.0}, "step"), ({"cone": -1.0}, "cone"), ({"max_step": 0.05}, "max_step"),
                               ({"max_samples": 0}, "max_samples"), ({"seed": -1}, "seed"), ({"seed": 2**63}, "seed"),
                               ({"aabb": None}, "aabb"), ({"resolution": (8, 4, 4)}, "resolution"),
                               ({"resolution": (3, 4, 4)}, "resolution"), ({"step": math.nan}, "step")):
        with pytest.raises(ValueError, match=complaint):
            call(**changed)
    with pytest.raises(TypeError, match="(?i)float"):
        call(rays_o=o.long())
    with pytest.raises((ValueError, TypeError), match="jitter"):
        call(jitter="noise")


@compiled
def test_the_marching_ops_name_what_is_wrong() -> None:
    o, d = rays(4)
    near, far, box, words = torch.zeros(4), torch.ones(4), torch.tensor(BOX), bits(1, (4, 4, 4), "full")

    def call(*changed: tuple[int, object]) -> None:
        arguments: list = [o, d, near, far, words, box, (4, 4, 4), 0.1, 0.0, 1.0, 9, 0, 0]
        for position, value in changed:
            arguments[position] = value
        torch.ops.gan3d.march(*arguments)

    call()
    for position, value, complaint in ((0, o.T.contiguous().T, "rays_o must be contiguous"),
                                       (1, d.double(), "rays_d must be"), (2, near[:3], "near must have shape"),
                                       (3, far[:, None], "far must have shape"), (4, words.int(), "words must be"),
                                       (4, words[:, :0], "words must have shape"), (5, box[0], "aabb must have shape"),
                                       (6, (4, 4), "resolution"), (11, 3, "jitter")):
        with pytest.raises((ValueError, TypeError, RuntimeError), match=complaint):
            call((position, value))
    with pytest.raises((ValueError, RuntimeError), match="boxes must have shape"):
        torch.ops.gan3d.ray_aabb(o, d, box, 0.0, 1.0)
