"""What a budget keeps: the fastest of all tapes that fit."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invivo.engine import tape_budget
from invivo.engine.graph_pruning import differentiate
from invivo.engine.tape_budget import Budgets, Choice, knapsack
from invivo.engine.trainable import Trainable
from invivo.engine.training_graph import build_graph
from invivo.errors import InvalidRequest
from invivo.models.config import LayerConfig, ModelConfig, RopeConfig

ENTRIES = st.lists(
    st.lists(st.builds(Choice, st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=4),
    min_size=1,
    max_size=5,
)


def model(n_layers: int = 2, **changes: object) -> ModelConfig:
    fields: dict[str, object] = {
        "family": "llama",
        "vocab_size": 50,
        "d_model": 32,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 8,
        "d_ff": 96,
        "max_positions": 4096,
        "layers": (LayerConfig(),) * n_layers,
        "ropes": (RopeConfig(10_000.0, 8),),
    }
    return ModelConfig(**(fields | changes))  # type: ignore[arg-type]


def budgets_of(config: ModelConfig, *trainables: Trainable) -> Budgets:
    graph = build_graph(config, trainables, length=1)
    return Budgets(config, graph, differentiate(graph))


def brute_force(choices: list[list[Choice]], budget: int) -> int | None:
    """The least work of all combinations that fit."""
    sums = (
        (sum(one.bits for one in each), sum(one.work for one in each))
        for each in itertools.product(*choices)
    )
    return min((work for bits, work in sums if bits <= budget), default=None)


@settings(max_examples=200, deadline=None)
@given(choices=ENTRIES, budget=st.integers(0, 120))
def test_no_combination_that_fits_is_faster(choices: list[list[Choice]], budget: int) -> None:
    chosen = knapsack(choices, budget)
    best = brute_force(choices, budget)
    assert (chosen is None) == (best is None)
    if chosen is not None:
        taken = [own[i] for own, i in zip(choices, chosen, strict=True)]
        assert sum(one.bits for one in taken) <= budget
        assert sum(one.work for one in taken) == best


@settings(max_examples=60, deadline=None)
@given(choices=ENTRIES, budget=st.integers(0, 120))
def test_counting_in_coarse_units_keeps_within_the_budget(
    choices: list[list[Choice]], budget: int
) -> None:
    before = tape_budget.MOST_UNITS
    tape_budget.MOST_UNITS = 7
    try:
        chosen = knapsack(choices, budget)
    finally:
        tape_budget.MOST_UNITS = before
    fits = sum(min(one.bits for one in own) for own in choices) <= budget
    assert (chosen is not None) == fits
    if chosen is not None:
        assert sum(own[i].bits for own, i in zip(choices, chosen, strict=True)) <= budget


def test_of_equally_fast_tapes_the_upper_layers_keep_more() -> None:
    layer = [Choice(10, 0), Choice(0, 5)]
    assert knapsack([layer] * 4, 25) == [1, 1, 0, 0]


@pytest.mark.parametrize("length", [40, 3000])
@pytest.mark.parametrize(
    "trainable", [Trainable("lora", ("down",), 4), Trainable("lora", ("q", "v"), 4)]
)
def test_the_tape_of_a_small_model_is_the_fastest_of_all(length: int, trainable: Trainable) -> None:
    budgets = budgets_of(model(), trainable)
    choices = budgets.choices(length)
    least, most = budgets.least_bits, budgets.most_bits
    for share in (0.0, 0.2, 0.5, 0.8, 1.0):
        bits = int(least + share * (most - least))
        max_bytes = -(-bits * length // 8)
        kept, again = budgets.within(length=length, max_bytes=max_bytes)
        held = sum(budgets.graph.tensors[key].bits for key in kept.tape)
        assert held * length <= 8 * max_bytes
        work = sum(
            min(
                choices[layer][i].work
                for i, option in enumerate(budgets.options)
                if option.places(layer) == places
                and option.bits[layer] == budgets.bits_of(layer, kept)
            )
            for layer, places in again.items()
        )
        assert work == brute_force(choices, 8 * max_bytes // length)


def test_nothing_runs_again_where_everything_may_be_kept() -> None:
    budgets = budgets_of(model(), Trainable("lora", ("down",), 4))
    _, again = budgets.within(length=8, max_bytes=budgets.most_bits)
    assert not any(again.values())


def test_keys_and_values_come_from_the_cache() -> None:
    lora = Trainable("lora", ("down",), 4)
    _, again = budgets_of(model(), lora).within(
        length=1000, max_bytes=-(-budgets_of(model(), lora).least_bits * 1000 // 8)
    )
    assert again[1] == {"q", "o", "gate", "up", "attention"}
    # The gradient of a norm reads the keys before it.
    normed = budgets_of(model(qk_norm="head"), lora)
    _, again = normed.within(length=1000, max_bytes=-(-normed.least_bits * 1000 // 8))
    assert again[1] == {"q", "k", "o", "gate", "up", "attention"}


def test_short_texts_run_attention_again_before_a_product_and_long_ones_after() -> None:
    budgets = budgets_of(model(4), Trainable("lora", ("down",), 4))
    gone = {}
    for length in (4, 4000):
        # Room for all but a few of the numbers of attention's result in each layer.
        bits = budgets.most_bits - 3 * 32 * 16
        _, again = budgets.within(length=length, max_bytes=bits * length // 8)
        gone[length] = set().union(*again.values())
    assert "attention" in gone[4]
    assert "attention" not in gone[4000]


def test_the_lowest_layer_keeps_what_its_adapter_reads_rather_than_two_products() -> None:
    budgets = budgets_of(model(3), Trainable("lora", ("down",), 4))
    room = budgets.least_bits + 96 * 16
    kept, again = budgets.within(length=100, max_bytes=room * 100 // 8)
    assert not again[0]
    assert "0.mlp.neuron" in kept.tape


def test_a_budget_below_the_smallest_tape_is_refused_by_name() -> None:
    budgets = budgets_of(model(), Trainable("lora", ("down",), 4))
    least = -(-budgets.least_bits * 10 // 8)
    budgets.within(length=10, max_bytes=least)
    with pytest.raises(InvalidRequest, match=f"at least {least} bytes") as caught:
        budgets.within(length=10, max_bytes=least - 1)
    assert caught.value.field == "tape_bytes"
