"""One error for every data set that cannot be used, which names file, key and mend."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

_SHOWN_ALIKE = 3
"""Problems of one kind that are spelt out; the others are counted."""
_SHOWN_CHARACTERS = 500
"""Of a key, or of what was found there."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a data set."""

    file: str
    """Path of the file (or folder) it was found in."""
    key: str
    """Path inside the file, an attribute as ``group@name``; empty for the file itself."""
    what: str
    """What was found, with the offending value."""
    mend: str
    """What the reader can do about it."""
    episode: int | None = None
    """Number of the episode that leaving out would mend; None when the whole set is unusable."""
    kind: str = ""
    """Problems of the same kind are counted together when there are many."""

    def __str__(self) -> str:
        # The name of a file need not be UTF-8, and may hold what a terminal obeys.
        file = self.file if self.file.isprintable() else _shown(self.file)
        where = f"{file}: {_shown(self.key)}" if self.key else file
        return f"{where}: {_shown(self.what)}. Mend: {_shown(self.mend)}."


def _shown(text: str) -> str:
    """What a stranger wrote into a file, for a terminal: one line of bounded length."""
    plain = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:_SHOWN_CHARACTERS])
    return plain if len(text) <= _SHOWN_CHARACTERS else f"{plain}... ({len(text)} characters)"


class DatasetError(ValueError):
    """A data set is unusable; the message lists every problem that was found.

    Attributes:
        path: What the caller asked for.
        problems: All problems, in the order of the files and episodes.
    """

    def __init__(self, path: str | Path, problems: Iterable[Problem]) -> None:
        self.path = str(path)
        self.problems = tuple(problems)
        super().__init__(self.path, self.problems)

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return str(self.problems[0])
        lines = [f"{self.path}: {len(self.problems)} problems"]
        lines += [f"  {line}" for line in problem_lines(self.problems)]
        return "\n".join(lines)


def problem_lines(problems: Iterable[Problem]) -> list[str]:
    """One line per problem; of many neighbours of one kind only the first few are spelt out."""
    lines: list[str] = []
    for kind, group in groupby(
        sorted_by_first_appearance(problems), key=lambda p: (p.kind or p.what, p.mend)
    ):
        alike = list(group)
        lines += [str(problem) for problem in alike[:_SHOWN_ALIKE]]
        if len(alike) > _SHOWN_ALIKE:
            more = len(alike) - _SHOWN_ALIKE
            lines.append(f"... and {more} more of this kind ({_shown(kind[0])})")
    return lines


def sorted_by_first_appearance(problems: Iterable[Problem]) -> list[Problem]:
    """Bring problems of one kind together without reordering the kinds."""
    kinds: dict[tuple[str, str], list[Problem]] = {}
    for problem in problems:
        kinds.setdefault((problem.kind or problem.what, problem.mend), []).append(problem)
    return [problem for alike in kinds.values() for problem in alike]
