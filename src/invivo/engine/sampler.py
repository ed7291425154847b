"""Drawing tokens from logits, every row with its own parameters.

Order of operations on a row of logits: repetition, presence and frequency penalties and
``logit_bias`` (and, before ``min_tokens``, no end tokens) -> grammar mask -> temperature ->
top-k -> top-p -> min-p -> draw. Temperature 0 takes the best token after the mask.

A draw depends only on (seed, output position): one uniform number a row comes from a
counter-based hash on the host and is put through the inverse of the filtered distribution, in
vocabulary order. So neighbours in the batch, chunking and preemption never change it. What no
row asks for is not computed.

Log-probabilities are those of the model's own distribution, before everything above.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from invivo.engine.grammar import Matcher
from invivo.engine.transfer import index_on, to_device
from invivo.engine.types import SamplingParams, TokenLogprob

GREEDY_BELOW = 1e-5  # temperatures under this are greedy


@dataclass(slots=True)
class TokenCounts:
    """Which tokens a sequence has seen, and how often they are in its output.

    Attributes:
        ids, counts: parallel arrays, of which the first ``n`` entries are in use.
        n_read: tokens of the sequence already counted.
    """

    ids: NDArray[np.int64] = field(default_factory=lambda: np.zeros(64, np.int64))
    counts: NDArray[np.float32] = field(default_factory=lambda: np.zeros(64, np.float32))
    n: int = 0
    n_read: int = 0
    place: dict[int, int] = field(default_factory=dict)

    def update(self, tokens: list[int], n_prompt: int) -> None:
        """Count what is new in ``tokens``."""
        for i in range(self.n_read, len(tokens)):
            at = self.place.get(tokens[i])
            if at is None:
                if self.n == len(self.ids):
                    self.ids = np.concatenate([self.ids, np.zeros_like(self.ids)])
                    self.counts = np.concatenate([self.counts, np.zeros_like(self.counts)])
                at = self.place[tokens[i]] = self.n
                self.ids[at] = tokens[i]
                self.n += 1
            if i >= n_prompt:
                self.counts[at] += 1
        self.n_read = len(tokens)


@dataclass(slots=True, eq=False)
class RowState:
    """What one sequence brings to every draw.

    Attributes:
        seed: 64 bits; already differs between the continuations of one request.
        counts: present when a penalty is set.
        matcher: present when a grammar constrains the output.
        end_ids: tokens that may not be drawn before ``min_tokens``.
        numbers: temperature, top_k, top_p, min_p.
    """

    params: SamplingParams
    seed: int
    counts: TokenCounts | None
    matcher: Matcher | None
    end_ids: NDArray[np.int64]
    numbers: tuple[float, float, float, float]

    @property
    def needs_host_token(self) -> bool:
        """Whether the next draw needs the value of the one before on the host."""
        return self.counts is not None or self.matcher is not None

    @property
    def plain_greedy(self) -> bool:
        """Whether a draw is the argmax of the raw logits and nothing else is wanted."""
        p = self.params
        return (
            p.temperature < GREEDY_BELOW
            and p.logprobs is None
            and not p.logit_bias
            and not p.min_tokens
            and not self.needs_host_token
        )


def row_state(
    params: SamplingParams,
    *,
    seed: int,
    index: int,
    eos_ids: Sequence[int],
    matcher: Matcher | None,
) -> RowState:
    """State of continuation ``index`` of a request with this ``seed``."""
    penalised = (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )
    ends = [*params.stop_token_ids, *(() if params.ignore_eos else eos_ids)]
    return RowState(
        params=params,
        seed=derive_seed(seed, index),
        counts=TokenCounts() if penalised else None,
        matcher=matcher,
        end_ids=np.array(ends if params.min_tokens > 0 else [], dtype=np.int64),
        numbers=(params.temperature, float(params.top_k), params.top_p, params.min_p),
    )


# --- randomness -----------------------------------------------------------------------------
def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finaliser of SplitMix64 (Steele, Lea and Flood, 2014): a bijection that scatters bits."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def derive_seed(seed: int, index: int) -> int:
    """Seed of continuation ``index``; index 0 keeps the seed itself."""
    seed &= 2**64 - 1
    if index == 0:
        return seed
    both = np.array([seed], np.uint64) + np.array([index], np.uint64) * _GOLDEN
    return int(_mix(both)[0])


def uniforms(seeds: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float32]:
    """One number in [0, 1) a row, a function of (seed, position) only; both are [R]."""
    counter = (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN
    bits = _mix(_mix(seeds) + counter)  # step ``position`` of the seed's own stream
    return ((bits >> np.uint64(40)).astype(np.float32)) * np.float32(2.0**-24)


# --- log-probabilities ----------------------------------------------------------------------
@dataclass(slots=True)
class LogprobRows:
    """Log-probabilities of one chosen token a row, on the device or on the host.

    Attributes:
        chosen: [R] float, rank: [R] int64 (1 = most probable).
        top_values, top_ids: [R, k], best first; k may be 0.
    """

    chosen: torch.Tensor
    rank: torch.Tensor
    top_values: torch.Tensor
    top_ids: torch.Tensor

    def to_host(self, tokens: Sequence[int], tops: Sequence[int]) -> list[TokenLogprob]:
        """As records, with ``tops[i]`` alternatives for row ``i``; waits for the device."""
        ranks = self.rank.tolist()
        chosen = self.chosen.tolist()
        values, ids = self.top_values.tolist(), self.top_ids.tolist()
        return [
            TokenLogprob(
                token=token,
                logprob=chosen[i],
                rank=ranks[i],
                top=tuple(zip(ids[i][:top], values[i][:top], strict=True)),
            )
            for i, (token, top) in enumerate(zip(tokens, tops, strict=True))
        ]


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor, top: int) -> LogprobRows:
    """Log-probability, rank and ``top`` best alternatives of given tokens.

    Args:
        logits: [R, V] as the model gave them.
        tokens: [R] int64.
    """
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    norm = torch.logsumexp(logits, dim=-1, keepdim=True)
    mine = logits.gather(1, tokens[:, None])
    rank = (logits > mine).sum(dim=-1) + 1
    values, ids = torch.topk(logits, min(top, logits.shape[1]), dim=-1)
    return LogprobRows((mine - norm)[:, 0], rank, values - norm, ids)


# --- drawing --------------------------------------------------------------------------------
@dataclass(slots=True)
class Draw:
    """Tokens of one step, [R] int64 on the device, and log-probabilities of ``logprob_rows``."""

    tokens: torch.Tensor
    logprob_rows: list[int]
    logprobs: LogprobRows | None


def best(logits: torch.Tensor) -> Draw:
    """:func:`sample` where every row is :attr:`RowState.plain_greedy`."""
    return Draw(torch.argmax(logits, dim=-1), [], None)


def sample(logits: torch.Tensor, rows: Sequence[RowState], positions: Sequence[int]) -> Draw:
    """Draw one token a row.

    Args:
        logits: [R, V]; may be changed in place.
        rows: R states; counts and matchers must be up to date.
        positions: output position of each draw (0 = first token after the prompt).
    """
    if all(row.plain_greedy for row in rows):
        return best(logits)
    if logits.dtype.itemsize < 4:
        logits = logits.float()
    wanting = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    raw = None
    if wanting:
        raw = logits[index_on(wanting, logits.device)]
    _adjust(logits, rows, positions)
    _mask(logits, rows)
    tokens = torch.argmax(logits, dim=-1)
    drawn = [i for i, row in enumerate(rows) if row.params.temperature >= GREEDY_BELOW]
    if len(drawn) == len(rows):
        tokens = _draw(logits, rows, positions)
    elif drawn:
        where = index_on(drawn, logits.device)
        some = _draw(logits[where], [rows[i] for i in drawn], [positions[i] for i in drawn])
        tokens[where] = some
    if raw is None:
        return Draw(tokens, [], None)
    top = max(rows[i].params.logprobs or 0 for i in wanting)
    return Draw(tokens, wanting, token_logprobs(raw, tokens[index_on(wanting, logits.device)], top))


def _adjust(logits: torch.Tensor, rows: Sequence[RowState], positions: Sequence[int]) -> None:
    """Penalties, bias and the tokens forbidden before ``min_tokens``, in place.

    Works on the listed (row, token) entries only, never on a whole row.
    """
    v, device = logits.shape[1], logits.device
    flat = logits.view(-1)
    for i, row in enumerate(rows):
        p = row.params
        if row.counts is not None:
            counts = row.counts
            ids = to_device(counts.ids[: counts.n], device) + i * v
            seen = to_device(counts.counts[: counts.n], device)
            value = flat[ids]
            r = p.repetition_penalty
            value = torch.where(value > 0, value / r, value * r)
            value -= p.frequency_penalty * seen + p.presence_penalty * (seen > 0)
            flat[ids] = value
        if p.logit_bias:
            bias = to_device(np.array([b for _, b in p.logit_bias]), device)
            flat.index_add_(
                0, index_on([t + i * v for t, _ in p.logit_bias], device), bias.to(flat.dtype)
            )
        # A grammar decides itself when the end may come: see _mask.
        if positions[i] < p.min_tokens and row.matcher is None and len(row.end_ids):
            flat[to_device(row.end_ids, device) + i * v] = -torch.inf


def _mask(logits: torch.Tensor, rows: Sequence[RowState]) -> None:
    """Set every token that a row's grammar does not admit to -inf, in place."""
    masked = [i for i, row in enumerate(rows) if row.matcher is not None]
    if not masked:
        return
    v = logits.shape[1]
    words = np.zeros((len(masked), (v + 31) // 32), np.int32)
    for at, i in enumerate(masked):
        matcher = rows[i].matcher
        assert matcher is not None
        matcher.fill_mask(words[at])
    bits = to_device(words, logits.device)
    shifts = torch.arange(32, dtype=torch.int32, device=logits.device)
    refused = ((bits[:, :, None] >> shifts) & 1 == 0).view(len(masked), -1)[:, :v]
    where = index_on(masked, logits.device)
    logits[where] = logits[where].masked_fill(refused, -torch.inf)


def _draw(logits: torch.Tensor, rows: Sequence[RowState], positions: Sequence[int]) -> torch.Tensor:
    """Temperature, filters and the inverse of the cumulative distribution; [R] tokens."""
    numbers = np.array([row.numbers for row in rows], dtype=np.float32)
    u = uniforms(
        np.array([row.seed for row in rows], dtype=np.uint64), np.array(positions, dtype=np.int64)
    )
    both = to_device(np.column_stack([numbers, u]), logits.device)
    logits = logits / both[:, :1]
    _keep_top_k(logits, numbers[:, 1])
    probs = torch.softmax(logits, dim=-1, dtype=torch.float32)
    _keep_top_p(probs, numbers[:, 2], both[:, 2])
    _keep_min_p(probs, numbers[:, 3], both[:, 3])
    cumulative = probs.cumsum(dim=-1)
    target = both[:, 4:5] * cumulative[:, -1:]
    # The first entry above the target has weight of its own, so a filtered token cannot be hit.
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_(max=probs.shape[1] - 1)


def _keep_top_k(logits: torch.Tensor, top_k: NDArray[np.float32]) -> None:
    """Tokens under the k-th best become -inf, in place; equals of the k-th stay."""
    v = logits.shape[1]
    some = np.flatnonzero((top_k > 0) & (top_k < v))
    if not len(some):
        return
    where = to_device(some, logits.device)
    ks = to_device(top_k[some].astype(np.int64), logits.device)
    rows = logits[where]
    best = torch.topk(rows, int(top_k[some].max()), dim=-1).values
    least = best.gather(1, ks[:, None] - 1)
    logits[where] = rows.masked_fill(rows < least, -torch.inf)


def _keep_top_p(probs: torch.Tensor, top_p: NDArray[np.float32], limit: torch.Tensor) -> None:
    """Zero all but the smallest set of best tokens that weighs ``top_p``, in place."""
    some = np.flatnonzero(top_p < 1)
    if not len(some):
        return
    where = to_device(some, probs.device)
    rows, wanted = probs[where], limit[where][:, None]
    least = _least_sorting(rows, wanted) if probs.is_cpu else _least_bisecting(rows, wanted)
    probs[where] = torch.where(rows >= least, rows, 0.0)


def _least_sorting(rows: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Smallest probability in the set of best tokens that weighs ``wanted``; [R, V], [R, 1].

    Tokens under (1 - wanted) / V weigh less than 1 - wanted all together, so that only the few
    others are sorted.
    """
    least = torch.empty_like(wanted)
    shares = wanted[:, 0].tolist()
    for i, row in enumerate(rows.numpy()):
        heavy = np.sort(row[row >= (1 - shares[i]) / len(row)])[::-1]  # much faster than torch's
        if not len(heavy):  # a row that is not finite: whatever is drawn, the batch goes on
            least[i] = 0.0
            continue
        at = int(np.searchsorted(heavy.cumsum(dtype=np.float64), shares[i]))
        least[i] = float(heavy[min(at, len(heavy) - 1)])
    return least


def _least_bisecting(rows: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """:func:`_least_sorting` without data-dependent shapes, for a GPU.

    Bisection over the bit patterns of floats, which order positive numbers as their values do:
    exact after 30 halvings.
    """
    low = torch.zeros_like(wanted, dtype=torch.int32)
    high = rows.amax(dim=-1, keepdim=True).view(torch.int32)
    for _ in range(30):
        middle = low + (high - low + 1) // 2
        mass = torch.where(rows >= middle.view(torch.float32), rows, 0.0).sum(-1, keepdim=True)
        enough = mass >= wanted
        low = torch.where(enough, middle, low)
        high = torch.where(enough, high, middle - 1)
    return low.view(torch.float32)


def _keep_min_p(probs: torch.Tensor, min_p: NDArray[np.float32], share: torch.Tensor) -> None:
    """Zero tokens with less than ``min_p`` times the best one's probability, in place."""
    if not (min_p > 0).any():
        return
    least = probs.amax(dim=-1, keepdim=True) * share[:, None]
    probs.masked_fill_(probs < least, 0.0)
