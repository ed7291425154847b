"""What came of the load: tables for people, one document for scripts."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from invivo.demo.workload import Done
from invivo.timing import percentile, summarize


def by_purpose(results: list[Done]) -> dict[str, list[Done]]:
    grouped: dict[str, list[Done]] = {}
    for done in results:
        grouped.setdefault(done.task.purpose, []).append(done)
    return grouped


def engine_figures(before: dict[str, Any], after: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Tokens by purpose, their rates over ``seconds`` and prefix hits, between two snapshots."""
    tokens = {
        name: after["totals"][name] - before["totals"][name]
        for name in ("prefill", "generated", "score")
    }
    hits = after["prefix"]["hits"] - before["prefix"]["hits"]
    queries = after["prefix"]["queries"] - before["prefix"]["queries"]
    return {
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": {name: count / seconds for name, count in tokens.items()},
        "prefix_hits": hits,
        "prefix_queries": queries,
        "preemptions": after["preemptions"] - before["preemptions"],
    }


def document(results: list[Done], engine: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """Everything measured, for ``--json``."""
    return {
        "model": model,
        "engine": engine,
        "purposes": {
            name: {
                **asdict(summarize([d.timing for d in done])),
                "whole_p50": whole(done, 50),
                "whole_p95": whole(done, 95),
                "errors": [d.error for d in done if d.error],
            }
            for name, done in by_purpose(results).items()
        },
    }


def whole(done: list[Done], percent: float) -> float | None:
    """Percentile of the time from sending to the end."""
    spans = [d.timing.ended - d.timing.started for d in done if d.timing.ended is not None]
    return percentile(spans, percent)


def latency_table(results: list[Done]) -> Table:
    # Narrow enough for a terminal of 80 columns.
    table = Table(
        title="Latency as the client saw it",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 0, 0, 1),
    )
    table.add_column("purpose", no_wrap=True)
    for name in ("n", "tokens", "TTFT p50", "p95", "TPOT p50", "p95", "whole p50"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, done in by_purpose(results).items():
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


def throughput_table(engine: dict[str, Any]) -> Table:
    table = Table(
        title=f"The engine over {engine['seconds']:.1f} s, everything in one batch",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for name, right in (("", False), ("tokens", True), ("a second", True)):
        table.add_column(name, justify="right" if right else "left")
    for name, label in (
        ("prefill", "prompts read"),
        ("generated", "answers written"),
        ("score", "texts scored or embedded"),
    ):
        rate = engine["tokens_per_second"][name]
        table.add_row(label, f"{engine['tokens'][name]:,}", f"{rate:,.1f}")
    hits, queries = engine["prefix_hits"], engine["prefix_queries"]
    share = f"{hits / queries:.0%} of prompts" if queries else "-"
    table.add_row("found in the prefix cache", f"{hits:,}", share)
    return table


def answers(results: list[Done]) -> RenderableType:
    """One answer of each purpose."""
    lines: list[RenderableType] = [Text("Some of the answers", style="italic")]
    for name, done in by_purpose(results).items():
        # The fourth question shows best what an adapter changes.
        first = done[3] if len(done) == 4 else done[0]
        text = " ".join(first.shown.split())
        lines.append(
            Text.assemble(
                (f"{name}: ", "bold"),
                (first.task.question + " ", "cyan"),
                text if len(text) <= 300 else text[:297] + "...",
            )
        )
    return Group(*lines)


def show(console: Console, results: list[Done], engine: dict[str, Any]) -> None:
    console.print()
    console.print(answers(results))
    console.print()
    console.print(latency_table(results))
    console.print()
    console.print(throughput_table(engine))
    for done in results:
        if done.error:
            console.print(Text(f"failed: {done.task.question}: {done.error}", style="red"))


def shown(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"
