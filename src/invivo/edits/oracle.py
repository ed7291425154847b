"""The eager interpreter: what a program means, written to be read.

Every run of every row is one dense pass over its whole text, generated tokens included as far as
they are known. In float64 this is the oracle that the compiled path is tested against.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from invivo.edits.apply import (
    Context,
    Rows,
    apply_switch,
    change_rows,
    copies_of,
    key_share,
    read_part,
    tapped_at,
)
from invivo.edits.blobs import Blobs
from invivo.edits.expand import expand_key_heads
from invivo.edits.measures import measure_rows
from invivo.edits.number_range import check_numbers
from invivo.edits.parameters import parameter_values
from invivo.edits.reduce import reduce_capture
from invivo.edits.resolved import (
    MeasureRef,
    ResolvedProgram,
    ResolvedRow,
    RunPlan,
    SourceRef,
    Touch,
)
from invivo.edits.results import Captured, Measured, RowOutput
from invivo.errors import InvalidRequest
from invivo.kernels.paging import PagedLayout, blocks_needed, contiguous_layout
from invivo.models.bypass import Bypass
from invivo.models.cache import allocate_kv_cache
from invivo.models.decoder import Decoder
from invivo.models.rope import long_text_offset
from invivo.models.sites import KeyShare

Key = tuple[str, int]
_SCORE, _PROB = "attn.head.score", "attn.head.prob"


@dataclass(slots=True)
class RowResult(RowOutput):
    """What one row brought back; ``logits`` [T, V] of every run that went to its end."""

    logits: dict[str, torch.Tensor] = field(default_factory=dict)


def run_program(
    decoder: Decoder,
    resolved: ResolvedProgram,
    *,
    blobs: Blobs | None = None,
    params: Mapping[str, torch.Tensor] | None = None,
    adapters: Mapping[str, Bypass] | None = None,
) -> list[RowResult]:
    """Carry out ``resolved`` row by row.

    Args:
        decoder: the model, in float64 where exactness is wanted.
        blobs: the named tensors.
        params: values of the trainable parameters; those that are missing have their start value.
            Gradients flow to them if they require them.
        adapters: bypasses by the names that runs give.

    Raises:
        InvalidRequest: a number in it is beyond what the decoder's can be.
    """
    check_numbers(resolved, decoder.embed.dtype)
    context = Context(
        dtype=decoder.embed.dtype,
        device=decoder.embed.device,
        blobs=blobs or Blobs(),
        params=parameter_values(resolved, blobs or Blobs(), decoder.embed, params or {}),
    )
    wide = expand_key_heads(decoder) if any(row.expanded for row in resolved.rows) else decoder
    results = [
        _run_row(wide if row.expanded else decoder, decoder, row, context, adapters or {})
        for row in resolved.rows
    ]
    for result in results:
        for measure in result.row.measures:
            result.measures.append(_measured(measure, result, results))
    return results


def _run_row(
    decoder: Decoder,
    original: Decoder,
    row: ResolvedRow,
    context: Context,
    adapters: Mapping[str, Bypass],
) -> RowResult:
    """All runs of one row, sources before their readers; its captures."""
    result = RowResult(row)
    share = decoder.config.n_kv_heads // original.config.n_kv_heads
    done: dict[str, Interpreter] = {}
    for name, plan in row.runs.items():
        taps = Interpreter(decoder, plan, row, context, done, share)
        done[name] = taps
        logits = _forward(decoder, plan, taps, adapters)
        if logits is not None:
            result.logits[name] = logits
    for capture in row.captures:
        taps = done[capture.run]
        seen = taps.after if capture.after else taps.before
        ref = copies_of(capture.ref, share)[0]
        at = capture.positions.below(len(row.runs[capture.run].prompt.ids))
        part = read_part(seen[ref.site, ref.layer], at, ref)
        value, tokens = reduce_capture(part, capture, original, context)
        result.captures.append(Captured(capture, value, tokens))
    return result


def _measured(measure: MeasureRef, result: RowResult, results: Sequence[RowResult]) -> Measured:
    """A measure of one row, which may look at another."""
    rows = result.logits[measure.run]
    rows = rows[measure.positions.below(rows.shape[0])]
    other = None
    if measure.other is not None:
        there = result if measure.other_row is None else results[measure.other_row]
        other = there.logits[measure.other][list(measure.other_positions)]
    return Measured(measure, measure_rows(measure, rows, other))


def _forward(
    decoder: Decoder, plan: RunPlan, taps: Interpreter, adapters: Mapping[str, Bypass]
) -> torch.Tensor | None:
    """Logits [T, V] of a run; None where it stops before the end."""
    bypass = None
    if plan.adapter is not None:
        bypass = adapters.get(plan.adapter)
        if bypass is None:
            raise InvalidRequest(
                "there is no adapter of this name",
                field=f"runs.{plan.name}.adapter",
                given=plan.adapter,
            )
    ids = list(plan.prompt.ids)
    for at, token in plan.input.tokens:
        ids[at] = token
    device, n = decoder.embed.device, len(ids)
    layout = contiguous_layout([n], device=device)
    offset = long_text_offset(decoder.config, n)
    numbers = [plan.input.number_of(i) + offset for i in range(n)]
    layout.positions = torch.tensor(numbers, device=device)
    cache = allocate_kv_cache(
        decoder.config,
        n_blocks=blocks_needed([n]),
        block_size=layout.block_size,
        device=device,
        dtype=decoder.embed.dtype,
    )
    tokens = torch.tensor(ids, device=device)
    if plan.stop is not None:
        _forward_to(decoder, plan.stop, tokens, layout, cache.layers, bypass, taps)
        return None
    hidden = decoder.forward(tokens, layout, cache, bypass=bypass, taps=taps)
    return decoder.logits(hidden, taps=taps)


def _forward_to(
    decoder: Decoder,
    stop: int,
    tokens: torch.Tensor,
    layout: PagedLayout,
    memory: list[tuple[torch.Tensor, torch.Tensor]],
    bypass: Bypass | None,
    taps: Interpreter,
) -> None:
    """The layers up to ``stop``, whose ``resid.post`` nobody would offer otherwise."""
    residual = decoder.embedded(tokens, layout.positions, bypass)
    if taps.wants("embed.out", -1):
        residual = taps("embed.out", -1, residual)
    pending, residual = decoder.run_layers(
        residual, layout, memory, last=stop + 1, bypass=bypass, taps=taps
    )
    total = residual if pending is None else residual + pending
    if taps.wants("resid.post", stop):
        taps("resid.post", stop, total)


class Interpreter:
    """The taps of one run: carries out its touches, and keeps what others read.

    Attributes:
        before, after: values of the sites that captures and sources read, before the touches of
            that site and after them.
    """

    def __init__(
        self,
        decoder: Decoder,
        plan: RunPlan,
        row: ResolvedRow,
        context: Context,
        done: Mapping[str, Interpreter],
        share: int,
    ) -> None:
        self.config = decoder.config
        self.plan = plan
        self.context = context
        self.done = done
        self.share = share
        self.before: dict[Key, torch.Tensor] = {}
        self.after: dict[Key, torch.Tensor] = {}
        self.touches: dict[Key, list[Touch]] = {}
        for touch in plan.touches:
            for key in tapped_at(touch):
                self.touches.setdefault(key, []).append(touch)
        read = [c.ref for c in row.captures if c.run == plan.name]
        for reader in row.runs.values():
            for touch in reader.touches:
                read += [s.ref for s in touch.sources if s.run == plan.name and s.ref is not None]
        self.kept = {(ref.site, ref.layer) for ref in read}
        self.n_rows = len(plan.prompt.ids)
        windowed = [i for i, layer in enumerate(self.config.layers) if layer.window is not None]
        # Windows count position numbers; the decoder's count indices.
        self.recount = set(windowed) if plan.input.numbers else set()

    def wants(self, site: str, layer: int) -> bool:
        # Attention always lies open here, so that all runs round alike.
        key = (site, layer)
        if site in (_SCORE, _PROB) or key in self.touches or key in self.kept:
            return True
        return layer in self.recount and site.startswith(("attn.head.q", "attn.kvhead.k"))

    def __call__(self, site: str, layer: int, value: torch.Tensor) -> torch.Tensor:
        key = (site, layer)
        self.before[key] = value.clone()  # the decoder may go on in place
        new = value
        if site == _SCORE:
            new = self._masked(layer, new)
        for touch in self.touches.get(key, ()):
            new = self._apply(touch, site, new)
        if not new.requires_grad and torch.equal(new, value):
            new = value  # what has not changed is bit for bit the untouched pass
        self.after[key] = self.before[key] if new is value else new
        return new

    # Recurrent layers: row by row always, so that all runs round alike.

    def open_states(self, layer: int) -> Sequence[int]:
        return (0,)

    def state_rows(self, span: int, layer: int) -> Sequence[int]:
        return range(self.n_rows)

    def at_state(
        self, span: int, row: int, site: str, layer: int, value: torch.Tensor
    ) -> torch.Tensor:
        key = (site, layer)
        seen = new = value.unsqueeze(0)
        for touch in self.touches.get(key, ()):
            at = touch.positions.below(row + 1)
            if at and at[-1] == row:
                new = self._at_row(touch, new, Rows([0], [row], len(at) - 1))
        if torch.equal(new, seen):
            new = seen
        if key in self.kept:
            for kept, one in ((self.before, seen), (self.after, new)):
                kept[key] = torch.cat((kept[key], one)) if key in kept else one
        return value if new is seen else new[0]

    def _at_row(self, touch: Touch, value: torch.Tensor, rows: Rows) -> torch.Tensor:
        sources: list[torch.Tensor] = []
        for source in touch.sources:
            if source.run is None:
                continue
            assert source.ref is not None
            wanted = source.positions if source.pooled else source.positions[rows.piece]
            key = (source.ref.site, source.ref.layer)
            here = source.run == self.plan.name
            known = (self if here else self.done[source.run]).after.get(key)
            if here and key == (touch.ref.site, touch.ref.layer):
                # Of its own rows this one stands where the steps so far have brought it.
                past = value[:0] if known is None else known[: rows.positions[0]]
                known = torch.cat((past, value))
            assert known is not None
            part = read_part(known, wanted, source.ref)
            sources.append(part.mean(0, keepdim=True) if source.pooled else part)
        return change_rows(touch, touch.ref, value, sources, self.context, rows)

    def key_shares(self, span: int, layer: int) -> list[KeyShare]:
        gla = self.config.gla
        assert gla is not None
        return [
            key_share(touch, self.context, range(self.n_rows), gla.n_heads, None, lambda _: None)
            for touch in self.touches.get(("gla.edge", layer), ())
        ]

    def _apply(self, touch: Touch, site: str, value: torch.Tensor) -> torch.Tensor:
        rows = touch.positions.below(value.shape[0])
        router = self.after.get(("moe.router", touch.ref.layer))
        switched = apply_switch(touch, site, value, router, rows, self.context)
        if switched is not None:
            return switched
        n_rows = len(rows)
        for copy, ref in enumerate(copies_of(touch.ref, self.share)):
            sources = [
                self._read(source, copy, n_rows, value)
                for source in touch.sources
                if source.run is not None
            ]
            value = change_rows(touch, ref, value, sources, self.context)
        return value

    def _read(
        self, source: SourceRef, copy: int, n_rows: int, current: torch.Tensor
    ) -> torch.Tensor:
        """The rows of a source: from a run that is done, or from this one up to here."""
        assert source.run is not None
        assert source.ref is not None
        taps = self if source.run == self.plan.name else self.done[source.run]
        value = taps.after.get((source.ref.site, source.ref.layer), current)
        copies = copies_of(source.ref, self.share)
        rows = source.positions if source.pooled else source.positions[:n_rows]
        part = read_part(value, rows, copies[copy % len(copies)])
        return part.mean(0, keepdim=True) if source.pooled else part

    def _masked(self, layer: int, score: torch.Tensor) -> torch.Tensor:
        """Scores [T, H, K] with the run's own mask and windows."""
        if layer in self.recount:
            score = self._recounted(layer)
        for queries, keys in self.plan.input.hidden:
            rows, columns = queries.below(score.shape[0]), keys.below(score.shape[2])
            if rows and columns:
                hidden = torch.zeros(score.shape[0], 1, score.shape[2], dtype=torch.bool)
                hidden[torch.tensor(rows)[:, None], 0, torch.tensor(columns)] = True
                score = score.masked_fill(hidden.to(score.device), -torch.inf)
        return score

    def _recounted(self, layer: int) -> torch.Tensor:
        """The scores of a layer whose window counts position numbers."""
        kind, config = self.config.layers[layer], self.config
        rot = "" if kind.rope is None else ".rot"
        q = self.after[f"attn.head.q{rot}", layer]
        k = self.after[f"attn.kvhead.k{rot}", layer]
        k = k.repeat_interleave(config.n_heads // config.n_kv_heads, dim=1)
        score = torch.einsum("thd,lhd->thl", q, k) * (config.attn_scale or config.head_dim**-0.5)
        if config.attn_softcap is not None:
            score = config.attn_softcap * torch.tanh(score / config.attn_softcap)
        index = torch.arange(q.shape[0], device=q.device)
        number = torch.tensor(
            [self.plan.input.number_of(i) for i in range(q.shape[0])], device=q.device
        )
        assert kind.window is not None
        visible = (index[:, None] >= index) & (number[:, None] - number < kind.window)
        return score.masked_fill(~visible[:, None], -torch.inf)
