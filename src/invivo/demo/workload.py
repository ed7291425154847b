"""The demo's load: what is asked, and asking it all at once through one LM."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from invivo.demo.passages import passages
from invivo.errors import InvivoError
from invivo.timing import Timing, time_stream

if TYPE_CHECKING:
    from invivo.lm import LM

QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue? Answer in two sentences.",
    "Name three animals that live in the sea.",
    "How do I boil an egg?",
    "What does a librarian do?",
    "Write one sentence about the moon.",
    "What is the difference between a lake and a river?",
    "Give me a short tip for learning a language.",
    "Who wrote Romeo and Juliet?",
    "What should I pack for a walk in the rain?",
    "Explain gravity to a child.",
    "Suggest a name for a small bakery.",
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
        after: purpose whose tasks must be done first, if any.
    """

    purpose: str
    question: str
    kind: str
    text: str
    sampling: dict[str, Any] = field(default_factory=dict)
    after: str | None = None


@dataclass(slots=True)
class Done:
    """A finished task: its timing and what came back, or the error."""

    task: Task
    timing: Timing
    shown: str = ""
    error: str | None = None


def tasks() -> list[Task]:
    """The whole load, in the order in which it is sent."""
    texts = passages()
    load: list[Task] = []
    greedy = {"temperature": 0.0}
    for i, question in enumerate(QUESTIONS):
        sampled = {"temperature": 0.2, "top_p": 0.9, "seed": i, "max_tokens": 48}
        load.append(Task("short, streamed", question, "stream", question, sampled))
    for name, text in texts.items():
        ask = f"{text}\nSummarise the text above in two sentences."
        load.append(
            Task(
                "summaries",
                f"Summarise {name}.txt",
                "stream",
                ask,
                {**greedy, "max_tokens": 64},
            )
        )
        again = f"{text}\nWho or what is this text mainly about?"
        load.append(
            Task(
                "second question",
                f"Who or what is {name}.txt about?",
                "stream",
                again,
                {**greedy, "max_tokens": 32},
                after="summaries",
            )
        )
    for question in QUESTIONS[:4]:
        whole = {**greedy, "max_tokens": 48, "repetition_penalty": 1.1}
        load.append(Task("short, whole", question, "answer", question, whole))
        for adapter in ADAPTERS:
            own = {**whole, "adapter": adapter}
            load.append(Task(f"adapter {adapter}", question, "stream", question, own))
    for title in ("Alice's Adventures in Wonderland", "Walden"):
        load.append(
            Task(
                "structured",
                f"Library card of {title}",
                "answer",
                f"Fill in a library card for the book '{title}'. Answer in JSON.",
                {**greedy, "max_tokens": 96, "json_schema": CARD},
            )
        )
    load.append(
        Task(
            "structured",
            "Is a whale a fish? (yes or no)",
            "answer",
            "Is a whale a fish?",
            {**greedy, "max_tokens": 8, "choice": ["yes", "no"]},
        )
    )
    for name, text in texts.items():
        load.append(Task("scoring", f"How probable is {name}.txt?", "score", text))
        load.append(Task("embedding", f"Where does {name}.txt lie?", "embed", text[:800]))
    return load


async def run_load(
    lm: LM, load: list[Task], concurrency: int, finished: Callable[[Done], None]
) -> list[Done]:
    """Send the load, ``concurrency`` requests at once; ``finished`` hears of each end."""
    gate = asyncio.Semaphore(concurrency)
    events = {task.purpose: asyncio.Event() for task in load}
    left = {name: sum(task.purpose == name for task in load) for name in events}

    async def one(task: Task) -> Done:
        if task.after is not None:
            await events[task.after].wait()
        async with gate:
            done = await perform(lm, task)
        left[task.purpose] -= 1
        if left[task.purpose] == 0:
            events[task.purpose].set()
        finished(done)
        return done

    return await asyncio.gather(*[one(task) for task in load])


async def perform(lm: LM, task: Task) -> Done:
    """Carry out one task; a typed error is part of its result."""
    timing = Timing(started=time.perf_counter())
    messages = [{"role": "user", "content": task.text}]
    try:
        if task.kind == "stream":
            timing = await time_stream(lm.astream_chat(messages, **task.sampling))
            return Done(task, timing, timing.text)
        if task.kind == "answer":
            answer = await lm.achat(messages, **task.sampling)
            timing.tokens, shown = answer.completion_tokens, answer.text
        elif task.kind == "score":
            score = await lm.ascore(task.text)
            shown = f"perplexity {score.perplexity:.2f} over {len(score.tokens)} tokens"
        else:
            vector = await lm.aembed(task.text)
            shown = f"a vector of {len(vector)} numbers"
    except InvivoError as error:
        timing.ended = time.perf_counter()
        return Done(task, timing, error=str(error))
    timing.ended = time.perf_counter()
    return Done(task, timing, shown)
