"""Starting and stopping: addresses, names, stop signals."""

from __future__ import annotations

import socket
import threading

import httpx
import pytest
from tests.waiting import PATIENCE, held_after, wait_for

from invivo.errors import InvalidRequest
from invivo.server.run import ServerThread, run
from invivo.server.settings import Settings
from invivo.server.streaming import event


def test_a_taken_port_is_told(lm):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for start in (run, ServerThread):
            with pytest.raises(InvalidRequest) as caught:
                start(lm, Settings(port=port))
            assert caught.value.field == "port"


def test_an_unknown_address_is_told(lm, tmp_path):
    from invivo.server.keys import KeyStore

    url = f"sqlite:///{tmp_path / 'keys.sqlite3'}"
    store = KeyStore(url)
    store.add("one")
    with pytest.raises(InvalidRequest):
        run(lm, Settings(host="203.0.113.77", port=0, database=url))
    store.close()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_it_answers_on_loopback_under_either_name(lm, host):
    with ServerThread(lm, Settings(host=host, port=0)) as server:
        assert server.url.startswith(f"http://{host}:")
        assert httpx.get(f"{server.url}/health", timeout=PATIENCE).status_code == 200
        models = f"http://127.0.0.1:{server.port}/v1/models"
        assert httpx.get(models, timeout=PATIENCE).status_code == 200


def test_a_folder_s_model_goes_by_the_folder_s_name(lm):
    with ServerThread(lm, Settings(port=0)) as server:
        listed = httpx.get(f"{server.url}/v1/models", timeout=PATIENCE).json()["data"]
    assert [one["id"] for one in listed] == ["tiny-llama"]


def test_running_requests_may_finish_when_it_stops(lm):
    server = ServerThread(lm, Settings(port=0, shutdown_seconds=PATIENCE)).start()
    answers: list[httpx.Response] = []
    body = {"prompt": "the cat", "max_tokens": 150, "ignore_eos": True}

    def ask() -> None:
        answers.append(httpx.post(f"{server.url}/v1/completions", json=body, timeout=PATIENCE))

    client = threading.Thread(target=ask)
    with held_after(lm.engine, 1, until=lambda: server.app.state.services.draining):
        client.start()
        wait_for(lambda: server.app.state.services.gate.taken)
        server.stop()
    client.join()
    assert answers[0].json()["usage"]["completion_tokens"] == 150


def test_events_stay_on_one_line():
    odd = "a\nb\r\u2028c\u2029d\x85e\x0bf"
    encoded = event({"text": odd}).decode()
    assert encoded.endswith("\n\n")
    assert len(encoded[:-2].splitlines()) == 1
