"""LeRobot's ACT folders: what we load acts as LeRobot does, and LeRobot acts as what we export."""

import json
import shutil

import pytest
import torch
from lerobot_folders import (
    SCHEMA,
    STATISTICS,
    episode,
    lerobot_policy,
    lerobot_step,
    write_folder,
)
from safetensors.torch import load_file, save_file

from policies.act import ACTPolicy
from policies.ensembling import ActionQueue, TemporalEnsembler
from policies.interface import DataSchema, DataStatistics, FeatureStatistics, Observation
from policies.lerobot_format import (
    LeRobotFormatError,
    export_lerobot_act,
    load_lerobot_act,
)
from policies.loading import load_policy

N_STEPS = 300
PREPROCESSOR_STATE = "policy_preprocessor_step_3_normalizer_processor.safetensors"
POSTPROCESSOR_STATE = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"


@pytest.fixture(scope="module")
def act_folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("act"), *lerobot_policy("act"))


@pytest.fixture
def folder(act_folder, tmp_path):
    """A copy to damage."""
    return shutil.copytree(act_folder, tmp_path / "policy")


def act(policy, controller, observations):
    """Let our policy act; its chunks are predicted all at once, because it has no state."""
    controller.reset()
    together = Observation(
        images={
            name: torch.cat([each.images[name] for each in observations])
            for name in policy.data_schema.cameras
        },
        state=torch.cat([each.state for each in observations]),
        environment_state=torch.cat([each.environment_state for each in observations])
        if policy.data_schema.environment_state_dim
        else None,
    )
    with torch.no_grad():
        chunks = policy.predict_chunk(together)
    return torch.cat(
        [
            controller.step(chunk[None] if controller.wants_prediction() else None)
            for chunk in chunks
        ]
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temporal_ensemble_coeff": 0.01, "n_action_steps": 1},
        {
            "n_action_steps": 7,
            "normalization_mapping": {
                "VISUAL": "IDENTITY",
                "STATE": "MIN_MAX",
                "ACTION": "MIN_MAX",
            },
        },
    ],
    ids=["queue", "ensembler", "min_max"],
)
def test_a_loaded_folder_acts_as_lerobot_for_a_whole_episode(changes, tmp_path):
    theirs = lerobot_policy("act", **changes)
    loaded = load_policy(str(write_folder(tmp_path, *theirs)))
    assert loaded.kind == "lerobot"
    observations = episode(N_STEPS)
    expected = torch.cat([lerobot_step(*theirs, each) for each in observations])
    if loaded.temporal_ensemble_coeff is None:
        controller = ActionQueue(loaded.view.n_action_steps)
    else:
        controller = TemporalEnsembler(loaded.temporal_ensemble_coeff, loaded.view.chunk_size)
    actions = act(loaded.view, controller, observations)
    assert expected.std() > 0.5  # px: the episode is not one action over and over
    # In the network's units; LeRobot's own float32 actions lie 1.2e-6 from those in float64 here.
    error = (actions - expected) / loaded.view.normaliser.action.scale
    assert error.abs().max() <= 2e-6


def test_a_constant_input_and_action_are_scaled_as_in_lerobot(tmp_path):
    mapping = {"VISUAL": "MEAN_STD", "STATE": "MIN_MAX", "ACTION": "MIN_MAX"}
    policy, pre, post = lerobot_policy("act", normalization_mapping=mapping, n_action_steps=1)
    statistics = {key: dict(values) for key, values in STATISTICS.items()}
    for key, value in (("observation.state", 300.0), ("action", 200.0)):
        for name in ("min", "max"):
            statistics[key][name] = statistics[key][name].clone()
            statistics[key][name][1] = value
    for step in (pre.steps[-1], post.steps[0]):
        step.stats = statistics
        step.to(device="cpu")
    ours = load_lerobot_act(write_folder(tmp_path, policy, pre, post)).policy
    (observation,) = episode(1)
    observation.state[0, 1] = 300.0
    expected = lerobot_step(policy, pre, post, observation)
    actions = ours.predict_chunk(observation)[:, 0].detach()
    assert (actions - expected).abs().max() <= 5e-4
    assert actions[0, 1].item() == pytest.approx(200, abs=1e-4)


@pytest.mark.parametrize("config_style", ["features", "shapes"])
def test_statistics_among_the_weights_are_read(folder, config_style):
    """Before LeRobot 0.4; LeRobot itself refuses such folders until they are converted."""
    (observation,) = episode(1)
    expected = load_lerobot_act(folder).policy.predict_chunk(observation)
    for file in folder.glob("policy_*"):
        file.unlink()
    weights = load_file(folder / "model.safetensors")
    for key, values in STATISTICS.items():
        buffer = f"buffer_{key.replace('.', '_')}"
        for group in (
            ["normalize_inputs"]
            if key != "action"
            else ["normalize_targets", "unnormalize_outputs"]
        ):
            weights[f"{group}.{buffer}.mean"] = values["mean"].clone()
            weights[f"{group}.{buffer}.std"] = values["std"].clone()
    save_file(weights, folder / "model.safetensors")
    if config_style == "shapes":
        config = json.loads((folder / "config.json").read_text())
        inputs, outputs = config.pop("input_features"), config.pop("output_features")
        config.pop("normalization_mapping")
        config.pop("type")
        config["input_shapes"] = {key: value["shape"] for key, value in inputs.items()}
        config["output_shapes"] = {key: value["shape"] for key, value in outputs.items()}
        config["input_normalization_modes"] = dict.fromkeys(inputs, "mean_std")
        config["output_normalization_modes"] = {"action": "mean_std"}
        (folder / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(
        load_lerobot_act(folder).policy.predict_chunk(observation), expected, atol=0, rtol=0
    )


def test_the_processors_decide_how_to_scale(folder):
    """LeRobot reads the mode from the processors, whatever config.json says."""
    (observation,) = episode(1)
    expected = load_lerobot_act(folder).policy.predict_chunk(observation)
    edit(folder / "config.json", lambda c: c.pop("normalization_mapping"))
    assert torch.equal(load_lerobot_act(folder).policy.predict_chunk(observation), expected)


def test_given_statistics_are_used_only_where_the_folder_has_none(folder):
    (observation,) = episode(1)
    expected = load_lerobot_act(folder).policy.predict_chunk(observation)
    other = {
        key: {name: value + 1 for name, value in values.items()}
        for key, values in STATISTICS.items()
    }
    assert torch.equal(load_lerobot_act(folder, other).policy.predict_chunk(observation), expected)
    for file in folder.glob("policy_*"):
        file.unlink()
    bare = load_lerobot_act(folder, STATISTICS).policy
    torch.testing.assert_close(bare.predict_chunk(observation), expected, atol=1e-4, rtol=0)


VARIANTS = {
    "default": {},
    "two_cameras": {"cameras": {"top": [32, 32], "image": [32, 48]}},
    "environment_state": {"environment_state_dim": 4},
    "no_latent_pre_norm": {"use_latent": False, "pre_norm": True},
    "two_decoder_layers": {"n_decoder_layers": 2, "feedforward_activation": "gelu"},
    "min_max": {"action_normalisation": "min_max", "state_normalisation": "min_max"},
    "relative": {"relative_actions": True, "n_action_steps": 1},
}


def our_policy(**changes) -> ACTPolicy:
    torch.manual_seed(0)
    policy = ACTPolicy(
        **{
            "cameras": {"image": [32, 32]},
            "state_dim": 2,
            "action_dim": 2,
            "chunk_size": 6,
            "n_action_steps": 4,
            "dim_model": 32,
            "n_heads": 4,
            "dim_feedforward": 48,
            "n_encoder_layers": 2,
            "n_posterior_layers": 1,
            "latent_dim": 6,
            **changes,
        }
    ).eval()
    policy.fit_normaliser(statistics_of(policy.data_schema))
    return policy


def statistics_of(schema: DataSchema) -> DataStatistics:
    def feature(dim: int, low: float, high: float) -> FeatureStatistics:
        spread = torch.arange(1, dim + 1) / dim
        return FeatureStatistics(
            mean=low + (high - low) / 2 * spread,
            std=(high - low) / 5 * spread,
            min=torch.full((dim,), low),
            max=low + (high - low) * spread,
            q01=torch.full((dim,), low),
            q99=low + (high - low) * spread,
        )

    return DataStatistics(
        images={camera: feature(3, 0.0, 1.0) for camera in schema.cameras},
        state=feature(2, 10.0, 500.0),
        action=feature(2, 12.0, 511.0),
        relative_action=feature(2, -60.0, 60.0),
        environment_state=feature(schema.environment_state_dim, 0.0, 512.0)
        if schema.environment_state_dim
        else None,
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_lerobot_runs_what_we_export(variant, tmp_path):
    from lerobot.policies.act.modeling_act import ACTPolicy as LeRobotACTPolicy
    from lerobot.policies.factory import make_pre_post_processors

    ours = our_policy(**VARIANTS[variant])
    export_lerobot_act(ours, tmp_path / "export")
    theirs = LeRobotACTPolicy.from_pretrained(tmp_path / "export", strict=True)
    processors = make_pre_post_processors(theirs.config, pretrained_path=str(tmp_path / "export"))
    observations = episode(10, ours.data_schema)
    expected = act(ours, ActionQueue(ours.n_action_steps), observations)
    actions = torch.cat([lerobot_step(theirs, *processors, each) for each in observations])
    # Bounds in units of the action's deviation: float32 resolves 6e-5 px at 512 px.
    assert ((actions - expected).abs() / ours.normaliser.action.scale).max() <= 1e-5
    assert (actions - expected).abs().max() <= 3e-4


def test_an_export_that_ensembles_acts_as_ours(tmp_path):
    from lerobot.policies.act.modeling_act import ACTPolicy as LeRobotACTPolicy
    from lerobot.policies.factory import make_pre_post_processors

    ours = our_policy()
    export_lerobot_act(ours, tmp_path / "export", temporal_ensemble_coeff=-0.2)
    theirs = LeRobotACTPolicy.from_pretrained(tmp_path / "export", strict=True)
    processors = make_pre_post_processors(theirs.config, pretrained_path=str(tmp_path / "export"))
    observations = episode(12)
    actions = torch.cat([lerobot_step(theirs, *processors, each) for each in observations])
    expected = act(ours, TemporalEnsembler(-0.2, ours.chunk_size), observations)
    assert (actions - expected).abs().max() <= 3e-4


def test_an_export_comes_back_as_it_was(tmp_path):
    ours = our_policy(relative_actions=True, n_action_steps=1)
    export_lerobot_act(ours, tmp_path / "export")
    back = load_lerobot_act(tmp_path / "export").policy
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], value, atol=2e-8, rtol=1e-7)
    assert back.relative_actions
    assert back.data_schema == ours.data_schema


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"backbone": "small_cnn", "token_stride": 8}, "backbone small_cnn"),
        ({"backbone_norm": "group"}, "backbone_norm group"),
        ({"token_stride": 16}, "token_stride 16"),
        ({"relative_actions": True}, "relative_actions with a queue of n_action_steps=4"),
    ],
)
def test_what_lerobot_cannot_represent_is_refused_by_name(changes, problem, tmp_path):
    with pytest.raises(LeRobotFormatError, match=problem):
        export_lerobot_act(our_policy(**changes), tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_an_export_overwrites_nothing(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        export_lerobot_act(our_policy(), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def without_action_statistics(folder):
    for name in (PREPROCESSOR_STATE, POSTPROCESSOR_STATE):
        edit_tensors(folder / name, lambda t: [t.pop(key) for key in list(t) if "action" in key])


def without_processors(folder):
    for file in folder.glob("policy_*"):
        file.unlink()


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def misnamed(folder):
    edit_tensors(
        folder / "model.safetensors",
        lambda t: t.update({"model.action_head.wieght": t.pop("model.action_head.weight")}),
    )


def partly_relative(folder):
    step = {
        "registry_name": "relative_actions_processor",
        "config": {"enabled": True, "exclude_joints": ["gripper"], "action_names": ["x", "y"]},
    }
    edit(folder / "policy_preprocessor.json", lambda c: c["steps"].insert(3, step))


def config(key, value):
    return lambda folder: edit(folder / "config.json", lambda c: c.update({key: value}))


def outside(folder):
    edit(
        folder / "policy_preprocessor.json",
        lambda c: c["steps"][3].update(state_file="../stats.safetensors"),
    )


THREE_ACTIONS = {"action": {"type": "ACTION", "shape": [3]}}
DAMAGES = {
    "no_statistics": (without_action_statistics, "no statistics for action"),
    "no_processors": (without_processors, "no statistics for observation.image .*action"),
    "truncated": (truncated, "model.safetensors: is damaged"),
    "no_weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: no such"),
    "unknown_tensor": (misnamed, "unknown tensor model.action_head.wieght"),
    "wrong_type": (config("type", "diffusion"), "type is 'diffusion', not 'act'"),
    "other_action": (
        config("output_features", THREE_ACTIONS),
        "model.action_head.weight has shape",
    ),
    "no_features": (
        config("input_features", None),
        "config.json: a value is missing or of a wrong kind",
    ),
    "no_config": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "no_json": (lambda f: (f / "config.json").write_text("{"), "config.json: holds no JSON"),
    "heads": (config("n_heads", 5), "cannot build an ACT"),
    "dilation": (config("replace_final_stride_with_dilation", True), "dilation"),
    "outside": (outside, "leads out of"),
    "partly_relative": (partly_relative, r"some dimensions only \(not in \['gripper'\]\)"),
    "other_statistics": (
        lambda f: edit_tensors(
            f / PREPROCESSOR_STATE, lambda t: t.update({"observation.state.mean": torch.ones(5)})
        ),
        "observation.state: statistics have",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_one_clear_error(damage, folder):
    do, message = DAMAGES[damage]
    do(folder)
    with pytest.raises(LeRobotFormatError, match=message) as error:
        load_lerobot_act(folder)
    assert str(folder) in str(error.value)


def test_schema_names_cameras_as_the_data_does(act_folder):
    assert load_lerobot_act(act_folder).policy.data_schema == SCHEMA
