"""One optimiser step of a sparse autoencoder against its peers: same data, alternating.

    python -m benchmarks.sae_step --peers_path DIR --n_steps 8 --n_threads 1

A step is all that a training repeats: loss with the count of silent latents, backward, the
projection of the decoder's gradient, clipping at 1, Adam, unit rows. Peers run their own code for
it: ``update`` of dictionary-learning's trainers; eai-sparsify's ``SparseCoder`` as its trainer
drives it, without clipping, with ``torch.optim.Adam``. Peers are no dependencies of this project.
They go to a folder of their own, and what they import beyond torch is replaced by empty modules:

    pip install --no-deps --target DIR dictionary-learning==0.1.0 eai-sparsify==1.3.3 \
        simple-parsing natsort

Before anything is timed, our gradients are compared with those of dictionary-learning's dense
BatchTopK on the same weights. Medians over steps of CPU time; activations are of a planted
dictionary with half as many features as latents.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from autoencoders.planted import PlantedDictionary
from autoencoders.sae import SparseAutoencoder, build_autoencoder, default_learning_rate

GRADIENT_CLIP = 1.0
DEAD_AFTER = 10**7
DEAD_SHARE = 0.05
N_BATCHES = 4
WARM_UP_STEPS = 3
OURS, FASTEST = "ours BatchTopK", "eai-sparsify TopK"
SAME_MATHEMATICS = "dictionary-learning BatchTopK"
TARGETS = {
    "seconds of a step by the clock, 2 threads, at most": 0.40,
    f"{SAME_MATHEMATICS} / {OURS}, at least": 3.5,
    f"{FASTEST} / {OURS}, at least": 1.1,
}
NOT_NEEDED = (
    "accelerate",
    "datasets",
    "nnsight",
    "plotly",
    "schedulefree",
    "transformers",
    "umap",
    "zstandard",
)

Step = Callable[[Tensor], object]


class EmptyModule(ModuleType):
    """Stands for a package that a peer imports and does not use here."""

    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class EmptyFinder(MetaPathFinder, Loader):
    """Finds such packages and all within them."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        """Answer for them alone."""
        if fullname.split(".")[0] in NOT_NEEDED:
            return importlib.util.spec_from_loader(fullname, self)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """An empty one."""
        return EmptyModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


def import_peers(peers_path: Path) -> None:
    """Make the peers importable, for CPUs."""
    if not (peers_path / "dictionary_learning").is_dir():
        raise ValueError(
            f"--peers_path {peers_path} holds no dictionary_learning; install the peers there as "
            "the first lines of this file say"
        )
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    sys.path.append(str(peers_path))
    sys.meta_path.insert(0, EmptyFinder())
    with contextlib.redirect_stdout(io.StringIO()):
        importlib.import_module("dictionary_learning.trainers")
        importlib.import_module("sparsify")


def our_step(sae: SparseAutoencoder, n_dead: int) -> Step:
    """One step of ours, with everything that a training does in it."""
    parameters = list(sae.parameters())
    optimizer = torch.optim.Adam(parameters, default_learning_rate(sae.n_latents), fused=True)
    silent_for = torch.zeros(sae.n_latents, dtype=torch.int64)

    def step(x: Tensor) -> None:
        silent_for[:n_dead] = DEAD_AFTER
        loss = sae.loss(x, silent_for >= DEAD_AFTER)
        optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        sae.constrain_gradients()
        torch.nn.utils.clip_grad_norm_(parameters, GRADIENT_CLIP)
        optimizer.step()
        sae.constrain_weights()
        silent_for.add_(len(x)).masked_fill_(loss.fired, 0)

    return step


def dictionary_learning_trainer(name: str, dim: int, width: int, k: int, **options: Any) -> Any:
    """One of its trainers, at its defaults."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    kind = {
        "BatchTopK": BatchTopKTrainer,
        "Matryoshka": MatryoshkaBatchTopKTrainer,
        "TopK": TopKTrainer,
    }[name]
    if name == "Matryoshka":
        options["group_fractions"] = [1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32]
    return kind(
        activation_dim=dim, dict_size=width, k=k, layer=0, lm_name="none", device="cpu", **options
    )


def dictionary_learning_step(name: str, dim: int, width: int, k: int, n_dead: int) -> Step:
    """A step of one of its trainers."""
    trainer = dictionary_learning_trainer(name, dim, width, k, steps=10**6)
    trainer.dead_feature_threshold = DEAD_AFTER
    steps = iter(range(10**6))

    def step(x: Tensor) -> None:
        trainer.num_tokens_since_fired[:n_dead] = DEAD_AFTER
        trainer.update(next(steps), x)

    return step


def sparsify_step(
    dim: int,
    width: int,
    k: int,
    n_dead: int = 0,
    schedule: Callable[[int], float] = lambda step: 1.0,
) -> tuple[Any, Step]:
    """EAI's coder and a step as its trainer takes it."""
    from sparsify import SparseCoder, SparseCoderConfig

    sae = SparseCoder(dim, SparseCoderConfig(k=k, num_latents=width))
    optimizer = torch.optim.Adam(sae.parameters(), lr=2e-4 / (width / 2**14) ** 0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    silent_for = torch.zeros(width, dtype=torch.long)

    def step(x: Tensor) -> None:
        # Read before it is updated: 0 only before the first step.
        if scheduler.last_epoch == 0:
            sae.b_dec.data = x.mean(0)
        sae.set_decoder_norm_to_unit_norm()
        silent_for[:n_dead] = DEAD_AFTER
        out = sae(x, dead_mask=silent_for >= DEAD_AFTER if n_dead else None)
        (out.fvu + out.auxk_loss / 32).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        fired = torch.zeros(width, dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        silent_for.add_(len(x))
        silent_for[fired] = 0

    return sae, step


def gradient_difference(dim: int, width: int, k: int, x: Tensor) -> float:
    """Largest relative difference of a parameter's gradient, ours against dense arithmetic."""
    trainer = dictionary_learning_trainer("BatchTopK", dim, width, k, steps=10**6)
    ours = build_autoencoder("batch_topk", d_in=dim, n_latents=width, k=k)
    theirs = trainer.ae
    with torch.no_grad():
        ours.variance.fill_(1.0)
        theirs.encoder.weight.copy_(ours.W_enc)
        theirs.encoder.bias.copy_(ours.b_enc)
        theirs.decoder.weight.copy_(ours.W_dec.T)
    trainer.loss(x, step=0).backward()
    ours.loss(x).total.backward()
    pairs = (
        (ours.W_enc, theirs.encoder.weight.grad),
        (ours.b_enc, theirs.encoder.bias.grad),
        (ours.W_dec, theirs.decoder.weight.grad.T),
        (ours.b_dec, theirs.b_dec.grad),
    )
    return max(
        float((parameter.grad - expected).norm() / expected.norm()) for parameter, expected in pairs
    )


def alternate(sides: Mapping[str, Step], batches: list[Tensor], n_steps: int) -> dict[str, dict]:
    """Time a step of each side in turn."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for step in range(WARM_UP_STEPS + n_steps):
        for name, side in sides.items():
            began, began_cpu = time.perf_counter(), time.process_time()
            side(batches[step % len(batches)])
            taken[name].append((time.process_time() - began_cpu, time.perf_counter() - began))
    found = {}
    for name, values in taken.items():
        cpu_s, wall_s = (list(each) for each in zip(*values[WARM_UP_STEPS:], strict=True))
        found[name] = {
            "median_cpu_s": statistics.median(cpu_s),
            "min_cpu_s": min(cpu_s),
            "max_cpu_s": max(cpu_s),
            "median_wall_s": statistics.median(wall_s),
            "vectors_a_cpu_second": len(batches[0]) / statistics.median(cpu_s),
        }
    return found


def machine() -> dict[str, Any]:
    """What numbers depend on."""
    packages = ("torch", "dictionary-learning", "eai-sparsify")
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "load_average": os.getloadavg()[0],
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def main() -> None:
    """Measure, print one table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--peers_path", type=Path, required=True)
    parser.add_argument("--n_steps", type=int, default=8, help="timed steps of each")
    parser.add_argument("--n_threads", type=int, default=1)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=4096)
    parser.add_argument(
        "--auxk",
        action="store_true",
        help=f"treat {DEAD_SHARE:.0%}% of the latents as dead, so that they learn from the error",
    )
    parser.add_argument("--main", action="store_true", help="only the three that targets compare")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "sae_step.json"
    )
    arguments = parser.parse_args()
    import_peers(arguments.peers_path)
    torch.set_num_threads(arguments.n_threads)
    torch.manual_seed(0)
    dim, width, k = arguments.dim, arguments.width, arguments.k
    size = arguments.batch_size
    planted = PlantedDictionary.draw(dim, width // 2, k, seed=0)
    batches = [planted.sample(size, seed) for seed in range(N_BATCHES)]
    difference = gradient_difference(dim, width, k, batches[0][:1024])
    assert difference < 1e-5, f"not the same gradients: {difference}"

    n_dead = round(DEAD_SHARE * width) if arguments.auxk else 0

    def ours(architecture: str) -> Step:
        sae = build_autoencoder(architecture, d_in=dim, n_latents=width, k=k)
        sae.initialise(batches[0])
        return our_step(sae, n_dead)

    def theirs(name: str) -> Step:
        return dictionary_learning_step(name, dim, width, k, n_dead)

    sides: dict[str, Step] = {
        OURS: ours("batch_topk"),
        SAME_MATHEMATICS: theirs("BatchTopK"),
        FASTEST: sparsify_step(dim, width, k, n_dead)[1],
    }
    if not arguments.main:
        sides |= {
            "ours TopK": ours("topk"),
            "dictionary-learning TopK": theirs("TopK"),
            "ours Matryoshka": ours("matryoshka_batch_topk"),
            "dictionary-learning Matryoshka": theirs("Matryoshka"),
        }
    found = alternate(sides, batches, arguments.n_steps)
    pairs = (
        (SAME_MATHEMATICS, OURS),
        (FASTEST, OURS),
        (FASTEST, "ours TopK"),
        ("dictionary-learning TopK", "ours TopK"),
        ("dictionary-learning Matryoshka", "ours Matryoshka"),
    )
    ratios = {
        f"{slow} / {fast}": found[slow]["median_cpu_s"] / found[fast]["median_cpu_s"]
        for slow, fast in pairs
        if slow in found and fast in found
    }
    case = f"{arguments.n_threads} threads{', auxk' if arguments.auxk else ''}"
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    results["targets"] = TARGETS
    results[case] = {
        "machine": machine(),
        "arguments": {
            name: getattr(arguments, name)
            for name in ("n_steps", "n_threads", "dim", "width", "k", "batch_size", "auxk")
        },
        "relative_difference_of_gradients": difference,
        "steps": found,
        "ratios_of_cpu_time": ratios,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    for name, values in found.items():
        print(
            f"{name:<34}{values['median_cpu_s']:>8.3f} CPU-s "
            f"({values['min_cpu_s']:.3f} .. {values['max_cpu_s']:.3f})"
            f"{values['median_wall_s']:>8.3f} s by the clock"
        )
    for name, value in ratios.items():
        print(f"{name:<64}{value:>6.2f}x")
    print(f"Wrote {arguments.output}")


if __name__ == "__main__":
    main()
