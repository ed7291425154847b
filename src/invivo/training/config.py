"""What a training run is: typed settings from a TOML file, each checked where it is read.

A file has a few top-level values and tables named as the classes here. ``[model]`` is a Hub
``config.json`` in TOML: every family that invivo serves can be trained, by the Hub's own names.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from invivo.errors import InvalidRequest, NotFound
from invivo.training.typed_tables import read_table


@dataclass(frozen=True, slots=True)
class Source:
    """Where texts come from; exactly one of ``path`` and ``hub``.

    Attributes:
        path: a file, a folder (all its files of known kinds) or a pattern: .txt .md .jsonl
            .parquet, the text ones also as .xz or .gz; relative to the configuration's folder,
            ``~`` is the home folder.
        hub: a data set's name at the Hub.
        subset: of a Hub data set.
        column: field of a JSON line, column of a table.
        split: of all its documents; None: as each says itself, else drawn by
            ``data.valid_fraction``.
    """

    path: str | None = None
    hub: str | None = None
    subset: str | None = None
    column: str = "text"
    split: Literal["train", "valid", "test"] | None = None


@dataclass(frozen=True, slots=True)
class Recall:
    """Sizes of made-up recall rows; see :mod:`invivo.training.recall`.

    Attributes:
        pairs: numbers of pairs that a row may have.
        keys, values: how many different ones there are.
    """

    pairs: tuple[int, ...] = (4, 8, 16, 32)
    keys: int = 128
    values: int = 128


@dataclass(frozen=True, slots=True)
class Data:
    """Texts and how they become rows.

    Attributes:
        sources: at least one; none for ``recall`` and where text is ``prepared``.
        prepared: a folder of token shards that were prepared before, here or elsewhere; they keep
            their tokenizer and their splits. Relative to the configuration's folder.
        kind: ``text``, or ``recall``: made-up rows of key-value pairs and questions about them.
        recall: sizes of the latter.
        length: tokens of a row, which is what the model sees at once.
        valid_fraction: share of the documents that is held out, by a hash of their text, where
            a source does not say itself which are.
        separate_documents: attention, state and positions begin anew with each document; else a
            row is one text with end tokens in it.
    """

    sources: tuple[Source, ...] = ()
    prepared: str | None = None
    kind: Literal["text", "recall"] = "text"
    recall: Recall = field(default_factory=Recall)
    length: int = 1024
    valid_fraction: float = 0.02
    separate_documents: bool = False


@dataclass(frozen=True, slots=True)
class TokenizerSettings:
    """Train one (``vocab_size``) or take one (``name``: a model name or folder).

    Attributes:
        max_bytes: how much of the training text the tokenizer learns from.
    """

    vocab_size: int | None = None
    name: str | None = None
    max_bytes: int = 200_000_000


@dataclass(frozen=True, slots=True)
class Init:
    """Starting weights.

    Attributes:
        kind: ``normal`` draws all matrices with ``std``; ``scaled`` divides what writes to the
            residual stream by sqrt(2 layers) (GPT-2).
        std: standard deviation.
    """

    kind: Literal["normal", "scaled"] = "scaled"
    std: float = 0.02


@dataclass(frozen=True, slots=True)
class Steps:
    """The table ``[train]``.

    Attributes:
        steps: optimizer steps; or give ``epochs``.
        epochs: passes over the training tokens.
        batch: rows of an optimizer step, over all processes and micro-batches.
        micro_batch: rows that one process runs at once; None: its whole share.
        precision: of the products; weights, gradients and optimizer stay in float32.
        clip: largest norm of all gradients together; 0: no limit.
        compile: run the layers through torch.compile.
        recompute: ``layer`` keeps only the layers' inputs for the backward pass.
        log_every: steps between readings of the device; each step has its line all the same.
    """

    steps: int | None = None
    epochs: float | None = None
    batch: int = 32
    micro_batch: int | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    clip: float = 1.0
    compile: bool = False
    recompute: Literal["none", "layer"] = "none"
    log_every: int = 1


@dataclass(frozen=True, slots=True)
class AdamW:
    """The table ``[optimizer]`` (Loshchilov and Hutter, 2019); norms and biases do not decay."""

    learning_rate: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = 0.1


@dataclass(frozen=True, slots=True)
class Schedule:
    """Learning rate over the steps.

    Attributes:
        kind: ``cosine``, ``wsd`` (warm-up, stable, linear decay) or ``constant``.
        warmup: steps of the linear rise.
        final: last rate as a share of the highest.
        decay: share of the steps in which ``wsd`` falls.
    """

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: int = 0
    final: float = 0.1
    decay: float = 0.2


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Held-out text and samples during training.

    Attributes:
        every: steps between evaluations; 0: only at the end.
        windows: rows of held-out text each time; at the end all of them are read.
        prompts: beginnings that the model continues each time.
        sample_tokens: length of a continuation.
        temperature: of the draws; 0 takes the likeliest token.
    """

    every: int = 0
    windows: int = 64
    prompts: tuple[str, ...] = ()
    sample_tokens: int = 48
    temperature: float = 0.8


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The table ``[checkpoint]``: steps between checkpoints, and how many are kept."""

    every: int = 500
    keep: int = 2


@dataclass(frozen=True, slots=True)
class Parallel:
    """How processes share a model.

    Attributes:
        replicas: groups of processes that hold a whole copy between them (HSDP); the processes of
            a group shard it (FSDP2). 1: all processes are one group.
        tensor: processes that share every layer by heads and neurons and read the same rows
            (tensor parallelism). 1: each runs whole layers. A process alone runs everything.
    """

    replicas: int = 1
    tensor: int = 1


@dataclass(frozen=True, slots=True)
class Export:
    """How the trained model is written.

    Attributes:
        dtype: of the weights.
        license: of the model, for its card; the Hub's short name.
        about: a sentence for the card.
    """

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    license: str = ""
    about: str = ""


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """One run; its folder is ``runs/<name>``.

    Attributes:
        model: fields of a Hub config.json; vocabulary, end token and (unless given) the largest
            position come from the tokenizer and ``data.length``.
        seed: of the first weights, of the order of the rows and of the samples.
    """

    name: str
    model: dict[str, Any]
    data: Data
    seed: int = 0
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)
    init: Init = field(default_factory=Init)
    train: Steps = field(default_factory=Steps)
    optimizer: AdamW = field(default_factory=AdamW)
    schedule: Schedule = field(default_factory=Schedule)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoint: Checkpoints = field(default_factory=Checkpoints)
    parallel: Parallel = field(default_factory=Parallel)
    export: Export = field(default_factory=Export)


def read_config(path: Path | str, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a TOML file.

    Args:
        overrides: ``"train.steps=100"``; the value is TOML, or a bare word for a text; without
            a value (``"train.epochs="``) the file's is forgotten.

    Raises:
        NotFound: there is no such file.
        InvalidRequest: it is not TOML, or a value is unknown, missing, of the wrong type or out
            of range; ``field`` names it.
    """
    path = Path(path).expanduser()
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise NotFound("cannot be read", field="config", given=str(path)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"is not TOML: {error}", field="config", given=str(path)) from error
    for override in overrides:
        _override(table, override)
    for source in _sources(table):
        if isinstance(source.get("path"), str):
            source["path"] = str((path.parent / Path(source["path"]).expanduser()).resolve())
    data = table.get("data")
    if isinstance(data, dict) and isinstance(data.get("prepared"), str):
        data["prepared"] = str((path.parent / Path(data["prepared"]).expanduser()).resolve())
    tokenizer = table.get("tokenizer")
    if isinstance(tokenizer, dict) and isinstance(tokenizer.get("name"), str):
        local = path.parent / Path(tokenizer["name"]).expanduser()
        if local.exists():
            tokenizer["name"] = str(local.resolve())
    config = read_table(TrainConfig, table)
    check(config)
    return config


def _sources(table: dict[str, Any]) -> list[dict[str, Any]]:
    data = table.get("data")
    sources = data.get("sources") if isinstance(data, dict) else None
    return [s for s in sources if isinstance(s, dict)] if isinstance(sources, list) else []


def _override(table: dict[str, Any], text: str) -> None:
    name, equals, value = text.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise InvalidRequest(
            "is not of the form NAME=VALUE", field="set", given=text, remedy="--set train.steps=100"
        )
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    place = table
    for key in keys[:-1]:
        place = place.setdefault(key, {})
        if not isinstance(place, dict):
            raise InvalidRequest("is not a table", field=key, given=text)
    if parsed == "" and not value.strip():
        place.pop(keys[-1], None)
    else:
        place[keys[-1]] = parsed


def check(config: TrainConfig) -> None:
    """Refuse what has the right type and no meaning.

    Raises:
        InvalidRequest: ``field`` names the value.
    """
    data, loop = config.data, config.train
    name = config.name
    _need(
        re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name) is not None,
        "name",
        name,
        "is the name of a folder: letters, digits, and . _ + - after the first",
    )
    text = data.kind == "text" and data.prepared is None
    _need(not text or data.sources != (), "data.sources", None, "needs one [[data.sources]]")
    for i, source in enumerate(data.sources):
        one = (source.path is None) != (source.hub is None)
        _need(one, f"data.sources[{i}]", None, "needs either path or hub")
    _need(data.length >= 2, "data.length", data.length, "must be at least 2")
    share = data.valid_fraction
    _need(0 <= share < 1, "data.valid_fraction", share, "must lie between 0 and 1")
    tokenizer = config.tokenizer
    one = (tokenizer.vocab_size is None) != (tokenizer.name is None)
    _need(
        one or not text, "tokenizer", None, "needs either vocab_size (train one) or name (take one)"
    )
    size = tokenizer.vocab_size
    _need(
        size is None or size >= 257,
        "tokenizer.vocab_size",
        size,
        "must be at least 257: all bytes and the end of a text",
    )
    one = (loop.steps is None) != (loop.epochs is None)
    _need(one, "train.steps", loop.steps, "give either train.steps or train.epochs")
    _need(text or loop.steps is not None, "train.epochs", loop.epochs, "recall rows have no end")
    _need(loop.steps is None or loop.steps >= 1, "train.steps", loop.steps, "must be at least 1")
    _need(loop.epochs is None or loop.epochs > 0, "train.epochs", loop.epochs, "must be positive")
    for field_, value in (
        ("train.batch", loop.batch),
        ("train.micro_batch", 1 if loop.micro_batch is None else loop.micro_batch),
        ("train.log_every", loop.log_every),
        ("checkpoint.every", config.checkpoint.every),
        ("checkpoint.keep", config.checkpoint.keep),
        ("parallel.replicas", config.parallel.replicas),
        ("parallel.tensor", config.parallel.tensor),
        ("evaluation.windows", config.evaluation.windows),
        ("tokenizer.max_bytes", tokenizer.max_bytes),
    ):
        _need(value >= 1, field_, value, "must be at least 1")
    for field_, number in (
        ("train.clip", loop.clip),
        ("optimizer.weight_decay", config.optimizer.weight_decay),
        ("schedule.warmup", config.schedule.warmup),
        ("evaluation.every", config.evaluation.every),
        ("evaluation.sample_tokens", config.evaluation.sample_tokens),
        ("evaluation.temperature", config.evaluation.temperature),
    ):
        _need(number >= 0, field_, number, "must not be negative")
    for field_, number in (
        ("optimizer.learning_rate", config.optimizer.learning_rate),
        ("optimizer.epsilon", config.optimizer.epsilon),
        ("init.std", config.init.std),
    ):
        _need(number > 0, field_, number, "must be positive")
    for i, beta in enumerate(config.optimizer.betas):
        _need(0 <= beta < 1, f"optimizer.betas[{i}]", beta, "must lie between 0 and 1")
    for field_, share in (
        ("schedule.final", config.schedule.final),
        ("schedule.decay", config.schedule.decay),
    ):
        _need(0 <= share <= 1, field_, share, "must lie between 0 and 1")
    tensor = config.parallel.tensor
    _need(
        tensor == 1 or not loop.compile,
        "train.compile",
        loop.compile,
        f"is not made for layers that several processes share (parallel.tensor = {tensor})",
    )
    if loop.micro_batch is not None:
        whole = loop.batch % loop.micro_batch == 0
        _need(whole, "train.micro_batch", loop.micro_batch, f"must divide train.batch {loop.batch}")


def _need(holds: bool, name: str, given: object, message: str) -> None:
    if not holds:
        raise InvalidRequest(message, field=name, given=given)
