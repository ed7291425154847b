"""/v1/fine_tuning/jobs: OpenAI's routes over the job service. A key sees its own jobs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request

from invivo.errors import Conflict, InvalidRequest, InvivoError
from invivo.lm_jobs import (
    CheckpointInfo,
    Hyperparameters,
    JobInfo,
    JobRequest,
    checkpoint_name,
)
from invivo.lm_jobs import JobEvent as Event
from invivo.server.auth import Principal, needs
from invivo.server.carried import check_editor
from invivo.server.documents import failures
from invivo.server.fine_tuning_answers import (
    Checkpoint,
    CheckpointList,
    CheckpointMetrics,
    DeletedJob,
    FineTuningJob,
    JobError,
    JobEvent,
    JobEventList,
    JobList,
    JobMethod,
    Supervised,
    Validation,
)
from invivo.server.fine_tuning_schemas import FineTuningRequest, HyperparametersBody
from invivo.server.ownership import check_files_of, own_file, own_job, seen_by, stored_as
from invivo.server.services import Services, services_of

router = APIRouter(tags=["fine-tuning"])

JOBS_PATH = "/v1/fine_tuning/jobs"
ONE_JOB = JOBS_PATH + "/{job_id}"
_ALL = 1 << 30

Tuner = Annotated[Principal, Depends(needs("finetune"))]
After = Annotated[str | None, Query(max_length=128, description="Last id of the page before")]
Limit = Annotated[int, Query(ge=1, le=1000)]

# Plain functions: they wait for the disk, FastAPI runs them in its thread pool.


@router.post(JOBS_PATH, response_model=FineTuningJob, responses=failures(409))
def create_job(body: FineTuningRequest, request: Request, principal: Tuner) -> FineTuningJob:
    """Begins to learn from a file beside serving; errors in the file's lines name the lines."""
    services = services_of(request)
    start = _start(services, principal, body)
    if body.chosen.program is not None:
        check_editor(principal)
    own_file(services, principal, body.training_file, field="training_file")
    if body.validation_file is not None:
        own_file(services, principal, body.validation_file, field="validation_file")
    if body.suffix is not None:
        _check_name(services, principal, body.suffix)
    try:
        info = services.jobs.create(_asked(body, start, stored_as(principal)))
    except InvivoError as error:
        error.field = _as_written(error.field, body)
        raise
    return _job(services, info)


@router.get(JOBS_PATH, response_model=JobList, responses=failures())
def list_jobs(
    request: Request, principal: Tuner, after: After = None, limit: Limit = 20
) -> JobList:
    """The caller's jobs (an administrator's view: all), newest first, without their losses.

    A query ``metadata[key]=value`` leaves those with this entry.
    """
    services = services_of(request)
    if after is not None:
        own_job(services, principal, after, field="after")
    wanted = {
        name.removeprefix("metadata[").removesuffix("]"): value
        for name, value in request.query_params.items()
        if name.startswith("metadata[") and name.endswith("]")
    }
    found = services.jobs.jobs(_ALL if wanted else limit + 1, after, owner=seen_by(principal))
    found = [one for one in found if wanted.items() <= one.metadata.items()]
    page = [_job(services, one) for one in found[:limit]]
    return JobList(object="list", data=page, has_more=len(found) > limit)


@router.get(ONE_JOB, response_model=FineTuningJob, responses=failures())
def get_job(job_id: str, request: Request, principal: Tuner) -> FineTuningJob:
    """How one job stands, with the loss of every step."""
    services = services_of(request)
    return _job(services, own_job(services, principal, job_id))


@router.post(ONE_JOB + "/cancel", response_model=FineTuningJob, responses=failures(409))
def cancel_job(job_id: str, request: Request, principal: Tuner) -> FineTuningJob:
    """Ends a job; versions of its adapter that were published stay."""
    services = services_of(request)
    return _ordered(services, principal, job_id, services.jobs.cancel)


@router.post(ONE_JOB + "/pause", response_model=FineTuningJob, responses=failures(409))
def pause_job(job_id: str, request: Request, principal: Tuner) -> FineTuningJob:
    """Gives the job's memory back until it is resumed."""
    services = services_of(request)
    return _ordered(services, principal, job_id, services.jobs.pause)


@router.post(ONE_JOB + "/resume", response_model=FineTuningJob, responses=failures(409))
def resume_job(job_id: str, request: Request, principal: Tuner) -> FineTuningJob:
    """Lets a paused job go on."""
    services = services_of(request)
    return _ordered(services, principal, job_id, services.jobs.resume)


@router.delete(ONE_JOB, response_model=DeletedJob, responses=failures(409))
def delete_job(job_id: str, request: Request, principal: Tuner) -> DeletedJob:
    """Forgets a job that has ended, and its checkpoints (extension)."""
    services = services_of(request)
    info = own_job(services, principal, job_id)
    services.jobs.delete(info.id)
    return DeletedJob(id=info.id, object="fine_tuning.job", deleted=True)


@router.get(ONE_JOB + "/events", response_model=JobEventList, responses=failures())
def list_events(
    job_id: str, request: Request, principal: Tuner, after: After = None, limit: Limit = 20
) -> JobEventList:
    """What happened to a job, newest first."""
    services = services_of(request)
    info = own_job(services, principal, job_id)
    found = services.jobs.events(info.id, limit + 1, after)
    page = [_event(one) for one in found[:limit]]
    return JobEventList(object="list", data=page, has_more=len(found) > limit)


@router.get(ONE_JOB + "/checkpoints", response_model=CheckpointList, responses=failures())
def list_checkpoints(
    job_id: str, request: Request, principal: Tuner, after: After = None, limit: Limit = 10
) -> CheckpointList:
    """The checkpoints that are kept, newest first, each served by its name."""
    services = services_of(request)
    info = own_job(services, principal, job_id)
    found = services.jobs.checkpoints(info.id, limit + 1, after)
    page = [_checkpoint(services, info, one) for one in found[:limit]]
    return CheckpointList(
        object="list",
        data=page,
        has_more=len(found) > limit,
        first_id=page[0].id if page else None,
        last_id=page[-1].id if page else None,
    )


def _ordered(
    services: Services, principal: Principal, job_id: str, order: Callable[[str], JobInfo]
) -> FineTuningJob:
    return _job(services, order(own_job(services, principal, job_id).id))


def _start(services: Services, principal: Principal, body: FineTuningRequest) -> str | None:
    """The adapter that training begins with, named as the model or among the hyperparameters."""
    named = services.adapter_of(body.model, seen_by(principal))
    chosen = body.chosen.start
    if None not in (named, chosen) and named != chosen:
        raise InvalidRequest(
            "is another adapter than that of the model",
            field=_as_written("start", body),
            given=chosen,
            remedy="Give one of the two",
        )
    start = named or chosen
    if start is not None:
        where = "model" if named is not None else _as_written("start", body)
        assert where is not None
        check_files_of(services, principal, start, where)
    return start


def _asked(body: FineTuningRequest, start: str | None, owner: str) -> JobRequest:
    given: dict[str, Any] = {
        name: value
        for name, value in body.chosen.model_dump(exclude_unset=True).items()
        if value != "auto" and (value is not None or name == "clip")  # no clipping is a choice
    }
    multiplier = given.pop("learning_rate_multiplier", None)
    if multiplier is not None:
        given["learning_rate"] = multiplier * Hyperparameters().learning_rate
    if body.seed is not None:
        given["seed"] = body.seed
    if start is not None:
        given["start"] = start
    return JobRequest(
        training_file=body.training_file,
        hyperparameters=Hyperparameters.of(given),
        name=body.suffix,
        metadata=body.metadata or {},
        owner=owner,
        validation_file=body.validation_file,
    )


def _as_written(field: str | None, body: FineTuningRequest) -> str | None:
    """Where the caller wrote what the job service calls ``field``."""
    if field == "name":
        return "suffix"
    if field in {"size", *HyperparametersBody.model_fields}:
        name = "r" if field == "size" else field
        inside = "" if body.hyperparameters is not None else "method.supervised."
        return f"{inside}hyperparameters.{name}"
    return field


def _check_name(services: Services, principal: Principal, name: str) -> None:
    """A key may give its own adapters new versions, but not everyone else's."""
    if principal.may("adapters"):
        return
    own = stored_as(principal)
    owners = {one.owner for one in services.jobs.jobs(_ALL) if one.name == name}
    loaded = any(adapter.name == name for adapter in services.lm.adapters())
    if owners - {own} or (loaded and own not in owners):
        raise Conflict(
            "an adapter of this name is another's",
            field="suffix",
            given=name,
            remedy="Choose another suffix, or use a key with the scope adapters",
        )


def _job(services: Services, info: JobInfo) -> FineTuningJob:
    shown = dict(info.hyperparameters)
    usual = Hyperparameters().learning_rate
    shown["learning_rate_multiplier"] = shown["learning_rate"] / usual
    error = info.error
    base = services.model_name
    return FineTuningJob(
        id=info.id,
        object="fine_tuning.job",
        created_at=info.created_at,
        finished_at=info.finished_at,
        model=base,
        fine_tuned_model=_result(info, base),
        status=info.status,
        hyperparameters=shown,
        method=JobMethod(type="supervised", supervised=Supervised(hyperparameters=shown)),
        training_file=info.training_file,
        validation_file=info.validation_file,
        result_files=info.result_files,
        trained_tokens=info.trained_tokens,
        error=None
        if error is None
        else JobError(code=error["code"], message=error["message"], param=error.get("param")),
        estimated_finish=info.estimated_finish,
        seed=shown["seed"],
        organization_id="invivo",
        integrations=None,
        metadata=info.metadata,
        name=info.name,
        step=info.step,
        n_steps=info.n_steps,
        loss=info.loss,
        losses=info.losses,
        validations=[
            Validation(step=one.step, loss=one.loss, accuracy=one.accuracy)
            for one in info.validations
        ],
        tokens_per_second=info.tokens_per_second,
    )


def _result(info: JobInfo, base: str) -> str | None:
    """``base:name``, or the hash of the program that was trained."""
    made = info.fine_tuned_model
    return f"{base}:{info.name}" if made and info.hyperparameters["method"] != "program" else made


def _event(event: Event) -> JobEvent:
    return JobEvent(
        id=event.id,
        object="fine_tuning.job.event",
        created_at=event.created_at,
        level=event.level,
        type=event.type,
        message=event.message,
        data=event.data,
    )


def _full(metrics: dict[str, float]) -> dict[str, float]:
    """Those over the whole validation file, which all are, by OpenAI's names for that."""
    return {f"full_{name}": value for name, value in metrics.items() if name.startswith("valid_")}


def _checkpoint(services: Services, job: JobInfo, checkpoint: CheckpointInfo) -> Checkpoint:
    return Checkpoint(
        id=checkpoint.id,
        object="fine_tuning.job.checkpoint",
        created_at=checkpoint.created_at,
        fine_tuning_job_id=job.id,
        fine_tuned_model_checkpoint=(
            f"{services.model_name}:{checkpoint_name(job.name, checkpoint.step)}"
        ),
        step_number=checkpoint.step,
        metrics=CheckpointMetrics(
            step=checkpoint.step, **checkpoint.metrics, **_full(checkpoint.metrics)
        ),
    )
