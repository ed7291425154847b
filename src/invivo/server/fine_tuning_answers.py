"""Responses of /v1/files and /v1/fine_tuning: OpenAI's objects, and more in the jobs."""

from __future__ import annotations

from typing import Any, Literal

from invivo.server.answers import Answer

JobStatus = Literal[
    "validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"
]


class File(Answer):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: str
    status_details: str | None
    n_lines: int | None


class FileList(Answer):
    object: Literal["list"]
    data: list[File]
    has_more: bool
    first_id: str | None
    last_id: str | None


class DeletedFile(Answer):
    id: str
    object: Literal["file"]
    deleted: bool


class JobError(Answer):
    code: str
    message: str
    param: str | None


class Supervised(Answer):
    hyperparameters: dict[str, Any]


class JobMethod(Answer):
    type: Literal["supervised"]
    supervised: Supervised


class Validation(Answer):
    """A look at the held-out data: loss per learned token, share of them guessed right."""

    step: int
    loss: float | None
    accuracy: float | None


class FineTuningJob(Answer):
    """OpenAI's job; from ``name`` on what invivo adds. ``result_files`` has one CSV file with the
    metrics of every step, once the job has ended.

    ``losses`` is the mean loss per learned token of every optimizer step; a step that was skipped
    because its loss or gradient was not finite has null.
    """

    id: str
    object: Literal["fine_tuning.job"]
    created_at: int
    finished_at: int | None
    model: str
    fine_tuned_model: str | None
    status: JobStatus
    hyperparameters: dict[str, Any]
    method: JobMethod
    training_file: str
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    error: JobError | None
    estimated_finish: int | None
    seed: int
    organization_id: str
    integrations: None
    metadata: dict[str, str] | None
    name: str
    step: int
    n_steps: int
    loss: float | None
    losses: list[float | None]
    validations: list[Validation]
    tokens_per_second: float | None


class JobList(Answer):
    object: Literal["list"]
    data: list[FineTuningJob]
    has_more: bool


class DeletedJob(Answer):
    id: str
    object: Literal["fine_tuning.job"]
    deleted: bool


class JobEvent(Answer):
    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    type: Literal["message", "metrics"]
    message: str
    data: dict[str, Any]


class JobEventList(Answer):
    object: Literal["list"]
    data: list[JobEvent]
    has_more: bool


class CheckpointMetrics(Answer):
    """OpenAI's names; validation always covers the whole file, so that ``valid_`` and
    ``full_valid_`` are equal."""

    step: int
    train_loss: float | None = None
    train_mean_token_accuracy: float | None = None
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None
    full_valid_loss: float | None = None
    full_valid_mean_token_accuracy: float | None = None


class Checkpoint(Answer):
    id: str
    object: Literal["fine_tuning.job.checkpoint"]
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: CheckpointMetrics


class CheckpointList(Answer):
    object: Literal["list"]
    data: list[Checkpoint]
    has_more: bool
    first_id: str | None
    last_id: str | None
