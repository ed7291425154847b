"""Several short texts as one training sequence, so that they share every product. No torch here.

Rows of a packed sequence lie end to end; in the cache each text has blocks of its own, begins at
position 0 and sees nothing of the others. A window may hold rows of many texts: it is one *part*
for each.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Part:
    """Rows [start, stop) of a sequence, all of one text.

    Attributes:
        begin: row at which that text begins.
        block: the sequence's logical block in which it begins.
    """

    start: int
    stop: int
    begin: int = 0
    block: int = 0


@dataclass(frozen=True, slots=True)
class Packing:
    """Where the texts of a sequence begin.

    Attributes:
        begins: rows, the first 0.
        blocks: logical blocks of the sequence.
        n_blocks: that all texts take.
    """

    begins: tuple[int, ...]
    blocks: tuple[int, ...]
    n_blocks: int


def packing_of(lengths: Sequence[int], block_size: int) -> Packing | None:
    """Of texts of these lengths; None for a single one, which needs none."""
    if len(lengths) == 1:
        return None
    begins, blocks, row, block = [], [], 0, 0
    for length in lengths:
        begins.append(row)
        blocks.append(block)
        row += length
        block += -(-length // block_size)
    return Packing(tuple(begins), tuple(blocks), block)


def parts(packing: Packing | None, start: int, stop: int) -> list[Part]:
    """Rows [start, stop), text by text."""
    if packing is None:
        return [Part(start, stop)]
    found = []
    at = bisect_right(packing.begins, start) - 1
    while start < stop:
        end = packing.begins[at + 1] if at + 1 < len(packing.begins) else stop
        found.append(Part(start, min(end, stop), packing.begins[at], packing.blocks[at]))
        start = min(end, stop)
        at += 1
    return found
