"""Options that several commands share, as annotated types: one wording, one behaviour."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from invivo.errors import InvalidRequest

MODEL, SAMPLING = "Model", "Sampling"
DEFAULT_MODEL = "smollm2-135m"

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        envvar="INVIVO_MODEL",
        help=f"Model name, folder, file or Hub id. [dim]\\[default: {DEFAULT_MODEL}][/dim]",
        rich_help_panel=MODEL,
        show_default=False,
    ),
]
Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        "-u",
        envvar="INVIVO_URL",
        help="Ask a running server instead of loading a model here.",
        rich_help_panel=MODEL,
    ),
]
Key = Annotated[
    str | None,
    typer.Option(
        "--key", envvar="INVIVO_KEY", help="Bearer key of that server.", rich_help_panel=MODEL
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device", help="cpu, cuda, cuda:1 ...; a GPU is taken if any.", rich_help_panel=MODEL
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="float32, bfloat16 or float16; chosen by device if not given.",
        rich_help_panel=MODEL,
    ),
]
Runs = Annotated[
    Path, typer.Option("--runs", envvar="INVIVO_RUNS", help="Where runs lie, each in its folder.")
]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        "-a",
        metavar="NAME=PATH",
        help="Load an adapter (peft format); may be repeated.",
        rich_help_panel=MODEL,
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option("--temperature", "-t", help="0 is greedy.", rich_help_panel=SAMPLING),
]
MaxTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", "-n", help="Length limit.", rich_help_panel=SAMPLING),
]
TopP = Annotated[float | None, typer.Option("--top-p", rich_help_panel=SAMPLING)]
TopK = Annotated[int | None, typer.Option("--top-k", rich_help_panel=SAMPLING)]
MinP = Annotated[float | None, typer.Option("--min-p", rich_help_panel=SAMPLING)]
RepetitionPenalty = Annotated[
    float | None, typer.Option("--repetition-penalty", rich_help_panel=SAMPLING)
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", help="The same seed, the same draws.", rich_help_panel=SAMPLING),
]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", help="End the text here; may be repeated.", rich_help_panel=SAMPLING),
]
JsonSchema = Annotated[
    str | None,
    typer.Option(
        "--json-schema", help="JSON schema (text or file) to answer in.", rich_help_panel=SAMPLING
    ),
]
Regex = Annotated[
    str | None,
    typer.Option("--regex", help="Regular expression to answer in.", rich_help_panel=SAMPLING),
]
Choices = Annotated[
    list[str] | None,
    typer.Option("--choice", help="One of these; may be repeated.", rich_help_panel=SAMPLING),
]


def sampling_fields(**given: Any) -> dict[str, Any]:
    """The sampling arguments of an LM call: only what was given, schemas read and parsed."""
    fields = {name: value for name, value in given.items() if value is not None and value != []}
    if "json_schema" in fields:
        fields["json_schema"] = read_schema(fields["json_schema"])
    return fields


def read_schema(text: str) -> dict[str, Any]:
    """A JSON schema from its text or from the file of that name."""
    source = text if text.lstrip().startswith("{") else read_text(Path(text), "--json-schema")
    try:
        schema = json.loads(source)
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"is not JSON ({error})", field="--json-schema", given=text) from error
    if not isinstance(schema, dict):
        raise InvalidRequest("is not a JSON object", field="--json-schema", given=text)
    return schema


def read_text(path: Path, field: str) -> str:
    """A UTF-8 file's text, ``-`` for standard input."""
    try:
        if str(path) == "-":
            return typer.get_text_stream("stdin").read()
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InvalidRequest(
            f"cannot be read: {reason}",
            field=field,
            given=str(path),
            remedy="Name a text file, or - for standard input",
        ) from error


def adapter_paths(given: list[str] | None) -> dict[str, str]:
    """``["poet=./poet"]`` as ``{"poet": "./poet"}``."""
    paths: dict[str, str] = {}
    for item in given or []:
        name, sign, path = item.partition("=")
        if not (name and sign and path):
            raise InvalidRequest(
                "is not NAME=PATH", field="--adapter", given=item, remedy="Write poet=./poet"
            )
        paths[name] = path
    return paths


def parse_bytes(text: str, field: str) -> int:
    """``2GiB``, ``512M`` or a plain number of bytes; units are powers of 1024."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if match is None:
        raise InvalidRequest(
            "is not a size", field=field, given=text, remedy="Write 512MiB or 2GiB"
        )
    return int(float(match[1]) * 1024 ** " kmgt".index(match[2] or " "))
