"""Programs trained through the LM interface, in this process."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.jobs.test_lm import load
from tests.waiting import PATIENCE

from invivo.edits.builder import program
from invivo.errors import InvalidRequest, NotFound, TooLarge, Unavailable
from invivo.jobs import service
from invivo.jobs.program_jobs import keep_result
from invivo.models.load import LoadedModel

DATA = [
    {"prompt": f"the red {word}", "completion": " hello", "runs": {"cf": f"the blue {word}"}}
    for word in ("cat", "dog", "world")
]
MASKED: dict[str, Any] = {
    "runs": {"cf": {"prompt": "the blue cat"}},
    "params": {"mask": {"shape": [4, 1], "init": 1}, "v": {"shape": [32], "init": "blob:start"},
               "fixed": {"shape": [1], "init": 0.5}},
    "steps": [
        {"at": "layers.1.attn.head.*.z", "pos": "@last", "do": "lerp", "w": {"param": "mask"},
         "from": {"run": "cf", "map": "end"}},
        {"at": "layers.2.resid.post", "pos": "@prompt", "do": "add", "v": {"param": "v"},
         "c": {"param": "fixed"}},
        {"at": "layers.0.mlp.out", "pos": "@first", "do": "add", "v": "blob:start"},
    ],
}  # fmt: skip
START = {"start": np.full(32, 0.01, np.float32)}
QUICK: dict[str, Any] = {"learning_rate": 0.5, "batch_size": 3, "steps": 40, "shuffle": False}


def test_trained_values_answer_under_their_hash(tiny: LoadedModel, tmp_path: Path) -> None:
    with load(tiny, tmp_path) as lm:
        job = lm.finetune(
            DATA, program=MASKED, blobs=START, train=["mask", "v"], sparsity=0.001, **QUICK
        )
        info = job.wait(timeout=PATIENCE)
        assert info.status == "succeeded", info.error
        assert info.losses[-1] < info.losses[0] - 0.5  # type: ignore[operator]
        name = info.fine_tuned_model
        assert name is not None
        assert name.startswith("sha256:")
        made = lm.stored_program(name)
        assert made["params"]["fixed"]["init"] == 0.5
        mask = lm.stored_blob(made["params"]["mask"]["init"].removeprefix("blob:"))
        assert mask.shape == (4, 1)
        assert 0 <= mask.min() <= mask.max() <= 1
        token = lm.tokenize(" hello")[0]
        seen = {"out": [{"measure": "logprob", "token": token}]}
        before, after = (lm.run(one, "the red dog").measures[0].values[0]
                         for one in (seen, made | seen))  # fmt: skip
        assert after > before + 1
        text = lm.generate("the red cat", max_tokens=2, temperature=0, interventions=name).text
    with load(tiny, tmp_path) as lm:  # and in the next process
        lm.resume_jobs()
        again = lm.generate("the red cat", max_tokens=2, temperature=0, interventions=name)
        assert again.text == text
        assert lm.job(job.id).info().fine_tuned_model == name


def test_a_job_goes_on_in_the_next_process_with_its_tensors(
    tiny: LoadedModel, tmp_path: Path
) -> None:
    settings = QUICK | {"steps": 4000, "checkpoint_every": 2}
    with load(tiny, tmp_path) as lm:
        job = lm.finetune(DATA, program=MASKED, blobs=START, train="mask,v", **settings)
        job.pause()
        for owned in lm.programs.blob_sizes():
            lm.programs.forget_blob(owned)
    with load(tiny, tmp_path) as lm:
        again = lm.job(job.id)
        assert again.resume().status in ("queued", "running")
        again.cancel()
        assert again.wait(timeout=PATIENCE).status == "cancelled"
        assert not any("start" in event.message for event in again.events(100))


def test_a_steering_vector_from_the_builder(tiny: LoadedModel, tmp_path: Path) -> None:
    given = program().parameter("v", [32]).at("layers.1.resid.post").add({"param": "v"})
    with load(tiny, tmp_path) as lm:
        job = lm.finetune(
            [{"text": "the cat and the dog hello world"}], program=given, train=["v"],
            **QUICK | {"batch_size": 1, "publish_every": 6},
        )  # fmt: skip
        info = job.wait(timeout=PATIENCE)
        assert info.status == "succeeded", info.error
        assert info.losses[-1] < info.losses[0]  # type: ignore[operator]
        told = [e.message for e in job.events(100) if "values of step" in e.message]
        assert len(told) >= 2


@pytest.mark.parametrize("objective", ["logit_diff", "kl"])
def test_other_objectives(tiny: LoadedModel, tmp_path: Path, objective: str) -> None:
    steering = {
        "params": {"v": {"shape": [32], "init": 0.1}},
        "steps": [{"at": "layers.1.resid.post", "do": "add", "v": {"param": "v"}}],
    }
    compared = [one | {"other": " world"} for one in DATA]
    with load(tiny, tmp_path) as lm:
        asked = {"program": steering, "train": ["v"], "objective": objective} | QUICK
        job = lm.finetune([{k: one[k] for k in ("prompt", "completion", "other")}
                           for one in compared], **asked)  # fmt: skip
        info = job.wait(timeout=PATIENCE)
        assert info.status == "succeeded", info.error
        assert info.losses[-1] < info.losses[0] - 0.001  # type: ignore[operator]
        assert info.hyperparameters["objective"] == objective
        with pytest.raises(InvalidRequest, match="as many tokens"):
            lm.finetune([DATA[0] | {"other": " the cat and the dog"}], **asked)
        if objective == "logit_diff":
            without = lm.finetune([{"prompt": "the", "completion": " cat"}], **asked)
            assert without.wait(timeout=PATIENCE).status == "failed"


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"train": []}, "train"),
        ({"train": ["nobody"]}, "train"),
        ({"train": ["mask"], "sparsity": -1.0}, "sparsity"),
        ({"train": ["mask"], "method": "lora"}, "program"),
        ({"train": ["mask"], "on": "q"}, "on"),
        ({"train": ["mask"], "objective": "win"}, "objective"),
        ({"train": ["mask"], "blobs": {}}, "params.v"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    tiny: LoadedModel, tmp_path: Path, more: dict[str, Any], field: str
) -> None:
    with load(tiny, tmp_path) as lm:
        with pytest.raises((InvalidRequest, NotFound)) as refused:
            lm.finetune(DATA, program=MASKED, **({"blobs": START} | more), **QUICK).wait()
        assert refused.value.field == field
        with pytest.raises(InvalidRequest):
            lm.finetune(DATA, train=["mask"])


def test_a_program_that_does_not_go_with_an_example_is_refused(
    tiny: LoadedModel, tmp_path: Path
) -> None:
    with load(tiny, tmp_path) as lm:
        wrong = [*DATA, {"prompt": "the", "completion": " cat", "runs": {"nobody": "the"}}]
        job = lm.finetune(wrong, program=MASKED, blobs=START, train=["mask"], **QUICK)
        info = job.wait(timeout=PATIENCE)
        assert info.status == "failed"
        assert info.error is not None
        assert "example 4" in info.error["message"]


def test_values_that_cannot_be_kept_do_not_pass_for_earlier_ones(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[str] = []

    def once(*given: Any) -> str:
        if kept:
            raise TooLarge("the owner keeps too much", field="blob")
        kept.append(keep_result(*given))
        return kept[0]

    monkeypatch.setattr(service, "keep_result", once)
    with load(tiny, tmp_path) as lm:
        job = lm.finetune(
            DATA, program=MASKED, blobs=START, train=["v"], **QUICK | {"publish_every": 20}
        )
        info = job.wait(timeout=PATIENCE)
    assert kept
    assert (info.status, info.fine_tuned_model) == ("failed", None)
    assert info.error is not None
    assert info.error["code"] == "result_not_kept"


def test_a_job_whose_tensors_cannot_be_stored_is_not_made(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(service, "keep_tensors", full)
    with load(tiny, tmp_path) as lm:
        with pytest.raises(Unavailable) as refused:
            lm.finetune(DATA, program=MASKED, blobs=START, train=["v"], **QUICK)
        assert refused.value.field == "blobs"
        assert lm.jobs() == []


def test_broken_tensors_end_their_job_and_nothing_else(tiny: LoadedModel, tmp_path: Path) -> None:
    with load(tiny, tmp_path) as lm:
        done = lm.finetune(DATA, program=MASKED, blobs=START, train=["v"], **QUICK | {"steps": 2})
        assert done.wait(timeout=PATIENCE).status == "succeeded"
        other = lm.finetune(
            DATA, program=MASKED, blobs=START, train=["v"], **QUICK | {"steps": 4000}
        )
        other.pause()
    for path in (tmp_path / "checkpoints").rglob("*.safetensors"):
        path.write_bytes(b"broken")
    with load(tiny, tmp_path) as lm:
        lm.resume_jobs()
        assert lm.job(done.id).status == "succeeded"
        again = lm.job(other.id)
        again.resume()
        info = again.wait(timeout=PATIENCE)
        assert info.status == "failed"
        assert info.error is not None
        assert "cannot be read" in info.error["message"]
