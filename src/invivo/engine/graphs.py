"""Decode steps as CUDA graphs: one launch a step in place of hundreds.

A graph is captured for each of a few numbers of rows; a step runs in the smallest that holds it.
Everything that changes from step to step lies in static device buffers that are filled before the
replay: tokens, positions, slots, lengths, block tables, adapter slots. Rows beyond the step's write
their keys to block 0, which belongs to nobody.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from invivo.engine.adapters import AdapterStore
from invivo.kernels.paging import PagedLayout
from invivo.models.cache import KVCache
from invivo.models.decoder import Decoder

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


@dataclass(slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor


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
        self._sizes = [n for n in SIZES if n < max_rows] + [min(max_rows, SIZES[-1])]
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
        )
        self._captured: dict[tuple[int, bool], _Captured] = {}
        self._generation = -1
        self._pool = torch.cuda.graph_pool_handle()

    def fits(self, layout: PagedLayout) -> bool:
        """Whether a batch is all decodes and not too many of them."""
        return layout.n_decode == layout.n_rows and 0 < layout.n_rows <= self._sizes[-1]

    def capture(self) -> None:
        """Capture the graphs of every size for batches without adapters, the largest first."""
        for size in reversed(self._sizes):
            self._graph(size, with_adapters=False)

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
        n_rows = layout.n_rows
        size = next(size for size in self._sizes if size >= n_rows)
        captured = self._graph(size, with_adapters=adapters is not None)
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
        captured.graph.replay()
        return captured.logits[:n_rows]

    def _graph(self, size: int, *, with_adapters: bool) -> _Captured:
        generation = self._adapters.generation if self._adapters is not None else 0
        if with_adapters and self._generation != generation:
            # The tables have moved: what was captured reads freed memory.
            for key in [key for key in self._captured if key[1]]:
                del self._captured[key]
            self._generation = generation
        captured = self._captured.get((size, with_adapters))
        if captured is None:
            captured = self._capture(size, with_adapters)
            self._captured[size, with_adapters] = captured
        return captured

    @torch.inference_mode()
    def _capture(self, size: int, with_adapters: bool) -> _Captured:
        b = self._buffers
        b.slots.zero_()
        b.state_slots.zero_()
        b.kv_len.fill_(1)
        b.block_table.zero_()
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

        def step() -> torch.Tensor:
            bypass = None
            if with_adapters:
                assert self._adapters is not None
                bypass = self._adapters.bypass(b.adapters[:size])
            hidden = self._decoder(b.tokens[:size], layout, self._cache, bypass=bypass)
            logits: torch.Tensor = self._decoder.logits(hidden)
            return logits

        # Once outside: kernels are compiled and libraries set up, which a capture forbids.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = step()
        return _Captured(graph, logits)
