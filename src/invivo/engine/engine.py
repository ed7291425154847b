"""The engine: takes requests from any thread, runs iterations in one, hands outputs back.

One iteration: take in what has arrived, let the scheduler make a plan, launch it, and fold in the
step before (on a GPU; on a CPU the same one): record drawn tokens, settle text, end what has ended.
What a program's own operations raise ends its request alone; any other exception in a step ends the
requests of that plan with an error and nothing else.
"""

from __future__ import annotations

import logging
import operator
import threading
import time
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from invivo.edits.program import MAIN
from invivo.engine.adapters import Adapter, AdapterStore
from invivo.engine.batch import BatchBuilder, Decodes, FlatBatch
from invivo.engine.carrying import adapters_of, check_carried
from invivo.engine.config import EngineConfig
from invivo.engine.detokenize import backend
from invivo.engine.finetune import FineTuning, JobHandle, Riders
from invivo.engine.grammar import GrammarCompiler, Matcher
from invivo.engine.graphs import DecodeGraphs
from invivo.engine.host_placement import HostRoom
from invivo.engine.job_spec import DataSource, JobSpec, OnEvent
from invivo.engine.latency import LatencyModel
from invivo.engine.memory import limits_of, room_to_pack
from invivo.engine.policies import Slo, policy_of
from invivo.engine.programs import CarriedProgram, ProgramRun
from invivo.engine.run_edits import RunEdits
from invivo.engine.sampler import RowState
from invivo.engine.scheduler import Scheduler
from invivo.engine.stats import Counters, EngineStats, RequestRecord
from invivo.engine.step import Launched, ScoredRows, Stepper, Work
from invivo.engine.tracks import Job, OnOutput, Track, make_job
from invivo.engine.types import (
    FinishReason,
    Intervention,
    Output,
    Plan,
    Purpose,
    Request,
    Sequence,
    Span,
    StepResult,
    TokenLogprob,
)
from invivo.engine.validate import validate_request
from invivo.engine.warmup import warm_up
from invivo.errors import (
    Conflict,
    InvalidRequest,
    InvivoError,
    Overloaded,
    TooLarge,
    Unavailable,
)
from invivo.models.cache import allocate_kv_cache
from invivo.models.load import LoadedModel
from invivo.models.rope import long_text_offset

log = logging.getLogger(__name__)

_RUNS_AT_ONCE = 32  # most runs of one program that are in the scheduler


@dataclass(slots=True)
class _Inbox:
    """What other threads ask of the engine, in order."""

    wake: threading.Condition = field(default_factory=threading.Condition)
    submitted: deque[Job] = field(default_factory=deque)
    aborted: deque[str] = field(default_factory=deque)
    live: dict[str, int] = field(default_factory=dict)  # request id -> sequences
    n_sequences: int = 0
    closed: bool = False
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class _LastingWork:
    """What the sequences of ``decodes`` want of every step.

    Attributes:
        rows, prompts: state and length of the prompt of each.
        edited: rows that are runs of programs.
        greedy: whether all take the best token and want nothing else.
    """

    decodes: Decodes
    rows: list[RowState]
    prompts: list[int]
    edited: list[tuple[int, RunEdits]]
    greedy: bool


class Engine:
    """Serves one model.

    ``submit``, ``abort``, ``stats`` and the loading of adapters may be called from any thread.
    Either ``start`` a thread that runs iterations, or call ``step`` yourself from one thread.

    Args:
        model: what to serve; ``model.tokenizer`` may be None, then outputs have no text.
        config: sizes and switches.

    Raises:
        InvalidRequest: the sizes do not fit together or the cache has no room.
    """

    def __init__(self, model: LoadedModel, config: EngineConfig | None = None) -> None:
        self.model = model
        self.config = config or EngineConfig()
        weight = next(model.decoder.parameters())
        self.device = weight.device
        on_gpu = self.device.type == "cuda"
        c = self.config
        max_running, max_batch_tokens = c.batch_sizes(on_gpu=on_gpu)
        self.max_model_len = c.model_length(model.config.max_positions)
        if room_to_pack(model.decoder):
            model.decoder.pack()
        limits = limits_of(
            model.decoder,
            block_size=c.block_size,
            max_batch_tokens=max_batch_tokens,
            max_running=max_running,
            max_length=self.max_model_len,
            prefix_cache=c.prefix_cache,
            kv_bytes=c.kv_bytes,
            memory_fraction=c.memory_fraction,
            max_training=c.max_jobs,
            snapshot_bytes=c.snapshot_bytes,
            snapshot_tokens=c.snapshot_tokens,
        )
        self.scheduler = Scheduler(limits)
        self.adapters = AdapterStore(
            model.config,
            device=self.device,
            dtype=weight.dtype,
            max_slots=c.max_adapters,
            max_rank=c.max_lora_rank,
        )
        cache = allocate_kv_cache(
            model.config,
            n_blocks=limits.n_blocks,
            block_size=c.block_size,
            device=self.device,
            dtype=weight.dtype,
            n_slots=limits.n_state_slots,
        )
        self._builder = BatchBuilder(limits, self.device)
        self._partial_builder = BatchBuilder(limits, self.device)
        if on_gpu:
            warm_up(model.decoder, cache)
        graphs = None
        if on_gpu and c.cuda_graphs is not False:
            graphs = DecodeGraphs(
                model.decoder,
                cache,
                self.adapters,
                max_rows=max_running,
                max_blocks=-(-self.max_model_len // c.block_size),
            )
            graphs.capture()
        self._stepper = Stepper(
            model.decoder, cache, self.adapters, graphs, max_running=max_running
        )
        self._grammars = GrammarCompiler(
            model.tokenizer,
            vocab_size=model.config.vocab_size,
            eos_ids=model.config.eos_token_ids,
        )
        self._tokenizer = None if model.tokenizer is None else backend(model.tokenizer)
        self._eos = frozenset(model.config.eos_token_ids)
        self._overlap = on_gpu if c.overlap is None else c.overlap
        self._tracks: dict[Sequence, Track] = {}
        self._programs: dict[str, Job] = {}  # requests that carry one, by id
        self._runs: dict[Sequence, ProgramRun] = {}
        self._lasting: _LastingWork | None = None
        self._parked: deque[Job] = deque()  # their adapter waits for a slot
        self._in_flight: Launched | None = None
        self._inbox = _Inbox()
        self._slo = Slo(c.promised_tpot_ms(on_gpu=on_gpu), c.ttft_ms, burst=c.burst)
        self._finetuning = FineTuning(
            model.decoder,
            cache,
            self.scheduler,
            self.adapters,
            base_name=model.name,
            slo=self._slo,
            policy=policy_of(c.policy),
            max_rows=max_batch_tokens,
            max_jobs=c.max_jobs,
            max_kept_bytes=c.max_capture_bytes,
            host=HostRoom(c.host_bytes, c.host_gb_per_s) if c.host_bytes else None,
            wake=self._wake,
        )
        self._busy_until: float | None = None  # when the step in flight will be done
        self._predicted = 0.0  # seconds of that step
        self._last_fold = 0.0  # perf_counter seconds
        self._counters = Counters()
        self._thread: threading.Thread | None = None

    # --- any thread -------------------------------------------------------------------------
    def submit(self, request: Request, on_output: OnOutput) -> None:
        """Queue a request; ``on_output`` is called from the engine's thread and must be quick.

        Raises:
            InvalidRequest, TooLarge: a field is out of range.
            NotFound: the adapter is not loaded.
            Conflict: a live request has the same id.
            Overloaded: too much is waiting.
            Unavailable: the engine is closed or has failed.
        """
        self._check_open()
        if request.arrival == 0:
            request = replace(request, arrival=time.monotonic())
        wanted, most = adapters_of(request), self.config.max_adapters
        if len(wanted) > most:
            raise InvalidRequest(
                f"the runs of one program use at most {most} adapters here",
                field="interventions",
                given=len(wanted),
                remedy="Ask for fewer at a time, or raise max_adapters",
            )
        adapters: dict[str, Adapter] = {}
        try:
            for name in wanted:
                adapters[name] = self.adapters.hold(name)
            n_virtual = 0 if request.adapter is None else adapters[request.adapter].n_virtual
            validate_request(
                request,
                vocab_size=self.model.config.vocab_size,
                max_model_len=self.longest(request) - n_virtual,
            )
            grammar = request.params.grammar
            matchers: list[Matcher | None] = [
                self._grammars.matcher(grammar) if grammar is not None else None
                for _ in range(request.n)
            ]
            job = make_job(
                request,
                on_output,
                adapters=adapters,
                matchers=matchers,
                tokenizer=self._tokenizer,
                eos_ids=self._eos,
                position_offset=long_text_offset(
                    self.model.config, n_virtual + self._will_grow_to(request)
                ),
            )
            if request.intervention is not None:
                job.program = self._carry(request, request.intervention, job)
            inbox = self._inbox
            with inbox.wake:
                self._check_open()
                if request.id in inbox.live:
                    raise Conflict(
                        "a request with this id is running", field="id", given=request.id
                    )
                most = self.scheduler.limits.max_running + self.config.max_waiting
                if inbox.n_sequences + request.n > most:
                    raise Overloaded(
                        f"{inbox.n_sequences} sequences are running or waiting, at most {most} may",
                        remedy="Try again in a moment",
                    )
                inbox.live[request.id] = request.n
                inbox.n_sequences += request.n
                inbox.submitted.append(job)
                inbox.wake.notify()
        except BaseException:
            for adapter in adapters.values():
                self.adapters.drop(adapter)
            raise

    def _carry(self, request: Request, given: Intervention, job: Job) -> CarriedProgram:
        """The program of a request, checked as far as that goes before anything runs."""
        check_carried(request)
        for adapter in job.adapters.values():
            if adapter.n_virtual:
                raise InvalidRequest(
                    "an adapter with tokens of its own does not go with a program yet",
                    field="adapter",
                    given=adapter.name,
                )
        writes = request.kind != "run"
        program = CarriedProgram(
            given,
            self.model.decoder,
            writes=writes,
            max_bytes=self.config.max_capture_bytes,
            block_size=self.config.block_size,
            adapter=request.adapter,
            versions={name: adapter.version for name, adapter in job.adapters.items()},
            fan_out=self.config.fan_out,
        )
        held = self.scheduler.blocks_total * self.config.block_size
        most = min(self.scheduler.max_length, held)
        for plan in program.plans():
            n = len(plan.prompt.ids)
            if n > most:
                raise TooLarge(
                    f"the prompt of a run has {n} tokens, at most {most} fit",
                    field=f"interventions.runs.{plan.name}",
                    given=n,
                )
            prompt = plan.prompt.ids[: plan.prompt.n_prompt]
            if writes and plan.name == MAIN and tuple(prompt) != request.tokens:
                raise InvalidRequest(
                    "the program was resolved for another prompt", field="interventions"
                )
        return program

    def abort(self, request_id: str) -> None:
        """End a request at once; unknown and finished ids are ignored."""
        with self._inbox.wake:
            if request_id in self._inbox.live:
                self._inbox.aborted.append(request_id)
                self._inbox.wake.notify()

    def finetune(
        self,
        spec: JobSpec,
        data: DataSource,
        on_event: OnEvent,
        folder: str | Path | None = None,
        *,
        validation: DataSource | None = None,
    ) -> JobHandle:
        """Start a job that trains beside the requests, in what they leave.

        Args:
            data: read from the engine's thread, must be quick.
            on_event: called from the engine's thread with a dict: ``event`` (started, step,
                skipped, validation, published, checkpoint, checkpoint_failed, paused, queued,
                resumed, or how it ended: succeeded, failed, cancelled, stopped), ``job``,
                ``time``, and what belongs to it.
            folder: for checkpoints; where it has some, the job goes on from the newest.
            validation: held-out texts, which end; their loss is told every
                ``spec.validate_every`` steps, and at the end.

        Raises:
            InvalidRequest: the bypasses do not fit, or the policy does not train.
            Conflict: a live job has this name, or the checkpoints are of another job.
            Overloaded: too many jobs.
            Unavailable: the engine is closed or has failed.
        """
        self._check_open()
        place = None if folder is None else Path(folder)
        return self._finetuning.add(spec, data, on_event, place, validation)

    def set_policy(self, policy: str) -> None:
        """Share the device between requests and jobs like this from the next iteration on.

        Raises:
            InvalidRequest: no such policy, or one for the simulator alone.
        """
        self._finetuning.set_policy(policy_of(policy))

    @property
    def latency_model(self) -> LatencyModel | None:
        """What iterations are predicted to take; None until there was a job. Do not change it."""
        return self._finetuning.latency

    def _wake(self) -> None:
        with self._inbox.wake:
            self._inbox.wake.notify_all()

    def longest(self, request: Request) -> int:
        """Most tokens that prompt and output of such a request can have together."""
        if request.kind == "generate":
            return self.scheduler.max_length
        held = self.scheduler.blocks_total * self.config.block_size
        return min(self.scheduler.max_length, held)

    def stats(self) -> EngineStats:
        """A snapshot of counters and times."""
        now = time.time()
        c, s = self._counters, self.scheduler
        running = s.n_running
        step = c.step.percentiles(int(now))
        return EngineStats(
            time=now,
            uptime=now - c.started,
            adapters=self.adapters.list(),
            running=running,
            waiting=max(0, self._inbox.n_sequences - running),
            max_running=s.limits.max_running,
            preemptions=s.n_preemptions,
            kv={
                "used": s.blocks_used,
                "total": s.blocks_total,
                "block_size": self.config.block_size,
            },
            prefix={"hits": s.prefix_hits, "queries": s.prefix_queries},
            totals=c.totals(),
            tokens=c.history(now),
            latency=c.latency(now),
            slo={"tpot_ms": self._slo.tpot_ms, "ttft_ms": self._slo.ttft_ms},
            step=step,
            recent=[_listed(record) for record in reversed(list(c.recent))],
            histograms=c.histograms(),
            jobs=self._finetuning.describe(),
        )

    @property
    def failure(self) -> str | None:
        """Why the engine can serve no more, if so."""
        return self._inbox.failure

    def start(self) -> None:
        """Run iterations in a thread of its own until ``close``."""
        assert self._thread is None
        self._thread = threading.Thread(target=self._run, name="invivo-engine", daemon=True)
        self._thread.start()

    def close(self, *, drain: bool = False, timeout: float | None = None) -> None:
        """Refuse new requests and stop; jobs stop at once and can go on from their checkpoints.

        Args:
            drain: let running and waiting requests finish first; otherwise they are cancelled.
            timeout: seconds to drain at most; what is left then is cancelled.
        """
        inbox = self._inbox
        with inbox.wake:
            inbox.closed = True
            if drain and self._thread is not None:
                inbox.wake.wait_for(lambda: not inbox.live, timeout)
            inbox.aborted.extend(inbox.live)
            inbox.wake.notify_all()
        thread = self._thread  # another thread may close it too
        if thread is not None and thread is not threading.current_thread():
            thread.join()
            self._thread = None
        elif thread is None:
            self._finetuning.stop()
            while self.step():
                pass

    # --- the engine's thread ----------------------------------------------------------------
    def step(self) -> bool:
        """One iteration; False when there was nothing to do."""
        took = self._take_in()
        self._unpark()
        self._finetuning.take_orders()
        previous, self._in_flight = self._in_flight, None
        launched, riders = self._launch()
        if previous is not None:
            self._fold(previous)
        if launched is not None:
            if self._overlap:
                self._in_flight = launched
            else:
                self._fold(launched)
        self._finetuning.settle(riders)
        return took or launched is not None or previous is not None

    def _run(self) -> None:
        inbox = self._inbox
        while True:
            with inbox.wake:
                inbox.wake.wait_for(
                    lambda: (
                        inbox.submitted
                        or inbox.aborted
                        or inbox.live
                        or inbox.closed
                        or self._finetuning.busy
                    )
                )
            if inbox.closed:
                self._finetuning.stop()  # without the lock: checkpoints are waited for
                if not inbox.live and self._in_flight is None:
                    return
            try:
                moved = self.step()
                if not moved and self._finetuning.busy:
                    time.sleep(0.001)  # a job waits for memory
                assert moved or not self.scheduler.has_work, "nothing can run though work is left"
            except Exception as error:  # a bug of ours: say so to everyone rather than hang
                log.exception("the engine has failed")
                inbox.failure = f"the engine has failed: {type(error).__name__}"
                self._fail_all(
                    Unavailable(inbox.failure, remedy="Restart the server"), scheduled=False
                )
                self._finetuning.fail_all(error)
                return

    def _take_in(self) -> bool:
        """Move what other threads asked for into the scheduler."""
        inbox = self._inbox
        if not inbox.submitted and not inbox.aborted:
            return False
        with inbox.wake:
            jobs = list(inbox.submitted)
            aborted = list(inbox.aborted)
            inbox.submitted.clear()
            inbox.aborted.clear()
        for job in jobs:
            self._counters.requests += 1
            self._counters.prompt_tokens += job.record.prompt_tokens
            self._counters.recent.append(job.record)
            # First come, first served: nobody overtakes those who wait for adapter slots.
            if (self._parked and job.adapters) or not self._enter(job):
                self._parked.append(job)
        for request_id in aborted:
            self._abort(request_id)
        return True

    def _unpark(self) -> None:
        while self._parked and self._enter(self._parked[0]):
            self._parked.popleft()

    def _enter(self, job: Job) -> bool:
        """Give a request to the scheduler; False when its adapters have to wait for slots."""
        try:
            if not self._place(job):
                return False
            slot, version = job.slot_of(job.request.adapter)
            for track in job.tracks:
                track.seq.adapter_slot = slot
                track.seq.adapter_version = version
            if job.program is not None:
                self._programs[job.request.id] = job
                self._feed(job, job.program)
                return True
            for track in job.tracks:
                self.scheduler.add(track.seq)
                self._tracks[track.seq] = track
        except Exception as error:  # the device may have no room for the adapter
            if not isinstance(error, InvivoError):
                log.exception("request %s could not begin", job.request.id)
            self._end_job(job, _as_typed(error))
        return True

    def _place(self, job: Job) -> bool:
        """Pin all adapters of a job to slots, or none."""
        placed: list[Adapter] = []
        try:
            for adapter in job.adapters.values():
                if not self.adapters.place(adapter):
                    break
                placed.append(adapter)
            job.placed = len(placed) == len(job.adapters)
        finally:
            if not job.placed:
                for adapter in placed:
                    self.adapters.release(adapter)
        return job.placed

    def _abort(self, request_id: str) -> None:
        for job in self._parked:
            if job.request.id == request_id:
                self._parked.remove(job)
                for track in job.tracks:
                    self._finish(track, Output(request_id, track.seq.index), "cancelled")
                return
        carrier = self._programs.get(request_id)
        if carrier is not None:
            (track,) = carrier.tracks
            self._finish(track, Output(request_id), "cancelled")
            return
        for seq in self.scheduler.abort(request_id):
            track = self._tracks[seq]
            self._finish(track, Output(request_id, seq.index), "cancelled")

    def _launch(self) -> tuple[Launched | None, Riders | None]:
        plan: Plan | None = None
        riders: Riders | None = None
        try:
            now = time.monotonic()
            plan = self._finetuning.plan(now, self._busy_until)
            if plan is None:
                self._busy_until = None
                return None, None
            if self._overlap:
                start = max(now, self._busy_until or now)
                self._predicted = self._finetuning.predicted(plan)
                self._busy_until = start + self._predicted
            # What programs left in these blocks need not be finite: before anything runs there.
            self._stepper.clear_blocks(self.scheduler.pool.take_uncleared())
            riders = self._finetuning.board(plan)
            if not plan.spans:
                assert riders is not None
                return (self._stepper.train(plan, riders) if riders.units else None), riders
            batch, partial, work = self._prepare(plan)
            launched: Launched | None
            try:
                launched = self._stepper.launch(batch, work, riders, partial)
            except Exception as error:
                if riders is None:
                    raise
                launched = self._launch_without(riders, plan, error)
            self._end_failed_programs(plan, work)
            return launched, riders
        except Exception as error:
            if riders is not None:
                self._finetuning.dropped(riders, None)
            self._step_failed(plan, error)
            return None, riders

    def _launch_without(self, riders: Riders, plan: Plan, error: Exception) -> Launched | None:
        """The step raised with training on board: again without. If it runs, training did it."""
        plan.spans = [span for span in plan.spans if span.purpose is not Purpose.TRAIN]
        plan.n_tokens = sum(span.stop - span.start for span in plan.spans)
        plan.backward = []
        launched = None
        if plan.spans:
            batch, partial, work = self._prepare(plan)
            launched = self._stepper.launch(batch, work, None, partial)
        self._finetuning.dropped(riders, error)
        return launched

    def _end_failed_programs(self, plan: Plan, work: Work) -> None:
        """End the requests whose own operations raised in this step; the others have gone on.

        Who shares keys that such a run should have changed in this very step ends with it.
        """
        if not _has_failed(work):
            return
        failed: dict[str, tuple[Job, Exception]] = {}
        spoiled: dict[int, Exception] = {}
        for span in plan.spans:
            run = self._runs.get(span.seq)
            if run is None or run.edits.error is None:
                continue
            failed[span.seq.request.id] = self._programs[span.seq.request.id], run.edits.error
            if run.edits.spoiled:
                spoiled |= dict.fromkeys(self.scheduler.spoil(span), run.edits.error)
        for span in plan.spans:
            shared = next((spoiled[b] for b in span.seq.blocks if b in spoiled), None)
            if shared is not None and span.seq in self._runs:
                failed.setdefault(
                    span.seq.request.id, (self._programs[span.seq.request.id], shared)
                )
        for job, error in failed.values():
            if not isinstance(error, InvivoError):
                log.warning("the program of request %s failed", job.request.id, exc_info=error)
            self._end_job(job, _of_program(error))

    def _prepare(self, plan: Plan) -> tuple[FlatBatch, FlatBatch | None, Work]:
        """The plan's flat batch, that of its partial spans if there are any, and their work."""
        batch = self._builder.build(plan)
        partial = self._partial_builder.build_partial(plan) if plan.n_partial else None
        work = self._work(plan, batch)
        if partial is not None:
            work.partial = [self._runs[span.seq].edits for span in partial.spans]
        return batch, partial, work

    def _work(self, plan: Plan, batch: FlatBatch) -> Work:
        """What the plan's sequences want beyond their forward pass."""
        for seq in plan.admitted:
            job = self._job_of(seq)
            if seq.n_preempted == 0 and job is not None:
                self._admitted(job.tracks[seq.index])
        if batch.decodes is not None and not plan.n_partial:
            lasting = self._lasting_work(batch.decodes)
            positions = list(map(operator.sub, batch.layout.kv_len_host, lasting.prompts))
            return Work(lasting.rows, positions, edited=lasting.edited, greedy=lasting.greedy)
        work = Work([], [])
        for i in batch.sample_spans:
            span = plan.spans[i]
            work.rows.append(self._tracks[span.seq].state)
            work.positions.append(span.stop - span.seq.n_prompt)
        for i in range(len(plan.spans)):
            span = plan.spans[i]
            if span.purpose is Purpose.TRAIN:
                continue
            run = self._runs.get(span.seq)
            if run is not None and not span.seq.is_partial:
                work.edited.append((i, run.edits))
            if span.purpose is Purpose.DECODE or span.seq not in self._tracks:
                continue
            if span.seq.request.kind == "embed":
                work.pooled.append((i, span.seq.request.pooling))
            elif (wanted := self._scored_rows(i, span)) is not None:
                work.scored.append(wanted)
        return work

    def _lasting_work(self, decodes: Decodes) -> _LastingWork:
        """What ``decodes`` want: worked out once for as long as they come again."""
        lasting = self._lasting
        if lasting is None or lasting.decodes is not decodes:
            rows = [self._tracks[seq].state for seq in decodes.seqs]
            runs = [(i, self._runs.get(seq)) for i, seq in enumerate(decodes.seqs)]
            self._lasting = lasting = _LastingWork(
                decodes,
                rows,
                [seq.n_prompt for seq in decodes.seqs],
                [(i, run.edits) for i, run in runs if run is not None],
                all(row.plain_greedy for row in rows),
            )
        return lasting

    def _scored_rows(self, index: int, span: Span) -> ScoredRows | None:
        """The prompt tokens that this span's rows predict, where they are asked for."""
        track = self._tracks[span.seq]
        if not track.scored or (track.prompt_sent and span.seq.request.kind == "generate"):
            return None
        first = max(span.start + 1, track.scored_from)
        last = min(span.stop, span.seq.n_prompt - 1)
        if first > last:
            return None
        wanted = span.seq.request.params.prompt_logprobs or 0
        return ScoredRows(index, first, span.seq.tokens[first : last + 1], wanted)

    def _fold(self, launched: Launched) -> None:
        plan = launched.plan
        try:
            result = self._stepper.collect(launched)
        except Exception as error:
            self._step_failed(plan, error)
            return
        now = time.monotonic()
        if self._busy_until is not None:
            # The step in flight has begun by now: what was predicted too long must not add up.
            self._busy_until = min(self._busy_until, now + self._predicted)
        second = int(time.time())
        counters = self._counters
        by_purpose = [0, 0, 0, 0]
        for span in plan.spans:
            by_purpose[span.purpose] += span.stop - span.start
        counters.count_tokens(by_purpose, second)  # first: who has an answer finds it counted
        gaps: list[float] = []
        for i, span in enumerate(plan.spans):
            if span.purpose is Purpose.TRAIN:
                continue
            track = self._tracks.get(span.seq)
            job = self._job_of(span.seq) if track is None else track.job
            try:
                self._fold_span(i, span, track, result, now, gaps)
            except Exception as error:
                if not isinstance(error, InvivoError):
                    log.exception("an output could not be handled")
                if job is not None:
                    self._end_job(job, _as_typed(error))
        ended = time.perf_counter()
        took = result.device_seconds
        if took is None:
            took = ended - max(launched.started, self._last_fold)
        self._finetuning.folded(plan, took, now)
        self._last_fold = ended
        n_layers = self.model.config.n_layers
        for unit in plan.backward:
            rows, layers = unit.stop - unit.start, unit.last_layer - unit.first_layer
            counters.count_backward(rows * layers / n_layers, second)
        counters.step.add([result.seconds], second)
        if gaps:
            counters.itl.add(gaps, second)

    def _fold_span(
        self,
        i: int,
        span: Span,
        track: Track | None,
        result: StepResult,
        now: float,
        gaps: list[float],
    ) -> None:
        seq = span.seq
        if span.samples and not self.scheduler.record(seq, result.tokens[i]):
            return
        if track is None:  # a run without text, or ended while the step ran
            if seq in self._runs and span.stop == seq.n_prompt:
                self._run_through(seq, now)
            return
        if i in result.scored:
            first = max(span.start + 1, track.scored_from) - track.scored_from
            for offset, record in enumerate(result.scored[i]):
                track.scored[first + offset] = record
        if span.samples:
            self._token(track, result.tokens[i], result.logprobs.get(i), now, gaps)
        elif seq.request.kind != "generate" and span.stop == seq.n_prompt:
            output = Output(seq.request.id, embedding=result.embeddings.get(i))
            if seq.request.kind == "score":
                output.prompt_logprobs = [r for r in track.scored if r is not None]
            self._first_output(track, now)
            self._finish(track, output, "stop")

    def _token(
        self,
        track: Track,
        token: int,
        logprob: TokenLogprob | None,
        now: float,
        gaps: list[float],
    ) -> None:
        """One more token of a generation: settle its text, see whether it ends."""
        seq = track.seq
        if track.last_token:
            gaps.append(now - track.last_token)
        else:
            self._first_output(track, now)
        track.last_token = now
        track.job.record.output_tokens += 1
        self._counters.generated += 1
        if track.state.counts is not None:
            track.state.counts.update(seq.tokens, seq.n_prompt)
        output = Output(seq.request.id, seq.index, [token], cached_tokens=_cached(seq))
        if logprob is not None:
            output.logprobs = [logprob]
        if not track.prompt_sent:
            track.prompt_sent = True
            output.prompt_logprobs = [r for r in track.scored if r is not None]
        reason = track.advance(token, output, self._eos)
        if reason is not None:
            if gaps:
                self._counters.itl.add(gaps, int(time.time()))
                gaps.clear()
            self._finish(track, output, reason)
        else:
            self._send(track.job, output)

    # --- programs ---------------------------------------------------------------------------
    def _feed(self, job: Job, program: CarriedProgram) -> None:
        """Queue the runs that may begin, a window of them at most."""
        (track,) = job.tracks
        window = max(1, min(_RUNS_AT_ONCE, self.scheduler.limits.max_running // 2))
        for run in program.next_runs(window):
            plan, request = run.plan, job.request
            if program.writes and run.is_main:
                seq = track.seq
                self._tracks[seq] = track
                ids = list(request.tokens)
            else:
                ids = list(plan.prompt.ids)
                adapter = plan.adapter or request.adapter
                slot, version = job.slot_of(adapter)
                own = Request(
                    id=request.id,
                    tokens=tuple(ids),
                    kind="run",
                    adapter=adapter,
                    salt=request.salt,
                    priority=request.priority,
                    # A long sweep queues like requests that come one after the other.
                    arrival=time.monotonic() if program.started else request.arrival,
                )
                seq = Sequence(
                    request=own,
                    index=0,
                    tokens=ids,
                    n_prompt=len(ids),
                    adapter_slot=slot,
                    adapter_version=version,
                    position_offset=long_text_offset(self.model.config, len(ids)),
                )
            for at, token in plan.input.tokens:
                ids[at] = token
            seq.tokens[: len(ids)] = ids
            seq.numbers = plan.input.numbers
            program.share(run, seq)
            seq.recomputed_from = run.edits.first_kept
            seq.onset, seq.last_layer = run.onset, run.n_layers
            program.live[seq] = run
            self._runs[seq] = run
            self.scheduler.add(seq)
        program.started = True

    def _run_through(self, seq: Sequence, now: float) -> None:
        """A run without text has gone through the model."""
        job = self._programs[seq.request.id]
        program = job.program
        assert program is not None
        run = program.live.pop(seq)
        if run.is_trunk:
            program.hold(run, self.scheduler.hold_blocks(seq))
        self._end_run(seq)
        program.run_done(run)
        if program.complete:
            (track,) = job.tracks
            self._first_output(track, now)
            output = Output(job.request.id, program=program.output())
            self._finish(track, output, "stop")
        else:
            self._feed(job, program)

    def _end_run(self, seq: Sequence) -> None:
        """Free what a run's sequence holds."""
        del self._runs[seq]
        self._lasting = None  # what the run has kept is not to stay
        self.scheduler.finish(seq)

    def _end_program(self, job: Job, output: Output, reason: FinishReason) -> None:
        """All runs of a request end; the program of a text that is written gives its results."""
        program = job.program
        assert program is not None
        seq = job.tracks[0].seq
        if program.writes and reason in ("stop", "length"):
            run = program.live.pop(seq)
            n_through = len(seq.tokens) - (job.request.kind == "generate")
            program.run_done(run, n_through)
            output.program = program.output()
        for live in [*program.live, seq]:
            if live in self._runs:
                self._end_run(live)
        program.live.clear()
        for memory in program.take_memory():
            self.scheduler.drop_blocks(memory)
        self._programs.pop(job.request.id, None)

    def _job_of(self, seq: Sequence) -> Job | None:
        track = self._tracks.get(seq)
        if track is not None:
            return track.job
        return self._programs.get(seq.request.id) if seq in self._runs else None

    # --- beginnings and ends ----------------------------------------------------------------
    def _admitted(self, track: Track) -> None:
        record = track.job.record
        if record.state == "waiting":
            record.state = "running"
            record.cached_tokens = _cached(track.seq)
            now = time.time()
            self._counters.queue.add([max(0.0, now - record.started)], int(now))

    def _first_output(self, track: Track, now: float) -> None:
        job = track.job
        if job.first_token:
            return
        job.first_token = now
        wall = time.time()
        job.record.ttft = wall - job.record.started
        if job.request.kind == "generate":
            self._counters.ttft.add([job.record.ttft], int(wall))

    def _finish(self, track: Track, output: Output, reason: FinishReason) -> None:
        """End a sequence, with its last output."""
        job, seq = track.job, track.seq
        assert not track.ended
        if job.program is not None:
            self._end_program(job, output, reason)
        output.finish_reason = reason
        output.cached_tokens = _cached(seq)
        if seq in self._tracks:
            self.scheduler.finish(seq)
            del self._tracks[seq]
        track.ended = True
        self._stepper.forget(seq)
        job.unfinished -= 1
        if job.unfinished == 0:
            output.final = True
            self._job_ended(job, reason)
        with self._inbox.wake:
            self._inbox.n_sequences -= 1
            if job.unfinished == 0:
                self._inbox.live.pop(job.request.id, None)
                self._inbox.wake.notify_all()
        self._send(job, output)

    def _job_ended(self, job: Job, reason: FinishReason) -> None:
        for adapter in job.adapters.values():
            if job.placed:
                self.adapters.release(adapter)
            self.adapters.drop(adapter)
        now = time.time()
        record = job.record
        record.state = reason
        record.e2e = now - record.started
        later = record.output_tokens - job.request.n
        if record.ttft is not None and later > 0:
            record.tpot = (record.e2e - record.ttft) * job.request.n / later
        self._counters.ends[reason] += 1
        if reason in ("stop", "length"):
            self._counters.e2e.add([record.e2e], int(now))

    def _send(self, job: Job, output: Output) -> None:
        try:
            job.on_output(output)
        except Exception:
            log.exception("the receiver of request %s failed; it is cancelled", job.request.id)
            self.abort(job.request.id)

    # --- failures ---------------------------------------------------------------------------
    def _end_job(self, job: Job, error: InvivoError) -> None:
        """End all sequences of a request with an error."""
        for track in job.tracks:
            if not track.ended:
                output = Output(job.request.id, track.seq.index, error=error)
                self._finish(track, output, "error")

    def _step_failed(self, plan: Plan | None, error: Exception) -> None:
        """A step raised: end the requests of its plan, keep the others."""
        log.error("a step failed", exc_info=error)
        typed = _as_typed(error)
        if plan is None:
            self._fail_all(typed)
            return
        jobs = {id(j): j for s in self.scheduler.failed(plan) if (j := self._job_of(s))}
        for job in jobs.values():
            self._end_job(job, typed)
        if self.device.type == "cuda" and not _device_lives(self.device):
            self._inbox.failure = f"the device has failed: {type(error).__name__}"
            self._fail_all(Unavailable(self._inbox.failure, remedy="Restart the server"))

    def _fail_all(self, error: InvivoError, *, scheduled: bool = True) -> None:
        """End every request; ``scheduled`` False does it without a scheduler that has failed."""
        jobs = {id(track.job): track.job for track in self._tracks.values()}
        jobs |= {id(job): job for job in self._programs.values()}
        if not scheduled:
            self._tracks.clear()
            self._runs.clear()
        jobs |= {id(job): job for job in self._parked}
        self._parked.clear()
        for job in jobs.values():
            self._end_job(job, error)
        # Requests that arrive just now meet the same end.
        with self._inbox.wake:
            late = list(self._inbox.submitted)
            self._inbox.submitted.clear()
        for job in late:
            self._end_job(job, error)

    def _will_grow_to(self, request: Request) -> int:
        """Most tokens that a sequence of the request will have."""
        if request.kind != "generate":
            return len(request.tokens)
        if request.params.max_tokens is None:
            return self.scheduler.max_length
        return len(request.tokens) + request.params.max_tokens

    def _check_open(self) -> None:
        if self._inbox.failure is not None:
            raise Unavailable(self._inbox.failure, remedy="Restart the server")
        if self._inbox.closed:
            raise Unavailable("the engine is closed", remedy="Open a new one")


def _cached(seq: Sequence) -> int:
    """Cached tokens of the prompt that the caller gave."""
    return max(0, seq.n_cached - seq.n_virtual)


def _has_failed(work: Work) -> bool:
    """Whether an operation of a program has raised; asked in every step, so without ado."""
    for _, edits in work.edited:
        if edits.error is not None:
            return True
    return any(edits.error is not None for edits in work.partial)


def _as_typed(error: Exception) -> InvivoError:
    if isinstance(error, InvivoError):
        return error
    typed = InvivoError(f"the engine could not run this request: {type(error).__name__}")
    typed.__cause__ = error
    return typed


def _of_program(error: Exception) -> InvivoError:
    """What a program's own operations raised, as its user sees it."""
    if isinstance(error, InvivoError):
        return error
    large = isinstance(error, torch.OutOfMemoryError | MemoryError)
    typed = (TooLarge if large else InvalidRequest)(
        "the program takes more memory than there is"
        if large
        else f"an operation of the program failed: {type(error).__name__}: {error}",
        field="interventions",
    )
    typed.__cause__ = error
    return typed


def _device_lives(device: torch.device) -> bool:
    """Whether the device still answers; after some errors it never does."""
    try:
        torch.cuda.synchronize(device)
    except Exception:
        return False
    return True


def _listed(record: RequestRecord) -> dict[str, object]:
    return {name: getattr(record, name) for name in RequestRecord.__slots__}
