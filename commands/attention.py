"""``analyze.py attention``: where ACT looks, along episodes or while it acts.

What it shares with ``analyze.py saliency`` is here: episodes in; maps, pictures and numbers out.
"""

import argparse
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from commands.inputs import (
    DataShape,
    choose_episodes,
    controller_for,
    device,
    episode_lengths,
    load_policies,
    open_demonstrations,
    switch,
    task_class,
    task_for,
)

if TYPE_CHECKING:
    import numpy as np
    import pyarrow
    from rich.console import Console
    from rich.table import Table

    from attention.attribution import Attribution
    from attention.counterfactuals import CounterfactualEffects
    from attention.faithfulness import Faithfulness
    from attention.method import Method, Target
    from envs.task import Task
    from policies.ensembling import ActionQueue, TemporalEnsembler
    from policies.interface import Batch
    from policies.loading import LoadedPolicy
    from rendering.attention import AttentionScene, AttentionStyle

METRICS_FILE = "metrics.json"
FAITHFULNESS_FILE = "faithfulness_strip.png"
N_STRIP_FRAMES = 6
METHOD_OPTIONS = {
    "layer": ("cross_attention", "encoder_attention"),
    "head": ("cross_attention", "encoder_attention"),
    "token": ("encoder_attention", "rollout"),
    "n_steps": ("integrated_gradients",),
    "baseline": ("integrated_gradients", "occlusion"),
    "patch_px": ("occlusion",),
}
"""Options that only these methods take, each by its own name."""
TARGET_OPTIONS = {
    "dimensions": ("relevancy", "grad_cam", "integrated_gradients", "occlusion"),
    "aggregation": ("relevancy", "grad_cam", "integrated_gradients"),
}
"""Options that tell coordinates of the action apart, which only these methods can."""
WITHOUT_TOKENS = ("integrated_gradients", "occlusion")
"""Methods whose maps are of pixels or patches: how fine tokens are does not matter to them."""
TABLE_ROWS = {
    "share_": (".3f", "of all relevance"),
    "concentration": (".3f", "0 even, 1 in one cell"),
    "completeness_error": (".4f", "0 when it adds up"),
    "deletion_ratio": (".2f", "above 1 beats chance"),
    "insertion_ratio": (".2f", "above 1 beats chance"),
    "spearman_occlusion": ("+.2f", "1 agrees"),
    "spearman_counterfactual": ("+.2f", "1 agrees"),
    "lift_": (".2f", "above 1 finds it"),
    "pointing_": (".2f", "share of hits"),
    "ssim_randomised": ("+.2f", "1 shows nothing learnt"),
}
"""Beginnings of the names in ``metrics.json`` that the printed table shows, with format and how to
read them."""
NOT_IN_TABLE = ("_ceiling", "_frames")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's own options."""
    from attention.methods import ATTENTION_METHODS

    costs = "a forward pass a frame, and relevancy a backward pass for every coordinate of actions"
    add_method(parser, ATTENTION_METHODS, "cross_attention", costs)
    parser.add_argument(
        "--layer",
        type=int,
        metavar="N",
        help="decoder layer of cross_attention, encoder layer of encoder_attention, counted from "
        "the last where negative (default: the last)",
    )
    parser.add_argument(
        "--head", type=int, metavar="N", help="one head of them (default: the mean of all)"
    )
    parser.add_argument(
        "--token",
        help="whose attention encoder_attention and rollout show: latent, state, "
        "environment_state, or a cell as CAMERA:ROW,COLUMN (default: encoder_attention the first "
        "token, rollout what the decoder attends to)",
    )
    add_common_arguments(parser, "relevancy")


def run(arguments: argparse.Namespace) -> int:
    """Explain, draw and write; print a table.

    Raises:
        ValueError: For anything wrong with the arguments, the policy or the data.
    """
    from attention.methods import ATTENTION_METHODS

    return explain_episodes(arguments, ATTENTION_METHODS)


def add_method(
    parser: argparse.ArgumentParser, names: Collection[str], default: str, costs: str
) -> None:
    """Add ``--method`` with the names that a command knows, and what they cost."""
    parser.add_argument(
        "--method",
        nargs="+",
        choices=list(names),
        default=[default],
        metavar="METHOD",
        help=f"one or more of {', '.join(names)} (default: {default}); {costs}",
    )


def add_common_arguments(parser: argparse.ArgumentParser, aggregating: str) -> None:
    """Add what both commands are told alike.

    Args:
        parser: Of the command.
        aggregating: Its methods that know ``--aggregation``.
    """
    parser.add_argument(
        "--queries",
        type=int,
        nargs="+",
        default=[0],
        metavar="K",
        help="chunk steps that are explained, on average (default: 0, the action to execute now)",
    )
    parser.add_argument(
        "--dimensions",
        type=int,
        nargs="+",
        metavar="D",
        help="action dimensions that are explained (default: all)",
    )
    parser.add_argument(
        "--aggregation",
        choices=("each", "sum", "norm"),
        help=f"of {aggregating}: relevance of each coordinate of the explained actions, then its "
        "mean; or for their sum; or for their L2 norm, at the cost of one (default: each)",
    )
    parser.add_argument(
        "--max_steps", type=int, metavar="N", help="frames of an episode; all if not given"
    )
    parser.add_argument(
        "--n_rollouts",
        type=int,
        default=0,
        metavar="N",
        help="let the policy act in N episodes of --task, too, and explain every step that it goes "
        "through (default: 0)",
    )
    parser.add_argument(
        "--first_seed",
        type=int,
        default=100_000,
        metavar="SEED",
        help="rollout i starts from seed SEED + i (default: %(default)s)",
    )
    parser.add_argument(
        "--n_action_steps", type=int, metavar="N", help="steps of a chunk that rollouts execute"
    )
    parser.add_argument(
        "--temporal_ensemble_coeff",
        type=float,
        metavar="M",
        help="let rollouts predict at every step and average overlapping chunks",
    )
    parser.add_argument(
        "--n_faithfulness_frames",
        type=int,
        default=8,
        metavar="N",
        help="frames, spread over all episodes, on which it is measured whether the maps are true; "
        "some 250 forward passes each, and 0 for none (default: %(default)s)",
    )
    parser.add_argument(
        "--batch_size",
        type=int,
        default=32,
        metavar="N",
        help="frames that go through the network together; changes no result",
    )
    parser.add_argument("--seed", type=int, default=0, help="of what chance would achieve")
    parser.add_argument(
        "--scale",
        choices=("frame", "episode", "fixed", "global"),
        default="frame",
        help="range of the colours: of each frame, of the episode, --value_range, or of cells and "
        "robot state of each frame together (default: frame)",
    )
    parser.add_argument(
        "--value_range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="values at the ends of the colour map, with --scale fixed",
    )
    parser.add_argument("--colormap", default="viridis", help="any of matplotlib's")
    parser.add_argument(
        "--overlay_alpha", type=float, default=0.5, metavar="A", help="weight of the colours, 0..1"
    )
    parser.add_argument(
        "--interpolation",
        choices=("nearest", "linear", "bicubic"),
        default="nearest",
        help="between the centres of cells; nearest shows the cells (default)",
    )
    parser.add_argument(
        "--show_proprio_border",
        type=switch,
        default=False,
        metavar="BOOL",
        help="put a magenta frame around each picture, the brighter the more the robot state "
        "counts (default: false; its share always stands beside the pictures)",
    )
    parser.add_argument(
        "--proprio_border_width", type=int, default=15, metavar="PX", help="of that frame"
    )
    parser.add_argument(
        "--target_height", type=int, default=360, metavar="PX", help="height of each picture"
    )
    parser.add_argument(
        "--videos", type=switch, default=True, metavar="BOOL", help="false: numbers and strips only"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files in --output_dir")


@dataclass(frozen=True)
class Episode:
    """Consecutive frames to explain, of a data set or of a rollout."""

    name: str
    """Part of file names: ``episode_3``, ``rollout_100000``."""
    batch: "Batch"
    label: str
    """What pictures call it."""
    captions: tuple[str, ...]
    """Of every frame, in a video."""
    fps: float


@dataclass(frozen=True)
class Subject:
    """A policy, what explains it, and the episodes."""

    loaded: "LoadedPolicy"
    methods: "Mapping[str, Method]"
    titles: Mapping[str, str]
    """Of each method, with what was chosen for it."""
    target: "Target"
    device: str
    """Of the policy."""
    episodes: "Callable[[], Iterator[Episode]]"
    """One after another."""
    n_frames: tuple[int, ...]
    """Of each episode."""
    task: "Task | None"
    """Simulator that may draw recorded states."""
    trained_on: tuple[int, ...]
    """Episodes, of those asked for, that the policy has seen in training."""
    note: str
    """How fine maps of tokens can be."""


def explain_episodes(arguments: argparse.Namespace, kinds: "Mapping[str, type[Method]]") -> int:
    """Explain episodes with every method asked for, write all results, print a table.

    Args:
        arguments: Of the command.
        kinds: Methods of the command, by name.

    Raises:
        ValueError: For anything wrong with the arguments, the policy or the data.
    """
    from rich.console import Console

    _check(arguments, kinds)
    style = _style(arguments)
    folder = _output_folder(arguments)
    console = Console()
    subject = _open(arguments, kinds, console)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (METRICS_FILE, FAITHFULNESS_FILE):
        # An interrupted run is not to look like the one that it was to replace.
        (folder / name).unlink(missing_ok=True)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in subject.methods}
    kept: list[tuple[str, Batch]] = []
    chosen = _spread(subject.n_frames, arguments.n_faithfulness_frames)
    for number, (episode, rows) in enumerate(zip(subject.episodes(), chosen, strict=True), start=1):
        title = f"{episode.name} ({number} of {len(chosen)})"
        for name, numbers in _study(folder, subject, episode, title, style, arguments).items():
            found[name].append({"episode": episode.name, **numbers})
        if len(rows):
            kept.append((episode.label, episode.batch.rows(rows)))
    verdicts, effects, reason = {}, None, ""
    if kept:
        n_kept = sum(map(len, chosen))
        with console.status(f"Measuring on {n_kept} frames whether the maps are true"):
            verdicts, effects, reason = _measure(folder, subject, kept, style, arguments)
    _write_metrics(folder, subject, found, verdicts, effects, arguments)
    _print(console, subject, found, verdicts, effects, reason, arguments)
    console.print(f"written to {folder}", highlight=False)
    return 0


# What is asked for


def _check(arguments: argparse.Namespace, kinds: "Mapping[str, type[Method]]") -> None:
    """Refuse what cannot work, or would be left aside, before anything long starts."""
    for name, least in (
        ("max_steps", 1),
        ("n_rollouts", 0),
        ("n_action_steps", 1),
        ("n_faithfulness_frames", 0),
        ("batch_size", 1),
        ("seed", 0),
        ("first_seed", 0),
    ):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} {value}: give at least {least}")
    for name in ("method", "queries", "dimensions"):
        values = getattr(arguments, name) or []
        if len(set(values)) < len(values):
            raise ValueError(f"--{name} names something twice: {values}")
    for option, able in (METHOD_OPTIONS | TARGET_OPTIONS).items():
        if getattr(arguments, option, None) is not None and not {*able} & {*arguments.method}:
            able = [name for name in able if name in kinds]
            raise ValueError(
                f"--{option} has no effect on {', '.join(arguments.method)}: leave it out, or add "
                f"--method {' or '.join(able)}"
            )
    if arguments.dataset_repo_id is None and not arguments.n_rollouts:
        raise ValueError(
            "nothing to look at: give --dataset_repo_id for recorded episodes, --n_rollouts for "
            "episodes in which the policy acts, or both"
        )
    without = (
        ("dataset_repo_id", ("episode_idx", "stats_from_data")),
        ("n_rollouts", ("n_action_steps", "temporal_ensemble_coeff")),
    )
    for needed, names in without:
        for name in names:
            given = getattr(arguments, name)
            if not getattr(arguments, needed) and given is not None and given is not False:
                raise ValueError(f"--{name} has no effect without --{needed}: leave it out")


def _given(
    options: Mapping[str, Sequence[str]], method: str, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Those of the options that the method takes and that were given."""
    found = {name: getattr(arguments, name, None) for name in options if method in options[name]}
    return {name: value for name, value in found.items() if value is not None}


def _style(arguments: argparse.Namespace) -> "AttentionStyle":
    """How to draw.

    Raises:
        ValueError: If an option cannot be drawn.
    """
    from rendering.attention import AttentionStyle

    try:
        return AttentionStyle(
            colormap=arguments.colormap,
            overlay_alpha=arguments.overlay_alpha,
            scale=arguments.scale,
            value_range=None if arguments.value_range is None else tuple(arguments.value_range),
            target_height=arguments.target_height,
            border="magenta" if arguments.show_proprio_border else "none",
            proprio_border_width=arguments.proprio_border_width,
            interpolation=arguments.interpolation,
        )
    except ValueError as error:
        raise _of_option(error, arguments) from error


def _of_option(error: ValueError, arguments: argparse.Namespace) -> ValueError:
    """Name the option where a message begins with what it is called within the program."""
    words = str(error).replace(":", " ").split()[:2]
    option = next((word for word in words if hasattr(arguments, word)), None)
    if option is None:
        return error
    return ValueError(f"--{error}" if words[0] == option else f"--{option}: {error}")


def _output_folder(arguments: argparse.Namespace) -> Path:
    """Where to write.

    Raises:
        ValueError: If nothing can be written there, or a finished result is there already.
    """
    folder = Path(arguments.output_dir).expanduser()
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"--output_dir {folder}: {there} is no folder that can be written to")
    if not arguments.overwrite and (folder / METRICS_FILE).exists():
        raise ValueError(
            f"{folder / METRICS_FILE} is there already: choose another --output_dir or add "
            "--overwrite"
        )
    return folder


# Policy and episodes


def _open(
    arguments: argparse.Namespace, kinds: "Mapping[str, type[Method]]", console: "Console"
) -> Subject:
    """Load the policy, check that the methods can explain it, find the episodes.

    Raises:
        ValueError: If they do not fit.
    """
    from attention.method import Target
    from attention.study import resolution_note
    from policies.act import ACTPolicy

    on = device(arguments.device)
    acting_in = task_class(arguments.task)
    data_path = arguments.dataset_repo_id
    steps = {} if data_path is None else episode_lengths(data_path)
    numbers = choose_episodes(arguments.episode_idx, list(steps)) if steps else []
    loaded = _load(arguments, on)
    view = loaded.view
    if not isinstance(view, ACTPolicy) and arguments.method != ["occlusion"]:
        raise ValueError(
            f"--method {' '.join(arguments.method)}: looks inside ACT, and {loaded.source} is "
            "none; use analyze.py saliency --method occlusion, which explains any policy"
        )
    try:
        dimensions = arguments.dimensions
        target = Target(
            tuple(sorted(arguments.queries)),
            None if dimensions is None else tuple(sorted(dimensions)),
            arguments.aggregation or "each",
        )
        target.check(view)
        methods = {
            name: kinds[name](**_given(METHOD_OPTIONS, name, arguments))
            for name in arguments.method
        }
        for method in methods.values():
            method.check(view)
    except ValueError as error:
        raise _of_option(error, arguments) from error
    # What is wrong with either is said before the other one takes its time.
    controller = controller_for(loaded, arguments.temporal_ensemble_coeff, arguments.n_action_steps)
    acting = acting_in.for_policy(view.data_schema) if arguments.n_rollouts else None
    data = None
    if data_path is not None:
        # Nothing is asked of the chunk, which may be longer than an episode.
        data = open_demonstrations(
            data_path, DataShape(view.data_schema, 1, view.n_obs_steps), numbers
        )
        data.setup()
    rollouts = []
    if acting is not None:
        rollouts = _rollouts(arguments, loaded, acting, controller, on, console.is_terminal)

    def episodes() -> "Iterator[Episode]":
        for number in numbers:
            assert data is not None
            batch = data.episode(number).rows(slice(arguments.max_steps))
            label = f"episode {number}"
            captions = tuple(f"{label}  step {step}" for step in batch.frame_index.tolist())
            yield Episode(f"episode_{number}", batch, label, captions, data.fps or 10.0)
        yield from rollouts

    longest = arguments.max_steps or max(steps.values(), default=0)
    return Subject(
        loaded=loaded,
        methods=methods,
        titles={name: _title(name, arguments) for name in methods},
        target=target,
        device=on,
        episodes=episodes,
        n_frames=(
            *(min(steps[number], longest) for number in numbers),
            *(len(episode.batch) for episode in rollouts),
        ),
        task=task_for(arguments.task, view.data_schema),
        trained_on=_trained_on(loaded, numbers, list(steps)),
        note=resolution_note(view) if {*methods} - {*WITHOUT_TOKENS} else "",
    )


def _title(method: str, arguments: argparse.Namespace) -> str:
    """What pictures call a method, with the options that it was given."""
    from rendering.attention_scenes import TITLES

    options = _given(METHOD_OPTIONS | TARGET_OPTIONS, method, arguments)
    if arguments.queries != [0]:
        options["chunk steps"] = arguments.queries
    words = [
        f"{name} {' '.join(map(str, sorted(value))) if isinstance(value, list) else value}"
        for name, value in options.items()
    ]
    return "  ".join([TITLES[method], *words])


def _load(arguments: argparse.Namespace, on: str) -> "LoadedPolicy":
    """Load the policy, scaled by its own statistics or, where it has none, as asked for.

    Raises:
        ValueError: If there is none, or it cannot be used.
    """
    from policies.loading import load_policy

    if arguments.dataset_repo_id is None:
        return load_policy(arguments.policy_path, on, arguments.revision)
    (loaded,) = load_policies(
        [arguments.policy_path],
        arguments.dataset_repo_id,
        on,
        arguments.revision,
        arguments.stats_from_data,
    )
    return loaded


def _trained_on(
    loaded: "LoadedPolicy", numbers: Sequence[int], available: Sequence[int]
) -> tuple[int, ...]:
    """Those of the episodes that the policy was trained on, as far as that is known.

    A checkpoint tells the numbers of its own data set: they hold when this one has the same.
    """
    split = loaded.split
    if split is None or sorted([*split["train"], *split["val"]]) != sorted(available):
        return ()
    return tuple(number for number in numbers if number in set(split["train"]))


def _rollouts(
    arguments: argparse.Namespace,
    loaded: "LoadedPolicy",
    task: "Task",
    controller: "ActionQueue | TemporalEnsembler",
    on: str,
    progress: bool,
) -> list[Episode]:
    """Let the policy act, and keep what it saw at every step.

    Raises:
        ValueError: If the policy does not fit the task.
    """
    import torch

    from envs.rollout import episode_observation, rollout
    from policies.interface import Batch

    view = loaded.view
    if arguments.max_steps is not None and is_dataclass(task):
        # Nobody waits for what is not looked at.
        task = replace(task, max_steps=min(arguments.max_steps, task.max_steps))
    result = rollout(
        view,
        task,
        range(arguments.first_seed, arguments.first_seed + arguments.n_rollouts),
        controller,
        on,
        record=arguments.n_rollouts,
        observe_every_step=True,
        progress=progress,
    )
    episodes = []
    for recording in result.recordings:
        assert recording.observations is not None
        n_steps = min(len(recording.actions), arguments.max_steps or task.max_steps)
        batch = Batch(
            observation=episode_observation(view, recording.observations[:n_steps]),
            actions=torch.from_numpy(recording.actions[:n_steps]).float()[:, None],
            action_is_pad=torch.zeros(n_steps, 1, dtype=torch.bool),
            episode_index=torch.full((n_steps,), recording.seed),
            frame_index=torch.arange(n_steps),
            simulator_state=torch.from_numpy(recording.simulator_states[:n_steps]).float(),
        )
        captions = tuple(
            text + ("  predicts" if predicted else "")
            for text, predicted in zip(recording.captions()[:-1], recording.predicted, strict=True)
        )[:n_steps]
        name, label = f"rollout_{recording.seed}", f"seed {recording.seed}"
        episodes.append(Episode(name, batch, label, captions, task.fps))
    return episodes


def _spread(lengths: Sequence[int], n_wanted: int) -> "list[Any]":
    """Rows of each episode, evenly spread over all frames."""
    import torch

    total = sum(lengths)
    places = torch.linspace(0, total - 1, min(n_wanted, total)).round().long()
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    return [places[(places >= start) & (places < end)] - start for start, end in pairwise(starts)]


# One episode


@dataclass(frozen=True)
class Part:
    """Consecutive frames of an episode, ready to be drawn."""

    batch: "Batch"
    captions: tuple[str, ...]
    found: "Attribution"


@dataclass(frozen=True)
class Record:
    """What is kept of one method's maps once they are drawn."""

    tables: "list[pyarrow.Table]"
    numbers: list[dict[str, float]]
    """Of each part."""
    strip: "list[AttentionScene]"


def _study(
    folder: Path,
    subject: Subject,
    episode: Episode,
    title: str,
    style: "AttentionStyle",
    arguments: argparse.Namespace,
) -> dict[str, dict[str, Any]]:
    """Explain one episode; write its maps, a strip, and videos of every method.

    Returns:
        Method to numbers, mean over frames.
    """
    from collections import deque

    from attention.table import write_maps
    from datamodules.progress import progress_bar
    from rendering.attention import attention_strip, video_paths
    from rendering.picture import write_png
    from rendering.video import write_videos

    cameras = list(subject.loaded.view.data_schema.cameras)
    records: dict[str, Record] = {}
    ranges = []
    n_steps = len(episode.batch) * len(subject.methods)
    with progress_bar(title, n_steps * (2 if arguments.videos else 1), True) as advance:
        for name in subject.methods:
            records[name] = Record([], [], [])
            parts = _explained(name, subject, episode, records[name], arguments, advance)
            if style.scale == "episode":
                parts = list(parts)
                ranges.append(_value_range(parts))
            if not arguments.videos:
                deque(parts, maxlen=0)
                continue
            value_range = ranges[-1] if ranges else None
            frames = _frames(parts, style, value_range, subject, name, advance)
            paths = video_paths(folder, f"{episode.name}_{name}", cameras)
            write_videos(paths, frames, episode.fps)
    tables = [table for record in records.values() for table in record.tables]
    write_maps(folder / f"{episode.name}.parquet", tables)
    strip = attention_strip(
        [record.strip for record in records.values()], style, ranges or None, subject.note
    )
    write_png(folder / f"{episode.name}_strip.png", strip)
    return {name: _mean(record.numbers) for name, record in records.items()}


def _explained(
    name: str,
    subject: Subject,
    episode: Episode,
    record: Record,
    arguments: argparse.Namespace,
    advance: "Callable[[int], None]",
) -> "Iterator[Part]":
    """Explain an episode part by part, and write down what is to be kept of each.

    An episode's maps of single pixels at once would need more memory than its pictures.
    """
    import torch

    from attention.study import explain, numbers
    from attention.table import map_table
    from rendering.attention_scenes import attention_scenes

    n_frames = len(episode.batch)
    shown = torch.linspace(0, n_frames - 1, min(N_STRIP_FRAMES, n_frames)).round().long()
    # Occlusion goes through the frames one by one, slowly: somebody may be watching.
    n_together = 1 if name == "occlusion" else arguments.batch_size
    for start in range(0, n_frames, n_together):
        places = slice(start, start + n_together)
        batch = episode.batch.rows(places)
        found = explain(
            subject.methods[name],
            subject.loaded.view,
            batch.to(subject.device).observation,
            subject.target,
            arguments.batch_size,
            advance,
        )
        record.tables.append(map_table(found, batch.episode_index, batch.frame_index))
        values: dict[str, Any] = {"n_frames": len(found), **numbers(found)}
        if found.completeness_error is not None:
            values["completeness_error"] = float(found.completeness_error.mean())
            values["completeness_error_max"] = float(found.completeness_error.max())
        record.numbers.append(values)
        found = _on_patches(found)
        rows = shown[(shown >= start) & (shown < start + len(batch))] - start
        steps = batch.frame_index[rows].tolist()
        captions = [f"{episode.label}  step {step}" for step in steps]
        record.strip.extend(
            attention_scenes(
                found.rows(rows),
                batch.observation.rows(rows),
                captions,
                title=subject.titles[name],
            )
        )
        yield Part(batch, episode.captions[places], found)


def _on_patches(found: "Attribution") -> "Attribution":
    """Sum maps of single pixels, of which nobody sees one, over patches as wide in all cameras."""
    from torch.nn.functional import avg_pool2d

    from attention.table import MOST_CELLS, N_PATCHES_ALONG

    smallest = min((values[0] for values in found.maps.values()), key=lambda each: each.numel())
    if smallest.numel() <= MOST_CELLS:
        return found
    side = max(round(min(smallest.shape) / N_PATCHES_ALONG), 1)
    maps = {
        name: avg_pool2d(values[:, None], side, ceil_mode=True, divisor_override=1)[:, 0]
        for name, values in found.maps.items()
    }
    cells_px = {name: side * cell_px for name, cell_px in found.cells_px.items()}
    return replace(found, maps=maps, cells_px=cells_px)


def _frames(
    parts: "Iterable[Part]",
    style: "AttentionStyle",
    value_range: tuple[float, float] | None,
    subject: Subject,
    method: str,
    advance: "Callable[[int], None]",
) -> "Iterator[Mapping[str, np.ndarray]]":
    """Draw every frame, once for each camera and once for all."""
    from rendering.attention import attention_frames
    from rendering.attention_scenes import attention_scenes

    note = "" if method in WITHOUT_TOKENS else subject.note
    for part in parts:
        for scene in attention_scenes(
            part.found, part.batch.observation, part.captions, title=subject.titles[method]
        ):
            yield attention_frames(scene, style, value_range, note)
            advance(1)


def _value_range(parts: "Sequence[Part]") -> tuple[float, float]:
    """Ends of the colours of a whole episode."""
    from rendering.attention_scenes import value_range_of

    lows, highs = zip(*(value_range_of(part.found) for part in parts), strict=True)
    return min(lows), max(highs)


# All episodes


def _measure(
    folder: Path,
    subject: Subject,
    kept: "Sequence[tuple[str, Batch]]",
    style: "AttentionStyle",
    arguments: argparse.Namespace,
) -> "tuple[dict[str, Faithfulness], CounterfactualEffects | None, str]":
    """Hold the maps of some frames against what the policy really depends on.

    Returns:
        Method to verdict; effects of the scene's objects; why there are none.
    """
    from attention.occlusion import Occlusion
    from attention.study import Evidence, explain, frames_together, judge
    from policies.interface import Batch
    from rendering.attention import attention_strip
    from rendering.attention_scenes import attention_scenes
    from rendering.picture import write_png

    view, target = subject.loaded.view, subject.target
    together = frames_together(view, arguments.batch_size)
    batch = Batch.concatenate(_alike([rows for _, rows in kept])).to(subject.device)
    maps = {
        name: explain(method, view, batch.observation, target, together)
        for name, method in subject.methods.items()
    }
    if "occlusion" in maps:
        occlusion = maps["occlusion"]
    else:
        occlusion = explain(Occlusion(), view, batch.observation, target, together)
    masks, effects, reason = _scene_effects(subject, batch, together)
    evidence = Evidence(batch.observation, occlusion, masks, effects)
    verdicts = judge(view, subject.methods, maps, evidence, target, together, seed=arguments.seed)
    captions = [
        f"{label}  step {step}" for label, rows in kept for step in rows.frame_index.tolist()
    ]
    scenes = [
        list(
            attention_scenes(
                _on_patches(found), batch.observation, captions, masks, subject.titles.get(name)
            )
        )
        for name, found in {**maps, "occlusion": occlusion}.items()
    ]
    # Frames of several episodes have no range in common.
    each_its_own = replace(style, scale="frame", value_range=None)
    strip = attention_strip(scenes, each_its_own, note=subject.note)
    write_png(folder / FAITHFULNESS_FILE, strip)
    return verdicts, effects, reason


def _alike(batches: "Sequence[Batch]") -> "list[Batch]":
    """Frames of data and of rollouts, without simulator states that only some of them have."""
    sizes = {
        0 if batch.simulator_state is None else batch.simulator_state.shape[-1] for batch in batches
    }
    if len(sizes) == 1:
        return list(batches)
    return [replace(batch, simulator_state=None) for batch in batches]


def _scene_effects(
    subject: Subject, batch: "Batch", batch_size: int
) -> "tuple[dict[str, Any] | None, CounterfactualEffects | None, str]":
    """Masks of the objects, and effects of taking them away; or why there are none."""
    from attention.counterfactuals import measure_counterfactuals
    from envs.scene import scene_variants

    if subject.task is None:
        return None, None, "the task's simulator does not show what the policy sees"
    if subject.loaded.view.n_obs_steps > 1:
        return None, None, "the policy sees a history, and the simulator draws single instants"
    if batch.simulator_state is None:
        return None, None, "not all of the frames hold states of the simulator"
    try:
        variants = scene_variants(subject.task, batch)
    except ValueError as error:
        return None, None, str(error)
    effects = measure_counterfactuals(
        subject.loaded.view,
        variants,
        subject.target.queries,
        batch_size,
        recorded=batch.observation,
    )
    return dict(variants.masks), effects, ""


def _write_metrics(
    folder: Path,
    subject: Subject,
    found: Mapping[str, list[dict[str, Any]]],
    verdicts: "Mapping[str, Faithfulness]",
    effects: "CounterfactualEffects | None",
    arguments: argparse.Namespace,
) -> None:
    from attention.study import effect_numbers
    from policies.atomic_files import write_atomically
    from policies.interface import in_unit
    from policies.json_files import json_text

    def named(values: Mapping[str, float]) -> dict[str, float]:
        return {in_unit(name, subject.loaded.action_unit): each for name, each in values.items()}

    document = {
        "policy": str(subject.loaded.source),
        "data": arguments.dataset_repo_id,
        "stats_from_data": subject.loaded.scaled_by_data,
        "queries": list(subject.target.queries),
        "action_unit": subject.loaded.action_unit,
        "trained_on": list(subject.trained_on),
        "note": subject.note,
        "object_camera": None if effects is None else _object_camera(subject),
        "counterfactual": {} if effects is None else named(effect_numbers(effects)),
        "methods": {
            name: {
                "mean": _mean(rows),
                "faithfulness": named(verdicts[name].scalars()) if name in verdicts else {},
                "per_episode": rows,
            }
            for name, rows in found.items()
        },
    }
    write_atomically(folder / METRICS_FILE, json_text(document))


def _mean(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join numbers of several parts or episodes: means over all frames, and the largest error."""
    total = sum(row["n_frames"] for row in rows)
    names = [name for name in rows[0] if name not in ("episode", "n_frames")]
    values = {name: sum(row[name] * row["n_frames"] for row in rows) / total for name in names}
    if "completeness_error_max" in values:
        values["completeness_error_max"] = max(row["completeness_error_max"] for row in rows)
    return {"n_frames": total, **values}


def _print(
    console: "Console",
    subject: Subject,
    found: Mapping[str, list[dict[str, Any]]],
    verdicts: "Mapping[str, Faithfulness]",
    effects: "CounterfactualEffects | None",
    reason: str,
    arguments: argparse.Namespace,
) -> None:
    """Print a column for each method, and what to know when reading it."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    n_frames = sum(subject.n_frames)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(f"mean over {n_frames} frames", no_wrap=True)
    for name in found:
        table.add_column(name.replace("_", "\n"), justify="right", no_wrap=True, min_width=9)
    table.add_column("", no_wrap=True, style="dim")
    _add_rows(table, [_mean(rows) for rows in found.values()])
    if verdicts:
        truths = [verdicts[name].scalars() for name in found]
        for truth in truths:
            # Known on all frames.
            truth.pop("completeness_error", None)
        table.add_section()
        n_measured = min(n_frames, arguments.n_faithfulness_frames)
        table.add_row(f"is it true? n = {n_measured}")
        _add_rows(table, truths)
    console.print(table)

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    if effects is not None:
        unit = subject.loaded.action_unit
        moved = [f"{name} {float(px.mean()):.3g} {unit}" for name, px in effects.effect_px.items()]
        say(f"taking objects out of the picture moves the action by: {', '.join(moved)}")
        if len(subject.loaded.view.data_schema.cameras) > 1:
            say(f"lift, pointing and outlines are about camera {_object_camera(subject)} alone")
    if reason:
        say(f"no masks and counterfactuals: {reason}")
    if subject.loaded.scaled_by_data:
        say(f"the policy brings no statistics: scaled by those of {arguments.dataset_repo_id}")
    if subject.trained_on:
        say(f"the policy was trained on episodes {list(subject.trained_on)}")
    if subject.note:
        say(subject.note)


def _object_camera(subject: Subject) -> str:
    """The camera that masks of objects belong to."""
    return next(iter(subject.loaded.view.data_schema.cameras))


def _add_rows(table: "Table", columns: "Sequence[Mapping[str, float]]") -> None:
    """Add a row for each metric that the table shows, and how to read it."""
    # Some methods say nothing of some inputs.
    richest = sorted(columns, key=len, reverse=True)
    metrics = dict.fromkeys(metric for values in richest for metric in values)
    for start, (form, reading) in TABLE_ROWS.items():
        for metric in metrics:
            if metric.startswith(start) and not metric.endswith(NOT_IN_TABLE):
                cells = [f"{each[metric]:{form}}" if metric in each else "" for each in columns]
                table.add_row(metric.replace("_", " "), *cells, reading)
