"""The transfer experiment at checkpoints: what is left of a policy on an arm it has never seen."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import override

from lightning.pytorch import LightningModule, Trainer

from callbacks.schedule import Diagnostic
from callbacks.views import policy_view
from envs.equivariance import equivariance_error, instants, redraw_distance
from envs.rollout import RolloutResult
from envs.task import Task
from envs.transfer import (
    Condition,
    act_on_arm,
    agreement,
    check_arms,
    comparisons,
    conditions,
    difference,
    mirrors_between,
)
from policies.atomic_files import write_atomically
from policies.ensembling import check_controller, controller_of
from policies.interface import Findings
from policies.json_files import json_text

N_MEASURED_FRAMES = 60
"""Instants behind the equivariance error."""


class Transfer(Diagnostic):
    """Let the policy act with the arm it was trained for and with others, from the same seeds.

    Args:
        task: With arms, e.g. ``envs.push_t.PushTTask``, showing what the policy sees.
        arms: The seen one first, then those to try.
        n_trials: Episodes of each arm; each unseen arm acts without and with the flip.
        first_seed: Trial i starts from seed ``first_seed + i``.
        n_action_steps: Steps of a chunk to execute before the next prediction; null for the
            policy's own.
        temporal_ensemble_coeff: Predict at every step and average overlapping chunks with
            this coefficient (0.01 in ACT) in place of the action queue; null for the queue.
        n_videos: Trials in the video, side by side; 0 for none.
        every_n_validations: Run at every n-th validation; a number that is never reached leaves
            the last validation of the run alone.
        at_start: Also measure before the first step, under the same names.
        strict: Let an error of this diagnostic stop the run.
        max_share: Share of the wall time that it may take; skipped where it would take more.
        name: Prefix of its numbers and folder of its files, for another way of acting in the same
            run, e.g. ``transfer_ensembled``; ``transfer`` when null.

    Raises:
        ValueError: If a number is out of range, the task has no such arms, or both ways of
            executing chunks are asked for.
    """

    def __init__(
        self,
        task: Task,
        arms: Sequence[int] = (0, 1),
        n_trials: int = 10,
        first_seed: int = 100_000,
        n_action_steps: int | None = None,
        temporal_ensemble_coeff: float | None = None,
        n_videos: int = 2,
        every_n_validations: int = 1,
        at_start: bool = False,
        strict: bool = False,
        max_share: float | None = 0.05,
        name: str | None = None,
    ):
        super().__init__(
            every_n_validations=every_n_validations,
            at_start=at_start,
            strict=strict,
            max_share=max_share,
            name=name,
        )
        check_controller(n_action_steps, temporal_ensemble_coeff)
        if n_trials < 2 or n_videos < 0:
            raise ValueError(f"n_trials {n_trials}, n_videos {n_videos}: give at least 2 and 0")
        self.task = task
        self.arm_task = check_arms(task, arms)
        self.arms = tuple(arms)
        self.seeds = range(first_seed, first_seed + n_trials)
        self.n_action_steps = n_action_steps
        self.temporal_ensemble_coeff = temporal_ensemble_coeff
        self.n_videos = n_videos

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a policy that the task does not fit, before training starts.

        Raises:
            TypeError: If the module trains no policy.
            ValueError: If the policy sees something else than the task shows.
        """
        theirs = policy_view(pl_module).data_schema
        if differences := theirs.differences(self.task.data_schema()):
            raise ValueError(
                f"{self.name}: task {self.task.name} does not fit the policy: "
                f"{'; '.join(differences)} (policy != task); give the callback's task the "
                "policy's image_size"
            )

    @override
    def diagnose(self, trainer: Trainer, module: LightningModule, folder: Path) -> Findings:
        """Act, compare, and film the first trials."""
        view, seen = policy_view(module), Condition(self.arms[0])
        arms = self.arm_task
        found = {
            condition: act_on_arm(
                view,
                arms,
                condition,
                seen.arm,
                self.seeds,
                controller_of(view, self.n_action_steps, self.temporal_ensemble_coeff),
                module.device,
            )
            for condition in conditions(self.arms, untrained=False)
        }
        scalars = {f"{self.name}/n_episodes": float(len(self.seeds))}
        for condition, result in found.items():
            scalars |= self._numbers(condition, result)
        batch = instants(view, arms.of_arm(seen.arm), found[seen].recordings, N_MEASURED_FRAMES).to(
            module.device
        )
        redrawn = redraw_distance(view, batch)
        if redrawn is not None:
            # A policy that draws noise is never 0 px from the mirrored action.
            scalars[f"{self.name}/redrawn_px"] = float(redrawn.median())
        document = {"numbers": scalars, "flip_check": {}, "differences": {}}
        for arm in self.arms[1:]:
            mirrors = mirrors_between(arms, seen.arm, arm)
            name = "equivariance" if len(self.arms) == 2 else f"arm{arm}_equivariance"
            error = equivariance_error(view, batch, mirrors)
            scalars[f"{self.name}/{name}_px"] = float(error.median())
            same = agreement(found[seen], found[Condition(arm, is_flipped=True)], mirrors)
            document["flip_check"][f"arm{arm}"] = asdict(same)
        for first, second in comparisons(self.arms, untrained=False):
            gap = difference(found[first], found[second])
            document["differences"][f"{first.name} - {second.name}"] = asdict(gap)
        document["episodes"] = {
            condition.name: result.to_dict() for condition, result in found.items()
        }
        write_atomically(folder / "transfer.json", json_text(document))
        videos = {}
        if self.n_videos:
            from rendering.video import Clip, write_clips

            clips = []
            for place in range(min(self.n_videos, len(self.seeds))):
                for condition, result in found.items():
                    recording = result.recordings[place]
                    captions = [f"{condition.name}: {text}" for text in recording.captions()]
                    clips.append(Clip(recording.frames(arms.of_arm(condition.arm)), captions))
            path = folder / "transfer.mp4"
            write_clips(path, clips, self.task.fps, columns=len(found))
            videos[f"{self.name}/video"] = str(path)
        return Findings(scalars=scalars, videos=videos)

    def _numbers(self, condition: Condition, result: RolloutResult) -> dict[str, float]:
        """Success and score of one condition, with their intervals."""
        summary = result.summary()
        return {
            f"{self.name}/{condition.name}/{name}{end}": summary[f"{name}{end}"]
            for name in ("success", f"mean_max_{result.score_name}")
            for end in ("", "_low", "_high")
        }
