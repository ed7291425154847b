"""Options of a question scored by their log-probabilities after a context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from invivo.lm import LM

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
    interventions: Mapping[str, Any] | None = None,
) -> list[OptionScores]:
    """Score the same options after each context, all in one batch.

    Every option is fed at the same length (the last token again and again), so that one program
    of positions fits them all; what comes after an option cannot change its scores.

    Args:
        contexts: token ids, or texts with sets, which are tokenised part by part.
        options: token ids of each.
    """
    fed = _evened(options)
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


def score_options_exactly(
    lm: LM,
    context: Sequence[int],
    options: Sequence[Sequence[int]],
    *,
    interventions: Mapping[str, Any] | None = None,
) -> OptionScores:
    """:func:`score_options` after one context, the same to the last bit in any company.

    Every option is a run of its own in exact numerics: slow, and refused for adapters.
    """
    found = []
    for option, ids in zip(options, _evened(options), strict=True):
        out = [
            {"measure": "logprob", "token": token, "pos": {"index": len(context) - 1 + i}}
            for i, token in enumerate(option)
        ]
        program = {**(interventions or {}), "numerics": "exact", "out": out}
        result = lm.run(program, [*context, *ids])
        found.append(tuple(float(measure.values[0]) for measure in result.measures))
    return OptionScores(tuple(found))


def _evened(options: Sequence[Sequence[int]]) -> list[list[int]]:
    """All as long as the longest, their last tokens repeated."""
    longest = max(len(option) for option in options)
    return [[*option, *[option[-1]] * (longest - len(option))] for option in options]


def best(scores: Sequence[float]) -> int:
    """The likeliest option; the first of several equals."""
    return max(range(len(scores)), key=lambda i: scores[i])
