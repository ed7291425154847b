"""The learning rate's course."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from invivo.training.config import Schedule
from invivo.training.schedule import rate_at


def rates(schedule: Schedule, steps: int) -> list[float]:
    return [rate_at(schedule, 1.0, step, steps) for step in range(steps)]


def test_a_cosine_rises_in_a_line_and_ends_at_the_final_rate() -> None:
    found = rates(Schedule(kind="cosine", warmup=4, final=0.1), 25)
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[4] == 1.0
    assert found[14] == pytest.approx(0.55)  # half way from step 4 to step 24
    assert found[24] == pytest.approx(0.1)


def test_warm_up_stable_decay() -> None:
    found = rates(Schedule(kind="wsd", warmup=2, final=0.0, decay=0.5), 21)
    assert found[1:11] == [1.0] * 10
    assert found[15] == pytest.approx(0.5)
    assert found[20] == 0.0


def test_a_constant_rate_stays_after_its_warm_up() -> None:
    assert rates(Schedule(kind="constant", warmup=2), 4) == [0.5, 1.0, 1.0, 1.0]


@given(
    kind=st.sampled_from(["cosine", "wsd", "constant"]),
    warmup=st.integers(0, 30),
    final=st.floats(0, 1),
    decay=st.floats(0, 1),
    steps=st.integers(1, 40),
    step=st.integers(0, 60),
)
def test_rates_lie_between_nothing_and_the_peak(
    kind: str, warmup: int, final: float, decay: float, steps: int, step: int
) -> None:
    schedule = Schedule(kind=kind, warmup=warmup, final=final, decay=decay)  # type: ignore[arg-type]
    here, peak = rate_at(schedule, 3e-4, step, steps), 3e-4
    assert 0 <= here <= peak
    if step >= warmup:
        assert here >= final * peak * (1 - 1e-9)
        assert rate_at(schedule, peak, step + 1, steps) <= here
