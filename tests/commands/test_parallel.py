"""Work over processes gives what one process gives, bit for bit, and a dead worker is said."""

import json
import os
import sys

import pytest
import torch
from pieces import die_at_two, refuse, square
from test_rollout_and_export import save_policy

import analyze
from policies.workers import WorkerError, map_over


def answers(n_workers):
    return [*map_over(square, range(6), n_workers)]


def test_answers_come_in_the_order_of_the_items_from_processes_of_one_thread():
    found = answers(2)
    assert [square for square, _, _ in found] == [0, 1, 4, 9, 16, 25]
    assert {threads for _, threads, _ in found} == {1}
    assert os.getpid() not in {process for _, _, process in found}
    assert [(square, process) for square, _, process in answers(0)] == [
        (number * number, os.getpid()) for number in range(6)
    ]


@pytest.mark.fault(7)
def test_a_killed_worker_is_an_error_and_no_wait():
    with pytest.raises(WorkerError, match=r"worker process \(of 1\) died.*fewer workers"):
        list(map_over(die_at_two, range(8), 1))


def test_an_error_in_a_worker_is_the_error_here():
    with pytest.raises(ValueError, match="0 is no good"):
        list(map_over(refuse, range(3), 1))
    with pytest.raises(ValueError, match="n_workers is -1"):
        list(map_over(refuse, range(3), -1))


def test_ray_that_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(WorkerError, match="uv sync --extra ray"):
        list(map_over(square, range(3), 1, "ray"))


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("policy") / "policy.ckpt")


def rollout(policy, folder, *more):
    return analyze.main(
        [
            "rollout",
            f"--policy_path={policy}",
            f"--output_dir={folder}",
            "--n_episodes=5",
            "--n_parallel=2",
            "--n_videos=3",
            "--device=cpu",
            "--task=pieces.BriefPushT",
            *more,
        ]
    )


def rows(folder):
    found = json.loads((folder / "rollout.json").read_text())["rows"]
    return [{key: row[key] for key in row.keys() - {"wall_s", "videos", "video"}} for row in found]


@pytest.fixture(scope="module")
def alone(policy, tmp_path_factory):
    """A rollout by this process, with one thread like a worker."""
    folder = tmp_path_factory.mktemp("alone") / "out"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert rollout(policy, folder) == 0
    finally:
        torch.set_num_threads(threads)
    return folder


def test_a_rollout_does_not_depend_on_who_plays_it(policy, alone, tmp_path, capsys):
    assert rollout(policy, tmp_path / "out", "--n_workers=2") == 0
    assert rows(tmp_path / "out") == rows(alone)
    assert (tmp_path / "out/rollout_queue3.mp4").stat().st_size > 1000


def test_shards_join_to_the_whole(policy, alone, tmp_path, capsys):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    shards = [tmp_path / f"shard{number}" for number in (1, 2)]
    assert rollout(policy, shards[0], "--shard=1/2") == 0
    assert rollout(policy, shards[1], "--shard=2/2", "--n_workers=1") == 0
    torch.set_num_threads(threads)
    merge = ["merge", f"--output_dir={tmp_path / 'whole'}", "--shards"]
    assert analyze.main([*merge, *map(str, reversed(shards))]) == 0
    assert rows(tmp_path / "whole") == rows(alone)

    capsys.readouterr()
    assert analyze.main([*merge, str(shards[0])]) == 1
    assert "is there already" in capsys.readouterr().err
    merge[1] = f"--output_dir={tmp_path / 'other'}"
    for given, message in (
        (shards[:1], "all of one rollout"),
        ([shards[0], shards[0]], "each once"),
        ([*shards, tmp_path], "cannot be read"),
    ):
        assert analyze.main([*merge, *map(str, given)]) == 1
        assert message in capsys.readouterr().err
    document = json.loads((shards[1] / "rollout.json").read_text())
    (shards[1] / "rollout.json").write_text(json.dumps({**document, "n_parallel": 1}))
    assert analyze.main([*merge, *map(str, shards)]) == 1
    assert "n_parallel differs" in capsys.readouterr().err
    (shards[1] / "rollout.json").write_text("[" * 3)
    assert analyze.main([*merge, *map(str, shards)]) == 1
    assert "is no result" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_shard_without_episodes_says_what_to_change(policy, tmp_path, capsys):
    assert rollout(policy, tmp_path / "out", "--n_parallel=5", "--shard=1/2") == 1
    assert "smaller --n_parallel" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        rollout(policy, tmp_path / "out", "--shard=3/2")
    assert "is no shard" in capsys.readouterr().err
