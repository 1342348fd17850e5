"""From files to batches, and back into the middle of an interrupted run."""

from contextlib import suppress
from itertools import chain
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities.data import _dataloader_init_kwargs_resolve_sampler
from recordings import (
    as_padded_jpeg,
    numbers,
    pictures,
    smooth_pictures,
    write_aloha,
    write_demos,
    write_robomimic,
)

from datamodules import hdf5
from datamodules.base import split_episodes
from datamodules.errors import DatasetError
from datamodules.hdf5 import HDF5DataModule
from datamodules.layouts import CameraSource, HDF5Schema

LENGTHS = (5, 9, 7, 6, 8)


def module(path, **arguments) -> HDF5DataModule:
    settings = {"batch_size": 4, "chunk_size": 3, "val_fraction": 0.3, "progress": False}
    return HDF5DataModule(str(path), **{**settings, **arguments})


def ready(path, **arguments) -> HDF5DataModule:
    made = module(path, **arguments)
    made.setup()
    return made


def stored_pictures(data, camera="image"):
    """Pictures of a data module as its batches show them, channels last."""
    found = {}
    for number in data.source.episode_lengths:
        frames = data.episode(number).observation.images[camera]
        found[number] = frames.movedim(1, -1).numpy()
    return found


def trainer(tmp_path, **arguments) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        use_distributed_sampler=False,
        **arguments,
    )


class Recorder(LightningModule):
    """Notes which samples it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.shown: list[tuple[int, list[tuple[int, int]]]] = []

    def training_step(self, batch, batch_idx):
        samples = zip(batch.episode_index.tolist(), batch.frame_index.tolist(), strict=True)
        self.shown.append((self.current_epoch, list(samples)))
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        pass

    def predict_step(self, batch, batch_idx):
        return batch.frame_index

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
            raise KeyboardInterrupt


class Resume(Callback):
    """Arms the sampler before the iterator exists."""

    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        loop = checkpoint["loops"]["fit_loop"]
        epoch = loop["epoch_progress"]["current"]["processed"]
        batch = loop["epoch_loop.batch_progress"]["current"]["ready"]
        trainer.datamodule.resume_at(epoch, batch)


def test_facts_before_setup_are_those_of_the_batches(tmp_path):
    data = module(
        write_demos(tmp_path / "d.hdf5", LENGTHS, cameras=("top", "wrist")), n_obs_steps=2
    )
    facts = data.data_schema
    assert data.cameras == {"top": [6, 8], "wrist": [6, 8]}
    assert (data.state_dim, data.action_dim, data.fps) == (2, 2, 10)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert {name: tuple(p.shape[-2:]) for name, p in batch.observation.images.items()} == (
        facts.cameras
    )
    assert batch.observation.images["top"].shape[:3] == (4, 2, 3)
    assert batch.observation.state.shape[-1] == facts.state_dim
    assert batch.actions.shape == (4, 3, facts.action_dim)


@pytest.mark.parametrize("storage", ["ram", "memmap"])
def test_batches_hold_what_the_file_holds(tmp_path, storage):
    path = write_demos(tmp_path / "d.hdf5", LENGTHS)
    data = ready(path, storage=storage, cache_dir=str(tmp_path / "cache"))
    with h5py.File(path) as file:
        for number in range(len(LENGTHS)):
            batch, group = data.episode(number), file[f"demo_{number}"]
            shown = batch.observation.images["image"].movedim(1, -1)
            np.testing.assert_array_equal(shown, group["observations/image"])
            np.testing.assert_array_equal(batch.observation.state, group["observations/qpos"])
            np.testing.assert_array_equal(batch.actions[:, 0], group["actions"])
            np.testing.assert_array_equal(batch.simulator_state, group["observations/state"])


def test_compressed_pictures_are_decoded_to_their_colours(tmp_path):
    folder = write_aloha(tmp_path / "a", compressed=True)
    for number, frames in stored_pictures(ready(folder, chunk_size=2), "top").items():
        expected = smooth_pictures((5, 6)[number])
        assert np.abs(frames.astype(int) - expected).mean() < 3


@pytest.mark.parametrize(
    ("source", "undo"),
    [
        (CameraSource("observations/image", flip="v"), lambda x: x[:, ::-1]),
        (CameraSource("observations/image", flip="h"), lambda x: x[:, :, ::-1]),
        (CameraSource("observations/image", flip="vh"), lambda x: x[:, ::-1, ::-1]),
        (CameraSource("observations/image", colour="bgr"), lambda x: x[..., ::-1]),
    ],
)
def test_declared_pictures_are_set_upright_and_rgb(tmp_path, source, undo):
    path = write_demos(tmp_path / "d.hdf5")
    schema = HDF5Schema(images={"image": source}, state=("observations/qpos",))
    for number, frames in stored_pictures(ready(path, schema=schema)).items():
        length = (5, 9, 7)[number]
        np.testing.assert_array_equal(frames, undo(pictures(length, seed=number)))


def test_libero_is_turned_upright(tmp_path):
    data = ready(write_robomimic(tmp_path / "l.hdf5", libero=True))
    frames = stored_pictures(data, "agentview_rgb")[0]
    np.testing.assert_array_equal(frames, pictures(5, seed=0)[:, ::-1])


@pytest.mark.parametrize("top", [1.0, 255.0])
def test_floating_point_pictures_become_the_same_bytes(tmp_path, top):
    path = write_demos(tmp_path / "d.hdf5")
    with h5py.File(path, "a") as file:
        for group in file.values():
            frames = group["observations/image"][()].astype(np.float32) * np.float32(top / 255)
            del group["observations/image"]
            group["observations/image"] = frames
    for number, frames in stored_pictures(ready(path)).items():
        np.testing.assert_array_equal(frames, pictures((5, 9, 7)[number], seed=number))


def test_pictures_beyond_their_range_are_named_by_frame(tmp_path):
    path = write_demos(tmp_path / "d.hdf5")
    with h5py.File(path, "a") as file:
        for group in file.values():
            frames = group["observations/image"][()] / np.float32(255)
            del group["observations/image"]
            group["observations/image"] = frames
        file["demo_2/observations/image"][4, 2, 2, 1] = np.nan
    with pytest.raises(DatasetError, match=r"demo_2/observations/image, frame 4: holds the value"):
        ready(path)


def test_episodes_do_not_leak_between_training_and_validation(tmp_path):
    path = write_demos(tmp_path / "d.hdf5", (6,) * 20)
    data = ready(path, val_fraction=0.25, drop_n_last_frames=2)
    shown = [set(), set()]
    for side, loader in zip(shown, (data.train_dataloader(), data.val_dataloader()), strict=True):
        for batch in loader:
            side.update(zip(batch.episode_index.tolist(), batch.frame_index.tolist(), strict=True))
    train, val = shown
    assert {episode for episode, _ in train} == set(data.split["train"])
    assert {episode for episode, _ in val} == set(data.split["val"])
    assert len(data.split["val"]) == 5
    assert not set(data.split["train"]) & set(data.split["val"])
    assert train == {(episode, step) for episode in data.split["train"] for step in range(4)}
    assert val == {(episode, step) for episode in data.split["val"] for step in range(6)}


def test_statistics_do_not_see_validation(tmp_path):
    path = write_demos(tmp_path / "d.hdf5", LENGTHS)
    held_out = module(path).split["val"]
    with h5py.File(path, "a") as file:
        for number in held_out:
            file[f"demo_{number}/actions"][...] = 1e6
    assert float(ready(path).statistics.action.max.max()) < 1e3


def test_split_is_seeded_and_holds_out_at_least_one():
    split = split_episodes(range(50), 0.1, seed=3)
    assert split == split_episodes(range(50), 0.1, seed=3)
    assert split != split_episodes(range(50), 0.1, seed=4)
    assert len(split_episodes(range(3), 0.01, seed=0)[1]) == 1
    assert split_episodes([7], 0.0, seed=0) == ([7], [])
    with pytest.raises(ValueError, match="set val_fraction to 0"):
        split_episodes([7], 0.1, seed=0)


def test_masks_of_the_file_are_the_split(tmp_path):
    data = ready(write_robomimic(tmp_path / "r.hdf5"))
    assert data.split == {"by": "mask", "train": [0, 2], "val": [1]}
    assert data.environment_state_dim == 10


@pytest.mark.parametrize(
    ("episodes", "loaded"), [("1:4", [1, 2, 3]), ("::2", [0, 2, 4]), ([4, 0], [0, 4])]
)
def test_subset_of_episodes(tmp_path, episodes, loaded):
    data = ready(write_demos(tmp_path / "d.hdf5", LENGTHS), episodes=episodes)
    assert sorted(data.split["train"] + data.split["val"]) == loaded
    assert data.store.shapes.episode_lengths == tuple(LENGTHS[number] for number in loaded)


@pytest.mark.parametrize(
    ("episodes", "what"),
    [
        ([2, 9], r"episodes names \[9\], but the data set has 5 episodes, 0 to 4"),
        ([2, 2], "names a number twice"),
        ("one:two", "write a list or a slice like 0:50"),
        ("3", "write a list or a slice like 0:50"),
        ("7:9", "selects none"),
    ],
)
def test_subset_that_does_not_exist(tmp_path, episodes, what):
    data = module(write_demos(tmp_path / "d.hdf5", LENGTHS), episodes=episodes)
    with pytest.raises(ValueError, match=what):
        data.setup()


def test_chunk_longer_than_every_episode_is_refused_by_name(tmp_path):
    path = write_demos(tmp_path / "d.hdf5", LENGTHS)
    ready(path, chunk_size=9, val_fraction=0.0)
    with pytest.raises(ValueError, match=r"the longest has 9 steps and chunk_size is 10"):
        ready(path, chunk_size=10, val_fraction=0.0)


def test_resized_pictures(tmp_path):
    data = ready(write_demos(tmp_path / "d.hdf5"), image_size=(3, 4))
    assert data.cameras == {"image": [3, 4]}
    frames = data.episode(0).observation.images["image"].movedim(1, -1).numpy()
    blocks = pictures(5, seed=0).reshape(5, 3, 2, 4, 2, 3).mean(axis=(2, 4))
    assert np.abs(frames - blocks).max() <= 0.5


def test_cache_spares_the_pictures_and_notices_a_changed_file(tmp_path, monkeypatch):
    path = write_demos(tmp_path / "d.hdf5")
    cache = {"storage": "memmap", "cache_dir": str(tmp_path / "cache")}
    first = ready(path, **cache)
    calls = []
    monkeypatch.setattr(
        hdf5, "fill_store", lambda *given, really=hdf5.fill_store: (calls.append(1), really(*given))
    )
    assert ready(path, **cache).fingerprint == first.fingerprint
    assert calls == []
    with h5py.File(path, "a") as file:
        file["demo_0/observations/image"][...] = 0
    changed = ready(path, **cache)
    assert calls == [1]
    assert int(changed.episode(0).observation.images["image"].max()) == 0


def test_variable_length_pictures(tmp_path):
    path = write_demos(tmp_path / "d.hdf5", lengths=(4, 5))
    with h5py.File(path, "a") as file:
        for group in file.values():
            rows = as_padded_jpeg(smooth_pictures(len(group["actions"])))
            del group["observations/image"]
            kind = h5py.vlen_dtype(np.uint8)
            dataset = group.create_dataset("observations/image", (len(rows),), kind)
            for index, row in enumerate(rows):
                dataset[index] = row
    frames = stored_pictures(ready(path))[1]
    assert np.abs(frames.astype(int) - smooth_pictures(5)).mean() < 3


class Making:
    """Makes a file once, as an expert would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made = 0

    def prepare(self) -> Path:
        self.made += 1
        return write_demos(self.folder / "made.hdf5", LENGTHS)


def test_demonstrations_are_made_when_first_needed(tmp_path):
    making = Making(tmp_path)
    data = HDF5DataModule(demonstrations=making, chunk_size=3, progress=False)
    assert making.made == 0
    assert data.action_dim == 2
    data.prepare_data()
    data.setup()
    assert making.made == 1


@pytest.mark.parametrize("given", [{}, {"path": "x", "demonstrations": Making(Path())}])
def test_exactly_one_origin(given):
    with pytest.raises(ValueError, match="give exactly one"):
        HDF5DataModule(**given)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"image_size": (0, 3)}, "image_size is 0"),
        ({"val_fraction": 1.0}, "val_fraction is 1.0"),
        ({"storage": "gpu", "num_workers": 2}, "set num_workers to 0"),
        ({"layout": "demos", "schema": HDF5Schema()}, "leave layout at auto"),
    ],
)
def test_impossible_arguments_are_named(arguments, what):
    with pytest.raises(ValueError, match=what):
        HDF5DataModule("x", **arguments)


def test_frames_before_setup_say_what_to_do(tmp_path):
    data = module(write_demos(tmp_path / "d.hdf5"))
    with pytest.raises(RuntimeError, match=r"call setup\(\) first"):
        data.train_dataset  # noqa: B018


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loaders_do_not_touch_the_global_generator(tmp_path, num_workers):
    data = ready(write_demos(tmp_path / "d.hdf5", LENGTHS), num_workers=num_workers)
    before = torch.get_rng_state()
    loaded = [len(batch) for batch in data.train_dataloader()]
    assert sum(loaded) == len(data.train_dataset)
    assert torch.equal(torch.get_rng_state(), before)


def test_lightning_follows_the_order_of_the_sampler(tmp_path):
    data = module(write_demos(tmp_path / "d.hdf5", LENGTHS))
    recorder = Recorder()
    trainer(tmp_path, max_epochs=3).fit(recorder, datamodule=data)
    dataset, sampler = data.train_dataset, data._train_sampler
    assert sampler is not None
    for epoch in range(3):
        shown = list(chain(*(samples for at, samples in recorder.shown if at == epoch)))
        batch = dataset.__getitems__(sampler.order(epoch).tolist())
        expected = zip(batch.episode_index.tolist(), batch.frame_index.tolist(), strict=True)
        assert shown == list(expected)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("step", [3, 9])
def test_interrupted_run_continues_with_the_next_batch(tmp_path, step, num_workers):
    path = write_demos(tmp_path / "d.hdf5", LENGTHS)
    arguments = {"num_workers": num_workers, "val_fraction": 0.2}

    def fit(callbacks, ckpt_path=None):
        recorder = Recorder()
        run = trainer(tmp_path, max_epochs=3, callbacks=callbacks, limit_val_batches=0)
        with suppress(KeyboardInterrupt, SystemExit):
            run.fit(recorder, datamodule=module(path, **arguments), ckpt_path=ckpt_path)
        return recorder.shown

    whole = fit([])
    batches = len(whole) // 3
    assert step % batches
    before = fit([Interrupt(step, tmp_path / "last.ckpt")])
    after = fit([Resume()], tmp_path / "last.ckpt")
    assert before + after == whole


def fitting(data, tmp_path):
    data.trainer = trainer(tmp_path)
    data.trainer.state.fn = TrainerFn.FITTING
    return data


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"batch_size": 5}, "batch_size was 4, is 5"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"val_fraction": 0.6}, r"split \(train \+ val episodes\) was 3 \+ 2, is 2 \+ 3"),
        ({"chunk_size": 2}, "chunk_size was 3, is 2"),
    ],
)
def test_changed_settings_do_not_continue_a_run(tmp_path, changed, what):
    path = write_demos(tmp_path / "d.hdf5", LENGTHS)
    saved = ready(path, val_fraction=0.4).state_dict()
    again = fitting(ready(path, val_fraction=0.4), tmp_path)
    again.load_state_dict(saved)
    other = fitting(ready(path, **{"val_fraction": 0.4, **changed}), tmp_path)
    with pytest.raises(ValueError, match=what):
        other.load_state_dict(saved)


def test_other_demonstrations_do_not_continue_a_run_but_may_be_validated(tmp_path):
    path = write_demos(tmp_path / "d.hdf5", LENGTHS)
    saved = ready(path).state_dict()
    with h5py.File(path, "a") as file:
        file["demo_0/actions"][2, 0] += 1
    other = fitting(ready(path), tmp_path)
    with pytest.raises(ValueError, match="the demonstrations themselves changed"):
        other.load_state_dict(saved)
    assert other.trainer is not None
    other.trainer.state.fn = TrainerFn.VALIDATING
    other.load_state_dict(saved)


def test_validating_on_another_split_is_warned_of(tmp_path):
    path = write_demos(tmp_path / "d.hdf5", LENGTHS)
    saved = ready(path).state_dict()
    with pytest.warns(UserWarning, match="may be ones it has seen"):
        ready(path, seed=5).load_state_dict(saved)


def test_saved_state_loads_as_plain_values(tmp_path):
    state = ready(write_demos(tmp_path / "d.hdf5", LENGTHS)).state_dict()
    torch.save(state, tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == state


def test_validating_predicting_and_no_validation(tmp_path):
    path = write_demos(tmp_path / "d.hdf5", LENGTHS)
    data, recorder = module(path), Recorder()
    trainer(tmp_path).validate(recorder, datamodule=data, verbose=False)
    predicted = trainer(tmp_path).predict(recorder, datamodule=data)
    assert predicted is not None
    steps = list(chain(*(range(LENGTHS[number]) for number in data.split["val"])))
    assert torch.cat(predicted).tolist() == steps  # pyright: ignore[reportArgumentType]
    trainer(tmp_path, max_epochs=1).fit(recorder, datamodule=module(path, val_fraction=0.0))


def test_overfitting_repeats_the_same_batches(tmp_path):
    recorder = Recorder()
    data = module(write_demos(tmp_path / "d.hdf5", LENGTHS))
    trainer(tmp_path, max_epochs=2, overfit_batches=2).fit(recorder, datamodule=data)
    first, second = ([s for at, s in recorder.shown if at == epoch] for epoch in (0, 1))
    assert first == second


def test_lightning_may_not_replace_the_sampler(tmp_path):
    loader = ready(write_demos(tmp_path / "d.hdf5", LENGTHS)).train_dataloader()
    with pytest.raises(TypeError, match="use_distributed_sampler=False"):
        _dataloader_init_kwargs_resolve_sampler(loader, loader.sampler, RunningStage.TRAINING)
    _set_sampler_epoch(loader, 2)
    assert loader.batch_sampler.epoch == 2  # pyright: ignore[reportAttributeAccessIssue]


def test_episodes_with_problems_can_be_left_out(tmp_path):
    path = write_demos(tmp_path / "d.hdf5", LENGTHS)
    with h5py.File(path, "a") as file:
        del file["demo_1/actions"]
        file["demo_1/actions"] = np.full((9, 2), np.nan)
        del file["demo_3/observations/qpos"]
        file["demo_3/observations/qpos"] = numbers(2, 2, 0)
    with pytest.raises(DatasetError, match="2 problems"):
        ready(path)
    data = ready(path, skip_bad_episodes=True)
    assert sorted(data.split["train"] + data.split["val"]) == [0, 2, 4]
    assert data.episode(2).episode_index.unique().tolist() == [2]
