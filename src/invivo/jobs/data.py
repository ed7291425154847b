"""The texts of a job in their order: a data source of the engine that can stop and go on anywhere.

Every document is a text of its own, so nothing is padded and no document sees another. The order
is a permutation drawn from (seed, epoch): a position is two numbers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from invivo.engine.job_spec import Text
from invivo.errors import Conflict
from invivo.jobs.examples import Examples


class TrainingData:
    """Examples in a new order every epoch.

    Args:
        n_texts: how many in all, over the epochs; None = without end.
        shuffle: False keeps the order of the file.
    """

    def __init__(
        self, examples: Examples, *, seed: int, shuffle: bool = True, n_texts: int | None = None
    ) -> None:
        self._examples = examples
        self._seed = seed
        self._shuffle = shuffle
        self._n_texts = n_texts
        self._digest = examples.digest
        self._lengths = np.diff(examples.starts)
        self._at = 0  # texts given so far
        nothing = (-1, np.empty(0, np.int64))
        self._order_of: tuple[int, NDArray[np.int64]] = nothing  # the engine's thread
        self._sums_of: tuple[int, NDArray[np.int64]] = nothing  # the thread that keeps the records

    def __len__(self) -> int:
        """Different examples."""
        return len(self._examples)

    def next(self) -> Text | None:
        if self._n_texts is not None and self._at >= self._n_texts:
            return None
        epoch, index = divmod(self._at, len(self._examples))
        self._at += 1
        return self.text(int(self._order(epoch)[index]))

    def text(self, example: int) -> Text:
        """The example of this number."""
        examples = self._examples
        start, stop = int(examples.starts[example]), int(examples.starts[example + 1])
        tokens = examples.tokens[start:stop]
        labels = np.full(stop - start, -100, np.int64)
        labels[:-1] = np.where(examples.learned[start + 1 : stop], tokens[1:], -100)
        return Text(tokens.tolist(), labels.tolist())

    def position(self) -> dict[str, Any]:
        epoch, index = divmod(self._at, len(self._examples))
        return {"epoch": epoch, "index": index, "examples": self._digest}

    def seek(self, position: Any) -> None:
        """
        Raises:
            Conflict: the position is one in other examples.
        """
        if position["examples"] != self._digest:
            raise Conflict(
                "the checkpoint was written with other training data",
                field="training_file",
                remedy="The file, the tokenizer or its chat template has changed: start a new job",
            )
        self._at = position["epoch"] * len(self._examples) + position["index"]

    def tokens_of_first(self, n_texts: int) -> int:
        """Tokens of the first ``n_texts`` texts; those past the end are not counted."""
        if self._n_texts is not None:
            n_texts = min(n_texts, self._n_texts)
        epoch, index = divmod(n_texts, len(self._examples))
        if self._sums_of[0] != epoch:
            sums = np.concatenate(([0], np.cumsum(self._lengths[self._drawn(epoch)])))
            self._sums_of = (epoch, sums)
        return int(epoch * self._lengths.sum() + self._sums_of[1][index])

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if self._order_of[0] != epoch:
            self._order_of = (epoch, self._drawn(epoch))
        return self._order_of[1]

    def _drawn(self, epoch: int) -> NDArray[np.int64]:
        n = len(self._examples)
        if not self._shuffle:
            return np.arange(n)
        return np.random.default_rng((self._seed, epoch)).permutation(n)


def steps_and_texts(
    n_examples: int, *, n_epochs: int, steps: int | None, batch_size: int
) -> tuple[int, int | None]:
    """Optimizer steps of a job, and the texts after which its data ends (None = never)."""
    if steps is not None:
        return steps, None
    n_texts = n_examples * n_epochs
    return math.ceil(n_texts / batch_size), n_texts
