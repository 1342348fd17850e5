"""``analyze.py browse``: what it finds by itself, what it computes once, and what it refuses."""

import argparse
import os
import shutil
import signal
import threading
import time
import urllib.request
from pathlib import Path

import h5py
import pytest
from pusht_runs import LENGTHS
from tiny_browser import TinyRun, arguments, live, make_autoencoder, make_run, parts, session

import analyze
from autoencoders.files import AUTOENCODER_FOLDER, load_autoencoder
from browser.features import Moment
from browser.notes import Note, NoteBook, autoencoder_hash
from browser.server import bind
from commands import features_describe
from commands.browse import open_session


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> TinyRun:
    folder = tmp_path_factory.mktemp("browse")
    made = make_run(folder)
    session(made, folder / "clips")
    return made


class DescribedError(Exception):
    """Raised in the place of a description."""


@pytest.fixture
def described(monkeypatch) -> list[argparse.Namespace]:
    """Arguments of descriptions from here on, none of which is made."""
    calls = []

    def noted(arguments):
        calls.append(arguments)
        raise DescribedError

    monkeypatch.setattr(features_describe, "run", noted)
    return calls


def refused(words: list[str], capsys) -> str:
    assert analyze.main(words) == 1
    said = capsys.readouterr().err
    assert said.startswith("analyze.py browse:")
    return said


def test_a_run_alone_is_enough(run, tmp_path, described):
    opened = session(run, tmp_path)
    library, notes = parts(opened)
    assert opened.explorer is not None
    assert described == []
    assert live(library)
    assert notes.path == run.home / "notes.json"
    assert opened.about["data"] == run.data.name
    assert opened.about["policies"] == [
        {"name": "run", "path": str(run.run), "kind": "policyscope"}
    ]


def test_a_description_that_lost_a_file_is_made_anew(run, tmp_path, described, capsys):
    home = tmp_path / "home"
    shutil.copytree(run.home, home)
    (home / "describe" / "features.json").unlink()
    with pytest.raises(DescribedError):
        session(TinyRun(run.run, run.data, home), tmp_path)
    assert "first start" in capsys.readouterr().out


def test_stopping_while_features_are_described_is_one_line(run, tmp_path, monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(features_describe, "run", interrupted)
    assert analyze.main(TinyRun(run.run, run.data, tmp_path / "home").words()) == 130
    said = capsys.readouterr()
    assert said.err == ""
    assert "stopped" in said.out.splitlines()[-1]


def test_few_videos_are_kept(run, tmp_path, monkeypatch):
    monkeypatch.setattr("browser.clips.MAX_FILES", 2)
    library, _ = parts(session(run, tmp_path))
    (latent, *_) = live(library)
    episodes = sorted(library.episodes)
    assert len(episodes) == 3
    made = [library.clip(latent, Moment(number, 0), None, False, True) for number in episodes]
    assert [path.is_file() for path in made] == [False, True, True]


def test_what_is_described_anew_replaces_what_was_there(run, tmp_path, capsys):
    home = tmp_path / "home"
    shutil.copytree(run.home, home)
    mine = TinyRun(run.run, run.data, home)
    library, _ = parts(session(mine, tmp_path, "--n_permutations", "5"))
    assert "n_permutations changed" in capsys.readouterr().out
    rows = library.described.rows.values()
    assert min(row["best_continuous_p"] or 1 for row in rows) >= 1 / 6 - 1e-9
    before = (home / "describe" / "features.parquet").stat().st_mtime_ns
    session(mine, tmp_path, "--n_permutations", "5")
    assert (home / "describe" / "features.parquet").stat().st_mtime_ns == before


def test_another_autoencoder_is_described_and_has_no_notes_yet(run, tmp_path, described, capsys):
    home = tmp_path / "home"
    shutil.copytree(run.home, home)
    mine = TinyRun(run.run, run.data, home)
    _, notes = parts(session(mine, tmp_path))
    notes.write(1, Note("mine"))
    other = make_autoencoder(run.run / "checkpoints" / "last.ckpt", tmp_path / "other", seed=1)
    with pytest.raises(DescribedError):
        session(mine, tmp_path, "--sae_path", str(other))
    assert "autoencoder changed" in capsys.readouterr().out
    theirs = NoteBook(notes.path, autoencoder_hash(load_autoencoder(other)), notes.n_latents)
    assert notes.read()[1].name == "mine"
    assert theirs.read() == {}


def test_other_data_under_the_same_name_are_described_anew(run, tmp_path, described, capsys):
    data = tmp_path / run.data.name
    shutil.copy(run.data, data)
    with h5py.File(data, "r+") as file:
        for number in range(len(LENGTHS)):
            actions = file[f"demo_{number}/actions"]
            assert isinstance(actions, h5py.Dataset)
            actions[...] = actions[...] + 1
    home = tmp_path / "home"
    shutil.copytree(run.home, home)
    words = ("--dataset_repo_id", str(data))
    with pytest.raises(DescribedError):
        session(TinyRun(run.run, run.data, home), tmp_path, *words)
    assert "data changed" in capsys.readouterr().out


def test_a_description_that_was_broken_off_is_made_again(run, tmp_path, described):
    home = tmp_path / "home"
    shutil.copytree(run.home, home)
    (home / "describe" / "made_from.json").unlink()
    with pytest.raises(DescribedError):
        session(TinyRun(run.run, run.data, home), tmp_path)


def test_a_description_can_be_given(run, tmp_path, described):
    words = ("--describe_path", str(run.home / "describe"))
    library, notes = parts(session(TinyRun(run.run, run.data, tmp_path / "new"), tmp_path, *words))
    assert described == []
    assert live(library)
    assert notes.path.parent == tmp_path / "new"


def test_a_description_of_another_autoencoder_is_refused(run, tmp_path, capsys):
    other = make_autoencoder(run.run / "checkpoints" / "last.ckpt", tmp_path / "other", seed=1)
    words = ("--describe_path", str(run.home / "describe"), "--sae_path", str(other))
    said = refused(TinyRun(run.run, run.data, tmp_path / "new").words(*words), capsys)
    assert "another autoencoder or of other data" in said


def test_without_an_autoencoder_there_are_only_landscapes(run, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(run.run, bare, ignore=shutil.ignore_patterns(AUTOENCODER_FOLDER))
    opened = session(TinyRun(bare, run.data, tmp_path / "home"), tmp_path)
    assert opened.library is None
    assert opened.explorer is not None
    assert "--sae_path" in capsys.readouterr().out
    assert not (tmp_path / "home").exists()


def test_the_autoencoder_of_the_policys_step_is_found_or_else_the_newest(
    run, tmp_path, described, capsys
):
    mine = tmp_path / "run"
    shutil.copytree(run.run, mine)
    own = mine / AUTOENCODER_FOLDER

    def of_step(step):
        return mine / "media" / f"step_{step:06d}" / "feature_dynamics" / own.name

    for step in (900, 1000):
        shutil.copytree(own, of_step(step))
    shutil.copytree(own, of_policy := of_step(2))
    shutil.rmtree(own)

    def opened():
        with pytest.raises(DescribedError):
            session(TinyRun(mine, run.data, tmp_path / "home"), tmp_path)
        return Path(described.pop().sae_path)

    assert opened() == of_policy
    assert "left no autoencoder" not in capsys.readouterr().out
    shutil.rmtree(of_policy)
    assert opened() == of_step(1000)
    assert "left no autoencoder of step" in capsys.readouterr().out


def test_two_policies_have_two_names(run, tmp_path):
    second = tmp_path / "second" / "run"
    shutil.copytree(run.run, second)
    words = run.words()
    place = words.index("--policy_path") + 2
    opened = open_session(arguments([*words[:place], str(second), *words[place:]]), tmp_path)
    names = [policy["name"] for policy in opened.about["policies"]]
    assert len({*names}) == 2
    assert names[1] == "second/run"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--n_val_episodes", "1"), "--n_val_episodes"),
        (("--sae_path", "nowhere"), "nowhere"),
        (("--describe_path", "nowhere"), "nowhere"),
        (("--dataset_repo_id", "nowhere.hdf5"), "nowhere.hdf5"),
        (("--port", "99999"), "--port 99999"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(words, named, run, tmp_path, capsys):
    mine = TinyRun(run.run, run.data, tmp_path / "home")
    assert named in refused(mine.words(*words), capsys)


def test_data_that_are_gone_are_asked_for(run, tmp_path, capsys, monkeypatch):
    away = tmp_path / "away.hdf5"
    run.data.rename(away)
    try:
        said = refused(run.words(), capsys)
    finally:
        away.rename(run.data)
    assert run.data.name in said
    assert "--dataset_repo_id" in said


def test_damaged_notes_are_said_first(run, tmp_path, capsys, described):
    home = tmp_path / "home"
    home.mkdir()
    (home / "notes.json").write_text("{")
    assert "notes.json" in refused(TinyRun(run.run, run.data, home).words(), capsys)
    assert described == []
    assert (home / "notes.json").read_text() == "{"


def test_a_checkpoint_outside_of_a_run_needs_a_folder(run, tmp_path, capsys):
    lone = tmp_path / "lone.ckpt"
    shutil.copy(run.run / "checkpoints" / "last.ckpt", lone)
    words = ["browse", "--policy_path", str(lone), "--sae_path", str(run.run), "--device", "cpu"]
    assert "--output_dir" in refused(words, capsys)


def test_it_serves_until_it_is_interrupted(run, capfd, monkeypatch):
    # Kept bound: a port that is freed for the command may go to another process in between.
    listening = bind()
    port = listening.getsockname()[1]
    monkeypatch.setattr("browser.server.bind", lambda asked: {port: listening}[asked])
    answers = []

    def ask_and_interrupt() -> None:
        while not answers:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/session") as answer:
                    answers.append(answer.read())
            except OSError:
                time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=ask_and_interrupt, daemon=True)
    thread.start()
    assert analyze.main(run.words("--port", str(port))) == 0
    thread.join()
    assert b'"features":true' in answers[0]
    said = capfd.readouterr()
    assert said.out == f"http://127.0.0.1:{port}/  (Ctrl-C stops)\n"
    assert "Traceback" not in said.err
    assert listening.fileno() == -1
