"""What joins an iteration beside inference: sizes, turns, promises, victims."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.fake_engine import request_of, sequences_of

from invivo.engine.coserve import Coserver, Sizes, work_of
from invivo.engine.latency import LatencyModel, Sample, Work
from invivo.engine.policies import Load, Slo, Temporal, policy_of
from invivo.engine.scheduler import Limits, Scheduler
from invivo.engine.simulate import SimulatedJob, Training
from invivo.engine.types import Plan, Purpose, Sequence, Status
from invivo.errors import InvalidRequest

LAYERS = 8


def seconds_of(work: Work, start: float = 5e-4) -> float:
    """A machine: 4 ms flat to 130 rows, ``start`` for any training, 2 us a token-layer backward."""
    time = max(4e-3, 1e-3 + 2.3e-5 * work.rows) if work.rows else 0.0
    return (
        time
        + 1e-8 * work.context
        + start * (work.train_rows > 0)
        + (start + 2e-6 * work.backward) * (work.backward > 0)
    )


def machine(start: float = 5e-4) -> LatencyModel:
    works = [Work(rows, context=keys) for rows in (1, 8, 64, 256, 512) for keys in (0, 100_000)]
    works += [Work(8).with_window(0, n) for n in (8, 64, 256, 512)]
    works += [Work(8).with_backward(256, n) for n in (1, 4, 8)]
    return LatencyModel([Sample(work, seconds_of(work, start)) for work in works])


MACHINE = machine()
DEAR = machine(4e-3)  # whose training takes as long to begin as a step of decodes


def limits_of(**changes) -> Limits:
    sizes = {
        "n_blocks": 400,
        "block_size": 16,
        "max_batch_tokens": 512,
        "max_running": 32,
        "max_length": 2048,
        "max_training": 4,
        "prefix_cache": False,
    }
    return Limits(**(sizes | changes))


@dataclass
class Bench:
    """A coserver on a clock of its own; every plan takes what the model predicts."""

    limits: Limits = field(default_factory=limits_of)
    policy: str = "co-serve"
    slo: Slo = field(default_factory=Slo)
    sizes: Sizes = field(default_factory=Sizes)
    jobs: list[SimulatedJob] = field(default_factory=list)
    now: float = 0.0
    machine: LatencyModel = MACHINE

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.limits)
        self.coserver = Coserver(
            self.scheduler, self.machine, self.slo, policy_of(self.policy), sizes=self.sizes
        )

    def job(self, name: str = "j", *, share: float = 1.0, length: int = 1024, cuts: bool = True):
        self.jobs.append(SimulatedJob(name, share, Training(length, LAYERS, cuts_layers=cuts)))
        return self.jobs[-1]

    def fill(self, plan: Plan, work: Work, budget: float) -> Work:
        """What the first job gets beside ``work``."""
        (first, *_) = self.coserver._in_turn(self.jobs)
        return self.coserver._add(plan, work, first, budget)

    def ask(self, prompt: int, output: int, name: str = "r") -> Sequence:
        request = request_of(name, [0] * prompt, max_tokens=output, arrival=self.now)
        (seq,) = sequences_of(request)
        self.scheduler.add(seq)
        return seq

    def step(self) -> Plan | None:
        plan = self.coserver.plan(self.now, self.jobs)
        if plan is not None:
            self.now += self.machine.predict(work_of(plan))
            run(plan, self.scheduler, self.jobs)
            self.coserver.folded(plan, self.now)
        return plan


def run(plan: Plan, scheduler: Scheduler, jobs: list[SimulatedJob]) -> None:
    for span in plan.spans:
        if span.samples:
            scheduler.record(span.seq, 0)
            if len(span.seq.tokens) == span.seq.limit:
                scheduler.finish(span.seq)
    for job in jobs:
        if job.seq in plan.held or job.seq in plan.reclaimed:
            job.begin()
    for unit in plan.backward:
        job = next(job for job in jobs if job.name == unit.job)
        assert job.seq.n_computed == len(job.seq.tokens)
        assert job.seq.blocks
        job.run(unit)
        if job.row == 0:
            scheduler.let_go(job.seq)
            job.next_text()


def inference_of(plan: Plan | None) -> list[tuple]:
    spans = [] if plan is None else plan.spans
    return [
        (s.seq.request.id, s.start, s.stop, s.purpose, s.samples)
        for s in spans
        if s.purpose is not Purpose.TRAIN
    ]


def trained_of(plan: Plan | None) -> list[tuple[int, int]]:
    spans = [] if plan is None else plan.spans
    return [(s.start, s.stop) for s in spans if s.purpose is Purpose.TRAIN]


@given(
    rows=st.integers(1, 300),
    context=st.integers(0, 200_000),
    start=st.integers(0, 900),
    milliseconds=st.floats(0, 40),
)
@settings(max_examples=60, deadline=None)
def test_a_window_is_the_largest_that_fits_by_prediction(
    rows: int, context: int, start: int, milliseconds: float
) -> None:
    bench = Bench()
    job = bench.job()
    assert bench.scheduler.hold(job.seq, Plan([]))
    job.seq.n_computed = start
    work, budget = Work(rows, context=context), milliseconds / 1e3
    plan = Plan([], n_tokens=rows)
    after = bench.fill(plan, work, budget)
    room = min(1024 - start, 512 - rows)
    fits = [
        n
        for n in range(bench.sizes.min_window, room + 1)
        if MACHINE.predict(work.with_window(start, n)) * MACHINE.safety <= budget
    ]
    assert trained_of(plan) == ([(start, start + max(fits))] if fits else [])
    assert plan.n_tokens <= 512
    if fits and start + max(fits) < 1024:
        assert after == work.with_window(start, max(fits))


@given(rows=st.integers(1, 300), milliseconds=st.floats(0, 60), cuts=st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_unit_is_the_largest_that_fits_by_prediction(
    rows: int, milliseconds: float, cuts: bool
) -> None:
    bench = Bench()
    job = bench.job(cuts=cuts)
    assert bench.scheduler.hold(job.seq, Plan([]))
    job.seq.n_computed = 1024
    work, budget = Work(rows), milliseconds / 1e3

    def fits(tokens: int, layers: int) -> bool:
        predicted = MACHINE.predict(work.with_backward(tokens, layers))
        return predicted * MACHINE.safety <= budget

    plan = Plan([], n_tokens=rows)
    bench.fill(plan, work, budget)
    given = [(u.start, u.stop, u.first_layer, u.last_layer) for u in plan.backward]
    least = bench.sizes.min_window
    wide = [n for n in range(least, 1025) if fits(n, 1 if cuts else LAYERS)]
    deep = [n for n in range(1, LAYERS + 1) if fits(1024, n)]
    if deep and cuts:
        assert given == [(0, 1024, LAYERS - max(deep), LAYERS)]
    elif wide:
        assert given == [(1024 - max(wide), 1024, LAYERS - 1 if cuts else 0, LAYERS)]
    else:
        assert given == []


def test_a_unit_that_stopped_between_layers_goes_on_with_its_rows() -> None:
    bench = Bench()
    job = bench.job()
    assert bench.scheduler.hold(job.seq, Plan([]))
    job.seq.n_computed = 1024
    seen = []
    while job.texts == 1:
        plan = Plan([])
        bench.fill(plan, Work(8), 0.0065)
        assert len(plan.backward) == 1
        seen += plan.backward
        run(plan, bench.scheduler, bench.jobs)
    done = [(u.start, u.stop, layer) for u in seen for layer in range(u.first_layer, u.last_layer)]
    covered = {(row, layer) for start, stop, layer in done for row in range(start, stop)}
    assert len(covered) == sum(stop - start for start, stop, _ in done) == 1024 * LAYERS
    assert any(u.first_layer > 0 for u in seen)


def test_training_shrinks_as_requests_come() -> None:
    sizes = []
    for n in (1, 8, 31):
        bench = Bench(slo=Slo(tpot_ms=12))
        bench.job(length=2048)
        for i in range(n):
            bench.ask(8, 50, f"r{i}")
        bench.step()
        plan = bench.step()
        ((start, stop),) = trained_of(plan)
        sizes.append(stop - start)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1] > 0


def test_without_inference_windows_are_full_and_an_iteration_lasts_a_quantum() -> None:
    bench = Bench()
    bench.job()
    assert trained_of(bench.step()) == [(0, 512)]
    plan = bench.step()
    assert trained_of(plan) == [(512, 1024)]
    assert [(u.start, u.stop, u.first_layer) for u in plan.backward] == [(0, 1024, 0)]
    short = Bench(sizes=Sizes(quantum_ms=6))
    short.job()
    for _ in range(20):
        plan = short.step()
        assert MACHINE.predict(work_of(plan)) * MACHINE.safety <= 6e-3


def test_training_goes_on_where_its_smallest_piece_outlasts_the_quantum() -> None:
    bench = Bench(sizes=Sizes(quantum_ms=0.01))
    job = bench.job(length=64)
    for _ in range(200):
        plan = bench.step()
        assert work_of(plan).rows <= 16
    assert job.texts > 2
    bench.ask(4, 10)
    assert inference_of(bench.step())


@given(seed=st.integers(0, 10_000), tpot=st.sampled_from([6.0, 10.0, 50.0]))
@settings(max_examples=25, deadline=None)
def test_the_prediction_never_passes_what_was_promised(seed: int, tpot: float) -> None:
    rng = random.Random(seed)
    bench = Bench(slo=Slo(tpot_ms=tpot))
    bench.job(length=512)
    due: dict[Sequence, float] = {}
    for i in range(150):
        if rng.random() < 0.1:
            bench.ask(rng.randint(1, 300), rng.randint(1, 40), f"r{i}")
        start = bench.now
        plan = bench.step()
        if plan is None:
            continue
        if trained_of(plan) or plan.backward:
            safe = start + MACHINE.predict(work_of(plan)) * MACHINE.safety
            running = [s for s in due if s.status is not Status.FINISHED]
            assert all(safe <= due[s] + 1e-9 for s in running)
        for span in plan.spans:
            if span.samples:
                due[span.seq] = bench.now + tpot / 1e3


@given(
    seed=st.integers(0, 10_000),
    blocks=st.sampled_from([45, 80, 400]),
    tpot=st.sampled_from([8.0, 50.0]),
)
@settings(max_examples=40, deadline=None)
def test_inference_is_planned_as_if_there_were_no_training(
    seed: int, blocks: int, tpot: float
) -> None:
    """Step for step the same spans, preemptions and rows, however scarce memory is; between two
    steps the rest of a text may run alone."""
    rng = random.Random(seed)
    limits = limits_of(n_blocks=blocks, max_running=8, max_batch_tokens=128, max_length=640)
    bench = Bench(limits=limits, slo=Slo(tpot_ms=tpot))
    for i in range(rng.randint(1, 3)):
        bench.job(f"j{i}", length=rng.choice([64, 200, 500]))
    alone = Scheduler(limits)
    reclaimed = 0
    for i in range(120):
        if rng.random() < 0.2:
            prompt, output = rng.randint(1, 250), rng.randint(1, 120)
            seq = bench.ask(prompt, output, f"r{i}")
            (twin,) = sequences_of(seq.request)
            alone.add(twin)
        held_before = list(bench.scheduler.training)
        paces = bench.coserver._paces
        last = [paces[seq].last for seq in bench.scheduler.running if seq in paces]
        plan = bench.step()
        if plan is not None and not plan.spans and bench.scheduler.running:
            assert bench.now <= min(last, default=bench.now) + tpot / 1e3
            continue
        undisturbed = alone.schedule(0.0)
        assert inference_of(plan) == inference_of(undisturbed)
        for span in undisturbed.spans if undisturbed else ():
            if span.samples:
                alone.record(span.seq, 0)
                if len(span.seq.tokens) == span.seq.limit:
                    alone.finish(span.seq)
        if plan is None:
            continue
        lost = plan.reclaimed
        reclaimed += len(lost)
        assert lost == held_before[::-1][: len(lost)], "the newest is the first victim"
        if plan.preempted:
            assert lost == held_before[::-1], "a request lost memory while training held some"
        assert plan.n_tokens <= 128
        assert plan.n_tokens == sum(s.stop - s.start for s in plan.spans)
        held = [b for s in bench.scheduler.training for b in s.blocks]
        used = held + [b for s in bench.scheduler.running for b in s.blocks]
        assert len(set(used)) == len(used) == bench.scheduler.blocks_used
    assert bench.scheduler.n_reclaimed == reclaimed
    assert bench.scheduler.n_preemptions == alone.n_preemptions


def test_a_victim_begins_anew_when_there_is_room_again() -> None:
    bench = Bench(limits=limits_of(n_blocks=40, max_running=4, max_batch_tokens=128))
    job = bench.job(length=400)
    bench.step()
    assert job.seq.n_computed == 128
    request = bench.ask(300, 20)
    plan = bench.step()
    assert plan.reclaimed == [job.seq]
    assert (job.seq.n_computed, job.seq.blocks, job.seq.row) == (0, [], -1)
    while request.status is not Status.FINISHED:
        plan = bench.step()
        assert not plan.held
    plan = bench.step()
    assert plan.held == [job.seq]
    assert trained_of(plan) == [(0, 128)]
    assert job.seq.row >= 4


def test_a_text_that_can_never_fit_is_refused() -> None:
    bench = Bench(limits=limits_of(n_blocks=20))
    bench.job(length=1000)
    with pytest.raises(InvalidRequest, match="at most") as error:
        bench.step()
    assert error.value.field == "max_length"


def test_tokens_are_shared_by_weight() -> None:
    bench = Bench()
    for name, share in (("a", 1.0), ("b", 3.0)):
        bench.job(name, share=share, length=512)
    bench.ask(100, 1900)
    for _ in range(400):
        bench.step()
    served = bench.coserver.served
    assert served["b"] / served["a"] == pytest.approx(3.0, rel=0.15)


def test_a_job_that_comes_late_does_not_catch_up() -> None:
    bench = Bench()
    bench.job("old", length=512)
    for _ in range(100):
        bench.step()
    before = bench.coserver.served["old"]
    bench.job("new", length=512)
    for _ in range(100):
        bench.step()
    gained = bench.coserver.served["old"] - before
    assert gained > 0.4 * (bench.coserver.served["new"] - before)


def test_a_token_in_flight_counts_from_the_end_of_its_step() -> None:
    bench = Bench(slo=Slo(tpot_ms=20, headroom=0))
    bench.ask(4, 50)
    first = bench.coserver.plan(0.0, [])
    assert first is not None
    second = bench.scheduler.schedule(0.0)
    assert second is not None
    # The first step ends at 1 s; from then on the second may last one promise.
    assert bench.coserver.budget(second, work_of(second), 1.0) == pytest.approx(0.020)


def test_nothing_trains_while_a_request_waits_too_long_for_a_row() -> None:
    bench = Bench(limits=limits_of(max_running=1), slo=Slo(ttft_ms=1000))
    bench.job()
    bench.ask(8, 400, "first")
    bench.ask(8, 400, "second")
    waited, trained = [], []
    for _ in range(60):
        waited.append(bench.now)
        plan = bench.step()
        trained.append(bool(trained_of(plan) or plan.backward))
    assert all(trained[i] for i in range(1, 60) if waited[i] <= 0.25)
    assert not any(trained[i] for i in range(60) if waited[i] > 0.25)
    assert waited[-1] > 0.25


def test_temporal_gives_a_whole_training_iteration_after_every_n() -> None:
    bench = Bench(policy="temporal:5")
    bench.job(length=600)
    bench.ask(8, 500)
    kinds = ""
    for _ in range(40):
        plan = bench.step()
        trains = bool(trained_of(plan) or plan.backward)
        assert trains != bool(inference_of(plan))
        kinds += "t" if trains else "i"
    # A window, then another and the backward behind it.
    assert kinds == ("iiiiitt" * 6)[:40]


def test_alternating_policies_train_at_once_without_inference() -> None:
    for policy in ("temporal:500", "dynamic-temporal"):
        bench = Bench(policy=policy)
        job = bench.job(length=600)
        for _ in range(6):
            bench.step()
        assert job.texts == 4


def test_dynamic_temporal_waits_for_what_a_turn_costs_and_for_the_queue() -> None:
    policy, slo = policy_of("dynamic-temporal"), Slo(tpot_ms=50, headroom=0)
    assert not policy.yields(Load(0, 9, iteration=0.010, training=0.4), slo)
    assert policy.yields(Load(0, 10, iteration=0.010, training=0.4), slo)
    assert not policy.yields(Load(1, 10, iteration=0.010, training=0.4), slo)
    assert not policy.yields(Load(0, 99999, iteration=0.060, training=0.4), slo)


def test_no_training_without_a_policy_for_it() -> None:
    bench = Bench(policy="none")
    bench.job()
    assert bench.step() is None
    bench.ask(8, 5)
    assert inference_of(bench.step())


def test_policies_have_names() -> None:
    for text in ("co-serve", "dynamic-temporal", "none", "temporal:64", "spatial:1.5"):
        assert policy_of(text).name == text
    assert policy_of("separate").name == "separate:0.75"
    assert policy_of("temporal:7") == Temporal(7)
    for text in ("temporal", "temporal:0", "temporal:x", "spatial:1", "separate:2", "fast", ""):
        with pytest.raises(InvalidRequest, match="no such policy"):
            policy_of(text)


def test_what_only_the_simulator_knows_is_refused_here() -> None:
    for text in ("spatial", "separate"):
        with pytest.raises(InvalidRequest, match="simulator only"):
            Bench(policy=text)


@pytest.mark.parametrize(
    ("field", "value"),
    [("tpot_ms", 0), ("ttft_ms", -1), ("headroom", 1.0), ("burst", 0.5), ("patience", 2)],
)
def test_promises_that_make_no_sense_are_refused(field: str, value: float) -> None:
    with pytest.raises(InvalidRequest) as error:
        Slo(**{field: value})
    assert error.value.field == field


def test_a_burst_gathers_the_slack_of_large_pieces_and_keeps_the_mean_pace() -> None:
    pieces: dict[float, list[int]] = {}
    for burst in (1.0, 4.0):
        bench = Bench(
            limits_of(max_batch_tokens=2048),
            slo=Slo(tpot_ms=12, burst=burst),
            sizes=Sizes(quantum_ms=12 * burst),
            machine=DEAR,
        )
        bench.job(length=2048)
        seq = bench.ask(8, 200)
        begun = bench.now
        pieces[burst] = []
        while len(seq.tokens) < 150:
            before, running = bench.now, len(seq.tokens) > seq.n_prompt
            plan = bench.step()
            assert plan is not None
            assert bench.now - before <= burst * 12e-3
            n = len(seq.tokens) - seq.n_prompt
            if not running:
                begun = bench.now
                continue
            assert bench.now - begun <= n * 12e-3
            pieces[burst] += [stop - start for start, stop in trained_of(plan)]
    assert max(pieces[4.0]) > 1.5 * max(pieces[1.0])
    assert sum(pieces[4.0]) > 0.8 * sum(pieces[1.0])


def test_a_burst_does_not_starve_training_beside_answers_that_never_gather_slack() -> None:
    tokens = {}
    for burst in (1.0, 4.0):
        bench = Bench(
            slo=Slo(tpot_ms=12, burst=burst),
            sizes=Sizes(quantum_ms=12 * burst),
            machine=machine(2e-3),
        )
        job = bench.job(length=256)
        without = longest = 0
        for i in range(200):  # clients whose next short question follows each answer
            bench.ask(4, 2, f"r{i}")
            plan = bench.step()
            trains = bool(trained_of(plan) or (plan is not None and plan.backward))
            without = 0 if trains else without + 1
            longest = max(longest, without)
        tokens[burst] = 256 * job.texts / bench.now
        assert longest <= burst + 1
    assert tokens[4.0] > 0.1 * tokens[1.0] > 0


def test_a_spoiled_prediction_is_found_out_by_a_small_piece() -> None:
    """Iterations that took a second have taught the model that no training ever fits."""
    bench = Bench(slo=Slo(tpot_ms=12), sizes=Sizes(quantum_ms=12))
    latency = machine()
    bench.coserver.latency = latency
    job = bench.job(length=256)
    bench.ask(8, 1900)
    for _ in range(40):
        latency.record(Work(9).with_window(0, 8), 1.0)
        latency.record(Work(1).with_backward(256, 1), 1.0)
    trained = 0
    for i in range(600):
        plan = bench.step()
        assert plan is not None
        if trained_of(plan) or plan.backward:
            trained += 1
            assert i >= 50, "the prediction was not spoiled"
        latency.record(work_of(plan), MACHINE.predict(work_of(plan)))
    assert trained > 200
    assert job.texts > 1


def test_prompts_join_iterations_that_train_and_wait_no_longer_than_a_burst() -> None:
    """While slack is gathered, iterations are of decodes alone."""
    bench = Bench(
        limits_of(max_batch_tokens=2048, n_blocks=4000),
        slo=Slo(tpot_ms=12, burst=4.0),
        sizes=Sizes(quantum_ms=48),
        machine=DEAR,
    )
    bench.job(length=2048)
    for i in range(4):
        bench.ask(8, 600, f"long-{i}")
    alone = beside = 0
    for i in range(400):
        if i % 3 == 0:
            bench.ask(40, 2, f"short-{i}")
        waited = max((bench.now - s.request.arrival for s in bench.scheduler.waiting), default=0.0)
        assert waited <= 4 * 12e-3 + 48e-3  # an iteration may be under way when a prompt is due
        plan = bench.step()
        assert plan is not None
        if any(span.purpose is Purpose.PREFILL for span in plan.spans):
            trains = bool(trained_of(plan) or plan.backward)
            beside, alone = beside + trains, alone + (not trains)
    assert beside > 4 * alone
    assert beside > 50


def test_nothing_is_gathered_where_training_is_cheap_to_begin() -> None:
    """Every iteration trains there."""
    trained: dict[bool, float] = {}
    for is_cheap in (True, False):
        bench = Bench(
            limits_of(max_batch_tokens=2048, n_blocks=4000),
            slo=Slo(tpot_ms=12, burst=4.0),
            sizes=Sizes(quantum_ms=48),
            machine=MACHINE if is_cheap else DEAR,
        )
        bench.job(length=2048)
        bench.ask(8, 600, "long")
        without = 0
        for i in range(300):
            if i % 3 == 0:
                bench.ask(40, 2, f"short-{i}")
            plan = bench.step()
            assert plan is not None
            without += not (trained_of(plan) or plan.backward)
        trained[is_cheap] = 1 - without / 300
    assert trained[True] > 0.95
    assert trained[False] < 0.8


def test_the_headroom_settles_where_few_requests_are_late() -> None:
    """One iteration in twenty takes three times as long: one answer in fifteen is late at first."""

    def late_of(follows: bool) -> tuple[float, float]:
        rng = random.Random(1)
        bench = Bench(slo=Slo(tpot_ms=12, burst=2.5), sizes=Sizes(quantum_ms=30))
        bench.job(length=2048)
        late: list[bool] = []
        seq, first, last = bench.ask(8, 12), 0.0, 0.0
        while len(late) < 400:
            plan = bench.coserver.plan(bench.now, bench.jobs)
            assert plan is not None
            hiccup = 3 if rng.random() < 0.05 else 1
            bench.now += MACHINE.predict(work_of(plan)) * rng.uniform(0.7, 1.3) * hiccup
            run(plan, bench.scheduler, bench.jobs)
            if not follows:
                bench.coserver.headroom = bench.slo.headroom
            bench.coserver.folded(plan, bench.now)
            if any(span.seq is seq for span in plan.spans):
                first, last = first or bench.now, bench.now
                if seq.status is Status.FINISHED:
                    late.append((last - first) / 11 > 12e-3)
                    seq, first = bench.ask(8, 12), 0.0
        return sum(late[100:]) / 300, bench.coserver.headroom

    fixed, _ = late_of(follows=False)
    followed, headroom = late_of(follows=True)
    assert fixed > 0.05
    assert followed < 0.03
    assert 0.1 < headroom < 0.4


def test_the_headroom_of_a_cold_start_is_given_back_within_some_hundred_requests() -> None:
    bench = Bench(slo=Slo(tpot_ms=12))
    coserver = bench.coserver

    def answer(seconds_a_token: float) -> None:
        seq = bench.ask(8, 3)
        while seq.status is not Status.FINISHED:
            plan = coserver.plan(bench.now, [])
            assert plan is not None
            bench.now += seconds_a_token
            run(plan, bench.scheduler, bench.jobs)
            coserver.folded(plan, bench.now)

    for _ in range(20):
        answer(0.1)
    assert coserver.headroom == pytest.approx(0.4)
    for _ in range(700):
        answer(0.01)
    assert coserver.headroom == coserver.slo.headroom
    answer(0.1)
    assert coserver.headroom > coserver.slo.headroom
    coserver.forget_lateness()
    assert coserver.headroom == coserver.slo.headroom


def test_without_training_nobody_waits_for_it() -> None:
    bench = Bench(slo=Slo(tpot_ms=12, burst=4.0), sizes=Sizes(quantum_ms=48))
    bench.ask(8, 100, "long")
    for i in range(20):
        seq = bench.ask(8, 2, f"r{i}")
        bench.step()
        assert seq.n_computed == 8
