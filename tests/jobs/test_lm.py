"""Fine-tuning through the LM interface."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.waiting import PATIENCE

import invivo
from invivo.errors import Conflict, InvalidRequest, NotFound, Unavailable
from invivo.local import LocalLM
from invivo.models.load import LoadedModel

DATA = [{"prompt": f"hello {i}", "completion": " the cat and the dog"} for i in range(6)]
SETTINGS: dict[str, Any] = {"r": 4, "on": "q,v", "batch_size": 2, "learning_rate": 1e-2}


def load(tiny: LoadedModel, state: Path) -> LocalLM:
    return invivo.load(tiny.name, kv_bytes=8 << 20, state=state)


def test_an_adapter_is_learned_and_answers(
    tiny: LoadedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with load(tiny, tmp_path) as lm:
        job = lm.finetune(DATA, name="poet", steps=40, **SETTINGS)
        info = job.wait(progress=True, timeout=PATIENCE)
        assert info.status == "succeeded"
        assert "40/40" in capsys.readouterr().err
        before = lm.score(("hello 1", " the cat and the dog")).logprob
        after = lm.score(("hello 1", " the cat and the dog"), adapter="poet").logprob
        assert after > before + 1
        assert [one.id for one in lm.jobs()] == [job.id]
        assert lm.job(job.id).status == "succeeded"
        results, file = lm.files()
        assert results.id in job.info().result_files
        lm.delete_file(results.id)
        again = lm.finetune(file.id, steps=1, **SETTINGS)
        assert again.wait(timeout=PATIENCE).name == "job-1"
        lm.delete_file(file.id)
        assert [one.purpose for one in lm.files()] == ["fine-tune-results"]
        with pytest.raises(NotFound):
            lm.finetune(file.id)
        with pytest.raises(NotFound):
            lm.job("ftjob-none")


async def test_the_same_without_blocking(tiny: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("the cat and the dog\n" * 40)
    with load(tiny, tmp_path / "state") as lm:
        file = await lm.aupload_file(path)
        job = await lm.afinetune(file.id, name="poet", max_length=32, steps=2, **SETTINGS)
        assert (await lm.ajob(job.id)).wait(timeout=PATIENCE).status == "succeeded"
        assert len(await lm.ajobs()) == 1
        assert len(await lm.afiles()) == 2  # the data and the metrics
        await lm.adelete_file(file.id)


def test_what_is_not_data_is_refused(tiny: LoadedModel, tmp_path: Path) -> None:
    with load(tiny, tmp_path) as lm:
        with pytest.raises(NotFound, match="data"):
            lm.finetune(tmp_path / "missing.jsonl")
        for data in ([], 3, [{"text": {1}}]):
            with pytest.raises(InvalidRequest, match="data"):
                lm.finetune(data)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest, match="line 1"):
            lm.finetune([{"txt": "the cat"}])
        assert lm.jobs() == []
        assert lm.files() == []


def test_one_model_at_a_time_has_the_folder_also_after_being_dropped(
    tiny: LoadedModel, tmp_path: Path
) -> None:
    first = load(tiny, tmp_path)
    job = first.finetune(DATA, name="poet", steps=10**6, **SETTINGS)
    with load(tiny, tmp_path) as second, pytest.raises(Conflict, match="state"):
        second.jobs()
    del first, job  # the job itself would keep the service
    gc.collect()
    with load(tiny, tmp_path) as third:
        assert third.jobs()[0].info().status in ("queued", "running")
        third.jobs()[0].cancel()
    with pytest.raises(Unavailable):
        third.jobs()


def test_the_database_library_is_imported_at_the_first_use_only(tiny: LoadedModel) -> None:
    code = (
        "import sys, invivo\n"
        f"with invivo.load({tiny.name!r}, kv_bytes=8 << 20) as lm:\n"
        "    lm.generate('the', max_tokens=1)\n"
        "print('sqlalchemy' in sys.modules)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
