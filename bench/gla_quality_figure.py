"""The figure of ``gla_quality.py``: text, longer texts, recall and decoding of both models.

python bench/gla_quality_figure.py DIR/runs.tar.gz bench/results/gla-quality-h200.png
"""

from __future__ import annotations

import json
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from invivo.training.figures import COLOURS, MARKERS, round_ticks
from invivo.training.run_record import RunRecord, read_run

KINDS = {"gla": "gated linear attention", "transformer": "Transformer++"}
RECALL_KINDS = KINDS | {"gla-conv": "GLA with a short convolution"}
STYLES = {
    kind: {"color": colour, "marker": marker, "linewidth": 2}
    for kind, colour, marker in zip(RECALL_KINDS, COLOURS, MARKERS, strict=False)
}


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(source) as packed:
            packed.extractall(folder, filter="data")
        draw(Path(folder), target)
    print(f"written to {target}")


def draw(folder: Path, target: Path) -> None:
    """Five panels.

    Args:
        folder: gla_quality.json and ``runs/``.
    """
    results = json.loads((folder / "gla_quality.json").read_text())
    runs = [read_run(path.parent) for path in sorted((folder / "runs").glob("*/manifest.json"))]
    figure = Figure(figsize=(13, 7.6), layout="constrained")
    grid = figure.add_gridspec(2, 3)
    text, long = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1:])
    asked, step, memory = (figure.add_subplot(grid[1, i]) for i in range(3))
    held_out(text, runs)
    positions(long, results, trained=next(r for r in runs if r.name == "gla-seed0"))
    recall(asked, runs)
    decoding(step, memory, results)
    for axes in (text, long, asked, step, memory):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    text.legend(frameon=False)
    figure.savefig(target, dpi=110)


def of_kind(runs: list[RunRecord], kind: str, prefix: str = "") -> list[RunRecord]:
    return [run for run in runs if run.name.startswith(f"{prefix}{kind}-seed")]


def held_out(axes: Axes, runs: list[RunRecord]) -> None:
    for kind, name in KINDS.items():
        for i, run in enumerate(of_kind(runs, kind)):
            lines = [line for line in run.evaluations if "bits_per_byte" in line]
            tokens = [line["tokens"] / 1e6 for line in lines]
            bits = [line["bits_per_byte"] for line in lines]
            axes.plot(tokens, bits, **STYLES[kind], markersize=4, label=name if i == 0 else None)
    axes.set(title="Held-out text, each seed", xlabel="million tokens", ylabel="bits per byte")


def positions(axes: Axes, results: dict[str, Any], trained: RunRecord) -> None:
    ends: list[int] = []
    for kind in KINDS:
        some = [b for name, b in results.get("positions", {}).items() if name.startswith(kind)]
        if not some:
            continue
        ends = [bucket["last"] for bucket in some[0]]
        losses = np.array([[bucket["loss"] for bucket in run] for run in some])
        axes.plot(ends, np.exp(losses.mean(axis=0)), **STYLES[kind])
        low, high = np.exp(losses.min(axis=0)), np.exp(losses.max(axis=0))
        axes.fill_between(ends, low, high, color=STYLES[kind]["color"], alpha=0.2)
    axes.axvline(trained.manifest["config"]["data"]["length"], color="#777777", linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ends, [f"{e // 1024}k" if e >= 1024 else str(e) for e in ends])
    axes.xaxis.minorticks_off()
    round_ticks(axes)
    axes.set(
        title="Perplexity by position (dotted: length of training; shaded: both seeds)",
        xlabel="position in the row, end of the bucket",
        ylabel="perplexity of a token",
    )


def recall(axes: Axes, runs: list[RunRecord]) -> None:
    for kind, name in RECALL_KINDS.items():
        for i, run in enumerate(of_kind(runs, kind, "recall-")):
            scores = [s for s in (run.last or {}).get("scores", ()) if s["distance"] is None]
            pairs = [score["pairs"] for score in scores]
            right = [100 * score["accuracy"] for score in scores]
            axes.plot(pairs, right, **STYLES[kind], label=name if i == 0 else None)
            axes.set_xscale("log", base=2)
            axes.set_xticks(pairs, [str(n) for n in pairs])
    axes.set(
        title="Recall of pairs, two-layer models, each seed",
        xlabel="pairs in the row",
        ylabel="right answers (%)",
        ylim=(-3, 103),
    )
    if of_kind(runs, "gla-conv", "recall-"):
        axes.legend(frameon=False)


def decoding(step: Axes, memory: Axes, results: dict[str, Any]) -> None:
    rows = results.get("decode", [])
    batches = sorted({row["batch"] for row in rows})
    for kind in KINDS:
        for batch, line in zip(batches, ("--", "-"), strict=False):
            some = [row for row in rows if row["kind"] == kind and row["batch"] == batch]
            style = STYLES[kind] | {"linestyle": line}
            step.plot([r["context"] for r in some], [r["step_ms"] for r in some], **style)
        alone = [row for row in rows if row["kind"] == kind and row["batch"] == batches[0]]
        mib = [row["bytes_a_sequence"] / 2**20 for row in alone]
        memory.plot([row["context"] for row in alone], mib, **STYLES[kind])
    written = " and ".join(str(batch) for batch in batches)
    step.set(
        title=f"A step of decoding, {written} sequences (first dashed)",
        xlabel="tokens of context",
        ylabel="ms",
        ylim=(0, None),
    )
    memory.set(title="Memory of a sequence", xlabel="tokens of context", ylabel="MiB", yscale="log")
    round_ticks(memory)


if __name__ == "__main__":
    main()
