"""Results of programs: tables, arrays over a sweep, and the way through JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from invivo.errors import InvalidRequest, NotFound
from invivo.program_result import Capture, Measure, Pools, ProgramResult, Row, result_of


def capture(name="0", layer=0, values=(1.0, 2.0), **more):
    array = np.array(values, dtype=np.float32)
    return Capture(
        name=name,
        run="main",
        site=f"layers.{layer}.resid.post",
        layer=layer,
        heads=None,
        reduce="none",
        positions=[3],
        tokens=[" Po"],
        values=array,
        **more,
    )


def measure(values, name="1", kind="logit_diff"):
    return Measure(name, kind, "main", [3], [" Po"], np.array(values))


def sweep():
    rows = [
        Row({"L": a, "H": b}, [capture(layer=i, values=[[10 * a + b]]) for i in (0, 1)],
            [measure([a - b])])
        for a in (0, 1)
        for b in (5, 6, 7)
    ]  # fmt: skip
    return ProgramResult(rows, {"cost": {}}, {"program": "sha256:x"})


def test_a_sweep_is_a_table_with_a_record_for_each_row():
    table = sweep().table()
    assert table[0] == {
        "L": 0,
        "H": 5,
        "logit_diff": -5.0,
        "layers.0.resid.post": 5.0,
        "layers.1.resid.post": 5.0,
    }
    assert [(r["L"], r["H"]) for r in table] == [(0, 5), (0, 6), (0, 7), (1, 5), (1, 6), (1, 7)]


def test_measures_of_one_label_are_numbered_and_several_positions_are_a_list():
    row = Row({}, [], [measure([1.0]), measure([2.0, 3.0], name="2"), measure([4.0], name="own")])
    expected = [{"logit_diff": 1.0, "logit_diff_2": [2.0, 3.0], "own": 4.0}]
    assert ProgramResult([row]).table() == expected


def test_arrays_have_an_axis_for_each_variable():
    result = sweep()
    assert result.axes == {"L": [0, 1], "H": [5, 6, 7]}
    assert result.array("logit_diff").shape == (2, 3, 1)
    assert result.array("logit_diff")[1, 2, 0] == -6
    assert result.array("0").shape == (2, 3, 2, 1, 1)  # two layers, and the value's own shape
    assert result.array("layers.1.resid.post")[0, 1].item() == 6


def test_unknown_names_and_unequal_shapes_are_told():
    with pytest.raises(NotFound, match="logit_diff, 0"):
        sweep().array("other")
    uneven = ProgramResult([Row({}, [capture(), capture(layer=1, values=[1.0])], [])])
    with pytest.raises(InvalidRequest, match="differ in shape"):
        uneven.array("0")


def test_repr_tells_what_there_is():
    assert repr(sweep()) == "ProgramResult(6 rows; L: 2 values; H: 3 values; 2 captures)"
    one = ProgramResult([Row({}, [capture()], [measure([1.25])])])
    assert repr(one) == "ProgramResult(1 row; Measure('logit_diff', 1.25); 1 captures)"
    assert repr(one.captures[0]) == "Capture('0', layers.0.resid.post, [2])"


def same(a: ProgramResult, b: ProgramResult) -> None:
    assert (a.explain, a.meta) == (b.explain, b.meta)
    for left, right in zip(a.rows, b.rows, strict=True):
        assert left.binding == right.binding
        for x, y in zip(left.captures, right.captures, strict=True):
            assert x.values.dtype == y.values.dtype
            np.testing.assert_array_equal(x.values, y.values)
            assert (x.ids is None) == (y.ids is None)
            if x.ids is not None:
                np.testing.assert_array_equal(x.ids, y.ids)
                assert x.words.tolist() == y.words.tolist()
            assert (x.name, x.site, x.layer, x.heads, x.reduce, x.positions, x.tokens) == (
                y.name, y.site, y.layer, y.heads, y.reduce, y.positions, y.tokens
            )  # fmt: skip
        for m, n in zip(left.measures, right.measures, strict=True):
            np.testing.assert_array_equal(m.values, n.values)
            assert (m.name, m.kind, m.positions, m.tokens) == (
                n.name,
                n.kind,
                n.positions,
                n.tokens,
            )


floats = st.floats(width=32)


@given(st.lists(floats, min_size=1, max_size=6), st.lists(st.floats(), min_size=1, max_size=3))
def test_json_and_back_changes_nothing(values, measured):
    words = np.array([["a"] * len(values)], dtype=object)
    ids = np.arange(len(values)).reshape(1, -1)
    lens = capture("lens", 2, [values], ids=ids, words=words)
    result = ProgramResult([Row({"L": 1}, [capture(values=values), lens], [measure(measured)])])
    text = json.dumps(result.to_dict(), allow_nan=False)
    same(result, result_of(json.loads(text)))
    pools = Pools()
    text = json.dumps(result.to_dict(pools), allow_nan=False)
    same(result, result_of(json.loads(text), pools.arrays()))
    assert "data" not in text
