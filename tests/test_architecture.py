"""The rooms see each other only downwards, and only callbacks and entry points know W&B."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEVELS = (
    {"policies"},
    {"landscapes", "attention", "autoencoders"},
    {"features"},
    {"lightning_modules", "datamodules", "envs", "rendering"},
    {"callbacks", "browser"},
    {"train", "analyze", "commands"},
)
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
PURE = LEVELS[0] | LEVELS[1] | LEVELS[2] | {"rendering", "envs"}
WANDB_ROOMS = {"callbacks", "train", "analyze"}
FILES = sorted(
    path for room in LEVEL_OF for path in [*ROOT.glob(f"{room}.py"), *ROOT.glob(f"{room}/**/*.py")]
)


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
    return {name.split(".")[0] for name in names}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_there_are_files_to_check():
    assert {room_of(path) for path in FILES} >= {"policies", "callbacks", "train", "analyze"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path):
    room = room_of(path)
    for other in imported_modules(path) & LEVEL_OF.keys() - {room}:
        assert LEVEL_OF[other] < LEVEL_OF[room], f"{path} in {room} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_upper_rooms_know_loggers_and_lightning(path):
    imported = imported_modules(path)
    if room_of(path) not in WANDB_ROOMS:
        assert not imported & {"wandb", "wandb_workspaces"}
    if room_of(path) in PURE:
        assert not imported & {"lightning", "pytorch_lightning"}
    assert "pytorch_lightning" not in imported  # a second copy of every class
