"""Examples out of Parquet files and of data sets on the Hugging Face Hub, as JSON lines.

Read where the user is, so that a server only ever sees JSON lines. A row is an example as in a
line (``messages``, ``prompt`` and ``completion``, or ``text``); other columns are passed over.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, BinaryIO, cast
from urllib.parse import parse_qsl, urlsplit

from invivo.errors import InvalidRequest, MissingDependency, NotFound

COLUMNS = ("messages", "tools", "prompt", "completion", "text")
PARQUET = (".parquet", ".pq")
HUB = "hf://datasets/"
_ROWS = 1024  # of a Parquet file at a time


def is_table(data: str | Path) -> bool:
    """Whether ``data`` names a Parquet file or a data set of the Hub."""
    return str(data).startswith(HUB) or PurePath(data).suffix.lower() in PARQUET


def table_name(data: str | Path) -> str:
    """What to call its examples as a file of JSON lines."""
    return PurePath(urlsplit(str(data)).path).stem.partition("@")[0] + ".jsonl"


def examples_of(data: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file or of ``hf://datasets/ORG/NAME[@REVISION][?split=..&config=..]``.

    Raises:
        NotFound: there is no such file or data set.
        InvalidRequest: it cannot be read, or has no column of examples.
        MissingDependency: pyarrow (files) or datasets (Hub) is not installed.
    """
    if str(data).startswith(HUB):
        return _of_hub(str(data))
    return _of_parquet(Path(data).expanduser())


def json_lines(examples: Iterable[Mapping[str, Any]]) -> BinaryIO:
    """A temporary file with one example a line, from its beginning.

    Raises:
        InvalidRequest: an example has no JSON form, or there is none at all.
    """
    file = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115
    try:
        for example in examples:
            file.write(json.dumps(example, ensure_ascii=False).encode("utf-8") + b"\n")
    except (TypeError, ValueError) as error:
        file.close()
        raise InvalidRequest(f"is not JSON: {error}", field="data") from error
    except BaseException:
        file.close()
        raise
    if not file.tell():
        file.close()
        raise InvalidRequest("has no examples", field="data")
    file.seek(0)
    return file


def _of_parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as error:
        raise _missing("Parquet files need pyarrow", "study") from error
    try:
        with ParquetFile(path) as table:
            columns = _columns(table.schema_arrow.names, path)
            for batch in table.iter_batches(_ROWS, columns=columns):
                yield from map(_plain, batch.to_pylist())
    except FileNotFoundError as error:
        raise NotFound("cannot be read: no such file", field="data", given=str(path)) from error
    except (OSError, pyarrow.ArrowException) as error:
        raise InvalidRequest(
            f"cannot be read as Parquet: {error}", field="data", given=str(path)
        ) from error


def _of_hub(uri: str) -> Iterator[dict[str, Any]]:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise _missing("data sets of the Hub need datasets", "hub") from error
    place = urlsplit(uri.removeprefix(HUB))
    name, _, revision = place.path.strip("/").partition("@")
    options = dict(parse_qsl(place.query))
    unknown = options.keys() - {"split", "config"}
    if not name or unknown:
        raise InvalidRequest(
            "is no data set of the Hub",
            field="data",
            given=uri,
            remedy=f"Write {HUB}ORG/NAME, with ?split=train&config=... if need be",
        )
    try:
        rows = datasets.load_dataset(
            name,
            options.get("config"),
            split=options.get("split", "train"),
            revision=revision or None,
            streaming=True,
        )
        columns = None
        for row in rows:
            if columns is None:
                columns = _columns(list(row), uri)
            yield _plain({column: row[column] for column in columns})
    except (FileNotFoundError, ConnectionError) as error:  # the Hub's own errors are among them
        raise NotFound(f"cannot be had from the Hub: {error}", field="data", given=uri) from error
    except ValueError as error:  # no such split or configuration
        raise InvalidRequest(str(error), field="data", given=uri) from error


def _columns(names: Sequence[str], source: str | Path) -> list[str]:
    found = [name for name in COLUMNS if name in names]
    if not {"messages", "completion", "text"} & set(found):
        raise InvalidRequest(
            f"has the columns {', '.join(names)}, none of which is an example",
            field="data",
            given=str(source),
            remedy="Name its columns messages, prompt and completion, or text",
        )
    return found


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Without empty fields: tables have every field in every row."""
    return {name: _filled(value) for name, value in row.items() if value is not None}


def _filled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _filled(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_filled(item) for item in value]
    return value


def _missing(what: str, extra: str) -> MissingDependency:
    return MissingDependency(what, remedy=f"Run: pip install 'invivo[{extra}]'")
