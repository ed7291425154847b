"""The arithmetic of every operation, on dense tensors: the readable definition."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from invivo.edits.blobs import Blobs
from invivo.edits.resolved import Touch
from invivo.edits.site_names import SiteRef
from invivo.edits.values import Blob, Param, Value


@dataclass(frozen=True, slots=True)
class Context:
    """What arguments are looked up in, and the numbers' type."""

    dtype: torch.dtype
    device: torch.device
    blobs: Blobs
    params: Mapping[str, torch.Tensor]

    def tensor(self, value: Value) -> torch.Tensor:
        """An argument as a tensor."""
        match value:
            case Blob(name):
                return self.blobs.get(name, "blobs").to(self.device, self.dtype)
            case Param(name):
                return self.params[name]
            case _:
                return torch.tensor(value, dtype=self.dtype, device=self.device)


def _index(value: torch.Tensor, rows: Sequence[int], ref: SiteRef) -> tuple[torch.Tensor, ...]:
    """Indices that pick [rows, heads if there are any, numbers] of ``value``."""
    wanted: list[Sequence[int]] = [rows]
    if ref.heads:
        wanted.append(ref.heads)
    if len(wanted) < value.dim():
        wanted.append(ref.components or range(value.shape[-1]))
    assert len(wanted) == value.dim()
    tensors = [torch.tensor(list(w), dtype=torch.int64, device=value.device) for w in wanted]
    return torch.meshgrid(*tensors, indexing="ij")


def read_part(value: torch.Tensor, rows: Sequence[int], ref: SiteRef) -> torch.Tensor:
    """The part of a site's tensor [T, ...] that ``ref`` names, at ``rows``; a copy."""
    return value[_index(value, rows, ref)]


def change_rows(
    touch: Touch,
    ref: SiteRef,
    value: torch.Tensor,
    sources: Sequence[torch.Tensor],
    context: Context,
) -> torch.Tensor:
    """``value`` [T, ...] after an operation on rows.

    Args:
        ref: the heads as this model numbers them.
        sources: values read from runs, one row for each row that changes, or one for all.
    """
    rows = touch.positions.below(value.shape[0])
    if not rows:
        return value
    index = _index(value, rows, ref)
    x = value[index]
    which = slice(0, len(rows))
    changed = _changed(touch, x, rows, which, value, sources, context)
    return value.index_put(index, changed.expand_as(x))


def change_piece(touch: Touch, value: torch.Tensor, start: int, context: Context) -> torch.Tensor:
    """Positions ``start``, ``start + 1``, ... of a site's tensor [n, ...] after an operation on
    rows that reads no run, or after a block was left out; ``value`` itself where it has none."""
    everything = touch.positions.below(start + value.shape[0])
    first = bisect_left(everything, start)
    positions = everything[first:]
    if not positions:
        return value
    rows = [i - start for i in positions]
    if touch.kernel == "block":
        return value.index_fill(0, torch.tensor(rows, device=value.device), 0.0)
    index = _index(value, rows, touch.ref)
    x = value[index]
    which = slice(first, len(everything))
    changed = _changed(touch, x, positions, which, value, (), context)
    return value.index_put(index, changed.to(x.dtype).expand_as(x))


def _changed(
    touch: Touch,
    x: torch.Tensor,
    positions: Sequence[int],
    which: slice,
    value: torch.Tensor,
    sources: Sequence[torch.Tensor],
    context: Context,
) -> torch.Tensor:
    """``x`` [positions, ...] changed; ``which`` of the touch's positions these are."""
    args = touch.args

    def argument(name: str) -> torch.Tensor:
        found = context.tensor(args[name])
        # The rows of a basis are directions, however few positions there are.
        per_position = name != "basis" and found.dim() == x.dim() and found.shape[0] > 1
        return found[which] if per_position else found

    def source() -> torch.Tensor:
        if touch.sources[0].blob is None:
            return sum(sources[1:], sources[0]) / len(sources) if len(sources) > 1 else sources[0]
        blob = context.tensor(Blob(touch.sources[0].blob))
        return blob[which] if blob.dim() == x.dim() and blob.shape[0] > 1 else blob

    match touch.do:
        case "zero":
            return torch.zeros_like(x)
        case "scale":
            return _scaled(x, argument("a"))
        case "add":
            return x + argument("c") * argument("v")
        case "router_add":
            return x + argument("v")
        case "set":
            return argument("x").expand_as(x)
        case "clamp":
            if args["min"] is not None:
                x = torch.maximum(x, argument("min"))
            return x if args["max"] is None else torch.minimum(x, argument("max"))
        case "noise":
            return x + argument("s") * _noise(touch, positions, value).to(x)
        case "replace":
            return source().expand_as(x)
        case "lerp":
            w, other = argument("w"), source()
            # Written so that masked scores (-inf) stay what they are.
            return torch.where(x == other, x, w * x + (1.0 - w) * other)
        case "project_out":
            basis = argument("basis")
            return x - (x @ basis.T) @ basis
        case "set_coords":
            basis = argument("basis")
            return x + (argument("c") - x @ basis.T) @ basis
        case "swap_coords":
            basis = argument("basis")
            return x + (source() @ basis.T - x @ basis.T) @ basis
        case _:
            raise AssertionError(touch.do)


def _scaled(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Hidden keys (-inf) stay hidden, whatever the factor."""
    return torch.where(x == -torch.inf, x, x * factor)


def _noise(touch: Touch, rows: Sequence[int], value: torch.Tensor) -> torch.Tensor:
    """Noise for the part that a touch names, the same whatever else it names."""
    ref = touch.ref
    one_a_head = ref.heads is not None and value.dim() == 2
    width = 1 if one_a_head else value.shape[-1]
    heads: Sequence[int] = ref.heads or (0,)
    drawn = torch.stack(
        [torch.stack([noise_of(touch.args["seed"], ref, p, h, width) for h in heads]) for p in rows]
    )
    if one_a_head:
        return drawn[..., 0]
    if ref.components is not None:
        drawn = drawn[..., list(ref.components)]
    return drawn if ref.heads else drawn[:, 0]


def noise_of(seed: int, ref: SiteRef, position: int, head: int, width: int) -> torch.Tensor:
    """Normal numbers that depend on nothing else: not on the batch, the chunk or the machine."""
    name = f"{seed}/{ref.site}/{ref.layer}/{position}/{head}".encode()
    number = int.from_bytes(hashlib.sha256(name).digest()[:7], "big")
    generator = torch.Generator().manual_seed(number)
    return torch.randn(width, generator=generator, dtype=torch.float64)


# Attention edges.


def _pairs(touch: Touch, value: torch.Tensor) -> torch.Tensor:
    """[T, H, K] bool: the pairs of query and key in the heads of an edge operation."""
    assert touch.keys is not None
    n_rows, n_heads, n_keys = value.shape
    queries = torch.zeros(n_rows, 1, 1, dtype=torch.bool)
    queries[touch.positions.below(n_rows)] = True
    heads = torch.zeros(1, n_heads, 1, dtype=torch.bool)
    heads[:, list(touch.ref.heads or range(n_heads))] = True
    keys = torch.zeros(1, 1, n_keys, dtype=torch.bool)
    keys[..., touch.keys.below(n_keys)] = True
    if touch.do == "edge_only":
        keys = ~keys
    return (queries & heads & keys).to(value.device)


def change_edges(
    touch: Touch, value: torch.Tensor, context: Context, *, scores: bool
) -> torch.Tensor:
    """Scores or probabilities [T, H, K] after an edge operation."""
    pairs = _pairs(touch, value)
    if scores:
        return value.masked_fill(pairs, -torch.inf)
    if touch.do == "edge_scale":
        changed = torch.where(pairs, value * context.tensor(touch.args["a"]), value)
    else:
        changed = value.masked_fill(pairs, 0.0)
    if not touch.args["renormalise"]:
        return changed
    total = changed.sum(-1, keepdim=True)
    # Rows without an edge that changed keep every bit; rows with nothing left mix nothing.
    rescaled = torch.where(total == 0, changed, changed / total)
    return torch.where(pairs.any(-1, keepdim=True) & (changed != value).any(), rescaled, changed)


# Mixtures of experts.


def change_router(touch: Touch, value: torch.Tensor) -> torch.Tensor:
    """Router logits [T, E] after expert_force, or expert_off with another in its place."""
    rows = touch.positions.below(value.shape[0])
    experts = list(touch.ref.heads or ())
    hidden = torch.zeros(value.shape, dtype=torch.bool, device=value.device)
    if touch.do == "expert_force":
        hidden[rows] = True
    for e in experts:
        hidden[rows, e] = touch.do != "expert_force"
    return value.masked_fill(hidden, -torch.inf)


def change_weights(touch: Touch, value: torch.Tensor, router: torch.Tensor) -> torch.Tensor:
    """Weights of the experts [T, E] after expert_on or expert_off.

    An expert that is switched on gets what the router gives it, on the scale of those that were
    chosen.
    """
    chosen = value > 0
    probs = torch.softmax(router, -1)
    scale = value.sum(-1, keepdim=True) / (probs * chosen).sum(-1, keepdim=True)
    rows = touch.positions.below(value.shape[0])
    switched = torch.zeros_like(chosen)
    for e in touch.ref.heads or ():
        switched[rows, e] = True
    if touch.do == "expert_on":
        changed = torch.where(switched & ~chosen, probs * scale, value)
    else:
        changed = value.masked_fill(switched, 0.0)
    if not touch.args["renormalise"]:
        return changed
    total = changed.sum(-1, keepdim=True)
    rescaled = changed * (value.sum(-1, keepdim=True) / total.masked_fill(total == 0, 1.0))
    return torch.where((changed != value).any(-1, keepdim=True), rescaled, changed)


def skip_rows(touch: Touch, value: torch.Tensor) -> torch.Tensor:
    """What a skipped block writes to the residual stream: nothing, at its positions."""
    rows = torch.zeros(value.shape[0], 1, dtype=torch.bool)
    rows[touch.positions.below(value.shape[0])] = True
    return value.masked_fill(rows.to(value.device), 0.0)


def copies_of(ref: SiteRef, share: int) -> list[SiteRef]:
    """``ref`` in a model whose key heads have been copied ``share`` times: once for each copy."""
    if share == 1 or ref.expanded or "kvhead" not in ref.site or ref.heads is None:
        return [ref]
    return [replace(ref, heads=tuple(g * share + i for g in ref.heads)) for i in range(share)]
