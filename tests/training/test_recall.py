"""Recall rows are answerable, the same for any number of processes, and scored exactly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from invivo.errors import Conflict, InvalidRequest
from invivo.training.config import Recall
from invivo.training.recall import (
    RecallRows,
    RecallStream,
    measure_recall,
    recall_rows,
    vocabulary,
)
from invivo.training.stream import Batch

TASK = Recall(pairs=(2, 5), keys=9, values=6)
LENGTH = 40


def look_up(batch: Batch) -> torch.Tensor:
    """What a perfect memory says: the token behind the key's first place."""
    named = torch.zeros_like(batch.tokens)
    for row, (tokens, labels) in enumerate(zip(batch.tokens, batch.labels, strict=True)):
        for place in torch.nonzero(labels >= 0).flatten().tolist():
            first = int(torch.nonzero(tokens == tokens[place])[0])
            named[row, place] = tokens[first + 1]
    return named


@given(pairs=st.integers(1, 9), spare=st.integers(0, 30), seed=st.integers(0, 99))
def test_every_key_is_asked_once_behind_the_pairs(pairs: int, spare: int, seed: int) -> None:
    length = 3 * pairs + spare
    # The row stands between others that have more and fewer pairs.
    many = np.array([1, pairs, min(9, length // 3)])
    rows = recall_rows(TASK, length, many, np.random.default_rng(seed))
    row = RecallRows(rows.tokens[1], rows.labels[1], rows.distances[1])
    keys, values = row.tokens[0 : 2 * pairs : 2], row.tokens[1 : 2 * pairs : 2]
    assert len(set(keys)) == pairs
    assert all(1 <= k <= 9 for k in keys)
    assert all(10 <= v <= 15 for v in values)
    asked = np.flatnonzero(row.labels >= 0)
    assert asked.min() >= 2 * pairs
    assert sorted(row.tokens[asked]) == sorted(keys)
    told = dict(zip(keys, values, strict=True))
    for place in asked:
        assert row.labels[place] == told[row.tokens[place]]
        assert row.tokens[place - row.distances[place]] == row.labels[place]
    blank = np.setdiff1d(np.arange(2 * pairs, length), asked)
    assert (row.tokens[blank] == 0).all()
    assert (row.distances[row.labels < 0] == 0).all()


def test_a_perfect_memory_is_right_and_a_guesser_is_not() -> None:
    scores = measure_recall(look_up, TASK, length=LENGTH, rows=20)
    assert all(score.accuracy == 1.0 and score.low < 1.0 for score in scores)
    whole = [score for score in scores if score.distance is None]
    assert [(score.pairs, score.asked) for score in whole] == [(2, 40), (5, 100)]
    for total in whole:
        parts = [s for s in scores if s.pairs == total.pairs and s.distance is not None]
        assert sum(part.asked for part in parts) == total.asked
    guesses = measure_recall(lambda b: torch.full_like(b.tokens, 12), TASK, length=LENGTH, rows=200)
    for score in guesses:
        if score.distance is None:
            assert score.low < 1 / 6 < score.high


def test_the_interval_is_wilsons() -> None:
    # scipy.stats.binomtest(8, 10).proportion_ci(method="wilson")
    task = replace(TASK, pairs=(2,))

    def eight_of_ten(batch: Batch) -> torch.Tensor:
        named = look_up(batch)
        wrong = torch.nonzero(batch.labels >= 0)[:2]
        named[wrong[:, 0], wrong[:, 1]] = 0
        return named

    score = measure_recall(eight_of_ten, task, length=LENGTH, rows=5, batch=5)[0]
    assert (score.asked, score.right) == (10, 8)
    assert (score.low, score.high) == pytest.approx((0.4901625, 0.9433178), abs=1e-4)


@settings(max_examples=20)
@given(cut=st.integers(0, 6), batch=st.integers(1, 3))
def test_streams_resume_and_are_shared_by_processes(cut: int, batch: int) -> None:
    def team(world: int) -> list[RecallStream]:
        return [
            RecallStream(TASK, length=LENGTH, batch=4 * batch, seed=3, rank=r, world=world)
            for r in range(world)
        ]

    def rows(streams: list[RecallStream]) -> torch.Tensor:
        found = [s.next() for s in streams]
        return torch.cat([torch.cat((b.tokens, b.labels), dim=1) for b in found])

    whole = team(1)
    expected = [rows(whole) for _ in range(cut + 2)]
    streams = team(2)
    for i in range(cut):
        assert torch.equal(rows(streams), expected[i])
    resumed = team(4)
    for stream in resumed:
        stream.load(streams[1].state())
    assert torch.equal(rows(resumed), expected[cut])
    assert torch.equal(rows(resumed), expected[cut + 1])


def test_sizes_that_do_not_fit_are_refused() -> None:
    for task, length, message in (
        (TASK, 14, "5 pairs and their questions need 15 tokens"),
        (replace(TASK, pairs=(10,)), 40, "at least 10 keys"),
        (replace(TASK, pairs=()), 40, "at least 1"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            RecallStream(task, length=length, batch=1, seed=0)
    state = RecallStream(TASK, length=LENGTH, batch=1, seed=0).state()
    with pytest.raises(Conflict, match="other rows: seed"):
        RecallStream(TASK, length=LENGTH, batch=1, seed=1).load(state)
    assert vocabulary(TASK) == 16
