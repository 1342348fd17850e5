"""The report in a browser: one slider moves everything, and nothing is loaded or thrown."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from playwright.sync_api import expect
from test_report import HOSTILE, STEPS, empty_run, planted_run

from rendering.report.page import WEB, report_page
from rendering.report.records import RunRecord
from rendering.video import Clip, write_clips

pytestmark = pytest.mark.browser

GREY = """image => {
    const canvas = document.createElement('canvas');
    canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
    const context = canvas.getContext('2d');
    context.drawImage(image, 0, 0);
    return context.getImageData(5, 5, 1, 1).data[0];
}"""


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> bytes:
    frames = [np.full((48, 64, 3), 8 * n, np.uint8) for n in range(30)]
    file = tmp_path_factory.mktemp("video") / "film.mp4"
    write_clips(file, [Clip(frames, [""] * len(frames))], fps=10)
    return file.read_bytes()


@pytest.fixture
def written(tmp_path, video):
    """Writes a page of runs and returns its address."""

    def written(*records: RunRecord, **options) -> str:
        file = tmp_path / "index.html"
        file.write_text(report_page(list(records), tmp_path, **options).html, encoding="utf-8")
        return file.as_uri()

    return written


def until(event: str, condition: str) -> str:
    """Script that waits for an event of a film; the page allows no text to become code."""
    return f"""film => new Promise(done => {{
        const look = () => {{ if ({condition}) done(); }};
        film.addEventListener("{event}", look);
        look();
    }})"""


def loaded(page, key: str, step: int, number: int = 0):
    """The image under a key, once it shows a step."""
    figure = page.locator("figure", has=page.locator("code", has_text=key))
    figure.scroll_into_view_if_needed()
    image = figure.locator(f"img[data-step='{step}'][src]").nth(number)
    image.evaluate("image => image.decode()")
    return image


def number_at(page, name: str):
    """The value of a number in the table of all numbers."""
    has_name = page.locator("code", has_text=re.compile(f"^{name}$"))
    row = page.locator("#number-table tbody tr", has=has_name)
    row.scroll_into_view_if_needed()
    return row.locator("td").nth(1)


def test_one_slider_moves_pictures_trust_and_numbers(open_page, written, tmp_path, video):
    page = open_page(written(planted_run(tmp_path, video=video, best_step=3000)))
    assert "step 5,000" in page.locator("#step").inner_text()
    page.locator("#slider").focus()
    for presses, step in enumerate((5000, 4000, 3000), start=0):
        if presses:
            page.locator("#slider").focus()
            page.keyboard.press("ArrowLeft")
        number = step // 1000
        for key in ("landscape/strip", "attention/strip"):
            assert loaded(page, key, step).evaluate(GREY) == 25 * number
        trust = page.locator("[data-section=attention] .trust td").first
        assert trust.inner_text().startswith(f"{0.5 * number:g}")
        expect(number_at(page, "landscape/val/k8/nll")).to_have_text(str(10 - number))
        assert f"step {step:,}" in page.locator("#step").inner_text()
    assert "best" in page.locator("#step").inner_text()
    expect(number_at(page, "val/loss")).to_have_text("0.3333")


def test_the_play_button_walks_to_the_end(open_page, written, tmp_path):
    page = open_page(written(planted_run(tmp_path, STEPS[:2])))
    page.get_by_role("button", name="play").click()
    assert "step 1,000" in page.locator("#step").inner_text()
    expect(page.locator("#step")).to_contain_text("step 2,000")
    assert page.locator("#play").get_attribute("aria-pressed") == "false"


def test_a_video_plays_on_when_the_slider_moves(open_page, written, tmp_path, video):
    page = open_page(written(planted_run(tmp_path, video=video)))
    film = page.locator("video")
    film.scroll_into_view_if_needed()
    film.evaluate(until("loadeddata", "film.readyState >= 2"))
    plain = film.evaluate("film => [film.muted, film.loop, film.controls, film.videoWidth]")
    assert plain == [True, True, True, 64]
    film.evaluate("film => film.play()")
    film.evaluate(until("timeupdate", "film.currentTime > 0.2"))
    page.locator("#before").click()
    assert film.get_attribute("data-step") == "4000"
    film.evaluate(until("timeupdate", "film.currentTime > 0.1 && film.currentTime < 2"))
    assert not film.evaluate("film => film.paused")


def test_a_table_sorts_by_the_column_that_is_clicked(open_page, written, tmp_path):
    page = open_page(written(planted_run(tmp_path)))
    page.locator(".table-box").scroll_into_view_if_needed()
    table = page.locator(".table-box table")
    expect(table.locator("tbody tr")).to_have_count(5)

    def column() -> list[int]:
        return [int(text) for text in table.locator("tbody td:nth-child(2)").all_inner_texts()]

    unsorted = column()
    head = table.get_by_role("button", name="nll")
    head.click()
    assert column() == sorted(unsorted) != unsorted
    table.get_by_role("button", name="nll").click()
    assert column() == sorted(unsorted, reverse=True)
    assert table.locator("th").nth(1).get_attribute("aria-sort") == "descending"


def test_a_picture_is_enlarged_and_follows_the_slider(open_page, written, tmp_path):
    page = open_page(written(planted_run(tmp_path)))
    loaded(page, "landscape/strip", 5000).click()
    dialog = page.locator("dialog")
    assert dialog.is_visible()
    page.keyboard.press("ArrowLeft")
    assert "step 4,000" in dialog.inner_text()
    assert (
        dialog.locator("img").evaluate("image => image.decode().then(() => image.naturalWidth)")
        == 96
    )
    page.keyboard.press("Escape")
    assert not dialog.is_visible()


def test_charts_are_searched_read_and_clicked(open_page, written, tmp_path):
    page = open_page(written(planted_run(tmp_path)))
    page.locator("#chart-search").fill("max_coverage")
    assert page.locator("#chart-count").inner_text() == "1 chart"
    card = page.locator("#curves .chart-card:visible")
    chart = card.locator("svg.chart")
    chart.scroll_into_view_if_needed()
    assert chart.locator(".band").count() == 1
    assert chart.locator(".line.dashed").count() == 1
    box = chart.bounding_box()
    page.mouse.move(box["x"] + 50 + 0.41 * (box["width"] - 62), box["y"] + 60)
    expect(chart.locator(".crosshair")).to_have_count(1)
    expect(card.locator(".chart-value").first).to_have_text("0.2")
    page.mouse.click(box["x"] + 50 + 0.41 * (box["width"] - 62), box["y"] + 60)
    expect(page.locator("#step")).to_contain_text("step 2,000")
    page.locator("#chart-search").fill("no such number")
    assert page.locator("#curves .chart-card:visible").count() == 0


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_shows_all_of_it_without_scrolling_sideways(open_page, written, tmp_path, dark):
    long_name = "features/" + "auroc_of_a_very_long_concept_" * 4
    record = planted_run(tmp_path, name="a-rather-long-name/" + "x" * 60, extra={long_name: 0.5})
    page = open_page(written(record), width_px=390, dark=dark)
    for details in page.locator("details").all():
        details.evaluate("details => { details.open = true; }")
    page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(int(level) for level in re.findall(r"\d+", background)) < 200) == dark
    page.locator("#theme").click()
    page.locator("#theme").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_two_runs_stand_side_by_side_each_at_its_newest_checkpoint(open_page, written, tmp_path):
    one = planted_run(tmp_path / "one", (1000, 3000), name="runs/one")
    two = planted_run(tmp_path / "two", (2000, 3000), name="runs/two", level=0.4)
    page = open_page(written(one, two))
    page.locator("#before").click()
    expect(page.locator("#step")).to_contain_text("step 2,000")
    assert loaded(page, "landscape/strip", 1000).evaluate(GREY) == 25
    assert loaded(page, "landscape/strip", 2000).evaluate(GREY) == 65
    lefts = page.locator("[data-section=landscape] img").evaluate_all(
        "images => images.map(image => image.getBoundingClientRect().top)"
    )
    assert lefts[0] == lefts[1], "side by side"
    slots = page.locator("[data-section=landscape] .slot-head").all_inner_texts()
    assert [slot.split()[-1] for slot in slots] == ["1,000", "2,000"], "each says which it shows"
    page.locator("#before").click()
    figure = page.locator("[data-section=landscape] figure")
    assert "no checkpoint yet" in figure.inner_text()
    assert "runs/two" in page.locator("#setup").inner_text()
    differences = page.locator("#setup table").first.inner_text()
    assert "seed" in differences
    assert "model.width" not in differences


def test_hostile_names_are_shown_as_they_are(open_page, written, tmp_path):
    record = planted_run(tmp_path, name=HOSTILE, extra={HOSTILE: 1.0})
    images = dict(record.media[5000]["images"])
    images[HOSTILE] = images["landscape/strip"]
    media = {**record.media, 5000: {**record.media[5000], "images": images}}
    page = open_page(written(replace(record, media=media, config=HOSTILE)))
    assert page.locator("#injected").count() == 0
    assert page.locator("h1").inner_text() == HOSTILE
    assert page.locator("h3", has_text=HOSTILE).count() == 1
    assert page.title().startswith(HOSTILE)


def test_what_was_left_out_names_its_file(open_page, written, tmp_path):
    record = planted_run(tmp_path, video=b"x" * 400_000)
    page = open_page(written(record, max_size_mib=2.0))
    page.locator("#before").click()
    note = page.locator("[data-section=rollout] .absence")
    note.scroll_into_view_if_needed()
    assert "media/step_004000/rollouts.mp4" in note.inner_text()
    link = Path(tmp_path) / note.locator("a").get_attribute("href")
    assert link.is_file()


def test_a_run_without_checkpoints_still_shows_its_curves(open_page, written, tmp_path):
    rows = [{"step": step, "train/loss": 1.0 / (1 + step)} for step in range(0, 100, 10)]
    page = open_page(written(empty_run(tmp_path, rows=rows)))
    assert page.locator("#bar").is_hidden()
    assert "No checkpoint yet" in page.locator("#pictures").inner_text()
    chart = page.locator(".chart-card svg")
    chart.scroll_into_view_if_needed()
    assert chart.locator("path.line").get_attribute("d").startswith("M")
    page.get_by_role("button", name="log").click()
    assert chart.locator("path.line").get_attribute("d").count("L") == 9


def cell(page, name: str, column: int):
    """Text of a column in the table of all numbers: value, interval, change."""
    return number_at(page, name).locator("xpath=..").locator("td").nth(column)


def test_each_number_is_that_of_its_checkpoint_and_marked_by_its_own_rule(
    open_page, written, tmp_path
):
    c80 = "landscape/val/k8/c80"
    ratio = "attention/rollout/deletion_ratio"
    rows = [
        {
            "step": 1000,
            "val/loss": 1.0,
            ratio: 0.5,
            c80: 0.6,
            f"{c80}_low": 0.5,
            f"{c80}_high": 0.7,
        },
        {"step": 2000, "val/loss": 0.5},
        {"step": 3000, "val/loss": 0.75, ratio: 2, c80: 0.7, f"{c80}_low": 0.6, f"{c80}_high": 0.9},
    ]
    record = replace(planted_run(tmp_path, (1000, 2000, 3000)), rows=rows)
    page = open_page(written(record))
    expected = (
        ("2", "0.7[0.6, 0.9]", "[0.6, 0.9]", "+0.25"),
        ("\N{EN DASH}", "\N{EN DASH}", "", "-0.5"),
        ("0.5 ✗", "0.6 ✗[0.5, 0.7]", "[0.5, 0.7]", ""),
    )
    for attention, landscape, interval, change in expected:
        expect(page.locator("[data-section=attention] .trust td")).to_have_text(attention)
        expect(page.locator("[data-section=landscape] .trust td")).to_have_text(landscape)
        expect(cell(page, c80, 2)).to_have_text(interval)
        expect(cell(page, "val/loss", 3)).to_have_text(change)
        page.locator("#before").click(force=True)
    tile = page.locator(".tile", has_text="calibration c80").locator(".tile-line")
    expect(tile).to_have_text("0.7[0.6, 0.9]")


def test_a_search_opens_the_sections_of_what_it_finds(open_page, written, tmp_path):
    page = open_page(written(planted_run(tmp_path)), width_px=390)
    page.locator("#chart-search").fill("deletion_ratio")
    assert page.locator("#chart-count").inner_text() == "1 chart"
    expect(page.locator("#curves .chart-card:visible")).to_have_count(1)


def test_tiles_of_several_runs_say_their_steps_when_they_differ(open_page, written, tmp_path):
    one = planted_run(tmp_path / "one", (1000, 3000), name="runs/one")
    two = planted_run(tmp_path / "two", (2000, 4000), name="runs/two")
    lines = open_page(written(one, two)).locator(".tile", has_text="coverage").locator(".tile-line")
    assert re.search("at step 3,000$", lines.nth(0).inner_text())
    assert re.search("at step 4,000$", lines.nth(1).inner_text())
    alike = open_page(written(one, replace(one, name="runs/twin")))
    assert "at step" not in alike.locator("#headlines").inner_text()


def test_the_path_of_a_file_is_an_address_whatever_its_letters(open_page, written, tmp_path):
    record = planted_run(tmp_path / "run #1? 100%", video=b"x" * 400_000)
    page = open_page(written(record, max_size_mib=2.0))
    page.locator("#before").click()
    address = page.locator("[data-section=rollout] .absence a").get_attribute("href")
    assert "#" not in address
    assert "?" not in address
    assert (tmp_path / unquote(address)).is_file()


def test_a_continued_run_names_the_files_of_its_earlier_processes(open_page, written, tmp_path):
    page = open_page(written(replace(planted_run(tmp_path), earlier=["config.yaml"])))
    assert "earlier processes" in page.locator("#setup").text_content()
    assert "continued" in page.locator("#runs").inner_text()


def charted(open_page, expression: str, argument: Any = None) -> Any:
    """Value of an expression that may use what ``chart.js`` has."""
    functions = (WEB / "chart.js").read_text(encoding="utf-8").replace("export ", "")
    script = f"argument => {{ {functions}\nreturn {expression}; }}"
    return open_page("about:blank").evaluate(script, argument)


TICKS = "argument.map(([a, b]) => (t => t.map(v => tickLabel(v, t[1] - t[0])))(niceTicks(a, b, 4)))"


def test_ticks_are_told_apart_and_true(open_page):
    rng = np.random.default_rng(0)
    ranges = [[0.0110, 0.0116], [0.0536, 0.0543], [15.9996, 16.0004], [0, 1], [-2e-5, 3e-5]]
    ranges += [[1e4, 1.0004e4], [1_000_000, 1_000_400], [0, 30_000], [-0.3, 0.9]]
    for _ in range(200):
        low = float(rng.normal() * 10.0 ** rng.integers(-5, 6))
        ranges.append([low, low + abs(low) * 10.0 ** rng.uniform(-4, 3)])
    for (low, high), labels in zip(ranges, charted(open_page, TICKS, ranges), strict=True):
        values = [float(re.sub("[kM]", "", text)) for text in labels]
        units = [{"k": 1e3, "M": 1e6}.get(text[-1], 1.0) for text in labels]
        ticks = np.multiply(values, units)
        steps = np.diff(ticks)
        assert len(set(labels)) == len(labels) >= 2, labels
        assert np.allclose(steps, steps[0], rtol=1e-6), labels
        assert low - 1e-6 * abs(low) <= ticks[0]
        assert ticks[-1] <= high + 1e-6 * abs(high)
        assert all(
            "e" not in text for text, tick in zip(labels, ticks, strict=True) if abs(tick) >= 1e-3
        )


DRAWN = """(() => {
    const box = document.createElement("div");
    box.style.width = "400px";
    document.body.append(box);
    lineChart(box, { xDomain: [0, 200], label: "", isLog: argument.isLog, series: [argument] });
    return [...box.querySelectorAll("path.band, path.whisker, circle")].map(node => [
        node.getAttribute("class").split(" ")[0], node.getAttribute("d") ?? node.getAttribute("cy"),
    ]);
})()"""


def drawn(open_page, is_log: bool, series: list[Any]) -> Any:
    """Kind and corners of each band, and heights of dots."""
    argument = {"colour": 0, "isLog": is_log} | {
        key: [[row[0], row[place]] for row in series]
        for place, key in enumerate(("points", "low", "high"), start=1)
    }
    found = charted(open_page, DRAWN, argument)
    bands = [
        (
            kind,
            [tuple(map(float, pair.split(","))) for pair in re.split("[ML]", text.rstrip("Z"))[1:]],
        )
        for kind, text in found
        if kind != "dot"
    ]
    return bands, [float(text) for kind, text in found if kind == "dot"]


def test_a_band_on_a_logarithmic_axis_reaches_down_to_where_it_is_drawn(open_page):
    series = [(0, 2e-5, -0.001, 0.002), (100, 1.0, 0.5, 1.5), (200, 2e-5, -0.001, 0.002)]
    [(kind, corners)], dots = drawn(open_page, True, series)
    assert kind == "band"
    for place, dot in enumerate(dots):
        bottom, top = corners[place][1], corners[-1 - place][1]
        assert top < dot < bottom, "the value is inside its interval"
        assert corners[place][0] == corners[-1 - place][0]


@pytest.mark.parametrize("is_log", [False, True])
def test_a_gap_parts_a_band_and_takes_none_of_it(open_page, is_log):
    series = [(x, 2, 1, 3) for x in (0, 40, 80)]
    series += [(100, None, None, None), (120, 2, 1, 3), (160, None, None, 3), (200, 2, 1, 3)]
    bands, _ = drawn(open_page, is_log, series)
    assert [(kind, len(corners)) for kind, corners in bands] == [
        ("band", 6),
        ("whisker", 2),
        ("whisker", 2),
    ]


def test_a_logarithmic_axis_is_offered_where_values_are_positive_and_far_apart(open_page):
    values = ([1, 5, 30], [1, 5, 10], [0, 5, 30], [-1, 5, 30], [1, 30], [1, None, 5, 30])
    series = [[{"points": list(enumerate(each))}] for each in values]
    offered = charted(open_page, "argument.map(wantsLog)", series)
    assert offered == [True, False, False, False, False, True]
    dashed = [{"points": [[0, 1000]], "dashed": True}]
    assert not charted(open_page, "wantsLog(argument)", series[1] + dashed)
