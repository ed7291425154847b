"""Which recurrent states are kept for later prompts: their slots, their names, who goes first.

Blocks of keys and values can be taken over one by one; of a recurrent layer only the whole state
at one place lets another sequence go on from there. So states are copied at ends of blocks into
slots of their own, and each is known by the number that the prefix index gives that block: a
snapshot is found exactly where the chain of blocks that leads to it is known. No torch here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class StateSnapshots:
    """``n_slots`` slots from ``first_slot`` on; the least recently used snapshot makes room.

    A slot is free, taken (being written, not yet named), or holds a named snapshot. What is named
    in an iteration is found from the next one on, because it is written at that iteration's end;
    and a slot given back in an iteration is handed out again from the next one on, so that one
    iteration never writes a slot twice.
    """

    def __init__(self, first_slot: int, n_slots: int) -> None:
        self.n_total = n_slots
        self._free = list(range(first_slot + n_slots - 1, first_slot - 1, -1))
        self._returned: list[int] = []
        self._known: OrderedDict[object, int] = OrderedDict()
        self._fresh: dict[object, int] = {}

    @property
    def n_used(self) -> int:
        """Slots that hold a snapshot or are about to."""
        return self.n_total - len(self._free) - len(self._returned)

    def settle(self) -> None:
        """An iteration begins: what the last one wrote can be found."""
        self._known.update(self._fresh)
        self._fresh.clear()
        self._free += self._returned
        self._returned.clear()

    def longest(self, numbers: Sequence[object]) -> tuple[int, int]:
        """The last of ``numbers`` that has a snapshot: (its place, its slot); (0, -1) if none.

        Args:
            numbers: those after 0, 1, 2, ... blocks of a known chain; nothing is kept after 0.
        """
        for n in range(len(numbers) - 1, 0, -1):
            slot = self._known.get(numbers[n])
            if slot is not None:
                self._known.move_to_end(numbers[n])
                return n, slot
        return 0, -1

    def has(self, number: object) -> bool:
        """Whether there is a snapshot of this name, or will be."""
        return number in self._known or number in self._fresh

    def take(self) -> int | None:
        """A slot to write; None where every one is being written."""
        if self._free:
            return self._free.pop()
        if not self._known:
            return None
        return self._known.popitem(last=False)[1]

    def name(self, number: object, slot: int) -> bool:
        """Name what is in a taken slot; False, and the slot is given back, if that is known."""
        if self.has(number):
            self.give_back(slot)
            return False
        self._fresh[number] = slot
        return True

    def give_back(self, slot: int) -> None:
        """A taken slot will not be named."""
        self._returned.append(slot)

    def forget(self, number: object) -> None:
        """Free the snapshot of this name, if there is one."""
        for held in (self._known, self._fresh):
            if number in held:
                self._returned.append(held.pop(number))

    def clear(self) -> None:
        """Forget every snapshot; taken slots stay taken."""
        for held in (self._known, self._fresh):
            self._returned += held.values()
            held.clear()
