"""The report as one HTML file that needs nothing else: text, tables, figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from rich.table import Table
from rich.text import Text

from invivo.demo.figures import figures
from invivo.demo.learning import HYPERPARAMETERS, NAME, QUESTIONS
from invivo.demo.report import (
    Findings,
    kept,
    latency_table,
    learning_table,
    purpose_table,
    throughput_table,
)


def write_report(findings: Findings, path: Path) -> Path:
    """Write the page.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(findings), encoding="utf-8")
    return path


def page(findings: Findings) -> str:
    drawn = figures(findings)
    style = (files("invivo.demo") / "report.css").read_text(encoding="utf-8")
    learning, slo = findings.learning, findings.slo
    model = findings.model
    alone, tuned = findings.phases
    settings = ", ".join(
        f"{name.replace('_', ' ')} {' '.join(value) if isinstance(value, list) else value}"
        for name, value in HYPERPARAMETERS.items()
    )
    first, last = learning.held_out[0][1], learning.held_out[-1][1]
    share = kept(tuned, slo).share
    facts = (
        (f"{first:.2f} → {last:.2f}", "loss on dialogues that were held out"),
        (f"{tuned.rate('train'):.0f} tokens/s", "learned beside the requests"),
        ("–" if share is None else f"{share:.0%}", "of the streams kept the objective meanwhile"),
        (f"{tuned.rate('generated'):.0f} tokens/s", "written meanwhile"),
    )
    intro = (
        f"{model['name']} ({model['n_parameters'] / 1e6:.0f}M parameters, {model['dtype']}, "
        f"{model['device']}) answered a mixed load of requests while it learned to talk as people "
        f"do in Romeo and Juliet: one process, one copy of the weights, one batch."
    )
    objective = (
        f"Objective of the server: first token within {slo['ttft_ms'] / 1e3:g} s, later ones "
        f"every {slo['tpot_ms']:g} ms. Training takes what that leaves over."
    )
    parts = [
        f"<h1>Serving and learning at once</h1><p>{escape(intro)}</p>",
        '<div class="facts">'
        + "".join(f"<div><b>{escape(a)}</b>{escape(b)}</div>" for a, b in facts)
        + "</div>",
        _section("Before and after", _answers(learning.before, learning.after)),
        _section(
            "Learning",
            drawn["loss"],
            _html(learning_table(findings)),
            f'<p class="muted">LoRA, {escape(settings)}. Held-out loss is what the same server '
            "says when it scores the answers.</p>",
        ),
        _section("What the engine did", drawn["tokens"], _html(throughput_table([alone, tuned]))),
        _section(
            "What the clients saw",
            f'<p class="muted">{escape(objective)}</p>',
            drawn["latency"],
            *(
                _html(t)
                for t in (latency_table(findings), purpose_table(alone), purpose_table(tuned))
            ),
        ),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>invivo: serving and learning at once</title><style>{style}</style></head>\n"
        f"<body>\n{chr(10).join(parts)}\n</body></html>\n"
    )


def _section(title: str, *parts: str) -> str:
    inside = "\n".join(f'<div class="wide">{part}</div>' for part in parts)
    return f"<section><h2>{escape(title)}</h2>\n{inside}\n</section>"


def _answers(before: Sequence[str], after: Sequence[str]) -> str:
    rows = "".join(
        f'<tr><td>{escape(question)}</td><td data-who="before">{escape(one.strip())}</td>'
        f'<td data-who="{NAME}">{escape(other.strip())}</td></tr>'
        for question, one, other in zip(QUESTIONS, before, after, strict=True)
    )
    head = f"<thead><tr><th>asked</th><th>before</th><th>after, as {NAME}</th></tr></thead>"
    return f'<table class="answers">{head}<tbody>{rows}</tbody></table>'


def _html(table: Table) -> str:
    """A table that is printed to the terminal too."""
    head = _row("th", (column.header for column in table.columns))
    cells = zip(*(list(column.cells) for column in table.columns), strict=True)
    body = "".join(_row("td", row) for row in cells)
    below = f'<p class="muted">{escape(str(table.caption))}</p>' if table.caption else ""
    title = escape(str(table.title))
    return (
        f"<table><caption>{title}</caption><thead>{head}</thead><tbody>{body}</tbody></table>"
        + below
    )


def _row(tag: str, cells: Iterable[object]) -> str:
    texts = (cell.plain if isinstance(cell, Text) else str(cell) for cell in cells)
    return "<tr>" + "".join(f"<{tag}>{escape(text)}</{tag}>" for text in texts) + "</tr>"
