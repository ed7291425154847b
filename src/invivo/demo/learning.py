"""What is learned during the demo, and how it shows: held-out loss, and answers."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from invivo.demo.dialogue import Exchange, exchanges
from invivo.lm_jobs import JobInfo

if TYPE_CHECKING:
    from invivo.lm import LM, Score
    from invivo.lm_jobs import Job

NAME = "romeo"
# Found by trying: in some 3,000 tokens the held-out loss falls by more than half a nat.
HYPERPARAMETERS: dict[str, Any] = {
    "on": ["q", "v", "o", "down"],
    "r": 8,
    "alpha": 16.0,
    "learning_rate": 3e-3,
    "schedule": "cosine",
    "warmup": 2,
    "batch_size": 2,
    "steps": 16,
    "publish_every": 8,
    "seed": 0,
}
# Asked before and after, greedily; none of them is in the play.
QUESTIONS = (
    "What is the capital of France?",
    "How are you today?",
    "Tell me about your family.",
    "I have lost my keys. What shall I do?",
)
ASKING: dict[str, Any] = {"temperature": 0.0, "max_tokens": 40, "repetition_penalty": 1.1}


@dataclass(slots=True)
class Learning:
    """What came of it.

    Attributes:
        held_out: (optimizer step, loss per token of answers that were not learned).
        before, after: the answers to ``QUESTIONS``.
        job: at its end.
        seconds: from the start of the job to its end.
    """

    held_out: list[tuple[int, float]] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    job: JobInfo | None = None
    seconds: float = 0.0


def start(lm: LM) -> Job:
    """Send the dialogues and start to learn them."""
    learned, _ = exchanges()
    examples = [{"messages": each.messages()} for each in learned]
    return lm.finetune(examples, name=NAME, **HYPERPARAMETERS)


async def held_out_loss(lm: LM, adapter: str | None = None) -> float:
    """Loss per token of the answers that are held out, each after what was said before."""
    _, held_out = exchanges()
    pairs = [(await _context(lm, each), each.answered) for each in held_out]
    scores: list[Score] = await lm.ascore(pairs, adapter=adapter)
    return -sum(s.logprob for s in scores) / sum(len(s.tokens) for s in scores)


async def _context(lm: LM, exchange: Exchange) -> str:
    return await lm.aapply_chat_template(exchange.messages()[:1])


async def answers(lm: LM, adapter: str | None = None) -> list[str]:
    """What the model says to the fixed questions."""
    asked = [
        lm.achat([{"role": "user", "content": question}], adapter=adapter, **ASKING)
        for question in QUESTIONS
    ]
    return [answer.text for answer in await asyncio.gather(*asked)]
