"""The page of a run: what goes in comes out, nothing breaks it, and it stays within its size."""

import base64
import html.parser
import io
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rendering.report import embedding
from rendering.report.embedding import Encodings, spread, webp
from rendering.report.explanations import family, meaning, picture
from rendering.report.page import (
    MAX_POINTS,
    charts,
    config_differences,
    facts,
    in_words,
    is_bound,
    report_page,
    thinned,
)
from rendering.report.records import RunRecord

HOSTILE = "</script><b id='injected'>bold</b>"
STEPS = tuple(range(1000, 6000, 1000))


def planted_run(
    folder: Path,
    steps: tuple[int, ...] = STEPS,
    name: str = "planted/first",
    video: bytes = b"no real video",
    best_step: int | None = None,
    level: float = 0.0,
    extra: dict[str, float] | None = None,
) -> RunRecord:
    """A run whose numbers and pictures tell their step: 1000 at coverage 0.1, grey level 25, ..."""
    rows: list[dict[str, float]] = [
        {"step": step, "train/loss": 1 / (1 + step)} for step in range(0, steps[-1] + 1, 50)
    ]
    rows[0] |= {"untrained/mean_max_coverage": 0.05, "untrained/mean_max_coverage_low": 0.01}
    media = {}
    for number, step in enumerate(steps, start=1):
        coverage = level + 0.1 * number
        rows.append(
            {
                "step": step,
                "val/loss": 1 / number,
                "val/l1_px/k00": 3.0,
                "val/l1_px/k08": 5.0,
                "rollout/n_episodes": 20.0,
                "rollout/mean_max_coverage": coverage,
                "rollout/mean_max_coverage_low": coverage - 0.05,
                "rollout/mean_max_coverage_high": coverage + 0.05,
                "landscape/val/k8/nll": 10.0 - number,
                "attention/rollout/deletion_ratio": 0.5 * number,
            }
            | (extra or {})
        )
        at = Path("media") / f"step_{step:06d}"
        (folder / at).mkdir(parents=True, exist_ok=True)
        for kind in ("landscape", "attention"):
            grey = np.full((64, 96, 3), (25 * number + round(100 * level)) % 256, np.uint8)
            Image.fromarray(grey).save(folder / at / f"{kind}.png")
        (folder / at / "rollouts.mp4").write_bytes(video)
        cells = [[episode, (episode * 7 + number) % 5, None] for episode in range(5)]
        table = {"columns": ["episode", "nll", "remark"], "rows": cells}
        (folder / at / "episodes.json").write_text(json.dumps(table))
        media[step] = {
            "images": {
                "landscape/strip": str(at / "landscape.png"),
                "attention/strip": str(at / "attention.png"),
            },
            "videos": {"rollout/video": str(at / "rollouts.mp4")},
            "tables": {"landscape/episodes": str(at / "episodes.json")},
            "arrays": {},
        }
    return RunRecord(
        name=name,
        folder=folder,
        status="finished",
        rows=rows,
        media=media,
        best_step=best_step,
        wall_s=90.0,
        config=f"seed: {name}\nmodel:\n  width: 8\n",
        environment={"started": "2026-01-02T03:04:05+00:00", "packages": {"torch": "2.11.0"}},
    )


def empty_run(folder: Path, **fields: Any) -> RunRecord:
    plain: dict[str, Any] = {
        "name": "empty",
        "folder": folder,
        "status": "running",
        "rows": [],
        "media": {},
        "best_step": None,
        "wall_s": None,
        "config": "",
        "environment": {},
    }
    return RunRecord(**(plain | fields))


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def file_of(page: str, name: str) -> bytes:
    found = re.search(rf'<script type="[^"]+" id="{name}">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return base64.b64decode(found[1], validate=True)


def with_videos(data: dict[str, Any]) -> list[int]:
    """Steps whose rollouts are in the page."""
    media = data["runs"][0]["media"]
    return [int(step) for step in media if media[step]["videos"]["rollout/video"]["id"]]


def test_a_video_comes_back_byte_by_byte_and_a_picture_pixel_by_pixel(tmp_path):
    video = np.random.default_rng(0).bytes(10_001)
    record = planted_run(tmp_path, video=video)
    rng = np.random.default_rng(1)
    blots = rng.integers(0, 256, (8, 12, 3), np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    picture_file = tmp_path / record.media[2000]["images"]["landscape/strip"]
    Image.fromarray(blots).save(picture_file)
    page = report_page([record], tmp_path / "report").html
    media = data_of(page)["runs"][0]["media"]
    for step in STEPS:
        name = media[str(step)]["videos"]["rollout/video"]["id"]
        assert file_of(page, name) == video
    content = file_of(page, media["2000"]["images"]["landscape/strip"]["id"])
    with Image.open(io.BytesIO(content)) as opened:
        assert opened.format == "WEBP"
        assert len(content) < picture_file.stat().st_size
        np.testing.assert_array_equal(np.asarray(opened.convert("RGB")), blots)


def test_a_photograph_is_made_smaller_than_any_lossless_picture():
    noise = np.random.default_rng(0).normal(128, 12, (120, 160, 3)).clip(0, 255).astype(np.uint8)
    png, lossless = io.BytesIO(), io.BytesIO()
    Image.fromarray(noise).save(png, "png")
    Image.fromarray(noise).save(lossless, "webp", lossless=True)
    small = webp(png.getvalue())
    assert len(small) < 0.7 * len(lossless.getvalue())
    with Image.open(io.BytesIO(small)) as opened:
        error = np.asarray(opened, np.float64) - noise
    assert np.abs(error.mean()) < 1


def test_names_from_data_neither_end_a_script_nor_become_elements(tmp_path):
    record = planted_run(tmp_path, name=HOSTILE, extra={HOSTILE: 1.0})
    index = record.media[1000]["images"]
    index[HOSTILE] = index["landscape/strip"]  # pyright: ignore[reportIndexIssue]
    page = report_page([record], tmp_path).html

    class Elements(html.parser.HTMLParser):
        found: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag, attrs):
            self.found.append(tag)

    parser = Elements()
    parser.feed(page)
    assert "b" in parser.found  # the dialog's own
    assert "id='injected'" not in re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert page.count("</script>") == parser.found.count("script")
    data = data_of(page)
    assert HOSTILE in data["runs"][0]["metrics"]
    assert HOSTILE in data["runs"][0]["media"]["1000"]["images"]


def test_the_policy_of_the_page_allows_its_own_script_only(tmp_path):
    page = report_page([planted_run(tmp_path)], tmp_path).html
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy is not None
    assert "default-src &#39;none&#39;" in policy[1]
    assert "unsafe" not in policy[1]
    assert not re.search(r'(?:src|href)="(?!#|data:,)', page), "nothing is loaded from elsewhere"


def test_too_much_is_left_out_from_the_middle_evenly_and_said(tmp_path):
    steps = tuple(range(1000, 18_000, 1000))
    record = planted_run(tmp_path, steps, video=b"x" * 300_000, best_step=6000)
    page = report_page([record], tmp_path / "report", max_size_mib=4)
    data = data_of(page.html)
    kept = with_videos(data)
    assert len(page.html.encode()) == page.size_bytes <= 4 * 2**20
    assert page.size_bytes > 3 * 2**20, "what there is room for is used"
    assert {1000, 6000, 17_000} <= set(kept)
    gaps = np.diff(kept)
    assert len(kept) < len(steps)
    assert max(gaps) <= 3000, "no long stretch goes unseen"
    assert {medium.step for medium in page.left_out} == set(steps) - set(kept)
    assert {medium.kind for medium in page.left_out} == {"videos"}
    lost = data["runs"][0]["media"][str(page.left_out[0].step)]["videos"]["rollout/video"]
    assert (tmp_path / "report" / lost["path"]).resolve() == page.left_out[0].path
    assert f"{len(page.left_out)} files are left out" in page.html


def test_pictures_go_after_videos_and_the_ends_stay(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (100, 100, 3), np.uint8)
    record = planted_run(tmp_path, tuple(range(100, 1100, 100)), video=b"x" * 30_000)
    for kinds in record.media.values():
        for path in kinds["images"].values():
            Image.fromarray(noise).save(tmp_path / path)
    whole = report_page([record], tmp_path)
    encodings = Encodings()
    sizes = {
        kind: sum(
            encodings.size(medium)
            for medium in report_page([record], tmp_path).left_out
            if medium.kind == kind
        )
        for kind in ("images", "videos")
    }
    assert sizes == {"images": 0, "videos": 0}
    small = report_page([record], tmp_path, max_size_mib=(whole.size_bytes - 340_000) / 2**20)
    left_out = {(medium.kind, medium.step) for medium in small.left_out}
    middle = set(range(200, 1000, 100))
    assert {step for kind, step in left_out if kind == "videos"} == middle
    assert {step for kind, step in left_out if kind == "images"} < middle
    assert any(kind == "images" for kind, _ in left_out)


def test_a_size_that_the_numbers_alone_exceed_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"max_size_mib 0.01: the page takes .* allow more"):
        report_page([planted_run(tmp_path)], tmp_path, max_size_mib=0.01)


def test_what_a_page_remembers_changes_nothing_but_the_time(tmp_path):
    record = planted_run(tmp_path)
    encodings = Encodings()
    pages = [report_page([record], tmp_path, encodings=encodings).html for _ in range(2)]
    file = tmp_path / record.media[1000]["images"]["landscape/strip"]
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(file)
    os.utime(file, ns=(1, 1))
    pages.append(report_page([record], tmp_path, encodings=encodings).html)
    pages.append(report_page([record], tmp_path).html)
    same = [re.sub(r"Written .*?\. This", "", page) for page in pages]
    assert same[0] == same[1] != same[2] == same[3]


@given(st.integers(1, 60), st.data())
def test_every_beginning_of_the_order_covers_the_run(n_checkpoints, data):
    steps = [100 * n for n in range(1, n_checkpoints + 1)]
    best = data.draw(st.none() | st.sampled_from(steps))
    ordered = spread(steps, best)
    assert sorted(ordered) == steps
    ends = {steps[0], steps[-1], best} - {None}
    assert set(ordered[: len(ends)]) == ends
    for taken in range(len(ends), n_checkpoints + 1):
        gaps = np.diff(sorted(ordered[:taken]))
        # No gap is more than twice the one that equal spacing of the rest would leave.
        assert not gaps.size or max(gaps) <= 200 * math.ceil((n_checkpoints - 1) / (taken - 1))


@given(
    st.integers(2 * MAX_POINTS, 6 * MAX_POINTS),
    st.integers(0, 2**32 - 1),
    st.sets(st.integers(0, 6 * MAX_POINTS), min_size=3),
)
def test_a_thinned_curve_has_its_extremes_and_its_checkpoints(length, seed, kept):
    numbers = np.random.default_rng(seed).normal(size=length).tolist()
    values = dict(enumerate(numbers))
    points = thinned(values, kept)
    assert points.items() <= values.items()
    assert len(points) <= MAX_POINTS + len(kept) + 4 < len(values)
    assert max(points.values()) == max(numbers)
    assert min(points.values()) == min(numbers)
    assert kept & values.keys() <= points.keys()
    assert list(points) == sorted(points)


def test_every_number_is_on_one_chart_or_beside_its_own(tmp_path):
    record = planted_run(tmp_path)
    drawn = charts([record])
    lines = [line["metric"] for chart in drawn for line in chart["series"]]
    beside = {
        reference["metric"]
        for chart in drawn
        for reference in chart["references"]
        if "metric" in reference
    }
    bounds = {name for name in record.metrics if is_bound(name, record.metrics)}
    assert len(lines) == len(set(lines))
    assert set(lines) | beside | bounds | {"rollout/n_episodes", "untrained/mean_max_coverage"} == (
        set(record.metrics)
    )
    by_title = {chart["title"]: chart for chart in drawn}
    assert by_title["rollout/mean_max_coverage"]["references"] == [
        {"label": "untrained", "metric": "untrained/mean_max_coverage"}
    ]
    shared = by_title["val/l1_px/*"]
    assert [line["label"] for line in shared["series"]] == ["k00", "k08"]


def test_several_runs_have_a_line_each_in_every_chart(tmp_path):
    records = [planted_run(tmp_path / name, name=name) for name in ("one", "two")]
    for chart in charts(records):
        (metric,) = {line["metric"] for line in chart["series"]}
        assert chart["title"] == metric
        assert [line["label"] for line in chart["series"]] == ["one", "two"]


def test_configurations_are_compared_key_by_key(tmp_path):
    one = "seed: 0\nmodel:\n  width: 8\ncallbacks:\n- class_path: a.B\n  init_args: {x: 1}\n"
    other = "seed: 0\nmodel:\n  width: 9\ncallbacks:\n- class_path: a.B\n  init_args: {x: 2}\n- c\n"
    records = [empty_run(tmp_path, config=config) for config in (one, other, "a: [")]
    assert config_differences(records[:2]) == [
        {"key": "model.width", "values": ["8", "9"]},
        {"key": "callbacks[a.B].init_args.x", "values": ["1", "2"]},
        {"key": "callbacks[1]", "values": [None, '"c"']},
    ]
    assert config_differences(records[:1] * 2) == []
    with pytest.raises(ValueError, match=r"configuration is not YAML .*; mend it, or report"):
        config_differences(records)


def test_numbers_that_are_not_finite_stay_gaps(tmp_path):
    rows = [{"step": 1, "val/loss": math.nan}, {"step": 2, "val/loss": math.inf}]
    data = data_of(report_page([empty_run(tmp_path, rows=rows)], tmp_path).html)
    assert data["runs"][0]["metrics"]["val/loss"]["values"] == [None, None]
    assert data["runs"][0]["checkpoints"] == [1, 2]


def test_a_run_that_has_only_begun_and_one_whose_files_are_gone_have_a_page(tmp_path):
    nothing = data_of(report_page([empty_run(tmp_path)], tmp_path).html)
    assert nothing["runs"][0]["checkpoints"] == []
    record = planted_run(tmp_path)
    gone = tmp_path / record.media[3000]["images"]["attention/strip"]
    gone.unlink()
    media = data_of(report_page([record], tmp_path).html)["runs"][0]["media"]
    assert media["3000"]["images"]["attention/strip"]["id"] is None
    assert media["3000"]["images"]["attention/strip"]["mib"] is None
    assert media["3000"]["images"]["landscape/strip"]["id"]


@pytest.mark.parametrize("count", [0, 7])
def test_no_runs_and_more_than_there_are_colours_make_no_page(tmp_path, count):
    with pytest.raises(ValueError, match=f"of {count} runs: give at least one and at most 6"):
        report_page([empty_run(tmp_path)] * count, tmp_path)


def test_facts_are_said_as_far_as_they_are_known(tmp_path):
    environment = {
        "started": "2026-01-02T03:04:05+00:00",
        "git": {"commit": "0123456789", "changed": True},
        "gpus": ["H200", "H200"],
        "cpu": {"usable": 16},
    }
    record = empty_run(tmp_path, environment=environment, wall_s=3725.0)
    assert facts(record) == [
        "running",
        "step 0",
        "02 Jan 2026 03:04",
        "1 h 2 min",
        "commit 0123456 + changes",
        "2 x H200",
        "16 CPU cores",
    ]
    assert facts(empty_run(tmp_path)) == ["running", "step 0"]
    continued = empty_run(tmp_path, environment=environment, earlier=["config.yaml"])
    assert "continued 02 Jan 2026 03:04" in facts(continued)
    assert [in_words(seconds) for seconds in (4.4, 64, 3600)] == ["4 s", "1 min 4 s", "1 h 0 min"]


def test_a_picture_that_nobody_explained_goes_by_its_key():
    assert picture("sound/spectrum").title == "sound/spectrum"
    assert picture("attention/video_wrist").title == picture("attention/video_image").title
    assert meaning("no/such/number") == ""
    assert family("landscape/val/k8/nll") == ("landscape/val/*/nll", "k8")
    assert family("attention/grad_cam/deletion_ratio") == ("attention/*/deletion_ratio", "grad_cam")


def test_trust_is_resolved_to_what_the_run_logged(tmp_path):
    pictures = data_of(report_page([planted_run(tmp_path)], tmp_path).html)["pictures"]
    trust = pictures["attention/strip"]["trust"]
    assert [column["label"] for column in trust["columns"]] == ["deletion"]
    assert trust["rows"] == [{"name": "rollout", "metrics": ["attention/rollout/deletion_ratio"]}]


def test_the_last_checkpoint_is_the_last_to_lose_its_files(tmp_path):
    record = planted_run(tmp_path, video=b"x" * 300_000, best_step=3000)
    bare = report_page([planted_run(tmp_path / "bare")], tmp_path).size_bytes
    for room, expected in ((1.5, [5000]), (2.5, [3000, 5000]), (3.5, [1000, 3000, 5000])):
        page = report_page([record], tmp_path, (bare + room * 400_000) / 2**20)
        assert with_videos(data_of(page.html)) == expected


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """One entry for each picture that is encoded."""
    encoded: list[int] = []
    encode = embedding.webp

    def count(content: bytes) -> bytes:
        encoded.append(len(content))
        return encode(content)

    monkeypatch.setattr(embedding, "webp", count)
    return encoded


def noisy_run(folder: Path, steps: tuple[int, ...] = STEPS) -> RunRecord:
    """A run whose pictures take some room."""
    record = planted_run(folder, steps)
    for number, kinds in enumerate(record.media.values()):
        noise = np.random.default_rng(number).integers(0, 256, (64, 96, 3), np.uint8)
        for path in kinds["images"].values():
            Image.fromarray(noise).save(folder / path)
    return record


def test_pictures_that_do_not_fit_are_not_encoded(tmp_path, encoded):
    record = noisy_run(tmp_path, tuple(range(100, 4100, 100)))
    page = report_page([record], tmp_path, max_size_mib=0.25)
    n_left_out = sum(medium.kind == "images" for medium in page.left_out)
    assert 20 < n_left_out < 80
    assert len(encoded) <= 80 - n_left_out + 2, "but those of one checkpoint"


def test_pictures_that_the_page_dropped_are_not_kept_in_memory(tmp_path, encoded):
    record = noisy_run(tmp_path)
    encodings = Encodings()
    whole = report_page([record], tmp_path, encodings=encodings)
    report_page([record], tmp_path, encodings=encodings)
    assert len(encoded) == 10
    small = report_page([record], tmp_path, (whole.size_bytes - 30_000) / 2**20, encodings)
    assert any(medium.kind == "images" for medium in small.left_out)
    report_page([record], tmp_path, encodings=encodings)
    assert len(encoded) > 10


def test_many_small_files_leave_room_for_their_links(tmp_path):
    record = planted_run(tmp_path, tuple(range(10, 1010, 10)), video=b"x" * 2000)
    whole = report_page([record], tmp_path)
    page = report_page([record], tmp_path, (whole.size_bytes - 1) / 2**20)
    assert page.left_out
    assert page.size_bytes < whole.size_bytes


def test_numbers_in_any_unit_have_a_meaning_of_their_own():
    for pixels in (
        "features/sae_px",
        "features/mean_px",
        "attention/relevancy/deletion_auc_px",
        "counterfactual/effect_block_px",
        "counterfactual/rerender_px",
    ):
        assert meaning(pixels)
        assert "unit" in meaning(pixels)
        assert meaning(pixels.removesuffix("px") + "cm") == meaning(pixels)
    assert "directions" in meaning("features/mean_cosine")
    assert "demonstrated" in meaning("features/mean_l1")
