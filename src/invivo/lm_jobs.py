"""Fine-tuning as every floor shows it: files, jobs, their events and checkpoints.

Plain dataclasses without a library. :class:`FineTuningBackend` is what stands behind them: the job
service of this process (:mod:`invivo.jobs.service`), or a server.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, get_args

from invivo.errors import InvalidRequest, NotFound
from invivo.table_data import examples_of, is_table, json_lines, table_name

JobStatus = Literal[
    "validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"
]
Method = Literal["lora", "ia3", "adapter", "prefix", "soft_prompt", "steering", "program"]
ENDED: tuple[JobStatus, ...] = ("succeeded", "failed", "cancelled")
SIZED: tuple[Method, ...] = ("lora", "adapter", "prefix", "soft_prompt")
DEFAULT_SIZE = 16
BAD_FILE = "invalid_training_file"  # error code of a job whose data cannot be learned
BAD_VALIDATION = "invalid_validation_file"
RESULTS = "fine-tune-results"  # purpose of a file with a job's metrics
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_CHECKPOINT = re.compile(r"(.+):ckpt-step-(\d{1,12})")


def checkpoint_name(name: str, step: int) -> str:
    """The adapter that a checkpoint is served as."""
    return f"{name}:ckpt-step-{step}"


def is_checkpoint(adapter: str) -> bool:
    """Whether an adapter's name is that of a checkpoint."""
    return _CHECKPOINT.fullmatch(adapter) is not None


def checkpoint_of(adapter: str) -> tuple[str, int] | None:
    """Name and step behind :func:`checkpoint_name`; None for any other adapter."""
    match = _CHECKPOINT.fullmatch(adapter)
    return None if match is None else (match[1], int(match[2]))


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """What and how a job trains; every field has a default.

    Attributes:
        method: kind of adapter, or ``program``: parameters of a program are trained instead.
        on: linear maps (lora, ia3: q, k, v, o, gate, up, down) or sites (adapter, steering:
            attn.out, mlp.out, resid.post ...); empty takes the method's usual places.
        r: rank (lora), width (adapter), number of virtual tokens (prefix, soft_prompt); None = 16.
        layers: numbers from 0; None = all.
        alpha: of a LoRA, whose factor is alpha / r; None = r.
        rank_stabilized: a LoRA's factor is alpha / sqrt(r).
        activation: of a bottleneck adapter.
        n_epochs: how often every example is seen; ``steps`` goes before.
        steps: optimizer steps; None = as many as the epochs need.
        batch_size: examples of one optimizer step.
        learning_rate: the highest of the schedule.
        schedule: after the warm-up ``constant``, or down to nothing ``linear`` or by a ``cosine``.
        warmup: steps over which the learning rate rises.
        optimizer: ``adamw`` or ``sgd``.
        weight_decay: of either optimizer.
        momentum: of sgd.
        clip: largest norm of all gradients together; None = any.
        seed: of the first parameters and of the order of the examples.
        shuffle: a new order every epoch; False keeps that of the file.
        max_length: longest example in tokens; None = what the engine can train. A plain text is
            cut into pieces of this many (None = at most 1024).
        truncate: cut longer examples off instead of refusing them.
        checkpoint_every: steps; None = a tenth of them, 50 at most; 0 = only at the end.
        keep_checkpoints: the newest so many stay.
        validate_every: steps after which the held-out data is run through; None = a tenth of them,
            50 at most; 0 = only at the end.
        publish_every: steps after which the adapter is served as it then is; 0 = only at the end.
        share: weight of this job among those that run at the same time.
        program: JSON data, or the hash of a stored program, whose parameters are trained.
        train: names of those that are.
        blobs: ids of the tensors that it names.
        sparsity: times the distance of the trained masks and vectors from changing nothing, added
            to the loss.
        objective: of a program: ``cross_entropy`` of what is learned; ``logit_diff``, the logits
            of the examples' ``other`` minus those of what is learned; ``kl``, how far the
            program moves the model's own predictions there.
        start: a served adapter (or checkpoint, NAME:ckpt-step-N) that is learned further: training
            begins with its values, and method, places, sizes and factors are its own.
    """

    method: Method = "lora"
    on: tuple[str, ...] = ()
    r: int | None = None
    layers: tuple[int, ...] | None = None
    alpha: float | None = None
    rank_stabilized: bool = False
    activation: str = "relu"
    n_epochs: int = 3
    steps: int | None = None
    batch_size: int = 4
    learning_rate: float = 2e-4
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup: int = 0
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.0
    momentum: float = 0.0
    clip: float | None = 1.0
    seed: int = 0
    shuffle: bool = True
    max_length: int | None = None
    truncate: bool = False
    checkpoint_every: int | None = None
    keep_checkpoints: int = 3
    validate_every: int | None = None
    publish_every: int = 0
    share: float = 1.0
    program: Mapping[str, Any] | str | None = None
    train: tuple[str, ...] = ()
    blobs: Mapping[str, str] = field(default_factory=dict)
    sparsity: float = 0.0
    objective: Literal["cross_entropy", "logit_diff", "kl"] = "cross_entropy"
    start: str | None = None

    def __post_init__(self) -> None:
        self._check_program()
        if self.method not in get_args(Method):
            raise _refused("method", self.method, f"must be one of {', '.join(get_args(Method))}")
        if self.start is not None and not (isinstance(self.start, str) and self.start):
            raise _refused("start", self.start, "must be the name of an adapter")
        if self.start is not None and self.program is not None:
            raise _refused("start", self.start, "is an adapter, but a program is trained")
        if not isinstance(self.on, tuple) or not all(isinstance(place, str) for place in self.on):
            raise _refused("on", self.on, "must be a list of names")
        if self.r is not None and self.method not in SIZED:
            raise _refused("r", self.r, f"{self.method} has no size", "Leave it out")
        if self.layers is not None and not (
            isinstance(self.layers, tuple) and all(_is_whole(layer, 0) for layer in self.layers)
        ):
            raise _refused("layers", self.layers, "must be a list of layer numbers from 0")
        for name, least, may_be_none in (
            ("r", 1, True),
            ("n_epochs", 1, False),
            ("steps", 1, True),
            ("batch_size", 1, False),
            ("warmup", 0, False),
            ("seed", 0, False),
            ("max_length", 2, True),
            ("checkpoint_every", 0, True),
            ("keep_checkpoints", 1, False),
            ("validate_every", 0, True),
            ("publish_every", 0, False),
        ):
            value = getattr(self, name)
            if not (may_be_none and value is None) and not _is_whole(value, least):
                raise _refused(name, value, f"must be a whole number of at least {least}")
        for name in ("rank_stabilized", "shuffle", "truncate"):
            if not isinstance(getattr(self, name), bool):
                raise _refused(name, getattr(self, name), "must be true or false")
        for name in ("alpha", "clip"):
            value = getattr(self, name)
            if value is not None and not _is_number(value):
                raise _refused(name, value, "must be a number")
        for name in ("learning_rate", "weight_decay", "momentum", "share"):
            if not _is_number(getattr(self, name)):
                raise _refused(name, getattr(self, name), "must be a number")

    def _check_program(self) -> None:
        if (self.method == "program") != (self.program is not None):
            raise _refused(
                "program",
                None if self.program is None else "a program",
                "goes with the method program, and that with it",
            )
        if not isinstance(self.train, tuple) or not all(isinstance(n, str) for n in self.train):
            raise _refused("train", self.train, "must be a list of names")
        if not isinstance(self.blobs, Mapping):
            raise _refused("blobs", self.blobs, "must be ids by name")
        if not _is_number(self.sparsity):
            raise _refused("sparsity", self.sparsity, "must be a number")
        goals = ("cross_entropy", "logit_diff", "kl")
        if self.objective not in goals:
            raise _refused("objective", self.objective, f"must be one of {', '.join(goals)}")
        more = self.train or self.blobs or self.sparsity or self.objective != goals[0]
        if self.program is None and more:
            raise _refused("program", None, "is missing: train, blobs and such belong to one")
        if self.program is not None and (self.on or self.layers is not None):
            raise _refused("on", self.on, "places are named in the program", "Leave it out")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Hyperparameters:
        """From keyword arguments or JSON; places and layers may be lists, or a text ("q,v").
        ``n_epochs`` and ``batch_size`` may be "auto", which is as leaving them out.

        Raises:
            InvalidRequest: an unknown name, or a value of another kind or out of range.
        """
        known = {each.name for each in fields(cls)}
        for name in given:
            if name not in known:
                raise InvalidRequest(
                    "unknown hyperparameter",
                    field=name,
                    given=given[name],
                    remedy=f"Known: {', '.join(sorted(known))}",
                )
        plain = dict(given)
        for name in ("n_epochs", "batch_size"):
            if plain.get(name) == "auto":
                del plain[name]
        if plain.get("program") is not None:
            plain.setdefault("method", "program")
        for name, of_item in (("on", str), ("layers", int), ("train", str)):
            value = plain.get(name)
            if isinstance(value, str):
                try:
                    parts = [part.strip() for part in value.split(",")]
                    plain[name] = tuple(of_item(part) for part in parts if part)
                except ValueError as error:
                    raise _refused(name, value, "must be whole numbers") from error
            elif isinstance(value, Sequence):
                plain[name] = tuple(value)
        if plain.get("on", ()) is None:
            del plain["on"]
        return cls(**plain)

    @property
    def size(self) -> int:
        """The size that is trained; 0 where the method has none."""
        if self.method not in SIZED:
            return 0
        return DEFAULT_SIZE if self.r is None else self.r

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        whole = asdict(self)
        whole["on"] = list(self.on)
        whole["train"] = list(self.train)
        whole["layers"] = None if self.layers is None else list(self.layers)
        return whole


@dataclass(frozen=True, slots=True)
class JobRequest:
    """A job as it is asked for.

    Attributes:
        training_file: id of an uploaded file.
        validation_file: id of one whose examples are held out; None = none.
        name: of the adapter that comes of it; None = made up. An adapter of this name gets a new
            version.
        metadata: of the caller, kept and given back.
        owner: who may see it; "" = everyone.
    """

    training_file: str
    hyperparameters: Hyperparameters = field(default_factory=Hyperparameters)
    name: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    owner: str = ""
    validation_file: str | None = None

    def __post_init__(self) -> None:
        if self.name is not None and not (
            isinstance(self.name, str) and _NAME.fullmatch(self.name)
        ):
            raise InvalidRequest(
                "is not a usable adapter name",
                field="name",
                given=self.name,
                remedy="Use 1 to 64 letters, digits and . _ - beginning with a letter or digit",
            )


@dataclass(frozen=True, slots=True)
class FileInfo:
    """An uploaded file; times in Unix seconds.

    Attributes:
        n_lines: lines that are not blank; None for a file that is not text.
        status: "processed", or "error" with the reason in ``status_details``.
    """

    id: str
    filename: str
    bytes: int
    purpose: str
    created_at: int
    n_lines: int | None
    status: Literal["processed", "error"] = "processed"
    status_details: str | None = None
    owner: str = ""


@dataclass(frozen=True, slots=True)
class Validation:
    """What a look at the held-out data gave.

    Attributes:
        loss: per learned token; None where it was not finite.
        accuracy: share of learned tokens that were the most probable.
    """

    step: int
    loss: float | None
    accuracy: float | None


@dataclass(slots=True)
class JobInfo:
    """How a job stands; times in Unix seconds.

    Attributes:
        name: of the adapter, served as ``base:name`` once the job has succeeded.
        hyperparameters: all of them, with what was chosen for those left open.
        step, n_steps: optimizer steps done and in all (0 until the file is validated).
        trained_tokens: of all examples learned so far.
        loss: of the last step, per learned token; None before the first or if it was not finite.
        losses: of every step; filled for a single job, empty in lists of jobs.
        validations: looks at the held-out data, in order; filled like ``losses``.
        result_files: ids of files with the metrics of every step, once it has ended.
        error: ``code``, ``message`` and ``param`` of what ended the job or paused it.
        fine_tuned_model: ``base:name`` once it has succeeded.
        estimated_finish, tokens_per_second: while it runs.
    """

    id: str
    name: str
    model: str
    status: JobStatus
    created_at: int
    training_file: str
    hyperparameters: dict[str, Any]
    finished_at: int | None = None
    step: int = 0
    n_steps: int = 0
    trained_tokens: int = 0
    loss: float | None = None
    losses: list[float | None] = field(default_factory=list)
    error: dict[str, Any] | None = None
    fine_tuned_model: str | None = None
    estimated_finish: int | None = None
    tokens_per_second: float | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    owner: str = ""
    validation_file: str | None = None
    validations: list[Validation] = field(default_factory=list)
    result_files: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class JobEvent:
    """Something that happened to a job.

    Attributes:
        type: "metrics" for optimizer steps (data: step, loss, accuracy, learning_rate,
            gradient_norm, trained_tokens) and looks at held-out data (step, valid_loss,
            valid_mean_token_accuracy), else "message".
    """

    id: str
    job_id: str
    created_at: int
    level: Literal["info", "warn", "error"]
    type: Literal["message", "metrics"]
    message: str
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A checkpoint that is there, in the peft library's format and with what resuming needs.

    Attributes:
        metrics: of its step: ``train_loss``, ``train_mean_token_accuracy``, and where the held-out
            data was looked at ``valid_loss`` and ``valid_mean_token_accuracy`` (absent where they
            are not known or not finite).
        fine_tuned_model_checkpoint: ``base:name:ckpt-step-N``, by which it can be asked for.
        path: folder on the machine that trains.
    """

    id: str
    job_id: str
    created_at: int
    step: int
    metrics: dict[str, float]
    fine_tuned_model_checkpoint: str
    path: str


class FineTuningBackend(Protocol):
    """Files and jobs. Unknown ids raise NotFound (fields ``file_id``, ``job_id``).

    Lists are newest first, ``after`` is the id of the last one already seen; ``owner`` None means
    everyone's.
    """

    def add_file(
        self, filename: str, source: BinaryIO, purpose: str = "fine-tune", owner: str = ""
    ) -> FileInfo: ...
    def files(self, owner: str | None = None) -> list[FileInfo]: ...
    def file(self, file_id: str) -> FileInfo: ...
    def content(self, file_id: str) -> bytes: ...
    def delete_file(self, file_id: str) -> None: ...
    def create(self, request: JobRequest) -> JobInfo: ...
    def jobs(
        self, limit: int = 20, after: str | None = None, owner: str | None = None
    ) -> list[JobInfo]: ...
    def job(self, job_id: str) -> JobInfo: ...
    def cancel(self, job_id: str) -> JobInfo: ...
    def pause(self, job_id: str) -> JobInfo: ...
    def resume(self, job_id: str) -> JobInfo: ...
    def delete(self, job_id: str) -> None: ...
    def events(self, job_id: str, limit: int = 20, after: str | None = None) -> list[JobEvent]: ...
    def checkpoints(
        self, job_id: str, limit: int = 10, after: str | None = None
    ) -> list[CheckpointInfo]: ...


OnInfo = Callable[[JobInfo], None]


class Job:
    """A fine-tuning job in the hands of whoever asked for it; usable from any thread."""

    def __init__(self, job_id: str, backend: FineTuningBackend) -> None:
        self.id = job_id
        self._backend = backend

    def __repr__(self) -> str:
        return f"Job({self.id!r})"

    def info(self) -> JobInfo:
        """How it stands now."""
        return self._backend.job(self.id)

    @property
    def status(self) -> JobStatus:
        return self.info().status

    def wait(
        self,
        progress: bool = False,
        timeout: float | None = None,
        on_info: OnInfo | None = None,
    ) -> JobInfo:
        """Wait until it has ended, was paused, or ``timeout`` seconds have passed; how it stands.

        Args:
            progress: show a bar on standard error.
            on_info: called with every look at the job, about four a second.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        pause = 0.05
        with job_bar(progress) as show:
            while True:
                info = self.info()
                show(info)
                if on_info is not None:
                    on_info(info)
                late = deadline is not None and time.monotonic() >= deadline
                if info.status in ENDED or info.status == "paused" or late:
                    return info
                time.sleep(pause)
                pause = min(0.25, pause * 1.5)

    def events(self, limit: int = 20, after: str | None = None) -> list[JobEvent]:
        """What happened to it, newest first; ``after`` is the id of the last one seen."""
        return self._backend.events(self.id, limit, after)

    def checkpoints(self) -> list[CheckpointInfo]:
        """Those that are kept, newest first."""
        return self._backend.checkpoints(self.id)

    def results(self) -> str:
        """The metrics of every step as CSV (step, train_loss, train_accuracy, valid_loss,
        valid_mean_token_accuracy), once it has ended; "" before.

        Raises:
            NotFound: the file has been deleted.
        """
        files = self.info().result_files
        return self._backend.content(files[0]).decode("utf-8") if files else ""

    def cancel(self) -> JobInfo:
        """End it; what it has published stays.

        Raises:
            Conflict: it has ended already.
        """
        return self._backend.cancel(self.id)

    def pause(self) -> JobInfo:
        """Give its memory back until ``resume``; it writes a checkpoint first."""
        return self._backend.pause(self.id)

    def resume(self) -> JobInfo:
        """Go on after a pause."""
        return self._backend.resume(self.id)

    def delete(self) -> None:
        """Forget an ended job, its checkpoints and its adapter's files."""
        self._backend.delete(self.id)


Data = str | Path | Iterable[Mapping[str, Any]]


def start_job(
    backend: FineTuningBackend,
    data: Data,
    *,
    validation: Data | None = None,
    name: str | None = None,
    metadata: Mapping[str, str] | None = None,
    **hyperparameters: Any,
) -> Job:
    """Upload the data where that is needed, start a job, and wait until its data is validated.

    Raises:
        InvalidRequest: the data has bad lines (the message names them), or a hyperparameter.
        NotFound: no such file.
        Conflict: a job of this name has not ended.
    """
    wanted = Hyperparameters.of(hyperparameters)
    JobRequest("", wanted, name)  # refuse a bad name before anything is uploaded
    uploaded: list[str] = []
    info = None

    def file_of(given: Data) -> str:
        if isinstance(given, str) and given.startswith("file-") and not Path(given).exists():
            return given
        uploaded.append(upload(backend, given).id)
        return uploaded[-1]

    try:
        request = JobRequest(
            file_of(data),
            wanted,
            name,
            dict(metadata or {}),
            validation_file=None if validation is None else file_of(validation),
        )
        info = backend.create(request)
        job = Job(info.id, backend)
        pause = 0.01
        while info.status == "validating_files":
            time.sleep(pause)
            pause = min(0.5, 1.5 * pause)
            info = backend.job(info.id)
        if info.status == "failed" and info.error:
            field = {BAD_FILE: "data", BAD_VALIDATION: "validation"}.get(info.error["code"])
            if field is not None:
                raise InvalidRequest(info.error["message"], field=field)
    except Exception:
        if info is not None and info.status in ENDED:
            backend.delete(info.id)
        if info is None or info.status in ENDED:
            for file_id in uploaded:
                backend.delete_file(file_id)
        raise
    return job


def upload(backend: FineTuningBackend, data: Data) -> FileInfo:
    """A file, or records as JSON lines: those in memory, of a Parquet file, or of the Hub.

    Raises:
        NotFound: there is no such file or data set.
        InvalidRequest: it is none of these.
        MissingDependency: a library that reads it is not installed.
    """
    if isinstance(data, str | Path) and is_table(data):
        with json_lines(examples_of(data)) as source:
            return backend.add_file(table_name(data), source)
    if isinstance(data, str | Path):
        try:
            with Path(data).expanduser().open("rb") as source:
                return backend.add_file(Path(data).name, source)
        except OSError as error:
            raise NotFound(
                f"cannot be read: {error.strerror}",
                field="data",
                given=str(data),
                remedy="Give a .jsonl, .txt or .parquet file, hf://datasets/ORG/NAME, "
                "the id of an uploaded file, or a list",
            ) from error
    if not isinstance(data, Iterable) or isinstance(data, Mapping | bytes):
        raise InvalidRequest("must be a file or a list of examples", field="data", given=data)
    with json_lines(data) as source:
        return backend.add_file("records.jsonl", source)


def job_bar(shown: bool) -> AbstractContextManager[OnInfo]:
    """A progress bar over optimizer steps; gives what to call with every look at the job."""
    from contextlib import contextmanager, nullcontext

    if not shown:
        return nullcontext(lambda info: None)
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    @contextmanager
    def bar() -> Iterator[OnInfo]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("", total=None, figures="")

            def show(info: JobInfo) -> None:
                loss = "" if info.loss is None else f"loss {info.loss:.4f}"
                rate = info.tokens_per_second
                speed = "" if rate is None else f"{rate:,.0f} tok/s"
                progress.update(
                    task,
                    description=info.name if info.status == "running" else info.status,
                    total=info.n_steps or None,
                    completed=info.step,
                    figures=f"{loss} {speed}".strip(),
                )

            yield show

    return bar()


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _refused(name: str, value: object, message: str, remedy: str | None = None) -> InvalidRequest:
    return InvalidRequest(message, field=name, given=value, remedy=remedy)
