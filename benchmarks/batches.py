"""CPU time of training batches: our frame store against LeRobotDataset on the same demonstrations.

One thread, no worker processes, shuffled batches of 64 through a ``DataLoader``, sides alternating
in one process; medians over rounds. Time is CPU time (``time.process_time``), which other programs
on the machine disturb less than the clock.

    python -m benchmarks.batches --hdf5 demos.hdf5 --lerobot folder_of_the_same_demos
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import h5py
import numpy as np
import torch
from torch.utils.data import DataLoader

from datamodules.frame_store import StoreShapes, build_store
from datamodules.hdf5 import HDF5DataModule, describe_scan
from datamodules.hdf5_frames import fill_store
from datamodules.scan import scan_hdf5

BATCH_SIZE = 64
TARGET_MS = 0.06
TARGET_FILL_RATIO = 1.3


def cpu_seconds(work: Callable[[], int]) -> tuple[float, int]:
    start = time.process_time()
    count = work()
    return time.process_time() - start, count


def first_batches(loader: DataLoader, batches: int) -> int:
    samples = 0
    for _, batch in zip(range(batches), loader, strict=False):
        samples += len(batch["index"]) if isinstance(batch, dict) else len(batch)
    return samples


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def measure_batches(
    hdf5: Path, lerobot: Path, chunk_size: int, rounds: int, lerobot_batches: int
) -> dict:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    ours = HDF5DataModule(
        str(hdf5), batch_size=BATCH_SIZE, chunk_size=chunk_size, val_fraction=0.0, progress=False
    )
    ours.setup()
    fps = ours.fps or 10
    theirs = LeRobotDataset(
        "local/demonstrations",
        root=lerobot,
        delta_timestamps={"action": [step / fps for step in range(chunk_size)]},
        video_backend="pyav",
    )
    assert len(theirs) == len(ours.train_dataset), "the two data sets differ in length"
    theirs_loader = DataLoader(
        theirs, BATCH_SIZE, shuffle=True, generator=torch.Generator().manual_seed(0)
    )
    per_sample: dict[str, list[float]] = {"ours": [], "lerobot": []}
    samples = {"ours": 0, "lerobot": 0}
    for loader, batches in ((ours.train_dataloader(), 2), (theirs_loader, 1)):
        cpu_seconds(lambda loader=loader, batches=batches: first_batches(loader, batches))
    for _ in range(rounds):
        for side, loader, batches in (
            ("ours", ours.train_dataloader(), len(ours.train_dataloader())),
            ("lerobot", theirs_loader, lerobot_batches),
        ):
            seconds, count = cpu_seconds(
                lambda loader=loader, batches=batches: first_batches(loader, batches)
            )
            per_sample[side].append(seconds / count * 1e3)
            samples[side] += count
    result = {f"{side}_cpu_ms_per_sample": spread(values) for side, values in per_sample.items()}
    ratio = statistics.median(per_sample["lerobot"]) / statistics.median(per_sample["ours"])
    return {**result, "samples_measured": samples, "ratio": ratio}


def measure_fill(hdf5: Path, rounds: int) -> dict:
    """First epoch: scan, check and fill, against reading the same values with h5py alone."""
    scan = scan_hdf5(hdf5)
    (name, camera), *more = scan.cameras.items()
    assert not more, "the bare read is written for one camera"
    frames = sum(episode.length for episode in scan.episodes)
    paths = [*scan.schema.state, *scan.schema.action]
    paths += [scan.schema.simulator_state] if scan.schema.simulator_state else []

    def bare() -> int:
        pictures = np.empty((frames, camera.height, camera.width, 3), np.uint8)
        columns: list[np.ndarray] = []
        start = 0
        with h5py.File(hdf5) as file:
            for episode in scan.episodes:
                columns += [file[f"{episode.group}/{path}"][()] for path in paths]  # pyright: ignore
                dataset = file[f"{episode.group}/{camera.source.path}"]
                pictures[start : start + episode.length] = dataset[: episode.length]  # pyright: ignore
                start += episode.length
        return frames

    def ours() -> int:
        again = scan_hdf5(hdf5)
        source = describe_scan(again)
        shapes = StoreShapes(
            {name: (camera.height, camera.width)},
            source.columns,
            tuple(source.episode_lengths),
            tuple(source.episode_lengths.values()),
        )
        build_store(shapes, lambda writer: fill_store(again, writer), progress=False)
        return frames

    seconds: dict[str, list[float]] = {"bare_h5py": [], "scan_and_fill": []}
    for work in (bare, ours):
        work()
    for _ in range(rounds):
        for side, work in (("bare_h5py", bare), ("scan_and_fill", ours)):
            seconds[side].append(cpu_seconds(work)[0])
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    return {
        "frames": frames,
        **{f"{side}_cpu_s": spread(values) for side, values in seconds.items()},
        "ratio": medians["scan_and_fill"] / medians["bare_h5py"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hdf5", type=Path, required=True, help="demonstrations as HDF5")
    parser.add_argument("--lerobot", type=Path, required=True, help="the same as LeRobotDataset")
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds")
    parser.add_argument("--lerobot_batches", type=int, default=2, help="batches a round, LeRobot")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "batches.json"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict = {
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": 1},
        "batch_size": BATCH_SIZE,
        "rounds": args.rounds,
        "fill": measure_fill(args.hdf5, 3 * args.rounds),
    }
    for chunk_size in (100, 16):
        results[f"chunk_{chunk_size}"] = measure_batches(
            args.hdf5, args.lerobot, chunk_size, args.rounds, args.lerobot_batches
        )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=2) + "\n")

    print(f"{'CPU-ms a sample':<24}{'ours':>10}{'LeRobot':>10}{'ratio':>8}   target")
    for chunk_size in (100, 16):
        found = results[f"chunk_{chunk_size}"]
        ours = found["ours_cpu_ms_per_sample"]["median"]
        theirs = found["lerobot_cpu_ms_per_sample"]["median"]
        print(
            f"{f'batch 64, chunk {chunk_size}':<24}{ours:>10.4f}{theirs:>10.2f}"
            f"{found['ratio']:>7.0f}x   <= {TARGET_MS}"
        )
    fill = results["fill"]
    print(f"{'CPU-s, first epoch':<24}{'ours':>10}{'h5py':>10}{'ratio':>8}")
    print(
        f"{str(fill['frames']) + ' frames':<24}{fill['scan_and_fill_cpu_s']['median']:>10.2f}"
        f"{fill['bare_h5py_cpu_s']['median']:>10.2f}{fill['ratio']:>7.2f}x   "
        f"<= {TARGET_FILL_RATIO}x"
    )
    print(f"Wrote {args.output}")


if __name__ == "__main__":
    main()
