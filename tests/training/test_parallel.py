"""Runs of several processes are the runs of one, and go on as such."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.small_run import GLA, curve, small
from tests.waiting import PATIENCE

from invivo.errors import InvalidRequest
from invivo.models.load import load_model
from invivo.training.checkpoint import checkpoints, read_checkpoint
from invivo.training.run import Outcome, train
from invivo.training.run_folder import RunFolder

WORKER = Path(__file__).with_name("parallel_worker.py")
HYBRID = GLA + "attn = { layers = [1], num_heads = 2 }\n"
# Two rows a process in two micro-batches, whose labels are not equally many.
LINES = {
    "train": 'micro_batch = 1\nrecompute = "layer"',
    "data": "separate_documents = true",
    "evaluation": 'every = 6\nwindows = 3\nprompts = ["the cat"]\nsample_tokens = 4',
}


def two_processes(config: Path, runs: Path, *stop: int, device: str = "cpu") -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(WORKER), str(config), str(runs), device]
    command += map(str, stop)
    found = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-4000:]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return list(RunFolder(folder).metrics.read())


def assert_same_run(folder: Path, alone: Outcome, *, within: float = 1e-5) -> None:
    """The same losses, norms, rates, held-out numbers and weights, to the order of sums."""
    found, wanted = curve(lines_of(folder)), curve(lines_of(alone.folder))
    assert len(found) == len(wanted) == 12
    for mine, other in zip(found, wanted, strict=True):
        assert mine == pytest.approx(other, rel=within)
    for mine, other in zip(held_out(folder), held_out(alone.folder), strict=True):
        assert mine == pytest.approx(other, rel=within)
    trained, expected = (load_model(str(path / "model")).decoder for path in (folder, alone.folder))
    for (name, mine), other in zip(trained.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=within, atol=within, msg=name)


def held_out(folder: Path) -> list[dict[str, Any]]:
    return [
        {name: line[name] for name in ("step", "bits_per_byte", "loss", "tokens", "bytes", "rows")}
        for line in lines_of(folder)
        if line["kind"] == "evaluation"
    ]


def test_runs_of_two_then_one_then_two_processes_are_one_run(tmp_path: Path) -> None:
    """Shards of two are read by one, the whole of one by two, which then are two replicas.

    One checkpoint is lost because a process cannot write its part.
    """
    config = small(tmp_path, model=HYBRID, **LINES)
    alone = train(config, runs=tmp_path / "alone")
    runs = tmp_path / "runs"
    two_processes(tmp_path / "small.toml", runs, 6, 5)
    folder = RunFolder(runs / "small")
    assert folder.manifest()["status"] == "interrupted"
    assert folder.manifest()["processes"] == 2
    saved = checkpoints(folder.checkpoints)
    assert [path.name for path in saved] == ["step-00000006"]
    assert len(list(saved[-1].glob("*.safetensors"))) == 2
    asked = itertools.count()
    assert train(config, runs=runs, stop=lambda: next(asked) == 3).step == 9
    small(tmp_path, model=HYBRID, parallel="replicas = 2", **LINES)
    two_processes(tmp_path / "small.toml", runs)
    assert folder.manifest()["status"] == "done"
    events = [(x["step"], x["event"]) for x in lines_of(folder.path) if x["kind"] == "event"]
    assert [event for event in events if event[1] != "checkpoint"] == [
        (0, "started"),
        (5, "checkpoint_failed"),
        (6, "interrupted"),
        (6, "resumed"),
        (9, "interrupted"),
        (9, "resumed"),
        (12, "done"),
    ]
    assert {s for s, event in events if event == "checkpoint"} == {6, 9, 10, 12}
    assert_same_run(folder.path, alone)
    samples, expected = (list(RunFolder(f).samples.read()) for f in (folder.path, alone.folder))
    assert samples == expected
    tensors, wanted = (
        read_checkpoint(checkpoints(path / "checkpoints")[-1]).tensors
        for path in (folder.path, alone.folder)
    )
    assert tensors.keys() == wanted.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("parallel", ["tensor = 1", "tensor = 2"])
def test_two_gpus_are_one(tmp_path: Path, parallel: str) -> None:
    config = small(tmp_path, model=HYBRID, parallel=parallel, **LINES)
    alone = train(config, runs=tmp_path / "alone", device="cuda")
    runs = tmp_path / "runs"
    two_processes(tmp_path / "small.toml", runs, 6, device="cuda")
    two_processes(tmp_path / "small.toml", runs, device="cuda")
    assert_same_run(runs / "small", alone, within=1e-3)


def test_replicas_must_divide_the_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(tmp_path, parallel="replicas = 3")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InvalidRequest) as error:
        train(config, runs=tmp_path)
    assert error.value.field == "parallel.replicas"
