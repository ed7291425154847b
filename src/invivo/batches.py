"""What one argument of the LM interface holds: one prompt or several, checked for their kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from invivo.errors import InvalidRequest
from invivo.marked_prompt import MarkedPrompt, is_parts


def batch_of(prompt: Any) -> tuple[list[Any], bool]:
    """Prompts as a list, and whether there was one alone.

    Raises:
        InvalidRequest: neither a text nor a list.
    """
    if isinstance(prompt, str | MarkedPrompt) or is_parts(prompt):
        return [prompt], True
    if not isinstance(prompt, Sequence):
        raise InvalidRequest(
            "must be a text, token ids or a list of them", field="prompt", given=prompt
        )
    if prompt and isinstance(prompt[0], int):
        return [prompt], True
    return list(prompt), False


def run_prompts_of(prompt: Any) -> tuple[list[Any], bool]:
    """:func:`batch_of` for programs, whose prompt may also be a conversation."""
    if is_conversation(prompt):
        return [prompt], True
    return batch_of(prompt)


def is_conversation(prompt: Any) -> bool:
    """Whether this is a list of messages."""
    if isinstance(prompt, str) or not isinstance(prompt, Sequence) or not prompt:
        return False
    return all(isinstance(one, Mapping) and "role" in one for one in prompt)


def score_items_of(text: Any) -> tuple[list[Any], bool]:
    """:func:`batch_of` for scoring, where a tuple is one pair (context, continuation)."""
    items, single = ([text], True) if isinstance(text, tuple) else batch_of(text)
    for item in items:
        if isinstance(item, tuple) and len(item) != 2:
            raise InvalidRequest("a pair is (context, continuation)", field="text", given=item)
    return items, single


def conversations_of(messages: Any) -> tuple[list[Any], bool]:
    """Conversations as a list, and whether there was one alone.

    Raises:
        InvalidRequest: not a list of messages, nor a list of such lists.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise InvalidRequest("must be a list of messages", field="messages", given=messages)
    if not messages:
        raise InvalidRequest("must not be empty", field="messages", given=messages)
    if isinstance(messages[0], Mapping):
        return [messages], True
    return list(messages), False


def check_messages(messages: Any) -> None:
    """Raises InvalidRequest when ``messages`` is not one conversation."""
    for message in messages if isinstance(messages, Sequence) else [messages]:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidRequest("must be mappings with a role", field="messages", given=message)


def text_or_ids(prompt: Any) -> str | list[int]:
    """One prompt as it is written; raises InvalidRequest for anything else."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Sequence):
        ids = [t for t in prompt if isinstance(t, int) and not isinstance(t, bool)]
        if len(ids) == len(prompt):
            return ids
    raise InvalidRequest("must be a text or token ids", field="prompt", given=prompt)
