"""Updates that nobody waits for: what a GPU does, here on the CPU's own clock."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tests.engine.drive import small_engine
from tests.engine.test_finetune import LORA, UNHURRIED, drive, plain_loop, start, texts, trained
from tests.tiny import tiny_loaded

from invivo.engine.bypasses import BypassSpec
from invivo.engine.job_spec import JobSpec
from invivo.engine.optimizer import Optimizer, clip_factor, total_norm
from invivo.engine.tuning_job import TuningJob
from invivo.models.load import LoadedModel

ONE = (BypassSpec("steering"),)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return tiny_loaded(Path(tmp_path_factory.mktemp("exact")), dtype=torch.float64)


def made(spec: JobSpec) -> tuple[Optimizer, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    parameters = {name: torch.randn(3, 5).requires_grad_() for name in ("a", "b")}
    return Optimizer(spec, parameters), parameters


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("clip", [None, 0.5, 1e6])
def test_an_update_nobody_waits_for_is_the_same(kind: str, clip: float | None) -> None:
    spec = JobSpec("j", ONE, 9, optimizer=kind, momentum=0.5, weight_decay=0.1, clip=clip)  # type: ignore[arg-type]
    plain, expected = made(spec)
    deferred, got = made(spec)
    for step in range(4):
        gradients = {name: torch.randn(3, 5) * (step + 1) for name in expected}
        norm = total_norm(gradients)
        loss = torch.tensor(float("nan") if step == 2 else 1.0, dtype=torch.float64)
        copies = {name: value.clone() for name, value in gradients.items()}
        deferred.step_if_finite(copies, 0.01, loss, norm, clip)
        if step == 2:
            deferred.updates -= 1  # as the job does when it learns of the loss
            continue
        factor = clip_factor(float(norm), clip)
        plain.step({name: value * factor for name, value in gradients.items()}, 0.01)
    assert plain.updates == deferred.updates == 3
    for name in expected:
        assert torch.allclose(got[name], expected[name], rtol=0, atol=1e-6)
    for name, value in plain.state.items():
        assert torch.allclose(deferred.state[name], value, rtol=0, atol=1e-6)


def test_a_gradient_that_is_not_finite_changes_no_bit() -> None:
    optimizer, parameters = made(JobSpec("j", ONE, 9))
    optimizer.step({name: torch.ones(3, 5) for name in parameters}, 0.1)
    before = [t.detach().clone() for t in (*parameters.values(), *optimizer.state.values())]
    bad = {name: torch.full((3, 5), math.inf) for name in parameters}
    optimizer.step_if_finite(bad, 0.1, torch.tensor(1.0), total_norm(bad), 1.0)
    after = [t.detach() for t in (*parameters.values(), *optimizer.state.values())]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_a_job_that_waits_for_nothing_is_the_plain_loop(
    exact: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = JobSpec("j", LORA, 6, 0.01, gradient_accumulation=2, clip=0.3, publish_every=3)
    expected, parameters = plain_loop(exact, spec, texts(), torch.optim.AdamW)
    monkeypatch.setattr(TuningJob, "defers", True)
    engine = small_engine(exact, max_batch_tokens=48, max_running=8, **UNHURRIED)
    job = start(engine, spec, texts(), tmp_path / "checkpoints")
    drive(engine, job)
    assert job.handle is not None
    assert job.handle.losses == pytest.approx(expected, abs=1e-9)
    for name, value in trained(engine, job).items():
        assert torch.allclose(value, parameters[name], rtol=0, atol=1e-9)
    steps = [event["step"] for event in job.of("step")]
    assert steps == list(range(1, 7))
    kinds = job.kinds()  # a version comes behind the steps that it holds
    assert kinds.index("published") > [i for i, kind in enumerate(kinds) if kind == "step"][2]
