"""Names of every tensor one may touch, and the protocol by which it is touched.

A *site* is a mathematical quantity with a fixed shape (the vocabulary of the
intervention language). The decoder offers each one under its name where it is
computed; a tap reads it and may give back another value. With no taps a forward
pass runs nothing extra: quantities that only a tap needs (one head's share of
the residual, attention probabilities, norm scales) are not computed then.
"""

from __future__ import annotations

from typing import Protocol

import torch


class Taps(Protocol):
    """What a forward pass asks at each site."""

    def wants(self, site: str, layer: int) -> bool:
        """Whether ``site`` of ``layer`` (-1 for sites outside layers) is read or changed."""
        ...

    def __call__(self, site: str, layer: int, value: torch.Tensor) -> torch.Tensor:
        """Read ``value`` (rows first: [T, ...]) and return what the model goes on with."""
        ...
