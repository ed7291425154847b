"""Every refusal names what is wrong: status, type, parameter, remedy, and a request id."""

from __future__ import annotations

import json

import httpx
import openai
import pytest
from tests.waiting import PATIENCE

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
TEXT = {"model": "tiny", "prompt": "Hello", "max_tokens": 4}

REFUSED = [
    ("/v1/chat/completions", CHAT | {"model": "other"}, 404, "model"),
    ("/v1/chat/completions", CHAT | {"model": "tiny:poet"}, 404, "model"),
    ("/v1/chat/completions", CHAT | {"messages": []}, 400, "messages"),
    ("/v1/chat/completions", CHAT | {"unknown": 1}, 400, "unknown"),
    ("/v1/chat/completions", CHAT | {"temperature": -1}, 400, "temperature"),
    ("/v1/chat/completions", CHAT | {"temperature": "hot"}, 400, "temperature"),
    ("/v1/chat/completions", CHAT | {"top_logprobs": 3}, 400, "top_logprobs"),
    ("/v1/chat/completions", CHAT | {"n": 1000}, 400, "n"),
    ("/v1/chat/completions", CHAT | {"stop": ["x"] * 17}, 400, "stop"),
    ("/v1/chat/completions", CHAT | {"logit_bias": {"cat": 1}}, 400, "logit_bias"),
    ("/v1/chat/completions", CHAT | {"logit_bias": {"99999": 1}}, 400, "logit_bias"),
    ("/v1/chat/completions", CHAT | {"tool_choice": "required"}, 400, "tool_choice"),
    ("/v1/chat/completions", CHAT | {"store": True}, 400, "store"),
    (
        "/v1/chat/completions",
        CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        None,
    ),
    ("/v1/chat/completions", CHAT | {"messages": [{"role": "judge", "content": ""}]}, 400, None),
    (
        "/v1/chat/completions",
        CHAT | {"guided_regex": "a", "guided_choice": ["b"]},
        400,
        "guided_regex",
    ),
    ("/v1/chat/completions", CHAT | {"guided_regex": "(("}, 400, None),
    (
        "/v1/chat/completions",
        CHAT
        | {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "nothing"}},
            }
        },
        400,
        None,
    ),
    (
        "/v1/chat/completions",
        CHAT | {"messages": [{"role": "user", "content": "word " * 2000}]},
        413,
        "prompt",
    ),
    (
        "/v1/chat/completions",
        CHAT
        | {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "[]"}}],
                }
            ]
        },
        400,
        "messages[0].tool_calls[0].function.arguments",
    ),
    ("/v1/completions", TEXT | {"suffix": "end"}, 400, "suffix"),
    ("/v1/completions", TEXT | {"prompt": []}, 400, "prompt"),
    ("/v1/completions", TEXT | {"prompt": [99999]}, 400, "prompt"),
    ("/v1/completions", TEXT | {"prompt": ""}, 400, "prompt"),
    ("/v1/completions", TEXT | {"max_tokens": 0}, 400, "max_tokens"),
    ("/v1/completions", TEXT | {"echo": True, "stream": True}, 400, "echo"),
    ("/v1/completions", TEXT | {"prompt": ["a"] * 100, "n": 2}, 400, "n"),
    ("/v1/completions", {"model": "tiny"}, 400, "prompt"),
    ("/v1/embeddings", {"model": "tiny", "input": "a", "dimensions": 7}, 400, "dimensions"),
    ("/v1/embeddings", {"model": "tiny", "input": []}, 400, "input"),
    ("/v1/score", {"items": [{"text": ""}]}, 400, None),
    ("/v1/score", {"items": [{"text": "a", "top": 3}]}, 400, "items[0].top"),
    ("/tokenize", {}, 400, None),
    ("/tokenize", {"text": "a", "messages": CHAT["messages"]}, 400, None),
    ("/detokenize", {"tokens": [99999]}, 400, None),
    ("/v1/adapters", {"name": "x", "path": "/no/such/folder"}, 400, "path"),
    ("/v1/adapters", {"name": "x", "path": "~nobody-here/x"}, 400, "path"),
    ("/v1/adapters", {"name": "x", "path": "a\0b"}, 400, "path"),
    ("/v1/adapters", {"name": "../x", "path": "/tmp"}, 400, "name"),
]


def check(response: httpx.Response, status: int, param: str | None) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["message"]
    assert error["type"].endswith("_error")
    assert error["code"]
    assert error["remedy"]
    assert error["request_id"] == response.headers["x-request-id"]
    if param is not None:
        assert error["param"] == param


@pytest.mark.parametrize(("path", "body", "status", "param"), REFUSED)
def test_a_refusal_names_field_and_remedy(http, path, body, status, param):
    check(http.post(path, json=body), status, param)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"[" * 100_000,
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"\\ud800": 1}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "x"}], "seed": 1' + b"0" * 4000 + b"}",
        b'{"messages": [{"role": "user", "content": "x"}], "guided_json": '
        + b'{"a":' * 200
        + b"1"
        + b"}" * 201,
        b"\xff\xfe",
    ],
)
def test_a_broken_body_is_a_clean_400(http, content):
    headers = {"content-type": "application/json"}
    check(http.post("/v1/chat/completions", content=content, headers=headers), 400, None)


def test_unknown_routes_and_methods_have_the_same_shape(http):
    check(http.get("/v1/nothing"), 404, None)
    check(http.get("/v1/chat/completions"), 405, None)
    check(http.delete("/v1/adapters/nothing"), 404, None)


def test_a_stream_that_cannot_start_gets_its_status(http):
    body = CHAT | {"stream": True, "messages": [{"role": "user", "content": "word " * 2000}]}
    check(http.post("/v1/chat/completions", json=body), 413, "prompt")


def test_the_client_raises_its_own_classes(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**CHAT, extra_body={"top_k": -1})
    assert caught.value.param == "top_k"
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**CHAT | {"model": "other"})


def test_a_given_request_id_comes_back(http):
    assert (
        http.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    )
    odd = http.get("/health", headers={"x-request-id": "a b\tc"}).headers["x-request-id"]
    assert odd != "a b\tc"


def test_a_bug_shows_no_trace(lm, monkeypatch):
    from invivo.server.run import ServerThread
    from invivo.server.settings import Settings

    def broken(*_arguments: object, **_keywords: object) -> str:
        raise RuntimeError("secret detail")

    with ServerThread(lm, Settings(port=0)) as server:
        monkeypatch.setattr(lm, "apply_chat_template", broken)
        for stream in (False, True):
            answer = httpx.post(
                f"{server.url}/v1/chat/completions",
                json={"messages": CHAT["messages"], "stream": stream},
                timeout=PATIENCE,
            )
            check(answer, 500, None)
            assert "secret" not in answer.text
            assert json.loads(answer.text)["error"]["type"] == "internal_error"
