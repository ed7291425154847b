"""Prompts in which a word comes back: ``... a b ... c d ... a``.

What followed it is ``b``; in the counterfactual ``a`` and ``c`` have changed places, so that ``d``
followed it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from invivo.instruments.planted.truth import Case
from invivo.instruments.planted.words import START, Words

_BODY = 7  # words before the last one


def recall_cases(
    words: Words,
    n: int,
    generator: torch.Generator,
    other: Callable[[int, int], int] | None = None,
) -> tuple[Case, ...]:
    """``n`` random cases with the places "first" (the earlier a), "answer" (b) and "last".

    Args:
        other: what the answer is compared with, from (a, d); None: d. A case in which it is the
            answer itself, or d without being meant to be, is drawn again.
    """

    def drawn(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    cases: list[Case] = []
    while len(cases) < n:
        symbols = (torch.randperm(words.n_symbols, generator=generator)[:_BODY] + 1).tolist()
        i, j = drawn(_BODY - 1), drawn(_BODY - 1)
        if abs(i - j) < 2:
            continue
        swapped = list(symbols)
        swapped[i], swapped[j] = symbols[j], symbols[i]
        a, b, d = symbols[i], symbols[i + 1], symbols[j + 1]
        against = d if other is None else other(a, d)
        if against == b or (other is not None and against == d):
            continue
        tokens, counterfactual = (START, *symbols, a), (START, *swapped, a)
        cases.append(
            Case(
                tokens=tokens,
                counterfactual=counterfactual,
                text=words.text(tokens),
                counterfactual_text=words.text(counterfactual),
                answer=b,
                other=against,
                places={"first": i + 1, "answer": i + 2, "last": _BODY + 1},
            )
        )
    return tuple(cases)
