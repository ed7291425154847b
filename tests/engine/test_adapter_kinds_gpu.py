"""Adapters of every kind on a GPU: graphs and Triton kernels answer as a CPU does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.engine.bypass_cases import KINDS, random_parameters
from tests.engine.drive import ask, run, small_engine
from tests.tiny import tiny_loaded

from invivo.models.load import LoadedModel

pytestmark = pytest.mark.gpu

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, "logprobs": 0}


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return tiny_loaded(Path(tmp_path_factory.mktemp("gpu")), device="cuda")


@pytest.mark.parametrize("graphs", [False, True])
def test_all_kinds_answer_as_on_a_cpu(tiny: LoadedModel, on_gpu: LoadedModel, graphs: bool) -> None:
    answers = []
    for model, options in ((tiny, {}), (on_gpu, {"cuda_graphs": graphs})):
        engine = small_engine(model, max_adapters=len(KINDS), **options)
        found: list[Any] = []
        # One after the other first: every new kind makes graphs that exist out of date.
        for i, specs in enumerate(KINDS.values()):
            parameters = random_parameters(model.config, specs)
            engine.adapters.publish(f"a{i}", specs, parameters)
            inquiry = ask(engine, [5, 77, 260, 3], adapter=f"a{i}", **GREEDY)
            run(engine, inquiry)
            found.append(inquiry)
        names = [None, *(f"a{i}" for i in range(len(KINDS)))]
        together = [ask(engine, [5, 77, 260, 3], adapter=name, **GREEDY) for name in names]
        run(engine, *together)
        answers.append(found + together)
    for one, other in zip(*answers, strict=True):
        assert one.tokens() == other.tokens()
        assert one.logprobs() == pytest.approx(other.logprobs(), abs=1e-3)
