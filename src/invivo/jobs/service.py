"""Fine-tuning jobs of a running engine that outlive its process.

Three threads meet here. Callers ask (any thread); the preparer reads training data and hands jobs
to the engine; the engine tells what happens, and the recorder writes it down, so that the engine
never waits for a disk. Whatever is written is enough to go on: a job that was under way when the
process died is queued again and goes on from its newest checkpoint, with the same data in the same
order.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from invivo.engine.bypasses import BypassSpec, checked_specs, n_virtual
from invivo.engine.checkpoint import step_of
from invivo.engine.engine import Engine
from invivo.engine.finetune import JobHandle
from invivo.engine.job_spec import JobSpec
from invivo.engine.trained_program import ProgramParameters, check_trained
from invivo.errors import (
    Conflict,
    InvalidRequest,
    InvivoError,
    NotFound,
    Overloaded,
    Unavailable,
)
from invivo.jobs.data import TrainingData, steps_and_texts
from invivo.jobs.examples import PIECE, ExampleReader, Examples, Interrupted, longest_example
from invivo.jobs.folder import JobFolder, already_ended
from invivo.jobs.program_jobs import (
    ProgramData,
    given_program,
    keep_result,
    keep_tensors,
    program_spec,
    result_of,
)
from invivo.jobs.records import InvalidData
from invivo.jobs.start import Start, keep_start, kept_start, start_of
from invivo.jobs.store import NewEvent
from invivo.lm_jobs import (
    BAD_FILE,
    BAD_VALIDATION,
    ENDED,
    RESULTS,
    FileInfo,
    Hyperparameters,
    JobInfo,
    JobRequest,
    JobStatus,
    checkpoint_name,
)
from invivo.models.load import LoadedModel
from invivo.passing_thread import in_passing_thread
from invivo.programs import GivenProgram, Programs

log = logging.getLogger(__name__)

ANSWERS_WITHIN = 30.0  # seconds that a pause, resume or cancel waits for the engine
# OpenAI's names in these files.
RESULT_COLUMNS = (
    "step",
    "train_loss",
    "train_accuracy",
    "valid_loss",
    "valid_mean_token_accuracy",
)
_RATE_OVER = 32  # steps over which tokens a second are counted


@dataclass(slots=True)
class Live:
    """A job in the hands of the engine, or waiting for its turn.

    Attributes:
        done: (time, tokens trained) of the latest steps.
        checkpoint: the newest that was written or gone on from.
        given: the program whose parameters it trains, for ``owner``.
        result: hash of the program with the values last published.
    """

    job_id: str
    name: str
    spec: JobSpec
    data: TrainingData
    n_texts: int
    validation: TrainingData | None = None
    given: GivenProgram | None = None
    owner: str = ""
    result: str | None = None
    handle: JobHandle | None = None
    done: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=_RATE_OVER))
    checkpoint: Path | None = None

    def tokens_after(self, step: int) -> int:
        return self.data.tokens_of_first(min(self.n_texts, step * self.spec.gradient_accumulation))


class JobService(JobFolder):
    """The jobs of an engine.

    Args:
        engine: that trains; running, or stepped by the caller.
        model: that it serves.
        folder: of these jobs; made if missing.
        programs: where jobs that train a program find it, and put what they have learned.

    Raises:
        Conflict: another process holds the folder, or it holds jobs of another model.
        InvalidRequest: the folder cannot be used.
    """

    def __init__(
        self, engine: Engine, model: LoadedModel, folder: Path, programs: Programs | None = None
    ) -> None:
        super().__init__(folder)
        self._programs = programs
        try:
            owner = self.store.about("model", model.fingerprint)
            if owner != model.fingerprint:
                raise Conflict(
                    "the folder holds jobs of another model",
                    field="state",
                    given=str(folder),
                    remedy="Give a state folder of its own",
                )
        except BaseException:
            super().close()
            raise
        self._engine = engine
        self._model = model
        self._base_name = (
            Path(model.name).name if model.name.startswith(("/", ".", "~")) else model.name
        )
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._live: dict[str, Live] = {}
        self._waiting: list[Live] = []  # for a place in the engine, in order
        self._closing = False
        self._told: SimpleQueue[tuple[Live, dict[str, Any]] | None] = SimpleQueue()
        self._preparer = ThreadPoolExecutor(1, thread_name_prefix="invivo-prepare")
        self._recorder = threading.Thread(target=self._record, name="invivo-record", daemon=True)
        self._recorder.start()
        self._load_adapters()
        self._load_results()
        engine.adapters.finder = self.checkpoint_folder_of
        for info in self.store.unfinished():
            if info.status == "running":
                told = NewEvent("The process that ran it has ended: queued again")
                self.store.set_job(info.id, told=told, status="queued")
            if info.status != "paused":
                self._prepare_later(info.id)

    def close(self) -> None:
        """Stop the jobs under way, each with a checkpoint; the next service goes on with them.

        The engine may be running or closed already.
        """
        with self._lock:
            if self._closing:
                return
            self._closing = True
            self._engine.adapters.finder = None
            handles = [live.handle for live in self._live.values() if live.handle is not None]
        self._preparer.shutdown(wait=True, cancel_futures=True)
        for handle in handles:
            handle.stop()
        for handle in handles:
            handle.join(ANSWERS_WITHIN)
        self._told.put(None)
        self._recorder.join()
        super().close()

    # --- any thread -------------------------------------------------------------------------
    def create(self, request: JobRequest) -> JobInfo:
        """Start a job; its data is validated afterwards (status validating_files).

        Raises:
            NotFound: no such file.
            InvalidRequest: the file is no text, or the hyperparameters do not fit the model.
            Conflict: a job of this name has not ended.
            Unavailable: the disk is full or refuses.
        """
        asked = request.hyperparameters
        given: GivenProgram | None = None
        shown = asked.as_dict()
        if asked.program is not None:
            given = given_program(self._with_programs(), asked, request.owner)
            # A stored program may be forgotten; the job keeps it.
            shown |= {"program": given.program.to_dict(), "blobs": {}}
        start: Start | None = None
        if asked.start is not None:
            start = start_of(self._engine.adapters, asked)
            shown |= start.shown(self._model.config)
            asked = Hyperparameters.of(shown)
        spec = self._spec("check", asked, 1, given, start)
        if spec.program is not None:
            config = self._model.config
            check_trained(spec.program, config, weight_decay=spec.weight_decay)
            ProgramParameters(spec.program, config, self._model.decoder.embed)  # their start values
        else:
            checked = checked_specs(self._model.config, spec.bypasses)
            if start is None:
                shown |= {"on": list(checked[0].on), "r": asked.size or None}
        self._check_size(asked, spec)
        longest_example(asked.max_length, self._can_train(spec))
        file = self._usable(request.training_file, "training_file")
        held_out: dict[str, Any] = {}
        if request.validation_file is not None:
            other = self._usable(request.validation_file, "validation_file")
            held_out = {
                "validation_file": other.id,
                "validation_content": self.store.content_of(other.id),
                "validation_filename": other.filename,
            }
        with self._lock:
            names = {info.name for info in self.store.unfinished()}
            name = request.name or _made_up(names | self._names_in_use())
            if name in names:
                raise Conflict(
                    "a job of this name has not ended",
                    field="name",
                    given=name,
                    remedy="Take another name, or cancel that job",
                )
            info = self.store.add_job(
                name=name,
                model=self._base_name,
                training_file=file.id,
                content=self.store.content_of(file.id),
                filename=file.filename,
                hyperparameters=shown,
                metadata=dict(request.metadata),
                owner=request.owner,
                **held_out,
            )
        self._keep_beginning(info.id, given, start)
        begun = "" if start is None else f"; training begins with the adapter {asked.start}"
        created = f"Created: the file {file.filename} is being validated{begun}"
        self.store.add_event(info.id, created)
        self._prepare_later(info.id)
        return info

    def _keep_beginning(self, job_id: str, given: GivenProgram | None, start: Start | None) -> None:
        """Write down what the job begins with, which may change or go elsewhere.

        Raises:
            Unavailable: the disk is full or refuses; the job is forgotten then.
        """
        folder = self.checkpoint_folder(job_id)
        try:
            if given is not None:
                keep_tensors(given, folder)
            if start is not None:
                keep_start(start, folder, self._model.config, self._base_name)
        except BaseException as error:
            self.store.forget_job(job_id)
            if not isinstance(error, OSError):
                raise
            what = "program's tensors" if start is None else "adapter to begin with"
            raise Unavailable(
                f"the {what} cannot be stored: {error.strerror or error}",
                field="blobs" if start is None else "start",
                remedy="Make room on the server's disk, then try again",
            ) from error

    def _with_programs(self) -> Programs:
        if self._programs is None:
            raise InvalidRequest("programs are not trained here", field="program")
        return self._programs

    def _usable(self, file_id: str, field: str) -> FileInfo:
        """The file of examples that ``field`` names."""
        try:
            file = self.store.file(file_id)
        except NotFound as error:
            error.field = field
            raise
        problem = file.status_details if file.status == "error" else None
        if file.purpose == RESULTS:
            problem = "it holds the metrics of a job"
        if problem is not None:
            raise InvalidRequest(
                f"cannot be learned: {problem}",
                field=field,
                given=file.filename,
                remedy="Upload a file of examples",
            )
        return file

    def job(self, job_id: str) -> JobInfo:
        return self._with_rate(super().job(job_id))

    def jobs(
        self, limit: int = 20, after: str | None = None, owner: str | None = None
    ) -> list[JobInfo]:
        return [self._with_rate(info) for info in super().jobs(limit, after, owner)]

    def cancel(self, job_id: str) -> JobInfo:
        return self._ordered(job_id, "cancelled", lambda handle: handle.cancel())

    def pause(self, job_id: str) -> JobInfo:
        """Give its memory and its place back; a job in the engine writes a checkpoint first."""
        return self._ordered(job_id, "paused", lambda handle: handle.pause())

    def resume(self, job_id: str) -> JobInfo:
        """Go on after a pause; nothing happens to a job that is not paused.

        Raises:
            Conflict: it has ended.
        """
        info = self.job(job_id)
        if info.status in ENDED:
            raise already_ended(info)
        if info.status != "paused":
            return info
        with self._lock:
            live = self._live.get(job_id)
            handle = None if live is None else live.handle
        if handle is not None:
            handle.resume()
            return self._awaited(job_id, lambda status: status != "paused")
        told = NewEvent("Queued again")
        if self.store.set_job(job_id, unless=ENDED, told=told, status="queued", error=None):
            self._prepare_later(job_id)
        return self.job(job_id)

    def _ordered(
        self, job_id: str, status: JobStatus, order: Callable[[JobHandle], None]
    ) -> JobInfo:
        """Give an order to a job wherever it is: in the engine, waiting, or only in the store."""
        with self._lock:
            live = self._live.get(job_id)
            handle = None if live is None else live.handle
            if live is not None and handle is None:
                del self._live[job_id]
                self._waiting.remove(live)
            if handle is None:  # under the lock, or the preparer might take it up meanwhile
                return self._marked(job_id, status, status.capitalize())
        info = self.job(job_id)
        if info.status in ENDED:
            raise already_ended(info)
        order(handle)
        return self._awaited(job_id, lambda now: now == status or now in ENDED)

    def _awaited(self, job_id: str, holds: Callable[[JobStatus], bool]) -> JobInfo:
        """The job as soon as its status is as wanted; as it is when that takes too long."""
        deadline = time.monotonic() + ANSWERS_WITHIN
        with self._changed:
            while True:
                info = self.store.job(job_id)
                left = deadline - time.monotonic()
                if holds(info.status) or left <= 0:
                    break
                self._changed.wait(min(left, 1.0))
        return self.job(job_id)

    def _with_rate(self, info: JobInfo) -> JobInfo:
        with self._lock:
            live = self._live.get(info.id)
            done = [] if live is None else list(live.done)
        if live is None or info.status != "running" or len(done) < 2:
            return info
        (first, before), (last, now) = done[0], done[-1]
        if last > first and now > before:
            info.tokens_per_second = (now - before) / (last - first)
            left = live.tokens_after(info.n_steps) - now
            info.estimated_finish = math.ceil(last + left / info.tokens_per_second)
        return info

    # --- the preparer -----------------------------------------------------------------------
    def _prepare_later(self, job_id: str) -> None:
        try:
            self._preparer.submit(self._guarded, job_id)
        except RuntimeError:  # closing: the next service takes it up
            log.debug("job %s is left to the next service", job_id)

    def _guarded(self, job_id: str) -> None:
        try:
            self._prepare(job_id)
        except Interrupted:
            pass
        except InvalidData as error:
            for problem in error.problems:
                data = {"line": problem.line, "field": problem.field, "message": problem.message}
                self.store.add_event(job_id, str(problem), level="error", data=data)
            code = BAD_VALIDATION if error.field == "validation_file" else BAD_FILE
            self._fail(job_id, code, error.message, error.field)
        except InvivoError as error:
            self._fail(job_id, "invalid_request", str(error), error.field)
        except Exception as error:
            log.exception("job %s could not be prepared", job_id)
            self._fail(job_id, "internal_error", f"{type(error).__name__}: {error}", None)
        self._start_waiting()

    def _prepare(self, job_id: str) -> None:
        """Read the job's data and put it in line."""
        info = self.store.job(job_id)
        with self._lock:
            if info.status not in ("validating_files", "queued") or job_id in self._live:
                return
        asked = _asked(info)
        given: GivenProgram | None = None
        if asked.program is not None:
            folder = self.checkpoint_folder(job_id)
            given = given_program(self._with_programs(), asked, info.owner, folder)
        start: Start | None = None
        if asked.start is not None:
            start = kept_start(self.checkpoint_folder(job_id), self._model.config)
        longest = longest_example(
            asked.max_length, self._can_train(self._spec("check", asked, 1, given, start))
        )
        reader = ExampleReader(
            self._model.tokenizer,
            self._model.config.eos_token_ids,
            longest,
            truncate=asked.truncate,
            going_on=lambda: not self._closing,
        )
        content, filename = self.store.data_of(job_id)
        piece = PIECE if asked.max_length is None else asked.max_length
        examples = reader.read(self.folder / "files" / content, filename, piece)
        validation = self._held_out(job_id, reader, piece, given)
        n_steps, n_texts = steps_and_texts(
            len(examples), n_epochs=asked.n_epochs, steps=asked.steps, batch_size=asked.batch_size
        )
        spec = self._spec(info.name, asked, n_steps, given, start)
        order = {"seed": asked.seed, "shuffle": asked.shuffle, "n_texts": n_texts}
        data = self._data(examples, given, **order)
        live = Live(
            job_id,
            info.name,
            spec,
            data,
            n_steps * asked.batch_size if n_texts is None else n_texts,
            validation,
            given,
            info.owner,
        )
        if info.status == "validating_files":
            tokens = len(examples.tokens)
            told = f"The file is valid: {len(examples)} examples, {tokens} tokens, {n_steps} steps"
            if examples.n_truncated:
                told += f"; {examples.n_truncated} examples were cut off at {longest} tokens"
            counts = {"examples": len(examples), "tokens": tokens, "steps": n_steps}
            if validation is not None:
                counts["held_out"] = len(validation)
                told += f"; {len(validation)} examples are held out"
            self.store.add_event(job_id, told, data=counts)
        chosen = info.hyperparameters | {
            "checkpoint_every": spec.checkpoint_every,
            "validate_every": spec.validate_every,
        }
        with self._lock:
            if self._closing or not self.store.set_job(
                job_id,
                unless=(*ENDED, "paused"),
                status="queued",
                n_steps=n_steps,
                hyperparameters=chosen,
            ):
                return
            self._live[job_id] = live
            self._waiting.append(live)

    def _data(self, examples: Examples, given: GivenProgram | None, **order: Any) -> TrainingData:
        if given is None:
            return TrainingData(examples, **order)
        data = ProgramData(examples, given, self._with_programs(), **order)
        data.check()
        return data

    def _held_out(
        self, job_id: str, reader: ExampleReader, piece: int, given: GivenProgram | None
    ) -> TrainingData | None:
        """The examples of the job's validation file, in the order of the file."""
        file = self.store.validation_of(job_id)
        if file is None:
            return None
        content, filename = file
        try:
            examples = reader.read(self.folder / "files" / content, filename, piece)
        except InvalidData as error:
            raise InvalidData(error.problems, "validation_file") from None
        return self._data(examples, given, seed=0, shuffle=False, n_texts=len(examples))

    def _start_waiting(self) -> None:
        """Hand jobs to the engine, first come first served, as long as it takes them."""
        while True:
            with self._lock:
                if not self._waiting or self._closing:
                    return
                live = self._waiting[0]
                problem: Exception | None = None
                try:
                    live.handle = in_passing_thread(partial(self._handed_over, live))
                except Overloaded:
                    return
                except Unavailable as error:  # no engine any more: the next service takes it up
                    log.debug("job %s is left to the next service: %s", live.job_id, error)
                    return
                except Exception as error:
                    problem = error
                    self._live.pop(live.job_id, None)
                self._waiting.pop(0)
            if problem is not None:
                if not isinstance(problem, InvivoError):
                    log.error("job %s could not be started", live.job_id, exc_info=problem)
                field = problem.field if isinstance(problem, InvivoError) else None
                self._fail(live.job_id, "invalid_request", str(problem), field)

    def _handed_over(self, live: Live) -> JobHandle:
        folder = self.checkpoint_folder(live.job_id)
        return self._engine.finetune(
            live.spec, live.data, partial(self._hear, live), folder, validation=live.validation
        )

    def _spec(
        self,
        name: str,
        asked: Hyperparameters,
        n_steps: int,
        given: GivenProgram | None,
        start: Start | None,
    ) -> JobSpec:
        often = min(50, math.ceil(n_steps / 10))
        save, validate = (
            often if every is None else every
            for every in (asked.checkpoint_every, asked.validate_every)
        )
        return JobSpec(
            name=name,
            bypasses=_bypasses(asked) if start is None else start.specs,
            first=None if start is None else start.parameters,
            program=None if given is None else program_spec(given, asked),
            steps=n_steps,
            learning_rate=asked.learning_rate,
            schedule=asked.schedule,
            warmup=asked.warmup,
            optimizer=asked.optimizer,
            weight_decay=asked.weight_decay,
            momentum=asked.momentum,
            clip=asked.clip,
            gradient_accumulation=asked.batch_size,
            seed=asked.seed,
            share=asked.share,
            publish_every=asked.publish_every,
            checkpoint_every=save,
            validate_every=validate,
            keep=asked.keep_checkpoints,
        )

    def _names_in_use(self) -> set[str]:
        """Of adapters that a job with a made-up name must not replace."""
        served = {adapter.name for adapter in self._engine.adapters.list()}
        return served | {info.name for info in self.store.succeeded()}

    def _check_size(self, asked: Hyperparameters, spec: JobSpec) -> None:
        """Before anything of that size is made."""
        most = self._engine.config.max_lora_rank
        if n_virtual(spec.bypasses):
            most = self._engine.scheduler.longest_training - 2
        if asked.size > most:
            raise InvalidRequest(
                f"the engine takes at most {most}",
                field="r",
                given=asked.size,
                remedy="Ask for less, or start the engine with larger limits",
            )

    def _can_train(self, spec: JobSpec) -> int:
        return self._engine.scheduler.longest_training - n_virtual(spec.bypasses)

    def _fail(self, job_id: str, code: str, message: str, param: str | None) -> None:
        error = {"code": code, "message": message, "param": param}
        told = NewEvent(f"Failed: {message}", level="error", data=error)
        self.store.set_job(
            job_id, unless=ENDED, told=told, status="failed", error=error, finished=time.time()
        )
        with self._changed:
            self._changed.notify_all()

    def _load_results(self) -> None:
        """Keep again what earlier jobs have made of programs, which may have lain in memory."""
        for info in self.store.succeeded():
            kept = self.store.checkpoints(info.id, 1, None)
            if info.hyperparameters.get("program") is None or self._programs is None or not kept:
                continue
            try:
                folder = self.checkpoint_folder(info.id)
                given = given_program(self._programs, _asked(info), info.owner, folder)
                keep_result(self._programs, given, result_of(Path(kept[0].path)), info.owner)
            except (InvivoError, OSError) as error:
                log.warning("what the job %s has trained cannot be kept: %s", info.id, error)

    def _load_adapters(self) -> None:
        """Serve what earlier jobs have made, unless something of that name is there."""
        taken = {adapter.name for adapter in self._engine.adapters.list()}
        done = [info for info in self.store.succeeded() if not info.hyperparameters.get("program")]
        for info in {info.name: info for info in done}.values():
            if info.name in taken:
                continue
            folder = self.adapter_folder(info.name)
            if not folder.is_dir():  # it could not be exported
                kept = self.store.checkpoints(info.id, 1, None)
                folder = Path(kept[0].path) if kept else folder
            try:
                self._engine.adapters.load(info.name, folder)
            except InvivoError as error:
                log.warning("the adapter %s cannot be served: %s", info.name, error)

    def _hear(self, live: Live, event: dict[str, Any]) -> None:
        """Called from the engine's thread."""
        self._told.put((live, event))

    # --- the recorder -----------------------------------------------------------------------
    def _record(self) -> None:
        while (told := self._told.get()) is not None:
            live, event = told
            try:
                self._take(live, event)
            except Exception:  # a full disk must not end the recorder: later events may fit
                log.exception("an event of job %s was not recorded: %s", live.job_id, event)
            with self._changed:
                self._changed.notify_all()

    def _take(self, live: Live, event: dict[str, Any]) -> None:
        job_id, kind, step = live.job_id, event["event"], event.get("step", 0)
        if kind == "started":
            self.store.back_to(job_id, step, live.tokens_after(step))
            came = event["from"]
            live.checkpoint = None if came is None else Path(came)
            begun = "Started" if came is None else f"Goes on from the checkpoint of step {step}"
            told = _event(event, begun)
            self.store.set_job(job_id, unless=ENDED, told=told, status="running", error=None)
        elif kind in ("step", "skipped"):
            self._step(live, event)
        elif kind == "validation":
            self._validated(live, event)
        elif kind == "published":
            if live.given is not None:
                programs = self._with_programs()
                live.result = None  # what cannot be kept must not pass for what was kept before
                live.result = keep_result(programs, live.given, event["values"], live.owner)
                self._tell(live, event, f"The values of step {step} are in {live.result}")
                return
            served = f"{self._base_name}:{live.name}"
            self._tell(live, event, f"Served as {served}, version {event['version']}")
        elif kind == "checkpoint":
            live.checkpoint = Path(event["path"])
            step = step_of(live.checkpoint)
            self.store.add_checkpoint(job_id, step, live.checkpoint)
            self._withdraw(checkpoint_name(live.name, step))
            self._tell(live, event | {"step": step}, f"Checkpoint of step {step}")
        elif kind == "checkpoint_failed":
            message = f"No checkpoint could be written: {event['error']}"
            error = {"code": "checkpoint_failed", "message": message, "param": None}
            self.store.set_job(job_id, told=_event(event, message, "error"), error=error)
        elif kind in ("paused", "resumed"):
            with self._lock:
                live.done.clear()
            if kind == "paused":
                told = _event(event, f"Paused: {event['reason']}")
                self.store.set_job(job_id, unless=ENDED, told=told, status="paused")
                self._later(self._start_waiting)
            else:
                told = _event(event, "Resumed")
                self.store.set_job(job_id, unless=ENDED, told=told, status="running", error=None)
        elif kind == "queued":
            told = _event(event, "Queued again: as many jobs run as may")
            self.store.set_job(job_id, unless=ENDED, told=told, status="queued", error=None)
        elif kind == "waiting":
            self._tell(live, event, f"Waits: {event['reason']}", "warn")
        else:
            try:
                self._ended(live, event)
            finally:  # not before: who finds it gone takes what the store says
                with self._lock:
                    self._live.pop(job_id, None)

    def _step(self, live: Live, event: dict[str, Any]) -> None:
        step, loss, accuracy = event["step"], event["loss"], event["accuracy"]
        tokens = live.tokens_after(step)
        with self._lock:
            live.done.append((event["time"], tokens))
        self.store.step_done(live.job_id, step, loss, tokens, accuracy)
        skipped = event["event"] == "skipped"
        message = f"Step {step}/{live.spec.steps}: training loss={loss:.4f}"
        if skipped:
            message = f"Step {step}/{live.spec.steps} was skipped: {event['reason']}"
        self.store.add_event(
            live.job_id,
            message,
            level="warn" if skipped else "info",
            type="metrics",
            created=event["time"],
            data=_told(event)
            | {
                "train_loss": loss,
                "train_mean_token_accuracy": accuracy,
                "total_steps": live.spec.steps,
                "trained_tokens": tokens,
            },
        )

    def _validated(self, live: Live, event: dict[str, Any]) -> None:
        step, loss, accuracy = event["step"], event["loss"], event["accuracy"]
        self.store.validated(live.job_id, step, loss, accuracy)
        self.store.add_event(
            live.job_id,
            f"Step {step}/{live.spec.steps}: validation loss={loss:.4f}",
            type="metrics",
            created=event["time"],
            data={
                "step": step,
                "valid_loss": loss,
                "valid_mean_token_accuracy": accuracy,
                # OpenAI's names for the same over the whole file, which ours always is.
                "full_valid_loss": loss,
                "full_valid_mean_token_accuracy": accuracy,
                "labels": event["labels"],
                "total_steps": live.spec.steps,
            },
        )

    def _withdraw(self, adapter: str) -> None:
        """A checkpoint of an earlier job of this name is no longer what the name means."""
        if any(one.name == adapter for one in self._engine.adapters.list()):
            self._engine.adapters.unload(adapter)

    def _ended(self, live: Live, event: dict[str, Any]) -> None:
        job_id, kind = live.job_id, event["event"]
        if kind == "stopped" or (kind == "failed" and self._engine.failure is not None):
            # Not the job's doing: it stays as it is for the next service.
            why = "The engine was closed" if kind == "stopped" else "The engine has failed"
            self._tell(live, event, f"{why}: it goes on from its last checkpoint")
            return
        self._write_results(job_id)
        if kind == "succeeded":
            result = f"{self._base_name}:{live.name}" if live.given is None else live.result
            if result is None:
                message = "the trained values could not be kept among the stored programs"
                self._fail(job_id, "result_not_kept", message, None)
                self._later(self._start_waiting)
                return
            if live.given is None:
                self._export(live)
            self.store.set_job(
                job_id,
                told=_event(event, f"Succeeded: served as {result}"),
                status="succeeded",
                finished=event["time"],
                fine_tuned_model=result,
                error=None,
            )
        elif kind == "cancelled":
            told = _event(event, "Cancelled")
            self.store.set_job(job_id, told=told, status="cancelled", finished=event["time"])
        else:
            self._fail(job_id, "training_failed", str(event.get("error", kind)), None)
        self._later(self._start_waiting)

    def _export(self, live: Live) -> None:
        assert live.checkpoint is not None  # the engine writes one before it says "succeeded"
        try:
            self.export(live.checkpoint, live.name)
        except OSError as error:
            self.store.add_event(
                live.job_id,
                f"The adapter could not be copied to its folder ({error.strerror}); it is served, "
                f"and lies in {live.checkpoint}",
                level="warn",
            )

    def _write_results(self, job_id: str) -> None:
        """The metrics of every step as a file of the job's owner."""
        info, steps = self.store.job(job_id), self.store.metrics(job_id)
        if not steps:
            return
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(RESULT_COLUMNS)
        table.writerows(astuple(one) for one in steps)
        source = io.BytesIO(text.getvalue().encode())
        try:
            file = self.add_file("step_metrics.csv", source, RESULTS, info.owner)
        except Unavailable as error:
            self.store.add_event(job_id, f"No result file: {error.message}", level="warn")
            return
        self.store.set_job(job_id, result_files=[file.id])

    def _later(self, action: Callable[[], None]) -> None:
        try:
            self._preparer.submit(action)
        except RuntimeError:
            log.debug("closing: nothing is started any more")

    def _tell(self, live: Live, event: dict[str, Any], message: str, level: str = "info") -> None:
        self.store.add_event(
            live.job_id, message, level=level, created=event["time"], data=_told(event)
        )


def _event(event: dict[str, Any], message: str, level: str = "info") -> NewEvent:
    return NewEvent(message, level, created=event["time"], data=_told(event))


def _told(event: dict[str, Any]) -> dict[str, Any]:
    """What the engine says, without what the record has anyway and without folders."""
    left_out = ("event", "job", "time", "path", "from", "values")
    return {key: value for key, value in event.items() if key not in left_out}


def _asked(info: JobInfo) -> Hyperparameters:
    """As they were when the job was created: what has been chosen since gives the same again."""
    return Hyperparameters.of(info.hyperparameters)


def _bypasses(asked: Hyperparameters) -> tuple[BypassSpec, ...]:
    if asked.method == "program":
        return ()
    return (
        BypassSpec(
            asked.method,
            asked.on,
            asked.size,
            asked.layers,
            asked.alpha,
            asked.rank_stabilized,
            asked.activation,
        ),
    )


def _made_up(taken: set[str]) -> str:
    number = 1
    while f"job-{number}" in taken:
        number += 1
    return f"job-{number}"
