"""A model behind HTTP gives what the same model gives in this process."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from tests.waiting import PATIENCE, await_for, held_after, held_until_cancelled, wait_for

import invivo
from invivo.errors import (
    Forbidden,
    InvalidRequest,
    InvivoError,
    NotFound,
    TooLarge,
    Unauthorized,
    Unavailable,
)
from invivo.lm import LM, Completion, Score
from invivo.remote import RemoteLM
from invivo.server.keys import KeyStore
from invivo.server.run import ServerThread
from invivo.server.settings import Settings

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the cat?"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "pick",
            "parameters": {
                "type": "object",
                "properties": {"color": {"enum": ["red", "blue"]}},
                "required": ["color"],
                "additionalProperties": False,
            },
        },
    }
]
GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="session")
def remote(server):
    with invivo.connect(f"{server.url}/v1") as made:
        yield made


@pytest.fixture(params=["local", "remote"])
def either(request, lm, remote) -> LM:
    return lm if request.param == "local" else remote


def plain(answer):
    """An answer without what may differ between two runs: ids, names, cache hits, last digits."""
    if isinstance(answer, list):
        return [plain(one) for one in answer]
    if isinstance(answer, Completion):
        choices = [replace(choice, logprobs=rounded(choice.logprobs)) for choice in answer.choices]
        return replace(
            answer,
            id="",
            model="",
            cached_tokens=0,
            choices=choices,
            prompt_logprobs=rounded(answer.prompt_logprobs),
        )
    if isinstance(answer, Score):
        return (
            rounded(answer.tokens),
            answer.greedy,
            pytest.approx(answer.logprob, abs=1e-4),
            pytest.approx(answer.perplexity, rel=1e-3),
        )
    return answer


def rounded(tokens):
    if tokens is None:
        return None
    return [
        (one.id, one.text, pytest.approx(one.logprob, abs=1e-4), one.rank, rounded(one.top))
        for one in tokens
    ]


CALLS = {
    "one": lambda m: m.generate("the red dog", **GREEDY),
    "batch": lambda m: m.generate(["the red dog", "hello world", "is"], **GREEDY),
    "tokens": lambda m: m.generate([5, 6, 7], **GREEDY),
    "token batch": lambda m: m.generate([[5, 6, 7], [8]], **GREEDY),
    "no prompts": lambda m: m.generate([], **GREEDY),
    "default length": lambda m: m.generate("the red dog", temperature=0),
    "default length of a long prompt": lambda m: m.generate("x" * 1010, temperature=0),
    "whole context": lambda m: m.generate([9] * 1010, temperature=0, max_tokens=None),
    "logprobs": lambda m: m.generate("the cat", logprobs=3, prompt_logprobs=2, **GREEDY),
    "chosen logprobs": lambda m: m.generate("the cat", logprobs=0, prompt_logprobs=0, **GREEDY),
    "seeded": lambda m: m.generate(
        "the cat", seed=11, n=3, max_tokens=10, top_k=20, top_p=0.9, min_p=0.01
    ),
    "penalties": lambda m: m.generate(
        "the cat the cat",
        presence_penalty=0.5,
        frequency_penalty=0.25,
        repetition_penalty=1.3,
        logit_bias={7: 2.0, 9: -100.0},
        **GREEDY,
    ),
    "stops": lambda m: m.generate(
        "the cat", temperature=0, max_tokens=30, stop=["e", "a"], stop_token_ids=[3], min_tokens=4
    ),
    "one stop": lambda m: m.generate("the cat", temperature=0, max_tokens=30, stop="o"),
    "json": lambda m: m.generate(
        "x", json_schema={"type": "boolean"}, max_tokens=20, temperature=0
    ),
    "json text": lambda m: m.generate(
        "x", json_schema='{"enum": ["a", "b"]}', max_tokens=20, temperature=0
    ),
    "any json": lambda m: m.generate("x", json_schema=True, max_tokens=20, temperature=0),
    "regex": lambda m: m.generate("x", regex="[ab]{4}", max_tokens=20, temperature=0),
    "choice": lambda m: m.generate("x", choice=("up", "down"), max_tokens=20, temperature=0),
    "salt": lambda m: m.generate("the cat", salt="mine", priority=1, **GREEDY),
    "chat": lambda m: m.chat(CHAT, **GREEDY),
    "chats": lambda m: m.chat([CHAT, CHAT[1:]], logprobs=2, **GREEDY),
    "default chat": lambda m: m.chat(CHAT[1:], temperature=0),
    "tool": lambda m: m.chat(CHAT, tools=TOOLS, tool_choice="required", temperature=0),
    "tool history": lambda m: m.chat(
        [
            CHAT[1],
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {
                        "id": "c",
                        "type": "function",
                        "function": {"name": "pick", "arguments": {"color": "red"}},
                    }
                ],
            },
            {"role": "tool", "content": "done", "tool_call_id": "c"},
        ],
        tools=TOOLS,
        **GREEDY,
    ),
    "score": lambda m: m.score("the red dog", top=2),
    "score pair": lambda m: m.score(("the red", " dog")),
    "scores": lambda m: m.score(["hello world", ("the ", "cat"), ("", "cat"), [4, 5, 6]]),
    "no scores": lambda m: m.score([]),
    "tokenize": lambda m: (m.tokenize("the cat ü"), m.tokenize("the", special=True)),
    "detokenize": lambda m: m.detokenize(m.tokenize("hello <|im_end|> ü")),
    "template": lambda m: m.apply_chat_template(CHAT, tools=TOOLS),
    "template tail": lambda m: m.apply_chat_template(CHAT, add_generation_prompt=False),
    "stream": lambda m: list(m.stream("the red dog", **GREEDY)),
    "stream of two": lambda m: sorted(
        m.stream("the cat", n=2, seed=3, max_tokens=6), key=lambda one: one.index
    ),
    "chat stream": lambda m: list(m.stream_chat(CHAT, **GREEDY)),
    "tool stream": lambda m: list(
        m.stream_chat(CHAT, tools=TOOLS, tool_choice="required", temperature=0)
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_same_call_gives_the_same_answer(lm, remote, name):
    here = CALLS[name](lm)
    there = CALLS[name](remote)
    if "stream" in name:
        for delta in [*here, *there]:
            delta.cached_tokens = 0
    assert plain(there) == plain(here)


def test_streamed_logprobs_are_the_same(lm, remote):
    here, there = (
        list(one.stream("the cat", logprobs=2, prompt_logprobs=1, **GREEDY)) for one in (lm, remote)
    )
    assert [rounded(one.logprobs) for one in there] == [rounded(one.logprobs) for one in here]
    assert rounded(there[0].prompt_logprobs) == rounded(here[0].prompt_logprobs)


def test_vectors_are_the_same(lm, remote):
    for options in ({}, {"pooling": "last"}, {"normalize": False}):
        assert remote.embed("the cat", **options) == pytest.approx(
            lm.embed("the cat", **options), abs=1e-5
        )
    assert len(remote.embed(["a", "b"])) == 2
    assert remote.embed([[5, 6], [7]])[0] == pytest.approx(lm.embed([5, 6]), abs=1e-5)


def test_the_model_is_described_alike(lm, remote):
    assert replace(remote.info(), name="") == replace(lm.info(), name="")
    assert remote.stats()["kv"] == lm.stats()["kv"]


FAILURES = {
    "range": (lambda m: m.generate("x", temperature=-1), InvalidRequest, "temperature"),
    "unknown": (lambda m: m.generate("x", temprature=1), InvalidRequest, "temprature"),
    "two grammars": (lambda m: m.generate("x", regex="a", choice=["b"]), InvalidRequest, None),
    "bad regex": (lambda m: m.generate("x", regex="(("), InvalidRequest, None),
    "bad schema": (lambda m: m.generate("x", json_schema="{"), InvalidRequest, "json_schema"),
    "number": (lambda m: m.generate(5), InvalidRequest, "prompt"),
    "nothing": (lambda m: m.generate([None]), InvalidRequest, "prompt"),
    "embed number": (lambda m: m.embed(5), InvalidRequest, "prompt"),
    "chat number": (lambda m: m.chat(5), InvalidRequest, "messages"),
    "chat objects": (lambda m: m.chat([object()]), InvalidRequest, "messages"),
    "triple": (lambda m: m.score(("a", "b", "c")), InvalidRequest, "text"),
    "empty continuation": (lambda m: m.score(("a", "")), InvalidRequest, "text"),
    "empty prompt": (lambda m: m.generate([[]]), InvalidRequest, "prompt"),
    "long prompt": (lambda m: m.generate([5] * 2000), TooLarge, "prompt"),
    "no room": (lambda m: m.generate("x", max_tokens=5000), InvalidRequest, "max_tokens"),
    "foreign token": (lambda m: m.generate([99999]), InvalidRequest, "prompt"),
    "tool choice": (lambda m: m.chat(CHAT, tool_choice="required"), InvalidRequest, "tool_choice"),
    "no messages": (lambda m: m.chat([]), InvalidRequest, "messages"),
    "score": (lambda m: m.score("x", top=50), InvalidRequest, None),
    "no adapter": (lambda m: m.generate("x", adapter="none"), NotFound, None),
    "no such adapter": (lambda m: m.unload_adapter("none"), NotFound, None),
    "no such adapter to save": (lambda m: m.save_adapter("none", "nowhere"), NotFound, None),
    "no such folder": (lambda m: m.load_adapter("x", "/no/such"), InvivoError, None),
    "stream": (lambda m: list(m.stream("x", top_p=2)), InvalidRequest, "top_p"),
    "detokenize": (lambda m: m.detokenize([99999]), InvalidRequest, None),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_are_the_same_classes(either, name):
    call, kind, field = FAILURES[name]
    with pytest.raises(kind) as caught:
        call(either)
    if field is not None:
        assert caught.value.field == field


def test_adapters_are_loaded_used_saved_and_forgotten(either, adapter_folder, tmp_path):
    base = either.generate("the cat", **GREEDY).text
    made = either.load_adapter("queries", adapter_folder)
    try:
        assert (made.name, made.rank) == ("queries", 4)
        assert [one.name for one in either.adapters()] == ["queries"]
        assert either.generate("the cat", adapter="queries", **GREEDY).text != base
        text = "the red dog is not blue"
        assert either.score(text, adapter="queries") != either.score(text)
        assert either.embed(text, adapter="queries") != either.embed(text)
        assert either.load_adapter("queries", adapter_folder).version == made.version + 1
        answer = either.generate("the cat", adapter="queries", **GREEDY).text
        saved = either.save_adapter("queries", tmp_path / "new" / "folder")
        either.load_adapter("queries", saved)
        assert either.generate("the cat", adapter="queries", **GREEDY).text == answer
        (tmp_path / "file").touch()
        with pytest.raises(InvalidRequest) as caught:
            either.save_adapter("queries", tmp_path / "file")
        assert caught.value.field == "folder"
    finally:
        either.unload_adapter("queries")
    assert either.adapters() == []


async def test_async_calls_work_from_any_loop(either):
    expected = either.generate("the cat", **GREEDY).text
    answers = await asyncio.gather(*(either.agenerate("the cat", **GREEDY) for _ in range(4)))
    assert {one.text for one in answers} == {expected}
    pieces = [delta.text async for delta in either.astream("the cat", **GREEDY)]
    assert "".join(pieces) == expected
    chat = (await either.achat(CHAT, **GREEDY)).text
    assert "".join([d.text async for d in either.astream_chat(CHAT, **GREEDY)]) == chat
    score = await either.ascore("the cat")
    assert score.logprob == pytest.approx(either.score("the cat").logprob, abs=1e-4)
    assert len(await either.aembed("the cat")) == either.info().hidden_size


def idle(lm) -> bool:
    stats = lm.stats()
    return not (stats["running"] or stats["waiting"])


LONG = {"temperature": 0, "max_tokens": 900, "ignore_eos": True}


def test_a_closed_stream_cancels(lm, either):
    wait_for(lambda: idle(lm))
    before = lm.stats()["totals"]["cancelled"]
    with held_until_cancelled(lm.engine):
        stream = either.stream("the cat", **LONG)
        next(stream)
        stream.close()
        wait_for(lambda: idle(lm))
    assert lm.stats()["totals"]["cancelled"] == before + 1


async def read_all(stream):
    async for _ in stream:
        pass


async def test_a_closed_async_stream_and_a_cancelled_task_cancel(lm, either):
    await await_for(lambda: idle(lm))
    before = lm.stats()["totals"]["cancelled"]
    with held_until_cancelled(lm.engine):
        stream = either.astream("the cat", **LONG)
        await anext(stream)
        await stream.aclose()
        await await_for(lambda: idle(lm))
    # Nothing is written before both have come.
    inbox = lm.engine._inbox
    with held_after(lm.engine, 0, until=lambda: len(set(inbox.aborted)) == 2):
        task = asyncio.ensure_future(either.agenerate("the cat", **LONG))
        reader = asyncio.ensure_future(read_all(either.astream("hello", **LONG)))
        await await_for(lambda: len(inbox.live) == 2)
        task.cancel()
        reader.cancel()
        await asyncio.gather(task, reader, return_exceptions=True)
        await await_for(lambda: idle(lm))
    assert lm.stats()["totals"]["cancelled"] == before + 3


def test_no_server_is_unavailable():
    with pytest.raises(Unavailable) as caught:
        invivo.connect("http://127.0.0.1:9")
    assert "invivo serve" in str(caught.value)


def test_a_server_of_another_kind_is_told_apart(server):
    with pytest.raises(InvivoError):
        invivo.connect(f"{server.url}/static")


def test_keys_are_sent(lm, tmp_path):
    url = f"sqlite:///{tmp_path / 'keys.sqlite3'}"
    store = KeyStore(url)
    secret, _ = store.add("me", ["generate"])
    with ServerThread(lm, Settings(port=0, require_keys=True, database=url)) as running:
        with pytest.raises(Unauthorized):
            invivo.connect(running.url)
        with invivo.connect(running.url, key=secret) as keyed:
            assert isinstance(keyed, RemoteLM)
            assert keyed.generate("the cat", **GREEDY).text
            with pytest.raises(Forbidden):
                keyed.score("the cat")
    store.close()


def test_a_closed_connection_says_so(server, lm):
    made = invivo.connect(server.url)
    with held_until_cancelled(lm.engine):
        stream = made.stream("the cat", **LONG)
        next(stream)
        made.close()
        made.close()
        stream.close()
    with pytest.raises(Unavailable) as caught:
        made.generate("the cat")
    assert "closed" in str(caught.value)


@pytest.mark.parametrize("way", ["generate", "stream", "agenerate", "astream"])
def test_closing_tells_those_who_wait(server, lm, way):
    made = invivo.connect(server.url)
    before = lm.stats()["totals"]["requests"]

    def plain():
        made.generate("the cat", **LONG)

    def streamed():
        for _ in made.stream("the cat", **LONG):
            pass

    async def gathered():
        await made.agenerate("the cat", **LONG)

    async def iterated():
        async for _ in made.astream("the cat", **LONG):
            pass

    works = {
        "generate": plain,
        "stream": streamed,
        "agenerate": lambda: asyncio.run(gathered()),
        "astream": lambda: asyncio.run(iterated()),
    }
    with ThreadPoolExecutor(1) as pool, held_until_cancelled(lm.engine):
        waiting = pool.submit(works[way])
        wait_for(lambda: lm.stats()["totals"]["requests"] > before)
        made.close()
        with pytest.raises(Unavailable, match="closed"):
            waiting.result(timeout=PATIENCE)


def test_a_batch_waits_for_a_busy_server(lm):
    settings = Settings(port=0, max_concurrent=2)
    prompts = ["the cat", "red dog", "hello", "world", "blue", "is not"]
    with ServerThread(lm, settings) as running, invivo.connect(running.url) as made:
        answers = made.generate(prompts, progress=True, **GREEDY)
    assert plain(answers) == plain(lm.generate(prompts, **GREEDY))
