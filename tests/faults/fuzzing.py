"""The frame of every fuzz target: damaged inputs, what becomes of them, and which are kept.

A module ``fuzz_<name>.py`` offers ``TARGET = Target(name, make_case, use, accepted)``. Tests run
``drive(TARGET, n_cases, seed)``; ``python tests/faults/fuzz.py`` runs many cases of every target.

Case ``i`` of a seed is a function of (seed, i) alone. What is found is kept as a file in
``tests/faults/corpus/<name>/``, which every later run replays first.
"""

import copy
import hashlib
import json
import os
import random
import re
import shutil
import signal
import string
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parents[2]
IN_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Where cases lie: what waits for a disk thousands of times waits long."""
CORPUS = Path(__file__).parent / "corpus"
TARGETS = ("manifests", "hdf5", "lerobot", "config")
"""Each in a module ``fuzz_<name>``."""

MEMORY_BYTES = 2**30
"""That the process may grow by in one case."""
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

Keys = tuple[Any, ...]

ODD_NAMES = (
    "",
    ".",
    "..",
    "../x",
    "../../../../etc/hostname",
    "/etc/hostname",
    "a/../../b",
    "\0",
    "a\0b",
    "\ud800",
    "\U0001f600",
    "a" * 300,
    "9" * 5000,
    "con",
    "-rf",
    "%s%n{0}",
    "{chunk_index:999999999d}",
    " ",
    "\n",
    "\x1b[31m",
)
ODD_VALUES = (
    None,
    True,
    False,
    0,
    -1,
    1,
    1.5,
    -0.0,
    1e308,
    2**31,
    2**53 + 1,
    2**63,
    -(2**63) - 1,
    10**400,
    float("nan"),
    float("inf"),
    float("-inf"),
    "",
    "1",
    "nan",
    [],
    {},
    [None],
    [[]],
    [1, "a"],
    {"a": 1},
    {"": None},
    *ODD_NAMES,
)
_NUMBERS = (
    b"\0" * 4,
    b"\xff" * 4,
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\0" * 8,
    b"\xff" * 8,
)


@dataclass(frozen=True)
class Case:
    """One input: which of a target's readers gets it, or which file of a folder it replaces."""

    kind: str
    """Letters, digits and underscores: it begins the name of the file that keeps the case."""
    content: bytes


@dataclass(frozen=True)
class Target:
    """A reader to try, or several of a sort."""

    name: str
    """Of the folder in the corpus."""
    make_case: Callable[[random.Random], Case]
    """Draws an input; from this generator only."""
    use: Callable[[Case, Path], None]
    """Has the input read; the folder is empty for each case. An AssertionError in it is a finding,
    too: what was left on the disk, what was read that must not be."""
    accepted: tuple[type[BaseException], ...]
    """The errors that say clearly what is wrong."""
    limit_s: float = 5.0
    """CPU time of one case."""


@dataclass(frozen=True)
class Outcome:
    """What became of one case."""

    number: int
    """Of the case; negative for those of the corpus."""
    kind: str
    verdict: Literal["accepted", "refused", "finding"]
    error: str = ""
    """Type, place and text of a finding's error."""
    kept_as: str = ""
    """The finding's file in the corpus."""


@dataclass
class FuzzReport:
    """Counts of all that was tried with one target."""

    name: str
    n_cases: int = 0
    n_replayed: int = 0
    """Cases of the corpus, which are not counted in ``n_cases``."""
    accepted: int = 0
    refused: int = 0
    by_kind: dict[str, Counter[str]] = field(default_factory=dict)
    """Verdicts of each kind."""
    findings: list[Outcome] = field(default_factory=list)
    """One of each error and place."""
    n_findings: int = 0

    def add(self, outcome: Outcome) -> None:
        """Count one more case."""
        if outcome.number < 0:
            self.n_replayed += 1
        else:
            self.n_cases += 1
        self.by_kind.setdefault(outcome.kind, Counter())[outcome.verdict] += 1
        if outcome.verdict == "finding":
            self.n_findings += 1
            if outcome.error not in {known.error for known in self.findings}:
                self.findings.append(outcome)
        elif outcome.number >= 0:
            if outcome.verdict == "accepted":
                self.accepted += 1
            else:
                self.refused += 1

    def __str__(self) -> str:
        lines = [
            f"{self.name}: {self.n_cases} cases and {self.n_replayed} of the corpus, "
            f"{self.refused} refused, {self.accepted} accepted, {self.n_findings} findings"
        ]
        lines += [f"  {one.kind} {one.kept_as}: {one.error}" for one in self.findings]
        return "\n".join(lines)


class _TooLongError(BaseException):
    """One case used up its CPU time; no reader may catch it."""


def case_of(target: Target, seed: int, number: int) -> Case:
    """Make one case again."""
    return target.make_case(random.Random(f"{seed}/{number}"))


def corpus_of(target: Target) -> list[tuple[Path, Case]]:
    """The cases of a target that were kept."""
    files = sorted((CORPUS / target.name).glob("*--*"))
    return [(file, Case(file.name.partition("--")[0], file.read_bytes())) for file in files]


def drive(target: Target, n_cases: int, seed: int = 0) -> FuzzReport:
    """Replay a target's corpus, then try new cases.

    Args:
        target: What is tried.
        n_cases: New ones.
        seed: Of all draws.
    """
    report = FuzzReport(target.name)
    for outcome in outcomes(target, n_cases, seed):
        report.add(outcome)
    return report


def outcomes(
    target: Target, n_cases: int, seed: int = 0, first: int | None = None
) -> Iterator[Outcome]:
    """What becomes of one case after the other.

    Args:
        target: What is tried.
        n_cases: New ones.
        seed: Of all draws.
        first: Number to begin with; those of the corpus end at -1. All when None.
    """
    corpus = corpus_of(target)
    known: set[str] = set()
    begin = -len(corpus) if first is None else first
    # The first one also imports and makes what all of them need, from source perhaps.
    unhurried = replace(target, limit_s=target.limit_s * 20)
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
        for number in range(begin, n_cases):
            file, case = corpus[number] if number < 0 else (None, case_of(target, seed, number))
            at = unhurried if number == begin else target
            outcome = _outcome(at, case, number, Path(folder) / "case")
            if outcome.verdict == "finding" and outcome.error not in known:
                known.add(outcome.error)
                kept_as = keep(target, case) if file is None else file.name
                outcome = replace(outcome, kept_as=kept_as)
            yield outcome


def keep(target: Target, case: Case) -> str:
    """Write a case into the corpus, and give the name of its file."""
    name = f"{case.kind}--{hashlib.sha256(case.content).hexdigest()[:10]}"
    folder = CORPUS / target.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(case.content)
    return name


def _outcome(target: Target, case: Case, number: int, scratch: Path) -> Outcome:
    assert re.fullmatch(r"\w+", case.kind), case.kind
    _empty(scratch)
    before = _memory_bytes("VmRSS")
    if _CLEAR.exists():
        # The largest that the process has been begins anew.
        _CLEAR.write_text("5")
    outcome = _outcome_of_use(target, case, number, scratch)
    if _memory_bytes("VmHWM") - before > MEMORY_BYTES:
        return Outcome(number, case.kind, "finding", f"more than {MEMORY_BYTES} bytes of memory")
    return outcome


def _outcome_of_use(target: Target, case: Case, number: int, scratch: Path) -> Outcome:
    try:
        with _at_most(target.limit_s):
            target.use(case, scratch)
    except target.accepted as error:
        if _is_of_memory(error):
            return Outcome(number, case.kind, "finding", _told(error))
        if _is_clear(error):
            return Outcome(number, case.kind, "refused")
        return Outcome(number, case.kind, "finding", f"{type(error).__name__}: no clear text")
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return Outcome(number, case.kind, "finding", _told(error))
    return Outcome(number, case.kind, "accepted")


def _memory_bytes(name: str) -> int:
    """A line of the kernel's account of this process; 0 where it keeps none."""
    if not _CLEAR.exists():
        return 0
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _is_of_memory(error: BaseException | None) -> bool:
    """Whether a reader met the end of the memory, and called it something else."""
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _is_clear(error: BaseException) -> bool:
    """It says something, in a text that a terminal and a log file take."""
    text = str(error)
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return bool(text.strip()) and len(text) < 3000


def _told(error: BaseException) -> str:
    """An error with the last line of the project on its way."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(ROOT)]
    ours = [
        frame for frame in ours if ".venv" not in frame.filename and frame.filename != __file__
    ] or list(frames)
    text = ascii(str(error).splitlines()[0] if str(error) else "")[1:-1]
    # Numbers differ from case to case; the fault is the same.
    text = re.sub(r"(?<!Errno )\d+", "N", text[:100])
    return f"{type(error).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno}: {text}"


def _empty(scratch: Path) -> None:
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()


@contextmanager
def _at_most(limit_s: float) -> Iterator[None]:
    """Stop what takes longer, in CPU time: a busy machine makes no finding."""

    def stop(number: int, frame: Any) -> None:
        raise _TooLongError(f"more than {limit_s:g} s of CPU time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def mutated_json(rng: random.Random, value: Any, n_changes: int | None = None) -> Any:
    """Change a JSON value in some places; the original stays as it is.

    Args:
        rng: Where the draws come from.
        value: Dicts, lists and plain values.
        n_changes: One to three when None.
    """
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3) if n_changes is None else n_changes):
        value = _change(rng, value)
    return value


def mutated_json_text(rng: random.Random, value: Any) -> bytes:
    """A JSON file that is wrong: in its values mostly, in its text or its bytes at times."""
    draw = rng.random()
    if draw < 0.03:
        return rng.choice(
            (
                b"",
                b"{",
                b"null",
                b"[]",
                b"5",
                b'"x"',
                b"[" * 20000,
                b'{"a":' * 20000,
                b'{"a":' * 200 + b"1" + b"}" * 200,
                b"\xef\xbb\xbf{}",
                "{}".encode("utf-16"),
                b"{}" * 2,
                b"\0" * 64,
            )
        )
    text = json.dumps(mutated_json(rng, value)).encode()
    if draw < 0.10:
        return mutated_bytes(rng, text)
    if draw < 0.15:
        # A number in the text, where one is.
        found = list(re.finditer(rb"(?<![\w\".])-?\d+(?![\w\".])", text))
        if found:
            one = rng.choice(found)
            odd = rng.choice(
                (b"9" * 5000, b"1e999", b"-1e-999", b"NaN", b"Infinity", b"00", b"1.", b"0x1")
            )
            return text[: one.start()] + odd + text[one.end() :]
    return text


def mutated_bytes(rng: random.Random, content: bytes, other: bytes | None = None) -> bytes:
    """Flip, cut, insert, repeat, or splice bytes.

    Args:
        rng: Where the draws come from.
        content: What is changed.
        other: A file of the same kind to splice with.
    """
    damaged = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(damaged) + 1)
        length = min(rng.choice((1, 2, 4, 8, 64, 512)), max(len(damaged) - place, 0))
        kind = rng.randrange(8)
        if kind <= 2 and place < len(damaged):
            damaged[place] ^= 1 << rng.randrange(8)
        elif kind == 3:
            del damaged[place:]
        elif kind == 4:
            del damaged[place : place + length]
        elif kind == 5:
            damaged[place:place] = rng.randbytes(rng.choice((1, 4, 64)))
        elif kind == 6:
            number = rng.choice(_NUMBERS)
            damaged[place : place + len(number)] = number
        elif other:
            start = rng.randrange(len(other))
            damaged[place:] = other[start:]
        else:
            damaged[place:place] = damaged[place : place + length]
    return bytes(damaged)


def mutated_name(rng: random.Random, name: str) -> str:
    """A name, or something that no name should be."""
    draw = rng.randrange(4)
    if draw == 0:
        return rng.choice(ODD_NAMES)
    if draw == 1:
        return "../" * rng.randint(1, 4) + name
    place = rng.randrange(len(name) + 1)
    odd = rng.choice(("..", "/", "\0", "\\", ".", " ", rng.choice(string.printable)))
    return name[:place] + odd + name[place:]


def places(value: Any, before: Keys = ()) -> Iterator[Keys]:
    """Keys that lead to each value within a JSON value, itself first."""
    yield before
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*before, key))
    elif isinstance(value, list):
        # Long lists hold the same again and again.
        for index in list(range(len(value)))[:8]:
            yield from places(value[index], (*before, index))


def _change(rng: random.Random, value: Any) -> Any:
    found = list(places(value))
    keys = rng.choice(found)
    if not keys:
        return _odd_value(rng) if rng.random() < 0.05 else _change_below(rng, value, found)
    return _change_at(rng, value, keys, found)


def _change_below(rng: random.Random, value: Any, found: list[Keys]) -> Any:
    below = [keys for keys in found if keys]
    return _change_at(rng, value, rng.choice(below), found) if below else _odd_value(rng)


def _change_at(rng: random.Random, value: Any, keys: Keys, found: list[Keys]) -> Any:
    parent = _get(value, keys[:-1])
    last = keys[-1]
    here = parent[last]
    kind = rng.randrange(10)
    if kind == 0:
        del parent[last]
    elif kind == 1 and isinstance(parent, dict):
        parent[mutated_name(rng, last)] = parent.pop(last)
    elif kind == 2:
        parent[last] = copy.deepcopy(_get(value, rng.choice(found)))
    elif kind == 3:
        parent[last] = [here] if rng.random() < 0.5 else {"a": here}
    elif kind == 4 and isinstance(here, list):
        parent[last] = here * rng.choice((0, 2, 3)) if rng.random() < 0.7 else here[:-1]
    elif kind == 5 and isinstance(here, str):
        parent[last] = mutated_name(rng, here)
    elif kind == 6 and isinstance(here, int | float):
        parent[last] = rng.choice((-here, here + 1, here * 10**9, str(here), 0.1))
    elif kind == 7:
        deep: Any = here
        for _ in range(rng.choice((10, 65, 100))):
            deep = [deep]
        parent[last] = deep
    else:
        parent[last] = _odd_value(rng)
    return value


def _get(value: Any, keys: Keys) -> Any:
    for key in keys:
        value = value[key]
    return value


def _odd_value(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(ODD_VALUES))
