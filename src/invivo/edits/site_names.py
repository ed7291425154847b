"""Names of sites with wildcards: parsing, printing, and what they mean for one model.

``layers.9-20.attn.head.*.z`` is site ``attn.head.z`` of :mod:`invivo.models.sites` in layers 9 to
20, all heads. An index is a number, a range with both ends in it, a list, ``*``, or ``@name`` for a
set of the program. ``*`` for layers means all that have the site; layers that are named must have
it. ``[j]`` at the end picks numbers of the last dimension: ``layers.3.mlp.neuron[5,7-9]``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from invivo.edits.transformer_lens_names import from_transformer_lens
from invivo.errors import InvalidRequest
from invivo.models.config import ModelConfig
from invivo.models.sites import SITES, why_lacking

# An index: None for *, a name for @name, or ranges with both ends in them.
Index = None | str | tuple[tuple[int, int], ...]

_SHAPES = {site.name: site.shape.split(", ") for site in SITES}
_OUTSIDE = frozenset(site.name for site in SITES if not site.in_layer)
# The word before which a site is cut into heads or experts, by the letter of its first dimension.
_INDEXED = ("head", "kvhead", "expert")
# Names that only some operations take; see operations.py. The model has no tensor of that name.
INPUTS = frozenset({"input.tokens", "input.position", "input.mask", "weights.delta"})
BLOCKS = frozenset({"block", "attn", "mlp"})
_HEAD_KV = frozenset({"attn.head.k", "attn.head.v", "attn.head.k.rot"})
# Edges of all heads, by those of one.
_HEAD_EDGES = {"attn.head.edge": "attn.edge", "gla.head.edge": "gla.edge"}
EDGES = frozenset(_HEAD_EDGES.values())
_PSEUDO = BLOCKS | _HEAD_KV | EDGES | _HEAD_EDGES.keys() | {"moe.expert.on"}
_LONGEST = 300
_MOST_RANGES = 4096
_MOST = 10**6
_RANGE = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?")


@dataclass(frozen=True, slots=True)
class SitePattern:
    """A name as it was written, taken apart.

    Attributes:
        site: its name in :mod:`invivo.models.sites`, or one of the names of this module.
        layers: which layers; None for all that have the site. Unused outside layers.
        heads: which heads, key heads or experts; None for all.
        components: which numbers of the last dimension; () for all.
        alias: the TransformerLens name that was written, if it was one.
    """

    site: str
    layers: Index = None
    heads: Index = None
    components: tuple[tuple[int, int], ...] = ()
    alias: str | None = None


@dataclass(frozen=True, slots=True)
class SiteRef:
    """One site of one layer of a model (-1: outside layers).

    Attributes:
        site: a name of :mod:`invivo.models.sites`, "moe.expert.on", one of :data:`EDGES`,
            :data:`INPUTS` or :data:`BLOCKS`.
        heads: heads, key heads or experts, in order; None where the site has none, () for none
            in particular (edges of all heads).
        components: numbers of the last dimension; None for all.
        expanded: the heads are query heads, whose shared keys or values are copied first.
    """

    site: str
    layer: int
    heads: tuple[int, ...] | None = None
    components: tuple[int, ...] | None = None
    expanded: bool = False


def parse_site(text: str, path: str) -> SitePattern:
    """Take a name apart.

    Raises:
        InvalidRequest: the grammar is broken or there is no such site in any model.
    """
    if not isinstance(text, str) or not text:
        raise InvalidRequest("the name of a site is needed", field=path, given=text)
    if len(text) > _LONGEST:
        raise InvalidRequest(f"at most {_LONGEST} characters", field=path, given=text)
    alias = None
    if text.startswith(("blocks.", "hook_", "ln_final.", "unembed")):
        alias, text = text, from_transformer_lens(text, path)
    body, components = _cut_components(text, path)
    parts = body.split(".")
    if parts[0] != "layers":
        name = "embed.out" if body == "input.embeds" else body
        if name not in _OUTSIDE | INPUTS:
            raise _unknown(text, path)
        return SitePattern(name, components=components, alias=alias)
    if len(parts) < 2:
        raise _unknown(text, path)
    layers = parse_index(parts[1], path)
    rest = parts[2:]
    heads: Index = None
    for word in _INDEXED:
        if word in rest:
            at = rest.index(word)
            if at + 1 >= len(rest):
                raise InvalidRequest(f"{word} needs an index", field=path, given=text)
            heads = parse_index(rest.pop(at + 1), path)
    name = ".".join(rest) or "block"
    if name == "moe.expert":
        name = "moe.expert.on"
    if name not in _PSEUDO and (name not in _SHAPES or name in _OUTSIDE):
        raise _unknown(text, path)
    return SitePattern(name, layers, heads, components, alias)


def _cut_components(text: str, path: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """``a.b[3,5]`` -> ``a.b`` and the ranges; a list that is a whole part is left alone."""
    if not text.endswith("]"):
        return text, ()
    at = text.rindex("[") if "[" in text else -1
    if at <= 0 or text[at - 1] == ".":
        return text, ()
    index = parse_index(text[at:], path)
    assert isinstance(index, tuple)
    return text[:at], index


def parse_index(text: str, path: str) -> Index:
    """``5``, ``3-9``, ``[0,4-7]``, ``*`` or ``@name``."""
    if text == "*":
        return None
    if text.startswith("@") and len(text) > 1:
        return text[1:]
    inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    pieces = inner.split(",") if inner is not text else [inner]
    ranges = []
    for piece in pieces[:_MOST_RANGES]:
        match = _RANGE.fullmatch(piece.strip())
        low = int(match[1]) if match else 1
        high = int(match[2] or match[1]) if match else 0
        if low > high:
            raise InvalidRequest(
                "this is no index",
                field=path,
                given=text,
                remedy="Write 5, 3-9, [0,4,7], * or @name",
            )
        ranges.append((low, high))
    return tuple(ranges)


def _unknown(text: str, path: str) -> InvalidRequest:
    return InvalidRequest(
        "there is no site of this name",
        field=path,
        given=text,
        remedy="For instance layers.5.resid.post, layers.9-20.attn.head.*.z, final.norm.out; "
        "all are listed in docs/interventions.md",
    )


def format_index(index: Index) -> str:
    if index is None:
        return "*"
    if isinstance(index, str):
        return f"@{index}"
    shown = [str(a) if a == b else f"{a}-{b}" for a, b in index]
    return shown[0] if len(shown) == 1 else f"[{','.join(shown)}]"


def format_site(pattern: SitePattern) -> str:
    """The canonical spelling; parsing it gives the pattern back.

    A TransformerLens name stays one: whether it means the same depends on the model.
    """
    if pattern.alias is not None:
        return pattern.alias
    name = pattern.site
    if name not in _OUTSIDE and name not in INPUTS:
        parts = [] if name == "block" else name.split(".")
        for word in _INDEXED:
            if word in parts:
                parts.insert(parts.index(word) + 1, format_index(pattern.heads))
        name = ".".join(["layers", format_index(pattern.layers), *parts])
    if not pattern.components:
        return name
    return f"{name}[{','.join(str(a) if a == b else f'{a}-{b}' for a, b in pattern.components)}]"


def format_ref(ref: SiteRef) -> str:
    """One site of one layer by its full name, for explanations and results."""

    def ranges(indices: tuple[int, ...]) -> Index:
        out: list[tuple[int, int]] = []
        for i in indices:
            if out and out[-1][1] == i - 1:
                out[-1] = (out[-1][0], i)
            else:
                out.append((i, i))
        return tuple(out)

    name = ref.site
    if ref.expanded:
        name = name.replace("kvhead", "head")
    elif name in EDGES and ref.heads:
        name = name.replace(".edge", ".head.edge")
    components = ranges(ref.components) if ref.components is not None else ()
    return format_site(
        SitePattern(
            name,
            ranges((ref.layer,)),
            ranges(ref.heads) if ref.heads else None,
            components if isinstance(components, tuple) else (),
        )
    )


def head_sizes(config: ModelConfig, site: str, *, n_keys: int = 0) -> tuple[int, ...]:
    """Shape of ``site`` for one row, and one head where it is cut into heads (keys: ``n_keys``)."""
    letters = _SHAPES[site]
    sizes = tuple(_size(config, site, letter, n_keys) for letter in letters)
    return sizes[1:] if len(letters) > 1 else sizes


def last_size(config: ModelConfig, site: str, *, n_keys: int = 0) -> int:
    """Numbers in the last dimension of ``site`` (keys: ``n_keys``)."""
    return head_sizes(config, site, n_keys=n_keys)[-1]


def head_count(config: ModelConfig, site: str) -> int | None:
    """Heads, key heads or experts that ``site`` is cut into; None if it is not."""
    if site == "moe.expert.on":
        return config.moe.n_experts if config.moe else 0
    if site == "moe.expert.weight":
        return _size(config, site, "E", 0)
    shape = ["H", ""] if site in EDGES else _SHAPES.get(site, ["d"])
    return _size(config, site, shape[0], 0) if len(shape) > 1 else None


def _size(config: ModelConfig, site: str, letter: str, n_keys: int) -> int:
    if site.startswith("gla."):
        assert config.gla is not None
        return {"H": config.gla.n_heads, "K": config.gla.head_k, "V": config.gla.head_v}[letter]
    match letter:
        case "1":
            return 1
        case "d":
            return config.d_model
        case "H":
            return config.n_heads
        case "G":
            return config.n_kv_heads
        case "D":
            return config.head_dim
        case "f":
            return config.d_ff
        case "E":
            return config.moe.n_experts if config.moe else 0
        case "V":
            return config.vocab_size
        case _:
            return n_keys


def _why_not(config: ModelConfig, site: str, layer: int) -> str | None:
    """:func:`why_lacking`, for the names of this module too."""
    if site.startswith("gla.") and not config.recurrent:
        return f"{config.family} has no gated linear attention"
    stands_for = {
        "moe.expert.on": "moe.router",
        "attn.edge": "attn.head.score",
        "gla.edge": "gla.head.z",
    }.get(site)
    if site in BLOCKS:
        stands_for = "resid.pre"
    return why_lacking(config, stands_for or site, layer)


def resolve_site(
    pattern: SitePattern,
    config: ModelConfig,
    sets: Mapping[str, tuple[int, ...]],
    path: str,
    *,
    expand: bool = False,
) -> list[SiteRef]:
    """The sites that a pattern means in this model, in order of layers.

    Args:
        sets: what ``@name`` stands for.
        expand: accept single heads' keys and values where heads share them.

    Raises:
        InvalidRequest: the model lacks the site (with the reason), an index is out of range, or a
            set is unknown.
    """
    site, heads = pattern.site, pattern.heads
    expanded = False
    _check_alias(pattern, config, path)
    if site in INPUTS:
        reason = _why_no_input(config, site)
        if reason is not None:
            raise InvalidRequest(reason, field=path, given=site)
        return [SiteRef(site, -1)]
    if site in _HEAD_KV:
        site = site.replace("head", "kvhead")
        shared = config.n_heads != config.n_kv_heads
        if shared and not expand:
            raise InvalidRequest(
                f"{config.n_heads // config.n_kv_heads} query heads share one key head here",
                field=path,
                given=format_site(pattern),
                remedy='Edit kvhead, or copy them for this request with "expand": true',
            )
        expanded = shared
    site = _HEAD_EDGES.get(site, site)
    if site in _OUTSIDE:
        layers = [-1]
    else:
        layers = _layers_of(pattern, site, config, sets, path)
    chosen: tuple[int, ...] | None = None
    count = config.n_heads if expanded else head_count(config, site)
    if pattern.site in EDGES:
        chosen = ()
    elif count is not None:
        chosen = _indices(heads, count, sets, path, "heads or experts", pattern)
    components: tuple[int, ...] | None = None
    if pattern.components:
        if site not in _SHAPES or _SHAPES[site][-1] in ("1", "K") or site == "moe.expert.weight":
            raise InvalidRequest(
                "this site cannot be cut by [..]", field=path, given=format_site(pattern)
            )
        components = _indices(
            pattern.components, last_size(config, site), {}, path, "numbers", pattern
        )
    return [SiteRef(site, layer, chosen, components, expanded) for layer in layers]


def _why_no_input(config: ModelConfig, site: str) -> str | None:
    """Why this model's input cannot be changed there; None if it can."""
    if site == "input.mask" and config.recurrent:
        return (
            f"layer {config.recurrent[0]} carries a state from token to token, in which no mask "
            "can hide a token; see gla.edge"
        )
    if site == "input.position" and not (config.ropes or config.learned_positions):
        return "this model has no positions"
    return None


def _check_alias(pattern: SitePattern, config: ModelConfig, path: str) -> None:
    """Refuse names that mean another quantity in TransformerLens for this kind of model."""
    reason = None
    if pattern.alias is None:
        return
    if pattern.site == "embed.out" and config.learned_positions:
        reason = "embed.out has the learned position added, hook_embed has not"
    elif config.qk_norm != "none" and pattern.site in ("attn.head.q", "attn.kvhead.k"):
        reason = "TransformerLens takes it before the norm of queries and keys, invivo after"
    if reason is not None:
        raise InvalidRequest(reason, field=path, given=pattern.alias)


def _layers_of(
    pattern: SitePattern,
    site: str,
    config: ModelConfig,
    sets: Mapping[str, tuple[int, ...]],
    path: str,
) -> list[int]:
    if pattern.layers is None:
        layers = [i for i in range(config.n_layers) if _why_not(config, site, i) is None]
        if not layers:
            raise InvalidRequest(
                str(_why_not(config, site, 0)), field=path, given=format_site(pattern)
            )
        return layers
    named = _indices(pattern.layers, config.n_layers, sets, path, "layers", pattern)
    for layer in named:
        reason = _why_not(config, site, layer)
        if reason is not None:
            raise InvalidRequest(f"layer {layer}: {reason}", field=path, given=format_site(pattern))
    return list(named)


def _indices(
    index: Index,
    count: int,
    sets: Mapping[str, tuple[int, ...]],
    path: str,
    what: str,
    pattern: SitePattern,
) -> tuple[int, ...]:
    if index is None:
        return tuple(range(count))
    if isinstance(index, str):
        if index not in sets:
            raise InvalidRequest(
                f"there is no set @{index}",
                field=path,
                given=format_site(pattern),
                remedy=f"Known: {', '.join(sorted(sets)) or 'none'}",
            )
        found = set(sets[index])
    else:
        if index[-1][1] >= count or any(high >= count for _, high in index):
            raise InvalidRequest(
                f"there are {count} {what} here, numbered from 0",
                field=path,
                given=format_site(pattern),
            )
        found = {i for low, high in index for i in range(low, high + 1)}
    if found and max(found) >= count:
        raise InvalidRequest(
            f"there are {count} {what} here, numbered from 0",
            field=path,
            given=format_site(pattern),
        )
    return tuple(sorted(found))


_RANK = {site.name: i for i, site in enumerate(SITES)}
# Where in a layer the pseudo-sites take effect.
_RANK |= {
    "block": _RANK["resid.pre"],
    "attn": _RANK["resid.pre"],
    "mlp": _RANK["resid.mid"],
    "attn.edge": _RANK["attn.head.score"],
    "gla.edge": _RANK["gla.head.state"],
    "moe.expert.on": _RANK["moe.router"],
    "weights.delta": -4,
    "input.tokens": -3,
    "input.position": -2,
    "input.mask": -1,
}


def forward_order(site: str, layer: int, n_layers: int) -> tuple[int, int]:
    """Sites sorted by this key stand in the order in which a forward pass reaches them."""
    if site in INPUTS or site == "embed.out":
        return -1, _RANK[site]
    return (n_layers if layer < 0 else layer), _RANK[site]
