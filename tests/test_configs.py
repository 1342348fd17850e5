"""Every config in the repository parses, and names what it is for."""

from pathlib import Path

import pytest

import train

ROOT = Path(__file__).parent.parent
RUNNABLE = [ROOT / "configs/demo.yaml", *sorted((ROOT / "configs/experiment").glob("*.yaml"))]
ANALYSES = sorted((ROOT / "configs/analyses").glob("*.yaml"))


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
