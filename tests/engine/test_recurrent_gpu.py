"""Recurrent layers on a GPU: known beginnings, graphs and programs answer as on a CPU."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.edits.small_models import encode, random_ids, words
from tests.engine.drive import Inquiry, ask, run, small_engine

from invivo.edits.blobs import Blobs
from invivo.edits.program import parse_program
from invivo.edits.resolve import resolve
from invivo.engine.engine import Engine
from invivo.engine.types import Intervention
from invivo.models.config import ModelConfig
from invivo.models.gla_config import gla_model
from invivo.models.load import LoadedModel, random_model

pytestmark = pytest.mark.gpu

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "hybrid": {"attention_layers": (1,), "attention_kv_heads": 2, "conv_size": 4},
}
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "logprobs": 0}
PROGRAMS: list[dict[str, Any]] = [
    {"steps": [{"at": "layers.*.gla.head.*.state", "do": "state_reset", "pos": {"index": 20}}]},
    {"steps": [{"at": "layers.0.gla.head.1.gate", "do": "scale", "a": 0.5, "pos": "@generated"}]},
    {"steps": [{"at": "layers.2.gla.edge", "do": "edge_block", "from": {"range": [3, 9]},
                "to": "@all"}]},
    {"out": [{"capture": "layers.2.gla.head.*.state", "pos": {"index": [5, -1]}},
             {"capture": "layers.0.gla.head.*.z", "pos": "@generated"}]},
]  # fmt: skip


def config_of(shape: str) -> ModelConfig:
    return gla_model(
        vocab_size=40, d_model=128, n_layers=3, n_heads=4, d_ff=96, max_positions=512,
        **SHAPES[shape],
    )  # fmt: skip


@cache
def served(shape: str, device: str) -> LoadedModel:
    decoder = random_model(config_of(shape), dtype=torch.float32)  # the same numbers everywhere
    decoder = decoder.to(device)
    return LoadedModel("gla", Path(), decoder.config, decoder, None, "-")


def engine_of(shape: str, device: str, **options: Any) -> Engine:
    small = {"kv_bytes": 64 << 20, "max_running": 8, "snapshot_tokens": 16}
    return small_engine(served(shape, device), **(small | options))


def asked(engine: Engine, ids: list[int], program: dict[str, Any] | None = None) -> Inquiry:
    if program is None:
        return ask(engine, ids, max_tokens=12, **GREEDY)
    prompt = words(ids, n_prompt=len(ids), n_new=12)
    resolved = resolve(parse_program(program), engine.model.config, {"main": prompt}, encode=encode)
    return ask(engine, ids, max_tokens=12, **GREEDY, intervention=Intervention(resolved, Blobs()))


def alike(one: Inquiry, other: Inquiry) -> None:
    assert one.reason() == other.reason() == "length", (one.outputs[-1], other.outputs[-1])
    assert one.tokens() == other.tokens()
    assert one.logprobs() == pytest.approx(other.logprobs(), abs=1e-3)


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_known_beginnings_answer_as_on_a_cpu(shape: str, overlap: bool, graphs: bool) -> None:
    engines = engine_of(shape, "cpu"), engine_of(shape, "cuda", overlap=overlap, cuda_graphs=graphs)
    common = random_ids(1, 50)
    for end in ([1, 2], [1, 3], [4], [1, 2]):
        answers = []
        for engine in engines:
            answers.append(asked(engine, [*common, *end]))
            run(engine, answers[-1])
        alike(*answers)
    assert engines[1].stats().prefix["hits"] == engines[0].stats().prefix["hits"] > 0


@pytest.mark.parametrize("shape", SHAPES)
def test_programs_beside_plain_requests_answer_as_on_a_cpu(shape: str) -> None:
    answers = []
    for device in ("cpu", "cuda"):
        engine = engine_of(shape, device)
        ids = [random_ids(seed, 30 + seed) for seed in range(5)]
        inquiries = [asked(engine, i, p) for i, p in zip(ids, [*PROGRAMS, None], strict=True)]
        run(engine, *inquiries)
        answers.append(inquiries)
    for one, other in zip(*answers, strict=True):
        alike(one, other)
        mine, theirs = one.outputs[-1].program, other.outputs[-1].program
        if mine is not None and theirs is not None:
            for a, b in zip(mine.rows[0].captures, theirs.rows[0].captures, strict=True):
                torch.testing.assert_close(a.value, b.value, rtol=1e-3, atol=1e-3)
