"""Random models with gated linear attention, alone and beside softmax attention."""

from __future__ import annotations

from functools import cache

import torch

from invivo.models.config import ModelConfig
from invivo.models.decoder import Decoder
from invivo.models.gla_config import gla_model
from invivo.models.load import random_model


def _config(conv_size: int = 0, attention_layers: tuple[int, ...] = ()) -> ModelConfig:
    return gla_model(
        vocab_size=40,
        d_model=16,
        n_layers=3,
        n_heads=2,
        d_ff=24,
        max_positions=64,
        conv_size=conv_size,
        attention_layers=attention_layers,
        attention_heads=4,
        attention_kv_heads=2,
    )


RECURRENT: dict[str, ModelConfig] = {
    "gla": _config(),
    "gla-conv": _config(conv_size=3),
    "hybrid": _config(attention_layers=(1,)),
}


@cache
def recurrent_model(name: str) -> Decoder:
    """A float64 model with weights large enough that nothing is nearly uniform."""
    decoder = random_model(RECURRENT[name], dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    for parameter in decoder.parameters():
        if parameter.dim() == 1:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data += 0.2 * noise
        else:
            parameter.data *= 2.0
    return decoder
