"""How much of a run's time its diagnostics took, as the run itself measured it.

    python -m benchmarks.diagnostics_share --run_dir outputs/demo/last

Reads the finished run's ``summary.json`` and ``metrics.csv``: a training measures itself, nothing
is trained here. The share is of the time since training began, the seconds are totals of the run.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from callbacks.loggers import CSV_FILE, read_metrics


def measured(run: Path) -> dict[str, Any]:
    """What a run's own files say of its diagnostics."""
    summary = json.loads((run / "summary.json").read_text())
    environment = json.loads((run / "environment.json").read_text())
    totals: dict[str, float] = {}
    for row in read_metrics(run / CSV_FILE):
        for key, value in row.items():
            if key.startswith("diagnostics/") and key.endswith("_s"):
                name = key.removeprefix("diagnostics/").removesuffix("_s")
                totals[name] = totals.get(name, 0.0) + value
    return {
        "date": environment["started"][:10],
        "commit": environment["git"]["commit"][:7],
        "steps": summary["step"],
        "process_s": summary["wall_s"],
        "share": summary["diagnostics/share"],
        "seconds": totals,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run_dir", type=Path, required=True)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "diagnostics_share.json"
    )
    arguments = parser.parse_args()
    result = measured(arguments.run_dir)
    print(
        f"diagnostics took {result['share']:.1%} of the time since training began: "
        f"{sum(result['seconds'].values()):.0f} s of a process of {result['process_s']:.0f} s"
    )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
