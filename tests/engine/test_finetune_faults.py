"""Jobs through kill -9, full disks, poisoned weights, cancellations and clients that go."""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import sys
import time
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.engine import finetune_worker
from tests.engine.drive import ask, settle, small_engine
from tests.engine.finetune_worker import SPEC, Texts
from tests.engine.test_finetune import (
    LORA,
    UNHURRIED,
    Listed,
    drive,
    nothing_is_held,
    plain_loop,
    random_requests,
    start,
    text_of,
    texts,
    trained,
)
from tests.tiny import tiny_loaded, tiny_model_folder
from tests.waiting import PATIENCE

from invivo.engine import checkpoint
from invivo.engine.bypasses import BypassSpec, checked_specs
from invivo.engine.checkpoint import checkpoints
from invivo.engine.coserve import Sizes
from invivo.engine.job_spec import JobSpec, Text
from invivo.models.load import LoadedModel

KINDS = {
    "lora": BypassSpec("lora", ("q", "k", "v", "o", "gate", "up", "down"), 4, alpha=8.0),
    "ia3": BypassSpec("ia3"),
    "adapter": BypassSpec("adapter", (), 4),
    "prefix": BypassSpec("prefix", (), 3),
    "soft prompt": BypassSpec("soft_prompt", (), 3),
    "steering": BypassSpec("steering"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model_folder(tmp_path_factory.mktemp("killed"), num_hidden_layers=2))


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Starts workers quickly: they are forks of a process that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.engine.finetune_worker", "transformers"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        forkserver.ensure_running()
    return context


def life(
    context: ForkServerContext,
    given: tuple[Any, ...],
    *,
    steps: int | None,
    delay: float = 0.0,
) -> list[dict[str, Any]]:
    """What a worker tells until its end, or until it is killed ``delay`` seconds after ``steps``
    steps, and two steps later at the latest."""
    ours, theirs = context.Pipe(duplex=False)
    doom = None if steps is None else (steps, delay)
    process = context.Process(target=finetune_worker.train, args=(*given, theirs, doom))
    process.start()
    theirs.close()
    events: list[dict[str, Any]] = []
    try:
        while True:
            events.append(ours.recv())
    except (EOFError, OSError):
        process.join(PATIENCE)
    return events


# --- kill -9 -----------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(("policy", "dtype"), [("temporal:1", "float32"), ("co-serve", "float64")])
def test_a_job_killed_ten_times_ends_as_if_undisturbed(
    processes: ForkServerContext, folder: str, tmp_path: Path, policy: str, dtype: str
) -> None:
    undisturbed = life(processes, (folder, dtype, policy, str(tmp_path / "a")), steps=None)[-1]
    assert undisturbed["state"] == "succeeded", undisturbed
    rng = random.Random(5)
    saved = kills = 0
    given = (folder, dtype, policy, str(tmp_path / "b"))
    while True:
        steps = rng.randint(1, 6) if kills < 10 else None  # at most 80 of 90 before the last life
        events = life(processes, given, steps=steps, delay=rng.random() / 50)
        begun = events[0]
        assert begun["event"] == "started"
        assert begun["step"] >= saved  # nothing is lost that a checkpoint has told of
        assert begun["step"] % SPEC.checkpoint_every == 0
        for event in events:
            if event["event"] == "checkpoint":
                saved = int(event["path"][-8:])
        if events[-1]["event"] == "result":
            break
        kills += 1
    assert kills == 10
    result = events[-1]
    assert result["state"] == "succeeded"
    assert result["errors"] == []
    ends = [load_file(tmp_path / at / "step-00000090" / "optimizer.safetensors") for at in "ab"]
    adapters = [
        load_file(tmp_path / at / "step-00000090" / "adapter_model.safetensors") for at in "ab"
    ]
    if policy == "temporal:1":  # the same cuts: the same bits
        assert result["losses"] == undisturbed["losses"]
        assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
        assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    else:
        assert result["losses"] == pytest.approx(undisturbed["losses"], abs=1e-8)
        for name in ends[0]:
            assert torch.allclose(ends[0][name], ends[1][name], rtol=0, atol=1e-7), name
    names = sorted(path.name for path in (tmp_path / "b").iterdir())
    assert names == ["step-00000085", "step-00000090"]
    files = {path.name for path in (tmp_path / "b" / names[-1]).iterdir()}
    assert files == {path.name for path in (tmp_path / "a" / names[-1]).iterdir()}


# --- full disks --------------------------------------------------------------------------------
def test_files_that_may_not_grow_pause_the_job_and_requests_go_on(
    processes: ForkServerContext, folder: str, tmp_path: Path
) -> None:
    ours, theirs = processes.Pipe(duplex=False)
    process = processes.Process(
        target=finetune_worker.train_on_a_full_disk, args=(folder, str(tmp_path), theirs)
    )
    process.start()
    theirs.close()
    told = ours.recv()
    process.join(PATIENCE)
    kinds = [event["event"] for event in told["events"]]
    assert kinds.index("checkpoint_failed") < kinds.index("paused") < kinds.index("resumed")
    paused = next(event for event in told["events"] if event["event"] == "paused")
    assert "checkpoint could not be written" in paused["reason"]
    assert told["left"] == ["step-00000005"]
    assert told["held"] == 0
    assert told["answered"] == 20
    assert told["state"] == "succeeded"
    assert len(told["losses"]) == SPEC.steps
    assert checkpoints(tmp_path)[-1].name == "step-00000090"


@pytest.mark.parametrize("where", ["adapter", "optimizer", "state", "flush", "rename"])
def test_a_disk_full_at_any_write_leaves_the_older_checkpoint_and_no_trace(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    import safetensors.torch

    target, name = {
        "adapter": (checkpoint, "write_adapter"),
        "optimizer": (safetensors.torch, "save_file"),
        "state": (Path, "write_text"),
        "flush": (checkpoint, "_flush"),
        "rename": (Path, "rename"),
    }[where]
    real, real_checkpoint = getattr(target, name), checkpoint.write_checkpoint
    full = freed = False

    def write_checkpoint(folder: Path, snapshot: checkpoint.Snapshot, *given: Any, **named: Any):
        nonlocal full
        full = snapshot.step > 2 and not freed  # the first is whole, however slow its thread is
        return real_checkpoint(folder, snapshot, *given, **named)

    def write(*given: Any, **named: Any) -> Any:
        result = None if full and where == "rename" else real(*given, **named)
        if full:
            raise OSError(28, "No space left on device")
        return result

    monkeypatch.setattr(checkpoint, "write_checkpoint", write_checkpoint)
    monkeypatch.setattr(target, name, write)
    engine = small_engine(tiny)
    job = start(engine, JobSpec("j", LORA, 4, checkpoint_every=2), texts(), tmp_path)
    assert job.handle is not None
    handle = job.handle
    drive(engine, until=lambda: "paused" in job.kinds())
    assert "No space left" in job.of("checkpoint_failed")[0]["error"]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
    nothing_is_held(engine)
    freed, full = True, False
    handle.resume()
    drive(engine, job)
    assert handle.state == "succeeded"
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002", "step-00000004"]


# --- what is not finite ------------------------------------------------------------------------
POISON = 7


@pytest.fixture(scope="module", params=[math.inf, math.nan])
def poisoned(request: pytest.FixtureRequest, tmp_path_factory: Any) -> LoadedModel:
    """A model whose embedding of one token is not finite."""
    model = tiny_loaded(Path(tmp_path_factory.mktemp("poisoned")))
    with torch.no_grad():
        model.decoder.embed[POISON] = request.param
    return model


def test_a_poisoned_token_in_the_data_reaches_no_request(poisoned: LoadedModel) -> None:
    rng = random.Random(3)
    good = [text_of(rng) for _ in range(4)]
    good = [Text([t if t != POISON else 8 for t in g.tokens], g.labels) for g in good]
    bad = Text([*good[0].tokens[:20], POISON, 5, 6], [*good[0].tokens[1:20], *[5] * 4])
    data = [good[0], bad, good[1], bad, bad, good[2], bad, bad, bad]

    def requests(engine: Any) -> list[Any]:
        rng = random.Random(4)
        prompts = [[rng.randrange(8, 290) for _ in range(rng.randint(2, 50))] for _ in range(14)]
        return [
            ask(engine, prompt, max_tokens=25, seed=1, logprobs=0, logit_bias=((POISON, -100.0),))
            for prompt in prompts
        ]

    alone = small_engine(poisoned, max_running=8, max_batch_tokens=32)
    expected = requests(alone)
    drive(alone, until=lambda: all(one.done for one in expected))
    engine = small_engine(poisoned, max_running=8, max_batch_tokens=32, **UNHURRIED)
    job = start(engine, JobSpec("j", LORA, 50), Listed(data))
    asked = requests(engine)
    drive(engine, job)
    drive(engine, until=lambda: all(one.done for one in asked))
    steps = [kind for kind in job.kinds() if kind in ("step", "skipped", "failed")]
    assert steps == [
        *("step", "skipped", "step", "skipped", "skipped", "step", "skipped", "skipped", "failed")
    ]
    assert "3 steps in a row had no finite loss" in job.events[-1]["error"]
    for one, other in zip(expected, asked, strict=True):
        assert other.outputs[-1].error is None
        assert other.tokens() == one.tokens()
        assert other.logprobs() == pytest.approx(one.logprobs(), abs=1e-5)
    again = requests(engine)  # in blocks that the job had
    drive(engine, until=lambda: all(one.done for one in again))
    for one, other in zip(expected, again, strict=True):
        assert other.logprobs() == pytest.approx(one.logprobs(), abs=1e-5)
    nothing_is_held(engine)


# --- ends in the middle ------------------------------------------------------------------------
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_two_jobs_cancelled_mid_window_leave_the_third_as_alone(
    tiny_exact: LoadedModel, phase: str
) -> None:
    spec = JobSpec("c", LORA, 12, 0.01, seed=2)
    expected, _ = plain_loop(tiny_exact, spec, texts(seed=9), torch.optim.AdamW)
    engine = small_engine(tiny_exact, max_batch_tokens=16, max_running=8, **UNHURRIED)
    one, two, third = (
        start(engine, each, texts(seed=i + 7))
        for i, each in enumerate((JobSpec("a", LORA, 500), JobSpec("b", LORA, 500), spec))
    )
    asked = random_requests(engine, 6)
    inner = [job.handle._job for job in (one, two) if job.handle is not None]

    def mid_window() -> bool:
        parts = [job.sequence for job in inner]
        if any(s is None or s.table is None or not s.forwarded for s in parts):
            return False
        whole = [s.forwarded == s.length for s in parts if s is not None]
        return all(whole) if phase == "backward" else not any(whole)

    engine.step()
    coserver = engine._finetuning._coserver
    assert coserver is not None
    coserver.sizes = Sizes(max_unit=2)  # no backward is over with the iteration of its forward
    drive(engine, until=mid_window)
    for job in (one, two):
        assert job.handle is not None
        job.handle.cancel()
    drive(engine, one, two)
    assert all(job.sequence is None and not job.held for job in inner)
    assert all(p.grad is None for job in inner for p in job.parameters.values())
    drive(engine, third)
    drive(engine, until=lambda: all(r.done for r in asked))
    assert third.handle is not None
    assert third.handle.losses == pytest.approx(expected, abs=1e-9)
    nothing_is_held(engine)


@pytest.fixture(scope="module")
def tiny_exact(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return tiny_loaded(Path(tmp_path_factory.mktemp("exact")), dtype=torch.float64)


def test_clients_that_go_during_training_leave_nothing(tiny_exact: LoadedModel) -> None:
    spec = JobSpec("j", LORA, 20, 0.01, publish_every=4)
    expected, _ = plain_loop(tiny_exact, spec, texts(), torch.optim.AdamW)
    engine = small_engine(tiny_exact, max_batch_tokens=24, max_running=6, **UNHURRIED)
    job = start(engine, spec, texts())
    assert job.handle is not None
    rng = random.Random(8)
    asked = []
    coming = 0  # then no more come: a machine on which requests fill every iteration ends too
    deadline = time.monotonic() + PATIENCE
    while not job.handle.ended.is_set():
        assert time.monotonic() < deadline
        coming += 1
        if coming < 2000 and rng.random() < 0.4:
            prompt = [rng.randrange(290) for _ in range(rng.randint(2, 60))]
            adapter = "j" if job.of("published") and rng.random() < 0.5 else None
            asked.append(ask(engine, prompt, max_tokens=30, adapter=adapter))
        if asked and rng.random() < 0.35:
            engine.abort(rng.choice(asked).request.id)
        engine.step()
    for one in asked:
        engine.abort(one.request.id)
    settle(engine)
    assert all(one.done for one in asked)
    assert {one.reason() for one in asked} >= {"cancelled"}
    assert job.handle.losses == pytest.approx(expected, abs=1e-9)
    nothing_is_held(engine)


# --- non-interference --------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_training_any_bypass_leaves_log_probabilities_beside_it_alone(
    tiny: LoadedModel, kind: str
) -> None:
    options: dict[str, Any] = {"max_batch_tokens": 48, "max_running": 8, **UNHURRIED}
    alone = small_engine(tiny, **options)
    expected = random_requests(alone, 10)
    drive(alone, until=lambda: all(one.done for one in expected))
    engine = small_engine(tiny, **options)
    job = start(engine, JobSpec("j", (KINDS[kind],), 400, 0.05), texts())
    drive(engine, until=lambda: bool(job.of("step")))
    before = engine.stats().totals["train"]
    asked = random_requests(engine, 10)
    drive(engine, until=lambda: all(one.done for one in asked))
    assert engine.stats().totals["train"] > before
    for one, other in zip(expected, asked, strict=True):
        assert other.tokens() == one.tokens()
        assert other.logprobs() == pytest.approx(one.logprobs(), abs=1e-5)
    assert job.handle is not None
    job.handle.cancel()
    drive(engine, job)
    nothing_is_held(engine)


@pytest.mark.parametrize("kind", KINDS)
def test_a_version_published_between_two_requests_shares_no_prefix_with_the_older(
    tiny: LoadedModel, kind: str
) -> None:
    prompt = list(range(20, 90))
    engine = small_engine(tiny)
    job = start(engine, JobSpec("j", (KINDS[kind],), 6, 0.1, publish_every=1), texts())
    specs = checked_specs(tiny.config, (KINDS[kind],))
    seen = []
    for version in (1, 4):
        drive(engine, until=lambda v=version: len(job.of("published")) >= v)
        assert job.handle is not None
        job.handle.pause()
        drive(engine, until=lambda: job.handle is not None and job.handle.state == "paused")
        parameters = {name: value.clone() for name, value in trained(engine, job).items()}
        first, second = (
            ask(engine, prompt, adapter="j", max_tokens=8, temperature=0.0, logprobs=0)
            for _ in range(2)
        )
        drive(engine, until=lambda a=first, b=second: a.done and b.done)
        third = ask(engine, prompt, adapter="j", max_tokens=8, temperature=0.0, logprobs=0)
        drive(engine, until=lambda c=third: c.done)
        assert first.outputs[0].cached_tokens == 0
        assert third.outputs[0].cached_tokens > 0
        cold = small_engine(tiny, prefix_cache=False)
        cold.adapters.publish("j", specs, parameters)
        wanted = ask(cold, prompt, adapter="j", max_tokens=8, temperature=0.0, logprobs=0)
        drive(cold, until=lambda w=wanted: w.done)
        for one in (first, second, third):
            assert one.tokens() == wanted.tokens()
            assert one.logprobs() == pytest.approx(wanted.logprobs(), abs=1e-5)
        seen.append(wanted.logprobs())
        job.handle.resume()
    assert seen[0] != pytest.approx(seen[1], abs=1e-4)  # the versions do differ
    drive(engine, job)


def test_the_workers_texts_repeat() -> None:
    one, other = Texts(), Texts()
    for _ in range(3):
        one.next()
    other.seek(one.position())
    assert one.next() == other.next()
