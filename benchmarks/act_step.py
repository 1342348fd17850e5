"""One ACT training step against LeRobot's: same weights, batch, data and threads, alternating.

    python -m benchmarks.act_step --threads 2 --rounds 9

Both run forward, backward, gradient clipping and AdamW at LeRobot's defaults (51.6 M parameters,
96 x 96 px, chunk 100, batch 8, float32). The floor is what the multiplications alone would take:
FLOPs of forward and backward, counted, over the best rate of the feed-forward layer's own GEMM.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_modules.optimisation import ParameterGroup, build_adamw
from policies.act import ACTPolicy
from policies.interface import Batch, Observation
from policies.lerobot_format import load_lerobot_weights

CHUNK = 100


def lerobot_policy():
    """LeRobot's ACT at its defaults for PushT, with its own optimiser settings."""
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy as LeRobotACTPolicy

    config = ACTConfig(
        input_features={
            "observation.image": PolicyFeature(type=FeatureType.VISUAL, shape=(3, 96, 96)),
            "observation.state": PolicyFeature(type=FeatureType.STATE, shape=(2,)),
        },
        output_features={"action": PolicyFeature(type=FeatureType.ACTION, shape=(2,))},
        pretrained_backbone_weights=None,
        device="cpu",
        push_to_hub=False,
    )
    return LeRobotACTPolicy(config).train()


def our_policy(theirs):
    """The same network with the same weights; inputs are given normalised."""
    ours = ACTPolicy(cameras={"image": [96, 96]}, state_dim=2, action_dim=2, chunk_size=CHUNK)
    load_lerobot_weights(ours.network, theirs.state_dict())
    for module in ours.normaliser.modules():
        if hasattr(module, "offset"):
            module.set(torch.zeros_like(module.offset), torch.ones_like(module.scale))
    return ours.train()


def gemm_gflops(rows):
    """Best rate of the feed-forward layer's matrix product, in GFLOP/s, at the set thread count."""
    x, weight = torch.randn(rows, 512), torch.randn(3200, 512)
    seconds = []
    for _ in range(60):
        begin = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        seconds.append(time.perf_counter() - begin)
    return 2 * rows * 512 * 3200 / min(seconds) / 1e9


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--padded_share", type=float, default=0.0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/act_step.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    theirs = lerobot_policy()
    ours = our_policy(theirs)
    size = arguments.batch_size
    image = torch.rand(size, 96, 96, 3).permute(0, 3, 1, 2)
    state, actions = torch.randn(size, 2), torch.randn(size, CHUNK, 2)
    is_pad = (torch.arange(CHUNK) >= CHUNK * (1 - arguments.padded_share)).expand(size, -1)
    index = torch.arange(size)
    batch = Batch(Observation({"image": image}, state), actions, is_pad, index, index)
    lerobot_batch = {
        "observation.image": image.contiguous(),
        "observation.state": state,
        "action": actions,
        "action_is_pad": is_pad,
    }
    their_optimizer = torch.optim.AdamW(theirs.get_optim_params(), lr=1e-5, weight_decay=1e-4)
    our_optimizer = build_adamw(
        [ParameterGroup("policy", ours.parameters(), 1e-5)], 1e-4, (0.9, 0.999)
    )

    def step(loss, optimizer, policy):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def their_step():
        step(theirs(lerobot_batch)[0], their_optimizer, theirs)

    def our_step():
        step(ours.loss(batch, 10.0).total, our_optimizer, ours)

    times = {"lerobot": [], "policyscope": []}
    for round_number in range(arguments.rounds + 2):
        for name, run in (("lerobot", their_step), ("policyscope", our_step)):
            begin, begin_cpu = time.perf_counter(), time.process_time()
            run()
            wall, cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
            if round_number >= 2:
                times[name].append((wall, cpu))
    result = {"threads": arguments.threads, "batch_size": size, "torch": torch.__version__}
    for name, values in times.items():
        walls, cpus = zip(*values, strict=True)
        result[name] = {
            "median_wall_s": statistics.median(walls),
            "median_cpu_s": statistics.median(cpus),
            "min_wall_s": min(walls),
            "max_wall_s": max(walls),
        }
        print(name, {key: round(value, 4) for key, value in result[name].items()})
    for name, run in (("lerobot", their_step), ("policyscope", our_step)):
        with FlopCounterMode(display=False) as counter:
            run()
        result[name]["gflop"] = counter.get_total_flops() / 1e9
    rate = gemm_gflops(size * CHUNK)
    result["gemm_gflops"] = rate
    for name in times:
        floor = result[name]["gflop"] / rate
        result[name]["floor_s"] = floor
        share = floor / result[name]["median_wall_s"]
        print(f"{name}: {result[name]['gflop']:.0f} GFLOP, floor {floor:.3f} s, {share:.0%} of it")
    result["speedup_wall"] = (
        result["lerobot"]["median_wall_s"] / result["policyscope"]["median_wall_s"]
    )
    result["speedup_cpu"] = (
        result["lerobot"]["median_cpu_s"] / result["policyscope"]["median_cpu_s"]
    )
    print({key: result[key] for key in ("speedup_wall", "speedup_cpu")})
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
