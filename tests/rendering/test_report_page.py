"""The report in a browser: one slider moves everything, and nothing is loaded or thrown."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import expect
from test_report import HOSTILE, STEPS, empty_run, planted_run

from rendering.report.page import report_page
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
    assert "step 2,000" in page.locator("#step").inner_text()
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
    assert "step 2,000" in page.locator("#step").inner_text()
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
