"""The OpenAPI document is complete, and no generated request makes the server fail."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import CheckFunction
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

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


@pytest.fixture(scope="module")
def api(short: ServerThread):
    schema = schemathesis.openapi.from_dict(httpx.get(f"{short.url}/openapi.json").json())
    schema.config.update(base_url=short.url)
    # An endless stream: test_watching.py reads it.
    return schema.exclude(path="/v1/live/stream")


requests = schemathesis.pytest.from_fixture("api")


@requests.parametrize()
@settings(
    max_examples=40,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
def test_no_request_makes_it_fail_and_answers_conform(case):
    response = case.call(timeout=20)
    assert response.status_code < 500, response.text
    case.validate_response(response, checks=CHECKS)


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
