"""A gated linear attention layer (Yang et al., 2023, arXiv 2312.06635, section 4.4).

Queries, keys and values are plain linear maps, gates a low-rank one; each head's output is
normalised, multiplied by ``silu`` of an output gate, and the heads are mixed by ``o``. As in
flash-linear-attention the norm is RMS and a short convolution may follow q, k and v.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from invivo.kernels.device import wants_grad
from invivo.kernels.gla import gla, gla_from_logits, gla_step, log_gates
from invivo.kernels.linear import linear, pack
from invivo.kernels.norm import rms_norm
from invivo.kernels.paging import PagedLayout
from invivo.models.bypass import Bypass
from invivo.models.config import GLAConfig, ModelConfig
from invivo.models.mixers.gla_open import read_openly, reweigh
from invivo.models.mixers.short_conv import short_conv
from invivo.models.sites import StateTaps, Taps, offer, state_taps


class GatedLinearAttention(nn.Module):
    """Gated linear attention of one layer, with H heads of K key and V value channels.

    ``qkv`` is [H (2 K + V), d], query, key and value below each other; ``r`` [H V, d] the output
    gate; ``gate_a`` [rank, d] and ``gate_b`` [H K, rank] the gate; ``o`` [d, H V]; ``norm`` [V];
    ``conv`` [H (2 K + V), 1, size].
    """

    def __init__(
        self,
        config: ModelConfig,
        gla: GLAConfig,
        layer: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
    ):
        super().__init__()
        self.layer = layer
        self.sizes = gla
        self.eps = config.norm_eps

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)

        self.qkv = parameter(gla.qkv_width, config.d_model)
        self.r = parameter(gla.v_width, config.d_model)
        self.gate_a = parameter(gla.gate_rank, config.d_model)
        self.gate_b = parameter(gla.k_width, gla.gate_rank)
        self.gate_b_bias = parameter(gla.k_width)
        self.norm = parameter(gla.head_v)
        self.o = parameter(config.d_model, gla.v_width)
        self.conv = parameter(gla.qkv_width, 1, gla.conv_size) if gla.conv_size else None
        self.qkv_packed: torch.Tensor | None = None
        self.r_packed: torch.Tensor | None = None
        self.o_packed: torch.Tensor | None = None

    def pack(self) -> None:
        """Keep packed copies of the matrices; see :meth:`Decoder.pack`."""
        self.qkv_packed, self.r_packed, self.o_packed = pack(self.qkv), pack(self.r), pack(self.o)

    def forward(
        self,
        x: torch.Tensor,
        layout: PagedLayout,
        memory: tuple[torch.Tensor, torch.Tensor],
        rope: object,
        bypass: Bypass | None,
        taps: Taps | None,
    ) -> torch.Tensor:
        """x [T, d] -> [T, d]; the states of the layout's slots move on in ``memory``.

        Args:
            memory: this layer's states [n_slots, H, K, V] and convolution tails; not touched
                where the layout has no slots.
            rope: not used, there are no positions.
        """
        layer, sizes = self.layer, self.sizes
        if taps is not None:
            x = offer(taps, "attn.in", layer, x)
        qkv = linear(x, self.qkv, None, self.qkv_packed)
        if bypass is not None:
            qkv = bypass(layer, "qkv", x, qkv)
        if self.conv is not None:
            qkv = F.silu(short_conv(qkv, self.conv, layout, memory[1]))
        q, k, v = qkv.split((sizes.k_width, sizes.k_width, sizes.v_width), dim=1)
        q, k = (t.unflatten(1, (sizes.n_heads, sizes.head_k)) for t in (q, k))
        v = v.unflatten(1, (sizes.n_heads, sizes.head_v))
        logits = linear(linear(x, self.gate_a), self.gate_b, self.gate_b_bias)
        logits = logits.view(q.shape)
        if taps is None:  # the kernels make the gates from their logits
            z = _mix(q, k, v, logits, sizes.tau, layout, memory[0])
        else:
            q = offer(taps, "gla.head.q", layer, q)
            k = offer(taps, "gla.head.k", layer, k)
            v = offer(taps, "gla.head.v", layer, v)
            z = _tapped(q, k, v, logits, sizes.tau, layout, memory[0], taps, layer)
        if taps is not None:
            z = offer(taps, "gla.head.z", layer, z)
        r = linear(x, self.r, None, self.r_packed)
        if bypass is not None:
            r = bypass(layer, "r", x, r)
        mixed = rms_norm(z, self.norm, self.eps).flatten(1) * F.silu(r)
        out = linear(mixed, self.o, None, self.o_packed)
        if bypass is not None:
            out = bypass(layer, "o", mixed, out)
        return out


def _mix(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: torch.Tensor,
    tau: float | None,
    layout: PagedLayout,
    states: torch.Tensor,
) -> torch.Tensor:
    """What the heads read from their states [T, H, V]: decodes by steps, longer spans by chunks.

    ``gates`` are logits, or, without ``tau``, log gates.
    """
    n, slots = layout.n_decode, layout.state_slots
    by_chunks = gla if tau is None else partial(gla_from_logits, tau=tau)
    if slots is None:
        starts, on_device = _starts(layout), layout.span_start
        return by_chunks(q, k, v, gates, span_start=starts, span_start_device=on_device)[0]
    if wants_grad(q, k, v, gates, states):
        n = 0  # a step has no gradient
    parts = []
    if n:
        parts.append(gla_step(q[:n], k[:n], v[:n], gates[:n], states, slots[:n], tau=tau))
    if n < layout.n_spans:
        own = slots[n:]
        out, final = by_chunks(
            *(t[n:] for t in (q, k, v, gates)),
            span_start=[start - n for start in _starts(layout)[n:]],
            span_start_device=layout.span_start[n:] - n,
            initial_state=states.index_select(0, own),
            want_state=True,
        )
        assert final is not None
        states.index_copy_(0, own, final)
        parts.append(out)
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else torch.empty_like(v)


def _tapped(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    logits: torch.Tensor,
    tau: float,
    layout: PagedLayout,
    states: torch.Tensor,
    taps: Taps,
    layer: int,
) -> torch.Tensor:
    """:func:`_mix` with gates and states open to ``taps``: what is not asked for is not made."""
    g: torch.Tensor | None = None
    if taps.wants("gla.head.gate", layer):
        plain = log_gates(logits, tau)
        offered = plain.exp()
        answer = offer(taps, "gla.head.gate", layer, offered)
        if answer is not offered:  # gates that nobody changes keep their bits
            g = torch.where(answer == offered, plain, answer.clamp(0.0, 1.0).log())
    open_taps = state_taps(taps)
    spans = () if open_taps is None else open_taps.open_states(layer)
    if open_taps is not None and spans:
        g = log_gates(logits, tau) if g is None else g
        return _mix_split(q, k, v, g, layout, states, open_taps, sorted(spans), layer)
    if g is not None:
        return _mix(q, k, v, g, None, layout, states)
    return _mix(q, k, v, logits, tau, layout, states)


def _mix_split(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    layout: PagedLayout,
    states: torch.Tensor,
    taps: StateTaps,
    spans: list[int],
    layer: int,
) -> torch.Tensor:
    """:func:`_mix` with the recurrence of ``spans`` laid open."""
    starts, slots = _starts(layout), layout.state_slots
    memory = states.new_zeros(len(spans), *states.shape[1:])
    if slots is not None:
        memory = states.index_select(0, slots[torch.tensor(spans, device=slots.device)])
    z = _mix(q, k, v, g, None, layout, states)
    parts = list(z.split([stop - start for start, stop in pairwise(starts)]))
    for span, before in zip(spans, memory, strict=True):
        rows = slice(starts[span], starts[span + 1])
        here = q[rows], k[rows], v[rows], g[rows]
        read, last, changed = read_openly(*here, before, taps, span, layer)
        if changed or slots is None:
            parts[span] = read
            if slots is not None:
                states.index_copy_(0, slots[span : span + 1], last.unsqueeze(0))
        shares = taps.key_shares(span, layer)
        if shares:
            looked_at = taps.state_rows(span, layer)
            parts[span] = reweigh(parts[span], *here, before, looked_at, shares)
    return torch.cat(parts)


def _starts(layout: PagedLayout) -> list[int]:
    return layout.span_start_host or layout.span_start.tolist()
