"""Scores of every cell: what each method says it computes, computed another way."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_act import CHUNK, LinearACT, frames, tiny_act
from torch.distributions import Laplace
from toy_policies import ToyPolicy, demonstrated

from landscapes.density import MIN_SCALE, Mixture
from landscapes.grid import Grid
from landscapes.landscape import Landscape, Predictions, predict
from landscapes.methods import (
    FLOOR_NATS,
    METHODS,
    Belief,
    Committed,
    Confidence,
    Distance,
    Energy,
    ExpertMode,
    L1Loss,
    Likelihood,
    LikelihoodZ0,
    Method,
    Probe,
    Reconstruction,
)
from landscapes.regions import CREDIBLE_LEVELS
from landscapes.study import kernel_scale
from policies.ensembling import TemporalEnsembler
from policies.interface import DataSchema

WHOLE = tuple(range(CHUNK))
HORIZONS = (0, 3)
GRID = Grid(24)
ACT_METHODS = [name for name in METHODS if name != "noise_pred"]


def doubles(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def scale_of(n_queries=CHUNK, low=15.0) -> torch.Tensor:
    """Different along every axis and step."""
    return low + torch.arange(2 * n_queries, dtype=torch.float64).reshape(1, n_queries, 2)


def probe_of(view, batch, horizons=HORIZONS, n_samples=5, grid=GRID, scale=None) -> Probe:
    predictions = predict(view, batch, range(view.chunk_size), n_samples)
    scale = scale_of(view.chunk_size) if scale is None else scale
    return Probe(view, batch, predictions, scale, horizons, grid)


def given(point, samples=None, expert=None, is_valid=None, view=None, **changes) -> Probe:
    """A probe whose predictions are written by hand: point [frame query 2]."""
    point = torch.as_tensor(point, dtype=torch.float64)
    samples = point[:, None] if samples is None else samples
    expert = point if expert is None else expert
    n_frames, n_queries = point.shape[:2]
    predictions = Predictions(
        queries=tuple(range(n_queries)),
        samples=samples,
        point=point,
        expert=expert,
        is_valid=torch.ones(n_frames, n_queries, dtype=torch.bool)
        if is_valid is None
        else is_valid,
    )
    arguments = {
        "scale": scale_of(n_queries),
        "horizons": tuple(range(n_queries)),
        "grid": GRID,
        **changes,
    }
    view = view or ToyPolicy([[0.0, 0.0]], chunk_size=n_queries)
    return Probe(view, frames(n_frames, chunk_size=n_queries), predictions, **arguments)


def build(name: str) -> Method:
    return Reconstruction(resolution=8, batch_size=50) if name == "recon" else METHODS[name]()


def brute_force(probe: Probe, score) -> torch.Tensor:
    """Apply ``score(frame, query, cell)`` cell by cell."""
    shown, n = probe.shown(), probe.grid.resolution
    centres = probe.grid.centres()
    scores = torch.empty(*shown.point.shape[:2], n, n, dtype=torch.float64)
    for frame in range(scores.shape[0]):
        for query in range(scores.shape[1]):
            for row in range(n):
                for column in range(n):
                    cell = centres[row, column]
                    scores[frame, query, row, column] = score(shown, frame, query, cell)
    return scores


# Densities


def test_likelihood_integrates_to_one_minus_what_lies_off_the_board():
    policy = ToyPolicy([[3.0, 100.0], [500.0, 505.0], [250.0, 250.0]])
    probe = probe_of(policy, demonstrated(policy, 2, 10.0), (0, 8), n_samples=3)
    found = Likelihood().landscape(probe)
    mass = (found.scores.double() + probe.grid.log_uniform).exp() * probe.grid.cell_area
    for query, horizon in enumerate((0, 8)):
        b = probe.scale[0, horizon]
        kernels = Laplace(policy.centres, b)
        inside = kernels.cdf(doubles([512.0, 512.0])) - kernels.cdf(doubles([0.0, 0.0]))
        expected = inside.prod(-1).mean()
        assert expected < 0.9
        for frame in range(2):
            assert mass[frame, query].sum().item() == pytest.approx(expected.item(), abs=1e-6)


def test_scores_far_below_the_best_cell_are_drawn_alike():
    probe = given([[[100.0, 100.0]]], scale=doubles([[[2.0, 2.0]]]))
    scores = Likelihood().landscape(probe).scores
    assert scores.max() - scores.min() == pytest.approx(FLOOR_NATS, abs=1e-4)
    assert (scores == scores.min()).float().mean() > 0.5


def test_likelihood_z0_is_one_kernel_at_the_executed_action():
    policy = tiny_act()
    probe = probe_of(policy, frames(3), n_samples=8)
    found = LikelihoodZ0().landscape(probe)
    for frame in range(3):
        for query, horizon in enumerate(HORIZONS):
            centre = probe.predictions.point[frame, horizon]
            kernel = Mixture(centre[None], probe.scale[0, horizon][None])
            torch.testing.assert_close(
                found.mass[frame, query].double(), kernel.cell_mass(GRID), rtol=1e-6, atol=1e-12
            )
    alone = replace(
        probe, predictions=replace(probe.predictions, samples=probe.predictions.point[:, None])
    )
    torch.testing.assert_close(Likelihood().landscape(alone).scores, found.scores)
    assert (Likelihood().landscape(probe).scores - found.scores).abs().max() > 0.1


def test_regions_of_confidence_hold_their_level():
    policy = ToyPolicy([[150.0, 200.0], [400.0, 300.0], [420.0, 310.0]], velocity=(2.0, -1.0))
    probe = probe_of(policy, demonstrated(policy, 3, 10.0), n_samples=3, grid=Grid(128))
    confidence = Confidence().landscape(probe)
    likelihood = Likelihood().landscape(probe)
    assert torch.equal(confidence.mass, likelihood.mass)
    assert confidence.scores.min() >= 0
    assert confidence.scores.max() == 1
    for level in CREDIBLE_LEVELS:
        region = confidence.scores > 1 - level
        total = confidence.mass.sum((-1, -2))
        held = (confidence.mass * region).sum((-1, -2)) / total
        thinnest = torch.where(region, confidence.mass, torch.inf).amin((-1, -2)) / total
        assert (held >= level - 1e-6).all()
        assert (held - level <= 4 * thinnest).all()  # one more ring of equal cells at most


# Distances


def test_distances_are_those_of_brute_force():
    policy = tiny_act()
    probe = probe_of(policy, frames(2), n_samples=7, grid=Grid(9))

    def to_samples(norm):
        def score(shown, frame, query, cell):
            return -(cell - shown.samples[frame, :, query]).norm(p=norm, dim=-1).mean()

        return score

    def to_point(shown, frame, query, cell):
        return -(cell - shown.point[frame, query]).norm()

    for method, score in (
        (L1Loss(), to_samples(1)),
        (Energy(), to_samples(2)),
        (Distance(), to_point),
    ):
        torch.testing.assert_close(
            method.landscape(probe).scores.double(),
            brute_force(probe, score),
            rtol=1e-6,
            atol=1e-6,
        )


def test_distances_keep_their_digits_near_the_samples():
    """Squaring and subtracting in float32 is off by a tenth of a pixel there."""
    grid = Grid(128)
    near = grid.centres()[120, 120] + doubles([0.01, 0.0])
    probe = given(near[None, None], grid=grid)
    for method in (Distance(), Energy()):
        found = method.landscape(probe).scores[0, 0, 120, 120]
        assert found.item() == pytest.approx(-0.01, abs=1e-4)


def test_l1_loss_of_one_sample_is_likelihood_z0_times_the_scale():
    """Off the lines through the centre, where the mean over a cell is not its middle."""
    b = 40.0
    probe = given([[[203.0, 310.0]]], view=tiny_act(), scale=doubles([[[b, b]]]))
    pyramid = L1Loss().landscape(probe).scores[0, 0].double()
    density = LikelihoodZ0().landscape(probe).scores[0, 0].double()
    row, column = GRID.cells(doubles([203.0, 310.0])).tolist()
    away = torch.ones(24, 24, dtype=torch.bool)
    away[row] = away[:, column] = False
    difference = (pyramid - b * density)[away]
    assert difference.max() - difference.min() < 1e-3
    assert pyramid[away].std() > 50


# A temporal ensemble


def moving_plans(n_frames: int, n_samples=3, chunk_size=4):
    """Samples [frame sample chunk 2] that disagree from frame to frame."""
    generator = torch.Generator().manual_seed(1)
    shape = (n_frames, n_samples, chunk_size, 2)
    return 150 + 200 * torch.rand(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("coefficient", [0.01, -0.5])
def test_belief_is_the_density_of_all_chunks_that_reach_this_step(coefficient):
    n_frames, chunk_size = 7, 4
    samples = moving_plans(n_frames)
    # A scale for every frame, as the bandwidths of a policy without calibration.
    scale = torch.linspace(9, 30, n_frames * chunk_size * 2, dtype=torch.float64)
    scale = scale.reshape(n_frames, chunk_size, 2)
    horizons = (0, 2)
    probe = given(samples.mean(1), samples, scale=scale, horizons=horizons)
    found = Belief(coefficient).landscape(probe)
    for frame in range(n_frames):
        for place, horizon in enumerate(horizons):
            expected, total = torch.zeros(24, 24, dtype=torch.float64), 0.0
            reaching = [
                (made, frame + horizon - made)
                for made in range(frame + 1)
                if frame + horizon - made < chunk_size
            ]
            for order, (made, step) in enumerate(reaching):
                weight = math.exp(-coefficient * order)
                total += weight
                for sample in samples[made, :, step]:
                    kernel = Mixture(sample[None], scale[made, step][None])
                    expected += weight / 3 * kernel.cell_mass(GRID)
            torch.testing.assert_close(
                found.mass[frame, place].double(), expected / total, rtol=1e-5, atol=1e-9
            )


def test_mean_of_the_belief_is_what_the_ensemble_executes():
    n_frames, chunk_size = 7, 4
    chunks = moving_plans(n_frames, n_samples=1)
    scale = torch.full((1, chunk_size, 2), 8.0, dtype=torch.float64)
    grid = Grid(256)
    probe = given(chunks[:, 0], chunks, scale=scale, horizons=(0,), grid=grid)
    mass = Belief(0.3).mass(probe)[:, 0]
    ensembler = TemporalEnsembler(0.3, chunk_size)
    for frame in range(n_frames):
        executed = ensembler.step(chunks[frame])[0]
        mean = (mass[frame][..., None] * grid.centres()).sum((0, 1))
        torch.testing.assert_close(mean, executed, rtol=0, atol=0.05)
        if frame:  # the newest chunk alone is elsewhere
            assert (chunks[frame, 0, 0] - executed).norm() > 10


@pytest.mark.parametrize("broken", ["frame_index", "episode_index"])
def test_belief_refuses_frames_that_do_not_follow_each_other(broken):
    probe = given(moving_plans(3).mean(1))
    batch = replace(probe.batch, **{broken: torch.tensor([0, 1, 3])})
    if broken == "frame_index":
        batch = replace(batch, episode_index=torch.zeros(3, dtype=torch.long))
    else:
        batch = replace(batch, frame_index=torch.arange(3))
    with pytest.raises(ValueError, match="belief: an ensemble needs consecutive steps"):
        Belief().landscape(replace(probe, batch=batch))


# Two plans: to the left or to the right


STEPS = torch.arange(CHUNK, dtype=torch.float64)[:, None]
LEFT = doubles([256.0, 256.0]) + STEPS * doubles([-25.0, 0.0])
RIGHT = doubles([256.0, 256.0]) + STEPS * doubles([25.0, 0.0])


def two_plans(point=LEFT, expert=RIGHT, is_valid=None, horizons=(1, 4), n_samples=20) -> Probe:
    noise = torch.randn(
        1, n_samples, CHUNK, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    samples = torch.stack([LEFT, RIGHT])[torch.arange(n_samples) % 2] + 3 * noise
    scale = torch.full((1, CHUNK, 2), 6.0, dtype=torch.float64)
    valid = None if is_valid is None else is_valid[None]
    return given(
        point[None],
        samples,
        expert[None],
        valid,
        scale=scale,
        horizons=horizons,
        grid=Grid(64),
    )


def share_on_the_left(method: Method, probe: Probe) -> list[float]:
    mass = method.mass(probe)[0]
    return (mass[..., : probe.grid.resolution // 2].sum((-1, -2)) / mass.sum((-1, -2))).tolist()


@pytest.mark.parametrize("temperature", [1.0, 8.0])
def test_committing_keeps_the_plan_that_is_executed(temperature):
    prior = share_on_the_left(Likelihood(), two_plans())
    assert prior[1] == pytest.approx(0.5, abs=0.02)
    for plan, sign in ((LEFT, 1), (RIGHT, -1)):
        shares = share_on_the_left(Committed(temperature), two_plans(point=plan))
        for place in range(2):
            assert sign * (shares[place] - prior[place]) > 0.1
        assert abs(shares[1] - 0.5) > 0.49


def test_weights_of_a_commitment_are_those_of_bayes():
    """Against a sum over samples, at a temperature; the shown step does not count."""
    probe = two_plans(horizons=(2,), n_samples=5)
    evidence = torch.zeros(5, dtype=torch.float64)
    for step in range(CHUNK):
        if step != 2:
            kernels = Laplace(probe.predictions.samples[0, :, step], probe.scale[0, step])
            evidence += kernels.log_prob(LEFT[step]).sum(-1) / 30
    weights = torch.softmax(evidence, 0)
    expected = sum(
        weight * Mixture(sample[2][None], probe.scale[0, 2][None]).cell_mass(probe.grid)
        for weight, sample in zip(weights, probe.predictions.samples[0], strict=True)
    )
    found = Committed(temperature=30.0).mass(probe)[0, 0]
    torch.testing.assert_close(found, expected)
    assert weights.max() < 0.9  # a temperature that leaves more than one


def test_expert_mode_is_the_one_that_is_demonstrated():
    for plan, sign in ((LEFT, 1), (RIGHT, -1)):
        shares = share_on_the_left(ExpertMode(), two_plans(expert=plan))
        assert sign * (shares[1] - 0.5) > 0.45


def test_expert_mode_does_not_look_at_the_shown_step():
    elsewhere = RIGHT.clone()
    elsewhere[4] = LEFT[4]
    probe, changed = two_plans(), two_plans(expert=elsewhere)
    before, after = ExpertMode().mass(probe)[0], ExpertMode().mass(changed)[0]
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0], after[0])


def test_expert_mode_leaves_padding_out():
    is_valid = torch.arange(CHUNK) < 3
    padded = torch.where(is_valid[:, None], RIGHT, LEFT)
    probe = two_plans(expert=padded, is_valid=is_valid)
    first_steps = share_on_the_left(ExpertMode(), probe)
    assert first_steps[1] < 0.2  # three steps tell the mode, and the padding lies on the left
    other = two_plans(expert=torch.where(is_valid[:, None], RIGHT, 7.0), is_valid=is_valid)
    assert torch.equal(ExpertMode().mass(probe), ExpertMode().mass(other))
    nothing = two_plans(is_valid=is_valid & False)
    torch.testing.assert_close(ExpertMode().mass(nothing), Likelihood().mass(nothing))


# Reconstruction


def test_reconstruction_finds_what_the_latent_can_express():
    """f moves along x alone, as a candidate does: what is missing is the shift along y."""
    fade = 0.9 ** (STEPS[:, 0] - 2).abs()
    direction = torch.stack([60 * fade, torch.zeros(CHUNK, dtype=torch.float64)], dim=-1)
    policy = LinearACT(direction[None])
    batch = frames(3)
    probe = probe_of(policy, batch, (2,), grid=Grid(16))
    scores = Reconstruction(resolution=16).landscape(probe).scores[:, 0].double()
    assert batch.observation.state is not None
    along_y = Grid(16).centres()[:, 0, 1] - batch.observation.state[:, 1:].double()
    expected = -along_y.abs() * fade.mean() / 2
    torch.testing.assert_close(scores, expected[..., None].expand(3, 16, 16), rtol=1e-4, atol=1e-3)


def test_reconstruction_is_one_pass_through_the_whole_network():
    policy = tiny_act()
    batch = frames(2)
    probe = probe_of(policy, batch, (3,), grid=Grid(8))
    scores = Reconstruction(resolution=8, decay=0.8).landscape(probe).scores[:, 0]
    row, column = 6, 1
    with torch.no_grad():
        plan = policy.predict_chunk(batch.observation)
        chunk = plan.clone()
        offset = Grid(8).centres()[row, column] - plan[:, 3]
        for step in range(CHUNK):
            chunk[:, step] += offset * 0.8 ** abs(step - 3)
        posterior = policy.encode_posterior(
            replace(batch, actions=chunk.float(), action_is_pad=batch.action_is_pad & False)
        )
        tokens = policy.encode_observation(batch.observation)
        decoded = policy.network.decode(tokens, posterior.mean)
        decoded = policy.unnormalise_actions(decoded, batch.observation)
    expected = -(decoded - chunk).abs().mean((-1, -2))
    torch.testing.assert_close(scores[:, row, column].double(), expected, rtol=1e-5, atol=1e-3)


def test_fine_cells_show_the_candidate_that_covers_them():
    policy = tiny_act()
    probe = probe_of(policy, frames(2), (3,), grid=Grid(20))
    coarse = Reconstruction(resolution=8).landscape(replace(probe, grid=Grid(8))).scores
    fine = Reconstruction(resolution=8).landscape(probe).scores
    row, column = Grid(8).cells(Grid(20).centres()).unbind(-1)
    torch.testing.assert_close(fine, coarse[..., row, column], rtol=1e-5, atol=1e-4)
    # Never finer than the board.
    whole = Reconstruction(resolution=99).landscape(replace(probe, grid=Grid(8))).scores
    torch.testing.assert_close(whole, coarse, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_candidates_at_once_change_no_score(batch_size):
    probe = probe_of(tiny_act(), frames(2), grid=Grid(6))
    few, many = (
        Reconstruction(resolution=6, batch_size=size).landscape(probe).scores
        for size in (batch_size, 256)
    )
    torch.testing.assert_close(few, many, rtol=1e-6, atol=1e-5)


# All methods


@pytest.mark.parametrize("name", ACT_METHODS)
def test_brightest_cell_is_where_the_policy_goes(name):
    """To the lower left of the picture: small x, large y."""
    where = doubles([100.0, 400.0])
    policy = LinearACT(torch.zeros(1, CHUNK, 2))
    batch = frames(1)
    batch = replace(batch, observation=replace(batch.observation, state=where[None].float()))
    grid = Grid(33)
    found = build(name).landscape(probe_of(policy, batch, grid=grid))
    row, column = grid.cells(where).tolist()
    assert row > 22
    assert column < 11
    for scores in found.scores[0]:
        if name == "recon":  # one candidate covers several cells
            assert scores[row, column] == scores.max()
        else:
            assert divmod(int(scores.argmax()), 33) == (row, column)


@pytest.mark.parametrize("name", ACT_METHODS)
def test_result_says_what_it_is(name):
    probe = probe_of(tiny_act(), frames(3))
    found = build(name).landscape(probe)
    assert (found.method, found.queries, found.grid) == (name, HORIZONS, GRID)
    assert found.unit
    for tensor in (found.scores, found.mass, found.thresholds):
        assert tensor.dtype == torch.float32
        assert tensor.device.type == "cpu"
        assert tensor.isfinite().all()
        assert not tensor.requires_grad
    assert found.scores.shape == found.mass.shape == (3, 2, 24, 24)
    region = found.mass[:, :, None] >= found.thresholds[..., None, None]
    held = (found.mass[:, :, None] * region).sum((-1, -2)) / found.mass.sum((-1, -2))[..., None]
    assert found.levels == CREDIBLE_LEVELS
    assert (held >= torch.tensor(found.levels) - 1e-5).all()
    assert (held.diff(dim=-1) > 0).all()
    # One range for all frames, horizons and policies.
    other = build(name).landscape(probe_of(LinearACT(torch.ones(1, CHUNK, 2)), frames(2, seed=9)))
    assert found.value_range == other.value_range
    assert found.value_range[0] < found.value_range[1]


@pytest.mark.parametrize("name", ACT_METHODS)
def test_frames_are_scored_each_by_itself(name):
    """Belief alone looks back, never ahead."""
    probe = probe_of(tiny_act(), frames(4))
    together = build(name).landscape(probe)

    def of(rows) -> Landscape:
        return build(name).landscape(
            replace(probe, batch=probe.batch.rows(rows), predictions=probe.predictions.rows(rows))
        )

    def assert_same(found: Landscape, rows):
        for field in ("scores", "mass", "thresholds"):
            torch.testing.assert_close(
                getattr(found, field), getattr(together, field)[rows], rtol=1e-5, atol=1e-5
            )

    if name == "belief":
        assert_same(of(slice(0, 2)), slice(0, 2))
        return
    order = torch.tensor([2, 0, 3, 1])
    assert_same(of(order), order)
    for frame in range(4):
        assert_same(of(slice(frame, frame + 1)), slice(frame, frame + 1))


@pytest.mark.parametrize("name", ACT_METHODS)
def test_scoring_leaves_no_trace_on_the_policy(name):
    policy = tiny_act()
    probe = probe_of(policy, frames(2))
    before = {key: value.clone() for key, value in policy.state_dict().items()}
    random_state = torch.get_rng_state()
    samples = probe.predictions.samples.clone()
    build(name).landscape(probe)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(module.training for module in policy.modules())
    assert torch.equal(probe.predictions.samples, samples)
    for key, value in policy.state_dict().items():
        assert torch.equal(value, before[key]), key


# Refusals


def test_methods_refuse_policies_that_they_cannot_score():
    toy, blind = ToyPolicy([[0.0, 0.0]]), tiny_act(use_latent=False)
    for name, view, message in (
        ("likelihood_z0", toy, "likelihood_z0: needs ACT's latent, the policy is ToyPolicy"),
        ("recon", toy, "recon: needs ACT's latent, the policy is ToyPolicy; choose likelihood"),
        ("recon", blind, "recon: this ACT was trained without a latent; choose likelihood"),
        ("noise_pred", toy, "noise_pred: the policy is ToyPolicy and predicts no noise"),
        ("noise_pred", blind, "noise_pred: the policy is ACT and predicts no noise"),
    ):
        with pytest.raises(ValueError, match=f"scoring_method {message}"):
            METHODS[name]().check(view)
    for name in ACT_METHODS:
        METHODS[name]().check(tiny_act())
    METHODS["likelihood_z0"]().check(blind)


@pytest.mark.parametrize("name", METHODS)
def test_a_board_is_for_two_dimensions(name):
    class Arm(ToyPolicy):
        data_schema = DataSchema(cameras={}, state_dim=7, action_dim=7)

    with pytest.raises(ValueError, match=f"{name}: a board has 2 dimensions.* have 7"):
        METHODS[name]().check(Arm([[0.0, 0.0]]))


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name]().needs_whole_chunk])
def test_methods_that_need_the_whole_chunk_say_so(name):
    """With some of the steps, the others would be taken for them."""
    probe = probe_of(tiny_act(), frames(2))
    partial = replace(
        probe, predictions=probe.predictions.at(HORIZONS), scale=probe.scale[:, list(HORIZONS)]
    )
    with pytest.raises(ValueError, match=rf"{name}: needs predictions of all {CHUNK}.*\[0, 3\]"):
        build(name).landscape(partial)


def test_horizons_must_have_been_predicted():
    probe = probe_of(tiny_act(), frames(2), horizons=(0, CHUNK))
    with pytest.raises(ValueError, match=rf"horizons \[{CHUNK}\]: not among the predicted"):
        Likelihood().landscape(probe)


def test_a_policy_without_a_latent_has_one_kernel():
    policy = tiny_act(use_latent=False)
    batch = frames(3, n_padded=2)
    calibration = predict(policy, batch, HORIZONS, 6)
    scale = kernel_scale(policy, calibration, calibration)
    assert (scale > MIN_SCALE).all()
    probe = Probe(policy, batch, calibration, scale, HORIZONS, GRID)
    both = [method.landscape(probe) for method in (Likelihood(), LikelihoodZ0())]
    torch.testing.assert_close(both[0].scores, both[1].scores)
    valid = calibration.is_valid
    residual = (calibration.expert - calibration.point).abs()
    expected = torch.stack([residual[valid[:, q], q].mean(0) for q in range(2)])
    torch.testing.assert_close(scale[0], expected.clamp_min(MIN_SCALE))
