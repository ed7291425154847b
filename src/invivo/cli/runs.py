"""``invivo runs``: training runs that are there, and reports of them."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from invivo.cli.options import Runs
from invivo.cli.output import examples, note, print_json, print_table
from invivo.errors import InvalidRequest, InvivoError

app = typer.Typer(
    help="Training runs: list, report.",
    epilog=examples(
        "invivo runs list",
        "invivo runs report runs/gla-30m                     its report.html, up to date",
        "invivo runs report runs/gla-* runs/llama-* --out comparison.html",
    ),
    no_args_is_help=True,
)
AsJson = Annotated[bool, typer.Option("--json", help="The result as JSON.")]


@app.command("list", epilog=examples("invivo runs list", "invivo runs list --runs /data/runs"))
def list_all(
    runs: Runs = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Show the runs of a folder, the newest first."""
    from invivo.training.run_record import read_run

    records = []
    for path in sorted(runs.glob("*/manifest.json")):
        try:
            records.append(read_run(path.parent))
        except InvivoError as error:
            note(f"left out: {error}")
    records.sort(key=lambda record: -record.manifest["created"])
    rows = [_row(record) for record in records]
    if as_json:
        print_json(rows)
        return
    if not rows:
        note(f"{runs} holds no runs; begin one with: invivo train CONFIG")
        return
    print_table(
        "",
        ["name", "status", "step>", "of>", "loss>", "held out>", "folder"],
        [["-" if value is None else str(value) for value in row.values()] for row in rows],
    )


def _row(record: Any) -> dict[str, Any]:
    from invivo.training.figures import measure_of

    measure, last = measure_of(record), record.steps[-1] if record.steps else None
    return {
        "name": record.name,
        "status": record.manifest["status"],
        "step": last["step"] if last else 0,
        "steps": record.manifest["steps"],
        "loss": round(last["loss"], 4) if last else None,
        "held_out": round(record.last[measure], 4) if measure else None,
        "folder": str(record.folder),
    }


@app.command(
    epilog=examples(
        "invivo runs report runs/gla-30m",
        "invivo runs report runs/gla-30m --watch 30          live, until the run ends",
        "invivo runs report runs/* --out comparison.html",
    )
)
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="The page of several runs.", dir_okay=False)
    ] = None,
    watch: Annotated[
        int | None,
        typer.Option(
            "--watch",
            min=1,
            metavar="SECONDS",
            help="Write it again while the run goes on; an open page follows.",
        ),
    ] = None,
) -> None:
    """Write a page about a run, or one that sets several side by side.

    Of one run it is report.html in its folder. Runs that differ in name and seed alone are one
    series, shown by its mean with an interval.
    """
    from invivo.training.report import write_comparison, write_report

    if len(folders) == 1 and out is None:
        if watch is not None:
            sys.stdout.write(f"{folders[0] / 'report.html'}\n")
            sys.stdout.flush()
            _follow(folders[0], watch)
            return
        target = write_report(folders[0])
    elif watch is not None:
        raise InvalidRequest("goes with one run and no --out", field="--watch", given=watch)
    elif out is None:
        raise InvalidRequest(
            "says where the page of several runs goes", field="--out", remedy="--out runs.html"
        )
    else:
        target = write_comparison(folders, out)
    sys.stdout.write(f"{target}\n")


def _follow(folder: Path, seconds: int) -> None:
    from invivo.training.report import write_report
    from invivo.training.run_record import read_run

    while read_run(folder).manifest["status"] == "running":
        write_report(folder, refresh=seconds)
        time.sleep(seconds)
    write_report(folder)
