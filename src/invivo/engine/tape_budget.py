"""The fastest tape within so many bytes: which layers' backward runs which maps again.

A layer has a few options: for each set of maps that may run again the cheapest tensors to keep
(:func:`invivo.engine.graph_pruning.choose_kept`), which has a price in bytes and one in arithmetic.
One option a layer is chosen so that the arithmetic is least and the bytes fit: a knapsack of
multiple choice, solved exactly by dynamic programming over the bytes (Kellerer, Pferschy and
Pisinger 2004, section 11.5). No torch in here.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from invivo.engine.graph_pruning import Gradient, Kept, choose_kept
from invivo.engine.host_placement import HostRoom, LayerCost, Timeline, choose_hosted
from invivo.engine.training_graph import Graph, Op
from invivo.errors import InvalidRequest
from invivo.models.config import ModelConfig

# What may run again, each entry as a whole. Keys and values are in the cache: their maps run again
# only for the gradient of a norm, a clip or a trained scale behind them. Gate and up are one
# product, whose place their gradients take: with one of them on the tape the backward holds more.
PLACES: tuple[tuple[str, ...], ...] = (("q",), ("k", "v"), ("o",), ("gate", "up"), ("attention",))
# Attention's arithmetic goes at this share of the rate of a matrix product. An H200 reaches 344 and
# 786 TFLOP/s at 2,048 tokens; short texts and CPUs reach less, and it is more than one kernel.
ATTENTION_RATE = 0.25
# Cheap operations move numbers: multiplications that a product makes in the time of a byte (H200:
# 393e12 a second, about 4e12 bytes).
PRODUCTS_A_BYTE = 100
MOST_UNITS = 20_000  # in which the knapsack counts bytes
# A layer's backward takes this much of its forward (H200: 57 and 47 ms).
BACKWARD_WORK = 1.2
# A budget leaves one part in so many to copies on their way to the host and back.
UNDER_WAY = 12
# What may wait in host memory, by whether the feed-forward is gated: one product.
_PRODUCT = {True: ("mlp.gate", "mlp.up"), False: ("mlp.up",)}


@dataclass(frozen=True, slots=True)
class Choice:
    """An option of one layer: bits a token that it keeps, and what running again costs, counted in
    the multiplications of a matrix product."""

    bits: int
    work: int


@dataclass(frozen=True, slots=True)
class Option:
    """What is kept where some maps may run again.

    Attributes:
        bits: a token, by layer.
        again: operations that run again for it, cheap ones too, by layer.
    """

    kept: Kept
    bits: dict[int, int]
    again: dict[int, tuple[Op, ...]]

    def places(self, layer: int) -> frozenset[str]:
        """The maps of a layer (and "attention") that run again."""
        return frozenset(_place(op) for op in self.again.get(layer, ()) if not op.cheap)


class Budgets:
    """All options of one model and one set of bypasses."""

    def __init__(self, config: ModelConfig, graph: Graph, nodes: Sequence[Gradient]) -> None:
        self._config = config
        self.graph = graph
        self._nodes = nodes
        self._last = max(tensor.layer for tensor in graph.tensors.values()) + 1
        smallest = self._option([place for places in PLACES for place in places])
        ran = {place for layer in smallest.again for place in smallest.places(layer)}
        useful = [places for places in PLACES if ran.intersection(places)]
        found: dict[tuple[frozenset[str], frozenset[str]], Option] = {}
        for n in range(len(useful) + 1):
            for chosen in itertools.combinations(useful, n):
                option = self._option([place for places in chosen for place in places])
                found.setdefault((option.kept.tape, option.kept.cached), option)
        self.options = tuple(found.values())

    def _option(self, rerun: Sequence[str]) -> Option:
        graph = self.graph
        kept = choose_kept(graph, self._nodes, rebuild=True, compress=True, rerun=rerun)
        bits = dict.fromkeys(range(self._last + 1), 0)
        for key in kept.tape:
            bits[self._owner(key)] += graph.tensors[key].bits
        again: dict[int, list[Op]] = defaultdict(list)
        for op in running_again(graph, kept):
            again[op.layer].append(op)
        return Option(kept, bits, {layer: tuple(ops) for layer, ops in again.items()})

    @property
    def least_bits(self) -> int:
        """A token, of the smallest tape."""
        return sum(min(o.bits[layer] for o in self.options) for layer in range(self._last + 1))

    @property
    def most_bits(self) -> int:
        """A token, of the tape with which nothing runs again."""
        return sum(self.options[0].bits.values())

    def choices(self, length: int) -> list[list[Choice]]:
        """The prices of every option for a text of ``length`` tokens, by layer."""
        return [
            [
                Choice(
                    option.bits[layer],
                    sum(self._work(op, length) for op in option.again.get(layer, ())),
                )
                for option in self.options
            ]
            for layer in range(self._last + 1)
        ]

    def product(self, layer: int) -> frozenset[str]:
        """The tensors of a layer that may wait in host memory; none where a tape without
        arithmetic keeps none or only a part of them."""
        keys = frozenset(f"{layer}.{name}" for name in _PRODUCT[self._config.gated_mlp])
        return keys if keys <= self.options[0].kept.tape else frozenset()

    def hosted(self, *, length: int, max_bytes: int, room: HostRoom) -> frozenset[int]:
        """Layers whose product had better wait in host memory while a tape of ``length`` tokens has
        ``max_bytes`` on the device; none where nothing would run again anyway, or nothing fits."""
        budget = 8 * max_bytes // length
        if not self.least_bits <= budget < self.most_bits:
            return frozenset()
        spare = self._spare(budget)
        n = self._config.n_layers
        forward = [0] * n
        for op in self.graph.ops:  # without what the kernels fuse
            if op.layer >= 0 and not op.cheap:
                forward[op.layer] += self._work(op, length)
        lowest = min((self.graph.ops[node.op].layer for node in self._nodes), default=0)
        producers = self.graph.producers()
        costs = []
        for layer in range(n):
            keys = self.product(layer)
            makers = {id(producers[key]): producers[key] for key in keys}
            costs.append(
                LayerCost(
                    forward[layer],
                    forward[layer] * BACKWARD_WORK if layer >= lowest else 0.0,
                    sum(self._work(op, length) for op in makers.values()),
                    sum(self.graph.tensors[key].bits for key in keys),
                )
            )
        timeline = Timeline(
            costs,
            2 * self._config.vocab_size * self._config.d_model,
            room.products_a_byte / 8,
            # The tape of the layers below takes its share, those above are not there.
            [spare + (budget - spare) * (1 - (layer + 1) / n) for layer in range(n)],
        )
        found = choose_hosted(timeline, 8 * room.n_bytes // length)
        least = sum(min(own.values()) for own in self._bits(found))
        return found if least <= budget - spare else frozenset()

    def _spare(self, budget: int) -> int:
        """Bits a token that are left to copies under way."""
        return max(0, min(budget // UNDER_WAY, budget - self.least_bits))

    def _bits(self, hosted: Collection[int]) -> list[dict[int, int]]:
        """Bits a token that lie on the device by layer and option, of those that there are."""
        found = []
        for layer in range(self._last + 1):
            away = self.product(layer) if layer in hosted else frozenset()
            bits = sum(self.graph.tensors[key].bits for key in away)
            own = {
                i: option.bits[layer] - bits
                for i, option in enumerate(self.options)
                if away <= option.kept.tape
            }
            found.append(own)
        return found

    def within(
        self, *, length: int, max_bytes: int, hosted: Collection[int] = ()
    ) -> tuple[Kept, dict[int, frozenset[str]]]:
        """The fastest tape of ``length`` tokens that fits, and what runs again, by layer.

        Args:
            hosted: layers whose :meth:`product` is kept in host memory: its bytes do not count, but
                a part of the rest is left to copies under way.

        Raises:
            InvalidRequest: even the smallest does not fit.
        """
        bits = self._bits(hosted)
        choices = [
            [Choice(n, own[i].work) for i, n in there.items()]
            for own, there in zip(self.choices(length), bits, strict=True)
        ]
        budget = 8 * max_bytes // length
        picked = knapsack(choices, budget - self._spare(budget) if hosted else budget)
        if picked is None:
            least = -(-self.least_bits * length // 8)
            raise InvalidRequest(
                f"a text of {length} tokens must keep at least {least} bytes",
                field="tape_bytes",
                given=max_bytes,
                remedy="Allow more bytes, or train shorter texts",
            )
        chosen = [list(there)[at] for there, at in zip(bits, picked, strict=True)]
        tape, cached, read = set(), set(), set()
        for layer, at in enumerate(chosen):
            kept = self.options[at].kept
            tape |= self._mine(layer, kept.tape)
            cached |= self._mine(layer, kept.cached)
            read |= self._mine(layer, kept.read)
        again = {layer: self.options[at].places(layer) for layer, at in enumerate(chosen)}
        return Kept(frozenset(tape), frozenset(cached), frozenset(read)), again

    def bits_of(self, layer: int, kept: Kept) -> int:
        """A token, of what is kept for a layer."""
        return sum(self.graph.tensors[key].bits for key in self._mine(layer, kept.tape))

    def _mine(self, layer: int, keys: Iterable[str]) -> set[str]:
        return {key for key in keys if self._owner(key) == layer}

    def _owner(self, key: str) -> int:
        """The layer that reads a tensor: the stream after a layer belongs to the next one."""
        tensor = self.graph.tensors[key]
        if tensor.layer < 0:
            return 0 if tensor.name.startswith("embed") else self._last
        return tensor.layer + 1 if tensor.name.startswith("resid.post") else tensor.layer

    def _work(self, op: Op, length: int) -> int:
        """Multiplications a token, as many as a matrix product makes in the same time."""
        if op.cheap:
            moved = sum(self.graph.tensors[key].bits for key in (*op.inputs, *op.outputs))
            return PRODUCTS_A_BYTE * moved // 8
        if op.kind == "linear":
            return op.params[0].count
        config = self._config
        # A row sees half of the keys; there are two products.
        keys = min(length, config.layers[op.layer].window or length)
        return round(keys * config.n_heads * config.head_dim / ATTENTION_RATE)


def running_again(graph: Graph, kept: Kept) -> list[Op]:
    """The operations between what is kept and what gradients read."""
    producers = graph.producers()
    todo, seen = list(kept.read), set(kept.tape | kept.cached)
    found: dict[int, Op] = {}
    while todo:
        key = todo.pop()
        if key in seen:
            continue
        seen.add(key)
        op = producers[key]
        found[id(op)] = op
        todo.extend(op.inputs)
    return list(found.values())


def _place(op: Op) -> str:
    return "attention" if op.kind == "attention" else op.params[0].name.removesuffix(".weight")


def knapsack(choices: Sequence[Sequence[Choice]], budget: int) -> list[int] | None:
    """One choice of every entry with the least work whose bits are at most ``budget``.

    Of equally good ones the later entries keep more: they are the upper layers, which the backward
    lets go first. Above :data:`MOST_UNITS` different sums, bits are counted in units of as many,
    rounded up, so that the budget holds all the same.

    Returns:
        The chosen indices; None where nothing fits.
    """
    least = [min(choice.bits for choice in own) for own in choices]
    spare = budget - sum(least)
    if spare < 0:
        return None
    over = [[choice.bits - low for choice in own] for own, low in zip(choices, least, strict=True)]
    spare = min(spare, sum(max(own) for own in over))
    unit = max(math.gcd(*itertools.chain.from_iterable(over)), -(-spare // MOST_UNITS), 1)
    room = spare // unit
    best = np.zeros(room + 1, dtype=np.int64)  # least work of the entries so far, by units taken
    picks = []
    for own, beyond in zip(choices, over, strict=True):
        found = np.full(room + 1, np.iinfo(np.int64).max)
        pick = np.zeros(room + 1, dtype=np.int32)
        for i in sorted(range(len(own)), key=lambda i: -beyond[i]):
            taken = -(-beyond[i] // unit)
            if taken > room:
                continue
            work = best[: room + 1 - taken] + own[i].work
            better = work < found[taken:]
            found[taken:][better] = work[better]
            pick[taken:][better] = i
        best = found
        picks.append(pick)
    chosen = []
    for pick, beyond in zip(reversed(picks), reversed(over), strict=True):
        i = int(pick[room])
        chosen.append(i)
        room -= -(-beyond[i] // unit)
    return chosen[::-1]
