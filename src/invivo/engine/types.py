"""The nouns of the engine: requests, sequences, spans, plans and results. No torch here.

One kind of work: a *span* is a run of tokens [start, stop) of one sequence, with a purpose.
Every iteration executes the spans of one *plan* as one flat batch. Prefill, decode, score and
the training forward are the same computation with different ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Literal, Protocol

from invivo.engine.packing import Packing, Part

if TYPE_CHECKING:
    import torch

    from invivo.edits.blobs import Blobs
    from invivo.edits.resolved import ResolvedProgram
    from invivo.edits.results import ProgramOutput


class Purpose(IntEnum):
    """What a span's tokens are for: it decides the epilogue and how they are counted."""

    DECODE = 0  # one token of a running generation: sample
    PREFILL = 1  # prompt tokens: sample after the last
    SCORE = 2  # log-probabilities (or pooled states) of given tokens
    TRAIN = 3  # fine-tuning forward: loss


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """A constraint on the output, kept as text so that it can be hashed.

    ``json_schema`` holds a JSON schema as text ("{}" admits any JSON), ``regex`` a regular
    expression, ``choice`` the allowed strings as a JSON list.
    """

    kind: Literal["json_schema", "regex", "choice"]
    source: str


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn. Ranges are checked once, by ``validate`` in ``engine/validate.py``.

    Attributes:
        temperature: 0 is greedy.
        top_k: 0 = all. top_p, min_p: 1 and 0 = all.
        repetition_penalty: divides (multiplies) positive (negative) logits of tokens seen in
            prompt or output; 1 = none. presence_penalty, frequency_penalty: subtracted for tokens
            seen in the output, once and per occurrence.
        logit_bias: added to logits, by token id.
        seed: draws depend on (seed, position) only, never on the rest of the batch.
        max_tokens: None = until the context is full.
        stop: strings that end the text; the match is not part of the text.
        logprobs: None = no; k >= 0 = the chosen token's log-probability and the top k.
        prompt_logprobs: the same for the prompt's tokens.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Intervention:
    """A program of edits and captures that a request carries, resolved for its prompt.

    Attributes:
        resolved: of a ``run`` request any number of rows, of every other exactly one, whose run
            "main" has the request's tokens as its prompt.
        blobs: the named tensors it refers to.
        params: values of its trainable parameters; those that are missing have their start value.
        owner: for whom captures are kept that the program wants kept.
    """

    resolved: ResolvedProgram
    blobs: Blobs
    params: Mapping[str, torch.Tensor] = field(default_factory=dict)
    owner: str = ""


@dataclass(frozen=True, slots=True)
class Request:
    """One thing asked of the engine.

    ``generate`` samples ``n`` continuations; ``score`` returns log-probabilities of
    ``tokens[score_from:]`` given what precedes them; ``embed`` returns the pooled final states;
    ``run`` carries out a program, whose captures and measures are all that comes back. (Every run
    of a program is a sequence; those that write no text have a request of this kind, which the
    engine makes.)

    Attributes:
        adapter: name of a loaded adapter, None = the base model.
        salt: tenant; prefixes are never shared between salts.
        intervention: the program that it carries, None = untouched.
        pooling: for ``embed``: "mean" or "last".
        priority: smaller runs earlier; ties by arrival.
    """

    id: str
    tokens: tuple[int, ...]
    kind: Literal["generate", "score", "embed", "run"] = "generate"
    params: SamplingParams = SamplingParams()
    n: int = 1
    adapter: str | None = None
    salt: str = ""
    intervention: Intervention | None = None
    score_from: int = 1
    pooling: Literal["mean", "last"] = "mean"
    priority: int = 0
    arrival: float = 0.0  # time.monotonic() seconds


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """One loaded adapter, as its users see it.

    Attributes:
        version: counts up each time the name is loaded again.
        rank: largest rank, width or number of virtual tokens of its bypasses.
        running: requests that hold this version, waiting ones included.
        n_parameters: numbers in it.
    """

    name: str
    version: int
    rank: int
    running: int = 0
    n_parameters: int = 0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of one token, with the best alternatives."""

    token: int
    logprob: float
    rank: int  # 1 = the most probable token
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Output:
    """What the engine hands back for one sequence after an iteration; ``tokens`` are the new ones.

    ``text`` is the newly settled text (stop strings withheld). ``finish_reason`` is set once, in
    the last output of a sequence; ``final`` is set in the last output of the whole request.
    """

    request_id: str
    index: int = 0
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None  # for score: one per scored token
    embedding: list[float] | None = None
    program: ProgramOutput | None = None  # in the last output of a request with a program
    cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_match: str | int | None = None  # the stop string or token id that ended it
    error: Exception | None = None
    final: bool = False


class BlockChanges(Protocol):
    """What else than its tokens the content of a sequence's blocks depends on."""

    def at(self, block: int) -> object | None:
        """A key of what is done at the tokens of the ``block``-th; None: nothing."""
        ...


@dataclass(slots=True, eq=False)
class HeldBlocks:
    """Blocks of a sequence that has ended, kept for others that go on from its keys.

    ``blocks`` is empty once the memory was needed elsewhere.
    """

    blocks: list[int]


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """The first tokens of a block, their keys and values from a layer on, copied to another."""

    source: int
    target: int
    tokens: int
    layer: int


@dataclass(frozen=True, slots=True)
class Onset:
    """Where a sequence goes on from another with the same tokens.

    Attributes:
        held: that sequence's memory.
        token: the first token that is computed at all.
        layer: the first layer that those tokens go through.
    """

    held: HeldBlocks
    token: int
    layer: int


@dataclass(slots=True, eq=False)
class Sequence:
    """One running continuation of a request: its tokens, how far it has been computed, its memory.

    Attributes:
        tokens: prompt and known output tokens.
        n_prompt: prompt length, virtual tokens included.
        n_virtual: leading placeholder tokens, to which the adapter gives their meaning.
        n_computed: tokens whose keys are in the cache (or whose step has been launched).
        n_pending: sampled tokens whose value the host does not know yet: they live in a device
            buffer until their step is folded in (one while a step is in flight, two between
            planning the next step and folding that one).
        blocks: physical cache blocks, in order.
        row: slot of the running sequence in persistent per-sequence tables, -1 when not running.
        adapter_slot, adapter_version: device slot and version of the adapter, 0 = base model.
        position_offset: added to the positions that rotary embeddings see (LongRoPE models).
        needs_host_token: the next step needs the last token's value on the host (grammar), so the
            sequence skips a step while that token is in flight.
        namespace: typed prefix-cache key parts, e.g. (("adapter", name, version), ("salt", s)).
        limit: total tokens at which the sequence ends with "length"; set when it is queued.
        rank: (priority, arrival, order of queueing): smaller goes first.
        numbers: position numbers of the prompt's tokens where a program gives them others than
            their indices; generated tokens go on from the largest.
        packing: of a training sequence that holds several texts; None: one.
        shareable: leading tokens whose keys are those of a plain request with the same tokens;
            None: all. What comes behind need not be finite.
        changes: what else a block's content depends on; None: nothing.
        private_from: from this token on nobody else may find its keys; None: no such.
        recomputed_from: from this token on nothing comes from the prefix cache; None: no such.
        onset: where it goes on from another sequence, if that one's memory is still there when
            this one is admitted; None: it begins at its first token.
        first_layer, last_layer: layers that its rows go through, the end exclusive, None: all.
        n_indexed, prefix_parent: leading blocks that the prefix index knows, and the key under
            which the next one continues that chain.
        snapshot: slot of the recurrent state with which it starts, -1 = nothing.
        snapshot_at: tokens before the last snapshot that it started from or left behind.
        snapshot_cuts: ends of blocks at which its prompt is cut, to leave one behind.
        unnamed: (tokens, slot) of snapshots that it left where the last token was not yet known.
        last_written: number of the newest snapshot amid its own output.
        n_cached: prompt tokens found in the prefix cache when first admitted.
        n_preempted: how often the sequence lost its memory and was recomputed.
    """

    request: Request
    index: int
    tokens: list[int]
    n_prompt: int
    n_virtual: int = 0
    n_computed: int = 0
    n_pending: int = 0
    blocks: list[int] = field(default_factory=list)
    row: int = -1
    adapter_slot: int = 0
    adapter_version: int = 0
    position_offset: int = 0
    needs_host_token: bool = False
    namespace: tuple[tuple[object, ...], ...] = ()
    numbers: tuple[int, ...] = ()
    packing: Packing | None = None
    shareable: int | None = None
    changes: BlockChanges | None = None
    private_from: int | None = None
    recomputed_from: int | None = None
    onset: Onset | None = None
    first_layer: int = 0
    last_layer: int | None = None
    limit: int = 0
    rank: tuple[int, float, int] = (0, 0.0, 0)
    n_indexed: int = 0
    prefix_parent: object = None
    snapshot: int = -1
    snapshot_at: int = 0
    snapshot_cuts: tuple[int, ...] = ()
    unnamed: list[tuple[int, int]] = field(default_factory=list)
    last_written: object = None
    status: Status = Status.WAITING
    n_cached: int = 0
    n_preempted: int = 0

    @property
    def n_tokens(self) -> int:
        """Known and pending tokens."""
        return len(self.tokens) + self.n_pending

    @property
    def is_partial(self) -> bool:
        """Whether its rows go through some of the layers only."""
        return self.first_layer > 0 or self.last_layer is not None


@dataclass(frozen=True, slots=True)
class VirtualRows:
    """Rows [start, stop) of a batch are virtual tokens ``first``, ``first + 1``, ... of the
    adapter in ``slot``."""

    start: int
    stop: int
    first: int
    slot: int = 0


@dataclass(slots=True)
class Span:
    """Tokens [start, stop) of one sequence, run in one iteration."""

    seq: Sequence
    start: int
    stop: int
    purpose: Purpose
    samples: bool  # whether a token is drawn after the last row
    part: Part | None = None  # of a packed sequence: the text to which all its tokens belong

    @property
    def first(self) -> int:
        """``start``, counted from the beginning of the span's text."""
        return self.start if self.part is None else self.start - self.part.begin


@dataclass(slots=True)
class BackwardUnit:
    """A piece of the backward pass of a fine-tuning sequence: rows [start, stop) through layers
    [first_layer, last_layer), from the last to the first."""

    job: str
    start: int
    stop: int
    first_layer: int
    last_layer: int


@dataclass(slots=True)
class Plan:
    """Everything one iteration does.

    Spans of one token come first, then longer ones, training windows, and last those that go
    through some of the layers only: a flat batch of their own, run after the other.

    Attributes:
        n_partial: how many of the last spans go through some of the layers only.
        copied: what is copied from block to block before anything runs.
        backward: pieces of fine-tuning backward, run in this order after the flat batch.
        admitted: sequences that start, or start again after a preemption, with this plan.
        grown: (sequence, index of its first new block) for every sequence that got blocks.
        preempted: sequences that lost their memory to make room; one may be admitted again with
            the same plan, where it shares most of what it needs.
        held: training sequences that got memory with this plan: their micro-step begins, anew if
            it was under way.
        reclaimed: training sequences whose memory inference took back.
        restored: (from, to) slots of recurrent states copied before the flat batch.
        saved: (from, to) slots of those copied after it.
        closing: jobs whose optimizer step is ended before the flat batch.
    """

    spans: list[Span]
    backward: list[BackwardUnit] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    grown: list[tuple[Sequence, int]] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    held: list[Sequence] = field(default_factory=list)
    reclaimed: list[Sequence] = field(default_factory=list)
    restored: list[tuple[int, int]] = field(default_factory=list)
    saved: list[tuple[int, int]] = field(default_factory=list)
    closing: list[str] = field(default_factory=list)
    copied: list[BlockCopy] = field(default_factory=list)
    n_tokens: int = 0
    n_decode: int = 0  # leading spans of one token
    n_partial: int = 0

    @property
    def whole_spans(self) -> list[Span]:
        """Spans that go through all layers."""
        return self.spans[: len(self.spans) - self.n_partial]

    @property
    def partial_spans(self) -> list[Span]:
        """Spans that go through some of the layers."""
        return self.spans[len(self.spans) - self.n_partial :]


@dataclass(slots=True)
class StepResult:
    """What came out of one plan; dictionaries are by span index and hold what was asked for.

    Attributes:
        tokens: one a span; -1 where the span does not sample.
        logprobs: of the drawn token.
        scored: of the prompt's tokens, in order, as far as the span's rows predict them.
        embeddings: pooled final states, of spans that complete their prompt.
        seconds: from the launch until the result was on the host.
        device_seconds: that the device took; None where the host computes itself.
    """

    plan: Plan
    tokens: list[int]
    logprobs: dict[int, TokenLogprob] = field(default_factory=dict)
    scored: dict[int, list[TokenLogprob]] = field(default_factory=dict)
    embeddings: dict[int, list[float]] = field(default_factory=dict)
    seconds: float = 0.0
    device_seconds: float | None = None
