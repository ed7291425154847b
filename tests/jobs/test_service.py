"""The job service on a real engine: from data to a served adapter, across processes and faults."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.engine.drive import ask
from tests.waiting import PATIENCE, hold_at_texts, wait_for

from invivo.engine import checkpoint
from invivo.engine.job_spec import Text
from invivo.errors import Conflict, InvalidRequest, NotFound
from invivo.jobs.data import TrainingData
from invivo.jobs.examples import ExampleReader
from invivo.jobs.service import JobService
from invivo.lm_jobs import ENDED, Hyperparameters, Job, JobInfo, JobRequest, start_job
from invivo.models.load import LoadedModel

if TYPE_CHECKING:
    from tests.jobs.conftest import Open, Running

DATA = [
    {
        "messages": [
            {"role": "user", "content": f"hello {i}"},
            {"role": "assistant", "content": f"the cat and the dog {i}" * (1 + i % 3)},
        ]
    }
    for i in range(10)
]
SETTINGS: dict[str, Any] = {"r": 4, "on": "q,v", "learning_rate": 1e-2, "batch_size": 3}


def begun(running: Running, name: str = "poet", **settings: Any) -> Job:
    return start_job(running.jobs, DATA, name=name, **(SETTINGS | settings))


def messages(job: Job) -> list[str]:
    return [event.message for event in reversed(job.events(1000))]


@pytest.fixture(scope="module")
def curve(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> list[float | None]:
    """Losses of the job of these tests when nothing disturbs it."""
    from tests.engine.drive import small_engine

    engine = small_engine(tiny, policy="temporal:1")
    jobs = JobService(engine, tiny, tmp_path_factory.mktemp("undisturbed"))
    engine.start()
    info = start_job(jobs, DATA, name="poet", **SETTINGS, n_epochs=4).wait(timeout=PATIENCE)
    engine.close()
    jobs.close()
    assert info.status == "succeeded"
    assert len(info.losses) == info.n_steps == 14  # 40 texts in batches of 3
    return info.losses


def test_a_finished_job_is_served_and_told_in_full(opened: Open, tmp_path: Path) -> None:
    running = opened()
    job = begun(running, metadata={"for": "a test"}, steps=8)
    info = job.wait(timeout=PATIENCE)
    assert info.status == "succeeded"
    assert info.fine_tuned_model == "tiny-llama:poet"
    assert (info.step, info.n_steps, len(info.losses)) == (8, 8, 8)
    assert info.loss == info.losses[-1]
    assert info.losses[-1] < info.losses[0]  # type: ignore[operator]
    assert info.metadata == {"for": "a test"}
    assert info.hyperparameters["on"] == ["q", "v"]
    assert info.finished_at is not None
    assert info.error is None
    assert messages(job)[:3] == [
        "Created: the file records.jsonl is being validated",
        messages(job)[1],
        "Started",
    ]
    assert messages(job)[1].startswith("The file is valid: 10 examples, ")
    assert messages(job)[-1] == "Succeeded: served as tiny-llama:poet"
    metrics = [event for event in job.events(100) if event.type == "metrics"]
    assert [event.data["step"] for event in reversed(metrics)] == list(range(1, 9))
    assert metrics[0].data["trained_tokens"] == info.trained_tokens > 0
    assert [c.step for c in job.checkpoints()] == [8, 7, 6]
    assert {path.name for path in (tmp_path / "state/adapters/poet").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    base = ask(running.engine, [5, 6, 7], max_tokens=4, logprobs=0)
    tuned = ask(running.engine, [5, 6, 7], max_tokens=4, logprobs=0, adapter="poet")
    wait_for(lambda: base.done and tuned.done)
    assert base.logprobs() != tuned.logprobs()


def test_a_restart_goes_on_and_the_curve_is_the_undisturbed_one(
    opened: Open, curve: list[float | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = opened()
    hold_at_texts(monkeypatch, first.engine, 7 * 3)
    job = begun(first, n_epochs=4)
    wait_for(lambda: job.info().step >= 5)
    first.close()

    second = opened()
    again = Job(job.id, second.jobs)
    info = again.wait(timeout=PATIENCE)
    assert info.status == "succeeded"
    assert info.losses == curve
    assert any(message.startswith("Goes on from the checkpoint of") for message in messages(again))

    # The adapter is there after one more restart, and gone once the job is deleted.
    second.close()
    third = opened()
    assert [adapter.name for adapter in third.engine.adapters.list()] == ["poet"]
    third.jobs.delete(job.id)
    with pytest.raises(NotFound):
        third.jobs.job(job.id)
    third.close()
    assert opened().engine.adapters.list() == []


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.engine.drive import small_engine
from invivo.jobs.data import TrainingData
from invivo.jobs.examples import ExampleReader
from invivo.jobs.service import JobService
from invivo.models.load import load_model

model = load_model(sys.argv[2])
engine = small_engine(model, policy="temporal:1")
jobs = JobService(engine, model, Path(sys.argv[3]))
given = TrainingData.next

def next_text(data):
    while data.position() == {"epoch": 3, "index": 0, "examples": data.position()["examples"]}:
        time.sleep(0.01)  # in step 11 of 14, until it is killed
    return given(data)

TrainingData.next = next_text
engine.start()
while True:
    time.sleep(0.002)
    print(jobs.jobs()[0].step, flush=True)
"""


def test_kill_9_loses_at_most_what_came_after_the_last_checkpoint(
    opened: Open, tiny: LoadedModel, tmp_path: Path, curve: list[float | None]
) -> None:
    first = opened(started=False)
    file = first.jobs.add_file("d.jsonl", io.BytesIO(lines(DATA)))
    asked = Hyperparameters.of(SETTINGS | {"n_epochs": 4, "checkpoint_every": 2})
    job = first.jobs.create(JobRequest(file.id, asked, "poet"))
    first.close()
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), root, tiny.name, tmp_path / "state"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root / "src")},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 5:
            break
    process.send_signal(signal.SIGKILL)
    process.wait(PATIENCE)

    second = opened()
    info = Job(job.id, second.jobs).wait(timeout=PATIENCE)
    assert info.status == "succeeded"
    assert info.losses == curve
    started = [m for m in messages(Job(job.id, second.jobs)) if m.startswith("Goes on")]
    assert len(started) == 1
    assert int(started[0].rsplit(" ", 1)[1]) >= 2  # that of step 4 may have been half written


def lines(records: list[Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def test_a_paused_job_stays_paused_until_it_is_resumed(
    opened: Open, curve: list[float | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = opened()
    hold_at_texts(monkeypatch, first.engine, 5 * 3, 10 * 3 + 1)
    job = begun(first, n_epochs=4)
    wait_for(lambda: job.info().step >= 3)
    paused = job.pause()
    assert paused.status == "paused"
    assert job.wait(timeout=PATIENCE).status == "paused"
    assert job.pause().status == "paused"
    wait_for(lambda: any(c.step == paused.step for c in job.checkpoints()))
    assert first.engine.stats().kv["used"] == 0
    assert job.resume().status == "running"
    wait_for(lambda: job.info().step >= paused.step + 1)
    job.pause()
    first.close()

    second = opened()
    again = Job(job.id, second.jobs)
    # Jobs are prepared in order: when the next one runs, the paused one had its turn.
    assert begun(second, "next", steps=1).wait(timeout=PATIENCE).status == "succeeded"
    assert again.status == "paused"
    again.resume()
    info = again.wait(timeout=PATIENCE)
    assert info.status == "succeeded"
    assert info.losses == curve
    with pytest.raises(Conflict, match="succeeded"):
        again.resume()


def test_jobs_wait_for_their_turn_and_can_be_called_off_while_they_wait(opened: Open) -> None:
    running = opened(max_jobs=1)
    first = begun(running, "first", steps=10**6)
    second, third = begun(running, "second", steps=2), begun(running, "third", steps=2)
    wait_for(lambda: first.info().step >= 1)
    assert (second.status, third.status) == ("queued", "queued")
    with pytest.raises(Conflict, match="has not ended"):
        begun(running, "second")
    assert second.cancel().status == "cancelled"
    info = first.cancel()
    assert info.status == "cancelled"
    assert info.finished_at is not None
    with pytest.raises(Conflict, match="cancelled"):
        first.cancel()
    assert third.wait(timeout=PATIENCE).status == "succeeded"
    assert [info.name for info in running.jobs.jobs()] == ["third", "second", "first"]


def test_a_paused_job_lets_the_next_one_run_and_waits_for_its_turn(opened: Open) -> None:
    running = opened(max_jobs=1)
    first = begun(running, "first", steps=10**6)
    wait_for(lambda: first.info().step >= 1)
    second = begun(running, "second", steps=10**6)
    first.pause()
    wait_for(lambda: second.info().step >= 1)
    assert first.resume().status == "queued"
    assert messages(first)[-1].startswith("Queued again")
    second.cancel()
    before = first.info().step
    wait_for(lambda: first.info().step > before)
    assert first.cancel().status == "cancelled"


class HeldReader:
    """The preparer stops before it reads a job's data, until ``go_on``."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.reading, self.go_on = threading.Event(), threading.Event()
        read = ExampleReader.read

        def held(reader: ExampleReader, *arguments: Any) -> Any:
            self.reading.set()
            assert self.go_on.wait(PATIENCE)
            return read(reader, *arguments)

        patch.setattr(ExampleReader, "read", held)

    def created(self, running: Running) -> Job:
        """A job whose data is about to be read."""
        file = running.jobs.add_file("d.jsonl", io.BytesIO(lines(DATA)))
        asked = Hyperparameters.of(SETTINGS | {"steps": 2})
        job = running.jobs.create(JobRequest(file.id, asked, "poet"))
        assert self.reading.wait(PATIENCE)
        return Job(job.id, running.jobs)

    def pass_by(self, running: Running) -> None:
        """Wait until the preparer has done what it was at."""
        self.go_on.set()
        running.jobs._preparer.submit(lambda: None).result(PATIENCE)


def test_a_job_that_is_called_off_while_it_is_prepared_never_runs(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, reader = opened(), HeldReader(monkeypatch)
    job = reader.created(running)
    set_job = running.jobs.store.set_job

    def at_the_last_moment(job_id: str, **fields: Any) -> bool:
        if fields.get("status") == "cancelled" and not reader.go_on.is_set():
            locked = running.jobs._lock.locked()
            reader.go_on.set()
            if not locked:
                wait_for(lambda: job_id in running.jobs._live)
        return set_job(job_id, **fields)

    monkeypatch.setattr(running.jobs.store, "set_job", at_the_last_moment)
    assert job.cancel().status == "cancelled"
    reader.pass_by(running)
    assert job.id not in running.jobs._live
    assert running.engine.stats().jobs == []
    assert job.status == "cancelled"


def test_a_job_that_was_prepared_too_late_is_left_to_the_next_service(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, reader = opened(), HeldReader(monkeypatch)
    job = reader.created(first)
    first.engine.close()
    reader.pass_by(first)
    assert job.status == "queued"
    first.close()
    assert Job(job.id, opened().jobs).wait(timeout=PATIENCE).status == "succeeded"


def test_whoever_sees_how_a_job_stands_finds_it_told(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = opened()
    store, seen = running.jobs.store, []
    set_job = store.set_job

    def looked_at(job_id: str, **fields: Any) -> bool:
        changed = set_job(job_id, **fields)
        if "status" in fields:
            seen.append((fields["status"], store.events(job_id, 1, None)[0].message))
        return changed

    monkeypatch.setattr(store, "set_job", looked_at)
    job = begun(running, steps=10**6)
    wait_for(lambda: job.status == "running")
    job.pause()
    job.resume()
    job.cancel()
    wait_for(lambda: job.id not in running.jobs._live)
    assert [(status, said) for status, said in seen if status != "queued"] == [
        ("running", "Started"),
        ("paused", "Paused: asked for"),
        ("running", "Resumed"),
        ("cancelled", "Cancelled"),
    ]


def test_a_job_that_gets_nothing_beside_requests_has_an_event_that_says_why(opened: Open) -> None:
    running = opened()
    job = begun(running, steps=10**6)
    wait_for(lambda: job.info().step >= 1)
    live = running.jobs._live[job.id]
    event = {"event": "waiting", "step": 1, "reason": "requests take it all", "time": time.time()}
    running.jobs._hear(live, event)
    wait_for(lambda: "Waits: requests take it all" in messages(job))
    assert job.info().status == "running"
    assert job.cancel().status == "cancelled"


def test_bad_data_fails_the_job_with_an_event_for_every_line(opened: Open) -> None:
    running = opened()
    bad = [DATA[0], {"text": 3}, {"messages": [{"role": "user", "content": "a"}]}]
    file = running.jobs.add_file("bad.jsonl", io.BytesIO(lines(bad)))
    info = Job(running.jobs.create(JobRequest(file.id)).id, running.jobs).wait(timeout=PATIENCE)
    assert info.status == "failed"
    assert info.error is not None
    assert info.error["code"] == "invalid_training_file"
    assert "line 2: text: must be a text" in info.error["message"]
    told = [e.data["line"] for e in running.jobs.events(info.id, 100) if "line" in e.data]
    assert sorted(told) == [2, 3]
    # From Python it is an error at once, and nothing is left of it.
    with pytest.raises(InvalidRequest, match="line 2"):
        start_job(running.jobs, bad)
    assert len(running.jobs.jobs()) == len(running.jobs.files()) == 1


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"on": "nowhere"}, "on"),
        ({"r": 0}, "r"),
        ({"r": 100}, "r"),
        ({"rank": 3}, "rank"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"batch_size": 0}, "batch_size"),
        ({"layers": [9]}, "layers"),
        ({"method": "ia3", "r": 3}, "r"),
        ({"max_length": 10**6}, "max_length"),
        ({"name": "a b"}, "name"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_their_names(
    opened: Open, settings: dict[str, Any], field: str
) -> None:
    running = opened()
    with pytest.raises(InvalidRequest) as refused:
        start_job(running.jobs, DATA, **settings)
    assert refused.value.field == field
    assert running.jobs.jobs() == []
    assert running.jobs.files() == []


def test_unknown_files_and_jobs_are_not_found(opened: Open) -> None:
    running = opened()
    with pytest.raises(NotFound, match="file_id"):
        running.jobs.create(JobRequest("file-none"))
    for call in (running.jobs.job, running.jobs.cancel, running.jobs.pause, running.jobs.resume):
        with pytest.raises(NotFound, match="job_id"):
            call("ftjob-none")


def test_a_file_in_use_is_not_deleted(opened: Open) -> None:
    running = opened()
    job = begun(running, steps=10**6)
    file_id = job.info().training_file
    with pytest.raises(Conflict, match=job.id):
        running.jobs.delete_file(file_id)
    job.cancel()
    running.jobs.delete_file(file_id)
    assert file_id not in {file.id for file in running.jobs.files()}


def test_a_full_disk_pauses_the_job_and_says_why(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoint.write_adapter

    def no_room(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    running = opened()
    monkeypatch.setattr(checkpoint, "write_adapter", no_room)
    job = begun(running, steps=8, checkpoint_every=3)
    info = job.wait(timeout=PATIENCE)
    assert info.status == "paused"
    assert info.error is not None
    assert info.error["code"] == "checkpoint_failed"
    assert "No space left on device" in info.error["message"]
    monkeypatch.setattr(checkpoint, "write_adapter", write)
    job.resume()
    info = job.wait(timeout=PATIENCE)
    assert (info.status, info.error, len(info.losses)) == ("succeeded", None, 8)


def test_losses_that_are_not_finite_are_told_and_end_the_job(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = TrainingData.next

    def broken(data: TrainingData) -> Text | None:
        text = given(data)
        assert text is not None
        late = data.position()["index"] > 6
        return replace(text, weights=[math.nan] * len(text.tokens)) if late else text

    monkeypatch.setattr(TrainingData, "next", broken)
    running = opened()
    job = begun(running, steps=50, batch_size=1)
    info = job.wait(timeout=PATIENCE)
    assert info.status == "failed"
    assert info.error is not None
    assert "no finite loss" in info.error["message"]
    assert len(info.losses) == 8  # two were skipped, the third in a row ended the job
    skipped = [event for event in job.events(100) if event.level == "warn"]
    assert skipped
    assert skipped[0].data["step"] == info.step
    assert info.losses[-1] is None


def test_a_folder_belongs_to_one_model_and_one_process(
    opened: Open, tiny: LoadedModel, tmp_path: Path
) -> None:
    running = opened()
    with pytest.raises(Conflict, match=f"process {os.getpid()}"):
        JobService(running.engine, tiny, tmp_path / "state")
    running.close()
    other = replace(tiny, fingerprint="another")
    with pytest.raises(Conflict, match="another model"):
        JobService(running.engine, other, tmp_path / "state")
    opened()


def test_speed_and_end_are_estimated_while_it_runs(opened: Open) -> None:
    running = opened()
    job = begun(running, steps=10**5)
    seen: list[JobInfo] = []
    wait_for(lambda: seen.append(job.info()) or seen[-1].tokens_per_second is not None)
    info = seen[-1]
    assert info.tokens_per_second is not None
    assert info.tokens_per_second > 0
    assert info.estimated_finish is not None
    assert info.estimated_finish > time.time()
    assert info.status not in ENDED


@pytest.mark.parametrize("method", ["ia3", "adapter", "prefix", "soft_prompt", "steering"])
def test_every_method_gives_an_adapter_that_loads_again(opened: Open, method: str) -> None:
    running = opened()
    info = start_job(running.jobs, DATA, name="other", method=method, steps=2).wait(
        timeout=PATIENCE
    )
    assert info.status == "succeeded"
    running.close()
    assert [adapter.name for adapter in opened().engine.adapters.list()] == ["other"]
