"""``invivo runs``."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.training.small_run import small
from tests.waiting import PATIENCE, wait_for

from invivo.cli.runs import report
from invivo.training.run import train
from invivo.training.run_folder import RunFolder

if TYPE_CHECKING:
    from tests.cli.conftest import Invivo

pytest.importorskip("matplotlib")


def test_runs_are_listed_and_reported(invivo: Invivo, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    empty = invivo("runs", "list", "--runs", str(runs))
    assert empty.code == 0
    assert "invivo train" in empty.err
    folders = [
        str(train(small(tmp_path, f"name=n{seed}", f"seed={seed}"), runs=runs).folder)
        for seed in (0, 1)
    ]
    listed = invivo("runs", "list", "--runs", str(runs), "--json").json()
    assert [run["name"] for run in listed] == ["n1", "n0"]
    assert {run["status"] for run in listed} == {"done"}
    assert all(run["step"] == run["steps"] == 12 and run["held_out"] > 0 for run in listed)
    (runs / "other").mkdir()
    (runs / "other" / "manifest.json").write_text('{"study": "s"}')  # not of `invivo train`
    table = invivo("runs", "list", "--runs", str(runs))
    assert table.code == 0
    assert "n0" in table.out
    assert "left out" in table.err

    alone = invivo("runs", "report", folders[0])
    assert alone.out.strip() == str(Path(folders[0]) / "report.html")
    page = tmp_path / "both.html"
    both = invivo("runs", "report", *folders, "--out", str(page))
    assert both.out.strip() == str(page)
    assert "2 runs in 1 series" in page.read_text(encoding="utf-8")


def test_a_page_follows_its_run(tmp_path: Path) -> None:
    folder = RunFolder(train(small(tmp_path), runs=tmp_path).folder)
    done = folder.manifest()
    folder.write_manifest(done | {"status": "running"})
    page = folder.path / "report.html"
    following = threading.Thread(target=report, args=([folder.path], None, 1))
    with folder.held():
        following.start()
        try:
            refreshed = 'http-equiv="refresh" content="1"'
            wait_for(lambda: page.exists() and refreshed in page.read_text())
        finally:
            folder.write_manifest(done)
            following.join(PATIENCE)
    assert not following.is_alive()
    assert "http-equiv" not in page.read_text()


def test_what_cannot_be_reported_is_said(invivo: Invivo, tmp_path: Path) -> None:
    nothing = invivo("runs", "report", str(tmp_path))
    assert nothing.code == 1
    assert "no training run" in nothing.err
    missing = invivo("runs", "report", "a", "b")
    assert missing.code == 2
    assert "--out" in missing.err
    assert "--watch" in invivo("runs", "report", "a", "b", "--watch", "3").err
