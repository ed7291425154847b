"""``runs/STUDY/ID/``: what was asked, every record, what came of it.

The id is a hash of everything that decides the records (study, settings, model, data), so that the
same command finds its folder again and goes on where it was interrupted. While units are measured
their records stand in ``records.jsonl``, a line a unit, written whole and through to the disk;
``records.parquet`` takes their place when all are there.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from invivo.errors import Conflict, InvalidRequest, MissingDependency, NotFound
from invivo.process_lock import locked
from invivo.studies.study import Record
from invivo.whole_file import write_whole


def run_id(identity: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits."""
    text = json.dumps(identity, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class RunFolder:
    """The files of one run.

    Attributes:
        manifest, records, findings, report: their paths.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = path / "manifest.json"
        self.records = path / "records.parquet"
        self.findings = path / "findings.json"
        self.report = path / "report.html"
        self._journal = path / "records.jsonl"

    @property
    def measured(self) -> bool:
        """Whether all records are there."""
        return self.records.is_file()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The folder for this process alone.

        Raises:
            Conflict: another process measures in it.
        """
        taken = Conflict(
            "another process measures in this folder", field="run", given=str(self.path)
        )
        with locked(self.path / ".lock", otherwise=taken):
            yield

    def clear(self) -> None:
        """Forget everything that was measured."""
        for path in (self._journal, self.records, self.findings, self.report, self.manifest):
            path.unlink(missing_ok=True)

    # --- the manifest -----------------------------------------------------------------------
    def read_manifest(self) -> dict[str, Any]:
        """
        Raises:
            NotFound: there is none.
            InvalidRequest: it cannot be read.
        """
        try:
            found = json.loads(self.manifest.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise NotFound(
                "this is no folder of a run", field="run", given=str(self.path)
            ) from error
        except (OSError, ValueError) as error:
            raise InvalidRequest(
                f"the manifest cannot be read: {error}", field="run", given=str(self.manifest)
            ) from error
        assert isinstance(found, dict)
        return found

    def write_json(self, path: Path, value: Mapping[str, Any]) -> None:
        self.write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")

    def write_text(self, path: Path, text: str) -> None:
        """Whole or not at all."""
        write_whole(path, text)

    # --- records ----------------------------------------------------------------------------
    def add(self, key: str, records: Sequence[Record]) -> None:
        """Keep the records of one unit, through to the disk."""
        line = json.dumps({"unit": key, "records": records}, ensure_ascii=False).encode() + b"\n"
        with self._journal.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def done(self) -> dict[str, list[Record]]:
        """Records by unit; half a line that an interruption left at the end is cut off."""
        try:
            content = self._journal.read_bytes()
        except FileNotFoundError:
            return {}
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            write_whole(self._journal, whole)
        entries = [json.loads(line) for line in whole.splitlines()]
        return {entry["unit"]: entry["records"] for entry in entries}

    def seal(self, keys: Sequence[str]) -> None:
        """Put all records into ``records.parquet``, in the order of ``keys``; each names its unit.

        Raises:
            MissingDependency: pyarrow is not installed.
        """
        pyarrow, parquet = _pyarrow()
        found = self.done()
        table = pyarrow.Table.from_pylist([{"unit": key, **r} for key in keys for r in found[key]])
        content = io.BytesIO()
        parquet.write_table(table, content)
        write_whole(self.records, content.getvalue())
        self._journal.unlink(missing_ok=True)

    def read_records(self) -> list[Record]:
        """
        Raises:
            MissingDependency: pyarrow is not installed.
        """
        _, parquet = _pyarrow()
        found: list[Record] = parquet.read_table(self.records).to_pylist()
        return found


def check_parquet() -> None:
    """Before anything is measured.

    Raises:
        MissingDependency: pyarrow is not installed.
    """
    _pyarrow()


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingDependency(
            "records need pyarrow", remedy="Run: pip install 'invivo[study]'"
        ) from error
    return pyarrow, parquet
