"""``invivo train``."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.training.small_run import curve, written
from tests.waiting import PATIENCE, wait_for

from invivo.cli.train import _command, _Stopping
from invivo.training.run_folder import RunFolder

if TYPE_CHECKING:
    from tests.cli.conftest import Invivo


def test_a_configuration_becomes_a_model_that_generates(invivo: Invivo, tmp_path: Path) -> None:
    path, runs = str(written(tmp_path)), str(tmp_path / "runs")
    ran = invivo("train", path, "--runs", runs, "--set", "name=first")
    assert ran.code == 0, ran.err
    model = tmp_path / "runs" / "first" / "model"
    assert ran.out.strip() == str(model)
    assert "16,056 parameters, 12 steps" in ran.err
    assert "step 12 of 12: loss" in ran.err
    assert RunFolder(model.parent).manifest()["command"] == (
        f"invivo train {path} --set name=first --runs {runs}"
    )
    said = invivo("generate", "the cat", "-m", str(model), "-n", "5")
    assert said.code == 0, said.err
    again = invivo("train", path, "--runs", runs, "--set", "name=first", "--json").json()
    assert (again["status"], again["step"], again["model"]) == ("done", 12, str(model))


def test_what_is_wrong_is_said_by_name(invivo: Invivo, tmp_path: Path) -> None:
    path, runs = str(written(tmp_path)), str(tmp_path / "runs")
    ran = invivo("train", path, "--runs", runs, "--set", "train.step=5")
    assert ran.code == 2
    assert "train.step: is not known. Did you mean steps?" in ran.err
    assert invivo("train", path, "--runs", runs, "--resume").code == 1
    assert invivo("train", path, "--resume", "--fresh").code == 2
    assert invivo("train", str(tmp_path / "none.toml")).code == 1
    assert invivo("train", path, "--runs", runs, "--set", "train.steps=1").code == 0
    ran = invivo("train", path, "--runs", runs, "--set", "train.steps=1", "--set", "seed=3")
    assert ran.code == 1
    assert "seed: the run has 0" in ran.err


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
def test_an_interruption_saves_the_step_and_says_how_to_go_on(
    invivo: Invivo, tmp_path: Path
) -> None:
    path, runs = written(tmp_path), tmp_path / "runs"
    sets = ("--set", "train.steps=1000000", "--set", "schedule.kind=constant")
    command = [sys.executable, "-m", "invivo.cli", "train", str(path), "--runs", str(runs), *sets]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    folder = RunFolder(runs / "small")

    def three_steps() -> bool:
        assert process.poll() is None, "training ended by itself"
        return any(line["step"] >= 3 for line in folder.metrics.read())

    try:
        wait_for(three_steps)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 130, said
    step = folder.manifest()["step"]
    assert f"stopped: step {step} of 1000000 is saved; go on with: invivo train {path}" in said
    assert [row[0] for row in curve(list(folder.metrics.read()))] == list(range(1, step + 1))
    more = ("--set", f"train.steps={step + 2}", "--set", "schedule.kind=constant")
    ran = invivo("train", str(path), "--runs", str(runs), *more, "--resume")
    assert ran.code == 0, ran.err
    assert f"going on from step {step} of {step + 2}" in ran.err


def test_among_several_processes_signals_only_ask() -> None:
    """torchrun repeats what the terminal has sent, and before the first step at some of them."""
    stopping = _Stopping(several=True)
    with stopping.listening():
        assert not stopping()
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        assert stopping()


def test_the_command_to_go_on_with_starts_as_many_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    command = _command(Path("a.toml"), ["seed=1"], Path("runs"), None)
    assert command == "torchrun --nproc-per-node 4 -m invivo.cli train a.toml --set seed=1"
