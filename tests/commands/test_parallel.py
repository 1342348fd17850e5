"""Work over processes gives what one process gives, bit for bit, and a dead worker is said."""

import json
import os
import sys

import pytest
import torch
from pieces import die_at_two, note_and_wait, refuse, refuse_unreadably, square
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


def test_a_failure_ends_all_others_at_once(tmp_path):
    with pytest.raises(ValueError, match="the disk is full"):
        list(map_over(note_and_wait, [(tmp_path, number) for number in range(20)], 2))
    # Nothing was waited for, and of 20 pieces at most one was asked for beyond two at a time.
    assert len(list(tmp_path.iterdir())) <= 4


def test_an_error_that_cannot_be_sent_is_said_with_its_text():
    with pytest.raises(WorkerError, match="UnreadableError: file 3 is broken"):
        list(map_over(refuse_unreadably, [3], 1))


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
        ([*shards, tmp_path], "no such file"),
    ):
        assert analyze.main([*merge, *map(str, given)]) == 1
        assert message in capsys.readouterr().err
    file = shards[1] / "rollout.json"
    document = json.loads(file.read_text())
    (row,) = document["rows"]
    for changed, message in (
        ({"n_parallel": 1}, "n_parallel is 1"),
        ({"n_episodes": 6}, "n_episodes is 6"),
        ({"task": "pieces.Other"}, "task is 'pieces.Other'"),
        ({"rows": []}, "has not finished"),
        ({"complete": False}, "has not finished"),
        ({"shard": 2}, "is no result"),
        ({"rows": [1]}, "is no result"),
        ({"rows": [{**row, "wall_s": "long"}]}, "is no result"),
        ({"rows": [{**row, "episodes": []}]}, "is no result"),
        ({"rows": [{**row, "episodes": row["episodes"][1:]}]}, "missing"),
        ({"rows": [{**row, "episodes": row["episodes"][::-1]}]}, "in order"),
    ):
        file.write_text(json.dumps({**document, **changed}))
        assert analyze.main([*merge, *map(str, shards)]) == 1, changed
        error = capsys.readouterr().err
        assert message in error
        assert len(error.strip().splitlines()) == 1
    for damaged in ("[" * 3, "[" * 100_000, "[]"):
        file.write_text(damaged)
        assert analyze.main([*merge, *map(str, shards)]) == 1
        assert str(file) in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_shards_of_another_policy_are_refused(policy, tmp_path, capsys):
    moved = tmp_path / "moved" / "policy.ckpt"
    moved.parent.mkdir()
    moved.write_bytes(policy.read_bytes())
    shards = [tmp_path / f"shard{number}" for number in (1, 2, 3)]
    few = ["--n_episodes=2", "--n_parallel=1", "--n_videos=0"]
    assert rollout(policy, shards[0], *few, "--shard=1/2") == 0
    assert rollout(moved, shards[1], *few, "--shard=2/2") == 0
    # Other weights under the same name.
    content = torch.load(moved, weights_only=True)
    weights = content["state_dict"]
    weights.update({name: each + 0.1 for name, each in weights.items() if each.is_floating_point()})
    torch.save(content, moved)
    assert rollout(moved, shards[2], *few, "--shard=2/2") == 0
    merge = ["merge", f"--output_dir={tmp_path / 'whole'}", "--shards"]
    capsys.readouterr()
    assert analyze.main([*merge, str(shards[0]), str(shards[2])]) == 1
    assert "policy_hash is" in capsys.readouterr().err
    # The same policy may lie elsewhere on another machine.
    assert analyze.main([*merge, str(shards[0]), str(shards[1])]) == 0


def test_a_shard_without_episodes_says_what_to_change(policy, tmp_path, capsys):
    assert rollout(policy, tmp_path / "out", "--n_parallel=5", "--shard=1/2") == 1
    assert "smaller --n_parallel" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        rollout(policy, tmp_path / "out", "--shard=3/2")
    assert "is no shard" in capsys.readouterr().err
