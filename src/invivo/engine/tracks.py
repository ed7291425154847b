"""What the engine keeps of a request and of its sequences, beside the scheduler's view.

A *job* is one request on its way through the engine; a *track* is one of its sequences: how it
samples, which text has settled, when it ends.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from invivo.engine.adapters import Adapter
from invivo.engine.detokenize import StopText, TextStream
from invivo.engine.grammar import Matcher
from invivo.engine.programs import CarriedProgram
from invivo.engine.sampler import RowState, row_state
from invivo.engine.stats import RequestRecord
from invivo.engine.types import FinishReason, Output, Request, TokenLogprob
from invivo.engine.types import Sequence as Running
from invivo.errors import InvalidRequest

OnOutput = Callable[[Output], None]


@dataclass(slots=True, eq=False)
class Job:
    """One request on its way through the engine.

    Attributes:
        adapters: the versions it holds, by name; ``placed``: whether they also have slots of the
            tables. All but one are those of other runs of its program.
        unfinished: sequences that have not ended.
        first_token: time.monotonic() of its first output, 0 before.
        program: what it carries; its runs are sequences beside the tracks' (of a request that
            writes, the first track's is the run "main").
    """

    request: Request
    on_output: OnOutput
    adapters: Mapping[str, Adapter]
    record: RequestRecord
    tracks: list[Track]
    unfinished: int
    first_token: float = 0.0
    placed: bool = False
    program: CarriedProgram | None = None

    def slot_of(self, adapter: str | None) -> tuple[int, int]:
        """Slot and version of an adapter that it holds and that is placed; 0, 0 of none."""
        if adapter is None:
            return 0, 0
        held = self.adapters[adapter]
        return held.slot, held.version


@dataclass(slots=True, eq=False)
class Track:
    """One sequence of a job.

    Attributes:
        text: None where no text is wanted.
        scored: log-probabilities of prompt tokens, from token ``scored_from`` of the sequence on,
            as far as known.
        prompt_sent: whether the log-probabilities of a generation's prompt need not be sent (any
            more).
        last_token: time.monotonic() of the last token, 0 before the first.
        ended: its last output has been sent.
    """

    job: Job
    seq: Running
    state: RowState
    text: TextStream | None
    stops: StopText
    scored: list[TokenLogprob | None]
    scored_from: int
    prompt_sent: bool
    last_token: float = 0.0
    ended: bool = False

    def advance(self, token: int, output: Output, eos_ids: frozenset[int]) -> FinishReason | None:
        """Settle text into ``output`` after ``token``, the last of ``seq.tokens``.

        Returns:
            Why the sequence ends here, None when it goes on.

        Raises:
            InvalidRequest: the grammar has become too complex to follow.
        """
        seq, params, matcher = self.seq, self.state.params, self.state.matcher
        if matcher is not None and not matcher.accept(token):
            raise InvalidRequest(
                f"cannot be followed any further: {matcher.error}",
                field=params.grammar.kind if params.grammar else None,
                remedy="Simplify it",
            )
        if (token in eos_ids and not params.ignore_eos) or token in params.stop_token_ids:
            output.text = self.stops.flush()
            output.stop_match = token
            return "stop"
        piece = self.text.push(token) if self.text is not None else ""
        armed = len(seq.tokens) - seq.n_prompt >= params.min_tokens
        output.text, match = self.stops.push(piece, armed=armed)
        if match is not None:
            output.stop_match = match
            return "stop"
        complete = matcher is not None and matcher.complete
        if complete or len(seq.tokens) >= seq.limit:
            output.text += self.stops.flush()
            return "stop" if complete else "length"
        return None


def make_job(
    request: Request,
    on_output: OnOutput,
    *,
    adapters: Mapping[str, Adapter],
    matchers: Sequence[Matcher | None],
    tokenizer: Tokenizer | None,
    eos_ids: frozenset[int],
    position_offset: int,
) -> Job:
    """The job of a request with one track for each of ``matchers``."""
    params = request.params
    n_virtual = 0 if request.adapter is None else adapters[request.adapter].n_virtual
    record = RequestRecord(
        id=request.id,
        kind=request.kind,
        adapter=request.adapter,
        started=time.time(),
        prompt_tokens=len(request.tokens),
    )
    job = Job(request, on_output, adapters, record, [], request.n)
    seed = random.SystemRandom().getrandbits(63) if params.seed is None else params.seed
    for index, matcher in enumerate(matchers):
        scored_from, n_scored = _scoring(request, index)
        state = row_state(params, seed=seed, index=index, eos_ids=tuple(eos_ids), matcher=matcher)
        seq = Running(
            request=request,
            index=index,
            tokens=[0] * n_virtual + list(request.tokens),
            n_prompt=n_virtual + len(request.tokens),
            n_virtual=n_virtual,
            position_offset=position_offset,
            needs_host_token=state.needs_host_token,
        )
        if state.counts is not None:
            state.counts.n_read = n_virtual  # placeholders were never said
            state.counts.update(seq.tokens, seq.n_prompt)
        text = None
        if tokenizer is not None and request.kind == "generate":
            text = TextStream(tokenizer, request.tokens)
        job.tracks.append(
            Track(
                job=job,
                seq=seq,
                state=state,
                text=text,
                stops=StopText(params.stop),
                scored=[None] * n_scored,
                scored_from=scored_from + n_virtual,
                prompt_sent=index > 0 or params.prompt_logprobs is None,
            )
        )
    return job


def _scoring(request: Request, index: int) -> tuple[int, int]:
    """First scored prompt token of continuation ``index``, and how many there are."""
    n = len(request.tokens)
    if request.kind == "score":
        return request.score_from, n - request.score_from
    if request.kind == "generate" and request.params.prompt_logprobs is not None and index == 0:
        return 1, n - 1
    return 1, 0
