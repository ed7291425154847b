"""Tool calls: what is planned, and what is parsed out of text, whole or in pieces."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from invivo.errors import InvalidRequest
from invivo.tools import ToolCall, ToolCallParser, parse_tool_calls, plan_tools, tools_in_text

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/City"}},
            "required": ["city"],
            "$defs": {"City": {"type": "string"}},
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
NAMES = frozenset({"weather", "clock"})


def test_auto_renders_and_parses_without_a_constraint():
    plan = plan_tools([WEATHER, CLOCK])
    assert plan.render == [WEATHER, CLOCK]
    assert plan.json_schema is None
    assert plan.names == NAMES


def test_none_mentions_no_tools():
    assert plan_tools([WEATHER], "none") == plan_tools(None, "none")


def test_required_admits_every_tool_and_moves_references():
    schema = json.loads(plan_tools([WEATHER, CLOCK], "required").json_schema or "")
    assert [one["properties"]["name"]["const"] for one in schema["anyOf"]] == ["weather", "clock"]
    assert schema["$defs"]["tool0"]["properties"]["city"] == {"$ref": "#/$defs/tool0/$defs/City"}


def test_named_admits_one_tool():
    plan = plan_tools([WEATHER, CLOCK], {"type": "function", "function": {"name": "clock"}})
    assert json.loads(plan.json_schema or "")["properties"]["name"] == {"const": "clock"}


@pytest.mark.parametrize(
    ("tools", "choice", "field"),
    [
        (None, "required", "tool_choice"),
        ([WEATHER], {"type": "function", "function": {"name": "unknown"}}, "tool_choice"),
        ([WEATHER], "sometimes", "tool_choice"),
        ([WEATHER, WEATHER], None, "tools"),
        ([{"type": "function"}], None, "tools[0]"),
    ],
)
def test_bad_choices_name_the_field(tools, choice, field):
    with pytest.raises(InvalidRequest) as caught:
        plan_tools(tools, choice)
    assert caught.value.field == field
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("Hello {world}", "Hello {world}", []),
        (
            '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>',
            "",
            [ToolCall("clock", "{}")],
        ),
        (
            'Let me look. <tool_call>{"name":"weather","arguments":{"city":"}</tool_call>"}}'
            '</tool_call>\n<tool_call>{"name":"clock","arguments":{}}</tool_call>\n',
            "Let me look. ",
            [ToolCall("weather", '{"city": "}</tool_call>"}'), ToolCall("clock", "{}")],
        ),
        (
            '{"name": "weather", "parameters": {"city": "Århus"}}',
            "",
            [ToolCall("weather", '{"city": "Århus"}')],
        ),
        ('{"answer": 42}', '{"answer": 42}', []),
        ('{"name": "unknown", "arguments": {}}', '{"name": "unknown", "arguments": {}}', []),
        ("<tool_call>nothing</tool_call>", "<tool_call>nothing</tool_call>", []),
        ('<tool_call>{"name": "clock", "arguments": {}}', "", [ToolCall("clock", "{}")]),
        ('{"name": "weather", "argum', '{"name": "weather", "argum', []),
        ("less < <tool", "less < <tool", []),
        ("  \n", "  \n", []),
    ],
)
def test_answers_split_into_content_and_calls(text, content, calls):
    assert parse_tool_calls(text, NAMES) == (content, calls)


_PIECES = st.lists(
    st.sampled_from(
        [
            "<tool_call>",
            "</tool_call>",
            '{"name": "clock", "arguments": {}}',
            '{"name": "weather", "arguments": {"city": "a\\"}<tool_call>"}}',
            "{",
            "}",
            '"',
            " ",
            "\n",
            "text",
            "<",
            "\\",
        ]
    ),
    max_size=8,
)


@given(_PIECES, st.data())
def test_cuts_do_not_change_the_parse(pieces, data):
    text = "".join(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
    parser = ToolCallParser(NAMES)
    out = []
    for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True):
        out += parser.feed(text[start:stop])
    out += parser.close()
    content = "".join(piece for piece in out if isinstance(piece, str))
    calls = [piece for piece in out if isinstance(piece, ToolCall)]
    assert (content, calls) == parse_tool_calls(text, NAMES)


def test_tools_can_be_written_into_the_messages():
    call = {"function": {"name": "clock", "arguments": "{}"}}
    written = tools_in_text(
        [
            {"role": "user", "content": "What time is it?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "noon"},
        ],
        [WEATHER, CLOCK],
    )
    assert [message["role"] for message in written] == ["user", "assistant", "user"]
    assert written[0]["content"].endswith("What time is it?")
    assert '"name": "weather"' in written[0]["content"]
    assert parse_tool_calls(written[1]["content"], NAMES) == ("", [ToolCall("clock", "{}")])
    assert "noon" in written[2]["content"]
    system = {"role": "system", "content": "Be brief."}
    written = tools_in_text([system, {"role": "user", "content": "Hi"}], [CLOCK])
    assert written[0]["content"].startswith("Be brief.")
    assert "clock" in written[0]["content"]
    assert written[1]["content"] == "Hi"
