"""First weights."""

from __future__ import annotations

import pytest
import torch

from invivo.models.config import ModelConfig
from invivo.models.decoder import Decoder
from invivo.training.config import Init
from invivo.training.init import first_weights, initialize
from invivo.training.shape import shape_of

GLA = {"model_type": "gla", "hidden_size": 64, "num_hidden_layers": 8, "use_short_conv": True}
MIXTURE = {
    "model_type": "qwen2_moe",
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


def shape(model: dict[str, object]) -> ModelConfig:
    return shape_of(model, length=32, vocab_size=300, end=0)


@pytest.mark.parametrize("model", [GLA, MIXTURE])
def test_every_parameter_is_filled_as_its_kind_asks(model: dict[str, object]) -> None:
    decoder = Decoder(shape(model))
    for parameter in decoder.parameters():
        parameter.data.fill_(torch.nan)
    initialize(decoder, Init(kind="scaled", std=0.02), seed=3)
    for name, parameter in decoder.named_parameters():
        values = parameter.data
        if name.endswith("bias"):
            assert values.eq(0).all(), name
        elif values.dim() == 1:
            assert values.eq(1).all(), name
        elif name.endswith("conv"):
            assert values.abs().max() <= 0.5, name
            assert values.std() == pytest.approx(0.5 / 3**0.5, rel=0.1), name
        else:
            writes = name.endswith(("mixer.o", ".down"))
            wanted = 0.02 / 4 if writes else 0.02  # sqrt(2 * 8 layers) = 4
            assert values.std() == pytest.approx(wanted, rel=0.2), name


def test_normal_does_not_scale() -> None:
    config = shape(GLA)
    weight = first_weights("layers.0.mixer.o", torch.Size((64, 64)), config, Init("normal"), 0)
    assert weight.std() == pytest.approx(0.02, rel=0.1)


def test_the_seed_decides_each_parameter_by_its_name() -> None:
    config, size = shape(GLA), torch.Size((8, 8))

    def draw(name: str, seed: int) -> torch.Tensor:
        return first_weights(name, size, config, Init(), seed)

    torch.manual_seed(1)
    one = draw("embed", 0)
    torch.manual_seed(2)
    assert draw("embed", 0).equal(one)
    assert not draw("embed", 1).equal(one)
    assert not draw("head", 0).equal(one)
