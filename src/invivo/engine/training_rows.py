"""The bypass of a flat batch in which some rows are being learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from invivo.engine.bypasses import TrainBypass
from invivo.models.bypass import Bypass


@dataclass(slots=True)
class Rows:
    """Rows [start, stop) of the batch use ``bypass``, which knows which are virtual tokens."""

    start: int
    stop: int
    bypass: TrainBypass


class TrainingRows:
    """The tables' bypass for all rows, and on top the trained parameters for training rows.

    Training rows have slot 0 in the tables, so that the tables add nothing to them.

    Args:
        inner: None where no other row has a bypass.
    """

    def __init__(self, inner: Bypass | None, parts: Sequence[Rows]) -> None:
        self._inner = inner
        self._parts = parts
        own = frozenset[str]().union(*(part.bypass.at for part in parts))
        self.at = own if inner is None else own | inner.at

    def __call__(self, layer: int, linear: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if self._inner is not None:
            y = self._inner(layer, linear, x, y)
        for part in self._parts:
            if not part.bypass.beside(layer, linear):
                continue
            if part.stop - part.start == y.shape[0]:
                y = part.bypass(layer, linear, x, y)
                continue
            mine = slice(part.start, part.stop)
            before = y[mine]
            after = part.bypass(layer, linear, x[mine], before)
            if after is not before:
                y[mine] = after
        return y

    def rows(self, name: str, layer: int, value: torch.Tensor) -> torch.Tensor:
        changed = value
        if self._inner is not None and name in self._inner.at:
            changed = self._inner.rows(name, layer, value)
        for part in self._parts:
            if name not in part.bypass.at:
                continue
            mine = slice(part.start, part.stop)
            before = changed[mine]
            after = part.bypass.rows(name, layer, before)
            if after is not before:
                if changed is value:
                    changed = value.clone()
                changed[mine] = after
        return changed
