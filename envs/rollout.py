"""Let a policy act in its task, many episodes in lockstep, and say how well it did.

Episodes of a group advance together in one process: one batched prediction for all of them, and
pictures are rendered only when the policy is about to look. Every episode depends on its own seed
alone, so the grouping changes nothing (as far as the policy's answer to one observation does not
depend on the rest of its batch: floating-point kernels may differ in the last bit).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import batched
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from envs.replay import replay
from envs.task import Environment, EnvironmentObservation, Task
from features.resampling import wilson_estimate
from policies.interface import Observation, PolicyView

BOOTSTRAP_RESAMPLES = 2000


class RolloutError(ValueError):
    """A policy and a task that do not fit, or a policy that gives impossible actions."""


@runtime_checkable
class Controller(Protocol):
    """Turns predicted chunks into actions: a queue, a temporal ensemble, ..."""

    def reset(self, n_envs: int) -> None:
        """Begin new episodes, as many as the batch is long."""
        ...

    def wants_prediction(self) -> bool:
        """Whether the coming step needs a fresh chunk."""
        ...

    def steps_used(self) -> int | None:
        """How many steps of a fresh chunk are ever looked at; None for all of them."""
        ...

    def step(
        self, chunk: Float[Tensor, "batch chunk action"] | None
    ) -> Float[Tensor, "batch action"]:
        """Return the actions to execute now, in data units; ``chunk`` exactly when wanted."""
        ...


@dataclass(frozen=True)
class EpisodeResult:
    """How one episode went."""

    seed: int
    n_steps: int
    """Control steps executed."""
    max_score: float
    """Best score after any step."""
    final_score: float
    """Score after the last step."""
    max_reward: float
    """Best reward after any step."""
    sum_reward: float
    success: tuple[bool, ...]
    """Per threshold of the task, in its order."""
    terminated: bool
    """Whether the benchmark ended the episode, before the step limit did."""
    n_clipped_steps: int
    """Steps whose action lay outside the task's bounds."""


@dataclass(frozen=True)
class EpisodeRecording:
    """What happened in one episode: enough to draw it again at any size."""

    seed: int
    simulator_states: Float[np.ndarray, "frame simulator"]
    """Before the first action and after every action: one more than actions."""
    actions: Float[np.ndarray, "step action"]
    """As executed."""
    scores: Float[np.ndarray, " step"]
    """After each action."""
    score_name: str
    predicted: Bool[np.ndarray, " step"]
    """Whether the policy was asked for a fresh chunk at this step."""
    observations: tuple[EnvironmentObservation, ...] | None = field(default=None, repr=False)
    """Before each action, where every step was to be observed."""

    def frames(self, task: Task, size_px: int = 288) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """Draw the start and what each action led to, with the action whose turn it is."""
        targets = np.concatenate([self.actions, self.actions[-1:]])
        return replay(task, self.simulator_states, targets, size_px)

    def captions(self) -> list[str]:
        """One line per frame: seed, step, score and best score so far."""
        best = np.maximum.accumulate(self.scores)
        start = f"seed {self.seed}  step 0"
        return [start] + [
            f"seed {self.seed}  step {step}  {self.score_name} {score:.2f}  best {top:.2f}"
            for step, (score, top) in enumerate(zip(self.scores, best, strict=True), start=1)
        ]


@dataclass(frozen=True)
class RolloutResult:
    """How a policy did over many episodes."""

    task_name: str
    score_name: str
    reward_name: str
    success_thresholds: tuple[float, ...]
    episodes: tuple[EpisodeResult, ...]
    """In the order of the seeds."""
    recordings: tuple[EpisodeRecording, ...] = field(default=(), repr=False)
    """Of the first episodes."""

    def summary(self) -> dict[str, float]:
        """Means with 95 % intervals: Wilson's for rates, percentile bootstrap for scores.

        ``success`` is the rate at the benchmark's own threshold, the last one; every interval is
        ``<name>_low`` and ``<name>_high``.
        """
        episodes = self.episodes
        values: dict[str, float] = {"n_episodes": float(len(episodes))}

        def add(name: str, mean: float, interval: tuple[float, float]) -> None:
            values[name] = mean
            values[f"{name}_low"], values[f"{name}_high"] = interval

        for index, threshold in enumerate(self.success_thresholds):
            solved = sum(episode.success[index] for episode in episodes)
            interval = wilson_interval(solved, len(episodes))
            add(f"success_{threshold:.2f}", solved / len(episodes), interval)
            if index == len(self.success_thresholds) - 1:
                add("success", solved / len(episodes), interval)
        for name, numbers in (
            (f"mean_max_{self.score_name}", [episode.max_score for episode in episodes]),
            (f"mean_max_{self.reward_name}", [episode.max_reward for episode in episodes]),
        ):
            add(name, float(np.mean(numbers)), bootstrap_interval(np.array(numbers)))
        n_steps = sum(episode.n_steps for episode in episodes)
        values["mean_final_" + self.score_name] = float(
            np.mean([episode.final_score for episode in episodes])
        )
        values["mean_sum_reward"] = float(np.mean([episode.sum_reward for episode in episodes]))
        values["mean_n_steps"] = n_steps / len(episodes)
        values["clipped_share"] = sum(episode.n_clipped_steps for episode in episodes) / n_steps
        return values

    def to_dict(self) -> dict:
        """Plain values for JSON: the summary and every episode, without recordings."""
        return {
            "task": self.task_name,
            "score_name": self.score_name,
            "reward_name": self.reward_name,
            "success_thresholds": list(self.success_thresholds),
            "summary": self.summary(),
            "episodes": [asdict(episode) for episode in self.episodes],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RolloutResult":
        """Rebuild what :meth:`to_dict` gave, as it came back from JSON.

        Raises:
            ValueError: If a value is missing or no such value.
        """
        try:
            episodes = [
                EpisodeResult(**{**episode, "success": tuple(episode["success"])})
                for episode in values["episodes"]
            ]
            return cls(
                task_name=values["task"],
                score_name=values["score_name"],
                reward_name=values["reward_name"],
                success_thresholds=tuple(values["success_thresholds"]),
                episodes=tuple(episodes),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"no result of a rollout ({error!r})") from error


def joined(parts: Sequence[RolloutResult]) -> RolloutResult:
    """Put results of one policy in one task together, episodes in the order of the parts.

    Raises:
        ValueError: If there is none, tasks differ, or an episode was played twice.
    """
    if not parts:
        raise ValueError("there are no results to join")
    first = parts[0]
    for part in parts[1:]:
        ours = replace(first, episodes=(), recordings=())
        theirs = replace(part, episodes=(), recordings=())
        if ours != theirs:
            raise ValueError(
                f"results of different tasks: {ours.task_name} {ours.success_thresholds} and "
                f"{theirs.task_name} {theirs.success_thresholds}"
            )
    episodes = tuple(episode for part in parts for episode in part.episodes)
    seeds = [episode.seed for episode in episodes]
    if twice := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
        raise ValueError(f"episodes of seeds {twice[:8]} are there twice: name each shard once")
    return replace(
        first,
        episodes=episodes,
        recordings=tuple(recording for part in parts for recording in part.recordings),
    )


def wilson_interval(n_successes: int, n_trials: int) -> tuple[float, float]:
    """95 % score interval of a rate (Wilson 1927): honest at 0 and 1 and for few trials."""
    estimate = wilson_estimate(n_successes, n_trials)
    return estimate.low, estimate.high


def bootstrap_interval(values: Float[np.ndarray, " episode"]) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean; the same values give the same interval."""
    generator = np.random.default_rng(0)
    picks = generator.integers(len(values), size=(BOOTSTRAP_RESAMPLES, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


class _Episode:
    """One environment of a group, and what it has gone through so far."""

    def __init__(self, env: Environment, seed: int) -> None:
        env.reset(seed)
        self.env = env
        self.seed = seed
        self.scores: list[float] = []
        self.rewards: list[float] = []
        self.states: list[np.ndarray] = []
        self.actions: list[np.ndarray] = []
        self.predicted: list[bool] = []
        self.observations: list[EnvironmentObservation] = []
        self.n_clipped_steps = 0
        self.terminated = False
        self.history: list[EnvironmentObservation] = []

    def look(self, n_remembered: int, kept: bool) -> None:
        """Take one more observation.

        Args:
            n_remembered: Length of the policy's history, which at the start the first observation
                fills; 0 when the policy does not look.
            kept: Whether it goes into the recording.
        """
        observation = self.env.observe()
        if kept:
            self.observations.append(observation)
        if n_remembered:
            past = self.history or [observation] * n_remembered
            self.history = [*past, observation][-n_remembered:]

    def advance(
        self, action: Float[np.ndarray, " action"], task: Task, recorded: bool, predicted: bool
    ) -> None:
        if not np.isfinite(action).all():
            raise RolloutError(
                f"episode of seed {self.seed}, step {len(self.scores)}: action "
                f"{action.tolist()} is not finite; look at the policy's weights and statistics"
            )
        clipped = task.clip_actions(action)
        self.n_clipped_steps += int((clipped != action).any())
        if recorded and not self.states:
            self.states.append(self.env.state())
        outcome = self.env.step(clipped)
        if recorded:
            self.states.append(self.env.state())
            self.actions.append(clipped)
            self.predicted.append(predicted)
        # Plain numbers, for JSON: a simulator in numpy gives numpy's.
        self.scores.append(float(outcome.score))
        self.rewards.append(float(outcome.reward))
        self.terminated = bool(outcome.terminated)

    def result(self, task: Task) -> EpisodeResult:
        best = max(self.scores)
        return EpisodeResult(
            seed=self.seed,
            n_steps=len(self.scores),
            max_score=best,
            final_score=self.scores[-1],
            max_reward=max(self.rewards),
            sum_reward=sum(self.rewards),
            success=tuple(bool(task.is_success(best, limit)) for limit in task.success_thresholds),
            terminated=self.terminated,
            n_clipped_steps=self.n_clipped_steps,
        )

    def recording(self, task: Task) -> EpisodeRecording:
        return EpisodeRecording(
            seed=self.seed,
            simulator_states=np.stack(self.states),
            actions=np.stack(self.actions),
            scores=np.array(self.scores),
            score_name=task.score_name,
            predicted=np.array(self.predicted),
            observations=tuple(self.observations) or None,
        )


def rollout(
    policy: PolicyView,
    task: Task,
    seeds: Sequence[int],
    controller: Controller,
    device: torch.device | str = "cpu",
    n_parallel: int = 25,
    record: int = 0,
    progress: bool = False,
    observe_every_step: bool = False,
) -> RolloutResult:
    """Let ``policy`` act in ``task``, one episode per seed.

    Args:
        policy: In evaluation mode, on ``device``.
        task: Where it acts and how that is scored.
        seeds: Of the episodes' starts.
        controller: What becomes of predicted chunks; reset for every group of episodes.
        device: Where the policy lives.
        n_parallel: Episodes that advance together.
        record: First episodes to keep for drawing.
        progress: Show a progress bar.
        observe_every_step: Keep in the recordings what was to be seen before every action, also
            where the policy did not look; a picture each, and not one action changes.

    Raises:
        RolloutError: When policy and task do not fit, or an action is not finite.
        ValueError: When there are no seeds, or ``n_parallel`` is not positive.
    """
    from rich.progress import Progress

    if not seeds or n_parallel < 1:
        raise ValueError(f"{len(seeds)} seeds, n_parallel {n_parallel}: give at least one of each")
    check_fit(policy, task)
    results: list[EpisodeResult] = []
    recordings: list[EpisodeRecording] = []
    envs: list[Environment] = []
    try:
        with Progress(disable=not progress) as bar, torch.no_grad():
            shown = bar.add_task("Rollouts", total=len(seeds))
            for group in batched(seeds, n_parallel):
                envs.extend(task.make() for _ in range(len(group) - len(envs)))
                n_recorded = max(record - len(results), 0)
                episodes = [_Episode(env, seed) for env, seed in zip(envs, group, strict=False)]
                _play(policy, task, episodes, controller, device, n_recorded, observe_every_step)
                results.extend(episode.result(task) for episode in episodes)
                recordings.extend(episode.recording(task) for episode in episodes[:n_recorded])
                bar.advance(shown, len(group))
    finally:
        for env in envs:
            env.close()
    return RolloutResult(
        task_name=task.name,
        score_name=task.score_name,
        reward_name=task.reward_name,
        success_thresholds=tuple(task.success_thresholds),
        episodes=tuple(results),
        recordings=tuple(recordings),
    )


def _play(
    policy: PolicyView,
    task: Task,
    episodes: list[_Episode],
    controller: Controller,
    device: torch.device | str,
    n_recorded: int,
    observe_every_step: bool,
) -> None:
    """Run one group to its end; who has finished stays in the batch, unseen and unmoved."""
    controller.reset(len(episodes))
    steps_used = controller.steps_used()
    queries = None if steps_used is None else range(min(steps_used, policy.chunk_size))
    for _ in range(task.max_steps):
        wanted = controller.wants_prediction()
        n_remembered = policy.n_obs_steps if wanted or policy.n_obs_steps > 1 else 0
        for index, episode in enumerate(episodes):
            kept = observe_every_step and index < n_recorded
            if (n_remembered or kept) and not episode.terminated:
                episode.look(n_remembered, kept)
        chunk = None
        if wanted:
            # In float64 the average of overlapping chunks does not depend on its bookkeeping.
            observation = _batch(policy, [episode.history for episode in episodes]).to(device)
            chunk = policy.predict_chunk(observation, queries).double()
        actions = controller.step(chunk).double().cpu().numpy()
        for index, (episode, action) in enumerate(zip(episodes, actions, strict=True)):
            if not episode.terminated:
                episode.advance(action, task, recorded=index < n_recorded, predicted=wanted)
        if all(episode.terminated for episode in episodes):
            return


def episode_observation(
    policy: PolicyView, observations: Sequence[EnvironmentObservation]
) -> Observation:
    """What a policy sees at every step of one episode, had it looked at every step.

    Args:
        policy: Whose cameras, columns and history to stack.
        observations: Of consecutive steps from the start, as an :class:`EpisodeRecording` keeps
            them; any steps do for a policy without a history.

    Raises:
        ValueError: If there are no observations.
    """
    if not observations:
        raise ValueError("there are no observations: record with observe_every_step")
    ages = range(policy.n_obs_steps - 1, -1, -1)
    return _batch(
        policy,
        [[observations[max(step - age, 0)] for age in ages] for step in range(len(observations))],
    )


def _batch(policy: PolicyView, histories: list[list[EnvironmentObservation]]) -> Observation:
    """Stack what the policy asks for: its cameras in its order, pictures as uint8."""
    schema = policy.data_schema
    one_step = policy.n_obs_steps == 1

    def stack(values: list[list[np.ndarray]]) -> Tensor:
        array = np.stack([np.stack(history) for history in values])
        return torch.from_numpy(array[:, 0] if one_step else array)

    return Observation(
        images={
            name: rearrange(
                stack([[seen["images"][name] for seen in history] for history in histories]),
                "... height width rgb -> ... rgb height width",
            )
            for name in schema.cameras
        },
        state=stack([[seen["state"] for seen in history] for history in histories]).float()
        if schema.state_dim
        else None,
        environment_state=stack(
            [[seen["environment_state"] for seen in history] for history in histories]
        ).float()
        if schema.environment_state_dim
        else None,
    )


def check_fit(policy: PolicyView, task: Task) -> None:
    """Refuse a task that lacks a column the policy needs, or has it in another size.

    Raises:
        RolloutError: When they do not fit.
    """
    theirs, ours = policy.data_schema, task.data_schema()
    problems = []
    for name, size in theirs.cameras.items():
        if name not in ours.cameras:
            problems.append(f"camera {name!r} is missing (there are {list(ours.cameras)})")
        elif tuple(size) != tuple(ours.cameras[name]):
            problems.append(f"camera {name!r} is {ours.cameras[name]} px, not {tuple(size)}")
    if theirs.state_dim not in (0, ours.state_dim):
        problems.append(f"the state has {ours.state_dim} dimensions, not {theirs.state_dim}")
    if theirs.action_dim != ours.action_dim:
        problems.append(f"actions have {ours.action_dim} dimensions, not {theirs.action_dim}")
    if theirs.environment_state_dim:
        env = task.make()
        env.reset(0)
        offered = len(env.observe()["environment_state"])
        env.close()
        if offered != theirs.environment_state_dim:
            problems.append(
                f"the environment state has {offered} dimensions, "
                f"not {theirs.environment_state_dim}"
            )
    if problems:
        raise RolloutError(
            f"the policy does not fit task {task.name}: {'; '.join(problems)}; "
            "give the task the policy's image_size, or train a policy for this task"
        )
