"""What the demo learns: to answer as people do in Romeo and Juliet.

The play is cut into conversations of two turns: a speech is what the user says, the next one, of
another person, is the answer. Only answers are learned. The last ones are held out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from typing import Any

HELD_OUT = 16
ASKED = (1, 160)  # characters of what the user says
ANSWERED = (60, 260)  # characters of an answer


@dataclass(frozen=True, slots=True)
class Speech:
    """What one person says at once."""

    speaker: str
    text: str


@dataclass(frozen=True, slots=True)
class Exchange:
    """A speech and the answer to it."""

    asked: str
    answered: str

    def messages(self) -> list[dict[str, Any]]:
        return [
            {"role": "user", "content": self.asked},
            {"role": "assistant", "content": self.answered},
        ]


def speeches() -> Iterator[Speech]:
    """The play's speeches in order; the lines of one are joined with line ends."""
    text = (files("invivo.demo") / "texts" / "romeo_and_juliet.txt").read_text(encoding="utf-8")
    for block in text.split("\n\n"):
        speaker, colon, said = block.strip().partition(":\n")
        if colon:
            yield Speech(speaker, said)


def exchanges() -> tuple[list[Exchange], list[Exchange]]:
    """(to learn, held out). What is held out comes last in the play and shares no speech."""
    found = [
        Exchange(first.text, second.text)
        for first, second in pairwise(speeches())
        if first.speaker != second.speaker
        and ASKED[0] <= len(first.text) <= ASKED[1]
        and ANSWERED[0] <= len(second.text) <= ANSWERED[1]
    ]
    learned, held_out = found[:-HELD_OUT], found[-HELD_OUT:]
    shared = {held_out[0].asked}
    return [each for each in learned if each.answered not in shared], held_out
