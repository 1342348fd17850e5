"""The landscape explorer: put agent and T anywhere, and see what policies answer there.

A pose is drawn by the simulator, never stepped, so a policy sees of it what it saw in training; the
answer is what ``analyze.py landscape`` and ``attention`` compute, by the same code. A frame that
was recorded is answered as it was recorded, until something is moved.
"""

import asyncio
import math
import time
from base64 import b64encode
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Float, UInt8
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from torch import Tensor

from attention.attribution import Attribution
from attention.gradients import IntegratedGradients
from attention.method import Target
from attention.methods import METHODS as ATTENTION_METHODS
from attention.occlusion import Occlusion
from attention.study import explain, numbers, resolution_note
from datamodules.base import DemonstrationDataModule
from datamodules.opening import TrainingData, open_demonstrations, training_data
from envs.push_t import (
    AGENT_RADIUS_PX,
    BOARD_PX,
    T_OUTLINE_PX,
    WALLS_PX,
    PushT,
    distance_to_t_px,
)
from envs.replay import recorded_pictures
from envs.task import DescribedActions, EnvironmentObservation, Task
from landscapes.grid import Grid
from landscapes.landscape import Predictions
from landscapes.methods import METHODS, Belief, ExpertMode, Likelihood, Method, Probe
from landscapes.regions import modes, region_area
from landscapes.study import (
    Calibration,
    Frames,
    is_calibrated,
    kernel_scale,
    predict_frames,
)
from policies.interface import Batch, Observation, SamplingPolicyView
from policies.json_files import parse_json
from policies.loading import LoadedPolicy
from rendering.attention import (
    AttentionScene,
    AttentionStyle,
    is_uniform,
    overlay,
    scale_range,
    share_colours,
)
from rendering.attention_scenes import TITLES, attention_scenes, newest_pictures
from rendering.colour import colour_table, colours
from rendering.landscape import region_outlines
from rendering.picture import encode_png

ON_REQUEST = (IntegratedGradients.name, Occlusion.name)
"""Attention methods that take too long to follow a moving hand; the page asks for them once."""
OF_RECORDED_FRAMES = {
    Belief.name: "belief mixes the chunks of the frames before, and a moved pose has none",
    ExpertMode.name: "expert_mode needs the demonstrated chunk, and a moved pose has none",
}
"""Landscape methods that say nothing of a pose that was moved, and why."""
AREA_LEVEL = 0.9
"""Mass of the region whose area is stated."""
N_PATH_STEPS = 24
"""Chunk steps of drawn paths, at most, besides the horizon."""
N_DRAWN_PATHS = 24
N_CALIBRATION_EPISODES = 8
N_CALIBRATION_FRAMES = 64
N_POSE_EPISODES = 64
"""Demonstrations whose poses say what is familiar."""
N_YARDSTICK_FRAMES = 256
N_KEPT_EPISODES = 3
"""Episodes kept in memory, of each policy."""


@dataclass(frozen=True)
class Question:
    """What the page asks: policies, a frame or a pose, and what to compute there.

    Raises:
        ValueError: If a value is none that can be asked about.
    """

    policies: tuple[int, ...]
    """Their places in the order given."""
    episode: int
    frame: int
    """Step within the episode."""
    horizon: int
    """Chunk step."""
    method: str
    """Of the landscape."""
    attention: str | None = None
    """Of the attention map; None for none."""
    pose: tuple[float, ...] | None = None
    """Simulator state to put the scene into; the recorded one when None."""

    def __post_init__(self) -> None:
        if not self.policies or len(set(self.policies)) < len(self.policies):
            raise ValueError(f"policies {list(self.policies)}: give each policy once, at least one")
        if self.method not in METHODS:
            raise ValueError(f"method {self.method!r}: choose from {', '.join(METHODS)}")
        if self.attention is not None and self.attention not in ATTENTION_METHODS:
            raise ValueError(
                f"attention {self.attention!r}: choose from {', '.join(ATTENTION_METHODS)}, or null"
            )
        if self.pose is not None and not all(map(math.isfinite, self.pose)):
            raise ValueError(f"pose {list(self.pose)}: give finite numbers")

    @classmethod
    def read(cls, body: Any) -> "Question":
        """Read a question as the page sends it.

        Raises:
            ValueError: Naming the key, its value and what it should be.
        """
        if not isinstance(body, dict):
            raise ValueError(f"question {body!r}: send a JSON object")
        return cls(
            policies=tuple(_whole("policies", each) for each in _list("policies", body)),
            episode=_whole("episode", body.get("episode")),
            frame=_whole("frame", body.get("frame")),
            horizon=_whole("horizon", body.get("horizon")),
            method=str(body.get("method")),
            attention=None if body.get("attention") is None else str(body["attention"]),
            pose=None
            if body.get("pose") is None
            else tuple(_number("pose", each) for each in _list("pose", body)),
        )


def _list(key: str, body: Mapping[str, Any]) -> list[Any]:
    if not isinstance(body.get(key), list):
        raise ValueError(f"{key} {body.get(key)!r}: give a list")
    return body[key]


def _whole(key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{key} {value!r}: give a whole number from 0 on")
    return value


def _number(key: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{key}: {value!r} is no number")
    return float(value)


# Poses


@dataclass(frozen=True)
class Placed:
    """Where agent and T are put, and what had to be changed for it."""

    state: Float[np.ndarray, " 5"]
    """Agent x, y, T x, y in px, angle in rad."""
    clipped: tuple[str, ...]
    """Objects that were brought back onto the board."""

    @property
    def overlap_px(self) -> float:
        """How deep the agent's disc reaches into the T; 0 where they do not touch."""
        (distance,) = distance_to_t_px(self.state[None, :2], self.state[2:]).tolist()
        return max(AGENT_RADIUS_PX - distance, 0.0)


def place(state: Float[np.ndarray, " _"], task: Task) -> Placed:
    """Bring a pose to what the simulator allows: targets on the board, the T between the walls.

    Agent and T may overlap: the simulator draws that, though it would not stay so.

    Args:
        state: Agent x, y, T x, y in px, angle in rad.
        task: PushT.

    Raises:
        ValueError: If there are not five finite numbers.
    """
    if state.shape != (5,) or not np.isfinite(state).all():
        raise ValueError(
            f"pose {state.tolist()}: give agent x, y, T x, y in px and the T's angle in rad"
        )
    allowed = state.copy()
    allowed[:2] = task.clip_actions(state[:2])
    corners = t_corners(state[None])[0]
    low, high = WALLS_PX
    allowed[2:4] += np.maximum(low - corners.min(0), 0) - np.maximum(corners.max(0) - high, 0)
    moved = {"agent": slice(2), "block": slice(2, 4)}
    return Placed(
        allowed,
        tuple(name for name, part in moved.items() if (allowed[part] != state[part]).any()),
    )


def t_corners(states: Float[np.ndarray, "pose 5"]) -> Float[np.ndarray, "pose corner 2"]:
    """Corners of the T on the board, px."""
    angle = states[:, 4, None]
    x, y = np.array(T_OUTLINE_PX).T
    turned = np.stack(
        [np.cos(angle) * x - np.sin(angle) * y, np.sin(angle) * x + np.cos(angle) * y], axis=-1
    )
    return states[:, None, 2:4] + turned


@dataclass(frozen=True)
class DemonstratedPoses:
    """Poses that demonstrations went through: how far is another one from them?

    The distance of two poses is the way of the agent or the mean way of the T's corners, whichever
    is longer.
    """

    states: Float[np.ndarray, "pose 5"]
    episodes: Float[np.ndarray, " pose"]
    """Number of the episode of each."""

    @cached_property
    def corners(self) -> Float[np.ndarray, "pose corner 2"]:
        """Corners of the T in each pose."""
        return t_corners(self.states)

    def distance_px(self, state: Float[np.ndarray, " 5"]) -> Float[np.ndarray, " pose"]:
        """From a pose to each of these."""
        agent = np.linalg.norm(self.states[:, :2] - state[:2], axis=-1)
        way = np.linalg.norm(self.corners - t_corners(state[None]), axis=-1)
        return np.maximum(agent, reduce(way, "pose corner -> pose", "mean"))

    @cached_property
    def usual_px(self) -> tuple[float, float]:
        """Median and 95 % quantile of how far recorded frames lie from all other episodes.

        Infinite where there is only one episode.
        """
        rows = np.linspace(0, len(self.states) - 1, min(N_YARDSTICK_FRAMES, len(self.states)))
        nearest = [
            np.min(
                self.distance_px(self.states[row]),
                where=self.episodes != self.episodes[row],
                initial=np.inf,
            )
            for row in rows.round().astype(int)
        ]
        # Between two infinities there is no quantile.
        middle, far = np.quantile(nearest, [0.5, 0.95], method="higher").tolist()
        return middle, far


# One policy


@dataclass(frozen=True)
class Subject:
    """One policy with the demonstrations as it sees them, and the simulator that draws for it."""

    name: str
    loaded: LoadedPolicy
    view: SamplingPolicyView
    demonstrations: DemonstrationDataModule
    """Described, with no frame read: copies of it read single episodes."""
    task: Task | None
    env: PushT | None
    """Draws poses; None where nothing can be moved."""
    why_fixed: str
    """Why nothing can be moved; empty where it can."""
    device: str
    n_samples: int
    seed: int
    kept: dict[int, Batch] = field(default_factory=dict)
    """Episodes read last."""

    def load(self, episodes: Sequence[int]) -> DemonstrationDataModule:
        """Read some episodes, without looking through the data set again."""
        data = copy(self.demonstrations)
        lengths = data.source.episode_lengths
        chosen = {*episodes}
        if max(lengths[number] for number in chosen) < self.view.chunk_size:
            # A data module refuses episodes that are all shorter than a chunk.
            chosen.add(max(lengths, key=lambda number: lengths[number]))
        data.split = {"by": "explorer", "train": sorted(chosen), "val": []}
        data.setup()
        return data

    def episode(self, number: int) -> Batch:
        """All frames of an episode, on the CPU.

        Raises:
            ValueError: If there is none of that number.
        """
        lengths = self.demonstrations.source.episode_lengths
        if number not in lengths:
            raise ValueError(
                f"episode {number}: the data set has {len(lengths)} episodes, {min(lengths)} to "
                f"{max(lengths)}"
            )
        batch = self.kept.pop(number, None) or self.load([number]).episode(number)
        self.kept[number] = batch
        while len(self.kept) > N_KEPT_EPISODES:
            self.kept.pop(next(iter(self.kept)))
        return batch

    def recorded(self, question: Question) -> Batch:
        """The frame that is asked about.

        Raises:
            ValueError: If the episode is shorter.
        """
        episode = self.episode(question.episode)
        if question.frame >= len(episode):
            raise ValueError(
                f"frame {question.frame}: episode {question.episode} has frames 0 to "
                f"{len(episode) - 1}"
            )
        return episode.rows(slice(question.frame, question.frame + 1))

    def drawn(self, recorded: Batch, state: Float[np.ndarray, " 5"]) -> Batch:
        """The frame as it would be with agent and T elsewhere: nothing was demonstrated there.

        A policy that sees a history sees the same instant again and again, as at a start.

        Raises:
            ValueError: If nothing can be moved.
        """
        if self.env is None:
            raise ValueError(f"pose: nothing can be moved for {self.name}: {self.why_fixed}")
        self.env.reset_to(state)
        return replace(
            recorded,
            observation=self._as_observed(self.env.observe()),
            actions=torch.zeros_like(recorded.actions),
            action_is_pad=torch.ones_like(recorded.action_is_pad),
            simulator_state=torch.from_numpy(state)[None],
        )

    def _as_observed(self, seen: EnvironmentObservation) -> Observation:
        n_obs_steps = self.view.n_obs_steps

        def batched(values: Tensor) -> Tensor:
            if n_obs_steps == 1:
                return values[None]
            return repeat(values, "... -> 1 obs_step ...", obs_step=n_obs_steps)

        schema = self.view.data_schema
        return Observation(
            # Views in the memory order of recorded pictures: equal pictures, equal actions.
            images={
                name: rearrange(
                    batched(torch.from_numpy(seen["images"][name])),
                    "... height width rgb -> ... rgb height width",
                )
                for name in schema.cameras
            },
            state=batched(torch.from_numpy(seen["state"])) if schema.state_dim else None,
            environment_state=(
                batched(torch.from_numpy(seen["environment_state"]))
                if schema.environment_state_dim
                else None
            ),
        )

    @cached_property
    def trained_on(self) -> TrainingData | None:
        """What the policy was trained on; None if it does not say."""
        return training_data(self.loaded)

    @cached_property
    def split(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Episodes that the policy was trained on and held-out ones; None where not known."""
        trained_on, first = self.trained_on, min(self.demonstrations.source.episode_lengths)
        if trained_on is None or not trained_on.is_in(self.load([first])):
            return None
        return trained_on.train, trained_on.val

    @property
    def calibration_note(self) -> str:
        """Why the scale may be too small; empty where it is of held-out episodes."""
        if self.split is not None:
            return "" if self.split[1] else "the policy was trained on them: they flatter it"
        if self.trained_on is not None:
            return "the policy says that it was trained on other data"
        return "the policy does not say what it was trained on: they may flatter it"

    @cached_property
    def calibration_episodes(self) -> tuple[int, ...]:
        """What the scale is fitted on: held-out episodes where the policy says which.

        Every other one, so that there are held-out episodes that it is not fitted on.
        """
        held_out = () if self.split is None else self.split[1]
        available = held_out or tuple(sorted(self.demonstrations.source.episode_lengths))
        return _spread(available[1::2] or available, N_CALIBRATION_EPISODES)

    @cached_property
    def calibration(self) -> Calibration | None:
        """The policy's answers on those episodes; None where its kernels are not fitted."""
        if not is_calibrated(self.view):
            return None
        data = self.load(self.calibration_episodes)
        episodes = [data.episode(number) for number in self.calibration_episodes]
        frames = Frames.spread(episodes, N_CALIBRATION_FRAMES).to(self.device)
        return Calibration(frames, self.predict(frames.batch, range(self.view.chunk_size)))

    def predict(self, batch: Batch, queries: Sequence[int]) -> Predictions:
        """Ask the policy."""
        return predict_frames(self.view, batch, queries, self.n_samples, self.seed)

    def scale(self, predictions: Predictions) -> Float[Tensor, "#frame query action"]:
        """Of the kernels.

        Raises:
            ValueError: If the calibration episodes end before a chunk step.
        """
        if self.calibration is None or self.calibration.predictions is None:
            return kernel_scale(self.view, predictions, None)
        if predictions.queries not in self._scales:
            fitted_on = self.calibration.predictions.at(predictions.queries)
            self._scales[predictions.queries] = kernel_scale(self.view, predictions, fitted_on)
        return self._scales[predictions.queries]

    @cached_property
    def _scales(self) -> dict[tuple[int, ...], Tensor]:
        return {}

    @cached_property
    def methods(self) -> dict[str, tuple[Method, str]]:
        """Landscape methods, and why the policy cannot answer; empty where it can."""
        built = {name: build() for name, build in METHODS.items()}
        if (coefficient := self.loaded.temporal_ensemble_coeff) is not None:
            built[Belief.name] = Belief(coefficient)
        return {name: (method, _refusal(method.check, self.view)) for name, method in built.items()}


def _refusal(check: Any, view: SamplingPolicyView) -> str:
    """What a check says against a policy; empty for nothing."""
    try:
        check(view)
    except ValueError as error:
        return str(error)
    return ""


def _spread(numbers: Sequence[int], n_wanted: int) -> tuple[int, ...]:
    """Some of the numbers, evenly spread; all where there are fewer."""
    places = np.linspace(0, len(numbers) - 1, min(n_wanted, len(numbers))).round().astype(int)
    return tuple(numbers[place] for place in places.tolist())


# The tab


class Explorer:
    """Answers the page's questions, one after the other.

    Args:
        subjects: Policies on the same data set; at least one.
        grid: The board.
    """

    def __init__(self, subjects: Sequence[Subject], grid: Grid | None = None) -> None:
        if not subjects:
            raise ValueError("the explorer has no policy; give at least one")
        self.subjects = tuple(subjects)
        self.grid = grid or Grid()
        # Policies with hooks and simulators are not re-entrant. A thread of their own also keeps
        # PyTorch from starting a crew of threads for every thread of the server.
        self._worker = ThreadPoolExecutor(1, "explorer")

    @classmethod
    def open(
        cls,
        policies: Sequence[LoadedPolicy],
        names: Sequence[str],
        dataset_repo_id: str,
        task: type[Task],
        device: str = "cpu",
        n_samples: int = 64,
        seed: int = 0,
    ) -> "Explorer":
        """Prepare policies for questions; no frame is read yet.

        Args:
            policies: Loaded on ``device``, not used by anybody else meanwhile.
            names: What the page calls them.
            dataset_repo_id: HDF5 file, folder of them, LeRobot folder, or hub id.
            task: Simulator that draws poses, where it is what a policy was made for.
            device: Where the policies are.
            n_samples: Action chunks drawn per answer (K).
            seed: Of the drawn chunks.

        Raises:
            ValueError: If names repeat, a policy draws no chunks, actions are no places on the
                page's board, or data do not fit a policy.
        """
        if len(set(names)) < len(names) or len(names) != len(policies):
            raise ValueError(f"names {list(names)}: give each of {len(policies)} policies its own")
        if n_samples < 2:
            raise ValueError(f"n_samples {n_samples}: give at least 2")
        subjects = []
        for policy, name in zip(policies, names, strict=True):
            view = policy.view
            if not isinstance(view, SamplingPolicyView):
                raise ValueError(f"{name}: it draws no action chunks, so it has no landscape")
            if (n_dims := view.data_schema.action_dim) != 2:
                raise ValueError(
                    f"{name}: its actions have {n_dims} dimensions, and the page draws boards of "
                    "two; use analyze.py landscape"
                )
            if why := _refusal(Likelihood().check, view):
                raise ValueError(f"{name}: {why}")
            data = open_demonstrations(dataset_repo_id, view, progress=False)
            made, env, why_fixed = _stage(task, view, data)
            _check_board(made, policy.action_unit)
            subjects.append(
                Subject(name, policy, view, data, made, env, why_fixed, device, n_samples, seed)
            )
        return cls(subjects)

    def close(self) -> None:
        """Free simulators and the thread; questions that wait are dropped."""
        self._worker.shutdown(cancel_futures=True)
        for subject in self.subjects:
            if subject.env is not None:
                subject.env.close()

    def routes(self) -> list[Route]:
        """What the page asks, below ``/api/explorer/``."""

        async def session(request: Request) -> Response:
            return JSONResponse(await self._in_turn(self.session))

        async def answer(request: Request) -> Response:
            body = parse_json(
                await request.body(),
                lambda problem: ValueError(f"the question {problem}: send a JSON object"),
            )
            question = Question.read(body)
            return JSONResponse(await self._in_turn(self.answer, question))

        return [
            Route("/api/explorer/session", session),
            Route("/api/explorer/answer", answer, methods=["POST"]),
        ]

    async def _in_turn(self, call: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._worker, call, *arguments)

    def session(self) -> dict[str, Any]:
        """What can be chosen, in plain values."""
        lengths = self.subjects[0].demonstrations.source.episode_lengths
        movable = self._mover is not None
        return {
            "episodes": [[number, length] for number, length in sorted(lengths.items())],
            "board_px": BOARD_PX,
            "agent_radius_px": AGENT_RADIUS_PX if movable else None,
            "t_outline_px": [list(corner) for corner in T_OUTLINE_PX] if movable else None,
            "n_samples": self.subjects[0].n_samples,
            "colours": _png(colour_table("viridis")[None]),
            "policies": [self._described(subject) for subject in self.subjects],
        }

    def _described(self, subject: Subject) -> dict[str, Any]:
        view, split = subject.view, subject.split
        return {
            "name": subject.name,
            "chunk_size": view.chunk_size,
            "why_fixed": subject.why_fixed,
            "is_historic": view.n_obs_steps > 1,
            "train": None if split is None else list(split[0]),
            "val": None if split is None else list(split[1]),
            "resolution_note": resolution_note(view),
            "methods": [
                {
                    "name": name,
                    "unit": method.unit,
                    "range": list(method.value_range),
                    "reason": reason,
                    "reason_when_moved": OF_RECORDED_FRAMES.get(name, ""),
                }
                for name, (method, reason) in subject.methods.items()
            ],
            "attention": [
                {
                    "name": name,
                    "title": TITLES[name],
                    "is_live": name not in ON_REQUEST,
                    "reason": _refusal(method().check, view),
                }
                for name, method in ATTENTION_METHODS.items()
            ],
        }

    @property
    def _mover(self) -> Subject | None:
        """The first policy whose scene can be moved."""
        return next((subject for subject in self.subjects if subject.env is not None), None)

    def answer(self, question: Question) -> dict[str, Any]:
        """Compute all that the page shows of one pose.

        Raises:
            ValueError: If there is no such policy, episode, frame or chunk step, or the pose is
                none of the simulator's.
        """
        began = time.perf_counter()
        if beyond := [place for place in question.policies if place >= len(self.subjects)]:
            raise ValueError(f"policies {beyond}: there are 0 to {len(self.subjects) - 1}")
        subjects = [self.subjects[place] for place in question.policies]
        for subject in subjects:
            if question.horizon >= subject.view.chunk_size:
                raise ValueError(
                    f"horizon {question.horizon}: {subject.name} predicts chunk steps 0 to "
                    f"{subject.view.chunk_size - 1}"
                )
        placed = self._placed(question, subjects[0])
        scene = self._scene(question, subjects[0], placed)
        answers = [self._answer_of(subject, question, placed) for subject in subjects]
        return {
            **scene,
            "answers": answers,
            "elapsed_ms": 1000 * (time.perf_counter() - began),
        }

    def _placed(self, question: Question, subject: Subject) -> Placed | None:
        """Where things were moved to; None where nothing was."""
        if question.pose is None:
            return None
        mover = self._mover
        if mover is None or mover.task is None:
            raise ValueError(f"pose: nothing can be moved: {subject.why_fixed}; leave it out")
        placed = place(np.array(question.pose, np.float64), mover.task)
        was = _state_of(subject.recorded(question))
        return None if was is not None and np.array_equal(placed.state, was) else placed

    def _scene(self, question: Question, subject: Subject, placed: Placed | None) -> dict[str, Any]:
        """The picture of the board, the pose, and how familiar it is."""
        recorded = subject.recorded(question)
        was = _state_of(recorded)
        mover = self._mover
        if mover is None or mover.env is None or was is None:
            picture = next(recorded_pictures(recorded.observation), None)
            return {
                "scene": None if picture is None else _png(picture),
                "pose": None,
                "is_moved": False,
            }
        state = was if placed is None else placed.state
        mover.env.reset_to(state)
        shown = placed or Placed(was, ())
        nearest = self.demonstrated.distance_px(state).min()
        middle, far = self.demonstrated.usual_px
        return {
            "scene": _png(mover.env.frame(BOARD_PX)),
            "pose": state.tolist(),
            "recorded_pose": was.tolist(),
            "is_moved": placed is not None,
            "clipped": list(shown.clipped),
            "overlap_px": shown.overlap_px,
            "familiar": {
                "nearest_px": float(nearest),
                # JSON has no infinity.
                "median_px": middle if math.isfinite(middle) else None,
                "q95_px": far if math.isfinite(far) else None,
                "n_poses": len(self.demonstrated.states),
                "n_episodes": len(np.unique(self.demonstrated.episodes)),
            },
        }

    @cached_property
    def demonstrated(self) -> DemonstratedPoses:
        """Poses of demonstrations, of training episodes where a policy says which."""
        subject = self._mover
        assert subject is not None
        available = sorted(subject.demonstrations.source.episode_lengths)
        trained_on = available if subject.split is None else subject.split[0]
        episodes = _spread(trained_on, N_POSE_EPISODES)
        store = subject.load(episodes).store
        rows = [store.rows(number) for number in episodes]
        return DemonstratedPoses(
            np.concatenate([_float64(store.columns["simulator_state"][row]) for row in rows]),
            np.concatenate(
                [
                    np.full(row.stop - row.start, float(number))
                    for row, number in zip(rows, episodes, strict=True)
                ]
            ),
        )

    def _answer_of(
        self, subject: Subject, question: Question, placed: Placed | None
    ) -> dict[str, Any]:
        """What one policy answers; a part that it cannot answer is a reason."""
        recorded = subject.recorded(question)
        began = time.perf_counter()
        try:
            batch = recorded if placed is None else subject.drawn(recorded, placed.state)
        except ValueError as error:
            return {"name": subject.name, "reason": str(error)}
        batch = batch.to(subject.device)
        with torch.no_grad():
            predictions = self._predictions(subject, question, batch)
            predicted = time.perf_counter()
            landscape = self._landscape(subject, question, batch, predictions, placed is not None)
        scored = time.perf_counter()
        attention = _attention(subject, question, batch)
        explained = time.perf_counter()
        return {
            "name": subject.name,
            "landscape": landscape,
            "attention": attention,
            "redrawn_levels": None if placed is None else self._redrawn_levels(subject, question),
            "elapsed_ms": {
                "policy": 1000 * (predicted - began),
                "landscape": 1000 * (scored - predicted),
                "attention": 1000 * (explained - scored),
            },
        }

    def _predictions(self, subject: Subject, question: Question, batch: Batch) -> Predictions:
        """Samples of the steps that paths are drawn of, and of the horizon."""
        method, _ = subject.methods[question.method]
        chunk_size = subject.view.chunk_size
        if method.needs_whole_chunk or chunk_size <= N_PATH_STEPS:
            return subject.predict(batch, range(chunk_size))
        steps = np.linspace(0, chunk_size - 1, N_PATH_STEPS).round().astype(int).tolist()
        return subject.predict(batch, sorted({*steps, question.horizon}))

    def _landscape(
        self,
        subject: Subject,
        question: Question,
        batch: Batch,
        predictions: Predictions,
        is_moved: bool,
    ) -> dict[str, Any]:
        horizon = question.horizon
        method, reason = subject.methods[question.method]
        if is_moved and not reason:
            reason = OF_RECORDED_FRAMES.get(question.method, "")
        place_ = predictions.queries.index(horizon)
        steps = [query for query in predictions.queries if query <= horizon]
        upto = len(steps)
        answer: dict[str, Any] = {
            "prediction": predictions.point[0, place_].tolist(),
            "path": _points(predictions.point[0, :upto]),
            "samples": _points(predictions.samples[0, :N_DRAWN_PATHS, :upto]),
            "demonstrated": None,
            "demonstrated_path": [],
        }
        if bool(predictions.is_valid[0, place_]):
            answer["demonstrated"] = predictions.expert[0, place_].tolist()
            answer["demonstrated_path"] = _points(predictions.expert[0, :upto])
        if reason:
            return {**answer, "reason": reason}
        try:
            probe = self._probe(subject, question, batch, predictions, method)
            found = method.landscape(probe)
        except ValueError as error:
            return {**answer, "reason": str(error)}
        # A method with a past shows the last frame.
        mass, thresholds = found.mass[-1, 0].numpy(), found.thresholds[-1, 0].numpy()
        scores = found.scores[-1, 0].numpy()
        cell_px = BOARD_PX / self.grid.resolution
        return {
            **answer,
            "unit": found.unit,
            "range": list(found.value_range),
            "heat": _png(colours(scores, found.value_range, colour_table("viridis"))),
            "regions": [
                {"level": level, "lines": [_points(cell_px * line) for line in lines]}
                for level, lines in zip(
                    found.levels, region_outlines(mass, thresholds), strict=True
                )
            ],
            "numbers": self._numbers(subject, question, predictions),
            "calibration": self._calibration(subject, question, predictions),
        }

    def _probe(
        self,
        subject: Subject,
        question: Question,
        batch: Batch,
        predictions: Predictions,
        method: Method,
    ) -> Probe:
        """What the method is asked about: the frame, with its past where that counts."""
        if question.method == Belief.name:
            episode = subject.episode(question.episode)
            first = max(0, question.frame + 1 - subject.view.chunk_size)
            batch = episode.rows(slice(first, question.frame + 1)).to(subject.device)
            predictions = subject.predict(batch, range(subject.view.chunk_size))
        elif not method.needs_whole_chunk:
            predictions = predictions.at([question.horizon])
        scale = subject.scale(predictions)
        return Probe(subject.view, batch, predictions, scale, (question.horizon,), self.grid)

    def _numbers(
        self, subject: Subject, question: Question, predictions: Predictions
    ) -> dict[str, Any]:
        """Of the likelihood, whichever method is drawn, as in ``analyze.py landscape``."""
        shown = predictions.at([question.horizon])
        mixture = shown.mixture(subject.scale(shown))
        mass = mixture.cell_mass(self.grid)[0, 0]
        on_board = mass / mass.sum()
        entropy = -torch.special.xlogy(on_board, on_board / self.grid.cell_area).sum()
        nll = None
        if bool(shown.is_valid[0, 0]):
            nll = -float(mixture.log_density(shown.expert[:, :, None])[0, 0, 0])
        return {
            "nll_nats": nll,
            "uniform_nats": -self.grid.log_uniform,
            "entropy_nats": float(entropy),
            "area90_px2": float(region_area(mass, AREA_LEVEL, self.grid)),
            "modes": int(modes(mass).count),
            "out_of_board": 1 - float(mass.sum()),
        }

    def _calibration(
        self, subject: Subject, question: Question, predictions: Predictions
    ) -> dict[str, Any]:
        """Where the width of the kernels comes from."""
        scale = subject.scale(predictions.at([question.horizon]))[0, 0].tolist()
        if subject.calibration is None:
            return {"scale_px": scale, "is_fitted": False}
        episodes = subject.calibration_episodes
        return {
            "scale_px": scale,
            "is_fitted": True,
            "episodes": list(episodes),
            "n_frames": len(subject.calibration.frames),
            "is_held_out": subject.split is not None and bool(subject.split[1]),
            "note": subject.calibration_note,
            "is_shown": question.episode in episodes,
        }

    def _redrawn_levels(self, subject: Subject, question: Question) -> float | None:
        """Mean difference of the recorded picture from the simulator's drawing, grey levels of 255.

        None where the recorded state is not known.
        """
        recorded = subject.recorded(question)
        state = _state_of(recorded)
        if state is None:
            return None
        drawn = subject.drawn(recorded, state).observation.images
        differences = [
            np.abs(
                newest_pictures(recorded.observation.images[name]).astype(int)
                - newest_pictures(drawn[name])
            ).mean()
            for name in drawn
        ]
        return float(np.mean(differences)) if differences else None


def _stage(
    task: type[Task], view: SamplingPolicyView, data: DemonstrationDataModule
) -> tuple[Task | None, PushT | None, str]:
    """The simulator that draws for a policy, or why there is none."""
    try:
        made = task.for_policy(view.data_schema)
    except ValueError as error:
        return None, None, str(error)
    env = made.make()
    if not isinstance(env, PushT):
        env.close()
        return made, None, f"agent and T are PushT's, and the task is {made.name}"
    dims = data.source.columns.get("simulator_state", 0)
    why = ""
    if dims != len(env.state()):
        why = (
            "the data hold no states of the simulator (agent x, y, T x, y, angle), which say "
            "where things are; give demonstrations with them"
        )
    elif missing := {*view.data_schema.cameras} - {*env.observe()["images"]}:
        why = f"the simulator has no camera {sorted(missing)}"
    if why:
        env.close()
        return made, None, why
    return made, env, ""


def _check_board(task: Task | None, action_unit: str) -> None:
    """Refuse actions that are no places on the board that the page draws.

    Raises:
        ValueError: If the task, or the policy's unit, says so.
    """
    board = Grid()
    reach = board.low, board.high
    if isinstance(task, DescribedActions):
        lows, highs = zip(*((each.low, each.high) for each in task.action_dimensions), strict=True)
        reach, unit = (lows, highs), task.action_dimensions[0].unit
    else:
        unit = action_unit
    if unit != "px" or reach != (board.low, board.high):
        name = "the policy's task" if task is None else f"task {task.name}"
        raise ValueError(
            f"the page draws PushT's board, {board.low} to {board.high} px, and actions of {name} "
            f"are in {unit or 'no unit'}; use analyze.py landscape"
        )


def _state_of(batch: Batch) -> Float[np.ndarray, " simulator"] | None:
    return None if batch.simulator_state is None else _float64(batch.simulator_state[0])


def _float64(values: Tensor) -> np.ndarray:
    return values.double().cpu().numpy()


def _attention(subject: Subject, question: Question, batch: Batch) -> dict[str, Any]:
    """The policy's own pictures, under a map where one is asked for and can be made."""
    plain = {
        "cameras": [
            {"name": name, "picture": _png(newest_pictures(images)[0])}
            for name, images in batch.observation.images.items()
        ]
    }
    if question.attention is None:
        return plain
    method = ATTENTION_METHODS[question.attention]()
    if reason := _refusal(method.check, subject.view):
        return {**plain, "reason": reason}
    found = explain(method, subject.view, batch.observation, Target((question.horizon,)))
    (scene,) = attention_scenes(found, batch.observation)
    style = AttentionStyle()
    value_range = scale_range(scene, style)
    table = colour_table(style.colormap)
    palette = share_colours(tuple(scene.shares))
    return {
        "cameras": [
            {
                "name": name,
                "picture": _png(
                    overlay(
                        camera.picture,
                        camera.values,
                        value_range,
                        table,
                        style.overlay_alpha,
                        cell_px=camera.cell_px,
                    )
                ),
            }
            for name, camera in scene.cameras.items()
        ],
        "is_uniform": is_uniform(value_range),
        "shares": [
            {"name": name, "share": share, "colour": "#{:02x}{:02x}{:02x}".format(*palette[name])}
            for name, share in scene.shares.items()
        ],
        **_attention_numbers(found, scene),
    }


def _attention_numbers(found: Attribution, scene: AttentionScene) -> dict[str, Any]:
    """How picky a map is, and how far it may be trusted."""
    picked = numbers(found)
    error = found.completeness_error
    return {
        "concentration": picked.get("concentration"),
        "n_cells": sum(camera.values.size for camera in scene.cameras.values()),
        "completeness_error": None if error is None else float(error[0]),
    }


def _points(points: Any) -> list[Any]:
    """Coordinates to a tenth of a px, which nobody can see."""
    return np.asarray(points, np.float64).round(1).tolist()


def _png(picture: UInt8[np.ndarray, "height width 3"]) -> str:
    """A picture as an address that a page can show."""
    return f"data:image/png;base64,{b64encode(encode_png(picture)).decode()}"
