"""``invivo explain``: what a program would do on a prompt, before anything runs."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from invivo.cli import options, programs
from invivo.cli.output import examples, print_json
from invivo.errors import InvalidRequest

EXAMPLES = examples(
    "invivo explain 'The capital of Poland is' --at 'layers.9.mlp.out@\"Poland\"=zero'",
    "invivo explain 'The capital of Poland is' --program patch.yaml --json",
)


def explain(
    prompt: Annotated[str, typer.Argument(help="The prompt that the program is meant for.")],
    at: programs.At = None,
    program: programs.File = None,
    run: programs.Runs = None,
    blob: programs.Blobs = None,
    chat: programs.Chat = False,
    as_json: Annotated[bool, typer.Option("--json", help="The plan as JSON.")] = False,
    model: options.Model = None,
    url: options.Url = None,
    key: options.Key = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Explain a program: positions with their tokens, order, passes, bytes, cost."""
    from invivo.cli.opening import opened
    from invivo.edits.explain import explain_text

    sites, words = programs.split_words(at)
    if sites:
        raise InvalidRequest(
            "says neither what is changed nor what comes back",
            field="--at",
            given=sites[0],
            remedy=f"Write {sites[0]}=zero or {sites[0]}?none",
        )
    body = programs.read_program(program, words, run)
    if not body:
        raise InvalidRequest(
            "nothing to explain", field="--program", remedy="Give --program or --at"
        )
    blobs = programs.read_blobs(blob)
    with opened(model, url=url, key=key, device=device, dtype=dtype) as lm:
        told = lm.explain(body, programs.asked(prompt, chat), blobs=blobs or None)
    if as_json:
        print_json(told)
    else:
        sys.stdout.write(explain_text(told) + "\n")
