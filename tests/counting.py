"""How much Python a piece of work runs: a measure that no busy machine changes."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any


class Calls:
    """Counts calls of functions, Python's and built-in ones, while it is entered."""

    def __init__(self) -> None:
        self.n = 0

    def _count(self, frame: FrameType, event: str, argument: Any) -> None:
        if event in ("call", "c_call"):
            self.n += 1

    def __enter__(self) -> Calls:
        sys.setprofile(self._count)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)
