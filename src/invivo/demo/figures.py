"""The report's figures, as SVG whose ink is the page's own text colour."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from invivo.demo.report import Findings, kept
from invivo.html_page import INK, drawn, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {
    "decode": "#12a594",
    "prefill": "#6a7ff0",
    "score": "#d9961a",
    "train": "#d6468b",
    "backward": "#9b59c9",
}
LABELS = {
    "decode": "decode",
    "prefill": "prefill",
    "score": "score",
    "train": "training forward",
    "backward": "training backward",
}
PHASES = ("#6a7ff0", "#d6468b")
STEP = 2  # seconds of one column of the token chart


def figures(findings: Findings) -> dict[str, str]:
    """SVG of ``loss``, ``tokens`` and ``latency``.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    return {
        draw.__name__: drawn(partial(draw, findings), draw.__name__)
        for draw in (loss, tokens, latency)
    }


def loss(findings: Findings) -> Figure:
    """Of every step, smoothed, and of what is held out."""
    figure, (axes,) = panels(1, (9, 3.6))
    job = findings.learning.job
    assert job is not None
    points = [(i + 1, value) for i, value in enumerate(job.losses) if value is not None]
    steps, losses = zip(*points, strict=True) if points else ((), ())
    axes.plot(steps, losses, color=COLOURS["train"], alpha=0.35, linewidth=1, label="each step")
    axes.plot(steps, _smoothed(losses), color=COLOURS["train"], linewidth=2.4, label="smoothed")
    at, held_out = zip(*findings.learning.held_out, strict=True)
    axes.plot(
        at, held_out, color=COLOURS["decode"], marker="o", linewidth=2, label="held out (scored)"
    )
    for step, value in findings.learning.held_out:
        axes.annotate(
            f"{value:.2f}",
            (step, value),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            color=INK,
        )
    axes.set(xlabel="optimizer step", ylabel="loss per token (nats)")
    axes.margins(y=0.12)
    axes.legend(frameon=False, loc="upper right")
    return figure


def tokens(findings: Findings) -> Figure:
    """By purpose and second, stacked, over the whole demo."""
    figure, (axes,) = panels(1, (9, 3.6))
    seconds = np.asarray(findings.tokens["seconds"], dtype=float)
    n = len(seconds) // STEP * STEP
    start = seconds[0] if len(seconds) else 0.0
    columns = [
        np.asarray(findings.tokens[purpose][:n]).reshape(-1, STEP).mean(axis=1)
        for purpose in LABELS
    ]
    axes.stackplot(
        seconds[:n:STEP] - start,
        columns,
        labels=list(LABELS.values()),
        colors=[COLOURS[purpose] for purpose in LABELS],
        step="post",
    )
    for i, phase in enumerate(findings.phases):
        axes.axvline(phase.began - start, color=INK, linewidth=1, linestyle=":")
        axes.annotate(
            phase.name,
            (phase.began - start, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, 2 + 13 * i),
            textcoords="offset points",
            color=INK,
        )
    axes.axvline(findings.phases[-1].ended - start, color=INK, linewidth=1, linestyle=":")
    axes.set(xlabel="seconds", ylabel="tokens a second")
    axes.margins(x=0)
    figure.legend(frameon=False, loc="outside lower center", ncols=len(LABELS))
    return figure


def latency(findings: Findings) -> Figure:
    """Which share of the streams waited no longer than so long, both phases, and the objective."""
    figure, both = panels(2, (9, 3.4))
    names = (
        ("ttft", "time to the first token (s)", 1.0),
        ("tpot", "time per later token (ms)", 1e3),
    )
    for axes, (name, label, unit) in zip(both, names, strict=True):
        for colour, phase in zip(PHASES, findings.phases, strict=True):
            values = np.sort(getattr(kept(phase, findings.slo), name)) * unit
            share = np.arange(1, len(values) + 1) / max(1, len(values))
            axes.step(
                values, 100 * share, where="post", color=colour, linewidth=2, label=phase.name
            )
        limit = findings.slo[f"{name}_ms"] / 1e3 * unit
        axes.axvline(limit, color="#d9442f", linestyle="--", linewidth=1.5, label="objective")
        axes.set(xlabel=label, ylabel="streams (%)", ylim=(0, 103))
        axes.set_xlim(left=0)
        axes.grid(alpha=0.15, color=INK)
    both[1].legend(frameon=False, loc="lower right")
    return figure


def _smoothed(values: tuple[float, ...], memory: float = 0.85) -> list[float]:
    """An exponential mean that begins unbiased."""
    out, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = memory * total + value, memory * weight + 1
        out.append(total / weight)
    return out
