"""Every config in the repository parses, and names what it is for."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import train

ROOT = Path(__file__).parent.parent
RUNNABLE = [ROOT / "configs/demo.yaml", *sorted((ROOT / "configs/experiment").glob("*.yaml"))]
EXPERIMENTS = {path.stem: path for path in RUNNABLE}
ANALYSES = sorted((ROOT / "configs/analyses").glob("*.yaml"))
REMEDIES = {
    "x_flip": "mirror: x_flip",
    "anti_diagonal": "mirror: anti_diagonal",
    "chunk_size": "chunk_size: 32",
    "ensembling": "temporal_ensemble_coeff: 0.01",
    "action_scale": "action_scale: 0.7",
}
"""What each changes in the experiment that it is put behind."""


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda path: path.stem)
def test_config_parses_with_every_class_and_argument_known(path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["fit", "-c", str(path), "--print_config"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert f"name: {path.stem}" in printed
    assert "class_path:" in printed


@pytest.mark.parametrize("path", ANALYSES, ids=lambda path: path.stem)
def test_an_analysis_is_appended_to_an_experiment(path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["fit", "-c", str(RUNNABLE[0]), "-c", str(path), "--print_config"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "callbacks.ema.EMA" in printed  # the experiment's own callbacks are still there


def test_every_remedy_is_known():
    assert {path.stem for path in (ROOT / "configs/remedies").glob("*.yaml")} == REMEDIES.keys()


@pytest.mark.parametrize("name", ["", *REMEDIES])
def test_a_remedy_changes_the_experiment_before_it(name, capsys):
    behind = ["-c", str(ROOT / f"configs/remedies/{name}.yaml")] if name else []
    with pytest.raises(SystemExit) as stopped:
        train.main(["fit", "-c", str(RUNNABLE[0]), *behind, "--print_config"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "callbacks.ema.EMA" in printed
    changed = {remedy for remedy, line in REMEDIES.items() if line in printed}
    assert changed == ({name} if name else set())


def printed_config(capsys, *paths: Path) -> dict[str, Any]:
    """What a run of several configs would be given."""
    words = [word for path in paths for word in ("-c", str(path))]
    with pytest.raises(SystemExit) as stopped:
        train.main(["fit", *words, "--print_config"])
    assert stopped.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def experiments_for(name: str) -> list[str]:
    """Those that the header of a remedy names."""
    text = (ROOT / f"configs/remedies/{name}.yaml").read_text(encoding="utf-8")
    (named,) = re.findall(r"^# For: ([\w, ]+)", text, re.MULTILINE)
    return [each.strip() for each in named.split(",") if each.strip() in EXPERIMENTS]


def image_sizes(config: dict[str, Any]) -> set[int]:
    """Of all tasks that a policy acts in."""
    return {
        callback["init_args"]["task"]["init_args"]["image_size"]
        for callback in config["trainer"]["callbacks"]
        if callback["class_path"].endswith("Rollouts")
    }


@pytest.mark.parametrize(
    ("remedy", "experiment"),
    [(name, experiment) for name in REMEDIES for experiment in experiments_for(name)],
)
def test_a_remedy_suits_every_experiment_that_its_header_names(remedy, experiment, capsys):
    path = EXPERIMENTS[experiment]
    before = printed_config(capsys, path)
    after = printed_config(capsys, path, ROOT / f"configs/remedies/{remedy}.yaml")
    assert after["model"]["class_path"] == "lightning_modules.act.ActModule"
    if remedy == "chunk_size":
        was, now = (config["data"]["init_args"]["chunk_size"] for config in (before, after))
        assert was < now
    # Pictures of another size would be refused at the start of the training.
    if image_sizes(before):
        assert image_sizes(after) == image_sizes(before)


def test_every_remedy_names_experiments():
    assert all("demo" in experiments_for(name) for name in REMEDIES)


@pytest.mark.parametrize("remedy", ["x_flip", "chunk_size"])
def test_a_remedy_for_act_is_refused_behind_another_policy(remedy, capsys):
    paths = [EXPERIMENTS["lerobot_act"], ROOT / f"configs/remedies/{remedy}.yaml"]
    assert "lerobot_act" not in experiments_for(remedy)
    with pytest.raises(SystemExit) as stopped:
        train.main(["fit", "-c", str(paths[0]), "-c", str(paths[1]), "--print_config"])
    assert stopped.value.code != 0
    capsys.readouterr()


@pytest.mark.parametrize(
    "path", [*RUNNABLE, *sorted((ROOT / "configs").glob("*/*.yaml"))], ids=lambda path: path.stem
)
def test_config_opens_with_what_it_is_for(path):
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert len(first) > 30


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda path: path.stem)
def test_experiment_states_cost_and_command(path):
    header = path.read_text(encoding="utf-8").split("name:")[0]
    assert "# Cost:" in header
    assert "# Command: python train.py" in header
