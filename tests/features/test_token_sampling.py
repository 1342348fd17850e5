"""Which tokens each sampler takes, by hand; and that no sample mixes rows apart or cameras."""

import itertools

import pytest
import torch
from tiny_act import tiny_act

from features.taps import TokenPosition, find_tap
from features.token_sampling import FIXED, SampledTokens, TokenSampler

METHODS = ("all", "uniform", "stride", "block_average", "random_fixed")


def tokens(*grids: tuple[int, int], vectors: int = 2) -> list[TokenPosition]:
    positions = [TokenPosition(name) for name in FIXED[:vectors]]
    for camera, (rows, columns) in enumerate(grids):
        positions += [
            TokenPosition(f"camera {camera}", row, column)
            for row in range(rows)
            for column in range(columns)
        ]
    return positions


def queries(n: int) -> list[TokenPosition]:
    return [TokenPosition("query", step) for step in range(n)]


@pytest.mark.parametrize(
    ("method", "ratio", "expected"),
    [
        ("all", 4, [(0,), (1,), (2,), (3,), (4,), (5,), (6,), (7,), (8,), (9,), (10,)]),
        # 9 cells of one camera: floor(9 / 4) = 2 samples are its ends, floor(9 / 3) = 3 have one
        # half way.
        ("uniform", 4, [(0,), (1,), (2,), (10,)]),
        ("uniform", 3, [(0,), (1,), (2,), (6,), (10,)]),
        ("uniform", 9, [(0,), (1,), (6,)]),
        ("stride", 4, [(0,), (1,), (2,), (6,), (10,)]),
        ("stride", 5, [(0,), (1,), (2,), (7,)]),
        # 2 x 2 cells: cells 0 1 3 4 | 2 5 | 6 7 | 8
        ("block_average", 4, [(0,), (1,), (2, 3, 5, 6), (4, 7), (8, 9), (10,)]),
        # 2 rows x 4 columns, and of a prime ratio 1 row x 5 columns
        ("block_average", 8, [(0,), (1,), (2, 3, 4, 5, 6, 7), (8, 9, 10)]),
        ("block_average", 5, [(0,), (1,), (2, 3, 4), (5, 6, 7), (8, 9, 10)]),
    ],
)
def test_exact_tokens_of_a_picture_of_three_by_three_cells(method, ratio, expected):
    positions = tokens((3, 3))
    sampled = TokenSampler(method, ratio).select(positions)
    assert sampled.groups == tuple(expected)
    assert sampled.positions == tuple(positions[group[0]] for group in expected)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("all", [(step,) for step in range(10)]),
        ("uniform", [(0,), (5,), (9,)]),
        ("stride", [(0,), (3,), (6,), (9,)]),
        ("block_average", [(0, 1, 2), (3, 4, 5), (6, 7, 8), (9,)]),
    ],
)
def test_chunk_steps_are_one_axis(method, expected):
    assert TokenSampler(method, 3).select(queries(10)).groups == tuple(expected)


@pytest.mark.parametrize(
    ("method", "n_cells"),
    [
        ("all", 600),
        ("uniform", 75),  # 600 // 8, the first camera 300 // 8 = 37, the second 75 - 37
        ("random_fixed", 75),
        ("stride", 76),  # 0, 8, ..., 296 of each camera's 300
        ("block_average", 80),  # ceil(15 / 2) x ceil(20 / 4) of each camera
    ],
)
def test_counts_at_two_cameras_of_480_by_640_px(method, n_cells):
    view = tiny_act(cameras={"left": [480, 640], "right": [480, 640]}, token_stride=32, dim_model=8)
    positions = find_tap(view, "encoder").positions
    assert len(positions) == 602
    sampled = TokenSampler(method, 8).select(positions)
    assert len(sampled.groups) == n_cells + 2
    assert [position.name for position in sampled.positions[:2]] == ["latent", "state"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ratio", [1, 2, 5, 6, 12, 400])
@pytest.mark.parametrize("grids", [[(3, 3)], [(5, 7), (1, 4)], [(4, 6), (15, 20), (2, 1)]])
def test_laws_of_every_sampler(method, ratio, grids):
    positions = tokens(*grids, vectors=3)
    sampled = TokenSampler(method, ratio).select(positions)
    flat = [token for group in sampled.groups for token in group]
    assert len(flat) == len(set(flat)), "no token is in two samples"
    assert sampled.groups[:3] == ((0,), (1,), (2,)), "fixed tokens stay by themselves"
    firsts = [group[0] for group in sampled.groups]
    assert firsts == sorted(firsts), "samples keep the order of the tokens"
    for group in sampled.groups:
        assert len({positions[token].name for token in group}) == 1, "cameras stay apart"
    for camera in range(len(grids)):
        members = [token for token in flat if positions[token].name == f"camera {camera}"]
        assert members, "no camera is left out"
        first = 3 + sum(rows * columns for rows, columns in grids[:camera])
        last = first + grids[camera][0] * grids[camera][1] - 1
        if method == "uniform" and len(members) > 1:
            assert {first, last} <= set(members)
            gaps = [after - before for before, after in itertools.pairwise(members)]
            assert max(gaps) - min(gaps) <= 1
        if method in ("all", "stride", "block_average"):
            assert first in members
    if method == "block_average":
        assert len(flat) == len(positions), "blocks leave nothing out"
        for group in sampled.groups[3:]:
            rows = [positions[token].row for token in group]
            columns = [positions[token].column for token in group]
            area = (max(rows) - min(rows) + 1) * (max(columns) - min(columns) + 1)
            assert area == len(group) <= ratio, "a block is a whole rectangle"
    if ratio == 1:
        assert sampled.groups == tuple((token,) for token in range(len(positions)))


def test_random_tokens_depend_on_the_seed_and_on_nothing_else():
    positions = tokens((8, 8), (8, 8))
    global_state = torch.get_rng_state()
    one = TokenSampler("random_fixed", 4, seed=1).select(positions)
    torch.rand(3)
    assert TokenSampler("random_fixed", 4, seed=1).select(positions) == one
    assert TokenSampler("random_fixed", 4, seed=2).select(positions) != one
    by_camera = [[token - 2 - 64 * c for (token,) in one.groups[2:]] for c in range(2)]
    left = {token for token in by_camera[0] if token < 64}
    right = {token for token in by_camera[1] if token >= 0}
    assert len(left) == len(right) == 16
    assert left != right, "the cameras are drawn apart"
    torch.set_rng_state(global_state)


def test_applying_takes_the_mean_of_each_group():
    x = torch.randn(2, 3, 11, 4, generator=torch.Generator().manual_seed(0)).double()
    sampled = TokenSampler("block_average", 4).select(tokens((3, 3)))
    taken = sampled.apply(x)
    for place, group in enumerate(sampled.groups):
        expected = sum(x[..., token, :] for token in group) / len(group)
        torch.testing.assert_close(taken[..., place, :], expected)
    for place in (0, 1, 5):
        (token,) = sampled.groups[place]
        assert torch.equal(taken[..., place, :], x[..., token, :])
    # A plane over rows and columns keeps its mean over any partition, weighted by size.
    weights = torch.tensor([len(group) for group in sampled.groups]).double()[:, None]
    torch.testing.assert_close((taken * weights).sum(-2), x.sum(-2))


def test_all_is_no_work_and_no_copy():
    x = torch.randn(5, 11, 2)
    assert TokenSampler("all").select(tokens((3, 3))).apply(x) is x


def test_activations_of_another_layer_are_refused():
    sampled = TokenSampler("stride", 2).select(queries(6))
    with pytest.raises(ValueError, match="7 tokens, the samples were chosen among 6"):
        sampled.apply(torch.zeros(1, 7, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 0}, "ratio is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_sampler_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TokenSampler(**arguments)


def test_nothing_cannot_be_sampled():
    with pytest.raises(ValueError, match="no tokens"):
        TokenSampler().select([])


def test_a_module_of_one_vector_keeps_it():
    for method in METHODS:
        sampled = TokenSampler(method).select([TokenPosition("token")])
        assert sampled == SampledTokens(((0,),), (TokenPosition("token"),), 1)
