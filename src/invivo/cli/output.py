"""What the commands share in speaking: answers on standard output, all else on standard error."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

NOBODY_LOOKS = 1000  # columns of what is no terminal
_HELP_COLUMNS = 78  # of a terminal of 80


def examples(*lines: str) -> str:
    """A help epilogue of one example a line; ``[`` would begin rich's markup.

    A remark stands two spaces or more behind its command, and above it where both are too long
    for one line.
    """
    shown: list[str] = []
    for line in lines:
        parts = re.split(" {2,}", line, maxsplit=1)
        if len(line) > _HELP_COLUMNS and len(parts) == 2:
            shown += [f"# {parts[1]}", parts[0]]
        else:
            shown.append(line)
    return "[bold]Examples[/bold]\n" + "\n".join(line.replace("[", "\\[") for line in shown)


def stdout() -> Console:
    from rich.console import Console

    return Console(file=sys.stdout, highlight=False)


def stderr() -> Console:
    from rich.console import Console

    return Console(file=sys.stderr, highlight=False)


def open_closed_streams() -> None:
    """Where the caller closed standard output or error (``>&-``), what is written goes nowhere."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open as long as the process)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def drop_unwritten() -> None:
    """Send what standard output still holds nowhere: the interpreter would fail on it at exit."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    except (OSError, ValueError):  # no file behind it, as in tests
        return


def fail(message: str) -> None:
    """One clear line."""
    from rich.text import Text

    stderr().print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)


def note(message: str) -> None:
    """A quiet remark beside the answer."""
    from rich.text import Text

    stderr().print(Text(message, style="dim"), soft_wrap=True)


def print_json(value: object) -> None:
    """For scripts: one JSON document on standard output."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table; columns whose names end in ``>`` are aligned to the right.

    Nothing is cut off: what does not fit a terminal goes on in the next line, and never that of the
    first column, which holds names. Where nobody looks (a pipe, a file) a row is one line.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", header_style="bold", box=SIMPLE_HEAD)
    for i, column in enumerate(columns):
        right = column.endswith(">")
        table.add_column(
            column.removesuffix(">"),
            justify="right" if right else "left",
            overflow="fold",
            no_wrap=i == 0,
        )
    for row in rows:
        table.add_row(*[Text(cell) for cell in row])
    console = stdout()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = NOBODY_LOOKS
    console.print(table)


def progress(unit: str) -> Progress:
    """A bar with counts and remaining time on standard error; silent where that is no terminal."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = stderr()
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def milliseconds(seconds: float | None) -> str:
    """``12.3 ms``, ``1.24 s`` or a dash."""
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def byte_size(count: float) -> str:
    """``92.9 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
