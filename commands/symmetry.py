"""``analyze.py symmetry``: is a task's second arm the exact mirror image of its first?"""

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from commands.inputs import choose_episodes, task_class

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from envs.symmetry import MirroredWorld, Script, SymmetryResult, WorldSymmetry
    from envs.task import Task

RESULT_FILE = "symmetry.json"
PICTURE_FILE = "symmetry.png"
VIDEO_FILE = "symmetry.mp4"
FIRST_SEED = 200_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's own options."""
    parser.add_argument(
        "--n_episodes",
        type=int,
        metavar="N",
        help="episodes to replay (default: 10, or those of --episode_idx)",
    )
    parser.add_argument(
        "--n_steps", type=int, default=200, metavar="N", help="longest replay, in control steps"
    )
    parser.add_argument(
        "--first_seed",
        type=int,
        metavar="SEED",
        help="without a data set, episode i is played from seed SEED + i by the task's own player "
        f"(default: {FIRST_SEED})",
    )
    parser.add_argument(
        "--look_every",
        type=int,
        default=5,
        metavar="N",
        help="compare pictures at every Nth step (default: 5)",
    )
    parser.add_argument(
        "--size_px",
        type=int,
        default=256,
        metavar="PX",
        help="of a tile of picture and video (default: 256)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files in --output_dir")


def run(arguments: argparse.Namespace) -> int:
    """Replay, compare, write, print two tables, and draw.

    Returns:
        0 if all holds that must, else 1.

    Raises:
        ValueError: For anything wrong with the arguments, the task or the data.
    """
    from rich.console import Console
    from rich.progress import Progress

    from envs.symmetry import measure_symmetry, mirrored_worlds
    from policies.atomic_files import write_atomically
    from policies.json_files import json_text

    _check(arguments)
    folder = Path(arguments.output_dir).expanduser()
    if not arguments.overwrite and (folder / RESULT_FILE).exists():
        raise ValueError(
            f"{folder / RESULT_FILE} is there already: choose another --output_dir or add "
            "--overwrite"
        )
    task = _first_arm(arguments.task)
    mirrored_worlds(task)  # Refuses a task without arms before anything long starts.
    scripts, source = _scripts(task, arguments)
    console = Console()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        shown = bar.add_task("Replays", total=len(scripts))
        result = measure_symmetry(
            task, scripts, arguments.look_every, lambda n_done: bar.update(shown, completed=n_done)
        )
    folder.mkdir(parents=True, exist_ok=True)
    record = {"source": source, "look_every": arguments.look_every, **result.to_dict()}
    write_atomically(folder / RESULT_FILE, json_text(record))
    _print(console, result, source)
    with console.status("Drawing"):
        _draw(folder, task, scripts[0], result, arguments.size_px)
    console.print(f"written to {folder}", highlight=False)
    return 0 if result.passed else 1


# What is replayed


def _check(arguments: argparse.Namespace) -> None:
    for name, least in (("n_episodes", 1), ("n_steps", 1), ("look_every", 1), ("first_seed", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} {value}: give at least {least}")
    if arguments.size_px < 32:
        raise ValueError(f"--size_px {arguments.size_px}: give at least 32")
    if arguments.episode_idx is not None and arguments.dataset_repo_id is None:
        raise ValueError("--episode_idx has no effect without --dataset_repo_id: leave it out")
    if arguments.first_seed is not None and arguments.dataset_repo_id is not None:
        raise ValueError(
            "--first_seed has no effect with --dataset_repo_id, whose episodes are replayed: leave "
            "one of them out"
        )
    if arguments.episode_idx is not None and arguments.n_episodes is not None:
        raise ValueError("--n_episodes and --episode_idx both choose episodes: give one of them")


def _first_arm(class_path: str) -> "Task":
    """Make the task with its defaults.

    Raises:
        ValueError: If there is no such task, or it has no defaults.
    """
    try:
        return task_class(class_path)()
    except TypeError as error:
        raise ValueError(
            f"--task {class_path}: cannot be made without arguments ({error}); give them defaults"
        ) from error


def _scripts(task: "Task", arguments: argparse.Namespace) -> "tuple[list[Script], str]":
    """What to replay, and where it comes from.

    Raises:
        ValueError: If there is nothing to replay.
    """
    from envs.symmetry import ScriptedTask

    if arguments.dataset_repo_id is not None:
        name = arguments.dataset_repo_id
        chosen, n_episodes = arguments.episode_idx, arguments.n_episodes or 10
        return recorded_scripts(task, name, arguments.n_steps, chosen, n_episodes), name
    if not isinstance(task, ScriptedTask):
        raise ValueError(
            f"task {task.name} has no player of its own: give --dataset_repo_id, demonstrations "
            "with simulator states"
        )
    first = FIRST_SEED if arguments.first_seed is None else arguments.first_seed
    n_episodes = arguments.n_episodes or 10
    seeds = range(first, first + n_episodes)
    source = f"the task's own player, seeds {seeds.start} to {seeds.stop - 1}"
    return [task.script(seed, arguments.n_steps) for seed in seeds], source


def recorded_scripts(
    task: "Task",
    dataset_repo_id: str,
    n_steps: int | None = None,
    episode_idx: Sequence[int | str] | None = None,
    n_episodes: int = 10,
) -> "list[Script]":
    """Starts and actions of demonstrations.

    Args:
        task: Of the data.
        dataset_repo_id: HDF5 file, folder of them, LeRobot folder, or hub id.
        n_steps: Most steps of each; all when None.
        episode_idx: Numbers of episodes, or the word all; the first ``n_episodes`` when None.
        n_episodes: How many, unless ``episode_idx`` says which.

    Raises:
        ValueError: If the data do not fit the task, or hold no states of its simulator.
    """
    from datamodules.opening import DataShape, episode_lengths, open_demonstrations
    from envs.replay import can_replay
    from envs.symmetry import Script

    available = sorted(episode_lengths(dataset_repo_id))
    chosen = choose_episodes(episode_idx or available[:n_episodes], available)
    shape = DataShape(task.data_schema(), chunk_size=1)
    data = open_demonstrations(dataset_repo_id, shape, chosen)
    data.setup()
    scripts = []
    for number in chosen:
        batch = data.episode(number)
        if not can_replay(task, batch):
            raise ValueError(
                f"--dataset_repo_id {dataset_repo_id}: episode {number} holds no states of task "
                f"{task.name}, so nothing can be replayed; give data with simulator states"
            )
        assert batch.simulator_state is not None
        start = batch.simulator_state[0].double().cpu().numpy()
        actions = batch.actions[:n_steps, 0].double().cpu().numpy()
        scripts.append(Script(f"episode {number}", start, actions))
    return scripts


# What is shown


def _frames(
    make: "MirroredWorld | Task", script: "Script", size_px: int
) -> "Iterator[tuple[np.ndarray, float | None]]":
    """Pictures of a replay and the score so far: at its start, then after every step."""
    env = make.make()
    try:
        env.reset_to(script.start)
        yield env.frame(size_px, script.actions[0]), None
        for number, action in enumerate(script.actions, start=1):
            score = env.step(action).score
            coming = script.actions[min(number, len(script.actions) - 1)]
            yield env.frame(size_px, coming), score
    finally:
        env.close()


def _draw(
    folder: Path, task: "Task", script: "Script", result: "SymmetryResult", size_px: int
) -> None:
    """Write the video of the first script, and a still of each world where it differs most."""
    from envs.mirrored import mirrored_picture
    from envs.symmetry import mirrored_script
    from rendering.layout import below, beside, blank, line
    from rendering.video import captioned, tile, write_video

    worlds = [each.world for each in result.worlds]
    instants = [_most_different(each, len(script.actions)) for each in result.worlds]
    stills: list[np.ndarray] = [blank(1, 1)] * len(worlds)
    gap_px = 8

    def grids() -> Iterator["np.ndarray"]:
        original = _frames(task, script, size_px)
        others = [_frames(each, mirrored_script(script, each.mirror), size_px) for each in worlds]
        for step, shown in enumerate(zip(original, *others, strict=True)):
            picture = shown[0][0]
            for place, (world, instant) in enumerate(zip(worlds, instants, strict=True)):
                if step == instant:
                    flipped = mirrored_picture(world.mirror, picture)
                    row = _still(picture, flipped, shown[1 + place][0], world, step)
                    stills[place] = beside(row, gap_px)
            titles = ["original", *(world.name for world in worlds)]
            yield tile(
                [
                    captioned(frame, _caption(title, step, score, result.score_name))
                    for title, (frame, score) in zip(titles, shown, strict=True)
                ],
                columns=2,
            )

    write_video(folder / VIDEO_FILE, grids(), task.fps)
    width = max(still.shape[1] for still in stills)
    head = line(f"{result.task_name}, {script.name}: where pictures differ most", width)
    rows = [head]
    for still in stills:
        rows += [blank(gap_px, width), still]
    _write_png(folder / PICTURE_FILE, below(*rows))


def _most_different(symmetry: "WorldSymmetry", n_steps: int) -> int:
    """Step of the first episode whose pictures differ most; its middle where none do."""
    episode = symmetry.episodes[0]
    if not (episode.picture_error > 0).any():
        return n_steps // 2
    return int(episode.picture_error.argmax()) * episode.looked_every


def _still(
    picture: "np.ndarray",
    flipped: "np.ndarray",
    mirrored: "np.ndarray",
    world: "MirroredWorld",
    step: int,
) -> "list[np.ndarray]":
    import numpy as np

    from rendering.video import captioned

    difference = np.abs(flipped.astype(np.int16) - mirrored.astype(np.int16))
    share = (difference.max(axis=-1) > 0).mean()
    shown = (255 - difference).astype(np.uint8)
    # White means equal: without a frame there would be nothing to see.
    shown[[0, -1]] = shown[:, [0, -1]] = 200
    return [
        captioned(picture, f"original, step {step}"),
        captioned(flipped, "original in the mirror"),
        captioned(mirrored, f"{world.name}: {world.title}"),
        captioned(shown, f"{share:.1%} of pixels differ"),
    ]


def _caption(title: str, step: int, score: float | None, score_name: str) -> str:
    return f"{title}  {step}" + ("" if score is None else f"  {score_name} {score:.3f}")


def _write_png(path: Path, picture: "np.ndarray") -> None:
    import cv2

    from policies.atomic_files import whole_file

    done, encoded = cv2.imencode(".png", picture[:, :, ::-1])
    if not done:
        raise OSError(f"{path}: the picture could not be encoded")
    with whole_file(path) as temporary:
        temporary.write_bytes(encoded.tobytes())


def _print(console: "Console", result: "SymmetryResult", source: str) -> None:
    from rich.table import Table

    table = Table(title=f"{result.task_name}: {source}", title_style="bold")
    table.add_column("world", no_wrap=True)
    unit = result.unit or "state"
    for column in ("exact", "disturbed", f"{unit}, median", f"{unit}, max"):
        table.add_column(column, justify="right")
    table.add_column("camera, of 255", justify="right")
    for each in result.worlds:
        found = each.summary()
        table.add_row(
            each.world.name,
            f"{round(found['share_exact'] * len(each.episodes))} of {len(each.episodes)}",
            str(found["n_disturbed"]),
            f"{found['position_median']:.2g}",
            f"{found['position_max']:.2g}",
            "none" if math.isnan(found["picture_error"]) else f"{found['picture_error']:.3g}",
        )
    console.print(table)
    console.print(_checks_table(result))


def _checks_table(result: "SymmetryResult") -> "object":
    from rich.table import Table

    table = Table(title="Checks", title_style="bold")
    for column in ("world", "what", "value", "tolerance", ""):
        table.add_column(column, justify="right" if column in ("value", "tolerance") else "left")
    for check in result.checks:
        verdict = "PASS" if check.passed else "FAIL" if check.must_hold else "differs"
        colour = {"PASS": "green", "FAIL": "red", "differs": "yellow"}[verdict]
        table.add_row(
            check.world,
            check.what,
            f"{check.value:.3g} {check.unit}".rstrip(),
            f"{'>' if check.is_control else '<='} {check.tolerance:g}",
            f"[{colour}]{verdict}[/{colour}]",
        )
    return table
