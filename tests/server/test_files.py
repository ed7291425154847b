"""Training files over HTTP: taken in within bounds, read back, listed in pages, one's own only."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import httpx
import openai
import pytest
from tests.waiting import PATIENCE, wait_for

from invivo.server.keys import KeyStore
from invivo.server.run import ServerThread
from invivo.server.settings import Settings

LINES = b'{"text": "the cat is red"}\n{"text": "the dog is blue"}\n'


@pytest.fixture(autouse=True)
def clean(lm) -> Iterator[None]:
    def forget() -> None:
        for one in lm.fine_tuning.files():
            lm.fine_tuning.delete_file(one.id)

    forget()
    yield
    forget()


def upload(http: httpx.Client, content: bytes = LINES, name: str = "data.jsonl", **form):
    return http.post(
        "/v1/files", data={"purpose": "fine-tune"} | form, files={"file": (name, content)}
    )


def test_the_official_client_sends_reads_and_deletes(client: openai.OpenAI):
    sent = client.files.create(file=("data.jsonl", LINES), purpose="fine-tune")
    assert sent.id.startswith("file-")
    assert (sent.bytes, sent.filename, sent.purpose) == (len(LINES), "data.jsonl", "fine-tune")
    assert sent.status == "processed"
    assert client.files.retrieve(sent.id) == sent
    assert client.files.content(sent.id).read() == LINES
    assert [one.id for one in client.files.list(purpose="fine-tune")] == [sent.id]
    assert list(client.files.list(purpose="batch")) == []
    assert client.files.delete(sent.id).deleted
    with pytest.raises(openai.NotFoundError) as caught:
        client.files.retrieve(sent.id)
    assert caught.value.param == "file_id"


def test_pages_of_files_hold_each_once(client: openai.OpenAI):
    sent = [
        client.files.create(file=(f"{i}.jsonl", LINES + b"%d" % i), purpose="fine-tune").id
        for i in range(5)
    ]
    page = client.files.list(limit=2, order="asc")
    assert len(page.data) == 2
    assert page.has_more
    ascending = [one.id for one in client.files.list(limit=2, order="asc")]
    assert sorted(ascending) == sorted(sent)
    assert [one.id for one in client.files.list(limit=3)] == ascending[::-1]
    with pytest.raises(openai.BadRequestError) as caught:
        client.files.list(after="file-none")
    assert caught.value.param == "after"


@pytest.mark.parametrize(
    ("parts", "param"),
    [
        ({"data": {"purpose": "batch"}, "files": {"file": ("a", b"x")}}, "purpose"),
        ({"files": {"file": ("a", b"x")}}, "purpose"),
        ({"data": {"purpose": "fine-tune"}, "files": {"fil": ("a", b"x")}}, "file"),
        ({"data": {"purpose": "fine-tune", "file": "text"}}, "file"),
        (
            {"data": {"purpose": "fine-tune", "colour": "red"}, "files": {"file": ("a", b"x")}},
            "colour",
        ),
        ({"data": {"purpose": "fine-tune"}, "files": {"file": ("a" * 300, b"x")}}, "file"),
        ({"json": {"purpose": "fine-tune"}}, "file"),
    ],
)
def test_a_refused_upload_names_the_part(http, lm, parts, param):
    answer = http.post("/v1/files", **parts)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["remedy"]
    assert lm.fine_tuning.files() == []


def test_a_large_upload_is_cut_off_while_it_is_read(lm):
    with (
        ServerThread(lm, Settings(port=0, max_file_bytes=3 << 20)) as narrow,
        httpx.Client(base_url=narrow.url, timeout=PATIENCE) as http,
    ):
        assert upload(http, b"x" * (2 << 20)).status_code == 200
        answer = upload(http, b"x" * (4 << 20))
        assert answer.status_code == 413
        boundary = b"b"
        head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'

        def unsized() -> Iterator[bytes]:  # no Content-Length to go by
            yield head
            for _ in range(8):
                yield b"y" * (1 << 20)
            yield b"\r\n--b--\r\n"

        with_type = {"content-type": f"multipart/form-data; boundary={boundary.decode()}"}
        try:
            cut = http.post("/v1/files", content=unsized(), headers=with_type)
            assert cut.status_code == 413
        except httpx.TransportError:  # the server closed before everything was sent
            pass
    assert [one.bytes for one in lm.fine_tuning.files()] == [2 << 20]


def test_all_files_together_have_a_bound(lm):
    with (
        ServerThread(lm, Settings(port=0, max_stored_bytes=100)) as narrow,
        httpx.Client(base_url=narrow.url, timeout=PATIENCE) as http,
    ):
        assert upload(http, b"x" * 60).status_code == 200
        answer = upload(http, b"y" * 60)
        assert answer.status_code == 413
        assert "Delete" in answer.json()["error"]["remedy"]


def test_a_client_that_goes_while_it_sends_leaves_nothing(server, lm, http):
    def kept() -> set[str]:
        return {str(path) for path in lm.fine_tuning.folder.rglob("*") if "sqlite" not in path.name}

    assert upload(http).status_code == 200  # the folders are there
    before, known = kept(), lm.fine_tuning.files()
    for sent in (0, 1000, 3 << 20):
        connection = socket.create_connection(("127.0.0.1", server.port))
        connection.sendall(
            b"POST /v1/files HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            b"Content-Type: multipart/form-data; boundary=b\r\n"
            b"Content-Length: 5000000\r\n\r\n"
            b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
            + b"x"
            * sent
        )
        connection.close()
    assert http.get("/health").status_code == 200
    wait_for(lambda: kept() == before, kept)
    assert lm.fine_tuning.files() == known


def test_a_key_sees_its_own_files_and_an_administrator_all(lm, tmp_path):
    url = f"sqlite:///{tmp_path / 'keys.sqlite3'}"
    store = KeyStore(url)
    secrets = {
        "ann": store.add("ann", ["finetune"])[0],
        "bob": store.add("bob", ["finetune"])[0],
        "root": store.add("root", ["admin"])[0],
        "reader": store.add("reader", ["generate"])[0],
    }
    with ServerThread(lm, Settings(port=0, require_keys=True, database=url)) as keyed:
        base = f"{keyed.url}/v1"
        people = {
            name: openai.OpenAI(base_url=base, api_key=secret, max_retries=0)
            for name, secret in secrets.items()
        }
        sent = people["ann"].files.create(file=("data.jsonl", LINES), purpose="fine-tune")
        same = people["bob"].files.create(file=("data.jsonl", LINES), purpose="fine-tune")
        assert same.id != sent.id
        assert [one.id for one in people["ann"].files.list()] == [sent.id]
        assert [one.id for one in people["bob"].files.list()] == [same.id]
        assert {one.id for one in people["root"].files.list()} == {sent.id, same.id}
        bob = people["bob"].files
        told = []
        for file_id in (sent.id, "file-unknown"):
            for call in (bob.retrieve, bob.content, bob.delete):
                with pytest.raises(openai.NotFoundError) as caught:
                    call(file_id)
                told.append(caught.value.message.replace(file_id, "ID"))
        assert len({text.split("request_id")[0] for text in told}) == 1
        with pytest.raises(openai.PermissionDeniedError):
            people["reader"].files.list()
        assert people["root"].files.delete(same.id).deleted
        assert people["ann"].files.delete(sent.id).deleted
        for one in people.values():
            one.close()
    store.close()
