"""The LM interface: one model, in this process or behind HTTP, the same calls.

``invivo.load(name)`` gives a :class:`LocalLM` (an engine in this process),
``invivo.connect(url)`` a :class:`RemoteLM`. Everything above this floor (instruments, tasks,
studies, the server's pages) is written against :class:`LM` alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Token:
    """One token with its text and natural-log probability."""

    id: int
    text: str
    logprob: float
    rank: int = 0
    top: list[Token] = field(default_factory=list)


@dataclass(slots=True)
class Choice:
    index: int
    text: str
    tokens: list[int]
    finish_reason: str
    logprobs: list[Token] | None = None


@dataclass(slots=True)
class Completion:
    """The answer to one prompt; ``text`` is the first choice's."""

    id: str
    model: str
    choices: list[Choice]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    prompt_logprobs: list[Token] | None = None

    @property
    def text(self) -> str:
        return self.choices[0].text


@dataclass(slots=True)
class Delta:
    """A piece of a stream: newly settled text of one choice."""

    index: int
    text: str
    tokens: list[int]
    logprobs: list[Token] | None = None
    finish_reason: str | None = None


@dataclass(slots=True)
class Score:
    """Log-probabilities of given tokens: the lm-evaluation primitive.

    ``tokens`` are the scored ones only; ``logprob`` is their sum, ``greedy`` whether each was
    the most probable token, ``perplexity`` is exp(-logprob / len(tokens)).
    """

    tokens: list[Token]
    logprob: float
    greedy: bool
    perplexity: float
