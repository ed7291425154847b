"""Bypasses as config and tensors of an adapter file, and back.

LoRA, IA3, prefix and prompt tuning are written as the peft library writes them. Bottleneck
adapters, steering vectors and sets of several kinds have no format there: their ``peft_type``
begins with ``INVIVO_``, ``bypasses`` lists the specs, and the tensors bear our own names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import torch

from invivo.engine.bypasses import (
    BypassSpec,
    Parameters,
    check_parameters,
    checked_specs,
    places,
)
from invivo.engine.hub_modules import hub_parts, locate, module_of, target, unsupported
from invivo.engine.peft_lora import from_lora, to_lora
from invivo.errors import InvalidRequest
from invivo.kernels.rotary import apply_rotary_reference
from invivo.models.config import ModelConfig
from invivo.models.rope import rope_frequencies

_OWN = {"adapter": "INVIVO_BOTTLENECK", "steering": "INVIVO_STEERING"}
_MIXED = "INVIVO_MIXED"
_IA3_KEY = re.compile(r"^(.*)\.ia3_l(?:\.\w+)?$")

Converted = tuple[tuple[BypassSpec, ...], dict[str, torch.Tensor]]


def from_peft(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], model: ModelConfig
) -> Converted:
    """Checked specs and parameters of an adapter.

    Args:
        config: ``adapter_config.json`` as a mapping.
        tensors: by their keys in ``adapter_model.safetensors``.

    Raises:
        InvalidRequest: a method or setting that is not supported, or it does not fit the model.
    """
    kind = config.get("peft_type", "LORA")
    readers = {
        "LORA": from_lora,
        "IA3": _from_ia3,
        "PREFIX_TUNING": _from_prefix,
        "PROMPT_TUNING": _from_prompt,
    } | dict.fromkeys((*_OWN.values(), _MIXED), _from_own)
    if kind not in readers:
        raise InvalidRequest(
            "peft_type is not supported",
            field="adapter_config.peft_type",
            given=kind,
            remedy=f"Supported: {', '.join(readers)}",
        )
    specs, parameters = readers[kind](config, tensors, model)
    specs = checked_specs(model, specs)
    check_parameters(model, specs, parameters)
    return specs, parameters


def to_peft(
    specs: Sequence[BypassSpec], parameters: Parameters, model: ModelConfig, base_name: str
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Config and tensors to save; the tensors are copies on the CPU in their own dtype.

    Raises:
        InvalidRequest: the parameters do not belong to the specs, or the peft library's format
            cannot hold the set (a part of a module that the Hub's model fuses).
    """
    specs = checked_specs(model, specs)
    check_parameters(model, specs, parameters)
    parameters = {name: tensor.detach().cpu() for name, tensor in parameters.items()}
    common: dict[str, Any] = {
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "task_type": "CAUSAL_LM",
    }
    kinds = {spec.kind for spec in specs}
    if kinds == {"lora"}:
        config, tensors = to_lora(specs, parameters, model)
        return common | {"peft_type": "LORA"} | config, tensors
    if kinds == {"ia3"}:
        config, tensors = _to_ia3(specs, parameters, model)
        return common | {"peft_type": "IA3"} | config, tensors
    if kinds in ({"prefix"}, {"soft_prompt"}):
        prefix = kinds == {"prefix"}
        width = model.n_kv_heads * model.head_dim if prefix else model.d_model
        config = {
            "peft_type": "PREFIX_TUNING" if prefix else "PROMPT_TUNING",
            "num_virtual_tokens": specs[0].size,
            "token_dim": width,
            "num_attention_heads": model.n_kv_heads if prefix else model.n_heads,
            "num_layers": model.n_layers,
            "num_transformer_submodules": 1,
        }
        if prefix:
            config |= {"encoder_hidden_size": width, "prefix_projection": False}
            rows = _prefix_to_rows(parameters, model)
        else:
            rows = parameters["soft_prompt"].clone()
        return common | config, {"prompt_embeddings": rows}
    name = _OWN[min(kinds)] if len(kinds) == 1 else _MIXED
    config = {"peft_type": name, "bypasses": [asdict(spec) for spec in specs]}
    return common | config, {key: tensor.clone() for key, tensor in parameters.items()}


# --- IA3 ------------------------------------------------------------------------------------
def _from_ia3(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], model: ModelConfig
) -> Converted:
    if config.get("modules_to_save"):
        raise unsupported("modules_to_save")
    parameters: dict[str, torch.Tensor] = {}
    layers_of: dict[str, set[int]] = {}
    for key, tensor in tensors.items():
        match = _IA3_KEY.match(key)
        if match is None:
            raise unsupported(key)
        layer, place = locate(model, match[1], key)
        # A column scales a module's output, a row its input.
        scales_input = tensor.ndim == 2 and tensor.shape[0] == 1
        if tensor.ndim != 2 or 1 not in tensor.shape or scales_input != (place == "down"):
            raise InvalidRequest(
                "feedforward_modules must be the MLP's down projection and no other",
                field="adapter_config.feedforward_modules",
                given=key,
                remedy="Train with the down projection among target_modules and "
                "feedforward_modules, or with neither",
            )
        parameters[f"layers.{layer}.{place}.ia3"] = tensor.flatten()
        layers_of.setdefault(place, set()).add(layer)
    return _by_layers("ia3", layers_of), parameters


def _by_layers(kind: Any, layers_of: Mapping[str, set[int]]) -> tuple[BypassSpec, ...]:
    grouped: dict[tuple[int, ...], list[str]] = {}
    for place, layers in layers_of.items():
        grouped.setdefault(tuple(sorted(layers)), []).append(place)
    return tuple(BypassSpec(kind, tuple(sorted(on)), layers=at) for at, on in grouped.items())


def _to_ia3(
    specs: Sequence[BypassSpec], parameters: Parameters, model: ModelConfig
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    tensors: dict[str, torch.Tensor] = {}
    layers_of: dict[str, set[int]] = {}
    for spec in specs:
        for layer, place in places(model, spec):
            vector = parameters[f"layers.{layer}.{place}.ia3"]
            for part, rows in hub_parts(model, layer, place):
                own = vector[None, :] if place == "down" else vector[rows, None]
                module = module_of(model, layer, part)
                tensors[f"base_model.model.{module}.ia3_l"] = own.clone()
                layers_of.setdefault(part, set()).add(layer)
    targets = {place: target(model, layers, place) for place, layers in layers_of.items()}
    config = {
        "target_modules": [name for names in targets.values() for name in names],
        "feedforward_modules": targets.get("down", []),
        "fan_in_fan_out": model.family == "gpt2",
    }
    return config, tensors


# --- virtual tokens -------------------------------------------------------------------------
def _virtual(tensors: Mapping[str, torch.Tensor], width: int) -> torch.Tensor:
    rows = tensors.get("prompt_embeddings")
    if rows is None or len(tensors) != 1:
        raise unsupported(next((key for key in tensors if key != "prompt_embeddings"), "(nothing)"))
    if rows.ndim != 2 or rows.shape[1] != width or not rows.shape[0]:
        raise InvalidRequest(
            f"does not fit the model: prompt_embeddings {tuple(rows.shape)}, expected (n, {width})",
            field="adapter",
            remedy="Use an adapter that was trained on this model",
        )
    return rows


def _from_prompt(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], model: ModelConfig
) -> Converted:
    rows = _virtual(tensors, model.d_model)
    return (BypassSpec("soft_prompt", size=rows.shape[0]),), {"soft_prompt": rows}


def _from_prefix(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], model: ModelConfig
) -> Converted:
    width = 2 * model.n_layers * model.n_kv_heads * model.head_dim
    rows = _virtual(tensors, width).unflatten(1, (-1, model.n_kv_heads, model.head_dim))
    parameters = {}
    for layer in range(model.n_layers):
        keys = _turned(rows[:, 2 * layer], model, layer, back=True)
        parameters[f"layers.{layer}.prefix_k"] = keys
        parameters[f"layers.{layer}.prefix_v"] = rows[:, 2 * layer + 1].contiguous()
    return (BypassSpec("prefix", size=rows.shape[0]),), parameters


def _prefix_to_rows(parameters: Parameters, model: ModelConfig) -> torch.Tensor:
    parts = []
    for layer in range(model.n_layers):
        parts.append(_turned(parameters[f"layers.{layer}.prefix_k"], model, layer))
        parts.append(parameters[f"layers.{layer}.prefix_v"])
    return torch.stack(parts, dim=1).flatten(1)


def _turned(
    keys: torch.Tensor, model: ModelConfig, layer: int, *, back: bool = False
) -> torch.Tensor:
    """Keys [n, G, D] as the cache holds them at positions 0 to n - 1; ``back``: the reverse.

    The peft library keeps the cache's keys, which rotary embedding has turned already.
    """
    which = model.layers[layer].rope
    if which is None:
        return keys.contiguous()
    rope = model.ropes[which]
    inverse, factor = rope_frequencies(
        rope, max_positions=model.max_positions, long=False, dtype=torch.float64
    )
    angles = torch.arange(keys.shape[0], dtype=torch.float64)[:, None] * inverse[None, :]
    cos, sin = angles.cos() * factor, angles.sin() * factor
    if back:
        cos, sin = cos / factor**2, -sin / factor**2
    positions = torch.arange(keys.shape[0])
    turned = apply_rotary_reference(keys, keys, cos, sin, positions)[0]
    return turned.to(keys.dtype)


# --- our own --------------------------------------------------------------------------------
def _from_own(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], model: ModelConfig
) -> Converted:
    given = config.get("bypasses")
    if not isinstance(given, list) or not all(isinstance(each, dict) for each in given):
        raise InvalidRequest("must list the bypasses", field="adapter_config.bypasses", given=given)
    return tuple(_spec(each) for each in given), dict(tensors)


def _spec(given: Mapping[str, Any]) -> BypassSpec:
    """A spec from a file, every field of its type."""
    types: dict[str, Any] = {
        "kind": str,
        "on": list,
        "size": int,
        "layers": list | None,
        "alpha": int | float | None,
        "rank_stabilized": bool,
        "activation": str,
    }
    assert types.keys() == {f.name for f in fields(BypassSpec)}
    for name, value in given.items():
        fits = name in types and isinstance(value, types[name])
        if fits and isinstance(value, list):
            of = str if name == "on" else int
            fits = all(isinstance(each, of) and not isinstance(each, bool) for each in value)
        if not fits:
            raise InvalidRequest(
                "is not a field of a bypass or has the wrong type",
                field=f"adapter_config.bypasses.{name}",
                given=value,
            )
    lists: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in given.items()
    }
    if "kind" not in lists:
        raise InvalidRequest("is missing", field="adapter_config.bypasses.kind")
    return BypassSpec(**lists)
