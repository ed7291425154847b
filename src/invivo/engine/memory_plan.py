"""What fine-tuning must hold between forward and backward, derived from the model and the bypasses.

The steps are those of graph pruning (FlexLLM, arXiv 2402.18789): write the forward graph, derive
the backward graph, delete the gradients of frozen weights and then whatever nobody reads, find
what the surviving gradients read of the forward pass, keep the cheapest set from which all of
that can be had (rebuilding by cheap operations), and keep one bit where one bit is read. The
rules are per operation (:mod:`invivo.engine.training_graph`); no method of fine-tuning is a
special case. No torch in here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from invivo.engine.graph_pruning import Gradient, Kept, Pieces, choose_kept, differentiate
from invivo.engine.host_placement import GB_PER_S, HostRoom
from invivo.engine.tape_budget import Budgets
from invivo.engine.trainable import Trainable
from invivo.engine.training_graph import BITS, RULES, Graph, Tensor, build_graph
from invivo.errors import InvalidRequest
from invivo.models.config import ModelConfig

Verdict = Literal["kept", "rebuilt", "compressed", "dropped"]
Held = Literal["tape", "host", "cache", "window", ""]
_RERUNNABLE = ("q", "k", "v", "o", "gate", "up", "attention")
HEAD_CHUNK = 256  # rows whose logits exist at one time


# --- working memory of a backward pass -----------------------------------------------------------
def working_bits(graph: Graph, nodes: Sequence[Gradient], held: Kept, dtype: str) -> dict[int, int]:
    """Most bits a token that the backward of each layer has alive at one time, by layer.

    Gradients of activations (a sum and what is added to it share one buffer) and the tensors
    rebuilt for the layer, each from the first operation that reads it to the last. Tiles inside a
    kernel are not counted.
    """
    producers = graph.producers()
    same = Pieces()
    for op in graph.ops:
        if op.kind in ("add", "shift", "rope", "cast"):
            same.join((op.outputs[0], *op.inputs))
    by_op: dict[int, list[Gradient]] = defaultdict(list)
    for node in nodes:
        by_op[node.op].append(node)
    # Steps of the backward: (layer, tensors rebuilt for it, gradient buffers it touches).
    at_hand = held.tape | held.cached
    steps: dict[int, list[set[tuple[str, str]]]] = defaultdict(list)
    for index in sorted(by_op, reverse=True):
        op = graph.ops[index]
        touched = {("gradient", same.find(op.outputs[0]))} if op.kind != "head_loss" else set()
        for node in by_op[index]:
            if not node.is_param:
                touched.add(("gradient", same.find(node.of)))
            options = [sorted(o) for o in node.reads if o <= held.read]
            assert options, node
            todo = min(options, key=len)
            while todo:
                key = todo.pop()
                if key in at_hand or ("rebuilt", key) in touched:
                    continue
                touched.add(("rebuilt", key))
                todo.extend(producers[key].inputs)
        steps[op.layer].append(touched)
    wide = BITS[dtype]
    peaks: dict[int, int] = {}
    for layer, sequence in steps.items():
        first: dict[tuple[str, str], int] = {}
        last: dict[tuple[str, str], int] = {}
        for i, touched in enumerate(sequence):
            for item in touched:
                first.setdefault(item, i)
                last[item] = i
        size = {
            item: graph.tensors[item[1]].bits
            if item[0] == "rebuilt"
            else graph.tensors[item[1]].bits // BITS[graph.tensors[item[1]].dtype] * wide
            for item in first
        }
        peaks[layer] = max(
            sum(size[item] for item in first if first[item] <= i <= last[item])
            for i in range(len(sequence))
        )
    return peaks


# --- the plan -------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Row:
    """One tensor of the forward pass, over the layers where it fares alike.

    Attributes:
        layers: empty for a tensor outside layers.
        shape: of one token.
        bytes_per_token: in one layer.
        n_bytes: for the whole sequence and all these layers; what is dropped counts too, so that
            the column tells what the verdict saves.
        held: where a kept tensor lies: "tape" (from forward to backward), "host" (the same, in
            host memory), "cache", or "window" (for one window at a time, while it runs again); ""
            if it is not kept.
    """

    name: str
    layers: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str
    bytes_per_token: float
    n_bytes: int
    verdict: Verdict
    held: Held
    reason: str


@dataclass(frozen=True, slots=True)
class Totals:
    """Bytes held between forward and backward for the whole sequence.

    Attributes:
        naive: by autograd over plain tensor code when everything requires a gradient.
        frozen: by the same with the base frozen and a fused attention: autograd prunes too.
        pruned: by fused operations after graph pruning, nothing rebuilt.
        rebuilt: after rematerialisation.
        compressed: and with bits for what is read only by sign: the tape of this plan.
        hosted: of that in host memory; ``compressed`` is what lies on the device.

    Models with recurrent layers keep no tape: there the last three are what one window as long as
    the sequence would hold when it runs again.
    """

    naive: int
    frozen: int
    pruned: int
    rebuilt: int
    compressed: int
    hosted: int = 0


@dataclass(frozen=True, slots=True)
class Schedule:
    """Bytes of one order of a token-level backward.

    Attributes:
        name: ``v1`` reruns a window's forward, ``v2`` reads the tape; ``window-outer`` takes all
            layers of a window before the next window, ``layer-outer`` the other way round.
        parts: what lives for the whole sequence, by purpose (keys and values included); "copies"
            is the most that is on its way to host memory and back.
        window: what lives for one window.
    """

    name: str
    parts: dict[str, int]
    window: int

    @property
    def sequence(self) -> int:
        return sum(self.parts.values())

    @property
    def total(self) -> int:
        return self.sequence + self.window


@dataclass(frozen=True, slots=True)
class TrainedBytes:
    """What the trained numbers take, whatever the sequence.

    Attributes:
        parameters: how many.
        working: copy in the model's dtype.
        master: float32 weights. gradients: float32 sums. moments: Adam's two, float32.
    """

    parameters: int
    working: int
    master: int
    gradients: int
    moments: int

    @property
    def total(self) -> int:
        return self.working + self.master + self.gradients + self.moments


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What fine-tuning holds. ``length`` includes the tokens of a soft prompt."""

    length: int
    window: int
    dtype: str
    rows: tuple[Row, ...]
    totals: Totals
    schedules: tuple[Schedule, ...]
    trained: TrainedBytes

    def schedule(self, name: str) -> Schedule:
        return next(s for s in self.schedules if s.name == name)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        plain = asdict(self)
        for given, told in zip(self.schedules, plain["schedules"], strict=True):
            told |= {"sequence": given.sequence, "total": given.total}
        plain["trained"]["total"] = self.trained.total
        return plain


def plan_activations(
    config: ModelConfig,
    trainables: Sequence[Trainable],
    *,
    length: int,
    window: int = 512,
    rerun: Sequence[str] = (),
    tape_bytes: int | None = None,
    host_bytes: int = 0,
    host_gb_per_s: float = GB_PER_S,
    dtype: str = "bfloat16",
    adapter_dtype: str = "float32",
) -> MemoryPlan:
    """Plan the memory of fine-tuning ``trainables`` on one sequence of ``length`` tokens.

    Args:
        window: tokens of one window of the token-level backward; cut to the length.
        rerun: frozen maps among q, k, v, o, gate, up, and attention, that the backward runs
            again where that saves memory: a smaller tape for more arithmetic.
        tape_bytes: most bytes of the tape; what runs again is then chosen layer by layer instead
            (:mod:`invivo.engine.tape_budget`).
        host_bytes: of host memory, for what ``tape_bytes`` have no room for; then the plan's
            tensors and totals are those of layer order, the only one that uses it.
        host_gb_per_s: what is copied there and back, see
            :class:`~invivo.engine.host_placement.HostRoom`.
        adapter_dtype: in which the plain-code comparison (``Totals.naive``, ``frozen``) runs its
            bypasses; this engine's run in ``dtype``.

    Raises:
        InvalidRequest: see :func:`invivo.engine.training_graph.build_graph`; a length or window
            below 1; a tape that cannot be so small, or any tape of a recurrent model; host memory
            without a budget for the device's.
    """
    for name, value in (("length", length), ("window", window)):
        if value < 1:
            raise InvalidRequest("must be at least 1", field=name, given=value)
    length += sum(t.size for t in trainables if t.kind == "soft_prompt")
    window = min(window, length)
    unknown = [place for place in rerun if place not in _RERUNNABLE]
    if unknown:
        raise InvalidRequest(
            "no frozen map of this name can run again",
            field="rerun",
            given=unknown[0],
            remedy=f"Choose among {', '.join(_RERUNNABLE)}",
        )
    recurrent = bool(config.recurrent)
    for name, asked in (("tape_bytes", tape_bytes is not None), ("rerun", bool(rerun))):
        if recurrent and asked:
            raise InvalidRequest(
                "a model with recurrent layers keeps no tape: its windows run again as a whole",
                field=name,
                remedy="Choose the window: it bounds what is held",
            )
    if not host_gb_per_s > 0:
        raise InvalidRequest("must lie above 0", field="host_gb_per_s", given=host_gb_per_s)
    if host_bytes < 0 or (host_bytes and tape_bytes is None):
        raise InvalidRequest(
            "is for what does not fit a tape of so many bytes on the device",
            field="host_bytes",
            given=host_bytes,
            remedy="Give tape_bytes too",
        )
    spelling: Literal["fused", "rerun"] = "rerun" if recurrent else "fused"
    graph = build_graph(config, trainables, length=length, dtype=dtype, spelling=spelling)
    nodes = differentiate(graph)
    pruned = choose_kept(graph, nodes, rebuild=False, compress=False, cache=not recurrent)
    rebuilt = pruned
    if not recurrent:
        rebuilt = choose_kept(graph, nodes, rebuild=True, compress=False)
    away: frozenset[str] = frozenset()
    unaided = final = pruned
    if recurrent:
        pass
    elif tape_bytes is None:
        final = choose_kept(graph, nodes, rebuild=True, compress=True, rerun=rerun)
    else:
        budgets = Budgets(config, graph, nodes)
        unaided = final = budgets.within(length=length, max_bytes=tape_bytes)[0]
        if host_bytes:
            room = HostRoom(host_bytes, host_gb_per_s)
            layers = budgets.hosted(length=length, max_bytes=tape_bytes, room=room)
            final, _ = budgets.within(length=length, max_bytes=tape_bytes, hosted=layers)
            away = frozenset[str]().union(*(budgets.product(layer) for layer in layers))

    def tape(keys: Iterable[str]) -> int:
        return _bytes(sum(graph.tensors[k].bits for k in keys), length)

    totals = Totals(
        naive=_eager_tape(config, trainables, length, dtype, adapter_dtype, frozen=False),
        frozen=_eager_tape(config, trainables, length, dtype, adapter_dtype, frozen=True),
        pruned=tape(pruned.tape),
        rebuilt=tape(rebuilt.tape),
        compressed=tape(final.tape - away),
        hosted=tape(away),
    )
    schedules = _schedules(config, graph, nodes, pruned, final, length, window, dtype)
    if away:  # in the last order, and in no other
        assert tape_bytes is not None
        last = schedules[-1]
        on_device = {"tape": totals.compressed, "copies": tape_bytes - totals.compressed}
        schedules = (
            *_schedules(config, graph, nodes, pruned, unaided, length, window, dtype)[:-1],
            Schedule(last.name, last.parts | on_device, last.window),
        )
    return MemoryPlan(
        length=length,
        window=window,
        dtype=dtype,
        rows=_rows(graph, nodes, final, length, away, kept_in="window" if recurrent else "tape"),
        totals=totals,
        schedules=schedules,
        trained=_trained(graph, dtype),
    )


def _bytes(bits: int, tokens: int) -> int:
    return -(-bits * tokens // 8)


def _eager_tape(
    config: ModelConfig,
    trainables: Sequence[Trainable],
    length: int,
    dtype: str,
    adapter_dtype: str,
    *,
    frozen: bool,
) -> int:
    """What autograd holds over plain tensor code; nothing is rebuilt and nothing is cached."""
    graph = build_graph(
        config,
        trainables,
        length=length,
        dtype=dtype,
        adapter_dtype=adapter_dtype,
        spelling="eager",
        eager_attention=not frozen,
    )
    nodes = differentiate(graph, train_all=not frozen)
    kept = choose_kept(graph, nodes, rebuild=False, compress=False, cache=False)
    return _bytes(sum(graph.tensors[k].bits for k in kept.tape), length)


def _trained(graph: Graph, dtype: str) -> TrainedBytes:
    count = sum(p.count for op in graph.ops for p in op.params if p.trained)
    return TrainedBytes(count, count * BITS[dtype] // 8, 4 * count, 4 * count, 8 * count)


def _schedules(
    config: ModelConfig,
    graph: Graph,
    nodes: Sequence[Gradient],
    pruned: Kept,
    final: Kept,
    length: int,
    window: int,
    dtype: str,
) -> tuple[Schedule, ...]:
    """The four orders in closed form; L = length, s = window, sums over layers."""

    def per_layer(keys: Iterable[str]) -> dict[int, int]:
        bits: dict[int, int] = defaultdict(int)
        for key in keys:
            bits[graph.tensors[key].layer] += graph.tensors[key].bits
        return bits

    cache = [key for key, tensor in graph.tensors.items() if tensor.cached]
    kv = _bytes(sum(graph.tensors[k].bits for k in cache), length)
    # Gradients of keys and values are summed over windows in float32 (float64 stays as it is).
    sum_bits = max(32, BITS[dtype])
    wanted = {node.of for node in nodes if not node.is_param}
    for op in graph.ops:  # a prefix is keys and values: its gradient is summed where theirs are
        if op.kind == "attention" and any(p.trained for p in op.params):
            wanted.update(op.inputs[1:])
    sums = {
        layer: bits // BITS[dtype] * sum_bits
        for layer, bits in per_layer(k for k in cache if k in wanted).items()
    }
    stream = config.d_model * BITS[dtype]
    tape = _bytes(sum(graph.tensors[k].bits for k in final.tape), length)
    spent = {"loss.grad"} if config.recurrent else set()  # dx: it is there before a window runs
    layers_back = {graph.ops[node.op].layer for node in nodes} - {-1}
    # The first layer's input is looked up from the tokens.
    inputs = len(layers_back - {0}) * stream
    rerun = per_layer(k for k in pruned.tape if k not in spent)
    gradients = working_bits(graph, nodes, pruned, dtype)
    working = working_bits(graph, nodes, final, dtype)
    logits = min(HEAD_CHUNK, window) * config.vocab_size * sum_bits // 8

    def schedule(name: str, parts: dict[str, int], window_bits: int) -> Schedule:
        return Schedule(name, {"kv": kv, **parts}, _bytes(window_bits, window) + logits)

    all_sums = _bytes(sum(sums.values()), length)
    if config.recurrent:
        found = schedule(
            "v1 window-outer",
            {"dkv": all_sums, "dx": _bytes(stream, length)},
            sum(rerun.values()) + max(gradients.values(), default=0),
        )
        return (_with_states(found, config, nodes, graph, length, window, dtype),)
    one_sum = _bytes(max(sums.values(), default=0), length)
    return (
        schedule(
            "v1 window-outer",
            {"dkv": all_sums, "dx": _bytes(stream, length)},
            sum(rerun.values()) + max(gradients.values(), default=0),
        ),
        schedule(
            "v1 layer-outer",
            {"dkv": one_sum, "layer inputs": _bytes(inputs, length), "dx": _bytes(stream, length)},
            max((rerun[i] + gradients[i] for i in layers_back), default=0),
        ),
        schedule(
            "v2 window-outer",
            {"dkv": all_sums, "tape": tape},
            max(working.values(), default=0),
        ),
        # The loss's gradient on the tape becomes the gradient that walks down the layers.
        schedule(
            "v2 layer-outer",
            {"dkv": one_sum, "tape": tape},
            max(working.values(), default=0),
        ),
    )


def _with_states(
    rerun: Schedule,
    config: ModelConfig,
    nodes: Sequence[Gradient],
    graph: Graph,
    length: int,
    window: int,
    dtype: str,
) -> Schedule:
    """A rerun by windows with what recurrent layers carry from one to the next.

    For the sequence: the states (and convolution tails) before each forward window, and the
    gradients by one of them in the layers that a gradient reaches through it. For a window: the
    states with which autograd enters and leaves those layers, and the tails it leaves.
    """
    gla = config.gla
    assert gla is not None
    state = gla.n_heads * gla.head_k * gla.head_v * max(32, BITS[dtype]) // 8
    tail = max(0, gla.conv_size - 1) * gla.qkv_width * BITS[dtype] // 8
    read = [(graph.ops[node.op], node.of) for node in nodes]
    reached = {op.layer for op, _ in read if op.kind in ("gla", "gla_of_qkv")}
    # Keys, values and gates before the window have a part in its loss; queries have one only in
    # the tail of a convolution.
    carried = {
        op.layer
        for op, of in read
        if op.kind == "short_conv" or (op.kind == "gla" and of != op.inputs[0])
    }
    parts = rerun.parts | {
        "states": -(-length // window) * len(config.recurrent) * (state + tail),
        "dstates": len(carried) * (state + tail),
    }
    return Schedule(rerun.name, parts, rerun.window + len(reached) * (2 * state + tail))


# --- the table ------------------------------------------------------------------------------------
_Likeness = tuple[str, tuple[int, ...], str, Verdict, Held, str]


def _rows(
    graph: Graph,
    nodes: Sequence[Gradient],
    held: Kept,
    length: int,
    away: frozenset[str],
    *,
    kept_in: Held,
) -> tuple[Row, ...]:
    """``away``: keys of what waits in host memory."""
    readers: dict[str, list[str]] = defaultdict(list)
    spared: dict[str, set[str]] = defaultdict(set)
    for node in nodes:
        kind = graph.ops[node.op].kind
        reader = f"gradient of {node.of}" if node.is_param else f"{kind} backward"
        chosen = [o for o in node.reads if o <= held.read]
        for option in node.reads:
            for key in option:
                if option in chosen:
                    readers[key].append(reader)
                elif key not in held.read:
                    instead = min(chosen, key=len) if chosen else frozenset()
                    spared[key].update(graph.tensors[k].name for k in instead)
    full = {t for node in differentiate(graph, train_all=True) for o in node.reads for t in o}
    producers = graph.producers()
    alive = {graph.ops[node.op].outputs for node in nodes}
    groups: dict[_Likeness, list[int]] = {}
    for key, tensor in graph.tensors.items():
        op = producers[key]
        verdict: Verdict
        place: Held = ""
        if key in held.tape or key in held.cached:
            place = kept_in if key in held.tape else "cache"
            if tensor.name == "loss.grad":  # found in the forward, whatever runs again
                place = "tape"
            if key in away:
                place = "host"
            verdict = "compressed" if tensor.dtype == "bit" else "kept"
            reason = "for " + _some(readers[key])
            if not readers[key]:
                reason = "to rebuild others from"
        elif key in held.read:
            verdict = "rebuilt"
            names = [graph.tensors[k].name for k in op.inputs] or ["token ids"]
            reason = f"{op.kind} of {_some(names)} again, for {_some(readers[key])}"
        elif op.outputs.index(key) in RULES[op.kind].tiles and op.outputs in alive:
            verdict = "rebuilt"
            reason = f"piece by piece inside the kernel, by {op.kind} once more"
        else:
            verdict = "dropped"
            if tensor.dtype == "bit" or key in spared:
                reason = f"{_some(spared[key])} suffices" if spared[key] else "not needed"
            elif key in full:
                reason = "read only by gradients that nobody asks for"
            else:
                reason = "no gradient reads it"
        like = (tensor.name, tensor.shape, tensor.dtype, verdict, place, reason)
        groups.setdefault(like, []).append(tensor.layer)
    rows = []
    for (name, shape, dtype, verdict, place, reason), layers in groups.items():
        bits = Tensor(name, -1, shape, dtype).bits
        rows.append(
            Row(
                name=name,
                layers=tuple(i for i in layers if i >= 0),
                shape=shape,
                dtype=dtype,
                bytes_per_token=bits / 8,
                n_bytes=_bytes(bits * len(layers), length),
                verdict=verdict,
                held=place,
                reason=reason,
            )
        )
    return tuple(rows)


def _some(names: Iterable[str]) -> str:
    """``a, b and c``, each once."""
    once = list(dict.fromkeys(sorted(names)))
    return once[0] if len(once) == 1 else ", ".join(once[:-1]) + " and " + once[-1] if once else "?"
