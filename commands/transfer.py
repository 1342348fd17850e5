"""``analyze.py transfer``: a policy of one arm acts with another, with and without the flip."""

import argparse
import csv
import io
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from commands.inputs import device, task_class
from commands.rollout import Variant, variants
from envs.rollout import RolloutResult, check_fit
from envs.task import ArmTask, Task
from envs.transfer import (
    EQUAL_PX,
    Condition,
    act_on_arm,
    agreement,
    check_arms,
    comparisons,
    conditions,
    difference,
    mirrors_between,
    untrained_copy,
    verdict,
)
from features.resampling import Estimate
from policies.act import ACTPolicy
from policies.atomic_files import write_atomically
from policies.interface import PolicyView
from policies.json_files import json_text
from policies.loading import LoadedPolicy, load_policy

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from envs.equivariance import BothSides, Side
    from envs.rollout import EpisodeRecording
    from landscapes.study import Frames
    from policies.interface import Batch, SamplingPolicyView

RESULT_FILE = "transfer.json"
ENSEMBLE_COEFFICIENT = 0.01
"""Of ACT, for the second controller that acts when none is asked for."""
NOISE_NOTE = "noise is redrawn: judge by the interval of arm"
N_MEASURED_FRAMES = 60
"""Instants behind the numbers on both sides of the mirror; pictures show some of them."""
N_CALIBRATION_EPISODES = 8
N_CALIBRATION_FRAMES = 64
VIDEO_PX = 352
"""Height and width of a board in the video: its caption names condition, seed, step and score."""
N_SAMPLES = 32
"""Action chunks drawn per instant."""

Results = dict[Condition, RolloutResult]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's own options."""
    parser.add_argument(
        "--arms",
        type=int,
        nargs="+",
        default=[0, 1],
        metavar="ARM",
        help="the arm that the policy was trained with, then those to try (default: 0 1)",
    )
    parser.add_argument(
        "--n_trials", type=int, default=50, metavar="N", help="episodes of each condition"
    )
    parser.add_argument(
        "--first_seed",
        type=int,
        default=100_000,
        metavar="SEED",
        help="trial i starts from seed SEED + i, under every condition",
    )
    parser.add_argument(
        "--n_action_steps",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="execute this many steps of each chunk; all conditions for each value",
    )
    parser.add_argument(
        "--temporal_ensemble_coeff",
        type=float,
        nargs="+",
        default=[],
        metavar="M",
        help="predict at every step and average with weights exp(-M i); all conditions for each "
        "value (default of both: the policy's queue, and an ensemble with its own coefficient, "
        f"{ENSEMBLE_COEFFICIENT:g} where it has none)",
    )
    parser.add_argument(
        "--action_scale",
        type=float,
        metavar="SHARE",
        help="share of the way to an action's target that the controller is given, for tasks that "
        "have it (default: the task's own, PushT: 1)",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.7,
        metavar="SHARE",
        help="share of successes on an unseen arm that supports the hypothesis (default: 0.7)",
    )
    parser.add_argument(
        "--untrained",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let fresh weights act, too: ACT only (default: yes)",
    )
    parser.add_argument(
        "--n_frames",
        type=int,
        default=6,
        metavar="N",
        help="instants whose landscapes and attention are drawn; 0 for no pictures of them",
    )
    parser.add_argument(
        "--n_videos", type=int, default=2, metavar="N", help="trials in the video; 0 for none"
    )
    parser.add_argument(
        "--n_parallel", type=int, default=25, metavar="N", help="episodes that advance together"
    )


@dataclass(frozen=True)
class Experiment:
    """What is tried, once it is known to be possible."""

    policy: LoadedPolicy
    task: Task
    arms: ArmTask
    """The same task, as one with arms."""
    numbers: tuple[int, ...]
    """Of the arms, the seen one first."""
    untrained: ACTPolicy | None
    plans: tuple[Variant, ...]
    """The first one is filmed and looked at."""
    own_plan: str
    """Name of the controller that the policy is configured for, tried or not."""
    seeds: range
    on: str
    """Device."""

    @property
    def seen(self) -> Condition:
        """What the policy was trained for."""
        return Condition(self.numbers[0])

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """All of them."""
        return conditions(self.numbers, self.untrained is not None)


def run(arguments: argparse.Namespace) -> int:
    """Let all conditions act, compare them, look at both sides, and write everything down.

    Raises:
        ValueError: For anything wrong with the arguments, the policy or the task.
    """
    from rich.console import Console

    _check(arguments)
    folder = Path(arguments.output_dir).expanduser()
    if (folder / RESULT_FILE).exists():
        raise ValueError(_occupied(folder / RESULT_FILE))
    experiment = _open(arguments)
    demonstrations = _calibration_frames(experiment, arguments)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--output_dir {folder}: no folder can be made there ({error.strerror}); name another"
        ) from error
    console = Console()
    console.print(f"the policy's own controller: {experiment.own_plan}", highlight=False)
    if arguments.untrained and experiment.untrained is None:
        kind = type(experiment.policy.view).__name__
        console.print(f"no untrained level: only ACT is built anew here, the policy is {kind}")
    document: dict[str, Any] = {
        "complete": False,
        "policy": str(experiment.policy.source),
        "task": experiment.task.name,
        "arms": list(experiment.numbers),
        "own_controller": experiment.own_plan,
        "action_scale": getattr(experiment.task, "action_scale", None),
        "n_trials": len(experiment.seeds),
        "first_seed": arguments.first_seed,
        "threshold": arguments.threshold,
        "success_threshold": experiment.task.success_thresholds[-1],
        "rows": [],
        "comparisons": [],
        "hypothesis": [],
        "flip_check": [],
        "both_sides": [],
    }
    found: dict[str, Results] = {}
    for plan in experiment.plans:
        found[plan.name] = {}
        for condition in experiment.conditions:
            console.print(f"{plan.name}  {condition.label}", highlight=False)
            began = time.perf_counter()
            result = _play(experiment, plan, condition, arguments, console.is_terminal)
            wall_s = time.perf_counter() - began
            found[plan.name][condition] = result
            document["rows"].append(_row(plan, condition, wall_s, result))
            # After every condition: an interruption leaves the numbers of those that are done.
            _write(folder, document)
        document["comparisons"] += _compared(experiment, plan, found[plan.name])
        document["hypothesis"] += _hypothesis(
            experiment, plan, found[plan.name], arguments.threshold
        )
        document["flip_check"] += _flip_check(experiment, plan, found[plan.name])
        _write(folder, document)
    write_atomically(folder / "transfer.csv", _csv(document["rows"], experiment.task))
    _print(console, document, experiment.task)
    _draw(folder, experiment, found, arguments)
    document["both_sides"] = _look(
        folder, experiment, found[experiment.plans[0].name], demonstrations, arguments
    )
    document["complete"] = True
    _write(folder, document)
    for line in _both_sides(document):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"written to {folder}", highlight=False)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what cannot work before anything long starts."""
    for name, least in (
        ("n_trials", 2),
        ("first_seed", 0),
        ("n_frames", 0),
        ("n_videos", 0),
        ("n_parallel", 1),
    ):
        value = getattr(arguments, name)
        if value < least:
            raise ValueError(f"--{name} is {value}: give at least {least}")
    if not 0 < arguments.threshold < 1:
        raise ValueError(f"--threshold is {arguments.threshold}: give a share between 0 and 1")


def _occupied(path: Path) -> str:
    """Say what is in the way."""
    try:
        is_complete = json.loads(path.read_text(encoding="utf-8"))["complete"]
    except (ValueError, KeyError, TypeError):
        is_complete = False
    state = "is there already" if is_complete else "is there already, unfinished"
    return f"{path} {state}: choose another --output_dir, or remove that file"


def _open(arguments: argparse.Namespace) -> Experiment:
    on = device(arguments.device)
    task_type = task_class(arguments.task)
    policy = load_policy(arguments.policy_path, on, arguments.revision)
    view = policy.view
    task = task_type.for_policy(view.data_schema)
    if arguments.action_scale is not None:
        task = _scaled(task, arguments.action_scale)
    arms = check_arms(task, arguments.arms)
    check_fit(view, task)
    (own,) = variants(policy, [], [])
    n_steps, coefficients = arguments.n_action_steps, arguments.temporal_ensemble_coeff
    if not n_steps and not coefficients:
        coefficient = policy.temporal_ensemble_coeff
        n_steps = [view.n_action_steps]
        coefficients = [ENSEMBLE_COEFFICIENT if coefficient is None else coefficient]
    # The policy's own controller comes first.
    plans = sorted(variants(policy, n_steps, coefficients), key=lambda plan: plan.name != own.name)
    names = [plan.name for plan in plans]
    if len(set(names)) < len(names):
        raise ValueError(
            f"--n_action_steps {n_steps}, --temporal_ensemble_coeff {coefficients}: give each "
            "value once"
        )
    untrained = None
    if arguments.untrained and isinstance(view, ACTPolicy):
        untrained = untrained_copy(view)
    return Experiment(
        policy=policy,
        task=task,
        arms=arms,
        numbers=tuple(arguments.arms),
        untrained=untrained,
        plans=tuple(plans),
        own_plan=own.name,
        seeds=range(arguments.first_seed, arguments.first_seed + arguments.n_trials),
        on=on,
    )


def _scaled(task: Task, action_scale: float) -> Task:
    """The task with another ``action_scale``.

    Raises:
        ValueError: If it has none, or not this one.
    """
    if not is_dataclass(task) or "action_scale" not in {each.name for each in fields(task)}:
        raise ValueError(
            f"--action_scale {action_scale}: {type(task).__name__} has no action_scale; leave it "
            "out"
        )
    scale: dict[str, Any] = {"action_scale": action_scale}
    return replace(task, **scale)


def _calibration_frames(experiment: Experiment, arguments: argparse.Namespace) -> "Frames | None":
    """Demonstrations that the scale of ACT's kernels is fitted to: held-out ones where known.

    Raises:
        ValueError: If they are needed and are not there.
    """
    from datamodules.opening import episode_lengths, find_training_data, open_demonstrations
    from landscapes.study import Frames, is_calibrated

    policy = experiment.policy
    view = _sampling_view(policy.view)
    if not arguments.n_frames or view is None or not is_calibrated(view):
        if arguments.dataset_repo_id is not None:
            raise ValueError(
                f"--dataset_repo_id {arguments.dataset_repo_id}: nothing here is fitted to it "
                "(it is for the landscapes of ACT); leave it out"
            )
        return None
    try:
        name = arguments.dataset_repo_id or find_training_data(policy)
    except ValueError as error:
        raise ValueError(
            f"the scale of ACT's landscapes is fitted to demonstrations: {error}; or give "
            "--n_frames 0, which leaves pictures of landscapes and attention out"
        ) from error
    available = sorted(episode_lengths(name))
    split = policy.split
    is_its_own = split is not None and sorted([*split["train"], *split["val"]]) == available
    usable = split["val"] if split is not None and is_its_own and split["val"] else available
    stride = max(1, len(usable) // N_CALIBRATION_EPISODES)
    episodes = list(usable)[::stride][:N_CALIBRATION_EPISODES]
    data = open_demonstrations(name, view, episodes)
    data.setup()
    return Frames.spread([data.episode(number) for number in episodes], N_CALIBRATION_FRAMES)


def _sampling_view(view: PolicyView) -> "SamplingPolicyView | None":
    """The policy where it has landscapes on a board, which needs two dimensions and samples."""
    from policies.interface import SamplingPolicyView

    if isinstance(view, SamplingPolicyView) and view.data_schema.action_dim == 2:
        return view
    return None


def _play(
    experiment: Experiment,
    plan: Variant,
    condition: Condition,
    arguments: argparse.Namespace,
    progress: bool,
) -> RolloutResult:
    view = experiment.policy.view if condition.is_trained else experiment.untrained
    assert view is not None
    return act_on_arm(
        view,
        experiment.arms,
        condition,
        experiment.seen.arm,
        experiment.seeds,
        plan.controller(view),
        experiment.on,
        arguments.n_parallel,
        progress,
    )


# Numbers


def _row(plan: Variant, condition: Condition, wall_s: float, result: RolloutResult) -> dict:
    return {
        "controller": plan.name,
        "n_action_steps": plan.n_action_steps,
        "temporal_ensemble_coeff": plan.temporal_ensemble_coeff,
        "condition": condition.name,
        **asdict(condition),
        "wall_s": wall_s,
        **result.to_dict(),
    }


def _compared(experiment: Experiment, plan: Variant, found: Results) -> list[dict]:
    rows = []
    for first, second in comparisons(experiment.numbers, experiment.untrained is not None):
        gap = difference(found[first], found[second])
        thresholds = experiment.task.success_thresholds
        rows.append(
            {
                "controller": plan.name,
                "first": first.name,
                "second": second.name,
                "success": {
                    f"{threshold:.2f}": asdict(rates)
                    for threshold, rates in zip(thresholds, gap.success, strict=True)
                },
                f"mean_max_{experiment.task.score_name}": asdict(gap.mean_max_score),
            }
        )
    return rows


def _success(result: RolloutResult) -> Estimate:
    summary = result.summary()
    return Estimate(summary["success"], summary["success_low"], summary["success_high"])


def _hypothesis(
    experiment: Experiment, plan: Variant, found: Results, threshold: float
) -> list[dict]:
    """Hold every trained condition against the share that was asked for; the seen arm, too."""
    is_seen_arm_below = verdict(_success(found[experiment.seen]), threshold) == "not supported"
    rows = []
    for condition, result in found.items():
        if condition.is_trained:
            share = _success(result)
            rows.append(
                {
                    "controller": plan.name,
                    "condition": condition.name,
                    "label": condition.label,
                    "is_seen": condition == experiment.seen,
                    "n_successes": round(share.value * len(experiment.seeds)),
                    "share": asdict(share),
                    "verdict": verdict(share, threshold),
                    "is_seen_arm_below": is_seen_arm_below,
                }
            )
    return rows


def _flip_check(experiment: Experiment, plan: Variant, found: Results) -> list[dict]:
    seen = experiment.seen
    rows = []
    for arm in experiment.numbers[1:]:
        flipped = found[Condition(arm, is_flipped=True)]
        mirrors = mirrors_between(experiment.arms, seen.arm, arm)
        same = agreement(found[seen], flipped, mirrors)
        rows.append(
            {
                "controller": plan.name,
                "arm": arm,
                # ACT executes z = 0; the noise of others is seeded by the bytes of what they see.
                "draws_noise": not isinstance(experiment.policy.view, ACTPolicy),
                **asdict(same),
            }
        )
    return rows


# Both sides of the mirror


def _look(
    folder: Path,
    experiment: Experiment,
    found: Results,
    demonstrations: "Frames | None",
    arguments: argparse.Namespace,
) -> list[dict]:
    """Ask the policy about instants of its own trials with the seen arm, on both sides.

    Returns:
        Numbers for each unseen arm.
    """
    import torch

    from envs.equivariance import (
        equivariance_error,
        in_mirror,
        instants,
        look_at_both_sides,
        redraw_distance,
    )
    from landscapes.study import predict_frames, reachable_horizons

    view = experiment.policy.view
    recordings = found[experiment.seen].recordings
    n_frames = max(N_MEASURED_FRAMES, arguments.n_frames)

    def shown_by(arm: int, played: "Sequence[EpisodeRecording]") -> "Batch":
        return instants(view, experiment.arms.of_arm(arm), played, n_frames).to(experiment.on)

    batch = shown_by(experiment.seen.arm, recordings)
    redrawn = redraw_distance(view, batch)
    sampling = _sampling_view(view) if arguments.n_frames else None
    horizons = () if sampling is None else reachable_horizons(sampling, None)
    calibration = None
    if sampling is not None and demonstrations is not None:
        shown = demonstrations.to(experiment.on).batch
        calibration = predict_frames(sampling, shown, horizons, N_SAMPLES)
    rows: list[dict] = []
    pairs: dict[int, BothSides] = {}
    errors: dict[int, torch.Tensor] = {}
    for arm in experiment.numbers[1:]:
        mirrors = mirrors_between(experiment.arms, experiment.seen.arm, arm)
        errors[arm] = equivariance_error(view, batch, mirrors).cpu()
        row: dict[str, Any] = {
            "arm": arm,
            "n_frames": len(batch),
            "equivariance": {
                "median": float(errors[arm].median()),
                "quantile_90": float(errors[arm].quantile(0.9)),
                "first_action_median": float(errors[arm][:, 0].median()),
                "redrawn_median": None if redrawn is None else float(redrawn.median()),
            },
            "landscape": None,
            "attention": None,
        }
        if sampling is not None:
            other = shown_by(arm, in_mirror(recordings, mirrors))
            both = look_at_both_sides(
                sampling, batch, other, mirrors, horizons, calibration, N_SAMPLES
            )
            moved = {
                "plain": both.total_variation(both.plain),
                "flipped": both.total_variation(both.flipped),
                "redrawn": both.noise_floor(),
            }
            pairs[arm] = both
            row["landscape"] = {
                "kernels": "leave-one-out bandwidth of the samples"
                if calibration is None
                else f"fitted to {len(calibration.samples)} demonstrated frames",
                "total_variation": {
                    name: {
                        f"k{horizon}": float(shares[:, place].median())
                        for place, horizon in enumerate(horizons)
                    }
                    for name, shares in moved.items()
                },
            }
            if both.seen.attribution is not None:
                row["attention"] = {
                    "method": both.seen.attribution.method,
                    "correlation": {
                        name: float(both.map_correlation(side).nanmedian())
                        for name, side in (("plain", both.plain), ("flipped", both.flipped))
                    },
                }
        rows.append(row)
    if pairs:
        n_shown = min(arguments.n_frames, len(batch))
        chosen = torch.linspace(0, len(batch) - 1, n_shown).round().long()
        _draw_landscapes(folder, experiment, pairs, errors, chosen, horizons)
        if all(both.seen.attribution is not None for both in pairs.values()):
            _draw_attention(folder, experiment, pairs, chosen)
    return rows


# Pictures


def _draw(
    folder: Path,
    experiment: Experiment,
    found: Mapping[str, Results],
    arguments: argparse.Namespace,
) -> None:
    """Draw the figure, and film trials of the first controller side by side."""
    from rendering.picture import write_png
    from rendering.transfer import Bar, transfer_chart
    from rendering.video import Clip, write_clips

    task = experiment.task
    plans = {plan.name: plan for plan in experiment.plans}
    groups = {}
    for name, results in found.items():
        bars = []
        for condition, result in results.items():
            summary, key = result.summary(), f"mean_max_{task.score_name}"
            score = Estimate(summary[key], summary[f"{key}_low"], summary[f"{key}_high"])
            label = f"{condition.label} (seen)" if condition == experiment.seen else condition.label
            bars.append(Bar(label, _success(result), score, condition.is_trained))
        groups[_in_words(plans[name])] = bars
    picture = transfer_chart(
        groups,
        arguments.threshold,
        f"success ({task.score_name} above {task.success_thresholds[-1]:g})",
        f"mean max {task.score_name}",
        f"{len(experiment.seeds)} paired trials a condition, 95 % intervals",
    )
    write_png(folder / "transfer.png", picture)
    if not arguments.n_videos:
        return
    plan = experiment.plans[0]
    shown = [each for each in experiment.conditions if each.is_trained]
    clips = []
    for place in range(min(arguments.n_videos, len(experiment.seeds))):
        for condition in shown:
            recording = found[plan.name][condition].recordings[place]
            frames = recording.frames(experiment.arms.of_arm(condition.arm), VIDEO_PX)
            captions = [f"{condition.label}: {text}" for text in recording.captions()]
            clips.append(Clip(frames, captions))
    write_clips(folder / "transfer.mp4", clips, task.fps, columns=len(shown))


def _in_words(plan: Variant) -> str:
    """How a controller executes chunks."""
    if plan.temporal_ensemble_coeff is None:
        return f"chunked: {plan.n_action_steps} steps of each chunk"
    return f"ensembled: every step, m = {plan.temporal_ensemble_coeff:g}"


def _draw_landscapes(
    folder: Path,
    experiment: Experiment,
    pairs: "Mapping[int, BothSides]",
    errors: "Mapping[int, torch.Tensor]",
    chosen: "torch.Tensor",
    horizons: Sequence[int],
) -> None:
    from rendering.picture import write_png
    from rendering.transfer import landscapes_by_arm

    # The action of now is a small blob next to any agent.
    horizon = horizons[len(horizons) // 2]
    place = horizons.index(horizon)
    seen = experiment.seen
    floor = max(float(both.noise_floor()[:, place].median()) for both in pairs.values())
    columns = []
    for arm, both in pairs.items():
        if not columns:
            instants = both.seen.batch.rows(chosen)
            titles = [
                f"arm {seen.arm} (seen)  seed {int(seed)}, step {int(step)}"
                for seed, step in zip(instants.episode_index, instants.frame_index, strict=True)
            ]
            columns.append(_column(experiment, seen.arm, both.seen, chosen, horizon, titles))
        for condition, side in (
            (Condition(arm), both.plain),
            (Condition(arm, is_flipped=True), both.flipped),
        ):
            moved = both.total_variation(side)[chosen, place].tolist()
            off_px = errors[arm][chosen, horizon].tolist()
            # With the flip a distance would be that of rounding, or of redrawn noise.
            titles = [f"{condition.label}: {share:.0%} lies elsewhere" for share in moved]
            if not condition.is_flipped:
                titles = [
                    f"{title}, {off:.0f} px off" for title, off in zip(titles, off_px, strict=True)
                ]
            columns.append(_column(experiment, arm, side, chosen, horizon, titles))
    note = (
        f"What the policy would do {horizon} steps ahead, over the board; the fainter, the less "
        "likely. Star: its prediction. Lines: regions of 50 % (solid), 80 % (dashed) and 95 % "
        "(dotted) of the probability. Elsewhere: share of the probability that is not where the "
        f"mirrored landscape of arm {seen.arm} has it; {floor:.0%} (median) when its own samples "
        "are drawn anew. px off: distance from the mirrored action."
    )
    rows = [list(row) for row in zip(*columns, strict=True)]
    write_png(folder / "landscapes.png", landscapes_by_arm(rows, note))


def _column(
    experiment: Experiment,
    arm: int,
    side: "Side",
    chosen: "torch.Tensor",
    horizon: int,
    titles: Sequence[str],
) -> list:
    """Landscapes of some instants over the boards of an arm."""
    from rendering.landscape import Markers, Panel
    from rendering.transfer import BoardLandscape

    states = side.batch.simulator_state
    assert states is not None
    place = side.landscape.queries.index(horizon)
    env = experiment.arms.of_arm(arm).make()
    cells = []
    try:
        for frame, title in zip(chosen.tolist(), titles, strict=True):
            env.reset_to(states[frame].double().cpu().numpy())
            markers = Markers(prediction=side.point[frame, place].double().numpy())
            panel = Panel.of(side.landscape, frame, horizon, title, markers)
            cells.append(BoardLandscape(env.frame(512), panel))
    finally:
        env.close()
    return cells


def _draw_attention(
    folder: Path,
    experiment: Experiment,
    pairs: "Mapping[int, BothSides]",
    chosen: "torch.Tensor",
) -> None:
    from attention.study import resolution_note
    from rendering.attention import AttentionStyle, attention_strip
    from rendering.attention_scenes import TITLES, attention_scenes
    from rendering.picture import write_png

    view = experiment.policy.view
    shown: list[tuple[str, Side]] = []
    for arm, both in pairs.items():
        if not shown:
            shown.append((f"{experiment.seen.label} (seen)", both.seen))
        shown.append((Condition(arm).label, both.plain))
        shown.append((Condition(arm, is_flipped=True).label, both.flipped))
    rows = []
    for label, side in shown:
        assert side.attribution is not None
        batch = side.batch.rows(chosen.to(side.batch.actions.device))
        title = f"{label}: {TITLES[side.attribution.method]}"
        found = side.attribution.rows(chosen)
        rows.append(list(attention_scenes(found, batch.observation, _captions(batch), title=title)))
    note = resolution_note(view) if isinstance(view, ACTPolicy) else ""
    write_png(folder / "attention.png", attention_strip(rows, AttentionStyle(), note=note))


def _captions(batch: "Batch") -> list[str]:
    return [
        f"seed {int(seed)}, step {int(step)}"
        for seed, step in zip(batch.episode_index, batch.frame_index, strict=True)
    ]


# What is written and said


def _write(folder: Path, document: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / RESULT_FILE, json_text(document))


def _csv(rows: Sequence[Mapping[str, Any]], task: Task) -> str:
    """One line for each condition, without episodes."""
    text = io.StringIO()
    plain = ("controller", "condition", "arm", "is_flipped", "is_trained")
    table = csv.DictWriter(
        text, [*plain, *rows[0]["summary"]], extrasaction="ignore", lineterminator="\n"
    )
    table.writeheader()
    for row in rows:
        table.writerow({**row, **row["summary"]})
    return text.getvalue()


def _print(console: "Console", document: Mapping[str, Any], task: Task) -> None:
    """Print tables narrow enough for 80 columns, then what they say."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    score = f"mean_max_{task.score_name}"
    *lower, own = (f"{threshold:.2f}" for threshold in task.success_thresholds)
    look = {"box": SIMPLE_HEAD, "pad_edge": False, "collapse_padding": True}
    heads = ("success, %", score.replace("_", " "))
    for plan in dict.fromkeys(row["controller"] for row in document["rows"]):
        title = f"{task.name}, {plan}: {document['n_trials']} paired trials a condition"
        results = Table(title=f"{title}, success above {own}", **look)
        gaps = Table(title="differences, paired by seed", **look)
        results.add_column("", no_wrap=True)
        for head in (*heads, *(f"at {each}" for each in lower), "steps"):
            results.add_column(head, justify="right", no_wrap=True)
        gaps.add_column("", no_wrap=True)
        for head in (heads[0], "McNemar p", heads[1]):
            gaps.add_column(head, justify="right", no_wrap=True)
        for row in document["rows"]:
            if row["controller"] == plan:
                summary = row["summary"]
                results.add_row(
                    row["condition"],
                    _percent(*(summary[f"success{end}"] for end in ("", "_low", "_high"))),
                    _plain(*(summary[f"{score}{end}"] for end in ("", "_low", "_high"))),
                    *(f"{summary[f'success_{each}']:.0%}" for each in lower),
                    f"{summary['mean_n_steps']:.0f}",
                )
        for row in document["comparisons"]:
            if row["controller"] == plan:
                rates = row["success"][own]
                gaps.add_row(
                    f"{row['first']} - {row['second']}",
                    _percent(*rates["difference"].values(), sign="+"),
                    f"{rates['p_value']:.2g}",
                    _plain(*row[score].values(), sign="+"),
                )
        console.print(results)
        console.print(gaps)
    for line in _outcomes(document):
        console.print(line, highlight=False, soft_wrap=True)


def _percent(value: float, low: float, high: float, sign: str = "") -> str:
    """A share and its interval, in percent."""
    # Adding 0 turns -0 into 0.
    value, low, high = (round(100 * each) + 0 for each in (value, low, high))
    return f"{value:{sign}d} [{low:{sign}d}, {high:{sign}d}]"


def _plain(value: float, low: float, high: float, sign: str = "") -> str:
    """A number and its interval."""
    value, low, high = (round(each, 2) + 0.0 for each in (value, low, high))
    return f"{value:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"


def _outcomes(document: Mapping[str, Any]) -> list[str]:
    """What trials say, one line each."""
    n_trials, threshold = document["n_trials"], document["threshold"]
    seen = document["arms"][0]
    lines = []
    for row in document["hypothesis"]:
        share = row["share"]
        lines.append(
            f"{row['controller']}, {row['label']}: {row['n_successes']} of {n_trials} "
            f"({share['value']:.0%} [{share['low']:.0%}, {share['high']:.0%}]) against "
            f"{threshold:.0%}: "
            + ("the seen arm itself, for comparison" if row["is_seen"] else row["verdict"])
            + (
                f" (the seen arm itself is below {threshold:.0%}: says nothing of transfer)"
                if row["is_seen_arm_below"] and not row["is_seen"]
                else ""
            )
        )
    for row in document["flip_check"]:
        lines.append(
            f"{row['controller']}, arm {row['arm']} with the flip: {row['n_equal']} of "
            f"{row['n_episodes']} trials are those of the seen arm step for step (within "
            f"{EQUAL_PX:g} px), {row['n_equal_outcomes']} have its outcome"
            + (f"; {NOISE_NOTE}{row['arm']}_flipped - arm{seen}" if row["draws_noise"] else "")
        )
    return lines


def _both_sides(document: Mapping[str, Any]) -> list[str]:
    """What the policy would do on both sides of the mirror, one line each."""
    lines = []
    for row in document["both_sides"]:
        off = row["equivariance"]
        floor = off["redrawn_median"]
        lines.append(
            f"arm {row['arm']} without the flip, at {row['n_frames']} instants: actions "
            f"{off['median']:.0f} px (median) and {off['quantile_90']:.0f} px (90 %) from the "
            "mirrored ones; "
            + (
                "0 respects the mirror"
                if floor is None
                else f"two chunks drawn for one observation are {floor:.0f} px apart (median)"
            )
        )
        if row["landscape"] is not None:
            moved = row["landscape"]["total_variation"]
            shares = ", ".join(
                f"{name} {share:.0%} (the seen arm's own, drawn anew: {moved['redrawn'][name]:.0%})"
                for name, share in moved["plain"].items()
            )
            lines.append(f"  of its landscape lies elsewhere (median): {shares}")
        if row["attention"] is not None:
            found = row["attention"]["correlation"]
            lines.append(
                f"  its attention correlates {found['plain']:+.2f} with the mirrored map (median; "
                f"{found['flipped']:+.2f} with the flip)"
            )
    return lines
