"""Settings of every test: no hub, one thread a process, shapes checked, examples untimed."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
# Without bytecode on the disk, each process of the suite compiles torch and all the rest again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import hypothesis
import pytest
import torch
from jaxtyping import install_import_hook

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

sys.dont_write_bytecode = False  # here too, whatever this process was told
# Under nohup, or behind an &, signals are ignored, here and in what tests start.
for number, action in (
    (signal.SIGHUP, signal.SIG_DFL),
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGTERM, signal.SIG_DFL),
):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, action)

# A machine that is busy with other work is no error.
hypothesis.settings.register_profile("policyscope", deadline=None)
hypothesis.settings.load_profile("policyscope")

# Two threads on two shared cores wait for each other longer than one works alone.
torch.set_num_threads(1)

# In tests every signature's shapes are checked at every call; at run time they cost nothing.
# Not in policies.interface, whose observations tests also build wrongly, on purpose.
_CHECKED = (
    "policies.act",
    "policies.backbones",
    "policies.ensembling",
    "landscapes",
    "attention",
    "autoencoders",
    "features",
    "policies.tokens",
    "datamodules",
    "envs",
    "rendering",
    "lightning_modules",
    "browser",
)
# An int is a float, as everywhere in Python (PEP 484).
_CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
install_import_hook(_CHECKED, _CHECKER).__enter__()

OpenPage = Callable[..., "Page"]


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Share folders of tests among workers; files and tests that are named start quicker alone."""
    named = [Path(argument.partition("::")[0]) for argument in config.args]
    return 0 if all(path.is_file() for path in named) else None


@pytest.fixture(autouse=True)
def _every_test_leaves_the_working_directory() -> Iterator[None]:
    # Else the tests that this worker runs next meet another test's files, or none at all.
    before = Path.cwd()
    yield
    assert Path.cwd() == before


@pytest.fixture
def without_wandb_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be nobody to W&B, with none of its settings in the environment."""
    for name in ("API_KEY", "BASE_URL", "CACHE_DIR", "DATA_DIR", "DIR", "MODE", "SILENT"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))


@pytest.fixture(scope="session")
def chromium() -> Iterator["Browser"]:
    """A headless Chromium; tests that need one are skipped where there is none.

    POLICYSCOPE_REQUIRE_BROWSER=1 makes its absence a failure.
    """
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        if os.environ.get("POLICYSCOPE_REQUIRE_BROWSER") == "1":
            pytest.fail("no Chromium on this machine")
        pytest.skip("no Chromium on this machine")
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=found, args=options)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: "Browser") -> Iterator[OpenPage]:
    """Opens pages; the test fails if one of them writes an error to its console."""
    problems: list[str] = []
    contexts = []

    def open_page(url: str, width_px: int = 1400, dark: bool = False) -> "Page":
        context = chromium.new_context(
            viewport={"width": width_px, "height": 900},
            color_scheme="dark" if dark else "light",
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: problems.append(f"{url}: {error}"))
        page.on(
            "console",
            lambda message: (
                problems.append(f"{url}: {message.text}")
                if message.type in ("error", "warning")
                else None
            ),
        )
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not problems


@pytest.fixture(scope="session")
def graphics() -> None:
    """MuJoCo draws; tests that need it are skipped where it cannot.

    POLICYSCOPE_REQUIRE_GL=1 makes that a failure.
    """
    from envs.aloha import AlohaTransferCube

    env = AlohaTransferCube(image_size=(16, 16))
    try:
        env.observe()
    except ValueError as error:
        if os.environ.get("POLICYSCOPE_REQUIRE_GL") == "1":
            pytest.fail(str(error))
        pytest.skip(str(error))
    finally:
        env.close()
