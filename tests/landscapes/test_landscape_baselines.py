import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from landscapes.baselines import BaselineFrames, baselines
from landscapes.grid import Grid
from policies.interface import Batch, Observation

GRID = Grid(16)


def walk(n=200, queries=(0, 2), seed=0, **changes) -> BaselineFrames:
    """Frames of a random walk; the agent lags behind its target."""
    generator = torch.Generator().manual_seed(seed)
    steps = 6 * torch.randn(n + 10, 2, generator=generator, dtype=torch.float64)
    path = 256 + torch.cumsum(steps, 0)
    frames = torch.arange(2, n + 2)
    known = BaselineFrames(
        queries=queries,
        expert=torch.stack([path[frames + query] for query in queries], dim=1),
        is_valid=torch.ones(n, len(queries), dtype=torch.bool),
        agent=path[frames] + torch.randn(n, 2, generator=generator, dtype=torch.float64),
        previous=torch.stack([path[frames - 2], path[frames - 1]], dim=1),
    )
    return replace(known, **changes)


def test_uniform_is_the_area_of_the_board():
    found = baselines(walk(), walk(seed=1), GRID)
    np.testing.assert_allclose(found.nll["uniform"], 2 * math.log(512))


@pytest.mark.parametrize("name", ["marginal", "agent", "previous_action", "linear"])
def test_mean_nll_on_the_calibration_frames_is_the_entropy_of_the_fitted_kernel(name):
    """True of a Laplace density exactly when b is the mean absolute distance."""
    found = baselines(walk(), walk(), GRID)
    entropy = (1 + np.log(2 * found.scale[name])).sum(-1)
    np.testing.assert_allclose(found.nll[name].mean(0), entropy)
    assert found.means()[f"k2/{name}"] == pytest.approx(entropy[1])


def test_marginal_is_centred_on_the_median_of_valid_calibration_frames():
    known = walk()
    is_valid = torch.rand(200, 2, generator=torch.Generator().manual_seed(0)) < 0.7
    damaged = torch.where(is_valid[..., None], known.expert, -1e6)
    found = baselines(replace(known, expert=damaged, is_valid=is_valid), walk(seed=1), GRID)
    for query in range(2):
        actions = known.expert[is_valid[:, query], query].numpy()
        middle = np.median(actions, axis=0)
        scale = np.abs(actions - middle).mean(0)
        np.testing.assert_allclose(found.scale["marginal"][query], scale)
        here = walk(seed=1).expert[:, query].numpy()
        expected = (np.abs(here - middle) / scale + np.log(2 * scale)).sum(-1)
        np.testing.assert_allclose(found.nll["marginal"][:, query], expected)


def test_what_moves_in_a_line_is_known_to_the_floor_of_the_scale():
    times = torch.arange(20, dtype=torch.float64)[:, None]
    path = 50 + times * torch.tensor([7.0, -2.0], dtype=torch.float64)
    known = BaselineFrames(
        queries=(0,),
        expert=path[2:, None],
        is_valid=torch.ones(18, 1, dtype=torch.bool),
        previous=torch.stack([path[:-2], path[1:-1]], dim=1),
    )
    found = baselines(known, known, GRID)
    np.testing.assert_allclose(found.nll["linear"], 0, atol=1e-12)  # 2 log(2 * 0.5)
    assert found.scale["previous_action"].tolist() == [[7.0, 2.0]]
    np.testing.assert_allclose(found.nll["previous_action"], 2 + math.log(14) + math.log(4))
    assert "agent" not in found.nll


def test_frames_without_a_past_are_left_out_of_what_needs_one():
    known = walk()
    assert known.previous is not None
    previous = known.previous.clone()
    previous[::4, 0] = math.nan
    previous[::8] = math.nan
    found = baselines(replace(known, previous=previous), replace(known, previous=previous), GRID)
    kept = torch.arange(200) % 4 != 0
    alone = replace(
        known,
        expert=known.expert[kept],
        is_valid=known.is_valid[kept],
        agent=None,
        previous=known.previous[kept],
    )
    np.testing.assert_allclose(found.scale["linear"], baselines(alone, alone, GRID).scale["linear"])
    assert np.isnan(found.nll["linear"][::4]).all()
    assert np.isfinite(found.nll["linear"][kept.numpy()]).all()
    assert np.isfinite(found.nll["previous_action"][4::8]).all()
    assert found.means()["k0/linear"] == pytest.approx(np.nanmean(found.nll["linear"][:, 0]))


def test_padded_actions_have_no_nll():
    is_valid = torch.ones(200, 2, dtype=torch.bool)
    is_valid[50:, 1] = False
    found = baselines(walk(), walk(seed=1, is_valid=is_valid), GRID)
    for nll in found.nll.values():
        assert np.array_equal(np.isnan(nll), ~is_valid.numpy())


def test_a_chunk_step_without_calibration_frames_is_refused():
    nobody = torch.tensor([[True, False]]).expand(200, 2)
    with pytest.raises(ValueError, match=r"marginal on, at chunk steps \[2\]"):
        baselines(walk(is_valid=nobody), walk(), GRID)


def test_frames_must_offer_what_calibration_frames_do():
    with pytest.raises(ValueError, match="both the same columns"):
        baselines(walk(), walk(agent=None), GRID)
    with pytest.raises(ValueError, match="chunk steps"):
        baselines(walk(queries=(0, 1)), walk(), GRID)


@pytest.mark.parametrize("history", [False, True])
def test_the_agent_is_where_the_newest_state_says(history):
    state = torch.arange(12.0).reshape(3, 2, 2)
    batch = Batch(
        observation=Observation(images={}, state=state if history else state[:, -1]),
        actions=torch.rand(3, 5, 2),
        action_is_pad=torch.tensor([[False] * 4 + [True]] * 3),
        episode_index=torch.zeros(3, dtype=torch.long),
        frame_index=torch.arange(3),
    )
    known = BaselineFrames.of(batch, [1, 4])
    assert known.agent is not None
    assert torch.equal(known.agent, state[:, -1].double())
    assert torch.equal(known.expert, batch.actions[:, [1, 4]].double())
    assert known.is_valid.tolist() == [[True, False]] * 3
    joints = replace(batch, observation=Observation(images={}, state=torch.rand(3, 7)))
    assert BaselineFrames.of(joints, [0]).agent is None
