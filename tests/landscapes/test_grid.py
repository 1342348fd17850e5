import pytest
import torch

from landscapes.grid import Grid


@pytest.mark.parametrize("resolution", [1, 50, 128])
def test_the_centre_of_a_cell_lies_in_it(resolution):
    grid = Grid(resolution, (-3.0, 10.0), (5.0, 11.0))
    rows, columns = torch.meshgrid(*[torch.arange(resolution)] * 2, indexing="ij")
    assert torch.equal(grid.cells(grid.centres()), torch.stack([rows, columns], dim=-1))


def test_rows_go_down_with_y_and_columns_right_with_x():
    assert Grid(128).cells(torch.tensor([101.0, 401.0])).tolist() == [100, 25]
    assert Grid(128).centres()[100, 25].tolist() == [102.0, 402.0]


def test_what_lies_outside_counts_in_the_nearest_cell():
    outside = torch.tensor([[-7.0, 100.0], [512.0, 600.0]])
    assert Grid(128).cells(outside).tolist() == [[25, 0], [127, 127]]


def test_cells_fill_the_board():
    grid = Grid(50)
    assert grid.cell_area * 50**2 == pytest.approx(512**2)
    gaps = grid.centres()[0, :, 0].diff()
    torch.testing.assert_close(gaps, torch.full((49,), 10.24, dtype=torch.float64))
    first = grid.centres()[0, 0]
    torch.testing.assert_close(first, torch.full((2,), 5.12, dtype=torch.float64))


def test_an_empty_board_is_refused():
    with pytest.raises(ValueError, match="at least 1 cell"):
        Grid(0)
    with pytest.raises(ValueError, match="is empty"):
        Grid(8, (0.0, 5.0), (5.0, 5.0))
