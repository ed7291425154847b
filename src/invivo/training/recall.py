"""Recall of many pairs: a made-up task that shows how much of its past a model can look up.

A row lists keys with their values, ``k1 v1 k2 v2 ...``; then keys come again, one by one among
blanks, and at each the model must name the value. A state of fixed size has to hold all pairs;
attention can look back. The task is multi-query associative recall (Arora et al., "Zoology",
arXiv 2312.04927); here all keys are asked, at places drawn evenly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
BLOCK = 64  # rows drawn together
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
class RecallRows:
    """Some rows.

    Attributes:
        tokens: [n, length].
        labels: [n, length], the value where a key is asked, else -100.
        distances: [n, length], tokens from the pair's value to the question, 0 elsewhere.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    distances: NDArray[np.int64]

    def some(self, rows: slice) -> RecallRows:
        return RecallRows(self.tokens[rows], self.labels[rows], self.distances[rows])

    @property
    def batch(self) -> Batch:
        return Batch(torch.from_numpy(self.tokens), torch.from_numpy(self.labels), None)


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


def recall_rows(
    task: Recall, length: int, pairs: NDArray[np.int64], draw: np.random.Generator
) -> RecallRows:
    """Rows with so many pairs each, ``pairs`` [n]."""
    n, most = len(pairs), int(pairs.max())
    keys = 1 + draw.random((n, task.keys)).argsort(axis=1)[:, :most]
    values = 1 + task.keys + draw.integers(task.values, size=(n, most))
    # Places of questions: a random order of what lies behind the pairs.
    order = draw.random((n, length))
    order[np.arange(length) < 2 * pairs[:, None]] = np.inf
    places = order.argsort(axis=1)[:, :most]
    row, pair = np.nonzero(np.arange(most) < pairs[:, None])
    place = places[row, pair]
    tokens = np.full((n, length), BLANK, np.int64)
    labels = np.full((n, length), NO_LABEL, np.int64)
    distances = np.zeros((n, length), np.int64)
    tokens[row, 2 * pair], tokens[row, 2 * pair + 1] = keys[row, pair], values[row, pair]
    tokens[row, place], labels[row, place] = keys[row, pair], values[row, pair]
    distances[row, place] = place - (2 * pair + 1)
    return RecallRows(tokens, labels, distances)


class RecallStream:
    """Rows without end; row i is a function of (seed, i), whatever the number of processes.

    Rows are drawn ``BLOCK`` at a time.

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
        blocks = range(first // BLOCK, (first + self._share - 1) // BLOCK + 1)
        drawn = [self._block(number) for number in blocks]
        begin = first - BLOCK * blocks[0]
        rows = slice(begin, begin + self._share)
        tokens = np.concatenate([block.tokens for block in drawn])[rows]
        labels = np.concatenate([block.labels for block in drawn])[rows]
        return Batch(torch.from_numpy(tokens), torch.from_numpy(labels), None)

    def _block(self, number: int) -> RecallRows:
        draw = np.random.default_rng((self._seed, number))
        pairs = draw.choice(np.array(self._task.pairs), size=BLOCK)
        return recall_rows(self._task, self._length, pairs, draw)

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
        draw = np.random.default_rng((seed, pairs, 0))
        made = recall_rows(task, length, np.full(rows, pairs), draw)
        for first in range(0, rows, batch):
            some = made.some(slice(first, first + batch))
            named = answers(some.batch).cpu().numpy()
            asked = some.labels != NO_LABEL
            asked_at.append(some.distances[asked])
            right.append(named[asked] == some.labels[asked])
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
