"""What is known about a planted model, and the prompts on which it holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True, order=True)
class Head:
    """A query head, by layer and number; ``group`` is the key head that it reads."""

    layer: int
    head: int
    group: int

    def site(self, name: str) -> str:
        """The full name of one of its sites: ``head.site("z")``."""
        return f"layers.{self.layer}.attn.head.{self.head}.{name}"

    def kv_site(self, name: str) -> str:
        """The full name of a site of its key head: ``head.kv_site("k")``."""
        return f"layers.{self.layer}.attn.kvhead.{self.group}.{name}"


@dataclass(frozen=True, slots=True)
class Edge:
    """An attention edge that the task needs, between two places of a case."""

    role: str
    query: str
    key: str


@dataclass(frozen=True, slots=True)
class Route:
    """What one head tells another: the sender's value on the counterfactual, at all positions,
    reaches the receiver's query, key or value alone.

    Attributes:
        effect: change of the logit difference at the last token.
    """

    sender: str
    receiver: str
    by: Literal["q", "k", "v"]
    effect: float


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt, its counterfactual of the same length, and the two answers compared.

    Attributes:
        tokens, counterfactual: ids with the start token in front; they end in the same token.
        text, counterfactual_text: the same as words, without the start token.
        answer: the token that the model says if the mechanism works.
        other: the token that the logit difference is taken against.
        places: token numbers by name; "last" is among them.
    """

    tokens: tuple[int, ...]
    counterfactual: tuple[int, ...]
    text: str
    counterfactual_text: str
    answer: int
    other: int
    places: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Truth:
    """What holds in a planted model, by the roles of its heads.

    "Logit difference" is that of a case's answer and the other token, at the last token. Heads
    without a figure have the figure 0, whatever they attend to and however much they write.

    Attributes:
        heads: where each role sits.
        edges: blocking any one of them breaks the task; blocking the same pair in other layers
            changes nothing.
        patching: change of the logit difference when the head's ``z`` at the last token is that of
            the counterfactual and ``final.norm.scale`` is kept.
        routes: path patching from head to head.
        attribution: share of the logit difference that the head writes itself.
        flips: factor on the head's ``z`` at which the preferred one of the two answers changes.
        needed: zeroing one of these heads at all positions breaks the task.
        silent: zeroing these together at the last token changes no logit.
        decoys: heads that do nothing, by the reading that mistakes them for the mechanism:
            "attention" (from the last token to the answer), "norm" (of what is written).
    """

    heads: Mapping[str, Head] = field(default_factory=dict)
    edges: tuple[Edge, ...] = ()
    patching: Mapping[str, float] = field(default_factory=dict)
    routes: tuple[Route, ...] = ()
    attribution: Mapping[str, float] = field(default_factory=dict)
    flips: Mapping[str, float] = field(default_factory=dict)
    needed: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()
    decoys: Mapping[str, str] = field(default_factory=dict)

    def of_heads(self, figures: Mapping[str, float]) -> dict[tuple[int, int], float]:
        """``figures`` by (layer, head) in place of the role."""
        return {(self.heads[r].layer, self.heads[r].head): v for r, v in figures.items()}
