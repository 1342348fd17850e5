"""``analyze.py merge``: join the shards of a rollout into one result with its intervals."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands.rollout import RESULT_FILE, Shard, print_table
from envs.rollout import RolloutResult, joined
from policies.atomic_files import write_atomically

SAME = ("policy", "variant", "n_action_steps", "temporal_ensemble_coeff", "first_seed")
"""What all shards have in common."""


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
    document = {"complete": True, "shard": str(Shard()), "rows": rows}
    write_atomically(folder / RESULT_FILE, json.dumps(document, indent=1) + "\n")
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
        if part.settings != found[0].settings:
            raise ValueError(
                f"{part.file}: its rows are not those of {found[0].file}: a policy, a way of "
                "acting, a seed or n_parallel differs; give the shards of one rollout"
            )
    return [_merged(found, place) for place in range(len(found[0].rows))]


@dataclass(frozen=True)
class _Part:
    file: Path
    shard: Shard
    n_parallel: int
    rows: list[dict[str, Any]]

    @property
    def settings(self) -> list[Any]:
        return [self.n_parallel, *([row.get(name) for name in SAME] for row in self.rows)]


def _read(folder: Path) -> _Part:
    file = folder / RESULT_FILE
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        part = _Part(
            file, Shard.parse(document["shard"]), document["n_parallel"], list(document["rows"])
        )
        complete = document["complete"]
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"{file}: is no result of analyze.py rollout --shard ({error})") from error
    if not complete:
        raise ValueError(f"{file}: that rollout has not finished; play the shard again")
    return part


def _merged(found: Sequence[_Part], place: int) -> dict[str, Any]:
    results = []
    for part in found:
        try:
            results.append(RolloutResult.from_dict(part.rows[place]))
        except ValueError as error:
            raise ValueError(f"{part.file}: {error}; play the shard again") from error
    rows = [part.rows[place] for part in found]
    return {
        **{name: rows[0][name] for name in SAME},
        "wall_s": sum(row["wall_s"] for row in rows),
        "videos": [
            str(part.file.parent / row["video"])
            for part, row in zip(found, rows, strict=True)
            if row["video"]
        ],
        **joined(results).to_dict(),
    }
