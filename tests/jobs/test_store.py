"""The store: what was written is there, in order, for whoever opens it next."""

from __future__ import annotations

import io
import math
import os
from pathlib import Path

import pytest

from invivo.errors import Conflict, InvalidRequest, NotFound, Unavailable
from invivo.jobs import folder as folder_module
from invivo.jobs.folder import JobFolder, default_state
from invivo.jobs.store import JobStore


def add_job(store: JobStore, name: str = "poet", owner: str = "") -> str:
    return store.add_job(
        name=name,
        model="tiny",
        training_file="file-1",
        content="c",
        filename="data.jsonl",
        hyperparameters={"r": 4},
        metadata={"for": "a test"},
        owner=owner,
    ).id


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return JobStore(tmp_path / "jobs.sqlite3")


def test_jobs_are_listed_newest_first_in_pages_and_by_owner(store: JobStore) -> None:
    ids = [add_job(store, f"job-{i}", owner="ab"[i % 2]) for i in range(5)]
    assert [info.id for info in store.jobs()] == ids[::-1]
    assert [info.id for info in store.jobs(2)] == ids[:2:-1]
    assert [info.id for info in store.jobs(2, after=ids[3])] == [ids[2], ids[1]]
    assert [info.id for info in store.jobs(9, owner="b")] == [ids[3], ids[1]]
    with pytest.raises(NotFound):
        store.jobs(2, after="ftjob-none")


def test_a_job_that_goes_back_forgets_the_steps_after(store: JobStore, tmp_path: Path) -> None:
    job = add_job(store)
    for step in range(1, 6):
        store.step_done(job, step, math.inf if step == 2 else 1.0 / step, 10 * step)
    info = JobStore(tmp_path / "jobs.sqlite3").job(job)
    assert info.losses == [1.0, None, 1 / 3, 1 / 4, 1 / 5]
    assert (info.step, info.loss, info.trained_tokens) == (5, 1 / 5, 50)
    store.back_to(job, 3, 30)
    info = store.job(job)
    assert info.losses == [1.0, None, 1 / 3]
    assert (info.step, info.loss, info.trained_tokens) == (3, 1 / 3, 30)
    store.step_done(job, 3, 0.5, 30)
    assert store.job(job).losses == [1.0, None, 0.5]


def test_a_status_is_not_changed_behind_an_end(store: JobStore) -> None:
    job = add_job(store)
    assert store.set_job(job, unless=("cancelled",), status="cancelled")
    assert not store.set_job(job, unless=("cancelled",), status="running")
    assert store.job(job).status == "cancelled"


def test_events_come_newest_first_in_pages_and_as_json(store: JobStore) -> None:
    job, other = add_job(store), add_job(store, "other")
    for i in range(4):
        store.add_event(job, f"number {i}", data={"loss": math.nan, "at": {"i": i}})
    store.add_event(other, "not mine")
    events = store.events(job, 3, None)
    assert [event.message for event in events] == ["number 3", "number 2", "number 1"]
    assert events[0].data == {"loss": None, "at": {"i": 3}}
    assert [e.message for e in store.events(job, 3, events[-1].id)] == ["number 0"]
    with pytest.raises(InvalidRequest, match="after"):
        store.events(job, 3, "ftevent-x")
    with pytest.raises(NotFound):
        store.events("ftjob-none", 3, None)


def test_only_checkpoints_that_are_there_are_listed(store: JobStore, tmp_path: Path) -> None:
    job = add_job(store)
    store.step_done(job, 2, 0.5, 10)
    for step in (1, 2):
        path = tmp_path / f"step-{step}"
        path.mkdir()
        store.add_checkpoint(job, step, path)
    assert [c.metrics for c in store.checkpoints(job, 10, None)] == [{"train_loss": 0.5}, {}]
    (tmp_path / "step-1").rmdir()
    assert [c.step for c in store.checkpoints(job, 10, None)] == [2]
    store.forget_job(job)
    with pytest.raises(NotFound):
        store.checkpoints(job, 10, None)


# --- folders -----------------------------------------------------------------------------------
def test_one_process_changes_a_folder_and_others_may_look(tmp_path: Path) -> None:
    with JobFolder(tmp_path) as kept:
        file = kept.add_file("a.jsonl", io.BytesIO(b'{"text": "a"}\n\n{"text": "b"}'))
        with pytest.raises(Conflict, match=f"process {os.getpid()}"):
            JobFolder(tmp_path)
        with JobFolder(tmp_path, write=False) as looking:
            assert looking.files() == [file]
    assert (file.n_lines, file.bytes, file.status) == (2, 28, "processed")
    JobFolder(tmp_path).close()


def test_equal_files_are_kept_once_and_while_one_is_left(tmp_path: Path) -> None:
    with JobFolder(tmp_path) as kept:
        first = kept.add_file("a.txt", io.BytesIO(b"the cat"), owner="me")
        second = kept.add_file("b.txt", io.BytesIO(b"the cat"))
        path = kept.file_path(first.id)
        assert path == kept.file_path(second.id)
        assert [file.id for file in kept.files(owner="me")] == [first.id]
        kept.delete_file(first.id)
        assert path.read_bytes() == b"the cat"
        kept.delete_file(second.id)
        assert list((tmp_path / "files").iterdir()) == []
        with pytest.raises(NotFound):
            kept.delete_file(second.id)


@pytest.mark.parametrize(
    ("content", "why"), [(b"", "empty"), (b"\n \n", "empty"), (b"a\n\xff\n", "line 2 is not UTF-8")]
)
def test_files_that_are_no_text_say_so(tmp_path: Path, content: bytes, why: str) -> None:
    with JobFolder(tmp_path) as kept:
        file = kept.add_file("a.jsonl", io.BytesIO(content))
        assert file.status == "error"
        assert why in str(file.status_details)


def test_a_full_disk_leaves_nothing_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with JobFolder(tmp_path) as kept:
        monkeypatch.setattr(folder_module.os, "fsync", no_room)
        with pytest.raises(Unavailable, match="No space left"):
            kept.add_file("a.jsonl", io.BytesIO(b"text"))
        assert kept.files() == []
        assert list((tmp_path / "files").iterdir()) == []


def test_without_an_engine_jobs_can_be_put_off_called_off_and_forgotten(tmp_path: Path) -> None:
    with JobFolder(tmp_path) as kept:
        job = add_job(kept.store)
        assert kept.pause(job).status == "paused"
        assert kept.resume(job).status == "queued"
        with pytest.raises(Conflict, match="queued"):
            kept.delete(job)
        done = kept.cancel(job)
        assert done.status == "cancelled"
        assert done.finished_at is not None
        with pytest.raises(Conflict, match="cancelled"):
            kept.resume(job)
        kept.delete(job)
        assert kept.jobs() == []


def test_the_default_folder_is_one_for_every_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INVIVO_HOME", str(tmp_path))
    assert default_state("/models/mine", "0123456789abcdef") == (
        tmp_path / "jobs" / "mine-0123456789ab"
    )
    monkeypatch.delenv("INVIVO_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_state("a/b", "0123456789abcdef").parent == tmp_path / "invivo" / "jobs"
