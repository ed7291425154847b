"""The demo's load on a tiny model: everything it asks is answered, and the tables hold it."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from tests.tiny import tiny_model_folder

import invivo
from invivo.demo import report
from invivo.demo.adapters import write_random_adapter
from invivo.demo.passages import passages
from invivo.demo.workload import ADAPTERS, CARD, Done, Task, run_load, tasks
from invivo.local import LocalLM


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalLM]:
    folder = tiny_model_folder(tmp_path_factory.mktemp("model"), max_position_embeddings=8192)
    with invivo.load(str(folder), kv_bytes=64 << 20) as made:
        for seed, name in enumerate(ADAPTERS):
            adapter = tmp_path_factory.mktemp("adapters") / name
            made.load_adapter(name, write_random_adapter(adapter, folder, seed))
        yield made


@pytest.fixture(scope="module")
def ran(lm: LocalLM) -> tuple[list[Done], dict[str, object]]:
    before = lm.stats()
    results = asyncio.run(run_load(lm, tasks(), 16, lambda done: None))
    return results, report.engine_figures(before, lm.stats(), 2.0)


def test_every_task_succeeds(ran: tuple[list[Done], dict[str, object]]) -> None:
    results, _ = ran
    assert [done.error for done in results if done.error] == []
    assert [done.task for done in results] == tasks()
    assert all(done.shown for done in results if done.task.kind != "stream")


def test_structured_answers_have_their_form(ran: tuple[list[Done], dict[str, object]]) -> None:
    for done in ran[0]:
        if done.task.sampling.get("json_schema") is CARD and done.timing.tokens < 96:
            assert set(json.loads(done.shown)) == set(CARD["required"])
        if "choice" in done.task.sampling:
            assert done.shown in ("yes", "no")


def test_second_questions_find_their_document_in_the_cache(
    ran: tuple[list[Done], dict[str, object]],
) -> None:
    hits = ran[1]["prefix_hits"]
    assert isinstance(hits, int)
    assert hits > 0.9 * sum(len(text.encode()) / 2 for text in passages().values())


def test_tables_and_document_hold_every_purpose(
    ran: tuple[list[Done], dict[str, object]],
) -> None:
    results, engine = ran
    console = Console(file=io.StringIO(), width=80)
    report.show(console, results, engine)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    document = json.loads(json.dumps(report.document(results, engine, {"name": "tiny"})))
    for purpose in {task.purpose for task in tasks()}:
        assert purpose in text
        assert document["purposes"][purpose]["errors"] == []
    assert "…" not in text  # nothing is cut off at 80 columns


def test_an_error_is_part_of_the_result(lm: LocalLM) -> None:
    task = Task("x", "y", "stream", "hello", {"temperature": -1})
    (done,) = asyncio.run(run_load(lm, [task], 1, lambda done: None))
    assert done.error is not None


def test_an_adapter_depends_on_its_seed_alone(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    files = [
        (write_random_adapter(tmp_path / name, folder, seed) / "adapter_model.safetensors")
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    contents = [file.read_bytes() for file in files]
    assert contents[0] == contents[1] != contents[2]
