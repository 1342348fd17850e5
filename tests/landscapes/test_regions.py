import math

import numpy as np
import pytest
import torch

from landscapes.density import Mixture
from landscapes.grid import Grid
from landscapes.regions import credible_thresholds, mass_below, modes, region_area

LEVELS = (0.5, 0.8, 0.95)
RADII = (1.678, 2.994, 4.744)
"""Of the diamonds |x| + |y| < r b that hold the levels of a Laplace density in the plane."""


def mass_of(centres, b, resolution=256, weights=None) -> torch.Tensor:
    log_weights = None if weights is None else torch.tensor(weights, dtype=torch.float64).log()
    mixture = Mixture(
        torch.tensor(centres, dtype=torch.float64),
        torch.tensor([[b, b]], dtype=torch.float64),
        log_weights,
    )
    return mixture.cell_mass(Grid(resolution))


def random_mass(*shape) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(*shape, generator=generator, dtype=torch.float64) ** 9


@pytest.mark.parametrize(("level", "radius"), list(zip(LEVELS, RADII, strict=True)))
def test_radius_of_the_diamond_holds_its_level(level, radius):
    assert 1 - math.exp(-radius) * (1 + radius) == pytest.approx(level, abs=2e-4)


@pytest.mark.parametrize("b", [8.0, 20.0])
@pytest.mark.parametrize(("level", "radius"), list(zip(LEVELS, RADII, strict=True)))
def test_regions_of_a_laplace_density_are_diamonds(b, level, radius):
    grid = Grid(256)
    mass = mass_of([[253.3, 258.9]], b)
    area = region_area(mass, level, grid).item()
    assert area == pytest.approx(2 * (radius * b) ** 2, rel=0.02)
    region = mass >= credible_thresholds(mass, [level])[..., None]
    distance = (grid.centres() - torch.tensor([253.3, 258.9])).abs().sum(-1)
    edge = 2 * sum(grid.cell_size)
    assert region[distance < radius * b - edge].all()
    assert not region[distance > radius * b + edge].any()


def test_mass_below_is_one_minus_the_level_of_the_diamond_through_a_cell():
    b = 20.0
    mass = mass_of([[255.0, 257.0]], b)  # in the middle of a cell
    r = (Grid(256).centres() - torch.tensor([255.0, 257.0])).abs().sum(-1) / b
    expected = torch.exp(-r) * (1 + r)
    near = r < 8
    assert (mass_below(mass) - expected)[near].abs().max() < 0.02


@pytest.mark.parametrize("level", LEVELS)
def test_region_by_threshold_is_region_by_mass_below(level):
    mass = random_mass(3, 20, 20)
    region = mass >= credible_thresholds(mass, [level])[..., None]
    assert torch.equal(region, mass_below(mass) > 1 - level)


@pytest.mark.parametrize("power", [0, 1, 9])
def test_region_is_the_smallest_that_holds_its_level(power):
    mass = random_mass(4, 15, 15) ** (power / 9)
    thresholds = credible_thresholds(mass, LEVELS)
    for flat, borders in zip(mass.flatten(1).numpy(), thresholds.numpy(), strict=True):
        for level, border in zip(LEVELS, borders, strict=True):
            assert flat[flat >= border].sum() >= level * flat.sum() * (1 - 1e-12)
            if power:  # cells of equal mass belong together
                assert flat[flat > border].sum() < level * flat.sum()


def test_order_of_cells_plays_no_part():
    mass = random_mass(2, 16, 16)
    mass[0, :4] = mass[0, 0, 0]  # ties
    order = torch.from_numpy(np.random.default_rng(0).permutation(256))

    def shuffle(picture):
        return picture.flatten(1)[:, order].reshape(2, 16, 16)

    torch.testing.assert_close(mass_below(shuffle(mass)), shuffle(mass_below(mass)))
    assert torch.equal(credible_thresholds(shuffle(mass)), credible_thresholds(mass))


def test_equal_cells_share_one_level():
    assert torch.equal(mass_below(torch.full((8, 8), 1 / 64)), torch.ones(8, 8))
    assert region_area(torch.full((8, 8), 1 / 64), 0.5, Grid(8)).item() == 512**2


APART, CLOSE = [[156.0, 256.0], [356.0, 256.0]], [[253.0, 256.0], [259.0, 256.0]]


@pytest.mark.parametrize(("centres", "expected"), [(APART, 2), (CLOSE, 1)])
def test_modes_are_counted_when_apart_and_not_when_closer_than_the_scale(centres, expected):
    assert modes(mass_of(centres, 8.0, 128)).count.item() == expected


def test_diagonal_cells_hold_together():
    mass = torch.zeros(6, 6, dtype=torch.float64)
    mass[1, 1] = mass[2, 2] = 1.0
    mass[5, 0] = 0.5
    assert modes(mass, level=0.99).count.item() == 2


def test_a_speck_is_no_mode():
    mass = mass_of([*APART, [256.0, 456.0]], 8.0, 128, weights=[0.5, 0.46, 0.04])
    assert modes(mass, level=0.99).count.item() == 2
    assert modes(mass, level=0.99, min_mass=0.03).count.item() == 3


def test_modes_of_a_batch_are_those_of_its_members():
    mass = torch.stack([mass_of(APART, 8.0, 64), mass_of(CLOSE, 8.0, 64)])[None]
    found = modes(mass)
    assert found.count.tolist() == [[2, 1]]
    assert torch.equal(found.region[0, 1], modes(mass[0, 1]).region)
