"""LoRA adapters in the peft library's format, many resident at once, each row with its own.

On disk an adapter is ``adapter_config.json`` and ``adapter_model.safetensors``. When loaded, its
matrices are fused the way the decoder fuses its linear maps (query, key and value into one block,
gate and up into one) with the scale folded into B. When used, they are copied to a *slot* of the
device tables, A [slots, R, d_in] and B [slots, d_out, R] of each layer and linear map; slot 0 is
zero, and the least recently used slot that nobody runs with is given away first.

Loading a name again makes a new version; requests finish with the version they began with.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from invivo.engine.types import AdapterInfo
from invivo.errors import InvalidRequest, NotFound
from invivo.kernels.lora import lora_add
from invivo.models.config import ModelConfig

Source = str | Path | tuple[Mapping[str, Any], Mapping[str, torch.Tensor]]
Place = tuple[int, str]  # layer, linear map

MAX_CONFIG_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._\-]{0,127}")
_KEY = re.compile(
    r"(?:^|\.)(?:layers|h)\.(\d+)\.(?:self_attn|attn|mlp)\.(\w+)\.lora_(A|B)(?:\.\w+)?\.weight$"
)
# Which rows of which fused map a module of the Hub's models is: (linear map, part).
_PARTS: dict[str, tuple[str, str]] = {
    "q_proj": ("qkv", "q"),
    "k_proj": ("qkv", "k"),
    "v_proj": ("qkv", "v"),
    "qkv_proj": ("qkv", "all"),
    "c_attn": ("qkv", "all"),
    "o_proj": ("o", "all"),
    "gate_proj": ("gate_up", "gate"),
    "up_proj": ("gate_up", "up"),
    "gate_up_proj": ("gate_up", "all"),
    "down_proj": ("down", "all"),
    "c_fc": ("up", "all"),
}
# Settings that change what an adapter computes, and the only values that are understood.
_PLAIN: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
}
# Initialisations that also change the base weights, which the file does not hold.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")


@dataclass(slots=True, eq=False)
class Adapter:
    """One version of one adapter, in host memory.

    Attributes:
        weights: by layer and linear map: A [R, d_in] and B [d_out, R].
        users: requests that hold it.
        slot: where it lies in the device tables, 0 = nowhere.
        pins: requests that run with the slot.
        last_used: counter of the store when it was last placed.
    """

    name: str
    version: int
    rank: int
    weights: dict[Place, tuple[torch.Tensor, torch.Tensor]]
    users: int = 0
    slot: int = 0
    pins: int = 0
    last_used: int = 0

    @property
    def n_parameters(self) -> int:
        return sum(a.numel() + b.numel() for a, b in self.weights.values())


@dataclass(slots=True)
class _Table:
    """Stacked matrices of one linear map of one layer."""

    a: torch.Tensor  # [slots, R, d_in]
    b: torch.Tensor  # [slots, d_out, R]


class AdapterStore:
    """Loads, forgets and places adapters.

    ``load``, ``unload``, ``list``, ``hold`` and ``drop`` may be called from any thread; what
    touches the device tables (``place``, ``release``, ``bypass``) only from the engine's.

    Args:
        config: the model they must fit.
        device, dtype: of the tables.
        max_slots: adapters in the tables at once.
        max_rank: largest rank taken.
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
        self._config = config
        self._device = torch.device(device)
        self._dtype = dtype
        self._max_slots = max_slots
        self._max_rank = max_rank
        self._lock = threading.Lock()
        self._named: dict[str, Adapter] = {}
        self._versions: dict[str, int] = {}  # kept for ever: cached prefixes name versions
        self._in_slot: list[Adapter | None] = [None] * (max_slots + 1)
        self._tables: dict[str, list[_Table | None]] = {}
        self._clock = 0
        self.generation = 0  # counts reallocations of the tables: captured graphs must be remade

    # --- any thread -------------------------------------------------------------------------
    def load(self, name: str, source: Source) -> AdapterInfo:
        """Read an adapter and make it available under ``name``.

        Args:
            source: a folder in the peft library's format, or its config as a mapping together
                with its tensors by key.

        Raises:
            InvalidRequest: not a plain LoRA adapter, or it does not fit the model.
            NotFound: the folder or a file in it does not exist.
        """
        if not _NAME.fullmatch(name):
            raise InvalidRequest(
                "must be letters, digits, dots, dashes and underscores, at most 128",
                field="name",
                given=name,
            )
        config, tensors = source if isinstance(source, tuple) else read_adapter(Path(source))
        weights, rank = self._fuse(config, tensors)
        with self._lock:
            version = self._versions.get(name, 0) + 1
            self._versions[name] = version
            old = self._named.get(name)
            self._named[name] = Adapter(name=name, version=version, rank=rank, weights=weights)
            if old is not None:
                self._forget(old)
            return self._info(self._named[name])

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

    def hold(self, name: str) -> Adapter:
        """The current version of ``name``, kept until ``drop``; raises NotFound."""
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

    def bypass(self, index: torch.Tensor) -> AdapterBypass:
        """The bypass of a batch whose row ``t`` uses slot ``index[t]``; [T] int32 on the device."""
        return AdapterBypass(self._tables, index)

    # --- parts ------------------------------------------------------------------------------
    def _forget(self, adapter: Adapter) -> None:
        """Free the matrices of a version that nobody can ask for any more; its slot is taken
        over when the next adapter needs one."""
        if adapter.users == 0 and self._named.get(adapter.name) is not adapter:
            adapter.weights = {}

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
            for tables in self._tables.values():
                for table in tables:
                    if table is not None and slot < len(table.a):
                        table.a[slot].zero_()
                        table.b[slot].zero_()
        for (layer, linear), (a, b) in adapter.weights.items():
            table = self._table(layer, linear, slot, a, b)
            rank = a.shape[0]
            table.a[slot, :rank] = a.to(self._device)
            table.b[slot, :, :rank] = b.to(self._device)
        self._in_slot[slot] = adapter
        adapter.slot = slot

    def _table(
        self, layer: int, linear: str, slot: int, a: torch.Tensor, b: torch.Tensor
    ) -> _Table:
        """The table of a linear map, made larger when slot or rank ask for it."""
        tables = self._tables.setdefault(linear, [None] * self._config.n_layers)
        old = tables[layer]
        unit = 16 if self._device.type == "cuda" else 8
        rank = -(-a.shape[0] // unit) * unit
        slots = min(self._max_slots + 1, 1 << slot.bit_length())
        if old is not None:
            if slot < old.a.shape[0] and rank <= old.a.shape[1]:
                return old
            rank, slots = max(rank, old.a.shape[1]), max(slots, old.a.shape[0])
        new = _Table(
            a=torch.zeros(slots, rank, a.shape[1], device=self._device, dtype=self._dtype),
            b=torch.zeros(slots, b.shape[0], rank, device=self._device, dtype=self._dtype),
        )
        if old is not None:
            new.a[: old.a.shape[0], : old.a.shape[1]] = old.a
            new.b[: old.b.shape[0], :, : old.b.shape[2]] = old.b
        tables[layer] = new
        self.generation += 1
        return new

    def _fuse(
        self, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
    ) -> tuple[dict[Place, tuple[torch.Tensor, torch.Tensor]], int]:
        """Check an adapter against the model and lay its matrices out as the decoder's."""
        settings = _Settings(config)
        halves: dict[tuple[Place, str], dict[str, torch.Tensor]] = {}
        names: dict[tuple[Place, str], str] = {}
        for key, tensor in tensors.items():
            place, part, half, module = self._locate(key)
            halves.setdefault((place, part), {})[half] = tensor
            names[place, part] = module
        if not halves:
            raise InvalidRequest(
                "holds no LoRA matrices",
                field="adapter",
                remedy="Save it with the peft library's save_pretrained",
            )
        pieces: dict[Place, list[_Piece]] = {}
        largest = 0
        for (place, part), pair in halves.items():
            module = names[place, part]
            if len(pair) != 2:
                raise InvalidRequest(
                    "has only one of lora_A and lora_B", field="adapter", given=module
                )
            a, b = pair["A"], pair["B"]
            rank = int(a.shape[0])
            if rank > self._max_rank:
                raise InvalidRequest(
                    f"has rank {rank}, the engine takes at most {self._max_rank}",
                    field="adapter",
                    given=module,
                    remedy="Raise max_lora_rank",
                )
            start, stop = self._rows(place[1], part)
            d_in = self._d_in(place[1])
            if tuple(a.shape) != (rank, d_in) or tuple(b.shape) != (stop - start, rank):
                raise InvalidRequest(
                    f"does not fit the model: A {tuple(a.shape)} and B {tuple(b.shape)}, "
                    f"expected ({rank}, {d_in}) and ({stop - start}, {rank})",
                    field="adapter",
                    given=module,
                    remedy="Use an adapter that was trained on this model",
                )
            scaled = b.float() * settings.scale(module, rank)
            pieces.setdefault(place, []).append(_Piece(start, stop, a.float(), scaled))
            largest = max(largest, rank)
        return {place: self._join(place[1], some) for place, some in pieces.items()}, largest

    def _join(self, linear: str, pieces: Sequence[_Piece]) -> tuple[torch.Tensor, torch.Tensor]:
        """Several parts of one fused map as one pair: A stacked, B block by block."""
        pieces = sorted(pieces, key=lambda piece: piece.start)
        a = torch.cat([piece.a for piece in pieces])
        b = torch.zeros(self._rows(linear, "all")[1], a.shape[0])
        column = 0
        for piece in pieces:
            rank = piece.a.shape[0]
            b[piece.start : piece.stop, column : column + rank] = piece.b
            column += rank
        return a.to(self._dtype), b.to(self._dtype)

    def _locate(self, key: str) -> tuple[Place, str, str, str]:
        """(layer and linear map, part, A or B, module name) of a tensor's key."""
        match = _KEY.search(key)
        where = _PARTS.get(match[2]) if match else None
        if match and match[2] == "c_proj":
            where = ("o" if ".attn.c_proj." in key else "down", "all")
        if match is None or where is None:
            raise InvalidRequest(
                _why_unsupported(key),
                field="adapter",
                given=key,
                remedy="Adapters on attention and MLP linear maps are supported",
            )
        layer = int(match[1])
        kind = self._config.layers[layer].feedforward if layer < self._config.n_layers else None
        if kind is None:
            raise InvalidRequest(
                f"has a layer {layer}, the model has {self._config.n_layers}",
                field="adapter",
                given=key,
                remedy="Use an adapter that was trained on this model",
            )
        if kind == "moe" and where[0] in ("gate_up", "up", "down"):
            raise InvalidRequest(_why_unsupported(".experts."), field="adapter", given=key)
        fused = "gate_up" if self._config.gated_mlp else "up"
        if where[0] in ("gate_up", "up") and where[0] != fused:
            raise InvalidRequest("the model has no such linear map", field="adapter", given=key)
        module = key[: match.start(3) - len(".lora_")].removeprefix("base_model.model.")
        return (layer, where[0]), where[1], match[3], module

    def _d_in(self, linear: str) -> int:
        c = self._config
        return {"o": c.n_heads * c.head_dim, "down": c.d_ff}.get(linear, c.d_model)

    def _rows(self, linear: str, part: str) -> tuple[int, int]:
        """Output rows [start, stop) of a part of a linear map."""
        c = self._config
        q, k = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        return {
            ("qkv", "q"): (0, q),
            ("qkv", "k"): (q, q + k),
            ("qkv", "v"): (q + k, q + 2 * k),
            ("qkv", "all"): (0, q + 2 * k),
            ("gate_up", "gate"): (0, c.d_ff),
            ("gate_up", "up"): (c.d_ff, 2 * c.d_ff),
            ("gate_up", "all"): (0, 2 * c.d_ff),
            ("up", "all"): (0, c.d_ff),
            ("o", "all"): (0, c.d_model),
            ("down", "all"): (0, c.d_model),
        }[linear, part]


class AdapterBypass:
    """``Y += B[i] A[i] X`` with another ``i`` for every row of the batch."""

    __slots__ = ("_index", "_tables")

    at: frozenset[str] = frozenset()

    def __init__(self, tables: dict[str, list[_Table | None]], index: torch.Tensor) -> None:
        self._tables = tables
        self._index = index

    def __call__(self, layer: int, linear: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        tables = self._tables.get(linear)
        table = tables[layer] if tables is not None else None
        if table is None:
            return y
        return lora_add(y, x, table.a, table.b, self._index)

    def rows(self, name: str, layer: int, value: torch.Tensor) -> torch.Tensor:
        return value


@dataclass(slots=True)
class _Piece:
    start: int
    stop: int
    a: torch.Tensor
    b: torch.Tensor


@dataclass(slots=True)
class _Settings:
    """What ``adapter_config.json`` says about scales; refuses what is not plain LoRA."""

    config: Mapping[str, Any]
    alphas: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, plain in _PLAIN.items():
            value = self.config.get(name, plain[0])
            if value not in plain:
                raise InvalidRequest(
                    f"{name} is not supported",
                    field=f"adapter_config.{name}",
                    given=value,
                    remedy=f"Train a plain LoRA adapter ({name} = {plain[0]!r}), or merge it",
                )
        start = self.config.get("init_lora_weights", True)
        if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
            raise InvalidRequest(
                "this initialisation changes the base weights, which the adapter does not hold",
                field="adapter_config.init_lora_weights",
                given=start,
                remedy="Convert it to a plain LoRA when saving (path_initial_model_for_weight_"
                "conversion in the peft library)",
            )
        alpha = self.config.get("lora_alpha")
        if not isinstance(alpha, int | float) or isinstance(alpha, bool):
            raise InvalidRequest("must be a number", field="adapter_config.lora_alpha", given=alpha)
        pattern = self.config.get("alpha_pattern") or {}
        for key, value in pattern.items():
            if not _harmless(key) or not isinstance(value, int | float):
                raise InvalidRequest(
                    "must map simple patterns to numbers",
                    field="adapter_config.alpha_pattern",
                    given={key: value},
                )
            self.alphas[key] = float(value)

    def scale(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (Kalajdzievski, 2023)."""
        alpha = float(self.config["lora_alpha"])
        for key, value in self.alphas.items():
            if re.match(rf"(.*\.)?({key})$", module):
                alpha = value
                break
        return alpha / (rank**0.5 if self.config.get("use_rslora") else rank)


def _harmless(pattern: object) -> bool:
    """Whether a regular expression from a file cannot take for ever: few, simple repetitions."""
    if not isinstance(pattern, str) or len(pattern) > 256:
        return False
    rest, n = re.subn(r"(\\d|\.|\[0-9\])[*+]", "", pattern)
    if n > 3 or re.search(r"[*+{]", rest):
        return False
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _why_unsupported(key: str) -> str:
    for sign, reason in (
        ("lora_magnitude_vector", "DoRA (use_dora) is not supported"),
        ("lora_embedding_", "an adapter on the embedding (lora_embedding) is not supported"),
        ("modules_to_save", "modules_to_save is not supported"),
        ("lm_head", "an adapter on the output matrix (lm_head) is not supported"),
        (".experts.", "adapters on expert layers are not supported"),
        (".bias", "trained biases (bias, lora_bias) are not supported"),
        ("embed_tokens", "a trained embedding is not supported"),
    ):
        if sign in key:
            return reason
    return "unknown tensor in the adapter"


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Config and tensors of an adapter folder; only safetensors are read, never pickles.

    Raises:
        NotFound: the folder or one of the two files is missing.
        InvalidRequest: a file cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config_path = folder / "adapter_config.json"
    weights_path = folder / "adapter_model.safetensors"
    for path in (folder, config_path, weights_path):
        if not path.exists():
            pickled = path is weights_path and (folder / "adapter_model.bin").exists()
            raise NotFound(
                "does not exist",
                field="adapter",
                given=str(path),
                remedy="Save the adapter again as safetensors: pickled weights are not read"
                if pickled
                else "Give a folder with adapter_config.json and adapter_model.safetensors",
            )
    try:
        if config_path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError("larger than a megabyte")
        config = json.loads(config_path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
    except ValueError as error:
        raise InvalidRequest(
            f"cannot be read: {error}", field="adapter_config", given=str(config_path)
        ) from error
    try:
        return config, load_file(weights_path)
    except SafetensorError as error:
        raise InvalidRequest(
            f"cannot be read: {error}", field="adapter_model", given=str(weights_path)
        ) from error
