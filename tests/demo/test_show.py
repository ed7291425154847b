"""The whole demo on a tiny model in this process: phases, tables, document, report."""

from __future__ import annotations

import asyncio
import io
import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from tests.tiny import tiny_model_folder
from tests.waiting import PATIENCE

import invivo
from invivo.demo import learning, phases, report, show, workload
from invivo.demo.adapters import write_random_adapter
from invivo.demo.html_report import page
from invivo.demo.report import Findings
from invivo.demo.workload import ADAPTERS, CARD, tasks
from invivo.errors import Unavailable
from invivo.local import LocalLM


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalLM]:
    folder = tiny_model_folder(tmp_path_factory.mktemp("model"), max_position_embeddings=8192)
    state = tmp_path_factory.mktemp("state")
    with invivo.load(str(folder), kv_bytes=64 << 20, state=state) as made:
        for seed, name in enumerate(ADAPTERS):
            adapter = tmp_path_factory.mktemp("adapters") / name
            made.load_adapter(name, write_random_adapter(adapter, folder, seed))
        yield made


@pytest.fixture(scope="module")
def findings(lm: LocalLM) -> Iterator[Findings]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workload, "ROUND", 1.0)
        patch.setattr(phases, "HEAD_START", 0.1)
        patch.setattr(phases, "LONGEST", PATIENCE)
        small = {"steps": 12, "publish_every": 3, "r": 2}
        patch.setattr(learning, "HYPERPARAMETERS", {**learning.HYPERPARAMETERS, **small})
        yield asyncio.run(show._measured(Console(file=io.StringIO()), lm, time.time()))


def test_every_request_of_both_phases_succeeds(findings: Findings) -> None:
    alone, tuned = findings.phases
    assert report.failed(findings) == []
    assert [done.task.question for done in alone.results] == [t.question for t in tasks()]
    assert tuned.results
    assert all(d.shown for d in alone.results if d.task.kind != "stream")


def test_a_machine_that_keeps_no_promise_is_told_of(findings: Findings) -> None:
    easy, none = ({"ttft_ms": ms, "tpot_ms": ms} for ms in (1e9, 0.0))
    assert report.doubt(replace(findings, slo=easy)) is None
    hard = replace(findings, slo=none)
    told = report.doubt(hard)
    assert told is not None
    assert "Serving alone kept 0%" in told
    assert told in page(hard)
    console = Console(file=io.StringIO(), width=1000)
    report.show(console, hard)
    assert told in console.file.getvalue()  # type: ignore[attr-defined]


def test_job_learns_beside_the_load(findings: Findings) -> None:
    job = findings.learning.job
    assert job is not None
    assert (job.status, job.step, len(job.losses)) == ("succeeded", 12, 12)
    assert findings.phases[0].counted("train") == 0
    assert findings.phases[1].counted("train") > 0
    steps = [step for step, _ in findings.learning.held_out]
    assert (steps[0], steps[-1]) == (0, 12)
    assert findings.learning.held_out[-1][1] < findings.learning.held_out[0][1]


def test_structured_answers_have_their_form(findings: Findings) -> None:
    for done in findings.phases[0].results:
        if done.task.sampling.get("json_schema") is CARD and done.timing.tokens < 72:
            assert set(json.loads(done.shown)) == set(CARD["required"])
        if "choice" in done.task.sampling:
            assert done.shown in ("yes", "no")


def test_second_questions_find_their_document_in_the_cache(findings: Findings) -> None:
    hits = report.document(findings)["phases"]["serving alone"]["prefix_hits"]
    assert hits > 0.9 * 2 * workload.EXCERPT / 2


def test_tables_fit_a_terminal_and_the_document_holds_every_purpose(findings: Findings) -> None:
    console = Console(file=io.StringIO(), width=80)
    report.show(console, findings)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    document = json.loads(json.dumps(report.document(findings)))
    for purpose in {task.purpose for task in tasks()}:
        assert document["phases"]["serving alone"]["purposes"][purpose]["errors"] == []
    assert "…" not in text  # nothing is cut off at 80 columns
    assert "with fine-tuning" in text
    assert f"{findings.learning.held_out[-1][1]:.3f}" in text


def test_report_stands_alone(findings: Findings) -> None:
    html = page(findings)
    assert html.count("<svg") == 3
    assert not re.findall(r'(?:src|href)="(?!#)', html)
    assert "currentColor" in html
    for question in learning.QUESTIONS[:3]:
        assert question in html


def test_failed_job_ends_the_demo_with_its_reason(
    lm: LocalLM, findings: Findings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(workload, "ROUND", 1.0)
    endless = {**learning.HYPERPARAMETERS, "steps": 10_000}
    monkeypatch.setattr(learning, "HYPERPARAMETERS", endless)
    start = learning.start

    def cancelled(lm: LocalLM) -> object:
        job = start(lm)
        job.cancel()
        return job

    monkeypatch.setattr(learning, "start", cancelled)
    with pytest.raises(Unavailable, match="cancelled"):
        asyncio.run(show._measured(Console(file=io.StringIO()), lm, time.time()))
