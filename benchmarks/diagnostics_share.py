"""How much of a run's time its diagnostics took, as the run itself measured it.

    python -m benchmarks.diagnostics_share --run_dir outputs/demo/last

Reads the finished run's ``summary.json``: a training measures itself, nothing is trained here.
"""

import argparse
import json
from pathlib import Path


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run_dir", type=Path, required=True)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "diagnostics_share.json"
    )
    arguments = parser.parse_args()
    summary = json.loads((arguments.run_dir / "summary.json").read_text())
    environment = json.loads((arguments.run_dir / "environment.json").read_text())
    result = {
        "command": environment.get("command"),
        "steps": summary["step"],
        "wall_s": summary["wall_s"],
        "share": summary["diagnostics/share"],
        "seconds": {
            key.removeprefix("diagnostics/").removesuffix("_s"): value
            for key, value in summary.items()
            if key.startswith("diagnostics/") and key.endswith("_s")
        },
    }
    print(f"diagnostics took {result['share']:.1%} of {result['wall_s']:.0f} s")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
