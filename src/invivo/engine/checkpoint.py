"""Checkpoints of a job: a folder each, there as a whole or not at all.

``step-00000020/`` holds the adapter in the peft library's format (of a program the trained values
in ``parameters.safetensors``), ``optimizer.safetensors`` (the
optimizer's state and the parameters themselves, which a file format may round) and ``state.json``.
It is written beside its place, flushed to the disk and renamed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from invivo.engine.adapter_file import write_adapter
from invivo.engine.bypasses import BypassSpec
from invivo.errors import InvalidRequest
from invivo.models.config import ModelConfig

VALUES = "parameters.safetensors"
_FINISHED = re.compile(r"step-\d{8,}")


@dataclass(slots=True)
class Snapshot:
    """What a job needs to go on; tensors in host memory.

    Attributes:
        values: of a program's trained parameters as it sees them; None: adapters are trained.
        state: JSON: step, updates, data position, losses, identity of the job.
    """

    step: int
    specs: tuple[BypassSpec, ...]
    parameters: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    state: dict[str, Any]
    values: dict[str, torch.Tensor] | None = None


def write_checkpoint(
    folder: Path, snapshot: Snapshot, config: ModelConfig, base_name: str, *, keep: int
) -> Path:
    """Write a checkpoint below ``folder`` and remove all but the newest ``keep``.

    Raises:
        OSError: the disk is full or refuses; nothing is left of the attempt.
    """
    from safetensors.torch import save_file

    final = folder / f"step-{snapshot.step:08d}"
    unfinished = folder / f".{final.name}.unfinished"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)
        if snapshot.values is None:
            write_adapter(unfinished, snapshot.specs, snapshot.parameters, config, base_name)
        else:
            unfinished.mkdir()
            values = {name: value.contiguous() for name, value in snapshot.values.items()}
            save_file(values, unfinished / VALUES)
        tensors = {f"parameter.{name}": value for name, value in snapshot.parameters.items()}
        save_file(tensors | snapshot.optimizer, unfinished / "optimizer.safetensors")
        text = json.dumps(snapshot.state, indent=1) + "\n"
        (unfinished / "state.json").write_text(text, encoding="utf-8")
        for path in (*unfinished.iterdir(), unfinished):
            _flush(path)
        shutil.rmtree(final, ignore_errors=True)  # of an earlier run that went on from before it
        unfinished.rename(final)
        _flush(folder)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    except Exception as error:  # safetensors has its own error for a full disk
        shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(f"{type(error).__name__}: {error}") from error
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


def read_checkpoint(path: Path, specs: tuple[BypassSpec, ...]) -> Snapshot:
    """
    Raises:
        InvalidRequest: it cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(path / "optimizer.safetensors")
        step = int(state["step"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InvalidRequest(
            f"a checkpoint cannot be read: {error}",
            field="folder",
            given=str(path),
            remedy="Remove it to go on from the one before",
        ) from error
    parameters, optimizer = {}, {}
    for name, value in tensors.items():
        if name.startswith("parameter."):
            parameters[name.removeprefix("parameter.")] = value
        else:
            optimizer[name] = value
    return Snapshot(step, specs, parameters, optimizer, state)


class CheckpointWriter:
    """Writes in a thread of its own, one checkpoint at a time, so that serving goes on."""

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        base_name: str,
        *,
        keep: int,
        done: Callable[[], None],
    ) -> None:
        """``done`` is called from that thread when a checkpoint is written, or is not."""
        self._folder = folder
        self._config = config
        self._base_name = base_name
        self._keep = keep
        self._done = done
        self._thread: threading.Thread | None = None
        self._outcome: Path | Exception | None = None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written, or its outcome has not been taken."""
        return self._thread is not None

    @property
    def ready(self) -> bool:
        """Whether there is an outcome to take."""
        return self._thread is not None and self._outcome is not None

    def write(self, snapshot: Snapshot) -> Path | Exception:
        """Write ``snapshot`` now, in the caller's thread."""
        try:
            return write_checkpoint(
                self._folder, snapshot, self._config, self._base_name, keep=self._keep
            )
        except Exception as error:
            return error

    def start(self, snapshot: Snapshot) -> None:
        """Write ``snapshot``; not while busy."""
        assert self._thread is None
        self._outcome = None
        self._thread = threading.Thread(target=self._write_aside, args=(snapshot,), daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # the program is ending: no thread can be started any more
            self._write_aside(snapshot)

    def outcome(self, *, wait: bool = False) -> Path | Exception | None:
        """What came of it, once; None while it is being written."""
        if self._thread is None or (self._outcome is None and not wait):
            return None
        if self._thread.ident is not None:  # it has been started
            self._thread.join()
        self._thread = None
        return self._outcome

    def _write_aside(self, snapshot: Snapshot) -> None:
        self._outcome = self.write(snapshot)
        self._done()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
