"""Sweeps: every trial is a run, a killed sweep goes on, several processes share one."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

import analyze
from commands import sweep_trials
from commands.sweep_file import Choice, Range, read_sweep, wandb_sweep
from commands.sweep_optuna import search
from commands.sweep_ray import draw, experiments
from commands.sweep_trials import best_value, read_curve

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = Path(__file__).with_name("stand_in_train.py")
SWEEP = {
    "configs": ["base.yaml"],
    "metric": "val/loss",
    "n_trials": 5,
    "parameters": {
        "lr": {"low": 1.0e-5, "high": 1.0e-1, "log": True},
        "kl_weight": {"values": [0.5, 2]},
    },
}


@pytest.fixture
def write(tmp_path):
    """Write a sweep with some keys changed, and give its path."""
    (tmp_path / "base.yaml").write_text("{}\n")

    def write(**changes):
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump({**SWEEP, **changes}))
        return path

    return write


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(sweep_trials, "TRAIN", STAND_IN)
    monkeypatch.setattr(sweep_trials, "POLL_S", 0.02)


def sweep(path, folder, *more):
    return analyze.main(["sweep", f"--config={path}", f"--output_dir={folder}", *more])


def result(folder):
    return json.loads((folder / "sweep.json").read_text())


def test_a_sweep_ranks_runs_and_leaves_the_best_configuration(write, fast, tmp_path, capsys):
    folder = tmp_path / "out"
    assert sweep(write(), folder) == 0
    found = result(folder)
    assert [trial["number"] for trial in found["trials"]] == list(range(5))
    for trial in found["trials"]:
        run = folder / "runs" / f"trial_{trial['number']:04d}" / "last"
        # What the trial's run was given is what the sweep says.
        assert yaml.safe_load((run / "config.yaml").read_text())["lr"] == trial["values"]["lr"]
        assert 1e-5 <= trial["values"]["lr"] <= 1e-1
        assert trial["values"]["kl_weight"] in (0.5, 2)
        assert trial["curve"][-1][0] == 4
        assert trial["value"] == min(value for _, value in trial["curve"])
    assert found["best"] == min(found["trials"], key=lambda trial: trial["value"])["number"]
    best = yaml.safe_load((folder / "best.yaml").read_text())
    assert best["name"] == "sweep_best"
    assert best["lr"] == found["trials"][found["best"]]["values"]["lr"]
    assert (folder / "sweep.png").stat().st_size > 10_000
    # Again: nothing is left to do; more trials are added to those that are there.
    assert sweep(write(), folder) == 0
    assert result(folder) == found
    assert sweep(write(), folder, "--n_trials=6") == 0
    assert result(folder)["trials"][:5] == found["trials"]
    # The same seed draws the same trials, also when somebody came back for the last one.
    assert sweep(write(n_trials=6), tmp_path / "again") == 0
    values = [trial["values"] for trial in result(folder)["trials"]]
    assert values == [trial["values"] for trial in result(tmp_path / "again")["trials"]]
    capsys.readouterr()
    assert sweep(write(metric="val/l1"), folder) == 1
    assert "holds another sweep (metric differ)" in capsys.readouterr().err


def test_a_trial_that_fails_is_one_trial_less(write, fast, tmp_path, capsys):
    path = write(parameters={**SWEEP["parameters"], "lr": {"values": [0.001, 10.0]}}, n_trials=8)
    assert sweep(path, tmp_path / "out") == 0
    trials = result(tmp_path / "out")["trials"]
    failed = [trial for trial in trials if trial["state"] == "failed"]
    assert {trial["values"]["lr"] for trial in failed} == {10.0}
    assert {trial["reason"] for trial in failed} == {"error: the loss is not finite"}
    assert 0 < len(failed) < 8
    only = write(parameters={**SWEEP["parameters"], "lr": {"values": [10.0]}}, n_trials=2)
    assert sweep(only, tmp_path / "none") == 1
    assert not (tmp_path / "none" / "best.yaml").exists()


def test_words_that_train_does_not_take_stop_the_sweep(write, fast, tmp_path, capsys):
    assert sweep(write(fixed={"no_such_key": 1}), tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "does not take the words of a trial" in error
    assert "no_such_key" in error
    # Nothing was begun: with the key mended, the same folder will do.
    assert sweep(write(n_trials=1), tmp_path / "out") == 0


def test_a_full_disk_in_the_middle_of_the_journal_loses_nothing(write, fast, tmp_path, capsys):
    path, folder = write(n_trials=2), tmp_path / "out"
    assert sweep(path, folder) == 0
    journal, before = folder / "journal.log", result(folder)["trials"]
    content = journal.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) + 50, limits[1]))
    try:
        assert sweep(path, folder, "--n_trials=3") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert f"{journal}: cannot be written" in error
    assert "make room" in error
    assert journal.read_bytes() == content
    assert sweep(path, folder, "--n_trials=3") == 0
    assert result(folder)["trials"][:2] == before
    # A process that was killed in the middle of a line.
    with journal.open("ab") as file:
        file.write(b'{"op_code":5,"worker_id"')
    assert sweep(path, folder, "--n_trials=4") == 0
    assert len(result(folder)["trials"]) == 4
    assert all(json.loads(line) for line in journal.read_text().splitlines())


def test_runs_of_another_search_are_not_continued(write, fast, tmp_path, capsys):
    path, folder = write(n_trials=1), tmp_path / "out"
    assert sweep(path, folder) == 0
    metrics = folder / "runs/trial_0000/last/metrics.csv"
    kept = metrics.read_bytes()
    (folder / "journal.log").unlink()
    capsys.readouterr()
    # Without its journal, another seed draws other values for the same trial.
    assert sweep(write(n_trials=1, seed=5), folder) == 1
    assert "trial_0000: holds another sweep (values differ)" in capsys.readouterr().err
    assert sweep(path, folder, "--engine=ray") == 1
    assert "holds another sweep (engine differ)" in capsys.readouterr().err
    (folder / "search.json").unlink()
    assert sweep(path, folder) == 1
    assert "search.json: is missing" in capsys.readouterr().err
    assert metrics.read_bytes() == kept


def test_a_search_is_what_its_configurations_hold(write, tmp_path):
    before = read_sweep(write()).facts()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "base.yaml").write_bytes((tmp_path / "base.yaml").read_bytes())
    (elsewhere / "sweep.yaml").write_bytes((tmp_path / "sweep.yaml").read_bytes())
    assert read_sweep(elsewhere / "sweep.yaml").facts() == before
    (elsewhere / "base.yaml").write_text("seed_everything: 1\n")
    assert read_sweep(elsewhere / "sweep.yaml").facts() != before
    words = ("-c", str(elsewhere / "base.yaml"))
    given = read_sweep(write(), words).facts()
    (elsewhere / "base.yaml").write_text("seed_everything: 2\n")
    assert read_sweep(write(), words).facts() != given


def test_what_is_varied_wins_over_words(write, tmp_path, capsys):
    words = read_sweep(write(fixed={"n": 1}), ("-c", "more.yaml", "--data", "x")).train_words(
        {"lr": 0.1}
    )
    assert words[-1] == "--lr=0.1"
    assert words.index("--n=1") < words.index(str(Path("more.yaml").absolute())) < len(words) - 1
    for given in (["--lr=3"], ["--lr", "3"]):
        assert sweep(write(), tmp_path / "out", "--", *given) == 1
        assert "--lr after --" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_range_with_a_step_has_the_same_values_for_every_engine(write, fast, tmp_path, capsys):
    path = write(
        parameters={
            **SWEEP["parameters"],
            "kl_weight": {"low": 0.1, "high": 0.75, "step": 0.2},
            "trainer.max_steps": {"low": 3, "high": 9, "step": 4},
        },
        n_trials=8,
    )
    found = read_sweep(path)
    expected = {"kl_weight": (0.1, 0.3, 0.5, 0.7), "trainer.max_steps": (3, 7)}
    by_wandb = yaml.safe_load(wandb_sweep(found))["parameters"]
    assert sweep(path, tmp_path / "out") == 0
    by_optuna = [trial["values"] for trial in result(tmp_path / "out")["trials"]]
    by_ray = [draw(found, number)["values"] for number in range(30)]
    for key, values in expected.items():
        assert by_wandb[key] == {"values": list(values)}
        assert {values[key] for values in by_ray} == set(values)
        assert all(
            min(abs(values[key] - each) for each in expected[key]) < 1e-9 for values in by_optuna
        )


def test_ray_draws_the_same_trial_again_and_adds_to_what_is_there(write, tmp_path):
    found = read_sweep(
        write(parameters={"n": {"low": 1, "high": 4, "log": True}, "x": {"low": 0.5, "high": 2.0}})
    )
    drawn = [draw(found, number) for number in range(40)]
    assert drawn == [draw(found, number) for number in range(40)]
    assert {each["values"]["n"] for each in drawn} == {1, 2, 3, 4}
    assert len({each["values"]["x"] for each in drawn}) == 40
    assert all(0.5 <= each["values"]["x"] <= 2 for each in drawn)
    assert experiments(tmp_path, 3) == [range(3)]
    (tmp_path / "trials_0000_to_0002").mkdir()
    assert experiments(tmp_path, 3) == [range(3)]
    assert experiments(tmp_path, 5) == [range(3), range(3, 5)]


def test_a_trial_runs_where_it_is_told_to(write, monkeypatch, tmp_path):
    (tmp_path / "train.py").write_text(
        "from pathlib import Path\nPath('here').touch()\nraise SystemExit(1)\n"
    )
    monkeypatch.setattr(sweep_trials, "TRAIN", tmp_path / "train.py")
    monkeypatch.setattr(sweep_trials, "POLL_S", 0.02)
    (tmp_path / "driver").mkdir()
    trial = sweep_trials.run_trial(
        read_sweep(write()),
        0,
        {"lr": 0.1},
        tmp_path / "out",
        lambda step, value: False,
        cwd=tmp_path / "driver",
    )
    assert trial.state == "failed"
    assert (tmp_path / "driver/here").is_file()


@pytest.mark.parametrize(
    ("key", "class_path", "init_args"),
    [
        ("pruner", "optuna.pruners.NoSuchPruner", {}),
        ("pruner", "optuna.pruners.PercentilePruner", {"percentile": 900.0}),
        ("sampler", "optuna.samplers.TPESampler", {"no_such": 1}),
    ],
)
def test_a_wrong_part_of_optuna_is_not_the_journals_fault(
    write, fast, tmp_path, capsys, key, class_path, init_args
):
    path = write(**{key: {"class_path": class_path, "init_args": init_args}}, n_trials=1)
    assert sweep(path, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert class_path in error
    assert "damaged" not in error
    assert not (tmp_path / "out/journal.log").exists()
    assert sweep(write(n_trials=1), tmp_path / "out") == 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_sweep_that_is_stopped_says_that_it_goes_on(
    write, fast, tmp_path, capsys, monkeypatch, number, status
):
    path = write(fixed={"trainer.max_steps": 3}, n_trials=1)
    with monkeypatch.context() as patch:
        # After the first row is read, somebody stops the sweep.
        patch.setattr(sweep_trials, "read_curve", lambda *_: os.kill(os.getpid(), number))
        assert sweep(path, tmp_path / "out") == status
    assert "the same command goes on" in capsys.readouterr().out
    assert sweep(path, tmp_path / "out") == 0
    assert len(result(tmp_path / "out")["trials"]) == 1


def test_a_trial_that_falls_behind_is_stopped(write, fast, tmp_path, capsys):
    path = write(
        parameters={"lr": {"values": [0.001]}, "kl_weight": {"values": [0, 9]}},
        fixed={"trainer.max_steps": 40, "row_s": 0.05},
        sampler={"class_path": "optuna.samplers.RandomSampler"},
        n_trials=3,
        pruner={"class_path": "optuna.pruners.ThresholdPruner", "init_args": {"upper": 5.0}},
    )
    assert sweep(path, tmp_path / "out") == 0
    trials = {trial["values"]["kl_weight"]: trial for trial in result(tmp_path / "out")["trials"]}
    assert trials[0]["state"] == "complete"
    assert trials[0]["curve"][-1][0] == 40
    assert trials[9]["state"] == "pruned"
    assert trials[9]["curve"][-1][0] < 40
    assert result(tmp_path / "out")["best"] == trials[0]["number"]


def start(path, folder):
    code = (
        "import sys, analyze\n"
        "from pathlib import Path\n"
        "from commands import sweep_trials\n"
        f"sweep_trials.TRAIN = Path({str(STAND_IN)!r})\n"
        "sweep_trials.POLL_S = 0.02\n"
        "sys.exit(analyze.main(sys.argv[1:]))\n"
    )
    words = ["sweep", f"--config={path}", f"--output_dir={folder}"]
    return subprocess.Popen([sys.executable, "-c", code, *words], cwd=ROOT)


def wait_for(condition):
    while not condition():
        time.sleep(0.02)


@pytest.mark.fault(1)
def test_a_killed_sweep_goes_on_with_the_trial_it_was_at(write, fast, tmp_path, capsys):
    path = write(fixed={"trainer.max_steps": 30, "row_s": 0.1}, n_trials=2)
    folder = tmp_path / "out"
    metrics = folder / "runs/trial_0000/last/metrics.csv"
    process = start(path, folder)
    wait_for(lambda: metrics.is_file() and len(metrics.read_text().splitlines()) > 4)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = metrics.read_text()
    # Its run still trains. Who comes now leaves it alone, and makes the other trial.
    assert sweep(path, folder) == 0
    assert 1 in [trial["number"] for trial in result(folder)["trials"]]
    wait_for(lambda: len(metrics.read_text().splitlines()) == 31)
    wait_for(lambda: sweep(path, folder) == 0 and len(result(folder)["trials"]) == 2)
    assert metrics.read_text().startswith(kept)
    assert [trial["curve"][-1][0] for trial in result(folder)["trials"]] == [30, 30]
    # One run, last, and what the trial is.
    assert len(list((folder / "runs/trial_0000").iterdir())) == 3


def test_searches_that_run_together_share_a_sweep(write, fast, tmp_path, capsys):
    found = read_sweep(write(fixed={"row_s": 0.05}, n_trials=6))
    folder = tmp_path / "out"
    # Locks and journal are files: threads that open them are to each other as processes are.
    with ThreadPoolExecutor() as pool:
        searches = [pool.submit(search, found, folder, 6) for _ in range(2)]
        for each in searches:
            each.result()
    trials = search(found, folder, 6)
    assert [trial.number for trial in trials] == list(range(6))
    assert len({trial.values["lr"] for trial in trials}) == 6
    assert {trial.state for trial in trials} <= {"complete", "pruned"}


@pytest.mark.slow
def test_a_trial_is_a_run_of_train(write, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests/callbacks"))
    path = write(
        parameters={"model.init_args.hidden": {"values": [5]}},
        fixed={"trainer.max_steps": 4, "trainer.val_check_interval": 2},
        n_trials=1,
    )
    (tmp_path / "base.yaml").write_text(
        yaml.safe_dump(
            {
                "model": {"class_path": "toy.ToyModule"},
                "data": {"class_path": "toy.ToyData"},
                "trainer": {"accelerator": "cpu", "check_val_every_n_epoch": None},
            }
        )
    )
    folder = tmp_path / "out"
    assert sweep(path, folder) == 0, (folder / "logs/trial_0000.log").read_text()
    (trial,) = result(folder)["trials"]
    assert [step for step, _ in trial["curve"]] == [2, 4]
    run = folder / "runs/trial_0000/last"
    assert read_curve(run, "val/loss") == [tuple(point) for point in trial["curve"]]
    assert (run / "checkpoints/last.ckpt").is_file()
    best = yaml.safe_load((folder / "best.yaml").read_text())
    assert best["model"]["init_args"]["hidden"] == 5
    assert best["trainer"]["max_steps"] == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": 3}, "metric 3: give the name"),
        ({"directon": "minimize"}, "directon: no such key"),
        ({"direction": "down"}, "direction 'down'"),
        ({"configs": ["nowhere.yaml"]}, "nowhere.yaml is not there"),
        ({"parameters": {}}, "name at least one"),
        ({"parameters": {"lr": {"low": "1e-4", "high": 1.0}}}, "give a number, such as 1.0e-4"),
        ({"parameters": {"lr": {"low": 0.0, "high": 1.0, "log": True}}}, "low above 0"),
        ({"parameters": {"lr": {"low": 2, "high": 1}}}, "low 2 is not below high 1"),
        ({"parameters": {"lr": {"low": 1, "high": float("inf")}}}, "NaN|finite|plain values"),
        ({"parameters": {"lr": [1, 2]}}, "give values"),
        ({"fixed": {"lr": 1}}, "lr: is fixed and varied"),
        ({"sampler": {"class_path": "os.system"}}, "give one of optuna.samplers."),
        ({"sampler": {"class_path": "optuna.samplers.GridSampler"}}, "give another"),
        ({"pruner": {"class_path": "optuna.pruners.MedianPruner", "args": {}}}, "init_args"),
        ({"n_trials": 0}, "n_trials 0"),
    ],
)
def test_a_wrong_file_is_named_with_key_and_mend(write, tmp_path, changes, message, capsys):
    path = write(**changes)
    with pytest.raises(ValueError, match=message) as raised:
        read_sweep(path)
    assert str(path) in str(raised.value)


def test_every_sweep_of_the_repository_is_understood_by_train(capsys):
    import train

    files = sorted((ROOT / "configs/sweeps").glob("*.yaml"))
    assert files
    for file in files:
        found = read_sweep(file)
        ends = {
            each.key: each.values[-1] if isinstance(each, Choice) else each.high
            for each in found.parameters
        }
        with pytest.raises(SystemExit) as stopped:
            train.main([*found.train_words(ends), "--print_config"])
        assert stopped.value.code == 0, capsys.readouterr().err
        printed = yaml.safe_load(capsys.readouterr().out)
        for key, value in ends.items():
            node = printed
            for part in key.split("."):
                node = node[part]
            assert node == value


def test_the_file_for_wandb_says_the_same(write, tmp_path, capsys):
    parameters = {
        **SWEEP["parameters"],
        "n": {"low": 1, "high": 9},
        "m": {"low": 8, "high": 32, "step": 8},
        "x": {"low": 0.0, "high": 1.0},
    }
    path = write(parameters=parameters, fixed={"trainer.max_steps": 7})
    assert sweep(path, tmp_path / "out", "--engine=wandb", "--", "--data.path", "a b.hdf5") == 0
    found = yaml.safe_load((tmp_path / "out/wandb_sweep.yaml").read_text())
    assert found["parameters"] == {
        "lr": {"distribution": "log_uniform_values", "min": 1e-5, "max": 0.1},
        "kl_weight": {"values": [0.5, 2]},
        "n": {"distribution": "int_uniform", "min": 1, "max": 9},
        "m": {"values": [8, 16, 24, 32]},
        "x": {"distribution": "uniform", "min": 0.0, "max": 1.0},
    }
    assert found["metric"] == {"name": "val/loss", "goal": "minimize"}
    assert found["command"][-4:] == ["--trainer.max_steps=7", "--data.path", "a b.hdf5", "${args}"]
    assert wandb_sweep(read_sweep(path)) != ""


def test_the_best_value_is_finite():
    curve = [(1, float("nan")), (2, 3.0), (3, 2.0), (4, float("inf"))]
    assert best_value(curve, "minimize") == 2.0
    assert best_value(curve, "maximize") == 3.0
    assert best_value(curve[:1], "minimize") is None


def test_ranges_are_whole_where_both_ends_are():
    assert Range("n", 1, 4).is_whole
    assert not Range("n", 1, 4.0).is_whole


def test_optuna_that_is_not_installed_says_how_to_get_it(write, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert sweep(write(), tmp_path / "out") == 1
    assert "uv sync --extra sweeps" in capsys.readouterr().err
