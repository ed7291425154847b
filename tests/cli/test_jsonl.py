"""Batches: ids, resuming, and errors that stop nobody else."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from invivo.cli.jsonl import answer_all, read_records, unanswered
from invivo.errors import InvalidRequest


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_line_numbers_are_the_ids_where_none_are_given(tmp_path: Path) -> None:
    path = write(tmp_path / "in", '{"text": "a"}', "", '{"id": "x", "text": "b"}', '{"text": "c"}')
    assert [record["id"] for record in read_records(path)] == [1, "x", 4]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "line 1: is not JSON"),
        (['{"id": 1}', "[]"], "line 2: is not a JSON object"),
        (['{"id": 1}', '{"id": 1}'], "line 2: id stands in an earlier line"),
        (['{"id": [1]}'], "line 1: id is not a string or number"),
    ],
)
def test_bad_lines_are_refused_before_anything_runs(
    tmp_path: Path, lines: list[str], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        read_records(write(tmp_path / "in", *lines))


def test_a_second_run_asks_only_what_is_missing_failed_or_half_written(tmp_path: Path) -> None:
    target = write(tmp_path / "out", '{"id": 1, "text": "done"}', '{"id": 2, "error": {}}')
    with target.open("a", encoding="utf-8") as file:
        file.write('{"id": 3, "te')
    records = [{"id": i} for i in (1, 2, 3, 4)]
    assert [record["id"] for record in unanswered(records, target)] == [2, 3, 4]
    assert target.read_text(encoding="utf-8") == '{"id": 1, "text": "done"}\n'


def test_an_output_that_cannot_be_is_told_before_anything_runs(tmp_path: Path) -> None:
    for target in (tmp_path, tmp_path / "none" / "out"):
        with pytest.raises(InvalidRequest, match="--output"):
            unanswered([{"id": 1}], target)


@given(
    count=st.integers(1, 12),
    bad=st.sets(st.integers(0, 11)),
    concurrency=st.integers(1, 5),
)
def test_every_record_is_answered_once_and_never_too_many_at_once(
    tmp_path_factory: pytest.TempPathFactory, count: int, bad: set[int], concurrency: int
) -> None:
    target = tmp_path_factory.mktemp("batch") / "out"
    running = most = 0

    async def answer(record: dict[str, Any]) -> dict[str, Any]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        if record["id"] in bad:
            raise InvalidRequest("no", field="prompt")
        return {"text": str(record["id"])}

    records: list[dict[str, Any]] = [{"id": i} for i in range(count)]
    answers, failed = asyncio.run(answer_all(records, answer, target, concurrency, "lines"))
    written = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    assert written == answers
    assert sorted(line["id"] for line in written) == list(range(count))
    assert failed == len(bad & set(range(count)))
    assert most <= concurrency
    # What failed is asked again, and only that.
    left = unanswered(records, target)
    assert {record["id"] for record in left} == bad & set(range(count))
