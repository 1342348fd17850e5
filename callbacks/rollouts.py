"""Let the policy act at checkpoints: success, score with intervals, and a video."""

from pathlib import Path
from typing import override

from lightning.pytorch import LightningModule, Trainer

from callbacks.schedule import Diagnostic
from callbacks.views import policy_view
from envs.task import Task
from policies.atomic_files import write_atomically
from policies.ensembling import ActionQueue, TemporalEnsembler, check_controller, controller_of
from policies.interface import Findings, PolicyView
from policies.json_files import json_text


class Rollouts(Diagnostic):
    """Roll the policy out on fixed seeds, the same at every checkpoint.

    Args:
        task: What to solve, e.g. ``envs.push_t.PushTTask``.
        n_episodes: Episodes per checkpoint.
        first_seed: Episode i starts from seed ``first_seed + i``.
        n_action_steps: Steps of a chunk to execute before the next prediction; null for the
            policy's own.
        temporal_ensemble_coeff: Predict at every step and average overlapping chunks with
            this coefficient (0.01 in ACT) in place of the action queue; null for the queue.
        n_videos: Episodes shown in the video, from the first seed on.
        every_n_validations: Run at every n-th validation.
        at_start: Also measure the untrained policy, under ``untrained/``.
        strict: Let an error of this diagnostic stop the run.
        name: Prefix of its numbers and folder of its files, for another way of acting in the same
            run, e.g. ``rollout_ensembled``; ``rollout`` when null.
    """

    def __init__(
        self,
        task: Task,
        n_episodes: int = 20,
        first_seed: int = 100_000,
        n_action_steps: int | None = None,
        temporal_ensemble_coeff: float | None = None,
        n_videos: int = 6,
        every_n_validations: int = 1,
        at_start: bool = False,
        strict: bool = False,
        name: str | None = None,
    ):
        super().__init__(
            every_n_validations=every_n_validations, at_start=at_start, strict=strict, name=name
        )
        self.prefix = name or "rollout"
        self.untrained_prefix = f"untrained_{name}" if name else "untrained"
        check_controller(n_action_steps, temporal_ensemble_coeff)
        self.task = task
        self.n_episodes = n_episodes
        self.first_seed = first_seed
        self.n_action_steps = n_action_steps
        self.temporal_ensemble_coeff = temporal_ensemble_coeff
        self.n_videos = n_videos

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a task that does not fit the policy before anything is trained.

        Raises:
            TypeError: If the module trains no policy.
            RolloutError: If the task does not show what the policy sees, or takes other actions.
        """
        from envs.rollout import check_fit

        check_fit(policy_view(pl_module), self.task)

    def diagnose(self, trainer: Trainer, module: LightningModule, folder: Path) -> Findings:
        """Roll out, write the episodes as JSON and the first of them as a video."""
        from envs.rollout import rollout
        from rendering.video import Clip, write_clips

        view = policy_view(module)
        untrained = trainer.state.fn == "fit" and trainer.global_step == 0
        result = rollout(
            view,
            self.task,
            seeds=range(self.first_seed, self.first_seed + self.n_episodes),
            controller=self.controller(view),
            device=module.device,
            record=0 if untrained else self.n_videos,
        )
        prefix = self.untrained_prefix if untrained else self.prefix
        scalars = {f"{prefix}/{name}": value for name, value in result.summary().items()}
        write_atomically(folder / "episodes.json", json_text(result.to_dict()))
        if not result.recordings:
            return Findings(scalars=scalars)
        clips = [
            Clip(recording.frames(self.task), recording.captions())
            for recording in result.recordings
        ]
        video = write_clips(folder / "rollouts.mp4", clips, self.task.fps, columns=3)
        return Findings(scalars=scalars, videos={f"{self.prefix}/video": str(video)})

    def controller(self, view: PolicyView) -> ActionQueue | TemporalEnsembler:
        """What turns this policy's chunks into actions."""
        return controller_of(view, self.n_action_steps, self.temporal_ensemble_coeff)
