"""Checkpoints are there as a whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from invivo.errors import InvalidRequest
from invivo.training.checkpoint import (
    Checkpoint,
    checkpoints,
    read_checkpoint,
    step_of,
    write_checkpoint,
)


def at(step: int) -> Checkpoint:
    return Checkpoint(step, {"tokens": 10 * step}, {"a": torch.full((2, 2), float(step))})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "new", at(7), keep=1)
    found = read_checkpoint(path)
    assert (found.step, found.state["tokens"]) == (7, 70)
    assert found.tensors["a"].equal(at(7).tensors["a"])


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (2, 10, 9, 30):
        write_checkpoint(tmp_path, at(step), keep=2)
    assert [step_of(path) for path in checkpoints(tmp_path)] == [10, 30]


def test_views_are_written_whole(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    path = write_checkpoint(tmp_path, Checkpoint(1, {}, {"t": whole.T, "r": whole[1:]}), keep=1)
    found = read_checkpoint(path).tensors
    assert found["t"].equal(whole.T)
    assert found["r"].equal(whole[1:])


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_full_disk_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    write_checkpoint(tmp_path, at(1), keep=1)
    flushed: list[int] = []

    def full(handle: int) -> None:
        flushed.append(handle)
        if len(flushed) == call:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(tmp_path, at(2), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert read_checkpoint(tmp_path / "step-00000001").tensors["a"].eq(1).all()


def test_an_unfinished_one_is_no_checkpoint_and_does_not_disturb(tmp_path: Path) -> None:
    left = tmp_path / ".step-00000003.unfinished"
    left.mkdir(parents=True)
    (left / "state.safetensors").write_bytes(b"half")
    assert checkpoints(tmp_path) == []
    write_checkpoint(tmp_path, at(3), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_a_damaged_one_is_named(tmp_path: Path, name: str) -> None:
    path = write_checkpoint(tmp_path, at(3), keep=1)
    (path / name).write_bytes(b"{")
    with pytest.raises(InvalidRequest, match="cannot be read"):
        read_checkpoint(path)
