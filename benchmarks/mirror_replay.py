"""How exact the mirrored worlds of PushT are: replays of demonstrations and of random wandering.

    OMP_NUM_THREADS=1 python -m benchmarks.mirror_replay --path DEMOS.hdf5

Every script is played in the benchmark and, mirrored, in three worlds: arm 1 (the benchmark seen in
a mirror), a simulator of its own with the mirrored goal, and the benchmark in its own diagonal.
Wandering starts from the benchmark's own starts and pushes the T into the walls. Prints one table,
writes ``benchmarks/results/mirror_replay.json``.
"""

import argparse
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from commands.symmetry import recorded_scripts
from envs.push_t import PushT, PushTTask, wander
from envs.symmetry import Script, SymmetryResult, measure_symmetry


def wandering_scripts(seeds: range, n_steps: int) -> list[Script]:
    """Random targets from random starts."""
    board, scripts = PushT(), []
    for seed in seeds:
        board.reset(seed)
        start = board.state()
        scripts.append(Script(f"seed {seed}", start, wander(start[:2], n_steps, seed)))
    board.close()
    return scripts


def measure(name: str, scripts: Sequence[Script]) -> SymmetryResult:
    """Play all scripts in all worlds."""
    task, shown = PushTTask(), iter(track(range(len(scripts)), description=name, transient=True))
    return measure_symmetry(task, scripts, progress=lambda n_done: next(shown, None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", required=True, help="PushT demonstrations with states")
    parser.add_argument("--n_wanderings", type=int, default=100)
    parser.add_argument("--n_steps", type=int, default=200, help="of a wandering")
    parser.add_argument("--first_seed", type=int, default=300_000)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "mirror_replay.json"
    )
    arguments = parser.parse_args()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.n_wanderings)
    sources = {
        "demonstrations": recorded_scripts(PushTTask(), arguments.path, episode_idx=["all"]),
        "wandering": wandering_scripts(seeds, arguments.n_steps),
    }
    table = Table(title="Mirrored replays of PushT")
    for column in ("scripts", "world", "exact", "at a wall", "px, max", "before a wall", "camera"):
        table.add_column(column)
    report = {
        "python": platform.python_version(),
        "data": Path(arguments.path).name,
        "n_steps_of_a_wandering": arguments.n_steps,
        "first_seed": arguments.first_seed,
        "results": {},
    }
    for name, scripts in sources.items():
        began = time.perf_counter()
        result = measure(name, scripts)
        worlds = {each.world.name: each.summary() for each in result.worlds}
        report["results"][name] = {
            "wall_s": time.perf_counter() - began,
            "passed": result.passed,
            "checks": [check.to_dict() for check in result.checks if not check.is_control],
            "worlds": worlds,
            "diverged": {
                each.world.name: [
                    episode.to_dict() for episode in each.episodes if episode.is_apart.any()
                ]
                for each in result.worlds
            },
        }
        for world, found in worlds.items():
            table.add_row(
                name,
                world,
                f"{round(found['share_exact'] * len(scripts))} of {len(scripts)}",
                str(found["n_disturbed"]),
                f"{found['position_max']:.2g}",
                f"{found['position_max_undisturbed']:.2g}",
                f"{found['picture_error']:.3f}",
            )
    Console(width=110).print(table)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
