"""Linear maps of a layer by the names that the Hub's modules bear, which adapter files use."""

from __future__ import annotations

import re

from invivo.engine.bypasses import rows_of
from invivo.engine.trainable import FUSED, LINEARS, MLP_PLACES, has_place
from invivo.errors import InvalidRequest
from invivo.models.config import ModelConfig

_MODULE = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.(self_attn|attn|mlp)\.(\w+)$")
_GPT2 = {"qkv": "attn.c_attn", "o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}


def locate(config: ModelConfig, module: str, key: str) -> tuple[int, str]:
    """Layer and place (as in :mod:`invivo.engine.trainable`) of a module.

    Args:
        module: its path, e.g. ``base_model.model.model.layers.0.self_attn.q_proj``.
        key: of the tensor, for the error.

    Raises:
        InvalidRequest: a module that the model lacks, or one that cannot be adapted.
    """
    match = _MODULE.search(module)
    name = f"{match[2]}.{match[3]}" if match and match[3] == "c_proj" else match and match[3]
    if match is None or name not in LINEARS:
        raise unsupported(key)
    layer, place = int(match[1]), LINEARS[name]
    if layer >= config.n_layers:
        raise InvalidRequest(
            f"has a layer {layer}, the model has {config.n_layers}",
            field="adapter",
            given=key,
            remedy="Use an adapter that was trained on this model",
        )
    if config.layers[layer].feedforward == "moe" and place in MLP_PLACES:
        raise unsupported(".experts.", key)
    no_gate = place in ("gate", "gate_up") and not config.gated_mlp
    if no_gate or not has_place(config, layer, place):
        raise InvalidRequest("the model has no such linear map", field="adapter", given=key)
    return layer, place


def module_of(config: ModelConfig, layer: int, place: str) -> str:
    """Path of a module within the Hub's model, e.g. ``model.layers.0.self_attn.q_proj``."""
    if config.family == "gpt2":
        return f"transformer.h.{layer}.{_GPT2[place]}"
    if config.family == "gla":
        attention, name = "attn", {"r": "g"}.get(place, place)
    else:
        attention, name = "self_attn", place
    block = "mlp" if place in MLP_PLACES else attention
    return f"model.layers.{layer}.{block}.{name}_proj"


def hub_parts(config: ModelConfig, layer: int, place: str) -> list[tuple[str, slice]]:
    """The Hub's modules under one place of a layer, each with its rows of the place's output.

    Raises:
        InvalidRequest: the Hub's model has only a larger module, of which the place is a part.
    """
    if place in FUSED and not _fuses(config, place):
        origin = rows_of(config, layer, place)[1]
        found = [(part, rows_of(config, layer, part)) for part in FUSED[place]]
        return [(part, slice(start - origin, stop - origin)) for part, (_, start, stop) in found]
    owner = next((fused for fused, parts in FUSED.items() if place in parts), None)
    if owner is not None and _fuses(config, owner):
        raise InvalidRequest(
            "the Hub's model has no module of its own for this part",
            field="on",
            given=place,
            remedy=f"Train on {owner}",
        )
    return [(place, slice(None))]


def _fuses(config: ModelConfig, place: str) -> bool:
    """Whether the Hub's model keeps query, key and value (or gate and up) in one module."""
    return config.family == "phi3" or (config.family == "gpt2" and place == "qkv")


def target(config: ModelConfig, layers: set[int], place: str) -> list[str]:
    """Entries of ``target_modules``: one name where every layer has it, else one a layer."""
    if layers == set(range(config.n_layers)):
        return [module_of(config, 0, place).split(".0.", 1)[1]]
    return [module_of(config, layer, place) for layer in sorted(layers)]


def unsupported(key: str, given: str | None = None) -> InvalidRequest:
    """The error about a tensor that no supported adapter has."""
    signs = (
        ("lora_magnitude_vector", "DoRA (use_dora) is not supported"),
        ("lora_embedding_", "an adapter on the embedding (lora_embedding) is not supported"),
        ("modules_to_save", "modules_to_save is not supported"),
        ("lm_head", "an adapter on the output matrix (lm_head) is not supported"),
        (".experts.", "adapters on expert layers are not supported"),
        (".bias", "trained biases (bias, lora_bias) are not supported"),
        ("embed_tokens", "a trained embedding is not supported"),
    )
    reason = next((why for sign, why in signs if sign in key), "unknown tensor in the adapter")
    return InvalidRequest(
        reason,
        field="adapter",
        given=given or key,
        remedy="Adapters on attention and MLP linear maps are supported; the tensors must be "
        "those of the config's peft_type",
    )
