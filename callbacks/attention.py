"""Where the policy looks at checkpoints, what that does to its actions, and whether it is true."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, override

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from attention.attribution import Attribution
from attention.counterfactuals import CounterfactualEffects, measure_counterfactuals
from attention.gradients import GradCAM, IntegratedGradients, Relevancy
from attention.maps import CrossAttention, Rollout
from attention.method import Method, Target
from attention.occlusion import Occlusion
from attention.study import Evidence, effect_numbers, explain, judge, numbers, resolution_note
from attention.table import map_table, write_maps
from callbacks.schedule import Diagnostic, is_last_validation, undisturbed
from callbacks.views import policy_view
from envs.replay import can_replay
from envs.scene import scene_variants
from envs.task import Task
from policies.act import ACTPolicy
from policies.atomic_files import write_atomically
from policies.interface import Batch, Findings, PolicyView, in_unit
from policies.json_files import json_text
from rendering.attention import (
    AttentionStyle,
    attention_frames,
    attention_strip,
    video_paths,
)
from rendering.attention_scenes import attention_scenes, value_range_of
from rendering.picture import write_png
from rendering.video import write_videos

PREFIX = "attention"
N_NODES = 50
"""Of integrated gradients; three times as many where the policy's attributions do not add up."""


class Attention(Diagnostic):
    """Explain the same held-out frames at every checkpoint.

    Cross-attention, its rollout through the encoder and relevancy come each time, with the share of
    each kind of input, and what the policy does in pictures without an object. At the last
    checkpoint gradients and occlusion explain some of the frames, too, and every map is put to the
    test there.

    Args:
        n_frames: Frames, evenly spread over the held-out episodes.
        n_val_episodes: Held-out episodes to take them from, at most.
        queries: Chunk steps that are explained, on average.
        task: Simulator that draws recorded states without their objects; no counterfactuals when
            null, or where the data hold no states of it.
        faithfulness: When maps are put to the test: at the ``end`` of training, ``always``, or
            ``never``.
        n_faithfulness_frames: On how many of the frames; each costs some thousand forward passes.
        n_strip_frames: Frames of the strip, of those, so that it shows the same ones every time.
        n_video_steps: Steps of the first held-out episode whose relevancy is shown as a video; 0
            for none.
        colormap: Any of matplotlib's.
        overlay_alpha: Weight of the map's colours, 0 to 1.
        scale: Range of the colours: of each ``frame``, of the ``episode``, or ``global``, of cells
            and robot state together.
        target_height: Of the video's pictures, in px.
        batch_size: Frames that go through the network together.
        seed: Of what chance would achieve.
        every_n_validations: Run at every n-th validation.
        at_start: Also explain the untrained policy.
        strict: Let an error of this diagnostic stop the run.
        max_share: Share of the wall time that it may take; skipped where it would take more.

    Raises:
        ValueError: If a number is out of range, or something cannot be drawn.
    """

    def __init__(
        self,
        n_frames: int = 20,
        n_val_episodes: int = 5,
        queries: Sequence[int] = (0,),
        task: Task | None = None,
        faithfulness: Literal["end", "always", "never"] = "end",
        n_faithfulness_frames: int = 6,
        n_strip_frames: int = 6,
        n_video_steps: int = 100,
        colormap: str = "viridis",
        overlay_alpha: float = 0.5,
        scale: Literal["frame", "episode", "global"] = "frame",
        target_height: int = 240,
        batch_size: int = 32,
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
            ("n_frames", n_frames, 1),
            ("n_val_episodes", n_val_episodes, 1),
            ("n_faithfulness_frames", n_faithfulness_frames, 1),
            ("n_strip_frames", n_strip_frames, 1),
            ("n_video_steps", n_video_steps, 0),
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        if not n_strip_frames <= n_faithfulness_frames <= n_frames:
            raise ValueError(
                f"n_strip_frames {n_strip_frames}, n_faithfulness_frames {n_faithfulness_frames}, "
                f"n_frames {n_frames}: each are some of the next; give rising numbers"
            )
        if faithfulness not in ("end", "always", "never"):
            raise ValueError(f"faithfulness {faithfulness!r}: give end, always or never")
        self.n_frames = n_frames
        self.n_val_episodes = n_val_episodes
        self.target = Target(tuple(queries))
        self.task = task
        self.faithfulness = faithfulness
        self.n_faithfulness_frames = n_faithfulness_frames
        self.n_strip_frames = n_strip_frames
        self.n_video_steps = n_video_steps
        self.style = AttentionStyle(
            colormap=colormap,
            overlay_alpha=overlay_alpha,
            scale=scale,
            target_height=target_height,
        )
        self.batch_size = batch_size
        self.seed = seed

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse data that hold no episode out, before anything starts.

        Raises:
            ValueError: If there is none.
        """
        super().setup(trainer, pl_module, stage)
        if not _held_out(trainer):
            raise ValueError(
                "attention needs a held-out episode, and val_fraction holds out none: raise "
                "--data.init_args.val_fraction"
            )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rehearse on one frame, so that what cannot be explained or drawn is refused at once.

        Not in ``setup``: a module may learn its statistics in its own, which comes later.

        Raises:
            TypeError: If the module trains no policy.
            ValueError: If it is no ACT, has no camera, or does not predict the queries; if the task
                cannot show what the policy sees; or if something cannot be drawn.
        """
        view = self._view(pl_module)
        batch = self._probe(trainer).rows(slice(1)).to(pl_module.device)
        with undisturbed(pl_module):
            scene = self._scene(view, batch)
            self._strip(view, batch, self._maps(_quick(), view, batch), scene)

    @override
    def diagnose(self, trainer: Trainer, module: LightningModule, folder: Path) -> Findings:
        """Explain, measure and draw."""
        view = self._view(module)
        batch = self._probe(trainer).to(module.device)
        maps = self._maps(_quick(), view, batch)
        tables = [
            map_table(found, batch.episode_index, batch.frame_index) for found in maps.values()
        ]
        scene = self._scene(view, batch)
        scalars = self._numbers(view, maps, batch, scene)
        if scene is not None:
            values = effect_numbers(scene.effects)
            scalars |= {f"counterfactual/{key}": value for key, value in values.items()}
        few = _spread(len(batch), self.n_faithfulness_frames)
        maps = {name: found.rows(few) for name, found in maps.items()}
        batch, scene = batch.rows(few), None if scene is None else scene.rows(few)
        if self._is_due(trainer):
            slow = self._maps(_slow(), view, batch)
            tables += [
                map_table(found, batch.episode_index, batch.frame_index) for found in slow.values()
            ]
            maps |= slow
            # What is measured on all frames at every checkpoint stays as it is.
            scalars = self._numbers(view, maps, batch, scene, to_test=True) | scalars
        unit = getattr(module, "unit", "px")
        scalars = {in_unit(name, unit): value for name, value in scalars.items()}
        write_atomically(folder / "metrics.json", json_text(scalars))
        table = write_maps(folder / "maps.parquet", tables)
        strip = write_png(folder / "strip.png", self._strip(view, batch, maps, scene))
        videos = {}
        if self.n_video_steps:
            paths = self._videos(trainer, module, view, folder)
            videos = {f"{PREFIX}/video_{name}": str(path) for name, path in paths.items()}
        return Findings(
            scalars=scalars,
            images={f"{PREFIX}/strip": str(strip)},
            videos=videos,
            arrays={PREFIX: str(table)},
        )

    def _is_due(self, trainer: Trainer) -> bool:
        """Whether maps are to be put to the test now."""
        if self.faithfulness == "end":
            return trainer.state.fn != "fit" or is_last_validation(trainer)
        return self.faithfulness == "always"

    def _view(self, module: LightningModule) -> ACTPolicy:
        view = policy_view(module)
        if not isinstance(view, ACTPolicy) or not view.data_schema.cameras:
            raise ValueError(
                f"attention looks inside ACT, through its cameras; the policy is "
                f"{type(view).__name__} with cameras {list(view.data_schema.cameras)}: leave "
                "callbacks.attention.Attention out of trainer.callbacks (analyze.py saliency "
                "--method occlusion explains any policy with a camera)"
            )
        methods = _quick() if self.faithfulness == "never" else _quick() | _slow()
        for method in methods.values():
            method.check(view)
        self.target.check(view)
        return view

    def _probe(self, trainer: Trainer) -> Batch:
        """The same frames at every checkpoint."""
        return _frames(trainer, _held_out(trainer)[: self.n_val_episodes], self.n_frames)

    def _maps(
        self, methods: Mapping[str, Method], view: PolicyView, batch: Batch
    ) -> dict[str, Attribution]:
        return {
            name: explain(each, view, batch.observation, self.target, self.batch_size)
            for name, each in methods.items()
        }

    def _scene(self, view: PolicyView, batch: Batch) -> "_Scene | None":
        """What the policy does without the objects, where the simulator can take them away."""
        task = self._task(view)
        if task is None or not can_replay(task, batch):
            return None
        try:
            variants = scene_variants(task, batch)
        except ValueError as error:
            raise ValueError(
                f"attention: {error}; or set task to null, which goes without counterfactuals"
            ) from error
        effects = measure_counterfactuals(
            view,
            variants,
            self.target.queries,
            batch_size=self.batch_size,
            recorded=batch.observation,
        )
        return _Scene(variants.masks, effects)

    def _numbers(
        self,
        view: PolicyView,
        maps: Mapping[str, Attribution],
        batch: Batch,
        scene: "_Scene | None",
        to_test: bool = False,
    ) -> dict[str, float]:
        """What maps of some frames say, and how true they are."""
        evidence = Evidence(
            batch.observation,
            maps.get("occlusion"),
            None if scene is None else scene.masks,
            None if scene is None else scene.effects,
        )
        verdicts = judge(
            view,
            # Maps of the copy that has learnt nothing need not add up.
            _quick() | _slow(max_nodes=N_NODES),
            maps,
            evidence,
            self.target,
            batch_size=self.batch_size,
            seed=self.seed,
            with_curves=to_test,
            with_randomised=to_test,
        )
        return {
            f"{PREFIX}/{name}/{key}": value
            for name, found in maps.items()
            for key, value in (numbers(found) | verdicts[name].scalars()).items()
        }

    def _task(self, view: PolicyView) -> Task | None:
        """The simulator with pictures of the policy's size."""
        if self.task is None or not view.data_schema.differences(self.task.data_schema()):
            return self.task
        try:
            return type(self.task).for_policy(view.data_schema)
        except ValueError as error:
            raise ValueError(
                f"attention: {error}; or set task to null, which goes without counterfactuals"
            ) from error

    def _strip(
        self,
        view: PolicyView,
        batch: Batch,
        maps: Mapping[str, Attribution],
        scene: "_Scene | None",
    ) -> UInt8[np.ndarray, "height width 3"]:
        """Draw a row for each method, and a column for some of the frames."""
        rows = _spread(len(batch), self.n_strip_frames)
        shown = batch.rows(rows)
        captions = _captions(shown)
        masks = {} if scene is None else scene.masks
        outlines = {name: mask[rows] for name, mask in masks.items()}
        scenes = [
            list(attention_scenes(found.rows(rows), shown.observation, captions, outlines))
            for found in maps.values()
        ]
        ranges = [value_range_of(found) for found in maps.values()]
        return attention_strip(
            scenes,
            self.style,
            ranges if self.style.scale == "episode" else None,
            resolution_note(view),
        )

    def _videos(
        self,
        trainer: Trainer,
        module: LightningModule,
        view: PolicyView,
        folder: Path,
    ) -> dict[str, Path]:
        """Film relevancy along the first held-out episode; its maps lie beside the film."""
        method = Relevancy()
        episode = _frames(trainer, _held_out(trainer)[:1]).rows(slice(self.n_video_steps))
        episode = episode.to(module.device)
        found = explain(method, view, episode.observation, self.target, self.batch_size)
        table = map_table(found, episode.episode_index, episode.frame_index)
        write_maps(folder / f"{method.name}.parquet", [table])
        paths = video_paths(folder, method.name, list(found.maps))
        value_range, note = value_range_of(found), resolution_note(view)
        frames = (
            attention_frames(scene, self.style, value_range, note)
            for scene in attention_scenes(found, episode.observation, _captions(episode))
        )
        fps = trainer.datamodule.fps or 10.0  # pyright: ignore[reportAttributeAccessIssue]
        return write_videos(paths, frames, fps)


@dataclass(frozen=True)
class _Scene:
    """What the simulator knows of some frames."""

    masks: Mapping[str, Bool[Tensor, "batch height width"]]
    """Objects in the first camera."""
    effects: CounterfactualEffects
    """Of taking them away."""

    def rows(self, index: Int[Tensor, " row"]) -> "_Scene":
        """Some of the frames."""
        effects = self.effects
        return _Scene(
            {name: mask[index] for name, mask in self.masks.items()},
            CounterfactualEffects(
                effect_px={name: px[index] for name, px in effects.effect_px.items()},
                shares=effects.shares[index],
                sensitivity={name: size[index] for name, size in effects.sensitivity.items()},
                rerender_px=None if effects.rerender_px is None else effects.rerender_px[index],
            ),
        )


def _quick() -> dict[str, Method]:
    """Methods that cost a few forward passes a frame."""
    return {each.name: each for each in (CrossAttention(), Rollout(), Relevancy())}


def _slow(max_nodes: int = 3 * N_NODES) -> dict[str, Method]:
    """Methods that cost up to hundreds."""
    integrated = IntegratedGradients(N_NODES, max_steps=max_nodes)
    return {each.name: each for each in (GradCAM(), integrated, Occlusion())}


def _held_out(trainer: Trainer) -> list[int]:
    return trainer.datamodule.split["val"]  # pyright: ignore[reportAttributeAccessIssue]


def _frames(trainer: Trainer, episodes: Sequence[int], n_wanted: int | None = None) -> Batch:
    """Frames of some episodes, evenly spread over them; all when None."""
    data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
    dataset = data.dataset(episodes)
    n_frames = len(dataset)
    return dataset.__getitems__(_spread(n_frames, n_wanted or n_frames).tolist())


def _spread(n_frames: int, n_wanted: int) -> Int[Tensor, " row"]:
    """Rows from the first to the last frame, evenly; all where there are fewer."""
    return torch.linspace(0, n_frames - 1, min(n_wanted, n_frames)).round().long()


def _captions(batch: Batch) -> list[str]:
    """One line for each frame."""
    return [
        f"episode {episode}  step {step}"
        for episode, step in zip(
            batch.episode_index.tolist(), batch.frame_index.tolist(), strict=True
        )
    ]
