"""Sizes of tiles and grids on the host, in plain numbers.

Triton's own functions of these names can be called from kernels too, and cost the host some
microseconds a call.
"""

from __future__ import annotations


def ceil_div(n: int, unit: int) -> int:
    """How many units hold ``n``; both positive (``n`` may be 0)."""
    return -(-n // unit)


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is not below ``n`` >= 1."""
    return 1 << (n - 1).bit_length()
