"""The demo's load: what is asked and when, and asking it through one LM."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, Any

from invivo.demo.passages import passages
from invivo.errors import InvivoError
from invivo.timing import Timing, time_stream

if TYPE_CHECKING:
    from invivo.lm import LM

ROUND = 30.0  # seconds after which the same requests come again
CONCURRENCY = 16  # requests under way at most; later ones wait for a place
EXCERPT = 1200  # characters of a passage that a request reads
QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue? Answer in two sentences.",
    "Name three animals that live in the sea.",
    "How do I boil an egg?",
    "What does a librarian do?",
    "Write one sentence about the moon.",
    "What is the difference between a lake and a river?",
    "Give me a short tip for learning a language.",
)
CARD = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 40},
        "author": {"type": "string", "maxLength": 40},
        "is_fiction": {"type": "boolean"},
        "pages": {"type": "integer", "minimum": 1, "maximum": 999},
    },
    "required": ["title", "author", "is_fiction", "pages"],
    "additionalProperties": False,
}
ADAPTERS = ("random-a", "random-b")


@dataclass(slots=True)
class Task:
    """One request of the load.

    Attributes:
        purpose: the row of the table that it counts for.
        question: what a reader is shown.
        kind: stream (chat, streamed), answer (chat, whole), score or embed.
        text: the user's message, or the text to score or embed.
        sampling: arguments of the LM call.
        at: seconds after the start of a round at which it is sent.
        salt: keeps the prefix cache of one round from another.
    """

    purpose: str
    question: str
    kind: str
    text: str
    sampling: dict[str, Any] = field(default_factory=dict)
    at: float = 0.0
    salt: str = ""


@dataclass(slots=True)
class Done:
    """A finished task: its timing and what came back, or the error."""

    task: Task
    timing: Timing
    shown: str = ""
    error: str | None = None


def tasks() -> list[Task]:
    """One round, in the order in which it is sent: every purpose spread evenly over it."""
    texts = {name: text[:EXCERPT] for name, text in passages().items()}
    greedy: dict[str, Any] = {"temperature": 0.0}
    load: list[Task] = []
    for i, question in enumerate(QUESTIONS[:6]):
        sampled = {"temperature": 0.2, "top_p": 0.9, "seed": i, "max_tokens": 24}
        load.append(Task("short, streamed", question, "stream", question, sampled))
    for name in ("alice", "holmes"):
        ask = f"{texts[name]}\nSummarise the text above in two sentences."
        short = {**greedy, "max_tokens": 48}
        load.append(Task("summaries", f"Summarise {name}.txt", "stream", ask, short))
        again = f"{texts[name]}\nWho or what is this text mainly about?"
        about = f"Who or what is {name}.txt about?"
        short = {**greedy, "max_tokens": 32}
        load.append(Task("second question", about, "stream", again, short))
    for question in QUESTIONS[6:8]:
        whole = {**greedy, "max_tokens": 32, "repetition_penalty": 1.1}
        load.append(Task("short, whole", question, "answer", question, whole))
        for adapter in ADAPTERS:
            own = {**whole, "adapter": adapter}
            load.append(Task(f"adapter {adapter}", question, "stream", question, own))
    card = "Fill in a library card for the book 'Walden'. Answer in JSON."
    form = {**greedy, "max_tokens": 72, "json_schema": CARD}
    load.append(Task("structured", "Library card of Walden", "answer", card, form))
    fish = {**greedy, "max_tokens": 8, "choice": ["yes", "no"]}
    load.append(
        Task("structured", "Is a whale a fish? (yes or no)", "answer", "Is a whale a fish?", fish)
    )
    for name in ("franklin", "walden"):
        load.append(Task("scoring", f"How probable is {name}.txt?", "score", texts[name]))
        load.append(Task("embedding", f"Where does {name}.txt lie?", "embed", texts[name][:400]))
    return sorted(_spread(load), key=lambda task: task.at)


def _spread(load: list[Task]) -> Iterator[Task]:
    """Gives every task its time: those of one purpose at even distances, purposes side by side."""
    purposes = list(dict.fromkeys(task.purpose for task in load))
    for i, purpose in enumerate(purposes):
        same = [task for task in load if task.purpose == purpose]
        for k, task in enumerate(same):
            share = (k + (i + 0.5) / len(purposes)) / len(same)
            yield replace(task, at=ROUND * share)


def rounds(load: list[Task], first: int = 0, n: int | None = None) -> Iterator[tuple[float, Task]]:
    """(seconds from now, task) of ``n`` rounds (None = without end); ``first`` salts the first."""
    for r in count() if n is None else range(n):
        for task in load:
            yield r * ROUND + task.at, replace(task, salt=f"round {first + r}")


async def run_load(
    lm: LM,
    arrivals: Iterator[tuple[float, Task]],
    *,
    going_on: Callable[[], bool] = lambda: True,
    finished: Callable[[Done], None] = lambda done: None,
) -> list[Done]:
    """Send each task at its time until there are no more or ``going_on`` says no.

    ``finished`` hears of each end. At most ``CONCURRENCY`` requests are under way.
    """
    gate = asyncio.Semaphore(CONCURRENCY)
    began = time.perf_counter()

    async def one(task: Task) -> Done:
        try:
            done = await perform(lm, task)
        finally:
            gate.release()
        finished(done)
        return done

    sent: list[asyncio.Task[Done]] = []
    for at, task in arrivals:
        while going_on() and (wait := began + at - time.perf_counter()) > 0:
            await asyncio.sleep(min(wait, 0.2))
        if not going_on():
            break
        await gate.acquire()
        sent.append(asyncio.create_task(one(task)))
    return list(await asyncio.gather(*sent))


async def perform(lm: LM, task: Task) -> Done:
    """Carry out one task; a typed error is part of its result."""
    timing = Timing(started=time.perf_counter())
    messages = [{"role": "user", "content": task.text}]
    try:
        if task.kind == "stream":
            timing = await time_stream(lm.astream_chat(messages, salt=task.salt, **task.sampling))
            return Done(task, timing, timing.text)
        if task.kind == "answer":
            answer = await lm.achat(messages, salt=task.salt, **task.sampling)
            timing.tokens, shown = answer.completion_tokens, answer.text
        elif task.kind == "score":
            score = await lm.ascore(task.text, salt=task.salt)
            shown = f"perplexity {score.perplexity:.2f} over {len(score.tokens)} tokens"
        else:
            vector = await lm.aembed(task.text, salt=task.salt)
            shown = f"a vector of {len(vector)} numbers"
    except InvivoError as error:
        timing.ended = time.perf_counter()
        return Done(task, timing, error=str(error))
    timing.ended = time.perf_counter()
    return Done(task, timing, shown)
