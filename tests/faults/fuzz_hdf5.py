"""Damaged and hostile HDF5: recordings in three layouts, spoilt in their bytes or their objects."""

import random
import struct
import tempfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import h5py
import numpy as np
from fuzzing import ODD_NAMES, Case, Target, mutated_bytes, mutated_name
from recordings import as_padded_jpeg, smooth_pictures, write_aloha, write_demos, write_robomimic

from datamodules.errors import DatasetError
from datamodules.hdf5_frames import check_pictures
from datamodules.inspect import inspect_dataset
from datamodules.layouts import LAYOUTS, HDF5Schema
from datamodules.repack import repack
from datamodules.scan import Scan, dataset_paths, opened, scan_hdf5
from datamodules.verify import verify

LENGTHS = (3, 4)


def png(height: int, width: int, data: bytes = b"") -> bytes:
    """A picture that says how large it is, whatever it holds."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    packed = chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + packed + chunk(b"IEND", b"")


def _jpeg(path: Path) -> Path:
    write_demos(path, LENGTHS)
    with h5py.File(path, "a") as file:
        for index, length in enumerate(LENGTHS):
            key = f"demo_{index}/observations/image"
            del file[key]
            file[key] = as_padded_jpeg(smooth_pictures(length, 16, 24))
    return path


def _checked(path: Path) -> Path:
    """With checksums and HDF5's newer structures, as ours are written."""
    with h5py.File(path, "w", libver=("v110", "v110")) as file:
        file.attrs["num_demos"] = len(LENGTHS)
        for index, length in enumerate(LENGTHS):
            group = file.create_group(f"demo_{index}")
            pictures = np.full((length, 6, 8, 3), index, np.uint8)
            options = {"chunks": (1, 6, 8, 3), "compression": "gzip", "fletcher32": True}
            group.create_dataset("observations/image", data=pictures, **options)
            values = np.arange(2.0 * length, dtype=np.float32).reshape(length, 2) + index
            group.create_dataset("observations/qpos", data=values, fletcher32=True)
            group.create_dataset("actions", data=values, fletcher32=True)
    return path


@cache
def bases() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        aloha = write_aloha(root / "aloha", lengths=(3,), compressed=True, base=True)
        files = (
            write_demos(root / "demos.hdf5", LENGTHS),
            write_robomimic(root / "robomimic.hdf5", LENGTHS, masks=False),
            aloha / "episode_0.hdf5",
            _jpeg(root / "jpeg.hdf5"),
            _checked(root / "checked.hdf5"),
        )
        return [file.read_bytes() for file in files]


def make_case(rng: random.Random) -> Case:
    """Bytes in half of the cases, objects in the other."""
    base = rng.choice(bases())
    if rng.random() < 0.5:
        return Case("bytes", mutated_bytes(rng, base, rng.choice(bases())))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "case.hdf5"
        file.write_bytes(base)
        with h5py.File(file, "a") as handle:
            for _ in range(rng.randint(1, 3)):
                # HDF5 itself refuses some: names with NUL, what an earlier change took away.
                with suppress(Exception):
                    rng.choice(CHANGES)(rng, handle)
        return Case("objects", file.read_bytes())


def _datasets(file: h5py.File) -> list[str]:
    return dataset_paths(file) or [""]


def _groups(file: h5py.File) -> list[str]:
    found = ["/"]
    file.visititems(lambda name, one: found.append(name) if isinstance(one, h5py.Group) else None)
    return found


def _odd_array(rng: random.Random) -> np.ndarray | h5py.Empty:
    shape = tuple(rng.choice((0, 1, 2, 3, 4, 6, 8)) for _ in range(rng.choice((0, 1, 2, 2, 3, 4))))
    kind = rng.choice(
        ("f4", "f8", "f2", "u1", "i8", "u2", "?", "S3", "c8", "V5", ">i4", "i4,f4", "O", "empty")
    )
    if kind == "empty":
        return h5py.Empty("f4")
    if kind == "O":
        return np.full(shape, "text", object)
    if kind == "f4" and rng.random() < 0.5:
        return np.full(shape, rng.choice((np.nan, np.inf, -1e38, 300.0, 0.5)), "f4")
    return np.ones(shape, np.dtype(kind))


def _replace(rng: random.Random, file: h5py.File) -> None:
    path = rng.choice(_datasets(file))
    del file[path]
    file.create_dataset(path, data=_odd_array(rng))


def _values(dataset: h5py.Dataset) -> np.ndarray:
    """Return a dataset's values; an earlier change may have declared 2**62 rows."""
    return dataset[:64] if dataset.ndim else dataset[()]


def _other_length(rng: random.Random, file: h5py.File) -> None:
    path = rng.choice(_datasets(file))
    values = _values(file[path])
    del file[path]
    file[path] = values[: rng.randrange(len(values) + 1)]


def _delete(rng: random.Random, file: h5py.File) -> None:
    del file[rng.choice(_datasets(file) + _groups(file)[1:])]


def _rename(rng: random.Random, file: h5py.File) -> None:
    path = rng.choice(_datasets(file) + _groups(file)[1:])
    parent, _, name = path.rpartition("/")
    new = rng.choice(("demo_" + "9" * 5000, "demo_\u0663", "demo_\u00b2", mutated_name(rng, name)))
    file.move(path, f"{parent}/{new}")


def _link(rng: random.Random, file: h5py.File) -> None:
    group = file[rng.choice(_groups(file))]
    name = rng.choice(("loop", "actions", "observations", "image", rng.choice(ODD_NAMES)))
    if name in group:
        del group[name]
    kind = rng.randrange(5)
    if kind == 0:
        group[name] = h5py.ExternalLink(rng.choice(("/etc/hostname", "case.hdf5", "")), "/x")
    elif kind == 1:
        group[name] = h5py.SoftLink(
            rng.choice(("/", ".", "..", name, f"/demo_0/{name}", "x/" * 99))
        )
    elif kind == 2:
        for index in range(60):
            group[f"{name}{index}"] = group
    elif kind == 3:
        group[name] = file[rng.choice(_groups(file))]
    else:
        file["type"] = np.dtype("f4")
        group[name] = file["type"]


@cache
def packed_zeros(size_mib: int) -> bytes:
    pack = zlib.compressobj(9)
    return b"".join(pack.compress(bytes(2**20)) for _ in range(size_mib)) + pack.flush()


def _swollen(dataset: h5py.Dataset) -> None:
    """Many times what the chunk declares."""
    dataset.id.write_direct_chunk((0,) * dataset.ndim, packed_zeros(96))


def _storage(rng: random.Random, file: h5py.File) -> None:
    path = rng.choice(_datasets(file))
    values, kind = _values(file[path]), file[path].dtype
    shape = values.shape
    del file[path]
    way = rng.randrange(7)
    if way == 0:
        size = int(np.prod(shape)) * kind.itemsize
        file.create_dataset(path, shape, kind, external=[("/etc/passwd", 0, size)])
    elif way == 1:
        layout = h5py.VirtualLayout(shape, kind)
        layout[:] = h5py.VirtualSource("/etc/hostname", "x", shape)
        file.create_virtual_dataset(path, layout)
    elif way == 2:
        huge = (rng.choice((2**40, 2**62, 2**31)), *shape[1:])
        most = (None, *shape[1:])
        made = file.create_dataset(path, huge, kind, chunks=(1, *shape[1:]), maxshape=most)
        made[: len(values)] = values
    elif way == 3:
        file.create_dataset(path, shape, kind, chunks=(1, *shape[1:]))
    elif way == 4:
        file.create_dataset(path, data=values, chunks=True, compression="lzf", shuffle=True)
    elif way == 5:
        _swollen(file.create_dataset(path, shape, kind, chunks=shape, compression="gzip"))
    else:
        dataset = file.create_dataset(path, shape, kind, chunks=shape, compression="gzip")
        dataset.id.write_direct_chunk((0,) * len(shape), rng.randbytes(40))


def _pictures(rng: random.Random, file: h5py.File) -> None:
    path = rng.choice([path for path in _datasets(file) if "image" in path] or _datasets(file))
    length = len(_values(file[path]))
    del file[path]
    held = rng.choice(
        (
            b"",
            b"\xff\xd8\xff\xd9",
            b"\xff\xd8\xff\xc0\x00\x11\x08\xff\xff\xff\xff\x03" + b"\0" * 9 + b"\xff\xd9",
            png(10**5, 10**5),
            png(9000, 9000, b"\0" * 1000),
            png(0, 8),
            png(4, 4, b"\0" * 52),
            mutated_bytes(rng, as_padded_jpeg(smooth_pictures(1, 16, 24))[0].tobytes()),
            rng.randbytes(50),
        )
    )
    if rng.random() < 0.5 and held:
        file.create_dataset(path, data=np.tile(np.frombuffer(held, np.uint8), (length, 1)))
        return
    pictures = file.create_dataset(path, (length,), h5py.vlen_dtype(np.uint8))
    for row in range(length):
        pictures[row] = np.frombuffer(held, np.uint8)


def _attribute(rng: random.Random, file: h5py.File) -> None:
    holder = file[rng.choice(_groups(file))]
    name = rng.choice(("num_demos", "fps", "sim", "num_samples", "env_args", "compress"))
    holder.attrs[name] = rng.choice(
        (
            "text",
            "\x1b[31m",
            "9" * 5000,
            b"\xff\xfe",
            np.nan,
            np.inf,
            -1,
            0,
            2**62,
            1e300,
            True,
            np.arange(5),
            np.array([], "f4"),
            np.complex64(1),
            h5py.Empty("f4"),
        )
    )


CHANGES: tuple[Callable[[random.Random, h5py.File], None], ...] = (
    _replace,
    _other_length,
    _delete,
    _rename,
    _link,
    _storage,
    _pictures,
    _attribute,
)


def use(case: Case, folder: Path) -> None:
    """What training reads, what ``inspect`` reads, and what ``repack`` and ``verify`` do."""

    file = folder / "case.hdf5"
    file.write_bytes(case.content)
    inspection, _ = inspect_dataset(file, progress=False)
    for problem in inspection.problems:
        assert str(problem).startswith(str(file)), problem
        assert problem.mend, problem
    verify(file, progress=False)
    refusals = []
    try:
        repack(file, folder / "repacked.hdf5", progress=False)
    except DatasetError as error:
        refusals.append(error)
    assert file.read_bytes() == case.content
    assert not list(folder.glob(".*")), "rubbish of repack"
    scan: Scan | None = None
    for schema in (None, HDF5Schema(episode_group="*", action=("actions",))):
        try:
            scan = scan_hdf5(file, schema=schema)
            scan.require_usable(skip_bad_episodes=True)
            problems = check_pictures(scan, lambda done: None)
            assert all(problem.file == str(file) for problem in problems)
        except DatasetError as error:
            refusals.append(error)
    for layout in LAYOUTS:
        scan_hdf5(file, layout)
    with opened(file) as handle:
        assert handle.id.valid
    if refusals:
        raise refusals[0]


TARGET = Target("hdf5", make_case, use, (DatasetError,))
