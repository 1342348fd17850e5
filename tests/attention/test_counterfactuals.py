"""Effects of planted policies, whose action is a known function of the picture."""

from dataclasses import replace

import pytest
import torch
from einops import reduce, repeat
from torch import Tensor

from attention.counterfactuals import (
    CounterfactualEffects,
    PoseMove,
    SceneVariants,
    measure_counterfactuals,
)
from policies.act import ACTPolicy
from policies.interface import DataSchema, Observation
from policies.normalisation import AffineFeature

SIZE = 32
RED, GREEN, BLUE = range(3)
N_FRAMES = 5


class Planted:
    """Two action dimensions: the sums of gains[c] times the share of the picture of colour c.

    Args:
        gains: [3, 2], per colour and action dimension.
        state_gain: How much of the state is added.
        per_query: Added times the chunk step, as a factor of everything that is seen.
    """

    data_schema = DataSchema(cameras={"image": (SIZE, SIZE)}, state_dim=2, action_dim=2)
    chunk_size = n_action_steps = 4

    def __init__(self, gains, state_gain: float = 0.0, per_query: float = 0.0):
        self.gains = torch.tensor(gains, dtype=torch.float64)
        self.state_gain = state_gain
        self.per_query = per_query
        self.n_obs_steps = 1
        self.calls: list[int] = []

    def predict_chunk(self, observation, queries=None):
        self.calls.append(len(observation.images["image"]))
        share = reduce(observation.images["image"].double() / 255, "b rgb h w -> b rgb", "mean")
        seen = share @ self.gains
        queries = torch.tensor(list(range(self.chunk_size) if queries is None else queries))
        factor = 1 + self.per_query * queries.double()
        return (
            repeat(seen, "b action -> b query action", query=len(queries)) * factor[:, None]
            + self.state_gain * observation.state.double()[:, None]
        )


def tiny_act() -> ACTPolicy:
    """Untrained, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = ACTPolicy(
            cameras={"image": [SIZE, SIZE]},
            state_dim=2,
            action_dim=2,
            chunk_size=4,
            dim_model=16,
            n_heads=2,
            dim_feedforward=16,
            n_encoder_layers=1,
            n_posterior_layers=1,
            backbone="small_cnn",
            token_stride=16,
        )
    for feature in policy.normaliser.modules():
        if isinstance(feature, AffineFeature):
            feature.set(torch.full_like(feature.offset, 0.5), torch.full_like(feature.scale, 0.25))
    return policy.double().eval()


def picture(areas: dict[int, int]) -> Tensor:
    """Rows of pure colours: as many as ``areas`` says of each."""
    image = torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
    row = 0
    for colour, n_rows in areas.items():
        image[colour, row : row + n_rows] = 255
        row += n_rows
    return image


def observed(areas: dict[int, int]) -> Observation:
    return Observation(
        images={"image": repeat(picture(areas), "rgb h w -> b rgb h w", b=N_FRAMES)},
        state=torch.arange(2.0 * N_FRAMES).reshape(N_FRAMES, 2),
    )


FULL = {RED: 8, GREEN: 4, BLUE: 2}


@pytest.fixture
def variants() -> SceneVariants:
    """8 rows of red, 4 of green and 2 of blue; a move of red by 4 px adds or takes one row."""
    return SceneVariants(
        as_is=observed(FULL),
        without={
            name: observed({**FULL, colour: 0})
            for name, colour in (("red", RED), ("green", GREEN), ("blue", BLUE))
        },
        moves=(
            PoseMove("red_x", "px", "red", 4.0, observed({**FULL, RED: 9}), observed({RED: 7})),
            PoseMove("turn", "deg", "red", 5.0, observed(FULL), observed(FULL)),
        ),
        masks={},
    )


def test_effects_are_the_gains_times_what_is_gone(variants):
    # One row of a colour weighs 1/32: of the gains 3.2 and -6.4 that is 0.1 and -0.2.
    effects = measure_counterfactuals(Planted([[3.2, -6.4], [6.4, 0.0], [0.0, 0.0]]), variants)
    for name, expected in (("red", 8 * 0.3), ("green", 4 * 0.2), ("blue", 0.0)):
        torch.testing.assert_close(
            effects.effect_px[name], torch.full((N_FRAMES,), expected, dtype=torch.float64)
        )
    torch.testing.assert_close(effects.shares[0], torch.tensor([0.75, 0.25, 0.0]).double())
    assert list(effects.effect_px) == list(variants.without)


def test_sensitivity_is_the_change_per_unit_of_the_move(variants):
    effects = measure_counterfactuals(Planted([[3.2, -6.4], [0.0, 0.0], [0.0, 0.0]]), variants)
    # Two rows between plus and minus, 0.3 each, over 8 px.
    torch.testing.assert_close(
        effects.sensitivity["red_x"], torch.full((N_FRAMES,), 0.6 / 8, dtype=torch.float64)
    )
    assert (effects.sensitivity["turn"] == 0).all()


def test_a_policy_that_looks_at_one_object_gives_it_the_whole_share(variants):
    effects = measure_counterfactuals(
        Planted([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]], state_gain=3.0), variants
    )
    torch.testing.assert_close(
        effects.shares, torch.tensor([[0.0, 0.0, 1.0]]).double().expand(N_FRAMES, 3)
    )


def test_a_policy_that_looks_at_nothing_has_equal_shares_and_no_effect(variants):
    effects = measure_counterfactuals(Planted([[0.0, 0.0]] * 3, state_gain=1.0), variants)
    assert all((effect == 0).all() for effect in effects.effect_px.values())
    torch.testing.assert_close(effects.shares, torch.full((N_FRAMES, 3), 1 / 3).double())


def test_what_is_no_number_is_not_passed_off_as_a_share(variants):
    effects = measure_counterfactuals(Planted([[torch.nan, 0.0]] * 3), variants)
    assert effects.shares.isnan().all()


def test_queries_are_averaged(variants):
    policy = Planted([[3.2, 0.0], [0.0, 0.0], [0.0, 0.0]], per_query=1.0)
    one, both = (measure_counterfactuals(policy, variants, queries) for queries in ((1,), (1, 3)))
    torch.testing.assert_close(both.effect_px["red"], one.effect_px["red"] * 6 / 4)
    torch.testing.assert_close(both.sensitivity["red_x"], one.sensitivity["red_x"] * 6 / 4)


def test_every_variant_costs_one_pass_and_no_batch_is_longer_than_allowed(variants):
    policy = Planted([[1.0, 0.0]] * 3)
    measure_counterfactuals(policy, variants, batch_size=N_FRAMES)
    assert policy.calls == [N_FRAMES] * (1 + 3 + 2 * 2)
    policy.calls.clear()
    measure_counterfactuals(policy, variants, batch_size=2)
    assert policy.calls == [2, 2, 1] * (1 + 3 + 2 * 2)


def test_a_network_answers_the_same_in_pieces_and_needs_no_gradient(variants):
    generator = torch.Generator().manual_seed(0)

    def noisy(observation: Observation) -> Observation:
        noise = torch.randint(
            256, (N_FRAMES, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator
        )
        return replace(observation, images={"image": noise})

    variants = replace(
        variants,
        as_is=noisy(variants.as_is),
        without={name: noisy(each) for name, each in variants.without.items()},
    )
    whole, pieces = (
        measure_counterfactuals(tiny_act(), variants, (0, 2), n, recorded=variants.without["red"])
        for n in (64, 2)
    )
    assert isinstance(whole, CounterfactualEffects)
    assert whole.shares.std() > 0.01
    assert not whole.shares.requires_grad
    torch.testing.assert_close(pieces.shares, whole.shares)
    torch.testing.assert_close(pieces.sensitivity, whole.sensitivity)
    # What was "recorded" here is the picture without red.
    torch.testing.assert_close(pieces.rerender_px, whole.effect_px["red"])


def test_faithful_pictures_leave_the_action_as_it_was(variants):
    policy = Planted([[1.0, 2.0]] * 3)
    assert measure_counterfactuals(policy, variants).rerender_px is None
    same = measure_counterfactuals(policy, variants, recorded=variants.as_is).rerender_px
    assert same is not None
    assert (same == 0).all()


def test_what_cannot_be_measured_is_refused(variants):
    policy = Planted([[1.0, 0.0]] * 3)
    for queries in ((), (4,), (-1,)):
        with pytest.raises(ValueError, match=r"give steps in 0\.\.3"):
            measure_counterfactuals(policy, variants, queries)
    with pytest.raises(ValueError, match="3 instants, and 5"):
        measure_counterfactuals(policy, variants, recorded=variants.as_is.rows(slice(3)))
    with pytest.raises(ValueError, match="0 objects"):
        measure_counterfactuals(policy, replace(variants, without={}))
    with pytest.raises(ValueError, match="0 pictures"):
        measure_counterfactuals(policy, replace(variants, as_is=Observation(images={})))
    policy.n_obs_steps = 2
    with pytest.raises(ValueError, match="sees 2 steps at once"):
        measure_counterfactuals(policy, variants)
