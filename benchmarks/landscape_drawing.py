"""CPU time of one video frame: our drawing of a landscape against a matplotlib figure of the same.

    OMP_NUM_THREADS=1 python -m benchmarks.landscape_drawing

Environment at the left, landscape of 128 x 128 cells at the right, with credible regions, expert,
prediction, arrow, trace, executed action, colour bar and legend. The peer makes a figure for each
frame, as the published visualisers do (``imshow``, ``contour``, ``scatter``, ``colorbar``, canvas
to RGB, resize to 480 px, paste), at three sizes: 8 inches, matplotlib's default, and so small that
nothing need be resized. One thread, frames alternate between the sides, medians over rounds. Time
is CPU time (``time.process_time``); computing the landscape and the environment's picture is not in
it, and neither are imports.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from landscapes.density import Mixture
from landscapes.grid import Grid
from landscapes.regions import CREDIBLE_LEVELS, credible_thresholds
from rendering.landscape import Markers, Panel, Scene, board_px, side_by_side

TARGET_MS = 5.0
TARGET_RATIO = 30.0
HEIGHT_PX = 480
FRAMES = 20
OURS = "ours, boards of 480 px"
FIGURES_INCHES = {"8 x 8 inches": (8.0, 8.0), "default": (6.4, 4.8), "4.8 x 4.8 inches": (4.8, 4.8)}


def scenes(environment_px: int) -> list[Scene]:
    """Make frames of a policy that hesitates between two ways.

    Args:
        environment_px: Height of the environment's picture.
    """
    generator = np.random.default_rng(0)
    grid = Grid(128)
    found = []
    for frame in range(FRAMES):
        agent = np.array([150.0 + 5 * frame, 330.0 - 4 * frame])
        is_left = generator.random(64) < 0.4
        way = np.where(is_left[:, None], [90.0, -60.0], [30.0, 90.0])
        centres = torch.tensor(agent + way + 10 * generator.normal(size=(64, 2)))
        mass = Mixture(centres, torch.full((1, 2), 16.0, dtype=torch.float64)).cell_mass(grid)
        expert = agent + np.array([90.0, -60.0])
        markers = Markers(
            expert=expert,
            prediction=centres.mean(0).numpy(),
            executed=agent + np.array([10.0, 30.0]),
            executed_age=frame % 8,
            expert_trace=np.linspace(agent, expert, 10),
        )
        panel = Panel(
            f"k = 16  frame {frame}",
            ((mass / grid.cell_area).log() - grid.log_uniform).numpy(),
            grid,
            (-4.0, 8.0),
            "nats above uniform",
            mass.numpy(),
            credible_thresholds(mass).numpy(),
            CREDIBLE_LEVELS,
            markers,
        )
        environment = generator.integers(0, 255, (environment_px, environment_px, 3), np.uint8)
        found.append(Scene([panel], environment, f"episode 0  step {frame}"))
    return found


def draw_with_matplotlib(scene: Scene, size_inches: tuple[float, float]) -> np.ndarray:
    """Draw the same in a figure of its own, then bring it to the height of the environment."""
    panel, markers, environment = scene.panels[0], scene.panels[0].markers, scene.environment
    assert environment is not None
    assert panel.mass is not None
    assert panel.thresholds is not None
    grid, (low, high) = panel.grid, panel.value_range
    figure = Figure(figsize=size_inches, dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    extent = (grid.low[0], grid.high[0], grid.high[1], grid.low[1])
    image = axes.imshow(panel.scores, cmap="viridis", vmin=low, vmax=high, extent=extent)
    centres = grid.centres().numpy()
    axes.contour(
        centres[..., 0],
        centres[..., 1],
        panel.mass,
        sorted(panel.thresholds.tolist()),
        colors="white",
        linestyles=[":", "--", "-"],
    )
    axes.plot(markers.expert_trace[:, 0], markers.expert_trace[:, 1], color="red")
    assert markers.executed is not None
    assert markers.prediction is not None
    assert markers.expert is not None
    x, y = markers.executed
    axes.scatter(x, y, s=80, edgecolors="orange", facecolors="none", label="executed")
    axes.text(x, y, f"age {markers.executed_age}", color="orange")
    x, y = start = tuple(markers.prediction)
    axes.scatter(x, y, s=120, marker="*", color="white", label="policy")
    x, y = end = tuple(markers.expert)
    axes.scatter(x, y, s=120, marker="+", color="red", label="expert")
    arrow = {"arrowstyle": "->", "color": "yellow", "lw": 2}
    axes.annotate("", xy=end, xytext=start, arrowprops=arrow)
    figure.colorbar(image, ax=axes, label=panel.unit)
    axes.set_title(panel.title)
    axes.set_xlabel("x (px)")
    axes.set_ylabel("y (px)")
    axes.legend(loc="upper right")
    canvas.draw()
    picture = np.asarray(canvas.buffer_rgba())[..., :3]
    height = len(environment)
    width = round(picture.shape[1] * height / picture.shape[0])
    return np.hstack([environment, cv2.resize(picture, (width, height))])


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


@dataclass(frozen=True)
class Side:
    """A way to draw frames."""

    draw: Callable[[Scene], np.ndarray]
    frames: list[Scene]


def measure(sides: dict[str, Side], rounds: int) -> dict[str, dict[str, float]]:
    """CPU milliseconds a frame of each side."""
    for side in sides.values():
        side.draw(side.frames[0])
    milliseconds: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(rounds):
        for name, side in sides.items():
            start = time.process_time()
            side.draw(side.frames[index % FRAMES])
            milliseconds[name].append((time.process_time() - start) * 1e3)
    return {name: spread(values) for name, values in milliseconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=60, help="alternating rounds")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "landscape_drawing.json"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    whole, boards = scenes(board_px(HEIGHT_PX)), scenes(HEIGHT_PX)
    # A frame whose boards alone are as high as the whole picture of the others.
    taller = HEIGHT_PX + HEIGHT_PX - board_px(HEIGHT_PX)
    sides = {
        OURS: Side(lambda scene: side_by_side(scene, taller), boards),
        "ours, 480 px in all": Side(lambda scene: side_by_side(scene, HEIGHT_PX), whole),
    }
    for name, size in FIGURES_INCHES.items():
        sides[f"matplotlib, {name}"] = Side(
            lambda scene, size=size: draw_with_matplotlib(scene, size), boards
        )
    found = measure(sides, args.rounds)
    ratios = {name: values["median"] / found[OURS]["median"] for name, values in found.items()}
    results: dict = {
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": 1},
        "versions": {"matplotlib": matplotlib.__version__, "opencv": cv2.__version__},
        "rounds": args.rounds,
        "cpu_ms_per_frame": found,
        "ratio": ratios,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=2) + "\n")

    print(f"{'CPU-ms a frame':<28}{'median':>9}{'min':>9}{'max':>9}{'ratio':>8}")
    for name, values in found.items():
        print(
            f"{name:<28}{values['median']:>9.2f}{values['min']:>9.2f}{values['max']:>9.2f}"
            f"{ratios[name]:>7.1f}x"
        )
    print(f"Targets: ours <= {TARGET_MS} ms, matplotlib >= {TARGET_RATIO:.0f}x of it")
    print(f"Wrote {args.output}")


if __name__ == "__main__":
    main()
