"""Programs from Python, read from left to right.

    edit = (
        program()
        .run("cf", "The capital of Italy is")
        .select("country", span("Poland", take="last"))
        .at("layers.12.attn.head.3.z", pos=last).replace("cf")
        .at("layers.3.resid.post", pos="@country").add(vector, 2.0)
        .capture("layers.*.resid.post", pos=last, reduce="lens", top=5)
        .measure("logit_diff", a=" Warsaw", b=" Rome")
    )
    edit.build()    # the Program
    edit.blobs      # the tensors it refers to

Tensors become named tensors, named by their hash; everything else is the JSON form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from invivo.edits.blobs import content_hash
from invivo.edits.operations import MEASURES, OPERATIONS, REDUCTIONS
from invivo.edits.program import Program, parse_program
from invivo.errors import InvalidRequest

first, last, prompt, generated, everywhere = "@first", "@last", "@prompt", "@generated", "@all"

Where = int | str | slice | Sequence[int] | Mapping[str, Any]
Amount = float | str | Mapping[str, str]
Tensor = (
    float | Sequence[float] | Sequence[Sequence[float]] | torch.Tensor | str | Mapping[str, str]
)
Sites = str | Sequence[str]
Pool = str | Sequence[str] | torch.Tensor  # runs, or a tensor


def _occurrence(kind: str, value: Any, nth: int | str | None, take: str) -> dict[str, Any]:
    out: dict[str, Any] = {kind: value}
    if nth is not None:
        out["nth"] = nth
    return out if take == "all" else out | {"take": take}


def span(text: str, *, nth: int | str | None = None, take: str = "all") -> dict[str, Any]:
    """The tokens over a text; ``nth`` says which where it occurs more than once."""
    return _occurrence("span", text, nth, take)


def regex(
    pattern: str, *, group: int = 0, nth: int | str | None = None, take: str = "all"
) -> dict[str, Any]:
    """The tokens over what a pattern, or one of its groups, matches."""
    found = _occurrence("regex", pattern, nth, take)
    return found | {"group": group} if group else found


def token(text: str | int, *, nth: int | str | None = None) -> dict[str, Any]:
    """A token by its text or id."""
    return _occurrence("token", text, nth, "all")


def same_token_as(where: Where, *, nth: int | str | None = None) -> dict[str, Any]:
    """Other places of the same token."""
    return _occurrence("same_token_as", position(where), nth, "all")


def role(name: str, *, nth: int | str | None = None, take: str = "all") -> dict[str, Any]:
    """A turn of a chat."""
    return _occurrence("role", name, nth, take)


def group(name: str, *, nth: int | str | None = None, take: str = "all") -> dict[str, Any]:
    """A range that the caller has marked."""
    return _occurrence("group", name, nth, take)


def offset(by: int, where: Where) -> dict[str, Any]:
    """So many tokens behind (negative: before) another position."""
    return {"offset": by, "of": position(where)}


def steps(start: int, end: int | None = None) -> dict[str, Any]:
    """Tokens that are generated, from the ``start``-th to before the ``end``-th."""
    return {"generated": [start, end]}


def any_of(*where: Where) -> dict[str, Any]:
    return {"or": [position(w) for w in where]}


def all_of(*where: Where) -> dict[str, Any]:
    return {"and": [position(w) for w in where]}


def but(where: Where) -> dict[str, Any]:
    """Every other position."""
    return {"not": position(where)}


def position(where: Where) -> Any:
    """A selector in JSON form: a number, numbers, a slice, "@name" or one of the functions here."""
    match where:
        case slice(start=start, stop=stop, step=None) if stop is not None:
            return {"range": [start or 0, stop]}
        case slice():
            raise InvalidRequest("a slice needs an end and no step", field="pos", given=where)
        case int():
            return {"index": where}
        case str() | Mapping():
            return where
        case _:
            return {"index": list(where)}


def parameter(name: str) -> dict[str, str]:
    """A trainable parameter that :meth:`Builder.parameter` has declared."""
    return {"param": name}


def program() -> Builder:
    """An empty program."""
    return Builder()


class Builder:
    """A program that grows; every method returns the builder itself or a :class:`Place` of it.

    Attributes:
        blobs: the tensors that were given, by their names in the program.
    """

    def __init__(self) -> None:
        self.data: dict[str, Any] = {}
        self.blobs: dict[str, torch.Tensor] = {}

    def build(self) -> Program:
        """The program; raises InvalidRequest where it makes no sense."""
        return parse_program(self.data)

    def _entry(self, key: str, name: str, value: Any) -> Builder:
        self.data.setdefault(key, {})[name] = value
        return self

    def run(
        self,
        name: str,
        prompt: str | Sequence[int] | None = None,
        *,
        same: str | None = None,
        adapter: str | None = None,
    ) -> Builder:
        """Run another prompt beside the request's own, or (``same``) the same one again."""
        text = prompt if isinstance(prompt, str) or prompt is None else list(prompt)
        given = {"prompt": text, "same": same, "adapter": adapter}
        return self._entry("runs", name, {k: v for k, v in given.items() if v is not None})

    def select(self, name: str, where: Where) -> Builder:
        """Name positions; they are "@name" from then on."""
        return self._entry("sel", name, position(where))

    def set(self, name: str, indices: Sequence[int]) -> Builder:
        """Name layers, heads or experts: "layers.@name.resid.post"."""
        return self._entry("sets", name, list(indices))

    def parameter(self, name: str, shape: Sequence[int] = (), init: Tensor = 0.0) -> Builder:
        """Declare a trainable parameter."""
        return self._entry("params", name, {"shape": list(shape), "init": self._tensor(init)})

    def sweep(self, **variables: Any) -> Builder:
        """Make a row for each combination of the values; "$name" stands for the value."""
        table = self.data.setdefault("sweep", [])
        table += [
            [name, values if isinstance(values, str) else list(values)]
            for name, values in variables.items()
        ]
        return self

    def keep_past(self) -> Builder:
        """``"recompute": false``: leave what a cache can hold of the prompt as it is."""
        self.data["recompute"] = False
        return self

    def at(
        self, site: Sites, pos: Where | None = None, *, run: str | None = None, expand: bool = False
    ) -> Place:
        """Choose sites and positions; what is to be done there follows."""
        place: dict[str, Any] = {"at": site if isinstance(site, str) else list(site)}
        if pos is not None:
            place["pos"] = position(pos)
        if run is not None:
            place["run"] = run
        if expand:
            place["expand"] = True
        return Place(self, place)

    def capture(self, site: Sites, pos: Where | None = None, **more: Any) -> Builder:
        """Bring back values; ``reduce`` and its arguments, ``run``, ``when``, ``name``."""
        reduce = more.get("reduce", "none")
        if reduce not in REDUCTIONS:
            raise InvalidRequest(f"one of {', '.join(REDUCTIONS)}", field="reduce", given=reduce)
        return self._output({"capture": site if isinstance(site, str) else list(site)}, pos, more)

    def measure(self, kind: str, pos: Where | None = None, **more: Any) -> Builder:
        """Bring back a number made from the logits; ``token``, ``a``, ``b``, ``to``, ``run``."""
        if kind not in MEASURES:
            raise InvalidRequest(f"one of {', '.join(MEASURES)}", field="measure", given=kind)
        return self._output({"measure": kind}, pos, more)

    def _output(self, out: dict[str, Any], pos: Where | None, more: dict[str, Any]) -> Builder:
        if pos is not None:
            out["pos"] = position(pos)
        out |= {key: self._tensor(value) for key, value in more.items()}
        self.data.setdefault("out", []).append(out)
        return self

    def _tensor(self, value: Any) -> Any:
        """A tensor becomes a named one; all else stays as it is."""
        if not isinstance(value, torch.Tensor):
            return value
        if value.dim() == 0:
            return float(value)
        name = content_hash(value)
        self.blobs[name] = value
        return f"blob:{name}"


class Place:
    """Sites and positions at which something is to be done; each method adds one step."""

    def __init__(self, builder: Builder, place: dict[str, Any]) -> None:
        self.builder = builder
        self.place = place

    def do(self, name: str, **arguments: Any) -> Builder:
        """Any operation by its name; arguments as in the JSON form, ``from_`` for "from"."""
        if name not in OPERATIONS:
            raise InvalidRequest(
                "there is no operation of this name",
                field="do",
                given=name,
                remedy=f"Known: {', '.join(OPERATIONS)}",
            )
        step = {**self.place, "do": name}
        for key, value in arguments.items():
            if value is not None:
                step[key.rstrip("_")] = self.builder._tensor(value)
        self.builder.data.setdefault("steps", []).append(step)
        return self.builder

    def zero(self) -> Builder:
        return self.do("zero")

    def scale(self, a: Tensor) -> Builder:
        return self.do("scale", a=a)

    def add(self, v: Tensor, c: Amount = 1.0) -> Builder:
        return self.do("add", v=v, c=c)

    def set(self, x: Tensor) -> Builder:
        return self.do("set", x=x)

    def clamp(self, low: Tensor | None = None, high: Tensor | None = None) -> Builder:
        return self.do("clamp", min=low, max=high)

    def noise(self, s: Amount, seed: int = 0) -> Builder:
        return self.do("noise", s=s, seed=seed)

    def mean(self, over: Pool, positions: str = "each", map: str | None = None) -> Builder:
        return self.do("mean", over=_pool(over), positions=positions, map=map)

    def resample(self, pool: Pool, seed: int = 0, map: str | None = None) -> Builder:
        return self.do("resample", pool=_pool(pool), seed=seed, map=map)

    def replace(self, source: str | torch.Tensor, **how: Any) -> Builder:
        """The value in a run (``at``, ``pos``, ``map`` say where), or a tensor."""
        return self.do("replace", from_=_source(source, how))

    def lerp(self, w: Tensor, source: str | torch.Tensor, **how: Any) -> Builder:
        return self.do("lerp", w=w, from_=_source(source, how))

    def project_out(self, basis: Tensor) -> Builder:
        return self.do("project_out", basis=basis)

    def set_coords(self, basis: Tensor, c: Tensor) -> Builder:
        return self.do("set_coords", basis=basis, c=c)

    def swap_coords(self, basis: Tensor, source: str | torch.Tensor, **how: Any) -> Builder:
        return self.do("swap_coords", basis=basis, from_=_source(source, how))

    def edge_block(self, keys: Where, queries: Where, *, renormalise: bool = True) -> Builder:
        return self._edge("edge_block", keys, queries, renormalise=renormalise)

    def edge_only(self, keys: Where, queries: Where, *, renormalise: bool = True) -> Builder:
        return self._edge("edge_only", keys, queries, renormalise=renormalise)

    def edge_scale(
        self, a: Amount, keys: Where, queries: Where, *, renormalise: bool = False
    ) -> Builder:
        return self._edge("edge_scale", keys, queries, a=a, renormalise=renormalise)

    def _edge(self, name: str, keys: Where, queries: Where, **more: Any) -> Builder:
        return self.do(name, from_=position(keys), to=position(queries), **more)

    def expert_on(self, *, renormalise: bool) -> Builder:
        return self.do("expert_on", renormalise=renormalise)

    def expert_off(self, *, renormalise: bool, reroute: bool = False) -> Builder:
        return self.do("expert_off", renormalise=renormalise, reroute=reroute)

    def expert_force(self) -> Builder:
        return self.do("expert_force")

    def router_add(self, v: Tensor) -> Builder:
        return self.do("router_add", v=v)

    def freeze(self, to: str = "plain", except_: Sites | None = None) -> Builder:
        names = list(except_) if isinstance(except_, tuple | list) else except_
        return self.do("freeze", to=to, except_=names)

    def state_reset(self) -> Builder:
        """The tokens find an empty memory; the site is a head's ``state``."""
        return self.do("state_reset")

    def state_replace(self, source: str | torch.Tensor, **how: Any) -> Builder:
        """The tokens find the memory that the source's tokens found."""
        return self.do("state_replace", from_=_source(source, how))

    def use(self, adapter: str) -> Builder:
        """The run's weights are those with an adapter; the site is "weights.delta"."""
        return self.do("use", adapter=adapter)

    def skip(self) -> Builder:
        return self.do("skip")

    def stop(self) -> Builder:
        return self.do("stop")

    def parallel(self, *blocks: Where) -> Builder:
        """Set-based prompting; the site is "input.mask"."""
        return self.do("parallel", blocks=[position(block) for block in blocks])


def _pool(pool: Pool) -> Any:
    return pool if isinstance(pool, str | torch.Tensor) else list(pool)


def _source(source: str | torch.Tensor, how: dict[str, Any]) -> Any:
    if not isinstance(source, str) or source.startswith("blob:"):
        return source
    if "pos" in how:
        how = {**how, "pos": position(how["pos"])}
    return {"run": source, **how}
