"""LeRobot's own policies behind our view: the same actions, and no state anywhere."""

import json
import shutil
from collections import deque

import pytest
import torch
from lerobot_folders import (
    SCHEMA,
    STATISTICS,
    episode,
    lerobot_policy,
    lerobot_step,
    to_lerobot,
    with_history,
    write_folder,
)
from safetensors.torch import load_file, save_file

from policies.interface import DataSchema, Observation, PolicyView
from policies.lerobot_config import build_config, data_needs
from policies.lerobot_format import LeRobotFormatError
from policies.lerobot_view import LeRobotPolicyView, load_lerobot_policy, processors_for
from policies.loading import load_policy

POLICIES = {
    "diffusion": ("diffusion", {}),
    "diffusion_ddim": ("diffusion", {"noise_scheduler_type": "DDIM", "num_inference_steps": 3}),
    "diffusion_one_step": ("diffusion", {"n_obs_steps": 1}),
    "vqbet": ("vqbet", {}),
    "act": ("act", {}),
}


def observe(observations, step, view):
    if view.n_obs_steps == 1:
        return observations[step]
    return with_history(observations, step, view.n_obs_steps)


@pytest.fixture(scope="module")
def diffusion():
    return lerobot_policy("diffusion")


@pytest.fixture(scope="module")
def diffusion_folder(tmp_path_factory, diffusion):
    return write_folder(tmp_path_factory.mktemp("diffusion"), *diffusion)


@pytest.fixture
def folder(diffusion_folder, tmp_path):
    """A copy to damage."""
    return shutil.copytree(diffusion_folder, tmp_path / "policy")


def together(observations: list[Observation]) -> Observation:
    return Observation(
        images={"image": torch.cat([each.images["image"] for each in observations])},
        state=torch.cat([each.state for each in observations]),
    )


@pytest.mark.parametrize("name", POLICIES)
def test_view_acts_as_lerobot_over_an_episode_given_the_same_noise(name):
    """LeRobot acts through its queues, the view looks on in between and is asked afresh."""
    policy_type, changes = POLICIES[name]
    theirs = lerobot_policy(policy_type, **changes)
    policy = theirs[0]
    view = LeRobotPolicyView(*theirs)
    assert isinstance(view, PolicyView)
    observations = episode(11)
    policy.reset()
    played: deque = deque()
    for step in range(len(observations)):
        torch.manual_seed(step)
        expected = lerobot_step(*theirs, observations[step])
        seen = observe(observations, step, view)
        if not played:
            noise = torch.Generator().manual_seed(step)
            chunk = view.predict_chunk(seen, generator=noise)
            assert chunk.shape == (1, view.chunk_size, 2)
            played.extend(chunk[0, : view.n_action_steps])
        else:
            view.predict_chunk(seen)
        torch.testing.assert_close(played.popleft()[None], expected, rtol=1e-5, atol=1e-5)


def test_diffusion_chunk_goes_on_where_lerobots_stops(diffusion):
    """Step 0 is now; LeRobot executes a part of what was denoised, the view gives all of it."""
    policy, preprocessor, postprocessor = lerobot_policy("diffusion", noise_scheduler_type="DDIM")
    view = LeRobotPolicyView(policy, preprocessor, postprocessor)
    config = policy.config
    assert view.n_action_steps == config.n_action_steps == 3
    assert view.chunk_size == config.horizon - config.n_obs_steps + 1 == 7
    assert data_needs(config).action_start == 1 - config.n_obs_steps
    observation = with_history(episode(3), 2, 2)
    noise = torch.randn(1, config.horizon, 2)
    batch = preprocessor(to_lerobot(observation))
    expected = postprocessor(policy.predict_action_chunk(batch, noise=noise))
    chunk = view.predict_chunk(observation, noise=noise)
    torch.testing.assert_close(chunk[:, :3], expected, rtol=1e-6, atol=1e-4)
    full = policy.diffusion.conditional_sample(
        1,
        global_cond=policy.diffusion._prepare_global_conditioning(
            {**batch, "observation.images": batch["observation.image"][:, :, None]}
        ),
        noise=noise,
    )
    torch.testing.assert_close(chunk, postprocessor(full[:, 1:]), rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(
        view.predict_chunk(observation, [6, 0], noise=noise), chunk[:, [6, 0]]
    )


@pytest.mark.parametrize("name", POLICIES)
def test_asking_leaves_no_trace(name):
    policy_type, changes = POLICIES[name]
    theirs = lerobot_policy(policy_type, **changes)
    policy, view = theirs[0], LeRobotPolicyView(*theirs)
    observations = episode(6)
    policy.train()
    frozen = next(module for module in policy.modules() if isinstance(module, torch.nn.Conv2d))
    frozen.eval()
    modes = [module.training for module in policy.modules()]
    policy.reset()
    queue = getattr(policy, "_queues", None) or {"action": policy._action_queue}
    queue["action"].extend([torch.full((1, 2), 7.0)])
    before = {key: [each.clone() for each in values] for key, values in queue.items()}
    weights = {key: value.clone() for key, value in policy.state_dict().items()}
    random_state = torch.get_rng_state()

    first = view.predict_chunk(observe(observations, 2, view))
    other = view.predict_chunk(observe(observations, 5, view))
    again = view.predict_chunk(observe(observations, 2, view))

    assert torch.equal(first, again)
    assert (first - other).abs().max() > 1e-3
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in policy.modules()] == modes
    queue_now = getattr(policy, "_queues", None) or {"action": policy._action_queue}
    assert queue_now["action"] is queue["action"]
    for key, values in queue_now.items():
        assert len(values) == len(before[key])
        assert all(torch.equal(*pair) for pair in zip(values, before[key], strict=True))
    for key, value in policy.state_dict().items():
        assert torch.equal(value, weights[key]), key


def test_an_answer_does_not_depend_on_the_rest_of_the_batch(diffusion):
    view = LeRobotPolicyView(*diffusion)
    seen = [with_history(episode(8), step, 2) for step in (1, 4, 7)]
    chunks = view.predict_chunk(together(seen))
    for chunk, observation in zip(chunks, seen, strict=True):
        torch.testing.assert_close(view.predict_chunk(observation)[0], chunk, rtol=1e-5, atol=1e-3)
    reseeded = LeRobotPolicyView(*diffusion, seed=1).predict_chunk(seen[0])
    assert (reseeded[0] - chunks[0]).abs().max() > 1


def test_samples_differ_share_noise_and_encode_once(diffusion, monkeypatch):
    view = LeRobotPolicyView(*diffusion)
    seen = with_history(episode(4), 3, 2)
    other = with_history(episode(4), 2, 2)
    calls = []
    encode = view.policy.diffusion._prepare_global_conditioning
    monkeypatch.setattr(
        view.policy.diffusion,
        "_prepare_global_conditioning",
        lambda batch: calls.append(len(batch["observation.state"])) or encode(batch),
    )
    samples = view.sample_chunks(together([seen, other, seen]), n_samples=4)
    assert calls == [3]
    assert samples.shape == (3, 4, view.chunk_size, 2)
    # Common random numbers: the same observation gets the same samples wherever it stands.
    torch.testing.assert_close(samples[0], samples[2], rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(
        view.sample_chunks(other, n_samples=4)[0], samples[1], rtol=1e-5, atol=1e-3
    )
    spread = samples.std(dim=1).mean()
    assert spread > 1
    assert (samples[0] - samples[1]).abs().max() > 1e-3
    torch.testing.assert_close(
        view.sample_chunks(seen, 4, queries=[2, 0])[0], samples[0][:, [2, 0]], rtol=1e-5, atol=1e-3
    )
    drawn = view.sample_chunks(seen, 2, seed=9)
    assert torch.equal(drawn, view.sample_chunks(seen, 2, seed=9))
    assert not torch.equal(drawn, view.sample_chunks(seen, 2, seed=10))


def test_samples_of_other_policies():
    vqbet = LeRobotPolicyView(*lerobot_policy("vqbet", bet_softmax_temperature=100.0))
    samples = vqbet.sample_chunks(with_history(episode(3), 2, 2), n_samples=16)
    assert samples.shape == (1, 16, 3, 2)
    assert samples.std(dim=1).max() > 0
    act = LeRobotPolicyView(*lerobot_policy("act"))
    with pytest.raises(ValueError, match="nothing to sample"):
        act.sample_chunks(episode(1)[0], 2)
    with pytest.raises(ValueError, match="n_samples=0"):
        vqbet.sample_chunks(with_history(episode(3), 2, 2), n_samples=0)


def test_relative_actions_are_relative_to_the_state_of_their_own_chunk():
    """Samples and batches too, though LeRobot keeps the state in a processor."""
    from lerobot.processor import AbsoluteActionsProcessorStep, RelativeActionsProcessorStep

    policy, preprocessor, postprocessor = lerobot_policy("diffusion", n_obs_steps=1)
    absolute = LeRobotPolicyView(policy, preprocessor, postprocessor)
    observations = [
        Observation(images=each.images, state=each.state) for each in episode(2, seed=5)
    ]
    both = together(observations)
    expected = absolute.sample_chunks(both, 3) + both.state[:, None, None]
    relative = RelativeActionsProcessorStep(enabled=True)
    policy, preprocessor, postprocessor = lerobot_policy("diffusion", n_obs_steps=1)
    preprocessor.steps = [*preprocessor.steps[:3], relative, *preprocessor.steps[3:]]
    postprocessor.steps = [
        postprocessor.steps[0],
        AbsoluteActionsProcessorStep(enabled=True, relative_step=relative),
    ]
    view = LeRobotPolicyView(policy, preprocessor, postprocessor)
    torch.testing.assert_close(view.sample_chunks(both, 3), expected, rtol=1e-5, atol=1e-3)


@pytest.fixture(scope="module")
def plugin():
    """A policy as others add them to LeRobot: it queues what it sees, and draws random numbers."""
    from dataclasses import dataclass

    from lerobot.configs import NormalizationMode, PreTrainedConfig
    from lerobot.policies.pretrained import PreTrainedPolicy
    from lerobot.policies.utils import populate_queues
    from lerobot.processor import make_default_pre_post_processors

    @PreTrainedConfig.register_subclass("toy_plugin")
    @dataclass
    class ToyConfig(PreTrainedConfig):
        chunk_size: int = 5
        n_action_steps: int = 2
        observation_delta_indices = None
        action_delta_indices = tuple(range(5))
        reward_delta_indices = None

        def __post_init__(self):
            super().__post_init__()
            self.normalization_mapping = {"STATE": NormalizationMode.MEAN_STD}

        def get_optimizer_preset(self):
            raise NotImplementedError

        def get_scheduler_preset(self):
            return None

        def validate_features(self):
            pass

    class ToyPolicy(PreTrainedPolicy):
        config_class, name = ToyConfig, "toy_plugin"

        def __init__(self, config):
            super().__init__(config)
            self.gain = torch.nn.Parameter(torch.tensor(2.0))
            self.told: list = []
            self.reset()

        def reset(self):
            self._queues = {"observation.state": deque(maxlen=1), "action": deque(maxlen=2)}

        def predict_action_chunk(self, batch):
            self._queues = populate_queues(self._queues, batch, exclude_keys=["action"])
            self.told.append(batch.get("task"))
            state = self._queues["observation.state"][-1]
            return self.gain * state[:, None] + 0.1 * torch.randn(len(state), 5, 2)

        def select_action(self, batch):
            raise AssertionError("the view must not come here")

        forward = get_optim_params = select_action

    base = build_config("act", {}, SCHEMA, 5)
    policy = ToyPolicy(
        ToyConfig(
            device="cpu",
            input_features=base.input_features,
            output_features=base.output_features,
        )
    )
    return policy, *make_default_pre_post_processors(policy.config, dataset_stats=STATISTICS)


def test_a_policy_that_queues_what_it_sees_is_asked_without_its_queues(plugin):
    policy = plugin[0]
    view = LeRobotPolicyView(*plugin, task="push the T")
    queued = torch.full((1, 2), 7.0)
    policy._queues["observation.state"].append(queued)
    first, second = episode(2)
    answer = view.predict_chunk(first)
    assert view.predict_chunk(second).shape == (1, 5, 2)
    assert torch.equal(view.predict_chunk(first), answer)
    assert [each is queued for each in policy._queues["observation.state"]] == [True]
    assert policy.told[-1] == ["push the T"]
    samples = view.sample_chunks(together([first, second]), 3)
    assert samples.shape == (2, 3, 5, 2)
    assert samples.std(dim=1).min() > 0
    state = (first.state - STATISTICS["observation.state"]["mean"]) / STATISTICS[
        "observation.state"
    ]["std"]
    assert (samples[0] - 2 * state).abs().max() < 0.6  # six deviations of the noise


def damaged(**changes):
    (observation,) = episode(1)
    seen = with_history([observation], 0, 2)
    return Observation(
        images=changes.get("images", seen.images), state=changes.get("state", seen.state)
    )


@pytest.mark.parametrize(
    ("observation", "message"),
    [
        (damaged(images={"top": torch.zeros(1, 2, 3, 32, 32)}), "camera 'image' is missing"),
        (damaged(images={"image": torch.zeros(1, 2, 3, 48, 32)}), "camera 'image' has shape"),
        (damaged(images={"image": torch.zeros(1, 3, 32, 32)}), "n_obs_steps=2"),
        (damaged(state=None), "reads observation.state, but the observation has none"),
        (damaged(state=torch.zeros(1, 3, 2)), "observation.state has shape"),
    ],
)
def test_an_observation_that_does_not_fit_is_one_clear_error(diffusion, observation, message):
    with pytest.raises(ValueError, match=message):
        LeRobotPolicyView(*diffusion).predict_chunk(observation)


def test_a_query_outside_the_chunk_is_refused(diffusion):
    with pytest.raises(ValueError, match=r"must lie in 0\.\.6"):
        LeRobotPolicyView(*diffusion).predict_chunk(damaged(), queries=[7])


def test_a_folder_comes_back_with_its_own_statistics(diffusion, diffusion_folder):
    loaded = load_policy(str(diffusion_folder))
    assert loaded.kind == "lerobot"
    assert loaded.view.data_schema == SCHEMA
    observation = damaged()
    assert torch.equal(
        loaded.view.predict_chunk(observation),
        LeRobotPolicyView(*diffusion).predict_chunk(observation),
    )


def test_an_export_is_a_folder_lerobot_loads(diffusion, tmp_path):
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
    from lerobot.policies.factory import make_pre_post_processors

    view = LeRobotPolicyView(*diffusion)
    view.export_lerobot(tmp_path / "export")
    policy = DiffusionPolicy.from_pretrained(tmp_path / "export", strict=True)
    processors = make_pre_post_processors(policy.config, pretrained_path=str(tmp_path / "export"))
    observation = episode(1)[0]
    torch.manual_seed(4)
    expected = lerobot_step(policy, *processors, observation)
    chunk = view.predict_chunk(
        with_history([observation], 0, 2), [0], torch.Generator().manual_seed(4)
    )
    torch.testing.assert_close(chunk[:, 0], expected, rtol=1e-6, atol=1e-4)
    with pytest.raises(FileExistsError, match="not empty"):
        view.export_lerobot(tmp_path / "export")


def test_a_policy_saved_on_a_gpu_loads_without_one(folder):
    for name in ("config.json", "policy_preprocessor.json", "policy_postprocessor.json"):
        path = folder / name
        path.write_text(path.read_text().replace('"device": "cpu"', '"device": "cuda"'))
    assert load_lerobot_policy(folder).predict_chunk(damaged()).isfinite().all()


def edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def misnamed(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["diffusion.wrong"] = weights.pop("diffusion.unet.final_conv.1.bias")
    save_file(weights, path)


def truncated(name):
    def do(folder):
        (path,) = folder.glob(name)
        path.write_bytes(path.read_bytes()[:64])

    return do


def without_action_range(folder):
    for path in folder.glob("policy_*.safetensors"):
        save_file({k: v for k, v in load_file(path).items() if k != "action.max"}, path)


def without_postprocessor_statistics(folder):
    (path,) = folder.glob("policy_postprocessor*.safetensors")
    save_file({"observation.state.min": torch.zeros(2)}, path)


def config(key, value):
    return lambda folder: edit(folder / "config.json", lambda values: values.update({key: value}))


DAMAGES = {
    "unknown_type": (config("type", "diffusoin"), "'diffusoin' is unknown to LeRobot"),
    "unknown_field": (config("horizons", 3), "config.json: LeRobot refuses .*horizons"),
    "no_chunks": (
        lambda f: edit(f / "config.json", lambda c: (c.clear(), c.update(TDMPC))),
        "tdmpc does not predict action chunks",
    ),
    "misnamed": (misnamed, "diffusion.wrong"),
    "other_size": (config("down_dims", [16, 16]), "model.safetensors: .*size mismatch"),
    "truncated": (truncated("model.safetensors"), "model.safetensors: is damaged"),
    "truncated_statistics": (truncated("policy_pre*.safetensors"), "normalizer.*is damaged"),
    "no_processor": (
        lambda f: (f / "policy_preprocessor.json").unlink(),
        "policy_preprocessor.json: no such file.*Copy the whole policy folder",
    ),
    "no_statistics": (without_action_range, "no statistics for action .MIN_MAX needs max"),
    "no_postprocessor_statistics": (without_postprocessor_statistics, "no statistics for action"),
}
TDMPC = {
    "type": "tdmpc",
    "input_features": {"observation.state": {"type": "STATE", "shape": [2]}},
    "output_features": {"action": {"type": "ACTION", "shape": [2]}},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_one_clear_error(damage, folder):
    do, message = DAMAGES[damage]
    do(folder)
    with pytest.raises(LeRobotFormatError, match=message) as error:
        load_lerobot_policy(folder)
    assert str(folder) in str(error.value)


def test_a_missing_extra_is_named(folder, monkeypatch):
    from lerobot.utils import import_utils

    monkeypatch.setitem(import_utils._require_package_cache, "diffusers", False)
    with pytest.raises(LeRobotFormatError, match=r"pip install 'lerobot\[diffusion\]'"):
        load_lerobot_policy(folder)


@pytest.mark.parametrize(
    ("policy_type", "settings", "message"),
    [
        ("diffusion", {"horizn": 8}, "horizn is no field .*did you mean horizon"),
        ("diffusion", {"horizon": 9}, "multiple of the downsampling factor"),
        ("act", {"n_action_steps": 9}, "n_action_steps|chunk"),
        ("nothing", {}, "'nothing' is unknown to LeRobot; it has .*'diffusion'"),
    ],
)
def test_a_config_that_lerobot_refuses_is_one_clear_error(policy_type, settings, message):
    with pytest.raises(ValueError, match=message):
        build_config(policy_type, settings, SCHEMA, 8)


def test_what_the_config_leaves_open_follows_the_data():
    diffusion = build_config("diffusion", {"down_dims": [8, 16]}, SCHEMA, 12)
    assert (diffusion.horizon, diffusion.n_action_steps) == (12, 11)
    assert diffusion.pretrained_backbone_weights is None
    act = build_config("act", {}, SCHEMA, 12)
    assert (act.chunk_size, act.n_action_steps) == (12, 12)
    assert data_needs(build_config("vqbet", {}, SCHEMA, 11)).chunk_size == 11
    cameras = DataSchema({"image": (32, 32), "top": (32, 32)}, 2, 3, environment_state_dim=4)
    features = build_config("diffusion", {"down_dims": [8]}, cameras, 8).input_features
    assert list(features) == [
        "observation.image",
        "observation.images.top",
        "observation.state",
        "observation.environment_state",
    ]


def test_a_scaling_without_statistics_is_refused_before_training():
    mapping = {"VISUAL": "MEAN_STD", "STATE": "QUANTILE10", "ACTION": "MIN_MAX"}
    config = build_config("act", {"normalization_mapping": mapping}, SCHEMA, 8)
    with pytest.raises(ValueError, match=r"observation.state .QUANTILE10 needs q10 and q90"):
        processors_for(config, STATISTICS)
