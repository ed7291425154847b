"""Tokens on disk, mapped into memory: what preparation wrote, and how it is read.

A split (train, valid, test) is one long ring of tokens over some files. Every document stands
behind its boundary, which begins with the end token: the end of a document is predicted from its
last token, its first token from its own boundary, and behind the last document comes the first
boundary again. So each token is predicted once, each from what stands before it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from invivo.errors import InvalidRequest, NotFound

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
TOKEN_BYTES = "token_bytes.npy"


@dataclass(frozen=True, slots=True)
class Ring:
    """One split.

    Attributes:
        tokens: all of them, boundaries included.
        bytes: of the documents as UTF-8.
        files: name and tokens of each file, in their order.
    """

    tokens: int
    bytes: int
    documents: int
    files: tuple[tuple[str, int], ...]


class Shards:
    """Prepared text.

    Attributes:
        folder: where it lies.
        tokenizer: folder of the tokenizer.
        vocab_size: of the tokenizer.
        end_token: id that ends a document.
        opening: id at which a document begins.
        digest: identity of tokens, splits and tokenizer.
        rings: by split.
        manifest: everything that preparation wrote down.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.tokenizer = folder / TOKENIZER
        self.vocab_size: int = manifest["vocab_size"]
        self.end_token: int = manifest["boundary"][0]
        self.opening: int = manifest["boundary"][-1]
        self.digest: str = manifest["digest"]
        self.rings = {
            split: Ring(
                ring["tokens"],
                ring["bytes"],
                ring["documents"],
                tuple((file["name"], file["tokens"]) for file in ring["files"]),
            )
            for split, ring in manifest["splits"].items()
        }
        dtype = np.dtype(manifest["dtype"])
        self._maps = {
            split: [
                np.memmap(folder / name, dtype, mode="r", shape=(tokens,))
                for name, tokens in ring.files
            ]
            for split, ring in self.rings.items()
        }
        self._ends = {
            split: np.cumsum([tokens for _, tokens in ring.files])
            for split, ring in self.rings.items()
        }
        self._token_bytes = np.load(folder / TOKEN_BYTES)

    @property
    def tokens(self) -> dict[str, int]:
        """By split."""
        return {split: ring.tokens for split, ring in self.rings.items()}

    @property
    def bytes(self) -> dict[str, int]:
        """By split, UTF-8."""
        return {split: ring.bytes for split, ring in self.rings.items()}

    def read(self, split: str, start: int, count: int) -> NDArray[np.int64]:
        """``count`` tokens of a ring from ``start`` on, going round as often as it takes.

        Raises:
            InvalidRequest: there is no such split, or it is empty.
        """
        ring = self.ring(split)
        out = np.empty(count, np.int64)
        filled = 0
        while filled < count:
            at = (start + filled) % ring.tokens
            file = int(np.searchsorted(self._ends[split], at, side="right"))
            inside = at - (int(self._ends[split][file - 1]) if file else 0)
            some = self._maps[split][file][inside : inside + count - filled]
            out[filled : filled + len(some)] = some
            filled += len(some)
        return out

    def ring(self, split: str) -> Ring:
        """
        Raises:
            InvalidRequest: there is no such split, or it is empty.
        """
        ring = self.rings.get(split)
        if ring is None or not ring.tokens:
            raise InvalidRequest(
                "there is no text in this split",
                field="split",
                given=split,
                remedy="There is some in: " + ", ".join(s for s, n in self.tokens.items() if n),
            )
        return ring

    def bytes_of(self, split: str, tokens: NDArray[np.int64]) -> float:
        """UTF-8 bytes of text that these tokens of a split stand for.

        Summed over the split this is its count of bytes exactly. With vocabularies that are not
        byte-level, a token's share in it is only nearly its own.
        """
        ring, counted = self.ring(split), self.manifest["splits"][split]["token_bytes"]
        exact = int(self._token_bytes[tokens].sum())
        return exact if counted == ring.bytes else exact * ring.bytes / max(1, counted)


def open_shards(folder: Path, *, field: str = "folder") -> Shards:
    """
    Args:
        field: name of ``folder`` in errors.

    Raises:
        NotFound: nothing has been prepared there, or only a part of it.
        InvalidRequest: another version of this program prepared it.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except OSError as error:
        raise NotFound("no text has been prepared here", field=field, given=str(folder)) from error
    if manifest["format"] != FORMAT:
        raise InvalidRequest(
            "was prepared by another version",
            field=field,
            given=str(folder),
            remedy="Remove it; it is prepared again when it is needed",
        )
    return Shards(folder, manifest)


def digest_of(parts: list[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
