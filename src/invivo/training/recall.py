"""Recall of many pairs: a made-up task that shows how much of its past a model can look up.

A row lists keys with their values, ``k1 v1 k2 v2 ...``; then keys come again, one by one among
blanks, and at each the model must name the value. A state of fixed size has to hold all pairs;
attention can look back. The task is multi-query associative recall (Arora et al., "Zoology",
arXiv 2312.04927); here all keys are asked, at places drawn evenly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from invivo.errors import Conflict, InvalidRequest
from invivo.models.decoder import Decoder
from invivo.training.config import Recall
from invivo.training.evaluate import CONFIDENCE
from invivo.training.forward import dense_forward
from invivo.training.stream import NO_LABEL, Batch

BLANK = 0  # keys follow, then values
Answers = Callable[[Batch], torch.Tensor]


@dataclass(frozen=True, slots=True)
class RecallScore:
    """Answers to some questions.

    Attributes:
        pairs: of the rows.
        distance: least and (exclusive) most tokens from pair to question; None: all.
        asked, right: questions.
        accuracy: with ``low`` and ``high``, its 95 percent interval (Wilson 1927).
    """

    pairs: int
    distance: tuple[int, int] | None
    asked: int
    right: int
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class RecallRow:
    """One row.

    Attributes:
        tokens: [length].
        labels: [length], the value where a key is asked, else -100.
        distances: [length], tokens from the pair's value to the question, 0 elsewhere.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    distances: NDArray[np.int64]


def vocabulary(task: Recall) -> int:
    """Tokens there are: the blank, the keys, the values."""
    return 1 + task.keys + task.values


def check_recall(task: Recall, length: int) -> None:
    """
    Raises:
        InvalidRequest: the pairs and their questions do not fit into a row, or the keys do not
            suffice.
    """
    if not task.pairs or min(task.pairs) < 1:
        raise InvalidRequest("must be at least 1", field="data.recall.pairs", given=task.pairs)
    most = max(task.pairs)
    if 3 * most > length:
        raise InvalidRequest(
            f"{most} pairs and their questions need {3 * most} tokens",
            field="data.recall.pairs",
            given=task.pairs,
            remedy=f"Raise data.length ({length}) or take fewer pairs",
        )
    if task.keys < most or task.values < 2:
        raise InvalidRequest(
            f"must be at least {most} keys and 2 values", field="data.recall.keys", given=task.keys
        )


def recall_row(task: Recall, length: int, pairs: int, draw: np.random.Generator) -> RecallRow:
    """A row of ``pairs`` pairs."""
    keys = 1 + draw.permutation(task.keys)[:pairs]
    values = 1 + task.keys + draw.integers(task.values, size=pairs)
    tokens = np.full(length, BLANK, np.int64)
    labels = np.full(length, NO_LABEL, np.int64)
    distances = np.zeros(length, np.int64)
    tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2] = keys, values
    places = 2 * pairs + draw.permutation(length - 2 * pairs)[:pairs]
    tokens[places], labels[places] = keys, values
    distances[places] = places - (2 * np.arange(pairs) + 1)
    return RecallRow(tokens, labels, distances)


class RecallStream:
    """Rows without end; row i is a function of (seed, i), whatever the number of processes.

    Arguments and sharing of rows as :class:`~invivo.training.stream.PackedStream`.

    Raises:
        InvalidRequest: the sizes do not fit together.
    """

    def __init__(
        self, task: Recall, *, length: int, batch: int, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        check_recall(task, length)
        if batch % world:
            raise InvalidRequest(
                f"must be a multiple of {world} processes", field="batch", given=batch
            )
        self._task, self._length, self._batch, self._seed = task, length, batch, seed
        self._share = batch // world
        self._skipped = rank * self._share
        self._rows = 0

    def next(self) -> Batch:
        first = self._rows + self._skipped
        self._rows += self._batch
        rows = [self._row(number) for number in range(first, first + self._share)]
        return _batch(rows)

    def _row(self, number: int) -> RecallRow:
        draw = np.random.default_rng((self._seed, number))
        pairs = int(draw.choice(self._task.pairs))
        return recall_row(self._task, self._length, pairs, draw)

    def state(self) -> dict[str, Any]:
        task = self._task
        return {
            "rows": self._rows,
            "seed": self._seed,
            "length": self._length,
            "task": [list(task.pairs), task.keys, task.values],
        }

    def load(self, state: dict[str, Any]) -> None:
        """
        Raises:
            Conflict: it is a position in other rows.
        """
        mine = self.state()
        for name in ("seed", "length", "task"):
            if state.get(name) != mine[name]:
                raise Conflict(
                    f"the position is one in other rows: {name} was {state.get(name)!r}",
                    field=f"stream.{name}",
                    given=mine[name],
                )
        self._rows = int(state["rows"])


def _batch(rows: Sequence[RecallRow]) -> Batch:
    tokens = torch.from_numpy(np.stack([row.tokens for row in rows]))
    return Batch(tokens, torch.from_numpy(np.stack([row.labels for row in rows])), None)


def decoder_answers(decoder: Decoder, *, dtype: torch.dtype | None = None) -> Answers:
    """The likeliest token at each position that has a label, 0 elsewhere: [b, length]."""

    def answers(batch: Batch) -> torch.Tensor:
        device = decoder.embed.device
        with torch.no_grad():
            hidden = dense_forward(decoder, batch.tokens.to(device), dtype=dtype)
            asked = (batch.labels != NO_LABEL).to(device)
            head = decoder.embed if decoder.head is None else decoder.head
            found = torch.zeros(batch.tokens.shape, dtype=torch.int64, device=device)
            found[asked] = (hidden[asked] @ head.to(hidden.dtype).T).argmax(dim=-1)
        return found

    return answers


def measure_recall(
    answers: Answers,
    task: Recall,
    *,
    length: int,
    rows: int = 64,
    batch: int = 16,
    seed: int = 0,
) -> list[RecallScore]:
    """Ask for every number of pairs, in rows that no stream gives.

    Args:
        answers: tokens named at the positions of a batch that have labels.
        rows: for each number of pairs.

    Returns:
        For each number of pairs one score over all distances, then one for each doubling of the
        distance that was asked.

    Raises:
        InvalidRequest: the sizes do not fit together.
    """
    check_recall(task, length)
    scores = []
    for pairs in task.pairs:
        asked_at, right = [], []
        # A third number in the seed: streams draw with two.
        made = [
            recall_row(task, length, pairs, np.random.default_rng((seed, pairs, i)))
            for i in range(rows)
        ]
        for first in range(0, rows, batch):
            some = made[first : first + batch]
            named = answers(_batch(some)).cpu().numpy()
            for row, guess in zip(some, named, strict=True):
                asked = row.labels != NO_LABEL
                asked_at.append(row.distances[asked])
                right.append(guess[asked] == row.labels[asked])
        distances, hits = np.concatenate(asked_at), np.concatenate(right)
        scores.append(_score(pairs, None, hits))
        edge = 1
        while edge < length:
            here = (distances >= edge) & (distances < 2 * edge)
            if here.any():
                scores.append(_score(pairs, (edge, 2 * edge), hits[here]))
            edge *= 2
    return scores


def _score(pairs: int, distance: tuple[int, int] | None, hits: NDArray[np.bool_]) -> RecallScore:
    n, right = len(hits), int(hits.sum())
    share, z2 = right / n, CONFIDENCE**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = CONFIDENCE / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return RecallScore(pairs, distance, n, right, share, low, high)
