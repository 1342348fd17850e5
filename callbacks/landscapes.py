"""Action landscapes at checkpoints: where the policy would go, and whether to believe it."""

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
from envs.projection import can_project, project_along
from envs.replay import episode_pictures, recorded_pictures
from envs.task import DescribedActions, Task
from landscapes.density import smallest_scale
from landscapes.grid import Grid
from landscapes.landscape import Landscape, Predictions
from landscapes.marginals import marginals
from landscapes.methods import Likelihood, Method, Probe, queries_for
from landscapes.metrics import LandscapeMetrics, part_intervals, part_summary
from landscapes.projection import actions_to_project
from landscapes.space import ActionSpace, Plane
from landscapes.study import (
    Calibration,
    Frames,
    Scales,
    executed_along,
    is_calibrated,
    latent_numbers,
    measure_frames,
    measure_parts,
    predict_frames,
    reachable_horizons,
    sample_gap,
)
from policies.act import ACTPolicy
from policies.atomic_files import write_atomically
from policies.ensembling import ActionQueue
from policies.interface import Batch, Findings, SamplingPolicyView, Table
from policies.json_files import json_text
from rendering.colour import colour_table
from rendering.landscape import board_px, landscape_strip, side_by_side
from rendering.landscape_scenes import Column, Overlay, scenes
from rendering.marginals import marginal_history, marginal_panels
from rendering.picture import write_png
from rendering.projection import camera_views, projection_frame, projection_strip
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
        action_dims: Pairs of dimensions that boards are over, by number or name; for more than two
            dimensions the two that vary most among training episodes when null.
        n_val_episodes: Held-out episodes to study, at most; half of them calibrate.
        n_train_episodes: Training episodes to compare with, at most, divided in the same way; 0
            for none.
        frame_stride: Take every n-th frame of an episode.
        n_evidence_frames: Frames for the importance-weighted evidence of ACT's latent.
        n_video_steps: Steps of the first reported episode that are shown as a video; 0 for none.
        n_strip_frames: Frames of it in the strip.
        task: Simulator that draws recorded states, and says what actions of more than two
            dimensions are and where they lead; recorded pictures when null.
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
        action_dims: list[list[int | str]] | None = None,
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
        Grid(action_resolution)
        for pair in action_dims or []:
            if len(pair) != 2:
                raise ValueError(f"action_dims {pair}: a board is over 2 dimensions; give pairs")
        self.action_resolution = action_resolution
        self.action_dims = action_dims
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
            ValueError: If the policy does not fit, or the task has not its cameras.
        """
        view = self._view(trainer, pl_module)
        first = _episode(trainer, _split(trainer)["val"][0]).rows(slice(1)).to(pl_module.device)
        # Who has only one answer says so when asked.
        with undisturbed(pl_module):
            view.sample_chunks(first.observation, 2, self.seed, [0])
        if self._is_projected(self._target(trainer), first):
            self._check_cameras(first)

    def _is_projected(self, target: "_Target", batch: Batch) -> bool:
        """Whether pictures are drawn of where actions lead."""
        return bool(target.planes and batch.observation.images) and can_project(self.task)

    def _check_cameras(self, first: Batch) -> None:
        """Ask the environment once what every checkpoint will ask it.

        Raises:
            ValueError: If it does not know a camera.
        """
        assert self.task is not None
        action = {"expert": first.actions[:, 0].double().cpu().numpy()}
        for camera, size_px in _camera_sizes(first, board_px(self.target_height)).items():
            try:
                project_along(self.task, first, action, {camera: size_px})
            except ValueError as error:
                raise ValueError(
                    f"task {self.task.name} cannot say where actions lead in the pictures of "
                    f"camera {camera} ({error}): give Landscapes the task that the data are of, or "
                    "task: null"
                ) from error

    @override
    def diagnose(self, trainer: Trainer, module: LightningModule, folder: Path) -> Findings:
        """Predict, measure, draw the first reported episode, and keep the raw arrays."""
        view = self._view(trainer, module)
        horizons = reachable_horizons(view, self.horizons)
        val = self._side(trainer, module, view, horizons, "val", self.n_val_episodes)
        scalars = self._numbers(val, "val", None)
        document = {
            "val": val.metrics.summary() | part_summary(val.parts),
            "val_intervals": val.metrics.intervals() | part_intervals(val.parts),
        }
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
                val.scales.joint.mean(0),
                self.n_evidence_frames,
                self.seed,
                smallest_scale(val.target.space.size, module.device),
            )
            scalars |= {f"latent/{name}": value for name, value in values.items()}
        document["reading"] = val.metrics.reading(use, None if train is None else train.metrics)
        write_atomically(folder / "metrics.json", json_text(document))
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

    def _view(self, trainer: Trainer, module: LightningModule) -> SamplingPolicyView:
        view = policy_view(module)
        if not isinstance(view, SamplingPolicyView):
            raise TypeError(f"{type(view).__name__} draws no action chunks: it has no landscapes")
        for board in self._target(trainer).boards:
            self.method.check(view, board)
        reachable_horizons(view, self.horizons)
        return view

    def _target(self, trainer: Trainer) -> "_Target":
        """What actions are, and what boards are over, the same at every checkpoint."""
        demonstrated = trainer.datamodule.statistics.action  # pyright: ignore[reportAttributeAccessIssue]
        task = self.task
        described = task.action_dimensions if isinstance(task, DescribedActions) else None
        space = ActionSpace.of(described, demonstrated.min, demonstrated.max)
        pairs = self.action_dims
        if pairs is None:
            pairs = [] if len(space.axes) == 2 else [list(space.widest(demonstrated.std))]
        return _Target(
            space,
            space.around(demonstrated.min, demonstrated.max),
            space.planes(pairs),
        )

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
        target = self._target(trainer)
        space, resolution = target.space, self.action_resolution
        episodes = _split(trainer)[name][:n_episodes]
        queries = queries_for([self.method], view, horizons)
        calibration = Calibration(self._frames(trainer, episodes[1::2]).to(module.device))
        if is_calibrated(view):
            answers = self._predict(view, calibration.frames.batch, queries)
            calibration = replace(calibration, predictions=answers)
        frames = self._frames(trainer, episodes[::2]).to(module.device)
        predictions = self._predict(view, frames.batch, queries)
        scales = Scales.fit(view, predictions, calibration.predictions, space, target.planes)
        box = Grid(resolution, *space.board) if len(space.axes) == 2 else space
        metrics = measure_frames(
            predictions, scales.joint, frames, horizons, box, calibration, self.seed, N_DRAWS
        )
        parts = {}
        if target.planes and name == "val":
            parts = measure_parts(
                predictions,
                scales,
                frames,
                horizons,
                space,
                target.planes,
                resolution,
                calibration,
                self.seed,
                N_DRAWS,
            )
        places = [predictions.queries.index(horizon) for horizon in horizons]
        return _Side(
            frames,
            predictions.at(horizons),
            scales.at(places),
            metrics,
            parts,
            horizons,
            calibration,
            target,
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
        b = side.scales.single.expand(len(side.frames), -1, -1).mean(0)
        for place, k in enumerate(side.horizons):
            for dim, direction in enumerate(side.target.space.names):
                values[f"calib/{name}/k{k}/b_{direction}"] = float(b[place, dim])
        values |= {f"{prefix}/{key}": value for key, value in part_summary(side.parts).items()}
        if wanted is None:
            values |= {
                f"{prefix}/{key}_{end}": value
                for key, ends in side.metrics.intervals().items()
                if key.endswith(("/nll", "/c80"))
                for end, value in zip(("low", "high"), ends, strict=True)
            }
            gaps = sample_gap(side.predictions, side.scales.joint)
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
        """Draw the first reported episode, all boards of it and its parts; write the arrays."""
        number = int(side.frames.batch.episode_index[0])
        episode = _episode(trainer, number).to(module.device)
        # Without a video, the strip may show the whole of it.
        batch = episode.rows(slice(self.n_video_steps or None))
        queries = queries_for([self.method], view, side.horizons)
        predictions = self._predict(view, batch, queries)
        fitted_on, planes = side.calibration.predictions, side.target.planes
        scales = Scales.fit(view, predictions, fitted_on, side.target.space, planes)
        queue = ActionQueue(view.n_action_steps)
        executed, age = executed_along(view, batch, queue, self.batch_size)
        rows = torch.linspace(0, len(batch) - 1, min(self.n_strip_frames, len(batch))).long()
        fps = trainer.datamodule.fps or 10.0  # pyright: ignore[reportAttributeAccessIssue]
        images, videos, landscapes = {}, {}, []
        for board in side.target.boards:
            grid = side.target.grid(board, self.action_resolution)
            landscape = self.method.landscape(
                Probe(
                    view,
                    batch,
                    predictions,
                    scales.joint,
                    side.horizons,
                    grid,
                    board,
                    scales.of_marginal(board),
                )
            )
            landscapes.append(landscape)
            columns = [
                Column(landscape, k, predictions, executed=executed, executed_age=age)
                for k in side.horizons
            ]
            # The first board has the names that the only one has elsewhere.
            later = "" if len(landscapes) == 1 or board is None else f"_{board.name}"
            pictures = episode_pictures(self.task, batch, board_px(self.target_height))
            drawn = list(scenes(columns, batch, pictures, Overlay()))
            strip = landscape_strip([drawn[row] for row in rows.tolist()], colormap=self.colormap)
            images[f"{PREFIX}/strip{later}"] = str(write_png(folder / f"strip{later}.png", strip))
            if self.n_video_steps:
                frames = (side_by_side(scene, self.target_height, self.colormap) for scene in drawn)
                path = write_video(folder / f"landscapes{later}.mp4", frames, fps)
                videos[f"{PREFIX}/video{later}"] = str(path)
        if planes:
            episode = _Shown(batch, predictions, executed, scales, rows, fps, folder)
            images |= self._draw_dimensions(side, episode)
            more_images, more_videos = self._draw_projection(side, episode)
            images, videos = images | more_images, videos | more_videos
        arrays = folder / "landscapes.npz"
        _write_arrays(arrays, side, landscapes, rows)
        return images, videos, arrays

    def _draw_dimensions(self, side: "_Side", episode: "_Shown") -> dict[str, str]:
        """Draw every dimension by itself: at one instant, and along the episode."""
        # The middle horizon: the action of now follows from the state in most tasks.
        k = side.horizons[len(side.horizons) // 2]
        found = marginals(episode.predictions, episode.scales.single, side.target.shown_space, [k])
        middle = len(episode.batch) // 2
        frame_index = episode.batch.frame_index.cpu().numpy()
        title = f"episode {int(episode.batch.episode_index[0])}"
        panels = marginal_panels(
            found,
            episode.predictions,
            middle,
            k,
            f"{title}  step {frame_index[middle]}  k = {k}",
            episode.executed[middle].double().cpu().numpy() if k == 0 else None,
        )
        along = marginal_history(
            found,
            episode.predictions,
            k,
            frame_index,
            f"{title}  k = {k}",
            colormap=self.colormap,
        )
        pictures = {"marginals": panels, "marginals_along": along}
        return {
            f"{PREFIX}/{name}": str(write_png(episode.folder / f"{name}.png", picture))
            for name, picture in pictures.items()
        }

    def _draw_projection(
        self, side: "_Side", episode: "_Shown"
    ) -> tuple[dict[str, str], dict[str, str]]:
        """Draw where actions lead in what the cameras saw; nothing where no task can say."""
        batch, predictions, scale = episode.batch, episode.predictions, episode.scales.joint
        if self.task is None or not self._is_projected(side.target, batch):
            return {}, {}
        if not self.n_video_steps:
            batch, predictions = batch.rows(episode.rows), predictions.rows(episode.rows)
            # One scale for all frames, or one for each.
            scale = scale if len(scale) == 1 else scale[episode.rows]
        k = side.horizons[len(side.horizons) // 2]
        sizes = _camera_sizes(batch, board_px(self.target_height))
        actions = actions_to_project(predictions, scale, k, self.seed)
        found = project_along(self.task, batch, actions, sizes)
        pictures = {camera: recorded_pictures(batch.observation, camera) for camera in sizes}
        titles = [f"step {step}" for step in batch.frame_index.tolist()]
        views = list(
            camera_views(pictures, found.px, found.end_effectors, predictions, k, titles, sizes)
        )
        shown = views if not self.n_video_steps else [views[row] for row in episode.rows.tolist()]
        strip = write_png(episode.folder / "projection.png", projection_strip(shown))
        videos = {}
        if self.n_video_steps:
            frames = (projection_frame(each) for each in views)
            path = write_video(episode.folder / "projection.mp4", frames, episode.fps)
            videos[f"{PREFIX}/projection"] = str(path)
        return {f"{PREFIX}/projection_strip": str(strip)}, videos


@dataclass(frozen=True)
class _Target:
    """What actions are, and what is shown of them."""

    space: ActionSpace
    shown_space: ActionSpace
    """The same dimensions over the demonstrated range, for pictures of single ones."""
    planes: tuple[Plane, ...]
    """Empty where an action is a point of one board."""

    @property
    def boards(self) -> tuple[Plane | None, ...]:
        """What landscapes are over: the planes, else the one board."""
        return self.planes or (None,)

    def grid(self, board: Plane | None, resolution: int) -> Grid:
        """The cells of a board."""
        return Grid(resolution, *self.space.board) if board is None else board.grid(resolution)


@dataclass(frozen=True)
class _Shown:
    """The episode that is drawn."""

    batch: Batch
    predictions: Predictions
    executed: Float[Tensor, "frame action"]
    scales: Scales
    rows: Int[Tensor, " row"]
    """Instants of still pictures."""
    fps: float
    folder: Path


@dataclass(frozen=True)
class _Side:
    """What was found on one side of the split, on the episodes that do not calibrate."""

    frames: Frames
    predictions: Predictions
    """At the horizons."""
    scales: Scales
    metrics: LandscapeMetrics
    parts: dict[str, LandscapeMetrics]
    """Of single dimensions and of planes, by their names."""
    horizons: tuple[int, ...]
    calibration: Calibration
    target: _Target


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
    found = metrics.episode_rows()
    known = [name for name in TABLE_NUMBERS if all(name in row for row in found)]
    columns = ("episode", "k", "n_frames", *known)
    rows = tuple(tuple(row[name] for name in columns) for row in found)
    return Table(columns, rows)


def _histogram(metrics: LandscapeMetrics, place: int) -> tuple[Sequence[float], Sequence[float]]:
    """How often the demonstration falls into each region: flat when calibrated."""
    levels = metrics.hpd_level[metrics.is_valid[:, place], place]
    counts, _ = np.histogram(levels, HISTOGRAM_EDGES)
    return HISTOGRAM_EDGES, counts.tolist()


def _camera_sizes(batch: Batch, height_px: int) -> dict[str, tuple[int, int]]:
    """Height and width of every camera's picture with actions on it."""
    return {
        camera: (height_px, round(height_px * each.shape[-1] / each.shape[-2]))
        for camera, each in batch.observation.images.items()
    }


def _write_arrays(
    path: Path, side: _Side, landscapes: Sequence[Landscape], rows: Int[Tensor, " row"]
) -> None:
    """Write samples of all frames and the boards of the strip: enough to plot them again."""
    predictions, space = side.predictions, side.target.space
    boards: dict[str, Any] = {}
    for number, landscape in enumerate(landscapes):
        plane = landscape.plane
        # As with pictures, the first board has the names that the only one has elsewhere.
        later = "" if number == 0 or plane is None else f"_{plane.name}"
        boards |= {
            f"strip_scores{later}": landscape.scores[rows].numpy().astype(np.float16),
            f"strip_mass{later}": landscape.mass[rows].numpy(),
            f"strip_thresholds{later}": landscape.thresholds[rows].numpy(),
            f"board{later}": np.array([landscape.grid.low, landscape.grid.high]),
            f"dims{later}": np.array((0, 1) if plane is None else plane.dims),
        }
    np.savez_compressed(
        path,
        horizons=np.array(side.horizons),
        episode_index=side.frames.batch.episode_index.cpu().numpy(),
        frame_index=side.frames.batch.frame_index.cpu().numpy(),
        samples=predictions.samples.cpu().numpy().astype(np.float32),
        prediction=predictions.point.cpu().numpy().astype(np.float32),
        expert=predictions.expert.cpu().numpy().astype(np.float32),
        is_valid=predictions.is_valid.cpu().numpy(),
        scale=side.scales.joint.cpu().numpy(),
        scale_single=side.scales.single.cpu().numpy(),
        strip_frame_index=rows.numpy(),
        names=np.array(space.names),
        units=np.array([axis.unit for axis in space.axes]),
        slice=np.array("marginal"),
        **boards,
    )
