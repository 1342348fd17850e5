"""What a training step sends to the other processes: counted on two, modelled to 64 GPUs.

    OMP_NUM_THREADS=1 python -m benchmarks.scaling

*Counted*: three networks of this project train under PyTorch's DistributedDataParallel as one and
as two processes of one thread (gloo, CPU). A communication hook counts the bytes of every gradient
bucket, as they are handed to the all-reduce; CPU seconds a step are medians. No speed-up is
measured: that takes as many free cores as processes.

*Modelled*: a ring all-reduce sends 2 (N - 1) / N times the gradients from each process, over the
slowest link that it crosses, in 2 (N - 1) messages. Computing takes FLOPs / rate. A step takes
their sum when nothing overlaps, and at best, when gradients travel while the backward pass (two
thirds of computing) goes on, computing + max(0, communication - backward). Rates, bandwidths and
latency are assumptions, stated in ``ASSUMED``.

Writes ``benchmarks/results/scaling.json`` and ``docs/images/scaling.webp``, and prints the tables
of ``docs/scaling.md``.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import yaml
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from autoencoders.sae import build_autoencoder
from lightning_modules.act import ActModule
from policies.interface import Batch, Observation

ROOT = Path(__file__).resolve().parents[1]
SIZES = (1, 2, 4, 8, 16, 32, 64)
ASSUMED = {
    "teraflop_per_s": {"value": 100.0, "what": "that a GPU sustains in these networks"},
    "gpus_per_node": {"value": 8, "what": "joined by NVLink"},
    "latency_us": {"value": 10.0, "what": "of one message"},
    "backward_share": {"value": 2 / 3, "what": "of computing"},
    "gigabyte_per_s": {
        "NVLink": 450.0,
        "InfiniBand 400 Gb/s": 50.0,
        "Ethernet 100 Gb/s": 12.5,
    },
}
"""Of the model: none of them was measured here."""


class Loss(nn.Module):
    """A network whose forward pass is its training loss, as the wrapper wants it."""

    def __init__(self, network: nn.Module, loss: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.network = network
        self._loss = loss

    def forward(self, batch: Any) -> Tensor:
        """Loss of a batch."""
        return self._loss(self.network, batch)


@dataclass(frozen=True)
class Case:
    """A network, and a batch of it."""

    make: Callable[[], Loss]
    batch: Callable[[int, int], Any]
    """Of a size, from a seed."""
    batch_size: int
    """Of one GPU, in the model."""
    measured_batch_size: int
    """Of one process, here."""


def _act(config: Path, size_px: int, chunk: int) -> tuple[Callable, Callable]:
    found = yaml.safe_load((ROOT / config).read_text())
    arguments = found.get("model", found)["init_args"]

    def make() -> Loss:
        torch.manual_seed(0)
        module = ActModule(
            **{**arguments, "dropout": 0.0, "shift_px": 0, "brightness": 0.0, "contrast": 0.0},
            cameras={"image": [size_px, size_px]},
            state_dim=2,
            action_dim=2,
            chunk_size=chunk,
        )
        return Loss(module.policy.train(), _act_loss)

    def batch(n: int, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        image = torch.rand(n, 3, size_px, size_px, generator=generator)
        state = torch.randn(n, 2, generator=generator)
        actions = torch.randn(n, chunk, 2, generator=generator)
        index = torch.arange(n)
        is_pad = torch.zeros(n, chunk, dtype=torch.bool)
        return Batch(Observation({"image": image}, state), actions, is_pad, index, index)

    return make, batch


def _act_loss(policy: Any, batch: Batch) -> Tensor:
    return policy.loss(batch, 0.1).total


def _sae() -> tuple[Callable, Callable]:
    def make() -> Loss:
        torch.manual_seed(0)
        return Loss(build_autoencoder("batch_topk", d_in=512, n_latents=4096, k=32), _sae_loss)

    def batch(n: int, seed: int) -> Tensor:
        return torch.randn(n, 512, generator=torch.Generator().manual_seed(seed))

    return make, batch


def _sae_loss(sae: Any, batch: Tensor) -> Tensor:
    return sae.loss(batch).total


CASES = {
    "ACT of the demo": Case(*_act(Path("configs/model/act_small.yaml"), 48, 16), 64, 16),
    "ACT, act_pusht": Case(*_act(Path("configs/experiment/act_pusht.yaml"), 96, 20), 64, 4),
    "ACT, act_reference": Case(*_act(Path("configs/model/act.yaml"), 96, 100), 32, 2),
    "SAE, d 512, F 4096": Case(*_sae(), 4096, 1024),
}


def train(name: str, rank: int, world: int, meeting: str, n_steps: int) -> dict[str, Any]:
    """Take steps as one of ``world`` processes, and say what was sent and computed."""
    torch.set_num_threads(1)
    case = CASES[name]
    module = case.make()
    sent: list[int] = []
    wrapped: nn.Module = module
    if world > 1:
        dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=world)
        wrapped = DistributedDataParallel(module)

        def count(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            sent.append(bucket.buffer().nbytes)
            return allreduce_hook(dist.group.WORLD, bucket)

        wrapped.register_comm_hook(None, count)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    cpu_s, bytes_a_step = [], []
    for _ in range(n_steps):
        batch = case.batch(case.measured_batch_size, rank)
        sent.clear()
        before = time.process_time()
        wrapped(batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        cpu_s.append(time.process_time() - before)
        bytes_a_step.append(sum(sent))
    if world > 1:
        dist.destroy_process_group()
    # The first step orders the buckets, and warms up.
    return {"cpu_s": statistics.median(cpu_s[1:]), "bytes": sorted({*bytes_a_step[1:]})}


def _report(rank: int, name: str, world: int, meeting: str, n_steps: int, folder: str) -> None:
    found = train(name, rank, world, meeting, n_steps)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))


def count(name: str, n_steps: int) -> dict[str, Any]:
    """Train one network as one and as two processes."""
    case = CASES[name]
    module = case.make()
    parameters = [each for each in module.parameters() if each.requires_grad]
    batch = case.batch(case.measured_batch_size, 0)
    with FlopCounterMode(display=False) as counter:
        module(batch).backward()
    with_gradient = [each for each in parameters if each.grad is not None]
    result: dict[str, Any] = {
        "parameters": sum(each.numel() for each in parameters),
        "gradient_bytes": sum(each.numel() * each.element_size() for each in with_gradient),
        "buffer_bytes": sum(each.numel() * each.element_size() for each in module.buffers()),
        "gflop_a_sample": counter.get_total_flops() / case.measured_batch_size / 1e9,
        "batch_size": case.batch_size,
        "measured_batch_size": case.measured_batch_size,
    }
    for world in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            arguments = (name, world, f"{folder}/meeting", n_steps, folder)
            multiprocessing.start_processes(_report, arguments, nprocs=world, start_method="spawn")
            found = [
                json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)
            ]
        result[f"{world} processes"] = {
            "cpu_s_a_step": [each["cpu_s"] for each in found],
            "bytes_a_step": found[0]["bytes"],
        }
    return result


def model(counted: dict[str, Any]) -> list[dict[str, Any]]:
    """Time of a step over the number of GPUs, in ms, each GPU with the same batch."""
    rate = ASSUMED["teraflop_per_s"]["value"] * 1e12
    latency_s = ASSUMED["latency_us"]["value"] * 1e-6
    computing_s = counted["gflop_a_sample"] * 1e9 * counted["batch_size"] / rate
    backward_s = ASSUMED["backward_share"]["value"] * computing_s
    rows = []
    for n in SIZES:
        sent = 2 * (n - 1) / n * counted["gradient_bytes"]
        row: dict[str, Any] = {
            "gpus": n,
            "sent_mb": sent / 1e6,
            "computing_ms": 1e3 * computing_s,
            "links": {},
        }
        for link, bandwidth in ASSUMED["gigabyte_per_s"].items():
            if link == "NVLink" and n > ASSUMED["gpus_per_node"]["value"]:
                continue
            if link != "NVLink" and n <= ASSUMED["gpus_per_node"]["value"]:
                continue
            sending_s = sent / (bandwidth * 1e9) + 2 * (n - 1) * latency_s
            best_s = computing_s + max(0.0, sending_s - backward_s)
            worst_s = computing_s + sending_s
            row["links"][link] = {
                "communication_ms": 1e3 * sending_s,
                "step_ms": [1e3 * best_s, 1e3 * worst_s],
                "efficiency": [computing_s / worst_s, computing_s / best_s],
            }
        rows.append(row)
    return rows


def draw(modelled: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw the efficiency of each network over the number of GPUs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(12.6, 3.2), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    colours = dict(zip(ASSUMED["gigabyte_per_s"], ("#339966", "#3366aa", "#dd7733"), strict=True))
    for axes, (name, rows) in zip(
        figure.subplots(1, len(modelled), sharey=True), modelled.items(), strict=True
    ):
        for link, colour in colours.items():
            found = [
                (row["gpus"], *row["links"][link]["efficiency"])
                for row in rows
                if link in row["links"]
            ]
            gpus, low, high = (np.array(each, float) for each in zip(*found, strict=True))
            axes.fill_between(gpus, 100 * low, 100 * high, color=colour, alpha=0.2, lw=0)
            axes.plot(gpus, 100 * low, "o-", ms=3, lw=1, color=colour)
            axes.plot(gpus, 100 * high, "o-", ms=3, lw=1, color=colour, label=link)
        axes.axvline(8, color="#999999", lw=0.8, ls=":")
        axes.set_xscale("log", base=2)
        axes.set_xticks(SIZES, [str(size) for size in SIZES], fontsize=8)
        axes.tick_params(labelsize=8)
        axes.set_ylim(0, 104)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("GPUs (8 a node)", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("time spent computing, %", fontsize=8)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=8
    )
    figure.suptitle(
        "Modelled, not measured: no overlap (lower edge) to full overlap with the backward pass",
        fontsize=9,
    )
    canvas.draw()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy()).save(path, lossless=True)


def tables(counted: dict[str, Any], modelled: dict[str, list[dict[str, Any]]]) -> str:
    """The two tables of ``docs/scaling.md``."""
    lines = [
        "| network | parameters | gradients | sent a step by each of 2 | buffers | CPU-s a step, 1 "
        "process | 2 processes, each |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, each in counted.items():
        one, two = each["1 processes"], each["2 processes"]
        sent = " or ".join(f"{value:,}" for value in two["bytes_a_step"])
        theirs = ", ".join(f"{value:.3f}" for value in two["cpu_s_a_step"])
        lines.append(
            f"| {name}, batch {each['measured_batch_size']} | {each['parameters']:,} | "
            f"{each['gradient_bytes']:,} B | {sent} B | {each['buffer_bytes']:,} B | "
            f"{one['cpu_s_a_step'][0]:.3f} | {theirs} |"
        )
    lines += [
        "",
        "| network, batch a GPU | GPUs | sent by each, MB | computing, ms | link | communication, "
        "ms | step, ms | computing, % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in modelled.items():
        for row in rows:
            if row["gpus"] not in (1, 8, 16, 64):
                continue
            for link, found in row["links"].items():
                if row["gpus"] == 1:
                    continue
                best, worst = found["step_ms"]
                low, high = found["efficiency"]
                lines.append(
                    f"| {name}, {counted[name]['batch_size']} | {row['gpus']} | "
                    f"{row['sent_mb']:.1f} | {row['computing_ms']:.2f} | {link} | "
                    f"{found['communication_ms']:.2f} | {best:.2f} to {worst:.2f} | "
                    f"{100 * low:.0f} to {100 * high:.0f} |"
                )
    return "\n".join(lines)


def main() -> None:
    """Count, model, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--steps", type=int, default=6, help="of each network; the first is warm-up"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/scaling.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/images/scaling.webp")
    arguments = parser.parse_args()
    counted = {name: count(name, arguments.steps) for name in CASES}
    modelled = {name: model(each) for name, each in counted.items()}
    result = {
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count()},
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "steps": arguments.steps,
        "counted": counted,
        "assumed": ASSUMED,
        "modelled": modelled,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    draw(modelled, arguments.picture)
    print(tables(counted, modelled))


if __name__ == "__main__":
    main()
