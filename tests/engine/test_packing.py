"""Several texts as one training sequence: the same gradients as text by text, to 1e-9."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.drive import small_engine
from tests.engine.fine_tuning import (
    BYPASSES,
    CONFIGS,
    Document,
    _SomeRows,
    one_shot,
    random_cuts,
    random_decoder,
    random_document,
    random_parameters,
    suited,
    take_gradients,
)
from tests.engine.test_finetune import (
    LORA,
    UNHURRIED,
    VIRTUAL,
    drive,
    nothing_is_held,
    plain_loop,
    random_requests,
    same,
    start,
    texts,
    trained,
)
from tests.engine.test_validation import held_out, plain_outcome, validating
from tests.engine.test_window import WAYS, assert_close
from tests.models.pages import Pages, Text
from tests.tiny import tiny_loaded

from invivo.engine.bypasses import n_virtual
from invivo.engine.job_spec import JobSpec
from invivo.engine.packing import packing_of, parts
from invivo.engine.recording import Recording
from invivo.engine.train_sequence import TrainSequence
from invivo.engine.types import BackwardUnit, Purpose
from invivo.engine.window import Mode, Order, WindowTrainer
from invivo.models.load import LoadedModel

LENGTHS = (7, 1, 13, 4, 9)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return tiny_loaded(Path(tmp_path_factory.mktemp("exact")), dtype=torch.float64)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    size=st.sampled_from([4, 16]),
    cut=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_parts_are_the_rows_of_each_text(lengths: list[int], size: int, cut: Any) -> None:
    packing = packing_of(lengths, size)
    whole = sum(lengths)
    first = cut.draw(st.integers(0, whole - 1))
    last = cut.draw(st.integers(first + 1, whole))
    own = parts(packing, first, last)
    assert [row for part in own for row in range(part.start, part.stop)] == list(range(first, last))
    owner = [i for i, n in enumerate(lengths) for _ in range(n)]
    begins = [sum(lengths[:i]) for i in range(len(lengths))]
    blocks = [sum(-(-n // size) for n in lengths[:i]) for i in range(len(lengths))]
    for part in own:
        (text,) = {owner[row] for row in range(part.start, part.stop)}
        assert (part.begin, part.block) == (begins[text], blocks[text])
    assert len({part.begin for part in own}) == len(own)
    assert packing is None or packing.n_blocks == sum(-(-n // size) for n in lengths)


def by_packs(
    trainer: WindowTrainer, pages: Pages, documents: list[Document], *, seed: int
) -> tuple[float, torch.Tensor | None]:
    """Loss of all documents as one sequence, cut at random; parameters gather their gradients."""
    rng = random.Random(seed)
    size = pages.block_size
    packing = packing_of([len(doc.tokens) for doc in documents], size)
    each = [Text(doc.tokens.tolist()) for doc in documents]
    for text in each:
        text.blocks = [pages.free.pop() for _ in range(-(-len(text.tokens) // size))]
    weights = None
    if documents[0].weights is not None:
        weights = torch.cat([doc.weights for doc in documents])  # type: ignore[misc]
    sequence = TrainSequence(
        torch.cat([doc.tokens for doc in documents]),
        torch.cat([doc.labels for doc in documents]),
        [block for text in each for block in text.blocks],
        weights,
        packing=packing,
    )
    trainer.begin(sequence)
    begins = sequence.begins
    for width in random_cuts(sequence.length, rng.random()):
        first, last = sequence.forwarded, sequence.forwarded + width
        own = parts(packing, first, last)
        spans = [(each[begins.index(part.begin)], part.stop - part.start) for part in own]
        layout = pages.layout(spans)
        layout.n_decode = 0  # as in a plan: training comes last
        bypass = _SomeRows(trainer.bypass.window(first, last, begins), slice(0, width))  # type: ignore[union-attr]
        with torch.no_grad():
            taps = None
            if trainer.records:
                pieces = [trainer.piece(sequence, first, last, 0)]
                taps = Recording(trainer.decoder, pages.cache, bypass, pieces)
            hidden = trainer.decoder(
                sequence.tokens[first:last],
                layout,
                pages.cache,
                bypass=bypass if taps is None else taps.bypass,
                taps=taps,
            )
        trainer.forward_done(sequence, first, last, hidden)
        for text, n in spans:
            text.n_done += n
    while (
        unit := trainer.next_unit(sequence, rng.randint(1, sequence.length), rng.randint(1, 3))
    ) is not None:
        trainer.run(sequence, unit)
    assert sequence.loss is not None
    return float(sequence.loss), sequence.d_embeddings


def check(model: str, bypass: str, mode: Mode, order: Order, *, seed: int, **options: Any) -> None:
    config = CONFIGS[model]
    specs = suited(config, BYPASSES[bypass])
    if not specs:
        return
    decoder, parameters = random_decoder(model), random_parameters(config, specs)
    virtual, weighted = n_virtual(specs), options.pop("weighted", False)
    documents = [
        random_document(config, n, seed=seed + i, n_virtual=virtual, weighted=weighted)
        for i, n in enumerate(LENGTHS)
    ]
    loss, gradients, streams = one_shot(decoder, specs, parameters, documents)
    pages = Pages(decoder)
    trainer = WindowTrainer(
        decoder, pages.cache, specs, parameters, mode=mode, order=order, **options
    )
    got_loss, stream = by_packs(trainer, pages, documents, seed=seed)
    got = take_gradients(parameters)
    assert abs(got_loss - loss) < 1e-9 * max(1.0, abs(loss))
    for name, wanted in gradients.items():
        assert_close(got[name], wanted, name)
    if options.get("input_gradients"):
        assert stream is not None
        assert_close(stream, torch.cat(streams), "embeddings")


@pytest.mark.parametrize("bypass", BYPASSES)
def test_every_bypass_in_every_way(bypass: str) -> None:
    for i, (mode, order) in enumerate(WAYS):
        check("llama", bypass, mode, order, seed=10 * i)


@pytest.mark.parametrize("model", CONFIGS)
def test_every_model_in_every_way(model: str) -> None:
    for i, (mode, order) in enumerate(WAYS):
        check(model, "several", mode, order, seed=10 * i + 1, weighted=True)


def test_gradients_by_the_embeddings_and_small_tapes() -> None:
    for mode, order in WAYS:
        check("gemma2", "lora down", mode, order, seed=4, input_gradients=True)
    check("qwen3", "lora q v", "tape", "layer", seed=5, tape_bytes=40_000)


@pytest.mark.parametrize(
    ("bypasses", "options"),
    [
        (LORA, {}),
        (LORA, {"order": "layer"}),
        (LORA, {"mode": "rerun"}),
        (VIRTUAL, {}),
        (VIRTUAL, {"mode": "rerun", "order": "layer"}),
    ],
)
def test_a_job_of_packed_texts_is_the_plain_loop(
    exact: LoadedModel, bypasses: Any, options: dict[str, Any]
) -> None:
    short = {"longest": 24, "weighted": True}
    spec = JobSpec("j", bypasses, 4, 0.01, gradient_accumulation=5, **options)
    expected, parameters = plain_loop(exact, spec, texts(**short), torch.optim.AdamW)
    engine = small_engine(exact, max_batch_tokens=64, max_running=8, **UNHURRIED)
    packs: list[int] = []
    plan = engine._finetuning.plan

    def watched(now: float, busy: float | None) -> Any:
        made = plan(now, busy)
        spans = [] if made is None else made.spans
        packs.append(sum(span.purpose is Purpose.TRAIN for span in spans))
        return made

    engine._finetuning.plan = watched  # type: ignore[method-assign]
    asked = random_requests(engine, 6)
    job = start(engine, spec, texts(**short))
    drive(engine, job)
    drive(engine, until=lambda: all(one.done for one in asked))
    assert max(packs) > 2  # texts side by side in one flat batch
    assert job.handle is not None
    assert job.handle.losses == pytest.approx(expected, abs=1e-9)
    same(trained(engine, job), parameters, 1e-9)
    nothing_is_held(engine)


def test_packed_texts_run_in_fewer_units(
    exact: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Any] = []
    run = WindowTrainer.run

    def counted(self: WindowTrainer, sequence: TrainSequence, unit: BackwardUnit) -> None:
        ran.append(unit)
        run(self, sequence, unit)

    monkeypatch.setattr(WindowTrainer, "run", counted)

    def units(**options: Any) -> int:
        ran.clear()
        engine = small_engine(exact, max_batch_tokens=128, policy="temporal:1")
        spec = JobSpec("j", LORA, 3, 0.01, gradient_accumulation=6, **options)
        drive(engine, start(engine, spec, texts(longest=16)))
        return len(ran)

    assert units(pack=False) == 18
    assert units() == 3


def test_held_out_texts_are_packed_too(exact: LoadedModel) -> None:
    spec = JobSpec("j", LORA, 2, 0.01)
    engine = small_engine(exact, max_batch_tokens=128, **UNHURRIED)
    held = held_out(n=9, longest=20)
    job = validating(engine, spec, texts(), held)
    drive(engine, job)
    loss, _ = plain_outcome(exact, spec, trained(engine, job), held_out(n=9, longest=20))
    assert job.of("validation")[-1]["loss"] == pytest.approx(loss, abs=1e-9)
