"""Carries out the edits of a flat batch's rows, and keeps what their captures want."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from invivo.edits.apply import change_piece
from invivo.models.sites import Taps

if TYPE_CHECKING:
    from invivo.engine.carried import Carried


@dataclass(frozen=True, slots=True)
class Piece:
    """Positions [start, start + n) of a sequence with a program, from the batch's ``row`` on."""

    carried: Carried
    start: int
    n: int
    row: int


class EditTaps:
    """The taps of one pass; rows of other sequences stay bit for bit what they are."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._by_site: dict[tuple[str, int], list[Piece]] = {}
        for piece in pieces:
            carried = piece.carried
            kept = {(site, layer) for site, layer, _ in carried.wanted}
            for key in carried.touches.keys() | kept:
                self._by_site.setdefault(key, []).append(piece)

    def wants(self, site: str, layer: int) -> bool:
        return (site, layer) in self._by_site

    def __call__(self, site: str, layer: int, value: torch.Tensor) -> torch.Tensor:
        new = value
        for piece in self._by_site[site, layer]:
            carried = piece.carried
            rows = slice(piece.row, piece.row + piece.n)
            if (site, layer, False) in carried.wanted:
                carried.keep(site, layer, False, piece.start, value[rows])
            own = value[rows]
            changed = own
            for touch in carried.touches.get((site, layer), ()):
                changed = change_piece(touch, changed, piece.start, carried.context)
            # What has not changed is bit for bit the untouched pass; a GPU is not waited for.
            if changed is not own and not (value.is_cpu and torch.equal(changed, own)):
                new = value.clone() if new is value else new
                new[rows] = changed
            if (site, layer, True) in carried.wanted:
                carried.keep(site, layer, True, piece.start, new[rows])
        return new


class TapsOfBoth:
    """Edits of requests first, then what training records of its own rows."""

    def __init__(self, edits: Taps, recording: Taps) -> None:
        self._edits = edits
        self._recording = recording

    def wants(self, site: str, layer: int) -> bool:
        return self._edits.wants(site, layer) or self._recording.wants(site, layer)

    def __call__(self, site: str, layer: int, value: torch.Tensor) -> torch.Tensor:
        for taps in (self._edits, self._recording):
            if taps.wants(site, layer):
                value = taps(site, layer, value)
        return value
