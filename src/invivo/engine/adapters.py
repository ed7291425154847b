"""Adapters of every kind, many resident at once, each row of a batch with its own.

An adapter is a set of bypasses (:mod:`invivo.engine.bypasses`), read from a folder in the peft
library's format or published from tensors in memory. Laid out in host memory, it is copied to a
*slot* of the device tables when used; slot 0 is nothing, and the least recently used slot that
nobody runs with is given away first.

Loading or publishing a name again makes a new version; requests finish with the version they
began with.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from invivo.engine.adapter_file import read_adapter
from invivo.engine.adapter_tables import AdapterBypass, AdapterTables, LaidOut, lay_out
from invivo.engine.bypasses import (
    BypassSpec,
    Parameters,
    check_parameters,
    checked_specs,
    n_virtual,
)
from invivo.engine.peft_format import from_peft
from invivo.engine.types import AdapterInfo, VirtualRows
from invivo.errors import InvalidRequest, NotFound
from invivo.models.config import ModelConfig

Source = str | Path | tuple[Mapping[str, Any], Mapping[str, torch.Tensor]]

# A checkpoint of a job is NAME:ckpt-step-N.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._\-]{0,127}(:ckpt-step-\d{1,12})?")


@dataclass(slots=True, eq=False)
class Adapter:
    """One version of one adapter, in host memory.

    Attributes:
        rank: largest rank (width, virtual tokens) of its bypasses.
        n_virtual: placeholder tokens at the start of a sequence that runs with it.
        specs, parameters: what was published.
        users: requests that hold it.
        slot: where it lies in the device tables, 0 = nowhere.
        pins: requests that run with the slot.
        last_used: counter of the store when it was last placed.
    """

    name: str
    version: int
    rank: int
    n_parameters: int
    n_virtual: int
    specs: tuple[BypassSpec, ...]
    parameters: Parameters
    laid: LaidOut
    users: int = 0
    slot: int = 0
    pins: int = 0
    last_used: int = 0


class AdapterStore:
    """Loads, publishes, forgets and places adapters.

    ``load``, ``publish``, ``unload``, ``list``, ``content``, ``hold`` and ``drop`` may be called
    from any thread; what touches the device tables (``place``, ``release``, ``bypass``) only from
    the engine's.

    Attributes:
        finder: gives the folder of an adapter that is not loaded when it is first asked for, or
            None; called from any thread.

    Args:
        config: the model they must fit.
        device, dtype: of the tables.
        max_slots: adapters in the tables at once.
        max_rank: largest rank of a LoRA or width of a bottleneck taken.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        max_slots: int,
        max_rank: int,
    ) -> None:
        self.finder: Callable[[str], Path | None] | None = None
        self._config = config
        self._device = torch.device(device)
        self._dtype = dtype
        self._max_slots = max_slots
        self._max_rank = max_rank
        self._lock = threading.Lock()
        self._named: dict[str, Adapter] = {}
        self._versions: dict[str, int] = {}  # kept for ever: cached prefixes name versions
        self._in_slot: list[Adapter | None] = [None] * (max_slots + 1)
        self._tables = AdapterTables(config, device=self._device, dtype=dtype, max_slots=max_slots)
        self._clock = 0

    @property
    def generation(self) -> int:
        """Changes when captured graphs must be remade."""
        return self._tables.generation

    # --- any thread -------------------------------------------------------------------------
    def load(self, name: str, source: Source) -> AdapterInfo:
        """Read an adapter and make it available under ``name``.

        Args:
            source: a folder in the peft library's format, or its config as a mapping together
                with its tensors by key.

        Raises:
            InvalidRequest: a method that is not supported, or it does not fit the model.
            NotFound: the folder or a file in it does not exist.
        """
        _check_name(name)
        config, tensors = source if isinstance(source, tuple) else read_adapter(Path(source))
        return self.publish(name, *from_peft(config, tensors, self._config))

    def publish(
        self, name: str, specs: Sequence[BypassSpec], parameters: Parameters
    ) -> AdapterInfo:
        """Make bypasses available under ``name``, at once for every request that comes later.

        Args:
            parameters: copied here; they may change afterwards.

        Raises:
            InvalidRequest: they do not fit the model or each other, are too large or not finite.
        """
        specs = self.check(name, specs, parameters)
        host = {name: tensor.detach().to("cpu", copy=True) for name, tensor in parameters.items()}
        _check_finite(host)
        laid = lay_out(self._config, specs, host, self._dtype)
        with self._lock:
            version = self._versions.get(name, 0) + 1
            self._versions[name] = version
            old = self._named.get(name)
            self._named[name] = Adapter(
                name=name,
                version=version,
                rank=max(spec.size for spec in specs),
                n_parameters=sum(tensor.numel() for tensor in parameters.values()),
                n_virtual=n_virtual(specs),
                specs=specs,
                parameters=host,
                laid=laid,
            )
            if old is not None:
                self._forget(old)
            return self._info(self._named[name])

    def check(
        self, name: str, specs: Sequence[BypassSpec], parameters: Parameters
    ) -> tuple[BypassSpec, ...]:
        """The checked specs of what could be published if all numbers were finite.

        Raises:
            InvalidRequest: as ``publish`` does.
        """
        _check_name(name)
        specs = checked_specs(self._config, specs)
        check_parameters(self._config, specs, parameters)
        for spec in specs:
            if spec.kind in ("lora", "adapter") and spec.size > self._max_rank:
                raise InvalidRequest(
                    f"has rank {spec.size}, the engine takes at most {self._max_rank}",
                    field="adapter",
                    given=", ".join(spec.on),
                    remedy="Raise max_lora_rank",
                )
        return specs

    def unload(self, name: str) -> None:
        """Forget ``name``; its memory is given back when the last request with it has ended."""
        with self._lock:
            if name not in self._named:
                raise self._unknown(name)
            self._forget(self._named.pop(name))

    def list(self) -> list[AdapterInfo]:
        """The current version of every name, in order of name."""
        with self._lock:
            return [self._info(self._named[name]) for name in sorted(self._named)]

    def content(self, name: str) -> tuple[tuple[BypassSpec, ...], Parameters]:
        """The checked specs and the parameters (on the CPU, not to be changed) of the current
        version of ``name``; raises NotFound."""
        self._find(name)
        with self._lock:
            adapter = self._named.get(name)
            if adapter is None:
                raise self._unknown(name)
            return adapter.specs, adapter.parameters

    def n_virtual(self, name: str | None) -> int:
        """Tokens of the context that ``name`` takes for itself; 0 for no or an unknown adapter."""
        self._find(name)
        with self._lock:
            adapter = self._named.get(name) if name is not None else None
            return 0 if adapter is None else adapter.n_virtual

    def hold(self, name: str) -> Adapter:
        """The current version of ``name``, kept until ``drop``; raises NotFound."""
        self._find(name)
        with self._lock:
            adapter = self._named.get(name)
            if adapter is None:
                raise self._unknown(name)
            adapter.users += 1
            return adapter

    def drop(self, adapter: Adapter) -> None:
        """Give back what ``hold`` gave."""
        with self._lock:
            adapter.users -= 1
            self._forget(adapter)

    # --- the engine's thread ----------------------------------------------------------------
    def place(self, adapter: Adapter) -> int:
        """Pin an adapter to a slot of the tables, copying it there if need be.

        Returns:
            The slot, or 0 when all slots are in use.
        """
        self._clock += 1
        if adapter.slot == 0:
            slot = self._free_slot()
            if slot == 0:
                return 0
            self._write(slot, adapter)
        adapter.pins += 1
        adapter.last_used = self._clock
        return adapter.slot

    def release(self, adapter: Adapter) -> None:
        """Undo one ``place``; the adapter stays in its slot until another needs it."""
        adapter.pins -= 1
        assert adapter.pins >= 0

    def bypass(self, index: torch.Tensor, virtual: Sequence[VirtualRows] = ()) -> AdapterBypass:
        """The bypass of a batch.

        Args:
            index: [T] int32 on the device, the slot of every row.
            virtual: which rows are virtual tokens.
        """
        return self._tables.bypass(index, virtual)

    # --- parts ------------------------------------------------------------------------------
    def _find(self, name: str | None) -> None:
        """Load ``name`` if it is not there and the finder knows it."""
        if name is None or self.finder is None or name in self._named:
            return
        folder = self.finder(name)
        if folder is not None:
            self.load(name, folder)

    def _forget(self, adapter: Adapter) -> None:
        """Free the matrices of a version that nobody can ask for any more; its slot is taken
        over when the next adapter needs one."""
        if adapter.users == 0 and self._named.get(adapter.name) is not adapter:
            adapter.laid, adapter.parameters = LaidOut(), {}

    def _info(self, adapter: Adapter) -> AdapterInfo:
        return AdapterInfo(
            name=adapter.name,
            version=adapter.version,
            rank=adapter.rank,
            running=adapter.users,
            n_parameters=adapter.n_parameters,
        )

    def _unknown(self, name: str) -> NotFound:
        return NotFound(
            "no such adapter is loaded",
            field="adapter",
            given=name,
            remedy=f"Load it first; loaded: {', '.join(sorted(self._named)) or 'none'}",
        )

    def _free_slot(self) -> int:
        best, best_key = 0, (0, 0)
        with self._lock:
            current = {id(adapter) for adapter in self._named.values()}
        for slot in range(1, self._max_slots + 1):
            adapter = self._in_slot[slot]
            if adapter is None:
                return slot
            if adapter.pins:
                continue
            # Old versions and unloaded ones go first, then the least recently used.
            key = (id(adapter) in current, adapter.last_used)
            if best == 0 or key < best_key:
                best, best_key = slot, key
        return best

    def _write(self, slot: int, adapter: Adapter) -> None:
        old = self._in_slot[slot]
        if old is not None:
            old.slot = 0
            self._in_slot[slot] = None
            self._tables.clear(slot)
        self._tables.write(slot, adapter.laid)
        self._in_slot[slot] = adapter
        adapter.slot = slot


def _check_finite(parameters: Parameters) -> None:
    for name, tensor in parameters.items():
        # A number that is not finite would not stay within the rows of its own request.
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidRequest("holds numbers that are not finite", field="adapter", given=name)


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            "must be letters, digits, dots, dashes and underscores, at most 128",
            field="name",
            given=name,
        )
