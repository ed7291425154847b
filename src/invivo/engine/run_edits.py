"""One run of a program on its way through the engine: what it changes, and what it leaves behind.

The arithmetic is that of ``edits/apply.py``; here stands which of a span's rows it meets.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from invivo.edits.apply import (
    TOGETHER,
    Context,
    Rows,
    apply_switch,
    change_rows,
    key_share,
    own_value,
    tapped_at,
)
from invivo.edits.resolved import RunPlan, SourceRef, Touch
from invivo.edits.site_names import SiteRef
from invivo.engine.followed_share import FollowedShare
from invivo.engine.kept_rows import KeptRows, fit_keys, rows_of
from invivo.models.sites import KeyShare

Key = tuple[str, int]
OPEN_SITES = ("attn.head.score", "attn.head.prob")
STATE_SITES = ("gla.head.memory", "gla.head.state")
STATE_EDGE = "gla.edge"
_FAR = 1 << 40  # longer than any text
LOGITS: Key = ("logits", -1)
_ROUTER = "moe.router"


@dataclass(frozen=True, slots=True, eq=False)
class _Placed:
    """A touch with its positions as a list."""

    touch: Touch
    at: Sequence[int]


@dataclass(frozen=True, slots=True, eq=False)
class Steady:
    """What a run does at a row that is alone in its window, the same from token ``start`` to
    ``stop``.

    Attributes:
        alone: sites where all that happens is one change by a constant, which many runs can share
            a launch for: the change, and by what.
        other: sites where anything else happens.
        opens: whether there are masks, position numbers or shares of keys besides.
    """

    start: int
    stop: int
    alone: Mapping[Key, tuple[Touch, torch.Tensor]]
    other: frozenset[Key]
    opens: bool


class RunEdits:
    """The touches of one run and the rows that are kept of it.

    Args:
        sources: the other runs that it reads, all done.
        kept: what others want of it, and what it reads of itself.
        entry: the residual stream with which it goes on from another run.

    Attributes:
        first_kept: first position of a row that is kept, or whose key is followed through states.
        error: what one of its own operations raised. From there on it changes and keeps nothing:
            the batch goes on, and whoever launched it ends the request.
        only_rows: whether it has neither masks nor position numbers, and looks at no states.
        spoiled: whether that was a change, so that its keys are not those its program asks for.
    """

    def __init__(
        self,
        plan: RunPlan,
        context: Context,
        sources: Mapping[str, RunEdits],
        kept: Iterable[KeptRows],
        entry: KeptRows | None = None,
    ) -> None:
        self.plan = plan
        self.entry = entry
        self._context = context
        self._sources = sources
        self._touches: dict[Key, list[_Placed]] = {}
        self._kept: dict[Key, list[KeptRows]] = {}
        self._read: dict[tuple[SiteRef, tuple[int, ...]], KeptRows] = {}
        self._routers: dict[int, torch.Tensor] = {}
        self._constants: dict[_Placed, torch.Tensor | None] = {}
        self._shares: dict[int, list[FollowedShare]] = {}
        for touch in plan.touches:
            if touch.ref.site == STATE_EDGE:
                share = FollowedShare.of(touch)
                if share is not None:
                    self._shares.setdefault(touch.ref.layer, []).append(share)
                continue
            placed = _Placed(touch, touch.positions.places())
            for key in tapped_at(touch):
                self._touches.setdefault(key, []).append(placed)
        for rows in kept:
            self._kept.setdefault((rows.ref.site, rows.ref.layer), []).append(rows)
            if rows.after and rows.shrink is None:
                self._read[rows.ref, tuple(rows.positions)] = rows
        self._keys = tuple(dict.fromkeys((*self._touches, *self._kept)))
        self._hidden = [(q.indices(), k.indices()) for q, k in plan.input.hidden]
        needed = [rows.positions[0] for held in self._kept.values() for rows in held]
        needed += [share.reach.start for held in self._shares.values() for share in held]
        self.first_kept = min(needed, default=None)
        self.error: Exception | None = None
        self.spoiled = False
        self._steady: Steady | None = None
        opens = bool(self._shares or self._hidden or self.numbered)
        self.only_rows = not opens and all(site not in STATE_SITES for site, _ in self._keys)

    def steady(self, token: int) -> Steady:
        """What happens at a row of ``token`` alone; the same object while it stays the same."""
        if self.spoiled:
            return Steady(token, token + 1, {}, frozenset(), False)
        found = self._steady
        if found is None or not found.start <= token < found.stop:
            found = self._steady = self._steady_from(token)
        return found

    def _steady_from(self, token: int) -> Steady:
        window = range(token, token + 1)
        alone: dict[Key, tuple[Touch, torch.Tensor]] = {}
        other: set[Key] = set()
        for key in self._keys:
            touches = [p for p in self._touches.get(key, ()) if _meets(p.at, window)]
            kept = any(_meets(rows.positions, window) for rows in self._kept.get(key, ()))
            by = self._by(touches[0]) if len(touches) == 1 and not kept else None
            if by is not None and key[0] != _ROUTER:
                alone[key] = touches[0].touch, by
            elif touches or kept:
                other.add(key)
        opens = bool(self._shares or self._hidden or self.numbered)
        return Steady(token, self._next_change(token), alone, frozenset(other), opens)

    def _by(self, placed: _Placed) -> torch.Tensor | None:
        """By what a change acts that many runs can share a launch for; None: it is none."""
        if placed.touch.do not in TOGETHER:
            return None
        if placed not in self._constants:
            try:
                self._constants[placed] = own_value(placed.touch, self._context)
            except Exception:
                self._constants[placed] = None  # applying it raises the same, and keeps it
        return self._constants[placed]

    def _next_change(self, token: int) -> int:
        """The first token after ``token`` at which another set of positions is met."""
        met = [p.at for placed in self._touches.values() for p in placed]
        met += [rows.positions for kept in self._kept.values() for rows in kept]
        return min((_end_of(at, token) for at in met), default=_FAR)

    def keys(self, window: range) -> Iterator[Key]:
        """The decoder's sites where something happens at the tokens of ``window``."""
        if len(window) == 1 and not self.spoiled:
            here = self.steady(window.start)
            yield from (key for key in self._keys if key in here.alone or key in here.other)
            return
        for key in self._keys:
            touches, kept = self._touches.get(key, ()), self._kept.get(key, ())
            if any(_meets(p.at, window) for p in touches) or any(
                _meets(rows.positions, window) for rows in kept
            ):
                yield key

    def state_layers(self, window: range) -> set[int]:
        """Layers in which somebody looks at the states of the tokens of ``window``."""
        layers = {layer for site, layer in self.keys(window) if site in STATE_SITES}
        return layers | {layer for layer in self._shares if self._shares_in(layer, window)}

    def state_rows(self, layer: int, window: range) -> list[int]:
        """Those tokens of ``window``, counted from its first."""
        found: set[int] = set()
        for site in STATE_SITES:
            touches, kept = self._touches.get((site, layer), ()), self._kept.get((site, layer), ())
            for at in (*(p.at for p in touches), *(rows.positions for rows in kept)):
                found.update(rows_of(at, window).index)
        return sorted(found)

    def key_shares(self, layer: int, window: range, n_heads: int) -> list[KeyShare]:
        """Keys that queries of ``window`` see multiplied in the states of ``layer``.

        Windows come in order; one may come again, and after a loss of memory they begin anew.
        """
        found: list[KeyShare] = []
        if self.spoiled:
            return found
        try:
            for share in self._shares_in(layer, window):
                before, leave = share.begin(window), share.leave
                found.append(key_share(share.touch, self._context, window, n_heads, before, leave))
        except Exception as error:
            self.error, self.spoiled = error, True
            return []
        return found

    def _shares_in(self, layer: int, window: range) -> list[FollowedShare]:
        return [s for s in self._shares.get(layer, ()) if s.meets(window)]

    def alone(self, site: str, layer: int, window: range) -> tuple[Touch, torch.Tensor] | None:
        """The one change of a window of one row, and by what, if nothing else is done there and
        others can be done in the same launch; None otherwise."""
        if len(window) != 1:
            return None
        return self.steady(window.start).alone.get((site, layer))

    def looks(self, site: str, layer: int, window: range) -> list[tuple[KeptRows, Rows]] | None:
        """What is kept of whole rows of ``window``, side by side, where nothing else is done there;
        None otherwise."""
        key = (site, layer)
        touched = any(_meets(p.at, window) for p in self._touches.get(key, ()))
        if touched or site == _ROUTER or self.error is not None:
            return None
        found = []
        for kept in self._kept.get(key, ()):
            rows = rows_of(kept.positions, window)
            if kept.ref.heads or kept.ref.components or not isinstance(rows.index, range):
                return None
            found.append((kept, rows))
        return found

    def keep(self, kept: KeptRows, part: torch.Tensor, first: int) -> None:
        """Rows for ``kept``, see :meth:`KeptRows.take`."""
        if self.error is None:
            try:
                kept.take(part, first)
            except Exception as error:
                self.error = error

    def hides(self, window: range) -> bool:
        """Whether a query in ``window`` has a mask of its own."""
        return any(_meets(queries, window) for queries, _ in self._hidden)

    @property
    def numbered(self) -> bool:
        """Whether its tokens have position numbers of their own."""
        return bool(self.plan.input.numbers)

    @property
    def logit_positions(self) -> list[Sequence[int]]:
        """Positions whose logits are kept."""
        return [rows.positions for rows in self._kept.get(("logits", -1), ())]

    def apply(
        self, site: str, layer: int, value: torch.Tensor, window: Sequence[int], *, keep: bool
    ) -> torch.Tensor:
        """``value`` [n, ...] of the tokens of ``window`` after this run's touches.

        Args:
            window: ascending.
            keep: whether rows are kept; False where they only come by once more.

        Returns:
            ``value`` itself where nothing has changed; it is never written to.
        """
        if self.spoiled:
            return value
        try:
            new = self._touched(site, layer, value, window)
        except Exception as error:
            self.error, self.spoiled = error, True
            return value
        if keep and self.error is None:
            try:
                for kept in self._kept.get((site, layer), ()):
                    kept.add(new if kept.after else value, rows_of(kept.positions, window))
            except Exception as error:
                self.error = error
        return new

    def _touched(
        self, site: str, layer: int, value: torch.Tensor, window: Sequence[int]
    ) -> torch.Tensor:
        """``value`` after the touches, itself where nothing has changed."""
        new = value
        if site == "attn.head.score":
            new = self._masked(new, window)
        for placed in self._touches.get((site, layer), ()):
            rows = rows_of(placed.at, window)
            if rows.index:
                new = self._changed(placed.touch, site, new, rows)
        same = new is not value and value.is_cpu and not new.requires_grad
        if same and torch.equal(new, value):
            new = value  # what has not changed is bit for bit the untouched pass
        if site == _ROUTER:
            self._routers[layer] = new
        return new

    def numbers(self, n_keys: int) -> list[int]:
        """Position numbers of the first ``n_keys`` tokens."""
        return [self.plan.input.number_of(i) for i in range(n_keys)]

    def _changed(self, touch: Touch, site: str, value: torch.Tensor, rows: Rows) -> torch.Tensor:
        router = self._routers.get(touch.ref.layer)
        switched = apply_switch(touch, site, value, router, rows.index, self._context)
        if switched is not None:
            return switched
        sources = [self._source(touch, s, value, rows) for s in touch.sources if s.run is not None]
        return change_rows(touch, touch.ref, value, sources, self._context, rows)

    def _source(
        self, touch: Touch, source: SourceRef, value: torch.Tensor, rows: Rows
    ) -> torch.Tensor:
        """One row for each of ``rows``, or one for all."""
        assert source.run is not None
        assert source.ref is not None
        wanted = source.positions if source.pooled else source.positions[rows.piece]
        own = source.run == self.plan.name
        if own and (source.ref.site, source.ref.layer) == (touch.ref.site, touch.ref.layer):
            # check_carried: at the very same positions.
            here = KeptRows(source.ref, rows.positions)
            here.add(value, Rows(rows.index, rows.positions))
            return here.at(wanted)
        run = self if own else self._sources[source.run]
        part = run.rows(source).at(wanted)
        if source.ref.site in OPEN_SITES:
            part = fit_keys(part, value.shape[-1], source.ref.site)
        return part.mean(0, keepdim=True) if source.pooled else part

    def rows(self, source: SourceRef) -> KeptRows:
        """The rows of this run that ``source`` reads."""
        assert source.ref is not None
        return self._read[source.ref, source_positions(source)]

    def _masked(self, score: torch.Tensor, window: Sequence[int]) -> torch.Tensor:
        """Scores [n, H, K] with the pairs hidden that do not see each other."""
        for queries, keys in self._hidden:
            rows = rows_of(queries, window).index
            columns = [k for k in keys if k < score.shape[-1]]
            if rows and columns:
                hidden = torch.zeros(score.shape[0], 1, score.shape[2], dtype=torch.bool)
                hidden[torch.tensor(rows)[:, None], 0, torch.tensor(columns)] = True
                score = score.masked_fill(hidden.to(score.device), -torch.inf)
        return score


def source_positions(source: SourceRef) -> tuple[int, ...]:
    """The rows that are kept for ``source``."""
    return tuple(sorted(set(source.positions)))


def _end_of(ordered: Sequence[int], token: int) -> int:
    """The first token after ``token`` of which something else is true: whether it is one of
    ``ordered`` (ascending)."""
    at = bisect_left(ordered, token)
    if at == len(ordered):
        return _FAR
    if ordered[at] != token:
        return ordered[at]
    if isinstance(ordered, range):
        return ordered.stop
    while at + 1 < len(ordered) and ordered[at + 1] == ordered[at] + 1:
        at += 1
    return ordered[at] + 1


def _meets(ordered: Sequence[int], window: range) -> bool:
    """Whether one of ``ordered`` (ascending) lies in ``window``."""
    at = bisect_left(ordered, window.start)
    return at < len(ordered) and ordered[at] < window.stop
