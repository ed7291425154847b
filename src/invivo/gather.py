"""Waiting for many engine requests at once: fed in gently, cancelled together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from invivo.edits.results import ProgramOutput
from invivo.engine.engine import Engine
from invivo.engine.types import Output, Request, TokenLogprob
from invivo.errors import Overloaded, Unavailable


@dataclass(slots=True)
class Strand:
    """Everything that came out of one continuation."""

    text: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass(slots=True)
class Gathered:
    """Everything that came out of one request."""

    request: Request
    strands: dict[int, Strand] = field(default_factory=dict)  # by continuation
    prompt_logprobs: list[TokenLogprob] | None = None
    embedding: list[float] | None = None
    program: ProgramOutput | None = None
    cached_tokens: int = 0

    def add(self, output: Output) -> None:
        strand = self.strands.setdefault(output.index, Strand())
        strand.text.append(output.text)
        strand.tokens += output.tokens
        strand.logprobs += output.logprobs or ()
        strand.finish_reason = output.finish_reason or strand.finish_reason
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        if output.embedding is not None:
            self.embedding = output.embedding
        if output.program is not None:
            self.program = output.program
        if output.index == 0:
            self.cached_tokens = output.cached_tokens


def failure_of(output: Output) -> Exception | None:
    """The exception that an output stands for, if any."""
    if output.error is not None:
        return output.error
    if output.finish_reason == "cancelled":
        return Unavailable("the request was cancelled", remedy="The engine may be closing")
    return None


class Gathering:
    """Runs requests through an engine and gathers their outputs.

    At most ``max_running`` requests are in the engine at a time, so that any number may be given
    without filling its queue. The first failure cancels the rest.

    Attributes:
        future: the results in the order of the requests, or the first error.
    """

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[Request],
        on_done: Callable[[], object] | None = None,
    ) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._results = [Gathered(r) for r in requests]
        self._todo = list(reversed(self._results))
        self._inside: dict[str, Gathered] = {}
        self._on_done = on_done
        self._ended = False
        self.future: Future[list[Gathered]] = Future()
        self.future.set_running_or_notify_cancel()

    def start(self) -> None:
        """Submit what fits; errors of the parameters are raised here."""
        try:
            self._feed()
        except BaseException:
            self.cancel()
            raise
        self._settle()

    def cancel(self) -> None:
        """Abort everything; the future never completes after this unless it already has."""
        with self._lock:
            self._ended = True
            self._todo.clear()
            inside = list(self._inside)
        for request_id in inside:
            self._engine.abort(request_id)

    def _feed(self) -> None:
        while True:
            with self._lock:
                if not self._todo or len(self._inside) >= self._engine.scheduler.limits.max_running:
                    return
                gathered = self._todo.pop()
                self._inside[gathered.request.id] = gathered
            try:
                self._engine.submit(gathered.request, self._on_output)
            except BaseException as error:
                with self._lock:
                    del self._inside[gathered.request.id]
                    # Others have filled the queue: go on when one of ours has ended.
                    again = isinstance(error, Overloaded) and bool(self._inside)
                    if again:
                        self._todo.append(gathered)
                if again:
                    return
                raise
            with self._lock:
                gone = self._ended
            if gone:  # cancelled while it was submitted, when there was nothing to abort yet
                self._engine.abort(gathered.request.id)

    def _on_output(self, output: Output) -> None:
        """Called from the engine's thread."""
        gathered = self._inside.get(output.request_id)
        if gathered is None:
            return
        error = failure_of(output)
        if error is None:
            gathered.add(output)
        if output.final:
            with self._lock:
                del self._inside[output.request_id]
        if error is not None:
            self._fail(error)
        elif output.final:
            if self._on_done is not None:
                self._on_done()
            try:
                self._feed()
            except Exception as failure:  # nobody else would tell the one who waits
                self._fail(failure)
            self._settle()

    def _fail(self, error: Exception) -> None:
        with self._lock:
            first, self._ended = not self._ended, True
        if first:
            self.cancel()
            self.future.set_exception(error)

    def _settle(self) -> None:
        with self._lock:
            done = not self._todo and not self._inside and not self._ended
            self._ended = self._ended or done
        if done:
            self.future.set_result(self._results)
