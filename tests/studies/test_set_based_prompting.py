"""Card 35: layouts of a set are one, everything else is not; findings say what was measured."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.tiny import tiny_loaded

from invivo.edits.program import parse_program
from invivo.local import LocalLM
from invivo.report.findings import Statement
from invivo.studies import s35_set_based_prompting as s35
from invivo.studies.study import Record, Unit
from invivo.tasks.items import Item

SETTINGS = s35.Settings(items=("synthetic",), n_items=2, orders=3)
ITEM = Item("i", "Which one?", ("the red dog", "you", "hello blue world and cat"), 0)


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "gpt2", "qwen2_moe"])
def lm(request, tmp_path_factory) -> Iterator[LocalLM]:
    model = tiny_loaded(tmp_path_factory.mktemp("model"), request.param, dtype=torch.float64)
    with LocalLM(model) as made:
        yield made


def test_prompts_have_the_same_tokens_in_every_order(lm) -> None:
    asked = s35.ask(lm, ITEM)
    layouts = [asked.layout(order) for order in itertools.permutations(range(3))]
    assert all(sorted(one.ids) == sorted(layouts[0].ids) for one in layouts)
    assert lm.detokenize(list(layouts[0].ids)).endswith(
        'Options: "the red dog" "you" "hello blue world and cat"\nAnswer:'
    )
    for (begin, end), option in zip(layouts[0].blocks, asked.options, strict=True):
        assert layouts[0].ids[begin:end] == option
    assert lm.marked(list(asked.texts)).ids[: len(asked.prefix)] == asked.prefix


def test_every_layout_of_a_set_gives_the_same_scores_and_nothing_else_does(lm) -> None:
    records = s35.measure(lm, SETTINGS, Unit("u", ("made", ITEM)))
    sums = {r["condition"]: [sum(o) for o in r["logprobs"]] for r in records}
    for name in ("set as given", "set reversed", "set padded"):
        np.testing.assert_allclose(sums[name], sums["set"], atol=1e-9)
    for one, other in (
        ("normal", "reversed"),
        ("mask only", "mask only reversed"),
        ("position only", "position only reversed"),
        ("normal", "set"),
        ("mask only", "set as given"),
        ("position only", "set as given"),
    ):
        assert np.abs(np.subtract(sums[one], sums[other])).max() > 1e-4, (one, other)
    assert len(sums) == 5 + 8
    programs = {r["condition"]: r["program"] for r in records}
    assert programs["normal"] is None
    assert (
        programs["set as given"]
        == parse_program(s35.as_set(s35.ask(lm, ITEM).layout((0, 1, 2)))).hash
    )


def test_exact_numerics_give_the_same_records_to_the_bit(tmp_path) -> None:
    exact, unit = replace(SETTINGS, numerics="exact", orders=1), Unit("u", ("made", ITEM))
    with LocalLM(tiny_loaded(tmp_path, dtype=torch.float32)) as lm:
        alone = s35.measure(lm, exact, unit)
        stream = lm.stream("the", max_tokens=64, ignore_eos=True)
        next(stream)  # the engine is in the middle of something else
        assert s35.measure(lm, exact, unit) == alone
        stream.close()
        fast = s35.measure(lm, replace(exact, numerics="fast"), unit)
        for one, other in zip(alone, fast, strict=True):
            assert one["condition"] == other["condition"]
            for a, b in zip(one["logprobs"], other["logprobs"], strict=True):
                assert a == pytest.approx(b, abs=1e-4)


def test_known_masks_and_positions() -> None:
    """The card's example: two tokens before, options of two and one, one token after."""
    asked = s35.Asked((7, 8), ((1, 2), (3,)), (9,), ((1, 2), (3,)), ())
    layout = asked.layout((0, 1))
    assert layout.ids == (7, 8, 1, 2, 3, 9)
    (step,) = s35.position_only(layout, 2)["steps"]
    assert step["pos"] == {"range": [2, 8]}
    assert step["values"] == [2, 3, 2, 4, 5, 6]
    (hide,) = s35.mask_only(layout)["steps"]
    assert (hide["from"], hide["to"]) == ({"range": [2, 4]}, {"range": [4, 5]})
    padded = asked.layout((1, 0), padded=True)
    assert padded.ids == (7, 8, 3, 3, 1, 2, 9)
    program = s35.as_padded_set(padded, (1, 2))
    assert program["steps"][1]["from"] == {"or": [{"range": [3, 4]}]}


def test_orders_are_all_different() -> None:
    two = replace(ITEM, options=("a", "b"))
    assert s35.orders_of(two, SETTINGS) == {"normal": (0, 1), "reversed": (1, 0)}
    orders = s35.orders_of(ITEM, replace(SETTINGS, orders=9))
    assert len(orders) == len(set(orders.values())) == 6
    assert s35.orders_of(ITEM, SETTINGS) == s35.orders_of(ITEM, SETTINGS)


# Findings from records whose answers are known.


def made_records(n: int, wrong: dict[str, float], conditions: int = 2) -> list[Record]:
    """``n`` items of three options; each condition is wrong on the given share of items."""
    names = [
        "normal",
        "reversed",
        *(f"order {i + 3}" for i in range(conditions)),
        *s35._SET_LAYOUTS,
    ]
    names += [f"{half}{way}" for half in s35._HALVES for way in ("", " reversed")]
    records = []
    for i, name in itertools.product(range(n), names):
        label = i % 3
        pick = (label + 1) % 3 if i < wrong.get(name, 0) * n else label
        logprobs = [[0.0 if o == pick else -1.0] for o in range(3)]
        records.append(
            {"source": "made", "item": str(i), "condition": name, "order": [], "label": label,
             "question": f"Which? {i}", "options": ["one", "two", "three"], "logprobs": logprobs}
        )  # fmt: skip
    return records


def verdicts(statements: list[Statement]) -> dict[str, str | None]:
    keys = ("no layout", "plain text", "mean over orders", "both", "either", "McNemar",
            "mask only", "position only")  # fmt: skip
    return {key: next(s.verdict for s in statements if key in s.text) for key in keys}


def test_findings_tell_what_was_put_in() -> None:
    """Reversed prompts are wrong on 40 of 100 items, masks alone on 30, the set on 10."""
    wrong = {"reversed": 0.4, "mask only reversed": 0.3, "order 3": 0.2}
    wrong |= dict.fromkeys(s35._SET_LAYOUTS, 0.1)
    found = s35.conclude(SETTINGS, made_records(100, wrong))
    assert verdicts(found.statements) == {
        "no layout": "holds",
        "plain text": "holds",
        "mean over orders": "open",  # 0.9 against 0.85, so close that 100 items leave it open
        "both": "holds",
        "either": "holds",
        "McNemar": None,
        "mask only": "holds",
        "position only": "open",
    }
    shown = {row[0]: row[1] for row in found.tables[0].rows}
    assert shown["made: order as given"].value == 1.0
    assert shown["made: reversed"].value == 0.6
    assert shown["made: right in both directions"].value == 0.6
    assert shown["made: right in either"].value == 1.0
    assert shown["made: mean over 4 orders"].value == pytest.approx((1 + 0.6 + 0.8 + 1) / 4)
    assert found.to_dict()["figures"][0]["kind"] == "dots"
    (examples,) = found.examples
    assert examples.rows[0] == (
        "0",
        "Which? 0",
        "one ✓\ntwo\nthree",
        "normal: one\nreversed: two\norder 3: two\norder 4: one",
        "two",
    )


def test_a_set_that_depended_on_its_order_would_be_told() -> None:
    records = made_records(40, {"set reversed": 0.5})
    found = s35.conclude(SETTINGS, records)
    assert verdicts(found.statements)["no layout"] == "fails"
    assert found.statements[0].figure == pytest.approx(1.0)


def test_items_with_fewer_orders_leave_only_what_is_common() -> None:
    records = [r for r in made_records(6, {}) if r["condition"] != "order 4" or r["item"] != "0"]
    (answers,) = s35.read(records, "sum").values()
    assert answers.orders == ["normal", "reversed", "order 3"]
