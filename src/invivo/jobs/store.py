"""What jobs and files are, in a SQLite file that outlives the process.

Methods may be called from any thread; each is one transaction.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sql
from sqlalchemy.dialects.sqlite import insert as upsert
from sqlalchemy.exc import SQLAlchemyError

from invivo.errors import Conflict, InvalidRequest, NotFound
from invivo.lm_jobs import (
    CheckpointInfo,
    FileInfo,
    JobEvent,
    JobInfo,
    JobStatus,
    Validation,
    checkpoint_name,
)
from invivo.sqlite_file import opened

_metadata = sql.MetaData()
_about = sql.Table(
    "about",
    _metadata,
    sql.Column("key", sql.String, primary_key=True),
    sql.Column("value", sql.String, nullable=False),
)
_files = sql.Table(
    "files",
    _metadata,
    sql.Column("number", sql.Integer, primary_key=True),
    sql.Column("id", sql.String, nullable=False, unique=True),
    sql.Column("content", sql.String, nullable=False),  # sha256, the name of the file on disk
    sql.Column("filename", sql.String, nullable=False),
    sql.Column("bytes", sql.BigInteger, nullable=False),
    sql.Column("purpose", sql.String, nullable=False),
    sql.Column("created", sql.Float, nullable=False),
    sql.Column("n_lines", sql.Integer),
    sql.Column("problem", sql.String),
    sql.Column("owner", sql.String, nullable=False),
)
_jobs = sql.Table(
    "jobs",
    _metadata,
    sql.Column("number", sql.Integer, primary_key=True),
    sql.Column("id", sql.String, nullable=False, unique=True),
    sql.Column("name", sql.String, nullable=False),
    sql.Column("model", sql.String, nullable=False),
    sql.Column("status", sql.String, nullable=False),
    sql.Column("created", sql.Float, nullable=False),
    sql.Column("finished", sql.Float),
    sql.Column("training_file", sql.String, nullable=False),
    sql.Column("content", sql.String, nullable=False),
    sql.Column("filename", sql.String, nullable=False),
    sql.Column("hyperparameters", sql.JSON, nullable=False),
    sql.Column("n_steps", sql.Integer, nullable=False, default=0),
    sql.Column("step", sql.Integer, nullable=False, default=0),
    sql.Column("trained_tokens", sql.BigInteger, nullable=False, default=0),
    sql.Column("loss", sql.Float),
    sql.Column("error", sql.JSON),
    sql.Column("fine_tuned_model", sql.String),
    sql.Column("metadata", sql.JSON, nullable=False),
    sql.Column("owner", sql.String, nullable=False),
    sql.Column("validation_file", sql.String),
    sql.Column("validation_content", sql.String),
    sql.Column("validation_filename", sql.String),
    sql.Column("result_files", sql.JSON),
)
_losses = sql.Table(
    "losses",
    _metadata,
    sql.Column("job", sql.String, primary_key=True),
    sql.Column("step", sql.Integer, primary_key=True),
    sql.Column("loss", sql.Float),
    sql.Column("accuracy", sql.Float),
)
_validations = sql.Table(
    "validations",
    _metadata,
    sql.Column("job", sql.String, primary_key=True),
    sql.Column("step", sql.Integer, primary_key=True),
    sql.Column("loss", sql.Float),
    sql.Column("accuracy", sql.Float),
)
_events = sql.Table(
    "events",
    _metadata,
    sql.Column("number", sql.Integer, primary_key=True),
    sql.Column("job", sql.String, nullable=False, index=True),
    sql.Column("created", sql.Float, nullable=False),
    sql.Column("level", sql.String, nullable=False),
    sql.Column("type", sql.String, nullable=False),
    sql.Column("message", sql.String, nullable=False),
    sql.Column("data", sql.JSON, nullable=False),
)
_checkpoints = sql.Table(
    "checkpoints",
    _metadata,
    sql.Column("number", sql.Integer, primary_key=True),
    sql.Column("job", sql.String, nullable=False, index=True),
    sql.Column("step", sql.Integer, nullable=False),
    sql.Column("created", sql.Float, nullable=False),
    sql.Column("loss", sql.Float),
    sql.Column("path", sql.String, nullable=False),
)
UNFINISHED: tuple[JobStatus, ...] = ("validating_files", "queued", "running", "paused")


@dataclass(frozen=True, slots=True)
class NewEvent:
    """What happened to a job; ``created`` in Unix seconds, None = now."""

    message: str
    level: str = "info"
    type: str = "message"
    created: float | None = None
    data: Mapping[str, Any] = field(default_factory=dict)

    def row(self, job_id: str) -> dict[str, Any]:
        return {
            "job": job_id,
            "created": time.time() if self.created is None else self.created,
            "level": self.level,
            "type": self.type,
            "message": self.message,
            "data": _finite(dict(self.data)),
        }


class JobStore:
    """The tables of one file.

    Raises:
        InvalidRequest: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._engine = opened(sql.URL.create("sqlite", database=str(path)), _make)
        except (OSError, SQLAlchemyError) as error:
            reason = str(error).splitlines()[0]
            raise InvalidRequest(
                f"the store of jobs cannot be opened: {reason}",
                field="state",
                given=str(path),
                remedy="Give a folder that can be written to",
            ) from error

    def close(self) -> None:
        self._engine.dispose()

    def about(self, key: str, value: str) -> str:
        """What is kept under ``key``; ``value`` is kept if there is nothing yet."""
        with self._engine.begin() as connection:
            new = upsert(_about).values(key=key, value=value).on_conflict_do_nothing()
            connection.execute(new)
            query = sql.select(_about.c.value).where(_about.c.key == key)
            return str(connection.execute(query).scalar_one())

    # --- files ------------------------------------------------------------------------------
    def add_file(self, content: str, **fields: Any) -> str:
        """Its id. ``fields``: filename, bytes, purpose, n_lines, problem, owner."""
        file_id = f"file-{secrets.token_hex(12)}"
        row = {"id": file_id, "content": content, "created": time.time(), **fields}
        with self._engine.begin() as connection:
            connection.execute(_files.insert().values(**row))
        return file_id

    def files(self, owner: str | None = None) -> list[FileInfo]:
        query = _files.select().order_by(_files.c.number.desc())
        if owner is not None:
            query = query.where(_files.c.owner == owner)
        with self._engine.connect() as connection:
            return [_file(row) for row in connection.execute(query)]

    def file(self, file_id: str) -> FileInfo:
        return _file(self._file_row(file_id))

    def content_of(self, file_id: str) -> str:
        """The name of the file on disk."""
        return str(self._file_row(file_id).content)

    def forget_file(self, file_id: str) -> str | None:
        """Its content's name if no other file has this content, so that it can go.

        Raises:
            Conflict: a job that has not ended needs it.
        """
        content = self.content_of(file_id)
        others = sql.select(_files.c.id).where(_files.c.content == content, _files.c.id != file_id)
        users = sql.select(_jobs.c.id).where(_jobs.c.status.in_(UNFINISHED))
        with self._engine.begin() as connection:
            is_last = connection.execute(others.limit(1)).first() is None
            named = (_jobs.c.training_file == file_id) | (_jobs.c.validation_file == file_id)
            if is_last:
                held = (_jobs.c.content == content) | (_jobs.c.validation_content == content)
                named |= held
            users = users.where(named)
            user = connection.execute(users.limit(1)).scalar()
            if user is not None:
                raise Conflict(
                    f"job {user} needs this file",
                    field="file_id",
                    given=file_id,
                    remedy="Wait until the job has ended, or cancel it",
                )
            connection.execute(_files.delete().where(_files.c.id == file_id))
        return content if is_last else None

    def _file_row(self, file_id: str) -> sql.Row[Any]:
        with self._engine.connect() as connection:
            row = connection.execute(_files.select().where(_files.c.id == file_id)).first()
        if row is None:
            raise NotFound("no such file", field="file_id", given=file_id)
        return row

    # --- jobs -------------------------------------------------------------------------------
    def add_job(self, **fields: Any) -> JobInfo:
        """``fields``: name, model, training_file, content, filename, hyperparameters, metadata,
        owner; validation_file, validation_content, validation_filename if any."""
        job_id = f"ftjob-{secrets.token_hex(12)}"
        row = {"id": job_id, "status": "validating_files", "created": time.time(), **fields}
        with self._engine.begin() as connection:
            connection.execute(_jobs.insert().values(**row))
        return self.job(job_id)

    def jobs(
        self, limit: int | None = None, after: str | None = None, owner: str | None = None
    ) -> list[JobInfo]:
        """Newest first, without their losses."""
        query = _jobs.select().order_by(_jobs.c.number.desc()).limit(limit)
        if after is not None:
            query = query.where(_jobs.c.number < self._job_row(after).number)
        if owner is not None:
            query = query.where(_jobs.c.owner == owner)
        with self._engine.connect() as connection:
            return [_job(row) for row in connection.execute(query)]

    def job(self, job_id: str) -> JobInfo:
        info = _job(self._job_row(job_id))
        query = (
            sql.select(_losses.c.step, _losses.c.loss)
            .where(_losses.c.job == job_id)
            .order_by(_losses.c.step)
        )
        with self._engine.connect() as connection:
            info.losses = [row.loss for row in connection.execute(query)]
            query = (
                _validations.select()
                .where(_validations.c.job == job_id)
                .order_by(_validations.c.step)
            )
            info.validations = [
                Validation(row.step, row.loss, row.accuracy) for row in connection.execute(query)
            ]
        return info

    def metrics(self, job_id: str) -> list[StepMetrics]:
        """Of every step, in order."""
        with self._engine.connect() as connection:
            return [StepMetrics(*row) for row in connection.execute(_metrics_of(job_id))]

    def curve(self, job_id: str, points: int) -> list[tuple[int, float | None]]:
        """(step, loss) of evenly spaced steps, the last one among them; at most ``points``."""
        last = self._job_row(job_id).step
        stride = max(1, -(-last // points))
        query = (
            sql.select(_losses.c.step, _losses.c.loss)
            .where(_losses.c.job == job_id, (last - _losses.c.step) % stride == 0)
            .order_by(_losses.c.step)
            .limit(points)
        )
        with self._engine.connect() as connection:
            return [(row.step, row.loss) for row in connection.execute(query)]

    def data_of(self, job_id: str) -> tuple[str, str]:
        """Content and name of its training file."""
        row = self._job_row(job_id)
        return row.content, row.filename

    def validation_of(self, job_id: str) -> tuple[str, str] | None:
        """Content and name of its validation file."""
        row = self._job_row(job_id)
        return row.validation_content and (row.validation_content, row.validation_filename)

    def unfinished(self) -> list[JobInfo]:
        """Jobs that have not ended, oldest first."""
        query = _jobs.select().where(_jobs.c.status.in_(UNFINISHED)).order_by(_jobs.c.number)
        with self._engine.connect() as connection:
            return [_job(row) for row in connection.execute(query)]

    def succeeded(self) -> list[JobInfo]:
        """In the order in which they ended."""
        query = _jobs.select().where(_jobs.c.status == "succeeded").order_by(_jobs.c.finished)
        with self._engine.connect() as connection:
            return [_job(row) for row in connection.execute(query)]

    def set_job(
        self,
        job_id: str,
        *,
        unless: Sequence[JobStatus] = (),
        told: NewEvent | None = None,
        **fields: Any,
    ) -> bool:
        """Change columns and add the event ``told``, so that whoever sees the one sees the other.

        False, and nothing is done, if the job's status is one of ``unless``.
        """
        change = _jobs.update().where(_jobs.c.id == job_id).values(**fields)
        if unless:
            change = change.where(_jobs.c.status.not_in(unless))
        with self._engine.begin() as connection:
            changed = connection.execute(change).rowcount > 0
            if changed and told is not None:
                connection.execute(_events.insert().values(**told.row(job_id)))
        return changed

    def step_done(
        self,
        job_id: str,
        step: int,
        loss: float | None,
        trained_tokens: int,
        accuracy: float | None = None,
    ) -> None:
        loss = _finite(loss)
        change = {"step": step, "loss": loss, "trained_tokens": trained_tokens}
        with self._engine.begin() as connection:
            connection.execute(_put(_losses, job_id, step, loss, accuracy))
            connection.execute(_jobs.update().where(_jobs.c.id == job_id).values(**change))

    def validated(self, job_id: str, step: int, loss: float, accuracy: float) -> None:
        """The held-out data was run through after ``step``."""
        with self._engine.begin() as connection:
            connection.execute(_put(_validations, job_id, step, _finite(loss), accuracy))

    def back_to(self, job_id: str, step: int, trained_tokens: int) -> None:
        """Forget the steps after ``step``: the job goes on from there."""
        with self._engine.begin() as connection:
            for table in (_losses, _validations):
                later = (table.c.job == job_id) & (table.c.step > step)
                connection.execute(table.delete().where(later))
            query = sql.select(_losses.c.loss).where(
                _losses.c.job == job_id, _losses.c.step == step
            )
            change = {
                "step": step,
                "loss": connection.execute(query).scalar(),
                "trained_tokens": trained_tokens,
            }
            connection.execute(_jobs.update().where(_jobs.c.id == job_id).values(**change))

    def forget_job(self, job_id: str) -> None:
        with self._engine.begin() as connection:
            for table in (_losses, _validations, _events, _checkpoints):
                connection.execute(table.delete().where(table.c.job == job_id))
            connection.execute(_jobs.delete().where(_jobs.c.id == job_id))

    def _job_row(self, job_id: str) -> sql.Row[Any]:
        with self._engine.connect() as connection:
            row = connection.execute(_jobs.select().where(_jobs.c.id == job_id)).first()
        if row is None:
            raise NotFound("no such job", field="job_id", given=job_id)
        return row

    # --- events -----------------------------------------------------------------------------
    def add_event(self, job_id: str, message: str, **more: Any) -> None:
        """``more``: the other fields of :class:`NewEvent`."""
        with self._engine.begin() as connection:
            row = NewEvent(message, **more).row(job_id)
            connection.execute(_events.insert().values(**row))

    def events(self, job_id: str, limit: int, after: str | None) -> list[JobEvent]:
        """Newest first, older than the event ``after``."""
        self._job_row(job_id)
        query = _events.select().where(_events.c.job == job_id)
        query = query.order_by(_events.c.number.desc()).limit(limit)
        if after is not None:
            query = query.where(_events.c.number < _number(after, "ftevent-"))
        with self._engine.connect() as connection:
            return [_event(row) for row in connection.execute(query)]

    # --- checkpoints ------------------------------------------------------------------------
    def add_checkpoint(self, job_id: str, step: int, path: Path) -> None:
        """Replaces one of the same step."""
        loss = sql.select(_losses.c.loss).where(_losses.c.job == job_id, _losses.c.step == step)
        row = {"job": job_id, "step": step, "created": time.time(), "path": str(path)}
        with self._engine.begin() as connection:
            connection.execute(
                _checkpoints.delete().where(
                    _checkpoints.c.job == job_id, _checkpoints.c.step == step
                )
            )
            known = connection.execute(loss).scalar()
            connection.execute(_checkpoints.insert().values(**row, loss=known))

    def checkpoints(self, job_id: str, limit: int, after: str | None) -> list[CheckpointInfo]:
        """Newest first, those whose folder is there."""
        job = _job(self._job_row(job_id))
        query = _checkpoints.select().where(_checkpoints.c.job == job_id)
        query = query.order_by(_checkpoints.c.step.desc())
        if after is not None:
            query = query.where(_checkpoints.c.number < _number(after, "ftckpt-"))
        with self._engine.connect() as connection:
            rows = [row for row in connection.execute(query) if Path(row.path).is_dir()][:limit]
            steps = [row.step for row in rows]
            known = connection.execute(_metrics_of(job_id).where(_losses.c.step.in_(steps)))
            metrics = {found.step: found for found in (StepMetrics(*row) for row in known)}
        return [
            CheckpointInfo(
                id=f"ftckpt-{row.number}",
                job_id=row.job,
                created_at=int(row.created),
                step=row.step,
                metrics=metrics[row.step].known() if row.step in metrics else {},
                fine_tuned_model_checkpoint=f"{job.model}:{checkpoint_name(job.name, row.step)}",
                path=row.path,
            )
            for row in rows
        ]

    def checkpoint_of(self, name: str, step: int, owner: str | None) -> Path | None:
        """The folder of a checkpoint by its adapter's name: that of the newest job that has it."""
        query = (
            sql.select(_checkpoints.c.path)
            .join(_jobs, _jobs.c.id == _checkpoints.c.job)
            .where(_jobs.c.name == name, _checkpoints.c.step == step)
            .order_by(_jobs.c.number.desc())
        )
        if owner is not None:
            query = query.where(_jobs.c.owner == owner)
        with self._engine.connect() as connection:
            found = (Path(path) for path in connection.execute(query).scalars())
            return next((path for path in found if path.is_dir()), None)


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """Of one optimizer step; None where not known or not finite."""

    step: int
    train_loss: float | None
    train_mean_token_accuracy: float | None
    valid_loss: float | None
    valid_mean_token_accuracy: float | None

    def known(self) -> dict[str, float]:
        """Those that are known, without the step."""
        whole = asdict(self)
        del whole["step"]
        return {name: value for name, value in whole.items() if value is not None}


def _metrics_of(job_id: str) -> sql.Select[Any]:
    """Rows of :class:`StepMetrics`."""
    at = (_validations.c.job == _losses.c.job) & (_validations.c.step == _losses.c.step)
    return (
        sql.select(
            _losses.c.step,
            _losses.c.loss,
            _losses.c.accuracy,
            _validations.c.loss,
            _validations.c.accuracy,
        )
        .outerjoin(_validations, at)
        .where(_losses.c.job == job_id)
        .order_by(_losses.c.step)
    )


def _put(
    table: sql.Table, job_id: str, step: int, loss: float | None, accuracy: float | None
) -> sql.Executable:
    """Write a step's loss; one that is there is replaced."""
    values = {"loss": loss, "accuracy": accuracy}
    new = upsert(table).values(job=job_id, step=step, **values)
    return new.on_conflict_do_update(index_elements=["job", "step"], set_=values)


def _file(row: sql.Row[Any]) -> FileInfo:
    return FileInfo(
        id=row.id,
        filename=row.filename,
        bytes=row.bytes,
        purpose=row.purpose,
        created_at=int(row.created),
        n_lines=row.n_lines,
        status="processed" if row.problem is None else "error",
        status_details=row.problem,
        owner=row.owner,
    )


def _job(row: sql.Row[Any]) -> JobInfo:
    return JobInfo(
        id=row.id,
        name=row.name,
        model=row.model,
        status=row.status,
        created_at=int(row.created),
        finished_at=None if row.finished is None else int(row.finished),
        training_file=row.training_file,
        hyperparameters=row.hyperparameters,
        step=row.step,
        n_steps=row.n_steps,
        trained_tokens=row.trained_tokens,
        loss=row.loss,
        error=row.error,
        fine_tuned_model=row.fine_tuned_model,
        metadata=row.metadata,
        owner=row.owner,
        validation_file=row.validation_file,
        result_files=row.result_files or [],
    )


def _event(row: sql.Row[Any]) -> JobEvent:
    return JobEvent(
        id=f"ftevent-{row.number}",
        job_id=row.job,
        created_at=int(row.created),
        level=row.level,
        type=row.type,
        message=row.message,
        data=row.data,
    )


def _number(item_id: str, prefix: str) -> int:
    digits = item_id.removeprefix(prefix)
    if digits == item_id or not digits.isdecimal() or len(digits) > 18:
        raise InvalidRequest("is not an id of this list", field="after", given=item_id)
    return int(digits)


def _finite(value: Any) -> Any:
    """The same without numbers that JSON does not know."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return value


def _make(connection: sql.Connection) -> None:
    _metadata.create_all(connection)
    _add_columns(connection)


def _add_columns(connection: sql.Connection) -> None:
    """Those that a file of an earlier version lacks; all of them may be empty."""
    there = sql.inspect(connection)
    for table in _metadata.sorted_tables:
        known = {column["name"] for column in there.get_columns(table.name)}
        for column in table.columns:
            if column.name not in known:
                kind = column.type.compile(connection.dialect)
                change = f"ALTER TABLE {table.name} ADD COLUMN {column.name} {kind}"
                connection.execute(sql.text(change))
