"""Where a policy looks along recorded episodes, in several ways.

    python examples/attention_over_episodes.py --policy_path outputs/demo/last \
        --dataset_repo_id DEMOS.hdf5 --episode_idx 0 1 --output_dir outputs/attention

Each run has a folder below ``--output_dir``; all other options go to every run as they are
(``python analyze.py attention --help``).

overview
    Cross-attention, its rollout through the encoder, and relevancy: first what the decoder reads,
    then where that came from, then how much of it moves the action.
plan
    Relevancy for the action seven steps ahead, to hold against that for the action now.
published
    The look of the published attention mappers: jet, cells and robot state in one range, the
    state's share as a magenta frame.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import analyze

RUNS = {
    "overview": ["--method", "cross_attention", "rollout", "relevancy"],
    "plan": ["--method", "relevancy", "--queries", "7"],
    "published": [
        *("--method", "cross_attention", "--colormap", "jet", "--scale", "global"),
        *("--show_proprio_border", "true", "--interpolation", "bicubic"),
        *("--n_faithfulness_frames", "0"),
    ],
}


def run_all(
    command: str, runs: Mapping[str, Sequence[str]], argv: Sequence[str] | None, doc: str
) -> int:
    """Run a command once for each set of options; the exit status is the first that fails."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--policy_path", required=True)
    parser.add_argument("--dataset_repo_id", required=True)
    parser.add_argument("--output_dir", required=True, type=Path)
    given, more = parser.parse_known_args(argv)
    for name, options in runs.items():
        print(f"== {name} ==", flush=True)
        status = analyze.main(
            [
                command,
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run all of them."""
    return run_all("attention", RUNS, argv, __doc__ or "")


if __name__ == "__main__":
    raise SystemExit(main())
