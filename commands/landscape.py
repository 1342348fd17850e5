"""``analyze.py landscape``: what a policy would do everywhere on the board, along an episode."""

import argparse
import inspect
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from commands.inputs import (
    choose_episodes,
    controller_for,
    device,
    ensemble_coefficient,
    episode_lengths,
    load_policies,
    open_demonstrations,
    switch,
    task_for,
)
from landscapes.landscape import HORIZONS

if TYPE_CHECKING:
    import torch

    from datamodules.base import DemonstrationDataModule
    from envs.task import Task
    from landscapes.landscape import Landscape, Predictions
    from landscapes.methods import Method
    from landscapes.metrics import LandscapeMetrics
    from landscapes.study import Calibration, Frames
    from policies.ensembling import ActionQueue, TemporalEnsembler
    from policies.interface import SamplingPolicyView
    from policies.loading import LoadedPolicy
    from rendering.landscape_scenes import Column

METRICS_FILE = "metrics.json"
N_CALIBRATION_EPISODES = 8
N_LATENT_FRAMES = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's own options."""
    from landscapes.methods import METHODS

    parser.add_argument(
        "--scoring_method",
        nargs="+",
        default=["likelihood"],
        metavar="METHOD",
        help=f"one or more of {', '.join(METHODS)} (default: likelihood)",
    )
    parser.add_argument(
        "--horizons",
        type=int,
        nargs="+",
        metavar="K",
        help=f"chunk steps to show (default: those of {list(HORIZONS)} that the chunk holds)",
    )
    parser.add_argument(
        "--action_resolution", type=int, default=128, metavar="N", help="cells along each axis"
    )
    parser.add_argument(
        "--max_steps", type=int, metavar="N", help="frames to show; all if not given"
    )
    parser.add_argument(
        "--n_samples", type=int, default=64, metavar="K", help="action chunks drawn per frame"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the drawn chunks")
    parser.add_argument(
        "--calibration_episodes",
        type=int,
        nargs="+",
        metavar="N",
        help="episodes that ACT's kernel scale is fitted on: others than those shown, and best "
        "such as it was not trained on either; --episode_idx all leaves them out "
        f"(default: {N_CALIBRATION_EPISODES} spread over the data set)",
    )
    parser.add_argument(
        "--n_calibration_frames",
        type=int,
        default=64,
        metavar="N",
        help="frames of them that are used, evenly spread (default: %(default)s)",
    )
    parser.add_argument(
        "--kernel_scale",
        type=float,
        metavar="B",
        help="Laplace scale of the kernels in data units, instead of fitting it",
    )
    parser.add_argument(
        "--n_evidence_frames",
        type=int,
        default=4,
        metavar="N",
        help="frames whose whole demonstrated chunk ACT's evidence is estimated for",
    )
    parser.add_argument(
        "--n_ode_frames",
        type=int,
        default=0,
        metavar="N",
        help="frames whose whole demonstrated chunk Diffusion Policy's ODE scores; minutes each "
        "on a CPU with the default network (default: 0)",
    )
    parser.add_argument(
        "--n_action_steps", type=int, metavar="N", help="queue whose executed action is marked"
    )
    parser.add_argument(
        "--temporal_ensemble_coeff",
        type=float,
        metavar="M",
        help="mark what the temporal ensemble would execute; also used by belief",
    )
    parser.add_argument(
        "--batch_size",
        type=int,
        default=64,
        metavar="N",
        help="frames or candidates that go through the network together; changes no result",
    )
    parser.add_argument("--colormap", default="viridis", help="any of matplotlib's")
    parser.add_argument(
        "--show_policy_prediction", type=switch, default=True, metavar="BOOL", help="default: true"
    )
    parser.add_argument(
        "--show_confidence_intervals",
        type=switch,
        default=True,
        metavar="BOOL",
        help="outline the 50, 80 and 95 %% credible regions (default: true)",
    )
    parser.add_argument(
        "--target_height", type=int, default=480, metavar="PX", help="height of the videos"
    )
    parser.add_argument(
        "--trace_length",
        type=int,
        default=10,
        metavar="N",
        help="demonstrated actions in the trace",
    )
    parser.add_argument(
        "--videos", type=switch, default=True, metavar="BOOL", help="false: numbers and arrays only"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files in --output_dir")


@dataclass(frozen=True)
class Subject:
    """One policy, with the demonstrations as it sees them."""

    label: str
    """Tells policies apart: file names and titles; empty when there is one."""
    loaded: "LoadedPolicy"
    view: "SamplingPolicyView"
    data: "DemonstrationDataModule"
    horizons: tuple[int, ...]
    methods: "tuple[Method, ...]"
    held_out: set[int] | None
    """Episodes that the policy has not been trained on; None when that is not known."""
    calibration_episodes: tuple[int, ...]
    calibration: "Calibration | None"
    """None when the data set has no other episode."""
    controller: "ActionQueue | TemporalEnsembler"
    """What would execute the policy's chunks."""
    task: "Task | None"
    """Simulator that may draw recorded states."""


@dataclass(frozen=True)
class Episode:
    """What one policy answered along one episode."""

    frames: "Frames"
    predictions: "Predictions"
    scale: "torch.Tensor"
    landscapes: "tuple[Landscape, ...]"
    """One for each method."""
    executed: "torch.Tensor"
    executed_age: "torch.Tensor | None"
    wall_s: float
    """From observations to landscapes, without metrics and drawing."""


def run(arguments: argparse.Namespace) -> int:
    """Compute, draw and write; print a table for each policy.

    Raises:
        ValueError: For anything wrong with the arguments, the policies or the data.
    """
    from rich.console import Console

    _check(arguments)
    folder = Path(arguments.output_dir).expanduser()
    if not arguments.overwrite and (folder / METRICS_FILE).exists():
        raise ValueError(
            f"{folder / METRICS_FILE} is there already: choose another --output_dir or add "
            "--overwrite"
        )
    lengths = episode_lengths(arguments.dataset_repo_id)
    arguments.episode_idx = _shown_episodes(arguments, list(lengths))
    subjects = _open(arguments, lengths)
    folder.mkdir(parents=True, exist_ok=True)
    console = Console()
    found: dict[str, list[Episode]] = {subject.label: [] for subject in subjects}
    for number in arguments.episode_idx:
        columns: list[Column] = []
        for subject in subjects:
            below = folder / subject.label if subject.label else folder
            below.mkdir(exist_ok=True)
            episode = _study(subject, number, arguments)
            # Numbers need no boards, which are far larger than all else.
            found[subject.label].append(replace(episode, landscapes=()))
            columns += _write_episode(below, subject, episode, number, arguments)
        if arguments.videos and len(columns) > 1:
            _write_comparison(folder, subjects[0], number, columns, arguments)
    measured = [_measure(subject, found[subject.label], arguments) for subject in subjects]
    _write_metrics(folder, subjects, measured, arguments)
    _print_tables(console, subjects, measured)
    for subject in subjects:
        if subject.loaded.scaled_by_data:
            by = arguments.dataset_repo_id
            console.print(f"{subject.label} brings no statistics: scaled by those of {by}".strip())
        if subject.held_out is None:
            continue
        seen = [number for number in arguments.episode_idx if number not in subject.held_out]
        if seen:
            console.print(f"{subject.label} was trained on episodes {seen}".strip())
    if len(arguments.episode_idx) == 1:
        console.print("one episode: no intervals, and little said about others")
    console.print(f"written to {folder}", highlight=False)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what cannot work before anything long starts."""
    from landscapes.grid import Grid
    from rendering.colour import colour_table
    from rendering.landscape import board_px

    Grid(arguments.action_resolution)
    board_px(arguments.target_height)
    colour_table(arguments.colormap)
    for name, least in (
        ("n_samples", 2),
        ("batch_size", 1),
        ("max_steps", 1),
        ("n_calibration_frames", 1),
        ("n_evidence_frames", 1),
        ("n_ode_frames", 0),
        ("n_action_steps", 1),
        ("trace_length", 0),
        ("seed", 0),
    ):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} {value}: give at least {least}")
    if arguments.kernel_scale is not None and not arguments.kernel_scale > 0:
        raise ValueError(f"--kernel_scale {arguments.kernel_scale}: give a positive length")
    if len(set(arguments.scoring_method)) < len(arguments.scoring_method):
        raise ValueError(f"--scoring_method names something twice: {arguments.scoring_method}")


def _shown_episodes(arguments: argparse.Namespace, available: Sequence[int]) -> list[int]:
    """Numbers of the episodes to show; of all, those that the scale is not fitted on.

    Raises:
        ValueError: If there is no such episode, or one were shown that the scale is fitted on.
    """
    shown = choose_episodes(arguments.episode_idx, available)
    fitted_on = {*(arguments.calibration_episodes or [])}
    if arguments.episode_idx == ["all"]:
        shown = [number for number in shown if number not in fitted_on]
        if not shown:
            raise ValueError(
                "--calibration_episodes names every episode: none is left to be shown. Give fewer"
            )
    if both := sorted({*shown} & fitted_on):
        raise ValueError(
            f"--calibration_episodes {both}: they are shown, too; a scale that is fitted on what "
            "it is judged by looks too good. Give others"
        )
    return shown


def _open(arguments: argparse.Namespace, lengths: Mapping[int, int]) -> list[Subject]:
    """Load policies and demonstrations, and check that they fit each other.

    Args:
        arguments: Of the command, with the episodes to show.
        lengths: Steps of each episode of the data set, by its number.

    Raises:
        ValueError: If they do not.
    """
    from landscapes.methods import kind_of
    from landscapes.study import reachable_horizons
    from policies.interface import SamplingPolicyView

    loaded = load_policies(
        arguments.policy_path,
        arguments.dataset_repo_id,
        device(arguments.device),
        arguments.revision,
        arguments.stats_from_data,
    )
    subjects = []
    for policy, label in zip(loaded, _labels(arguments.policy_path), strict=True):
        view = policy.view
        if not isinstance(view, SamplingPolicyView):
            raise ValueError(f"{policy.source}: it draws no action chunks, so it has no density")
        coefficient = ensemble_coefficient(
            policy, arguments.temporal_ensemble_coeff, arguments.n_action_steps
        )
        methods = tuple(
            _build_method(name, coefficient, arguments) for name in arguments.scoring_method
        )
        for method in methods:
            method.check(view)
        if arguments.n_ode_frames and kind_of(view) != "diffusion":
            raise ValueError(
                f"--n_ode_frames {arguments.n_ode_frames}: {policy.source} is no Diffusion Policy; "
                "leave the option out"
            )
        horizons = reachable_horizons(view, arguments.horizons)
        controller = controller_for(
            policy, arguments.temporal_ensemble_coeff, arguments.n_action_steps
        )
        subjects.append(
            _with_data(policy, view, label, methods, horizons, controller, lengths, arguments)
        )
    return subjects


def _with_data(
    policy: "LoadedPolicy",
    view: "SamplingPolicyView",
    label: str,
    methods: "tuple[Method, ...]",
    horizons: tuple[int, ...],
    controller: "ActionQueue | TemporalEnsembler",
    lengths: Mapping[int, int],
    arguments: argparse.Namespace,
) -> Subject:
    task = task_for(arguments.task, view.data_schema)
    shown = arguments.episode_idx
    available = sorted(lengths)
    longest = max(lengths[number] for number in shown)
    if arguments.n_ode_frames and min(longest, arguments.max_steps or longest) < 3:
        raise ValueError("--n_ode_frames needs three steps: two of them are the past")
    if arguments.n_ode_frames and longest < view.chunk_size + 2:
        raise ValueError(
            f"--n_ode_frames: the longest episode shown has {longest} steps, no whole chunk of "
            f"{view.chunk_size} after two steps of past; show a longer one"
        )
    held_out = _held_out(policy, available)
    chosen = _calibration_episodes(arguments, available, held_out)
    data = open_demonstrations(arguments.dataset_repo_id, view, [*shown, *chosen])
    data.setup()
    calibration = _calibration(view, data, chosen, methods, horizons, arguments)
    return Subject(
        label=label,
        loaded=policy,
        view=view,
        data=data,
        horizons=horizons,
        methods=methods,
        held_out=held_out,
        calibration_episodes=tuple(chosen),
        calibration=calibration,
        controller=controller,
        task=task,
    )


def _calibration(
    view: "SamplingPolicyView",
    data: "DemonstrationDataModule",
    episodes: Sequence[int],
    methods: "tuple[Method, ...]",
    horizons: tuple[int, ...],
    arguments: argparse.Namespace,
) -> "Calibration | None":
    """Frames that scales are fitted on, with the policy's answers where those are needed.

    Raises:
        ValueError: If a scale is to be fitted and there is no episode for it.
    """
    from datamodules.progress import progress_bar
    from landscapes.methods import queries_for
    from landscapes.study import Calibration, Frames, is_calibrated, predict_frames

    is_needed = is_calibrated(view) and arguments.kernel_scale is None
    if not episodes:
        if is_needed:
            raise ValueError(
                "ACT's kernel scale is fitted on other episodes than those shown, and the data set "
                "has no other: show fewer with --episode_idx, keep some back from all of them with "
                "--calibration_episodes, or give --kernel_scale B"
            )
        return None
    frames = Frames.spread(
        [data.episode(each) for each in episodes], arguments.n_calibration_frames
    ).to(device(arguments.device))
    if not is_needed:
        return Calibration(frames)
    with progress_bar("Fitting the scale", len(frames), True) as advance:
        predictions = predict_frames(
            view,
            frames.batch,
            queries_for(methods, view, horizons),
            arguments.n_samples,
            arguments.seed,
            arguments.batch_size,
            advance,
        )
    return Calibration(frames, predictions)


def _held_out(policy: "LoadedPolicy", available: Sequence[int]) -> set[int] | None:
    """Episodes that the policy has not been trained on; None when that is not known.

    A checkpoint tells the numbers of its own data set: they hold when this one has the same.
    """
    split = policy.split
    if split is None or sorted([*split["train"], *split["val"]]) != list(available):
        return None
    return set(split["val"])


def _calibration_episodes(
    arguments: argparse.Namespace, available: Sequence[int], held_out: set[int] | None
) -> list[int]:
    """Episodes to fit the scale on: as asked for, else spread over those not shown.

    Residuals on training episodes are too small for others, so held-out ones go first.
    """
    import numpy as np

    if arguments.calibration_episodes is not None:
        unknown = sorted(set(arguments.calibration_episodes) - set(available))
        if unknown:
            raise ValueError(f"--calibration_episodes {unknown}: the data set has no such episode")
        return sorted(set(arguments.calibration_episodes))
    others = [number for number in available if number not in arguments.episode_idx]
    if held_out is not None and held_out & set(others):
        others = [number for number in others if number in held_out]
    if not others:
        return []
    places = np.linspace(0, len(others) - 1, min(N_CALIBRATION_EPISODES, len(others)))
    return [others[int(place)] for place in places.round()]


def _build_method(name: str, coefficient: float | None, arguments: argparse.Namespace) -> "Method":
    """Build a method, with those of the command's options that it takes.

    Raises:
        ValueError: If there is none of that name.
    """
    from landscapes.methods import METHODS

    if name not in METHODS:
        raise ValueError(f"--scoring_method {name}: choose from {', '.join(METHODS)}")
    build = METHODS[name]
    given = {
        "batch_size": arguments.batch_size,
        "temporal_ensemble_coeff": coefficient,
        "seed": arguments.seed,
    }
    taken = inspect.signature(build).parameters
    return build(**{key: v for key, v in given.items() if key in taken and v is not None})


def _labels(policy_paths: Sequence[str]) -> list[str]:
    """Short names that tell policies apart, also as folders; empty for a single one."""
    if len(policy_paths) == 1:
        return [""]
    # What all runs and folders of policies have tells nothing.
    common = {os.sep, "checkpoints", "pretrained_model", "last"}
    parts = []
    for given in policy_paths:
        path = Path(given).expanduser()
        if path.exists():
            path = Path(os.path.abspath(path))
        parts.append([part.removesuffix(".ckpt") for part in path.parts])
    known = common.union(set.intersection(*map(set, parts)))
    own = [[part for part in each if part not in known] for each in parts]
    names = ["policy"] * len(own)
    for length in range(1, max(map(len, own)) + 1):
        names = ["_".join(each[-length:]) or "policy" for each in own]
        if len(set(names)) == len(names):
            return names
    return [f"{name}_{place}" for place, name in enumerate(names)]


def _study(subject: Subject, number: int, arguments: argparse.Namespace) -> Episode:
    """Predict along one episode, and compute everything but pictures."""
    import torch

    from datamodules.progress import progress_bar
    from landscapes.grid import Grid
    from landscapes.methods import Probe, queries_for
    from landscapes.study import Frames, executed_along, kernel_scale, predict_frames

    view, calibration = subject.view, subject.calibration
    frames = Frames.of_episode(subject.data.episode(number), max_steps=arguments.max_steps)
    frames = frames.to(device(arguments.device))
    batch = frames.batch
    grid = Grid(arguments.action_resolution)
    began = time.perf_counter()
    title = f"Episode {number} {subject.label}".strip()
    with torch.no_grad(), progress_bar(title, len(batch), True) as advance:
        predictions = predict_frames(
            view,
            batch,
            queries_for(subject.methods, view, subject.horizons),
            arguments.n_samples,
            arguments.seed,
            arguments.batch_size,
            advance,
        )
        if arguments.kernel_scale is not None:
            scale = torch.full_like(predictions.point[:1], arguments.kernel_scale)
        else:
            fitted_on = None if calibration is None else calibration.predictions
            scale = kernel_scale(view, predictions, fitted_on)
        probe = Probe(view, batch, predictions, scale, subject.horizons, grid)
        landscapes = tuple(method.landscape(probe) for method in subject.methods)
        wall_s = time.perf_counter() - began
        executed, age = executed_along(view, batch, subject.controller, arguments.batch_size)
    return Episode(frames, predictions, scale, landscapes, executed, age, wall_s)


def _write_episode(
    folder: Path, subject: Subject, episode: Episode, number: int, arguments: argparse.Namespace
) -> "list[Column]":
    """Write arrays, settings and videos of one episode; return what a comparison shows of it."""
    stem = f"episode_{number}"
    wanted = [_columns(subject, episode, landscape) for landscape in episode.landscapes]
    for landscape in episode.landscapes:
        _write_arrays(folder / f"{stem}_landscapes_{landscape.method}.npz", episode, landscape)
    files: list[str] = []
    source = "none"
    if arguments.videos:
        source, files = _write_videos(folder, subject, episode, number, wanted, arguments)
    config = {
        **{key: value for key, value in vars(arguments).items() if key != "command"},
        "policy": str(subject.loaded.source),
        "stats_from_data": subject.loaded.scaled_by_data,
        "episode": number,
        "n_frames": len(episode.frames.batch),
        "horizons": list(subject.horizons),
        "kernel_scale_px": _scale_values(subject, episode),
        "calibration_episodes": list(subject.calibration_episodes),
        "held_out": None if subject.held_out is None else number in subject.held_out,
        "environment": source,
        "files": files,
        "wall_s": episode.wall_s,
        "frames_per_s": len(episode.frames.batch) / episode.wall_s,
        "scores": {
            landscape.method: {
                "unit": landscape.unit,
                "value_range": list(landscape.value_range),
                "min": float(landscape.scores.min()),
                "max": float(landscape.scores.max()),
            }
            for landscape in episode.landscapes
        },
    }
    (folder / f"{stem}_config.json").write_text(json.dumps(config, indent=1) + "\n")
    # The middle horizon: the action of now is a small blob next to any agent.
    return [columns[len(columns) // 2] for columns in wanted]


def _columns(subject: Subject, episode: Episode, landscape: "Landscape") -> "list[Column]":
    from rendering.landscape_scenes import Column

    return [
        Column(
            landscape,
            horizon,
            episode.predictions,
            label=" ".join(filter(None, [subject.label, landscape.method])),
            executed=episode.executed,
            executed_age=episode.executed_age,
        )
        for horizon in subject.horizons
    ]


def _write_videos(
    folder: Path,
    subject: Subject,
    episode: Episode,
    number: int,
    wanted: "list[list[Column]]",
    arguments: argparse.Namespace,
) -> tuple[str, list[str]]:
    """Write environment, heat maps and both side by side; say where the environment came from."""
    from envs.replay import can_replay, episode_pictures
    from rendering.landscape import board_px, side_by_side
    from rendering.landscape_scenes import scenes
    from rendering.video import write_video

    fps = subject.data.fps or 10.0
    height, colormap = arguments.target_height, arguments.colormap
    overlay = _overlay(arguments)
    task, batch = subject.task, episode.frames.batch
    environment = episode_pictures(task, batch, height)
    written = [write_video(folder / f"episode_{number}_environment.mp4", environment, fps)]
    for columns in wanted:
        method = columns[0].landscape.method
        beside = episode_pictures(task, batch, board_px(height))
        for kind, pictures in (("heatmaps", None), ("combined", beside)):
            frames = (
                side_by_side(scene, height, colormap)
                for scene in scenes(columns, batch, pictures, overlay)
            )
            path = folder / f"episode_{number}_{kind}_{method}.mp4"
            written.append(write_video(path, frames, fps))
    source = "simulator" if can_replay(task, batch) else "recorded"
    return source, [path.name for path in written]


def _write_comparison(
    folder: Path,
    subject: Subject,
    number: int,
    columns: "list[Column]",
    arguments: argparse.Namespace,
) -> None:
    """Write all policies and methods side by side, at a middle horizon."""
    from envs.replay import episode_pictures
    from rendering.landscape import board_px, side_by_side
    from rendering.landscape_scenes import scenes
    from rendering.video import write_video

    batch = subject.data.episode(number).rows(slice(arguments.max_steps))
    height = arguments.target_height
    pictures = episode_pictures(subject.task, batch, board_px(height))
    frames = (
        side_by_side(scene, height, arguments.colormap)
        for scene in scenes(columns, batch, pictures, _overlay(arguments))
    )
    write_video(folder / f"episode_{number}_comparison.mp4", frames, subject.data.fps or 10.0)


def _overlay(arguments: argparse.Namespace):
    from rendering.landscape_scenes import Overlay

    return Overlay(
        show_policy_prediction=arguments.show_policy_prediction,
        show_confidence_intervals=arguments.show_confidence_intervals,
        trace_length=arguments.trace_length,
    )


def _scale_values(subject: Subject, episode: Episode) -> dict[str, list[float]]:
    """Mean kernel scale at each horizon, along each axis."""
    queries = episode.predictions.queries
    scale = episode.scale.mean(0)
    return {f"k{k}": scale[queries.index(k)].tolist() for k in subject.horizons}


def _write_arrays(path: Path, episode: Episode, landscape: "Landscape") -> None:
    """Write what a picture can be drawn from again, without the policy."""
    import numpy as np

    predictions = episode.predictions.at(landscape.queries)
    np.savez_compressed(
        path,
        scores=landscape.scores.numpy().astype(np.float16),
        mass=landscape.mass.numpy().astype(np.float16),
        # Rounded alike, so that the last cell stays inside of its region.
        thresholds=landscape.thresholds.numpy().astype(np.float16),
        levels=np.array(landscape.levels),
        horizons=np.array(landscape.queries),
        value_range=np.array(landscape.value_range),
        unit=np.array(landscape.unit),
        board=np.array([landscape.grid.low, landscape.grid.high]),
        samples=predictions.samples.cpu().numpy().astype(np.float32),
        prediction=predictions.point.cpu().numpy().astype(np.float32),
        expert=predictions.expert.cpu().numpy().astype(np.float32),
        is_valid=predictions.is_valid.cpu().numpy(),
        executed=episode.executed.cpu().numpy().astype(np.float32),
        frame_index=episode.frames.batch.frame_index.cpu().numpy(),
    )


@dataclass(frozen=True)
class Measured:
    """Numbers of one policy, over all episodes."""

    metrics: "LandscapeMetrics"
    trust: dict[str, float]
    """Use of the latent, and whether there were enough samples."""
    reading: list[str]


def _measure(
    subject: Subject, episodes: Sequence[Episode], arguments: argparse.Namespace
) -> Measured:
    import torch

    from landscapes.grid import Grid
    from landscapes.landscape import Predictions
    from landscapes.study import Frames, latent_numbers, measure_frames, sample_gap
    from policies.act import ACTPolicy

    predictions = Predictions.concatenate([episode.predictions for episode in episodes])
    scale = torch.cat([each.scale.expand(len(each.frames), -1, -1) for each in episodes])
    frames = Frames.concatenate([episode.frames for episode in episodes])
    metrics = measure_frames(
        predictions,
        scale,
        frames,
        subject.horizons,
        Grid(arguments.action_resolution),
        subject.calibration,
        arguments.seed,
    )
    places = [predictions.queries.index(horizon) for horizon in subject.horizons]
    shown, scale = predictions.at(subject.horizons), scale[:, places]
    trust, use = sample_gap(shown, scale), None
    if isinstance(subject.view, ACTPolicy) and subject.view.network.posterior is not None:
        rows = torch.linspace(0, len(frames) - 1, min(N_LATENT_FRAMES, len(frames))).long()
        use, values = latent_numbers(
            subject.view,
            frames.rows(rows),
            shown.rows(rows),
            scale.mean(0),
            arguments.n_evidence_frames,
            arguments.seed,
        )
        trust |= values
    if arguments.n_ode_frames:
        trust |= _ode_numbers(subject, frames, arguments)
    return Measured(metrics, trust, metrics.reading(use))


def _ode_numbers(
    subject: Subject, frames: "Frames", arguments: argparse.Namespace
) -> dict[str, float]:
    """Log density of whole demonstrated chunks under Diffusion Policy's ODE, mean over frames."""
    import torch

    from landscapes.diffusion import ode_log_likelihood
    from policies.lerobot_view import LeRobotPolicyView

    assert isinstance(subject.view, LeRobotPolicyView)
    # Frames with a whole demonstrated chunk, and with a past that was demonstrated, too.
    usable = ~frames.batch.action_is_pad.any(1) & frames.previous.isfinite().all((-1, -2))
    whole = usable.nonzero().flatten()
    places = torch.linspace(0, len(whole) - 1, min(arguments.n_ode_frames, len(whole))).long()
    chosen = frames.rows(whole[places])
    batch, diffusion = chosen.batch, subject.view.diffusion(chosen.batch.observation)
    n_past = diffusion.n_past
    past = chosen.previous[:, 2 - n_past :] if n_past <= 2 else None
    nats = ode_log_likelihood(diffusion, batch.actions, batch.action_is_pad, past)
    return {"ode_nats": float(nats.mean()), "ode_frames": float(len(nats))}


def _write_metrics(
    folder: Path,
    subjects: Sequence[Subject],
    measured: "Sequence[Measured]",
    arguments: argparse.Namespace,
) -> None:
    """Write numbers of all policies, over all episodes and for each."""
    import numpy as np

    rows = []
    for subject, each in zip(subjects, measured, strict=True):
        metrics = each.metrics
        rows.append(
            {
                "policy": str(subject.loaded.source),
                "label": subject.label,
                "episodes": list(arguments.episode_idx),
                "n_frames": len(metrics.episode_index),
                "calibration_episodes": list(subject.calibration_episodes),
                "summary": metrics.summary(),
                "intervals": {key: list(ends) for key, ends in metrics.intervals().items()},
                "baselines": {
                    f"k{k}/nll_{name}": float(np.nanmean(nll[:, place]))
                    for place, k in enumerate(metrics.queries)
                    for name, nll in metrics.baselines.items()
                    if np.isfinite(nll[:, place]).any()
                },
                "trust": each.trust,
                "reading": each.reading,
                "per_episode": metrics.episode_rows(),
            }
        )
    text = json.dumps({"policies": rows}, indent=1)
    (folder / METRICS_FILE).write_text(text + "\n", encoding="utf-8")


TABLE_COLUMNS = {
    "nll": ".2f",
    "skill_vs_agent": "+.2f",
    "energy": ".1f",
    "c50": ".2f",
    "c80": ".2f",
    "c95": ".2f",
    "hdr80_px2": ".0f",
    "modes_mean": ".1f",
}
"""Numbers of the printed table, as they are called in ``metrics.json``, to their formats."""


def _print_tables(console: Any, subjects: Sequence[Subject], measured: Sequence[Measured]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    for subject, each in zip(subjects, measured, strict=True):
        # Narrow enough for numbers to stay whole on 80 columns.
        table = Table(
            title=f"{subject.label}  density of the demonstrated action, k steps ahead".strip(),
            box=SIMPLE_HEAD,
            pad_edge=False,
        )
        table.add_column("k", justify="right", no_wrap=True)
        for name in TABLE_COLUMNS:
            table.add_column(name.replace("_", " "), justify="right", min_width=6)
        summary = each.metrics.summary()
        for horizon in subject.horizons:
            cells = [summary.get(f"k{horizon}/{name}") for name in TABLE_COLUMNS]
            if any(cell is not None for cell in cells):
                table.add_row(
                    str(horizon),
                    *(
                        "" if cell is None else f"{cell:{form}}"
                        for cell, form in zip(cells, TABLE_COLUMNS.values(), strict=True)
                    ),
                )
        console.print(table)
        for sentence in each.reading:
            console.print(sentence, highlight=False)
