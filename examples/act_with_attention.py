"""Let ACT act in PushT and film what it looks at, with the wrapper that shows its attention.

    python examples/act_with_attention.py --policy_path outputs/demo/last \
        --output_dir outputs/act_with_attention

The loop is the one of a robot: observe, ``select_action``, execute. A LeRobot policy of your own is
wrapped in the same way: ``ACTPolicyWithAttention(policy, preprocessor)``.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from jaxtyping import UInt8

from envs.push_t import PushTTask
from policies.loading import load_policy
from rendering.act_with_attention import ACTPolicyWithAttention
from rendering.video import captioned, write_video


def frames(
    policy: ACTPolicyWithAttention, task: PushTTask, seed: int, n_steps: int
) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
    """Act, and yield what the policy looks at while it does."""
    with closing(task.make()) as env:
        env.reset(seed)
        policy.reset()
        for step in range(min(n_steps, task.max_steps)):
            seen = env.observe()
            observation = {
                "observation.image": torch.from_numpy(seen["images"]["image"]).movedim(-1, 0),
                "observation.state": torch.from_numpy(seen["state"]),
            }
            action, attention_maps = policy.select_action(observation)
            (picture,) = policy.visualize_attention(
                attention_maps=attention_maps, observation=observation, target_height=320
            )
            outcome = env.step(task.clip_actions(action[0].numpy()))
            yield captioned(picture, f"seed {seed}  step {step}  coverage {outcome.score:.2f}")
            if outcome.terminated:
                break


def main(argv: Sequence[str] | None = None) -> int:
    """Film one episode."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--policy_path", required=True)
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--seed", type=int, default=100_000)
    parser.add_argument("--n_steps", type=int, default=300)
    given = parser.parse_args(argv)
    try:
        view = load_policy(given.policy_path).view
        policy = ACTPolicyWithAttention(view)
        task = PushTTask.for_policy(view.data_schema)
        film = frames(policy, task, given.seed, given.n_steps)
        path = write_video(given.output_dir / "act_with_attention.mp4", film, task.fps)
    except (TypeError, ValueError, OSError) as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        return 1
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
