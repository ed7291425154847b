"""What came of the demo: tables for people, one document for scripts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from invivo.demo.learning import NAME, QUESTIONS, Learning
from invivo.demo.phases import Phase
from invivo.demo.workload import Done
from invivo.timing import percentile, summarize

PURPOSES = {
    "generated": "answers written",
    "prefill": "prompts read",
    "score": "texts scored or embedded",
    "train": "texts learned",
}

EXPECTED_ALONE = 0.9  # share of streams within the objective on a machine that has time


@dataclass(slots=True)
class Findings:
    """Everything measured.

    Attributes:
        model: what is served, as ``LM.info`` has it.
        slo: ``tpot_ms`` and ``ttft_ms`` of the server.
        tokens: of each second by purpose, the live snapshot's history at the end.
        seconds: the whole demo, from its first line.
    """

    model: dict[str, Any]
    slo: dict[str, float]
    phases: list[Phase]
    learning: Learning
    tokens: dict[str, list[int]]
    seconds: float


@dataclass(slots=True)
class Kept:
    """Latencies of a phase's streams, seconds, and the share of them within the objective."""

    ttft: list[float]
    tpot: list[float]
    share: float | None


def kept(phase: Phase, slo: dict[str, float]) -> Kept:
    timings = [done.timing for done in phase.results if done.timing.ttft is not None]
    within = [
        (t.ttft or 0) * 1e3 <= slo["ttft_ms"] and (t.tpot or 0) * 1e3 <= slo["tpot_ms"]
        for t in timings
    ]
    return Kept(
        [t.ttft for t in timings if t.ttft is not None],
        [t.tpot for t in timings if t.tpot is not None],
        sum(within) / len(within) if within else None,
    )


def doubt(findings: Findings) -> str | None:
    """What a reader must know of a machine that does not keep the promise without fine-tuning."""
    alone = kept(findings.phases[0], findings.slo).share
    if alone is None or alone >= EXPECTED_ALONE:
        return None
    return (
        f"Serving alone kept {alone:.0%} of the streams within the objective: the machine is busy "
        "with other work or slow. Training had hardly any time beside the requests, and the "
        "latencies tell of the machine more than of fine-tuning."
    )


def failed(findings: Findings) -> list[Done]:
    return [done for phase in findings.phases for done in phase.results if done.error]


def by_purpose(results: list[Done]) -> dict[str, list[Done]]:
    grouped: dict[str, list[Done]] = {}
    for done in results:
        grouped.setdefault(done.task.purpose, []).append(done)
    return grouped


def document(findings: Findings) -> dict[str, Any]:
    """Everything measured, for ``--json``."""
    learning = findings.learning
    job = learning.job
    return {
        "model": findings.model,
        "objective": findings.slo,
        "seconds": findings.seconds,
        "phases": {
            phase.name: {
                "seconds": phase.seconds,
                "tokens_per_second": {name: phase.rate(name) for name in PURPOSES},
                "prefix_hits": phase.after["prefix"]["hits"] - phase.before["prefix"]["hits"],
                "preemptions": phase.after["preemptions"] - phase.before["preemptions"],
                "within_objective": kept(phase, findings.slo).share,
                "latency": {
                    name: {f"p{p}": percentile(values, p) for p in (50, 95, 99)}
                    for name, values in (
                        ("ttft", kept(phase, findings.slo).ttft),
                        ("tpot", kept(phase, findings.slo).tpot),
                    )
                },
                "purposes": {
                    name: {
                        **asdict(summarize([d.timing for d in done])),
                        "whole_p50": whole(done, 50),
                        "whole_p95": whole(done, 95),
                        "errors": [d.error for d in done if d.error],
                    }
                    for name, done in by_purpose(phase.results).items()
                },
            }
            for phase in findings.phases
        },
        "learning": {
            "job": None if job is None else asdict(job),
            "seconds": learning.seconds,
            "held_out": [{"step": step, "loss": loss} for step, loss in learning.held_out],
            "answers": [
                {"question": question, "before": before, "after": after}
                for question, before, after in zip(
                    QUESTIONS, learning.before, learning.after, strict=True
                )
            ],
        },
    }


def whole(done: list[Done], percent: float) -> float | None:
    """Percentile of the time from sending to the end."""
    spans = [d.timing.ended - d.timing.started for d in done if d.timing.ended is not None]
    return percentile(spans, percent)


# Tables are narrow enough for a terminal of 80 columns.
def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1)
    )
    table.add_column(first, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def latency_table(findings: Findings) -> Table:
    slo = findings.slo
    table = _table(
        f"Streams as their clients saw them (objective: first token {slo['ttft_ms'] / 1e3:g} s, "
        f"then {slo['tpot_ms']:g} ms a token)",
        "phase",
        *("n", "TTFT p50", "p95", "p99", "TPOT p50", "p95", "p99", "kept"),
    )
    for phase in findings.phases:
        seen = kept(phase, slo)
        cells = [shown(percentile(seen.ttft, p)) for p in (50, 95, 99)]
        cells += [shown(percentile(seen.tpot, p)) for p in (50, 95, 99)]
        share = "-" if seen.share is None else f"{seen.share:.0%}"
        table.add_row(phase.name, str(len(seen.ttft)), *cells, share)
    return table


def purpose_table(phase: Phase) -> Table:
    table = _table(
        f"Requests {phase.name}, by purpose",
        "purpose",
        *("n", "tokens", "TTFT p50", "p95", "TPOT p50", "p95", "whole p50"),
    )
    for name, done in by_purpose(phase.results).items():
        row = summarize([d.timing for d in done])
        table.add_row(
            name,
            str(row.requests),
            str(row.output_tokens) if row.output_tokens else "-",
            shown(row.ttft_p50),
            shown(row.ttft_p95),
            shown(row.tpot_p50),
            shown(row.tpot_p95),
            shown(whole(done, 50)),
        )
    return table


def throughput_table(phases: list[Phase]) -> Table:
    table = _table("Tokens a second, all in one batch", "", *(phase.name for phase in phases))
    for total, label in PURPOSES.items():
        table.add_row(label, *(f"{phase.rate(total):,.1f}" for phase in phases))
    table.add_row("seconds", *(f"{phase.seconds:.0f}" for phase in phases))
    return table


def learning_table(findings: Findings) -> Table:
    learning, tuned = findings.learning, findings.phases[-1]
    job = learning.job
    assert job is not None
    steps = dict(learning.held_out)
    table = _table("What was learned", "", *(f"step {step}" for step in steps))
    table.add_row("loss on what is held out", *(f"{loss:.3f}" for loss in steps.values()))
    losses = job.losses
    cells = [_mean_around(losses, step) for step in steps]
    table.add_row("loss on what is learned, 8 steps", *cells)
    table.caption = (
        f"{job.trained_tokens:,} tokens in {learning.seconds:.0f} s; beside the requests, in the "
        f"first {min(tuned.seconds, learning.seconds):.0f} s, {tuned.rate('train'):.1f} a second"
    )
    table.caption_justify = "left"
    return table


def _mean_around(losses: list[float | None], step: int) -> str:
    """Mean of the first 8 losses at step 0, else of the last 8 up to ``step``."""
    some = losses[:8] if step == 0 else losses[max(0, step - 8) : step]
    numbers = [loss for loss in some if loss is not None]
    return f"{sum(numbers) / len(numbers):.3f}" if numbers else "-"


def answers(learning: Learning) -> RenderableType:
    lines: list[RenderableType] = [Text("The same questions, before and after", style="italic")]
    for question, before, after in zip(QUESTIONS, learning.before, learning.after, strict=True):
        lines.append(Text(question, style="bold cyan"))
        for who, text in (("before", before), (NAME, after)):
            flat = " ".join(text.split())
            flat = flat if len(flat) <= 220 else flat[:217] + "..."
            lines.append(Text.assemble((f"  {who:<7}", "bold"), flat))
    return Group(*lines)


def show(console: Console, findings: Findings) -> None:
    parts: list[RenderableType] = [
        answers(findings.learning),
        learning_table(findings),
        latency_table(findings),
        throughput_table(findings.phases),
        purpose_table(findings.phases[-1]),
    ]
    for part in parts:
        console.print()
        console.print(part)
    if told := doubt(findings):
        console.print(Text(told, style="yellow"))
    for done in failed(findings):
        console.print(Text(f"failed: {done.task.question}: {done.error}", style="red"))


def shown(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"
