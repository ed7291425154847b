"""Changes by constants as data on the device, so that a graph can replay them.

A site has one table, a row for each row of a batch: what is kept, a factor and a shift. A row that
nothing changes is multiplied by one and gets -0.0 added: it keeps its bits.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch

from invivo.edits.apply import write_affine
from invivo.edits.resolved import Touch
from invivo.edits.site_names import head_count, head_sizes
from invivo.kernels.affine import affine
from invivo.models.config import ModelConfig

Key = tuple[str, int]
Change = tuple[int, Touch, torch.Tensor]  # a row of the batch, an operation, and by what

MOST_BYTES = 64 << 20  # of all tables of an engine


class AffineTable:
    """One site's: ``x`` -> ``(x where kept, else 0) * factor + shift``, row by row."""

    def __init__(self, n_rows: int, shape: Sequence[int], like: torch.Tensor) -> None:
        self._kept = torch.ones(n_rows, *shape, dtype=torch.bool, device=like.device)
        self._factor = like.new_ones(n_rows, *shape)
        self._shift = like.new_full((n_rows, *shape), -0.0)
        self._changes: Sequence[Change] = ()

    def fill(self, changes: Sequence[Change]) -> None:
        """Hold these changes and no others; nothing happens where they are the ones it holds."""
        if changes is self._changes:
            return
        self._kept.fill_(True)
        self._factor.fill_(1.0)
        self._shift.fill_(-0.0)
        groups: dict[object, list[Change]] = {}
        for change in changes:
            touch = change[1]
            groups.setdefault((touch.do, touch.ref), []).append(change)
        for group in groups.values():
            _, touch, _ = group[0]
            rows, by = [row for row, _, _ in group], [value for _, _, value in group]
            write_affine(touch.do, touch.ref, self._kept, self._factor, self._shift, rows, by)
        self._changes = changes

    def changed(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` [T, ...] with the table's first T rows applied."""
        n = x.shape[0]
        return affine(x, self._kept[:n], self._factor[:n], self._shift[:n])


class TableTaps:
    """Taps that apply tables and do nothing else."""

    def __init__(self, tables: dict[Key, AffineTable]) -> None:
        self._tables = tables
        self._layers = {layer + (site == "resid.post") for site, layer in tables}

    def in_layer(self, layer: int) -> bool:
        return layer in self._layers

    def wants(self, site: str, layer: int) -> bool:
        return (site, layer) in self._tables

    def __call__(self, site: str, layer: int, value: torch.Tensor) -> torch.Tensor:
        return self._tables[site, layer].changed(value)


class EditTables:
    """The tables of an engine, made when first needed.

    Args:
        n_rows: of the largest batch.
        like: a tensor of the model, for device and dtype.
    """

    def __init__(self, config: ModelConfig, n_rows: int, like: torch.Tensor) -> None:
        self._config = config
        self._n_rows = n_rows
        self._like = like
        self._tables: dict[Key, AffineTable] = {}
        self._refused = False

    def refuse(self) -> None:
        """Have no room from now on."""
        self._refused = True

    def fits(self, keys: Collection[Key]) -> bool:
        """Whether there is room for the tables of these sites alone."""
        if self._refused:
            return False
        return sum(self._n_bytes(key) for key in keys) <= MOST_BYTES

    def make_room(self, keys: Collection[Key]) -> bool:
        """Make the tables of ``keys``, which :meth:`fits`.

        Returns:
            Whether all others had to go: what was captured over them is not to be run again.
        """
        wanted = {*self._tables, *keys}
        gone = sum(self._n_bytes(key) for key in wanted) > MOST_BYTES
        if gone:
            self._tables.clear()
        for key in keys:
            if key not in self._tables:
                self._tables[key] = AffineTable(self._n_rows, self._shape(key), self._like)
        return gone

    def taps(self, keys: Collection[Key]) -> TableTaps | None:
        """Taps of some tables; None for none."""
        return TableTaps({key: self._tables[key] for key in keys}) if keys else None

    def __getitem__(self, key: Key) -> AffineTable:
        return self._tables[key]

    def _shape(self, key: Key) -> list[int]:
        """Of a row of the site's tensor."""
        n_heads = head_count(self._config, key[0])
        sizes = head_sizes(self._config, key[0], n_keys=0)
        return [*sizes] if n_heads is None else [n_heads, *sizes]

    def _n_bytes(self, key: Key) -> int:
        return self._n_rows * math.prod(self._shape(key)) * (1 + 2 * self._like.element_size())
