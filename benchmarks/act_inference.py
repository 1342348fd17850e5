"""One prediction of ACT, batch 1, against LeRobot: same weights, picture and threads, alternating.

    python -m benchmarks.act_inference --threads 1

LeRobot's ``predict_action_chunk`` and our ``predict_chunk`` at LeRobot's defaults (51.6 M
parameters, 96 x 96 px, chunk 100), once with the whole chunk and once with the eight steps that a
controller executes. LeRobot's side gets its input normalised, ours normalises by itself. Medians
over rounds of CPU time, which other programs disturb less than the clock.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.act_step import lerobot_policy, our_policy
from policies.interface import Observation

EXECUTED = range(8)
TARGET_RATIO = 0.6
AGREEMENT = 1e-4


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=50, help="alternating rounds")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "act_inference.json"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    theirs = lerobot_policy().eval()
    ours = our_policy(theirs).eval()
    observation = Observation({"image": torch.rand(1, 3, 96, 96)}, torch.randn(1, 2))
    lerobot_batch = {
        "observation.image": observation.images["image"],
        "observation.state": observation.state,
    }

    sides: dict[str, Callable[[], Tensor]] = {
        "lerobot": lambda: theirs.predict_action_chunk(lerobot_batch),
        "ours, whole chunk": lambda: ours.predict_chunk(observation),
        "ours, 8 executed": lambda: ours.predict_chunk(observation, EXECUTED),
    }
    milliseconds = {side: {"cpu_ms": [], "wall_ms": []} for side in sides}
    with torch.no_grad():
        expected = sides["lerobot"]()
        differences = {
            side: float((predict() - expected[:, : predict().shape[1]]).abs().max())
            for side, predict in sides.items()
        }
        assert max(differences.values()) < AGREEMENT, f"not the same policy: {differences}"
        for _ in range(args.rounds):
            for side, predict in sides.items():
                wall, cpu = time.perf_counter(), time.process_time()
                predict()
                milliseconds[side]["cpu_ms"].append((time.process_time() - cpu) * 1e3)
                milliseconds[side]["wall_ms"].append((time.perf_counter() - wall) * 1e3)
    found = {
        side: {unit: spread(values) for unit, values in units.items()}
        for side, units in milliseconds.items()
    }
    ratios = {
        side: {
            unit: units[unit]["median"] / found["lerobot"][unit]["median"]
            for unit in ("cpu_ms", "wall_ms")
        }
        for side, units in found.items()
    }
    results = {
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "load_average": os.getloadavg()[0],
        },
        "threads": args.threads,
        "torch": torch.__version__,
        "rounds": args.rounds,
        "largest_difference_normalised": differences,
        **found,
        "ratio_to_lerobot": ratios,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=2) + "\n")

    print(f"{'a prediction, batch 1':<24}{'CPU-ms':>8}{'wall ms':>9}{'ratio':>8}{'difference':>12}")
    for side, units in found.items():
        print(
            f"{side:<24}{units['cpu_ms']['median']:>8.1f}{units['wall_ms']['median']:>9.1f}"
            f"{ratios[side]['cpu_ms']:>7.2f}x{differences[side]:>12.1e}"
        )
    print(f"Target: 8 executed <= {TARGET_RATIO}x of LeRobot")
    print(f"Wrote {args.output}")


if __name__ == "__main__":
    main()
