"""The files of a run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from invivo.errors import Conflict, InvalidRequest
from invivo.training.run_folder import LineFile, RunFolder


def test_lines_are_cut_after_a_step_and_half_a_line_is_dropped(tmp_path: Path) -> None:
    lines = LineFile(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3, 4):
        lines.add({"step": step})
    with lines.path.open("a") as file:
        file.write('{"step": 5, "lo')
    assert [line["step"] for line in lines.read()] == [1, 2, 3, 4]
    lines.cut_after(2)
    assert [line["step"] for line in lines.read()] == [1, 2]
    lines.add({"step": 3})
    assert [line["step"] for line in lines.read()] == [1, 2, 3]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_what_a_full_disk_refuses_is_written_when_there_is_room(tmp_path: Path) -> None:
    lines = LineFile(tmp_path / "metrics.jsonl")
    lines.path.symlink_to("/dev/full")
    lines.add({"step": 1})
    lines.add({"step": 2})
    with pytest.raises(OSError):
        lines.write()
    lines.path.unlink()
    lines.add({"step": 3})
    assert [line["step"] for line in lines.read()] == [1, 2, 3]


def test_a_run_that_is_not_there_has_no_lines(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert not folder.exists
    assert list(folder.metrics.read()) == []
    with pytest.raises(InvalidRequest):
        folder.manifest()


def test_old_runs_are_set_aside_under_the_next_number(tmp_path: Path) -> None:
    for number in (1, 2):
        folder = RunFolder(tmp_path / "run")
        folder.write_manifest({"number": number})
        assert folder.manifest() == {"number": number}
        assert folder.set_aside() == tmp_path / f"run.{number}"
    assert RunFolder(tmp_path / "run.2").manifest() == {"number": 2}


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
def test_two_processes_do_not_train_in_one_folder(tmp_path: Path) -> None:
    ask = (
        "import sys; from pathlib import Path; from invivo.errors import Conflict\n"
        "from invivo.training.run_folder import RunFolder\n"
        "try:\n  with RunFolder(Path(sys.argv[1])).held(): print('free')\n"
        "except Conflict: print('taken')"
    )

    def asked() -> str:
        command = [sys.executable, "-c", ask, str(tmp_path / "run")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    folder = RunFolder(tmp_path / "run")
    assert folder.status("running") == "running"  # no process has said otherwise
    with folder.held():
        assert asked() == "taken"
        assert folder.status("running") == "running"
        with pytest.raises(Conflict):
            RunFolder(tmp_path / "run").held().__enter__()
    assert asked() == "free"
    assert (folder.status("running"), folder.status("done")) == ("killed", "done")


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
def test_a_run_that_ends_while_it_is_looked_at_was_not_killed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.held():
        folder.write_manifest({"status": "running"})
        read = folder.manifest()["status"]
        folder.write_manifest({"status": "done"})
    assert folder.status(read) == "done"
