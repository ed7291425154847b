"""Attention patterns: which keys each query looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from invivo.instruments.asking import ask, named
from invivo.lm import LM, Blobs, ProgramLike
from invivo.program_result import Array


@dataclass(slots=True)
class AttentionPattern:
    """Attention probabilities.

    Attributes:
        layers: L layer numbers; heads: the H heads of each.
        positions, queries: the Q token indices that look, and their texts.
        keys: the K texts of the prompt's tokens.
        probs: [L, H, Q, K].
    """

    layers: list[int]
    heads: list[int]
    positions: list[int]
    queries: list[str]
    keys: list[str]
    probs: Array

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data."""
        return {
            "layers": self.layers,
            "heads": self.heads,
            "positions": self.positions,
            "queries": self.queries,
            "keys": self.keys,
            "probs": self.probs.tolist(),
        }


def attention_pattern(
    lm: LM,
    prompt: Any,
    *,
    at: str = "layers.*.attn.head.*.prob",
    pos: Any = "@last",
    edits: ProgramLike = None,
    blobs: Blobs | None = None,
    adapter: str | None = None,
) -> AttentionPattern:
    """Read the attention of some heads.

    Args:
        at: ``attn.head.h.prob`` of any layers and heads, the same heads in all of them.
        pos: a selector of the queries.
        edits: a program that is in place meanwhile.
    """
    outputs = [
        {"capture": at, "pos": pos, "name": "prob"},
        {"capture": "embed.out", "name": "keys", "reduce": "norm"},
    ]
    result = ask(lm, prompt, outputs, edits=edits, blobs=blobs, adapter=adapter)
    found = named(result, "prob")
    keys = named(result, "keys")[0].tokens
    probs = np.stack([capture.values for capture in found])  # [L, Q, H, K]
    n_heads = probs.shape[2]
    return AttentionPattern(
        layers=[capture.layer for capture in found],
        heads=found[0].heads or list(range(n_heads)),
        positions=found[0].positions,
        queries=found[0].tokens,
        keys=keys,
        probs=probs.transpose(0, 2, 1, 3)[..., : len(keys)],
    )
