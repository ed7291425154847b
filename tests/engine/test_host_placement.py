"""Which layers' products wait on the host: those for which the link has time."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invivo.engine.graph_pruning import differentiate
from invivo.engine.host_placement import HostRoom, LayerCost, Timeline, choose_hosted
from invivo.engine.tape_budget import UNDER_WAY, Budgets
from invivo.engine.trainable import Trainable
from invivo.engine.training_graph import build_graph
from invivo.errors import InvalidRequest
from invivo.models.config import LayerConfig, ModelConfig, RopeConfig

LAYER = LayerCost(10.0, 12.0, 5.0, 8)


def timeline(layers: list[LayerCost], bit: float, room: float = 40.0) -> Timeline:
    return Timeline(layers, 6.0, bit, [room] * len(layers))


def test_without_hosts_a_step_is_the_sum_of_its_layers() -> None:
    assert timeline([LAYER] * 3, 1.0).step(()) == 3 * (10 + 12 + 5) + 6


def test_copies_that_are_done_in_time_cost_nothing() -> None:
    # 8 a copy, forward and back: each is done within the layer beside it.
    assert timeline([LAYER] * 3, 1.0).step({0, 1}) == 3 * (10 + 12) + 5 + 6


def test_late_copies_are_waited_for() -> None:
    # One layer: 24 out, of which the loss hides 6; nothing hides the way back.
    assert timeline([LAYER], 3.0).step({0}) == 10 + 24 + 24 + 12
    # Without room the copy is waited for in the next layer, and comes back when it is due.
    assert timeline([LAYER] * 2, 1.5, room=0.0).step({0}) == 10 + 12 + 6 + 5 + 12 + 12 + 12


@settings(max_examples=150, deadline=None)
@given(
    layers=st.lists(
        st.builds(
            LayerCost, st.integers(1, 9), st.integers(1, 9), st.integers(0, 9), st.integers(0, 9)
        ),
        min_size=1,
        max_size=7,
    ),
    bit=st.floats(0.01, 5.0),
    room=st.floats(0.0, 40.0),
    most=st.integers(0, 40),
)
def test_what_is_chosen_fits_and_is_never_slower(
    layers: list[LayerCost], bit: float, room: float, most: int
) -> None:
    line = timeline(layers, bit, room)
    chosen = choose_hosted(line, most)
    assert sum(layers[i].bits for i in chosen) <= most
    assert all(layers[i].bits and layers[i].again for i in chosen)
    assert line.step(chosen) <= line.step(())
    arithmetic = sum(layer.forward + layer.backward for layer in layers) + line.between
    for n in range(len(layers) + 1):
        for some in itertools.combinations(range(len(layers)), n):
            again = sum(layer.again for i, layer in enumerate(layers) if i not in some)
            assert line.step(some) >= arithmetic + again - 1e-9


def test_a_fast_link_takes_all_and_a_slow_one_nothing() -> None:
    layers = [LAYER] * 6
    assert choose_hosted(timeline(layers, 0.01), 1000) == frozenset(range(6))
    assert choose_hosted(timeline(layers, 100.0), 1000) == frozenset()
    # Two of three, as the link has time for them, the lowest first.
    some = choose_hosted(timeline(layers, 1.9), 1000)
    assert 0 < len(some) < 6
    assert 0 in some
    assert 5 not in some


def model(**changes: object) -> ModelConfig:
    fields: dict[str, object] = {
        "family": "llama",
        "vocab_size": 2000,
        "d_model": 512,
        "n_heads": 8,
        "n_kv_heads": 2,
        "head_dim": 64,
        "d_ff": 1536,
        "max_positions": 4096,
        "layers": (LayerConfig(),) * 8,
        "ropes": (RopeConfig(10_000.0, 64),),
    }
    return ModelConfig(**(fields | changes))  # type: ignore[arg-type]


def budgets_of(config: ModelConfig, *trainables: Trainable) -> Budgets:
    graph = build_graph(config, trainables, length=1)
    return Budgets(config, graph, differentiate(graph))


DOWN = Trainable("lora", ("down",), 4)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 0.8])
def test_the_tape_on_the_device_leaves_room_for_copies(share: float) -> None:
    budgets, length = budgets_of(model(), DOWN), 1000
    bits = budgets.least_bits + share * (budgets.most_bits - budgets.least_bits)
    allowed = int(bits * length / 8)
    layers = budgets.hosted(length=length, max_bytes=allowed, room=HostRoom(1 << 30, 1e6))
    assert layers
    assert 0 not in layers  # its neurons are kept, which is less
    kept, again = budgets.within(length=length, max_bytes=allowed, hosted=layers)
    away = frozenset[str]().union(*(budgets.product(layer) for layer in layers))
    assert away <= kept.tape
    assert not any({"gate", "up"} & again[layer] for layer in layers)
    on_device = sum(budgets.graph.tensors[key].bits for key in kept.tape - away) * length / 8
    spare = min(allowed // UNDER_WAY, allowed - budgets.least_bits * length / 8)
    assert on_device <= allowed - spare + length  # a bit a token is lost to rounding


def test_nothing_goes_where_all_fits_or_the_host_is_small() -> None:
    budgets, length = budgets_of(model(), DOWN), 1000
    most = budgets.most_bits * length // 8
    assert not budgets.hosted(length=length, max_bytes=most, room=HostRoom(1 << 30, 1e6))
    one = 2 * 1536 * 2 * length
    for n in (0, 1, 3):
        room = HostRoom(n * one, 1e6)
        layers = budgets.hosted(length=length, max_bytes=most // 2, room=room)
        assert len(layers) == n


def test_a_budget_below_the_smallest_tape_is_refused_with_a_host_too() -> None:
    budgets = budgets_of(model(), DOWN)
    least = budgets.least_bits * 10 // 8
    layers = budgets.hosted(length=10, max_bytes=least - 1, room=HostRoom(1 << 30, 1e6))
    with pytest.raises(InvalidRequest, match="at least"):
        budgets.within(length=10, max_bytes=least - 1, hosted=layers)


def test_what_a_trained_scale_changes_or_a_mixture_makes_stays() -> None:
    scaled = budgets_of(model(), Trainable("ia3", ("gate", "up", "down")))
    assert not any(scaled.product(layer) for layer in range(8))
