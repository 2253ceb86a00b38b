"""Occupancy: bits in the right places, levels, the moving maximum and its threshold."""

import math

import pytest
import torch

from gan3d import ops
from gan3d.ops.cells import cell_index, cell_position
from gan3d.ops.occupancy import occupancy_threshold, occupied, pack_bits, unpack_bits, update_occupancy
from gan3d.ops.reference import occupancy as reference

compiled = pytest.mark.skipif(ops.backend() == "reference", reason="no compiled ops: no C++ compiler")
DTYPES = [torch.float32, torch.float64]


def uniform(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(*size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0,), (64,), (3, 192), (2, 2, 64)])
def test_bits_are_values_above_the_threshold(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = uniform(*shape, dtype=dtype)
    for threshold in (0.3, torch.tensor(0.3, dtype=dtype), values.max() if values.numel() else 1.0):
        words = pack_bits(values, threshold)
        limit = torch.as_tensor(threshold, dtype=dtype)
        assert words.dtype == torch.int64 and words.shape == (*shape[:-1], shape[-1] // 64)
        assert torch.equal(unpack_bits(words), values > limit)  # strictly: the largest value is not above itself
        assert torch.equal(words.flatten(), reference.pack_bits(values.flatten(), limit))
    assert not unpack_bits(pack_bits(torch.full((64,), math.nan), 0.0)).any()


def test_bit_i_of_a_word_is_its_cell_i() -> None:
    values = torch.zeros(128)
    values[[0, 5, 63, 64]] = 1
    assert pack_bits(values, 0.5).tolist() == [1 + 32 - 2**63, 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("resolution", [(8, 8, 8), (12, 4, 20)])
def test_every_cell_is_found_by_a_point_in_it(resolution: tuple[int, int, int], dtype: torch.dtype) -> None:
    cells = math.prod(resolution)
    box = torch.tensor([[-1.0, 2, 0], [1, 3, 5]], dtype=dtype)
    bits = uniform(2, cells) < 0.4
    words = pack_bits(bits.float(), 0.5)
    place = (cell_position(torch.arange(cells), resolution) + 0.05 + 0.9 * uniform(cells, 3, dtype=dtype))
    unit = place / torch.tensor(resolution, dtype=dtype)
    assert torch.equal(occupied(box[0] + unit * (box[1] - box[0]), words, box, resolution), bits[0])
    wide = (unit - 0.5) * 2  # in boxes: the second level spans [−1, 1]
    outer = (wide.abs() > 0.5).any(-1)
    points = (box[0] + box[1]) / 2 + wide * (box[1] - box[0])
    assert torch.equal(occupied(points, words, box, resolution)[outer], bits[1, outer])
    assert not occupied(points, words[:1], box, resolution)[outer].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_occupied_matches_the_reference(dtype: torch.dtype) -> None:
    box = torch.tensor([[-1.0, -1, -1], [1, 1, 1]], dtype=dtype)
    words = pack_bits(uniform(5, 16 * 8 * 12), 0.5)
    points = torch.randn(4000, 3, generator=torch.Generator().manual_seed(1), dtype=dtype) * 4
    points[::7] = points[::7].round()  # on faces
    points[5], points[6], points[8] = math.nan, math.inf, 3e38
    found = occupied(points, words, box, (16, 8, 12))
    assert torch.equal(found, reference.occupied(points, words, box, (16, 8, 12)))
    assert 0.2 < found.float().mean() < 0.6 and not found[[5, 6, 8]].any()
    assert torch.equal(occupied(points.reshape(50, 80, 3)[:, ::2], words, box, (16, 8, 12)),
                       found.reshape(50, 80)[:, ::2])
    assert occupied(points[:0], words, box, (16, 8, 12)).shape == (0,)
    assert not occupied(points, words, box[[1, 0]], (16, 8, 12)).any()  # corners exchanged: no volume


def test_a_box_contains_its_low_faces_only() -> None:
    box = torch.tensor([[0.0, 0, 0], [4, 4, 4]])
    corner = torch.zeros(64)
    corner[cell_index(torch.tensor([0, 0, 0]), (4, 4, 4))] = 1
    words = pack_bits(corner, 0.5)
    assert occupied(torch.tensor([[0.0, 0, 0], [1, 0, 0], [4, 4, 4]]), words, box, (4, 4, 4)).tolist() == [
        True, False, False]
    assert not occupied(torch.tensor([4.0, 4, 4]), ~words * 0 - 1, box, (4, 4, 4)).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("everywhere", [True, False])
def test_update_is_a_moving_maximum(everywhere: bool, dtype: torch.dtype) -> None:
    values = torch.tensor([1.0, 0.5, -1.0, 0.0, 0.8, 2.0], dtype=dtype)
    index = torch.tensor([4, 0, 2, 4, 3, 4])
    new = torch.tensor([0.3, 0.99, 5.0, 0.9, 0.7, 0.1], dtype=dtype)
    kept = values.clone()
    out = update_occupancy(values, index, new, 0.5, everywhere)
    untouched = 0.5 if everywhere else 1.0
    assert torch.equal(out, torch.tensor([0.99, 0.5 * untouched, -1.0, 0.7, 0.9, 2 * untouched], dtype=dtype))
    assert torch.equal(values, kept)
    again = update_occupancy(values, index.flip(0), new.flip(0), 0.5, everywhere)
    assert torch.equal(again, out)
    # a cell named twice decays once
    twice = update_occupancy(values, torch.tensor([0, 0]), torch.zeros(2, dtype=dtype), 0.5, everywhere)
    assert twice[0] == 0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize("cells, count", [(128, 0), (1 << 10, 3000), (1 << 20, 1 << 16)])
def test_update_matches_the_reference(cells: int, count: int, everywhere: bool, dtype: torch.dtype) -> None:
    values = uniform(2, cells, dtype=dtype)
    values[values < 0.1] = -1
    index = (uniform(count, seed=1, dtype=torch.float64) * 2 * cells).long()
    new = uniform(count, seed=2, dtype=dtype)
    out = update_occupancy(values, index, new, 0.95, everywhere)
    assert out.shape == values.shape
    assert torch.equal(out.flatten(), reference.update_occupancy(values.flatten(), index, new, 0.95, everywhere))
    assert torch.equal(out < 0, values < 0)


def test_update_does_not_depend_on_threads() -> None:
    values, index, new = uniform(1 << 20), (uniform(1 << 17, seed=1) * 2**20).long(), uniform(1 << 17, seed=2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = update_occupancy(values, index, new)
        torch.set_num_threads(2)
        assert torch.equal(update_occupancy(values, index, new), alone)
    finally:
        torch.set_num_threads(before)


def test_threshold_is_the_mean_of_the_first_level_or_less() -> None:
    values = torch.tensor([[0.02, -1.0, 0.0, 0.004], [9.0, 9.0, 9.0, 9.0]])
    assert occupancy_threshold(values).item() == pytest.approx(0.006)
    assert occupancy_threshold(values, most=0.001).item() == pytest.approx(0.001)
    assert occupancy_threshold(values[0]).item() == pytest.approx(0.006)
    for nothing in (torch.full((2, 64), -1.0), torch.zeros(1, 64), torch.zeros(0), torch.zeros(0, 64)):
        assert occupancy_threshold(nothing).item() == 0
    assert not unpack_bits(pack_bits(torch.zeros(64), occupancy_threshold(torch.zeros(64)))).any()


@compiled
def test_occupancy_ops_are_well_behaved() -> None:
    values, box = uniform(2 * 64), torch.tensor([[-1.0, -1, -1], [1, 1, 1]])
    words = pack_bits(values, 0.5).reshape(2, 1)
    torch.library.opcheck(torch.ops.gan3d.pack_bits, (values, torch.tensor(0.5)))
    torch.library.opcheck(torch.ops.gan3d.occupied, (uniform(9, 3), words, box, (4, 4, 4)))
    torch.library.opcheck(torch.ops.gan3d.update_occupancy, (values, torch.tensor([3, 5, 3]), uniform(3), 0.9, False))


def test_bad_arguments_are_refused() -> None:
    box = torch.tensor([[-1.0, -1, -1], [1, 1, 1]])
    with pytest.raises(ValueError, match="multiple of 64"):
        pack_bits(torch.zeros(63), 0.5)
    with pytest.raises(TypeError, match="(?i)float"):
        pack_bits(torch.zeros(64, dtype=torch.int64), 0.5)
    with pytest.raises(ValueError, match="do not fit"):
        occupied(torch.zeros(1, 3), torch.zeros(2, dtype=torch.int64), box, (4, 4, 4))
    with pytest.raises(ValueError, match="levels"):
        occupied(torch.zeros(1, 3), torch.zeros(17, 1, dtype=torch.int64), box, (4, 4, 4))
    for wrong in (-1, 64):
        with pytest.raises((IndexError, RuntimeError), match="index"):
            update_occupancy(torch.zeros(64), torch.tensor([wrong]), torch.zeros(1))


@compiled
def test_the_occupancy_ops_name_what_is_wrong() -> None:
    values = torch.zeros(128)
    with pytest.raises((ValueError, RuntimeError), match="values must be contiguous"):
        torch.ops.gan3d.pack_bits(values[::2], torch.tensor(0.5))
    with pytest.raises((TypeError, RuntimeError), match="threshold must be"):
        torch.ops.gan3d.pack_bits(values, torch.tensor(0.5, dtype=torch.float64))
    with pytest.raises((TypeError, RuntimeError), match="index must be"):
        torch.ops.gan3d.update_occupancy(values, torch.tensor([1], dtype=torch.int32), torch.zeros(1), 0.9, True)
    with pytest.raises((ValueError, RuntimeError), match="fresh must have shape"):
        torch.ops.gan3d.update_occupancy(values, torch.tensor([1]), torch.zeros(2), 0.9, True)
