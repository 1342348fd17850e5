"""``analyze.py features steer``: turn features inside the policy and watch what it does."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from commands import feature_inputs
from commands.feature_inputs import Subject
from commands.inputs import choose_episodes, controller_for

if TYPE_CHECKING:
    from envs.steering import SteeringResult
    from envs.task import Task
    from features.effects import ControlComparison, DoseResponse, FeatureEffects, FeatureProbe
    from features.splice import Intervention

METRICS_FILE, TABLE_FILE = "metrics.json", "effects.parquet"
ARROWS_FILE, DOSES_FILE = "arrows.png", "doses.png"
ROLLOUTS_FILE, VIDEO_FILE = "rollouts.png", "rollouts.mp4"
CONTROLS = {
    "directions": "directions",
    "features": "other features",
    "activations": "directions with the covariance of the activations",
}
"""What features are compared with, in words."""
LEAST = {
    "n_rollouts": 1,
    "n_controls": 0,
    "first_seed": 0,
    "n_features": 1,
    "n_effect_frames": 1,
    "n_controls_open": 19,
    "seed": 0,
}
"""Smallest values of options."""
N_CHART_FEATURES = 8
SHOWN = ("success", "max_", "path_", "net_", "action_change")
"""Beginnings of the quantities of rollouts that the printed table shows."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's own options."""
    feature_inputs.add_arguments(parser)
    parser.add_argument(
        "--latents",
        type=int,
        nargs="+",
        metavar="N",
        help="features to turn, together, in rollouts; none are run if not given",
    )
    change = parser.add_mutually_exclusive_group()
    change.add_argument(
        "--scale", type=float, metavar="G", help="factor of their codes; 0 ablates (default: 0)"
    )
    change.add_argument(
        "--clamp",
        type=float,
        metavar="F",
        help="code to hold on all tokens, in units of the activations",
    )
    parser.add_argument(
        "--n_rollouts",
        type=int,
        default=20,
        metavar="N",
        help="episodes of each variant, from equal seeds (default: %(default)s)",
    )
    parser.add_argument(
        "--n_controls",
        type=int,
        default=3,
        metavar="N",
        help="random sets of as many features that fire about as often, turned alike in as many "
        "rollouts each (default: %(default)s)",
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
        "--n_features",
        type=int,
        default=32,
        metavar="N",
        help="features compared with random directions and dosed: those whose ablation moves the "
        "action most, of those that fire in enough frames (default: %(default)s)",
    )
    parser.add_argument(
        "--n_effect_frames",
        type=int,
        default=512,
        metavar="N",
        help="frames of the episodes on which features are turned (default: %(default)s)",
    )
    parser.add_argument(
        "--control",
        choices=("directions", "features", "activations"),
        default="directions",
        help="what each feature is compared with, moved as far on the same tokens: random "
        "directions of the activations' space; those of random other features that fire; or, the "
        "strictest, random ones with the covariance of the activations",
    )
    parser.add_argument(
        "--n_controls_open",
        type=int,
        default=100,
        metavar="N",
        help="how many of them (default: %(default)s)",
    )
    feature_inputs.add_queries(parser)
    parser.add_argument("--seed", type=int, default=0, help="of directions and controls")


def run(arguments: argparse.Namespace) -> int:
    """Turn features in open loop and in rollouts, draw and write; print tables.

    Raises:
        ValueError: For anything wrong with the arguments, the policy, the autoencoder or the data.
    """
    from rich.console import Console

    from envs.task import Scene
    from features.effects import FeatureProbe
    from policies.atomic_files import write_atomically
    from policies.json_files import json_text

    _check(arguments)
    folder = feature_inputs.output_folder(arguments, (METRICS_FILE, TABLE_FILE, VIDEO_FILE))
    subject = feature_inputs.open_subject(arguments)
    subject.require_tokens("steering")
    task = None
    intervention = _intervention(arguments, subject.sae.n_latents)
    if intervention is not None:
        task = feature_inputs.task_of(arguments, subject.view)
        if task is None:
            raise ValueError(
                f"--task {arguments.task}: does not show what the policy sees, so it cannot act "
                "there; give the task that it was trained on, or leave --latents out for open loop "
                "alone"
            )
        env = task.make()
        env.close()
        if not isinstance(env, Scene):
            raise ValueError(
                f"--task {arguments.task}: does not know its objects (envs.task.Scene), whose "
                "paths are compared; leave --latents out for open loop alone"
            )
        controller_for(
            subject.data.loaded_policy, arguments.temporal_ensemble_coeff, arguments.n_action_steps
        )
    if arguments.episode_idx:
        episodes = choose_episodes(arguments.episode_idx, list(subject.lengths))
    else:
        episodes = feature_inputs.some(subject.split["val"], 50)
    subject.load(episodes)
    folder.mkdir(parents=True, exist_ok=True)
    # Wide enough that no interval is broken: a terminal wraps lines, a file keeps them.
    console = Console(highlight=False)
    console = Console(width=max(console.width, 120), highlight=False)
    with console.status("Turning every feature, one at a time"):
        probe = FeatureProbe(
            subject.view,
            subject.layer,
            subject.sae,
            subject.batch(episodes, arguments.n_effect_frames).observation,
            queries=arguments.queries,
        )
        controls = [] if intervention is None else _controls(probe, intervention, arguments)
        least = subject.least_effect(feature_inputs.task_of(arguments, subject.view))
        found = _open_loop(subject, probe, least, arguments)
    unit = subject.data.loaded_policy.action_unit
    document: dict[str, Any] = {
        **subject.metadata,
        "episodes": list(episodes),
        "n_frames": len(probe.activations),
        "queries": list(arguments.queries),
        "action_unit": unit,
        "effects": {
            f"zero_effect_below_{unit}": least,
            **found.numbers,
            "control": arguments.control,
        },
    }
    _write_table(folder / TABLE_FILE, found, unit)
    _draw_open_loop(folder, found, unit)
    _print_open_loop(console, found, arguments.control, unit)
    if intervention is not None:
        assert task is not None
        result = _closed_loop(subject, task, intervention, controls, arguments)
        document["rollouts"] = {
            "intervention": intervention.name,
            "controls": [control.name for control in result.controls],
            "seeds": list(result.seeds),
            **result.summary(),
            "share_above_baseline": _shares_above(result),
        }
        _film(folder, task, result)
        _print_closed_loop(console, result)
    write_atomically(folder / METRICS_FILE, json_text(document))
    console.print(f"written to {folder}", soft_wrap=True)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what cannot work before anything long starts."""
    feature_inputs.check_at_least(arguments, LEAST)
    if not arguments.latents:
        for name in ("scale", "clamp"):
            if getattr(arguments, name) is not None:
                raise ValueError(f"--{name} has no effect without --latents: name features")


def _intervention(arguments: argparse.Namespace, n_latents: int) -> "Intervention | None":
    """What is done to the features in rollouts; None where none are named."""
    from features.splice import Intervention

    if not arguments.latents:
        return None
    if unknown := [latent for latent in arguments.latents if not 0 <= latent < n_latents]:
        raise ValueError(f"--latents {unknown}: the autoencoder has 0 to {n_latents - 1}")
    scale = arguments.scale
    if scale is None and arguments.clamp is None:
        scale = 0.0
    return Intervention(tuple(arguments.latents), scale=scale, clamp=arguments.clamp)


# Open loop


class _OpenLoop:
    """What turning features does to single actions.

    Args:
        effects: Of every feature.
        controls: Of some features, beside random directions of equal size.
        doses: Of the same ones; None where nothing is foretold (policies other than ACT).
        least: Of an effect, in data units.
    """

    def __init__(
        self,
        effects: "FeatureEffects",
        controls: "ControlComparison",
        doses: "DoseResponse | None",
        least: float,
    ) -> None:
        self.effects = effects
        self.controls = controls
        self.doses = doses
        self.least = least

    @property
    def numbers(self) -> dict[str, Any]:
        """What can be said of all features together."""
        effects, controls = self.effects, self.controls
        values: dict[str, Any] = {
            "n_live": int((effects.n_frames > 0).sum()),
            "zero_effect_rate_ablated": effects.zero_effect_rate(self.least, 0.0),
            "zero_effect_rate_doubled": effects.zero_effect_rate(self.least, 2.0),
            "n_compared": len(controls.latents),
            "n_controls": controls.control_px.shape[1],
            "significant_share": controls.significant_share(),
        }
        if self.doses is not None:
            values |= {
                "median_dose_spearman": float(self.doses.spearman.nanmedian()),
                "median_dose_cosine": float(self.doses.cosine.nanmedian()),
                "median_dose_slope": float(self.doses.slope.nanmedian()),
                "n_as_foretold": len(self.as_foretold),
            }
        return values

    @property
    def as_foretold(self) -> list[int]:
        """Features that move the action beyond random directions, and whither they should.

        Significant at 5 %, and the changes over all doses have a cosine of at least 0.9 with what
        the derivative, or the weights, foretell.
        """
        if self.doses is None:
            return []
        is_significant = self.controls.is_significant[:, 0]
        is_foretold = self.doses.cosine[:, 0] >= 0.9
        return [
            latent
            for latent, kept in zip(
                self.controls.latents, is_significant & is_foretold, strict=True
            )
            if kept
        ]


def _open_loop(
    subject: Subject, probe: "FeatureProbe", least: float, arguments: argparse.Namespace
) -> _OpenLoop:
    """Measure every feature, then compare and dose the strongest."""
    import torch

    from features.effects import (
        FeatureProbe,
        dose_response,
        feature_effects,
        random_direction_effects,
    )
    from features.splice import data_directions, random_directions
    from policies.act import ACTPolicy

    effects = feature_effects(probe, n_frames_per_latent=16)
    if arguments.latents:
        latents = [latent for latent in arguments.latents if effects.n_frames[latent] > 0]
        if not latents:
            raise ValueError(
                f"--latents {arguments.latents}: none of them fires on these "
                f"{len(probe.activations)} frames; give other features or --episode_idx all"
            )
    else:
        px = effects.magnitude_px[:, 0].amax(-1)
        often = torch.where(effects.n_frames >= 8, px, -1.0)
        latents = [int(each) for each in often.argsort(descending=True) if often[each] >= 0]
        latents = latents[: arguments.n_features]
        if not latents:
            raise ValueError(
                f"no feature fires on 8 of the {len(probe.activations)} frames: give more with "
                "--n_effect_frames or --episode_idx all"
            )
    few = FeatureProbe(
        probe.view,
        probe.layer,
        probe.sae,
        probe.observation,
        latents,
        arguments.queries,
        probe.activations,
    )
    n_others, seed = arguments.n_controls_open, arguments.seed
    if arguments.control == "directions":
        others = random_directions(n_others, subject.sae.d_in, seed)
    elif arguments.control == "activations":
        others = data_directions(n_others, probe.activations.flatten(0, 1), seed)
    else:
        live = (effects.n_frames > 0).nonzero()[:, 0]
        live = live[~torch.isin(live, torch.tensor(latents))]
        if len(live) < n_others:
            raise ValueError(
                f"--n_controls_open {n_others}: only {len(live)} other features "
                "fire on these frames; give fewer, or --control directions"
            )
        generator = torch.Generator().manual_seed(seed)
        picks = torch.randperm(len(live), generator=generator)[:n_others]
        others = subject.sae.directions.detach()[live[picks]].cpu()
    controls = random_direction_effects(few, directions=others)
    foretells = isinstance(subject.view, ACTPolicy) and subject.layer in ("encoder", "decoder")
    return _OpenLoop(effects, controls, dose_response(few) if foretells else None, least)


def _write_table(path: Path, found: _OpenLoop, unit: str) -> None:
    """One row for each feature that fires."""
    import pyarrow as pa
    from pyarrow import parquet

    from policies.atomic_files import whole_file

    effects, controls, doses = found.effects, found.controls, found.doses
    compared = {latent: row for row, latent in enumerate(controls.latents)}
    rows = []
    for place in (effects.n_frames > 0).nonzero()[:, 0].tolist():
        latent = effects.latents[place]
        row: dict[str, Any] = {
            "latent": latent,
            "n_active_frames": int(effects.n_active[place]),
            "n_frames": int(effects.n_frames[place]),
        }
        for factor, name in enumerate(("ablated", "doubled")):
            row[f"{name}_{unit}"] = float(effects.magnitude_px[place, factor, 0])
            row[f"{name}_consistency"] = float(effects.consistency[place, factor, 0])
            row[f"{name}_arrow_{unit}"] = effects.mean_px[place, factor, 0].tolist()
        if latent in compared:
            here = compared[latent]
            row |= {
                "ablated_p": float(controls.p_value[here, 0]),
                f"control_95_{unit}": float(controls.control_px[here, :, 0].quantile(0.95)),
            }
            if doses is not None:
                row |= {
                    "dose_slope": float(doses.slope[here, 0]),
                    "dose_cosine": float(doses.cosine[here, 0]),
                    "dose_spearman": float(doses.spearman[here, 0]),
                }
        rows.append(row)
    with whole_file(path) as temporary:
        parquet.write_table(pa.Table.from_pylist(rows, schema=_schema(rows)), temporary)


def _schema(rows: Sequence[dict[str, Any]]) -> Any:
    """Columns of all rows: what some lack is null there."""
    import pyarrow as pa

    richest = max(rows, key=len)
    return pa.Table.from_pylist([richest]).schema


def _draw_open_loop(folder: Path, found: _OpenLoop, unit: str) -> None:
    """Draw the arrows of the strongest features, and how they answer doses."""
    from rendering.charts import arrows_chart, curves_chart
    from rendering.picture import write_png

    controls, doses = found.controls, found.doses
    shown = list(controls.latents)[:N_CHART_FEATURES]
    arrows = found.effects.mean_px[shown, 1, 0].numpy()
    if arrows.shape[1] == 2:
        names = [str(latent) for latent in shown]
        title = "change of the action when a feature is doubled"
        write_png(folder / ARROWS_FILE, arrows_chart(arrows, names, unit, title))
    if doses is None:
        return
    curves = {}
    for row, latent in enumerate(shown):
        predicted = doses.predicted_px[row, -1, 0]
        along = doses.measured_px[row, :, 0] @ (predicted / predicted.norm())
        curves[f"feature {latent}"] = along.tolist()
    chart = curves_chart(
        doses.doses,
        curves,
        "dose, in root mean squares of the feature's active code",
        f"{unit} along the foretold direction",
        "mean change of the action",
    )
    write_png(folder / DOSES_FILE, chart)


def _print_open_loop(console: Any, found: _OpenLoop, control: str, unit: str) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    effects, controls, doses = found.effects, found.controls, found.doses
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    columns = ["feature", "frames", f"ablated\n{unit}", f"random\n95 % {unit}", "p"]
    columns += [f"doubled\n{unit}"]
    for name in columns + (["dose\ncosine", "dose\nslope", "dose\nrank"] if doses else []):
        table.add_column(name, justify="right", no_wrap=True)
    for row, latent in enumerate(controls.latents):
        cells = [
            str(latent),
            str(int(effects.n_active[latent])),
            f"{float(effects.magnitude_px[latent, 0, 0]):.2f}",
            f"{float(controls.control_px[row, :, 0].quantile(0.95)):.2f}",
            f"{float(controls.p_value[row, 0]):.3f}",
            f"{float(effects.magnitude_px[latent, 1, 0]):.2f}",
        ]
        if doses is not None:
            values = (doses.cosine, doses.slope, doses.spearman)
            cells += [f"{float(each[row, 0]):.2f}" for each in values]
        table.add_row(*cells)
    console.print(table)
    numbers = found.numbers
    console.print(
        f"{numbers['zero_effect_rate_ablated']:.0%} of {numbers['n_live']} features move the "
        f"action by less than {found.least:.3g} {unit} when ablated; "
        f"{numbers['significant_share']:.0%} of the {numbers['n_compared']} above, chosen by their "
        f"effect, exceed the 95 % quantile of {numbers['n_controls']} random {CONTROLS[control]} "
        "of equal size",
        soft_wrap=True,
    )
    if doses is not None:
        console.print(
            f"{len(found.as_foretold)} of them do so in the foretold direction (cosine 0.9 and "
            f"more over all doses): {found.as_foretold}",
            soft_wrap=True,
        )


# Closed loop


def _controls(
    probe: "FeatureProbe", intervention: "Intervention", arguments: argparse.Namespace
) -> "list[Intervention]":
    """The same done to random features that fire about as often, at any token.

    Raises:
        ValueError: If a feature never fires, or there are too few others.
    """
    from dataclasses import replace

    import torch
    from einops import rearrange

    from features.splice import matched_latents

    if not arguments.n_controls:
        return []
    vectors = rearrange(probe.activations, "frame token dim -> (frame token) dim")
    fires = torch.bincount(probe.sae.encode_sparse(vectors).latent, minlength=probe.sae.n_latents)
    n_each = len(intervention.latents)
    others = matched_latents(
        fires.double() / len(vectors),
        intervention.latents,
        n_each * arguments.n_controls,
        arguments.seed,
    )
    return [
        replace(intervention, latents=others[start : start + n_each])
        for start in range(0, len(others), n_each)
    ]


def _closed_loop(
    subject: Subject,
    task: "Task",
    intervention: "Intervention",
    controls: "Sequence[Intervention]",
    arguments: argparse.Namespace,
) -> "SteeringResult":
    """Rollouts with the intervention and with its controls, from equal seeds."""
    from envs.steering import steer_rollouts

    return steer_rollouts(
        task,
        subject.view,
        subject.layer,
        subject.sae,
        intervention,
        range(arguments.first_seed, arguments.first_seed + arguments.n_rollouts),
        controls,
        controller_for(
            subject.data.loaded_policy, arguments.temporal_ensemble_coeff, arguments.n_action_steps
        ),
        subject.device,
        progress=True,
    )


def _shares_above(result: "SteeringResult") -> dict[str, dict[str, Any]]:
    """In which share of the episodes each quantity exceeds the baseline's, and for the controls."""
    shares = {}
    for name in result.baseline.values:
        steered = result.sign_rate(name, 1)
        shares[name] = {
            "steered": steered.value,
            "low": steered.low,
            "high": steered.high,
            "controls": [result.sign_rate(name, 1, control).value for control in result.controls],
        }
    return shares


def _film(folder: Path, task: "Task", result: "SteeringResult") -> None:
    """Film the first episodes of every variant side by side, and draw the scores."""
    from features.resampling import N_RESAMPLES, interval, resample_counts
    from rendering.charts import bars_chart
    from rendering.picture import write_png
    from rendering.video import Clip, write_clips

    variants = (result.baseline, result.steered, *result.controls)
    clips = [
        Clip(
            recording.frames(task),
            [f"{variant.name}  {caption}" for caption in recording.captions()],
        )
        for recordings in zip(*(variant.recordings for variant in variants), strict=True)
        for variant, recording in zip(variants, recordings, strict=True)
    ]
    write_clips(folder / VIDEO_FILE, clips, task.fps, columns=len(variants))
    score = next(name for name in result.baseline.values if name.startswith("max_"))
    means, intervals = [], []
    for variant in variants:
        values = np.asarray(variant.values[score], np.float64)
        means.append(float(values.mean()))
        if len(values) > 1:
            import torch

            counts = resample_counts(len(values), N_RESAMPLES)
            intervals.append(interval(counts @ torch.from_numpy(values) / len(values)))
        else:
            intervals.append((means[-1], means[-1]))
    names = [variant.name for variant in variants]
    chart = bars_chart(names, means, intervals, score.replace("_", " "))
    write_png(folder / ROLLOUTS_FILE, chart)


def _print_closed_loop(console: Any, result: "SteeringResult") -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    names = (f"mean of {len(result.seeds)}", "baseline", result.steered.name, "controls")
    for name in (*names, "difference [95 %]", "beyond controls [95 %]"):
        table.add_column(name, justify="left" if name == names[0] else "right")
    differences = result.differences()
    beyond = result.beyond_controls() if result.controls else {}
    for name, values in result.baseline.values.items():
        if not name.startswith(SHOWN):
            continue
        controls = [control.values[name].mean() for control in result.controls]
        cells = [f"{values.mean():.2f}", f"{result.steered.values[name].mean():.2f}"]
        cells.append(f"{np.mean(controls):.2f}" if controls else "")
        for estimates in (differences, beyond):
            each = estimates.get(name)
            cells.append(
                "" if each is None else f"{each.value:+.2f} [{each.low:+.2f}, {each.high:+.2f}]"
            )
        table.add_row(name.replace("_", " "), *cells)
    console.print(table)
