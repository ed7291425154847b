"""The demo's load: when requests are sent, and what becomes of one that fails."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
from tests.tiny import tiny_model_folder

import invivo
from invivo.demo.adapters import write_random_adapter
from invivo.demo.workload import ROUND, Done, Task, rounds, run_load, tasks
from invivo.local import LocalLM


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalLM]:
    folder = tiny_model_folder(tmp_path_factory.mktemp("model"))
    with invivo.load(str(folder), kv_bytes=8 << 20) as made:
        yield made


def test_purposes_are_spread_over_the_round() -> None:
    load = tasks()
    times = [task.at for task in load]
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] < ROUND
    for purpose in {task.purpose for task in load}:
        first = min(task.at for task in load if task.purpose == purpose)
        assert first <= ROUND / sum(task.purpose == purpose for task in load)


def test_rounds_repeat_the_load_under_another_salt() -> None:
    load = tasks()
    arrivals = list(islice(rounds(load, first=3), 2 * len(load)))
    assert [task.salt for _, task in arrivals[:: len(load)]] == ["round 3", "round 4"]
    first, again = arrivals[1], arrivals[1 + len(load)]
    assert again[0] == first[0] + ROUND
    assert again[1].text == first[1].text
    assert len(list(rounds(load, n=1))) == len(load)


def test_load_stops_when_told_and_waits_for_what_was_sent(lm: LocalLM) -> None:
    task = Task("x", "y", "stream", "hello", {"max_tokens": 4, "temperature": 0.0})
    ended: list[Done] = []
    results = asyncio.run(
        run_load(
            lm,
            ((0.01 * i, task) for i in range(10_000)),
            going_on=lambda: len(ended) < 3,
            finished=ended.append,
        )
    )
    assert 3 <= len(results) < 100
    assert len(ended) == len(results)
    assert all(done.error is None for done in results)


def test_an_error_is_part_of_the_result(lm: LocalLM) -> None:
    task = Task("x", "y", "stream", "hello", {"temperature": -1})
    (done,) = asyncio.run(run_load(lm, iter([(0.0, task)])))
    assert done.error is not None


def test_an_adapter_depends_on_its_seed_alone(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    files = [
        (write_random_adapter(tmp_path / name, folder, seed) / "adapter_model.safetensors")
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    contents = [file.read_bytes() for file in files]
    assert contents[0] == contents[1] != contents[2]
