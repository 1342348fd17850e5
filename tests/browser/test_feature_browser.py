"""The tab of features: its numbers are the library's, and the page does what it says."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import av
import cv2
import numpy as np
import pytest
import torch
from tiny_browser import (
    TinyRun,
    live,
    make_run,
    parts,
    plain,
    session,
    wait_until,
)

from browser.features import FeatureLibrary, Moment, steering_obstacle
from browser.notes import Note, NoteBook
from browser.server import create_app, serving
from datamodules.activations import ActivationDataModule
from features.effects import FeatureProbe, feature_effects
from features.splice import DirectionIntervention, Intervention, random_directions, splice


@dataclass(frozen=True)
class Open:
    run: TinyRun
    library: FeatureLibrary
    notes: NoteBook


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> Open:
    folder = tmp_path_factory.mktemp("browser")
    run = make_run(folder)
    return Open(run, *parts(session(run, folder / "clips")))


@pytest.fixture(scope="module")
def strongest(opened) -> tuple[int, Moment]:
    """A feature with an effect, and a frame where it fires."""
    latent = live(opened.library)[0]
    (clip, *_) = opened.library.detail(latent)["clips"]
    return latent, Moment(clip["episode"], clip["frame"])


# The library


def test_a_timeline_is_the_strongest_token_of_the_record(opened, strongest):
    latent, moment = strongest
    library = opened.library
    dense = library.record.frames_by_latents([latent])[:, 0]
    expected = dense[library.record.episode_index == moment.episode]
    found = library.timeline(latent, moment.episode)
    torch.testing.assert_close(torch.tensor(found["values"]), expected, rtol=1e-5, atol=1e-6)
    silent = [token is None for token in found["tokens"]]
    assert silent == (expected == 0).tolist()
    assert max(found["values"]) <= found["top"] * (1 + 1e-5)


def test_a_clip_shows_the_moment_and_a_map_only_if_asked(opened, strongest):
    latent, moment = strongest
    library = opened.library
    n_frames = len(library.timeline(latent, moment.episode)["values"])
    films = {}
    for has_map in (False, True):
        path = library.clip(latent, moment, None, has_map, whole=True)
        with av.open(str(path)) as film:
            assert film.streams.video[0].codec_context.name == "h264"
            films[has_map] = [each.to_ndarray(format="rgb24") for each in film.decode(video=0)]
        assert len(films[has_map]) == n_frames
    seen = library.studio.picture(moment.episode, moment.frame, "image")
    shown = cv2.resize(films[False][moment.frame], seen.shape[1::-1], interpolation=cv2.INTER_AREA)
    assert np.abs(shown.astype(int) - seen).mean() < 8
    assert any(np.abs(a.astype(int) - b).mean() > 8 for a, b in zip(*films.values(), strict=True))
    short = library.clip(latent, moment, None, False, whole=False)
    with av.open(str(short)) as film:
        reach = round(1.5 * library.fps)
        expected = min(n_frames, moment.frame + reach + 1) - max(0, moment.frame - reach)
        assert film.streams.video[0].frames == expected


def test_the_same_clip_is_made_once(opened, strongest):
    latent, moment = strongest
    path = opened.library.clip(latent, moment, None, True, whole=False)
    before = path.stat().st_mtime_ns
    assert opened.library.clip(latent, moment, None, True, whole=False) == path
    assert path.stat().st_mtime_ns == before


def test_steering_is_what_the_policy_does_when_it_is_spliced(opened, strongest):
    latent, moment = strongest
    library = opened.library
    observation = library.data.demonstrations.episode(moment.episode).observation.rows(
        slice(moment.frame, moment.frame + 1)
    )
    for scale, clamp in ((0.0, None), (-3.0, None), (None, 2.5)):
        intervention = Intervention((latent,), scale, clamp)
        turned = splice(library.view, library.data.layer, intervention.edit(library.sae))
        found = library.steer(latent, moment, scale, clamp, n_directions=3)
        expected = turned.predict_chunk(observation)[0]
        torch.testing.assert_close(
            torch.tensor(found["after"]), expected, rtol=1e-4, atol=1e-3, check_dtype=False
        )
        before = library.view.predict_chunk(observation)[0]
        px = (expected - before).norm(dim=-1)
        torch.testing.assert_close(
            torch.tensor(found["change_px"]), px, rtol=1e-3, atol=1e-3, check_dtype=False
        )
        others = []
        for direction in random_directions(3, library.sae.d_in):
            control = DirectionIntervention(direction, intervention)
            moved = splice(library.view, library.data.layer, control.edit(library.sae))
            others.append((moved.predict_chunk(observation)[0] - before).norm(dim=-1))
        torch.testing.assert_close(
            torch.tensor(found["directions_px"][1]),
            torch.stack(others).median(0).values,
            rtol=1e-3,
            atol=1e-3,
            check_dtype=False,
        )
        n_beyond = (torch.stack(others) >= px).sum(0)
        assert found["p"] == ((1 + n_beyond) / 4).tolist()


def test_a_factor_of_one_changes_nothing(opened, strongest):
    latent, moment = strongest
    found = opened.library.steer(latent, moment, scale=1.0)
    assert found["before"] == found["after"]
    assert max(found["change_px"]) == 0
    assert found["directions_px"] is None


def test_effects_on_demand_are_those_of_the_probe(opened, strongest):
    latent, _ = strongest
    library = opened.library
    found = library.measure(latent)
    moments = library._active_moments(latent, 32)
    observation = library._observe(moments)
    probe = FeatureProbe(library.view, library.data.layer, library.sae, observation, [latent])
    own = feature_effects(probe, (0.0,), n_frames_per_latent=16)
    assert found["ablated_px"] == pytest.approx(float(own.magnitude_px[0, 0, 0]), rel=1e-4)
    assert 0 < found["p"] <= 1
    assert found["doses"]["measured_px"][0] < found["doses"]["measured_px"][-1]


def test_place_fields_are_rates_where_the_object_was(opened, strongest):
    latent, _ = strongest
    library = opened.library
    found = library.detail(latent)["places"]["agent"]
    rates = torch.tensor(
        [[float("nan") if value is None else value for value in row] for row in found["rates"]]
    )
    fields = library._places["agent"]
    known = fields.frames >= 3
    assert torch.equal(~rates.isnan(), known)
    activity = library.record.frames_by_latents([latent])[:, 0]
    x, y = (library.concepts.column(f"agent_{axis}_px") for axis in ("x", "y"))
    row, column = (int(place) for place in known.nonzero()[0])
    inside = ((x // 32).clamp(0, 15) == column) & ((y // 32).clamp(0, 15) == row)
    torch.testing.assert_close(rates[row, column], activity[inside].mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda library: library.detail(24), "0 to 23"),
        (lambda library: library.detail(-1), "0 to 23"),
        (lambda library: library.timeline(0, 99), "episode 99"),
        (lambda library: library.steer(0, Moment(99, 0), scale=0.0), "episode 99"),
        (lambda library: library.clip(0, Moment(99, 0), None, True, True), "episode 99"),
    ],
)
def test_what_there_is_not_is_named(call, named, opened):
    with pytest.raises(ValueError, match=named):
        call(opened.library)


def test_requests_are_checked(opened, strongest):
    latent, moment = strongest
    home = f"/api/features/{latent}"
    where = f"episode={moment.episode}&frame={moment.frame}"
    with serving(create_app(opened.library, None, opened.notes)) as address:

        def status(path: str) -> tuple[int, dict]:
            try:
                with urllib.request.urlopen(address.rstrip("/") + path) as answer:
                    return answer.status, {}
            except urllib.error.HTTPError as error:
                return error.code, json.loads(error.read())

        assert status(f"{home}/steer?{where}&scale=2")[0] == 200
        for path, named in (
            (f"{home}/steer?{where}&scale=nan", "scale"),
            (f"{home}/steer?{where}&scale=1e9", "scale"),
            (f"{home}/steer?{where}", "scale"),
            (f"{home}/steer?{where}&scale=1&clamp=1", "scale"),
            (f"{home}/steer?{where}&scale=1&directions=1000", "directions"),
            (f"{home}/steer?episode={moment.episode}&frame=999&scale=1", "frame 999"),
            (f"{home}/steer?episode=x&frame=1&scale=1", "episode"),
            (f"{home}/clip.mp4?{where}&camera=wrist", "wrist"),
            ("/api/features/9999", "9999"),
        ):
            code, body = status(path)
            assert code == 400
            assert named in body["error"]


# The page


@pytest.fixture
def address(opened) -> Iterator[str]:
    with serving(create_app(opened.library, None, opened.notes)) as where:
        yield where


def hold(page, pattern: str) -> list[Any]:
    """Requests that wait until the test lets them go on."""
    held: list[Any] = []
    page.route(pattern, lambda route: held.append(route))
    return held


def until(page, condition: Callable[[], Any]) -> None:
    patience = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < patience
        page.wait_for_timeout(20)


def rows(page) -> list[str]:
    return page.locator(".row").evaluate_all("rows => rows.map(row => row.dataset.latent)")


@pytest.mark.browser
def test_the_list_sorts_filters_and_leads_to_a_feature(address, opened, open_page):
    page = open_page(f"{address}#features")
    page.wait_for_selector(".feature-detail h2")
    n_live = len(live(opened.library))
    assert len(rows(page)) == min(n_live, 24)
    assert rows(page)[:3] == [str(latent) for latent in live(opened.library)[:3]]
    page.select_option("[aria-label='Sort by']", "number")
    assert rows(page) == sorted(rows(page), key=int)
    page.click("[aria-label='Turn the order round']")
    assert rows(page) == sorted(rows(page), key=int, reverse=True)
    page.uncheck("text=only live")
    assert "24 of 24" in page.text_content(".feature-list")
    last = rows(page)[0]
    page.fill("input[type=search]", last)
    assert last in rows(page)
    assert all(last in row for row in page.locator(".row").all_text_contents())
    page.click(f".row[data-latent='{last}']")
    wait_until(page, f"document.querySelector('h2')?.textContent === 'Feature {last}'")
    assert page.url.endswith(f"#features/{last}")


@pytest.mark.browser
def test_videos_play_and_the_curve_seeks(address, strongest, open_page):
    latent, _ = strongest
    page = open_page(f"{address}#features/{latent}")
    wait_until(page, "[...document.querySelectorAll('.clip video')].some(v => v.currentTime > 0)")
    video = ".timeline video"
    wait_until(page, f"document.querySelector('{video}').readyState >= 2")
    box = page.locator(".curve svg").first.bounding_box()
    assert box is not None
    last = int(page.get_attribute(".curve", "aria-valuemax") or 0)
    for share in (0.75, 0.25):
        page.mouse.click(box["x"] + share * box["width"], box["y"] + 20)
        frame = int(page.get_attribute(".curve", "aria-valuenow") or -1)
        assert abs(frame - share * last) <= 1
        time = page.evaluate(f"document.querySelector('{video}').currentTime")
        assert time == pytest.approx((frame + 0.5) / 10, abs=0.02)
        page.wait_for_selector(f"text=/episode \\d+, frame {frame} \\(the timeline/")
    page.focus(".curve")
    page.keyboard.press("ArrowRight")
    assert int(page.get_attribute(".curve", "aria-valuenow") or -1) == frame + 1
    page.keyboard.press("Home")
    page.click("button:text-is('Play')")
    wait_until(page, "document.querySelector('.curve').getAttribute('aria-valuenow') > 1")
    # Registered behind the page's own, this callback sees the cursor of the same frame.
    pairs = page.evaluate(
        """() => new Promise((resolve) => {
          const video = document.querySelector(".timeline video");
          const curve = document.querySelector(".curve");
          const pairs = [];
          const look = (_, { mediaTime }) => {
            pairs.push([mediaTime, Number(curve.getAttribute("aria-valuenow"))]);
            if (pairs.length === 4) resolve(pairs);
            else video.requestVideoFrameCallback(look);
          };
          video.requestVideoFrameCallback(look);
        })"""
    )
    for time, frame in pairs:
        assert abs(time * 10 - frame) < 0.5
    page.click("button:text-is('Pause')")


@pytest.mark.browser
def test_the_slider_changes_what_the_policy_would_do(address, opened, strongest, open_page):
    latent, moment = strongest
    page = open_page(f"{address}#features/{latent}")
    wait_until(page, "document.querySelector('.answer')?.textContent.includes('moves by')")
    p = opened.library.steer(latent, moment, scale=0.0)["p"][0]
    assert f"p = {p:.3f}" in (page.text_content(".answer") or "")

    def turned() -> str:
        return page.locator(".stage polyline").last.get_attribute("points") or ""

    def as_it_is() -> str:
        return page.locator(".stage polyline").nth(1).get_attribute("points") or ""

    before, ablated = as_it_is(), turned()
    assert ablated != before
    said = page.text_content(".answer")
    page.focus("input[name=scale]")
    page.keyboard.press("End")
    wait_until(page, "said => document.querySelector('.answer').textContent !== said", said)
    assert turned() not in (before, ablated)
    assert as_it_is() == before
    said = page.text_content(".answer")
    page.check("input[name=mode][value=clamp]")
    wait_until(page, "said => document.querySelector('.answer').textContent !== said", said)
    page.fill("input[name=step]", "3")
    assert "step 3" in (page.text_content(".answer") or "")


@pytest.mark.browser
def test_a_name_is_saved_found_and_survives_a_restart(opened, strongest, open_page):
    latent, _ = strongest
    name = "</script><b>left & right</b>"
    with serving(create_app(opened.library, None, opened.notes)) as address:
        page = open_page(f"{address}#features/{latent}")
        page.fill("input[name=name]", name)
        page.fill("textarea", "seen where the agent turns")
        page.click("text=Save")
        page.wait_for_selector(".status:has-text('saved')")
        assert name in (page.text_content(f".row[data-latent='{latent}']") or "")
        page.context.close()
    again = NoteBook(opened.notes.path, opened.notes.autoencoder, opened.notes.n_latents)
    with serving(create_app(opened.library, None, again)) as address:
        page = open_page(f"{address}#features")
        page.wait_for_selector(".row")
        page.check("text=only named")
        assert rows(page) == [str(latent)]
        page.click(".row")
        page.wait_for_selector("input[name=name]")
        assert page.input_value("input[name=name]") == name
        assert page.input_value("textarea") == "seen where the agent turns"
        page.context.close()


@pytest.mark.browser
def test_notes_are_exported_and_imported(address, opened, strongest, open_page, tmp_path):
    latent, other = live(opened.library)[1:3]
    opened.notes.write(latent, Note("here"))
    page = open_page(f"{address}#features/{latent}")
    with page.expect_download() as download:
        page.click("text=Export notes")
    exported = tmp_path / "notes.json"
    download.value.save_as(exported)
    document = plain(exported)
    assert document["features"][str(latent)]["name"] == "here"
    document["features"][str(latent)]["name"] = "there"
    document["features"][str(other)] = {"name": "new", "note": ""}
    exported.write_text(json.dumps(document))
    page.set_input_files("input[type=file]", exported)
    page.wait_for_selector("dialog")
    assert {"here", "there"} <= set(page.locator("dialog .text").all_text_contents())
    page.click("[data-choice=both]")
    page.wait_for_selector("text=/2 features taken in/")
    assert opened.notes.read()[latent].name == "here / there"
    assert opened.notes.read()[other].name == "new"
    wait_until(page, "document.querySelector('input[name=name]').value === 'here / there'")


@pytest.mark.browser
def test_two_tabs_do_not_write_over_each_other(address, opened, chromium):
    latent = live(opened.library)[3]
    # A refused save is an error in the console of every browser.
    context = chromium.new_context()
    first, second = (context.new_page() for _ in range(2))
    for page in (first, second):
        page.goto(f"{address}#features/{latent}")
        page.wait_for_selector("input[name=name]")
    for page, name in ((first, "first"), (second, "second")):
        page.fill("input[name=name]", name)
        page.click("text=Save")
        if page is first:
            page.wait_for_selector(".status:has-text('saved')")
    second.wait_for_selector("dialog")
    assert second.locator("dialog .text").all_text_contents() == ["second", "first"]
    assert opened.notes.read()[latent].name == "first"
    second.click("[data-choice=mine]")
    second.wait_for_selector(".status:has-text('saved')")
    assert opened.notes.read()[latent].name == "second"
    context.close()


@pytest.mark.browser
def test_a_double_click_saves_once_and_asks_nothing(address, opened, open_page):
    latent = live(opened.library)[4]
    page = open_page(f"{address}#features/{latent}")
    page.fill("input[name=name]", "twice")
    sent = []
    page.on("request", lambda request: sent.append(request.url) if "/note" in request.url else None)
    page.dblclick("text=Save")
    page.wait_for_selector(".status:has-text('saved')")
    assert len(sent) == 1
    assert opened.notes.read()[latent] == Note("twice", "", 1)
    assert page.locator("dialog").count() == 0


@pytest.mark.browser
def test_what_is_typed_while_a_save_is_on_its_way_stays(address, opened, open_page):
    latent = live(opened.library)[5]
    page = open_page(f"{address}#features/{latent}")
    held = hold(page, "**/note")
    page.fill("input[name=name]", "first")
    page.click("text=Save")
    until(page, lambda: held)
    page.fill("input[name=name]", "first and more")
    assert page.is_disabled("button:text-is('Save')")
    held.pop().continue_()
    page.wait_for_selector(".status:has-text('not saved yet')")
    assert page.input_value("input[name=name]") == "first and more"
    page.click("text=Save")
    until(page, lambda: held)
    # Back to what was there when it was sent, but not to what will be.
    page.fill("input[name=name]", "first")
    held.pop().continue_()
    wait_until(page, "!document.querySelector('.notes button').disabled")
    assert page.input_value("input[name=name]") == "first"
    assert opened.notes.read()[latent] == Note("first and more", "", 2)


@pytest.mark.browser
def test_an_older_steering_answer_is_not_shown(address, strongest, open_page):
    latent, _ = strongest
    page = open_page(f"{address}#features/{latent}")
    wait_until(page, "document.querySelector('.answer')?.textContent.includes('moves by')")
    said = page.text_content(".answer")
    held = hold(page, "**/steer?*")
    for value, key in (("4", "End"), ("-4", "Home")):
        page.focus("input[name=scale]")
        page.keyboard.press(key)
        assert page.input_value("input[name=scale]") == value
        until(page, lambda: held)
    held[0].continue_()
    # The next question leaves when the first answer was dealt with.
    until(page, lambda: len(held) == 2)
    assert page.text_content(".answer") == said
    held[1].continue_()
    wait_until(page, "said => document.querySelector('.answer').textContent !== said", said)


@pytest.mark.browser
def test_a_feature_that_comes_late_does_not_replace_the_chosen_one(address, opened, open_page):
    first, late, chosen = live(opened.library)[:3]
    page = open_page(f"{address}#features/{first}")
    page.wait_for_selector(f"h2:text-is('Feature {first}')")
    held = hold(page, f"**/api/features/{late}")
    page.click(f".row[data-latent='{late}']")
    until(page, lambda: held)
    page.click(f".row[data-latent='{chosen}']")
    page.wait_for_selector(f"h2:text-is('Feature {chosen}')")
    with page.expect_response(f"**/api/features/{late}") as response:
        held[0].continue_()
    response.value.finished()
    # Whatever the answer leads to is done before a later one is read.
    page.evaluate("fetch('/api/session').then((answer) => answer.json())")
    assert page.text_content(".feature-detail h2") == f"Feature {chosen}"


@pytest.mark.browser
def test_a_clip_clicked_before_the_episode_is_there_is_not_forgotten(
    address, opened, strongest, open_page
):
    latent, moment = strongest
    clips = opened.library.detail(latent)["clips"]
    wished = next((each for each in clips[1:] if each["episode"] == moment.episode), clips[1])
    page = open_page(f"{address}#features")
    page.wait_for_selector(".row")
    held = hold(page, "**/timeline?*")
    page.evaluate(f"location.hash = '#features/{latent}'; location.reload()")
    until(page, lambda: held)
    page.focus(".curve")
    page.keyboard.press("End")
    page.click(f".clip:has-text('ep. {wished['episode']}, frame {wished['frame']}')")
    page.wait_for_timeout(0)
    until(page, lambda: len(held) == 1 + (wished["episode"] != moment.episode))
    for route in held:
        route.continue_()
    page.wait_for_selector(f"text=/episode {wished['episode']}, frame {wished['frame']} /")
    assert page.get_attribute(".curve", "aria-valuenow") == str(wished["frame"])


@pytest.mark.browser
def test_a_feature_without_a_training_maximum_can_be_clamped(
    opened, strongest, open_page, monkeypatch
):
    latent, _ = strongest
    rows = opened.library.described.rows
    silent = {"max_activation": None, "mean_activation": None, "main_token_share": None}
    monkeypatch.setitem(rows, latent, {**rows[latent], **silent})
    with serving(create_app(opened.library, None, opened.notes)) as address:
        page = open_page(f"{address}#features/{latent}")
        wait_until(page, "document.querySelector('.answer')?.textContent.includes('moves by')")
        most = float(page.get_attribute("input[name=clamp]", "max") or 0)
        assert most == pytest.approx(2 * opened.library.detail(latent)["top"], rel=0.01)
        assert page.is_hidden(".notice")
        page.context.close()


@pytest.mark.browser
def test_paths_are_drawn_on_no_camera_but_the_boards(opened, strongest, open_page, monkeypatch):
    latent, _ = strongest
    listing = opened.library.listing()
    assert listing["board"]["camera"] == "image"
    listing["board"]["camera"] = "another"
    monkeypatch.setattr(opened.library, "listing", lambda: listing)
    with serving(create_app(opened.library, None, opened.notes)) as address:
        page = open_page(f"{address}#features/{latent}")
        page.wait_for_selector("text=Camera image is not known to show the board")
        page.wait_for_selector(".stage .chart")
        assert page.locator(".stage image").count() == 0
        page.context.close()


@pytest.mark.browser
def test_a_map_is_offered_only_where_there_are_cells(opened, strongest, open_page, monkeypatch):
    latent, _ = strongest
    page_text = "text=show where it fires"
    detail = opened.library.detail(latent)
    others = [{"token": "frame", "value": 1.0}]
    for cameras, n_offers in ((detail["tokens"]["cameras"], 2), ({}, 0)):
        shown = {**detail, "tokens": {"cameras": cameras, "others": others}}
        monkeypatch.setattr(opened.library, "detail", lambda _, shown=shown: shown)
        with serving(create_app(opened.library, None, opened.notes)) as address:
            page = open_page(f"{address}#features/{latent}")
            page.wait_for_selector(".timeline .lane")
            assert page.locator(page_text).count() == n_offers
            assert page.locator("text=its activation in each cell").count() == n_offers // 2
            page.context.close()


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_shows_list_or_feature_and_never_scrolls_sideways(
    dark, address, strongest, open_page
):
    latent, _ = strongest
    page = open_page(f"{address}#features", 390, dark)
    page.wait_for_selector(".row")
    assert not page.is_visible(".feature-detail")
    page.click(f".row[data-latent='{latent}']")
    wait_until(page, "document.querySelector('.answer')?.textContent.includes('moves by')")
    assert not page.is_visible(".feature-list")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.click("text=all features")
    page.wait_for_selector(".row", state="visible")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.browser
def test_four_thousand_features_stay_few_elements(open_page, opened, monkeypatch, tmp_path):
    listing = opened.library.listing()
    n = 4096
    listing["columns"] = {
        name: [values[place % len(values)] for place in range(n)]
        for name, values in listing["columns"].items()
    }
    listing["columns"]["latent"] = list(range(n))
    monkeypatch.setattr(opened.library, "listing", lambda: listing)
    with serving(create_app(opened.library, None, opened.notes)) as address:
        page = open_page(f"{address}#features")
        page.wait_for_selector(".row")
        page.uncheck("text=only live")
        page.select_option("[aria-label='Sort by']", "number")
        assert len(rows(page)) < 60
        page.evaluate("document.querySelector('.rows').scrollTop = 1e9")
        page.wait_for_selector(f".row[data-latent='{n - 1}']")
        assert len(rows(page)) < 60
        page.context.close()


def test_what_is_not_one_token_cannot_be_put_back(opened):
    checkpoint = str(opened.run.run / "checkpoints" / "last.ckpt")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"per": "frame"}, "whole frames"),
        ({"token_sampling": "block_average", "token_ratio": 4}, "blocks"),
    ]
    for settings, named in cases:
        obstacle = steering_obstacle(ActivationDataModule(checkpoint, **settings))
        assert obstacle is not None
        assert named in obstacle
    assert steering_obstacle(ActivationDataModule(checkpoint)) is None


@pytest.mark.browser
def test_the_page_says_why_features_cannot_be_turned(
    address, opened, strongest, open_page, monkeypatch
):
    latent, moment = strongest
    monkeypatch.setattr(opened.library, "obstacle", "it is of whole frames")
    with pytest.raises(ValueError, match="whole frames"):
        opened.library.steer(latent, moment, scale=0.0)
    page = open_page(f"{address}#features/{latent}")
    page.wait_for_selector("text=Cannot be steered: it is of whole frames")
    page.wait_for_selector(".timeline .lane")
    assert page.query_selector("input[name=scale]") is None
