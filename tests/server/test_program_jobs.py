"""Training a program's parameters over HTTP."""

from __future__ import annotations

import httpx
import pytest
from tests.waiting import PATIENCE

from invivo.errors import InvalidRequest
from invivo.remote import RemoteLM

DATA = [{"prompt": f"the red {word}", "completion": " hello"} for word in ("cat", "dog")]
STEERING = {
    "params": {"v": {"shape": [32]}},
    "steps": [{"at": "layers.1.resid.post", "do": "add", "v": {"param": "v"}, "c": 1},
              {"at": "layers.0.resid.post", "pos": "@first", "do": "add", "v": "blob:w"}],
}  # fmt: skip
QUICK = {"learning_rate": 0.5, "batch_size": 2, "steps": 12}


@pytest.fixture
def remote(server: object) -> RemoteLM:
    return RemoteLM(server.url)  # type: ignore[attr-defined]


def test_a_vector_is_trained_and_found_under_its_hash(remote: RemoteLM, http: httpx.Client) -> None:
    job = remote.finetune(
        DATA, program=STEERING, blobs={"w": [0.1] * 32}, train=["v"], name="vector", **QUICK
    )
    info = job.wait(timeout=PATIENCE)
    assert info.status == "succeeded", info.error
    name = info.fine_tuned_model
    assert name is not None
    assert name.startswith("sha256:")
    token = remote.tokenize(" hello")[0]
    seen = {"out": [{"measure": "logprob", "token": token}]}
    before = remote.run(seen, "the red cat").measures[0].values[0]
    after = remote.run(remote.stored_program(name) | seen, "the red cat").measures[0].values[0]
    assert after > before
    assert remote.generate("the red cat", max_tokens=1, interventions=name).text
    shown = http.get(f"/v1/fine_tuning/jobs/{job.id}").json()
    assert shown["fine_tuned_model"] == name
    assert shown["hyperparameters"]["train"] == ["v"]
    job.delete()


def test_what_cannot_be_trained_is_refused_with_the_field(remote: RemoteLM) -> None:
    with pytest.raises(InvalidRequest) as refused:
        remote.finetune(DATA, program=STEERING, blobs={"w": [0.1] * 32}, train=["x"], **QUICK)
    assert refused.value.field == "train"
    with pytest.raises(InvalidRequest):
        remote.finetune(DATA, program={"steps": [{"do": "explode"}]}, train=["x"], **QUICK)
