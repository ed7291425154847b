"""From a GGUF's metadata and tensor names to the Hub's config and tensor names.

The key and tensor names, and what llama.cpp's converter changes in the values, are properties of
the file format: query and key rows of the ``llama`` architecture are stored in interleaved order,
Gemma's norm weights plus one, experts stacked.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from invivo.errors import UnsupportedModel
from invivo.models.config import ModelConfig
from invivo.models.gguf import GGUFFile
from invivo.models.tensor_names import Part

ARCHITECTURES = (
    "llama",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "gpt2",
    "olmo2",
    "phi3",
    "qwen2moe",
    "qwen3moe",
    "olmoe",
)

_HUB_FAMILY = {"gemma3": "gemma3_text", "qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"}


def hub_config(file: GGUFFile) -> dict[str, Any]:
    """The ``config.json`` that describes the model of a GGUF file.

    Raises:
        UnsupportedModel: an architecture that is not supported, or metadata is missing.
    """
    architecture = file.architecture
    if architecture not in ARCHITECTURES:
        raise UnsupportedModel(
            "this GGUF architecture is not supported",
            field="general.architecture",
            given=architecture,
            remedy=f"Supported: {', '.join(ARCHITECTURES)}",
        )

    def get(key: str, otherwise: Any = None) -> Any:
        return file.metadata.get(f"{architecture}.{key}", otherwise)

    def need(key: str) -> Any:
        value = get(key)
        if value is None:
            raise UnsupportedModel(
                "the GGUF file lacks a value that the model's shape depends on",
                field=f"{architecture}.{key}",
                given=str(file.path),
            )
        return value

    if "token_embd.weight" not in file.tensors:
        raise UnsupportedModel("the GGUF file has no token embedding", given=str(file.path))
    vocab_size = file.tensors["token_embd.weight"].shape[0]
    shared: dict[str, Any] = {
        "model_type": _HUB_FAMILY.get(architecture, architecture),
        "vocab_size": vocab_size,
        "tie_word_embeddings": _is_tied(file),
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": file.metadata.get("tokenizer.ggml.padding_token_id"),
    }
    if architecture == "gpt2":
        return shared | {
            "n_embd": need("embedding_length"),
            "n_layer": need("block_count"),
            "n_head": need("attention.head_count"),
            "n_positions": need("context_length"),
            "n_inner": get("feed_forward_length"),
            "layer_norm_epsilon": need("attention.layer_norm_epsilon"),
        }
    d_model, n_heads = need("embedding_length"), need("attention.head_count")
    config: dict[str, Any] = shared | {
        "hidden_size": d_model,
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": n_heads,
        "num_key_value_heads": get("attention.head_count_kv", n_heads),
        "intermediate_size": get("feed_forward_length", 0),
        "max_position_embeddings": need("context_length"),
        "rms_norm_eps": need("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(file, get, d_model // n_heads),
    }
    head_dim = get("attention.key_length")
    if head_dim is None and architecture == "llama":
        head_dim = get("rope.dimension_count")
    config["head_dim"] = head_dim or d_model // n_heads
    window = get("attention.sliding_window")
    if architecture == "llama":
        config |= _llama(file, get, window)
    elif architecture.startswith("gemma"):
        config |= _gemma(architecture, get, config, window)
    elif architecture == "phi3":
        turning = get("rope.dimension_count", config["head_dim"])
        config["rope_parameters"]["partial_rotary_factor"] = turning / config["head_dim"]
        config["sliding_window"] = window
        original = get("rope.scaling.original_context_length", config["max_position_embeddings"])
        config["original_max_position_embeddings"] = original
    elif architecture in ("qwen2moe", "qwen3moe", "olmoe"):
        config |= _experts(architecture, get, need)
    return config


def _is_tied(file: GGUFFile) -> bool:
    """Whether the output matrix is absent, or (in some GPT-2 files) a copy of the embedding."""
    output = file.tensors.get("output.weight")
    if output is None:
        return True
    embedding = file.tensors["token_embd.weight"]
    same_storage = output.type == embedding.type and output.shape == embedding.shape
    return (
        file.architecture == "gpt2" and same_storage and bool((output.data == embedding.data).all())
    )


def _llama(file: GGUFFile, get: Callable[..., Any], window: int | None) -> dict[str, Any]:
    more: dict[str, Any] = {}
    if "blk.0.attn_q.bias" in file.tensors:
        more["attention_bias"] = True
    if get("expert_count"):
        return {
            "model_type": "mixtral",
            "num_local_experts": get("expert_count"),
            "num_experts_per_tok": get("expert_used_count"),
            "sliding_window": window,
        }
    if window:
        more |= {"model_type": "mistral", "sliding_window": window}
    return more


def _gemma(
    architecture: str, get: Callable[..., Any], config: dict[str, Any], window: int | None
) -> dict[str, Any]:
    # The two 27B models scale scores by the width per head instead of the head's size.
    is_27b = config["num_hidden_layers"] in (46, 62)
    width = config["hidden_size"] // config["num_attention_heads"]
    more: dict[str, Any] = {
        "query_pre_attn_scalar": width if is_27b else config["head_dim"],
        "sliding_window": window,
    }
    if architecture == "gemma2":
        return more | {
            "attn_logit_softcapping": get("attn_logit_softcapping", 50.0),
            "final_logit_softcapping": get("final_logit_softcapping", 30.0),
        }
    local = {"rope_type": "default", "rope_theta": get("rope.freq_base_swa", 10_000.0)}
    everywhere = {"full_attention": config["rope_parameters"], "sliding_attention": local}
    return more | {"rope_parameters": everywhere, "final_logit_softcapping": None}


def _experts(
    architecture: str, get: Callable[..., Any], need: Callable[[str], Any]
) -> dict[str, Any]:
    more: dict[str, Any] = {
        "num_experts": need("expert_count"),
        "num_experts_per_tok": need("expert_used_count"),
        # The format has no field for it: the one trained choice of each family.
        "norm_topk_prob": architecture == "qwen3moe",
    }
    if architecture == "olmoe":
        return more | {
            "intermediate_size": get("expert_feed_forward_length") or need("feed_forward_length")
        }
    more["moe_intermediate_size"] = need("expert_feed_forward_length")
    if architecture == "qwen2moe":
        more["shared_expert_intermediate_size"] = need("expert_shared_feed_forward_length")
    return more


def _rope(file: GGUFFile, get: Callable[..., Any], head_dim: int) -> dict[str, Any]:
    """``rope_parameters`` from the scaling keys, or from the tensors that hold the factors."""
    theta = get("rope.freq_base", 10_000.0)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    original = get("rope.scaling.original_context_length")
    attention = get("rope.scaling.attn_factor")
    if "rope_factors_long.weight" in file.tensors:
        rope["rope_type"] = "longrope"
        for kind in ("short", "long"):
            rope[f"{kind}_factor"] = file.tensors[f"rope_factors_{kind}.weight"].read().tolist()
        rope |= {"original_max_position_embeddings": original, "attention_factor": attention}
        return rope
    if "rope_freqs.weight" in file.tensors:
        factors = file.tensors["rope_freqs.weight"].read().double()
        return rope | _llama3_from_factors(factors, theta)
    kind = get("rope.scaling.type")
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": get("rope.scaling.factor")}
        if kind == "yarn":
            rope |= {"original_max_position_embeddings": original, "attention_factor": attention}
    elif kind not in (None, "none"):
        raise UnsupportedModel(
            "unknown kind of rope scaling", field="rope.scaling.type", given=kind
        )
    return {key: value for key, value in rope.items() if value is not None}


def _llama3_from_factors(factors: torch.Tensor, theta: float) -> dict[str, Any]:
    """Llama 3's scaling, of which the file keeps only the divisor of each frequency.

    The released models use one rule with two factors; other divisors are kept as they are.
    """
    from invivo.models.config import RopeConfig
    from invivo.models.rope import rope_frequencies

    dim = 2 * factors.numel()
    rule = {
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    plain, _ = rope_frequencies(RopeConfig(theta, dim), max_positions=8192, dtype=torch.float64)
    for factor in (8.0, 32.0):
        scaling = rule | {"rope_type": "llama3", "factor": factor}
        candidate = RopeConfig(theta, dim, tuple(sorted(scaling.items())))
        scaled, _ = rope_frequencies(candidate, max_positions=8192, dtype=torch.float64)
        if torch.allclose(plain / scaled, factors, rtol=1e-4):
            return scaling
    as_list = factors.tolist()
    return {
        "rope_type": "longrope",
        "short_factor": as_list,
        "long_factor": as_list,
        "attention_factor": 1.0,
    }


_LAYER = re.compile(r"(?:model\.layers|transformer\.h)\.(\d+)\.(.+)\.(weight|bias)$")
_EXPERT = re.compile(r"(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)$")
_EXPERT_NAMES = {
    "w1": "ffn_gate",
    "w3": "ffn_up",
    "w2": "ffn_down",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "transformer.wte.weight": "token_embd.weight",
    "transformer.wpe.weight": "position_embd.weight",
    "transformer.ln_f.weight": "output_norm.weight",
    "transformer.ln_f.bias": "output_norm.bias",
}
_INSIDE = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def hub_tensor(file: GGUFFile, config: ModelConfig, part: Part) -> torch.Tensor:
    """The tensor that the Hub calls ``part.name``, float32, in the Hub's layout.

    Raises:
        UnsupportedModel: the file does not have it, or in another shape.
    """
    name, expert = _gguf_name(config, part.name)
    tensor = file.tensors.get(name)
    if tensor is None and expert is not None:  # older files keep experts apart
        name, expert = name.replace("_exps.", f".{expert}."), None
        tensor = file.tensors.get(name)
    if tensor is None:
        raise UnsupportedModel("the GGUF file lacks a tensor", field=name, given=str(file.path))
    value = tensor.read(expert)
    if part.transposed:
        value = value.T.contiguous()
    if value.numel() == part.shape[-1] and len(part.shape) == 2 and part.shape[0] == 1:
        value = value.view(part.shape)  # one-row matrices are stored as vectors
    if tuple(value.shape) != part.shape:
        raise UnsupportedModel(
            f"tensor {name} has shape {tuple(value.shape)}, the metadata asks for {part.shape}",
            field=name,
            given=str(file.path),
        )
    if file.architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
        value = _uninterleave(value, config.head_dim)
    if file.architecture.startswith("gemma") and name.endswith("norm.weight"):
        value = value - 1.0
    return value


def _gguf_name(config: ModelConfig, hub: str) -> tuple[str, int | None]:
    if hub in _OUTSIDE:
        return _OUTSIDE[hub], None
    match = _LAYER.match(hub)
    assert match is not None, hub
    layer, inner, kind = match.groups()
    expert = _EXPERT.match(inner)
    if expert is not None:
        which, matrix = expert.groups()
        return f"blk.{layer}.{_EXPERT_NAMES[matrix]}_exps.{kind}", int(which)
    if inner == "post_attention_layernorm":
        return (
            f"blk.{layer}.{'post_attention_norm' if config.post_norm else 'ffn_norm'}.{kind}",
            None,
        )
    return f"blk.{layer}.{_INSIDE[inner]}.{kind}", None


def _uninterleave(value: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of each head from pairs (0, D/2, 1, D/2 + 1, ...) back to halves."""
    pairs = value.view(-1, head_dim // 2, 2, *value.shape[1:])
    return pairs.transpose(1, 2).reshape(value.shape)
