"""Direct logit attribution: what every head and feed-forward adds to one token's logit.

The residual stream is a sum, and with the scale of the final norm held fixed the rest of the way to
a logit is linear (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"); so the
shares add up to the logit exactly, before a soft cap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from invivo.errors import InvalidRequest
from invivo.instruments.asking import ask, named
from invivo.instruments.logit_lens import logit_lens
from invivo.lm import LM, Blobs, ProgramLike
from invivo.program_result import Array


@dataclass(slots=True)
class DirectAttribution:
    """Shares in a logit (or in the difference of two) at one position; they add up to ``logit``.

    Attributes:
        token, word: whose logit it is; minus, minus_word: that of which is taken away, if any.
        position, at: the token index at which it is read, and the text there.
        logit: before a soft cap.
        embed: of the embedding.
        layers: L layer numbers; attn, mlp: [L], of all that attention and feed-forward write.
        heads: [L, H], of each head; NaN where a layer has no such heads.
        bias: [L], what of ``attn`` no head has written; NaN where there are none.
        constant: of the final norm's bias.
    """

    token: int
    word: str
    minus: int | None
    minus_word: str | None
    position: int
    at: str
    logit: float
    embed: float
    layers: list[int]
    attn: Array
    mlp: Array
    heads: Array
    bias: Array
    constant: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data."""
        heads = [[None if np.isnan(x) else float(x) for x in row] for row in self.heads]
        bias = [None if np.isnan(x) else float(x) for x in self.bias]
        return {
            "token": self.token,
            "word": self.word,
            "minus": self.minus,
            "minus_word": self.minus_word,
            "position": self.position,
            "at": self.at,
            "logit": self.logit,
            "embed": self.embed,
            "layers": self.layers,
            "attn": self.attn.tolist(),
            "mlp": self.mlp.tolist(),
            "heads": heads,
            "bias": bias,
            "constant": self.constant,
        }

    def largest(self, n: int = 10) -> list[tuple[str, float]]:
        """The ``n`` heads and feed-forwards with the largest shares, by size."""
        parts = [("embedding", self.embed)]
        for i, layer in enumerate(self.layers):
            if np.isnan(self.heads[i]).all():
                parts.append((f"layers.{layer}.attn", float(self.attn[i])))
            parts += [
                (f"layers.{layer}.attn.head.{h}", float(x))
                for h, x in enumerate(self.heads[i])
                if not np.isnan(x)
            ]
            parts.append((f"layers.{layer}.mlp", float(self.mlp[i])))
        return sorted(parts, key=lambda part: -abs(part[1]))[:n]


def direct_attribution(
    lm: LM,
    prompt: Any,
    *,
    token: int | str | None = None,
    minus: int | str | None = None,
    pos: Any = "@last",
    edits: ProgramLike = None,
    blobs: Blobs | None = None,
    adapter: str | None = None,
) -> DirectAttribution:
    """Attribute a logit to heads and feed-forwards.

    Args:
        token: whose logit, by id or by a text that is one token; None: the likeliest's.
        minus: with it, the difference to that token's logit.
        pos: a selector of one position.
        edits: a program that is in place meanwhile.

    Raises:
        InvalidRequest: ``pos`` is more than one position.
    """
    if token is None:
        lens = logit_lens(
            lm, prompt, at="layers.*.resid.post", pos=pos, top=1, edits=edits, blobs=blobs,
            adapter=adapter,
        )  # fmt: skip
        _one(lens.positions)
        token = int(lens.ids[-1, 0, 0])
    tokens = [token] if minus is None else [token, minus]
    sites = lm.info().sites
    wanted = {
        "embed": "embed.out",
        "attn": "layers.*.attn.out",
        "mlp": "layers.*.mlp.out",
        "logit": "final.norm.out",
    }
    if "attn.head.out" in sites:  # recurrent layers have no heads that write by themselves
        wanted["heads"] = "layers.*.attn.head.*.out"
    outputs: list[dict[str, Any]] = [
        {"capture": site, "pos": pos, "name": name, "reduce": "direct", "tokens": tokens}
        for name, site in wanted.items()
    ]
    outputs.append({"capture": "final.norm.scale", "pos": pos, "name": "scale"})
    behind = {"capture": "layers.*.post1.scale", "pos": pos, "name": "post"}
    if "post1.scale" in sites:
        outputs.append(behind)
    result = ask(lm, prompt, outputs, edits=edits, blobs=blobs, adapter=adapter)

    def share(values: Array) -> Array:
        """[..., tokens] -> [...]"""
        one = values[..., 0].astype(np.float64)
        return one if minus is None else one - values[..., 1]

    scales = named(result, "scale")[0]
    position = _one(scales.positions)
    scale = float(scales.values.reshape(-1)[0])
    attn = {c.layer: scale * share(c.values)[0] for c in named(result, "attn")}
    mlp = {c.layer: scale * share(c.values)[0] for c in named(result, "mlp")}
    post = {c.layer: float(c.values.reshape(-1)[0]) for c in named(result, "post")}
    heads = {
        c.layer: scale * post.get(c.layer, 1.0) * share(c.values)[0] for c in named(result, "heads")
    }
    embed = scale * float(share(named(result, "embed")[0].values)[0])
    logit = float(share(named(result, "logit")[0].values)[0])
    layers = sorted(attn)
    n_heads = max((len(one) for one in heads.values()), default=0)
    lacking = np.full(n_heads, np.nan)
    rows = np.stack([heads.get(layer, lacking) for layer in layers])
    attns, mlps = np.array([attn[i] for i in layers]), np.array([mlp[i] for i in layers])
    ids = [_id(lm, one) for one in tokens]
    return DirectAttribution(
        token=ids[0],
        word=lm.detokenize(ids[:1]),
        minus=ids[1] if len(ids) > 1 else None,
        minus_word=lm.detokenize(ids[1:]) if len(ids) > 1 else None,
        position=position,
        at=scales.tokens[0],
        logit=logit,
        embed=embed,
        layers=layers,
        attn=attns,
        mlp=mlps,
        heads=rows,
        bias=attns - rows.sum(1) if n_heads else np.full(len(layers), np.nan),
        constant=logit - embed - float(attns.sum() + mlps.sum()),
    )


def _id(lm: LM, token: int | str) -> int:
    return token if isinstance(token, int) else lm.tokenize(token)[0]


def _one(positions: Sequence[int]) -> int:
    if len(positions) != 1:
        raise InvalidRequest(
            "one position is needed", field="pos", given=list(positions[:8]), remedy="Try @last"
        )
    return positions[0]
