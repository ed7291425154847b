"""A conversation as the text that the model sees: the same for requests and for training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from invivo.errors import InvalidRequest
from invivo.tools import tools_in_text

Message = Mapping[str, Any]


def has_chat_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def render_chat(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    add_generation_prompt: bool,
) -> str:
    """The conversation through the tokenizer's chat template.

    Raises:
        InvalidRequest: the template refuses the messages.
    """
    written, tools = written_messages(tokenizer, messages, tools)
    return apply_template(tokenizer, written, tools, add_generation_prompt)


def written_messages(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None
) -> tuple[Sequence[Message], Sequence[Mapping[str, Any]] | None]:
    """Messages and tools for the template; where it passes tools over, the messages tell of them.

    Raises:
        InvalidRequest: the template refuses the messages.
    """
    if not tools:
        return messages, None
    told = apply_template(tokenizer, messages, tools, False)
    if told != apply_template(tokenizer, messages, None, False):
        return messages, tools
    return tools_in_text(messages, tools), None


def apply_template(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool,
) -> str:
    """The template as it is, with the tools if it knows of them.

    Raises:
        InvalidRequest: the template refuses the messages.
    """
    from jinja2.exceptions import TemplateError

    try:
        return str(
            tokenizer.apply_chat_template(
                [dict(m) for m in messages],
                tools=[dict(t) for t in tools] if tools else None,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        )
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        raise InvalidRequest(
            f"the model's chat template refuses them: {error}",
            field="messages",
            remedy="Check roles and their order",
        ) from error
