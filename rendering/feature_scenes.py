"""Put the activations of features on the pictures that they fire on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8

from features.record import FeatureRecord
from rendering.features import FeatureFrame, FeatureRow

PictureOf = Callable[[int, int], UInt8[np.ndarray, "height width 3"]]
"""Episode number and step to what the camera showed."""


@dataclass(frozen=True)
class ShownFeature:
    """A feature to draw."""

    latent: int
    title: str
    """One line of ASCII."""
    frames: Sequence[int]
    """Rows of the record."""


def feature_rows(
    record: FeatureRecord,
    features: Sequence[ShownFeature],
    picture_of: PictureOf,
    camera: str,
    cell_px: int | None = None,
) -> list[FeatureRow]:
    """Collect the pictures of features, with their maps where tokens are cells of the camera.

    Args:
        record: Of all frames shown.
        features: In the order of the rows.
        picture_of: Gives the camera's pictures.
        camera: Its name, as token positions have it.
        cell_px: Height and width of a cell in px; None where cells divide the picture evenly.
    """
    cells = _cells(record, camera)
    rows = []
    for feature in features:
        frames = []
        for row in feature.frames:
            values = _values(record, feature.latent, row)
            episode, step = int(record.episode_index[row]), int(record.frame_index[row])
            top = max(values.values(), default=0.0)
            frames.append(
                FeatureFrame(
                    picture_of(episode, step),
                    f"ep {episode} step {step}: {top:.2f}",
                    None if cells is None else _grid(values, cells),
                    cell_px,
                )
            )
        rows.append(FeatureRow(feature.title, frames))
    return rows


def _values(record: FeatureRecord, latent: int, row: int) -> dict[int, float]:
    """Token to activation of one feature in one frame, where it is active."""
    ends = torch.searchsorted(record.frame, torch.tensor([row, row + 1], dtype=record.frame.dtype))
    part = slice(int(ends[0]), int(ends[1]))
    is_it = record.latent[part] == latent
    tokens, values = record.token[part][is_it].tolist(), record.value[part][is_it].tolist()
    return dict(zip(tokens, values, strict=True))


def _cells(record: FeatureRecord, camera: str) -> Mapping[int, tuple[int, int]] | None:
    """Token to (row, column), where the tokens cover the camera without a gap."""
    places = {
        token: (position.row, position.column)
        for token, position in enumerate(record.positions)
        if position.name == camera and position.row is not None and position.column is not None
    }
    if not places:
        return None
    n_rows = 1 + max(row for row, _ in places.values())
    n_columns = 1 + max(column for _, column in places.values())
    return places if len(set(places.values())) == n_rows * n_columns else None


def _grid(
    values: Mapping[int, float], cells: Mapping[int, tuple[int, int]]
) -> Float[np.ndarray, "row column"]:
    shape = [1 + max(axis) for axis in zip(*cells.values(), strict=True)]
    grid = np.zeros(shape, np.float32)
    for token, cell in cells.items():
        grid[cell] = values.get(token, 0.0)
    return grid
