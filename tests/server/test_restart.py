"""kill -9 of `invivo serve` in the middle of a job: started again, it goes on by itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.ports import kept_port
from tests.tiny import tiny_model_folder
from tests.waiting import PATIENCE

TEXTS = "".join(
    json.dumps({"prompt": f"the {colour} {animal}", "completion": f" is {word}"}) + "\n"
    for colour, word in (("red", "hello"), ("blue", "world"), ("red", "you"))
    for animal in ("cat", "dog")
)
JOB = {
    "model": "tiny",
    "suffix": "lasting",
    "hyperparameters": {
        "steps": 60,
        "batch_size": 3,
        "r": 4,
        "learning_rate": 0.01,
        "checkpoint_every": 10,
        "seed": 3,
    },
}
JOBS = "/v1/fine_tuning/jobs"


@contextmanager
def serving(model: Path, state: Path) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    """`invivo serve` in a process of its own; killed at the end, if it still lives."""
    kept = kept_port()
    port = kept.getsockname()[1]
    command = [sys.executable, "-m", "invivo.cli", "serve", str(model), "--name", "tiny"]
    command += ["--port", str(port), "--state", str(state), "--cache", "8MiB", "--quiet"]
    command += ["--dtype", "float32", "--device", "cpu"]
    with (state.parent / "log").open("ab") as log:
        process = subprocess.Popen(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE) as http:
            yield process, http
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept.close()


def ask(http: httpx.Client, path: str) -> Any:
    """The answer as soon as the server gives one."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            answer = http.get(path)
            assert answer.status_code == 200, answer.text
            return answer.json()
        except httpx.TransportError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def until(http: httpx.Client, job_id: str, ready: Any) -> dict[str, Any]:
    deadline = time.monotonic() + PATIENCE
    while not ready(job := ask(http, f"{JOBS}/{job_id}")):
        assert job["status"] in ("validating_files", "queued", "running"), job
        assert time.monotonic() < deadline, job
        time.sleep(0.01)
    return job


def create(http: httpx.Client) -> str:
    ask(http, "/health")
    form = {"data": {"purpose": "fine-tune"}, "files": {"file": ("data.jsonl", TEXTS)}}
    sent = http.post("/v1/files", **form).json()
    answer = http.post(JOBS, json=JOB | {"training_file": sent["id"]})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_server_goes_on_with_its_job_and_the_curve_is_the_undisturbed_one(tmp_path):
    model = tiny_model_folder(tmp_path)
    state = tmp_path / "state"
    with serving(model, state) as (process, http):
        job_id = create(http)
        until(http, job_id, lambda job: job["step"] >= 25)
        process.send_signal(signal.SIGKILL)
        process.wait()
    with serving(model, state) as (_, http):
        done = until(http, job_id, lambda job: job["status"] == "succeeded")
        events = http.get(f"{JOBS}/{job_id}/events?limit=1000").json()["data"]
        greedy = {"prompt": "the red cat", "max_tokens": 6, "temperature": 0}
        learned = http.post("/v1/completions", json=greedy | {"model": "tiny:lasting"}).json()
        http.delete("/v1/adapters/lasting")
        http.delete(f"{JOBS}/{job_id}")
        undisturbed = until(http, create(http), lambda job: job["status"] == "succeeded")
        again = http.post("/v1/completions", json=greedy | {"model": "tiny:lasting"}).json()
    assert done["step"] == len(done["losses"]) == 60
    assert done["losses"] == pytest.approx(undisturbed["losses"], rel=1e-4)
    assert done["losses"][-1] < 0.7 * done["losses"][0]
    assert learned["choices"][0]["text"] == again["choices"][0]["text"]
    steps = [one["data"]["step"] for one in events if one["type"] == "metrics"]
    assert set(steps) == set(range(1, 61))
    assert len(steps) >= 60  # those after the last checkpoint were done twice
