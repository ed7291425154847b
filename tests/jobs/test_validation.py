"""Held-out data, result files and served checkpoints of jobs."""

from __future__ import annotations

import csv
import io
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.engine.drive import ask
from tests.jobs.test_service import DATA, SETTINGS, messages
from tests.waiting import PATIENCE, hold_at_texts, wait_for

from invivo.errors import Conflict, InvalidRequest, NotFound
from invivo.jobs.store import JobStore
from invivo.lm_jobs import BAD_VALIDATION, RESULTS, Job, Validation, start_job

if TYPE_CHECKING:
    from tests.jobs.conftest import Open, Running

HELD_OUT = DATA[:3]
GREEDY: dict[str, Any] = {"max_tokens": 3, "temperature": 0.0, "logprobs": 0}


def begun(running: Running, name: str = "poet", **settings: Any) -> Job:
    return start_job(running.jobs, DATA, validation=HELD_OUT, name=name, **(SETTINGS | settings))


def test_the_held_out_loss_is_told_in_the_job_its_events_and_its_checkpoints(
    opened: Open,
) -> None:
    running = opened()
    job = begun(running, steps=8, validate_every=3, checkpoint_every=3)
    info = job.wait(timeout=PATIENCE)
    assert info.status == "succeeded"
    assert info.validation_file is not None
    assert [one.step for one in info.validations] == [3, 6, 8]
    assert info.validations[-1].loss < info.validations[0].loss  # type: ignore[operator]
    assert info.hyperparameters["validate_every"] == 3
    assert messages(job)[1].endswith("; 3 examples are held out")
    told = [event for event in job.events(100) if "valid_loss" in event.data]
    assert [event.data["step"] for event in told] == [8, 6, 3]
    assert all(event.type == "metrics" for event in told)
    assert told[0].data["full_valid_loss"] == info.validations[-1].loss
    kept = job.checkpoints()
    assert [one.step for one in kept] == [8, 6, 3]
    assert kept[0].metrics == {
        "train_loss": info.losses[-1],
        "train_mean_token_accuracy": kept[0].metrics["train_mean_token_accuracy"],
        "valid_loss": info.validations[-1].loss,
        "valid_mean_token_accuracy": info.validations[-1].accuracy,
    }


def test_held_out_data_changes_nothing_of_the_training(opened: Open) -> None:
    running = opened()
    info = begun(running, steps=5, validate_every=1).wait(timeout=PATIENCE)
    plain = start_job(running.jobs, DATA, name="plain", steps=5, **SETTINGS)
    assert info.losses == plain.wait(timeout=PATIENCE).losses
    assert plain.info().validations == []


def test_a_result_file_has_the_metrics_of_every_step(opened: Open) -> None:
    running = opened()
    job = begun(running, steps=4, validate_every=2)
    info = job.wait(timeout=PATIENCE)
    [file_id] = info.result_files
    file = running.jobs.file(file_id)
    assert (file.purpose, file.filename) == (RESULTS, "step_metrics.csv")
    rows = list(csv.DictReader(io.StringIO(job.results())))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert [float(row["train_loss"]) for row in rows] == info.losses
    assert all(0.0 <= float(row["train_accuracy"]) <= 1.0 for row in rows)
    held = [row["valid_loss"] for row in rows]
    assert held[0] == held[2] == ""
    assert [float(held[1]), float(held[3])] == [one.loss for one in info.validations]
    with pytest.raises(InvalidRequest, match="metrics") as caught:
        start_job(running.jobs, file_id)
    assert caught.value.field == "training_file"


def test_a_cancelled_job_keeps_its_metrics_and_one_without_steps_has_none(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = opened()
    hold_at_texts(monkeypatch, running.engine, 6)
    job = begun(running, steps=100)
    wait_for(lambda: job.info().step == 2)
    assert job.results() == ""
    job.cancel()
    assert job.results().count("\n") == 3
    other = opened("other")
    hold_at_texts(monkeypatch, other.engine, 0)
    idle = begun(other, steps=3)
    idle.cancel()
    assert idle.info().result_files == []


def test_checkpoints_are_served_by_their_names(opened: Open) -> None:
    running = opened()
    job = begun(running, steps=6, checkpoint_every=2, learning_rate=5e-2)
    job.wait(timeout=PATIENCE)
    names = [one.fine_tuned_model_checkpoint for one in job.checkpoints()]
    assert names == [f"tiny-llama:poet:ckpt-step-{step}" for step in (6, 4, 2)]

    def answer(adapter: str | None) -> list[float]:
        asked = ask(running.engine, [5, 6, 7], **GREEDY, adapter=adapter)
        wait_for(lambda: asked.done)
        return asked.logprobs()

    assert answer("poet:ckpt-step-6") == answer("poet")
    assert len({tuple(answer(a)) for a in (None, "poet:ckpt-step-2", "poet:ckpt-step-4")}) == 3
    for name in ("poet:ckpt-step-3", "other:ckpt-step-2", "poet:ckpt-step-"):
        with pytest.raises(NotFound):
            ask(running.engine, [5], adapter=name)
    # The name is that of the newest job that has such a checkpoint.
    before = answer("poet:ckpt-step-2")
    begun(running, steps=2, checkpoint_every=2, learning_rate=1e-1).wait(timeout=PATIENCE)
    assert answer("poet:ckpt-step-2") != before


def test_bad_held_out_data_names_its_file_and_lines(opened: Open) -> None:
    running = opened()
    with pytest.raises(InvalidRequest, match="line 2") as caught:
        start_job(running.jobs, DATA, validation=[DATA[0], {"txt": "x"}], name="poet")
    assert caught.value.field == "validation"
    assert "validation data" in caught.value.message
    assert running.jobs.files() == []
    good = running.jobs.add_file("a.jsonl", io.BytesIO(b'{"text": "the cat"}\n'))
    bad = running.jobs.add_file("b.jsonl", io.BytesIO(b"nonsense\n"))
    with pytest.raises(InvalidRequest):
        start_job(running.jobs, good.id, validation=bad.id, name="poet")
    with pytest.raises(NotFound) as missing:
        start_job(running.jobs, good.id, validation="file-none")
    assert missing.value.field == "validation_file"
    assert BAD_VALIDATION == "invalid_validation_file"


def test_a_validation_file_is_kept_while_its_job_needs_it(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = opened()
    hold_at_texts(monkeypatch, running.engine, 0)
    held = running.jobs.add_file("held.jsonl", io.BytesIO(b'{"text": "the cat"}\n'))
    job = start_job(running.jobs, DATA, validation=held.id, steps=3, **SETTINGS)
    with pytest.raises(Conflict):
        running.jobs.delete_file(held.id)
    job.cancel()
    running.jobs.delete_file(held.id)


def test_a_store_of_an_earlier_version_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite3"
    store = JobStore(path)
    job = store.add_job(
        name="poet",
        model="tiny",
        training_file="file-1",
        content="c",
        filename="a.jsonl",
        hyperparameters={},
        metadata={},
        owner="",
    )
    store.step_done(job.id, 1, 0.5, 10)
    store.close()
    with sqlite3.connect(path) as connection:  # as it was before there was held-out data
        connection.execute("DROP TABLE validations")
        connection.execute("ALTER TABLE losses DROP COLUMN accuracy")
        for name in ("validation_file", "validation_content", "validation_filename"):
            connection.execute(f"ALTER TABLE jobs DROP COLUMN {name}")
        connection.execute("ALTER TABLE jobs DROP COLUMN result_files")
    connection.close()
    store = JobStore(path)
    info = store.job(job.id)
    assert (info.losses, info.validations, info.result_files) == ([0.5], [], [])
    store.step_done(job.id, 2, 0.4, 20, 0.9)
    store.validated(job.id, 2, 0.6, 0.8)
    store.validated(job.id, 1, float("inf"), 0.1)
    assert store.job(job.id).validations == [Validation(1, None, 0.1), Validation(2, 0.6, 0.8)]
    store.back_to(job.id, 1, 10)
    assert [one.step for one in store.job(job.id).validations] == [1]
    store.close()
