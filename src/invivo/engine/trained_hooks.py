"""Where trained bypasses touch the decoder, and how far down a gradient must go.

No torch in here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from invivo.engine.trainable import FUSED, Trainable, checked, has_place
from invivo.models.config import ModelConfig

# The places of a layer where the decoder calls a bypass, in the order of the forward pass.
ORDER = (
    "resid.pre",
    "attn.in",
    "qkv",
    "attn.kvhead.k",
    "attn.kvhead.v",
    "r",
    "o",
    "attn.out",
    "resid.mid",
    "mlp.in",
    "gate_up",
    "up",
    "mlp.neuron",
    "down",
    "mlp.out",
    "resid.post",
)


@dataclass(frozen=True, slots=True)
class TrainedHooks:
    """The hooks at which something is trained.

    Attributes:
        names: by layer (-1: outside layers), names of :data:`ORDER`, or "embed".
        reads: by layer, those of ``names`` whose bypass reads its input (a LoRA, an adapter, a
            vector on the MLP's neurons); the others only add, scale the output, or replace.
        carried: by layer, whether gradients of keys and of values are wanted.
        bottom_queries: whether those of the queries of ``bottom`` are.
        bottom: lowest layer that the backward visits.
        last_hook: the first trained hook of ``bottom``, after which nothing is left to do; None
            where the gradient goes on to the layer's input.
    """

    names: dict[int, frozenset[str]]
    reads: dict[int, frozenset[str]]
    carried: dict[int, tuple[bool, bool]]
    bottom_queries: bool
    bottom: int
    last_hook: str | None

    def carries_state(self, config: ModelConfig, layer: int) -> bool:
        """Whether a recurrent layer's state before a window has a gradient that is wanted.

        Queries leave nothing in a state, but in the tail of a short convolution.
        """
        queries = layer == self.bottom and self.bottom_queries
        convolved = config.gla is not None and config.gla.conv_size > 0
        return any(self.carried.get(layer, ())) or (queries and convolved)


def trained_hooks(
    config: ModelConfig, trainables: Sequence[Trainable], *, input_gradients: bool = False
) -> TrainedHooks:
    """The hooks of ``trainables``.

    Args:
        input_gradients: the gradient by the embeddings is wanted too.

    Raises:
        InvalidRequest: see :func:`invivo.engine.trainable.checked`.
    """
    names: dict[int, set[str]] = {}
    reads: dict[int, set[str]] = {}
    parts: dict[int, set[str]] = {}
    for each in checked(config, trainables):
        if each.kind == "soft_prompt":
            names[-1] = {"embed"}
            continue
        for layer in each.layers or ():
            places = ("k", "v") if each.kind == "prefix" else each.on
            for place in places:
                if not has_place(config, layer, place):
                    continue
                hook = _hook(config, each.kind, place)
                names.setdefault(layer, set()).add(hook)
                if each.kind in ("lora", "adapter") or hook == "mlp.neuron":
                    reads.setdefault(layer, set()).add(hook)
                parts.setdefault(layer, set()).update(FUSED.get(place, (place,)))
    lowest = min(names)
    bottom = 0 if input_gradients else max(0, lowest)
    last_hook: str | None = None
    if bottom == lowest and not input_gradients:
        last_hook = min(names[bottom], key=ORDER.index)
    carried = dict.fromkeys(range(bottom, config.n_layers), (True, True))
    bottom_queries = True
    if last_hook is not None and ORDER.index(last_hook) >= ORDER.index("qkv"):
        bottom_queries = "q" in parts[bottom]
        carried[bottom] = ("k" in parts[bottom], "v" in parts[bottom])
    return TrainedHooks(
        names={layer: frozenset(hooks) for layer, hooks in names.items()},
        reads={layer: frozenset(hooks) for layer, hooks in reads.items()},
        carried=carried,
        bottom_queries=bottom_queries,
        bottom=bottom,
        last_hook=last_hook,
    )


def hooks_from(config: ModelConfig, bottom: int) -> TrainedHooks:
    """Those of a program whose trained parameters act in layers ``bottom`` and up: reruns alone
    follow them, which find by themselves what a gradient reaches."""
    return TrainedHooks(
        names={},
        reads={},
        carried=dict.fromkeys(range(bottom, config.n_layers), (True, True)),
        bottom_queries=True,
        bottom=bottom,
        last_hook=ORDER[0],
    )


def _hook(config: ModelConfig, kind: str, place: str) -> str:
    if kind == "prefix":
        return f"attn.kvhead.{place}"
    if kind == "ia3" and place == "down":
        return "mlp.neuron"
    if place == "up" and not config.gated_mlp:
        return "up"
    return next((fused for fused, those in FUSED.items() if place in those), place)
