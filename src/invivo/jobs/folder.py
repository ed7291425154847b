"""The folder of a model's jobs, with or without an engine that runs them.

``jobs.sqlite3``, ``files/<sha256>``, ``checkpoints/<job id>/step-…/``, ``adapters/<name>/`` (in the
peft library's format) and ``lock``, which the process that may change anything holds.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, BinaryIO, Self

from invivo.errors import Conflict, InvalidRequest, Unavailable
from invivo.jobs.store import JobStore, NewEvent
from invivo.lm_jobs import (
    ENDED,
    CheckpointInfo,
    FileInfo,
    JobEvent,
    JobInfo,
    JobRequest,
    JobStatus,
    checkpoint_of,
)

_CHUNK = 1 << 20
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def default_state(model: str, fingerprint: str) -> Path:
    """Where the jobs of a model are kept unless told (``INVIVO_HOME`` overrides the first part)."""
    return default_states() / f"{Path(model).name or 'model'}-{fingerprint[:12]}"


def default_states() -> Path:
    """The folder of all those folders."""
    home = os.environ.get("INVIVO_HOME")
    if home:
        return Path(home).expanduser() / "jobs"
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local/share") / "invivo" / "jobs"


class JobFolder:
    """Files, jobs, events and checkpoints of one folder; thread-safe.

    Without an engine, as here, jobs do not run: they can be looked at, put off, called off and
    forgotten. Unknown ids raise NotFound (fields ``file_id``, ``job_id``).

    Args:
        write: hold the lock; False = look only.

    Raises:
        Conflict: another process holds the folder.
        InvalidRequest: the folder cannot be used.
    """

    def __init__(self, folder: Path, *, write: bool = True) -> None:
        self.folder = folder
        self._files_lock = threading.Lock()
        self._lock_file = _locked(folder / "lock") if write else None
        try:
            self.store = JobStore(folder / "jobs.sqlite3")
        except BaseException:
            self._unlock()
            raise

    def close(self) -> None:
        self.store.close()
        self._unlock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- files ------------------------------------------------------------------------------
    def add_file(
        self, filename: str, source: BinaryIO, purpose: str = "fine-tune", owner: str = ""
    ) -> FileInfo:
        """Take in a file; its lines are looked at when a job is made of it.

        Raises:
            Unavailable: the disk is full or refuses.
        """
        place = self.folder / "files"
        try:
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=place, prefix=".", delete=False) as target:
                path = Path(target.name)
                try:
                    content, n_bytes = _copied(source, target)
                    n_lines, problem = _looked_at(path)
                    with self._files_lock:  # the content may be that of a file that is deleted now
                        path.replace(place / content)
                        file_id = self.store.add_file(
                            content,
                            filename=filename,
                            bytes=n_bytes,
                            purpose=purpose,
                            n_lines=n_lines,
                            problem=problem,
                            owner=owner,
                        )
                except BaseException:
                    path.unlink(missing_ok=True)
                    raise
        except OSError as error:
            raise Unavailable(
                f"the file cannot be stored: {error.strerror or error}",
                field="file",
                given=filename,
                remedy="Make room on the server's disk, then try again",
            ) from error
        return self.store.file(file_id)

    def files(self, owner: str | None = None) -> list[FileInfo]:
        return self.store.files(owner)

    def file(self, file_id: str) -> FileInfo:
        return self.store.file(file_id)

    def content(self, file_id: str) -> bytes:
        """What is in it."""
        return self.file_path(file_id).read_bytes()

    def file_path(self, file_id: str) -> Path:
        """Where its content lies."""
        return self.folder / "files" / self.store.content_of(file_id)

    def delete_file(self, file_id: str) -> None:
        """
        Raises:
            Conflict: a job that has not ended needs it.
        """
        with self._files_lock:
            content = self.store.forget_file(file_id)
            if content is not None:
                (self.folder / "files" / content).unlink(missing_ok=True)

    # --- jobs -------------------------------------------------------------------------------
    def jobs(
        self, limit: int = 20, after: str | None = None, owner: str | None = None
    ) -> list[JobInfo]:
        """Newest first, without their losses."""
        return self.store.jobs(limit, after, owner)

    def job(self, job_id: str) -> JobInfo:
        return self.store.job(job_id)

    def curve(self, job_id: str, points: int) -> list[tuple[int, float | None]]:
        """(step, loss) of evenly spaced steps, the last one among them; at most ``points``."""
        return self.store.curve(job_id, points)

    def events(self, job_id: str, limit: int = 20, after: str | None = None) -> list[JobEvent]:
        return self.store.events(job_id, limit, after)

    def checkpoints(
        self, job_id: str, limit: int = 10, after: str | None = None
    ) -> list[CheckpointInfo]:
        return self.store.checkpoints(job_id, limit, after)

    def create(self, request: JobRequest) -> JobInfo:
        """
        Raises:
            InvalidRequest: no engine is at hand that could look at the data.
        """
        raise InvalidRequest(
            "a job needs a running engine",
            field="state",
            given=str(self.folder),
            remedy="Use invivo finetune, or a server",
        )

    def cancel(self, job_id: str) -> JobInfo:
        """End it.

        Raises:
            Conflict: it has ended already.
        """
        return self._marked(job_id, "cancelled", "Cancelled")

    def pause(self, job_id: str) -> JobInfo:
        """
        Raises:
            Conflict: it has ended.
        """
        return self._marked(job_id, "paused", "Paused")

    def resume(self, job_id: str) -> JobInfo:
        """Let it go on; here, when an engine opens the folder.

        Raises:
            Conflict: it has ended.
        """
        return self._marked(job_id, "queued", "Queued again")

    def delete(self, job_id: str) -> None:
        """Forget an ended job, its checkpoints, and its adapter's files.

        Raises:
            Conflict: it has not ended.
        """
        info = self.job(job_id)
        if info.status not in ENDED:
            raise Conflict(
                f"the job is {info.status}",
                field="job_id",
                given=job_id,
                remedy="Cancel it first",
            )
        self.store.forget_job(job_id)
        shutil.rmtree(self.checkpoint_folder(job_id), ignore_errors=True)
        if not any(info.name == other.name for other in self.store.succeeded()):
            shutil.rmtree(self.adapter_folder(info.name), ignore_errors=True)

    def _marked(self, job_id: str, status: JobStatus, message: str) -> JobInfo:
        info = self.store.job(job_id)
        if info.status in ENDED:
            raise already_ended(info)
        if info.status == status:
            return info
        more = {"finished": time.time()} if status in ENDED else {}
        self.store.set_job(job_id, unless=ENDED, told=NewEvent(message), status=status, **more)
        return self.store.job(job_id)

    # --- places -----------------------------------------------------------------------------
    def checkpoint_folder(self, job_id: str) -> Path:
        return self.folder / "checkpoints" / job_id

    def adapter_folder(self, name: str) -> Path:
        return self.folder / "adapters" / name

    def checkpoint_folder_of(self, adapter: str, owner: str | None = None) -> Path | None:
        """Where the checkpoint lies that is served as ``adapter``; None if there is none.

        Args:
            owner: whose jobs are looked at; None = everyone's.
        """
        asked = checkpoint_of(adapter)
        return None if asked is None else self.store.checkpoint_of(*asked, owner)

    def export(self, checkpoint: Path, name: str) -> Path:
        """Put a checkpoint's adapter in its place as a whole.

        Raises:
            OSError: the disk is full or refuses.
        """
        final = self.adapter_folder(name)
        final.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{name}-"))
        try:
            for file in _ADAPTER_FILES:
                shutil.copyfile(checkpoint / file, fresh / file)
            fresh.chmod(0o755)
            old = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{name}-"))
            if final.exists():
                final.rename(old / name)
            fresh.rename(final)
            shutil.rmtree(old, ignore_errors=True)
        except OSError:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        return final

    def _unlock(self) -> None:
        if self._lock_file is not None:
            self._lock_file.close()
            self._lock_file = None


def already_ended(info: JobInfo) -> Conflict:
    return Conflict(
        f"the job is {info.status}: it has ended",
        field="job_id",
        given=info.id,
        remedy="Only a job that has not ended is paused, resumed or cancelled; start another",
    )


def _locked(path: Path) -> IO[str]:
    """The lock of the folder; the operating system gives it back when the process dies."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(
            f"the folder of jobs cannot be used: {error.strerror}",
            field="state",
            given=str(path.parent),
            remedy="Give a folder that can be written to",
        ) from error
    try:
        import fcntl
    except ImportError:  # no such locks on this system: one process at a time is up to the user
        return handle
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        handle.seek(0)
        holder = handle.read().strip() or "another process"
        handle.close()
        raise Conflict(
            f"the jobs of this model are in the hands of {holder}",
            field="state",
            given=str(path.parent),
            remedy="Ask that server (invivo.connect, --url), or give a state folder of its own",
        ) from error
    handle.truncate(0)
    handle.write(f"process {os.getpid()}")
    handle.flush()
    return handle


def _copied(source: BinaryIO, target: IO[bytes]) -> tuple[str, int]:
    """SHA-256 and size of what was copied, which is on the disk then."""
    told, size = hashlib.sha256(), 0
    while chunk := source.read(_CHUNK):
        told.update(chunk)
        size += len(chunk)
        target.write(chunk)
    target.flush()
    os.fsync(target.fileno())
    return told.hexdigest(), size


def _looked_at(path: Path) -> tuple[int | None, str | None]:
    """Lines that are not blank, and what is wrong with the file as a whole."""
    n_lines = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                n_lines += bool(line.decode("utf-8").strip())
            except UnicodeDecodeError:
                return None, f"line {number} is not UTF-8 text"
    return n_lines, None if n_lines else "the file is empty"
