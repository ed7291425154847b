"""The model card of a trained model: what it is and how it came about, as its README.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from invivo.models.config import ModelConfig


def model_card(
    manifest: Mapping[str, Any],
    shape: ModelConfig,
    *,
    tokens: int,
    evaluation: Mapping[str, Any] | None,
) -> str:
    """Markdown with the Hub's header.

    Args:
        manifest: of the run.
        tokens: learned from, repetitions counted.
        evaluation: the last one's line in the metrics.
    """
    config = manifest["config"]
    kinds = sorted({layer.mixer for layer in shape.layers})
    header = ["library_name: invivo", "pipeline_tag: text-generation"]
    if config["export"]["license"]:
        header.insert(0, f"license: {config['export']['license']}")
    rows = [
        ("parameters", f"{manifest['parameters']:,}"),
        ("layers", f"{shape.n_layers}, {' and '.join(kinds)}"),
        ("width", f"{shape.d_model}"),
        ("vocabulary", f"{shape.vocab_size:,}"),
        ("tokens learned from", f"{tokens:,}, in rows of {config['data']['length']:,}"),
        ("text", _texts(manifest)),
    ]
    if evaluation is not None:
        rows.append(("held out", _held_out(evaluation)))
    rows.append(("made with", ", ".join(f"{k} {v}" for k, v in manifest["versions"].items())))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    lines = "\n".join(header)
    about = config["export"]["about"] or f"A {shape.family} language model, trained from scratch."
    return (
        f"---\n{lines}\n---\n# {config['name']}\n{about}\n\n| | |\n| --- | --- |\n{table}\n\n"
        "    invivo serve PATH_OF_THIS_FOLDER\n\n"
        "It knows its training text and nothing else: it continues texts, it does not answer.\n"
    )


def _texts(manifest: Mapping[str, Any]) -> str:
    data = manifest["config"]["data"]
    if data["kind"] != "text":
        return "made-up rows of pairs and questions"
    names = [s["hub"] or Path(s["path"]).name for s in data["sources"]]
    if data["prepared"]:
        names = [Path(data["prepared"]).name]
    size = manifest["data"]["bytes"].get("train", 0)
    return f"{', '.join(names)} ({size / 1e6:.1f} MB to train on)"


def _held_out(line: Mapping[str, Any]) -> str:
    if "accuracy" in line:
        return f"{line['accuracy']:.1%} of the questions right"
    text = f"{line['bits_per_byte']:.4f} bits a byte"
    if line.get("low") is not None:
        text += f" (95 %: {line['low']:.4f} to {line['high']:.4f})"
    return text
