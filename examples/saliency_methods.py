"""What an action depends on, by gradients and by covering parts of the picture.

    python examples/saliency_methods.py --policy_path outputs/demo/last \
        --dataset_repo_id DEMOS.hdf5 --max_steps 30 --output_dir outputs/saliency

Each run has a folder below ``--output_dir``; all other options go to every run as they are
(``python analyze.py saliency --help``).

all
    Grad-CAM, integrated gradients and occlusion, with the numbers that say which to believe.
sideways
    What moves the first action dimension alone.
black
    Integrated gradients from a black picture, as published: what they say depends on what stands
    for nothing.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.attention_over_episodes import run_all

RUNS = {
    "all": ["--method", "grad_cam", "integrated_gradients", "occlusion"],
    "sideways": [
        *("--method", "integrated_gradients", "--dimensions", "0"),
        *("--n_faithfulness_frames", "0"),
    ],
    "black": ["--method", "integrated_gradients", "--baseline", "black"],
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run all of them."""
    return run_all("saliency", RUNS, argv, __doc__ or "")


if __name__ == "__main__":
    raise SystemExit(main())
