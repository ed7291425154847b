"""What is trained: bypasses of the frozen model, named by kind and place, checked against it.

A bypass reads one tensor of the frozen model and adds one to another. No torch in here: the
planners and the command line reason about bypasses before any weight is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from invivo.errors import InvalidRequest
from invivo.models.config import ModelConfig

Kind = Literal["lora", "ia3", "adapter", "prefix", "soft_prompt", "steering"]

# The maps of a layer as the graph has them, under the names that modules of the Hub's models bear.
# A fused module ("qkv", "gate_up") is one place of its own: its parts share one matrix A.
LINEARS: dict[str, str] = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "qkv_proj": "qkv",
    "c_attn": "qkv",
    "g_proj": "r",
    "o_proj": "o",
    "attn.c_proj": "o",
    "gate_proj": "gate",
    "up_proj": "up",
    "c_fc": "up",
    "gate_up_proj": "gate_up",
    "down_proj": "down",
    "mlp.c_proj": "down",
}
FUSED: dict[str, tuple[str, ...]] = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
MLP_PLACES = ("gate", "up", "gate_up", "down")
# Where a bottleneck adapter or a steering vector may sit (names of models/sites.py).
SITES = ("resid.pre", "attn.in", "attn.out", "resid.mid", "mlp.in", "mlp.out", "resid.post")

_DEFAULT_ON: dict[str, tuple[str, ...]] = {
    "lora": ("down",),
    "ia3": ("k", "v", "down"),
    "adapter": ("attn.out", "mlp.out"),
    "steering": ("resid.post",),
}


@dataclass(frozen=True, slots=True)
class Trainable:
    """One bypass method on some places of some layers.

    Attributes:
        on: linear maps (``lora``, ``ia3``) or sites (``adapter``, ``steering``), by the names of
            :data:`LINEARS` (either side) and :data:`SITES`; empty takes the method's usual places.
        size: rank of a LoRA, width of a bottleneck, rows of a prefix, tokens of a soft prompt;
            no meaning for ``ia3`` and ``steering``.
        layers: None = all.
    """

    kind: Kind
    on: tuple[str, ...] = ()
    size: int = 0
    layers: tuple[int, ...] | None = None


def checked(config: ModelConfig, trainables: Sequence[Trainable]) -> tuple[Trainable, ...]:
    """The same bypasses with every place spelled as the graph spells it and layers given in full.

    Raises:
        InvalidRequest: an unknown kind or place, one that the model lacks, a size or a layer out
            of range, or two bypasses of one kind at one place.
    """
    if not trainables:
        raise InvalidRequest("nothing to train", field="trainables", remedy="Name a bypass")
    done = tuple(_checked(config, each) for each in trainables)
    seen: set[tuple[str, str, int]] = set()
    for each in done:
        for place in each.on or ("",):
            for part in FUSED.get(place, (place,)):
                for layer in each.layers or ():
                    key = (each.kind, part, layer)
                    if key in seen:
                        raise InvalidRequest(
                            f"two bypasses of this kind at one place of layer {layer}",
                            field="trainables",
                            given=f"{each.kind} on {part}" if part else each.kind,
                            remedy="Give each place once",
                        )
                    seen.add(key)
    return done


def _checked(config: ModelConfig, given: Trainable) -> Trainable:
    if given.kind not in get_args(Kind):
        raise InvalidRequest(
            "unknown kind of bypass",
            field="kind",
            given=given.kind,
            remedy=f"Known: {', '.join(get_args(Kind))}",
        )
    if given.kind not in ("ia3", "steering") and given.size < 1:
        raise InvalidRequest(
            f"a {given.kind} needs a size of at least 1", field="size", given=given.size
        )
    every = tuple(range(config.n_layers))
    layers = every if given.layers is None else tuple(sorted(set(given.layers)))
    if not layers or layers[0] < 0 or layers[-1] >= config.n_layers:
        raise InvalidRequest(
            f"the model has {config.n_layers} layers, numbered from 0",
            field="layers",
            given=given.layers,
        )
    if given.kind == "prefix" and config.recurrent:
        raise InvalidRequest(
            "a prefix is keys and values, which recurrent layers do not keep",
            field="kind",
            given="prefix",
            remedy="Train a soft_prompt",
        )
    if given.kind in ("prefix", "soft_prompt"):
        if given.on:
            raise InvalidRequest(
                f"a {given.kind} has no place to choose", field="on", given=given.on
            )
        return Trainable(given.kind, (), given.size, layers if given.kind == "prefix" else (0,))
    names = given.on or _default_places(config, given.kind)
    linear = given.kind in ("lora", "ia3")
    on = [(_linear if linear else _site)(config, name) for name in names]
    if any(place in MLP_PLACES for place in on):
        with_mlp = tuple(i for i in layers if config.layers[i].feedforward == "mlp")
        if not with_mlp:
            raise InvalidRequest(
                "these layers are mixtures of experts, and a bypass does not reach into experts",
                field="on",
                given=given.on,
                remedy="Choose attention's maps, or an adapter on mlp.out",
            )
    return Trainable(given.kind, tuple(dict.fromkeys(on)), given.size, layers)


def has_place(config: ModelConfig, layer: int, place: str) -> bool:
    """Whether ``layer`` has a linear map or site that the model as a whole has."""
    if place == "r":
        return config.layers[layer].mixer == "gla"
    return config.layers[layer].feedforward == "mlp" or place not in MLP_PLACES


def _default_places(config: ModelConfig, kind: str) -> tuple[str, ...]:
    usual = _DEFAULT_ON[kind]
    if all(layer.feedforward == "moe" for layer in config.layers):
        return tuple(p for p in usual if p not in MLP_PLACES) or ("o",)
    return usual


def _linear(config: ModelConfig, name: str) -> str:
    place = LINEARS.get(name, name)
    lacking: tuple[str, ...] = ("gate", "gate_up") if not config.gated_mlp else ()
    if not config.recurrent:
        lacking += ("r",)
    if place not in LINEARS.values() or place in lacking:
        known = [hub for hub, ours in LINEARS.items() if ours not in lacking]
        raise InvalidRequest(
            "the model has no linear map of this name",
            field="on",
            given=name,
            remedy=f"Choose among {', '.join(known)}",
        )
    return place


def _site(config: ModelConfig, name: str) -> str:
    if name not in SITES:
        raise InvalidRequest(
            "no such site for this kind of bypass",
            field="on",
            given=name,
            remedy=f"Choose among {', '.join(SITES)}",
        )
    return name
