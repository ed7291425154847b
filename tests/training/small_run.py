"""A run of a second: a few thousand parameters on text that is made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from invivo.training.config import TrainConfig, read_config
from invivo.training.run_folder import RunFolder

_TEXT = "the cat saw a dog that ran home and the old house was red so we sang"

LLAMA = """\
model_type = "llama"
hidden_size = 24
intermediate_size = 32
num_hidden_layers = 2
num_attention_heads = 2
tie_word_embeddings = true
"""
GLA = """\
model_type = "gla"
hidden_size = 24
intermediate_size = 32
num_hidden_layers = 2
num_heads = 2
use_short_conv = true
tie_word_embeddings = true
"""


def text(n_documents: int = 40) -> str:
    """Sentences with an order that can be learned; blank lines between documents."""
    known, documents = _TEXT.split(), []
    for d in range(n_documents):
        words = [known[(d * 7 + i * (1 + d % 3)) % len(known)] for i in range(60)]
        documents.append(" ".join(words) + ".")
    return "\n\n".join(documents)


def written(folder: Path, model: str = LLAMA, **lines: str) -> Path:
    """``small.toml`` and its text in ``folder``; ``lines`` are added to the tables they name."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "texts"
    source.mkdir(exist_ok=True)
    for i, document in enumerate(text().split("\n\n")):
        (source / f"{i:02d}.txt").write_text(document)
    tables = {
        "data": 'length = 16\nvalid_fraction = 0.1\nsources = [{ path = "texts" }]\n',
        "tokenizer": "vocab_size = 280\n",
        "train": "steps = 12\nbatch = 4\n",
        "optimizer": "learning_rate = 3e-3\n",
        "schedule": "warmup = 2\n",
        "checkpoint": "every = 5\n",
        "export": 'dtype = "float32"\n',
    }
    for name, line in lines.items():
        tables[name] = tables.get(name, "") + line + "\n"
    body = "\n".join(f"[{name}]\n{table}" for name, table in tables.items())
    path = folder / "small.toml"
    path.write_text(f'name = "small"\n\n[model]\n{model}\n{body}')
    return path


def small(folder: Path, *overrides: str, model: str = LLAMA, **lines: str) -> TrainConfig:
    return read_config(written(folder, model, **lines), overrides)


def pretended(home: Path, name: str, steps: int, status: str = "done") -> RunFolder:
    """A run's folder as ``steps`` steps of 200 would have left it, without the training."""
    folder = RunFolder(home / name)
    folder.write_manifest(
        {
            "name": name,
            "status": status,
            "steps": 200,
            "parameters": 6_730_816,
            "created": 1.8e9,
            "config": {"name": name, "seed": 0},
        }
    )
    for step in range(1, steps + 1):
        numbers = {"loss": 7.0 - step / 100, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_s": 250.0}
        line = {"kind": "step", "step": step, "tokens": 64 * step} | numbers
        folder.metrics.add(line | {"memory": 1 << 30, "seconds": step / 4})
    line = {"kind": "evaluation", "step": steps, "tokens": 64 * steps, "split": "valid"}
    folder.metrics.add(line | {"bits_per_byte": 1.25, "low": 1.2, "high": 1.3, "loss": 3.0})
    return folder


def curve(lines: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """What must be the same to the last bit however often a run was interrupted."""
    names = ("step", "tokens", "loss", "grad_norm", "lr")
    return [tuple(line[n] for n in names) for line in lines if line["kind"] == "step"]
