"""What two processes that share a decoder by heads and neurons compute, against one alone."""

from __future__ import annotations

import torch
from tests.training.forked import together
from torch.distributed.device_mesh import DeviceMesh

from invivo.models.config import ModelConfig
from invivo.models.decoder import Decoder
from invivo.training.loss_model import LossModel
from invivo.training.parallel import joined
from invivo.training.shape import shape_of
from invivo.training.tensor_parallel import split, whole_of

SIZES = {"hidden_size": 16, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
MODELS = {
    "grouped heads": {"model_type": "qwen3", "intermediate_size": 20} | SIZES | HEADS,
    "biases": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24},
    "softcap": {"model_type": "gemma2", "intermediate_size": 12, "sliding_window": 5}
    | SIZES
    | HEADS,
    "hybrid": {
        "model_type": "gla",
        "num_heads": 2,
        "intermediate_size": 12,
        "use_short_conv": True,
        "attn": {"layers": [1], "num_heads": 2},
    }
    | SIZES,
}
TOKENS = torch.randint(0, 37, (2, 11), generator=torch.Generator().manual_seed(1))
LABELS = TOKENS.roll(-1, 1).masked_fill(torch.arange(11) % 5 == 3, -100)
STARTS = torch.zeros(2, 11, dtype=torch.bool)
STARTS[:, 0] = STARTS[1, 4] = True


def config_of(name: str) -> ModelConfig:
    return shape_of(MODELS[name], length=16, vocab_size=37, end=0)


def decoder_of(config: ModelConfig, dtype: torch.dtype) -> Decoder:
    decoder = Decoder(config, dtype=dtype)
    generator = torch.Generator().manual_seed(7)
    for parameter in decoder.parameters():
        value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.copy_(0.3 * value)
    return decoder


def of_one_process(mesh: DeviceMesh, name: str, dtype: torch.dtype, within: float) -> None:
    """States, loss and every gradient."""
    config = config_of(name)
    alone = LossModel(decoder_of(config, dtype))
    shared = LossModel(decoder_of(config, dtype), recompute="layer")
    split(shared, mesh)
    wanted, _ = alone(TOKENS, LABELS, STARTS)
    found, _ = shared(TOKENS, LABELS, STARTS)
    wanted.backward()
    found.backward()
    close(found, wanted, within, name)
    close(shared.states(TOKENS), alone.states(TOKENS), within, name)
    for place, parameter in shared.decoder.named_parameters():
        gradient = whole_of(config, place, parameter.grad, mesh)
        close(gradient, alone.decoder.get_parameter(place).grad, within, f"{name}: {place}")


def close(found: torch.Tensor, wanted: torch.Tensor, within: float, what: str) -> None:
    torch.testing.assert_close(found, wanted, rtol=within, atol=within, msg=lambda m: f"{what} {m}")


def of_two() -> None:
    with joined(1, "cpu", tensor=2) as ranks:
        for name in MODELS:
            of_one_process(ranks.tensor, name, torch.float64, 1e-10)
        of_one_process(ranks.tensor, "hybrid", torch.float32, 1e-5)


if __name__ == "__main__":
    together(2, of_two)
