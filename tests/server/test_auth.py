"""Who may ask what: keys, scopes, budgets, and the open server on loopback."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import httpx
import pytest
from tests.waiting import PATIENCE, wait_for

from invivo.errors import InvalidRequest
from invivo.server.app import create_app
from invivo.server.keys import KeyStore
from invivo.server.run import ServerThread
from invivo.server.settings import Settings, is_loopback

CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    made = KeyStore(f"sqlite:///{tmp_path_factory.mktemp('keys') / 'keys.sqlite3'}")
    yield made
    made.close()


@pytest.fixture(scope="module")
def secrets(store):
    return {
        "generate": store.add("generator", ["generate"])[0],
        "score": store.add("scorer", ["score"])[0],
        "metrics": store.add("watcher", ["metrics"])[0],
        "adapters": store.add("manager", ["adapters"])[0],
        "admin": store.add("root", ["admin"])[0],
        "poor": store.add("poor", ["generate", "score"], budget=60)[0],
        "gone": store.add("gone", ["admin"])[0],
    }


@pytest.fixture(scope="module")
def keyed(lm, store, secrets):
    store.revoke("gone")
    settings = Settings(port=0, require_keys=True, database=_url(store))
    with ServerThread(lm, settings) as running:
        yield running


def _url(store: KeyStore) -> str:
    return store._engine.url.render_as_string(hide_password=False)


def ask(server: ServerThread, secret: str | None, method: str, path: str, **content):
    headers = {} if secret is None else {"authorization": f"Bearer {secret}"}
    return httpx.request(method, server.url + path, headers=headers, timeout=PATIENCE, **content)


def test_without_a_known_key_nothing_is_answered(keyed, secrets):
    for secret in (None, "iv-wrong", secrets["gone"], "\x7f"):
        response = ask(keyed, secret, "POST", "/v1/chat/completions", json=CHAT)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["type"] == "authentication_error"
        assert response.json()["error"]["remedy"]
    assert ask(keyed, None, "GET", "/health").status_code == 200
    assert ask(keyed, None, "GET", "/ready").status_code == 200
    assert ask(keyed, None, "GET", "/").status_code == 200


ROUTES = [
    ("POST", "/v1/chat/completions", CHAT, "generate"),
    ("POST", "/v1/completions", {"prompt": "Hello", "max_tokens": 2}, "generate"),
    ("POST", "/v1/score", {"items": [{"text": "Hello"}]}, "score"),
    ("POST", "/v1/embeddings", {"input": "Hello"}, "score"),
    ("GET", "/metrics", None, "metrics"),
    ("GET", "/v1/live", None, "metrics"),
    ("DELETE", "/v1/adapters/none", None, "adapters"),
]


@pytest.mark.parametrize(("method", "path", "body", "scope"), ROUTES)
def test_a_scope_opens_its_routes_only(keyed, secrets, method, path, body, scope):
    for name in ("generate", "score", "metrics", "adapters"):
        status = ask(keyed, secrets[name], method, path, json=body).status_code
        assert (status == 403) == (name != scope), (name, status)
    assert ask(keyed, secrets["admin"], method, path, json=body).status_code in (200, 404)


def test_names_are_for_every_key_and_tokens_for_users(keyed, secrets):
    for name in ("generate", "score", "metrics", "adapters"):
        for path in ("/v1/models", "/v1/adapters"):
            assert ask(keyed, secrets[name], "GET", path).status_code == 200
        answer = ask(keyed, secrets[name], "POST", "/tokenize", json={"text": "Hello"})
        assert answer.status_code == (200 if name in ("generate", "score") else 403)


def test_a_path_on_the_server_is_for_administrators(keyed, secrets, adapter_folder):
    body = {"name": "mine", "path": str(adapter_folder)}
    refused = ask(keyed, secrets["adapters"], "POST", "/v1/adapters", json=body)
    assert refused.status_code == 403
    assert refused.json()["error"]["param"] == "path"
    assert ask(keyed, secrets["admin"], "POST", "/v1/adapters", json=body).status_code == 200
    assert ask(keyed, secrets["adapters"], "DELETE", "/v1/adapters/mine").status_code == 200


def test_an_upload_is_not_taken_in_before_the_key_is_seen(keyed, secrets):
    """The refusal comes while most of a large body has not been sent yet."""
    for secret, status in (("iv-wrong", b" 401 "), (secrets["score"], b" 403 ")):
        with socket.create_connection(("127.0.0.1", keyed.port), timeout=PATIENCE) as connection:
            connection.sendall(
                b"POST /v1/adapters/upload HTTP/1.1\r\nHost: 127.0.0.1\r\n"
                b"Content-Type: multipart/form-data; boundary=x\r\n"
                b"Content-Length: 100000000\r\nAuthorization: Bearer "
                + secret.encode()
                + b"\r\n\r\n--x\r\n"
            )
            assert status in connection.recv(4096).splitlines()[0]


def _spent(store: KeyStore, name: str, at_least: int) -> int:
    wait_for(lambda: store.get(name).used >= at_least, lambda: store.get(name))
    return store.get(name).used


async def test_a_budget_is_never_overspent(keyed, store, secrets):
    """Many requests at once: what is granted stays within the budget, the rest is refused."""
    headers = {"authorization": f"Bearer {secrets['poor']}"}
    async with httpx.AsyncClient(base_url=keyed.url, headers=headers, timeout=PATIENCE) as client:
        body = {"prompt": "the cat", "max_tokens": 8, "ignore_eos": True}
        answers = await asyncio.gather(
            *(client.post("/v1/completions", json=body) for _ in range(20))
        )
        good = [one.json()["usage"]["total_tokens"] for one in answers if one.status_code == 200]
        refused = [one.json()["error"] for one in answers if one.status_code == 403]
        assert good
        assert refused
        assert len(good) + len(refused) == 20
        assert all("budget" in error["message"] and error["remedy"] for error in refused)
        spent = _spent(store, "poor", sum(good))
        assert spent == sum(good) <= 60
        # What is left cuts an answer short instead of being overspent.
        left = 60 - spent
        prompt = answers[0].json()["usage"]["prompt_tokens"] if answers[0].is_success else 2
        last = await client.post(
            "/v1/completions", json={"prompt": "the cat", "max_tokens": None, "ignore_eos": True}
        )
        if left > prompt:
            assert last.json()["usage"]["total_tokens"] == left
            assert _spent(store, "poor", 60) == 60
        after = await client.post("/v1/score", json={"items": [{"text": "the cat sat on a mat"}]})
        assert after.status_code == 403


def test_a_cancelled_stream_is_charged_for_what_it_gave(keyed, store, secrets):
    before = store.get("root").used
    body = {"prompt": "the cat", "max_tokens": 200, "stream": True, "ignore_eos": True}
    headers = {"authorization": f"Bearer {secrets['admin']}"}
    url = f"{keyed.url}/v1/completions"
    with httpx.stream("POST", url, json=body, headers=headers, timeout=PATIENCE) as stream:
        next(stream.iter_lines())
    assert before < _spent(store, "root", before + 1) <= before + 210


def test_other_addresses_need_a_key(lm, tmp_path: Path):
    url = f"sqlite:///{tmp_path / 'keys.sqlite3'}"
    with pytest.raises(InvalidRequest) as caught:
        create_app(lm, Settings(host="0.0.0.0", database=url))
    assert "invivo keys add" in str(caught.value)
    store = KeyStore(url)
    store.add("one")
    create_app(lm, Settings(host="0.0.0.0", database=url))
    store.revoke("one")
    with pytest.raises(InvalidRequest):
        create_app(lm, Settings(require_keys=True, database=url))
    store.close()


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.0.1", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("LOCALHOST.", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.5", False),
        ("localhost.evil.example", False),
        ("", False),
    ],
)
def test_loopback_is_recognised(host, expected):
    assert is_loopback(host) is expected


def test_an_open_server_answers_its_own_machine_and_pages_only(lm):
    app = create_app(lm)

    async def status(peer: str, **headers: str) -> int:
        transport = httpx.ASGITransport(app, client=(peer, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return (await client.get("/v1/models", headers=headers)).status_code

    assert asyncio.run(status("127.0.0.1")) == 200
    assert asyncio.run(status("10.0.0.7")) == 401
    assert asyncio.run(status("127.0.0.1", host="localhost:8000")) == 200
    assert asyncio.run(status("127.0.0.1", host="evil.example")) == 403
    assert asyncio.run(status("127.0.0.1", host="[::")) == 403
    assert asyncio.run(status("127.0.0.1", origin="http://evil.example")) == 403
    assert asyncio.run(status("127.0.0.1", origin="null")) == 403
    assert asyncio.run(status("127.0.0.1", origin="http://[")) == 403
    assert asyncio.run(status("127.0.0.1", origin="http://127.0.0.1")) == 200


def test_an_allowed_origin_may_call(lm):
    app = create_app(lm, Settings(allowed_origins=("https://page.example",)))

    async def call() -> httpx.Response:
        transport = httpx.ASGITransport(app, client=("127.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.get("/v1/models", headers={"origin": "https://page.example"})

    response = asyncio.run(call())
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "https://page.example"
