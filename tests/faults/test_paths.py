"""Row 24: no name in a file leads to a file outside the folder that it belongs to."""

import json
import shutil
from pathlib import Path
from typing import Any

import fuzz_manifests
import pytest

from callbacks.report import read_run, write_report
from policies.lerobot_format import LeRobotFormatError
from policies.loading import load_policy
from policies.safe_paths import inside

pytestmark = pytest.mark.fault(24)
SECRET = "c2VjcmV0IGtle"
"""The beginning of what is outside, as it would stand in a page."""

OUT = [
    "../secret.mp4",
    "media/../../secret.mp4",
    "/etc/hostname",
    "media/link.mp4",
    "linked/secret.mp4",
    "media/loop.mp4",
]
NO_NAMES = ["", ".", "a\0b", "\ud800", "x" * 5000, None, 5, ["a"], {"a": 1}]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a file of its own, and links that lead out of it."""
    run = tmp_path / "run"
    (run / "media").mkdir(parents=True)
    (tmp_path / "secret.mp4").write_bytes(b"secret key")
    (run / "media" / "strip.png").write_bytes(b"picture")
    (run / "media" / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    (run / "media" / "loop.mp4").symlink_to(run / "media" / "loop.mp4")
    (run / "linked").symlink_to(tmp_path)
    (run / "media" / "own.png").symlink_to(run / "media" / "strip.png")
    return run


@pytest.mark.parametrize("name", [*OUT, *NO_NAMES], ids=lambda name: ascii(name)[:24])
def test_what_leads_out_or_is_no_name_is_refused(root: Path, name: Any) -> None:
    class OwnError(ValueError):
        pass

    with pytest.raises(OwnError) as refused:
        inside(root, name, OwnError)
    assert len(str(refused.value)) < 500
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("name", ["media/strip.png", "./media/own.png", "new/file", "a..b", "ü x"])
def test_what_lies_inside_is_found(root: Path, name: str) -> None:
    assert inside(root, name) == root / name


def test_links_may_lead_as_far_as_they_are_told(root: Path) -> None:
    name = "media/link.mp4"
    assert inside(root, name, links_within=root.parent).read_bytes() == b"secret key"
    with pytest.raises(ValueError, match="leads out of"):
        inside(root, "../secret.mp4", links_within=root.parent)


def cached_policy(root: Path, below: str) -> tuple[Path, Path]:
    """A policy folder as the hub's cache holds it, and where its files are."""
    repo = root / "models--somebody--policy"
    (repo / "blobs").mkdir(parents=True)
    folder = repo / "snapshots" / "0123abcd" / below
    folder.mkdir(parents=True)
    for number, file in enumerate(sorted((fuzz_manifests.bases() / "act").iterdir())):
        shutil.copy(file, repo / "blobs" / str(number))
        (folder / file.name).symlink_to(repo / "blobs" / str(number))
    return folder, repo / "blobs"


@pytest.mark.parametrize("below", ["", "pretrained_model", "last/pretrained_model"])
def test_a_policy_of_the_hubs_cache_is_linked_to_its_blobs(below: str, tmp_path: Path) -> None:
    folder, _ = cached_policy(tmp_path, below)
    given = folder.parents[below.count("/")] if below else folder
    assert load_policy(str(given)).source == folder


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "policy_preprocessor.json",
        "policy_postprocessor.json",
        "policy_preprocessor_normalizer.safetensors",
    ],
)
@pytest.mark.parametrize("below", ["", "pretrained_model"])
def test_no_file_of_a_policy_is_a_link_to_one_of_ours(
    name: str, below: str, tmp_path: Path
) -> None:
    folder, _ = cached_policy(tmp_path, below)
    outside = Path(shutil.copy(folder / name, tmp_path / "outside"))
    (folder / name).unlink()
    (folder / name).symlink_to(outside)
    with pytest.raises(LeRobotFormatError, match=r"is a link out of .*trust this folder"):
        load_policy(str(folder))
    plain = shutil.copytree(fuzz_manifests.bases() / "act", tmp_path / "plain")
    (plain / name).unlink()
    (plain / name).symlink_to(outside)
    with pytest.raises(LeRobotFormatError, match=r"is a link out of .*trust this folder"):
        load_policy(str(plain))


@pytest.mark.parametrize("name", ["config.json", "policy_preprocessor.json"])
def test_no_file_of_a_policy_of_lerobots_is_a_link_to_one_of_ours(
    name: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(fuzz_manifests.bases() / "diffusion", tmp_path / "policy")
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / "outside")
    with pytest.raises(LeRobotFormatError, match=r"is a link out of .*trust this folder"):
        load_policy(str(folder))


def run_with(root: Path, name: Any, kind: str) -> Path:
    (root / "metrics.csv").write_text("step,val/loss\n10,0.5\n")
    index = {"10": {kind: {"rollout/film": name}}}
    (root / "media" / "index.json").write_text(json.dumps(index))
    return root


@pytest.mark.parametrize("kind", ["images", "videos", "tables"])
@pytest.mark.parametrize("name", OUT)
def test_a_report_of_a_strangers_run_embeds_no_file_of_ours(
    root: Path, name: str, kind: str, tmp_path: Path
) -> None:
    page = tmp_path / "report" / "index.html"
    page.parent.mkdir()
    page.write_text("the page of before")
    with pytest.raises(ValueError, match=r"run: among its .*rollout/film.*no file of the run"):
        write_report([read_run(run_with(root, name, kind))], page)
    assert page.read_text() == "the page of before"


def test_a_report_embeds_the_runs_own_files(root: Path, tmp_path: Path) -> None:
    (root / "media" / "film.mp4").write_bytes(b"secret key of our own")
    page = write_report(
        [read_run(run_with(root, "media/film.mp4", "videos"))], tmp_path / "index.html"
    )
    assert SECRET in page.html
