"""Do autoencoders find a planted dictionary? Ours and the peers' after equal numbers of steps.

    python -m benchmarks.sae_recovery --peers_path DIR

Activations of 64 dimensions are sums of 8 of 256 directions on average; 512 latents, 1000 steps of
1024 activations, three seeds. Each is trained with the same warm-up (5 %) and decay (last 20 %) of
its learning rate: ours at ours, peers at their own default and at ours. dictionary-learning
averages its threshold over the second half of the steps; ours is calibrated on held-out activations
and judged on others. See ``benchmarks/sae_step.py`` for ``--peers_path``.

MCC is the mean |cosine| of true features and the latents assigned to them one to one; ``dead`` the
share of latents that are silent on 16,384 held-out activations, ``dead_matched`` that of the
latents that are assigned to a feature. A dictionary that is found exactly leaves half of the
latents without anything to do.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autoencoders.fit import fit_autoencoder, trapezoid
from autoencoders.matching import assign, mean_correlation_coefficient
from autoencoders.metrics import ReconstructionMetrics
from autoencoders.planted import PlantedDictionary
from autoencoders.sae import ARCHITECTURES, build_autoencoder, default_learning_rate
from benchmarks.sae_step import (
    dictionary_learning_trainer,
    import_peers,
    machine,
    sparsify_step,
)

D_IN, N_LATENTS, N_FEATURES, K = 64, 512, 256, 8
N_TRAIN, N_HELD_OUT = 131_072, 16_384
TARGETS = {"mcc": 0.97, "fvu": 0.20, "dead": 0.05, "l0": "within 3 % of k"}
NUMBERS = ("mcc", "fvu", "l0", "dead", "dead_matched", "cpu_s")


@dataclass(frozen=True)
class Trained:
    """What is judged."""

    directions: Tensor
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Planted:
    """One seed's task."""

    dictionary: PlantedDictionary
    train: Tensor
    calibration: Tensor
    held_out: Tensor
    seed: int
    n_steps: int
    batch_size: int

    def batch(self, step: int) -> Tensor:
        """Training activations of a step."""
        start = step * self.batch_size % (len(self.train) - self.batch_size + 1)
        return self.train[start : start + self.batch_size]


def ours(architecture: str, task: Planted, **options: Any) -> Trained:
    """Ours, by the project's recipe."""
    if architecture not in ("vanilla", "gated"):
        options["k"] = K
    sae = build_autoencoder(architecture, d_in=D_IN, n_latents=N_LATENTS, **options)
    fit_autoencoder(sae, task.train, task.n_steps, task.batch_size, seed=task.seed)
    sae.calibrate([task.calibration])
    return Trained(sae.directions, sae.encode, sae.decode)


def dictionary_learning(name: str, lr: float | None, task: Planted) -> Trained:
    """One of its trainers."""
    options: dict[str, Any] = {"threshold_start_step": task.n_steps // 2}
    trainer = dictionary_learning_trainer(
        name,
        D_IN,
        N_LATENTS,
        K,
        steps=task.n_steps,
        lr=lr,
        warmup_steps=task.n_steps // 20,
        decay_start=task.n_steps * 4 // 5,
        seed=task.seed,
        **options,
    )
    trainer.dead_feature_threshold = len(task.train)
    for step in range(task.n_steps):
        trainer.update(step, task.batch(step))
    sae = trainer.ae
    rows = sae.W_dec if name == "Matryoshka" else sae.decoder.weight.T
    return Trained(rows, sae.encode, sae.decode)


def sparsify(lr: float | None, task: Planted) -> Trained:
    """EAI's coder, its auxiliary loss off as by default."""
    own = 2e-4 / (N_LATENTS / 2**14) ** 0.5
    factor = 1.0 if lr is None else lr / own
    sae, step = sparsify_step(
        D_IN,
        N_LATENTS,
        K,
        schedule=lambda place: factor * trapezoid(place, task.n_steps),
    )
    for place in range(task.n_steps):
        step(task.batch(place))

    def encode(x: Tensor) -> Tensor:
        found = sae.encode(x)
        codes = x.new_zeros(len(x), N_LATENTS)
        return codes.scatter(1, found.top_indices, found.top_acts)

    return Trained(sae.W_dec, encode, lambda codes: codes @ sae.W_dec + sae.b_dec)


@torch.no_grad()
def judge(trained: Trained, task: Planted) -> dict[str, float]:
    """Numbers of one run."""
    metrics = ReconstructionMetrics(D_IN, N_LATENTS)
    codes = trained.encode(task.held_out)
    metrics.update(task.held_out, trained.decode(codes), (codes > 0).sum(0))
    quality = metrics.compute()
    features = task.dictionary.features
    cosines = F.normalize(trained.directions, dim=-1) @ features.T
    matched = assign(cosines.abs())[:, 0]
    return {
        "mcc": mean_correlation_coefficient(trained.directions, features),
        "fvu": quality.fvu,
        "l0": quality.l0,
        "dead": quality.dead_fraction,
        "dead_matched": float((quality.density[matched] == 0).double().mean()),
    }


def main() -> None:
    """Train, judge, print one table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--peers_path", type=Path, required=True)
    parser.add_argument("--n_steps", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=1024)
    parser.add_argument("--n_seeds", type=int, default=3)
    parser.add_argument("--n_threads", type=int, default=1)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "sae_recovery.json"
    )
    arguments = parser.parse_args()
    import_peers(arguments.peers_path)
    torch.set_num_threads(arguments.n_threads)
    rate = default_learning_rate(N_LATENTS)
    runs: dict[str, Callable[[Planted], Trained]] = {
        f"ours {name}": partial(ours, name) for name in ARCHITECTURES
    }
    runs["ours batch_topk, equal_share 0"] = partial(ours, "batch_topk", equal_share=0.0)
    for lr, note in ((None, ""), (rate, ", our learning rate")):
        for name in ("BatchTopK", "TopK", "Matryoshka"):
            runs[f"dictionary-learning {name}{note}"] = partial(dictionary_learning, name, lr)
        runs[f"eai-sparsify TopK{note}"] = partial(sparsify, lr)

    found: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for seed in range(arguments.n_seeds):
        dictionary = PlantedDictionary.draw(D_IN, N_FEATURES, K, seed)
        first = 3 * seed
        task = Planted(
            dictionary,
            dictionary.sample(N_TRAIN, first),
            dictionary.sample(N_HELD_OUT, first + 1),
            dictionary.sample(N_HELD_OUT, first + 2),
            seed,
            arguments.n_steps,
            arguments.batch_size,
        )
        for name, run in runs.items():
            torch.manual_seed(seed)
            began = time.process_time()
            trained = run(task)
            cpu_s = time.process_time() - began
            found[name].append({**judge(trained, task), "cpu_s": cpu_s})
    table = {
        name: {number: statistics.fmean(values[number] for values in each) for number in NUMBERS}
        for name, each in found.items()
    }
    results = {
        "machine": machine(),
        "arguments": {
            name: getattr(arguments, name)
            for name in ("n_steps", "batch_size", "n_seeds", "n_threads")
        },
        "task": {
            "d_in": D_IN,
            "n_latents": N_LATENTS,
            "n_features": N_FEATURES,
            "l0": K,
            "n_train": N_TRAIN,
            "n_held_out": N_HELD_OUT,
        },
        "learning_rate": rate,
        "targets_of_ours_batch_topk": TARGETS,
        "means": table,
        "seeds": found,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    print(f"{'':<54}" + "".join(f"{number:>14}" for number in NUMBERS))
    for name, numbers in table.items():
        print(f"{name:<54}" + "".join(f"{numbers[number]:>14.3f}" for number in NUMBERS))
    print(f"Wrote {arguments.output}")


if __name__ == "__main__":
    main()
