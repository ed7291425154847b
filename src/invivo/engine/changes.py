"""What a run changes, block by block: the part of a block's prefix key that its program gives.

The keys, values and states of a block depend on what is done at its own tokens and at those before
it. Its key therefore names what meets its own tokens, and hangs on the keys of the blocks before
it: programs that begin alike share as far as they act alike, and a block that nothing has met yet
is that of a plain request. Everything is named by content: tensors by their hash, values of other
runs by what those runs are made from (adapter, tokens, their own changes) as far as it is read.
"""

from __future__ import annotations

import hashlib
import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from invivo.edits.apply import Context
from invivo.edits.blobs import content_hash
from invivo.edits.resolved import RunPlan, SourceRef, Touch
from invivo.edits.selectors import Positions
from invivo.edits.site_names import SiteRef
from invivo.edits.values import Blob, Param
from invivo.models.config import ModelConfig

# Sites of a layer that come behind its own keys, values and states.
_BEHIND_KEYS = frozenset(
    {
        *("attn.head.q", "attn.head.q.rot", "attn.head.score", "attn.head.prob"),
        *("attn.head.z", "attn.head.out", "attn.edge", "attn.proj", "attn.out", "post1.scale"),
        *("gla.head.q", "gla.head.z", "gla.edge"),
        *("resid.mid", "resid.post", "norm2.scale", "post2.scale"),
        *("mlp", "mlp.in", "mlp.gate", "mlp.up", "mlp.neuron", "mlp.proj", "mlp.out"),
        *("moe.router", "moe.expert.weight", "moe.expert.on", "moe.expert.out", "moe.shared.out"),
    }
)

# A key of all that a run's values before a token are made from: (name of the run, that token).
PrefixOf = Callable[[str, int], str]


def reaches_cache(ref: SiteRef, config: ModelConfig) -> bool:
    """Whether what is done at ``ref`` can change a key, a value or a state of any layer."""
    if ref.layer < 0:
        return ref.site == "embed.out"
    return ref.layer < config.n_layers - 1 or ref.site not in _BEHIND_KEYS


class Changes:
    """The changes of one run.

    Args:
        touches: those of ``plan`` that count.
        prefix_of: where they read other runs.

    Attributes:
        first: the first token at which anything is changed; None: nowhere.
    """

    def __init__(
        self,
        plan: RunPlan,
        touches: Iterable[Touch],
        context: Context,
        prefix_of: PrefixOf,
        block_size: int,
    ) -> None:
        self._input = plan.input
        self._prefix_of = prefix_of
        self._size = block_size
        self._groups = [
            _group_of(list(members), plan.name, context)
            for _, members in itertools.groupby(
                sorted((t for t in touches if t.positions.ranges), key=lambda t: t.step),
                key=lambda t: t.step,
            )
        ]
        self._hidden = [(_Places(q), _Places(k)) for q, k in plan.input.hidden]
        firsts = [group.at.first for group in self._groups]
        firsts += [queries.first for queries, _ in self._hidden]
        firsts += [i for i, number in enumerate(plan.input.numbers) if i != number][:1]
        self.first: int | None = min(firsts, default=None)
        self._marks: dict[int, str | None] = {}
        self._hashes: dict[tuple[object, ...], str] = {}

    def at(self, block: int) -> str | None:
        """The key of what is done at the tokens of a block; None: nothing."""
        start = block * self._size
        if self.first is None or start + self._size <= self.first:
            return None
        if block not in self._marks:
            found = self.between(start, start + self._size)
            if found and found not in self._hashes:
                self._hashes[found] = hash_of(found)
            self._marks[block] = self._hashes[found] if found else None
        return self._marks[block]

    def between(self, start: int, stop: int) -> tuple[object, ...]:
        """What is done at the tokens from ``start`` to before ``stop``, as plain data; () if
        nothing is. Positions count from ``start``, so that many blocks look alike."""
        found: list[object] = []
        for group in self._groups:
            ranges = group.at.between(start, stop)
            if ranges and not group.is_idle(stop):
                found.append((group.content, ranges, *self._more(group, start, stop)))
        for queries, keys in self._hidden:
            ranges, seen = queries.between(start, stop), keys.between(0, stop)
            if ranges and seen:
                found.append(("hidden", ranges, seen))
        if self._input.numbers:
            numbers = tuple(self._input.number_of(i) for i in range(start, stop))
            if numbers != tuple(range(start, stop)):
                found.append(("numbers", numbers))
        return tuple(found)

    def _more(self, group: _Group, start: int, stop: int) -> Iterable[object]:
        """What else of a group depends on where it acts."""
        if group.keys is not None:
            yield group.keys.between(0, stop)
        for source in group.sources:
            first, last = group.at.before(start), group.at.before(stop)
            read = source.positions if source.pooled else source.positions[first:last]
            assert source.run is not None
            yield read
            if source.run != group.run:  # its own are in the keys of the blocks before
                yield self._prefix_of(source.run, max(read) + 1)


def hash_of(content: object) -> str:
    """One hash of plain data."""
    return hashlib.sha256(repr(content).encode()).hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """The touches of one step, which share positions, keys and, but for the layer, sources.

    Attributes:
        only: of edges, whether queries see the keys alone, or all but them.
        content: all of it but places, as a hash. Which row of a tensor a position gets follows
            from the positions before it, which are in the keys of the blocks before.
    """

    run: str
    content: str
    at: _Places
    keys: _Places | None
    sources: tuple[SourceRef, ...]
    only: bool

    def is_idle(self, stop: int) -> bool:
        """Whether the keys that it takes away are all behind ``stop``."""
        return self.keys is not None and not self.only and self.keys.first >= stop


class _Places:
    """Positions in which many can be looked up."""

    def __init__(self, positions: Positions) -> None:
        self._starts = [start for start, _ in positions.ranges]
        self._stops = [stop for _, stop in positions.ranges]
        counts = (stop - start for start, stop in positions.ranges)
        self._counts = [0, *itertools.accumulate(counts)]

    @property
    def first(self) -> int:
        return self._starts[0]

    def between(self, start: int, stop: int) -> tuple[tuple[int, int], ...]:
        """The ranges inside [start, stop), counted from ``start``."""
        first, last = bisect_right(self._stops, start), bisect_left(self._starts, stop)
        return tuple(
            (max(self._starts[i], start) - start, min(self._stops[i], stop) - start)
            for i in range(first, last)
        )

    def before(self, index: int) -> int:
        """How many are before ``index``."""
        i = bisect_left(self._starts, index)
        return self._counts[i] - (max(0, self._stops[i - 1] - index) if i else 0)


def _group_of(touches: Sequence[Touch], run: str, context: Context) -> _Group:
    first = touches[0]
    content: list[object] = []
    for touch in touches:
        args = [(name, _content(value, context)) for name, value in sorted(touch.args.items())]
        sources = [
            (source.ref, source.pooled, source.run == run)
            if source.blob is None
            else _content(Blob(source.blob), context)
            for source in touch.sources
        ]
        content.append((touch.ref, touch.do, touch.kernel, args, sources))
    return _Group(
        run,
        hash_of(content),
        _Places(first.positions),
        None if first.keys is None else _Places(first.keys),
        tuple(source for source in first.sources if source.run is not None),
        first.do == "edge_only",
    )


def _content(value: object, context: Context) -> object:
    """An argument by its content."""
    if isinstance(value, Blob):
        return context.blobs.hash_of(value.name)
    return content_hash(context.params[value.name]) if isinstance(value, Param) else value
