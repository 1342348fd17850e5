"""What W&B shows of a run: panels in sections that mean something, and a report to read them by.

Both are made from the names that a run logged, in code, with W&B's own library: the same names give
the same definition to the letter, so that two of them can be compared with ``diff``. The words are
those of the run report (:mod:`rendering.report.explanations`).
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import wandb
import wandb_workspaces.workspaces as ws
from wandb_workspaces.reports.v2 import interface as wr

from callbacks.dashboard import INDEX, TABLES, read_index
from callbacks.loggers import CSV_FILE, PROJECT, logged_in, read_columns
from callbacks.run_folder import MEDIA
from policies.atomic_files import write_atomically
from rendering.report.explanations import SECTIONS, meaning, picture, section

STEP = "trainer/global_step"
"""The axis of every panel: optimiser steps."""
WORKSPACE_FILE = "workspace.json"
REPORT_FILE = "report.json"
NAME = "Policyscope"
"""Title of the workspace and of the report."""
MEDIA_KINDS = ("images", "videos", TABLES)
"""Kinds of findings that take a panel each, in their order inside a section."""
METRICS = "metrics"
"""Kind of a panel with lines."""
BOUNDS = ("_low", "_high")
"""Endings of the two ends of an interval, which share the panel of their middle."""

ORDER = (
    "rollout",
    "landscape",
    "attention",
    "features",
    "val",
    "train",
    "diagnostics",
    "resources",
    "other",
)
"""Sections from what a policy does to what looking at it costs."""
OPEN = ("rollout", "landscape")
"""Sections that W&B shows unfolded: every open panel is loaded at once."""

PANELS = (
    (r"transfer/arm\d+(?:_flipped)?/(success|mean_max_\w+)", r"transfer/\1"),
    (r"(?:(?:untrained_)?rollout\w*|untrained)/(success(?:_[\d.]+)?)", r"rollout/\1"),
    (r"(?:(?:untrained_)?rollout\w*|untrained)/(mean_max_\w+)", r"rollout/\1"),
    (r"(?:(?:untrained_)?rollout\w*|untrained)/(.+)", r"rollout/\1"),
    (r"landscape/\w+/k\d+/nll", r"\g<0>"),
    (r"landscape/(\w+)/k\d+/(skill_vs_agent)", r"landscape/\1/\2"),
    (r"landscape/\w+/k\d+/c80", r"\g<0>"),
    (r"landscape/\w+/k\d+/hpd_level", r"\g<0>"),
    (r"landscape/(\w+)/k\d+/(.+)", r"landscape/\1/\2"),
    (r"latent/(kl_nats|active_units)", r"\g<0>"),
    (r"latent/(?:elbo|iwae).*", r"latent/evidence_nats"),
    (r"latent/k\d+/(.+)", r"latent/\1"),
    (r"calib/\w+/k\d+/(.+)", r"calib/\1"),
    (r"attention/\w+/((?:deletion|insertion)_ratio)", r"attention/\1"),
    (r"attention/\w+/((?:spearman|tv|ssim)_\w+)", r"attention/\1"),
    (r"attention/\w+/(share_\w+)", r"attention/\1"),
    (r"attention/\w+/(lift_\w+?)(?:_ceiling)?", r"attention/\1"),
    (r"attention/\w+/(?:pointing|area)_(\w+)", r"attention/pointing_\1"),
    (r"attention/\w+/(.+)", r"attention/\1"),
    (r"counterfactual/(effect|share|sensitivity)_.+", r"counterfactual/\1"),
    (r"features/(?:action_score|l1_recovered)", r"\g<0>"),
    (r"features/(?:fvu|explained_variance)", r"\g<0>"),
    (r"features/(?:sae|mean)_((?!cosine)[a-z]+)", r"features/moved_\1"),
    (r"features/(auroc_(?:agent|block)_cell)_.+", r"features/\1"),
    (r"features/auroc_.+", r"features/auroc"),
    (r"features/r_.+", r"features/r"),
    (r"features/rollout_(?:clean|spliced)_(.+)", r"features/rollout_\1"),
    (r"(?:val/first_action|baseline/\w+)_l1_([a-z]+)", r"val/first_action_l1_\1"),
    (r"(val|test)/l1_[a-z]+", r"\g<0>"),
    (r"(val|test)/(\w+)/k\d+", r"\1/\2 by chunk step"),
    (r"train/loss", r"\g<0>"),
    (r"train/(\w+)/k\d+", r"train/\1 by chunk step"),
    (r"diagnostics/(?:errors|share)", r"\g<0>"),
    (r"diagnostics/\w+_s", r"diagnostics/seconds"),
    (r"diagnostics/\w+_(share|skipped)", r"diagnostics/\1 of each"),
    (r"resources/memory_\w*mib", r"resources/memory_mib"),
    (r"resources/(?:open_files|threads|processes)", r"resources/files, threads, processes"),
)
"""Names that share a panel, and its title; the first that fits counts. Panels stand in this order;
a name that none fits has a panel of its own, after them."""

HISTOGRAMS = (
    (
        r"landscape/(\w+)/(k\d+)/ks",
        r"landscape/\1/\2/hpd_level",
        "HPD levels of the demonstrations: flat is calibrated, piled up at 1 overconfident, at 0 "
        "underconfident.",
    ),
    (
        r"features/density",
        r"features/log10_density",
        "Latents by the share of vectors they fire on, as a power of ten.",
    ),
)
"""Names in a run's files, the histogram logged with each, which no file lists, and its words."""


@dataclass(frozen=True)
class LoggedNames:
    """Names that a run logged, by what they stand for."""

    metrics: frozenset[str]
    images: frozenset[str] = frozenset()
    videos: frozenset[str] = frozenset()
    tables: frozenset[str] = frozenset()

    @property
    def histograms(self) -> dict[str, str]:
        """Histograms logged with them, and how to read each."""
        return {
            match.expand(histogram): text
            for name in self.metrics | self.images
            for pattern, histogram, text in HISTOGRAMS
            if (match := re.fullmatch(pattern, name))
        }

    @property
    def all(self) -> frozenset[str]:
        """Every name that W&B has a panel for."""
        return self.metrics | self.images | self.videos | self.tables | self.histograms.keys()


@dataclass(frozen=True)
class PanelPlan:
    """What one panel shows."""

    title: str
    kind: str
    """One of ``MEDIA_KINDS``, or metrics."""
    names: tuple[str, ...]
    text: str
    """How to read it; empty for what nobody has written about."""


@dataclass(frozen=True)
class SectionPlan:
    """What one section shows."""

    key: str
    """One of ``ORDER``."""
    panels: tuple[PanelPlan, ...]

    @property
    def title(self) -> str:
        """Name of the section."""
        return SECTIONS[self.key][0]

    @property
    def text(self) -> str:
        """What the section is about."""
        return SECTIONS[self.key][1]


def read_names(run_folder: Path) -> LoggedNames:
    """Collect what a run logged, from its record of truth.

    Raises:
        ValueError: If the folder holds no run.
    """
    file = run_folder / CSV_FILE
    if not file.is_file():
        raise ValueError(f"{run_folder}: no {CSV_FILE}; --run_dir is the folder of one run")
    index = read_index(run_folder / MEDIA / INDEX).values()
    names = {kind: {key for entry in index for key in entry[kind]} for kind in MEDIA_KINDS}
    return LoggedNames(
        metrics=frozenset(read_columns(file)) - {"step"},
        images=frozenset(names["images"]),
        videos=frozenset(names["videos"]),
        tables=frozenset(names[TABLES]),
    )


def plan_sections(logged: LoggedNames) -> tuple[SectionPlan, ...]:
    """Put every logged name into one panel of one section.

    Args:
        logged: What a run logged.

    Returns:
        Sections in the order of ``ORDER``, without empty ones; the same for the same names.
    """
    panels = [
        PanelPlan(name, kind, (name,), picture(name).reading)
        for kind in MEDIA_KINDS
        for name in getattr(logged, kind)
    ]
    panels += [PanelPlan(name, METRICS, (name,), text) for name, text in logged.histograms.items()]
    panels += _lines(logged.metrics)
    panels.sort(key=_place)
    plans = [
        SectionPlan(key, tuple(panel for panel in panels if _section(panel.names[0]) == key))
        for key in ORDER
    ]
    return tuple(plan for plan in plans if plan.panels)


def define_workspace(
    sections: Sequence[SectionPlan], entity: str = "", project: str = PROJECT
) -> ws.Workspace:
    """Define a workspace of all panels, over optimiser steps.

    Args:
        sections: What to show.
        entity: User or team that it will belong to.
        project: Project that it will be saved in.
    """
    return ws.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[
            ws.Section(
                name=plan.title,
                panels=[_panel(panel) for panel in plan.panels],
                is_open=plan.key in OPEN,
                layout_settings=ws.SectionLayoutSettings(columns=3, rows=3),
                panel_settings=ws.SectionPanelSettings(x_axis=STEP),
            )
            for plan in sections
        ],
        settings=ws.WorkspaceSettings(x_axis=STEP, smoothing_type="none", group_by_prefix="first"),
    )


def define_report(
    sections: Sequence[SectionPlan], entity: str = "", project: str = PROJECT
) -> wr.Report:
    """Define a report that says how to read each panel.

    It begins with all pictures in one panel and all videos in another: each has one slider.

    Args:
        sections: What to show.
        entity: User or team that it will belong to.
        project: Project that it will be saved in.
    """
    panels = [panel for plan in sections for panel in plan.panels]
    pictures = [
        _titled(
            wr.MediaBrowser(title=f"All {kind}", media_keys=names, layout=wr.Layout(w=24, h=16))
        )
        for kind in ("images", "videos")
        if (names := [panel.title for panel in panels if panel.kind == kind])
    ]
    blocks: list[Any] = [wr.TableOfContents()]
    if pictures:
        blocks += [
            wr.H1("One checkpoint"),
            wr.P(
                "Everything drawn of a checkpoint was logged in one row: move the slider of a "
                "panel, and all in it changes to the same step."
            ),
            _grid(pictures, "checkpoint"),
        ]
    for plan in sections:
        blocks += [wr.H1(plan.title), wr.P(plan.text)]
        drawn = [_panel(panel) for panel in plan.panels if panel.kind in (TABLES, METRICS)]
        if drawn:
            blocks.append(_grid(drawn, plan.title))
        texts: list[Any] = [f"{panel.title}: {panel.text}" for panel in plan.panels if panel.text]
        if texts:
            blocks.append(wr.UnorderedList(items=texts))
    return wr.Report(
        entity=entity,
        project=project,
        title=NAME,
        description="What the policy does, would do, looks at and has learnt, and how to read it.",
        blocks=blocks,
        width="fluid",
    )


def write_definitions(
    folder: Path, workspace: ws.Workspace, report: wr.Report
) -> tuple[Path, Path]:
    """Write both definitions as W&B stores them.

    Returns:
        The files of the workspace and of the report.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, definition in ((WORKSPACE_FILE, workspace), (REPORT_FILE, report)):
        write_atomically(folder / name, json.dumps(specification(definition), indent=1) + "\n")
        written.append(folder / name)
    return written[0], written[1]


def account_entity() -> str:
    """Return the user or team that the account of this machine saves to.

    Raises:
        ValueError: Without an account, or if the server does not answer.
    """
    if not (os.environ.get("WANDB_API_KEY") or logged_in()):
        raise ValueError("no W&B account: set WANDB_API_KEY or call 'wandb login' first")
    try:
        entity = wandb.Api().default_entity
    except Exception as error:
        raise ValueError(f"W&B does not say whose the account is: {_first_line(error)}") from error
    if not entity:
        raise ValueError("the W&B account has no default entity: name one with --entity")
    return entity


def save(workspace: ws.Workspace, report: wr.Report) -> tuple[str, str]:
    """Save both definitions on the W&B server, each time as new ones.

    Returns:
        The web addresses of the workspace and of the report.

    Raises:
        ValueError: If the server refuses.
    """
    try:
        return workspace.save().url, report.save().url
    except Exception as error:
        raise ValueError(f"W&B does not save it: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    """What ails a server or the way to it; the library raises many kinds of errors."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def specification(definition: ws.Workspace | wr.Report) -> Mapping[str, Any]:
    """Return what W&B stores for a workspace or a report."""
    model = definition._to_model()
    return json.loads(model.model_dump_json(by_alias=True, exclude_none=True))


def _section(name: str) -> str:
    """The key of the section that a name belongs to; Lightning logs its epoch without a word."""
    return "train" if name == "epoch" else section(name)


def _lines(names: frozenset[str]) -> list[PanelPlan]:
    """Panels of numbers."""
    members: dict[str, list[str]] = {}
    texts: dict[str, dict[str, None]] = {}
    for name in sorted(names, key=_natural):
        middle = _middle(name, names)
        title = _title(middle)
        members.setdefault(title, []).append(name)
        texts.setdefault(title, {})[meaning(middle)] = None
    return [
        PanelPlan(title, METRICS, tuple(shown), " ".join(filter(None, texts[title])))
        for title, shown in members.items()
    ]


def _title(name: str) -> str:
    """The panel that a name stands in."""
    matches = ((re.fullmatch(pattern, name), title) for pattern, title in PANELS)
    return next((match.expand(title) for match, title in matches if match), name)


def _middle(name: str, names: frozenset[str]) -> str:
    """The value that ``name`` is an end of the interval of, or ``name`` itself."""
    for bound in BOUNDS:
        middle = name.removesuffix(bound)
        if middle != name and names >= {middle, *(middle + other for other in BOUNDS)}:
            return middle
    return name


def _place(panel: PanelPlan) -> tuple[Any, ...]:
    """Pictures before numbers, then in the order of ``PANELS``, then by name."""
    kind = (*MEDIA_KINDS, METRICS).index(panel.kind)
    fits = (n for n, (pattern, _) in enumerate(PANELS) if re.fullmatch(pattern, panel.names[0]))
    return kind, next(fits, len(PANELS)), _natural(panel.title)


def _natural(name: str) -> tuple[Any, ...]:
    """Let k8 come before k16."""
    parts = re.split(r"(\d+)", name)
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in parts)


def _panel(plan: PanelPlan) -> Any:
    if plan.kind == TABLES:
        return _titled(wr.WeavePanelSummaryTable(table_name=plan.title), plan.title)
    if plan.kind in MEDIA_KINDS:
        return _titled(wr.MediaBrowser(title=plan.title, media_keys=list(plan.names)))
    return _titled(wr.LinePlot(title=plan.title, x=STEP, y=list(plan.names)))


def _titled(panel: Any, title: str | None = None) -> Any:
    """Give a panel an id that follows from its title: W&B's own are random."""
    panel._id = _stable_id(type(panel).__name__, title or panel.title)
    return panel


def _grid(panels: list[Any], title: str) -> wr.PanelGrid:
    """Panels of a report, three beside each other, over all runs of its own project."""
    # Naming the project would ask the server for its number, and need one to define anything.
    runs = wr.Runset()
    runs._id = _stable_id("runs", title)
    return wr.PanelGrid(runsets=[runs], panels=panels)


def _stable_id(*words: str) -> str:
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:12]
