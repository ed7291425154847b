"""The engine on a GPU: the same answers as on a CPU, with steps overlapped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.engine.drive import ask, run, small_engine
from tests.tiny import tiny_loaded

from invivo.models.load import LoadedModel

pytestmark = pytest.mark.gpu

ASKED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"seed": 1},
    {"seed": 2, "top_p": 0.8, "temperature": 1.3},
    {"seed": 3, "top_k": 5, "repetition_penalty": 1.3},
    {"seed": 4, "min_p": 0.05, "frequency_penalty": 0.5, "min_tokens": 10},
    {"temperature": 0.0, "presence_penalty": 1.5, "logit_bias": ((5, 1.0),)},
    {"temperature": 0.0, "prompt_logprobs": 2},
]


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return tiny_loaded(Path(tmp_path_factory.mktemp("gpu")), device="cuda")


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
def test_answers_equal_those_of_a_cpu(
    tiny: LoadedModel, on_gpu: LoadedModel, overlap: bool, graphs: bool
) -> None:
    engines = small_engine(tiny), small_engine(on_gpu, overlap=overlap, cuda_graphs=graphs)
    prompts = [[i, 7, 9, 200 - i] for i in range(len(ASKED))]
    answers = []
    for engine in engines:
        some = [
            ask(engine, prompt, max_tokens=20, logprobs=1, **asked)
            for prompt, asked in zip(prompts, ASKED, strict=True)
        ]
        scored = ask(engine, list(range(60)), kind="score", prompt_logprobs=1)
        embedded = ask(engine, list(range(50)), kind="embed")
        run(engine, *some, scored, embedded)
        answers.append((some, scored, embedded))
    (cpu, cpu_score, cpu_vector), (gpu, gpu_score, gpu_vector) = answers
    for one, other in zip(cpu, gpu, strict=True):
        assert one.tokens() == other.tokens()
        assert one.logprobs() == pytest.approx(other.logprobs(), abs=1e-3)
        assert one.prompt_logprobs() == pytest.approx(other.prompt_logprobs(), abs=1e-3)
    assert cpu_score.prompt_logprobs() == pytest.approx(gpu_score.prompt_logprobs(), abs=1e-3)
    assert cpu_vector.outputs[-1].embedding == pytest.approx(
        gpu_vector.outputs[-1].embedding, abs=1e-3
    )


def test_the_cache_takes_what_the_gpu_leaves(on_gpu: LoadedModel) -> None:
    engine = small_engine(on_gpu, kv_bytes=None, max_running=4)
    assert engine.scheduler.blocks_total == 4 * 256 // 16
    inquiry = ask(engine, [1, 2, 3], max_tokens=5, temperature=0.0)
    run(engine, inquiry)
    assert len(inquiry.tokens()) == 5
