"""First epoch from films, and samples ever after: our store against bare PyAV and LeRobotDataset.

Filling is compared with the shortest loop that decodes the same films into one array with PyAV
(``frame.to_ndarray``, and with a shared converter, which is what the reader uses). Samples are
gathered one batch at a time from shuffled indices, LeRobot's in the same process. One thread for
torch; sides alternate; medians over rounds of CPU time, which other programs disturb less than the
clock. PyAV's codec threads count in full.

    python -m benchmarks.lerobot_fill --dataset_repo_id FOLDER
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter

from datamodules.lerobot import LeRobotDataModule
from datamodules.lerobot_files import Folder, find_folder, needed_files, read_folder

BATCH_SIZE = 64
TARGET_FILL_RATIO = 1.3
TARGET_MS = 0.06


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def decode_bare(folder: Folder, shared_converter: bool) -> None:
    """Every film once, each into one array of bytes."""
    for key, camera in folder.cameras.items():
        films = [
            f for f in needed_files(folder, list(folder.episodes), [key]) if f.suffix == ".mp4"
        ]
        frames = sum(episode.length for episode in folder.episodes.values())
        pictures = np.empty((frames, camera.height, camera.width, 3), np.uint8)
        row = 0
        for film in films:
            with av.open(str(film)) as container:
                container.streams.video[0].thread_type = "AUTO"
                converter = VideoReformatter()
                for frame in container.decode(video=0):
                    if shared_converter:
                        pictures[row] = converter.reformat(frame, format="rgb24").to_ndarray()
                    else:
                        pictures[row] = frame.to_ndarray(format="rgb24")
                    row += 1


def module(path: str, **arguments) -> LeRobotDataModule:
    return LeRobotDataModule(
        path, **{"batch_size": BATCH_SIZE, "val_fraction": 0.0, "progress": False, **arguments}
    )


def measure_fill(path: str, rounds: int) -> dict:
    folder = read_folder(find_folder(path))

    def filled() -> None:
        module(path, chunk_size=1, storage="ram").setup()

    def cached(cache: str) -> None:
        module(path, chunk_size=1, storage="memmap", cache_dir=cache).setup()

    sides = {
        "bare_to_ndarray": lambda: decode_bare(folder, shared_converter=False),
        "bare_shared_converter": lambda: decode_bare(folder, shared_converter=True),
        "ours_ram": filled,
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, work in sides.items():
            seconds[name].append(cpu_seconds(work))
    with tempfile.TemporaryDirectory() as cache:
        first = cpu_seconds(lambda: cached(cache))
        second = [cpu_seconds(lambda: cached(cache)) for _ in range(rounds)]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "frames": sum(episode.length for episode in folder.episodes.values()),
        **{f"{name}_cpu_s": spread(values) for name, values in seconds.items()},
        "first_memmap_run_cpu_s": first,
        "later_memmap_run_cpu_s": spread(second),
        "ratio_to_bare_to_ndarray": medians["ours_ram"] / medians["bare_to_ndarray"],
        "ratio_to_bare_shared_converter": medians["ours_ram"] / medians["bare_shared_converter"],
    }


def measure_samples(path: str, chunk_size: int, rounds: int, lerobot_samples: int) -> dict:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    with tempfile.TemporaryDirectory() as cache:
        stores = {
            name: module(path, chunk_size=chunk_size, storage=name, cache_dir=cache)
            for name in ("ram", "memmap", "stream")
        }
        for data in stores.values():
            data.setup()
        fps = stores["ram"].fps or 10
        theirs = LeRobotDataset(
            "local/demonstrations",
            root=find_folder(path),
            delta_timestamps={"action": [step / fps for step in range(chunk_size)]},
            video_backend="pyav",
        )
        assert len(theirs) == len(stores["ram"].train_dataset), "the data sets differ in length"
        per_sample: dict[str, list[float]] = {name: [] for name in (*stores, "lerobot")}
        order = np.random.default_rng(0).permutation(len(theirs)).tolist()

        def gather(data: LeRobotDataModule) -> int:
            return sum(len(batch) for batch in data.train_dataloader())

        def ask() -> int:
            return len([theirs[index] for index in order[:lerobot_samples]])

        gather(stores["ram"])
        gather(stores["memmap"])
        for _ in range(rounds):
            for name, data in stores.items():
                seconds = cpu_seconds(lambda data=data: gather(data))
                per_sample[name].append(seconds / len(data.train_dataset) * 1e3)
            per_sample["lerobot"].append(cpu_seconds(ask) / lerobot_samples * 1e3)
    medians = {name: statistics.median(values) for name, values in per_sample.items()}
    return {
        **{f"{name}_cpu_ms_per_sample": spread(values) for name, values in per_sample.items()},
        "ratio_lerobot_to_memmap": medians["lerobot"] / medians["memmap"],
        "ratio_lerobot_to_stream": medians["lerobot"] / medians["stream"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dataset_repo_id", required=True, help="a LeRobotDataset v3 with films")
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds")
    parser.add_argument("--lerobot_samples", type=int, default=128, help="samples a round, LeRobot")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "lerobot_fill.json"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict = {
        "machine": {"cpu": platform.processor() or platform.machine(), "torch_threads": 1},
        "batch_size": BATCH_SIZE,
        "rounds": args.rounds,
        "fill": measure_fill(args.dataset_repo_id, args.rounds),
    }
    for chunk_size in (100, 16):
        results[f"chunk_{chunk_size}"] = measure_samples(
            args.dataset_repo_id, chunk_size, args.rounds, args.lerobot_samples
        )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=2) + "\n")

    fill = results["fill"]
    print(f"{'CPU-s, ' + str(fill['frames']) + ' frames':<44}{'median':>8}{'ours':>8}   target")
    for side in ("bare_to_ndarray", "bare_shared_converter"):
        ratio = fill[f"ratio_to_{side}"]
        print(
            f"{side:<44}{fill[f'{side}_cpu_s']['median']:>8.2f}{ratio:>7.2f}x   "
            f"<= {TARGET_FILL_RATIO}x"
        )
    print(f"{'ours: check tables, decode, fill':<44}{fill['ours_ram_cpu_s']['median']:>8.2f}")
    later = fill["later_memmap_run_cpu_s"]["median"]
    print(f"{'ours: a later run from the cache':<44}{later:>8.2f}")
    print(f"{'CPU-ms a sample':<20}{'ram':>9}{'memmap':>9}{'stream':>9}{'LeRobot':>9}   target")
    for chunk_size in (100, 16):
        found = results[f"chunk_{chunk_size}"]
        cells = [
            f"{found[f'{name}_cpu_ms_per_sample']['median']:>9.4f}"
            for name in ("ram", "memmap", "stream", "lerobot")
        ]
        label = f"chunk {chunk_size}"
        print(f"{label:<20}{''.join(cells)}   <= {TARGET_MS} (ram, memmap)")
    print(f"Wrote {args.output}")


if __name__ == "__main__":
    main()
