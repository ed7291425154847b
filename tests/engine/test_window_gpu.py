"""The tape's backward on a GPU: its kernels against the same windows in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from invivo.engine import layer_backward
from invivo.engine.bypasses import BypassSpec, init_parameters
from invivo.engine.graph_pruning import differentiate
from invivo.engine.host_placement import HostRoom
from invivo.engine.host_shelf import HostShelf
from invivo.engine.recording import Recording
from invivo.engine.tape_budget import Budgets
from invivo.engine.train_sequence import TrainSequence, next_token_labels
from invivo.engine.training_graph import build_graph
from invivo.engine.training_rows import Rows, TrainingRows
from invivo.engine.window import WindowTrainer
from invivo.kernels import attention_backward
from invivo.kernels.paging import blocks_needed, contiguous_layout
from invivo.models.cache import allocate_kv_cache
from invivo.models.config import LayerConfig, ModelConfig, RopeConfig
from invivo.models.decoder import Decoder
from invivo.models.load import random_model

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
LENGTH, WHOLE = 200, 1024
SPECS = (BypassSpec("lora", ("q", "o", "down"), 4),)


def config_of(qk_norm: str) -> ModelConfig:
    return ModelConfig(
        family="llama",
        vocab_size=320,
        d_model=128,
        n_heads=4,
        n_kv_heads=2,
        head_dim=64,
        d_ff=192,
        max_positions=1024,
        layers=(LayerConfig(),) * 3,
        ropes=(RopeConfig(10_000.0, 64),),
        qk_norm=qk_norm,
    )


def gradients(
    decoder: Decoder,
    share: float | None,
    rows: int,
    *,
    length: int = LENGTH,
    shelf: HostShelf | None = None,
) -> dict[str, torch.Tensor]:
    """Of one text that ran forward as a whole in inference mode.

    Args:
        share: of the way from the smallest tape to the largest; None: no bound.
        rows: of a backward unit.
        shelf: memory of the host for what then has no room.
    """
    config, device, dtype = decoder.config, decoder.embed.device, decoder.embed.dtype
    draws = init_parameters(SPECS[0], config, seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, value in draws.items():
        if name.endswith("lora_B"):
            value.normal_(0.0, 0.05, generator=generator)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    parameters = {n: v.to(device, wide).requires_grad_() for n, v in draws.items()}
    n_blocks = blocks_needed([length])
    cache = allocate_kv_cache(config, n_blocks=n_blocks, block_size=16, device=device, dtype=dtype)
    trainer = WindowTrainer(
        decoder,
        cache,
        SPECS,
        parameters,
        order="layer",
        tape_bytes=None if share is None else bytes_at(share, config, dtype, length),
        shelf=shelf,
    )
    tokens = torch.randint(config.vocab_size, (length,), generator=generator).to(device)
    sequence = TrainSequence(tokens, next_token_labels(tokens), list(range(n_blocks)))
    layout = contiguous_layout([length], device=str(device))
    trainer.begin(sequence)
    assert shelf is None or shelf.lent > 0
    assert trainer.bypass is not None
    inner = TrainingRows(None, [Rows(0, length, trainer.bypass.window(0, length))])
    recording = Recording(decoder, cache, inner, [trainer.piece(sequence, 0, length, 0)])
    with torch.inference_mode():
        hidden = decoder(tokens, layout, cache, bypass=recording.bypass, taps=recording)
    trainer.forward_done(sequence, 0, length, hidden)
    while (unit := trainer.next_unit(sequence, rows)) is not None:
        trainer.run(sequence, unit)
    found = {}
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        found[name] = parameter.grad.double().cpu()
    return found


def bytes_at(share: float, config: ModelConfig, dtype: torch.dtype, length: int) -> int:
    name = str(dtype).removeprefix("torch.")
    graph = build_graph(config, [spec.trainable for spec in SPECS], length=1, dtype=name)
    budgets = Budgets(config, graph, differentiate(graph))
    bits = budgets.least_bits + share * (budgets.most_bits - budgets.least_bits)
    return -(-round(bits) * length // 8)


def distance(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Of all gradients together, relative."""
    mine, exact = (torch.cat([x[name].flatten() for name in wanted]) for x in (got, wanted))
    return float((mine - exact).norm() / exact.norm())


def own_attention_backward(*arguments: Any, **options: Any) -> torch.Tensor | None:
    """By our own kernels, whose sums do not change from run to run."""
    from invivo.kernels.triton_attention_backward import attention_backward_triton

    return attention_backward_triton(*arguments, **options)


def decoders(qk_norm: str, dtype: torch.dtype) -> tuple[Decoder, Decoder]:
    """The same weights, as ``dtype`` rounds them, on the device and in float64 on the CPU."""
    rounded = random_model(config_of(qk_norm), seed=4).to(dtype)
    exact = random_model(config_of(qk_norm), seed=4).to(dtype).double()
    return rounded.to(DEVICE), exact


@pytest.mark.parametrize("rows", [LENGTH, 90])
@pytest.mark.parametrize("share", [None, 0.0, 0.4])
@pytest.mark.parametrize("qk_norm", ["none", "head"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_gradients_are_those_of_float64(
    dtype: torch.dtype, bound: float, qk_norm: str, share: float | None, rows: int
) -> None:
    on_device, exact = decoders(qk_norm, dtype)
    wanted = gradients(exact, None, LENGTH)
    assert distance(gradients(on_device, share, rows), wanted) < bound


@pytest.mark.parametrize("rows", [WHOLE, 512, 300])
def test_texts_that_cudnn_serves(rows: int, caplog: pytest.LogCaptureFixture) -> None:
    """Alone from their first row; the rows behind it are Triton's."""
    caplog.set_level("DEBUG", attention_backward.__name__)
    on_device, exact = decoders("none", torch.bfloat16)
    wanted = gradients(exact, None, WHOLE, length=WHOLE)
    for share in (None, 0.4):
        assert distance(gradients(on_device, share, rows, length=WHOLE), wanted) < 5e-2
    if torch.cuda.get_device_capability() == (9, 0):
        assert any(message.endswith("by cudnn") for message in caplog.messages) == (rows != 300)


@pytest.mark.parametrize("rows", [WHOLE, 300])
@pytest.mark.parametrize("share", [0.02, 0.4])
def test_what_waits_on_the_host_comes_back_in_time(
    share: float, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Again and again, the device's queue full: a copy that somebody does not wait for shows."""
    monkeypatch.setattr(layer_backward, "attention_backward", own_attention_backward)
    on_device, _ = decoders("none", torch.bfloat16)
    wanted = gradients(on_device, None, rows, length=WHOLE)
    shelf = HostShelf(HostRoom(64 << 20, 1e12), torch.device(DEVICE))
    assert distance(gradients(on_device, share, rows, length=WHOLE, shelf=shelf), wanted) < 2e-2
    first = gradients(on_device, share, rows, length=WHOLE, shelf=shelf)
    blocker = torch.randn(4096, 4096, device=DEVICE)
    for _ in range(5):
        for _ in range(20):
            blocker = torch.tanh(blocker @ blocker)
        again = gradients(on_device, share, rows, length=WHOLE, shelf=shelf)
        assert all(torch.equal(again[name], value) for name, value in first.items())
    assert shelf.lent == 0


def test_memory_of_the_host_is_locked_and_unlocked() -> None:
    shelf = HostShelf(HostRoom(8 << 20), torch.device(DEVICE))
    start = shelf.lend(1 << 20)
    assert start == 0
    value = torch.randn(1 << 18, device=DEVICE)
    kept = value.clone()
    copy = shelf.send(value, start)
    copy.wait()
    value.zero_()
    back, arrived = shelf.bring(start, (1 << 18,), torch.float32, copy)
    arrived.wait()
    assert torch.equal(back, kept)
    memory = shelf._memory
    assert memory.is_pinned()
    del shelf
    assert not memory.is_pinned()
