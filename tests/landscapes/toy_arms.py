"""Planar arms seen from above: actions of many dimensions, whose places in a picture are known."""

from dataclasses import dataclass
from pathlib import Path

import cv2
import h5py
import numpy as np

from envs.task import ActionDimension, EnvironmentObservation, Task, Transition
from policies.interface import DataSchema

N_LINKS = 7
LINK = 0.1
"""Length of a link; a camera sees x from -1 to 1 and y from -0.75 to 0.75, upwards."""
BASES = ((-0.4, -0.4), (0.4, -0.4))


class ToyArms:
    """Two arms, each of links one behind the other; an action is the angle of every joint, rad.

    The camera ``top`` stands still; ``side`` is 0.1 further right for every rad of the first joint.
    """

    end_effectors = ("left", "right")

    def __init__(self, n_links: int = N_LINKS):
        self.n_links = n_links
        self.joints = np.zeros(2 * n_links)

    def reset(self, seed: int) -> None:
        self.joints = np.random.default_rng(seed).uniform(-0.2, 0.2, 2 * self.n_links)

    def reset_to(self, state: np.ndarray) -> None:
        self.joints = np.array(state, dtype=np.float64)

    def state(self) -> np.ndarray:
        return self.joints.copy()

    def observe(self) -> EnvironmentObservation:
        return {
            "images": {camera: self.picture(camera, (24, 32)) for camera in ("top", "side")},
            "state": self.joints.astype(np.float32),
            "environment_state": np.zeros(1, np.float32),
            "simulator_state": self.state(),
        }

    def step(self, action: np.ndarray) -> Transition:
        self.joints = np.array(action, dtype=np.float64)
        return Transition(0.0, 0.0, False)

    def frame(self, size_px: int, target: np.ndarray | None = None) -> np.ndarray:
        return self.picture("top", (size_px, size_px))

    def close(self) -> None:
        pass

    def chains(self, actions: np.ndarray) -> np.ndarray:
        """Places of all joints, [*batch, arm, joint, 2]."""
        angles = actions.reshape(*actions.shape[:-1], 2, self.n_links).cumsum(-1)
        steps = LINK * np.stack([np.cos(angles), np.sin(angles)], -1)
        ends = np.array(BASES)[:, None] + steps.cumsum(-2)
        start = np.broadcast_to(np.array(BASES)[:, None], (*ends.shape[:-2], 1, 2))
        return np.concatenate([start, ends], -2)

    def pixels(self, camera: str, places: np.ndarray, size_px: tuple[int, int]) -> np.ndarray:
        if camera not in ("top", "side"):
            raise ValueError(f"camera {camera!r}")
        height, width = size_px
        right = 0.1 * self.joints[0] if camera == "side" else 0.0
        x, y = places[..., 0] - right, places[..., 1]
        return np.stack([(x + 1) / 2 * width, (0.75 - y) / 1.5 * height], -1)

    def project_actions(
        self, camera: str, actions: np.ndarray, size_px: tuple[int, int]
    ) -> np.ndarray:
        return self.pixels(camera, self.chains(actions)[..., -1, :], size_px)

    def picture(self, camera: str, size_px: tuple[int, int]) -> np.ndarray:
        picture = np.full((*size_px, 3), 90, np.uint8)
        for chain in self.pixels(camera, self.chains(self.joints), size_px):
            cv2.polylines(picture, [np.rint(chain).astype(np.int32)], False, (210, 210, 210), 2)
        return picture


@dataclass(frozen=True)
class ToyArmsTask(Task):
    """For ``--task toy_arms.ToyArmsTask``."""

    max_steps: int = 20
    success_thresholds: tuple[float, ...] = (0.5,)

    @property
    def name(self) -> str:
        return "toy_arms"

    @property
    def fps(self) -> float:
        return 20.0

    @property
    def action_dimensions(self) -> tuple[ActionDimension, ...]:
        return tuple(
            ActionDimension(f"{side}_{joint}", "rad", -3.0, 3.0)
            for side in ("left", "right")
            for joint in range(N_LINKS)
        )

    @classmethod
    def for_policy(cls, schema: DataSchema) -> "ToyArmsTask":
        if schema.action_dim != 2 * N_LINKS:
            raise ValueError("other arms")
        return cls()

    def make(self) -> ToyArms:
        return ToyArms()


def write_arms(path: Path, n_episodes: int = 4, length: int = 14, scale: int = 1) -> Path:
    """Arms that bend along smooth paths; the second joint of the right arm moves most of all."""
    rng = np.random.default_rng(0)
    arms = ToyArms()
    amplitude = rng.uniform(0.1, 0.3, 2 * N_LINKS)
    amplitude[[0, N_LINKS, N_LINKS + 1]] = 0.4, 0.7, 0.8
    with h5py.File(path, "w") as file:
        file.attrs["num_demos"] = n_episodes
        file.attrs["fps"] = 20
        for number in range(n_episodes):
            time = np.linspace(0, 2.5, length + 1)[:, None]
            phase = rng.uniform(0, 0.8, 2 * N_LINKS)
            joints = amplitude * np.sin(time + phase) + 0.1
            pictures: dict[str, list[np.ndarray]] = {"top": [], "side": []}
            for state in joints[:-1]:
                arms.reset_to(state)
                for camera, seen in pictures.items():
                    seen.append(arms.picture(camera, (24 * scale, 32 * scale)))
            group = file.create_group(f"demo_{number}")
            for camera, seen in pictures.items():
                group[f"observations/images/{camera}"] = np.stack(seen)
            group["observations/qpos"] = joints[:-1].astype(np.float32)
            group["observations/state"] = joints[:-1]
            noise = rng.normal(0, 0.01, joints[1:].shape)
            group["actions"] = (joints[1:] + noise).astype(np.float32)
    return path
