"""P12: induction beside two heads that write the answer with opposite signs.

Each moves the answer by itself; together they write nothing, so that taking both away shows
nothing.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from invivo.errors import InvalidRequest
from invivo.instruments.planted.blueprint import Blueprint, Sizes
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


def build(
    seed: int = 0,
    sizes: Sizes = _SIZES,
    *,
    gain: float = 4.0,
    effect: float = 1.5,
    n_cases: int = 16,
) -> PlantedModel:
    """Plant induction with a pair that cancels.

    Args:
        seed: of places, distractors, the basis and the prompts.
        gain: how many logits the induction head writes.
        effect: how many the heads "plus" and "minus" write, with opposite signs.

    Raises:
        InvalidRequest: sizes out of range.
    """
    generator = torch.Generator().manual_seed(seed)
    plan = Blueprint(
        sizes,
        {"previous": sizes.n_symbols + 1, "out": sizes.n_symbols + 1},
        generator=generator,
        distractor_size=effect,
    )
    early, late = two_layers(plan)
    plant_previous(plan, early)
    # The pair adds nothing to the stream's length, because its sum is zero.
    plus = replace(recalling(plan, "plus", "out", effect), power=0.0)
    minus = replace(recalling(plan, "minus", "out", -effect), power=0.0)
    induction = recalling(plan, "induction", "out", gain)
    # One of the pair shares its key head with the induction head where there is room.
    groups = [[induction, plus], [minus]] if sizes.share > 1 else [[induction], [plus], [minus]]
    if len(groups) > sizes.n_kv_heads:
        raise InvalidRequest(
            "the pair needs two query heads a key head, or three key heads",
            field="sizes.n_kv_heads",
            given=sizes.n_kv_heads,
        )
    for group in groups:
        plant_recalling(plan, late, group)
    decoder, heads = plan.build({"out": 1.0}, prior=0.1 * gain)
    truth = Truth(
        heads=heads,
        edges=(Edge("previous", "answer", "first"),),
        patching={"induction": -2 * gain, "plus": -2 * effect, "minus": 2 * effect},
        attribution={"induction": gain, "plus": effect, "minus": -effect},
        needed=("previous", "induction"),
        silent=("plus", "minus"),
    )
    cases = recall_cases(plan.words, n_cases, generator)
    return PlantedModel("P12", decoder, plan.words, cases, truth)
