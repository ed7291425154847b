"""Fills the tapes of training rows while the flat batch runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from invivo.engine.packing import Part
from invivo.engine.tape import Tape, output_parts
from invivo.kernels.attention_backward import attention_lse
from invivo.models.bypass import LINEARS, Bypass
from invivo.models.cache import KVCache
from invivo.models.decoder import Decoder, Layer
from invivo.models.mixers.attention import Attention
from invivo.models.sites import LSE

# Tape names that a site gives, where no bypass may change it on the way there.
_FROM_SITE: dict[str, tuple[str, ...]] = {
    "resid.pre": ("layer.input",),
    "resid.post": ("resid.post",),
    "resid.mid": ("resid.mid",),
    "attn.in": ("attn.in",),
    "mlp.in": ("mlp.in",),
    "attn.proj": ("attn.proj",),
    "attn.out": ("attn.out",),
    "attn.head.z": ("attn.z", "attn.lse"),
    "mlp.gate": ("mlp.gate",),
    "mlp.up": ("mlp.up", "mlp.sign"),
    "mlp.neuron": ("mlp.neuron",),
    "mlp.proj": ("mlp.proj",),
    "mlp.out": ("mlp.out",),
}
_SITE_OF = {name: site for site, names in _FROM_SITE.items() for name in names}
_QUERY_NAMES = ("attn.q.final", "attn.lse")


@dataclass(slots=True)
class Piece:
    """Rows [start, stop) of a sequence, which begin at row ``row`` of the flat batch.

    Attributes:
        parts: its rows by text, with the physical blocks of each, on the device.
    """

    tape: Tape
    parts: Sequence[tuple[Part, torch.Tensor]]
    start: int
    stop: int
    row: int

    def of(self, value: torch.Tensor) -> torch.Tensor:
        """This piece's rows of a tensor of the flat batch."""
        n_rows = self.stop - self.start
        return value if value.shape[0] == n_rows else value[self.row : self.row + n_rows]


class Recording:
    """The taps of one pass. Sequences of several jobs may ride in one batch.

    Give the decoder both: ``forward(..., bypass=recording.bypass, taps=recording)``.
    """

    def __init__(
        self, decoder: Decoder, cache: KVCache, inner: Bypass | None, pieces: Sequence[Piece]
    ) -> None:
        """``inner`` is the bypass of the flat batch, None where no row has one."""
        self._decoder = decoder
        self._cache = cache
        self._pieces = pieces
        self.bypass: Bypass = _RecordingBypass(decoder, inner, pieces)
        config = decoder.config
        self._query_site = [
            "attn.head.q" if kind.rope is None else "attn.head.q.rot" for kind in config.layers
        ]
        # What is kept of each site that is wanted; nothing where its value is only looked at.
        self._names: dict[tuple[str, int], tuple[str, ...]] = {}
        at, last = self.bypass.at, config.n_layers - 1
        for layer, name in {key for piece in pieces for key in piece.tape.entries}:
            if name in _QUERY_NAMES:
                self._names[self._query_site[layer], layer] = ()
            if name == LSE:
                self._names[LSE, layer] = ()
            site = _SITE_OF.get(name)
            if site is None:
                continue
            # Behind a hook the value is another: there the wrapped bypass keeps it.
            hooked = site in at or (site == "resid.post" and "resid.pre" in at and layer < last)
            if not hooked:
                self._names[site, layer] = (*self._names.get((site, layer), ()), name)
        self._queries: list[torch.Tensor] = []
        self._lse: torch.Tensor | None = None

    def wants(self, site: str, layer: int) -> bool:
        return (site, layer) in self._names

    def __call__(self, site: str, layer: int, value: torch.Tensor) -> torch.Tensor:
        """Keep the rows of every piece: nothing changes them after a site."""
        if site == LSE:
            self._lse = value
            return value
        if site == self._query_site[layer]:
            self._queries = [piece.of(value) for piece in self._pieces]
            for piece, rows in zip(self._pieces, self._queries, strict=True):
                piece.tape.take(layer, "attn.q.final", piece.start, rows)
            return value
        for name in self._names[site, layer]:
            if name == LSE:
                self._write_lse(layer, self._queries)
                self._queries, self._lse = [], None
                continue
            for piece in self._pieces:
                rows = piece.of(value)
                if name == "mlp.sign":
                    piece.tape.write(layer, name, piece.start, rows > 0)
                else:
                    piece.tape.take(layer, name, piece.start, rows)
        return value

    def _write_lse(self, layer: int, queries_of: list[torch.Tensor]) -> None:
        """Those that attention left behind, for rows that ran as a span; else those of the queries
        just seen (none where nobody asked), whose keys are in the cache now."""
        for piece, queries in zip(self._pieces, queries_of, strict=bool(queries_of)):
            if (layer, LSE) not in piece.tape.entries:
                continue
            if self._lse is not None and all(p.stop - p.start > 1 for p, _ in piece.parts):
                piece.tape.take(layer, LSE, piece.start, piece.of(self._lse))
                continue
            block: Layer = self._decoder.layers[layer]  # type: ignore[assignment]
            mixer = block.mixer
            assert isinstance(mixer, Attention)  # no tape has another
            for part, table in piece.parts:
                lse = attention_lse(
                    queries[part.start - piece.start : part.stop - piece.start],
                    self._cache.layers[layer][0],
                    table,
                    part.start - part.begin,
                    scale=mixer.scale,
                    window=mixer.window,
                    softcap=mixer.softcap,
                )
                piece.tape.write(layer, LSE, part.start, lse)


class _RecordingBypass:
    """The batch's bypass; on its way what lies before and behind it is kept."""

    def __init__(self, decoder: Decoder, inner: Bypass | None, pieces: Sequence[Piece]) -> None:
        self._config = decoder.config
        self._inner = inner
        self._pieces = pieces
        self._held = {key for piece in pieces for key in piece.tape.entries}
        # Launches of a window are what a fast device waits for: no slice that nobody keeps.
        names = {name for _, name in self._held}
        self._before, self._behind = {}, {}
        for linear in LINEARS:
            parts = output_parts(decoder.config, linear)
            self._before[linear] = [
                (f"{name}.unscaled", cut) for name, cut in parts if f"{name}.unscaled" in names
            ]
            self._behind[linear] = [
                (name, cut)
                for name, cut in parts
                if linear == "qkv" and not names.isdisjoint((name, f"{name}.inside"))
            ]
        self.at: frozenset[str] = frozenset() if inner is None else inner.at

    def __call__(self, layer: int, linear: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for name, cut in self._before[linear]:
            self._keep(layer, name, y[:, cut])
        if self._inner is not None:
            y = self._inner(layer, linear, x, y)
        for name, cut in self._behind[linear]:
            self._keep(layer, name, y[:, cut])
            clip = self._config.qkv_clip
            if clip is not None and (layer, f"{name}.inside") in self._held:
                self._write(layer, f"{name}.inside", y[:, cut].abs() <= clip)
        return y

    def rows(self, name: str, layer: int, value: torch.Tensor) -> torch.Tensor:
        if name == "resid.pre":
            self._keep(layer, "layer.input", value)
            if "resid.post" not in self.at:
                self._keep(layer - 1, "resid.post", value)
        elif name in _FROM_SITE:
            self._keep(layer, name, value)
        assert self._inner is not None
        return self._inner.rows(name, layer, value)

    def _keep(self, layer: int, name: str, value: torch.Tensor) -> None:
        if (layer, name) in self._held:
            self._write(layer, name, value)

    def _write(self, layer: int, name: str, value: torch.Tensor) -> None:
        for piece in self._pieces:
            piece.tape.write(layer, name, piece.start, piece.of(value))
