"""Intervals and tests for what was measured: proportions, pairs, many comparisons.

Everything is deterministic: what resamples takes a seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from invivo.errors import InvalidRequest, MissingDependency

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate between two bounds that hold with the given confidence."""

    value: float
    low: float
    high: float
    confidence: float = 0.95


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927, "Probable Inference").

    Raises:
        InvalidRequest: no trials, or more successes than trials.
    """
    _check_counts(successes, n)
    test = _scipy_stats().binomtest(int(successes), int(n))
    bounds = test.proportion_ci(confidence_level=confidence, method="wilson")
    return Interval(successes / n, float(bounds.low), float(bounds.high), confidence)


def sign_test(positive: int, negative: int) -> float:
    """Two-sided p that a fair coin gives signs at least this uneven; 1 without any.

    With the two kinds of disagreement between two paired classifiers this is McNemar's exact test
    (McNemar 1947).
    """
    n = positive + negative
    if n == 0:
        return 1.0
    return float(_scipy_stats().binomtest(int(positive), int(n)).pvalue)


def mcnemar(one: ArrayLike, other: ArrayLike) -> float:
    """Two-sided p that two classifiers, right or wrong on the same items, are equally good.

    Args:
        one, other: [n] truth values.

    Raises:
        InvalidRequest: of different length.
    """
    a, b = _pairs(np.asarray(one, dtype=bool), np.asarray(other, dtype=bool))
    return sign_test(int((a & ~b).sum()), int((~a & b).sum()))


def paired_difference(
    one: ArrayLike,
    other: ArrayLike,
    *,
    seed: int = 0,
    n_resamples: int = 10_000,
    confidence: float = 0.95,
) -> Interval:
    """Mean of ``one - other`` over items, with a percentile bootstrap over items (Efron 1979).

    Args:
        one, other: [n] numbers of the same items.

    Raises:
        InvalidRequest: of different length, or empty.
    """
    a, b = _pairs(np.asarray(one, dtype=float), np.asarray(other, dtype=float))
    return bootstrap_mean(a - b, seed=seed, n_resamples=n_resamples, confidence=confidence)


def bootstrap_mean(
    values: ArrayLike, *, seed: int = 0, n_resamples: int = 10_000, confidence: float = 0.95
) -> Interval:
    """Mean of values [n] with a percentile bootstrap over them.

    Raises:
        InvalidRequest: there are none.
    """
    numbers = np.asarray(values, dtype=float)
    if numbers.size == 0:
        raise InvalidRequest("no values to resample", field="values")
    draw = np.random.default_rng(seed)
    # A piece at a time: indices of all resamples of many items would take gigabytes.
    means = np.concatenate(
        [
            numbers[draw.integers(numbers.size, size=(rows, numbers.size))].mean(1)
            for rows in _pieces(n_resamples, max(1, 2_000_000 // numbers.size))
        ]
    )
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(numbers.mean()), float(low), float(high), confidence)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p of several tests, in their order (Holm 1979): each below alpha may be claimed
    while the chance of any false claim stays below alpha."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def agreement(answers: ArrayLike) -> Interval:
    """How often two different judgements of an item are the same, with a bootstrap over items.

    Args:
        answers: [items, judgements] of category numbers, two judgements or more.

    Raises:
        InvalidRequest: no items, or one judgement.
    """
    table = np.asarray(answers)
    if table.ndim != 2 or table.shape[1] < 2 or not len(table):
        raise InvalidRequest(
            "two judgements of each item are needed", field="answers", given=table.shape
        )
    k = table.shape[1]
    same = (table[:, :, None] == table[:, None, :]).sum((1, 2)) - k
    return bootstrap_mean(same / (k * (k - 1)))


def _pairs(a: Any, b: Any) -> tuple[Any, Any]:
    if a.shape != b.shape or a.ndim != 1:
        raise InvalidRequest(
            "both must have one value an item", field="other", given=[a.shape, b.shape]
        )
    return a, b


def _pieces(n: int, most: int) -> list[int]:
    return [min(most, n - at) for at in range(0, n, most)]


def _check_counts(successes: int, n: int) -> None:
    if n < 1 or not 0 <= successes <= n:
        raise InvalidRequest(
            "needs at least one trial and no more successes than trials",
            field="n",
            given=[successes, n],
        )


def _scipy_stats() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise MissingDependency(
            "intervals and tests need scipy", remedy="Run: pip install 'invivo[study]'"
        ) from error
    return stats
