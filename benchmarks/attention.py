"""Looking at attention: what it costs while acting, and frames a second over an episode.

    python -m benchmarks.attention --threads 1

LeRobot's ACT at its defaults (51.6 M parameters, 96 x 96 px, chunk 100) and ours with the same
weights, on the same pictures, alternating. Four questions, each beside its peer:

1. *Capture*: a prediction with all attention weights, against the same prediction without.
2. *Act and show*: what the published mapper does at every step (backbone once more to learn the
   grid, prediction, map of the mean query, colours over the picture), and ours (prediction, rollout
   through the encoder, shares of each input, colours over the picture), against LeRobot's plain
   prediction.
3. *An episode*: the published loop, step by step, against ours in batches, for equal pictures.
4. *Methods*: every method on a batch, in forward passes of the same batch.

The published approach is our own code of it, from its description; the decoding of pictures that
its loop does besides is left out, in its favour. Medians over rounds of CPU time.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from attention.capture import capture_attention
from attention.maps import CrossAttention, query_attention, roll_out, token_attribution
from attention.method import Method, Target
from attention.methods import METHODS
from attention.study import explain
from benchmarks.act_step import lerobot_policy, our_policy
from policies.act import ACTPolicy
from policies.interface import Observation
from policies.tokens import TokenLayout
from rendering.attention import overlay
from rendering.colour import colour_table

CHUNK = 100
TARGETS = {"capture": 1.05, "act and show": 1.07, "episode": 10.0}


class PublishedMapper:
    """What the published mapper computes at a step, on LeRobot's policy."""

    def __init__(self, policy):
        self.policy = policy
        self.attention = policy.model.decoder.layers[-1].multihead_attn

    def step(self, batch: Mapping[str, Tensor]) -> np.ndarray:
        """Act, then draw the map over the picture."""
        image = batch["observation.image"]
        grid = self.policy.model.backbone(image)["feature_map"].shape[-2:]
        seen: list[Tensor] = []
        handle = self.attention.register_forward_hook(
            lambda _, inputs, output: seen.append(output[1].detach())
        )
        self.policy.select_action(dict(batch))
        self.policy.reset()
        handle.remove()
        weights = seen[0].mean(1)[0]
        state, cells = float(weights[1]), weights[2:].reshape(tuple(grid)).numpy()
        low, high = min(state, cells.min()), max(state, cells.max())
        normalised = (cells - low) / (high - low)
        picture = rearrange((image[0] * 255).byte().numpy(), "rgb h w -> h w rgb")
        height, width = picture.shape[:2]
        shown = cv2.resize(normalised, (width, height))
        heat = cv2.applyColorMap(np.uint8(255 * shown), cv2.COLORMAP_JET)
        return cv2.addWeighted(np.ascontiguousarray(picture), 0.5, heat, 0.5, 0)


def act_and_show(policy: ACTPolicy, observation: Observation) -> np.ndarray:
    """Ours: predict, roll out, say the shares, draw."""
    layout = TokenLayout.of(policy.network)
    with capture_attention(policy.network) as capture:
        policy.predict_chunk(observation)
    start = query_attention(capture.weights, range(CHUNK))
    found = token_attribution("rollout", layout, roll_out(capture.weights, start), range(CHUNK))
    found.shares()
    return drawn(found.maps["image"], observation)[0]


def drawn(maps: Tensor, observation: Observation) -> list[np.ndarray]:
    """Colours over pictures."""
    table = colour_table("jet")
    pictures = rearrange(
        (observation.images["image"] * 255).byte().numpy(), "batch rgb h w -> batch h w rgb"
    )
    return [
        overlay(
            np.ascontiguousarray(picture),
            values,
            (float(values.min()), float(values.max())),
            table,
            interpolation="linear",
        )
        for picture, values in zip(pictures, maps.numpy(), strict=True)
    ]


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """CPU time and time by the clock of one call."""
    began, began_cpu = time.perf_counter(), time.process_time()
    work()
    return time.process_time() - began_cpu, time.perf_counter() - began


def alternate(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, dict]:
    """Time all sides in turn."""
    for work in sides.values():
        work()
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, work in sides.items():
            taken[name].append(seconds(work))
    found = {}
    for name, values in taken.items():
        cpu_ms, wall_ms = ([value * 1e3 for value in each] for each in zip(*values, strict=True))
        found[name] = {
            "median_cpu_ms": statistics.median(cpu_ms),
            "min_cpu_ms": min(cpu_ms),
            "max_cpu_ms": max(cpu_ms),
            "median_wall_ms": statistics.median(wall_ms),
        }
    return found


def main() -> None:
    """Measure, print one table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15, help="alternating rounds")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "attention.json"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    theirs = lerobot_policy().eval()
    ours = our_policy(theirs).eval()
    images, states = torch.rand(arguments.batch, 3, 96, 96), torch.randn(arguments.batch, 2)
    episode = Observation({"image": images}, states)
    one = episode.rows(slice(1))
    lerobot_one = {"observation.image": images[:1], "observation.state": states[:1]}
    mapper = PublishedMapper(theirs)
    whole = Target(tuple(range(CHUNK)))

    def published_episode() -> None:
        for row in range(arguments.batch):
            mapper.step(
                {
                    "observation.image": images[row : row + 1],
                    "observation.state": states[row : row + 1],
                }
            )

    def our_episode() -> None:
        found = explain(CrossAttention(), ours, episode, whole, arguments.batch)
        drawn(found.maps["image"], episode)

    def captured(policy: ACTPolicy, observation: Observation) -> None:
        with capture_attention(policy.network):
            policy.predict_chunk(observation)

    with torch.no_grad():
        # The same maps, before anything is timed.
        weights = []
        handle = mapper.attention.register_forward_hook(lambda *each: weights.append(each[2][1]))
        theirs.predict_action_chunk(lerobot_one)
        handle.remove()
        mine = explain(CrossAttention(), ours, one, whole)
        expected = weights[0].mean(1)[0, 2:].reshape(3, 3)
        difference = float((mine.maps["image"][0] - expected).abs().max())
        assert difference < 1e-4, f"not the same maps: {difference}"

        single = alternate(
            {
                "LeRobot predicts": lambda: theirs.predict_action_chunk(dict(lerobot_one)),
                "published acts and shows": lambda: mapper.step(lerobot_one),
                "ours predicts": lambda: ours.predict_chunk(one),
                "ours predicts, all weights kept": lambda: captured(ours, one),
                "ours acts and shows": lambda: act_and_show(ours, one),
            },
            arguments.rounds * 3,
        )
        batched = alternate(
            {
                "published episode": published_episode,
                "our episode": our_episode,
                "ours predicts": lambda: ours.predict_chunk(episode),
                "ours predicts, all weights kept": lambda: captured(ours, episode),
            },
            max(arguments.rounds // 3, 3),
        )
        few = episode.rows(slice(4))
        methods: dict[str, Callable[[], object]] = {
            "one action predicted": lambda: ours.predict_chunk(few, [0])
        }
        for name, kind in METHODS.items():
            methods[name] = partial(attributed, kind(), ours, few)
        costs = alternate(methods, 3)

    def ratio(
        table: Mapping[str, dict], name: str, reference: str, clock: str = "median_cpu_ms"
    ) -> float:
        return table[name][clock] / table[reference][clock]

    ratios = {
        "capture, batch 1": ratio(single, "ours predicts, all weights kept", "ours predicts"),
        f"capture, batch {arguments.batch}": ratio(
            batched, "ours predicts, all weights kept", "ours predicts"
        ),
        "published acts and shows / LeRobot predicts": ratio(
            single, "published acts and shows", "LeRobot predicts"
        ),
        "ours acts and shows / LeRobot predicts": ratio(
            single, "ours acts and shows", "LeRobot predicts"
        ),
        "ours acts and shows / ours predicts": ratio(
            single, "ours acts and shows", "ours predicts"
        ),
        f"frames a CPU-second, batch {arguments.batch}: ours / published": 1
        / ratio(batched, "our episode", "published episode"),
        f"frames a second by the clock, batch {arguments.batch}: ours / published": 1
        / ratio(batched, "our episode", "published episode", "median_wall_ms"),
    }
    in_forwards = {name: ratio(costs, name, "one action predicted") for name in costs}
    results = {
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "load_average": os.getloadavg()[0],
        },
        "threads": arguments.threads,
        "torch": torch.__version__,
        "rounds": arguments.rounds,
        "batch": arguments.batch,
        "largest_difference_of_maps": difference,
        "targets": TARGETS,
        "batch_1": single,
        f"batch_{arguments.batch}": batched,
        "ratios": ratios,
        "methods_in_forward_passes": in_forwards,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    for title, table in (("batch 1", single), (f"batch {arguments.batch}", batched)):
        for name, values in table.items():
            print(f"{title:<10}{name:<36}{values['median_cpu_ms']:>10.1f} CPU-ms")
    for name, value in {**ratios, **{f"method {k}": v for k, v in in_forwards.items()}}.items():
        print(f"{name:<56}{value:>8.2f}x")
    print(f"Wrote {arguments.output}")


def attributed(method: Method, policy: ACTPolicy, observation: Observation) -> None:
    """One method on a batch."""
    method.attribute(policy, observation, Target())


if __name__ == "__main__":
    main()
