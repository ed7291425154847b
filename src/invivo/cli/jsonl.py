"""Batches: a JSONL file in, a JSONL file out that a second run completes."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from invivo.cli.options import read_text
from invivo.cli.output import note, progress
from invivo.errors import InvalidRequest, InvivoError

Record = dict[str, Any]


def read_records(source: Path) -> list[Record]:
    """The lines of ``--input``, each with an ``id`` of its own: given, or its line number from 1.

    Raises:
        InvalidRequest: a line that is not a JSON object, or an id that came before.
    """
    records: list[Record] = []
    seen: set[str | int] = set()
    for number, line in enumerate(read_text(source, "--input").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"--input line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InvalidRequest(f"is not JSON ({error.msg})", field=where, given=line) from error
        if not isinstance(record, dict):
            raise InvalidRequest("is not a JSON object", field=where, given=line)
        identity = record.setdefault("id", number)
        if not isinstance(identity, str | int):
            raise InvalidRequest("id is not a string or number", field=where, given=identity)
        if identity in seen:
            raise InvalidRequest("id stands in an earlier line too", field=where, given=identity)
        seen.add(identity)
        records.append(record)
    if not records:
        note(f"{source} holds no lines: there is nothing to do")
    return records


def unanswered(records: list[Record], target: Path) -> list[Record]:
    """The records that ``target`` does not answer yet; those answered by an error are asked again.

    The file keeps its good lines only, so that every id is in it once at the end.

    Raises:
        InvalidRequest: there is no such folder, or it is a folder itself.
    """
    if target.is_dir() or not target.parent.is_dir():
        raise InvalidRequest(
            "is a folder" if target.is_dir() else "the folder of this file does not exist",
            field="--output",
            given=str(target),
            remedy="Name a file in a folder that exists",
        )
    if not target.exists():
        return records
    answered: set[str | int] = set()
    kept: list[str] = []
    for line in target.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # half a line of a run that was ended while writing
        if isinstance(record, dict) and "error" not in record and "id" in record:
            answered.add(record["id"])
            kept.append(line)
    # Replaced in one move: an interrupted clean-up loses nothing.
    clean = target.with_name(target.name + ".tmp")
    clean.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    clean.replace(target)
    left = [record for record in records if record["id"] not in answered]
    if len(left) < len(records):
        note(f"{len(records) - len(left)} of {len(records)} answered already in {target}")
    return left


async def answer_all(
    records: list[Record],
    answer: Callable[[Record], Awaitable[Record]],
    target: Path | None,
    concurrency: int,
    unit: str,
) -> tuple[list[Record], int]:
    """Answer all records, ``concurrency`` at a time, writing each line as it is done.

    A typed error becomes the line's ``error`` field and stops nobody else.

    Returns:
        The answers in the order they came, and how many failed.
    """
    gate = asyncio.Semaphore(concurrency)
    answers: list[Record] = []
    failed = 0

    async def one(record: Record) -> Record:
        async with gate:
            try:
                done = await answer(record)
            except InvivoError as error:
                done = {"error": {"type": error.kind, "param": error.field, "message": str(error)}}
            return {"id": record["id"], **done}

    output = sys.stdout if target is None else target.open("a", encoding="utf-8")
    tasks = [asyncio.create_task(one(record)) for record in records]
    try:
        with progress(unit) as bar:
            shown = bar.add_task("", total=len(tasks))
            for finished in asyncio.as_completed(tasks):
                done = await finished
                failed += "error" in done
                answers.append(done)
                output.write(json.dumps(done, ensure_ascii=False) + "\n")
                output.flush()
                bar.advance(shown)
    finally:
        for task in tasks:
            task.cancel()
        if target is not None:
            output.close()
    if failed:
        note(f"{failed} of {len(records)} failed; their lines have an error field")
    return answers, failed
