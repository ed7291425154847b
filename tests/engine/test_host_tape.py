"""Tapes that wait in host memory in part: same numbers, bounded bytes, nothing left behind."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.fine_tuning import (
    BYPASSES,
    CONFIGS,
    Document,
    by_windows,
    random_decoder,
    random_document,
    random_parameters,
    run_flat,
    suited,
    take_gradients,
)
from tests.models.pages import Pages, Text

from invivo.engine.bypasses import BypassSpec, Parameters, n_virtual
from invivo.engine.graph_pruning import differentiate
from invivo.engine.host_placement import HostRoom
from invivo.engine.host_shelf import Copy, HostShelf
from invivo.engine.host_tape import HostTape, Product
from invivo.engine.memory_plan import plan_activations
from invivo.engine.tape_budget import Budgets
from invivo.engine.train_sequence import TrainSequence
from invivo.engine.training_graph import build_graph
from invivo.engine.window import WindowTrainer
from invivo.errors import InvalidRequest

CPU = torch.device("cpu")
FAST = 1e12  # gigabytes a second: whatever can go to the host is worth the way
DOWN = BYPASSES["lora down"]


def a_shelf(n_bytes: int = 1 << 20) -> HostShelf:
    return HostShelf(HostRoom(n_bytes, FAST), CPU)


@dataclass
class Case:
    """A trainer in layer order whose tape has ``allowed`` bytes on the device."""

    trainer: WindowTrainer
    pages: Pages
    parameters: Parameters
    allowed: int

    def begin(self, doc: Document) -> tuple[TrainSequence, Text]:
        text = Text(doc.tokens.tolist())
        while len(text.blocks) * self.pages.block_size < len(text.tokens):
            text.blocks.append(self.pages.free.pop())
        sequence = TrainSequence(doc.tokens, doc.labels, list(text.blocks), doc.weights)
        self.trainer.begin(sequence)
        return sequence, text

    def forward(self, sequence: TrainSequence, text: Text, *widths: int) -> None:
        for width in widths or (sequence.length,):
            start = text.n_done
            run_flat(
                self.trainer, self.pages, sequence, [(text, width)], text, start, start + width
            )
            text.n_done += width

    def backward(self, sequence: TrainSequence, rows: int) -> dict[str, torch.Tensor]:
        while (unit := self.trainer.next_unit(sequence, rows)) is not None:
            self.trainer.run(sequence, unit)
        return take_gradients(self.parameters)


def case(
    model: str,
    specs: tuple[BypassSpec, ...],
    shelf: HostShelf | None,
    *,
    length: int,
    share: float = 0.3,
) -> Case:
    """``share``: of the way from the smallest tape of ``length`` rows to the largest."""
    config = CONFIGS[model]
    decoder = random_decoder(model, dtype=torch.float32)
    parameters = random_parameters(config, specs, dtype=torch.float32)
    graph = build_graph(config, [spec.trainable for spec in specs], length=1, dtype="float32")
    budgets = Budgets(config, graph, differentiate(graph))
    bits = budgets.least_bits + share * (budgets.most_bits - budgets.least_bits)
    allowed = -(-int(bits * length) // 8)
    pages = Pages(decoder)
    trainer = WindowTrainer(
        decoder, pages.cache, specs, parameters,
        order="layer", tape_bytes=allowed, shelf=shelf,
    )  # fmt: skip
    return Case(trainer, pages, parameters, allowed)


@pytest.mark.parametrize("bypass", ["lora down", "lora all", "several", "adapter"])
@pytest.mark.parametrize("model", ["llama", "gemma2", "gpt2", "moe"])
def test_numbers_do_not_depend_on_where_a_product_waits(model: str, bypass: str) -> None:
    specs = suited(CONFIGS[model], BYPASSES[bypass])
    virtual = n_virtual(specs)
    docs = [random_document(CONFIGS[model], n, seed=n, n_virtual=virtual) for n in (13, 9)]
    length = max(len(doc.tokens) for doc in docs)
    for share in (0.3, 0.6):
        found = []
        for shelf in (None, a_shelf()):
            own = case(model, specs, shelf, length=length, share=share)
            plan = own.trainer.planned(length)
            assert plan is not None
            assert bool(plan.hosted) == (shelf is not None)
            loss, _ = by_windows(own.trainer, own.pages, docs, seed=5, neighbour=True)
            found.append((loss, take_gradients(own.parameters)))
            assert shelf is None or shelf.lent == 0
        (wanted_loss, wanted), (loss, got) = found
        assert loss == wanted_loss
        for name, value in wanted.items():
            torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_what_comes_back_is_bit_for_bit_what_left(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the same tape on the device: nothing runs again in either."""
    doc, found = random_document(CONFIGS[model], 24, seed=2), []
    for shelf in (None, a_shelf()):
        own = case(model, DOWN, shelf, length=24, share=1.0)
        plan = own.trainer.planned(24)
        assert plan is not None
        assert not any(plan.rerun.values())
        assert not plan.hosted
        if shelf is not None:
            plan = replace(plan, hosted=frozenset({1, 2}))
            monkeypatch.setattr(own.trainer, "planned", lambda length, plan=plan: plan)
        sequence, text = own.begin(doc)
        own.forward(sequence, text)
        assert sequence.tape is not None
        assert (sequence.tape.hosted is None) == (shelf is None)
        found.append(own.backward(sequence, 9))
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value)


def test_the_bytes_are_those_of_the_plan() -> None:
    shelf, doc = a_shelf(), random_document(CONFIGS["llama"], 20, seed=1)
    own = case("llama", DOWN, shelf, length=20)
    plan = plan_activations(
        CONFIGS["llama"], [spec.trainable for spec in DOWN], length=20, dtype="float32",
        tape_bytes=own.allowed, host_bytes=shelf.n_bytes, host_gb_per_s=FAST,
    )  # fmt: skip
    sequence, text = own.begin(doc)
    own.forward(sequence, text)
    assert sequence.tape is not None
    assert sequence.tape.hosted is not None
    assert sequence.dx is not None
    assert sequence.tape.hosted.n_bytes == plan.totals.hosted == shelf.lent > 0
    on_device = sequence.tape.n_bytes + sequence.dx.numel() * sequence.dx.element_size()
    assert on_device == plan.totals.compressed
    last = plan.schedule("v2 layer-outer").parts
    assert last["tape"] == plan.totals.compressed
    assert last["tape"] + last["copies"] == own.allowed
    rows = [row for row in plan.rows if row.held == "host"]
    assert {row.name for row in rows} == {"mlp.gate", "mlp.up"}
    assert sum(row.n_bytes for row in rows) == plan.totals.hosted
    sequence.drop_tape()
    assert shelf.lent == 0


@pytest.mark.parametrize("widths", [(24,), (5, 7, 12)])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.2, 0.5])
def test_what_is_under_way_stays_within_the_budget(
    share: float, widths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = case("llama", DOWN, a_shelf(), length=24, share=share)
    sequence, text = own.begin(random_document(CONFIGS["llama"], 24, seed=1))
    tape = sequence.tape
    assert tape is not None
    hosted = tape.hosted
    assert hosted is not None
    most = 0

    def checked(name: str) -> None:
        plain = getattr(HostTape, name)

        def call(self: HostTape, *given: int) -> None:
            nonlocal most
            plain(self, *given)
            beside = self.under_way
            # The product of the layer at hand is there anyway.
            due = self.product.row_bytes * (24 if name == "look_ahead" else max(widths))
            assert tape.n_bytes + max(0, beside - due) <= own.allowed
            most = max(most, beside)

        monkeypatch.setattr(HostTape, name, call)

    checked("make_room")
    checked("look_ahead")
    own.forward(sequence, text, *widths)
    own.backward(sequence, 7)
    assert most > 0
    assert hosted.under_way == 0


def test_a_text_given_up_at_any_moment_leaves_nothing_on_the_shelf() -> None:
    shelf, doc = a_shelf(), random_document(CONFIGS["llama"], 12, seed=4)
    own = case("llama", DOWN, shelf, length=12)
    sequence, text = own.begin(doc)
    own.forward(sequence, text, 12)
    wanted = own.backward(sequence, 12)
    for n_units in (None, 0, 1, 3):
        sequence, text = own.begin(doc)
        assert shelf.lent > 0
        own.forward(sequence, text, *((5,) if n_units is None else (5, 7)))
        for _ in range(n_units or 0):
            unit = own.trainer.next_unit(sequence, 5)
            assert unit is not None
            own.trainer.run(sequence, unit)
        take_gradients(own.parameters)
        if n_units == 1:  # begun again instead
            text.n_done = 0
            own.trainer.begin(sequence)
            own.forward(sequence, text, 12)
            for name, value in own.backward(sequence, 12).items():
                assert torch.equal(value, wanted[name])
        else:
            sequence.drop_tape()
        assert shelf.lent == 0


def test_a_text_for_which_the_shelf_has_no_room_runs_more_again() -> None:
    doc = random_document(CONFIGS["llama"], 12, seed=4)
    alone = case("llama", DOWN, None, length=12)
    sequence, text = alone.begin(doc)
    alone.forward(sequence, text)
    wanted = alone.backward(sequence, 12)
    first = case("llama", DOWN, a_shelf(), length=12)
    held, _ = first.begin(doc)
    assert held.tape is not None
    assert held.tape.hosted is not None
    shelf = a_shelf(held.tape.hosted.n_bytes)
    both = [case("llama", DOWN, shelf, length=12) for _ in range(2)]
    begun = [own.begin(doc) for own in both]
    on_shelf = [sequence.tape.hosted is not None for sequence, _ in begun if sequence.tape]
    assert on_shelf == [True, False]
    for own, (sequence, text) in zip(both, begun, strict=True):
        own.forward(sequence, text)
        got = own.backward(sequence, 12)
        for name, value in wanted.items():
            torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)
    assert shelf.lent == 0


def test_window_order_keeps_its_tape_on_the_device() -> None:
    config, parameters = CONFIGS["llama"], random_parameters(CONFIGS["llama"], DOWN)
    decoder = random_decoder("llama")
    trainer = WindowTrainer(
        decoder, Pages(decoder).cache, DOWN, parameters, tape_bytes=9000, shelf=a_shelf()
    )
    plan = trainer.planned(10)
    assert plan is not None
    assert config.n_layers == 3
    assert not plan.hosted


class LateCopy:
    """A copy that happens as late as a device may make it: when somebody waits for it."""

    def __init__(self, held: torch.Tensor, make: Callable[[torch.Tensor], None]) -> None:
        self._held = weakref.ref(held)
        self._make = make
        self.done = False

    def wait(self) -> None:
        if self.done:
            return
        held = self._held()
        assert held is not None, "the device's tensor went before its copy was waited for"
        self._make(held)
        self.done = True


class LateShelf(HostShelf):
    """What has not come back yet is no number."""

    def __init__(self) -> None:
        super().__init__(HostRoom(1 << 20, FAST), CPU)
        self.copies: list[LateCopy] = []

    def send(self, value: torch.Tensor, start: int) -> Copy:
        there = super().send
        return self._late(value, lambda held: there(held, start))

    def bring(
        self, start: int, shape: tuple[int, ...], dtype: torch.dtype, after: Copy
    ) -> tuple[torch.Tensor, Copy]:
        def make(held: torch.Tensor) -> None:
            after.wait()
            held.copy_(there(start, shape, dtype, after)[0])

        there = super().bring
        value = torch.full(shape, torch.nan, dtype=dtype)
        return value, self._late(value, make)

    def _late(self, held: torch.Tensor, make: Callable[[torch.Tensor], object]) -> Copy:
        self.copies.append(LateCopy(held, make))
        return self.copies[-1]  # type: ignore[return-value]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.6])
@pytest.mark.parametrize("widths", [(24,), (5, 7, 12)])
def test_nothing_is_used_or_let_go_before_its_copy_is_waited_for(
    share: float, widths: tuple[int, ...]
) -> None:
    doc, found = random_document(CONFIGS["llama"], 24, seed=1), []
    for shelf in (a_shelf(), LateShelf()):
        own = case("llama", DOWN, shelf, length=24, share=share)
        for given_up in (True, False):
            sequence, text = own.begin(doc)
            own.forward(sequence, text, *widths)
            if given_up:
                unit = own.trainer.next_unit(sequence, 7)
                assert unit is not None
                own.trainer.run(sequence, unit)
                sequence.drop_tape()
                take_gradients(own.parameters)
        found.append(own.backward(sequence, 7))
    assert all(copy.done for copy in shelf.copies)
    assert len(shelf.copies) >= 2 * len(widths)
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value)


# --- the shelf alone ------------------------------------------------------------------------------
@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 30_000)), max_size=40))
def test_pieces_that_are_lent_never_overlap(orders: list[tuple[bool, int]]) -> None:
    shelf = a_shelf(1 << 16)
    lent: dict[int, int] = {}
    for give_back, n in orders:
        if give_back and lent:
            start = sorted(lent)[n % len(lent)]
            shelf.give_back(start)
            del lent[start]
            continue
        at = shelf.lend(n)
        if at is None:
            continue
        assert 0 <= at <= at + n <= shelf.n_bytes
        assert all(at + n <= start or start + size <= at for start, size in lent.items())
        lent[at] = n
    assert shelf.lent == sum(lent.values())
    for start in lent:
        shelf.give_back(start)
    assert shelf.lend(shelf.n_bytes) == 0


def test_more_than_half_of_the_free_memory_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="half") as caught:
        HostShelf(HostRoom(1 << 60), CPU)
    assert caught.value.field == "host_bytes"
    with pytest.raises(InvalidRequest, match="at least 1"):
        HostShelf(HostRoom(0), CPU)


def test_parts_come_back_side_by_side_however_they_left() -> None:
    shelf, product = a_shelf(), Product(("mlp.gate", "mlp.up"), 4, torch.float32)
    tape = HostTape.lent_by(shelf, product, [1, 2], 6, 10_000)
    assert tape is not None
    whole = torch.randn(6, 8)
    gate, up = whole.chunk(2, dim=1)
    # Halves of one product, of which a part; tensors of their own.
    tape.write(1, "mlp.gate", 2, gate[2:])
    tape.write(1, "mlp.up", 2, up[2:])
    tape.write(1, "mlp.gate", 0, gate[:2].clone())
    tape.write(1, "mlp.up", 0, up[:2].clone())
    tape.write(2, "mlp.gate", 0, -gate)
    tape.write(2, "mlp.up", 0, -up)
    tape.look_ahead(2, 0)
    assert torch.equal(tape.read(2, "mlp.up", 1, 5), -up[1:5])
    tape.let_go(2)
    assert torch.equal(tape.read(1, "mlp.gate", 0, 6), gate)
    assert torch.equal(tape.lend(1, 0, 6), whole)
    with pytest.raises(AssertionError, match="gradients"):
        tape.read(1, "mlp.gate", 0, 6)
    tape.close()
    tape.close()
    assert shelf.lent == 0
