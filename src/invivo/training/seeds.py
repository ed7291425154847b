"""Means and differences over runs that differ in their seed, with 95 percent intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from invivo.errors import MissingDependency

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """``low`` and ``high`` are None where one run says nothing about others."""

    value: float
    low: float | None
    high: float | None
    n: int

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.4g}"
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def mean_over(values: Sequence[float]) -> Estimate:
    """Mean with Student's interval.

    Raises:
        MissingDependency: scipy is not installed and there are several values.
    """
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return Estimate(mean, None, None, n)
    half = _quantile(n - 1) * math.sqrt(_variance(values) / n)
    return Estimate(mean, mean - half, mean + half, n)


def difference(one: Sequence[float], other: Sequence[float]) -> Estimate:
    """Mean of ``one`` less mean of ``other``, with Welch's interval (Welch 1947).

    Raises:
        MissingDependency: scipy is not installed and there are several values of each.
    """
    value = sum(one) / len(one) - sum(other) / len(other)
    n = min(len(one), len(other))
    if n < 2:
        return Estimate(value, None, None, n)
    parts = [_variance(values) / len(values) for values in (one, other)]
    if sum(parts) == 0:
        return Estimate(value, value, value, n)
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(values) - 1) for part, values in zip(parts, (one, other), strict=True)
    )
    half = _quantile(freedom) * math.sqrt(sum(parts))
    return Estimate(value, value - half, value + half, n)


def _variance(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1)


def _quantile(freedom: float) -> float:
    """Of Student's distribution, so that ``CONFIDENCE`` lies between it and its negative."""
    try:
        from scipy.stats import t
    except ImportError as error:
        raise MissingDependency(
            "intervals over several runs need scipy", remedy="pip install 'invivo[study]'"
        ) from error
    return float(t.ppf((1 + CONFIDENCE) / 2, freedom))
