"""Tool calling as text: what to render, what to constrain, and calls parsed out of an answer.

Tools come in the OpenAI shape, ``{"type": "function", "function": {"name", "parameters"}}``.
Models answer with ``<tool_call>{"name": ..., "arguments": ...}</tool_call>`` (Hermes, ChatML) or
with the bare JSON object; a forced call is constrained to the latter by a JSON schema.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from invivo.errors import InvalidRequest

OPEN_TAG = "<tool_call>"
CLOSE_TAG = "</tool_call>"

Tool = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call: the function's name and its arguments as JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """How a conversation with tools is run.

    Attributes:
        render: the tools for the chat template, None = do not mention any.
        json_schema: constraint on the answer as text, None = free.
        names: functions whose calls are parsed out of the answer; empty = do not parse.
    """

    render: list[Tool] | None = None
    json_schema: str | None = None
    names: frozenset[str] = frozenset()


def plan_tools(tools: Sequence[Tool] | None, tool_choice: str | Tool | None = None) -> ToolPlan:
    """Decides what ``tools`` and ``tool_choice`` mean for prompt, constraint and parsing.

    Raises:
        InvalidRequest: a choice without tools, an unknown choice or function, a name used twice.
    """
    if not tools:
        if tool_choice not in (None, "none", "auto"):
            raise InvalidRequest(
                "a tool cannot be chosen when none is given",
                field="tool_choice",
                given=tool_choice,
                remedy="Give the functions in tools",
            )
        return ToolPlan()
    functions = [_function(tool, i) for i, tool in enumerate(tools)]
    names = [function["name"] for function in functions]
    if len(set(names)) < len(names):
        raise InvalidRequest(
            "two tools have the same name", field="tools", given=names, remedy="Rename one"
        )
    render = list(tools)
    if tool_choice is None or tool_choice == "auto":
        return ToolPlan(render, None, frozenset(names))
    if tool_choice == "none":
        return ToolPlan()
    if tool_choice == "required":
        forced = functions
    else:
        wanted = _chosen_name(tool_choice)
        forced = [function for function in functions if function["name"] == wanted]
        if not forced:
            raise InvalidRequest(
                "the chosen function is not among the tools",
                field="tool_choice",
                given=wanted,
                remedy=f"Choose one of {', '.join(names)}",
            )
    return ToolPlan(render, json.dumps(call_schema(forced)), frozenset(names))


def call_schema(functions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """JSON schema of one call to one of ``functions`` as the bare object."""
    definitions: dict[str, Any] = {}
    calls: list[dict[str, Any]] = []
    for i, function in enumerate(functions):
        place = f"tool{i}"
        parameters = function.get("parameters") or {
            "type": "object",
            "properties": {},
            "additionalProperties": False,
        }
        # A tool's own "#/..." references must follow it to its new place.
        definitions[place] = _moved(parameters, f"#/$defs/{place}")
        calls.append(
            {
                "type": "object",
                "properties": {
                    "name": {"const": function["name"]},
                    "arguments": {"$ref": f"#/$defs/{place}"},
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    body = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return {"$defs": definitions, **body}


def tools_in_text(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The conversation with tools, calls and their results written out as text.

    For chat templates that know nothing of tools: the description goes into the system message,
    or before the first user's, since not every template takes a system message.
    """
    functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    note = (
        f"You may call these functions:\n{functions}\n"
        f'To call one, answer with {OPEN_TAG}{{"name": ..., "arguments": {{...}}}}{CLOSE_TAG}.'
    )
    out = [_written_out(message) for message in messages]
    for message in out:
        if message["role"] == "system":
            message["content"] = f"{message['content']}\n\n{note}"
            break
        if message["role"] == "user":
            message["content"] = f"{note}\n\n{message['content']}"
            break
    return out


def parse_tool_calls(text: str, names: frozenset[str]) -> tuple[str, list[ToolCall]]:
    """Splits a whole answer into its content and its calls."""
    parser = ToolCallParser(names)
    pieces = parser.feed(text) + parser.close()
    content = "".join(piece for piece in pieces if isinstance(piece, str))
    return content, [piece for piece in pieces if isinstance(piece, ToolCall)]


class ToolCallParser:
    """Takes an answer piece by piece and gives content and whole calls as soon as they are sure.

    The result does not depend on where the pieces are cut. What looks like a call but is not
    valid JSON of the right shape comes back as content.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._mode = "start"  # start | text | tagged | bare
        self._pending = ""
        self._scan = _ObjectScan()
        self._called = False

    def feed(self, text: str) -> list[str | ToolCall]:
        """Takes new text; returns settled content and complete calls in order."""
        self._pending += text
        out: list[str | ToolCall] = []
        while self._advance(out):
            pass
        return out

    def close(self) -> list[str | ToolCall]:
        """The answer has ended: what was withheld is content, or a call whose tag stayed open."""
        out: list[str | ToolCall] = []
        rest = self._pending
        if self._mode == "tagged":
            call = _call(rest[: self._scan.end]) if self._scan.end else None
            if call is not None:
                out.append(call)
                rest = rest[self._scan.end :]
            else:
                rest = OPEN_TAG + rest
        if rest.strip() or (rest and not self._called and not out):
            out.append(rest)
        self._pending = ""
        return out

    def _advance(self, out: list[str | ToolCall]) -> bool:
        """One transition; False when more text is needed."""
        if self._mode == "start":
            visible = self._pending.lstrip()
            if not visible:
                return False
            if visible.startswith("{"):
                self._pending = visible
                self._enter("bare")
            elif visible.startswith(OPEN_TAG):
                self._pending = visible[len(OPEN_TAG) :]
                self._enter("tagged")
            elif OPEN_TAG.startswith(visible):
                return False
            else:
                self._mode = "text"
            return True
        if self._mode == "text":
            return self._advance_text(out)
        if self._mode == "tagged":
            return self._advance_tagged(out)
        end = self._scan.feed(self._pending)
        if not end:
            return False
        call = _call(self._pending[:end])
        if call is not None and call.name in self._names:
            self._emit(out, call, end)
        else:
            self._mode = "text"
        return True

    def _advance_text(self, out: list[str | ToolCall]) -> bool:
        at = self._pending.find(OPEN_TAG)
        if at >= 0:
            if at:
                out.append(self._pending[:at])
            self._pending = self._pending[at + len(OPEN_TAG) :]
            self._enter("tagged")
            return True
        keep = _overlap(self._pending, OPEN_TAG)
        settled = self._pending[: len(self._pending) - keep]
        if settled:
            out.append(settled)
        self._pending = self._pending[len(settled) :]
        return False

    def _advance_tagged(self, out: list[str | ToolCall]) -> bool:
        visible = self._pending.lstrip()
        if visible and not visible.startswith("{"):
            self._reject(out)
            return True
        end = self._scan.feed(self._pending)
        if not end:
            return False
        call = _call(self._pending[:end])
        if call is None:
            self._reject(out)
            return True
        after = self._pending[end:].lstrip()
        if after.startswith(CLOSE_TAG):
            self._emit(out, call, len(self._pending) - len(after) + len(CLOSE_TAG))
            return True
        if CLOSE_TAG.startswith(after):
            return False
        self._emit(out, call, end)
        return True

    def _enter(self, mode: str) -> None:
        self._mode = mode
        self._scan = _ObjectScan()

    def _emit(self, out: list[str | ToolCall], call: ToolCall, end: int) -> None:
        out.append(call)
        self._called = True
        self._pending = self._pending[end:]
        self._mode = "start"

    def _reject(self, out: list[str | ToolCall]) -> None:
        out.append(OPEN_TAG)
        self._mode = "text"


class _ObjectScan:
    """Finds where a JSON object that grows at its end closes; each character is looked at once."""

    def __init__(self) -> None:
        self.end = 0  # index just after the closing brace, 0 = still open
        self._at = 0
        self._depth = 0
        self._string = False
        self._escaped = False

    def feed(self, text: str) -> int:
        while not self.end and self._at < len(text):
            char = text[self._at]
            self._at += 1
            if self._string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._string = False
            elif char == '"':
                self._string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    self.end = self._at
        return self.end


def _call(text: str) -> ToolCall | None:
    """The call that ``text`` writes down, None when it is not one."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if not isinstance(arguments, dict):
        return None
    return ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False))


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of ``text`` that begins ``tag``."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:length]):
            return length
    return 0


def _function(tool: Tool, index: int) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidRequest(
            "a tool needs a function with a name",
            field=f"tools[{index}]",
            given=tool,
            remedy='Write {"type": "function", "function": {"name": ..., "parameters": ...}}',
        )
    return function


def _chosen_name(tool_choice: object) -> str:
    if isinstance(tool_choice, dict):
        function = tool_choice.get("function")
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            return str(function["name"])
    raise InvalidRequest(
        "not a way to choose a tool",
        field="tool_choice",
        given=tool_choice,
        remedy='Use "auto", "none", "required" or {"type": "function", "function": {"name": ...}}',
    )


def _written_out(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content") or ""
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>{content}</tool_response>"}
    for call in message.get("tool_calls") or ():
        function = call["function"]
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        written = {"name": function["name"], "arguments": arguments}
        content += f"{OPEN_TAG}{json.dumps(written, ensure_ascii=False)}{CLOSE_TAG}"
    return {"role": message["role"], "content": content}


def _moved(schema: Any, place: str) -> Any:
    """``schema`` with its local references prefixed by ``place``."""
    if isinstance(schema, dict):
        return {
            key: place + value[1:]
            if key == "$ref" and isinstance(value, str) and value.startswith("#")
            else _moved(value, place)
            for key, value in schema.items()
        }
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    return schema
