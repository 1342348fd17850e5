"""Batches change nothing, tables hold what the maps say, summaries are shares of one whole."""

import math

import numpy as np
import pytest
import torch
from lerobot_folders import lerobot_policy
from pyarrow import parquet
from tiny_act import frames, tiny_act

from attention.attribution import Attribution
from attention.counterfactuals import CounterfactualEffects
from attention.maps import CrossAttention, EncoderAttention, Rollout
from attention.method import Target
from attention.study import (
    WEIGHTS_BYTES,
    Evidence,
    effect_numbers,
    explain,
    frames_together,
    judge,
    numbers,
    resolution_note,
)
from attention.table import MOST_CELLS, map_table, write_maps
from policies.interface import Observation
from policies.lerobot_view import LeRobotPolicyView


def attribution(maps: dict[str, torch.Tensor], **changes) -> Attribution:
    """Of pictures of 20 px cells."""
    n_frames = len(next(iter(maps.values())))
    return Attribution(
        **{
            "method": "planted",
            "queries": (0,),
            "maps": maps,
            "cells_px": dict.fromkeys(maps, 20.0),
            "image_sizes": {
                name: (20 * each.shape[1], 20 * each.shape[2]) for name, each in maps.items()
            },
            "vectors": {"state": torch.ones(n_frames)},
            "dimensions": {},
            **changes,
        }
    )


@pytest.mark.parametrize("method", [CrossAttention(), Rollout(), EncoderAttention("state")])
def test_batches_change_nothing(method):
    policy, batch = tiny_act(), frames(7)
    counted = []
    whole = explain(method, policy, batch.observation, Target(), 7)
    parts = explain(method, policy, batch.observation, Target(), 3, counted.append)
    assert counted == [3, 3, 1]
    torch.testing.assert_close(whole.maps, parts.maps)
    torch.testing.assert_close(whole.vectors, parts.vectors)
    torch.testing.assert_close(sum(whole.shares().values()), torch.ones(7))
    with pytest.raises(ValueError, match="no frame"):
        explain(method, policy, batch.observation.rows(slice(0)), Target())


def test_a_method_that_looks_inside_refuses_what_is_no_act():
    view = LeRobotPolicyView(*lerobot_policy("diffusion"))
    with pytest.raises(ValueError, match="occlusion explains any"):
        explain(CrossAttention(), view, frames(2).observation, Target())
    blind = tiny_act(cameras={}, environment_state_dim=1)
    with pytest.raises(ValueError, match="no camera"):
        explain(CrossAttention(), blind, frames(2).observation, Target())


@pytest.mark.parametrize(
    ("method", "match"),
    [
        (CrossAttention(layer=1), "layer 1"),
        (CrossAttention(head=2), "head 2"),
        (EncoderAttention("arm"), "token 'arm'"),
        (EncoderAttention("image:2,0"), "no token"),
        (Rollout("image:x"), "camera:row,column"),
    ],
)
def test_choices_that_the_policy_does_not_have_are_refused(method, match):
    with pytest.raises(ValueError, match=match):
        method.check(tiny_act())


@pytest.mark.parametrize(
    ("target", "match"),
    [({"queries": (6,)}, "0 to 5"), ({"dimensions": (2,)}, "0 to 1")],
)
def test_targets_that_the_policy_does_not_predict_are_refused(target, match):
    with pytest.raises(ValueError, match=match):
        explain(CrossAttention(), tiny_act(), frames(2).observation, Target(**target))
    with pytest.raises(ValueError, match="rising"):
        Target(queries=(3, 1))


def test_weights_of_large_pictures_come_in_smaller_batches():
    assert frames_together(tiny_act(), 64) == 64
    large = tiny_act(
        cameras={"left": [480, 640], "right": [480, 640]}, n_encoder_layers=4, n_heads=8
    )
    few = frames_together(large, 64)
    n_tokens = 2 + 2 * 30 * 40
    assert few == max(1, WEIGHTS_BYTES // (4 * 8 * 4 * n_tokens**2))
    assert few < 64


def test_numbers_of_known_maps():
    even = torch.full((2, 2, 2), 0.25)
    values = numbers(attribution({"image": even}))
    assert values["share_state"] == pytest.approx(0.5)
    assert values["share_image"] == pytest.approx(0.5)
    assert values["entropy_nats"] == pytest.approx(math.log(4))
    assert values["concentration"] == pytest.approx(0, abs=1e-6)
    single = torch.zeros(2, 2, 2)
    single[:, 1, 0] = 3
    found = attribution({"image": single})
    assert numbers(found)["concentration"] == pytest.approx(1)
    assert found.top_cells()["image"].tolist() == [[1, 0]] * 2


def test_nothing_relevant_has_no_shares_and_prefers_nothing():
    found = attribution({"image": torch.zeros(1, 2, 3)}, vectors={"state": torch.zeros(1)})
    assert found.shares() == {"state": 0, "image": 0}
    torch.testing.assert_close(found.picture_mass()["image"], torch.full((1, 2, 3), 1 / 6))
    tiny = attribution({"image": torch.full((1, 1, 1), 1e-30)}, vectors={})
    assert float(tiny.shares()["image"]) == pytest.approx(1)


def test_densities_keep_the_mass_of_cells_that_overhang():
    # 3 x 3 cells of 20 px over a picture of 50 x 44 px.
    maps = {"image": torch.rand(2, 3, 3), "side": torch.rand(2, 1, 2)}
    found = attribution(maps, image_sizes={"image": (50, 44), "side": (20, 40)})
    densities = found.densities()
    assert densities["image"].shape == (2, 50, 44)
    total = sum(each.sum((1, 2)) for each in densities.values())
    torch.testing.assert_close(total, torch.ones(2, dtype=total.dtype))
    cell = densities["image"][:, 40:, 40:].sum((1, 2))
    torch.testing.assert_close(cell, found.picture_mass()["image"][:, 2, 2].to(cell))
    grid = found.densities({"image": (5, 4), "side": (1, 1)})
    torch.testing.assert_close(
        grid["side"][:, 0, 0], found.picture_mass()["side"].sum((1, 2)).to(grid["side"])
    )


def test_tables_hold_the_maps(tmp_path):
    maps = {"image": torch.rand(3, 2, 3), "side": torch.rand(3, 1, 1)}
    found = attribution(
        maps,
        dimensions={"state": torch.tensor([[1.0, -2.0]] * 3)},
        completeness_error=torch.tensor([0.01, 0.02, 0.03]),
    )
    other = attribution(maps, method="other", vectors={})
    episode, step = torch.full((3,), 7), torch.arange(3)
    path = write_maps(
        tmp_path / "maps.parquet", [map_table(each, episode, step) for each in (found, other)]
    )
    rows = parquet.read_table(path).to_pylist()
    assert [(row["episode_index"], row["frame_index"], row["method"]) for row in rows] == [
        (7, step, method) for method in ("planted", "other") for step in range(3)
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["maps.parquet"]
    second = rows[1]
    shape = second["rows_image"], second["columns_image"]
    mass = found.picture_mass()["image"][1].numpy()
    np.testing.assert_allclose(np.reshape(second["map_image"], shape), mass, rtol=1e-6)
    place = second["top_row_image"], second["top_column_image"]
    assert np.unravel_index(mass.argmax(), mass.shape) == place
    assert second["share_state"] == pytest.approx(float(found.shares()["state"][1]))
    assert second["state"] == [1, -2]
    assert second["completeness_error"] == pytest.approx(0.02)
    assert rows[4]["share_state"] is None


def test_maps_of_many_pixels_are_written_on_patches():
    found = attribution(
        {"image": torch.rand(2, 96, 128)},
        cells_px={"image": 1.0},
        image_sizes={"image": (96, 128)},
    )
    table = map_table(found, torch.zeros(2, dtype=torch.int64), torch.arange(2))
    (row, _) = table.to_pylist()
    assert (row["rows_image"], row["columns_image"]) == (48, 64)
    assert len(row["map_image"]) == 48 * 64 < MOST_CELLS
    assert sum(row["map_image"]) == pytest.approx(1, abs=1e-5)


def test_judging_knows_what_a_policy_has_learnt():
    policy, batch = tiny_act(), frames(4)
    methods = {"cross_attention": CrossAttention(), "rollout": Rollout()}
    maps = {
        name: explain(method, policy, batch.observation, Target())
        for name, method in methods.items()
    }
    masks = {"left": torch.zeros(4, 32, 32, dtype=torch.bool)}
    masks["left"][:, :, :16] = True
    masks["right"] = ~masks["left"]
    effects = CounterfactualEffects(
        effect_px={"left": torch.ones(4), "right": 3 * torch.ones(4)},
        shares=torch.tensor([[0.25, 0.75]] * 4),
        sensitivity={"agent_x": torch.full((4,), 0.5)},
        rerender_px=torch.zeros(4),
    )
    evidence = Evidence(batch.observation, maps["rollout"], masks, effects)
    verdicts = judge(policy, methods, maps, evidence, Target())
    scalars = verdicts["cross_attention"].scalars()
    assert scalars["deletion_ratio"] > 0
    assert scalars["mass_left"] + scalars["mass_right"] == pytest.approx(1)
    assert scalars["ssim_randomised"] < 1
    assert verdicts["cross_attention"].spearman_occlusion is not None
    quick = judge(
        policy, methods, maps, evidence, Target(), with_curves=False, with_randomised=False
    )
    assert quick["rollout"].curves is None
    assert effect_numbers(effects) == {
        "effect_left_px": 1.0,
        "effect_right_px": 3.0,
        "share_left": 0.25,
        "share_right": 0.75,
        "sensitivity_agent_x": 0.5,
        "rerender_px": 0.0,
    }


def test_notes_say_how_far_a_token_sees():
    assert resolution_note(tiny_act()) == "a token is a cell of 16 px and sees the whole picture"
    large = tiny_act(cameras={"image": [96, 96]})
    assert resolution_note(large) == "a token is a cell of 16 px and sees 65 px around it"
    assert resolution_note(LeRobotPolicyView(*lerobot_policy("diffusion"))) == ""


def test_observations_without_pictures_have_frames_too():
    policy = tiny_act()
    observation = Observation({}, torch.zeros(3, 2))
    with pytest.raises(ValueError, match="camera"):
        explain(CrossAttention(), policy, observation, Target())
