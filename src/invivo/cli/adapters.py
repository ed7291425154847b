"""``invivo adapters``: the adapters of a running server."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from invivo.cli import options
from invivo.cli.opening import opened
from invivo.cli.output import examples, note, print_json, print_table
from invivo.errors import InvalidRequest

app = typer.Typer(
    help="Adapters of a server: list, load, save, unload.",
    epilog=examples(
        "invivo adapters list --url http://127.0.0.1:8000",
        "invivo adapters save poet ./poet --url http://127.0.0.1:8000",
        "invivo adapters load poet ./poet --url http://127.0.0.1:8000",
    ),
    no_args_is_help=True,
)
Name = Annotated[str, typer.Argument(help="What it is, or is to be, asked for by.")]


@app.command("list", epilog=examples("invivo adapters list --json"))
def list_adapters(
    url: options.Url = None,
    key: options.Key = None,
    as_json: Annotated[bool, typer.Option("--json", help="The result as JSON.")] = False,
) -> None:
    """Show the loaded adapters."""
    with opened(None, url=of_server(url), key=key) as lm:
        found = lm.adapters()
    if as_json:
        print_json([asdict(one) for one in found])
        return
    if not found:
        note("No adapters yet: invivo adapters load NAME FOLDER, or invivo finetune DATA")
        return
    print_table(
        "",
        ["name", "version>", "rank>", "parameters>", "running>"],
        [
            [one.name, str(one.version), str(one.rank), f"{one.n_parameters:,}", str(one.running)]
            for one in found
        ],
    )


@app.command(epilog=examples("invivo adapters load poet ./poet"))
def load(
    name: Name,
    folder: Annotated[Path, typer.Argument(help="As the peft library's save_pretrained wrote it.")],
    url: options.Url = None,
    key: options.Key = None,
) -> None:
    """Send an adapter to the server; one of this name gets a new version."""
    with opened(None, url=of_server(url), key=key) as lm:
        info = lm.load_adapter(name, folder)
    note(f"{info.name} is loaded, version {info.version}")


@app.command(epilog=examples("invivo adapters save poet:ckpt-step-20 ./poet"))
def save(
    name: Annotated[str, typer.Argument(help="Of an adapter or a checkpoint, NAME:ckpt-step-N.")],
    folder: Annotated[Path, typer.Argument(help="Made if missing; its two files are replaced.")],
    url: options.Url = None,
    key: options.Key = None,
) -> None:
    """Fetch an adapter's files, in the peft library's format."""
    with opened(None, url=of_server(url), key=key) as lm:
        sys.stdout.write(f"{lm.save_adapter(name, folder)}\n")


@app.command(epilog=examples("invivo adapters unload poet"))
def unload(name: Name, url: options.Url = None, key: options.Key = None) -> None:
    """Forget an adapter; requests that run with it finish first."""
    with opened(None, url=of_server(url), key=key) as lm:
        lm.unload_adapter(name)
    note(f"{name} is unloaded")


def of_server(url: str | None) -> str:
    if url is None:
        raise InvalidRequest(
            "is missing: adapters are those of a running server",
            field="--url",
            remedy="Add --url http://127.0.0.1:8000, or set INVIVO_URL",
        )
    return url
