"""Coarse and fine tokens: what layer-3 features cost, and what they buy.

    python -m benchmarks.token_stride --path DEMOS.hdf5

Trains ACT with a ResNet-18 (GroupNorm, 96 px) on human demonstrations twice, with tokens of layer 4
(3 x 3 cells of 32 px) and of layer 3 (6 x 6 cells of 16 px), unless ``--output_dir`` holds the
runs; then times a training step and a prediction of both, alternating, and puts their maps to the
test on the same held-out frames. One seed each.
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch

import train
from attention.counterfactuals import measure_counterfactuals
from attention.method import Target
from attention.methods import METHODS
from attention.study import Evidence, effect_numbers, explain, judge, numbers
from commands.inputs import open_demonstrations, task_for
from datamodules.base import split_episodes
from envs.scene import scene_variants
from policies.act import ACTPolicy
from policies.interface import Batch
from policies.loading import load_policy

ROOT = Path(__file__).resolve().parent.parent
STRIDES = (32, 16)
LEFT_OUT = ("encoder_attention",)
"""Says what one token attends to, not what the action depends on."""


def fit(arguments: argparse.Namespace, stride: int) -> Path:
    """Train one policy unless it is there; return its run folder."""
    name = f"tokens{stride}"
    run = Path(arguments.output_dir) / name / "last"
    if not (run / "summary.json").is_file():
        train.main(
            [
                "fit",
                "-c",
                str(ROOT / "configs/experiment/act_hdf5.yaml"),
                f"--data.init_args.path={arguments.path}",
                f"--name={name}",
                f"--output_dir={arguments.output_dir}",
                "--trainer.accelerator=cpu",
                f"--trainer.max_steps={arguments.max_steps}",
                f"--trainer.val_check_interval={arguments.max_steps // 3}",
                "--trainer.logger=null",
                f"--model.init_args.token_stride={stride}",
                "--model.init_args.lr=5e-4",
                "--model.init_args.warmup_steps=100",
                "--model.init_args.dim_model=256",
                "--model.init_args.dim_feedforward=1024",
                "--model.init_args.n_encoder_layers=2",
                "--model.init_args.n_posterior_layers=1",
                "--model.init_args.shift_px=4",
                "--model.init_args.dropout=0.0",
            ]
        )
    return run.resolve()


def held_out(arguments: argparse.Namespace, view: ACTPolicy) -> Batch:
    """Frames of the episodes that neither run has seen, evenly spread."""
    everything = open_demonstrations(arguments.path, view)
    _, val = split_episodes(sorted(everything.source.episode_lengths), 0.1, seed=0)
    data = open_demonstrations(arguments.path, view, val, progress=False)
    data.setup()
    batch = Batch.concatenate([data.episode(number) for number in val])
    return batch.rows(torch.linspace(0, len(batch) - 1, arguments.n_frames).round().long())


def seconds(policies: dict[int, ACTPolicy], batch: Batch, rounds: int) -> dict[int, dict]:
    """CPU time of a training step and of a prediction, alternating."""
    training = batch.rows(torch.arange(32) % len(batch))
    one = batch.observation.rows(slice(1))
    taken: dict[int, dict[str, list[float]]] = {
        stride: {"train_cpu_ms": [], "predict_cpu_ms": []} for stride in policies
    }
    for _ in range(rounds + 1):
        for stride, policy in policies.items():
            began = time.process_time()
            policy.loss(training, 0.1).total.backward()
            taken[stride]["train_cpu_ms"].append((time.process_time() - began) * 1e3)
            policy.zero_grad(set_to_none=True)
            began = time.process_time()
            with torch.no_grad():
                policy.predict_chunk(one, range(8))
            taken[stride]["predict_cpu_ms"].append((time.process_time() - began) * 1e3)
    # The first round warms up.
    return {
        stride: {name: statistics.median(values[1:]) for name, values in times.items()}
        for stride, times in taken.items()
    }


def put_to_the_test(view: ACTPolicy, batch: Batch) -> dict[str, dict[str, float]]:
    """Numbers of every method."""
    target = Target()
    methods = {name: kind() for name, kind in METHODS.items() if name not in LEFT_OUT}
    maps = {
        name: explain(method, view, batch.observation, target) for name, method in methods.items()
    }
    task = task_for("envs.push_t.PushTTask", view.data_schema)
    assert task is not None
    variants = scene_variants(task, batch)
    effects = measure_counterfactuals(view, variants, recorded=batch.observation)
    evidence = Evidence(batch.observation, maps["occlusion"], variants.masks, effects)
    verdicts = judge(view, methods, maps, evidence, target)
    found = {name: numbers(each) | verdicts[name].scalars() for name, each in maps.items()}
    return found | {"counterfactual": effect_numbers(effects)}


def main() -> None:
    """Train, measure, print one table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--path", required=True, help="HDF5 file of human demonstrations")
    parser.add_argument("--output_dir", default="outputs/token_stride")
    parser.add_argument("--max_steps", type=int, default=1500)
    parser.add_argument("--n_frames", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks/results/token_stride.json"
    )
    arguments = parser.parse_args()
    runs = {stride: fit(arguments, stride) for stride in STRIDES}
    torch.set_num_threads(arguments.threads)
    policies = {}
    for stride, run in runs.items():
        view = load_policy(str(run)).view
        assert isinstance(view, ACTPolicy)
        policies[stride] = view
    batch = held_out(arguments, policies[STRIDES[0]])
    times = seconds(policies, batch, arguments.rounds)
    document: dict = {
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "load_average": os.getloadavg()[0],
        },
        "threads": arguments.threads,
        "max_steps": arguments.max_steps,
        "n_frames": len(batch),
        "strides": {},
    }
    for stride, run in runs.items():
        summary = json.loads((run / "summary.json").read_text())
        document["strides"][stride] = {
            "parameters": sum(each.numel() for each in policies[stride].parameters()),
            "val_first_action_l1_px": summary["val/first_action_l1_px"],
            "hold_position_l1_px": summary["baseline/hold_position_l1_px"],
            **times[stride],
            "methods": put_to_the_test(policies[stride], batch),
        }
        print(f"token_stride {stride}: {json.dumps(document['strides'][stride])}", flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    shown = ("deletion_ratio", "insertion_ratio", "spearman_occlusion", "lift_agent", "lift_block")
    for stride, values in document["strides"].items():
        for method, found in values["methods"].items():
            cells = "".join(f"{found.get(name, float('nan')):>20.2f}" for name in shown)
            print(f"{stride:<5}{method:<22}{cells}")
    print(f"{'':<27}{''.join(f'{name:>20}' for name in shown)}")
    print(f"Wrote {arguments.output}")


if __name__ == "__main__":
    main()
