"""A small policy of PushT, an autoencoder of it, and the page that shows both."""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pusht_runs import SIZE, act, data, trainer, write_pusht

import analyze
from autoencoders.files import AUTOENCODER_FOLDER, save_autoencoder
from autoencoders.fit import fit_autoencoder
from autoencoders.sae import build_autoencoder
from browser.features import FeatureLibrary
from browser.notes import NoteBook
from commands import browse
from datamodules.activations import ActivationDataModule

N_LATENTS, K = 24, 3
QUICK = ("--n_permutations", "9", "--n_effect_frames", "40", "--n_behaviour_frames", "8")


@dataclass(frozen=True)
class TinyRun:
    """What a page needs, as files."""

    run: Path
    """A run folder with ``checkpoints/last.ckpt`` and ``autoencoder/``."""
    data: Path
    home: Path
    """Where the page keeps descriptions and notes."""

    def words(self, *more: str) -> list[str]:
        """A command line."""
        return [
            *("browse", "--policy_path", str(self.run), "--device", "cpu"),
            *("--output_dir", str(self.home), *QUICK, *more),
        ]


def make_run(folder: Path) -> TinyRun:
    """Train a policy for two steps, and an autoencoder of its tokens."""
    demonstrations = write_pusht(folder / "demos.hdf5", SIZE)
    datamodule = data(demonstrations)
    fit = trainer(folder / "run", steps=2)
    fit.fit(act(datamodule), datamodule)
    checkpoint = folder / "run" / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    fit.save_checkpoint(checkpoint)
    make_autoencoder(checkpoint, folder / "run" / AUTOENCODER_FOLDER)
    return TinyRun(folder / "run", demonstrations, folder / "home")


def make_autoencoder(checkpoint: Path, folder: Path, seed: int = 0, **settings: Any) -> Path:
    activations = ActivationDataModule(
        str(checkpoint), storage="stream", progress=False, buffer_mb=8, **settings
    )
    activations.setup()
    torch.manual_seed(seed)
    sae = build_autoencoder("batch_topk", d_in=activations.d_in, n_latents=N_LATENTS, k=K)
    fit_autoencoder(sae, activations.sample(1000, "train"), 30, 32)
    sae.calibrate(activations.vectors("calibration"))
    return save_autoencoder(sae, folder, activations.provenance)


def arguments(words: list[str]) -> argparse.Namespace:
    return analyze.build_parser("browse").parse_args(words)


def session(run: TinyRun, clips: Path, *more: str) -> browse.Session:
    return browse.open_session(arguments(run.words(*more)), clips)


def parts(opened: browse.Session) -> tuple[FeatureLibrary, NoteBook]:
    assert opened.library is not None
    assert opened.notes is not None
    return opened.library, opened.notes


def live(library: FeatureLibrary) -> list[int]:
    """Features that fire in held-out frames, the strongest ablation first."""
    rows = library.described.rows
    fires = [each for each in rows if (rows[each]["frame_density_held_out"] or 0) > 0]
    return sorted(fires, key=lambda each: -(rows[each].get("ablated_px") or 0))


def plain(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def wait_until(page: Any, expression: str, argument: Any = None) -> None:
    """Wait for a condition in a page whose policy forbids Playwright's own way, ``eval``."""
    patience = time.monotonic() + 20
    while not page.evaluate(expression, argument):
        assert time.monotonic() < patience, f"never true: {expression}"
        page.wait_for_timeout(20)
