"""Notes: nothing that was written is lost, and nothing is shown that was written of another."""

import json
import threading
from pathlib import Path

import pytest

from browser.notes import MAX_NAME, Note, NoteBook, NoteConflictError

HASH, OTHER = "a" * 32, "b" * 32


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "browse" / "notes.json"


def book(path: Path, autoencoder: str = HASH) -> NoteBook:
    return NoteBook(path, autoencoder, 64)


def test_what_is_written_is_read_by_the_next_book(path):
    written = book(path).write(12, Note("pushes left", "see </script> & “that”\nsecond line"))
    assert written.version == 1
    assert book(path).read() == {12: written}


def test_a_book_that_only_reads_makes_no_file(path):
    assert book(path).read() == {}
    assert not path.parent.exists()


def test_notes_of_another_autoencoder_are_kept_and_not_shown(path):
    book(path).write(3, Note("mine"))
    assert book(path, OTHER).read() == {}
    book(path, OTHER).write(3, Note("theirs"))
    assert book(path).read()[3].name == "mine"
    assert book(path, OTHER).read()[3].name == "theirs"


def test_an_older_version_is_refused_and_nothing_changes(path):
    first, second = book(path), book(path)
    seen = second.read().get(5, Note())
    first.write(5, Note("first"))
    before = path.read_bytes()
    with pytest.raises(NoteConflictError) as refused:
        second.write(5, Note("second", version=seen.version))
    assert refused.value.current == Note("first", "", 1)
    assert path.read_bytes() == before
    second.write(5, Note("second", version=1))
    assert first.read()[5] == Note("second", "", 2)


def test_the_same_text_twice_is_no_conflict(path):
    once = book(path).write(5, Note("same"))
    assert book(path).write(5, Note("same")) == once
    assert book(path).read() == {5: once}


def test_other_features_do_not_conflict(path):
    first, second = book(path), book(path)
    first.write(1, Note("one"))
    second.write(2, Note("two"))
    assert {latent: note.name for latent, note in first.read().items()} == {1: "one", 2: "two"}


def test_an_emptied_note_keeps_its_version(path):
    book(path).write(1, Note("one"))
    emptied = book(path).write(1, Note("", "", 1))
    assert emptied.version == 2
    assert emptied.is_empty
    assert book(path).export()["features"] == {}
    with pytest.raises(NoteConflictError):
        book(path).write(1, Note("late", "", 1))


def test_writers_at_the_same_time_lose_nothing(path):
    def write(first: int) -> None:
        mine = book(path)
        for latent in range(first, 64, 4):
            mine.write(latent, Note(f"n{latent}"))

    threads = [threading.Thread(target=write, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {latent: note.name for latent, note in book(path).read().items()} == {
        latent: f"n{latent}" for latent in range(64)
    }


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"format_version": 1}',
        '{"format_version": 2, "autoencoders": {}}',
        json.dumps({"format_version": 1, "autoencoders": {HASH: {"64": {"name": "", "note": ""}}}}),
        json.dumps({"format_version": 1, "autoencoders": {HASH: {"1": {"name": 3, "note": ""}}}}),
        json.dumps({"format_version": 1, "autoencoders": {HASH: {"1": "text"}}}),
        json.dumps({"format_version": 1, "autoencoders": {HASH: []}}),
    ],
)
def test_a_damaged_file_is_named_and_not_written_over(text, path):
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ValueError, match=r"notes\.json"):
        book(path)
    assert path.read_text() == text


def test_a_file_damaged_later_is_not_written_over_either(path):
    mine = book(path)
    mine.write(1, Note("one"))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"notes\.json"):
        mine.write(2, Note("two"))
    assert path.read_bytes() == b"\xff\xfe"
    assert sorted(file.name for file in path.parent.iterdir()) == [
        ".notes.json.lock",
        "notes.json",
    ]


def test_a_write_that_fails_leaves_the_old_file(path, monkeypatch):
    mine = book(path)
    mine.write(1, Note("one"))
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("policies.atomic_files.os.fsync", full)
    with pytest.raises(OSError, match="space"):
        mine.write(1, Note("two", version=1))
    assert path.read_bytes() == before
    assert not list(path.parent.glob("*.part"))


@pytest.mark.parametrize(
    ("name", "note"), [("x" * (MAX_NAME + 1), ""), ("two\nlines", ""), ("", "x" * 10_001)]
)
def test_texts_have_limits(name, note):
    with pytest.raises(ValueError, match="characters"):
        Note(name, note)


def test_an_unknown_feature_is_refused(path):
    with pytest.raises(ValueError, match="0 to 63"):
        book(path).write(64, Note("x"))


def test_export_and_import_are_a_round_trip(path, tmp_path):
    mine = book(path)
    mine.write(1, Note("one", "first"))
    mine.write(2, Note("two"))
    document = json.loads(json.dumps(mine.export()))
    fresh = book(tmp_path / "other.json")
    assert fresh.merge(document).n_written == 2
    assert fresh.export() == document
    assert fresh.merge(document).n_written == 0


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("mine", ("mine", "my note")),
        ("theirs", ("theirs", "their note")),
        ("both", ("mine / theirs", "my note\ntheir note")),
    ],
)
def test_an_import_asks_and_then_follows_the_rule(rule, expected, path, tmp_path):
    theirs = book(tmp_path / "theirs.json")
    theirs.write(1, Note("theirs", "their note"))
    theirs.write(2, Note("new"))
    mine = book(path)
    mine.write(1, Note("mine", "my note"))
    asked = mine.merge(theirs.export())
    assert asked.n_written == 0
    assert [(each.latent, each.mine.name, each.theirs.name) for each in asked.conflicts] == [
        (1, "mine", "theirs")
    ]
    assert 2 not in mine.read()
    assert not mine.merge(theirs.export(), rule).conflicts
    assert (mine.read()[1].name, mine.read()[1].note) == expected
    assert mine.read()[2].name == "new"
    again = mine.read()
    mine.merge(theirs.export(), rule)
    assert mine.read() == again


def test_both_names_that_do_not_fit_are_both_kept(path, tmp_path):
    theirs = book(tmp_path / "theirs.json")
    theirs.write(1, Note("t" * MAX_NAME))
    mine = book(path)
    mine.write(1, Note("m" * MAX_NAME))
    mine.merge(theirs.export(), "both")
    assert mine.read()[1].name == "m" * MAX_NAME
    assert mine.read()[1].note == "t" * MAX_NAME


@pytest.mark.parametrize("change", [{"autoencoder": OTHER}, {"format": "x"}, {"features": []}])
def test_an_import_of_something_else_is_refused(change, path):
    mine = book(path)
    mine.write(1, Note("one"))
    with pytest.raises(ValueError, match="import"):
        mine.merge({**mine.export(), **change})
    assert mine.read()[1] == Note("one", "", 1)
