"""Training a program's parameters over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from tests.waiting import PATIENCE

from invivo.errors import Forbidden, InvalidRequest, InvivoError, NotFound
from invivo.local import LocalLM
from invivo.remote import RemoteLM
from invivo.server.keys import KeyStore
from invivo.server.run import ServerThread
from invivo.server.settings import Settings

DATA = [{"prompt": f"the red {word}", "completion": " hello"} for word in ("cat", "dog")]
STEERING: dict[str, Any] = {
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
    assert remote.generate("the red cat", max_tokens=1, interventions=name).completion_tokens == 1
    shown = http.get(f"/v1/fine_tuning/jobs/{job.id}").json()
    assert shown["fine_tuned_model"] == name
    assert shown["hyperparameters"]["train"] == ["v"]
    job.delete()


def test_keys_need_the_scope_and_see_their_own_tensors_alone(lm: LocalLM, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'keys.sqlite3'}"
    store = KeyStore(url)
    scopes = {"ann": ["finetune", "edit"], "bob": ["finetune", "edit"], "eve": ["finetune"]}
    secrets = {name: store.add(name, chosen)[0] for name, chosen in scopes.items()}
    settings = Settings(port=0, require_keys=True, database=url, served_name="tiny")
    with ServerThread(lm, settings) as keyed:
        ann, bob, eve = (RemoteLM(keyed.url, key=secrets[name]) for name in scopes)
        mine = ann.store_blob(np.full(32, 0.25, np.float32))
        pushed = {"at": "embed.out", "do": "add", "v": f"blob:{mine}"}
        program = STEERING | {"steps": [STEERING["steps"][0], pushed]}
        with pytest.raises(Forbidden):
            eve.finetune(DATA, program=STEERING | {"steps": STEERING["steps"][:1]}, train=["v"])
        with pytest.raises(InvivoError):
            bob.finetune(DATA, program=STEERING, blobs={"w": mine}, train=["v"], **QUICK)
        theirs = bob.finetune(DATA, program=program, train=["v"], **QUICK)
        assert theirs.wait(timeout=PATIENCE).status == "failed"
        job = ann.finetune(DATA, program=program, train=["v"], **QUICK)
        info = job.wait(timeout=PATIENCE)
        assert info.status == "succeeded", info.error
        assert ann.stored_program(str(info.fine_tuned_model))
        with pytest.raises(NotFound):
            bob.stored_program(str(info.fine_tuned_model))


def test_what_cannot_be_trained_is_refused_with_the_field(remote: RemoteLM) -> None:
    with pytest.raises(InvalidRequest) as refused:
        remote.finetune(DATA, program=STEERING, blobs={"w": [0.1] * 32}, train=["x"], **QUICK)
    assert refused.value.field == "train"
    with pytest.raises(InvalidRequest):
        remote.finetune(DATA, program={"steps": [{"do": "explode"}]}, train=["x"], **QUICK)
