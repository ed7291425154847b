"""Rows of a sweep begin where they part from each other; runs end behind what is wanted of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.edits.small_models import MAIN
from tests.engine.drive import run
from tests.engine.test_programs_runs import (
    BLOCK,
    FAMILIES,
    ask,
    carried,
    engine_of,
    no_runs_left,
    oracle,
    result,
    same,
)

from invivo.engine.engine import Engine
from invivo.models.decoder import Layer

_TOUCHES = st.sampled_from(
    [
        {"at": "layers.$L.attn.head.$H.z", "do": "replace", "from": {"run": "cf"}},
        {"at": "layers.$L.attn.head.$H.z", "do": "zero"},
        {"at": "layers.$L.resid.post", "do": "scale", "a": "$H"},
        {"at": "layers.$L.resid.pre", "do": "add", "v": 0.3, "c": "$H"},
        {"at": "layers.$L.mlp.out", "do": "lerp", "w": 0.25, "from": {"run": "plain"}},
        {"at": "layers.$L", "do": "skip"},
        {"at": "embed.out", "do": "scale", "a": "$H"},
        {"at": "logits", "do": "scale", "a": "$H"},
        {"at": "final.norm.out", "do": "scale", "a": "$L"},
    ]
)
_POSITIONS = st.sampled_from(["@last", {"index": 3}, {"index": [2, 5]}, {"range": [4, 8]}, "@all"])
_FIXED = st.sampled_from(
    [
        None,
        {"at": "layers.1.mlp.out", "do": "scale", "a": 0.5, "pos": {"index": 4}},
        {"at": "layers.0.attn.edge", "do": "edge_block", "from": {"index": 2}, "to": "@last"},
        {"at": "input.mask", "do": "parallel", "blocks": [{"range": [1, 3]}, {"range": [3, 5]}]},
    ]
)
_OUTPUTS = st.sampled_from(
    [
        {"measure": "logit_diff", "a": 5, "b": 8},
        {"measure": "kl", "to": "plain", "pos": "@all"},
        {"capture": "layers.2.resid.post", "pos": "@last"},
        {"capture": "layers.1.resid.post", "pos": "@all", "reduce": "norm"},
        {"capture": "layers.*.attn.head.1.prob", "pos": {"index": 6}},
    ]
)


@st.composite
def sweeps(draw: st.DrawFn) -> dict[str, Any]:
    touch = draw(_TOUCHES) | {"pos": draw(_POSITIONS)}
    fixed = draw(_FIXED)
    return {
        "sweep": {"L": "0..2", "H": [1, 2]},
        "steps": [touch] if fixed is None else [fixed, touch],
        "out": draw(st.lists(_OUTPUTS, min_size=1, max_size=2)),
    }


@settings(
    max_examples=10,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    program=sweeps(),
    rows=st.sampled_from([7, 13, 64]),
    n_blocks=st.sampled_from([5, 9, 200]),
)
@pytest.mark.parametrize("family", FAMILIES)
def test_sweeps_say_the_same_with_and_without_fan_out(
    family: str, program: dict[str, Any], rows: int, n_blocks: int
) -> None:
    got = []
    for fan_out in (True, False):
        engine = engine_of(
            family, max_batch_tokens=rows, fan_out=fan_out, kv_bytes=n_blocks * _block_bytes(family)
        )
        carry = carried(engine, program)
        mate = ask(engine, None, MAIN, "generate", max_tokens=4, temperature=0.0, logprobs=0)
        asked = ask(engine, carry)
        run(engine, mate, asked)
        same(result(asked), oracle(engine, carry))
        no_runs_left(engine)
        got.append((mate.tokens(), mate.logprobs()))
    assert got[0][0] == got[1][0]
    assert got[0][1] == pytest.approx(got[1][1], abs=1e-12)


def _block_bytes(family: str) -> int:
    config = engine_of(family).model.config
    return 2 * config.n_layers * config.n_kv_heads * config.head_dim * BLOCK * 8


@pytest.fixture
def rows_by_layer(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows have gone through each layer of a tiny model."""
    counts = [0, 0, 0]
    forward = Layer.forward

    def counted(self: Layer, pending: Any, residual: torch.Tensor, *rest: Any) -> Any:
        counts[self.index] += residual.shape[0]
        return forward(self, pending, residual, *rest)

    monkeypatch.setattr(Layer, "forward", counted)
    return counts


def _rows_of(engine: Engine, program: dict[str, Any], counts: list[int]) -> list[int]:
    before = list(counts)
    run(engine, ask(engine, carried(engine, program)))
    no_runs_left(engine)
    return [now - then for now, then in zip(counts, before, strict=True)]


def test_a_sweep_computes_one_row_from_the_layer_that_it_changes(rows_by_layer: list[int]) -> None:
    program = {
        "sweep": {"L": "0..2", "H": "0..3"},
        "steps": [{"at": "layers.$L.attn.head.$H.z", "pos": "@last", "do": "zero"}],
        "out": [{"measure": "logprob", "token": 3}],
    }
    n = len(MAIN.ids)
    assert _rows_of(engine_of("llama"), program, rows_by_layer) == [n + 4, n + 8, n + 12]
    # Without: every row begins at the block that its change is in.
    whole = _rows_of(engine_of("llama", fan_out=False), program, rows_by_layer)
    assert whole[0] == whole[1] == whole[2] > n + 4


def test_a_run_ends_behind_the_last_layer_that_is_wanted(rows_by_layer: list[int]) -> None:
    program = {"out": [{"capture": "layers.0-1.resid.post"}]}
    n = len(MAIN.ids)
    assert _rows_of(engine_of("llama"), program, rows_by_layer) == [n, n, 0]
    stop = {"steps": [{"at": "layers.0", "do": "stop"}],
            "out": [{"capture": "layers.0.resid.post", "reduce": "lens", "top": 2}]}  # fmt: skip
    assert _rows_of(engine_of("llama"), stop, rows_by_layer) == [n, 0, 0]


def test_keys_of_a_run_that_ends_early_are_found_by_nobody() -> None:
    engine = engine_of("llama")
    run(engine, ask(engine, carried(engine, {"out": [{"capture": "layers.0.resid.post"}]})))
    warm = ask(engine, None, MAIN, "generate", max_tokens=4, temperature=0.0, logprobs=0)
    run(engine, warm)
    cold = ask(engine_of("llama"), None, MAIN, "generate", max_tokens=4, temperature=0.0)
    assert warm.outputs[-1].cached_tokens == 0
    assert not cold.outputs


def test_the_trunk_of_a_sweep_gives_way_to_requests() -> None:
    """Rows whose trunk has lost its memory begin at their own first token."""
    sweep = {
        "sweep": {"L": "0..2", "H": "0..3"},
        "steps": [{"at": "layers.$L.attn.head.$H.z", "pos": "@last", "do": "zero"}],
        "out": [{"measure": "logprob", "token": 3}],
    }
    engine = engine_of("llama", kv_bytes=8 * _block_bytes("llama"), max_running=3)
    carry = carried(engine, sweep)
    asked = ask(engine, carry)
    mates = []
    while not engine.scheduler._held and not asked.done:
        engine.step()
    for _ in range(3):
        mates.append(
            ask(engine, None, MAIN, "generate", max_tokens=12, temperature=0.0, ignore_eos=True)
        )
    run(engine, asked, *mates)
    same(result(asked), oracle(engine, carry))
    assert not engine.scheduler._held
    no_runs_left(engine)


def test_an_aborted_sweep_lets_go_of_its_trunk() -> None:
    engine = engine_of("llama")
    asked = ask(
        engine,
        carried(
            engine,
            {
                "sweep": {"L": "0..2", "H": "0..3"},
                "steps": [{"at": "layers.$L.attn.head.$H.z", "pos": "@last", "do": "zero"}],
                "out": [{"measure": "logprob", "token": 3}],
            },
        ),
    )
    while not engine.scheduler._held:
        assert not asked.done
        engine.step()
    engine.abort(asked.request.id)
    engine.step()
    assert asked.reason() == "cancelled"
    assert not engine.scheduler._held
    assert engine.scheduler.blocks_used == 0
    no_runs_left(engine)
