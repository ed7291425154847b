"""From drawn tokens to settled text: whole characters only, stop strings withheld."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

CONTEXT = 6  # prompt tokens shown to the decoder, so that the first new one keeps its blank


class TextStream:
    """Turns the tokens of one sequence into text, piece by piece.

    Characters of several tokens appear when complete; a half character at the end of the text
    is never shown.
    """

    __slots__ = ("_stream", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(ids=list(prompt[-CONTEXT:]), skip_special_tokens=True)

    def push(self, token: int) -> str:
        """The text that ``token`` settles, often one word, sometimes none."""
        try:
            piece: str | None = self._stream.step(self._tokenizer, token)
        except Exception as error:  # the library raises a bare Exception
            # Bytes that are no text can make the decoder lose its place: start afresh there.
            if "prefix" not in str(error).lower():
                raise
            self._stream = DecodeStream(skip_special_tokens=True)
            piece = self._stream.step(self._tokenizer, token)
        return piece or ""


@dataclass(slots=True)
class StopText:
    """Finds stop strings in text that arrives in pieces, across their borders.

    Text that might still turn out to be the beginning of a stop string is held back.
    """

    stops: tuple[str, ...]
    held: str = ""

    def push(self, piece: str, *, armed: bool = True) -> tuple[str, str | None]:
        """Add text; return (text now settled, stop string found or None).

        The stop string that is complete first counts, of several the longest. After a match
        the settled text ends where the match begins, and nothing is held. Unless ``armed``, what
        is complete does not count, but what has begun may be completed later.
        """
        if not self.stops:
            return piece, None
        text = self.held + piece
        found = [(at + len(s), at, s) for s in self.stops if (at := text.find(s)) >= 0]
        if found and armed:
            _, at, stop = min(found)
            self.held = ""
            return text[:at], stop
        keep = self._possible_start(text)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def flush(self) -> str:
        """What is held back, when the text ends otherwise."""
        text, self.held = self.held, ""
        return text

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins a stop string."""
        longest = max(len(s) for s in self.stops) - 1
        for n in range(min(longest, len(text)), 0, -1):
            if any(s.startswith(text[-n:]) for s in self.stops):
                return n
        return 0


def backend(tokenizer: Any) -> Tokenizer:
    """The ``tokenizers`` object inside a transformers fast tokenizer."""
    inner = getattr(tokenizer, "backend_tokenizer", tokenizer)
    assert isinstance(inner, Tokenizer)
    return inner
