"""The first weights of a model."""

from __future__ import annotations

import hashlib
import math

import torch

from invivo.models.config import ModelConfig
from invivo.models.decoder import Decoder
from invivo.training.config import Init

# What a layer adds to the residual stream.
_WRITERS = ("mixer.o", "feedforward.down", "feedforward.shared.down")


def initialize(decoder: Decoder, init: Init, seed: int) -> None:
    """Fill all parameters, in place; the same numbers on every device and machine."""
    for name, parameter in decoder.named_parameters():
        first = first_weights(name, parameter.shape, decoder.config, init, seed)
        parameter.data.copy_(first)


def first_weights(
    name: str, shape: torch.Size, config: ModelConfig, init: Init, seed: int
) -> torch.Tensor:
    """What parameter ``name`` starts with, float32 on the CPU.

    Norms start as the identity and biases at zero; a short convolution as torch's own does,
    uniform within 1 / sqrt(size), since a ``std`` made for wide matrices would all but close it;
    everything else is normal. Each parameter has a generator of its own, so that a process that
    holds a part of the model can draw that part alone.
    """
    if name.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.full(shape, 0.0 if config.norm_unit_offset else 1.0)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    if name.endswith("mixer.conv"):
        bound = shape[-1] ** -0.5
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    std = init.std
    if init.kind == "scaled" and name.endswith(_WRITERS):
        std /= math.sqrt(2 * config.n_layers)
    return torch.empty(shape).normal_(0.0, std, generator=generator)
