"""Rows 21 and 25: files of strangers are read, never run."""

import ast
import inspect
import json
import pickle
import shutil
import sys
import threading
import types
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from lerobot_folders import STATISTICS, lerobot_policy, write_folder

import analyze
from callbacks.checkpoints import AtomicCheckpointIO
from policies.checkpoint_files import CheckpointError, newest_valid_checkpoint, read_checkpoint
from policies.lerobot_config import config_to_dict
from policies.lerobot_format import LeRobotFormatError, load_lerobot_act
from policies.lerobot_view import (
    RUNS_FOREIGN_CODE,
    STEPS_THAT_LOAD_NOTHING,
    TOKENIZER_STEP,
    load_lerobot_policy,
)
from policies.loading import PolicyNotFoundError, load_policy

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path
    for path in ROOT.rglob("*.py")
    if not {".venv", "tests", "benchmarks", "examples"} & set(path.relative_to(ROOT).parts)
)
PIPES_OF_OUR_OWN = {"envs/collecting.py", "envs/demonstrations.py", "policies/workers.py"}
"""Where only our own processes write what is unpickled."""
EXECUTORS = {
    *(("pickle", name) for name in ("load", "loads", "Unpickler")),
    *(("yaml", name) for name in ("load", "load_all", "unsafe_load", "full_load")),
    *((module, "load") for module in ("dill", "joblib", "cloudpickle", "marshal")),
    *((module, "loads") for module in ("dill", "cloudpickle", "marshal")),
    ("shelve", "open"),
    ("pandas", "read_pickle"),
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
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in SOURCES
        if str(path.relative_to(ROOT)) not in PIPES_OF_OUR_OWN
        for line in unsafe_calls(path.read_text(encoding="utf-8"))
    ]
    assert not found
    assert len(SOURCES) > 100, "it looks at the project"


def unsafe_calls(source: str) -> list[str]:
    """Calls that would run what they read, by whatever name it was imported."""
    tree = ast.parse(source)
    names = {
        each.asname or each.name: f"{node.module}.{each.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for each in node.names
    } | {
        each.asname: each.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for each in node.names
        if each.asname
    }
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        first, dot, rest = ast.unparse(node.func).partition(".")
        called = names.get(first, first) + dot + rest
        module, _, function = called.rpartition(".")
        keywords = {each.arg: ast.unparse(each.value) for each in node.keywords}
        if called == "numpy.load" and len(node.args) > 2:
            keywords["allow_pickle"] = ast.unparse(node.args[2])
        is_unsafe = (
            (module or "builtins", function) in EXECUTORS
            or (called == "torch.load" and keywords.get("weights_only") != "True")
            or keywords.get("allow_pickle", "False") != "False"
            or keywords.get("trust_remote_code", "False") != "False"
            or function == "load_from_checkpoint"
        )
        if is_unsafe:
            found.append(f"{node.lineno}: {called}")
    return found


@pytest.mark.fault(21)
@pytest.mark.parametrize(
    "source",
    [
        "import pickle; pickle.loads(b'')",
        "from pickle import loads; loads(b'')",
        "from pickle import load as read; read(file)",
        "import pickle as p; p.Unpickler(file)",
        "import torch; torch.load(file)",
        "import torch; torch.load(file, weights_only=False)",
        "from torch import load; load(file)",
        "import numpy as np; np.load(file, allow_pickle=True)",
        "import numpy as np; np.load(file, None, True)",
        "from numpy import load; load(file, None, True)",
        "import pandas as pd; pd.read_pickle(file)",
        "from pandas import read_pickle; read_pickle(file)",
        "def f():\n    from yaml import unsafe_load\n    unsafe_load(file)",
        "AutoModel.from_pretrained(name, trust_remote_code=trusts)",
        "eval(text)",
    ],
)
def test_a_call_that_unpickles_is_seen_under_any_name(source: str) -> None:
    assert unsafe_calls(source)


@pytest.mark.fault(21)
@pytest.mark.parametrize(
    "source",
    [
        "import torch; torch.load(file, weights_only=True)",
        "from torch import load; load(file, weights_only=True)",
        "import numpy as np; np.load(file, None, False)",
        "import json; json.load(file)",
        "import yaml; yaml.safe_load(file)",
        "model.eval()",
    ],
)
def test_a_call_that_only_reads_is_let_through(source: str) -> None:
    assert not unsafe_calls(source)


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


def with_step(folder: Path, pipeline: str, step: dict[str, Any]) -> Path:
    file = folder / f"{pipeline}.json"
    document = json.loads(file.read_text())
    document["steps"].insert(1, step)
    file.write_text(json.dumps(document))
    return folder


@pytest.mark.fault(25)
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("reward_classifier_processor", {"pretrained_path": "somebody/classifier"}),
        ("action_tokenizer_processor", {"trust_remote_code": False}),
        ("eo1_qwen_processor", {"processor_name": "somebody/model"}),
        ("molmoact2_pack_inputs", {"checkpoint_path": "somebody/model"}),
        ("gym_hil_adapter_processor", {}),
    ],
)
def test_a_step_of_lerobots_that_may_load_a_model_is_never_made(
    name: str,
    settings: dict[str, Any],
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lerobot.processor import ProcessorStepRegistry

    victim = tmp_path / "executed"
    step_class = ProcessorStepRegistry.get(name)
    monkeypatch.setattr(step_class, "__init__", lambda *_, **__: victim.touch())
    folder = shutil.copytree(folders["diffusion"], tmp_path / "policy")
    with_step(folder, "policy_preprocessor", {"registry_name": name, "config": settings})
    with pytest.raises(LeRobotFormatError, match=rf"{name}.*load nothing.*LeRobot itself"):
        load_policy(str(folder))
    assert not victim.exists()


@pytest.mark.fault(25)
def test_the_steps_that_are_let_through_load_nothing(folders: dict[str, Path]) -> None:
    """As the installed LeRobot has them: a new version may change what a step does."""
    from lerobot.processor import ProcessorStepRegistry

    load_policy(str(folders["diffusion"]))  # registers all
    loaders = ("from_pretrained", "import_module", "hf_hub", "snapshot_", "torch.load", "open(")
    for name in STEPS_THAT_LOAD_NOTHING:
        for step_class in ProcessorStepRegistry.get(name).__mro__:
            if step_class.__module__.startswith("lerobot.") and step_class.__name__ != (
                "ProcessorStep"
            ):
                source = inspect.getsource(step_class)
                code = ast.unparse(without_docstrings(ast.parse(source)))
                assert not [loader for loader in loaders if loader in code], name
    assert "from_pretrained" in inspect.getsource(ProcessorStepRegistry.get(TOKENIZER_STEP))


def without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return tree


@pytest.mark.fault(25)
def test_a_tokenizers_own_code_is_neither_run_nor_asked_about(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers asks on the terminal for as many seconds, and refuses at none."""
    from lerobot.processor import TokenizerProcessorStep

    transformers = types.ModuleType("transformers")
    loading = types.ModuleType("transformers.dynamic_module_utils")
    loading.TIME_OUT_REMOTE_CODE = 15  # pyright: ignore[reportAttributeAccessIssue]
    transformers.dynamic_module_utils = loading  # pyright: ignore[reportAttributeAccessIssue]
    seconds = []

    def make(step: Any) -> None:
        seconds.append(loading.TIME_OUT_REMOTE_CODE)  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError("a tokenizer with code of its own")

    load_policy(str(folders["diffusion"]))
    monkeypatch.setitem(sys.modules, "transformers", transformers)
    monkeypatch.setitem(sys.modules, "transformers.dynamic_module_utils", loading)
    monkeypatch.setattr(TokenizerProcessorStep, "__post_init__", make)
    folder = shutil.copytree(folders["diffusion"], tmp_path / "policy")
    step = {"registry_name": TOKENIZER_STEP, "config": {"tokenizer_name": "somebody/tokenizer"}}
    with pytest.raises(LeRobotFormatError, match="a tokenizer with code of its own"):
        load_policy(str(with_step(folder, "policy_preprocessor", step)))
    assert seconds == [0]


@pytest.mark.fault(25)
@pytest.mark.parametrize("pipeline", ["policy_preprocessor", "policy_postprocessor"])
@pytest.mark.parametrize(
    "step",
    [
        {
            "registry_name": "image_crop_resize_processor",
            "config": {"resize_size": [8, 8], "crop_params_dict": None},
        },
        {"registry_name": "map_tensor_to_delta_action_dict", "config": {"use_gripper": False}},
        {"registry_name": "somebodys_own", "config": {}},
    ],
    ids=lambda step: step["registry_name"],
)
def test_an_act_with_a_step_that_ours_does_not_do_is_refused(
    pipeline: str, step: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    """Left out in silence, it would change every action."""
    folder = shutil.copytree(folders["act"], tmp_path / "policy")
    with_step(folder, pipeline, step)
    with pytest.raises(
        LeRobotFormatError, match=rf"{pipeline}\.json: step '{step['registry_name']}' .*LeRobot's"
    ):
        load_policy(str(folder))


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


def checkpoint(path: Path, **changes: Any) -> Path:
    """What training a policy of LeRobot's leaves, with other settings."""
    policy, *_ = lerobot_policy("diffusion")
    saved = {
        "policyscope": {"checkpoint_format": 1},
        "hyper_parameters": {"policy_type": "diffusion"},
        "lerobot": {
            "config": {**config_to_dict(policy.config), **changes},
            "statistics": STATISTICS,
        },
        "state_dict": {f"policy.{name}": value for name, value in policy.state_dict().items()},
    }
    torch.save(saved, path)
    return path


@pytest.mark.fault(25)
@pytest.mark.parametrize("policy_type", RUNS_FOREIGN_CODE)
def test_checkpoints_of_types_that_run_other_repositories_are_refused(
    policy_type: str, tmp_path: Path
) -> None:
    file = checkpoint(tmp_path / "policy.ckpt", type=policy_type)
    with pytest.raises(
        LeRobotFormatError, match=rf"policy\.ckpt: .*{policy_type} runs Python code.*LeRobot itself"
    ):
        load_policy(str(file))


BROKEN = {
    "no_features": {"input_features": None},
    "no_action": {"output_features": {}},
    "no_shape": {"input_features": {"observation.state": {"type": "STATE"}}},
    "negative_size": {"spatial_softmax_num_keypoints": -4},
    "no_size": {"down_dims": []},
    "endless_size": {"down_dims": [2**40, 2**41]},
    "no_modes": {"normalization_mapping": None},
    "other_backbone": {"vision_backbone": "resnet0"},
}


@pytest.mark.fault(25)
@pytest.mark.parametrize("stored", ["folder", "checkpoint"])
@pytest.mark.parametrize("change", BROKEN)
def test_settings_that_make_no_policy_are_one_clear_error(
    change: str, stored: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    if stored == "folder":
        policy = shutil.copytree(folders["diffusion"], tmp_path / "policy")
        config = json.loads((policy / "config.json").read_text())
        (policy / "config.json").write_text(json.dumps({**config, **BROKEN[change]}))
    else:
        policy = checkpoint(tmp_path / "policy", **BROKEN[change])
    with pytest.raises(LeRobotFormatError) as refused:
        load_policy(str(policy))
    assert str(policy) in str(refused.value)
    assert len(str(refused.value)) < 1000


@pytest.mark.fault(25)
def test_a_folder_that_names_no_pretrained_weights_downloads_none(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LeRobot's default are ImageNet's, which the folder's own weights replace at once."""

    def download(*_: Any, **__: Any) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    folder = shutil.copytree(folders["diffusion"], tmp_path / "policy")
    config = json.loads((folder / "config.json").read_text())
    del config["pretrained_backbone_weights"]
    (folder / "config.json").write_text(json.dumps(config))
    view = load_policy(str(folder)).view
    assert view.policy.config.pretrained_backbone_weights is None  # pyright: ignore[reportAttributeAccessIssue]


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
