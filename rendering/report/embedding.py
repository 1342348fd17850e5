"""Files of a run inside its page: pictures made smaller, and as many as a budget allows."""

import base64
import io
import mimetypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from textwrap import shorten

from policies.safe_paths import inside
from rendering.report.records import RunRecord

PHOTOGRAPH_BYTES_PER_PX = 0.75
"""A lossless picture above this is a photograph; drawings take about a fifth of it."""
PHOTOGRAPH_QUALITY = 90
"""WebP quality at which a photograph shows no difference at its own size."""
KINDS = ("tables", "images", "videos")
"""Kinds of files that go into a page."""


@dataclass(frozen=True)
class Medium:
    """One file of a run at one checkpoint."""

    run: int
    """Number of the run in the page."""
    step: int
    kind: str
    """One of ``KINDS``."""
    key: str
    """Name that stays the same at every checkpoint, e.g. ``landscape/strip``."""
    path: Path


@dataclass(frozen=True)
class Embedded:
    """What stands in the page for a file."""

    mime_type: str
    text: str
    """The bytes in base64."""


class Encodings:
    """Files as they go into a page, remembered as long as their file stays the same.

    Remembers the bytes of what the last page took, and of the rest only the size.
    """

    def __init__(self) -> None:
        self._texts: dict[tuple[str, int, int], Embedded] = {}
        self._sizes: dict[tuple[str, int, int], int] = {}

    def size(self, medium: Medium) -> int:
        """Bytes that a file takes in a page."""
        if medium.kind != "images":
            return 4 * -(-medium.path.stat().st_size // 3)
        key = _version(medium.path)
        if key not in self._sizes:
            self._texts[key] = _encode(medium)
            self._sizes[key] = len(self._texts[key].text)
        return self._sizes[key]

    def read(self, medium: Medium) -> Embedded:
        """Return a file as it goes into a page."""
        if medium.kind != "images":
            return _encode(medium)
        key = _version(medium.path)
        if key not in self._texts:
            self._texts[key] = _encode(medium)
        return self._texts[key]

    def forget_all_but(self, media: Sequence[Medium]) -> None:
        """Keep in memory the pictures of ``media`` only."""
        kept = {_version(medium.path) for medium in media if medium.kind == "images"}
        self._texts = {key: text for key, text in self._texts.items() if key in kept}


def media_of(records: Sequence[RunRecord]) -> list[Medium]:
    """List the files of runs that a page can show and that are there.

    Raises:
        ValueError: If one lies outside its run's folder: a stranger's run could name any file, and
            whoever gets the page would read it.
    """
    found = [
        Medium(number, step, kind, key, _inside(record, kind, key, path))
        for number, record in enumerate(records)
        for step, kinds in sorted(record.media.items())
        for kind in KINDS
        for key, path in kinds.get(kind, {}).items()
    ]
    return [medium for medium in found if medium.path.is_file()]


def _inside(record: RunRecord, kind: str, key: str, path: str) -> Path:
    def refuse(problem: str) -> ValueError:
        return ValueError(
            f"{record.folder}: among its {kind}, {key!a} is no file of the run: {problem}; use "
            "runs that you trust, with all files inside their own folder"
        )

    return inside(record.folder, path, refuse)


def choose(
    records: Sequence[RunRecord],
    media: Sequence[Medium],
    budget_bytes: int,
    encodings: Encodings,
) -> list[Medium]:
    """Choose the files that fit into a page.

    Tables come first, then everything of the last, the best and the first checkpoint, then the
    pictures of those between and at last their videos, each time from the checkpoint that is
    farthest from those that have theirs: what is left out is spread evenly. No picture is weighed,
    which takes encoding it, after those of a checkpoint between did not fit.

    Args:
        records: The runs.
        media: What there is.
        budget_bytes: What may be spent.
        encodings: Where sizes come from.

    Returns:
        Part of ``media``, in its order.
    """
    orders = [spread(record.checkpoints, record.best_step) for record in records]
    turns = [
        (run, step)
        for steps in zip_longest(*orders)
        for run, step in enumerate(steps)
        if step is not None
    ]
    protected = {(run, step) for run, record in enumerate(records) for step in _ends(record)}
    ends = [turn for turn in turns if turn in protected]
    between = [turn for turn in turns if turn not in protected]
    groups = (
        (turns, ("tables",)),
        (ends, ("images", "videos")),
        (between, ("images",)),
        (between, ("videos",)),
    )
    by_turn: dict[tuple[int, int, str], list[Medium]] = {}
    for medium in media:
        by_turn.setdefault((medium.run, medium.step, medium.kind), []).append(medium)
    chosen: set[Medium] = set()
    left_bytes = budget_bytes
    for group, kinds in groups:
        is_full = False
        for turn in group:
            if is_full:
                break
            for kind in kinds:
                together = by_turn.get((*turn, kind), [])
                cost_bytes = sum(encodings.size(medium) for medium in together)
                if cost_bytes <= left_bytes:
                    left_bytes -= cost_bytes
                    chosen.update(together)
                elif kinds == ("images",):
                    is_full = True
    return [medium for medium in media if medium in chosen]


def spread(steps: Sequence[int], best_step: int | None) -> list[int]:
    """Order checkpoints so that every beginning of the order covers the run evenly.

    Args:
        steps: Of the checkpoints, rising.
        best_step: Comes second, after the last one, if it is among them.

    Returns:
        The same steps: last, best, first, then always the one farthest from those before it,
        counted in checkpoints.
    """
    ends = dict.fromkeys(
        step for step in (*steps[-1:], best_step, *steps[:1]) if step is not None and step in steps
    )
    positions = {step: position for position, step in enumerate(steps)}
    ordered = list(ends)
    rest = [step for step in steps if step not in ends]
    nearest = {
        step: min(abs(positions[step] - positions[taken]) for taken in ordered) for step in rest
    }
    while nearest:
        farthest = max(nearest, key=lambda step: nearest[step])
        del nearest[farthest]
        ordered.append(farthest)
        for step, distance in nearest.items():
            nearest[step] = min(distance, abs(positions[step] - positions[farthest]))
    return ordered


def _ends(record: RunRecord) -> set[int]:
    steps = record.checkpoints
    ends = (*steps[:1], *steps[-1:], record.best_step)
    return {step for step in ends if step is not None and step in steps}


def _version(path: Path) -> tuple[str, int, int]:
    """Tell a file from the same path written anew."""
    status = path.stat()
    return str(path.resolve()), status.st_mtime_ns, status.st_size


def _encode(medium: Medium) -> Embedded:
    content = medium.path.read_bytes()
    mime_type = mimetypes.guess_type(medium.path.name)[0] or "application/octet-stream"
    if medium.kind == "images":
        try:
            smaller = webp(content)
        except Exception as error:  # each format has its own ways to be damaged
            raise ValueError(
                f"{medium.path}: the picture cannot be read ({type(error).__name__}: "
                f"{shorten(str(error), 200)}); delete it, or draw it again"
            ) from error
        if len(smaller) < len(content):
            content, mime_type = smaller, "image/webp"
    return Embedded(mime_type, base64.b64encode(content).decode("ascii"))


def webp(picture: bytes) -> bytes:
    """Write a picture as WebP: every pixel as it was, unless it is a photograph.

    Args:
        picture: A file that Pillow reads.
    """
    from PIL import Image

    with Image.open(io.BytesIO(picture)) as opened:
        image = opened.convert("RGBA" if opened.has_transparency_data else "RGB")
    lossless = io.BytesIO()
    image.save(lossless, "webp", lossless=True, method=1, quality=20)
    if len(lossless.getvalue()) <= PHOTOGRAPH_BYTES_PER_PX * image.width * image.height:
        return lossless.getvalue()
    lossy = io.BytesIO()
    image.save(lossy, "webp", quality=PHOTOGRAPH_QUALITY)
    return min(lossless.getvalue(), lossy.getvalue(), key=len)
