"""N0: models and prompts in which there is nothing to find.

Three ways of taking a planted truth away: all weights drawn at random, the answers dealt out
anew, the mechanism silenced.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from invivo.instruments.planted.checkpoint import PlantedModel
from invivo.instruments.planted.truth import Truth
from invivo.models.decoder import Layer


def random_weights(model: PlantedModel, seed: int = 0) -> PlantedModel:
    """The same shapes and prompts; every row of every matrix drawn anew, with the norm it had.

    Heads then attend somewhere and move every logit, one way as often as the other.
    """
    generator = torch.Generator().manual_seed(seed)
    decoder = copy.deepcopy(model.decoder)
    for parameter in decoder.parameters():
        if parameter.dim() > 1:
            drawn = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            drawn *= parameter.norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True)
            parameter.data.copy_(drawn)
    return PlantedModel("N0 random weights", decoder, model.words, model.cases, Truth())


def shuffled_truth(model: PlantedModel, seed: int = 0) -> PlantedModel:
    """The same model; the two answers of every case are two words drawn at random.

    The mechanism is there, but the prompts no longer ask about it.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn() -> tuple[int, int]:
        a, b = (torch.randperm(model.words.n_symbols, generator=generator)[:2] + 1).tolist()
        return int(a), int(b)

    cases = []
    for case in model.cases:
        answer, other = drawn()
        cases.append(replace(case, answer=answer, other=other))
    return PlantedModel("N0 shuffled truth", model.decoder, model.words, tuple(cases), Truth())


def silenced(model: PlantedModel) -> PlantedModel:
    """The same model; heads with a role write nothing. All others write what they wrote."""
    decoder = copy.deepcopy(model.decoder)
    size = decoder.config.head_dim
    for head in model.truth.heads.values():
        layer = decoder.layers[head.layer]
        assert isinstance(layer, Layer)
        layer.mixer.o.data[:, head.head * size : (head.head + 1) * size] = 0
    return PlantedModel("N0 silenced", decoder, model.words, model.cases, Truth())
