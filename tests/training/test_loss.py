"""The training loss: sum and count, whole or in pieces, as plain autograd gives it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models.gla_models import tiny_decoder
from tests.tiny import tiny_loaded

from invivo.models.decoder import Decoder
from invivo.training.forward import dense_forward
from invivo.training.loss import chunked_loss, dense_loss


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n_rows=st.integers(0, 17),
    vocabulary=st.integers(2, 30),
    rows=st.integers(1, 20),
    softcap=st.sampled_from([None, 2.0]),
    seed=st.integers(0, 10_000),
)
def test_pieces_have_the_gradients_of_all_logits(
    n_rows: int, vocabulary: int, rows: int, softcap: float | None, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n_rows, 6, generator=rng, dtype=torch.float64, requires_grad=True)
    head = torch.randn(vocabulary, 6, generator=rng, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(vocabulary, (n_rows,), generator=rng)
    labels[torch.rand(n_rows, generator=rng) < 0.4] = -100
    logits = hidden @ head.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    wanted = F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100) / 7
    got = chunked_loss(hidden, head, labels, softcap, rows) / 7
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    for mine, plain in zip(
        torch.autograd.grad(got, (hidden, head)),
        torch.autograd.grad(wanted, (hidden, head)),
        strict=True,
    ):
        torch.testing.assert_close(mine, plain, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gla"])
def test_loss_is_the_sum_over_labels_and_their_count(tmp_path: Path, family: str) -> None:
    decoder = model(tmp_path, family).requires_grad_(True)
    tokens, labels = batch(decoder)
    nats, count = dense_loss(decoder, tokens, labels)
    logits = decoder.logits(dense_forward(decoder, tokens).flatten(0, 1))
    wanted = F.cross_entropy(logits, labels.flatten(), reduction="sum", ignore_index=-100)
    torch.testing.assert_close(nats, wanted, rtol=1e-10, atol=1e-10)
    assert int(count) == int((labels != -100).sum()) < labels.numel()
    parameters = list(decoder.parameters())
    got = torch.autograd.grad(nats, parameters)
    for mine, plain in zip(got, torch.autograd.grad(wanted, parameters), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-8, atol=1e-10)


def test_micro_batches_add_up_to_the_batch(tmp_path: Path) -> None:
    decoder = model(tmp_path, "gla").requires_grad_(True)
    tokens, labels = batch(decoder)
    whole, count = dense_loss(decoder, tokens, labels)
    wanted = torch.autograd.grad(whole / count, list(decoder.parameters()))
    parts = [dense_loss(decoder, t[None], y[None]) for t, y in zip(tokens, labels, strict=True)]
    assert sum(int(n) for _, n in parts) == int(count)
    for nats, _ in parts:
        (nats / count).backward()
    for parameter, gradient in zip(decoder.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-11)


def test_half_precision_products_leave_full_gradients(tmp_path: Path) -> None:
    decoder = model(tmp_path, "llama").float().requires_grad_(True)
    tokens, labels = batch(decoder)
    nats, _ = dense_loss(decoder, tokens, labels, dtype=torch.bfloat16)
    assert nats.dtype == torch.float32
    nats.backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32


def test_nothing_is_kept_without_gradients(tmp_path: Path) -> None:
    decoder = model(tmp_path, "llama")
    nats, count = dense_loss(decoder, *batch(decoder))
    assert not nats.requires_grad
    assert float(nats) / int(count) == pytest.approx(
        torch.log(torch.tensor(decoder.config.vocab_size)).item(), rel=0.5
    )


def model(tmp_path: Path, family: str) -> Decoder:
    if family == "gla":
        return tiny_decoder("hybrid")
    return tiny_loaded(tmp_path, family, dtype=torch.float64).decoder


def batch(decoder: Decoder) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(2)
    tokens = torch.randint(decoder.config.vocab_size, (2, 22), generator=rng)
    labels = tokens[:, 1:].clone()
    labels[0, 5:9] = -100
    return tokens[:, :-1], labels
