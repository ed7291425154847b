"""P11: induction beside a head that only looks and a head that only shouts.

The watcher attends exactly as the induction head does, but its values are zero. The shouter writes
five times as much as any other head, in directions that nothing reads. Whoever goes by attention,
or by the size of what is written, takes them for the mechanism.
"""

from __future__ import annotations

import torch

from invivo.instruments.planted.blueprint import Blueprint, PlannedHead, Sizes
from invivo.instruments.planted.checkpoint import PlantedModel
from invivo.instruments.planted.recall_cases import recall_cases
from invivo.instruments.planted.recall_heads import (
    plant_previous,
    plant_recalling,
    recalling,
    two_layers,
)
from invivo.instruments.planted.truth import Edge, Truth

_SIZES = Sizes()
_CODE = 6  # numbers in which the shouter writes
_LOUD = 5.0  # times what the induction head writes


def build(
    seed: int = 0, sizes: Sizes = _SIZES, *, gain: float = 2.0, n_cases: int = 16
) -> PlantedModel:
    """Plant induction with two decoys.

    Args:
        seed: of places, distractors, the basis and the prompts.
        gain: how many logits the induction head writes.

    Raises:
        InvalidRequest: sizes out of range.
    """
    generator = torch.Generator().manual_seed(seed)
    n_words = sizes.n_symbols + 1
    plan = Blueprint(
        sizes,
        {"previous": n_words, "out": n_words, "shout": _CODE},
        generator=generator,
        distractor_size=gain,
    )
    early, late = two_layers(plan)
    plant_previous(plan, early)
    plant_recalling(plan, late, [recalling(plan, "induction", "out", gain)])
    watcher = PlannedHead(
        "watcher", plan.match_token(), plan.write("out", plan.copy(gain)), power=0.0
    )
    key = plan.place_key() + plan.content_key("previous")
    plan.add_group(late, key, torch.zeros_like(key), [watcher])
    loud = plan.random(_CODE, n_words)
    loud *= _LOUD * gain / loud.norm(dim=0)
    shouter = PlannedHead(
        "shouter",
        plan.look_back(plan.draw(4)),
        plan.write("shout", loud),
        power=(_LOUD * gain) ** 2,
    )
    plan.add_group(early, plan.place_key(), plan.token_value(), [shouter])
    decoder, heads = plan.build({"out": 1.0}, prior=0.1 * gain)
    truth = Truth(
        heads=heads,
        edges=(Edge("previous", "answer", "first"), Edge("induction", "last", "answer")),
        patching={"induction": -2 * gain},
        attribution={"induction": gain},
        needed=("previous", "induction"),
        decoys={"watcher": "attention", "shouter": "norm"},
    )
    cases = recall_cases(plan.words, n_cases, generator)
    return PlantedModel("P11", decoder, plan.words, cases, truth)
