"""Runs: a folder for each question, nothing measured twice, nothing lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.studies import toy_study
from tests.studies.toy_study import STUDY, model
from tests.waiting import PATIENCE

from invivo.errors import Conflict, InvalidRequest, NotFound
from invivo.studies.run_folder import RunFolder
from invivo.studies.running import report_again, run_study
from invivo.studies.verifying import verify

QUICK = STUDY.quick


@pytest.fixture(autouse=True)
def nothing_measured() -> Iterator[None]:
    toy_study.measured.clear()
    yield
    toy_study.deadly.clear()


def test_a_run_leaves_manifest_records_findings_and_report(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    folder, findings = run_study(
        STUDY, model(), QUICK, tmp_path, command=["x", "y"], on_progress=lambda *p: seen.append(p)
    )
    assert folder.path.parent == tmp_path / "toy"
    assert sorted(p.name for p in folder.path.iterdir() if p.name != ".lock") == [
        "findings.json", "manifest.json", "records.parquet", "report.html",
    ]  # fmt: skip
    assert seen[0] == (0, 6)
    assert seen[-1] == (6, 6)
    manifest = folder.read_manifest()
    assert manifest["settings"] == {"n": 6, "factor": 2.0, "names": ["a", "b"]}
    assert manifest["model"] == {"fingerprint": "f00", "dtype": "float32"}
    assert manifest["data"] == {"numbers": "d1"}
    assert manifest["about"]["command"] == "x y"
    assert manifest["about"]["seconds"] >= 0
    records = folder.read_records()
    assert [r["name"] for r in records[:3]] == ["a", "b", "a"]
    assert records[-1] == {"unit": "5", "name": "b", "value": 10.1, "parts": [5.0, 0.5]}
    told = json.loads(folder.findings.read_text())
    assert told["statements"][1]["verdict"] == "holds"
    assert told["summary"] == findings.summary


def test_the_same_question_is_measured_once_and_gives_the_same_records(tmp_path: Path) -> None:
    folder, _ = run_study(STUDY, model(), QUICK, tmp_path / "one")
    again, _ = run_study(STUDY, model(), QUICK, tmp_path / "one")
    assert again.path == folder.path
    assert len(toy_study.measured) == 6
    elsewhere, _ = run_study(STUDY, model(), QUICK, tmp_path / "two")
    assert elsewhere.path.name == folder.path.name
    assert elsewhere.records.read_bytes() == folder.records.read_bytes()
    assert elsewhere.findings.read_bytes() == folder.findings.read_bytes()
    run_study(STUDY, model(), QUICK, tmp_path / "one", fresh=True)
    assert len(toy_study.measured) == 18


@pytest.mark.parametrize(
    ("study", "lm", "settings"),
    [
        (replace(STUDY, version=2), model(), QUICK),
        (STUDY, model("other weights"), QUICK),
        (STUDY, model(), replace(QUICK, factor=3.0)),
        (replace(STUDY, prepare=lambda s: replace(toy_study.prepare(s), digests={"n": "d2"})),
         model(), QUICK),
    ],
    ids=["version", "weights", "settings", "data"],
)  # fmt: skip
def test_another_question_has_another_folder(study, lm, settings, tmp_path: Path) -> None:
    first, _ = run_study(STUDY, model(), QUICK, tmp_path)
    second, _ = run_study(study, lm, settings, tmp_path)
    assert first.path != second.path


def test_killed_it_goes_on_where_it_was(tmp_path: Path) -> None:
    """Killed with signal 9 in the fourth unit, and half a line left behind."""
    undisturbed, _ = run_study(STUDY, model(), QUICK, tmp_path / "undisturbed")
    toy_study.measured.clear()
    root = tmp_path / "killed"
    done = subprocess.run(
        [sys.executable, "-m", "tests.studies.toy_study", str(root), "3"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(["src", "."])},
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    folder = RunFolder(root / "toy" / undisturbed.path.name)
    assert not folder.measured
    journal = folder.path / "records.jsonl"
    assert len(journal.read_text().splitlines()) == 3
    with journal.open("a") as file:
        file.write('{"unit": "3", "records": [{"na')
    run_study(STUDY, model(), QUICK, root)
    assert toy_study.measured == ["3", "4", "5"]
    assert folder.records.read_bytes() == undisturbed.records.read_bytes()
    assert folder.read_manifest()["about"]["units_from_before"] == 3


def test_an_error_loses_nothing_but_its_unit(tmp_path: Path) -> None:
    def broken(lm, settings, unit):
        if unit.key == "2":
            raise RuntimeError("no")
        return toy_study.measure(lm, settings, unit)

    with pytest.raises(RuntimeError):
        run_study(replace(STUDY, measure=broken), model(), QUICK, tmp_path)
    run_study(STUDY, model(), QUICK, tmp_path)
    assert toy_study.measured == ["0", "1", "2", "3", "4", "5"]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    folder, _ = run_study(STUDY, model(), QUICK, tmp_path)
    with folder.held(), pytest.raises(Conflict):
        run_study(STUDY, model(), QUICK, tmp_path)


def test_a_report_is_made_again_without_a_model(tmp_path: Path) -> None:
    folder, findings = run_study(STUDY, model(), QUICK, tmp_path)
    page = folder.report.read_text()
    folder.report.unlink()
    assert report_again(folder, [STUDY]).to_dict() == findings.to_dict()
    assert folder.report.read_text() == page
    with pytest.raises(NotFound, match="no such study"):
        report_again(folder, [])
    folder.records.unlink()
    with pytest.raises(NotFound, match="not complete"):
        report_again(folder, [STUDY])
    with pytest.raises(NotFound, match="no folder of a run"):
        report_again(RunFolder(tmp_path), [STUDY])


def test_units_are_verified(tmp_path: Path) -> None:
    folder, _ = run_study(STUDY, model(), QUICK, tmp_path)
    found = verify(folder, [STUDY], model(), n=4)
    assert len(found.units) == len(set(found.units)) == 4
    assert (found.numbers, found.differing, found.broken) == (4 * 2 * 3, 0, [])

    def drifted(lm, settings, unit):
        records = toy_study.measure(lm, settings, unit)
        records[0]["value"] += 0.25
        return records[: 1 if unit.key == found.units[0] else 2]

    other = verify(folder, [replace(STUDY, measure=drifted)], model(), n=4)
    assert (other.differing, other.broken) == (3, [found.units[0]])
    assert other.largest == pytest.approx(0.25)
    assert folder.measured


def test_only_the_same_question_is_verified(tmp_path: Path) -> None:
    folder, _ = run_study(STUDY, model(), QUICK, tmp_path)
    with pytest.raises(InvalidRequest, match="model: is not that of the run"):
        verify(folder, [STUDY], model("other weights"))
    with pytest.raises(InvalidRequest, match="version: is not that of the run"):
        verify(folder, [replace(STUDY, version=2)], model())
