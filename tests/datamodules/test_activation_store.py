"""Activations on disk: what was computed comes back, whatever happens in between; or an error."""

import json
import multiprocessing
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from datamodules import activation_store
from datamodules.activation_store import (
    TORCH_DTYPES,
    ActivationShapes,
    full_identity,
    identity_key,
    open_or_build,
)
from features.taps import TokenPosition

POSITIONS = (TokenPosition("latent"), TokenPosition("top", 0, 0), TokenPosition("top", 0, 1))
SHAPES = ActivationShapes((0, 4, 7), (5, 9, 3), POSITIONS, dim=8, frames_per_batch=4)
IDENTITY = {"policy": "old", "layer": "encoder", "data": "push", "token_sampling": {"ratio": 8}}
FRAME_BYTES = 3 * 8 * 2
SHARD_MB = 9 * FRAME_BYTES / 2**20
"""Room for nine frames: shards of the pieces 4+1+4 | 4+1+3."""


class Network:
    """Known activations; counts which pieces it was asked for."""

    def __init__(self, seed: int = 0, factor: float = 1.0):
        self.content = factor * torch.randn(
            SHAPES.n_frames, 3, 8, generator=torch.Generator().manual_seed(seed)
        )
        self.asked: list[range] = []

    def __call__(self, frames: range) -> torch.Tensor:
        self.asked.append(frames)
        return self.content[frames.start : frames.stop]


def build(folder: Path, network, identity=IDENTITY, dtype="float16", shapes=SHAPES, mb=SHARD_MB):
    return open_or_build(folder, shapes, dtype, identity, network, mb, progress=False)


def everything(store) -> torch.Tensor:
    return store.read(range(SHAPES.n_frames))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_pieces_are_parts_of_one_episode():
    assert SHAPES.all_pieces == [
        range(4),
        range(4, 5),
        range(5, 9),
        range(9, 13),
        range(13, 14),
        range(14, 17),
    ]
    assert SHAPES.pieces(4) == SHAPES.all_pieces[2:5]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("mb", [SHARD_MB, 1])
def test_what_was_computed_comes_back_rounded(tmp_path, dtype, mb):
    network = Network()
    store = build(tmp_path / "s", network, dtype=dtype, mb=mb)
    assert network.asked == SHAPES.all_pieces
    expected = network.content.to(TORCH_DTYPES[dtype])
    assert torch.equal(everything(store), expected)
    for frames in (range(3, 4), range(8, 10), range(16, 17)):
        assert torch.equal(store.read(frames), expected[frames.start : frames.stop])
    assert store.bytes_read == 21 * expected[0].nbytes
    again = build(tmp_path / "s", network, dtype=dtype, mb=mb)
    assert len(network.asked) == 6, "a finished store is not computed again"
    assert torch.equal(everything(again), expected)
    shards = [load_file(file) for file in sorted((tmp_path / "s").glob("shard_*"))]
    assert torch.equal(torch.cat([shard["activations"] for shard in shards]), expected)
    index = load_file(tmp_path / "s" / "index.safetensors")
    assert index["episode_index"].tolist() == [0] * 5 + [4] * 9 + [7] * 3
    assert index["frame_index"].tolist() == [*range(5), *range(9), *range(3)]


def test_files_hold_whole_pieces_and_are_no_larger_than_asked(tmp_path):
    build(tmp_path / "s", Network())
    sizes = [len(load_file(f)["activations"]) for f in sorted((tmp_path / "s").glob("shard_*"))]
    assert sizes == [9, 8]
    build(tmp_path / "one", Network(), mb=1e-9)
    assert len(list((tmp_path / "one").glob("shard_*"))) == len(SHAPES.all_pieces)


def test_reading_maps_the_file_and_lets_nobody_write_to_it(tmp_path):
    network = Network()
    store = build(tmp_path / "s", network)
    store.read(range(9)).zero_()
    store.read(range(17)).zero_()
    assert torch.equal(everything(store), network.content.half())
    (mapped,) = {
        line.split()[-1]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith("shard_00001.safetensors") and str(tmp_path) in line
    }
    assert mapped == str(tmp_path / "s" / "shard_00001.safetensors")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_statistics_are_those_of_the_stored_vectors(tmp_path, dtype):
    network = Network(factor=3.0)
    network.content += 50
    store = build(tmp_path / "s", network, dtype=dtype)
    vectors = network.content.to(TORCH_DTYPES[dtype]).double().flatten(0, 1)
    statistics = build(tmp_path / "s", network, dtype=dtype).statistics
    assert statistics.n_vectors == len(vectors) == 51
    torch.testing.assert_close(statistics.mean, vectors.mean(0), rtol=1e-12, atol=0)
    variance = vectors.var(0, correction=0)
    torch.testing.assert_close(statistics.variance, variance, rtol=1e-10, atol=0)
    assert statistics.mean_norm == pytest.approx(float(vectors.norm(dim=1).mean()), rel=1e-12)
    assert store.key == build(tmp_path / "s", network, dtype=dtype).key


def test_the_key_depends_on_identity_and_content(tmp_path):
    keys = {
        build(tmp_path / "a", Network()).key,
        build(tmp_path / "b", Network(1)).key,
        build(tmp_path / "c", Network(), {**IDENTITY, "policy": "new"}).key,
        build(tmp_path / "d", Network(), dtype="bfloat16").key,
    }
    assert len(keys) == 4
    assert build(tmp_path / "e", Network()).key in keys


def test_a_killed_build_goes_on_at_the_first_missing_shard(tmp_path):
    whole = tmp_path / "whole"
    build(whole, Network())
    folder = tmp_path / "killed"

    class Killed(Network):
        def __call__(self, frames):
            if frames.start == 13:
                (folder / "shard_00001.safetensors.1.part").write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(frames)

    run = multiprocessing.get_context("fork").Process(target=build, args=(folder, Killed()))
    run.start()
    run.join()
    assert run.exitcode == -signal.SIGKILL
    half = contents(folder)
    assert "shard_00000.safetensors" in half
    assert "shard_00001.safetensors" not in half
    network = Network()
    build(folder, network)
    assert network.asked == SHAPES.all_pieces[3:], "only the second shard was missing"
    assert contents(folder) == contents(whole)


def test_an_interrupted_build_keeps_the_pieces_it_began_with(tmp_path):
    """Another batch size would round differently: shards of one store share theirs."""
    folder = tmp_path / "s"

    class Stops(Network):
        def __call__(self, frames):
            if frames.start == 13:
                raise KeyboardInterrupt
            return super().__call__(frames)

    with pytest.raises(KeyboardInterrupt):
        build(folder, Stops())
    assert not list(folder.glob("*.part"))
    network = Network()
    coarse = ActivationShapes((0, 4, 7), (5, 9, 3), POSITIONS, 8, frames_per_batch=100)
    store = build(folder, network, shapes=coarse, mb=1)
    assert network.asked == SHAPES.all_pieces[3:]
    assert store.shapes == SHAPES
    assert torch.equal(everything(store), network.content.half())


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def garble(file: Path) -> None:
    file.write_bytes(b"\xff" * 400)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def reshape(file: Path) -> None:
    save_file({"activations": torch.zeros(1, 3, 8).half()}, file, {"crc32": "0"})


@pytest.mark.parametrize("damage", [cut, flip, garble, empty, reshape, Path.unlink])
def test_a_damaged_shard_is_made_anew(tmp_path, damage):
    folder = tmp_path / "s"
    build(folder, Network())
    before = contents(folder)
    damage(folder / "shard_00000.safetensors")
    network = Network()
    store = build(folder, network)
    assert network.asked == SHAPES.all_pieces[:3]
    assert contents(folder) == before
    assert torch.equal(everything(store), network.content.half())


@pytest.mark.parametrize("damage", [cut, garble, empty, Path.unlink])
def test_a_damaged_index_is_made_anew_without_the_policy(tmp_path, damage):
    folder = tmp_path / "s"
    build(folder, Network())
    before = contents(folder)
    damage(folder / "index.safetensors")
    network = Network()
    build(folder, network)
    assert not network.asked
    assert contents(folder) == before


def test_shards_whose_manifest_is_lost_are_not_trusted(tmp_path):
    folder = tmp_path / "s"
    for damage in (cut, Path.unlink, lambda file: file.write_text('{"statistics": null}')):
        build(folder, Network(seed=1), {**IDENTITY, "policy": "someone's"})
        damage(folder / "manifest.json")
        network = Network()
        store = build(folder, network)
        assert network.asked == SHAPES.all_pieces
        assert torch.equal(everything(store), network.content.half())
        for file in folder.iterdir():
            file.unlink()


def test_a_manifest_that_was_changed_by_hand_is_not_believed(tmp_path):
    folder = tmp_path / "s"
    build(folder, Network(seed=1), {**IDENTITY, "policy": "new"})
    file = folder / "manifest.json"
    forged = json.loads(file.read_text())
    forged["identity"]["policy"] = "old"
    file.write_text(json.dumps(forged))
    network = Network()
    assert torch.equal(everything(build(folder, network)), network.content.half())


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"policy": "new"}, ["policy: 'old' there, 'new' asked for"]),
        ({"data": "aloha", "layer": "decoder"}, ["data: 'push' there", "layer: 'encoder' there"]),
        ({"token_sampling": {"ratio": 4}}, [r"\{'ratio': 8\} there, \{'ratio': 4\} asked for"]),
    ],
)
def test_a_store_of_something_else_is_refused_by_name(tmp_path, changed, named):
    """A new checkpoint on a data set of the same name must not meet old activations."""
    folder = tmp_path / "s"
    build(folder, Network())
    before = contents(folder)
    network = Network(1)
    for pattern in named:
        with pytest.raises(ValueError, match=pattern):
            build(folder, network, {**IDENTITY, **changed})
    with pytest.raises(ValueError, match="other activations") as refused:
        build(folder, network, {**IDENTITY, **changed})
    for field in IDENTITY.keys() - changed.keys():
        assert f"{field}:" not in str(refused.value), "only what differs is named"
    assert not network.asked
    assert contents(folder) == before


def test_an_unfinished_store_of_something_else_is_refused_too(tmp_path):
    def fail(frames):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "s", fail)
    with pytest.raises(ValueError, match="policy"):
        build(tmp_path / "s", Network(), {**IDENTITY, "policy": "new"})


def test_every_field_of_a_difference_is_named(tmp_path, monkeypatch):
    folder = tmp_path / "s"
    build(folder, Network())
    monkeypatch.setattr(activation_store, "CODE_VERSION", activation_store.CODE_VERSION + 1)
    other = ActivationShapes((0, 4, 8), (5, 9, 4), POSITIONS[:2], dim=4)
    with pytest.raises(ValueError, match="other activations") as refused:
        build(folder, Network(), dict.fromkeys(IDENTITY, "new"), "float32", other)
    named = [*IDENTITY, "code", "dtype", "dim", "episode_lengths", "episode_numbers", "positions"]
    for field in named:
        assert f"{field}: " in str(refused.value)


def test_identity_keys_differ_whenever_a_value_does():
    base = full_identity(IDENTITY, "float16")
    keys = {identity_key(base), identity_key(full_identity(IDENTITY, "float32"))}
    keys |= {identity_key(full_identity({**IDENTITY, name: "?"}, "float16")) for name in IDENTITY}
    assert len(keys) == 2 + len(IDENTITY)
    assert identity_key(dict(reversed(base.items()))) in keys


def test_values_too_large_for_float16_name_bfloat16(tmp_path):
    network = Network(factor=1e5)
    with pytest.raises(ValueError, match=r"too large for dtype: float16.*set dtype to bfloat16"):
        build(tmp_path / "half", network)
    assert not list((tmp_path / "half").glob("shard_*"))
    stored = everything(build(tmp_path / "brain", network, dtype="bfloat16"))
    assert torch.equal(stored, network.content.bfloat16())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_activations_that_are_no_numbers_are_not_stored(tmp_path, bad):
    network = Network()
    network.content[12, 1, 2] = bad
    with pytest.raises(ValueError, match="not finite"):
        build(tmp_path / "s", network)


def test_a_full_disk_is_noticed_before_the_policy_runs(tmp_path, monkeypatch):
    need = 17 * FRAME_BYTES
    monkeypatch.setattr(
        activation_store.shutil, "disk_usage", lambda _: SimpleNamespace(free=need - 1)
    )
    network = Network()
    with pytest.raises(ValueError, match=f"need {need} bytes.*only {need - 1} are free.*stream"):
        build(tmp_path / "s", network)
    assert not network.asked
    monkeypatch.setattr(activation_store.shutil, "disk_usage", lambda _: SimpleNamespace(free=need))
    build(tmp_path / "s", network)
    monkeypatch.setattr(activation_store.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    build(tmp_path / "s", network)


def test_a_cache_that_cannot_be_written_names_the_mend(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="another cache_dir, or set storage to stream"):
        build(tmp_path / "file" / "s", Network())


def test_two_runs_at_once_compute_once(tmp_path):
    networks = [Network() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda network: build(tmp_path / "s", network), networks))
    assert sum(len(network.asked) for network in networks) == len(SHAPES.all_pieces)
    for store in stores:
        np.testing.assert_array_equal(everything(store), networks[0].content.half())
