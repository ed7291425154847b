"""The state of one request's program: which of its runs are next, done, kept; what they give back.

Every run of every row is a sequence of its own. Runs that others read are done first; runs that
are the same in all rows of a sweep are done once. A sweep is fed to the scheduler by a window.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from invivo.edits.apply import Context
from invivo.edits.measures import measure_rows
from invivo.edits.number_range import check_numbers
from invivo.edits.parameters import parameter_values
from invivo.edits.program import MAIN
from invivo.edits.reduce import reduce_capture
from invivo.edits.resolved import CaptureRef, MeasureRef, RunPlan, Touch
from invivo.edits.results import Captured, Measured, ProgramOutput, RowOutput
from invivo.edits.site_names import SiteRef
from invivo.edits.value_shapes import touched_shape
from invivo.engine.changes import Changes, hash_of, reaches_cache
from invivo.engine.fan_out import Trunk, deepest_layer, find_trunk
from invivo.engine.kept_rows import KeptRows, Part, Shrink, fit_keys
from invivo.engine.run_edits import OPEN_SITES, RunEdits, source_positions
from invivo.engine.types import HeldBlocks, Intervention, Onset, Sequence
from invivo.errors import TooLarge
from invivo.models.config import ModelConfig
from invivo.models.decoder import Decoder
from invivo.models.rope import long_text_offset

_LENS_BYTES = 64 << 20  # logits of a lens are computed in pieces of at most this size
_LOGITS = SiteRef("logits", -1)

# Number of the row, None: the same in all rows, _TRUNK: what varying ones share; name of the run.
RunKey = tuple[int | None, str]
_TRUNK = -1


@dataclass(slots=True, eq=False)
class ProgramRun:
    """One run on its way.

    Attributes:
        kept: by what wants it.
        onset: where it goes on from the trunk of its sweep.
        n_layers: how many layers have to be computed for what is kept; None: all.
        is_trunk: others go on from its memory, in which only what all of them edit is edited.
    """

    key: RunKey
    plan: RunPlan
    edits: RunEdits
    kept: dict[object, KeptRows]
    onset: Onset | None = None
    n_layers: int | None = None
    is_trunk: bool = False

    @property
    def is_main(self) -> bool:
        return self.key[1] == MAIN


class CarriedProgram:
    """The program of one request.

    Made in the caller's thread, then used by the engine's alone.

    Args:
        writes: the run "main" is the request's own text, and comes last.
        block_size: of the cache.
        adapter: the request's own.
        versions: of the adapters that its runs use, by name.
        fan_out: rows of a sweep share what lies before their first change.

    Raises:
        InvalidRequest: a number in it is beyond what the model's can be.
        TooLarge: its captures, or what its runs read of each other, take more than ``max_bytes``.
    """

    def __init__(
        self,
        intervention: Intervention,
        decoder: Decoder,
        *,
        writes: bool,
        max_bytes: int,
        block_size: int,
        adapter: str | None = None,
        versions: Mapping[str, int],
        fan_out: bool = True,
    ) -> None:
        resolved = intervention.resolved
        check_numbers(resolved, decoder.embed.dtype)
        self.writes = writes
        self._partial = fan_out and not decoder.config.recurrent
        self._decoder = decoder
        self._varying = resolved.varying
        self._rows = resolved.rows
        self._adapter = adapter
        self._versions = versions
        self._block_size = block_size
        self._common = {name: self._common_steps(name) for name in resolved.varying}
        self._read: dict[str, Changes] = {}  # what is changed in runs that others read
        self._prefixes: dict[tuple[str, int], str] = {}
        self._context = Context(
            dtype=decoder.embed.dtype,
            device=decoder.embed.device,
            blobs=intervention.blobs,
            params=parameter_values(
                resolved, intervention.blobs, decoder.embed, intervention.params
            ),
        )
        if resolved.n_bytes > max_bytes:
            raise TooLarge(
                f"captures of one request take at most {max_bytes} bytes",
                field="interventions.out",
                given=resolved.n_bytes,
            )
        self._wanted: dict[str, dict[object, KeptRows]] = {}  # of the runs that do not vary
        self._plans: dict[str, RunPlan] = {}
        self._missing: list[int] = []
        self._waiting: dict[RunKey, list[int]] = {}  # the rows that a run is needed for
        self._left: dict[RunKey, int] = {}  # how many of them have not come back
        self._compared = self._compared_rows()
        self._pending: deque[RunKey] = deque()
        self._trunks: dict[str, Trunk] = {}  # by name of the runs that vary
        self._memory: dict[str, HeldBlocks] = {}
        left = max_bytes - self._check_kept(max_bytes, decoder.config)
        if self._partial and not writes and len(self._rows) > 1:
            self._find_trunks(left)
        self._queue_runs()
        self.live: dict[Sequence, ProgramRun] = {}
        self.started = False
        self._done: dict[RunKey, ProgramRun] = {}
        self._outputs: dict[int, RowOutput] = {}

    @property
    def complete(self) -> bool:
        """Whether every row has come back."""
        return len(self._outputs) == len(self._rows)

    def plans(self) -> Iterator[RunPlan]:
        """All plans, each once."""
        yield from self._plans.values()
        yield from (trunk.plan for trunk in self._trunks.values())
        for row in self._rows:
            yield from (plan for name, plan in row.runs.items() if name in self._varying)

    def share(self, run: ProgramRun, seq: Sequence) -> None:
        """Say which of the keys of ``seq``, which carries ``run``, others may find, and as what.

        Of rows of a sweep, what they alone change is found by nobody: it would fill the cache.
        """
        plan, config = run.plan, self._decoder.config
        touches = [t for t in plan.touches if reaches_cache(t.ref, config)]
        changes = self._changes(plan, touches)
        seq.shareable = changes.first
        seq.changes = None if changes.first is None else changes
        number, name = run.key
        if number is not None and number != _TRUNK:
            common = self._common[name]
            own = [t for t in touches if common is None or t.step not in common]
            firsts = [t.positions.first for t in own if t.positions.ranges]
            seq.private_from = changes.first if common is None else min(firsts, default=None)

    def _changes(self, plan: RunPlan, touches: Iterable[Touch]) -> Changes:
        return Changes(plan, touches, self._context, self._prefix_of, self._block_size)

    def _prefix_of(self, name: str, stop: int) -> str:
        """A key of what the values of a run that does not vary are made from, before ``stop``."""
        found = self._prefixes.get((name, stop))
        if found is None:
            plan = self._plans[name]
            if name not in self._read:
                self._read[name] = self._changes(plan, plan.touches)
            adapter = plan.adapter or self._adapter
            ids = list(plan.prompt.ids)
            for at, token in plan.input.tokens:
                ids[at] = token
            made_from = (
                None if adapter is None else (adapter, self._versions[adapter]),
                long_text_offset(self._decoder.config, len(ids)),
                ids[:stop],
                self._read[name].between(0, stop),
            )
            found = self._prefixes[name, stop] = hash_of(made_from)
        return found

    def output(self) -> ProgramOutput:
        """What the rows gave, in order."""
        return ProgramOutput([self._outputs[i] for i in range(len(self._rows))])

    # --- runs ---------------------------------------------------------------------------------
    def next_runs(self, window: int) -> Iterator[ProgramRun]:
        """Runs that may begin now; the caller puts each into ``live`` before asking on."""
        for _ in range(len(self._pending)):
            if len(self.live) >= window or not self._pending:
                return
            key = self._pending.popleft()
            if not self._ready(key):
                self._pending.append(key)
                continue
            yield self._begin(key)

    def run_done(self, run: ProgramRun, n_tokens: int | None = None) -> None:
        """A run has gone through; rows that only waited for it are made.

        Args:
            n_tokens: tokens of a text that went through the model; None: all of its prompt.
        """
        self._done[run.key] = run
        if run.is_trunk:
            return
        n = len(run.plan.prompt.ids) if n_tokens is None else n_tokens
        for i in self._waiting[run.key]:
            self._missing[i] -= 1
            if self._missing[i] == 0:
                self._outputs[i] = self._row(i, n)
                self._let_go(i)

    def _let_go(self, number: int) -> None:
        """Of the runs that vary, those that nobody needs after this row."""
        for key in self._keys_of(number):
            self._left[key] -= 1
            if self._left[key] == 0 and key[0] is not None:
                del self._done[key]

    def hold(self, run: ProgramRun, memory: HeldBlocks) -> None:
        """The memory of a trunk, for its branches."""
        self._memory[run.plan.name] = memory

    def take_memory(self) -> list[HeldBlocks]:
        """The memory of all trunks, which it lets go of."""
        memory, self._memory = list(self._memory.values()), {}
        return memory

    def _common_steps(self, name: str) -> frozenset[int] | None:
        """The steps that do the same in all rows of a run that varies; None where its rows do not
        even see the same."""
        plans = [row.runs[name] for row in self._rows if name in row.runs]
        first = plans[0]
        if any(
            plan.prompt is not first.prompt
            or plan.adapter != first.adapter
            or plan.input != first.input
            for plan in plans
        ):
            return None
        # What does not vary was resolved once: its touches are the same objects in all rows.
        same = {id(touch) for touch in first.touches}
        for plan in plans[1:]:
            same &= {id(touch) for touch in plan.touches}
        others = {
            touch.step
            for plan in plans
            for touch in plan.touches
            if id(touch) not in same or any(s.run in self._varying for s in touch.sources)
        }
        return frozenset(touch.step for touch in first.touches) - others

    def _find_trunks(self, max_bytes: int) -> None:
        """What the runs of each name that varies have in common, as far as it fits."""
        config = self._decoder.config
        size = self._decoder.embed.element_size()
        for name in sorted(self._varying):
            rows = {i: row for i, row in enumerate(self._rows) if name in row.runs}
            plans = {i: row.runs[name] for i, row in rows.items()}
            kept = {i: [k for _, k in self._kept_of(i, name)] for i in rows}
            common = self._common[name]
            if common is None:
                continue
            trunk = find_trunk(plans, kept, config.n_layers, common)
            if size * trunk.n_numbers(config.d_model) > max_bytes:
                continue
            max_bytes -= size * trunk.n_numbers(config.d_model)
            self._trunks[name] = trunk

    def _queue_runs(self) -> None:
        last: list[RunKey] = []
        self._pending.extend((_TRUNK, name) for name in self._trunks)
        for i in range(len(self._rows)):
            keys = self._keys_of(i)
            self._missing.append(len(keys))
            for key in keys:
                self._waiting.setdefault(key, []).append(i)
        self._left = {key: len(rows) for key, rows in self._waiting.items()}
        # Rows that others are compared with go first: until then those keep their logits.
        first = {number for number, _ in self._compared}
        for i in sorted(range(len(self._rows)), key=lambda i: i not in first):
            for name, plan in self._rows[i].runs.items():
                if name in self._varying:
                    self._pending.append((i, name))
                    continue
                if name not in self._plans:
                    self._plans[name] = plan
                    late = self.writes and name == MAIN
                    (last if late else self._pending).append((None, name))
                _merge(self._wanted.setdefault(name, {}), self._kept_of(i, name))
        self._pending.extend(last)

    def _keys_of(self, number: int) -> dict[RunKey, None]:
        """The runs that a row is made from, some perhaps of other rows; in order."""
        row = self._rows[number]
        own = (self._key(number, name) for name in row.runs)
        others = (self._other(number, m) for m in row.measures if m.other is not None)
        return dict.fromkeys((*own, *others))

    def _other(self, number: int, measure: MeasureRef) -> RunKey:
        """The run that a measure of a row compares with."""
        assert measure.other is not None
        return self._key(number if measure.other_row is None else measure.other_row, measure.other)

    def _compared_rows(self) -> dict[RunKey, set[tuple[int, ...]]]:
        """Positions at which other rows want the logits of runs that vary."""
        found: dict[RunKey, set[tuple[int, ...]]] = {}
        for i, row in enumerate(self._rows):
            for measure in row.measures:
                if measure.other_row is not None and measure.other in self._varying:
                    at = tuple(sorted(set(measure.other_positions)))
                    found.setdefault(self._other(i, measure), set()).add(at)
        return found

    def _key(self, number: int | None, name: str) -> RunKey:
        return (number, name) if name in self._varying else (None, name)

    def _ready(self, key: RunKey) -> bool:
        number, name = key
        if self.writes and name == MAIN:
            return not self.live and not self._pending
        branches = number is not None and number != _TRUNK and name in self._trunks
        if branches and (_TRUNK, name) not in self._done:
            return False
        plan = self._plan(key)
        sources = {s.run for t in plan.touches for s in t.sources if s.run is not None}
        return all(self._key(number, s) in self._done for s in sources - {name})

    def _plan(self, key: RunKey) -> RunPlan:
        number, name = key
        if number == _TRUNK:
            return self._trunks[name].plan
        return self._plans[name] if number is None else self._rows[number].runs[name]

    def _begin(self, key: RunKey) -> ProgramRun:
        number, name = key
        plan = self._plan(key)
        trunk = self._trunks.get(name)
        if number == _TRUNK:
            assert trunk is not None
            kept: dict[object, KeptRows] = dict(trunk.entries.items())
            edits = RunEdits(plan, self._context, self._sources(key, plan), kept.values())
            return ProgramRun(key, plan, edits, kept, is_trunk=True)
        if number is None:
            kept = self._wanted[name]
        else:
            kept = dict(self._kept_of(number, name))
        sources = self._sources(key, plan)
        entry, onset = None, None
        if number is not None and trunk is not None and name in self._memory:
            branch = trunk.branches[number]
            entry = trunk.entries.get(branch.layer)
            onset = Onset(self._memory[name], branch.token, branch.layer)
        n_layers = None
        if self._partial and not (self.writes and name == MAIN):
            n_layers = deepest_layer(kept.values(), self._decoder.config.n_layers)
        edits = RunEdits(plan, self._context, sources, kept.values(), entry)
        return ProgramRun(key, plan, edits, kept, onset, n_layers)

    def _sources(self, key: RunKey, plan: RunPlan) -> dict[str, RunEdits]:
        """The runs that a plan reads, all done."""
        number, name = key
        return {
            s.run: self._done[self._key(number, s.run)].edits
            for t in plan.touches
            for s in t.sources
            if s.run is not None and s.run != name
        }

    # --- what is kept -------------------------------------------------------------------------
    def _kept_of(self, number: int, name: str) -> Iterator[tuple[object, KeptRows]]:
        """What one row wants of a run of its own, and others of one that varies."""
        row = self._rows[number]
        for compared in sorted(self._compared.get((number, name), ())):
            yield (_LOGITS, compared), KeptRows(_LOGITS, compared)
        for plan in row.runs.values():
            for touch in plan.touches:
                for source in touch.sources:
                    if source.run != name or source.ref is None or not source.positions:
                        continue
                    same = (source.ref.site, source.ref.layer) == (touch.ref.site, touch.ref.layer)
                    if plan.name == name and same:
                        continue  # read as it comes by
                    at = source_positions(source)
                    yield (source.ref, at), KeptRows(source.ref, at)
        for capture in row.captures:
            if capture.run == name:
                shrink = None if capture.reduce in ("none", "mean") else self._reducer(capture)
                places = capture.positions.places()
                yield _capture_key(capture), KeptRows(capture.ref, places, capture.after, shrink)
        for measure in row.measures:
            if measure.run == name:
                shrink = None if measure.other is not None else _measurer(measure)
                places = measure.positions.places()
                yield _measure_key(measure), KeptRows(_LOGITS, places, True, shrink)
            if measure.other == name and self._other(number, measure) == self._key(number, name):
                at = tuple(sorted(set(measure.other_positions)))
                yield (_LOGITS, at), KeptRows(_LOGITS, at)

    def _reducer(self, capture: CaptureRef) -> Shrink:
        decoder, context = self._decoder, self._context

        def reduce(part: torch.Tensor) -> Part:
            per_row = part[0].numel() // part.shape[-1] * 4 * decoder.config.vocab_size
            step = max(1, _LENS_BYTES // per_row) if capture.reduce == "lens" else len(part)
            pieces = [
                reduce_capture(part[i : i + step], capture, decoder, context)
                for i in range(0, len(part), step)
            ]
            values = torch.cat([value for value, _ in pieces])
            tokens = [t for _, t in pieces if t is not None]
            return (values, torch.cat(tokens)) if tokens else (values,)

        return reduce

    def _check_kept(self, max_bytes: int, config: ModelConfig) -> int:
        """What is kept as it is must fit: of what does not vary all, of what varies one row's and
        those of all rows that others are compared with.

        Returns:
            Its bytes.
        """
        size = self._decoder.embed.element_size()
        most_varying = 0
        fixed: set[object] = set()
        first = {number for number, _ in self._compared}
        total = 0
        for i, row in enumerate(self._rows):
            varying = 0
            for name, plan in row.runs.items():
                for key, kept in self._kept_of(i, name):
                    if kept.shrink is not None or (name, key) in fixed:
                        continue
                    n_keys = plan.prompt.length
                    n_bytes = size
                    for n in touched_shape(config, kept.ref, len(kept.positions), n_keys):
                        n_bytes *= n
                    if name in self._varying:
                        varying += n_bytes
                    else:
                        fixed.add((name, key))
                        total += n_bytes
            if i in first:  # it stays until those that are compared with it have come
                total += varying
            else:
                most_varying = max(most_varying, varying)
        if total + most_varying > max_bytes:
            raise TooLarge(
                f"what the runs of one request read of each other takes at most {max_bytes} bytes",
                field="interventions.steps",
                given=total + most_varying,
                remedy="Read fewer sites or positions, or split the program",
            )
        return total + most_varying

    # --- what comes back ----------------------------------------------------------------------
    def _row(self, number: int, n_main: int) -> RowOutput:
        row = self._rows[number]
        output = RowOutput(row)
        for capture in row.captures:
            run = self._done[self._key(number, capture.run)]
            length = self._length(run, n_main)
            output.captures.append(self._capture(capture, run.kept[_capture_key(capture)], length))
        on_host = _together_to_host([captured.value for captured in output.captures])
        for captured, value in zip(output.captures, on_host, strict=True):
            captured.value = value
        for measure in row.measures:
            run = self._done[self._key(number, measure.run)]
            part = run.kept[_measure_key(measure)].below(self._length(run, n_main))
            if part is None:
                values = torch.empty(0, dtype=self._context.dtype)
            elif measure.other is None:
                values = part[0]
            else:
                other = self._done[self._other(number, measure)]
                at = tuple(sorted(set(measure.other_positions)))
                rows = other.kept[_LOGITS, at].at(measure.other_positions[: len(part[0])])
                values = measure_rows(measure, part[0], rows)
            output.measures.append(Measured(measure, _to_host(values)))
        return output

    def _length(self, run: ProgramRun, n_main: int) -> int:
        """Tokens of a run that have gone through the model."""
        return n_main if self.writes and run.is_main else len(run.plan.prompt.ids)

    def _capture(self, capture: CaptureRef, kept: KeptRows, length: int) -> Captured:
        part = kept.below(length)
        if part is None:
            empty = torch.empty(0, *capture.shape[1:], dtype=self._context.dtype)
            has_tokens = capture.reduce == "lens" and capture.args["top"] is not None
            return Captured(capture, empty, empty.long() if has_tokens else None)
        value = part[0]
        if capture.ref.site in OPEN_SITES and kept.shrink is None:
            value = fit_keys(value, length, capture.ref.site)
        if capture.reduce == "mean":
            value = value.mean(0)
        tokens = part[1].cpu() if len(part) > 1 else None
        return Captured(capture, value, tokens)


def _merge(known: dict[object, KeptRows], more: Iterator[tuple[object, KeptRows]]) -> None:
    for key, kept in more:
        known.setdefault(key, kept)


def _measurer(measure: MeasureRef) -> Callable[[torch.Tensor], Part]:
    return lambda rows: (measure_rows(measure, rows),)


def _capture_key(capture: CaptureRef) -> object:
    args = repr(sorted(capture.args.items())) if capture.args else ""
    return ("capture", capture.ref, capture.positions, capture.reduce, args, capture.after)


def _measure_key(measure: MeasureRef) -> object:
    kind = "kl" if measure.other is not None else measure.kind
    return ("measure", kind, measure.positions, measure.tokens)


def _together_to_host(values: list[torch.Tensor]) -> list[torch.Tensor]:
    """:func:`_to_host` of many; from a device those of one shape are one copy."""
    on_host = all(value.is_cpu for value in values)
    return [_to_host(value) for value in values] if on_host else stacked_to_host(values)


def stacked_to_host(values: list[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors on the host, in order; one copy for each shape and dtype."""
    places: dict[object, list[int]] = {}
    for i, value in enumerate(values):
        places.setdefault((value.shape, value.dtype), []).append(i)
    found: dict[int, torch.Tensor] = {}
    for same in places.values():
        stacked = _to_host(torch.stack([values[i] for i in same]))
        found.update(zip(same, stacked.unbind(), strict=True))
    return [found[i] for i in range(len(values))]


def _to_host(value: torch.Tensor) -> torch.Tensor:
    if value.is_floating_point() and value.dtype != torch.float64:
        value = value.float()
    return value.cpu()
