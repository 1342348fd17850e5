"""What an autoencoder has learnt at checkpoints: fidelity, behaviour, features on their frames."""

from pathlib import Path
from typing import override

import torch
from einops import rearrange
from lightning.pytorch import LightningModule, Trainer

from autoencoders.metrics import density_histogram
from callbacks.feature_findings import (
    draw_features,
    find_concepts,
    spread_frames,
    states_of,
)
from callbacks.schedule import Diagnostic, is_last_validation
from datamodules.activations import ActivationDataModule
from envs.concepts import known_concepts
from envs.rollout import rollout
from envs.task import Task
from features.effects import behaviour_recovered
from features.record import record_features
from features.splice import WholeFrames, reconstruction_edit, splice
from features.taps import TokenPosition
from lightning_modules.sae import SAEModule
from policies.atomic_files import write_atomically
from policies.ensembling import ActionQueue
from policies.interface import Findings, PolicyView, in_unit
from policies.json_files import json_text
from rendering.charts import density_chart
from rendering.picture import write_png

PREFIX = "features"


class Features(Diagnostic):
    """Look at an autoencoder while it is trained, on episodes that it has not seen.

    Beside the fidelity that training logs: how latents share the work, whether the policy still
    behaves when it acts on reconstructions, and which frames the features stand for.

    Args:
        task: Simulator whose concepts features are held against, and that the policy acts in; none
            when null.
        n_val_episodes: Validation episodes to look at, at most.
        n_behaviour_frames: Frames of them on which the policy acts on reconstructions.
        n_rollouts: Episodes that the policy acts in, with and without reconstructions, from equal
            seeds, at the end of training; 0 for none.
        first_seed: Rollout i starts from ``first_seed + i``.
        n_features_shown: Rows of the picture.
        every_n_validations: Run at every n-th validation.
        at_start: Also look at the untrained autoencoder.
        strict: Let an error of this diagnostic stop the run.
        max_share: Share of the wall time that it may take; skipped where it would take more.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        task: Task | None = None,
        n_val_episodes: int = 20,
        n_behaviour_frames: int = 512,
        n_rollouts: int = 0,
        first_seed: int = 100_000,
        n_features_shown: int = 12,
        every_n_validations: int = 1,
        at_start: bool = False,
        strict: bool = False,
        max_share: float | None = None,
    ):
        super().__init__(
            every_n_validations=every_n_validations,
            at_start=at_start,
            strict=strict,
            max_share=max_share,
        )
        for name, value, least in (
            ("n_val_episodes", n_val_episodes, 1),
            ("n_behaviour_frames", n_behaviour_frames, 1),
            ("n_rollouts", n_rollouts, 0),
            ("first_seed", first_seed, 0),
            ("n_features_shown", n_features_shown, 1),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        if n_rollouts and task is None:
            raise ValueError(f"n_rollouts is {n_rollouts}, without a task to act in: set task")
        self.task = task
        self.n_val_episodes = n_val_episodes
        self.n_behaviour_frames = n_behaviour_frames
        self.n_rollouts = n_rollouts
        self.first_seed = first_seed
        self.n_features_shown = n_features_shown

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be looked at, before training.

        Raises:
            TypeError: If the run trains no autoencoder on activations.
            ValueError: If vectors are parts of frames, which cannot be put back into the policy.
        """
        _, data = _parts(trainer, pl_module)
        sampling = data.token_sampler.method
        if sampling == "block_average" or (data.per == "frame" and sampling != "all"):
            raise ValueError(
                f"per: {data.per} with token_sampling: {sampling}: reconstructions of such vectors "
                "cannot be put back into the policy: set token_sampling to all, or leave "
                "callbacks.features.Features out"
            )
        if data.device not in ("auto", str(pl_module.device), pl_module.device.type):
            raise ValueError(
                f"the policy is on {data.device}, the autoencoder on {pl_module.device}, and the "
                "one acts on what the other reconstructs: set data.init_args.device to auto"
            )
        if self.n_rollouts:
            self._acting(data.policy)

    @override
    def diagnose(self, trainer: Trainer, module: LightningModule, folder: Path) -> Findings:
        """Measure and draw."""
        sae_module, data = _parts(trainer, module)
        sae, view, device = sae_module.sae, data.policy, module.device
        episodes = data.split["val"][: self.n_val_episodes]
        frames = data.frames(episodes)
        activations = frames.activations.float().to(device)
        metadata = {"layer": data.layer, "step": trainer.global_step}
        vectors, positions = activations, data.tokens.positions
        if data.per == "frame":
            vectors = rearrange(activations, "frame token dim -> frame 1 (token dim)")
            positions = (TokenPosition("frame"),)
        index = frames.episode_index, frames.frame_index
        record = record_features(sae, [(vectors, *index)], positions, metadata)
        reconstruct = sae if data.per == "token" else WholeFrames(sae)

        few = spread_frames(data.demonstrations, episodes, self.n_behaviour_frames).to(device)
        mean = activations.mean((0, 1))
        behaviour = behaviour_recovered(view, data.layer, reconstruct, mean, few)
        scalars: dict[str, float] = {}
        for number, estimate in behaviour.summary().items():
            name = in_unit(number, data.loaded_policy.action_unit)
            scalars[f"{PREFIX}/{name}"] = estimate.value
            if len(episodes) > 1:
                scalars[f"{PREFIX}/{name}_low"] = estimate.low
                scalars[f"{PREFIX}/{name}_high"] = estimate.high
        if self.n_rollouts and is_last_validation(trainer):
            spliced = splice(view, data.layer, reconstruction_edit(reconstruct))
            scalars |= self._rollouts(view, "clean", device) | self._rollouts(
                spliced, "spliced", device
            )
        titles: dict[int, str] = {}
        concepts = known_concepts(self.task, states_of(data.demonstrations, episodes), *index)
        if concepts is not None and record.n_episodes > 1:
            found = find_concepts(record, concepts)
            titles = found.titles
            scalars |= {f"{PREFIX}/{key}": value for key, value in found.scalars.items()}
        write_atomically(folder / "metrics.json", json_text(scalars))
        quality = sae_module.quality
        assert quality is not None
        edges, counts = density_histogram(quality.density)
        title = f"step {trainer.global_step}: {quality.dead_fraction:.1%} of the latents never fire"
        pictures = {"density": density_chart(edges, counts, title)}
        strip = draw_features(
            record,
            data.demonstrations,
            view,
            titles,
            self.n_features_shown,
            f"Step {trainer.global_step}. Each row: the frames of validation episodes where a "
            "feature is strongest, with its activation; colours from 0 to the row's largest. "
            "Concepts: chosen on every other episode, measured on the rest.",
        )
        if strip is not None:
            pictures["strip"] = strip
        images = {
            f"{PREFIX}/{name}": str(write_png(folder / f"{name}.png", picture))
            for name, picture in pictures.items()
        }
        return Findings(
            scalars=scalars,
            images=images,
            histograms={f"{PREFIX}/log10_density": (edges, counts)},
        )

    def _rollouts(self, view: PolicyView, name: str, device: torch.device) -> dict[str, float]:
        """Success and score of a policy, whether it acts on reconstructions or not."""
        result = rollout(
            view,
            self._acting(view),
            seeds=range(self.first_seed, self.first_seed + self.n_rollouts),
            controller=ActionQueue(view.n_action_steps),
            device=device,
        )
        return {f"{PREFIX}/rollout_{name}_{key}": value for key, value in result.summary().items()}

    def _acting(self, view: PolicyView) -> Task:
        """The task, with pictures of the policy's size.

        Raises:
            ValueError: If it cannot show what the policy sees.
        """
        assert self.task is not None
        if not view.data_schema.differences(self.task.data_schema()):
            return self.task
        try:
            return type(self.task).for_policy(view.data_schema)
        except ValueError as error:
            raise ValueError(
                f"features: task {self.task.name} is another than the policy's ({error}); set "
                "task to the policy's own, and n_rollouts to 0 where there is none"
            ) from error


def _parts(trainer: Trainer, module: LightningModule) -> tuple[SAEModule, ActivationDataModule]:
    """What is trained, and on what.

    Raises:
        TypeError: If it is no autoencoder on activations.
    """
    data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
    if not isinstance(module, SAEModule) or not isinstance(data, ActivationDataModule):
        raise TypeError(
            f"callbacks.features.Features looks at an autoencoder on activations; the run trains "
            f"{type(module).__name__} on {type(data).__name__}: use "
            "callbacks.feature_dynamics.FeatureDynamics to follow a policy's features"
        )
    return module, data
