"""What ends an optimizer step, as work that is planned: the update, a version, a snapshot.

It happens between the flat batches, on the clock of everyone who waits for a token, so it needs
slack like any piece of training. How long each part takes is measured every time. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Part = Literal["optimizer", "publish", "snapshot"]

_DECAY = 0.9  # of the estimate a time, where the measured is less
_HICCUP = 4.0  # a measurement counts at most that many times the estimate


@dataclass(frozen=True, slots=True)
class Closing:
    """An optimizer step whose texts are through.

    Attributes:
        job: its name.
        parts: what is to be done.
        since: when its last text was through, on the clock of ``Request.arrival``.
    """

    job: str
    parts: tuple[Part, ...]
    since: float


@dataclass(slots=True)
class ClosingTimes:
    """Seconds of each part, by job: nearly the largest of the latest."""

    _estimates: dict[tuple[str, Part], float] = field(default_factory=dict)

    def seconds(self, closing: Closing) -> float:
        """Predicted; 0 for parts that were never measured, which the first time measures."""
        return sum(self._estimates.get((closing.job, part), 0.0) for part in closing.parts)

    def record(self, job: str, part: Part, seconds: float) -> None:
        """Learn from a part that took ``seconds``."""
        known = self._estimates.get((job, part))
        if known is not None:
            seconds = min(seconds, _HICCUP * max(known, 1e-3))
            seconds = max(seconds, _DECAY * known + (1 - _DECAY) * seconds)
        self._estimates[job, part] = seconds

    def forget(self, job: str) -> None:
        """The job has ended."""
        for key in [key for key in self._estimates if key[0] == job]:
            del self._estimates[key]
