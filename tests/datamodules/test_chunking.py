"""The gather of whole batches against a slow reference that reads as the rule is written."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.chunking import ChunkDataset
from datamodules.frame_store import StoreShapes, build_store


def make_store(lengths, numbers=None):
    """A store in which every frame is told apart by all it holds."""
    numbers = tuple(range(len(lengths))) if numbers is None else numbers
    columns = {"action": 2, "state": 3, "simulator_state": 1, "environment_state": 1}
    shapes = StoreShapes({"top": (2, 3)}, columns, numbers, tuple(lengths))

    def fill(writer):
        frames = np.arange(shapes.frames)
        pixels = np.arange(2 * 3 * 3).reshape(2, 3, 3)
        images = (frames[:, None, None, None] * 18 + pixels) % 256
        writer.write_images("top", 0, images.astype(np.uint8))
        for offset, (name, dim) in enumerate(columns.items()):
            values = frames[:, None] * 100 + np.arange(dim) + 10 * offset
            writer.write_column(name, 0, values.astype(np.float32))

    return build_store(shapes, fill, progress=False)


def slow_sample(store, episode, step, chunk_size, n_obs_steps, action_start):
    """One sample, by the words of the rule."""
    rows = store.rows(episode)
    length = rows.stop - rows.start
    actions, is_pad = [], []
    for ahead in range(action_start, action_start + chunk_size):
        wanted = step + ahead
        is_pad.append(wanted < 0 or wanted >= length)
        nearest = min(max(wanted, 0), length - 1)
        actions.append(store.columns["action"][rows.start + nearest])
    history = [rows.start + max(0, step - back) for back in reversed(range(n_obs_steps))]
    return actions, is_pad, history


@settings(max_examples=60)
@given(st.data())
def test_gather_equals_the_slow_reference(data):
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    chunk_size = data.draw(st.integers(1, 12))
    n_obs_steps = data.draw(st.integers(1, 4))
    action_start = data.draw(st.integers(1 - n_obs_steps, 2))
    drop = data.draw(st.integers(0, max(lengths) - 1))
    every = data.draw(st.integers(1, 3))
    store = make_store(lengths, tuple(range(5, 5 + len(lengths))))
    episodes = [number for number in store.shapes.episode_numbers if data.draw(st.booleans())]
    episodes.append(5 + int(np.argmax(lengths)))
    episodes = list(dict.fromkeys(episodes))
    arguments = (store, episodes, chunk_size, n_obs_steps, drop, every, action_start)
    expected = [
        (number, step)
        for number in episodes
        for step in range(0, lengths[number - 5] - drop, every)
    ]
    pads = [slow_sample(store, *at, chunk_size, n_obs_steps, action_start)[1] for at in expected]
    if any(map(all, pads)):
        with pytest.raises(ValueError, match="nothing but padding"):
            ChunkDataset(*arguments)
        return
    dataset = ChunkDataset(*arguments)
    assert len(dataset) == len(expected)
    indices = data.draw(st.lists(st.integers(0, len(dataset) - 1), min_size=1, max_size=6))
    batch = dataset.__getitems__(indices)
    for row, index in enumerate(indices):
        number, step = expected[index]
        actions, is_pad, history = slow_sample(
            store, number, step, chunk_size, n_obs_steps, action_start
        )
        assert int(batch.episode_index[row]) == number
        assert int(batch.frame_index[row]) == step
        assert torch.equal(batch.actions[row], torch.stack(actions))
        assert batch.action_is_pad[row].tolist() == is_pad
        picture, state = batch.observation.images["top"][row], batch.observation.state
        environment = batch.observation.environment_state
        assert state is not None
        assert environment is not None
        now = history[-1]
        if n_obs_steps == 1:
            history = now
        assert torch.equal(picture, store.images["top"][history].movedim(-1, -3))
        assert torch.equal(state[row], store.columns["state"][history])
        assert torch.equal(environment[row], store.columns["environment_state"][history])
        assert batch.simulator_state is not None
        assert torch.equal(batch.simulator_state[row], store.columns["simulator_state"][now])


@pytest.mark.parametrize("n_obs_steps", [1, 2])
def test_padding_agrees_with_lerobot(n_obs_steps):
    reader = pytest.importorskip("lerobot.datasets.dataset_reader").DatasetReader
    lengths, chunk_size = (4, 7, 1), 5
    store = make_store(lengths)
    dataset = ChunkDataset(store, range(3), chunk_size, n_obs_steps, action_start=1 - n_obs_steps)
    ends = np.cumsum(lengths)
    theirs = SimpleNamespace(
        delta_indices={
            "action": list(range(1 - n_obs_steps, 1 - n_obs_steps + chunk_size)),
            "observation.state": list(range(1 - n_obs_steps, 1)),
        },
        _meta=SimpleNamespace(
            episodes=[
                {"dataset_from_index": end - length, "dataset_to_index": end}
                for length, end in zip(lengths, ends.tolist(), strict=True)
            ]
        ),
    )
    batch = dataset.__getitems__(range(len(dataset)))
    state = batch.observation.state
    assert state is not None
    for index in range(len(dataset)):
        episode = int(batch.episode_index[index])
        rows, padding = reader._get_query_indices(theirs, index, episode)
        assert torch.equal(batch.actions[index], store.columns["action"][rows["action"]])
        assert torch.equal(batch.action_is_pad[index], padding["action_is_pad"])
        history = store.columns["state"][rows["observation.state"]]
        assert torch.equal(state[index], history if n_obs_steps > 1 else history[0])


def test_pictures_are_views_of_channels_last_memory():
    pictures = ChunkDataset(make_store((5,)), [0], 3).__getitems__([0, 3]).observation.images["top"]
    assert pictures.is_contiguous(memory_format=torch.channels_last)


def test_no_sample_left_is_an_error():
    with pytest.raises(ValueError, match="drop_n_last_frames is 5"):
        ChunkDataset(make_store((5, 3)), [0, 1], 3, drop_n_last_frames=5)


def test_unknown_episode_is_an_error():
    with pytest.raises(ValueError, match="episode 7 is not loaded; loaded are 2 episodes"):
        ChunkDataset(make_store((5, 3)), [7], 3)


def test_samples_of_an_episode_are_in_order_of_time():
    dataset = ChunkDataset(make_store((3, 4, 2)), [2, 1], 3, sample_every=2)
    batch = dataset.__getitems__(dataset.samples_of(1))
    assert batch.frame_index.tolist() == [0, 2]
    assert batch.episode_index.tolist() == [1, 1]
