"""The logit lens: which tokens the final norm and the unembedding read off every layer.

nostalgebraist 2020, "interpreting GPT: the logit lens".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from invivo.instruments.asking import ask, named
from invivo.lm import LM, Blobs, ProgramLike
from invivo.program_result import Array


@dataclass(slots=True)
class LogitLens:
    """The likeliest tokens at every site and position.

    Attributes:
        sites: L names; layers: their layers.
        positions, tokens: P token indices and their texts.
        ids, words, logprobs: [L, P, top], likeliest first; natural logarithms.
    """

    sites: list[str]
    layers: list[int]
    positions: list[int]
    tokens: list[str]
    ids: Array
    words: Array
    logprobs: Array

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data."""
        return {
            "sites": self.sites,
            "layers": self.layers,
            "positions": self.positions,
            "tokens": self.tokens,
            "ids": self.ids.tolist(),
            "words": self.words.tolist(),
            "logprobs": self.logprobs.tolist(),
        }


def logit_lens(
    lm: LM,
    prompt: Any,
    *,
    at: str = "layers.*.resid.post",
    pos: Any = "@prompt",
    top: int = 5,
    edits: ProgramLike = None,
    blobs: Blobs | None = None,
    adapter: str | None = None,
) -> LogitLens:
    """Read the lens at ``at``.

    Args:
        at: sites as wide as the residual stream.
        pos: a selector.
        top: how many tokens.
        edits: a program that is in place meanwhile.
    """
    output = {"capture": at, "pos": pos, "reduce": "lens", "top": top, "name": "lens"}
    result = ask(lm, prompt, [output], edits=edits, blobs=blobs, adapter=adapter)
    found = named(result, "lens")
    ids = [capture.ids for capture in found if capture.ids is not None]
    words = [capture.words for capture in found if capture.words is not None]
    return LogitLens(
        sites=[capture.site for capture in found],
        layers=[capture.layer for capture in found],
        positions=found[0].positions,
        tokens=found[0].tokens,
        ids=np.stack(ids),
        words=np.stack(words),
        logprobs=np.stack([capture.values for capture in found]),
    )
