"""Figures of training runs: curves over tokens, by position, and recall.

Each draws what a report shows of one run or of several series; a series is a list of runs that
differ in their seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from invivo.html_page import INK, panels
from invivo.training.run_record import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Apart also for most who see colours differently, on light and on dark pages.
COLOURS = ("#1f83c4", "#dd6a1c", "#12a37f", "#c46aa6", "#c79a12", "#7a7fe0")
MARKERS = "osD^vP"
POINTS = 800  # of a curve; longer ones are averaged

Series = Mapping[str, Sequence[RunRecord]]
Numbers = NDArray[np.float64]


def learning(runs: Series) -> Figure:
    """Training loss and what is held out, over tokens."""
    figure, (left, right) = panels(2, (10, 3.9))
    for colour, marker, (label, some) in zip(COLOURS, MARKERS, runs.items(), strict=False):
        for i, run in enumerate(some):
            x, y = _curve(run.steps, "loss")
            if len(runs) == 1 and len(some) == 1:
                left.plot(x, y, color=colour, alpha=0.3, linewidth=1)
            name = label if i == 0 else None
            left.plot(x, smoothed(y), color=colour, linewidth=1.8, label=name)
        _held_out(right, some, colour, marker, label)
    left.set(xlabel="tokens", ylabel="training loss (nats a token)")
    _from_percentile(left, runs)
    right.set(xlabel="tokens", ylabel=_measure(runs))
    for axes in (left, right):
        axes.xaxis.set_major_formatter(_counts)
        axes.grid(alpha=0.15, color=INK)
    if len(runs) > 1:
        right.legend(frameon=False)
    return figure


def course(runs: Series) -> Figure:
    """Learning rate, norm of the gradients, speed."""
    figure, axes = panels(3, (10, 2.9))
    names = ("lr", "grad_norm", "tokens_per_s")
    labels = ("learning rate", "norm of the gradients", "tokens a second")
    for place, name, title in zip(axes, names, labels, strict=True):
        for colour, (label, some) in zip(COLOURS, runs.items(), strict=False):
            for i, run in enumerate(some):
                x, y = _curve(run.steps, name)
                if len(runs) > 1:
                    y = smoothed(y)
                place.plot(x, y, color=colour, linewidth=1.3, label=label if i == 0 else None)
        place.set_xlabel("tokens")
        place.set_title(title, fontsize=11)
        place.xaxis.set_major_formatter(_counts)
        place.grid(alpha=0.15, color=INK)
    axes[1].set_yscale("log")
    round_ticks(axes[1])
    axes[2].set_ylim(bottom=0)
    axes[2].yaxis.set_major_formatter(_counts)
    if len(runs) > 1:
        axes[2].legend(frameon=False)
    return figure


def by_position(
    series: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], trained: int | None
) -> Figure:
    """Perplexity of tokens by what stands before them.

    Args:
        series: for each label its runs, of each the buckets of
            :func:`~invivo.training.evaluate.by_position`.
        trained: length of the rows of training, marked.
    """
    figure, (axes,) = panels(1, (9, 4))
    for colour, marker, (label, runs) in zip(COLOURS, MARKERS, series.items(), strict=False):
        ends = [bucket["last"] for bucket in runs[0]]
        losses = np.array([[bucket["loss"] for bucket in run] for run in runs])
        mean = np.exp(losses.mean(axis=0))
        axes.plot(ends, mean, color=colour, marker=marker, linewidth=2, label=label)
        if len(runs) > 1:
            low, high = np.exp(losses.min(axis=0)), np.exp(losses.max(axis=0))
        else:
            low, high = (np.exp(_bounds(runs[0], side)) for side in ("low", "high"))
        axes.fill_between(ends, low, high, color=colour, alpha=0.2, linewidth=0)
    if trained is not None:
        axes.axvline(trained, color=INK, linestyle=":", linewidth=1.2)
        axes.annotate(
            " trained up to here",
            (trained, 0.97),
            xycoords=("data", "axes fraction"),
            va="top",
            color=INK,
        )
    every = [bucket["last"] for bucket in next(iter(series.values()))[0]]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(every, [_short(end) for end in every])
    round_ticks(axes)
    axes.set(xlabel="position in the row (end of the bucket)", ylabel="perplexity of a token")
    axes.grid(alpha=0.15, color=INK)
    axes.legend(frameon=False, loc="best")
    return figure


def recall(series: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Right answers over the number of pairs, and over distance for the largest number.

    Args:
        series: for each label scores of :func:`~invivo.training.recall.measure_recall`, those of
            several runs behind each other.
    """
    figure, (left, right) = panels(2, (10, 3.9))
    for colour, marker, (label, scores) in zip(COLOURS, MARKERS, series.items(), strict=False):
        whole = [score for score in scores if score["distance"] is None]
        most = max(score["pairs"] for score in whole)
        near = [s for s in scores if s["pairs"] == most and s["distance"] is not None]
        parts = (
            (left, [(score["pairs"], score) for score in whole]),
            (right, [(score["distance"][0], score) for score in near]),
        )
        for axes, some in parts:
            places = sorted({place for place, _ in some})
            groups = [[score for at, score in some if at == place] for place in places]
            mean = [_share(group, "accuracy") for group in groups]
            low = [min(100 * s["low"] for s in group) for group in groups]
            high = [max(100 * s["high"] for s in group) for group in groups]
            axes.plot(places, mean, color=colour, marker=marker, linewidth=2, label=label)
            axes.fill_between(places, low, high, color=colour, alpha=0.2, linewidth=0)
            axes.set_xscale("log", base=2)
            axes.set_xticks(places, [str(place) for place in places])
        right.set_title(f"{most} pairs", fontsize=11)
    left.set(xlabel="pairs in the row", ylabel="right answers (%)", ylim=(-3, 103))
    right.set(xlabel="tokens between pair and question, from", ylim=(-3, 103))
    for axes in (left, right):
        axes.minorticks_off()
        axes.grid(alpha=0.15, color=INK)
    left.legend(frameon=False)
    return figure


def smoothed(values: Numbers) -> Numbers:
    """Means over a fortieth of the curve around each point."""
    reach = max(1, len(values) // 80)
    sums = np.concatenate(([0.0], np.cumsum(values)))
    middle = np.arange(len(values))
    first, last = np.maximum(0, middle - reach), np.minimum(len(values), middle + reach + 1)
    means: Numbers = (sums[last] - sums[first]) / (last - first)
    return means


def measure_of(run: RunRecord) -> str | None:
    """Which number of its evaluations a run is judged by; None: there are none."""
    last = run.last
    names = ("bits_per_byte", "accuracy")
    return next((name for name in names if last is not None and name in last), None)


def _measure(runs: Series) -> str:
    names = {measure_of(run) for some in runs.values() for run in some}
    return "right answers" if names == {"accuracy"} else "held-out bits per byte"


def _held_out(axes: Axes, runs: Sequence[RunRecord], colour: str, marker: str, label: str) -> None:
    """Mean of the runs over tokens, with their spread, or with one run's interval."""
    measured = [run for run in runs if measure_of(run) is not None]
    if not measured:
        return
    name = measure_of(measured[0])
    assert name is not None
    tables = [{line["step"]: line for line in run.evaluations if name in line} for run in measured]
    common = sorted(set.intersection(*(set(table) for table in tables)))
    if not common:
        return
    # Runs of recall rows differ a little in the tokens of a step.
    x, values = (
        np.array([[table[step][key] for step in common] for table in tables], float)
        for key in ("tokens", name)
    )
    mean = values.mean(axis=0)
    axes.plot(x.mean(axis=0), mean, color=colour, marker=marker, markersize=4, label=label)
    if len(measured) > 1:
        low, high = values.min(axis=0), values.max(axis=0)
    else:
        low, high = (
            np.array([_or(tables[0][step].get(side), tables[0][step][name]) for step in common])
            for side in ("low", "high")
        )
    axes.fill_between(x.mean(axis=0), low, high, color=colour, alpha=0.2, linewidth=0)


def _or(value: float | None, other: float) -> float:
    return other if value is None else value


def _bounds(buckets: Sequence[Mapping[str, Any]], side: str) -> Numbers:
    return np.array([_or(bucket[side], bucket["loss"]) for bucket in buckets])


def _share(scores: Sequence[Mapping[str, Any]], name: str) -> float:
    return 100 * float(np.mean([score[name] for score in scores]))


def _curve(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[Numbers, Numbers]:
    """A quantity over tokens, in at most ``POINTS`` points."""
    x = np.array([line["tokens"] for line in lines], float)
    y = np.array([line[name] for line in lines], float)
    width = math.ceil(len(x) / POINTS) or 1
    cuts = np.arange(0, len(x), width)
    if width == 1:
        return x, y
    counts = np.diff([*cuts, len(x)])
    return np.add.reduceat(x, cuts) / counts, np.add.reduceat(y, cuts) / counts


def _from_percentile(axes: Axes, runs: Series) -> None:
    """Leave out the first steep steps, which would flatten all the rest."""
    every = [line["loss"] for some in runs.values() for run in some for line in run.steps]
    if len(every) > 40:
        low, high = min(every), float(np.percentile(every, 99))
        margin = 0.06 * (high - low)
        axes.set_ylim(low - margin, high + margin)


def _counts(value: float, _: object = None) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def _short(end: int) -> str:
    return f"{end // 1024}k" if end >= 1024 and end % 1024 == 0 else str(end)


def round_ticks(axes: Axes) -> None:
    """Round numbers on an upright axis of logarithms, between whatever bounds it has."""
    axes.minorticks_off()
    ticks = _few(*axes.get_ylim())
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])


def _few(low: float, high: float) -> list[float]:
    """Up to about eight round numbers between two others, for an axis of logarithms."""
    for steps in ((1, 2, 5), (1, 1.5, 2, 3, 5, 7), tuple(np.arange(1, 10, 0.5)), None):
        if steps is None:
            break
        some = [s * 10.0**e for e in range(-3, 9) for s in steps]
        inside = [float(f"{value:.3g}") for value in some if low <= value <= high]
        if len(inside) >= 3:
            return inside
    return [float(f"{value:.3g}") for value in np.geomspace(low, high, 5)]
