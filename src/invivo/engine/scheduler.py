"""Who gets tokens, rows and memory in the next iteration. Pure policy: no torch here.

One rule without phases: every running sequence is given tokens until what is computed catches up
with what is known. In order: sequences that lack one token (decodes), then chunks of running
prefills, then admissions; each in order of rank (priority, arrival, order of queueing).

Why every sequence of the best priority ends:

- A sequence is admitted only with memory for all its known tokens, and refused when queued if it
  could not fit an empty cache. Only decodes ask for more memory later.
- When memory runs out the newest (worst-ranked) running sequence gives up all of its own and is
  computed again later, output tokens kept. The oldest is never the victim of another, so it ends,
  and then the next one is the oldest.
- ``max_batch_tokens > max_running``: decodes can never use up the token budget, and what they leave
  goes to the oldest prefill first: a long prompt moves in every iteration.
- Admission is strictly in order: a large request at the head of the queue is not overtaken by small
  ones behind it.

Training sequences hold memory of the same pool, in rows of their own, and are the first victims:
whatever a request lacks is taken from them before any request waits or is preempted. Before even
them goes what ended sequences hold for others to go on from: those then begin at their own first
token.

Models with recurrent layers share a prefix where a snapshot of their states lies at its end
(:mod:`invivo.engine.snapshots`). One is left where an equal prompt could take over most, where a
prompt parts from one seen before, and every ``snapshot_tokens`` where an iteration ends anyway; of
a sequence's own output only the newest is kept. A prompt is cut for the first two.

The n continuations of a request need no rule of their own. The first takes the token budget until
its prompt is computed; only then the others are admitted, and find the prompt's blocks in the
prefix index.

Priorities are strict: a smaller one may hold back a larger one as long as it has work.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

from invivo.engine.blocks import BlockPool, PrefixIndex, marked, prefix_namespace
from invivo.engine.snapshots import StateSnapshots
from invivo.engine.types import BlockCopy, HeldBlocks, Plan, Purpose, Sequence, Span, Status
from invivo.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Limits:
    """Budgets of one iteration and sizes of the memory that the scheduler hands out.

    Attributes:
        n_blocks: physical blocks of the cache, the scratch block 0 included.
        block_size: tokens a block.
        max_batch_tokens: token rows of one plan; more than ``max_running``.
        max_running: sequences that hold memory at the same time.
        max_length: prompt and output tokens of one sequence, by the model's context.
        max_adapters: different adapters among the running sequences, None = any number.
        max_training: training sequences that hold memory at the same time, in rows of their own
            behind those of the running ones.
        prefix_cache: whether prefixes are shared between sequences.
        recurrent: the model has layers that carry a state. Blocks alone then hold no prefix: one
            is shared where there is a snapshot of the states.
        n_snapshots: snapshots of recurrent states that are kept.
        snapshot_tokens: tokens that a snapshot must spare beyond the one before.
    """

    n_blocks: int
    block_size: int = 16
    max_batch_tokens: int = 2048
    max_running: int = 256
    max_length: int = 2048
    max_adapters: int | None = None
    max_training: int = 0
    prefix_cache: bool = True
    recurrent: bool = False
    n_snapshots: int = 0
    snapshot_tokens: int = 64

    @property
    def first_snapshot(self) -> int:
        """The first slot of states behind the scratch slot 0 and one for every row."""
        return 1 + self.max_running + self.max_training

    @property
    def n_state_slots(self) -> int:
        return self.first_snapshot + self.n_snapshots if self.recurrent else 1

    @property
    def shares_prefixes(self) -> bool:
        return self.prefix_cache and (not self.recurrent or self.n_snapshots > 0)

    def __post_init__(self) -> None:
        if self.max_batch_tokens <= self.max_running:
            raise InvalidRequest(
                f"must be more than max_running ({self.max_running}), "
                "so that prefills move while all rows decode",
                field="max_batch_tokens",
                given=self.max_batch_tokens,
                remedy="Raise max_batch_tokens or lower max_running",
            )
        if self.n_blocks < 2:
            raise InvalidRequest(
                "the cache has no room for a single block",
                field="kv_bytes",
                given=self.n_blocks,
                remedy="Give the cache more memory",
            )


def _rank(seq: Sequence) -> tuple[int, float, int]:
    return seq.rank


class Scheduler:
    """Queues, admission, preemption; hands out rows and blocks. Used from one thread.

    Attributes:
        max_length: most tokens a sequence can have: the context or what the cache can hold.
        waiting, running: sequences in order of rank.
        training: training sequences that hold memory, oldest first.
        prefix_queries, prefix_hits: prompt tokens looked up and found in the prefix cache.
        n_preemptions: sequences that lost their memory so far.
        n_reclaimed: training sequences that lost theirs.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.snapshots: StateSnapshots | None = None
        if limits.recurrent and limits.shares_prefixes:
            self.snapshots = StateSnapshots(limits.first_snapshot, limits.n_snapshots)
        self.index = PrefixIndex(limits.n_blocks, limits.block_size, self.snapshots)
        self.pool = BlockPool(limits.n_blocks, self.index)
        # The last token of a sequence is never fed back, so it needs no place in the cache.
        self.max_length = min(limits.max_length, self.pool.n_total * limits.block_size + 1)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.training: list[Sequence] = []
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.n_preemptions = 0
        self.n_reclaimed = 0
        self._held: list[HeldBlocks] = []  # oldest first
        self._free_rows = list(range(limits.max_running - 1, -1, -1))
        last_row = limits.max_running + limits.max_training - 1
        self._free_training_rows = list(range(last_row, limits.max_running - 1, -1))
        self._adapter_users: dict[int, int] = {}
        self._live: dict[str, list[Sequence]] = {}
        self._n_queued = 0
        # The head of the queue that did not fit, and the pool's n_released at that time.
        self._blocked: tuple[Sequence, int] | None = None

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def n_running(self) -> int:
        return len(self.running)

    @property
    def n_waiting(self) -> int:
        return len(self.waiting)

    @property
    def blocks_used(self) -> int:
        return self.pool.n_used

    @property
    def blocks_total(self) -> int:
        return self.pool.n_total

    # What the engine calls.

    def add(self, seq: Sequence) -> None:
        """Queue a sequence.

        Raises:
            InvalidRequest: it can never fit: the prompt, or prompt and ``max_tokens``, are longer
                than ``max_length``.
        """
        seq.limit = self._limit_of(seq)
        seq.namespace = prefix_namespace(seq.request, seq.adapter_version, seq.position_offset)
        seq.rank = (seq.request.priority, seq.request.arrival, self._n_queued)
        self._n_queued += 1
        seq.status = Status.WAITING
        self._live.setdefault(seq.request.id, []).append(seq)
        insort(self.waiting, seq, key=_rank)

    def schedule(self, now: float, *, admit: bool = True) -> Plan | None:
        """Decide the next iteration and commit it: the plan must be run, or given to ``failed``.

        Args:
            now: seconds on the engine's clock (reserved for deadlines).
            admit: whether those who wait may begin.

        Returns:
            None when nothing can run: idle, or everything waits for a token still in flight.
        """
        plan = Plan(spans=[])
        if self.snapshots is not None:
            self.snapshots.settle()
        prefills = self._plan_decodes(plan)
        budget = self.limits.max_batch_tokens - len(plan.spans)
        chunks, budget = self._plan_prefills(plan, prefills, budget)
        if self.waiting and admit:
            chunks += self._admit(plan, budget)
        spans = plan.spans + chunks
        plan.n_tokens = len(plan.spans)
        for span in chunks:
            plan.n_tokens += span.stop - span.start
        partial = [span for span in spans if span.seq.is_partial]
        if partial:
            plan.spans = [span for span in plan.spans if not span.seq.is_partial]
            chunks = [span for span in chunks if not span.seq.is_partial]
        plan.n_decode, plan.n_partial = len(plan.spans), len(partial)
        plan.spans += chunks + partial
        return plan if plan.spans else None

    def record(self, seq: Sequence, token: int) -> bool:
        """A sampled token is now known on the host; False when the sequence has ended meanwhile."""
        assert seq.n_pending > 0
        seq.n_pending -= 1
        if seq.status is Status.FINISHED:
            return False
        seq.tokens.append(token)
        return True

    def finish(self, seq: Sequence) -> None:
        """End a sequence and free what it holds, at once and at any moment.

        A launched plan may still contain it: whatever reuses its blocks runs after that plan.
        """
        if seq.status is Status.FINISHED:
            return
        if seq.status is Status.RUNNING:
            self._index_blocks(seq)
            self._stop_running(seq)
        else:
            del self.waiting[bisect_left(self.waiting, seq.rank, key=_rank)]
        seq.status = Status.FINISHED
        siblings = self._live[seq.request.id]
        siblings.remove(seq)
        if not siblings:
            del self._live[seq.request.id]

    def spoil(self, span: Span) -> list[int]:
        """What ``span`` wrote is not what its sequence's changes ask for: nobody may find it.

        Returns:
            The blocks, from the first changed position on, that nobody will find any more;
            sequences of the same plan may share them.
        """
        seq = span.seq
        if seq.shareable is None or not seq.blocks:
            return []
        first = max(span.start, seq.shareable) // self.limits.block_size
        spoiled = seq.blocks[first:]
        for block in spoiled:
            self.index.forget(block)
        seq.prefix_parent = None  # what follows is found by nobody either
        return spoiled

    def abort(self, request_id: str) -> list[Sequence]:
        """Finish all live sequences of a request; returns them."""
        ended = list(self._live.get(request_id, ()))
        for seq in ended:
            self.finish(seq)
        return ended

    def failed(self, plan: Plan) -> list[Sequence]:
        """The plan did not run: finish its live sequences and return them.

        What its spans should have written is not there, so all cached prefixes are dropped and the
        micro-steps of its training sequences begin anew.
        """
        ended = []
        for seq in plan.held:
            self.let_go(seq)
        for span in plan.spans:
            if span.purpose is Purpose.TRAIN:
                self.let_go(span.seq)
            elif span.seq.status is not Status.FINISHED:
                ended.append(span.seq)
                self.finish(span.seq)
        self.pool.forget_all()
        for seq in self.running:
            seq.prefix_parent = None  # its own blocks are good, but the chain is gone
            self._drop_unnamed(seq)
        for span in plan.spans:
            if span.samples:
                span.seq.n_pending -= 1
        return ended

    # Memory that others go on from.

    def hold_blocks(self, seq: Sequence) -> HeldBlocks:
        """Keep the blocks of a running sequence that is about to end, as long as there is room."""
        held = HeldBlocks(list(seq.blocks))
        self.pool.share(held.blocks)
        self._held.append(held)
        return held

    def drop_blocks(self, held: HeldBlocks) -> None:
        """Nobody will go on from these any more; idempotent."""
        if held.blocks:
            self._held.remove(held)
            self.pool.release(held.blocks)
            held.blocks = []

    # Memory of training.

    @property
    def longest_training(self) -> int:
        """Most tokens of a training sequence."""
        blocks = self.pool.n_total - self._training_spare
        return min(self.limits.max_length, blocks * self.limits.block_size)

    @property
    def _training_spare(self) -> int:
        return 1 + self.pool.n_total // 100

    def hold(self, seq: Sequence, plan: Plan) -> bool:
        """Give a training sequence a row and blocks for all its tokens, if nobody misses them.

        Call it after ``schedule``. A reserve stays free: a block for every running sequence, and
        what admission keeps.

        Returns:
            False when there is no room now; nothing has changed then.

        Raises:
            InvalidRequest: the text can never fit.
        """
        assert not seq.blocks
        n_new = -(-len(seq.tokens) // self.limits.block_size)
        if seq.packing is not None:
            n_new = seq.packing.n_blocks
        spare = self._training_spare
        longest = self.longest_training
        if len(seq.tokens) > longest:
            raise InvalidRequest(
                f"the text has {len(seq.tokens)} tokens, at most {longest} fit",
                field="max_length",
                remedy="Cut the training texts shorter or give the engine more cache",
            )
        memory_is_short = self._blocked is not None and self._blocked[0] in self.waiting[:1]
        if memory_is_short or not self._free_training_rows:
            return False
        if n_new + spare + len(self.running) > self.pool.n_free:
            return False
        seq.row = self._free_training_rows.pop()
        seq.blocks = self.pool.allocate(n_new)
        seq.n_computed = 0
        seq.status = Status.RUNNING
        self.training.append(seq)
        plan.held.append(seq)
        plan.grown.append((seq, 0))
        return True

    def let_go(self, seq: Sequence) -> None:
        """Take row and blocks from a training sequence, which must then begin anew; idempotent."""
        if not seq.blocks:
            return
        self.training.remove(seq)
        self._free_training_rows.append(seq.row)
        self.pool.release(seq.blocks)
        seq.blocks = []
        seq.row = -1
        seq.n_computed = 0
        seq.status = Status.WAITING

    def _reclaim(self, n_free: int, plan: Plan) -> None:
        """Take memory back until ``n_free`` blocks are free: what is held for others, then from
        training, newest first.

        Nothing is taken from training where even all of it would not do.
        """
        pool = self.pool
        if pool.n_free >= n_free:
            return
        while self._held and pool.n_free < n_free:
            self.drop_blocks(self._held[-1])
        if pool.n_free + sum(len(seq.blocks) for seq in self.training) < n_free:
            return
        while pool.n_free < n_free:
            seq = self.training[-1]
            self.let_go(seq)
            seq.n_preempted += 1
            self.n_reclaimed += 1
            plan.reclaimed.append(seq)

    # One iteration, in order.

    def _plan_decodes(self, plan: Plan) -> list[Sequence]:
        """Spans of one token for all that lack one; returns those that lack more, in order."""
        block_size, snapshots = self.limits.block_size, self.snapshots
        spans = plan.spans
        prefills: list[Sequence] = []
        # Preemption takes from the end of the list: the sequence at hand or one behind it, never
        # one that has been looked at already.
        for seq in self.running:
            start = seq.n_computed
            n_pending = seq.n_pending
            known = len(seq.tokens)
            missing = known + n_pending - start
            if missing != 1:
                if missing > 1:
                    prefills.append(seq)
                continue
            if start + 1 >= seq.limit or (n_pending and seq.needs_host_token):
                continue
            if start == len(seq.blocks) * block_size and not self._grow(seq, plan):
                break
            if (start + seq.row) % block_size == 0:  # not all in one step that began together
                self._index_blocks(seq)
            seq.n_computed = start + 1
            if seq.request.kind == "generate":
                seq.n_pending = n_pending + 1
                purpose = Purpose.DECODE if start >= seq.n_prompt else Purpose.PREFILL
                spans.append(Span(seq, start, start + 1, purpose, True))
            else:
                spans.append(Span(seq, start, start + 1, Purpose.SCORE, False))
            if snapshots is not None and (start + 1) % block_size == 0:
                self._leave_snapshot(plan, seq)
        return prefills

    def _plan_prefills(
        self, plan: Plan, prefills: list[Sequence], budget: int
    ) -> tuple[list[Span], int]:
        """Chunks of running prefills, oldest first; returns them and the budget left."""
        chunks: list[Span] = []
        for seq in prefills:
            if budget == 0:
                break
            budget -= self._add_chunk(plan, chunks, seq, budget)
        return chunks, budget

    def _admit(self, plan: Plan, budget: int) -> list[Span]:
        """First chunks of waiting sequences, strictly in order."""
        chunks: list[Span] = []
        while budget > 0 and self.waiting and self._free_rows:
            seq = self.waiting[0]
            if seq.n_pending or not self._adapter_fits(seq) or not self._take_memory(seq, plan):
                break
            del self.waiting[0]
            self._start_running(seq, plan)
            budget -= self._add_chunk(plan, chunks, seq, budget)
        return chunks

    # The parts of it.

    def _limit_of(self, seq: Sequence) -> int:
        request = seq.request
        if request.kind != "generate":
            # Every token is fed, none is drawn; the last one needs a place in the cache too.
            longest = min(self.max_length, self.pool.n_total * self.limits.block_size)
            if seq.n_prompt > longest:
                raise InvalidRequest(
                    f"the text has {seq.n_prompt} tokens, at most {longest} fit",
                    field="prompt",
                    remedy="Shorten the text or give the engine a longer max_model_len or more "
                    "cache",
                )
            return seq.n_prompt + 1
        if seq.n_prompt >= self.max_length:
            raise InvalidRequest(
                f"the prompt has {seq.n_prompt} tokens, at most {self.max_length - 1} fit "
                "with one token of output",
                field="prompt",
                remedy="Shorten the prompt or give the engine a longer max_model_len or more cache",
            )
        max_tokens = request.params.max_tokens
        if max_tokens is None:
            return self.max_length
        if seq.n_prompt + max_tokens > self.max_length:
            raise InvalidRequest(
                f"the prompt has {seq.n_prompt} tokens, so at most "
                f"{self.max_length - seq.n_prompt} can follow",
                field="max_tokens",
                given=max_tokens,
                remedy="Lower max_tokens, or leave it out to go on until the context is full",
            )
        return seq.n_prompt + max_tokens

    def _adapter_fits(self, seq: Sequence) -> bool:
        most = self.limits.max_adapters
        slot = seq.adapter_slot
        users = self._adapter_users
        return most is None or slot == 0 or slot in users or len(users) < most

    def _take_memory(self, seq: Sequence, plan: Plan) -> bool:
        """Blocks for all known tokens of a waiting sequence, shared where they are known."""
        pool = self.pool
        if self._blocked == (seq, pool.n_released) and not self._held:
            return False  # nothing has become free since it did not fit
        if seq.onset is not None and seq.onset.held.blocks:
            return self._take_over(seq, plan)
        seq.first_layer = 0
        size = self.limits.block_size
        n_tokens = len(seq.tokens)
        shared: list[int] = []
        parents: list[object] = [None]
        readable = 0
        if self.limits.shares_prefixes:
            readable = _readable(seq)
            shared, parents = self.index.match(seq.tokens, seq.namespace, readable, seq.changes)
            if self.snapshots is not None:
                n_seen = len(shared)
                n_shared, seq.snapshot = self.snapshots.longest(parents)
                shared, parents = shared[:n_shared], parents[: n_shared + 1]
                seq.snapshot_at = n_shared * size
                seq.snapshot_cuts = self._cuts(seq, n_seen * size, readable // size * size)
        n_new = -(-n_tokens // size) - len(shared)
        n_revived = sum(1 for block in shared if pool.is_free(block))
        # Some blocks stay free for the decodes that run: without, a newcomer is preempted at once.
        reserve = 1 + pool.n_total // 100 if self.running else 0
        needed = n_new + n_revived + reserve
        self._reclaim(needed, plan)
        if needed > pool.n_free:
            self._blocked = (seq, pool.n_released)
            return False
        self._blocked = None
        pool.share(shared)
        n_growth = -(-(seq.limit - 1) // size) - len(shared)
        seq.blocks = shared + pool.allocate(n_new, after=shared[-1] if shared else 0, room=n_growth)
        seq.n_computed = len(shared) * size
        seq.n_indexed, seq.prefix_parent = len(shared), parents[-1]
        self._note_edited(seq, len(shared))
        if readable and seq.n_preempted == 0:
            seq.n_cached = seq.n_computed
            self.prefix_queries += seq.n_prompt
            self.prefix_hits += seq.n_cached
        plan.grown.append((seq, 0))
        return True

    def _take_over(self, seq: Sequence, plan: Plan) -> bool:
        """Memory for a sequence that goes on from another's keys: that one's whole blocks before
        the first token that is computed, a copy of the block that this token is in, and new ones.
        """
        pool, size, onset = self.pool, self.limits.block_size, seq.onset
        assert onset is not None
        n_shared, inside = divmod(onset.token, size)
        n_new = -(-len(seq.tokens) // size) - n_shared
        needed = n_new + (1 + pool.n_total // 100 if self.running else 0)
        self._reclaim(needed, plan)
        if not onset.held.blocks:
            return self._take_memory(seq, plan)  # its own were what was needed
        if needed > pool.n_free:
            self._blocked = (seq, pool.n_released)
            return False
        self._blocked = None
        shared = onset.held.blocks[:n_shared]
        pool.share(shared)
        seq.blocks = shared + pool.allocate(n_new, after=shared[-1] if shared else 0, room=n_new)
        self._note_edited(seq, n_shared)
        seq.first_layer = onset.layer
        seq.n_computed = onset.token
        seq.n_indexed, seq.prefix_parent = n_shared, None
        if inside:
            source, target = onset.held.blocks[n_shared], seq.blocks[n_shared]
            plan.copied.append(BlockCopy(source, target, inside, onset.layer))
        if seq.n_preempted == 0:
            seq.n_cached = seq.n_computed
            self.prefix_queries += seq.n_prompt
            self.prefix_hits += seq.n_cached
        plan.grown.append((seq, 0))
        return True

    def _start_running(self, seq: Sequence, plan: Plan) -> None:
        seq.row = self._free_rows.pop()
        seq.status = Status.RUNNING
        insort(self.running, seq, key=_rank)
        if seq.adapter_slot:
            self._adapter_users[seq.adapter_slot] = self._adapter_users.get(seq.adapter_slot, 0) + 1
        plan.admitted.append(seq)
        if seq.snapshot >= 0:
            plan.restored.append((seq.snapshot, seq.row + 1))
            seq.snapshot = -1

    def _stop_running(self, seq: Sequence) -> None:
        """Take row, blocks and adapter place from a running sequence."""
        del self.running[bisect_left(self.running, seq.rank, key=_rank)]
        self.pool.release(seq.blocks)
        seq.blocks = []
        seq.n_indexed, seq.prefix_parent = 0, None
        self._drop_unnamed(seq)
        self._free_rows.append(seq.row)
        seq.row = -1
        if seq.adapter_slot:
            self._adapter_users[seq.adapter_slot] -= 1
            if self._adapter_users[seq.adapter_slot] == 0:
                del self._adapter_users[seq.adapter_slot]

    def _add_chunk(self, plan: Plan, chunks: list[Span], seq: Sequence, budget: int) -> int:
        """Plan as many missing tokens as the budget allows; returns how many."""
        start = seq.n_computed
        n_tokens = len(seq.tokens)
        stop = min(n_tokens, start + budget)
        if self.snapshots is not None:
            stop = self._cut(seq, start, stop)
        if seq.request.kind == "generate":
            samples = stop == n_tokens
            # After a preemption everything but the last output token may come from the cache.
            decodes = samples and start == n_tokens - 1 and start >= seq.n_prompt
            span = Span(seq, start, stop, Purpose.DECODE if decodes else Purpose.PREFILL, samples)
            seq.n_pending += samples
        else:
            span = Span(seq, start, stop, Purpose.SCORE, False)
        (plan.spans if stop - start == 1 else chunks).append(span)
        seq.n_computed = stop
        self._index_blocks(seq)
        if self.snapshots is not None and stop % self.limits.block_size == 0:
            self._leave_snapshot(plan, seq)
        return stop - start

    def _grow(self, seq: Sequence, plan: Plan) -> bool:
        """One more block for a decode; False when it had to give up its own memory instead."""
        pool = self.pool
        self._reclaim(1, plan)
        while pool.n_free == 0:
            victim = self.running[-1]
            self._preempt(victim, plan)
            if victim is seq:
                return False
        blocks = seq.blocks
        plan.grown.append((seq, len(blocks)))
        blocks += pool.allocate(1, after=blocks[-1])
        self._note_edited(seq, len(blocks) - 1)
        return True

    def _note_edited(self, seq: Sequence, first: int) -> None:
        """Of the blocks from ``first`` on, those that the sequence's program changes."""
        if seq.shareable is not None:
            self.pool.note_edited(seq.blocks[max(first, seq.shareable // self.limits.block_size) :])

    def _preempt(self, seq: Sequence, plan: Plan) -> None:
        """Free a running sequence's memory; it waits to be computed again, tokens kept."""
        self._index_blocks(seq)
        self._stop_running(seq)
        seq.n_computed = 0
        seq.n_preempted += 1
        seq.status = Status.WAITING
        insort(self.waiting, seq, key=_rank)
        plan.preempted.append(seq)
        self.n_preemptions += 1

    def _index_blocks(self, seq: Sequence) -> None:
        """Make the full blocks findable whose tokens are known and computed (or planned).

        A plan's spans are indexed with it: all keys of a layer are stored before any attention
        reads them, so a later span of the same plan may already share these blocks.
        """
        if seq.prefix_parent is None:  # no prefix cache, or the chain was dropped
            return
        if seq.last_layer is not None:  # its keys end there
            return
        size = self.limits.block_size
        full = min(seq.n_computed, len(seq.tokens)) // size
        if seq.private_from is not None:
            full = min(full, seq.private_from // size)
        while seq.n_indexed < full:
            start = seq.n_indexed * size
            seq.prefix_parent = self.index.insert(
                marked(seq.prefix_parent, seq.n_indexed, seq.changes),
                tuple(seq.tokens[start : start + size]),
                seq.blocks[seq.n_indexed],
            )
            seq.n_indexed += 1
            if seq.unnamed and seq.unnamed[0][0] == seq.n_indexed * size:
                self._name_snapshot(seq, seq.unnamed.pop(0)[1])

    # Snapshots of recurrent states.

    def _cuts(self, seq: Sequence, *ends: int) -> tuple[int, ...]:
        """Those of ``ends`` (tokens) that spare enough beyond the snapshot before."""
        cuts: list[int] = []
        before = seq.snapshot_at
        for end in sorted(ends):
            if end - before >= self.limits.snapshot_tokens:
                cuts.append(end)
                before = end
        return tuple(cuts)

    def _cut(self, seq: Sequence, start: int, stop: int) -> int:
        """Where a chunk [start, stop) ends, so that a snapshot can be left behind."""
        for cut in seq.snapshot_cuts:
            if start < cut <= stop:
                return cut
        aligned = stop - stop % self.limits.block_size
        if stop < len(seq.tokens) and aligned > start and self._is_worth(seq, aligned):
            return aligned
        return stop

    def _is_worth(self, seq: Sequence, at: int) -> bool:
        """Whether somebody could find a snapshot after ``at`` tokens, and be spared enough."""
        if seq.prefix_parent is None:
            return False
        if seq.private_from is not None and at > seq.private_from:
            return False
        return at in seq.snapshot_cuts or at - seq.snapshot_at >= self.limits.snapshot_tokens

    def _leave_snapshot(self, plan: Plan, seq: Sequence) -> None:
        """Have the states copied that this plan leaves behind, if that is worth it."""
        snapshots, at = self.snapshots, seq.n_computed
        assert snapshots is not None
        if not self._is_worth(seq, at):
            return
        named = seq.n_indexed * self.limits.block_size == at
        if named and snapshots.has(seq.prefix_parent):
            seq.snapshot_at = at
            return
        slot = snapshots.take()
        if slot is None:
            return
        plan.saved.append((seq.row + 1, slot))
        seq.snapshot_at = at
        if named:
            self._name_snapshot(seq, slot)
        else:
            seq.unnamed.append((at, slot))

    def _name_snapshot(self, seq: Sequence, slot: int) -> None:
        """The snapshot in ``slot`` is that after the blocks of ``seq`` that are indexed."""
        snapshots, number = self.snapshots, seq.prefix_parent
        assert snapshots is not None
        new = snapshots.name(number, slot)
        if new and seq.n_indexed * self.limits.block_size > seq.n_prompt:
            snapshots.forget(seq.last_written)
            seq.last_written = number

    def _drop_unnamed(self, seq: Sequence) -> None:
        if self.snapshots is not None:
            for _, slot in seq.unnamed:
                self.snapshots.give_back(slot)
            seq.unnamed.clear()


def _readable(seq: Sequence) -> int:
    """How many leading tokens may come from the prefix cache instead of being computed.

    Of a program's runs nothing that is kept of it, and nothing that only it may find.
    """
    most = _unread(seq)
    for bound in (seq.private_from, seq.recomputed_from):
        most = most if bound is None else min(most, bound)
    return most


def _unread(seq: Sequence) -> int:
    """How many leading tokens the request itself needs not computed.

    The last token is always computed, for its logits; so is every token whose final state the
    request asks for: from ``score_from - 1`` on for scores, all for prompt log-probabilities and
    mean embeddings.
    """
    request = seq.request
    last = len(seq.tokens) - 1
    if request.kind == "score":
        return max(0, min(last, seq.n_virtual + request.score_from - 1))
    if request.kind == "run":
        return last
    if request.kind == "embed":
        return last if request.pooling == "last" else 0
    wants_prompt = request.params.prompt_logprobs is not None and seq.index == 0
    if wants_prompt and len(seq.tokens) == seq.n_prompt:
        return 0
    return last
