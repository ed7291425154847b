"""Runs on a GPU: bfloat16 products, float32 masters, and going on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.training.small_run import curve, small

import invivo
from invivo.models.load import load_model
from invivo.training.checkpoint import checkpoints, read_checkpoint
from invivo.training.forward import dense_forward
from invivo.training.run import Outcome, train
from invivo.training.run_folder import RunFolder

pytestmark = pytest.mark.gpu

GLA = """\
model_type = "gla"
hidden_size = 128
intermediate_size = 256
num_hidden_layers = 2
num_heads = 2
use_short_conv = true
tie_word_embeddings = true
"""
LLAMA = """\
model_type = "llama"
hidden_size = 128
intermediate_size = 256
num_hidden_layers = 2
num_attention_heads = 2
"""
SETTINGS = (
    "data.length=128",
    "train.steps=40",
    "train.log_every=7",
    "train.precision=bfloat16",
    "checkpoint.every=15",
)


def losses(outcome: Outcome) -> list[float]:
    return [row[2] for row in curve(list(RunFolder(outcome.folder).metrics.read()))]


@pytest.mark.parametrize("model", [LLAMA, GLA])
def test_a_run_learns_goes_on_and_is_served(tmp_path: Path, model: str) -> None:
    config = small(tmp_path, *SETTINGS, model=model)
    whole = train(config, runs=tmp_path / "whole", device="cuda")
    assert losses(whole)[-1] < losses(whole)[0] - 0.5
    kept = read_checkpoint(checkpoints(whole.folder / "checkpoints")[-1])
    assert {value.dtype for value in kept.tensors.values()} == {torch.float32}

    asked = iter([False] * 20)
    first = train(config, runs=tmp_path / "parts", device="cuda", stop=lambda: next(asked, True))
    assert (first.status, first.step) == ("interrupted", 20)
    second = train(config, runs=tmp_path / "parts", device="cuda")
    assert losses(second) == pytest.approx(losses(whole), rel=0.02)

    loaded = load_model(str(whole.model), device="cuda", dtype="float32")
    text = loaded.tokenizer.encode("the cat saw")
    tokens = list(text)
    for _ in range(16):
        hidden = dense_forward(loaded.decoder, torch.tensor([tokens], device="cuda"))
        tokens.append(int(loaded.decoder.logits(hidden[0, -1:]).argmax()))
    with invivo.load(str(whole.model), device="cuda", dtype="float32") as lm:
        found = lm.generate(text, max_tokens=16, temperature=0, ignore_eos=True)
    assert found.choices[0].tokens == tokens[len(text) :]
