"""Row 26: a damaged safetensors file is one clear error; whole ones are read by everybody."""

import json
import os
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import fuzz_manifests
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from autoencoders.files import AutoencoderError, load_autoencoder
from features.ood import load_detector
from policies.lerobot_format import LeRobotFormatError, load_lerobot_act
from policies.tensor_files import CHECKSUMS_KEY, load_tensors, save_tensors

pytestmark = pytest.mark.fault(26)

Reader = Callable[[Path], object]


def detector(folder: Path) -> object:
    return load_detector(folder, load_autoencoder(fuzz_manifests.bases() / "sae").sae)


FILES: dict[str, tuple[Reader, type[ValueError]]] = {
    "sae/sae_weights.safetensors": (load_autoencoder, AutoencoderError),
    "sae/sparsity.safetensors": (load_autoencoder, AutoencoderError),
    "ood/ood.safetensors": (detector, ValueError),
    "act/model.safetensors": (load_lerobot_act, LeRobotFormatError),
    "act/policy_preprocessor_normalizer.safetensors": (load_lerobot_act, LeRobotFormatError),
}


def flip_a_weight(raw: bytes) -> bytes:
    flipped = bytearray(raw)
    flipped[-3] ^= 1
    return bytes(flipped)


def other_header(change: Callable[[dict], object]) -> Callable[[bytes], bytes]:
    def damage(raw: bytes) -> bytes:
        (length,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + raw[8 + length :]

    return damage


def first_as_integers(header: dict) -> None:
    """The same bytes, other values."""
    name = next(name for name, entry in header.items() if entry.get("dtype") == "F32")
    header[name]["dtype"] = "I32"


def renamed(header: dict) -> None:
    header["new"] = header.pop(next(name for name in header if name != "__metadata__"))


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "flipped_weight": flip_a_weight,
    "empty": lambda raw: b"",
    "cut": lambda raw: raw[:-4],
    "only_a_length": lambda raw: raw[:8],
    "giant_header": lambda raw: b"\xff" * 8 + raw[8:],
    "deep_header": lambda raw: struct.pack("<Q", 20000) + b"[" * 20000,
    "another_dtype": other_header(first_as_integers),
    "another_name": other_header(renamed),
    "checksums_of_nothing": other_header(
        lambda header: header["__metadata__"].update({CHECKSUMS_KEY: "[]"})
    ),
}


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A folder of each kind to damage."""
    for name in ("sae", "ood", "act"):
        (tmp_path / name).mkdir()
        for file in (fuzz_manifests.bases() / name).iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_damage_is_one_error_that_names_the_file(file: str, damage: str, folders: Path) -> None:
    read, error = FILES[file]
    path = folders / file
    read(path.parent)
    others = {each: each.read_bytes() for each in path.parent.iterdir() if each != path}
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(error, match=path.name) as refused:
        read(path.parent)
    assert "\n" not in str(refused.value)
    assert {each: each.read_bytes() for each in others} == others


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_named(file: str, folders: Path) -> None:
    read, error = FILES[file]
    (folders / file).unlink()
    if file == "sae/sparsity.safetensors":
        assert load_autoencoder(folders / "sae").density is None, "it may be missing"
        return
    with pytest.raises(error, match=f"{Path(file).name}: no such file"):
        read((folders / file).parent)


@pytest.mark.parametrize("file", FILES)
def test_files_of_before_the_checksums_and_of_others_are_read(file: str, folders: Path) -> None:
    """Nothing but the checksum would notice the flipped bit: so it is read."""
    read, _ = FILES[file]
    path = folders / file
    save_file(load_file(path), path)
    with safe_open(path, "pt") as opened:
        assert opened.metadata() is None
    read(path.parent)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
)
def test_what_was_saved_comes_back_and_other_readers_find_it(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = {
        "a": torch.arange(12).reshape(3, 4).to(dtype),
        "turned": torch.arange(12).reshape(3, 4).T.to(dtype),
        "point": torch.tensor(1).to(dtype),
        "nothing": torch.zeros(0, 3).to(dtype),
    }
    file = tmp_path / "t.safetensors"
    save_tensors(file, tensors)
    for found in (load_tensors(file), load_file(file)):
        assert found.keys() == tensors.keys()
        for name, value in tensors.items():
            assert torch.equal(found[name], value)
            assert found[name].dtype == dtype
    first = file.read_bytes()
    save_tensors(file, dict(reversed(tensors.items())))
    assert file.read_bytes() == first, "the same tensors are the same file"
    assert [each.name for each in tmp_path.iterdir()] == ["t.safetensors"]


@pytest.mark.parametrize("name", ["missing", "", "x" * 5000, "a\0"])
def test_a_path_without_a_file_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such file|cannot be read"):
        load_tensors(tmp_path / name)


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_who_may_read_a_file_is_what_the_umask_says(umask: int, tmp_path: Path) -> None:
    """safetensors itself lets only the owner, whatever the umask."""
    written = fuzz_manifests.write_bases(tmp_path)
    files = [each for each in written.rglob("*") if each.is_file() and each.suffix != ".lock"]
    # That one is a folder of LeRobot's, written by LeRobot.
    files = [each for each in files if "diffusion" not in each.parts]
    assert sum(each.suffix == ".safetensors" for each in files) >= 6
    for file in files:
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask, file
