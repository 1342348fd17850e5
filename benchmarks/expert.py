"""How well, how fast and how smoothly the scripted PushT expert plays.

    OMP_NUM_THREADS=1 python -m benchmarks.expert

Prints one table and writes ``benchmarks/results/expert.json``. CPU seconds count planning and
physics, and planning alone; rendering is not included.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from envs.expert import EXPERT_VERSION, ExpertConfig, PushTExpert
from envs.push_t import PushT
from envs.rollout import wilson_interval

IDLE_PX = 1.0
VARIANTS = {
    "no waits": ExpertConfig(),
    "settle waits": ExpertConfig(settle_waits=True),
    "no waits, plan noise 5": ExpertConfig(plan_noise=5.0),
}


def measure(config: ExpertConfig, seeds: range, max_steps: int) -> dict:
    """Play one episode per seed."""
    env, expert = PushT(), PushTExpert(config)
    best, lengths, cpu, planning, moves, idle, turns = [], [], [], [], [], [], []
    for seed in track(seeds, description="Episodes", transient=True):
        env.reset(seed)
        started = time.process_time()
        expert.reset(seed)
        thinking = time.process_time() - started
        actions, scores = [], []
        for _ in range(max_steps):
            state, velocity = env.state(), env.agent_velocity()
            before = time.process_time()
            actions.append(expert.act(state, velocity))
            thinking += time.process_time() - before
            outcome = env.step(actions[-1])
            scores.append(outcome.score)
            if outcome.terminated:
                break
        cpu.append(time.process_time() - started)
        planning.append(thinking)
        best.append(max(scores))
        lengths.append(len(actions))
        steps = np.hypot(*np.diff(np.array(actions), axis=0).T)
        moves.extend(steps)
        idle.append((steps < IDLE_PX).mean())
        turns.extend(np.hypot(*np.diff(np.array(actions), n=2, axis=0).T))
    solved = [score > 0.95 for score in best]
    return {
        "n_episodes": len(seeds),
        "success": float(np.mean(solved)),
        "success_interval_95": wilson_interval(sum(solved), len(solved)),
        "unsolved_seeds": [seed for seed, done in zip(seeds, solved, strict=True) if not done],
        "mean_max_coverage": float(np.mean(best)),
        "mean_steps": float(np.mean(lengths)),
        "steps_p5_p50_p95": np.percentile(lengths, [5, 50, 95]).tolist(),
        "cpu_s_per_episode": float(np.mean(cpu)),
        "planning_cpu_s_per_episode": float(np.mean(planning)),
        "idle_share": float(np.mean(idle)),
        "mean_action_step_px": float(np.mean(moves)),
        "mean_action_second_difference_px": float(np.mean(turns)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n_episodes", type=int, default=200)
    parser.add_argument("--first_seed", type=int, default=60_000)
    parser.add_argument("--max_steps", type=int, default=300)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "expert.json"
    )
    arguments = parser.parse_args()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.n_episodes)
    results = {
        name: measure(config, seeds, arguments.max_steps) for name, config in VARIANTS.items()
    }
    table = Table(title=f"PushT expert, seeds {seeds.start} to {seeds.stop - 1}")
    for column in (
        "variant",
        "success",
        "steps 5/50/95 %",
        "CPU s/episode (planning)",
        "idle",
        "mean |a_t - a_t-1| px",
        "2nd difference px",
    ):
        table.add_column(column)
    for name, result in results.items():
        table.add_row(
            name,
            f"{result['success']:.1%}",
            "/".join(f"{steps:.0f}" for steps in result["steps_p5_p50_p95"]),
            f"{result['cpu_s_per_episode']:.3f} ({result['planning_cpu_s_per_episode']:.3f})",
            f"{result['idle_share']:.1%}",
            f"{result['mean_action_step_px']:.1f}",
            f"{result['mean_action_second_difference_px']:.1f}",
        )
    Console(width=110).print(table)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "expert_version": EXPERT_VERSION,
        "first_seed": seeds.start,
        "max_steps": arguments.max_steps,
        "results": results,
    }
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
