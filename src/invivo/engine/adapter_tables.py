"""Bypasses as data on the device: tables indexed by slot, so that every row has its own.

A version is laid out once in host memory (:func:`lay_out`): the matrices of a LoRA fused as the
decoder fuses its linear maps, the scale folded into B. :class:`AdapterTables` copies it to a slot;
slot 0 is nothing. Virtual tokens are rows of a batch that the batch builder names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from invivo.engine.bypasses import BypassSpec, Parameters, overlay, places, rows_of
from invivo.engine.types import VirtualRows
from invivo.kernels.bottleneck import bottleneck_add
from invivo.kernels.lora import lora_add
from invivo.models.config import ModelConfig

Place = tuple[int, str]  # layer, linear map or site
Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(slots=True)
class LaidOut:
    """One set of bypasses as the tables hold it, in host memory.

    Attributes:
        low_rank: A [R, d_in] and B [d_out, R] by linear map.
        scales: ``l - 1`` by linear map or site.
        bottlenecks: D [R, d] and U [d, R] by site and activation.
        shifts: vectors by site.
        prefix: keys and values [layers, n, G, D].
        prompt: [n, d].
    """

    low_rank: dict[Place, Pair] = field(default_factory=dict)
    scales: dict[Place, torch.Tensor] = field(default_factory=dict)
    bottlenecks: dict[tuple[int, str, str], Pair] = field(default_factory=dict)
    shifts: dict[Place, torch.Tensor] = field(default_factory=dict)
    prefix: Pair | None = None
    prompt: torch.Tensor | None = None


def lay_out(
    config: ModelConfig,
    specs: Sequence[BypassSpec],
    parameters: Parameters,
    dtype: torch.dtype,
) -> LaidOut:
    """Checked specs and parameters in the tables' form, in ``dtype`` on the CPU; what needs no
    change is not copied."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    p = {name: tensor.detach().to("cpu", exact) for name, tensor in parameters.items()}
    out = LaidOut()
    pieces: dict[Place, list[tuple[int, int, torch.Tensor, torch.Tensor]]] = {}
    for spec in specs:
        for layer, place in places(config, spec):
            base = f"layers.{layer}.{place}"
            linear, start, stop = rows_of(config, layer, place)
            if spec.kind == "lora":
                b = p[f"{base}.lora_B"] * spec.scale
                pieces.setdefault((layer, linear), []).append((start, stop, p[f"{base}.lora_A"], b))
            elif spec.kind == "ia3" and place == "down":
                out.scales[layer, "mlp.neuron"] = (p[f"{base}.ia3"] - 1).to(dtype)
            elif spec.kind == "ia3":
                whole = rows_of(config, layer, linear)[2]
                vector = out.scales.setdefault((layer, linear), torch.zeros(whole, dtype=dtype))
                vector[start:stop] = p[f"{base}.ia3"] - 1
            elif spec.kind == "adapter":
                pair = (p[f"{base}.adapter_down"].to(dtype), p[f"{base}.adapter_up"].to(dtype))
                out.bottlenecks[layer, place, spec.activation] = pair
            else:
                out.shifts[layer, place] = p[f"{base}.steering"].to(dtype)
        if spec.kind == "soft_prompt":
            out.prompt = p["soft_prompt"].to(dtype)
        elif spec.kind == "prefix":
            k, v = (
                torch.stack([p[f"layers.{i}.prefix_{which}"] for i in range(config.n_layers)])
                for which in "kv"
            )
            out.prefix = k.to(dtype), v.to(dtype)
    for (layer, linear), some in pieces.items():
        out.low_rank[layer, linear] = _join(rows_of(config, layer, linear)[2], some, dtype)
    return out


def _join(
    d_out: int, pieces: list[tuple[int, int, torch.Tensor, torch.Tensor]], dtype: torch.dtype
) -> Pair:
    """Several parts of one fused map as one pair: A stacked, B block by block."""
    pieces = sorted(pieces, key=lambda piece: piece[0])
    a = torch.cat([piece[2] for piece in pieces])
    b = a.new_zeros(d_out, a.shape[0])
    column = 0
    for start, stop, some, block in pieces:
        b[start:stop, column : column + some.shape[0]] = block
        column += some.shape[0]
    return a.to(dtype), b.to(dtype)


class AdapterTables:
    """Device memory of the adapters in use.

    Tables of matrices grow with what is placed, tables of vectors have all slots from the start.

    Args:
        max_slots: slots beside slot 0.
    """

    def __init__(
        self, config: ModelConfig, *, device: torch.device, dtype: torch.dtype, max_slots: int
    ) -> None:
        self._config = config
        self._device = device
        self._dtype = dtype
        self._max_slots = max_slots
        self.low_rank: dict[Place, Pair] = {}  # [slots, R, d_in], [slots, d_out, R]
        self.scales: dict[Place, torch.Tensor] = {}  # [max_slots + 1, width]
        self.bottlenecks: dict[Place, dict[str, Pair]] = {}  # [slots, R, d], [slots, d, R]
        self.shifts: dict[Place, torch.Tensor] = {}
        self.prefix: dict[int, Pair] = {}
        self.prompt: dict[int, torch.Tensor] = {}
        self.at: frozenset[str] = frozenset()  # where rows are changed, virtual tokens apart
        self.generation = 0  # counts moves and new places: captured graphs must be remade

    def write(self, slot: int, laid: LaidOut) -> None:
        """Copy a set of bypasses to a cleared slot."""
        for place, pair in laid.low_rank.items():
            self.low_rank[place] = self._put(self.low_rank.get(place), slot, pair)
        for (layer, site, kind), pair in laid.bottlenecks.items():
            tables = self.bottlenecks.setdefault((layer, site), {})
            tables[kind] = self._put(tables.get(kind), slot, pair)
        for vectors, given in ((self.scales, laid.scales), (self.shifts, laid.shifts)):
            for place, vector in given.items():
                if place not in vectors:
                    vectors[place] = self._zeros(self._max_slots + 1, len(vector))
                    self.generation += 1
                vectors[place][slot] = vector.to(self._device)
        if laid.prefix is not None:
            k, v = laid.prefix
            self.prefix[slot] = k.to(self._device), v.to(self._device)
        if laid.prompt is not None:
            self.prompt[slot] = laid.prompt.to(self._device)
        sites = {site for _, site in (*self.bottlenecks, *self.shifts)}
        self.at = frozenset(sites | {site for _, site in self.scales if site == "mlp.neuron"})

    def clear(self, slot: int) -> None:
        """Make a slot nothing again."""
        pairs = [*self.low_rank.values()]
        pairs += [pair for tables in self.bottlenecks.values() for pair in tables.values()]
        for a, b in pairs:
            if slot < len(a):
                a[slot].zero_()
                b[slot].zero_()
        for table in (*self.scales.values(), *self.shifts.values()):
            table[slot].zero_()
        self.prefix.pop(slot, None)
        self.prompt.pop(slot, None)

    def bypass(self, index: torch.Tensor, virtual: Sequence[VirtualRows] = ()) -> AdapterBypass:
        """The bypass of a batch whose row ``t`` uses slot ``index[t]``; [T] int32 on the device."""
        return AdapterBypass(self, index, virtual)

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=self._device, dtype=self._dtype)

    def _put(self, old: Pair | None, slot: int, pair: Pair) -> Pair:
        """Write matrices to a slot of a pair of tables, made larger where need be."""
        a, b = pair
        unit = 16 if self._device.type == "cuda" else 8
        rank = -(-a.shape[0] // unit) * unit
        slots = min(self._max_slots + 1, 1 << slot.bit_length())
        if old is None or slot >= old[0].shape[0] or rank > old[0].shape[1]:
            if old is not None:
                slots, rank = max(slots, old[0].shape[0]), max(rank, old[0].shape[1])
            new = self._zeros(slots, rank, a.shape[1]), self._zeros(slots, b.shape[0], rank)
            if old is not None:
                new[0][: old[0].shape[0], : old[0].shape[1]] = old[0]
                new[1][: old[1].shape[0], :, : old[1].shape[2]] = old[1]
            old = new
            self.generation += 1
        old[0][slot, : a.shape[0]] = a.to(self._device)
        old[1][slot, :, : a.shape[0]] = b.to(self._device)
        return old


_VIRTUAL_PLACES = frozenset({"embed", "attn.kvhead.k", "attn.kvhead.v"})


class AdapterBypass:
    """The bypass of one batch: another slot for every row."""

    __slots__ = ("_index", "_tables", "_virtual", "at")

    def __init__(
        self, tables: AdapterTables, index: torch.Tensor, virtual: Sequence[VirtualRows]
    ) -> None:
        self._tables = tables
        self._index = index
        self._virtual = virtual
        self.at = tables.at | _VIRTUAL_PLACES if virtual else tables.at

    def __call__(self, layer: int, linear: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        place = (layer, linear)
        pair = self._tables.low_rank.get(place)
        if pair is not None:
            y = lora_add(y, x, *pair, self._index)
        scale = self._tables.scales.get(place)
        return y if scale is None else y.addcmul_(y, scale.index_select(0, self._index))

    def rows(self, name: str, layer: int, value: torch.Tensor) -> torch.Tensor:
        if name in _VIRTUAL_PLACES:
            return self._fill(name, layer, value)
        tables, place = self._tables, (layer, name)
        scale = tables.scales.get(place)
        if scale is not None:
            value = torch.addcmul(value, value, scale.index_select(0, self._index))
        for kind, pair in tables.bottlenecks.get(place, {}).items():
            value = bottleneck_add(value, *pair, self._index, kind)
        shift = tables.shifts.get(place)
        return value if shift is None else value + shift.index_select(0, self._index)

    def _fill(self, name: str, layer: int, value: torch.Tensor) -> torch.Tensor:
        """Virtual tokens get their embeddings, or their keys or values."""
        fills: list[tuple[VirtualRows, torch.Tensor, int]] = []
        for piece in self._virtual:
            prefix = self._tables.prefix.get(piece.slot)
            if name == "embed":
                prompt = self._tables.prompt.get(piece.slot)
                if prompt is not None:
                    fills.append((piece, prompt, 0 if prefix is None else prefix[0].shape[1]))
            elif prefix is not None:
                fills.append((piece, prefix[0 if name.endswith("k") else 1][layer], 0))
        return overlay(value, fills)
