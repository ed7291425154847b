"""Texts from files: plain text, JSON lines and tables, packed or not, as passages in their order.

A file is never whole in memory: what is read is handed on in passages of some sixteen thousand
characters, cut at the ends of lines. A text file may say where documents begin, by lines
``<|doc ID SPLIT|>`` (``SPLIT``: train, valid or test; both words may be missing); without such
lines it is one document.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import lzma
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from invivo.errors import InvalidRequest, InvivoError, MissingDependency, NotFound
from invivo.training.config import Source

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
PASSAGE = 1 << 14  # characters

_DOCUMENT = re.compile(r"<\|doc(?: (?!train\||valid\||test\|)\S+)?(?: (train|valid|test))?\|>")
_TEXT, _LINES, _TABLE = (".txt", ".md"), (".jsonl",), (".parquet",)
_PACKED: dict[str, Callable[[BinaryIO], Any]] = {".xz": lzma.open, ".gz": gzip.open}
_KINDS = ", ".join((*_TEXT, *_LINES, *_TABLE)) + ", the first ones also as .xz or .gz"


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a source.

    Attributes:
        column: field of a JSON line, column of a table.
        split: of all its documents; None: as they say themselves, else drawn.
    """

    path: Path
    column: str = "text"
    split: Split | None = None


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of a document.

    Attributes:
        begins: it is the first one of its document.
    """

    text: str
    split: Split
    begins: bool


def find_files(sources: Sequence[Source]) -> list[SourceFile]:
    """The files of all sources, those of one source by name.

    Raises:
        NotFound: a path or pattern matches no file.
        InvalidRequest: a file of an unknown kind was named.
    """
    found = []
    for i, source in enumerate(sources):
        where = f"data.sources[{i}]"
        if source.path is None:
            from invivo.training.hub_files import hub_files

            found += hub_files(source, where)
            continue
        paths = _paths(source.path, where)
        found += [SourceFile(path, source.column, source.split) for path in paths]
    return found


def _paths(text: str, where: str) -> list[Path]:
    path = Path(text).expanduser()
    if path.is_file():
        if not is_known(path.name):
            raise InvalidRequest(
                "is of no known kind", field=f"{where}.path", given=text, remedy=f"Known: {_KINDS}"
            )
        return [path]
    if path.is_dir():
        every = (p for p in path.rglob("*") if not any(_hidden(p.relative_to(path))))
    else:
        every = (Path(name) for name in glob.iglob(str(path), recursive=True))
    paths = sorted(p for p in every if is_known(p.name) and p.is_file())
    if not paths:
        raise NotFound(
            "there is no text file", field=f"{where}.path", given=text, remedy=f"Known: {_KINDS}"
        )
    return paths


def _hidden(path: Path) -> Iterator[bool]:
    return (part.startswith(".") for part in path.parts)


def is_known(name: str) -> bool:
    """Whether a file of this name can be read."""
    kind, packed = _kind(name)
    return kind in (*_TEXT, *_LINES) or (kind in _TABLE and not packed)


def _kind(name: str) -> tuple[str, str]:
    """Ending without the packing, and the packing's."""
    path = Path(name.lower())
    packed = path.suffix if path.suffix in _PACKED else ""
    return (path.with_suffix("") if packed else path).suffix, packed


class Reader:
    """The passages of one file.

    Args:
        valid_fraction: share of what has no split that is held out, drawn by a hash of a
            document's first passage; a text file without documents is drawn passage by passage.

    Raises (while it is read):
        InvalidRequest: the file cannot be read as what its name says; the message has the line.
        MissingDependency: pyarrow is not installed and the file is a table.
    """

    def __init__(self, file: SourceFile, valid_fraction: float = 0.0) -> None:
        self._file = file
        self._fraction = valid_fraction
        self._size = max(1, file.path.stat().st_size)
        self._raw: BinaryIO | None = None
        self.share = 0.0  # of the file, as far as it has been read

    def __iter__(self) -> Iterator[Passage]:
        kind, packed = _kind(self._file.path.name)
        try:
            with self._file.path.open("rb") as self._raw:
                if kind in _TABLE:
                    yield from self._table(self._raw)
                else:
                    opened = _PACKED[packed](self._raw) if packed else self._raw
                    text = io.BufferedReader(cast(io.RawIOBase, opened), 1 << 18)
                    yield from self._lines(text) if kind in _LINES else self._plain(text)
        except (OSError, EOFError, lzma.LZMAError) as error:
            raise InvalidRequest(
                f"cannot be read: {error}", field="data.sources", given=str(self._file.path)
            ) from error
        self.share = 1.0

    def _plain(self, text: BinaryIO) -> Iterator[Passage]:
        marked = False
        stated: Split | None = None
        before: Split | None = None  # of the passage before, in the same document
        held: list[str] = []
        size = 0

        def flush() -> Iterator[Passage]:
            nonlocal before, size
            whole = "".join(held)
            held.clear()
            size = 0
            if not whole or (before is None and not whole.strip()):
                return
            drawn = stated or self._file.split
            if drawn is None:
                drawn = before if marked and before else self._draw(whole)
            yield Passage(whole, drawn, begins=drawn != before)
            before = drawn

        for number, line in self._decoded(text):
            mark = _DOCUMENT.fullmatch(line.rstrip()) if line.startswith("<|doc") else None
            if mark is not None:
                if not marked and (before is not None or "".join(held).strip()):
                    raise self._wrong(number, "a document begins here, after text without one")
                yield from flush()
                marked, before = True, None
                stated = cast("Split | None", mark[1])
                continue
            held.append(line)
            size += len(line)
            if size >= PASSAGE:
                yield from flush()
        yield from flush()

    def _lines(self, text: BinaryIO) -> Iterator[Passage]:
        for number, line in enumerate(text, start=1):
            self._tell()
            if line.isspace():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:  # of JSON or UTF-8
                raise self._wrong(number, f"is not JSON: {error}") from error
            if not isinstance(record, dict):
                raise self._wrong(number, "is not a JSON object")
            yield from self._document(record.get(self._file.column), number, "line")

    def _table(self, raw: BinaryIO) -> Iterator[Passage]:
        try:
            import pyarrow
            from pyarrow.parquet import ParquetFile
        except ImportError as error:
            raise MissingDependency(
                f"{self._file.path} is a Parquet table, which pyarrow reads",
                remedy="pip install 'invivo[study]'",
            ) from error
        column = self._file.column
        try:
            table = ParquetFile(raw)
            if column not in table.schema_arrow.names:
                raise InvalidRequest(
                    f"{self._file.path} has no such column",
                    field="data.sources.column",
                    given=column,
                    remedy=f"It has: {', '.join(table.schema_arrow.names)}",
                )
            number = 0
            for batch in table.iter_batches(batch_size=256, columns=[column]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield from self._document(value, number, "row")
                self.share = number / max(1, table.metadata.num_rows)
        except pyarrow.ArrowException as error:
            raise InvalidRequest(
                f"is not a Parquet table: {error}", field="data.sources", given=str(self._file.path)
            ) from error

    def _document(self, text: Any, number: int, unit: str) -> Iterator[Passage]:
        """One that came whole."""
        if not isinstance(text, str):
            raise self._wrong(number, f"has no text in {self._file.column!r}", unit)
        if not text.strip():
            return
        if not text.isascii():  # JSON may hold half characters (\ud83d), which UTF-8 cannot
            text = text.encode("utf-8", "replace").decode("utf-8")
        split: Split | None = self._file.split
        for i, piece in enumerate(_cut(text)):
            split = split or self._draw(piece)
            yield Passage(piece, split, begins=i == 0)

    def _draw(self, text: str) -> Split:
        drawn = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
        return "valid" if drawn < self._fraction * 2**64 else "train"

    def _decoded(self, text: BinaryIO) -> Iterator[tuple[int, str]]:
        """(number, text) of each line; a very long one comes in several pieces."""
        number, rest = 1, b""
        while piece := text.readline(1 << 20):
            self._tell()
            piece = rest + piece
            whole = piece.endswith(b"\n")
            kept = len(piece) if whole else _whole_characters(piece)
            piece, rest = piece[:kept], piece[kept:]
            yield number, self._text(piece, number)
            number += whole
        if rest:
            yield number, self._text(rest, number)

    def _text(self, piece: bytes, number: int) -> str:
        try:
            return piece.decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            raise self._wrong(number, f"is not UTF-8 text: {error.reason}") from error

    def _tell(self) -> None:
        assert self._raw is not None
        self.share = min(1.0, self._raw.tell() / self._size)

    def _wrong(self, number: int, message: str, unit: str = "line") -> InvivoError:
        return InvalidRequest(
            f"{self._file.path}, {unit} {number}: {message}", field="data.sources"
        )


def _whole_characters(piece: bytes) -> int:
    """Bytes up to the beginning of a last character that may go on after them."""
    for back in range(1, min(4, len(piece)) + 1):
        lead = piece[-back]
        if lead >= 0xC0:  # begins a character of two to four bytes
            return len(piece) - back
        if lead < 0x80:
            break
    return len(piece)


def _cut(text: str) -> Iterator[str]:
    """Passages: up to the first end of a line behind ``PASSAGE`` characters."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + PASSAGE - 1, start + 2 * PASSAGE)
        end = end + 1 if end >= 0 else start + 2 * PASSAGE
        yield text[start:end]
        start = end
