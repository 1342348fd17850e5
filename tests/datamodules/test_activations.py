"""From a policy and its data to batches of vectors: every one once, in an order that can resume."""

import itertools
from functools import cache
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningModule, Trainer
from recordings import write_demos

from callbacks.exact_resume import ExactResume
from datamodules.activations import SPLITS, ActivationDataModule, policy_hash
from datamodules.hdf5 import HDF5DataModule
from datamodules.shuffle_buffer import VectorSampler
from features.taps import TokenPosition, read_activations
from policies.act import ACTPolicy
from policies.checkpoint_files import CHECKPOINT_FORMAT, MARK_KEY
from policies.loading import load_policy
from policies.normalisation import AffineFeature

LENGTHS = (17, 9, 21, 14, 8, 16, 12, 19, 10, 15)
N_TOKENS, DIM = 6, 8
"""Latent, state and 2 x 2 cells of 4 px in pictures of 6 x 8 px."""
ARGUMENTS = {
    "cameras": {"image": [6, 8]},
    "state_dim": 2,
    "action_dim": 2,
    "chunk_size": 3,
    "latent_dim": 2,
    "dim_model": DIM,
    "n_heads": 2,
    "dim_feedforward": 8,
    "n_encoder_layers": 1,
    "n_posterior_layers": 1,
    "backbone": "small_cnn",
    "backbone_width": 8,
    "token_stride": 4,
}


def made(seed: int = 0, **changes) -> ACTPolicy:
    """An untrained policy for the pictures and states of ``write_demos``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        policy = ACTPolicy(**{**ARGUMENTS, **changes}).eval()
    for feature in policy.normaliser.modules():
        if isinstance(feature, AffineFeature):
            feature.set(torch.full_like(feature.offset, 0.5), torch.full_like(feature.scale, 0.5))
    return policy


def save_policy(path: Path, data: Path | None, seed: int = 0, val_fraction=0.5, **changes) -> Path:
    """A checkpoint as a run on ``data`` leaves it; one that names no data when None."""
    policy = made(seed, **changes)
    checkpoint = {
        MARK_KEY: {"checkpoint_format": CHECKPOINT_FORMAT},
        "hyper_parameters": {"kl_weight": 1.0, **policy.hyper_parameters},
        "state_dict": {f"policy.{name}": value for name, value in policy.state_dict().items()},
    }
    if data is not None:
        run = HDF5DataModule(
            str(data), chunk_size=3, val_fraction=val_fraction, seed=5, progress=False
        )
        run.setup()
        checkpoint["HDF5DataModule"] = run.state_dict()
    torch.save(checkpoint, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("activations")
    save_policy(folder / "policy.ckpt", write_demos(folder / "demos.hdf5", LENGTHS))
    return folder


def module(folder: Path, **arguments) -> ActivationDataModule:
    settings = {
        "policy_path": str(folder / "policy.ckpt"),
        "batch_size": 32,
        "frames_per_batch": 6,
        "cache_dir": str(folder / "cache"),
        "device": "cpu",
        "progress": False,
    }
    return ActivationDataModule(**{**settings, **arguments})


def ready(folder: Path, **arguments) -> ActivationDataModule:
    made = module(folder, **arguments)
    made.setup()
    return made


@cache
def shared(folder: Path, **arguments) -> ActivationDataModule:
    """A data module for tests that only look at it."""
    return ready(folder, **arguments)


def epoch(data: ActivationDataModule, number: int = 0) -> list[torch.Tensor]:
    loader = data.train_dataloader()
    loader.batch_sampler.set_epoch(number)
    return list(loader)


def rows(vectors: torch.Tensor) -> list[tuple[float, ...]]:
    return sorted(map(tuple, vectors.tolist()))


def by_hand(data: ActivationDataModule, episodes, dtype=torch.float16) -> torch.Tensor:
    """Activations of whole episodes, each in one batch: (frame, token, dim)."""
    found = []
    for number in episodes:
        observation = data.demonstrations.episode(number).observation
        found.append(read_activations(data.policy, observation, data.layer))
    return torch.cat(found).to(dtype).float()


SMALL_MB = 0.0035
"""Memory for 152 vectors of 16 + 8 bytes; the 66 training frames have 396."""


@pytest.mark.parametrize("storage", ["disk", "stream"])
@pytest.mark.parametrize("buffer_mb", [SMALL_MB, 64])
@pytest.mark.parametrize("layer", ["encoder", "decoder"])
def test_vectors_are_the_policys_activations_in_order_of_time(folder, storage, buffer_mb, layer):
    data = shared(folder, storage=storage, buffer_mb=buffer_mb, layer=layer)
    for split in SPLITS:
        expected = by_hand(data, data.split[split])
        batches = list(data.vectors(split, batch_size=50))
        assert {len(batch) for batch in batches[:-1]} <= {50}
        torch.testing.assert_close(torch.cat(batches), expected.flatten(0, 1), rtol=2e-3, atol=2e-3)
    held_out = torch.cat(list(data.val_dataloader()))
    assert torch.equal(held_out, torch.cat(list(data.vectors("val", 7))))


def test_dimensions_are_known_before_anything_is_read(folder):
    data = module(folder)
    assert data.d_in == DIM
    assert [position.name for position in data.tap.positions] == ["latent", "state", *["image"] * 4]
    assert module(folder, per="frame").d_in == N_TOKENS * DIM
    # Latent, state and one block of 2 x 2 cells
    blocks = {"token_sampling": "block_average", "token_ratio": 4}
    assert module(folder, per="frame", **blocks).d_in == 3 * DIM
    assert module(folder, **blocks).tokens.positions[2] == TokenPosition("image", 0, 0)
    with pytest.raises(RuntimeError, match="setup"):
        module(folder).sample(3)


def test_a_frame_as_one_vector_has_its_tokens_one_behind_the_other(folder):
    tokens = shared(folder)
    whole = shared(folder, per="frame")
    expected = torch.cat(list(tokens.vectors("train"))).view(-1, N_TOKENS * DIM)
    assert torch.equal(torch.cat(list(whole.vectors("train"))), expected)
    assert rows(torch.cat(epoch(whole))) == rows(expected)


def test_blocks_of_cells_are_averaged_before_rounding(folder):
    data = shared(folder, token_sampling="block_average", token_ratio=4, dtype="float32")
    everything = by_hand(data, data.split["val"], torch.float32)
    expected = torch.cat([everything[:, :2], everything[:, 2:].mean(1, keepdim=True)], dim=1)
    torch.testing.assert_close(torch.cat(list(data.vectors())), expected.flatten(0, 1))


@pytest.mark.parametrize("buffer_mb", [SMALL_MB, 64])
def test_an_epoch_has_every_vector_once_in_an_order_of_its_own(folder, buffer_mb):
    data = shared(folder, buffer_mb=buffer_mb)
    everything = torch.cat(list(data.vectors("train")))
    first, second = epoch(data, 0), epoch(data, 1)
    assert len(first) == len(data.train_dataloader()) == -(-len(everything) // 32)
    for batches in (first, second):
        assert [len(batch) for batch in batches[:-1]] == [32] * (len(batches) - 1)
        assert rows(torch.cat(batches)) == rows(everything)
    assert not torch.equal(torch.cat(first), torch.cat(second))
    assert not torch.equal(torch.cat(first), everything)
    assert torch.equal(torch.cat(epoch(data, 0)), torch.cat(first)), "epochs are repeatable"


@pytest.mark.parametrize("buffer_mb", [SMALL_MB, 64])
def test_the_order_depends_on_seed_and_epoch_only(folder, buffer_mb):
    one = shared(folder, buffer_mb=buffer_mb)
    for number in range(3):
        expected = torch.cat(epoch(one, number))
    torch.rand(5)
    np.random.rand(5)
    other = ready(folder, buffer_mb=buffer_mb)
    random = torch.get_rng_state()
    assert torch.equal(torch.cat(epoch(other, 2)), expected)
    assert torch.equal(torch.get_rng_state(), random), "loaders leave the global generator alone"
    # Another seed would divide episodes differently, were it not for the policy's own split.
    seeded = ready(folder, buffer_mb=buffer_mb, seed=1)
    assert seeded.split["train"] == one.split["train"]
    assert not torch.equal(torch.cat(epoch(seeded, 2)), expected)


@pytest.mark.parametrize("buffer_mb", [SMALL_MB, 64])
def test_streaming_gives_the_same_batches_as_the_disk(folder, buffer_mb):
    disk = ready(folder, buffer_mb=buffer_mb)
    stream = ready(folder, buffer_mb=buffer_mb, storage="stream", cache_dir="/nowhere")
    for number in range(2):
        for ours, theirs in zip(epoch(disk, number), epoch(stream, number), strict=True):
            assert torch.equal(ours, theirs)
    assert stream.statistics is None
    assert disk.statistics.n_vectors == sum(LENGTHS) * N_TOKENS


def test_each_byte_is_read_once_an_epoch_within_bounded_memory(folder):
    data = ready(folder, buffer_mb=SMALL_MB)
    n_bytes = sum(LENGTHS[number] for number in data.split["train"]) * N_TOKENS * DIM * 2
    before = data.source.bytes_read
    for number in range(3):
        epoch(data, number)
    assert 1 <= (data.source.bytes_read - before) / (3 * n_bytes) <= 1.5
    buffer = data._buffer_of("train")
    for number in range(3):
        fills = buffer.fills((0, number))
        assert len(fills) > 2, "the split must not fit"
        assert sorted(itertools.chain(*fills)) == list(range(len(buffer._pieces)))
        for fill in fills:
            n_vectors = sum(len(buffer._pieces[piece]) for piece in fill) * N_TOKENS
            assert n_vectors * (DIM * 2 + 8) <= SMALL_MB * 2**20


@pytest.mark.parametrize("storage", ["disk", "stream"])
def test_what_fits_is_read_once_for_all_epochs(folder, storage):
    data = ready(folder, storage=storage)
    if storage == "disk":
        count = lambda: data.source.bytes_read // (N_TOKENS * DIM * 2)  # noqa: E731
    else:
        count = lambda: data.source.frames_computed  # noqa: E731
    before = count()
    for number in range(3):
        epoch(data, number)
    data.sample(10)
    list(data.vectors("train"))
    assert count() - before == sum(LENGTHS[number] for number in data.split["train"])


def test_a_batch_mixes_episodes(folder):
    data = shared(folder)
    frames = data.frames(data.split["train"])
    episode_of = {
        tuple(vector): int(number)
        for number, tokens in zip(frames.episode_index, frames.activations.tolist(), strict=True)
        for vector in tokens
    }
    for batch in epoch(data)[:-1]:
        assert len({episode_of[tuple(vector)] for vector in batch.tolist()}) >= 3


def test_the_policys_own_split_is_honoured(folder):
    data = ready(folder)
    own = load_policy(str(folder / "policy.ckpt")).split
    assert data.split["train"] == own["train"]
    # A third of the five held-out episodes, rounded
    assert len(data.split["calibration"]) == 2
    assert sorted(data.split["calibration"] + data.split["val"]) == own["val"]
    assert data.is_unseen_by_policy
    assert module(folder).split == data.split
    splits = [module(folder, seed=seed).split["calibration"] for seed in (1, 2, 3)]
    assert len({tuple(split) for split in splits}) > 1, "the seed chooses who calibrates"


def test_the_policys_split_holds_for_some_of_its_episodes(folder):
    data = module(folder, episodes="0:7")
    own = load_policy(str(folder / "policy.ckpt")).split
    everyone = [*data.split["train"], *data.split["calibration"], *data.split["val"]]
    assert sorted(everyone) == list(range(7))
    assert data.split["train"] == [number for number in own["train"] if number < 7]
    assert data.is_unseen_by_policy


def test_other_data_are_divided_by_fractions_and_seed(folder, tmp_path):
    other = write_demos(tmp_path / "other.hdf5", [length + 1 for length in LENGTHS])
    data = module(folder, dataset_repo_id=str(other), val_fraction=0.3, calibration_fraction=0.2)
    with pytest.warns(UserWarning, match=r"other data \(.*demos.hdf5\) than other.hdf5 holds"):
        split = data.split
    assert [len(split[name]) for name in SPLITS] == [5, 2, 3]
    assert sorted(itertools.chain(*split.values())) == list(range(10))
    assert not data.is_unseen_by_policy
    # Moved data are the same data.
    moved = tmp_path / "moved.hdf5"
    moved.write_bytes((folder / "demos.hdf5").read_bytes())
    assert module(folder, dataset_repo_id=str(moved)).split == module(folder).split


@pytest.mark.parametrize("val_fraction", [0.0, 0.1])
def test_a_run_that_held_out_too_little_is_divided_by_fractions(folder, tmp_path, val_fraction):
    save_policy(tmp_path / "policy.ckpt", folder / "demos.hdf5", val_fraction=val_fraction)
    data = module(tmp_path)
    assert [len(data.split[name]) for name in SPLITS] == [8, 1, 1]
    with pytest.raises(ValueError, match=r"2 episode.s. none is left to train on"):
        module(tmp_path, episodes=[0, 1]).split  # noqa: B018


def test_the_data_are_found_by_the_policys_own_word(folder, tmp_path, monkeypatch):
    assert module(folder).data_name == str(folder / "demos.hdf5")
    (tmp_path / "gone").mkdir()
    demos = write_demos(tmp_path / "gone" / "d.hdf5")
    save_policy(tmp_path / "gone" / "policy.ckpt", demos)
    demos.unlink()
    with pytest.raises(ValueError, match=r"was trained on .*d\.hdf5.*give dataset_repo_id"):
        module(tmp_path / "gone").data_name  # noqa: B018
    save_policy(tmp_path / "policy.ckpt", None)
    with pytest.raises(ValueError, match="does not say what it was trained on"):
        module(tmp_path).data_name  # noqa: B018


def test_a_new_checkpoint_on_the_same_data_gives_new_activations(folder, tmp_path):
    save_policy(tmp_path / "policy.ckpt", folder / "demos.hdf5")
    old = ready(tmp_path)
    old_vectors = torch.cat(list(old.vectors()))
    save_policy(tmp_path / "policy.ckpt", folder / "demos.hdf5", seed=1)
    new = ready(tmp_path)
    new_vectors = torch.cat(list(new.vectors()))
    assert new.data_name == old.data_name
    assert new.fingerprint != old.fingerprint
    torch.testing.assert_close(
        new_vectors, by_hand(new, new.split["val"]).flatten(0, 1), rtol=2e-3, atol=2e-3
    )
    assert (new_vectors - old_vectors).abs().max() > 0.1


def test_changed_data_of_the_same_name_give_new_activations(folder, tmp_path):
    demos = write_demos(tmp_path / "d.hdf5", LENGTHS)
    save_policy(tmp_path / "policy.ckpt", demos)
    old = ready(tmp_path, dataset_repo_id=str(demos))
    with h5py.File(demos, "r+") as file:
        file["demo_3/observations/qpos"][:] += 1
    with pytest.warns(UserWarning, match="than d.hdf5 holds"):
        new = ready(tmp_path, dataset_repo_id=str(demos))
    assert new.fingerprint != old.fingerprint
    assert not new.is_unseen_by_policy


@pytest.mark.parametrize(
    "changes", [{"layer": "decoder"}, {"token_sampling": "stride"}, {"dtype": "float32"}]
)
def test_what_changes_the_activations_changes_the_fingerprint(folder, changes):
    assert module(folder, **changes).fingerprint != module(folder).fingerprint


def test_what_only_arranges_them_shares_the_store(folder):
    first = ready(folder)
    for changes in ({"per": "frame"}, {"batch_size": 5}, {"buffer_mb": 1}, {"val_fraction": 0.4}):
        assert ready(folder, **changes).source.folder == first.source.folder


def test_the_hash_of_a_policy_is_of_all_it_computes_with():
    base = made()
    scaled = made()
    scaled.normaliser.state.scale += 1
    others = [made(1), made(n_heads=4), made(pre_norm=True), scaled]
    assert len({policy_hash(policy) for policy in (base, *others)}) == 5
    assert policy_hash(made()) == policy_hash(base) == policy_hash(base.train())


@pytest.mark.parametrize("buffer_mb", [SMALL_MB, 64])
def test_samples_are_drawn_without_replacement_from_their_split(folder, buffer_mb):
    data = shared(folder, buffer_mb=buffer_mb)
    everything = {name: torch.cat(list(data.vectors(name))) for name in SPLITS}
    for split, vectors in everything.items():
        drawn = data.sample(40, split)
        assert len({*map(tuple, drawn.tolist())}) == 40
        assert {*rows(drawn)} <= {*rows(vectors)}
        assert torch.equal(data.sample(40, split), drawn)
        assert not torch.equal(data.sample(40, split, seed=1), drawn)
        assert rows(data.sample(10**6, split)) == rows(vectors)
    with pytest.raises(ValueError, match="choose one of"):
        data.sample(3, "test")


def test_a_sample_in_between_does_not_disturb_an_epoch(folder):
    data = shared(folder, buffer_mb=SMALL_MB)
    expected = epoch(data, 0)
    data.train_dataloader().batch_sampler.set_epoch(0)
    for batch, known in zip(data.train_dataloader(), expected, strict=True):
        assert torch.equal(batch, known)
        data.sample(9)
        next(data.vectors("train", 5))


def test_frames_keep_the_order_of_time_and_of_the_request(folder):
    data = shared(folder)
    found = data.frames([7, 2])
    assert found.episode_index.tolist() == [7] * LENGTHS[7] + [2] * LENGTHS[2]
    assert found.frame_index.tolist() == [*range(LENGTHS[7]), *range(LENGTHS[2])]
    torch.testing.assert_close(found.activations, by_hand(data, [7, 2]), rtol=2e-3, atol=2e-3)
    for wrong in ([], [3, 99]):
        with pytest.raises(ValueError, match=r"10 that are loaded, 0 to 9"):
            data.frames(wrong)


@pytest.mark.parametrize(
    ("dtype", "batch_dtype"), [("bfloat16", "bfloat16"), ("float16", "float32")]
)
def test_vectors_leave_in_the_dtype_that_was_asked_for(folder, dtype, batch_dtype):
    data = shared(folder, dtype=dtype, batch_dtype=batch_dtype)
    expected = getattr(torch, batch_dtype)
    parts = [epoch(data)[0], data.sample(3), next(data.vectors()), data.frames([0]).activations]
    assert {part.dtype for part in parts} == {expected}
    with torch.no_grad():
        by_policy = by_hand(data, [0], getattr(torch, dtype))
    torch.testing.assert_close(parts[3].float(), by_policy, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("n_samples", [64, 70, 61])
def test_ranks_share_what_one_rank_would_see(n_samples):
    alone = VectorSampler(n_samples, 8, seed=0)
    ranks = [VectorSampler(n_samples, 4, seed=0, rank=rank, world_size=2) for rank in range(2)]
    together = list(zip(*ranks, strict=True))
    assert len(together) == len(list(alone))
    for whole, parts in zip(alone, together, strict=True):
        assert len(parts[0]) == len(parts[1])
        assert {*parts[0], *parts[1]} == {*whole}


class Recorder(LightningModule):
    """Notes which vectors it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.shown: list[tuple[int, torch.Tensor]] = []
        self.validated: list[torch.Tensor] = []

    def training_step(self, batch, batch_idx):
        self.shown.append((self.current_epoch, batch.clone()))
        return self.weight.sum() + 0 * batch.mean()

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch.clone())

    def test_step(self, batch, batch_idx):
        self.validated.append(batch.clone())

    def predict_step(self, batch, batch_idx):
        return batch.clone()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Interrupt(Callback):
    """Saves a checkpoint after a step and stops."""

    def __init__(self, step: int, path: Path) -> None:
        self.step = step
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def trainer(tmp_path, *callbacks, **arguments) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        callbacks=[ExactResume(), *callbacks],
        **arguments,
    )


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_lightning_trains_validates_tests_and_predicts(folder, tmp_path):
    data, recorder = module(folder, device="auto"), Recorder()
    loop = trainer(tmp_path, max_epochs=2)
    loop.fit(recorder, data)
    n = sum(LENGTHS[number] for number in data.split["train"]) * N_TOKENS
    for number in range(2):
        shown = [batch for at, batch in recorder.shown if at == number]
        assert torch.equal(torch.cat(shown), torch.cat(epoch(ready(folder), number)))
        assert sum(map(len, shown)) == n
    held_out = torch.cat(list(data.vectors()))
    assert torch.equal(torch.cat(recorder.validated[: len(recorder.validated) // 2]), held_out)
    recorder.validated.clear()
    loop.test(recorder, data, verbose=False)
    assert torch.equal(torch.cat(recorder.validated), held_out)
    assert torch.equal(torch.cat(loop.predict(recorder, data)), held_out)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("buffer_mb", [SMALL_MB, 64])
@pytest.mark.parametrize("storage", ["disk", "stream"])
def test_a_run_continues_in_the_middle_of_an_epoch(folder, tmp_path, storage, buffer_mb):
    settings = {"storage": storage, "buffer_mb": buffer_mb}
    whole = Recorder()
    trainer(tmp_path, max_epochs=2).fit(whole, module(folder, **settings))
    per_epoch = len(whole.shown) // 2
    for step in (per_epoch, per_epoch + 3) if storage == "disk" else (per_epoch + 3,):
        before, after = Recorder(), Recorder()
        path = tmp_path / f"{step}.ckpt"
        trainer(tmp_path, Interrupt(step, path), max_epochs=2).fit(
            before, module(folder, **settings)
        )
        torch.load(path, weights_only=True)
        trainer(tmp_path, max_epochs=2).fit(after, module(folder, **settings), ckpt_path=path)
        assert len(before.shown) == step
        for ours, theirs in zip(before.shown + after.shown, whole.shown, strict=True):
            assert ours[0] == theirs[0]
            assert torch.equal(ours[1], theirs[1])


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_run_is_not_continued_on_other_activations(folder, tmp_path):
    path = tmp_path / "run.ckpt"
    trainer(tmp_path, Interrupt(3, path), max_epochs=1).fit(Recorder(), module(folder))
    for changes, named in (
        ({"layer": "decoder"}, "layer was encoder, is decoder"),
        ({"per": "frame"}, "per was token, is frame"),
        ({"buffer_mb": SMALL_MB}, "buffer_mb was 1024"),
        ({"episodes": "0:9"}, "split"),
    ):
        with pytest.raises(ValueError, match=named):
            trainer(tmp_path, max_epochs=1).fit(
                Recorder(), module(folder, **changes), ckpt_path=path
            )
    # To look at a finished run on other data is no continuation.
    other = module(folder, episodes="0:9")
    trainer(tmp_path).validate(Recorder(), other, ckpt_path=path, verbose=False)


def test_provenance_is_plain_and_says_all(folder):
    data = shared(folder)
    found = data.provenance
    values = [found]
    while values:
        value = values.pop()
        assert type(value) in (dict, list, str, int, float, bool, type(None))
        values += value.values() if isinstance(value, dict) else []
        values += value if isinstance(value, list) else []
    assert found["policy_hash"] == policy_hash(data.policy)
    assert found["positions"][3] == ["image", 0, 1]
    assert found["split"] == data.split


def test_the_command_line_explains_every_argument():
    parser = ArgumentParser()
    parser.add_class_arguments(ActivationDataModule, "data")
    text = parser.format_help()
    arguments = parser.parse_args(["--data.policy_path", "x", "--data.episodes", "[1,2]"])
    assert arguments.data.episodes == [1, 2]
    for action in parser._actions:
        if action.dest.startswith("data."):
            assert action.help, action.dest
    assert "block_average" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"val_fraction": 0.0}, "val_fraction is 0"),
        ({"calibration_fraction": 1.0}, "calibration_fraction is 1"),
        ({"token_ratio": 0}, "ratio is 0"),
    ],
)
def test_arguments_out_of_range_are_refused(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        module(folder, **changes)


def test_a_buffer_smaller_than_one_batch_of_frames_is_refused(folder):
    with pytest.raises(ValueError, match="make buffer_mb larger, or frames_per_batch smaller"):
        ready(folder, buffer_mb=0.0005)


def test_a_policy_that_the_data_do_not_fit_is_refused(folder, tmp_path):
    save_policy(tmp_path / "policy.ckpt", None, state_dim=3)
    with pytest.raises(ValueError, match="does not fit the policy: state_dim: 3 != 2"):
        ready(tmp_path, dataset_repo_id=str(folder / "demos.hdf5"))
