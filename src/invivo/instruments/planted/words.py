"""A vocabulary of made-up words, one token each, and its tokenizer in the Hub's format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

START = 0
_SYLLABLES = [c + v for v in "aeiou" for c in "bdfgklmnprstvz"]


@dataclass(frozen=True, slots=True)
class Words:
    """``n_symbols`` words with ids 1, 2, ...; id 0 starts every text."""

    n_symbols: int

    @property
    def size(self) -> int:
        return self.n_symbols + 1

    @property
    def names(self) -> list[str]:
        """The text of every token."""
        return ["<s>", *_SYLLABLES[: self.n_symbols]]

    def text(self, ids: Sequence[int]) -> str:
        """Words with blanks between them, without the start token."""
        return " ".join(self.names[i] for i in ids if i != START)

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``; the start token is added."""
        from tokenizers import Tokenizer, models, pre_tokenizers, processors

        vocabulary = {name: i for i, name in enumerate(self.names)}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", START)]
        )
        tokenizer.add_special_tokens(["<s>"])
        tokenizer.save(str(folder / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "unk_token": "<s>",
            "clean_up_tokenization_spaces": False,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
