"""Names that strangers wrote, as paths that cannot leave their folder."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any


def inside(
    root: Path,
    relative: Any,
    error: Callable[[str], ValueError] = ValueError,
    links_within: Path | None = None,
) -> Path:
    """Give the path of a file that another file names, when it lies below ``root``.

    Symbolic links are followed to judge it. The file need not be there.

    Args:
        root: The folder that the name is relative to.
        relative: The name, whatever was found where a name should be.
        error: Makes the exception from what is wrong with the name.
        links_within: A folder beside ``root`` that links may lead to as well.

    Returns:
        ``root / relative``.

    Raises:
        ValueError: If the name is no text, is empty or absolute, goes up, cannot be the name of a
            file, or leads out through a link; made by ``error``.
    """
    if not isinstance(relative, str):
        raise error(f"{_short(relative)} is no name of a file")
    parts = PurePosixPath(relative).parts
    if not parts or "\0" in relative:
        raise error(f"{_short(relative)} is no name of a file")
    if ".." in parts or parts[0].startswith("/"):
        raise error(f"{_short(relative)} leads out of {root}")
    path = root / relative
    try:
        # Too long a name, or a circle of links.
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            path.stat()
        target = path.resolve()
        is_below = any(
            target.is_relative_to(folder.resolve()) for folder in (root, links_within) if folder
        )
    except (OSError, RuntimeError, ValueError) as reason:
        raise error(f"{_short(relative)} is no name of a file ({_short(str(reason))})") from reason
    if not is_below:
        raise error(f"{_short(relative)} is a link out of {root}")
    return path


def _short(value: Any) -> str:
    """Anything in one short line of ASCII."""
    text = ascii(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"
