"""Files and fine-tuning jobs of a server: the backend of :mod:`invivo.lm_jobs` over HTTP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote

from invivo.errors import InvivoError
from invivo.lm_jobs import (
    CheckpointInfo,
    FileInfo,
    JobEvent,
    JobInfo,
    JobRequest,
    Validation,
)
from invivo.transport import Transport
from invivo.wire import JsonBody

T = TypeVar("T")

FILES = "/v1/files"
JOBS = "/v1/fine_tuning/jobs"
_PAGE = 1000  # entries of a list in one answer
_WITHIN = ("method.supervised.hyperparameters.", "hyperparameters.")


class RemoteJobs:
    """A :class:`invivo.lm_jobs.FineTuningBackend`; the key decides whose files and jobs it sees.

    Args:
        model: name that the server gives its model.
    """

    def __init__(self, http: Transport, model: str) -> None:
        self._http = http
        self._model = model

    # --- files ------------------------------------------------------------------------------
    def add_file(
        self, filename: str, source: BinaryIO, purpose: str = "fine-tune", owner: str = ""
    ) -> FileInfo:
        upload = self._http.request(
            "POST", FILES, data={"purpose": purpose}, files={"file": (filename, source)}
        )
        return _file_of(self._http.wait(upload))

    def files(self, owner: str | None = None) -> list[FileInfo]:
        return self._listed(FILES, _file_of)

    def file(self, file_id: str) -> FileInfo:
        return _file_of(self._get(f"{FILES}/{quote(file_id, safe='')}"))

    def content(self, file_id: str) -> bytes:
        path = f"{FILES}/{quote(file_id, safe='')}/content"
        return self._http.wait(self._http.fetch(path))

    def delete_file(self, file_id: str) -> None:
        self._http.wait(self._http.request("DELETE", f"{FILES}/{quote(file_id, safe='')}"))

    # --- jobs -------------------------------------------------------------------------------
    def create(self, request: JobRequest) -> JobInfo:
        body: JsonBody = {
            "model": self._model,
            "training_file": request.training_file,
            "validation_file": request.validation_file,
            "hyperparameters": request.hyperparameters.as_dict(),
            "suffix": request.name,
            "metadata": dict(request.metadata),
        }
        try:
            return _job_of(self._http.wait(self._http.post(JOBS, body)))
        except InvivoError as error:  # named as the caller of this process wrote it
            raise _renamed(error) from None

    def jobs(
        self, limit: int = 20, after: str | None = None, owner: str | None = None
    ) -> list[JobInfo]:
        return self._listed(JOBS, _job_of, limit, after)

    def job(self, job_id: str) -> JobInfo:
        return _job_of(self._get(_path(job_id)))

    def cancel(self, job_id: str) -> JobInfo:
        return self._ordered(job_id, "cancel")

    def pause(self, job_id: str) -> JobInfo:
        return self._ordered(job_id, "pause")

    def resume(self, job_id: str) -> JobInfo:
        return self._ordered(job_id, "resume")

    def delete(self, job_id: str) -> None:
        self._http.wait(self._http.request("DELETE", _path(job_id)))

    def events(self, job_id: str, limit: int = 20, after: str | None = None) -> list[JobEvent]:
        return self._listed(
            _path(job_id, "events"), lambda item: _event_of(item, job_id), limit, after
        )

    def checkpoints(
        self, job_id: str, limit: int = 10, after: str | None = None
    ) -> list[CheckpointInfo]:
        return self._listed(_path(job_id, "checkpoints"), _checkpoint_of, limit, after)

    # --- requests ---------------------------------------------------------------------------
    def _get(self, path: str, **query: Any) -> JsonBody:
        return self._http.wait(self._http.request("GET", path, params=query))

    def _ordered(self, job_id: str, order: str) -> JobInfo:
        return _job_of(self._http.wait(self._http.request("POST", _path(job_id, order))))

    def _listed(
        self,
        path: str,
        read: Callable[[JsonBody], T],
        limit: int | None = None,
        after: str | None = None,
    ) -> list[T]:
        """Up to ``limit`` entries of a list that the server cuts into pages."""
        found: list[T] = []
        while limit is None or len(found) < limit:
            wanted = _PAGE if limit is None else min(_PAGE, limit - len(found))
            query = {"limit": wanted} | ({} if after is None else {"after": after})
            page = self._get(path, **query)
            found += [read(item) for item in page["data"]]
            if not page["has_more"] or not page["data"]:
                break
            after = page["data"][-1]["id"]
        return found


def _path(job_id: str, *more: str) -> str:
    return "/".join((JOBS, quote(job_id, safe=""), *more))


def _file_of(item: JsonBody) -> FileInfo:
    return FileInfo(
        id=item["id"],
        filename=item["filename"],
        bytes=item["bytes"],
        purpose=item["purpose"],
        created_at=item["created_at"],
        n_lines=item["n_lines"],
        status=item["status"],
        status_details=item["status_details"],
    )


def _job_of(item: JsonBody) -> JobInfo:
    hyperparameters = dict(item["hyperparameters"])
    hyperparameters.pop("learning_rate_multiplier", None)
    return JobInfo(
        id=item["id"],
        name=item["name"],
        model=item["model"],
        status=item["status"],
        created_at=item["created_at"],
        training_file=item["training_file"],
        hyperparameters=hyperparameters,
        finished_at=item["finished_at"],
        step=item["step"],
        n_steps=item["n_steps"],
        trained_tokens=item["trained_tokens"] or 0,
        loss=item["loss"],
        losses=item["losses"],
        error=item["error"],
        fine_tuned_model=item["fine_tuned_model"],
        estimated_finish=item["estimated_finish"],
        tokens_per_second=item["tokens_per_second"],
        metadata=item["metadata"] or {},
        validation_file=item["validation_file"],
        validations=[Validation(**one) for one in item["validations"]],
        result_files=item["result_files"],
    )


def _event_of(item: JsonBody, job_id: str) -> JobEvent:
    return JobEvent(
        id=item["id"],
        job_id=job_id,
        created_at=item["created_at"],
        level=item["level"],
        type=item["type"],
        message=item["message"],
        data=item["data"],
    )


def _checkpoint_of(item: JsonBody) -> CheckpointInfo:
    metrics = item["metrics"]
    wanted = ("train_", "valid_")  # the others are the same again
    return CheckpointInfo(
        id=item["id"],
        job_id=item["fine_tuning_job_id"],
        created_at=item["created_at"],
        step=item["step_number"],
        metrics={
            name: value
            for name, value in metrics.items()
            if value is not None and name.startswith(wanted)
        },
        fine_tuned_model_checkpoint=item["fine_tuned_model_checkpoint"],
        path="",
    )


def _renamed(error: InvivoError) -> InvivoError:
    field = error.field
    for prefix in _WITHIN:
        field = None if field is None else field.removeprefix(prefix)
    if field == "suffix":
        field = "name"
    return type(error)(error.message, field=field, given=error.given, remedy=error.remedy)
