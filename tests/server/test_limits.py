"""Bounds: bodies while they are read, prompts, outputs, and requests at once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import httpx
import pytest
from tests.waiting import PATIENCE, held_until_cancelled

from invivo.server.run import ServerThread
from invivo.server.settings import Settings

LONG = {"prompt": "the cat", "max_tokens": 900, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def narrow(lm) -> Iterator[ServerThread]:
    settings = Settings(
        port=0,
        max_body_bytes=10_000,
        max_upload_bytes=20_000,
        max_concurrent=1,
        max_prompt_tokens=50,
        max_output_tokens=5,
        max_sequences=4,
    )
    with ServerThread(lm, settings) as running:
        yield running


post = partial(httpx.post, timeout=PATIENCE)


def pieces(n_bytes: int) -> Iterator[bytes]:
    """A body whose length is not told beforehand."""
    for _ in range(n_bytes // 1000):
        yield b" " * 1000


def check(response: httpx.Response, status: int, param: str | None = None) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["remedy"]
    if param:
        assert error["param"] == param


def test_a_body_that_says_it_is_too_large_is_not_read(narrow):
    body = b'{"prompt": "' + b"x" * 20_000 + b'"}'
    check(post(f"{narrow.url}/v1/completions", content=body), 413, "body")


def test_a_body_that_grows_too_large_is_cut_off(narrow):
    headers = {"content-type": "application/json"}
    with httpx.Client(base_url=narrow.url, timeout=PATIENCE) as client:
        check(client.post("/v1/completions", content=pieces(40_000), headers=headers), 413)
        check(client.post("/v1/completions", content=pieces(9_000), headers=headers), 400)


def test_an_upload_has_a_bound_of_its_own(narrow):
    files = {"config": b"{}", "weights": b"x" * 15_000}
    url = f"{narrow.url}/v1/adapters/upload"
    check(post(url, data={"name": "a"}, files=files), 400, "weights")
    files["weights"] = b"x" * 30_000
    check(post(url, data={"name": "a"}, files=files), 413, "body")


def test_prompts_outputs_and_sequences_are_bounded(narrow):
    url = f"{narrow.url}/v1/completions"
    check(post(url, json=LONG | {"prompt": "x" * 200}), 413, "prompt")
    check(post(url, json=LONG | {"n": 5}), 400, "n")
    for asked in (900, None):
        answer = post(url, json=LONG | {"max_tokens": asked}).json()
        assert answer["usage"]["completion_tokens"] == 5
        assert answer["choices"][0]["finish_reason"] == "length"


def test_one_request_too_many_is_told_to_wait(lm, idle):
    settings = Settings(port=0, max_concurrent=1)
    with (
        ServerThread(lm, settings) as server,
        httpx.Client(base_url=server.url, timeout=PATIENCE) as client,
    ):
        assert client.get("/health").status_code == 200
        with (
            held_until_cancelled(lm.engine),
            client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as running,
        ):
            lines = running.iter_lines()  # kept: the stream closes with its iterator
            next(lines)
            refused = client.post("/v1/completions", json=LONG)
            check(refused, 429)
            assert int(refused.headers["retry-after"]) >= 1
            assert client.get("/health").status_code == 200
            check(client.post("/v1/score", json={"items": [{"text": "the cat"}]}), 429)
        idle()
        short = LONG | {"max_tokens": 2}
        assert client.post("/v1/completions", json=short).status_code == 200


def test_the_engine_s_full_queue_is_a_429_too(lm, monkeypatch):
    from invivo.errors import Overloaded

    def full(*_arguments: object) -> None:
        raise Overloaded("the queue is full", remedy="Try again later")

    with ServerThread(lm, Settings(port=0)) as server:
        monkeypatch.setattr(lm.engine, "submit", full)
        for stream in (False, True):
            refused = post(f"{server.url}/v1/completions", json=LONG | {"stream": stream})
            check(refused, 429)
            assert "retry-after" in refused.headers
