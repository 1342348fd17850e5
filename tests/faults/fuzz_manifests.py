"""Files that this project writes beside its numbers: damaged, forged, or of somebody else."""

import csv
import io
import json
import random
import shutil
import struct
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from fuzzing import ODD_NAMES, Case, Target, mutated_bytes, mutated_json, mutated_json_text
from lerobot_folders import lerobot_policy, write_folder
from pyarrow import parquet

from autoencoders.files import AutoencoderError, load_autoencoder, save_autoencoder
from autoencoders.sae import SparseAutoencoder, build_autoencoder
from browser.notes import Note, NoteBook
from callbacks.report import read_run
from datamodules.activation_store import ActivationShapes, open_or_build
from features.ood import (
    ActiveSetNovelty,
    Calibration,
    MahalanobisNovelty,
    NeighbourNovelty,
    OODDetector,
    ReconstructionNovelty,
    load_detector,
    save_detector,
)
from features.record import FeatureRecord, read_record, write_record
from features.taps import TokenPosition
from policies.act import ACTPolicy
from policies.checkpoint_files import CheckpointError, read_checkpoint
from policies.json_files import parse_json
from policies.lerobot_format import LeRobotFormatError, export_lerobot_act, load_lerobot_act
from policies.lerobot_view import load_lerobot_policy
from policies.normalisation import AffineFeature
from rendering.report.embedding import Encodings, media_of

D_IN, N_LATENTS = 6, 16
ACTIVATION_SHAPES = ActivationShapes((0, 3), (3, 4), (TokenPosition("latent"),), 4, 4)
IDENTITY = {"policy": "a", "layer": "encoder"}
_KEPT = tempfile.TemporaryDirectory()
SECRET = b"a file that no manifest may reach"


@cache
def bases() -> Path:
    """Folders to damage copies of."""
    return write_bases(Path(_KEPT.name))


def write_bases(root: Path) -> Path:
    """Write one folder of each sort, as this project does."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sae = build_autoencoder("batch_topk", d_in=D_IN, n_latents=N_LATENTS, k=2)
        save_autoencoder(sae, root / "sae", {"layer": "encoder"}, torch.rand(N_LATENTS))
        save_detector(_detector(load_autoencoder(root / "sae").sae), root / "ood")
        policy = ACTPolicy(
            {}, 2, 2, environment_state_dim=3, chunk_size=4, n_action_steps=2, dim_model=16,
            n_heads=2, dim_feedforward=24, latent_dim=4, n_encoder_layers=2, n_posterior_layers=1,
        )  # fmt: skip
    for feature in policy.normaliser.modules():
        if isinstance(feature, AffineFeature):
            feature.set(torch.zeros_like(feature.offset), torch.ones_like(feature.scale))
    export_lerobot_act(policy, root / "act")
    with torch.random.fork_rng():
        write_folder(root / "diffusion", *lerobot_policy("diffusion"))
    write_record(root / "record", _record())
    _write_run(root / "run")
    open_or_build(root / "store", ACTIVATION_SHAPES, "float16", IDENTITY, _compute, progress=False)
    (root / "checkpoint").mkdir()
    torch.save(_checkpoint(), root / "checkpoint" / "last.ckpt")
    book = NoteBook(_folder(root / "notes") / "notes.json", "abc", N_LATENTS)
    book.write(3, Note("edge", "of the block"))
    (root / "notes" / "import.json").write_text(json.dumps(book.export()))
    (root / "secret.png").write_bytes(SECRET)
    return root


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def _detector(sae: SparseAutoencoder) -> OODDetector:
    rows = torch.nn.functional.normalize(torch.randn(5, D_IN))
    novelties = (
        ReconstructionNovelty(sae, torch.tensor(2.0)),
        ActiveSetNovelty(sae, torch.full((1, N_LATENTS), 0.25)),
        NeighbourNovelty(rows, torch.tensor(2)),
        MahalanobisNovelty(torch.zeros(D_IN), torch.eye(D_IN)),
    )
    calibration = Calibration(0.1, 2.0, 3.0, 19)
    return OODDetector("encoder", novelties, {each.name: calibration for each in novelties})


def _record() -> FeatureRecord:
    return FeatureRecord(
        frame=torch.tensor([0, 0, 2], dtype=torch.int32),
        token=torch.tensor([0, 1, 0], dtype=torch.int16),
        latent=torch.tensor([1, 5, 1], dtype=torch.int32),
        value=torch.tensor([0.5, 2.0, 1.0]),
        episode_index=torch.tensor([0, 0, 4]),
        frame_index=torch.tensor([0, 1, 0]),
        n_latents=N_LATENTS,
        positions=(TokenPosition("latent"), TokenPosition("top", 0, 1)),
        metadata={"layer": "encoder"},
    )


def _write_run(run: Path) -> None:
    (run / "media").mkdir(parents=True)
    (run / "metrics.csv").write_text("step,train/loss,val/loss\n10,0.5,\n20,0.25,0.375\n")
    (run / "config.yaml").write_text("seed_everything: 0\n")
    (run / "media" / "strip.png").write_bytes(b"picture")
    index = {"20": {"images": {"landscape/strip": "media/strip.png"}, "tables": {}}}
    (run / "media" / "index.json").write_text(json.dumps(index))
    summary = {"status": "finished", "step": 20, "wall_s": 1.5, "checkpoint": "best-step20.ckpt"}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "environment.json").write_text(
        json.dumps({"python": "3.12", "packages": {"torch": "2"}})
    )


def _checkpoint() -> dict[str, Any]:
    return {
        "policyscope": {"checkpoint_format": 1},
        "state_dict": {"weight": torch.arange(32.0)},
        "epoch": 1,
        "global_step": 20,
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {},
        "optimizer_states": [],
        "lr_schedulers": [],
        "hyper_parameters": {"lr": 1e-4, "cameras": {"top": [96, 96]}},
    }


def _compute(frames: range) -> torch.Tensor:
    return torch.full((len(frames), 1, 4), float(frames.start))


# Readers, each of the whole folder in which one file was replaced.


def _read_sae(folder: Path) -> None:
    sae = load_autoencoder(folder).sae
    assert sae(torch.zeros(2, sae.d_in)).isfinite().all()


def _read_ood(folder: Path) -> None:
    detector = load_detector(folder, load_autoencoder(bases() / "sae").sae)
    for novelty in detector.novelties:
        assert all(value.isfinite().all() for value in novelty.tensors().values())


def _read_record(folder: Path) -> None:
    read_record(folder).token_totals()


def _read_act(folder: Path) -> None:
    policy = load_lerobot_act(folder).policy
    assert all(value.isfinite().all() for value in policy.normaliser.state_dict().values())


def _read_diffusion(folder: Path) -> None:
    view = load_lerobot_policy(folder)
    assert view.chunk_size > 0
    assert view.data_schema.action_dim > 0


def _read_run(folder: Path) -> None:
    record = read_run(folder)
    for medium in media_of([record]):
        assert SECRET not in medium.path.read_bytes()
        assert Encodings().size(medium) if medium.kind != "images" else True
    assert record.last_step >= 0


def _read_store(folder: Path) -> None:
    store = open_or_build(folder, ACTIVATION_SHAPES, "float16", IDENTITY, _compute, progress=False)
    expected = torch.cat([_compute(piece) for piece in ACTIVATION_SHAPES.all_pieces])
    assert torch.equal(store.read(range(7)), expected.half())


def _read_checkpoint(folder: Path) -> None:
    read_checkpoint(folder / "last.ckpt")


def _read_notes(folder: Path) -> None:
    NoteBook(folder / "notes.json", "abc", N_LATENTS).read()


def _import_notes(folder: Path) -> None:
    book = NoteBook(folder / "mine.json", "abc", N_LATENTS)
    book.merge(parse_json((folder / "import.json").read_bytes()), "both")
    book.read()


# How each file is damaged: from a generator and what the whole file holds.


def _as_json(rng: random.Random, content: bytes) -> bytes:
    return mutated_json_text(rng, json.loads(content))


def _as_tensors(rng: random.Random, content: bytes) -> bytes:
    if rng.random() < 0.5:
        return mutated_bytes(rng, content)
    (length,) = struct.unpack("<Q", content[:8])
    header = mutated_json_text(rng, json.loads(content[8 : 8 + length]))
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def _as_table(rng: random.Random, content: bytes) -> bytes:
    draw = rng.random()
    if draw < 0.5:
        return mutated_bytes(rng, content)
    table = parquet.read_table(io.BytesIO(content))
    header = table.schema.metadata[b"policyscope"]
    if draw < 0.8:
        header = mutated_json_text(rng, json.loads(header))
    else:
        name = rng.choice(table.column_names)
        odd = rng.choice((None, -1, 2**31 - 1, 7, 1.5, "x", [1]))
        column = pa.array([odd] * len(table))
        table = table.set_column(table.column_names.index(name), name, column)
    written = io.BytesIO()
    parquet.write_table(table.replace_schema_metadata({b"policyscope": header}), written)
    return written.getvalue()


def _as_numbers(rng: random.Random, content: bytes) -> bytes:
    if rng.random() < 0.3:
        return mutated_bytes(rng, content)
    rows = list(csv.reader(io.StringIO(content.decode())))
    for _ in range(rng.randint(1, 3)):
        row = rng.choice(rows)
        odd = rng.choice(("inf", "-inf", "nan", "1e308", "-1", "9" * 400, "x", "", *ODD_NAMES))
        if rng.random() < 0.2:
            row.append(odd)
        else:
            row[rng.randrange(len(row))] = odd
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode("utf-8", "surrogatepass")


def _as_checkpoint(rng: random.Random, content: bytes) -> bytes:
    if rng.random() < 0.5:
        return mutated_bytes(rng, content)
    values = {**_checkpoint(), "state_dict": {}}
    written = io.BytesIO()
    torch.save(mutated_json(rng, values), written)
    return written.getvalue()


READERS: dict[str, tuple[str, Callable[[Path], None], Callable[[random.Random, bytes], bytes]]] = {
    "sae_config": ("sae/cfg.json", _read_sae, _as_json),
    "sae_weights": ("sae/sae_weights.safetensors", _read_sae, _as_tensors),
    "sae_sparsity": ("sae/sparsity.safetensors", _read_sae, _as_tensors),
    "ood_config": ("ood/ood.json", _read_ood, _as_json),
    "ood_weights": ("ood/ood.safetensors", _read_ood, _as_tensors),
    "record_activations": ("record/activations.parquet", _read_record, _as_table),
    "record_frames": ("record/frames.parquet", _read_record, _as_table),
    "act_config": ("act/config.json", _read_act, _as_json),
    "act_weights": ("act/model.safetensors", _read_act, _as_tensors),
    "act_preprocessor": ("act/policy_preprocessor.json", _read_act, _as_json),
    "act_postprocessor": ("act/policy_postprocessor.json", _read_act, _as_json),
    "act_statistics": (
        "act/policy_preprocessor_normalizer.safetensors",
        _read_act,
        _as_tensors,
    ),
    "diffusion_config": ("diffusion/config.json", _read_diffusion, _as_json),
    "diffusion_preprocessor": (
        "diffusion/policy_preprocessor.json",
        _read_diffusion,
        _as_json,
    ),
    "diffusion_postprocessor": (
        "diffusion/policy_postprocessor.json",
        _read_diffusion,
        _as_json,
    ),
    "run_index": ("run/media/index.json", _read_run, _as_json),
    "run_summary": ("run/summary.json", _read_run, _as_json),
    "run_environment": ("run/environment.json", _read_run, _as_json),
    "run_metrics": ("run/metrics.csv", _read_run, _as_numbers),
    "store_manifest": ("store/manifest.json", _read_store, _as_json),
    "store_shard": ("store/shard_00000.safetensors", _read_store, _as_tensors),
    "store_index": ("store/index.safetensors", _read_store, _as_tensors),
    "checkpoint": ("checkpoint/last.ckpt", _read_checkpoint, _as_checkpoint),
    "notes": ("notes/notes.json", _read_notes, _as_json),
    "notes_import": ("notes/import.json", _import_notes, _as_json),
}
"""The file that is replaced, what reads its folder, and how the file is damaged."""


def make_case(rng: random.Random) -> Case:
    """Damage one file."""
    kind = rng.choice(list(READERS))
    file, _, damage = READERS[kind]
    return Case(kind, damage(rng, (bases() / file).read_bytes()))


def use(case: Case, scratch: Path) -> None:
    """Read the folder of the damaged file."""
    file, read, _ = READERS[case.kind]
    folder = scratch / Path(file).parts[0]
    shutil.copytree(bases() / folder.name, folder)
    (scratch / "secret.png").write_bytes(SECRET)
    (scratch / file).write_bytes(case.content)
    try:
        read(folder)
    except ACCEPTED as error:
        # What a page sends has no name.
        if str(folder) not in str(error) and case.kind != "notes_import":
            raise AssertionError(f"names no file: {error}") from error
        raise


ACCEPTED = (AutoencoderError, CheckpointError, LeRobotFormatError, ValueError)
TARGET = Target("manifests", make_case, use, ACCEPTED)
