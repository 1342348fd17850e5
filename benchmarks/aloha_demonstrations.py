"""How well and how fast the scripted ALOHA expert plays, and what its demonstrations cost.

    OMP_NUM_THREADS=1 LP_NUM_THREADS=1 python -m benchmarks.aloha_demonstrations

Prints one table and writes ``benchmarks/results/aloha_demonstrations.json``. Success is counted
over fresh starts without pictures, under gym-aloha's own reward. CPU seconds count planning and
physics; then drawing, per picture. LP_NUM_THREADS=1 keeps Mesa's software renderer on one thread.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from envs.aloha import MAX_REWARD, AlohaTransferCube
from envs.aloha_demonstrations import play
from envs.aloha_expert import EXPERT_VERSION, AlohaExpert, AlohaExpertConfig
from envs.rollout import wilson_interval

VARIATIONS = (0.0, 0.5, 1.0)
SIZES = ((120, 160), (480, 640))


def measure(variation: float, seeds: range) -> dict:
    """Play one episode per seed."""
    env, expert = AlohaTransferCube(), AlohaExpert(AlohaExpertConfig(variation))
    unsolved, dropped, handed_over, cpu_s = [], [], [], []
    for seed in track(seeds, description=f"variation {variation}", transient=True):
        began = time.process_time()
        _, rewards = play(env, expert, seed)
        cpu_s.append(time.process_time() - began)
        if rewards.max() < MAX_REWARD:
            unsolved.append(seed)
            continue
        handed_over.append(int(np.argmax(rewards == MAX_REWARD)) + 1)
        if rewards[-1] < MAX_REWARD:
            dropped.append(seed)
    n_solved = len(seeds) - len(unsolved)
    return {
        "n_episodes": len(seeds),
        "success": n_solved / len(seeds),
        "success_interval_95": wilson_interval(n_solved, len(seeds)),
        "unsolved_seeds": unsolved,
        "not_held_at_the_end": dropped,
        "handed_over_at_step_median": float(np.median(handed_over)),
        "cpu_s_per_episode": float(np.mean(cpu_s)),
    }


def picture_cpu_s(size_px: tuple[int, int], n_pictures: int) -> float:
    """CPU seconds of one picture of the top camera."""
    env = AlohaTransferCube(("top",), size_px)
    env.image("top")
    began = time.process_time()
    for _ in range(n_pictures):
        env.image("top")
    took_s = time.process_time() - began
    env.close()
    return took_s / n_pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n_episodes", type=int, default=100)
    parser.add_argument("--first_seed", type=int, default=60_000_000)
    parser.add_argument("--n_pictures", type=int, default=40)
    parser.add_argument("--output", default="benchmarks/results/aloha_demonstrations.json")
    arguments = parser.parse_args()

    seeds = range(arguments.first_seed, arguments.first_seed + arguments.n_episodes)
    results = {f"variation {each:g}": measure(each, seeds) for each in VARIATIONS}
    pictures = {
        f"{height}x{width}": picture_cpu_s((height, width), arguments.n_pictures)
        for height, width in SIZES
    }
    table = Table(title=f"{len(seeds)} episodes a row, seeds {seeds[0]} to {seeds[-1]}")
    for column in ("plans", "success", "95 %", "handed over at", "CPU s"):
        table.add_column(column, justify="right")
    for name, row in results.items():
        low, high = row["success_interval_95"]
        table.add_row(
            name,
            f"{row['success']:.2f}",
            f"[{low:.2f}, {high:.2f}]",
            f"{row['handed_over_at_step_median']:.0f}",
            f"{row['cpu_s_per_episode']:.2f}",
        )
    console = Console()
    console.print(table)
    for size, cpu_s in pictures.items():
        console.print(f"a picture of {size}: {cpu_s * 1000:.0f} ms of CPU time")
    document = {
        "expert_version": EXPERT_VERSION,
        "first_seed": arguments.first_seed,
        "renderer": os.environ.get("MUJOCO_GL", ""),
        "results": results,
        "picture_cpu_s": pictures,
        "load_average_at_the_end": os.getloadavg()[0],
    }
    path = Path(arguments.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    console.print(f"written to {path}")


if __name__ == "__main__":
    main()
