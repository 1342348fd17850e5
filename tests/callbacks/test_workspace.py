"""The workspace and the report of W&B: nothing is left out, and the same names give the same."""

import json
import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import wandb_workspaces.workspaces as ws
from pusht_runs import SIZE, act, data, fit_with_wandb, write_pusht
from wandb_workspaces.reports.v2 import interface as wr
from wandb_workspaces.reports.v2.internal import ReportViewspec
from wandb_workspaces.workspaces.internal import View

import analyze
from callbacks.attention import Attention
from callbacks.feature_dynamics import FeatureDynamics
from callbacks.landscapes import Landscapes
from callbacks.rollouts import Rollouts
from callbacks.workspace import (
    MEDIA_KINDS,
    METRICS,
    ORDER,
    STEP,
    LoggedNames,
    SectionPlan,
    define_report,
    define_workspace,
    plan_sections,
    read_names,
    specification,
)
from envs.push_t import PushTTask

INVENTED = LoggedNames(
    metrics=frozenset(
        {
            "rollout/success",
            "rollout/success_low",
            "rollout/success_high",
            "untrained/success",
            "val/l1_px",
            "val/l1_px/k02",
            "val/l1_px/k16",
            "epoch",
            "attention/rollout/lift_block",
            "attention/rollout/lift_block_ceiling",
            "attention/relevancy/lift_block",
            "temperature/motor_low",
            "somebody_elses",
        }
    ),
    images=frozenset({"landscape/strip", "thermal/picture"}),
    videos=frozenset({"rollout/video"}),
    tables=frozenset({"landscape/episodes"}),
)


def panel_of(sections: tuple[SectionPlan, ...], name: str) -> tuple[str, tuple[str, ...]]:
    """The section of the one panel that shows a name, and all that it shows."""
    (found,) = [
        (section.key, panel.names)
        for section in sections
        for panel in section.panels
        if name in panel.names
    ]
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    """A run with the diagnostics of the demo, small, and what W&B keeps of it."""
    folder = tmp_path_factory.mktemp("run")
    demonstrations = write_pusht(tmp_path_factory.mktemp("demos") / "demos.hdf5", SIZE)
    datamodule = data(demonstrations)
    always: dict[str, Any] = {"strict": True, "max_share": None}
    _, records = fit_with_wandb(
        folder,
        act(datamodule),
        datamodule,
        Landscapes(
            horizons=[0, 4],
            n_samples=2,
            action_resolution=24,
            n_train_episodes=2,
            frame_stride=4,
            n_evidence_frames=1,
            n_video_steps=2,
            n_strip_frames=1,
            **always,
        ),
        Attention(
            n_frames=3,
            n_faithfulness_frames=2,
            n_val_episodes=2,
            task=PushTTask(),
            n_strip_frames=1,
            n_video_steps=2,
            target_height=64,
            faithfulness="never",
            **always,
        ),
        FeatureDynamics(task=PushTTask(), n_latents=16, k=4, n_steps=8, **always),
        Rollouts(PushTTask(image_size=SIZE, max_steps=2), n_episodes=2, strict=True),
    )
    return folder, records


def test_every_name_that_the_demo_logs_has_one_panel_in_one_section(run):
    folder, records = run
    logged = read_names(folder)
    sections = plan_sections(logged)
    shown = [name for section in sections for panel in section.panels for name in panel.names]
    assert len(shown) == len(set(shown))
    assert set(shown) == logged.all
    assert "other" not in [section.key for section in sections]
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    items = {name for row in rows for name in row if not name.startswith("_")}
    # A picture, video, table or histogram is kept as several values: its kind, its path, its size.
    drawn = {name.removesuffix("._type") for name in items if name.endswith("._type")}
    numbers = {name for name in items if name.rpartition(".")[0] not in drawn}
    assert "landscape/val/k0/hpd_level" in drawn
    assert drawn | numbers == {*shown, STEP}


def test_every_picture_video_and_table_has_a_panel_of_its_own(run):
    logged = read_names(run[0])
    found = {
        (panel.kind, panel.names)
        for section in plan_sections(logged)
        for panel in section.panels
        if panel.kind != METRICS
    }
    assert found == {(kind, (name,)) for kind in MEDIA_KINDS for name in getattr(logged, kind)}
    assert {"landscape/strip", "attention/strip", "features/strip"} <= logged.images
    assert {"rollout/video", "landscape/video"} <= logged.videos
    spec = json.dumps(specification(define_workspace(plan_sections(logged))))
    for name in logged.images | logged.videos:
        assert json.dumps([name]) in spec
    # In the report, one slider moves all pictures, another all videos.
    report = specification(define_report(plan_sections(logged)))
    browsers = [
        set(panel["config"]["mediaKeys"])
        for block in report["spec"]["blocks"]
        if block["type"] == "panel-grid"
        for panel in block["metadata"]["panelBankSectionConfig"]["panels"]
        if panel["viewType"] == "Media Browser"
    ]
    assert browsers == [logged.images, logged.videos]


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_names_changes_nothing(seed, run):
    def shuffled(names: frozenset[str]) -> frozenset[str]:
        listed = sorted(names)
        random.Random(seed).shuffle(listed)
        return frozenset(listed)

    logged = read_names(run[0])
    other = LoggedNames(
        *(shuffled(getattr(logged, kind)) for kind in (METRICS, "images", "videos", "tables"))
    )
    for define in (define_workspace, define_report):
        one, two = (json.dumps(specification(define(plan_sections(n)))) for n in (logged, other))
        assert one == two


def test_a_name_more_moves_no_panel():
    """Titles, ids and order of panels stay when a run logs more: what was saved stays right."""

    def ids(sections: tuple[SectionPlan, ...]) -> list[tuple[str, str]]:
        spec = specification(define_workspace(sections))
        return [
            (section["name"], panel["__id__"])
            for section in spec["spec"]["section"]["panelBankConfig"]["sections"]
            for panel in section["panels"]
        ]

    more = LoggedNames(INVENTED.metrics | {"val/l1_px/k04", "latent/kl_nats"}, INVENTED.images)
    fewer = LoggedNames(INVENTED.metrics, INVENTED.images)
    before, after = ids(plan_sections(fewer)), ids(plan_sections(more))
    assert [each for each in after if each in before] == before
    assert len(after) == len(before) + 1
    assert len(set(after)) == len(after)


def test_what_belongs_together_shares_a_panel():
    sections = plan_sections(INVENTED)
    assert [section.key for section in sections] == sorted(
        (section.key for section in sections), key=ORDER.index
    )
    assert panel_of(sections, "rollout/success_low") == (
        "rollout",
        ("rollout/success", "rollout/success_high", "rollout/success_low", "untrained/success"),
    )
    assert panel_of(sections, "val/l1_px") == ("val", ("val/l1_px",))
    assert panel_of(sections, "val/l1_px/k02") == ("val", ("val/l1_px/k02", "val/l1_px/k16"))
    assert len(panel_of(sections, "attention/relevancy/lift_block")[1]) == 3
    assert panel_of(sections, "epoch")[0] == "train"
    # An ending alone makes no interval, and what nobody knows is shown all the same.
    assert panel_of(sections, "temperature/motor_low") == ("other", ("temperature/motor_low",))
    assert panel_of(sections, "thermal/picture") == ("other", ("thermal/picture",))
    assert panel_of(sections, "somebody_elses") == ("other", ("somebody_elses",))


def test_the_axis_of_every_line_is_the_optimisers_step(run):
    axes = [record["metric"] for record in run[1] if record["type"] == "metric"]
    (axis,) = [each for each in axes if each.get("glob_name") == "*"]
    assert (axis["step_metric"], axis["options"]["step_sync"]) == (STEP, True)
    spec = specification(define_workspace(plan_sections(INVENTED)))["spec"]["section"]
    assert spec["settings"]["xAxis"] == STEP
    panels = [panel for each in spec["panelBankConfig"]["sections"] for panel in each["panels"]]
    lines = [panel for panel in panels if panel["viewType"] == "Run History Line Plot"]
    assert lines
    assert {panel["config"]["xAxis"] for panel in lines} == {STEP}


def test_definitions_come_back_from_the_librarys_own_format():
    sections = plan_sections(INVENTED)
    written = specification(define_workspace(sections, "team", "toys"))
    again = ws.Workspace._from_model(View.model_validate(written))
    assert [section.name for section in again.sections] == [each.title for each in sections]
    assert specification(again) == written
    written = specification(define_report(sections, "team", "toys"))
    assert specification(wr.Report._from_model(ReportViewspec.model_validate(written))) == {
        **written,
        # The library leaves the width out when it reads.
        "spec": {**written["spec"], "width": "readable"},
    }


def test_the_report_has_words_for_what_it_shows():
    text = json.dumps(specification(define_report(plan_sections(INVENTED))))
    for panel in (panel for section in plan_sections(INVENTED) for panel in section.panels):
        assert panel.text in text
    assert "Share of episodes whose best score is beyond the threshold." in text


class Server(BaseHTTPRequestHandler):
    """As much of a W&B server as saving asks for."""

    saved: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path != "/graphql":  # W&B's telemetry
            self.send_error(404)
            return
        answer = json.dumps({"data": self._answer(json.loads(body))}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        query, given = body["query"], body.get("variables") or {}
        if "upsertView" in query:
            self.saved.append(given)
            view = {
                "id": "Vmlldzox",
                **{key: given[key] for key in ("name", "displayName", "description", "spec")},
                "project": {"name": given["projectName"], "entityName": given["entityName"]},
            }
            return {"upsertView": {"view": view, "inserted": True}}
        if "GetProjects" in query:
            return {"models": {"edges": [], "pageInfo": {"hasNextPage": False, "endCursor": None}}}
        if "upsertModel" in query:
            return {"upsertModel": {"model": {"id": "1", "name": "toys"}, "inserted": True}}
        return {"viewer": {"id": "1", "entity": "somebody", "username": "somebody", "flags": "{}"}}

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""


@pytest.fixture
def server(monkeypatch, tmp_path) -> Iterator[list[dict[str, Any]]]:
    """What a server that listens here was told to save."""
    saved: list[dict[str, Any]] = []
    listening = ThreadingHTTPServer(("127.0.0.1", 0), type("Quiet", (Server,), {"saved": saved}))
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listening.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("HOME", str(tmp_path))
    yield saved
    listening.shutdown()
    listening.server_close()


def finished_run(folder: Path) -> Path:
    folder.mkdir()
    (folder / "metrics.csv").write_text("step,val/loss,rollout/success\n4,0.5,0.25\n")
    return folder


def words(folder: Path, *more: str) -> list[str]:
    run = str(finished_run(folder / "run"))
    return ["workspace", "--run_dir", run, "--output_dir", str(folder / "out"), *more]


def test_what_is_saved_is_what_is_written(server, tmp_path, capsys):
    assert analyze.main(words(tmp_path, "--project", "toys", "--save")) == 0
    assert [each["type"] for each in server] == ["project-view", "runs"]
    for name, sent in zip(("workspace", "report"), server, strict=True):
        written = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert json.loads(sent["spec"]) == written["spec"]
        assert (sent["entityName"], sent["projectName"]) == ("somebody", "toys")
    addresses = [line for line in capsys.readouterr().out.splitlines() if "http://" in line]
    assert "/somebody/toys?nw=" in addresses[-2]
    assert "/somebody/toys/reports/" in addresses[-1]


def test_without_an_account_definitions_are_written_and_nothing_is_saved(
    tmp_path, monkeypatch, capsys
):
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    arguments = words(tmp_path, "--entity", "team")
    assert analyze.main(arguments) == 0
    assert "2 names in 2 panels of 2 sections" in capsys.readouterr().out
    written = json.loads((tmp_path / "out/workspace.json").read_text())
    assert written["entity"] == "team"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (
        analyze.main([word for word in arguments if word not in ("--entity", "team")] + ["--save"])
        == 1
    )
    assert "set WANDB_API_KEY" in capsys.readouterr().err
    missing = ["workspace", "--run_dir", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    assert analyze.main(missing) == 1
    assert "--run_dir is the folder of one run" in capsys.readouterr().err


def test_ways_of_acting_share_a_panel_and_an_angle_stands_alone():
    names = frozenset(
        {
            "rollout/success",
            "rollout_ensembled/success",
            "untrained/success",
            "untrained_rollout_ensembled/success",
            "features/sae_cm",
            "features/mean_cm",
            "features/mean_cosine",
        }
    )
    sections = plan_sections(LoggedNames(names))
    for name in names:
        section, shown = panel_of(sections, name)
        if name.endswith("success"):
            assert section == "rollout"
            assert set(shown) == {each for each in names if each.endswith("success")}
        elif name.endswith("cosine"):
            assert (section, shown) == ("features", (name,))
        else:
            assert (section, set(shown)) == ("features", {"features/sae_cm", "features/mean_cm"})
