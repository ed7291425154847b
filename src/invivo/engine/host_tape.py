"""The part of one text's tape that waits in host memory: the feed-forward products of some layers.

The forward sends each product away as soon as it is made. The backward brings the next ones ahead
of their layers while there is room: what is under way, out and back, together with the tape on the
device takes no more than the tape's budget. On the way back the product of the layer at hand does
not count: it is there wherever the tape lies. All rows of a layer come back at once, which suits a
backward in layer order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from invivo.engine.host_shelf import Copy, HostShelf


@dataclass(frozen=True, slots=True)
class Product:
    """What waits of a layer: its parts (tape names) side by side, each ``width`` numbers wide."""

    parts: tuple[str, ...]
    width: int
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return len(self.parts) * self.width * self.dtype.itemsize


class HostTape:
    """Products of ``layers`` of one text of ``length`` rows, in memory lent by a shelf.

    Attributes:
        layers: those whose product is not through yet.
        n_bytes: of host memory.
    """

    def __init__(
        self,
        shelf: HostShelf,
        start: int,
        product: Product,
        layers: Sequence[int],
        length: int,
        max_bytes: int,
    ) -> None:
        """
        Args:
            start: of the lent piece, which :meth:`close` gives back.
            max_bytes: of the tape on the device, copies under way included.
        """
        self._shelf = shelf
        self._start: int | None = start
        self.product = product
        self.layers = sorted(layers)
        self._length = length
        self._max_bytes = max_bytes
        one = product.row_bytes * length
        self.n_bytes = one * len(self.layers)
        self._at = {layer: start + i * one for i, layer in enumerate(self.layers)}
        self._first_parts: dict[tuple[int, int], torch.Tensor] = {}
        self._sent: dict[int, Copy] = {}  # the last copy of a layer, which the others precede
        self._leaving: deque[tuple[int, torch.Tensor, Copy]] = deque()
        self._coming: dict[int, tuple[torch.Tensor, Copy]] = {}
        self._here: dict[int, torch.Tensor] = {}
        self._lent: set[tuple[int, int]] = set()

    @classmethod
    def lent_by(
        cls,
        shelf: HostShelf,
        product: Product,
        layers: Sequence[int],
        length: int,
        max_bytes: int,
    ) -> HostTape | None:
        """None where the shelf has no such room at the moment."""
        start = shelf.lend(product.row_bytes * length * len(layers))
        return None if start is None else cls(shelf, start, product, layers, length, max_bytes)

    def has(self, layer: int, name: str) -> bool:
        return layer in self._at and name in self.product.parts

    @property
    def under_way(self) -> int:
        """Bytes of the device that wait for copies, or came back with them."""
        away = (value for _, value, _ in self._leaving)
        home = (value for value, _ in self._coming.values())
        return sum(value.nbytes for value in (*away, *home, *self._here.values()))

    # --- forward ----------------------------------------------------------------------------------
    def write(self, layer: int, name: str, start: int, value: torch.Tensor) -> None:
        """Send rows [start, start + n) of a part, value [n, width], which nobody changes any more.

        They leave when all parts of the rows are there: the parts are written in order.
        """
        if name != self.product.parts[-1]:
            self._first_parts[layer, start] = value
            return
        whole = value
        if len(self.product.parts) > 1:
            whole = _side_by_side(self._first_parts.pop((layer, start)), value)
        if not whole.is_contiguous():
            whole = whole.contiguous()
        at = self._at[layer] + start * self.product.row_bytes
        copy = self._sent[layer] = self._shelf.send(whole, at)
        self._leaving.append((layer, whole, copy))

    def make_room(self, layer: int, on_device: int) -> None:
        """Let go of what was sent, the oldest first, until it fits beside so many bytes; but not
        of what ``layer``, at which the forward is, still reads."""
        while self._leaving and on_device + self.under_way > self._max_bytes:
            if len(self._leaving) == 1 and self._leaving[0][0] == layer:
                return
            self._let_leave()

    def _let_leave(self) -> None:
        """Let go of the oldest that was sent, not before its copy is waited for."""
        self._leaving[0][2].wait()
        self._leaving.popleft()

    # --- backward ---------------------------------------------------------------------------------
    def look_ahead(self, layer: int, on_device: int) -> None:
        """The backward is at ``layer``: bring what it needs, and then as much as there is room."""
        while self._leaving:
            self._let_leave()
        one = self.product.row_bytes * self._length
        for below in reversed(self.layers):
            if below > layer or below in self._coming or below in self._here:
                continue
            beside = self.under_way - (one if layer in self._coming or layer in self._here else 0)
            if below != layer and on_device + beside + one > self._max_bytes:
                return
            shape = (self._length, len(self.product.parts) * self.product.width)
            self._coming[below] = self._shelf.bring(
                self._at[below], shape, self.product.dtype, self._sent[below]
            )

    def read(self, layer: int, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a part."""
        assert (layer, start) not in self._lent, "these rows are gradients by now"
        at = self.product.parts.index(name) * self.product.width
        return self._rows(layer, start, stop)[:, at : at + self.product.width]

    def lend(self, layer: int, start: int, stop: int) -> torch.Tensor:
        """[stop - start, all parts] those rows' memory, to be written over: nobody reads them
        again."""
        rows = self._rows(layer, start, stop)
        self._lent.add((layer, start))
        return rows

    def _rows(self, layer: int, start: int, stop: int) -> torch.Tensor:
        if layer not in self._here:
            value, copy = self._coming.pop(layer)
            copy.wait()
            self._here[layer] = value
        return self._here[layer][start:stop]

    # --- end --------------------------------------------------------------------------------------
    def let_go(self, layer: int) -> None:
        """Drop what only ``layer`` and those above it read."""
        self.layers = [below for below in self.layers if below < layer]
        for above in [above for above in self._coming if above >= layer]:
            self._coming[above][1].wait()
            del self._coming[above]
        for above in [above for above in self._here if above >= layer]:
            del self._here[above]

    def close(self) -> None:
        """Give everything back, whatever is under way."""
        if self._start is None:
            return
        while self._leaving:
            self._let_leave()
        for _, copy in self._coming.values():
            copy.wait()
        self._coming.clear()
        self._here.clear()
        self._first_parts.clear()
        self._shelf.give_back(self._start)
        self._start = None


def _side_by_side(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Two parts [n, w] as one [n, 2 w]: without a copy where they are the halves of one product."""
    n, width = first.shape
    halves = (
        first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        and first.stride() == second.stride() == (2 * width, 1)
        and second.storage_offset() == first.storage_offset() + width
    )
    if halves:
        return first.as_strided((n, 2 * width), (2 * width, 1))
    return torch.cat((first, second), dim=1)
