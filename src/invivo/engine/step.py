"""Running one plan: flat batch -> decoder -> epilogues. Decides nothing.

A step is *launched* and later *collected*. On a CPU it is over when launched; on a GPU the host
goes on while it runs: drawn tokens stay in ``last_token`` (by row) for the next step, and their
copy to the host is waited for only when the step is collected.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch

from invivo.engine.adapters import AdapterStore
from invivo.engine.batch import Decodes, FlatBatch
from invivo.engine.decode_edits import DecodeEdits
from invivo.engine.edit_taps import EditedSpan, EditTaps
from invivo.engine.finetune import Riders
from invivo.engine.graphs import DecodeGraphs, TablesRefused
from invivo.engine.partial_pass import run_partial
from invivo.engine.run_edits import RunEdits
from invivo.engine.sampler import LogprobRows, RowState, best, sample, token_logprobs
from invivo.engine.transfer import index_on, to_host
from invivo.engine.types import Plan, Sequence, StepResult, TokenLogprob
from invivo.models.bypass import Bypass
from invivo.models.cache import KVCache
from invivo.models.decoder import Decoder
from invivo.models.sites import Taps, offer

log = logging.getLogger(__name__)

LOGITS_BYTES = 64 << 20  # prompt log-probabilities are computed in pieces of at most this size


@dataclass(slots=True)
class ScoredRows:
    """Tokens of one span's sequence whose log-probabilities are wanted.

    Attributes:
        span: index of the span in the plan.
        first: index in the sequence of the first such token; its logits are those of the row of
            token ``first - 1``, which lies in the span.
        tokens: the tokens from there on.
        top: how many alternatives.
    """

    span: int
    first: int
    tokens: list[int]
    top: int


@dataclass(slots=True)
class Work:
    """What a plan needs besides its batch, gathered by the engine.

    Attributes:
        rows: state of each sampled row, in the order of ``batch.sample_spans``.
        positions: their output positions.
        scored: prompt tokens to score.
        pooled: spans whose final states are pooled, with the way ("mean", "last").
        edited: spans that are runs of programs.
        greedy: whether it is known that every row takes the best token and wants nothing else.
        partial: the run of each span of the batch's partial rows.
    """

    rows: list[RowState]
    positions: list[int]
    scored: list[ScoredRows] = field(default_factory=list)
    pooled: list[tuple[int, str]] = field(default_factory=list)
    edited: list[tuple[int, RunEdits]] = field(default_factory=list)
    partial: list[RunEdits] = field(default_factory=list)
    greedy: bool = False


@dataclass(slots=True)
class Launched:
    """A step on its way; the tensors are on the host once ``done`` has passed.

    ``begun`` passes when the device takes the step up.
    """

    plan: Plan
    work: Work
    sample_spans: list[int]
    tokens: torch.Tensor
    logprob_rows: list[int]
    logprobs: LogprobRows | None
    scored: LogprobRows | None
    embeddings: dict[int, torch.Tensor]
    begun: torch.cuda.Event | None
    done: torch.cuda.Event | None
    started: float


class Stepper:
    """Runs plans on one decoder with one cache.

    Args:
        adapters: whose tables the batches' slots refer to.
        graphs: for plans of decodes alone; None runs them kernel by kernel.
        max_running: rows of ``last_token``.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        adapters: AdapterStore,
        graphs: DecodeGraphs | None,
        *,
        max_running: int,
    ) -> None:
        self._decoder = decoder
        self._cache = cache
        self._adapters = adapters
        self._graphs = graphs
        self._device = cache.k.device
        # Of the last batch of decodes with programs, and the decodes.
        self._decode_edits: DecodeEdits | None = None
        self._edited_decodes: Decodes | None = None
        self._last_token = torch.zeros(max_running, dtype=torch.int64, device=self._device)
        # Sums of final states of half-computed prompts, by sequence: mean embeddings.
        self._sums: dict[Sequence, torch.Tensor] = {}

    @torch.inference_mode()
    def launch(
        self,
        batch: FlatBatch,
        work: Work,
        riders: Riders | None = None,
        partial: FlatBatch | None = None,
    ) -> Launched:
        """Put one step on the device, its pieces of training after everything else.

        Args:
            partial: the plan's rows that go through some of the layers only.
        """
        queue = self._queue()
        started, begun = time.perf_counter(), self._mark(queue)
        cache, plan = self._cache, batch.plan
        cache.clear_states([seq.row + 1 for seq in (*plan.admitted, *plan.held)])
        cache.copy_states(plan.restored)
        for copy in plan.copied:
            cache.copy_block(copy.source, copy.target, copy.tokens, copy.layer)
        # A step that fails with training on board is repeated without. Keys are then written again,
        # but states would move on twice.
        slots = [] if riders is None else [span.seq.row + 1 for span in plan.spans]
        states = None if riders is None else cache.states_at(slots)
        try:
            launched = self._launched(batch, work, riders, partial, started, begun)
        except Exception:
            cache.put_states(slots, states)
            raise
        launched.done = self._mark(queue)
        return launched

    def _launched(
        self,
        batch: FlatBatch,
        work: Work,
        riders: Riders | None,
        partial: FlatBatch | None,
        started: float,
        begun: torch.cuda.Event | None,
    ) -> Launched:
        """What :meth:`launch` puts on the device once memory is as the plan wants it."""
        hidden, logits, edits = self._forward(batch, work, riders)
        if partial is not None:
            run_partial(
                self._decoder,
                partial,
                self._cache,
                work.partial,
                lambda rows: self._bypass(partial, rows),
                self._logit_rows,
            )
        self._cache.copy_states(batch.plan.saved)
        tokens = torch.empty(0, dtype=torch.int64)
        logprobs, logprob_rows = None, []
        if logits is not None:
            draw = best(logits) if work.greedy else sample(logits, work.rows, work.positions)
            self._last_token.index_copy_(0, batch.sample_rows, draw.tokens)
            tokens = to_host(draw.tokens)
            logprob_rows = draw.logprob_rows
            logprobs = _rows_to_host(draw.logprobs)
        scored, embeddings = None, {}
        if hidden is not None:
            scored = _rows_to_host(self._score(hidden, batch, work.scored, edits))
            pooled = self._pool(hidden, batch, work.pooled)
            embeddings = {span: to_host(vector) for span, vector in pooled.items()}
        launched = Launched(
            plan=batch.plan,
            work=work,
            sample_spans=batch.sample_spans,
            tokens=tokens,
            logprob_rows=logprob_rows,
            logprobs=logprobs,
            scored=scored,
            embeddings=embeddings,
            begun=begun,
            done=None,
            started=started,
        )
        if riders is not None:
            with torch.inference_mode(False):
                riders.learn(hidden, batch.layout if hidden is not None else None)
        return launched

    def train(self, plan: Plan, riders: Riders) -> Launched:
        """Launch a plan that has backward units and no rows."""
        queue = self._queue()
        started, begun = time.perf_counter(), self._mark(queue)
        riders.learn(None, None)
        none = torch.empty(0, dtype=torch.int64)
        done = self._mark(queue)
        return Launched(plan, Work([], []), [], none, [], None, None, {}, begun, done, started)

    def collect(self, launched: Launched) -> StepResult:
        """Wait for a step and read what came out."""
        if launched.done is not None:
            launched.done.synchronize()
        plan, work = launched.plan, launched.work
        result = StepResult(plan=plan, tokens=[-1] * len(plan.spans))
        drawn = launched.tokens.tolist()
        for span, token in zip(launched.sample_spans, drawn, strict=True):
            result.tokens[span] = token
        if launched.logprobs is not None:
            rows = launched.logprob_rows
            records = launched.logprobs.to_host(
                [drawn[i] for i in rows], [work.rows[i].params.logprobs or 0 for i in rows]
            )
            for i, record in zip(rows, records, strict=True):
                result.logprobs[launched.sample_spans[i]] = record
        if launched.scored is not None:
            tokens = [token for s in work.scored for token in s.tokens]
            tops = [s.top for s in work.scored for _ in s.tokens]
            result.scored = _split(launched.scored.to_host(tokens, tops), work.scored)
        for span, vector in launched.embeddings.items():
            result.embeddings[span] = vector.tolist()
        result.seconds = time.perf_counter() - launched.started
        if launched.begun is not None and launched.done is not None:
            result.device_seconds = launched.begun.elapsed_time(launched.done) / 1e3
        return result

    def clear_blocks(self, blocks: list[int]) -> None:
        """Zero the keys and values of ``blocks``, which nobody may have taken over yet."""
        if blocks:
            index = index_on(blocks, self._device)
            self._cache.k.index_fill_(1, index, 0)
            self._cache.v.index_fill_(1, index, 0)

    def forget(self, seq: Sequence) -> None:
        """Drop what is kept for an unfinished sequence."""
        self._sums.pop(seq, None)

    # --- parts ------------------------------------------------------------------------------
    def _queue(self) -> torch.cuda.Stream | None:
        """Where the device takes its work from; None where there is no such thing."""
        return torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None

    @staticmethod
    def _mark(queue: torch.cuda.Stream | None) -> torch.cuda.Event | None:
        """An event at the end of a queue."""
        if queue is None:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(queue)
        return event

    def _forward(
        self, batch: FlatBatch, work: Work, riders: Riders | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, EditTaps | None]:
        """Final states of all rows, logits of the sampled ones, and what programs do to logits.

        A replayed graph gives no states: where every row is sampled nobody asks for them. Batches
        with a run of a program are replayed in pieces.
        """
        tokens, layout = batch.tokens, batch.layout
        if layout.n_rows == 0:
            return None, None, None
        n_pending = len(batch.pending_index)
        if n_pending == layout.n_rows:
            tokens = batch.tokens = self._last_token.index_select(0, batch.pending_rows)
        elif n_pending:
            tokens[batch.pending_index] = self._last_token[batch.pending_rows]
        n_sampled, n_rows = len(batch.sample_spans), layout.n_rows
        slots = batch.adapters if batch.adapter_slots else None
        graphs = self._graphs
        if graphs is not None and n_sampled == n_rows and graphs.fits(layout):
            if not work.edited:
                return None, graphs.run(tokens, layout, slots), None
            return self._replay_touched(graphs, batch, work, slots)
        bypass = self._bypass(batch, slice(None))
        taps: Taps | None = None
        if riders is not None:
            bypass, taps = riders.on_board(bypass, layout)
        edits = None
        edited = work.edited if riders is None else [*work.edited, *riders.edited]
        if edited:
            taps = edits = EditTaps(self._decoder.config, _edited(batch, edited), taps)
        hidden = self._decoder.forward(tokens, layout, self._cache, bypass=bypass, taps=taps)
        if edits is not None:
            edits.keep_logits(self._decoder, hidden, self._logit_rows)
        if not n_sampled:
            return hidden, None, edits
        rows = hidden if n_sampled == n_rows else hidden[batch.sample_index]
        on_logits = None
        if edits is not None:
            starts = layout.span_start_host
            on_logits = edits.on_logits([starts[i + 1] - 1 for i in batch.sample_spans])
        return hidden, self._decoder.logits(rows, taps=on_logits), edits

    def _replay_touched(
        self, graphs: DecodeGraphs, batch: FlatBatch, work: Work, slots: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, EditTaps | None]:
        """:meth:`_forward` of decodes alone, some of them runs of programs."""
        steady = self._steady(graphs, batch, work)
        edits, touched = None, steady.loose or ()
        if steady.asked:
            asked = [work.edited[i] for i in steady.asked]
            edits = EditTaps(
                self._decoder.config, _edited(batch, asked), elsewhere=steady.tabled.keys()
            )
            touched = edits.touched() if steady.loose is None else steady.loose
        try:
            hidden, logits = graphs.run_touched(
                batch.tokens, batch.layout, edits, touched, slots, steady.tabled
            )
        except TablesRefused as refused:
            log.warning("programs run without tables from here on", exc_info=refused)
            graphs.tables.refuse()
            self._decode_edits = None
            return self._replay_touched(graphs, batch, work, slots)
        if edits is not None:
            edits.keep_logits(self._decoder, hidden, self._logit_rows)
            on_logits = edits.on_logits(range(batch.layout.n_rows))
            if on_logits is not None:
                logits = offer(on_logits, "logits", -1, logits)
        return hidden, logits, edits

    def _steady(self, graphs: DecodeGraphs, batch: FlatBatch, work: Work) -> DecodeEdits:
        """What the programs of a batch of decodes do: mostly what they did in the last one."""
        steady, decodes = self._decode_edits, batch.decodes
        same = decodes is not None and decodes is self._edited_decodes
        if steady is not None and same and steady.last_at(batch.layout.kv_len_host):
            return steady
        rows = [(i, edits.steady(batch.spans[i].start)) for i, edits in work.edited]
        if steady is None or steady.rows != rows:
            steady = DecodeEdits(self._decoder.config, rows, graphs.tables.fits)
        self._decode_edits, self._edited_decodes = steady, decodes
        return steady

    def _bypass(self, batch: FlatBatch, rows: slice | torch.Tensor) -> Bypass | None:
        """The bypass of some rows of a batch; of all of them where tokens are virtual."""
        if not batch.adapter_slots:
            return None
        return self._adapters.bypass(batch.adapters[rows], batch.virtual)

    @property
    def _logit_rows(self) -> int:
        """Rows of logits that are computed at a time where not all are needed at once."""
        return max(16, LOGITS_BYTES // (4 * self._decoder.config.vocab_size))

    def _score(
        self,
        hidden: torch.Tensor,
        batch: FlatBatch,
        scored: list[ScoredRows],
        edits: EditTaps | None,
    ) -> LogprobRows | None:
        """Log-probabilities of given tokens, in pieces: [rows, V] is never whole."""
        if not scored:
            return None
        rows: list[int] = []
        targets: list[int] = []
        for s in scored:
            row = batch.layout.span_start_host[s.span] + s.first - 1 - batch.spans[s.span].start
            rows.extend(range(row, row + len(s.tokens)))
            targets.extend(s.tokens)
        top = max(s.top for s in scored)
        at, wanted = index_on(rows, self._device), index_on(targets, self._device)
        step = self._logit_rows
        pieces = []
        for i in range(0, len(rows), step):
            taps = None if edits is None else edits.on_logits(rows[i : i + step])
            logits = self._decoder.logits(hidden[at[i : i + step]], taps=taps)
            pieces.append(token_logprobs(logits, wanted[i : i + step], top))
        if len(pieces) == 1:
            return pieces[0]
        return LogprobRows(
            chosen=torch.cat([p.chosen for p in pieces]),
            rank=torch.cat([p.rank for p in pieces]),
            top_values=torch.cat([p.top_values for p in pieces]),
            top_ids=torch.cat([p.top_ids for p in pieces]),
        )

    def _pool(
        self, hidden: torch.Tensor, batch: FlatBatch, pooled: list[tuple[int, str]]
    ) -> dict[int, torch.Tensor]:
        """Pooled states of the spans that complete their prompt; sums of the others are kept."""
        out: dict[int, torch.Tensor] = {}
        starts = batch.layout.span_start_host
        for i, way in pooled:
            span = batch.spans[i]
            last = span.stop == span.seq.n_prompt
            if way == "last":
                if last:
                    out[i] = hidden[starts[i + 1] - 1].float()
                continue
            n_virtual = span.seq.n_virtual
            first = starts[i] + max(0, min(n_virtual, span.stop) - span.start)
            total = hidden[first : starts[i + 1]].sum(dim=0, dtype=torch.float32)
            if span.start > 0:
                total += self._sums[span.seq]
            if last:
                out[i] = total / (span.seq.n_prompt - n_virtual)
                self._sums.pop(span.seq, None)
            else:
                self._sums[span.seq] = total
        return out


def _edited(batch: FlatBatch, edited: list[tuple[int, RunEdits]]) -> list[EditedSpan]:
    starts, spans = batch.layout.span_start_host, batch.spans
    return [
        EditedSpan(edits, i, starts[i], range(spans[i].start, spans[i].stop)) for i, edits in edited
    ]


def _rows_to_host(rows: LogprobRows | None) -> LogprobRows | None:
    if rows is None:
        return None
    return LogprobRows(
        chosen=to_host(rows.chosen),
        rank=to_host(rows.rank),
        top_values=to_host(rows.top_values),
        top_ids=to_host(rows.top_ids),
    )


def _split(records: list[TokenLogprob], scored: Seq[ScoredRows]) -> dict[int, list[TokenLogprob]]:
    out: dict[int, list[TokenLogprob]] = {}
    at = 0
    for s in scored:
        out[s.span] = records[at : at + len(s.tokens)]
        at += len(s.tokens)
    return out
