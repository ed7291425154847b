"""What a run learns from, text or made-up rows, behind one interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from invivo.errors import Conflict
from invivo.models.decoder import Decoder
from invivo.models.folder import new_folder, write_json
from invivo.training.config import Data, Recall, TokenizerSettings
from invivo.training.evaluate import Total, decoder_nats, held_out
from invivo.training.prepare import Progress, prepare
from invivo.training.recall import (
    BLANK,
    RecallScore,
    RecallStream,
    check_recall,
    decoder_answers,
    measure_recall,
    vocabulary,
)
from invivo.training.shards import Shards, digest_of, open_shards
from invivo.training.stream import PackedStream, Stream


class Material(Protocol):
    """
    Attributes:
        vocab_size: ids that occur.
        end_token: id that ends a text.
        tokenizer: folder of the tokenizer that belongs to the model.
        digest: identity, which a run that goes on must find again.
        tokens, bytes: by split, as far as there is such a number.
        tokens_per_epoch: None: rows never end.
    """

    vocab_size: int
    end_token: int
    tokenizer: Path
    digest: str
    tokens: dict[str, int]
    bytes: dict[str, int]
    tokens_per_epoch: int | None

    def stream(self, *, batch: int, seed: int, rank: int = 0, world: int = 1) -> Stream:
        """Training rows; ``batch`` over all processes."""

    def evaluate(
        self,
        decoder: Decoder,
        rows: int | None,
        *,
        batch: int = 8,
        dtype: torch.dtype | None = None,
        rank: int = 0,
        world: int = 1,
        total: Total = lambda x: x,
    ) -> dict[str, Any]:
        """Numbers for a line of metrics, over ``rows`` held-out rows (None: all there are)."""


def open_material(
    data: Data, tokenizer: TokenizerSettings, home: Path, *, progress: Progress | None = None
) -> Material:
    """What ``data`` describes, prepared in ``home`` if it was not yet.

    Raises:
        as :func:`~invivo.training.prepare.prepare`; NotFound: ``data.prepared`` holds no shards;
        InvalidRequest: sizes of recall rows do not fit together.
    """
    if data.kind == "recall":
        return RecallMaterial(data, home)
    if data.prepared is not None:
        return TextMaterial(data, open_shards(Path(data.prepared), field="data.prepared"))
    return TextMaterial(data, prepare(data, tokenizer, home, progress=progress))


class TextMaterial:
    """Token shards; see :class:`Material`."""

    def __init__(self, data: Data, shards: Shards) -> None:
        self._data = data
        self.shards = shards
        self.vocab_size = shards.vocab_size
        self.end_token = shards.end_token
        self.tokenizer = shards.tokenizer
        self.digest = shards.digest
        self.tokens, self.bytes = shards.tokens, shards.bytes
        self.tokens_per_epoch: int | None = shards.ring("train").tokens

    def stream(self, *, batch: int, seed: int, rank: int = 0, world: int = 1) -> Stream:
        return PackedStream(
            self.shards,
            length=self._data.length,
            batch=batch,
            seed=seed,
            rank=rank,
            world=world,
            separate_documents=self._data.separate_documents,
        )

    def evaluate(
        self,
        decoder: Decoder,
        rows: int | None,
        *,
        batch: int = 8,
        dtype: torch.dtype | None = None,
        rank: int = 0,
        world: int = 1,
        total: Total = lambda x: x,
    ) -> dict[str, Any]:
        """Bits per byte of the split valid; nothing where no text is held out."""
        if not self.tokens["valid"]:
            return {}
        found = held_out(
            decoder_nats(decoder, dtype=dtype),
            self.shards,
            length=self._data.length,
            batch=batch,
            rows=rows,
            separate_documents=self._data.separate_documents,
            rank=rank,
            world=world,
            total=total,
        )
        return asdict(found)


class RecallMaterial:
    """Recall rows; see :class:`Material`. The tokenizer's words are ``_``, ``k1`` .., ``v1`` ...

    Raises:
        InvalidRequest: the sizes do not fit together.
    """

    def __init__(self, data: Data, home: Path) -> None:
        check_recall(data.recall, data.length)
        self._task, self._length = data.recall, data.length
        self.vocab_size = vocabulary(data.recall)
        self.end_token = BLANK
        self.digest = digest_of(["recall", str(asdict(data.recall)), str(data.length)])
        self.tokenizer = _words(
            data.recall, home / f"recall-{data.recall.keys}-{data.recall.values}"
        )
        self.tokens: dict[str, int] = {}
        self.bytes: dict[str, int] = {}
        self.tokens_per_epoch: int | None = None

    def stream(self, *, batch: int, seed: int, rank: int = 0, world: int = 1) -> Stream:
        return RecallStream(
            self._task, length=self._length, batch=batch, seed=seed, rank=rank, world=world
        )

    def evaluate(
        self,
        decoder: Decoder,
        rows: int | None,
        *,
        batch: int = 8,
        dtype: torch.dtype | None = None,
        rank: int = 0,
        world: int = 1,
        total: Total = lambda x: x,
    ) -> dict[str, Any]:
        """Share of right answers over all numbers of pairs; every process asks everything."""
        kinds = len(self._task.pairs)
        each = 256 if rows is None else max(1, rows // kinds)
        scores = measure_recall(
            decoder_answers(decoder, dtype=dtype),
            self._task,
            length=self._length,
            rows=each,
            batch=batch,
        )
        return {"split": "recall", "rows": each * kinds} | summary(scores)


def summary(scores: Sequence[RecallScore]) -> dict[str, Any]:
    """``accuracy`` (mean over numbers of pairs) and all scores, as JSON."""
    whole = [score.accuracy for score in scores if score.distance is None]
    return {"accuracy": sum(whole) / len(whole), "scores": [asdict(score) for score in scores]}


def _words(task: Recall, folder: Path) -> Path:
    """The tokenizer of the made-up words, written if it is not there yet."""
    if folder.is_dir():
        return folder
    words = [
        "_",
        *(f"k{i + 1}" for i in range(task.keys)),
        *(f"v{i + 1}" for i in range(task.values)),
    ]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="_")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    try:
        with new_folder(folder) as draft:
            tokenizer.save(str(draft / "tokenizer.json"))
            settings = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "clean_up_tokenization_spaces": False,
                "model_max_length": 1 << 30,
                "eos_token": "_",
            }
            write_json(draft / "tokenizer_config.json", settings)
    except (Conflict, OSError):
        if not folder.is_dir():  # else another process was faster
            raise
    return folder
