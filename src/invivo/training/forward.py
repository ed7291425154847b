"""The decoder's forward pass over whole texts [B, T], differentiable in all of its parameters.

The serving pass (``Decoder.forward``) works on flat rows over a paged cache with kernels that may
overwrite their inputs. This one reads the same module's parameters and config and computes the
same function, so that what is trained is served without conversion. Weights are cast to the
states' dtype where they are used: float32 parameters then get float32 gradients of bfloat16
products.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from invivo.errors import UnsupportedModel
from invivo.kernels.activation import activation, gated_activation_reference
from invivo.kernels.norm import layer_norm, rms_norm_reference
from invivo.kernels.rotary import apply_rotary_reference, rotary_rows
from invivo.models.decoder import Decoder, Layer
from invivo.models.feedforward.mlp import MLP
from invivo.models.mixers.attention import Attention
from invivo.models.norm import Norm
from invivo.models.rope import long_text_offset

Table = tuple[torch.Tensor, torch.Tensor]


def dense_forward(
    decoder: Decoder, tokens: torch.Tensor, *, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Normalised final states of texts that begin at position 0.

    Args:
        tokens: [B, T] int64 ids.
        dtype: of states and products; None: the parameters'.

    Returns:
        [B, T, d], what ``Decoder.forward`` returns for each text alone.

    Raises:
        UnsupportedModel: a layer that this pass does not compute (gated linear attention).
    """
    n_texts, length = tokens.shape
    config = decoder.config
    offset = long_text_offset(config, length)
    positions = torch.arange(offset, offset + length, device=tokens.device).repeat(n_texts)
    x = decoder.embedded(tokens.flatten(), positions).to(dtype or decoder.embed.dtype)
    x = x.unflatten(0, (n_texts, length))
    masks: dict[int | None, torch.Tensor | None] = {None: None}
    for i, (layer, kind) in enumerate(zip(decoder.layers, config.layers, strict=True)):
        assert isinstance(layer, Layer)
        if kind.window not in masks:
            masks[kind.window] = _window_mask(length, kind.window, tokens.device)
        table = decoder.rope_of(i)
        rope = None if table is None else rotary_rows(*table, positions)
        x = _layer(layer, x, rope, masks[kind.window])
    return _norm(decoder.final_norm, x)


def _window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """[T, T], True where a row sees a column; None where that is all columns up to its own."""
    if window is None or window >= length:
        return None
    index = torch.arange(length, device=device)
    distance = index[:, None] - index[None, :]
    return (distance >= 0) & (distance < window)


def _layer(
    layer: Layer, x: torch.Tensor, rope: Table | None, mask: torch.Tensor | None
) -> torch.Tensor:
    if not isinstance(layer.mixer, Attention):
        raise UnsupportedModel(
            "training from scratch knows attention layers only",
            field="config.layers",
            given=type(layer.mixer).__name__,
        )
    h = x if layer.norm1 is None else _norm(layer.norm1, x)
    out = _attention(layer.mixer, h, rope, mask)
    x = x + (out if layer.post1 is None else _norm(layer.post1, out))
    h = x if layer.norm2 is None else _norm(layer.norm2, x)
    out = _feedforward(layer, h)
    return x + (out if layer.post2 is None else _norm(layer.post2, out))


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _norm(norm: Norm, x: torch.Tensor) -> torch.Tensor:
    weight = norm.weight.to(x.dtype)
    if norm.is_rms:
        return rms_norm_reference(x, weight, norm.eps, unit_offset=norm.unit_offset)
    return layer_norm(x, weight, None if norm.bias is None else norm.bias.to(x.dtype), norm.eps)


def _attention(
    mixer: Attention, x: torch.Tensor, rope: Table | None, mask: torch.Tensor | None
) -> torch.Tensor:
    n_texts, length, _ = x.shape
    qkv = _linear(x.flatten(0, 1), mixer.qkv, mixer.qkv_bias)
    heads = qkv.unflatten(1, (-1, mixer.head_dim))
    q, k, v = heads.split(mixer.split, dim=1)
    if mixer.qk_norm != "none":
        q, k = _norm_heads(mixer, q, mixer.q_norm), _norm_heads(mixer, k, mixer.k_norm)
    if mixer.qkv_clip is not None:
        q, k, v = (t.clamp(-mixer.qkv_clip, mixer.qkv_clip) for t in (q, k, v))
    if rope is not None:
        positions = torch.empty(0, dtype=torch.int64)  # the rows of the tables are picked already
        q, k = apply_rotary_reference(q, k, *rope, positions)
    q, k, v = (t.unflatten(0, (n_texts, length)).transpose(1, 2) for t in (q, k, v))
    if mixer.softcap is not None:
        z = _capped_attention(q, k, v, mixer.scale, mixer.softcap, mask)
    else:
        z = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=mixer.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
    return _linear(z.transpose(1, 2).flatten(2), mixer.o, mixer.o_bias)


def _norm_heads(mixer: Attention, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """RMS norm of x [rows, heads, D], head by head or over all heads at once."""
    wide = x if mixer.qk_norm == "head" else x.flatten(1)
    normed = rms_norm_reference(wide, weight.to(x.dtype), mixer.eps, unit_offset=mixer.unit_offset)
    return normed.reshape(x.shape)


def _capped_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    softcap: float,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Attention whose scores are ``softcap * tanh(score / softcap)`` (Gemma 2), all at once."""
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    scores = torch.tanh(q @ k.transpose(2, 3) * (scale / softcap)) * softcap
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~mask, -torch.inf)
    wide = q.dtype if q.dtype == torch.float64 else torch.float32
    return torch.softmax(scores, dim=-1, dtype=wide).to(q.dtype) @ v


def _feedforward(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    feed = layer.feedforward
    if not isinstance(feed, MLP):
        weights = {name: value.to(x.dtype) for name, value in feed.named_parameters()}
        rows: torch.Tensor = torch.func.functional_call(feed, weights, (x.flatten(0, 1),))
        return rows.view(x.shape)
    if feed.gated:
        hidden = gated_activation_reference(_linear(x, feed.gate_up, feed.gate_up_bias), feed.kind)
    else:
        hidden = activation(_linear(x, feed.up, feed.up_bias), feed.kind)
    return _linear(hidden, feed.down, feed.down_bias)
