"""What a forward pass keeps for the hand-written backward: the tensors that the memory plan says.

The plan (:mod:`invivo.engine.memory_plan`) decides which tensors of which layers are kept; a
:class:`Tape` holds them for one sequence, on the device or in host memory
(:mod:`invivo.engine.host_tape`). Mixtures of experts keep less than planned: their feed-forward is
rerun from its input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from invivo.engine.graph_pruning import Kept, choose_kept, differentiate
from invivo.engine.host_placement import HostRoom
from invivo.engine.host_tape import HostTape
from invivo.engine.tape_budget import Budgets
from invivo.engine.trainable import Trainable
from invivo.engine.trained_hooks import TrainedHooks
from invivo.engine.training_graph import build_graph
from invivo.models.config import ModelConfig

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# Names of one product's halves: a tape that keeps both keeps the product.
_HALVES = ("mlp.gate", "mlp.up")
# What the plan adds to a site's name for the tensor behind an adapter, a steering vector.
_AFTER_HOOK = (".steered", ".adapted")


@dataclass(frozen=True, slots=True)
class Entry:
    """One kept tensor: numbers of a row and their dtype ("bit": one bit each)."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class TapePlan:
    """What a sequence keeps.

    Attributes:
        entries: by layer and name, in the order of layers.
        rerun: by layer, the maps (and "attention") that the backward runs again.
        scaled: outputs of maps that a trained vector scales, by layer and name: the backward
            reads them as they were before.
        hosted: layers whose feed-forward product waits in host memory; its entries are among the
            others.
    """

    entries: dict[tuple[int, str], Entry]
    rerun: dict[int, frozenset[str]] = field(default_factory=dict)
    scaled: frozenset[tuple[int, str]] = frozenset()
    hosted: frozenset[int] = frozenset()


class TapePlanner:
    """Plans tapes of one model and one set of bypasses."""

    def __init__(
        self,
        config: ModelConfig,
        trainables: Sequence[Trainable],
        *,
        dtype: torch.dtype,
        input_gradients: bool = False,
        max_bytes: int | None = None,
        host: HostRoom | None = None,
    ) -> None:
        """
        Args:
            max_bytes: of one tape; None keeps whatever only a large product could rebuild.
            host: memory for what does not fit ``max_bytes``; None: there is none.
        """
        name_of = {kind: name for name, kind in DTYPES.items()}
        if input_gradients and all(each.kind != "soft_prompt" for each in trainables):
            # Keeps what a gradient by the embeddings needs.
            trainables = [*trainables, Trainable("soft_prompt", size=1)]
        self._graph = build_graph(config, trainables, length=1, dtype=name_of[dtype])
        nodes = differentiate(self._graph)
        self._max_bytes = max_bytes
        self._budgets: Budgets | None = None
        self._whole: TapePlan | None = None
        self._planned: dict[tuple[int, bool], TapePlan] = {}
        self._host = host
        if max_bytes is None:
            kept = choose_kept(self._graph, nodes, rebuild=True, compress=True)
            self._whole = self._plan(kept, {})
        else:
            self._budgets = Budgets(config, self._graph, nodes)

    def plan(self, length: int, *, hosted: bool = True) -> TapePlan:
        """For a sequence of ``length`` rows: the tensors of the memory plan, without the loss's
        gradient and the insides of mixtures. Without ``hosted`` all lie on the device.

        What attention's queries are called depends on norm, clip and rotary embedding; the ones
        that meet the keys are "attn.q.final" here.

        Raises:
            InvalidRequest: the budget is too small for it.
        """
        if self._whole is not None:
            return self._whole
        assert self._budgets is not None
        assert self._max_bytes is not None
        asked = length, hosted and self._host is not None
        if asked not in self._planned:
            budgets, limit = self._budgets, self._max_bytes
            away: frozenset[int] = frozenset()
            if hosted and self._host is not None:
                away = budgets.hosted(length=length, max_bytes=limit, room=self._host)
            kept, rerun = budgets.within(length=length, max_bytes=limit, hosted=away)
            self._planned[asked] = self._plan(kept, rerun, away)
        return self._planned[asked]

    def _plan(
        self, kept: Kept, rerun: dict[int, frozenset[str]], hosted: frozenset[int] = frozenset()
    ) -> TapePlan:
        graph = self._graph
        final = {op.inputs[0] for op in graph.ops if op.kind == "attention"}
        entries = {}
        for key in sorted(kept.tape):
            tensor = graph.tensors[key]
            if tensor.layer < 0 or tensor.name.startswith("moe."):
                continue
            name = "attn.q.final" if key in final else tensor.name
            entries[_before_hook(tensor.layer, name)] = Entry(tensor.shape, tensor.dtype)
        scaled = {
            (tensor.layer, tensor.name.removesuffix(".unscaled"))
            for tensor in graph.tensors.values()
            if tensor.name.endswith(".unscaled")
        }
        return TapePlan(dict(sorted(entries.items())), rerun, frozenset(scaled), hosted)


def _before_hook(layer: int, name: str) -> tuple[int, str]:
    """Where a bypass sits at a site, the tensor before it is what is kept: the one after it is
    as cheap to rebuild as the other way round."""
    for suffix in _AFTER_HOOK:
        name = name.removesuffix(suffix)
    return (layer - 1, "resid.post") if name == "resid.pre" else (layer, name)


def layer_inputs(config: ModelConfig, hooks: TrainedHooks, *, dtype: torch.dtype) -> TapePlan:
    """The residual stream before each layer that a rerun, layer by layer, starts from."""
    name = next(name for name, kind in DTYPES.items() if kind == dtype)
    entry = Entry((config.d_model,), name)
    first = max(1, hooks.bottom)
    return TapePlan({(layer, "layer.input"): entry for layer in range(first, config.n_layers)})


@dataclass(slots=True)
class Tape:
    """Kept tensors of one sequence of ``length`` rows, each [L, ...]; bits eight to a byte.

    Attributes:
        entries: what is to be kept; ``held`` has what was written so far.
        hosted: what waits in host memory.
        n_bytes: of the device, without what is on its way to the host and back.
    """

    plan: TapePlan
    length: int
    entries: dict[tuple[int, str], Entry]
    hosted: HostTape | None = None
    held: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    n_bytes: int = 0

    @classmethod
    def of(cls, plan: TapePlan, length: int, hosted: HostTape | None = None) -> Tape:
        assert bool(plan.hosted) == (hosted is not None)
        return cls(plan, length, dict(plan.entries), hosted)

    def let_go(self, layer: int) -> None:
        """Drop what only ``layer`` and those above it read."""
        # Entries are in the order of layers.
        while self.entries and (last := next(reversed(self.entries)))[0] >= layer:
            del self.entries[last]
            gone = self.held.pop(last, None)
            self.n_bytes -= 0 if gone is None else gone.nbytes
        if self.hosted is not None:
            self.hosted.let_go(layer)

    def close(self) -> None:
        """The text is through or given up: wait for copies under way, give host memory back."""
        self.held = {}
        self.n_bytes = 0
        if self.hosted is not None:
            self.hosted.close()

    def look_ahead(self, layer: int) -> None:
        """The backward is at ``layer``."""
        if self.hosted is not None:
            self.hosted.look_ahead(layer, self.n_bytes)

    def lend(self, layer: int, start: int, stop: int) -> torch.Tensor | None:
        """Memory of the product of rows [start, stop) that came from the host, to be written over;
        None where it did not. They are not to be read again."""
        if self.hosted is None or layer not in self.plan.hosted:
            return None
        return self.hosted.lend(layer, start, stop)

    def _hold(self, layer: int, name: str, value: torch.Tensor) -> None:
        self.held[layer, name] = value
        self.n_bytes += value.nbytes
        if self.hosted is not None:
            self.hosted.make_room(layer, self.n_bytes)

    def write(self, layer: int, name: str, start: int, value: torch.Tensor) -> None:
        """Rows [start, start + n): value [n, ...], bools where the plan keeps bits."""
        entry = self.entries.get((layer, name))
        if entry is None:
            return
        if self.hosted is not None and self.hosted.has(layer, name):
            self._send(layer, name, start, value.clone())
            return
        shape, dtype = entry.shape, DTYPES.get(entry.dtype, torch.uint8)
        if entry.dtype == "bit":
            value = pack_bits(value.reshape(value.shape[0], -1))
            shape = (value.shape[1],)
        held = self.held.get((layer, name))
        if held is None:  # every row is written before any is read
            held = torch.empty(self.length, *shape, dtype=dtype, device=value.device)
            self._hold(layer, name, held)
        n_rows = value.shape[0]
        rows = held if n_rows == self.length else held[start : start + n_rows]
        rows.copy_(value if value.shape == rows.shape else value.reshape(rows.shape))

    def take(self, layer: int, name: str, start: int, value: torch.Tensor) -> None:
        """:meth:`write` for a value that nobody changes any more: it is kept as it is, without a
        copy, where it is the whole sequence's and its memory holds nothing else."""
        entry = self.entries.get((layer, name))
        if entry is None:
            return
        if self.hosted is not None and self.hosted.has(layer, name):
            self._send(layer, name, start, value)
            return
        half = name in _HALVES and all((layer, other) in self.entries for other in _HALVES)
        whole = value.shape[0] == self.length and value.dtype == DTYPES.get(entry.dtype)
        exact = value.untyped_storage().nbytes() == value.nbytes * (1 + half)
        if whole and exact and (value.stride(-1) == 1 if half else value.is_contiguous()):
            same = value.shape[1:] == entry.shape
            self._hold(layer, name, value if same else value.view(self.length, *entry.shape))
        else:
            self.write(layer, name, start, value)

    def _send(self, layer: int, name: str, start: int, value: torch.Tensor) -> None:
        assert self.hosted is not None
        self.hosted.write(layer, name, start, value)
        self.hosted.make_room(layer, self.n_bytes)

    def read(self, layer: int, name: str, start: int, stop: int) -> torch.Tensor | None:
        """Rows [start, stop) of a kept tensor, None if it is not kept. Bits come as bools."""
        if self.hosted is not None and self.hosted.has(layer, name):
            return self.hosted.read(layer, name, start, stop)
        held = self.held.get((layer, name))
        if held is None:
            return None
        rows = held if stop - start == self.length else held[start:stop]
        entry = self.entries[layer, name]
        if entry.dtype != "bit":
            return rows
        return unpack_bits(rows, _count(entry.shape)).view(-1, *entry.shape)


def pack_bits(bits: torch.Tensor) -> torch.Tensor:
    """[n, w] bool -> [n, ceil(w / 8)] uint8."""
    n, width = bits.shape
    full = torch.zeros(n, -(-width // 8) * 8, dtype=torch.uint8, device=bits.device)
    full[:, :width] = bits
    powers = 2 ** torch.arange(8, device=bits.device)
    return (full.view(n, -1, 8) * powers).sum(-1).to(torch.uint8)


def unpack_bits(packed: torch.Tensor, width: int) -> torch.Tensor:
    """The inverse of :func:`pack_bits`: [n, ceil(w / 8)] uint8 -> [n, w] bool."""
    shifts = torch.arange(8, device=packed.device, dtype=torch.uint8)
    bits = packed[:, :, None].bitwise_right_shift(shifts).bitwise_and(1)
    return bits.flatten(1)[:, :width].bool()


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count


def output_parts(config: ModelConfig, linear: str) -> list[tuple[str, slice]]:
    """Tape names of the parts of a linear map's output, and where they lie."""
    if linear == "qkv":
        q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        return [
            ("attn.q", slice(0, q)),
            ("attn.k", slice(q, q + kv)),
            ("attn.v", slice(q + kv, q + 2 * kv)),
        ]
    if linear == "o":
        return [("attn.proj" if config.post_norm else "attn.out", slice(0, config.d_model))]
    if linear == "gate_up":
        f = config.d_ff
        return [("mlp.gate", slice(0, f)), ("mlp.up", slice(f, 2 * f))]
    if linear == "up":
        return [("mlp.up", slice(0, config.d_ff))]
    return [("mlp.proj" if config.post_norm else "mlp.out", slice(0, config.d_model))]
