"""A checkpoint meets other cameras or dimensions than it was made for: refused, all are named."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Trainer

from callbacks.checkpoints import AtomicCheckpointIO
from lightning_modules.act import ActModule
from policies.checkpoint_files import read_checkpoint
from policies.interface import DataSchema

pytestmark = pytest.mark.fault(15)

SCHEMA = DataSchema(
    cameras={"top": (16, 16), "wrist": (16, 16)}, state_dim=2, action_dim=2, environment_state_dim=0
)


def module(schema: DataSchema) -> ActModule:
    return ActModule(
        cameras={name: list(size) for name, size in schema.cameras.items()},
        state_dim=schema.state_dim,
        action_dim=schema.action_dim,
        chunk_size=3,
        dim_model=16,
        n_heads=2,
        dim_feedforward=16,
        n_encoder_layers=1,
        n_posterior_layers=1,
        backbone="small_cnn",
        backbone_width=8,
        token_stride=8,
    )


def saved(file: Path) -> dict[str, Any]:
    """A checkpoint that was written for the schema, read again."""
    made = module(SCHEMA)
    # The normaliser is not fitted, and what is not finite would not be saved.
    checkpoint: dict[str, Any] = {"state_dict": {}}
    made.on_save_checkpoint(checkpoint)
    AtomicCheckpointIO().save_checkpoint(checkpoint, file)
    return read_checkpoint(file)


def load(checkpoint: dict[str, Any], schema: DataSchema) -> None:
    """Load it beside other data."""
    other: Any = module(schema)
    other._trainer = object.__new__(Trainer)
    other._trainer.datamodule = SimpleNamespace(data_schema=schema)
    other.on_load_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"cameras": {"top": (24, 24), "wrist": (16, 16)}}, r"16.* != .*24"),
        ({"cameras": {"front": (16, 16), "wrist": (16, 16)}}, r"top.* != .*front"),
        ({"cameras": {"top": (16, 16)}}, r"wrist"),
        ({"state_dim": 7}, r"state_dim.*2 != 7"),
        ({"action_dim": 7}, r"action_dim.*2 != 7"),
        ({"state_dim": 3, "action_dim": 7}, r"state_dim.*2 != 3.*action_dim.*2 != 7"),
    ],
    ids=["size", "name", "missing camera", "state", "action", "both"],
)
def test_other_data_are_refused_and_every_difference_is_named(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    checkpoint = saved(tmp_path / "policy.ckpt")
    before = (tmp_path / "policy.ckpt").read_bytes()
    with pytest.raises(ValueError, match=named) as refused:
        load(checkpoint, replace(SCHEMA, **changes))
    assert "Use the data set it was trained on" in str(refused.value)
    assert (tmp_path / "policy.ckpt").read_bytes() == before


def test_the_same_data_are_taken(tmp_path: Path) -> None:
    load(saved(tmp_path / "policy.ckpt"), SCHEMA)
