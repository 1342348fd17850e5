"""Pictures that are damaged, declare more than memory holds, or need a filter that is not there."""

import h5py
import numpy as np
import pytest
from fuzz_hdf5 import png, smooth_pictures, write_aloha, write_demos

from datamodules.errors import DatasetError
from datamodules.hdf5 import HDF5DataModule
from datamodules.scan import PICTURE_LIMIT_PX, decode_picture, scan_hdf5

pytestmark = pytest.mark.fault(10)

UNKNOWN_FILTER = 32099


def ready(path) -> HDF5DataModule:
    data = HDF5DataModule(str(path), chunk_size=2, val_fraction=0.0, progress=False)
    data.setup()
    return data


@pytest.mark.parametrize(
    ("harm", "what"),
    [
        (lambda data: data[:40] + b"\0" * 500, "a JPEG that stops before its end marker"),
        (lambda data: b"GIF89a" + data[6:], "bytes that are neither JPEG nor PNG"),
        (lambda data: data[:2] + b"\0" * 30 + b"\xff\xd9", "a damaged picture"),
        (lambda data: png(4, 4, b"\0" * 20), "a damaged picture"),
        (lambda data: png(10**5, 10**5), "a picture that declares 100000 x 100000 px"),
        (lambda data: png(8, 8, b"\0" * 200), "a picture of 8x8 px among pictures of 32x48"),
    ],
)
def test_damaged_compressed_picture_is_named_by_frame(tmp_path, harm, what):
    folder = write_aloha(tmp_path / "a", compressed=True)
    first = (folder / "episode_0.hdf5").read_bytes()
    with h5py.File(folder / "episode_1.hdf5", "a") as file:
        rows = file["observations/images/top"]
        harmed = np.frombuffer(harm(bytes(rows[3])), np.uint8)[: rows.shape[1]]
        rows[3] = np.pad(harmed, (0, rows.shape[1] - len(harmed)))
    with pytest.raises(DatasetError) as error:
        ready(folder)
    place = f"{folder / 'episode_1.hdf5'}: /observations/images/top, frame 3: holds {what}"
    assert place in str(error.value)
    assert "leave it out with episodes:" in str(error.value)
    assert (folder / "episode_0.hdf5").read_bytes() == first


def jpeg_header(height: int, width: int) -> bytes:
    frame = b"\xff\xc0\x00\x11\x08" + height.to_bytes(2) + width.to_bytes(2) + b"\x03" + b"\0" * 9
    return b"\xff\xd8\xff\xe0\x00\x04\xff\xc0" + frame + b"\xff\xd9"


@pytest.mark.parametrize(
    "data",
    [png(10**5, 10**5), png(2**13 + 1, 2**13), png(0, 5), jpeg_header(65535, 65535)],
    ids=["png", "just above", "no rows", "jpeg"],
)
def test_a_picture_is_refused_by_the_size_it_declares_before_it_is_unpacked(data, monkeypatch):
    import cv2

    def unpack(*given):
        raise AssertionError("it was unpacked")

    monkeypatch.setattr(cv2, "imdecode", unpack)
    with pytest.raises(ValueError, match="a picture that declares"):
        decode_picture(data)


def test_pictures_up_to_the_limit_are_read_whatever_their_kind():
    import cv2

    assert PICTURE_LIMIT_PX == 2**13 * 2**13
    frame = smooth_pictures(1)[0]
    for suffix in (".png", ".jpg"):
        encoded = cv2.imencode(suffix, np.ascontiguousarray(frame[..., ::-1]))[1].tobytes()
        difference = np.abs(decode_picture(encoded).astype(int) - frame).mean()
        assert difference < (1e-9 if suffix == ".png" else 8)


def test_a_filter_that_is_not_installed_is_named_with_what_brings_it(tmp_path):
    path = write_demos(tmp_path / "d.hdf5")
    with h5py.File(path, "a") as file:
        shape = file["demo_1/actions"].shape
        del file["demo_1/actions"]
        dataset = file.create_dataset(
            "demo_1/actions",
            shape,
            "f4",
            chunks=shape,
            compression=UNKNOWN_FILTER,
            allow_unknown_filter=True,
        )
        dataset.id.write_direct_chunk((0, 0), b"squeezed")
    before = path.read_bytes()
    with pytest.raises(DatasetError) as error:
        ready(path)
    assert f"{path}: /demo_1/actions: was compressed by " in str(error.value)
    assert f"(filter {UNKNOWN_FILTER}), which is not installed" in str(error.value)
    assert "pip install hdf5plugin" in str(error.value).split("Mend: ")[1]
    assert [episode.number for episode in scan_hdf5(path).episodes] == [0, 2]
    assert path.read_bytes() == before
