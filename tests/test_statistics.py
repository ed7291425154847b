"""Intervals and tests against values that are known or can be worked out by hand."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from invivo.errors import InvalidRequest
from invivo.statistics import (
    agreement,
    bootstrap_mean,
    holm,
    mcnemar,
    paired_difference,
    sign_test,
    wilson,
)


def test_wilson_is_the_published_formula():
    found, z = wilson(7, 20), 1.959963984540054
    centre = (7 / 20 + z * z / 40) / (1 + z * z / 20)
    half = z / (1 + z * z / 20) * np.sqrt(0.35 * 0.65 / 20 + z * z / 1600)
    assert (found.value, found.low, found.high) == pytest.approx(
        (0.35, centre - half, centre + half)
    )
    assert wilson(0, 5).low == 0
    assert wilson(5, 5).high == 1
    with pytest.raises(InvalidRequest):
        wilson(3, 2)


@given(st.integers(0, 30), st.integers(0, 30))
def test_the_sign_test_counts_coin_throws(a: int, b: int) -> None:
    tail = sum(comb(a + b, k) for k in range(min(a, b) + 1)) / 2 ** (a + b)
    assert sign_test(a, b) == pytest.approx(min(1.0, 2 * tail))
    assert sign_test(a, b) == pytest.approx(sign_test(b, a))


def test_mcnemar_looks_at_disagreements_alone():
    one = [True] * 9 + [False] * 1 + [True] * 50
    other = [False] * 9 + [True] * 1 + [True] * 50
    assert mcnemar(one, other) == sign_test(9, 1)
    assert mcnemar(one, one) == 1
    with pytest.raises(InvalidRequest):
        mcnemar([True], [True, False])


def test_a_paired_difference_covers_what_was_put_in():
    """Of 200 experiments with a true difference of 0.3 about 95 % cover it."""
    draw = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        common = draw.normal(size=60)  # what both share does not widen the interval
        one, other = common + draw.normal(0.3, 0.2, 60), common + draw.normal(0, 0.2, 60)
        found = paired_difference(one, other, seed=seed, n_resamples=400)
        covered += found.low <= 0.3 <= found.high
        assert found.high - found.low < 0.3
    assert 180 <= covered <= 199


def test_the_same_seed_gives_the_same_interval():
    values = np.arange(50.0)
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values).value == values.mean()
    with pytest.raises(InvalidRequest):
        bootstrap_mean([])


def test_holm_steps_down():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_agreement_is_the_share_of_equal_pairs():
    assert agreement([[1, 1, 1], [0, 1, 2]]).value == 0.5
    assert agreement([[0, 0, 1]]).value == pytest.approx(1 / 3)
    with pytest.raises(InvalidRequest):
        agreement([[1]])
