"""Tensors in safetensors files: written whole with checksums, and one error for all damage.

Any reader of safetensors reads these files; the checksums stand in the header's free metadata.
"""

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import shorten

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from policies.atomic_files import whole_file
from policies.json_files import parse_json

CHECKSUMS_KEY = "crc32"
"""Of the metadata: JSON, from each tensor's name to the CRC-32 of its dtype, shape and bytes."""


# What the library and torch say of damage, of dtypes that torch has not, and of the disk.
_DAMAGE = (
    SafetensorError,
    OSError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors with their checksums; the file appears complete or not at all.

    Args:
        path: The file; its folder must be there.
        tensors: By name; none may share memory with another.

    Raises:
        OSError: If the disk refuses.
    """
    kept = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    checksums = {name: _checksum(value) for name, value in sorted(kept.items())}
    with whole_file(path) as temporary:
        # One entry: the library writes several in no certain order.
        save_file(kept, temporary, {CHECKSUMS_KEY: json.dumps(checksums)})


def load_tensors(path: Path, error: Callable[[str], ValueError] | None = None) -> dict[str, Tensor]:
    """Read tensors to the CPU and compare their checksums.

    Files of other programs, and those of versions that wrote none, have no checksums and are read
    without.

    Args:
        path: The file.
        error: Makes the exception from what is wrong, e.g. ``"is damaged (...)"``; without it, a
            ValueError that names the file.

    Raises:
        ValueError: If the file is missing or damaged; made by ``error``.
    """

    def refuse(problem: str) -> ValueError:
        return ValueError(f"{path}: {problem}") if error is None else error(problem)

    try:
        is_file = path.is_file()
    except (OSError, ValueError) as reason:
        raise refuse(f"cannot be read ({shorten(str(reason), 200)})") from reason
    if not is_file:
        raise refuse("no such file")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except _DAMAGE as reason:
        raise refuse(f"is damaged ({shorten(str(reason), 200)})") from reason
    if CHECKSUMS_KEY in metadata:
        checksums = parse_json(
            metadata[CHECKSUMS_KEY], lambda problem: refuse(f"is damaged (its header {problem})")
        )
        for name, checksum in checksums.items():
            if name not in tensors:
                raise refuse(f"is damaged (it lacks {shorten(ascii(name), 80)})")
            if _checksum(tensors[name]) != checksum:
                raise refuse(f"is damaged (wrong checksum of {shorten(ascii(name), 80)})")
    return tensors


def _checksum(tensor: Tensor) -> int:
    content = tensor.reshape(-1).view(torch.uint8).numpy()
    # The same bytes are other values in another dtype.
    return zlib.crc32(content, zlib.crc32(f"{tensor.dtype} {list(tensor.shape)}".encode()))
