"""The training pass computes what the serving pass computes, and reaches every parameter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.models.gla_models import tiny_gla
from tests.models.pages import logits_of
from tests.tiny import FAMILIES, tiny_loaded

from invivo.errors import UnsupportedModel
from invivo.models.load import random_model
from invivo.training.forward import dense_forward


def texts(vocab_size: int) -> torch.Tensor:
    """Two texts longer than any sliding window of the tiny models."""
    return torch.randint(vocab_size, (2, 23), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_training_pass_equals_serving_pass(tmp_path: Path, family: str) -> None:
    decoder = tiny_loaded(tmp_path, family, dtype=torch.float64).decoder
    tokens = texts(decoder.config.vocab_size)
    with torch.no_grad():
        got = decoder.logits(dense_forward(decoder, tokens).flatten(0, 1)).view(*tokens.shape, -1)
    for text, logits in zip(tokens, got, strict=True):
        torch.testing.assert_close(logits, logits_of(decoder, text.tolist()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_gets_a_gradient_of_its_own_dtype(tmp_path: Path, family: str) -> None:
    decoder = tiny_loaded(tmp_path, family).decoder.requires_grad_(True)
    hidden = dense_forward(decoder, texts(decoder.config.vocab_size), dtype=torch.bfloat16)
    assert hidden.dtype == torch.bfloat16
    hidden.float().square().sum().backward()
    for name, parameter in decoder.named_parameters():
        if name == "head":  # applied after this pass
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all(), name


def test_a_recurrent_layer_is_refused_by_name() -> None:
    decoder = random_model(tiny_gla())
    with pytest.raises(UnsupportedModel, match="GatedLinearAttention"):
        dense_forward(decoder, texts(decoder.config.vocab_size))
