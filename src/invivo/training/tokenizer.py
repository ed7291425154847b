"""A tokenizer for a new model: learned from its training text, or an existing one.

One that is learned is a byte-level BPE (Sennrich et al. 2016; over bytes as in GPT-2): any text
has tokens and comes back from them unchanged. Words are cut as GPT-2 does, digits stand alone.
Its one special token opens and ends a document.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from invivo.errors import InvalidRequest
from invivo.models.folder import new_folder, write_json
from invivo.models.load import load_tokenizer
from invivo.models.resolve import resolve

END = "<|endoftext|>"
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


@dataclass(frozen=True, slots=True)
class TextTokenizer:
    """What packing needs of a tokenizer.

    Attributes:
        folder: of its files, which transformers loads.
        boundary: ids before each document's own: the end of the one before, and the tokenizer's
            opening token where it has one of its own.
        end_token: id that ends a document.
        vocab_size: rows that an embedding needs.
        token_bytes: [vocab_size] int64, UTF-8 bytes of the text that a token stands for.
        digest: sha256 of tokenizer.json.
    """

    folder: Path
    tokenizer: Tokenizer
    boundary: tuple[int, ...]
    end_token: int
    vocab_size: int
    token_bytes: NDArray[np.int64]
    digest: str

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text; a special token that is written out in a text is plain text."""
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encoded]


def learn_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Learn a tokenizer and write it to a new folder.

    Args:
        vocab_size: with the 256 bytes and the end token; fewer come of little text.

    Raises:
        InvalidRequest: there is no text.
        Conflict: the folder exists.
    """
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), words]
    )
    tokenizer.decoder = decoders.ByteLevel()
    end = AddedToken(END, special=True, normalized=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    counted = _Counted(texts)
    tokenizer.train_from_iterator(counted, trainer=trainer)
    if not counted.n:
        raise InvalidRequest("there is no text to learn a tokenizer from", field="data.sources")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[f"{END}:0", "$A:0"],
        pair=[f"{END}:0", "$A:0", "$B:0"],
        special_tokens=[(END, tokenizer.token_to_id(END))],
    )
    with new_folder(folder) as draft:
        tokenizer.save(str(draft / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1 << 30,
            "bos_token": END,
            "eos_token": END,
        }
        write_json(draft / "tokenizer_config.json", settings)


class _Counted:
    """An iterable that knows how many it gave."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.n = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            self.n += 1
            yield text


def copy_tokenizer(name: str, folder: Path) -> None:
    """Copy the tokenizer of a model (name, Hub id, folder) or a folder of tokenizer files.

    Raises:
        NotFound: there is none of that name.
        InvalidRequest: the folder has no tokenizer.json.
        Conflict: the target folder exists.
    """
    given = Path(name).expanduser()
    source = given if (given / "tokenizer.json").is_file() else resolve(name)
    if not (source / "tokenizer.json").is_file():
        raise InvalidRequest("the folder has no tokenizer.json", field="tokenizer.name", given=name)
    with new_folder(folder) as draft:
        for file in _FILES:
            if (source / file).is_file():
                (draft / file).write_bytes((source / file).read_bytes())


def open_tokenizer(folder: Path) -> TextTokenizer:
    """
    Raises:
        UnsupportedModel: it cannot be read.
        InvalidRequest: it has no end token.
    """
    hub = load_tokenizer(folder)
    content = (folder / "tokenizer.json").read_bytes()
    tokenizer = Tokenizer.from_str(content.decode("utf-8"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    end = hub.eos_token_id
    if end is None:
        raise InvalidRequest(
            "the tokenizer has no end token, which separates documents",
            field="tokenizer.name",
            given=str(folder),
            remedy="Set eos_token in its tokenizer_config.json",
        )
    opening = [token for token in hub("")["input_ids"] if token != end][:1]
    table = token_bytes(json.loads(content))
    return TextTokenizer(
        folder=folder,
        tokenizer=tokenizer,
        boundary=(end, *opening),
        end_token=end,
        vocab_size=len(table),
        token_bytes=table,
        digest=hashlib.sha256(content).hexdigest(),
    )


def token_bytes(content: dict[str, Any]) -> NDArray[np.int64]:
    """UTF-8 bytes that each token adds to a text, from the content of a tokenizer.json.

    Exact for byte-level vocabularies; elsewhere a blank that the tokenizer puts before a text
    counts too, and what a normaliser changes counts as changed.
    """
    vocab = content["model"]["vocab"]
    if isinstance(vocab, list):  # a unigram model's: (token, score)
        vocab = {piece[0]: i for i, piece in enumerate(vocab)}
    added = content.get("added_tokens") or []
    size = 1 + max([*vocab.values(), *(token["id"] for token in added)])
    table = np.zeros(size, np.int64)
    by_bytes = '"ByteLevel"' in json.dumps(content.get("decoder"))
    for token, index in vocab.items():
        if by_bytes:
            table[index] = len(token)  # one character stands for one byte
        elif len(token) == 6 and token.startswith("<0x"):
            table[index] = 1
        else:
            table[index] = len(token.replace("▁", " ").encode())
    for token in added:
        table[token["id"]] = 0 if token["special"] else len(token["content"].encode())
    return table
