"""Checkpoints that all processes write together, in the background (torch's DCP).

The folder is that of :mod:`invivo.training.checkpoint`, with one safetensors file a process in
place of ``state.safetensors``; the files say which part of each tensor they hold, so that any
number of processes, one among them, can read it. Training goes on as soon as the tensors have
been copied to the host; the folder gets its name once every process has written its file.
"""

from __future__ import annotations

import json
import shutil
import warnings
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from invivo.models.config import ModelConfig
from invivo.sharding.moves import replicated
from invivo.training.checkpoint import (
    Checkpoint,
    finish_checkpoint,
    unfinished_checkpoint,
    unreadable,
)
from invivo.training.parallel import PATIENCE, Ranks
from invivo.training.processes import Into
from invivo.training.tensor_parallel import dealt, layout_of, whole_of


@dataclass(slots=True)
class _Pending:
    step: int
    state: dict[str, Any]
    written: Future[Any]


class ShardedCheckpoints:
    """See :class:`~invivo.training.processes.Keeper`; what one process is refused, all raise."""

    def __init__(self, folder: Path, ranks: Ranks, config: ModelConfig, *, keep: int) -> None:
        self._folder, self._ranks, self._config, self._keep = folder, ranks, config, keep
        # Other messages between the hosts go on while a checkpoint is being written.
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._pending: _Pending | None = None

    def begin(self, checkpoint: Checkpoint) -> None:
        assert self._pending is None, "finish the one before"
        target = unfinished_checkpoint(self._folder, checkpoint.step)
        refused: OSError | None = None
        if self._ranks.rank == 0:
            try:
                shutil.rmtree(target, ignore_errors=True)
                target.mkdir(parents=True)
            except OSError as error:
                refused = error
        self._agree(refused)
        written = async_save(
            {name: self._in_order(name, t) for name, t in checkpoint.tensors.items()},
            storage_writer=HuggingFaceStorageWriter(str(target), save_distributed=True),
            process_group=self._group,
        )
        assert isinstance(written, Future)
        self._pending = _Pending(checkpoint.step, checkpoint.state, written)

    @property
    def is_written(self) -> bool:
        return self._pending is not None and self._pending.written.done()

    def finish(self) -> int | None:
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        refused: OSError | None = None
        try:
            pending.written.result()
            if self._ranks.rank == 0:
                finish_checkpoint(self._folder, pending.step, pending.state, keep=self._keep)
        except OSError as error:
            refused = error
        except CheckpointException as error:
            refused = OSError("; ".join(f"process {r}: {e[0]}" for r, e in error.failures.items()))
        finally:
            if self._ranks.rank == 0:
                unfinished = unfinished_checkpoint(self._folder, pending.step)
                shutil.rmtree(unfinished, ignore_errors=True)
        self._agree(refused)
        return pending.step

    def read(self, path: Path, into: Into) -> Checkpoint:
        tensors = into()
        in_order = {name: self._in_order(name, tensor) for name, tensor in tensors.items()}
        try:
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            load(
                in_order,
                storage_reader=HuggingFaceStorageReader(str(path)),
                process_group=self._group,
            )
            for name, tensor in tensors.items():
                self._deal(name, in_order[name], tensor)
            return Checkpoint(int(state["step"]), state, tensors)
        except (OSError, ValueError, KeyError, TypeError, CheckpointException) as error:
            raise unreadable(path, error) from error

    # Rows of matrices that processes share by heads are kept as one process has them.

    def _in_order(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor``, or another one that has its rows in order, in equal shards."""
        place = name.partition(".")[2]
        if not self._is_dealt(place):
            return tensor
        assert isinstance(tensor, DTensor)
        whole = whole_of(self._config, place, tensor, self._ranks.tensor)
        mesh = tensor.device_mesh
        everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
        placements: list[Placement] = [Replicate()] * mesh.ndim
        placements[(mesh.mesh_dim_names or ()).index("shard")] = Shard(0)
        return everywhere.redistribute(placements=placements)

    def _deal(self, name: str, in_order: torch.Tensor, tensor: torch.Tensor) -> None:
        """The reverse, into ``tensor``."""
        place = name.partition(".")[2]
        if in_order is tensor:
            return
        assert isinstance(tensor, DTensor)
        assert isinstance(in_order, DTensor)
        abreast = self._ranks.tensor
        assert abreast is not None
        sections = layout_of(self._config, place).sections
        rows = dealt(replicated(in_order), sections, abreast.size())
        own = rows.chunk(abreast.size())[abreast.get_local_rank()]
        shards = self._ranks.mesh.size(self._ranks.mesh.ndim - 1)
        parts = own.chunk(shards)
        shard = self._ranks.mesh.get_local_rank(self._ranks.mesh.ndim - 1)
        if shard < len(parts):
            tensor.to_local().copy_(parts[shard])

    def _is_dealt(self, place: str) -> bool:
        return self._ranks.tensor is not None and layout_of(self._config, place).sections != ()

    def _agree(self, refused: OSError | None) -> None:
        """Raise on every process where one was refused.

        Raises:
            OSError: this process's, or that of another.
        """
        if self._ranks.total(torch.tensor(float(refused is not None))):
            raise refused or OSError("another process could not write its part")


def read_whole(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint that several processes wrote, in this one."""
    reader = HuggingFaceStorageReader(str(path))
    described = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(tensor.size, dtype=tensor.properties.dtype)
        for name, tensor in described.items()
        if isinstance(tensor, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is one process
        load(tensors, storage_reader=reader, no_dist=True)
    return tensors
