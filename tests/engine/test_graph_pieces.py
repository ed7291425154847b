"""Decode steps in which programs act, cut into pieces: the same as layer by layer.

On a CPU a piece is run again where a GPU replays it: over the same static buffers, padding rows
included, so that everything but the capture itself is the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.edits.small_models import MAIN, OTHER, encode, random_ids, words
from tests.engine.drive import run, small_engine
from tests.engine.test_programs_runs import FAMILIES, ask, carried, engine_of, no_runs_left, result
from tests.tiny import tiny_loaded

from invivo.edits.blobs import Blobs
from invivo.edits.program import parse_program
from invivo.edits.resolve import resolve
from invivo.engine import graphs
from invivo.engine.engine import Engine
from invivo.engine.graphs import DecodeGraphs, Piece
from invivo.engine.step_cuts import cuts_of
from invivo.engine.types import Intervention

N_NEW = 5


class RunPieces(DecodeGraphs):
    """Pieces that are run where a GPU would replay them."""

    def _recorded(self, step: Piece) -> Piece:
        return step


def in_pieces(engine: Engine, kind: type[DecodeGraphs] = RunPieces) -> DecodeGraphs:
    """Let an engine on a CPU run its decode steps as one on a GPU does."""
    stepper = engine._stepper
    stepper._graphs = kind(
        stepper._decoder, stepper._cache, engine.adapters, max_rows=6, max_blocks=16
    )
    return stepper._graphs


_SITES = st.sampled_from(
    ["embed.out", "layers.0.resid.pre", "layers.1.resid.pre", "layers.0.resid.post",
     "layers.2.resid.post", "layers.*.resid.post", "layers.1.attn.head.*.z", "layers.2.mlp.out",
     "layers.0.attn.out", "final.norm.out", "logits"]
)  # fmt: skip


@st.composite
def touched(draw: st.DrawFn) -> dict[str, Any]:
    steps = [
        {"at": draw(_SITES), "do": "scale", "a": 0.5, "pos": "@generated"}
        for _ in range(draw(st.integers(0, 2)))
    ]
    if draw(st.booleans()):
        steps.append(
            {"at": "layers.1.attn.edge", "do": "edge_block", "from": {"index": 1},
             "to": "@generated"}
        )  # fmt: skip
    out = [
        {"capture": draw(_SITES), "pos": "@all"},
        {"measure": "logprob", "token": 3, "pos": "@generated"},
    ]
    return {"steps": steps, "out": out[: draw(st.integers(0, 2))]}


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(programs=st.lists(touched(), min_size=1, max_size=2))
@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_of_a_step_say_what_the_whole_step_says(
    family: str, programs: list[dict[str, Any]]
) -> None:
    answers = []
    for pieces in (True, False):
        engine = engine_of(family, max_batch_tokens=64)
        if pieces:
            in_pieces(engine)
        asked = [ask(engine, None, OTHER, "generate", temperature=0.0, max_tokens=N_NEW,
                     ignore_eos=True, logprobs=0)]  # fmt: skip
        for i, program in enumerate(programs):
            ids = random_ids(i)
            text = words(ids, n_prompt=len(ids), n_new=N_NEW)
            asked.append(
                ask(engine, carried(engine, program, text), words(ids), "generate",
                    temperature=0.0, max_tokens=N_NEW, ignore_eos=True, logprobs=0)
            )  # fmt: skip
        run(engine, *asked)
        no_runs_left(engine)
        answers.append(asked)
    for mine, plain in zip(*answers, strict=True):
        assert mine.tokens() == plain.tokens()
        assert mine.logprobs() == pytest.approx(plain.logprobs(), abs=1e-9)
    for mine, plain in zip(answers[0][1:], answers[1][1:], strict=True):
        (row,), (expected,) = result(mine).rows, result(plain).rows
        for ours, theirs in zip(row.captures, expected.captures, strict=True):
            torch.testing.assert_close(ours.value, theirs.value, rtol=1e-9, atol=1e-9)
        for ours, theirs in zip(row.measures, expected.measures, strict=True):
            torch.testing.assert_close(ours.values, theirs.values, rtol=1e-9, atol=1e-9)


def test_a_step_is_cut_where_it_is_touched_and_nowhere_else() -> None:
    assert cuts_of([], 4).bounds == [0, 4]
    assert not cuts_of([], 4).final
    between = cuts_of([("resid.post", 1), ("resid.pre", 2)], 4)
    assert (between.bounds, between.opened, between.offered) == ([0, 2, 4], set(), {2})
    inside = cuts_of([("attn.head.z", 1), ("mlp.out", 1)], 4)
    assert (inside.bounds, inside.opened) == ([0, 1, 2, 4], {1})
    assert cuts_of([("resid.post", 3)], 4).final
    assert cuts_of([("final.norm.out", -1)], 4).final
    assert cuts_of([("embed.out", -1)], 4).offered == {0}


def test_batches_without_programs_replay_the_whole_step() -> None:
    captured: list[int] = []

    class Counted(RunPieces):
        def _recorded(self, step: Piece) -> Piece:
            captured.append(len(self._captured))
            return step

    engine = engine_of("llama", max_batch_tokens=64)
    graphs = in_pieces(engine, Counted)
    run(engine, ask(engine, None, MAIN, "generate", max_tokens=4, ignore_eos=True))
    assert len(captured) == 1
    assert all(key.embeds and key.ends for key in graphs._captured)
    text = words(list(MAIN.ids), n_prompt=len(MAIN.ids), n_new=4)
    add = {"steps": [{"at": "layers.1.resid.post", "do": "add", "v": 1.0, "pos": "@generated"}]}
    run(engine, ask(engine, carried(engine, add, text), MAIN, "generate", max_tokens=4,
                    ignore_eos=True))  # fmt: skip
    # The layers before and those behind the touch, each once.
    assert sorted((key.first, key.last) for key in graphs._captured) == [(0, 2), (0, 3), (2, 3)]
    assert len(captured) == 3


@pytest.mark.gpu
@pytest.mark.parametrize(("tabled", "whole"), [(False, False), (True, False), (True, True)])
def test_replayed_pieces_equal_a_step_launched_kernel_by_kernel(
    tmp_path: Path, tabled: bool, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Constants in tables where nothing is captured, pieces opened where something is; steps that
    are one piece where all is in tables."""
    monkeypatch.setattr(graphs, "_LASTING", 0 if whole else 24)
    loaded = tiny_loaded(tmp_path, device="cuda", dtype="float32")
    config = loaded.config
    wanted = [{"capture": "layers.*.resid.post", "pos": "@generated"},
              {"measure": "logprob", "token": 3, "pos": "@generated"}]  # fmt: skip
    programs: list[dict[str, Any]] = [
        {"steps": [{"at": site, "do": "scale", "a": 0.5, "pos": "@generated"}]}
        | ({} if tabled else {"out": wanted})
        for site in ("layers.0.resid.post", "layers.1.attn.head.0.z", "final.norm.out", "logits")
    ][: 2 if whole else 4]  # fmt: skip
    answers = []
    for replays in (True, False):
        engine = small_engine(loaded, cuda_graphs=replays, max_batch_tokens=64, max_running=8)
        asked = [ask(engine, None, OTHER, "generate", temperature=0.0, max_tokens=N_NEW,
                     ignore_eos=True, logprobs=0)]  # fmt: skip
        for i, program in enumerate(programs):
            ids = random_ids(i)
            text = words(ids, n_prompt=len(ids), n_new=N_NEW)
            resolved = resolve(parse_program(program), config, {"main": text}, encode=encode)
            carry = Intervention(resolved, Blobs())
            asked.append(
                ask(engine, carry, words(ids), "generate", temperature=0.0, max_tokens=N_NEW,
                    ignore_eos=True, logprobs=0)
            )  # fmt: skip
        run(engine, *asked)
        answers.append(asked)
        if replays:
            assert engine._stepper._graphs is not None
            assert (engine._stepper._graphs._ready is not None) == whole
    for mine, plain in zip(*answers, strict=True):
        assert mine.tokens() == plain.tokens()
        assert mine.logprobs() == pytest.approx(plain.logprobs(), abs=1e-4)
    for mine, plain in [] if tabled else zip(answers[0][1:], answers[1][1:], strict=True):
        (row,), (expected,) = result(mine).rows, result(plain).rows
        for ours, theirs in zip(row.captures, expected.captures, strict=True):
            torch.testing.assert_close(ours.value, theirs.value, rtol=1e-4, atol=1e-4)
        for ours, theirs in zip(row.measures, expected.measures, strict=True):
            torch.testing.assert_close(ours.values, theirs.values, rtol=1e-4, atol=1e-4)
