"""The LM interface over an engine in this process."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import math
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import tiny_hf_model, tiny_model_folder
from tests.waiting import PATIENCE, await_for, held_after, held_until_cancelled, wait_for

import invivo
from invivo.engine.bypasses import BypassSpec, init_parameters
from invivo.engine.types import Output, Request
from invivo.errors import InvalidRequest, NotFound, TooLarge, Unavailable
from invivo.gather import Gathering
from invivo.lm import Completion, Score
from invivo.local import LocalLM


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("local"), max_position_embeddings=1024)


@pytest.fixture(scope="module")
def lm(folder: Path) -> Iterator[LocalLM]:
    with invivo.load(str(folder), kv_bytes=8 << 20, max_running=16) as lm:
        yield lm
        assert lm.stats()["kv"]["used"] == 0
        assert lm.stats()["running"] == lm.stats()["waiting"] == 0


GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12}


def test_importing_invivo_does_not_import_torch() -> None:
    code = "import sys, invivo, invivo.lm, invivo.errors; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_one_prompt_gives_one_answer_and_a_list_gives_a_list(lm: LocalLM) -> None:
    one = lm.generate("hello world", **GREEDY)
    assert isinstance(one, Completion)
    assert one.prompt_tokens == len(lm.tokenize("hello world", special=True))
    assert one.completion_tokens == len(one.choices[0].tokens)
    same = lm.generate(lm.tokenize("hello world", special=True), **GREEDY)
    assert same.text == one.text
    many = lm.generate(["hello world", "the cat", "hello world"], **GREEDY)
    assert [c.text for c in many] == [one.text, lm.generate("the cat", **GREEDY).text, one.text]
    assert lm.generate([], **GREEDY) == []
    tokens = lm.generate([[1, 2], [3]], **GREEDY)
    assert len(tokens) == 2


def test_more_prompts_than_the_queue_holds_are_fed_in(folder: Path) -> None:
    with invivo.load(str(folder), kv_bytes=4 << 20, max_running=4, max_waiting=1) as lm:
        prompts = [[i % 7, 3] for i in range(40)]
        got = lm.generate(prompts, temperature=0.0, max_tokens=4)
        assert [c.choices[0].tokens for c in got[:7]] == [c.choices[0].tokens for c in got[7:14]]


def test_a_progress_bar_goes_to_standard_error(
    lm: LocalLM, capsys: pytest.CaptureFixture[str]
) -> None:
    lm.generate(["the"] * 5, progress=True, **GREEDY)
    captured = capsys.readouterr()
    assert "5/5" in captured.err
    assert captured.out == ""


def test_streams_add_up_to_the_answer(lm: LocalLM) -> None:
    whole = lm.generate("the cat", max_tokens=20, seed=4, n=2, logprobs=1)
    deltas = list(lm.stream("the cat", max_tokens=20, seed=4, n=2, logprobs=1))
    for choice in whole.choices:
        mine = [d for d in deltas if d.index == choice.index]
        assert "".join(d.text for d in mine) == choice.text
        assert [t for d in mine for t in d.tokens] == choice.tokens
        assert [t for d in mine for t in d.logprobs or []] == choice.logprobs
        assert [d.finish_reason for d in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].finish_reason == choice.finish_reason


def test_log_probabilities_carry_text_and_alternatives(lm: LocalLM) -> None:
    done = lm.generate("the cat", logprobs=3, prompt_logprobs=2, **GREEDY)
    assert done.choices[0].logprobs is not None
    for token in done.choices[0].logprobs:
        assert token.rank == 1
        assert token.top[0].id == token.id
        assert [t.rank for t in token.top] == [1, 2, 3]
    assert done.prompt_logprobs is not None
    assert [t.text for t in done.prompt_logprobs] == [" cat"]
    assert len(done.prompt_logprobs[0].top) == 2


def test_closing_a_stream_cancels_it(lm: LocalLM) -> None:
    before = lm.stats()["totals"]["cancelled"]
    stream = lm.stream("the", max_tokens=900, ignore_eos=True)
    next(stream)
    stream.close()
    lm.generate("the", **GREEDY)
    assert lm.stats()["totals"]["cancelled"] == before + 1


def test_async_twins_answer_alike(lm: LocalLM) -> None:
    async def ask() -> None:
        one, many, scored, embedded = await asyncio.gather(
            lm.agenerate("the cat", **GREEDY),
            lm.agenerate(["a", "b"], **GREEDY),
            lm.ascore(("the", " cat")),
            lm.aembed("the cat"),
        )
        assert one.text == lm.generate("the cat", **GREEDY).text
        assert len(many) == 2
        assert scored.logprob == pytest.approx(lm.score(("the", " cat")).logprob, abs=1e-5)
        assert embedded == pytest.approx(lm.embed("the cat"), abs=1e-5)
        text = "".join([d.text async for d in lm.astream("the cat", **GREEDY)])
        assert text == one.text
        chat = [{"role": "user", "content": "hello"}]
        said = "".join([d.text async for d in lm.astream_chat(chat, **GREEDY)])
        assert said == (await lm.achat(chat, **GREEDY)).text
        assert (await lm.ainfo()).name == lm.info().name
        assert await lm.atokenize("the cat") == lm.tokenize("the cat")

    asyncio.run(ask())


def test_cancelled_tasks_and_closed_iterators_abort_their_requests(lm: LocalLM) -> None:
    async def cancel() -> None:
        inbox = lm.engine._inbox
        with held_after(lm.engine, 0, until=lambda: len(set(inbox.aborted)) == 3):
            task = asyncio.create_task(lm.agenerate(["the"] * 3, max_tokens=900, ignore_eos=True))
            await await_for(lambda: len(inbox.live) == 3)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        with held_until_cancelled(lm.engine):
            stream = lm.astream("the", max_tokens=900, ignore_eos=True)
            await anext(stream)
            await stream.aclose()

    before = lm.stats()["totals"]["cancelled"]
    asyncio.run(cancel())
    lm.generate("the", **GREEDY)
    assert lm.stats()["totals"]["cancelled"] == before + 4


def test_a_request_cancelled_while_it_is_submitted_does_not_run_on(
    lm: LocalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiling = threading.Event()
    go_on = threading.Event()
    submit = lm.engine.submit

    def slowly(request: Request, on_output: Callable[[Output], None]) -> None:
        compiling.set()
        assert go_on.wait(PATIENCE)
        submit(request, on_output)

    monkeypatch.setattr(lm.engine, "submit", slowly)
    endless: dict[str, Any] = {"regex": "a+", "max_tokens": 900, "ignore_eos": True}

    async def cancel_at_once() -> None:
        async def whole() -> None:
            await lm.agenerate("the", **endless)

        async def streamed() -> None:
            async for _ in lm.astream("the", **endless):
                pass

        for work in (whole, streamed):
            compiling.clear()
            go_on.clear()
            before = lm.stats()["totals"]["cancelled"]
            task = asyncio.create_task(work())
            await asyncio.to_thread(compiling.wait, PATIENCE)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            go_on.set()
            await await_for(lambda n=before: lm.stats()["totals"]["cancelled"] > n)

    with held_until_cancelled(lm.engine):
        asyncio.run(cancel_at_once())


def test_a_failure_while_a_batch_is_fed_reaches_the_one_who_waits(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with invivo.load(str(folder), kv_bytes=4 << 20, max_running=2) as lm:
        submit, count = lm.engine.submit, itertools.count()

        def breaks(request: Request, on_output: Callable[[Output], None]) -> None:
            if next(count) == 3:
                raise RuntimeError("a bug")
            submit(request, on_output)

        monkeypatch.setattr(lm.engine, "submit", breaks)
        gathering = Gathering(
            lm.engine, lm._generation(["the"] * 6, {"max_tokens": 2}), lambda: None
        )
        gathering.start()
        with pytest.raises(RuntimeError, match="a bug"):
            gathering.future.result(timeout=PATIENCE)


def test_conversations_go_through_the_template(lm: LocalLM) -> None:
    messages = [{"role": "user", "content": "hello"}]
    text = lm.apply_chat_template(messages)
    assert text.endswith("<|im_start|>assistant\n")
    assert lm.chat(messages, **GREEDY).text == lm.generate(lm.tokenize(text), **GREEDY).text
    both = lm.chat([messages, [*messages, {"role": "user", "content": "x"}]], **GREEDY)
    assert len(both) == 2


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Rome", "Oslo"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]


def test_a_required_tool_is_called(lm: LocalLM) -> None:
    messages = [{"role": "user", "content": "weather?"}]
    assert "weather" in lm.apply_chat_template(messages, tools=TOOLS)
    call = json.loads(lm.chat(messages, tools=TOOLS, tool_choice="required", seed=1).text)
    assert call["name"] == "weather"
    assert call["arguments"]["city"] in ("Rome", "Oslo")
    free = lm.chat(messages, tools=TOOLS, tool_choice="none", **GREEDY)
    assert free.text == lm.chat(messages, **GREEDY).text


def test_constrained_outputs(lm: LocalLM) -> None:
    assert lm.generate("x", choice=["red", "blue"]).text in ("red", "blue")
    assert lm.generate("x", regex="[0-9]{4}").text.isdigit()
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    schema["additionalProperties"] = False
    for form in (schema, json.dumps(schema)):
        assert set(json.loads(lm.generate("x", json_schema=form).text)) == {"a"}
    with pytest.raises(InvalidRequest, match="regex"):
        lm.generate("x", regex="a", choice=["a"])


@pytest.fixture(scope="module")
def hf() -> Any:
    return tiny_hf_model("llama")


def test_a_continuation_is_scored_after_its_context(lm: LocalLM, hf: Any) -> None:
    def expected(context: str, continuation: str) -> float:
        ids = lm.tokenize(context + continuation)
        start = len(lm.tokenize(context.rstrip()))
        with torch.inference_mode():
            lp = hf(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return sum(float(lp[i - 1, ids[i]]) for i in range(start, len(ids)))

    pairs = [("the cat", " and the dog"), ("the cat ", "and the dog"), ("hello", "\nworld")]
    scores = lm.score(pairs, top=1)
    for pair, score in zip(pairs, scores, strict=True):
        assert score.logprob == pytest.approx(expected(*pair), abs=1e-4)
        assert score.perplexity == pytest.approx(math.exp(-score.logprob / len(score.tokens)))
        assert score.greedy == all(t.top[0].id == t.id for t in score.tokens)
        assert "".join(t.text for t in score.tokens).strip() == pair[1].strip()
    assert scores[0].logprob == pytest.approx(scores[1].logprob)


def test_greedy_continuations_score_as_greedy(lm: LocalLM) -> None:
    done = lm.generate("the cat", ignore_eos=True, logprobs=0, **GREEDY)
    score = lm.score((lm.tokenize("the cat"), done.choices[0].tokens))
    assert score.greedy
    assert done.choices[0].logprobs is not None
    assert score.logprob == pytest.approx(
        sum(t.logprob for t in done.choices[0].logprobs), abs=1e-4
    )


def test_texts_are_scored_from_their_second_token(lm: LocalLM) -> None:
    score = lm.score("the cat and the dog")
    assert isinstance(score, Score)
    assert [t.id for t in score.tokens] == lm.tokenize("the cat and the dog")[1:]
    assert lm.score(["the cat", [5, 6, 7]])[1].tokens[0].id == 6
    first = lm.score(("", "hello"))
    assert [t.text for t in first.tokens] == ["hello"]
    with pytest.raises(InvalidRequest, match="two tokens"):
        lm.score("a")


def test_embeddings_have_unit_length_unless_asked(lm: LocalLM) -> None:
    unit, raw = lm.embed("the cat"), lm.embed("the cat", normalize=False)
    length = math.sqrt(sum(x * x for x in raw))
    assert math.sqrt(sum(x * x for x in unit)) == pytest.approx(1.0)
    assert unit == pytest.approx([x / length for x in raw])
    last = lm.embed(["the cat", "a"], pooling="last")
    assert len(last) == 2
    assert last[0] != unit


def test_tokens_and_text_round_trip(lm: LocalLM) -> None:
    for text in ("hello world", "<|im_start|>user\nñ 日本<|im_end|>", ""):
        assert lm.detokenize(lm.tokenize(text)) == text
    with pytest.raises(InvalidRequest, match="tokens"):
        lm.detokenize([10_000])


def test_errors_name_what_is_wrong(lm: LocalLM) -> None:
    for keywords, name in (
        ({"temprature": 1.0}, "temprature"),
        ({"temperature": 200.0}, "temperature"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"choice": "yes"}, "choice"),
        ({"regex": 3}, "regex"),
        ({"n": "two"}, "n"),
        ({"n": 10**12}, "n"),
        ({"stop": 5}, "stop"),
        ({"stop_token_ids": 5}, "stop_token_ids"),
        ({"choice": [object()]}, "choice"),
        ({"json_schema": {"type": object()}}, "json_schema"),
        ({"priority": "high"}, "priority"),
    ):
        with pytest.raises(InvalidRequest) as error:
            lm.generate("the", **keywords)
        assert error.value.field == name
    with pytest.raises(InvalidRequest, match="Did you mean temperature"):
        lm.generate("the", temprature=1.0)
    with pytest.raises(InvalidRequest, match="prompt"):
        lm.generate("")
    with pytest.raises(InvalidRequest, match="prompt"):
        lm.generate(5)  # type: ignore[call-overload]
    with pytest.raises(TooLarge):
        lm.generate(["fine", "a" * 2000])
    with pytest.raises(NotFound):
        lm.generate("the", adapter="none")
    with pytest.raises(NotFound):
        next(lm.stream("the", adapter="none"))
    with pytest.raises(InvalidRequest, match="messages"):
        lm.chat([])
    with pytest.raises(InvalidRequest, match="role"):
        lm.chat([{"content": "x"}])
    with pytest.raises(InvalidRequest, match="pair"):
        lm.score(("a", "b", "c"))
    with pytest.raises(InvalidRequest, match="pair"):
        lm.score([("a", "b"), ("a", "b", "c")])
    with pytest.raises(InvalidRequest, match="empty"):
        lm.score(("the cat", ""))
    with pytest.raises(InvalidRequest, match="Unicode"):
        lm.generate("\ud800")
    with pytest.raises(InvalidRequest, match="max_runing"):
        invivo.load("nowhere", max_runing=3)


def test_the_default_length_shrinks_to_what_fits(lm: LocalLM) -> None:
    prompt = [5] * 1018
    assert lm.generate(prompt, ignore_eos=True).completion_tokens == 6
    with pytest.raises(InvalidRequest, match="max_tokens"):
        lm.generate(prompt, max_tokens=7)


def test_the_default_length_leaves_room_for_virtual_tokens(lm: LocalLM) -> None:
    spec = BypassSpec("soft_prompt", size=4)
    parameters = init_parameters(spec, lm.engine.model.config, seed=0)
    lm.engine.adapters.publish("prompted", [spec], parameters)
    answer = lm.generate([5] * 1018, adapter="prompted", ignore_eos=True)
    assert (answer.prompt_tokens, answer.completion_tokens) == (1018, 2)
    lm.unload_adapter("prompted")


def test_info_and_stats_describe_what_is_served(lm: LocalLM) -> None:
    info = lm.info()
    assert (info.family, info.device, info.dtype) == ("llama", "cpu", "float32")
    assert info.max_model_len == 1024
    assert info.hidden_size == 32
    assert info.has_chat_template
    stats = lm.stats()
    assert stats["state"] == "ready"
    assert stats["model"]["parameters"] == info.n_parameters
    json.dumps(stats)


def test_a_closed_model_refuses(folder: Path) -> None:
    lm = invivo.load(str(folder), kv_bytes=1 << 20)
    with held_until_cancelled(lm.engine):
        stream = lm.stream("the", max_tokens=900, ignore_eos=True)
        next(stream)
        lm.close()
        lm.close()
    with pytest.raises(Unavailable):
        list(stream)
    with pytest.raises(Unavailable):
        lm.generate("the")


def test_a_model_that_is_dropped_closes_itself(folder: Path) -> None:
    lm = invivo.load(str(folder), kv_bytes=1 << 20)
    engine = lm.engine
    lm.generate("the", **GREEDY)
    del lm
    gc.collect()
    assert engine._thread is None


def test_a_program_may_end_in_the_middle_of_an_answer(folder: Path) -> None:
    code = (
        "import sys, invivo\n"
        "lm = invivo.load(sys.argv[1], kv_bytes=1 << 20)\n"
        "stream = lm.stream('the', max_tokens=900, ignore_eos=True)\n"
        "next(stream)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        capture_output=True,
        check=False,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr


def test_a_loop_closed_under_a_stream_is_no_failure_of_the_engine(
    lm: LocalLM, caplog: pytest.LogCaptureFixture
) -> None:
    async def begin() -> Any:
        stream = lm.astream("the", max_tokens=900, ignore_eos=True)
        await anext(stream)
        return stream

    loop = asyncio.new_event_loop()
    stream = loop.run_until_complete(begin())
    # As an interrupted command leaves it: closed at once, the stream not told.
    loop.close()
    wait_for(lambda: lm.stats()["running"] == 0)
    assert "receiver" not in caplog.text
    del stream
