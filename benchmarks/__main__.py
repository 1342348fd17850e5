"""All comparisons with peers, one after the other, and their table in ``docs/benchmarks.md``.

    OMP_NUM_THREADS=1 python -m benchmarks --hdf5 DEMOS.hdf5 --lerobot FOLDER --peers_path DIR \
        --run_dir outputs/demo/last

Every comparison is a file of this folder and says there what it alternates with what. ``--only``
runs some of them, ``--quick`` runs them with the fewest rounds and keeps nothing, ``--render`` only
writes the table from what is on the disk. A comparison whose data are not given is left out, and
its last result stays.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PROVENANCE = RESULTS / "provenance.json"
DOCUMENT = ROOT / "docs" / "benchmarks.md"
PACKAGES = ("torch", "lightning", "lerobot", "numpy", "opencv-python-headless", "matplotlib")


@dataclass(frozen=True)
class Comparison:
    """One file of this folder, and how it is run."""

    name: str
    words: tuple[tuple[str, ...], ...] = ((),)
    """Of each call; ``{hdf5}`` and the like stand for what is given."""
    quick: tuple[str, ...] = ("--rounds", "1")


COMPARISONS = (
    Comparison("batches", (("--hdf5", "{hdf5}", "--lerobot", "{lerobot}"),)),
    Comparison("push_t_steps", quick=("--rounds", "1", "--n_steps", "60")),
    Comparison("lerobot_fill", (("--dataset_repo_id", "{lerobot}"),)),
    Comparison("act_step"),
    Comparison("act_inference"),
    Comparison(
        "landscapes",
        quick=("--rounds", "1", "--frames", "4", "--batch_size", "4", "--whole_grids", "0"),
    ),
    Comparison("landscape_drawing"),
    Comparison("attention", quick=("--rounds", "1", "--batch", "2")),
    Comparison(
        "sae_step",
        tuple(("--peers_path", "{peers_path}", "--n_threads", n) for n in ("1", "2")),
        quick=("--n_steps", "1", "--main"),
    ),
    Comparison("activation_reads"),
    Comparison("startup"),
    Comparison("diagnostics_share", (("--run_dir", "{run_dir}"),), quick=()),
)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


@dataclass(frozen=True)
class Spread:
    """A measured value over rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, found: Mapping[str, float], kind: str = "") -> "Spread":
        """Read ``median``, ``min`` and ``max``, or ``median_<kind>`` and so on."""
        end = f"_{kind}" if kind else ""
        names = [f"{name}{end}" for name in ("median", "min", "max")]
        return cls(*(found[name] for name in names))

    def text(self) -> str:
        """As in the table."""
        middle, low, high = (_short(each) for each in (self.median, self.low, self.high))
        return middle if low == high else f"{middle} ({low} to {high})"


@dataclass(frozen=True)
class Measured:
    """What a row of the table says."""

    ours: Spread
    peer: Spread | None
    number: float
    """That the target is about: a ratio, or ours."""


@dataclass(frozen=True)
class Row:
    """A row of the table: one target."""

    what: str
    peer: str
    unit: str
    target: str
    comparison: str
    read: Callable[[Any], Measured]
    is_met: Callable[[float], bool]
    floor: str = ""
    """Why a target that was missed cannot be met, or was not."""


def _ratio(ours: Spread, peer: Spread, inverse: bool = False) -> Measured:
    """How many times the peer takes ours; the inverse for rates."""
    ratio = ours.median / peer.median if inverse else peer.median / ours.median
    return Measured(ours, peer, ratio)


def _landscape(grid: str) -> Callable[[Any], Measured]:
    def read(found: Any) -> Measured:
        timestep = found["timestep"]
        ours = timestep["ours"]["K=64, k=0"]["total"][grid]["cpu_s"]
        return _ratio(Spread.of(ours), Spread.of(timestep["published"][grid]["cpu_s"]))

    return read


def _own(spread: Spread) -> Measured:
    return Measured(spread, None, spread.median)


def _sae(threads: str, theirs: str) -> Callable[[Any], Measured]:
    def read(found: Any) -> Measured:
        steps = found[threads]["steps"]
        return _ratio(
            Spread.of(steps["ours BatchTopK"], "cpu_s"), Spread.of(steps[theirs], "cpu_s")
        )

    return read


def _sae_clock(found: Any) -> Measured:
    # Of the clock only medians are kept.
    wall_s = found["2 threads"]["steps"]["ours BatchTopK"]["median_wall_s"]
    return _own(Spread(wall_s, wall_s, wall_s))


def _sae_gradients(found: Any) -> Measured:
    error = found["1 threads"]["relative_difference_of_gradients"]
    return _own(Spread(error, error, error))


def _act_step(found: Any) -> Measured:
    return _ratio(Spread.of(found["policyscope"], "wall_s"), Spread.of(found["lerobot"], "wall_s"))


def _inference(found: Any) -> Measured:
    ours = Spread.of(found["ours, 8 executed"]["cpu_ms"])
    peer = Spread.of(found["lerobot"]["cpu_ms"])
    return Measured(ours, peer, ours.median / peer.median)


def _attention(kind: str) -> Callable[[Any], Measured]:
    def read(found: Any) -> Measured:
        if kind == "episode":
            steps = found["batch_32"]
            return _ratio(
                Spread.of(steps["our episode"], "cpu_ms"),
                Spread.of(steps["published episode"], "cpu_ms"),
            )
        steps = found["batch_1"]
        ours = Spread.of(steps["ours acts and shows"], "cpu_ms")
        return Measured(
            ours,
            Spread.of(steps["published acts and shows"], "cpu_ms"),
            ours.median / steps["ours predicts"]["median_cpu_ms"],
        )

    return read


def _reads(found: Any) -> Measured:
    ours, peer = (found[side]["read_amplification"] for side in ("ours", "peer"))
    return Measured(Spread(ours, ours, ours), Spread(peer, peer, peer), ours)


def _fill(found: Any) -> Measured:
    ours = Spread.of(found["fill"]["ours_ram_cpu_s"])
    peer = Spread.of(found["fill"]["bare_to_ndarray_cpu_s"])
    return Measured(ours, peer, ours.median / peer.median)


def _fill_hdf5(found: Any) -> Measured:
    ours = Spread.of(found["fill"]["scan_and_fill_cpu_s"])
    peer = Spread.of(found["fill"]["bare_h5py_cpu_s"])
    return Measured(ours, peer, ours.median / peer.median)


def _batches(found: Any) -> Measured:
    chunk = found["chunk_100"]
    return _ratio(
        Spread.of(chunk["ours_cpu_ms_per_sample"]), Spread.of(chunk["lerobot_cpu_ms_per_sample"])
    )


def _push_t_steps(found: Any) -> Measured:
    steps = found["cpu_ms_per_step"]
    return _ratio(Spread.of(steps["ours"]), Spread.of(steps["gym-pusht"]))


def _batches_from_films(found: Any) -> Measured:
    chunk = found["chunk_100"]
    return _ratio(
        Spread.of(chunk["memmap_cpu_ms_per_sample"]), Spread.of(chunk["lerobot_cpu_ms_per_sample"])
    )


def _drawing(found: Any) -> Measured:
    frames = found["cpu_ms_per_frame"]
    return Measured(
        Spread.of(frames["ours, 480 px in all"]),
        Spread.of(frames["matplotlib, default"]),
        frames["ours, 480 px in all"]["median"],
    )


def _startup(found: Any) -> Measured:
    times = found["cpu_s"]
    ours = Spread.of(times["train.py --help"])
    return Measured(ours, Spread.of(times["lerobot-train --help"]), ours.median)


def _share(found: Any) -> Measured:
    share = 100 * found["share"]
    return _own(Spread(share, share, share))


LEROBOT = "LeRobot 0.6.1"
ROWS = (
    Row(
        "a training sample of ACT, chunk 100, from HDF5",
        f"{LEROBOT}'s data set, the same demonstrations",
        "CPU-ms",
        "at least 200x",
        "batches",
        _batches,
        lambda ratio: ratio >= 200,
    ),
    Row(
        "the same, at most 0.06 CPU-ms",
        "-",
        "CPU-ms",
        "at most 0.06",
        "batches",
        lambda found: _own(_batches(found).ours),
        lambda cpu_ms: cpu_ms <= 0.06,
    ),
    Row(
        "the same from films, decoded once into a cache",
        f"{LEROBOT}'s data set, decoding",
        "CPU-ms",
        "at least 200x",
        "lerobot_fill",
        _batches_from_films,
        lambda ratio: ratio >= 200,
    ),
    Row(
        "first epoch from films, 22,207 frames",
        "decoding them and nothing else, PyAV",
        "CPU-s",
        "at most 1.3x",
        "lerobot_fill",
        _fill,
        lambda ratio: ratio <= 1.3,
    ),
    Row(
        "first epoch from HDF5, 22,207 frames",
        "reading them and nothing else, h5py",
        "CPU-s",
        "at most 1.3x",
        "batches",
        _fill_hdf5,
        lambda ratio: ratio <= 1.3,
    ),
    Row(
        "ACT training step, 51.6 M parameters, batch 8",
        f"{LEROBOT}'s ACT, the same weights",
        "s, 2 threads",
        "at least 1.2x",
        "act_step",
        _act_step,
        lambda ratio: ratio >= 1.2,
    ),
    Row(
        "ACT inference, batch 1, 8 steps executed",
        f"{LEROBOT}'s ACT, the same weights",
        "CPU-ms",
        "at most 0.6x",
        "act_inference",
        _inference,
        lambda ratio: ratio <= 0.6,
    ),
    Row(
        "landscape of 50 x 50 cells, a time step, K = 64",
        "published, 100 cells a forward",
        "CPU-s",
        "at least 200x",
        "landscapes",
        _landscape("50x50"),
        lambda ratio: ratio >= 200,
    ),
    Row(
        "landscape of 100 x 100 cells",
        "published, 100 cells a forward; extrapolated: four times the measured 50 x 50 grid",
        "CPU-s",
        "at least 800x",
        "landscapes",
        _landscape("100x100"),
        lambda ratio: ratio >= 800,
    ),
    Row(
        "the same, at most 0.36 CPU-s",
        "-",
        "CPU-s",
        "at most 0.36",
        "landscapes",
        lambda found: _own(_landscape("100x100")(found).ours),
        lambda cpu_s: cpu_s <= 0.36,
    ),
    Row(
        "a step of PushT with its picture, 96 px",
        "gym-pusht 0.1.8",
        "CPU-ms",
        "at least 3x",
        "push_t_steps",
        _push_t_steps,
        lambda ratio: ratio >= 3,
    ),
    Row(
        "drawing a frame, 480 px",
        "matplotlib, its default size",
        "CPU-ms",
        "at most 5",
        "landscape_drawing",
        _drawing,
        lambda cpu_ms: cpu_ms <= 5,
    ),
    Row(
        "attention, acting and showing, over our plain prediction",
        "published mapper",
        "CPU-ms",
        "at most 1.07x",
        "attention",
        _attention("act and show"),
        lambda ratio: ratio <= 1.07,
    ),
    Row(
        "attention of 32 recorded frames",
        "published mapper, frame by frame",
        "CPU-ms",
        "at least 10x",
        "attention",
        _attention("episode"),
        lambda ratio: ratio >= 10,
        "floor in float32: 12.4 of our 13.4 CPU-ms a frame are the backbone and the encoder, at "
        "the most that this core gives; see [attention](attention.md#cost)",
    ),
    Row(
        "SAE step, BatchTopK, d 512, F 4096, k 32, batch 4096",
        "dictionary-learning 0.1.0, BatchTopK",
        "CPU-s",
        "at least 3.5x",
        "sae_step",
        _sae("1 threads", "dictionary-learning BatchTopK"),
        lambda ratio: ratio >= 3.5,
    ),
    Row(
        "the same",
        "eai-sparsify 1.3.3, TopK",
        "CPU-s",
        "at least 1.1x",
        "sae_step",
        _sae("1 threads", "eai-sparsify TopK"),
        lambda ratio: ratio >= 1.1,
    ),
    Row(
        "the same, by the clock on 2 threads",
        "-",
        "s",
        "at most 0.40",
        "sae_step",
        _sae_clock,
        lambda wall_s: wall_s <= 0.4,
    ),
    Row(
        "its gradients, relative difference",
        "dictionary-learning 0.1.0, dense",
        "1",
        "at most 1e-5",
        "sae_step",
        _sae_gradients,
        lambda error: error <= 1e-5,
    ),
    Row(
        "bytes read for a shuffled epoch of activations, over bytes there",
        "single rows of small files",
        "x",
        "at most 1.5",
        "activation_reads",
        _reads,
        lambda amplification: amplification <= 1.5,
    ),
    Row(
        "all diagnostics while training, the demo",
        "-",
        "% of time since training began",
        "at most 5",
        "diagnostics_share",
        _share,
        lambda percent: percent <= 5,
        "no floor: the demo validates every 1000 of its 2000 steps, after some two and a half "
        "minutes each, to show every diagnostic; no long run was measured",
    ),
    Row(
        "start-up, `train.py --help`",
        f"{LEROBOT}, `lerobot-train --help`",
        "CPU-s",
        "at most 6",
        "startup",
        _startup,
        lambda cpu_s: cpu_s <= 6,
    ),
)

NOT_RUN = (
    ("ACT training step, H200", "at least 3x LeRobot's fastest setting", "needs a GPU"),
    ("its time in matrix kernels, H200", "at least 50 %", "needs a GPU"),
    ("its time waiting for data, H200", "at most 2 %", "needs a GPU"),
    ("landscapes of ACT, H200", "at least 100 time steps a second", "needs a GPU"),
    ("landscapes of a diffusion policy, H200", "at least 5 time steps a second", "needs a GPU"),
    ("SAE step, H200", "at least 2x dictionary-learning", "needs a GPU"),
    ("PushT, Diffusion Policy", "63.8 % success, 200 episodes or more", "needs a GPU to train"),
    ("PushT, ACT", "above 63.8 % success", "needs a GPU to train"),
    ("ALOHA transfer cube, ACT", "at least 86 % success", "needs a GPU to train"),
)
"""Targets without a result: what, target, why."""

PREFACE = """# Benchmarks

Most rows compare with a peer: the same weights or data, batch and threads on both sides, alternating in one process. Three kinds do not: start-up alternates fresh processes; a row whose peer is "-" measures ours against a fixed number; bytes and gradients are counted or compared once. The published landscape is measured on one grid of 50 x 50 cells, and its 100 x 100 grid is extrapolated. Where one number stands without a range, there was one measurement, or only its median was kept.

Numbers are medians over rounds, with the lowest and highest in brackets. Most are CPU time, which other programs on the machine disturb less than the clock. The ratio is between medians. Our numbers and the peer's are from one machine and one call; ratios carry over to other machines better than times do.

`OMP_NUM_THREADS=1 python -m benchmarks --hdf5 DEMOS.hdf5 --lerobot FOLDER --peers_path DIR --run_dir RUN` runs all of them and writes this page; `--only NAME` runs some, `--render` only writes the page. What `--peers_path` holds is said in `benchmarks/sae_step.py`.

| what | unit | ours | peer | peer's | number | target | met |
|---|---|---|---|---|---|---|---|
"""  # noqa: E501


def render() -> str:
    """Write the page from the results on the disk."""
    provenance = _read(PROVENANCE) or {}
    lines = [PREFACE.rstrip("\n")]
    used: dict[str, dict[str, Any]] = {}
    missed = []
    for row in ROWS:
        found = _read(RESULTS / f"{row.comparison}.json")
        if found is None:
            lines.append(
                f"| {row.what} | {row.unit} | not run | {row.peer} | | | {row.target} | not run |"
            )
            continue
        measured = row.read(found)
        used[row.comparison] = found
        peer = "" if measured.peer is None else measured.peer.text()
        number = f"{_short(measured.number)}{'x' if 'x' in row.target.split()[-1] else ''}"
        if not row.is_met(measured.number):
            what = f"- {row.what}: {number}, target {row.target}"
            missed.append(f"{what}; {row.floor or 'no floor known'}.")
        lines.append(
            f"| {row.what} | {row.unit} | {measured.ours.text()} | {row.peer} | {peer} | "
            f"{number} | {row.target} | {'yes' if row.is_met(measured.number) else '**no**'} |"
        )
    if missed:
        lines += ["", "## Missed", "", *missed]
    lines += ["", "## Not run", "", "| what | target | why |", "|---|---|---|"]
    lines += [f"| {what} | {target} | {why} |" for what, target, why in NOT_RUN]
    lines += ["", "## When, where, with what", ""]
    lines += ["| comparison | date | commit | machine | versions |", "|---|---|---|---|---|"]
    for name, found in used.items():
        lines.append(_origin(name, found, provenance.get(name)))
    lines += [
        "",
        "A comparison without a recorded machine was run before machines were recorded; date and "
        "commit are those of its result file.",
        "",
    ]
    return "\n".join(lines)


def _origin(name: str, found: Mapping[str, Any], noted: Mapping[str, Any] | None) -> str:
    link = f"[{name}](../benchmarks/{name}.py)"
    if noted is not None:
        versions = ", ".join(f"{package} {number}" for package, number in noted["versions"].items())
        machine = f"{noted['cpu']}, {noted['cores']} cores, load {noted['load_before']}"
        return f"| {link} | {noted['date']} | {noted['commit']} | {machine} | {versions} |"
    if "commit" in found:
        return f"| {link} | {found['date']} | {found['commit']} | not recorded |  |"
    file = f"benchmarks/results/{name}.json"
    log = subprocess.run(
        ["git", "log", "-1", "--format=%cs | %h", "--", file],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    dated = log.stdout.strip() or " | "
    machine = found.get("machine", {}) if isinstance(found, Mapping) else {}
    load = machine.get("load_average")
    where = "not recorded" if load is None else f"load {load:.1f}"
    torch = found.get("torch")
    return f"| {link} | {dated} | {where} | {'' if torch is None else f'torch {torch}'} |"


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _fill_in(words: tuple[str, ...], given: Mapping[str, Any]) -> list[str] | None:
    """Put in what is given; None where something is not."""
    filled = []
    for word in words:
        if word.startswith("{"):
            value = given[word.strip("{}")]
            if value is None:
                return None
            word = str(value)
        filled.append(word)
    return filled


def _note(name: str, commands: list[str], load_before: float) -> None:
    """Keep when, where and with what a comparison was run."""
    # What this writes itself does not change what is measured.
    others = ["--", ":/", ":!benchmarks/results", ":!docs/benchmarks.md"]
    commit, changes = (
        subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", *others])
    )
    document = _read(PROVENANCE) or {}
    document[name] = {
        "date": date.today().isoformat(),
        "commit": (commit or "unknown") + ("-dirty" if changes else ""),
        "commands": commands,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "load_before": round(load_before, 2),
        "load_after": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in PACKAGES},
    }
    PROVENANCE.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0] != "unknown" else platform.machine()


def run(comparison: Comparison, given: Mapping[str, Any], quick: bool) -> bool:
    """Run one comparison; whether all of it went well."""
    commands = [_fill_in(words, given) for words in comparison.words]
    if any(words is None for words in commands):
        missing = [word.strip("{}") for word in comparison.words[0] if word.startswith("{")]
        print(f"{comparison.name}: left out; give --{' and --'.join(missing)}")
        return True
    load_before = os.getloadavg()[0]
    said = []
    with tempfile.TemporaryDirectory() as folder:
        output = (Path(folder) if quick else RESULTS) / f"{comparison.name}.json"
        for words in commands:
            assert words is not None
            module = ["-m", f"benchmarks.{comparison.name}", *words]
            module += [*(comparison.quick if quick else ()), "--output", str(output)]
            said.append(shlex.join(["python", *module[:-2]]))
            print(f"\n$ {said[-1]}", flush=True)
            if subprocess.run([sys.executable, *module], cwd=ROOT).returncode:
                print(f"{comparison.name}: failed", file=sys.stderr)
                return False
    if not quick:
        _note(comparison.name, said, load_before)
    return True


def main() -> int:
    """Run comparisons and write the page; 1 when one of them failed."""
    names = [comparison.name for comparison in COMPARISONS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--quick", action="store_true", help="fewest rounds; nothing is kept")
    parser.add_argument("--render", action="store_true", help="only write docs/benchmarks.md")
    parser.add_argument("--hdf5", type=Path, help="demonstrations as HDF5")
    parser.add_argument("--lerobot", type=Path, help="the same as a LeRobotDataset")
    parser.add_argument("--peers_path", type=Path, help="see benchmarks/sae_step.py")
    parser.add_argument("--run_dir", type=Path, help="a finished run of configs/demo.yaml")
    arguments = parser.parse_args()
    failed = []
    if not arguments.render:
        for comparison in COMPARISONS:
            chosen = not arguments.only or comparison.name in arguments.only
            if chosen and not run(comparison, vars(arguments), arguments.quick):
                failed.append(comparison.name)
    if not arguments.quick:
        DOCUMENT.write_text(render(), encoding="utf-8")
        print(f"written to {DOCUMENT.relative_to(ROOT)}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
