"""Windows and units against one-shot autograd, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.fine_tuning import (
    BYPASSES,
    CONFIGS,
    Document,
    by_windows,
    one_shot,
    random_decoder,
    random_document,
    random_parameters,
    run_flat,
    suited,
    take_gradients,
)
from tests.models.pages import Pages, Text

from invivo.engine.bypasses import BypassSpec, n_virtual
from invivo.engine.graph_pruning import differentiate
from invivo.engine.memory_plan import plan_activations
from invivo.engine.tape import Entry, Tape, TapePlan
from invivo.engine.tape_budget import Budgets
from invivo.engine.train_sequence import TrainSequence, next_token_labels
from invivo.engine.trainable import Trainable
from invivo.engine.training_graph import build_graph
from invivo.engine.types import BackwardUnit
from invivo.engine.window import Mode, Order, WindowTrainer
from invivo.errors import InvalidRequest
from invivo.models.config import ModelConfig

WAYS: list[tuple[Mode, Order]] = [
    ("rerun", "window"),
    ("rerun", "layer"),
    ("tape", "window"),
    ("tape", "layer"),
]


def assert_close(got: torch.Tensor, wanted: torch.Tensor, name: str) -> None:
    scale = max(1.0, float(wanted.abs().max()))
    error = float((got - wanted).abs().max()) / scale
    assert error < 1e-9, f"{name}: {error}"


def check(
    model: str,
    bypass: str,
    mode: Mode,
    order: Order,
    *,
    seed: int,
    lengths: tuple[int, ...] = (13,),
    input_gradients: bool = False,
    weighted: bool = False,
    neighbour: bool = False,
    budget: float | None = None,
) -> None:
    """``budget``: share of the largest tape that is allowed, where the smallest is not larger."""
    config = CONFIGS[model]
    specs = suited(config, BYPASSES[bypass])
    if not specs:
        return
    decoder = random_decoder(model)
    parameters = random_parameters(config, specs)
    virtual = n_virtual(specs)
    documents = [
        random_document(config, n, seed=seed + i, n_virtual=virtual, weighted=weighted)
        for i, n in enumerate(lengths)
    ]
    loss, gradients, streams = one_shot(decoder, specs, parameters, documents)
    pages = Pages(decoder)
    trainer = WindowTrainer(
        decoder,
        pages.cache,
        specs,
        parameters,
        mode=mode,
        order=order,
        input_gradients=input_gradients,
        tape_bytes=tape_bytes(trainables_of(specs), config, documents, input_gradients, budget),
    )
    got_loss, got_streams = by_windows(trainer, pages, documents, seed=seed, neighbour=neighbour)
    got = take_gradients(parameters)
    assert abs(got_loss - loss) < 1e-9 * max(1.0, abs(loss))
    for name, wanted in gradients.items():
        assert_close(got[name], wanted, name)
    for stream, wanted in zip(got_streams, streams, strict=True):
        if input_gradients:
            assert stream is not None
            assert_close(stream, wanted, "embeddings")


def trainables_of(specs: tuple[BypassSpec, ...]) -> list[Trainable]:
    return [spec.trainable for spec in specs]


def tape_bytes(
    trainables: list[Trainable],
    config: ModelConfig,
    documents: list[Document],
    input_gradients: bool,
    budget: float | None,
) -> int | None:
    """Bytes between those of the smallest and those of the largest tape."""
    if budget is None:
        return None
    if input_gradients and all(each.kind != "soft_prompt" for each in trainables):
        trainables = [*trainables, Trainable("soft_prompt", size=1)]
    graph = build_graph(config, trainables, length=1, dtype="float64")
    budgets = Budgets(config, graph, differentiate(graph))
    bits = budgets.least_bits + budget * (budgets.most_bits - budgets.least_bits)
    return math.ceil(bits / 8 * max(len(doc.tokens) for doc in documents))


@pytest.mark.parametrize("bypass", BYPASSES)
@pytest.mark.parametrize("model", CONFIGS)
def test_a_tape_of_any_size_gives_the_same_gradients(model: str, bypass: str) -> None:
    check(model, bypass, "tape", "layer", seed=8, budget=0.0)
    check(model, bypass, "tape", "window", seed=9, budget=0.45)


@pytest.mark.parametrize("budget", [0.05, 0.15, 0.3, 0.6, 0.85])
@pytest.mark.parametrize("model", ["llama", "qwen3", "gemma2"])
def test_whatever_a_budget_lets_run_again_gives_the_same_gradients(
    model: str, budget: float
) -> None:
    check(model, "lora all", "tape", "layer", seed=3, budget=budget)
    check(model, "lora down", "tape", "window", seed=4, lengths=(7, 12), budget=budget)


@pytest.mark.parametrize("bypass", BYPASSES)
@pytest.mark.parametrize("model", CONFIGS)
def test_tape_gives_the_gradients_of_one_shot_autograd(model: str, bypass: str) -> None:
    check(model, bypass, "tape", "window", seed=5)


@pytest.mark.parametrize("bypass", BYPASSES)
def test_every_bypass_in_every_way(bypass: str) -> None:
    for mode, order in WAYS:
        check("llama", bypass, mode, order, seed=6)


@pytest.mark.parametrize("model", CONFIGS)
def test_every_model_in_every_way(model: str) -> None:
    for mode, order in WAYS:
        check(model, "several", mode, order, seed=7, lengths=(9,), input_gradients=True)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    model=st.sampled_from(sorted(CONFIGS)),
    bypass=st.sampled_from(sorted(BYPASSES)),
    way=st.sampled_from(WAYS),
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=3),
    seed=st.integers(0, 10_000),
    input_gradients=st.booleans(),
    weighted=st.booleans(),
    neighbour=st.booleans(),
    budget=st.one_of(st.none(), st.floats(0.0, 1.0)),
)
def test_no_cut_packing_or_neighbour_changes_a_gradient(
    model: str,
    bypass: str,
    way: tuple[Mode, Order],
    lengths: list[int],
    seed: int,
    input_gradients: bool,
    weighted: bool,
    neighbour: bool,
    budget: float | None,
) -> None:
    check(
        model,
        bypass,
        *way,
        seed=seed,
        lengths=tuple(lengths),
        input_gradients=input_gradients,
        weighted=weighted,
        neighbour=neighbour,
        budget=budget,
    )


@pytest.mark.parametrize(("mode", "order"), WAYS)
def test_windows_of_one_row_and_of_all_rows(mode: Mode, order: Order) -> None:
    config, specs = CONFIGS["llama"], BYPASSES["lora all"]
    decoder = random_decoder("llama")
    parameters = random_parameters(config, specs)
    doc = random_document(config, 7, seed=2)
    _, wanted, _ = one_shot(decoder, specs, parameters, [doc])
    for width in (1, 7):
        pages = Pages(decoder)
        trainer = WindowTrainer(decoder, pages.cache, specs, parameters, mode=mode, order=order)
        sequence, text = fresh(doc, pages)
        trainer.begin(sequence)
        for start in range(0, 7, width):
            run_flat(trainer, pages, sequence, [(text, width)], text, start, start + width)
            text.n_done += width
        units = trainer.units(sequence, width)
        assert sum((u.stop - u.start) * (u.last_layer - u.first_layer) for u in units) == 7 * 3
        for unit in units:
            assert unit == trainer.next_unit(sequence, width)
            trainer.run(sequence, unit)
        assert trainer.next_unit(sequence, width) is None
        assert trainer.done(sequence)
        for name, got in take_gradients(parameters).items():
            assert_close(got, wanted[name], name)


@pytest.mark.parametrize(
    ("model", "bypass"),
    [("llama", bypass) for bypass in BYPASSES]
    + [(model, "lora all") for model in CONFIGS]
    + [(model, "several") for model in CONFIGS],
)
def test_a_text_that_ran_in_one_piece_in_inference_mode(model: str, bypass: str) -> None:
    """As the engine runs it: the tape takes the forward's own tensors."""
    config = CONFIGS[model]
    specs = suited(config, BYPASSES[bypass])
    decoder = random_decoder(model)
    parameters = random_parameters(config, specs)
    doc = random_document(config, 9, seed=3, n_virtual=n_virtual(specs))
    _, wanted, _ = one_shot(decoder, specs, parameters, [doc])
    for budget in (None, 0.4):
        pages = Pages(decoder)
        trainer = WindowTrainer(
            decoder,
            pages.cache,
            specs,
            parameters,
            order="layer",
            tape_bytes=tape_bytes(trainables_of(specs), config, [doc], False, budget),
        )
        sequence, text = fresh(doc, pages)
        trainer.begin(sequence)
        n = sequence.length
        with torch.inference_mode():
            run_flat(trainer, pages, sequence, [(text, n)], text, 0, n)
        while (unit := trainer.next_unit(sequence, n)) is not None:
            trainer.run(sequence, unit)
        for name, got in take_gradients(parameters).items():
            assert_close(got, wanted[name], name)


def test_a_tape_takes_a_whole_tensor_as_it_is_and_copies_any_other() -> None:
    half = Entry((4,), "float32")
    plan = TapePlan({(0, name): half for name in ("mlp.gate", "mlp.up", "resid.mid")})
    product = torch.randn(3, 8)
    gate, up = product.chunk(2, dim=-1)
    tape = Tape.of(plan, 3)
    tape.take(0, "mlp.gate", 0, gate)
    tape.take(0, "mlp.up", 0, up)
    tape.take(0, "resid.mid", 0, up)  # its memory holds more
    tape.take(0, "mlp.neuron", 0, up)  # not kept
    assert tape.n_bytes == 3 * 3 * 4 * 4
    shared = {name: tape.held[0, name].data_ptr() for _, name in tape.held}
    assert shared["mlp.gate"] == gate.data_ptr()
    assert shared["mlp.up"] == up.data_ptr()
    assert shared["resid.mid"] != up.data_ptr()
    part = torch.randn(2, 4)
    tape = Tape.of(plan, 3)
    tape.take(0, "resid.mid", 1, part)
    tape.write(0, "resid.mid", 0, up[:1])
    kept = tape.read(0, "resid.mid", 0, 3)
    assert kept is not None
    assert torch.equal(kept, torch.cat((up[:1], part)))


@pytest.mark.parametrize(("mode", "order"), WAYS)
def test_a_micro_step_begun_again_forgets_the_first(mode: Mode, order: Order) -> None:
    """A victim of memory pressure loses its blocks in the middle of the forward."""
    config, specs = CONFIGS["llama"], BYPASSES["lora q v"]
    decoder = random_decoder("llama")
    parameters = random_parameters(config, specs)
    doc = random_document(config, 12, seed=4)
    loss, wanted, _ = one_shot(decoder, specs, parameters, [doc])
    pages = Pages(decoder)
    trainer = WindowTrainer(decoder, pages.cache, specs, parameters, mode=mode, order=order)
    sequence, text = fresh(doc, pages)
    trainer.begin(sequence)
    run_flat(trainer, pages, sequence, [(text, 5)], text, 0, 5)
    again, text = fresh(doc, pages)
    sequence.blocks = again.blocks
    trainer.begin(sequence)
    run_flat(trainer, pages, sequence, [(text, 12)], text, 0, 12)
    for unit in trainer.units(sequence, 5):
        trainer.run(sequence, unit)
    assert abs(float(sequence.loss) - loss) < 1e-9
    for name, got in take_gradients(parameters).items():
        assert_close(got, wanted[name], name)


@pytest.mark.parametrize("bypass", BYPASSES)
@pytest.mark.parametrize("model", CONFIGS)
def test_bytes_held_equal_the_plan(model: str, bypass: str) -> None:
    config, length = CONFIGS[model], 10
    specs = suited(config, BYPASSES[bypass])
    if not specs:
        return
    virtual = n_virtual(specs)
    decoder = random_decoder(model, dtype=torch.float32)
    parameters = random_parameters(config, specs, dtype=torch.float32)
    trainables = [spec.trainable for spec in specs]
    of_prompt = sum(s.size for s in specs if s.kind == "soft_prompt")
    plan = plan_activations(
        config, trainables, length=length + virtual - of_prompt, dtype="float32"
    )
    inside_mixtures = sum(
        row.n_bytes for row in plan.rows if row.held == "tape" and row.name.startswith("moe.")
    )
    doc = random_document(config, length, seed=1, n_virtual=virtual)
    for mode, order in WAYS:
        pages = Pages(decoder)
        trainer = WindowTrainer(decoder, pages.cache, specs, parameters, mode=mode, order=order)
        sequence, text = fresh(doc, pages)
        trainer.begin(sequence)
        run_flat(trainer, pages, sequence, [(text, sequence.length)], text, 0, sequence.length)
        unit = trainer.next_unit(sequence, 4)
        tape, sums = held_bytes(trainer, sequence, unit)
        parts = dict(plan.schedule(f"{'v1' if mode == 'rerun' else 'v2'} {order}-outer").parts)
        del parts["kv"]
        assert sums == parts.pop("dkv"), (mode, order)
        # The insides of mixtures are rerun and not kept.
        assert tape == sum(parts.values()) - (inside_mixtures if mode == "tape" else 0)
        take_gradients(parameters)


def held_bytes(
    trainer: WindowTrainer, sequence: TrainSequence, unit: BackwardUnit | None
) -> tuple[int, int]:
    """Bytes of the tape with the loss's gradient, and most bytes of sums, during a backward."""
    assert unit is not None
    assert sequence.dx is not None
    tape = sequence.dx.numel() * sequence.dx.element_size()
    if sequence.tape is not None:
        tape += sequence.tape.n_bytes
    trainer.run(sequence, unit)
    most = 0
    while True:
        sums = [t for pair in sequence.sums.values() for t in pair if t is not None]
        most = max(most, sum(t.numel() * t.element_size() for t in sums))
        following = trainer.next_unit(sequence, 4)
        if following is None:
            break
        trainer.run(sequence, following)
    assert sequence.tape is None
    assert not sequence.sums
    return tape, most


def fresh(doc: Document, pages: Pages) -> tuple[TrainSequence, Text]:
    """The document as a training sequence with blocks of its own."""
    text = Text(doc.tokens.tolist())
    while len(text.blocks) * pages.block_size < len(text.tokens):
        text.blocks.append(pages.free.pop())
    return TrainSequence(doc.tokens, doc.labels, list(text.blocks), doc.weights), text


def test_packed_matrices_train_as_plain_ones() -> None:
    config, specs = CONFIGS["llama"], BYPASSES["lora all"]
    doc = random_document(config, 20, seed=1)
    found = []
    for packs in (False, True):
        decoder = random_decoder("llama", dtype=torch.float32)
        if packs:
            decoder.pack()
        parameters = random_parameters(config, specs, dtype=torch.float32)
        for mode, order in WAYS:
            pages = Pages(decoder)
            trainer = WindowTrainer(decoder, pages.cache, specs, parameters, mode=mode, order=order)
            loss, _ = by_windows(trainer, pages, [doc], seed=3)
            found.append((loss, take_gradients(parameters)))
    first_loss, first = found[0]
    for loss, gradients in found[1:]:
        assert abs(loss - first_loss) < 1e-4
        for name, wanted in first.items():
            torch.testing.assert_close(gradients[name], wanted, rtol=1e-3, atol=1e-4)


def test_labels_look_one_token_ahead_and_skip_what_is_not_learned() -> None:
    tokens = torch.tensor([5, 6, 7, 8])
    assert next_token_labels(tokens).tolist() == [6, 7, 8, -100]
    learned = torch.tensor([True, False, True, True])
    assert next_token_labels(tokens, learned).tolist() == [-100, 7, 8, -100]


def test_a_text_whose_tape_cannot_be_so_small_is_refused() -> None:
    config, specs = CONFIGS["llama"], BYPASSES["lora down"]
    decoder = random_decoder("llama")
    parameters = random_parameters(config, specs)
    least = tape_bytes(
        trainables_of(specs), config, [random_document(config, 10, seed=0)], False, 0
    )
    trainer = WindowTrainer(decoder, Pages(decoder).cache, specs, parameters, tape_bytes=least)
    trainer.check_length(10)
    with pytest.raises(InvalidRequest, match="11 tokens"):
        trainer.check_length(11)


@pytest.mark.parametrize("budget", [0.0, 0.3, 1.0])
def test_bytes_held_stay_within_the_budget_and_equal_the_plan(budget: float) -> None:
    config, specs = CONFIGS["llama"], BYPASSES["lora all"]
    decoder = random_decoder("llama")
    parameters = random_parameters(config, specs)
    doc = random_document(config, 20, seed=1)
    allowed = tape_bytes(trainables_of(specs), config, [doc], False, budget)
    assert allowed is not None
    plan = plan_activations(
        config, trainables_of(specs), length=20, dtype="float64", tape_bytes=allowed
    )
    pages = Pages(decoder)
    trainer = WindowTrainer(
        decoder, pages.cache, specs, parameters, order="layer", tape_bytes=allowed
    )
    sequence, text = fresh(doc, pages)
    trainer.begin(sequence)
    run_flat(trainer, pages, sequence, [(text, 20)], text, 0, 20)
    held, _ = held_bytes(trainer, sequence, trainer.next_unit(sequence, 4))
    assert held == plan.totals.compressed <= allowed
