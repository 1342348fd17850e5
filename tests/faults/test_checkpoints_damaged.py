"""Row 3: a checkpoint that is damaged or foreign is one clear error, and the others are found."""

import os
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from policies.checkpoint_files import (
    RESUME_KEYS,
    CheckpointError,
    newest_valid_checkpoint,
    read_checkpoint,
)
from policies.loading import find_policy, load_policy

WEIGHTS = torch.arange(256.0)
pytestmark = pytest.mark.fault(3)


def content(step: int = 20, **changes: Any) -> dict[str, Any]:
    return {
        "policyscope": {"checkpoint_format": 1},
        "state_dict": {"weight": WEIGHTS},
        "epoch": 1,
        "global_step": step,
        "loops": {},
        "callbacks": {},
        "optimizer_states": [],
        "lr_schedulers": [],
        **changes,
    }


def write(path: Path, step: int = 20, **changes: Any) -> Path:
    torch.save(content(step, **changes), path)
    return path


def cut(share: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        raw = write(path).read_bytes()
        path.write_bytes(raw[: int(share * len(raw))])

    return damage


def with_values(**changes: Any) -> Callable[[Path], None]:
    return lambda path: (write(path, **changes), None)[1]


def without(key: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        values = content()
        del values[key]
        torch.save(values, path)

    return damage


def photos(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("beach.txt", "sand")


def older_format_of_torch(path: Path) -> None:
    torch.save(content(), path, _use_new_zipfile_serialization=False)


def swelling(path: Path) -> None:
    """64 MiB of zeros in 64 KiB."""
    with zipfile.ZipFile(write(path), "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/999", bytes(2**26))


def overlapping(path: Path) -> None:
    """Entries that all unpack the same bytes."""
    with zipfile.ZipFile(write(path), "a") as archive:
        (largest,) = [entry for entry in archive.infolist() if entry.file_size == 1024]
        for number in range(1000):
            entry = zipfile.ZipInfo(f"archive/data/{number + 100}")
            for field in ("header_offset", "CRC", "compress_size", "file_size"):
                setattr(entry, field, getattr(largest, field))
            archive.filelist.append(entry)
        archive._didModify = True


def a_folder(path: Path) -> None:
    path.mkdir()


DAMAGES = {
    "empty": (cut(0), "is empty"),
    "one_byte": (cut(0.0008), "cut short"),
    "half": (cut(0.5), "cut short"),
    "all_but_the_end": (cut(0.99), "cut short"),
    "another_archive": (photos, "damaged"),
    "old_torch": (older_format_of_torch, "not a checkpoint of this project"),
    "compressed": (swelling, "would unpack to"),
    "overlapping": (overlapping, "would unpack to"),
    "folder": (a_folder, "is not a file"),
    "mark_5": (with_values(policyscope=5), "'policyscope' is of type int"),
    "mark_none": (with_values(policyscope=None), "'policyscope' is of type NoneType"),
    "mark_tensor": (with_values(policyscope=torch.ones(2)), "'policyscope' is of type Tensor"),
    "format_99": (with_values(policyscope={"checkpoint_format": 99}), "format 99"),
    "format_tensor": (
        with_values(policyscope={"checkpoint_format": torch.ones(3)}),
        "format tensor",
    ),
    "no_mark": (without("policyscope"), "no entry 'policyscope'"),
    "weights_list": (with_values(state_dict=[1]), "'state_dict' is of type list"),
    "step_text": (with_values(global_step="20"), "'global_step' is of type str"),
    "no_dict": (lambda path: torch.save([1, 2], path), "not a checkpoint of this project"),
    **{
        f"no_{key}": (without(key), f"lacks {key}.* cannot go on from it")
        for key in ("loops", "callbacks", "optimizer_states", "global_step")
    },
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_its_neighbour_goes_on(
    damage: str, tmp_path: Path
) -> None:
    older, last = write(tmp_path / "best-step000010.ckpt", 10), tmp_path / "last.ckpt"
    before = older.read_bytes()
    do, message = DAMAGES[damage]
    do(last)
    with pytest.raises(CheckpointError, match=rf"last\.ckpt: .*{message}") as refused:
        read_checkpoint(last, needed=RESUME_KEYS)
    assert "\n" not in str(refused.value)
    found = newest_valid_checkpoint(tmp_path, RESUME_KEYS)
    assert found.path == older
    assert torch.equal(found.checkpoint["state_dict"]["weight"], WEIGHTS)
    if last.is_file():
        assert ["last.ckpt" in str(error) for error in found.damaged] == [True]
    assert older.read_bytes() == before


@pytest.mark.parametrize("name", ["x" * 5000 + ".ckpt", "a\0b.ckpt", "\ud800.ckpt"])
def test_a_path_that_no_file_can_have_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / name)


def test_no_flipped_bit_goes_unnoticed(tmp_path: Path) -> None:
    """Of any byte: weights, structure, or the archive's own directory."""
    path = write(tmp_path / "last.ckpt")
    raw = path.read_bytes()
    rng = random.Random(0)
    refused = unnamed = 0
    for place in rng.sample(range(len(raw)), 300):
        flipped = bytearray(raw)
        flipped[place] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            found = read_checkpoint(path, needed=RESUME_KEYS)
        except CheckpointError as error:
            refused += str(path) in str(error)
            unnamed += str(path) not in str(error)
        else:
            # Padding and names that nothing reads.
            assert torch.equal(found["state_dict"]["weight"], WEIGHTS)
            assert found["global_step"] == 20
    assert refused > 100
    assert not unnamed


def touch(path: Path, time_s: int) -> None:
    os.utime(path, (time_s, time_s))


@pytest.mark.parametrize("stamps", [(1000, 2000), (2000, 1000), (1000, 1000)])
def test_a_clock_that_jumps_does_not_make_an_old_checkpoint_the_newest(
    stamps: tuple[int, int], tmp_path: Path
) -> None:
    old, last = write(tmp_path / "best-step000004.ckpt", 4), write(tmp_path / "last.ckpt", 20)
    for path, stamp in zip((old, last), stamps, strict=True):
        touch(path, stamp)
    found = newest_valid_checkpoint(tmp_path)
    assert found.path == last
    assert found.checkpoint["global_step"] == 20


@pytest.mark.parametrize("name", ["best-step{:06d}.ckpt", "step{:06d}.ckpt"])
def test_an_analysis_takes_the_checkpoint_that_got_farthest(name: str, tmp_path: Path) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    for place, step in enumerate((8, 20, 4)):
        touch(write(checkpoints / name.format(step), step), 1000 + place)
    assert find_policy(str(tmp_path / "run")) == checkpoints / name.format(20)


def dangling(path: Path) -> None:
    path.symlink_to(path.with_name("gone.ckpt"))


def circle(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize("name", ["last.ckpt", "best-step000030.ckpt"])
@pytest.mark.parametrize("damage", [dangling, circle, a_folder, cut(0), cut(0.5), photos])
def test_an_analysis_passes_over_what_cannot_be_read(
    damage: Callable[[Path], None], name: str, tmp_path: Path
) -> None:
    """Saying so: the policy is not the one that was to be expected."""
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    good = write(checkpoints / name.replace("last", "step000010").replace("30", "10"), 10)
    damage(checkpoints / name)
    with pytest.warns(UserWarning, match=rf"{name}: .*; taking {good.name}"):
        assert find_policy(str(tmp_path / "run")) == good
    newest = newest_valid_checkpoint(checkpoints)
    assert newest.path == good


def test_a_run_of_which_nothing_can_be_read_names_a_file(tmp_path: Path) -> None:
    dangling(tmp_path / "last.ckpt")
    cut(0.5)(tmp_path / "best-step000004.ckpt")
    with pytest.raises(CheckpointError, match=r"best-step000004\.ckpt: .*cut short"):
        load_policy(str(tmp_path))


def test_a_file_that_goes_while_it_is_looked_at_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training deletes what it no longer ranks."""
    good, going = write(tmp_path / "step000010.ckpt", 10), write(tmp_path / "step000020.ckpt", 20)
    is_file = Path.is_file

    def last_look(path: Path) -> bool:
        found = is_file(path)
        if path == going and found:
            going.unlink()
        return found

    monkeypatch.setattr(Path, "is_file", last_look)
    assert newest_valid_checkpoint(tmp_path).path == good


def test_a_copied_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Copies are as old as the copying, in whatever order that was."""
    run = tmp_path / "run"
    run.mkdir()
    for step in (4, 8, 16):
        write(run / f"best-step{step:06d}.ckpt", step)
    write(run / "last.ckpt", 12)
    copy = tmp_path / "copy"
    copy.mkdir()
    for place, name in enumerate(("best-step000016.ckpt", "last.ckpt", "best-step000004.ckpt")):
        touch(Path(shutil.copy(run / name, copy)), 1000 + place)
    assert newest_valid_checkpoint(copy).path.name == "best-step000016.ckpt"


def test_of_equal_steps_last_is_taken_and_of_others_the_younger_file(tmp_path: Path) -> None:
    for place, name in enumerate(("last.ckpt", "a.ckpt", "b.ckpt")):
        touch(write(tmp_path / name, 20), 1000 + place)
    assert newest_valid_checkpoint(tmp_path).path.name == "last.ckpt"
    (tmp_path / "last.ckpt").unlink()
    assert newest_valid_checkpoint(tmp_path).path.name == "b.ckpt"


def test_a_damaged_older_checkpoint_is_not_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "last.ckpt", 20)
    cut(0.5)(tmp_path / "best-step000004.ckpt")
    touch(tmp_path / "best-step000004.ckpt", 2**31)
    assert newest_valid_checkpoint(tmp_path).damaged == ()
