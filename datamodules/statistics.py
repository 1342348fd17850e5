"""Moments, ranges and quantiles of the training split, accumulated in float64."""

import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64, UInt8

from datamodules.frame_store import FrameStore
from policies.interface import DataStatistics, FeatureStatistics

QUANTILES = (0.01, 0.99)
IMAGE_SAMPLE_PX = 2**23
"""Pixels per camera that image statistics are taken from."""
IMAGE_SAMPLE_FRAMES = 512
"""Frames per camera that image statistics are taken from."""
RELATIVE_SAMPLE = 2**20
"""Relative actions that quantiles are taken from."""


def compute_statistics(
    store: FrameStore, episodes: Sequence[int], chunk_size: int, seed: int = 0
) -> DataStatistics:
    """Describe the training episodes.

    Actions and states count once per frame, so padding never enters. Relative actions
    a(t+k) - state(t) count once for each t and each k < chunk_size inside the episode. Standard
    deviations are those of the population and are zero for a constant dimension, which is warned
    of. Means, deviations, minima and maxima of low-dimensional features are exact; their quantiles
    are too, except those of relative actions, which come from :data:`RELATIVE_SAMPLE` seeded draws
    when there are more. Image statistics come from up to :data:`IMAGE_SAMPLE_FRAMES` seeded frames,
    thinned to :data:`IMAGE_SAMPLE_PX` pixels on a regular grid.

    Args:
        store: Frames of all episodes.
        episodes: Numbers of the training episodes.
        chunk_size: Steps of an action chunk.
        seed: Of the samples.

    Returns:
        Statistics in data units, images in 0..1.
    """
    rows = [store.rows(number) for number in episodes]
    columns = {
        name: [values[row].cpu().numpy().astype(np.float64) for row in rows]
        for name, values in store.columns.items()
    }
    actions, states = columns["action"], columns.get("state")
    described = {
        name: describe(np.concatenate(columns[name]), name)
        for name in ("action", "state", "environment_state")
        if name in columns
    }
    relative = None
    if states is not None and states[0].shape[1] == actions[0].shape[1]:
        relative = _describe_relative(actions, states, chunk_size, seed)
    return DataStatistics(
        images={name: _describe_images(store, name, rows, seed) for name in store.shapes.cameras},
        state=described.get("state"),
        action=described["action"],
        relative_action=relative,
        environment_state=described.get("environment_state"),
    )


def describe(values: Float64[np.ndarray, "sample dim"], name: str) -> FeatureStatistics:
    """Describe each dimension of a feature, and warn of constant ones."""
    low, high = np.quantile(values, QUANTILES, axis=0)
    constant = np.flatnonzero(values.min(axis=0) == values.max(axis=0)).tolist()
    if constant:
        warnings.warn(
            f"{name} never changes in dimension {', '.join(map(str, constant))} of the training "
            "episodes; its standard deviation is 0",
            stacklevel=2,
        )
    # The mean of many equal numbers is off by rounding, which would make a constant's std positive.
    std = np.where(values.min(axis=0) == values.max(axis=0), 0.0, values.std(axis=0))
    return _statistics(values.mean(axis=0), std, values.min(axis=0), values.max(axis=0), low, high)


def _statistics(*values: Float[np.ndarray, " dim"]) -> FeatureStatistics:
    return FeatureStatistics(*(torch.from_numpy(np.float32(value)) for value in values))


def _pairs(
    actions: Float64[np.ndarray, "frame dim"],
    states: Float64[np.ndarray, "frame dim"],
    following: Int64[np.ndarray, " frame"],
    chunk_size: int,
) -> Iterator[Float64[np.ndarray, "pair dim"]]:
    for ahead in range(chunk_size):
        rows = np.flatnonzero(following >= ahead)
        if not len(rows):
            return
        yield actions[rows + ahead] - states[rows]


def _describe_relative(
    actions: list[Float64[np.ndarray, "_step dim"]],
    states: list[Float64[np.ndarray, "_step dim"]],
    chunk_size: int,
    seed: int,
) -> FeatureStatistics:
    following = np.concatenate([np.arange(len(action))[::-1] for action in actions])
    pairs = (np.concatenate(actions), np.concatenate(states), following, chunk_size)
    total = int(np.minimum(following + 1, chunk_size).sum())
    drawn = np.arange(total)
    if total > RELATIVE_SAMPLE:
        drawn = np.sort(np.random.default_rng(seed).integers(0, total, RELATIVE_SAMPLE))
    dim = actions[0].shape[1]
    sums, low, high = np.zeros(dim), np.full(dim, np.inf), np.full(dim, -np.inf)
    sample = np.empty((len(drawn), dim))
    start = taken = 0
    for relative in _pairs(*pairs):
        sums += relative.sum(axis=0)
        low = np.minimum(low, relative.min(axis=0))
        high = np.maximum(high, relative.max(axis=0))
        end = int(np.searchsorted(drawn, start + len(relative)))
        sample[taken:end] = relative[drawn[taken:end] - start]
        start, taken = start + len(relative), end
    mean = sums / total
    squares = np.zeros(dim)
    for relative in _pairs(*pairs):
        squares += np.square(relative - mean).sum(axis=0)
    std = np.where(low == high, 0.0, np.sqrt(squares / total))
    return _statistics(mean, std, low, high, *np.quantile(sample, QUANTILES, axis=0))


def _describe_images(
    store: FrameStore, camera: str, rows: list[slice], seed: int
) -> FeatureStatistics:
    frames = np.concatenate([np.arange(row.start, row.stop) for row in rows])
    if len(frames) > IMAGE_SAMPLE_FRAMES:
        rng = np.random.default_rng(seed)
        frames = np.sort(rng.choice(frames, IMAGE_SAMPLE_FRAMES, replace=False))
    height, width = store.shapes.cameras[camera]
    stride = max(1, int(np.ceil(np.sqrt(len(frames) * height * width / IMAGE_SAMPLE_PX))))
    counts = np.zeros((3, 256), np.int64)
    pictures = store.images[camera]
    for frame in frames.tolist():
        picture = pictures[frame, ::stride, ::stride].cpu().numpy()
        counts += _histograms(picture)
    return _describe_histograms(counts)


def _histograms(picture: UInt8[np.ndarray, "height width 3"]) -> Int64[np.ndarray, "3 256"]:
    return np.stack([np.bincount(picture[..., c].ravel(), minlength=256) for c in range(3)])


def _describe_histograms(counts: Int64[np.ndarray, "3 256"]) -> FeatureStatistics:
    levels = np.arange(256) / 255
    total = counts.sum(axis=1)
    mean = counts @ levels / total
    std = np.sqrt(np.maximum(counts @ levels**2 / total - mean**2, 0))
    cumulative = np.cumsum(counts, axis=1) / total[:, None]
    present = counts > 0
    low = levels[present.argmax(axis=1)]
    high = levels[255 - present[:, ::-1].argmax(axis=1)]
    quantiles = [levels[(cumulative >= share).argmax(axis=1)] for share in QUANTILES]
    return _statistics(mean, np.where(low == high, 0.0, std), low, high, *quantiles)
