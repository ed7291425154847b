"""GET /v1/training/runs: the training runs of a folder, for the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request

from invivo.errors import InvivoError
from invivo.server.answers import TrainingRun, TrainingRunList
from invivo.server.auth import Principal, needs
from invivo.server.documents import failures
from invivo.server.services import services_of

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
    manifests = sorted(home.glob("*/manifest.json"), key=lambda p: -p.stat().st_mtime)
    return [path.parent for path in manifests[:MAX_RUNS]]


def _run(folder: Path) -> TrainingRun | None:
    """One run; None where it cannot be read (any more)."""
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
