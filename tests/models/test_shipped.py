"""The models that come with invivo, by their names."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import invivo
from invivo.models.load import LoadedModel, load_model
from invivo.models.resolve import list_models
from invivo.models.shipped import ASSETS, shipped_models
from invivo.training.forward import dense_forward
from invivo.training.loss import dense_loss

# Anne Bronte, Agnes Grey (1847): of the books that gla-small was not trained on.
PARAGRAPH = (
    "I replied I was quite willing to do so; and at that moment my young pupils entered the "
    "apartment, with their two younger sisters. Master Tom Bloomfield was a well-grown boy of "
    "seven, with a somewhat wiry frame, flaxen hair, blue eyes, small turned-up nose, and fair "
    "complexion. Mary Ann was a tall girl too, somewhat dark like her mother, but with a round "
    "full face and a high colour in her cheeks. The second sister was Fanny, a very pretty little "
    "girl; Mrs. Bloomfield assured me she was a remarkably gentle child, and required "
    "encouragement: she had not learned anything yet; but in a few days, she would be four years "
    "old, and then she might take her first lesson in the alphabet, and be promoted to the "
    "schoolroom."
)
BITS_PER_BYTE = 1.2205


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model("gla-small", device="cpu")


def test_each_is_whole_small_and_has_a_card() -> None:
    found = shipped_models()
    assert "gla-small" in found
    total = sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file())
    assert total <= 16 << 20
    for name, shipped in found.items():
        assert shipped.licence == "apache-2.0"
        assert shipped.description
        card = (shipped.path / "README.md").read_text(encoding="utf-8")
        assert f"invivo serve {name}" in card
        assert "## What it is not" in card
        entry = next(entry for entry in list_models() if entry.name == name)
        assert (entry.state, entry.path) == ("ready", shipped.path)


def test_gla_small_was_trained(model: LoadedModel) -> None:
    assert sum(p.numel() for p in model.decoder.parameters()) == 6_955_776
    text = model.tokenizer.encode(PARAGRAPH)
    assert text[0] == model.config.bos_token_id == 0
    assert model.tokenizer.decode(text[1:]) == PARAGRAPH
    tokens = torch.tensor([text])
    with torch.no_grad():
        nats, _ = dense_loss(model.decoder, tokens[:, :-1], tokens[:, 1:])
    bits = float(nats) / math.log(2) / len(PARAGRAPH.encode())
    assert bits == pytest.approx(BITS_PER_BYTE, rel=0.005)


def test_gla_small_is_served_by_its_name(
    model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("INVIVO_HOME", str(tmp_path / "home"))
    with invivo.load("gla-small", device="cpu", kv_bytes=16 << 20) as lm:
        score = lm.score(PARAGRAPH)
        bits = -score.logprob / math.log(2) / len(PARAGRAPH.encode())
        assert bits == pytest.approx(BITS_PER_BYTE, rel=0.005)
        prompt = model.tokenizer.encode("Once upon a time there was a")
        tokens = list(prompt)
        for _ in range(8):
            hidden = dense_forward(model.decoder, torch.tensor([tokens]))
            tokens.append(int(model.decoder.logits(hidden[0, -1:]).argmax()))
        found = lm.generate(prompt, max_tokens=8, temperature=0)
    assert found.choices[0].tokens == tokens[len(prompt) :]
    assert found.text.startswith(" little boy in the house")
