"""Adapters over HTTP: from the server's disk, by upload, and never anything but safetensors."""

from __future__ import annotations

import json
import pickle

import pytest
from safetensors.torch import load, save
from tests.waiting import wait_for

from invivo.adapter_archive import unpacked


@pytest.fixture
def parts(adapter_folder):
    return {
        "config": (adapter_folder / "adapter_config.json").read_bytes(),
        "weights": (adapter_folder / "adapter_model.safetensors").read_bytes(),
    }


@pytest.fixture
def name(http):
    yield "queries"
    http.delete("/v1/adapters/queries")


def upload(http, name, parts):
    return http.post("/v1/adapters/upload", data={"name": name}, files=parts)


def greedy(http, model):
    body = {"model": model, "prompt": "the cat", "temperature": 0, "max_tokens": 12}
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def test_an_adapter_from_the_disk_answers_under_its_name(http, client, name, adapter_folder):
    base = greedy(http, "tiny")
    loaded = http.post("/v1/adapters", json={"name": name, "path": str(adapter_folder)})
    assert loaded.status_code == 200, loaded.text
    assert loaded.json()["model"] == "tiny:queries"
    assert loaded.json()["rank"] == 4
    assert {one.id for one in client.models.list()} == {"tiny", "tiny:queries"}
    assert client.models.retrieve("tiny:queries").parent == "tiny"
    assert greedy(http, "tiny:queries") != base
    assert greedy(http, "tiny") == base
    assert [one["name"] for one in http.get("/v1/adapters").json()["data"]] == ["queries"]
    gone = http.delete("/v1/adapters/queries").json()
    assert gone == {"name": "queries", "object": "adapter", "deleted": True}
    assert http.get("/v1/adapters").json()["data"] == []


def test_an_uploaded_adapter_does_the_same(http, server, name, parts, adapter_folder):
    http.post("/v1/adapters", json={"name": name, "path": str(adapter_folder)})
    expected = greedy(http, "tiny:queries")
    http.delete("/v1/adapters/queries")
    answer = upload(http, name, parts)
    assert answer.status_code == 200, answer.text
    assert greedy(http, "tiny:queries") == expected
    again = upload(http, name, parts)
    assert again.json()["version"] == answer.json()["version"] + 1
    assert list(server.app.state.services.uploads.iterdir()) == []


def test_the_files_of_an_adapter_come_back_as_they_went(http, server, name, parts):
    assert upload(http, name, parts).status_code == 200
    answer = http.get("/v1/adapters/queries/content")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/zip"
    assert 'filename="queries.zip"' in answer.headers["content-disposition"]
    files = unpacked(answer.content)
    given, made = load(parts["weights"]), load(files["adapter_model.safetensors"])
    assert {key: tensor.tolist() for key, tensor in made.items()} == {
        key: tensor.tolist() for key, tensor in given.items()
    }
    config = json.loads(files["adapter_config.json"])
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 32)
    assert config["base_model_name_or_path"] == "tiny"  # and not where the model lies
    # They go in again, with the same answers.
    expected = greedy(http, "tiny:queries")
    again = dict(zip(("config", "weights"), files.values(), strict=True))
    assert upload(http, name, again).status_code == 200
    assert greedy(http, "tiny:queries") == expected
    wait_for(lambda: list(server.app.state.services.uploads.iterdir()) == [])


def test_files_of_an_adapter_that_is_not_there(http):
    answer = http.get("/v1/adapters/nobody/content")
    assert answer.status_code == 404
    assert answer.json()["error"]["remedy"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"weights": pickle.dumps({"a": 1})}, "weights"),
        ({"weights": b"PK\x03\x04" + b"\0" * 100}, "weights"),
        ({"weights": b""}, "weights"),
        ({"weights": b"\xff" * 8 + b"{}"}, "weights"),
        ({"weights": (20).to_bytes(8, "little") + b"{" + b"x" * 40}, None),
        ({"config": b"no json"}, "config"),
        ({"config": b"[]"}, "config"),
        ({"config": b"{}"}, None),
        ({"config": b'{"peft_type": "IA3"}'}, None),
        ({"config": b"[" * 100_000}, "config"),
    ],
)
def test_an_upload_of_anything_else_is_refused(http, server, parts, change, param):
    answer = upload(http, "broken", parts | change)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["remedy"]
    if param is not None:
        assert error["param"] == param
    assert http.get("/v1/adapters").json()["data"] == []
    assert list(server.app.state.services.uploads.iterdir()) == []


def test_a_refused_upload_does_not_tell_where_the_server_keeps_it(http, server, parts):
    header = b"{not json}"
    broken = len(header).to_bytes(8, "little") + header
    answer = upload(http, "queries", parts | {"weights": broken})
    assert answer.status_code == 400
    assert str(server.app.state.services.uploads) not in answer.text
    assert "adapter_model.safetensors" in answer.json()["error"]["message"]


def test_an_upload_with_numbers_that_are_not_finite_names_the_tensor(http, parts):
    tensors = load(parts["weights"])
    key = sorted(tensors)[-1]
    tensors[key][0, 0] = float("inf")
    answer = upload(http, "queries", parts | {"weights": save(tensors)})
    assert answer.status_code == 400
    assert "finite" in answer.json()["error"]["message"]
    assert http.get("/v1/adapters").json()["data"] == []


def test_an_upload_with_a_missing_part_names_it(http, parts):
    answer = http.post("/v1/adapters/upload", data={"name": "x"}, files={"config": parts["config"]})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "weights"
    answer = upload(http, "../../etc", parts)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "name"
