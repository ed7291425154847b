"""Jobs that learn an adapter further."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.waiting import PATIENCE, hold_at_texts

import invivo
from invivo.errors import InvalidRequest, NotFound
from invivo.local import LocalLM
from invivo.models.load import LoadedModel

WEIGHTS = "adapter_model.safetensors"
DATA = [{"prompt": f"hello {i}", "completion": " the cat and the dog"} for i in range(6)]
# What an optimizer and a schedule remember would differ after a new beginning: there is nothing.
PLAIN: dict[str, Any] = {
    "batch_size": 2,
    "steps": 3,
    "shuffle": False,
    "learning_rate": 0.5,
    "optimizer": "sgd",
    "schedule": "constant",
}
WHAT: dict[str, Any] = {"r": 4, "on": "q,v", "alpha": 8, "rank_stabilized": True}


def load(tiny: LoadedModel, state: Path) -> LocalLM:
    return invivo.load(tiny.name, kv_bytes=8 << 20, state=state)


def learned(lm: LocalLM, name: str, **settings: Any) -> list[float]:
    info = lm.finetune(DATA, name=name, **(PLAIN | settings)).wait(timeout=PATIENCE)
    assert info.status == "succeeded", info.error
    return [loss for loss in info.losses if loss is not None]


def test_two_halves_are_the_whole(tiny: LoadedModel, tmp_path: Path) -> None:
    with load(tiny, tmp_path) as lm:
        whole = learned(lm, "whole", steps=6, **WHAT)
        first = learned(lm, "poet", **WHAT)
        second = learned(lm, "poet", start="poet")  # a new version of the same adapter
        assert first + second == pytest.approx(whole, rel=1e-5)
        assert whole[3] < whole[0]
        # What is trained is as in the adapter, and is told.
        settings = lm.jobs()[0].info().hyperparameters
        assert settings["start"] == "poet"
        assert (settings["r"], settings["on"], settings["layers"]) == (4, ["q", "v"], None)
        assert (settings["alpha"], settings["rank_stabilized"]) == (8, True)
        assert "begins with the adapter poet" in lm.jobs()[0].events()[-1].message
        parts = [load_file(tmp_path / "adapters" / name / WEIGHTS) for name in ("whole", "poet")]
        for key, tensor in parts[0].items():
            torch.testing.assert_close(parts[1][key], tensor, rtol=1e-4, atol=1e-6)


def test_a_checkpoint_may_be_the_beginning(tiny: LoadedModel, tmp_path: Path) -> None:
    with load(tiny, tmp_path) as lm:
        whole = learned(lm, "whole", steps=6, checkpoint_every=3, **WHAT)
        assert learned(lm, "again", start="whole:ckpt-step-3") == pytest.approx(whole[3:], rel=1e-5)


def test_it_begins_with_what_was_served_when_it_was_created(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(tiny, tmp_path) as lm:
        learned(lm, "poet", **WHAT)
        undisturbed = learned(lm, "mate", start="poet")
        hold_at_texts(monkeypatch, lm.engine, 0)
        job = lm.finetune(DATA, name="late", start="poet", **PLAIN)
        assert job.pause().step == 0
        learned(lm, "poet", seed=7, **WHAT)  # the name now means another adapter
        lm.unload_adapter("poet")
    with load(tiny, tmp_path) as lm:
        job = next(job for job in lm.jobs() if job.info().name == "late")
        job.resume()
        assert job.wait(timeout=PATIENCE).losses == pytest.approx(undisturbed, rel=1e-5)


def test_an_adapter_of_two_ranks_from_elsewhere_keeps_its_form(
    tiny: LoadedModel, tmp_path: Path
) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    d, config = tiny.config.d_model, tiny.config
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for part, rank, wide in (("q", 2, config.n_heads), ("v", 4, config.n_kv_heads)):
        base = f"base_model.model.model.layers.1.self_attn.{part}_proj.lora_"
        tensors[f"{base}A.weight"] = torch.randn(rank, d, generator=generator)
        tensors[f"{base}B.weight"] = torch.zeros(wide * config.head_dim, rank)
    save_file(tensors, folder / WEIGHTS)
    described = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    described |= {"rank_pattern": {"v_proj": 4}, "alpha_pattern": {"v_proj": 16}}
    (folder / "adapter_config.json").write_text(json.dumps(described))
    with load(tiny, tmp_path / "state") as lm:
        lm.load_adapter("given", folder)
        losses = learned(lm, "further", start="given")
        assert losses[-1] < losses[0]
        made = load_file(lm.save_adapter("further", tmp_path / "made") / WEIGHTS)
        assert {key: tensor.shape for key, tensor in made.items()} == {
            key: tensor.shape for key, tensor in tensors.items()
        }
        assert any(not torch.equal(made[key], tensors[key]) for key in made)


def test_what_cannot_be_begun_with_is_refused(tiny: LoadedModel, tmp_path: Path) -> None:
    with load(tiny, tmp_path) as lm:
        with pytest.raises(NotFound) as unknown:
            lm.finetune(DATA, start="nobody")
        assert unknown.value.field == "start"
        learned(lm, "poet", **WHAT)
        for name, value in (("r", 8), ("on", "down"), ("method", "ia3"), ("layers", [0])):
            with pytest.raises(InvalidRequest, match="as in the adapter") as caught:
                lm.finetune(DATA, start="poet", **{name: value})
            assert caught.value.field == name
        assert [job.info().name for job in lm.jobs()] == ["poet"]
