"""Programs on the command line: words of the short form, files, other prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from invivo.cli import options
from invivo.errors import InvalidRequest

PROGRAM = "Program"

At = Annotated[
    list[str] | None,
    typer.Option(
        "--at",
        metavar="SITE|EDIT",
        help="A site to look at, or an edit or output such as 'layers.3.mlp.out@last=zero'; "
        "may be repeated.",
        rich_help_panel=PROGRAM,
    ),
]
File = Annotated[
    Path | None,
    typer.Option(
        "--program",
        "-p",
        help="Program as a YAML or JSON file (- = stdin).",
        rich_help_panel=PROGRAM,
    ),
]
Runs = Annotated[
    list[str] | None,
    typer.Option(
        "--run",
        metavar="NAME=PROMPT",
        help="Another prompt that edits may take values from; may be repeated.",
        rich_help_panel=PROGRAM,
    ),
]
Blobs = Annotated[
    list[str] | None,
    typer.Option(
        "--blob",
        metavar="NAME=FILE",
        help="A tensor that the program names: a .npy file, or FILE.safetensors:TENSOR.",
        rich_help_panel=PROGRAM,
    ),
]


Chat = Annotated[
    bool,
    typer.Option("--chat", help="The prompt is a message, through the model's chat template."),
]


def asked(prompt: str, chat: bool) -> Any:
    """The prompt as the LM takes it."""
    return [{"role": "user", "content": prompt}] if chat else prompt


def split_words(given: list[str] | None) -> tuple[list[str], list[str]]:
    """What ``--at`` holds: names of sites, and words of the short form."""
    sites: list[str] = []
    words: list[str] = []
    for one in given or []:
        (words if "=" in one or "?" in one else sites).append(one)
    return sites, words


def read_program(file: Path | None, words: list[str], runs: list[str] | None) -> dict[str, Any]:
    """The program of a file, or of words, as JSON data; {} where there is none.

    Raises:
        InvalidRequest: both are given, or it is no program.
    """
    prompts: dict[str, Any] = {}
    for one in runs or []:
        name, sign, prompt = one.partition("=")
        if not (name and sign):
            raise InvalidRequest("is not NAME=PROMPT", field="--run", given=one)
        prompts[name] = {"prompt": prompt}
    if file is None:
        if not words:
            if prompts:
                raise InvalidRequest(
                    "a run is there for edits", field="--run", remedy="Give --at too"
                )
            return {}
        from invivo.edits.short import read_short

        return read_short(words, runs=prompts).to_dict()
    if words or prompts:
        raise InvalidRequest(
            "the program is in the file", field="--program", remedy="Leave out --run and edits"
        )
    return _parse(options.read_text(file, "--program"), file)


def _parse(text: str, file: Path) -> dict[str, Any]:
    from invivo.edits.program import parse_program
    from invivo.edits.yaml_form import read_yaml

    if file.suffix == ".json" or text.lstrip().startswith("{"):
        return parse_program(text).to_dict()
    return read_yaml(text).to_dict()


def read_blobs(given: list[str] | None) -> dict[str, Any]:
    """Arrays by name.

    Raises:
        InvalidRequest: a file is missing or holds no tensor of the name.
    """
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    found: dict[str, Any] = {}
    for one in given or []:
        name, sign, place = one.partition("=")
        if not (name and sign and place):
            raise InvalidRequest(
                "is not NAME=FILE", field="--blob", given=one, remedy="Write v=direction.npy"
            )
        path, _, inside = place.partition(".safetensors:")
        try:
            if inside:
                found[name] = load_file(f"{path}.safetensors")[inside]
            else:
                found[name] = np.load(place, allow_pickle=False)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise InvalidRequest(
                f"cannot be read: {error}", field="--blob", given=one,
                remedy="Give a .npy file, or FILE.safetensors:TENSOR",
            ) from error  # fmt: skip
    return found
