"""CPU time of a PushT step with its observation: ours against gym-pusht's own environment.

    OMP_NUM_THREADS=1 python -m benchmarks.push_t_steps

Both play the same actions from the same starts, alternately, a random target held for eight steps,
and give the agent's position and a picture of 96 px after each; states and pictures are compared
first. Writes ``benchmarks/results/push_t_steps.json``.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from envs.push_t import BOARD_PX, PushT

IMAGE_PX = 96
HOLD = 8


def targets(seed: int, n_steps: int) -> np.ndarray:
    """Actions of one episode, (step, 2), in px."""
    generator = np.random.default_rng(seed)
    return np.repeat(generator.uniform(0, BOARD_PX, (n_steps // HOLD + 1, 2)), HOLD, axis=0)[
        :n_steps
    ]


def compare(ours: PushT, gym: Any, n_steps: int) -> None:
    """Play one episode on both.

    Raises:
        AssertionError: When they do not see the same.
    """
    ours.reset(0)
    gym.reset(seed=0)
    for action in targets(0, n_steps):
        score = ours.step(action).score
        seen, _, _, _, info = gym.step(action)
        mine = ours.observe()
        np.testing.assert_array_equal(mine["images"]["image"], seen["pixels"])
        np.testing.assert_array_equal(mine["state"], seen["agent_pos"].astype(np.float32))
        np.testing.assert_allclose(score, info["coverage"], rtol=1e-12)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help="episodes of each, alternating")
    parser.add_argument("--n_steps", type=int, default=300)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "push_t_steps.json"
    )
    args = parser.parse_args()
    ours = PushT(IMAGE_PX)
    from gym_pusht.envs.pusht import PushTEnv  # Says less after it was imported by ours.

    gym = PushTEnv("pixels_agent_pos", observation_width=IMAGE_PX, observation_height=IMAGE_PX)
    compare(ours, gym, args.n_steps)

    def play_ours(seed: int, actions: np.ndarray) -> None:
        ours.reset(seed)
        for action in actions:
            ours.step(action)
            ours.observe()

    def play_gym(seed: int, actions: np.ndarray) -> None:
        gym.reset(seed=seed)
        for action in actions:
            gym.step(action)

    times: dict[str, list[float]] = {"ours": [], "gym-pusht": []}
    for seed in range(args.rounds):
        actions = targets(seed, args.n_steps)
        for name, play in (("ours", play_ours), ("gym-pusht", play_gym)):
            started = time.process_time()
            play(seed, actions)
            times[name].append((time.process_time() - started) * 1e3 / args.n_steps)
    found = {
        name: {"median": statistics.median(each), "min": min(each), "max": max(each)}
        for name, each in times.items()
    }
    result = {
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": 1},
        "rounds": args.rounds,
        "n_steps": args.n_steps,
        "image_px": IMAGE_PX,
        "cpu_ms_per_step": found,
        "ratio": found["gym-pusht"]["median"] / found["ours"]["median"],
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    for name, each in found.items():
        print(f"{name:<10}{each['median']:.3f} CPU-ms ({each['min']:.3f} to {each['max']:.3f})")
    print(f"{result['ratio']:.2f}x; wrote {args.output}")


if __name__ == "__main__":
    main()
