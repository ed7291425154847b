"""The OpenAPI document is complete, and no generated request makes the server fail."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import CheckFunction
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from tests.waiting import PATIENCE

from invivo.lm_jobs import ENDED
from invivo.server.app import create_app
from invivo.server.run import ServerThread
from invivo.server.settings import Settings

CHECKS: list[CheckFunction] = [
    schemathesis.checks.not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def short(lm) -> Iterator[ServerThread]:
    """A server on which no generated request runs long."""
    limits = Settings(port=0, max_output_tokens=4, max_sequences=4, max_prompt_tokens=400)
    with ServerThread(lm, limits) as running:
        yield running


OPERATIONS = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/embeddings"),
    ("POST", "/v1/score"),
    ("POST", "/v1/run"),
    ("POST", "/v1/explain"),
    ("POST", "/v1/programs"),
    ("GET", "/v1/programs"),
    ("GET", "/v1/programs/schema"),
    ("GET", "/v1/programs/{program_id}"),
    ("DELETE", "/v1/programs/{program_id}"),
    ("POST", "/v1/blobs"),
    ("GET", "/v1/blobs"),
    ("GET", "/v1/blobs/{blob_ids}"),
    ("DELETE", "/v1/blobs/{blob_id}"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("GET", "/v1/adapters"),
    ("POST", "/v1/adapters"),
    ("POST", "/v1/adapters/upload"),
    ("GET", "/v1/adapters/{name}/content"),
    ("DELETE", "/v1/adapters/{name}"),
    ("POST", "/v1/files"),
    ("GET", "/v1/files"),
    ("GET", "/v1/files/{file_id}"),
    ("GET", "/v1/files/{file_id}/content"),
    ("DELETE", "/v1/files/{file_id}"),
    ("POST", "/v1/fine_tuning/jobs"),
    ("GET", "/v1/fine_tuning/jobs"),
    ("GET", "/v1/fine_tuning/jobs/{job_id}"),
    ("DELETE", "/v1/fine_tuning/jobs/{job_id}"),
    ("POST", "/v1/fine_tuning/jobs/{job_id}/cancel"),
    ("POST", "/v1/fine_tuning/jobs/{job_id}/pause"),
    ("POST", "/v1/fine_tuning/jobs/{job_id}/resume"),
    ("GET", "/v1/fine_tuning/jobs/{job_id}/events"),
    ("GET", "/v1/fine_tuning/jobs/{job_id}/checkpoints"),
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/metrics"),
    ("GET", "/v1/live"),
    ("GET", "/v1/training/runs"),
]
ENDLESS = ("GET", "/v1/live/stream")  # test_watching.py reads it


@pytest.fixture(scope="module")
def api(short: ServerThread):
    document = httpx.get(f"{short.url}/openapi.json", timeout=PATIENCE).json()
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=short.url)
    return schema


@pytest.fixture(scope="module")
def known(lm, short: ServerThread) -> Iterator[dict[str, str]]:
    """Names of a model, a file, an ended job and its adapter that are there."""
    job = lm.finetune([{"text": "the cat is red"}], name="known", steps=1, batch_size=1)
    info = job.wait(timeout=PATIENCE)
    assert info.status == "succeeded"
    yield {
        "model": short.app.state.services.model_name,
        "file_id": info.training_file,
        "job_id": job.id,
        "name": "known",
    }
    for each in lm.jobs():
        each.cancel() if each.status not in ENDED else None
        assert each.wait(timeout=PATIENCE).status in ENDED
        each.delete()
    for adapter in lm.adapters():
        lm.unload_adapter(adapter.name)
    for file in lm.files():
        lm.delete_file(file.id)


def possible(case: schemathesis.Case, known: dict[str, str]) -> schemathesis.Case:
    """A valid request made one that this model can carry out: known names and tokens."""
    if case.method != "DELETE":
        given = case.path_parameters
        given.update({name: known[name] for name in ("file_id", "job_id", "name") if name in given})
    if isinstance(case.body, dict) and "training_file" in case.body:
        case.body.update({"model": known["model"], "training_file": known["file_id"]})
        within = (case.body.get("method") or {}).get("supervised") or {}
        for holder in (case.body, within):
            if holder.get("hyperparameters"):
                holder["hyperparameters"] |= {"steps": 1, "batch_size": 1}
    elif isinstance(case.body, dict):
        for field in ("model", "guided_json", "guided_regex", "response_format", "logit_bias"):
            case.body.pop(field, None)
        case.body.update(
            {
                name: in_vocabulary(case.body[name])
                for name in ("prompt", "input", "tokens", "items")
                if name in case.body
            }
        )
    return case


def in_vocabulary(value: object) -> object:
    """``value`` with every number taken modulo the vocabulary, and no text empty."""
    if isinstance(value, dict):
        return {key: in_vocabulary(one) for key, one in value.items()}
    if isinstance(value, list):
        return [in_vocabulary(one) for one in value]
    if isinstance(value, int):
        return value % 256
    return value or "text" if isinstance(value, str) else value


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_no_request_makes_it_fail_and_answers_conform(api, known, method, path):
    operation = api[path][method]
    valid = operation.as_strategy(generation_mode=schemathesis.GenerationMode.POSITIVE)
    invalid = operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)
    generated = st.one_of(valid.map(lambda case: possible(case, known)), valid, invalid)

    @settings(
        max_examples=20,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(generated)
    def check(case):
        response = case.call(timeout=PATIENCE)
        assert response.status_code < 500, response.text
        case.validate_response(response, checks=CHECKS)

    check()


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "the"}]}),
        ("/v1/completions", {"prompt": "the"}),
    ],
)
def test_streams_conform(api, path, asked):
    case = api[path]["POST"].Case(body={**asked, "stream": True, "max_tokens": 2})
    response = case.call(timeout=PATIENCE)
    assert response.headers["content-type"][0].startswith("text/event-stream")
    case.validate_response(response, checks=CHECKS)


def test_every_operation_is_tried(lm):
    paths = create_app(lm).openapi()["paths"]
    documented = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    assert documented == {*OPERATIONS, ENDLESS}


def test_every_operation_says_how_it_fails(lm):
    document = create_app(lm).openapi()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            told = set(operation["responses"])
            assert "422" not in told
            if path in ("/health", "/ready"):
                continue
            assert {"200", "400", "401", "403", "404", "413", "429", "500"} <= told, path
            schema = operation["responses"]["400"]["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/ErrorAnswer"}
