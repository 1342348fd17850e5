"""A configuration is code: a stranger's is not run unasked, and a broken one is one error."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from toy_runs import CONFIG, ROOT, errors_in, exit_code, last, write_config

from callbacks.run_config import ConfigError, check_config

pytestmark = [pytest.mark.fault(25), pytest.mark.filterwarnings("ignore")]

OURS = {
    "model": {"class_path": "lightning_modules.act.ActModule"},
    "data": {"class_path": "datamodules.hdf5.HDF5DataModule", "init_args": {"path": "demo.hdf5"}},
}


def callback(**arguments: Any) -> dict[str, Any]:
    path = "lightning.pytorch.callbacks.LambdaCallback"
    return {"trainer": {"callbacks": [{"class_path": path, "init_args": arguments}]}}


STRANGERS: dict[str, dict[str, Any]] = {
    "class": {"data": {"class_path": "trap.Data"}},
    "short form": {"model": "trap.Model"},
    "text": {"model": '{"class_path": "trap.Model"}'},
    "text in text": {"model": '"{class_path: trap.Model}"'},
    "in a list": {"trainer": {"callbacks": ["trap.Callback"]}},
    "function": callback(setup="os.system"),
    "partial": callback(
        setup={"class_path": "functools.partial", "init_args": {"func": "os.abort"}}
    ),
    "bare name": {"trainer": {"callbacks": [{"class_path": "LambdaCallback"}]}},
    "hub": {"model": {"class_path": "torch.hub.load"}},
    "spaces": {"model": {"class_path": "  trap.Model "}},
    "like ours": {"model": {"class_path": "callbacks_.x.Model"}},
    "among runs": {"data": {"class_path": "outputs.trap.Data"}},
    "logger": {"trainer": {"logger": {"class_path": "subprocess.Popen"}}},
}


INCLUDED: dict[str, tuple[dict[str, Any], str]] = {
    "text file": ({"model": "other"}, "class_path: trap.Model\n"),
    "arguments": (
        {"model": {"class_path": "lightning_modules.act.ActModule", "init_args": "other"}},
        "optimizer: {class_path: trap.Model}\n",
    ),
    "callbacks": ({"trainer": {"callbacks": "other"}}, "[{class_path: trap.C}]\n"),
    "a callback": ({"trainer": {"callbacks": ["other"]}}, "class_path: trap.C\n"),
    "trainer": ({"trainer": "other"}, "callbacks: [{class_path: trap.C}]\n"),
    "configuration": ({"config": "other"}, "model: {class_path: trap.C}\n"),
    "lambda": (
        {"trainer": {"callbacks": ["other"]}},
        "{class_path: lightning.pytorch.callbacks.LambdaCallback, init_args: {setup: trap.C}}\n",
    ),
    "way out": (
        {"model": "other"},
        "class_path: callbacks.run_folder.os.abort\n",
    ),
}
ORDERS = [
    ["-c", "sent/top.yaml", "fit", "--safe"],
    ["--config=sent/top.yaml", "fit", "--safe"],
    ["fit", "--safe", "--model", "sent/other"],
    ["fit", "--safe", "--data=sent/other"],
    ["fit", "--safe=true", "-c", "sent/config.yaml"],
    ["fit", "-csent/config.yaml", "--safe"],
    ["-c", "sent/asks.yaml", "fit"],
]


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Path]:
    """Make a run folder as a stranger would send it; its classes tell when they are imported."""
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, tmp_path / "outputs"):
        folder.mkdir(exist_ok=True)
        (folder / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n")
    (tmp_path / "callbacks_").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(config: Any) -> Path:
        file = tmp_path / "sent" / "checkpoints" / "last.ckpt"
        file.parent.mkdir(parents=True)
        torch.save({"policyscope": {"checkpoint_format": 1}, "state_dict": {}}, file)
        text = config if isinstance(config, str) else yaml.safe_dump({**OURS, **config})
        (tmp_path / "sent" / "config.yaml").write_text(text)
        return file

    return make


@pytest.mark.parametrize("subcommand", ["fit", "validate"])
@pytest.mark.parametrize("kind", STRANGERS)
def test_a_strangers_configuration_imports_and_calls_nothing(
    stranger: Callable[[Any], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    subcommand: str,
) -> None:
    file = stranger(STRANGERS[kind])
    assert exit_code(subcommand, "--ckpt_path", str(file)) == 1
    (error,) = errors_in(capsys.readouterr().err)
    assert "config.yaml: names" in error
    assert "give it with -c" in error
    assert not (tmp_path / "sprung").exists()
    # Read and trusted without reason, it is refused all the same when asked to be.
    config = str(tmp_path / "sent" / "config.yaml")
    assert exit_code(subcommand, "-c", config, "--safe") == 1
    (error,) = errors_in(capsys.readouterr().err)
    assert "config.yaml: names" in error
    assert not (tmp_path / "sprung").exists()
    assert "trap" not in sys.modules


def test_an_included_file_is_checked_too(stranger: Callable[[Any], Path], tmp_path: Path) -> None:
    stranger({"model": "other.yaml"})
    (tmp_path / "sent" / "other.yaml").write_text("class_path: trap.Model\n")
    with pytest.raises(ConfigError, match=r"names 'trap\.Model'"):
        check_config(tmp_path / "sent" / "config.yaml")


@pytest.mark.parametrize("name", ["other", "other.txt", "other.YAML"])
@pytest.mark.parametrize("kind", INCLUDED)
def test_no_file_that_the_parser_reads_imports_anything(
    stranger: Callable[[Any], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    name: str,
) -> None:
    config, text = INCLUDED[kind]
    file = stranger(yaml.safe_load(yaml.safe_dump(config).replace("other", name)))
    (tmp_path / "sent" / name).write_text(text)
    assert exit_code("fit", "--ckpt_path", str(file)) in {1, 2}
    errors_in(capsys.readouterr().err)
    assert not (tmp_path / "sprung").exists()
    assert "trap" not in sys.modules


@pytest.mark.parametrize("words", ORDERS, ids=" ".join)
def test_safety_is_seen_wherever_it_is_asked_for(
    stranger: Callable[[Any], Path], tmp_path: Path, words: list[str]
) -> None:
    strange = {**OURS, "model": {"class_path": "trap.Model"}}
    stranger(strange)
    sent = tmp_path / "sent"
    (sent / "top.yaml").write_text(yaml.safe_dump({"fit": strange}))
    (sent / "asks.yaml").write_text(yaml.safe_dump({"fit": {**strange, "safe": True}}))
    (sent / "other").write_text("class_path: trap.Model\n")
    assert exit_code(*words) in {1, 2}
    assert not (tmp_path / "sprung").exists()


def test_the_project_works_safely_and_trust_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    demo = str(ROOT / "configs" / "demo.yaml")
    assert exit_code("fit", "-c", demo, "--safe", "--print_config") == 0
    assert "class_path: lightning_modules.act.ActModule" in capsys.readouterr().out
    write_config(tmp_path)
    assert exit_code("fit", "-c", "toy.yaml", "--print_config") == 0
    assert exit_code("fit", "-c", "toy.yaml", "--safe", "--print_config") == 1


def test_a_class_that_fails_is_told_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    source = "from toy import ToyData\nclass Bad(ToyData):\n    def __init__(self):\n"
    (tmp_path / "bad_data.py").write_text(f"{source}        raise RuntimeError('no such thing')\n")
    write_config(tmp_path)
    assert exit_code("fit", "-c", "toy.yaml", "--data", "bad_data.Bad") == 1
    (error,) = errors_in(capsys.readouterr().err)
    assert "bad_data.py:4: RuntimeError: no such thing" in error
    assert not [path for path in (tmp_path / "outputs").rglob("*") if path.is_file()]


def test_a_key_of_the_configuration_asks_for_safety_as_well(
    stranger: Callable[[Any], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stranger({"safe": True, "model": {"class_path": "trap.Model"}})
    assert exit_code("fit", "-c", str(tmp_path / "sent" / "config.yaml")) == 1
    assert "names 'trap.Model'" in capsys.readouterr().err
    assert not (tmp_path / "sprung").exists()


BOMB = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB, "values, aliases repeated"),
        ("[" * 5000, "not a readable YAML file"),
        ("a: " + "x" * 2**21, "larger than"),
        ("\x00", "not a readable YAML file"),
        ("- 1\n- 2\n", "must be a YAML mapping"),
        ("a: !!python/object/apply:os.system ['touch sprung']", "not a readable YAML file"),
        ("a: 2001-99-99", "not a readable YAML file"),
        ("loop.yaml", "must be a YAML mapping"),
    ],
)
def test_a_file_that_is_no_configuration_is_one_error(
    stranger: Callable[[Any], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    text: str,
    reason: str,
) -> None:
    file = stranger(text)
    for words in (["--ckpt_path", str(file)], ["-c", str(tmp_path / "sent" / "config.yaml")]):
        assert exit_code("fit", *words) == 1
        (error,) = errors_in(capsys.readouterr().err)
        assert reason in error
    assert not (tmp_path / "sprung").exists()


def test_files_that_include_each_other_end(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: b.yaml")
    (tmp_path / "b.yaml").write_text("model: a.yaml")
    with pytest.raises(ConfigError):
        check_config(tmp_path / "a.yaml")


def test_a_run_of_ones_own_needs_no_configuration_elsewhere_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Classes of the user's own are taken from the user's own runs only."""
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path)
    assert exit_code("fit", "-c", "toy.yaml", "--trainer.max_steps", "4") == 0
    checkpoint = last(tmp_path) / "checkpoints" / "last.ckpt"
    assert exit_code("validate", "--ckpt_path", str(checkpoint)) == 0
    shutil.copytree(last(tmp_path), tmp_path / "copy")
    capsys.readouterr()
    copied = str(tmp_path / "copy" / "checkpoints" / "last.ckpt")
    assert exit_code("validate", "--ckpt_path", copied) == 1
    assert "names 'toy." in capsys.readouterr().err
    assert exit_code("validate", "--ckpt_path", copied, "-c", "toy.yaml") == 0
    assert CONFIG["name"] == "toy"


@pytest.mark.parametrize("file", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda f: f.stem)
def test_every_configuration_of_the_project_is_safe(file: Path) -> None:
    if "sweeps" in file.parts:
        pytest.skip("names classes of Optuna; train.py does not read it")
    check_config(file)
