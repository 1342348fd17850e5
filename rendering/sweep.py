"""A sweep as one figure: every trial's curve, and its best value over each parameter."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8

from rendering.charts import INK, PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 3
COLOURS = {"complete": PALETTE[0], "pruned": PALETTE[1]}
LOG_SPAN = 30.0
"""Values that span more than this factor are drawn on a logarithmic axis."""


@dataclass(frozen=True)
class TrialMarks:
    """What is drawn of a trial."""

    values: Mapping[str, Any]
    """Key of each parameter to its value."""
    state: str
    """``complete``, or ``pruned``: stopped early because others did better."""
    value: float
    """Best of the metric."""
    curve: Sequence[tuple[int, float]]
    """Step and metric."""


def sweep_chart(
    trials: Sequence[TrialMarks], metric: str, lower_is_better: bool
) -> UInt8[np.ndarray, "h w 3"]:
    """Draw curves of all trials, then the best value of each over one parameter after the other.

    Args:
        trials: At least one; failed ones are left out.
        metric: Its name.
        lower_is_better: Which trial that was trained to its end gets the ring.

    Raises:
        ValueError: If there is no trial.
    """
    if not trials:
        raise ValueError("no trial has a value: there is nothing to draw")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    keys = list(trials[0].values)
    rows = -(-(len(keys) + 1) // COLUMNS)
    figure = Figure(figsize=(3.4 * COLUMNS, 2.7 * rows), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    complete = [trial for trial in trials if trial.state == "complete"] or trials
    best = (min if lower_is_better else max)(complete, key=lambda trial: trial.value)
    _draw_curves(panels[0], trials, best, metric)
    for axes, key in zip(panels[1:], keys, strict=False):
        _draw_parameter(axes, trials, best, key)
    for axes in panels[len(keys) + 1 :]:
        axes.set_visible(False)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, colors=INK)
    n_pruned = sum(trial.state == "pruned" for trial in trials)
    figure.suptitle(
        f"{len(trials)} trials, {n_pruned} stopped early; best {metric} {best.value:.4g}",
        fontsize=9,
    )
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])


def _draw_curves(axes: "Axes", trials: Sequence[TrialMarks], best: TrialMarks, metric: str) -> None:
    for trial in trials:
        steps, values = zip(*trial.curve, strict=True)
        is_best = trial is best
        axes.plot(
            steps,
            values,
            "o-",
            ms=2.5,
            lw=2.0 if is_best else 0.9,
            alpha=1.0 if is_best else 0.55,
            color=COLOURS[trial.state],
        )
    for state, colour in COLOURS.items():
        axes.plot([], [], "o-", ms=3, color=colour, label=state)
    axes.legend(frameon=False, fontsize=7)
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel(metric, fontsize=8)


def _draw_parameter(axes: "Axes", trials: Sequence[TrialMarks], best: TrialMarks, key: str) -> None:
    given = [trial.values[key] for trial in trials]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in given):
        places = given
        if min(given) > 0 and max(given) / min(given) > LOG_SPAN:
            axes.set_xscale("log")
    else:
        names = sorted({str(value) for value in given})
        places = [names.index(str(value)) for value in given]
        axes.set_xticks(range(len(names)), names)
    for place, trial in zip(places, trials, strict=True):
        ring = INK if trial is best else "none"
        axes.scatter(
            place, trial.value, s=34, color=COLOURS[trial.state], edgecolors=ring, linewidths=1.6
        )
    # The class is the same in all panels; what differs is said last.
    axes.set_xlabel(key.replace(".init_args", ""), fontsize=8)
