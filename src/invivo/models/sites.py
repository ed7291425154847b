"""Names of every tensor one may touch, and the protocol by which it is touched.

A *site* is a mathematical quantity with a fixed shape (the vocabulary of the
intervention language). The decoder offers each one under its name where it is
computed; a tap reads it and may give back another value. With no taps a forward
pass runs nothing extra: quantities that only a tap needs (one head's share of
the residual, attention probabilities, norm scales) are not computed then.

The sites satisfy these identities (float64 tests hold them for every family):

- ``resid.pre + attn.out = resid.mid``, ``resid.mid + mlp.out = resid.post``, and ``resid.post`` of
  a layer is ``resid.pre`` of the next;
- the sum of ``attn.head.out`` over heads, plus the bias, is ``attn.out`` (``attn.proj`` where a
  norm follows the sub-layer);
- ``attn.head.prob`` times the visible values is ``attn.head.z``;
- ``gla.head.memory`` is the state of the token before; ``gla.head.state`` is the gate times it,
  plus key times value, and the scaled query times that is ``gla.head.z``;
- ``mlp.neuron`` times the down matrix, plus the bias, is ``mlp.out`` (``mlp.proj``);
- the sum over experts of ``moe.expert.weight`` times ``moe.expert.out``, plus ``moe.shared.out``,
  is ``mlp.out``;
- ``final.norm.out`` times the unembedding, soft cap applied, is ``logits``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import torch

from invivo.models.config import ModelConfig

# No site: log-sum-exps of attention, [T, H] float32, which a kernel hands to the tape of a training
# pass where it has them (rows of decodes are not filled in). The answer is not looked at.
LSE = "attn.lse"


class Taps(Protocol):
    """What a forward pass asks at each site."""

    def wants(self, site: str, layer: int) -> bool:
        """Whether ``site`` of ``layer`` (-1 for sites outside layers) is read or changed."""
        ...

    def __call__(self, site: str, layer: int, value: torch.Tensor) -> torch.Tensor:
        """Read ``value`` (rows first: [T, ...]) and return what the model goes on with.

        ``value`` is a live buffer: copy what must outlive the call, and never write to it. To
        change nothing return ``value`` itself; then the pass is bit for bit the untouched one.
        """
        ...


@runtime_checkable
class SplitTaps(Protocol):
    """Taps that look at the attention of some spans only; the others keep their kernel."""

    def open_spans(self, layer: int) -> Collection[int]:
        """Numbers of the spans whose attention is laid open in ``layer``."""
        ...

    def numbers(self, span: int, layer: int, n_keys: int) -> list[int] | None:
        """Position numbers, which windows count, of a span's first tokens; None: their indices."""
        ...

    def at_span(self, span: int, site: str, layer: int, value: torch.Tensor) -> torch.Tensor:
        """Read scores or probabilities [n, H, K] of one span; return what the model goes on with.

        ``value`` must not be written to.
        """
        ...


@dataclass(frozen=True, slots=True)
class KeyShare:
    """Keys of one span that some of its queries see multiplied.

    Attributes:
        keys, queries: rows of the span, 0 = its first.
        heads: which heads.
        factor: a number as a tensor; 0 takes the keys out.
        before: [H, K, V] state that the keys before the span have left, the chosen ones
            multiplied; None: none was chosen, the memory is as it is.
        leave: told that state after the span.
    """

    keys: Sequence[int]
    queries: Sequence[int]
    heads: Sequence[int]
    factor: torch.Tensor
    before: torch.Tensor | None
    leave: Callable[[torch.Tensor], None]


@runtime_checkable
class StateTaps(Protocol):
    """Taps that look at the recurrence of some spans; the others keep their kernel.

    The sites "gla.head.memory" and "gla.head.state" are asked here alone, row by row in the order
    of the tokens, because later rows go on from the answers. Where a sequence's state is kept and
    nothing is changed, every bit is that of the untouched pass.
    """

    def open_states(self, layer: int) -> Collection[int]:
        """Numbers of the spans whose recurrence is laid open in ``layer``."""
        ...

    def state_rows(self, span: int, layer: int) -> Sequence[int]:
        """Rows of a span (0 = its first), ascending, whose memory or state is looked at."""
        ...

    def at_state(
        self, span: int, row: int, site: str, layer: int, value: torch.Tensor
    ) -> torch.Tensor:
        """Read the memory before a row or the state after it [H, K, V]; return what goes on.

        ``value`` must not be written to; return itself to change nothing.
        """
        ...

    def key_shares(self, span: int, layer: int) -> Sequence[KeyShare]:
        """Keys that some queries of a span see more or less of."""
        ...


def _offers(taps: object, protocol: type[Any]) -> bool:
    """Whether the class of ``taps`` has the methods of ``protocol``: asking an object is slow."""
    classes: Any = type(taps), protocol
    return _class_offers(*classes)


@functools.cache
def _class_offers(kind: Any, protocol: Any) -> bool:
    return issubclass(kind, protocol)


def state_taps(taps: object) -> StateTaps | None:
    """``taps`` if they look at recurrences."""
    return cast("StateTaps", taps) if _offers(taps, StateTaps) else None


@runtime_checkable
class SparseTaps(Protocol):
    """Taps that know which layers nothing is wanted of; those run as without taps."""

    def in_layer(self, layer: int) -> bool:
        """Whether a site is wanted that ``layer`` offers; the next one offers ``resid.post``."""
        ...


def taps_of(taps: Taps | None, layer: int) -> Taps | None:
    """What one layer has to ask."""
    sparse = _offers(taps, SparseTaps)
    return None if sparse and not cast("SparseTaps", taps).in_layer(layer) else taps


def split_taps(taps: object) -> SplitTaps | None:
    """``taps`` if they look at the attention of single spans."""
    return cast("SplitTaps", taps) if _offers(taps, SplitTaps) else None


def offer(taps: Taps, site: str, layer: int, value: torch.Tensor) -> torch.Tensor:
    """Let ``taps`` see ``value`` if it wants to; the same object comes back if it is unchanged."""
    if not taps.wants(site, layer):
        return value
    answer = taps(site, layer, value)
    if answer is value:
        return value
    assert answer.shape == value.shape, f"{site}: {answer.shape} for {value.shape}"
    # A copy, because the model may go on in place and the tap may keep its tensor.
    return answer.to(value.dtype, copy=True)


@dataclass(frozen=True, slots=True)
class Site:
    """One row of the table: a name, a shape per row of the batch, a meaning.

    Shapes use d = width, H = query heads, G = key heads, D = head width, f = hidden units,
    E = experts, V = vocabulary, K = largest number of visible keys in the batch.
    """

    name: str
    shape: str
    meaning: str
    in_layer: bool = True


SITES: tuple[Site, ...] = (
    Site("embed.out", "d", "token embedding, scaled, plus learned position", in_layer=False),
    Site("resid.pre", "d", "residual stream before attention"),
    Site("norm1.scale", "1", "reciprocal RMS (standard deviation) of the norm before attention"),
    Site("attn.in", "d", "what the query, key and value matrix reads"),
    Site("attn.head.q", "H, D", "queries after QK-norm, before rotary"),
    Site("attn.kvhead.k", "G, D", "keys after QK-norm, before rotary"),
    Site("attn.kvhead.v", "G, D", "values"),
    Site("attn.head.q.rot", "H, D", "queries after rotary"),
    Site("attn.kvhead.k.rot", "G, D", "keys after rotary, as they are cached"),
    Site("attn.head.score", "H, K", "scaled, capped scores; -inf where a key is not visible"),
    Site("attn.head.prob", "H, K", "softmax of the scores; 0 where a key is not visible"),
    Site("attn.head.z", "H, D", "values mixed by one head, before the output matrix"),
    Site("attn.head.out", "H, d", "z times its head's slice of the output matrix, no bias"),
    Site("gla.head.q", "H, K", "queries, before their scale"),
    Site("gla.head.k", "H, K", "keys"),
    Site("gla.head.v", "H, V", "values"),
    Site("gla.head.gate", "H, K", "how much of each key channel of the memory is kept, 0 to 1"),
    Site("gla.head.memory", "H, K, V", "the state that the token finds: before its gate and write"),
    Site("gla.head.state", "H, K, V", "the state after the token's own write"),
    Site("gla.head.z", "H, V", "what one head reads from its state, before norm and output gate"),
    Site("attn.proj", "d", "the output matrix's result before the norm that follows it"),
    Site("post1.scale", "1", "reciprocal RMS of the norm after attention"),
    Site("attn.out", "d", "what attention adds to the residual stream"),
    Site("resid.mid", "d", "residual stream between attention and feed-forward"),
    Site("norm2.scale", "1", "reciprocal RMS of the norm before the feed-forward"),
    Site("mlp.in", "d", "what the feed-forward reads"),
    Site("mlp.gate", "f", "gate before its activation"),
    Site("mlp.up", "f", "up projection (of a plain MLP: before its activation)"),
    Site("mlp.neuron", "f", "act(gate) * up (of a plain MLP: act(up))"),
    Site("moe.router", "E", "router logits"),
    Site("moe.expert.weight", "E", "weight of each expert, 0 where it is not chosen"),
    Site("moe.expert.out", "E, d", "output of every expert before its weight"),
    Site("moe.shared.out", "d", "output of the shared expert after its gate"),
    Site("mlp.proj", "d", "the feed-forward's result before the norm that follows it"),
    Site("post2.scale", "1", "reciprocal RMS of the norm after the feed-forward"),
    Site("mlp.out", "d", "what the feed-forward adds to the residual stream"),
    Site("resid.post", "d", "residual stream after the layer"),
    Site("final.norm.scale", "1", "reciprocal RMS of the final norm", in_layer=False),
    Site("final.norm.out", "d", "normalised final state", in_layer=False),
    Site("logits", "V", "after the soft cap, before any sampler", in_layer=False),
)


def why_lacking(config: ModelConfig, site: str, layer: int) -> str | None:
    """Why ``layer`` (-1: outside layers) of this model has no such site; None if it has."""
    row = next((s for s in SITES if s.name == site), None)
    if row is None:
        return f"there is no site of this name; known: {', '.join(s.name for s in SITES)}"
    if row.in_layer != (layer >= 0):
        return "this site belongs to layers" if row.in_layer else "this site is outside layers"
    if layer >= config.n_layers:
        return f"the model has {config.n_layers} layers, numbered from 0"
    if not row.in_layer:
        return None
    kind = config.layers[layer]
    if site.startswith("gla.") and kind.mixer != "gla":
        return "this layer has softmax attention: see the attn sites"
    if site.startswith(("attn.head.", "attn.kvhead.")) and kind.mixer == "gla":
        return "this layer has gated linear attention: see the gla sites"
    if site in ("norm1.scale", "norm2.scale") and not config.pre_norm:
        return f"{config.family} normalises only after the sub-layers"
    if site in ("attn.proj", "post1.scale", "mlp.proj", "post2.scale") and not config.post_norm:
        return f"{config.family} has no norm after the sub-layers"
    if site.endswith(".rot") and kind.rope is None:
        return "this layer has no rotary embedding: the site without .rot is what attends"
    if site in ("mlp.gate", "mlp.up", "mlp.neuron") and kind.feedforward == "moe":
        return "this layer is a mixture of experts: see the moe sites"
    if site == "mlp.gate" and not config.gated_mlp:
        return f"the MLP of {config.family} has no gate: see mlp.up"
    if site.startswith("moe.") and kind.feedforward != "moe":
        return "this layer has one MLP, not a mixture of experts"
    if site == "moe.shared.out" and (config.moe is None or config.moe.d_shared == 0):
        return f"{config.family} has no shared expert"
    return None


def sites_of(config: ModelConfig) -> dict[str, list[int]]:
    """The sites that this model has, in forward order, each with its layers ([-1]: outside)."""
    found = {}
    for site in SITES:
        layers = range(config.n_layers) if site.in_layer else [-1]
        having = [i for i in layers if why_lacking(config, site.name, i) is None]
        if having:
            found[site.name] = having
    return found


def lacking_sites(config: ModelConfig) -> dict[str, str]:
    """The sites that no layer of this model has, each with the reason (that of layer 0)."""
    here = sites_of(config)
    reasons = {s.name: why_lacking(config, s.name, 0) for s in SITES if s.name not in here}
    return {name: reason for name, reason in reasons.items() if reason is not None}
