"""What programs bring back: the definition's numbers, in this process and over HTTP."""

from __future__ import annotations

import asyncio

import httpx
import numpy as np
import pytest
import torch
from tests.oracle_lm import oracle_run
from tests.waiting import PATIENCE

import invivo
from invivo.edits.builder import last, program
from invivo.errors import Forbidden, InvalidRequest, NotFound
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
PROGRAMS = {
    "patch": PATCH, "sweep": SWEEP, "lens": LENS, "masked": MASKED, "all": EVERYTHING,
    "exact": {**PATCH, "numerics": "exact"},
}  # fmt: skip


@pytest.fixture(scope="session")
def remote(server):
    with invivo.connect(f"{server.url}/v1") as made:
        yield made


@pytest.fixture(params=["local", "remote"])
def either(request, lm, remote) -> LM:
    return lm if request.param == "local" else remote


def same(
    got: ProgramResult, expected: ProgramResult, tolerance: float = 2e-4, *, written: bool = False
) -> None:
    """Equal up to float32; a text that is written has more tokens to tell of."""
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
    assert written or got.explain == expected.explain
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


def test_edits_change_what_is_written_scored_and_answered(either, lm):
    plain = either.generate(PROMPT, **GREEDY)
    assert plain.program is None
    nothing = either.generate(PROMPT, interventions={"out": [STREAM]}, **GREEDY)
    assert nothing.choices[0].tokens == plain.choices[0].tokens
    same(nothing.program, oracle_run(lm, {"out": [STREAM]}, PROMPT), written=True)

    off = {"steps": [{"at": "layers.*", "do": "skip"}], "out": [{"measure": "logit", "token": 5}]}
    changed = either.generate(PROMPT, interventions=off, **GREEDY)
    # Without layers every token is answered by itself alone: the oracle says the same.
    ids = lm.tokenize(PROMPT, special=True)
    for token in changed.choices[0].tokens:
        lens = {"steps": off["steps"], "out": [{"capture": "layers.2.resid.post", "pos": "@last",
                                                "reduce": "lens", "top": 1}]}  # fmt: skip
        assert oracle_run(lm, lens, ids).captures[0].ids.item() == token
        ids.append(token)
    deltas = list(either.stream(PROMPT, interventions=off, **GREEDY))
    assert [t for d in deltas for t in d.tokens] == changed.choices[0].tokens
    assert [d.program is not None for d in deltas] == [False] * (len(deltas) - 1) + [True]
    same(deltas[-1].program, changed.program)

    answer = either.chat(CHAT, interventions=off, **GREEDY)
    assert answer.choices[0].tokens == [
        t for d in either.stream_chat(CHAT, interventions=off, **GREEDY) for t in d.tokens
    ]
    assert answer.program.measures[0].values.shape == (1,)

    scored = either.score(("the cat", " is red"), interventions=off)
    assert scored.logprob != pytest.approx(either.score(("the cat", " is red")).logprob, abs=1e-3)
    assert scored.program.measures[0].kind == "logit"
    both = either.score(["the cat is", "a red dog"], interventions=off)
    assert [s.program is not None for s in both] == [True, True]


def test_generated_tokens_are_edited_and_captured(either, lm):
    late = {
        "steps": [{"at": "layers.1.mlp.out", "pos": "@generated", "do": "zero"}],
        "out": [{"capture": "layers.1.mlp.out", "pos": "@all", "reduce": "norm", "name": "norm"}],
    }
    got = either.generate(PROMPT, interventions=late, **GREEDY)
    n = len(lm.tokenize(PROMPT, special=True))
    (norm,) = got.program.captures
    # The last token was drawn and not run.
    assert norm.positions == list(range(n + GREEDY["max_tokens"] - 1))
    assert (norm.values[:n] > 0).all()
    assert (norm.values[n:] == 0).all()
    assert norm.tokens[n:] == [lm.detokenize([t]) for t in got.choices[0].tokens[:-1]]


def test_async_calls_carry_programs_too(either):
    async def all_of_them():
        done = await either.agenerate(PROMPT, interventions={"out": [STREAM]}, **GREEDY)
        scored = await either.ascore(PROMPT, interventions={"out": [STREAM]})
        deltas = [d async for d in either.astream(PROMPT, interventions=PATCH, **GREEDY)]
        chat = await either.achat(CHAT, interventions={"out": [STREAM]}, **GREEDY)
        return done, scored, deltas[-1], chat

    for one in asyncio.run(all_of_them()):
        assert one.program.array("stream").shape == (3, 1, 32)


# --- sets -------------------------------------------------------------------------------------

SET = ["Which? ", {"set": [" the red dog", " you", " blue cat"]}, " is"]


def orders():
    members = SET[1]["set"]
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        yield [SET[0], {"set": [members[i] for i in order]}, SET[2]]


def test_the_answer_does_not_depend_on_the_order_of_a_set(either):
    answers = [either.generate(p, logprobs=2, **GREEDY).choices[0] for p in orders()]
    for other in answers[1:]:
        assert other.tokens == answers[0].tokens
        assert [t.logprob for t in other.logprobs] == pytest.approx(
            [t.logprob for t in answers[0].logprobs], abs=1e-6
        )
    chats = [
        either.chat([{"role": "user", "content": prompt}], **GREEDY).choices[0].tokens
        for prompt in orders()
    ]
    assert chats[0] == chats[1] == chats[2]
    scores = [either.score((prompt, " red")).logprob for prompt in orders()]
    assert scores == pytest.approx([scores[0]] * 3, abs=1e-6)


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


def test_what_follows_a_set_is_scored_as_one_text(either, lm):
    got = either.score((["is ", {"set": ["red", "blue"]}, "? the "], "cat"))
    assert "".join(t.text for t in got.tokens) == " cat"
    marked = lm.marked(["is ", {"set": ["red", "blue"]}, "? the cat"])
    assert [t.id for t in got.tokens] == list(marked.ids[-len(got.tokens) :])


# --- over HTTP --------------------------------------------------------------------------------


def test_the_openai_client_sends_programs_in_its_extra_body(client, lm):
    extra = {"interventions": {"steps": [{"at": "layers.*", "do": "skip"}], "out": [STREAM]}}
    answer = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=3, temperature=0, extra_body=extra
    )
    expected = lm.generate(PROMPT, max_tokens=3, temperature=0, **extra)
    assert answer.choices[0].text == expected.text
    assert answer.choices[0].program["rows"][0]["captures"][0]["site"] == "layers.0.resid.post"
    chat = client.chat.completions.create(
        model="tiny",
        max_tokens=3,
        messages=[{"role": "user", "content": [
            {"type": "text", "text": "Which?"}, {"type": "set", "set": [" red", " blue"]}]}],
        extra_body=extra,
    )  # fmt: skip
    assert chat.choices[0].program["meta"]["fingerprint"] == lm.info().fingerprint
    pieces = client.completions.create(model="tiny", prompt=SET, max_tokens=2, temperature=0)
    assert pieces.choices[0].text == lm.generate(SET, max_tokens=2, temperature=0).text


def test_what_one_request_has_captured_another_one_reads_by_its_id(either):
    keeping = {"out": [{"capture": "layers.1.resid.post", "pos": "@last", "keep": True}]}
    (capture,) = either.run(keeping, "hello world").captures
    patch = {"at": "layers.1.resid.post", "pos": "@last", "do": "replace"}
    out = {"out": [{"capture": "layers.2.resid.post", "pos": "@last"}]}
    by_id = either.run({"steps": [patch | {"from": f"blob:{capture.blob}"}]} | out, PROMPT)
    source = {"runs": {"cf": {"prompt": "hello world"}}}
    by_run = {"steps": [patch | {"from": {"run": "cf", "map": "end"}}]} | source | out
    expected = either.run(by_run, PROMPT)
    np.testing.assert_allclose(by_id.captures[0].values, expected.captures[0].values, atol=1e-4)
    np.testing.assert_array_equal(either.stored_blob(capture.blob), capture.values)
    assert expected.captures[0].blob is None
    assert either.explain(keeping, "hello world")["captures"][0]["kept"]
    text = either.generate("hello world", interventions=keeping, **GREEDY)
    assert text.program.captures[0].blob is not None


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


def test_adapters_are_looked_into_like_the_base(either, lm, adapter_folder):
    lm.load_adapter("poet", adapter_folder)
    try:
        program = {"out": [STREAM]}
        with_it = either.run(program, PROMPT, adapter="poet").array("stream")
        assert not np.allclose(with_it, either.run(program, PROMPT).array("stream"), atol=1e-3)
        use = {"at": "weights.delta", "do": "use", "adapter": "poet"}
        by_step = either.run({"steps": [use], **program}, PROMPT).array("stream")
        np.testing.assert_allclose(by_step, with_it, atol=1e-5)
        with pytest.raises(NotFound):
            either.run(program, PROMPT, adapter="nobody")
        with pytest.raises(NotFound):
            either.run({"steps": [use | {"adapter": "nobody"}], **program}, PROMPT)
        with pytest.raises(InvalidRequest, match="base model alone"):
            either.run({"numerics": "exact", "steps": [use], **program}, PROMPT)
    finally:
        lm.unload_adapter("poet")


def test_what_a_key_has_captured_is_kept_for_it_alone(lm, tmp_path):
    database = f"sqlite:///{tmp_path / 'keys.sqlite3'}"
    secrets = [KeyStore(database).add(name, ("generate", "edit"))[0] for name in ("ann", "bob")]
    keeping = {"out": [{"capture": "layers.0.mlp.out", "pos": "@last", "keep": True}]}
    with ServerThread(lm, Settings(port=0, require_keys=True, database=database)) as running:
        with invivo.connect(running.url, key=secrets[0]) as ann:
            (capture,) = ann.run(keeping, "the red cat, kept").captures
            np.testing.assert_array_equal(ann.stored_blob(capture.blob), capture.values)
        with invivo.connect(running.url, key=secrets[1]) as bob, pytest.raises(NotFound):
            bob.stored_blob(capture.blob)
    with pytest.raises(NotFound):
        lm.stored_blob(capture.blob)


def test_all_passes_of_a_program_are_on_the_account(lm, tmp_path):
    database = f"sqlite:///{tmp_path / 'keys.sqlite3'}"
    store = KeyStore(database)
    n = len(lm.tokenize(PROMPT, special=True))
    secret, key = store.add("ann", ("generate", "edit"), budget=10 * n)
    settings = Settings(port=0, require_keys=True, database=database)
    with ServerThread(lm, settings) as running:
        headers = {"Authorization": f"Bearer {secret}"}
        with httpx.Client(base_url=running.url, headers=headers, timeout=PATIENCE) as ann:
            answer = ann.post("/v1/run", json={"program": SWEEP, "prompt": PROMPT})
            assert answer.json()["usage"]["prompt_tokens"] == 6 * n
            again = ann.post("/v1/run", json={"program": SWEEP, "prompt": PROMPT})
            assert again.status_code == 403
            assert "budget" in again.json()["error"]["message"]
        with invivo.connect(running.url, key=secret) as ann_lm, pytest.raises(Forbidden):
            ann_lm.generate(PROMPT, interventions={**PATCH, "runs": {"cf": {"prompt": "a " * 60}}})
    assert store.used(key.id) == 6 * n
