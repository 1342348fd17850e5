"""The same loss, different landscapes: ACT on human demonstrations at three values of kl_weight.

    python -m benchmarks.kl_weight --path DEMOS.hdf5

Trains what ``--output_dir`` does not hold yet (``train.py fit`` on ``configs/demo.yaml`` with the
data replaced), studies every checkpoint on the same held-out frames with the same latents, draws
docs/images/kl_weight.png. One seed a value.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

import train
from callbacks.loggers import read_metrics
from commands.inputs import open_demonstrations
from datamodules.base import split_episodes
from landscapes.grid import Grid
from landscapes.methods import Likelihood, Probe
from landscapes.study import (
    Calibration,
    Frames,
    kernel_scale,
    latent_numbers,
    measure_frames,
    predict_frames,
)
from policies.loading import load_policy
from rendering.landscape import Panel, draw_landscape
from rendering.landscape_scenes import Column, Overlay, scenes

ROOT = Path(__file__).resolve().parent.parent
KEYS = ("nll", "skill_vs_agent", "energy", "c80", "excess_entropy", "z_value", "multimodal_frac")
HORIZONS = (0, 8, 16, 32)
SHOWN = 16
"""Chunk step of the pictures."""


def fit(arguments, kl_weight: float) -> Path:
    """Train one policy unless it is there; return its run folder."""
    name = f"kl{kl_weight:g}"
    run = Path(arguments.output_dir) / name / "last"
    if not (run / "summary.json").is_file():
        callbacks = [
            {"class_path": "callbacks.ema.EMA", "init_args": {"decay": 0.995}},
            {
                "class_path": "callbacks.checkpoints.Checkpoint",
                "init_args": {"monitor": "val/l1_px", "mode": "min", "save_top_k": -1},
            },
        ]
        train.main(
            [
                "fit",
                "-c",
                str(ROOT / "configs/demo.yaml"),
                f"--name={name}",
                f"--output_dir={arguments.output_dir}",
                "--data.init_args.demonstrations=null",
                f"--data.init_args.path={arguments.path}",
                "--data.init_args.image_size=[48,48]",
                f"--data.init_args.val_fraction={arguments.val_fraction}",
                "--data.init_args.chunk_size=40",
                f"--model.init_args.kl_weight={kl_weight}",
                f"--trainer.max_steps={arguments.max_steps}",
                f"--trainer.val_check_interval={arguments.max_steps // 6}",
                f"--trainer.callbacks={json.dumps(callbacks)}",
                "--trainer.logger=null",
            ]
        )
    return run.resolve()


def study(view, frames: Frames, calibration: Frames, n_samples: int, grid: Grid):
    """Numbers of one checkpoint on held-out frames, and the scale of its kernels."""
    fitted = Calibration(calibration, predict_frames(view, calibration.batch, HORIZONS, n_samples))
    predictions = predict_frames(view, frames.batch, HORIZONS, n_samples)
    scale = kernel_scale(view, predictions, fitted.predictions)
    metrics = measure_frames(predictions, scale, frames, HORIZONS, grid, fitted, n_draws=500)
    use, _ = latent_numbers(view, frames, predictions, scale[0], n_evidence_frames=2)
    summary, intervals = metrics.summary(), metrics.intervals()
    wanted = [f"k{k}/{key}" for k in HORIZONS for key in KEYS]
    numbers = {key: summary[key] for key in wanted}
    numbers |= {f"{key}_interval": intervals[key] for key in wanted if key.endswith("nll")}
    numbers |= {"kl_nats": use.kl_nats, "active_units": use.active_units}
    numbers |= {f"k{k}/R_z": float(use.spread_ratio[i]) for i, k in enumerate(HORIZONS)}
    return numbers, scale


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--path", required=True, help="HDF5 file of human demonstrations")
    parser.add_argument("--output_dir", default="outputs/kl_weight")
    parser.add_argument("--kl_weights", type=float, nargs="+", default=[10, 0.1, 0.01])
    parser.add_argument("--max_steps", type=int, default=3000)
    parser.add_argument("--val_fraction", type=float, default=0.15)
    parser.add_argument("--n_samples", type=int, default=64)
    parser.add_argument("--picture_step", type=int, default=1500, help="checkpoint of the pictures")
    parser.add_argument("--picture_frame", type=int, default=20, help="frame of the pictures")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/kl_weight.json")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs/images/kl_weight.png")
    arguments = parser.parse_args()
    runs = {weight: fit(arguments, weight) for weight in arguments.kl_weights}
    grid, cells, pictures = Grid(128), [], {}
    for weight, run in runs.items():
        for checkpoint in sorted(run.glob("checkpoints/best-step*.ckpt")):
            began = time.perf_counter()
            view = load_policy(str(checkpoint)).view
            data = open_demonstrations(arguments.path, view)
            numbers = sorted(data.source.episode_lengths)
            train_side, val = split_episodes(numbers, arguments.val_fraction, seed=0)
            data = open_demonstrations(arguments.path, view, [*val, *train_side[:20]], False)
            data.setup()
            episodes = {n: data.episode(n) for n in [*val, *train_side[:20]]}
            report, calibrate = (
                Frames.concatenate([Frames.of_episode(episodes[n], 5) for n in side])
                for side in (val[::2], val[1::2])
            )
            found, scale = study(view, report, calibrate, arguments.n_samples, grid)
            seen, fitted = (
                Frames.concatenate([Frames.of_episode(episodes[n], 5) for n in side])
                for side in (train_side[:20:2], train_side[1:20:2])
            )
            on_train, _ = study(view, seen, fitted, arguments.n_samples, grid)
            step = int(checkpoint.stem.removeprefix("best-step"))
            cells.append(
                {
                    "kl_weight": weight,
                    "step": step,
                    "val": found,
                    "train": {k: v for k, v in on_train.items() if k.endswith("nll")},
                    "wall_s": time.perf_counter() - began,
                }
            )
            print(f"kl_weight {weight:g} step {step}: {json.dumps(found)}", flush=True)
            if step == arguments.picture_step:
                pictures[weight] = picture(view, episodes[val[0]], scale, arguments, grid)
    curves = {
        weight: [
            (row["step"], row["val/l1_px"], row["val/first_action_l1_px"])
            for row in read_metrics(run / "metrics.csv")
            if "val/l1_px" in row
        ]
        for weight, run in runs.items()
    }
    document = {
        "max_steps": arguments.max_steps,
        "n_samples": arguments.n_samples,
        "n_val_episodes_reported": len(val[::2]),
        "cells": cells,
        "val_l1_px": {f"{weight:g}": curve for weight, curve in curves.items()},
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    draw(arguments.figure, cells, curves, pictures, arguments.picture_step)


def picture(view, episode, scale, arguments, grid: Grid) -> np.ndarray:
    """The board of one frame at one checkpoint."""
    frame = arguments.picture_frame
    batch = episode.rows(slice(frame, frame + 1))
    predictions = predict_frames(view, batch, HORIZONS, arguments.n_samples)
    landscape = Likelihood().landscape(Probe(view, batch, predictions, scale, HORIZONS, grid))
    (scene,) = scenes([Column(landscape, SHOWN, predictions)], batch, None, Overlay())
    panel: Panel = scene.panels[0]
    return draw_landscape(panel, 384)


def draw(path: Path, cells: list[dict], curves: dict, pictures: dict, at_step: int) -> None:
    """Loss and landscape numbers over training above, the boards of one frame below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(11, 7.4), layout="constrained")
    for number, (weight, curve) in enumerate(curves.items()):
        mine = sorted((c for c in cells if c["kl_weight"] == weight), key=lambda c: c["step"])
        steps = [cell["step"] for cell in mine]
        label, colour = f"kl_weight {weight:g}", f"C{number}"
        step, _, first = zip(*curve, strict=True)
        axes[0, 0].plot(step, first, color=colour, label=label)
        key = f"k{SHOWN}/nll"
        axes[0, 1].plot(steps, [c["val"][key] for c in mine], color=colour)
        axes[0, 1].plot(steps, [c["train"][key] for c in mine], color=colour, ls=":")
        axes[0, 2].plot(steps, [max(c["val"]["kl_nats"], 1e-5) for c in mine], color=colour)
        below = axes[1, number]
        below.imshow(pictures[weight])
        at = next(c["val"] for c in mine if c["step"] == at_step)
        below.set_title(
            f"{label}: NLL {at[key]:.2f}, KL {at['kl_nats']:.2f} nats, "
            f"$R_z$ {at[f'k{SHOWN}/R_z']:.2f}",
            fontsize=9,
        )
        below.axis("off")
    titles = (
        "first action L1, held out (px)",
        f"NLL, k = {SHOWN} (nats/px$^2$); dotted: training episodes",
        "KL of the posterior (nats)",
    )
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 2].set_yscale("log")
    axes[0, 2].axhline(0.1, color="grey", lw=0.8, ls="--")
    axes[0, 0].legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
