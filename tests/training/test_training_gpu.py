"""The training pass on a GPU: its kernels against float64, and compiled layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.models.gla_models import tiny_decoder
from tests.training.test_forward import document_starts, texts

from invivo.models.decoder import Decoder
from invivo.training.loss_model import LossModel

pytestmark = pytest.mark.gpu


def kernel_sized(dtype: torch.dtype) -> Decoder:
    """A hybrid whose heads the kernels serve (16 key channels)."""
    decoder = tiny_decoder("hybrid", d_model=64, n_heads=2)
    return decoder.to(device="cuda", dtype=dtype)


def loss_and_gradients(decoder: Decoder, **settings: Any) -> dict[str, torch.Tensor]:
    tokens = texts(decoder.config.vocab_size).cuda()
    nats, count = LossModel(decoder, **settings)(tokens, tokens, document_starts())
    named = dict(decoder.named_parameters())
    found = torch.autograd.grad(nats / count, list(named.values()))
    return {"loss": (nats / count).detach()} | dict(zip(named, found, strict=True))


def distance(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Of all gradients together, relative: single ones may all but cancel."""
    names = [name for name in wanted if name != "loss"]
    mine, exact = (torch.cat([x[name].double().flatten() for name in names]) for x in (got, wanted))
    return float((mine - exact).norm() / exact.norm())


def test_float32_kernels_give_the_gradients_of_float64() -> None:
    wanted = loss_and_gradients(kernel_sized(torch.float64))
    got = loss_and_gradients(kernel_sized(torch.float32))
    torch.testing.assert_close(got["loss"].double(), wanted["loss"], rtol=1e-4, atol=0)
    assert distance(got, wanted) < 1e-3


def test_half_precision_errs_no_more_than_rounded_weights_do() -> None:
    """A tiny random model is far from smooth: rounding its weights alone moves its gradients."""
    wanted = loss_and_gradients(kernel_sized(torch.float64))
    rounded = loss_and_gradients(kernel_sized(torch.bfloat16).to(torch.float64))
    got = loss_and_gradients(kernel_sized(torch.float32), dtype=torch.bfloat16)
    assert distance(got, wanted) < 2 * distance(rounded, wanted)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_launches_written_down_give_the_gradients_of_plain_ones(
    dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from invivo.kernels import triton_gated_norm
    from invivo.kernels.triton_gla import passes
    from invivo.kernels.triton_replay import run_plainly

    decoder = kernel_sized(torch.float32)
    with monkeypatch.context() as plain:
        for module in (passes, triton_gated_norm):
            plain.setattr(module, "run", run_plainly)
        wanted = loss_and_gradients(decoder, dtype=dtype)
    for _ in range(4):  # the last two by launches that are written down
        got = loss_and_gradients(decoder, dtype=dtype)
        assert distance(got, wanted) < (1e-5 if dtype is None else 2e-2)


def test_compiled_layers_are_the_same_function() -> None:
    torch.compiler.reset()
    decoder = kernel_sized(torch.float32)
    wanted = loss_and_gradients(decoder)
    assert distance(loss_and_gradients(decoder, compile=True), wanted) < 1e-3
    again = loss_and_gradients(decoder, compile=True, recompute="layer")
    assert distance(again, wanted) < 1e-3
