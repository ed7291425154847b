"""Parquet files and data sets of the Hub become the JSON lines that a user would write."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from invivo.errors import InvalidRequest, MissingDependency, NotFound
from invivo.jobs.folder import JobFolder
from invivo.jobs.records import parse_line
from invivo.lm_jobs import FileInfo, upload
from invivo.table_data import examples_of, is_table, table_name

CHATS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "the cat", "weight": 1},
        ]
    },
    {"messages": [{"role": "assistant", "content": "ein Wörtchen"}]},
]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[JobFolder]:
    with JobFolder(tmp_path / "state") as opened:
        yield opened


def stored(folder: JobFolder, file: FileInfo) -> list[dict[str, Any]]:
    lines = folder.content(file.id).decode().splitlines()
    for line in lines:
        parse_line(line)
    return [json.loads(line) for line in lines]


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_a_parquet_file_is_uploaded_as_lines(folder: JobFolder, tmp_path: Path) -> None:
    rows = [chat | {"id": i, "text": None} for i, chat in enumerate(CHATS)]
    file = upload(folder, written(tmp_path / "chats.parquet", rows))
    assert (file.filename, file.n_lines) == ("chats.jsonl", 2)
    assert stored(folder, file) == CHATS  # neither other columns nor empty fields


def test_many_rows_are_read_in_pieces(folder: JobFolder, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}", "completion": "the cat"} for i in range(3000)]
    file = upload(folder, str(written(tmp_path / "a.pq", rows)))
    assert stored(folder, file) == rows


def test_what_cannot_be_read_is_refused(folder: JobFolder, tmp_path: Path) -> None:
    other = written(tmp_path / "other.parquet", [{"question": "?", "answer": "!"}])
    with pytest.raises(InvalidRequest, match="question, answer"):
        upload(folder, other)
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 this is none")
    with pytest.raises(InvalidRequest, match="Parquet"):
        upload(folder, broken)
    with pytest.raises(NotFound):
        upload(folder, tmp_path / "missing.parquet")
    assert folder.files() == []


class Loaded:
    """A stand-in for the library: what it was asked, and rows."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        self.asked: tuple[Any, ...] = ()

    def load_dataset(self, *given: Any, **options: Any) -> Any:
        self.asked = (*given, options)
        if given[0] == "no/such":
            raise FileNotFoundError("Dataset 'no/such' doesn't exist on the Hub")
        if options["split"] == "none":
            raise ValueError('Unknown split "none"')
        return iter(self.rows)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Loaded:
    loaded = Loaded([chat | {"source": "web"} for chat in CHATS])
    module = ModuleType("datasets")
    module.load_dataset = loaded.load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return loaded


def test_a_data_set_of_the_hub_is_streamed(folder: JobFolder, library: Loaded) -> None:
    file = upload(folder, "hf://datasets/org/chats@v1.0?split=test&config=small")
    assert file.filename == "chats.jsonl"
    assert stored(folder, file) == CHATS
    options = {"split": "test", "revision": "v1.0", "streaming": True}
    assert library.asked == ("org/chats", "small", options)
    upload(folder, "hf://datasets/org/chats")
    assert library.asked == ("org/chats", None, {**options, "split": "train", "revision": None})


@pytest.mark.parametrize(
    ("uri", "error"),
    [
        ("hf://datasets/no/such", NotFound),
        ("hf://datasets/org/chats?split=none", InvalidRequest),
        ("hf://datasets/org/chats?spilt=test", InvalidRequest),
        ("hf://datasets/", InvalidRequest),
    ],
)
def test_what_the_hub_does_not_have_is_told(
    folder: JobFolder, library: Loaded, uri: str, error: type[Exception]
) -> None:
    with pytest.raises(error, match="data: "):
        upload(folder, uri)
    assert folder.files() == []


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, uri, extra in (
        ("datasets", "hf://datasets/org/chats", "hub"),
        ("pyarrow", "a.parquet", "study"),
    ):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(MissingDependency, match=rf"invivo\[{extra}\]"):
            next(examples_of(uri))


def test_what_is_a_table() -> None:
    assert is_table("a/b.parquet")
    assert is_table(Path("b.PQ"))
    assert is_table("hf://datasets/org/chats")
    assert not is_table("a.jsonl")
    assert not is_table("file-1a2b")
    assert table_name("hf://datasets/org/chats@main?split=a.b") == "chats.jsonl"


def test_any_iterable_of_examples_is_data(folder: JobFolder) -> None:
    assert stored(folder, upload(folder, (chat for chat in CHATS))) == CHATS
    for nothing in (b"text", {"text": "x"}, iter(())):
        with pytest.raises(InvalidRequest):
            upload(folder, nothing)  # type: ignore[arg-type]
