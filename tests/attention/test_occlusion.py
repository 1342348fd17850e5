"""Occlusion is the change that a covered patch makes: analytic, captum's, of LeRobot's views."""

import captum.attr
import pytest
import torch
from lerobot_folders import episode, lerobot_policy, with_history
from test_gradients import CAMERAS, Linear, observe
from tiny_act import tiny_act
from torch import Tensor

from attention import occlusion
from attention.method import Target
from attention.occlusion import Occlusion
from policies.interface import DataSchema, Observation
from policies.lerobot_view import LeRobotPolicyView


def patches(values: Tensor, side: int) -> Tensor:
    """Sums over patches, the last ones cut off, (..., row, column)."""
    rows = [part.sum(-2) for part in values.split(side, dim=-2)]
    return torch.stack(
        [torch.stack([part.sum(-1) for part in row.split(side, dim=-1)], -1) for row in rows], -2
    )


@pytest.mark.parametrize("dimensions", [None, (1,)])
def test_a_policy_linear_in_pixels_loses_what_the_patch_gave(dimensions):
    policy = Linear()
    observation = observe(policy)
    found = Occlusion(4, "black").attribute(policy, observation, Target((0, 2), dimensions))
    chosen = list(dimensions or (0, 1))
    # Chunk steps 0 and 2 move 1 and 3 times as far.
    for name, weight in policy.weights.items():
        pixels = observation.images[name].double() / 255
        lost = torch.einsum("acij,bcij->baij", weight[chosen], pixels)
        expected = 2 * patches(lost, 4).abs().sum(1)
        torch.testing.assert_close(found.maps[name], expected)
        assert found.cells_px[name] == 4
        assert found.image_sizes[name] == policy.data_schema.cameras[name]
    assert found.maps["top"].shape == (3, 2, 2)
    assert found.maps["wrist"].shape == (3, 1, 2)
    away = observation.state - 256
    moved = away[:, :, None] * policy.gains[:, chosen]
    torch.testing.assert_close(found.dimensions["state"], 2 * moved.abs().sum(-1))
    torch.testing.assert_close(found.vectors["state"], 2 * moved.sum(1).abs().sum(-1))


def test_the_mean_colour_covers_what_differs_from_it():
    policy = Linear()
    observation = observe(policy)
    found = Occlusion(3, "mean").attribute(policy, observation, Target())
    # The mean as a byte: the policy sees bytes.
    pixels = observation.images["wrist"].double() / 255 - 128 / 255
    lost = torch.einsum("acij,bcij->baij", policy.weights["wrist"], pixels)
    torch.testing.assert_close(found.maps["wrist"], patches(lost, 3).abs().sum(1))


def test_the_state_that_relative_actions_are_added_to_stays():
    observation = observe(Linear())
    absolute, relative = (
        Occlusion(4).attribute(Linear(kind), observation, Target()) for kind in (False, True)
    )
    torch.testing.assert_close(relative.vectors["state"], absolute.vectors["state"])
    torch.testing.assert_close(relative.dimensions["state"], absolute.dimensions["state"])


def test_occlusion_is_captums_where_captum_has_one_camera():
    policy = tiny_act(state_dim=0, backbone_width=16)
    observation = observe(policy)
    found = Occlusion(5, "black").attribute(policy, observation, Target((1, 3)))
    images = observation.images["image"].double() / 255
    original = policy.predict_chunk(Observation({"image": images}), (1, 3)).detach()

    def change(covered: Tensor, before: Tensor) -> Tensor:
        actions = policy.predict_chunk(Observation({"image": covered}), (1, 3))
        return (actions - before).abs().sum(-1).mean(-1)

    with torch.no_grad():
        pixels = captum.attr.Occlusion(change).attribute(
            images, (3, 5, 5), (3, 5, 5), baselines=0, additional_forward_args=original
        )
    torch.testing.assert_close(found.maps["image"], -pixels[:, 0, ::5, ::5].double())


@pytest.mark.parametrize("environment_state_dim", [0, 3])
def test_frames_together_are_explained_as_one_by_one(monkeypatch, environment_state_dim):
    policy = tiny_act(
        cameras=CAMERAS,
        state_dim=1,
        backbone_width=16,
        environment_state_dim=environment_state_dim,
    )
    observation = observe(policy)
    method = Occlusion(16)
    together = method.attribute(policy, observation, Target())
    assert set(together.vectors) == set(together.dimensions)
    assert len(together.vectors) == (2 if environment_state_dim else 1)
    # With one dimension the whole state is that dimension.
    torch.testing.assert_close(together.dimensions["state"][:, 0], together.vectors["state"])
    assert together.vectors["state"].min() > 0
    monkeypatch.setattr(occlusion, "PASS_PIXELS", 1)
    for frame in range(3):
        alone = method.attribute(policy, observation.rows(slice(frame, frame + 1)), Target())
        for part in ("maps", "vectors", "dimensions"):
            for key, values in getattr(alone, part).items():
                torch.testing.assert_close(values[0], getattr(together, part)[key][frame])


class Counting(Linear):
    """Counts what goes through it."""

    def predict_chunk(self, observation, queries=None):
        self.seen = [*getattr(self, "seen", []), len(observation.images["top"])]
        return super().predict_chunk(observation, queries)


def test_every_patch_costs_one_picture(monkeypatch):
    policy = Counting()
    Occlusion(2).attribute(policy, observe(policy), Target())
    n_patches = 3 * 4 + 2 * 3
    assert sum(policy.seen) == 3 * (1 + n_patches + 1 + 2)
    # As many together as go through at once.
    monkeypatch.setattr(occlusion, "PASS_PIXELS", 5 * (6 * 8 + 4 * 5))
    policy.seen = []
    Occlusion(2).attribute(policy, observe(policy), Target())
    assert max(policy.seen) == 5


def test_a_patch_has_about_a_twelfth_of_the_shorter_side():
    policy = tiny_act(cameras={"small": [24, 48], "large": [60, 37]}, backbone_width=16)
    found = Occlusion().attribute(policy, observe(policy, n_frames=1), Target())
    assert found.cells_px == {"small": 2.0, "large": 3.0}
    assert found.maps["small"].shape == (1, 12, 24)
    assert found.maps["large"].shape == (1, 20, 13)


SCHEMA = DataSchema(cameras={"image": (64, 64)}, state_dim=2, action_dim=2)
"""Large enough for a grid of 2 x 2 features, without which LeRobot's keypoints say nothing."""


def lerobot_view(policy_type: str) -> LeRobotPolicyView:
    changes = {} if policy_type == "act" else {"crop_shape": [64, 64]}
    return LeRobotPolicyView(*lerobot_policy(policy_type, SCHEMA, **changes))


def history(view: LeRobotPolicyView, n_frames: int = 2) -> Observation:
    steps = episode(n_frames + 2, SCHEMA)
    if view.n_obs_steps == 1:
        seen = steps[:n_frames]
    else:
        seen = [with_history(steps, frame + 1, view.n_obs_steps) for frame in range(n_frames)]
    return Observation(
        {"image": torch.cat([each.images["image"] for each in seen])},
        torch.cat([each.state for each in seen]),
    )


def test_a_patch_is_covered_in_all_steps_of_a_history():
    view = lerobot_view("diffusion")
    observation = history(view)
    images = observation.images["image"]
    assert images.shape[1] == view.n_obs_steps == 2
    found = Occlusion(32, "black").attribute(view, observation, Target((0, 1)))
    original = view.predict_chunk(observation, (0, 1))
    for row, column in ((0, 0), (1, 0), (1, 1)):
        covered = images.clone()
        covered[..., 32 * row : 32 * row + 32, 32 * column : 32 * column + 32] = 0
        actions = view.predict_chunk(Observation({"image": covered}, observation.state), (0, 1))
        expected = (actions - original).abs().sum(-1).mean(-1)
        assert expected.max() > 1e-3
        torch.testing.assert_close(
            found.maps["image"][:, row, column], expected, rtol=1e-3, atol=1e-3
        )
    # Its processors keep the statistics to themselves.
    assert not found.vectors
    assert not found.dimensions


@pytest.mark.parametrize("policy_type", ["diffusion", "vqbet", "act"])
def test_to_cover_black_with_black_changes_nothing(policy_type):
    """Also where a policy draws random numbers: every variant gets those of the original."""
    view = lerobot_view(policy_type)
    seen = history(view)
    dark = Observation({"image": torch.zeros_like(seen.images["image"])}, seen.state)
    found = Occlusion(32, "black").attribute(view, dark, Target((0, 2)))
    assert found.maps["image"].max() < 1e-2


def test_what_cannot_be_covered_is_refused():
    with pytest.raises(ValueError, match="patch_px 0"):
        Occlusion(0)
    policy = Linear()
    with pytest.raises(ValueError, match="chunk steps 0 to 2"):
        Occlusion().attribute(policy, observe(policy), Target((3,)))
    policy.data_schema = DataSchema(cameras={}, state_dim=2, action_dim=2)
    with pytest.raises(ValueError, match="no camera to cover"):
        Occlusion().check(policy)
