"""Placing a bypass on a sharded model: dependent parallelisation (FlexLLM, arXiv 2402.18789).

The backbone's placement is fixed. A bypass must take its input in the state in which the backbone
has it and deliver its output in the state that the backbone gives that tensor. This module
enumerates every consistent way, drops those that only waste work, prices the rest and ranks
them. Pure functions, no torch.

A tensor [tokens, features] over a one-dimensional mesh is in one of these states, written by its
dimensions:

    [-, -]  whole, on one device        [|, -]  tokens partitioned
    [=, =]  replicated                  [-, |]  features partitioned
                                        [+, +]  partial sums that await their reduction
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from invivo.errors import InvalidRequest


class State(Enum):
    """How a tensor lies over the mesh."""

    WHOLE = "[-, -]"
    REPLICATED = "[=, =]"
    TOKENS = "[|, -]"
    FEATURES = "[-, |]"
    PARTIAL = "[+, +]"


class Weight(Enum):
    """How a matrix [d_in, d_out] (or a vector over the features) lies over the mesh."""

    WHOLE = "[-, -]"
    REPLICATED = "[=, =]"
    ROWS = "[|, -]"  # d_in partitioned
    COLUMNS = "[-, |]"  # d_out partitioned


Transfer = Literal[
    "partition", "replicate", "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "place"
]


# --- what is placed, where ------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Linear:
    """A matrix of a bypass; ``split_in`` and ``split_out`` allow its sides to be partitioned.

    The rank of a bypass is not: a share of it would be narrower than a kernel's tile.
    """

    name: str
    d_in: int
    d_out: int
    split_in: bool = True
    split_out: bool = True


@dataclass(frozen=True, slots=True)
class Pointwise:
    """Element by element: an activation, or (``linear``) a product with a vector over features."""

    name: str
    width: int
    linear: bool
    split: bool = True


Stage = Linear | Pointwise


def lora_stages(d_in: int, d_out: int, rank: int) -> tuple[Stage, ...]:
    """``(X A) B``."""
    return (
        Linear("A", d_in, rank, split_out=False),
        Linear("B", rank, d_out, split_in=False),
    )


def adapter_stages(d: int, width: int) -> tuple[Stage, ...]:
    """``act(X D) U``."""
    return (
        Linear("D", d, width, split_out=False),
        Pointwise("act", width, linear=False, split=False),
        Linear("U", width, d, split_in=False),
    )


def ia3_stages(d: int) -> tuple[Stage, ...]:
    """``X * (l - 1)``."""
    return (Pointwise("l", d, linear=True),)


@dataclass(frozen=True, slots=True)
class Backbone:
    """What the backbone fixes: states of the bypass's input and output, and how many tokens.

    A column-parallel linear has x replicated and y partitioned on features; a row-parallel one x
    partitioned on features and y partial, before its all-reduce.
    """

    x: State
    y: State
    tokens: int
    element_bytes: int = 2


@dataclass(frozen=True, slots=True)
class Mesh:
    """Devices in a row, and their speeds.

    Attributes:
        flops: a second, of one device. memory: bytes a second, of one device.
        link: bytes a second that one device sends to the others.
        link_latency: seconds of one collective, however small. launch: seconds of one kernel.
    """

    devices: int
    flops: float = 790e12
    memory: float = 4.3e12
    link: float = 400e9
    link_latency: float = 15e-6
    launch: float = 2e-6


# --- what may happen ------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Step:
    """One step of a candidate.

    Attributes:
        what: name of a stage, or the transfer between two.
        tensor: for a transfer: what is moved ("X", "Y" or the output of a stage).
        weight: for a stage: how its weight lies.
        state: of the result.
        bytes: that each device sends (transfers only).
        seconds: what the step costs on the slowest device.
    """

    what: str
    state: State
    tensor: str = ""
    weight: Weight | None = None
    bytes: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """One consistent placement.

    Attributes:
        flops: multiply-adds times two, of the busiest device.
        weight_bytes: of the bypass's weights on one device.
        sent_bytes: that each device sends.
    """

    steps: tuple[Step, ...]
    flops: float
    weight_bytes: float

    @property
    def seconds(self) -> float:
        return sum(step.seconds for step in self.steps)

    @property
    def sent_bytes(self) -> float:
        return sum(step.bytes for step in self.steps)

    @property
    def transfers(self) -> tuple[tuple[str, str], ...]:
        """(transfer, tensor) of every step that sends something."""
        return tuple((step.what, step.tensor) for step in self.steps if step.bytes > 0)

    @property
    def weights(self) -> dict[str, Weight]:
        return {step.what: step.weight for step in self.steps if step.weight is not None}

    def __str__(self) -> str:
        words = []
        for step in self.steps:
            if step.weight is not None:
                words.append(f"{step.what}{step.weight.value} -> {step.state.value}")
            else:
                words.append(f"{step.what} {step.tensor} -> {step.state.value}")
        return "; ".join(words) or "nothing to do"


# (from, to): the transfer, and what each of n devices sends as a share of the whole tensor.
# A partial sum is a tensor of full size on every device; "place" adds a share into the part of a
# partial sum that it belongs to, where the other devices add nothing: no bytes move.
_TRANSFERS: dict[tuple[State, State], Transfer] = {
    (State.WHOLE, State.REPLICATED): "replicate",
    (State.WHOLE, State.TOKENS): "partition",
    (State.WHOLE, State.FEATURES): "partition",
    (State.REPLICATED, State.TOKENS): "partition",
    (State.REPLICATED, State.FEATURES): "partition",
    (State.TOKENS, State.REPLICATED): "all-gather",
    (State.FEATURES, State.REPLICATED): "all-gather",
    (State.TOKENS, State.FEATURES): "all-to-all",
    (State.FEATURES, State.TOKENS): "all-to-all",
    (State.PARTIAL, State.REPLICATED): "all-reduce",
    (State.PARTIAL, State.TOKENS): "reduce-scatter",
    (State.PARTIAL, State.FEATURES): "reduce-scatter",
    (State.TOKENS, State.PARTIAL): "place",
    (State.FEATURES, State.PARTIAL): "place",
}


def sent_share(transfer: Transfer, start: State, devices: int) -> float:
    """What each device sends, as a share of the whole tensor, by ring algorithms."""
    n = devices
    return {
        "partition": (n - 1) / n if start is State.WHOLE else 0.0,
        "replicate": 1.0,
        "all-gather": (n - 1) / n,
        "all-reduce": 2 * (n - 1) / n,
        "reduce-scatter": (n - 1) / n,
        "all-to-all": (n - 1) / n**2,
        "place": 0.0,
    }[transfer]


def transitions(stage: Stage, x: State, *, deferred: bool) -> Iterator[tuple[Weight, State]]:
    """How a stage may take an input in state ``x``: the state of its weight and of its output.

    Args:
        deferred: whether partial sums may pass through unreduced, which linear stages allow. It
            pays only where the backbone will reduce them: it moves a reduction from the narrow
            tensor to the wide one.
    """
    if x is State.WHOLE:
        yield Weight.WHOLE, State.WHOLE
    elif isinstance(stage, Pointwise):
        if x is not State.PARTIAL:
            yield (Weight.COLUMNS if x is State.FEATURES else Weight.REPLICATED), x
        elif stage.linear and deferred:
            yield Weight.REPLICATED, x
    elif x is State.REPLICATED:
        yield Weight.REPLICATED, State.REPLICATED
        if stage.split_out:
            yield Weight.COLUMNS, State.FEATURES
    elif x is State.TOKENS:
        yield Weight.REPLICATED, State.TOKENS
    elif x is State.FEATURES:
        if stage.split_in:
            yield Weight.ROWS, State.PARTIAL
    elif deferred:
        yield Weight.REPLICATED, State.PARTIAL


# --- the search -----------------------------------------------------------------------------------
def plan_parallel(bypass: Sequence[Stage], backbone: Backbone, mesh: Mesh) -> tuple[Candidate, ...]:
    """All placements worth considering, the cheapest first.

    Raises:
        InvalidRequest: no devices or tokens, states that do not fit the mesh, no consistent
            placement.
    """
    for name, value in (("mesh.devices", mesh.devices), ("backbone.tokens", backbone.tokens)):
        if value < 1:
            raise InvalidRequest("must be at least 1", field=name, given=value)
    if mesh.devices == 1:
        backbone = Backbone(State.WHOLE, State.WHOLE, backbone.tokens, backbone.element_bytes)
    elif backbone.y is State.WHOLE:
        raise InvalidRequest(
            "a bypass over several devices cannot deliver to one alone",
            field="backbone.y",
            given=backbone.y.value,
            remedy="Give the state in which the backbone has this tensor",
        )
    search = _Search(tuple(bypass), backbone, mesh)
    found = [search.priced(path) for path in search.paths(backbone.x, 0)]
    kept = [c for c in found if not any(_wasteful(c, other) for other in found)]
    if not kept:
        raise InvalidRequest(
            "no consistent placement",
            field="backbone",
            given=f"{backbone.x.value} -> {backbone.y.value}",
        )
    return tuple(sorted(kept, key=lambda c: (c.seconds, len(c.steps), str(c))))


def _wasteful(one: Candidate, other: Candidate) -> bool:
    """Whether ``other`` does the same with less: transfers among those of ``one``, fewer flops.

    Where these are equal, less weight to read and then fewer steps decide.
    """
    mine, its = list(one.transfers), list(other.transfers)
    for transfer in its:
        if transfer not in mine:
            return False
        mine.remove(transfer)
    if other.flops > one.flops:
        return False
    if other.flops < one.flops or mine:
        return True
    return (other.weight_bytes, len(other.steps)) < (one.weight_bytes, len(one.steps))


_Move = tuple[Transfer, str, State, State, int]  # transfer, tensor, from, to, width
_Run = tuple[Stage, Weight, State]  # stage, its weight, the result's state
_Path = tuple[_Move | _Run, ...]


@dataclass(frozen=True, slots=True)
class _Search:
    bypass: tuple[Stage, ...]
    backbone: Backbone
    mesh: Mesh

    def paths(self, state: State, at: int) -> Iterator[_Path]:
        """Every way from stage ``at`` on, with at most one transfer before each stage."""
        for move, here in self._moves(state, at):
            if at == len(self.bypass):
                if here is self.backbone.y:
                    yield move
                continue
            stage = self.bypass[at]
            deferred = self.backbone.y is State.PARTIAL
            for weight, result in transitions(stage, here, deferred=deferred):
                for rest in self.paths(result, at + 1):
                    yield (*move, (stage, weight, result), *rest)

    def _moves(self, state: State, at: int) -> Iterator[tuple[_Path, State]]:
        """Staying, or one transfer; the rank is never partitioned."""
        yield (), state
        first, last = at == 0, at == len(self.bypass)
        name = "X" if first else "Y" if last else self.bypass[at - 1].name + "'"
        width = self._width_before(at)
        wide = first or last or self._splittable(at)
        for (start, goal), transfer in _TRANSFERS.items():
            if start is not state or (goal is State.FEATURES and not wide):
                continue
            if goal is State.PARTIAL and not last:
                continue
            yield ((transfer, name, start, goal, width),), goal

    def _width_before(self, at: int) -> int:
        if at == len(self.bypass):
            last = self.bypass[-1]
            return last.d_out if isinstance(last, Linear) else last.width
        stage = self.bypass[at]
        return stage.d_in if isinstance(stage, Linear) else stage.width

    def _splittable(self, at: int) -> bool:
        stage = self.bypass[at]
        return stage.split_in if isinstance(stage, Linear) else stage.split

    def priced(self, path: _Path) -> Candidate:
        steps: list[Step] = []
        flops = weight_bytes = 0.0
        state = self.backbone.x
        for item in path:
            if len(item) == 5:
                steps.append(self._price_move(item))
                state = item[3]
            else:
                step, work, weight = self._price_run(item, state)
                steps.append(step)
                flops += work
                weight_bytes += weight
                state = item[2]
        return Candidate(tuple(steps), flops, weight_bytes)

    def _price_move(self, move: _Move) -> Step:
        transfer, tensor, start, goal, width = move
        size = self.backbone.tokens * width * self.backbone.element_bytes
        sent = size * sent_share(transfer, start, self.mesh.devices)
        seconds = sent / self.mesh.link + self.mesh.link_latency if sent else 0.0
        return Step(transfer, goal, tensor, None, sent, seconds)

    def _price_run(self, run: _Run, x: State) -> tuple[Step, float, float]:
        stage, weight, result = run
        mesh, backbone = self.mesh, self.backbone
        rows = backbone.tokens / (mesh.devices if x is State.TOKENS else 1)
        if isinstance(stage, Linear):
            d_in = stage.d_in / (mesh.devices if weight is Weight.ROWS else 1)
            d_out = stage.d_out / (mesh.devices if weight is Weight.COLUMNS else 1)
            flops, numbers = 2 * rows * d_in * d_out, d_in * d_out
        else:
            d_in = d_out = stage.width / (mesh.devices if x is State.FEATURES else 1)
            flops, numbers = rows * d_in, d_in if stage.linear else 0.0
        moved = (rows * (d_in + d_out) + numbers) * backbone.element_bytes
        seconds = max(flops / mesh.flops, moved / mesh.memory) + mesh.launch
        step = Step(stage.name, result, "", weight, 0.0, seconds)
        return step, flops, numbers * backbone.element_bytes
