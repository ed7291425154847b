"""Hostile bodies: each gets a typed error, and the server goes on."""

from __future__ import annotations

import json

import httpx
import pytest

DEEP = "[" * 100_000 + "]" * 100_000
HEAD = '{"prompt": "the cat", "program": '
BODIES = {
    "brackets in brackets": HEAD + '{"steps": ' + DEEP + "}}",
    "objects in objects": HEAD + '{"a":' * 50_000 + "1" + "}" * 50_000 + "}",
    "no end": HEAD + '{"steps": [',
    "not a number": HEAD + '{"steps": [{"at": "embed.out", "do": "scale", "a": NaN}]}}',
    "infinity": HEAD + '{"steps": [{"at": "embed.out", "do": "scale", "a": 1e999}]}}',
    "a large number": HEAD
    + '{"steps": [{"at": "embed.out", "do": "scale", "a": '
    + "9" * 5000
    + "}]}}",
    "half a character": HEAD + '{"steps": [{"at": "\\ud800", "do": "zero"}]}}',
    "a huge sweep": HEAD + '{"sweep": {"a": "0..99999999999"}, "steps": []}}',
    "runs in a circle": HEAD
    + json.dumps(
        {
            "runs": {"b": {"same": "main"}},
            "steps": [
                {"at": "layers.0.resid.post", "do": "replace", "from": "b"},
                {"run": "b", "at": "layers.0.resid.post", "do": "replace", "from": "main"},
            ],
        }
    )
    + "}",
    "somebody's tensor": HEAD
    + json.dumps({"steps": [{"at": "embed.out", "do": "add", "v": "blob:sha256:" + "0" * 64}]})
    + "}",
    "captures without end": HEAD.replace("the cat", "the cat " * 50)
    + json.dumps(
        {
            "steps": [{"at": "embed.out", "do": "scale", "a": "$a"}],
            "sweep": {"a": "0..4095"},
            "out": [{"capture": "logits", "pos": "@all"}] * 23,
        }
    )
    + "}",
    "a null byte": HEAD + '{"steps": [{"at": "embed\\u0000out", "do": "zero"}]}}',
}


@pytest.mark.parametrize("what", BODIES)
@pytest.mark.parametrize("route", ["/v1/run", "/v1/explain"])
def test_every_hostile_body_gets_a_typed_error(http: httpx.Client, what: str, route: str) -> None:
    answer = http.post(
        route, content=BODIES[what].encode(), headers={"Content-Type": "application/json"}
    )
    assert 400 <= answer.status_code < 500, answer.text[:300]
    error = answer.json()["error"]
    assert error["message"]
    assert error["type"] == "invalid_request_error"
    assert len(answer.content) < 4096
    assert http.get("/v1/models").status_code == 200
