"""JSON that others take, and theirs, damaged or hostile: one error for all that is wrong."""

import json
import math
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAX_BYTES = 64 * 2**20
"""Of a file, unless its reader says otherwise; larger ones are not read."""
MAX_DEPTH = 64
"""Of values within values; what reads, prints or copies them may recurse."""
MAX_DIGITS = 20
"""Of a whole number; none that is written needs more than 64 bits."""
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


def json_text(value: Any, indent: int | None = 1) -> str:
    """Write a value as a line of JSON, or several; null stands for NaN and infinity.

    JSON has neither: what Python writes for them no other program reads.
    """
    return json.dumps(_finite(value), indent=indent, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(
    path: Path,
    error: Callable[[str], ValueError] | None = None,
    max_bytes: int = MAX_BYTES,
) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: The file.
        error: Makes the exception from what is wrong, e.g. ``"holds no JSON (...)"``; without it,
            a ValueError that names the file.
        max_bytes: Size above which it is refused unread.

    Raises:
        ValueError: If the file is missing, no plain file, too large or not UTF-8, or as
            :func:`parse_json` says; made by ``error``.
    """

    def refuse(problem: str) -> ValueError:
        return ValueError(f"{path}: {problem}") if error is None else error(problem)

    def opener(name: str, flags: int) -> int:
        # A pipe in its place would make us wait for ever.
        return os.open(name, flags | os.O_NONBLOCK)

    try:
        with open(path, "rb", opener=opener) as file:
            is_plain = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            content = file.read(max_bytes + 1) if is_plain else b""
    except FileNotFoundError as reason:
        raise refuse("no such file") from reason
    except (OSError, ValueError) as reason:
        what = getattr(reason, "strerror", None) or str(reason)
        raise refuse(f"cannot be read ({what})") from reason
    if not is_plain:
        raise refuse("is no plain file")
    return parse_json(content, refuse, max_bytes)


def parse_json(
    content: bytes | str,
    error: Callable[[str], ValueError] = ValueError,
    max_bytes: int = MAX_BYTES,
) -> dict[str, Any]:
    """Read one JSON object.

    Args:
        content: Its text, in UTF-8 where it is bytes.
        error: Makes the exception from what is wrong.
        max_bytes: Size above which it is refused unread.

    Raises:
        ValueError: If it is too large, not UTF-8, no JSON, or no object, or if it holds values
            nested deeper than ``MAX_DEPTH``, a whole number that 64 bits cannot hold, or a text
            that UTF-8 cannot; made by ``error``.
    """
    if len(content) > max_bytes:
        raise error(f"is larger than {max_bytes:,} bytes")

    def whole_number(digits: str) -> int:
        if len(digits) > MAX_DIGITS or not -(2**63) <= int(digits) < 2**64:
            raise ValueError(f"a whole number of {len(digits)} digits")
        return int(digits)

    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        value = json.loads(text, parse_int=whole_number)
        if _HALF_PAIR.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError as reason:
        raise error(_TOO_DEEP) from reason
    except ValueError as reason:
        raise error(f"holds no JSON ({reason})") from reason
    if not isinstance(value, dict):
        raise error(f"holds {_KINDS.get(type(value), 'a number')} instead of an object")
    if _is_too_deep(value):
        raise error(_TOO_DEEP)
    return value


_TOO_DEEP = f"holds values nested deeper than {MAX_DEPTH}"
_KINDS = {list: "a list", str: "a text", bool: "a truth value", type(None): "null"}


def _is_too_deep(value: dict[str, Any]) -> bool:
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
    return bool(level)
