"""Preparation: exact counts, a tokenizer that transformers loads, and safe interruption."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.training.texts import books, story, tiny_shards

from invivo.errors import InvalidRequest, NotFound
from invivo.models.load import load_tokenizer
from invivo.training import prepare as module
from invivo.training.config import Data, Source, TokenizerSettings
from invivo.training.prepare import prepare
from invivo.training.shards import Shards, open_shards

SETTINGS = TokenizerSettings(vocab_size=300)


def test_shards_hold_every_document_behind_the_end_token(tmp_path: Path) -> None:
    shards = tiny_shards(tmp_path, n_books=8)
    hub = load_tokenizer(shards.tokenizer)
    assert hub.eos_token_id == hub.bos_token_id == shards.end_token == shards.opening
    for split, numbers in (("train", (0, 1, 4, 5)), ("valid", (2, 6)), ("test", (3, 7))):
        texts = [story(i, 40 + 11 * i) for i in numbers]
        ids = shards.read(split, 0, shards.tokens[split])
        expected = [token for text in texts for token in hub(text)["input_ids"]]
        assert ids.tolist() == expected  # the tokenizer itself puts the opening token there
        assert shards.bytes[split] == sum(len(text.encode()) for text in texts)
        assert shards.bytes_of(split, ids) == shards.bytes[split]
        assert shards.rings[split].documents == len(texts)
        pieces = hub.decode(ids).split(hub.eos_token)
        assert pieces == ["", *texts]


def test_reading_goes_round_the_ring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny_shards(tmp_path / "one")
    monkeypatch.setattr(module, "SHARD_TOKENS", 100)
    monkeypatch.setattr(module, "_BATCH", 1)
    cut = tiny_shards(tmp_path / "two")
    assert len(cut.rings["train"].files) > 2
    n = whole.tokens["train"]
    assert cut.tokens == whole.tokens
    for start, count in ((0, n), (n - 3, 10), (5, 3 * n), (99, 2)):
        np.testing.assert_array_equal(
            cut.read("train", start, count), whole.read("train", start, count)
        )


def files_of(folder: Path, n: int) -> Data:
    folder.mkdir()
    for i in range(n):
        (folder / f"{i}.txt").write_text(books(4 + i), encoding="utf-8")
    return Data(sources=(Source(path=str(folder)),))


class Stop(Exception):
    pass


def test_interrupted_preparation_ends_as_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHARD_TOKENS", 500)
    monkeypatch.setattr(module, "_BATCH", 2)
    monkeypatch.setattr(module, "_SAFE", 1)
    data = files_of(tmp_path / "texts", 4)
    told: list[str] = []
    expected = prepare(data, SETTINGS, tmp_path / "whole", progress=lambda w, s: told.append(w))

    for stop_at in range(0, len(told), 3):
        home = tmp_path / f"stopped-{stop_at}"
        with pytest.raises(Stop):
            prepare(data, SETTINGS, home, progress=stopping(stop_at))
        assert_same(prepare(data, SETTINGS, home), expected)


def stopping(at: int) -> Callable[[str, float], None]:
    """Progress that ends the work at its call number ``at``."""
    left = iter(range(at))

    def stop(word: str, share: float) -> None:
        if next(left, None) is None:
            raise Stop

    return stop


def assert_same(shards: Shards, expected: Shards) -> None:
    assert shards.digest == expected.digest
    assert shards.manifest["splits"] == expected.manifest["splits"]
    assert shards.manifest["sources"] == expected.manifest["sources"]
    assert sorted(p.name for p in shards.folder.iterdir()) == sorted(
        p.name for p in expected.folder.iterdir()
    )


def test_what_is_prepared_is_found_again_until_a_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = files_of(tmp_path / "texts", 2)
    first = prepare(data, SETTINGS, tmp_path / "home")
    monkeypatch.setattr(module, "_make", lambda *_: pytest.fail("prepared again"))
    assert prepare(data, SETTINGS, tmp_path / "home").folder == first.folder
    monkeypatch.undo()
    (tmp_path / "texts" / "0.txt").write_text(books(9), encoding="utf-8")
    changed = prepare(data, SETTINGS, tmp_path / "home")
    assert changed.folder != first.folder
    assert changed.digest != first.digest


def test_a_tokenizer_can_be_taken_and_its_own_opening_token_stays(tmp_path: Path) -> None:
    taken = tiny_shards(tmp_path / "a")
    data = files_of(tmp_path / "texts", 1)
    shards = prepare(data, TokenizerSettings(name=str(taken.tokenizer)), tmp_path / "home")
    assert shards.manifest["tokenizer"]["sha256"] == taken.manifest["tokenizer"]["sha256"]

    other = tmp_path / "other"
    other.mkdir()
    for name, old, new in (
        ("tokenizer.json", '"<|endoftext|>"', '"<begin>"'),
        ("tokenizer_config.json", '"eos_token": "<|endoftext|>"', '"eos_token": "a"'),
    ):
        text = (taken.tokenizer / name).read_text(encoding="utf-8").replace(old, new)
        text = text.replace('"bos_token": "<|endoftext|>"', '"bos_token": "<begin>"')
        (other / name).write_text(text, encoding="utf-8")
    shards = prepare(data, TokenizerSettings(name=str(other)), tmp_path / "home")
    hub = load_tokenizer(shards.tokenizer)
    assert (shards.end_token, shards.opening) == (hub.eos_token_id, hub.bos_token_id)
    assert shards.read("train", 0, 2).tolist() == [hub.eos_token_id, hub.bos_token_id]


def test_special_tokens_written_in_a_text_are_plain_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "the <|endoftext|> of it"}', encoding="utf-8")
    data = Data(sources=(Source(path=str(path), split="train"),), valid_fraction=0)
    shards = prepare(data, SETTINGS, tmp_path / "home")
    ids = shards.read("train", 0, shards.tokens["train"])
    assert (ids == shards.end_token).sum() == 1
    assert shards.bytes_of("train", ids) == shards.bytes["train"] == 23


def test_nothing_to_train_on_or_to_hold_out_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(story(1), encoding="utf-8")
    only_test = Data(sources=(Source(path=str(path), split="test"),))
    with pytest.raises(InvalidRequest, match=r"data\.sources: there is no text to learn"):
        prepare(only_test, SETTINGS, tmp_path / "home")
    one_text = Data(sources=(Source(path=str(path)),), valid_fraction=1e-6)
    with pytest.raises(InvalidRequest, match=r"data\.valid_fraction: none of 1 documents"):
        prepare(one_text, SETTINGS, tmp_path / "home")
    shards = prepare(
        Data(sources=(Source(path=str(path)),), valid_fraction=0), SETTINGS, tmp_path / "home"
    )
    with pytest.raises(InvalidRequest, match="no text in this split"):
        shards.read("valid", 0, 1)


def test_an_unprepared_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no text has been prepared"):
        open_shards(tmp_path)
