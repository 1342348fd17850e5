"""Start-up: ``train.py --help`` against LeRobot's own trainer's, and against bare imports.

    OMP_NUM_THREADS=1 python -m benchmarks.startup

Each command is a fresh process, alternating; CPU time of the process and its children.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from pathlib import Path

COMMANDS = {
    "train.py --help": ["train.py", "--help"],
    "train.py fit --help": ["train.py", "fit", "--help"],
    "analyze.py --help": ["analyze.py", "--help"],
    "lerobot-train --help": ["-m", "lerobot.scripts.lerobot_train", "--help"],
    "import lightning, torchvision, lerobot": [
        "-c",
        "import lightning.pytorch, torchvision, lerobot.datasets.lerobot_dataset",
    ],
}


def cpu_s(words: list[str]) -> float:
    """CPU time of one fresh process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
        cwd=Path(__file__).resolve().parents[1],
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="alternating rounds")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "startup.json"
    )
    arguments = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    # The first round reads files from the disk.
    for round_number in range(arguments.rounds + 1):
        for name, words in COMMANDS.items():
            took = cpu_s(words)
            if round_number:
                times[name].append(took)
    result = {
        "machine": {"cpu": platform.machine(), "load_average": os.getloadavg()[0]},
        "rounds": arguments.rounds,
        "cpu_s": {
            name: {"median": statistics.median(each), "min": min(each), "max": max(each)}
            for name, each in times.items()
        },
    }
    for name, each in result["cpu_s"].items():
        print(f"{name:40s} {each['median']:.2f} CPU-s ({each['min']:.2f} to {each['max']:.2f})")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
