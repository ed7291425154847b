"""Bits per byte are exact, compare tokenizers, and do not depend on who reads which row."""

from __future__ import annotations

import functools
import math
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models.gla_models import tiny_gla
from tests.tiny import tiny_loaded
from tests.training.texts import tiny_shards

from invivo.errors import InvalidRequest
from invivo.models.load import random_model
from invivo.training.evaluate import Nats, by_position, decoder_nats, held_out
from invivo.training.shards import Shards
from invivo.training.stream import Batch


@functools.cache
def shards(vocab_size: int = 300) -> Shards:
    return tiny_shards(Path(tempfile.mkdtemp()), n_books=16, vocab_size=vocab_size)


def uniform(vocab_size: int) -> Nats:
    return lambda b: (b.labels >= 0).double() * math.log(vocab_size)


def varied(batch: Batch) -> torch.Tensor:
    """Nats that differ from token to token."""
    return (batch.labels % 7 + 0.5).where(batch.labels >= 0, torch.tensor(0.0)).double()


@settings(max_examples=20)
@given(length=st.integers(1, 400), batch=st.integers(1, 5))
def test_a_uniform_model_costs_the_logarithm_of_its_vocabulary(length: int, batch: int) -> None:
    data = shards()
    v, n, text = data.vocab_size, data.tokens["valid"], data.bytes["valid"]
    found = held_out(uniform(v), data, length=length, batch=batch)
    assert (found.tokens, found.bytes) == (n, text)
    assert found.bits_per_byte == pytest.approx(math.log2(v) * n / text, rel=1e-12)
    assert found.loss == pytest.approx(math.log(v), rel=1e-12)


def test_tokenizers_compare_by_the_same_text() -> None:
    """A model that knows nothing but how often tokens come: more merges need fewer bits."""
    costs = []
    for vocab_size in (257, 400):
        data = shards(vocab_size)
        counts = Counter(data.read("train", 0, data.tokens["train"]).tolist())
        table = torch.tensor([counts[i] + 1.0 for i in range(data.vocab_size)])
        nats = -(table / table.sum()).log().double()
        costs.append(held_out(lambda b, n=nats: n[b.labels], data, length=1))  # type: ignore[misc]
    assert shards(257).bytes == shards(400).bytes
    assert costs[0].tokens > costs[1].tokens
    assert costs[0].loss < costs[1].loss
    assert costs[0].bits_per_byte > costs[1].bits_per_byte


@settings(max_examples=20)
@given(
    length=st.integers(1, 200),
    batch=st.integers(1, 4),
    world=st.integers(1, 5),
    rows=st.none() | st.integers(1, 9),
)
def test_processes_share_the_rows(length: int, batch: int, world: int, rows: int | None) -> None:
    alone = held_out(varied, shards(), length=length, batch=batch, rows=rows)
    parts: list[torch.Tensor] = []
    calls: list[list[int]] = []

    def read(rank: int, total: object) -> object:
        calls.append([])

        def counted(batch: Batch) -> torch.Tensor:
            calls[-1].append(1)
            return varied(batch)

        return held_out(
            counted, shards(), length=length, batch=batch, rows=rows, rank=rank, world=world,
            total=total,  # type: ignore[arg-type]
        )  # fmt: skip

    def keep(part: torch.Tensor) -> torch.Tensor:
        parts.append(part)
        return torch.ones_like(part)

    for rank in range(world):
        read(rank, keep)
    assert len({len(c) for c in calls}) == 1  # all take part equally often
    assert read(0, lambda part: torch.stack(parts).sum(dim=0)) == alone
    if rows is not None:
        assert alone.rows <= rows


def test_the_interval_is_that_of_a_mean_over_rows() -> None:
    data, length = shards(), 16
    found = held_out(varied, data, length=length)
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.bits_per_byte < found.high
    ids = data.read("valid", 0, found.tokens + 1)[1:]
    spent = np.array([(ids[i : i + length] % 7 + 0.5).sum() for i in range(0, len(ids), length)])
    text = np.array(
        [data.bytes_of("valid", ids[i : i + length]) for i in range(0, len(ids), length)]
    )
    draw = np.random.default_rng(0)
    drawn = draw.integers(len(spent), size=(4000, len(spent)))
    boot = spent[drawn].sum(axis=1) / text[drawn].sum(axis=1) / math.log(2)
    half = (found.high - found.low) / 2
    assert half == pytest.approx(1.96 * boot.std(), rel=0.2)
    assert held_out(varied, data, length=10**6).low is None


def test_differences_of_models_are_measured_on_the_same_rows() -> None:
    data, length = shards(), 16

    def other(batch: Batch) -> torch.Tensor:
        return varied(batch) * 1.1

    gap = held_out(lambda b: other(b) - varied(b), data, length=length)
    both = [held_out(nats, data, length=length) for nats in (varied, other)]
    assert gap.bits_per_byte == pytest.approx(both[1].bits_per_byte - both[0].bits_per_byte)
    assert gap.low is not None
    assert both[0].low is not None
    # Rows that are hard for both do not count twice.
    assert gap.bits_per_byte - gap.low < 0.2 * (both[0].bits_per_byte - both[0].low)


def test_positions_sum_to_the_whole() -> None:
    data, length = shards(), 150
    buckets = by_position(varied, data, length=length)
    whole = held_out(varied, data, length=length)
    assert [(b.first, b.last) for b in buckets] == [(0, 64), (64, 128), (128, 150)]
    assert sum(b.tokens for b in buckets) == whole.tokens
    nats = sum(b.loss * b.tokens for b in buckets)
    assert nats / whole.tokens == pytest.approx(whole.loss)
    assert nats / math.log(2) / whole.bytes == pytest.approx(whole.bits_per_byte)
    with pytest.raises(InvalidRequest, match="rise to 150"):
        by_position(varied, data, length=length, edges=[100, 50, 150])


def test_positions_see_what_depends_on_them() -> None:
    ramp = by_position(
        lambda b: torch.arange(256.0).expand(b.tokens.shape) * (b.labels >= 0),
        shards(),
        length=256,
        edges=[1, 2, 129, 256],
        rows=1,
    )
    assert [b.loss for b in ramp] == [0.0, 1.0, 65.0, 192.0]


def test_a_decoder_gives_the_cross_entropy_of_its_logits(tmp_path: Path) -> None:
    data = shards()
    for decoder in (
        tiny_loaded(tmp_path, "gemma2", dtype=torch.float64).decoder,  # caps its logits
        random_model(tiny_gla(), dtype=torch.float64),
    ):
        tokens = torch.randint(decoder.config.vocab_size, (2, 40))
        labels = tokens.roll(-1, dims=1).index_fill(1, torch.tensor([39]), -100)
        found = decoder_nats(decoder)(Batch(tokens, labels, None))
        from invivo.training.forward import dense_forward

        with torch.no_grad():
            logits = decoder.logits(dense_forward(decoder, tokens).flatten(0, 1))
        expected = F.cross_entropy(logits, labels.flatten(), reduction="none")
        torch.testing.assert_close(found.flatten(), expected)
    assert data.tokens["valid"] > 0


def test_rows_longer_than_the_models_positions_are_refused(tmp_path: Path) -> None:
    llama = tiny_loaded(tmp_path, "llama").decoder
    batch = Batch(torch.zeros(1, 300, dtype=torch.int64), torch.zeros(1, 300).long(), None)
    with pytest.raises(InvalidRequest, match="the model has 256 positions"):
        decoder_nats(llama)(batch)
    gla = random_model(tiny_gla())  # has none: any length
    assert gla.config.max_positions < 300 or not gla.config.ropes
    assert decoder_nats(gla)(batch).shape == (1, 300)


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no text in this split"):
        held_out(varied, shards(), split="other", length=4)
    assert asdict(held_out(varied, shards(), split="test", length=4))["split"] == "test"
