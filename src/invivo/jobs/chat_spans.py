"""Which characters of a rendered conversation are learned: what the assistant says.

Chat templates do not tell. Where a template marks the assistant's part (``{% generation %}``), its
marks hold. Otherwise a conversation is rendered message by message: what the text gains by an
assistant's message, after what the template itself writes to begin an answer, is that message. A
template that writes earlier messages differently once others follow (thinking is cut out of the
past) has no such gain; then every answer becomes an example of its own, written as it was when it
was the last, which is also how the model meets it when it serves.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from invivo.jobs.records import BadLine, Chat

Render = Callable[[Sequence[dict[str, Any]], bool], str]
_MARKED = re.compile(r"\{%-?\s*generation\b")


@dataclass(frozen=True, slots=True)
class Rendered:
    """A text and the pieces of it [start, stop) that are learned, in characters."""

    text: str
    learned: list[tuple[int, int]]


def marks_answers(template: Any) -> bool:
    """Whether a chat template has ``{% generation %}``."""
    return isinstance(template, str) and _MARKED.search(template) is not None


def spans(chat: Chat, render: Render, ends: Sequence[str]) -> list[Rendered]:
    """The conversation as one example, or as one for every answer.

    Args:
        render: messages to text; the flag asks for the beginning of an answer at the end.
        ends: texts of the tokens that end an answer; blanks after one are not learned.

    Raises:
        BadLine: the template does not show where an answer begins.
    """
    text = render(chat.messages, False)
    pieces = []
    for i, message in enumerate(chat.messages):
        if message["role"] != "assistant":
            continue
        begin = render(chat.messages[:i], True) if i else ""
        upto = render(chat.messages[: i + 1], False)
        if i == 0 or not text.startswith(upto) or not upto.startswith(begin):
            return _each_answer(chat, render, ends)
        if chat.learned[i]:
            pieces.append((len(begin), _end(text, len(begin), len(upto), ends)))
    return [Rendered(text, pieces)]


def marked_spans(chat: Chat, marked: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The template's own spans without those of messages that are not learned.

    Raises:
        BadLine: there are weights, and not one span for every answer.
    """
    answers = [i for i, m in enumerate(chat.messages) if m["role"] == "assistant"]
    wanted = [chat.learned[i] for i in answers]
    if all(wanted):
        return list(marked)
    if len(marked) != len(answers):
        raise BadLine(
            "messages",
            f"the chat template marks {len(marked)} answers of {len(answers)}, so weights cannot "
            "be told apart",
            remedy="Leave the weights out, or split the conversation",
        )
    return [span for span, is_wanted in zip(marked, wanted, strict=True) if is_wanted]


def _each_answer(chat: Chat, render: Render, ends: Sequence[str]) -> list[Rendered]:
    examples = []
    for i, is_learned in enumerate(chat.learned):
        if not is_learned:
            continue
        text = render(chat.messages[: i + 1], False)
        if i:
            before = render(chat.messages[:i], False)
            start = _shared(render(chat.messages[:i], True), text)
            found = text.startswith(before) and start >= len(before)
        else:  # nothing to render before the first message
            start = text.find(chat.messages[0]["content"])
            found = start >= 0
        if not found:
            raise BadLine(
                f"messages[{i}]",
                "the chat template changes what stands before this answer, so that it cannot be "
                "told what to learn",
                remedy="Write such examples as prompt and completion",
            )
        examples.append(Rendered(text, [(start, _end(text, start, len(text), ends))]))
    return examples


def _shared(a: str, b: str) -> int:
    """Characters that both begin with."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)


def _end(text: str, start: int, stop: int, ends: Sequence[str]) -> int:
    """Where an answer ends: after its end token, whatever blanks the template adds."""
    answer = text[start:stop].rstrip()
    return start + len(answer) if answer.endswith(tuple(ends)) and ends else stop
