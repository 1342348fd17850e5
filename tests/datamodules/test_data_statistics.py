import numpy as np
import pytest
import torch

from datamodules import statistics
from datamodules.chunking import ChunkDataset
from datamodules.frame_store import StoreShapes, build_store
from datamodules.statistics import compute_statistics


def make_store(lengths=(6, 9, 4), dim=2, state_dim=2, constant=None, size=(5, 4), seed=0):
    rng = np.random.default_rng(seed)
    shapes = StoreShapes(
        {"top": size},
        {"action": dim, "state": state_dim},
        tuple(range(len(lengths))),
        tuple(lengths),
    )
    actions = rng.normal(100, 30, (shapes.frames, dim)).astype(np.float32)
    if constant is not None:
        actions[:, constant] = 0.1

    def fill(writer):
        # Channels of their own brightness, so that exchanged channels are noticed.
        images = rng.integers(0, 100, (shapes.frames, *size, 3)) + np.array([0, 50, 150])
        writer.write_images("top", 0, images.astype(np.uint8))
        writer.write_column("action", 0, actions)
        states = rng.normal(size=(shapes.frames, state_dim)) * 5
        writer.write_column("state", 0, states.astype(np.float32))

    return build_store(shapes, fill, progress=False)


def expect(found, values) -> None:
    """Compare with numpy on the same values, sample by dimension."""
    values = np.asarray(values, np.float64)
    for name, expected in {
        "mean": values.mean(axis=0),
        "std": values.std(axis=0),
        "min": values.min(axis=0),
        "max": values.max(axis=0),
    }.items():
        np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-5, atol=1e-6)
    quantiles = np.quantile(values, [0.01, 0.99], axis=0)
    np.testing.assert_allclose(torch.stack([found.q01, found.q99]), quantiles, rtol=1e-5)


def test_statistics_come_from_the_training_episodes_alone():
    store = make_store()
    found = compute_statistics(store, [0, 2], chunk_size=3)
    rows = np.r_[0:6, 15:19]
    expect(found.action, store.columns["action"].numpy()[rows])
    assert found.state is not None
    expect(found.state, store.columns["state"].numpy()[rows])


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 50])
def test_relative_actions_count_each_unpadded_step_of_each_chunk(chunk_size):
    store = make_store()
    found = compute_statistics(store, [1, 2], chunk_size).relative_action
    dataset = ChunkDataset(store, [1, 2], chunk_size)
    batch = dataset.__getitems__(range(len(dataset)))
    assert batch.observation.state is not None
    relative = batch.actions.double() - batch.observation.state.double()[:, None]
    assert found is not None
    expect(found, relative[~batch.action_is_pad])


def test_large_sets_keep_exact_moments_and_close_quantiles(monkeypatch):
    store = make_store(lengths=(300, 400))
    exact = compute_statistics(store, [0, 1], 50).relative_action
    monkeypatch.setattr(statistics, "RELATIVE_SAMPLE", 5000)
    sampled = compute_statistics(store, [0, 1], 50).relative_action
    assert exact is not None
    assert sampled is not None
    for name in ("mean", "std", "min", "max"):
        assert torch.equal(getattr(exact, name), getattr(sampled, name))
    assert not torch.equal(exact.q01, sampled.q01)
    assert float((exact.q01 - sampled.q01).abs().max()) < 0.15 * float(exact.std.min())


def test_no_relative_actions_when_dimensions_differ():
    assert compute_statistics(make_store(state_dim=3), [0], 3).relative_action is None


def test_channels_of_pictures_are_in_0_to_1():
    store = make_store()
    found = compute_statistics(store, [0, 1], 3).images["top"]
    pixels = store.images["top"][:15].numpy().reshape(-1, 3) / 255
    for name in ("mean", "std", "min", "max"):
        expected = getattr(pixels, name)(axis=0)
        np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-5)
    nearest = np.quantile(pixels, [0.01, 0.99], axis=0, method="inverted_cdf")
    np.testing.assert_allclose(torch.stack([found.q01, found.q99]), nearest, rtol=1e-5)


def test_a_sample_of_pictures_is_seeded_and_close(monkeypatch):
    store = make_store(lengths=(40, 60), size=(16, 12))
    exact = compute_statistics(store, [0, 1], 3).images["top"]
    monkeypatch.setattr(statistics, "IMAGE_SAMPLE_FRAMES", 20)
    monkeypatch.setattr(statistics, "IMAGE_SAMPLE_PX", 1000)
    sampled = [compute_statistics(store, [0, 1], 3, seed=4).images["top"] for _ in range(2)]
    assert torch.equal(sampled[0].mean, sampled[1].mean)
    torch.testing.assert_close(sampled[0].mean, exact.mean, atol=0.03, rtol=0)
    assert not torch.equal(sampled[0].mean, exact.mean)


def test_constant_dimension_has_zero_deviation_and_a_warning():
    store = make_store(constant=1, state_dim=3)
    with pytest.warns(UserWarning, match="action never changes in dimension 1 "):
        found = compute_statistics(store, [0, 1, 2], 3)
    assert float(found.action.std[1]) == 0
    assert float(found.action.std[0]) > 0


def test_large_offsets_do_not_cost_precision():
    store = make_store()
    store.columns["action"].add_(1e6)
    expect(compute_statistics(store, [0, 1], 3).action, store.columns["action"][:15].numpy())
