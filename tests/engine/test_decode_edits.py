"""What programs do in a batch of decodes is worked out once, and right when the batch changes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.counting import Calls
from tests.edits.recurrent_models import recurrent_model
from tests.edits.small_models import CONFIGS, random_ids, words
from tests.engine.drive import Inquiry, run
from tests.engine.test_graph_pieces import RunPieces, in_pieces
from tests.engine.test_programs_runs import BLOCK, ask, carried, engine_of, no_runs_left, result

from invivo.edits.apply import change_together
from invivo.edits.resolved import Touch
from invivo.edits.selectors import Positions
from invivo.edits.site_names import SiteRef
from invivo.engine import edit_tables, graphs, step
from invivo.engine.decode_edits import DecodeEdits
from invivo.engine.edit_tables import AffineTable
from invivo.engine.engine import Engine
from invivo.engine.graphs import Piece
from invivo.engine.run_edits import RunEdits
from invivo.engine.step_cuts import TABLED, cuts_of, segments, tabled_sites
from invivo.models.sites import SITES

LLAMA = CONFIGS["llama"]


def at(site: str, do: str = "scale", **more: Any) -> dict[str, Any]:
    value = {"scale": {"a": 0.5}, "add": {"v": 0.25}, "set": {"x": 0.125}, "zero": {}}[do]
    return {"at": site, "do": do, "pos": "@generated"} | value | more


# Programs that begin, end and change at different tokens; None: a plain request.
PROGRAMS: list[dict[str, Any] | None] = [
    {"steps": [at("layers.1.resid.post", "add")]},
    {"steps": [at("layers.1.attn.head.2.z", "zero"), at("layers.0.attn.head.[0,3].z", "scale")]},
    None,
    {"steps": [at("layers.1.resid.post", "scale", pos={"generated": [1, 3]})],
     "out": [{"capture": "layers.0.mlp.out", "pos": {"generated": [3, 5]}}]},
    {"steps": [at("layers.2.mlp.in", "set"), at("layers.2.resid.post", "scale")],
     "out": [{"measure": "logprob", "token": 3, "pos": "@generated"}]},
]  # fmt: skip
LENGTHS = [4, 7, 9, 8, 6]


def asked(engine: Engine, programs: list[dict[str, Any] | None] = PROGRAMS) -> list[Inquiry]:
    found = []
    for i, (program, n_new) in enumerate(zip(programs, LENGTHS, strict=False)):
        ids = random_ids(i)
        text = words(ids, n_prompt=len(ids), n_new=n_new)
        given = None if program is None else carried(engine, program, text)
        found.append(
            ask(engine, given, words(ids), "generate", temperature=0.0, max_tokens=n_new,
                ignore_eos=True, logprobs=0)
        )  # fmt: skip
    return found


def same_answers(mine: list[Inquiry], plain: list[Inquiry]) -> None:
    for one, other in zip(mine, plain, strict=True):
        assert one.tokens() == other.tokens()
        assert one.logprobs() == pytest.approx(other.logprobs(), abs=1e-9)
        if one.request.intervention is None:
            continue
        (row,), (expected,) = result(one).rows, result(other).rows
        for ours, theirs in zip(row.captures, expected.captures, strict=True):
            torch.testing.assert_close(ours.value, theirs.value, rtol=1e-9, atol=1e-9)
        for ours, theirs in zip(row.measures, expected.measures, strict=True):
            torch.testing.assert_close(ours.values, theirs.values, rtol=1e-9, atol=1e-9)


def plain_answers(**options: Any) -> list[Inquiry]:
    engine = engine_of("llama", max_batch_tokens=64, **options)
    inquiries = asked(engine)
    run(engine, *inquiries)
    return inquiries


@pytest.mark.parametrize("lasting", [0, 2, 100])
@pytest.mark.parametrize("room", [edit_tables.MOST_BYTES, 9000, 0])
def test_rows_that_leave_and_programs_that_end_change_nothing_else(
    lasting: int, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "_LASTING", lasting)
    monkeypatch.setattr(edit_tables, "MOST_BYTES", room)
    engine = engine_of("llama", max_batch_tokens=64)
    in_pieces(engine)
    inquiries = asked(engine)
    run(engine, *inquiries)
    no_runs_left(engine)
    same_answers(inquiries, plain_answers())


def test_a_preempted_row_goes_on_as_before() -> None:
    engine = engine_of("llama", kv_bytes=7 * BLOCK * 384, max_running=3)
    in_pieces(engine)
    inquiries = asked(engine)
    run(engine, *inquiries)
    assert engine.scheduler.n_preemptions > 0
    no_runs_left(engine)
    same_answers(inquiries, plain_answers())


def test_a_batch_that_stays_the_same_is_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[DecodeEdits] = []
    written: list[int] = []

    class Counted(DecodeEdits):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    def write(*args: Any) -> None:
        written.append(len(args[5]))
        write_affine(*args)

    write_affine = edit_tables.write_affine
    monkeypatch.setattr(step, "DecodeEdits", Counted)
    monkeypatch.setattr(edit_tables, "write_affine", write)
    engine = engine_of("llama", max_batch_tokens=64)
    in_pieces(engine)
    steer = [{"steps": [at("layers.1.resid.post", "add")]}] * 3
    ends = [ask(engine, carried(engine, program, words(random_ids(i), n_prompt=8, n_new=12)),
                words(random_ids(i)[:8]), "generate", max_tokens=12, ignore_eos=True)
            for i, program in enumerate(steer)]  # fmt: skip
    run(engine, *ends)
    assert len(made) == 1
    assert written == [3]  # all rows of the site at once
    assert made[0].asked == []


def test_programs_of_constants_cost_the_host_next_to_nothing_a_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(graphs, "_LASTING", 3)

    class Static(RunPieces):
        """Pieces that cost nothing: what is left is the host's work."""

        def _recorded(self, step: Piece) -> Piece:
            out = step()
            return lambda: out

    calls = {}
    heads = {"steps": [at(f"layers.{i}.attn.head.1.z", "zero") for i in range(3)]}
    for program in (None, heads):
        engine = engine_of("llama", max_batch_tokens=64)
        in_pieces(engine, Static)
        for i in range(6):
            text = words(random_ids(i), n_prompt=len(random_ids(i)), n_new=40)
            given = None if program is None else carried(engine, program, text)
            ask(engine, given, words(random_ids(i)), "generate", max_tokens=40, ignore_eos=True)
        for _ in range(10):
            engine.step()
        with Calls() as counted:
            for _ in range(8):
                engine.step()
        calls[program is None] = counted.n / 8
        engine.close()
    assert calls[False] - calls[True] < 6 * 2 + 30


def test_heads_of_single_layers_are_pieces_until_the_choice_has_lasted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(graphs, "_LASTING", 3)
    engine = engine_of("llama", max_batch_tokens=64)
    pieces = in_pieces(engine)
    text = words(random_ids(0), n_prompt=len(random_ids(0)), n_new=8)
    program = {"steps": [at(f"layers.{i}.attn.head.1.z", "zero") for i in (1, 2)]}
    got = ask(engine, carried(engine, program, text), words(random_ids(0)), "generate",
              max_tokens=8, ignore_eos=True)  # fmt: skip
    run(engine, got)
    spans = [(key.first, key.last, len(key.tabled)) for key in pieces._captured]
    assert spans == [(0, 1, 0), (1, 2, 1), (2, 3, 1), (0, 3, 2)]


def test_tables_that_cannot_be_captured_are_done_without(caplog: pytest.LogCaptureFixture) -> None:
    class Refusing(RunPieces):
        def _capture(self, key: Any) -> Piece:
            if key.tabled:
                raise RuntimeError("no such luck")
            return super()._capture(key)

    engine = engine_of("llama", max_batch_tokens=64)
    in_pieces(engine, Refusing)
    inquiries = asked(engine)
    run(engine, *inquiries)
    assert caplog.text.count("programs run without tables") == 1
    same_answers(inquiries, plain_answers())


_PLACES = st.one_of(
    st.builds(range, st.integers(0, 12), st.integers(1, 20)).filter(len),
    st.lists(st.integers(0, 20), min_size=1, max_size=8, unique=True).map(sorted),
)


@settings(max_examples=25, deadline=None)
@given(places=st.lists(_PLACES, min_size=1, max_size=3), token=st.integers(0, 22))
def test_what_is_steady_stays_true_as_long_as_it_says(places: list[Any], token: int) -> None:
    engine = engine_of("llama")
    ids = (random_ids(0) * 9)[:24]
    program = {
        "steps": [at("layers.1.mlp.out", pos={"index": list(p)}) for p in places[:2]],
        "out": [{"capture": "layers.0.resid.post", "pos": {"index": list(p)}} for p in places[2:]],
    }
    ask(engine, carried(engine, program, words(ids)), words(ids), "score")
    job = engine._inbox.submitted[-1]
    assert job.program is not None
    (edits,) = [r.edits for r in job.program.next_runs(1)]
    steady = edits.steady(token)
    for at_token in range(token, min(steady.stop, 30)):
        assert edits.steady(at_token) is steady
        assert _there(edits, at_token) == (set(steady.alone), steady.other)


def _there(edits: RunEdits, token: int) -> tuple[set[Any], set[Any]]:
    """Sites of one change and of more at a token, from the positions themselves."""
    touched = {k: sum(token in p.at for p in v) for k, v in edits._touches.items()}
    kept = {k for k, v in edits._kept.items() if any(token in rows.positions for rows in v)}
    alone = {k for k, n in touched.items() if n == 1 and k not in kept}
    return alone, ({k for k, n in touched.items() if n} | kept) - alone


# --- tables -------------------------------------------------------------------------------------
_SPECIAL = st.sampled_from([0.0, -0.0, 1.0, -2.5, 1e30, math.inf, -math.inf, math.nan])
_REFS = st.sampled_from([None, (0,), (1, 2), (0, 2)])


@settings(max_examples=40, deadline=None)
@given(
    numbers=st.lists(_SPECIAL, min_size=48, max_size=48),
    changes=st.dictionaries(
        st.integers(0, 3), st.tuples(st.sampled_from(["zero", "scale", "add", "set"]), _REFS)
    ),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_a_table_says_what_the_operations_say_and_leaves_other_rows_their_bits(
    numbers: list[float], changes: dict[int, Any], dtype: torch.dtype
) -> None:
    x = torch.tensor(numbers, dtype=dtype).view(4, 3, 4)
    rows, expected = [], x
    for row, (do, heads) in changes.items():
        ref = SiteRef("attn.head.z", 1, heads or (0, 1, 2))
        by = torch.tensor(0.0 if do == "zero" else -1.5, dtype=dtype)
        touch = Touch(0, "main", ref, do, "affine", Positions(((0, 9),)))
        rows.append((row, touch, by))
        expected = change_together(do, ref, expected, [row], [by])
    table = AffineTable(6, (3, 4), x)
    table.fill([(5, Touch(0, "main", SiteRef("attn.head.z", 1, (1,)), "zero", "affine",
                          Positions(((0, 9),))), x.new_zeros(()))])  # fmt: skip
    table.fill(rows)
    got = table.changed(x)
    for row in range(4):
        torch.testing.assert_close(got[row], expected[row], rtol=0, atol=0, equal_nan=True)
        if row not in changes:
            assert torch.equal(got[row].signbit() & ~x[row].isnan(), x[row].signbit())


# --- cuts ---------------------------------------------------------------------------------------
def test_sites_are_tabled_unless_their_layer_is_opened() -> None:
    z, post, pre = ("attn.head.z", 1), ("resid.post", 0), ("resid.pre", 1)
    assert tabled_sites(LLAMA, [z, post, pre], []) == {z, post, pre}
    assert tabled_sites(LLAMA, [z, post], [("mlp.out", 1)]) == set()
    assert tabled_sites(LLAMA, [z, post], [("mlp.out", 2)]) == {z, post}
    assert tabled_sites(LLAMA, [z, post], [("resid.pre", 1)]) == {z}
    assert tabled_sites(LLAMA, [("resid.post", 2)], []) == {("resid.post", 2)}
    assert tabled_sites(LLAMA, [("resid.post", 2)], [("final.norm.out", -1)]) == set()
    # What is not tabled is loose, and takes others with it.
    assert tabled_sites(LLAMA, [("attn.head.prob", 1), z, ("resid.post", 1)], []) == {
        ("resid.post", 1)
    }
    assert tabled_sites(LLAMA, [("embed.out", -1), ("resid.pre", 0)], []) == set()
    assert {site.name for site in SITES} >= TABLED


def test_parts_of_a_step() -> None:
    cuts = cuts_of([("mlp.out", 1)], 4)
    tabled = [("resid.post", 1), ("attn.head.z", 3), ("resid.post", 3)]
    found = [(p.first, p.last, p.opened, len(p.tabled)) for p in
             segments(cuts_of([], 4), tabled, 4, merged=False)]  # fmt: skip
    assert found == [(0, 2, False, 0), (2, 3, False, 1), (3, 4, False, 2)]
    merged = segments(cuts_of([], 4), tabled, 4, merged=True)
    assert [(p.first, p.last, len(p.tabled)) for p in merged] == [(0, 4, 3)]
    opened = segments(cuts, tabled[:2], 4, merged=True)
    assert [(p.first, p.last, p.opened) for p in opened] == [
        (0, 1, False), (1, 2, True), (2, 4, False),
    ]  # fmt: skip


def test_models_with_recurrent_layers_are_tabled_where_they_have_attention() -> None:
    config = recurrent_model("hybrid").config
    keys = [("resid.pre", i) for i in range(config.n_layers)]
    attention = {i for i, kind in enumerate(config.layers) if kind.mixer == "attention"}
    assert 0 < len(attention) < config.n_layers
    assert {layer for _, layer in tabled_sites(config, keys, [])} == attention
