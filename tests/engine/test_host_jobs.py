"""Jobs whose tapes wait in host memory in part, in the engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.engine.drive import small_engine
from tests.engine.test_finetune import Job, drive, nothing_is_held, start, texts
from tests.tiny import tiny_loaded

from invivo.engine.bypasses import BypassSpec
from invivo.engine.config import EngineConfig
from invivo.engine.engine import Engine
from invivo.engine.graph_pruning import differentiate
from invivo.engine.job_spec import JobSpec
from invivo.engine.tape_budget import Budgets
from invivo.engine.training_graph import build_graph
from invivo.errors import InvalidRequest
from invivo.models.load import LoadedModel

LORA = (BypassSpec("lora", ("down",), 4),)
ROWS = 128  # of the longest text; it takes several iterations


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return tiny_loaded(Path(tmp_path_factory.mktemp("model")), dtype=torch.float64)


def spec_of(model: LoadedModel, name: str, steps: int) -> JobSpec:
    """Whose tape is too small for the longest texts."""
    graph = build_graph(model.config, [LORA[0].trainable], length=1, dtype="float64")
    budgets = Budgets(model.config, graph, differentiate(graph))
    bits = 0.7 * budgets.least_bits + 0.3 * budgets.most_bits
    return JobSpec(
        name, LORA, steps, learning_rate=1e-2, order="layer", tape_bytes=int(bits * ROWS / 8)
    )


def served(model: LoadedModel, host_bytes: int) -> Engine:
    return small_engine(
        model, max_batch_tokens=48, tpot_ms=60_000.0, ttft_ms=600_000.0,
        host_bytes=host_bytes, host_gb_per_s=1e12,
    )  # fmt: skip


def on_the_shelf(engine: Engine) -> int:
    shelf = engine._finetuning._shelf
    return 0 if shelf is None else shelf.lent


@pytest.mark.parametrize("host_bytes", [1 << 22, 150_000])
def test_jobs_learn_the_same_with_and_without_a_host(model: LoadedModel, host_bytes: int) -> None:
    """Side by side; the smaller shelf has no room for all texts at once."""
    losses = []
    for n_bytes in (0, host_bytes):
        engine = served(model, n_bytes)
        data = [texts(6, seed, longest=120) for seed in (1, 2)]
        jobs = [
            start(engine, spec_of(model, name, 4), own)
            for name, own in zip("ab", data, strict=True)
        ]
        seen = 0

        def done(engine: Engine = engine, jobs: list[Job] = jobs) -> bool:
            nonlocal seen
            seen = max(seen, on_the_shelf(engine))
            return all(job.handle is not None and job.handle.ended.is_set() for job in jobs)

        drive(engine, *jobs, until=done)
        assert (seen > 0) == (n_bytes > 0)
        assert on_the_shelf(engine) == 0
        losses.append([job.handle.losses for job in jobs if job.handle is not None])
        nothing_is_held(engine)
    for one, other in zip(*losses, strict=True):
        assert other == pytest.approx(one, rel=1e-9)


def test_a_job_that_is_cancelled_or_paused_leaves_the_shelf(model: LoadedModel) -> None:
    engine = served(model, 1 << 22)
    jobs = [
        start(engine, spec_of(model, name, 50), texts(6, 3, longest=120)) for name in ("a", "b")
    ]
    drive(engine, until=lambda: on_the_shelf(engine) > 0)
    first, second = (job.handle for job in jobs)
    assert first is not None
    assert second is not None
    first.cancel()
    drive(engine, jobs[0])
    second.pause()
    drive(engine, until=lambda: second.state == "paused")
    assert on_the_shelf(engine) == 0
    second.resume()
    drive(engine, until=lambda: on_the_shelf(engine) > 0)
    second.cancel()
    drive(engine, jobs[1])
    assert on_the_shelf(engine) == 0
    nothing_is_held(engine)


def test_the_engine_checks_what_it_is_given() -> None:
    for given in (-1, 0.5, "many"):
        with pytest.raises(InvalidRequest, match="whole number") as caught:
            EngineConfig(host_bytes=given)  # type: ignore[arg-type]
        assert caught.value.field == "host_bytes"
    with pytest.raises(InvalidRequest, match="above 0") as caught:
        EngineConfig(host_gb_per_s=-1.0)
    assert caught.value.field == "host_gb_per_s"
