"""Training data as it is written: one JSON object a line, or a plain text.

A line is a conversation (``messages``, and ``tools`` if any), a ``prompt`` with its
``completion``, or a ``text``. A prompt with its completion may have ``runs``: other prompts by the
names that the job's program gives them, and ``other``: what the completion is compared with where
that is the job's objective. Other fields of a line are passed over. An assistant's
message may have a ``weight`` of 0 (it is context only) or 1, as in OpenAI's format.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any

from invivo.errors import InvalidRequest

MAX_PROBLEMS = 20
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
PLAIN_SUFFIXES = (".txt", ".md")


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with one line; lines count from 1."""

    line: int
    field: str | None
    message: str
    given: Any = None
    remedy: str | None = None

    def __str__(self) -> str:
        error = InvalidRequest(self.message, field=self.field, given=self.given, remedy=self.remedy)
        return f"line {self.line}: {error}"


class InvalidData(InvalidRequest):
    """A file that cannot be learned, with the first problems found in it."""

    def __init__(self, problems: list[Problem], field: str = "training_file") -> None:
        """``field``: which of the job's files it is."""
        self.problems = problems
        which = field.removesuffix("_file")
        more = " (and perhaps more)" if len(problems) >= MAX_PROBLEMS else ""
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        text = "\n".join(_told(problems))
        super().__init__(f"{count} in the {which} data{more}:\n{text}", field=field)


def _told(problems: list[Problem]) -> list[str]:
    """A line for each problem; what is wrong with many lines alike is told once."""
    alike: dict[str, list[Problem]] = {}
    for problem in problems:
        alike.setdefault(str(replace(problem, line=0)), []).append(problem)
    told = []
    for same in alike.values():
        others = ", ".join(str(problem.line) for problem in same[1:])
        told.append(f"{same[0]}" + (f" (lines {others} too)" if others else ""))
    return told


class BadLine(Exception):
    """A problem found while a line is read; the reader adds the line's number."""

    def __init__(
        self, field: str | None, message: str, given: Any = None, remedy: str | None = None
    ) -> None:
        super().__init__(message)
        self.field, self.message, self.given, self.remedy = field, message, given, remedy

    def at(self, line: int) -> Problem:
        return Problem(line, self.field, self.message, self.given, self.remedy)


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation; ``learned[i]`` says whether message i is (assistants' only)."""

    messages: list[dict[str, Any]]
    learned: list[bool]
    tools: list[dict[str, Any]] | None


@dataclass(frozen=True, slots=True)
class Completed:
    """A prompt and the continuation to learn; ``runs``: prompts of other runs by name; ``other``:
    a continuation of as many tokens."""

    prompt: str
    completion: str
    runs: Mapping[str, str] = field(default_factory=dict)
    other: str | None = None


@dataclass(frozen=True, slots=True)
class Whole:
    """A text to learn from its first token to its last."""

    text: str


Record = Chat | Completed | Whole


def is_plain(filename: str) -> bool:
    """Whether the file is one text rather than a line for every example."""
    return PurePath(filename).suffix.lower() in PLAIN_SUFFIXES


def decoded(lines: Iterable[bytes]) -> Iterator[tuple[int, str | BadLine]]:
    """Lines that are not blank, numbered from 1."""
    for number, raw in enumerate(lines, start=1):
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if not raw.strip():
            continue
        try:
            yield number, raw.decode("utf-8")
        except UnicodeDecodeError as error:
            yield (
                number,
                BadLine(None, f"is not UTF-8 text ({error.reason})", remedy="Save it as UTF-8"),
            )


def parse_line(line: str) -> Record:
    """
    Raises:
        BadLine: it is not an example.
    """
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadLine(
            None, f"is not JSON ({error.msg}, column {error.colno})", line.strip()
        ) from error
    except RecursionError as error:
        raise BadLine(None, "is nested too deeply") from error
    return parse_record(value)


def parse_record(value: Any) -> Record:
    """
    Raises:
        BadLine: it is not an example.
    """
    if not isinstance(value, Mapping):
        raise BadLine(None, "is not a JSON object", value, 'Write {"messages": [...]}')
    if "messages" in value:
        return _chat(value)
    if "prompt" in value or "completion" in value:
        completion = _text(value, "completion")
        if not completion:
            raise BadLine("completion", "is empty, so there is nothing to learn")
        other = None if value.get("other") is None else _unicode(value["other"], "other")
        return Completed(_text(value, "prompt"), completion, _runs(value), other)
    if "text" in value:
        text = _text(value, "text")
        if not text:
            raise BadLine("text", "is empty", remedy="Leave the line out")
        return Whole(text)
    raise BadLine(
        None,
        "has none of the fields messages, prompt and completion, text",
        sorted(str(key) for key in value),
        'Write {"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}',
    )


def _text(value: Mapping[str, Any], name: str) -> str:
    if name not in value:
        raise BadLine(name, "is missing")
    return _unicode(value[name], name)


def _runs(value: Mapping[str, Any]) -> dict[str, str]:
    given = value.get("runs") or {}
    if not isinstance(given, Mapping):
        raise BadLine("runs", "must be prompts by the name of their run", given)
    return {str(name): _unicode(text, f"runs.{name}") for name, text in given.items()}


def _unicode(text: Any, place: str) -> str:
    if not isinstance(text, str):
        raise BadLine(place, "must be a text", text)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadLine(place, "is not valid Unicode (half of a surrogate pair)", text) from error
    return text


def _chat(value: Mapping[str, Any]) -> Chat:
    messages = value["messages"]
    if not isinstance(messages, list) or not messages:
        raise BadLine("messages", "must be a list of messages", messages)
    tools = value.get("tools") or None
    if tools is not None and not (
        isinstance(tools, list)
        and all(isinstance(t, dict) and isinstance(t.get("function"), dict) for t in tools)
    ):
        raise BadLine("tools", "must be functions in OpenAI's shape", tools)
    plain, learned = [], []
    for i, message in enumerate(messages):
        place = f"messages[{i}]"
        if not isinstance(message, dict):
            raise BadLine(place, "must be an object with role and content", message)
        plain.append(_message(message, place))
        learned.append(_is_learned(message, place))
    if not any(learned):
        has_any = any(m["role"] == "assistant" for m in plain)
        raise BadLine(
            "messages",
            "every assistant's message has weight 0" if has_any else "no message of the assistant",
            remedy="The assistant's messages are what is learned",
        )
    return Chat(plain, learned, tools)


def _message(message: dict[str, Any], place: str) -> dict[str, Any]:
    """As chat templates want it: content is text, a call's arguments are an object."""
    role = message.get("role")
    if role not in ROLES:
        raise BadLine(f"{place}.role", f"must be one of {', '.join(ROLES)}", role)
    content = message.get("content")
    calls = message.get("tool_calls")
    if content is None and not (role == "assistant" and calls):
        raise BadLine(f"{place}.content", "is missing")
    plain: dict[str, Any] = {
        "role": "system" if role == "developer" else role,
        "content": _content(content, f"{place}.content"),
    }
    for name in ("name", "tool_call_id", "reasoning_content"):
        if message.get(name) is not None:
            plain[name] = _unicode(message[name], f"{place}.{name}")
    if calls:
        if role != "assistant" or not isinstance(calls, list):
            raise BadLine(f"{place}.tool_calls", "must be a list in an assistant's message", calls)
        plain["tool_calls"] = [
            _call(call, f"{place}.tool_calls[{j}]") for j, call in enumerate(calls)
        ]
    return plain


def _content(content: Any, place: str) -> str:
    if content is None:
        return ""
    if isinstance(content, list):
        parts = []
        for i, part in enumerate(content):
            if not isinstance(part, dict) or part.get("type") != "text":
                raise BadLine(f"{place}[{i}]", "only parts of type text can be learned", part)
            parts.append(_unicode(part.get("text"), f"{place}[{i}].text"))
        return "\n".join(parts)
    return _unicode(content, place)


def _call(call: Any, place: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadLine(place, "must have a function with a name", call)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        raise BadLine(
            f"{place}.function.arguments", "must be a JSON object", function.get("arguments")
        )
    return {
        "id": str(call.get("id", "")),
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def _is_learned(message: dict[str, Any], place: str) -> bool:
    weight = message.get("weight")
    if message["role"] != "assistant":
        if weight not in (None, 0):
            raise BadLine(f"{place}.weight", "only an assistant's message is learned", weight)
        return False
    if weight is None:
        return True
    if isinstance(weight, bool) or weight not in (0, 1):
        raise BadLine(f"{place}.weight", "must be 0 or 1", weight)
    return bool(weight)
