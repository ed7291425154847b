"""``invivo finetune`` and ``invivo jobs`` on a tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pyarrow
import pytest
from pyarrow import parquet
from tests.waiting import PATIENCE, hold_at_texts, wait_for

import invivo as library
from invivo import lm_jobs

if TYPE_CHECKING:
    from tests.cli.conftest import Invivo

SETTINGS = ("--on", "q,v", "--r", "4", "--lr", "0.01", "--batch-size", "2")


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "chats.jsonl"
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"hello {i}"},
                {"role": "assistant", "content": "the cat"},
            ]
        }
        for i in range(6)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_a_file_becomes_an_adapter_that_chat_can_load(
    invivo: Invivo, tiny: str, data: str, tmp_path: Path
) -> None:
    out = tmp_path / "poet"
    ran = invivo("finetune", data, "-m", tiny, "--steps", "5", *SETTINGS, "--out", str(out))
    assert ran.code == 0, ran.err
    assert ran.out.strip() == str(out)
    assert "step 5 of 5, loss" in ran.err
    assert f"invivo chat -m {tiny} --adapter poet={out} --use poet" in ran.err
    with library.load(tiny, kv_bytes=8 << 20, adapters={"poet": out}) as lm:
        assert lm.adapters()[0].rank == 4
    further = invivo(
        *("finetune", data, "-m", tiny, "--start", str(out), "--steps", "2", "--json"),
        *("--out", str(tmp_path / "poet2")),
    )
    assert further.code == 0, further.err
    assert further.json()["hyperparameters"]["start"] == "poet"
    first = invivo("jobs", "show", "poet", "--state", str(out / "job"), "--json").json()
    assert further.json()["losses"][0] < first["losses"][0]
    again = invivo("finetune", data, "-m", tiny, "--out", str(out))
    assert again.code == 1
    assert "Add --resume" in again.err

    listed = invivo("jobs", "list", "--state", str(out / "job"), "--json").json()
    assert [job["status"] for job in listed] == ["succeeded"]
    shown = invivo("jobs", "show", "poet", "--state", str(out / "job"), "--json").json()
    assert len(shown["losses"]) == 5
    events = invivo("jobs", "events", "poet", "--state", str(out / "job"), "--json").lines()
    assert events[-1]["message"] == "Succeeded: served as tiny-llama:poet"
    assert "5 of 5" in invivo("jobs", "show", "poet", "--state", str(out / "job")).out
    deleted = invivo("jobs", "delete", "poet", "--state", str(out / "job"))
    assert "poet is deleted" in deleted.err
    assert invivo("jobs", "list", "--state", str(out / "job"), "--json").json() == []


def test_what_comes_out_of_a_model_that_only_continues_texts_is_tried_by_generate(
    invivo: Invivo, tmp_path: Path
) -> None:
    data, out = tmp_path / "texts.txt", tmp_path / "poet"
    data.write_text("The cat sat on the mat.\n")
    given = ("finetune", str(data), "-m", "gla-small", "--steps", "1")
    ran = invivo(*given, *SETTINGS, "--out", str(out))
    assert ran.code == 0, ran.err
    assert f"invivo generate -m gla-small --adapter poet={out} --use poet 'Once" in ran.err
    tried = invivo(
        *("generate", "-m", "gla-small", "--adapter", f"poet={out}", "--use", "poet"),
        *("Once upon a time", "-n", "2"),
    )
    assert tried.code == 0, tried.err


def test_held_out_examples_of_a_table_are_shown(
    invivo: Invivo, tiny: str, data: str, tmp_path: Path
) -> None:
    held, out = tmp_path / "held.parquet", tmp_path / "judged"
    rows = [{"text": "the cat and the dog"}, {"text": "hello"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), held)
    ran = invivo(
        *("finetune", data, "-m", tiny, "--steps", "4", *SETTINGS, "--out", str(out)),
        *("--validation", str(held), "--validate-every", "2", "--keep-checkpoints", "1"),
    )
    assert ran.code == 0, ran.err
    assert "held-out loss" in ran.err
    shown = invivo("jobs", "show", "judged", "--state", str(out / "job"))
    assert "held-out loss" in shown.out
    assert "tiny-llama:judged:ckpt-step-4" in shown.out
    assert "ckpt-step-3" not in shown.out
    told = invivo("jobs", "show", "judged", "--state", str(out / "job"), "--json").json()
    assert [one["step"] for one in told["validations"]] == [2, 4]
    again = invivo("finetune", "--out", str(out), "--resume", "--validation", str(held))
    assert again.code == 2


def test_an_interrupted_job_leaves_a_checkpoint_and_goes_on(
    invivo: Invivo, tiny: str, data: str, tmp_path: Path
) -> None:
    out = tmp_path / "poet"
    command = ["finetune", data, "-m", tiny, "--steps", "1000000", *SETTINGS, "--out", str(out)]
    # Tests that run in the background of a shell would hand on that the signal is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "invivo.cli", *command],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(library.__file__).parents[1])},
        )
    finally:
        signal.signal(signal.SIGINT, before)
    database = out / "job/jobs.sqlite3"
    deadline = time.monotonic() + PATIENCE
    try:
        while True:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
            if database.exists():
                listed = invivo("jobs", "list", "--state", str(out / "job"), "--json")
                if listed.code == 0 and listed.json() and listed.json()[0]["step"] >= 3:
                    break
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "go on with: invivo finetune" in err
    assert "Traceback" not in err
    state = str(out / "job")
    job = invivo("jobs", "list", "--state", state, "--json").json()[0]
    assert job["status"] == "paused"

    # It is not waited for here: called off, and the command says so.
    assert invivo("jobs", "cancel", "poet", "--state", state).code == 0
    ran = invivo("finetune", "-m", tiny, "--out", str(out), "--resume")
    assert ran.code == 1
    assert "the job is cancelled" in ran.err


def test_an_interruption_before_the_first_step_puts_the_job_off_too(
    invivo: Invivo, tiny: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_seconds: float) -> None:
        raise KeyboardInterrupt

    out, state = str(tmp_path / "poet"), str(tmp_path / "poet" / "job")
    command = ("finetune", data, "-m", tiny, "--steps", "1000000", *SETTINGS, "--out", out)
    with monkeypatch.context() as patch:  # while it waits until the data has been read
        patch.setattr(lm_jobs, "time", SimpleNamespace(sleep=interrupted, monotonic=time.monotonic))
        ran = invivo(*command)
    assert ran.code == 130
    assert f"go on with: invivo finetune -m {tiny} --out {out} --resume" in ran.err
    (job,) = invivo("jobs", "list", "--state", state, "--json").json()
    assert job["status"] == "paused"


def test_a_job_that_was_put_off_is_finished_by_resume(
    invivo: Invivo, tiny: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "poet"
    with library.load(tiny, kv_bytes=8 << 20, state=out / "job") as lm:
        hold_at_texts(monkeypatch, lm.engine, 5 * 4)
        job = lm.finetune(data, name="poet", steps=150, r=4, on="q,v")
        wait_for(lambda: job.info().step >= 3)
        stopped = job.pause()
    assert stopped.status == "paused"
    ran = invivo("finetune", "-m", tiny, "--out", str(out), "--resume", "--json")
    assert ran.code == 0, ran.err
    assert ran.json()["step"] == 150
    assert ran.json()["losses"][: stopped.step] == stopped.losses
    assert (out / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "DATA: is missing"),
        (("--resume",), "goes with --out"),
        (("DATA", "--resume", "--out", "x"), "goes with --out"),
        (("DATA", "--on", "nowhere"), "on: the model has no linear map of this name"),
        (("DATA", "--method", "magic"), "method: must be one of"),
        (("missing.jsonl",), "data: cannot be read: No such file"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    invivo: Invivo,
    tiny: str,
    data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [data if argument == "DATA" else argument for argument in arguments]
    ran = invivo("finetune", *given, "-m", tiny)
    assert ran.code in (1, 2)
    assert expected in ran.err


def test_bad_lines_are_named_and_leave_room_for_another_try(
    invivo: Invivo, tiny: str, data: str, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "the cat"}\n{"txt": "the dog"}\n')
    out = str(tmp_path / "out")
    ran = invivo("finetune", str(bad), "-m", tiny, "--out", out)
    assert ran.code == 2
    assert "line 2: has none of the fields" in ran.err
    ran = invivo("finetune", data, "-m", tiny, "--out", out, "--steps", "1", "--json")
    assert ran.code == 0, ran.err
    assert ran.json()["status"] == "succeeded"
    assert ran.json()["adapter"] == out


def test_jobs_of_this_machine_are_those_in_the_data_folder(
    invivo: Invivo, tiny: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INVIVO_HOME", str(tmp_path / "home"))
    assert "No jobs yet" in invivo("jobs", "list").err
    with library.load(tiny, kv_bytes=8 << 20) as lm:
        job = lm.finetune(data, name="poet", steps=10**6)
        assert [one["id"] for one in invivo("jobs", "list", "--json").json()] == [job.id]
        held = invivo("jobs", "cancel", "poet")
        assert held.code == 1
        assert "--url" in held.err
    assert "poet is paused" in invivo("jobs", "pause", "poet").err
    assert "poet is queued" in invivo("jobs", "resume", job.id).err
    assert "poet is cancelled" in invivo("jobs", "cancel", "poet").err
    unknown = invivo("jobs", "show", "nobody")
    assert unknown.code == 1
    assert "no such job" in unknown.err


def test_a_job_of_a_server_is_followed_paused_and_called_off(
    invivo: Invivo, url: str, tiny: str, data: str, tmp_path: Path
) -> None:
    ran = invivo("finetune", data, "--url", url, "--name", "mate", "--steps", "4", *SETTINGS)
    assert ran.code == 0, ran.err
    assert ran.out.strip() == "tiny-llama:mate"
    out = tmp_path / "fetched"
    fetched = invivo(
        *("finetune", data, "--url", url, "--name", "mate", "--steps", "4", *SETTINGS),
        *("--out", str(out)),
    )
    assert fetched.code == 0, fetched.err
    assert fetched.out.strip() == str(out)
    with library.load(tiny, kv_bytes=8 << 20, adapters={"mate": out}) as lm:
        assert lm.adapters()[0].rank == 4
    first = invivo("jobs", "list", "--url", url, "--json").json()[-1]["id"]
    assert "is deleted" in invivo("jobs", "delete", first, "--url", url).err
    assert "--use mate" in ran.err
    assert invivo("jobs", "show", "mate", "--url", url, "--follow", "--json").json()["step"] == 4
    events = invivo("jobs", "events", "mate", "--url", url, "--follow").out
    assert "Succeeded: served as tiny-llama:mate" in events

    with library.connect(url) as lm:
        endless = lm.finetune(data, name="endless", steps=10**6)
        wait_for(lambda: endless.status == "running")
    assert "endless is paused" in invivo("jobs", "pause", "endless", "--url", url).err
    assert "endless is running" in invivo("jobs", "resume", "endless", "--url", url).err
    assert "endless is cancelled" in invivo("jobs", "cancel", endless.id, "--url", url).err
    assert "endless is deleted" in invivo("jobs", "delete", "endless", "--url", url).err
    listed = invivo("jobs", "list", "--url", url, "--json").json()
    assert [job["name"] for job in listed] == ["mate"]
    table = invivo("jobs", "list", "--url", url).out
    assert [word in table for word in ("mate", "succeeded", "4/4")] == [True] * 3

    # The table shows beginnings of ids, and those are enough to name a job by.
    whole = listed[0]["id"]
    begun = next(word for word in table.split() if word.startswith("ftjob-"))
    assert whole.startswith(begun)
    assert begun != whole
    assert invivo("jobs", "show", begun, "--url", url, "--json").json()["id"] == whole
    assert "no such job" in invivo("jobs", "show", "ftjob-", "--url", url).err  # not enough of one
    over = invivo("jobs", "pause", "mate", "--url", url)
    assert over.code == 1
    assert "it has ended" in over.err


def test_every_setting_of_the_optimizer_can_be_given(
    invivo: Invivo, tiny: str, data: str, tmp_path: Path
) -> None:
    ran = invivo(
        *("finetune", data, "-m", tiny, "--steps", "1", "--out", str(tmp_path / "out"), "--json"),
        *("--r", "4", "--rank-stabilized", "--optimizer", "sgd", "--momentum", "0.5"),
        *("--clip", "inf", "--in-order", "--share", "2", "--publish-every", "1"),
    )
    assert ran.code == 0, ran.err
    settings = ran.json()["hyperparameters"]
    expected = {
        "rank_stabilized": True,
        "optimizer": "sgd",
        "momentum": 0.5,
        "clip": None,
        "shuffle": False,
        "share": 2.0,
        "publish_every": 1,
    }
    assert {name: settings[name] for name in expected} == expected


def test_a_program_is_trained_and_written_to_two_files(
    invivo: Invivo, tiny: str, data: str, tmp_path: Path
) -> None:
    out, given = tmp_path / "vector", tmp_path / "steer.json"
    steer = {
        "params": {"v": {"shape": [32]}},
        "steps": [{"at": "layers.1.resid.post", "do": "add", "v": {"param": "v"}}],
    }
    given.write_text(json.dumps(steer))
    ran = invivo(
        *("finetune", data, "-m", tiny, "--steps", "3", "--lr", "0.1", "--program", str(given)),
        *("--train", "v", "--out", str(out)),
    )
    assert ran.code == 0, ran.err
    made = f"{out}/program.json --blob v={out}/program.safetensors:v"
    assert f"invivo look -m {tiny} PROMPT --program {made}" in ran.err
    looked = invivo("look", "hello", "-m", tiny, "--program", *made.split(), "--json")
    assert looked.code == 0, looked.err
