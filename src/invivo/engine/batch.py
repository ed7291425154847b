"""From a plan to the index tensors of its flat batch.

Everything is written with numpy into one of two staging buffers (pinned where the device is a GPU)
and goes to the device in one copy, 64-bit integers before the others. Block tables live in one
persistent array by row and change only where a sequence starts or gets a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from invivo.engine.scheduler import Limits
from invivo.engine.types import Plan, Purpose, Sequence, Span, VirtualRows
from invivo.kernels.paging import PagedLayout


@dataclass(frozen=True, slots=True, eq=False)
class Decodes:
    """Sequences of which each decodes one token a batch: what stays the same from step to step.

    The same object comes again for as long as the same sequences decode, and nothing else runs.

    Attributes:
        seqs: in the order of their rows.
        rows: [T] int64, their ``row``.
        adapters: [T] int32, their adapter slots; adapter_slots: the different ones but 0.
        numbered: whether any has position numbers of its own.
        starts, sampled: the first rows of the spans and one more; all spans.
    """

    seqs: list[Sequence]
    rows: np.ndarray
    adapters: np.ndarray
    adapter_slots: list[int]
    numbered: bool
    starts: list[int]
    sampled: list[int]

    @classmethod
    def of(cls, seqs: list[Sequence]) -> Decodes:
        """For sequences that have their rows and adapters."""
        slots = [seq.adapter_slot for seq in seqs]
        return cls(
            seqs=seqs,
            rows=np.array([seq.row for seq in seqs], dtype=np.int64),
            adapters=np.array(slots, dtype=np.int32),
            adapter_slots=sorted({slot for slot in slots if slot}),
            numbered=any(seq.numbers for seq in seqs),
            starts=list(range(len(seqs) + 1)),
            sampled=list(range(len(seqs))),
        )


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
        decodes: its sequences, where each decodes and is sampled; None: some do not.
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
    decodes: Decodes | None = None


class _Staging:
    """Host memory of one batch in flight, and the same seen by numpy."""

    def __init__(self, n_long: int, n_int: int, pinned: bool) -> None:
        self.whole = torch.empty(2 * n_long + n_int, dtype=torch.int32, pin_memory=pinned)
        self.ints = self.whole.numpy()
        self.longs = self.ints[: 2 * n_long].view(np.int64)


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
        self._decodes: Decodes | None = None  # of the last batch

    def build(self, plan: Plan) -> FlatBatch:
        """Index tensors of the spans of ``plan`` that go through all layers.

        To be called before any of the plan's tokens is recorded.
        """
        self._update_tables(plan)
        spans = plan.whole_spans
        self._decodes = self._decodes_of(plan, spans)
        return self._build(plan, spans, plan.n_decode, self._decodes)

    def build_partial(self, plan: Plan) -> FlatBatch:
        """Index tensors of the other spans, those of one token first.

        Use another builder than for :meth:`build`.
        """
        self._update_tables(plan)
        spans = sorted(plan.partial_spans, key=_by_depth)
        n_decode = sum(1 for span in spans if span.stop - span.start == 1)
        return self._build(plan, spans, n_decode, None)

    def _decodes_of(self, plan: Plan, spans: list[Span]) -> Decodes | None:
        """What stays the same in a batch of ``spans``; None where they are not decodes alone."""
        if plan.n_decode < len(spans):
            return None
        seqs, last = [span.seq for span in spans], self._decodes
        if last is not None and not plan.admitted and seqs == last.seqs:
            return last
        if any(span.purpose is not Purpose.DECODE or not span.samples for span in spans):
            return None
        return Decodes.of(seqs)

    def _build(
        self, plan: Plan, spans: list[Span], n_decode: int, decodes: Decodes | None
    ) -> FlatBatch:
        block_size = self.limits.block_size
        found = _gathered(spans, n_decode) if decodes is None else _gathered_decodes(spans, decodes)
        rows, starts, kv_len = found.rows, found.starts, found.kv_len
        span_start, pending, sample_spans = found.span_start, found.pending, found.sample_spans
        n_spans, n_rows = len(spans), len(found.ids)

        n_pending, n_samples = len(pending), len(sample_spans)
        max_kv = max(kv_len, default=0)
        width = -(-max_kv // block_size)
        self._turn ^= 1
        staging = self._staging[self._turn]
        long = _Cursor(staging.longs)

        tokens_at, tokens = long.take(n_rows)
        positions_at, positions = long.take(n_rows)
        slots_at, slots = long.take(n_rows)
        span_rows_at, span_rows = long.take(n_spans)
        pending_index_at, pending_index = long.take(n_pending)
        pending_rows_at, pending_rows = long.take(n_pending)
        sample_index_at, sample_index = long.take(n_samples)
        sample_rows_at, sample_rows = long.take(n_samples)
        ints = _Cursor(staging.ints[2 * long.used :])
        adapters_at, adapters = ints.take(n_rows)
        span_start_at, span_starts = ints.take(n_spans + 1)
        kv_len_at, kv_lens = ints.take(n_spans)
        table_at, table = ints.take(n_spans * width)

        tokens[:] = found.ids
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
        packed = []
        if decodes is None:
            packed = [(i, span.part.block) for i, span in enumerate(spans) if span.part is not None]
        for i, first in packed:  # its text's blocks come after those of the texts before it
            block[span_start[i] : span_start[i + 1]] += first
        slots[:] = self._table[token_rows, block]
        slots *= block_size
        slots += offset
        if self._shifts:
            positions += self._offset[token_rows]
        if decodes is None or decodes.numbered:
            for i, span in enumerate(spans):
                if span.seq.numbers:
                    at = slice(span_start[i], span_start[i + 1])
                    positions[at] = _numbers(span) + self._offset[rows[i]]
        adapters[:] = self._adapter[token_rows] if decodes is None else decodes.adapters
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

        sent = self._send(staging.whole, 2 * long.used + ints.used)
        long_at, int_at = sent[: 2 * long.used].view(torch.int64), sent[2 * long.used :]
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
            adapter_slots=self._slots_of(rows) if decodes is None else decodes.adapter_slots,
            virtual=found.virtual,
            decodes=decodes,
        )

    def _slots_of(self, rows: list[int] | np.ndarray) -> list[int]:
        """The different adapter slots of sequences' rows, without 0."""
        return [int(slot) for slot in np.unique(self._adapter[rows]) if slot]

    def _update_tables(self, plan: Plan) -> None:
        for seq in (*plan.admitted, *plan.held):
            self._adapter[seq.row] = seq.adapter_slot
            self._offset[seq.row] = seq.position_offset
            self._shifts = self._shifts or seq.position_offset != 0
        for seq, first in plan.grown:
            blocks = seq.blocks
            if first == len(blocks) - 1:
                self._table[seq.row, first] = blocks[first]  # of a decode; much the quicker
            else:
                self._table[seq.row, first : len(blocks)] = blocks[first:]

    def _send(self, host: torch.Tensor, used: int) -> torch.Tensor:
        part = host[:used]
        return part if self._on_cpu else part.to(self.device, non_blocking=True)


@dataclass(slots=True)
class _Gathered:
    """What the host collects of a batch, span by span.

    Attributes:
        rows, starts, kv_len: of each span: its sequence's row, the first of its tokens and how many
            there are up to its last one, both counted from its text's beginning.
        span_start: first row of each span, and the number of rows.
        ids: of each row; 0 of those that are pending.
        pending, sample_spans: rows, and spans.
    """

    rows: list[int] | np.ndarray
    starts: list[int]
    kv_len: list[int]
    span_start: list[int]
    ids: list[int]
    pending: list[int]
    sample_spans: list[int]
    virtual: list[VirtualRows]


def _gathered(spans: list[Span], n_decode: int) -> _Gathered:
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
    for i in range(n_decode, len(spans)):
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
    assert len(ids) == span_start[-1]
    return _Gathered(rows, starts, kv_len, span_start, ids, pending, sample_spans, virtual)


def _gathered_decodes(spans: list[Span], decodes: Decodes) -> _Gathered:
    """:func:`_gathered` for the sequences of ``decodes``."""
    starts = [span.start for span in spans]
    kv_len = [span.stop for span in spans]
    pending = [i for i, span in enumerate(spans) if span.start >= len(span.seq.tokens)]
    ids = [0] * len(spans)
    if len(pending) < len(spans):
        late = set(pending)
        for i, span in enumerate(spans):
            if i not in late:
                ids[i] = span.seq.tokens[span.start]
    rows, sampled = decodes.rows, decodes.sampled
    return _Gathered(rows, starts, kv_len, decodes.starts, ids, pending, sampled, [])


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
