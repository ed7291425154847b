"""Structured output holds whatever the model would rather say."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import numpy as np
import pytest
from tests.engine.drive import Inquiry, ask, run, small_engine

from invivo.engine.grammar import GrammarCompiler
from invivo.engine.types import Grammar
from invivo.errors import InvalidRequest, MissingDependency
from invivo.models.load import LoadedModel

pytest.importorskip("llguidance")

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def schema(value: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(value))


def answers(model: LoadedModel, grammar: Grammar, n: int = 6, **params: Any) -> list[Inquiry]:
    engine = small_engine(model)
    some = [
        ask(engine, [1, 2, 3], grammar=grammar, seed=seed, max_tokens=120, **params)
        for seed in range(n)
    ]
    run(engine, *some)
    return some


def test_a_json_schema_is_kept(tiny: LoadedModel) -> None:
    texts = set()
    for inquiry in answers(tiny, schema(SCHEMA)):
        assert inquiry.reason() == "stop"
        value = json.loads(inquiry.text())
        assert set(value) == {"name", "age", "tags"}
        assert 0 <= value["age"] <= 99
        assert set(value["tags"]) <= {"x", "y"}
        texts.add(inquiry.text())
    assert len(texts) > 1


def test_a_regular_expression_is_kept(tiny: LoadedModel) -> None:
    for inquiry in answers(tiny, Grammar("regex", r"[a-c]{2}-\d{3}")):
        assert re.fullmatch(r"[a-c]{2}-\d{3}", inquiry.text())
        assert inquiry.reason() == "stop"


def test_a_choice_is_kept_character_by_character(tiny: LoadedModel) -> None:
    options = ["yes", "no", "a+b (c)", "[x]|{y}", "日本", "1.5 & \\d", 'say "hi"', "a/b~c#d"]
    got = {i.text() for i in answers(tiny, Grammar("choice", json.dumps(options)), n=60)}
    assert got <= set(options)
    assert len(got) >= 4
    for option in options:
        only = answers(tiny, Grammar("choice", json.dumps([option])), n=1)[0]
        assert only.text() == option


def test_an_output_that_may_go_on_ends_by_the_end_token_only_where_admitted(
    tiny: LoadedModel,
) -> None:
    for inquiry in answers(tiny, Grammar("regex", r"(ab)+"), n=8, logit_bias=((297, 5.0),)):
        if inquiry.reason() == "stop":
            assert re.fullmatch(r"(ab)+", inquiry.text())
            assert inquiry.tokens()[-1] in tiny.config.eos_token_ids


def test_rows_with_and_without_grammar_share_a_batch(tiny: LoadedModel) -> None:
    engine = small_engine(tiny)
    free_alone = ask(engine, [7, 8], max_tokens=12, seed=5, logprobs=0)
    run(engine, free_alone)
    free = ask(engine, [7, 8], max_tokens=12, seed=5, logprobs=0)
    bound = ask(engine, [7, 8], max_tokens=12, grammar=Grammar("choice", '["red", "blue"]'))
    run(engine, free, bound)
    assert free.tokens() == free_alone.tokens()
    assert bound.text() in ("red", "blue")


@pytest.mark.parametrize(
    ("grammar", "field"),
    [
        (Grammar("regex", "(unclosed"), "regex"),
        (Grammar("regex", r"(?=lookahead)a"), "regex"),
        (Grammar("json_schema", "{not json"), "json_schema"),
        (Grammar("json_schema", "[1]"), "json_schema"),
        (Grammar("json_schema", '{"type": "nonsense"}'), "json_schema"),
        (Grammar("json_schema", '{"$ref": "#/$defs/missing"}'), "json_schema"),
        (Grammar("choice", "[]"), "choice"),
        (Grammar("choice", '["a", 1]'), "choice"),
    ],
)
def test_grammars_that_cannot_be_compiled_are_refused_when_submitted(
    grammar: Grammar, field: str, tiny: LoadedModel
) -> None:
    with pytest.raises(InvalidRequest) as error:
        ask(small_engine(tiny), [1], grammar=grammar)
    assert error.value.field == field


def test_a_missing_library_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tiny: LoadedModel
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingDependency, match=r"invivo\[serve\]"):
        ask(small_engine(tiny), [1], grammar=Grammar("regex", "a"))


def test_compiled_grammars_are_kept(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = GrammarCompiler(
        tiny.tokenizer, vocab_size=tiny.config.vocab_size, eos_ids=tiny.config.eos_token_ids
    )
    compiler.matcher(schema(SCHEMA))
    monkeypatch.setattr(compiler, "_compile", None)  # nothing is compiled again
    matchers = [compiler.matcher(schema(SCHEMA)) for _ in range(50)]
    words = np.zeros((len(matchers), (tiny.config.vocab_size + 31) // 32), np.int32)
    for matcher, row in zip(matchers, words, strict=True):
        matcher.fill_mask(row)
    assert (words == words[0]).all()
    first = tiny.tokenizer.convert_tokens_to_ids("{")
    assert matchers[0].accept(first)
    matchers[1].fill_mask(words[1])
    assert (words[1] == words[0]).all()
