"""P3: a head that knows a fact about the last word, and one that reads otherwise in the text."""

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


def build(
    seed: int = 0,
    sizes: Sizes = _SIZES,
    *,
    memory: float = 3.0,
    context: float = 2.0,
    n_cases: int = 16,
) -> PlantedModel:
    """Plant memory against context.

    The answer of a case is what the text says, the other token the fact: the logit difference is
    ``context - memory``.

    Args:
        seed: of places, facts, distractors, the basis and the prompts.
        memory, context: how many logits the head "fact" and the head "copy" write.

    Raises:
        InvalidRequest: sizes out of range.
    """
    generator = torch.Generator().manual_seed(seed)
    n_words = sizes.n_symbols + 1
    plan = Blueprint(
        sizes,
        {"previous": n_words, "memory": n_words, "context": n_words},
        generator=generator,
        distractor_size=memory,
    )
    early, late = two_layers(plan)
    plant_previous(plan, early)
    plant_recalling(plan, late, [recalling(plan, "copy", "context", context)])
    facts = _facts(plan)
    table = memory * torch.eye(n_words, dtype=torch.float64)[facts].T
    fact = PlannedHead("fact", plan.look_back(0), plan.write("memory", table), power=memory**2)
    plan.add_group(plan.draw(sizes.n_layers), plan.place_key(), plan.token_value(), [fact])
    # Without a prior the two answers differ by what the heads write and nothing else.
    decoder, heads = plan.build({"memory": 1.0, "context": 1.0}, prior=0.0)
    truth = Truth(
        heads=heads,
        edges=(Edge("previous", "answer", "first"), Edge("copy", "last", "answer")),
        patching={"copy": -context},
        attribution={"fact": -memory, "copy": context},
        flips={"fact": context / memory, "copy": memory / context},
        needed=("previous", "copy"),
    )
    cases = recall_cases(plan.words, n_cases, generator, other=lambda a, d: facts[a])
    return PlantedModel("P3", decoder, plan.words, cases, truth)


def _facts(plan: Blueprint) -> list[int]:
    """A fact about every token: another word, each once; the start token keeps to itself."""
    n = plan.words.n_symbols
    order = (torch.randperm(n, generator=plan.generator) + 1).tolist()
    facts = [0] * (n + 1)
    for at, word in enumerate(order):
        facts[word] = order[(at + 1) % n]
    return facts
