"""The four ways to write prompts (text, tokens, lists of both), made one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from invivo.lm import LM


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts as token ids; ``texts`` has None where a prompt was given as tokens."""

    ids: list[list[int]]
    texts: list[str | None]

    @property
    def sizes(self) -> list[int]:
        return [len(ids) for ids in self.ids]


def prompts_of(lm: LM, given: str | list[str] | list[int] | list[list[int]]) -> Prompts:
    """Tokenises as the LM itself does: what the tokenizer adds to a text by default is added."""
    several: Sequence[str | list[int]]
    if isinstance(given, str) or isinstance(given[0], int):
        several = [given]
    else:
        several = cast(Sequence[str | list[int]], given)
    texts = [one if isinstance(one, str) else None for one in several]
    ids = [lm.tokenize(one, special=True) if isinstance(one, str) else one for one in several]
    return Prompts(ids, texts)
