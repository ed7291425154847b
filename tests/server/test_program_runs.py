"""What programs bring back: the definition's numbers, in this process and over HTTP."""

from __future__ import annotations

import asyncio

import httpx
import numpy as np
import pytest
import torch
from tests.oracle_lm import oracle_run

import invivo
from invivo.edits.builder import last, program
from invivo.errors import Forbidden
from invivo.lm import LM
from invivo.program_result import ProgramResult
from invivo.server.keys import KeyStore
from invivo.server.run import ServerThread
from invivo.server.settings import Settings

PROMPT = "the cat is red and the dog"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the cat?"}]
GREEDY = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
STREAM = {"capture": "layers.*.resid.post", "pos": "@last", "name": "stream"}
PATCH = {
    "runs": {"cf": {"prompt": "hello world"}},
    "steps": [
        {"at": "layers.1.attn.head.*.z", "pos": "@last", "do": "replace",
         "from": {"run": "cf", "map": "end"}},
        {"at": "layers.0.resid.post", "pos": {"span": " red"}, "do": "scale", "a": 2},
    ],
    "out": [
        {"measure": "logit_diff", "a": " cat", "b": " dog"},
        {"measure": "kl", "to": "plain"},
        STREAM,
    ],
}  # fmt: skip
SWEEP = {
    "steps": [{"at": "layers.$L.attn.head.$H.z", "pos": "@last", "do": "zero"}],
    "sweep": {"L": "0..2", "H": [0, 3]},
    "out": [{"measure": "logprob", "token": " cat", "name": "cat"}],
}
LENS = {"out": [{"capture": "layers.*.resid.post", "pos": "@prompt", "reduce": "lens", "top": 4}]}
MASKED = {"out": [{"capture": "layers.1.attn.head.[0,2].score"}]}  # with -inf
EVERYTHING = {"out": [{"capture": "layers.*.attn.head.*.out"}, {"capture": "layers.*.mlp.neuron"}]}
PROGRAMS = {"patch": PATCH, "sweep": SWEEP, "lens": LENS, "masked": MASKED, "all": EVERYTHING}


@pytest.fixture(scope="session")
def remote(server):
    with invivo.connect(f"{server.url}/v1") as made:
        yield made


@pytest.fixture(params=["local", "remote"])
def either(request, lm, remote) -> LM:
    return lm if request.param == "local" else remote


def same(got: ProgramResult, expected: ProgramResult, tolerance: float = 2e-4) -> None:
    """Equal up to float32."""
    close = {"rtol": tolerance, "atol": tolerance}
    assert [row.binding for row in got.rows] == [row.binding for row in expected.rows]
    for left, right in zip(got.rows, expected.rows, strict=True):
        for a, b in zip(left.captures, right.captures, strict=True):
            assert (a.name, a.site, a.run, a.heads, a.positions, a.tokens) == (
                b.name, b.site, b.run, b.heads, b.positions, b.tokens
            )  # fmt: skip
            np.testing.assert_allclose(a.values, b.values, **close)
            assert (a.ids is None) == (b.ids is None)
            if a.ids is not None and b.ids is not None:
                np.testing.assert_array_equal(a.ids, b.ids)
                assert a.words.tolist() == b.words.tolist()
        for m, n in zip(left.measures, right.measures, strict=True):
            assert (m.name, m.kind, m.positions, m.tokens) == (
                n.name,
                n.kind,
                n.positions,
                n.tokens,
            )
            np.testing.assert_allclose(m.values, n.values, **close)
    assert got.explain == expected.explain
    assert got.meta["program"] == expected.meta["program"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_run_brings_back_what_the_definition_says(either, lm, name):
    same(either.run(PROGRAMS[name], PROMPT), oracle_run(lm, PROGRAMS[name], PROMPT))


def test_every_kind_of_prompt_and_several(either, lm):
    prompts = [PROMPT, [5, 6, 7], CHAT, ["is ", {"set": ["red", "blue"]}, "?"]]
    program = {"out": [STREAM]}
    for got, prompt in zip(either.run(program, prompts), prompts, strict=True):
        same(got, oracle_run(lm, program, prompt))
    same(either.run(program, CHAT), oracle_run(lm, program, CHAT))
    same(asyncio.run(either.arun(program, PROMPT)), oracle_run(lm, program, PROMPT))


def test_tensors_and_parameters_reach_the_program(either, lm):
    vector = torch.linspace(-1, 1, 32)
    steering = program().at("layers.1.resid.post", pos=last).add(vector, 2.0)
    steering.measure("logit", token=5)
    same(either.run(steering, PROMPT), oracle_run(lm, steering, PROMPT))
    named = {
        "params": {"mask": {"shape": [4, 1], "init": 1}},
        "runs": {"cf": {"prompt": "hello world"}},
        "steps": [{"at": "layers.1.attn.head.*.z", "pos": "@last", "do": "lerp",
                   "w": {"param": "mask"}, "from": {"run": "cf", "map": "end"}}],
        "out": [STREAM],
    }  # fmt: skip
    given = {"mask": np.array([[0.0], [1], [0.5], [1]], dtype=np.float32)}
    for params in (None, given):
        got = either.run(named, PROMPT, params=params)
        same(got, oracle_run(lm, named, PROMPT, params=params))
    assert not np.allclose(got.array("stream"), either.run(named, PROMPT).array("stream"))


# --- sets -------------------------------------------------------------------------------------

SET = ["Which? ", {"set": [" the red dog", " you", " blue cat"]}, " is"]


def orders():
    members = SET[1]["set"]
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        yield [SET[0], {"set": [members[i] for i in order]}, SET[2]]


def test_a_set_is_what_parallel_blocks_are(either, lm):
    prompt = lm.marked(SET)
    blocks = [{"range": list(r)} for r in prompt.sets[0]]
    by_hand = {"steps": [{"at": "input.mask", "do": "parallel", "blocks": blocks}], "out": [STREAM]}
    expected = oracle_run(lm, by_hand, list(prompt.ids))
    got = either.run({"out": [STREAM]}, SET)
    np.testing.assert_allclose(got.array("stream"), expected.array("stream"), atol=2e-4)
    plain = either.run({"out": [STREAM]}, list(prompt.ids))
    assert not np.allclose(got.array("stream"), plain.array("stream"), atol=1e-3)


def test_one_member_is_no_set(either, lm):
    joined = either.run({"out": [STREAM]}, ["the ", {"set": ["cat"]}, " is"])
    ids = list(lm.marked(["the ", {"set": ["cat"]}, " is"]).ids)
    plain = either.run({"out": [STREAM]}, ids)
    np.testing.assert_allclose(joined.array("stream"), plain.array("stream"), atol=1e-6)


# --- over HTTP --------------------------------------------------------------------------------


def test_many_numbers_come_as_blobs_and_few_in_the_answer(http):
    body = {"program": EVERYTHING, "prompt": "the cat is red " * 24}
    large = http.post("/v1/run", json=body).json()["data"][0]
    assert set(large["pools"]) == {"float32"}
    assert set(large["rows"][0]["captures"][0]["values"]) == {"shape", "dtype", "offset"}
    assert http.get(f"/v1/blobs/{large['pools']['float32']}").status_code == 200
    assert large["pools"]["float32"] not in [b["id"] for b in http.get("/v1/blobs").json()["data"]]
    small = http.post("/v1/run", json={"program": SWEEP, "prompt": PROMPT}).json()["data"][0]
    assert "pools" not in small
    assert len(small["rows"]) == 6


def test_stored_programs_run_by_their_hash(either, lm):
    name = either.store_program(SWEEP)
    same(either.run(name, PROMPT), oracle_run(lm, SWEEP, PROMPT))


def test_all_passes_of_a_program_are_on_the_account(lm, tmp_path):
    database = f"sqlite:///{tmp_path / 'keys.sqlite3'}"
    store = KeyStore(database)
    n = len(lm.tokenize(PROMPT, special=True))
    secret, key = store.add("ann", ("generate", "edit"), budget=10 * n)
    settings = Settings(port=0, require_keys=True, database=database)
    with ServerThread(lm, settings) as running:
        headers = {"Authorization": f"Bearer {secret}"}
        with httpx.Client(base_url=running.url, headers=headers, timeout=60) as ann:
            answer = ann.post("/v1/run", json={"program": SWEEP, "prompt": PROMPT})
            assert answer.json()["usage"]["prompt_tokens"] == 6 * n
            again = ann.post("/v1/run", json={"program": SWEEP, "prompt": PROMPT})
            assert again.status_code == 403
            assert "budget" in again.json()["error"]["message"]
        with invivo.connect(running.url, key=secret) as ann_lm, pytest.raises(Forbidden):
            ann_lm.generate(PROMPT, interventions={**PATCH, "runs": {"cf": {"prompt": "a " * 60}}})
    assert store.used(key.id) == 6 * n
