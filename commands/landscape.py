"""``analyze.py landscape``: what a policy would do everywhere on the board, along an episode."""

import argparse
import inspect
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
from policies.atomic_files import write_atomically
from policies.json_files import json_text

if TYPE_CHECKING:
    import torch

    from datamodules.base import DemonstrationDataModule
    from envs.task import Task
    from landscapes.landscape import Landscape, Predictions
    from landscapes.methods import Method
    from landscapes.metrics import LandscapeMetrics
    from landscapes.space import ActionSpace, Plane
    from landscapes.study import Calibration, Frames, Scales
    from policies.ensembling import ActionQueue, TemporalEnsembler
    from policies.interface import SamplingPolicyView
    from policies.loading import LoadedPolicy
    from rendering.landscape_scenes import Column

METRICS_FILE = "metrics.json"
N_CALIBRATION_EPISODES = 8
N_LATENT_FRAMES = 64
N_STRIP_FRAMES = 4
"""Instants in a still picture of an episode."""
N_PROJECTION_PX = 288
"""Height of a camera's picture with actions on it."""


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
        "--action_dims",
        nargs=2,
        action="append",
        metavar="DIM",
        help="two dimensions that a board is over, by number or name; may be given several times "
        "(default for more than two: the two that vary most among the demonstrations)",
    )
    parser.add_argument(
        "--slice",
        choices=("marginal", "conditional"),
        default="marginal",
        help="the other dimensions of such a board: integrated out, or held at the policy's "
        "prediction (default: %(default)s)",
    )
    parser.add_argument(
        "--marginals",
        type=switch,
        metavar="BOOL",
        help="draw and measure every dimension by itself (default: true for more than two)",
    )
    parser.add_argument(
        "--projection",
        type=switch,
        metavar="BOOL",
        help="draw over each camera's picture where actions lead, if the task knows (default: true "
        "for more than two dimensions)",
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
        "--videos",
        type=switch,
        default=True,
        metavar="BOOL",
        help="false: still pictures, numbers and arrays only",
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
    demonstrated: "torch.Tensor"
    """Actions of all episodes, the same for every policy, that axes and planes are chosen by; of
    the shown and calibration ones where there is nothing to choose."""
    task: "Task | None"
    """Simulator that may draw recorded states."""
    space: "ActionSpace"
    """Names and range of the action's dimensions."""
    shown_space: "ActionSpace"
    """The same dimensions over the range of the demonstrations, for pictures of single ones."""
    planes: "tuple[Plane, ...]"
    """What boards are over; empty where actions have two dimensions and none were chosen."""

    @property
    def is_planar(self) -> bool:
        """Whether an action is a point of one board, so that there are no parts to look at."""
        return not self.planes


@dataclass(frozen=True)
class Episode:
    """What one policy answered along one episode."""

    frames: "Frames"
    predictions: "Predictions"
    scales: "Scales"
    landscapes: "tuple[Landscape, ...]"
    """One for each method, of each plane."""
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
    _print_choices(console, subjects, len(lengths), arguments)
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


def _print_choices(
    console: Any, subjects: "Sequence[Subject]", n_episodes: int, arguments: argparse.Namespace
) -> None:
    """Say what was chosen where nothing was asked for: planes, and the range of the axes."""
    said = []
    for subject in subjects:
        if subject.is_planar:
            continue
        prefix = f"{subject.label}: " if subject.label else ""
        if arguments.action_dims is None:
            said.append(
                f"{prefix}boards over {subject.planes[0].name}: the two dimensions that vary most "
                f"in all {n_episodes} episodes; choose with --action_dims"
            )
        if not subject.space.is_described:
            said.append(
                f"{prefix}axes hold the actions of all {n_episodes} episodes: no task describes "
                "them; name one with --task"
            )
    for sentence in said:
        console.print(sentence, highlight=False)


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
    demonstrated = None
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
        if view.data_schema.action_dim == 2 and arguments.action_dims is None:
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
        subject = _with_data(
            policy, view, label, methods, horizons, controller, lengths, demonstrated, arguments
        )
        demonstrated = subject.demonstrated
        subjects.append(subject)
    return subjects


def _with_data(
    policy: "LoadedPolicy",
    view: "SamplingPolicyView",
    label: str,
    methods: "tuple[Method, ...]",
    horizons: tuple[int, ...],
    controller: "ActionQueue | TemporalEnsembler",
    lengths: Mapping[int, int],
    demonstrated: "torch.Tensor | None",
    arguments: argparse.Namespace,
) -> Subject:
    from envs.projection import can_project

    task = task_for(arguments.task, view.data_schema)
    if arguments.projection and not (view.data_schema.cameras and can_project(task)):
        raise ValueError(
            f"--projection true: {policy.source} has no camera, or --task {arguments.task} is not "
            "what it was made for, or no environment that implements envs.task.ActionProjection"
        )
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
    if demonstrated is None:
        # PushT's board has no need of them, and what is not shown may not even be there.
        is_board = view.data_schema.action_dim == 2 and not (
            arguments.action_dims or arguments.marginals
        )
        demonstrated = (
            data.store.columns["action"] if is_board else _all_actions(data, view, arguments)
        )
        demonstrated = demonstrated.double()
    space = _space(task, demonstrated)
    planes = _planes(space, demonstrated, arguments)
    for method in methods:
        for plane in planes:
            method.check(view, plane)
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
        demonstrated=demonstrated,
        task=task,
        space=space,
        shown_space=space.around(demonstrated.amin(0), demonstrated.amax(0)),
        planes=planes,
    )


def _all_actions(
    data: "DemonstrationDataModule", view: "SamplingPolicyView", arguments: argparse.Namespace
) -> "torch.Tensor":
    """Demonstrated actions of the whole data set, without its pictures."""
    import numpy as np
    import torch

    from datamodules.hdf5 import HDF5DataModule
    from datamodules.opening import DataShape

    if isinstance(data, HDF5DataModule):
        columns = [episode.columns["action"] for episode in data.scan.episodes]
        return torch.from_numpy(np.concatenate(columns))
    tables = DataShape(replace(view.data_schema, cameras={}), view.chunk_size, view.n_obs_steps)
    whole = open_demonstrations(arguments.dataset_repo_id, tables, progress=False)
    whole.setup()
    return whole.store.columns["action"]


def _space(task: "Task | None", demonstrated: "torch.Tensor") -> "ActionSpace":
    """Names and range of the action's dimensions, from the task or from the demonstrations."""
    from envs.task import DescribedActions
    from landscapes.space import ActionSpace

    described = task.action_dimensions if isinstance(task, DescribedActions) else None
    return ActionSpace.of(described, demonstrated.amin(0), demonstrated.amax(0))


def _planes(
    space: "ActionSpace", demonstrated: "torch.Tensor", arguments: argparse.Namespace
) -> "tuple[Plane, ...]":
    """What boards are over: as asked for, else the widest plane of more than two dimensions.

    Raises:
        ValueError: If there are no such dimensions, or nothing that a slice could hold.
    """
    is_conditional = arguments.slice == "conditional"
    if len(space.axes) == 2 and is_conditional:
        raise ValueError("--slice conditional: of two dimensions none is left to be held")
    chosen = arguments.action_dims
    if chosen is None:
        if len(space.axes) == 2:
            return ()
        chosen = [space.widest(demonstrated.std(0))]
    return space.planes(chosen, is_conditional)


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
    from landscapes.study import Frames, Scales, executed_along, predict_frames

    view, calibration, space = subject.view, subject.calibration, subject.space
    frames = Frames.of_episode(subject.data.episode(number), max_steps=arguments.max_steps)
    frames = frames.to(device(arguments.device))
    batch = frames.batch
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
            given = torch.full_like(predictions.point[:1], arguments.kernel_scale)
            scales = Scales.same(given, subject.planes)
        else:
            fitted_on = None if calibration is None else calibration.predictions
            scales = Scales.fit(view, predictions, fitted_on, space, subject.planes)
        boards = [(plane, plane.grid(arguments.action_resolution)) for plane in subject.planes] or [
            (None, Grid(arguments.action_resolution, *space.board))
        ]
        landscapes = tuple(
            method.landscape(
                Probe(
                    view,
                    batch,
                    predictions,
                    scales.joint,
                    subject.horizons,
                    grid,
                    plane,
                    scales.of_marginal(plane),
                )
            )
            for plane, grid in boards
            for method in subject.methods
        )
        wall_s = time.perf_counter() - began
        executed, age = executed_along(view, batch, subject.controller, arguments.batch_size)
    return Episode(frames, predictions, scales, landscapes, executed, age, wall_s)


def _write_episode(
    folder: Path, subject: Subject, episode: Episode, number: int, arguments: argparse.Namespace
) -> "list[Column]":
    """Write arrays, settings and videos of one episode; return what a comparison shows of it."""
    stem = f"episode_{number}"
    wanted = [_columns(subject, episode, landscape) for landscape in episode.landscapes]
    for landscape in episode.landscapes:
        path = folder / f"{stem}_landscapes_{_stem(landscape)}.npz"
        _write_arrays(path, subject, episode, landscape)
    files: list[str] = []
    source = "none"
    if arguments.videos:
        source, files = _write_videos(folder, subject, episode, number, wanted, arguments)
    if _is_wanted(arguments.marginals, subject):
        files += _write_marginals(folder, subject, episode, number, arguments)
    if _is_wanted(arguments.projection, subject):
        files += _write_projection(folder, subject, episode, number, arguments)
    config = {
        **{key: value for key, value in vars(arguments).items() if key != "command"},
        "policy": str(subject.loaded.source),
        "stats_from_data": subject.loaded.scaled_by_data,
        "episode": number,
        "n_frames": len(episode.frames.batch),
        "horizons": list(subject.horizons),
        "action_dimensions": [vars(axis) for axis in subject.space.axes],
        "planes": [plane.name for plane in subject.planes],
        "kernel_scale_px" if subject.is_planar else "kernel_scales": _scale_values(
            subject, episode
        ),
        "calibration_episodes": list(subject.calibration_episodes),
        "held_out": None if subject.held_out is None else number in subject.held_out,
        "environment": source,
        "files": files,
        "wall_s": episode.wall_s,
        "frames_per_s": len(episode.frames.batch) / episode.wall_s,
        "scores": {
            _stem(landscape): {
                "unit": landscape.unit,
                "value_range": list(landscape.value_range),
                "min": float(landscape.scores.min()),
                "max": float(landscape.scores.max()),
            }
            for landscape in episode.landscapes
        },
    }
    write_atomically(folder / f"{stem}_config.json", json_text(config))
    # The middle horizon: the action of now is a small blob next to any agent.
    return [columns[len(columns) // 2] for columns in wanted]


def _stem(landscape: "Landscape") -> str:
    """Tells the landscapes of an episode apart in names of files."""
    plane = landscape.plane
    if plane is None:
        return landscape.method
    kind = "_conditional" if plane.is_conditional else ""
    return f"{landscape.method}_{plane.name}{kind}"


def _is_wanted(given: bool | None, subject: Subject) -> bool:
    """A switch whose default depends on the actions."""
    return not subject.is_planar if given is None else given


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
        stem = _stem(columns[0].landscape)
        beside = episode_pictures(task, batch, board_px(height))
        for kind, pictures in (("heatmaps", None), ("combined", beside)):
            frames = (
                side_by_side(scene, height, colormap)
                for scene in scenes(columns, batch, pictures, overlay)
            )
            path = folder / f"episode_{number}_{kind}_{stem}.mp4"
            written.append(write_video(path, frames, fps))
    source = "simulator" if can_replay(task, batch) else "recorded"
    return source, [path.name for path in written]


def _write_marginals(
    folder: Path, subject: Subject, episode: Episode, number: int, arguments: argparse.Namespace
) -> list[str]:
    """Write the density of every dimension: arrays, along the episode, and instant by instant."""
    import numpy as np

    from landscapes.marginals import marginals
    from rendering.marginals import marginal_history, marginal_panels, panel_frames
    from rendering.picture import write_png
    from rendering.video import write_video

    predictions, horizons = episode.predictions, subject.horizons
    found = marginals(predictions, episode.scales.single, subject.shown_space, horizons)
    frame_index = episode.frames.batch.frame_index.cpu().numpy()
    executed = episode.executed.double().cpu().numpy()
    stem = f"episode_{number}_marginals"
    written = [folder / f"{stem}.npz"]
    np.savez_compressed(
        written[0],
        mass=found.mass.numpy().astype(np.float16),
        thresholds=found.thresholds.numpy().astype(np.float16),
        levels=np.array(found.levels),
        horizons=np.array(found.queries),
        names=np.array(found.space.names),
        units=np.array([axis.unit for axis in found.space.axes]),
        low=np.array([axis.low for axis in found.space.axes]),
        high=np.array([axis.high for axis in found.space.axes]),
        frame_index=frame_index,
    )
    title = f"{subject.label}  episode {number}".strip()
    for k in horizons:
        along = marginal_history(
            found, predictions, k, frame_index, f"{title}  k = {k}", colormap=arguments.colormap
        )
        written.append(write_png(folder / f"{stem}_along_k{k}.png", along))
    # The middle frame, now and at the middle horizon, as in a comparison.
    k, middle = horizons[len(horizons) // 2], len(frame_index) // 2
    for shown in sorted({k, *({0} & {*horizons})}):
        now = executed[middle] if shown == 0 else None
        instant = f"{title}  step {frame_index[middle]}  k = {shown}"
        panels = marginal_panels(found, predictions, middle, shown, instant, now)
        written.append(write_png(folder / f"{stem}_k{shown}.png", panels))
    if arguments.videos:
        frames = panel_frames(found, predictions, k, frame_index, executed)
        fps = subject.data.fps or 10.0
        written.append(write_video(folder / f"{stem}_k{k}.mp4", frames, fps))
    return [path.name for path in written]


def _write_projection(
    folder: Path, subject: Subject, episode: Episode, number: int, arguments: argparse.Namespace
) -> list[str]:
    """Write where actions lead in what the cameras saw; nothing where no task can say."""
    import torch

    from envs.projection import can_project, project_along
    from envs.replay import recorded_pictures
    from landscapes.projection import actions_to_project
    from rendering.picture import write_png
    from rendering.projection import camera_views, projection_frame, projection_strip
    from rendering.video import write_video

    task, batch = subject.task, episode.frames.batch
    images = batch.observation.images
    if task is None or not images or not can_project(task):
        return []
    sizes = {
        camera: (N_PROJECTION_PX, round(N_PROJECTION_PX * each.shape[-1] / each.shape[-2]))
        for camera, each in images.items()
    }
    predictions = episode.predictions
    k = subject.horizons[len(subject.horizons) // 2]
    titles = [f"step {step}" for step in batch.frame_index.tolist()]
    actions = actions_to_project(predictions, episode.scales.joint, k, arguments.seed)
    found = project_along(task, batch, actions, sizes)
    pictures = {camera: recorded_pictures(batch.observation, camera) for camera in images}
    views = list(
        camera_views(pictures, found.px, found.end_effectors, predictions, k, titles, sizes)
    )
    rows = torch.linspace(0, len(views) - 1, min(N_STRIP_FRAMES, len(views))).long().tolist()
    stem = folder / f"episode_{number}_projection"
    strip = projection_strip([views[row] for row in rows])
    written = [write_png(stem.with_suffix(".png"), strip)]
    if arguments.videos:
        frames = (projection_frame(each) for each in views)
        written.append(write_video(stem.with_suffix(".mp4"), frames, subject.data.fps or 10.0))
    return [path.name for path in written]


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


def _scale_values(
    subject: Subject, episode: Episode
) -> dict[str, list[float]] | dict[str, dict[str, list[float]]]:
    """Mean kernel scale at each horizon along each axis; of each part, where there are parts."""
    queries = episode.predictions.queries

    def means(scale: "torch.Tensor") -> dict[str, list[float]]:
        along = scale.mean(0)
        return {f"k{k}": along[queries.index(k)].tolist() for k in subject.horizons}

    scales = episode.scales
    if subject.is_planar:
        return means(scales.joint)
    of_planes = {name: means(each) for name, each in scales.planes.items()}
    return {"joint": means(scales.joint), "single": means(scales.single), **of_planes}


def _write_arrays(path: Path, subject: Subject, episode: Episode, landscape: "Landscape") -> None:
    """Write what a picture can be drawn from again, without the policy."""
    import numpy as np

    predictions = episode.predictions.at(landscape.queries)
    space, plane = subject.space, landscape.plane
    is_conditional = plane is not None and plane.is_conditional
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
        dims=np.array((0, 1) if plane is None else plane.dims),
        names=np.array(space.names),
        units=np.array([axis.unit for axis in space.axes]),
        slice=np.array("conditional" if is_conditional else "marginal"),
    )


@dataclass(frozen=True)
class Measured:
    """Numbers of one policy, over all episodes."""

    metrics: "LandscapeMetrics"
    parts: "dict[str, LandscapeMetrics]"
    """Of single dimensions and of planes, by their names; empty where an action is a point of one
    board."""
    trust: dict[str, float]
    """Use of the latent, and whether there were enough samples."""
    reading: list[str]


def _measure(
    subject: Subject, episodes: Sequence[Episode], arguments: argparse.Namespace
) -> Measured:
    import torch

    from landscapes.density import smallest_scale
    from landscapes.grid import Grid
    from landscapes.landscape import Predictions
    from landscapes.study import (
        Frames,
        Scales,
        latent_numbers,
        measure_frames,
        measure_parts,
        sample_gap,
    )
    from policies.act import ACTPolicy

    predictions = Predictions.concatenate([episode.predictions for episode in episodes])
    scales = Scales.concatenate(
        [each.scales for each in episodes], [len(each.frames) for each in episodes]
    )
    frames = Frames.concatenate([episode.frames for episode in episodes])
    space, horizons, resolution = subject.space, subject.horizons, arguments.action_resolution
    box = Grid(resolution, *space.board) if len(space.axes) == 2 else space
    metrics = measure_frames(
        predictions, scales.joint, frames, horizons, box, subject.calibration, arguments.seed
    )
    parts = {}
    if not subject.is_planar:
        parts = measure_parts(
            predictions,
            scales,
            frames,
            horizons,
            space,
            subject.planes,
            resolution,
            subject.calibration,
            arguments.seed,
            single=_is_wanted(arguments.marginals, subject),
        )
    places = [predictions.queries.index(horizon) for horizon in subject.horizons]
    shown, scale = predictions.at(subject.horizons), scales.joint[:, places]
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
            smallest_scale(space.size, scale.device),
        )
        trust |= values
    if arguments.n_ode_frames:
        trust |= _ode_numbers(subject, frames, arguments)
    return Measured(metrics, parts, trust, metrics.reading(use))


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

    from landscapes.metrics import part_intervals, part_summary

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
                "summary": metrics.summary() | part_summary(each.parts),
                "intervals": {
                    key: list(ends)
                    for key, ends in (metrics.intervals() | part_intervals(each.parts)).items()
                },
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
    write_atomically(folder / METRICS_FILE, json_text({"policies": rows}))


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
    for subject, each in zip(subjects, measured, strict=True):
        summary = each.metrics.summary()
        title = f"{subject.label}  density of the demonstrated action, k steps ahead".strip()
        rows = {str(k): _row(summary, f"k{k}/") for k in subject.horizons}
        # Lengths of several units, some of them far below one.
        formats = dict(TABLE_COLUMNS) if subject.is_planar else {**TABLE_COLUMNS, "energy": ".2g"}
        _print_table(console, title, "k", rows, formats)
        if each.parts:
            # The middle horizon, as in a comparison; the others stand in metrics.json.
            k = subject.horizons[len(subject.horizons) // 2]
            title = f"{subject.label}  each dimension and plane, k = {k}".strip()
            # Two names below each other leave room for the numbers.
            rows = {
                name.replace("-", "-\n"): _row(part.summary(), f"k{k}/")
                for name, part in each.parts.items()
            }
            # For planes only, and there is no room.
            del formats["hdr80_px2"], formats["modes_mean"]
            _print_table(console, title, "dimension", rows, formats)
        for sentence in each.reading:
            console.print(sentence, highlight=False)


def _row(summary: Mapping[str, float], prefix: str) -> dict[str, float]:
    """Numbers of one chunk step, by their own names."""
    return {
        key.removeprefix(prefix): value for key, value in summary.items() if key.startswith(prefix)
    }


def _print_table(
    console: Any,
    title: str,
    head: str,
    rows: Mapping[str, Mapping[str, float]],
    formats: Mapping[str, str],
) -> None:
    """Print what is known of each row."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    # Narrow enough for numbers to stay whole on 80 columns.
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(head, justify="right", no_wrap=True)
    known = [name for name in formats if any(name in row for row in rows.values())]
    for name in known:
        table.add_column(name.replace("_", " "), justify="right", min_width=6)
    for label, row in rows.items():
        if row:
            cells = [f"{row[name]:{formats[name]}}" if name in row else "" for name in known]
            table.add_row(label, *cells)
    console.print(table)
