"""``invivo models``."""

from __future__ import annotations

import typer

app = typer.Typer(help="Models: list, pull, info, convert.", no_args_is_help=True)
