"""The page: what runs are, in one file that needs nothing else."""

import base64
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from rendering.report.embedding import KINDS, Embedded, Encodings, Medium, choose, media_of
from rendering.report.explanations import (
    HEADLINES,
    SECTIONS,
    Trust,
    family,
    is_curve,
    meaning,
    order,
    picture,
    reference,
    section,
)
from rendering.report.records import RunRecord

WEB = Path(__file__).resolve().parent.parent / "web"
STYLES = ("base.css", "report.css")
MODULES = ("chart.js", "report.js")
"""In the order of their imports, from what imports nothing to what starts the page."""

MAX_SIZE_MIB = 24.0
MAX_POINTS = 1000
"""Points of one number; a chart is fewer pixels wide."""
N_COLOURS = 6
"""Of ``base.css``: as many runs stand side by side, or numbers in one chart."""
MIB = 2**20


@dataclass(frozen=True)
class Page:
    """A report, ready to be written."""

    parts: tuple[str, ...]
    """The page in pieces: joined, its pictures would be in memory once more."""
    size_bytes: int
    left_out: tuple[Medium, ...]
    """Files that would have been too much."""

    @property
    def html(self) -> str:
        """The page in one piece."""
        return "".join(self.parts)

    def write(self, file: Path) -> None:
        """Write the page in UTF-8, piece by piece."""
        with file.open("wb") as out:
            out.writelines(part.encode() for part in self.parts)


def report_page(
    records: Sequence[RunRecord],
    folder: Path,
    max_size_mib: float = MAX_SIZE_MIB,
    encodings: Encodings | None = None,
) -> Page:
    """Make one page of a run, or of several side by side.

    Args:
        records: The runs; their order is that of the columns.
        folder: Where the page will lie: links to files that are left out begin there.
        max_size_mib: Largest size of the page, in MiB.
        encodings: What an earlier page of the same run has already encoded.

    Raises:
        ValueError: If there is no run or more than there are colours, or the numbers alone are
            larger than ``max_size_mib``.
    """
    if not 1 <= len(records) <= N_COLOURS:
        raise ValueError(
            f"a report of {len(records)} runs: give at least one and at most {N_COLOURS}, each has "
            "a colour"
        )
    encodings = encodings or Encodings()
    media = media_of(records)
    # Which files are in changes a few letters of the data, so room is left for every link.
    data = _data(records, folder)
    bare = _skeleton(records, data, max_size_mib, 0, 0)
    budget_bytes = int(max_size_mib * MIB) - len(bare.encode()) - 200 * len(media)
    if budget_bytes < 0:
        raise ValueError(
            f"max_size_mib {max_size_mib:g}: the page takes {len(bare.encode()) / MIB:.1f} MiB "
            "without a single picture; allow more"
        )
    chosen = choose(records, media, budget_bytes, encodings)
    encodings.forget_all_but(chosen)
    blocks = [
        part
        for n, medium in enumerate(chosen)
        for part in _block(f"file-{n}", encodings.read(medium))
    ]
    for n, medium in enumerate(chosen):
        entries = data["runs"][medium.run]["media"][medium.step][medium.kind]
        entries[medium.key]["id"] = f"file-{n}"
    files_bytes = sum(map(len, blocks))  # Base64 and tags: a byte a letter.
    size_bytes = len(bare.encode()) + files_bytes
    page = _skeleton(records, data, max_size_mib, size_bytes, len(media) - len(chosen))
    before, _, after = page.partition(_MEDIA_MARK)
    taken = set(chosen)
    left_out = tuple(medium for medium in media if medium not in taken)
    size_bytes = len(before.encode()) + files_bytes + len(after.encode())
    return Page((before, *blocks, after), size_bytes, left_out)


def as_script_text(data: Any) -> str:
    """Write data as JSON that no HTML parser can mistake for its own: every ``<`` is escaped."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def thinned(values: Mapping[int, float], kept: Iterable[int]) -> dict[int, float]:
    """Take at most about ``MAX_POINTS`` of a number's points, extremes among them.

    Args:
        values: By step, rising.
        kept: Steps that are never left out.

    Returns:
        Some of ``values`` as they were logged; all of them when they are few.
    """
    if len(values) <= MAX_POINTS:
        return dict(values)
    steps = list(values)
    size = math.ceil(2 * len(steps) / MAX_POINTS)
    taken = {steps[0], steps[-1], *kept} & values.keys()
    for start in range(0, len(steps), size):
        group = [step for step in steps[start : start + size] if math.isfinite(values[step])]
        if group:
            taken |= {min(group, key=values.__getitem__), max(group, key=values.__getitem__)}
    return {step: values[step] for step in sorted(taken)}


def charts(records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Group the numbers of runs into charts, in the order of the sections.

    Numbers of one run that differ in one word only (chunk step, attention method) share a chart;
    of several runs, each chart is one number. Bounds of intervals and baselines go with what they
    belong to.
    """
    logged = dict.fromkeys(name for record in records for name in record.metrics)
    compared = {name: reference(name, logged) for name in logged}
    beside = {found[1] for found in compared.values() if found is not None}
    names = [
        name
        for name in logged
        if name not in beside and not is_bound(name, logged) and is_curve(name)
    ]
    groups: dict[str, list[str]] = {}
    for name in names:
        title = family(name)[0] if len(records) == 1 else name
        groups.setdefault(title, []).append(name)
    found = []
    for title, members in groups.items():
        split = [(title, members)]
        if len(members) == 1 or len(members) > N_COLOURS:
            split = [(name, [name]) for name in members]
        found += [_chart(*each, records, compared) for each in split]
    places = {key: place for place, key in enumerate(SECTIONS)}
    return sorted(found, key=lambda chart: places[chart["section"]])


def is_bound(name: str, logged: Iterable[str]) -> bool:
    """Tell whether a number is the end of another number's interval."""
    base, _, end = name.rpartition("_")
    return end in ("low", "high") and base in logged


def config_differences(records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """List what differs between the configurations of runs.

    Returns:
        Key and one text for each run, None where a run has no such key.

    Raises:
        ValueError: If a configuration is not YAML.
    """
    flat = [_flatten(_settings(record)) for record in records]
    keys = dict.fromkeys(key for each in flat for key in each)
    return [
        {"key": key, "values": [each.get(key) for each in flat]}
        for key in keys
        if len({each.get(key) for each in flat}) > 1
    ]


def _settings(record: RunRecord) -> Any:
    try:
        return yaml.safe_load(record.config) or {}
    except yaml.YAMLError as error:
        raise ValueError(
            f"{record.folder}: its newest configuration is not YAML "
            f"({' '.join(str(error).split())}); mend it, or report the run alone"
        ) from error


def _chart(
    title: str,
    members: Sequence[str],
    records: Sequence[RunRecord],
    compared: Mapping[str, tuple[str, str | float] | None],
) -> dict[str, Any]:
    series = [
        {
            "run": run,
            "metric": name,
            "label": family(name)[1] if len(members) > 1 else record.name,
        }
        for name in members
        for run, record in enumerate(records)
        if name in record.metrics
    ]
    references: dict[tuple[str, str | float], dict[str, Any]] = {}
    for name in members:
        if (found := compared[name]) is not None:
            label, other = found
            references[found] = (
                {"label": label, "metric": other}
                if isinstance(other, str)
                else {"label": label, "value": other}
            )
    return {
        "section": section(title),
        "title": title,
        "meaning": meaning(members[0]),
        "series": series,
        "references": list(references.values()),
    }


_MEDIA_MARK = "<!-- media -->"


def _skeleton(
    records: Sequence[RunRecord],
    data: Mapping[str, Any],
    max_size_mib: float,
    size_bytes: int,
    n_left_out: int,
) -> str:
    """Write the page without the contents of files."""
    script = _bundle()
    style = "\n".join((WEB / name).read_text(encoding="utf-8") for name in STYLES)
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src '{_hash(script)}'",
            f"style-src '{_hash(style)}'",
            "img-src blob: data:",
            "media-src blob:",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    environment = Environment(loader=FileSystemLoader(WEB), autoescape=True)
    names = [record.name for record in records]
    return environment.get_template("report.html").render(
        title=names[0] if len(names) == 1 else f"{len(names)} runs",
        policy=policy,
        style=Markup(style),
        script=Markup(script),
        data=Markup(as_script_text(data)),
        media=Markup(_MEDIA_MARK),
        written=datetime.now().astimezone().strftime("%d %b %Y %H:%M"),
        size=f"{size_bytes / MIB:.2f} MiB",
        max_size=f"{max_size_mib:g} MiB",
        n_left_out=n_left_out,
    )


def _bundle() -> str:
    """Join the page's modules into one, which a single file can hold without imports."""
    texts = [(WEB / name).read_text(encoding="utf-8") for name in MODULES]
    joined = "\n".join(texts)
    joined = re.sub(r"^import .*? from .*?;\n", "", joined, flags=re.MULTILINE)
    return re.sub(r"^export ", "", joined, flags=re.MULTILINE)


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _block(name: str, embedded: Embedded) -> tuple[str, str, str]:
    return f'<script type="{embedded.mime_type}" id="{name}">', embedded.text, "</script>\n"


def _data(records: Sequence[RunRecord], folder: Path) -> dict[str, Any]:
    """All that the page is made from but files, none of which has a place in it yet."""
    logged = dict.fromkeys(name for record in records for name in record.metrics)
    keys = dict.fromkeys(
        key
        for record in records
        for kinds in record.media.values()
        for kind in KINDS
        for key in kinds.get(kind, {})
    )
    return {
        "runs": [_run(record, folder) for record in records],
        "charts": charts(records),
        "sections": [
            {"key": key, "title": title, "sentence": sentence}
            for key, (title, sentence) in SECTIONS.items()
        ],
        "pictures": {key: _picture(key, logged) for key in keys},
        "headlines": _headlines(logged),
        "meanings": {name: meaning(name) for name in logged if not is_bound(name, logged)},
        "differences": (config_differences(records) if len(records) > 1 else []),
    }


def _headlines(logged: Iterable[str]) -> list[dict[str, Any]]:
    return [
        {
            "metric": name,
            "label": match.expand(headline.label),
            "reading": headline.reading,
            "baselines": [[label, match.expand(other)] for label, other in headline.baselines],
        }
        for headline in HEADLINES
        for name in logged
        if (match := re.fullmatch(headline.pattern, name))
    ]


def _run(record: RunRecord, folder: Path) -> dict[str, Any]:
    axes: dict[tuple[int, ...], int] = {}
    metrics = {}
    for name, values in record.metrics.items():
        points = thinned(values, record.checkpoints)
        axis = axes.setdefault(tuple(points), len(axes))
        metrics[name] = {"axis": axis, "values": [_number(value) for value in points.values()]}
        if len(points) < len(values):
            metrics[name]["logged"] = len(values)
    return {
        "name": record.name,
        "status": record.status,
        "facts": facts(record),
        "bestStep": record.best_step,
        "lastStep": record.last_step,
        "checkpoints": record.checkpoints,
        "axes": list(axes),
        "metrics": metrics,
        "media": {
            step: {
                kind: {
                    key: _file(record.folder / path, folder)
                    for key, path in kinds.get(kind, {}).items()
                }
                for kind in (*KINDS, "arrays")
            }
            for step, kinds in sorted(record.media.items())
        },
        "config": record.config,
        "earlier": list(record.earlier),
        "environment": [
            [name, value if isinstance(value, str) else json.dumps(value)]
            for name, value in record.environment.items()
            if name != "packages"
        ],
        "packages": list(record.environment.get("packages", {}).items()),
    }


def _file(file: Path, folder: Path) -> dict[str, Any]:
    path = os.path.relpath(file.resolve(), folder.resolve())
    return {
        "id": None,
        "path": Path(path).as_posix(),
        "mib": round(file.stat().st_size / MIB, 2) if file.is_file() else None,
    }


def facts(record: RunRecord) -> list[str]:
    """Say in a few words when a run was, how long, of which code and on what."""
    environment = record.environment
    found = [record.status, f"step {record.last_step:,}"]
    if started := environment.get("started"):
        when = datetime.fromisoformat(started).strftime("%d %b %Y %H:%M")
        found.append(f"continued {when}" if record.earlier else when)
    if record.wall_s is not None:
        found.append(in_words(record.wall_s))
    if git := environment.get("git"):
        found.append(f"commit {git['commit'][:7]}" + (" + changes" if git["changed"] else ""))
    if gpus := environment.get("gpus"):
        found.append(f"{len(gpus)} x {gpus[0]}")
    if cpu := environment.get("cpu"):
        found.append(f"{cpu['usable']} CPU cores")
    if memory := environment.get("memory_gib"):
        found.append(f"{memory:g} GiB")
    return found


def in_words(seconds: float) -> str:
    """Write a duration in its two largest units."""
    minutes, rest_s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest_s} s" if minutes else f"{rest_s} s"


def _picture(key: str, logged: Iterable[str]) -> dict[str, Any]:
    entry = picture(key)
    return {
        "title": entry.title,
        "reading": entry.reading,
        "section": section(key),
        "order": order(key),
        "trust": _trust(entry.trust, logged),
    }


def _trust(columns: Sequence[Trust], logged: Iterable[str]) -> dict[str, Any]:
    rows: dict[str, dict[str, str]] = {}
    for column in columns:
        for name in logged:
            if match := re.fullmatch(column.pattern, name):
                row = rows.setdefault(match.groupdict().get("of", ""), {})
                row.setdefault(column.label, name)
    used = [column for column in columns if any(column.label in row for row in rows.values())]
    return {
        "columns": [asdict(column) for column in used],
        "rows": [
            {"name": name, "metrics": [row.get(column.label) for column in used]}
            for name, row in rows.items()
        ],
    }


def _number(value: float) -> float | None:
    """Round to what a chart and a table can show; None for what is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _flatten(value: Any, key: str = "") -> dict[str, str]:
    """Turn nested YAML into dotted keys; in lists, a class path says more than its place."""
    if isinstance(value, dict) and value:
        items = [(f"{key}.{name}" if key else str(name), each) for name, each in value.items()]
    elif isinstance(value, list) and any(isinstance(each, dict | list) for each in value):
        labels = [
            each.get("class_path", n) if isinstance(each, dict) else n
            for n, each in enumerate(value)
        ]
        # Two of a class are told apart by their place.
        labels = [
            f"{label}, {n}" if labels.count(label) > 1 else label for n, label in enumerate(labels)
        ]
        items = [(f"{key}[{label}]", each) for label, each in zip(labels, value, strict=True)]
    else:
        return {key: json.dumps(value, default=str)}
    return {name: text for each in items for name, text in _flatten(each[1], each[0]).items()}
