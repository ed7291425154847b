"""Texts come out of files of every kind unchanged, in passages, with their splits."""

from __future__ import annotations

import gzip
import json
import lzma
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.training.texts import books, story

from invivo.errors import InvalidRequest, NotFound
from invivo.training.config import Source
from invivo.training.sources import PASSAGE, Passage, Reader, SourceFile, find_files


def read(path: Path, **options: object) -> list[Passage]:
    return list(Reader(SourceFile(path, **options)))  # type: ignore[arg-type]


def documents(passages: list[Passage]) -> list[tuple[str, str]]:
    """(split, text) of each, put together again."""
    found: list[tuple[str, str]] = []
    for passage in passages:
        if passage.begins:
            found.append((passage.split, ""))
        split, text = found[-1]
        assert split == passage.split
        found[-1] = (split, text + passage.text)
    return found


def test_marked_documents_keep_their_split_and_text(tmp_path: Path) -> None:
    path = tmp_path / "books.txt"
    path.write_text(books(5), encoding="utf-8")
    expected = [
        (split, story(i, 40 + 11 * i))
        for i, split in enumerate(("train", "train", "valid", "test", "train"))
    ]
    assert documents(read(path)) == expected


@pytest.mark.parametrize("ending", [".xz", ".gz"])
def test_packed_files_read_as_plain_ones(tmp_path: Path, ending: str) -> None:
    plain, packed = tmp_path / "a.txt", tmp_path / f"a.txt{ending}"
    plain.write_text(books(4), encoding="utf-8")
    opener = lzma.open if ending == ".xz" else gzip.open
    with opener(packed, "wt", encoding="utf-8") as file:
        file.write(books(4))
    assert read(packed) == read(plain)


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), max_size=80))
def test_a_text_without_marks_comes_back_whole(text: str, tmp_path_factory: object) -> None:
    path = tmp_path_factory.mktemp("plain") / "a.txt"  # type: ignore[attr-defined]
    text = text * 400
    path.write_text(text, encoding="utf-8", newline="")
    passages = read(path)
    joined = "".join(p.text for p in passages)
    assert joined == (text if text.strip() else "")
    assert sum(p.begins for p in passages) == bool(text.strip())


def test_very_long_lines_are_cut_between_characters(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    text = "aé東😀" * 300_000 + "\nend"
    path.write_text(text, encoding="utf-8")
    passages = read(path)
    assert "".join(p.text for p in passages) == text
    assert max(len(p.text) for p in passages) <= (1 << 20) + PASSAGE


@pytest.mark.parametrize("name", ["big.txt", "big.txt.gz", "big.jsonl"])
def test_a_file_is_never_whole_in_memory(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    line = story(3, 400)
    record = json.dumps({"text": line}) + "\n" if name.endswith("jsonl") else line
    with (gzip.open if name.endswith("gz") else open)(path, "wt", encoding="utf-8") as file:
        for _ in range(2000):
            file.write(record)
    size = 2000 * len(record.encode())
    tracemalloc.start()
    try:
        read_bytes = sum(len(p.text.encode()) for p in Reader(SourceFile(path)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert read_bytes == 2000 * len(line.encode())
    assert size > 3_000_000
    assert peak < size / 2


def test_json_lines_are_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    long = story(1, 9000)
    lines = [{"body": story(0)}, {"body": "  "}, {"body": long}, {"body": "half \ud83d"}]
    path.write_text("\n\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    found = documents(read(path, column="body", split="train"))
    assert [text for _, text in found] == [story(0), long, "half ?"]


def test_table_rows_are_documents(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"body": [story(0), story(1)], "n": [1, 2]}), path)
    assert documents(read(path, column="body", split="test")) == [
        ("test", story(0)),
        ("test", story(1)),
    ]
    with pytest.raises(InvalidRequest, match="body, n"):
        read(path)


def test_what_is_not_a_table_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    path.write_bytes(b"no table at all")
    with pytest.raises(InvalidRequest, match=r"a\.parquet"):
        read(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"one\ntwo \xff\n", r"a\.txt, line 2: is not UTF-8"),
        ("a.txt", b"one\n<|doc x train|>\ntwo", r"a\.txt, line 2: a document begins here, after"),
        ("a.jsonl", b'{"text": "x"}\n{"text"', r"a\.jsonl, line 2: is not JSON"),
        ("a.jsonl", b'\n["x"]', r"a\.jsonl, line 2: is not a JSON object"),
        ("a.jsonl", b'{"body": "x"}', r"a\.jsonl, line 1: has no text in 'text'"),
        ("a.txt.gz", b"not packed", r"a\.txt\.gz"),
        ("a.txt.xz", lzma.compress(b"x" * 1000)[:60], r"a\.txt\.xz"),
    ],
)
def test_bad_files_are_refused_with_file_and_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidRequest, match=message):
        read(tmp_path / name)


def test_a_draw_holds_for_the_document_and_about_the_share_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [{"text": story(i, 30)} for i in range(400)] + [{"text": story(401, 9000)}]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    found = documents(list(Reader(SourceFile(path), 0.25)))
    assert len(found) == 401
    assert 60 <= sum(split == "valid" for split, _ in found) <= 140
    # The same text is drawn alike wherever it stands.
    again = tmp_path / "b.jsonl"
    again.write_text("\n".join(map(json.dumps, reversed(lines))), encoding="utf-8")
    assert sorted(documents(list(Reader(SourceFile(again), 0.25)))) == sorted(found)


def test_folders_and_patterns_name_their_files_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a/c.jsonl", "a.md.gz", ".hidden/x.txt", "note.pdf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")

    def names(path: Path) -> list[str]:
        return [str(f.path.relative_to(tmp_path)) for f in find_files([Source(path=str(path))])]

    assert names(tmp_path) == ["a/c.jsonl", "a.md.gz", "b.txt"]
    assert names(tmp_path / "*.txt") == ["b.txt"]
    with pytest.raises(NotFound, match="no text file"):
        names(tmp_path / "*.csv")
    with pytest.raises(InvalidRequest, match="no known kind"):
        names(tmp_path / "note.pdf")
