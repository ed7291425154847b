"""Options of a question scored by their log-probabilities after a context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from invivo.lm import LM, ProgramLike

Context = Sequence[int] | Sequence[object]  # token ids, or texts with sets


@dataclass(frozen=True, slots=True)
class OptionScores:
    """Natural-log probabilities of each option's tokens after one context."""

    tokens: tuple[tuple[float, ...], ...]

    @property
    def sums(self) -> list[float]:
        return [sum(option) for option in self.tokens]

    @property
    def means(self) -> list[float]:
        """Per token."""
        return [sum(option) / len(option) for option in self.tokens]


def score_options(
    lm: LM,
    contexts: Sequence[Context],
    options: Sequence[Sequence[int]],
    *,
    interventions: ProgramLike = None,
) -> list[OptionScores]:
    """Score the same options after each context, all in one batch.

    Every option is fed at the same length (the last token again and again), so that one program
    of positions fits them all; what comes after an option cannot change its scores.

    Args:
        contexts: token ids, or texts with sets, which are tokenised part by part.
        options: token ids of each.
    """
    longest = max(len(option) for option in options)
    fed = [[*option, *[option[-1]] * (longest - len(option))] for option in options]
    scores = iter(
        lm.score([(c, ids) for c in contexts for ids in fed], interventions=interventions)
    )
    return [
        OptionScores(
            tuple(
                tuple(token.logprob for token in next(scores).tokens[: len(option)])
                for option in options
            )
        )
        for _ in contexts
    ]


def best(scores: Sequence[float]) -> int:
    """The likeliest option; the first of several equals."""
    return max(range(len(scores)), key=lambda i: scores[i])
