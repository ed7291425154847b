"""``invivo plan``: what fine-tuning a model would hold in memory, before any weight is loaded."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from invivo.cli.output import byte_size, examples, print_json, print_table
from invivo.errors import InvalidRequest

if TYPE_CHECKING:
    from invivo.engine.memory_plan import MemoryPlan, Row
    from invivo.engine.trainable import Kind, Trainable
    from invivo.models.config import ModelConfig

EXAMPLES = examples(
    "invivo plan smollm2-135m --lora r=16 --on down_proj --length 8192",
    "invivo plan ./model --lora r=8 --on q_proj,v_proj --layers 16-31 --window 256",
    "invivo plan ./model --lora r=16 --rerun gate,up     a smaller tape for more arithmetic",
    "invivo plan ./config.json --adapter r=64 --all      every tensor, dropped ones too",
    "invivo plan smollm2-135m --soft-prompt n=20 --json",
)
BYPASS, SEQUENCE = "Bypass", "Sequence"


def plan(
    model: Annotated[
        str, typer.Argument(help="Packaged name, Hub id, folder, GGUF file or config.json.")
    ],
    lora: Annotated[
        str | None, typer.Option("--lora", metavar="r=N", help="Rank.", rich_help_panel=BYPASS)
    ] = None,
    ia3: Annotated[
        bool, typer.Option("--ia3", help="Scaling vectors.", rich_help_panel=BYPASS)
    ] = False,
    adapter: Annotated[
        str | None,
        typer.Option("--adapter", metavar="r=N", help="Bottleneck.", rich_help_panel=BYPASS),
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option("--prefix", metavar="n=N", help="Trained key rows.", rich_help_panel=BYPASS),
    ] = None,
    soft_prompt: Annotated[
        str | None,
        typer.Option(
            "--soft-prompt", metavar="n=N", help="Trained tokens in front.", rich_help_panel=BYPASS
        ),
    ] = None,
    steering: Annotated[
        bool, typer.Option("--steering", help="A vector at a site.", rich_help_panel=BYPASS)
    ] = False,
    on: Annotated[
        str | None,
        typer.Option(
            "--on", help="Linear maps or sites, with commas between.", rich_help_panel=BYPASS
        ),
    ] = None,
    layers: Annotated[
        str | None, typer.Option("--layers", help="Such as 0,4,8-31; all.", rich_help_panel=BYPASS)
    ] = None,
    length: Annotated[
        int, typer.Option("--length", min=1, help="Tokens.", rich_help_panel=SEQUENCE)
    ] = 2048,
    window: Annotated[
        int,
        typer.Option(
            "--window", min=1, help="Tokens of a window of the backward.", rich_help_panel=SEQUENCE
        ),
    ] = 512,
    rerun: Annotated[
        str | None,
        typer.Option("--rerun", help="What the backward may run again: q,k,v,o,gate,up,attention."),
    ] = None,
    tape_bytes: Annotated[
        int | None,
        typer.Option(
            "--tape-bytes",
            min=1,
            help="Most bytes of the tape: what runs again is chosen, layer by layer.",
            rich_help_panel=SEQUENCE,
        ),
    ] = None,
    host_bytes: Annotated[
        int,
        typer.Option(
            "--host-bytes",
            min=0,
            help="Host memory for what the tape's bytes have no room for (layer order).",
            rich_help_panel=SEQUENCE,
        ),
    ] = 0,
    host_gb_per_s: Annotated[
        float,
        typer.Option("--host-gb-per-s", help="What is copied there.", rich_help_panel=SEQUENCE),
    ] = 52.0,
    dtype: Annotated[str, typer.Option("--dtype", help="Of weights and activations.")] = "bfloat16",
    every: Annotated[bool, typer.Option("--all", help="Show dropped tensors too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The plan as JSON.")] = False,
) -> None:
    """Show which tensors fine-tuning keeps, rebuilds, compresses or drops, and all bytes."""
    from invivo.engine.memory_plan import plan_activations

    config = read_config(model)
    chosen: list[tuple[Kind, str | None, bool]] = [
        ("lora", lora, lora is not None),
        ("ia3", None, ia3),
        ("adapter", adapter, adapter is not None),
        ("prefix", prefix, prefix is not None),
        ("soft_prompt", soft_prompt, soft_prompt is not None),
        ("steering", None, steering),
    ]
    trainables = [
        trainable(kind, size, on, layers) for kind, size, wanted in chosen if wanted
    ]  # fmt: skip
    if not trainables:
        raise InvalidRequest(
            "nothing to train", field="--lora", remedy="Name a bypass, such as --lora r=16"
        )
    made = plan_activations(
        config,
        trainables,
        length=length,
        window=window,
        rerun=words(rerun),
        tape_bytes=tape_bytes,
        host_bytes=host_bytes,
        host_gb_per_s=host_gb_per_s,
        dtype=dtype,
    )
    if as_json:
        print_json({"model": model, **made.as_dict()})
    else:
        show(made, every)


def read_config(name: str) -> ModelConfig:
    """The config of a model, from its folder or from a ``config.json`` alone."""
    from invivo.models.hub_config import config_from_hf
    from invivo.models.load import read_json
    from invivo.models.resolve import resolve

    path = Path(name).expanduser()
    if path.suffix != ".json":
        path = resolve(name) / "config.json"
    return config_from_hf(read_json(path))


def trainable(kind: Kind, size: str | None, on: str | None, layers: str | None) -> Trainable:
    """One bypass from its options; ``--on`` belongs to the kinds that have a place to choose."""
    from invivo.engine.trainable import Trainable

    placeless = kind in ("prefix", "soft_prompt")
    return Trainable(
        kind,
        () if placeless else words(on),
        0 if size is None else parse_size(size, "--" + kind.replace("_", "-")),
        None if kind == "soft_prompt" else parse_layers(layers),
    )


def words(text: str | None) -> tuple[str, ...]:
    """``"a, b"`` as ``("a", "b")``."""
    return tuple(word.strip() for word in (text or "").split(",") if word.strip())


def parse_size(text: str, field: str) -> int:
    """``"r=16"``, ``"n=20"`` or ``"16"``."""
    match = re.fullmatch(r"\s*(?:[rn]\s*=\s*)?(\d+)\s*", text)
    if match is None:
        raise InvalidRequest("is not a size", field=field, given=text, remedy="Write r=16")
    return int(match[1])


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """``"0,4,8-11"`` as ``(0, 4, 8, 9, 10, 11)``."""
    if text is None:
        return None
    found: list[int] = []
    for word in words(text):
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", word)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise InvalidRequest(
                "is not a list of layers", field="--layers", given=text, remedy="Write 0,4,8-31"
            )
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(found)


def show(made: MemoryPlan, every: bool) -> None:
    rows = [row for row in made.rows if every or row.verdict != "dropped"]
    print_table(
        f"Tensors of a sequence of {made.length} tokens in {made.dtype}",
        ["tensor", "layers", "a token", "B/token>", "all>", "verdict", "why"],
        [tensor_cells(row, made.dtype) for row in rows],
    )
    t = made.totals
    steps = [
        ("naive: plain code, everything requires a gradient", t.naive),
        ("plain code, base frozen, fused attention", t.frozen),
        ("graph pruning", t.pruned),
        ("+ rematerialisation", t.rebuilt),
        ("+ compression", t.compressed),
    ]
    if t.hosted:
        steps.append(("  and in host memory", t.hosted))
    if any(row.held == "window" for row in made.rows):  # recurrent layers: there is no tape
        steps[2:] = [("as one window that runs again", t.pruned)]
    print_table(
        "Held between forward and backward, whole sequence",
        ["step", "bytes>", "of naive>"],
        [[name, byte_size(n_bytes), f"{100 * n_bytes / t.naive:.1f} %"] for name, n_bytes in steps],
    )
    print_table(
        f"Token-level backward, windows of {made.window} tokens",
        ["order", "whole sequence", "of it>", "one window>", "together>"],
        [
            [
                s.name,
                ", ".join(f"{part} {byte_size(n)}" for part, n in s.parts.items()),
                byte_size(s.sequence),
                byte_size(s.window),
                byte_size(s.total),
            ]
            for s in made.schedules
        ],
    )
    own = made.trained
    sys.stdout.write(
        f"{own.parameters:,} trained numbers: {byte_size(own.working)} working copy, "
        f"{byte_size(own.master)} master, {byte_size(own.gradients)} gradients, "
        f"{byte_size(own.moments)} Adam moments\n"
    )


def tensor_cells(row: Row, usual: str) -> list[str]:
    """A row of the table; its dtype is told where it is not the ``usual`` one."""
    verdict = f"{row.verdict} ({row.held})" if row.held else row.verdict
    shape = " x ".join(str(n) for n in row.shape) + ("" if row.dtype == usual else f" {row.dtype}")
    per_token = f"{row.bytes_per_token:,.0f}"
    whole = byte_size(row.n_bytes)
    return [row.name, layer_ranges(row.layers), shape, per_token, whole, verdict, row.reason]


def layer_ranges(layers: tuple[int, ...]) -> str:
    """``(0, 2, 3, 4)`` as ``0, 2-4``."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans) or "-"
