"""``invivo jobs``: fine-tuning jobs of a server, or those kept on this machine."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from invivo.cli import options
from invivo.cli.keys import day
from invivo.cli.output import examples, note, print_json, print_table
from invivo.errors import InvalidRequest, NotFound

if TYPE_CHECKING:
    from invivo.jobs.folder import JobFolder
    from invivo.lm_jobs import CheckpointInfo, FineTuningBackend, JobEvent, JobInfo

app = typer.Typer(
    help="Fine-tuning jobs: list, show, events, cancel, pause, resume, delete.",
    epilog=examples(
        "invivo jobs list --url http://127.0.0.1:8000",
        "invivo jobs show ftjob-1a2b --follow --url http://127.0.0.1:8000",
        "invivo jobs list                       jobs kept on this machine",
        "invivo jobs resume ftjob-1a2b          goes on when the server is started again",
    ),
    no_args_is_help=True,
)
State = Annotated[
    Path | None,
    typer.Option(
        "--state",
        envvar="INVIVO_STATE",
        help="Folder of jobs; those in the user's data folder if not given.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="The result as JSON.")]
JobId = Annotated[str, typer.Argument(help="Name of the job, or its id or the beginning of it.")]
SHOWN_OF_ID = 14  # characters, the prefix "ftjob-" among them
LEAST_OF_ID = 8
BARS = "▁▂▃▄▅▆▇█"


@app.command("list", epilog=examples("invivo jobs list --json"))
def list_jobs(
    url: options.Url = None, key: options.Key = None, state: State = None, as_json: AsJson = False
) -> None:
    """Show all jobs, newest first."""
    found: list[JobInfo] = []
    if url is not None:
        with server(url, key, state) as backend:
            while page := backend.jobs(100, found[-1].id if found else None):
                found += page
    else:
        for folder in folders(state):
            with looked_at(folder) as kept:
                found += kept.store.jobs()
        found.sort(key=lambda info: info.created_at, reverse=True)
    if as_json:
        print_json([asdict(info) for info in found])
        return
    if not found:
        note("No jobs yet: invivo finetune DATA")
        return
    several = len({info.model for info in found}) > 1
    print_table(
        "",
        ["name", "status", "step>", "loss>", "created", "id", *(["model"] if several else [])],
        [
            [
                info.name,
                info.status,
                f"{info.step}/{info.n_steps}" if info.n_steps else "-",
                "-" if info.loss is None else f"{info.loss:.4f}",
                day(info.created_at),
                info.id[:SHOWN_OF_ID],
                *([info.model] if several else []),
            ]
            for info in found
        ],
    )


@app.command(epilog=examples("invivo jobs show poet --follow --url http://127.0.0.1:8000"))
def show(
    job: JobId,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Watch it until it ends (with --url).")
    ] = False,
    url: options.Url = None,
    key: options.Key = None,
    state: State = None,
    as_json: AsJson = False,
) -> None:
    """Show one job: its settings, its loss, what came of it."""
    from invivo.lm_jobs import Job

    if follow and url is None:
        raise InvalidRequest("goes with --url", field="--follow")
    with found(job, url, key, state) as (backend, info):
        if follow:
            Job(info.id, backend).wait(progress=not as_json and sys.stderr.isatty())
        info = backend.job(info.id)
        kept = [_checkpoint(one) for one in backend.checkpoints(info.id)]
    if as_json:
        print_json(asdict(info))
        return
    rows = [
        ["id", info.id],
        ["name", info.name],
        ["model", info.model],
        ["status", info.status],
        ["created", day(info.created_at)],
        ["finished", day(info.finished_at)],
        ["step", f"{info.step} of {info.n_steps}"],
        ["tokens", f"{info.trained_tokens:,}"],
        ["loss", curve(info.losses)],
        *_held_out(info),
        ["served as", info.fine_tuned_model or "-"],
        ["data", info.training_file],
        *[["metrics", file_id] for file_id in info.result_files],
        *[["checkpoint", told] for told in kept],
    ]
    if info.error:
        rows.append(["error", info.error["message"]])
    chosen = {name: value for name, value in info.hyperparameters.items() if value is not None}
    rows.append(["settings", ", ".join(f"{name}={value}" for name, value in chosen.items())])
    print_table("", ["", ""], rows)


@app.command(epilog=examples("invivo jobs events poet --follow --url http://127.0.0.1:8000"))
def events(
    job: JobId,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until it ends (with --url).")
    ] = False,
    limit: Annotated[int, typer.Option("--limit", min=1, help="The latest so many.")] = 50,
    url: options.Url = None,
    key: options.Key = None,
    state: State = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Show what happened to a job, oldest first."""
    from invivo.lm_jobs import ENDED

    if follow and url is None:
        raise InvalidRequest("goes with --url", field="--follow")
    with found(job, url, key, state) as (backend, info):
        seen: set[str] = set()
        while True:
            ended = backend.job(info.id).status in ENDED
            new = [one for one in backend.events(info.id, limit, None) if one.id not in seen]
            seen |= {one.id for one in new}
            for event in reversed(new):
                print_event(event, as_json)
            if not follow or ended:
                return
            time.sleep(0.5)


@app.command(epilog=examples("invivo jobs cancel poet --url http://127.0.0.1:8000"))
def cancel(
    job: JobId, url: options.Url = None, key: options.Key = None, state: State = None
) -> None:
    """End a job; versions of its adapter that were published stay."""
    with found(job, url, key, state, write=True) as (backend, info):
        note(f"{info.name} is {backend.cancel(info.id).status}")


@app.command(epilog=examples("invivo jobs pause poet --url http://127.0.0.1:8000"))
def pause(
    job: JobId, url: options.Url = None, key: options.Key = None, state: State = None
) -> None:
    """Write a checkpoint and give the job's memory back."""
    with found(job, url, key, state, write=True) as (backend, info):
        note(f"{info.name} is {backend.pause(info.id).status}")


@app.command(epilog=examples("invivo jobs resume poet --url http://127.0.0.1:8000"))
def resume(
    job: JobId, url: options.Url = None, key: options.Key = None, state: State = None
) -> None:
    """Let a paused job go on; without a server, as soon as one is started."""
    with found(job, url, key, state, write=True) as (backend, info):
        note(f"{info.name} is {backend.resume(info.id).status}")


@app.command(epilog=examples("invivo jobs delete poet"))
def delete(
    job: JobId, url: options.Url = None, key: options.Key = None, state: State = None
) -> None:
    """Forget an ended job, its checkpoints and its adapter's files."""
    with found(job, url, key, state, write=True) as (backend, info):
        backend.delete(info.id)
        note(f"{info.name} is deleted")


@contextmanager
def server(url: str, key: str | None, state: Path | None) -> Iterator[FineTuningBackend]:
    from invivo.cli.opening import opened

    if state is not None:
        raise InvalidRequest(
            "is of this machine and cannot go with --url", field="--state", given=str(state)
        )
    with opened(None, url=url, key=key) as lm:
        yield lm.fine_tuning


@contextmanager
def found(
    job: str, url: str | None, key: str | None, state: Path | None, *, write: bool = False
) -> Iterator[tuple[FineTuningBackend, JobInfo]]:
    """The newest job of this name, or the one of this id, and who keeps it."""
    if url is not None:
        with server(url, key, state) as backend:
            yield backend, job_of(backend.jobs(1000), job)
        return
    jobs: dict[str, tuple[JobInfo, Path]] = {}
    for folder in folders(state):
        with looked_at(folder) as kept:
            jobs.update({info.id: (info, folder) for info in kept.store.jobs()})
    info, folder = jobs[job_of([info for info, _ in jobs.values()], job).id]
    with opened_folder(folder, write) as kept:
        yield kept, info


def job_of(jobs: list[JobInfo], job: str) -> JobInfo:
    """The newest of this name, else the one whose id is or begins like ``job``.

    Raises:
        NotFound: there is none.
        InvalidRequest: the ids of several begin so.
    """
    named = [info for info in jobs if info.name == job]
    begun = [info for info in jobs if len(job) >= LEAST_OF_ID and info.id.startswith(job)]
    if not named and len(begun) > 1:
        raise InvalidRequest("several ids begin so", field="JOB", given=job, remedy="Write more")
    if not named and not begun:
        raise NotFound("no such job", field="JOB", given=job, remedy="See `invivo jobs list`")
    return max(named or begun, key=lambda info: info.created_at)


def folders(state: Path | None) -> list[Path]:
    """Folders with jobs: the one that was named, or all in the user's data folder."""
    from invivo.jobs.folder import default_states

    if state is not None:
        if not (state / "jobs.sqlite3").exists():
            raise NotFound("holds no jobs", field="--state", given=str(state))
        return [state]
    return sorted(path.parent for path in default_states().glob("*/jobs.sqlite3"))


def looked_at(folder: Path) -> JobFolder:
    return opened_folder(folder, write=False)


def opened_folder(folder: Path, write: bool) -> JobFolder:
    from invivo.jobs.folder import JobFolder

    return JobFolder(folder, write=write)


def print_event(event: JobEvent, as_json: bool) -> None:
    if as_json:
        import json

        sys.stdout.write(json.dumps(asdict(event), ensure_ascii=False) + "\n")
        return
    moment = time.strftime("%H:%M:%S", time.localtime(event.created_at))
    level = "" if event.level == "info" else f"{event.level}: "
    sys.stdout.write(f"{moment}  {level}{event.message}\n")


def _held_out(info: JobInfo) -> list[list[str]]:
    if not info.validations:
        return []
    last = info.validations[-1]
    right = "" if last.accuracy is None else f", {100 * last.accuracy:.1f} % of tokens right"
    return [["held-out loss", curve([one.loss for one in info.validations]) + right]]


def _checkpoint(one: CheckpointInfo) -> str:
    held = one.metrics.get("valid_loss", one.metrics.get("train_loss"))
    return one.fine_tuned_model_checkpoint + ("" if held is None else f"  {held:.4f}")


def curve(losses: list[float | None], width: int = 48) -> str:
    """First and last loss, and between them a small chart of means."""
    known = [loss for loss in losses if loss is not None]
    if not known:
        return "-"
    size = max(1, -(-len(known) // width))
    means = [
        sum(known[i : i + size]) / len(known[i : i + size]) for i in range(0, len(known), size)
    ]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    chart = "".join(BARS[round((mean - low) * scale)] for mean in means)
    return f"{known[0]:.4f} {chart} {known[-1]:.4f}"
