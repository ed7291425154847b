"""The arithmetic of every operation, on dense tensors: the readable definition."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from invivo.edits.blobs import Blobs
from invivo.edits.resolved import Touch
from invivo.edits.selectors import Positions
from invivo.edits.site_names import BLOCKS, SiteRef
from invivo.edits.values import Blob, Param, Value
from invivo.models.sites import KeyShare

_FAR = 1 << 40  # longer than any text


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a tensor at which a touch acts.

    Attributes:
        index: rows of the tensor.
        positions: the tokens that they belong to.
        first: the place of the first among the touch's positions; the others follow it.
    """

    index: Sequence[int]
    positions: Sequence[int]
    first: int = 0

    @property
    def piece(self) -> slice:
        """These rows' places among the touch's positions."""
        return slice(self.first, self.first + len(self.index))


def whole_text(touch: Touch, n_rows: int) -> Rows:
    """The rows of a touch where row i belongs to token i."""
    at = touch.positions.below(n_rows)
    return Rows(at, at)


@dataclass(frozen=True, slots=True)
class Context:
    """What arguments are looked up in, and the numbers' type.

    Constants go to the device once.
    """

    dtype: torch.dtype
    device: torch.device
    blobs: Blobs
    params: Mapping[str, torch.Tensor]
    _known: dict[object, torch.Tensor] = field(default_factory=dict)

    def tensor(self, value: Value) -> torch.Tensor:
        """An argument as a tensor, which is not to be written to."""
        if isinstance(value, Param):
            return self.params[value.name]
        if isinstance(value, float | int):
            return torch.full((), value, dtype=self.dtype, device=self.device)
        found = self._known.get(value)
        if found is None:
            with torch.inference_mode(False):  # gradients may be taken later
                if isinstance(value, Blob):
                    found = self.blobs.get(value.name, "blobs").to(self.device, self.dtype)
                else:
                    found = torch.tensor(value, dtype=self.dtype, device=self.device)
            self._known[value] = found
        return found

    def mean(self, blob: Blob, n_left: int) -> torch.Tensor:
        """The mean of a tensor over all but its last ``n_left`` dimensions."""
        found = self._known.get((blob, n_left))
        if found is None:
            whole = self.tensor(blob)
            found = whole.flatten(0, whole.dim() - n_left - 1).mean(0)
            self._known[blob, n_left] = found
        return found


# Operations that need nothing but the row and a constant: those of many runs are one launch.
TOGETHER = frozenset({"zero", "scale", "add", "set"})

Index = tuple[slice | torch.Tensor, ...]


def _index(value: torch.Tensor, rows: Sequence[int], ref: SiteRef) -> Index:
    """What picks [rows, heads if there are any, numbers] of ``value``, of a state [rows, heads,
    keys, values]; slices wherever they do."""
    picked: list[Sequence[int]] = [rows]
    if ref.heads:
        picked.append(ref.heads)
    if len(picked) < value.dim() and ref.components:
        while len(picked) < value.dim() - 1:  # the keys of a state
            picked.append(range(value.shape[len(picked)]))
        picked.append(ref.components)
    slices = [_as_slice(wanted) for wanted in picked]
    if sum(s is None for s in slices) == 0:
        return tuple(s for s in slices if s is not None)
    # Several lists of indices pick every combination if each has a dimension of its own.
    return tuple(
        _numbers(wanted, value.device).view([-1] + [1] * (len(picked) - 1 - i))
        for i, wanted in enumerate(picked)
    )


def _numbers(wanted: Sequence[int], device: torch.device) -> torch.Tensor:
    """An index on the device, for which the host waits for nothing."""
    index = torch.tensor(list(wanted), dtype=torch.int64)
    return index if device.type == "cpu" else index.pin_memory().to(device, non_blocking=True)


def _as_slice(wanted: Sequence[int]) -> slice | None:
    """The same as a slice, if it is a range that counts up by one."""
    first, n = wanted[0], len(wanted)
    if wanted[-1] - first != n - 1 or first < 0:
        return None
    if isinstance(wanted, range) or all(b - a == 1 for a, b in itertools.pairwise(wanted)):
        return slice(first, first + n)
    return None


def read_part(value: torch.Tensor, rows: Sequence[int], ref: SiteRef) -> torch.Tensor:
    """The part of a site's tensor [T, ...] that ``ref`` names, at ``rows``; a copy."""
    index = _index(value, rows, ref)
    return value[index].clone() if isinstance(index[0], slice) else value[index]


def change_rows(
    touch: Touch,
    ref: SiteRef,
    value: torch.Tensor,
    sources: Sequence[torch.Tensor],
    context: Context,
    rows: Rows | None = None,
) -> torch.Tensor:
    """``value`` [T, ...] after an operation on rows.

    Args:
        ref: the heads as this model numbers them.
        sources: values read from runs, one row for each row that changes, or one for all.
        rows: which rows of ``value`` change; None: ``value`` is a whole text.
    """
    rows = whole_text(touch, value.shape[0]) if rows is None else rows
    if not rows.index:
        return value
    index = _index(value, rows.index, ref)
    new = value.clone()
    # Of that copy, because the model may go on in place in ``value``.
    x = new[index].clone() if isinstance(index[0], slice) else new[index]
    new[index] = _changed(touch, x, rows, value, sources, context).expand_as(x)
    return new


def own_value(touch: Touch, context: Context) -> torch.Tensor | None:
    """What :data:`TOGETHER` changes by, where that is the same at all its positions."""
    if any(isinstance(value, Param) for value in touch.args.values()):
        return None  # it may be another one in the next step
    match touch.do:
        case "zero":
            return context.tensor(0.0)
        case "scale":
            value = context.tensor(touch.args["a"])
        case "add":
            value = context.tensor(touch.args["c"]) * context.tensor(touch.args["v"])
        case _:
            value = context.tensor(touch.args["x"])
    return value if value.dim() < (2 if touch.ref.heads is None else 3) else None


def change_together(
    do: str, ref: SiteRef, value: torch.Tensor, rows: Sequence[int], by: Sequence[torch.Tensor]
) -> torch.Tensor:
    """``value`` [T, ...] after one operation of :data:`TOGETHER` for many, a row and a tensor each.

    Args:
        ref: the heads and numbers, the same for all.
        by: of each row, what :func:`own_value` gives.
    """
    index = _index(value, rows, ref)
    new = value.clone()
    x = new[index]
    other = torch.stack([b.expand(x.shape[1:]) for b in by])
    match do:
        case "scale":
            new[index] = x * other
        case "add":
            new[index] = x + other
        case _:
            new[index] = other
    return new


def write_affine(
    do: str,
    ref: SiteRef,
    kept: torch.Tensor,
    factor: torch.Tensor,
    shift: torch.Tensor,
    rows: Sequence[int],
    by: Sequence[torch.Tensor],
) -> None:
    """One operation of :data:`TOGETHER` as ``(x where kept, else 0) * factor + shift``.

    Args:
        ref: the heads and numbers, the same for all.
        kept, factor, shift: [T, ...], of which the part named is written: True, 1 and -0.0 before.
        rows, by: as for :func:`change_together`.
    """
    index = _index(factor, rows, ref)
    part = factor[index]
    other = torch.stack([b.expand(part.shape[1:]) for b in by])
    match do:
        case "scale":
            factor[index] = other
        case "add":
            shift[index] = other
        case _:
            shift[index] = other
            kept[index] = False


def _changed(
    touch: Touch,
    x: torch.Tensor,
    rows: Rows,
    value: torch.Tensor,
    sources: Sequence[torch.Tensor],
    context: Context,
) -> torch.Tensor:
    args = touch.args

    def argument(name: str) -> torch.Tensor:
        found = context.tensor(args[name])
        # The rows of a basis are directions, however few positions there are.
        per_position = name != "basis" and found.dim() == x.dim() and found.shape[0] > 1
        return found[rows.piece] if per_position else found

    def source() -> torch.Tensor:
        if touch.sources[0].blob is None:
            return sum(sources[1:], sources[0]) / len(sources) if len(sources) > 1 else sources[0]
        blob = context.tensor(Blob(touch.sources[0].blob))
        return blob[rows.piece] if blob.dim() == x.dim() and blob.shape[0] > 1 else blob

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
            return x + argument("s") * _noise(touch, rows.positions, value).to(x)
        case "replace":
            return source().expand_as(x)
        case "mean":
            each = args["positions"] == "each"
            mean = context.mean(args["over"], x.dim() if each else x.dim() - 1)
            return (mean[rows.piece] if each and mean.shape[0] > 1 else mean).expand_as(x)
        case "resample":
            pool = context.tensor(args["pool"])
            seed, ref, n = args["seed"], touch.ref, pool.shape[0]
            drawn = [drawn_row(seed, ref, position, n) for position in rows.positions]
            return pool[_numbers(drawn, x.device)].expand_as(x)
        case "lerp":
            w, other = argument("w"), source()
            mixed = w * x + (1.0 - w) * other
            # Written so that masked scores (-inf) stay what they are, and equals keep their bits;
            # a gradient is that of the mixture even where both happen to be equal.
            kept = x == other
            return torch.where(kept & x.isinf() if mixed.requires_grad else kept, x, mixed)
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
    inner = value.shape[2:] if ref.heads else value.shape[1:]
    width = 1 if one_a_head else inner.numel()
    heads: Sequence[int] = ref.heads or (0,)
    drawn = torch.stack(
        [torch.stack([noise_of(touch.args["seed"], ref, p, h, width) for h in heads]) for p in rows]
    )
    if one_a_head:
        return drawn[..., 0]
    drawn = drawn.unflatten(-1, inner)
    if ref.components is not None:
        drawn = drawn[..., list(ref.components)]
    picked: torch.Tensor = drawn if ref.heads else drawn[:, 0]
    return picked


def noise_of(seed: int, ref: SiteRef, position: int, head: int, width: int) -> torch.Tensor:
    """Normal numbers that depend on nothing else: not on the batch, the chunk or the machine."""
    name = f"{seed}/{ref.site}/{ref.layer}/{position}/{head}".encode()
    number = int.from_bytes(hashlib.sha256(name).digest()[:7], "big")
    generator = torch.Generator().manual_seed(number)
    return torch.randn(width, generator=generator, dtype=torch.float64)


def drawn_row(seed: int, ref: SiteRef, position: int, n: int) -> int:
    """One of ``n`` rows, which depends on nothing else, like :func:`noise_of`; heads share it."""
    name = f"{seed}/{ref.site}/{ref.layer}/{position}".encode()
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "big") % n


# Where and how a touch acts.


def tapped_at(touch: Touch) -> list[tuple[str, int]]:
    """The decoder's sites at which a touch acts."""
    site, layer, do = touch.ref.site, touch.ref.layer, touch.do
    if site in BLOCKS:
        outs = {"block": ("attn.out", "mlp.out"), "attn": ("attn.out",), "mlp": ("mlp.out",)}
        return [(out, layer) for out in outs[site]]
    if site == "gla.edge":
        return [(site, layer)]
    if site == "attn.edge":
        before = do != "edge_scale" and touch.args["renormalise"]
        return [("attn.head.score" if before else "attn.head.prob", layer)]
    if do == "expert_force" or (do == "expert_off" and touch.args["reroute"]):
        return [("moe.router", layer)]
    if do in ("expert_on", "expert_off"):
        return [("moe.router", layer), ("moe.expert.weight", layer)]
    return [(site, layer)]


def apply_switch(
    touch: Touch,
    site: str,
    value: torch.Tensor,
    router: torch.Tensor | None,
    rows: Sequence[int],
    context: Context,
) -> torch.Tensor | None:
    """``value`` [T, ...] of the decoder's ``site`` after an operation that is no change of rows.

    Args:
        router: this layer's router logits, where ``site`` is the experts' weight.

    Returns:
        None where the operation changes rows: :func:`change_rows` does it.
    """
    if touch.kernel == "block":
        return skip_rows(value, rows)
    if touch.kernel == "edge":
        return change_edges(touch, value, context, rows, scores=site == "attn.head.score")
    if touch.ref.site == "moe.expert.on":
        if site == "moe.expert.weight":
            assert router is not None
            return change_weights(touch, value, router, rows)
        rerouted = touch.do == "expert_force" or touch.args.get("reroute")
        return change_router(touch, value, rows) if rerouted else value
    return None


# Attention edges.


def _pairs(touch: Touch, value: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """[T, H, K] bool: the pairs of query and key in the heads of an edge operation."""
    assert touch.keys is not None
    n_rows, n_heads, n_keys = value.shape
    queries = torch.zeros(n_rows, 1, 1, dtype=torch.bool)
    queries[rows] = True
    heads = torch.zeros(1, n_heads, 1, dtype=torch.bool)
    heads[:, list(touch.ref.heads or range(n_heads))] = True
    keys = torch.zeros(1, 1, n_keys, dtype=torch.bool)
    keys[..., touch.keys.below(n_keys)] = True
    if touch.do == "edge_only":
        keys = ~keys
    return (queries & heads & keys).to(value.device)


def change_edges(
    touch: Touch, value: torch.Tensor, context: Context, rows: Sequence[int], *, scores: bool
) -> torch.Tensor:
    """Scores or probabilities [T, H, K] after an edge operation on ``rows``."""
    pairs = _pairs(touch, value, rows)
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


# Shares of keys in the states of recurrent layers.


def multiplied_keys(touch: Touch) -> Positions:
    """The keys that an edge operation on ``gla.edge`` multiplies or takes out."""
    assert touch.keys is not None
    return touch.keys.complement(_FAR) if touch.do == "edge_only" else touch.keys


def key_share(
    touch: Touch,
    context: Context,
    window: Sequence[int],
    n_heads: int,
    before: torch.Tensor | None,
    leave: Callable[[torch.Tensor], None],
) -> KeyShare:
    """What an edge operation on ``gla.edge`` asks of the rows of ``window`` (ascending tokens)."""
    first = window[0]
    factor = context.tensor(touch.args["a"]) if touch.do == "edge_scale" else context.tensor(0.0)
    return KeyShare(
        keys=[p - first for p in multiplied_keys(touch).below(window[-1] + 1) if p >= first],
        queries=[p - first for p in touch.positions.below(window[-1] + 1) if p >= first],
        heads=touch.ref.heads or range(n_heads),
        factor=factor,
        before=before,
        leave=leave,
    )


# Mixtures of experts.


def change_router(touch: Touch, value: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Router logits [T, E] after expert_force, or expert_off with another in its place."""
    experts = list(touch.ref.heads or ())
    hidden = torch.zeros(value.shape, dtype=torch.bool, device=value.device)
    if touch.do == "expert_force":
        hidden[rows] = True
    for e in experts:
        hidden[rows, e] = touch.do != "expert_force"
    return value.masked_fill(hidden, -torch.inf)


def change_weights(
    touch: Touch, value: torch.Tensor, router: torch.Tensor, rows: Sequence[int]
) -> torch.Tensor:
    """Weights of the experts [T, E] after expert_on or expert_off.

    An expert that is switched on gets what the router gives it, on the scale of those that were
    chosen.
    """
    chosen = value > 0
    probs = torch.softmax(router, -1)
    scale = value.sum(-1, keepdim=True) / (probs * chosen).sum(-1, keepdim=True)
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


def skip_rows(value: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """What a skipped block writes to the residual stream: nothing, at ``rows``."""
    skipped = torch.zeros(value.shape[0], 1, dtype=torch.bool)
    skipped[rows] = True
    return value.masked_fill(skipped.to(value.device), 0.0)


def copies_of(ref: SiteRef, share: int) -> list[SiteRef]:
    """``ref`` in a model whose key heads have been copied ``share`` times: once for each copy."""
    if share == 1 or ref.expanded or "kvhead" not in ref.site or ref.heads is None:
        return [ref]
    return [replace(ref, heads=tuple(g * share + i for g in ref.heads)) for i in range(share)]
