"""``analyze.py report``: runs in, one page out, and a word about what is not in it."""

import errno
import fcntl
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import analyze
from commands.report import is_running, names


def write_run(folder: Path, video_bytes: int = 0) -> Path:
    folder.mkdir(parents=True)
    steps = (10, 20, 30, 40)
    rows = [f"{step},{1 / step}" for step in steps]
    (folder / "metrics.csv").write_text("\n".join(["step,val/loss", *rows, ""]))
    (folder / "config.yaml").write_text(f"name: {folder.name}\n")
    if video_bytes:
        entries = []
        for step in steps:
            file = folder / "media" / f"step_{step:06d}" / "film.mp4"
            file.parent.mkdir(parents=True)
            file.write_bytes(np.random.default_rng(step).bytes(video_bytes))
            path = file.relative_to(folder)
            entries.append(f'"{step}": {{"videos": {{"rollout/video": "{path}"}}}}')
        (folder / "media" / "index.json").write_text("{" + ",".join(entries) + "}")
    return folder


def report(*words: str | Path) -> int:
    return analyze.main(["report", "--run_dir", *map(str, words)])


def test_one_run_has_its_page_in_its_folder(tmp_path, capsys):
    run = write_run(tmp_path / "outputs" / "one")
    assert report(run) == 0
    page = run / "report" / "index.html"
    assert "outputs/one" in page.read_text()
    assert f"{page}: " in capsys.readouterr().out


def test_several_runs_need_a_place_and_come_in_the_order_given(tmp_path, capsys):
    runs = [write_run(tmp_path / "outputs" / name) for name in ("b", "a")]
    assert report(*runs) == 1
    assert "--run_dir names 2 runs: say where to with --output_dir" in capsys.readouterr().err
    assert report(*runs, "--output_dir", tmp_path / "both") == 0
    text = (tmp_path / "both" / "index.html").read_text()
    assert text.index("outputs/b") < text.index("outputs/a")
    assert not (runs[0] / "report").exists()


def test_what_is_left_out_is_counted(tmp_path, capsys):
    run = write_run(tmp_path / "run", video_bytes=300_000)
    assert report(run, "--max_size_mib", "1.5") == 0
    said = capsys.readouterr().out
    assert "left out to stay below 1.5 MiB: 1 videos" in said
    assert (run / "report" / "index.html").stat().st_size <= 1.5 * 2**20


@pytest.mark.parametrize("words", [(".",), ("run", "run")])
def test_what_is_no_run_or_twice_the_same_is_refused(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    assert report(*words) == 1
    assert "--run_dir" in (said := capsys.readouterr().err) or "metrics.csv" in said


def test_a_run_that_another_process_writes_is_running(tmp_path):
    run = write_run(tmp_path / "run")
    assert not is_running(run)
    hold = (
        "import sys; from pathlib import Path; from callbacks.run_folder import RunLock; "
        "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(run)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert is_running(run)
        process.communicate("")
    assert not is_running(run)


def test_a_lock_that_cannot_be_read_does_not_say_that_the_run_goes_on(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run")
    (run / ".lock").mkdir()
    with pytest.raises(ValueError, match=r"\.lock: does not say .* make it readable, or remove"):
        is_running(run)
    (run / ".lock").rmdir()
    (run / ".lock").touch()
    for code, expected in ((errno.ENOLCK, False), (errno.EAGAIN, True), (errno.EACCES, True)):

        def refuse(*_, code=code):
            raise OSError(code, "refused")

        monkeypatch.setattr(fcntl, "lockf", refuse)
        assert is_running(run) == expected


def test_runs_of_one_name_are_told_apart_by_where_they_lie(tmp_path):
    here, there = (write_run(tmp_path / place / "demo" / "1") for place in ("here", "there"))
    assert names([here]) == ["demo/1"]
    assert names([here, there]) == ["here/demo/1", "there/demo/1"]
    assert report(here, there, "--output_dir", tmp_path / "both") == 0
    text = (tmp_path / "both" / "index.html").read_text()
    assert '"name":"here/demo/1"' in text
    assert '"name":"there/demo/1"' in text


def test_a_place_that_cannot_be_written_names_the_way_out(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    (run / "report").touch()
    assert report(run) == 1
    assert "choose another place with --output_dir" in capsys.readouterr().err
    assert report(run, "--output_dir", tmp_path / "other") == 0


def test_a_configuration_that_is_cut_is_named(tmp_path, capsys):
    runs = [write_run(tmp_path / name) for name in ("one", "two")]
    (runs[1] / "config.yaml").write_text("model: [")
    assert report(*runs, "--output_dir", tmp_path / "both") == 1
    assert f"{runs[1]}: its newest configuration is not YAML" in capsys.readouterr().err
