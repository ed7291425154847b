"""One piece of work from its admission to its account: a place, a budget, the tokens it took."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from starlette.concurrency import run_in_threadpool

from invivo.errors import InvalidRequest, Overloaded, TooLarge, Unavailable

if TYPE_CHECKING:
    from invivo.server.auth import Principal
    from invivo.server.services import Services


class Gate:
    """Counts the requests in work; used on the event loop only."""

    def __init__(self, places: int) -> None:
        self.places = places
        self.taken = 0

    def enter(self) -> None:
        """Takes a place. Raises Overloaded when there is none."""
        if self.taken >= self.places:
            raise Overloaded(
                "too many requests at once",
                given=self.taken,
                remedy="Wait and try again, or raise the server's concurrency limit",
            )
        self.taken += 1

    def leave(self) -> None:
        self.taken -= 1


class Ticket:
    """The place and the budget of one request."""

    def __init__(self, services: Services, principal: Principal) -> None:
        self._services = services
        self._principal = principal
        self._reserved = 0
        self._prompt_tokens = 0
        self._output_tokens = 0

    async def prompt(
        self, sizes: list[int], *, max_tokens: int | None = 0, n: int = 1, fit: bool | None = False
    ) -> int | None:
        """Checks the prompts' sizes in tokens and reserves the budget.

        Args:
            sizes: tokens of each prompt.
            max_tokens: asked for each of ``n`` continuations of each prompt; None = no limit.
            fit: ``max_tokens`` may be cut to what the context holds.

        Returns:
            The ``max_tokens`` to run with: as asked, or what the server's limit and the budget
            allow.

        Raises:
            TooLarge: a prompt is longer than the server allows.
            InvalidRequest: too many sequences.
            Forbidden: the budget does not cover it.
        """
        settings = self._services.settings
        sequences = len(sizes) * n
        if sequences > settings.max_sequences:
            raise InvalidRequest(
                f"prompts times n may be at most {settings.max_sequences}",
                field="n",
                given=sequences,
                remedy="Split the request",
            )
        limit = settings.max_prompt_tokens
        if limit is not None and max(sizes) > limit:
            raise TooLarge(
                f"has more tokens than this server takes ({limit})",
                field="prompt",
                given=max(sizes),
                remedy="Shorten it",
            )
        most = settings.max_output_tokens
        if most is not None:
            max_tokens = most if max_tokens is None else min(max_tokens, most)
        room = max(self._services.info.max_model_len - max(sizes), 1)
        if fit and max_tokens is not None:
            max_tokens = min(max_tokens, room)
        budget = self._principal.budget
        if self._services.ledger is None or budget is None:
            return max_tokens
        prompt = sum(sizes)
        each = room if max_tokens is None else min(max_tokens, room)
        least = prompt + min(each, 1) * sequences
        await self._reserve(budget, least, prompt + each * sequences)
        return (self._reserved - prompt) // sequences

    async def more(self, tokens: int) -> None:
        """Reserves so many prompt tokens more: those of a program's other passes.

        Raises:
            Forbidden: the budget does not cover them.
        """
        budget = self._principal.budget
        if self._services.ledger is not None and budget is not None and tokens:
            await self._reserve(budget, tokens, tokens)
        self._prompt_tokens += tokens

    async def _reserve(self, budget: int, least: int, wanted: int) -> None:
        """Raises Forbidden. What is granted to a request that was cancelled meanwhile goes back."""
        ledger, key_id = self._services.ledger, self._principal.key_id
        assert ledger is not None
        assert key_id is not None
        asked = asyncio.ensure_future(
            run_in_threadpool(ledger.reserve, key_id, budget, least, wanted)
        )

        def give_back(done: asyncio.Future[int]) -> None:
            if not done.cancelled() and done.exception() is None:
                ledger.settle(key_id, done.result(), 0)

        try:
            granted = await asyncio.shield(asked)
        except asyncio.CancelledError:
            asked.add_done_callback(give_back)
            raise
        self._reserved += granted

    def ran(self, prompt_tokens: int) -> None:
        """The prompts were taken into the engine."""
        self._prompt_tokens += prompt_tokens

    def wrote(self, output_tokens: int) -> None:
        """So many more tokens were generated."""
        self._output_tokens += output_tokens

    def settle(self) -> None:
        ledger, key_id = self._services.ledger, self._principal.key_id
        if ledger is not None and key_id is not None:
            ledger.settle(key_id, self._reserved, self._prompt_tokens + self._output_tokens)


@asynccontextmanager
async def admit(services: Services, principal: Principal) -> AsyncGenerator[Ticket, None]:
    """Holds a place while the work runs and settles the account however it ends.

    Raises:
        Overloaded: no place is free.
        Unavailable: the server is stopping.
    """
    if services.draining:
        raise Unavailable("the server is stopping", remedy="Try again in a moment")
    services.gate.enter()
    ticket = Ticket(services, principal)
    try:
        yield ticket
    finally:
        services.gate.leave()
        ticket.settle()
