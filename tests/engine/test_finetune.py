"""Jobs beside requests: exact, undisturbing, and able to stop and go on anywhere."""

from __future__ import annotations

import math
import random
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.engine.drive import Inquiry, ask, small_engine
from tests.tiny import tiny_loaded
from tests.waiting import PATIENCE, wait_for

from invivo.engine import checkpoint, finetune
from invivo.engine.bypasses import BypassSpec, TrainBypass, checked_specs, init_parameters
from invivo.engine.checkpoint import checkpoints, step_of
from invivo.engine.coserve import Sizes
from invivo.engine.engine import Engine
from invivo.engine.finetune import JobHandle
from invivo.engine.job_spec import JobSpec, Text
from invivo.engine.optimizer import learning_rate
from invivo.engine.types import Purpose
from invivo.errors import Conflict, InvalidRequest, Overloaded
from invivo.kernels.paging import blocks_needed, contiguous_layout
from invivo.models.cache import allocate_kv_cache
from invivo.models.load import LoadedModel

LORA = (BypassSpec("lora", ("q", "v", "down"), 4, alpha=8.0),)
# Promises that a slow machine keeps too: training always finds room beside requests.
UNHURRIED: dict[str, Any] = {"tpot_ms": 60_000.0, "ttft_ms": 600_000.0}
VIRTUAL = (BypassSpec("prefix", (), 3), BypassSpec("adapter", (), 4), BypassSpec("ia3"))


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return tiny_loaded(Path(tmp_path_factory.mktemp("exact")), dtype=torch.float64)


def text_of(rng: random.Random, longest: int = 70, *, weighted: bool = False) -> Text:
    tokens = [rng.randrange(290) for _ in range(rng.randint(8, longest))]
    labels = [t if rng.random() < 0.7 else -100 for t in tokens[1:]] + [-100]
    labels[0] = tokens[1]
    weights = [rng.random() for _ in tokens] if weighted else None
    return Text(tokens, labels, weights)


@dataclass
class Listed:
    """Texts in turn, for ever or once."""

    texts: list[Text]
    once: bool = False
    at: int = 0

    def next(self) -> Text | None:
        if self.once and self.at >= len(self.texts):
            return None
        self.at += 1
        return self.texts[(self.at - 1) % len(self.texts)]

    def position(self) -> Any:
        return {"text": self.at}

    def seek(self, position: Any) -> None:
        self.at = position["text"]


def texts(n: int = 7, seed: int = 0, **options: Any) -> Listed:
    rng = random.Random(seed)
    return Listed([text_of(rng, **options) for _ in range(n)])


@dataclass
class Job:
    """A job and what it told."""

    events: list[dict[str, Any]] = field(default_factory=list)
    handle: JobHandle | None = None

    def kinds(self) -> list[str]:
        return [event["event"] for event in self.events]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]


def start(engine: Engine, spec: JobSpec, data: Any, folder: Path | None = None) -> Job:
    job = Job()
    job.handle = engine.finetune(spec, data, job.events.append, folder)
    return job


def drive(engine: Engine, *jobs: Job, until: Any = None) -> None:
    """Step until the jobs have ended, or ``until()``."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        ended = all(job.handle is not None and job.handle.ended.is_set() for job in jobs)
        if until() if until is not None else ended:
            return
        if not engine.step():
            time.sleep(0.001)  # a checkpoint is being written
    raise AssertionError([job.events[-3:] for job in jobs])


def nothing_is_held(engine: Engine) -> None:
    assert not engine.scheduler.training
    assert engine.scheduler.blocks_used == 0


def plain_loop(
    model: LoadedModel, spec: JobSpec, data: Listed, optimizer: type[torch.optim.Optimizer]
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same job by autograd over whole texts and torch's own optimizer."""
    config, decoder = model.config, model.decoder
    specs = checked_specs(config, spec.bypasses)
    parameters = {
        name: value.requires_grad_()
        for i, each in enumerate(specs)
        for name, value in init_parameters(
            each, config, seed=spec.seed + i, dtype=torch.float64
        ).items()
    }
    options: dict[str, Any] = {"lr": 0.0, "weight_decay": spec.weight_decay}
    options |= {"momentum": spec.momentum} if optimizer is torch.optim.SGD else {}
    torch_optimizer = optimizer(list(parameters.values()), **options)
    bypass = TrainBypass(config, specs, parameters)
    n = bypass.n_virtual
    losses = []
    for step in range(spec.steps):
        total, count = torch.zeros((), dtype=torch.float64), 0
        for _ in range(spec.gradient_accumulation):
            text = data.next()
            assert text is not None
            tokens = torch.tensor([0] * n + list(text.tokens))
            cache = allocate_kv_cache(
                config,
                n_blocks=blocks_needed([len(tokens)]),
                block_size=16,
                device="cpu",
                dtype=torch.float64,
            )
            view = bypass.window(0, len(tokens))
            layout = contiguous_layout([len(tokens)])
            hidden = decoder(tokens, layout, cache, bypass=view)[n:]
            labels = torch.tensor(text.labels)
            loss = F.cross_entropy(decoder.logits(hidden), labels, reduction="none")
            if text.weights is not None:
                loss = loss * torch.tensor(text.weights, dtype=torch.float64)
            total = total + loss.sum()
            count += int((labels >= 0).sum())
        (total / count).backward()
        if spec.clip is not None:
            grads = [value.grad for value in parameters.values() if value.grad is not None]
            norm = float(torch.cat([grad.flatten() for grad in grads]).norm())
            for grad in grads:
                grad *= min(1.0, spec.clip / norm)
        torch_optimizer.param_groups[0]["lr"] = learning_rate(spec, step)
        torch_optimizer.step()
        torch_optimizer.zero_grad()
        losses.append(float(total.detach()) / count)
    return losses, {name: value.detach() for name, value in parameters.items()}


def trained(engine: Engine, job: Job) -> dict[str, torch.Tensor]:
    assert job.handle is not None
    return {name: value.detach() for name, value in job.handle._job.parameters.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=0, atol=tolerance), name


def random_requests(engine: Engine, n: int, seed: int = 5) -> list[Inquiry]:
    rng = random.Random(seed)
    asked = []
    for _ in range(n):
        prompt = [rng.randrange(290) for _ in range(rng.randint(2, 60))]
        asked.append(
            ask(engine, prompt, max_tokens=rng.randint(2, 25), seed=rng.randrange(99), logprobs=0)
        )
    return asked


# --- exactness ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("bypasses", "options", "optimizer"),
    [
        (LORA, {"weight_decay": 0.1, "schedule": "cosine", "warmup": 2}, torch.optim.AdamW),
        (LORA, {"mode": "rerun", "clip": 0.1, "schedule": "linear"}, torch.optim.AdamW),
        (LORA, {"order": "layer", "optimizer": "sgd", "momentum": 0.9}, torch.optim.SGD),
        (VIRTUAL, {"mode": "rerun", "order": "layer"}, torch.optim.AdamW),
        (VIRTUAL, {}, torch.optim.AdamW),
    ],
)
def test_a_job_equals_a_plain_loop_and_requests_beside_it_are_as_alone(
    exact: LoadedModel, bypasses: Any, options: dict[str, Any], optimizer: Any
) -> None:
    spec = JobSpec("j", bypasses, 6, 0.01, gradient_accumulation=2, seed=3, **options)
    expected, parameters = plain_loop(exact, spec, texts(weighted=True), optimizer)
    engine = small_engine(exact, max_batch_tokens=48, max_running=8, tpot_ms=200.0)
    alone = random_requests(engine, 12)
    drive(engine, until=lambda: all(one.done for one in alone))
    beside = small_engine(
        exact, max_batch_tokens=48, max_running=8, tpot_ms=200.0, overlap=bool(options)
    )
    job = start(beside, spec, texts(weighted=True))
    asked = random_requests(beside, 12)
    drive(beside, job)
    drive(beside, until=lambda: all(one.done for one in asked))
    assert job.handle is not None
    assert job.handle.state == "succeeded"
    assert job.handle.losses == pytest.approx(expected, abs=1e-9)
    same(trained(beside, job), parameters, 1e-9)
    for one, other in zip(alone, asked, strict=True):
        assert one.tokens() == other.tokens()
        assert one.logprobs() == pytest.approx(other.logprobs(), abs=1e-10)
    nothing_is_held(beside)
    assert job.kinds() == ["started", *["step"] * 6, "published", "succeeded"]
    totals = beside.stats().totals
    assert totals["train"] > 0
    assert totals["backward"] > 0


def test_training_rows_ride_in_batches_of_inference(exact: LoadedModel) -> None:
    engine = small_engine(exact, max_batch_tokens=48, **UNHURRIED)
    mixed = []
    schedule = engine._finetuning.plan

    def watched(now: float, busy: float | None) -> Any:
        plan = schedule(now, busy)
        if plan is not None:
            kinds = {span.purpose for span in plan.spans}
            mixed.append(Purpose.TRAIN in kinds and len(kinds) > 1)
        return plan

    engine._finetuning.plan = watched  # type: ignore[method-assign]
    asked = random_requests(engine, 8)
    job = start(engine, JobSpec("j", LORA, 4), texts())
    drive(engine, job)
    drive(engine, until=lambda: all(one.done for one in asked))
    assert any(mixed)


def test_predictions_that_are_too_long_do_not_add_up(tiny: LoadedModel) -> None:
    """A device that is thought to be busy for ever would get no training beside requests."""
    engine = small_engine(tiny, max_batch_tokens=48, overlap=True, **UNHURRIED)
    tuning, thought = engine._finetuning, []
    plan, predicted = tuning.plan, tuning.predicted

    def watched(now: float, busy: float | None) -> Any:
        if busy is not None:
            thought.append(busy - now)
        return plan(now, busy)

    tuning.plan = watched  # type: ignore[method-assign]
    tuning.predicted = lambda plan: predicted(plan) + 100.0  # type: ignore[method-assign]
    job = start(engine, JobSpec("j", LORA, 4), texts())
    asked = random_requests(engine, 8)
    drive(engine, job)
    drive(engine, until=lambda: all(one.done for one in asked))
    assert len(thought) > 10
    assert max(thought) < 200.0


def test_the_published_adapter_answers_as_trained(tiny: LoadedModel) -> None:
    tokens = [5, 6, 7, 8, 9, 10]
    engine = small_engine(tiny)
    data = Listed([Text(tokens, [*tokens[1:], -100])])
    job = start(engine, JobSpec("five", LORA, 30, 0.03), data)
    drive(engine, job)
    assert job.handle is not None
    assert job.handle.losses[-1] < 1.0 < 5.0 < job.handle.losses[0]
    base, learned = (ask(engine, tokens, adapter=a, kind="score") for a in (None, "five"))
    drive(engine, until=lambda: base.done and learned.done)
    assert -sum(base.prompt_logprobs()) / 5 == pytest.approx(job.handle.losses[0], abs=1e-4)
    bypass = TrainBypass(tiny.config, checked_specs(tiny.config, LORA), trained(engine, job))
    cache = allocate_kv_cache(
        tiny.config, n_blocks=blocks_needed([6]), block_size=16, device="cpu", dtype=torch.float32
    )
    with torch.no_grad():
        hidden = tiny.decoder(torch.tensor(tokens), contiguous_layout([6]), cache, bypass=bypass)
        logprobs = tiny.decoder.logits(hidden).log_softmax(-1)
    expected = [float(logprobs[i, tokens[i + 1]]) for i in range(5)]
    assert learned.prompt_logprobs() == pytest.approx(expected, abs=1e-4)


# --- checkpoints -------------------------------------------------------------------------------
@pytest.mark.parametrize("bypasses", [LORA, VIRTUAL])
def test_a_job_killed_after_a_checkpoint_goes_on_as_if_nothing_had_been(
    tiny: LoadedModel, tmp_path: Path, bypasses: Any
) -> None:
    # Whole iterations at a time: the same cuts, hence the same bits.
    options: dict[str, Any] = {"policy": "temporal:1"}
    spec = JobSpec("j", bypasses, 10, 0.01, checkpoint_every=4, gradient_accumulation=2)
    engine = small_engine(tiny, **options)
    undisturbed = start(engine, spec, texts())
    drive(engine, undisturbed)

    engine = small_engine(tiny, **options)
    first = start(engine, spec, texts(), tmp_path)
    drive(engine, until=lambda: len(first.of("step")) > 4 and bool(first.of("checkpoint")))
    del engine  # no farewell
    newest = checkpoints(tmp_path)[-1]

    engine = small_engine(tiny, **options)
    second = start(engine, spec, texts(), tmp_path)
    drive(engine, second)
    assert second.events[0]["from"] >= str(newest)  # one may still have been under way
    assert second.events[0]["step"] in (4, 8)
    assert undisturbed.handle is not None
    assert second.handle is not None
    assert second.handle.losses == undisturbed.handle.losses
    same(trained(engine, second), trained(engine, undisturbed), 0.0)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000008", "step-00000010"]
    # The checkpoint is an adapter like any other.
    assert engine.adapters.load("again", checkpoints(tmp_path)[-1]).n_parameters > 0


@pytest.mark.parametrize("order", ["pause", "stop", "close"])
def test_a_job_that_is_put_off_anywhere_leaves_a_checkpoint_and_loses_nothing(
    tiny: LoadedModel, tmp_path: Path, order: str
) -> None:
    options: dict[str, Any] = {"policy": "temporal:1"}
    spec = JobSpec("j", LORA, 8, 0.01, gradient_accumulation=3)
    engine = small_engine(tiny, **options)
    undisturbed = start(engine, spec, texts())
    drive(engine, undisturbed)

    engine = small_engine(tiny, **options)
    first = start(engine, spec, texts(), tmp_path)
    drive(engine, until=lambda: len(first.of("step")) == 4)
    for _ in range(3):  # into the next step, whose texts count for nothing yet
        engine.step()
    assert first.handle is not None
    steps = first.handle.step
    if order == "close":
        engine.close()
    else:
        getattr(first.handle, order)()
        drive(engine, until=lambda: first.of("checkpoint"))
    assert first.kinds()[-1] == ("checkpoint" if order == "pause" else "stopped")
    assert checkpoints(tmp_path)[-1].name == f"step-{steps:08d}"

    engine = small_engine(tiny, **options)
    second = start(engine, spec, texts(), tmp_path)
    drive(engine, second)
    assert second.events[0]["step"] == steps
    assert undisturbed.handle is not None
    assert second.handle is not None
    assert second.handle.losses == undisturbed.handle.losses
    same(trained(engine, second), trained(engine, undisturbed), 0.0)


def test_checkpoints_of_another_job_are_refused(tiny: LoadedModel, tmp_path: Path) -> None:
    engine = small_engine(tiny)
    drive(engine, start(engine, JobSpec("j", LORA, 2), texts(), tmp_path))
    with pytest.raises(Conflict, match="learning_rate"):
        start(engine, JobSpec("j", LORA, 2, 0.5), texts(), tmp_path)


def test_a_full_disk_pauses_the_job_and_leaves_the_older_checkpoint(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = small_engine(tiny)
    spec = JobSpec("j", LORA, 6, checkpoint_every=2)
    write, written = checkpoint.write_adapter, []

    def no_room(*given: Any, **named: Any) -> None:
        written.append(write(*given, **named))
        if len(written) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_adapter", no_room)
    job = start(engine, spec, texts(), tmp_path)
    drive(engine, until=lambda: "paused" in job.kinds())
    assert job.handle is not None
    assert job.handle.state == "paused"
    assert "No space left" in job.of("checkpoint_failed")[0]["error"]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
    nothing_is_held(engine)
    job.handle.resume()
    drive(engine, job)
    assert job.handle.state == "succeeded"
    assert checkpoints(tmp_path)[-1].name == "step-00000006"


# --- pausing, ending, several ------------------------------------------------------------------
def test_a_paused_job_holds_nothing_and_goes_on_exactly(exact: LoadedModel) -> None:
    spec = JobSpec("j", LORA, 8, 0.01, gradient_accumulation=2)
    expected, parameters = plain_loop(exact, spec, texts(), torch.optim.AdamW)
    engine = small_engine(exact, max_batch_tokens=16, max_running=8)
    job = start(engine, spec, texts())
    assert job.handle is not None
    rng = random.Random(1)
    for _ in range(6):
        for _ in range(rng.randint(1, 8)):
            engine.step()
        if job.handle.ended.is_set():
            break
        job.handle.pause()
        engine.step()
        if job.handle.state == "paused":
            nothing_is_held(engine)
            assert not engine.step()
        job.handle.resume()
    drive(engine, job)
    assert "paused" in job.kinds()
    assert job.handle.losses == pytest.approx(expected, abs=1e-9)
    same(trained(engine, job), parameters, 1e-9)


def test_a_paused_job_gives_its_place_to_another_and_stands_in_line_afterwards(
    exact: LoadedModel,
) -> None:
    spec = JobSpec("first", LORA, 6, 0.01)
    expected, _ = plain_loop(exact, spec, texts(), torch.optim.AdamW)
    engine = small_engine(exact, max_jobs=1)
    first = start(engine, spec, texts())
    handle = first.handle
    assert handle is not None
    drive(engine, until=lambda: first.of("step"))
    handle.pause()
    engine.step()
    second = start(engine, JobSpec("second", LORA, 4), texts())
    drive(engine, until=lambda: second.of("step"))
    handle.resume()
    engine.step()
    assert (handle.state, first.kinds()[-1]) == ("queued", "queued")
    with pytest.raises(Overloaded):  # nobody overtakes who stands in line
        start(engine, JobSpec("third", LORA, 1), texts())
    handle.pause()
    engine.step()
    assert handle.state == "paused"
    handle.resume()
    drive(engine, second)
    assert first.kinds()[-1] in ("queued", "resumed", "step")
    drive(engine, first)
    assert first.kinds().count("resumed") == 1
    assert handle.losses == pytest.approx(expected, abs=1e-9)
    again = start(engine, JobSpec("again", LORA, 10**6), texts())
    assert again.handle is not None
    again.handle.pause()
    engine.step()
    last = start(engine, JobSpec("last", LORA, 10**6), texts())
    drive(engine, until=lambda: last.of("step"))
    again.handle.resume()
    engine.step()
    again.handle.cancel()
    engine.step()
    assert again.handle.state == "cancelled"
    assert not engine._finetuning._line


@pytest.mark.parametrize("after", range(1, 12, 2))
def test_jobs_cancelled_anywhere_leave_nothing(tiny: LoadedModel, after: int) -> None:
    engine = small_engine(tiny, max_batch_tokens=16, max_running=8)
    some = [start(engine, JobSpec(name, LORA, 50), texts()) for name in "ab"]
    asked = random_requests(engine, 3)
    for _ in range(after):
        engine.step()
    for job in some:
        assert job.handle is not None
        job.handle.cancel()
    drive(engine, *some, until=lambda: all(one.done for one in asked))
    assert all(job.kinds()[-1] == "cancelled" for job in some)
    nothing_is_held(engine)
    assert not engine.step()


def test_two_jobs_share_as_told_and_learn_as_alone(exact: LoadedModel) -> None:
    engine = small_engine(exact)
    specs = [
        JobSpec("a", LORA, 30, 0.01, share=3.0),
        JobSpec("b", VIRTUAL, 30, 0.02, seed=4),
    ]
    some = [start(engine, spec, texts(seed=i + 1, longest=40)) for i, spec in enumerate(specs)]
    a, b = (job.handle for job in some)
    assert a is not None
    assert b is not None
    drive(engine, until=lambda: a.step == 30)
    assert 5 <= b.step <= 16
    drive(engine, *some)
    for i, (spec, job) in enumerate(zip(specs, some, strict=True)):
        expected, parameters = plain_loop(
            exact, spec, texts(seed=i + 1, longest=40), torch.optim.AdamW
        )
        assert job.handle is not None
        assert job.handle.losses == pytest.approx(expected, abs=1e-9)
        same(trained(engine, job), parameters, 1e-9)


def test_a_running_request_keeps_its_version(exact: LoadedModel) -> None:
    engine = small_engine(exact)
    job = start(engine, JobSpec("j", LORA, 12, 0.1, publish_every=2), texts(longest=12))
    drive(engine, until=lambda: bool(job.of("published")))
    version = engine.adapters.hold("j")
    asked = ask(engine, [5, 6, 7], adapter="j", max_tokens=60, temperature=0.0, logprobs=0)
    drive(engine, job)
    assert not asked.done or len(job.of("published")) > 2
    drive(engine, until=lambda: asked.done)
    assert [event["version"] for event in job.of("published")] == list(range(1, 7))
    alone = small_engine(exact)
    before = start(alone, JobSpec("j", LORA, 2, 0.1), texts(longest=12))
    drive(alone, before)
    again = ask(alone, [5, 6, 7], adapter="j", max_tokens=60, temperature=0.0, logprobs=0)
    drive(alone, until=lambda: again.done)
    assert version.version == 1
    assert again.tokens() == asked.tokens()
    assert again.logprobs() == pytest.approx(asked.logprobs(), abs=1e-9)


# --- trouble -----------------------------------------------------------------------------------
def test_training_gives_way_when_memory_is_short(exact: LoadedModel) -> None:
    spec = JobSpec("j", LORA, 3, 0.01)
    expected, _ = plain_loop(exact, spec, texts(longest=120), torch.optim.AdamW)
    # 24 blocks: two long requests leave no room for a text.
    per_block = 2 * 3 * 2 * 8 * 16 * 8
    engine = small_engine(
        exact, kv_bytes=24 * per_block, max_batch_tokens=16, max_running=8, **UNHURRIED
    )
    job = start(engine, spec, texts(longest=120))
    assert job.handle is not None
    engine.step()
    coserver = engine._finetuning._coserver
    assert coserver is not None
    coserver.sizes = Sizes(min_window=1, max_unit=1)  # a text takes long
    rng = random.Random(2)
    for _ in range(3):
        for _ in range(10):
            engine.step()
        prompts = [[rng.randrange(290) for _ in range(100)] for _ in range(2)]
        asked = [ask(engine, prompt, max_tokens=70, ignore_eos=True) for prompt in prompts]
        drive(engine, until=lambda asked=asked: all(one.done for one in asked))
    coserver.sizes = Sizes()
    drive(engine, job)
    assert engine.scheduler.n_reclaimed > 0
    assert engine.stats().preemptions == 0
    assert job.handle.losses == pytest.approx(expected, abs=1e-9)


def test_steps_without_a_finite_loss_are_skipped_and_three_in_a_row_end_the_job(
    tiny: LoadedModel,
) -> None:
    good, bad = text_of(random.Random(1)), text_of(random.Random(2))
    bad = Text(bad.tokens, bad.labels, [math.nan] * len(bad.tokens))
    engine = small_engine(tiny)
    job = start(engine, JobSpec("j", LORA, 20), Listed([good, bad, bad, good, bad, bad, bad]))
    asked = random_requests(engine, 4)
    drive(engine, job)
    drive(engine, until=lambda: all(one.done for one in asked))
    assert job.kinds() == [
        *("started", "step", "skipped", "skipped", "step", "skipped", "skipped", "failed")
    ]
    assert "3 steps in a row had no finite loss" in job.events[-1]["error"]
    assert all(one.reason() is not None and one.outputs[-1].error is None for one in asked)
    nothing_is_held(engine)


@pytest.mark.parametrize("where", ["forward", "on_board", "begin", "backward", "data"])
def test_what_goes_wrong_in_a_job_ends_the_job_alone(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    engine = small_engine(tiny, max_batch_tokens=24, max_running=8, **UNHURRIED)
    asked = random_requests(engine, 5)
    data = texts()
    job, other = (
        start(engine, JobSpec(name, LORA, 9), d) for name, d in (("a", data), ("b", texts()))
    )
    assert job.handle is not None

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of order")

    drive(engine, until=lambda: bool(job.of("step")))
    inner = job.handle._job.trainer
    target: Any = {"forward": (inner, "forward_done"), "on_board": (inner.bypass, "window")}.get(
        where, {"begin": (inner, "begin"), "backward": (inner, "run")}.get(where, (data, "next"))
    )
    monkeypatch.setattr(*target, broken)
    drive(engine, job, other)
    drive(engine, until=lambda: all(one.done for one in asked))
    assert job.kinds()[-1] == "failed"
    assert "out of order" in job.events[-1]["error"]
    assert other.kinds()[-1] == "succeeded"
    assert all(one.outputs[-1].error is None for one in asked)
    nothing_is_held(engine)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (Text([1] * 257, [-100] * 257), "1 to 256 tokens"),
        (Text([], []), "1 to 256 tokens"),
        (Text([1, 2], [2]), "labels and weights"),
        (Text([1, 99999], [1, -100]), "ids must be below"),
        (Text([1, 2], [99999, -100]), "ids below"),
        (Text([1, 2], [-100, -100]), "has a label"),
    ],
)
def test_texts_that_cannot_be_learned_end_the_job(
    tiny: LoadedModel, text: Text, problem: str
) -> None:
    engine = small_engine(tiny)
    job = start(engine, JobSpec("j", LORA, 3), Listed([text]))
    drive(engine, job)
    assert problem in job.events[-1]["error"]
    nothing_is_held(engine)


def test_a_job_ends_with_its_data(tiny: LoadedModel) -> None:
    engine = small_engine(tiny)
    data = texts(5)
    data.once = True
    job = start(engine, JobSpec("j", LORA, 100, gradient_accumulation=2), data)
    drive(engine, job)
    assert job.kinds() == ["started", *["step"] * 3, "published", "succeeded"]


def test_jobs_that_cannot_run_are_refused(tiny: LoadedModel) -> None:
    engine = small_engine(tiny, max_jobs=1)
    with pytest.raises(InvalidRequest, match="rank"):
        start(engine, JobSpec("j", (BypassSpec("lora", ("q",), 65),), 1), texts())
    with pytest.raises(InvalidRequest, match="name"):
        start(engine, JobSpec("no/name", LORA, 1), texts())
    start(engine, JobSpec("j", LORA, 1), texts())
    with pytest.raises(Conflict):
        start(engine, JobSpec("j", LORA, 1), texts())
    with pytest.raises(Overloaded):
        start(engine, JobSpec("k", LORA, 1), texts())
    with pytest.raises(InvalidRequest, match="does not train"):
        start(small_engine(tiny, policy="none"), JobSpec("j", LORA, 1), texts())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("learning_rate", math.nan),
        ("learning_rate", 0.0),
        ("schedule", "stairs"),
        ("betas", (0.9, 1.0)),
        ("clip", -1.0),
        ("weight_decay", -0.1),
        ("share", 0),
        ("gradient_accumulation", 1.5),
    ],
)
def test_settings_out_of_range_are_refused(name: str, value: object) -> None:
    given: dict[str, Any] = {"name": "j", "bypasses": LORA, "steps": 1} | {name: value}
    with pytest.raises(InvalidRequest) as caught:
        JobSpec(**given)
    assert caught.value.field == name


# --- threads -----------------------------------------------------------------------------------
def test_a_started_engine_trains_sleeps_and_stops(tiny: LoadedModel, tmp_path: Path) -> None:
    engine = small_engine(tiny)
    engine.start()
    job = start(engine, JobSpec("j", LORA, 5, checkpoint_every=2), texts(), tmp_path)
    asked = random_requests(engine, 4)
    assert job.handle is not None
    assert job.handle.join(PATIENCE) == "succeeded"
    endless = start(engine, JobSpec("endless", LORA, 10**6), texts())
    wait_for(lambda: endless.of("step"))
    assert engine.stats().as_dict()["jobs"][-1]["state"] == "running"
    engine.close(drain=True, timeout=PATIENCE)
    assert all(one.done for one in asked)
    assert endless.kinds()[-1] == "stopped"
    assert engine._thread is None


def test_an_engine_that_closes_while_a_checkpoint_is_written_waits_for_it(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, closes = checkpoint.write_adapter, threading.Event()

    def slowly(*arguments: Any) -> None:
        assert closes.wait(PATIENCE)
        write(*arguments)

    monkeypatch.setattr(checkpoint, "write_adapter", slowly)
    engine = small_engine(tiny)
    engine.start()
    job = start(engine, JobSpec("j", LORA, 10**6), texts(), tmp_path)
    handle = job.handle
    assert handle is not None
    wait_for(lambda: job.of("step"))
    handle.pause()
    wait_for(lambda: handle.state == "paused")
    closing = threading.Thread(target=engine.close, daemon=True)
    closing.start()
    wait_for(lambda: engine._inbox.closed)
    assert closing.is_alive()
    closes.set()
    closing.join(PATIENCE)
    assert not closing.is_alive()
    assert job.kinds()[-2:] == ["checkpoint", "stopped"]


def test_checkpoints_are_written_as_the_program_ends(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python starts no thread any more then."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    engine = small_engine(tiny)
    job = start(engine, JobSpec("j", LORA, 4, checkpoint_every=2), texts(), tmp_path)
    drive(engine, job)
    assert job.kinds()[-1] == "succeeded"
    assert [step_of(path) for path in checkpoints(tmp_path)] == [2, 4]


def test_steps_closed_at_once_leave_later_plans_their_time(exact: LoadedModel) -> None:
    """What the ends of steps take is counted once, however many there were."""
    engine = small_engine(exact, policy="co-serve", **UNHURRIED)
    rng = random.Random(2)
    job = engine.finetune(JobSpec("job", LORA, 30), Listed([text_of(rng)]), [].append)
    asked: list[Inquiry] = []
    deadline = time.monotonic() + PATIENCE
    while not job.ended.is_set():
        assert time.monotonic() < deadline
        if all(one.done for one in asked):
            asked.append(ask(engine, [5, 6, 7], max_tokens=20, ignore_eos=True))
        engine.step()
    assert job.state == "succeeded"
    finetuning = engine._finetuning
    assert finetuning._just_closed == finetuning._before_plan == 0.0  # a CPU is done with them
    engine.close()


def test_a_job_that_requests_leave_nothing_says_why_until_they_are_gone(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "_LONG", 0.0)
    engine = small_engine(tiny, tpot_ms=1e-3, ttft_ms=1e9)  # no machine keeps that
    asked = ask(engine, [1, 2, 3], max_tokens=40)
    job = start(engine, JobSpec("j", LORA, 1), texts())
    drive(engine, until=lambda: asked.done)
    (told,) = job.of("waiting")
    assert "requests alone take" in told["reason"]
    assert "0.001 promised, tpot_ms" in told["reason"]
    (shown,) = engine.stats().jobs
    assert "tpot_ms" in shown["waits_for"]
    assert shown["forward_tokens"] == 0
    drive(engine, job)
    (shown,) = engine.stats().jobs
    assert shown["waits_for"] is None
    assert job.kinds() == ["started", "waiting", "step", "published", "succeeded"]


def test_a_job_that_lacks_memory_says_so(
    exact: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "_LONG", 0.0)
    per_block = 2 * 3 * 2 * 8 * 16 * 8
    engine = small_engine(
        exact, kv_bytes=20 * per_block, max_batch_tokens=256, max_running=8, **UNHURRIED
    )
    asked = ask(engine, list(range(180)), max_tokens=70, ignore_eos=True)
    job = start(engine, JobSpec("j", LORA, 1), texts(1, longest=120))
    drive(engine, until=lambda: asked.done)
    (told,) = job.of("waiting")
    assert "memory" in told["reason"]
    drive(engine, job)
    assert job.handle is not None
    assert job.handle.state == "succeeded"
