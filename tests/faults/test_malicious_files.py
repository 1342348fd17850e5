"""Rows 21 and 25: files of strangers are read, never run."""

import ast
import json
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from lerobot_folders import lerobot_policy, write_folder

import analyze
from callbacks.checkpoints import AtomicCheckpointIO
from policies.checkpoint_files import CheckpointError, newest_valid_checkpoint, read_checkpoint
from policies.lerobot_format import LeRobotFormatError, load_lerobot_act
from policies.lerobot_view import RUNS_FOREIGN_CODE, load_lerobot_policy
from policies.loading import PolicyNotFoundError, load_policy

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path
    for path in ROOT.rglob("*.py")
    if not {".venv", "tests", "benchmarks", "examples"} & set(path.relative_to(ROOT).parts)
)
PIPES_OF_OUR_OWN = {"envs/collecting.py", "envs/demonstrations.py"}
"""Where only our own child process writes what is unpickled."""
EXECUTORS = {
    *(("pickle", name) for name in ("load", "loads", "Unpickler")),
    *(("yaml", name) for name in ("load", "load_all", "unsafe_load", "full_load")),
    *((module, "load") for module in ("dill", "joblib", "cloudpickle", "marshal", "shelve")),
    *(("builtins", name) for name in ("eval", "exec")),
}


# Row 21


class Evil:
    """Leaves a file when it is unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> Any:
        return Path.touch, (self.victim,)


def zipped(path: Path, victim: Path) -> None:
    torch.save({"policyscope": {"checkpoint_format": 1}, "state_dict": Evil(victim)}, path)


def among_hyper_parameters(path: Path, victim: Path) -> None:
    saved = {"policyscope": {"checkpoint_format": 1}, "state_dict": {}, "hyper_parameters": {}}
    torch.save({**saved, "hyper_parameters": {"lr": Evil(victim)}}, path)


def plain(path: Path, victim: Path) -> None:
    path.write_bytes(pickle.dumps(Evil(victim)))


def old_torch(path: Path, victim: Path) -> None:
    torch.save(Evil(victim), path, _use_new_zipfile_serialization=False)


def analyzed(path: Path) -> None:
    status = analyze.main(
        ["export", "--policy_path", str(path), "--output_dir", str(path.parent / "export")]
    )
    if status:
        raise CheckpointError("said on standard error")


def as_last(path: Path) -> None:
    shutil.copy(path, path.with_name("last.ckpt"))
    newest_valid_checkpoint(path.parent)


def of_a_run(path: Path) -> None:
    run = path.parent / "run"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copy(path, run / "checkpoints" / "last.ckpt")
    load_policy(str(run))


def by_lightning(path: Path) -> None:
    AtomicCheckpointIO().load_checkpoint(path, weights_only=False)


@pytest.mark.fault(21)
@pytest.mark.parametrize("write", [zipped, among_hyper_parameters, plain, old_torch])
@pytest.mark.parametrize("read", [read_checkpoint, as_last, of_a_run, by_lightning, analyzed])
def test_a_malicious_checkpoint_is_refused_and_does_not_run(
    write: Callable[[Path, Path], None], read: Callable[[Path], Any], tmp_path: Path
) -> None:
    victim = tmp_path / "executed"
    write(tmp_path / "evil.ckpt", victim)
    with pytest.raises(CheckpointError):
        read(tmp_path / "evil.ckpt")
    assert not victim.exists()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """Serves a malicious checkpoint; the address of it, and what was asked for."""
    zipped(tmp_path / "evil.ckpt", tmp_path / "executed")
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write((tmp_path / "evil.ckpt").read_bytes())

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{listening.server_port}/evil.ckpt", asked
    listening.shutdown()
    thread.join()
    listening.server_close()


@pytest.mark.fault(21)
@pytest.mark.parametrize("read", [read_checkpoint, load_policy, by_lightning])
def test_an_address_is_refused_before_anybody_is_asked(
    read: Callable[[str], Any], server: tuple[str, list[str]], tmp_path: Path
) -> None:
    address, asked = server
    with pytest.raises((CheckpointError, PolicyNotFoundError), match=r"local files only|no such"):
        read(address)
    assert not asked
    assert not (tmp_path / "executed").exists()


@pytest.mark.fault(21)
def test_no_source_unpickles_or_evaluates_what_it_reads() -> None:
    found = []
    for path in SOURCES:
        name = str(path.relative_to(ROOT))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            module, _, function = called.rpartition(".")
            keywords = {each.arg: ast.unparse(each.value) for each in node.keywords}
            is_unsafe = (
                (module or "builtins", function) in EXECUTORS
                or (called == "torch.load" and keywords.get("weights_only") != "True")
                or keywords.get("allow_pickle") == "True"
                or keywords.get("trust_remote_code") == "True"
                or function == "load_from_checkpoint"
            )
            if is_unsafe and name not in PIPES_OF_OUR_OWN:
                found.append(f"{name}:{node.lineno}: {called}")
    assert not found
    assert len(SOURCES) > 100, "it looks at the project"


# Row 25


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What lerobot-train writes, for a type of LeRobot's own and for one that becomes ours."""
    root = tmp_path_factory.mktemp("policies")
    return {name: write_folder(root / name, *lerobot_policy(name)) for name in ("diffusion", "act")}


def popen(folder: Path, victim: Path) -> dict[str, Any]:
    return {"class": "subprocess.Popen", "config": {"args": ["touch", str(victim)]}}


def planted_module(folder: Path, victim: Path) -> dict[str, Any]:
    (folder / "evil_step.py").write_text(f"open({str(victim)!r}, 'w')")
    return {"class": "evil_step.Step", "config": {}}


def nameless(folder: Path, victim: Path) -> dict[str, Any]:
    return {"registry_name": None, **popen(folder, victim)}


def named_otherwise(folder: Path, victim: Path) -> dict[str, Any]:
    return {"registry_name": "subprocess.Popen", "config": {"args": ["touch", str(victim)]}}


def trusting(folder: Path, victim: Path) -> dict[str, Any]:
    """LeRobot's own step, whose default is to run the files of the repository that is named."""
    (folder / "tokenizer").mkdir()
    code = f"open({str(victim)!r}, 'w')\nclass Processor: pass\n"
    (folder / "tokenizer" / "processing.py").write_text(code)
    mapping = {"auto_map": {"AutoProcessor": "processing.Processor"}}
    (folder / "tokenizer" / "processor_config.json").write_text(json.dumps(mapping))
    settings = {"action_tokenizer_name": str(folder / "tokenizer")}
    return {"registry_name": "action_tokenizer_processor", "config": settings}


def of_a_trusting_type(folder: Path, victim: Path) -> dict[str, Any]:
    return {"registry_name": "groot_n1_7_vlm_encode_v1", "config": {"model_name": str(folder)}}


STEPS = (popen, planted_module, nameless, named_otherwise, trusting, of_a_trusting_type)


@pytest.mark.fault(25)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("pipeline", ["policy_preprocessor", "policy_postprocessor"])
def test_a_processor_step_runs_no_code_of_the_folders_author(
    pipeline: str,
    step: Callable[[Path, Path], dict[str, Any]],
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = shutil.copytree(folders["diffusion"], tmp_path / "policy")
    victim = tmp_path / "executed"
    monkeypatch.syspath_prepend(str(folder))
    file = folder / f"{pipeline}.json"
    document = json.loads(file.read_text())
    document["steps"].insert(1, step(folder, victim))
    file.write_text(json.dumps(document))
    with pytest.raises(LeRobotFormatError, match=rf"{pipeline}\.json: .*step "):
        load_lerobot_policy(folder)
    with pytest.raises(LeRobotFormatError):
        load_policy(str(folder))
    assert not victim.exists()


@pytest.mark.fault(25)
@pytest.mark.parametrize("step", [popen, nameless])
def test_an_act_with_a_step_that_it_cannot_know_is_refused(
    step: Callable[[Path, Path], dict[str, Any]], folders: dict[str, Path], tmp_path: Path
) -> None:
    """Read as ours, it would neither run the step nor act as its author meant."""
    folder = shutil.copytree(folders["act"], tmp_path / "policy")
    file = folder / "policy_preprocessor.json"
    document = json.loads(file.read_text())
    document["steps"].append(step(folder, tmp_path / "executed"))
    file.write_text(json.dumps(document))
    with pytest.raises(LeRobotFormatError, match=r"subprocess\.Popen.*would run code"):
        load_lerobot_act(folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.fault(25)
@pytest.mark.parametrize("policy_type", RUNS_FOREIGN_CODE)
def test_types_that_run_other_repositories_are_refused(
    policy_type: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["diffusion"], tmp_path / "policy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "type": policy_type}))
    with pytest.raises(
        LeRobotFormatError, match=rf"{policy_type} runs Python code.*LeRobot itself"
    ):
        load_policy(str(folder))


@pytest.mark.fault(25)
def test_a_folder_as_lerobot_writes_it_still_loads(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        assert load_policy(str(folder)).kind == "lerobot"


@pytest.mark.fault(25)
@pytest.mark.parametrize("loads", ["diffusion", "act"])
@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hostname", "link.safetensors"])
def test_a_step_reads_no_file_outside_its_folder(
    loads: str, name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders[loads], tmp_path / "policy")
    file = folder / "policy_preprocessor.json"
    document = json.loads(file.read_text())
    (step,) = [each for each in document["steps"] if each.get("state_file")]
    shutil.copy(folder / step["state_file"], tmp_path / "outside.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    step["state_file"] = name
    file.write_text(json.dumps(document))
    with pytest.raises(LeRobotFormatError, match=r"state_file .*Do not trust"):
        load_policy(str(folder))
