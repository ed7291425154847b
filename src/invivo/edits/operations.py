"""The operations as data: their arguments, the sites they may touch, what they lower to."""

from __future__ import annotations

from dataclasses import dataclass

from invivo.edits.site_names import BLOCKS
from invivo.models.sites import SITES

# Groups of sites, by the names that a resolved site has.
_ROWS = frozenset(s.name for s in SITES if s.name not in ("attn.head.score", "attn.head.prob"))
_KEYS = frozenset({"attn.head.score", "attn.head.prob"})
_EDGE = frozenset({"attn.edge", "gla.edge"})
_EXPERT = frozenset({"moe.expert.on"})
_STATE = frozenset({"gla.head.state", "gla.head.memory"})


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of an operation.

    Attributes:
        kind: "value" (one of ``takes``), "source", "selector", "selectors", "sites", "run",
            "other" (a run, or one of another row), "pool" (runs, or a named tensor), "int",
            "ints", "bool", "choice", "text".
        takes: for values: "number", "vector", "matrix", "param"; for choices: the words.
        default: used where the argument is left out and not required.
    """

    name: str
    kind: str
    meaning: str
    required: bool = True
    takes: tuple[str, ...] = ()
    default: float | int | str | bool | None = None


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation.

    Attributes:
        sites: names of the sites it may touch.
        kernel: what it becomes: "affine" (x = a x + b v), "gather" (x = another row), "lowrank"
            (within a subspace), "edge" (lists for the masked attention, or keys of a state),
            "expert", "input" (the request's tokens, positions and mask), "block" (layers left out).
        positions: whether it takes ``pos``.
    """

    name: str
    kernel: str
    sites: frozenset[str]
    arguments: tuple[Argument, ...]
    meaning: str
    positions: bool = True


_AMOUNT = ("number", "param")
_VECTOR = ("number", "vector", "param")
_FROM = Argument("from", "source", "a run, or a named tensor")
_BASIS = Argument("basis", "value", "orthonormal rows", takes=("matrix", "param"))
_QUERIES = Argument("to", "selector", "queries: positions that look")
_RENORMALISE = Argument(
    "renormalise", "bool", "whether what is left is scaled up to sum to one again", takes=()
)


def _edge(name: str, meaning: str, *more: Argument, default: bool) -> Operation:
    keys = Argument("from", "selector", "keys: positions that are looked at")
    renormalise = Argument(
        "renormalise", "bool", _RENORMALISE.meaning, required=False, default=default
    )
    return Operation(
        name,
        "edge",
        _EDGE | frozenset({"input.mask"}) if name != "edge_scale" else _EDGE,
        (*more, keys, _QUERIES, renormalise),
        meaning,
        positions=False,
    )


_TABLE = (
    Operation("zero", "affine", _ROWS | _KEYS, (), "x = 0"),
    Operation(
        "scale",
        "affine",
        _ROWS | _KEYS,
        (Argument("a", "value", "factor", takes=_VECTOR),),
        "x = a x",
    ),
    Operation(
        "add",
        "affine",
        _ROWS,
        (
            Argument("v", "value", "what is added", takes=_VECTOR),
            Argument("c", "value", "times this", False, _AMOUNT, 1.0),
        ),
        "x = x + c v",
    ),
    Operation(
        "set",
        "affine",
        _ROWS,
        (Argument("x", "value", "the new value", takes=_VECTOR),),
        "x = this value",
    ),
    Operation(
        "clamp",
        "affine",
        _ROWS,
        (
            Argument("min", "value", "least", False, ("number", "vector")),
            Argument("max", "value", "most", False, ("number", "vector")),
        ),
        "x is cut to [min, max]",
    ),
    Operation(
        "noise",
        "affine",
        _ROWS,
        (
            Argument("s", "value", "standard deviation", takes=_AMOUNT),
            Argument("seed", "int", "the same seed gives the same noise anywhere", False, (), 0),
        ),
        "x = x + s n, n normal",
    ),
    Operation(
        "mean",
        "gather",
        _ROWS,
        (
            Argument("over", "pool", "runs whose values are averaged, or a tensor of such values"),
            Argument(
                "positions",
                "choice",
                "each: mean over runs at each position; all: one mean over runs and positions",
                takes=("each", "all"),
            ),
            Argument("map", "choice", "pairing", False, ("index", "end", "selector"), None),
        ),
        "x = the mean of runs, or of a tensor's rows",
    ),
    Operation(
        "resample",
        "gather",
        _ROWS,
        (
            Argument(
                "pool",
                "pool",
                "runs of which one is drawn for the step, or a tensor of such values",
            ),
            Argument("seed", "int", "of the draw", False, (), 0),
            Argument("map", "choice", "pairing", False, ("index", "end", "selector"), None),
        ),
        "x = the value in a run, or the row of a tensor, drawn from a pool",
    ),
    Operation("replace", "gather", _ROWS | _KEYS, (_FROM,), "x = the source"),
    Operation(
        "lerp",
        "gather",
        _ROWS | _KEYS,
        (Argument("w", "value", "weight of its own value", takes=_VECTOR), _FROM),
        "x = w x + (1 - w) source",
    ),
    Operation(
        "project_out",
        "lowrank",
        _ROWS,
        (_BASIS,),
        "x loses its part in the space of the basis",
    ),
    Operation(
        "set_coords",
        "lowrank",
        _ROWS,
        (_BASIS, Argument("c", "value", "new coordinates", takes=_VECTOR)),
        "x's coordinates in the basis become c",
    ),
    Operation(
        "swap_coords",
        "lowrank",
        _ROWS,
        (_BASIS, _FROM),
        "x's coordinates in the basis become the source's",
    ),
    _edge("edge_block", "queries do not see these keys", default=True),
    _edge("edge_only", "queries see these keys alone", default=True),
    _edge(
        "edge_scale",
        "attention probabilities of these pairs are multiplied by a",
        Argument("a", "value", "factor", takes=_AMOUNT),
        default=False,
    ),
    Operation(
        "expert_on",
        "expert",
        _EXPERT,
        (_RENORMALISE,),
        "the expert runs beside the chosen ones, with the router's weight",
    ),
    Operation(
        "expert_off",
        "expert",
        _EXPERT,
        (
            _RENORMALISE,
            Argument("reroute", "bool", "whether another is chosen instead", False, (), False),
        ),
        "the expert has weight 0",
    ),
    Operation(
        "expert_force",
        "expert",
        _EXPERT,
        (),
        "these experts run and no others, weighted by a softmax over them",
    ),
    Operation(
        "router_add",
        "expert",
        frozenset({"moe.router"}),
        (Argument("v", "value", "what is added to the router's logits", takes=_VECTOR),),
        "logits of the router + v, before experts are chosen",
    ),
    Operation(
        "freeze",
        "gather",
        _ROWS | _KEYS,
        (
            Argument("to", "run", "run whose values stay", False, (), "plain"),
            Argument("except", "sites", "names that are left alone", False),
            Argument("map", "choice", "pairing", False, ("index", "end", "selector"), None),
        ),
        "everything listed has that run's values",
    ),
    Operation(
        "skip", "block", BLOCKS, (), "the layer, its attention or its feed-forward writes nothing"
    ),
    Operation(
        "stop",
        "block",
        frozenset({"block"}),
        (),
        "nothing after this layer is computed",
        positions=False,
    ),
    Operation(
        "set_tokens",
        "input",
        frozenset({"input.tokens"}),
        (Argument("ids", "ints", "one token id for each position"),),
        "the prompt has other tokens there",
    ),
    Operation(
        "set_positions",
        "input",
        frozenset({"input.position"}),
        (Argument("values", "ints", "one position number for each token"),),
        "rotary and learned positions see these numbers",
    ),
    Operation(
        "parallel",
        "input",
        frozenset({"input.mask"}),
        (Argument("blocks", "selectors", "adjacent blocks of tokens, at least two"),),
        "blocks start at the same position and do not see each other (set-based prompting)",
        positions=False,
    ),
    Operation(
        "use",
        "input",
        frozenset({"weights.delta"}),
        (Argument("adapter", "text", "name of a loaded adapter"),),
        "the run's weights are those with this adapter",
        positions=False,
    ),
    Operation("state_reset", "affine", _STATE, (), "the token finds an empty memory"),
    Operation(
        "state_replace",
        "gather",
        _STATE,
        (_FROM,),
        "the token finds the memory that the source's token found",
    ),
)

OPERATIONS: dict[str, Operation] = {operation.name: operation for operation in _TABLE}

# What a capture may bring back in place of the value itself.
REDUCTIONS: dict[str, tuple[Argument, ...]] = {
    "none": (),
    "mean": (),
    "norm": (),
    "dot": (Argument("v", "value", "a vector", takes=("vector",)),),
    "cos": (Argument("v", "value", "a vector", takes=("vector",)),),
    "lens": (
        Argument("top", "int", "how many of the likeliest tokens", False),
        Argument("tokens", "tokens", "tokens whose log-probabilities are wanted", False),
        Argument("sets", "token_sets", "sets of tokens, each a log-sum of probabilities", False),
    ),
    "direct": (
        Argument("tokens", "tokens", "tokens whose logits the value has a direct share in"),
    ),
    "probe": (
        Argument("w", "value", "[classes, width]", takes=("matrix",)),
        Argument("b", "value", "[classes]", False, ("number", "vector"), 0.0),
    ),
}

MEASURES: dict[str, tuple[Argument, ...]] = {
    "logit": (Argument("token", "token", "which token"),),
    "logprob": (Argument("token", "token", "which token"),),
    "prob": (Argument("token", "token", "which token"),),
    "rank": (Argument("token", "token", "which token; 0 is the likeliest"),),
    "logit_diff": (
        Argument("a", "token", "logit of this token"),
        Argument("b", "token", "minus that of this one"),
    ),
    "kl": (
        Argument("to", "other", "the other run, or the other row of the sweep"),
        Argument("map", "choice", "pairing", False, ("index", "end", "selector"), None),
    ),
}
