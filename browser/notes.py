"""Names and notes of features, in one JSON file that is whole at every instant.

They are kept by the autoencoder's hash, so that feature 12 of one is never shown as feature 12 of
another. Whoever writes says which version they saw: what somebody else wrote since is not lost.
"""

import fcntl
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal, get_args

from autoencoders.files import WEIGHTS_FILE, LoadedAutoencoder
from policies.atomic_files import write_atomically
from policies.json_files import read_json

FORMAT, FORMAT_VERSION = "policyscope feature notes", 1
MAX_NAME, MAX_NOTE = 80, 10_000
"""Characters."""
NAME_GAP = " / "
"""Between names of which both are kept."""

Rule = Literal["mine", "theirs", "both"]
"""Whose text stays where an import says something else: what was there, what is imported, or both,
names joined by ``/`` and notes below each other."""


@dataclass(frozen=True)
class Note:
    """What somebody wrote about a feature."""

    name: str = ""
    """Short; one line."""
    note: str = ""
    version: int = 0
    """Counts the writes; 0 where nothing was ever written."""

    def __post_init__(self) -> None:
        if len(self.name) > MAX_NAME or not self.name.isprintable():
            raise ValueError(
                f"name {self.name[: MAX_NAME + 10]!r}: give one line of at most {MAX_NAME} "
                "characters"
            )
        if len(self.note) > MAX_NOTE:
            raise ValueError(f"note of {len(self.note)} characters: give at most {MAX_NOTE}")
        if any("\ud800" <= character <= "\udfff" for character in self.note):
            raise ValueError("the note holds half a character; write it again")

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to read."""
        return not (self.name or self.note)

    def says(self, other: "Note") -> bool:
        """Whether both have the same texts."""
        return (self.name, self.note) == (other.name, other.note)


class NoteConflictError(ValueError):
    """Somebody else wrote in the meantime.

    Args:
        latent: The feature.
        current: What is there now.
    """

    def __init__(self, latent: int, current: Note) -> None:
        super().__init__(
            f"feature {latent}: its name or note was changed elsewhere since this page read it"
        )
        self.latent = latent
        self.current = current


@dataclass(frozen=True)
class Conflict:
    """A feature of which an import says something else."""

    latent: int
    mine: Note
    """What is there."""
    theirs: Note
    """What is imported."""


@dataclass(frozen=True)
class Merge:
    """What became of an import."""

    n_written: int
    conflicts: tuple[Conflict, ...]
    """To decide; if there is one, nothing was written."""


def autoencoder_hash(loaded: LoadedAutoencoder) -> str:
    """Fingerprint of an autoencoder's weights, threshold included."""
    return hashlib.blake2b((loaded.source / WEIGHTS_FILE).read_bytes(), digest_size=16).hexdigest()


class NoteBook:
    """Names and notes of one autoencoder's features.

    Args:
        path: The JSON file; made at the first write, its folder too. Notes of other autoencoders
            in it stay.
        autoencoder: Its hash, see :func:`autoencoder_hash`.
        n_latents: Its width.

    Raises:
        ValueError: If the file is damaged; it is never written over.
    """

    def __init__(self, path: Path, autoencoder: str, n_latents: int) -> None:
        self.path = path
        self.autoencoder = autoencoder
        self.n_latents = n_latents
        self._lock = threading.Lock()
        self.read()

    def read(self) -> dict[int, Note]:
        """Notes by feature, also those that were emptied.

        Raises:
            ValueError: If the file is damaged.
        """
        return self._notes(self._document())

    def write(self, latent: int, note: Note) -> Note:
        """Replace a feature's name and note.

        Args:
            latent: The feature.
            note: With the version that it replaces.

        Returns:
            What is there now, with its version.

        Raises:
            NoteConflictError: If another version with other texts is there.
            ValueError: If there is no such feature, or the file is damaged.
        """
        self._check(latent)
        with self._alone():
            document = self._document()
            notes = self._notes(document)
            current = notes.get(latent, Note())
            if current.says(note):
                return current
            if current.version != note.version:
                raise NoteConflictError(latent, current)
            notes[latent] = replace(note, version=note.version + 1)
            self._replace(document, notes)
            return notes[latent]

    def export(self) -> dict[str, Any]:
        """All that was written, to keep or to give away; plain values."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "autoencoder": self.autoencoder,
            "features": {
                str(latent): {"name": note.name, "note": note.note}
                for latent, note in sorted(self.read().items())
                if not note.is_empty
            },
        }

    def merge(self, document: Any, rule: Rule | None = None) -> Merge:
        """Take in what :meth:`export` gave, here or elsewhere.

        Args:
            document: As it was exported.
            rule: What becomes of features of which both say something, and not the same; when None
                and there is one, nothing is written.

        Raises:
            ValueError: If the document is no export, or of another autoencoder.
        """
        if rule is not None and rule not in get_args(Rule):
            raise ValueError(f"rule {rule!r}: give one of {', '.join(get_args(Rule))}")
        theirs = self._imported(document)
        with self._alone():
            stored = self._document()
            notes = self._notes(stored)
            changed: dict[int, Note] = {}
            conflicts = []
            for latent, their in theirs.items():
                mine = notes.get(latent, Note())
                if mine.says(their):
                    continue
                if not mine.is_empty:
                    conflicts.append(Conflict(latent, mine, their))
                kept = their if mine.is_empty else _merged(mine, their, rule)
                if not mine.says(kept):
                    changed[latent] = replace(kept, version=mine.version + 1)
            if conflicts and rule is None:
                return Merge(0, tuple(conflicts))
            if changed:
                self._replace(stored, {**notes, **changed})
            return Merge(len(changed), ())

    def _imported(self, document: Any) -> dict[int, Note]:
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ValueError("import: this is no export of feature notes; choose another file")
        if document.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"import: format_version {str(document.get('format_version'))[:40]!a}, this "
                f"version reads {FORMAT_VERSION}; export the notes again"
            )
        if document.get("autoencoder") != self.autoencoder:
            raise ValueError(
                "import: these are notes of another autoencoder, whose features mean other things"
            )
        return _read_notes(document.get("features"), "import", self.n_latents)

    def _check(self, latent: int) -> None:
        if not 0 <= latent < self.n_latents:
            raise ValueError(f"feature {latent}: there are 0 to {self.n_latents - 1}")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other threads, and other processes on the same file, out."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f".{self.path.name}.lock")
        with self._lock, beside.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _document(self) -> dict[str, Any]:
        if not self.path.exists():
            return {"format_version": FORMAT_VERSION, "autoencoders": {}}
        document = read_json(self.path, self._damaged)
        if not isinstance(document.get("autoencoders"), dict):
            raise self._damaged("autoencoders is missing")
        if document.get("format_version") != FORMAT_VERSION:
            raise self._damaged(
                f"format_version {str(document.get('format_version'))[:40]!a}, this version reads "
                f"{FORMAT_VERSION}"
            )
        return document

    def _notes(self, document: Mapping[str, Any]) -> dict[int, Note]:
        try:
            return _read_notes(
                document["autoencoders"].get(self.autoencoder, {}), "autoencoders", self.n_latents
            )
        except ValueError as error:
            raise self._damaged(str(error)) from error

    def _damaged(self, reason: str) -> ValueError:
        return ValueError(
            f"{self.path}: these notes cannot be read ({reason}); mend the file or move it away, "
            "nothing was written to it"
        )

    def _replace(self, document: dict[str, Any], notes: Mapping[int, Note]) -> None:
        written = {str(latent): asdict(note) for latent, note in sorted(notes.items())}
        document["autoencoders"][self.autoencoder] = written
        text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
        write_atomically(self.path, text)


def _read_notes(entries: Any, where: str, n_latents: int) -> dict[int, Note]:
    """Notes from plain values.

    Raises:
        ValueError: If they are something else.
    """
    if not isinstance(entries, dict):
        raise ValueError(f"{where}: holds no features")
    notes = {}
    for key, entry in entries.items():
        is_number = key.isascii() and key.isdecimal() and len(key) < 12
        if not is_number or int(key) >= n_latents:
            named = shorten(ascii(key), 60)
            raise ValueError(f"{where}: feature {named}; there are 0 to {n_latents - 1}")
        name, note = (
            (entry.get("name"), entry.get("note")) if isinstance(entry, dict) else (None, None)
        )
        version = entry.get("version", 0) if isinstance(entry, dict) else 0
        if not (isinstance(name, str) and isinstance(note, str) and type(version) is int):
            raise ValueError(f"{where}: feature {key} needs a name and a note, both texts")
        notes[int(key)] = Note(name, note, version)
    return notes


def _merged(mine: Note, theirs: Note, rule: Rule | None) -> Note:
    """One note of two; importing it again changes nothing."""
    if rule == "theirs":
        return theirs
    if rule != "both":
        return mine
    names = [name for name in (mine.name, theirs.name) if name]
    if theirs.name in mine.name.split(NAME_GAP):
        names = [mine.name]
    name, texts = NAME_GAP.join(names), [mine.note]
    if len(name) > MAX_NAME:
        # A name that does not fit beside the other is kept in the note.
        name = mine.name
        texts.append(theirs.name)
    texts.append(theirs.note)
    kept = [text for place, text in enumerate(texts) if not place or text not in mine.note]
    return Note(name, "\n".join(text for text in kept if text))
