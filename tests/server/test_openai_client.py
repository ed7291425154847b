"""The official client against the running server."""

from __future__ import annotations

import json
import math
import re

import openai
import pytest

HELLO = [{"role": "user", "content": "Hello, who are you?"}]
GREEDY = {"model": "tiny", "temperature": 0, "max_tokens": 16}
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "clock"}},
]


def streamed(client: openai.OpenAI, **arguments):
    return list(client.chat.completions.create(stream=True, **arguments))


def test_chat_answers_and_counts(client):
    answer = client.chat.completions.create(messages=HELLO, **GREEDY)
    assert answer.object == "chat.completion"
    assert answer.model == "tiny"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason in ("stop", "length")
    usage = answer.usage
    assert usage.prompt_tokens > 0
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 < usage.completion_tokens <= 16
    assert usage.prompt_tokens_details.cached_tokens >= 0
    again = client.chat.completions.create(messages=HELLO, **GREEDY)
    assert again.choices[0].message.content == answer.choices[0].message.content


def test_a_stream_gives_the_same_answer_and_usage(client):
    whole = client.chat.completions.create(messages=HELLO, **GREEDY)
    chunks = streamed(client, messages=HELLO, stream_options={"include_usage": True}, **GREEDY)
    text = "".join(one.choices[0].delta.content or "" for one in chunks if one.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert {one.id for one in chunks} == {chunks[0].id}


def test_content_may_come_in_parts_and_from_a_developer(client):
    parts = [{"type": "text", "text": "Hello, who"}, {"type": "text", "text": "are you?"}]
    one = client.chat.completions.create(
        messages=[
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": parts},
        ],
        **GREEDY,
    )
    other = client.chat.completions.create(
        messages=[
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Hello, who\nare you?"},
        ],
        **GREEDY,
    )
    assert one.choices[0].message.content == other.choices[0].message.content


def test_log_probabilities_have_bytes_and_alternatives(client):
    answer = client.chat.completions.create(messages=HELLO, logprobs=True, top_logprobs=3, **GREEDY)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for token in content:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        best = max(other.logprob for other in token.top_logprobs)
        assert token.logprob == pytest.approx(best)  # greedy
        assert token.bytes is None or bytes(token.bytes).decode() == token.token
    chunks = streamed(client, messages=HELLO, logprobs=True, top_logprobs=3, **GREEDY)
    pieces = [one.choices[0].logprobs for one in chunks if one.choices]
    flat = [token for piece in pieces if piece for token in piece.content]
    assert [token.token for token in flat] == [token.token for token in content]
    assert [token.logprob for token in flat] == pytest.approx(
        [token.logprob for token in content], abs=1e-4
    )


def test_n_choices_differ_and_a_seed_repeats_them(client):
    arguments = {
        "messages": HELLO,
        "model": "tiny",
        "n": 3,
        "seed": 7,
        "temperature": 1.0,
        "max_completion_tokens": 12,
    }
    first = client.chat.completions.create(**arguments)
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in first.choices]
    assert len(set(texts)) > 1
    second = client.chat.completions.create(**arguments)
    assert [choice.message.content for choice in second.choices] == texts
    other = client.chat.completions.create(**arguments | {"seed": 8})
    assert [choice.message.content for choice in other.choices] != texts
    chunks = streamed(client, **arguments)
    by_choice = {0: "", 1: "", 2: ""}
    for chunk in chunks:
        for choice in chunk.choices:
            by_choice[choice.index] += choice.delta.content or ""
    assert list(by_choice.values()) == texts


def test_stop_ends_the_text_before_the_match(client):
    whole = client.completions.create(
        model="tiny",
        prompt="the cat",
        temperature=0,
        max_tokens=24,
        extra_body={"ignore_eos": True},
    )
    text = whole.choices[0].text
    stop = text[len(text) // 2]
    cut = client.completions.create(
        model="tiny",
        prompt="the cat",
        temperature=0,
        max_tokens=24,
        stop=[stop, "never"],
        extra_body={"ignore_eos": True},
    )
    assert cut.choices[0].text == text.split(stop)[0]
    assert cut.choices[0].finish_reason == "stop"


def test_json_schema_holds(client):
    answer = client.chat.completions.create(
        messages=HELLO,
        model="tiny",
        seed=1,
        max_tokens=100,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "trip", "schema": CITY, "strict": True},
        },
    )
    assert answer.choices[0].finish_reason == "stop"
    trip = json.loads(answer.choices[0].message.content)
    assert trip["city"] in ("Oslo", "Rome")
    assert trip["days"] in (1, 2, 3)


def test_regex_and_choice_hold(client):
    shared = {"messages": HELLO, "model": "tiny", "seed": 2, "max_tokens": 40}
    answer = client.chat.completions.create(extra_body={"guided_regex": r"[a-f]{3}-\d\d"}, **shared)
    assert re.fullmatch(r"[a-f]{3}-\d\d", answer.choices[0].message.content)
    answer = client.chat.completions.create(extra_body={"guided_choice": ["yes", "no"]}, **shared)
    assert answer.choices[0].message.content in ("yes", "no")


def test_json_object_is_an_object(client):
    answer = client.chat.completions.create(
        messages=HELLO,
        model="tiny",
        seed=3,
        max_tokens=200,
        response_format={"type": "json_object"},
    )
    assert answer.choices[0].message.content.lstrip().startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"weather", "clock"}),
        ({"type": "function", "function": {"name": "weather"}}, {"weather"}),
    ],
)
def test_a_forced_tool_call_has_the_right_shape(client, choice, names):
    arguments = {
        "messages": HELLO,
        "model": "tiny",
        "seed": 4,
        "max_tokens": 120,
        "tools": TOOLS,
        "tool_choice": choice,
    }
    answer = client.chat.completions.create(**arguments)
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls"
    assert message.content is None
    (call,) = message.tool_calls
    assert call.type == "function"
    assert call.function.name in names
    given = json.loads(call.function.arguments)
    assert set(given) == ({"city", "days"} if call.function.name == "weather" else set())

    chunks = streamed(client, **arguments)
    deltas = [tool for one in chunks for tool in one.choices[0].delta.tool_calls or ()]
    assert "".join(one.function.arguments for one in deltas) == call.function.arguments
    assert deltas[0].function.name == call.function.name
    assert deltas[0].index == 0
    assert deltas[0].id
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_an_answer_and_its_tool_result_can_be_sent_back(client):
    first = client.chat.completions.create(
        messages=HELLO, model="tiny", max_tokens=120, tools=TOOLS, tool_choice="required"
    )
    message = first.choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
    second = client.chat.completions.create(
        messages=[*HELLO, message, result], tools=TOOLS, **GREEDY
    )
    assert second.choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_tools_without_a_call_leave_the_text_alone(client):
    plain = client.chat.completions.create(messages=HELLO, **GREEDY)
    none = client.chat.completions.create(messages=HELLO, tools=TOOLS, tool_choice="none", **GREEDY)
    assert none.choices[0].message.content == plain.choices[0].message.content
    assert none.choices[0].message.tool_calls is None


def test_tools_reach_a_model_whose_template_knows_none(client, lm, monkeypatch):
    plain = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    monkeypatch.setattr(lm.model.tokenizer, "chat_template", plain)
    text = lm.apply_chat_template(HELLO, tools=TOOLS)
    assert '"weather"' in text
    assert text.endswith(HELLO[0]["content"])
    assert lm.apply_chat_template(HELLO) == f"[user]{HELLO[0]['content']}"
    answer = client.chat.completions.create(
        messages=HELLO, model="tiny", max_tokens=120, tools=TOOLS, tool_choice="required"
    )
    assert answer.choices[0].message.tool_calls


def test_completions_take_text_tokens_and_lists(client, lm):
    ids = lm.tokenize("the cat", special=True)
    shared = {"model": "tiny", "temperature": 0, "max_tokens": 8}
    text = client.completions.create(prompt="the cat", **shared).choices[0].text
    assert client.completions.create(prompt=ids, **shared).choices[0].text == text
    both = client.completions.create(prompt=["the cat", "blue dog"], n=2, **shared)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.choices[0].text == both.choices[1].text == text
    assert client.completions.create(prompt=[ids], **shared).choices[0].text == text
    pieces = {0: "", 1: ""}
    for chunk in client.completions.create(prompt=["the cat", "blue dog"], stream=True, **shared):
        for choice in chunk.choices:
            pieces[choice.index] += choice.text
    assert pieces == {0: text, 1: both.choices[2].text}


def test_echo_gives_the_prompt_with_its_log_probabilities(client, lm):
    answer = client.completions.create(
        model="tiny", prompt="the red dog", echo=True, logprobs=2, max_tokens=0
    )
    choice = answer.choices[0]
    ids = lm.tokenize("the red dog", special=True)
    assert choice.text == "the red dog"
    assert "".join(choice.logprobs.tokens) == "the red dog"
    assert choice.logprobs.token_logprobs[0] is None
    scored = lm.score(ids)
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(
        [token.logprob for token in scored.tokens], abs=1e-5
    )
    assert choice.logprobs.text_offset == [
        sum(map(len, choice.logprobs.tokens[:i])) for i in range(len(ids))
    ]
    longer = client.completions.create(
        model="tiny", prompt="the red dog", echo=True, logprobs=2, max_tokens=4, temperature=0
    )
    assert longer.choices[0].text.startswith("the red dog")
    assert len(longer.choices[0].logprobs.tokens) == len(ids) + longer.usage.completion_tokens


def test_sampling_extensions_reach_the_engine(client, lm):
    ids = lm.tokenize("x")
    biased = client.completions.create(
        model="tiny",
        prompt="the",
        max_tokens=5,
        temperature=0,
        logit_bias={str(ids[0]): 100},
        extra_body={"ignore_eos": True},
    )
    assert biased.choices[0].text == "xxxxx"
    stopped = client.completions.create(
        model="tiny",
        prompt="the",
        max_tokens=5,
        logit_bias={str(ids[0]): 100},
        extra_body={"stop_token_ids": ids, "top_k": 1, "min_p": 0.1, "repetition_penalty": 1.1},
    )
    assert stopped.choices[0].finish_reason == "stop"


def test_embeddings_as_floats_and_as_base64(client, lm):
    floats = client.embeddings.create(
        model="tiny", input=["the cat", "blue dog"], encoding_format="float"
    )
    packed = client.embeddings.create(model="tiny", input=["the cat", "blue dog"])
    assert floats.usage.prompt_tokens > 0
    for one, other in zip(floats.data, packed.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-6)
        assert math.hypot(*one.embedding) == pytest.approx(1, abs=1e-4)
    assert floats.data[0].embedding == pytest.approx(lm.embed("the cat"), abs=1e-5)


def test_models_are_listed_and_found(client):
    listed = client.models.list()
    assert listed.data[0].id == "tiny"
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")


async def test_the_async_client_streams_too(server):
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
        stream = await client.chat.completions.create(messages=HELLO, stream=True, **GREEDY)
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(pieces)
