"""Memory blocks of the paged cache: who uses them, and what they still hold. No torch here.

A block is ``block_size`` token rows of every attention layer. ``BlockPool`` counts references and
keeps the free blocks in the order in which they should be reused; ``PrefixIndex`` finds a block by
the whole prefix it continues. A block that nobody uses keeps its content, and can be found, until
it is handed out again.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

from invivo.engine.snapshots import StateSnapshots
from invivo.engine.types import BlockChanges, Request

Namespace = tuple[tuple[object, ...], ...]

# Most blocks that are looked for in one piece for a sequence that may grow that long.
_MOST_ROOM = 256


def prefix_namespace(request: Request, adapter_version: int, position_offset: int = 0) -> Namespace:
    """What besides tokens decides a block's content: adapter and version, tenant, and
    which positions a LongRoPE model gives the tokens.

    Every part carries its kind, so that an adapter's name never equals somebody's salt.
    """
    parts: list[tuple[object, ...]] = [("salt", request.salt)]
    if request.adapter is not None:
        parts.append(("adapter", request.adapter, adapter_version))
    if position_offset:
        parts.append(("positions", position_offset))
    return tuple(parts)


class PrefixIndex:
    """Finds the block that continues a known prefix.

    The key of a block is (parent, its tokens), where the parent is the unique number given to the
    preceding block's entry, or the namespace for a first block. Numbers are never reused and the
    dictionary compares whole keys, so equal hashes of different prefixes cannot be confused: a hit
    is the same namespace and the same tokens from the first one on.

    Args:
        snapshots: recurrent states kept under the same numbers; they go with their block.
    """

    def __init__(
        self, n_blocks: int, block_size: int, snapshots: StateSnapshots | None = None
    ) -> None:
        self.block_size = block_size
        self._snapshots = snapshots
        self._entries: dict[tuple[object, tuple[int, ...]], tuple[int, int]] = {}
        self._key_of: list[tuple[object, tuple[int, ...]] | None] = [None] * n_blocks
        self._next_number = 1

    def __len__(self) -> int:
        return len(self._entries)

    def holds(self, block: int) -> bool:
        """Whether the block's content can be found."""
        return self._key_of[block] is not None

    def match(
        self,
        tokens: Items[int],
        namespace: Namespace,
        limit: int,
        changes: BlockChanges | None = None,
    ) -> tuple[list[int], list[object]]:
        """Blocks that hold the longest known prefix of ``tokens[:limit]``, whole blocks only.

        Args:
            changes: what else the content of each block depends on.

        Returns:
            The blocks in order, and the parents under which what follows after 0, 1, 2, ... of
            them continues.
        """
        size = self.block_size
        parent: object = namespace
        blocks: list[int] = []
        parents = [parent]
        for start in range(0, limit - size + 1, size):
            above = marked(parent, len(blocks), changes)
            entry = self._entries.get((above, tuple(tokens[start : start + size])))
            if entry is None:
                break
            block, parent = entry
            blocks.append(block)
            parents.append(parent)
        return blocks, parents

    def insert(self, parent: object, tokens: tuple[int, ...], block: int) -> object:
        """Make ``block`` findable as the continuation of ``parent`` by ``tokens``.

        When another block holds the same prefix already, that one stays. Returns the parent of the
        block after this one.
        """
        assert len(tokens) == self.block_size
        key = (parent, tokens)
        entry = self._entries.get(key)
        if entry is not None:
            return entry[1]
        assert self._key_of[block] is None
        number = self._next_number
        self._next_number = number + 1
        self._entries[key] = (block, number)
        self._key_of[block] = key
        return number

    def forget(self, block: int) -> None:
        """The block's content is about to be overwritten."""
        key = self._key_of[block]
        if key is not None:
            _, number = self._entries.pop(key)
            self._key_of[block] = None
            if self._snapshots is not None:
                self._snapshots.forget(number)

    def clear(self) -> None:
        """Forget every block."""
        self._entries.clear()
        if self._snapshots is not None:
            self._snapshots.clear()
        self._key_of = [None] * len(self._key_of)


def marked(parent: object, block: int, changes: BlockChanges | None) -> object:
    """The parent of a sequence's ``block``, told apart by what is changed in that block."""
    mark = None if changes is None else changes.at(block)
    return parent if mark is None else (parent, mark)


class BlockPool:
    """Reference counts and the free list of ``n_blocks`` physical blocks.

    Block 0 is scratch (padding rows write there) and is never handed out. The free blocks form one
    doubly linked list, reused from its head: first those without content, then those with content,
    least recently used first.

    Attributes:
        n_free: blocks that can be handed out, with or without content.
        n_released: how many times a block has become free; a cheap sign that memory changed.
    """

    def __init__(self, n_blocks: int, index: PrefixIndex) -> None:
        assert n_blocks >= 2
        self.n_blocks = n_blocks
        self.n_free = n_blocks - 1
        self.n_released = 0
        self._uncleared: list[int] = []
        self._index = index
        self._refs = [0] * n_blocks
        # The list runs 0 -> 1 -> ... -> n - 1 -> 0; the scratch block is its fixed end.
        self._next = [*range(1, n_blocks), 0]
        self._prev = [n_blocks - 1, *range(n_blocks - 1)]
        # 1 where a block is free and holds nothing: runs of consecutive blocks are found by a
        # substring search.
        self._empty = bytearray(b"\x00" + b"\x01" * (n_blocks - 1))
        self._cursor = 1
        self._edited = bytearray(n_blocks)

    @property
    def n_total(self) -> int:
        """Blocks that can ever be handed out."""
        return self.n_blocks - 1

    @property
    def n_used(self) -> int:
        return self.n_total - self.n_free

    def references(self, block: int) -> int:
        return self._refs[block]

    def is_free(self, block: int) -> bool:
        return self._refs[block] == 0

    def allocate(self, n: int, *, after: int = 0, room: int = 0) -> list[int]:
        """Take ``n`` free blocks for one sequence; their old content is forgotten.

        Consecutive numbers are preferred where that evicts nothing (a CPU can then read the
        sequence's keys as one view).

        Args:
            n: at most ``n_free``.
            after: last block of the sequence so far, 0 = none.
            room: blocks the sequence may need in all, so that a new run is begun where it can grow.
        """
        assert 0 <= n <= self.n_free
        taken: list[int] = []
        if after:
            while len(taken) < n and after + 1 < self.n_blocks and self._empty[after + 1]:
                after += 1
                self._take(after)
                taken.append(after)
        missing = n - len(taken)
        if missing > 1 or (missing == 1 and not after):
            start = self._find_run(max(missing, min(room, _MOST_ROOM))) or self._find_run(missing)
            if start:
                for block in range(start, start + missing):
                    self._take(block)
                    taken.append(block)
                return taken
        oldest: list[int] = []
        for _ in range(n - len(taken)):
            block = self._next[0]
            self._take(block)
            oldest.append(block)
        oldest.sort()
        return taken + oldest

    def share(self, blocks: Items[int]) -> None:
        """Add a reference to blocks found in the index, free or in use."""
        for block in blocks:
            if self._refs[block] == 0:
                self._unlink(block)
            self._refs[block] += 1

    def note_edited(self, blocks: Items[int]) -> None:
        """What will be written to these blocks need not be finite."""
        for block in blocks:
            self._edited[block] = 1

    def take_uncleared(self) -> list[int]:
        """Blocks handed out anew that held what need not be finite: clear them before use."""
        blocks, self._uncleared = self._uncleared, []
        return blocks

    def release(self, blocks: Items[int]) -> None:
        """Give back one reference to each block of a sequence; content stays until reuse.

        The last block goes first: of a prefix, the far end is reused before what it hangs on.
        """
        for block in reversed(blocks):
            assert self._refs[block] > 0, "block released twice"
            self._refs[block] -= 1
            if self._refs[block] == 0:
                if self._index.holds(block):
                    self._link(block, self._prev[0], 0)
                else:
                    self._link(block, 0, self._next[0])
                    self._empty[block] = 1
                self.n_free += 1
                self.n_released += 1

    def forget_all(self) -> None:
        """Empty the index; free blocks hold nothing any more."""
        self._index.clear()
        for block in range(1, self.n_blocks):
            self._empty[block] = self._refs[block] == 0

    def count_in_use(self) -> int:
        """Blocks with references, counted one by one (for checks)."""
        return sum(1 for refs in self._refs[1:] if refs > 0)

    def free_list(self) -> list[int]:
        """Free blocks in the order of reuse (for checks)."""
        blocks = []
        block = self._next[0]
        while block:
            blocks.append(block)
            block = self._next[block]
        return blocks

    def _find_run(self, length: int) -> int:
        """First of ``length`` consecutive empty blocks, 0 when there are none."""
        pattern = b"\x01" * length
        start = self._empty.find(pattern, self._cursor)
        if start < 0:
            start = self._empty.find(pattern, 1)
        if start < 0:
            return 0
        self._cursor = start + length
        return start

    def _take(self, block: int) -> None:
        self._unlink(block)
        self._index.forget(block)
        self._refs[block] = 1
        if self._edited[block]:
            self._edited[block] = 0
            self._uncleared.append(block)

    def _unlink(self, block: int) -> None:
        before, behind = self._prev[block], self._next[block]
        self._next[before] = behind
        self._prev[behind] = before
        self._empty[block] = 0
        self.n_free -= 1

    def _link(self, block: int, before: int, behind: int) -> None:
        self._next[before] = self._prev[behind] = block
        self._prev[block], self._next[block] = before, behind
