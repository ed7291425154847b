"""Carrying a study out: measure what is missing, then conclude and report."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from invivo.errors import NotFound
from invivo.lm import LM
from invivo.report.findings import Findings
from invivo.report.run_page import run_page
from invivo.studies.run_folder import RunFolder, check_parquet, run_id
from invivo.studies.study import Study, Work
from invivo.training.typed_tables import read_table

_PACKAGES = ("torch", "transformers", "numpy", "scipy", "pyarrow")
Progress = Callable[[int, int], None]  # units that are there, units in all


def run_study(
    study: Study[Any],
    lm: LM,
    settings: Any,
    root: Path,
    *,
    command: Sequence[str] = (),
    fresh: bool = False,
    on_progress: Progress | None = None,
) -> tuple[RunFolder, Findings]:
    """Measure every unit that is not yet measured, then write findings and report.

    Interrupted at any point (or killed), the same call goes on with the unit that was lost.

    Args:
        root: the folder of all runs.
        command: how it was asked for; noted in the manifest.
        fresh: measure everything again.

    Raises:
        Conflict: another process measures the same.
        MissingDependency: pyarrow, scipy or matplotlib is not installed.
    """
    check_parquet()
    work = study.prepare(settings)
    identity = identity_of(study, lm, settings, work)
    folder = RunFolder(root / study.name / run_id(identity))
    with folder.held():
        if fresh:
            folder.clear()
        if not folder.measured:
            _measure(study, lm, settings, work, folder, identity, command, on_progress)
        elif on_progress is not None:
            on_progress(len(work.units), len(work.units))
        return folder, _concluded(study, settings, folder)


def report_again(folder: RunFolder, studies: Sequence[Study[Any]]) -> Findings:
    """Findings and report anew from the records, without a model.

    Raises:
        NotFound: no such study, or not all records are there.
    """
    study, settings = finished(folder, studies)
    with folder.held():
        return _concluded(study, settings, folder)


def finished(folder: RunFolder, studies: Sequence[Study[Any]]) -> tuple[Study[Any], Any]:
    """The study and the settings of a run that is measured.

    Raises:
        NotFound: no such study, or not all records are there.
    """
    manifest = folder.read_manifest()
    study = next((s for s in studies if s.name == manifest["study"]), None)
    if study is None:
        raise NotFound("there is no such study", field="study", given=manifest["study"])
    if not folder.measured:
        raise NotFound(
            "the records are not complete",
            field="run",
            given=str(folder.path),
            remedy="Give the command of its manifest again, and it goes on",
        )
    return study, read_table(type(study.full), manifest["settings"])


def _measure(
    study: Study[Any],
    lm: LM,
    settings: Any,
    work: Work,
    folder: RunFolder,
    identity: Mapping[str, Any],
    command: Sequence[str],
    on_progress: Progress | None,
) -> None:
    done = folder.done()
    about = _about(lm, command)
    about["units_from_before"] = sum(unit.key in done for unit in work.units)
    folder.write_json(folder.manifest, {**identity, "about": about})
    began = time.monotonic()
    n_units = len(work.units)
    n_done = about["units_from_before"]
    for unit in work.units:
        if on_progress is not None:
            on_progress(n_done, n_units)
        if unit.key in done:
            continue
        folder.add(unit.key, study.measure(lm, settings, unit))
        n_done += 1
    if on_progress is not None:
        on_progress(n_done, n_units)
    folder.seal([unit.key for unit in work.units])
    about["seconds"] = round(time.monotonic() - began, 1)
    folder.write_json(folder.manifest, {**identity, "about": about})


def _concluded(study: Study[Any], settings: Any, folder: RunFolder) -> Findings:
    findings = study.conclude(settings, folder.read_records())
    folder.write_json(folder.findings, findings.to_dict())
    manifest = folder.read_manifest()
    model = f"{manifest['about']['model']}, {manifest['model']['dtype']}"
    page = run_page(study.title, f"After {study.paper}. Asked of {model}.", findings, manifest)
    folder.write_text(folder.report, page)
    return findings


def identity_of(study: Study[Any], lm: LM, settings: Any, work: Work) -> dict[str, Any]:
    """What decides the records, as JSON-able data."""
    info = lm.info()
    identity = {
        "study": study.name,
        "version": study.version,
        "settings": asdict(settings),
        "model": {"fingerprint": info.fingerprint, "dtype": info.dtype},
        "data": dict(work.digests),
    }
    plain: dict[str, Any] = json.loads(json.dumps(identity))  # tuples become lists, as read back
    return plain


def _about(lm: LM, command: Sequence[str]) -> dict[str, Any]:
    """What does not decide them, but should be known."""
    info = lm.info()
    return {
        "command": " ".join(command),
        "began": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "model": info.name,
        "device": info.device,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "packages": {name: found for name in ("invivo", *_PACKAGES) if (found := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
