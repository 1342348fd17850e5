r"""Make the pictures of README and docs again, from a finished demo run and finished analyses.

python docs/make_pictures.py --run_dir outputs/demo/last --steer_dir outputs/steer \
    --transfer_dir outputs/transfer --aloha_dir outputs/aloha/landscape

Needs a Chromium. Pictures are small on purpose: WebP, at most 1000 px wide.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import which
from typing import Any

import av
import numpy as np
from PIL import Image
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parent.parent
WIDTH_PX = 1000
STRIPS = {
    "landscape/strip": "demo_landscape.webp",
    "attention/strip": "demo_attention.webp",
    "features/strip": "demo_features.webp",
}


def main() -> None:
    """Write all pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run_dir", type=Path, default=ROOT / "outputs/demo/last")
    parser.add_argument("--steer_dir", type=Path, default=ROOT / "outputs/steer")
    parser.add_argument("--transfer_dir", type=Path, default=ROOT / "outputs/transfer")
    parser.add_argument("--aloha_dir", type=Path, default=ROOT / "outputs/aloha/landscape")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "docs/images")
    parser.add_argument("--feature", type=int, help="feature to show in the browser")
    arguments = parser.parse_args()
    home = arguments.output_dir
    home.mkdir(parents=True, exist_ok=True)
    media = json.loads((arguments.run_dir / "media/index.json").read_text())
    newest = media[max(media, key=int)]
    for key, name in STRIPS.items():
        save(home / name, Image.open(arguments.run_dir / newest["images"][key]))
    animate(home / "rollouts.webp", arguments.run_dir / newest["videos"]["rollout/video"])
    film = arguments.steer_dir / "rollouts.mp4"
    if film.is_file():
        animate(home / "steering.webp", film)
    analyses(arguments.transfer_dir, arguments.aloha_dir, home)
    pages(arguments.run_dir, home, arguments.feature)
    for file in sorted(home.iterdir()):
        print(f"{file.stat().st_size / 1024:6.0f} KiB  {file}")


def analyses(transfer: Path, aloha: Path, home: Path) -> None:
    """Write the pictures of analyses that are there."""
    if transfer.is_dir():
        save(home / "transfer.webp", Image.open(transfer / "transfer.png"))
        boards = Image.open(transfer / "landscapes.png")
        # The first instants are enough.
        save(home / "transfer_landscapes.webp", boards.crop((0, 0, boards.width, boards.width)))
    for file in sorted(aloha.glob("*_projection.png")):
        save(home / "aloha_projection.webp", Image.open(file))


def save(path: Path, picture: Image.Image, width_px: int = WIDTH_PX) -> None:
    """Write a picture no wider than asked."""
    picture = picture.convert("RGB")
    if picture.width > width_px:
        height_px = round(picture.height * width_px / picture.width)
        picture = picture.resize((width_px, height_px), Image.Resampling.LANCZOS)
    picture.save(path, quality=88, method=6)


def animate(path: Path, film: Path, width_px: int = 640, every: int = 4, n_most: int = 70) -> None:
    """Write a film as a small animated WebP that loops."""
    frames = []
    with av.open(str(film)) as container:
        fps = float(container.streams.video[0].average_rate or 10)
        for place, frame in enumerate(container.decode(video=0)):
            if place % every == 0 and len(frames) < n_most:
                picture = Image.fromarray(np.asarray(frame.to_ndarray(format="rgb24")))
                if picture.width > width_px:
                    height_px = round(picture.height * width_px / picture.width)
                    picture = picture.resize((width_px, height_px), Image.Resampling.LANCZOS)
                frames.append(picture)
    # Four times as fast as it was filmed.
    frames[0].save(
        path,
        save_all=True,
        append_images=frames[1:],
        duration=max(20, round(1000 / fps)),
        loop=0,
        quality=60,
        method=6,
    )


def pages(run: Path, home: Path, feature: int | None) -> None:
    """Photograph the report, the feature browser and the landscape explorer."""
    with sync_playwright() as playwright, browsing(run) as address:
        browser = playwright.chromium.launch(
            executable_path=which("chromium") or which("google-chrome"), args=["--no-sandbox"]
        )
        report = (run / "report/index.html").resolve().as_uri()
        hash_ = f"#features/{feature}" if feature is not None else "#features"
        for name, url, size, dark in (
            ("report.webp", report, (1280, 1250), False),
            ("report_phone.webp", report, (390, 844), True),
            ("browser.webp", f"{address}{hash_}", (1280, 1250), False),
            ("explorer.webp", f"{address}#landscape", (1280, 900), False),
        ):
            context = browser.new_context(
                viewport={"width": size[0], "height": size[1]},
                color_scheme="dark" if dark else "light",
            )
            page = context.new_page()
            page.goto(url)
            page.wait_for_timeout(4000)
            save(home / name, photograph(page))
            context.close()
        browser.close()


def photograph(page: Page) -> Image.Image:
    """What a page shows now."""
    import io

    return Image.open(io.BytesIO(page.screenshot()))


@contextmanager
def browsing(run: Path) -> Iterator[str]:
    """Serve the browser of a run while the block lasts; gives its address."""
    command = [sys.executable, str(ROOT / "analyze.py"), "browse", "--policy_path", str(run)]
    server: subprocess.Popen[Any] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        line = next(line for line in server.stdout if line.startswith("http"))
        yield line.split()[0].rstrip("/") + "/"
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
