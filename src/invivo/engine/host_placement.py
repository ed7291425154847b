"""Which layers' feed-forward products wait in host memory between forward and backward.

Gate and up are most of what a layer makes, and what a small tape runs again. Copied to the host
behind the forward pass and back ahead of the backward they cost no arithmetic, as long as the link
keeps up: both passes go through the layers, last in, first out, and a copy that is late is waited
for. A model of the two passes (one device, one link each way, bounded room for what is under way)
tells what a choice of layers costs. No torch in here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

# An H200 copies 55e9 bytes a second over PCIe 5, 52e9 where both ways are busy, and makes 360e12
# multiplications in step after step. What counts is the one against the other.
GB_PER_S = 52.0
PRODUCTS_PER_S = 360e12


@dataclass(frozen=True, slots=True)
class HostRoom:
    """Host memory that tapes may use.

    Attributes:
        n_bytes: of one text at most.
        gb_per_s: what the link copies each way, beside :data:`PRODUCTS_PER_S`.
    """

    n_bytes: int
    gb_per_s: float = GB_PER_S

    @property
    def products_a_byte(self) -> float:
        """Multiplications of a matrix product in the time in which a byte is copied."""
        return PRODUCTS_PER_S / (1e9 * self.gb_per_s)


@dataclass(frozen=True, slots=True)
class LayerCost:
    """One layer, a token; times in multiplications of a matrix product.

    Attributes:
        again: of running its product again. bits: of the product; 0 where it must stay.
    """

    forward: float
    backward: float
    again: float
    bits: int


@dataclass(frozen=True, slots=True)
class Timeline:
    """What a placement is judged by.

    Attributes:
        between: time from the last layer forward to the first one back (the loss).
        bit: time in which a bit is copied.
        room: bits for what is under way, by the layer at which the pass is. On the way back that
            layer's own product does not count: it is at hand wherever it was.
    """

    layers: Sequence[LayerCost]
    between: float
    bit: float
    room: Sequence[float]

    def step(self, hosted: Collection[int]) -> float:
        """Time of forward and backward."""
        now = link = 0.0
        leaving: deque[tuple[int, float]] = deque()
        arrived: dict[int, float] = {}
        under_way = 0
        for i, layer in enumerate(self.layers):
            now += layer.forward
            if i in hosted:
                link = arrived[i] = max(link, now) + layer.bits * self.bit
                leaving.append((layer.bits, link))
                under_way += layer.bits
            last = int(i in hosted)  # is not waited for
            while len(leaving) > last and (leaving[0][1] <= now or under_way > self.room[i]):
                bits, done = leaving.popleft()
                now = max(now, done)
                under_way -= bits
        now = max(now + self.between, link)  # all that was sent is gone
        link, under_way = 0.0, 0
        coming = deque(sorted(hosted, reverse=True))
        back: dict[int, float] = {}
        for i in reversed(range(len(self.layers))):
            layer = self.layers[i]
            under_way -= layer.bits if i in back else 0
            while coming:
                which = coming[0]
                bits = self.layers[which].bits
                if which != i and under_way + bits > self.room[i]:
                    break
                coming.popleft()
                link = back[which] = max(link, now, arrived[which]) + bits * self.bit
                under_way += bits if which != i else 0
            if i in hosted:
                now = max(now, back[i])
            else:
                now += layer.again
            now += layer.backward
        return now


def choose_hosted(timeline: Timeline, most_bits: int) -> frozenset[int]:
    """Layers whose product is better on the host than run again.

    From the bottom up: the lowest layers are made first and needed last, which leaves the copies
    most time. A layer is taken if half of the time of its product or more is won.

    Args:
        most_bits: of the host, a token.
    """
    hosted: set[int] = set()
    best, bits = timeline.step(hosted), 0
    for i, layer in enumerate(timeline.layers):
        if not layer.bits or bits + layer.bits > most_bits:
            continue
        took = timeline.step(hosted | {i})
        if best - took >= layer.again / 2 > 0:
            hosted.add(i)
            best, bits = took, bits + layer.bits
    return frozenset(hosted)
