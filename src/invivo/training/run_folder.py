"""``runs/NAME/``: what a run is (manifest.json), what it measured, and its checkpoints."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from invivo.errors import Conflict, InvalidRequest
from invivo.process_lock import abandoned, locked
from invivo.whole_file import write_whole


class LineFile:
    """A JSONL file that only grows by whole lines.

    What a full disk refuses waits in memory and is written before the next line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[bytes] = []

    def add(self, line: Mapping[str, Any]) -> None:
        """Never raises: see :meth:`write`."""
        self._waiting.append(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        with contextlib.suppress(OSError):
            self.write()

    def write(self, *, safe: bool = False) -> None:
        """Write what waits; ``safe``: through to the disk itself.

        Raises:
            OSError: the disk is full or refuses; everything waits on.
        """
        if not self._waiting and not self.path.exists():
            return
        content = b"".join(self._waiting)
        with self.path.open("ab", buffering=0) as file:
            before = file.tell()
            try:
                if file.write(content) < len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if safe:
                    os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), before)
                raise
        self._waiting.clear()

    def read(self) -> Iterator[dict[str, Any]]:
        """The whole lines; a process that was killed may have left half a one at the end."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return
        for line in content.split(b"\n")[:-1]:
            yield json.loads(line)

    def cut_after(self, step: int) -> None:
        """Drop the lines of later steps, and half a line at the end."""
        kept = [line for line in self.read() if line["step"] <= step]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
        write_whole(self.path, text)


class RunFolder:
    """The files of one run.

    Attributes:
        metrics: one line a step, an evaluation or an event; ``kind`` says which.
        samples: one line a continued prompt.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = LineFile(path / "metrics.jsonl")
        self.samples = LineFile(path / "samples.jsonl")
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"
        self._lock = path.parent / f".{path.name}.lock"

    @property
    def exists(self) -> bool:
        return (self.path / "manifest.json").is_file()

    def manifest(self) -> dict[str, Any]:
        """
        Raises:
            InvalidRequest: there is none, or it cannot be read.
        """
        path = self.path / "manifest.json"
        try:
            found: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise InvalidRequest(
                f"the run cannot be read: {error}",
                field="run",
                given=str(path),
                remedy="--fresh begins it anew",
            ) from error
        return found

    def status(self, written: str) -> str:
        """The manifest's status, or ``killed`` where the process that wrote ``running`` is gone."""
        if written != "running" or not abandoned(self._lock):
            return written
        try:
            now = str(self.manifest()["status"])  # it may have ended since ``written`` was read
        except (InvalidRequest, KeyError):
            return "killed"
        return "killed" if now == "running" else now

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        write_whole(self.path / "manifest.json", text)

    def cut_after(self, step: int) -> None:
        """Forget what was measured after ``step``: it will be measured again."""
        self.metrics.cut_after(step)
        self.samples.cut_after(step)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The folder for this process alone, until it ends.

        Raises:
            Conflict: another process trains in it.
        """
        taken = Conflict("another process trains in this folder", field="run", given=str(self.path))
        with locked(self._lock, otherwise=taken):
            yield

    def set_aside(self) -> Path:
        """Rename the folder to the first free NAME.1, NAME.2 ...; where it is now."""
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        self.path.rename(aside)
        return aside
