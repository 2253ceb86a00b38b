"""The order of cells in memory."""

import pytest
import torch

from gan3d.ops.cells import cell_index, cell_position


@pytest.mark.parametrize("resolution", [(4, 4, 4), (8, 8, 8), (12, 8, 4), (20, 12, 8)])
def test_every_cell_has_its_own_place_and_is_found_again(resolution: tuple[int, int, int]) -> None:
    index = torch.arange(resolution[0] * resolution[1] * resolution[2])
    position = cell_position(index, resolution)
    assert torch.equal(cell_index(position, resolution), index)
    assert (position >= 0).all() and (position < torch.tensor(resolution)).all()


def test_a_power_of_two_grid_is_in_morton_order() -> None:
    # x = 011, y = 101, z = 110 in binary: the octal digits z y x from the highest bit are 6, 5 and 3
    positions = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [3, 5, 6]])
    assert cell_index(positions, (8, 8, 8)).tolist() == [1, 2, 4, 0o653]


@pytest.mark.parametrize("resolution", [(8, 8, 8), (12, 8, 20)])
def test_sixty_four_consecutive_cells_are_a_block_of_four_cubed(resolution: tuple[int, int, int]) -> None:
    position = cell_position(torch.arange(resolution[0] * resolution[1] * resolution[2]), resolution)
    blocks = (position // 4).reshape(-1, 64, 3)
    assert (blocks == blocks[:, :1]).all()


@pytest.mark.parametrize("resolution", [(3, 4, 4), (0, 4, 4), (4096, 4, 4), (2048, 2048, 1024)])
def test_other_sides_are_refused(resolution: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        cell_index(torch.zeros(1, 3, dtype=torch.int64), resolution)
