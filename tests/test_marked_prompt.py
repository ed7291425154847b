"""Prompts with sets: laid out the same in any order; turns of a chat where they stand."""

from __future__ import annotations

import itertools

import pytest

from invivo.errors import InvalidRequest
from invivo.marked_prompt import is_parts, mark_chat, mark_parts, read_parts


def tokenize(text, special):
    return ([1000] if special else []) + [ord(c) for c in text]


def template(messages, answer_begins):
    text = "<s>" + "".join(f"[{m['role']}]{(m['content'] or '').strip()}\n" for m in messages)
    return text + ("[assistant]" if answer_begins else "")


def text_of(ids):
    return "".join(chr(i) for i in ids if i < 1000)


PROMPT = ["Which?\n", {"set": [" red", " b", " seven"]}, "\nAnd: ", {"set": ["x", "y"]}, "."]


def test_what_has_sets_and_what_has_none():
    assert is_parts(PROMPT)
    assert is_parts([{"type": "text", "text": "a"}, {"type": "set", "set": ["a"]}])
    for other in ("text", [1, 2], ["a", "b"], [], [{"role": "user", "content": "x"}], {"set": []}):
        assert not is_parts(other)


def test_members_are_laid_out_in_one_order_and_named_in_the_order_given():
    for members in itertools.permutations([" red", " b", " seven"]):
        prompt = mark_parts(read_parts([PROMPT[0], {"set": list(members)}, *PROMPT[2:]]), tokenize)
        assert prompt.ids[0] == 1000
        assert text_of(prompt.ids) == "Which?\n b red seven\nAnd: xy."
        assert [text_of(prompt.ids[a:b]) for a, b in prompt.sets[0]] == list(members)
        assert [text_of(prompt.ids[a:b]) for a, b in prompt.sets[1]] == ["x", "y"]


def test_a_set_may_come_first_and_last():
    prompt = mark_parts(read_parts([{"set": ["b", "a"]}]), tokenize)
    assert prompt.ids == (1000, ord("a"), ord("b"))
    assert prompt.sets == (((2, 3), (1, 2)),)


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        (["a", {"set": []}], "prompt[1].set"),
        (["a", {"set": "bc"}], "prompt[1].set"),
        (["a", {"set": ["b", 3]}], "prompt[1].set[1]"),
        (["a", {"set": ["b"], "more": 1}], "prompt[1]"),
        ([7, {"set": ["b"]}], "prompt[0]"),
        (["a", {"set": ["b"] * 257}], "prompt[1].set"),
        ([{"set": ["b"]}] * 65, "prompt"),
    ],
)
def test_what_is_neither_text_nor_set_is_refused(prompt, field):
    with pytest.raises(InvalidRequest) as caught:
        read_parts(prompt)
    assert caught.value.field == field


def test_an_empty_member_is_refused():
    with pytest.raises(InvalidRequest) as caught:
        mark_parts(read_parts(["a", {"set": ["b", ""]}]), tokenize)
    assert caught.value.field == "prompt[1].set[1]"


def test_turns_of_a_chat_are_where_the_contents_stand():
    chat = [
        {"role": "system", "content": "user"},  # as the template writes elsewhere too
        {"role": "user", "content": "  is [user] it "},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "assistant"},
    ]
    prompt = mark_chat(chat, template, tokenize)
    assert prompt.text == template(chat, True)
    found = [(role, prompt.text[a:b]) for role, a, b in prompt.turns]
    assert found == [("system", "user"), ("user", "is [user] it"), ("user", "assistant")]
    assert text_of(prompt.ids) == prompt.text


def test_no_turns_where_the_template_rewrites_what_was_said():
    def shouting(messages, answer_begins):
        return template([{**m, "content": m["content"].upper()} for m in messages], answer_begins)

    assert mark_chat([{"role": "user", "content": "is it"}], shouting, tokenize).turns != ()

    def forgetful(messages, answer_begins):
        return template(messages[-1:], answer_begins)

    chat = [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]
    assert mark_chat(chat, forgetful, tokenize).turns == ()


def test_sets_in_a_chat():
    parts = ["Which?", {"type": "set", "set": [" red", " b"]}, {"type": "text", "text": " Say."}]
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    prompt = mark_chat(chat, template, tokenize)
    written = "<s>[system]Be brief.\n[user]Which? b red Say.\n[assistant]"
    assert text_of(prompt.ids) == written
    assert [text_of(prompt.ids[a:b]) for a, b in prompt.sets[0]] == [" red", " b"]


def test_a_template_that_does_not_write_a_set_whole_is_refused():
    def twice(messages, answer_begins):
        return template([*messages, *messages], answer_begins)

    chat = [{"role": "user", "content": [{"set": ["a", "b"]}]}]
    with pytest.raises(InvalidRequest, match="as they were given"):
        mark_chat(chat, twice, tokenize)
