"""Checkpoints of a run: a folder each, there as a whole or not at all.

``step-00000020/`` holds ``state.safetensors`` (parameters and the optimizer's moments, float32) and
``state.json`` (step, place in the data, identity). It is written beside its place, flushed to the
disk and renamed; the ones before it go only then. Several processes write a file each
(:mod:`invivo.training.sharded_checkpoint`), which one process can read as well.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from invivo.errors import InvalidRequest

WHOLE = "state.safetensors"
_FINISHED = re.compile(r"step-\d{8,}")


@dataclass(slots=True)
class Checkpoint:
    """What a run needs to go on.

    Attributes:
        step: optimizer steps taken.
        state: JSON-able.
        tensors: by name.
    """

    step: int
    state: dict[str, Any]
    tensors: Mapping[str, torch.Tensor]


def write_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write a checkpoint below ``folder`` and remove all but the newest ``keep``.

    Raises:
        OSError: the disk is full or refuses; nothing is left of the attempt.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    unfinished = unfinished_checkpoint(folder, checkpoint.step)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        tensors = {name: t.detach().contiguous() for name, t in checkpoint.tensors.items()}
        save_file(tensors, unfinished / WHOLE)
        return finish_checkpoint(folder, checkpoint.step, checkpoint.state, keep=keep)
    except SafetensorError as error:  # the library's own word for a full disk
        raise OSError(str(error)) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, once it is there."""
    return folder / f"step-{step:08d}"


def unfinished_checkpoint(folder: Path, step: int) -> Path:
    """Where a checkpoint's tensors are written before it is there."""
    return folder / f".step-{step:08d}.unfinished"


def finish_checkpoint(folder: Path, step: int, state: Mapping[str, Any], *, keep: int) -> Path:
    """Complete an unfinished checkpoint whose tensors are written, and give it its name.

    Raises:
        OSError: see :func:`write_checkpoint`.
    """
    final, unfinished = checkpoint_path(folder, step), unfinished_checkpoint(folder, step)
    text = json.dumps({"step": step} | dict(state), indent=1) + "\n"
    (unfinished / "state.json").write_text(text, encoding="utf-8")
    for path in (*unfinished.iterdir(), unfinished):
        _flush(path)
    shutil.rmtree(final, ignore_errors=True)  # of a run that went on from before it
    unfinished.rename(final)
    _flush(folder)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _FINISHED.fullmatch(path.name)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The optimizer step after which a checkpoint was written."""
    return int(path.name.removeprefix("step-"))


def read_checkpoint(path: Path) -> Checkpoint:
    """
    Raises:
        InvalidRequest: it cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if (path / WHOLE).exists():
            tensors = load_file(path / WHOLE)
        else:
            from invivo.training.sharded_checkpoint import read_whole

            tensors = read_whole(path)
        return Checkpoint(int(state["step"]), state, tensors)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: BaseException) -> InvalidRequest:
    """What is told of a checkpoint that cannot be read."""
    return InvalidRequest(
        f"a checkpoint cannot be read: {error}",
        field="checkpoint",
        given=str(path),
        remedy="Remove it to go on from the one before",
    )


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
