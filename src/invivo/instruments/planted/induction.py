"""P1: a head that sees the token before, and a head that recalls with its help."""

from __future__ import annotations

import torch

from invivo.instruments.planted.blueprint import Blueprint, Sizes
from invivo.instruments.planted.checkpoint import PlantedModel
from invivo.instruments.planted.recall_cases import recall_cases
from invivo.instruments.planted.recall_heads import (
    plant_previous,
    plant_recalling,
    recalling,
    two_layers,
)
from invivo.instruments.planted.truth import Edge, Route, Truth

_SIZES = Sizes()


def build(
    seed: int = 0, sizes: Sizes = _SIZES, *, gain: float = 4.0, n_cases: int = 16
) -> PlantedModel:
    """Plant induction.

    Args:
        seed: of places, distractors, the basis and the prompts.
        gain: how many logits the recalling head writes.

    Raises:
        InvalidRequest: sizes out of range.
    """
    generator = torch.Generator().manual_seed(seed)
    plan = Blueprint(
        sizes,
        {"previous": sizes.n_symbols + 1, "out": sizes.n_symbols + 1},
        generator=generator,
        distractor_size=gain,
    )
    early, late = two_layers(plan)
    plant_previous(plan, early)
    plant_recalling(plan, late, [recalling(plan, "induction", "out", gain)])
    decoder, heads = plan.build({"out": 1.0}, prior=0.1 * gain)
    truth = Truth(
        heads=heads,
        edges=(Edge("previous", "answer", "first"), Edge("induction", "last", "answer")),
        patching={"induction": -2 * gain},
        routes=(
            Route("previous", "induction", "k", -2 * gain),
            Route("previous", "induction", "q", 0.0),
            Route("previous", "induction", "v", 0.0),
        ),
        attribution={"induction": gain},
        needed=("previous", "induction"),
    )
    cases = recall_cases(plan.words, n_cases, generator)
    return PlantedModel("P1", decoder, plan.words, cases, truth)
