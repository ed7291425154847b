"""Means and differences over runs that differ in their seed, with 95 percent intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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
    """Mean with Student's interval."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return Estimate(mean, None, None, n)
    half = _quantile(n - 1) * math.sqrt(_variance(values) / n)
    return Estimate(mean, mean - half, mean + half, n)


def difference(one: Sequence[float], other: Sequence[float]) -> Estimate:
    """Mean of ``one`` less mean of ``other``, with Welch's interval (Welch 1947)."""
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
    """Of Student's distribution, so that ``CONFIDENCE`` lies between it and its negative.

    With t = sqrt(freedom) tan(angle) the density is a power of the cosine, which is summed by
    Simpson's rule; the angle is found by bisection.
    """
    scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    scale = 2 * math.exp(scale) / math.sqrt(math.pi)
    low, high = 0.0, math.pi / 2
    for _ in range(50):
        angle = (low + high) / 2
        if scale * _simpson(angle, freedom - 1) < CONFIDENCE:
            low = angle
        else:
            high = angle
    return math.sqrt(freedom) * math.tan(low)


def _simpson(angle: float, power: float, n: int = 1000) -> float:
    """Integral of ``cos(x) ** power`` from 0 to ``angle``."""
    width = angle / n
    values = [math.pow(math.cos(i * width), power) for i in range(n + 1)]
    odd, even = sum(values[1:-1:2]), sum(values[2:-1:2])
    return width / 3 * (values[0] + values[-1] + 4 * odd + 2 * even)
