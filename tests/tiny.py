"""Tiny models for everyone's tests: a few thousand random parameters in the Hub's format.

The folders are written by transformers' own classes, so that a test which loads one of them
also tests the loader; the tokenizer is a byte-level BPE with a ChatML template.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

if TYPE_CHECKING:
    from invivo.models.load import LoadedModel

_WORDS = "the and you not is of cat dog red blue hello world"

CHAT_TEMPLATE = """\
{%- if tools %}{{ '<|im_start|>system\\nYou may call these tools:\\n' }}
{%- for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{% endfor %}
{{- 'Answer with <tool_call>{"name": ..., "arguments": ...}</tool_call> to call one.' }}
{{- '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] %}{{ message['content'] }}{% endif %}
{%- for call in message.get('tool_calls') or [] %}
{{- '<tool_call>' + (call['function'] | tojson) + '</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

_BASE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}

# What each family adds to _BASE: small, and with its special features switched on.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 7, "head_dim": 12},
    "qwen2": {
        "num_hidden_layers": 4,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 2,
    },
    "qwen3": {"head_dim": 16},
    "gemma2": {
        "head_dim": 12,
        "sliding_window": 6,
        "query_pre_attn_scalar": 10,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {
        "head_dim": 12,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 6,
        "query_pre_attn_scalar": 10,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "gpt2": {
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 256,
        "tie_word_embeddings": True,
    },
    "olmo2": {},
    "phi3": {"head_dim": 8, "partial_rotary_factor": 0.5, "sliding_window": 9},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "mlp_only_layers": [1],
    },
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}


def tiny_tokenizer() -> Tokenizer:
    """Byte-level BPE: 256 bytes, a few dozen merges and three special tokens."""
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []
    for word in _WORDS.split():
        pieces = [(word[:i], word[i]) for i in range(1, len(word))] + [("Ġ", word)]
        for left, right in pieces:
            if left + right not in vocab:
                vocab[left + right] = len(vocab)
                merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return tokenizer


def tiny_hf_model(family: str = "llama", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Transformers' model of ``family`` with weights large enough that attention is not uniform."""
    tokenizer = tiny_tokenizer()
    settings = {} if family == "gpt2" else dict(_BASE)
    settings |= FAMILIES[family]
    settings |= {
        "vocab_size": tokenizer.get_vocab_size(),
        "bos_token_id": tokenizer.token_to_id("<|im_start|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "pad_token_id": tokenizer.token_to_id("<|im_end|>"),
    }
    settings |= overrides
    config = AutoConfig.for_model(family, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:  # norms stay near their start, biases become visible
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(1.2 * noise / parameter.shape[-1] ** 0.5)
    return model.eval()


def tiny_model_folder(tmp_path: Path, family: str = "llama", **overrides: Any) -> Path:
    """Write a tiny random model of ``family`` with a tokenizer below ``tmp_path``.

    Args:
        tmp_path: an existing folder; the model goes to ``tmp_path / "tiny-<family>"``.
        family: a key of ``FAMILIES``.
        overrides: fields of the transformers config, and ``seed`` of the weights.
    """
    folder = tmp_path / f"tiny-{family}"
    tiny_hf_model(family, **overrides).save_pretrained(folder)
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 256,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=1))
    return folder


def tiny_loaded(
    tmp_path: Path,
    family: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **overrides: Any,
) -> LoadedModel:
    """:func:`tiny_model_folder`, loaded by our own loader."""
    from invivo.models.load import load_model

    folder = tiny_model_folder(tmp_path, family, **overrides)
    return load_model(str(folder), device=device, dtype=dtype)
