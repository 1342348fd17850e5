"""Shuffled activations from disk: our shuffle buffer against single rows of small files.

The peer is a scheme in use: samples lie in files of 128, an epoch asks for them in random order,
and the two files that were used last stay in memory. One thread; both read the same made-up
activations, which are warm in the page cache, so times are those of copying, not of a disk; bytes
that are asked for are counted. Sides alternate; medians over rounds. Time is CPU time
(``time.process_time``), which other programs on the machine disturb less than the clock.

    python -m benchmarks.activation_reads
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from datamodules.activation_store import ActivationShapes, ActivationStore, open_or_build
from datamodules.shuffle_buffer import ShuffleBuffer, VectorDataset, VectorSampler
from features.taps import TokenPosition

N_EPISODES, EPISODE_LENGTH = 160, 128
N_TOKENS, DIM = 11, 128
BUFFER_MB = 16
VECTORS_PER_BATCH = 4096 // N_TOKENS * N_TOKENS
SAMPLES_PER_FILE, FILES_IN_MEMORY = 128, 2
PEER_BATCHES = 4
TARGET_AMPLIFICATION = 1.5


class FileRows(Dataset[torch.Tensor]):
    """Single samples out of files of many."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.bytes_read = 0
        self._recent: OrderedDict[int, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return len(self.files) * SAMPLES_PER_FILE

    def __getitem__(self, index: int) -> torch.Tensor:
        number, row = divmod(index, SAMPLES_PER_FILE)
        if number not in self._recent:
            self._recent[number] = np.load(self.files[number])
            self.bytes_read += self._recent[number].nbytes
            if len(self._recent) > FILES_IN_MEMORY:
                self._recent.popitem(last=False)
        self._recent.move_to_end(number)
        return torch.from_numpy(self._recent[number][row]).float()


def make_store(folder: Path) -> ActivationStore:
    positions = tuple(TokenPosition("token") for _ in range(N_TOKENS))
    shapes = ActivationShapes(
        tuple(range(N_EPISODES)), (EPISODE_LENGTH,) * N_EPISODES, positions, DIM
    )
    generator = torch.Generator().manual_seed(0)

    def compute(frames: range) -> torch.Tensor:
        return torch.randn(len(frames), N_TOKENS, DIM, generator=generator)

    return open_or_build(folder, shapes, "float16", {"made": "up"}, compute, 32, progress=False)


def make_files(folder: Path, store: ActivationStore) -> list[Path]:
    folder.mkdir()
    files = []
    for start in range(0, store.shapes.n_frames, SAMPLES_PER_FILE):
        files.append(folder / f"{start}.npy")
        np.save(files[-1], store.read(range(start, start + SAMPLES_PER_FILE)).numpy())
    return files


def cpu_seconds(work: Callable[[], int]) -> tuple[float, int]:
    start = time.process_time()
    count = work()
    return time.process_time() - start, count


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def measure(folder: Path, rounds: int) -> dict:
    store = make_store(folder / "store")
    rows = FileRows(make_files(folder / "files", store))
    pieces = store.shapes.all_pieces
    bytes_per_vector = DIM * 2
    counted: dict[str, float] = {}

    def ours() -> int:
        # A new buffer each round: nothing of the round before may be left in it.
        buffer = ShuffleBuffer(store, pieces, N_TOKENS, DIM, 2, "token", BUFFER_MB * 2**20)
        assert not buffer.holds_all, "the store must not fit the buffer"
        sampler = VectorSampler(len(buffer), VECTORS_PER_BATCH, seed=0)
        dataset = VectorDataset(buffer, seed=0)
        loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=lambda batch: batch)
        return sum(len(batch) for batch in loader)

    def theirs() -> int:
        generator = torch.Generator().manual_seed(0)
        loader = DataLoader(rows, VECTORS_PER_BATCH // N_TOKENS, shuffle=True, generator=generator)
        batches = zip(range(PEER_BATCHES), loader, strict=False)
        return sum(batch.flatten(0, 1).shape[0] for _, batch in batches)

    found: dict = {}
    sides = (("ours", ours, store), ("peer", theirs, rows))
    for _, work, _ in sides:
        work()
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    for _ in range(rounds):
        for side, work, source in sides:
            before = source.bytes_read
            took, n_vectors = cpu_seconds(work)
            seconds[side].append(n_vectors / took)
            counted[side] = (source.bytes_read - before) / (n_vectors * bytes_per_vector)
    for side, rates in seconds.items():
        found[side] = {"read_amplification": counted[side], "vectors_per_cpu_s": spread(rates)}
    found["ratio_of_rates"] = statistics.median(seconds["ours"]) / statistics.median(
        seconds["peer"]
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "activation_reads.json"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        results = {
            "machine": {"cpu": platform.processor() or platform.machine(), "threads": 1},
            "vectors": N_EPISODES * EPISODE_LENGTH * N_TOKENS,
            "dim": DIM,
            "store_mb": N_EPISODES * EPISODE_LENGTH * N_TOKENS * DIM * 2 / 2**20,
            "buffer_mb": BUFFER_MB,
            "batch": VECTORS_PER_BATCH,
            "rounds": args.rounds,
            **measure(Path(folder), args.rounds),
        }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=2) + "\n")

    ours, peer = results["ours"], results["peer"]
    print(f"{'':<24}{'ours':>12}{'peer':>12}   target")
    print(
        f"{'bytes read / bytes used':<24}{ours['read_amplification']:>12.2f}"
        f"{peer['read_amplification']:>12.1f}   <= {TARGET_AMPLIFICATION}"
    )
    print(
        f"{'vectors per CPU-s':<24}{ours['vectors_per_cpu_s']['median']:>12,.0f}"
        f"{peer['vectors_per_cpu_s']['median']:>12,.0f}   {results['ratio_of_rates']:.0f}x"
    )
    print(f"Wrote {args.output}")


if __name__ == "__main__":
    main()
