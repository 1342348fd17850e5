"""LeRobot's data sets as batches, against LeRobot's own reader; streaming; and damage."""

import gc
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import weakref
from itertools import chain
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("SVT_LOG", "0")

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer

from analyze import main
from datamodules import lerobot, lerobot_files, statistics
from datamodules.errors import DatasetError
from datamodules.inspect import draw_strip, inspect_dataset
from datamodules.lerobot import LeRobotDataModule
from datamodules.streaming import StreamDataset, StreamSampler

ROOT = Path(__file__).parents[2]
LENGTHS = (5, 9, 7, 6)
FPS = 10
HEIGHT, WIDTH = 32, 48
TOP, WRIST = "observation.images.top", "observation.images.wrist"


def moving_pictures(length: int, seed: int) -> np.ndarray:
    """A bright square on its way over a gradient: unlike noise, it survives a film."""
    frames = np.zeros((length, HEIGHT, WIDTH, 3), np.uint8)
    frames[..., 2] = np.linspace(0, 200, WIDTH).astype(np.uint8)
    for step in range(length):
        left = (4 * step + 9 * seed) % (WIDTH - 10)
        frames[step, 8:20, left : left + 10, 0] = 250
        frames[step, 20:, :, 1] = 20 * step
    return frames


def record(folder: Path, kind: str, lengths=LENGTHS, files_apart: bool = False) -> Path:
    """Make a data set with LeRobot's own API."""
    from datasets import disable_progress_bars
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    disable_progress_bars()
    picture = {"dtype": kind, "shape": (HEIGHT, WIDTH, 3), "names": ["height", "width", "channels"]}
    sizes = {"observation.state": 2, "observation.environment_state": 5, "action": 3}
    sizes["next.reward"] = 1
    features = {TOP: picture, WRIST: dict(picture)} | {
        key: {"dtype": "float32", "shape": (dim,), "names": None} for key, dim in sizes.items()
    }
    made = LeRobotDataset.create(
        "local/moving", FPS, features, folder, use_videos=kind == "video", video_backend="pyav"
    )
    if files_apart:
        made.meta.info.video_files_size_in_mb = 1e-9
        made.meta.info.data_files_size_in_mb = 1e-9
    rng = np.random.default_rng(0)
    for episode, length in enumerate(lengths):
        pictures = {TOP: moving_pictures(length, episode), WRIST: moving_pictures(length, 7)[::-1]}
        for step in range(length):
            values = {key: rng.normal(size=dim).astype(np.float32) for key, dim in sizes.items()}
            images = {key: frames[step].copy() for key, frames in pictures.items()}
            made.add_frame({**values, **images, "task": "move"})
        made.save_episode(parallel_encoding=False)
    made.finalize()
    return folder


@pytest.fixture(scope="session")
def recordings_made(tmp_path_factory):
    base = tmp_path_factory.mktemp("lerobot")
    return {
        "video": record(base / "video", "video"),
        "image": record(base / "image", "image"),
        "apart": record(base / "apart", "video", files_apart=True),
    }


@pytest.fixture
def films(recordings_made):
    return recordings_made["video"]


@pytest.fixture
def damaged(recordings_made, tmp_path):
    """Copies that a test may break."""

    def copy(kind: str = "video") -> Path:
        return Path(shutil.copytree(recordings_made[kind], tmp_path / "copy"))

    return copy


def module(path, **arguments) -> LeRobotDataModule:
    settings = {"batch_size": 4, "chunk_size": 4, "val_fraction": 0.0, "storage": "ram"}
    return LeRobotDataModule(str(path), **{**settings, "progress": False, **arguments})


def ready(path, **arguments) -> LeRobotDataModule:
    made = module(path, **arguments)
    made.setup()
    return made


@pytest.mark.parametrize("storage", ["ram", "stream"])
@pytest.mark.parametrize(
    ("kind", "n_obs_steps", "action_start", "episodes"),
    [
        ("video", 1, 0, None),
        ("image", 1, 0, None),
        ("apart", 2, -1, None),
        ("video", 2, 0, [1, 3]),
        ("image", 2, -1, [0, 2]),
    ],
)
def test_samples_are_those_of_lerobot(
    recordings_made, storage, kind, n_obs_steps, action_start, episodes
):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    back = [step / FPS for step in range(1 - n_obs_steps, 1)]
    ahead = [step / FPS for step in range(action_start, action_start + 6)]
    theirs = LeRobotDataset(
        "local/moving",
        root=recordings_made[kind],
        episodes=episodes,
        delta_timestamps={TOP: back, WRIST: back, "observation.state": back, "action": ahead},
        video_backend="pyav",
    )
    data = ready(
        recordings_made[kind],
        storage=storage,
        chunk_size=6,
        n_obs_steps=n_obs_steps,
        action_start=action_start,
        episodes=episodes,
    )
    ours = data.dataset(sorted(episodes or range(len(LENGTHS))))
    assert len(ours) == len(theirs)
    batch = ours.__getitems__(range(len(ours)))
    for index in range(len(theirs)):
        item = theirs[index]
        for name, key in (("top", TOP), ("wrist", WRIST)):
            expected = item[key].reshape(batch.observation.images[name].shape[1:])
            assert torch.equal(batch.observation.images[name][index] / 255, expected)
        expected = item["observation.state"].reshape(batch.observation.state.shape[1:])
        assert torch.equal(batch.observation.state[index], expected)
        assert torch.equal(batch.actions[index], item["action"])
        assert torch.equal(batch.action_is_pad[index], item["action_is_pad"])
        assert batch.episode_index[index] == item["episode_index"]
        assert batch.frame_index[index] == item["frame_index"]


def test_schema_and_rate_are_known_before_the_frames_are_read(films):
    data = module(films)
    assert data.cameras == {"top": [HEIGHT, WIDTH], "wrist": [HEIGHT, WIDTH]}
    assert (data.state_dim, data.action_dim, data.fps) == (2, 3, FPS)


def test_privileged_state_resets_but_is_no_input_unless_asked_for(films):
    plain = ready(films).episode(1)
    assert plain.observation.environment_state is None
    assert plain.simulator_state.shape[1] == 5
    asked = ready(films, use_environment_state=True, simulator_state=None)
    assert asked.environment_state_dim == 5
    assert asked.episode(1).simulator_state is None
    assert torch.equal(asked.episode(1).observation.environment_state, plain.simulator_state)


def test_cameras_are_chosen_by_either_name_and_come_in_that_order(films):
    both = ready(films, camera_names=["wrist", TOP])
    assert list(both.episode(0).observation.images) == ["wrist", "top"]
    alone = ready(films, camera_names=["wrist"]).episode(2).observation.images
    assert list(alone) == ["wrist"]
    assert torch.equal(alone["wrist"], both.episode(2).observation.images["wrist"])
    with pytest.raises(DatasetError, match=r"no camera 'left'; it has top, wrist"):
        _ = module(films, camera_names=["left"]).source


def test_a_folder_may_be_named_by_root(films):
    assert LeRobotDataModule("local/any", root=str(films)).action_dim == 3


def test_second_run_decodes_nothing(films, tmp_path, monkeypatch):
    first = ready(films, storage="memmap", cache_dir=str(tmp_path))
    expected = first.episode(2).observation.images["top"].clone()

    def refuse(*args, **kwargs):
        raise AssertionError("a film was opened")

    monkeypatch.setattr(av, "open", refuse)
    again = ready(films, storage="memmap", cache_dir=str(tmp_path))
    assert torch.equal(again.episode(2).observation.images["top"], expected)
    assert again.fingerprint == first.fingerprint


def test_changed_files_are_read_again(damaged, tmp_path):
    folder = damaged()
    other = record(tmp_path / "other", "video", lengths=(6, 9, 7, 5))
    arguments = {"storage": "memmap", "cache_dir": str(tmp_path / "cache")}
    before = ready(folder, **arguments).fingerprint
    shutil.rmtree(folder)
    shutil.copytree(other, folder)
    after = ready(folder, **arguments)
    assert after.fingerprint != before
    assert after.fingerprint == ready(other).fingerprint


def test_a_film_touched_later_is_decoded_again(damaged, tmp_path, monkeypatch):
    folder = damaged()
    ready(folder, storage="memmap", cache_dir=str(tmp_path / "cache"))
    film = next(folder.glob("videos/*/*/*.mp4"))
    os.utime(film, (1, 1))
    opened = []
    true_open = av.open
    monkeypatch.setattr(av, "open", lambda file: opened.append(file) or true_open(file))
    ready(folder, storage="memmap", cache_dir=str(tmp_path / "cache"))
    assert str(film) in opened


def test_missing_statistics_of_lerobot_do_not_matter(damaged):
    folder = damaged()
    (folder / "meta" / "stats.json").unlink()
    data = ready(folder)
    actions = np.concatenate([data.episode(n).actions[:, 0].numpy() for n in range(4)])
    np.testing.assert_allclose(data.statistics.action.mean, actions.mean(axis=0), atol=1e-6)


def test_the_split_of_the_data_set_is_kept(damaged):
    folder = damaged()
    change_info(folder, splits={"train": "0:3", "val": "3:4"})
    assert module(folder).split == {"by": "mask", "train": [0, 1, 2], "val": [3]}


# Streaming


def seen(batches) -> list[tuple[int, int]]:
    pairs = [zip(b.episode_index.tolist(), b.frame_index.tolist(), strict=True) for b in batches]
    return [pair for batch in pairs for pair in batch]


def everything(data) -> list[tuple[int, int]]:
    lengths = data.source.episode_lengths
    return [(n, t) for n in data.split["train"] for t in range(lengths[n])]


@pytest.mark.parametrize("kind", ["video", "image"])
@pytest.mark.parametrize("arguments", [{}, {"n_obs_steps": 2, "image_size": (16, 24)}])
def test_a_streamed_epoch_has_every_sample_once_with_its_pictures(recordings_made, kind, arguments):
    folder = recordings_made[kind]
    streamed = ready(folder, storage="stream", shuffle_buffer=8, val_fraction=0.25, **arguments)
    stored = ready(folder, val_fraction=0.25, **arguments)
    batches = list(streamed.train_dataloader())
    assert sorted(seen(batches)) == everything(streamed)
    assert seen(batches) != everything(streamed)
    for batch in batches:
        for row, (episode, frame) in enumerate(seen([batch])):
            expected = stored.episode(episode)
            assert torch.equal(batch.actions[row], expected.actions[frame])
            for name, images in batch.observation.images.items():
                assert torch.equal(images[row], expected.observation.images[name][frame])


def test_a_streamed_subset_is_exact(films):
    data = ready(films, storage="stream", shuffle_buffer=3, episodes=[1, 2])
    assert sorted(seen(data.train_dataloader())) == [(1, t) for t in range(9)] + [
        (2, t) for t in range(7)
    ]


def test_streamed_epochs_differ_and_repeat_with_the_seed(films):
    def epochs(seed):
        data = ready(films, storage="stream", shuffle_buffer=10, seed=seed)
        loader = data.train_dataloader()
        found = []
        for epoch in range(2):
            loader.batch_sampler.set_epoch(epoch)
            found.append(seen(loader))
        return found

    first = epochs(0)
    assert first[0] != first[1]
    assert first == epochs(0)
    assert first[0] != epochs(1)[0]


def test_an_interrupted_streamed_epoch_continues_with_its_next_batch(films):
    whole = ready(films, storage="stream", shuffle_buffer=6)
    loader = whole.train_dataloader()
    loader.batch_sampler.set_epoch(3)
    expected = list(loader)
    resumed = ready(films, storage="stream", shuffle_buffer=6)
    resumed.resume_at(3, 2)
    rest = list(resumed.train_dataloader())
    assert seen(rest) == seen(expected[2:])
    for one, other in zip(rest, expected[2:], strict=True):
        assert torch.equal(one.observation.images["top"], other.observation.images["top"])


def test_the_buffer_bounds_the_decoded_samples_in_memory(films):
    data = ready(films, storage="stream", shuffle_buffer=5, batch_size=3)
    loader = data.train_dataloader()
    dataset = data.train_dataset
    assert isinstance(dataset, StreamDataset)
    for _ in loader:
        assert dataset.waiting <= 5 + 3
    assert dataset.waiting == 0


class Recorder(LightningModule):
    """Trains nothing, and notes what it was shown."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.epochs: dict[int, list] = {}

    def training_step(self, batch, _):
        self.epochs.setdefault(self.current_epoch, []).append(batch)
        return self.weight.sum()

    def validation_step(self, batch, _):
        assert batch.observation.images["top"].shape[1:] == (3, HEIGHT, WIDTH)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore")
def test_lightning_streams_whole_epochs_in_new_orders(films):
    data = module(films, storage="stream", shuffle_buffer=6, val_fraction=0.25)
    recorder = Recorder()
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(recorder, datamodule=data)
    first, second = (seen(recorder.epochs[epoch]) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == everything(data)
    assert first != second


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    buffer=st.integers(1, 80),
    epoch=st.integers(0, 5),
)
@settings(max_examples=50)
def test_the_order_is_a_permutation_that_never_looks_further_than_the_buffer(counts, buffer, epoch):
    sampler = StreamSampler(counts, 1, buffer, seed=2)
    starts = np.cumsum(counts) - counts
    read = [
        s for at in sampler.reading_order(epoch) for s in range(starts[at], starts[at] + counts[at])
    ]
    order = sampler.order(epoch).tolist()
    assert sorted(order) == sorted(read) == list(range(sum(counts)))
    when = {sample: place for place, sample in enumerate(read)}
    assert all(when[sample] < place + 1 + buffer for place, sample in enumerate(order))


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_what_one_process_would_stream(world_size):
    counts = [5, 9, 7, 6]
    together = StreamSampler(counts, 2 * world_size, 8, seed=1)
    ranks = [
        StreamSampler(counts, 2, 8, seed=1, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    dealt = [rank.batches(4) for rank in ranks]
    for step, batch in enumerate(together.batches(4)[:-1]):
        assert list(chain.from_iterable(batches[step] for batches in dealt)) == batch
    assert {s for batches in dealt for batch in batches for s in batch} == set(range(sum(counts)))


@pytest.mark.parametrize("sampled_frames", [512, 10])
def test_streamed_statistics_are_those_of_the_store(films, monkeypatch, sampled_frames):
    for room in (statistics, lerobot):
        monkeypatch.setattr(room, "IMAGE_SAMPLE_FRAMES", sampled_frames)
    streamed, stored = (ready(films, storage=s).statistics for s in ("stream", "ram"))
    for name in ("top", "wrist"):
        assert torch.equal(streamed.images[name].mean, stored.images[name].mean)
        assert torch.equal(streamed.images[name].std, stored.images[name].std)
    assert torch.equal(streamed.action.std, stored.action.std)


def test_streaming_refuses_workers(films):
    with pytest.raises(ValueError, match="set num_workers to 0"):
        module(films, storage="stream", num_workers=1)


def test_a_film_is_freed_when_it_is_closed(films):
    """Left to the collector, it could be freed in a forked loader worker, which would hang."""
    camera = lerobot_files.read_folder(films).cameras[TOP]
    episode = lerobot_files.read_tables(lerobot_files.read_folder(films), [0], ["action"])
    reader = lerobot_files.PictureReader(camera, FPS)
    list(reader.pictures(episode.episodes[0]))
    film = weakref.ref(reader._film)
    gc.disable()
    try:
        reader.close()
        assert film() is None
    finally:
        gc.enable()


# Damage


def change_info(folder, **changes):
    file = folder / "meta" / "info.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_features(folder, change):
    info = json.loads((folder / "meta" / "info.json").read_text())
    change(info["features"])
    change_info(folder, features=info["features"])


def data_file(folder) -> Path:
    return folder / "data" / "chunk-000" / "file-000.parquet"


def film_of(folder, key=TOP) -> Path:
    return folder / "videos" / key / "chunk-000" / "file-000.mp4"


def cut(file: Path, share: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])


def replace_column(folder, key, values):
    table = pq.read_table(data_file(folder))
    column = pa.array(values, table.column(key).type)
    index = table.schema.get_field_index(key)
    pq.write_table(table.set_column(index, table.field(index), column), data_file(folder))


def spoil_action(folder):
    actions = pq.read_table(data_file(folder)).column("action").to_pylist()
    actions[LENGTHS[0] + 3][1] = float("nan")
    replace_column(folder, "action", actions)


def drop_a_row(folder):
    table = pq.read_table(data_file(folder))
    pq.write_table(table.slice(0, len(table) - 1), data_file(folder))


def swap_frames(folder):
    frames = pq.read_table(data_file(folder)).column("frame_index").to_pylist()
    frames[1], frames[2] = frames[2], frames[1]
    replace_column(folder, "frame_index", frames)


def no_episode(folder):
    for table in (folder / "meta" / "episodes").rglob("*.parquet"):
        pq.write_table(pq.read_table(table).slice(0, 0), table)


def link_outside(folder):
    outside = folder.parent / "outside.parquet"
    shutil.move(data_file(folder), outside)
    data_file(folder).symlink_to(outside)


def other_shape(folder):
    change_features(folder, lambda features: features[TOP].update(shape=[16, 16, 3]))


EPISODES = "meta/episodes/chunk-000/file-000.parquet"
DATA = "data/chunk-000/file-000.parquet"
FILM = f"videos/{TOP}/chunk-000/file-000.mp4"
INFO = "meta/info.json"


@pytest.mark.parametrize(
    ("breaks", "file", "what", "mend"),
    [
        (lambda f: (f / INFO).unlink(), "", "holds no meta/info.json", "the folder that contains"),
        (lambda f: (f / INFO).write_text("{"), INFO, "holds no JSON", "again"),
        (lambda f: change_info(f, codebase_version="v2.1"), INFO, "'v2.1'", "lerobot.scripts"),
        (lambda f: change_info(f, codebase_version="v9.0"), INFO, "'v9.0'", "the revision v3.0"),
        (lambda f: change_info(f, fps=0), INFO, "fps is 0", "again"),
        (no_episode, "meta/episodes", "lists no episode", "record"),
        (lambda f: cut(f / EPISODES, 0.5), EPISODES, "damaged or no parquet file", "again"),
        (lambda f: cut(data_file(f), 0.6), DATA, "damaged or no parquet file", "again"),
        (lambda f: data_file(f).write_bytes(b""), DATA, "damaged or no parquet file", "again"),
        (lambda f: data_file(f).unlink(), DATA, "no such file; it holds 4 episodes", "episodes:"),
        (lambda f: film_of(f).unlink(), FILM, "no such file; it holds 4 episodes", "episodes:"),
        (spoil_action, DATA, "action: 1 of 27 values of episode 1 are not finite, first at frame 3",
         "episodes:"),
        (drop_a_row, DATA, "episode 3 has 5 rows, but meta/episodes says 6", "episodes:"),
        (swap_frames, DATA, "frames of episode 0 do not follow", "episodes:"),
        (lambda f: change_features(f, lambda x: x.pop("action")), INFO,
         "features.action: no such feature of numbers", "record them"),
        (lambda f: change_info(f, data_path="../{chunk_index}/{file_index}.parquet"), INFO,
         "data_path: '../0/0.parquet' leads out of", "trust"),
        (lambda f: change_info(f, video_path="/etc/{video_key}.mp4"), INFO,
         f"video_path: '/etc/{TOP}.mp4' leads out of", "trust"),
        (lambda f: change_info(f, data_path="{file_index.__class__}"), INFO,
         "no template of paths", "again"),
        (lambda f: change_info(f, data_path="{file_index:099999999d}"), INFO,
         "no template of paths", "again"),
        (link_outside, INFO, "is a link out of", "trust"),
        (lambda f: change_features(f, lambda x: x["action"].update(shape=[4])), DATA,
         "action: rows hold 3 values, but meta/info.json says 4", "meta/info.json"),
        (lambda f: change_features(f, lambda x: x.update(reward={"dtype": "float32", "shape": [1]}))
         or change_info(f, codebase_version="v1.6"), INFO, "'v1.6'", "older LeRobot"),
    ],
)  # fmt: skip
def test_damage_is_named_with_file_key_and_mend(damaged, breaks, file, what, mend):
    folder = damaged()
    breaks(folder)
    with pytest.raises(DatasetError) as caught:
        ready(folder)
    text = str(caught.value)
    assert str(folder / file) in text
    assert what in text
    assert mend in text.split("Mend: ")[1]


@pytest.mark.parametrize(
    ("breaks", "what"),
    [
        (lambda f: cut(film_of(f), 0.6), r"top, episode \d, \d\.\d00 s"),
        (lambda f: film_of(f).write_bytes(b"no film at all"), r"top, episode 0, 0\.000 s: no read"),
        (lambda f: film_of(f).write_bytes(b""), r"top, episode 0, 0\.000 s: no readable film"),
        (other_shape, r"32 x 48 px \(height x width\), but meta/info.json says 16 x 16"),
    ],
)
def test_damaged_films_are_named_with_file_episode_and_time(damaged, tmp_path, breaks, what):
    folder = damaged()
    breaks(folder)
    data = module(folder, storage="memmap", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DatasetError, match=what) as caught:
        data.setup()
    assert str(film_of(folder)) in str(caught.value)
    assert not list((tmp_path / "cache").glob("*/store.json"))


def test_intact_episodes_of_a_cut_film_can_still_be_used(damaged):
    folder = damaged()
    with av.open(str(film_of(folder))) as film:
        packets = [packet for packet in film.demux(video=0) if packet.pos is not None]
    film_of(folder).write_bytes(film_of(folder).read_bytes()[: packets[LENGTHS[0] + 2].pos])
    with pytest.raises(DatasetError, match="episode 1, 0"):
        ready(folder)
    assert len(ready(folder, episodes=[0]).train_dataset) == LENGTHS[0]


def test_a_damaged_picture_is_named_with_episode_and_frame(damaged):
    folder = damaged("image")
    pictures = pq.read_table(data_file(folder)).column(TOP).to_pylist()
    pictures[LENGTHS[0] + 2]["bytes"] = pictures[0]["bytes"][:40]
    replace_column(folder, TOP, pictures)
    with pytest.raises(DatasetError, match="top, episode 1, frame 2: holds a damaged picture"):
        ready(folder)


def test_row_groups_may_be_of_any_size(damaged, recordings_made):
    folder = damaged("image")
    pq.write_table(pq.read_table(data_file(folder)), data_file(folder), row_group_size=4)
    assert ready(folder).fingerprint == ready(recordings_made["image"]).fingerprint


def test_the_named_converter_exists():
    """LeRobot moves it now and then."""
    assert importlib.util.find_spec("lerobot.scripts.convert_dataset_v21_to_v30") is not None


def test_no_such_folder_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    for arguments in (
        {"path": tmp_path / "no"},
        {"path": "user/name", "root": str(tmp_path / "x")},
    ):
        with pytest.raises(DatasetError, match="no such folder"):
            _ = module(**arguments).source


def test_an_unreachable_hub_is_said_with_a_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path))
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(DatasetError) as caught:
        _ = module("user/absent").source
    assert "the hub did not give it (Name or service not known)" in str(caught.value)
    assert "hf download --repo-type dataset user/absent --local-dir" in str(caught.value)


def test_only_the_files_of_chosen_episodes_are_fetched(recordings_made, tmp_path, monkeypatch):
    """A hub of one repository, whose main branch has the data and no tag v3.0."""
    import huggingface_hub
    from huggingface_hub.errors import RevisionNotFoundError

    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path / "home"))
    snapshot = tmp_path / "datasets--user--name" / "snapshots" / "abc123"
    fetched = []

    def download(repo_id, repo_type, revision, allow_patterns):
        assert (repo_id, repo_type) == ("user/name", "dataset")
        if revision == "v3.0":
            raise RevisionNotFoundError("404", response=_Response())
        assert revision in (None, "abc123")
        for file in recordings_made["apart"].rglob("*"):
            relative = file.relative_to(recordings_made["apart"])
            if file.is_file() and any(
                relative.match(pattern) or str(relative).startswith(pattern.removesuffix("*"))
                for pattern in allow_patterns
            ):
                (snapshot / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, snapshot / relative)
                fetched.append(str(relative))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    data = ready("user/name", episodes=[1], camera_names=["top"])
    assert len(data.train_dataset) == LENGTHS[1]
    assert sorted(name for name in fetched if not name.startswith("meta/")) == [
        "data/chunk-000/file-001.parquet",
        f"videos/{TOP}/chunk-000/file-001.mp4",
    ]


class _Response:
    headers: dict = {}  # noqa: RUF012
    request = None
    status_code = 404


def test_a_data_set_recorded_by_lerobot_is_found_by_its_name(films, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path))
    shutil.copytree(films, tmp_path / "user" / "recorded")
    assert module("user/recorded").action_dim == 3


# Inspection


def test_inspection_counts_what_lerobot_recorded(films):
    found, scan = inspect_dataset(films, progress=False)
    assert found.problems == []
    assert (found.episodes, found.frames, found.fps) == (4, sum(LENGTHS), FPS)
    assert (found.length_min, found.length_max) == (5, 9)
    film = next(video for video in found.videos if video.key == TOP)
    assert (film.codec, film.height, film.width) == ("av1 yuv420p", HEIGHT, WIDTH)
    assert film.frames == sum(LENGTHS)
    data = ready(films)
    actions = torch.cat([data.episode(n).actions[:, 0] for n in range(4)])
    np.testing.assert_allclose(found.columns["action"].mean, actions.mean(dim=0), atol=1e-6)
    tensors = [*data.store.images.values(), *data.store.columns.values()]
    assert found.ram_bytes == sum(tensor.nbytes for tensor in tensors)
    assert draw_strip(scan).shape[0] == 2 * (128 + 18 + 2 + 20)


def test_inspection_lists_everything_that_is_wrong_at_once(damaged, capsys):
    folder = damaged("apart")
    films = sorted((folder / "videos" / TOP).rglob("*.mp4"))
    films[0].unlink()
    cut(films[2], 0.5)
    change_info(folder, total_frames=5)
    found, _ = inspect_dataset(folder, progress=False)
    assert {problem.file for problem in found.problems} == {str(films[0]), str(films[2])}
    assert (found.episodes, found.bad_episodes) == (2, 2)
    assert any("total_frames is 5" in warning for warning in found.warnings)
    assert main(["inspect", "--dataset_repo_id", str(folder), "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 2


def test_inspection_of_a_good_folder_ends_with_status_0(films, capsys, tmp_path):
    command = ["inspect", "--dataset_repo_id", str(films), "--output_dir", str(tmp_path / "out")]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "a LeRobot data set, not HDF5" in text
    assert "No problem found." in text
    assert (tmp_path / "out" / "frames.png").read_bytes().startswith(b"\x89PNG")


def test_inspection_does_not_wait_for_torch(films):
    code = (
        "import sys; from analyze import main; main(sys.argv[1:]); "
        "print('slow:', *(n for n in ('torch', 'lightning', 'lerobot') if n in sys.modules))"
    )
    words = ["inspect", "--dataset_repo_id", str(films)]
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "slow:", done.stdout + done.stderr


def test_the_film_is_read_in_one_pass(films, monkeypatch):
    """Seeking back would decode frames twice."""
    decoded = []
    true_decode = lerobot_files._Film._decode

    def counting(film):
        for frame in true_decode(film):
            decoded.append(frame[0])
            yield frame

    monkeypatch.setattr(lerobot_files._Film, "_decode", counting)
    ready(films, camera_names=["top"])
    assert len(decoded) == sum(LENGTHS)
