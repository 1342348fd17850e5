"""``analyze.py rollout``: let a finished policy act, in every way asked for, in one table.

Episodes play in groups of ``--n_parallel``. A group is a piece of work: for this process, for one
of ``--n_workers`` processes, or for another machine that was given another ``--shard``. Which
groups there are does not depend on who plays them, and so neither does the result, as long as all
compute with one thread, as workers do.
"""

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import batched
from pathlib import Path
from typing import Any

from commands.inputs import device, task_class
from envs.rollout import Controller, RolloutResult, joined, rollout
from envs.task import Task
from policies.atomic_files import write_atomically
from policies.ensembling import controller_of
from policies.interface import PolicyView
from policies.json_files import json_text
from policies.loading import LoadedPolicy, load_policy
from policies.workers import ENGINES, map_over

RESULT_FILE = "rollout.json"


@dataclass(frozen=True)
class Shard:
    """Which part of the groups is played here."""

    number: int = 1
    """From 1."""
    n_shards: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Read ``2/4``, the second of four.

        Raises:
            argparse.ArgumentTypeError: If it is no such thing.
        """
        first, _, second = text.partition("/")
        if not (first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second)):
            raise argparse.ArgumentTypeError(f"{text!r} is no shard; give 1/4, 2/4, 3/4 or 4/4")
        return cls(int(first), int(second))

    def of[Item](self, items: Sequence[Item]) -> list[Item]:
        """Its part of the items, consecutive ones."""
        ends = [len(items) * number // self.n_shards for number in (self.number - 1, self.number)]
        return list(items[ends[0] : ends[1]])

    def __str__(self) -> str:
        return f"{self.number}/{self.n_shards}"


@dataclass(frozen=True)
class Variant:
    """One way of turning a policy's chunks into actions."""

    name: str
    """Part of file names: ``queue8`` or ``ensemble0.01``."""
    n_action_steps: int | None
    temporal_ensemble_coeff: float | None

    def controller(self, view: PolicyView) -> Controller:
        """Build the queue or the ensembler."""
        return controller_of(view, self.n_action_steps, self.temporal_ensemble_coeff)


@dataclass(frozen=True)
class Group:
    """Episodes that advance together, and all that a worker needs to play them."""

    policy_path: str
    revision: str | None
    device: str
    task: str
    """Its class path."""
    variant: Variant
    seeds: tuple[int, ...]
    n_recorded: int
    """First episodes that are kept for drawing."""


@lru_cache(maxsize=1)
def _loaded(policy_path: str, revision: str | None, device: str, task: str):
    policy = load_policy(policy_path, device, revision)
    return policy.view, task_class(task).for_policy(policy.view.data_schema)


def play(group: Group) -> RolloutResult:
    """Play one group; a worker loads the policy once."""
    view, task = _loaded(group.policy_path, group.revision, group.device, group.task)
    return rollout(
        view,
        task,
        group.seeds,
        group.variant.controller(view),
        group.device,
        n_parallel=len(group.seeds),
        record=group.n_recorded,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's own options."""
    parser.add_argument(
        "--n_episodes", type=int, default=50, metavar="N", help="episodes per row of the table"
    )
    parser.add_argument(
        "--first_seed",
        type=int,
        default=100_000,
        metavar="SEED",
        help="episode i starts from seed SEED + i",
    )
    parser.add_argument(
        "--n_action_steps",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="execute this many steps of each chunk; one row of the table for each value",
    )
    parser.add_argument(
        "--temporal_ensemble_coeff",
        type=float,
        nargs="+",
        default=[],
        metavar="M",
        help="predict at every step and average with weights exp(-M i); one row for each value",
    )
    parser.add_argument(
        "--n_parallel", type=int, default=25, metavar="N", help="episodes that advance together"
    )
    parser.add_argument(
        "--n_videos", type=int, default=6, metavar="N", help="episodes shown in each video"
    )
    parser.add_argument(
        "--n_workers",
        type=int,
        default=0,
        metavar="N",
        help="processes of one thread that play groups of --n_parallel episodes; the result does "
        "not depend on how many (default: none, this process plays; to the bit the same when it "
        "has one thread, too: OMP_NUM_THREADS=1)",
    )
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="processes",
        help="where workers run: on this machine, or as tasks of the Ray cluster that RAY_ADDRESS "
        "names (default: %(default)s)",
    )
    parser.add_argument(
        "--shard",
        type=Shard.parse,
        default=Shard(),
        metavar="I/N",
        help="play only the I-th of N parts; analyze.py merge joins them",
    )


def run(arguments: argparse.Namespace) -> int:
    """Roll out, print one table, write JSON and a video per row.

    Raises:
        ValueError: For anything wrong with the arguments, the policy or the task.
    """
    from rich.console import Console

    from datamodules.activations import policy_hash

    folder = Path(arguments.output_dir)
    if (folder / RESULT_FILE).exists():
        raise ValueError(f"{folder / RESULT_FILE} is there already: choose another --output_dir")
    for name, least in (("n_episodes", 1), ("n_parallel", 1), ("n_workers", 0)):
        if getattr(arguments, name) < least:
            raise ValueError(f"--{name} is {getattr(arguments, name)}: give at least {least}")
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.n_episodes)
    groups = arguments.shard.of([*batched(seeds, arguments.n_parallel)])
    if not groups:
        raise ValueError(
            f"--shard {arguments.shard}: {arguments.n_episodes} episodes in groups of "
            f"{arguments.n_parallel} leave it none; give a smaller --n_parallel, to all shards"
        )
    on = device(arguments.device)
    task_type = task_class(arguments.task)
    policy = load_policy(arguments.policy_path, on, arguments.revision)
    try:
        task = task_type.for_policy(policy.view.data_schema)
    except ValueError as error:
        raise ValueError(
            f"--task {arguments.task}: {error}, or name the policy's own task"
        ) from error
    identity = policy_hash(policy.view)
    plans = variants(policy, arguments.n_action_steps, arguments.temporal_ensemble_coeff)
    folder.mkdir(parents=True, exist_ok=True)
    console = Console()
    rows = []
    for number, variant in enumerate(plans):
        console.print(f"{policy.source}  {variant.name}", highlight=False)
        began = time.perf_counter()
        if arguments.n_workers:
            result = _over_workers(arguments, on, variant, groups)
        else:
            result = rollout(
                policy.view,
                task,
                [seed for group in groups for seed in group],
                variant.controller(policy.view),
                on,
                n_parallel=arguments.n_parallel,
                record=arguments.n_videos,
                progress=console.is_terminal,
            )
        wall_s = time.perf_counter() - began
        video = _write_video(folder / f"rollout_{variant.name}.mp4", result, task)
        rows.append(
            {
                "policy": str(policy.source),
                "variant": variant.name,
                "n_action_steps": variant.n_action_steps,
                "temporal_ensemble_coeff": variant.temporal_ensemble_coeff,
                "first_seed": arguments.first_seed,
                "wall_s": wall_s,
                "video": None if video is None else video.name,
                **result.to_dict(),
            }
        )
        # After every row, so that an interruption loses only the row at work.
        document = {
            "complete": number + 1 == len(plans),
            "shard": str(arguments.shard),
            "n_episodes": arguments.n_episodes,
            "policy_hash": identity,
            "task": arguments.task,
            "n_parallel": arguments.n_parallel,
            "rows": rows,
        }
        write_atomically(folder / RESULT_FILE, json_text(document))
    print_table(console, rows)
    console.print(f"written to {folder}", highlight=False)
    return 0


def _over_workers(
    arguments: argparse.Namespace, on: str, variant: Variant, groups: Sequence[tuple[int, ...]]
) -> RolloutResult:
    work = []
    n_recorded = arguments.n_videos
    for seeds in groups:
        work.append(
            Group(
                arguments.policy_path,
                arguments.revision,
                on,
                arguments.task,
                variant,
                seeds,
                n_recorded,
            )
        )
        n_recorded = max(n_recorded - len(seeds), 0)
    return joined([*map_over(play, work, arguments.n_workers, arguments.engine)])


def variants(
    policy: LoadedPolicy, n_action_steps: list[int], coefficients: list[float]
) -> list[Variant]:
    """The rows asked for; what the policy itself is configured to do when nothing is.

    Raises:
        ValueError: If a queue would be longer than the policy's chunk.
    """
    chunk_size = policy.view.chunk_size
    for steps in n_action_steps:
        if not 1 <= steps <= chunk_size:
            raise ValueError(
                f"--n_action_steps {steps}: {policy.source} predicts chunks of {chunk_size}; "
                f"give 1 to {chunk_size}"
            )
    if not n_action_steps and not coefficients:
        coefficient = policy.temporal_ensemble_coeff
        if coefficient is not None:
            return [Variant(f"ensemble{coefficient:g}", None, coefficient)]
        n_action_steps = [policy.view.n_action_steps]
    queues = [Variant(f"queue{steps}", steps, None) for steps in n_action_steps]
    return queues + [Variant(f"ensemble{value:g}", None, value) for value in coefficients]


def _write_video(path: Path, result: RolloutResult, task: Task) -> Path | None:
    from rendering.video import Clip, write_clips

    clips: list[Clip] = [
        Clip(recording.frames(task), recording.captions()) for recording in result.recordings
    ]
    return write_clips(path, clips, task.fps, columns=3) if clips else None


def print_table(console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print one line a row, each number with its interval."""
    from rich.table import Table

    first = rows[0]
    table = Table(title=f"{first['task']}: {len(first['episodes'])} episodes a row")
    table.add_column("variant", no_wrap=True)
    names = [f"success_{threshold:.2f}" for threshold in first["success_thresholds"]]
    scores = [f"mean_max_{first['score_name']}", f"mean_max_{first['reward_name']}"]
    for name in (*names, *scores, "mean_n_steps"):
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*_cells(row, names, scores))
    console.print(table)


def _cells(row: Mapping[str, Any], names: list[str], scores: list[str]) -> Iterator[str]:
    summary = row["summary"]
    yield row["variant"]
    for name in (*names, *scores):
        low, high = summary[f"{name}_low"], summary[f"{name}_high"]
        yield f"{summary[name]:.3f} [{low:.3f}, {high:.3f}]"
    yield f"{summary['mean_n_steps']:.0f}"
