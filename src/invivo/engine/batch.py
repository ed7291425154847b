"""From a plan to the index tensors of its flat batch.

Everything is written with numpy into one of two staging buffers (pinned where the device is a GPU)
and goes to the device in two copies, one an integer width. Block tables live in one persistent
array by row and change only where a sequence starts or gets a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from invivo.engine.scheduler import Limits
from invivo.engine.types import Plan, Span, VirtualRows
from invivo.kernels.paging import PagedLayout


@dataclass(slots=True)
class FlatBatch:
    """T token rows in S spans, R of them sampled; tensors on the engine's device.

    Attributes:
        spans: of the plan, in the order of the rows.
        tokens: [T] int64 token ids; 0 where the value is still on the device (see pending).
        layout: where the rows live in paged memory.
        span_rows: [S] int64, ``seq.row`` of each span.
        pending_index, pending_rows: [P] int64: ``tokens[pending_index]`` must be taken from
            ``last_token[pending_rows]`` on the device, the host does not know them yet.
        sample_index: [R] int64, rows of the flat batch whose logits are sampled.
        sample_rows: [R] int64, their ``seq.row``.
        sample_spans: their indices in ``spans``.
        adapters: [T] int32 adapter slot of each token row, 0 = base model.
        adapter_slots: the different non-zero slots in this batch.
        virtual: rows whose token an adapter supplies.
    """

    plan: Plan
    spans: list[Span]
    tokens: torch.Tensor
    layout: PagedLayout
    span_rows: torch.Tensor
    pending_index: torch.Tensor
    pending_rows: torch.Tensor
    sample_index: torch.Tensor
    sample_rows: torch.Tensor
    sample_spans: list[int]
    adapters: torch.Tensor
    adapter_slots: list[int]
    virtual: list[VirtualRows]


class _Staging:
    """Host buffers of one batch in flight, and the same memory seen by numpy."""

    def __init__(self, n_long: int, n_int: int, pinned: bool) -> None:
        self.long = torch.empty(n_long, dtype=torch.int64, pin_memory=pinned)
        self.int = torch.empty(n_int, dtype=torch.int32, pin_memory=pinned)
        self.long_view = self.long.numpy()
        self.int_view = self.int.numpy()


class BatchBuilder:
    """Builds the flat batch of one plan after another.

    A batch's tensors stay valid until the batch after the next one is built, so that one step may
    be in flight while the next is prepared.
    """

    def __init__(self, limits: Limits, device: torch.device | str = "cpu") -> None:
        self.limits = limits
        self.device = torch.device(device)
        self._on_cpu = self.device.type == "cpu"
        rows = limits.max_running + limits.max_training
        tokens = limits.max_batch_tokens
        width = -(-limits.max_length // limits.block_size)
        self._table = np.zeros((rows, width), dtype=np.int32)
        self._adapter = np.zeros(rows, dtype=np.int32)
        self._offset = np.zeros(rows, dtype=np.int64)  # position_offset by row
        self._shifts = False  # whether any sequence had one
        n_long = 3 * tokens + 5 * rows
        n_int = tokens + 2 * rows + 1 + rows * width
        self._staging = [_Staging(n_long, n_int, not self._on_cpu) for _ in range(2)]
        self._turn = 0

    def build(self, plan: Plan) -> FlatBatch:
        """Index tensors of the spans of ``plan`` that go through all layers.

        To be called before any of the plan's tokens is recorded.
        """
        self._update_tables(plan)
        return self._build(plan, plan.whole_spans, plan.n_decode)

    def build_partial(self, plan: Plan) -> FlatBatch:
        """Index tensors of the other spans, those of one token first.

        Use another builder than for :meth:`build`.
        """
        self._update_tables(plan)
        spans = sorted(plan.partial_spans, key=_by_depth)
        n_decode = sum(1 for span in spans if span.stop - span.start == 1)
        return self._build(plan, spans, n_decode)

    def _build(self, plan: Plan, spans: list[Span], n_decode: int) -> FlatBatch:
        n_spans, n_rows = len(spans), sum(span.stop - span.start for span in spans)
        block_size = self.limits.block_size

        rows: list[int] = []
        starts: list[int] = []
        ids: list[int] = []
        pending: list[int] = []
        sample_spans: list[int] = []
        virtual: list[VirtualRows] = []
        for i in range(n_decode):
            span = spans[i]
            seq, start = span.seq, span.start
            if start < seq.n_virtual:
                virtual.append(VirtualRows(i, i + 1, start, seq.adapter_slot))
            rows.append(seq.row)
            starts.append(start)
            if start < len(seq.tokens):
                ids.append(seq.tokens[start])
            else:
                ids.append(0)
                pending.append(i)
            if span.samples:
                sample_spans.append(i)
        span_start = list(range(n_decode + 1))
        kv_len = [start + 1 for start in starts]
        for i in range(n_decode, n_spans):
            span = spans[i]
            seq, start = span.seq, span.start
            if start < seq.n_virtual:
                n = min(span.stop, seq.n_virtual) - start
                first = span_start[-1]
                virtual.append(VirtualRows(first, first + n, start, seq.adapter_slot))
            rows.append(span.seq.row)
            starts.append(span.first)
            kv_len.append(span.first + span.stop - span.start)
            span_start.append(span_start[-1] + span.stop - span.start)
            ids += span.seq.tokens[span.start : span.stop]
            if span.samples:
                sample_spans.append(i)
        assert len(ids) == n_rows

        n_pending, n_samples = len(pending), len(sample_spans)
        max_kv = max(kv_len, default=0)
        width = -(-max_kv // block_size)
        self._turn ^= 1
        staging = self._staging[self._turn]
        long, ints = _Cursor(staging.long_view), _Cursor(staging.int_view)

        tokens_at, tokens = long.take(n_rows)
        positions_at, positions = long.take(n_rows)
        slots_at, slots = long.take(n_rows)
        span_rows_at, span_rows = long.take(n_spans)
        pending_index_at, pending_index = long.take(n_pending)
        pending_rows_at, pending_rows = long.take(n_pending)
        sample_index_at, sample_index = long.take(n_samples)
        sample_rows_at, sample_rows = long.take(n_samples)
        adapters_at, adapters = ints.take(n_rows)
        span_start_at, span_starts = ints.take(n_spans + 1)
        kv_len_at, kv_lens = ints.take(n_spans)
        table_at, table = ints.take(n_spans * width)

        tokens[:] = ids
        span_rows[:] = rows
        span_starts[:] = span_start
        kv_lens[:] = kv_len
        if n_rows == n_spans:
            token_rows = span_rows
            positions[:] = starts
        else:
            lengths = np.diff(span_starts)
            token_rows = np.repeat(span_rows, lengths)
            positions[:] = np.arange(n_rows)
            positions += np.repeat(np.asarray(starts) - span_starts[:-1], lengths)
        block, offset = np.divmod(positions, block_size)
        packed = [(i, span.part.block) for i, span in enumerate(spans) if span.part is not None]
        for i, first in packed:  # its text's blocks come after those of the texts before it
            block[span_start[i] : span_start[i + 1]] += first
        slots[:] = self._table[token_rows, block]
        slots *= block_size
        slots += offset
        if self._shifts:
            positions += self._offset[token_rows]
        for i, span in enumerate(spans):
            if span.seq.numbers:
                at = slice(span_start[i], span_start[i + 1])
                positions[at] = _numbers(span) + self._offset[rows[i]]
        adapters[:] = self._adapter[token_rows]
        tables = table.reshape(n_spans, width)
        np.take(self._table[:, :width], span_rows, axis=0, out=tables)
        for i, first in packed:
            own = self._table[rows[i], first : first + width]
            tables[i, : len(own)] = own
        if n_pending:
            pending_index[:] = pending
            pending_rows[:] = span_rows[pending_index]
        if n_samples:
            sample_rows[:] = span_rows[sample_spans]
            sample_index[:] = span_starts[1:][sample_spans]
            sample_index -= 1

        long_at = self._send(staging.long, long.used)
        int_at = self._send(staging.int, ints.used)
        layout = PagedLayout(
            positions=long_at[positions_at],
            slots=long_at[slots_at],
            span_start=int_at[span_start_at],
            kv_len=int_at[kv_len_at],
            block_table=int_at[table_at].view(n_spans, width),
            block_size=block_size,
            n_decode=n_decode,
            max_query=1 if n_rows == n_spans else int(lengths.max()),
            max_kv=max_kv,
            span_start_host=span_start,
            kv_len_host=kv_len,
            state_slots=long_at[span_rows_at] + 1 if self.limits.recurrent else None,
        )
        return FlatBatch(
            plan=plan,
            spans=spans,
            tokens=long_at[tokens_at],
            layout=layout,
            span_rows=long_at[span_rows_at],
            pending_index=long_at[pending_index_at],
            pending_rows=long_at[pending_rows_at],
            sample_index=long_at[sample_index_at],
            sample_rows=long_at[sample_rows_at],
            sample_spans=sample_spans,
            adapters=int_at[adapters_at],
            adapter_slots=[int(slot) for slot in np.unique(self._adapter[rows]) if slot],
            virtual=virtual,
        )

    def _update_tables(self, plan: Plan) -> None:
        for seq in (*plan.admitted, *plan.held):
            self._adapter[seq.row] = seq.adapter_slot
            self._offset[seq.row] = seq.position_offset
            self._shifts = self._shifts or seq.position_offset != 0
        for seq, first in plan.grown:
            self._table[seq.row, first : len(seq.blocks)] = seq.blocks[first:]

    def _send(self, host: torch.Tensor, used: int) -> torch.Tensor:
        part = host[:used]
        return part if self._on_cpu else part.to(self.device, non_blocking=True)


def _by_depth(span: Span) -> tuple[bool, int]:
    """Rows that enter early first, so that those of a layer are mostly the first ones."""
    return span.stop - span.start > 1, span.seq.first_layer


def _numbers(span: Span) -> np.ndarray:
    """Position numbers of a span whose sequence has its own."""
    numbers = span.seq.numbers
    n, following = len(numbers), max(numbers) + 1
    wanted = range(span.start, span.stop)
    return np.array([numbers[i] if i < n else following + i - n for i in wanted])


class _Cursor:
    """Hands out consecutive pieces of a buffer: where they are, and a view to fill."""

    def __init__(self, buffer: np.ndarray) -> None:
        self.buffer = buffer
        self.used = 0

    def take(self, n: int) -> tuple[slice, np.ndarray]:
        where = slice(self.used, self.used + n)
        self.used += n
        return where, self.buffer[where]
