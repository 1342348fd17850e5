"""``analyze.py features ood``: notice unfamiliar frames from the policy's own activations."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from commands import feature_inputs
from commands.feature_inputs import Subject
from commands.inputs import controller_for

if TYPE_CHECKING:
    from torch import Tensor

    from autoencoders.sae import SparseAutoencoder
    from envs.perturbations import Perturbation
    from envs.task import Task
    from features.ood import DetectionQuality, OODDetector
    from features.resampling import Estimate
    from policies.interface import Batch

METRICS_FILE, CHART_FILE, STRIP_FILE = "metrics.json", "detection.png", "perturbations.png"
DETECTOR_FOLDER = "detector"
LEAST = {"n_train_episodes": 1, "n_val_episodes": 2, "n_rollouts": 0, "first_seed": 0}
"""Smallest values of options."""
N_STRIP_FRAMES = 4
FRAMES_AT_ONCE = 256
N_THRESHOLD_VECTORS = 65_536
"""Training vectors that the detector's autoencoder has its threshold from."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's own options."""
    from features.ood import MAX_COVARIANCE_DIM

    feature_inputs.add_arguments(parser)
    parser.add_argument(
        "--alpha",
        type=float,
        default=0.05,
        metavar="A",
        help="false-alarm rate to promise; needs 1 / A - 1 calibration episodes (default: 0.05)",
    )
    parser.add_argument(
        "--pool",
        choices=("concatenate", "mean"),
        help="how a frame's tokens become the one vector that neighbours and Mahalanobis distance "
        f"take (default: concatenate; mean above {MAX_COVARIANCE_DIM} numbers)",
    )
    parser.add_argument(
        "--n_train_episodes",
        type=int,
        default=100,
        metavar="N",
        help="training episodes that scores are fitted to (default: %(default)s)",
    )
    parser.add_argument(
        "--n_val_episodes",
        type=int,
        default=50,
        metavar="N",
        help="held-out episodes, shown as they are and perturbed (default: %(default)s)",
    )
    parser.add_argument(
        "--n_rollouts",
        type=int,
        default=0,
        metavar="N",
        help="episodes of --task in which it is asked whether early scores foretell a failure",
    )
    parser.add_argument(
        "--first_seed",
        type=int,
        default=100_000,
        metavar="SEED",
        help="rollout i starts from seed SEED + i (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Fit, calibrate, perturb, measure, draw and write; print a table.

    Raises:
        ValueError: For anything wrong with the arguments, the policy, the autoencoder or the data.
    """
    from rich.console import Console

    from autoencoders.files import AUTOENCODER_FOLDER, save_autoencoder
    from features.ood import MAX_COVARIANCE_DIM, fit_detector, save_detector
    from policies.atomic_files import write_atomically
    from policies.json_files import json_text

    feature_inputs.check_at_least(arguments, LEAST)
    folder = feature_inputs.output_folder(arguments, (METRICS_FILE, DETECTOR_FOLDER))
    subject = feature_inputs.open_subject(arguments)
    subject.require_tokens("scoring frames while the policy acts")
    if subject.data.token_sampler.method != "all":
        raise ValueError(
            "scores are of all tokens of a frame, as the policy acts on them: give an autoencoder "
            "with token_sampling: all"
        )
    task = feature_inputs.task_of(arguments, subject.view)
    if arguments.n_rollouts and task is None:
        raise ValueError(
            f"--task {arguments.task}: does not show what the policy sees; give the task that it "
            "was trained on, or --n_rollouts 0"
        )
    if not subject.view.data_schema.cameras:
        raise ValueError("the policy has no camera, and what is perturbed are pictures")
    n_numbers = len(subject.data.tokens.positions) * subject.data.tap.dim
    pool = arguments.pool or ("mean" if n_numbers > MAX_COVARIANCE_DIM else "concatenate")
    if pool == "concatenate" and n_numbers > MAX_COVARIANCE_DIM:
        raise ValueError(
            f"--pool concatenate: {n_numbers} numbers a frame have too large a covariance (at most "
            f"{MAX_COVARIANCE_DIM}); give --pool mean"
        )
    split = subject.split
    n_needed = round(1 / arguments.alpha - 1) if 0 < arguments.alpha < 1 else 0
    if not n_needed or len(split["calibration"]) < n_needed:
        raise ValueError(
            f"--alpha {arguments.alpha}: the split has {len(split['calibration'])} calibration "
            "episodes, which can promise "
            f"{1 / (len(split['calibration']) + 1):.3f} and more; give such a rate below 1"
        )
    if len(split["val"]) < LEAST["n_val_episodes"]:
        raise ValueError(
            f"--dataset_repo_id {arguments.dataset_repo_id}: {len(split['val'])} of its "
            f"{len(subject.lengths)} episodes are held out, and an interval needs "
            f"{LEAST['n_val_episodes']}; give more episodes"
        )
    train = feature_inputs.some(split["train"], arguments.n_train_episodes)
    val = feature_inputs.some(split["val"], arguments.n_val_episodes)
    subject.load([*train, *split["calibration"], *val])
    folder.mkdir(parents=True, exist_ok=True)
    # Wide enough that no interval is broken: a terminal wraps lines, a file keeps them.
    console = Console(highlight=False)
    console = Console(width=max(console.width, 110), highlight=False)
    with console.status("Fitting and calibrating"):
        training, _ = _read(subject, train)
        calibration, episodes = _read(subject, split["calibration"])
        sae = _without_calibration(subject.sae, training)
        detector = fit_detector(
            subject.layer, sae, training, calibration, episodes, arguments.alpha, pool
        )
        save_detector(detector, folder / DETECTOR_FOLDER)
        save_autoencoder(sae, folder / DETECTOR_FOLDER / AUTOENCODER_FOLDER, subject.metadata)
    with console.status("Perturbing held-out episodes"):
        qualities, shown = _perturb(subject, detector, val, task)
    document: dict[str, Any] = {
        **subject.metadata,
        "alpha": arguments.alpha,
        "pool": pool,
        "split": subject.split_note,
        "is_unseen_by_policy": subject.loaded.metadata.get("is_unseen_by_policy"),
        "episodes": {"train": train, "calibration": split["calibration"], "val": val},
        "detection": {
            name: {score: asdict(quality) for score, quality in found.items()}
            for name, found in qualities.items()
        },
    }
    if arguments.n_rollouts:
        assert task is not None
        document["failure_forecast"] = _forecast(subject, detector, task, arguments)
    _draw(folder, qualities, shown)
    write_atomically(folder / METRICS_FILE, json_text(document))
    _print(console, qualities, document, len(val))
    console.print(f"written to {folder}", soft_wrap=True)
    return 0


def _read(subject: Subject, episodes: Sequence[int]) -> "tuple[Tensor, Tensor]":
    """Activations of all frames of some episodes, and whose they are."""
    import torch

    parts = [(activations, index) for activations, index, _ in subject.vectors(episodes)]
    return torch.cat([each for each, _ in parts]), torch.cat([index for _, index in parts])


def _without_calibration(sae: "SparseAutoencoder", training: "Tensor") -> "SparseAutoencoder":
    """The autoencoder with its threshold fitted to training frames.

    The one that it brings was fitted to the calibration episodes, which a promise about new ones
    may not know.
    """
    import copy

    import torch
    from einops import rearrange

    vectors = rearrange(training, "frame token dim -> (frame token) dim")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(vectors), generator=generator)[:N_THRESHOLD_VECTORS]
    other = copy.deepcopy(sae)
    other.calibrate([vectors[rows.to(vectors.device)]])
    return other


def _scores(subject: Subject, detector: "OODDetector", batch: "Batch") -> "Mapping[str, Tensor]":
    """Scores of some frames, by name."""
    import torch

    from features.taps import read_activations

    readings = []
    for start in range(0, len(batch), FRAMES_AT_ONCE):
        rows = batch.rows(slice(start, start + FRAMES_AT_ONCE))
        activations = read_activations(subject.view, rows.observation, subject.layer)
        readings.append(detector.read(activations).scores)
    return {name: torch.cat([each[name] for each in readings]) for name in readings[0]}


def _perturb(
    subject: Subject, detector: "OODDetector", episodes: Sequence[int], task: "Task | None"
) -> "tuple[dict[str, dict[str, DetectionQuality]], dict[str, Batch]]":
    """How well each score tells each kind of perturbed episode from a clean one.

    Returns:
        Perturbation to score to quality; and some frames as each perturbation shows them.
    """
    import torch

    from features.ood import detection_quality
    from policies.interface import Batch

    data = subject.data.demonstrations
    first = data.episode(episodes[0])
    perturbations = _perturbations(subject, first, task)
    few = torch.linspace(0, len(episodes) - 1, min(N_STRIP_FRAMES, len(episodes))).round().long()
    kept = {episodes[place] for place in few.tolist()}
    names = ["as it is", *(perturbation.name for perturbation in perturbations)]
    scores: dict[str, list[Mapping[str, Tensor]]] = {name: [] for name in names}
    shown: dict[str, list[Batch]] = {name: [] for name in names}
    index = []
    # Episode by episode: all pictures of many would not fit into memory.
    for number in episodes:
        batch = data.episode(number).to(subject.device)
        index.append(batch.episode_index.cpu())
        for name, perturbation in zip(names, (None, *perturbations), strict=True):
            changed = batch if perturbation is None else perturbation.apply(batch)
            scores[name].append(_scores(subject, detector, changed))
            if number in kept:
                middle = len(changed) // 2
                shown[name].append(changed.rows(slice(middle, middle + 1)).to("cpu"))
    joined = {
        name: {score: torch.cat([each[score] for each in parts]) for score in parts[0]}
        for name, parts in scores.items()
    }
    clean, whose = joined.pop("as it is"), torch.cat(index)
    found = {
        name: {
            score: detection_quality(
                detector.calibrations[score], clean[score], whose, values, whose
            )
            for score, values in of_score.items()
        }
        for name, of_score in joined.items()
    }
    return found, {name: Batch.concatenate(batches) for name, batches in shown.items()}


def _perturbations(subject: Subject, batch: "Batch", task: "Task | None") -> "list[Perturbation]":
    """What is done to pictures; objects are hidden where the simulator can draw the frames."""
    from envs.perturbations import Lighting, Noise, OccludedObject, ShiftedCamera
    from envs.replay import can_replay
    from envs.task import Scene

    height = min(size[0] for size in subject.view.data_schema.cameras.values())
    perturbations: list[Perturbation] = [
        Lighting(gain=0.7),
        Lighting(gain=0.9),
        ShiftedCamera(right_px=round(height / 16)),
        ShiftedCamera(rotation_deg=3.0),
        Noise(0.05),
    ]
    if task is not None and subject.view.n_obs_steps == 1 and can_replay(task, batch):
        env = task.make()
        env.close()
        if isinstance(env, Scene) and "block" in env.objects:
            perturbations += [OccludedObject(task), OccludedObject(task, mode="patch")]
    return perturbations


def _forecast(
    subject: Subject, detector: "OODDetector", task: "Task", arguments: argparse.Namespace
) -> dict[str, Any]:
    """Whether the scores of the first quarter of an episode foretell that it fails."""
    from envs.steering import monitored_rollouts
    from features.ood import failure_forecast

    seeds = range(arguments.first_seed, arguments.first_seed + arguments.n_rollouts)
    watched = monitored_rollouts(
        task,
        subject.view,
        detector,
        seeds,
        controller_for(subject.data.loaded_policy, None, None),
        subject.device,
        progress=True,
    )
    return {
        name: asdict(
            failure_forecast(
                scores,
                watched.steps,
                [episode.n_steps for episode in watched.result.episodes],
                watched.has_failed,
                task.max_steps,
            )
        )
        for name, scores in watched.scores.items()
    }


def _draw(
    folder: Any,
    qualities: "Mapping[str, Mapping[str, DetectionQuality]]",
    shown: "Mapping[str, Batch]",
) -> None:
    """Draw what perturbed frames look like, and how well each score finds them."""
    import numpy as np

    from envs.replay import recorded_pictures
    from rendering.charts import strength_chart
    from rendering.features import FeatureFrame, FeatureRow, feature_strip
    from rendering.picture import write_png

    rows = []
    for name, batch in shown.items():
        steps = zip(batch.episode_index.tolist(), batch.frame_index.tolist(), strict=True)
        captions = [f"episode {episode} step {step}" for episode, step in steps]
        pictures = recorded_pictures(batch.observation)
        frames = [
            FeatureFrame(picture, caption)
            for picture, caption in zip(pictures, captions, strict=True)
        ]
        rows.append(FeatureRow(name, frames))
    write_png(folder / STRIP_FILE, feature_strip(rows, "What perturbed frames look like."))
    names = list(next(iter(qualities.values())))
    values = np.array([[found[name].auroc.value for name in names] for found in qualities.values()])
    chart = strength_chart(
        values, list(qualities), names, "AUROC of perturbed against clean frames", (0.5, 1.0)
    )
    write_png(folder / CHART_FILE, chart)


def _print(
    console: Any,
    qualities: "Mapping[str, Mapping[str, DetectionQuality]]",
    document: Mapping[str, Any],
    n_episodes: int,
) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    names = list(next(iter(qualities.values())))
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(f"AUROC of frames, {n_episodes} episodes")
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    for perturbation, found in qualities.items():
        table.add_row(perturbation, *(_interval(found[name].auroc) for name in names))
    table.add_section()
    first = next(iter(qualities.values()))
    for label, key in (
        ("false alarms, frames", "frame_false_alarms"),
        ("false alarms, episodes", "episode_false_alarms"),
    ):
        cells = [getattr(first[name], key) for name in names]
        table.add_row(
            label, *(f"{each.value:.2f} [{each.low:.2f}, {each.high:.2f}]" for each in cells)
        )
    console.print(table)
    console.print(
        f"promised: at most {document['alpha']:.0%} of the frames of a new episode on average, and "
        f"at most {document['alpha']:.0%} of new episodes, raise an alarm",
        soft_wrap=True,
    )
    for name, found in document.get("failure_forecast", {}).items():
        auroc = found["auroc"]
        console.print(
            f"{name} foretells failure at a quarter of the time: AUROC {auroc['value']:.2f} "
            f"[{auroc['low']:.2f}, {auroc['high']:.2f}], {found['n_failed']} failed of "
            f"{found['n_failed'] + found['n_succeeded']}",
            soft_wrap=True,
        )


def _interval(estimate: "Estimate") -> str:
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"
