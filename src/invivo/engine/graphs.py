"""Decode steps as CUDA graphs: one launch a step in place of hundreds.

A graph is captured for each of a few numbers of rows; a step runs in the smallest that holds it.
Everything that changes from step to step lies in static device buffers that are filled before the
replay: tokens, positions, slots, lengths, block tables, adapter slots. Rows beyond the step's write
their keys to block 0, which belongs to nobody.

Steps in which programs act are cut into pieces where they act, each a graph, captured when first
needed (``step_cuts.py``). Changes by constants are part of a piece: it reads them from tables, so
that any program's row may be any row. Only layers in which more happens run kernel by kernel.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from invivo.engine.adapters import AdapterStore
from invivo.engine.edit_tables import Change, EditTables
from invivo.engine.step_cuts import Cuts, Key, Segment, parted
from invivo.kernels.paging import PagedLayout
from invivo.models.cache import KVCache
from invivo.models.decoder import Decoder
from invivo.models.sites import Taps, offer

_MOST_PARTS = 64  # graphs of parts of a step that are kept
_LASTING = 24  # steps cut in the same way before their pieces are captured as few
_MOST_COUNTED = 256  # ways of cutting a step that are counted

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
    tabled: tuple[Key, ...] = ()  # sites at which it applies tables


@dataclass(frozen=True, slots=True)
class _Ready:
    """The last touched step, where that was one piece: all that it needs is to be replayed.

    Attributes:
        tabled: as it was given; its changes are what the tables hold.
    """

    tabled: Mapping[Key, Sequence[Change]]
    size: int
    with_adapters: bool
    generation: int
    piece: Piece


class TablesRefused(Exception):
    """A piece that applies tables cannot be captured."""


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
        self.tables = EditTables(decoder.config, rows, decoder.embed)
        self._captured: dict[_Key, Piece] = {}
        self._ready: _Ready | None = None
        self._lasted: dict[object, int] = {}
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
        taps: Taps | None,
        touched: Collection[Key],
        adapters: torch.Tensor | None = None,
        tabled: Mapping[Key, Sequence[Change]] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Final states [T, d] and logits [T, V] of T decode rows, valid until the next run.

        Pieces of the step are replayed up to the layers that ``taps`` look into; where only the
        residual stream between layers is touched, all layers are. Taps of logits are not asked.

        Args:
            touched: the sites that ``taps`` want.
            tabled: changes by constants at other sites, see :func:`tabled_sites`.

        Raises:
            TablesRefused: a piece with tables could not be captured; nothing has run.
        """
        decoder, b, n_rows = self._decoder, self._buffers, layout.n_rows
        size = self._size_of(layout)
        ready = self._ready
        if ready is not None and taps is None and not touched and tabled is ready.tabled:
            now = size, adapters is not None, self._adapter_generation()
            if now == (ready.size, ready.with_adapters, ready.generation):
                self._fill(size, tokens, layout, adapters)
                hidden, logits = ready.piece()
                return hidden[:n_rows], logits[:n_rows]
        self._ready = None
        tabled = {} if tabled is None else tabled
        cuts, parts = self._parts(size, frozenset(touched), frozenset(tabled), adapters is not None)
        embeds = not (0 in cuts.offered or 0 in cuts.opened)
        if self.tables.make_room(tabled):
            for old in [old for old in self._captured if old.tabled]:
                del self._captured[old]
        pieces = {}
        for part in parts:
            if not part.opened:
                key = self._key_of(part, size, adapters is not None, embeds, cuts)
                try:
                    pieces[part.first] = self._piece(key)  # captured before the buffers are filled
                except Exception as error:
                    if part.tabled:
                        raise TablesRefused from error
                    raise
        for site, changes in tabled.items():
            self.tables[site].fill(changes)
        self._fill(size, tokens, layout, adapters)
        bypass = None
        if adapters is not None:
            assert self._adapters is not None
            bypass = self._adapters.bypass(adapters)
        residual = b.residual[:n_rows]
        if not embeds:
            x = decoder.embedded(tokens, layout.positions, bypass)
            residual.copy_(_offered(taps, "embed.out", -1, x))
        out: tuple[torch.Tensor, ...] = ()
        for part in parts:
            first = part.first
            if part.opened:
                pending, x = decoder.run_layers(
                    residual,
                    layout,
                    self._cache.layers[first : part.last],
                    first=first,
                    last=part.last,
                    bypass=bypass,
                    taps=taps,
                )
                residual.copy_(x if pending is None else x + pending)
                continue
            if first in cuts.offered:
                x = residual if first == 0 else _offered(taps, "resid.post", first - 1, residual)
                x = _offered(taps, "resid.pre", first, x)
                if x is not residual:
                    residual.copy_(x)
            out = pieces[first]()
        if not cuts.final:
            hidden, logits = out
            if taps is None and embeds and len(parts) == 1 and not parts[0].opened:
                generation = self._adapter_generation()
                self._ready = _Ready(tabled, size, adapters is not None, generation, pieces[0])
            return hidden[:n_rows], logits[:n_rows]
        hidden = decoder.finished(None, residual, taps)
        return hidden, decoder.logits(hidden)

    def _parts(
        self, size: int, touched: frozenset[Key], tabled: frozenset[Key], with_adapters: bool
    ) -> tuple[Cuts, tuple[Segment, ...]]:
        """How a step is cut: into few pieces once its like has come often enough."""
        way = (size, with_adapters, touched, tabled)
        count = self._lasted.get(way, 0)
        if tabled and count <= _LASTING:
            self._lasted[way] = count + 1
            if len(self._lasted) > _MOST_COUNTED:
                del self._lasted[next(iter(self._lasted))]
        return parted(touched, tabled, self._decoder.config.n_layers, count > _LASTING)

    def _key_of(
        self, part: Segment, size: int, with_adapters: bool, embeds: bool, cuts: Cuts
    ) -> _Key:
        ends = part.last == self._decoder.config.n_layers and not cuts.final
        first, last = part.first, part.last
        return _Key(size, with_adapters, first, last, embeds and first == 0, ends, part.tabled)

    def _size_of(self, layout: PagedLayout) -> int:
        return self._sizes[bisect_left(self._sizes, layout.n_rows)]

    def _fill(
        self, size: int, tokens: torch.Tensor, layout: PagedLayout, adapters: torch.Tensor | None
    ) -> None:
        n_rows = layout.n_rows
        b = self._buffers
        torch._foreach_copy_(  # one launch for the three
            [b.tokens[:n_rows], b.positions[:n_rows], b.slots[:n_rows]],
            [tokens, layout.positions, layout.slots],
        )
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

    def _whole_of(self, key: _Key) -> _Key:
        """The graph of whole untouched steps like those that ``key`` is a part of."""
        return self._whole(key.size, with_adapters=key.with_adapters)

    def _adapter_generation(self) -> int:
        """Of the adapters' tables, which are others when it changes."""
        return 0 if self._adapters is None else self._adapters.generation

    def _piece(self, key: _Key) -> Piece:
        generation = self._adapter_generation()
        if key.with_adapters and self._generation != generation:
            # The tables have moved: what was captured reads freed memory.
            for old in [old for old in self._captured if old.with_adapters]:
                del self._captured[old]
            self._generation = generation
        piece = self._captured.pop(key, None)
        if piece is None:
            parts = [old for old in self._captured if old != self._whole_of(old)]
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
        taps = self.tables.taps(key.tabled)

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
                x, layout, memory, first=key.first, last=key.last, bypass=bypass, taps=taps
            )
            if key.ends:
                hidden = decoder.finished(pending, x, taps)
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


def _offered(taps: Taps | None, site: str, layer: int, value: torch.Tensor) -> torch.Tensor:
    return value if taps is None else offer(taps, site, layer, value)
