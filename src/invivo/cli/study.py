"""``invivo study``: papers asked again of a model here or at a URL."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from invivo.cli import options
from invivo.cli.output import examples, fail, note, print_json, print_table, progress, stdout
from invivo.errors import InvalidRequest

if TYPE_CHECKING:
    from invivo.report.findings import Findings
    from invivo.studies.run_folder import RunFolder

app = typer.Typer(
    help="Studies: list, run, report, verify. A run that was interrupted goes on.",
    epilog=examples(
        "invivo study list",
        "invivo study run set-based-prompting --quick",
        "invivo study run set-based-prompting --set items=items.jsonl --set n_items=200",
        "invivo study run set-based-prompting --quick --url http://127.0.0.1:8000",
        "invivo study report runs/set-based-prompting/1a2b3c4d5e6f",
    ),
    no_args_is_help=True,
)
AsJson = Annotated[bool, typer.Option("--json", help="The findings as JSON.")]


@app.command("list", epilog=examples("invivo study list --json"))
def list_studies(as_json: AsJson = False) -> None:
    """Show all studies."""
    from dataclasses import asdict

    from invivo.studies.catalogue import STUDIES

    if as_json:
        fields = ("name", "title", "paper", "needs", "version")
        print_json(
            [
                {f: getattr(s, f) for f in fields}
                | {"quick": asdict(s.quick), "full": asdict(s.full)}
                for s in STUDIES
            ]
        )
        return
    for study in STUDIES:
        print_table(
            "",
            ["study", study.name],
            [["asks about", study.title], ["after", study.paper], ["needs", study.needs]]
            + [[f"--set {k}", _setting(v, getattr(study.quick, k))]
               for k, v in asdict(study.full).items()],
        )  # fmt: skip


def _setting(full: Any, quick: Any) -> str:
    """As ``--set`` takes it; what ``--quick`` has in its place."""
    shown, short = (",".join(v) if isinstance(v, tuple) else str(v) for v in (full, quick))
    return shown if shown == short else f"{shown} (quick: {short})"


@app.command("run", epilog=examples("invivo study run set-based-prompting --quick"))
def run(
    name: Annotated[str, typer.Argument(help="Name of the study.")],
    quick: Annotated[bool, typer.Option("--quick", help="Two minutes instead of hours.")] = False,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Change a setting; may be repeated."),
    ] = None,
    runs: options.Runs = Path("runs"),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure again what is measured already.")
    ] = False,
    as_json: AsJson = False,
    model: options.Model = None,
    url: options.Url = None,
    key: options.Key = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Run a study, or go on with it.

    Records, findings and report.html stand in RUNS/NAME/ID; the same command finds them again.
    """
    from invivo.cli.opening import opened
    from invivo.studies.catalogue import study_named
    from invivo.studies.running import run_study

    study = study_named(name)
    settings = changed(study.quick if quick else study.full, change)
    asked = {"--model": model, "--url": url, "--device": device, "--dtype": dtype}
    if runs != Path("runs"):
        asked["--runs"] = str(runs)
    with (
        opened(model, url=url, key=key, device=device, dtype=dtype) as lm,
        progress("units") as bar,
    ):
        task = bar.add_task(name, total=None)
        try:
            folder, findings = run_study(
                study,
                lm,
                settings,
                runs,
                command=_command(name, quick, change, asked),
                fresh=fresh,
                on_progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        except KeyboardInterrupt:
            note("interrupted: the same command goes on")
            raise
    _tell(folder, findings, as_json=as_json)


@app.command("report", epilog=examples("invivo study report runs/set-based-prompting/1a2b3c4d5e6f"))
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a run.")], as_json: AsJson = False
) -> None:
    """Make findings and report anew from a run's records; no model is needed."""
    from invivo.studies.catalogue import STUDIES
    from invivo.studies.run_folder import RunFolder
    from invivo.studies.running import report_again

    run_folder = RunFolder(folder)
    _tell(run_folder, report_again(run_folder, STUDIES), as_json=as_json)


@app.command("verify", epilog=examples("invivo study verify runs/set-based-prompting/1a2b3c4d5e6f"))
def verify(
    folder: Annotated[Path, typer.Argument(help="Folder of a run.")],
    units: Annotated[int, typer.Option("--units", min=1, help="How many to measure again.")] = 3,
    as_json: AsJson = False,
    model: options.Model = None,
    url: options.Url = None,
    key: options.Key = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Measure some units of a run again and compare their records."""
    from dataclasses import asdict

    from invivo.cli.opening import opened
    from invivo.studies import verifying
    from invivo.studies.catalogue import STUDIES
    from invivo.studies.run_folder import RunFolder
    from invivo.studies.running import finished

    run_folder = RunFolder(folder)
    finished(run_folder, STUDIES)  # before a model is loaded
    with opened(model, url=url, key=key, device=device, dtype=dtype) as lm:
        found = verifying.verify(run_folder, STUDIES, lm, n=units)
    if as_json:
        print_json(asdict(found))
    else:
        stdout().print(
            f"{len(found.units)} units, {found.numbers:,} numbers: {found.differing:,} differ, "
            f"by at most {found.largest:.1e}"
        )
    if found.broken:
        fail(f"other records in {', '.join(found.broken)}")
        raise typer.Exit(1)


def changed(settings: Any, given: list[str] | None) -> Any:
    """``settings`` with NAME=VALUE put in; lists are written with commas.

    Raises:
        InvalidRequest: no such setting, or no such value for it.
    """
    from dataclasses import asdict

    from invivo.training.typed_tables import read_table

    table = asdict(settings)
    for text in given or []:
        name, sign, value = text.partition("=")
        if not sign:
            raise InvalidRequest(
                "is not NAME=VALUE", field="--set", given=text, remedy="Write n_items=100"
            )
        if isinstance(table.get(name), list | tuple):
            table[name] = [_plain(part) for part in value.split(",") if part]
        else:
            table[name] = _plain(value)
    return read_table(type(settings), table, "--set ")


def _command(
    name: str, quick: bool, change: list[str] | None, asked: Mapping[str, str | None]
) -> list[str]:
    """What was asked for, to be asked again; without the key."""
    words = ["invivo", "study", "run", name, *(["--quick"] if quick else [])]
    words += [word for text in change or [] for word in ("--set", text)]
    words += [word for option, value in asked.items() if value for word in (option, value)]
    return [shlex.quote(word) for word in words]


def _plain(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _tell(folder: RunFolder, findings: Findings, *, as_json: bool) -> None:
    from invivo.report.run_page import said

    if as_json:
        print_json({"folder": str(folder.path), **findings.to_dict()})
        return
    out = stdout()
    out.print(findings.summary, markup=False, soft_wrap=True)
    marks = {"holds": "[green]✓[/green]", "fails": "[red]✗[/red]", "open": "?", None: "·"}
    from rich.markup import escape

    for one in findings.statements:
        out.print(f"{marks[one.verdict]} {escape(said(one))}", soft_wrap=True)
    note(f"report: {folder.report}")
