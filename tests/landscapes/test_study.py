"""From frames to densities: pieces, calibration, and what a controller executes."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_act import CHUNK, LinearACT, frames, tiny_act
from torch.distributions import Laplace
from toy_policies import ToyPolicy, demonstrated

from landscapes.density import fit_bandwidth, fit_scale
from landscapes.grid import Grid
from landscapes.landscape import HORIZONS, Predictions, predict
from landscapes.methods import ExpertMode, Likelihood, Probe
from landscapes.study import (
    Calibration,
    Frames,
    executed_actions,
    is_calibrated,
    kernel_scale,
    measure_frames,
    predict_frames,
    reachable_horizons,
    sample_gap,
)
from policies.ensembling import ActionQueue, TemporalEnsembler
from policies.interface import Batch

BIMODAL = ToyPolicy([[156.0, 256.0], [356.0, 256.0]], velocity=(1.0, 0.0))


def episode(n_steps: int, number: int = 0, chunk_size: int = 3) -> Batch:
    """A whole episode whose actions count its steps: action at step t is (t, 100 number + t)."""
    steps = torch.arange(n_steps)
    reached = steps[:, None] + torch.arange(chunk_size)
    capped = reached.clamp_max(n_steps - 1).float()
    return replace(
        frames(n_steps, chunk_size=chunk_size),
        actions=torch.stack([capped, 100 * number + capped], dim=-1),
        action_is_pad=reached >= n_steps,
        episode_index=torch.full((n_steps,), number),
        frame_index=steps,
    )


def assert_same(first: Predictions, second: Predictions):
    assert first.queries == second.queries
    for field in ("samples", "point", "expert"):
        torch.testing.assert_close(
            getattr(first, field), getattr(second, field), rtol=1e-12, atol=1e-9
        )
    assert torch.equal(first.is_valid, second.is_valid)


# Predictions in pieces


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_pieces_change_no_prediction_and_no_landscape(batch_size):
    policy, batch = tiny_act(), frames(5, n_padded=2)
    whole = predict(policy, batch, range(CHUNK), 4, seed=3)
    with torch.no_grad():
        drawn = policy.sample_chunks(batch.observation, 4, seed=3)
    torch.testing.assert_close(whole.samples, drawn)
    done: list[int] = []
    pieces = predict_frames(policy, batch, range(CHUNK), 4, 3, batch_size, done.append)
    assert_same(pieces, whole)
    assert sum(done) == 5
    assert max(done) <= batch_size
    scale = torch.full((1, CHUNK, 2), 20.0, dtype=torch.float64)
    for method in (Likelihood(), ExpertMode()):
        first, second = (
            method.landscape(Probe(policy, batch, each, scale, (0, 4), Grid(16)))
            for each in (pieces, whole)
        )
        torch.testing.assert_close(first.scores, second.scores, rtol=1e-5, atol=1e-5)


def test_order_of_frames_plays_no_part():
    policy, batch = tiny_act(), frames(5, n_padded=2)
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = predict_frames(policy, batch.rows(order), (1, 5), 4, batch_size=2)
    assert_same(shuffled, predict_frames(policy, batch, (1, 5), 4).rows(order))


def test_chunk_steps_are_asked_for_in_any_order_and_answered_in_theirs():
    policy, batch = tiny_act(), frames(3, n_padded=2)
    whole = predict(policy, batch, range(CHUNK), 4)
    some = predict(policy, batch, [5, 0, 5, 2], 4)
    assert some.queries == (0, 2, 5)
    assert_same(some, whole.at((0, 2, 5)))
    assert torch.equal(some.expert[:, 2], batch.actions[:, 5].double())
    assert some.is_valid[:, 2].tolist() == [True, True, False]


def test_predictions_carry_no_gradients():
    """A graph through the network for every frame of a data set would fill the memory."""
    with torch.enable_grad():
        found = predict(tiny_act(), frames(2), (0,), 3)
    assert not found.samples.requires_grad
    assert not found.point.requires_grad
    assert found.samples.dtype == found.point.dtype == found.expert.dtype == torch.float64


def test_no_frames_is_an_error():
    with pytest.raises(ValueError, match="no frames"):
        predict_frames(tiny_act(), frames(2).rows(slice(0, 0)), (0,))


def test_horizons_are_those_that_the_chunk_holds():
    assert reachable_horizons(tiny_act(), None) == tuple(k for k in HORIZONS if k < CHUNK)
    assert reachable_horizons(BIMODAL, None) == HORIZONS
    assert reachable_horizons(tiny_act(), [5, 0, 5]) == (0, 5)
    for wanted in ([0, CHUNK], [-1], []):
        with pytest.raises(ValueError, match=rf"chunks of {CHUNK}; give steps in 0\.\.{CHUNK - 1}"):
            reachable_horizons(tiny_act(), wanted)


@pytest.mark.parametrize(("given", "reach"), [(CHUNK, CHUNK - 1), (4, 3)])
def test_horizons_beyond_either_chunk_are_an_error(given, reach):
    """The policy's, and the demonstrated one."""
    batch = frames(2, chunk_size=given)
    message = rf"horizons \[0, {reach + 1}\] must lie in 0\.\.{reach}, within the chunk"
    with pytest.raises(ValueError, match=message):
        predict_frames(tiny_act(), batch, (0, reach + 1))


# Scales


def test_acts_scale_is_the_residual_on_other_episodes():
    policy = LinearACT(torch.zeros(1, CHUNK, 2))
    shown, held_out = frames(4), frames(50, seed=1, n_padded=2)
    predictions = predict(policy, shown, (0, 4), 3)
    calibration = predict(policy, held_out, (0, 4), 3)
    assert is_calibrated(policy)
    scale = kernel_scale(policy, predictions, calibration)
    residual = (calibration.expert - calibration.point).abs()
    expected = torch.stack([residual[:, 0].mean(0), residual[:-1, 1].mean(0)])
    torch.testing.assert_close(scale, expected[None])
    with pytest.raises(ValueError, match="need calibration episodes"):
        kernel_scale(policy, predictions, None)


def test_scale_is_of_the_steps_that_it_was_fitted_on():
    policy = tiny_act()
    predictions, other = (predict(policy, frames(4), (0, k), 3) for k in (4, 5))
    with pytest.raises(ValueError, match=r"steps \[0, 5\], the predictions of \[0, 4\]"):
        kernel_scale(policy, predictions, other)


def test_other_policies_have_a_bandwidth_for_every_frame():
    batch = demonstrated(BIMODAL, 3, 8.0, n_steps=9)
    predictions = predict(BIMODAL, batch, (0, 8), 6)
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([1.0, 5.0, 25.0]).reshape(3, 1, 1, 1)
    noise = spread * torch.randn(predictions.samples.shape, generator=generator)
    predictions = replace(predictions, samples=predictions.samples + noise)
    assert not is_calibrated(BIMODAL)
    scale = kernel_scale(BIMODAL, predictions, None)
    for frame in range(3):
        for query in range(2):
            torch.testing.assert_close(
                scale[frame, query], fit_bandwidth(predictions.samples[frame, :, query])
            )
    assert (scale.diff(dim=0) > 0).all()
    fitted = kernel_scale(BIMODAL, predictions, predictions)
    torch.testing.assert_close(
        fitted[0], fit_scale(predictions.samples, predictions.expert, predictions.is_valid)
    )


# Were there enough samples?


def test_a_converged_mixture_has_no_sample_gap():
    batch = demonstrated(BIMODAL, 40, 8.0, n_steps=9)
    predictions = predict(BIMODAL, batch, (0, 8), 8)  # either half holds both modes
    scale = torch.full((1, 2, 2), 8.0, dtype=torch.float64)
    gaps = sample_gap(predictions, scale)
    assert gaps == {"k0/sample_gap": pytest.approx(0), "k8/sample_gap": pytest.approx(0)}
    policy = LinearACT(torch.full((1, CHUNK, 2), 20.0))
    near = sample_gap(predict(policy, frames(20), (0,), 1024), scale[:, :1])
    assert abs(near["k0/sample_gap"]) < 0.01


def test_a_mode_that_the_first_half_misses_is_a_gap():
    """Where the demonstration is in it: log 2 nats are gained, many are lost."""
    batch = demonstrated(BIMODAL, 30, 8.0, n_steps=1)
    predictions = predict(BIMODAL, batch, (0,), 8)
    centres = BIMODAL.centres[torch.arange(8) // 4]  # the left mode first
    predictions = replace(
        predictions,
        samples=centres[None, :, None].expand(30, 8, 1, 2),
        expert=BIMODAL.centres[torch.arange(30) // 20][:, None],
    )
    scale = torch.full((1, 1, 2), 10.0, dtype=torch.float64)
    # Two of three are on the left; kernels are 200 px = 20 b apart.
    expected = 20 / 3 - math.log(2)
    assert sample_gap(predictions, scale)["k0/sample_gap"] == pytest.approx(expected)


def test_the_gap_leaves_padding_out():
    batch = demonstrated(BIMODAL, 6, 8.0, n_steps=2)
    predictions = predict(BIMODAL, batch, (0, 1), 4)
    is_valid = torch.zeros(6, 2, dtype=torch.bool)
    is_valid[:2, 0] = True
    padded = torch.where(is_valid[..., None], predictions.expert, 9e4)
    centres = BIMODAL.centres[torch.arange(4) // 2][None, :, None].expand(6, 4, 2, 2)
    predictions = replace(predictions, samples=centres, expert=padded, is_valid=is_valid)
    scale = torch.full((1, 2, 2), 10.0, dtype=torch.float64)
    known = sample_gap(predictions.rows(slice(2)), scale)
    assert sample_gap(predictions, scale) == {
        "k0/sample_gap": pytest.approx(known["k0/sample_gap"])
    }


# Frames


def test_actions_before_a_frame_are_those_of_its_own_episode():
    whole = Frames.of_episode(episode(6))
    previous = whole.previous[:, :, 0]
    assert previous[2:].tolist() == [[0, 1], [1, 2], [2, 3], [3, 4]]
    assert previous[0].isnan().all()
    assert previous[1].tolist()[1] == 0
    assert previous[1, 0].isnan()
    both = Frames.concatenate([whole, Frames.of_episode(episode(4, number=1))])
    assert both.previous[6].isnan().all()  # not the last actions of the episode before
    assert both.previous[8].tolist() == [[0, 100], [1, 101]]
    assert both.batch.episode_index.tolist() == [0] * 6 + [1] * 4


def test_leaving_frames_out_does_not_change_what_came_before_the_others():
    whole = Frames.of_episode(episode(9))
    some = Frames.of_episode(episode(9), stride=3, max_steps=7)
    assert some.batch.frame_index.tolist() == [0, 3, 6]
    torch.testing.assert_close(some.previous, whole.previous[[0, 3, 6]], equal_nan=True)
    picked = whole.rows(torch.tensor([6, 3]))
    torch.testing.assert_close(picked.previous, some.previous[[2, 1]], equal_nan=True)
    assert picked.batch.frame_index.tolist() == [6, 3]
    assert len(some) == 3


def test_frames_are_spread_over_all_episodes():
    lengths = (40, 10, 25)
    found = Frames.spread([episode(n, number) for number, n in enumerate(lengths)], 15)
    counts = torch.bincount(found.batch.episode_index)
    assert counts.tolist() == [8, 2, 5]
    everything = Frames.spread([episode(4), episode(3, 1)], 100)
    assert len(everything) == 7


def test_measuring_some_of_the_chunk_steps_measures_those():
    """Predictions, scales, demonstrations and baselines of one step belong together."""
    policy = LinearACT(torch.full((1, CHUNK, 2), 20.0))
    studied = Frames.of_episode(frames(12, n_padded=2))
    held_out = Frames.of_episode(frames(30, seed=1))
    scale = 10 + torch.arange(2.0 * CHUNK, dtype=torch.float64).reshape(1, CHUNK, 2)
    whole = predict(policy, studied.batch, range(CHUNK), 8)
    found = measure_frames(
        whole, scale, studied, (2, 5), Grid(16), Calibration(held_out), n_draws=50
    )
    for place, step in enumerate((2, 5)):
        kernels = Laplace(whole.samples[:, :, step], scale[0, step])
        log_kernel = kernels.log_prob(whole.expert[:, None, step]).sum(-1)
        nll = math.log(8) - torch.logsumexp(log_kernel, dim=1)
        nll[~whole.is_valid[:, step]] = math.nan
        torch.testing.assert_close(torch.from_numpy(found.nll[:, place]), nll, equal_nan=True)
    assert found.queries == (2, 5)
    agent = found.baselines["agent"][:-1]
    observed = studied.batch.observation.state
    calibrated = held_out.batch.observation.state
    assert observed is not None
    assert calibrated is not None
    for place, step in enumerate((2, 5)):
        b = (held_out.batch.actions[:, step] - calibrated).abs().double().mean(0)
        expert = studied.batch.actions[:, step].double()
        log_density = Laplace(observed.double(), b).log_prob(expert)
        torch.testing.assert_close(
            torch.from_numpy(agent[:, place]), -log_density.sum(-1)[:-1], rtol=1e-5, atol=1e-5
        )
    alone = measure_frames(whole, scale, studied, (2, 5), Grid(16), n_draws=50)
    assert not alone.baselines


# What a controller executes


@pytest.mark.parametrize("n_action_steps", [1, 3, 4])
def test_a_queue_executes_chunks_of_every_age_in_turn(n_action_steps):
    generator = torch.Generator().manual_seed(0)
    chunks = torch.rand(10, 4, 2, generator=generator)
    # A queue looks at no chunk between two of its own.
    needed = torch.arange(10) % n_action_steps == 0
    seen = torch.where(needed[:, None, None], chunks, torch.nan)
    queue = ActionQueue(n_action_steps)
    queue.step(torch.full((1, 4, 2), 99.0))  # left over from another episode
    actions, ages = executed_actions(seen, queue)
    assert ages is not None
    assert ages.tolist() == [step % n_action_steps for step in range(10)]
    for step in range(10):
        age = step % n_action_steps
        assert torch.equal(actions[step], chunks[step - age, age])


def test_an_ensemble_executes_what_it_averages():
    chunks = 100 * torch.rand(9, 4, 2, generator=torch.Generator().manual_seed(0))
    ensembler = TemporalEnsembler(0.1, 4)
    ensembler.step(torch.full((1, 4, 2), 1e4))
    actions, ages = executed_actions(chunks, ensembler)
    assert ages is None
    for step in range(9):
        made = range(max(0, step - 3), step + 1)
        weights = torch.tensor([math.exp(-0.1 * order) for order in range(len(made))])
        reaching = torch.stack([chunks[each, step - each] for each in made])
        expected = (weights[:, None] * reaching).sum(0) / weights.sum()
        torch.testing.assert_close(actions[step], expected, rtol=1e-5, atol=1e-4)
