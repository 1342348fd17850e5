"""Run multiple visualizations of one policy with different configurations.

    python examples/landscapes.py --policy_path outputs/demo/last --dataset_repo_id DEMOS.hdf5 \
        --episode_idx 0 1 --output_dir outputs/landscapes --max_steps 100

Each run has a folder below ``--output_dir``, with videos, arrays and ``metrics.json``; all other
options go to every run as they are (``python analyze.py landscape --help``).

overview
    Log density of the action now, and as many steps ahead as the chunk holds of 8, 16 and 32, in
    nats above the uniform density. A tight blob is a policy that knows what it wants, several
    blobs are several plans; the outlines hold 50, 80 and 95 % of the probability.
surprise
    Share of the probability that is less likely than each cell, on a fine grid: bright where the
    policy is at home. A red cross in the dark is a demonstration that the policy would not give.
distance
    How far each cell is from the executed action, from all samples on average, and in L1 as in
    ACT's loss: no bandwidth, hence also for comparing kinds of policies. No probabilities.
plans
    The density once the rest of the chunk is known: the policy's own plan, and the demonstrator's.
    Where the two differ, the demonstrator was in another mode than the policy would choose.
ensemble
    What a temporal ensemble believes, with all the chunks that reach the present step, and what it
    executes (orange ring): between two blobs means an average of plans that nobody would follow.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import analyze

RUNS = {
    "overview": ["--scoring_method", "likelihood"],
    "surprise": [
        *("--scoring_method", "confidence", "--colormap", "magma"),
        *("--action_resolution", "256"),
    ],
    "distance": ["--scoring_method", "distance", "energy", "l1_loss", "--colormap", "coolwarm"],
    "plans": ["--scoring_method", "committed", "expert_mode"],
    "ensemble": ["--scoring_method", "belief", "--temporal_ensemble_coeff", "0.01"],
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run all of them; the exit status is that of the first that fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--policy_path", required=True)
    parser.add_argument("--dataset_repo_id", required=True)
    parser.add_argument("--output_dir", required=True, type=Path)
    given, more = parser.parse_known_args(argv)
    for name, options in RUNS.items():
        print(f"== {name} ==", flush=True)
        status = analyze.main(
            [
                "landscape",
                *("--policy_path", given.policy_path),
                *("--dataset_repo_id", given.dataset_repo_id),
                *("--output_dir", str(given.output_dir / name)),
                *options,
                *more,
            ]
        )
        if status:
            return status
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
