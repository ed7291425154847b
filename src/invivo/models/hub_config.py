"""Between the Hub's ``config.json`` and :class:`ModelConfig`, both ways.

Transformers 5 writes ``rope_parameters`` and ``layer_types``; version 4 wrote ``rope_theta``,
``rope_scaling``, ``rope_local_base_freq`` and ``sliding_window_pattern``. Both are read, the
newer one is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from invivo.errors import UnsupportedModel
from invivo.models.config import LayerConfig, ModelConfig, MoEConfig, RopeConfig
from invivo.models.gla_config import gla_from_hf, gla_to_hf
from invivo.models.hub_defaults import COMMON, FAMILY_DEFAULTS

FAMILIES = tuple(sorted(FAMILY_DEFAULTS))
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "olmo2": "Olmo2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "gla": "GLAForCausalLM",
}
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
_HUB_ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh"}


class _Fields:
    """Look-ups in a config.json with the family's defaults behind it."""

    def __init__(self, family: str, given: Mapping[str, Any]) -> None:
        self.family = family
        self.given = given
        self.defaults = COMMON | FAMILY_DEFAULTS[family]

    def get(self, key: str, otherwise: Any = None) -> Any:
        value = self.given.get(key)
        if value is None:
            value = self.defaults.get(key) if key not in self.given else None
        return otherwise if value is None else value

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise UnsupportedModel(
                f"the config of this {self.family} model lacks a value that its shape depends on",
                field=f"config.{key}",
                remedy="Add the field to config.json",
            )
        return value

    def count(self, key: str, default: int | None = None) -> int:
        value = self.need(key) if default is None else self.get(key, default)
        if not isinstance(value, int) or value < 1:
            raise UnsupportedModel(
                "must be a whole number of at least 1",
                field=f"config.{key}",
                given=value,
                remedy="Take the config.json that belongs to the weights",
            )
        return value

    def refuse(self, key: str, *allowed: object) -> None:
        """Raise for a feature that this decoder does not compute, instead of ignoring it."""
        value = self.given.get(key)
        if value is not None and value not in allowed:
            raise UnsupportedModel(
                f"this setting of {self.family} is not supported",
                field=f"config.{key}",
                given=value,
                remedy=f"Supported: {', '.join(map(repr, allowed))}",
            )


def config_from_hf(given: Mapping[str, Any]) -> ModelConfig:
    """Read a Hub ``config.json``.

    Args:
        given: the parsed file; for ``gemma3`` its ``text_config`` is taken.

    Raises:
        UnsupportedModel: an unknown ``model_type`` or ``rope_type``, a missing field, or a
            setting that would change the computation in a way that is not implemented.
    """
    family = given.get("model_type")
    if family == "gemma3":
        text = dict(given.get("text_config") or {})
        text.setdefault("model_type", "gemma3_text")
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if given.get(key) is not None:
                text[key] = given[key]
        given, family = text, "gemma3_text"
    if family == "gla":
        return gla_from_hf(given)
    if family not in FAMILY_DEFAULTS:
        raise UnsupportedModel(
            "unknown architecture",
            field="config.model_type",
            given=family,
            remedy=f"Supported: {', '.join(FAMILIES)}, gla",
        )
    f = _Fields(family, given)
    f.refuse("use_bidirectional_attention", False)
    if family == "gpt2":
        return _gpt2_from_hf(f)

    n_heads = f.count("num_attention_heads")
    d_model = f.count("hidden_size")
    n_layers = f.count("num_hidden_layers")
    head_dim = f.count("head_dim", d_model // n_heads)
    gemma = family in ("gemma2", "gemma3_text")
    olmo2 = family == "olmo2"
    types = _layer_types(f, n_layers)
    window = _window(f)
    ropes, rope_of = _ropes(f, head_dim, types)
    moe = _moe(f)
    sparse = _sparse_layers(f, n_layers) if moe else [False] * n_layers
    attention_bias = family in _HAS_ATTENTION_BIAS and bool(f.get("attention_bias"))
    qkv_bias = family == "qwen2" or (family == "qwen2_moe" and bool(f.get("qkv_bias")))
    return ModelConfig(
        family=family,
        vocab_size=f.count("vocab_size"),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=f.count("num_key_value_heads", n_heads),
        head_dim=head_dim,
        d_ff=f.count("intermediate_size"),
        max_positions=f.count("max_position_embeddings"),
        layers=tuple(
            LayerConfig(
                window=window if types[i] == "sliding_attention" else None,
                rope=rope_of[types[i]],
                feedforward="moe" if sparse[i] else "mlp",
            )
            for i in range(n_layers)
        ),
        ropes=ropes,
        norm_eps=float(f.need("rms_norm_eps")),
        norm_unit_offset=gemma,
        pre_norm=not olmo2,
        post_norm=gemma or olmo2,
        qk_norm=_QK_NORMS.get(family, "none"),
        qkv_clip=f.get("clip_qkv") if family == "olmoe" else None,
        activation=_activation(f.need("hidden_activation" if gemma else "hidden_act")),
        qkv_bias=qkv_bias or attention_bias,
        o_bias=attention_bias,
        mlp_bias=bool(f.get("mlp_bias")) and family == "llama",
        attn_scale=float(f.need("query_pre_attn_scalar")) ** -0.5 if gemma else None,
        attn_softcap=f.get("attn_logit_softcapping") if family == "gemma2" else None,
        logit_softcap=f.get("final_logit_softcapping") if gemma else None,
        embed_scale=d_model**0.5 if gemma else None,
        tie_embeddings=bool(f.get("tie_word_embeddings")),
        moe=moe,
        **_special_tokens(f),
        source=dict(given),
    )


_QK_NORMS: dict[str, Literal["none", "head", "full"]] = {
    "qwen3": "head",
    "qwen3_moe": "head",
    "gemma3_text": "head",
    "olmo2": "full",
    "olmoe": "full",
}


_HAS_ATTENTION_BIAS = ("llama", "qwen3", "gemma2", "gemma3_text", "olmo2", "qwen3_moe", "olmoe")


def _gpt2_from_hf(f: _Fields) -> ModelConfig:
    f.refuse("scale_attn_by_inverse_layer_idx", False)
    f.refuse("scale_attn_weights", True)
    f.refuse("add_cross_attention", False)
    d_model = f.count("n_embd")
    n_heads = f.count("n_head")
    return ModelConfig(
        family="gpt2",
        vocab_size=f.count("vocab_size"),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=d_model // n_heads,
        d_ff=int(f.get("n_inner", 4 * d_model)),
        max_positions=f.count("n_positions"),
        layers=tuple(LayerConfig(rope=None) for _ in range(f.count("n_layer"))),
        learned_positions=True,
        norm="layer",
        norm_eps=float(f.need("layer_norm_epsilon")),
        activation=_activation(f.need("activation_function")),
        gated_mlp=False,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        tie_embeddings=bool(f.get("tie_word_embeddings")),
        **_special_tokens(f),
        source=dict(f.given),
    )


def _special_tokens(f: _Fields) -> dict[str, Any]:
    eos = f.get("eos_token_id", ())
    return {
        "bos_token_id": f.get("bos_token_id"),
        "eos_token_ids": (eos,) if isinstance(eos, int) else tuple(eos),
        "pad_token_id": f.get("pad_token_id"),
    }


def _activation(name: str) -> str:
    if name not in _ACTIVATIONS:
        raise UnsupportedModel(
            "unknown activation",
            field="config.hidden_act",
            given=name,
            remedy=f"Supported: {', '.join(sorted(_ACTIVATIONS))}",
        )
    return _ACTIVATIONS[name]


def _window(f: _Fields) -> int | None:
    window = f.get("sliding_window")
    if f.family.startswith("qwen") and not f.get("use_sliding_window", False):
        return None
    return int(window) if window else None


def _layer_types(f: _Fields, n_layers: int) -> list[str]:
    """``sliding_attention`` or ``full_attention`` of each layer."""
    window = _window(f)
    if window is None:
        return ["full_attention"] * n_layers
    if f.family in ("mistral", "mixtral", "phi3", "qwen3_moe"):  # one window for all layers
        return ["sliding_attention"] * n_layers
    given = f.get("layer_types")
    if given is not None:
        unknown = set(given) - {"sliding_attention", "full_attention"}
        if unknown or len(given) != n_layers:
            raise UnsupportedModel(
                f"layer_types must name one kind of attention for each of {n_layers} layers",
                field="config.layer_types",
                given=list(given),
                remedy="Supported: sliding_attention, full_attention",
            )
        return list(given)
    if f.family in ("gemma2", "gemma3_text"):
        pattern = int(f.get("_sliding_window_pattern", f.need("sliding_window_pattern")))
        return _types((i + 1) % pattern != 0 for i in range(n_layers))
    first = int(f.get("max_window_layers", n_layers))
    if f.family == "qwen2_moe":
        return _types(i % 2 == 0 and i < first for i in range(n_layers))
    return _types(i >= first for i in range(n_layers))


def _types(sliding: Any) -> list[str]:
    return ["sliding_attention" if s else "full_attention" for s in sliding]


def _ropes(
    f: _Fields, head_dim: int, types: list[str]
) -> tuple[tuple[RopeConfig, ...], dict[str, int]]:
    """The distinct rotary embeddings and which of them each layer type uses."""
    parameters = f.get("rope_parameters") or {}
    if f.family == "gemma3_text":
        full = dict(parameters.get("full_attention") or {})
        local = dict(parameters.get("sliding_attention") or {})
        full.setdefault("rope_theta", f.need("rope_theta"))
        local.setdefault("rope_theta", f.need("rope_local_base_freq"))
        if not parameters and f.get("rope_scaling"):
            full |= f.get("rope_scaling")
        return (_rope(f, local, head_dim), _rope(f, full, head_dim)), {
            "sliding_attention": 0,
            "full_attention": 1,
        }
    one = dict(parameters or f.get("rope_scaling") or {})
    if set(one) & {"full_attention", "sliding_attention"}:
        ropes = tuple(_rope(f, dict(one[kind]), head_dim) for kind in sorted(set(types)))
        return ropes, {kind: i for i, kind in enumerate(sorted(set(types)))}
    return (_rope(f, one, head_dim),), dict.fromkeys(types, 0)


def _rope(f: _Fields, parameters: dict[str, Any], head_dim: int) -> RopeConfig:
    kind = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
    parameters.pop("type", None)
    if f.family == "phi3" and kind in ("su", "yarn"):  # older names of what Phi-3 does
        kind = "longrope"
    if kind not in ROPE_TYPES:
        raise UnsupportedModel(
            "unknown kind of rotary embedding",
            field="config.rope_parameters.rope_type",
            given=kind,
            remedy=f"Supported: {', '.join(ROPE_TYPES)}",
        )
    theta = float(parameters.pop("rope_theta", None) or f.need("rope_theta"))
    partial = parameters.pop("partial_rotary_factor", None) or f.get("partial_rotary_factor", 1.0)
    rotary_dim = int(head_dim * partial)
    if rotary_dim % 2:
        raise UnsupportedModel(
            "rotary embedding turns pairs of dimensions, so their number must be even",
            field="config.partial_rotary_factor",
            given=partial,
        )
    if kind == "default":
        return RopeConfig(theta=theta, rotary_dim=rotary_dim)
    if kind in ("llama3", "yarn", "longrope"):
        known = f.get("original_max_position_embeddings")
        if known is not None:  # Phi-3 keeps the pretrained length outside, and that one counts
            parameters["original_max_position_embeddings"] = known
        parameters.setdefault("original_max_position_embeddings", f.need("max_position_embeddings"))
    needed = _ROPE_NEEDS[kind]
    missing = [key for key in needed if parameters.get(key) is None]
    if missing:
        raise UnsupportedModel(
            f"rotary embedding of kind {kind!r} lacks {', '.join(missing)}",
            field="config.rope_parameters",
            given=parameters,
        )
    parameters["rope_type"] = kind
    pairs = tuple(
        (key, tuple(value) if isinstance(value, list) else value)
        for key, value in sorted(parameters.items())
        if value is not None
    )
    return RopeConfig(theta=theta, rotary_dim=rotary_dim, scaling=pairs)


_ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
}


def _moe(f: _Fields) -> MoEConfig | None:
    if f.family == "mixtral":
        return MoEConfig(
            n_experts=f.count("num_local_experts"),
            top_k=f.count("num_experts_per_tok"),
            d_expert=f.count("intermediate_size"),
            normalize_weights=True,
        )
    if f.family not in ("qwen2_moe", "qwen3_moe", "olmoe"):
        return None
    expert_width = "intermediate_size" if f.family == "olmoe" else "moe_intermediate_size"
    n_experts = f.given.get("num_local_experts", f.get("num_experts"))
    return MoEConfig(
        n_experts=int(n_experts),
        top_k=f.count("num_experts_per_tok"),
        d_expert=f.count(expert_width),
        normalize_weights=bool(f.get("norm_topk_prob")),
        d_shared=int(f.get("shared_expert_intermediate_size", 0)),
    )


def _sparse_layers(f: _Fields, n_layers: int) -> list[bool]:
    if f.family not in ("qwen2_moe", "qwen3_moe"):
        return [True] * n_layers
    plain = set(f.get("mlp_only_layers", ()))
    step = f.count("decoder_sparse_step")
    return [i not in plain and (i + 1) % step == 0 for i in range(n_layers)]


# The oldest transformers that knows the spelling we write.
_WRITTEN_FOR = "5.17.0"

# Spellings of version 4 that the written fields replace.
_OLD_KEYS = (
    "rope_theta",
    "rope_scaling",
    "rope_local_base_freq",
    "partial_rotary_factor",
    "sliding_window_pattern",
    "_sliding_window_pattern",
    "torch_dtype",
    "quantization_config",
)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Write a Hub ``config.json`` (the spelling of transformers 5).

    Fields of ``config.source`` that say nothing about the computation are carried over.

    Raises:
        UnsupportedModel: the config has a combination that its family's class at the Hub cannot
            express (say, a Llama with QK-norm).
    """
    if config.family not in _ARCHITECTURES:
        raise UnsupportedModel(
            "the Hub has no class for this family",
            field="config.family",
            given=config.family,
            remedy=f"Supported: {', '.join(FAMILIES)}, gla",
        )
    writers = {"gpt2": _gpt2_to_hf, "gla": gla_to_hf}
    written = writers.get(config.family, _to_hf)(config)
    kept = {k: v for k, v in config.source.items() if k not in _OLD_KEYS}
    eos = config.eos_token_ids
    result = kept | {
        "architectures": [_ARCHITECTURES[config.family]],
        "model_type": config.family,
        "transformers_version": _WRITTEN_FOR,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "pad_token_id": config.pad_token_id,
        **written,
    }
    again = config_from_hf(result)
    if again != config:
        names = [n for n in ModelConfig.__slots__ if getattr(again, n) != getattr(config, n)]
        differing = [n for n in names if n != "source"]
        raise UnsupportedModel(
            f"the Hub's {config.family} class cannot express this model",
            field="config." + differing[0],
            given=getattr(config, differing[0]),
            remedy="Choose a family that has the feature",
        )
    return result


def _gpt2_to_hf(config: ModelConfig) -> dict[str, Any]:
    return {
        "n_embd": config.d_model,
        "n_head": config.n_heads,
        "n_layer": config.n_layers,
        "n_positions": config.max_positions,
        "n_inner": config.d_ff,
        "activation_function": _HUB_ACTIVATIONS.get(config.activation, config.activation),
        "layer_norm_epsilon": config.norm_eps,
    }


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    family = config.family
    windows = {layer.window for layer in config.layers} - {None}
    types = _types(layer.window is not None for layer in config.layers)
    activation = _HUB_ACTIVATIONS.get(config.activation, config.activation)
    out: dict[str, Any] = {
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_ff,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": activation,
        "sliding_window": next(iter(windows), None),
        "rope_parameters": _ropes_to_hf(config, types),
    }
    if family in ("qwen2", "qwen3", "qwen2_moe", "gemma2", "gemma3_text"):
        out["layer_types"] = types
    if family.startswith("qwen"):
        out["use_sliding_window"] = bool(windows)
    if family.startswith("gemma"):
        scale = config.attn_scale or config.head_dim**-0.5
        out["hidden_activation"] = activation
        out["query_pre_attn_scalar"] = _whole(scale**-2)
        out["final_logit_softcapping"] = config.logit_softcap
        out["attn_logit_softcapping"] = config.attn_softcap
    if family == "qwen2_moe":
        out["qkv_bias"] = config.qkv_bias
    elif family != "qwen2":
        out["attention_bias"] = config.o_bias
    if family == "llama":
        out["mlp_bias"] = config.mlp_bias
    if family == "olmoe":
        out["clip_qkv"] = config.qkv_clip
    if config.moe is not None:
        out |= _moe_to_hf(config, config.moe)
    return out


def _whole(value: float) -> int | float:
    """The integer that ``value`` stands for, if it was one before it was rounded."""
    return round(value) if abs(value - round(value)) < 1e-9 * max(1.0, abs(value)) else value


def _ropes_to_hf(config: ModelConfig, types: list[str]) -> dict[str, Any]:
    def one(rope: RopeConfig) -> dict[str, Any]:
        scaling = {k: list(v) if isinstance(v, tuple) else v for k, v in rope.scaling or ()}
        out = {"rope_type": "default", "rope_theta": rope.theta} | scaling
        if rope.rotary_dim != config.head_dim:
            out["partial_rotary_factor"] = rope.rotary_dim / config.head_dim
        return out

    if config.family == "gemma3_text":
        return {"sliding_attention": one(config.ropes[0]), "full_attention": one(config.ropes[1])}
    if len(config.ropes) == 1:
        return one(config.ropes[0])
    chosen = {kind: layer.rope for kind, layer in zip(types, config.layers, strict=True)}
    return {kind: one(config.ropes[i]) for kind, i in chosen.items() if i is not None}


def _moe_to_hf(config: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    if config.family == "mixtral":
        return {"num_local_experts": moe.n_experts, "num_experts_per_tok": moe.top_k}
    out: dict[str, Any] = {
        "num_experts": moe.n_experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.normalize_weights,
    }
    if config.family == "olmoe":
        return out
    out["moe_intermediate_size"] = moe.d_expert
    out["decoder_sparse_step"] = 1
    out["mlp_only_layers"] = [
        i for i, layer in enumerate(config.layers) if layer.feedforward == "mlp"
    ]
    if config.family == "qwen2_moe":
        out["shared_expert_intermediate_size"] = moe.d_shared
    return out
