"""Maps whose worth is known on paper: of policies that look at one patch, on planted objects."""

import itertools
from collections.abc import Mapping
from dataclasses import replace

import pandas as pd
import pytest
import torch
from einops import reduce, repeat
from torch import Tensor

from attention.attribution import Attribution
from attention.baseline import baseline_pictures
from attention.counterfactuals import CounterfactualEffects
from attention.faithfulness import (
    Faithfulness,
    counterfactual_agreement,
    deletion_insertion,
    map_ssim,
    object_scores,
    patch_agreement,
    patch_densities,
    patch_grid,
    randomised,
    spearman,
)
from attention.maps import CrossAttention
from attention.method import Target
from policies.act import ACTPolicy
from policies.interface import DataSchema, Observation
from policies.normalisation import AffineFeature

SIZES = {"top": (24, 24), "wrist": (12, 30)}
"""With four patches along the shorter side: 4 x 4 of 6 px, and 4 x 10 of 3 px."""
N_ALONG = 4
N_PATCHES = 16 + 40
PX = (2.0, -1.0)
"""What both action dimensions gain from one unit of light, at chunk step 0."""


class LightMeter:
    """``a_k = (1 + k) PX`` times the light on some pixels, as a share of full white on them.

    Args:
        weights: Camera name to [height, width], adding up to 1 over all cameras.
        n_obs_steps: A history is averaged.
    """

    chunk_size = n_action_steps = 3

    def __init__(self, weights: Mapping[str, Tensor], n_obs_steps: int = 1):
        self.weights = weights
        self.n_obs_steps = n_obs_steps
        self.data_schema = DataSchema(
            {name: (len(each), each.shape[1]) for name, each in weights.items()}, 0, len(PX)
        )
        self.batch_sizes: list[int] = []

    def predict_chunk(self, observation, queries=None):
        light = torch.zeros(())
        for name, weight in self.weights.items():
            image = observation.images[name]
            unit = image.double() / 255 if image.dtype == torch.uint8 else image.double()
            grey = reduce(unit, "b ... rgb h w -> b h w", "mean")
            light = light + (grey * weight).sum((-1, -2))
        self.batch_sizes.append(len(light))
        steps = 1 + torch.tensor(list(range(self.chunk_size) if queries is None else queries))
        return light[:, None, None] * steps[:, None] * torch.tensor(PX).double()


def small_act(token_stride: int = 16) -> ACTPolicy:
    """Untrained, for one camera of 32 x 32 px and a state."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = ACTPolicy(
            cameras={"image": [32, 32]},
            state_dim=2,
            action_dim=2,
            chunk_size=3,
            dim_model=16,
            n_heads=2,
            dim_feedforward=16,
            n_encoder_layers=1,
            n_posterior_layers=1,
            backbone="small_cnn",
            token_stride=token_stride,
        )
    for feature in policy.normaliser.modules():
        if isinstance(feature, AffineFeature):
            dim = len(feature.offset)
            feature.set(torch.linspace(0.4, 0.6, dim), torch.linspace(0.2, 0.3, dim))
    return policy.eval()


def noisy(n_frames: int) -> Observation:
    """What :func:`small_act` may see."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (n_frames, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return Observation({"image": noise}, state=torch.rand(n_frames, 2, generator=generator))


def white(n_frames: int, sizes=SIZES, history: tuple[int, ...] = ()) -> Observation:
    return Observation(
        images={
            name: torch.full((n_frames, *history, 3, *size), 255, dtype=torch.uint8)
            for name, size in sizes.items()
        }
    )


def mapped(maps: Mapping[str, Tensor], sizes=SIZES, cells_px=None) -> Attribution:
    return Attribution(
        method="planted",
        queries=(0,),
        maps=maps,
        cells_px=cells_px or {name: sizes[name][0] / maps[name].shape[1] for name in maps},
        image_sizes={name: sizes[name] for name in maps},
        vectors={},
        dimensions={},
    )


def on_one_patch(n_frames: int, value: float = 1.0, other: float = 0.0) -> Attribution:
    """Relevance of the patch that :func:`one_patch_meter` looks at, and of all others."""
    maps = {
        "top": torch.full((n_frames, 4, 4), float(other)),
        "wrist": torch.full((n_frames, 4, 10), float(other)),
    }
    maps["wrist"][:, 2, 7] = value
    return mapped(maps)


def one_patch_meter(n_obs_steps: int = 1) -> LightMeter:
    weights = {name: torch.zeros(size) for name, size in SIZES.items()}
    weights["wrist"][6:9, 21:24] = 1 / 9
    return LightMeter(weights, n_obs_steps)


def measured(attributions, n_frames=1, view=None, target=Target(), observation=None, **settings):  # noqa: B008
    return deletion_insertion(
        view or one_patch_meter(),
        white(n_frames) if observation is None else observation,
        attributions,
        target,
        **{"baseline": "black", "n_along": N_ALONG, **settings},
    )


# Deletion and insertion


def test_a_map_that_knows_the_patch_has_the_best_areas():
    curves = measured({"oracle": on_one_patch(1)}, n_steps=20)["oracle"]
    # The change, |2| + |-1| px, is complete after the first step, and gone after it.
    first = round(N_PATCHES / 20) / N_PATCHES
    assert curves.fractions[[0, 1, -1]].tolist() == pytest.approx([0, first, 1])
    assert curves.deletion_auc_px.item() == pytest.approx(3 * (1 - first / 2))
    assert curves.insertion_auc_px.item() == pytest.approx(3 * first / 2)


def test_chance_is_half_the_change_and_better_and_worse_maps_lie_on_either_side():
    n = 48
    curves = measured({"oracle": on_one_patch(n), "reversed": on_one_patch(n, 0, 1)}, n)
    # A random order meets the patch anywhere: on average halfway.
    assert curves["oracle"].random_auc_px.mean().item() == pytest.approx(1.5, rel=0.1)
    assert curves["oracle"].deletion_ratio == pytest.approx(2, rel=0.15)
    assert curves["oracle"].insertion_ratio > 15
    assert curves["reversed"].deletion_ratio < 0.1
    assert curves["reversed"].insertion_ratio == pytest.approx(0.5, rel=0.15)
    assert torch.equal(curves["oracle"].random_px, curves["reversed"].random_px)


def test_a_map_that_prefers_nothing_is_chance():
    n = 64
    flat = on_one_patch(n, 1, 1)
    curves = measured({"flat": flat}, n, n_random=1)["flat"]
    torch.testing.assert_close(curves.deletion_px, curves.random_px)
    many = measured({"flat": flat}, n, n_random=8)["flat"]
    assert many.deletion_ratio == pytest.approx(1, abs=0.2)
    assert many.insertion_ratio == pytest.approx(1, abs=0.2)


def test_no_order_does_better_than_that_of_the_effects():
    sizes = {"image": (8, 12)}
    effects = torch.tensor([0.1, 0.3, 0.05, 0.25, 0.2, 0.1])
    weights = repeat(effects.view(2, 3) / 16, "row column -> (row 4) (column 4)")
    curves = measured(
        {"effects": mapped({"image": effects.view(1, 2, 3)}, sizes)},
        view=LightMeter({"image": weights}),
        observation=white(1, sizes),
        n_along=2,
        n_steps=6,
    )["effects"]
    # Areas under the curves of all 720 orders, from the effects alone.
    orders = torch.tensor(list(itertools.permutations(range(6))))
    gone = torch.nn.functional.pad(3 * effects.double()[orders].cumsum(-1), (1, 0))
    areas = torch.trapezoid(gone, dx=1 / 6)
    assert curves.deletion_auc_px.item() == pytest.approx(areas.max().item(), abs=1e-6)
    assert curves.insertion_auc_px.item() == pytest.approx(areas.min().item(), abs=1e-6)


def test_only_the_target_is_watched():
    oracle = {"oracle": on_one_patch(1)}
    whole = measured(oracle)["oracle"].deletion_auc_px.item()
    one = measured(oracle, target=Target((0,), (1,)))["oracle"].deletion_auc_px.item()
    later = measured(oracle, target=Target((0, 2)))["oracle"].deletion_auc_px.item()
    assert one == pytest.approx(whole / 3)
    assert later == pytest.approx(whole * (1 + 3) / 2)


def test_frames_are_judged_one_by_one_whatever_goes_through_together():
    n = 5
    maps = {name: torch.rand(n, *patches) for name, patches in patch_grid(SIZES, 4).items()}
    bright = Observation(
        {name: torch.rand(n, 3, *size, dtype=torch.float64) for name, size in SIZES.items()}
    )
    given = {"random": mapped(maps)}
    view = one_patch_meter()
    whole, pieces = (
        measured(given, view=view, observation=bright, batch_size=size)["random"] for size in (8, 2)
    )
    for name in ("deletion_px", "insertion_px", "random_px"):
        torch.testing.assert_close(getattr(whole, name), getattr(pieces, name))
    assert set(view.batch_sizes) == {5, 2, 1}
    last = measured(
        {"random": given["random"].rows(slice(4, 5))}, observation=bright.rows(slice(4, 5))
    )["random"]
    torch.testing.assert_close(last.deletion_px, whole.rows(slice(4, 5)).deletion_px)


def test_a_patch_is_taken_out_of_the_whole_history():
    now, history = (
        measured({"oracle": on_one_patch(2)}, 2, one_patch_meter(len(past) or 1), observation=seen)
        for past in ((), (3,))
        for seen in [white(2, history=past)]
    )
    torch.testing.assert_close(history["oracle"].deletion_px, now["oracle"].deletion_px)
    torch.testing.assert_close(history["oracle"].random_px, now["oracle"].random_px)


def test_patches_of_a_size_that_does_not_divide_hold_their_pixels_once():
    sizes = {"image": (10, 15)}
    grid = patch_grid(sizes, 4)
    assert grid == {"image": (4, 6)}
    uniform = mapped({"image": torch.ones(1, *sizes["image"])}, sizes, {"image": 1.0})
    everywhere = LightMeter({"image": torch.full(sizes["image"], 1 / 150)})
    curves = measured({"u": uniform}, view=everywhere, observation=white(1, sizes), n_along=4)["u"]
    # What is gone is what is not there: deletion and insertion in one order add up to all.
    torch.testing.assert_close(
        curves.deletion_px + curves.insertion_px, torch.full_like(curves.deletion_px, 3)
    )
    assert (curves.deletion_px.diff() > 0).all()


def test_a_policy_that_sees_nothing_has_no_ratio():
    blind = LightMeter({name: torch.zeros(size) for name, size in SIZES.items()})
    curves = measured({"oracle": on_one_patch(1)}, view=blind)["oracle"]
    scalars = Faithfulness("planted", curves).scalars()
    assert scalars == {"deletion_auc_px": 0, "insertion_auc_px": 0, "random_auc_px": 0}


def test_a_network_is_judged_on_its_own_pictures():
    policy, observation = small_act(), noisy(3)
    attribution = CrossAttention().attribute(policy, observation, Target())
    before = policy.predict_chunk(observation, (0,))
    curves = deletion_insertion(policy, observation, {"x": attribution}, Target(), n_along=4)["x"]
    assert (curves.deletion_px[:, 1:] > 0).all()
    assert (curves.deletion_px[:, 0] == 0).all()
    torch.testing.assert_close(curves.deletion_px[:, -1], curves.insertion_px[:, 0])
    torch.testing.assert_close(policy.predict_chunk(observation, (0,)), before)
    assert not curves.deletion_px.requires_grad


def test_what_does_not_belong_together_is_refused():
    oracle = on_one_patch(2)
    with pytest.raises(ValueError, match="oracle: 2 frames of"):
        measured({"oracle": oracle}, n_frames=3)
    other = replace(oracle, image_sizes={"top": (24, 24), "wrist": (12, 31)})
    with pytest.raises(ValueError, match="give maps of the same frames"):
        measured({"oracle": other}, n_frames=2)
    with pytest.raises(ValueError, match="n_random 0"):
        measured({"oracle": oracle}, n_frames=2, n_random=0)
    with pytest.raises(ValueError, match="queries"):
        measured({"oracle": oracle}, n_frames=2, target=Target((3,)))
    with pytest.raises(ValueError, match="n_along 0"):
        patch_grid(SIZES, 0)
    with pytest.raises(ValueError, match="0 frames"):
        measured({}, n_frames=0)


# Baseline


def test_the_mean_is_the_normalisers_where_that_is_the_datas():
    policy = small_act()
    policy.normaliser.image("image").set(torch.tensor([0.2, 0.4, 0.6]), torch.full((3,), 0.3))
    observation = noisy(2)
    picture = baseline_pictures(policy, observation, "mean")["image"]
    assert picture.dtype == torch.uint8
    assert picture.shape == observation.images["image"].shape
    assert picture[1, :, 5, 7].tolist() == [51, 102, 153]
    assert (picture == picture[:1, :, :1, :1]).all()


@pytest.mark.parametrize(
    ("offset", "scale"),
    [((0.485, 0.456, 0.406), 0.225), ((0.0, 0.0, 0.0), 1.0), ((0.5, 0.5, 0.5), 0.5)],
    ids=["imagenet", "unscaled", "range"],
)
def test_scales_that_hold_no_mean_leave_it_to_the_frames(offset, scale):
    policy, observation = small_act(), noisy(2)
    policy.normaliser.image("image").set(torch.tensor(offset), torch.full((3,), scale))
    picture = baseline_pictures(policy, observation, "mean")["image"]
    mean = reduce(observation.images["image"].double(), "b rgb h w -> b rgb", "mean")
    torch.testing.assert_close(picture[:, :, 0, 0].double(), mean, atol=0.51, rtol=0)


def test_other_views_get_the_frames_mean_in_their_type_and_history():
    light = torch.rand(3, 2, 3, 12, 30, dtype=torch.float64)
    observation = Observation({"top": torch.ones(3, 2, 3, 24, 24), "wrist": light})
    pictures = baseline_pictures(one_patch_meter(2), observation, "mean")
    assert pictures["wrist"].shape == light.shape
    assert pictures["wrist"].dtype == light.dtype
    # Each frame has its own: what stands beside it in a batch changes nothing.
    torch.testing.assert_close(pictures["wrist"].mean((1, 3, 4)), light.mean((1, 3, 4)))
    alone = baseline_pictures(one_patch_meter(2), observation.rows(slice(1, 2)), "mean")
    torch.testing.assert_close(alone["wrist"], pictures["wrist"][1:2])
    assert (pictures["top"] == 1).all()
    black = baseline_pictures(one_patch_meter(2), observation, "black")
    assert (black["top"] == 0).all()
    with pytest.raises(ValueError, match="camera 'wrist' is missing"):
        baseline_pictures(one_patch_meter(), Observation({"top": light}), "mean")


# Rank correlation


def test_spearman_on_paper():
    one = torch.tensor([[1.0, 2, 3, 4, 5], [1, 2, 3, 4, 5], [1, 2, 2, 3, 9], [1, 1, 1, 1, 1]])
    other = torch.tensor([[2.0, 4, 6, 8, 99], [5, 4, 3, 2, 1], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]])
    # With ties: ranks -2, -0.5, -0.5, 1, 2 about their mean, against -2 to 2.
    tied = (4 + 0.5 + 0 + 1 + 4) / (9.5 * 10) ** 0.5
    expected = torch.tensor([1.0, -1.0, tied, torch.nan]).double()
    torch.testing.assert_close(spearman(one, other), expected, equal_nan=True)
    # 1 - 6 sum d^2 / (n (n^2 - 1)), without ties.
    mixed = spearman(torch.tensor([[3.0, 1, 4, 2]]), torch.tensor([[1.0, 2, 3, 4]]))
    assert mixed.item() == pytest.approx(1 - 6 * (4 + 1 + 1 + 4) / 60)


def test_spearman_is_that_of_pandas_with_many_ties():
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randint(6, (2, 8, 40), generator=generator).double()
    other = other + one
    expected = [
        pd.DataFrame({"a": a, "b": b}).corr("spearman").loc["a", "b"]
        for a, b in zip(one.numpy(), other.numpy(), strict=True)
    ]
    torch.testing.assert_close(spearman(one, other), torch.tensor(expected).double())


def test_a_map_agrees_with_itself_on_finer_cells_and_not_with_one_that_prefers_nothing():
    coarse = {name: torch.rand(3, 2, columns) for name, columns in (("top", 2), ("wrist", 5))}
    one = mapped(coarse)
    # Of twice as many cells each has a quarter of the relevance.
    fine = mapped(
        {n: repeat(m / 4, "b r c -> b (r 2) (c 2)") for n, m in coarse.items()},
        cells_px={"top": 6.0, "wrist": 3.0},
    )
    torch.testing.assert_close(patch_agreement(one, fine, 4), torch.ones(3).double())
    assert (patch_agreement(one, mapped({n: -m + 1 for n, m in coarse.items()}), 4) < 0).all()
    area = {"top": torch.full((3, 4, 4), 1.0), "wrist": torch.full((3, 4, 10), 1.0)}
    assert patch_agreement(one, mapped(area), 4).isnan().all()
    with pytest.raises(ValueError, match="same frames"):
        patch_agreement(one, fine.rows(slice(2)))


def test_patches_of_all_cameras_share_one_mass():
    densities = patch_densities(on_one_patch(2), patch_grid(SIZES, 4))
    assert densities.shape == (2, N_PATCHES)
    assert densities[:, 16 + 2 * 10 + 7].tolist() == [1, 1]


# Objects


def rectangle(rows: slice, columns: slice, n_frames: int = 1, size=(24, 24)) -> Tensor:
    mask = torch.zeros(n_frames, *size, dtype=torch.bool)
    mask[:, rows, columns] = True
    return mask


def test_a_map_that_prefers_nothing_has_lift_one_and_points_by_chance():
    mask = rectangle(slice(3, 9), slice(0, 12))
    scores = object_scores(on_one_patch(1, 1, 1), {"block": mask})["block"]
    assert scores.area_share.item() == pytest.approx(72 / 576)
    assert scores.lift.item() == pytest.approx(1)
    # Of 16 centres, at 3, 9, 15, 21 px, two lie in the mask.
    assert scores.pointing.item() == pytest.approx(2 / 16)
    nothing = object_scores(on_one_patch(1, 0, 0), {"block": mask})["block"]
    assert nothing.lift.item() == pytest.approx(1)


def test_the_ceiling_is_the_lift_of_the_best_map_on_these_cells():
    mask = rectangle(slice(4, 12), slice(6, 14), n_frames=64)
    maps = torch.rand(64, 4, 4)
    maps[0] = 0
    maps[0, 1, 1] = 1
    scores = object_scores(mapped({"top": maps}), {"block": mask})["block"]
    # All of cell (1, 1) is covered: lift is one over the area share.
    assert scores.lift_ceiling[0].item() == pytest.approx(576 / 64)
    assert scores.lift[0].item() == pytest.approx(576 / 64)
    assert (scores.lift[1:] < scores.lift_ceiling[1:]).all()
    coarse = object_scores(mapped({"top": torch.rand(64, 1, 1)}), {"block": mask})["block"]
    torch.testing.assert_close(coarse.lift_ceiling, torch.ones(64).double())


def test_mass_is_that_of_pixels_also_where_cells_overhang():
    sizes = {"image": (70, 100)}
    attribution = mapped({"image": torch.rand(4, 3, 4)}, sizes, {"image": 32.0})
    mask = torch.rand(4, 70, 100) > 0.6
    mass = (attribution.densities()["image"] * mask).sum((-1, -2))
    scores = object_scores(attribution, {"object": mask})["object"]
    torch.testing.assert_close(scores.mass, mass.double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("cell", "hit"), [((2, 3), 1.0), ((2, 2), 0.0), ((0, 3), 0.0)])
def test_the_centre_of_the_top_cell_points(cell, hit):
    sizes = {"image": (70, 100)}
    maps = torch.rand(1, 3, 4)
    maps[0, *cell] = 2
    # Of cell (2, 3) rows 64 to 70 and columns 96 to 100 lie in the picture.
    mask = rectangle(slice(67, 68), slice(98, 99), size=(70, 100))
    attribution = mapped({"image": maps}, sizes, {"image": 32.0})
    assert object_scores(attribution, {"object": mask})["object"].pointing.item() == hit


def test_what_is_not_shown_has_no_score_and_other_cameras_do_not_count():
    mask = rectangle(slice(0, 6), slice(0, 6), n_frames=2)
    mask[1] = False
    maps = {"top": torch.rand(2, 4, 4), "wrist": torch.rand(2, 4, 10)}
    scores = object_scores(mapped(maps), {"agent": mask})["agent"]
    for values in (scores.mass, scores.lift, scores.lift_ceiling, scores.pointing):
        assert values.isfinite().tolist() == [True, False]
    alone = object_scores(mapped({"top": maps["top"]}), {"agent": mask})["agent"]
    torch.testing.assert_close(alone.mass, scores.mass, equal_nan=True)
    wrist = {"agent": rectangle(slice(2), slice(2), 2, SIZES["wrist"])}
    assert object_scores(mapped(maps), wrist, "wrist")["agent"].mass.isfinite().all()
    with pytest.raises(ValueError, match="mask of agent: shape"):
        object_scores(mapped(maps), wrist)
    with pytest.raises(ValueError, match="camera 'side'"):
        object_scores(mapped(maps), wrist, "side")


# Counterfactuals


def effects_of(shares: Tensor, names=("agent", "block")) -> CounterfactualEffects:
    return CounterfactualEffects(
        effect_px=dict(zip(names, shares.unbind(-1), strict=True)),
        shares=shares,
        sensitivity={},
        rerender_px=None,
    )


def test_mass_in_the_proportions_of_the_effects_agrees():
    shares = torch.tensor([[0.8, 0.2], [0.3, 0.7], [1.0, 0.0]]).double()
    maps = torch.zeros(3, 4, 4, dtype=torch.float64)
    # As much again lies elsewhere, which is no object's.
    maps[:, 0, 0], maps[:, 3, 3], maps[:, 1, 1] = shares[:, 0], shares[:, 1], 1
    masks = {
        "goal": rectangle(slice(12), slice(12), 3),
        "agent": rectangle(slice(6), slice(6), 3),
        "block": rectangle(slice(18, 24), slice(18, 24), 3),
    }
    found = counterfactual_agreement(mapped({"top": maps}), masks, effects_of(shares))
    torch.testing.assert_close(found.map_shares, shares)
    torch.testing.assert_close(found.total_variation, torch.zeros(3).double())
    assert found.spearman == pytest.approx(1)
    opposite = counterfactual_agreement(
        mapped({"top": maps}), masks, effects_of(shares, ("block", "agent"))
    )
    torch.testing.assert_close(opposite.total_variation, torch.tensor([0.6, 0.4, 1.0]).double())
    assert opposite.spearman < -0.9


def test_overlapping_masks_share_what_lies_on_both():
    maps = torch.zeros(2, 4, 4)
    maps[0, 0, :2], maps[1, 3, 3] = 1, 1
    masks = {
        "agent": rectangle(slice(6), slice(6), 2),
        "block": rectangle(slice(6), slice(12), 2),
    }
    shares = torch.tensor([[0.1, 0.9], [0.5, 0.5]]).double()
    found = counterfactual_agreement(mapped({"top": maps}), masks, effects_of(shares))
    # Half of the cell on both is the agent's; the other cell is the block's alone.
    torch.testing.assert_close(found.map_shares[0], torch.tensor([0.25, 0.75]).double())
    assert found.total_variation[0].item() == pytest.approx(0.15)
    # In the second frame nothing lies on an object.
    assert found.map_shares[1].isnan().all()
    scalars = Faithfulness("planted", counterfactual=found).scalars()
    assert scalars == {
        "spearman_counterfactual": pytest.approx(1),
        "tv_counterfactual": pytest.approx(0.15),
    }
    with pytest.raises(ValueError, match=r"\['block'\]: have no mask"):
        counterfactual_agreement(
            mapped({"top": maps}), {"agent": masks["agent"]}, effects_of(shares)
        )
    with pytest.raises(ValueError, match="effects in 1 frames"):
        counterfactual_agreement(mapped({"top": maps}), masks, effects_of(shares[:1]))


# Sanity check


def test_a_randomised_copy_keeps_values_and_statistics_but_not_their_places():
    policy = small_act()
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    rng = torch.get_rng_state()
    copy, again, other = (randomised(policy, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), rng)
    parameters = dict(copy.named_parameters())
    moved = [name for name, value in parameters.items() if not torch.equal(value, before[name])]
    assert {name for name in parameters if "weight" in name and "norm" not in name} & {*moved}
    for name, value in copy.state_dict().items():
        assert torch.equal(policy.state_dict()[name], before[name])
        assert torch.equal(again.state_dict()[name], value)
        if name in parameters:
            assert torch.equal(value.flatten().sort().values, before[name].flatten().sort().values)
        else:
            assert torch.equal(value, before[name])
    head = "network.action_head.weight"
    assert not torch.equal(other.state_dict()[head], copy.state_dict()[head])


def test_maps_are_like_themselves_in_any_unit_and_unlike_their_mirror():
    generator = torch.Generator().manual_seed(0)
    maps = {
        name: torch.rand(3, *cells, generator=generator)
        for name, cells in (("top", (4, 4)), ("wrist", (2, 5)))
    }
    one = mapped(maps)
    ones = torch.ones(3)
    torch.testing.assert_close(map_ssim(one, one), ones)
    torch.testing.assert_close(
        map_ssim(one, mapped({n: 7 * m + 2 for n, m in maps.items()})), ones, rtol=1e-4, atol=0
    )
    mirror = mapped({name: 1 - values for name, values in maps.items()})
    assert (map_ssim(one, mirror) < 0.2).all()
    torch.testing.assert_close(map_ssim(one, mirror), map_ssim(mirror, one))
    single = map_ssim(one.rows(slice(1)), mirror.rows(slice(1)))
    torch.testing.assert_close(single, map_ssim(one, mirror)[:1])


def test_a_flat_map_is_like_flat_maps_only():
    spot = torch.zeros(2, 4, 4)
    spot[:, 0, 0] = 1
    flat = torch.stack([torch.full((4, 4), 0.3), torch.zeros(4, 4)])
    spotted, flattened = (mapped({"top": values}) for values in (spot, flat))
    assert map_ssim(spotted, flattened).tolist() == [0, 0]
    assert map_ssim(flattened, mapped({"top": flat.flip(0)})).tolist() == [1, 1]
    # The mean over cameras.
    wrist = torch.rand(2, 4, 10)
    both = [mapped({"top": values, "wrist": wrist}) for values in (spot, flat)]
    torch.testing.assert_close(map_ssim(*both), torch.full((2,), 0.5))


def test_a_networks_map_changes_with_its_weights():
    policy, observation = small_act(token_stride=8), noisy(3)
    one, same, other = (
        CrossAttention().attribute(each, observation, Target())
        for each in (policy, policy, randomised(policy, 0))
    )
    torch.testing.assert_close(map_ssim(one, same), torch.ones(3))
    assert (map_ssim(one, other) < 0.9).all()


# Summary


def test_scalars_name_what_was_measured_and_leave_out_undefined_frames():
    n = 4
    mask = rectangle(slice(0, 6), slice(0, 6), n)
    mask[3] = False
    oracle = on_one_patch(n)
    whole = Faithfulness(
        method="planted",
        curves=measured({"oracle": oracle}, n)["oracle"],
        spearman_occlusion=torch.tensor([0.5, 1.0, torch.nan, 0.0]),
        objects=object_scores(oracle, {"agent": mask}),
        counterfactual=counterfactual_agreement(
            oracle, {"agent": ~mask}, effects_of(torch.ones(n, 1).double(), ("agent",))
        ),
        ssim_randomised=torch.tensor([0.0, 0.2, 0.4, 0.6]),
        completeness_error=torch.tensor([0.01, 0.03, 0.01, 0.03]),
    )
    scalars = whole.scalars()
    assert list(scalars) == [
        "deletion_auc_px",
        "insertion_auc_px",
        "random_auc_px",
        "deletion_ratio",
        "insertion_ratio",
        "spearman_occlusion",
        "spearman_occlusion_frames",
        "mass_agent",
        "area_agent",
        "lift_agent",
        "lift_agent_ceiling",
        "pointing_agent",
        # With one object there is nothing to rank.
        "tv_counterfactual",
        "ssim_randomised",
        "completeness_error",
    ]
    assert scalars["spearman_occlusion"] == pytest.approx(0.5)
    assert scalars["spearman_occlusion_frames"] == 3
    assert scalars["lift_agent"] == pytest.approx(1)
    assert scalars["ssim_randomised"] == pytest.approx(0.3)
    assert scalars["completeness_error"] == pytest.approx(0.02)
    assert Faithfulness("planted").scalars() == {}

    two = whole.rows(torch.tensor([1, 3]))
    assert two.scalars()["ssim_randomised"] == pytest.approx(0.4)
    assert two.scalars()["spearman_occlusion_frames"] == 2
    assert two.objects["agent"].mass.isnan().tolist() == [False, True]
    assert two.curves is not None
    assert whole.curves is not None
    own, chance = (
        each[[1, 3]].sum() for each in (whole.curves.deletion_auc_px, whole.curves.random_auc_px)
    )
    assert two.scalars()["deletion_ratio"] == pytest.approx(float(own / chance))
