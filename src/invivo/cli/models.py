"""``invivo models``: what there is, getting more, looking inside, writing in the Hub's format."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from invivo.cli.output import byte_size, examples, note, print_json, print_table, stderr
from invivo.errors import Forbidden

if TYPE_CHECKING:
    from invivo.models.packaged import Progress

app = typer.Typer(
    help="Models: list, pull, info, convert.",
    epilog=examples(
        "invivo models list",
        "invivo models pull smollm2-135m",
        "invivo models info smollm2-135m --json",
        "invivo models convert ./model.Q8_0.gguf ./model --dtype bfloat16",
    ),
    no_args_is_help=True,
)
AsJson = Annotated[bool, typer.Option("--json", help="The result as JSON.")]
Name = Annotated[str, typer.Argument(help="Packaged name, Hub id, folder or GGUF file.")]


@app.command("list", epilog=examples("invivo models list", "invivo models list --json"))
def list_all(as_json: AsJson = False) -> None:
    """Show the packaged models and those converted already."""
    from invivo.models.resolve import list_models

    entries = list_models()
    if as_json:
        print_json(
            [
                {
                    "name": entry.name,
                    "state": entry.state,
                    "description": entry.description,
                    "licence": entry.licence,
                    "bytes": entry.n_bytes,
                    "path": None if entry.path is None else str(entry.path),
                }
                for entry in entries
            ]
        )
        return
    print_table(
        "",
        ["name", "state", "size>", "licence", "what it is"],
        [
            [entry.name, entry.state, byte_size(entry.n_bytes), entry.licence, entry.description]
            for entry in entries
        ],
    )
    note("Any folder, GGUF file or Hub id works by its name too.")


@app.command(
    epilog=examples("invivo models pull smollm2-135m", "invivo models pull Qwen/Qwen3-0.6B")
)
def pull(
    name: Name,
    accept_license: Annotated[
        bool, typer.Option("--accept-license", help="Accept the model's terms of use.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Download a model, convert it if needed, and print its folder."""
    from invivo.models.resolve import pull as pull_model

    try:
        with shares() as progress:
            folder = pull_model(name, progress=progress, accept_license=accept_license)
    except Forbidden as error:
        if error.field == "accept_license":
            note(f"To accept them: invivo models pull {name} --accept-license")
        raise
    if as_json:
        print_json({"name": name, "path": str(folder)})
    else:
        sys.stdout.write(f"{folder}\n")


@app.command(epilog=examples("invivo models info smollm2-135m", "invivo models info ./folder"))
def info(name: Name, as_json: AsJson = False) -> None:
    """Show a model's architecture, sizes and special tokens, without loading its weights."""
    facts = describe(name)
    if as_json:
        print_json(facts)
        return
    for key, value in facts.items():
        shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
        if isinstance(value, list):
            shown = ", ".join(str(one) for one in value)
        sys.stdout.write(f"{key.replace('_', ' '):<30} {shown}\n")


@app.command(
    epilog=examples(
        "invivo models convert ./model.Q8_0.gguf ./model",
        "invivo models convert smollm2-135m ./smollm2-bf16 --dtype bfloat16",
    )
)
def convert(
    source: Name,
    target: Annotated[Path, typer.Argument(help="New folder to write.")],
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="float32, bfloat16 or float16; as it is if absent."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a model as a folder in the Hub's format: config, safetensors, tokenizer.

    Such a folder loads here, in transformers, and in whatever else reads the Hub's format.
    """
    from invivo.models.convert import convert_gguf
    from invivo.models.load import load_model
    from invivo.models.save import save_model

    path = Path(source).expanduser()
    if path.suffix.lower() == ".gguf" and path.is_file() and dtype is None:
        with shares() as progress:
            convert_gguf(path, target, progress=progress)
    else:
        with stderr().status(f"converting {source}"):
            save_model(load_model(source, dtype=dtype or stored_dtype(source)), target)
    if as_json:
        print_json({"source": source, "path": str(target)})
    else:
        sys.stdout.write(f"{target}\n")


@contextmanager
def shares() -> Iterator[Progress]:
    """A callback ``(what, share)`` that draws one bar for each ``what``."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    console = stderr()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        shown: dict[str, Any] = {}

        def progress(what: str, share: float) -> None:
            if what not in shown:
                shown[what] = bars.add_task(what, total=1.0)
            bars.update(shown[what], completed=share)

        yield progress


def stored_dtype(name: str) -> str:
    """The dtype that a model's config names; float32 where it names none."""
    from invivo.models.load import read_json
    from invivo.models.resolve import resolve

    raw = read_json(resolve(name) / "config.json")
    return str(raw.get("dtype") or raw.get("torch_dtype") or "float32")


def describe(name: str) -> dict[str, Any]:
    """Facts about a model, from its config alone."""
    import torch

    from invivo.models.decoder import Decoder
    from invivo.models.hub_config import config_from_hf
    from invivo.models.load import read_json
    from invivo.models.resolve import resolve
    from invivo.models.sites import sites_of

    folder = resolve(name)
    raw = read_json(folder / "config.json")
    config = config_from_hf(raw)
    shapes = Decoder(config, device="meta", dtype=torch.float32)
    windows = sorted({layer.window for layer in config.layers if layer.window is not None})
    facts: dict[str, Any] = {
        "name": name,
        "path": str(folder),
        "family": config.family,
        "parameters": sum(p.numel() for p in shapes.parameters()),
        "stored_as": stored_dtype(name),
        "layers": config.n_layers,
        "width": config.d_model,
        "query_heads": config.n_heads,
        "key_heads": config.n_kv_heads,
        "head_width": config.head_dim,
        "feed_forward_width": config.d_ff,
        "vocabulary": config.vocab_size,
        "context": config.max_positions,
        "sliding_windows": windows,
        "tied_embeddings": config.tie_embeddings,
        "end_tokens": list(config.eos_token_ids),
        "float32_cache_bytes_per_token": 8 * config.n_layers * config.n_kv_heads * config.head_dim,
        "sites": len(sites_of(config)),
    }
    if config.moe is not None:
        facts["experts"] = config.moe.n_experts
        facts["experts_a_token"] = config.moe.top_k
    return facts
