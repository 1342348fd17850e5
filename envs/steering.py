"""Let a policy act with features held or ablated: what features do in closed loop.

Every variant starts from the same seeds, so that differences are paired: what is hard about a start
cancels. Whether a feature matters is a question of more than one variant: anything that is added to
activations does something, so controls of the same size act from the same starts, too.

Paths come from the simulator's states, by its :attr:`~envs.task.Scene.pose_parameters`: a task
needs nothing further to be steered.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import batched

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from autoencoders.sae import SparseAutoencoder
from envs.rollout import (
    Controller,
    EpisodeRecording,
    RolloutResult,
    bootstrap_interval,
    rollout,
)
from envs.task import PoseParameter, Scene, Task
from features.ood import MonitoredPolicy, OODDetector, OODMonitor, OODReading
from features.resampling import Estimate, wilson_estimate
from features.splice import Splicing, splice
from policies.ensembling import ActionQueue
from policies.interface import Observation, PolicyView, WrappedPolicy

BASELINE = "baseline"
"""Name of the policy as it is."""


@dataclass(frozen=True)
class Variant:
    """How one variant of the policy did, episode by episode."""

    name: str
    values: Mapping[str, Float[np.ndarray, " episode"]]
    """``success`` at the benchmark's own threshold, ``max_<score>``, ``n_steps``;
    ``path_<object>_<unit>``, the way that each object went; ``net_<pose parameter>``, by how much
    it ended elsewhere, with its sign, in its unit; and what the intervention did to the chunks that
    the policy would have predicted at the same instants: ``action_change``, the mean length of the
    change, and ``action_change_<dimension>``, its mean, in data units (0 for the baseline)."""
    recordings: tuple[EpisodeRecording, ...] = field(default=(), repr=False)
    """Of the first episodes, to be drawn side by side."""


@dataclass(frozen=True)
class SteeringResult:
    """The policy as it is, with an intervention, and with its controls, from the same starts."""

    seeds: tuple[int, ...]
    baseline: Variant
    steered: Variant
    controls: tuple[Variant, ...]

    def differences(self, variant: Variant | None = None) -> dict[str, Estimate]:
        """What a variant does otherwise than the baseline, paired by seed.

        Args:
            variant: Of this result; the intervention when None.

        Returns:
            Name of a quantity to its mean difference with a 95 % bootstrap interval over seeds.
        """
        chosen = self.steered if variant is None else variant
        return {
            name: _paired(chosen.values[name] - values)
            for name, values in self.baseline.values.items()
        }

    def beyond_controls(self) -> dict[str, Estimate]:
        """What the intervention does otherwise than its controls do on average, paired by seed.

        Raises:
            ValueError: If there are no controls.
        """
        if not self.controls:
            raise ValueError("there are no controls: give some to steer_rollouts")
        return {
            name: _paired(
                values - np.mean([control.values[name] for control in self.controls], axis=0)
            )
            for name, values in self.steered.values.items()
        }

    def sign_rate(self, quantity: str, sign: int, variant: Variant | None = None) -> Estimate:
        """In how many episodes a quantity differs from the baseline's in the foretold direction.

        Args:
            quantity: E.g. ``net_block_x``.
            sign: 1 or -1, chosen before anybody looked.
            variant: Of this result; the intervention when None.

        Returns:
            Share of the seeds, with Wilson's 95 % interval; no difference counts against.

        Raises:
            ValueError: If there is no such quantity or sign.
        """
        if quantity not in self.baseline.values or sign not in (-1, 1):
            raise ValueError(
                f"quantity {quantity!r}, sign {sign}: give 1 or -1, and one of "
                f"{list(self.baseline.values)}"
            )
        chosen = self.steered if variant is None else variant
        difference = chosen.values[quantity] - self.baseline.values[quantity]
        n_agreeing = int((sign * difference > 0).sum())
        return wilson_estimate(n_agreeing, len(self.seeds))

    def summary(self) -> dict[str, float]:
        """Means of all variants, and differences with intervals, as flat numbers."""
        numbers: dict[str, float] = {"n_episodes": float(len(self.seeds))}
        for name, values in self.baseline.values.items():
            numbers[f"{BASELINE}/{name}"] = float(values.mean())
            numbers[f"steered/{name}"] = float(self.steered.values[name].mean())
            if self.controls:
                numbers[f"controls/{name}"] = float(
                    np.mean([control.values[name].mean() for control in self.controls])
                )
        found = {"difference": self.differences()}
        if self.controls:
            found["beyond_controls"] = self.beyond_controls()
        for kind, estimates in found.items():
            for name, estimate in estimates.items():
                numbers[f"{kind}/{name}"] = estimate.value
                numbers[f"{kind}/{name}_low"] = estimate.low
                numbers[f"{kind}/{name}_high"] = estimate.high
        return numbers


def steer_rollouts(
    task: Task,
    view: PolicyView,
    layer: str,
    sae: SparseAutoencoder,
    intervention: Splicing,
    seeds: Sequence[int],
    controls: Sequence[Splicing] = (),
    controller: Controller | None = None,
    device: torch.device | str = "cpu",
    n_parallel: int = 25,
    n_recordings: int = 2,
    progress: bool = False,
) -> SteeringResult:
    """Roll out the policy as it is, with an intervention, and with each of its controls.

    At every prediction of a changed policy the unchanged one is asked as well, which says what the
    intervention does to the action, and costs a second forward pass.

    Args:
        task: Where the policy acts; its environment must be a :class:`~envs.task.Scene`.
        view: In evaluation mode, on ``device``.
        layer: Where to intervene, as for :func:`features.taps.find_tap`.
        sae: Fitted to the layer's activations.
        intervention: On its codes (:class:`features.splice.Intervention`), or
            :class:`features.splice.Reconstruction`, which asks whether they keep the behaviour.
        seeds: Of the episodes' starts.
        controls: E.g. interventions on :func:`features.splice.matched_latents`, or
            :class:`features.splice.DirectionIntervention` along random directions.
        controller: What becomes of chunks; the policy's own action queue when None.
        device: Where the policy lives.
        n_parallel: Episodes that advance together.
        n_recordings: First episodes of each variant whose recordings are kept.
        progress: Show a progress bar for each variant.

    Raises:
        RolloutError: As :func:`envs.rollout.rollout`.
        ValueError: If the task's environment is no scene, or as :func:`envs.rollout.rollout`.
    """
    parameters = _pose_parameters(task)
    controller = controller or ActionQueue(view.n_action_steps)
    # Rounds as the changed policies do: a listener in the decoder lets it decode every chunk step.
    unchanged = splice(view, layer, lambda x: x)

    def play(name: str, policy: PolicyView) -> Variant:
        is_changed = policy is not unchanged
        watched = _Noting(policy, _change_from(unchanged) if is_changed else _no_change)
        result = rollout(
            watched,
            task,
            seeds,
            controller,
            device,
            n_parallel,
            record=len(seeds),
            progress=progress,
        )
        changes = _by_episode(watched.notes, result, n_parallel)
        return Variant(name, _values(result, parameters, changes), result.recordings[:n_recordings])

    return SteeringResult(
        seeds=tuple(seeds),
        baseline=play(BASELINE, unchanged),
        steered=play(intervention.name, splice(view, layer, intervention.edit(sae))),
        controls=tuple(
            play(control.name, splice(view, layer, control.edit(sae))) for control in controls
        ),
    )


@dataclass(frozen=True)
class MonitoredRollouts:
    """Rollouts, and what a detector said of every prediction."""

    result: RolloutResult
    scores: Mapping[str, tuple[Float[Tensor, " _"], ...]]
    """By score, for each episode: one for each prediction."""
    steps: tuple[Tensor, ...]
    """For each episode: control step of each prediction."""

    @property
    def has_failed(self) -> list[bool]:
        """Whether each episode missed the benchmark's own threshold."""
        return [not episode.success[-1] for episode in self.result.episodes]


def monitored_rollouts(
    task: Task,
    view: PolicyView,
    detector: OODDetector,
    seeds: Sequence[int],
    controller: Controller | None = None,
    device: torch.device | str = "cpu",
    n_parallel: int = 25,
    wrap: Callable[[PolicyView], PolicyView] = lambda policy: policy,
    progress: bool = False,
) -> MonitoredRollouts:
    """Let a policy act while a detector listens; not one action changes.

    Args:
        task: Where the policy acts.
        view: In evaluation mode, on ``device``.
        detector: Fitted to the policy.
        seeds: Of the episodes' starts.
        controller: What becomes of chunks; the policy's own action queue when None.
        device: Where the policy lives.
        n_parallel: Episodes that advance together.
        wrap: What stands between the task and the monitored policy, e.g. a
            :class:`~envs.perturbations.PerturbedPolicy`.
        progress: Show a progress bar.

    Raises:
        RolloutError: As :func:`envs.rollout.rollout`.
    """
    with OODMonitor(view, detector) as monitor:
        policy = MonitoredPolicy(monitor)
        result = rollout(
            wrap(policy),
            task,
            seeds,
            controller or ActionQueue(view.n_action_steps),
            device,
            n_parallel,
            record=len(seeds),
            progress=progress,
        )
    readings: list[OODReading] = policy.readings
    return MonitoredRollouts(
        result=result,
        scores={
            novelty.name: tuple(
                _by_episode(
                    [reading.scores[novelty.name] for reading in readings], result, n_parallel
                )
            )
            for novelty in detector.novelties
        },
        steps=tuple(
            torch.from_numpy(recording.predicted.nonzero()[0]) for recording in result.recordings
        ),
    )


class _Noting(WrappedPolicy):
    """A policy that notes something for each observation whenever it predicts."""

    def __init__(
        self,
        view: PolicyView,
        note: Callable[[Observation, Tensor, Sequence[int] | None], Float[Tensor, "batch value"]],
    ) -> None:
        super().__init__(view)
        self.note = note
        self.notes: list[Tensor] = []

    def predict_chunk(
        self, observation: Observation, queries: Sequence[int] | None = None
    ) -> Float[Tensor, "batch query action"]:
        chunk = super().predict_chunk(observation, queries)
        self.notes.append(self.note(observation, chunk, queries).cpu())
        return chunk


def _change_from(
    view: PolicyView,
) -> Callable[[Observation, Tensor, Sequence[int] | None], Float[Tensor, "batch value"]]:
    """Note how far a chunk lies from another policy's, and in which direction."""

    def note(observation: Observation, chunk: Tensor, queries: Sequence[int] | None) -> Tensor:
        change = (chunk - view.predict_chunk(observation, queries)).double()
        length = change.norm(dim=-1).mean(1, keepdim=True)
        return torch.cat([length, change.mean(1)], dim=1)

    return note


def _no_change(
    observation: Observation, chunk: Tensor, queries: Sequence[int] | None
) -> Float[Tensor, "batch value"]:
    return chunk.new_zeros(len(chunk), 1 + chunk.shape[-1], dtype=torch.float64)


def _by_episode(
    notes: Sequence[Float[Tensor, "_ *value"]], result: RolloutResult, n_parallel: int
) -> list[Float[Tensor, "_ *value"]]:
    """Sort what was noted for groups of episodes by episode.

    A group predicts until its last episode ends; those that ended before stay in the batch, unseen.
    """
    counts = [int(recording.predicted.sum()) for recording in result.recordings]
    of_episodes: list[Tensor] = []
    start = 0
    for group in batched(counts, n_parallel):
        together = torch.stack(list(notes[start : start + max(group)]))
        start += max(group)
        of_episodes += [together[:count, row] for row, count in enumerate(group)]
    assert start == len(notes)
    return of_episodes


def _pose_parameters(task: Task) -> tuple[PoseParameter, ...]:
    env = task.make()
    try:
        if not isinstance(env, Scene):
            raise ValueError(
                f"task {task.name}: {type(env).__name__} is no Scene, so nobody knows what moved; "
                "implement envs.task.Scene"
            )
        return tuple(env.pose_parameters)
    finally:
        env.close()


def _values(
    result: RolloutResult,
    parameters: Sequence[PoseParameter],
    changes: Sequence[Float[Tensor, "_ value"]],
) -> dict[str, Float[np.ndarray, " episode"]]:
    """The columns of :class:`Variant`."""
    episodes = result.episodes
    values = {
        "success": np.array([float(episode.success[-1]) for episode in episodes]),
        f"max_{result.score_name}": np.array([episode.max_score for episode in episodes]),
        "n_steps": np.array([float(episode.n_steps) for episode in episodes]),
    }
    for owner in dict.fromkeys(parameter.owner for parameter in parameters):
        places = [each for each in parameters if each.owner == owner and each.unit != "deg"]
        if places:
            values[f"path_{owner}_{places[0].unit}"] = np.array(
                [
                    np.linalg.norm(
                        np.diff(np.stack([_course(recording, each) for each in places]), axis=1),
                        axis=0,
                    ).sum()
                    for recording in result.recordings
                ]
            )
    for parameter in parameters:
        courses = [_course(recording, parameter) for recording in result.recordings]
        values[f"net_{parameter.name}"] = np.array([each[-1] - each[0] for each in courses])
    means = torch.stack([change.mean(0) for change in changes]).numpy()
    values["action_change"] = means[:, 0]
    for dimension in range(means.shape[1] - 1):
        values[f"action_change_{dimension}"] = means[:, 1 + dimension]
    return values


def _course(recording: EpisodeRecording, parameter: PoseParameter) -> Float[np.ndarray, " frame"]:
    """A pose parameter over an episode, in its unit; angles go on beyond a full turn."""
    course = recording.simulator_states[:, parameter.index] / parameter.per_unit
    return np.unwrap(course, period=360.0) if parameter.unit == "deg" else course


def _paired(differences: Float[np.ndarray, " episode"]) -> Estimate:
    return Estimate(float(differences.mean()), *bootstrap_interval(differences))
