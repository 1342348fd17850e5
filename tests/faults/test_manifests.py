"""Manifests that are damaged, forged or endless: one clear error each, and old ones are read."""

import http.client
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import fuzz_manifests
import numpy
import pyarrow as pa
import pytest
import torch
from fuzz_manifests import ACTIVATION_SHAPES, IDENTITY
from pyarrow import parquet

from browser.features import FeatureLibrary, read_descriptions
from browser.notes import Note, NoteBook
from browser.server import create_app, serving
from callbacks.report import MAX_METRICS_BYTES, read_run
from datamodules.activation_store import open_or_build
from features.describe import SUMMARY_FILE, TABLE_FILE
from features.record import read_record
from policies.json_files import MAX_BYTES, MAX_DEPTH, parse_json, read_json


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "holds no JSON"),
        (b"{", "holds no JSON"),
        (b"[1]", "holds a list instead of an object"),
        (b"null", "holds null instead of an object"),
        (b"true", "holds a truth value"),
        (b'"x"', "holds a text"),
        (b"5", "holds a number"),
        (b"\xff{}", "holds no JSON .*utf-8"),
        (b"[" * 100_000, "nested deeper than"),
        (b'{"a":' * (MAX_DEPTH + 1) + b"1" + b"}" * (MAX_DEPTH + 1), "nested deeper than"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a whole number of 5000 digits"),
        (b'{"a": ' + b"9" * 30 + b"}", "a whole number of 30 digits"),
        (b'{"a": "\\ud800"}', "holds no JSON .*surrogates"),
        (b'{"a": "%s"}' % (b"x" * 2000), "larger than 1,000 bytes"),
    ],
)
def test_what_is_no_sound_object_is_refused(content: bytes, problem: str, tmp_path: Path) -> None:
    max_bytes = 1000 if b"xxx" in content else 1 << 20
    file = tmp_path / "manifest.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"manifest\.json: .*{problem}"):
        read_json(file, max_bytes=max_bytes)

    class OwnError(ValueError):
        pass

    with pytest.raises(OwnError, match=f"^(is|holds) (.*{problem.removeprefix('holds ')})"):
        read_json(file, OwnError, max_bytes)


def test_what_python_writes_is_read() -> None:
    value = {"a": [1, -(2**63), 2**64 - 1, 1.5, None, True], "ü": "\U0001f600", "n": {"x": [[]]}}
    for ensure_ascii in (True, False):
        assert parse_json(json.dumps(value, ensure_ascii=ensure_ascii)) == value
    deep: dict = {}
    for _ in range(MAX_DEPTH - 1):
        deep = {"a": deep}
    assert parse_json(json.dumps(deep)) == deep


def test_what_never_ends_or_never_begins_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path / "pipe.json", tmp_path, Path("/dev/zero")):
        with pytest.raises(ValueError, match=r"is no plain file|cannot be read"):
            read_json(path)
    with pytest.raises(ValueError, match=r"gone\.json: no such file"):
        read_json(tmp_path / "gone.json")


STORES = {
    "other_shards": {"shards": [[0, 3], [3, 8]]},
    "endless_shards": {"shards": [[0, 10**12]]},
    "half_a_piece": {"shards": [[0, 2], [2, 7]]},
    "gap": {"shards": [[0, 3], [4, 7]]},
    "no_shards": {"shards": None},
    "no_identity": {"identity": [1]},
    "another_key": {"key": "0"},
    "no_statistics": {"statistics": []},
}


@pytest.mark.parametrize("change", STORES)
def test_a_forged_store_of_activations_is_made_anew(change: str, tmp_path: Path) -> None:
    def compute(frames: range) -> torch.Tensor:
        return torch.full((len(frames), 1, 4), float(frames.start))

    def build():
        folder = tmp_path / "store"
        return open_or_build(
            folder, ACTIVATION_SHAPES, "float16", IDENTITY, compute, progress=False
        )

    before = build().read(range(7))
    file = tmp_path / "store" / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **STORES[change]}))
    assert torch.equal(build().read(range(7)), before)
    assert json.loads(file.read_text())["shards"] == [[0, 7]]


RUNS = {
    "metrics.csv": [
        "step,loss\n" + step + ",1\n" for step in ("inf", "nan", "-1", "1e308", "x", "", "9" * 400)
    ]
    + ["step,loss\n1,2,3\n", "loss\n1\n", "step,loss\n1," + "9" * 200_000 + "x\n"],
    "media/index.json": [
        "[]",
        '{"1": []}',
        '{"1": {"images": ["a"]}}',
        '{"1": {"images": {"a": 5}}}',
        '{"x": {}}',
        '{"' + "9" * 5000 + '": {}}',
        "[" * 50_000,
    ],
    "summary.json": ['{"step": "many"}', '{"status": 5}', '{"wall_s": "long"}', "null"],
    "environment.json": ["[]", "{"],
}


@pytest.mark.parametrize(
    ("file", "text"),
    [(file, text) for file, texts in RUNS.items() for text in texts],
    ids=lambda value: value[:24],
)
def test_a_damaged_file_of_a_run_is_named(file: str, text: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fuzz_manifests._write_run(run)
    assert read_run(run).last_step == 20
    (run / file).write_text(text)
    with pytest.raises(ValueError, match=rf"run/{file}: .*mend it or move it away") as refused:
        read_run(run)
    assert len(str(refused.value)) < 1000


def test_numbers_of_a_run_that_would_fill_the_memory_are_not_read(tmp_path: Path) -> None:
    """Few bytes for many cells, or too many bytes at once."""
    run = tmp_path / "run"
    fuzz_manifests._write_run(run)
    names = ",".join(f"n{number}" for number in range(20_000))
    (run / "metrics.csv").write_text(f"step,{names}\n" + "1\n" * 2000)
    with pytest.raises(ValueError, match=r"run/metrics\.csv: .*40,0\d\d,001 cells, more than"):
        read_run(run)
    for name, limit in (("metrics.csv", MAX_METRICS_BYTES), ("config.yaml", MAX_BYTES)):
        fuzz_manifests._write_run(tmp_path / name)
        with (tmp_path / name / name).open("ab") as file:
            file.truncate(limit + 1)
        with pytest.raises(ValueError, match=rf"{name}: .*{limit + 1:,} bytes, more than"):
            read_run(tmp_path / name)


def test_a_record_of_rows_out_of_nothing_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that say nothing are packed to almost no bytes."""
    read = parquet.ParquetFile.read

    def read_few(file: parquet.ParquetFile) -> pa.Table:
        assert file.metadata.num_rows < 10
        return read(file)

    monkeypatch.setattr(parquet.ParquetFile, "read", read_few)
    shutil.copytree(fuzz_manifests.bases() / "record", tmp_path / "record")
    read_record(tmp_path / "record")
    for name in ("activations.parquet", "frames.parquet"):
        file = tmp_path / "record" / name
        whole, schema = file.read_bytes(), parquet.read_schema(file)
        zeros = {each.name: numpy.zeros(2**20, each.type.to_pandas_dtype()) for each in schema}
        with parquet.ParquetWriter(file, schema, compression="zstd") as writer:
            for _ in range(17):
                writer.write_table(pa.table(zeros, schema))
        assert file.stat().st_size < 2**24
        with pytest.raises(ValueError, match=rf"{name}: .*17,825,792 rows in .* bytes"):
            read_record(tmp_path / "record")
        file.write_bytes(whole)


def test_a_table_of_features_out_of_nothing_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / SUMMARY_FILE).write_text("{}")
    latents = pa.table({"latent": pa.array(numpy.arange(3))})
    parquet.write_table(latents, tmp_path / TABLE_FILE)
    assert list(read_descriptions(tmp_path).rows) == [0, 1, 2]
    zeros = numpy.zeros(2**24 + 1, numpy.int8)
    parquet.write_table(pa.table({"latent": zeros}), tmp_path / TABLE_FILE)
    monkeypatch.setattr(parquet.ParquetFile, "read", Mock(side_effect=AssertionError("read")))
    with pytest.raises(ValueError, match=r"16,777,217 rows of 1 columns.*describe"):
        read_descriptions(tmp_path)


BODIES = {
    "deep": b"[" * 100_000,
    "list": b"[]",
    "empty": b"",
    "half": b'{"name": "a"',
    "not_utf8": b'{"name": "\xff", "note": "", "version": 0}',
    "half_a_character": b'{"name": "a", "note": "\\ud800", "version": 0}',
    "true_as_version": b'{"name": "a", "note": "", "version": true}',
    "endless_version": b'{"name": "a", "note": "", "version": ' + b"9" * 4000 + b"}",
    "no_texts": b'{"name": ["a"], "note": {}, "version": 0}',
    "document_of_lists": b'{"document": [[]], "rule": null}',
}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """Port of a page with notes, and their file."""
    book = NoteBook(tmp_path_factory.mktemp("notes") / "notes.json", "abc", 16)
    book.write(3, Note("edge", "of the block"))
    with serving(create_app(Mock(spec=FeatureLibrary), None, book)) as where:
        yield int(where.split(":")[2].strip("/")), book.path


@pytest.mark.parametrize("path", ["/api/features/3/note", "/api/features/notes/import"])
@pytest.mark.parametrize("body", BODIES)
def test_a_hostile_request_is_refused_and_changes_no_note(
    body: str, path: str, page: tuple[int, Path]
) -> None:
    port, notes = page
    before = notes.read_bytes()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    headers = {"Origin": f"http://127.0.0.1:{port}", "Content-Type": "application/json"}
    connection.request("POST", path, BODIES[body], headers)
    answer = connection.getresponse()
    said = json.loads(answer.read())["error"]
    connection.close()
    assert answer.status == 400
    assert said
    assert len(said) < 500
    assert notes.read_bytes() == before
