"""``analyze.py rollout`` and ``export`` from the outside, on a small untrained policy."""

import json

import pytest
import torch

import analyze
from callbacks.checkpoints import AtomicCheckpointIO
from commands.rollout import variants
from lightning_modules.act import ActModule
from lightning_modules.data_schema import SCHEMA_KEY
from policies.checkpoint_files import CHECKPOINT_FORMAT, MARK_KEY
from policies.lerobot_format import load_lerobot_act
from policies.loading import LoadedPolicy, load_policy
from policies.normalisation import AffineFeature


def save_policy(path, **changes):
    torch.manual_seed(0)
    arguments = {
        "cameras": {"image": [32, 32]},
        "state_dim": 2,
        "action_dim": 2,
        "chunk_size": 6,
        "n_action_steps": 3,
        "dim_model": 16,
        "n_heads": 2,
        "dim_feedforward": 16,
        "n_encoder_layers": 1,
        "n_posterior_layers": 1,
        "latent_dim": 4,
        "backbone": "small_cnn",
        "token_stride": 8,
        **changes,
    }
    module = ActModule(**arguments)
    for feature in module.policy.normaliser.modules():
        if isinstance(feature, AffineFeature):
            feature.set(
                torch.full_like(feature.offset, 256.0), torch.full_like(feature.scale, 80.0)
            )
    checkpoint = {
        MARK_KEY: {"checkpoint_format": CHECKPOINT_FORMAT},
        SCHEMA_KEY: module.policy.data_schema.to_dict(),
        "hyper_parameters": dict(module.hparams),
        "state_dict": module.state_dict(),
    }
    AtomicCheckpointIO().save_checkpoint(checkpoint, path)
    return path


@pytest.fixture
def checkpoint(tmp_path):
    return save_policy(tmp_path / "policy.ckpt")


def rollout(policy, folder, *more):
    return analyze.main(
        [
            "rollout",
            "--policy_path",
            str(policy),
            "--output_dir",
            str(folder),
            "--n_episodes",
            "2",
            "--n_videos",
            "1",
            "--device",
            "cpu",
            *more,
        ]
    )


def test_one_row_a_variant_with_intervals_and_a_video(checkpoint, tmp_path, capsys):
    folder = tmp_path / "out"
    more = ("--n_action_steps", "2", "6", "--temporal_ensemble_coeff", "0.01")
    assert rollout(checkpoint, folder, *more, "--task", "pusht_runs.ShortPushT") == 0
    result = json.loads((folder / "rollout.json").read_text())
    assert result["complete"]
    assert [row["variant"] for row in result["rows"]] == ["queue2", "queue6", "ensemble0.01"]
    for row in result["rows"]:
        summary = row["summary"]
        low, high = summary["mean_max_coverage_low"], summary["mean_max_coverage_high"]
        assert low <= summary["mean_max_coverage"] <= high
        assert [episode["seed"] for episode in row["episodes"]] == [100_000, 100_001]
        assert (folder / row["video"]).stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "queue2" in printed
    assert "ensemble0.01" in printed
    # A second call does not overwrite.
    assert rollout(checkpoint, folder) == 1
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--n_action_steps", "7"), "predicts chunks of 6"),
        (("--n_episodes", "0"), "--n_episodes is 0"),
        (("--device", "cuda:9"), "no CUDA device"),
        (("--task", "envs.push_t.Nowhere"), "no such class"),
        (("--task", "pathlib.Path"), "is no envs.task.Task"),
    ],
)
def test_wrong_arguments_are_one_line_and_leave_nothing(
    checkpoint, tmp_path, capsys, more, message
):
    if message == "no CUDA device" and torch.cuda.is_available():
        pytest.skip("there is one")
    assert rollout(checkpoint, tmp_path / "out", *more) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "nowhere" / "x", "no such file or folder"),
        (lambda path: path, "holds neither config.json"),
    ],
)
def test_a_path_without_a_policy_says_what_was_looked_for(tmp_path, capsys, make, message):
    assert rollout(make(tmp_path), tmp_path / "out") == 1
    assert message in capsys.readouterr().err


def test_a_policy_of_another_task_is_refused(tmp_path, capsys):
    policy = save_policy(tmp_path / "other.ckpt", cameras={"wrist": [32, 32]})
    assert rollout(policy, tmp_path / "out") == 1
    assert "PushT has one square camera" in capsys.readouterr().err


def test_the_policys_own_way_of_acting_is_the_default(checkpoint):
    policy = load_policy(str(checkpoint))
    assert [variant.name for variant in variants(policy, [], [])] == ["queue3"]
    ensembled = LoadedPolicy(policy.view, policy.source, "lerobot", temporal_ensemble_coeff=0.05)
    assert [variant.name for variant in variants(ensembled, [], [])] == ["ensemble0.05"]


def test_an_exported_policy_comes_back_with_the_same_actions(tmp_path, capsys):
    checkpoint = save_policy(tmp_path / "resnet.ckpt", backbone="resnet18", token_stride=32)
    folder = tmp_path / "export"
    words = ["export", "--policy_path", str(checkpoint), "--output_dir", str(folder)]
    assert analyze.main([*words, "--n_action_steps", "4"]) == 0
    assert "lerobot-eval" in capsys.readouterr().out
    ours, theirs = load_policy(str(checkpoint)).view, load_lerobot_act(folder).policy
    assert theirs.n_action_steps == 4
    from policies.interface import Observation

    observation = Observation({"image": torch.rand(2, 3, 32, 32)}, torch.rand(2, 2) * 512)
    with torch.no_grad():
        torch.testing.assert_close(
            theirs.predict_chunk(observation), ours.predict_chunk(observation), atol=1e-3, rtol=0
        )
    assert analyze.main(words) == 1
    assert "is not empty" in capsys.readouterr().err


def test_what_lerobot_cannot_represent_is_named(tmp_path, capsys):
    policy = save_policy(tmp_path / "small.ckpt", relative_actions=True)
    words = ["export", "--policy_path", str(policy), "--output_dir", str(tmp_path / "export")]
    assert analyze.main(words) == 1
    message = capsys.readouterr().err
    assert "backbone small_cnn" in message
    assert "relative_actions with a queue of n_action_steps=3" in message
    assert not (tmp_path / "export").exists()
