"""Programs through LM, in this process and over HTTP: the same results, the same refusals."""

from __future__ import annotations

import json

import httpx
import numpy as np
import pytest
import torch
from safetensors.numpy import load, save
from tests.waiting import PATIENCE

import invivo
from invivo.edits.builder import last, program
from invivo.edits.program import parse_program
from invivo.edits.schema import json_schema
from invivo.errors import Forbidden, InvalidRequest, NotFound, TooLarge
from invivo.lm import LM
from invivo.server.keys import KeyStore
from invivo.server.run import ServerThread
from invivo.server.settings import Settings

PROMPT = "the cat is red and the dog"
PATCH = {
    "runs": {"cf": {"prompt": "hello world"}},
    "steps": [
        {"at": "layers.1.attn.head.*.z", "pos": "@last", "do": "replace",
         "from": {"run": "cf", "map": "end"}},
        {"at": "layers.0.resid.post", "pos": {"span": " red"}, "do": "scale", "a": 2},
    ],
    "out": [
        {"measure": "logit_diff", "a": " cat", "b": " dog"},
        {"capture": "layers.*.resid.post", "pos": "@last", "name": "stream"},
    ],
}  # fmt: skip


@pytest.fixture(scope="session")
def remote(server):
    with invivo.connect(f"{server.url}/v1") as made:
        yield made


@pytest.fixture(params=["local", "remote"])
def either(request, lm, remote) -> LM:
    return lm if request.param == "local" else remote


def steering(n=32):
    vector = torch.linspace(-1, 1, n)
    return program().at("layers.1.resid.post", pos=last).add(vector, 2.0).measure("logit", token=5)


# --- explaining and storing -------------------------------------------------------------------


def test_explain_tells_what_would_be_done(either):
    told = either.explain(PATCH, PROMPT)
    assert told["program"] == parse_program(PATCH).hash
    assert told["order"][0]["at"] == "layers.0.resid.post"
    assert told["order"][0]["tokens"] == [" red"]
    assert [c["shape"] for c in told["captures"]] == [[1, 32]] * 3
    assert told["cost"]["forwards"] == 2


def test_every_form_of_a_program_is_the_same(either):
    text = json.dumps(PATCH)
    stored = either.store_program(PATCH)
    for form in (PATCH, text, parse_program(PATCH), stored):
        assert either.explain(form, PROMPT)["program"] == stored
    assert either.stored_program(stored) == parse_program(PATCH).to_dict()
    built = steering()
    assert either.explain(built, PROMPT)["program"] == built.build().hash


def test_prompts_of_every_form(either, lm):
    for prompt in (PROMPT, lm.tokenize(PROMPT, special=True)):
        assert either.explain(PATCH, prompt)["runs"]["main"]["text"].endswith("and the dog")
    told = either.explain(
        {"steps": [{"at": "embed.out", "pos": {"role": "user"}, "do": "zero"}]},
        [{"role": "system", "content": "not you"}, {"role": "user", "content": "the cat"}],
    )
    assert "".join(told["order"][0]["tokens"]) == "the cat"
    told = either.explain({"out": []}, ["is ", {"set": ["red", "a cat"]}, "?"])
    assert told["runs"]["main"]["position_numbers"][-1] == max(
        len(lm.tokenize("red")), len(lm.tokenize("a cat"))
    ) + len(lm.tokenize("is ", special=True))


def test_the_order_of_a_set_makes_no_difference_to_what_runs(either):
    named = {"sel": {"x": {"group": "set0", "nth": 0}}, "steps": [
        {"at": "embed.out", "pos": "@x", "do": "scale", "a": 2}]}  # fmt: skip
    told = [
        either.explain(named, ["is ", {"set": members}, "?"])
        for members in (["red", "blue"], ["blue", "red"])
    ]
    assert told[0]["runs"] == told[1]["runs"]
    texts = ["".join(one["order"][0]["tokens"]) for one in told]
    assert texts == ["red", "blue"]  # members are named in the order given


def test_tensors_are_kept_under_their_content(either):
    vector = np.linspace(-1, 1, 32, dtype=np.float32)
    name = either.store_blob(vector)
    assert name == either.store_blob(torch.from_numpy(vector)) == either.store_blob(vector)
    np.testing.assert_array_equal(either.stored_blob(name), vector)
    add = {"at": "layers.1.resid.post", "do": "add", "v": f"blob:{name}"}
    assert either.explain({"steps": [add]}, PROMPT)["order"][0]["do"] == "add"
    add["v"] = "blob:way"
    for given in (vector, list(map(float, vector)), name, f"blob:{name}"):
        told = either.explain({"steps": [add]}, PROMPT, blobs={"way": given})
        assert told["order"][0]["at"] == "layers.1.resid.post"


REFUSED = {
    "unknown site": ({"steps": [{"at": "layers.0.nowhere", "do": "zero"}]}, "steps[0].at"),
    "no such layer": ({"steps": [{"at": "layers.9.resid.post", "do": "zero"}]}, "steps[0].at"),
    "no match": (
        {"steps": [{"at": "embed.out", "pos": {"span": "Poland"}, "do": "zero"}]},
        "steps[0].pos",
    ),
    "unknown key": ({"step": []}, "step"),
    "unknown blob": ({"steps": [{"at": "embed.out", "do": "add", "v": "blob:x"}]}, "steps[0].v"),
    "run with strange tokens": ({"runs": {"cf": {"prompt": [9999]}}}, "runs.cf.prompt"),
    "another model": ({"model": "llama-9"}, "model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_with_its_place(either, case):
    wrong, field = REFUSED[case]
    for call in (either.explain, either.run):
        with pytest.raises(InvalidRequest) as caught:
            call(wrong, PROMPT)
        assert caught.value.field == field
    with pytest.raises(InvalidRequest) as caught:
        either.generate(PROMPT, max_tokens=2, interventions=wrong)
    assert caught.value.field == field


def test_other_refusals(either):
    with pytest.raises(NotFound):
        either.explain("sha256:" + 64 * "0", PROMPT)
    with pytest.raises(NotFound):
        either.stored_program("sha256:" + 64 * "0")
    with pytest.raises(NotFound):
        either.stored_blob("sha256:" + 64 * "0")
    with pytest.raises(NotFound):
        either.explain(PATCH, PROMPT, blobs={"x": "sha256:" + 64 * "0"})
    with pytest.raises(InvalidRequest):
        either.explain("no json", PROMPT)
    with pytest.raises(InvalidRequest):
        either.explain(17, PROMPT)
    with pytest.raises(InvalidRequest):
        either.store_blob(np.array([np.nan], dtype=np.float32))
    with pytest.raises(InvalidRequest):
        either.store_blob({"no": "tensor"})
    with pytest.raises(InvalidRequest) as caught:
        either.generate(PROMPT, blobs={"x": [1.0]})
    assert caught.value.field == "blobs"
    with pytest.raises(TooLarge):
        either.explain({"sweep": {"L": "0..99", "H": "0..99"}}, PROMPT)


# --- over HTTP --------------------------------------------------------------------------------


def test_blobs_over_http(http):
    file = save({"a": np.arange(4, dtype=np.float32), "b": np.ones((2, 3), np.float32)})
    answer = http.post("/v1/blobs", content=file).json()
    assert [(b["name"], b["shape"], b["dtype"], b["bytes"]) for b in answer["data"]] == [
        ("a", [4], "float32", 16),
        ("b", [2, 3], "float32", 24),
    ]
    ids = [b["id"] for b in answer["data"]]
    assert set(ids) <= {b["id"] for b in http.get("/v1/blobs").json()["data"]}
    fetched = load(http.get(f"/v1/blobs/{','.join(ids)}").content)
    assert fetched[ids[0]].tolist() == [0, 1, 2, 3]
    assert http.delete(f"/v1/blobs/{ids[0]}").json() == {"id": ids[0], "deleted": True}
    assert http.get(f"/v1/blobs/{ids[0]}").status_code == 404
    refused = http.post("/v1/blobs", content=b"not a file")
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "invalid_request"
    assert http.get("/v1/blobs/" + ",".join(ids * 40)).status_code == 413


def test_programs_over_http(http):
    made = http.post("/v1/programs", json={"program": PATCH}).json()
    assert made["id"] == parse_program(PATCH).hash
    assert http.get(f"/v1/programs/{made['id']}").json()["program"] == made["program"]
    assert http.get("/v1/programs/schema").json() == json_schema()
    assert made["id"] in [p["id"] for p in http.get("/v1/programs").json()["data"]]
    assert http.delete(f"/v1/programs/{made['id']}").json()["deleted"]
    assert http.get(f"/v1/programs/{made['id']}").status_code == 404


@pytest.fixture(scope="module")
def keyed(lm, tmp_path_factory):
    database = f"sqlite:///{tmp_path_factory.mktemp('keys') / 'keys.sqlite3'}"
    store = KeyStore(database)
    keys = {
        name: store.add(name, scopes)[0]
        for name, scopes in {
            "ann": ("generate", "score", "edit"),
            "ben": ("generate", "score", "edit"),
            "cat": ("generate", "score"),
        }.items()
    }
    with ServerThread(lm, Settings(port=0, require_keys=True, database=database)) as running:
        yield running.url, keys


def asking(keyed, name) -> httpx.Client:
    url, keys = keyed
    return httpx.Client(
        base_url=url, headers={"Authorization": f"Bearer {keys[name]}"}, timeout=PATIENCE
    )


def test_a_key_sees_its_own_programs_and_tensors_alone(keyed):
    with asking(keyed, "ann") as ann, asking(keyed, "ben") as ben:
        program_id = ann.post("/v1/programs", json={"program": {"model": None, "out": []}}).json()
        program_id = program_id["id"]
        blob_id = ann.post("/v1/blobs", content=save({"v": np.ones(32, np.float32)})).json()
        blob_id = blob_id["data"][0]["id"]
        assert ben.get("/v1/programs").json()["data"] == []
        assert ben.get("/v1/blobs").json()["data"] == []
        add = {"steps": [{"at": "embed.out", "do": "add", "v": f"blob:{blob_id}"}]}
        named = {"steps": [{"at": "embed.out", "do": "add", "v": "blob:v"}]}
        asked = [
            {"program": program_id, "prompt": PROMPT},
            {"program": add, "prompt": PROMPT},
            {"program": named, "prompt": PROMPT, "blobs": {"v": blob_id}},
        ]
        for body in asked:
            assert ann.post("/v1/explain", json=body).status_code == 200
        assert [ben.post("/v1/explain", json=b).status_code for b in asked] == [404, 400, 404]
        for path in (f"/v1/programs/{program_id}", f"/v1/blobs/{blob_id}"):
            assert ben.get(path).status_code == ben.delete(path).status_code == 404
            assert ann.get(path).status_code == 200


def test_programs_need_their_scope_and_sets_do_not(keyed):
    url, keys = keyed
    with invivo.connect(url, key=keys["cat"]) as cat:
        for call in (
            lambda: cat.run({"out": []}, PROMPT),
            lambda: cat.explain({"out": []}, PROMPT),
            lambda: cat.generate(PROMPT, max_tokens=2, interventions={"out": []}),
            lambda: cat.score(PROMPT, interventions={"out": []}),
            lambda: cat.store_blob([1.0]),
        ):
            with pytest.raises(Forbidden, match="scope edit"):
                call()
