"""Text and made-up rows look alike to a training run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.training.texts import books

from invivo.errors import InvalidRequest
from invivo.models.gla_config import gla_model
from invivo.models.load import load_tokenizer, random_model
from invivo.training.config import Data, Recall, Source, TokenizerSettings
from invivo.training.material import Material, open_material

SETTINGS = TokenizerSettings(vocab_size=280)


def text(folder: Path) -> Data:
    (folder / "books.txt").write_text(books(8), encoding="utf-8")
    return Data(sources=(Source(path=str(folder / "books.txt")),), length=32)


RECALL = Data(kind="recall", recall=Recall(pairs=(2, 4), keys=8, values=5), length=32)


@pytest.fixture(params=["text", "recall"])
def material(request: pytest.FixtureRequest, tmp_path: Path) -> Material:
    data = text(tmp_path) if request.param == "text" else RECALL
    return open_material(data, SETTINGS, tmp_path / "home")


def test_a_run_gets_rows_a_tokenizer_and_numbers(material: Material) -> None:
    batch = material.stream(batch=4, seed=0).next()
    halves = [material.stream(batch=4, seed=0, rank=r, world=2).next() for r in range(2)]
    assert torch.equal(torch.cat([half.tokens for half in halves]), batch.tokens)
    assert batch.tokens.shape == batch.labels.shape == (4, 32)
    assert int(batch.tokens.max()) < material.vocab_size
    tokenizer = load_tokenizer(material.tokenizer)
    assert len(tokenizer) == material.vocab_size
    assert tokenizer.eos_token_id == material.end_token
    config = gla_model(vocab_size=material.vocab_size, d_model=16, n_layers=1, n_heads=2, d_ff=16)
    numbers = material.evaluate(random_model(config), 4)
    assert numbers["rows"] == 4
    if numbers["split"] == "valid":
        assert numbers["low"] < numbers["bits_per_byte"] < numbers["high"]
    else:
        assert 0 <= numbers["accuracy"] <= 1


def test_recall_rows_read_as_words(tmp_path: Path) -> None:
    material = open_material(RECALL, SETTINGS, tmp_path)
    row = material.stream(batch=1, seed=0).next()
    tokenizer = load_tokenizer(material.tokenizer)
    words = tokenizer.convert_ids_to_tokens(row.tokens[0].tolist())
    assert words[0].startswith("k")
    assert words[1].startswith("v")
    assert tokenizer(" ".join(words))["input_ids"] == row.tokens[0].tolist()
    again = open_material(RECALL, SETTINGS, tmp_path)
    assert again.digest == material.digest
    other = replace(RECALL, recall=replace(RECALL.recall, pairs=(3,)))
    assert open_material(other, SETTINGS, tmp_path).digest != material.digest
    with pytest.raises(InvalidRequest, match="need 12 tokens"):
        open_material(replace(RECALL, length=8), SETTINGS, tmp_path)


def test_text_without_a_held_out_part_has_no_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat sat on the mat\n" * 20)
    data = Data(sources=(Source(path=str(tmp_path / "a.txt")),), length=8, valid_fraction=0)
    material = open_material(data, SETTINGS, tmp_path / "home")
    config = gla_model(vocab_size=material.vocab_size, d_model=16, n_layers=1, n_heads=2, d_ff=16)
    assert material.evaluate(random_model(config), None) == {}
