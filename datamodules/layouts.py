"""What demonstration files look like inside: declared by a schema, or detected by their signs.

A new file layout is one entry in :data:`LAYOUTS`; a single odd file is an :class:`HDF5Schema` in a
config. Detection looks for names only, never at values.

Paths in a schema are relative to the group of an episode. ``*`` stands for any name in the last
segment, and a trailing ``?`` marks a path that may be absent.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import h5py
from h5py import h5l  # pyright: ignore[reportAttributeAccessIssue]

from datamodules.errors import DatasetError, Problem

HDF5_SUFFIXES = (".hdf5", ".h5")

_SOFT_LINK_DEPTH = 16


@dataclass(frozen=True)
class CameraSource:
    """Where the pictures of a camera are, and how they are stored."""

    path: str
    """Data set of pictures in an episode, e.g. ``observations/images/top``."""
    encoding: Literal["auto", "raw", "jpeg", "png"] = "auto"
    """How a picture is stored; auto: raw when the data set has four axes, else by magic bytes."""
    colour: Literal["rgb", "bgr"] = "rgb"
    """Order of the channels; bgr when a standard viewer shows red and blue swapped."""
    layout: Literal["hwc", "chw"] = "hwc"
    """Order of the axes of a raw picture."""
    flip: Literal["none", "v", "h", "vh"] = "none"
    """Mirroring that sets a picture upright: v turns it upside down, h exchanges left and right."""
    float_range: Literal["auto", "unit", "byte"] = "auto"
    """Range of floating-point pictures: unit is 0..1, byte 0..255; auto looks at some frames."""


@dataclass(frozen=True)
class HDF5Schema:
    """Where everything is in a file or a folder of files."""

    files: tuple[str, ...] = ("*.hdf5", "*.h5")
    """Patterns of file names in a folder; ``**/`` searches below it."""
    skip_files: tuple[str, ...] = ()
    """Patterns of file names to leave out."""
    episode_group: str = "demo_*"
    """Pattern of the group of an episode; ``/`` when each file is one episode."""
    images: dict[str, CameraSource] = field(default_factory=dict)
    """Camera name to pictures; the name ``*`` with a ``*`` in the path takes the names found."""
    state: tuple[str, ...] = ()
    """Proprioception (qpos); several paths are joined in this order."""
    action: tuple[str, ...] = ("actions",)
    """Demonstrated actions; several paths are joined in this order."""
    action_offset: int = 0
    """Steps added to an action's index: -1 pairs observation t with the action stored at t - 1,
    as ACT does for recordings of real ALOHA arms."""
    smoothing: dict[str, int] = field(default_factory=dict)
    """Path to the width in steps of a moving average (Mobile ALOHA smooths base_action over 5)."""
    environment_state: tuple[str, ...] = ()
    """Privileged features that a policy may ask for."""
    simulator_state: str | None = None
    """State that resets the simulator to an observed instant."""
    fps: float | None = None
    """Control frequency in Hz; None reads the attribute ``fps`` of the file or the episode."""
    episode_count: str | None = None
    """Attribute ``group@name`` of a file that must agree with the number of episodes found."""
    train_mask: str | None = None
    """Data set of the file that names the training episodes (robomimic's filter key)."""
    val_mask: str | None = None
    """Data set of the file that names the validation episodes."""


@dataclass(frozen=True)
class Layout:
    """A known family of files."""

    name: str
    summary: str
    """What it is, for the reader of an error message."""
    signs: tuple[str, ...]
    """Paths that must exist in a file; ``group@name`` is an attribute, ``@name`` of the file."""
    absent: tuple[str, ...]
    """Paths that must not exist: signs of a more special layout."""
    schema: HDF5Schema


_ALOHA = HDF5Schema(
    files=("episode_*.hdf5",),
    episode_group="/",
    images={"*": CameraSource("observations/images/*")},
    state=("observations/qpos",),
    action=("action",),
    # Simulated ones of ours; the recordings of others have no such data set.
    simulator_state="observations/simulator_state?",
)

_ROBOMIMIC = HDF5Schema(
    episode_group="data/demo_*",
    images={"*": CameraSource("obs/*_image")},
    state=("obs/robot0_eef_pos", "obs/robot0_eef_quat", "obs/robot0_gripper_qpos"),
    action=("actions",),
    environment_state=("obs/object?",),
    simulator_state="states?",
    train_mask="mask/train?",
    val_mask="mask/valid?",
)

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(
            "demos",
            "one file of groups demo_0, demo_1, ... with observations/ and actions",
            signs=("@num_demos", "demo_*"),
            absent=(),
            schema=HDF5Schema(
                images={
                    "image": CameraSource("observations/image?"),
                    "*": CameraSource("observations/images/*?"),
                },
                state=("observations/qpos",),
                action=("actions",),
                simulator_state="observations/state?",
                episode_count="@num_demos",
            ),
        ),
        Layout(
            "aloha",
            "a folder of episode_N.hdf5 with observations/qpos, observations/images and action",
            signs=("observations/qpos", "observations/images", "action"),
            absent=("base_action",),
            schema=_ALOHA,
        ),
        Layout(
            "aloha_pp",
            "ALOHA with a mobile base: base_action beside action, pictures usually JPEG",
            signs=("observations/qpos", "observations/images", "action", "base_action"),
            absent=(),
            schema=HDF5Schema(
                files=("**/*.hdf5",),
                skip_files=("*features*", "*mirror*"),
                episode_group="/",
                images={"*": CameraSource("observations/images/*")},
                state=("observations/qpos",),
                action=("action", "base_action"),
                smoothing={"base_action": 5},
            ),
        ),
        Layout(
            "robomimic",
            "one file with data/demo_N/obs/*, actions and the attribute env_args",
            signs=("data@env_args", "data/demo_*"),
            absent=("data@bddl_file_name",),
            schema=_ROBOMIMIC,
        ),
        Layout(
            "libero",
            "robomimic's groups with LIBERO's keys; its OpenGL pictures are upside down",
            signs=("data@bddl_file_name", "data/demo_*"),
            absent=(),
            schema=HDF5Schema(
                episode_group="data/demo_*",
                images={"*": CameraSource("obs/*_rgb", flip="v")},
                state=("obs/joint_states", "obs/gripper_states"),
                action=("actions",),
                simulator_state="states?",
                episode_count="data@num_demos?",
                train_mask="mask/train?",
                val_mask="mask/valid?",
            ),
        ),
    )
}


class ForeignStorageError(Exception):
    """An object in the file lies, or may lie, outside it."""

    def __init__(self, key: str, what: str) -> None:
        super().__init__(key, what)
        self.key = key
        self.what = what


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key under which demo_10 comes after demo_2."""
    return [
        (0, int(part), part) if part.isdecimal() else (1, 0, part)
        for part in re.split(r"(\d+)", name)
        if part
    ]


def member(group: h5py.Group, path: str, depth: int = 0) -> h5py.Group | h5py.Dataset | None:
    """Follow a path inside one file, and never out of it.

    An external link makes HDF5 open any file that the user may read, so each link on the way is
    looked at before it is followed.

    Args:
        group: Where a relative path starts.
        path: Names separated by ``/``; a leading ``/`` starts at the root.
        depth: Soft links followed so far.

    Returns:
        The group or data set, or None when there is none.

    Raises:
        ForeignStorageError: For an external link, external or virtual storage, or a loop.
    """
    here: h5py.Group | h5py.Dataset | None = group
    if path.startswith("/"):
        here = group.file["/"]  # pyright: ignore[reportAssignmentType]
    for name in path.split("/"):
        if name in ("", "."):
            continue
        if not isinstance(here, h5py.Group):
            return None
        links = here.id.links  # pyright: ignore[reportAttributeAccessIssue]
        key = f"{here.name}/{name}".replace("//", "/")
        encoded = name.encode()
        if not links.exists(encoded):
            return None
        kind = links.get_info(encoded).type
        if kind == h5l.TYPE_EXTERNAL:
            file, target = (part.decode(errors="replace") for part in links.get_val(encoded))
            raise ForeignStorageError(key, f"is an external link to {target} in {file}")
        if kind == h5l.TYPE_SOFT:
            if depth >= _SOFT_LINK_DEPTH:
                raise ForeignStorageError(key, "is a soft link in a chain that never ends")
            here = member(here, links.get_val(encoded).decode(errors="replace"), depth + 1)
        elif kind == h5l.TYPE_HARD:
            found = here[name]
            here = found if isinstance(found, h5py.Group | h5py.Dataset) else None
        else:
            raise ForeignStorageError(key, f"is a link of the unknown kind {kind}")
    if isinstance(here, h5py.Dataset):
        if here.external:
            files = ", ".join(sorted({str(entry[0]) for entry in here.external}))
            raise ForeignStorageError(str(here.name), f"keeps its values in other files ({files})")
        if here.is_virtual:
            files = ", ".join(sorted({source.file_name for source in here.virtual_sources()}))
            raise ForeignStorageError(str(here.name), f"is a virtual data set over ({files})")
    return here


def matching(group: h5py.Group, pattern: str) -> Iterator[str]:
    """Paths below a group that match a pattern, ``*`` within a segment, in natural order."""
    head, _, tail = pattern.strip("/").partition("/")
    for name in sorted(group.keys(), key=natural_key):
        if not fnmatchcase(name, head):
            continue
        if not tail:
            yield name
        elif isinstance(below := member(group, name), h5py.Group):
            yield from (f"{name}/{rest}" for rest in matching(below, tail))


def _shows(file: h5py.File, sign: str) -> bool:
    path, _, attribute = sign.partition("@")
    if not path:
        return attribute in file.attrs
    for found in matching(file, path):
        if not attribute:
            return True
        thing = member(file, found)
        if thing is not None and attribute in thing.attrs:
            return True
    return False


def seen(file: h5py.File) -> str:
    """Names at the root of a file and one level below, for an error message."""

    def listed(names: list[str]) -> str:
        names = sorted(names, key=natural_key)
        more = f", ... ({len(names)} in all)" if len(names) > 8 else ""
        return ", ".join(names[:8]) + more

    parts = [f"attributes: {listed(list(file.attrs)) or 'none'}"]
    names = sorted(file.keys(), key=natural_key)
    parts.append(f"keys: {listed(names) or 'none'}")
    for name in names[:2]:
        try:
            below = member(file, name)
        except ForeignStorageError:
            continue
        if isinstance(below, h5py.Group):
            parts.append(f"in {name}: {listed(list(below.keys())) or 'nothing'}")
    return "; ".join(parts)


def detect_layout(file: h5py.File) -> Layout:
    """Find the one known layout whose signs a file shows.

    Args:
        file: An open file.

    Returns:
        The layout.

    Raises:
        DatasetError: When no layout or more than one matches; says what was seen.
    """
    missing: dict[str, list[str]] = {}
    for layout in LAYOUTS.values():
        missing[layout.name] = [sign for sign in layout.signs if not _shows(file, sign)]
    found = [
        layout
        for layout in LAYOUTS.values()
        if not missing[layout.name] and not any(_shows(file, sign) for sign in layout.absent)
    ]
    if len(found) == 1:
        return found[0]
    if found:
        names = " and ".join(layout.name for layout in found)
        what = f"the file shows the signs of {names} ({seen(file)})"
        mend = f"say which one it is, e.g. layout: {found[0].name}"
    else:
        what = f"no known layout ({seen(file)})"
        share = {
            name: 1 - len(absent) / len(LAYOUTS[name].signs) for name, absent in missing.items()
        }
        best = max(share, key=lambda name: share[name])
        hint = ""
        if share[best] > 0:
            lacking = ", ".join(_spelt(sign) for sign in missing[best])
            hint = f"did you mean layout '{best}', which needs {lacking}? Otherwise "
        mend = f"{hint}declare where things are with schema: (known: {', '.join(LAYOUTS)})"
    raise DatasetError(
        file.filename, [Problem(file.filename, "", what, mend, kind="unknown layout")]
    )


def _spelt(sign: str) -> str:
    path, _, attribute = sign.partition("@")
    if not attribute:
        return path
    return f"the attribute {attribute} of {path or 'the file'}"


def find_files(path: Path, schema: HDF5Schema) -> list[Path]:
    """Files of a data set in natural order.

    Args:
        path: A file, or a folder to search with the schema's patterns.
        schema: Names of files to take and to skip.

    Returns:
        Paths; each lies inside the folder after symbolic links are resolved.

    Raises:
        DatasetError: When nothing matches, or something leads out of the folder.
    """
    if path.is_file():
        return [path]
    leading = [p for p in schema.files if p.startswith(("/", "~")) or ".." in Path(p).parts]
    if leading:
        what = f"the pattern {leading[0]!r} leads out of the folder"
        raise DatasetError(
            path, [Problem(str(path), "files", what, "use patterns relative to the folder")]
        )
    found = {
        file
        for pattern in schema.files
        for file in path.glob(pattern)
        if file.is_file() and not any(fnmatchcase(file.name, skip) for skip in schema.skip_files)
    }
    if not found:
        names = sorted((entry.name for entry in path.iterdir()), key=natural_key)
        shown = ", ".join(names[:8]) or "nothing"
        what = f"no file matches {' or '.join(schema.files)}; the folder holds {shown}"
        raise DatasetError(
            path, [Problem(str(path), "", what, "check the path, or declare schema.files")]
        )
    # A snapshot of the Hugging Face cache consists of symbolic links to blobs two levels up.
    root = path.resolve()
    root = root.parent.parent if root.parent.name == "snapshots" else root
    problems = [
        Problem(
            str(file),
            "",
            f"is a symbolic link out of the data folder, to {file.resolve()}",
            "copy the file into the folder, or give its own path",
        )
        for file in sorted(found)
        if not file.resolve().is_relative_to(root)
    ]
    if problems:
        raise DatasetError(path, problems)
    return sorted(found, key=lambda file: natural_key(str(file.relative_to(path))))
