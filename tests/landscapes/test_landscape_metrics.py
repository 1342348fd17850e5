import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from toy_policies import ToyPolicy, demonstrated

from landscapes.baselines import BaselineFrames, baselines
from landscapes.density import Mixture
from landscapes.grid import Grid
from landscapes.landscape import Predictions, predict
from landscapes.latent import LatentUse
from landscapes.metrics import (
    LandscapeMetrics,
    area_rank,
    densest,
    energy_score,
    measure,
    paired_difference,
)
from landscapes.regions import modes

COARSE = Grid(16)
ONE = ToyPolicy([[256.0, 200.0]])
TWO = ToyPolicy([[156.0, 256.0], [356.0, 256.0]])
KERNEL_ENTROPY = 2 * (1 + math.log(2 * 8))
"""Of a Laplace density in the plane with b = 8 px, nats."""


def doubles(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def metrics_of(
    policy,
    n_frames=8,
    true_scale=8.0,
    scale=8.0,
    queries=(0,),
    n_samples=4,
    grid=COARSE,
    batch=None,
    n_draws=2000,
    **changes,
) -> LandscapeMetrics:
    """Measure a policy on demonstrations drawn from its own density with the true scale."""
    if batch is None:
        batch = demonstrated(policy, n_frames, true_scale, n_steps=max(queries) + 1)
    predictions = replace(predict(policy, batch, queries, n_samples), **changes)
    b = torch.full((1, len(queries), 2), scale, dtype=torch.float64)
    return measure(predictions, b, grid, batch.episode_index, batch.frame_index, n_draws=n_draws)


def many(policy, n=400, steps=40, **kwargs) -> LandscapeMetrics:
    """The same with chunk steps for frames, which are measured together: independent draws."""
    found = metrics_of(policy, n // steps, queries=tuple(range(steps)), **kwargs)
    columns = {
        name: values.reshape(-1, 1)
        for name in LandscapeMetrics.__dataclass_fields__
        if isinstance(values := getattr(found, name), np.ndarray) and values.shape[1:] == (steps,)
    }
    return replace(
        found,
        queries=(0,),
        episode_index=np.arange(n) // 10,
        frame_index=np.arange(n),
        scale=found.scale[:1],
        **columns,
    )


def interval_width(metrics, key, **kwargs) -> float:
    low, high = metrics.intervals(**kwargs)[key]
    return high - low


def test_one_kernel_has_its_own_entropy_however_often_it_is_sampled():
    found = metrics_of(ONE, n_samples=64, n_draws=50)
    np.testing.assert_allclose(found.entropy, KERNEL_ENTROPY, atol=1e-12)
    np.testing.assert_allclose(found.excess_entropy, 0, atol=1e-12)
    np.testing.assert_allclose(found.effective_area_px2, (2 * math.e * 8) ** 2)


def test_modes_far_apart_add_the_entropy_of_their_choice():
    found = metrics_of(TWO, n_samples=6)
    np.testing.assert_allclose(found.excess_entropy, math.log(2), atol=1e-3)


def test_entropy_of_overlapping_kernels_is_the_integral():
    """Two kernels apart in x alone: the entropy is a sum of two line integrals."""
    distance, b = 20.0, 8.0
    x = torch.arange(-400, 420, 0.01, dtype=torch.float64)
    line = (torch.exp(-x.abs() / b) + torch.exp(-(x - distance).abs() / b)) / (4 * b)
    along_x = -(line * line.log()).sum() * 0.01
    expected = along_x.item() + 1 + math.log(2 * b)
    found = metrics_of(ToyPolicy([[240.0, 256.0], [260.0, 256.0]]), n_draws=50_000)
    np.testing.assert_allclose(found.entropy, expected, atol=0.01)


def test_mean_nll_of_own_actions_is_the_entropy():
    policy = ToyPolicy([[240.0, 250.0], [265.0, 256.0], [400.0, 100.0]])
    found = many(policy, 1600, n_samples=3, n_draws=200)
    error = (found.nll - found.entropy).mean() / (found.nll.std() / math.sqrt(found.nll.size))
    assert abs(error) < 4


@pytest.mark.parametrize(("factor", "is_calibrated"), [(1.0, True), (0.8, False), (1.25, False)])
def test_levels_are_uniform_exactly_when_the_scale_is_true(factor, is_calibrated):
    found = many(TWO, 1200, scale=8.0 * factor, n_samples=2)
    levels = found.hpd_level.ravel()
    order = np.sort(levels)
    steps = np.arange(len(levels) + 1) / len(levels)
    distance = max((steps[1:] - order).max(), (order - steps[:-1]).max())
    assert (math.sqrt(len(levels)) * distance < 1.36) == is_calibrated
    summary = found.summary()
    # Too small a scale: surprises, so that regions hold too little.
    assert np.sign(summary["k0/c80"] - 0.8) == np.sign(factor - 1) or is_calibrated
    if is_calibrated:
        for name, level in (("c50", 0.5), ("c80", 0.8), ("c95", 0.95)):
            margin = 4 * math.sqrt(level * (1 - level) / len(levels))
            assert np.mean(levels <= level) == pytest.approx(level, abs=margin), name


@pytest.mark.parametrize("scale", [5.0, 12.0])
def test_ks_is_the_distance_between_distribution_functions(scale):
    found = metrics_of(TWO, 40, scale=scale, n_draws=100)
    levels = found.hpd_level[:, 0]
    lattice = np.linspace(0, 1, 100_001)
    share = (levels <= lattice[:, None]).mean(1)
    assert found.summary()["k0/ks"] == pytest.approx(np.abs(share - lattice).max(), abs=1e-4)


def test_level_is_zero_at_the_densest_action_and_one_far_away():
    found = metrics_of(ONE, 2, expert=doubles([[[256.0, 200.0]], [[500.0, 10.0]]]))
    assert found.hpd_level.ravel().tolist() == [0.0, 1.0]


def test_energy_score_of_two_points():
    samples = doubles([[0.0, 0.0], [30.0, 40.0]])
    # E|A - a| is 25 between them, E|A - A'| over different samples 50.
    assert energy_score(samples, doubles([15.0, 20.0])).item() == pytest.approx(0.0)
    assert energy_score(samples, doubles([0.0, 0.0])).item() == pytest.approx(0.0)
    assert energy_score(samples[:1], doubles([3.0, 4.0])).item() == pytest.approx(5.0)


def test_the_true_density_has_the_best_energy_score():
    generator = torch.Generator().manual_seed(0)
    truth = Mixture(TWO.centres, doubles([[8.0, 8.0]]))
    actions = truth.sample(4000, generator)
    samples = truth.sample(4000 * 8, generator).reshape(4000, 8, 2)
    middle = TWO.centres.mean(0)
    scores = {
        "true": energy_score(samples, actions),
        "shifted": energy_score(samples + doubles([25.0, 0.0]), actions),
        "one mode": energy_score(
            Mixture(TWO.centres[:1], doubles([[8.0, 8.0]]))
            .sample(4000 * 8, generator)
            .reshape(4000, 8, 2),
            actions,
        ),
        "wide": energy_score(middle + 1.5 * (samples - middle), actions),
    }
    assert min(scores, key=lambda name: scores[name].mean()) == "true"


def test_densest_action_beats_every_other():
    generator = torch.Generator().manual_seed(0)
    centres = 100 * torch.rand(6, 9, 2, generator=generator, dtype=torch.float64)
    scale = 5 + 20 * torch.rand(6, 2, generator=generator, dtype=torch.float64)
    highest, where = densest(centres, scale)
    mixture = Mixture(centres, scale[:, None])
    torch.testing.assert_close(mixture.log_density(where[:, None])[:, 0], highest)
    cells = Grid(200, (0.0, 0.0), (100.0, 100.0)).centres().reshape(1, -1, 2).expand(6, -1, -1)
    others = torch.cat([mixture.log_density(cells), mixture.log_density(centres)], dim=1)
    assert (others <= highest[:, None] + 1e-12).all()


def test_densest_action_may_lie_between_all_centres():
    cross = doubles([[256.0, 259.0], [256.0, 253.0], [259.0, 256.0], [253.0, 256.0]])
    highest, where = densest(cross, doubles([3.0, 3.0]))
    assert where.tolist() == [256.0, 256.0]
    assert highest.item() == pytest.approx(-1 - 2 * math.log(6))


def test_regret_is_the_distance_to_the_mode_in_units_of_the_scale():
    point = doubles([[[264.0, 184.0]], [[256.0, 200.0]]])
    found = metrics_of(ONE, 2, point=point)
    np.testing.assert_allclose(found.regret.ravel(), [8 / 8 + 16 / 8, 0], atol=1e-12)
    np.testing.assert_allclose(found.dist_executed_argmax.ravel(), [math.hypot(8, 16), 0])
    np.testing.assert_allclose(found.dist_mean_argmax, 0, atol=1e-12)
    # At the densest action the policy without its latent is the policy.
    np.testing.assert_allclose(found.nll_z0[1], found.nll[1], atol=1e-12)


def test_acting_on_the_mean_of_two_modes_costs_their_distance():
    found = metrics_of(TWO, 3)  # executes the middle, 100 px from both
    np.testing.assert_allclose(found.regret, 100 / 8 - math.log(2), atol=1e-9)
    np.testing.assert_allclose(found.dist_mean_argmax, 100)


def test_area_rank_survives_monotone_transforms():
    scores = torch.randn(3, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    actions = 512 * torch.rand(3, 2, 2, generator=torch.Generator().manual_seed(1))
    rank = area_rank(scores, actions, COARSE)
    assert torch.equal(rank, area_rank(torch.exp(3 * scores) - 7, actions, COARSE))
    assert torch.equal(
        area_rank(torch.zeros(16, 16), actions[0, 0], COARSE), torch.tensor(1.0).double()
    )
    best = COARSE.centres().reshape(-1, 2)[scores[0, 0].argmax()]
    assert area_rank(scores[0, 0], best, COARSE).item() == 1 / 256
    assert area_rank(scores[0, 0], doubles([-9.0, 900.0]), COARSE) == area_rank(
        scores[0, 0], doubles([1.0, 511.0]), COARSE
    )


def test_mass_outside_the_board_is_counted():
    corner = ToyPolicy([[0.0, 0.0]])
    np.testing.assert_allclose(metrics_of(corner).out_of_board, 0.75, atol=1e-12)
    np.testing.assert_allclose(metrics_of(ONE).out_of_board, 0, atol=1e-9)


def test_kernels_narrower_than_a_cell_are_no_modes():
    noise = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    blob = ToyPolicy(256 + 12 * noise)
    found = metrics_of(blob, 2, scale=1.0, n_samples=64, grid=Grid(128))
    narrow = Mixture(blob.centres, doubles([[1.0, 1.0]])).cell_mass(Grid(128))
    assert modes(narrow).count.item() > 1  # what the guard is for
    assert found.modes.tolist() == [[1.0], [1.0]]


def test_what_is_exact_does_not_depend_on_the_grid():
    policy = ToyPolicy([[240.0, 250.0], [265.0, 256.0]])
    coarse, fine = (metrics_of(policy, grid=Grid(n)) for n in (10, 100))
    for name in ("nll", "nll_z0", "nll_frozen", "energy", "hpd_level", "entropy", "regret"):
        np.testing.assert_array_equal(getattr(coarse, name), getattr(fine, name))
    np.testing.assert_allclose(coarse.out_of_board, fine.out_of_board, atol=1e-12)


def test_a_frame_is_measured_alike_in_any_company():
    policy = ToyPolicy([[240.0, 250.0], [265.0, 256.0]])
    batch = demonstrated(policy, 8, 8.0, n_steps=1)
    whole = metrics_of(policy, batch=batch)
    part = metrics_of(policy, batch=batch.rows(torch.tensor([5, 2])))
    for name, values in whole._columns().items():
        np.testing.assert_array_equal(part._columns()[name], values[[5, 2]], err_msg=name)


def test_columns_are_those_of_their_chunk_step():
    moving = ToyPolicy([[156.0, 256.0], [356.0, 256.0]], velocity=(1.0, 0.5))
    batch = demonstrated(moving, 6, 8.0, n_steps=9)
    both = metrics_of(moving, batch=batch, queries=(0, 8))
    later = metrics_of(moving, batch=batch, queries=(8,))
    for name in ("nll", "nll_z0", "energy", "regret", "area_rank", "hdr80_px2"):
        np.testing.assert_allclose(getattr(both, name)[:, 1:], getattr(later, name), err_msg=name)


def with_padding(metrics_args, is_valid):
    return metrics_of(TWO, 40, queries=(0, 1), is_valid=is_valid, **metrics_args)


def test_what_lies_beyond_the_demonstration_is_left_out():
    is_valid = torch.ones(40, 2, dtype=torch.bool)
    is_valid[::3, 1] = False
    found, all_valid = with_padding({}, is_valid), metrics_of(TWO, 40, queries=(0, 1))
    assert np.isnan(found.nll[~is_valid.numpy()]).all()
    rows = is_valid[:, 1].numpy()
    summary = found.summary()
    assert summary["k1/nll"] == pytest.approx(all_valid.nll[rows, 1].mean())
    assert summary["k1/regret_med"] == pytest.approx(np.median(all_valid.regret[rows, 1]))
    assert summary["k1/hdr80_px2"] == pytest.approx(all_valid.hdr80_px2[rows, 1].mean())
    assert all(math.isfinite(value) for value in summary.values())
    assert sum(row["k"] == 1 for row in found.rows()) == rows.sum()
    np.testing.assert_allclose(found.intervals()["k0/nll"], all_valid.intervals()["k0/nll"])


def test_an_episode_that_ends_before_a_chunk_step_has_no_part_in_its_interval():
    is_valid = torch.ones(40, 2, dtype=torch.bool)
    is_valid[8:, 1] = False  # two of ten episodes reach it
    found = with_padding({}, is_valid)
    values = [found.nll[:4, 1].mean(), found.nll[4:8, 1].mean()]
    # Two episodes resampled: each alone in a quarter of the cases.
    assert found.intervals()["k1/nll"] == pytest.approx((min(values), max(values)))


@pytest.mark.parametrize("n_frames", [7, 8])
def test_median_is_that_of_numpy(n_frames):
    point = 512 * torch.rand(n_frames, 1, 2, generator=torch.Generator().manual_seed(0)).double()
    found = metrics_of(ONE, n_frames, point=point)
    assert found.summary()["k0/regret_med"] == pytest.approx(np.median(found.regret))


def test_a_chunk_step_that_nobody_reaches_gives_no_key():
    is_valid = torch.tensor([[True, False]]).expand(40, 2)
    found = with_padding({}, is_valid)
    for keys in (found.summary(), found.intervals()):
        assert {key.split("/")[0] for key in keys} == {"k0"}
    assert {row["k"] for row in [*found.rows(), *found.episode_rows()]} == {0}
    assert not any(sentence.startswith("k=1") for sentence in found.reading())


def test_summary_names_are_those_of_the_specification():
    batch = demonstrated(TWO, 10, 8.0, n_steps=1)
    known = BaselineFrames.of(batch, [0])
    predictions = predict(TWO, batch, [0], 2)
    found = measure(
        predictions,
        doubles([[[8.0, 8.0]]]),
        COARSE,
        batch.episode_index,
        batch.frame_index,
        baselines(known, known, COARSE),
    )
    names = (
        "nll skill_vs_agent energy c50 c80 c95 ks area_rank_med excess_entropy hdr80_px2 modes_mean"
        " multimodal_frac regret_med out_of_board nll_frozen nll_z0 z_value"
    )
    summary = found.summary()
    assert set(summary) == {f"k0/{name}" for name in names.split()}
    skill = found.baselines["agent"].mean() - found.nll.mean()
    assert summary["k0/skill_vs_agent"] == pytest.approx(skill)
    np.testing.assert_allclose(found.gain_over_uniform, 2 * math.log(512) - found.nll)
    # Without the baselines there is no skill to tell.
    assert "k0/skill_vs_agent" not in metrics_of(TWO, 10).summary()


def test_frozen_nll_is_that_of_ten_px():
    np.testing.assert_allclose(
        metrics_of(TWO, scale=3.0).nll_frozen, metrics_of(TWO, scale=10.0).nll, atol=1e-12
    )


@cache
def correlated(n_episodes=12, n_frames=10, offset=0.0) -> LandscapeMetrics:
    """Each episode misses by its own distance, the same in all its frames."""
    frames = torch.arange(n_episodes * n_frames)
    episode = frames // n_frames
    miss = 5 * torch.rand(n_episodes, generator=torch.Generator().manual_seed(3)).double()
    centre = doubles([256.0, 200.0])
    expert = centre + (offset + miss[episode])[:, None, None]
    n = len(frames)
    predictions = Predictions(
        (0,),
        centre.expand(n, 2, 1, 2),
        centre.expand(n, 1, 2),
        expert,
        torch.ones(n, 1, dtype=torch.bool),
    )
    scale = doubles([[[8.0, 8.0]]])
    return measure(predictions, scale, COARSE, episode, frames, n_draws=20)


def test_intervals_over_episodes_are_wider_than_over_frames_of_one_mind():
    by_episode = correlated()
    by_frame = replace(by_episode, episode_index=by_episode.frame_index)
    wide, narrow = (interval_width(each, "k0/nll") for each in (by_episode, by_frame))
    # Ten equal frames count as one: sqrt(10) times the width.
    assert wide / narrow == pytest.approx(math.sqrt(10), rel=0.25)


def test_interval_of_a_mean_is_as_wide_as_theory_says():
    found = correlated(n_episodes=60, n_frames=2)
    per_episode = found.nll.reshape(60, 2).mean(1)
    expected = 2 * 1.96 * per_episode.std() / math.sqrt(60)
    assert interval_width(found, "k0/nll", n_bootstrap=4000) == pytest.approx(expected, rel=0.1)
    low, high = found.intervals()["k0/nll"]
    assert low < found.summary()["k0/nll"] < high
    assert found.intervals() == found.intervals()
    assert found.intervals(seed=1) != found.intervals(seed=2)
    assert interval_width(found, "k0/nll", level=0.5) < 0.5 * (high - low)


def test_resampled_statistics_are_those_of_the_repeated_frames():
    """Weights stand for repetition: means, shares, medians and KS alike."""
    found = metrics_of(ToyPolicy([[240.0, 250.0], [265.0, 256.0]]), 9, n_draws=50)
    times = np.array([0, 2, 1, 0, 3, 1, 0, 1, 2])
    repeated = np.repeat(np.arange(9), times)
    columns = {
        name: values[repeated]
        for name in LandscapeMetrics.__dataclass_fields__
        if isinstance(values := getattr(found, name), np.ndarray) and len(values) == 9
    }
    expected = replace(found, **columns).summary()
    weighted = found._statistics(0, times[None].astype(float))
    assert {f"k0/{name}": value[0] for name, value in weighted.items()} == pytest.approx(expected)


def test_one_episode_gives_no_interval():
    assert correlated(n_episodes=1).intervals() == {}


def test_episode_rows_add_up_to_the_summary():
    found = correlated(n_episodes=4, n_frames=5)
    rows = found.episode_rows()
    assert [row["episode"] for row in rows] == [0, 1, 2, 3]
    assert [row["n_frames"] for row in rows] == [5] * 4
    assert np.mean([row["nll"] for row in rows]) == pytest.approx(found.summary()["k0/nll"])
    assert rows[2]["nll"] == pytest.approx(found.nll[10:15].mean())
    frame = found.rows()[7]
    assert (frame["episode"], frame["frame"], frame["k"]) == (1, 7, 0)
    assert frame["nll"] == found.nll[7, 0]


def test_a_paired_difference_cancels_what_is_hard_for_both():
    a, b = correlated(), correlated(offset=4.0)
    found = paired_difference(a, b, "k0/nll")
    # 4 px more along both axes of a Laplace density with b = 8.
    assert (found.difference, found.low, found.high) == pytest.approx((-1.0, -1.0, -1.0))
    assert found.n_episodes == 12
    assert interval_width(a, "k0/nll") > 0.1
    assert paired_difference(a, a, "k0/ks").high == 0.0


def test_a_paired_difference_needs_the_same_frames():
    a = correlated()
    with pytest.raises(ValueError, match="different frames"):
        paired_difference(a, replace(a, frame_index=a.frame_index + 1), "k0/nll")
    with pytest.raises(ValueError, match="not a summary of both"):
        paired_difference(a, a, "k8/nll")
    alone = correlated(n_episodes=1)
    with pytest.raises(ValueError, match="only one episode"):
        paired_difference(alone, alone, "k0/nll")


def latent(kl=0.0, ratio=0.05) -> LatentUse:
    return LatentUse(kl, torch.tensor([kl]), 0, torch.tensor([ratio * 8]), torch.tensor([ratio]))


def rules(metrics, **kwargs) -> set[str]:
    return {sentence.split(": ")[1] for sentence in metrics.reading(**kwargs)}


def test_reading_a_collapse():
    found = many(ONE, n_draws=500)
    assert rules(found) == rules(found, latent=latent()) == {"collapse"}
    # The density is narrow, but the latent carries something.
    assert rules(found, latent=latent(kl=0.7)) == rules(found, latent=latent(ratio=0.5)) == set()
    with pytest.raises(ValueError, match="latent holds 1 chunk steps"):
        metrics_of(ONE, 2, queries=(0, 1)).reading(latent=latent())


def test_reading_modes():
    grid = Grid(64)
    at_one_mode = ToyPolicy(TWO.centres, point=TWO.centres[0].tolist())
    assert rules(many(at_one_mode, grid=grid)) == {"real multimodality"}
    assert rules(many(TWO, grid=grid)) == {"real multimodality", "between modes"}
    # The demonstrator never goes to the second mode.
    at_first = demonstrated(ToyPolicy(TWO.centres[:1]), 10, 8.0)
    found = many(at_one_mode, grid=grid, batch=at_first)
    assert "decorative modes" in rules(found)
    assert "real multimodality" not in rules(found)


SPREAD = ToyPolicy([[256.0, 256.0], [270.0, 262.0], [247.0, 240.0]])
"""One mode, with more spread than a collapsed policy has."""


@pytest.mark.parametrize(
    ("factor", "expected"), [(1.0, set()), (0.7, {"overconfident"}), (1.5, {"underconfident"})]
)
def test_reading_calibration(factor, expected):
    found = many(SPREAD, 800, scale=8.0 * factor, n_samples=3, n_draws=500)
    assert rules(found) & {"overconfident", "underconfident", "overfit"} == expected
    trained = replace(found, scale=found.scale / 1.4)
    with_train = rules(found, train=trained) - rules(found)
    assert with_train == ({"overfit"} if factor < 1 else set())


def test_reading_tells_its_numbers():
    (sentence,) = many(ONE, n_draws=500).reading(latent=latent(kl=0.02))
    assert sentence.startswith("k=0: collapse: ")
    assert "KL 0.020 nats" in sentence
    assert "excess entropy 0.000 nats" in sentence


def test_predictions_that_are_not_finite_are_refused():
    samples = predict(ONE, demonstrated(ONE, 2, 8.0, n_steps=1), [0], 4).samples.clone()
    samples[1, 2] = math.nan
    with pytest.raises(ValueError, match="samples are not finite"):
        metrics_of(ONE, 2, samples=samples)


def test_baselines_of_other_frames_are_refused():
    batch = demonstrated(ONE, 6, 8.0, n_steps=2)
    predictions = predict(ONE, batch, [0], 2)
    for known in (BaselineFrames.of(batch, [1]), BaselineFrames.of(batch.rows(slice(0, 4)), [0])):
        with pytest.raises(ValueError, match="compute both on the same"):
            measure(
                predictions,
                doubles([[[8.0, 8.0]]]),
                COARSE,
                batch.episode_index,
                batch.frame_index,
                baselines(known, known, COARSE),
            )
