"""From a program to what it means: sites, positions, sources, order, passes, bytes.

Everything that can be wrong with a program for a given model and prompts is found here, before
anything is computed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch

from invivo.edits.arguments import Arguments
from invivo.edits.blobs import Blobs
from invivo.edits.operations import OPERATIONS, REDUCTIONS
from invivo.edits.passes import order_runs
from invivo.edits.program import (
    MAIN,
    PLAIN,
    Capture,
    Measure,
    Program,
    Run,
    Step,
    Template,
)
from invivo.edits.prompt_text import PromptText
from invivo.edits.resolved import (
    CaptureRef,
    MeasureRef,
    ResolvedProgram,
    ResolvedRow,
    RunPlan,
    SourceRef,
    Touch,
)
from invivo.edits.run_input import build_input
from invivo.edits.selectors import Positions, Resolver, Selector, pair
from invivo.edits.site_names import (
    BLOCKS,
    EDGES,
    INPUTS,
    SitePattern,
    SiteRef,
    format_ref,
    forward_order,
    head_sizes,
    parse_site,
    resolve_site,
)
from invivo.edits.value_shapes import check_reference, check_value, touched_shape
from invivo.edits.values import Blob, OtherRow, Param, Source
from invivo.errors import InvalidRequest, TooLarge
from invivo.models.config import ModelConfig

Encode = Callable[[str], Sequence[int]]
_ALL = Selector("all")
_LAST = Selector("index", (-1,))
_KEY_SITES = ("attn.head.score", "attn.head.prob")
_UNREADABLE = INPUTS | BLOCKS | EDGES | {"moe.expert.on"}
_PROMPT_SITES = ("input.tokens", "input.position")
_MEMORY, _STATE = "gla.head.memory", "gla.head.state"
# What some operations have become once their sources are known.
_BECOMES = {
    "freeze": "replace",
    "mean": "replace",
    "resample": "replace",
    "state_reset": "zero",
    "state_replace": "replace",
}


# The quantities that switches act on.
_RESTS_ON = {
    "attn.edge": "attn.head.prob",
    "gla.edge": "gla.head.state",
    "moe.expert.on": "moe.expert.weight",
    "block": "resid.post",
    "attn": "attn.out",
    "mlp": "mlp.out",
}
# Operations that read runs or a tensor, and the argument that says which.
_REFERENCES = {"mean": "over", "resample": "pool"}


@dataclass(frozen=True, slots=True)
class ResolveBounds:
    """What a resolved program may be at most.

    Attributes:
        touches: touches of all rows.
        steps: steps times rows.
        capture_bytes: bytes of all captures.
    """

    touches: int = 200_000
    steps: int = 100_000
    capture_bytes: int = 1 << 30


def resolve(
    program: Program,
    config: ModelConfig,
    prompts: Mapping[str, PromptText],
    *,
    blobs: Blobs | None = None,
    encode: Encode | None = None,
    model_names: Collection[str] = (),
    bounds: ResolveBounds = ResolveBounds(),
    failed: Mapping[tuple[str, int], str] = MappingProxyType({}),
) -> ResolvedProgram:
    """Find out what ``program`` means for a model and its prompts.

    Args:
        prompts: "main" and one for each run of the program that has a prompt of its own.
        blobs: the named tensors that the program refers to.
        encode: token ids of a text; needed where tokens are given by text.
        model_names: names and fingerprint of this model, compared with ``program.model``.
        failed: sites (and their layer) that are not what they should be, with the reason; see
            :func:`~invivo.edits.site_check.failed_sites`.

    Raises:
        InvalidRequest: a site is not there, a selector matches nothing, shapes do not agree, runs
            depend on each other in a circle, ... The field is the path in the program.
        TooLarge: more rows, touches or bytes than ``bounds`` allows.
    """
    if program.model is not None and model_names and program.model not in model_names:
        raise InvalidRequest(
            "the program is meant for another model",
            field="model",
            given=program.model,
            remedy=f"This one is {', '.join(model_names)}",
        )
    n_steps = program.n_rows * max(len(program.steps) + len(program.out), 1)
    if n_steps > bounds.steps:
        raise TooLarge(
            f"rows times steps and outputs are at most {bounds.steps}", field="sweep", given=n_steps
        )
    work = _Resolution(program, config, prompts, blobs or Blobs(), encode, bounds, failed)
    rows: list[ResolvedRow] = []
    varying: frozenset[str] = frozenset()
    by_steps = _varying_by_steps(program)
    seen: set[str] = set()
    for binding, bound in program.rows():
        rows.append(work.row(binding, bound))
        if len(rows) == 1:
            work.check_all_rows()
        new = {n: plan for n, plan in rows[-1].runs.items() if n not in seen}
        if new:  # not every row needs every run
            seen |= new.keys()
            varying |= _varying_in(rows[-1], by_steps)
            work.fixed |= {n: plan for n, plan in new.items() if n not in varying}
    _check_other_rows(rows)
    return ResolvedProgram(
        program=program,
        config=config,
        hash=program.hash,
        rows=tuple(rows),
        varying=varying,
        n_bytes=work.n_bytes,
    )


class ResolveCache:
    """Resolved programs by program, model, prompts and tensors; the least recently used one goes.

    Prompts and models are told apart by the keys that the caller gives.
    """

    def __init__(self, size: int = 256) -> None:
        self.size = size
        self._kept: OrderedDict[tuple[object, ...], ResolvedProgram] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def peek(self, key: tuple[object, ...]) -> ResolvedProgram | None:
        """The program under ``key``, if it is here."""
        return self._kept.get(key)

    def get(self, key: tuple[object, ...], make: Callable[[], ResolvedProgram]) -> ResolvedProgram:
        """The program under ``key`` (hash of the program, prompt ids, blob hashes, model)."""
        found = self._kept.get(key)
        if found is None:
            found = self._kept[key] = make()
            if len(self._kept) > self.size:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(key)
        return found


class _Resolution:
    """The work of :func:`resolve`; what does not vary over a sweep is found once."""

    def __init__(
        self,
        program: Program,
        config: ModelConfig,
        prompts: Mapping[str, PromptText],
        blobs: Blobs,
        encode: Encode | None,
        bounds: ResolveBounds,
        failed: Mapping[tuple[str, int], str],
    ) -> None:
        self.program = program
        self.config = config
        self.blobs = blobs
        self.encode = encode
        self.bounds = bounds
        self.failed = failed
        self.prompts = _prompts_of_runs(program.runs, prompts)
        self.n_bytes = 0
        self.n_touches = 0
        # Selectors with variables change what every step means.
        self.stable = not any(isinstance(s, Template) for s in program.sel.values())
        self.resolvers: dict[str, Resolver] = {}
        self.sites: dict[tuple[SitePattern, bool], list[SiteRef]] = {}
        self.steps: dict[int, list[Touch]] = {}
        self.fixed: dict[str, RunPlan] = {}  # of runs that are the same in all rows

    def row(self, binding: Mapping[str, Any], program: Program) -> ResolvedRow:
        if not self.resolvers or not self.stable:
            named = {n: s for n, s in program.sel.items() if isinstance(s, Selector)}
            self.resolvers = {
                run: Resolver(named, prompt, run) for run, prompt in self.prompts.items()
            }
        touches: list[Touch] = []
        stops: dict[str, int] = {}
        adapters = {n: run.adapter for n, run in program.runs.items() if run.adapter is not None}
        for i, step in enumerate(program.steps):
            assert isinstance(step, Step)
            if step.do == "use":
                self._use(i, step, adapters)
            else:
                touches += self._touches_of(i, step, stops)
        self.n_touches += len(touches)
        if self.n_touches > self.bounds.touches:
            raise TooLarge(
                f"the program touches over {self.bounds.touches} sites in all its rows",
                field="steps",
            )
        captures: list[CaptureRef] = []
        measures: list[MeasureRef] = []
        for i, output in enumerate(program.out):
            if isinstance(output, Capture):
                captures += self._captures_of(i, output, stops)
            else:
                assert isinstance(output, Measure)
                measures.append(self._measure_of(i, output, stops, binding))
        order = self._order
        inside = [t for t in touches if t.kernel != "input"]
        inside.sort(key=lambda t: order(t.ref))
        self._check_stops(inside, stops)
        _check_shares(inside)
        read = {c.run for c in captures} | {m.run for m in measures}
        read |= {m.other for m in measures if m.other is not None}
        runs, passes = order_runs(inside, {MAIN, *read}, order)
        plans = {}
        for name in runs:
            if name in self.fixed:
                plans[name] = self.fixed[name]
                continue
            changed = MAIN if name == PLAIN else name
            plans[name] = RunPlan(
                name,
                self.prompts[name],
                tuple(t for t in inside if t.run == name),
                build_input(
                    [t for t in touches if t.kernel == "input" and t.run == changed],
                    self.prompts[name],
                    self.config,
                ),
                stops.get(name),
                adapters.get(name),
            )
        everything = [t.ref for t in inside] + [c.ref for c in captures]
        expanded = any(r.expanded for r in everything)
        return ResolvedRow(binding, plans, tuple(captures), tuple(measures), passes, expanded)

    def check_all_rows(self) -> None:
        """After the first row: where the others bring back as much, refuse now and not in the end.

        Raises:
            TooLarge: all rows together bring back too much.
        """
        out = self.program.out
        alike = self.stable and not any(isinstance(output, Template) for output in out)
        if alike and self.n_bytes * self.program.n_rows > self.bounds.capture_bytes:
            raise TooLarge(
                f"captures take at most {self.bounds.capture_bytes} bytes",
                field="out",
                given=self.n_bytes * self.program.n_rows,
                remedy="Capture fewer sites or positions, or reduce them",
            )

    def _order(self, site: SiteRef) -> tuple[int, int]:
        return forward_order(site.site, site.layer, self.config.n_layers)

    def _refs(self, patterns: tuple[SitePattern, ...], path: str, expand: bool) -> list[SiteRef]:
        found: list[SiteRef] = []
        for i, pattern in enumerate(patterns):
            refs = self.sites.get((pattern, expand))
            if refs is None:
                where = path if len(patterns) == 1 else f"{path}[{i}]"
                refs = resolve_site(pattern, self.config, self.program.sets, where, expand=expand)
                self._check_sound(refs, where)
                self.sites[pattern, expand] = refs
            found += refs
        return found

    def _check_sound(self, refs: list[SiteRef], path: str) -> None:
        for ref in refs:
            reason = self.failed.get((_RESTS_ON.get(ref.site, ref.site), ref.layer))
            if reason is not None:
                raise InvalidRequest(
                    f"this site is not what its name says: {reason}",
                    field=path,
                    given=format_ref(ref),
                    remedy="Other sites may be sound; please report the model and the versions",
                )

    def _positions(self, run: str, selector: Selector, path: str) -> Positions:
        return self._resolver(run, path).resolve(selector, path)

    def _acting(self, run: str, selector: Selector, path: str) -> Positions:
        """The positions at which something is done or read for what is done.

        Raises:
            InvalidRequest: the past of the run is not computed again, and they all lie there.
        """
        found = self._positions(run, selector, path)
        if self.program.recompute:
            return found
        n_past = self.prompts[run].n_past
        if not (acting := found.since(n_past)).ranges:
            raise self._in_the_past(run, found.indices()[-1], path)
        return acting

    def _check_wanted(self, run: str, positions: Sequence[int], path: str) -> None:
        """Raises InvalidRequest where something is read in a past that is not computed again."""
        if not self.program.recompute and positions and min(positions) < self.prompts[run].n_past:
            raise self._in_the_past(run, min(positions), path)

    def _in_the_past(self, run: str, position: int, path: str) -> InvalidRequest:
        return InvalidRequest(
            f'token {position} of run "{run}" would have to be computed again, and "recompute" is '
            f"false: the first token that is computed is {self.prompts[run].n_past}",
            field=path,
            remedy='Choose later positions ("@last", "@generated"), or leave "recompute" out',
        )

    def _resolver(self, run: str, path: str) -> Resolver:
        if run not in self.resolvers:
            raise InvalidRequest(
                "there is no run of this name",
                field=path,
                given=run,
                remedy=f"Known: {', '.join(self.resolvers)}",
            )
        return self.resolvers[run]

    # Steps.

    def _use(self, number: int, step: Step, adapters: dict[str, str]) -> None:
        """Note the adapter that a run uses."""
        path = f"steps[{number}]"
        self._check_sites(step, self._refs(step.at, f"{path}.at", False), path)
        self._resolver(step.run, f"{path}.run")
        if step.run in adapters:
            raise InvalidRequest(
                f'the run "{step.run}" uses an adapter already',
                field=f"{path}.adapter",
                given=adapters[step.run],
                remedy="A run uses one",
            )
        adapters[step.run] = step.args["adapter"]

    def _touches_of(self, number: int, step: Step, stops: dict[str, int]) -> list[Touch]:
        path = f"steps[{number}]"
        if step.do == "stop":
            refs = self._refs(step.at, f"{path}.at", False)
            self._resolver(step.run, f"{path}.run")
            self._check_sites(step, refs, path)
            stops[step.run] = min(stops.get(step.run, 10**9), *(r.layer for r in refs))
            return []
        if self.stable and isinstance(self.program.steps[number], Step):
            if number not in self.steps:
                self.steps[number] = self._make_touches(number, step, path)
            return self.steps[number]
        return self._make_touches(number, step, path)

    def _make_touches(self, number: int, step: Step, path: str) -> list[Touch]:
        operation = OPERATIONS[step.do]
        refs = self._refs(step.at, f"{path}.at", step.expand)
        self._check_sites(step, refs, path)
        self._resolver(step.run, f"{path}.run")
        args, do = dict(step.args), step.do
        keys: Positions | None = None
        if not self.program.recompute and (do == "parallel" or refs[0].site in _PROMPT_SITES):
            raise InvalidRequest(
                f'{do} changes the prompt, and "recompute" is false',
                field=path,
                remedy='Leave "recompute" out; prompts with sets need it too',
            )
        if do == "parallel":
            blocks = [
                self._positions(step.run, block, f"{path}.blocks[{i}]")
                for i, block in enumerate(args.pop("blocks"))
            ]
            args["blocks"] = tuple(blocks)
            positions = blocks[0]
        elif operation.kernel == "edge":
            positions = self._acting(step.run, args.pop("to"), f"{path}.to")
            keys = self._positions(step.run, args.pop("from"), f"{path}.from")
            if refs[0].site == "gla.edge":  # what a key left is known where it is computed
                length = self.prompts[step.run].length
                cut = keys.complement(length) if do == "edge_only" else keys
                self._check_wanted(step.run, cut.indices()[:1], f"{path}.from")
        else:
            positions = self._acting(step.run, step.pos or _ALL, f"{path}.pos")
        if do == "freeze":
            excluded = args.pop("except")
            if excluded is not None:
                refs = _without(refs, self._refs(excluded, f"{path}.except", step.expand))
            if not refs:
                raise InvalidRequest("nothing is left to freeze", field=f"{path}.except")
        elif do in ("state_reset", "state_replace"):
            refs = [replace(ref, site=_MEMORY) for ref in refs]
        elif do == "edge_scale" and args["renormalise"] and refs[0].site == "gla.edge":
            raise InvalidRequest(
                "what keys leave in a state are no probabilities: there is no sum to scale back to",
                field=f"{path}.renormalise",
            )
        kernel = "input" if refs[0].site in INPUTS else operation.kernel
        touches = []
        for site in refs:
            sources = self._sources(step, site, positions, args, path)
            self._check_values(step, site, positions, args, path)
            values = {k: v for k, v in args.items() if k in _VALUES or k in _FLAGS}
            name = _BECOMES.get(do, do)
            reference = _REFERENCES.get(do)
            if reference is not None and isinstance(args[reference], Blob):
                self._check_reference(site, step.run, positions, args, reference, path)
                name, values = do, {k: v for k, v in args.items() if v is not None}
            touches.append(
                Touch(number, step.run, site, name, kernel, positions, values, sources, keys)
            )
        return touches

    def _check_sites(self, step: Step, refs: list[SiteRef], path: str) -> None:
        operation = OPERATIONS[step.do]
        for site in refs:
            if site.site not in operation.sites:
                raise InvalidRequest(
                    f"{step.do} does not act on {site.site}",
                    field=f"{path}.at",
                    given=format_ref(site),
                    remedy=f"It acts on {_listed(operation.sites)}",
                )

    def _sources(
        self, step: Step, site: SiteRef, positions: Positions, args: Arguments, path: str
    ) -> tuple[SourceRef, ...]:
        match step.do:
            case "freeze":
                runs = (args["to"],)
                sources = [Source(run=args["to"], map=args["map"])]
                where = [f"{path}.to"]
            case "mean" | "resample" if isinstance(args[_REFERENCES[step.do]], Blob):
                return ()
            case "mean":
                runs = args["over"]
                sources = [Source(run=run, map=args["map"]) for run in runs]
                where = [f"{path}.over[{i}]" for i in range(len(runs))]
            case "resample":
                pool = args["pool"]
                generator = torch.Generator().manual_seed(args["seed"] * 1_000_003 + 17)
                chosen = int(torch.randint(len(pool), (), generator=generator))
                sources = [Source(run=pool[chosen], map=args["map"])]
                where = [f"{path}.pool[{chosen}]"]
            case _ if isinstance(args.get("from"), Source):
                sources, where = [args["from"]], [f"{path}.from"]
            case _:
                return ()
        pooled = step.do == "mean" and args["positions"] == "all"
        return tuple(
            self._source(step, site, positions, source, at, pooled)
            for source, at in zip(sources, where, strict=True)
        )

    def _source(
        self,
        step: Step,
        site: SiteRef,
        positions: Positions,
        source: Source,
        path: str,
        pooled: bool,
    ) -> SourceRef:
        if source.blob is not None:
            shape = self._shape(site, positions, step.run)
            check_value(Blob(source.blob), shape, path, self.blobs, self.program.params)
            return SourceRef(blob=source.blob)
        assert source.run is not None
        resolver = self._resolver(source.run, path)
        read = site
        if source.at is not None:
            refs = self._refs((parse_site(source.at, f"{path}.at"),), f"{path}.at", step.expand)
            if len(refs) != 1 or refs[0].site in _UNREADABLE:
                raise InvalidRequest(
                    "one site of one layer is needed", field=f"{path}.at", given=source.at
                )
            read = refs[0]
        here, there = self.prompts[step.run], resolver.prompt
        if self._shape(read, positions, source.run) != self._shape(site, positions, step.run):
            raise InvalidRequest(
                f"{format_ref(read)} and {format_ref(site)} have different shapes",
                field=path,
                remedy="Attention of prompts of different lengths cannot be exchanged"
                if site.site in _KEY_SITES
                else None,
            )
        if source.run == step.run and self._order(read) > self._order(site):
            raise InvalidRequest(
                "a run cannot read its own later values",
                field=path,
                given=format_ref(read),
                remedy='Add a run with "same": "main" and read it there',
            )
        selected: Positions | None = None
        how = source.map
        if pooled:
            selector = source.pos or step.pos or _ALL
            found = self._acting(source.run, selector, f"{path}.pos")
            places = tuple(found.indices())
            if source.run == step.run:
                _check_past(site, read, [max(places)] * len(positions), positions, path)
            return SourceRef(source.run, None, read, places, True)
        if how is None and source.pos is not None:
            how = "selector"
        if how in ("selector", "one"):
            selector = source.pos or step.pos or _ALL
            selected = self._acting(source.run, selector, f"{path}.pos")
        elif source.pos is not None:
            raise InvalidRequest(f"map {how} takes no positions of its own", field=f"{path}.pos")
        paired = pair(positions, selected, how, here, there, path)
        self._check_wanted(source.run, paired, path)
        if source.run == step.run:
            _check_past(site, read, paired, positions, path)
        return SourceRef(source.run, None, read, paired)

    def _shape(self, site: SiteRef, positions: Positions, run: str) -> tuple[int, ...]:
        return touched_shape(self.config, site, len(positions), self.prompts[run].length)

    def _check_reference(
        self, site: SiteRef, run: str, positions: Positions, args: Arguments, name: str, path: str
    ) -> None:
        if args["map"] is not None:
            raise InvalidRequest(
                "map pairs the positions of runs, and this is a tensor", field=f"{path}.map"
            )
        shape = self._shape(site, positions, run)
        which = args.get("positions")
        check_reference(args[name], shape, which, f"{path}.{name}", self.blobs)

    def _check_values(
        self, step: Step, site: SiteRef, positions: Positions, args: Arguments, path: str
    ) -> None:
        if OPERATIONS[step.do].kernel in ("edge", "input", "block"):
            shape: tuple[int, ...] = ()
        else:
            shape = self._shape(site, positions, step.run)
        rank = None
        for name, value in args.items():
            if name not in _VALUES or value is None:
                continue
            where = f"{path}.{name}"
            if name == "basis":
                rank = self._check_basis(value, shape, where)
                continue
            wanted = (*shape[:-1], rank) if rank is not None else shape
            if site.site in _KEY_SITES and not isinstance(value, float | Param):
                raise InvalidRequest("only a number fits here", field=where)
            check_value(value, wanted, where, self.blobs, self.program.params)

    def _check_basis(self, value: object, shape: tuple[int, ...], path: str) -> int:
        """Rows of an orthonormal basis of the site's last dimension."""
        if isinstance(value, Param):
            wanted = self.program.params.get(value.name)
            if wanted is None:
                raise InvalidRequest("this parameter is not declared", field=path, given=value.name)
            size = wanted.shape
            basis = None
        else:
            basis = (
                self.blobs.get(value.name, path)
                if isinstance(value, Blob)
                else torch.tensor(value, dtype=torch.float64)
            )
            size = tuple(basis.shape)
        if len(size) != 2 or size[1] != shape[-1] or size[0] > size[1]:
            raise InvalidRequest(
                f"a basis here is [r, {shape[-1]}], r at most {shape[-1]}",
                field=path,
                given=list(size),
            )
        if basis is not None:
            basis = basis.double()
            off = (basis @ basis.T - torch.eye(size[0], dtype=torch.float64)).abs().max()
            if off > 1e-2:
                raise InvalidRequest(
                    f"the rows are not orthonormal (off by {off:.2g})",
                    field=path,
                    remedy="torch.linalg.qr(rows.T).Q.T makes them so",
                )
        return size[0]

    # Outputs.

    def _captures_of(
        self, number: int, capture: Capture, stops: dict[str, int]
    ) -> list[CaptureRef]:
        path = f"out[{number}]"
        positions = self._positions(capture.run, capture.pos or _ALL, f"{path}.pos")
        self._check_wanted(capture.run, positions.indices()[:1], f"{path}.pos")
        found = []
        tokens = self._lens_tokens(capture, path)
        for site in self._refs(capture.at, f"{path}.capture", capture.expand):
            if site.site in _UNREADABLE:
                raise InvalidRequest(
                    "this is a switch, not a quantity", field=path, given=format_ref(site)
                )
            self._check_reached(site, capture.run, stops, path)
            shape = self._shape(site, positions, capture.run)
            shape = self._reduced(capture, site, shape, tokens, path)
            size = 8 if capture.reduce == "lens" and tokens["top"] else 4
            for n in shape:
                size *= n
            self.n_bytes += size
            found.append(
                CaptureRef(
                    number,
                    capture.name or str(number),
                    capture.run,
                    site,
                    positions,
                    capture.reduce,
                    tokens,
                    capture.after,
                    shape,
                    size,
                    capture.keep,
                )
            )
        if self.n_bytes > self.bounds.capture_bytes:
            raise TooLarge(
                f"captures take at most {self.bounds.capture_bytes} bytes",
                field=path,
                given=self.n_bytes,
                remedy="Capture fewer sites or positions, or reduce them",
            )
        return found

    def _lens_tokens(self, capture: Capture, path: str) -> Arguments:
        """The arguments of the reduction with tokens as ids."""
        args = {a.name: capture.args[a.name] for a in REDUCTIONS[capture.reduce]}
        if args.get("tokens"):
            args["tokens"] = tuple(self._token(t, f"{path}.tokens") for t in args["tokens"])
        if args.get("sets"):
            args["sets"] = tuple(
                tuple(self._token(t, f"{path}.sets") for t in tokens) for tokens in args["sets"]
            )
        return args

    def _reduced(
        self,
        capture: Capture,
        site: SiteRef,
        shape: tuple[int, ...],
        args: Arguments,
        path: str,
    ) -> tuple[int, ...]:
        config = self.config
        match capture.reduce:
            case "none":
                return shape
            case "mean":
                return shape[1:]
            case "norm":
                return shape[:-1]
            case "dot" | "cos":
                v = args["v"]
                given = tuple(
                    self.blobs.get(v.name, f"{path}.v").shape if isinstance(v, Blob) else (len(v),)
                )
                if given != shape[-1:]:
                    raise InvalidRequest(
                        f"the shape must fit {list(shape[-1:])}",
                        field=f"{path}.v",
                        given=list(given),
                    )
                return shape[:-1]
            case "direct":
                self._check_width(site, path, "a direct share")
                return (*shape[:-1], len(args["tokens"]))
            case "probe":
                w = args["w"]
                weight = (
                    self.blobs.get(w.name, f"{path}.w")
                    if isinstance(w, Blob)
                    else torch.tensor(w, dtype=torch.float64)
                )
                if weight.dim() != 2 or weight.shape[1] != shape[-1]:
                    raise InvalidRequest(
                        f"a probe here is [classes, {shape[-1]}]",
                        field=f"{path}.w",
                        given=list(weight.shape),
                    )
                n = int(weight.shape[0])
                check_value(args["b"], (n,), f"{path}.b", self.blobs, self.program.params)
                return (*shape[:-1], n)
            case _:
                self._check_width(site, path, "a lens")
                top = args["top"]
                if top is not None and not 1 <= top <= config.vocab_size:
                    raise InvalidRequest(
                        f"1 to {config.vocab_size}", field=f"{path}.top", given=top
                    )
                n = top or len(args["tokens"] or args["sets"])
                return (*shape[:-1], n)

    def _check_width(self, site: SiteRef, path: str, what: str) -> None:
        whole = site.components is None and site.site not in _KEY_SITES
        if not whole or head_sizes(self.config, site.site) != (self.config.d_model,):
            raise InvalidRequest(
                f"{what} reads values of width {self.config.d_model}",
                field=f"{path}.capture",
                given=format_ref(site),
            )

    def _measure_of(
        self, number: int, measure: Measure, stops: dict[str, int], binding: Mapping[str, Any]
    ) -> MeasureRef:
        path = f"out[{number}]"
        positions = self._positions(measure.run, measure.pos or _LAST, f"{path}.pos")
        self._check_wanted(measure.run, positions.indices()[:1], f"{path}.pos")
        self._check_reached(SiteRef("logits", -1), measure.run, stops, path)
        args = measure.args
        names = ("a", "b") if measure.kind == "logit_diff" else ("token",)
        tokens = tuple(self._token(args[n], f"{path}.{n}") for n in names if n in args)
        other: str | None = None
        other_row: int | None = None
        paired: tuple[int, ...] = ()
        if measure.kind == "kl":
            other = args["to"]
            if isinstance(other, OtherRow):
                other_row = self._row_number(other, binding, f"{path}.to.row")
                other = other.run or measure.run
            resolver = self._resolver(other, f"{path}.to")
            self._check_reached(SiteRef("logits", -1), other, stops, path)
            selected = resolver.resolve(measure.pos or _LAST, f"{path}.pos")
            paired = pair(
                positions,
                selected,
                args["map"] or ("selector" if len(selected) == len(positions) == 1 else None),
                self.prompts[measure.run],
                resolver.prompt,
                path,
            )
            self._check_wanted(other, paired, f"{path}.to")
        return MeasureRef(
            number,
            measure.name or str(number),
            measure.run,
            measure.kind,
            positions,
            tokens,
            other,
            paired,
            other_row,
        )

    def _row_number(self, other: OtherRow, binding: Mapping[str, Any], path: str) -> int:
        """The number of the row that has other values of some variables."""
        sweep, values = self.program.sweep, dict(other.values)
        for name, value in values.items():
            if name not in sweep or value not in sweep[name]:
                raise InvalidRequest(
                    "the sweep has no row of this value" if name in sweep else "no such variable",
                    field=f"{path}.{name}",
                    given=value,
                    remedy=f"Values of {name}: {', '.join(map(str, sweep[name][:16]))}"
                    if name in sweep
                    else f"Variables of the sweep: {', '.join(sweep) or 'none'}",
                )
        number = 0
        for name, listed in sweep.items():  # the last one goes fastest
            number = number * len(listed) + listed.index(values.get(name, binding.get(name)))
        return number

    def _token(self, token: int | str, path: str) -> int:
        if isinstance(token, str):
            if self.encode is None:
                raise InvalidRequest("tokens are given by id here", field=path, given=token)
            ids = list(self.encode(token))
            if len(ids) != 1:
                raise InvalidRequest(
                    f"this is {len(ids)} tokens, one is needed",
                    field=path,
                    given=token,
                    remedy="Mind the leading blank, or give a token's id",
                )
            token = ids[0]
        if token >= self.config.vocab_size:
            raise InvalidRequest(
                f"the vocabulary has {self.config.vocab_size} tokens", field=path, given=token
            )
        return token

    def _check_reached(self, site: SiteRef, run: str, stops: Mapping[str, int], path: str) -> None:
        self._resolver(run, f"{path}.run")
        stop = stops.get(run)
        if stop is not None and self._order(site) > self._order(SiteRef("resid.post", stop)):
            raise InvalidRequest(
                f'run "{run}" stops after layer {stop}', field=path, given=format_ref(site)
            )

    def _check_stops(self, touches: list[Touch], stops: Mapping[str, int]) -> None:
        for touch in touches:
            path = f"steps[{touch.step}]"
            self._check_reached(touch.ref, touch.run, stops, path)
            for source in touch.sources:
                if source.run is not None and source.ref is not None:
                    self._check_reached(source.ref, source.run, stops, path)


# Arguments that are numbers or tensors, and those that are neither values nor positions.
_VALUES = frozenset({"a", "v", "c", "x", "min", "max", "s", "w", "basis"})
_FLAGS = frozenset({"seed", "renormalise", "reroute", "ids", "values", "blocks"})


def _prompts_of_runs(
    runs: Mapping[str, Run], prompts: Mapping[str, PromptText]
) -> dict[str, PromptText]:
    if MAIN not in prompts:
        raise InvalidRequest("the request's own prompt is missing", field=f"prompts.{MAIN}")
    found = {MAIN: prompts[MAIN], PLAIN: prompts[MAIN]}
    for name, run in runs.items():
        origin = run
        at = name
        while origin.same is not None and origin.same != MAIN:
            at = origin.same
            origin = runs[at]
        at = MAIN if origin.same == MAIN else at
        if at not in prompts:
            raise InvalidRequest("the prompt of this run is missing", field=f"runs.{at}")
        found[name] = prompts[at]
    return found


def _check_past(
    site: SiteRef, read: SiteRef, places: Sequence[int], positions: Positions, path: str
) -> None:
    """Raises InvalidRequest where a run reads a recurrent layer's states before they are there."""
    recurrent = site.site in (_MEMORY, _STATE) and site.layer == read.layer
    if recurrent and any(
        there > here for there, here in zip(places, positions.indices(), strict=False)
    ):
        raise InvalidRequest(
            "a run cannot read the states of its own later tokens",
            field=path,
            given=format_ref(read),
            remedy='Add a run with "same": "main" and read it there',
        )


def _check_shares(touches: Sequence[Touch]) -> None:
    """Raises InvalidRequest where a share of a state is asked for whose state is changed too."""
    states = {
        (t.run, t.ref.layer): t.step
        for t in touches
        if t.ref.site in (_MEMORY, _STATE) and t.positions.ranges
    }
    for touch in touches:
        step = states.get((touch.run, touch.ref.layer))
        if touch.ref.site == "gla.edge" and step is not None:
            raise InvalidRequest(
                f"steps[{step}] changes the state of layer {touch.ref.layer}: what a key has left "
                "in it is not known any more",
                field=f"steps[{touch.step}].at",
                given=format_ref(touch.ref),
                remedy="Set the key itself to zero: gla.head.h.k",
            )


def _without(refs: list[SiteRef], excluded: list[SiteRef]) -> list[SiteRef]:
    """``refs`` less what ``excluded`` names, head by head or number by number."""
    left = []
    for site in refs:
        heads, components = site.heads, site.components
        gone = False
        for other in excluded:
            if (other.site, other.layer, other.expanded) != (site.site, site.layer, site.expanded):
                continue
            if heads is not None and other.heads is not None:
                heads = tuple(h for h in heads if h not in other.heads)
            elif components is not None and other.components is not None:
                components = tuple(c for c in components if c not in other.components)
            else:
                gone = other.components is None
        if not gone and heads != () and components != ():
            left.append(SiteRef(site.site, site.layer, heads, components, site.expanded))
    return left


def _listed(sites: Collection[str]) -> str:
    if len(sites) > 8:
        return "sites that are vectors"
    return ", ".join(sorted("layers.i" if s == "block" else s for s in sites))


def _check_other_rows(rows: Sequence[ResolvedRow]) -> None:
    """Raises InvalidRequest where a row is compared with a run that another row lacks."""
    for row in rows:
        for measure in row.measures:
            if measure.other_row is None:
                continue
            assert measure.other is not None
            plan = rows[measure.other_row].runs.get(measure.other)
            if plan is None or plan.stop is not None:
                raise InvalidRequest(
                    f'the run "{measure.other}" of that row '
                    + ("does not exist" if plan is None else "stops before its logits"),
                    field=f"out[{measure.output}].to",
                    given=dict(rows[measure.other_row].binding),
                )


def _may_be_input(at: str | Sequence[str]) -> bool:
    """Whether sites as they are written in a sweep can be the run's tokens, positions or mask."""
    return any(name.startswith(("input.", "$")) for name in ([at] if isinstance(at, str) else at))


def _varying_by_steps(program: Program) -> frozenset[str]:
    """The runs that differ between the rows of a sweep by what is done in themselves."""
    everything = frozenset({MAIN, PLAIN, *program.runs})
    if any(isinstance(s, Template) for s in program.sel.values()):
        return everything
    templates = [step.data for step in program.steps if isinstance(step, Template)]
    varying = {data.get("run", MAIN) for data in templates}
    if any("$" in name for name in varying):
        return everything
    if any(data.get("run", MAIN) == MAIN and _may_be_input(data["at"]) for data in templates):
        varying.add(PLAIN)  # which sees what main sees
    return frozenset(varying)


def _varying_in(row: ResolvedRow, by_steps: frozenset[str]) -> frozenset[str]:
    """The runs of a row that differ between rows, by themselves or by what they read."""
    varying = set(by_steps)
    for name, plan in row.runs.items():  # sources come before their readers
        if any(s.run in varying for t in plan.touches for s in t.sources):
            varying.add(name)
    return frozenset(varying & row.runs.keys())
