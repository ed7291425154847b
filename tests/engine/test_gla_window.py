"""Fine-tuning through recurrent layers: the state's gradient carries exactly over every cut."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.drive import ask, run, small_engine
from tests.engine.test_finetune import UNHURRIED, Listed, drive, plain_loop, start
from tests.engine.test_gla import greedy, logprobs_of, prompt, served
from tests.models.gla_models import SHAPES, memory_of, spans_layout, tiny_decoder, tiny_gla

from invivo.engine import step
from invivo.engine.bypasses import BypassSpec, TrainBypass, checked_specs, init_parameters
from invivo.engine.job_spec import JobSpec, Text
from invivo.engine.memory_plan import plan_activations
from invivo.engine.peft_format import to_peft
from invivo.engine.train_sequence import TrainSequence, next_token_labels
from invivo.engine.window import WindowTrainer
from invivo.errors import InvalidRequest, UnsupportedModel
from invivo.kernels.paging import contiguous_layout
from invivo.models.cache import allocate_kv_cache
from invivo.models.load import random_model

LORA = BypassSpec("lora", ("q", "k", "v", "r", "o", "down"), 2)
BYPASSES = {
    "lora": (LORA,),
    "top": (BypassSpec("lora", ("v",), 2, layers=(2,)),),
    "others": (
        BypassSpec("ia3", ("k", "v")),
        BypassSpec("adapter", ("attn.in",), 2),
        BypassSpec("soft_prompt", (), 2),
    ),
}


def parameters_of(specs: tuple[BypassSpec, ...], shape: str) -> dict[str, torch.Tensor]:
    config = tiny_decoder(shape).config
    rng = torch.Generator().manual_seed(4)
    made = {}
    for spec in checked_specs(config, specs):
        made |= init_parameters(spec, config, seed=1, dtype=torch.float64)
    for value in made.values():
        value += 0.1 * torch.randn(value.shape, generator=rng, dtype=torch.float64)
        value.requires_grad_()
    return made


def cuts_of(n: int, widths: list[int]) -> list[tuple[int, int]]:
    found, first = [], 0
    while first < n:
        stop = min(n, first + widths[len(found) % len(widths)])
        found.append((first, stop))
        first = stop
    return found


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from(sorted(SHAPES)),
    bypass=st.sampled_from(sorted(BYPASSES)),
    n=st.integers(1, 30),
    forward=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    backward=st.integers(1, 13),
    input_gradients=st.booleans(),
)
def test_no_cut_changes_a_gradient(
    shape: str, bypass: str, n: int, forward: list[int], backward: int, input_gradients: bool
) -> None:
    decoder, specs = tiny_decoder(shape), BYPASSES[bypass]
    parameters = parameters_of(specs, shape)
    tokens = torch.tensor(prompt(n, n))
    labels = next_token_labels(tokens)

    whole = TrainBypass(decoder.config, specs, parameters).window(0, n)
    layout = contiguous_layout([n], block_size=4)
    hidden = decoder(tokens, layout, memory_of(decoder.config), bypass=whole)
    loss = F.cross_entropy(decoder.logits(hidden), labels, ignore_index=-100, reduction="sum")
    names = list(parameters)
    found = [None] * len(names)
    if loss.requires_grad:
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)

    cache = memory_of(decoder.config)
    trainer = WindowTrainer(
        decoder,
        cache,
        specs,
        parameters,
        mode="rerun",
        order="window",
        input_gradients=input_gradients,
    )
    sequence = TrainSequence(tokens, labels, list(range(21, 31)))
    trainer.begin(sequence)
    for first, stop in cuts_of(n, forward):
        trainer.enters(sequence, first, 3)
        with torch.inference_mode():
            states = decoder(
                tokens[first:stop],
                spans_layout([(first, stop, 3)]),
                cache,
                bypass=trainer.bypass.window(first, stop),
            )
        trainer.forward_done(sequence, first, stop, states.clone())
    assert torch.allclose(sequence.loss, loss.detach(), rtol=1e-10)
    while (unit := trainer.next_unit(sequence, backward)) is not None:
        trainer.run(sequence, unit)
    for name, wanted in zip(names, found, strict=True):
        got = parameters[name].grad
        got = torch.zeros(()) if got is None else got
        wanted = torch.zeros(()) if wanted is None else wanted
        assert float((got - wanted).abs().max()) < 1e-9 * max(1.0, float(wanted.abs().max())), name


@pytest.mark.parametrize(("mode", "order"), [("tape", "window"), ("rerun", "layer")])
def test_other_ways_are_refused(mode: str, order: str) -> None:
    decoder = tiny_decoder()
    parameters = parameters_of((LORA,), "plain")
    with pytest.raises(UnsupportedModel):
        WindowTrainer(
            decoder, memory_of(decoder.config), (LORA,), parameters, mode=mode, order=order
        )


def test_a_prefix_is_refused_with_the_reason() -> None:
    with pytest.raises(InvalidRequest) as caught:
        checked_specs(tiny_decoder().config, [BypassSpec("prefix", (), 2)])
    assert caught.value.remedy == "Train a soft_prompt"


@pytest.mark.parametrize("shape", SHAPES)
def test_a_lora_is_served_and_survives_its_file(shape: str) -> None:
    """Rows with it beside rows without; the file has flash-linear-attention's module names."""
    model = served(shape)
    config, specs = model.config, checked_specs(model.config, [LORA])
    parameters = {k: v.detach() for k, v in parameters_of((LORA,), shape).items()}
    described, tensors = to_peft(specs, parameters, config, "tiny-gla")
    assert "base_model.model.model.layers.0.attn.g_proj.lora_A.weight" in tensors
    engine = small_engine(model, block_size=4)
    engine.adapters.load("mine", (described, tensors))
    text = prompt(11, 2)
    mine = ask(engine, text, temperature=0, max_tokens=5, adapter="mine")
    plain = ask(engine, text, temperature=0, max_tokens=5)
    run(engine, mine, plain)
    assert plain.tokens() == greedy(model, text, 5)
    bypass = TrainBypass(config, specs, parameters)
    tokens = list(text)
    with torch.inference_mode():
        for _ in range(5):
            n = len(tokens)
            hidden = model.decoder(
                torch.tensor(tokens),
                contiguous_layout([n], block_size=4),
                memory_of(config),
                bypass=bypass.window(0, n),
            )
            tokens.append(int(model.decoder.logits(hidden)[-1].argmax()))
    assert mine.tokens() == tokens[-5:]


@pytest.mark.parametrize("shape", ["plain", "hybrid"])
def test_a_job_learns_beside_requests_as_a_plain_loop_does(shape: str) -> None:
    """Its losses are those of autograd over whole texts; the requests' text is the untouched
    model's."""
    model = served(shape)
    learned = [prompt(23, 70 + i) for i in range(3)]
    data = Listed([Text(t, [*t[1:], -100], None) for t in learned])
    spec = JobSpec(
        name="poet", bypasses=(LORA,), steps=6, learning_rate=0.05, gradient_accumulation=1
    )
    engine = small_engine(model, block_size=4, max_batch_tokens=16, max_running=4, **UNHURRIED)
    job = start(engine, spec, data)
    asked = [ask(engine, prompt(9, i), temperature=0, max_tokens=12) for i in range(3)]
    drive(engine, job)
    run(engine, *asked)
    for i, inquiry in enumerate(asked):
        assert inquiry.tokens() == greedy(model, prompt(9, i), 12)
    assert job.handle is not None
    losses, _ = plain_loop(model, spec, Listed(data.texts), torch.optim.AdamW)
    assert job.handle.losses == pytest.approx(losses, rel=1e-6)


class NoTraining:
    """Riders with nothing to do."""

    edited: tuple[Any, ...] = ()

    def on_board(self, inner: Any, layout: Any) -> tuple[Any, None]:
        return inner, None

    def learn(self, hidden: Any, layout: Any) -> None:
        raise AssertionError("the step has raised")


@pytest.mark.parametrize("where", ["layer", "drawing"])
def test_a_step_that_is_run_again_moves_no_state_twice(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Every step raises in its last layer, or where tokens are drawn, with training on board, and
    is repeated without."""
    model = served("hybrid")
    engine = small_engine(model, block_size=4, max_batch_tokens=5, max_running=4)
    last, stepper = model.decoder.layers[-1], engine._stepper
    launch = stepper.launch

    def fails(*_: Any) -> None:
        raise RuntimeError("made to fail")

    def twice(batch: Any, work: Any, *_: Any) -> Any:
        with monkeypatch.context() as broken:
            if where == "layer":
                broken.setattr(last, "forward", fails)
            else:
                broken.setattr(step, "sample", fails)
                broken.setattr(NoTraining, "learn", fails)  # where a step draws nothing
            with pytest.raises(RuntimeError, match="made to fail"):
                launch(batch, work, NoTraining())
        return launch(batch, work)

    monkeypatch.setattr(stepper, "launch", twice)
    inquiry = ask(engine, prompt(9, 1), temperature=0, max_tokens=12, logprobs=0)
    run(engine, inquiry)
    assert len(inquiry.tokens()) == 12, inquiry.outputs[-1].error
    exact = logprobs_of(model, prompt(9, 1) + inquiry.tokens())[8:-1].max(-1).values
    assert inquiry.logprobs() == pytest.approx(exact.tolist(), abs=1e-6)


# --- what is held --------------------------------------------------------------------------------
HELD = {
    "all maps": LORA,
    "output": BypassSpec("lora", ("o",), 2),
    "queries": BypassSpec("lora", ("q",), 2),
    "upper values": BypassSpec("lora", ("v",), 2, layers=(1, 2)),
    "gate": BypassSpec("lora", ("r", "gate"), 2, layers=(0,)),
    "experts' way": BypassSpec("adapter", ("attn.out",), 2),
}


@pytest.mark.parametrize("shape", ["plain", "convolution"])
@pytest.mark.parametrize("trained", HELD)
def test_a_job_holds_what_the_plan_says_to_the_byte(shape: str, trained: str) -> None:
    """Between forward and backward, and what autograd holds of a window while it runs again."""
    decoder, spec = random_model(tiny_gla(shape), dtype=torch.float32), HELD[trained]
    config, length, window = decoder.config, 22, 8
    parameters = {}
    for each in checked_specs(config, (spec,)):
        parameters |= init_parameters(each, config, seed=1, dtype=torch.float32)
    for value in parameters.values():
        value.requires_grad_()
    plan = plan_activations(config, [spec.trainable], length=length, window=window, dtype="float32")
    (schedule,) = plan.schedules
    assert schedule.name == "v1 window-outer"
    cache = allocate_kv_cache(
        config, n_blocks=40, block_size=4, device="cpu", dtype=torch.float32, n_slots=8
    )
    trainer = WindowTrainer(decoder, cache, (spec,), parameters, mode="rerun", order="window")
    tokens = torch.tensor(prompt(length, 3))
    sequence = TrainSequence(tokens, next_token_labels(tokens), list(range(21, 31)))
    trainer.begin(sequence)
    for first, stop in cuts_of(length, [window]):
        trainer.enters(sequence, first, 3)
        with torch.inference_mode():
            states = decoder(tokens[first:stop], spans_layout([(first, stop, 3)]), cache)
        trainer.forward_done(sequence, first, stop, states.clone())

    def n_bytes(tensors: Iterable[torch.Tensor]) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    assert sequence.dx is not None
    assert sequence.tape is None
    assert n_bytes([sequence.dx]) == schedule.parts["dx"]
    assert (
        n_bytes(t for pair in sequence.entering.values() for t in pair) == schedule.parts["states"]
    )
    known = {p.untyped_storage().data_ptr() for p in (*decoder.parameters(), *parameters.values())}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in known and tensor.dtype.is_floating_point:
            saved.setdefault(address, tensor)
        return tensor

    unit = trainer.next_unit(sequence, length - 2 * window)
    assert unit is not None
    assert (unit.start, unit.stop) == (2 * window, length)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trainer.run(sequence, unit)
    held = sum(t.untyped_storage().nbytes() for t in saved.values())
    again = sum(
        row.bytes_per_token * max(1, len(row.layers)) for row in plan.rows if row.held == "window"
    )
    reached = {
        i
        for row in plan.rows
        if row.held == "window" and row.name == "gla.gate"
        for i in row.layers
    }
    gla = config.gla
    assert gla is not None
    state = gla.n_heads * gla.head_k * gla.head_v * 4
    tail = max(0, gla.conv_size - 1) * gla.qkv_width * 4
    assert held == again * (length - 2 * window) + len(reached) * (2 * state + tail)
    sums = [t for pair in sequence.sums.values() for t in pair if t is not None]
    assert n_bytes(sums) == schedule.parts["dstates"]
