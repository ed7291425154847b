"""GET /v1/training/runs: the training runs of a folder, for the page."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request

from invivo.errors import InvivoError
from invivo.server.answers import TrainingRun, TrainingRunList
from invivo.server.auth import Principal, needs
from invivo.server.documents import failures
from invivo.server.services import services_of
from invivo.training.run_folder import RunFolder

router = APIRouter(tags=["watch"])

MAX_POINTS = 400  # of a curve
MAX_RUNS = 16  # the newest ones

Watcher = Annotated[Principal, Depends(needs("metrics"))]


@router.get("/v1/training/runs", response_model=TrainingRunList, responses=failures())
def training_runs(request: Request, _principal: Watcher) -> TrainingRunList:
    """The newest runs of ``invivo train`` with their curves; never their samples or texts."""
    home = services_of(request).settings.runs
    found = [] if home is None else [_run(folder) for folder in _newest(home)]
    return TrainingRunList(object="list", data=[run for run in found if run is not None])


def _newest(home: Path) -> list[Path]:
    """Folders of runs, the one that was written to last before the others."""
    found = []
    for path in home.glob("*/manifest.json"):
        with contextlib.suppress(FileNotFoundError):  # set aside meanwhile
            found.append((path.stat().st_mtime, path.parent))
    return [folder for _, folder in sorted(found, reverse=True)[:MAX_RUNS]]


def _run(folder: Path) -> TrainingRun | None:
    """One run; None where it cannot be read (any more)."""
    stamps = []
    for name in ("manifest.json", "metrics.jsonl"):
        with contextlib.suppress(FileNotFoundError):
            status = (folder / name).stat()
            stamps.append((status.st_mtime_ns, status.st_size))
    run = _read(folder, tuple(stamps))
    if run is None:
        return None
    return run.model_copy(update={"status": RunFolder(folder).status(run.status)})


@lru_cache(maxsize=4 * MAX_RUNS)
def _read(folder: Path, stamps: tuple[tuple[int, int], ...]) -> TrainingRun | None:
    """Pages ask every few seconds; a run that has not changed is not read again."""
    from invivo.training.run_record import read_run

    try:
        record = read_run(folder)
    except (InvivoError, OSError, ValueError):
        return None
    manifest = record.manifest
    last: dict[str, Any] = record.steps[-1] if record.steps else {}
    recall = record.last is not None and "accuracy" in record.last
    measure: Literal["bits_per_byte", "accuracy"] = "accuracy" if recall else "bits_per_byte"
    return TrainingRun(
        name=record.name,
        status=manifest["status"],
        step=last.get("step", 0),
        steps=manifest["steps"],
        parameters=manifest["parameters"],
        tokens=last.get("tokens", 0),
        tokens_per_second=last.get("tokens_per_s"),
        loss=last.get("loss"),
        measure=measure,
        held_out=[
            (line["step"], line[measure])
            for line in _some([line for line in record.evaluations if measure in line])
        ],
        curve=[(x["step"], x["loss"], x["lr"]) for x in _some(record.steps)],
    )


def _some(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most ``MAX_POINTS`` of them, evenly, the last one too."""
    every = max(1, math.ceil(len(lines) / MAX_POINTS))
    return list(lines[::-1][::every][::-1])
