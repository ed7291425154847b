"""How long an iteration takes: a model of the engine's own step times, kept up while it runs.

    f = max(flat, base + per_row * rows) * [any rows] + context * c
        + pairs_start * [any pairs] + pairs * p
        + backward_start * [any backward] + backward_layer * l + backward * b
        + training_start * [any training rows] + train_row * training rows

Up to some number of rows a step costs what reading the weights costs; beyond it, what the
arithmetic costs: hence the larger of a constant and a line. Everything else is linear. The
coefficients start from a profile and follow the machine by recursive least squares with
forgetting, a few microseconds a step. No coefficient but ``base`` is ever negative, so more work
is never predicted to take less time, and the model can be inverted by bisection. No torch in here.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import mul

import numpy as np
from numpy.typing import NDArray

from invivo.errors import InvalidRequest

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Work:
    """What one iteration does, as far as its time depends on it.

    Attributes:
        rows: rows of the flat batch: decode, prefill, scored and training-forward tokens.
        train_rows: those of them that are training-forward tokens.
        context: keys that the decode rows read, summed.
        pairs: (row, key) pairs of all spans longer than one row.
        backward: token-layers of backward: tokens of each unit times its layers, summed.
        layers: layers of all units of backward, summed: each costs its start, however few tokens.
    """

    rows: int
    train_rows: int = 0
    context: int = 0
    pairs: int = 0
    backward: int = 0
    layers: int = 0

    def with_window(self, start: int, size: int) -> Work:
        """This and a training window [start, start + size) of one sequence."""
        pairs = self.pairs + size * start + size * (size + 1) // 2
        rows, train_rows = self.rows + size, self.train_rows + size
        return Work(rows, train_rows, self.context, pairs, self.backward, self.layers)

    def with_backward(self, tokens: int, layers: int) -> Work:
        """This and a backward of ``tokens`` through ``layers``."""
        return replace(self, backward=self.backward + tokens * layers, layers=self.layers + layers)


@dataclass(frozen=True, slots=True)
class Sample:
    """A measured iteration; ``weight`` is the number of measurements it stands for."""

    work: Work
    seconds: float
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Coefficients:
    """The model's numbers, in seconds per unit of :class:`Work`."""

    flat: float
    base: float
    per_row: float
    context: float
    pairs: float
    backward_start: float
    backward: float
    training_start: float
    train_row: float = 0.0
    backward_layer: float = 0.0
    pairs_start: float = 0.0


# A size of each feature at which it matters. Least squares runs in these units, so that one
# prior suits all: a coefficient is known to some hundredths of a second before any measurement,
# when measurements scatter by a few percent.
_UNITS = (1.0, 1.0, 256.0, 1e5, 1e6, 1.0, 1e4, 1.0, 256.0, 32.0, 1.0)
_PRIOR_INFORMATION = 4.0 * np.eye(11)
_BASE = 1
_LEAST = 1e-6  # seconds: no step takes less
_HICCUP = 4.0  # a step counts at most as that many times what was predicted
_MOST_SAFETY = 1.5
_GROUP = 8  # steps whose times are compared together
_ENOUGH = 32  # recorded steps from which the safety factor rests on them
Row = list[float]


def _features(work: Work) -> tuple[Row, Row]:
    """The feature vectors of the flat and of the rising part, in units of ``_UNITS``."""
    rest = [
        work.context / _UNITS[3],
        work.pairs / _UNITS[4],
        float(work.backward > 0),
        work.backward / _UNITS[6],
        float(work.train_rows > 0),
        work.train_rows / _UNITS[8],
        work.layers / _UNITS[9],
        float(work.pairs > 0),
    ]
    some = float(work.rows > 0)
    return [some, 0.0, 0.0, *rest], [0.0, some, work.rows / _UNITS[2], *rest]


def _dot(a: Row, b: Row) -> float:
    return float(sum(map(mul, a, b)))


@dataclass(slots=True)
class _Fit:
    """The coefficients of one range of rows (in ``_UNITS``) and what is known of them."""

    weights: Row
    information: Array  # [11, 11]: sum of x x^T over remembered steps, and the prior

    def copy(self) -> _Fit:
        return _Fit(list(self.weights), self.information.copy())

    def seconds(self, work: Work) -> float:
        flat, line = _features(work)
        return max(_dot(self.weights, flat), _dot(self.weights, line), _LEAST)

    def update(self, work: Work, seconds: float, forgetting: float) -> None:
        """One step of recursive least squares on the relative error.

        The prior's information is renewed at the rate at which steps are forgotten, so what a
        steady load says nothing about stays as it is.
        """
        flat, line = _features(work)
        chosen = flat if _dot(self.weights, flat) >= _dot(self.weights, line) else line
        expected = max(_dot(self.weights, chosen), _LEAST)
        seconds = min(seconds, _HICCUP * expected)
        # Relative to the slower of the two, nearly: neither a hiccup nor an empty step counts much.
        scale = max(seconds, expected / 2)
        x = np.array(chosen) / scale
        self.information = (
            forgetting * self.information + (1 - forgetting) * _PRIOR_INFORMATION + np.outer(x, x)
        )
        self.weights = _moved(
            np.array(self.weights), self.information, x * ((seconds - expected) / scale)
        ).tolist()


def _moved(weights: Array, information: Array, gradient: Array) -> Array:
    """The best step of the weights among those that leave none negative.

    What would become negative stops at zero, and the others move as they should given that: if they
    moved as before, what balances the negative part would remain, and predictions could grow
    although steps are fast.
    """
    free = np.ones(len(weights), dtype=bool)
    move = np.zeros(len(weights))
    while True:
        move[~free] = -weights[~free]
        pull = gradient - information[:, ~free] @ move[~free]
        move[free] = np.linalg.solve(information[np.ix_(free, free)], pull[free])
        negative = free & (weights + move < 0)
        negative[_BASE] = False  # only the line may start below zero
        if not negative.any():
            return weights + move
        free &= ~negative


class LatencyModel:
    """Predicts the seconds of an iteration and finds how much fits into a budget.

    Args:
        profile: measured iterations to start from; best a sweep over rows, training rows and
            backward layers.
        edges: borders of ranges of rows with coefficients of their own (the sizes of captured
            graphs); a range without measurements starts from all of them.
        forgetting: weight of a step by each step after it; 0.995 remembers about 200.
        quantile: of real over predicted time among groups of recent steps, which the budget allows
            for.

    Raises:
        InvalidRequest: no profile, or a time that is not positive.
    """

    def __init__(
        self,
        profile: Sequence[Sample],
        *,
        edges: Sequence[int] = (),
        forgetting: float = 0.995,
        quantile: float = 0.8,
    ) -> None:
        if not profile:
            raise InvalidRequest(
                "a latency model needs at least one measured step", field="profile", given=[]
            )
        bad = next((s for s in profile if not s.seconds > 0 or not s.weight > 0), None)
        if bad is not None:
            raise InvalidRequest("times and weights are positive", field="profile", given=bad)
        self._edges = tuple(sorted(edges))
        self._forgetting = forgetting
        self._quantile = quantile
        self._fits = [_fit(profile)]
        if self._edges:
            ranges: list[list[Sample]] = [[] for _ in range(len(self._edges) + 1)]
            for sample in profile:
                ranges[self._range(sample.work)].append(sample)
            self._fits = [_fit(given) if given else self._fits[0].copy() for given in ranges]
        self._ratios: deque[float] = deque(maxlen=256)  # real over predicted time of recent steps
        self._group: list[tuple[float, float]] = []  # real and predicted seconds
        self._lateness: deque[float] = deque(maxlen=256 // _GROUP)  # of groups
        late = _quantile([(s.seconds / self.predict(s.work), s.weight) for s in profile], quantile)
        self._safety = min(max(1.0, late), _MOST_SAFETY)

    def predict(self, work: Work) -> float:
        """Seconds.

        A range of rows never takes less than the ranges below it at their upper border, so that
        the prediction rises over the borders too.
        """
        last = self._range(work)
        seconds = self._fits[last].seconds(work)
        for fit, edge in zip(self._fits[:last], self._edges, strict=False):
            seconds = max(seconds, fit.seconds(replace(work, rows=edge)))
        return seconds

    @property
    def safety(self) -> float:
        """By how much recent steps have outlasted their prediction, from 1 to 1.5.

        What is promised is the mean time of many tokens, so groups of steps are looked at and not
        single ones: what scatters among short steps must not make long ones shorter. Beyond that it
        is left to deadlines, which count what steps really took.

        Until enough steps have been recorded, that of the profile.
        """
        return self._safety

    @property
    def ratios(self) -> tuple[float, ...]:
        """Real over predicted time of the latest steps."""
        return tuple(self._ratios)

    def record(self, work: Work, seconds: float) -> None:
        """Learn from an iteration that took ``seconds`` (positive)."""
        assert seconds > 0, seconds
        predicted = self.predict(work)
        self._ratios.append(seconds / predicted)
        self._group.append((seconds, predicted))
        if len(self._group) == _GROUP:
            real, wanted = (sum(part) for part in zip(*self._group, strict=True))
            self._lateness.append(real / wanted)
            self._group.clear()
        if len(self._lateness) * _GROUP >= _ENOUGH:
            ratios = sorted(self._lateness)
            late = ratios[int(self._quantile * (len(ratios) - 1))]
            self._safety = min(max(1.0, late), _MOST_SAFETY)
        self._fits[self._range(work)].update(work, seconds, self._forgetting)

    def largest(
        self, grow: Callable[[int], Work], limit: int, budget: float, *, minimum: int = 1
    ) -> int:
        """The largest n <= ``limit`` with ``predict(grow(n)) * safety <= budget``.

        Args:
            grow: the iteration with n units more; every feature rises with n.
            minimum: smallest n worth while; 0 is answered where not even that fits.
        """
        allowed = budget / self.safety
        # Invariant: what is below ``low`` fits, what is from ``high`` on does not.
        low, high = 1, limit + 1
        while low < high:
            middle = (low + high) // 2
            if self.predict(grow(middle)) <= allowed:
                low = middle + 1
            else:
                high = middle
        return low - 1 if low - 1 >= minimum else 0

    def coefficients(self, rows: int = 0) -> Coefficients:
        """Of the range that a batch of ``rows`` belongs to."""
        weights = self._fits[self._range(Work(rows))].weights
        return Coefficients(*(w / unit for w, unit in zip(weights, _UNITS, strict=True)))

    def _range(self, work: Work) -> int:
        return bisect_left(self._edges, work.rows)


def _quantile(weighted: list[tuple[float, float]], q: float) -> float:
    """The smallest value that at least a share ``q`` of the weight does not exceed."""
    left = q * sum(weight for _, weight in weighted)
    for value, weight in sorted(weighted):
        left -= weight
        if left <= 0:
            return value
    return max(weighted)[0]


def _fit(profile: Sequence[Sample]) -> _Fit:
    """Least squares on the relative error, over all places where the flat part may end."""
    pairs = [_features(s.work) for s in profile]
    flat = np.array([p[0] for p in pairs])
    line = np.array([p[1] for p in pairs])
    rows = np.array([s.work.rows for s in profile])
    scale = np.array([s.weight**0.5 for s in profile])
    seconds = np.array([s.seconds for s in profile])
    best: tuple[float, Array, Array] | None = None
    for end in (-1, *np.unique(rows).tolist()):
        x = np.where((rows <= end)[:, None], flat, line) * (scale / seconds)[:, None]
        weights = _least_squares(x, scale)
        if end == rows.max():
            # Nothing is known beyond: suppose that the flat part ends here.
            weights[_BASE], weights[_BASE + 1] = 0.0, weights[0] * _UNITS[2] / max(end, 1)
        predicted = np.maximum(flat @ weights, line @ weights)
        loss = float((((predicted / seconds) - 1.0) ** 2 * scale**2).sum())
        if best is None or loss < best[0] * (1 - 1e-9):
            best = (loss, weights, x)
    assert best is not None
    _, weights, x = best
    return _Fit(weights.tolist(), x.T @ x + _PRIOR_INFORMATION)


def _least_squares(x: Array, y: Array) -> Array:
    """Ridge solution of x w = y; what would be negative is set to zero and the rest solved anew."""
    free = np.ones(x.shape[1], dtype=bool)
    while True:
        part = x[:, free]
        normal = part.T @ part + _PRIOR_INFORMATION[free][:, free]
        weights = np.zeros(x.shape[1])
        weights[free] = np.linalg.solve(normal, part.T @ y)
        negative = (weights < 0) & (np.arange(x.shape[1]) != _BASE)
        if not negative.any():
            return weights
        free &= ~negative
