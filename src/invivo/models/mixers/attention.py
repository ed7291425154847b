"""Softmax attention with grouped keys over the paged cache."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from invivo.kernels.attention import attention_with_lse, paged_attention, store_kv
from invivo.kernels.linear import linear, pack
from invivo.kernels.norm import rms_norm
from invivo.kernels.paging import PagedLayout
from invivo.kernels.rotary import apply_rotary, rotate_and_store
from invivo.models.bypass import Bypass, at_place
from invivo.models.config import ModelConfig
from invivo.models.sites import LSE, SplitTaps, Taps, offer, split_taps


class Attention(nn.Module):
    """Attention of one layer; query, key and value matrices lie below each other in ``qkv``.

    ``qkv`` is [(H + 2 G) D, d], ``o`` is [d, H D].
    """

    def __init__(
        self, config: ModelConfig, layer: int, *, device: torch.device | str, dtype: torch.dtype
    ):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.n_heads = config.n_heads
        self.split = (config.n_heads, config.n_kv_heads, config.n_kv_heads)
        self.scale = config.attn_scale or config.head_dim**-0.5
        self.window = config.layers[layer].window
        self.softcap = config.attn_softcap
        self.qk_norm = config.qk_norm
        self.qkv_clip = config.qkv_clip
        self.eps = config.norm_eps
        self.unit_offset = config.norm_unit_offset

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)

        q_width = config.n_heads * config.head_dim
        kv_width = config.n_kv_heads * config.head_dim
        width = q_width + 2 * kv_width
        self.qkv = parameter(width, config.d_model)
        self.qkv_bias = parameter(width) if config.qkv_bias else None
        self.o = parameter(config.d_model, q_width)
        self.o_bias = parameter(config.d_model) if config.o_bias else None
        self.qkv_packed: torch.Tensor | None = None
        self.o_packed: torch.Tensor | None = None
        if config.qk_norm != "none":
            per_head = config.qk_norm == "head"
            self.q_norm = parameter(config.head_dim if per_head else q_width)
            self.k_norm = parameter(config.head_dim if per_head else kv_width)

    def pack(self) -> None:
        """Keep packed copies of the matrices; see :meth:`Decoder.pack`."""
        self.qkv_packed, self.o_packed = pack(self.qkv), pack(self.o)

    def forward(
        self,
        x: torch.Tensor,
        layout: PagedLayout,
        kv: tuple[torch.Tensor, torch.Tensor],
        rope: tuple[torch.Tensor, torch.Tensor] | None,
        bypass: Bypass | None,
        taps: Taps | None,
    ) -> torch.Tensor:
        """x [T, d] -> [T, d]; writes this layer's keys and values into ``kv``.

        Args:
            kv: caches of this layer, each [n_blocks, block_size, G, D].
            rope: cosine and sine tables, None for a layer without rotary embedding.
        """
        layer = self.layer
        if taps is not None:
            x = offer(taps, "attn.in", layer, x)
        qkv = linear(x, self.qkv, self.qkv_bias, self.qkv_packed)
        if bypass is not None:
            qkv = bypass(layer, "qkv", x, qkv)
        n_rows = x.shape[0]
        q, k, v = qkv.view(n_rows, -1, self.head_dim).split_with_sizes(self.split, 1)
        if self.qk_norm != "none":
            q, k = self._norm_qk(q, k)
        if self.qkv_clip is not None:
            q, k, v = (t.clamp(-self.qkv_clip, self.qkv_clip) for t in (q, k, v))
        if bypass is not None and bypass.at:
            k = at_place(bypass, "attn.kvhead.k", layer, k)
            v = at_place(bypass, "attn.kvhead.v", layer, v)
        if taps is not None:
            q = offer(taps, "attn.head.q", layer, q)
            k = offer(taps, "attn.kvhead.k", layer, k)
            v = offer(taps, "attn.kvhead.v", layer, v)
        if rope is not None and (taps is None or not taps.wants("attn.kvhead.k.rot", layer)):
            q = rotate_and_store(q, k, v, *rope, layout.positions, *kv, layout.slots)
            if taps is not None:
                q = offer(taps, "attn.head.q.rot", layer, q)
        else:
            if rope is not None:
                q, k = apply_rotary(q, k, rope[0], rope[1], layout.positions)
            if rope is not None and taps is not None:
                q = offer(taps, "attn.head.q.rot", layer, q)
                k = offer(taps, "attn.kvhead.k.rot", layer, k)
            store_kv(k, v, kv[0], kv[1], layout.slots)
        if taps is not None and (
            taps.wants("attn.head.score", layer) or taps.wants("attn.head.prob", layer)
        ):
            z = self._attend_openly(q, kv, layout, taps)
        elif taps is not None and taps.wants(LSE, layer):
            z, lse = attention_with_lse(
                q, *kv, layout, scale=self.scale, window=self.window, softcap=self.softcap
            )
            if lse is not None:
                taps(LSE, layer, lse)
        else:
            z = paged_attention(
                q,
                kv[0],
                kv[1],
                layout,
                scale=self.scale,
                window=self.window,
                softcap=self.softcap,
            )
        split = split_taps(taps)
        if split is not None and (spans := split.open_spans(layer)):
            z = self._attend_split(q, kv, layout, split, spans, z)
        if taps is not None:
            z = offer(taps, "attn.head.z", layer, z)
        mixed = z.reshape(n_rows, -1)
        if taps is not None and taps.wants("attn.head.out", layer):
            out = self._sum_of_heads(z, taps)
        else:
            out = linear(mixed, self.o, self.o_bias, self.o_packed)
        if bypass is not None:
            out = bypass(layer, "o", mixed, out)
        return out

    def _norm_qk(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """RMS norm of queries and keys, head by head or over all heads at once."""
        if self.qk_norm == "head":
            return (
                rms_norm(q, self.q_norm, self.eps, unit_offset=self.unit_offset),
                rms_norm(k, self.k_norm, self.eps, unit_offset=self.unit_offset),
            )
        return (
            rms_norm(q.flatten(1), self.q_norm, self.eps, unit_offset=self.unit_offset).view(
                q.shape
            ),
            rms_norm(k.flatten(1), self.k_norm, self.eps, unit_offset=self.unit_offset).view(
                k.shape
            ),
        )

    def _sum_of_heads(self, z: torch.Tensor, taps: Taps) -> torch.Tensor:
        """Output as the sum of one vector a head: z [T, H, D] -> [T, d]."""
        per_head = self.o.view(-1, self.n_heads, self.head_dim)
        shares = torch.einsum("thk,dhk->thd", z, per_head)
        answer = offer(taps, "attn.head.out", self.layer, shares)
        if answer is shares:
            return linear(z.reshape(z.shape[0], -1), self.o, self.o_bias, self.o_packed)
        out = answer.sum(1)
        out = out if self.o_bias is None else out + self.o_bias
        if answer.requires_grad:
            return out
        plain = linear(z.reshape(z.shape[0], -1), self.o, self.o_bias, self.o_packed)
        changed = (answer != shares).flatten(1).any(1, keepdim=True)
        return torch.where(changed, out, plain)  # rows that nobody changes keep their bits

    def _attend_openly(
        self,
        q: torch.Tensor,
        kv: tuple[torch.Tensor, torch.Tensor],
        layout: PagedLayout,
        taps: Taps,
    ) -> torch.Tensor:
        """Attention with scores and probabilities laid open, padded to the longest span's keys."""
        wide = q.dtype if q.dtype == torch.float64 else torch.float32
        starts = layout.span_start_host or layout.span_start.tolist()
        lengths = layout.kv_len_host or layout.kv_len.tolist()
        scores = torch.full(
            (q.shape[0], self.n_heads, layout.max_kv), -torch.inf, dtype=wide, device=q.device
        )
        spans = []
        for span, length in enumerate(lengths):
            rows = slice(starts[span], starts[span + 1])
            scores[rows, :, :length], values = self._scores(q[rows], kv, layout, span, length)
            spans.append((rows, length, values))
        scores = offer(taps, "attn.head.score", self.layer, scores)
        probs = offer(taps, "attn.head.prob", self.layer, _probabilities(scores))
        parts = [
            torch.einsum("thl,lhd->thd", probs[rows, :, :length], values)
            for rows, length, values in spans
        ]
        return torch.cat(parts).to(q.dtype)

    def _attend_split(
        self,
        q: torch.Tensor,
        kv: tuple[torch.Tensor, torch.Tensor],
        layout: PagedLayout,
        taps: SplitTaps,
        spans: Collection[int],
        z: torch.Tensor,
    ) -> torch.Tensor:
        """``z`` [T, H, D] with the rows of ``spans`` computed openly."""
        starts = layout.span_start_host or layout.span_start.tolist()
        lengths = layout.kv_len_host or layout.kv_len.tolist()
        z = z.clone()
        for span in spans:
            rows, length = slice(starts[span], starts[span + 1]), lengths[span]
            numbers = taps.numbers(span, self.layer, length)
            scores, values = self._scores(q[rows], kv, layout, span, length, numbers)
            scores = taps.at_span(span, "attn.head.score", self.layer, scores)
            probs = taps.at_span(span, "attn.head.prob", self.layer, _probabilities(scores))
            z[rows] = torch.einsum("thl,lhd->thd", probs, values).to(z.dtype)
        return z

    def _scores(
        self,
        q: torch.Tensor,
        kv: tuple[torch.Tensor, torch.Tensor],
        layout: PagedLayout,
        span: int,
        length: int,
        numbers: list[int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Masked scores [n, H, length] of the queries [n, H, D] of one span, and its values.

        Args:
            numbers: position numbers of the keys, which the window counts; None: their indices.
        """
        wide = q.dtype if q.dtype == torch.float64 else torch.float32
        repeat = self.n_heads // self.split[1]
        blocks = layout.block_table[span, : -(-length // layout.block_size)].long()
        keys, values = (
            pages[blocks].flatten(0, 1)[:length].to(wide).repeat_interleave(repeat, dim=1)
            for pages in kv
        )
        score = torch.einsum("thd,lhd->thl", q.to(wide), keys) * self.scale
        if self.softcap is not None:
            score = self.softcap * torch.tanh(score / self.softcap)
        index = torch.arange(length, device=q.device)
        visible = index[length - q.shape[0] :, None] >= index
        if self.window is not None:
            number = index if numbers is None else torch.tensor(numbers, device=q.device)
            visible &= number[length - q.shape[0] :, None] - number < self.window
        return score.masked_fill(~visible[:, None, :], -torch.inf), values


def _probabilities(scores: torch.Tensor) -> torch.Tensor:
    """Softmax of scores [..., K]; a row that sees nothing attends to nothing."""
    nothing = (scores == -torch.inf).all(-1, keepdim=True)
    return torch.softmax(scores, dim=-1).masked_fill(nothing, 0.0)
