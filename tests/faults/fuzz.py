"""Many damaged inputs for every reader, each target in a process of its own.

    python tests/faults/fuzz.py --cases 10000
    python tests/faults/fuzz.py --only manifests --cases 4000 --seed 1

A case that kills the process, or takes more than a gibibyte of memory, is a finding like any
other; the next one goes on in a new process. Findings are kept in ``tests/faults/corpus``.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import sys
import time
import tomllib
from collections.abc import Sequence
from importlib import import_module, metadata
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "fuzz.json"
LIMIT_BYTES = 2**32
"""That one process of cases may allocate on top of what it starts with, and write into one file:
the machine outlives it.
A case that takes more than ``fuzzing.MEMORY_BYTES`` is a finding before that."""
PACKAGES = ("torch", "numpy", "h5py", "pyarrow", "safetensors", "lerobot", "lightning")

# Names as the tests see them.
_SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
_PYTHONPATH = _SETTINGS["tool"]["pytest"]["ini_options"]["pythonpath"]
sys.path[:0] = [str(ROOT / folder) for folder in _PYTHONPATH]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from fuzzing import TARGETS, FuzzReport, Outcome, case_of, corpus_of, keep, outcomes  # noqa: E402


def fuzz(name: str, n_cases: int, seed: int) -> FuzzReport:
    """Replay a target's corpus and try new cases, and outlive what they do to the process.

    Args:
        name: One of ``TARGETS``.
        n_cases: New ones.
        seed: Of all draws.
    """
    target = import_module(f"fuzz_{name}").TARGET
    report = FuzzReport(target.name)
    corpus = corpus_of(target)
    number = -len(corpus)
    while number < n_cases:
        ours, theirs = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("spawn").Process(
            target=_child, args=(name, n_cases, seed, number, theirs)
        )
        process.start()
        theirs.close()
        try:
            while True:
                outcome = ours.recv()
                report.add(outcome)
                number = outcome.number + 1
        except EOFError:
            process.join()
        if number < n_cases:
            if process.exitcode is not None and process.exitcode >= 0:
                raise SystemExit(f"error: {name}: the process of the cases failed, see above")
            file, case = corpus[number] if number < 0 else (None, case_of(target, seed, number))
            kept_as = keep(target, case) if file is None else file.name
            error = f"the process ended by signal {-(process.exitcode or 0)}"
            report.add(Outcome(number, case.kind, "finding", error, kept_as))
            number += 1
    return report


def _child(name: str, n_cases: int, seed: int, first: int, results: Connection) -> None:
    target = import_module(f"fuzz_{name}").TARGET
    begun = False
    for outcome in outcomes(target, n_cases, seed, first):
        if not begun:
            # Not before the first case: it imports what the target needs.
            _limit()
            begun = True
        results.send(outcome)
    results.close()


def _limit() -> None:
    status = Path("/proc/self/status").read_text()
    used = next(line for line in status.splitlines() if line.startswith("VmData"))
    limit = int(used.split()[1]) * 1024 + LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, LIMIT_BYTES))


def main(args: Sequence[str] | None = None) -> None:
    """Run the targets, print a line for each and write the counts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--cases", type=int, default=10000, help="New cases, shared among the targets."
    )
    parser.add_argument("--only", choices=TARGETS, action="append", help="Targets; else all.")
    parser.add_argument("--seed", type=int, default=0, help="Of all draws.")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file of the counts.")
    chosen = parser.parse_args(args)
    names = chosen.only or TARGETS
    results = json.loads(chosen.out.read_text()) if chosen.out.is_file() else {}
    n_findings = 0
    for place, name in enumerate(names):
        n_cases = chosen.cases * (place + 1) // len(names) - chosen.cases * place // len(names)
        began_s = time.time()
        report = fuzz(name, n_cases, chosen.seed)
        print(report, flush=True)
        n_findings += report.n_findings
        results[name] = {
            "cases": report.n_cases,
            "corpus": report.n_replayed,
            "refused": report.refused,
            "accepted": report.accepted,
            "findings": report.n_findings,
            "by_kind": {kind: dict(counts) for kind, counts in sorted(report.by_kind.items())},
            "seed": chosen.seed,
            "wall_s": round(time.time() - began_s, 1),
            "python": platform.python_version(),
            "versions": {package: metadata.version(package) for package in PACKAGES},
        }
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if n_findings:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
