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
from dataclasses import dataclass, field

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

_FAR = 1 << 40  # longer than any text

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
        self._context = context
        self._groups = _groups(touches, plan.name)
        self._hidden = [(_Places(q), _Places(k)) for q, k in plan.input.hidden]
        firsts = [group.at.first for group in self._groups]
        firsts += [queries.first for queries, _ in self._hidden]
        firsts += [i for i, number in enumerate(plan.input.numbers) if i != number][:1]
        self.first: int | None = min(firsts, default=None)
        self._alike = _Alike(0, 0, None)
        self._marks: dict[int, str | None] = {}
        self._hashes: dict[tuple[object, ...], str] = {}

    def at(self, block: int) -> str | None:
        """The key of what is done at the tokens of a block; None: nothing."""
        start = block * self._size
        if self.first is None or start + self._size <= self.first:
            return None
        alike = self._alike
        if alike.start <= start and start + self._size <= alike.stop:
            return alike.mark
        if block not in self._marks:
            found = self.between(start, start + self._size)
            if found and found not in self._hashes:
                self._hashes[found] = hash_of(found)
            self._marks[block] = self._hashes[found] if found else None
            self._alike = self._alike_from(start, self._marks[block])
        return self._marks[block]

    def _alike_from(self, start: int, mark: str | None) -> _Alike:
        """The tokens from ``start`` on whose blocks all have the mark of the first."""
        stop = start
        if not self._hidden and not self._input.numbers:
            stop = min((group.same_until(start) for group in self._groups), default=start)
        return _Alike(start, stop, mark)

    def between(self, start: int, stop: int) -> tuple[object, ...]:
        """What is done at the tokens from ``start`` to before ``stop``, as plain data; () if
        nothing is. Positions count from ``start``, so that many blocks look alike."""
        found: list[object] = []
        for group in self._groups:
            ranges = group.at.between(start, stop)
            if ranges and not group.is_idle(stop):
                places = (ranges, *self._more(group, start, stop))
                found += [(content, places) for content in group.contents(self._context)]
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


@dataclass(frozen=True, slots=True)
class _Alike:
    """Tokens [start, stop) at which the same is done: every block inside has this mark."""

    start: int
    stop: int
    mark: str | None


@dataclass(slots=True, eq=False)
class _Group:
    """Steps that follow each other and share positions: several that only act there, or one.

    Attributes:
        steps: the touches of each; those of one step share everything but the site they name.
    """

    run: str
    steps: list[list[Touch]]
    at: _Places
    keys: _Places | None
    sources: tuple[SourceRef, ...]
    _contents: list[str] = field(default_factory=list)

    def joins(self, touches: Sequence[Touch]) -> bool:
        """Whether the next step acts at the same positions, and neither has more places."""
        last, new = self.steps[-1][0], touches[0]
        more = self.keys is not None or self.sources or new.keys is not None or new.sources
        return not more and last.positions == new.positions

    def same_until(self, start: int) -> int:
        """The token until which it acts at all from ``start`` on, or at none, in the same way."""
        if self.keys is not None or self.sources:
            return start
        return self.at.same_until(start)

    def is_idle(self, stop: int) -> bool:
        """Whether the keys that it takes away are all behind ``stop``."""
        only = self.steps[0][0].do == "edge_only"
        return self.keys is not None and not only and self.keys.first >= stop

    def contents(self, context: Context) -> list[str]:
        """A hash of each step without its places. Which row of a tensor a position gets follows
        from the positions before it, which are in the keys of the blocks before."""
        if not self._contents:
            self._contents = [_content_of(touches, self.run, context) for touches in self.steps]
        return self._contents


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

    def same_until(self, start: int) -> int:
        """The position until which all from ``start`` on are among these, or none is."""
        i = bisect_right(self._stops, start)
        if i == len(self._starts):
            return _FAR
        return self._stops[i] if self._starts[i] <= start else self._starts[i]

    def before(self, index: int) -> int:
        """How many are before ``index``."""
        i = bisect_left(self._starts, index)
        return self._counts[i] - (max(0, self._stops[i - 1] - index) if i else 0)


def _groups(touches: Iterable[Touch], run: str) -> list[_Group]:
    """In the order of the steps, which is that of operations at one site."""
    ordered = sorted((t for t in touches if t.positions.ranges), key=lambda t: t.step)
    groups: list[_Group] = []
    for _, members in itertools.groupby(ordered, key=lambda t: t.step):
        step = list(members)
        if groups and groups[-1].joins(step):
            groups[-1].steps.append(step)
            continue
        first = step[0]
        keys = None if first.keys is None else _Places(first.keys)
        sources = tuple(source for source in first.sources if source.run is not None)
        groups.append(_Group(run, [step], _Places(first.positions), keys, sources))
    return groups


def _content_of(touches: Sequence[Touch], run: str, context: Context) -> str:
    """A hash of one step's touches without their places."""
    first = touches[0]
    args = [(name, _content(value, context)) for name, value in sorted(first.args.items())]
    refs = [(_named(t.ref), *(_source(s, run, context) for s in t.sources)) for t in touches]
    return hash_of((first.do, first.kernel, args, refs))


def _source(source: SourceRef, run: str, context: Context) -> object:
    if source.ref is None:
        assert source.blob is not None
        return _content(Blob(source.blob), context)
    return _named(source.ref), source.pooled, source.run == run


def _named(ref: SiteRef) -> tuple[object, ...]:
    return ref.site, ref.layer, ref.heads, ref.components, ref.expanded


def _content(value: object, context: Context) -> object:
    """An argument by its content."""
    if isinstance(value, Blob):
        return context.blobs.hash_of(value.name)
    return content_hash(context.params[value.name]) if isinstance(value, Param) else value
