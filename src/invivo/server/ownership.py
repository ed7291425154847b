"""Whose file or job it is: a key sees its own, an administrator all, others' do not exist."""

from __future__ import annotations

from invivo.errors import Forbidden, NotFound
from invivo.lm_jobs import FileInfo, JobInfo, checkpoint_of
from invivo.server.auth import Principal
from invivo.server.services import Services

_ALL = 1 << 30


def stored_as(principal: Principal) -> str:
    """The owner under whom the principal's things are kept; "" without keys."""
    return principal.key_id or ""


def seen_by(principal: Principal) -> str | None:
    """The owner whose things the principal sees, None = everyone's."""
    return None if principal.may("admin") else stored_as(principal)


def check_files_of(
    services: Services, principal: Principal, adapter: str, field: str = "name"
) -> None:
    """Whether the principal may have the numbers of an adapter or a checkpoint.

    Raises:
        NotFound: there is none of this name, or it is a checkpoint of another's job.
        Forbidden: it is another's, and the key has no right to adapters.
    """
    try:
        services.adapter_of(f"{services.model_name}:{adapter}", seen_by(principal))
    except NotFound as error:
        error.field = field
        raise
    name, _ = checkpoint_of(adapter) or (adapter, 0)
    if not principal.may("adapters") and not has_job(services, principal, name):
        raise Forbidden(
            "the key may ask this adapter, but not have what is in it",
            field=field,
            given=adapter,
            remedy="Use a key with the scope adapters, or that of the job that has made it",
        )


def has_job(services: Services, principal: Principal, name: str) -> bool:
    """Whether a job that is the principal's own makes, or has made, the adapter ``name``."""
    own = services.jobs.jobs(_ALL, owner=stored_as(principal))
    return any(job.name == name for job in own)


def own_file(
    services: Services, principal: Principal, file_id: str, field: str = "file_id"
) -> FileInfo:
    """The file that ``field`` names.

    Raises:
        NotFound: it is unknown or another's, in the same words.
    """
    try:
        info = services.jobs.file(file_id)
    except NotFound:
        info = None
    if info is None or seen_by(principal) not in (None, info.owner):
        raise NotFound(
            "no such file", field=field, given=file_id, remedy="See GET /v1/files for yours"
        )
    return info


def own_job(
    services: Services, principal: Principal, job_id: str, field: str = "job_id"
) -> JobInfo:
    """The job that ``field`` names.

    Raises:
        NotFound: it is unknown or another's, in the same words.
    """
    try:
        info = services.jobs.job(job_id)
    except NotFound:
        info = None
    if info is None or seen_by(principal) not in (None, info.owner):
        raise NotFound(
            "no such job", field=field, given=job_id, remedy="See GET /v1/fine_tuning/jobs"
        )
    return info
