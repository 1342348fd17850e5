"""The wrapper changes no action, has maps whenever they are asked for, and draws them truly."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot_folders import SCHEMA, episode, lerobot_policy, to_lerobot
from tiny_act import tiny_act

from attention.capture import capture_attention
from policies.ensembling import ActionQueue, TemporalEnsembler
from policies.interface import DataSchema, Observation
from rendering.act_with_attention import ACTPolicyWithAttention

N_STEPS = 60


@pytest.fixture(scope="module", params=[None, 0.01])
def acted_alone(request):
    """LeRobot's policy, what it sees, and what it does without the wrapper."""
    coefficient = request.param
    more = {} if coefficient is None else {"temporal_ensemble_coeff": 0.01, "n_action_steps": 1}
    policy, preprocessor, _ = lerobot_policy("act", **more)
    observations = [to_lerobot(each) for each in episode(N_STEPS)]
    policy.reset()
    plain = torch.cat([policy.select_action(preprocessor(dict(each))) for each in observations])
    return policy, preprocessor, observations, plain, coefficient


@pytest.mark.parametrize("force_model_run", [True, False])
def test_lerobots_actions_stay_the_same_bits(acted_alone, force_model_run):
    policy, preprocessor, observations, plain, coefficient = acted_alone
    wrapped = ACTPolicyWithAttention(policy, preprocessor)
    wrapped.reset()
    actions, n_maps = [], 0
    for each in observations:
        action, maps = wrapped.select_action(each, force_model_run)
        actions.append(action)
        n_maps += maps is not None
    assert plain.std(0).min() > 0
    assert torch.equal(torch.cat(actions), plain)
    assert n_maps == (N_STEPS if force_model_run or coefficient else N_STEPS // 5)


@pytest.mark.parametrize("coefficient", [None, 0.01])
def test_our_actions_stay_the_same_bits(coefficient):
    policy = tiny_act(n_action_steps=3)
    controller = ActionQueue(3) if coefficient is None else TemporalEnsembler(coefficient, 6)
    wrapped = ACTPolicyWithAttention(policy, temporal_ensemble_coeff=coefficient)
    steps = controller.steps_used()
    for observation in episode(N_STEPS):
        chunk = None
        if controller.wants_prediction():
            with torch.no_grad():
                chunk = policy.predict_chunk(observation, None if steps is None else range(steps))
        action, maps = wrapped.select_action(observation)
        assert torch.equal(action, controller.step(chunk))
        assert maps is not None


def test_maps_are_of_the_present_observation_not_of_the_plan():
    policy, preprocessor, _ = lerobot_policy("act")
    wrapped = ACTPolicyWithAttention(policy, preprocessor)
    first, second = (to_lerobot(each) for each in episode(2))
    wrapped.select_action(first)
    _, maps = wrapped.select_action(second)
    fresh = ACTPolicyWithAttention(copy.deepcopy(policy), preprocessor)
    fresh.reset()
    _, expected = fresh.select_action(second)
    torch.testing.assert_close(maps.maps["image"], expected.maps["image"])
    torch.testing.assert_close(maps.shares(), expected.shares())
    assert sum(maps.shares().values()).item() == pytest.approx(1, abs=1e-5)


def test_lerobots_folder_and_ours_look_at_the_same_places(tmp_path):
    from lerobot_folders import write_folder

    from policies.loading import load_policy

    parts = lerobot_policy("act")
    folder = write_folder(tmp_path / "policy", *parts)
    observation = episode(1)[0]
    _, theirs = ACTPolicyWithAttention(parts[0], parts[1], method="rollout").select_action(
        to_lerobot(observation)
    )
    view = load_policy(str(folder)).view
    _, ours = ACTPolicyWithAttention(view, method="rollout").select_action(observation)
    torch.testing.assert_close(ours.maps["image"], theirs.maps["image"], atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(ours.vectors, theirs.vectors, atol=1e-5, rtol=1e-3)


def test_everything_else_is_the_policys_and_survives_copies():
    policy, preprocessor, _ = lerobot_policy("act")
    wrapped = ACTPolicyWithAttention(policy, preprocessor)
    assert wrapped.config is policy.config
    assert sum(p.numel() for p in wrapped.parameters()) > 0
    with pytest.raises(AttributeError):
        _ = wrapped.no_such_thing
    copied = copy.deepcopy(wrapped)
    assert copied._policy is not policy
    pickled = pickle.loads(pickle.dumps(ACTPolicyWithAttention(policy)))
    observation = to_lerobot(episode(1)[0])
    for each in (wrapped, copied, pickled):
        each.reset()
        batch = preprocessor(dict(observation)) if each is pickled else observation
        torch.testing.assert_close(
            each.select_action(batch)[1].maps["image"],
            wrapped.select_action(observation)[1].maps["image"],
        )


@pytest.mark.parametrize("whose", ["ours", "lerobot"])
def test_half_precision(whose):
    observation = episode(1)[0]
    if whose == "ours":
        wrapped = ACTPolicyWithAttention(tiny_act().to(torch.bfloat16))
        given = observation
    else:
        policy, preprocessor, _ = lerobot_policy("act")
        wrapped = ACTPolicyWithAttention(policy.to(torch.bfloat16), preprocessor)
        given = to_lerobot(observation)
    action, maps = wrapped.select_action(given)
    assert action.dtype == torch.bfloat16
    assert maps.maps["image"].dtype == torch.bfloat16
    pictures = wrapped.visualize_attention(attention_maps=maps, observation=observation)
    assert pictures[0].dtype == np.uint8


def test_several_cameras_of_different_sizes_in_a_batch():
    schema = DataSchema({"left": (96, 64), "image": (32, 32)}, 1, 2)
    policy, _, _ = lerobot_policy_of(schema)
    wrapped = ACTPolicyWithAttention(policy)
    batch = {
        "observation.images.left": torch.rand(3, 3, 96, 64),
        "observation.image": torch.rand(3, 3, 32, 32),
        "observation.state": torch.randn(3, 1),
    }
    action, maps = wrapped.select_action(batch)
    assert action.shape == (3, 2)
    assert {name: tuple(values.shape) for name, values in maps.maps.items()} == {
        "left": (3, 3, 2),
        "image": (3, 1, 1),
    }
    drawn = wrapped.visualize_attention(
        attention_maps=maps, observation=batch, show_proprio_border=False
    )
    assert [picture.shape for picture in drawn] == [(96, 64, 3), (32, 32, 3)] * 3
    with pytest.raises(ValueError, match="missing"):
        wrapped.select_action({key: batch[key] for key in batch if key != "observation.image"})


def lerobot_policy_of(schema: DataSchema):
    from policies.lerobot_config import build_config, build_policy

    settings = {
        "n_action_steps": 5,
        "dim_model": 32,
        "n_heads": 4,
        "dim_feedforward": 48,
        "n_encoder_layers": 1,
    }
    torch.manual_seed(0)
    return build_policy(build_config("act", settings, schema, 7)).eval(), None, None


def test_colours_are_rgb_and_the_frame_lies_outside():
    policy = tiny_act()
    wrapped = ACTPolicyWithAttention(policy)
    red = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    red[:, 0] = 255
    observation = Observation({"image": red}, torch.full((1, 2), 200.0))
    _, maps = wrapped.select_action(observation)
    options = {"attention_maps": maps, "overlay_alpha": 0.0, "proprio_border_width": 4}
    (framed,) = wrapped.visualize_attention(observation=observation, **options)
    assert framed.shape == (40, 40, 3)
    np.testing.assert_array_equal(framed[4:-4, 4:-4], np.full((32, 32, 3), [255, 0, 0]))
    (bgr,) = wrapped.visualize_attention(observation=observation, use_rgb=False, **options)
    np.testing.assert_array_equal(bgr, framed[..., ::-1])
    array = np.ascontiguousarray(np.moveaxis(red[0].numpy(), 0, -1))
    (same,) = wrapped.visualize_attention(images=[array], **options)
    np.testing.assert_array_equal(same, framed)


def test_what_cannot_be_wrapped_or_drawn_is_refused():
    policy, preprocessor, _ = lerobot_policy("act")
    with pytest.raises(TypeError, match="ACT"):
        ACTPolicyWithAttention(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="ACT"):
        ACTPolicyWithAttention(lerobot_policy("diffusion")[0])
    with pytest.raises(ValueError, match="preprocessor"):
        ACTPolicyWithAttention(tiny_act(), preprocessor)
    with pytest.raises(ValueError, match="ensemble"):
        ACTPolicyWithAttention(policy, temporal_ensemble_coeff=0.01)
    wrapped = ACTPolicyWithAttention(policy, preprocessor)
    observation = to_lerobot(episode(1)[0])
    wrapped.reset()
    wrapped.select_action(observation)
    _, maps = wrapped.select_action(observation, force_model_run=False)
    assert maps is None
    with pytest.raises(ValueError, match="force_model_run"):
        wrapped.visualize_attention(attention_maps=maps, observation=observation)
    _, maps = wrapped.select_action(observation)
    with pytest.raises(ValueError, match="before"):
        wrapped.visualize_attention(
            attention_maps=maps, observation=preprocessor(dict(observation))
        )


def test_no_hook_stays_when_the_policy_fails():
    policy, _, _ = lerobot_policy("act")
    wrapped = ACTPolicyWithAttention(policy)
    wrong = {"observation.image": torch.rand(1, 3, 32, 32), "observation.state": torch.rand(1, 9)}
    with pytest.raises(RuntimeError):
        wrapped.select_action(wrong)
    modules = list(policy.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    with capture_attention(policy.model) as capture:
        assert capture.take() is None


def test_importing_it_needs_no_logger_and_no_data_library():
    code = (
        "import sys; import rendering.act_with_attention; "
        "found = {'wandb', 'datasets', 'lightning', 'lerobot', 'gym_pusht', 'h5py', 'captum'}"
        "& set(sys.modules); assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_schema_of_the_shared_policies_is_what_these_tests_think():
    assert dict(SCHEMA.cameras) == {"image": (32, 32)}


def test_frames_of_a_video_have_one_size_even_where_nothing_counts(tmp_path):
    from attention.attribution import Attribution
    from rendering.attention import AttentionStyle, attention_frames
    from rendering.attention_scenes import attention_scenes
    from rendering.video import write_videos

    maps = torch.rand(4, 3, 3) * torch.tensor([1.0, 0.0, 1e-7, 1e4])[:, None, None]
    found = Attribution(
        method="occlusion",
        queries=(0,),
        maps={"image": maps},
        cells_px={"image": 16.0},
        image_sizes={"image": (48, 48)},
        vectors={"state": maps.mean((1, 2))},
        dimensions={},
    )
    observation = Observation({"image": torch.rand(4, 3, 48, 48)})
    # Narrow pictures, so that the line below decides the width.
    style = AttentionStyle(target_height=40)
    frames = [attention_frames(each, style) for each in attention_scenes(found, observation)]
    assert len({frame["image"].shape for frame in frames}) == 1
    paths = write_videos({"image": tmp_path / "image.mp4"}, iter(frames), 10)
    assert paths["image"].stat().st_size > 0
