"""The taps of a flat batch in which some spans are runs of programs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch

from invivo.edits.apply import change_together
from invivo.edits.site_names import SiteRef
from invivo.engine.kept_rows import KeptRows
from invivo.engine.run_edits import LOGITS, OPEN_SITES, STATE_SITES, RunEdits
from invivo.models.config import ModelConfig
from invivo.models.decoder import Decoder
from invivo.models.sites import KeyShare, Taps


@dataclass(frozen=True, slots=True)
class EditedSpan:
    """A span of a run.

    Attributes:
        span: its number in the batch.
        row: its first row in the batch.
        window: the tokens that its rows are.
    """

    edits: RunEdits
    span: int
    row: int
    window: range

    def of(self, value: torch.Tensor) -> torch.Tensor:
        """This span's rows of a tensor of the flat batch."""
        return value[self.row : self.row + len(self.window)]


@dataclass(slots=True)
class _Group:
    """The same operation at the same part of a site, in several runs, a row each."""

    do: str
    ref: SiteRef
    spans: list[EditedSpan] = field(default_factory=list)
    by: list[torch.Tensor] = field(default_factory=list)

    def change(self, value: torch.Tensor) -> torch.Tensor:
        return change_together(self.do, self.ref, value, [s.row for s in self.spans], self.by)


@dataclass(frozen=True, slots=True)
class _Look:
    """Rows of a site's tensor that a run keeps as they are, from its ``first``-th position on."""

    edits: RunEdits
    kept: KeptRows
    rows: slice
    first: int


class EditTaps:
    """Lets every span's run act on that span's rows, and on no others.

    What a run's own operations raise stays with the run (:attr:`RunEdits.error`).

    Attention of the spans that have a mask or position numbers of their own, or whose scores or
    probabilities somebody looks at, is laid open span by span; all others keep their kernel. So
    are the recurrences whose states somebody looks at.

    Args:
        inner: taps of training rows in the same batch; they see what the model goes on with.
        elsewhere: sites at which somebody else does what the runs ask for.
    """

    def __init__(
        self,
        config: ModelConfig,
        spans: Sequence[EditedSpan],
        inner: Taps | None = None,
        elsewhere: Collection[tuple[str, int]] = (),
    ) -> None:
        self._inner = inner
        self._at: dict[tuple[str, int], list[EditedSpan]] = {}
        self._open: dict[int, dict[int, EditedSpan]] = {}
        self._states: dict[int, dict[int, EditedSpan]] = {}
        self._n_state_heads = 0 if config.gla is None else config.gla.n_heads
        self._logits: list[EditedSpan] = []
        for span in spans:
            for site, layer in span.edits.keys(span.window):
                if (site, layer) in elsewhere:
                    continue
                if (site, layer) == LOGITS:
                    self._logits.append(span)
                elif site in OPEN_SITES:
                    self._open.setdefault(layer, {})[span.span] = span
                elif site not in STATE_SITES:
                    self._at.setdefault((site, layer), []).append(span)
            if span.edits.only_rows:
                continue
            for layer in span.edits.state_layers(span.window):
                self._states.setdefault(layer, {})[span.span] = span
            hides = span.edits.hides(span.window)
            if not hides and not span.edits.numbered:
                continue
            for layer, kind in enumerate(config.layers):
                if hides or (span.edits.numbered and kind.window is not None):
                    self._open.setdefault(layer, {})[span.span] = span
        self._layers = {*self._open, *self._states}
        self._layers |= {layer + (site == "resid.post") for site, layer in self._at}
        self._together = {
            key: groups for key, there in self._at.items() if (groups := self._groups(key, there))
        }

        self._only_kept = {key: self._looks(key, there) for key, there in self._at.items()}

    def _groups(self, key: tuple[str, int], there: list[EditedSpan]) -> list[_Group]:
        """Changes at a site that are one launch each; their spans are taken out of ``there``."""
        if len(there) == 1:
            return []
        groups: dict[object, _Group] = {}
        for span in there:
            found = span.edits.alone(*key, span.window)
            if found is not None:
                touch, value = found
                group = groups.get((touch.do, touch.ref))
                if group is None:
                    group = groups[touch.do, touch.ref] = _Group(touch.do, touch.ref)
                group.spans.append(span)
                group.by.append(value)
        several = [group for group in groups.values() if len(group.spans) > 1]
        taken = {id(span) for group in several for span in group.spans}
        there[:] = [span for span in there if id(span) not in taken]
        return several

    @staticmethod
    def _looks(key: tuple[str, int], there: list[EditedSpan]) -> list[_Look]:
        """Rows that are only kept; their spans are taken out of ``there``."""
        found: list[_Look] = []
        left: list[EditedSpan] = []
        for span in there:
            looks = span.edits.looks(*key, span.window)
            if looks is None:
                left.append(span)
                continue
            for kept, rows in looks:
                if rows.index:
                    at = slice(span.row + rows.index[0], span.row + rows.index[-1] + 1)
                    found.append(_Look(span.edits, kept, at, rows.first))
        there[:] = left
        return found

    def in_layer(self, layer: int) -> bool:
        """Whether anything happens at what ``layer`` offers."""
        return self._inner is not None or layer in self._layers

    def touched(self) -> set[tuple[str, int]]:
        """Sites where something happens; those of logits left out."""
        return {*self._at, *((OPEN_SITES[0], layer) for layer in (*self._open, *self._states))}

    def wants(self, site: str, layer: int) -> bool:
        if (site, layer) in self._at:
            return True
        return self._inner is not None and self._inner.wants(site, layer)

    def __call__(self, site: str, layer: int, value: torch.Tensor) -> torch.Tensor:
        answer = value
        for group in self._together.get((site, layer), ()):
            answer = group.change(answer)
        if answer is not value and value.is_cpu and torch.equal(answer, value):
            answer = value  # what has not changed is bit for bit the untouched pass
        for span in self._at.get((site, layer), ()):
            part = span.of(value)
            new = span.edits.apply(site, layer, part, span.window, keep=True)
            if new is not part:
                answer = value.clone() if answer is value else answer
                span.of(answer).copy_(new)
        for look in self._only_kept.get((site, layer), ()):
            # A copy of its own: a view of one for all would keep the others' rows alive.
            look.edits.keep(look.kept, value[look.rows].clone(), look.first)
        if self._inner is not None and self._inner.wants(site, layer):
            self._inner(site, layer, answer)
        return answer

    # --- attention laid open, span by span ----------------------------------------------------
    def open_spans(self, layer: int) -> Collection[int]:
        """Numbers of the spans whose attention is laid open."""
        return self._open.get(layer, {}).keys()

    def numbers(self, span: int, layer: int, n_keys: int) -> list[int] | None:
        """Position numbers of a span's first ``n_keys`` tokens; None where they are the indices."""
        edits = self._open[layer][span].edits
        return edits.numbers(n_keys) if edits.numbered else None

    def at_span(self, span: int, site: str, layer: int, value: torch.Tensor) -> torch.Tensor:
        """Scores or probabilities [n, H, K] of one span, and what the model goes on with."""
        opened = self._open[layer][span]
        return opened.edits.apply(site, layer, value, opened.window, keep=True)

    # --- recurrences laid open, row by row ------------------------------------------------------
    def open_states(self, layer: int) -> Collection[int]:
        """Numbers of the spans whose states are looked at."""
        return self._states.get(layer, {}).keys()

    def state_rows(self, span: int, layer: int) -> Sequence[int]:
        """Rows of a span whose memory or state is looked at."""
        opened = self._states[layer][span]
        return opened.edits.state_rows(layer, opened.window)

    def at_state(
        self, span: int, row: int, site: str, layer: int, value: torch.Tensor
    ) -> torch.Tensor:
        """The memory before a row or the state after it [H, K, V], and what goes on."""
        opened = self._states[layer][span]
        token, seen = opened.window[row], value.unsqueeze(0)
        new = opened.edits.apply(site, layer, seen, range(token, token + 1), keep=True)
        return value if new is seen else new[0]

    def key_shares(self, span: int, layer: int) -> Sequence[KeyShare]:
        """Keys that queries of a span see multiplied."""
        opened = self._states[layer][span]
        return opened.edits.key_shares(layer, opened.window, self._n_state_heads)

    # --- logits -------------------------------------------------------------------------------
    def on_logits(self, rows: Sequence[int]) -> Taps | None:
        """Taps for logits of these rows of the batch (any order); None if nothing touches them."""
        parts = []
        for span in self._logits:
            place = {r: i for i, r in enumerate(rows)}
            here = [p for i, p in enumerate(span.window) if span.row + i in place]
            if here:
                index = [place[span.row + p - span.window[0]] for p in here]
                parts.append((span, index, here))
        return _LogitTaps(parts) if parts else None

    def keep_logits(self, decoder: Decoder, hidden: torch.Tensor, most_rows: int) -> None:
        """Compute the logits that runs leave behind, at most ``most_rows`` rows at a time."""
        wanted: list[tuple[EditedSpan, int]] = []
        for span in self._logits:
            positions = {p for at in span.edits.logit_positions for p in at if p in span.window}
            wanted += [(span, p) for p in sorted(positions)]
        for i in range(0, len(wanted), most_rows):
            piece = wanted[i : i + most_rows]
            rows = [span.row + p - span.window[0] for span, p in piece]
            logits = decoder.logits(hidden[torch.tensor(rows, device=hidden.device)])
            first = 0
            while first < len(piece):
                span = piece[first][0]
                here = [p for s, p in piece[first:] if s is span]
                part = logits[first : first + len(here)]
                span.edits.apply(*LOGITS, part, here, keep=True)
                first += len(here)


class _LogitTaps:
    """Taps of logits of chosen rows: (span, rows of the tensor, their tokens)."""

    def __init__(self, parts: list[tuple[EditedSpan, list[int], list[int]]]) -> None:
        self._parts = parts

    def wants(self, site: str, layer: int) -> bool:
        return (site, layer) == LOGITS

    def __call__(self, site: str, layer: int, value: torch.Tensor) -> torch.Tensor:
        answer = value
        for span, index, window in self._parts:
            at = torch.tensor(index, device=value.device)
            part = value[at]
            new = span.edits.apply(site, layer, part, window, keep=False)
            if new is not part:
                answer = value.clone() if answer is value else answer
                answer[at] = new
        return answer
