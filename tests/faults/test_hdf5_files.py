"""HDF5 that is cut, locked, left by a killed writer, flipped, linked in circles, oddly shaped."""

import os
import resource
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest
from fuzz_hdf5 import write_aloha, write_demos
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from analyze import main
from datamodules.convert import HDF5Demonstrations
from datamodules.convert import write_demos as convert_to_demos
from datamodules.errors import DatasetError
from datamodules.hdf5 import HDF5DataModule
from datamodules.layouts import HDF5Schema
from datamodules.repack import repack
from datamodules.scan import dataset_paths, scan_hdf5
from datamodules.verify import verify, write_list
from envs import demonstrations


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def flip(file: Path, place: int, bit: int = 2) -> None:
    damaged = bytearray(file.read_bytes())
    damaged[place] ^= 1 << bit
    file.write_bytes(damaged)


def module(path: Path, **arguments) -> HDF5DataModule:
    defaults = {"chunk_size": 2, "val_fraction": 0.0, "progress": False}
    return HDF5DataModule(str(path), **{**defaults, **arguments})


# Row 8: not whole


@pytest.mark.fault(8)
@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda data: b"", "the file is empty (0 bytes)"),
        (lambda data: data[: len(data) // 2], "the file is truncated"),
        (lambda data: data[:-1], "the file is truncated"),
        (lambda data: data[:100], "the file is truncated"),
        (lambda data: b"not a recording" * 100, "is not an HDF5 file"),
        (lambda data: b"\0" * 64 + data[64:], "is not an HDF5 file"),
    ],
)
def test_damaged_files_are_named(tmp_path, damage, what):
    path = write_demos(tmp_path / "d.hdf5")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DatasetError) as error:
        scan_hdf5(path)
    assert f"{path}: {what}" in str(error.value)
    assert "Mend: " in str(error.value)


@contextmanager
def writer(path: Path, work: Callable[[h5py.File], None]) -> Iterator[int]:
    """Another process that has the file open and has written to it; its id."""
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        file = h5py.File(path, "w", libver="latest")
        work(file)
        os.write(tell, b".")
        signal.pause()
        os._exit(1)
    try:
        assert os.read(told, 1) == b"."
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(told)
        os.close(tell)


def record(file: h5py.File) -> None:
    file.attrs["num_demos"] = 1
    actions = file.create_dataset("demo_0/actions", (0, 2), "f4", maxshape=(None, 2), chunks=(4, 2))
    actions.resize((400, 2))
    actions[:] = 1


def record_for_readers(file: h5py.File) -> None:
    record(file)
    file.swmr_mode = True
    file["demo_0/actions"].flush()


@pytest.mark.fault(8)
@pytest.mark.parametrize(
    ("work", "what", "mend"),
    [
        (record, "is not an HDF5 file|the file is truncated|was killed before", "again"),
        (record_for_readers, "was killed before closing it", "run h5clear -s d.hdf5"),
    ],
)
def test_a_file_whose_writer_was_killed_is_named_with_a_mend(tmp_path, work, what, mend):
    path = tmp_path / "d.hdf5"
    with writer(path, work) as process:
        os.kill(process, signal.SIGKILL)
    before = path.read_bytes()
    with pytest.raises(DatasetError, match=what) as error:
        scan_hdf5(path)
    assert str(path) in str(error.value)
    assert mend in str(error.value).split("Mend: ")[1]
    assert path.read_bytes() == before


@pytest.mark.fault(8)
def test_a_file_that_is_being_written_says_so(tmp_path):
    path = tmp_path / "d.hdf5"
    with writer(path, record), pytest.raises(DatasetError) as error:
        scan_hdf5(path)
    assert f"{path}: another program has the file open for writing" in str(error.value)
    assert "wait until it has finished" in str(error.value)


@pytest.mark.fault(8)
@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-50]])
def test_bad_files_among_good_ones_can_be_left_out_and_are_counted(tmp_path, damage):
    folder = write_aloha(tmp_path / "a", lengths=(4, 5, 6))
    bad = folder / "episode_1.hdf5"
    bad.write_bytes(damage(bad.read_bytes()))
    before = contents(folder)
    with pytest.raises(DatasetError, match=str(bad)):
        module(folder).setup()
    data = module(folder, skip_bad_episodes=True)
    with pytest.warns(UserWarning, match=rf"1 of 3 episodes are left out .*{bad}"):
        data.setup()
    assert data.source.episode_lengths == {0: 4, 2: 6}
    assert contents(folder) == before


# Row 9: flipped bits


def ours(path: Path) -> Path:
    """As the scripted expert's file is written."""
    rng = np.random.default_rng(0)
    episode = demonstrations.Demonstration(
        0,
        [demonstrations.zlib.compress(rng.bytes(16 * 16 * 3), 1) for _ in range(3)],
        *(rng.normal(size=(3, dim)).astype(np.float32) for dim in (5, 2)),
        rewards=np.arange(3, dtype=np.float32),
        success=np.array([False, False, True]),
    )
    with h5py.File(path, "w", libver=demonstrations.FILE_VERSION) as file:
        demonstrations._write(file.create_group("demo_0"), episode, 16)
        file.attrs["num_demos"] = 1
    return path


def converted(path: Path) -> Path:
    source = write_demos(path.with_name("source.hdf5"), (3, 4))
    convert_to_demos(HDF5Demonstrations(source), path, progress=False)
    return path


def repacked(path: Path) -> Path:
    source = write_demos(path.with_name("source.hdf5"), (3, 4))
    return repack(source, path, progress=False).path


@pytest.mark.fault(9)
@pytest.mark.parametrize("write", [ours, converted, repacked])
def test_a_flipped_bit_in_any_data_set_of_ours_is_found(tmp_path, write):
    path = write(tmp_path / "d.hdf5")
    assert verify(path, progress=False).problems == []
    good = path.read_bytes()
    with h5py.File(path) as file:
        places = {name: file[name].id.get_chunk_info(0).byte_offset for name in dataset_paths(file)}
    assert len(places) >= 4
    for name, place in places.items():
        flip(path, place + 2)
        (problem,) = verify(path, progress=False).problems
        assert (problem.file, problem.key) == (str(path), f"/{name}")
        assert "fletcher32" in problem.what
        path.write_bytes(good)


@pytest.mark.fault(9)
def test_training_meets_the_error_not_another_picture(tmp_path):
    path = repacked(tmp_path / "d.hdf5")
    with h5py.File(path) as file:
        place = file["demo_1/observations/image"].id.get_chunk_info(2).byte_offset
    flip(path, place + 10)
    with pytest.raises(DatasetError) as error:
        module(path).setup()
    assert f"{path}: /demo_1/observations/image: cannot be read at frames 0 to 3" in str(
        error.value
    )
    assert "fletcher32" in str(error.value)


@pytest.mark.fault(9)
def test_the_list_finds_a_flip_in_a_file_without_checksums(tmp_path, capsys):
    folder = write_aloha(tmp_path / "a", lengths=(4, 5))
    words = ["verify", "--dataset_repo_id", str(folder)]
    assert main(words) == 1
    assert "Nothing compared" in capsys.readouterr().out
    assert main([*words, "--write"]) == 0
    assert main(words) == 0
    assert main([*words, "--write"]) == 1
    assert "exists" in capsys.readouterr().err
    file = folder / "episode_1.hdf5"
    flip(file, file.stat().st_size // 2)
    (folder / "episode_0.hdf5").rename(folder / "episode_7.hdf5")
    assert main(words) == 1
    text = capsys.readouterr().out
    assert f"{file}: differs from what checksums.sha256 says of it" in text
    assert f"{folder / 'episode_0.hdf5'}: no such file" in text
    assert "1 not in the list" in text


@pytest.mark.fault(9)
def test_the_list_is_one_that_sha256sum_reads_and_leads_nowhere_else(tmp_path):
    folder = write_aloha(tmp_path / "a", lengths=(4,))
    listed = write_list(folder, progress=False)
    digest, name = listed.read_text().rstrip("\n").split("  ")
    assert (len(digest), name) == (64, "episode_0.hdf5")
    listed.write_text(f"{digest}  ../secret\n")
    (problem,) = verify(folder, progress=False).problems
    assert problem.file == str(listed)
    assert "leads out of" in problem.what


def spoil(path: Path) -> None:
    with h5py.File(path, "a") as file:
        file["shared"] = file["demo_0/actions"]
        file["soft"] = h5py.SoftLink("/demo_1/actions")
        file["nothing"] = h5py.Empty("f4")
        file["number"] = 5
        file["texts"] = ["a", "bc"]
        file["pairs"] = np.ones(3, [("left", "f4"), ("right", "i2")])
        file["demo_0"].attrs["task"] = "push"
        file["demo_0/actions"].attrs["unit"] = np.bytes_("px")
        file["demo_0"].attrs["bounds"] = np.arange(4.0).reshape(2, 2)
        packed = {"chunks": (3, 6, 8, 3), "compression": "gzip", "shuffle": True}
        frames = file["demo_1/observations/image"][()]
        del file["demo_1/observations/image"]
        file.create_dataset("demo_1/observations/image", data=frames, **packed)


@pytest.mark.fault(9)
def test_repacking_keeps_everything_but_the_chunks(tmp_path, capsys):
    path = write_demos(tmp_path / "d.hdf5")
    spoil(path)
    before = path.read_bytes()
    target = tmp_path / "out"
    words = ["repack", "--dataset_repo_id", str(path), "--output_dir", str(target)]
    assert main(words) == 0
    assert "every value was compared" in capsys.readouterr().out
    with h5py.File(path) as old, h5py.File(target / "d.hdf5") as new:
        for name in dataset_paths(old):
            assert new[name].dtype == old[name].dtype
            assert dict(new[name].attrs) == dict(old[name].attrs)
            if old[name].shape:
                np.testing.assert_array_equal(new[name][()], old[name][()])
                assert new[name].fletcher32 == (name != "texts")
        image = new["demo_1/observations/image"]
        assert (image.chunks, image.compression, image.shuffle) == ((1, 6, 8, 3), "gzip", True)
        assert new["shared"] == new["demo_0/actions"]
        assert new.get("soft", getlink=True).path == "/demo_1/actions"
        assert new["demo_0"].attrs["task"] == "push"
        assert new["demo_0"].attrs["bounds"].shape == (2, 2)
        assert new["number"][()] == 5
    assert path.read_bytes() == before
    assert main(words) == 1
    assert "add --overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0


@pytest.mark.fault(9)
@pytest.mark.parametrize("place", ["d.hdf5", "", "a/d.hdf5"])
def test_repacking_never_overwrites_its_input(tmp_path, place):
    folder = write_aloha(tmp_path / "a", lengths=(3,))
    (folder / "episode_0.hdf5").rename(folder / "d.hdf5")
    before = contents(tmp_path)
    source = folder if place == "a/d.hdf5" else folder / "d.hdf5"
    with pytest.raises(ValueError, match="overlaps the source"):
        repack(source, tmp_path / place if source == folder else folder / place, overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.fault(9)
def test_repacking_damage_or_onto_a_full_disk_leaves_what_was_there(tmp_path):
    path = repacked(tmp_path / "d.hdf5")
    target = write_demos(tmp_path / "earlier.hdf5", (2,))
    with h5py.File(path) as file:
        place = file["demo_0/actions"].id.get_chunk_info(0).byte_offset
    good = path.read_bytes()
    flip(path, place)
    before = contents(tmp_path)
    with pytest.raises(DatasetError, match=f"{path}: /demo_0/actions: cannot be read"):
        repack(path, target, overwrite=True, progress=False)
    assert contents(tmp_path) == before
    path.write_bytes(good)
    before = contents(tmp_path)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        try:
            repack(path, target, overwrite=True, progress=False)
        except ValueError as error:
            os._exit(7 if str(target.parent) in str(error) else 8)
        except BaseException:
            os._exit(9)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert contents(tmp_path) == before


# Row 14: shapes


@st.composite
def recordings(draw):
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    rows = [
        {
            "actions": length,
            "observations/qpos": length + draw(st.sampled_from((0, 0, 0, 1, -1, 3))),
            "observations/image": length + draw(st.sampled_from((0, 0, 0, 1, 2))),
        }
        for length in lengths
    ]
    return rows, draw(st.sampled_from(("f4", "f8", "i4", "f2"))), draw(st.booleans())


@pytest.mark.fault(14)
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(recordings(), st.integers(1, 9))
def test_any_lengths_and_types_are_batches_or_one_error(tmp_path_factory, recording, chunk_size):
    rows, kind, constant = recording
    path = tmp_path_factory.mktemp("shapes") / "d.hdf5"
    with h5py.File(path, "w") as file:
        file.attrs["num_demos"] = len(rows)
        for number, lengths in enumerate(rows):
            group = file.create_group(f"demo_{number}")
            for key, length in lengths.items():
                shape = (length, 4, 4, 3) if "image" in key else (length, 2)
                values = np.arange(np.prod(shape)).reshape(shape) % 50 + number
                if constant and "image" not in key:
                    values[:, 1] = 7
                group[key] = values.astype(np.uint8 if "image" in key else kind)
    # The observation after the last action may be there too.
    fits = all(
        length in (lengths["actions"], lengths["actions"] + 1) and length > 0
        for lengths in rows
        for length in lengths.values()
    )
    data = module(path, chunk_size=chunk_size, batch_size=3)
    longest = max(lengths["actions"] for lengths in rows)
    if fits and chunk_size > longest:
        with pytest.raises(ValueError, match=f"set chunk_size to {longest} or less"):
            data.setup()
        return
    if not fits:
        with pytest.raises(DatasetError, match=r"lengths|zero-length") as error:
            data.setup()
        assert str(path) in str(error.value)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data.setup()
        statistics = data.statistics
    assert sum(len(batch) for batch in data.train_dataloader()) == sum(r["actions"] for r in rows)
    for batch in data.train_dataloader():
        assert not batch.action_is_pad.all(dim=1).any()
        assert batch.actions.isfinite().all()
    assert (statistics.action.std >= 0).all()


@pytest.mark.fault(14)
def test_a_chunk_of_nothing_but_padding_is_refused(tmp_path):
    path = write_demos(tmp_path / "d.hdf5")
    for wrong in ({"action_start": 2}, {"action_start": -2, "chunk_size": 2}):
        with pytest.raises(ValueError, match="nothing but padding") as error:
            module(path, **wrong).setup()
        assert "action_start" in str(error.value)


@pytest.mark.fault(14)
def test_a_repeated_episode_is_said_and_constant_columns_stay_finite(tmp_path):
    path = write_demos(tmp_path / "d.hdf5")
    with h5py.File(path, "a") as file:
        file["demo_0/actions"][:, 1] = 3
        del file["demo_1"]
        file.copy("demo_0", "demo_1")
    assert "repeats episode 0" in scan_hdf5(path).warnings[0]


# Row 23: out of the file, and round in circles


@pytest.mark.fault(23)
@pytest.mark.timeout(20)
@pytest.mark.parametrize("links", [1, 60])
def test_links_in_a_circle_end(tmp_path, links):
    path = write_demos(tmp_path / "d.hdf5")
    with h5py.File(path, "a") as file:
        group = file["demo_0"]
        for number in range(links):
            group[f"again{number}"] = group
            group[f"observations/back{number}"] = group
        del group["actions"]
        # Each object is entered once, whatever the number of ways to it.
        assert len(dataset_paths(file)) == 11
    (problem,) = scan_hdf5(path).problems
    assert problem.what.startswith("missing key")
    assert problem.key == "/demo_0/actions"
    found = verify(path, progress=False)
    assert (found.problems, found.unguarded) == ([], 11)


@pytest.mark.fault(23)
def test_thousands_of_names_are_not_all_listed(tmp_path):
    path = write_demos(tmp_path / "d.hdf5", lengths=(2,))
    with h5py.File(path, "a") as file:
        for number in range(1500):
            file[f"demo_0/x{number}"] = 0
        del file["demo_0/actions"]
        assert len(dataset_paths(file)) == 1000
    assert len(str(scan_hdf5(path).problems[0])) < 2000


def bomb(file):
    del file["demo_1/observations/qpos"]
    dataset = file.create_dataset("demo_1/observations/qpos", (2**36, 2), "f4", chunks=(1024, 2))
    dataset[:4] = 1


def external_link(file):
    del file["demo_1/observations/qpos"]
    file["demo_1/observations/qpos"] = h5py.ExternalLink("/etc/secret.hdf5", "/passwords")


def external_group(file):
    del file["demo_1"]
    file["demo_1"] = h5py.ExternalLink("other.hdf5", "/demo_1")


def soft_link_to_external(file):
    file["bridge"] = h5py.ExternalLink("other.hdf5", "/")
    del file["demo_1/actions"]
    file["demo_1/actions"] = h5py.SoftLink("/bridge/actions")


def soft_link_loop(file):
    del file["demo_1/actions"]
    file["demo_1/actions"] = h5py.SoftLink("/demo_1/again")
    file["demo_1/again"] = h5py.SoftLink("/demo_1/actions")


def external_storage(file):
    del file["demo_1/actions"]
    file.create_dataset("demo_1/actions", (9, 2), "f4", external=[("/etc/passwd", 0, 72)])


def virtual(file):
    del file["demo_1/actions"]
    layout = h5py.VirtualLayout((9, 2), "f4")
    layout[:] = h5py.VirtualSource("other.hdf5", "actions", (9, 2))
    file.create_virtual_dataset("demo_1/actions", layout)


# What breaks, the key that must be named, what must be said, the mend.
FOREIGN = {
    "declared shape": (
        bomb,
        "/demo_1/observations/qpos",
        "declares the shape (68719476736, 2)",
        "do not trust the file",
    ),
    "external link": (
        external_link,
        "/demo_1/observations/qpos",
        "is an external link to /passwords in /etc/secret.hdf5",
        "h5copy",
    ),
    "external group": (
        external_group,
        "/demo_1",
        "is an external link to /demo_1 in other.hdf5",
        "h5copy",
    ),
    "bridge": (
        soft_link_to_external,
        "/bridge",
        "is an external link to / in other.hdf5",
        "h5copy",
    ),
    "loop": (soft_link_loop, "/demo_1/", "soft link in a chain that never ends", "h5copy"),
    "external storage": (
        external_storage,
        "/demo_1/actions",
        "keeps its values in other files (/etc/passwd)",
        "h5repack",
    ),
    "virtual": (virtual, "/demo_1/actions", "is a virtual data set over (other.hdf5)", "h5repack"),
}


@pytest.mark.fault(23)
@pytest.mark.parametrize("case", FOREIGN)
def test_what_is_not_in_the_file_is_named_with_key_and_mend(tmp_path, case):
    breaks, key, what, mend = FOREIGN[case]
    path = write_demos(tmp_path / "broken.hdf5")
    with h5py.File(path, "a") as file:
        breaks(file)
    with pytest.raises(DatasetError) as error:
        scan_hdf5(path).require_usable()
    (line,) = (line for line in str(error.value).splitlines() if what in line)
    assert f"{path}: {key}" in line
    assert mend in line.split("Mend:")[1]
    before = contents(tmp_path)
    with pytest.raises(DatasetError):
        HDF5DataModule(str(path)).setup()
    found = verify(path, progress=False)
    # A soft link in a circle leads nowhere, and needs no reading.
    assert found.problems or case in ("loop", "declared shape")
    assert contents(tmp_path) == before


@pytest.mark.fault(23)
def test_symbolic_links_and_patterns_out_of_the_folder_are_refused(tmp_path):
    folder = write_aloha(tmp_path / "a")
    secret = write_aloha(tmp_path / "secret", lengths=(3,)) / "episode_0.hdf5"
    (folder / "episode_7.hdf5").symlink_to(secret)
    with pytest.raises(DatasetError, match="symbolic link out of the data folder"):
        scan_hdf5(folder)
    with pytest.raises(DatasetError, match="leads out of the folder"):
        scan_hdf5(folder, schema=HDF5Schema(files=("../secret/*.hdf5",), episode_group="/"))


@pytest.mark.fault(23)
@pytest.mark.timeout(20)
def test_a_linked_secret_is_never_opened(tmp_path):
    path = write_demos(tmp_path / "shared.hdf5")
    # Opening a pipe that nobody writes to would wait for ever.
    secret = tmp_path / "secret.hdf5"
    os.mkfifo(secret)
    with h5py.File(path, "a") as file:
        for index in range(3):
            del file[f"demo_{index}"]
            file[f"demo_{index}"] = h5py.ExternalLink(str(secret), f"/demo_{index}")
    scan = scan_hdf5(path)
    assert scan.episodes == ()
    assert len(scan.problems) == 3
    assert all(f"in {secret}" in problem.what for problem in scan.problems)
