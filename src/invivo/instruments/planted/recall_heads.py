"""The two heads that find what followed the last word earlier in the text.

The first writes at each token what the token before it was; the second looks for the token whose
"before" is the last word, and copies it (Olsson et al., 2022, "In-context Learning and Induction
Heads").
"""

from __future__ import annotations

from invivo.instruments.planted.blueprint import Blueprint, PlannedHead


def plant_previous(plan: Blueprint, layer: int) -> None:
    """The head "previous" in ``layer``: the token before, into the block of that name."""
    head = PlannedHead(
        "previous", plan.look_back(1), plan.write("previous", plan.copy(1.0)), power=1.0
    )
    plan.add_group(layer, plan.place_key(), plan.token_value(), [head])


def recalling(plan: Blueprint, role: str, block: str, size: float) -> PlannedHead:
    """A head that copies what followed the own word into ``block``, ``size`` times."""
    write = plan.write(block, plan.copy(size))
    return PlannedHead(role, plan.match_token(), write, power=size**2)


def plant_recalling(plan: Blueprint, layer: int, heads: list[PlannedHead]) -> None:
    """A key head that ``heads`` search for the tokens before."""
    key = plan.place_key() + plan.content_key("previous")
    plan.add_group(layer, key, plan.token_value(), heads)


def two_layers(plan: Blueprint) -> tuple[int, int]:
    """Two different layers drawn at random, the lower one first."""
    last = 1 + plan.draw(plan.sizes.n_layers - 1)
    return plan.draw(last), last
