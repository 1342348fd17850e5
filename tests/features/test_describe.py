"""Descriptions of planted features: what was planted is found, on frames that were held out."""

import json
import math

import pytest
import torch
from planted_records import POSITIONS, record_of, record_of_frames
from pyarrow import parquet

from features.bases import basis_table, compare_bases, principal_directions, signed_units
from features.concepts import Concepts
from features.describe import FeatureDescriptions, describe, position_label, write_descriptions
from features.memorisation import episode_statistics, memorisation
from features.peaks import find_peaks
from features.place_fields import place_fields
from features.record import FeatureRecord
from landscapes.grid import Grid

N_EPISODES, LENGTH = 24, 40
GENERAL, REVERSED, STORED, CHANCE, NEVER, GRADED = range(6)
"""Fires where a concept holds; where it does not; in one training episode; anywhere; nowhere; as
strongly as something is far to the right."""


def walk(n: int, seed: int) -> torch.Tensor:
    """Points on the board, episode by episode, that stay near where they were."""
    steps = torch.randn(n, LENGTH, 2, generator=torch.Generator().manual_seed(seed)) * 40
    steps[:, 0] += torch.rand(n, 2, generator=torch.Generator().manual_seed(seed + 1)) * 512
    return steps.cumsum(1).clamp(0, 511).flatten(0, 1)


def scene(seed: int, first_episode: int) -> tuple[FeatureRecord, Concepts]:
    xy = walk(N_EPISODES, seed)
    holds = xy[:, 1] > 300
    generator = torch.Generator().manual_seed(seed + 2)
    n = len(xy)
    values = torch.zeros(n, 3, 6)
    values[:, 1, GENERAL] = holds * (1 + torch.rand(n, generator=generator))
    values[:, 0, GENERAL] = values[:, 1, GENERAL] * (torch.rand(n, generator=generator) < 0.3) / 2
    values[:, 2, REVERSED] = (~holds).float()
    if first_episode == 0:
        values[5 * LENGTH + 3 : 5 * LENGTH + 23, 0, STORED] = 3.0
    values[..., CHANCE] = (torch.rand(n, 3, generator=generator) - 0.9).clamp_min(0)
    values[:, 2, GRADED] = xy[:, 0] / 512
    record = record_of(values, [LENGTH] * N_EPISODES, first_episode, metadata={"layer": "encoder"})
    unknown = holds.float()
    unknown[::7] = torch.nan
    return record, Concepts.from_columns(
        continuous={"x": (xy[:, 0], "px"), "y": (xy[:, 1], "px")},
        binary={"is_low": unknown, "always": torch.ones(n)},
    )


@pytest.fixture(scope="module")
def scenes():
    return scene(0, 0), scene(10, 100)


@pytest.fixture(scope="module")
def described(scenes) -> FeatureDescriptions:
    (train, here), (held_out, there) = scenes
    return describe(
        train,
        held_out,
        here,
        there,
        fps=10,
        places={"agent": ("x", "y")},
        grid=Grid(4),
        n_permutations=99,
    )


def test_planted_features_are_named(described):
    assert described.latents.tolist() == [GENERAL, REVERSED, STORED, CHANCE, GRADED]
    row = {latent: place for place, latent in enumerate(described.latents.tolist())}
    binary, continuous = described.best(True), described.best(False)
    assert binary.concept[row[GENERAL]] == binary.concept[row[REVERSED]] == "is_low"
    assert float(binary.held_out[row[GENERAL]]) == pytest.approx(1)
    assert float(binary.held_out[row[REVERSED]]) == pytest.approx(0)
    assert float(binary.p[row[GENERAL]]) == pytest.approx(0.01)
    assert continuous.concept[row[GRADED]] == "x"
    assert float(continuous.held_out[row[GRADED]]) == pytest.approx(1)
    assert float(binary.p[row[CHANCE]]) > 0.05
    assert float(continuous.p[row[CHANCE]]) > 0.05
    # Silent on held-out frames: an AUROC of nothing is one half, a correlation there is none.
    assert float(binary.held_out[row[STORED]]) == 0.5
    assert math.isnan(float(continuous.held_out[row[STORED]]))


def test_concepts_are_chosen_on_training_frames_only(scenes, described):
    """On held-out frames another concept fits better, and must not be picked for that."""
    (train, here), (held_out, there) = scenes
    swapped = Concepts(here.names, there.values[:, [1, 0, 2, 3]], here.is_binary, here.units)
    found = describe(train, held_out, here, swapped, fps=10, n_permutations=19)
    place = found.latents.tolist().index(GRADED)
    best = found.best(False)
    assert best.concept[place] == "x"
    other = found.held_out_associations.of_kind(False)
    assert float(other.deviation[place, 1]) == pytest.approx(1)
    assert float(best.held_out[place]) == float(other.strength[place, 0]) < 0.9


def test_only_the_tokens_that_count_are_held_against_concepts(scenes, monkeypatch):
    """The general feature fires at token 1, and now and then at token 0."""
    (train, here), (held_out, there) = scenes
    strength = {}
    for tokens in (None, [0], [1], [2]):
        found = describe(train, held_out, here, there, 10, tokens, n_permutations=19)
        place = found.held_out_associations.names.index("is_low")
        strength[tokens and tokens[0]] = float(found.held_out_associations.strength[0, place])
    assert strength[None] == strength[1] == pytest.approx(1)
    assert 0.55 < strength[0] < 0.75
    assert strength[2] == 0.5
    # A feature at a time gives the same, thresholds included.
    monkeypatch.setattr("features.describe.BLOCK_VALUES", 1)
    one_by_one = describe(train, held_out, here, there, 10, [2], n_permutations=19)
    for name in ("strength", "threshold", "p", "mutual_information_nats"):
        values = getattr(one_by_one.held_out_associations, name)
        expected = getattr(found.held_out_associations, name)
        torch.testing.assert_close(values, expected, equal_nan=True, rtol=0, atol=1e-6)


def test_activity_counts_tokens_and_frames(scenes, described):
    (train, _), _ = scenes
    dense = torch.stack([train.frames_by_latents(tokens=[token]) for token in range(3)], dim=1)
    activity, latents = described.train, described.latents
    fires = (dense > 0)[..., latents]
    same = {"check_dtype": False, "rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(activity.token_density, fires.float().mean((0, 1)), **same)
    torch.testing.assert_close(activity.frame_density, fires.any(1).float().mean(0), **same)
    torch.testing.assert_close(activity.spatial, dense.mean(0).T[latents], **same)
    mean = dense[..., latents].sum((0, 1)) / fires.sum((0, 1))
    torch.testing.assert_close(activity.mean_activation, mean, **same)
    torch.testing.assert_close(activity.max_activation, dense.amax((0, 1))[latents], **same)
    assert activity.main_token.tolist()[:3] == [1, 2, 0]
    share = fires[:, 1, 0].sum() / fires[..., 0].sum()
    assert float(activity.main_token_share[0]) == pytest.approx(float(share))
    assert 0.5 < share < 0.95


def test_what_is_stored_is_not_general(scenes, described):
    memory = described.memorisation
    assert memory.is_general.tolist() == [True, True, False, True, False, True]
    assert float(memory.generalisation_gap[STORED]) == 1
    assert float(memory.generalisation_gap[GRADED]) == pytest.approx(0, abs=0.02)
    assert memory.generalisation_gap[NEVER].isnan()
    stored = {
        "onset_count": 1,
        "episode_coverage": 20 / LENGTH,
        "relative_run_length": 20 / LENGTH,
        "mean_activation": 3,
        "episode_share": 1 / N_EPISODES,
        "episode_entropy": 0,
        "density": 20 / (N_EPISODES * LENGTH),
    }
    for name, value in stored.items():
        assert float(getattr(memory.train, name)[STORED]) == pytest.approx(value), name
    # Nothing is near a limit: no episode decides anything.
    share = memory.general_share()
    assert (share.value, share.low, share.high) == pytest.approx((0.8, 0.8, 0.8))
    with pytest.raises(ValueError, match="are in both records"):
        memorisation(scenes[0][0], scenes[0][0])


def test_the_interval_of_the_general_share_is_as_wide_as_shares_scatter():
    """Forty features that fire in one episode of ten on average: half of them are general."""
    shares = []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        fires = torch.rand(40, 50, generator=generator) < 0.1
        train, held_out = (
            record_of_frames(half.T.repeat_interleave(2, 0).float(), [2] * 20, first)
            for half, first in ((fires[:, :20], 0), (fires[:, 20:40], 100))
        )
        shares.append(memorisation(train, held_out).general_share())
    values = torch.tensor([share.value for share in shares])
    covers = [share.low <= float(values.mean()) <= share.high for share in shares]
    widths = torch.tensor([share.high - share.low for share in shares])
    assert 0.3 < float(values.mean()) < 0.6
    assert sum(covers) / 60 > 0.88
    assert float(widths.mean()) < 2.5 * 4 * float(values.std())


def test_episode_statistics_by_hand():
    """Two runs in the first episode of four frames, nothing in the second, all of the third."""
    value = torch.tensor([1.0, 0, 2, 3, 0, 0, 0, 0, 6, 6])[:, None]
    found = episode_statistics(record_of_frames(value, [4, 4, 2]))
    assert float(found.onset_count) == (2 + 1) / 2
    assert float(found.episode_coverage) == pytest.approx((3 / 4 + 1) / 2)
    assert float(found.relative_run_length) == pytest.approx((1 / 4 + 2 / 4 + 1) / 3)
    assert float(found.mean_activation) == pytest.approx(18 / 5)
    assert float(found.episode_share) == pytest.approx(2 / 3)
    assert found.frames_fired.tolist() == [[3, 0, 2]]
    # Masses for each frame: 6 / 4 and 6, of which the shares are 1 / 5 and 4 / 5.
    entropy = -(0.2 * math.log(0.2) + 0.8 * math.log(0.8))
    assert float(found.episode_entropy) == pytest.approx(entropy / math.log(3))


def test_peaks_are_far_apart_and_from_many_episodes():
    value = torch.zeros(60)
    # A broad peak and a small one in episode 0, two small ones in 1, one in 2, none in 3.
    value[3:6] = torch.tensor([8.0, 9.0, 8.5])
    value[12] = 4
    value[20:23] = torch.tensor([3.0, 2.0, 3.0])
    value[31] = 1
    record = record_of_frames(value[:, None], [15] * 4)
    found = find_peaks(record, fps=10, n_frames=4, n_per_episode=2, min_gap_s=0.3)
    assert found.row.tolist() == [[4, 12, 20, 31]]
    assert found.episode_index.tolist() == [[0, 0, 1, 2]]
    assert found.frame_index.tolist() == [[4, 12, 5, 1]]
    # One from each episode comes before a second one of any, though that is stronger.
    three = find_peaks(record, fps=10, n_frames=3, n_per_episode=2, min_gap_s=0.3)
    assert three.row.tolist() == [[4, 20, 31]]
    near = find_peaks(record, fps=10, n_frames=9, n_per_episode=2, min_gap_s=0.2)
    assert near.row.tolist() == [[4, 12, 20, 22, 31, -1, -1, -1, -1]]
    assert near.value[0, :5].tolist() == [9, 4, 3, 3, 1]
    assert near.value[0, 5:].isnan().all()


def test_place_fields_of_a_cell_that_fires_in_one_quarter():
    xy = walk(N_EPISODES, 3)
    grid = Grid(2)
    upper_left = ((xy[:, 0] < 256) & (xy[:, 1] < 256)).float()
    generator = torch.Generator().manual_seed(0)
    values = torch.stack(
        [
            2 * upper_left,
            torch.ones(len(xy)),
            torch.rand(len(xy), generator=generator),
            0 * xy[:, 0],
        ],
        dim=-1,
    )
    found = place_fields(record_of_frames(values, [LENGTH] * N_EPISODES), xy, grid, 99)
    assert found.rates[0].tolist() == [[2, 0], [0, 0]]
    assert found.rates[1].tolist() == [[1, 1], [1, 1]]
    # Skaggs: 1 / p of the rate in a share p of the time is -log2(p) bits; a constant tells nothing.
    share = float(upper_left.mean())
    assert float(found.information_bits[0]) == pytest.approx(-math.log2(share))
    assert float(found.information_bits[1]) == pytest.approx(0, abs=1e-12)
    assert float(found.p[0]) == pytest.approx(0.01)
    assert float(found.p[1]) == 1
    assert float(found.p[2]) > 0.01
    assert found.p[3].isnan()
    assert found.significant_share() == pytest.approx(1 / 3)
    assert int(found.frames.sum()) == len(xy)


def test_slow_signals_are_no_place_fields():
    """Features that drift as slowly as the agent, and have nothing to do with it."""
    significant = []
    for seed in range(4):
        xy = walk(N_EPISODES, 40 + 2 * seed)
        drift = torch.stack([walk(N_EPISODES, 100 + 20 * seed + k)[:, 0] for k in range(20)], -1)
        record = record_of_frames((drift - 250).clamp_min(0), [LENGTH] * N_EPISODES)
        significant.append(place_fields(record, xy, Grid(4), 99, seed).significant_share(0.05))
    assert sum(significant) / 4 <= 0.12


def test_bases_compete_on_held_out_frames(scenes):
    (train, here), (held_out, there) = scenes
    latents = [GENERAL, REVERSED, CHANCE, GRADED]
    mix = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    features = train.frames_by_latents(latents), held_out.frames_by_latents(latents)
    scores = compare_bases(
        {"features": features, "neurons": (features[0] @ mix, features[1] @ mix)},
        here,
        there,
        n_several=4,
    )
    found = {(score.basis, score.concept): score for score in scores}
    assert found["features", "is_low"].unit in (0, 1)
    assert abs(found["features", "is_low"].single - 0.5) == pytest.approx(0.5)
    assert found["features", "x"].unit == 3
    assert found["features", "x"].single == pytest.approx(1, abs=1e-6)
    # Mixed, no neuron says it alone; four of them together span what the features do.
    assert abs(found["neurons", "x"].single) < 0.97
    assert found["neurons", "x"].several == pytest.approx(1, abs=1e-6)
    assert found["features", "y"].several == pytest.approx(found["neurons", "y"].several, abs=1e-5)
    assert len(set(found["neurons", "y"].units)) == 4
    constant = found["features", "always"]
    assert math.isnan(constant.single)
    assert constant.unit == -1
    assert constant.units == ()
    table = basis_table(scores)
    assert len(table.rows) == 8
    assert table.rows[-1][-1] is None


def test_neurons_are_pooled_in_both_directions():
    activations = torch.tensor([[[1.0, -4.0], [2.0, 3.0]]])
    assert signed_units(activations).tolist() == [[2, 3, -1, 4]]


def test_principal_directions_fall_in_variance():
    rows = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0))
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1))).Q
    found = principal_directions((rows * torch.tensor([1.0, 5.0, 0.2])) @ turn)
    expected = turn[[1, 0, 2]]
    assert (found * expected).sum(1).abs().tolist() == pytest.approx([1, 1, 1], abs=0.01)


def test_numbers_that_are_not_known_are_null(described, tmp_path):
    more = {"behaviour": {"action_score": {"value": 0.5, "low": float("nan")}}}
    folder = write_descriptions(tmp_path / "found", described, summary=more)
    summary = json.loads((folder / "features.json").read_text(), parse_constant=pytest.fail)
    assert summary["behaviour"]["action_score"] == {"value": 0.5, "low": None}


def test_files_say_the_same(described, tmp_path):
    folder = write_descriptions(tmp_path / "found", described)
    rows = parquet.read_table(folder / "features.parquet").to_pylist()
    assert [row["latent"] for row in rows] == described.latents.tolist()
    general, stored = rows[0], rows[2]
    assert general["best_binary"] == "is_low"
    assert general["best_binary_auroc"] == general["auroc_is_low"] == pytest.approx(1)
    assert general["main_token"] == "image[0, 0]"
    assert len(general["spatial"]) == len(POSITIONS)
    assert len(general["top_episode"]) == 9
    assert len(set(general["top_episode"])) == 9
    assert all(episode >= 100 for episode in general["top_episode"])
    assert general["auroc_always"] is None
    assert stored["top_episode"] == []
    assert set(stored["train_top_episode"]) == {5}
    assert stored["best_continuous_r"] is None
    assert not stored["is_general"]
    assert general["place_agent_p"] <= 0.02
    summary = json.loads((folder / "features.json").read_text())
    assert summary["n_live"] == 5
    assert summary["general"]["share"] == 0.8
    low = summary["concepts"]["is_low"]
    assert low["latent"] in (GENERAL, REVERSED)
    assert low["n_significant"] >= 2
    assert 0 < low["threshold"] < 0.5
    assert low["n_known"] == int((~described.concepts.column("is_low").isnan()).sum())
    assert summary["concepts"]["always"]["held_out"] is None
    assert summary["metadata"] == {"layer": "encoder"}
    assert not [path for path in folder.iterdir() if path.suffix == ".part"]


def test_what_does_not_belong_together_is_refused(scenes):
    (train, here), (held_out, there) = scenes
    with pytest.raises(ValueError, match="held_out: 960 frames, concepts of 959"):
        describe(train, held_out, here, there.rows(slice(1, None)), fps=10)
    with pytest.raises(ValueError, match="give the same of both"):
        describe(train, held_out, here, there.of("x", "y"), fps=10)


def test_tokens_are_called_by_their_place():
    assert [position_label(each) for each in POSITIONS] == ["state", "image[0, 0]", "image[0, 1]"]
