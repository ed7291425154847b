"""The ways to write prompts (text, tokens, lists of both, texts with sets), made one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from invivo.marked_prompt import MarkedPrompt
from invivo.server.schemas import SetPart
from invivo.server.services import Services


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts as the LM takes them; ``texts`` has None where one was not given as one text."""

    marked: list[MarkedPrompt]
    texts: list[str | None]

    @property
    def sizes(self) -> list[int]:
        return [len(one.ids) for one in self.marked]


def prompts_of(services: Services, given: Any) -> Prompts:
    """Tokenises as the LM itself does: what the tokenizer adds to a text by default is added.

    Args:
        given: a text, tokens, a list of either, or texts and sets.
    """
    several: Sequence[Any]
    if isinstance(given, str) or isinstance(given[0], int):
        several = [given]
    elif any(isinstance(part, SetPart) for part in given):
        several = [parts_of(given)]
    else:
        several = cast(Sequence[Any], given)
    texts = [one if isinstance(one, str) else None for one in several]
    return Prompts([services.local.marked(one) for one in several], texts)


def parts_of(given: Any) -> Any:
    """Texts and sets as the LM writes them; anything else as it is."""
    if not isinstance(given, list):
        return given
    return [{"set": one.set} if isinstance(one, SetPart) else one for one in given]
