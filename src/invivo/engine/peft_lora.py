"""LoRA between the peft library's config and tensors and ours."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from invivo.engine.bypasses import BypassSpec, Parameters, places, rows_of, width_in
from invivo.engine.hub_modules import hub_parts, locate, module_of, target, unsupported
from invivo.errors import InvalidRequest
from invivo.models.config import ModelConfig

_KEY = re.compile(r"^(.*)\.lora_(A|B)(?:\.\w+)?\.weight$")
# Settings that change what an adapter computes, and the only values that are understood.
_PLAIN: dict[str, tuple[object, ...]] = {
    "bias": ("none", None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
}
# Initialisations that also change the base weights, which the file does not hold.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")


def from_lora(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], model: ModelConfig
) -> tuple[tuple[BypassSpec, ...], dict[str, torch.Tensor]]:
    """Specs and parameters of a LoRA; a spec for each rank and alpha that occurs.

    Raises:
        InvalidRequest: not a plain LoRA, or it does not fit the model.
    """
    settings = _Settings(config)
    parameters: dict[str, torch.Tensor] = {}
    modules: dict[tuple[int, str], str] = {}
    for key, tensor in tensors.items():
        match = _KEY.match(key)
        if match is None:
            raise unsupported(key)
        layer, place = locate(model, match[1], key)
        modules[layer, place] = match[1].removeprefix("base_model.model.")
        parameters[f"layers.{layer}.{place}.lora_{match[2]}"] = tensor
    if not modules:
        raise InvalidRequest(
            "holds no LoRA matrices",
            field="adapter",
            remedy="Save it with the peft library's save_pretrained",
        )
    alike: dict[tuple[int, float, str], set[int]] = {}
    for (layer, place), module in modules.items():
        a = parameters.get(f"layers.{layer}.{place}.lora_A")
        b = parameters.get(f"layers.{layer}.{place}.lora_B")
        if a is None or b is None:
            raise InvalidRequest("has only one of lora_A and lora_B", field="adapter", given=module)
        rank = int(a.shape[0])
        _, start, stop = rows_of(model, layer, place)
        wanted = (rank, width_in(model, layer, place)), (stop - start, rank)
        if (tuple(a.shape), tuple(b.shape)) != wanted or rank == 0:
            raise InvalidRequest(
                f"does not fit the model: A {tuple(a.shape)} and B {tuple(b.shape)}, "
                f"expected {wanted[0]} and {wanted[1]}",
                field="adapter",
                given=module,
                remedy="Use an adapter that was trained on this model",
            )
        alike.setdefault((rank, settings.alpha(module), place), set()).add(layer)
    grouped: dict[tuple[int, float, tuple[int, ...]], list[str]] = {}
    for (rank, alpha, place), layers in alike.items():
        grouped.setdefault((rank, alpha, tuple(sorted(layers))), []).append(place)
    rank_stabilized = bool(config.get("use_rslora"))
    specs = tuple(
        BypassSpec("lora", tuple(sorted(on)), rank, layers, alpha, rank_stabilized)
        for (rank, alpha, layers), on in grouped.items()
    )
    return specs, parameters


def to_lora(
    specs: Sequence[BypassSpec], parameters: Parameters, model: ModelConfig
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The reverse of :func:`from_lora`: config (its LoRA part) and tensors by the Hub's names.

    Raises:
        InvalidRequest: specs that one adapter of the peft library cannot hold.
    """
    if len({spec.rank_stabilized for spec in specs}) > 1:
        raise InvalidRequest(
            "one file holds rank-stabilised LoRAs or plain ones, not both", field="rank_stabilized"
        )
    first = specs[0]
    alpha = float(first.size if first.alpha is None else first.alpha)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    tensors: dict[str, torch.Tensor] = {}
    layers_of: dict[str, set[int]] = {}
    for spec in specs:
        for layer, place in places(model, spec):
            base = f"layers.{layer}.{place}"
            a, b = parameters[f"{base}.lora_A"], parameters[f"{base}.lora_B"]
            for part, rows in hub_parts(model, layer, place):
                module = module_of(model, layer, part)
                layers_of.setdefault(part, set()).add(layer)
                key = f"base_model.model.{module}.lora_"
                tensors[f"{key}A.weight"] = a.clone()
                tensors[f"{key}B.weight"] = b[rows].clone()
                if spec.size != first.size:
                    ranks[module] = spec.size
                own = float(spec.size if spec.alpha is None else spec.alpha)
                if own != alpha:
                    alphas[module] = own
    config = {
        "r": first.size,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": first.rank_stabilized,
        "fan_in_fan_out": model.family == "gpt2",
        "target_modules": [t for part in layers_of for t in target(model, layers_of[part], part)],
        "rank_pattern": {module.replace(".", r"\."): rank for module, rank in ranks.items()},
        "alpha_pattern": {module.replace(".", r"\."): own for module, own in alphas.items()},
    }
    return config, tensors


@dataclass(slots=True)
class _Settings:
    """What ``adapter_config.json`` says about alpha; refuses what is not plain LoRA."""

    config: Mapping[str, Any]
    alphas: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, plain in _PLAIN.items():
            value = self.config.get(name, plain[0])
            if value not in plain:
                raise InvalidRequest(
                    f"{name} is not supported",
                    field=f"adapter_config.{name}",
                    given=value,
                    remedy=f"Train a plain LoRA adapter ({name} = {plain[0]!r}), or merge it",
                )
        start = self.config.get("init_lora_weights", True)
        if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
            raise InvalidRequest(
                "this initialisation changes the base weights, which the adapter does not hold",
                field="adapter_config.init_lora_weights",
                given=start,
                remedy="Convert it to a plain LoRA when saving (path_initial_model_for_weight_"
                "conversion in the peft library)",
            )
        alpha = self.config.get("lora_alpha")
        if not isinstance(alpha, int | float) or isinstance(alpha, bool):
            raise InvalidRequest("must be a number", field="adapter_config.lora_alpha", given=alpha)
        pattern = self.config.get("alpha_pattern") or {}
        for key, value in pattern.items():
            if not _harmless(key) or not isinstance(value, int | float):
                raise InvalidRequest(
                    "must map simple patterns to numbers",
                    field="adapter_config.alpha_pattern",
                    given={key: value},
                )
            self.alphas[key] = float(value)

    def alpha(self, module: str) -> float:
        for key, value in self.alphas.items():
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        return float(self.config["lora_alpha"])


def _harmless(pattern: object) -> bool:
    """Whether a regular expression from a file cannot take for ever: few, simple repetitions."""
    if not isinstance(pattern, str) or len(pattern) > 256:
        return False
    rest, n = re.subn(r"(\\d|\.|\[0-9\])[*+]", "", pattern)
    if n > 3 or re.search(r"[*+{]", rest):
        return False
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True
