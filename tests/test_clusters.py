"""Every recipe of docs/clusters.md is understood by bash and by our own parsers."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

import analyze
import train

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs/clusters.md").read_text()
SCRIPTS = [
    block for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL) if "#SBATCH" in block
]
SHELL = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)


def lines():
    """Command lines, continued ones joined, that start one of our programs."""
    for block in [*SCRIPTS, *SHELL]:
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for program in ("train.py", "analyze.py"):
                if program in words:
                    yield words[: words.index(program)], words[words.index(program) :]


def test_there_are_recipes():
    programs = [words[0] for _, words in lines()]
    assert programs.count("train.py") == 4
    assert programs.count("analyze.py") == 1
    assert len(SCRIPTS) == 2


@pytest.mark.parametrize("script", [*SCRIPTS, *SHELL])
def test_bash_understands_it(script):
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize(("before", "words"), list(lines()))
def test_our_parsers_understand_it(before, words, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    if words[0] == "analyze.py":
        analyze.build_parser(words[1]).parse_args(words[1:])
        return
    words = ["configs/demo.yaml" if word == "CONFIG" else word for word in words[1:]]
    with pytest.raises(SystemExit) as stopped:
        train.main([*words, "--print_config"])
    assert stopped.value.code == 0, capsys.readouterr().err
    trainer = yaml.safe_load(capsys.readouterr().out)["trainer"]
    assert trainer["strategy"] != "auto"
    if "--nproc-per-node" in before:
        assert int(before[before.index("--nproc-per-node") + 1]) == int(trainer["devices"])
    if "--nnodes" in before:
        assert int(before[before.index("--nnodes") + 1]) == trainer["num_nodes"]


def test_the_job_has_as_many_tasks_as_the_trainer_has_devices():
    script = SCRIPTS[0]
    asked = dict(re.findall(r"#SBATCH --([\w-]+)=(\S+)", script))
    assert f"--trainer.devices {asked['ntasks-per-node']} " in script
    assert f"--trainer.num_nodes {asked['nodes']} " in script
    assert asked["gpus-per-node"] == asked["ntasks-per-node"]
    assert asked["signal"] == "SIGUSR1@90"


def test_torchrun_knows_the_options():
    from torch.distributed.run import get_args_parser

    for before, words in lines():
        if before[:1] == ["torchrun"]:
            given = get_args_parser().parse_args([*before[1:], *words])
            assert given.training_script == "train.py"


def test_a_sweeps_job_hands_the_signal_to_python():
    script = SCRIPTS[1]
    # Without B: the batch step gets none, and without exec its shell does, and waits.
    assert "#SBATCH --signal=B:SIGTERM@120" in script
    (line,) = (line for line in script.splitlines() if "analyze.py" in line)
    assert line.startswith("exec .venv/bin/python ")


def test_a_training_job_signals_its_processes():
    # They are a step of srun's: with B: only the script would be signalled.
    assert "--signal=SIGUSR1@90" in SCRIPTS[0]
    assert re.search(r"^srun .*python train.py", SCRIPTS[0], re.MULTILINE)
