"""report.html of a training run, and a comparison of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from invivo import html_page
from invivo.errors import InvalidRequest
from invivo.training import figures
from invivo.training.figures import measure_of
from invivo.training.run_record import Line, RunRecord, read_run
from invivo.training.seeds import Estimate, difference, mean_over
from invivo.whole_file import write_whole

_TEXTS = 12  # samples shown


def write_report(folder: Path, *, refresh: int | None = None) -> Path:
    """Write ``folder/report.html``; the same run gives the same page.

    Args:
        refresh: seconds after which a browser reads it again; None: never.

    Raises:
        NotFound: there is no run.
        MissingDependency: matplotlib is not installed.
    """
    target = folder / "report.html"
    write_whole(target, run_page(read_run(folder), refresh=refresh))
    return target


def write_comparison(folders: Sequence[Path], target: Path) -> Path:
    """Write a page that sets runs side by side.

    Raises:
        NotFound: one of the folders has no run.
        InvalidRequest: the runs are judged by different numbers.
        MissingDependency: matplotlib is not installed.
    """
    runs = [read_run(folder) for folder in folders]
    judged = {measure: run.name for run in runs if (measure := measure_of(run)) is not None}
    if len(judged) > 1:
        raise InvalidRequest(
            "runs on text and runs on recall rows have no number in common",
            field="run",
            given=sorted(judged.values()),
            remedy="Write a page for each kind",
        )
    page = comparison_page(runs)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, page)
    return target


def run_page(run: RunRecord, *, refresh: int | None = None) -> str:
    """HTML of one run."""
    manifest, config = run.manifest, run.manifest["config"]
    parts = [html_page.heading(run.name, _sentence(run)), html_page.facts(_facts(run))]
    one = {run.name: [run]}
    if run.steps:
        parts.append(
            html_page.section(
                "Learning",
                html_page.drawn(partial(figures.learning, one), "learning"),
                _evaluations(run),
            )
        )
    last = run.last or {}
    if "scores" in last:
        drawn = html_page.drawn(partial(figures.recall, {run.name: last["scores"]}), "recall")
        parts.append(html_page.section("Recall", drawn, recall_note()))
    if run.positions:
        series = {run.name: [run.positions[-1]["buckets"]]}
        draw = partial(figures.by_position, series, config["data"]["length"])
        parts.append(
            html_page.section("Longer texts", html_page.drawn(draw, "positions"), position_note())
        )
    if run.samples:
        parts.append(html_page.section("What it writes", _samples(run.samples)))
    if run.steps:
        drawn = html_page.drawn(partial(figures.course, one), "course")
        parts.append(html_page.section("Course", drawn))
    parts.append(html_page.section("Settings", html_page.listing(flat(config))))
    facts = {k: v for k, v in manifest.items() if k not in ("config", "name")}
    parts.append(html_page.section("Run", html_page.listing(flat(facts)), _events(run.events)))
    return html_page.page(f"invivo: {run.name}", parts, refresh=refresh)


def comparison_page(runs: Sequence[RunRecord]) -> str:
    """HTML of several runs; those that differ in name and seed alone make a series."""
    series = in_series(runs)
    intro = (
        f"{len(runs)} runs in {len(series)} series. Runs of a series differ in their seed alone; "
        "intervals (95 %) are Student's over its runs, differences Welch's."
    )
    parts = [
        html_page.heading("Training runs side by side", intro),
        html_page.section(
            "Learning",
            html_page.drawn(partial(figures.learning, series), "learning"),
            _series_table(series),
            _differences(series),
        ),
    ]
    long = {
        label: [run.positions[-1]["buckets"] for run in some if run.positions]
        for label, some in series.items()
    }
    long = {label: some for label, some in long.items() if some}
    if long:
        trained = {run.manifest["config"]["data"]["length"] for run in runs}
        draw = partial(figures.by_position, long, trained.pop() if len(trained) == 1 else None)
        drawn = html_page.drawn(draw, "positions")
        parts.append(html_page.section("Longer texts", drawn, position_note()))
    asked = {
        label: [score for run in some for score in (run.last or {}).get("scores", ())]
        for label, some in series.items()
    }
    asked = {label: some for label, some in asked.items() if some}
    if asked:
        drawn = html_page.drawn(partial(figures.recall, asked), "recall")
        parts.append(html_page.section("Recall", drawn, recall_note()))
    course = html_page.drawn(partial(figures.course, series), "course")
    parts.append(html_page.section("Course", course))
    parts.append(html_page.section("Settings", _contrast(series)))
    return html_page.page("invivo: training runs side by side", parts)


def in_series(runs: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Runs by what they have in common, under a name made of theirs."""
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        groups.setdefault(run.series, []).append(run)
    named: dict[str, list[RunRecord]] = {}
    for some in groups.values():
        label = some[0].name if len(some) == 1 else _common([run.name for run in some])
        while label in named:
            label += "'"
        named[label] = some
    return named


def _common(names: Sequence[str]) -> str:
    """What names of one series begin with, without what leads to the seed."""
    same = [letters[0] for letters in zip(*names, strict=False) if len(set(letters)) == 1]
    begin = names[0][: len(same)] if names[0].startswith("".join(same)) else ""
    return begin.removesuffix("seed").rstrip("-_. ") or names[0]


def position_note() -> str:
    """What the figure by position shows."""
    return html_page.paragraph(
        "Held-out text in rows longer than those of training: how well a token is predicted by how "
        "much text stands before it. Shaded: the spread over runs, or one run's 95 % interval.",
        muted=True,
    )


def recall_note() -> str:
    """What the figure of recall shows."""
    return html_page.paragraph(
        "A row lists keys with their values and then asks for each key's value, at places drawn "
        "evenly. Shaded: 95 % intervals (Wilson), the widest of several runs.",
        muted=True,
    )


def _sentence(run: RunRecord) -> str:
    manifest, config = run.manifest, run.manifest["config"]
    model = config["model"].get("model_type", "a model")
    kind = "recall rows" if config["data"]["kind"] == "recall" else "text"
    states = {"running": "is being trained", "done": "was trained"}
    state = states.get(manifest["status"], f"was trained, so far ({manifest['status']})")
    return (
        f"{model}, {count(manifest['parameters'])} parameters, {state} on {kind} in rows of "
        f"{config['data']['length']:,} tokens: step {run.steps[-1]['step'] if run.steps else 0:,} "
        f"of {manifest['steps']:,}, seed {config['seed']}, on {manifest['device']}."
    )


def _facts(run: RunRecord) -> list[tuple[str, str]]:
    found = []
    last, name = run.last, measure_of(run)
    if last is not None and name == "bits_per_byte":
        found.append((_with_interval(last), f"bits per byte of held-out text, {last['rows']} rows"))
    elif last is not None and name == "accuracy":
        found.append((f"{last['accuracy']:.1%}", "right answers"))
    if run.steps:
        step = run.steps[-1]
        losses = figures.smoothed(np.array([line["loss"] for line in run.steps], float))
        found.append((f"{losses[-1]:.3f}", "training loss (nats a token), smoothed"))
        found.append((count(step["tokens"]), "tokens learned from"))
        found.append(
            (duration(step["seconds"]), f"of training, {count(_speed(run))} tokens a second")
        )
    return found


def _speed(run: RunRecord) -> float:
    """Tokens a second over the whole training."""
    return float(run.steps[-1]["tokens"] / max(run.steps[-1]["seconds"], 1e-9))


def _with_interval(line: Mapping[str, Any]) -> str:
    value = f"{line['bits_per_byte']:.4f}"
    if line.get("low") is None:
        return value
    return f"{value} ± {(line['high'] - line['low']) / 2:.3f}"


def _evaluations(run: RunRecord) -> str:
    name = measure_of(run)
    if name is None:
        return html_page.paragraph("Nothing has been measured on held-out data yet.", muted=True)
    if name == "accuracy":
        rows = [[f"{line['step']:,}", f"{line['accuracy']:.2%}"] for line in run.evaluations]
        return html_page.table("Recall", ["step", "right answers"], rows)
    rows = [
        [
            f"{line['step']:,}",
            f"{line['tokens']:,}",
            _with_interval(line),
            f"{line['loss']:.4f}",
            f"{line['rows']:,} x {line['length']:,}",
        ]
        for line in _some(run.evaluations)
    ]
    columns = ["step", "tokens", "bits per byte", "loss (nats a token)", "rows read"]
    note = "Intervals (95 %) from the spread over rows; rows of one book resemble each other."
    return html_page.table("Held-out text", columns, rows, note=note)


def _some(lines: Sequence[Line], most: int = 14) -> list[Line]:
    """All, or evenly chosen ones with the first and the last."""
    if len(lines) <= most:
        return list(lines)
    return [lines[i * (len(lines) - 1) // (most - 1)] for i in range(most)]


def _samples(samples: Sequence[Line]) -> str:
    rows = [[f"step {line['step']:,}", line["prompt"], line["text"]] for line in _chosen(samples)]
    return html_page.texts(["", "given", "continued"], rows)


def _chosen(samples: Sequence[Line]) -> list[Line]:
    """For each prompt as many steps as fit, the first and the last among them."""
    prompts = list(dict.fromkeys(line["prompt"] for line in samples))[:_TEXTS]
    each = max(2, _TEXTS // len(prompts))
    found = []
    for prompt in prompts:
        found += _some([line for line in samples if line["prompt"] == prompt], each)
    return found


def _events(events: Sequence[Line]) -> str:
    told = [line for line in events if line["event"] != "checkpoint"]
    if not told:
        return ""
    rows = [[line["event"], f"{line['step']:,}", ", ".join(_rest(line))] for line in told]
    return html_page.table("Events", ["", "step", ""], rows)


def _rest(line: Line) -> list[str]:
    known = ("kind", "event", "step", "tokens")
    return [f"{key}: {value}" for key, value in line.items() if key not in known]


def _series_table(series: figures.Series) -> str:
    rows = []
    for label, some in series.items():
        manifest = some[0].manifest
        speeds = [
            run.steps[-1]["tokens"] / max(run.steps[-1]["seconds"], 1e-9)
            for run in some
            if run.steps
        ]
        rows.append(
            [
                label,
                str(len(some)),
                count(manifest["parameters"]),
                count(min((run.steps[-1]["tokens"] for run in some if run.steps), default=0)),
                str(_final(some) or "–"),
                count(sum(speeds) / len(speeds)) if speeds else "–",
            ]
        )
    columns = ["series", "runs", "parameters", "tokens", _title(series), "tokens/s"]
    return html_page.table("", columns, rows)


def _title(series: figures.Series) -> str:
    names = {measure_of(run) for some in series.values() for run in some}
    return "right answers" if names == {"accuracy"} else "held-out bits per byte"


def _values(runs: Sequence[RunRecord]) -> list[float]:
    found = []
    for run in runs:
        name = measure_of(run)
        if run.last is not None and name is not None:
            found.append(float(run.last[name]))
    return found


def _final(runs: Sequence[RunRecord]) -> Estimate | None:
    values = _values(runs)
    return mean_over(values) if values else None


def _differences(series: figures.Series) -> str:
    (first, base), *others = series.items()
    rows = []
    for label, some in others:
        if _values(base) and _values(some):
            rows.append([f"{label} less {first}", str(difference(_values(some), _values(base)))])
    if not rows:
        return ""
    return html_page.table("Differences", ["", _title(series)], rows)


def _contrast(series: figures.Series) -> str:
    """The settings in which the series differ."""
    tables = {label: flat(some[0].manifest["config"]) for label, some in series.items()}
    names = dict.fromkeys(name for table in tables.values() for name in table)
    rows = []
    for name in names:
        values = [table.get(name, "–") for table in tables.values()]
        if name not in ("name", "seed") and len(set(values)) > 1:
            rows.append([name, *values])
    if not rows:
        return html_page.paragraph("The series do not differ in their settings.", muted=True)
    return html_page.table("Where the series differ", ["", *tables], rows)


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested tables as dotted names; what is not set is left out."""
    found: dict[str, str] = {}
    for name, value in table.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        elif value is not None and value != []:
            if isinstance(value, list) and isinstance(value[0], Mapping):
                for i, item in enumerate(value):
                    found |= flat(item, f"{prefix}{name}[{i}].")
                continue
            shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            found[prefix + name] = shown
    return found


def count(value: float) -> str:
    """A number of things, short."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
