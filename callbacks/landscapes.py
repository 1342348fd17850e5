"""Action landscapes at checkpoints: where the policy would go, and whether to believe it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, override

import numpy as np
import torch
from jaxtyping import Float, Int
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.schedule import Diagnostic, undisturbed
from callbacks.views import policy_view
from envs.replay import episode_pictures
from envs.task import Task
from landscapes.grid import Grid
from landscapes.landscape import Landscape, Predictions
from landscapes.methods import Likelihood, Method, Probe, queries_for
from landscapes.metrics import LandscapeMetrics
from landscapes.study import (
    Calibration,
    Frames,
    executed_along,
    is_calibrated,
    kernel_scale,
    latent_numbers,
    measure_frames,
    predict_frames,
    reachable_horizons,
    sample_gap,
)
from policies.act import ACTPolicy
from policies.atomic_files import write_atomically
from policies.ensembling import ActionQueue
from policies.interface import Batch, Findings, SamplingPolicyView, Table
from rendering.colour import colour_table
from rendering.landscape import board_px, landscape_strip, side_by_side
from rendering.landscape_scenes import Column, Overlay, scenes
from rendering.picture import write_png
from rendering.video import write_video

PREFIX = "landscape"
HISTOGRAM_EDGES = tuple(np.linspace(0, 1, 21).tolist())
TRAIN_NUMBERS = ("nll", "energy", "c80", "c95", "hdr80_px2")
"""What is compared between held-out and training episodes."""
TABLE_NUMBERS = ("nll", "skill_vs_agent", "energy", "c80", "modes_mean", "regret_med", "hdr80_px2")
N_DRAWS = 500
"""Actions drawn from each density for its entropy and calibration; enough for means over frames."""


class Landscapes(Diagnostic):
    """Study the same held-out frames with the same random numbers at every checkpoint.

    The held-out episodes are divided: the scale of ACT's kernels is fitted on one half, and
    everything reported comes from the other.

    Args:
        method: Scores that are drawn (class_path); the policy's log density when null.
        horizons: Chunk steps; those of 0, 8, 16 and 32 that the chunk holds when null.
        n_samples: Action chunks drawn per frame (K).
        action_resolution: Cells along each axis of the board.
        n_val_episodes: Held-out episodes to study, at most; half of them calibrate.
        n_train_episodes: Training episodes to compare with, at most, divided in the same way; 0
            for none.
        frame_stride: Take every n-th frame of an episode.
        n_evidence_frames: Frames for the importance-weighted evidence of ACT's latent.
        n_video_steps: Steps of the first reported episode that are shown as a video; 0 for none.
        n_strip_frames: Frames of it in the strip.
        task: Simulator that draws recorded states; recorded pictures when null.
        colormap: Any of matplotlib's.
        target_height: Of the video, in px.
        batch_size: Frames that go through the network together.
        seed: Of the drawn chunks.
        every_n_validations: Run at every n-th validation.
        at_start: Also study the untrained policy.
        strict: Let an error of this diagnostic stop the run.
        max_share: Share of the wall time that it may take; skipped where it would take more.

    Raises:
        ValueError: If a number is out of range, or matplotlib has no such colour map.
    """

    def __init__(
        self,
        method: Method | None = None,
        horizons: list[int] | None = None,
        n_samples: int = 16,
        action_resolution: int = 128,
        n_val_episodes: int = 20,
        n_train_episodes: int = 10,
        frame_stride: int = 5,
        n_evidence_frames: int = 16,
        n_video_steps: int = 100,
        n_strip_frames: int = 4,
        task: Task | None = None,
        colormap: str = "viridis",
        target_height: int = 360,
        batch_size: int = 64,
        seed: int = 0,
        every_n_validations: int = 1,
        at_start: bool = False,
        strict: bool = False,
        max_share: float | None = 0.05,
    ):
        super().__init__(
            every_n_validations=every_n_validations,
            at_start=at_start,
            strict=strict,
            max_share=max_share,
        )
        for name, value, least in (
            ("n_samples", n_samples, 2),
            ("n_val_episodes", n_val_episodes, 2),
            ("n_train_episodes", n_train_episodes, 0),
            ("frame_stride", frame_stride, 1),
            ("n_evidence_frames", n_evidence_frames, 1),
            ("n_video_steps", n_video_steps, 0),
            ("n_strip_frames", n_strip_frames, 1),
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        if n_train_episodes == 1:
            raise ValueError("n_train_episodes is 1; one half calibrates: give 0, or 2 and more")
        colour_table(colormap)
        board_px(target_height)
        self.method = method or Likelihood()
        self.horizons = horizons
        self.n_samples = n_samples
        self.grid = Grid(action_resolution)
        self.n_val_episodes = n_val_episodes
        self.n_train_episodes = n_train_episodes
        self.frame_stride = frame_stride
        self.n_evidence_frames = n_evidence_frames
        self.n_video_steps = n_video_steps
        self.n_strip_frames = n_strip_frames
        self.task = task
        self.colormap = colormap
        self.target_height = target_height
        self.batch_size = batch_size
        self.seed = seed

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse data that cannot be studied, before anything starts.

        Raises:
            ValueError: If fewer than two episodes are held out.
        """
        super().setup(trainer, pl_module, stage)
        held_out = _split(trainer)["val"]
        if len(held_out) < 2:
            raise ValueError(
                f"landscapes need 2 held-out episodes, one to calibrate on, and val_fraction holds "
                f"out {len(held_out)}: raise --data.init_args.val_fraction"
            )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a policy that cannot be studied, before training starts.

        Not in ``setup``: a module may learn its statistics in its own, which comes later.

        Raises:
            TypeError: If the module trains no policy.
            ValueError: If the policy does not fit.
        """
        view = self._view(pl_module)
        first = _episode(trainer, _split(trainer)["val"][0]).rows(slice(1)).to(pl_module.device)
        # Who has only one answer says so when asked.
        with undisturbed(pl_module):
            view.sample_chunks(first.observation, 2, self.seed, [0])

    @override
    def diagnose(self, trainer: Trainer, module: LightningModule, folder: Path) -> Findings:
        """Predict, measure, draw the first reported episode, and keep the raw arrays."""
        view = self._view(module)
        horizons = reachable_horizons(view, self.horizons)
        val = self._side(trainer, module, view, horizons, "val", self.n_val_episodes)
        scalars = self._numbers(val, "val", None)
        document = {"val": val.metrics.summary(), "val_intervals": val.metrics.intervals()}
        train = None
        if self.n_train_episodes and len(_split(trainer)["train"]) > 1:
            train = self._side(trainer, module, view, horizons, "train", self.n_train_episodes)
            scalars |= self._numbers(train, "train", TRAIN_NUMBERS)
            document["train"] = train.metrics.summary()
        use = None
        if isinstance(view, ACTPolicy) and view.network.posterior is not None:
            use, values = latent_numbers(
                view,
                val.frames,
                val.predictions,
                val.scale.mean(0),
                self.n_evidence_frames,
                self.seed,
            )
            scalars |= {f"latent/{name}": value for name, value in values.items()}
        document["reading"] = val.metrics.reading(use, None if train is None else train.metrics)
        write_atomically(folder / "metrics.json", json.dumps(document, indent=1) + "\n")
        images, videos, arrays = self._draw(trainer, module, view, val, folder)
        return Findings(
            scalars=scalars,
            images=images,
            videos=videos,
            tables={f"{PREFIX}/episodes": _table(val.metrics)},
            histograms={
                f"{PREFIX}/val/k{k}/hpd_level": _histogram(val.metrics, place)
                for place, k in enumerate(horizons)
                if val.metrics.is_valid[:, place].any()
            },
            arrays={"landscapes": str(arrays)},
        )

    def _view(self, module: LightningModule) -> SamplingPolicyView:
        view = policy_view(module)
        if not isinstance(view, SamplingPolicyView):
            raise TypeError(f"{type(view).__name__} draws no action chunks: it has no landscapes")
        self.method.check(view)
        reachable_horizons(view, self.horizons)
        return view

    def _side(
        self,
        trainer: Trainer,
        module: LightningModule,
        view: SamplingPolicyView,
        horizons: tuple[int, ...],
        name: str,
        n_episodes: int,
    ) -> "_Side":
        """Study one side of the split: calibrate on every other episode, report on the rest."""
        episodes = _split(trainer)[name][:n_episodes]
        queries = queries_for([self.method], view, horizons)
        calibration = Calibration(self._frames(trainer, episodes[1::2]).to(module.device))
        if is_calibrated(view):
            answers = self._predict(view, calibration.frames.batch, queries)
            calibration = replace(calibration, predictions=answers)
        frames = self._frames(trainer, episodes[::2]).to(module.device)
        predictions = self._predict(view, frames.batch, queries)
        scale = kernel_scale(view, predictions, calibration.predictions)
        metrics = measure_frames(
            predictions, scale, frames, horizons, self.grid, calibration, self.seed, N_DRAWS
        )
        places = [predictions.queries.index(horizon) for horizon in horizons]
        return _Side(
            frames, predictions.at(horizons), scale[:, places], metrics, horizons, calibration
        )

    def _frames(self, trainer: Trainer, episodes: Sequence[int]) -> Frames:
        return Frames.concatenate(
            [Frames.of_episode(_episode(trainer, each), self.frame_stride) for each in episodes]
        )

    def _predict(
        self, view: SamplingPolicyView, batch: Batch, queries: Sequence[int]
    ) -> Predictions:
        return predict_frames(view, batch, queries, self.n_samples, self.seed, self.batch_size)

    def _numbers(self, side: "_Side", name: str, wanted: Sequence[str] | None) -> dict[str, float]:
        """Metric names and values of one side."""
        prefix = f"{PREFIX}/{name}"
        summary = side.metrics.summary()
        values = {
            f"{prefix}/{key}": value
            for key, value in summary.items()
            if wanted is None or key.split("/")[1] in wanted
        }
        for place, k in enumerate(side.horizons):
            for axis, direction in enumerate("xy"):
                values[f"calib/{name}/k{k}/b_{direction}"] = float(side.metrics.scale[place, axis])
        if wanted is None:
            values |= {
                f"{prefix}/{key}_{end}": value
                for key, ends in side.metrics.intervals().items()
                if key.endswith(("/nll", "/c80"))
                for end, value in zip(("low", "high"), ends, strict=True)
            }
            gaps = sample_gap(side.predictions, side.scale)
            values |= {f"{prefix}/{key}": value for key, value in gaps.items()}
        return values

    def _draw(
        self,
        trainer: Trainer,
        module: LightningModule,
        view: SamplingPolicyView,
        side: "_Side",
        folder: Path,
    ) -> tuple[dict[str, str], dict[str, str], Path]:
        """Draw a strip and a video of the first reported episode; write the arrays."""
        number = int(side.frames.batch.episode_index[0])
        episode = _episode(trainer, number).to(module.device)
        # Without a video, the strip may show the whole of it.
        batch = episode.rows(slice(self.n_video_steps or None))
        queries = queries_for([self.method], view, side.horizons)
        predictions = self._predict(view, batch, queries)
        scale = kernel_scale(view, predictions, side.calibration.predictions)
        landscape = self.method.landscape(
            Probe(view, batch, predictions, scale, side.horizons, self.grid)
        )
        queue = ActionQueue(view.n_action_steps)
        executed, age = executed_along(view, batch, queue, self.batch_size)
        columns = [
            Column(landscape, k, predictions, executed=executed, executed_age=age)
            for k in side.horizons
        ]
        images, videos = {}, {}
        rows = torch.linspace(0, len(batch) - 1, min(self.n_strip_frames, len(batch))).long()
        pictures = episode_pictures(self.task, batch, board_px(self.target_height))
        drawn = list(scenes(columns, batch, pictures, Overlay()))
        strip = landscape_strip([drawn[row] for row in rows.tolist()], colormap=self.colormap)
        images[f"{PREFIX}/strip"] = str(write_png(folder / "strip.png", strip))
        if self.n_video_steps:
            frames = (side_by_side(scene, self.target_height, self.colormap) for scene in drawn)
            fps = trainer.datamodule.fps or 10.0  # pyright: ignore[reportAttributeAccessIssue]
            videos[f"{PREFIX}/video"] = str(write_video(folder / "landscapes.mp4", frames, fps))
        arrays = folder / "landscapes.npz"
        _write_arrays(arrays, side, landscape, rows)
        return images, videos, arrays


@dataclass(frozen=True)
class _Side:
    """What was found on one side of the split, on the episodes that do not calibrate."""

    frames: Frames
    predictions: Predictions
    """At the horizons."""
    scale: Float[Tensor, "#frame query action"]
    metrics: LandscapeMetrics
    horizons: tuple[int, ...]
    calibration: Calibration


def _split(trainer: Trainer) -> dict[str, Any]:
    return trainer.datamodule.split  # pyright: ignore[reportAttributeAccessIssue]


def _episode(trainer: Trainer, number: int) -> Batch:
    """All steps of an episode, with chunks that begin at the observed step."""
    data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
    batch: Batch = data.episode(number)
    # Diffusion Policy's chunks begin with the oldest observation.
    skipped = -data.action_start
    return replace(
        batch,
        actions=batch.actions[:, skipped:],
        action_is_pad=batch.action_is_pad[:, skipped:],
    )


def _table(metrics: LandscapeMetrics) -> Table:
    """One row for each episode and chunk step."""
    columns = ("episode", "k", "n_frames", *TABLE_NUMBERS)
    rows = tuple(tuple(row[name] for name in columns) for row in metrics.episode_rows())
    return Table(columns, rows)


def _histogram(metrics: LandscapeMetrics, place: int) -> tuple[Sequence[float], Sequence[float]]:
    """How often the demonstration falls into each region: flat when calibrated."""
    levels = metrics.hpd_level[metrics.is_valid[:, place], place]
    counts, _ = np.histogram(levels, HISTOGRAM_EDGES)
    return HISTOGRAM_EDGES, counts.tolist()


def _write_arrays(path: Path, side: _Side, landscape: Landscape, rows: Int[Tensor, " row"]) -> None:
    """Write samples of all frames and the boards of the strip: enough to plot them again."""
    predictions = side.predictions
    np.savez_compressed(
        path,
        horizons=np.array(side.horizons),
        episode_index=side.frames.batch.episode_index.cpu().numpy(),
        frame_index=side.frames.batch.frame_index.cpu().numpy(),
        samples=predictions.samples.cpu().numpy().astype(np.float32),
        prediction=predictions.point.cpu().numpy().astype(np.float32),
        expert=predictions.expert.cpu().numpy().astype(np.float32),
        is_valid=predictions.is_valid.cpu().numpy(),
        scale=side.scale.cpu().numpy(),
        strip_frame_index=rows.numpy(),
        strip_scores=landscape.scores[rows].numpy().astype(np.float16),
        strip_mass=landscape.mass[rows].numpy(),
        strip_thresholds=landscape.thresholds[rows].numpy(),
        board=np.array([landscape.grid.low, landscape.grid.high]),
    )
