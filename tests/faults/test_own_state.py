"""What every experiment puts into a checkpoint is plain values, or we could not load our own."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from toy import same

import train
from callbacks.checkpoints import AtomicCheckpointIO
from policies.checkpoint_files import read_checkpoint

pytestmark = [pytest.mark.fault(22), pytest.mark.filterwarnings("ignore::UserWarning")]

ROOT = Path(__file__).parents[2]
EXPERIMENTS = sorted((ROOT / "configs" / "experiment").glob("*.yaml"))
LINKED = {
    "cameras": {"image": [96, 96]},
    "state_dim": 2,
    "action_dim": 2,
    "chunk_size": 16,
    "d_in": 64,
}
"""What a data module would tell the model."""


def configured(file: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    with pytest.raises(SystemExit):
        train.main(["fit", "-c", str(file), "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


def build(described: Mapping[str, Any]) -> Any:
    """Make what a ``class_path`` describes."""
    room, _, name = described["class_path"].rpartition(".")
    return getattr(importlib.import_module(room), name)(**(described.get("init_args") or {}))


def odd_values(value: Any, where: str = "") -> list[str]:
    """Name what is neither a tensor nor a value that JSON has."""
    if isinstance(value, Mapping):
        return [odd for key in value for odd in odd_values(value[key], f"{where}.{key}")]
    if isinstance(value, list | tuple):
        return [odd for i, each in enumerate(value) for odd in odd_values(each, f"{where}[{i}]")]
    plain = type(value) in {bool, int, float, str, type(None)}
    return [] if plain or isinstance(value, torch.Tensor) else [f"{where}: {type(value)}"]


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_what_an_experiment_saves_loads_as_plain_values(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(file, capsys)
    model = config["model"]
    arguments = dict(model["init_args"])
    known = importlib.import_module(model["class_path"].rpartition(".")[0])
    kind = getattr(known, model["class_path"].rpartition(".")[2])
    linked = {
        "SAEModule": ("d_in",),
        "ActModule": ("cameras", "state_dim", "action_dim", "chunk_size"),
        "LeRobotPolicyModule": ("cameras", "state_dim", "action_dim", "chunk_size"),
    }[kind.__name__]
    arguments |= {key: LINKED[key] for key in linked}
    if "chunk_size" in linked:
        arguments["chunk_size"] = config["data"]["init_args"]["chunk_size"]
    arguments = {
        key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()
    }
    # No weights are downloaded to look at what is saved beside them.
    arguments |= {"backbone_weights": None} if "backbone_weights" in arguments else {}
    module = kind(**arguments)
    # Those that take a task keep the same state as the diagnostics among these.
    callbacks = [
        build(each)
        for each in config["trainer"]["callbacks"]
        if "class_path" not in str(each.get("init_args"))
    ]
    checkpoint: dict[str, Any] = {
        "state_dict": {"one": torch.zeros(())},
        "hyper_parameters": dict(module.hparams),
        "callbacks": {each.state_key: each.state_dict() for each in callbacks},
    }
    module.on_save_checkpoint(checkpoint)
    assert odd_values(checkpoint) == []
    AtomicCheckpointIO().save_checkpoint(checkpoint, tmp_path / "own.ckpt")
    again = read_checkpoint(tmp_path / "own.ckpt")
    assert [entry for key in checkpoint for entry in same(again[key], checkpoint[key], key)] == []
