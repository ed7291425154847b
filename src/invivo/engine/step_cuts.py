"""Where a decode step in which programs act is cut into pieces that graphs can replay.

A site is *loose* where something happens that differs from step to step: the host asks its taps
there. At a *tabled* site rows change by constants that lie in device tables
(``edit_tables.py``): that is part of a piece.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection
from dataclasses import dataclass

from invivo.models.config import ModelConfig

Key = tuple[str, int]

STREAM = ("resid.pre", "resid.post")
# What the tapped pass of a layer with attention offers without looking at rows from the host.
TABLED = frozenset(
    {
        *STREAM,
        "attn.in",
        "attn.head.q",
        "attn.kvhead.k",
        "attn.kvhead.v",
        "attn.head.q.rot",
        "attn.head.z",
        "attn.proj",
        "attn.out",
        "resid.mid",
        "mlp.in",
        "mlp.gate",
        "mlp.up",
        "mlp.neuron",
        "mlp.proj",
        "mlp.out",
    }
)


@dataclass(frozen=True, slots=True)
class Cuts:
    """How a step with taps is cut: pieces that are replayed, and layers that are not.

    Attributes:
        bounds: layers before which a piece or a layer begins, 0 first, the number of layers last.
        opened: layers that run kernel by kernel, because something inside them is touched.
        offered: bounds at which the residual stream is touched.
        final: whether something behind the last layer is touched.
    """

    bounds: list[int]
    opened: frozenset[int]
    offered: frozenset[int]
    final: bool


def cuts_of(touched: Collection[Key], n_layers: int) -> Cuts:
    """Where a step is cut whose taps want the sites ``touched``."""
    opened, offered, final = set(), set(), False
    for site, layer in touched:
        if site == "embed.out":
            offered.add(0)
        elif layer < 0:
            final = True
        elif site in STREAM:
            offered.add(_home(site, layer))
        else:
            opened.add(layer)
    final = final or n_layers in offered or n_layers - 1 in opened
    bounds = {0, n_layers} | offered | opened | {layer + 1 for layer in opened}
    return Cuts(sorted(bounds), frozenset(opened), frozenset(offered), final)


def tabled_sites(
    config: ModelConfig, constant: Collection[Key], loose: Collection[Key]
) -> frozenset[Key]:
    """Those of ``constant`` that may be part of pieces; the taps have to do the others.

    Args:
        constant: sites where rows change by constants and nothing else happens.
        loose: all other sites where something happens.
    """
    n_layers = config.n_layers
    tabled = set(constant)
    while True:
        cuts = cuts_of({*loose, *constant} - tabled, n_layers)
        kept = set()
        for site, layer in tabled:
            home = _home(site, layer)
            eager = home in cuts.opened or (site in STREAM and home in cuts.offered)
            if home == n_layers:
                eager = cuts.final
            elif config.layers[home].mixer != "attention":
                eager = True
            if site in TABLED and not eager:
                kept.add((site, layer))
        if kept == tabled:
            return frozenset(kept)
        tabled = kept


@dataclass(frozen=True, slots=True)
class Segment:
    """Layers [first, last) of a step: a layer that is opened, or a piece with its tabled sites."""

    first: int
    last: int
    opened: bool
    tabled: tuple[Key, ...]


def segments(
    cuts: Cuts, tabled: Collection[Key], n_layers: int, *, merged: bool
) -> tuple[Segment, ...]:
    """The parts of a step in order.

    Args:
        merged: pieces are as long as they can be. Otherwise a layer that is touched inside is a
            piece of its own, so that few graphs serve every choice of layers.
    """
    bounds = set(cuts.bounds)
    if not merged:
        for site, layer in tabled:
            bounds.add(_home(site, layer))
            if site not in STREAM:
                bounds.add(layer + 1)
    found = []
    for first, last in itertools.pairwise(sorted(bounds)):
        end = last + (last == n_layers)  # what is behind the last layer belongs to the last piece
        there = sorted(key for key in tabled if first <= _home(*key) < end)
        found.append(Segment(first, last, first in cuts.opened, tuple(there)))
    return tuple(found)


@functools.lru_cache(maxsize=256)
def parted(
    touched: frozenset[Key], tabled: frozenset[Key], n_layers: int, merged: bool
) -> tuple[Cuts, tuple[Segment, ...]]:
    """:func:`cuts_of` and :func:`segments`; the last ones are remembered, for every step asks."""
    cuts = cuts_of(touched, n_layers)
    return cuts, segments(cuts, tabled, n_layers, merged=merged)


def _home(site: str, layer: int) -> int:
    """The layer that offers a site; the number of layers where it is behind the last one."""
    return layer + (site == "resid.post")
