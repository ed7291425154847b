"""Held-out text: bits per byte, and how well each position of a long row is predicted.

Bits per byte divide the nats of all tokens by the bytes of their text, so that models with
different tokenizers compare: an end token costs its nats and has no bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from invivo.errors import InvalidRequest
from invivo.kernels.cross_entropy import cross_entropy
from invivo.models.decoder import Decoder
from invivo.training.forward import dense_forward
from invivo.training.shards import Shards
from invivo.training.stream import NO_LABEL, Batch, read_rows

Nats = Callable[[Batch], torch.Tensor]
Total = Callable[[torch.Tensor], torch.Tensor]
CONFIDENCE = 1.96  # standard errors to either side: 95 percent of a normal distribution


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What a model makes of a split.

    Attributes:
        bits_per_byte: over all tokens read.
        low, high: 95 percent interval from the spread over rows; rows of one book resemble each
            other, so that other books may lie further off. None: there is one row.
        loss: nats a token.
        tokens: predicted.
        bytes: of their text as UTF-8.
        rows, length: how many rows of how many tokens; a row knows nothing before it.
    """

    split: str
    bits_per_byte: float
    low: float | None
    high: float | None
    loss: float
    tokens: int
    bytes: float
    rows: int
    length: int


@dataclass(frozen=True, slots=True)
class PositionBucket:
    """Tokens at positions ``first`` to ``last`` (exclusive) of their rows.

    Attributes:
        loss: nats a token; ``math.exp`` of it is the perplexity.
        low, high: 95 percent interval of ``loss`` from the spread over rows; None: one row.
    """

    first: int
    last: int
    loss: float
    low: float | None
    high: float | None
    bits_per_byte: float
    tokens: int


def decoder_nats(decoder: Decoder, *, dtype: torch.dtype | None = None) -> Nats:
    """The negative log-probability of each label, [b, length] in nats, 0 where there is none.

    Args:
        dtype: of states and products; None: the parameters'.

    Raises (when called):
        InvalidRequest: a row is longer than the model has positions for.
    """

    def nats(batch: Batch) -> torch.Tensor:
        config, length = decoder.config, batch.tokens.shape[1]
        if (config.ropes or config.learned_positions) and length > config.max_positions:
            raise InvalidRequest(
                f"the model has {config.max_positions} positions",
                field="length",
                given=length,
                remedy="Set model.max_position_embeddings to the longest row that is evaluated",
            )
        device = decoder.embed.device
        with torch.no_grad():
            tokens = batch.tokens.to(device)
            hidden = dense_forward(decoder, tokens, starts=batch.starts, dtype=dtype)
            head = decoder.embed if decoder.head is None else decoder.head
            found = cross_entropy(
                hidden.flatten(0, 1),
                head.to(hidden.dtype),
                batch.labels.to(device).flatten(),
                softcap=config.logit_softcap,
                want_grad=False,
                want_logprobs=True,
            )
        assert found.logprobs is not None
        return -found.logprobs.view(tokens.shape)

    return nats


def held_out(
    nats: Nats,
    shards: Shards,
    *,
    split: str = "valid",
    length: int,
    batch: int = 8,
    rows: int | None = None,
    separate_documents: bool = False,
    rank: int = 0,
    world: int = 1,
    total: Total = lambda x: x,
) -> HeldOut:
    """Read a split in rows of ``length``.

    Args:
        nats: of each label of a batch, [b, length], 0 where there is none. One model's less
            another's gives their difference, with the interval of pairs of rows.
        batch: rows at once.
        rows: how many are read, evenly spaced; None: all, every token once.
        rank, world: this process of how many; each reads its part, all call ``nats`` equally
            often.
        total: sums a tensor over the processes.

    Raises:
        InvalidRequest: the split is empty.
    """
    places = _places(shards, split, length, rows)
    sums = torch.zeros(3, len(places), dtype=torch.float64)  # nats, bytes, tokens of each row
    for numbers, read, found in _read(
        nats, shards, split, places, length, batch, separate_documents, rank, world
    ):
        for row, number in enumerate(numbers):
            labels = _labels(read, row)
            text = shards.bytes_of(split, labels)
            spent = found[row].sum()
            sums[:, number] = torch.tensor([spent, text, len(labels)], dtype=torch.float64)
    spent, text, tokens = total(sums).numpy()
    value, low, high = _ratio(spent / math.log(2), text)
    return HeldOut(
        split=split,
        bits_per_byte=value,
        low=low,
        high=high,
        loss=float(spent.sum() / tokens.sum()),
        tokens=int(tokens.sum()),
        bytes=float(text.sum()),
        rows=len(places),
        length=length,
    )


def by_position(
    nats: Nats,
    shards: Shards,
    *,
    split: str = "valid",
    length: int,
    edges: Sequence[int] | None = None,
    batch: int = 1,
    rows: int | None = None,
    rank: int = 0,
    world: int = 1,
    total: Total = lambda x: x,
) -> list[PositionBucket]:
    """How well tokens are predicted that have so and so much text before them.

    Rows longer than those of training show whether a model can use, or even stand, more text than
    it ever saw at once (the length extrapolation of arXiv 2312.06635).

    Args:
        edges: ends of the buckets, rising; None: 64, 128, 256 ... and ``length``.
        batch, rows, rank, world, total: as :func:`held_out`.

    Raises:
        InvalidRequest: the split is empty, or the edges do not rise up to ``length``.
    """
    ends = list(edges) if edges is not None else _doubling(length)
    if sorted({0, *ends, length}) != [0, *ends]:
        raise InvalidRequest(f"must rise to {length}", field="edges", given=ends)
    places = _places(shards, split, length, rows)
    sums = torch.zeros(3, len(ends), len(places), dtype=torch.float64)
    for numbers, read, found in _read(
        nats, shards, split, places, length, batch, False, rank, world
    ):
        for row, number in enumerate(numbers):
            labels = _labels(read, row)
            for i, (first, last) in enumerate(zip([0, *ends], ends, strict=False)):
                some = labels[first:last]
                spent, text = found[row, first:last].sum(), shards.bytes_of(split, some)
                sums[:, i, number] = torch.tensor([spent, text, len(some)], dtype=torch.float64)
    sums = total(sums)
    buckets = []
    for i, (first, last) in enumerate(zip([0, *ends], ends, strict=False)):
        spent, text, tokens = sums[:, i].numpy()
        if not tokens.sum():
            continue
        loss, low, high = _ratio(spent, tokens)
        bits = float(spent.sum() / math.log(2) / max(1.0, text.sum()))
        buckets.append(PositionBucket(first, last, loss, low, high, bits, int(tokens.sum())))
    return buckets


def _doubling(length: int) -> list[int]:
    ends, end = [], 64
    while end < length:
        ends.append(end)
        end *= 2
    return [*ends, length]


def _places(shards: Shards, split: str, length: int, rows: int | None) -> list[tuple[int, int]]:
    """Of each row its first token, and how many of its tokens have a label."""
    n = shards.ring(split).tokens
    every = math.ceil(n / length)
    chosen = every if rows is None else max(1, min(rows, every))
    return [(i * every // chosen * length, n - i * every // chosen * length) for i in range(chosen)]


def _read(
    nats: Nats,
    shards: Shards,
    split: str,
    places: Sequence[tuple[int, int]],
    length: int,
    batch: int,
    separate: bool,
    rank: int,
    world: int,
) -> Iterator[tuple[range, Batch, NDArray[np.float64]]]:
    """(numbers of the rows, rows, their nats) of this process."""
    for first in range(0, len(places), batch * world):
        begin = min(first + rank * batch, len(places))
        numbers = range(begin, min(begin + batch, len(places)))
        # A process without rows left still takes part: layers may be spread over all of them.
        some = [places[i] for i in numbers] or [(0, 0)]
        read = read_rows(shards, split, some, length, separate_documents=separate)
        found = nats(read).double().cpu().numpy()
        yield numbers, read, found


def _labels(batch: Batch, row: int) -> NDArray[np.int64]:
    labels: NDArray[np.int64] = batch.labels[row].numpy()
    n_labelled = int((labels != NO_LABEL).sum())  # the first ones
    return labels[:n_labelled]


def _ratio(
    above: NDArray[np.float64], below: NDArray[np.float64]
) -> tuple[float, float | None, float | None]:
    """Sum by sum with its interval (the ratio estimator's standard error; Cochran 1977, ch. 6)."""
    kept = (above != 0) | (below != 0)  # rows without any such token
    above, below = above[kept], below[kept]
    value = float(above.sum() / below.sum())
    n = len(above)
    if n < 2:
        return value, None, None
    error = math.sqrt(n / (n - 1) * float(((above - value * below) ** 2).sum())) / below.sum()
    return value, value - CONFIDENCE * float(error), value + CONFIDENCE * float(error)
