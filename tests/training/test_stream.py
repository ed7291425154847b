"""Rows: every token once an epoch, the same for any number of processes, resumed anywhere."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.training.texts import tiny_shards

from invivo.errors import Conflict, InvalidRequest
from invivo.training.shards import Shards
from invivo.training.stream import Batch, PackedStream, shuffled

numbers = functools.partial(st.integers, min_value=1)


@functools.cache
def shards() -> Shards:
    return tiny_shards(Path(tempfile.mkdtemp()))


def rows_of(stream: PackedStream, n_calls: int) -> list[Batch]:
    return [stream.next() for _ in range(n_calls)]


def joined(batches: list[Batch]) -> torch.Tensor:
    return torch.cat([torch.cat((b.tokens, b.labels), dim=1) for b in batches])


@given(n=st.integers(1, 70), seed=st.integers(0, 2**64), epoch=st.integers(0, 9))
def test_the_order_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    assert sorted(shuffled(i, n, seed, epoch) for i in range(n)) == list(range(n))


def test_orders_differ_between_epochs_and_seeds() -> None:
    orders = {
        tuple(shuffled(i, 50, seed, epoch) for i in range(50))
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(orders) == 16
    # No place is preferred: means over many orders are those of a fair draw.
    places = np.array([[shuffled(i, 50, s, 0) for i in range(50)] for s in range(400)])
    assert np.abs(places.mean(axis=0) - 24.5).max() < 4 * 14.43 / 20


@settings(max_examples=20)
@given(length=numbers(max_value=90), seed=st.integers(0, 5), epoch=st.integers(0, 2))
def test_an_epoch_predicts_every_token_once(length: int, seed: int, epoch: int) -> None:
    data = shards()
    n = data.tokens["train"]
    stream = PackedStream(data, length=length, batch=1, seed=seed)
    per_epoch = stream.rows_per_epoch
    batch = stream.rows(range(epoch * per_epoch, (epoch + 1) * per_epoch))
    labels = batch.labels[batch.labels >= 0]
    assert len(labels) == n == stream.tokens_per_epoch
    expected = data.read("train", 0, n)
    assert sorted(labels.tolist()) == sorted(expected.tolist())
    # Pairs of a token and the one behind it are those of the ring.
    pairs = torch.stack((batch.tokens[batch.labels >= 0], labels), dim=1)
    ring = np.stack((expected, np.roll(expected, -1)), axis=1)
    assert sorted(map(tuple, pairs.tolist())) == sorted(map(tuple, ring.tolist()))


def test_labels_are_the_tokens_behind(tmp_path: Path) -> None:
    stream = PackedStream(shards(), length=16, batch=stream_rows(16), seed=3)
    batch = stream.next()
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64
    inside = batch.labels[:, :-1]
    assert torch.equal(inside[inside >= 0], batch.tokens[:, 1:][inside >= 0])
    assert (batch.labels[:, :1] >= 0).all()
    assert batch.starts is None


def stream_rows(length: int) -> int:
    return PackedStream(shards(), length=length, batch=1, seed=0).rows_per_epoch


@settings(max_examples=25)
@given(
    length=numbers(max_value=70),
    batch=numbers(max_value=5),
    before=st.integers(0, 30),
    after=st.integers(1, 30),
    seed=st.integers(0, 3),
)
def test_any_cut_continues_the_same_rows(
    length: int, batch: int, before: int, after: int, seed: int
) -> None:
    def fresh() -> PackedStream:
        return PackedStream(shards(), length=length, batch=batch, seed=seed)

    whole = fresh()
    first, second = rows_of(whole, before), joined(rows_of(whole, after))
    cut = fresh()
    for expected, got in zip(first, rows_of(cut, before), strict=True):
        assert torch.equal(expected.tokens, got.tokens)
    resumed = fresh()
    resumed.load(json.loads(json.dumps(cut.state())))
    assert torch.equal(joined(rows_of(resumed, after)), second)
    assert resumed.epochs == whole.epochs


@settings(max_examples=20)
@given(length=numbers(max_value=60), share=numbers(max_value=3), calls=st.integers(1, 6))
def test_any_number_of_processes_sees_the_same_rows(length: int, share: int, calls: int) -> None:
    def team(world: int) -> list[PackedStream]:
        return [
            PackedStream(shards(), length=length, batch=4 * share, seed=1, rank=rank, world=world)
            for rank in range(world)
        ]

    seen = []
    for world in (1, 2, 4):
        streams = team(world)
        rows = [joined([s.next() for s in streams]) for _ in range(calls)]
        assert len({json.dumps(s.state()) for s in streams}) == 1
        # Go on as four processes from the state of any of them.
        widened = team(4)
        for stream in widened:
            stream.load(streams[-1].state())
        rows.append(joined([s.next() for s in widened]))
        seen.append(torch.cat(rows))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def test_beginnings_of_documents_are_marked() -> None:
    data = shards()
    rows = stream_rows(16)
    stream = PackedStream(data, length=16, batch=rows, seed=2, separate_documents=True)
    batch = stream.next()
    assert batch.starts is not None
    assert torch.equal(batch.starts, batch.tokens == data.opening)
    assert int(batch.starts[batch.labels >= 0].sum()) == data.rings["train"].documents


def test_rows_longer_than_the_text_go_round() -> None:
    data = shards()
    n = data.tokens["train"]
    batch = PackedStream(data, length=n + 7, batch=1, seed=0).next()
    assert int((batch.labels >= 0).sum()) == n
    assert torch.equal(batch.tokens[0, n:], batch.tokens[0, :7])


def test_a_position_in_other_rows_is_refused(tmp_path: Path) -> None:
    stream = PackedStream(shards(), length=16, batch=2, seed=0)
    state = stream.state()
    for other in (
        PackedStream(shards(), length=16, batch=2, seed=1),
        PackedStream(shards(), length=8, batch=2, seed=0),
        PackedStream(tiny_shards(tmp_path, n_books=5), length=16, batch=2, seed=0),
    ):
        with pytest.raises(Conflict, match="other rows"):
            other.load(state)
    stream.load(PackedStream(shards(), length=16, batch=7, seed=0).state())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2}, r"rank: must lie in 0 \.\. 1"),
        ({"batch": 3}, "batch: must be a multiple of 2 processes"),
        ({"length": 0}, "length: must be at least 1"),
        ({"split": "other"}, "split: there is no text in this split"),
    ],
)
def test_streams_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        PackedStream(shards(), **({"length": 4, "batch": 2, "seed": 0, "world": 2} | options))
