"""What a report is made from: the numbers, files and words of one run, wherever it came from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

MEASURED_SECTIONS = ("val/", "test/")
"""Beginnings of names that are logged once a checkpoint, whatever else a run computes."""


@dataclass(frozen=True)
class RunRecord:
    """One run as it lies on the disk."""

    name: str
    """What to call it beside others."""
    folder: Path
    """Where the paths of ``media`` begin."""
    status: str
    """One word or sentence: running, finished, stopped."""
    rows: Sequence[Mapping[str, float]]
    """Logged numbers, one mapping a row; each has a ``step``."""
    media: Mapping[int, Mapping[str, Mapping[str, str]]]
    """Step, then images, videos, tables or arrays, then key to path relative to ``folder``."""
    best_step: int | None
    """Step of the checkpoint that the run ranks first; None when it ranks none."""
    wall_s: float | None
    """Wall time of the run, in s; None when nobody wrote it down."""
    config: str
    """The configuration as YAML; empty when there is none."""
    environment: Mapping[str, Any]
    """What ``environment.json`` holds; empty when there is none."""
    earlier: Sequence[str] = ()
    """Names of the files that say the same of earlier processes of a run that was continued."""

    @cached_property
    def metrics(self) -> dict[str, dict[int, float]]:
        """Every logged number by step, in the order of first appearance; the last row counts."""
        found: dict[str, dict[int, float]] = {}
        for row in self.rows:
            step = int(row["step"])
            for name, value in row.items():
                if name != "step":
                    found.setdefault(name, {})[step] = value
        return {name: dict(sorted(values.items())) for name, values in found.items()}

    @cached_property
    def checkpoints(self) -> tuple[int, ...]:
        """Steps at which weights were validated, or something was drawn of them."""
        validated = {
            step
            for name, values in self.metrics.items()
            if name.startswith(MEASURED_SECTIONS)
            for step in values
        }
        return tuple(sorted(validated | self.media.keys()))

    @property
    def last_step(self) -> int:
        """The last step that anything was logged or drawn at."""
        return max([0, *self.checkpoints, *(int(row["step"]) for row in self.rows)])
