"""``invivo demo``: the show of :mod:`invivo.demo`, the same as ``python -m invivo.demo``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from invivo.cli.output import examples

EXAMPLES = examples(
    "invivo demo                  then look at the page whose address it prints",
    "invivo demo --exit --json    measure and leave",
)


def demo(
    leave: Annotated[
        bool, typer.Option("--exit", help="End after the report instead of serving on.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The measurements as JSON.")] = False,
    port: Annotated[int, typer.Option("--port", help="0 takes a free one.")] = 0,
) -> None:
    """SmolLM2-135M serves a mixed load while a LoRA learns; tables and a report show how."""
    from invivo.demo.show import run_demo

    run_demo(port=port, stay=sys.stdin.isatty() and not leave, as_json=as_json)
