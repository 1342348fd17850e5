"""``analyze.py features``: what the files say is what the policy and its autoencoder do."""

import json
from pathlib import Path
from typing import Any

import av
import cv2
import pytest
import torch
from pusht_runs import LENGTHS, SIZE, act, data, trainer, write_pusht
from pyarrow import parquet

import analyze
from autoencoders.files import save_autoencoder
from autoencoders.fit import fit_autoencoder
from autoencoders.sae import build_autoencoder
from commands import feature_inputs
from datamodules.activations import ActivationDataModule
from features.record import read_record
from features.taps import read_activations

ROOT = Path(__file__).parents[2]
N_TOKENS, N_LATENTS, K = 6, 24, 3


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    """A policy of four held-out episodes, and autoencoders of its tokens and of its frames."""
    folder = tmp_path_factory.mktemp("inputs")
    demonstrations = write_pusht(folder / "demos.hdf5", SIZE)
    datamodule = data(demonstrations)
    run = trainer(folder, steps=2)
    run.fit(act(datamodule), datamodule)
    run.save_checkpoint(folder / "policy.ckpt")
    paths = {"policy": str(folder / "policy.ckpt"), "data": str(demonstrations)}
    for name, settings in {
        "tokens": {},
        "frames": {"per": "frame"},
        "decoder": {"layer": "decoder"},
    }.items():
        activations = ActivationDataModule(
            paths["policy"], storage="stream", progress=False, buffer_mb=8, **settings
        )
        activations.setup()
        torch.manual_seed(0)
        sae = build_autoencoder("batch_topk", d_in=activations.d_in, n_latents=N_LATENTS, k=K)
        vectors = activations.sample(1000, "train")
        fit_autoencoder(sae, vectors, 30, 32)
        sae.calibrate(activations.vectors("calibration"))
        save_autoencoder(sae, folder / name, activations.provenance)
        paths[name] = str(folder / name)
        paths[f"{name}_split"] = json.dumps(activations.split)
    return paths


def command(name: str, inputs: dict[str, str], out: Path, *more: Any, sae: str = "tokens") -> int:
    words = ["features", name, "--policy_path", inputs["policy"], "--sae_path", inputs[sae]]
    words += ["--dataset_repo_id", inputs["data"], "--output_dir", str(out)]
    return analyze.main([*words, "--device", "cpu", *map(str, more)])


def test_every_frame_is_recorded_with_the_codes_of_the_policy(inputs, tmp_path):
    assert command("record", inputs, tmp_path) == 0
    record = read_record(tmp_path)
    assert len(record) == sum(LENGTHS)
    assert len(record.positions) == N_TOKENS
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["n_frames"] == sum(LENGTHS)

    activations = ActivationDataModule(inputs["policy"], storage="stream", progress=False)
    activations.setup()
    from autoencoders.files import load_autoencoder

    sae = load_autoencoder(inputs["tokens"]).sae
    batch = activations.demonstrations.episode(3)
    codes = sae.encode(read_activations(activations.policy, batch.observation, "encoder"))
    rows = record.rows(record.episode_index == 3)
    expected = codes.amax(1)
    torch.testing.assert_close(rows.frames_by_latents(), expected, rtol=1e-3, atol=1e-3)


def test_an_autoencoder_of_frames_has_one_token(inputs, tmp_path):
    assert command("record", inputs, tmp_path, "--episode_idx", 1, sae="frames") == 0
    record = read_record(tmp_path)
    assert [position.name for position in record.positions] == ["frame"]
    assert len(record) == LENGTHS[1]


def test_features_are_described_on_held_out_episodes(inputs, tmp_path):
    assert command("describe", inputs, tmp_path, "--n_permutations", 19) == 0
    summary = json.loads((tmp_path / "features.json").read_text())
    split = json.loads(inputs["tokens_split"])
    assert summary["episodes"]["held_out"] == split["val"]
    assert not {*summary["episodes"]["train"]} & {*split["val"], *split["calibration"]}
    assert summary["behaviour"]["action_score"]["value"] <= 1
    table = parquet.read_table(tmp_path / "features.parquet")
    assert len(table) == summary["n_live"] == summary["effects"]["n_live"] or len(table) > 0
    assert {"ablated_px", "doubled_arrow_px", "r_agent_x_px"} <= {*table.column_names}
    kinds = {(score["concept"], score["basis"]) for score in summary["bases"]}
    assert ("agent_x_px", "neurons") in kinds
    for name in ("strip.png", "density.png", "concepts.png"):
        picture = cv2.imread(str(tmp_path / name))
        assert picture is not None
        assert picture.std() > 0
    assert len(read_record(tmp_path / "record_held_out")) == sum(
        LENGTHS[number] for number in split["val"]
    )


def test_frames_are_described_without_single_features_effects(inputs, tmp_path):
    words = ("--n_permutations", 0)
    assert command("describe", inputs, tmp_path, *words, sae="frames") == 0
    summary = json.loads((tmp_path / "features.json").read_text())
    assert summary["effects"] is None
    assert summary["behaviour"]["action_score"]["value"] <= 1


def live(folder: Path, n: int) -> list[int]:
    table = parquet.read_table(folder / "effects.parquet").to_pydict()
    order = sorted(range(len(table["latent"])), key=lambda row: -table["n_active_frames"][row])
    return [table["latent"][row] for row in order[:n]]


def test_steering_at_the_decoder_does_what_the_weights_foretell(inputs, tmp_path):
    words = ("--episode_idx", "all", "--n_features", 6)
    assert command("steer", inputs, tmp_path, *words, sae="decoder") == 0
    rows = parquet.read_table(tmp_path / "effects.parquet").to_pylist()
    dosed = [row for row in rows if row["dose_cosine"] is not None]
    assert 3 <= len(dosed) <= 6
    for row in dosed:
        assert row["dose_cosine"] == pytest.approx(1, abs=1e-3)
        assert row["dose_slope"] == pytest.approx(1, abs=1e-2)
    numbers = json.loads((tmp_path / "metrics.json").read_text())
    assert numbers["effects"]["n_as_foretold"] <= 6
    assert "rollouts" not in numbers


def test_rollouts_are_paired_with_controls_and_filmed(inputs, tmp_path):
    open_loop = tmp_path / "open"
    assert command("steer", inputs, open_loop, "--episode_idx", "all", "--n_features", 4) == 0
    (latent,) = live(open_loop, 1)
    words = ("--episode_idx", "all", "--latents", latent, "--clamp", 5, "--n_rollouts", 1)
    words = (*words, "--task", "pusht_runs.ShortPushT")
    closed = tmp_path / "closed"
    assert command("steer", inputs, closed, *words, "--n_controls", 1) == 0
    rollouts = json.loads((closed / "metrics.json").read_text())["rollouts"]
    assert rollouts["seeds"] == [100_000]
    assert len(rollouts["controls"]) == 1
    assert rollouts["baseline/action_change"] == 0
    assert rollouts["steered/action_change"] > 0
    with av.open(str(closed / "rollouts.mp4")) as video:
        assert video.streams.video[0].frames > 1
    for name in ("rollouts.png", "doses.png", "arrows.png"):
        assert cv2.imread(str(closed / name)) is not None


def test_perturbed_frames_are_told_at_the_promised_rate(inputs, tmp_path):
    assert command("ood", inputs, tmp_path, "--alpha", 0.5) == 0
    numbers = json.loads((tmp_path / "metrics.json").read_text())
    assert "block removed" in numbers["detection"]
    for found in numbers["detection"].values():
        for quality in found.values():
            assert 0 <= quality["auroc"]["value"] <= 1
    assert (tmp_path / "detector" / "ood.safetensors").is_file()
    assert cv2.imread(str(tmp_path / "perturbations.png")) is not None


@pytest.mark.parametrize(
    ("name", "words", "sae", "named"),
    [
        ("record", ("--layer", "decoder"), "tokens", "--layer decoder"),
        ("steer", (), "frames", "whole frames"),
        ("steer", ("--latents", "99"), "tokens", "0 to 23"),
        ("steer", ("--scale", "2"), "tokens", "--latents"),
        ("ood", ("--alpha", "0.05"), "tokens", "calibration episodes"),
        ("describe", ("--n_val_episodes", "1"), "tokens", "--n_val_episodes"),
        ("record", ("--sae_path", "nowhere"), "tokens", "nowhere"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(name, words, sae, named, inputs, tmp_path, capsys):
    assert command(name, inputs, tmp_path / "out", *words, sae=sae) == 1
    said = capsys.readouterr().err
    assert named in said
    assert said.startswith(f"analyze.py features {name}:")
    assert not (tmp_path / "out").exists()


def test_one_held_out_episode_is_too_few_before_anything_is_read(
    inputs, tmp_path, capsys, monkeypatch
):
    opened = feature_inputs.open_subject

    def with_one(arguments):
        subject = opened(arguments)
        del subject.split["val"][1:]
        return subject

    monkeypatch.setattr(feature_inputs, "open_subject", with_one)
    assert command("ood", inputs, tmp_path / "out", "--alpha", 0.5) == 1
    assert "--dataset_repo_id" in (said := capsys.readouterr().err)
    assert "an interval needs 2; give more episodes" in said
    assert not (tmp_path / "out").exists()


def test_another_policy_needs_the_users_word(inputs, tmp_path, capsys):
    datamodule = data(Path(inputs["data"]))
    run = trainer(tmp_path, steps=1)
    run.fit(act(datamodule), datamodule)
    run.save_checkpoint(tmp_path / "other.ckpt")
    others = {**inputs, "policy": str(tmp_path / "other.ckpt")}
    assert command("record", others, tmp_path / "out") == 1
    assert "--other_policy" in capsys.readouterr().err
    assert command("record", others, tmp_path / "out", "--other_policy") == 0


def test_results_are_not_overwritten_by_accident(inputs, tmp_path, capsys):
    for words, status in (((), 0), ((), 1), (("--overwrite",), 0)):
        assert command("record", inputs, tmp_path, "--episode_idx", 0, *words) == status
    assert "--overwrite" in capsys.readouterr().err


def test_the_notebook_plots_a_description(inputs, tmp_path, monkeypatch):
    import matplotlib as mpl

    assert command("describe", inputs, tmp_path, "--n_permutations", 0) == 0
    monkeypatch.setenv("FEATURES_FOLDER", str(tmp_path))
    mpl.use("Agg")
    from matplotlib import pyplot

    drawn = []
    monkeypatch.setattr(
        pyplot, "show", lambda: drawn.append(len(pyplot.gcf().axes[0].get_children()))
    )
    notebook = json.loads((ROOT / "examples" / "features.ipynb").read_text())
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    pyplot.close("all")
    assert len(drawn) == 5


@pytest.fixture(scope="module")
def in_cm(inputs, tmp_path_factory) -> dict[str, str]:
    """The same policy, said to act in cm."""
    checkpoint = torch.load(inputs["policy"], weights_only=True)
    checkpoint["hyper_parameters"]["action_unit"] = "cm"
    path = tmp_path_factory.mktemp("cm") / "policy.ckpt"
    torch.save(checkpoint, path)
    return {**inputs, "policy": str(path)}


def test_numbers_and_columns_are_called_by_the_unit_of_the_actions(in_cm, tmp_path, capsys):
    from browser.features import read_descriptions

    words = ("--n_permutations", 0, "--n_behaviour_frames", 8, "--n_effect_frames", 8)
    assert command("describe", in_cm, tmp_path / "described", *words) == 0
    summary = json.loads((tmp_path / "described/features.json").read_text())
    assert {"sae_cm", "mean_cm"} <= summary["behaviour"].keys()
    # A 512th of the board.
    assert summary["effects"]["zero_effect_below_cm"] == 1.0
    assert "move it by less than 1 cm" in capsys.readouterr().out
    named = {*summary["behaviour"], *summary["effects"]}
    described = parquet.read_table(tmp_path / "described/features.parquet").column_names
    assert {"ablated_cm", "doubled_arrow_cm"} <= {*described}
    assert not [each for each in named if each.endswith("_px")]
    assert not [
        each for each in described if each.startswith(("ablated", "doubled")) and "px" in each
    ]
    row = next(iter(read_descriptions(tmp_path / "described").rows.values()))
    assert {"ablated_px", "ablated_arrow_px", "doubled_px"} <= row.keys()

    words = ("--episode_idx", "all", "--n_features", 4, "--n_effect_frames", 32)
    assert command("steer", in_cm, tmp_path / "steered", *words, sae="decoder") == 0
    steered = parquet.read_table(tmp_path / "steered/effects.parquet").column_names
    assert {"ablated_cm", "doubled_arrow_cm", "control_95_cm"} <= {*steered}
    assert not [each for each in steered if each.endswith("_px")]


def test_without_a_task_an_effect_is_a_share_of_what_was_demonstrated(inputs, tmp_path):
    words = ("--n_permutations", 0, "--n_behaviour_frames", 8, "--n_effect_frames", 8)
    words = (*words, "--task", "envs.aloha.AlohaTransferCubeTask")
    assert command("describe", inputs, tmp_path, *words) == 0
    found = json.loads((tmp_path / "features.json").read_text())["effects"]
    datamodule = ActivationDataModule(inputs["policy"], storage="stream", progress=False)
    datamodule.setup()
    action = datamodule.demonstrations.statistics.action
    assert 0 < found["zero_effect_below_px"] <= float((action.max - action.min).max()) / 500
    assert found["zero_effect_below_px"] != 1.0
