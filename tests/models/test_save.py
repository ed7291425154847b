"""Saved models load in transformers and give the same logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.models.oracle import Oracle
from tests.models.pages import logits_of
from tests.tiny import FAMILIES, tiny_hf_model, tiny_loaded

from invivo.errors import Conflict, UnsupportedModel
from invivo.models.folder import new_folder, write_weights
from invivo.models.hub_config import config_from_hf
from invivo.models.load import load_model, random_model
from invivo.models.save import save_model

TOKENS = list(range(40, 71))


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_model_gives_transformers_the_same_logits(tmp_path: Path, family: str) -> None:
    model = tiny_loaded(tmp_path, family)
    folder = save_model(model, tmp_path / "saved")
    expected = logits_of(model.decoder, TOKENS)
    theirs = Oracle(folder, torch.float32).logits(TOKENS)
    assert (theirs - expected).abs().max() < 1e-4
    again = load_model(str(folder))
    assert torch.equal(logits_of(again.decoder, TOKENS), expected)
    assert again.config == model.config
    assert again.tokenizer.chat_template == model.tokenizer.chat_template


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2_moe", "gemma3_text"])
def test_a_model_made_from_a_config_alone_is_saved(tmp_path: Path, family: str) -> None:
    config = config_from_hf(tiny_hf_model(family).config.to_dict())
    decoder = random_model(config, dtype=torch.bfloat16)
    folder = save_model(decoder, tmp_path / "saved")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    theirs = Oracle(folder, torch.float64).logits(TOKENS)
    exact = random_model(config, dtype=torch.float64)
    for ours, stored in zip(exact.parameters(), decoder.parameters(), strict=True):
        ours.copy_(stored)
    assert (theirs - logits_of(exact, TOKENS)).abs().max() < 1e-10


def test_large_models_are_written_in_shards(tmp_path: Path) -> None:
    model = tiny_loaded(tmp_path)
    folder = save_model(model, tmp_path / "saved")
    tensors = {n: p.detach() for n, p in Oracle(folder, torch.float32).model.named_parameters()}
    (folder / "model.safetensors").unlink()
    write_weights(tensors.items(), folder, shard_bytes=50_000)
    shards = sorted(f.name for f in folder.glob("*.safetensors"))
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert len(shards) > 2
    again = load_model(str(folder))
    assert torch.equal(logits_of(again.decoder, TOKENS), logits_of(model.decoder, TOKENS))
    assert again.fingerprint == load_model(str(save_model(model, tmp_path / "one"))).fingerprint


def test_an_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    model = tiny_loaded(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    with pytest.raises(Conflict, match="not empty"):
        save_model(model, tmp_path / "full")
    (tmp_path / "empty").mkdir()
    save_model(model, tmp_path / "empty")


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    def fill() -> None:
        with new_folder(tmp_path / "new") as draft:
            (draft / "half").write_text("x")
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_the_hub_cannot_express_is_refused(tmp_path: Path) -> None:
    decoder = tiny_loaded(tmp_path).decoder
    decoder.config = config_from_hf(tiny_hf_model("qwen3").config.to_dict())
    object.__setattr__(decoder.config, "family", "llama")
    with pytest.raises(UnsupportedModel):
        save_model(decoder, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
