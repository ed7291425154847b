"""A model that carries a state, behind the LM interface: programs and known beginnings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.models.gla_models import tiny_gla
from tests.tiny import tiny_loaded

from invivo.engine.config import EngineConfig
from invivo.errors import InvalidRequest
from invivo.local import LocalLM
from invivo.models.load import LoadedModel, random_model

PROMPT = "the red dog and the blue cat is not of the world"
RESET = {"at": "layers.*.gla.head.*.state", "do": "state_reset", "pos": {"span": " and"}}
EDGE = {"at": "layers.2.gla.edge", "do": "edge_block", "from": {"span": " red"}, "to": "@all"}
OUT: list[dict[str, Any]] = [
    {"capture": "layers.0.gla.head.1.state", "pos": "@last", "name": "state"},
    {"measure": "logprob", "token": 5, "name": "chance"},
]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalLM]:
    words = tiny_loaded(tmp_path_factory.mktemp("words"))
    config = tiny_gla("hybrid", vocab_size=words.config.vocab_size)
    decoder = random_model(config, dtype=torch.float64)
    model = LoadedModel("tiny-gla", Path(), config, decoder, words.tokenizer, "-")
    with LocalLM(model, EngineConfig(block_size=4, snapshot_tokens=4)) as made:
        yield made


def test_run_is_the_engines_and_explain_names_what_it_does(lm: LocalLM) -> None:
    program = {"steps": [RESET], "out": OUT}
    result = lm.run(program, PROMPT)
    state = result.rows[0].captures[0].values
    assert state.shape == (1, 1, 4, 8)
    exact = lm.run(program | {"numerics": "exact"}, PROMPT)  # by the interpreter
    np.testing.assert_allclose(state, exact.rows[0].captures[0].values, rtol=1e-5, atol=1e-6)
    told = lm.explain(program, PROMPT)
    assert [(t["at"], t["do"], t["tokens"]) for t in told["order"]] == [
        (f"layers.{i}.gla.head.0-3.memory", "zero", [" and"]) for i in (0, 2)
    ]
    assert told["captures"][0]["shape"] == [1, 1, 4, 8]
    (edge,) = lm.explain({"steps": [EDGE]}, PROMPT)["order"]
    assert (edge["at"], edge["keys"]["tokens"]) == ("layers.2.gla.edge", [" red"])


def test_text_is_written_under_a_program_and_from_a_known_beginning(lm: LocalLM) -> None:
    texts = [
        lm.generate(PROMPT, max_tokens=6, temperature=0, interventions={"steps": [EDGE]}).text
        for _ in range(2)
    ]
    assert texts[0] == texts[1]
    before = lm.stats()["prefix"]["hits"]
    first = lm.generate(PROMPT, max_tokens=6, temperature=0)
    assert lm.generate(PROMPT, max_tokens=6, temperature=0).text == first.text
    assert lm.stats()["prefix"]["hits"] >= before + 8


def test_what_a_layer_lacks_is_said(lm: LocalLM) -> None:
    with pytest.raises(InvalidRequest, match="softmax attention"):
        lm.run({"steps": [RESET | {"at": "layers.1.gla.head.0.state"}]}, PROMPT)
    with pytest.raises(InvalidRequest, match="carries a state"):
        lm.generate(
            PROMPT,
            max_tokens=2,
            interventions={
                "steps": [{"at": "input.mask", "do": "edge_block", "from": "@first", "to": "@last"}]
            },
        )
