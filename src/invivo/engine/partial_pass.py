"""The second flat batch of a step: rows that go through some of the layers only.

A sweep's rows enter at the first layer that they change, with the residual stream of the run that
they part from; runs of which nothing is wanted beyond a layer leave there. Between two layers at
which rows enter or leave, those that are there are one flat batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from invivo.engine.batch import FlatBatch
from invivo.engine.edit_taps import EditedSpan, EditTaps
from invivo.engine.run_edits import RunEdits
from invivo.kernels.paging import PagedLayout, part_of
from invivo.models.bypass import Bypass
from invivo.models.cache import KVCache
from invivo.models.decoder import Decoder
from invivo.models.sites import offer

MakeBypass = Callable[[slice | torch.Tensor], Bypass | None]


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows that are there between two layers."""

    spans: list[int]
    layout: PagedLayout
    rows: slice | torch.Tensor
    taps: EditTaps


def run_partial(
    decoder: Decoder,
    batch: FlatBatch,
    cache: KVCache,
    edits: Sequence[RunEdits],
    bypass_of: MakeBypass,
    most_logits: int,
) -> None:
    """Run the batch; what its runs keep is all that comes of it.

    Args:
        edits: of each span.
        bypass_of: the bypass of some rows of the batch.
        most_logits: rows of logits that are computed at a time.
    """
    n_layers = decoder.config.n_layers
    depths = [(s.seq.first_layer, s.seq.last_layer or n_layers) for s in batch.spans]
    residual = _entering(decoder, batch, edits, bypass_of)
    bounds = sorted({layer for depth in depths for layer in depth})

    def there(first: int, last: int) -> _Rows:
        spans = [i for i, (a, b) in enumerate(depths) if a <= first and last <= b]
        return _rows_of(decoder, batch, edits, spans)

    for first, last in itertools.pairwise(bounds):
        here = there(first, last)
        if not here.spans:
            continue
        pending, total = decoder.run_layers(
            residual[here.rows],
            here.layout,
            cache.layers[first:last],
            first=first,
            last=last,
            bypass=bypass_of(here.rows),
            taps=here.taps,
        )
        residual[here.rows] = total if pending is None else total + pending
        leaving = [i for i in here.spans if depths[i][1] == last < n_layers]
        if leaving:
            gone = _rows_of(decoder, batch, edits, leaving)
            offer(gone.taps, "resid.post", last - 1, residual[gone.rows])
    ending = there(n_layers, n_layers)
    if ending.spans:
        hidden = decoder.finished(None, residual[ending.rows], ending.taps)
        ending.taps.keep_logits(decoder, hidden, most_logits)


def _rows_of(
    decoder: Decoder, batch: FlatBatch, edits: Sequence[RunEdits], spans: list[int]
) -> _Rows:
    layout, rows = part_of(batch.layout, spans)
    edited = [
        EditedSpan(
            edits[span],
            i,
            layout.span_start_host[i],
            range(batch.spans[span].start, batch.spans[span].stop),
        )
        for i, span in enumerate(spans)
    ]
    return _Rows(spans, layout, rows, EditTaps(decoder.config, edited))


def _entering(
    decoder: Decoder, batch: FlatBatch, edits: Sequence[RunEdits], bypass_of: MakeBypass
) -> torch.Tensor:
    """[T, d]: the residual stream with which each row enters."""
    starts = batch.layout.span_start_host
    width = decoder.config.d_model
    residual = decoder.embed.new_empty(batch.layout.n_rows, width)
    first = [i for i, span in enumerate(batch.spans) if span.seq.first_layer == 0]
    if first:
        here = _rows_of(decoder, batch, edits, first)
        embedded = decoder.embedded(
            batch.tokens[here.rows], here.layout.positions, bypass_of(here.rows)
        )
        residual[here.rows] = offer(here.taps, "embed.out", -1, embedded)
    for i, span in enumerate(batch.spans):
        if span.seq.first_layer > 0:
            entry = edits[i].entry
            assert entry is not None
            residual[starts[i] : starts[i + 1]] = entry.at(range(span.start, span.stop))
    return residual
