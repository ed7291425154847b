"""The decoder's forward pass over whole texts [B, T], differentiable in all of its parameters.

The serving pass (``Decoder.forward``) works on flat rows over a paged cache with kernels that may
overwrite their inputs. This one reads the same module's parameters and config and computes the
same function, so that what is trained is served without conversion. Weights are cast to the
states' dtype layer by layer: float32 parameters then get float32 gradients of bfloat16 products.

Gated linear attention begins every text, or every document of it, with a state of zeros and runs
by chunks, as one operator on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, Protocol, cast

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from invivo.kernels.activation import activation
from invivo.kernels.gla import log_gates
from invivo.kernels.gla_chunked_op import gla_chunked_op
from invivo.kernels.norm import layer_norm, rms_norm_reference
from invivo.kernels.rotary import rotary_rows
from invivo.models.decoder import Decoder, Layer
from invivo.models.feedforward.mlp import MLP
from invivo.models.mixers.attention import Attention
from invivo.models.mixers.gla import GatedLinearAttention
from invivo.models.norm import Norm
from invivo.training.lean import InDtype, gated, in_dtype, normed_and_gated, turned
from invivo.training.texts import Texts, lay_out

Table = tuple[torch.Tensor, torch.Tensor]
Recompute = Literal["none", "layer"]


class Maps(Protocol):
    """How the linear maps of a layer are carried out."""

    def __call__(
        self, name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """x [..., d_in] -> [..., d_out], all of one dtype; ``name`` is the weight's in its
        module."""
        ...


class RunLayer(Protocol):
    """One layer over texts: x [B, T, d] -> [B, T, d]; see :func:`run_layer`."""

    def __call__(
        self, x: torch.Tensor, rope: Table | None, mask: torch.Tensor | None, texts: Texts
    ) -> torch.Tensor: ...


def dense_forward(
    decoder: Decoder,
    tokens: torch.Tensor,
    *,
    starts: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    recompute: Recompute = "none",
    layers: Sequence[RunLayer] | None = None,
) -> torch.Tensor:
    """Normalised final states of texts that begin at position 0.

    Args:
        tokens: [B, T] int64 ids.
        starts: [B, T] bool, True where a document begins: documents then know nothing of each
            other, and each is computed as if it were alone. Best kept on the host. None: each
            text is one document.
        dtype: of states and products; None: the parameters'.
        recompute: ``layer`` keeps only the layers' inputs for the backward pass, which computes
            each layer again.
        layers: how each layer is run, where it is not plainly :func:`run_layer`.

    Returns:
        [B, T, d], what ``Decoder.forward`` returns for each text (or document) alone.
    """
    texts = lay_out(decoder.config, tokens.shape, tokens.device, starts)
    x = decoder.embedded(tokens.flatten(), texts.positions).to(dtype or decoder.embed.dtype)
    x = x.view(*tokens.shape, -1)
    layers = plain_layers(decoder, recompute) if layers is None else layers
    ropes: dict[int | None, Table | None] = {}
    for i, (run, kind) in enumerate(zip(layers, decoder.config.layers, strict=True)):
        if kind.rope not in ropes:
            table = decoder.rope_of(i)
            if table is not None and x.is_cpu:
                table = rotary_rows(*table, texts.positions)
            ropes[kind.rope] = table
        mask = texts.mask(kind.window) if kind.mixer == "attention" else None
        x = run(x, ropes[kind.rope], mask, texts)
    return _norm(decoder.final_norm, x, in_dtype(decoder.final_norm, x.dtype))


def plain_layers(decoder: Decoder, recompute: Recompute = "none") -> list[RunLayer]:
    """The decoder's layers as they are, or computed again in the backward pass."""
    run: Callable[..., torch.Tensor] = run_layer
    if recompute == "layer":
        run = partial(twice, run_layer)
    return [partial(run, cast(Layer, layer)) for layer in decoder.layers]


def linear_map(
    name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """A map as it is; see :class:`Maps`."""
    return F.linear(x, weight, bias)


def run_layer(
    layer: Layer,
    x: torch.Tensor,
    rope: Table | None,
    mask: torch.Tensor | None,
    texts: Texts,
    maps: Maps = linear_map,
) -> torch.Tensor:
    """One layer over texts: x [B, T, d] -> [B, T, d].

    Args:
        rope: cosines and sines, whole tables or rows at the texts' positions; None without.
        mask: of this layer, see :meth:`~invivo.training.texts.Texts.mask`.
        maps: the linear maps, but for those of a mixture of experts.
    """
    w = in_dtype(layer, x.dtype)
    h = x if layer.norm1 is None else _norm(layer.norm1, x, w)
    if isinstance(layer.mixer, Attention):
        out = _attention(layer.mixer, h, w, maps, rope, mask, texts.positions)
    else:
        out = _gated_linear_attention(layer.mixer, h, w, maps, texts)
    x = x + (out if layer.post1 is None else _norm(layer.post1, out, w))
    h = x if layer.norm2 is None else _norm(layer.norm2, x, w)
    out = _feedforward(layer, h, w, maps)
    return x + (out if layer.post2 is None else _norm(layer.post2, out, w))


def twice(run: Callable[..., torch.Tensor], *inputs: object) -> torch.Tensor:
    """``run(*inputs)``, which keeps its inputs alone and is run again in the backward pass."""
    out: torch.Tensor = checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)
    return out


def _cast(w: InDtype, parameter: torch.Tensor | None) -> torch.Tensor | None:
    return None if parameter is None else w(parameter)


def _norm(module: Norm, x: torch.Tensor, w: InDtype) -> torch.Tensor:
    """``module`` on the last dimension of x, in x's dtype."""
    weight = w(module.weight)
    if module.is_rms:
        return _rms_norm(x, weight, module.eps, module.unit_offset)
    bias = None if module.bias is None else w(module.bias)
    return layer_norm(x, weight, bias, module.eps)


def _rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: bool = False
) -> torch.Tensor:
    if unit_offset:  # 1 + weight must not be rounded to half precision
        return rms_norm_reference(x, weight, eps, unit_offset=True)
    return F.rms_norm(x, weight.shape, weight, eps)  # one kernel, which keeps x alone


def _attention(
    mixer: Attention,
    x: torch.Tensor,
    w: InDtype,
    maps: Maps,
    rope: Table | None,
    mask: torch.Tensor | None,
    positions: torch.Tensor,
) -> torch.Tensor:
    n_texts, length, _ = x.shape
    qkv = maps("qkv", x.flatten(0, 1), w(mixer.qkv), _cast(w, mixer.qkv_bias))
    heads = qkv.unflatten(1, (-1, mixer.head_dim))
    q, k, v = heads.split(mixer.split, dim=1)
    if mixer.qk_norm != "none":
        q, k = _norm_heads(mixer, q, w(mixer.q_norm)), _norm_heads(mixer, k, w(mixer.k_norm))
    if mixer.qkv_clip is not None:
        q, k, v = (t.clamp(-mixer.qkv_clip, mixer.qkv_clip) for t in (q, k, v))
    if rope is not None:
        q, k = turned(q, *rope, positions), turned(k, *rope, positions)
    q, k, v = (t.unflatten(0, (n_texts, length)).transpose(1, 2) for t in (q, k, v))
    if mixer.softcap is not None:
        z = _capped_attention(q, k, v, mixer.scale, mixer.softcap, mask)
    else:
        if mask is not None and q.is_cuda and q.shape[1] != k.shape[1]:
            # Of torch's kernels for grouped keys only the one that writes out all scores takes
            # masks.
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
        z = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=mixer.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
    return maps("o", z.transpose(1, 2).flatten(2), w(mixer.o), _cast(w, mixer.o_bias))


def _gated_linear_attention(
    mixer: GatedLinearAttention, x: torch.Tensor, w: InDtype, maps: Maps, texts: Texts
) -> torch.Tensor:
    """The mixer's forward pass from states of zeros: [B, T, d] -> [B, T, d]."""
    sizes = mixer.sizes
    qkv = maps("qkv", x, w(mixer.qkv), None)
    if mixer.conv is not None:
        qkv = F.silu(_short_conv(qkv, w(mixer.conv), texts.place))
    q, k, v = qkv.flatten(0, 1).split((sizes.k_width, sizes.k_width, sizes.v_width), dim=1)
    q, k = (t.unflatten(1, (sizes.n_heads, sizes.head_k)) for t in (q, k))
    v = v.unflatten(1, (sizes.n_heads, sizes.head_v))
    low = maps("gate_a", x, w(mixer.gate_a), None)
    logits = maps("gate_b", low, w(mixer.gate_b), w(mixer.gate_b_bias))
    z = _heads(q, k, v, logits.view(q.shape), texts, sizes.tau)
    r = maps("r", x, w(mixer.r), None)
    read = normed_and_gated(z, r.flatten(0, 1), w(mixer.norm), mixer.eps)
    return maps("o", read.view(r.shape), w(mixer.o), None)


def _heads(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    logits: torch.Tensor,
    texts: Texts,
    tau: float,
) -> torch.Tensor:
    """What the heads read from their states: [R, H, V]."""
    if q.is_cuda:
        from invivo.kernels.triton_gla import ops

        if ops.supports(q, v):
            return ops.gla_triton(q, k, v, logits, span_start=texts.span_start_device, tau=tau)[0]
    scale = q.shape[-1] ** -0.5
    out: torch.Tensor
    out, _ = gla_chunked_op(q, k, v, log_gates(logits, tau), texts.span_start, None, scale)
    return out


def _short_conv(x: torch.Tensor, weight: torch.Tensor, place: torch.Tensor | None) -> torch.Tensor:
    """``y_t = sum_i weight[:, i] x_{t - size + 1 + i}`` within each span.

    Args:
        x: [B, T, C].
        weight: [C, 1, size].
        place: [B, T] index of each token in its span; None: a text is one span.
    """
    size, length = weight.shape[-1], x.shape[1]
    padded = F.pad(x, (0, 0, size - 1, 0))
    y = x * weight[:, 0, size - 1]
    for lag in range(1, size):
        tap = weight[:, 0, size - 1 - lag]
        earlier = padded[:, size - 1 - lag : size - 1 - lag + length] * tap
        if place is not None:
            earlier = earlier.where((place >= lag).unsqueeze(-1), 0.0)
        y = y + earlier
    return y


def _norm_heads(mixer: Attention, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """RMS norm of x [rows, heads, D], head by head or over all heads at once."""
    wide = x if mixer.qk_norm == "head" else x.flatten(1)
    normed = _rms_norm(wide, weight, mixer.eps, mixer.unit_offset)
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


def _feedforward(layer: Layer, x: torch.Tensor, w: InDtype, maps: Maps) -> torch.Tensor:
    feed = layer.feedforward
    if not isinstance(feed, MLP):
        weights = {name: w(value) for name, value in feed.named_parameters()}
        rows: torch.Tensor = torch.func.functional_call(feed, weights, (x.flatten(0, 1),))
        return rows.view(x.shape)
    if feed.gated:
        gate_up = maps("gate_up", x, w(feed.gate_up), _cast(w, feed.gate_up_bias))
        hidden = gated(gate_up.flatten(0, 1), feed.kind).unflatten(0, x.shape[:2])
    else:
        hidden = activation(maps("up", x, w(feed.up), _cast(w, feed.up_bias)), feed.kind)
    return maps("down", hidden, w(feed.down), _cast(w, feed.down_bias))
