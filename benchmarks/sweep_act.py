"""A CPU-sized sweep of ACT on human demonstrations: kl_weight, chunk size, queue and ensembling.

    python -m benchmarks.sweep_act --path DEMOS.hdf5 --output_dir outputs/sweep

Every run is ``train.py fit`` on ``configs/demo.yaml`` with the data replaced, pictures resized to
48 px, and equal steps; every policy is then rolled out on the same seeds in each way of acting. One
seed a cell: read differences against the intervals.
"""

import argparse
import json
import time
from pathlib import Path

import analyze
import train

ROOT = Path(__file__).resolve().parent.parent


def run(arguments, name: str, kl_weight: float, chunk_size: int) -> dict:
    """Train one cell and roll it out in every way."""
    folder = Path(arguments.output_dir)
    began = time.perf_counter()
    train.main(
        [
            "fit",
            "-c",
            str(ROOT / "configs/demo.yaml"),
            f"--name={name}",
            f"--output_dir={folder}",
            "--data.init_args.demonstrations=null",
            f"--data.init_args.path={arguments.path}",
            "--data.init_args.image_size=[48,48]",
            "--data.init_args.val_fraction=0.1",
            "--data.init_args.progress=false",
            f"--data.init_args.chunk_size={chunk_size}",
            f"--model.init_args.n_action_steps={min(8, chunk_size)}",
            f"--model.init_args.kl_weight={kl_weight}",
            f"--trainer.max_steps={arguments.max_steps}",
            f"--trainer.val_check_interval={arguments.max_steps}",
            "--trainer.logger=null",
        ]
    )
    run_folder = folder / name / "last"
    summary = json.loads((run_folder / "summary.json").read_text())
    output = run_folder.resolve() / "rollout"
    steps = sorted({min(8, chunk_size), chunk_size})
    status = analyze.main(
        [
            "rollout",
            f"--policy_path={run_folder.resolve() / 'checkpoints/last.ckpt'}",
            f"--output_dir={output}",
            f"--n_episodes={arguments.n_episodes}",
            "--n_videos=2",
            "--n_action_steps",
            *[str(step) for step in steps],
            "--temporal_ensemble_coeff",
            "0.01",
        ]
    )
    if status:
        raise SystemExit(status)
    rows = json.loads((output / "rollout.json").read_text())["rows"]
    kept = ("val/first_action_l1_px", "val/l1_px", "val/kl_nats", "baseline/hold_position_l1_px")
    return {
        "kl_weight": kl_weight,
        "chunk_size": chunk_size,
        "wall_s": time.perf_counter() - began,
        **{key: summary[key] for key in kept},
        "rollouts": {row["variant"]: row["summary"] for row in rows},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--path", required=True, help="HDF5 file of human demonstrations")
    parser.add_argument("--output_dir", default="outputs/sweep")
    parser.add_argument("--max_steps", type=int, default=600)
    parser.add_argument("--n_episodes", type=int, default=30)
    parser.add_argument("--kl_weights", type=float, nargs="+", default=[10, 1, 0.1, 0.01])
    parser.add_argument("--chunk_sizes", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/sweep_act.json")
    arguments = parser.parse_args()
    cells = [(kl_weight, 16) for kl_weight in arguments.kl_weights]
    cells += [(0.1, chunk_size) for chunk_size in arguments.chunk_sizes]
    results = []
    for kl_weight, chunk_size in cells:
        results.append(run(arguments, f"kl{kl_weight:g}_chunk{chunk_size}", kl_weight, chunk_size))
        document = {
            "max_steps": arguments.max_steps,
            "n_episodes": arguments.n_episodes,
            "complete": len(results) == len(cells),
            "cells": results,
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    for cell in results:
        best = max(cell["rollouts"].items(), key=lambda item: item[1]["mean_max_coverage"])
        print(
            f"kl_weight {cell['kl_weight']:>5g}  chunk {cell['chunk_size']:>2d}  "
            f"kl {cell['val/kl_nats']:.3f} nats  first action {cell['val/first_action_l1_px']:.2f}"
            f" px  best {best[0]}: mean max coverage {best[1]['mean_max_coverage']:.3f} "
            f"[{best[1]['mean_max_coverage_low']:.3f}, {best[1]['mean_max_coverage_high']:.3f}]"
        )


if __name__ == "__main__":
    main()
