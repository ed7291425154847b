"""Pages of long lists, as OpenAI cuts them: ``after`` an id, at most ``limit``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from invivo.errors import InvalidRequest


class Identified(Protocol):
    @property
    def id(self) -> str: ...


T = TypeVar("T", bound=Identified)


def page_after(items: Sequence[T], after: str | None, limit: int) -> tuple[list[T], bool]:
    """Up to ``limit`` of ``items`` that follow the one with id ``after``; whether more follow.

    Raises:
        InvalidRequest: none of the items has that id.
    """
    begin = 0
    if after is not None:
        places = [i for i, item in enumerate(items) if item.id == after]
        if not places:
            raise InvalidRequest(
                "nothing in this list has this id",
                field="after",
                given=after,
                remedy="Give the last id of the page before",
            )
        begin = places[0] + 1
    page = list(items[begin : begin + limit])
    return page, begin + limit < len(items)
