"""Small recordings in the layouts that robots leave behind, with known content."""

from pathlib import Path

import cv2
import h5py
import numpy as np


def pictures(length: int, height: int = 6, width: int = 8, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng([seed, length])
    return rng.integers(0, 256, (length, height, width, 3), dtype=np.uint8)


def smooth_pictures(length: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Pictures that survive JPEG: plain areas, red left and blue right, darker with time."""
    frames = np.zeros((length, height, width, 3), np.uint8)
    for step in range(length):
        frames[step, :, : width // 2, 0] = 250 - 20 * step
        frames[step, :, width // 2 :, 2] = 250 - 20 * step
    return frames


def numbers(length: int, dim: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, length, dim]).normal(size=(length, dim)).astype(np.float32)


def write_demos(path: Path, lengths=(5, 9, 7), cameras=None, dim: int = 2, fps: float = 10) -> Path:
    """The seed layout; several cameras when named, else one data set of pictures."""
    with h5py.File(path, "w") as file:
        file.attrs["num_demos"] = len(lengths)
        file.attrs["fps"] = fps
        for index, length in enumerate(lengths):
            group = file.create_group(f"demo_{index}")
            if cameras is None:
                group["observations/image"] = pictures(length, seed=index)
            for number, camera in enumerate(cameras or ()):
                group[f"observations/images/{camera}"] = pictures(length, seed=10 * number + index)
            group["observations/qpos"] = numbers(length, dim, index)
            group["observations/state"] = numbers(length, 5, 100 + index)
            group["actions"] = numbers(length, dim, 200 + index)
    return path


def write_aloha(
    folder: Path, lengths=(5, 6), compressed: bool = False, base: bool = False, cameras=("top",)
) -> Path:
    folder.mkdir()
    for index, length in enumerate(lengths):
        with h5py.File(folder / f"episode_{index}.hdf5", "w") as file:
            file.attrs["sim"] = not base
            file["observations/qpos"] = numbers(length, 14, index)
            file["observations/qvel"] = numbers(length, 14, 50 + index)
            file["action"] = numbers(length, 14, 100 + index)
            if base:
                file["base_action"] = numbers(length, 2, 150 + index)
            for camera in cameras:
                frames = smooth_pictures(length)
                if compressed:
                    file.attrs["compress"] = True
                    frames = as_padded_jpeg(frames)
                file[f"observations/images/{camera}"] = frames
            if compressed:
                file["compress_len"] = np.full((len(cameras), length), 1.0)
    return folder


def as_jpeg(frame: np.ndarray) -> np.ndarray:
    return cv2.imencode(".jpg", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))[1].ravel()


def as_padded_jpeg(frames: np.ndarray) -> np.ndarray:
    encoded = [as_jpeg(frame) for frame in frames]
    padded = np.zeros((len(frames), max(map(len, encoded)) + 7), np.uint8)
    for row, data in zip(padded, encoded, strict=True):
        row[: len(data)] = data
    return padded


def write_robomimic(
    path: Path, lengths=(5, 6, 4), masks: bool = True, libero: bool = False
) -> Path:
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = "{}"
        data.attrs["total"] = sum(lengths)
        if libero:
            data.attrs["bddl_file_name"] = "x.bddl"
            data.attrs["num_demos"] = len(lengths)
        for index, length in enumerate(lengths):
            group = data.create_group(f"demo_{index}")
            group.attrs["num_samples"] = length
            if libero:
                group["obs/agentview_rgb"] = pictures(length, seed=index)
                group["obs/joint_states"] = numbers(length, 7, index)
                group["obs/gripper_states"] = numbers(length, 2, index)
            else:
                group["obs/agentview_image"] = pictures(length, seed=index)
                group["obs/robot0_eef_pos"] = numbers(length, 3, index)
                group["obs/robot0_eef_quat"] = numbers(length, 4, index)
                group["obs/robot0_gripper_qpos"] = numbers(length, 2, index)
                group["obs/object"] = numbers(length, 10, index)
            group["actions"] = numbers(length, 7, 20 + index)
            group["states"] = numbers(length, 30, 40 + index)
        file["mask/train"] = np.array([b"demo_0", b"demo_2"])
        file["mask/valid"] = np.array([b"demo_1"])
    return path
