"""What a run asks of the processes that train one model, and the answer of a process alone.

Several processes answer in :mod:`invivo.training.parallel`; nothing of torch.distributed is
imported for one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from invivo.models.config import ModelConfig
from invivo.models.decoder import Decoder
from invivo.training.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from invivo.training.loss_model import LossModel

Into = Callable[[], Mapping[str, torch.Tensor]]


class Keeper(Protocol):
    """The checkpoints of a run; all processes call the same methods in the same order."""

    def begin(self, checkpoint: Checkpoint) -> None:
        """Take a checkpoint; its tensors may change when this returns.

        Raises:
            OSError: the disk is full or refuses.
        """

    @property
    def is_written(self) -> bool:
        """Whether this process has written its part of what was begun and :meth:`finish` is due."""

    def finish(self) -> int | None:
        """Wait for what was begun; the step of the checkpoint that is now there, if any.

        Raises:
            OSError: the disk is full or refuses; nothing is left of it.
        """

    def read(self, path: Path, into: Into) -> Checkpoint:
        """A checkpoint of any number of processes.

        Args:
            into: gives the tensors to be filled, where a process holds parts of them.

        Raises:
            InvalidRequest: it cannot be read.
        """


class Processes(Protocol):
    """
    Attributes:
        rank: number of this process; 0 writes the run's files.
        world: how many there are.
        reader, readers: of the groups that read rows of their own, one process each unless
            several share every layer, in ``rank``'s order.
        device: this process's.
    """

    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...
    @property
    def reader(self) -> int: ...
    @property
    def readers(self) -> int: ...
    @property
    def device(self) -> torch.device: ...

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over processes of x, which is on the host or the device."""

    def decided(self, value: float) -> float:
        """The first process's ``value``."""

    def first_first(self) -> AbstractContextManager[None]:
        """The first process does the body, and then the others do."""

    def share(self, model: LossModel) -> None:
        """Let every process keep its part of the parameters; make the optimizer afterwards."""

    def clip(self, parameters: Iterable[nn.Parameter], most: float) -> torch.Tensor:
        """Scale gradients to a norm of at most ``most`` (0: any); the norm before, []."""

    def whole(self, model: LossModel) -> AbstractContextManager[None]:
        """All parameters in every process, to run ``model.decoder`` with; not to be changed."""

    def gathered(self, decoder: Decoder) -> Decoder | None:
        """The whole decoder on the first process, None on the others."""

    def keeper(self, folder: Path, keep: int, config: ModelConfig) -> Keeper:
        """Of checkpoints below ``folder``, of which the newest ``keep`` stay.

        Args:
            config: of the decoder whose parameters and moments are kept.
        """


class Alone:
    """One process; see :class:`Processes`."""

    rank, world = 0, 1
    reader, readers = 0, 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def total(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def decided(self, value: float) -> float:
        return value

    @contextmanager
    def first_first(self) -> Iterator[None]:
        yield

    def share(self, model: LossModel) -> None:
        pass

    def clip(self, parameters: Iterable[nn.Parameter], most: float) -> torch.Tensor:
        return nn.utils.clip_grad_norm_(parameters, most or math.inf)

    @contextmanager
    def whole(self, model: LossModel) -> Iterator[None]:
        yield

    def gathered(self, decoder: Decoder) -> Decoder | None:
        return decoder

    def keeper(self, folder: Path, keep: int, config: ModelConfig) -> Keeper:
        return _WholeCheckpoints(folder, keep)


class _WholeCheckpoints:
    """Written at once, by this process."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._written: int | None = None

    def begin(self, checkpoint: Checkpoint) -> None:
        write_checkpoint(self._folder, checkpoint, keep=self._keep)
        self._written = checkpoint.step

    @property
    def is_written(self) -> bool:
        return self._written is not None

    def finish(self) -> int | None:
        written, self._written = self._written, None
        return written

    def read(self, path: Path, into: Into) -> Checkpoint:
        return read_checkpoint(path)
