"""Put a policy's landscapes, its prediction and the demonstration together, frame by frame."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from landscapes.landscape import Landscape, Predictions
from policies.interface import Batch
from rendering.landscape import Markers, Panel, Scene


@dataclass(frozen=True)
class Overlay:
    """What lies on top of the boards."""

    show_policy_prediction: bool = True
    """Star at the policy's prediction, with an arrow to the demonstrated action."""
    show_confidence_intervals: bool = True
    """Outlines of the credible regions."""
    trace_length: int = 10
    """Demonstrated actions that lead up to the cross; 0 for none."""


@dataclass(frozen=True)
class Column:
    """One board of a scene, as long as the frames last."""

    landscape: Landscape
    query: int
    """Chunk step."""
    predictions: Predictions
    label: str = ""
    """Put before the title, to tell policies and methods apart."""
    executed: Float[Tensor, "frame action"] | None = None
    """What the policy would execute at each frame; drawn where the query is 0."""
    executed_age: Int[Tensor, " frame"] | None = None
    """Steps since the executed action's chunk was predicted; None for an ensemble."""


def scenes(
    columns: Sequence[Column],
    batch: Batch,
    environment: Iterable[UInt8[np.ndarray, "height width 3"]] | None = None,
    overlay: Overlay | None = None,
) -> Iterator[Scene]:
    """Compose one scene for each frame.

    Args:
        columns: Boards from left to right; all on the frames of ``batch``.
        batch: The frames, for the demonstration's trace.
        environment: A picture of each frame.
        overlay: What to draw on top.

    Raises:
        ValueError: If there are more or fewer pictures than frames.
    """
    overlay = overlay or Overlay()
    pictures = [None] * len(batch) if environment is None else environment
    for frame, picture in zip(range(len(batch)), pictures, strict=True):
        panels = [_panel(column, batch, frame, overlay) for column in columns]
        step = f"step {int(batch.frame_index[frame])}"
        if picture is None:
            # There is no other place for it.
            panels[0] = replace(panels[0], title=f"{step}  {panels[0].title}")
        title = f"episode {int(batch.episode_index[frame])}  {step}"
        yield Scene(panels, picture, title)


def _panel(column: Column, batch: Batch, frame: int, overlay: Overlay) -> Panel:
    predictions, query = column.predictions, column.query
    plane = column.landscape.plane
    dims = [0, 1] if plane is None else list(plane.dims)
    place = predictions.queries.index(query)
    expert, title = None, f"action now (k = {query})" if query == 0 else f"k = {query} steps ahead"
    if plane is not None and plane.is_conditional:
        title += ", others held at the prediction"
    if bool(predictions.is_valid[frame, place]):
        expert = predictions.expert[frame, place].cpu().numpy()[dims]
    executed, age = None, None
    if column.executed is not None and query == 0:
        executed = column.executed[frame].double().cpu().numpy()[dims]
        age = None if column.executed_age is None else int(column.executed_age[frame])
    shown = overlay.show_policy_prediction
    return Panel.of(
        column.landscape,
        frame,
        query,
        f"{column.label}  {title}" if column.label else title,
        Markers(
            expert=expert,
            prediction=predictions.point[frame, place].cpu().numpy()[dims] if shown else None,
            executed=executed if shown else None,
            executed_age=age if shown else None,
            expert_trace=demonstrated(batch, frame, query, overlay.trace_length)[:, dims],
        ),
        regions=overlay.show_confidence_intervals,
    )


def demonstrated(
    batch: Batch, frame: int, query: int, length: int
) -> Float[np.ndarray, "step action"]:
    """Up to ``length`` demonstrated actions, ending with the one ``query`` steps ahead.

    Those before the frame come from the rows before it, as far as they are its own past; none
    where the demonstration ends before that step.
    """
    n_dims = batch.actions.shape[-1]
    if bool(batch.action_is_pad[frame, query]) or not length:
        return np.empty((0, n_dims))
    first = frame
    while (
        first > 0
        and frame - first < length
        and batch.episode_index[first - 1] == batch.episode_index[frame]
        and batch.frame_index[first - 1] == batch.frame_index[first] - 1
    ):
        first -= 1
    past = batch.actions[first:frame, 0]
    ahead = batch.actions[frame, : query + 1]
    trace = np.concatenate([past.double().cpu().numpy(), ahead.double().cpu().numpy()])
    return trace[-length:]
