"""Writing small GGUF files in the layout of llama.cpp's converter, from tiny Hub models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer
from transformers import PreTrainedModel

ARCHITECTURE = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
    "olmo2": "olmo2",
    "phi3": "phi3",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "olmoe": "olmoe",
}

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
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


def gguf_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The model's tensors under GGUF names and in GGUF layout."""
    config = model.config
    family = config.model_type
    has_post_norms = family in ("gemma2", "gemma3_text", "olmo2")
    found: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            block = f"blk.{name.split('.')[2]}."
            if name.endswith("down_proj"):
                found[block + "ffn_down_exps.weight"] = value
            else:
                gate, up = value.chunk(2, dim=1)
                found[block + "ffn_gate_exps.weight"] = gate
                found[block + "ffn_up_exps.weight"] = up
            continue
        stem, kind = name.rsplit(".", 1)
        prefix = ""
        if stem.startswith(("model.layers.", "transformer.h.")):
            _, _, layer, stem = stem.split(".", 3)
            prefix = f"blk.{layer}."
        if stem == "post_attention_layernorm":
            short = "post_attention_norm" if has_post_norms else "ffn_norm"
        else:
            short = _NAMES[stem]
        if family == "gpt2" and value.dim() == 2 and prefix:
            value = value.T
        if ARCHITECTURE[family] == "llama" and short in ("attn_q", "attn_k"):
            value = interleave(value, config.head_dim or config.hidden_size // 4)
        if family.startswith("gemma") and "norm" in short:
            value = value + 1.0
        if short == "ffn_gate_inp_shexp":
            value = value[0]
        found[f"{prefix}{short}.{kind}"] = value
    return found


def interleave(value: torch.Tensor, head_dim: int) -> torch.Tensor:
    halves = value.reshape(-1, 2, head_dim // 2, *value.shape[1:])
    return halves.transpose(1, 2).reshape(value.shape)


def gguf_metadata(model: PreTrainedModel) -> dict[str, Any]:
    """Keys without the architecture's prefix; None is left out."""
    config = model.config
    if config.model_type == "gpt2":
        return {
            "context_length": config.n_positions,
            "embedding_length": config.n_embd,
            "feed_forward_length": config.n_inner or 4 * config.n_embd,
            "block_count": config.n_layer,
            "attention.head_count": config.n_head,
            "attention.layer_norm_epsilon": config.layer_norm_epsilon,
        }
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // 4
    metadata: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": head_dim,
        "rope.freq_base": rope["rope_theta"],
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
        "attention.sliding_window": getattr(config, "sliding_window", None) or None,
        "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
        "final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
    }
    if rope["rope_type"] in ("linear", "yarn"):
        metadata["rope.scaling.type"] = rope["rope_type"]
        metadata["rope.scaling.factor"] = rope["factor"]
    original = rope.get("original_max_position_embeddings")
    metadata["rope.scaling.original_context_length"] = original
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if experts:
        metadata["expert_count"] = experts
        metadata["expert_used_count"] = config.num_experts_per_tok
        width = getattr(config, "moe_intermediate_size", None)
        metadata["expert_feed_forward_length"] = width
        shared = getattr(config, "shared_expert_intermediate_size", None)
        metadata["expert_shared_feed_forward_length"] = shared
    return metadata


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    *,
    quantize: str = "F32",
    metadata: dict[str, Any] | None = None,
    extra: dict[str, torch.Tensor] | None = None,
) -> dict[str, np.ndarray]:
    """Write ``model`` to ``path``; matrices in type ``quantize``. Returns what was stored."""
    architecture = ARCHITECTURE[model.config.model_type]
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (gguf_metadata(model) | (metadata or {})).items():
        add_value(writer, f"{architecture}.{key}", value)
    write_tokenizer(writer)
    kind = gguf.GGMLQuantizationType[quantize]
    stored = {}
    for name, tensor in (gguf_tensors(model) | (extra or {})).items():
        values = np.ascontiguousarray(tensor.float().numpy())
        if values.ndim < 2 or quantize == "F32":
            writer.add_tensor(name, values)
            stored[name] = values
        else:
            blocks = gguf.quants.quantize(values, kind)
            writer.add_tensor(name, blocks, raw_dtype=kind)
            stored[name] = gguf.quants.dequantize(blocks, kind)
    finish(writer)
    return stored


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        assert value is None


def write_tokenizer(writer: gguf.GGUFWriter) -> None:
    """The tiny byte-level tokenizer, as a GGUF describes it."""
    tokenizer = tiny_tokenizer()
    vocab = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocab)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in vocab])
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(vocab.index("<|im_start|>"))
    writer.add_eos_token_id(vocab.index("<|im_end|>"))
    writer.add_pad_token_id(vocab.index("<|im_end|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
