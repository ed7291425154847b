"""Keys followed through the states of a recurrent layer, window by window of one run."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from invivo.edits.apply import multiplied_keys
from invivo.edits.resolved import Touch


@dataclass(slots=True, eq=False)
class FollowedShare:
    """The state that the keys of a run leave, those of one edge operation multiplied.

    Attributes:
        reach: tokens from the first such key to the last query that sees it so.
    """

    touch: Touch
    reach: range
    _window: range = field(default=range(0))
    _before: torch.Tensor | None = None
    _after: torch.Tensor | None = None

    @staticmethod
    def of(touch: Touch) -> FollowedShare | None:
        """None where no query comes behind a key."""
        keys = multiplied_keys(touch)
        if not keys.ranges or not touch.positions.ranges:
            return None
        reach = range(keys.first, touch.positions.ranges[-1][1])
        return FollowedShare(touch, reach) if reach else None

    def meets(self, window: range) -> bool:
        """Whether the tokens of ``window`` lie in its reach."""
        return window.start < self.reach.stop and self.reach.start < window.stop

    def begin(self, window: range) -> torch.Tensor | None:
        """[H, K, V] before ``window``; None: the memory as it is.

        A window that was begun already begins once more: its step was repeated.
        """
        if window.start == self._window.stop:
            self._before = self._after
        elif window.start != self._window.start:
            assert window.start <= self.reach.start, "a window was left out"
            self._before = None
        self._window, self._after = window, None
        return self._before

    def leave(self, state: torch.Tensor) -> None:
        """The state after the window that was begun."""
        self._after = state
