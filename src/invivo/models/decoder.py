"""The one decoder: every supported family is a config of it.

A layer hands its last sub-layer's output on without adding it to the residual stream; whoever
comes next adds and normalises in one kernel.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from invivo.kernels.linear import linear, pack
from invivo.kernels.paging import PagedLayout
from invivo.kernels.rotary import rotary_rows
from invivo.models.bypass import Bypass, at_place
from invivo.models.cache import KVCache
from invivo.models.config import ModelConfig
from invivo.models.feedforward.mlp import MLP
from invivo.models.feedforward.moe import MoE
from invivo.models.mixers.attention import Attention
from invivo.models.mixers.gla import GatedLinearAttention
from invivo.models.norm import Norm
from invivo.models.rope import rope_table
from invivo.models.sites import Taps, offer, taps_of

Table = tuple[torch.Tensor, torch.Tensor]


class Layer(nn.Module):
    """One layer: attention (or its linear kind) and a feed-forward around the residual stream."""

    def __init__(
        self, config: ModelConfig, index: int, *, device: torch.device | str, dtype: torch.dtype
    ):
        super().__init__()
        kind = config.layers[index]
        self.index = index

        def norm() -> Norm:
            return Norm(config, device=device, dtype=dtype)

        self.norm1 = norm() if config.pre_norm else None
        self.post1 = norm() if config.post_norm else None
        self.norm2 = norm() if config.pre_norm else None
        self.post2 = norm() if config.post_norm else None
        self.mixer: Attention | GatedLinearAttention
        if kind.mixer == "gla":
            assert config.gla is not None
            self.mixer = GatedLinearAttention(config, config.gla, index, device=device, dtype=dtype)
        else:
            self.mixer = Attention(config, index, device=device, dtype=dtype)
        self.feedforward: MLP | MoE
        if kind.feedforward == "moe":
            assert config.moe is not None
            self.feedforward = MoE(config, config.moe, index, device=device, dtype=dtype)
        else:
            self.feedforward = MLP(config, index, config.d_ff, device=device, dtype=dtype)

    def forward(
        self,
        pending: torch.Tensor | None,
        residual: torch.Tensor,
        layout: PagedLayout,
        kv: Table,
        rope: Table | None,
        bypass: Bypass | None,
        taps: Taps | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """One layer over T rows.

        Args:
            pending: [T, d] still to be added to ``residual``; None in the first layer.
            residual: [T, d].

        Returns:
            The feed-forward's output, still to be added (None: nothing), and the residual stream
            before it.
        """
        if taps is not None:
            return self._tapped(pending, residual, layout, kv, rope, bypass, taps)
        if bypass is not None and bypass.at:
            return self._bypassed(pending, residual, layout, kv, rope, bypass)
        h, residual = _join(pending, residual, self.norm1)
        out = self.mixer.forward(h, layout, kv, rope, bypass, None)
        if self.post1 is not None:
            out = self.post1.forward(out)
        h, residual = _join(out, residual, self.norm2)
        out = self._feed(h, bypass, None)
        if self.post2 is not None:
            out = self.post2.forward(out)
        return out, residual

    def _bypassed(
        self,
        pending: torch.Tensor | None,
        residual: torch.Tensor,
        layout: PagedLayout,
        kv: Table,
        rope: Table | None,
        bypass: Bypass,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """:meth:`forward` with the places between the linear maps open to ``bypass``."""
        i = self.index
        pending, residual = _at_sum(bypass, "resid.pre", i, pending, residual)
        h, residual = _join(pending, residual, self.norm1)
        h = at_place(bypass, "attn.in", i, h)
        out = self.mixer.forward(h, layout, kv, rope, bypass, None)
        if self.post1 is not None:
            out = self.post1.forward(out)
        out = at_place(bypass, "attn.out", i, out)
        pending, residual = _at_sum(bypass, "resid.mid", i, out, residual)
        h, residual = _join(pending, residual, self.norm2)
        h = at_place(bypass, "mlp.in", i, h)
        out = self._feed(h, bypass, None)
        if self.post2 is not None:
            out = self.post2.forward(out)
        out = at_place(bypass, "mlp.out", i, out)
        return _at_sum(bypass, "resid.post", i, out, residual)

    def _feed(self, h: torch.Tensor, bypass: Bypass | None, taps: Taps | None) -> torch.Tensor:
        feedforward = self.feedforward
        if isinstance(feedforward, MLP):
            return feedforward.forward(h, bypass, taps)
        return feedforward.forward(h, taps)

    def _tapped(
        self,
        pending: torch.Tensor | None,
        residual: torch.Tensor,
        layout: PagedLayout,
        kv: Table,
        rope: Table | None,
        bypass: Bypass | None,
        taps: Taps,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """:meth:`forward` with every site offered; the same kernels where nothing is changed.

        A bypass comes first: what a tap sees at a place is what the model goes on with.
        """
        i = self.index
        sites = [("resid.post", i - 1), ("resid.pre", i)] if i > 0 else [("resid.pre", i)]
        pending, residual = _at_sum(bypass, "resid.pre", i, pending, residual)
        h, residual = _join_tapped(pending, residual, self.norm1, taps, sites, ("norm1.scale", i))
        h = at_place(bypass, "attn.in", i, h)
        out = self.mixer.forward(h, layout, kv, rope, bypass, taps)
        if self.post1 is not None:
            out = offer(taps, "attn.proj", i, out)
            out = self.post1.retap(out, self.post1.forward(out), taps, "post1.scale", i)
        out = offer(taps, "attn.out", i, at_place(bypass, "attn.out", i, out))
        sites = [("resid.mid", i)]
        pending, residual = _at_sum(bypass, "resid.mid", i, out, residual)
        h, residual = _join_tapped(pending, residual, self.norm2, taps, sites, ("norm2.scale", i))
        h = offer(taps, "mlp.in", i, at_place(bypass, "mlp.in", i, h))
        out = self._feed(h, bypass, taps)
        if self.post2 is not None:
            out = offer(taps, "mlp.proj", i, out)
            out = self.post2.retap(out, self.post2.forward(out), taps, "post2.scale", i)
        out = offer(taps, "mlp.out", i, at_place(bypass, "mlp.out", i, out))
        return _at_sum(bypass, "resid.post", i, out, residual)


def _at_sum(
    bypass: Bypass | None,
    name: str,
    layer: int,
    pending: torch.Tensor | None,
    residual: torch.Tensor,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Let ``bypass`` change the residual stream itself, which for that has to be added up."""
    if bypass is None or name not in bypass.at:
        return pending, residual
    total = residual if pending is None else residual + pending
    return None, bypass.rows(name, layer, total)


def _join(
    pending: torch.Tensor | None, residual: torch.Tensor, norm: Norm | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add ``pending`` to the residual stream; return what the next sub-layer reads, and the sum."""
    if norm is None:
        residual = residual if pending is None else residual + pending
        return residual, residual
    if pending is None:
        return norm.forward(residual), residual
    return norm.add(pending, residual)


def _join_tapped(
    pending: torch.Tensor | None,
    residual: torch.Tensor,
    norm: Norm | None,
    taps: Taps,
    sites: list[tuple[str, int]],
    scale_site: tuple[str, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`_join` with the sum and the norm's scale offered."""
    h, total = _join(pending, residual, norm)
    answer = total
    for site, layer in sites:
        answer = offer(taps, site, layer, answer)
    if answer is not total:
        h, total = _join(None, answer, norm)
    if norm is not None:
        h = norm.retap(total, h, taps, *scale_site)
    return h, total


class Decoder(nn.Module):
    """A decoder-only language model over a flat batch of token rows.

    Parameters are frozen (``requires_grad`` False) and uninitialised: ``load_model`` and
    ``random_model`` fill them.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.config = config

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)

        self.embed = parameter(config.vocab_size, config.d_model)
        self.positions = (
            parameter(config.max_positions, config.d_model) if config.learned_positions else None
        )
        self.layers = nn.ModuleList(
            Layer(config, i, device=device, dtype=dtype) for i in range(config.n_layers)
        )
        self.final_norm = Norm(config, device=device, dtype=dtype)
        self.head = None if config.tie_embeddings else parameter(config.vocab_size, config.d_model)
        self.head_packed: torch.Tensor | None = None
        # The Hub rounds the factor to the weights' dtype, by way of float32.
        self._embed_scale = (
            None
            if config.embed_scale is None
            else float(torch.tensor(config.embed_scale, dtype=torch.float32).to(dtype))
        )
        self._tables: list[Table] = []
        self._tables_for: tuple[torch.device, torch.dtype] | None = None

    def forward(
        self,
        tokens: torch.Tensor,
        layout: PagedLayout,
        cache: KVCache,
        *,
        bypass: Bypass | None = None,
        taps: Taps | None = None,
    ) -> torch.Tensor:
        """Run T token rows; their keys and values go to ``cache``.

        Args:
            tokens: [T] int64 ids.
            layout: where the rows live.
            cache: paged keys and values, holding what the spans have seen before.
            bypass: called after each linear map of each layer, and where its ``at`` says.
            taps: asked at each site; None runs nothing extra.

        Returns:
            [T, d], the normalised final state (``final.norm.out``).
        """
        residual = self.embedded(tokens, layout.positions, bypass)
        if taps is not None:
            residual = offer(taps, "embed.out", -1, residual)
        pending, residual = self.run_layers(
            residual, layout, cache.layers, bypass=bypass, taps=taps
        )
        return self.finished(pending, residual, taps)

    def finished(
        self, pending: torch.Tensor | None, residual: torch.Tensor, taps: Taps | None = None
    ) -> torch.Tensor:
        """The normalised final state of what the last layer gave: [T, d]."""
        if taps is None:
            return _join(pending, residual, self.final_norm)[0]
        last = [("resid.post", self.config.n_layers - 1)]
        scale_site = ("final.norm.scale", -1)
        h, _ = _join_tapped(pending, residual, self.final_norm, taps, last, scale_site)
        return offer(taps, "final.norm.out", -1, h)

    def embedded(
        self, tokens: torch.Tensor, positions: torch.Tensor, bypass: Bypass | None = None
    ) -> torch.Tensor:
        """The first residual stream: tokens [T], positions [T] -> [T, d].

        ``bypass`` is asked at "embed", before learned positions are added.
        """
        residual = F.embedding(tokens, self.embed)
        if self._embed_scale is not None:
            residual = residual * self._embed_scale
        residual = at_place(bypass, "embed", -1, residual)
        if self.positions is not None:
            residual = residual + F.embedding(positions, self.positions)
        return residual

    def rope_of(self, layer: int) -> Table | None:
        """Cosine and sine tables of ``layer``; None without rotary embedding."""
        which = self.config.layers[layer].rope
        return None if which is None else self._rope_tables()[which]

    def _rope_tables(self) -> list[Table]:
        if self._tables_for != (self.embed.device, self.embed.dtype):
            self._build_tables()
        return self._tables

    def _ropes_at(self, positions: torch.Tensor) -> list[Table]:
        """The tables of every kind of layer; on a CPU their rows at ``positions``, picked once."""
        tables = self._rope_tables()
        if not positions.is_cpu:
            return tables
        return [rotary_rows(cos, sin, positions) for cos, sin in tables]

    def run_layers(
        self,
        residual: torch.Tensor,
        layout: PagedLayout,
        memory: Sequence[Table],
        *,
        first: int = 0,
        last: int | None = None,
        bypass: Bypass | None = None,
        taps: Taps | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Layers ``first`` to ``last`` (exclusive; None = all) over T rows.

        Args:
            residual: [T, d], the residual stream before layer ``first``.
            memory: keys and values (or states) of layers ``first``, ``first + 1``, ...

        Returns:
            What is still to be added to the residual stream (None: nothing), and that stream.
        """
        last = self.config.n_layers if last is None else last
        pending: torch.Tensor | None = None
        ropes, kinds = self._ropes_at(layout.positions), self.config.layers
        for i, layer in enumerate(itertools.islice(self.layers, first, last), first):
            which = kinds[i].rope
            rope = None if which is None else ropes[which]
            kv = memory[i - first]
            here = None if taps is None else taps_of(taps, i)
            pending, residual = layer(pending, residual, layout, kv, rope, bypass, here)
        return pending, residual

    def logits(self, hidden: torch.Tensor, *, taps: Taps | None = None) -> torch.Tensor:
        """Scores of the next token, soft cap included: [R, d] -> [R, V]."""
        head = self.embed if self.head is None else self.head
        out = linear(hidden, head, packed=self.head_packed)
        cap = self.config.logit_softcap
        if cap is not None:
            out = torch.tanh(out / cap) * cap
        if taps is not None:
            out = offer(taps, "logits", -1, out)
        return out

    def pack(self) -> None:
        """Keep copies of the linear maps in the blocks that a CPU multiplies fastest.

        Takes the memory of those maps again; the parameters stay as they are. Call it once they
        are final, and again after changing them. Does nothing where packing does not apply.
        """
        self.head_packed = pack(self.embed if self.head is None else self.head)
        for module in self.modules():
            if isinstance(module, (Attention, GatedLinearAttention, MLP)):
                module.pack()

    def _build_tables(self) -> None:
        device, dtype = self.embed.device, self.embed.dtype
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        self._tables = [
            rope_table(rope, max_positions=self.config.max_positions, device=device, dtype=exact)
            for rope in self.config.ropes
        ]
        self._tables_for = (device, dtype)
