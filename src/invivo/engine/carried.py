"""The program that a sequence carries through the engine: what it changes, keeps and brings back.

So far a request carries edits of its own run: operations on rows (affine, from named tensors,
low-rank, skipped blocks), captures and measures, at prompt and generated tokens. The rest goes
through the interpreter; :func:`check_carried` says what.
"""

from __future__ import annotations

import hashlib

import torch

from invivo.edits.apply import Context, read_part
from invivo.edits.blobs import content_hash
from invivo.edits.oracle import measure_rows, parameters_of, tapped_at
from invivo.edits.program import MAIN
from invivo.edits.reduce import reduce_capture
from invivo.edits.resolved import RunInput, Touch
from invivo.edits.results import Captured, Measured, ProgramOutput, RowOutput
from invivo.engine.edit_taps import EditTaps, Piece
from invivo.engine.types import Intervention, Request
from invivo.errors import InvalidRequest, TooLarge
from invivo.models.decoder import Decoder

Key = tuple[str, int]
_STATES = ("final.norm.out", -1, True)  # of which logits are made
_LOGITS = ("logits", -1)
# Laying these open for change would round the other rows of a batch differently.
_SHARED = ("attn.head.out", "scale", "moe.expert.weight", "moe.expert.out", "moe.expert.on")


def check_carried(request: Request, *, n_virtual: int, max_bytes: int, d_model: int) -> None:
    """Refuse what the engine does not carry yet.

    Raises:
        InvalidRequest: n > 1, several runs or rows, attention laid open, ...; the remedy is run.
        TooLarge: what is kept for the captures takes more than ``max_bytes``.
    """
    assert request.intervention is not None
    resolved = request.intervention.resolved
    row = resolved.rows[0]
    plan = row.runs[MAIN]
    refs = [t.ref for t in plan.touches] + [c.ref for c in row.captures]
    reason = None
    if request.n != 1:
        reason = "only one continuation (n) with a program"
    elif n_virtual:
        reason = "no adapter with virtual tokens together with a program"
    elif len(resolved.rows) != 1 or set(row.runs) != {MAIN}:
        reason = "no sweeps and no other runs"
    elif plan.stop is not None or plan.input != RunInput() or plan.adapter is not None:
        reason = "no stop and no input of the program's own"
    elif row.expanded:
        reason = "no keys or values of single heads"
    elif any(ref.site in ("attn.head.score", "attn.head.prob") for ref in refs):
        reason = "no attention scores and probabilities"
    elif any(t.kernel == "edge" or t.ref.site.endswith(_SHARED) for t in plan.touches):
        reason = "no change of attention edges, head outputs, norm scales and experts"
    elif any(ref.site.startswith("gla.") for ref in refs):
        reason = "no sites of recurrent layers"
    elif any(s.run is not None for t in plan.touches for s in t.sources):
        reason = "no values of runs"
    elif plan.prompt.ids[: plan.prompt.n_prompt] != request.tokens:
        reason = "no prompt but the request's"
    if reason is not None:
        raise InvalidRequest(
            f"beside traffic the engine carries {reason} yet",
            field="interventions",
            remedy="Use run, which goes through the interpreter",
        )
    kept = sum(4 * len(c.positions) * _width(c.shape, c.reduce, d_model) for c in row.captures)
    if kept + resolved.n_bytes > max_bytes:
        raise TooLarge(
            f"captures keep at most {max_bytes} bytes",
            field="interventions",
            given=kept,
            remedy="Capture fewer sites or positions",
        )


def _width(shape: tuple[int, ...], reduce: str, d_model: int) -> int:
    """Numbers that a capture keeps for a position until it is reduced, at least."""
    n = 1
    for size in shape if reduce == "mean" else shape[1:]:
        n *= size
    return max(n, d_model)


class Carried:
    """One program on its way with one sequence. Positions are the sequence's own indices.

    What is kept is kept by position, so that rows which run again after a preemption replace
    themselves.

    Attributes:
        touches: by the decoder's site at which they act.
        key: names everything that changes what the sequence caches; None where nothing does.
        first_wanted: the first position of which something is kept; None: nothing is.
    """

    def __init__(self, intervention: Intervention, decoder: Decoder) -> None:
        resolved, like = intervention.resolved, decoder.embed
        self._decoder = decoder
        self._row = resolved.rows[0]
        self.context = Context(
            dtype=like.dtype,
            device=like.device,
            blobs=intervention.blobs,
            params=parameters_of(resolved, intervention.blobs, like, intervention.params),
        )
        plan = self._row.runs[MAIN]
        self.touches: dict[Key, list[Touch]] = {}
        for touch in plan.touches:
            for at in tapped_at(touch):
                self.touches.setdefault(at, []).append(touch)
        self.wanted: dict[tuple[str, int, bool], set[int]] = {}
        length = plan.prompt.length
        for capture in self._row.captures:
            place = (capture.ref.site, capture.ref.layer, capture.after)
            place = _STATES if place[:2] == _LOGITS else place
            self.wanted.setdefault(place, set()).update(capture.positions.below(length))
        for measure in self._row.measures:
            self.wanted.setdefault(_STATES, set()).update(measure.positions.below(length))
        self._kept: dict[tuple[str, int, bool], dict[int, torch.Tensor]] = {
            place: {} for place in self.wanted
        }
        self.first_wanted = min((min(at) for at in self.wanted.values() if at), default=None)
        self.key = _key(intervention, plan.touches) if plan.touches else None

    def keep(self, site: str, layer: int, after: bool, start: int, rows: torch.Tensor) -> None:
        """Copy what is wanted of ``rows``, the values of positions ``start``, ``start + 1``, ..."""
        wanted = self.wanted[site, layer, after]
        at = [i for i in range(rows.shape[0]) if start + i in wanted]
        if at:
            copied = rows[at]
            kept = self._kept[site, layer, after]
            kept |= {start + i: copied[n] for n, i in enumerate(at)}

    def output(self, n_run: int) -> ProgramOutput:
        """Captures and measures of the first ``n_run`` tokens, those that went through the model;
        waits for the device."""
        result = RowOutput(self._row)
        for capture in self._row.captures:
            at = capture.positions.below(n_run)
            ref = capture.ref
            if (ref.site, ref.layer) == _LOGITS:
                value = self._logits(at, edited=capture.after)
            else:
                value = self._rows((ref.site, ref.layer, capture.after), at)
            part = read_part(value, range(len(at)), ref)
            reduced, tokens = reduce_capture(part, capture, self._decoder, self.context)
            result.captures.append(
                Captured(capture, _to_host(reduced), None if tokens is None else tokens.cpu())
            )
        for measure in self._row.measures:
            logits = self._logits(measure.positions.below(n_run), edited=True)
            result.measures.append(Measured(measure, _to_host(measure_rows(measure, logits))))
        return ProgramOutput([result])

    def _rows(self, place: tuple[str, int, bool], at: list[int]) -> torch.Tensor:
        kept = self._kept[place]
        return torch.stack([kept[i] for i in at])

    def _logits(self, at: list[int], *, edited: bool) -> torch.Tensor:
        pieces = [Piece(self, i, 1, n) for n, i in enumerate(at)]
        return self._decoder.logits(
            self._rows(_STATES, at), taps=EditTaps(pieces) if edited else None
        )


def _key(intervention: Intervention, touches: tuple[Touch, ...]) -> str:
    """Equal only for the same changes at the same positions with the same tensors."""
    names = {name: content_hash(tensor) for name, tensor in intervention.params.items()}
    known = (
        intervention.resolved.hash,
        touches,
        intervention.blobs.digest(),
        sorted(names.items()),
    )
    return hashlib.sha256(repr(known).encode()).hexdigest()


def _to_host(value: torch.Tensor) -> torch.Tensor:
    return value.to("cpu", torch.float64 if value.dtype == torch.float64 else torch.float32)
