"""Training data: what is learned, in which order, and what is refused and why."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from invivo.chat_template import apply_template
from invivo.engine.detokenize import backend
from invivo.errors import Conflict
from invivo.jobs.data import TrainingData, steps_and_texts
from invivo.jobs.examples import ExampleReader, Examples
from invivo.jobs.records import MAX_PROBLEMS, InvalidData
from invivo.models.load import LoadedModel

CHAT = [
    {"role": "system", "content": "you are the world"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "the cat and"},
    {"role": "user", "content": "the dog?"},
    {"role": "assistant", "content": "not red, world"},
]
MARKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n{% else %}{{ m.content }}"
    "<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Cuts what stands before "</think>" out of every answer but the last.
FORGETTING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Begins an answer with something that it does not write into a finished one.
PREFILLING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
)


class WithTemplate:
    """A tokenizer with another chat template."""

    def __init__(self, tokenizer: Any, template: str) -> None:
        self._tokenizer = tokenizer
        self.chat_template = template

    def apply_chat_template(self, messages: Any, **options: Any) -> Any:
        return self._tokenizer.apply_chat_template(
            messages, chat_template=self.chat_template, **options
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def reader(model: LoadedModel, longest: int = 200, **options: Any) -> ExampleReader:
    template = options.pop("template", None)
    tokenizer = model.tokenizer if template is None else WithTemplate(model.tokenizer, template)
    return ExampleReader(tokenizer, model.config.eos_token_ids, longest, **options)


def learned_texts(model: LoadedModel, examples: Examples) -> list[list[str]]:
    """Of every example the texts of its learned stretches."""
    tokenizer = backend(model.tokenizer)
    found = []
    for start, stop in zip(examples.starts[:-1], examples.starts[1:], strict=True):
        pieces: list[list[int]] = []
        before = False
        for token, is_learned in zip(
            examples.tokens[start:stop], examples.learned[start:stop], strict=True
        ):
            if is_learned and not before:
                pieces.append([])
            if is_learned:
                pieces[-1].append(int(token))
            before = bool(is_learned)
        found.append([tokenizer.decode(p, skip_special_tokens=False) for p in pieces])
    return found


def whole_texts(model: LoadedModel, examples: Examples) -> list[str]:
    tokenizer = backend(model.tokenizer)
    return [
        tokenizer.decode(examples.tokens[a:b].tolist(), skip_special_tokens=False)
        for a, b in zip(examples.starts[:-1], examples.starts[1:], strict=True)
    ]


# --- what is learned ---------------------------------------------------------------------------
@pytest.mark.parametrize("template", [None, MARKING])
def test_of_a_conversation_the_answers_and_their_ends_are_learned(
    tiny: LoadedModel, template: str | None
) -> None:
    got = reader(tiny, template=template).records([{"messages": CHAT}])
    assert learned_texts(tiny, got) == [["the cat and<|im_end|>", "not red, world<|im_end|>"]]
    if template is None:
        rendered = apply_template(tiny.tokenizer, CHAT, None, False)
        assert whole_texts(tiny, got) == [rendered]


@pytest.mark.parametrize("template", [None, MARKING])
def test_messages_of_weight_0_are_context_only(tiny: LoadedModel, template: str | None) -> None:
    weighted = [dict(message) for message in CHAT]
    weighted[2]["weight"] = 0
    weighted[4]["weight"] = 1
    got = reader(tiny, template=template).records([{"messages": weighted}])
    assert learned_texts(tiny, got) == [["not red, world<|im_end|>"]]


def test_a_template_that_rewrites_the_past_gives_an_example_for_every_answer(
    tiny: LoadedModel,
) -> None:
    chat = [dict(message) for message in CHAT]
    chat[2]["content"] = "hm</think>the cat"
    got = reader(tiny, template=FORGETTING).records([{"messages": chat}])
    assert learned_texts(tiny, got) == [
        ["hm</think>the cat<|im_end|>"],
        ["not red, world<|im_end|>"],
    ]
    assert "hm</think>" not in whole_texts(tiny, got)[1]


def test_what_a_template_puts_into_the_mouth_is_not_looked_for_in_the_answer(
    tiny: LoadedModel,
) -> None:
    got = reader(tiny, template=PREFILLING).records([{"messages": CHAT}])
    assert learned_texts(tiny, got) == [["the cat and<|im_end|>"], ["not red, world<|im_end|>"]]


def test_a_prompt_is_context_and_its_completion_is_learned_to_its_end(tiny: LoadedModel) -> None:
    got = reader(tiny).records([{"prompt": "the cat", "completion": " and the dog"}])
    assert learned_texts(tiny, got) == [[" and the dog<|im_end|>"]]
    empty = reader(tiny).records([{"prompt": "", "completion": "the dog"}])
    assert learned_texts(tiny, empty) == [["the dog<|im_end|>"]]


def test_a_text_is_learned_as_a_whole(tiny: LoadedModel) -> None:
    got = reader(tiny).records([{"text": "the cat and the dog", "source": "a book"}])
    assert learned_texts(tiny, got) == [["the cat and the dog<|im_end|>"]]


def test_tools_calls_and_parts_are_written_as_when_serving(tiny: LoadedModel) -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
    chat = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "the"}, {"type": "text", "text": "dog"}],
        },
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "red", "tool_call_id": "1"},
        {"role": "assistant", "content": "red, world"},
    ]
    got = reader(tiny, 2000).records([{"messages": chat, "tools": tools}])
    text = whole_texts(tiny, got)[0]
    assert "the\ndog" in text
    assert '"name": "look"' in text
    first, last = learned_texts(tiny, got)[0]
    assert '"at": 1' in first
    assert last == "red, world<|im_end|>"


def test_a_plain_text_is_cut_into_pieces_that_make_it_up_again(
    tiny: LoadedModel, tmp_path: Path
) -> None:
    path = tmp_path / "content"
    text = (
        "the cat and the dog. \n\nhello world\n" * 9_000 + "red"
    )  # more than is tokenised at once
    path.write_text(text, encoding="utf-8")
    got = reader(tiny).read(path, "book.txt", piece=50)
    lengths = np.diff(got.starts)
    assert (lengths[:-1] == 50).all()
    assert 2 <= lengths[-1] <= 50
    assert bool(got.learned.all())
    assert "".join(whole_texts(tiny, got)) == text + "<|im_end|>"


# --- what is refused ---------------------------------------------------------------------------
BAD: list[tuple[str, str]] = [
    ('{"messages": []}', "line 1: messages: must be a list of messages"),
    ('{"messages": [', "line 1: is not JSON"),
    ("[1]", "line 1: is not a JSON object"),
    ('{"mesages": []}', "line 1: has none of the fields messages, prompt and completion, text"),
    ('{"prompt": "a"}', "line 1: completion: is missing"),
    ('{"prompt": "a", "completion": ""}', "line 1: completion: is empty"),
    ('{"text": 3}', "line 1: text: must be a text (given 3)"),
    ('{"text": "\\ud800"}', "line 1: text: is not valid Unicode"),
    (
        '{"messages": [{"role": "user", "content": "a"}]}',
        "line 1: messages: no message of the assistant",
    ),
    (
        '{"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}',
        "line 1: messages[0].weight: must be 0 or 1 (given 0.5)",
    ),
    (
        '{"messages": [{"role": "pirate", "content": "a"}]}',
        "line 1: messages[0].role: must be one of",
    ),
    (
        '{"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}',
        "line 1: messages[0].content: is missing",
    ),
    (
        '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
        "line 1: messages[0].content[0]: only parts of type text can be learned",
    ),
    (json.dumps({"text": "the " * 300}), "at most 200 can be trained"),
    ("", "line 1: the file has no examples"),
]


@pytest.mark.parametrize(("line", "expected"), BAD)
def test_a_bad_line_is_named_with_what_is_wrong(
    tiny: LoadedModel, tmp_path: Path, line: str, expected: str
) -> None:
    path = tmp_path / "data"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(InvalidData) as refused:
        reader(tiny).read(path, "data.jsonl")
    assert expected in str(refused.value)


def test_all_bad_lines_are_told_up_to_a_number_and_blank_ones_do_not_count(
    tiny: LoadedModel, tmp_path: Path
) -> None:
    path = tmp_path / "data"
    path.write_bytes(b'\xef\xbb\xbf{"text": "the cat"}\n\n{"text": 1}\n\xff\n{"text": 2}\r\n')
    with pytest.raises(InvalidData) as refused:
        reader(tiny).read(path, "data.jsonl")
    assert [problem.line for problem in refused.value.problems] == [3, 4, 5]
    path.write_text('{"text": 1}\n' * 100)
    with pytest.raises(InvalidData, match="and perhaps more") as refused:
        reader(tiny).read(path, "data.jsonl")
    assert len(refused.value.problems) == MAX_PROBLEMS


def test_long_examples_are_cut_off_only_where_that_was_asked(tiny: LoadedModel) -> None:
    got = reader(tiny, 20, truncate=True).records([{"text": "the cat and " * 30}])
    assert got.n_truncated == 1
    assert len(got.tokens) == 20
    with pytest.raises(InvalidData, match="nothing to learn within its first tokens"):
        reader(tiny, 20, truncate=True).records(
            [{"prompt": "the cat and " * 30, "completion": "dog"}]
        )


def test_conversations_need_a_chat_template(tiny: LoadedModel) -> None:
    with pytest.raises(InvalidData, match="no chat template"):
        reader(tiny, template="").records([{"messages": CHAT}])


def test_what_is_wrong_with_many_lines_alike_is_told_once(tiny: LoadedModel) -> None:
    lines = [{"messages": CHAT}, {"text": 1}, {"messages": CHAT}, {"messages": CHAT}]
    with pytest.raises(InvalidData) as refused:
        reader(tiny, template="").records(lines)
    text = str(refused.value)
    assert "4 problems" in text
    assert text.count("no chat template") == 1
    assert text.splitlines()[1].endswith("(lines 3, 4 too)")
    assert text.splitlines()[2].startswith("line 2: ")


# --- order -------------------------------------------------------------------------------------
def examples_of(lengths: Sequence[int]) -> Examples:
    """Example i holds its own number everywhere."""
    starts = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    tokens = np.repeat(np.arange(len(lengths)), lengths).astype(np.int32)
    return Examples(tokens, np.ones(len(tokens), np.bool_), starts)


def numbers(data: TrainingData, most: int = 1000) -> list[int]:
    got = []
    while len(got) < most and (text := data.next()) is not None:
        assert list(text.labels[:-1]) == list(text.tokens[1:])
        assert text.labels[-1] == -100
        got.append(text.tokens[0])
    return got


LENGTHS = st.lists(st.integers(2, 9), min_size=1, max_size=12)


@given(LENGTHS, st.integers(1, 4), st.integers(0, 99), st.booleans())
def test_every_epoch_gives_every_example_once(
    lengths: list[int], n_epochs: int, seed: int, shuffle: bool
) -> None:
    n = len(lengths)
    data = TrainingData(examples_of(lengths), seed=seed, shuffle=shuffle, n_texts=n * n_epochs)
    got = numbers(data)
    assert len(got) == n * n_epochs
    for epoch in range(n_epochs):
        part = got[epoch * n : (epoch + 1) * n]
        assert sorted(part) == list(range(n))
        assert shuffle or part == list(range(n))
    again = TrainingData(examples_of(lengths), seed=seed, shuffle=shuffle, n_texts=n * n_epochs)
    assert numbers(again) == got


@given(LENGTHS, st.integers(0, 40), st.integers(0, 99))
def test_a_position_as_json_leads_back_to_the_same_texts(
    lengths: list[int], read: int, seed: int
) -> None:
    data = TrainingData(examples_of(lengths), seed=seed)
    numbers(data, read)
    position = json.loads(json.dumps(data.position()))
    rest = numbers(data, 20)
    other = TrainingData(examples_of(lengths), seed=seed)
    other.seek(position)
    assert numbers(other, 20) == rest


@given(LENGTHS, st.integers(1, 40), st.integers(0, 9))
def test_tokens_are_counted_without_reading(lengths: list[int], n: int, seed: int) -> None:
    data = TrainingData(examples_of(lengths), seed=seed)
    counted = data.tokens_of_first(n)
    read = 0
    for _ in range(n):
        text = data.next()
        assert text is not None
        read += len(text.tokens)
    assert counted == read
    ending = TrainingData(examples_of(lengths), seed=seed, n_texts=len(lengths))
    assert ending.tokens_of_first(10**6) == sum(lengths)


def test_a_position_in_other_data_is_refused() -> None:
    data = TrainingData(examples_of([2, 3]), seed=0)
    with pytest.raises(Conflict, match="other training data"):
        data.seek(TrainingData(examples_of([3, 2]), seed=0).position())


@pytest.mark.parametrize(
    ("n", "n_epochs", "steps", "batch_size", "expected"),
    [(10, 3, None, 4, (8, 30)), (4, 1, None, 4, (1, 4)), (3, 2, 7, 2, (7, None))],
)
def test_epochs_or_steps_say_how_much_there_is_to_do(
    n: int, n_epochs: int, steps: int | None, batch_size: int, expected: tuple[int, int | None]
) -> None:
    assert steps_and_texts(n, n_epochs=n_epochs, steps=steps, batch_size=batch_size) == expected
