"""How long the report of a long run takes to open: 20 checkpoints, hundreds of numbers.

    python -m benchmarks.report_opening

Builds a run with media of the demo's sizes (three strips of 640 to 1324 px and three videos of
0.1 to 0.9 MB a checkpoint) and 400 numbers, half of them logged 800 times, writes its page under
the default budget and under one that nothing is left out of, and opens both in headless Chromium
at 1400 x 900 px: from the start of navigation to the load event, to the first picture with its
pixels decoded in a drawn frame, and to the first video that could play; then the arrow key, until
pictures of the other checkpoint are decoded and drawn. A fresh browser context for each round, the
file in the system's cache, medians over rounds. Writing is timed twice: the first page of the run,
and one more with its pictures already encoded, as at the next validation of a running training.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from shutil import which
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from playwright.sync_api import Browser, sync_playwright

from rendering.report.embedding import Encodings
from rendering.report.page import MAX_SIZE_MIB, MIB, Page, report_page
from rendering.report.records import RunRecord
from rendering.video import Clip, write_clips

TARGET_MS = 2000.0
N_CHECKPOINTS = 20
N_ROWS = 800
N_NUMBERS = 400
STRIPS_PX = {"landscape": (640, 1024), "attention": (1060, 1320), "features": (708, 1324)}
"""Width and height, as the demo draws them."""
VIDEOS = {
    "rollout/video": ("rollouts.mp4", (616, 864), 300),
    "landscape/video": ("landscapes.mp4", (360, 1010), 93),
    "attention/video_image": ("attention.mp4", (322, 488), 93),
}
"""File, height and width, frames."""

WATCH = """
window.opening = {};
const note = name => requestAnimationFrame(() => { window.opening[name] ??= performance.now(); });
const look = () => {
  const image = document.querySelector('img[src^=blob]');
  if (image?.complete && image.naturalWidth) note('picture');
  const video = document.querySelector('video[src^=blob]');
  if (video?.readyState >= 2) note('video');
  if (!window.opening.picture || !window.opening.video) requestAnimationFrame(look);
};
requestAnimationFrame(look);
"""

ANSWER = """async () => {
  const slider = document.getElementById('slider');
  const images = [...document.querySelectorAll('img[src^=blob]')];
  const before = images.map(image => image.src);
  const began = performance.now();
  slider.value = Number(slider.value) - 1;
  slider.dispatchEvent(new Event('input'));
  await Promise.all(images.map(image => image.decode()));
  await new Promise(requestAnimationFrame);
  if (images.some((image, i) => image.src === before[i])) throw new Error('a picture stayed');
  return performance.now() - began;
}"""


def strip(size_px: tuple[int, int], seed: int) -> Image.Image:
    """Draw a strip like those of the diagnostics: coloured cells, outlines and words."""
    rng = np.random.default_rng(seed)
    width, height = size_px
    picture = Image.new("RGB", size_px, "white")
    draw = ImageDraw.Draw(picture)
    for top in range(0, height - 160, 166):
        draw.text((4, top), f"row {top} of checkpoint {seed}", fill="black")
        for left in range(0, width - 150, 164):
            cells = rng.integers(0, 256, (24, 24, 3), np.uint8).repeat(6, 0).repeat(6, 1)
            picture.paste(Image.fromarray(cells), (left, top + 14))
            x, y = rng.integers(10, 90, 2)
            corners = [left + x, top + 14 + y, left + x + 40, top + 54 + y]
            draw.ellipse([int(corner) for corner in corners], outline="red")
    return picture


def film(path: Path, size_px: tuple[int, int], n_frames: int) -> bytes:
    """Encode a video with as many moving things as one of the demo's."""
    rng = np.random.default_rng(0)
    height, width = size_px
    y, x = np.mgrid[:height, :width]
    starts = rng.integers(0, width, (24, 2))
    speeds = rng.integers(-6, 7, (24, 2))
    frames = []
    for frame in range(n_frames):
        picture = np.full((height, width, 3), 255, np.uint8)
        for start, speed, colour in zip(starts, speeds, rng.permutation(24), strict=True):
            place = (start + frame * speed) % (width, width)
            near = (abs(x - place[0]) < 16) & (abs(y - place[1] % height) < 16)
            picture[near] = (10 * colour, 255 - 10 * colour, 90)
        frames.append(picture)
    write_clips(path, [Clip(frames, [""] * n_frames)], fps=10)
    return path.read_bytes()


def long_run(folder: Path) -> RunRecord:
    """Build the run."""
    steps = [1000 * n for n in range(1, N_CHECKPOINTS + 1)]
    rng = np.random.default_rng(0)

    def row(step: int, section: str) -> dict[str, float]:
        values = rng.normal(1.0, 0.1, N_NUMBERS // 2).tolist()
        return {"step": step, **{f"{section}/number_{n}": v for n, v in enumerate(values)}}

    rows = [row(n * steps[-1] // N_ROWS, "train") for n in range(1, N_ROWS + 1)]
    rows += [row(step, "val") for step in steps]
    folder.mkdir()
    films = {key: film(folder / name, size, n) for key, (name, size, n) in VIDEOS.items()}
    media: dict[int, dict[str, dict[str, str]]] = {}
    for step in steps:
        at = Path("media") / f"step_{step:06d}"
        (folder / at).mkdir(parents=True)
        media[step] = {"images": {}, "videos": {}, "tables": {}}
        for name, size_px in STRIPS_PX.items():
            strip(size_px, step).save(folder / at / f"{name}.png")
            media[step]["images"][f"{name}/strip"] = str(at / f"{name}.png")
        for key, (name, _, _) in VIDEOS.items():
            # A box that players pass over makes every file one of its own.
            mark = step.to_bytes(8, "big")
            (folder / at / name).write_bytes(films[key] + b"\x00\x00\x00\\x10free" + mark)
            media[step]["videos"][key] = str(at / name)
    return RunRecord("bench/long", folder, "finished", rows, media, 12_000, 3600.0, "a: 1\n", {})


def opening(browser: Browser, address: str) -> dict[str, float]:
    """Open a page once and move its slider once; ms."""
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    context.add_init_script(WATCH)
    page = context.new_page()
    page.goto(address, wait_until="load")
    page.locator("[data-section=landscape]").scroll_into_view_if_needed()
    while not page.evaluate("window.opening.picture && window.opening.video"):
        page.wait_for_timeout(5)
    times: dict[str, float] = page.evaluate("window.opening")
    times["load"] = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
    times["slider"] = page.evaluate(ANSWER)
    context.close()
    return {f"{name}_ms": value for name, value in times.items()}


def timed[Result](make: Callable[[], Result]) -> tuple[Result, float]:
    """Return what ``make`` returns, and its wall time in s."""
    began = time.perf_counter()
    made = make()
    return made, time.perf_counter() - began


def measure(browser: Browser, record: RunRecord, max_size_mib: float, n_rounds: int) -> dict:
    """Write the page under one budget and open it in every round."""
    encodings = Encodings()

    def make() -> Page:
        return report_page([record], record.folder, max_size_mib, encodings)

    page, first_s = timed(make)
    _, again_s = timed(make)
    file = record.folder / f"report_{max_size_mib:g}.html"
    page.write(file)
    rounds = [opening(browser, file.as_uri()) for _ in range(n_rounds)]
    return {
        "max_size_mib": max_size_mib,
        "size_mib": round(page.size_bytes / MIB, 2),
        "n_left_out": len(page.left_out),
        "write_first_s": round(first_s, 2),
        "write_again_s": round(again_s, 2),
    } | {
        name: {
            "median": round(statistics.median(times[name] for times in rounds), 1),
            "max": round(max(times[name] for times in rounds), 1),
        }
        for name in rounds[0]
    }


def main() -> None:
    """Measure, print and, when asked to, write the result."""
    parser = argparse.ArgumentParser(description="Time the opening of a long run's report.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    chromium = which("chromium") or which("google-chrome")
    if chromium is None:
        raise SystemExit("no Chromium on this machine: install one to open pages with")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        record = long_run(Path(folder) / "run")
        options = ["--no-sandbox", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=chromium, args=options)
        cases = [
            measure(browser, record, size_mib, arguments.rounds) for size_mib in (MAX_SIZE_MIB, 96)
        ]
        version = browser.version
        browser.close()
    result: dict[str, Any] = {
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "chromium": version,
        "n_checkpoints": N_CHECKPOINTS,
        "n_numbers": N_NUMBERS,
        "n_rounds": arguments.rounds,
        "target_ms": TARGET_MS,
        "cases": cases,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
