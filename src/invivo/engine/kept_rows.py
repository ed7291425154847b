"""Rows of one site that a run leaves behind: for other runs, for captures and for measures."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from invivo.edits.apply import Rows, read_part
from invivo.edits.site_names import SiteRef
from invivo.engine.transfer import index_on

Part = tuple[torch.Tensor, ...]
Shrink = Callable[[torch.Tensor], Part]


@dataclass(slots=True, eq=False)
class KeptRows:
    """Gathered piece by piece, in the order of the positions.

    Attributes:
        positions: which rows, ascending.
        after: as the model goes on with them, or as they come to the site's first touch.
        shrink: what is kept of [rows, heads if there are any, numbers] in its place, row by row.
        known: rows that are here; all of them are the first ``known`` of ``positions``.
    """

    ref: SiteRef
    positions: Sequence[int]
    after: bool = True
    shrink: Shrink | None = None
    known: int = 0
    _pieces: list[Part] = field(default_factory=list)

    def add(self, value: torch.Tensor, rows: Rows) -> None:
        """Take rows of ``value`` [T, ...]; rows that run again replace what was there."""
        if rows.index:
            self.take(read_part(value, rows.index, self.ref), rows.first)

    def take(self, part: torch.Tensor, first: int) -> None:
        """Take the rows of the positions from the ``first``-th on, which nobody writes to."""
        assert first <= self.known
        taken = (part,) if self.shrink is None else self.shrink(part)
        if first < self.known:
            kept = self._joined()
            self._pieces = [tuple(t[:first] for t in kept)] if first else []
        self._pieces.append(taken)
        self.known = first + len(part)

    def below(self, length: int) -> Part | None:
        """What is kept of the positions before ``length``; None if that is nothing."""
        n = min(bisect_left(self.positions, length), self.known)
        return tuple(t[:n] for t in self._joined()) if n else None

    def at(self, positions: Sequence[int]) -> torch.Tensor:
        """The rows at ``positions``, in that order; not to be written to."""
        places = [bisect_left(self.positions, p) for p in positions]
        (rows,) = self._joined()
        first, n = places[0], len(places)
        if places == list(range(first, first + n)):
            return rows[first : first + n]
        return rows[index_on(places, rows.device)]

    def out_of_inference(self) -> None:
        """Copies that autograd may keep, of rows that came by in inference mode."""
        if self.known:
            self._pieces = [tuple(t.clone() for t in self._joined())]

    def _joined(self) -> Part:
        if len(self._pieces) > 1:
            columns = zip(*self._pieces, strict=True)
            self._pieces = [tuple(torch.cat(self._fitted(column)) for column in columns)]
        return self._pieces[0]

    def _fitted(self, pieces: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """Attention's pieces are as wide as the keys were many."""
        if self.ref.site not in ("attn.head.score", "attn.head.prob"):
            return list(pieces)
        width = max(piece.shape[-1] for piece in pieces)
        return [fit_keys(piece, width, self.ref.site) for piece in pieces]


def fit_keys(part: torch.Tensor, n_keys: int, site: str) -> torch.Tensor:
    """Scores or probabilities [..., K] for ``n_keys`` keys; those beyond K were not visible."""
    missing = n_keys - part.shape[-1]
    if missing <= 0:
        return part[..., :n_keys]
    hidden = -torch.inf if site == "attn.head.score" else 0.0
    return torch.nn.functional.pad(part, (0, missing), value=hidden)


def rows_of(ordered: Sequence[int], window: Sequence[int]) -> Rows:
    """Where the tokens of ``window`` (ascending) are among ``ordered`` (ascending).

    Row i of the tensor belongs to token ``window[i]``.
    """
    first = bisect_left(ordered, window[0])
    last = bisect_left(ordered, window[-1] + 1)
    found = ordered[first:last]
    if isinstance(window, range):
        if isinstance(found, range):
            return Rows(range(found.start - window.start, found.stop - window.start), found, first)
        return Rows([p - window[0] for p in found], found, first)
    place = {p: i for i, p in enumerate(window)}
    here = [p for p in found if p in place]
    if not here:
        return Rows((), ())
    return Rows([place[p] for p in here], here, bisect_left(ordered, here[0]))
