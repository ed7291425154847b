"""Fine-tuning beside serving: the jobs of an engine, from their start to their last version.

The policy (:mod:`invivo.engine.coserve`) decides which pieces of training join an iteration. Here
they are carried out: windows in the flat batch, backward units after it, and between iterations
what follows when a text is through: optimizer steps, versions, checkpoints, events. Nothing that a
job does wrong reaches a request: its errors end the job alone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from invivo.engine.adapters import AdapterStore
from invivo.engine.checkpoint import CheckpointWriter, checkpoints, read_checkpoint, step_of
from invivo.engine.closings import Part
from invivo.engine.coserve import Coserver, Sizes, servable, work_of
from invivo.engine.host_placement import HostRoom
from invivo.engine.host_shelf import HostShelf
from invivo.engine.job_spec import DataSource, JobSpec, OnEvent
from invivo.engine.latency import LatencyModel, Sample
from invivo.engine.latency_profile import ENOUGH, first_profile
from invivo.engine.peft_format import to_peft
from invivo.engine.policies import Policy, Slo
from invivo.engine.recording import Recording
from invivo.engine.run_edits import RunEdits
from invivo.engine.scheduler import Scheduler
from invivo.engine.training_rows import Rows, TrainingRows
from invivo.engine.transfer import index_on
from invivo.engine.tuning_job import State, TuningJob
from invivo.engine.types import BackwardUnit, Plan, Purpose, Sequence, Span
from invivo.errors import Conflict, InvalidRequest, InvivoError, Overloaded, Unavailable
from invivo.kernels.paging import PagedLayout
from invivo.models.bypass import Bypass
from invivo.models.cache import KVCache
from invivo.models.decoder import Decoder
from invivo.models.sites import Taps

log = logging.getLogger(__name__)

Command = Literal["start", "pause", "resume", "cancel", "stop"]
# Seconds and iterations without a piece of training after which a job says what it waits for: one
# stall of the machine is no such wait.
_LONG, _MANY = 10.0, 16
_AGAIN = 600.0  # and between two such events
PAUSED = 4  # jobs in memory, as a multiple of those that may run
ENDED = ("succeeded", "failed", "cancelled", "stopped")


class JobHandle:
    """A job in the hands of whoever asked for it; usable from any thread.

    ``pause`` gives back the job's memory at once: the text under way begins anew on ``resume``.
    ``stop`` ends the job so that it can go on from its folder; both write a checkpoint first.
    ``cancel`` ends the job; versions that it has published stay.
    """

    def __init__(self, job: TuningJob, order: Callable[[TuningJob, Command], None]) -> None:
        self._job = job
        self._order = order
        self.ended = threading.Event()

    @property
    def name(self) -> str:
        return self._job.name

    @property
    def state(self) -> State:
        return self._job.state

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._job.step

    @property
    def losses(self) -> list[float]:
        """Of every optimizer step, per labelled token."""
        return self._job.losses.copy()

    @property
    def error(self) -> Exception | None:
        """Why the job failed, or what stopped its last checkpoint."""
        return self._job.error

    def pause(self) -> None:
        self._order(self._job, "pause")

    def resume(self) -> None:
        self._order(self._job, "resume")

    def cancel(self) -> None:
        self._order(self._job, "cancel")

    def stop(self) -> None:
        self._order(self._job, "stop")

    def join(self, timeout: float | None = None) -> State:
        """Wait until the job has ended, ``timeout`` seconds at most; its state then."""
        self.ended.wait(timeout)
        return self.state


@dataclass(slots=True)
class Riders:
    """The pieces of training of one plan; ``failed`` gathers the jobs whose piece raised."""

    decoder: Decoder
    cache: KVCache
    # With the index of its first span; one window has a span for each of its texts.
    windows: list[tuple[TuningJob, int, Span]] = field(default_factory=list)
    units: list[tuple[TuningJob, BackwardUnit]] = field(default_factory=list)
    failed: dict[TuningJob, Exception] = field(default_factory=dict)

    def on_board(
        self, inner: Bypass | None, layout: PagedLayout
    ) -> tuple[Bypass | None, Taps | None]:
        """Bypass and taps of the flat batch; ``inner`` is what its other rows have."""
        parts, pieces = [], []
        for job, i, span in self.windows:
            first = layout.span_start_host[i]
            if self.cache.states is not None:
                assert job.sequence is not None
                job.trainer.enters(job.sequence, span.start, span.seq.row + 1)
            assert job.sequence is not None
            bypass = job.trainer.bypass_of(span.start, span.stop, job.sequence.begins)
            if bypass is None:
                continue
            parts.append(Rows(first, first + span.stop - span.start, bypass))
            if job.trainer.records and not job.sequence.held_out:
                pieces.append(job.trainer.piece(job.sequence, span.start, span.stop, first))
        if not parts:
            return inner, None
        rows = TrainingRows(inner, parts)
        if not pieces:
            return rows, None
        recording = Recording(self.decoder, self.cache, rows, pieces)
        return recording.bypass, recording

    @property
    def edited(self) -> list[tuple[int, RunEdits]]:
        """The windows that run under a program."""
        found = []
        for job, i, _ in self.windows:
            assert job.sequence is not None
            if job.sequence.edits is not None:
                found.append((i, job.sequence.edits))
        return found

    def learn(self, hidden: torch.Tensor | None, layout: PagedLayout | None) -> None:
        """Losses of the windows that ran, then the backward units."""
        for job, i, span in self.windows:
            assert hidden is not None
            assert layout is not None
            assert job.sequence is not None
            first, n = layout.span_start_host[i], span.stop - span.start
            try:
                if job.sequence.edits is not None and job.sequence.edits.error is not None:
                    raise job.sequence.edits.error
                states = hidden[first : first + n].clone()
                job.trainer.forward_done(job.sequence, span.start, span.stop, states)
                job.forward_tokens += n
            except Exception as error:
                self.failed[job] = error
        for job, unit in self.units:
            if job in self.failed:
                continue
            assert job.sequence is not None
            try:
                job.trainer.run(job.sequence, unit)
            except Exception as error:
                self.failed[job] = error
            layers = unit.last_layer - unit.first_layer
            job.backward_tokens += (unit.stop - unit.start) * layers / job.n_layers


class FineTuning:
    """The jobs of one engine.

    ``add``, ``describe``, ``busy`` and the handles are for any thread, the rest for the engine's.

    Args:
        base_name: of the model, as adapter files name it.
        max_rows: rows of a flat batch.
        max_jobs: jobs at once; paused ones keep their parameters and no place. One that is resumed
            while all places are taken stands in line, before newcomers.
        max_kept_bytes: most that the runs of a trained program keep for each other.
        host: memory for the jobs' tapes.
        wake: called when the engine's thread has something to do.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        scheduler: Scheduler,
        adapters: AdapterStore,
        *,
        base_name: str,
        slo: Slo,
        policy: Policy,
        max_rows: int,
        max_jobs: int,
        max_kept_bytes: int,
        host: HostRoom | None,
        wake: Callable[[], None],
    ) -> None:
        self._decoder = decoder
        self._cache = cache
        self._scheduler = scheduler
        self._adapters = adapters
        self._base_name = base_name
        self._slo = slo
        self._policy = policy
        self._max_rows = max_rows
        self._max_jobs = max_jobs
        self._max_kept_bytes = max_kept_bytes
        self._shelf = None if host is None else HostShelf(host, decoder.embed.device)
        self._wake = wake
        self._lock = threading.Lock()
        self._jobs: list[TuningJob] = []  # that have not ended
        self._past: deque[TuningJob] = deque(maxlen=16)
        self._line: deque[TuningJob] = deque()  # resumed, without a place yet
        self._handles: dict[TuningJob, JobHandle] = {}
        self._orders: deque[tuple[TuningJob, Command]] = deque()
        self._coserver: Coserver | None = None
        self._seen: deque[Sample] = deque(maxlen=4 * ENOUGH)  # iterations before the first job
        self._measured: deque[tuple[str, Part, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._stopped = False
        # Seconds of ends of steps launched since the last plan, and before it: a device may still
        # be at them when the plan's work is launched.
        self._just_closed = self._before_plan = 0.0

    # --- any thread -------------------------------------------------------------------------
    def add(
        self,
        spec: JobSpec,
        data: DataSource,
        on_event: OnEvent,
        folder: Path | None,
        validation: DataSource | None = None,
    ) -> JobHandle:
        """See :meth:`invivo.engine.engine.Engine.finetune`."""
        if self._policy.name == "none":
            raise InvalidRequest(
                "this engine does not train", field="policy", given="none", remedy="Try co-serve"
            )
        writer = None
        config = self._decoder.config
        if folder is not None:
            writer = CheckpointWriter(
                folder, config, self._base_name, keep=spec.keep, done=self._wake
            )
        job = TuningJob(
            spec,
            data,
            on_event,
            self._decoder,
            self._cache,
            writer,
            validation,
            self._max_kept_bytes,
            self._max_rows,
            self._shelf,
        )
        if job.program is None:
            self._adapters.check(spec.name, job.specs, job.parameters)
        if folder is not None:
            if job.program is None:  # refuse now, not later
                to_peft(job.specs, job.parameters, config, self._base_name)
            for path in checkpoints(folder)[-1:]:
                job.restore(read_checkpoint(path, job.specs), path)
        handle = JobHandle(job, self._order)
        with self._lock:
            if self._stopped:
                raise Unavailable("the engine is closed", remedy="Open a new one")
            if any(other.name == spec.name for other in self._jobs):
                raise Conflict("a job of this name has not ended", field="name", given=spec.name)
            live = sum(other.state != "paused" for other in self._jobs)
            if live >= self._max_jobs or len(self._jobs) >= PAUSED * self._max_jobs:
                raise Overloaded(
                    f"{live} jobs run and {len(self._jobs) - live} are paused, "
                    f"at most {self._max_jobs} may run",
                    remedy="Wait for one, cancel one, or raise max_jobs",
                )
            self._jobs.append(job)
            self._handles[job] = handle
        self._order(job, "start")
        return handle

    @property
    def busy(self) -> bool:
        """Whether the engine's thread has something to do here."""
        if self._orders:
            return True
        with self._lock:
            return any(
                job.state == "running"
                or (job.state == "queued" and job not in self._line)
                or (job.writer is not None and job.writer.ready)
                for job in self._jobs
            )

    @property
    def latency(self) -> LatencyModel | None:
        """What the policy predicts with; None until there was a job."""
        return None if self._coserver is None else self._coserver.latency

    def set_policy(self, policy: Policy) -> None:
        """Share the device like this from the next iteration on."""
        self._policy = servable(policy)
        if self._coserver is not None:
            self._coserver.policy = policy
            self._coserver.forget_lateness()

    def describe(self) -> list[dict[str, Any]]:
        """Every job, ended ones (the latest few) first."""
        with self._lock:
            return [job.describe() for job in (*self._past, *self._jobs)]

    def _order(self, job: TuningJob, command: Command) -> None:
        self._orders.append((job, command))
        self._wake()

    # --- before an iteration ----------------------------------------------------------------
    def take_orders(self) -> None:
        """Do what the handles have asked for."""
        while self._orders:
            job, command = self._orders.popleft()
            if job.state in ENDED:
                continue
            if command == "cancel":
                self._end(job, "cancelled")
            elif command == "stop":
                self._stop(job)
            elif command == "pause" and (job.state == "running" or job in self._line):
                self._leave_line(job)
                self._pause(job, "asked for")
                self._guarded(job, self._save)
            elif command == "start":
                job.state = "running"
                came_from = None if job.resumed_from is None else str(job.resumed_from)
                self._tell(job, {"event": "started", "step": job.step, "from": came_from})
                self._guarded(job, self._go_on)
            elif command == "resume" and job.state == "paused":
                self._line.append(job)
                job.state = "queued"
                if not self._has_place():
                    self._tell(job, {"event": "queued", "step": job.step})
        self._admit()

    def _has_place(self) -> bool:
        placed = sum(job.state != "paused" and job not in self._line for job in self._jobs)
        return placed < self._max_jobs

    def _admit(self) -> None:
        """Let those in line go on, as far as there are places."""
        while self._line and self._has_place():
            job = self._line.popleft()
            job.state = "running"
            self._tell(job, {"event": "resumed", "step": job.step})
            self._guarded(job, self._go_on)

    def _leave_line(self, job: TuningJob) -> None:
        if job in self._line:
            self._line.remove(job)

    def plan(self, now: float, busy_until: float | None) -> Plan | None:
        """The next iteration, training in it where it fits."""
        if not self._scheduler.has_work:
            for job in self._jobs.copy():
                if job.state == "running" and job.closing is not None:
                    self._guarded(job, self._close_step)  # nobody is here to mind
        running = [job for job in self._jobs if job.state == "running"]
        if not running:
            return self._scheduler.schedule(now)
        if self._coserver is None:
            profile = first_profile(
                self._decoder,
                self._seen,
                max_rows=self._max_rows,
                block_size=self._scheduler.limits.block_size,
                busy=self._scheduler.has_work,
            )
            self._coserver = Coserver(
                self._scheduler,
                LatencyModel(profile),
                self._slo,
                self._policy,
                # Without requests an arrival waits no longer than between two of its tokens.
                sizes=Sizes(quantum_ms=self._slo.tpot_ms * self._slo.burst),
            )
        self._take_times()
        trainees = [job for job in running if job.closing is None]
        closings = [
            job.closing
            for job in running
            # A disk that is slower than training holds up its job and nobody else.
            if job.closing is not None and not (job.writer is not None and job.writer.busy)
        ]
        self._before_plan, self._just_closed = self._just_closed, 0.0
        start = max(now, busy_until or now) + self._before_plan
        return self._coserver.plan(now, trainees, busy_until=start, closings=closings)

    def predicted(self, plan: Plan) -> float:
        """Seconds that ``plan`` will take; 0 while nothing was ever trained."""
        if self._coserver is None:
            return 0.0
        closings = [job.closing for job in self._jobs if job.name in plan.closing]
        ends = sum(self._coserver.closings.seconds(one) for one in closings if one is not None)
        return self._coserver.latency.predict(work_of(plan)) + ends + self._before_plan

    def board(self, plan: Plan) -> Riders | None:
        """Begin and interrupt texts as the plan says, end optimizer steps; its pieces of training,
        if any."""
        for name in plan.closing:
            for job in self._jobs.copy():
                if job.name == name:
                    self._guarded(job, self._close_step)
        for seq in plan.reclaimed:
            self._interrupt(self._job_of(seq))
        riders = Riders(self._decoder, self._cache)
        for seq in plan.held:
            job = self._job_of(seq)
            try:
                job.begin()
            except Exception as error:  # no memory for what the forward keeps
                riders.failed[job] = error
                self._interrupt(job)
                plan.spans = [span for span in plan.spans if span.seq is not seq]
                plan.n_tokens = sum(span.stop - span.start for span in plan.spans)
        for i, span in enumerate(plan.spans):
            if span.purpose is not Purpose.TRAIN:
                continue
            job, at = self._job_of(span.seq), i
            if riders.windows and riders.windows[-1][0] is job:  # of the next text of a window
                _, at, before = riders.windows.pop()
                span = Span(span.seq, before.start, span.stop, Purpose.TRAIN, False)
            riders.windows.append((job, at, span))
        by_name = {job.name: job for job in self._jobs}
        riders.units = [(by_name[unit.job], unit) for unit in plan.backward]
        moving = {job.name for job, _, _ in riders.windows} | {unit.job for unit in plan.backward}
        self._note_waits(moving.union(plan.closing))
        return riders if riders.windows or riders.units or riders.failed else None

    def _note_waits(self, moving: set[str]) -> None:
        """Have jobs that get nothing for long say why: a promise may leave training nothing."""
        now = time.monotonic()
        for job in self._jobs:
            if job.name in moving or job.state != "running":
                job.idle_since = job.waits_for = None
                job.n_idle = 0
                continue
            job.n_idle += 1
            if job.idle_since is None:
                job.idle_since = now
            elif now - job.idle_since >= _LONG and job.n_idle >= _MANY:
                job.waits_for = self._obstacle(job, now)
                if job.told_waiting is None or now - job.told_waiting >= _AGAIN:
                    job.told_waiting = now
                    event = {"event": "waiting", "step": job.step, "reason": job.waits_for}
                    self._tell(job, event)

    def _obstacle(self, job: TuningJob, now: float) -> str:
        if job.closing is not None and job.writer is not None and job.writer.busy:
            return "its last checkpoint is still being written"
        assert self._coserver is not None
        return self._coserver.obstacle(now)

    # --- after an iteration -----------------------------------------------------------------
    def folded(self, plan: Plan, seconds: float, at: float) -> None:
        """The plan's tokens are known since ``at``; it took ``seconds``."""
        work, seconds = work_of(plan), max(seconds, 1e-6)
        if self._coserver is None:
            self._seen.append(Sample(work, seconds))
        else:
            self._coserver.latency.record(work, seconds)
            self._coserver.folded(plan, at)

    def dropped(self, riders: Riders, error: Exception | None) -> None:
        """The pieces did not run: their texts begin anew; with ``error`` their jobs fail."""
        for job in {job for job, _, _ in riders.windows} | {job for job, _ in riders.units}:
            self._interrupt(job)
            if error is not None:
                riders.failed[job] = error

    def settle(self, riders: Riders | None) -> None:
        """Take what the iteration has finished: texts, optimizer steps, failures, checkpoints."""
        if riders is not None:
            for job, error in riders.failed.items():
                self._fail(job, error)
        for job in self._jobs.copy():
            if job.state == "running" and job.through():
                self._guarded(job, self._text_through)
            if job.state == "running":
                self._guarded(job, self._tell_known_steps)
            if job.writer is not None and job.writer.ready:
                self._written(job, job.writer.outcome())
        self._admit()

    def stop(self) -> None:
        """End all jobs as they are: they can go on from a last checkpoint."""
        with self._lock:
            self._stopped = True
        self._orders.clear()
        for job in self._jobs.copy():
            self._stop(job)

    def fail_all(self, error: Exception) -> None:
        """The engine has failed, and all jobs with it."""
        with self._lock:
            self._stopped = True
        for job in self._jobs.copy():
            job.error = error
            self._close(job, "failed", {"error": str(error)})

    # --- a job's course ---------------------------------------------------------------------
    def _text_through(self, job: TuningJob) -> None:
        full = job.take_text()
        self._free(job)
        if full:
            job.closing = job.due(time.monotonic())
            if self._policy.sharing != "fill" or not self._scheduler.has_work:
                self._close_step(job)
            elif self._coserver is not None and self._coserver.closes_at_once(job.closing):
                if self._on_gpu:
                    self._just_closed += self._coserver.closings.seconds(job.closing)
                self._close_step(job)
            return
        self._go_on(job)

    def _close_step(self, job: TuningJob) -> None:
        job.closing = None
        self._step_done(job)
        self._go_on(job)

    def _step_done(self, job: TuningJob) -> None:
        with self._timed(job, "optimizer"):
            job.optimize()
        if job.complete:
            return
        spec = job.spec
        if spec.publish_every and job.step % spec.publish_every == 0:
            self._publish(job)
        if job.writer and spec.checkpoint_every and job.step % spec.checkpoint_every == 0:
            self._checkpoint(job)

    def _go_on(self, job: TuningJob) -> None:
        """The next text, or the end."""
        if job.sequence is not None or job.closing is not None or job.state != "running":
            return
        longest = self._scheduler.longest_training
        if self._validates(job, longest):
            return
        if not job.complete and not job.next_text(longest):
            if job.has_gradients:
                self._step_done(job)
            job.complete = True
        if not job.complete or job.state != "running" or self._validates(job, longest):
            return
        self._publish(job)
        if job.writer is None:
            self._end(job, "succeeded")
        else:
            self._checkpoint(job)
            if job.state == "running":
                job.state = "finishing"

    def _validates(self, job: TuningJob, longest: int) -> bool:
        """Whether a held-out text is next; it is at hand then."""
        self._tell_steps(job, wait=job.validation_due)
        if not job.validation_due:
            return False
        if job.next_held_out(longest):
            return True
        self._tell(job, job.validated())
        return False

    def _tell_last_steps(self, job: TuningJob) -> None:
        """Of a job that goes: whatever is wrong with them is no news to it any more."""
        try:
            self._tell_steps(job, wait=True)
        except Exception as error:
            log.info("job %s: %s", job.name, error)

    def _tell_known_steps(self, job: TuningJob) -> None:
        self._tell_steps(job, wait=False)

    def _tell_steps(self, job: TuningJob, *, wait: bool) -> None:
        """Of optimizer steps whose loss is known by now, or with ``wait`` of all of them."""
        for event in job.told(wait=wait):
            self._tell(job, event)

    def _publish(self, job: TuningJob) -> None:
        self._tell_steps(job, wait=True)
        if job.program is not None:
            values = job.program.trained()
            job.published += 1
            told = {"event": "published", "step": job.step, "version": job.published}
            self._tell(job, told | {"values": values})
            return
        with self._timed(job, "publish"):
            info = self._adapters.publish(job.name, job.specs, job.parameters)
        job.published = info.version
        self._tell(job, {"event": "published", "step": job.step, "version": info.version})

    def _checkpoint(self, job: TuningJob) -> None:
        assert job.writer is not None
        if job.writer.busy:  # the disk is slower than training: wait for it
            self._written(job, job.writer.outcome(wait=True))
            if job.state != "running":
                return
        self._tell_steps(job, wait=True)
        with self._timed(job, "snapshot"):
            snapshot = job.snapshot()
        job.writer.start(snapshot)

    def _save(self, job: TuningJob) -> None:
        """A checkpoint of a paused job, if there is none of this step."""
        if job.writer is not None and job.writer.busy:
            self._written(job, job.writer.outcome(wait=True))
        if job.writer is not None and job.step > job.saved and job.state == "paused":
            job.writer.start(job.snapshot())

    def _stop(self, job: TuningJob) -> None:
        """End it with a checkpoint; in this thread, as no other can be started at exit."""
        self._interrupt(job)
        self._tell_last_steps(job)
        if job.writer is not None and job.writer.busy:
            self._written(job, job.writer.outcome(wait=True))
        if job.writer is not None and job.step > job.saved and job.state not in ENDED:
            try:
                outcome: Path | Exception = job.writer.write(job.snapshot())
            except Exception as error:  # a device that no longer answers
                outcome = error
            self._written(job, outcome)
        self._end(job, "stopped")

    def _written(self, job: TuningJob, outcome: Path | Exception | None) -> None:
        if isinstance(outcome, Exception):
            job.error = outcome
            problem = {"event": "checkpoint_failed", "error": str(outcome)}
            self._tell(job, problem)
            if job.state in ("running", "finishing"):
                self._pause(job, "a checkpoint could not be written")
            return
        assert outcome is not None
        job.saved = step_of(outcome)
        self._tell(job, {"event": "checkpoint", "path": str(outcome)})
        if job.state == "finishing":
            self._end(job, "succeeded")

    def _pause(self, job: TuningJob, reason: str) -> None:
        self._interrupt(job)
        self._tell_last_steps(job)
        job.state = "paused"
        self._tell(job, {"event": "paused", "step": job.step, "reason": reason})

    def _fail(self, job: TuningJob, error: Exception) -> None:
        if not isinstance(error, InvivoError):
            log.error("job %s has failed", job.name, exc_info=error)
        job.error = error
        self._end(job, "failed", {"error": f"{type(error).__name__}: {error}"})

    def _guarded(self, job: TuningJob, action: Callable[[TuningJob], None]) -> None:
        try:
            action(job)
        except Exception as error:
            self._fail(job, error)

    def _end(self, job: TuningJob, state: State, more: dict[str, Any] | None = None) -> None:
        if job.state in ENDED:
            return
        self._interrupt(job)
        self._close(job, state, more or {})

    def _close(self, job: TuningJob, state: State, more: dict[str, Any]) -> None:
        self._leave_line(job)
        self._tell_last_steps(job)
        if job.writer is not None and job.writer.busy:
            outcome = job.writer.outcome(wait=True)
            if isinstance(outcome, Path):
                self._tell(job, {"event": "checkpoint", "path": str(outcome)})
        job.sequence = job.closing = None
        job.state = state
        if self._coserver is not None:
            self._coserver.closings.forget(job.name)
        with self._lock:
            self._jobs.remove(job)
            self._past.append(job)
            handle = self._handles.pop(job)
        self._tell(job, {"event": state, "step": job.step} | more)
        handle.ended.set()

    # --- times of what ends a step ----------------------------------------------------------
    @contextmanager
    def _timed(self, job: TuningJob, part: Part) -> Iterator[None]:
        """Measure a part of a step's end: on the device, where there is one, since what is still
        in flight there is not the part's."""
        begun, started = self._mark(), time.perf_counter()
        yield
        if self._coserver is None:
            return
        done = self._mark()
        if begun is None or done is None:
            self._coserver.closings.record(job.name, part, time.perf_counter() - started)
        else:
            self._measured.append((job.name, part, begun, done))

    @property
    def _on_gpu(self) -> bool:
        return self._cache.k.device.type == "cuda"

    def _mark(self) -> torch.cuda.Event | None:
        if not self._on_gpu:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _take_times(self) -> None:
        """Of the parts that the device has finished; waits for none."""
        while self._measured and self._measured[0][3].query():
            name, part, begun, done = self._measured.popleft()
            if self._coserver is not None:
                self._coserver.closings.record(name, part, begun.elapsed_time(done) / 1e3)

    # --- memory -----------------------------------------------------------------------------
    def _interrupt(self, job: TuningJob) -> None:
        self._free(job)
        job.interrupt()

    def _free(self, job: TuningJob) -> None:
        """Give the text's memory back, cleared: what a diverging job leaves may not be finite."""
        self._scheduler.let_go(job.seq)
        if job.held:
            blocks = index_on(job.held, self._cache.k.device)
            self._cache.k.index_fill_(1, blocks, 0)
            self._cache.v.index_fill_(1, blocks, 0)
            job.held = []

    def _job_of(self, seq: Sequence) -> TuningJob:
        return next(job for job in self._jobs if job.seq is seq)

    def _tell(self, job: TuningJob, event: dict[str, Any]) -> None:
        try:
            job.on_event({"job": job.name, "time": time.time()} | event)
        except Exception:
            log.exception("the receiver of events of job %s failed", job.name)
