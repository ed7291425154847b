"""The backward graph of fine-tuning, pruned, and the cheapest tensors that serve it.

Graph pruning (FlexLLM, arXiv 2402.18789): derive the backward graph, delete the gradients of
frozen weights and then whatever nobody reads, find what the surviving gradients read of the
forward pass, keep the cheapest set from which all of that can be had. No torch in here.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from invivo.engine.min_cut import cheapest_kept
from invivo.engine.training_graph import RULES, Graph, Op, Roles


# --- the backward graph -------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Gradient:
    """A node of the backward graph: the gradient of one input or one parameter of one operation.

    Attributes:
        op: index of the operation in the graph.
        of: key of the tensor, or name of the parameter.
        is_param: which of the two.
        reads: alternatives of forward tensors; any one set suffices.
    """

    op: int
    of: str
    is_param: bool
    reads: tuple[frozenset[str], ...]


def differentiate(graph: Graph, *, train_all: bool = False) -> list[Gradient]:
    """The backward graph, pruned.

    Reverse differentiation gives a node for each input and parameter of each operation. Nodes of
    frozen parameters are deleted; then a gradient by an input survives only if some surviving
    node reads it, which is when something trained lies upstream of that input. What remains reads
    forward tensors by its rule.

    Args:
        train_all: treat every parameter as trained (what an unpruned tape must serve).
    """
    upstream: set[str] = set()  # tensors behind which something is trained
    for op in graph.ops:
        if any(p.trained or train_all for p in op.params) or upstream.intersection(op.inputs):
            upstream.update(op.outputs)
    nodes: list[Gradient] = []
    for index in reversed(range(len(graph.ops))):
        op = graph.ops[index]
        rule = RULES[op.kind]
        for i, key in enumerate(op.inputs):
            roles = rule.inputs[min(i, len(rule.inputs) - 1)]
            if roles is not None and key in upstream:
                nodes.append(Gradient(index, key, False, _resolve(op, roles)))
        for i, param in enumerate(op.params):
            if param.trained or train_all:
                roles = rule.params[min(i, len(rule.params) - 1)]
                nodes.append(Gradient(index, param.name, True, _resolve(op, roles)))
    return nodes


def _resolve(op: Op, roles: Roles) -> tuple[frozenset[str], ...]:
    """Roles as tensors of this operation."""

    def tensor(role: str) -> str:
        side = op.inputs if role.startswith("in") else op.outputs
        return side[int(role.removeprefix("in").removeprefix("out"))]

    return tuple(frozenset(tensor(role) for role in option) for option in roles)


# --- what to keep -------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Kept:
    """A set of tensors that serves every surviving gradient.

    Attributes:
        tape: tensors kept, without those that the key-value cache holds anyway.
        cached: tensors read from that cache.
        read: all tensors that gradients read, kept or rebuilt, by the alternatives chosen.
    """

    tape: frozenset[str]
    cached: frozenset[str]
    read: frozenset[str]


def choose_kept(
    graph: Graph,
    nodes: Iterable[Gradient],
    *,
    rebuild: bool,
    compress: bool,
    rerun: Sequence[str] = (),
    cache: bool = True,
) -> Kept:
    """The cheapest tensors that suffice.

    The problem falls apart into pieces that share neither a cheap operation nor a choice between
    alternatives (a layer has one to three); each is solved exactly, and layers of the same
    structure only once.

    Args:
        rebuild: let cheap operations make tensors again.
        compress: let one bit an element stand where a gradient reads no more.
        rerun: frozen linear maps (or "attention") that may run again, as if they were cheap.
        cache: keys and values in the engine's cache cost nothing.
    """
    wants = {node.reads for node in nodes}
    if not compress:
        wants = {
            tuple(o for o in options if not any(graph.tensors[t].dtype == "bit" for t in o))
            for options in wants
        }
    wants.discard((frozenset(),))
    pieces = Pieces()
    for options in wants:
        pieces.join(t for option in options for t in option)
    made_from: dict[str, tuple[str, ...] | None] = dict.fromkeys(graph.tensors)
    if rebuild:
        for op in graph.ops:
            if op.cheap or _runs_again(op, rerun):
                for out in op.outputs:
                    made_from[out] = op.inputs
                    pieces.join((out, *op.inputs))
    by_piece: dict[str, list[tuple[frozenset[str], ...]]] = defaultdict(list)
    for options in wants:
        members = [t for option in options for t in option]
        if members:
            by_piece[pieces.find(members[0])].append(options)
    in_piece: dict[str, list[str]] = defaultdict(list)
    for key in graph.tensors:
        in_piece[pieces.find(key)].append(key)

    tape: set[str] = set()
    cached: set[str] = set()
    read: set[str] = set()
    solved: dict[object, tuple[list[int], list[int]]] = {}
    for root, asked in by_piece.items():
        keys = in_piece[root]
        place = {key: i for i, key in enumerate(keys)}
        cost = {k: 0 if cache and graph.tensors[k].cached else graph.tensors[k].bits for k in keys}
        numbered = sorted(
            tuple(tuple(sorted(place[t] for t in option)) for option in options)
            for options in asked
        )
        origins = tuple(
            None if (o := made_from[k]) is None else tuple(place[t] for t in o) for k in keys
        )
        signature = (tuple(cost.values()), origins, tuple(numbered))
        if signature not in solved:
            names = {k: made_from[k] for k in keys}
            keep, used = _solve_piece(asked, names, cost)
            solved[signature] = ([place[t] for t in keep], [place[t] for t in used])
        keep_at, used_at = solved[signature]
        for i in keep_at:
            at_hand = cache and graph.tensors[keys[i]].cached
            (cached if at_hand else tape).add(keys[i])
        read.update(keys[i] for i in used_at)
    return Kept(frozenset(tape), frozenset(cached), frozenset(read))


def _solve_piece(
    asked: list[tuple[frozenset[str], ...]],
    made_from: dict[str, tuple[str, ...] | None],
    cost: dict[str, int],
) -> tuple[frozenset[str], frozenset[str]]:
    """What to keep and what is read, over all combinations of alternatives."""
    always = frozenset().union(*(options[0] for options in asked if len(options) == 1))
    open_choices = [o for o in asked if not any(option <= always for option in o)]
    best: tuple[int, int, frozenset[str], frozenset[str]] | None = None
    for combination in itertools.product(*sorted(open_choices, key=_spelled)):
        needed = always.union(*combination)
        kept = cheapest_kept(sorted(needed), made_from, cost)
        price = sum(cost[k] for k in kept)
        # Of equally cheap choices the one that reads least.
        weight = sum(cost[k] for k in needed)
        if best is None or (price, weight) < best[:2]:
            best = (price, weight, kept, needed)
    assert best is not None
    return best[2], best[3]


def _runs_again(op: Op, places: Sequence[str]) -> bool:
    if op.kind == "attention":
        return "attention" in places
    return op.kind == "linear" and op.params[0].name.removesuffix(".weight") in places


def _spelled(options: tuple[frozenset[str], ...]) -> list[list[str]]:
    return sorted(sorted(option) for option in options)


class Pieces:
    """Union of tensors that must be decided together."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def find(self, key: str) -> str:
        root = key
        while (up := self._parent.setdefault(root, root)) != root:
            root = up
        while self._parent[key] != root:
            self._parent[key], key = root, self._parent[key]
        return root

    def join(self, keys: Iterable[str]) -> None:
        first: str | None = None
        for key in keys:
            root = self.find(key)
            if first is None:
                first = root
            else:
                self._parent[root] = first
