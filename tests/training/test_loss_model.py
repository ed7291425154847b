"""The loss as a module: plain, recomputed and compiled it is one function."""

from __future__ import annotations

import shutil
import sysconfig
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.gla_models import tiny_decoder
from tests.tiny import tiny_loaded
from tests.training.test_forward import document_starts, texts

from invivo.models.decoder import Decoder
from invivo.training import loss_model
from invivo.training.loss import dense_loss
from invivo.training.loss_model import LossModel


@pytest.mark.parametrize("settings", [{}, {"recompute": "layer"}])
def test_it_is_the_dense_loss(settings: dict[str, Any]) -> None:
    decoder = tiny_decoder("hybrid").requires_grad_(True)
    wanted = loss_and_gradients(partial(dense_loss, decoder), decoder, document_starts())
    got = loss_and_gradients(LossModel(decoder, **settings), decoder, document_starts())
    for mine, plain in zip(got, wanted, strict=True):
        assert torch.equal(mine, plain)


def test_it_adds_nothing_to_the_decoders_parameters() -> None:
    decoder = tiny_decoder("hybrid")
    model = LossModel(decoder)
    assert {id(p) for p in model.parameters()} == {id(p) for p in decoder.parameters()}
    assert all(p.requires_grad for p in decoder.parameters())


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The graphs that layers compile to, run by torch's own operations."""
    from torch._dynamo.backends.debugging import aot_eager

    found: list[object] = []

    def backend(graph: Any, inputs: Any) -> Any:
        found.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    monkeypatch.setattr(loss_model.torch, "compile", partial(torch.compile, backend=backend))
    return found


@pytest.mark.parametrize(("family", "recompute"), [("gla", "layer"), ("qwen3", "none")])
def test_compiled_layers_are_whole_graphs_of_the_same_function(
    tmp_path: Path, family: str, recompute: Any, graphs: list[object]
) -> None:
    """Documents move and change in number without another compilation."""
    gla = family == "gla"
    decoder = tiny_decoder("plain") if gla else tiny_loaded(tmp_path, family).decoder
    plain = LossModel(decoder)
    compiled = LossModel(decoder, compile=True, recompute=recompute)
    for n_more in range(3):
        starts = document_starts()
        starts[1, 14 : 14 + n_more] = True
        wanted = loss_and_gradients(plain, decoder, starts)
        got = loss_and_gradients(compiled, decoder, starts)
        for mine, original in zip(got, wanted, strict=True):
            torch.testing.assert_close(mine, original, rtol=1e-5, atol=1e-6)
    assert len(graphs) == 1  # for all layers: they differ in nothing but numbers


def test_a_compiled_hybrid_is_a_graph_for_each_kind_of_layer(graphs: list[object]) -> None:
    decoder = tiny_decoder("hybrid", n_layers=4)
    wanted = loss_and_gradients(LossModel(decoder), decoder, None)
    got = loss_and_gradients(LossModel(decoder, compile=True), decoder, None)
    for mine, original in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, original, rtol=1e-5, atol=1e-6)
    assert len(graphs) == 2


def test_mixtures_are_not_compiled(tmp_path: Path, graphs: list[object]) -> None:
    decoder = tiny_loaded(tmp_path, "mixtral", num_hidden_layers=1).decoder
    wanted = loss_and_gradients(LossModel(decoder), decoder, None)
    got = loss_and_gradients(LossModel(decoder, compile=True), decoder, None)
    for mine, original in zip(got, wanted, strict=True):
        assert torch.equal(mine, original)
    assert not graphs


HEADER = Path(sysconfig.get_paths()["include"], "Python.h")


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None or not HEADER.exists(), reason="needs a C++ compiler"
)
def test_layers_compile_to_machine_code() -> None:
    torch._dynamo.reset()
    decoder = tiny_decoder("plain", n_layers=2).float()
    tokens = texts(decoder.config.vocab_size)
    with torch.no_grad():
        wanted = LossModel(decoder)(tokens, tokens)[0]
        got = LossModel(decoder, compile=True)(tokens, tokens)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0)


def loss_and_gradients(
    model: Any, decoder: Decoder, starts: torch.Tensor | None
) -> list[torch.Tensor]:
    tokens = texts(decoder.config.vocab_size)
    nats, count = model(tokens[:, :-1], tokens[:, 1:], starts=cut(starts))
    parameters = list(decoder.parameters())
    return [nats.detach(), *torch.autograd.grad(nats / count, parameters)]


def cut(starts: torch.Tensor | None) -> torch.Tensor | None:
    return None if starts is None else starts[:, :-1]
