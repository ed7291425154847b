"""Decode steps as CUDA graphs: one launch a step in place of hundreds.

A graph is captured for each of a few numbers of rows; a step runs in the smallest that holds it.
Everything that changes from step to step lies in static device buffers that are filled before the
replay: tokens, positions, slots, lengths, block tables, adapter slots. Rows beyond the step's write
their keys to block 0, which belongs to nobody.

Steps in which programs act are cut into pieces where they act, each a graph, captured when first
needed; only layers that are touched inside run kernel by kernel.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch

from invivo.engine.adapters import AdapterStore
from invivo.kernels.paging import PagedLayout
from invivo.models.cache import KVCache
from invivo.models.decoder import Decoder
from invivo.models.sites import Taps, offer

_MOST_PARTS = 64  # graphs of parts of a step that are kept

SIZES = (1, 2, 4, 8, *range(16, 257, 8))


@dataclass(slots=True)
class _Buffers:
    """What the graphs read, sized for the largest of them."""

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    span_start: torch.Tensor
    kv_len: torch.Tensor
    block_table: torch.Tensor
    adapters: torch.Tensor
    state_slots: torch.Tensor
    residual: torch.Tensor


Piece = Callable[[], tuple[torch.Tensor, ...]]


class _Key(NamedTuple):
    """What is captured: layers [first, last) over ``size`` rows, with adapters or without."""

    size: int
    with_adapters: bool
    first: int
    last: int
    embeds: bool  # begins with the embedding; otherwise with what ``residual`` holds
    ends: bool  # gives final states and logits; otherwise ``residual`` holds what comes of it


@dataclass(frozen=True, slots=True)
class _Cuts:
    """How a step with taps is cut: pieces that are replayed, and layers that are not.

    Attributes:
        bounds: layers before which a piece or a layer begins, 0 first, the number of layers last.
        opened: layers that run kernel by kernel, because something inside them is touched.
        offered: bounds at which the residual stream is touched.
    """

    bounds: list[int]
    opened: frozenset[int]
    offered: frozenset[int]
    final: bool  # whether something behind the last layer is touched


def cuts_of(touched: Collection[tuple[str, int]], n_layers: int) -> _Cuts:
    """Where a step is cut whose taps want the sites ``touched``."""
    opened, offered, final = set(), set(), False
    for site, layer in touched:
        if site == "embed.out":
            offered.add(0)
        elif layer < 0:
            final = True
        elif site in ("resid.pre", "resid.post"):
            offered.add(layer + (site == "resid.post"))
        else:
            opened.add(layer)
    final = final or n_layers in offered or n_layers - 1 in opened
    bounds = {0, n_layers} | offered | opened | {layer + 1 for layer in opened}
    return _Cuts(sorted(bounds), frozenset(opened), frozenset(offered), final)


class DecodeGraphs:
    """Runs decode-only batches: forward pass and logits.

    Graphs are captured when first needed, or all at once by :meth:`capture`. Batches with adapters
    have graphs of their own, so that batches without pay nothing for them.

    Args:
        decoder, cache: on one CUDA device; their tensors must stay where they are.
        adapters: whose tables the adapter slots of a batch refer to.
        max_rows: rows of the largest graph, at most the last of :data:`SIZES`.
        max_blocks: blocks of the longest sequence.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        adapters: AdapterStore | None,
        *,
        max_rows: int,
        max_blocks: int,
    ) -> None:
        self._decoder = decoder
        self._cache = cache
        self._adapters = adapters
        self._sizes: list[int] = [n for n in SIZES if n < max_rows] + [min(max_rows, SIZES[-1])]
        rows = self._sizes[-1]
        width = -(-max_blocks // 4) * 4  # rows of the table start at multiples of 16 bytes

        def long(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=cache.k.device)

        def short(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=cache.k.device)

        self._buffers = _Buffers(
            tokens=long(rows),
            positions=long(rows),
            slots=long(rows),
            span_start=torch.arange(rows + 1, dtype=torch.int32, device=cache.k.device),
            kv_len=short(rows),
            block_table=short(rows, width),
            adapters=short(rows),
            state_slots=long(rows),
            residual=decoder.embed.new_zeros(rows, decoder.config.d_model),
        )
        self._captured: dict[_Key, Piece] = {}
        self._generation = -1
        self._pool = torch.cuda.graph_pool_handle() if cache.k.is_cuda else None

    def fits(self, layout: PagedLayout) -> bool:
        """Whether a batch is all decodes and not too many of them."""
        return layout.n_decode == layout.n_rows and 0 < layout.n_rows <= self._sizes[-1]

    def capture(self) -> None:
        """Capture the graphs of every size for batches without adapters, the largest first."""
        for size in reversed(self._sizes):
            self._piece(self._whole(size, with_adapters=False))

    @torch.inference_mode()
    def run(
        self, tokens: torch.Tensor, layout: PagedLayout, adapters: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits [T, V] of T decode rows; they stay valid until the next run.

        Args:
            tokens: [T] int64.
            layout: a batch that :meth:`fits`.
            adapters: [T] int32 adapter slots; None where no row has one.
        """
        size = self._size_of(layout)
        piece = self._piece(self._whole(size, with_adapters=adapters is not None))
        self._fill(size, tokens, layout, adapters)
        _, logits = piece()
        return logits[: layout.n_rows]

    @torch.inference_mode()
    def run_touched(
        self,
        tokens: torch.Tensor,
        layout: PagedLayout,
        taps: Taps,
        touched: Collection[tuple[str, int]],
        adapters: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Final states [T, d] and logits [T, V] of T decode rows, valid until the next run.

        Pieces of the step are replayed up to the layers that ``taps`` look into; where only the
        residual stream between layers is touched, all layers are. Taps of logits are not asked.

        Args:
            touched: the sites that ``taps`` want.
        """
        decoder, b, n_rows = self._decoder, self._buffers, layout.n_rows
        n_layers = decoder.config.n_layers
        size = self._size_of(layout)
        cuts = cuts_of(touched, n_layers)
        embeds = not (0 in cuts.offered or 0 in cuts.opened)
        pieces = {}
        for first, last in itertools.pairwise(cuts.bounds):
            if first not in cuts.opened:
                ends = last == n_layers and not cuts.final
                key = _Key(size, adapters is not None, first, last, embeds and first == 0, ends)
                pieces[first] = self._piece(key)  # captured before the buffers are filled
        self._fill(size, tokens, layout, adapters)
        bypass = None
        if adapters is not None:
            assert self._adapters is not None
            bypass = self._adapters.bypass(adapters)
        residual = b.residual[:n_rows]
        if not embeds:
            x = decoder.embedded(tokens, layout.positions, bypass)
            residual.copy_(offer(taps, "embed.out", -1, x))
        out: tuple[torch.Tensor, ...] = ()
        for first, last in itertools.pairwise(cuts.bounds):
            if first in cuts.opened:
                pending, x = decoder.run_layers(
                    residual,
                    layout,
                    self._cache.layers[first:last],
                    first=first,
                    last=last,
                    bypass=bypass,
                    taps=taps,
                )
                residual.copy_(x if pending is None else x + pending)
                continue
            if first in cuts.offered:
                x = residual if first == 0 else offer(taps, "resid.post", first - 1, residual)
                residual.copy_(offer(taps, "resid.pre", first, x))
            out = pieces[first]()
        if not cuts.final:
            hidden, logits = out
            return hidden[:n_rows], logits[:n_rows]
        hidden = decoder.finished(None, residual, taps)
        return hidden, decoder.logits(hidden)

    def _size_of(self, layout: PagedLayout) -> int:
        return self._sizes[bisect_left(self._sizes, layout.n_rows)]

    def _fill(
        self, size: int, tokens: torch.Tensor, layout: PagedLayout, adapters: torch.Tensor | None
    ) -> None:
        n_rows = layout.n_rows
        b = self._buffers
        b.tokens[:n_rows] = tokens
        b.positions[:n_rows] = layout.positions
        b.slots[:n_rows] = layout.slots
        b.kv_len[:n_rows] = layout.kv_len
        b.block_table[:n_rows, : layout.block_table.shape[1]] = layout.block_table
        if adapters is not None:
            b.adapters[:n_rows] = adapters
        if layout.state_slots is not None:
            b.state_slots[:n_rows] = layout.state_slots
        if n_rows < size:
            b.state_slots[n_rows:size] = 0
            # The other buffers may keep what a larger step left: it is only read.
            b.slots[n_rows:size] = 0
            b.kv_len[n_rows:size] = 1

    def _whole(self, size: int, *, with_adapters: bool) -> _Key:
        return _Key(size, with_adapters, 0, self._decoder.config.n_layers, True, True)

    def _piece(self, key: _Key) -> Piece:
        generation = self._adapters.generation if self._adapters is not None else 0
        if key.with_adapters and self._generation != generation:
            # The tables have moved: what was captured reads freed memory.
            for old in [old for old in self._captured if old.with_adapters]:
                del self._captured[old]
            self._generation = generation
        piece = self._captured.pop(key, None)
        if piece is None:
            parts = [old for old in self._captured if not (old.embeds and old.ends)]
            if len(parts) >= _MOST_PARTS:
                del self._captured[parts[0]]
            piece = self._capture(key)
        self._captured[key] = piece  # the newest last
        return piece

    @torch.inference_mode()
    def _capture(self, key: _Key) -> Piece:
        b, size = self._buffers, key.size
        b.slots.zero_()
        b.state_slots.zero_()
        b.kv_len.fill_(1)
        b.block_table.zero_()
        decoder, residual = self._decoder, b.residual[:size]

        def step() -> tuple[torch.Tensor, ...]:
            layout = PagedLayout(
                positions=b.positions[:size],
                slots=b.slots[:size],
                span_start=b.span_start[: size + 1],
                kv_len=b.kv_len[:size],
                block_table=b.block_table[:size],
                block_size=self._cache.block_size,
                n_decode=size,
                max_query=1,
                max_kv=b.block_table.shape[1] * self._cache.block_size,
                span_start_host=[],
                kv_len_host=[],
                state_slots=b.state_slots[:size],
            )
            bypass = None
            if key.with_adapters:
                assert self._adapters is not None
                bypass = self._adapters.bypass(b.adapters[:size])
            x = residual
            if key.embeds:
                x = decoder.embedded(b.tokens[:size], layout.positions, bypass)
            memory = self._cache.layers[key.first : key.last]
            pending, x = decoder.run_layers(
                x, layout, memory, first=key.first, last=key.last, bypass=bypass
            )
            if key.ends:
                hidden = decoder.finished(pending, x)
                return hidden, decoder.logits(hidden)
            residual.copy_(x if pending is None else x + pending)
            return ()

        return self._recorded(step)

    def _recorded(self, step: Piece) -> Piece:
        """``step`` as a graph; its results lie where they lay when it was captured."""
        # Once outside: kernels are compiled and libraries set up, which a capture forbids.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            results = step()

        def replay() -> tuple[torch.Tensor, ...]:
            graph.replay()
            return results

        return replay
