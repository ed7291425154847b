"""Small corpora and shards for the tests of training data."""

from __future__ import annotations

import random
from pathlib import Path

from invivo.training.config import Data, Source, TokenizerSettings
from invivo.training.prepare import prepare
from invivo.training.shards import Shards

TEXT = "the cat and dog sat on a red mat while seven blue birds sang über naïve 東京 12 years"
WORDS = TEXT.split()


def story(seed: int, n_words: int = 60) -> str:
    draw = random.Random(seed)
    lines = (" ".join(draw.choices(WORDS, k=9)) + "." for _ in range(n_words // 9))
    return "\n".join(lines) + "\n"


def books(n: int, *, splits: tuple[str, ...] = ("train", "train", "valid", "test")) -> str:
    """A file of documents that say themselves what they are for."""
    return "".join(
        f"<|doc b{i} {splits[i % len(splits)]}|>\n{story(i, 40 + 11 * i)}" for i in range(n)
    )


def tiny_shards(folder: Path, n_books: int = 8, vocab_size: int = 300) -> Shards:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "books.txt").write_text(books(n_books), encoding="utf-8")
    data = Data(sources=(Source(path=str(folder / "books.txt")),))
    return prepare(data, TokenizerSettings(vocab_size=vocab_size), folder / "prepared")
