"""Our action landscape against the published approach: same weights, machine and threads, one run.

    python -m benchmarks.landscapes --threads 1 --episode

The policy is LeRobot's ACT at its defaults (51.6 M parameters, 96 x 96 px, chunk 100); its weights
are random, which changes no cost. Published visualisers score the N x N candidate actions of a
frame 100 at a time: the frame is repeated, every candidate is held for the whole chunk, and
``policy.forward`` of the lot gives the loss, so that backbone and transformer run once for each
candidate. This is our own code of that approach, with LeRobot's own policy; the frame is normalised
beforehand. Ours is what ``analyze.py landscape`` calls: predictions in batches of frames, then cell
masses, scores and credible regions. Both in eval mode, without gradients.

A 50 x 50 grid is measured whole, and once a round as one forward out of 25; a 100 x 100 grid is
four times the 50 x 50 one, not measured. CPU time is ``time.process_time``. The floor is what the
multiplications alone would take: FLOPs, counted, over the best rate of the feed-forward layer's own
GEMM. Drawing is measured apart, and ``--episode`` times the whole command with two threads.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.act_step import CHUNK, lerobot_policy
from benchmarks.landscape_drawing import HEIGHT_PX, draw_with_matplotlib
from envs.demonstrations import collect
from landscapes.grid import Grid
from landscapes.landscape import HORIZONS, Landscape, Predictions
from landscapes.methods import Likelihood, Probe
from landscapes.study import predict_frames
from policies.act import ACTPolicy
from policies.interface import Batch, Observation
from policies.lerobot_view import processors_for
from policies.loading import load_policy
from rendering.landscape import side_by_side
from rendering.landscape_scenes import Column, scenes

if TYPE_CHECKING:
    from lerobot.policies.pretrained import PreTrainedPolicy

ROOT = Path(__file__).resolve().parents[1]
IMAGE_PX = 96
CELLS_PER_FORWARD = 100
PUBLISHED_RESOLUTION = 50
RESOLUTIONS = (50, 100, 128)
VARIANTS = {
    "K=64, k=0": (64, (0,)),
    "K=64, 4 horizons": (64, HORIZONS),
    "K=16, k=0": (16, (0,)),
}
KERNEL_SCALE_PX = 10.0
# Scales of the policy's inputs and outputs, about those of PushT.
STATISTICS = {
    "observation.image": {"mean": torch.full((3, 1, 1), 0.5), "std": torch.full((3, 1, 1), 0.25)},
    "observation.state": {"mean": torch.full((2,), 256.0), "std": torch.full((2,), 100.0)},
    "action": {"mean": torch.full((2,), 256.0), "std": torch.full((2,), 100.0)},
}
TARGET_CPU_S = 0.36
TARGET_RATIOS = {50: 200, 100: 800}
AGREEMENT_PX = 1e-3
EPISODE_STEPS = 100
EPISODE_THREADS = 2
EPISODE_TARGET_S = 60
# The longest is shown, others calibrate.
EPISODES = 12


@dataclass
class Costs:
    """Seconds of one piece of work, round after round."""

    cpu_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)

    def measure[T](self, work: Callable[[], T], units: int = 1) -> T:
        """Do the work and note what it took, for each of its units."""
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        self.cpu_s.append((time.process_time() - cpu) / units)
        self.wall_s.append((time.perf_counter() - wall) / units)
        return result

    def plus(self, other: "Costs") -> "Costs":
        """Two pieces of work of the same rounds, one after the other."""
        return Costs(
            [a + b for a, b in zip(self.cpu_s, other.cpu_s, strict=True)],
            [a + b for a, b in zip(self.wall_s, other.wall_s, strict=True)],
        )

    def summary(self) -> dict[str, dict[str, float]]:
        """Median and range over the rounds."""
        return {"cpu_s": spread(self.cpu_s), "wall_s": spread(self.wall_s)}


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


@dataclass(frozen=True)
class Published:
    """One frame, scored the published way."""

    policy: "PreTrainedPolicy"
    seen: dict[str, Tensor]
    """The frame as the policy's ``forward`` takes it, normalised."""
    normalise: Callable[[Tensor], Tensor]
    """Actions in px to the policy's units."""

    @torch.no_grad()
    def score(self, candidates: Float[Tensor, "cell 2"]) -> float:
        """Minus the loss of some candidates: one number for all of them, as published."""
        n = len(candidates)
        chunks = repeat(candidates, "cell action -> cell chunk action", chunk=CHUNK)
        batch = {key: value.repeat(n, *[1] * (value.ndim - 1)) for key, value in self.seen.items()}
        batch["action"] = self.normalise(chunks)
        batch["action_is_pad"] = torch.zeros(n, CHUNK, dtype=torch.bool)
        return -self.policy.forward(batch)[1]["l1_loss"]  # pyright: ignore[reportOptionalSubscript, reportArgumentType]

    def grid(self, resolution: int) -> list[float]:
        """Scores of all batches of a board."""
        cells = candidates_of(resolution)
        return [self.score(part) for part in cells.split(CELLS_PER_FORWARD)]


def candidates_of(resolution: int) -> Float[Tensor, "cell 2"]:
    centres = Grid(resolution).centres().float()
    return rearrange(centres, "row column action -> (row column) action")


def random_frames(n_frames: int) -> Batch:
    """Frames of one episode that nobody recorded: what is seen changes no cost."""
    generator = torch.Generator().manual_seed(0)
    size = (n_frames, 3, IMAGE_PX, IMAGE_PX)
    return Batch(
        Observation(
            {"image": torch.randint(256, size, dtype=torch.uint8, generator=generator)},
            512 * torch.rand(n_frames, 2, generator=generator),
        ),
        512 * torch.rand(n_frames, CHUNK, 2, generator=generator),
        torch.zeros(n_frames, CHUNK, dtype=torch.bool),
        torch.zeros(n_frames, dtype=torch.long),
        torch.arange(n_frames),
    )


def policies(folder: Path, frame: Batch) -> tuple[ACTPolicy, Published, dict[str, float]]:
    """LeRobot's policy, ours read from the folder it writes, and how far their numbers differ."""
    torch.manual_seed(0)
    theirs = lerobot_policy().eval()
    preprocessor, postprocessor = processors_for(theirs.config, STATISTICS)
    for part in (theirs, preprocessor, postprocessor):
        part.save_pretrained(folder)
    ours = load_policy(str(folder)).view
    assert isinstance(ours, ACTPolicy)
    images, state = frame.observation.images["image"], frame.observation.state
    assert state is not None
    processed = preprocessor(
        {"observation.image": images.float() / 255, "observation.state": state}
    )
    seen = {key: processed[key] for key in ("observation.image", "observation.state")}
    published = Published(
        theirs, seen, lambda actions: ours.normalise_actions(actions, frame.observation)
    )
    with torch.no_grad():
        chunk = ours.predict_chunk(frame.observation)
        their_chunk = postprocessor(theirs.predict_action_chunk(seen))
        candidate = torch.tensor([[100.0, 400.0]])
        score = -published.normalise(candidate[:, None] - chunk + 256.0).abs().mean()
    agreement = {
        "chunk_px": float((chunk - their_chunk).abs().max()),
        "score_of_one_candidate": abs(published.score(candidate) - float(score)),
    }
    assert max(agreement.values()) < AGREEMENT_PX, f"not the same policy: {agreement}"
    return ours, published, agreement


def likelihood(
    view: ACTPolicy, batch: Batch, predictions: Predictions, resolution: int
) -> Landscape:
    """Masses, scores and credible regions of every frame and horizon."""
    scale = torch.full_like(predictions.point[:1], KERNEL_SCALE_PX)
    grid = Grid(resolution)
    return Likelihood().landscape(Probe(view, batch, predictions, scale, predictions.queries, grid))


def gflop(work: Callable[[], object]) -> float:
    # The fused attention of CPUs is not counted, its plain form is.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return counter.get_total_flops() / 1e9


def gflop_per_cpu_s(rows: int) -> float:
    """Best rate of the feed-forward layer's matrix product."""
    x, weight = torch.randn(rows, 512), torch.randn(3200, 512)
    costs = Costs()
    for _ in range(60):
        costs.measure(lambda: torch.nn.functional.linear(x, weight))
    return 2 * rows * 512 * 3200 / min(costs.cpu_s) / 1e9


def measure_grids(ours: ACTPolicy, published: Published, batch: Batch, args) -> dict:
    """Seconds per timestep of both sides, alternating."""
    cells = candidates_of(PUBLISHED_RESOLUTION)[:CELLS_PER_FORWARD]
    n_forwards = PUBLISHED_RESOLUTION**2 // CELLS_PER_FORWARD
    one, whole = Costs(), Costs()
    predicting = {name: Costs() for name in VARIANTS}
    gridding = {(name, size): Costs() for name in VARIANTS for size in RESOLUTIONS}

    def predict(name: str, frames: Batch) -> Predictions:
        n_samples, queries = VARIANTS[name]
        return predict_frames(ours, frames, queries, n_samples, batch_size=args.batch_size)

    pair = batch.rows(slice(0, 2))
    with torch.no_grad():
        published.score(cells)
        for name in VARIANTS:
            likelihood(ours, pair, predict(name, pair), RESOLUTIONS[-1])
        for number in range(args.rounds):
            one.measure(lambda: published.score(cells))
            for name in VARIANTS:
                found = predicting[name].measure(lambda name=name: predict(name, batch), len(batch))
                for size in RESOLUTIONS:
                    gridding[name, size].measure(
                        lambda found=found, size=size: likelihood(ours, batch, found, size),
                        len(batch),
                    )
            if number < args.whole_grids:
                scores = whole.measure(lambda: published.grid(PUBLISHED_RESOLUTION))
                assert len(scores) == n_forwards
        rate = gflop_per_cpu_s(CELLS_PER_FORWARD * 11)
        their_gflop = gflop(lambda: published.score(cells)) * n_forwards
        our_gflop = {name: gflop(lambda name=name: predict(name, pair)) / 2 for name in VARIANTS}

    def with_floor(costs: Costs, floating: float) -> dict:
        floor = floating / rate
        share = floor / statistics.median(costs.cpu_s)
        return {**costs.summary(), "gflop": floating, "floor_cpu_s": floor, "matrix_share": share}

    result: dict = {
        "gemm_gflop_per_cpu_s": rate,
        "published": {
            "cells_per_forward": CELLS_PER_FORWARD,
            "one_forward": one.summary(),
            "50x50": {
                "forwards_measured": n_forwards,
                **with_floor(whole, their_gflop),
                "cpu_s_by_one_forward": n_forwards * statistics.median(one.cpu_s),
            },
            "100x100": {
                "forwards_measured": 0,
                "note": "four times 50x50",
                "cpu_s": {key: 4 * value for key, value in spread(whole.cpu_s).items()},
                "wall_s": {key: 4 * value for key, value in spread(whole.wall_s).items()},
                "gflop": 4 * their_gflop,
            },
        },
        "ours": {},
        "published_over_ours": {},
    }
    for name in VARIANTS:
        totals = {
            f"{size}x{size}": predicting[name].plus(gridding[name, size]) for size in RESOLUTIONS
        }
        result["ours"][name] = {
            "predict": with_floor(predicting[name], our_gflop[name]),
            "grid": {f"{size}x{size}": gridding[name, size].summary() for size in RESOLUTIONS},
            "total": {size: costs.summary() for size, costs in totals.items()},
        }
        result["published_over_ours"][name] = {
            size: {
                unit: result["published"][size][unit]["median"]
                / statistics.median(getattr(totals[size], unit))
                for unit in ("cpu_s", "wall_s")
            }
            | {"gflop": result["published"][size]["gflop"] / our_gflop[name]}
            for size in ("50x50", "100x100")
        }
    return result


def measure_drawing(ours: ACTPolicy, batch: Batch, rounds: int) -> dict:
    """Seconds to draw one frame, which is in none of the other numbers."""
    batch = batch.rows(slice(0, 8))
    with torch.no_grad():
        predictions = predict_frames(ours, batch, HORIZONS, n_samples=64)
        landscape = likelihood(ours, batch, predictions, RESOLUTIONS[-1])
    executed = predictions.point[:, 0]
    columns = [Column(landscape, k, predictions, executed=executed) for k in HORIZONS]
    pictures = torch.randint(256, (len(batch), HEIGHT_PX, HEIGHT_PX, 3), dtype=torch.uint8).numpy()
    ahead = list(scenes(columns, batch, pictures))
    now = list(scenes(columns[:1], batch, pictures))
    costs = {name: Costs() for name in ("ours, k=0", "ours, 4 horizons", "matplotlib, k=0")}
    for number in range(rounds + 1):
        place = number % len(batch)
        if number == 1:
            # The first round was warm-up.
            costs = {name: Costs() for name in costs}
        costs["ours, k=0"].measure(lambda place=place: side_by_side(now[place], HEIGHT_PX))
        costs["ours, 4 horizons"].measure(lambda place=place: side_by_side(ahead[place], HEIGHT_PX))
        costs["matplotlib, k=0"].measure(
            lambda place=place: draw_with_matplotlib(now[place], (8.0, 8.0))
        )
    result: dict = {name: each.summary() for name, each in costs.items()}
    medians = {name: statistics.median(each.cpu_s) for name, each in costs.items()}
    result["matplotlib_over_ours"] = medians["matplotlib, k=0"] / medians["ours, k=0"]
    return result


def measure_episode(policy: Path, folder: Path) -> dict:
    """The whole command on one scripted episode: start-up, data, calibration, videos, metrics."""
    demos = folder / "demos.hdf5"
    collect(demos, EPISODES, image_size=IMAGE_PX, progress=False)
    with h5py.File(demos) as file:
        lengths = [len(file[f"demo_{number}/actions"]) for number in range(EPISODES)]  # pyright: ignore[reportArgumentType]
    shown = lengths.index(max(lengths))
    assert lengths[shown] >= EPISODE_STEPS, f"the longest episode has {lengths[shown]} steps"
    command = [sys.executable, "analyze.py", "landscape"]
    command += ["--policy_path", str(policy), "--dataset_repo_id", str(demos)]
    command += ["--output_dir", str(folder / "out"), "--episode_idx", str(shown)]
    command += ["--max_steps", str(EPISODE_STEPS), "--n_samples", "64"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(EPISODE_THREADS)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    wall_s = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    config = json.loads((folder / "out" / f"episode_{shown}_config.json").read_text())
    return {
        "threads": EPISODE_THREADS,
        "n_frames": config["n_frames"],
        "horizons": config["horizons"],
        "n_samples": config["n_samples"],
        "calibration_frames": config["n_calibration_frames"],
        "files": config["files"],
        "wall_s": wall_s,
        "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "landscapes_wall_s": config["wall_s"],
        "target_wall_s": EPISODE_TARGET_S,
    }


def print_table(results: dict) -> None:
    grids, drawing = results["timestep"], results["drawing"]
    print(
        f"{'CPU-s a timestep':<30}{'50x50':>9}{'100x100':>9}{'128x128':>9}{'GFLOP':>8}{'matrix':>8}"
    )
    published = grids["published"]
    cells = "".join(f"{published[size]['cpu_s']['median']:>9.1f}" for size in ("50x50", "100x100"))
    whole = published["50x50"]
    print(f"{'published':<30}{cells}{'':>9}{whole['gflop']:>8.0f}{whole['matrix_share']:>8.0%}")
    for name, found in grids["ours"].items():
        cells = "".join(f"{each['cpu_s']['median']:>9.3f}" for each in found["total"].values())
        first = found["predict"]
        print(f"{'ours, ' + name:<30}{cells}{first['gflop']:>8.1f}{first['matrix_share']:>8.0%}")
    for unit in ("cpu_s", "wall_s", "gflop"):
        for name, ratios in grids["published_over_ours"].items():
            cells = "".join(f"{ratios[size][unit]:>8.0f}x" for size in ("50x50", "100x100"))
            print(f"{f'published / ours, {unit}, {name}':<48}{cells}")
    print("CPU-ms a frame drawn: ", end="")
    names = [name for name in drawing if name != "matplotlib_over_ours"]
    print("; ".join(f"{name} {drawing[name]['cpu_s']['median'] * 1e3:.1f}" for name in names))
    if (episode := results.get("episode")) is not None:
        print(
            f"command, {episode['n_frames']} frames, {EPISODE_THREADS} threads: "
            f"{episode['wall_s']:.0f} s wall, {episode['cpu_s']:.0f} CPU-s "
            f"(target <= {EPISODE_TARGET_S} s wall)"
        )
    ratios = " and ".join(f"{ratio}x ({size}x{size})" for size, ratio in TARGET_RATIOS.items())
    print(f"Targets for K=64: <= {TARGET_CPU_S} CPU-s, ratios >= {ratios}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds")
    parser.add_argument("--frames", type=int, default=64, help="timesteps of ours in a round")
    parser.add_argument(
        "--batch_size", type=int, default=64, help="frames that go through ours together"
    )
    parser.add_argument("--whole_grids", type=int, default=1, help="rounds with a whole 50x50 grid")
    parser.add_argument("--episode", action="store_true", help="time the whole command as well")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "landscapes.json"
    )
    args = parser.parse_args()
    if not 1 <= args.whole_grids <= args.rounds:
        parser.error(f"--whole_grids {args.whole_grids}: give 1 to --rounds {args.rounds}")
    torch.set_num_threads(args.threads)
    batch = random_frames(args.frames)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        policy_folder = folder / "policy"
        ours, published, agreement = policies(policy_folder, batch.rows(slice(0, 1)))
        results: dict = {
            "machine": {
                "cpu": platform.processor() or platform.machine(),
                "load_average": os.getloadavg()[0],
            },
            "threads": args.threads,
            "torch": torch.__version__,
            "parameters": sum(parameter.numel() for parameter in published.policy.parameters()),
            "rounds": args.rounds,
            "frames": args.frames,
            "batch_size": min(args.batch_size, args.frames),
            "largest_difference": agreement,
            "timestep": measure_grids(ours, published, batch, args),
            "drawing": measure_drawing(ours, batch, 4 * args.rounds),
        }
        if args.episode:
            results["episode"] = measure_episode(policy_folder, folder)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=2) + "\n")
    print_table(results)
    print(f"Wrote {args.output}")


if __name__ == "__main__":
    main()
