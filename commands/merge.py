"""``analyze.py merge``: join the shards of a rollout into one result with its intervals."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands.rollout import RESULT_FILE, Shard, print_table
from envs.rollout import RolloutResult, joined
from policies.atomic_files import write_atomically
from policies.json_files import json_text, read_json

SAME = ("variant", "n_action_steps", "temporal_ensemble_coeff", "first_seed")
"""What a row has in common in all shards."""
SAME_IN_ALL = ("n_episodes", "n_parallel", "policy_hash", "task")
"""What shards themselves have in common; a policy may lie elsewhere on another machine."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's own options."""
    parser.add_argument(
        "--shards",
        nargs="+",
        required=True,
        metavar="DIR",
        help="folders that analyze.py rollout --shard wrote, all of them, in any order",
    )


def run(arguments: argparse.Namespace) -> int:
    """Join, print one table, write JSON.

    Raises:
        ValueError: If a shard is missing, unfinished, damaged, or of another rollout.
    """
    from rich.console import Console

    folder = Path(arguments.output_dir)
    if (folder / RESULT_FILE).exists():
        raise ValueError(f"{folder / RESULT_FILE} is there already: choose another --output_dir")
    rows = merge([Path(shard) for shard in arguments.shards])
    folder.mkdir(parents=True, exist_ok=True)
    first = read_json(Path(arguments.shards[0]) / RESULT_FILE)
    document = {
        "complete": True,
        "shard": str(Shard()),
        **{name: first[name] for name in SAME_IN_ALL},
        "rows": rows,
    }
    write_atomically(folder / RESULT_FILE, json_text(document))
    console = Console()
    print_table(console, rows)
    console.print(f"written to {folder}", highlight=False)
    return 0


def merge(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Rows of the whole rollout.

    Args:
        folders: Of the shards.

    Raises:
        ValueError: If a shard is missing, unfinished, damaged, or of another rollout.
    """
    found = sorted((_read(folder) for folder in folders), key=lambda part: part.shard.number)
    names = [str(part.shard) for part in found]
    n_shards = found[0].shard.n_shards
    if names != [str(Shard(number, n_shards)) for number in range(1, n_shards + 1)]:
        raise ValueError(f"--shards: these are {names}; give all of one rollout, each once")
    for part in found[1:]:
        for name, value in part.settings.items():
            if value != found[0].settings[name]:
                raise ValueError(
                    f"{part.file}: {name} is {value!r}, that of {found[0].file} is "
                    f"{found[0].settings[name]!r}; give the shards of one rollout"
                )
    return [_merged(found, place) for place in range(len(found[0].rows))]


@dataclass(frozen=True)
class _Part:
    file: Path
    shard: Shard
    settings: dict[str, Any]
    """Name to what must be the same in all."""
    rows: list[dict[str, Any]]
    results: list[RolloutResult]
    """Of each row."""


def _read(folder: Path) -> _Part:
    file = folder / RESULT_FILE
    document = read_json(file)
    try:
        shard = Shard.parse(document["shard"])
        rows = list(document["rows"])
        settings = {name: document[name] for name in SAME_IN_ALL}
        settings["rows"] = [[row[name] for name in SAME] for row in rows]
        results = [RolloutResult.from_dict(row) for row in rows]
        for row, result in zip(rows, results, strict=True):
            # Numbers that are none would be found out only when they are joined.
            result.summary()
            if not isinstance(row["policy"], str) or not row["wall_s"] >= 0:
                raise ValueError(f"policy {row['policy']!r}, wall_s {row['wall_s']!r}")
            range(row["first_seed"], row["first_seed"] + document["n_episodes"])
            Path(row["video"] or "")
        complete = document["complete"]
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        ZeroDivisionError,
        argparse.ArgumentTypeError,
    ) as error:
        raise ValueError(
            f"{file}: is no result of analyze.py rollout --shard ({error!r}); play the shard again"
        ) from error
    if not complete or not rows:
        raise ValueError(f"{file}: that rollout has not finished; play the shard again")
    return _Part(file, shard, settings, rows, results)


def _merged(found: Sequence[_Part], place: int) -> dict[str, Any]:
    whole = joined([part.results[place] for part in found])
    rows = [part.rows[place] for part in found]
    first = rows[0]["first_seed"]
    expected = range(first, first + found[0].settings["n_episodes"])
    if [episode.seed for episode in whole.episodes] != [*expected]:
        seeds = {episode.seed for episode in whole.episodes}
        missing = sorted({*expected} - seeds)
        raise ValueError(
            f"--shards: together they are not the episodes of seeds {expected.start} to "
            f"{expected.stop - 1} in order; missing {missing[:8]}, not of it "
            f"{sorted(seeds - {*expected})[:8]}; give all shards of one rollout, each once"
        )
    return {
        "policy": rows[0]["policy"],
        **{name: rows[0][name] for name in SAME},
        "wall_s": sum(row["wall_s"] for row in rows),
        "videos": [
            str(part.file.parent / row["video"])
            for part, row in zip(found, rows, strict=True)
            if row["video"]
        ],
        **whole.to_dict(),
    }
