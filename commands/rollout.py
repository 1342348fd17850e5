"""``analyze.py rollout``: let a finished policy act, in every way asked for, in one table."""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from commands.inputs import device, task_class
from envs.rollout import Controller, RolloutResult, rollout
from envs.task import Task
from policies.ensembling import controller_of
from policies.interface import PolicyView
from policies.loading import LoadedPolicy, load_policy

RESULT_FILE = "rollout.json"


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


def run(arguments: argparse.Namespace) -> int:
    """Roll out, print one table, write JSON and a video per row.

    Raises:
        ValueError: For anything wrong with the arguments, the policy or the task.
    """
    from rich.console import Console

    folder = Path(arguments.output_dir)
    if (folder / RESULT_FILE).exists():
        raise ValueError(f"{folder / RESULT_FILE} is there already: choose another --output_dir")
    if arguments.n_episodes < 1:
        raise ValueError(f"--n_episodes is {arguments.n_episodes}: give at least 1")
    on = device(arguments.device)
    task_type = task_class(arguments.task)
    policy = load_policy(arguments.policy_path, on, arguments.revision)
    try:
        task = task_type.for_policy(policy.view.data_schema)
    except ValueError as error:
        raise ValueError(
            f"--task {arguments.task}: {error}, or name the policy's own task"
        ) from error
    plans = variants(policy, arguments.n_action_steps, arguments.temporal_ensemble_coeff)
    folder.mkdir(parents=True, exist_ok=True)
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.n_episodes)
    console = Console()
    rows = []
    for number, variant in enumerate(plans):
        console.print(f"{policy.source}  {variant.name}", highlight=False)
        began = time.perf_counter()
        result = rollout(
            policy.view,
            task,
            seeds,
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
        text = json.dumps({"complete": number + 1 == len(plans), "rows": rows}, indent=1)
        (folder / RESULT_FILE).write_text(text + "\n", encoding="utf-8")
    _print_table(console, rows, task)
    console.print(f"written to {folder}", highlight=False)
    return 0


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


def _print_table(console, rows: list[dict], task: Task) -> None:
    from rich.table import Table

    table = Table(title=f"{task.name}: {len(rows[0]['episodes'])} episodes a row")
    table.add_column("variant", no_wrap=True)
    names = [f"success_{threshold:.2f}" for threshold in task.success_thresholds]
    scores = [f"mean_max_{task.score_name}", f"mean_max_{task.reward_name}"]
    for name in (*names, *scores, "mean_n_steps"):
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*_cells(row, names, scores))
    console.print(table)


def _cells(row: dict, names: list[str], scores: list[str]) -> Iterator[str]:
    summary = row["summary"]
    yield row["variant"]
    for name in (*names, *scores):
        low, high = summary[f"{name}_low"], summary[f"{name}_high"]
        yield f"{summary[name]:.3f} [{low:.3f}, {high:.3f}]"
    yield f"{summary['mean_n_steps']:.0f}"
