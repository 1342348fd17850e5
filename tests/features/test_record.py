"""A record against the naive loop: nothing is lost, doubled or shifted, in memory and on disk."""

import pytest
import torch
from planted_records import POSITIONS, record_of
from pyarrow import parquet

from autoencoders.sae import SparseAutoencoder, build_autoencoder
from features.record import FeatureRecord, read_record, record_features, write_record

LENGTHS = [3, 1, 6, 2]
"""Of episodes 7, 8, 9, 10."""
N_LATENTS = 20


@pytest.fixture(scope="module")
def sae() -> SparseAutoencoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sae = build_autoencoder("batch_topk", d_in=8, n_latents=N_LATENTS, k=3)
        sae.initialise(torch.randn(500, 8))
    return sae.eval()


@pytest.fixture(scope="module")
def activations() -> torch.Tensor:
    """Of twelve frames; nothing fires in the first and in the last frame, nor at one token."""
    values = torch.randn(12, len(POSITIONS), 8, generator=torch.Generator().manual_seed(1)) * 2
    values[[0, -1]] = 0
    values[4, 1] = 0
    return values


def batches(activations: torch.Tensor, batch_size: int):
    episode = torch.repeat_interleave(torch.arange(4) + 7, torch.tensor(LENGTHS))
    step = torch.cat([torch.arange(length) for length in LENGTHS])
    for start in range(0, len(activations), batch_size):
        part = slice(start, start + batch_size)
        yield activations[part], episode[part], step[part]


def by_hand(sae: SparseAutoencoder, activations: torch.Tensor) -> torch.Tensor:
    """[frame token latent], one vector after the other."""
    codes = torch.zeros(len(activations), len(POSITIONS), N_LATENTS)
    for frame in range(len(activations)):
        for token in range(len(POSITIONS)):
            codes[frame, token] = sae.encode(activations[frame, token]).detach()
    return codes


def same(one: FeatureRecord, other: FeatureRecord) -> bool:
    names = ("frame", "token", "latent", "value", "episode_index", "frame_index")
    return all(
        torch.equal(getattr(one, name), getattr(other, name))
        and getattr(one, name).dtype == getattr(other, name).dtype
        for name in names
    ) and (one.n_latents, one.positions, dict(one.metadata)) == (
        other.n_latents,
        other.positions,
        dict(other.metadata),
    )


@pytest.mark.parametrize("batch_size", [1, 2, 5, 12])
def test_every_frame_is_recorded_as_the_naive_loop_does(sae, activations, batch_size, monkeypatch):
    monkeypatch.setattr("features.record.ENCODE_BYTES", 4 * N_LATENTS * 4)
    record = record_features(sae, batches(activations, batch_size), POSITIONS)
    expected = by_hand(sae, activations)
    assert 0 < (expected > 0).sum() < expected.numel() / 2
    assert not expected[0].any(), "the first frame was to be silent"
    assert len(record) == 12
    assert record.episode_index.tolist() == [7] * 3 + [8] + [9] * 6 + [10] * 2
    assert record.frame_index.tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4, 5, 0, 1]
    found = torch.zeros_like(expected)
    found[record.frame.long(), record.token.long(), record.latent.long()] = record.value
    torch.testing.assert_close(found, expected)
    assert len(record.value) == (expected > 0).sum(), "an activation came twice"


def test_reading_gives_back_what_was_written(sae, activations, tmp_path, monkeypatch):
    # Several row groups.
    monkeypatch.setattr("features.record.ROWS_AT_ONCE", 10)
    metadata = {"layer": "encoder", "sae": "ab12", "policy": None, "code_version": "0.1.0"}
    record = record_features(sae, batches(activations, 5), POSITIONS, metadata)
    folder = write_record(tmp_path / "a" / "b", record)
    assert same(read_record(folder), record)
    assert sorted(path.name for path in folder.iterdir()) == [
        "activations.parquet",
        "frames.parquet",
    ]
    written = parquet.ParquetFile(folder / "activations.parquet")
    assert written.num_row_groups > 3
    table = written.read()
    assert table["episode"].to_pylist() == record.episode_index[record.frame.long()].tolist()
    assert table["frame"].to_pylist() == record.frame_index[record.frame.long()].tolist()
    silent = parquet.read_table(folder / "frames.parquet").to_pylist()[0]
    assert silent == {"episode": 7, "frame": 0, "n_active": 0}


def test_a_record_without_any_activation_keeps_its_frames(tmp_path):
    record = record_of(torch.zeros(4, 3, 5), [2, 2])
    assert same(read_record(write_record(tmp_path, record)), record)
    assert record.frames_by_latents().tolist() == [[0.0] * 5] * 4


def test_a_failed_write_leaves_the_old_record(tmp_path, monkeypatch):
    old = record_of(torch.rand(4, 3, 5), [2, 2])
    write_record(tmp_path, old)

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(parquet.ParquetWriter, "write_table", fail)
    with pytest.raises(OSError, match="disk full"):
        write_record(tmp_path, record_of(torch.rand(4, 3, 5), [2, 2]))
    assert len([*tmp_path.iterdir()]) == 2
    assert same(read_record(tmp_path), old)


def test_halves_of_two_records_are_no_record(tmp_path):
    write_record(tmp_path / "one", record_of(torch.rand(4, 3, 5), [2, 2]))
    write_record(tmp_path / "two", record_of(torch.rand(4, 3, 5), [2, 2]))
    (tmp_path / "one" / "frames.parquet").replace(tmp_path / "two" / "frames.parquet")
    with pytest.raises(ValueError, match="different records"):
        read_record(tmp_path / "two")
    with pytest.raises(ValueError, match=r"no frames\.parquet"):
        read_record(tmp_path / "one")


def test_dense_views_agree_with_dense_arithmetic():
    generator = torch.Generator().manual_seed(0)
    dense = torch.rand(10, 3, 6, generator=generator)
    dense[torch.rand(10, 3, 6, generator=generator) < 0.7] = 0
    dense[..., 4] = 0
    # Two equal tokens: the first one counts.
    dense[3, :, 2] = torch.tensor([0.0, 0.5, 0.5])
    record = record_of(dense, [4, 6])
    torch.testing.assert_close(record.frames_by_latents(), dense.amax(1))
    torch.testing.assert_close(
        record.frames_by_latents([5, 4, 2], "sum", [0, 2]), dense[:, [0, 2]][..., [5, 4, 2]].sum(1)
    )
    assert record.frames_by_latents([]).shape == (10, 0)
    for latent in range(6):
        torch.testing.assert_close(record.spatial(latent), dense[..., latent].mean(0).double())
    total, count = record.token_totals()
    torch.testing.assert_close(total, dense.sum(0).T.double())
    torch.testing.assert_close(count, (dense > 0).sum(0).T)
    activity = record.frame_activity
    frames = activity.frame[activity.start[2] : activity.start[3]].long()
    assert frames.tolist() == dense.amax(1)[:, 2].nonzero()[:, 0].tolist()
    tokens = activity.token[activity.start[2] : activity.start[3]].long()
    assert tokens.tolist() == [int(dense[frame, :, 2].argmax()) for frame in frames]
    assert tokens[frames == 3] == 1

    kept = torch.tensor([False, True, True, True, *[False] * 4, True, True])
    part = record.rows(kept)
    torch.testing.assert_close(part.frames_by_latents(), dense[kept].amax(1))
    assert part.episode_index.tolist() == [0, 0, 0, 1, 1]
    assert part.frame_index.tolist() == [1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match=r"latents \[6\]"):
        record.frames_by_latents([1, 6])


def test_frames_out_of_order_are_refused(sae, activations):
    whole = list(batches(activations, 3))
    with pytest.raises(ValueError, match="step 0 comes after step 2"):
        record_features(sae, [whole[0], whole[0]], POSITIONS)
    with pytest.raises(ValueError, match="several pieces"):
        record_features(sae, [whole[0], whole[1], whole[0]], POSITIONS)
    with pytest.raises(ValueError, match="2 positions"):
        record_features(sae, whole, POSITIONS[:2])
    with pytest.raises(ValueError, match="no frame"):
        record_features(sae, [], POSITIONS)
