"""Held-out texts of a job: their loss is that of a plain pass, and they leave no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.drive import small_engine
from tests.engine.test_finetune import (
    LORA,
    UNHURRIED,
    VIRTUAL,
    Job,
    Listed,
    drive,
    nothing_is_held,
    random_requests,
    texts,
    trained,
)
from tests.tiny import tiny_loaded

from invivo.engine.bypasses import TrainBypass, checked_specs
from invivo.engine.engine import Engine
from invivo.engine.job_spec import JobSpec
from invivo.kernels.paging import blocks_needed, contiguous_layout
from invivo.models.cache import allocate_kv_cache
from invivo.models.load import LoadedModel

HELD_OUT = {"n": 3, "seed": 9}


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return tiny_loaded(Path(tmp_path_factory.mktemp("exact")), dtype=torch.float64)


def held_out(**options: Any) -> Listed:
    found = texts(**(HELD_OUT | options))
    found.once = True
    return found


def validating(
    engine: Engine, spec: JobSpec, data: Listed, held: Listed, folder: Path | None = None
) -> Job:
    job = Job()
    job.handle = engine.finetune(spec, data, job.events.append, folder, validation=held)
    return job


def plain_outcome(
    model: LoadedModel, spec: JobSpec, parameters: dict[str, torch.Tensor], data: Listed
) -> tuple[float, float]:
    """Loss and share of right tokens by a pass over each text alone."""
    bypass = TrainBypass(model.config, checked_specs(model.config, spec.bypasses), parameters)
    n = bypass.n_virtual
    loss, right, count = 0.0, 0, 0
    for text in data.texts:
        tokens = torch.tensor([0] * n + list(text.tokens))
        cache = allocate_kv_cache(
            model.config,
            n_blocks=blocks_needed([len(tokens)]),
            block_size=16,
            device="cpu",
            dtype=torch.float64,
        )
        view = bypass.window(0, len(tokens))
        with torch.no_grad():
            layout = contiguous_layout([len(tokens)])
            hidden = model.decoder(tokens, layout, cache, bypass=view)[n:]
            logprobs = model.decoder.logits(hidden).log_softmax(-1)
        for row, label in enumerate(text.labels):
            if label >= 0:
                loss -= float(logprobs[row, label])
                right += int(logprobs[row].argmax()) == label
                count += 1
    return loss / count, right / count


@pytest.mark.parametrize(
    ("bypasses", "options"),
    [(LORA, {}), (VIRTUAL, {"mode": "rerun"}), (LORA, {"order": "layer"})],
)
def test_the_held_out_loss_is_that_of_a_plain_pass(
    exact: LoadedModel, bypasses: Any, options: dict[str, Any]
) -> None:
    spec = JobSpec("j", bypasses, 4, 0.01, gradient_accumulation=2, validate_every=3, **options)
    engine = small_engine(exact, max_batch_tokens=32, max_running=8, **UNHURRIED)
    asked = random_requests(engine, 6)
    job = validating(engine, spec, texts(), held_out())
    drive(engine, job)
    drive(engine, until=lambda: all(one.done for one in asked))
    told = job.of("validation")
    assert [event["step"] for event in told] == [3, 4]
    loss, accuracy = plain_outcome(exact, spec, trained(engine, job), held_out())
    assert told[-1]["loss"] == pytest.approx(loss, abs=1e-9)
    assert told[-1]["accuracy"] == pytest.approx(accuracy, abs=1e-12)
    kinds = job.kinds()
    assert kinds.index("validation") > [i for i, k in enumerate(kinds) if k == "step"][2]
    assert kinds[-3:] == ["validation", "published", "succeeded"]
    nothing_is_held(engine)


def test_training_is_the_same_with_held_out_texts_and_without(exact: LoadedModel) -> None:
    spec = JobSpec("j", LORA, 5, 0.01, gradient_accumulation=2, validate_every=1)
    engine = small_engine(exact, policy="temporal:1")
    with_some = validating(engine, spec, texts(), held_out())
    drive(engine, with_some)
    other = small_engine(exact, policy="temporal:1")
    without = Job()
    without.handle = other.finetune(spec, texts(), without.events.append)
    drive(other, without)
    assert with_some.handle is not None
    assert with_some.handle.losses == without.handle.losses
    assert len(with_some.of("validation")) == 5
    assert not without.of("validation")
    for event in with_some.of("step"):
        assert 0.0 <= event["accuracy"] <= 1.0


def test_data_that_ends_early_is_validated_at_its_last_step(exact: LoadedModel) -> None:
    spec = JobSpec("j", LORA, 50, 0.01, gradient_accumulation=2)
    engine = small_engine(exact, **UNHURRIED)
    data = texts(5)
    data.once = True
    job = validating(engine, spec, data, held_out())
    drive(engine, job)
    assert [event["step"] for event in job.of("validation")] == [3]


def test_a_job_that_is_paused_among_held_out_texts_goes_on_there(exact: LoadedModel) -> None:
    spec = JobSpec("j", LORA, 2, 0.01, validate_every=1)
    engine = small_engine(exact, **UNHURRIED)
    job = validating(engine, spec, texts(), held_out())
    assert job.handle is not None
    inner = job.handle._job

    def among() -> bool:
        sequence = inner.sequence
        return sequence is not None and sequence.held_out and inner.validation_due

    drive(engine, until=among)
    job.handle.pause()
    drive(engine, until=lambda: job.handle is not None and job.handle.state == "paused")
    nothing_is_held(engine)
    job.handle.resume()
    drive(engine, job)
    assert [event["step"] for event in job.of("validation")] == [1, 2]
    loss, _ = plain_outcome(exact, spec, trained(engine, job), held_out())
    assert job.of("validation")[-1]["loss"] == pytest.approx(loss, abs=1e-9)


def test_a_job_that_goes_on_from_a_checkpoint_looks_at_its_step_again(
    exact: LoadedModel, tmp_path: Path
) -> None:
    spec = JobSpec("j", LORA, 4, 0.01, validate_every=2, checkpoint_every=1)
    engine = small_engine(exact, policy="temporal:1")
    undisturbed = validating(engine, spec, texts(), held_out())
    drive(engine, undisturbed)

    first = small_engine(exact, policy="temporal:1")
    job = validating(first, spec, texts(), held_out(), tmp_path / "job")
    drive(first, until=lambda: bool(job.of("validation")))
    assert job.handle is not None
    job.handle.stop()
    drive(first, job)
    second = small_engine(exact, policy="temporal:1")
    again = validating(second, spec, texts(), held_out(), tmp_path / "job")
    drive(second, again)
    expected = {e["step"]: e["loss"] for e in undisturbed.of("validation")}
    assert {e["step"]: e["loss"] for e in again.of("validation")} == expected


def test_a_held_out_text_that_does_not_fit_ends_the_job_alone(exact: LoadedModel) -> None:
    engine = small_engine(exact, **UNHURRIED)
    long = held_out(n=1)
    long.texts[0] = type(long.texts[0])([1] * 100_000, [1] * 100_000)
    job = validating(engine, JobSpec("j", LORA, 2, 0.01), texts(), long)
    drive(engine, job)
    assert job.kinds()[-1] == "failed"
    nothing_is_held(engine)
