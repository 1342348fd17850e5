"""The landscape tab in a real browser: what a hand does, and what it sees."""

import re
import time
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect
from tiny_browser import make_run, parts, session
from tiny_explorer import tiny_explorer

from browser.server import create_app, serving

pytestmark = pytest.mark.browser
POSE_LABELS = ("Agent x, px", "Agent y, px", "T x, px", "T y, px", "T angle, °")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    explorer = tiny_explorer(tmp_path_factory.mktemp("page"), n_policies=2)
    with serving(create_app(None, explorer, None)) as address:
        yield address
    explorer.close()


def answered(page: Page, text: str | re.Pattern = "As recorded.") -> None:
    """Wait for the answer that says so."""
    expect(page.locator(".pose-notes")).to_contain_text(text)


def chooser(page: Page, name: str) -> Locator:
    return page.get_by_role("combobox", name=name, exact=True)


def number(page: Page, label: str) -> Locator:
    return page.get_by_label(label, exact=True)


def pose(page: Page) -> list[float]:
    return [float(number(page, label).input_value()) for label in POSE_LABELS]


def heat(page: Page) -> str:
    return page.locator(".policy .board image").first.get_attribute("href") or ""


def drag(page: Page, handle: Locator, dx: float, dy: float) -> None:
    handle.scroll_into_view_if_needed()
    box = handle.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + dx / 2, y + dy / 2)
    page.mouse.move(x + dx, y + dy)
    page.mouse.up()


def scale(page: Page) -> float:
    """Px of the board per px of the screen."""
    box = page.locator(".scene .board").bounding_box()
    assert box is not None
    return 512 / box["width"]


def test_dragging_the_agent_moves_it_and_changes_the_landscape(open_page, address):
    page = open_page(f"{address}#landscape?episode=2&frame=5")
    answered(page)
    before, landscape = pose(page), heat(page)
    seen = page.locator(".camera").first.get_attribute("src")
    agent = page.get_by_role("application", name="The agent").first
    drag(page, agent.locator(".grip"), 40, -60)
    answered(page, "Moved")
    after = pose(page)
    assert after[0] - before[0] == pytest.approx(40 * scale(page), abs=1)
    assert after[1] - before[1] == pytest.approx(-60 * scale(page), abs=1)
    assert after[2:] == before[2:]
    assert heat(page) != landscape
    assert page.locator(".camera").first.get_attribute("src") != seen
    page.get_by_role("button", name="Reset to recorded frame").click()
    answered(page)
    assert pose(page) == before
    assert heat(page) == landscape


def test_dragging_the_t_moves_it_and_its_ring_turns_it(open_page, address):
    page = open_page(f"{address}#landscape?episode=0&frame=3")
    answered(page)
    before = pose(page)
    block = page.get_by_role("application", name="The T").first
    # The middle of its outline's box is not the T itself: take hold of the bar.
    outline = block.locator("polygon.grip")
    outline.dispatch_event("focus")
    x, y = page.locator(".scene .board").evaluate(
        """(board, [px, py]) => {
          const at = new DOMPoint(px, py).matrixTransform(board.getScreenCTM());
          return [at.x, at.y];
        }""",
        before[2:4],
    )
    page.mouse.move(x - 2, y + 8)
    page.mouse.down()
    page.mouse.move(x - 32, y + 18)
    page.mouse.up()
    answered(page, "Moved")
    moved = pose(page)
    assert moved[2] - before[2] == pytest.approx(-30 * scale(page), abs=1)
    assert moved[3] - before[3] == pytest.approx(10 * scale(page), abs=1)
    assert moved[:2] == before[:2]
    assert moved[4] == before[4]
    landscape = heat(page)
    drag(page, block.locator(".turn .grip"), 25, 0)
    expect(number(page, "T angle, °")).not_to_have_value(str(moved[4]))
    expect(page.locator(".policy .board image").first).not_to_have_attribute("href", landscape)
    assert pose(page)[:4] == moved[:4]


def test_keys_and_numbers_and_the_wheel_move_things_too(open_page, address):
    page = open_page(f"{address}#landscape?episode=1&frame=2")
    answered(page)
    before = pose(page)
    agent = page.get_by_role("application", name="The agent").first
    agent.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+ArrowUp")
    answered(page, "Moved")
    expect(number(page, "Agent x, px")).to_have_value(f"{before[0] + 4:g}")
    assert pose(page)[1] == pytest.approx(before[1] - 1, abs=0.11)
    page.get_by_role("application", name="The T").first.focus()
    page.keyboard.press("e")
    expect(number(page, "T angle, °")).to_have_value(f"{before[4] + 5:g}")
    number(page, "T x, px").fill("300")
    number(page, "T x, px").press("Enter")
    expect(page).to_have_url(re.compile(r"pose=[\d.]+%2C[\d.]+%2C300%2C"))
    page.locator(".scene .turn .grip").hover()
    page.mouse.wheel(0, 100)
    expect(number(page, "T angle, °")).to_have_value(f"{before[4] + 10:g}")


def test_a_pose_beyond_the_board_comes_back_and_is_said_to(open_page, address):
    page = open_page(f"{address}#landscape?episode=1&frame=2")
    answered(page)
    number(page, "Agent x, px").fill("900")
    number(page, "Agent x, px").press("Tab")
    answered(page, "Brought the agent back")
    expect(number(page, "Agent x, px")).to_have_value("512")


def test_the_address_brings_the_same_view_back(open_page, address):
    page = open_page(f"{address}#landscape")
    answered(page)
    chooser(page, "Episode").select_option("4")
    page.get_by_label("Frame", exact=True).fill("6")
    chooser(page, "Landscape").select_option("energy")
    chooser(page, "Attention").select_option("relevancy")
    number(page, "Agent y, px").fill("77")
    number(page, "Agent y, px").press("Tab")
    answered(page, "Moved")
    expect(page).to_have_url(re.compile("episode=4&frame=6.*energy.*relevancy.*pose="))
    landscape = heat(page)
    page.reload()
    answered(page, "Moved")
    assert heat(page) == landscape
    assert pose(page)[1] == 77
    expect(chooser(page, "Landscape")).to_have_value("energy")


def test_frames_can_be_stepped_through_and_played(open_page, address):
    page = open_page(f"{address}#landscape?episode=1&frame=0")
    answered(page)
    page.get_by_role("button", name="Next frame").click()
    expect(page.get_by_role("heading", name="Scene, episode 1, frame 1")).to_be_visible()
    page.get_by_role("button", name="Play").click()
    expect(page.get_by_role("heading", name="Scene, episode 1, frame 8")).to_be_visible()
    # It stops at the end.
    expect(page.get_by_role("button", name="Play")).to_have_text("Play")
    page.get_by_role("button", name="Previous frame").click()
    expect(page.get_by_role("heading", name="Scene, episode 1, frame 7")).to_be_visible()


def test_slow_methods_wait_to_be_asked_and_say_nothing_of_the_next_pose(open_page, address):
    page = open_page(f"{address}#landscape?episode=2&frame=5&attention=occlusion")
    answered(page)
    expect(page.locator(".shares li")).to_have_count(0)
    page.get_by_role("button", name="Explain this pose").click()
    expect(page.locator(".shares li")).to_have_count(2)
    page.get_by_role("application", name="The agent").first.focus()
    page.keyboard.press("ArrowLeft")
    answered(page, "Moved")
    expect(page.locator(".shares li")).to_have_count(0)


def test_what_was_explained_stays_when_it_is_only_drawn_otherwise(open_page, address):
    page = open_page(f"{address}#landscape?episode=2&frame=5&attention=occlusion")
    answered(page)
    page.get_by_role("button", name="Explain this pose").click()
    expect(page.locator(".shares li")).to_have_count(2)
    expect(page.locator(".policy .board .region").first).to_be_attached()
    page.get_by_label("Regions", exact=True).uncheck()
    expect(page.locator(".policy .board .region")).to_have_count(0)
    expect(page.locator(".shares li")).to_have_count(2)


def test_an_answer_to_an_older_question_is_not_shown(open_page, address):
    page = open_page(f"{address}#landscape?episode=1&frame=2")
    answered(page)
    before = heat(page)
    held = []
    page.route("**/api/explorer/answer", lambda route: held.append(route))
    page.get_by_role("button", name="Next frame").click()
    page.get_by_role("button", name="Next frame").click()
    waited_for(page, held, 1)
    held[0].continue_()
    # The next question leaves when the first answer was dealt with.
    waited_for(page, held, 2)
    assert heat(page) == before
    held[1].continue_()
    expect(page.locator(".policy .board image").first).not_to_have_attribute("href", before)


def waited_for(page: Page, held: list, n: int) -> None:
    patience = time.monotonic() + 20
    while len(held) < n:
        assert time.monotonic() < patience
        page.wait_for_timeout(20)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Features and landscapes in one page."""
    folder = tmp_path_factory.mktemp("both")
    library, notes = parts(session(make_run(folder), folder / "clips"))
    explorer = tiny_explorer(folder)
    with serving(create_app(library, explorer, notes)) as address:
        yield address
    explorer.close()


def test_a_moved_pose_is_still_there_after_a_look_at_features(open_page, both):
    page = open_page(f"{both}#landscape?episode=2&frame=5")
    answered(page)
    number(page, "Agent x, px").fill("123")
    number(page, "Agent x, px").press("Tab")
    expect(page).to_have_url(re.compile("pose=123"))
    page.get_by_role("tab", name="Features").click()
    expect(page.locator(".feature-detail h2")).to_be_visible()
    page.get_by_role("tab", name="Landscape").click()
    expect(page).to_have_url(re.compile("#landscape.*pose=123"))
    answered(page, "Moved")
    expect(number(page, "Agent x, px")).to_have_value("123")


def test_back_leads_to_features_and_stays_there(open_page, both):
    page = open_page(both)
    expect(page.locator(".feature-detail h2")).to_be_visible()
    page.get_by_role("tab", name="Landscape").click()
    answered(page)
    number(page, "Agent x, px").fill("123")
    number(page, "Agent x, px").press("Tab")
    page.go_back()
    expect(page.get_by_role("tab", name="Features")).to_have_attribute("aria-selected", "true")
    # Longer than the address of the landscape waits before it is written.
    page.wait_for_timeout(600)
    assert "landscape" not in page.url


def test_two_policies_answer_the_same_pose_side_by_side(open_page, address):
    page = open_page(f"{address}#landscape?episode=2&frame=5")
    answered(page)
    chooser(page, "Compare with").select_option(label="two")
    expect(page.get_by_role("heading", name=re.compile("^two · Likelihood"))).to_be_visible()
    boards = page.locator(".policy .board image")
    expect(boards).to_have_count(2)
    # The same weights under two names.
    assert boards.nth(0).get_attribute("href") == boards.nth(1).get_attribute("href")
    chooser(page, "Policy").select_option(label="two")
    expect(page.locator(".policy")).to_have_count(1)


def test_methods_that_the_policy_cannot_answer_are_disabled_with_the_reason(open_page, address):
    page = open_page(f"{address}#landscape")
    answered(page)
    expect(chooser(page, "Landscape").locator("option[value=noise_pred]")).to_be_disabled()
    page.get_by_text("Why some methods are not available").click()
    expect(page.locator(".why")).to_contain_text("predicts no noise")
    chooser(page, "Landscape").select_option("expert_mode")
    number(page, "Agent x, px").fill("100")
    number(page, "Agent x, px").press("Tab")
    expect(page.locator(".policy .reason").first).to_contain_text("a moved pose has none")


def test_an_empty_number_moves_nothing(open_page, address):
    page = open_page(f"{address}#landscape?episode=2&frame=5")
    answered(page)
    number(page, "Agent x, px").fill("")
    number(page, "Agent x, px").press("Tab")
    answered(page)
    assert page.locator(".notice").is_hidden()


def test_data_without_states_say_why_nothing_can_be_moved(open_page, tmp_path: Path):
    explorer = tiny_explorer(tmp_path, states=False)
    with serving(create_app(None, explorer, None)) as address:
        page = open_page(f"{address}#landscape")
        answered(page, "nothing can be moved")
        expect(page.locator(".why")).to_contain_text("the data hold no states of the simulator")
        expect(page.get_by_role("application")).to_have_count(0)
        expect(number(page, "Agent x, px")).to_be_hidden()
        assert heat(page).startswith("data:image/png")
        page.get_by_role("button", name="Next frame").click()
        expect(page.get_by_role("heading", name=re.compile("frame 5"))).to_be_visible()
    explorer.close()


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone(open_page, address, dark: bool):
    page = open_page(f"{address}#landscape?episode=2&frame=5&with=two", 390, dark)
    answered(page)
    expect(page.locator(".policy")).to_have_count(2)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
