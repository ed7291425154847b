"""A program of edits and captures: plain data, with one canonical form and one hash.

The JSON form is described in ``docs/interventions.md``; :func:`invivo.edits.schema.json_schema`
publishes it. Nothing here knows a model: what names and selectors mean for one is found by
:mod:`invivo.edits.resolve`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from invivo.edits.arguments import (
    Arguments,
    arguments_to_json,
    read_arguments,
    read_sites,
    sites_to_json,
)
from invivo.edits.operations import MEASURES, OPERATIONS, REDUCTIONS
from invivo.edits.reading import (
    Fields,
    canonical_json,
    plain_number,
    read_bool,
    read_choice,
    read_int,
    read_list,
    read_name,
    read_number,
    read_string,
)
from invivo.edits.selectors import Selector, read_selector, selector_to_json
from invivo.edits.site_names import SitePattern
from invivo.errors import InvalidRequest, TooLarge

VERSION = 1
MAIN = "main"  # the run of the request itself
PLAIN = "plain"  # the same prompt without edits
Scalar = float | int | str


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a program may be at most; checked before anything is computed.

    Attributes:
        n_bytes: bytes of JSON text, or characters of all texts in it.
        values: numbers, texts and lists in it.
        steps, outputs, selectors, runs: entries.
        rows: rows of the sweep.
        row_steps: rows times steps and outputs.
    """

    n_bytes: int = 1 << 20
    values: int = 1 << 16
    steps: int = 1024
    outputs: int = 256
    selectors: int = 256
    runs: int = 64
    rows: int = 4096
    row_steps: int = 100_000


DEFAULT_BOUNDS = Bounds()


@dataclass(frozen=True, slots=True)
class Run:
    """Another prompt that is run beside the request's own.

    Attributes:
        prompt: text or token ids; None where ``same`` is given.
        same: the run whose prompt this one shares ("main", or another).
        adapter: adapter that this run uses; None: the request's.
    """

    prompt: str | tuple[int, ...] | None = None
    same: str | None = None
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One operation at some sites and positions of a run.

    Attributes:
        at: the sites.
        do: a key of :data:`~invivo.edits.operations.OPERATIONS`.
        args: its arguments by name, defaults filled in.
        pos: positions; None: all of them (or the operation has its own).
        run: which run is changed.
        expand: give every query head keys and values of its own for this.
    """

    at: tuple[SitePattern, ...]
    do: str
    args: Arguments = field(default_factory=dict)
    pos: Selector | None = None
    run: str = MAIN
    expand: bool = False


@dataclass(frozen=True, slots=True)
class Capture:
    """Bring back values of some sites.

    Attributes:
        reduce: a key of :data:`~invivo.edits.operations.REDUCTIONS`, with its arguments in
            ``args``.
        after: what the model goes on with (True), or the value before the edits of that site.
        name: under which it comes back; None: its number among the outputs.
        keep: whether it is also kept as a named tensor, for later requests of the same owner.
    """

    at: tuple[SitePattern, ...]
    reduce: str = "none"
    args: Arguments = field(default_factory=dict)
    pos: Selector | None = None
    run: str = MAIN
    after: bool = True
    name: str | None = None
    expand: bool = False
    keep: bool = False


@dataclass(frozen=True, slots=True)
class Measure:
    """Bring back one number a position, made from the logits.

    Attributes:
        kind: a key of :data:`~invivo.edits.operations.MEASURES`, with its arguments in ``args``.
        pos: positions; None: the prompt's last token.
    """

    kind: str
    args: Arguments = field(default_factory=dict)
    pos: Selector | None = None
    run: str = MAIN
    name: str | None = None


Output = Capture | Measure


@dataclass(frozen=True, slots=True)
class Template:
    """An entry in which variables of the sweep stand ("$L"): read once a row."""

    data: Any


@dataclass(frozen=True, slots=True)
class Parameter:
    """A trainable tensor: its shape and the number (or named tensor) it starts from."""

    shape: tuple[int, ...]
    init: float | str = 0.0


@dataclass(frozen=True, slots=True)
class Program:
    """Everything a request asks of the inside of the model; see the module's docstring.

    Attributes:
        model: name or fingerprint of the model it is meant for; None: any.
        numerics: "fast", or "exact": a row's bits do not depend on the batch.
        recompute: False: the prompt's past (``PromptText.n_past``) is read as a plain request
            leaves it; nothing is changed or brought back there.
        runs: other prompts by name.
        sets: lists of indices that names may refer to ("layers.@late.resid.post").
        sel: named selectors.
        params: trainable parameters.
        steps, out: what is done, and what is brought back.
        sweep: values of each variable; the rows are all their combinations, the last one fastest.
    """

    steps: tuple[Step | Template, ...] = ()
    out: tuple[Output | Template, ...] = ()
    runs: Mapping[str, Run] = field(default_factory=dict)
    sel: Mapping[str, Selector | Template] = field(default_factory=dict)
    sets: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    params: Mapping[str, Parameter] = field(default_factory=dict)
    sweep: Mapping[str, tuple[Scalar, ...]] = field(default_factory=dict)
    model: str | None = None
    numerics: str = "fast"
    recompute: bool = True

    @property
    def n_rows(self) -> int:
        n = 1
        for values in self.sweep.values():
            n *= len(values)
        return n

    def to_dict(self) -> dict[str, Any]:
        """The canonical form: defaults left out, names spelled in one way."""
        out: dict[str, Any] = {"v": VERSION}
        if self.model is not None:
            out["model"] = self.model
        if self.numerics != "fast":
            out["numerics"] = self.numerics
        if not self.recompute:
            out["recompute"] = False
        if self.runs:
            out["runs"] = {name: _run_to_json(run) for name, run in self.runs.items()}
        if self.sets:
            out["sets"] = {name: list(indices) for name, indices in self.sets.items()}
        if self.sel:
            out["sel"] = {
                name: s.data if isinstance(s, Template) else selector_to_json(s)
                for name, s in self.sel.items()
            }
        if self.params:
            out["params"] = {
                name: {
                    "shape": list(p.shape),
                    "init": p.init if isinstance(p.init, str) else plain_number(p.init),
                }
                for name, p in self.params.items()
            }
        if self.steps:
            out["steps"] = [_step_to_json(step) for step in self.steps]
        if self.sweep:
            # A list, because the order of the variables is the order of the rows.
            out["sweep"] = [[name, list(values)] for name, values in self.sweep.items()]
        if self.out:
            out["out"] = [_output_to_json(output) for output in self.out]
        return out

    def to_json(self) -> str:
        return canonical_json(self.to_dict())

    @property
    def hash(self) -> str:
        """ "sha256:..." of the canonical form."""
        return f"sha256:{hashlib.sha256(self.to_json().encode()).hexdigest()}"

    def rows(self) -> Iterator[tuple[dict[str, Scalar], Program]]:
        """The programs of the sweep, with the values of its variables; itself where it has none."""
        if not self.sweep:
            yield {}, self
            return
        names = list(self.sweep)
        for values in itertools.product(*self.sweep.values()):
            binding = dict(zip(names, values, strict=True))
            yield binding, self._bound(binding)

    def _bound(self, binding: Mapping[str, Scalar]) -> Program:
        """This program with the variables replaced."""
        steps = tuple(
            _read_step(_bind(s.data, binding), f"steps[{i}]") if isinstance(s, Template) else s
            for i, s in enumerate(self.steps)
        )
        out = tuple(
            _read_output(_bind(o.data, binding), f"out[{i}]") if isinstance(o, Template) else o
            for i, o in enumerate(self.out)
        )
        sel = {
            name: read_selector(_bind(s.data, binding), f"sel.{name}")
            if isinstance(s, Template)
            else s
            for name, s in self.sel.items()
        }
        return replace(self, steps=steps, out=out, sel=sel, sweep={})


def parse_program(data: object, *, bounds: Bounds = DEFAULT_BOUNDS) -> Program:
    """Read a program from JSON text or from what ``json.loads`` gives.

    Raises:
        InvalidRequest: anything is unknown, missing or of the wrong kind; the error's field is
            the path (``steps[2].at``).
        TooLarge: it exceeds ``bounds``.
    """
    if isinstance(data, str | bytes):
        if len(data) > bounds.n_bytes:
            raise TooLarge(f"a program has at most {bounds.n_bytes} bytes", field="program")
        try:
            data = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"this is no JSON: {error}", field="program") from None
    _check_size(data, bounds)
    fields = Fields(data, "")
    version = read_int(fields.take("v", VERSION), "v")
    if version != VERSION:
        raise InvalidRequest(
            "this version of the language is unknown",
            field="v",
            given=version,
            remedy=f"Known: {VERSION}",
        )
    model = fields.take("model")
    numerics = read_choice(fields.take("numerics", "fast"), "numerics", ("fast", "exact"))
    recompute = read_bool(fields.take("recompute", True), "recompute")
    runs = {
        name: _read_run(value, f"runs.{name}")
        for name, value in _named(fields.take("runs", {}), "runs", bounds.runs)
    }
    _check_runs(runs)
    sets = {
        name: _read_set(value, f"sets.{name}")
        for name, value in _named(fields.take("sets", {}), "sets", bounds.selectors)
    }
    sweep = _read_sweep(fields.take("sweep", {}), bounds)
    first = {name: values[0] for name, values in sweep.items()}
    selectors: dict[str, Selector | Template] = {}
    for name, value in _named(fields.take("sel", {}), "sel", bounds.selectors):
        read = read_selector(_bind(value, first), f"sel.{name}")
        selectors[name] = Template(_plain(value)) if _has_variable(value, first) else read
    params = {
        name: _read_parameter(value, f"params.{name}")
        for name, value in _named(fields.take("params", {}), "params", bounds.selectors)
    }
    listed = read_list(fields.take("steps", []), "steps", most=bounds.steps)
    wanted = read_list(fields.take("out", []), "out", most=bounds.outputs)
    n_row_steps = math.prod(map(len, sweep.values())) * max(len(listed) + len(wanted), 1)
    if n_row_steps > bounds.row_steps:
        raise TooLarge(
            f"rows times steps and outputs are at most {bounds.row_steps}",
            field="sweep",
            given=n_row_steps,
        )
    steps: list[Step | Template] = []
    for i, value in enumerate(listed):
        step = _read_step(_bind(value, first), f"steps[{i}]")
        steps.append(Template(_plain(value)) if _has_variable(value, first) else step)
    outputs: list[Output | Template] = []
    for i, value in enumerate(wanted):
        output = _read_output(_bind(value, first), f"out[{i}]")
        outputs.append(Template(_plain(value)) if _has_variable(value, first) else output)
    fields.done()
    return Program(
        steps=tuple(steps),
        out=tuple(outputs),
        runs=runs,
        sel=selectors,
        sets=sets,
        params=params,
        sweep=sweep,
        model=None if model is None else read_string(model, "model", longest=200),
        numerics=numerics,
        recompute=recompute,
    )


def _check_size(data: object, bounds: Bounds) -> None:
    """Bounds bytes, values and depth of data that may have come from anywhere."""
    n_bytes = n_values = 0
    stack: list[tuple[object, int]] = [(data, 0)]
    while stack:
        value, depth = stack.pop()
        inner: Iterable[object] = ()
        if isinstance(value, str):
            n_bytes += len(value)
        elif isinstance(value, Mapping):
            n_bytes += sum(len(str(key)) for key in value)
            n_values += len(value)
            inner = value.values()
        elif isinstance(value, list | tuple):
            n_values += len(value)
            inner = value
        if depth > 32:
            raise TooLarge("a program nests at most 32 deep", field="program")
        if n_bytes > bounds.n_bytes or n_values > bounds.values:
            raise TooLarge(
                f"a program has at most {bounds.n_bytes} bytes and {bounds.values} values",
                field="program",
                remedy="Hand large tensors in as blobs",
            )
        stack += [(part, depth + 1) for part in inner]


def _named(value: object, path: str, most: int) -> list[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        raise InvalidRequest("an object is needed", field=path, given=value)
    if len(value) > most:
        raise TooLarge(f"at most {most} entries", field=path, given=len(value))
    return [(read_name(name, path), inner) for name, inner in value.items()]


def _read_set(value: object, path: str) -> tuple[int, ...]:
    listed = read_list(value, path, least=1, most=65_536)
    return tuple(sorted({read_int(i, path, least=0, most=10**6) for i in listed}))


def _read_run(value: object, path: str) -> Run:
    if isinstance(value, str):
        value = {"prompt": value}
    fields = Fields(value, path)
    prompt, same = fields.take("prompt"), fields.take("same")
    if (prompt is None) == (same is None):
        raise InvalidRequest("a run has a prompt, or the same one as another run", field=path)
    if isinstance(prompt, list | tuple):
        listed = read_list(prompt, fields.at("prompt"), least=1, most=1 << 20)
        prompt = tuple(read_int(i, fields.at("prompt"), least=0, most=2**31) for i in listed)
    elif prompt is not None:
        prompt = read_string(prompt, fields.at("prompt"), longest=1 << 20)
    adapter = fields.take("adapter")
    fields.done()
    return Run(
        prompt=prompt,
        same=None if same is None else read_name(same, fields.at("same")),
        adapter=None
        if adapter is None
        else read_string(adapter, fields.at("adapter"), longest=200),
    )


def _check_runs(runs: Mapping[str, Run]) -> None:
    for name, run in runs.items():
        if name in (MAIN, PLAIN):
            raise InvalidRequest(
                "this name is taken: it is the request's own prompt", field=f"runs.{name}"
            )
        seen = {name}
        while run.same is not None and run.same != MAIN:
            if run.same not in runs or run.same in seen:
                raise InvalidRequest(
                    "there is no run of this name"
                    if run.same not in runs
                    else "runs take each other's prompt in a circle",
                    field=f"runs.{name}.same",
                    given=run.same,
                )
            seen.add(run.same)
            run = runs[run.same]


def _run_to_json(run: Run) -> dict[str, object]:
    out: dict[str, object] = {}
    if run.prompt is not None:
        out["prompt"] = run.prompt if isinstance(run.prompt, str) else list(run.prompt)
    if run.same is not None:
        out["same"] = run.same
    if run.adapter is not None:
        out["adapter"] = run.adapter
    return out


def _read_parameter(value: object, path: str) -> Parameter:
    fields = Fields(value, path)
    shape = read_list(fields.take("shape", []), fields.at("shape"), most=4)
    init = fields.take("init", 0.0)
    fields.done()
    if not isinstance(init, str):
        init = read_number(init, fields.at("init"))
    elif not init.startswith("blob:"):
        raise InvalidRequest(
            "a number or a named tensor is needed", field=fields.at("init"), given=init
        )
    return Parameter(
        tuple(read_int(n, fields.at("shape"), least=1, most=1 << 20) for n in shape), init
    )


def _read_step(value: object, path: str) -> Step:
    fields = Fields(value, path)
    name = fields.need("do")
    if not isinstance(name, str) or name not in OPERATIONS:
        raise InvalidRequest(
            "there is no operation of this name",
            field=fields.at("do"),
            given=name,
            remedy=f"Known: {', '.join(OPERATIONS)}",
        )
    operation = OPERATIONS[name]
    at = read_sites(fields.need("at"), fields.at("at"))
    run = read_name(fields.take("run", MAIN), fields.at("run"))
    if run == PLAIN:
        raise InvalidRequest("this run stays without edits", field=fields.at("run"), given=run)
    pos = None
    if operation.positions and fields.has("pos"):
        pos = read_selector(fields.take("pos"), fields.at("pos"))
    expand = read_bool(fields.take("expand", False), fields.at("expand"))
    args = read_arguments(operation.arguments, fields)
    fields.done()
    _check_arguments(name, args, path)
    return Step(at, name, args, pos, run, expand)


def _check_arguments(name: str, args: Arguments, path: str) -> None:
    if name != "clamp":
        return
    low, high = args["min"], args["max"]
    if low is None and high is None:
        raise InvalidRequest("clamp needs min, max or both", field=path)
    if isinstance(low, float) and isinstance(high, float) and low > high:
        raise InvalidRequest("min is over max", field=f"{path}.min", given=low)


def _read_output(value: object, path: str) -> Output:
    fields = Fields(value, path)
    kinds = [kind for kind in ("capture", "measure") if fields.has(kind)]
    if len(kinds) != 1:
        raise InvalidRequest("an output is a capture or a measure", field=path, given=value)
    run = read_name(fields.take("run", MAIN), fields.at("run"))
    name = fields.take("name")
    name = None if name is None else read_string(name, fields.at("name"), longest=100)
    pos = None if not fields.has("pos") else read_selector(fields.take("pos"), fields.at("pos"))
    fields.take("pos")
    output: Output
    if kinds == ["measure"]:
        kind = read_choice(fields.take("measure"), fields.at("measure"), MEASURES)
        args = read_arguments(MEASURES[kind], fields)
        output = Measure(kind, args, pos, run, name)
    else:
        at = read_sites(fields.take("capture"), fields.at("capture"))
        reduce = read_choice(fields.take("reduce", "none"), fields.at("reduce"), REDUCTIONS)
        when = read_choice(fields.take("when", "after"), fields.at("when"), ("after", "before"))
        expand = read_bool(fields.take("expand", False), fields.at("expand"))
        keep = read_bool(fields.take("keep", False), fields.at("keep"))
        args = read_arguments(REDUCTIONS[reduce], fields)
        if reduce == "lens" and sum(v is not None for v in args.values()) != 1:
            raise InvalidRequest("lens needs top, tokens or sets", field=path)
        output = Capture(at, reduce, args, pos, run, when == "after", name, expand, keep)
    fields.done()
    return output


def _step_to_json(step: Step | Template) -> Any:
    if isinstance(step, Template):
        return step.data
    out: dict[str, object] = {"at": sites_to_json(step.at), "do": step.do}
    if step.pos is not None:
        out["pos"] = selector_to_json(step.pos)
    if step.run != MAIN:
        out["run"] = step.run
    if step.expand:
        out["expand"] = True
    return out | arguments_to_json(OPERATIONS[step.do].arguments, step.args)


def _output_to_json(output: Output | Template) -> Any:
    if isinstance(output, Template):
        return output.data
    out: dict[str, object]
    if isinstance(output, Measure):
        out = {"measure": output.kind}
        out |= arguments_to_json(MEASURES[output.kind], output.args)
    else:
        out = {"capture": sites_to_json(output.at)}
        if output.reduce != "none":
            out["reduce"] = output.reduce
        out |= arguments_to_json(REDUCTIONS[output.reduce], output.args)
        if not output.after:
            out["when"] = "before"
        if output.expand:
            out["expand"] = True
        if output.keep:
            out["keep"] = True
    if output.pos is not None:
        out["pos"] = selector_to_json(output.pos)
    if output.run != MAIN:
        out["run"] = output.run
    if output.name is not None:
        out["name"] = output.name
    return out


# Sweeps.

_VARIABLE = re.compile(r"\$([A-Za-z][A-Za-z0-9_]*)")
_SWEEP_RANGE = re.compile(r"([0-9]{1,15})\.\.([0-9]{1,15})")


def _read_sweep(value: object, bounds: Bounds) -> dict[str, tuple[Scalar, ...]]:
    """{"L": "0..31", "a": [0.5, 1]}, or [["L", ...], ...] where the order is meant."""
    if isinstance(value, list | tuple):
        pairs = [
            read_list(entry, f"sweep[{i}]", least=2, most=2) for i, entry in enumerate(value[:64])
        ]
        if len({str(name) for name, _ in pairs}) != len(value):
            raise InvalidRequest("at most 64 variables, each once", field="sweep")
        value = {str(name): values for name, values in pairs}
    found: dict[str, tuple[Scalar, ...]] = {}
    n_rows = 1
    for name, values in _named(value, "sweep", 64):
        path = f"sweep.{name}"
        if not _VARIABLE.fullmatch(f"${name}"):
            raise InvalidRequest("letters, digits and _ only", field=path, given=name)
        found[name] = _sweep_values(values, path, bounds)
        n_rows *= len(found[name])
        if n_rows > bounds.rows:
            raise TooLarge(f"a sweep has at most {bounds.rows} rows", field="sweep", given=n_rows)
    return found


def _sweep_values(values: object, path: str, bounds: Bounds) -> tuple[Scalar, ...]:
    if isinstance(values, str):
        match = _SWEEP_RANGE.fullmatch(values)
        if match is None:
            raise InvalidRequest('a list or "0..31" is needed', field=path, given=values)
        low, high = int(match[1]), int(match[2])
        if low > high:
            raise InvalidRequest("the range is empty", field=path, given=values)
        if high - low >= bounds.rows:
            raise TooLarge(f"a sweep has at most {bounds.rows} rows", field=path, given=values)
        return tuple(range(low, high + 1))
    listed = read_list(values, path, least=1, most=bounds.rows)
    return tuple(
        read_string(v, f"{path}[{i}]")
        if isinstance(v, str)
        else plain_number(read_number(v, f"{path}[{i}]"))
        for i, v in enumerate(listed)
    )


def _has_variable(value: object, names: Mapping[str, Scalar]) -> bool:
    if isinstance(value, str):
        return any(name in names for name in _VARIABLE.findall(value))
    if isinstance(value, Mapping):
        return any(_has_variable(inner, names) for inner in value.values())
    if isinstance(value, list | tuple):
        return any(_has_variable(inner, names) for inner in value)
    return False


def _bind(value: Any, binding: Mapping[str, Scalar]) -> Any:
    """``value`` with variables replaced: "$L" by the value itself, "a.$L.b" by its text."""
    if not binding:
        return value
    if isinstance(value, str):
        whole = _VARIABLE.fullmatch(value)
        if whole is not None and whole[1] in binding:
            return binding[whole[1]]
        return _VARIABLE.sub(lambda m: str(binding.get(m[1], m[0])), value)
    if isinstance(value, Mapping):
        return {key: _bind(inner, binding) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_bind(inner, binding) for inner in value]
    return value


def _plain(value: Any) -> Any:
    """A copy in which equal numbers look equal."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return plain_number(value)
    return value
