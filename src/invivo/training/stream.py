"""Rows of tokens in an order that depends on the seed alone, and can be entered anywhere.

An epoch cuts the ring of training tokens into rows of one length, beginning at another place each
time, and deals them in another order. The order is a function of (seed, epoch), computed row by
row, so that a position is one number and nothing grows with the corpus.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from invivo.errors import Conflict, InvalidRequest
from invivo.training.shards import Shards

NO_LABEL = -100
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of tokens.

    Attributes:
        tokens: [b, length] int64.
        labels: [b, length] int64, the token behind each; -100: no loss there.
        starts: [b, length] bool, True where a document begins, the rows' own beginnings aside;
            None: a row is one text.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    starts: torch.Tensor | None


class Stream(Protocol):
    """Where a training loop gets its rows."""

    def next(self) -> Batch:
        """The next rows of this process."""

    def state(self) -> dict[str, Any]:
        """The position, as JSON; the same for all processes."""

    def load(self, state: dict[str, Any]) -> None:
        """Go to a position."""


class PackedStream:
    """Training rows of this process.

    Row i of a run is the same for every number of processes: of each ``batch`` rows in a sequence,
    process ``rank`` gets its ``batch / world``.

    Args:
        length: tokens of a row.
        batch: rows of one ``next`` over all processes.
        rank, world: which process of how many.
        separate_documents: mark the beginnings of documents.
        split: what is read.

    Attributes:
        tokens_per_epoch: tokens predicted in an epoch: each of the split once.
        rows_per_epoch: the last row of an epoch is filled up with what has no label.

    Raises:
        InvalidRequest: a length or batch below 1, a batch that the processes cannot share
            equally, a rank beyond them, or an empty split.
    """

    def __init__(
        self,
        shards: Shards,
        *,
        length: int,
        batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        separate_documents: bool = False,
        split: str = "train",
    ) -> None:
        if not 0 <= rank < world:
            raise InvalidRequest(f"must lie in 0 .. {world - 1}", field="rank", given=rank)
        for name, value in (("length", length), ("batch", batch)):
            if value < 1:
                raise InvalidRequest("must be at least 1", field=name, given=value)
        if batch % world:
            raise InvalidRequest(
                f"must be a multiple of {world} processes", field="batch", given=batch
            )
        self._shards, self._split = shards, split
        self._length, self._batch, self._seed = length, batch, seed
        self._share = batch // world
        self._skipped = rank * self._share  # rows of other processes before this one's
        self._separate = separate_documents
        self.tokens_per_epoch = shards.ring(split).tokens
        self.rows_per_epoch = math.ceil(self.tokens_per_epoch / length)
        self._rows = 0  # dealt so far to all processes

    @property
    def epochs(self) -> float:
        """How often the split has been seen."""
        return self._rows / self.rows_per_epoch

    def next(self) -> Batch:
        first = self._rows + self._skipped
        self._rows += self._batch
        return self.rows(range(first, first + self._share))

    def rows(self, numbers: range) -> Batch:
        """These rows of the run, counted over epochs and processes."""
        places = []
        for number in numbers:
            epoch, place = divmod(number, self.rows_per_epoch)
            row = shuffled(place, self.rows_per_epoch, self._seed, epoch) * self._length
            begin = mixed(self._seed, epoch) % self.tokens_per_epoch
            places.append((begin + row, self.tokens_per_epoch - row))
        return read_rows(
            self._shards, self._split, places, self._length, separate_documents=self._separate
        )

    def state(self) -> dict[str, Any]:
        return {
            "rows": self._rows,
            "seed": self._seed,
            "length": self._length,
            "split": self._split,
            "data": self._shards.digest,
        }

    def load(self, state: dict[str, Any]) -> None:
        """
        Raises:
            Conflict: it is a position in other rows.
        """
        mine = self.state()
        for name in ("data", "seed", "length", "split"):
            if state.get(name) != mine[name]:
                raise Conflict(
                    f"the position is one in other rows: {name} was {state.get(name)!r}",
                    field=f"stream.{name}",
                    given=mine[name],
                    remedy="Resume with the same data, seed and length, or start afresh",
                )
        self._rows = int(state["rows"])


def read_rows(
    shards: Shards,
    split: str,
    places: Sequence[tuple[int, int]],
    length: int,
    *,
    separate_documents: bool = False,
) -> Batch:
    """Rows of a ring.

    Args:
        places: of each row its first token, and how many of its tokens have a label.
    """
    tokens = np.empty((len(places), length + 1), np.int64)
    for row, (start, _) in zip(tokens, places, strict=True):
        row[:] = shards.read(split, start, length + 1)
    labels = tokens[:, 1:].copy()
    for row, (_, labelled) in zip(labels, places, strict=True):
        row[max(0, labelled) :] = NO_LABEL
    inputs = torch.from_numpy(tokens[:, :-1].copy())
    starts = inputs == shards.opening if separate_documents else None
    return Batch(inputs, torch.from_numpy(labels), starts)


def mixed(*numbers: int) -> int:
    """64 bits that depend on all of ``numbers`` (SplitMix64's finisher; Steele et al. 2014)."""
    x = 0
    for number in numbers:
        x = (x + (number & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
        x ^= x >> 31
    return x


def shuffled(place: int, n: int, seed: int, epoch: int) -> int:
    """Where ``place`` goes in a permutation of 0 .. n - 1.

    A Feistel network over the next even number of bits; what falls behind ``n`` is sent through
    again (Black and Rogaway 2002, cycle walking).
    """
    half = max(1, (max(1, n - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    x = place
    while True:
        left, right = x >> half, x & low
        for step in range(4):
            left, right = right, left ^ (mixed(seed, epoch, step, right) & low)
        x = left << half | right
        if x < n:
            return x
