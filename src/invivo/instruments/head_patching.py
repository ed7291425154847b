"""Activation patching of every head: whose value on another prompt moves the answer?

Vig et al. 2020 ("Causal Mediation Analysis"), Wang et al. 2023 ("Interpretability in the Wild").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from invivo.errors import InvalidRequest
from invivo.instruments.asking import ask, named
from invivo.lm import LM
from invivo.program_result import Array
from invivo.statistics import holm, sign_test


@dataclass(slots=True)
class HeadPatching:
    """Change of a logit difference when one head's ``z`` is that of a counterfactual.

    Attributes:
        base: the logit difference without any change.
        layers: L layer numbers that have heads.
        effects: [L, H].
    """

    base: float
    layers: list[int]
    effects: Array

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data."""
        return {"base": self.base, "layers": self.layers, "effects": self.effects.tolist()}


def head_patching(
    lm: LM,
    prompt: Any,
    counterfactual: Any,
    *,
    answer: int | str,
    other: int | str,
    pos: Any = "@last",
    keep_scale: bool = False,
    adapter: str | None = None,
) -> HeadPatching:
    """Patch each head alone, all in one program.

    Args:
        prompt, counterfactual: a text or token ids each; positions are paired from the end.
        answer, other: the logit difference is that of these tokens, at the last position.
        pos: where the heads are patched.
        keep_scale: hold the scale of the final norm, so that effects of heads that only write
            to the logits add up.
    """
    (shape,) = [ask(lm, prompt, [{"capture": "layers.*.attn.head.*.z", "pos": "@last"}])]
    heads = {c.layer: c.heads or [] for c in named(shape, "0")}
    layers = sorted(heads)
    n_heads = max(len(found) for found in heads.values())
    steps: list[dict[str, Any]] = [
        {
            "at": "layers.$L.attn.head.$H.z",
            "pos": pos,
            "do": "replace",
            "from": {"run": "cf", "map": "end"},
        }
    ]
    if keep_scale:
        steps.append({"at": "final.norm.scale", "do": "freeze"})
    measure = {"measure": "logit_diff", "a": answer, "b": other}
    program = {
        "runs": {"cf": {"prompt": counterfactual}},
        "steps": steps,
        "sweep": {"L": layers, "H": list(range(n_heads))},
        "out": [measure | {"name": "moved"}, measure | {"name": "base", "run": "plain"}],
    }
    result = lm.run(program, prompt, adapter=adapter)
    base = result.array("base")[..., 0]
    return HeadPatching(
        float(base.flat[0]), layers, (result.array("moved")[..., 0] - base).astype(np.float64)
    )


def consistent_heads(
    effects: Sequence[Array], *, floor: float = 0.01, alpha: float = 0.01
) -> list[tuple[int, int]]:
    """The heads that move the answer the same way over many prompts: rows and columns of effects.

    A sign test over the prompts for each head, corrected for their number (Holm).

    Args:
        effects: one [L, H] for each prompt, of :class:`HeadPatching` or of direct shares.
        floor: an effect below it counts as none, however regular: it may be rounding.
        alpha: chance of naming any head where there is nothing.

    Raises:
        InvalidRequest: so few prompts that nothing could be found.
    """
    table = np.stack(effects)
    n_prompts, _, n_heads = table.shape
    if sign_test(n_prompts, 0) * table[0].size > alpha:
        raise InvalidRequest(
            "too few prompts to find anything",
            field="effects",
            given=n_prompts,
            remedy=f"{table[0].size} heads at alpha {alpha} need more",
        )
    positive, negative = (table > floor).sum(0), (table < -floor).sum(0)
    p = [sign_test(int(a), int(b)) for a, b in zip(positive.flat, negative.flat, strict=True)]
    found = np.flatnonzero(np.array(holm(p)) < alpha)
    return [divmod(i, n_heads) for i in found.tolist()]
