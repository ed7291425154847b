"""``invivo keys``: the bearer keys of a server on this machine."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from invivo.cli.output import examples, note, print_json, print_table

if TYPE_CHECKING:
    from invivo.server.keys import Key, KeyStore

app = typer.Typer(
    help="Bearer keys: add, list, revoke. A running server sees changes at once.",
    epilog=examples(
        "invivo keys add laptop",
        "invivo keys add class --scope generate --budget 1000000",
        "invivo keys list --json",
        "invivo keys revoke laptop",
    ),
    no_args_is_help=True,
)
Database = Annotated[
    str | None,
    typer.Option(
        "--database",
        envvar="INVIVO_DATABASE",
        help="SQLAlchemy URL of the key store; a file in the user's data folder if not given.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="The result as JSON.")]


@contextmanager
def store(database: str | None) -> Iterator[KeyStore]:
    from invivo.server.keys import KeyStore
    from invivo.server.settings import default_database

    opened = KeyStore(database or default_database())
    try:
        yield opened
    finally:
        opened.close()


@app.command(epilog=examples("invivo keys add laptop --scope generate --scope score"))
def add(
    name: Annotated[str, typer.Argument(help="What to call it.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(
            "--scope",
            help="generate, score, adapters, finetune, metrics or admin; may be "
            "repeated. \\[default: generate, score]",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        int | None, typer.Option("--budget", help="Tokens it may spend in all.")
    ] = None,
    database: Database = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print its secret, once: only its hash is kept."""
    from invivo.server.keys import DEFAULT_SCOPES

    with store(database) as keys:
        secret, key = keys.add(name, scopes=scope or DEFAULT_SCOPES, budget=budget)
    if as_json:
        print_json({"key": secret, **record(key)})
        return
    sys.stdout.write(secret + "\n")
    note("Keep it: it cannot be shown again.")


@app.command("list", epilog=examples("invivo keys list", "invivo keys list --json"))
def list_keys(database: Database = None, as_json: AsJson = False) -> None:
    """Show all keys, revoked ones too, without their secrets."""
    with store(database) as keys:
        found = keys.list()
    if as_json:
        print_json([record(key) for key in found])
        return
    if not found:
        note("No keys yet: invivo keys add NAME")
        return
    print_table(
        "",
        ["name", "id", "scopes", "used>", "budget>", "created", "last used", "state"],
        [
            [
                key.name,
                key.id,
                ", ".join(sorted(key.scopes)),
                str(key.used),
                "-" if key.budget is None else str(key.budget),
                day(key.created),
                day(key.last_used),
                "active" if key.revoked is None else f"revoked {day(key.revoked)}",
            ]
            for key in found
        ],
    )


@app.command(epilog=examples("invivo keys revoke laptop"))
def revoke(
    name: Annotated[str, typer.Argument(help="Name or id.")],
    database: Database = None,
    as_json: AsJson = False,
) -> None:
    """End a key for good."""
    with store(database) as keys:
        key = keys.revoke(name)
    if as_json:
        print_json(record(key))
    else:
        note(f"{key.name} is revoked")


def record(key: Key) -> dict[str, Any]:
    return {
        "id": key.id,
        "name": key.name,
        "scopes": sorted(key.scopes),
        "budget": key.budget,
        "used": key.used,
        "created": key.created,
        "last_used": key.last_used,
        "revoked": key.revoked,
    }


def day(moment: float | None) -> str:
    if moment is None:
        return "-"
    return datetime.datetime.fromtimestamp(moment).strftime("%Y-%m-%d %H:%M")
