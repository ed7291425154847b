"""The report as one HTML file that needs nothing else: text, tables, figures."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from rich.table import Table
from rich.text import Text

from invivo.demo.figures import figures
from invivo.demo.learning import HYPERPARAMETERS, NAME, QUESTIONS
from invivo.demo.report import (
    Findings,
    doubt,
    kept,
    latency_table,
    learning_table,
    purpose_table,
    throughput_table,
)
from invivo.html_page import facts, heading, paragraph, section, table
from invivo.html_page import page as html_page


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
    learning, slo = findings.learning, findings.slo
    model = findings.model
    alone, tuned = findings.phases
    settings = ", ".join(
        f"{name.replace('_', ' ')} {' '.join(value) if isinstance(value, list) else value}"
        for name, value in HYPERPARAMETERS.items()
    )
    first, last = learning.held_out[0][1], learning.held_out[-1][1]
    share = kept(tuned, slo).share
    numbers = (
        (f"{first:.2f} → {last:.2f}", "loss on dialogues that were held out"),
        (f"{_rate(tuned.rate('train'))} tokens/s", "learned beside the requests"),
        ("–" if share is None else f"{share:.0%}", "of the streams kept the objective meanwhile"),
        (f"{_rate(tuned.rate('generated'))} tokens/s", "written meanwhile"),
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
    told = doubt(findings)
    parts = [
        heading("Serving and learning at once", intro),
        facts(numbers),
        *([] if told is None else [paragraph(told)]),
        section("Before and after", _answers(learning.before, learning.after)),
        section(
            "Learning",
            drawn["loss"],
            _html(learning_table(findings)),
            paragraph(
                f"LoRA, {settings}. Held-out loss is what the same server says when it scores "
                "the answers.",
                muted=True,
            ),
        ),
        section("What the engine did", drawn["tokens"], _html(throughput_table([alone, tuned]))),
        section(
            "What the clients saw",
            paragraph(objective, muted=True),
            drawn["latency"],
            *(
                _html(t)
                for t in (latency_table(findings), purpose_table(alone), purpose_table(tuned))
            ),
        ),
    ]
    return html_page("invivo: serving and learning at once", parts)


def _rate(number: float) -> str:
    return f"{number:.1f}" if number < 10 else f"{number:.0f}"


def _answers(before: Sequence[str], after: Sequence[str]) -> str:
    rows = "".join(
        f'<tr><td>{escape(question)}</td><td data-who="before">{escape(one.strip())}</td>'
        f'<td data-who="{NAME}">{escape(other.strip())}</td></tr>'
        for question, one, other in zip(QUESTIONS, before, after, strict=True)
    )
    head = f"<thead><tr><th>asked</th><th>before</th><th>after, as {NAME}</th></tr></thead>"
    return f'<table class="answers">{head}<tbody>{rows}</tbody></table>'


def _html(shown: Table) -> str:
    """A table that is printed to the terminal too."""
    cells = zip(*(list(column.cells) for column in shown.columns), strict=True)
    return table(
        str(shown.title),
        [str(column.header) for column in shown.columns],
        [[_text(cell) for cell in row] for row in cells],
        note=str(shown.caption or ""),
    )


def _text(cell: object) -> str:
    return cell.plain if isinstance(cell, Text) else str(cell)
