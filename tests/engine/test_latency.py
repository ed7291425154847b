"""The latency model: recovers what is planted, follows the machine, and is inverted exactly."""

from __future__ import annotations

import csv
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from invivo.engine.latency import Coefficients, LatencyModel, Sample, Work
from invivo.errors import InvalidRequest

TABLE = Path(__file__).parents[3] / "shared" / "data" / "02-flexllm" / "latency_table.csv"
PLANTED = Coefficients(
    flat=0.004,
    base=0.001,
    per_row=2e-5,
    context=1e-8,
    pairs=1e-9,
    backward_start=5e-4,
    backward=6e-7,
    training_start=3e-4,
    train_row=1e-5,
    backward_layer=2e-5,
    pairs_start=2e-4,
)


def seconds(work: Work, c: Coefficients = PLANTED) -> float:
    time = max(c.flat, c.base + c.per_row * work.rows) + c.context * work.context
    time += c.pairs * work.pairs + c.backward * work.backward
    time += c.backward_start * (work.backward > 0) + c.training_start * (work.train_rows > 0)
    time += c.pairs_start * (work.pairs > 0)
    return time + c.train_row * work.train_rows + c.backward_layer * work.layers


def some_work(rng: random.Random) -> Work:
    work = Work(rng.randint(1, 128), context=rng.randint(0, 200_000))
    if rng.random() < 0.2:  # a prompt
        rows = rng.randint(64, 1024)
        work = replace(work, rows=work.rows + rows, pairs=rows * (rows + 1) // 2)
    if rng.random() < 0.6:
        work = work.with_window(rng.randint(0, 4000), rng.randint(1, 1024))
    if rng.random() < 0.5:
        work = work.with_backward(rng.randint(16, 1024), rng.randint(1, 32))
    return work


def planted_profile(n: int, *, noise: float = 0.0, seed: int = 0) -> list[Sample]:
    rng = random.Random(seed)
    works = [some_work(rng) for _ in range(n)]
    return [Sample(w, seconds(w) * (1 + noise * rng.uniform(-1, 1))) for w in works]


def longest_window(
    model: LatencyModel,
    work: Work,
    limit: int,
    budget: float,
    start: int = 0,
    minimum: int = 1,
) -> int:
    return model.largest(lambda n: work.with_window(start, n), limit, budget, minimum=minimum)


def most_layers(model: LatencyModel, work: Work, tokens: int, limit: int, budget: float) -> int:
    return model.largest(lambda n: work.with_backward(tokens, n), limit, budget)


def errors(model: LatencyModel, samples: list[Sample]) -> list[float]:
    """Relative errors of the predictions, the largest last."""
    return sorted(abs(model.predict(s.work) / s.seconds - 1) for s in samples)


@pytest.mark.skipif(not TABLE.exists(), reason="the staged profile is not here")
def test_staged_profile_gives_the_known_window_and_backward_at_75_ms() -> None:
    rows = list(csv.DictReader(TABLE.open()))
    for budget in ("128", "256", "512"):
        profile = []
        for row in rows:
            if row["max_tokens_per_batch"] != budget:
                continue
            work = Work(8)
            if size := int(row["ft_fwd_tokens"]):
                work = work.with_window(0, size)
            if layers := int(row["bwd_layers_of_1024_tokens"]):
                work = work.with_backward(1024, layers)
            profile.append(Sample(work, float(row["median_ms"]) / 1e3, float(row["n_steps"])))
        model = LatencyModel(profile)
        assert 56 <= longest_window(model, Work(8), 4096, 0.075) <= 120
        assert most_layers(model, Work(8), 1024, 80, 0.075) == 4
        # 53 + 5.24 n ms for n layers, and about 13 ms for having any training row.
        assert model.predict(Work(8).with_backward(1024, 64)) == pytest.approx(0.388, rel=0.03)
        found = model.coefficients()
        assert 0.010 < found.training_start + found.pairs_start < 0.015


@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 1e-3), (0.03, 0.05)])
def test_a_profile_gives_back_the_planted_coefficients(noise: float, tolerance: float) -> None:
    model = LatencyModel(planted_profile(600, noise=noise))
    found = model.coefficients()
    for name in ("flat", "per_row", "backward", "pairs"):
        assert getattr(found, name) == pytest.approx(getattr(PLANTED, name), rel=4 * tolerance)
    for sample in planted_profile(200, seed=1):
        assert model.predict(sample.work) == pytest.approx(sample.seconds, rel=tolerance)


def test_steps_alone_lead_from_a_start_that_is_far_off_to_the_planted_model() -> None:
    model = LatencyModel([Sample(s.work, s.seconds / 2) for s in planted_profile(24, seed=5)])
    for sample in planted_profile(3000):
        model.record(sample.work, sample.seconds)
    wrong = errors(model, planted_profile(300, seed=2))
    assert wrong[len(wrong) // 2] < 0.05
    assert wrong[int(0.95 * len(wrong))] < 0.2  # where the flat part ends


def test_cheap_steps_never_make_their_kind_look_dear() -> None:
    # The first units of backward outlast their guess a hundred times over; all later ones are fast.
    model = LatencyModel(planted_profile(8))
    unit = Work(0).with_backward(16, 1)
    model.record(Work(0).with_backward(1024, 8), 2.0)
    for _ in range(100):
        before = model.predict(unit)
        model.record(unit, before / 10)
        assert model.predict(unit) <= before * (1 + 1e-9)
    assert model.predict(unit) < 1e-3


def test_the_model_follows_a_machine_that_becomes_slower() -> None:
    model = LatencyModel(planted_profile(3001))
    for sample in planted_profile(15001, seed=3):
        model.record(sample.work, 1.5 * sample.seconds)
    wrong = errors(model, [Sample(s.work, 1.5 * s.seconds) for s in planted_profile(300, seed=4)])
    assert wrong[int(0.95 * len(wrong))] < 0.03
    assert wrong[-1] < 0.1  # where the flat part ends


def test_one_hiccup_hardly_moves_the_model() -> None:
    model = LatencyModel(planted_profile(3001))
    before = model.predict(Work(32))
    model.record(Work(32), 100 * before)
    assert model.predict(Work(32)) < 1.1 * before


def test_a_steady_load_does_not_make_the_rest_forgotten() -> None:
    profile = planted_profile(3001)
    model = LatencyModel(profile)
    rng = random.Random(0)
    steady = Work(32, context=20_000)
    for _ in range(20_000):
        model.record(steady, seconds(steady) * rng.uniform(0.99, 1.01))
    for sample in profile:
        assert model.predict(sample.work) == pytest.approx(seconds(sample.work), rel=0.1)


def test_the_safety_factor_is_a_quantile_of_what_groups_of_steps_really_took() -> None:
    model = LatencyModel(planted_profile(300))
    assert model.safety == pytest.approx(1.0, abs=1e-4)
    window = longest_window(model, Work(8), 4096, 0.02)
    rng = random.Random(0)
    for _ in range(256):  # all of them take longer, more or less
        work = some_work(rng)
        model.record(work, seconds(work) * rng.uniform(1.0, 1.4))
    assert 1.02 < model.safety < 1.3
    assert longest_window(model, Work(8), 4096, 0.02) < window


def test_what_scatters_among_short_steps_makes_long_ones_no_shorter() -> None:
    short, long = Work(1, context=100), Work(512, context=200_000, train_rows=480)
    model = LatencyModel(planted_profile(300))
    rng = random.Random(0)
    for _ in range(400):
        model.record(short, seconds(short) * rng.uniform(0.5, 1.5))
        model.record(long, seconds(long))
    assert seconds(short) < 0.3 * seconds(long)
    assert model.safety < 1.1


def test_a_profile_of_small_batches_does_not_promise_large_ones_for_nothing() -> None:
    model = LatencyModel([Sample(Work(n), 0.004) for n in (1, 8, 32)])
    assert model.predict(Work(32)) == pytest.approx(0.004, rel=0.01)
    assert model.predict(Work(320)) == pytest.approx(0.04, rel=0.02)


def test_ranges_of_rows_are_learnt_apart_and_the_prediction_rises_over_their_borders() -> None:
    graphed = [Sample(Work(n), 0.002) for n in (1, 16, 64)]
    eager = [Sample(Work(n), 0.010 + 1e-5 * n) for n in (65, 128, 512, 1024)]
    model = LatencyModel(graphed + eager, edges=[64])
    assert model.predict(Work(64)) == pytest.approx(0.002, rel=0.02)
    assert model.predict(Work(65)) == pytest.approx(0.0107, rel=0.05)
    for _ in range(2000):
        model.record(Work(32), 0.030)
    assert model.predict(Work(32)) == pytest.approx(0.030, rel=0.05)
    assert model.predict(Work(65)) >= model.predict(Work(64)) > 0.025


def test_profiles_without_sense_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="profile"):
        LatencyModel([])
    for bad in (Sample(Work(1), 0.0), Sample(Work(1), float("nan")), Sample(Work(1), 1.0, 0.0)):
        with pytest.raises(InvalidRequest, match="profile"):
            LatencyModel([bad])


def test_latency_imports_without_torch() -> None:
    code = "import sys, invivo.engine.latency; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- properties -----------------------------------------------------------------------------------
times = st.floats(1e-4, 1.0)
works = st.builds(
    lambda rows, context, start, size, tokens, layers: Work(rows, context=context)
    .with_window(start, size)
    .with_backward(tokens, layers),
    st.integers(1, 600), st.integers(0, 10**6), st.integers(0, 5000), st.integers(0, 600),
    st.integers(0, 1024), st.integers(0, 32),
)  # fmt: skip
profiles = st.lists(st.builds(Sample, works, times), min_size=1, max_size=12)


@st.composite
def models(draw: st.DrawFn) -> LatencyModel:
    """Any profile, any borders, any steps afterwards."""
    model = LatencyModel(
        draw(profiles), edges=draw(st.lists(st.integers(1, 600), max_size=3, unique=True))
    )
    for work, time in draw(st.lists(st.tuples(works, times), max_size=40)):
        model.record(work, time)
    return model


@settings(max_examples=60, deadline=None)
@given(model=models(), work=works, start=st.integers(0, 4000), budget=times)
def test_the_inverse_equals_brute_force(
    model: LatencyModel, work: Work, start: int, budget: float
) -> None:
    def fits(grown: Work) -> bool:
        return model.predict(grown) * model.safety <= budget

    windows = [s for s in range(1, 201) if fits(work.with_window(start, s))]
    assert longest_window(model, work, 200, budget, start) == max(windows, default=0)
    layers = [n for n in range(1, 33) if fits(work.with_backward(256, n))]
    assert most_layers(model, work, 256, 32, budget) == max(layers, default=0)


@settings(max_examples=60, deadline=None)
@given(model=models(), work=works, more=works, budget=times, minimum=st.integers(1, 64))
def test_more_inference_never_leaves_more_room_for_training(
    model: LatencyModel, work: Work, more: Work, budget: float, minimum: int
) -> None:
    larger = Work(
        work.rows + more.rows,
        work.train_rows + more.train_rows,
        work.context + more.context,
        work.pairs + more.pairs,
        work.backward + more.backward,
        work.layers + more.layers,
    )
    assert model.predict(larger) >= model.predict(work) * (1 - 1e-12)
    size = longest_window(model, work, 500, budget, minimum=minimum)
    assert longest_window(model, larger, 500, budget, minimum=minimum) <= size
    assert size == 0 or size >= minimum
    if size:
        assert model.predict(work.with_window(0, size)) * model.safety <= budget * (1 + 1e-12)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_planted_models_are_recovered_from_noisy_steps(seed: int) -> None:
    rng = random.Random(seed)
    flat = rng.uniform(2e-3, 5e-2)
    planted = Coefficients(
        flat=flat,
        base=flat * rng.uniform(0.1, 0.8),
        per_row=flat * rng.uniform(1e-3, 1e-2),
        context=flat * rng.uniform(1e-7, 1e-6),
        pairs=flat * rng.uniform(1e-8, 1e-7),
        backward_start=flat * rng.uniform(0.0, 0.3),
        backward=flat * rng.uniform(1e-5, 1e-4),
        training_start=flat * rng.uniform(0.0, 0.3),
        train_row=flat * rng.uniform(0.0, 5e-3),
        backward_layer=flat * rng.uniform(0.0, 1e-2),
    )
    seen = [some_work(rng) for _ in range(400)]
    profile = [Sample(w, seconds(w, planted) * rng.uniform(0.98, 1.02)) for w in seen]
    model = LatencyModel(profile)
    assume(len({s.work.rows for s in profile}) > 100)
    for work in (some_work(rng) for _ in range(100)):
        assert model.predict(work) == pytest.approx(seconds(work, planted), rel=0.04)
