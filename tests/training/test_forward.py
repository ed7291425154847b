"""The training pass computes what the serving pass computes, and reaches every parameter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.models.gla_models import SHAPES, memory_of, spans_layout, tiny_decoder
from tests.models.pages import logits_of
from tests.tiny import FAMILIES, tiny_loaded

from invivo.kernels.gla import gla_reference
from invivo.models.decoder import Decoder
from invivo.training import forward
from invivo.training.forward import dense_forward

MODELS = [*FAMILIES, *(f"gla {shape}" for shape in SHAPES)]


def model(tmp_path: Path, name: str, dtype: torch.dtype = torch.float64) -> Decoder:
    if name.startswith("gla "):
        return tiny_decoder(name.removeprefix("gla ")).to(dtype)
    return tiny_loaded(tmp_path, name, dtype=dtype).decoder


def served_logits(decoder: Decoder, tokens: list[int]) -> torch.Tensor:
    """What the serving pass gives for one whole text."""
    if not decoder.config.recurrent:
        return logits_of(decoder, tokens)
    layout = spans_layout([(0, len(tokens), 1)])
    with torch.no_grad():
        hidden = decoder(torch.tensor(tokens), layout, memory_of(decoder.config))
        return decoder.logits(hidden)


def texts(vocab_size: int) -> torch.Tensor:
    """Two texts longer than any sliding window of the tiny models."""
    return torch.randint(vocab_size, (2, 23), generator=torch.Generator().manual_seed(1))


def document_starts() -> torch.Tensor:
    """Documents of 7 + 1 + 15 and of 12 + 11 tokens; the first text's first start is not marked."""
    starts = torch.zeros(2, 23, dtype=torch.bool)
    starts[0, [7, 8]] = True
    starts[1, [0, 12]] = True
    return starts


@pytest.mark.parametrize("name", MODELS)
def test_training_pass_equals_serving_pass(tmp_path: Path, name: str) -> None:
    decoder = model(tmp_path, name)
    tokens = texts(decoder.config.vocab_size)
    with torch.no_grad():
        got = decoder.logits(dense_forward(decoder, tokens).flatten(0, 1)).view(*tokens.shape, -1)
    for text, logits in zip(tokens, got, strict=True):
        wanted = served_logits(decoder, text.tolist())
        torch.testing.assert_close(logits, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_documents_of_one_text_are_separate_texts(tmp_path: Path, name: str) -> None:
    decoder = model(tmp_path, name)
    tokens, starts = texts(decoder.config.vocab_size), document_starts()
    with torch.no_grad():
        together = dense_forward(decoder, tokens, starts=starts)
        for row, first, stop in ((0, 0, 7), (0, 7, 8), (0, 8, 23), (1, 0, 12), (1, 12, 23)):
            alone = dense_forward(decoder, tokens[row : row + 1, first:stop])[0]
            torch.testing.assert_close(together[row, first:stop], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_a_gradient_of_its_own_dtype(tmp_path: Path, name: str) -> None:
    decoder = model(tmp_path, name, torch.float32).requires_grad_(True)
    hidden = dense_forward(decoder, texts(decoder.config.vocab_size), dtype=torch.bfloat16)
    assert hidden.dtype == torch.bfloat16
    hidden.float().square().sum().backward()
    for name_, parameter in decoder.named_parameters():
        if name_ == "head":  # applied after this pass
            continue
        assert parameter.grad is not None, name_
        assert parameter.grad.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all(), name_


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("separate", [False, True])
def test_gradients_of_chunks_are_those_of_the_recurrence(
    shape: str, separate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = tiny_decoder(shape).requires_grad_(True)
    tokens = texts(decoder.config.vocab_size)
    starts = document_starts() if separate else None
    by_chunks = gradients(decoder, tokens, starts)

    def row_by_row(*tensors: torch.Tensor | float | None) -> tuple[torch.Tensor, None]:
        q, k, v, g, span_start, state, scale = tensors
        assert state is None
        return gla_reference(q, k, v, g, span_start=span_start.tolist(), scale=scale)

    monkeypatch.setattr(forward, "gla_chunked_op", row_by_row)
    for name, wanted in gradients(decoder, tokens, starts).items():
        torch.testing.assert_close(by_chunks[name], wanted, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("name", ["llama", "gla hybrid"])
def test_recomputed_layers_give_the_same_gradients_and_keep_less(tmp_path: Path, name: str) -> None:
    decoder = model(tmp_path, name).requires_grad_(True)
    tokens, starts = texts(decoder.config.vocab_size), document_starts()
    plain_kept, wanted = saved_bytes(lambda: gradients(decoder, tokens, starts))
    kept, got = saved_bytes(lambda: gradients(decoder, tokens, starts, recompute="layer"))
    for parameter, gradient in wanted.items():
        assert torch.equal(got[parameter], gradient), parameter
    assert kept < plain_kept / 4


def gradients(
    decoder: Decoder, tokens: torch.Tensor, starts: torch.Tensor | None, **options: object
) -> dict[str, torch.Tensor]:
    hidden = dense_forward(decoder, tokens, starts=starts, **options)
    named = {name: p for name, p in decoder.named_parameters() if name != "head"}
    weights = torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view(hidden.shape)
    found = torch.autograd.grad((hidden * weights).sum(), list(named.values()))
    return dict(zip(named, found, strict=True))


def saved_bytes(
    work: Callable[[], dict[str, torch.Tensor]],
) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes of distinct storages that autograd keeps outside of recomputation, and the result."""
    storages: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        result = work()
    return sum(storages.values()), result
