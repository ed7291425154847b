"""The end of an optimizer step is planned: it waits for slack, and never for ever."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.engine.drive import ask, small_engine
from tests.engine.test_coserve import MACHINE, Bench, trained_of
from tests.engine.test_coserve import run as carry_out
from tests.engine.test_finetune import LORA, UNHURRIED, drive, plain_loop, start, texts
from tests.tiny import tiny_loaded

from invivo.engine.closings import Closing, ClosingTimes
from invivo.engine.coserve import Coserver, work_of
from invivo.engine.job_spec import JobSpec
from invivo.engine.policies import Slo


def test_a_part_is_expected_to_take_nearly_what_it_took_at_most() -> None:
    times = ClosingTimes()
    both = Closing("j", ("optimizer", "snapshot"), 0.0)
    assert times.seconds(both) == 0.0
    times.record("j", "optimizer", 0.010)
    times.record("j", "snapshot", 0.030)
    times.record("other", "optimizer", 9.0)
    assert times.seconds(both) == pytest.approx(0.040)
    times.record("j", "optimizer", 0.002)
    assert 0.036 < times.seconds(both) < 0.040  # forgets slowly
    times.record("j", "optimizer", 5.0)
    assert times.seconds(both) < 0.080  # one hiccup does not stop training
    times.forget("j")
    assert times.seconds(both) == 0.0
    assert times.seconds(Closing("other", ("optimizer",), 0.0)) == 9.0


def ends_of_steps(seconds: float, *, tpot_ms: float, steps: int = 300) -> tuple[Bench, list[float]]:
    """A bench with one request, whose every text ends an optimizer step that takes ``seconds``;
    the gaps between the request's tokens."""
    bench = Bench(slo=Slo(tpot_ms=tpot_ms, headroom=0, ttft_ms=1000))
    job = bench.job(length=256)
    for part in ("optimizer", "snapshot"):
        bench.coserver.closings.record("j", part, seconds / 2)
    seq = bench.ask(8, 1500)
    waits: Closing | None = None
    text, gaps, last = job.seq, [], None
    for _ in range(steps):
        if job.seq is not text:
            text, waits = job.seq, Closing("j", ("optimizer", "snapshot"), bench.now)
        given = [] if waits else bench.jobs
        plan = bench.coserver.plan(bench.now, given, closings=[waits] if waits else [])
        assert plan is not None
        if plan.closing:
            assert plan.closing == ["j"]
            assert not trained_of(plan)
            bench.now += seconds
            waits = None
        bench.now += MACHINE.predict(work_of(plan))
        carry_out(plan, bench.scheduler, bench.jobs)
        bench.coserver.folded(plan, bench.now)
        if any(span.seq is seq and span.samples for span in plan.spans):
            if last is not None:
                gaps.append(bench.now - last)
            last = bench.now
    return bench, gaps


@pytest.mark.parametrize("seconds", [0.0, 0.002, 0.007])
def test_an_end_that_fits_breaks_no_promise(seconds: float) -> None:
    bench, gaps = ends_of_steps(seconds, tpot_ms=12)
    assert bench.jobs[0].texts > 20
    assert max(gaps) <= 12e-3 + 1e-9


def test_an_end_that_outlasts_every_slack_waits_its_patience_and_no_longer() -> None:
    bench, gaps = ends_of_steps(0.050, tpot_ms=12)
    late = [gap for gap in gaps if gap > 12e-3 + 1e-9]
    assert 1 <= len(late) < bench.jobs[0].texts
    assert max(late) <= 0.050 + 12e-3
    # A quarter of the TTFT passes before each.
    assert len(late) <= bench.now / 0.25


def test_what_ends_a_step_leaves_less_to_others() -> None:
    bench = Bench(slo=Slo(tpot_ms=12, headroom=0))
    bench.job("other", length=2000)
    bench.ask(8, 500)
    for _ in range(3):
        bench.step()
    bench.coserver.closings.record("j", "optimizer", 0.004)
    closing = Closing("j", ("optimizer",), bench.now)
    plan = bench.coserver.plan(bench.now, bench.jobs, closings=[closing])
    assert plan is not None
    assert plan.closing == ["j"]
    assert MACHINE.predict(work_of(plan)) + 0.004 <= 12e-3


@pytest.mark.parametrize("order", ["pause", "none"])
def test_steps_that_wait_for_their_end_are_those_of_the_plain_loop(
    tmp_path: Path, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_loaded(tmp_path, dtype=torch.float64)
    spec = JobSpec("j", LORA, 5, 0.01, gradient_accumulation=2, publish_every=2, checkpoint_every=2)
    expected, _ = plain_loop(model, spec, texts(), torch.optim.AdamW)
    engine = small_engine(model, max_batch_tokens=32, max_running=8, **UNHURRIED)
    asked = ask(engine, [5, 6, 7], max_tokens=200, ignore_eos=True)
    job = start(engine, spec, texts(), tmp_path / "checkpoints")
    handle = job.handle
    assert handle is not None
    inner = handle._job
    # However short it is, it waits for a plan.
    monkeypatch.setattr(Coserver, "closes_at_once", lambda *_: False)
    drive(engine, until=lambda: inner.closing is not None)
    assert not asked.done  # so the end waited for a plan
    assert handle.step == len(job.of("step"))
    if order == "pause":
        handle.pause()
        drive(engine, until=lambda: handle.state == "paused")
        assert inner.closing is not None
        handle.resume()
    drive(engine, job)
    drive(engine, until=lambda: asked.done)
    assert handle.losses == pytest.approx(expected, abs=1e-9)
    assert [event["version"] for event in job.of("published")] == [1, 2, 3]
    coserver = engine._finetuning._coserver
    assert coserver is not None
    assert coserver.closings.seconds(Closing("j", ("optimizer",), 0.0)) == 0.0  # it has ended
