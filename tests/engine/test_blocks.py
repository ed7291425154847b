"""Block pool and prefix index: what is counted, what is kept, what is found."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from invivo.engine.blocks import BlockPool, PrefixIndex, prefix_namespace
from invivo.engine.types import Request

BASE = (("salt", ""),)


def pool_of(n_blocks: int, block_size: int = 4) -> tuple[BlockPool, PrefixIndex]:
    index = PrefixIndex(n_blocks, block_size)
    return BlockPool(n_blocks, index), index


def index_all(index: PrefixIndex, tokens: list[int], blocks: list[int], namespace=BASE) -> None:
    parent: object = namespace
    for i, block in enumerate(blocks):
        size = index.block_size
        parent = index.insert(parent, tuple(tokens[i * size : (i + 1) * size]), block)


def test_scratch_block_is_never_handed_out() -> None:
    pool, _ = pool_of(6)
    assert sorted(pool.allocate(5)) == [1, 2, 3, 4, 5]
    assert pool.n_free == 0


def test_blocks_are_consecutive_while_that_costs_nothing() -> None:
    pool, _ = pool_of(40)
    first = pool.allocate(3, room=8)
    second = pool.allocate(2, room=8)
    assert first == [1, 2, 3]
    assert second == [9, 10]
    assert pool.allocate(2, after=3) == [4, 5]
    assert pool.allocate(1, after=10) == [11]


def test_a_released_block_without_content_is_reused_before_cached_ones() -> None:
    pool, index = pool_of(4)
    a, b, c = pool.allocate(3)
    index_all(index, list(range(8)), [a, b])
    pool.release([a, b, c])
    assert pool.free_list() == [c, b, a]  # of the prefix, the far end goes first
    assert pool.allocate(1) == [c]
    assert index.match(list(range(8)), BASE, 8)[0] == [a, b]
    assert pool.allocate(1) == [b]
    assert index.match(list(range(8)), BASE, 8)[0] == [a]


def test_shared_blocks_are_freed_by_the_last_user() -> None:
    pool, _ = pool_of(4)
    blocks = pool.allocate(2)
    pool.share(blocks)
    pool.release(blocks)
    assert pool.n_free == 1
    pool.release(blocks)
    assert pool.n_free == 3


def test_a_cached_block_comes_back_from_the_free_list_with_its_content() -> None:
    pool, index = pool_of(5)
    blocks = pool.allocate(2)
    index_all(index, list(range(8)), blocks)
    pool.release(blocks)
    found, _ = index.match(list(range(12)), BASE, 11)
    assert found == blocks
    pool.share(found)
    assert pool.n_free == 2
    assert not set(pool.allocate(2)) & set(blocks)
    assert index.match(list(range(12)), BASE, 11)[0] == blocks


def test_what_need_not_be_finite_is_cleared_when_it_is_handed_out_anew() -> None:
    index = PrefixIndex(4, 2)
    pool = BlockPool(4, index)
    blocks = pool.allocate(2)
    pool.note_edited(blocks[1:])
    index.insert((), (1, 2), blocks[0])
    index.insert((1,), (3, 4), blocks[1])
    pool.release(blocks)
    pool.share(blocks)  # found again: what is in it was asked for
    assert pool.take_uncleared() == []
    pool.release(blocks)
    assert sorted(pool.allocate(3)) == [1, 2, 3]
    assert pool.take_uncleared() == blocks[1:]
    assert pool.take_uncleared() == []


def test_match_stops_at_the_limit_in_whole_blocks() -> None:
    pool, index = pool_of(5)
    tokens = list(range(8))
    index_all(index, tokens, pool.allocate(2))
    assert len(index.match(tokens, BASE, 8)[0]) == 2
    assert len(index.match(tokens, BASE, 7)[0]) == 1
    assert len(index.match(tokens, BASE, 3)[0]) == 0


def test_equal_hashes_of_different_prefixes_are_told_apart() -> None:
    # Python's integer hash is the value modulo 2**61 - 1, so these tuples collide.
    shift = 2**61 - 1
    tokens = [3, 1, 4, 1, 5, 9, 2, 6]
    twin = [tokens[0] + shift, *tokens[1:]]
    assert hash(tuple(tokens[:4])) == hash(tuple(twin[:4]))
    pool, index = pool_of(9)
    mine, other = pool.allocate(2), pool.allocate(2)
    index_all(index, tokens, mine)
    assert index.match(twin, BASE, 8)[0] == []
    index_all(index, twin, other)
    assert index.match(tokens, BASE, 8)[0] == mine
    assert index.match(twin, BASE, 8)[0] == other


def test_an_evicted_parent_does_not_lend_its_children_to_a_successor() -> None:
    pool, index = pool_of(9)
    tokens = list(range(8))
    blocks = pool.allocate(2)
    index_all(index, tokens, blocks)
    index.forget(blocks[0])
    (again,) = pool.allocate(1)
    index_all(index, tokens[:4], [again])
    assert index.match(tokens, BASE, 8)[0] == [again]


def test_namespaces_are_typed_parts() -> None:
    def request(adapter: str | None, salt: str = "") -> Request:
        return Request(id="r", tokens=(1,), adapter=adapter, salt=salt)

    different = [
        prefix_namespace(request(None), 0),
        prefix_namespace(request("a"), 1),
        prefix_namespace(request("a"), 2),
        prefix_namespace(request("b"), 1),
        prefix_namespace(request(None, salt="a"), 0),
        prefix_namespace(request("a", salt="a"), 1),
    ]
    assert len(set(different)) == len(different)
    pool, index = pool_of(20)
    tokens = list(range(4))
    owners = {namespace: pool.allocate(1) for namespace in different}
    for namespace, blocks in owners.items():
        index_all(index, tokens, blocks, namespace)
    for namespace, blocks in owners.items():
        assert index.match(tokens, namespace, 4)[0] == blocks


class PoolMachine(RuleBasedStateMachine):
    """Random sequences take, share, index and give back blocks."""

    N = 14

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.index = pool_of(self.N, block_size=2)
        self.held: list[list[int]] = []

    @rule(n=st.integers(0, 5), room=st.integers(0, 6), extend=st.booleans())
    def allocate(self, n: int, room: int, extend: bool) -> None:
        n = min(n, self.pool.n_free)
        in_use = {block for blocks in self.held for block in blocks}
        owner = self.held[-1] if extend and self.held else []
        blocks = self.pool.allocate(n, after=owner[-1] if owner else 0, room=room)
        assert len(set(blocks)) == n
        assert 0 not in blocks
        assert not set(blocks) & in_use
        assert not any(self.index.holds(block) for block in blocks)
        if owner:
            owner += blocks
        elif blocks:
            self.held.append(blocks)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=2, max_size=8))
    def index_one(self, tokens: list[int]) -> None:
        if not self.held:
            return
        parent: object = BASE
        for i, block in enumerate(self.held[-1][: len(tokens) // 2]):
            if self.index.holds(block):
                return
            parent = self.index.insert(parent, tuple(tokens[2 * i : 2 * i + 2]), block)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=2, max_size=8))
    def share(self, tokens: list[int]) -> None:
        blocks, _ = self.index.match(tokens, BASE, len(tokens))
        assert len(set(blocks)) == len(blocks)
        self.pool.share(blocks)
        if blocks:
            self.held.append(blocks)

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 100))
    def release(self, which: int) -> None:
        self.pool.release(self.held.pop(which % len(self.held)))

    @rule()
    def forget_all(self) -> None:
        self.pool.forget_all()

    @invariant()
    def every_block_is_free_or_held(self) -> None:
        free = self.pool.free_list()
        assert len(set(free)) == len(free) == self.pool.n_free
        assert self.pool.n_free + self.pool.count_in_use() == self.pool.n_total
        counts = [0] * self.N
        for blocks in self.held:
            for block in blocks:
                counts[block] += 1
        assert counts == [self.pool.references(block) for block in range(self.N)]
        assert not set(free) & {block for block in range(self.N) if counts[block]}


PoolMachine.TestCase.settings = settings(
    max_examples=80, stateful_step_count=30, deadline=None, derandomize=True
)
TestPool = PoolMachine.TestCase
