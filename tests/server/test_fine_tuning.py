"""Fine-tuning over HTTP: the official client, from an upload to a chat with what was learned."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from tests.waiting import PATIENCE, wait_for

from invivo.jobs.folder import JobFolder
from invivo.lm_jobs import Hyperparameters
from invivo.server.fine_tuning_schemas import HyperparametersBody
from invivo.server.keys import KeyStore
from invivo.server.run import ServerThread
from invivo.server.settings import Settings

TALKS = [
    {
        "messages": [
            {"role": "user", "content": f"the {colour} {animal}?"},
            {"role": "assistant", "content": "hello hello"},
        ]
    }
    for colour in ("red", "blue")
    for animal in ("cat", "dog")
]
QUICK = {"learning_rate": 0.02, "r": 4, "on": ["q", "v", "down"], "batch_size": 2}
LONG = QUICK | {"steps": 100_000, "checkpoint_every": 5, "learning_rate": 1e-4}
ENDED = ("succeeded", "failed", "cancelled")


def lines(records: list[dict]) -> bytes:
    return "".join(json.dumps(one) + "\n" for one in records).encode()


@pytest.fixture(scope="module")
def talks(client: openai.OpenAI) -> Iterator[str]:
    sent = client.files.create(file=("talks.jsonl", lines(TALKS)), purpose="fine-tune")
    yield sent.id
    for one in client.files.list():
        client.files.delete(one.id)


@pytest.fixture(autouse=True)
def clean(http) -> Iterator[None]:
    yield
    for job in http.get("/v1/fine_tuning/jobs?limit=1000").json()["data"]:
        if job["status"] not in ENDED:
            http.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel")
            until(http, job["id"], *ENDED)
        assert http.delete(f"/v1/fine_tuning/jobs/{job['id']}").status_code == 200
    for adapter in http.get("/v1/adapters").json()["data"]:
        http.delete(f"/v1/adapters/{adapter['name']}")


def until(http: httpx.Client, job_id: str, *states: str, step: int = 0) -> dict:
    deadline = time.monotonic() + PATIENCE
    while True:
        job = http.get(f"/v1/fine_tuning/jobs/{job_id}").json()
        if job["status"] in states and job["step"] >= step:
            return job
        assert job["status"] not in ENDED, job
        assert time.monotonic() < deadline, job
        time.sleep(0.02)


def start(http: httpx.Client, file_id: str, **more) -> httpx.Response:
    body = {"model": "tiny", "training_file": file_id, "hyperparameters": QUICK} | more
    return http.post("/v1/fine_tuning/jobs", json=body)


def refusal(answer: httpx.Response, status: int = 400) -> dict:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["message"]
    assert error["remedy"]
    return error


def test_from_an_upload_to_a_chat_while_others_are_served(client: openai.OpenAI, http, talks):
    ask = {"messages": [{"role": "user", "content": "the red cat?"}], "temperature": 0}

    def stream(_: int) -> str:
        chunks = client.chat.completions.create(
            model="tiny", max_tokens=60, stream=True, extra_body={"ignore_eos": True}, **ask
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)

    alone = stream(0)
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=talks,
        suffix="greeter",
        seed=7,
        metadata={"who": "a test"},
        method={
            "type": "supervised",
            "supervised": {
                "hyperparameters": {"n_epochs": "auto", **QUICK, "steps": 60}  # type: ignore[typeddict-item]
            },
        },
    )
    assert job.id.startswith("ftjob-")
    assert job.object == "fine_tuning.job"
    assert job.fine_tuned_model is None
    with ThreadPoolExecutor(3) as pool:
        assert set(pool.map(stream, range(6))) == {alone}
    done = until(http, job.id, "succeeded")
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "succeeded"
    assert job.fine_tuned_model == "tiny:greeter"
    assert job.seed == 7
    assert job.metadata == {"who": "a test"}
    assert job.hyperparameters.batch_size == 2
    assert job.method.supervised.hyperparameters.batch_size == 2
    assert job.trained_tokens > 0
    assert job.finished_at >= job.created_at
    assert job.error is None
    assert (done["step"], done["n_steps"], len(done["losses"])) == (60, 60, 60)
    assert done["losses"][-1] < 0.5 * done["losses"][0]
    assert "tiny:greeter" in {one.id for one in client.models.list()}
    answer = client.chat.completions.create(model=job.fine_tuned_model, max_tokens=12, **ask)
    assert answer.choices[0].message.content.startswith("hello")
    assert stream(0) == alone


def test_events_and_checkpoints_come_in_pages(client: openai.OpenAI, http, talks):
    hyperparameters = QUICK | {"steps": 12, "checkpoint_every": 4, "n_epochs": "auto"}
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=talks,
        hyperparameters=hyperparameters,  # type: ignore[arg-type]
    )
    until(http, job.id, "succeeded")
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=5))
    assert len({one.id for one in events}) == len(events) > 12
    steps = [one.data["step"] for one in events if one.type == "metrics"]
    assert steps == list(range(12, 0, -1))
    assert [one.created_at for one in events] == sorted(
        (one.created_at for one in events), reverse=True
    )
    everything = client.fine_tuning.jobs.list_events(job.id, limit=1000)
    assert [one.id for one in everything.data] == [one.id for one in events]
    assert not everything.has_more
    kept = list(client.fine_tuning.jobs.checkpoints.list(job.id, limit=1))
    assert [one.step_number for one in kept] == [12, 8, 4]
    assert kept[0].fine_tuning_job_id == job.id
    assert kept[0].fine_tuned_model_checkpoint.startswith("tiny:")
    assert kept[0].metrics.train_loss > 0


def test_pause_resume_and_cancel(client: openai.OpenAI, http, talks):
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=talks,
        suffix="slow",
        hyperparameters=LONG,  # type: ignore[arg-type]
    )
    until(http, job.id, "running", step=3)
    client.fine_tuning.jobs.pause(job.id)
    paused = until(http, job.id, "paused")
    # Many iterations of the engine go by, none of them the job's.
    client.completions.create(model="tiny", prompt="the", max_tokens=60, seed=1)
    assert http.get(f"/v1/fine_tuning/jobs/{job.id}").json()["step"] == paused["step"]
    client.fine_tuning.jobs.resume(job.id)
    going = until(http, job.id, "running", step=paused["step"] + 2)
    assert going["tokens_per_second"] is None or going["tokens_per_second"] > 0
    client.fine_tuning.jobs.cancel(job.id)
    ended = until(http, job.id, "cancelled")
    assert ended["fine_tuned_model"] is None
    assert ended["finished_at"]
    for order in ("cancel", "pause", "resume"):
        refusal(http.post(f"/v1/fine_tuning/jobs/{job.id}/{order}"), 409)


def test_pages_of_jobs_are_newest_first(client: openai.OpenAI, http, talks):
    made = [
        start(http, talks, hyperparameters=QUICK | {"steps": 1}, metadata={"i": str(i)}).json()
        for i in range(5)
    ]
    for job in made:
        until(http, job["id"], "succeeded")
    listed = list(client.fine_tuning.jobs.list(limit=2))
    assert [one.id for one in listed] == [job["id"] for job in made][::-1]
    assert client.fine_tuning.jobs.list(limit=2).has_more
    chosen = client.fine_tuning.jobs.list(metadata={"i": "3"})
    assert [one.id for one in chosen] == [made[3]["id"]]
    error = refusal(http.get("/v1/fine_tuning/jobs?after=ftjob-none"), 404)
    assert error["param"] == "after"


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"training_file": "file-none"}, 404, "training_file"),
        ({"model": "other"}, 404, "model"),
        ({"validation_file": "file-none"}, 404, "validation_file"),
        ({"suffix": "../up"}, 400, "suffix"),
        ({"colour": "red"}, 400, "colour"),
        ({"hyperparameters": {"colour": "red"}}, 400, "hyperparameters.colour"),
        ({"hyperparameters": {"r": 0}}, 400, "hyperparameters.r"),
        ({"hyperparameters": {"r": 10_000}}, 400, "hyperparameters.r"),
        ({"hyperparameters": {"method": "prefix", "r": 60_000}}, 400, "hyperparameters.r"),
        ({"hyperparameters": {"n_epochs": 0}}, 400, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"batch_size": "many"}}, 400, "hyperparameters.batch_size"),
        ({"hyperparameters": {"on": ["nowhere"]}}, 400, "hyperparameters.on"),
        ({"hyperparameters": {"method": "ia3", "r": 4}}, 400, "hyperparameters.r"),
        ({"hyperparameters": {"layers": [77]}}, 400, "hyperparameters.layers"),
        ({"hyperparameters": {"max_length": 10**8}}, 400, "hyperparameters.max_length"),
        ({"method": {"type": "dpo"}}, 400, "method.type"),
        (
            {
                "hyperparameters": None,
                "method": {"type": "supervised", "supervised": {"hyperparameters": {"r": "x"}}},
            },
            400,
            "method.supervised.hyperparameters.r",
        ),
        (
            {"method": {"type": "supervised", "supervised": {"hyperparameters": {"r": 2}}}},
            400,
            "hyperparameters",
        ),
        ({"seed": 1, "hyperparameters": {"seed": 2}}, 400, "seed"),
        (
            {"hyperparameters": {"learning_rate": 1.0, "learning_rate_multiplier": 2}},
            400,
            "hyperparameters",
        ),
        ({"metadata": {"a": 1}}, 400, "metadata.a"),
    ],
)
def test_a_refused_job_names_the_field(http, talks, change, status, param):
    error = refusal(start(http, talks, **change), status)
    assert error["param"] == param
    assert http.get("/v1/fine_tuning/jobs").json()["data"] == []


def test_errors_in_the_data_name_their_lines(client: openai.OpenAI, http):
    bad = lines(TALKS[:2]) + b'{"mesages": []}\n' + lines(TALKS[2:]) + b"not json\n"
    sent = client.files.create(file=("bad.jsonl", bad), purpose="fine-tune")
    answer = start(http, sent.id)
    if answer.status_code == 200:  # the file is read after the answer
        job_id = answer.json()["id"]
        url = f"/v1/fine_tuning/jobs/{job_id}"
        wait_for(lambda: http.get(url).json()["status"] == "failed")
        error = http.get(url).json()["error"]
    else:
        error = refusal(answer)
    assert error["param"] == "training_file"
    assert "line 3" in error["message"]
    assert "line 6" in error["message"]
    client.files.delete(sent.id)


def test_every_hyperparameter_of_python_is_one_of_http():
    own = set(HyperparametersBody.model_fields) - {"learning_rate_multiplier"}
    assert own == set(Hyperparameters.__dataclass_fields__)


def test_a_multiplier_scales_the_usual_learning_rate(http, talks):
    usual = Hyperparameters().learning_rate
    small = {"learning_rate_multiplier": 0.5, "steps": 1, "batch_size": "auto"}
    job = start(http, talks, hyperparameters=small).json()
    assert job["hyperparameters"]["learning_rate"] == usual / 2
    assert job["hyperparameters"]["learning_rate_multiplier"] == 0.5
    assert job["hyperparameters"]["batch_size"] == Hyperparameters().batch_size


def test_a_file_in_use_is_kept(client: openai.OpenAI, http):
    sent = client.files.create(file=("one.jsonl", lines(TALKS[:1])), purpose="fine-tune")
    job = start(http, sent.id, hyperparameters=LONG).json()
    until(http, job["id"], "running", step=1)
    with pytest.raises(openai.ConflictError):
        client.files.delete(sent.id)
    client.fine_tuning.jobs.cancel(job["id"])
    until(http, job["id"], "cancelled")
    assert client.files.delete(sent.id).deleted


def test_jobs_show_in_the_snapshot_and_the_metrics(http, talks):
    job = start(http, talks, suffix="seen", hyperparameters=LONG).json()
    until(http, job["id"], "running", step=20)
    [row] = [one for one in http.get("/v1/live").json()["jobs"] if one["name"] == "seen"]
    assert row["id"] == job["id"]
    assert row["state"] == row["status"] == "running"
    assert row["steps"] == 100_000
    assert len(row["losses"]) >= 19
    step, loss = row["losses"][-1]
    assert step >= 19
    assert loss > 0
    text = http.get("/metrics").text
    assert 'invivo:finetune_jobs{model_name="tiny",state="running"} 1.0' in text
    assert 'invivo:finetune_loss{job_name="seen",model_name="tiny"}' in text
    for direction in ("forward", "backward"):
        head = f'invivo:finetune_tokens_total{{direction="{direction}",model_name="tiny"}} '
        [line] = [one for one in text.splitlines() if one.startswith(head)]
        assert float(line.removeprefix(head)) > 0


def test_a_long_curve_is_thinned(tmp_path):
    with JobFolder(tmp_path) as folder:
        job = folder.store.add_job(
            name="long",
            model="tiny",
            training_file="file-1",
            content="0",
            filename="a.jsonl",
            hyperparameters={},
            metadata={},
            owner="",
        )
        assert folder.curve(job.id, 10) == []
        for step in range(1, 96):
            folder.store.step_done(job.id, step, None if step == 2 else 1.0 * step, step)
            points = folder.curve(job.id, 10)
            assert points[-1][0] == step
            assert min(step, 6) <= len(points) <= 10
            assert len({b[0] - a[0] for a, b in itertools.pairwise(points)}) <= 1
        assert folder.curve(job.id, 500)[:3] == [(1, 1.0), (2, None), (3, 3.0)]


def test_a_key_sees_its_own_jobs_and_an_administrator_all(lm, tmp_path):
    url = f"sqlite:///{tmp_path / 'keys.sqlite3'}"
    store = KeyStore(url)
    secrets = {
        "ann": store.add("ann", ["finetune"])[0],
        "bob": store.add("bob", ["finetune"])[0],
        "root": store.add("root", ["admin"])[0],
        "reader": store.add("reader", ["generate", "metrics"])[0],
    }
    settings = Settings(port=0, require_keys=True, database=url, served_name="tiny")
    with ServerThread(lm, settings) as keyed:
        people = {
            name: openai.OpenAI(base_url=f"{keyed.url}/v1", api_key=secret, max_retries=0)
            for name, secret in secrets.items()
        }
        ann, bob, root = (people[name].fine_tuning.jobs for name in ("ann", "bob", "root"))
        data = ("data.jsonl", lines(TALKS))
        sent = people["ann"].files.create(file=data, purpose="fine-tune")
        job = ann.create(
            model="tiny",
            training_file=sent.id,
            suffix="anns",
            hyperparameters={"steps": 2},  # type: ignore[typeddict-unknown-key]
        )
        assert [one.id for one in ann.list()] == [job.id]
        assert list(bob.list()) == []
        assert job.id in {one.id for one in root.list()}
        for call in (bob.retrieve, bob.cancel, bob.pause, bob.resume, bob.list_events):
            with pytest.raises(openai.NotFoundError):
                call(job.id)
        with pytest.raises(openai.NotFoundError) as caught:  # another's file
            bob.create(model="tiny", training_file=sent.id)
        assert caught.value.param == "training_file"
        with pytest.raises(openai.PermissionDeniedError):
            people["reader"].fine_tuning.jobs.list()
        wait_for(lambda: ann.retrieve(job.id).status == "succeeded")
        own = people["bob"].files.create(file=data, purpose="fine-tune")
        for who, status in (("ann", 200), ("root", 200), ("bob", 403), ("reader", 403)):
            key = {"Authorization": f"Bearer {secrets[who]}"}
            files = httpx.get(
                f"{keyed.url}/v1/adapters/anns/content", headers=key, timeout=PATIENCE
            )
            assert (who, files.status_code) == (who, status)
        with pytest.raises(openai.PermissionDeniedError) as kept:
            bob.create(model="tiny:anns", training_file=own.id)
        assert kept.value.param == "model"
        with pytest.raises(openai.ConflictError) as taken:  # another's adapter
            bob.create(model="tiny", training_file=own.id, suffix="anns")
        assert taken.value.param == "suffix"
        for one in people.values():
            one.close()
    store.close()


def test_the_remote_model_trains_as_one_in_this_process(server, lm, talks):
    import invivo
    from invivo.errors import InvalidRequest, NotFound

    with invivo.connect(server.url) as remote:
        job = remote.finetune(TALKS, name="far", steps=8, **QUICK)
        done = job.wait(timeout=PATIENCE)
        assert done.status == "succeeded"
        assert done.name == "far"
        assert done.hyperparameters == lm.job(job.id).info().hyperparameters
        assert done.losses == lm.job(job.id).info().losses
        assert [one.id for one in remote.jobs()] == [job.id]
        assert remote.job(job.id).status == "succeeded"
        assert job.events(limit=3) == lm.job(job.id).events(limit=3)
        assert [one.step for one in job.checkpoints()] == [
            one.step for one in lm.job(job.id).checkpoints()
        ]
        assert remote.generate("the cat", adapter="far", max_tokens=4).text is not None
        further = remote.finetune(TALKS, name="further", start="far", steps=2)
        assert further.wait(timeout=PATIENCE).hyperparameters["start"] == "far"
        assert further.info().losses[0] < done.losses[0]
        sent = remote.upload_file(TALKS[:2])
        assert sent.id in {one.id for one in remote.files()}
        remote.delete_file(sent.id)
        with pytest.raises(NotFound):
            remote.job("ftjob-none").info()
        with pytest.raises(InvalidRequest) as caught:
            remote.finetune(talks, r=10_000)
        assert caught.value.field == "r"


def test_an_adapter_is_trained_further_by_its_name_as_a_model(client: openai.OpenAI, http, talks):
    create = client.fine_tuning.jobs.create
    first = create(
        model="tiny",
        training_file=talks,
        suffix="early",
        hyperparameters=QUICK | {"steps": 4},  # type: ignore[arg-type]
    )
    done = until(http, first.id, "succeeded")
    steps: Any = {"steps": 2}
    second = create(
        model=done["fine_tuned_model"], training_file=talks, suffix="late", hyperparameters=steps
    )
    later = until(http, second.id, "succeeded")
    assert later["hyperparameters"]["start"] == "early"
    assert later["hyperparameters"]["r"] == done["hyperparameters"]["r"]
    assert later["fine_tuned_model"] == "tiny:late"
    assert later["losses"][0] < done["losses"][0]
    for change, param in (
        ({"hyperparameters": {"r": 2}}, "hyperparameters.r"),
        ({"hyperparameters": {"start": "late"}}, "hyperparameters.start"),
    ):
        assert refusal(start(http, talks, model="tiny:early", **change))["param"] == param
    error = refusal(start(http, talks, hyperparameters={"start": "nobody"}), 404)
    assert error["param"] == "hyperparameters.start"


def test_held_out_data_results_and_checkpoints_by_the_official_client(
    client: openai.OpenAI, http, talks
):
    held = client.files.create(file=("held.jsonl", lines(TALKS[:2])), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=talks,
        validation_file=held.id,
        suffix="judged",
        hyperparameters=QUICK | {"steps": 12, "checkpoint_every": 4, "validate_every": 4},  # type: ignore[arg-type]
    )
    assert job.validation_file == held.id
    done = until(http, job.id, "succeeded")
    assert [one["step"] for one in done["validations"]] == [4, 8, 12]
    told = [
        event.data
        for event in client.fine_tuning.jobs.list_events(job.id, limit=100)
        if event.type == "metrics" and "valid_loss" in event.data
    ]
    assert [one["step"] for one in told] == [12, 8, 4]
    kept = list(client.fine_tuning.jobs.checkpoints.list(job.id))
    assert kept[0].fine_tuned_model_checkpoint == "tiny:judged:ckpt-step-12"
    metrics = kept[0].metrics
    assert metrics.valid_loss == metrics.full_valid_loss == done["validations"][-1]["loss"]
    assert 0 <= metrics.valid_mean_token_accuracy <= 1
    for one in kept:
        answer = client.completions.create(
            model=one.fine_tuned_model_checkpoint, prompt="the cat", max_tokens=2
        )
        assert answer.model == one.fine_tuned_model_checkpoint
    assert "tiny:judged:ckpt-step-4" in {one.id for one in client.models.list()}
    [results] = client.fine_tuning.jobs.retrieve(job.id).result_files
    table = client.files.content(results).text.splitlines()
    assert table[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert len(table) == 13
    assert client.files.retrieve(results).purpose == "fine-tune-results"
    refusal(start(http, results), 400)


def test_a_checkpoint_is_its_owners_until_it_has_been_asked_for(lm, tmp_path):
    url = f"sqlite:///{tmp_path / 'keys.sqlite3'}"
    store = KeyStore(url)
    scopes = ["finetune", "generate", "score", "edit"]
    keys = {name: store.add(name, scopes)[0] for name in ("ann", "bob")}
    settings = Settings(port=0, require_keys=True, database=url, served_name="tiny")
    with ServerThread(lm, settings) as thread:
        people = {
            name: openai.OpenAI(base_url=f"{thread.url}/v1", api_key=key, max_retries=0)
            for name, key in keys.items()
        }
        ann, bob = people["ann"], people["bob"]
        sent = ann.files.create(file=("t.jsonl", lines(TALKS)), purpose="fine-tune")
        job = ann.fine_tuning.jobs.create(
            model="tiny",
            training_file=sent.id,
            suffix="secret",
            hyperparameters=QUICK | {"steps": 2},  # type: ignore[arg-type]
        )
        wait_for(lambda: ann.fine_tuning.jobs.retrieve(job.id).status == "succeeded")
        ask = {"model": "tiny:secret:ckpt-step-2", "prompt": "the", "max_tokens": 1}
        with pytest.raises(openai.NotFoundError):
            bob.completions.create(**ask)
        # Nor as the adapter of a run of his program.
        program = {
            "runs": {"x": {"same": "main", "adapter": "secret:ckpt-step-2"}},
            "out": [{"measure": "logprob", "token": 5, "run": "x"}],
        }
        carrying = {"interventions": program}
        bodies = {
            "run": {"program": program, "prompt": "the cat"},
            "score": {"items": [{"text": "the cat"}]} | carrying,
            "completions": {"prompt": "the cat", "max_tokens": 1} | carrying,
            "chat/completions": {"messages": [{"role": "user", "content": "cat"}]} | carrying,
        }
        for route, body in bodies.items():
            key = {"Authorization": f"Bearer {keys['bob']}"}
            refused = httpx.post(
                f"{thread.url}/v1/{route}", headers=key, json=body, timeout=PATIENCE
            )
            assert (route, refused.status_code) == (route, 404)
            assert refused.json()["error"]["param"].endswith("runs.x.adapter")
        other = bob.files.create(file=("t.jsonl", lines(TALKS)), purpose="fine-tune")
        with pytest.raises(openai.NotFoundError) as caught:
            bob.fine_tuning.jobs.create(
                model="tiny", training_file=other.id, validation_file=sent.id
            )
        assert caught.value.param == "validation_file"
        files = f"{thread.url}/v1/adapters/secret:ckpt-step-2/content"
        for who, status in (("bob", 404), ("ann", 200)):
            key = {"Authorization": f"Bearer {keys[who]}"}
            assert (who, httpx.get(files, headers=key, timeout=PATIENCE).status_code) == (
                who,
                status,
            )
        assert ann.completions.create(**ask).choices
        for one in people.values():
            one.close()
    store.close()
