"""From files of text to token shards, once: the next run with the same data finds them.

Preparation that was interrupted goes on behind the last file whose tokens were safely written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from invivo.errors import InvalidRequest
from invivo.models.resolve import resolve
from invivo.process_lock import locked
from invivo.training.config import Data, TokenizerSettings
from invivo.training.shards import (
    FORMAT,
    MANIFEST,
    TOKEN_BYTES,
    TOKENIZER,
    Shards,
    digest_of,
    open_shards,
)
from invivo.training.sources import SPLITS, Passage, Reader, SourceFile, find_files
from invivo.training.tokenizer import (
    TextTokenizer,
    copy_tokenizer,
    learn_tokenizer,
    open_tokenizer,
)
from invivo.whole_file import write_whole

Progress = Callable[[str, float], None]
PROGRESS = "progress.json"
SHARD_TOKENS = 1 << 27
_BATCH = 128  # passages tokenised together
_SAFE = 1 << 24  # tokens after which, at the end of a file, the state is written down


def prepare(
    data: Data,
    tokenizer: TokenizerSettings,
    home: Path,
    *,
    progress: Progress | None = None,
) -> Shards:
    """The token shards of ``data``, made if they are not there yet.

    Processes that share ``home`` wait for each other.

    Args:
        home: folder of all prepared data; what is made lies in a folder of its own there, named
            by a hash of both tables and of path, size and time of change of each file.
        progress: called with a word and a share between 0 and 1.

    Raises:
        NotFound: a source or the tokenizer is not there.
        InvalidRequest: a source cannot be read (the message has file and line), or nothing is
            left to train on, or nothing is held out.
        MissingDependency: a library is needed to read a source.
    """
    files = find_files(data.sources)
    folder = home / _key(data, tokenizer, files)
    if not (folder / MANIFEST).is_file():
        with locked(home / f".{folder.name}.lock"):
            if not (folder / MANIFEST).is_file():
                _make(data, tokenizer, files, folder, progress or _silent)
    return open_shards(folder)


def _silent(word: str, share: float) -> None:
    pass


def _key(data: Data, tokenizer: TokenizerSettings, files: Sequence[SourceFile]) -> str:
    parts: list[Any] = [FORMAT, data.valid_fraction]
    for file in files:
        status = file.path.stat()
        identity = (str(file.path.resolve()), status.st_size, status.st_mtime_ns)
        parts.append([*identity, file.column, file.split])
    if tokenizer.name is None:
        parts.append([tokenizer.vocab_size, tokenizer.max_bytes])
    else:
        given = Path(tokenizer.name).expanduser()
        taken = given if (given / "tokenizer.json").is_file() else resolve(tokenizer.name)
        parts.append(hashlib.sha256((taken / "tokenizer.json").read_bytes()).hexdigest())
    return digest_of([json.dumps(parts)])[:16]


@dataclass(slots=True)
class _Counts:
    """Of one split; ``files`` has the tokens of each shard."""

    tokens: int = 0
    bytes: int = 0
    documents: int = 0
    token_bytes: int = 0
    files: list[int] = field(default_factory=list)


def _make(
    data: Data,
    settings: TokenizerSettings,
    files: Sequence[SourceFile],
    folder: Path,
    progress: Progress,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / TOKENIZER).is_dir():
        if settings.name is not None:
            copy_tokenizer(settings.name, folder / TOKENIZER)
        else:
            assert settings.vocab_size is not None
            texts = _training_texts(data, files, settings.max_bytes, progress)
            learn_tokenizer(texts, settings.vocab_size, folder / TOKENIZER)
    tokenizer = open_tokenizer(folder / TOKENIZER)
    writer = _Writer(folder, tokenizer)
    weights = [max(1, file.path.stat().st_size) for file in files]
    total, before = sum(weights), 0
    for number, (file, weight) in enumerate(zip(files, weights, strict=True)):
        if number >= writer.n_done:
            reader = Reader(file, data.valid_fraction)
            passages = iter(reader)
            while batch := list(islice(passages, _BATCH)):
                writer.add(batch)
                progress("tokenizing", (before + weight * reader.share) / total)
            writer.file_done(_sha256(file.path))
        before += weight
    _finish(data, settings, files, writer)
    progress("tokenizing", 1.0)


def _training_texts(
    data: Data, files: Sequence[SourceFile], max_bytes: int, progress: Progress
) -> Iterator[str]:
    """Training passages, from every file its part of ``max_bytes``, the first ones."""
    sizes = [file.path.stat().st_size for file in files]
    left, total = max_bytes, max(1, sum(sizes))
    for number, file in enumerate(files):
        # What earlier files did not use up is shared by the later ones.
        part = left * sizes[number] / max(1, sum(sizes[number:]))
        begun = sum(sizes[:number])
        reader = Reader(file, data.valid_fraction)
        for passage in reader:
            if passage.split == "train":
                if part <= 0:
                    break
                n_bytes = len(passage.text.encode())
                part -= n_bytes
                left -= n_bytes
                progress("reading", (begun + sizes[number] * reader.share) / total)
                yield passage.text
    progress("learning the tokenizer", 0.0)


class _Writer:
    """Appends tokens to the shards of each split, and remembers what is safe on disk."""

    def __init__(self, folder: Path, tokenizer: TextTokenizer) -> None:
        self.folder = folder
        self.tokenizer = tokenizer
        self.dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
        self.counts: dict[str, _Counts] = {split: _Counts() for split in SPLITS}
        self.hashes: list[str] = []  # of the sources' files that are done
        self._unsafe = 0
        state = folder / PROGRESS
        if state.is_file():
            kept = json.loads(state.read_text(encoding="utf-8"))
            if kept["tokenizer"] == tokenizer.digest:
                self.hashes = kept["hashes"]
                self.counts = {s: _Counts(**counts) for s, counts in kept["splits"].items()}
        self._cut()
        self.n_done = len(self.hashes)

    def _cut(self) -> None:
        """Back to what is known to be whole."""
        kept = {}
        for split, counts in self.counts.items():
            for i, tokens in enumerate(counts.files):
                kept[shard_name(split, i)] = tokens * self.dtype.itemsize
        for path in self.folder.glob("*.bin"):
            if path.name in kept:
                os.truncate(path, kept[path.name])
            else:
                path.unlink()

    def add(self, passages: Sequence[Passage]) -> None:
        encoded = self.tokenizer.encode([passage.text for passage in passages])
        for split in SPLITS:
            counts, tokens = self.counts[split], list[int]()
            for passage, ids in zip(passages, encoded, strict=True):
                if passage.split == split:
                    if passage.begins:
                        tokens += self.tokenizer.boundary
                        counts.documents += 1
                    tokens += ids
                    counts.bytes += len(passage.text.encode())
            if tokens:
                counts.token_bytes += int(self.tokenizer.token_bytes[tokens].sum())
                self._append(split, np.asarray(tokens, self.dtype))

    def _append(self, split: str, tokens: np.ndarray[Any, Any]) -> None:
        counts = self.counts[split]
        if not counts.files or counts.files[-1] >= SHARD_TOKENS:
            counts.files.append(0)
        with (self.folder / shard_name(split, len(counts.files) - 1)).open("ab") as file:
            file.write(tokens.tobytes())
        counts.files[-1] += len(tokens)
        counts.tokens += len(tokens)
        self._unsafe += len(tokens)

    def file_done(self, digest: str) -> None:
        self.hashes.append(digest)
        if self._unsafe >= _SAFE:
            self.save()

    def save(self) -> None:
        for split, counts in self.counts.items():
            for i in range(len(counts.files)):
                with (self.folder / shard_name(split, i)).open("rb") as file:
                    os.fsync(file.fileno())
        state = {
            "tokenizer": self.tokenizer.digest,
            "hashes": self.hashes,
            "splits": {split: asdict(counts) for split, counts in self.counts.items()},
        }
        write_whole(self.folder / PROGRESS, json.dumps(state))
        self._unsafe = 0


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.bin"


def _finish(
    data: Data, settings: TokenizerSettings, files: Sequence[SourceFile], writer: _Writer
) -> None:
    writer.save()
    if not writer.counts["train"].tokens:
        raise InvalidRequest(
            "there is no text to train on", field="data.sources", given=[str(f.path) for f in files]
        )
    if data.valid_fraction > 0 and not writer.counts["valid"].tokens:
        raise InvalidRequest(
            f"none of {writer.counts['train'].documents} documents was drawn to be held out",
            field="data.valid_fraction",
            given=data.valid_fraction,
            remedy="Raise it (documents that say their own split are not drawn), give a source "
            "with split = 'valid', or set it to 0",
        )
    tokenizer, folder = writer.tokenizer, writer.folder
    splits = {}
    for split, counts in writer.counts.items():
        names = [shard_name(split, i) for i in range(len(counts.files))]
        splits[split] = asdict(counts) | {
            "files": [
                {"name": name, "tokens": tokens, "sha256": _sha256(folder / name)}
                for name, tokens in zip(names, counts.files, strict=True)
            ]
        }
    told = [tokenizer.digest]
    told += [f"{split} {f['sha256']}" for split, c in splits.items() for f in c["files"]]
    np.save(folder / TOKEN_BYTES, tokenizer.token_bytes)
    manifest = {
        "format": FORMAT,
        "digest": digest_of(told),
        "dtype": writer.dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "boundary": list(tokenizer.boundary),
        "tokenizer": {"sha256": tokenizer.digest} | asdict(settings),
        "valid_fraction": data.valid_fraction,
        "sources": [
            {
                "path": str(file.path),
                "bytes": file.path.stat().st_size,
                "sha256": digest,
                "column": file.column,
                "split": file.split,
            }
            for file, digest in zip(files, writer.hashes, strict=True)
        ],
        "splits": splits,
    }
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    (folder / PROGRESS).unlink()
    for rest in folder.glob(f".{TOKENIZER}-*"):  # of an interrupted beginning
        shutil.rmtree(rest, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
