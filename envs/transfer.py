"""The transfer experiment: a policy of one arm acts with another, with and without a mirror.

Every condition starts from the same seeds, and an arm's start is the exact mirror image of the same
seed's start of every other arm: trials are paired, and what is hard about a start cancels. With the
flip a policy sees its own arm's world, by construction; that it then does as well there is a check
of the machinery and no finding. What is measured is how much is lost without it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from envs.rollout import Controller, RolloutResult, bootstrap_interval, rollout
from envs.task import ArmTask, Task
from features.resampling import Estimate, PairedRates, paired_rates
from policies.act import ACTPolicy
from policies.interface import PolicyView
from policies.mirror import Mirror, MirroredPolicy

EQUAL_PX = 0.01
"""Actions that lie no further apart are the same: float32 rounds a place on the board to 3e-5 px,
and contacts of the simulation enlarge that."""
Verdict = Literal["supported", "not supported", "undecided"]


@dataclass(frozen=True)
class Condition:
    """Which arm acts, and through what."""

    arm: int
    is_flipped: bool = False
    """Whether the policy acts through the mirror between this arm and its own."""
    is_trained: bool = True
    """False for the same architecture with fresh weights."""

    @property
    def name(self) -> str:
        """Part of names of numbers: ``arm1_flipped``."""
        ending = "_flipped" if self.is_flipped else ""
        return f"arm{self.arm}{ending}" if self.is_trained else f"arm{self.arm}_untrained"

    @property
    def label(self) -> str:
        """For people: ``arm 1, with the flip``."""
        if not self.is_trained:
            return f"arm {self.arm}, untrained"
        return f"arm {self.arm}, with the flip" if self.is_flipped else f"arm {self.arm}"


def conditions(arms: Sequence[int], untrained: bool) -> tuple[Condition, ...]:
    """All that is tried: the seen arm, the others without and with the flip, the untrained level.

    Args:
        arms: The seen one first.
        untrained: Whether fresh weights act with every arm, too.
    """
    seen, *others = arms
    found = [Condition(seen)]
    for arm in others:
        found += [Condition(arm), Condition(arm, is_flipped=True)]
    if untrained:
        found += [Condition(arm, is_trained=False) for arm in arms]
    return tuple(found)


def comparisons(arms: Sequence[int], untrained: bool) -> tuple[tuple[Condition, Condition], ...]:
    """Pairs of conditions whose difference answers a question, first minus second.

    Args:
        arms: The seen one first.
        untrained: Whether fresh weights acted, too.
    """
    seen, *others = (Condition(arm) for arm in arms)
    pairs = []
    for other in others:
        flipped = Condition(other.arm, is_flipped=True)
        pairs += [(other, seen), (flipped, other), (flipped, seen)]
    if untrained:
        for condition in conditions(arms, untrained=False):
            pairs.append((condition, Condition(condition.arm, is_trained=False)))
    return tuple(pairs)


def check_arms(task: Task, arms: Sequence[int]) -> ArmTask:
    """Refuse what cannot be transferred between.

    Args:
        task: With arms.
        arms: Numbers, the seen one first.

    Returns:
        The task.

    Raises:
        ValueError: If the task has no arms, there is no such arm, one is named twice, or there are
            fewer than two.
    """
    if not isinstance(task, ArmTask):
        raise ValueError(
            f"task {task.name}: {type(task).__name__} has no arms; implement envs.task.ArmTask "
            "(n_arms, of_arm, arm_mirror), or give a task that does, e.g. envs.push_t.PushTTask"
        )
    unknown = [arm for arm in arms if not 0 <= arm < task.n_arms]
    if unknown:
        raise ValueError(f"arms {unknown}: {task.name} has arms 0 to {task.n_arms - 1}")
    if len(set(arms)) < len(arms) or len(arms) < 2:
        raise ValueError(
            f"arms {list(arms)}: give the seen one and at least one other, each of them once"
        )
    return task


def mirrors_between(task: ArmTask, seen: int, other: int) -> tuple[Mirror, ...]:
    """What turns the world of another arm into that of the seen one, one mirror after the other.

    Args:
        task: With arms.
        seen: Arm of the policy.
        other: Arm that acts.
    """
    if seen == other:
        return ()
    found = (task.arm_mirror(other), task.arm_mirror(seen))
    return tuple(mirror for mirror in found if mirror is not None)


def through_mirrors(view: PolicyView, mirrors: Sequence[Mirror]) -> PolicyView:
    """Let a policy act behind mirrors.

    Args:
        view: Of the seen arm.
        mirrors: From the world that it acts in to its own.
    """
    for mirror in reversed(mirrors):
        view = MirroredPolicy(view, mirror)
    return view


def untrained_copy(policy: ACTPolicy, seed: int = 0) -> ACTPolicy:
    """Make the same architecture with fresh weights and the same statistics of the data.

    Args:
        policy: Stays as it is.
        seed: Of the weights; torch's own random numbers go on as if nobody had asked.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Fresh means fresh: no backbone that has seen other pictures.
        fresh = ACTPolicy(**{**policy.hyper_parameters, "backbone_weights": None})
    fresh.normaliser.load_state_dict(policy.normaliser.state_dict())
    return fresh.to(next(policy.parameters())).eval()


def act_on_arm(
    view: PolicyView,
    task: ArmTask,
    condition: Condition,
    seen: int,
    seeds: Sequence[int],
    controller: Controller,
    device: torch.device | str = "cpu",
    n_parallel: int = 25,
    progress: bool = False,
) -> RolloutResult:
    """Let a policy act under one condition; every episode is recorded.

    Args:
        view: Of the seen arm, or its untrained copy, in eval mode on ``device``.
        task: With arms.
        condition: Which arm, with or without the flip.
        seen: Arm that the policy was made for.
        seeds: Of the starts, the same for all conditions.
        controller: What becomes of chunks.
        device: Where the policy lives.
        n_parallel: Episodes that advance together.
        progress: Show a progress bar.

    Raises:
        RolloutError: As :func:`envs.rollout.rollout`.
    """
    mirrors = mirrors_between(task, seen, condition.arm) if condition.is_flipped else ()
    return rollout(
        through_mirrors(view, mirrors),
        task.of_arm(condition.arm),
        seeds,
        controller,
        device,
        n_parallel,
        record=len(seeds),
        progress=progress,
    )


@dataclass(frozen=True)
class Difference:
    """What one condition does otherwise than another, paired by seed."""

    success: tuple[PairedRates, ...]
    """For each threshold of the task, in its order."""
    mean_max_score: Estimate
    """First minus second, with a paired bootstrap interval over seeds."""


def difference(first: RolloutResult, second: RolloutResult) -> Difference:
    """Compare two conditions, first minus second.

    Raises:
        ValueError: If they did not start from the same seeds, or thresholds differ.
    """
    pairs = list(zip(first.episodes, second.episodes, strict=False))
    is_paired = len(first.episodes) == len(second.episodes) and all(
        one.seed == other.seed for one, other in pairs
    )
    if not is_paired or first.success_thresholds != second.success_thresholds:
        raise ValueError(
            f"{len(first.episodes)} and {len(second.episodes)} episodes: give results from the "
            "same seeds in the same order, with the same thresholds"
        )
    rates = tuple(
        paired_rates(
            torch.tensor([one.success[place] for one, _ in pairs]),
            torch.tensor([other.success[place] for _, other in pairs]),
        )
        for place in range(len(first.success_thresholds))
    )
    gains = np.array([one.max_score - other.max_score for one, other in pairs])
    return Difference(rates, Estimate(float(gains.mean()), *bootstrap_interval(gains)))


def verdict(share: Estimate, threshold: float) -> Verdict:
    """Hold a share of successes against the one that was asked for.

    Args:
        share: With its interval.
        threshold: Share that supports the hypothesis.

    Returns:
        ``undecided`` where the interval holds shares on both sides.
    """
    if share.low >= threshold:
        return "supported"
    return "not supported" if share.high < threshold else "undecided"


@dataclass(frozen=True)
class Agreement:
    """Whether a policy behind mirrors does, step for step, what it does with its own arm."""

    n_episodes: int
    n_equal: int
    """Episodes as long, with actions at most :data:`EQUAL_PX` apart at every step."""
    n_equal_outcomes: int
    """Episodes with the same successes."""
    largest_px: float
    """Largest distance of two actions of the same step, over all episodes."""


def agreement(seen: RolloutResult, flipped: RolloutResult, mirrors: Sequence[Mirror]) -> Agreement:
    """Compare recorded actions of the seen arm with those of another behind mirrors.

    Args:
        seen: With recordings of every episode.
        flipped: From the same seeds.
        mirrors: From the other arm's world to that of the seen one.
    """
    n_equal, largest_px = 0, 0.0
    for one, other in zip(seen.recordings, flipped.recordings, strict=True):
        actions = torch.from_numpy(other.actions)
        for mirror in mirrors:
            actions = mirror.vectors(actions)
        together = min(len(one.actions), len(actions))
        apart_px = _point_distances(torch.from_numpy(one.actions)[:together], actions[:together])
        largest_px = max(largest_px, float(apart_px.max()))
        n_equal += len(one.actions) == len(actions) and bool((apart_px <= EQUAL_PX).all())
    return Agreement(
        n_episodes=len(seen.episodes),
        n_equal=n_equal,
        n_equal_outcomes=sum(
            one.success == other.success
            for one, other in zip(seen.episodes, flipped.episodes, strict=True)
        ),
        largest_px=largest_px,
    )


def _point_distances(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).norm(dim=-1)
