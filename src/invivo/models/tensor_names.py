"""Which tensor of a Hub checkpoint is which part of which parameter of the decoder.

One list serves the loader, which copies each tensor into its place, and the saver, which cuts the
places out again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from invivo.models.config import GLAConfig, ModelConfig, MoEConfig


@dataclass(frozen=True, slots=True)
class Part:
    """Rows [start, start + rows) of ``parameter`` are the checkpoint's tensor ``name``.

    Attributes:
        parameter: name in the decoder's ``named_parameters``.
        name: name in the checkpoint.
        shape: the tensor's shape in the checkpoint.
        start: first row within the parameter (within one expert's matrix, if ``expert`` is set).
        expert: index of the first dimension, None for a parameter without experts.
        transposed: the checkpoint stores the matrix as [d_in, d_out] (GPT-2).
    """

    parameter: str
    name: str
    shape: tuple[int, ...]
    start: int = 0
    expert: int | None = None
    transposed: bool = False

    @property
    def rows(self) -> int:
        return self.shape[1] if self.transposed else self.shape[0]


def place_of(part: Part, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The view of the parameter that ``part`` fills, in our orientation."""
    place = parameters[part.parameter].detach()
    if part.expert is not None:
        place = place[part.expert]
    return place[part.start : part.start + part.rows]


def tensor_parts(config: ModelConfig) -> list[Part]:
    """All tensors of a checkpoint of ``config``, in the Hub's spelling."""
    if config.family == "gpt2":
        return list(_gpt2_parts(config))
    if config.family == "gla":
        return list(_gla_model_parts(config))
    return list(_parts(config))


def _parts(config: ModelConfig) -> Iterator[Part]:
    d, f, V = config.d_model, config.d_ff, config.vocab_size
    yield Part("embed", "model.embed_tokens.weight", (V, d))
    for i, layer in enumerate(config.layers):
        ours, hub = f"layers.{i}.", f"model.layers.{i}."
        yield from _attention_parts(config, ours + "mixer.", hub + "self_attn.")
        for norm, name in _layer_norms(config):
            yield Part(f"{ours}{norm}.weight", f"{hub}{name}.weight", (d,))
        feed = ours + "feedforward."
        if layer.feedforward == "mlp":
            yield from _mlp_parts(config, feed, hub + "mlp.", f)
        else:
            assert config.moe is not None
            yield from _moe_parts(config, config.moe, feed, hub)
    yield Part("final_norm.weight", "model.norm.weight", (d,))
    if not config.tie_embeddings:
        yield Part("head", "lm_head.weight", (V, d))


def _gla_model_parts(config: ModelConfig) -> Iterator[Part]:
    """flash-linear-attention's ``GLAForCausalLM``."""
    d = config.d_model
    yield Part("embed", "model.embeddings.weight", (config.vocab_size, d))
    for i, layer in enumerate(config.layers):
        ours, hub = f"layers.{i}.", f"model.layers.{i}."
        if layer.mixer == "gla":
            assert config.gla is not None
            yield from _gla_parts(config.gla, d, ours + "mixer.", hub + "attn.")
        else:
            yield from _attention_parts(config, ours + "mixer.", hub + "attn.")
        yield Part(f"{ours}norm1.weight", f"{hub}attn_norm.weight", (d,))
        yield Part(f"{ours}norm2.weight", f"{hub}mlp_norm.weight", (d,))
        yield from _mlp_parts(config, ours + "feedforward.", hub + "mlp.", config.d_ff)
    yield Part("final_norm.weight", "model.norm.weight", (d,))
    if not config.tie_embeddings:
        yield Part("head", "lm_head.weight", (config.vocab_size, d))


def _gla_parts(gla: GLAConfig, d: int, ours: str, hub: str) -> Iterator[Part]:
    k, v = gla.k_width, gla.v_width
    for name, start, rows in (("q", 0, k), ("k", k, k), ("v", 2 * k, v)):
        yield Part(ours + "qkv", f"{hub}{name}_proj.weight", (rows, d), start)
        if gla.conv_size:
            shape = (rows, 1, gla.conv_size)
            yield Part(ours + "conv", f"{hub}{name}_conv1d.weight", shape, start)
    yield Part(ours + "r", hub + "g_proj.weight", (v, d))
    yield Part(ours + "gate_a", hub + "gk_proj.0.weight", (gla.gate_rank, d))
    yield Part(ours + "gate_b", hub + "gk_proj.1.weight", (k, gla.gate_rank))
    yield Part(ours + "gate_b_bias", hub + "gk_proj.1.bias", (k,))
    yield Part(ours + "norm", hub + "g_norm_swish_gate.weight", (gla.head_v,))
    yield Part(ours + "o", hub + "o_proj.weight", (d, v))


def _layer_norms(config: ModelConfig) -> list[tuple[str, str]]:
    """Our norm and the Hub's name of it; the Hub names norms by where Llama has them."""
    if config.pre_norm and config.post_norm:
        return [
            ("norm1", "input_layernorm"),
            ("post1", "post_attention_layernorm"),
            ("norm2", "pre_feedforward_layernorm"),
            ("post2", "post_feedforward_layernorm"),
        ]
    if config.post_norm:
        return [("post1", "post_attention_layernorm"), ("post2", "post_feedforward_layernorm")]
    return [("norm1", "input_layernorm"), ("norm2", "post_attention_layernorm")]


def _attention_parts(config: ModelConfig, ours: str, hub: str) -> Iterator[Part]:
    d, D = config.d_model, config.head_dim
    q, kv = config.n_heads * D, config.n_kv_heads * D
    if config.family == "phi3":
        yield Part(ours + "qkv", hub + "qkv_proj.weight", (q + 2 * kv, d))
    else:
        for name, start, rows in (("q", 0, q), ("k", q, kv), ("v", q + kv, kv)):
            yield Part(ours + "qkv", f"{hub}{name}_proj.weight", (rows, d), start)
            if config.qkv_bias:
                yield Part(ours + "qkv_bias", f"{hub}{name}_proj.bias", (rows,), start)
    yield Part(ours + "o", hub + "o_proj.weight", (d, q))
    if config.o_bias:
        yield Part(ours + "o_bias", hub + "o_proj.bias", (d,))
    if config.qk_norm != "none":
        per_head = config.qk_norm == "head"
        yield Part(ours + "q_norm", hub + "q_norm.weight", (D if per_head else q,))
        yield Part(ours + "k_norm", hub + "k_norm.weight", (D if per_head else kv,))


def _mlp_parts(config: ModelConfig, ours: str, hub: str, f: int) -> Iterator[Part]:
    d = config.d_model
    if config.family == "phi3":
        yield Part(ours + "gate_up", hub + "gate_up_proj.weight", (2 * f, d))
    else:
        for name, start in (("gate", 0), ("up", f)):
            yield Part(ours + "gate_up", f"{hub}{name}_proj.weight", (f, d), start)
            if config.mlp_bias:
                yield Part(ours + "gate_up_bias", f"{hub}{name}_proj.bias", (f,), start)
    yield Part(ours + "down", hub + "down_proj.weight", (d, f))
    if config.mlp_bias:
        yield Part(ours + "down_bias", hub + "down_proj.bias", (d,))


def _moe_parts(config: ModelConfig, moe: MoEConfig, ours: str, hub: str) -> Iterator[Part]:
    d, f = config.d_model, moe.d_expert
    mixtral = config.family == "mixtral"
    hub += "block_sparse_moe." if mixtral else "mlp."
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    yield Part(ours + "router", hub + "gate.weight", (moe.n_experts, d))
    for e in range(moe.n_experts):
        expert = f"{hub}experts.{e}."
        yield Part(ours + "gate_up", f"{expert}{gate}.weight", (f, d), 0, e)
        yield Part(ours + "gate_up", f"{expert}{up}.weight", (f, d), f, e)
        yield Part(ours + "down", f"{expert}{down}.weight", (d, f), 0, e)
    if moe.d_shared:
        yield from _mlp_parts(config, ours + "shared.", hub + "shared_expert.", moe.d_shared)
        yield Part(ours + "shared_gate", hub + "shared_expert_gate.weight", (1, d))


def _gpt2_parts(config: ModelConfig) -> Iterator[Part]:
    d, f = config.d_model, config.d_ff
    yield Part("embed", "transformer.wte.weight", (config.vocab_size, d))
    yield Part("positions", "transformer.wpe.weight", (config.max_positions, d))
    for i in range(config.n_layers):
        ours, hub = f"layers.{i}.", f"transformer.h.{i}."
        for norm, name in (("norm1", "ln_1"), ("norm2", "ln_2")):
            yield Part(f"{ours}{norm}.weight", f"{hub}{name}.weight", (d,))
            yield Part(f"{ours}{norm}.bias", f"{hub}{name}.bias", (d,))
        for linear, name, rows, columns in (
            ("mixer.qkv", "attn.c_attn", 3 * d, d),
            ("mixer.o", "attn.c_proj", d, d),
            ("feedforward.up", "mlp.c_fc", f, d),
            ("feedforward.down", "mlp.c_proj", d, f),
        ):
            shape = (columns, rows)
            yield Part(ours + linear, f"{hub}{name}.weight", shape, transposed=True)
            yield Part(f"{ours}{linear}_bias", f"{hub}{name}.bias", (rows,))
    yield Part("final_norm.weight", "transformer.ln_f.weight", (d,))
    yield Part("final_norm.bias", "transformer.ln_f.bias", (d,))
    if not config.tie_embeddings:
        yield Part("head", "lm_head.weight", (config.vocab_size, d))
