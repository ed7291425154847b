"""Messages as chat templates want them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from invivo.errors import InvalidRequest
from invivo.server.schemas import (
    AssistantMessage,
    ChatMessage,
    ContentPart,
    MessageToolCall,
    SetContent,
    ToolDefinition,
    ToolMessage,
)


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Plain mappings: content is text, a developer is the system, arguments are objects.

    Raises:
        InvalidRequest: the arguments of an earlier tool call are not a JSON object.
    """
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def template_tools(tools: Sequence[ToolDefinition] | None) -> list[dict[str, Any]] | None:
    """The tools as they were written, without fields that were not given."""
    if not tools:
        return None
    return [tool.model_dump(exclude_unset=True) for tool in tools]


def _message(message: ChatMessage, place: str) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    out: dict[str, Any] = {"role": role, "content": _text(message.content)}
    if isinstance(message, ToolMessage):
        out["tool_call_id"] = message.tool_call_id
    elif message.name is not None:
        out["name"] = message.name
    if isinstance(message, AssistantMessage) and message.tool_calls:
        out["tool_calls"] = [
            _call(call, f"{place}.tool_calls[{i}]") for i, call in enumerate(message.tool_calls)
        ]
    return out


def _text(content: str | list[ContentPart] | None) -> str | list[Any]:
    """Texts are joined to one; beside a set they stay parts, which follow each other directly."""
    if not isinstance(content, list):
        return content or ""
    texts = [part.text for part in content if not isinstance(part, SetContent)]
    if len(texts) == len(content):
        return "\n".join(texts)
    return [{"set": part.set} if isinstance(part, SetContent) else part.text for part in content]


def _call(call: MessageToolCall, place: str) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise InvalidRequest(
            "arguments must be a JSON object as text",
            field=f"{place}.function.arguments",
            given=call.function.arguments,
            remedy="Send the arguments as they came in the answer",
        )
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.function.name, "arguments": arguments},
    }
