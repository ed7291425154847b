"""Counters and percentiles against plain arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

from invivo.engine.stats import HISTORY, ITL_BUCKETS, WINDOW, Counters, Latency


def test_percentiles_are_right_to_five_percent_and_forget_after_a_minute() -> None:
    latency = Latency(ITL_BUCKETS)
    values = np.random.default_rng(0).lognormal(-3, 1, 5000)
    for i, part in enumerate(np.array_split(values, 20)):
        latency.add(part.tolist(), 1000 + i)
    got = latency.percentiles(1019)
    for name, percent in (("p50", 50), ("p95", 95), ("p99", 99)):
        assert got[name] == pytest.approx(np.percentile(values, percent), rel=0.05)
    assert got["count"] == 5000
    assert latency.percentiles(1000 + WINDOW)["count"] == 5000 - 250
    assert latency.percentiles(1019 + WINDOW) == {"p50": None, "p95": None, "p99": None, "count": 0}


def test_histograms_count_each_value_once_with_borders_included() -> None:
    latency = Latency((0.1, 1.0))
    latency.add([0.05, 0.1, 0.5, 1.0, 7.0], 5)
    latency.add([0.2], 5000)
    assert latency.histogram() == {
        "le": [0.1, 1.0],
        "counts": [2, 3, 1],
        "sum": pytest.approx(8.85),
    }


def test_extreme_values_stay_in_the_bins() -> None:
    latency = Latency((1.0,))
    latency.add([0.0, 1e9], 1)
    assert latency.percentiles(1)["count"] == 2


def test_token_history_covers_whole_seconds_and_wraps_around() -> None:
    counters = Counters(started=10_000.0)
    for second in range(10_000, 10_000 + 2 * HISTORY):
        if second % 2:
            counters.count_tokens([second, 1, 0, 0], second)
            for _ in range(3):
                counters.count_backward(2 / 3, second)
    now = 10_000 + 2 * HISTORY + 0.5
    history = counters.history(now)
    assert history["seconds"][-1] == int(now) - 1
    assert len(history["seconds"]) <= HISTORY
    for second, decode, prefill in zip(
        history["seconds"], history["decode"], history["prefill"], strict=True
    ):
        assert (decode, prefill) == ((second, 1) if second % 2 else (0, 0))
    early = Counters(started=20_000.0).history(20_003.2)
    assert early["seconds"] == [20_000, 20_001, 20_002]
    assert early["score"] == [0, 0, 0]
    assert history["backward"] == [2 * (second % 2) for second in history["seconds"]]
    assert counters.totals()["prefill"] == HISTORY
    assert counters.totals()["backward"] == 2 * HISTORY
