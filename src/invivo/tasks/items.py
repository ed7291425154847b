"""Multiple-choice items: read from files or from the Hub, or made here.

Three shapes of records are understood: ``question, options, label`` (a number), that of
CommonsenseQA and ARC at the Hub (``question, choices: {label, text}, answerKey``), and that of MMLU
(``question, choices, answer``).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from invivo.errors import InvalidRequest, MissingDependency

_KINDS = {
    "colour": ["red", "blue", "green", "yellow", "purple", "orange"],
    "animal": ["dog", "horse", "sheep", "lion", "rabbit", "elephant"],
    "country": ["France", "Japan", "Brazil", "Egypt", "Canada", "Poland"],
    "number": ["seven", "twelve", "forty", "three", "ninety-one", "six hundred"],
    "tool": ["hammer", "saw", "screwdriver", "pair of pliers", "drill", "wrench"],
    "fruit": ["apple", "banana", "cherry", "pear", "bunch of grapes", "peach"],
    "piece of clothing": ["shirt", "hat", "pair of trousers", "scarf", "coat", "woollen sock"],
}


@dataclass(frozen=True, slots=True)
class Item:
    """A question with options, of which ``label`` is the right one."""

    id: str
    question: str
    options: tuple[str, ...]
    label: int


def load_items(source: str, n: int | None = None, *, seed: int = 0) -> list[Item]:
    """Items of one source, in its order; ``n`` of them drawn at random where there are more.

    Args:
        source: "synthetic"; a .jsonl, .jsonl.gz, .json or .parquet file; or
            ``hub:OWNER/NAME[:SUBSET[:SPLIT]]``.

    Raises:
        InvalidRequest: no such file, or a record of no known shape.
        NotFound, Forbidden, Unavailable: the Hub does not give it.
    """
    if source == "synthetic":
        return synthetic_items(n if n is not None else 200, seed=seed)
    if source.startswith("hub:"):
        items = _from_hub(source)
    else:
        path = Path(source).expanduser()
        if not path.is_file():
            raise InvalidRequest(
                "there is no such file",
                field="items",
                given=source,
                remedy='Name a file, hub:OWNER/NAME[:SUBSET[:SPLIT]], or "synthetic"',
            )
        items = _from_file(path)
    if n is not None and n < len(items):
        chosen = sorted(random.Random(seed).sample(range(len(items)), n))
        items = [items[i] for i in chosen]
    return items


def synthetic_items(n: int, *, seed: int = 0) -> list[Item]:
    """Questions of the kind "Which of these is a colour?" with three to five options."""
    draw = random.Random(seed)
    items = []
    for i in range(n):
        asked, *others = draw.sample(sorted(_KINDS), draw.randint(3, 5))
        options = [draw.choice(_KINDS[kind]) for kind in (asked, *others)]
        right = options[0]
        draw.shuffle(options)
        article = "an" if asked[0] in "aeiou" else "a"
        items.append(
            Item(
                f"made-{seed}-{i}",
                f"Which of these is {article} {asked}?",
                tuple(options),
                options.index(right),
            )
        )
    return items


def digest(items: Sequence[Item]) -> str:
    """SHA-256 of what is asked, in order."""
    told = [[item.id, item.question, item.options, item.label] for item in items]
    return hashlib.sha256(json.dumps(told, ensure_ascii=False).encode()).hexdigest()


def read_item(record: Mapping[str, Any], name: str) -> Item:
    """One item of a record.

    Args:
        name: the item's id where the record has none.

    Raises:
        InvalidRequest: it has none of the known shapes.
    """
    try:
        options, label = _options(record)
        if not 0 <= label < len(options) or len(options) < 2:
            raise ValueError
        return Item(str(record.get("id", name)), str(record["question"]), tuple(options), label)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InvalidRequest(
            "a record is no multiple-choice item",
            field=f"items.{name}",
            given=record,
            remedy="Give question, options and label (the number of the right option)",
        ) from error


def _options(record: Mapping[str, Any]) -> tuple[list[str], int]:
    if "options" in record:
        return [str(o) for o in record["options"]], int(record["label"])
    choices = record["choices"]
    if isinstance(choices, Mapping):
        labels = [str(one) for one in choices["label"]]
        return [str(one) for one in choices["text"]], labels.index(str(record["answerKey"]))
    return [str(one) for one in choices], int(record["answer"])


def _from_file(path: Path) -> list[Item]:
    return [
        read_item(record, f"{path.name.split('.')[0]}-{i}")
        for i, record in enumerate(_records(path))
    ]


def _records(path: Path) -> Iterator[Mapping[str, Any]]:
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
        if path.suffix == ".json":
            yield from json.loads(text)
        else:
            yield from (json.loads(line) for line in text.splitlines() if line.strip())
    except (OSError, EOFError, ValueError, TypeError, zlib.error) as error:
        raise InvalidRequest(f"cannot be read: {error}", field="items", given=str(path)) from error


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingDependency(
            "Parquet files need pyarrow", remedy="Run: pip install 'invivo[study]'"
        ) from error
    try:
        found: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise InvalidRequest(f"cannot be read: {error}", field="items", given=str(path)) from error
    return found


def _from_hub(source: str) -> list[Item]:
    from invivo.training.config import Source
    from invivo.training.hub_files import hub_files

    name, *rest = source.removeprefix("hub:").split(":")
    subset, split = [*rest, "", ""][:2]
    files = hub_files(Source(hub=name, subset=subset or None), "items")
    paths = [f.path for f in files if not split or f.path.parent.name == split]
    if not paths:
        raise InvalidRequest("the data set has no such split", field="items", given=source)
    return [item for path in paths for item in _from_file(path)]
