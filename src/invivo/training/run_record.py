"""What a training run wrote down, read back for reports."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from invivo.errors import InvalidRequest, NotFound
from invivo.training.run_folder import RunFolder

Line = dict[str, Any]
_MANIFEST = {"name", "status", "created", "steps", "parameters", "config"}


@dataclass(frozen=True, slots=True)
class RunRecord:
    """
    Attributes:
        manifest: what the run is.
        steps, evaluations, events: lines of the metrics by kind, in their order.
        samples: texts that the model continued.
        positions: evaluations by position in long rows, where there are some.
    """

    folder: Path
    manifest: Line
    steps: list[Line]
    evaluations: list[Line]
    events: list[Line]
    positions: list[Line]
    samples: list[Line]

    @property
    def name(self) -> str:
        return str(self.manifest["name"])

    @property
    def last(self) -> Line | None:
        """The last evaluation."""
        return self.evaluations[-1] if self.evaluations else None

    @property
    def series(self) -> str:
        """The same for runs that differ in name and seed alone."""
        config = {k: v for k, v in self.manifest["config"].items() if k not in ("name", "seed")}
        return json.dumps(config, sort_keys=True)


def read_run(folder: Path) -> RunRecord:
    """
    Raises:
        NotFound: there is no run in the folder.
        InvalidRequest: its manifest cannot be read, or is that of something else.
    """
    run = RunFolder(folder)
    if not run.exists:
        raise NotFound(
            "there is no training run here",
            field="run",
            given=str(folder),
            remedy="Give a folder with a manifest.json, as `invivo train` writes it: runs/NAME",
        )
    manifest = run.manifest()
    if missing := _MANIFEST - manifest.keys():
        raise InvalidRequest(
            f"this is no training run: its manifest lacks {', '.join(sorted(missing))}",
            field="run",
            given=str(folder),
        )
    status = run.status(manifest["status"])
    if status not in ("killed", manifest["status"]):  # it has ended between two looks
        manifest = run.manifest()
    manifest["status"] = status
    kinds: dict[str, list[Line]] = {"step": [], "evaluation": [], "event": [], "positions": []}
    for line in run.metrics.read():
        kinds.setdefault(line["kind"], []).append(line)
    return RunRecord(
        folder=folder,
        manifest=manifest,
        steps=kinds["step"],
        evaluations=kinds["evaluation"],
        events=kinds["event"],
        positions=kinds["positions"],
        samples=list(run.samples.read()),
    )
